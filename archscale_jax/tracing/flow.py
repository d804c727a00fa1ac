"""The flow of features through a function, and how it becomes an architecture graph.

While a function is read, every layer, sum, product and concatenation makes a new vertex, so that an
operation has one source and one target. What changes a feature without joining others (activations,
normalization, reshapes) makes none. `contract` then lets a layer lead into the sum that it feeds,
and sums that follow one another become one: what is left are the vertices of [AAS §3.1].
"""

import dataclasses
import enum

from archscale_jax.graph import WEIGHT_OPERATORS, Operator


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
      kernel_size: spatial size.
      before: whether an activation stands between the source and the operation.
      after: whether one stands between the operation and the target.
    """

    source: int
    target: int
    operator: Operator
    kernel_size: int = 1
    before: bool = False
    after: bool = False


@dataclasses.dataclass
class Flow:
    """Vertices, numbered in the order in which they arise, and the edges between them."""

    kinds: list[Kind] = dataclasses.field(default_factory=list)
    edges: list[Edge] = dataclasses.field(default_factory=list)

    def add_vertex(self, kind: Kind) -> int:
        """Returns the number of a new vertex."""
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def add_edge(self, source: int, target: int, operator: Operator, **options) -> Edge:
        """Returns a new edge; for options see `Edge`."""
        edge = Edge(source, target, operator, **options)
        self.edges.append(edge)
        return edge


def contract(flow: Flow, outputs: set[int]) -> None:
    """Removes the vertices that only pass on to a sum what one layer or sum gives, in place.

    A vertex stays where another operation or an output of the function reads it, where an
    activation follows a sum, and where removing it would join two vertices by two skips.
    """
    removed: set[Edge] = set()
    incoming = _by_vertex(flow, "target")
    outgoing = _by_vertex(flow, "source")
    for vertex, kind in enumerate(flow.kinds):
        if kind not in (Kind.LAYER, Kind.SUM) or vertex in outputs or len(outgoing[vertex]) != 1:
            continue
        (leaving,) = outgoing[vertex]
        target = leaving.target
        if leaving.operator != Operator.SKIP or flow.kinds[target] != Kind.SUM:
            continue
        if kind == Kind.SUM and leaving.before:
            continue
        moved = incoming[vertex]
        if _weightless(moved) & _weightless(incoming[target]):
            continue
        incoming[target].remove(leaving)
        removed.add(leaving)
        for edge in moved:
            edge.target = target
            edge.after |= leaving.before
            incoming[target].append(edge)
        incoming[vertex], outgoing[vertex] = [], []
    flow.edges = [edge for edge in flow.edges if edge not in removed]


def _weightless(edges: list[Edge]) -> set[tuple[int, Operator]]:
    return {(edge.source, edge.operator) for edge in edges if edge.operator not in WEIGHT_OPERATORS}


def _by_vertex(flow: Flow, end: str) -> list[list[Edge]]:
    found: list[list[Edge]] = [[] for _ in flow.kinds]
    for edge in flow.edges:
        found[getattr(edge, end)].append(edge)
    return found
