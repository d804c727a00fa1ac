"""A picture of an architecture graph: vertices on a line, one arc for every edge.

Vertices stand in their topological order, so that no edge passes through a vertex. Edges that
carry a weight arch above the line, the others below it; between neighbours they are straight, but
of parallel ones only the first.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jraph
import numpy as np

from archscale_jax._extras import needed_by
from archscale_jax._files import write_atomically
from archscale_jax._graph import Operator, live_edges, live_vertices, validate_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

MAX_VERTICES = 60
"""More vertices than this are no picture any more."""

LineStyle = str | tuple[float, tuple[float, ...]]
"""A matplotlib line style: a name, or an offset and lengths of dashes and gaps."""

SUFFIXES = (".png", ".svg")

DEAD_COLOR = "#a8a8a8"
"""Colour of vertices and edges on no path from input to output."""

INK = "#222222"
"""Colour of texts and live vertices."""

_RADIUS = 0.2  # of a vertex; the unit is the distance between neighbours
_HEAD_LENGTH = 0.12  # of an arrow, its gap to the vertex included
_APART = 0.3  # between parallel edges
_MARGIN = 0.45  # above and below the highest arcs
_UNIT_INCHES = 0.9  # for graphs of up to _FULL_SIZE_VERTICES; larger ones keep their width
_FULL_SIZE_VERTICES = 24


@dataclasses.dataclass(frozen=True)
class EdgeStyle:
    """How the edges of one operator are drawn: colours of Okabe and Ito, safe for the colour-blind.

    Attributes:
      label: text in the legend.
      color: colour of live edges; dead ones are grey.
      line_style: matplotlib line style, so that the picture also reads without colours.
      side: 1 to arch above the line, -1 below.
    """

    label: str
    color: str
    line_style: LineStyle
    side: int


EDGE_STYLES = {
    Operator.LINEAR: EdgeStyle("linear", "#0072b2", "-", 1),
    Operator.CONV: EdgeStyle("convolution", "#0072b2", "-", 1),
    Operator.SKIP: EdgeStyle("skip", "#d55e00", (0, (5, 2.2)), -1),
    Operator.AVG_POOL: EdgeStyle("average pooling", "#009e73", (0, (1, 1.4)), -1),
    Operator.CONCATENATION: EdgeStyle("concatenation", "#56b4e9", (0, (7, 1.5, 1.5, 1.5)), -1),
    Operator.PRODUCT: EdgeStyle("product", "#cc79a7", (0, (3, 1.2, 1, 1.2)), -1),
}


def draw_graph(
    graph: jraph.GraphsTuple,
    path: str | pathlib.Path | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws one architecture graph, and writes the picture where a path is given.

    Uses no global state of matplotlib: any thread may draw. Kernel sizes stand on the edges that
    have one; vertices and edges on no path from input to output are grey. The artists carry the
    group ids `vertex-v`, `edge-u-v`, `head-u-v` and `kernel-u-v`; of parallel edges, the second and
    further ones end in `-1`, `-2`, ….

    Args:
      graph: a single graph of at most `MAX_VERTICES` vertices.
      path: file to write, PNG or SVG by its suffix; a picture that fails leaves no file.
      title: text above the picture.
      ax: axes to draw in; None makes a figure that fits the graph.

    Returns:
      The figure, that of `ax` where given.

    Raises:
      ValueError: another suffix, too many vertices, or a graph that `validate_graph` refuses.
    """
    check_drawable(graph, path, MAX_VERTICES)
    num_vertices = len(graph.nodes)
    heights = _arc_heights(graph)
    bottom, top = heights.min(initial=0) - _MARGIN, heights.max(initial=0) + _MARGIN
    axes = _new_axes(num_vertices, top - bottom, title) if ax is None else ax
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("ax belongs to no figure; pass one that figure.add_subplot gives")
    axes.set(xlim=(-1.1, num_vertices + 0.1), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    scale = _scale(axes, figure.dpi)
    _draw_vertices(axes, graph, scale)
    _draw_edges(axes, graph, heights, scale)
    dead = not (live_edges(graph).all() and live_vertices(graph).all())
    draw_legend(axes, graph.edges["operator"], dead)
    if title is not None:
        axes.set_title(title, fontsize=11, color=INK)
    if path is not None:
        write_atomically(path, lambda target: figure.savefig(target, bbox_inches="tight"))
    return figure


def check_drawable(
    graph: jraph.GraphsTuple, path: str | pathlib.Path | None, max_vertices: int
) -> None:
    """Checks a graph and the path of its picture.

    Raises:
      ValueError: another suffix, too many vertices, or a graph that `validate_graph` refuses.
    """
    if path is not None and pathlib.Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {str(path)!r}; accepted suffixes are {', '.join(SUFFIXES)}")
    validate_graph(graph)
    if len(graph.nodes) > max_vertices:
        raise ValueError(
            f"a graph of {len(graph.nodes)} vertices is too large to draw; at most {max_vertices} "
            "are accepted"
        )


def edge_ids(graph: jraph.GraphsTuple) -> list[str]:
    """Names every edge, `u-v`; the second and further of parallel edges `u-v-1`, `u-v-2`, …."""
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    ranks = _ranks(pairs)
    return [
        f"{u}-{v}-{rank}" if rank else f"{u}-{v}" for (u, v), rank in zip(pairs, ranks, strict=True)
    ]


def _ranks(keys: Sequence[Hashable]) -> list[int]:
    """How many equal keys stand before each."""
    seen: collections.Counter[Hashable] = collections.Counter()
    ranks = []
    for key in keys:
        ranks.append(seen[key])
        seen[key] += 1
    return ranks


def _arc_heights(graph: jraph.GraphsTuple) -> np.ndarray:
    """Height [E] of each arc's top, signed; longer edges leave steeper, so arcs nest.

    Of parallel edges, those of one side arch over one another, and between neighbours only the
    first is straight.
    """
    spans = graph.receivers - graph.senders
    longest = max(spans.max(initial=0), 2)
    bends = np.where(spans == 1, 0.0, 0.4 + 0.34 * (spans - 2) / max(longest - 2, 6))
    sides = [EDGE_STYLES[Operator(kind)].side for kind in graph.edges["operator"].tolist()]
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    inner = np.array(_ranks(list(zip(pairs, sides, strict=True))), float)
    above = {pair for pair, side in zip(pairs, sides, strict=True) if side > 0}
    below = [side < 0 and pair in above for pair, side in zip(pairs, sides, strict=True)]
    inner += np.where(spans == 1, below, 0)
    return np.array(sides) * (bends * spans / 2 + _APART * inner)


def _new_axes(num_vertices: int, height: float, title: str | None) -> Axes:
    with needed_by("archscale_jax.draw_graph", "plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    unit = _UNIT_INCHES * min(1, _FULL_SIZE_VERTICES / num_vertices)
    above, below = 0.1 if title is None else 0.4, 0.4  # inches for the title and the legend
    inches = max(unit * (num_vertices + 1.2), 4.5), unit * height + above + below
    figure = Figure(figsize=inches, dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure.add_axes((0, below / inches[1], 1, unit * height / inches[1]))


def _scale(axes: Axes, dots_per_inch: float) -> float:
    """Size of fonts and lines: 1 at full size, less where the axes are small for the graph."""
    box = axes.get_window_extent()
    units = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    unit_inches = min(box.width / units[0], box.height / units[1]) / dots_per_inch
    return float(np.clip(unit_inches / _UNIT_INCHES, 0.4, 1))


def _draw_vertices(axes: Axes, graph: jraph.GraphsTuple, scale: float) -> None:
    from matplotlib.patches import Circle

    live = live_vertices(graph)
    last = len(live) - 1
    for vertex, alive in enumerate(live.tolist()):
        color = INK if alive else DEAD_COLOR
        fill, text_color = (color, "white") if vertex in (0, last) else ("white", color)
        circle = Circle((vertex, 0), _RADIUS, facecolor=fill, edgecolor=color, zorder=3)
        circle.set(linewidth=1.4 * scale, gid=f"vertex-{vertex}")
        axes.add_patch(circle)
        write_text(axes, vertex, 0, str(vertex), 9 * scale, color=text_color, zorder=4)
    write_text(axes, -0.3, 0, "input", 9 * scale, color=INK, ha="right")
    write_text(axes, last + 0.3, 0, "output", 9 * scale, color=INK, ha="left")


def _draw_edges(axes: Axes, graph: jraph.GraphsTuple, heights: np.ndarray, scale: float) -> None:
    columns = (graph.senders, graph.receivers, graph.edges["operator"], graph.edges["kernel_size"])
    rows = zip(
        edge_ids(graph),
        *(column.tolist() for column in (*columns, live_edges(graph), heights)),
        strict=True,
    )
    for name, sender, receiver, operator, kernel_size, alive, height in rows:
        style = EDGE_STYLES[Operator(operator)]
        color = style.color if alive else DEAD_COLOR
        options = {"linewidth": 1.6 * scale, "zorder": 2 if alive else 1}
        _draw_arrow(axes, name, (sender, receiver), height, color, style.line_style, **options)
        if operator in (Operator.CONV, Operator.AVG_POOL):
            straight = not height  # between neighbours is no room on the line itself
            box = None if straight else {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
            write_text(
                axes,
                (sender + receiver) / 2,
                0.14 * style.side if straight else height,
                f"{kernel_size}×{kernel_size}",
                7.5 * scale,
                color=color,
                bbox=box,
                zorder=2.5,
                gid=f"kernel-{name}",
            )


def _draw_arrow(
    axes: Axes,
    name: str,
    ends: tuple[int, int],
    height: float,
    color: str,
    line_style: LineStyle,
    **options,
) -> None:
    """Draws the arc (s·t, 4·height·t(1-t)), t in [0, 1], between two circles, and its head."""
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path

    sender, receiver = ends
    span = receiver - sender
    start = _parameter(span, height, _RADIUS)
    base = 1 - _parameter(span, height, _RADIUS + _HEAD_LENGTH)
    tip = 1 - _parameter(span, height, _RADIUS + 0.01)

    def point(t: float, u: float) -> np.ndarray:  # of the arc where t = u, else a Bézier control
        return np.array([sender + span * (t + u) / 2, 4 * height * ((t + u) / 2 - t * u)])

    curve = Path(
        [point(start, start), point(start, base), point(base, base)],
        [Path.MOVETO, Path.CURVE3, Path.CURVE3],
    )
    shaft = PathPatch(curve, facecolor="none", edgecolor=color, linestyle=line_style, **options)
    shaft.set(capstyle="butt", gid=f"edge-{name}")
    axes.add_patch(shaft)
    forward = point(tip, tip) - point(base, base)
    aside = forward[::-1] * (-0.42, 0.42)
    corners = [point(tip, tip), point(base, base) + aside, point(base, base) - aside]
    head = Polygon(corners, facecolor=color, zorder=options["zorder"])
    head.set_gid(f"head-{name}")
    axes.add_patch(head)


def _parameter(span: int, height: float, distance: float) -> float:
    """Returns the t at which the arc is at `distance` from its start, by fixed-point iteration."""
    t = 0.0
    for _ in range(20):
        t = distance / math.hypot(span, 4 * height * (1 - t))
    return t


def write_text(axes: Axes, x: float, y: float, text: str, size: float, **options: Any) -> None:
    """Writes a text, centred on its point unless options say otherwise."""
    options = {"ha": "center", "va": "center_baseline"} | options
    axes.text(x, y, text, fontsize=size, **options)


def draw_legend(axes: Axes, operators: Collection[int], dead: bool) -> Legend:
    """Draws a line below the axes for every style of these operators, and for dead parts."""
    from matplotlib.lines import Line2D

    labels: dict[tuple, list[str]] = {}  # linear and convolution may share a line of the legend
    for operator, style in EDGE_STYLES.items():
        if operator in operators:
            labels.setdefault((style.color, style.line_style), []).append(style.label)
    if dead:
        labels[DEAD_COLOR, "-"] = ["on no path"]
    handles = [
        Line2D([], [], color=color, linestyle=line_style, linewidth=1.6, label=", ".join(names))
        for (color, line_style), names in labels.items()
    ]
    return axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=len(handles),
        handlelength=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
