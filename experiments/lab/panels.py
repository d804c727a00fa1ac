"""Figures of equal panels, as the studies draw them."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from experiments.lab import files

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito."""
GREY = "#777777"


class Figure(NamedTuple):
    """A figure with a panel for each of several groups, whose name is the panel's title.

    Attributes:
      select: from what is to be shown to groups by name; of no group no figure is drawn.
      draw_panel: draws a group on a panel.
      across: what the horizontal axes show.
      up: what the vertical axes show.
      caption: what the figure shows.
      options: passed to `Figure.subplots`.
    """

    select: Callable[[Any], Mapping[str, Any]]
    draw_panel: Callable[[Any, Any], None]
    across: str
    up: str
    caption: str
    options: Mapping[str, Any] = {}


def draw_figures(
    figures: Mapping[str, Figure],
    shown: Any,
    folder: pathlib.Path,
    *,
    height: float,
    width: float,
    columns: int,
    order: Iterable[str] = (),
) -> dict[pathlib.Path, str]:
    """Draws figures of the same results, each with one legend.

    Args:
      figures: by name, which the files get.
      shown: what their `select` takes.
      folder: of the files.
      height: see `create_panels`.
      width: see `create_panels`.
      columns: see `create_panels`.
      order: see `finish`.

    Returns:
      The captions of those that were drawn, by the path of the PNG.
    """
    drawn = {}
    for name, how in figures.items():
        groups = how.select(shown)
        if not groups:
            continue
        figure, panels = create_panels(
            len(groups), height, width=width, columns=columns, **how.options
        )
        for panel, (title, group) in zip(panels, groups.items(), strict=True):
            panel.set_title(title, fontsize=9)
            how.draw_panel(panel, group)
        path = folder / f"{name}.png"
        legend = 2 if len(panels) == 1 else 3
        finish(figure, path, across=how.across, up=how.up, columns=legend, order=order)
        drawn[path] = how.caption
    return drawn


def create_panels(number: int, height: float, *, width: float, columns: int, **options):
    """A figure with so many panels, in rows of at most so many.

    Args:
      number: of panels, at least 1.
      height: of a panel, in inches.
      width: of a panel, in inches.
      columns: the most panels a row; rows are filled evenly.
      **options: passed to `Figure.subplots`.

    Returns:
      The figure and its panels.
    """
    from matplotlib.figure import Figure

    rows = -(-number // columns)
    columns = -(-number // rows)
    size = (width * columns + 0.4, height * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in panels.flat[number:]:
        panel.set_visible(False)
    for panel in panels.flat[:number]:
        panel.grid(alpha=0.3)
        panel.tick_params(which="both", labelsize=8, labelbottom=True)
    return figure, list(panels.flat[:number])


def finish(
    figure,
    path: pathlib.Path,
    *,
    across: str = "",
    up: str = "",
    columns: int = 0,
    order: Iterable[str] = (),
) -> None:
    """Labels the axes of all panels together, adds one legend of what they name, and saves.

    Args:
      figure: of panels.
      path: see `save`.
      across: what the horizontal axes show.
      up: what the vertical axes show.
      columns: of the legend; 0 for no legend.
      order: labels of the legend that come first.
    """
    if across:
        figure.supxlabel(across, fontsize=9)
    if up:
        figure.supylabel(up, fontsize=9)
    entries: dict[str, Any] = dict.fromkeys(order)
    for panel in figure.axes if columns else ():
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries[label] = entries.get(label) or handle
    entries = {label: handle for label, handle in entries.items() if handle is not None}
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
    save(figure, path)


def plain_sizes(panel, sizes: Iterable[float], **options: Any) -> None:
    """Marks sizes on a logarithmic horizontal axis by their numbers, and nothing else."""
    panel.set(xscale="log")
    panel.set_xticks([*sizes], [f"{size:g}" for size in sizes], **options)
    panel.xaxis.minorticks_off()


def save(figure, path: pathlib.Path, *, dpi: float | str = 120) -> None:
    """Writes a figure as the PNG of this path and as the SVG beside it, each atomically.

    The SVG holds texts as texts and is the same for the same figure, byte for byte.
    """
    import matplotlib

    files.write_atomically(path, lambda target: figure.savefig(target, dpi=dpi))
    figure.set_layout_engine("none")  # all parts stay where they are
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        files.write_atomically(
            path.with_suffix(".svg"),
            lambda target: figure.savefig(target, metadata={"Date": None}),
        )
