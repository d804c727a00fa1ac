"""Figures of equal panels, as the studies draw them."""

import pathlib

from archscale_jax import files


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


def save(figure, path: pathlib.Path) -> None:
    """Writes a figure atomically."""
    files.write_atomically(path, lambda target: figure.savefig(target, dpi=120))
