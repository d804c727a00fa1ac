"""Seeded random architecture graphs."""

from collections.abc import Sequence

import jraph
import numpy as np

from archscale_jax._graph import Operator, build_graph, is_weight, live_edges
from archscale_jax._spaces.dag import dag_graph


def random_dag_string(
    seed: int,
    num_vertices: int,
    *,
    probabilities: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    max_tries: int = 1000,
) -> str:
    """Draws a DAG string with a path from input to output that crosses a weight edge.

    Args:
      seed: the same seed gives the same string.
      num_vertices: number of vertices V, at least 2.
      probabilities: chances of zero, skip and weight, independent for every edge.
      max_tries: draws before giving up.

    Returns:
      The string; uniform over the strings of this kind when the probabilities are equal.

    Raises:
      ValueError: fewer than 2 vertices, bad probabilities, or no valid draw in `max_tries`.
    """
    if num_vertices < 2:
        raise ValueError(f"num_vertices must be at least 2, found {num_vertices}")
    chances = np.asarray(probabilities, float)
    if chances.shape != (3,) or not np.all(chances >= 0) or not np.isclose(chances.sum(), 1):
        raise ValueError(
            "probabilities must be three non-negative numbers that sum to 1 (zero, skip, weight), "
            f"found {tuple(probabilities)}"
        )
    chances = chances / chances.sum()  # NumPy asks for more digits than a caller may have typed
    generator = np.random.default_rng(seed)
    for _ in range(max_tries):
        groups = (
            generator.choice(list("012"), vertex, p=chances) for vertex in range(1, num_vertices)
        )
        text = "_".join("".join(group) for group in groups)
        try:
            graph = dag_graph(text)
        except ValueError:
            continue
        if np.any(live_edges(graph) & is_weight(graph)):
            return text
    raise ValueError(
        f"no graph with a weighted path in {max_tries} draws of {num_vertices} vertices with "
        f"probabilities {tuple(probabilities)}"
    )


def random_sparse_dag(
    seed: int, num_vertices: int, num_edges: int, *, skip_fraction: float = 0.5
) -> jraph.GraphsTuple:
    """Draws a large sparse graph in which every vertex lies on a path from input to output.

    The edges v->v+1 are always there; the others join random pairs of vertices.

    Args:
      seed: the same seed gives the same graph.
      num_vertices: number of vertices V, at least 2.
      num_edges: number of edges E, from V-1 to V(V-1)/2.
      skip_fraction: chance that an edge is a skip; the others are linear.

    Raises:
      ValueError: a number outside its range.
    """
    complete = num_vertices * (num_vertices - 1) // 2
    if num_vertices < 2 or not num_vertices - 1 <= num_edges <= complete:
        raise ValueError(
            f"{num_vertices} vertices and {num_edges} edges; accepted are at least 2 vertices and "
            f"{num_vertices - 1} to {complete} edges"
        )
    if not 0 <= skip_fraction <= 1:
        raise ValueError(f"skip_fraction must lie in [0, 1], found {skip_fraction}")
    generator = np.random.default_rng(seed)
    chain = np.arange(num_vertices - 1, dtype=np.int64)
    keys = chain * num_vertices + chain + 1
    if 5 * num_edges > complete:  # dense: drawing repeated pairs again would take for ever
        rows, columns = np.triu_indices(num_vertices, 2)
        chosen = generator.choice(rows.size, num_edges - keys.size, replace=False)
        keys = np.union1d(keys, rows[chosen] * num_vertices + columns[chosen])
    while keys.size < num_edges:  # pairs that repeat are drawn again
        pairs = np.sort(generator.integers(num_vertices, size=(num_edges - keys.size, 2)), axis=1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        keys = np.union1d(keys, pairs[:, 0] * num_vertices + pairs[:, 1])
    senders, receivers = np.divmod(keys, num_vertices)
    skip = generator.random(num_edges) < skip_fraction
    return build_graph(
        num_vertices, senders, receivers, np.where(skip, Operator.SKIP, Operator.LINEAR)
    )
