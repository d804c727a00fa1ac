"""The architecture graph: one `jraph.GraphsTuple` layout, and what makes it valid [AAS §3.1].

A network is a directed acyclic graph. Vertices are features, numbered in a topological order:
vertex 0 is the input (the stem feeds it), the last vertex is the output (the readout follows it).
Edges are operators; contributions of the incoming edges of a vertex are summed, unless they are
`CONCATENATION` or `PRODUCT`: then the vertex joins its sources along an axis or multiplies them,
and all its edges are of that operator. A layer beside a skip is two parallel edges. Absent
operators (`zero`, `none`) are absent edges. With V vertices and E edges a graph holds

* `nodes`      int32 [V]   number of the vertex within its graph: 0 … V-1
* `senders`    int32 [E]   source vertex of each edge
* `receivers`  int32 [E]   target vertex of each edge; sorted by (receiver, sender, operator)
* `edges`      {"operator": int32 [E], "kernel_size": int32 [E]}, operator a member of `Operator`
* `globals`    {"space", "kernel_size", "kernel_positions", "layers_outside"}, int32 [1]: a member
               of `Space`; the spatial size q of the network's convolutions, the stem included, 0
               for a dense network; the number of positions of their kernels, q² for images; and the
               number of layers before vertex 0 and behind the last: 2, the stem and the readout
* `n_node`, `n_edge`  int32 [1]

as NumPy arrays on the host. Batch with `jraph.batch_np` and pad with `jraph.pad_with_graphs`:
padding edges get operator `ZERO`, which no function of a batch counts.
"""

import enum
import graphlib
import math
from collections.abc import Sequence

import jraph
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike


class Operator(enum.IntEnum):
    """What an edge computes. `ZERO` marks padding only; an absent edge is not stored."""

    ZERO = 0
    SKIP = 1
    LINEAR = 2
    CONV = 3
    AVG_POOL = 4
    CONCATENATION = 5
    PRODUCT = 6


WEIGHT_OPERATORS = (Operator.LINEAR, Operator.CONV)
"""The operators that carry a weight, and so add one to the depth of a path."""

JOIN_OPERATORS = (Operator.CONCATENATION, Operator.PRODUCT)
"""The operators into vertices that do not sum."""


class Space(enum.IntEnum):
    """Where a graph comes from; only the rule `chen2024_code` tells spaces apart.

    CELL is one cell, CELL_NETWORK a network of cells with three vertices each beside their input,
    and of reductions with as many, see `experiments.lab.models.CellNetwork`.
    """

    DAG = 0
    CELL = 1
    CELL_NETWORK = 2

    @classmethod
    def _missing_(cls, value: object) -> None:
        accepted = ", ".join(f"Space.{space.name}" for space in cls)
        raise ValueError(f"unknown space {value!r}; accepted are {accepted}")


def build_graph(
    num_vertices: int,
    senders: ArrayLike,
    receivers: ArrayLike,
    operators: ArrayLike,
    kernel_sizes: ArrayLike | None = None,
    *,
    network_kernel: int | None = None,
    network_positions: int | None = None,
    layers_outside: int = 2,
    space: Space = Space.DAG,
) -> jraph.GraphsTuple:
    """Builds and validates one architecture graph from its edge list, in any order.

    Args:
      num_vertices: number of vertices V, at least 2.
      senders: integers [E], source vertex of each edge.
      receivers: integers [E], target vertex of each edge.
      operators: integers [E], members of `Operator` other than `ZERO`.
      kernel_sizes: integers [E], spatial size of each operator; None means 1 everywhere.
      network_kernel: spatial size q of the network's convolutions, the stem included, 0 for a
        dense network; None takes the largest kernel among the convolutions of the graph.
      network_positions: number of positions of the largest kernel, q² for images; None is q².
      layers_outside: number of layers before vertex 0 and behind the last: stem and readout.
      space: where the graph comes from.

    Returns:
      The graph in the layout of this module.

    Raises:
      TypeError: `num_vertices` or `network_kernel` is not an integer.
      ValueError: columns of different lengths or not of integers, a number beyond int32, a negative
        `network_kernel`, no member of `Space`; and see `validate_graph`.
    """
    senders, receivers, operators = (
        np.asarray(values) for values in (senders, receivers, operators)
    )
    if kernel_sizes is None:
        kernel_sizes = np.ones_like(senders)
    columns = {
        "senders": senders,
        "receivers": receivers,
        "operators": operators,
        "kernel_sizes": np.asarray(kernel_sizes),
    }
    for name, values in columns.items():
        if values.shape != senders.shape or values.ndim != 1:
            raise ValueError(
                f"{name} has shape {values.shape}; all edge columns must be of one length: "
                f"senders has shape {senders.shape}"
            )
        if values.size and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be integers, found dtype {values.dtype}")
        _check_int32(name, values)
    _check_number("num_vertices", num_vertices)
    if network_kernel is None:
        convolutions = operators == Operator.CONV
        network_kernel = int(columns["kernel_sizes"][convolutions].max(initial=0))
    _check_number("network_kernel", network_kernel)
    if network_positions is None:
        network_positions = min(network_kernel**2, np.iinfo(np.int32).max)
    _check_number("network_positions", network_positions)
    _check_number("layers_outside", layers_outside)
    order = np.lexsort((columns["kernel_sizes"], operators, senders, receivers))
    graph = jraph.GraphsTuple(
        nodes=np.arange(num_vertices, dtype=np.int32),
        edges={
            "operator": operators[order].astype(np.int32),
            "kernel_size": columns["kernel_sizes"][order].astype(np.int32),
        },
        senders=senders[order].astype(np.int32),
        receivers=receivers[order].astype(np.int32),
        n_node=np.array([num_vertices], np.int32),
        n_edge=np.array([senders.size], np.int32),
        globals={
            "space": np.array([Space(space)], np.int32),
            "kernel_size": np.array([network_kernel], np.int32),
            "kernel_positions": np.array([network_positions], np.int32),
            "layers_outside": np.array([layers_outside], np.int32),
        },
    )
    validate_graph(graph)
    return graph


def _check_int32(name: str, values: np.ndarray) -> None:
    limits = np.iinfo(np.int32)  # a larger number would wrap around, and so name another vertex
    for value in (values.min(initial=0), values.max(initial=0)):
        if not limits.min <= value <= limits.max:
            raise ValueError(f"{name} hold {value}; accepted are 32-bit integers")


def _check_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, found {value!r}")
    if not 0 <= value <= np.iinfo(np.int32).max:
        raise ValueError(f"{name} is {value}; accepted are 32-bit integers from 0")


def validate_graph(graph: jraph.GraphsTuple, *, allow_dead_vertices: bool = True) -> None:
    """Checks that a graph is one architecture, and says what is wrong with it otherwise.

    Args:
      graph: a single graph (not a batch).
      allow_dead_vertices: accept vertices that lie on no path from input to output, as the spaces
        of DAG strings and cells do.

    Raises:
      ValueError: a batch; fewer than two vertices; an edge that names no vertex; a self loop; a
        duplicate edge without weight; a cycle; vertices not numbered in a topological order; an
        unknown operator; a kernel size below 1; a vertex that both sums and joins; no path from
        input to output; with `allow_dead_vertices=False`, a vertex that no path crosses.
    """
    num_vertices = number_of_vertices(graph)
    if num_vertices < 2:
        raise ValueError(
            f"a graph needs at least 2 vertices, the input and the output, found {num_vertices}"
        )
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    _check_edges(num_vertices, senders, receivers)
    _check_operators(graph)
    _check_joins(graph)
    if np.any(senders > receivers):
        _check_order(senders, receivers)
    live = live_vertices(graph)
    if not live[0]:
        raise ValueError(
            f"no path joins the input (vertex 0) and the output (vertex {num_vertices - 1})"
        )
    if not allow_dead_vertices and not live.all():
        raise ValueError(
            f"vertices {_first(np.flatnonzero(~live))} lie on no path from input to output"
        )


def _check_edges(num_vertices: int, senders: np.ndarray, receivers: np.ndarray) -> None:
    for name, vertices in (("senders", senders), ("receivers", receivers)):
        outside = vertices[(vertices < 0) | (vertices >= num_vertices)]
        if outside.size:
            raise ValueError(
                f"{name} name vertices {_first(outside)}; accepted are 0 to {num_vertices - 1}"
            )
    loops = senders[senders == receivers]
    if loops.size:
        raise ValueError(f"self loop at vertex {loops[0]}; an edge must join two vertices")


def _check_operators(graph: jraph.GraphsTuple) -> None:
    operators = np.asarray(graph.edges["operator"])
    accepted = [operator for operator in Operator if operator != Operator.ZERO]
    unknown = np.flatnonzero(~np.isin(operators, accepted))
    if unknown.size:
        edge = unknown[0]
        raise ValueError(
            f"unknown operator {operators[edge]} on edge {_edge_name(graph, edge)}; accepted are "
            + ", ".join(f"{operator.value} ({operator.name})" for operator in accepted)
        )
    kernel_sizes = np.asarray(graph.edges["kernel_size"])
    if np.any(kernel_sizes < 1):
        edge = np.argmax(kernel_sizes < 1)
        raise ValueError(
            f"kernel size {kernel_sizes[edge]} on edge {_edge_name(graph, edge)}; "
            "accepted are integers from 1"
        )


def _check_joins(graph: jraph.GraphsTuple) -> None:
    columns = (graph.senders, graph.receivers, graph.edges["operator"], graph.edges["kernel_size"])
    weightless = np.stack(columns, axis=1)[~is_weight(graph)]
    rows = weightless[np.lexsort(weightless.T[::-1])]
    repeated = np.all(rows[1:] == rows[:-1], axis=1)
    if repeated.any():
        sender, receiver, operator, _ = rows[np.argmax(repeated)].tolist()
        raise ValueError(
            f"duplicate edge {sender}->{receiver}; only edges with weights may be parallel to "
            f"others of their kind, and this is {Operator(operator).name}"
        )
    joins = is_join(graph)
    if not joins.any():
        return
    joining = np.isin(graph.receivers, graph.receivers[joins])
    pairs = np.unique(np.stack(columns[1:3], axis=1)[joining], axis=0)
    several = pairs[:-1][pairs[:-1, 0] == pairs[1:, 0], 0]
    if several.size:
        names = ", ".join(Operator(kind).name for kind in pairs[pairs[:, 0] == several[0], 1])
        raise ValueError(
            f"vertex {several[0]} has edges {names}; a vertex that joins its sources has edges of "
            "one operator"
        )


def _check_order(senders: np.ndarray, receivers: np.ndarray) -> None:
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for sender, receiver in zip(senders.tolist(), receivers.tolist(), strict=True):
        sorter.add(receiver, sender)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(str(vertex) for vertex in error.args[1])
        raise ValueError(f"the graph has a cycle: {cycle}") from None
    edge = np.argmax(senders > receivers)
    raise ValueError(
        f"edge {senders[edge]}->{receivers[edge]} points backwards: number the vertices in a "
        "topological order"
    )


def number_of_vertices(graph: jraph.GraphsTuple) -> int:
    """Returns V of a single graph.

    Raises:
      TypeError: `graph` is not a graph, or is traced.
      ValueError: `graph` is a batch of several graphs.
    """
    check_graph(graph)
    if isinstance(graph.n_node, Tracer):
        raise TypeError(
            "the graph is traced by JAX, and this needs its numbers: call it outside of jit, or "
            "batched_path_statistics inside"
        )
    if len(graph.n_node) != 1:
        raise ValueError(f"expected a single graph, found a batch of {len(graph.n_node)}")
    return int(graph.n_node[0])


def check_graph(graph: object, what: str = "graph") -> None:
    """Checks that a value is a graph.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(graph, jraph.GraphsTuple):
        raise TypeError(
            f"expected a jraph.GraphsTuple as {what}, found {type(graph).__name__}; for an "
            "Architecture, pass its graph; for a string, dag_graph(string)"
        )


def is_weight(graph: jraph.GraphsTuple) -> np.ndarray:
    """Returns bool [E], true for the edges that carry a weight (linear and convolution)."""
    operators = np.asarray(graph.edges["operator"])
    return np.logical_or.reduce([operators == operator for operator in WEIGHT_OPERATORS])


def is_join(graph: jraph.GraphsTuple) -> np.ndarray:
    """Returns bool [E], true for the edges into vertices that do not sum."""
    operators = np.asarray(graph.edges["operator"])
    return np.logical_or.reduce([operators == operator for operator in JOIN_OPERATORS])


def reachable_vertices(graph: jraph.GraphsTuple) -> np.ndarray:
    """Returns bool [V], true for the vertices that the input reaches (vertex 0 included)."""
    reached = [False] * number_of_vertices(graph)
    reached[0] = True
    order = np.argsort(graph.receivers, kind="stable")
    for sender, receiver in _edge_pairs(graph, order):
        if reached[sender]:
            reached[receiver] = True
    return np.array(reached)


def live_vertices(graph: jraph.GraphsTuple) -> np.ndarray:
    """Returns bool [V], true for the vertices that lie on a path from input to output."""
    leads = [False] * number_of_vertices(graph)
    leads[-1] = True
    order = np.argsort(graph.senders, kind="stable")[::-1]
    for sender, receiver in _edge_pairs(graph, order):
        if leads[receiver]:
            leads[sender] = True
    return np.array(leads) & reachable_vertices(graph)


def live_edges(graph: jraph.GraphsTuple) -> np.ndarray:
    """Returns bool [E], true for the edges that lie on a path from input to output."""
    live = live_vertices(graph)
    return live[graph.senders] & live[graph.receivers]


def in_degrees(graph: jraph.GraphsTuple, *, live: bool = True) -> np.ndarray:
    """Counts the contributions summed in each vertex [AAS Eq. 4, 12; theory §3].

    What a vertex concatenates or multiplies is one contribution.

    Args:
      graph: a single graph.
      live: count only edges out of vertices that the input reaches, since the others bring
        nothing. The authors' code counts them too: `live=False`.

    Returns:
      int64 [V]. Vertex 0 counts its one contribution, the stem.
    """
    counted = (
        reachable_vertices(graph)[graph.senders] if live else np.ones(len(graph.senders), bool)
    )
    degrees = np.bincount(graph.receivers[counted], minlength=number_of_vertices(graph))
    degrees[0] = 1
    degrees[graph.receivers[is_join(graph) & counted]] = 1
    return degrees


def network_kernel_size(graph: jraph.GraphsTuple) -> float:
    """Returns q of [AAS Eq. 9], 1 for a dense network: the root of a kernel's number of positions.

    The equation is derived for q × q kernels, whose q² positions change together; of others, 1 × 7
    or three-dimensional, the root of their positions takes its place. The paper's networks use one
    kernel size throughout. Where sizes differ this is the largest, which bounds the change of every
    vertex, so that the rate derived from it is safe.
    """
    return max(math.sqrt(int(graph.globals["kernel_positions"][0])), 1.0)


def _edge_pairs(graph: jraph.GraphsTuple, order: np.ndarray):
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    return zip(senders[order].tolist(), receivers[order].tolist(), strict=True)


def _edge_name(graph: jraph.GraphsTuple, edge: int | np.integer) -> str:
    return f"{graph.senders[edge]}->{graph.receivers[edge]}"


def _first(values: Sequence[int] | np.ndarray, limit: int = 5) -> str:
    shown = ", ".join(str(value) for value in values[:limit])
    return shown + (", …" if len(values) > limit else "")
