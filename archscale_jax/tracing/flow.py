"""The flow of features through a function, and how it becomes an architecture graph.

While a function is read, every layer, sum, product and concatenation makes a new vertex, so that an
operation has one source and one target. What changes a feature without joining others (activations,
normalization, reshapes) makes none: it stands on the edges, as an `Expression`. `contract` then
lets a layer lead into the sum that it feeds, and sums that follow one another become one: what is
left are the vertices of [AAS §3.1].
"""

import dataclasses
import enum
import functools

import numpy as np

from archscale_jax._architecture import OUTPUT
from archscale_jax._expressions import (
    ZERO,
    Expression,
    Moments,
    Variable,
    apply,
    statistics,
    substituted,
    variables,
)
from archscale_jax._graph import WEIGHT_OPERATORS, Operator
from archscale_jax._quadrature import is_affine, slope


class Kind(enum.StrEnum):
    """What a vertex is."""

    DATA = "data"  # an input of the function, and what comes of it before any layer
    CONSTANT = "constant"  # features that no input reaches
    LAYER = "layer"  # what one layer gives
    SUM = "sum"
    PRODUCT = "product"
    CONCATENATION = "concatenation"


@dataclasses.dataclass(eq=False)
class Edge:
    """One operation on features.

    Attributes:
      source: number of the vertex that it reads.
      target: number of the vertex that it feeds.
      operator: what it does.
      before: what it makes of an entry of the source's features before the operation.
      after: what is made of an entry of the result before the target takes it, in `OUTPUT`.
      kernel_size: spatial size.
      positions: number of spatial positions.
      reach: of a layer, inputs that reach one unit on average, without the zeros that a transposed
        convolution meets.
      covered: the part of them that does not lie beyond the borders of an image, on average.
      count: of a concatenation, entries along the axis.
      passed: numbers of the uses of parameters that scale what it reads.
      passed_after: numbers of those that scale what it gives.
    """

    source: int
    target: int
    operator: Operator
    before: Expression
    after: Expression = OUTPUT
    kernel_size: int = 1
    positions: int = 1
    reach: float = 1.0
    covered: float = 1.0
    count: int = 1
    passed: frozenset[int] = frozenset()
    passed_after: frozenset[int] = frozenset()

    @property
    def activated(self) -> bool:
        """Whether an activation stands between the source and the operation."""
        return not is_affine(self.before, standard)

    @property
    def activates(self) -> bool:
        """Whether one stands between the operation and the target."""
        return not is_affine(self.after, standard)


def standard(variable: Variable) -> Moments | float:
    """Features N(0, 1), parameters that scale at 1: to tell kinds of functions apart."""
    return 1.0 if variable.kind == "leaf" else Moments(0.0, 1.0)


@dataclasses.dataclass
class Flow:
    """Vertices, numbered in the order in which they arise, and the edges between them.

    Attributes:
      kinds: what every vertex is.
      edges: the operations.
      expressions: of products and constants, what an entry is.
      added: by vertex, what biases that do not start at 0 add to its features.
      read: vertices that were the source of an edge when it arose.
    """

    kinds: list[Kind] = dataclasses.field(default_factory=list)
    edges: list[Edge] = dataclasses.field(default_factory=list)
    expressions: dict[int, Expression] = dataclasses.field(default_factory=dict)
    added: dict[int, Expression] = dataclasses.field(default_factory=dict)
    read: set[int] = dataclasses.field(default_factory=set)

    def add_vertex(self, kind: Kind, expression: Expression | None = None) -> int:
        """Returns the number of a new vertex."""
        self.kinds.append(kind)
        vertex = len(self.kinds) - 1
        if expression is not None:
            self.expressions[vertex] = expression
        return vertex

    def add_edge(
        self, source: int, target: int, operator: Operator, before: Expression, **options
    ) -> Edge:
        """Returns a new edge; for options see `Edge`."""
        edge = Edge(source, target, operator, before, **options)
        self.edges.append(edge)
        self.read.add(source)
        return edge

    def add_to(self, vertex: int, expression: Expression) -> None:
        """Notes that an expression is added to the features of a vertex."""
        self.added[vertex] = apply("add", np.add, self.added.get(vertex, ZERO), expression)


def split_fused(flow: Flow, outputs: set[int]) -> dict[Edge, list[Edge]]:
    """Lets a layer whose output is cut into parts, each for another sum, be one for each, in place.

    So the gates of a cell are those that matrices of their own would make.

    Returns:
      The layers that a layer has become, beside itself.
    """
    incoming, outgoing = _by_vertex(flow, "target"), _by_vertex(flow, "source")
    found: dict[Edge, list[Edge]] = {}
    for vertex, kind in enumerate(tuple(flow.kinds)):
        leaving = outgoing[vertex]
        if (
            kind != Kind.LAYER
            or len(leaving) < 2
            or len(incoming[vertex]) != 1
            or vertex in outputs
        ):
            continue
        to_sums = all(
            edge.operator == Operator.SKIP and flow.kinds[edge.target] == Kind.SUM
            for edge in leaving
        )
        parts = [
            {one.part[:1] for one in variables(edge.before) if one.kind == "vertex"}
            for edge in leaving
        ]
        distinct = all(len(part) == 1 and part != {()} for part in parts)
        if not to_sums or not distinct or len(set().union(*parts)) != len(parts):
            continue
        (layer,) = incoming[vertex]
        if layer.operator not in WEIGHT_OPERATORS:
            continue
        for edge in leaving[1:]:
            copy = dataclasses.replace(layer, target=flow.add_vertex(Kind.LAYER))
            edge.before = substituted(edge.before, functools.partial(_moved, vertex, copy.target))
            edge.source = copy.target
            flow.edges.append(copy)
            if vertex in flow.added:
                flow.add_to(copy.target, flow.added[vertex])
            found.setdefault(layer, []).append(copy)
    return found


def _moved(vertex: int, other: int, one: Variable) -> Variable | None:
    if one.kind == "vertex" and one.source == vertex:
        return dataclasses.replace(one, source=other)
    return None


def contract(flow: Flow, outputs: set[int]) -> dict[int, int]:
    """Removes the vertices that only pass on to a sum what one layer or sum gives, in place.

    A vertex stays where another operation or an output of the function reads it, where an
    activation follows a sum, and where removing it would join two vertices by two skips.

    Returns:
      Where the contents of removed vertices have gone: vertex to vertex.
    """
    removed: set[Edge] = set()
    moved: dict[int, int] = {}
    incoming = _by_vertex(flow, "target")
    outgoing = _by_vertex(flow, "source")
    # Twice: where sums became one, a layer may lead into one sum alone.
    for vertex, kind in [*enumerate(flow.kinds)] * 2:
        if kind not in (Kind.LAYER, Kind.SUM) or vertex in outputs or len(outgoing[vertex]) != 1:
            continue
        (leaving,) = outgoing[vertex]
        target = leaving.target
        if leaving.operator != Operator.SKIP or flow.kinds[target] != Kind.SUM:
            continue
        if kind == Kind.SUM and not _is_linear(leaving):
            continue
        if len([one for one in variables(leaving.before) if one.source == vertex]) > 1:
            continue  # a product of its parts, which is not a contribution of one layer
        arriving = incoming[vertex]
        twice = _weightless(arriving) & _weightless(incoming[target])
        if any(
            operator != Operator.SKIP or _is_read_elsewhere(outgoing[source], vertex, target)
            for source, operator in twice
        ):
            continue
        incoming[target].remove(leaving)
        removed.add(leaving)
        _carry_added(flow, leaving, arriving)
        for edge in arriving:
            _prolong(edge, leaving)
            other = [
                one
                for one in incoming[target]
                if (one.source, one.operator) == (edge.source, Operator.SKIP)
            ]
            if edge.operator == Operator.SKIP and other:
                _add_up(other[0], edge)
                removed.add(edge)
                outgoing[edge.source].remove(edge)
            else:
                incoming[target].append(edge)
        incoming[vertex], outgoing[vertex] = [], []
        moved[vertex] = target
    flow.edges = [edge for edge in flow.edges if edge not in removed]
    for vertex in sorted(moved, reverse=True):
        moved[vertex] = moved.get(moved[vertex], moved[vertex])
    return moved


def _is_read_elsewhere(leaving: list[Edge], vertex: int, target: int) -> bool:
    """Whether a vertex is more than a layer whose output is added up part by part."""
    return any(edge.target not in (vertex, target) for edge in leaving)


def _add_up(kept: Edge, other: Edge) -> None:
    """Lets one skip bring what two bring from one source to one sum."""
    kept.before = apply("add", np.add, kept.before, other.before)
    kept.passed |= other.passed
    kept.passed_after |= other.passed_after


def _is_linear(edge: Edge) -> bool:
    """Whether what a skip makes of its source is a multiple of it, not of its statistics."""
    variable = Variable("vertex", edge.source)
    return edge.before == variable or (
        slope(edge.before, variable, standard) is not None and not statistics(edge.before)
    )


def _carry_added(flow: Flow, leaving: Edge, arriving: list[Edge]) -> None:
    """Lets what is added to a removed vertex stand on its layer's edge, or at its target."""
    added = flow.added.pop(leaving.source, None)
    if added is None:
        return
    if flow.kinds[leaving.source] == Kind.LAYER:
        (layer,) = arriving
        layer.after = apply("add", np.add, layer.after, added)
        return

    def found(one: Variable) -> Expression | None:
        return added if one.kind == "vertex" and one.source == leaving.source else None

    flow.add_to(leaving.target, substituted(leaving.before, found))


def _prolong(edge: Edge, leaving: Edge) -> None:
    """Lets an edge lead where its target led, by a skip."""
    removed = edge.target

    def through(inner: Expression) -> Expression:
        def found(one: Variable) -> Expression | None:
            if one.kind != "vertex" or one.source != removed:
                return None
            return parted(inner, one.part)

        return substituted(leaving.before, found)

    if edge.operator in WEIGHT_OPERATORS or edge.operator == Operator.AVG_POOL:
        edge.after = through(edge.after)
    else:
        edge.before = through(edge.before)
    edge.passed_after |= leaving.passed
    edge.target = leaving.target


def parted(expression: Expression, part: tuple) -> Expression:
    """Returns an expression of a slice of the features that it is of."""
    if not part:
        return expression

    def cut(one: Variable) -> Variable | None:
        if one.kind not in ("vertex", "output"):
            return None
        return dataclasses.replace(one, part=(*one.part, *part))

    return substituted(expression, cut)


def _weightless(edges: list[Edge]) -> set[tuple[int, Operator]]:
    return {(edge.source, edge.operator) for edge in edges if edge.operator not in WEIGHT_OPERATORS}


def _by_vertex(flow: Flow, end: str) -> list[list[Edge]]:
    found: list[list[Edge]] = [[] for _ in flow.kinds]
    for edge in flow.edges:
        found[getattr(edge, end)].append(edge)
    return found
