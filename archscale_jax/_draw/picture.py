"""Draws an architecture or a graph: `draw`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jraph

from archscale_jax._architecture import Architecture, check_architecture
from archscale_jax._draw.labels import vertex_layers
from archscale_jax._draw.layout import Layout, Row, arrange
from archscale_jax._draw.parts import Knot, Stroke, picture_parts
from archscale_jax._draw.styles import DEAD_COLOR, EDGE_STYLES, INK, draw_legend
from archscale_jax._draw.texts import LANE, ROW, fit_figure, write_rows
from archscale_jax._extras import needed_by
from archscale_jax._files import write_atomically
from archscale_jax._graph import Operator, validate_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

MAX_VERTICES = 120
"""Larger graphs cannot be read as a picture."""

SUFFIXES = (".png", ".svg")

# Lengths are in inches, heights are counted downwards.
_SMALL_ROW = 0.13  # of a vertex that joins nothing
_TURN = 0.13  # height in which a line moves to another lane
_MARK = (0.14, 0.09)
_RADIUS = 0.065  # of a vertex that joins; of the input and output, and of the others:
_END_RADIUS = 0.045
_DOT_RADIUS = 0.035


def draw(
    architecture: Architecture | jraph.GraphsTuple,
    path: str | pathlib.Path | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draws an architecture from top to bottom, and writes the picture where a path is given.

    A mark on a line is a layer; its name and what it computes stand in its row. A circle is a
    vertex, with its number on the left: `+` sums, `×` multiplies and `∥` concatenates what leads
    into it, a dot has one source. The chain with most weights is straight. Layers of vertices
    themselves, such as normalization, are named below; what is on no path is grey.

    Uses no global state of matplotlib: any thread may draw. The artists carry the group ids
    `vertex-v`, `input`, `output`, and `edge-u-v` (of parallel edges, the second and further ones
    end in `-1`, `-2`, …), `stem-n` and `readout-n` for lines, with `mark-`, `folder-`, `name-`
    and `text-` before these for what belongs to a line.

    Args:
      architecture: what `trace` returns, or a single graph, whose layers have no names; of at most
        `MAX_VERTICES` vertices.
      path: file to write, PNG or SVG by its suffix; a picture that fails leaves no file.
      title: text above the picture.

    Returns:
      The figure.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      TypeError: `architecture` is neither an `Architecture` nor a graph.
      ValueError: another suffix, too many vertices, or a graph that is not valid.
    """
    with needed_by("archscale_jax.draw", "plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    if isinstance(architecture, jraph.GraphsTuple):
        architecture = Architecture(architecture, ())
    check_architecture(architecture)
    _check(architecture.graph, path)
    knots, strokes = picture_parts(architecture)
    layout = arrange(len(knots), [stroke.line for stroke in strokes])
    heights = _row_heights(layout, knots)
    figure = Figure(dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _draw_strokes(axes, layout, heights, strokes)
    _draw_knots(axes, layout, heights, knots)
    left, right = write_rows(axes, canvas, layout, heights, knots, strokes)
    bottom = max(heights.values())
    dead = not all(part.alive for part in (*knots, *strokes))
    legend = draw_legend(axes, {stroke.layer.operator for stroke in strokes}, dead)
    fit_figure(axes, canvas, (left, right), bottom, legend, title, vertex_layers(architecture))
    if path is not None:
        write_atomically(path, figure.savefig)
    return figure


def _check(graph: jraph.GraphsTuple, path: str | pathlib.Path | None) -> None:
    if path is not None and pathlib.Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, found {str(path)!r}")
    validate_graph(graph)
    if len(graph.nodes) > MAX_VERTICES:
        raise ValueError(
            f"architecture has {len(graph.nodes)} vertices, too many for a picture; accepted are "
            f"at most {MAX_VERTICES}"
        )


def _row_heights(layout: Layout, knots: Sequence[Knot]) -> dict[Row, float]:
    """The height of every row."""
    heights, below = {}, 0.0
    for kind, index in layout.rows:
        small = kind == "vertex" and knots[index].join is None and not knots[index].text
        row = _SMALL_ROW if small else ROW
        heights[kind, index] = below + row / 2
        below += row
    return heights


def _draw_strokes(
    axes: Axes,
    layout: Layout,
    heights: dict[Row, float],
    strokes: Sequence[Stroke],
) -> None:
    from matplotlib.patches import FancyBboxPatch, PathPatch

    width, height = _MARK
    for index, (stroke, lane) in enumerate(zip(strokes, layout.lanes, strict=True)):
        style = EDGE_STYLES[stroke.layer.operator]
        color = style.color if stroke.alive else DEAD_COLOR
        x = lane * LANE
        start, end = (
            (layout.columns[knot] * LANE, heights["vertex", knot])
            for knot in (stroke.line.sender, stroke.line.receiver)
        )
        if stroke.line.marked:
            y = heights["line", index]
            start = start if stroke.layer.reads else (x, y)
            corner = (x - width / 2, y - height / 2)
            shape = "round,pad=0,rounding_size=0.025"
            mark = FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=color)
            mark.set(edgecolor="white", linewidth=0.8, zorder=3)
            _add(axes, mark, f"mark-{stroke.name}")
        course = PathPatch(_course(start, x, end), facecolor="none", edgecolor=color)
        course.set(linewidth=1.5, linestyle=style.line_style, capstyle="butt")
        course.set_zorder(2 if stroke.alive else 1)
        _add(axes, course, stroke.name)


def _course(start: tuple[float, float], x: float, end: tuple[float, float]):
    """The path from a start into the lane at x, and from there to an end, by quarter ellipses."""
    from matplotlib.path import Path

    turn = min(_TURN, (end[1] - start[1]) / 2)
    points, codes = [start], [Path.MOVETO]
    if start[0] != x:
        y = start[1] + turn
        points += [(x + 0.45 * (start[0] - x), start[1]), (x, y - 0.55 * turn), (x, y)]
        codes += [Path.CURVE4] * 3
    if end[0] == x:
        return Path([*points, end], [*codes, Path.LINETO])
    y = end[1] - turn
    points += [(x, y), (x, y + 0.55 * turn), (x + 0.45 * (end[0] - x), end[1]), end]
    return Path(points, [*codes, Path.LINETO, *[Path.CURVE4] * 3])


def _draw_knots(
    axes: Axes, layout: Layout, heights: dict[Row, float], knots: Sequence[Knot]
) -> None:
    from matplotlib.patches import Circle

    for index, knot in enumerate(knots):
        center = layout.columns[index] * LANE, heights["vertex", index]
        color = INK if knot.alive else DEAD_COLOR
        radius = _END_RADIUS if knot.text else _DOT_RADIUS
        if knot.join is not None:
            radius = _RADIUS
            _draw_sign(axes, center, knot.join, color)
        filled = knot.join is None and not knot.text
        circle = Circle(center, radius, facecolor=color if filled else "white", edgecolor=color)
        circle.set(linewidth=1, zorder=4)
        _add(axes, circle, knot.name)


def _draw_sign(axes: Axes, center: tuple[float, float], join: Operator, color: str) -> None:
    """Draws two strokes within the circle of a vertex."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    x, y = center
    a = _RADIUS * 0.6
    b = a * 0.64
    ends = {
        Operator.PRODUCT: [(-b, -b), (b, b), (-b, b), (b, -b)],
        Operator.CONCATENATION: [(-b / 2, -b), (-b / 2, b), (b / 2, -b), (b / 2, b)],
    }.get(join, [(-a, 0), (a, 0), (0, -a), (0, a)])
    path = Path([(x + right, y + down) for right, down in ends], [Path.MOVETO, Path.LINETO] * 2)
    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=color, linewidth=1, zorder=5))


def _add(axes: Axes, patch: Patch, name: str) -> None:
    patch.set_gid(name)
    axes.add_patch(patch)
