"""The texts of a picture, in columns beside its lines, and the figure that holds them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from archscale_jax._draw.layout import Layout, Row
from archscale_jax._draw.parts import Knot, Stroke
from archscale_jax._draw.styles import DEAD_COLOR, INK, TEXT_SIZE, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.legend import Legend

MAX_NAME = 48
"""Longer names of layers, in characters, are shortened in the middle."""

# Lengths are in inches, heights are counted downwards.
LANE = 0.2
"""Distance of two lanes."""
ROW = 0.2
"""Height of a row that has texts."""

_MARGIN = 0.15
_GAP = 0.2  # between columns
_NUMBER_SIZE = 6.5
_NOTE_SIZE = 7
_TITLE_SIZE = 11
_PALE = "#808080"
_GUIDE = "#e2e2e2"


def write_rows(
    axes: Axes,
    canvas: FigureCanvasAgg,
    layout: Layout,
    heights: dict[Row, float],
    knots: Sequence[Knot],
    strokes: Sequence[Stroke],
) -> tuple[float, float]:
    """Writes the texts of all rows in columns; returns where they begin and end."""
    lanes = [*layout.columns, *layout.lanes]
    names = [_shortened(stroke.layer.name) for stroke in strokes]
    numbers = min(lanes) * LANE - 0.7 * _GAP
    first = max(lanes) * LANE + _GAP
    second = first + _GAP + max(_width(canvas, name) for name in ("output", *names))
    left = numbers - _width(canvas, str(len(knots)), _NUMBER_SIZE)
    right = second + max(_width(canvas, stroke.layer.text) for stroke in strokes)
    for index, knot in enumerate(knots):
        y = heights["vertex", index]
        if knot.number is not None:
            write_text(axes, numbers, y, str(knot.number), _NUMBER_SIZE, ha="right", color=_PALE)
        if knot.text:
            write_text(axes, first, y, knot.text, style="italic")
    for index, (stroke, name) in enumerate(zip(strokes, names, strict=True)):
        if stroke.line.marked:
            y = heights["line", index]
            x = layout.lanes[index] * LANE
            axes.plot([x, first - 0.06], [y, y], color=_GUIDE, linewidth=0.7, zorder=0)
            color = INK if stroke.alive else DEAD_COLOR
            folder = name[: name.rfind("/") + 1]
            pale = _PALE if stroke.alive else color
            write_text(axes, first, y, folder, color=pale, gid=f"folder-{stroke.name}")
            leaf_x = first + _width(canvas, folder)
            write_text(axes, leaf_x, y, name[len(folder) :], color=color, gid=f"name-{stroke.name}")
            write_text(axes, second, y, stroke.layer.text, color=color, gid=f"text-{stroke.name}")
    return left, right


def fit_figure(
    axes: Axes,
    canvas: FigureCanvasAgg,
    sides: tuple[float, float],
    bottom: float,
    legend: Legend,
    title: str | None,
    notes: Sequence[str],
) -> None:
    """Writes the title and the note below, and makes the figure as large as all that it holds."""
    figure = canvas.figure
    legend_box = legend.get_window_extent(canvas.get_renderer())
    lines = [] if title is None else title.split("\n")
    widest = [_width(canvas, line, _TITLE_SIZE) for line in lines]
    width = max([sides[1] - sides[0], legend_box.width / figure.dpi, *widest])
    middle = sum(sides) / 2
    if notes:
        bottom += ROW * 1.2
        text = _listed(canvas, notes, width)
        write_text(axes, middle - width / 2, bottom, text, _NOTE_SIZE, color=_PALE, gid="note")
    top = -_MARGIN
    if title is not None:
        options = {"va": "bottom", "ha": "center", "gid": "title"}
        write_text(axes, middle, -_MARGIN / 2, title, _TITLE_SIZE, **options)
        top -= len(lines) * _TITLE_SIZE * 1.3 / 72
    below = legend_box.height / figure.dpi + _MARGIN / 2
    size = width + 2 * _MARGIN, bottom + _MARGIN - top + below
    figure.set_size_inches(size)
    axes.set_position((0, below / size[1], 1, 1 - below / size[1]))
    axes.set(xlim=(middle - size[0] / 2, middle + size[0] / 2), ylim=(bottom + _MARGIN, top))


def _listed(canvas: FigureCanvasAgg, names: Sequence[str], width: float) -> str:
    """Names of as many layers of vertices as the width holds."""
    for count in range(len(names), 0, -1):
        more = f", … ({len(names)} in all)" if count < len(names) else ""
        text = "at vertices: " + ", ".join(map(_shortened, names[:count])) + more
        if _width(canvas, text, _NOTE_SIZE) <= width:
            return text
    return f"at vertices: {len(names)} layers"


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    end = MAX_NAME * 2 // 3
    return name[: MAX_NAME - end - 1] + "…" + name[-end:]


def _width(canvas: FigureCanvasAgg, text: str, size: float = TEXT_SIZE) -> float:
    """Width of one line of text, in inches."""
    from matplotlib.font_manager import FontProperties

    renderer = canvas.get_renderer()
    font = FontProperties(size=size)
    return renderer.get_text_width_height_descent(text, font, False)[0] / canvas.figure.dpi
