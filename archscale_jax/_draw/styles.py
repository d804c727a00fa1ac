"""How the parts of a picture look: colours, lines, texts and the legend."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from archscale_jax._graph import Operator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

LineStyle = str | tuple[float, tuple[float, ...]]
"""A matplotlib line style: a name, or an offset and lengths of dashes and gaps."""

DEAD_COLOR = "#a8a8a8"
"""Colour of vertices and edges on no path from input to output."""

INK = "#222222"
"""Colour of texts and live vertices."""

TEXT_SIZE = 8.5
"""Size of most texts, in points."""


@dataclasses.dataclass(frozen=True)
class EdgeStyle:
    """How the edges of one operator are drawn: colours of Okabe and Ito, safe for the colour-blind.

    Attributes:
      label: text in the legend.
      color: colour of live edges; dead ones are grey.
      line_style: so that the picture also reads without colours.
    """

    label: str
    color: str
    line_style: LineStyle


EDGE_STYLES = {
    Operator.LINEAR: EdgeStyle("linear", "#0072b2", "-"),
    Operator.CONV: EdgeStyle("convolution", "#0072b2", "-"),
    Operator.SKIP: EdgeStyle("skip", "#d55e00", (0, (5, 2.2))),
    Operator.AVG_POOL: EdgeStyle("average pooling", "#009e73", (0, (1, 1.4))),
    Operator.CONCATENATION: EdgeStyle("concatenation", "#56b4e9", (0, (7, 1.5, 1.5, 1.5))),
    Operator.PRODUCT: EdgeStyle("product", "#cc79a7", (0, (3, 1.2, 1, 1.2))),
}


def write_text(
    axes: Axes, x: float, y: float, text: str, size: float = TEXT_SIZE, **options: Any
) -> None:
    """Writes a text to the right of a point; dollar signs in names do not make formulas."""
    defaults = {"ha": "left", "va": "center_baseline", "color": INK, "parse_math": False}
    if text:
        axes.text(x, y, text, fontsize=size, **defaults | options)


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
