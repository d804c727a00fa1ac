"""Which layers are stem and readout, what is summed, and the graph between the two."""

import dataclasses
from typing import NamedTuple

import jraph
import numpy as np

from archscale_jax._architecture import Arrangement, Role
from archscale_jax._expressions import (
    Constant,
    Expression,
    Variable,
    substituted,
    variables,
)
from archscale_jax._graph import WEIGHT_OPERATORS, Operator, build_graph
from archscale_jax.tracing.flow import Edge, Flow, Kind
from archscale_jax.tracing.values import TraceError


class Structure(NamedTuple):
    """Which edges of a flow read the inputs, are the stem and the readout, and what is summed.

    Attributes:
      reading: edges that read the inputs.
      stems: those of them that alone feed vertex 0; none if vertex 0 stands for the inputs.
      readouts: the layers that features enter last on every way to the result.
      tail: the vertices behind the readouts.
      arrangement: what vertices sum.
      bound: vertices of values other than 0 that are bound to the function, inputs of a kind.
    """

    reading: list[Edge]
    stems: list[Edge]
    readouts: list[Edge]
    tail: set[int]
    arrangement: Arrangement
    bound: set[int]

    @classmethod
    def of(
        cls,
        flow: Flow,
        outputs: set[int],
        contracted: set[int],
        arrangement: Arrangement | str | None = None,
    ) -> "Structure":
        """Reads a contracted flow; None takes the arrangement that its sums show."""
        arrangement = Arrangement(arrangement) if arrangement else _arrangement(flow)
        readouts = _readouts(flow, outputs, contracted)
        targets = {edge.target for edge in readouts}
        tail = targets | reached(flow.edges, targets)
        reading = [
            edge
            for edge in flow.edges
            if flow.kinds[edge.source] == Kind.DATA and edge.target not in tail
        ]
        if not reading:
            raise TraceError(
                "no parameter is applied to the inputs; pass what the layers read after params, "
                "and what they train in params"
            )
        bound = {
            vertex
            for vertex, kind in enumerate(flow.kinds)
            if kind == Kind.CONSTANT and not _is_zero_or_learned(flow.expressions[vertex])
        }
        return cls(reading, _stems(flow, reading), readouts, tail, arrangement, bound)

    def layer(self, edge: Edge | None) -> Role:
        """The role of a layer."""
        if edge in self.readouts:
            return Role.READOUT
        reads_inputs = edge in self.reading or (edge is not None and edge.source in self.bound)
        return Role.INPUT if reads_inputs else Role.HIDDEN


def _is_zero_or_learned(expression: Expression) -> bool:
    if isinstance(expression, Constant):
        return bool(np.all(expression.value == 0))
    return any(one.kind == "leaf" for one in variables(expression))


def _stems(flow: Flow, reading: list[Edge]) -> list[Edge]:
    """The layers that read the inputs, if they all feed one vertex that nothing else feeds."""
    targets = {edge.target for edge in reading}
    alone = all(
        flow.kinds[edge.source] == Kind.DATA for edge in flow.edges if edge.target in targets
    )
    one = len(targets) == 1 and alone and all(edge.operator in WEIGHT_OPERATORS for edge in reading)
    return reading if one else []


def _readouts(flow: Flow, outputs: set[int], contracted: set[int]) -> list[Edge]:
    """The layers that features enter for the last time on every way to the result (theory §10).

    Their outputs may be added, joined, pooled or compared with targets afterwards. Where features
    reach the result beside them, as the stream of a network that returns its features, or where
    their outputs are summed over in a product, as queries are, they are layers like others.
    """
    leading = outputs | reached(flow.edges, outputs, backwards=True)
    edges = [edge for edge in flow.edges if edge.target in leading]
    outgoing: dict[int, list[Edge]] = {}
    for edge in edges:
        outgoing.setdefault(edge.source, []).append(edge)
    layers_follow: dict[int, bool] = {}
    summed: dict[int, bool] = {}
    for vertex in range(len(flow.kinds) - 1, -1, -1):
        leaving = outgoing.get(vertex, ())
        layers_follow[vertex] = any(
            edge.operator in WEIGHT_OPERATORS or layers_follow[edge.target] for edge in leaving
        )
        summed[vertex] = vertex in contracted or any(
            edge.operator == Operator.SKIP and summed[edge.target] for edge in leaving
        )
    last = {
        edge
        for edge in edges
        if edge.operator in WEIGHT_OPERATORS and not layers_follow[edge.target]
    }
    mixed: set[int] = set()  # vertices behind the last layers to which features come beside them
    for edge in sorted(edges, key=lambda one: one.target):
        if layers_follow[edge.target] or edge in last or flow.kinds[edge.source] == Kind.DATA:
            continue
        if layers_follow[edge.source] or edge.source in mixed:
            mixed.add(edge.target)
    return [
        edge
        for edge in flow.edges
        if edge in last
        and flow.kinds[edge.source] != Kind.DATA
        and not summed[edge.target]
        and not ({edge.target} | reached(edges, {edge.target})) & mixed
    ]


def _arrangement(flow: Flow) -> Arrangement:
    """What the sums of layers sum: activations if all do, as in the authors' code."""
    after = {
        edge.activates
        for edge in flow.edges
        if flow.kinds[edge.target] == Kind.SUM and edge.operator in WEIGHT_OPERATORS
    }
    return Arrangement.ACTIVATION if after == {True} else Arrangement.PRE_ACTIVATION


class Built(NamedTuple):
    """The graph of a flow.

    Attributes:
      graph: between stem and readout.
      edges: the edges of the flow in the order of the graph.
      numbers: of the vertices of the flow in the graph.
    """

    graph: jraph.GraphsTuple
    edges: list[Edge]
    numbers: dict[int, int]

    def renamed(self, expression: Expression) -> Expression:
        """Returns an expression with vertices as the graph numbers them."""

        def found(one: Variable) -> Variable | None:
            if one.kind != "vertex":
                return None
            if one.source in self.numbers:
                return dataclasses.replace(one, source=self.numbers[one.source])  # pyright: ignore
            return dataclasses.replace(one, kind="data")

        return substituted(expression, found)


def graph_of(flow: Flow, outputs: set[int], structure: Structure) -> Built:
    """Builds the graph between stem and readout, and numbers its edges and vertices.

    Vertices that lead nowhere are kept, as in the spaces of DAG strings, unless they lie behind the
    output or no input reaches them. Outputs of several vertices are joined in one that comes last.
    """
    inputs = structure.reading[0].source
    first = structure.stems[0].target if structure.stems else inputs
    last = {edge.source for edge in structure.readouts}
    last |= outputs - structure.tail
    final, joins = max(last), []
    if len(last) > 1 or final == first:
        final = len(flow.kinds)
        operator = Operator.CONCATENATION if len(last) > 1 else Operator.SKIP
        joins = [
            Edge(vertex, final, operator, Variable("vertex", vertex)) for vertex in sorted(last)
        ]
    edges = [*flow.edges, *joins]
    outside = {*structure.stems, *structure.readouts}
    outside |= {edge for edge in edges if edge.source == inputs != first}
    behind = (reached(edges, {final}) | structure.tail) - {final}
    forward, backward = reached(edges, {inputs}), reached(edges, {final}, backwards=True)
    inside = (forward | backward | {inputs}) - behind
    edges = [edge for edge in edges if edge not in outside and {edge.source, edge.target} <= inside]
    vertices = {end for edge in edges for end in (edge.source, edge.target)}
    order = [first, *sorted(vertices - {first, final}), final]
    number = {vertex: place for place, vertex in enumerate(order)}
    edges.sort(
        key=lambda edge: (
            number[edge.target], number[edge.source], edge.operator, edge.kernel_size
        )
    )  # fmt: skip
    convolutions = [edge.kernel_size for edge in flow.edges if edge.operator == Operator.CONV]
    positions = [edge.positions for edge in flow.edges if edge.operator == Operator.CONV]
    graph = build_graph(
        len(number),
        [number[edge.source] for edge in edges],
        [number[edge.target] for edge in edges],
        [edge.operator for edge in edges],
        [edge.kernel_size for edge in edges],
        network_kernel=max(convolutions, default=0),
        network_positions=max(positions, default=None),
        layers_outside=bool(structure.stems) + bool(structure.readouts),
    )
    return Built(graph, edges, number)


def reached(edges: list[Edge], start: set[int], *, backwards: bool = False) -> set[int]:
    """Returns the vertices that edges lead to from others, or back to, without these."""
    steps: dict[int, list[int]] = {}
    for edge in edges:
        source, target = (edge.target, edge.source) if backwards else (edge.source, edge.target)
        steps.setdefault(source, []).append(target)
    found: set[int] = set()
    wanted = list(start)
    while wanted:
        new = set(steps.get(wanted.pop(), ())) - found
        found |= new
        wanted += new
    return found - start
