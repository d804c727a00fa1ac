"""What a picture of an architecture consists of: its graph, between the stem and the readout."""

import collections
import dataclasses

import jraph
import numpy as np

from archscale_jax._architecture import Architecture, Role
from archscale_jax._draw.labels import Layer, edge_layers, outer_layers
from archscale_jax._draw.layout import Line
from archscale_jax._graph import JOIN_OPERATORS, Operator, is_weight, live_edges, live_vertices


@dataclasses.dataclass(frozen=True)
class Knot:
    """A point of the picture at which lines meet.

    Attributes:
      name: its group id.
      number: that of the vertex; None for the input and the output around the graph.
      text: what is written beside it.
      join: how it joins what leads into it, SKIP for a sum; None where that is one thing.
      alive: whether it is on a path from input to output.
    """

    name: str
    number: int | None = None
    text: str = ""
    join: Operator | None = None
    alive: bool = True


@dataclasses.dataclass(frozen=True)
class Stroke:
    """A line of the picture.

    Attributes:
      name: its group id.
      line: between which knots it runs.
      layer: what is written beside it.
      alive: whether it is on a path from input to output.
    """

    name: str
    line: Line
    layer: Layer
    alive: bool = True


def picture_parts(architecture: Architecture) -> tuple[list[Knot], list[Stroke]]:
    """Returns the knots, from the top, and the strokes of an architecture.

    The input and the output are knots of their own where a stem and a readout lie between them and
    the graph.
    """
    graph = architecture.graph
    stem, readout = (outer_layers(architecture, place) for place in (Role.INPUT, Role.READOUT))
    first, last = int(bool(stem)), len(graph.nodes) - 1 + bool(stem)
    strokes = [
        Stroke(f"stem-{place}", Line(0, 1, layer.reads, True), layer)
        for place, layer in enumerate(stem)
    ]
    columns = (graph.senders + first, graph.receivers + first, is_weight(graph), live_edges(graph))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for name, layer, row in zip(edge_ids(graph), edge_layers(architecture), rows, strict=True):
        sender, receiver, weight, alive = row
        line = Line(sender, receiver, weight, bool(layer.text))
        strokes.append(Stroke(f"edge-{name}", line, layer, alive))
    strokes += [
        Stroke(f"readout-{place}", Line(last, last + 1, True, True), layer)
        for place, layer in enumerate(readout)
    ]
    live = live_vertices(graph).tolist()
    knots = [Knot(f"vertex-{number}", number, alive=alive) for number, alive in enumerate(live)]
    if stem:
        knots.insert(0, Knot("input"))
    if readout:
        knots.append(Knot("output"))
    knots[0] = dataclasses.replace(knots[0], text="input")
    knots[-1] = dataclasses.replace(knots[-1], text="output")
    joins = _joins(len(knots), strokes)
    knots = [
        knot if knot.number is None else dataclasses.replace(knot, join=join)
        for knot, join in zip(knots, joins, strict=True)
    ]
    return knots, strokes


def edge_ids(graph: jraph.GraphsTuple) -> list[str]:
    """Names every edge, `u-v`; the second and further of parallel edges `u-v-1`, `u-v-2`, …."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for sender, receiver in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True):
        name = f"{sender}-{receiver}"
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _joins(num_knots: int, strokes: list[Stroke]) -> list[Operator | None]:
    joins: list[Operator | None] = [None] * num_knots
    degrees = np.bincount([stroke.line.receiver for stroke in strokes], minlength=num_knots)
    for stroke in strokes:
        receiver = stroke.line.receiver
        if stroke.layer.operator in JOIN_OPERATORS:
            joins[receiver] = stroke.layer.operator
        elif degrees[receiver] > 1:
            joins[receiver] = Operator.SKIP
    return joins
