"""Which layers are stem and readout, what is summed, and the graph between the two."""

from collections.abc import Mapping
from typing import NamedTuple

import jraph

from archscale_jax.architecture import Arrangement, Role
from archscale_jax.graph import WEIGHT_OPERATORS, Operator, build_graph
from archscale_jax.tracing.flow import Edge, Flow, Kind
from archscale_jax.tracing.values import TraceError, Use


class Structure(NamedTuple):
    """Which edges of a flow read the inputs, are the stem and the readout, and what is summed."""

    reading: list[Edge]
    stems: list[Edge]
    readouts: list[Edge]
    arrangement: Arrangement

    @classmethod
    def of(
        cls, flow: Flow, outputs: set[int], arrangement: Arrangement | str | None = None
    ) -> "Structure":
        """Reads a contracted flow; None takes the arrangement that its sums show."""
        arrangement = Arrangement(arrangement) if arrangement else _arrangement(flow)
        return cls(_reading(flow), _stems(flow), _readouts(flow, outputs), arrangement)

    def holds(self, use: Use, numbers: Mapping[Edge, int]) -> bool:
        """Whether the layer of a use is stem, readout or an edge of the graph."""
        if use.edge is None or use.edge in numbers:
            return True
        return use.edge in self.stems or use.edge in self.readouts

    def layer(self, use: Use) -> Role:
        """The role of the layer at which a parameter is used."""
        if use.edge in self.readouts:
            return Role.READOUT
        return Role.INPUT if use.edge in self.reading else Role.HIDDEN

    def activated(self, uses: list[Use]) -> bool:
        """Whether a hidden weight reads activations, or its own output is one, as vertices sum."""
        activations = self.arrangement == Arrangement.ACTIVATION
        return activations or any(use.edge is not None and use.edge.before for use in uses)

    def role(self, use: Use, shape: tuple[int, ...]) -> Role:
        """The role of a parameter."""
        if use.kind == "weight":
            return self.layer(use)
        if use.kind == "offset":
            return Role.BIAS
        if use.kind == "bias":
            table = use.edge is None and axes_of(use, shape) > 1
            return Role.EMBEDDING if table else Role.BIAS
        return Role.SCALE if use.kind == "scale" else Role.EMBEDDING


def axes_of(use: Use, shape: tuple[int, ...]) -> int:
    """The number of axes of a parameter, or of one of its slices, that are longer than 1."""
    return sum(size > 1 for size in (shape if use.index is None else shape[1:]))


def _stems(flow: Flow) -> list[Edge]:
    """The layers that read the inputs, if they all feed one vertex that nothing else feeds."""
    reading = _reading(flow)
    if not reading:
        raise TraceError(
            "no parameter is applied to the inputs; pass what the layers read after params, and "
            "what they train in params"
        )
    targets = {edge.target for edge in reading}
    alone = all(
        flow.kinds[edge.source] == Kind.DATA for edge in flow.edges if edge.target in targets
    )
    one = len(targets) == 1 and alone and all(edge.operator in WEIGHT_OPERATORS for edge in reading)
    return reading if one else []


def _reading(flow: Flow) -> list[Edge]:
    return [edge for edge in flow.edges if flow.kinds[edge.source] == Kind.DATA]


def _readouts(flow: Flow, outputs: set[int]) -> list[Edge]:
    """The layers that only the result of the function reads."""
    read = {edge.source for edge in flow.edges}
    return [
        edge
        for edge in flow.edges
        if edge.target in outputs
        and edge.operator in WEIGHT_OPERATORS
        and flow.kinds[edge.target] == Kind.LAYER
        and edge.target not in read
        and flow.kinds[edge.source] != Kind.DATA
    ]


def _arrangement(flow: Flow) -> Arrangement:
    """What the sums of layers sum."""
    after = {
        edge.after
        for edge in flow.edges
        if flow.kinds[edge.target] == Kind.SUM and edge.operator in WEIGHT_OPERATORS
    }
    if len(after) > 1:
        raise TraceError(
            "some vertices sum activations and others pre-activations; say which with arrangement="
        )
    return Arrangement.ACTIVATION if after == {True} else Arrangement.PRE_ACTIVATION


def graph_of(
    flow: Flow, outputs: set[int], structure: "Structure"
) -> tuple[jraph.GraphsTuple, dict[Edge, int], dict[int, int]]:
    """Builds the graph between stem and readout, and numbers its edges and vertices.

    Vertices that lead nowhere are kept, as in the spaces of DAG strings, unless they lie behind the
    output or no input reaches them. Outputs of several vertices are joined in one that comes last.
    """
    inputs = structure.reading[0].source
    first = structure.stems[0].target if structure.stems else inputs
    last = {edge.source for edge in structure.readouts}
    last |= outputs - {edge.target for edge in structure.readouts}
    final, joins = max(last), []
    if len(last) > 1 or final == first:
        final = len(flow.kinds)
        operator = Operator.CONCATENATION if len(last) > 1 else Operator.SKIP
        joins = [Edge(vertex, final, operator) for vertex in sorted(last)]
    edges = [*flow.edges, *joins]
    outside = {*structure.stems, *structure.readouts}
    outside |= {edge for edge in edges if edge.source == inputs != first}
    behind = _reached(edges, {final}) | {edge.target for edge in structure.readouts}
    reached, leading = _reached(edges, {inputs}), _reached(edges, {final}, backwards=True)
    inside = (reached | leading | {inputs}) - behind
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
    graph = build_graph(
        len(number),
        [number[edge.source] for edge in edges],
        [number[edge.target] for edge in edges],
        [edge.operator for edge in edges],
        [edge.kernel_size for edge in edges],
        network_kernel=max(convolutions, default=0),
    )
    return graph, {edge: place for place, edge in enumerate(edges)}, number


def _reached(edges: list[Edge], start: set[int], *, backwards: bool = False) -> set[int]:
    """The vertices that edges lead to from others, or back to, without these."""
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
