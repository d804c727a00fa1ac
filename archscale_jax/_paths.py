"""Path statistics of architecture graphs without enumerating paths (theory §2).

The depth L_p of an end-to-end path p is its number of weight edges. With M_k(v) the sum of L^k over
all paths from the input to vertex v,

    M_k(v) = Σ_{u->v} Σ_{j<=k} C(k, j) w^(k-j) M_j(u),    M_0(input) = 1,

where w is 1 for a weight edge and 0 for any other. `path_statistics` runs this recursion in Python
integers: exact, for one graph of any size, linear in edges. `batched_path_statistics` runs it on
device for a batch of small graphs; there each vertex keeps a power of two apart from its moments,
so that 2^998 paths neither overflow nor cost digits.
"""

import functools
import math
from operator import index
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float, Int

from archscale_jax._graph import (
    WEIGHT_OPERATORS,
    Operator,
    check_graph,
    is_weight,
    number_of_vertices,
)


class PathStatistics(NamedTuple):
    """Statistics over all end-to-end paths of one graph, exact integers.

    Attributes:
      count: number of paths P.
      depth_sum: Σ_p L_p.
      depth_cubed_sum: Σ_p L_p³.
      min_depth: smallest L_p.
      max_depth: largest L_p.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  (the contract's name)
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
      TypeError: the offset is not an integer.
      ValueError: `graph` is a batch or not valid, no path joins input and output, or the offset is
        negative.
    """
    depth_offset = index(depth_offset)
    if depth_offset < 0:
        raise ValueError(f"depth_offset must not be negative, found {depth_offset}")
    num_vertices = number_of_vertices(graph)
    skip_sources, weight_sources = _sources(graph)
    # One entry per vertex in every list. An unreached vertex holds zero paths, and depths that no
    # arithmetic here can turn into those of a path.
    moments = [[depth_offset**power] + [0] * (num_vertices - 1) for power in range(4)]
    shallowest = [depth_offset] + [depth_offset + 2 * num_vertices] * (num_vertices - 1)
    deepest = [depth_offset] + [-2 * num_vertices] * (num_vertices - 1)
    for vertex in range(1, num_vertices):
        skips, weights = skip_sources[vertex], weight_sources[vertex]
        lengthened = _lengthened(*(sum(map(moment.__getitem__, weights)) for moment in moments))
        for moment, over_weights in zip(moments, lengthened, strict=True):
            moment[vertex] = sum(map(moment.__getitem__, skips)) + over_weights
        for depths, extreme in ((shallowest, min), (deepest, max)):
            arriving = [depths[source] for source in skips]
            arriving += [depths[source] + 1 for source in weights]
            depths[vertex] = extreme(arriving, default=depths[vertex])
    count, depth_sum, _, depth_cubed_sum = (moment[-1] for moment in moments)
    if not count:
        raise ValueError("no path joins the input and the output of the graph")
    return PathStatistics(count, depth_sum, depth_cubed_sum, shallowest[-1], deepest[-1])


def _lengthened(count, depth, squared, cubed):
    """Returns Σ (L + 1)^k for k = 0 to 3 from the sums Σ L^k."""
    return (
        count,
        depth + count,
        squared + 2 * depth + count,
        cubed + 3 * squared + 3 * depth + count,
    )


def _sources(graph: jraph.GraphsTuple) -> tuple[list[list[int]], list[list[int]]]:
    """Lists, for every vertex, the sources of its skip edges and those of its weight edges."""
    operators = np.asarray(graph.edges["operator"])
    if np.any(np.asarray(graph.senders) >= np.asarray(graph.receivers)) or not operators.all():
        raise ValueError("the graph is not valid: validate_graph says what is wrong with it")
    skips, weights = ([[] for _ in range(number_of_vertices(graph))] for _ in range(2))
    columns = (graph.senders, graph.receivers, is_weight(graph))
    for sender, receiver, weight in zip(*(np.asarray(c).tolist() for c in columns), strict=True):
        (weights if weight else skips)[receiver].append(sender)
    return skips, weights


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

    Works under `jit`. The batch is laid out densely, V x 2 x V x G: meant for many small graphs or
    a few of some thousand vertices; `path_statistics` takes a single graph of any size. All sums
    are of non-negative terms, so that the relative error of a number of paths and of a mean stays
    near V times the float epsilon (float64 with `jax_enable_x64`); numbers of paths below 2^24 are
    summed exactly, and only their logarithm is rounded. Several edges between two vertices count
    as several paths.

    Args:
      graphs: graphs batched by `jraph.batch_np`, padded or not.
      max_vertices: V, the largest number of vertices in a graph that is not padding; needed under
        `jit`, where the default cannot be read off the batch.

    Returns:
      One entry per graph, padding graphs included. A graph with more than `max_vertices` vertices
      gives NaN and depths -1.

    Raises:
      ValueError: `max_vertices` missing under `jit` or below 1, or a dense layout of 2^31 entries
        or more.
    """
    check_graph(graphs, "graphs")
    if max_vertices is None:
        try:
            max_vertices = int(_most_vertices(graphs))
        except jax.errors.ConcretizationTypeError:
            raise ValueError(
                "pass max_vertices: under jit it cannot be read off the batch"
            ) from None
    if max_vertices < 1:
        raise ValueError(f"max_vertices must be at least 1, found {max_vertices}")
    num_graphs = len(graphs.n_node)
    if 2 * num_graphs * max_vertices**2 >= 2**31:
        raise ValueError(
            f"{num_graphs} graphs of up to {max_vertices} vertices do not fit the dense layout "
            "(2^31 entries); use path_statistics for large graphs, or smaller batches"
        )
    return _dense_path_statistics(graphs, max_vertices)


@functools.partial(jax.jit, static_argnames="max_vertices")
def _dense_path_statistics(graphs: jraph.GraphsTuple, max_vertices: int) -> BatchedPathStatistics:
    n_node = jnp.asarray(graphs.n_node)
    edges = _dense_edges(graphs, max_vertices)
    output = jnp.clip(n_node - 1, 0, max_vertices - 1)
    # Unrolled, few vertices take a fifth of the time of the loop, which mostly moves memory.
    paths = (_unrolled if max_vertices <= 8 else _looped)(edges, output)
    count, depth, _, cubed = paths.moments
    # One vertex alone is padding; more vertices than laid out is an answer that we do not have.
    has_path = (count > 0) & (n_node > 1) & (n_node <= max_vertices)
    count = jnp.where(has_path, count, 1.0)
    unknown = _has_edges(graphs) & (n_node > max_vertices)

    def pick(value, otherwise):
        value = jnp.where(has_path, value, otherwise)
        return jnp.where(unknown, jnp.nan, value) if value.dtype.kind == "f" else value

    return BatchedPathStatistics(
        # For a number in [1, 2), so that powers of two come out exact.
        log2_count=pick(jnp.log2(2 * count) + (paths.exponent - 1), -jnp.inf),
        mean_depth=pick(depth / count, 0.0),
        mean_depth_cubed=pick(cubed / count, 0.0),
        min_depth=pick(paths.min_depth, -1),
        max_depth=pick(paths.max_depth, -1),
    )


@jax.jit
def _most_vertices(graphs: jraph.GraphsTuple) -> Array:
    return jnp.max(jnp.where(_has_edges(graphs), graphs.n_node, 1))


def _has_edges(graphs: jraph.GraphsTuple) -> Array:
    """Returns bool [G], false for graphs that are padding: all their edges are `ZERO`."""
    n_edge = jnp.asarray(graphs.n_edge)
    first = jnp.cumsum(n_edge) - n_edge
    operator = jnp.append(jnp.asarray(graphs.edges["operator"]), Operator.ZERO)
    return (n_edge > 0) & (operator[first] != Operator.ZERO)


def _dense_edges(graphs: jraph.GraphsTuple, max_vertices: int) -> Array:
    """Counts edges, as float [source V, skip or weight 2, target V, G]."""
    n_node, vertex, senders, receivers, operator = map(
        jnp.asarray,
        (graphs.n_node, graphs.nodes, graphs.senders, graphs.receivers, graphs.edges["operator"]),
    )
    # The graph of an edge is looked up at the vertex 0 of its graph, `first`; a graph without
    # vertices, as padding may be, has the `first` of the next one and gives way to it.
    num_graphs, first = len(n_node), jnp.cumsum(n_node) - n_node
    graph_at = jnp.zeros(len(vertex), int).at[first].max(jnp.arange(num_graphs), mode="drop")
    source, target = vertex[senders], vertex[receivers]
    weight = jnp.isin(operator, jnp.array(WEIGHT_OPERATORS)).astype(int)
    # One flat index: XLA on CPU takes half as long again over tuples of them.
    entry = (2 * source + weight) * max_vertices + target
    entry = entry * num_graphs + graph_at[senders - source]
    # Padding edges and edges of vertices beyond max_vertices go past the end and are dropped.
    kept = (operator != Operator.ZERO) & (source < max_vertices) & (target < max_vertices)
    shape = (max_vertices, 2, max_vertices, num_graphs)
    end = math.prod(shape)
    return jnp.zeros(end).at[jnp.where(kept, entry, end)].add(1, mode="drop").reshape(shape)


class _Paths(NamedTuple):
    """The paths from the input to one vertex of each graph, arrays [G], or to all, [V, G].

    `moments` are M_0 to M_3, all divided by 2**exponent.
    """

    moments: tuple[Array, ...]
    exponent: Array
    min_depth: Array
    max_depth: Array


# For a vertex without paths; far from any real value and from overflow.
_NO_EXPONENT = -(2**30)
_NO_DEPTH = 2**30


def _no_paths(shape: tuple[int, ...]) -> _Paths:
    zeros, depth = jnp.zeros(shape), jnp.full(shape, _NO_DEPTH)
    return _Paths((zeros,) * 4, jnp.full(shape, _NO_EXPONENT), depth, -depth)


def _empty_path(shape: tuple[int, ...]) -> _Paths:
    zeros, depth = jnp.zeros(shape), jnp.zeros(shape, int)
    return _Paths((jnp.ones(shape), zeros, zeros, zeros), depth, depth, depth)


def _unrolled(edges: Array, output: Array) -> _Paths:
    """Returns the paths to the vertex `output` of each graph, by a program without loops."""
    max_vertices, _, _, num_graphs = edges.shape
    vertices = [_empty_path((num_graphs,))]
    for target in range(1, max_vertices):
        paths = _no_paths((num_graphs,))
        for source in range(target):
            paths = _extended(paths, vertices[source], *edges[source, :, target])
        vertices.append(_normalized(paths))
    result = vertices[0]
    for vertex, paths in enumerate(vertices):
        result = jax.tree.map(functools.partial(jnp.where, output == vertex), paths, result)
    return result


def _looped(edges: Array, output: Array) -> _Paths:
    """Returns the same; each step extends the paths to one vertex to all its targets at once."""
    max_vertices, _, _, num_graphs = edges.shape
    vertices = jax.tree.map(
        lambda nothing, start: nothing.at[0].set(start),
        _no_paths((max_vertices, num_graphs)),
        _empty_path((num_graphs,)),
    )

    def step(source, vertices):
        paths = _normalized(jax.tree.map(lambda array: array[source], vertices))
        # Otherwise the compiler normalizes anew for every target and every moment.
        paths = jax.lax.optimization_barrier(paths)
        return _extended(vertices, paths, *edges[source])

    vertices = jax.lax.fori_loop(0, max_vertices - 1, step, vertices)
    return _normalized(jax.tree.map(lambda array: array[output, jnp.arange(num_graphs)], vertices))


def _extended(target: _Paths, source: _Paths, skips: Array, weights: Array) -> _Paths:
    """Adds, to the paths that end in `target`, those that come from `source` over its edges.

    `skips` and `weights` count the edges that join the two.
    """
    joined = skips + weights > 0
    arriving = jnp.where(joined, source.exponent, _NO_EXPONENT)
    exponent = jnp.maximum(target.exponent, arriving)
    kept, added = _power_of_two(target.exponent - exponent), _power_of_two(arriving - exponent)
    # Where a skip and a weight edge join the same two vertices both depths arrive.
    min_depth = jnp.where(joined, source.min_depth + (skips == 0), _NO_DEPTH)
    max_depth = jnp.where(joined, source.max_depth + (weights > 0), -_NO_DEPTH)
    return _Paths(
        moments=tuple(
            kept * there + added * (skips * over_skip + weights * over_weight)
            for there, over_skip, over_weight in zip(
                target.moments, source.moments, _lengthened(*source.moments), strict=True
            )
        ),
        exponent=exponent,
        min_depth=jnp.minimum(target.min_depth, min_depth),
        max_depth=jnp.maximum(target.max_depth, max_depth),
    )


def _normalized(paths: _Paths) -> _Paths:
    """Moves the power of two of the number of paths into the exponent."""
    _, carry = jnp.frexp(paths.moments[0])
    scale = _power_of_two(-carry)
    return paths._replace(
        moments=tuple(scale * moment for moment in paths.moments), exponent=paths.exponent + carry
    )


def _power_of_two(exponent: Array) -> Array:
    """Returns 2.0**exponent for exponents up to 0, from its bits, since `exp2` rounds on CPU."""
    info = jnp.finfo(jnp.result_type(float))
    biased = jnp.maximum(exponent - info.minexp + 1, 0).astype(f"int{info.bits}")
    return jax.lax.bitcast_convert_type(biased << info.nmant, info.dtype)
