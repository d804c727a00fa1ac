"""Path statistics of architecture graphs without enumerating paths (theory §2).

The depth L_p of an end-to-end path p is its number of weight edges. With M_k(v) the sum of L^k over
all paths from the input to vertex v,

    M_k(v) = Σ_{u->v} Σ_{j<=k} C(k, j) w^(k-j) M_j(u),    M_0(input) = 1,

where w is 1 for a weight edge and 0 for any other. `path_statistics` runs this recursion in Python
integers: exact, for one graph of any size, linear in edges. `batched_path_statistics` runs it on
device for a batch of small graphs; there the numbers of paths are kept as mantissa and power of
two, and depths as means over paths, so that 2^998 paths neither overflow nor cost digits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float, Int

from archscale_jax.graph import WEIGHT_OPERATORS, Operator, is_weight, number_of_vertices


class PathStatistics(NamedTuple):
    """Statistics over all end-to-end paths of one graph, exact integers.

    Attributes:
      count: number of paths P.
      depth_sum: Σ_p L_p.
      depth_cubed_sum: Σ_p L_p³.
      min_depth: smallest L_p.
      max_depth: largest L_p.
    """

    count: int
    depth_sum: int
    depth_cubed_sum: int
    min_depth: int
    max_depth: int


def path_statistics(graph: jraph.GraphsTuple, *, depth_offset: int = 0) -> PathStatistics:
    """Computes the path statistics of one graph exactly (theory §2).

    Args:
      graph: a single valid graph.
      depth_offset: weight layers that every path crosses outside the graph, added to each L_p.

    Returns:
      Python integers. Time is linear in edges (times the length of the integers).

    Raises:
      ValueError: `graph` is a batch, no path joins input and output, or the offset is negative.
    """
    if depth_offset < 0:
        raise ValueError(f"depth_offset must not be negative, found {depth_offset}")
    num_vertices = number_of_vertices(graph)
    skip_sources, weight_sources = _sources(graph)
    # One list per moment, one entry per vertex. An unreached vertex holds zero paths and depths
    # that no arithmetic here can turn into those of a path.
    count, first, second, third = ([0] * num_vertices for _ in range(4))
    shallowest, deepest = [2 * num_vertices] * num_vertices, [-2 * num_vertices] * num_vertices
    count[0], first[0], second[0], third[0] = (depth_offset**power for power in range(4))
    shallowest[0] = deepest[0] = 0
    for vertex in range(1, num_vertices):
        skips, weights = skip_sources(vertex), weight_sources(vertex)
        paths, depth, squared, cubed = (
            sum(map(moment.__getitem__, weights)) for moment in (count, first, second, third)
        )
        cubed += 3 * squared + 3 * depth + paths  # (L + 1)³, and so on
        squared += 2 * depth + paths
        depth += paths
        count[vertex] = paths + sum(map(count.__getitem__, skips))
        first[vertex] = depth + sum(map(first.__getitem__, skips))
        second[vertex] = squared + sum(map(second.__getitem__, skips))
        third[vertex] = cubed + sum(map(third.__getitem__, skips))
        for depths, extreme in ((shallowest, min), (deepest, max)):
            through = [depths[source] for source in skips]
            through += [depths[source] + 1 for source in weights]
            depths[vertex] = extreme(through, default=depths[vertex])
    if not count[-1]:
        raise ValueError("no path joins the input and the output of the graph")
    return PathStatistics(
        count=count[-1],
        depth_sum=first[-1],
        depth_cubed_sum=third[-1],
        min_depth=shallowest[-1] + depth_offset,
        max_depth=deepest[-1] + depth_offset,
    )


def _sources(graph: jraph.GraphsTuple):
    """Returns two functions from a vertex to its sources by skip and by weight edges."""
    weight = is_weight(graph)
    lookups = []
    for chosen in (~weight, weight):
        receivers = np.asarray(graph.receivers)[chosen]
        order = np.argsort(receivers, kind="stable")
        senders = np.asarray(graph.senders)[chosen][order].tolist()
        starts = np.searchsorted(
            receivers[order], np.arange(number_of_vertices(graph) + 1)
        ).tolist()
        lookups.append(
            lambda vertex, senders=senders, starts=starts: senders[
                starts[vertex] : starts[vertex + 1]
            ]
        )
    return lookups


class BatchedPathStatistics(NamedTuple):
    """Statistics over the end-to-end paths of each of G graphs, on device.

    The sums of `PathStatistics` are `2**log2_count` times the means. A graph without a path (as the
    padding is) has `log2_count` -inf, means 0 and depths -1.

    Attributes:
      log2_count: base-2 logarithm of the number of paths.
      mean_depth: mean of L_p over paths.
      mean_depth_cubed: mean of L_p³ over paths.
      min_depth: smallest L_p.
      max_depth: largest L_p.
    """

    log2_count: Float[Array, "G"]
    mean_depth: Float[Array, "G"]
    mean_depth_cubed: Float[Array, "G"]
    min_depth: Int[Array, "G"]
    max_depth: Int[Array, "G"]


def batched_path_statistics(
    graphs: jraph.GraphsTuple, *, max_vertices: int | None = None
) -> BatchedPathStatistics:
    """Computes path statistics of a batch of small graphs in one call (theory §2).

    Works under `jit`. The batch is laid out densely, G x V x V: meant for many small graphs or a
    few of some thousand vertices; `path_statistics` takes a single graph of any size. The relative
    error of a number of paths and of a mean is about V times the float epsilon (float64 with
    `jax_enable_x64`); numbers of paths below 2^24 are exact.

    Args:
      graphs: graphs batched by `jraph.batch_np`, padded or not.
      max_vertices: V, the largest number of vertices in a graph; needed under `jit`, where the
        default cannot be read off the batch. Padding may have more.

    Returns:
      One entry per graph, padding graphs included. A graph with more than `max_vertices` vertices
      gives NaN and depths -1.

    Raises:
      ValueError: `max_vertices` missing under `jit`, or a dense layout of 2^31 entries or more.
    """
    if max_vertices is None:
        if isinstance(graphs.n_node, jax.core.Tracer):
            raise ValueError("pass max_vertices: under jit it cannot be read off the batch")
        max_vertices = int(np.max(graphs.n_node))
    num_graphs = len(graphs.n_node)
    if num_graphs * max_vertices**2 >= 2**31:
        raise ValueError(
            f"{num_graphs} graphs of up to {max_vertices} vertices do not fit the dense layout "
            "(2^31 entries); use path_statistics for large graphs, or smaller batches"
        )
    return _dense_path_statistics(graphs, max_vertices)


def _dense_path_statistics(graphs: jraph.GraphsTuple, max_vertices: int) -> BatchedPathStatistics:
    n_node = jnp.asarray(graphs.n_node)
    num_graphs = len(n_node)
    skips, weights = _dense_edges(graphs, max_vertices)
    states = _initial_states(max_vertices, num_graphs)

    def step(vertex, states):
        new = _combine(states, skips[vertex], weights[vertex])
        return jax.tree.map(lambda all_, one: all_.at[vertex].set(one), states, new)

    states = jax.lax.fori_loop(1, max_vertices, step, states)
    output = jnp.clip(n_node - 1, 0, max_vertices - 1)
    last = jax.tree.map(lambda all_: all_[output, jnp.arange(num_graphs)], states)
    # One vertex alone is padding; more vertices than laid out is an answer that we do not have.
    has_path = (last.mantissa > 0) & (n_node > 1) & (n_node <= max_vertices)
    edges_before = jnp.cumsum(jnp.asarray(graphs.edges["operator"]) != Operator.ZERO)
    edges_until = jnp.append(0, edges_before)[jnp.cumsum(jnp.asarray(graphs.n_edge))]
    unknown = (n_node > max_vertices) & (jnp.diff(edges_until, prepend=0) > 0)

    def pick(value, otherwise):
        value = jnp.where(has_path, value, otherwise)
        return jnp.where(unknown, jnp.nan, value) if value.dtype.kind == "f" else value

    return BatchedPathStatistics(
        log2_count=pick(jnp.log2(last.mantissa) + last.exponent, -jnp.inf),
        mean_depth=pick(last.mean_depth, 0.0),
        mean_depth_cubed=pick(last.mean_cubed, 0.0),
        min_depth=pick(last.min_depth, -1),
        max_depth=pick(last.max_depth, -1),
    )


class _State(NamedTuple):
    """Paths from the input to each vertex, each array [V, G]; P = mantissa * 2**exponent."""

    mantissa: Array
    exponent: Array
    mean_depth: Array
    mean_squared: Array
    mean_cubed: Array
    min_depth: Array
    max_depth: Array


_NO_EXPONENT = -(2**30)
_NO_DEPTH = 2**30


def _initial_states(max_vertices: int, num_graphs: int) -> _State:
    zeros = jnp.zeros((max_vertices, num_graphs))
    return _State(
        mantissa=zeros.at[0].set(1.0),
        exponent=jnp.full(zeros.shape, _NO_EXPONENT).at[0].set(0),
        mean_depth=zeros,
        mean_squared=zeros,
        mean_cubed=zeros,
        min_depth=jnp.full(zeros.shape, _NO_DEPTH).at[0].set(0),
        max_depth=jnp.full(zeros.shape, -_NO_DEPTH).at[0].set(0),
    )


def _dense_edges(graphs: jraph.GraphsTuple, max_vertices: int) -> tuple[Array, Array]:
    """Counts the skip and the weight edges, each as float [target V, source V, G]."""
    num_graphs = len(graphs.n_node)
    graph_of = jnp.repeat(jnp.arange(num_graphs), graphs.n_edge, total_repeat_length=len(graphs.senders))
    operator = jnp.asarray(graphs.edges["operator"])
    weight = jnp.isin(operator, jnp.array(WEIGHT_OPERATORS))
    vertex = jnp.asarray(graphs.nodes)
    # Padding edges have operator ZERO and add 0; vertices beyond max_vertices are dropped.
    index = (weight.astype(int), vertex[graphs.receivers], vertex[graphs.senders], graph_of)
    dense = jnp.zeros((2, max_vertices, max_vertices, num_graphs))
    dense = dense.at[index].add((operator != Operator.ZERO).astype(dense.dtype), mode="drop")
    return dense[0], dense[1]


def _combine(states: _State, skips: Array, weights: Array) -> _State:
    """One vertex from all its sources; `skips` and `weights` count edges, [V, G]."""
    present = (skips + weights > 0) & (states.mantissa > 0)
    exponent = jnp.max(jnp.where(present, states.exponent, _NO_EXPONENT), axis=0)
    scaled = jnp.where(present, states.mantissa * jnp.exp2((states.exponent - exponent).astype(states.mantissa.dtype)), 0.0)
    total = jnp.sum((skips + weights) * scaled, axis=0)
    share = scaled / jnp.where(total > 0, total, 1.0)
    # Each path arrives with probability share; over a weight edge its depth grows by one.
    probability, stepping = (skips + weights) * share, weights * share
    mantissa, carry = jnp.frexp(total)

    def mean(power, growth):
        return jnp.sum(probability * power + stepping * growth, axis=0)

    depth, squared, cubed = states.mean_depth, states.mean_squared, states.mean_cubed
    grown = (weights > 0).astype(states.min_depth.dtype)
    ungrown = (skips == 0).astype(states.min_depth.dtype)
    return _State(
        mantissa=mantissa,
        exponent=jnp.where(total > 0, exponent + carry, _NO_EXPONENT),
        mean_depth=mean(depth, 1.0),
        mean_squared=mean(squared, 2 * depth + 1),
        mean_cubed=mean(cubed, 3 * squared + 3 * depth + 1),
        # Where a skip and a weight edge join the same two vertices both depths arrive.
        min_depth=jnp.min(jnp.where(present, states.min_depth + ungrown, _NO_DEPTH), axis=0),
        max_depth=jnp.max(jnp.where(present, states.max_depth + grown, -_NO_DEPTH), axis=0),
    )
