"""Figures of equal panels, as the studies draw them."""

import pathlib

from experiments.lab import files


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
        panel.tick_params(labelsize=8, labelbottom=True)
    return figure, list(panels.flat[:number])


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
