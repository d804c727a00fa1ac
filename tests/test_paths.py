"""Path statistics: against enumeration, the authors' numbers and closed forms."""

import math
from fractions import Fraction
from typing import Any

import chex
import hypothesis
import jax
import jraph
import numpy as np
import pytest
from hypothesis import strategies

from archscale_jax._graph import JOIN_OPERATORS, Operator, build_graph
from archscale_jax._paths import PathStatistics, batched_path_statistics, path_statistics
from archscale_jax._spaces import cell_graph, chain_string, dag_graph, random_sparse_dag

pytestmark = pytest.mark.quick_compilation

GOLDEN = {"dag_n5_open.npz": ("dag", dag_graph), "nb201_open.npz": ("code", cell_graph)}
EPSILON = float(np.finfo(np.float32).eps)
UNROLLED, LOOPED = 5, 40  # sizes of the two programs behind `batched_path_statistics`


def path_depths(graph):
    """Depths of all end-to-end paths, by walking each of them."""
    outgoing = {}
    for sender, receiver, operator in zip(
        graph.senders, graph.receivers, graph.edges["operator"], strict=True
    ):
        weight = operator in (Operator.LINEAR, Operator.CONV)
        outgoing.setdefault(int(sender), []).append((int(receiver), int(weight)))

    def walk(vertex, depth):
        if vertex == graph.n_node[0] - 1:
            yield depth
        for target, weight in outgoing.get(vertex, ()):
            yield from walk(target, depth + weight)

    return list(walk(0, 0))


def summed_up(depths):
    return PathStatistics(
        count=len(depths),
        depth_sum=sum(depths),
        depth_cubed_sum=sum(depth**3 for depth in depths),
        min_depth=min(depths),
        max_depth=max(depths),
    )


def complete_graph(num_vertices, operator):
    senders, receivers = np.triu_indices(num_vertices, k=1)
    return build_graph(num_vertices, senders, receivers, np.full(senders.size, operator))


def residual_stack(num_blocks):
    """Blocks of a weight edge into a vertex of its own, a skip out of it, a skip around both."""
    starts = 2 * np.arange(num_blocks)
    return build_graph(
        2 * num_blocks + 1,
        np.concatenate([starts, starts + 1, starts]),
        np.concatenate([starts + 1, starts + 2, starts + 2]),
        np.repeat([Operator.LINEAR, Operator.SKIP, Operator.SKIP], num_blocks),
    )


def multigraph(num_vertices, edges):
    """A graph with parallel edges of any kind; `build_graph` raises on parallel skips."""
    senders, receivers, operators = np.array(edges, np.int32).T
    return jraph.GraphsTuple(
        nodes=np.arange(num_vertices, dtype=np.int32),
        edges={"operator": operators, "kernel_size": np.ones_like(operators)},
        senders=senders,
        receivers=receivers,
        n_node=np.array([num_vertices], np.int32),
        n_edge=np.array([len(edges)], np.int32),
        globals={"space": np.zeros(1, np.int32)},
    )


@strategies.composite
def random_graphs(draw, max_vertices=6):
    """Graphs with and without dead vertices; every pair of vertices is joined or not."""
    num_vertices = draw(strategies.integers(2, max_vertices))
    senders, receivers = np.triu_indices(num_vertices, k=1)
    accepted = strategies.sampled_from([one for one in Operator if one not in JOIN_OPERATORS])
    size = senders.size
    operators = np.array(draw(strategies.lists(accepted, min_size=size, max_size=size)))
    present = operators != Operator.ZERO
    try:
        return build_graph(num_vertices, *(a[present] for a in (senders, receivers, operators)))
    except ValueError:
        hypothesis.reject()


def seeded_graph(seed, max_vertices=40):
    generator = np.random.default_rng(seed)
    num_vertices = int(generator.integers(2, max_vertices + 1))
    fewest, most = num_vertices - 1, num_vertices * (num_vertices - 1) // 2
    num_edges = int(generator.integers(fewest, most + 1))
    return random_sparse_dag(seed, num_vertices, num_edges, skip_fraction=generator.random())


def pad(graphs, num_vertices=512):
    """Batches graphs; one shape for all tests spares compilations."""
    batch = jraph.batch_np(graphs)
    return jraph.pad_with_graphs(batch, num_vertices, n_edge=4096, n_graph=16)


def statistics(graphs, **options):
    """Batched statistics as NumPy arrays."""
    return jax.device_get(batched_path_statistics(graphs, **options))


def assert_agrees(batched, exact, rtol):
    """Compares the leading entries of a batched answer with exact ones."""
    log2_count = [math.log2(one.count) for one in exact]
    np.testing.assert_allclose(batched.log2_count[: len(exact)], log2_count, rtol=rtol, atol=rtol)
    for name, sum_name in (("mean_depth", "depth_sum"), ("mean_depth_cubed", "depth_cubed_sum")):
        means = [float(Fraction(getattr(one, sum_name), one.count)) for one in exact]
        np.testing.assert_allclose(getattr(batched, name)[: len(exact)], means, rtol=rtol)
    for name in ("min_depth", "max_depth"):
        depths = [getattr(one, name) for one in exact]
        np.testing.assert_array_equal(getattr(batched, name)[: len(exact)], depths)


def assert_no_paths(batched, index):
    assert np.all(np.isneginf(batched.log2_count[index]))
    assert np.all(batched.mean_depth[index] == 0) and np.all(batched.mean_depth_cubed[index] == 0)
    assert np.all(batched.min_depth[index] == -1) and np.all(batched.max_depth[index] == -1)


# One graph, exactly.


@pytest.fixture(scope="module", params=GOLDEN)
def golden_graphs(request, golden_dir):
    """The authors' numbers for graphs of a space that have a path, and the graphs."""
    column, parse = GOLDEN[request.param]
    with np.load(golden_dir / request.param) as file:
        rows = {name: file[name] for name in file.files}
    rows = {name: values[::7] for name, values in rows.items()}  # all over the space
    has_path = rows["n_paths"] > 0
    for text in rows[column][~has_path]:
        with pytest.raises(ValueError, match="path"):
            parse(text.decode())
    rows = {name: values[has_path] for name, values in rows.items()}
    return rows, [parse(text.decode()) for text in rows[column]]


def test_exact_statistics_are_the_authors(golden_graphs):
    rows, graphs = golden_graphs
    found = [path_statistics(graph) for graph in graphs]
    for name, column in (
        ("count", "n_paths"),
        ("depth_cubed_sum", "sum_L3"),
        ("min_depth", "min_depth"),
        ("max_depth", "max_depth"),
    ):
        np.testing.assert_array_equal([getattr(one, name) for one in found], rows[column])


def test_batched_statistics_are_the_authors(golden_graphs):
    rows, graphs = golden_graphs
    found = statistics(jraph.batch_np(graphs))
    count = np.round(np.exp2(found.log2_count))
    np.testing.assert_array_equal(count, rows["n_paths"])
    np.testing.assert_allclose(found.mean_depth_cubed * count, rows["sum_L3"], rtol=5 * EPSILON)
    np.testing.assert_array_equal(found.min_depth, rows["min_depth"])
    np.testing.assert_array_equal(found.max_depth, rows["max_depth"])


@hypothesis.given(random_graphs(), strategies.integers(0, 5))
def test_exact_statistics_sum_over_all_paths(graph, depth_offset):
    depths = [depth + depth_offset for depth in path_depths(graph)]
    assert path_statistics(graph, depth_offset=depth_offset) == summed_up(depths)


@hypothesis.given(random_graphs(), strategies.randoms(use_true_random=False))
def test_order_of_the_edges_is_free(graph, random):
    order = list(range(len(graph.senders)))
    random.shuffle(order)
    shuffled = graph._replace(
        senders=graph.senders[order],
        receivers=graph.receivers[order],
        edges={name: values[order] for name, values in graph.edges.items()},
    )
    assert path_statistics(shuffled) == path_statistics(graph)


@pytest.mark.parametrize("depth", [1, 2, 17, 300])
def test_chain_has_one_path(depth):
    chain = dag_graph(chain_string(depth))
    assert path_statistics(chain) == (1, depth, depth**3, depth, depth)
    longer = depth + 3
    assert path_statistics(chain, depth_offset=3) == (1, longer, longer**3, longer, longer)


@pytest.mark.parametrize("n", [1, 2, 3, 18, 60])
def test_residual_stack_has_the_closed_form(n):
    assert path_statistics(residual_stack(n)) == (
        2**n,
        n * 2**n // 2,
        n**2 * (n + 3) * 2**n // 8,  # theory §4
        0,
        n,
    )


def complete_statistics(num_vertices):
    """All edges carry weights: a path of depth L chooses L - 1 of the inner vertices."""
    inner = num_vertices - 2
    paths = {chosen + 1: math.comb(inner, chosen) for chosen in range(inner + 1)}
    return PathStatistics(
        count=2**inner,
        depth_sum=sum(depth * count for depth, count in paths.items()),
        depth_cubed_sum=sum(depth**3 * count for depth, count in paths.items()),
        min_depth=1,
        max_depth=inner + 1,
    )


def test_complete_graph_of_a_thousand_vertices():
    exact = complete_statistics(1000)
    graph = complete_graph(1000, Operator.LINEAR)
    assert path_statistics(graph) == exact
    batched = statistics(graph)
    assert batched.log2_count[0] == 998
    assert_agrees(batched, [exact], rtol=1000 * EPSILON)


@pytest.mark.parametrize("depth_offset", [np.int8(3), np.int64(3)])
def test_offset_of_numpy_type_does_not_overflow(depth_offset):
    graph = complete_graph(100, Operator.LINEAR)
    exact = path_statistics(graph, depth_offset=3)
    assert path_statistics(graph, depth_offset=depth_offset) == exact


def test_exact_statistics_raise_on_bad_input():
    graph = dag_graph("2_02")
    with pytest.raises(ValueError, match="batch of 2"):
        path_statistics(jraph.batch_np([graph, graph]))
    with pytest.raises(ValueError, match="depth_offset .* found -1"):
        path_statistics(graph, depth_offset=-1)
    half: Any = 0.5
    with pytest.raises(TypeError, match="float"):
        path_statistics(graph, depth_offset=half)
    with pytest.raises(ValueError, match="no path"):
        path_statistics(multigraph(3, [(0, 1, Operator.SKIP)]))


# Batches.


@hypothesis.settings(max_examples=25)
@hypothesis.given(strategies.lists(random_graphs(UNROLLED), min_size=1, max_size=10))
def test_batched_statistics_are_exact_ones(graphs):
    exact = [path_statistics(graph) for graph in graphs]
    for max_vertices in (UNROLLED, LOOPED):
        found = statistics(pad(graphs), max_vertices=max_vertices)
        assert_agrees(found, exact, rtol=UNROLLED * EPSILON)
        assert_no_paths(found, slice(len(graphs), None))


@pytest.mark.parametrize("x64", [False, True])
def test_batched_statistics_of_larger_graphs(x64):
    graphs = [seeded_graph(seed) for seed in range(100)]
    exact = [path_statistics(graph) for graph in graphs]
    with jax.enable_x64(x64):
        found = statistics(jraph.batch_np(graphs))
        dtype = np.float64 if x64 else np.float32
        assert found.log2_count.dtype == found.mean_depth.dtype == dtype
        assert_agrees(found, exact, rtol=40 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("num_skips", "max_vertices"), [(4, UNROLLED), (12, LOOPED), (25, LOOPED)])
def test_numbers_of_paths_below_two_to_the_24_are_exact(num_skips, max_vertices):
    """A single path of depth 1 besides 2^n skip paths: the mean depth shows the last bit of P."""
    edges = [(u, v, Operator.SKIP) for v in range(num_skips) for u in range(v)]
    edges += [(num_skips - 1, num_skips, Operator.SKIP), (0, num_skips, Operator.LINEAR)]
    graph = multigraph(num_skips + 1, edges)
    found = statistics(pad([graph]), max_vertices=max_vertices)
    assert found.mean_depth[0] == np.float32(1 / (2 ** (num_skips - 2) + 1))
    assert (found.min_depth[0], found.max_depth[0]) == (0, 1)


@pytest.mark.parametrize("max_vertices", [UNROLLED, LOOPED])
def test_logarithm_of_a_power_of_two_is_exact(max_vertices):
    graphs = [complete_graph(size, Operator.CONV) for size in (2, 3, max_vertices)]
    found = statistics(pad(graphs), max_vertices=max_vertices)
    np.testing.assert_array_equal(found.log2_count[:3], [0, 1, max_vertices - 2])


@pytest.mark.parametrize("max_vertices", [UNROLLED, LOOPED])
def test_several_edges_between_two_vertices_are_several_paths(max_vertices):
    kinds = (Operator.SKIP, Operator.SKIP, Operator.CONV, Operator.LINEAR, Operator.LINEAR)
    edges = [(vertex, vertex + 1, kind) for vertex in range(max_vertices - 1) for kind in kinds]
    graph = multigraph(max_vertices, edges)
    exact = path_statistics(graph)
    assert exact.count == 5 ** (max_vertices - 1)
    assert (exact.min_depth, exact.max_depth) == (0, max_vertices - 1)
    assert exact.depth_sum * 5 == 3 * (max_vertices - 1) * exact.count
    found = statistics(pad([graph]), max_vertices=max_vertices)
    assert_agrees(found, [exact], rtol=max_vertices * EPSILON)


def test_paths_of_very_different_numbers_meet():
    """2^198 deep paths arrive next to one skip: its count is lost to rounding, its depth is not."""
    graph = complete_graph(200, Operator.LINEAR)
    graph = build_graph(
        201,
        [*graph.senders, 0, 199],
        [*graph.receivers, 200, 200],
        [*graph.edges["operator"], Operator.SKIP, Operator.SKIP],
    )
    exact = path_statistics(graph)
    assert (exact.count, exact.min_depth, exact.max_depth) == (2**198 + 1, 0, 199)
    assert_agrees(statistics(graph), [exact], rtol=200 * EPSILON)


@pytest.mark.parametrize("max_vertices", [UNROLLED, LOOPED])
def test_order_and_padding_of_a_batch_do_not_matter(max_vertices):
    graphs = [seeded_graph(seed, max_vertices) for seed in range(8)]
    order = np.random.default_rng(0).permutation(len(graphs))
    bare = statistics(jraph.batch_np(graphs), max_vertices=max_vertices)
    padded = statistics(pad(graphs), max_vertices=max_vertices)
    permuted = statistics(pad([graphs[index] for index in order]), max_vertices=max_vertices)
    assert padded.log2_count.shape == (16,)
    assert_no_paths(padded, slice(len(graphs), None))
    first = jax.tree.map(lambda values: values[: len(graphs)], padded)
    chex.assert_trees_all_close(bare, first, rtol=EPSILON)
    permuted = jax.tree.map(lambda values: values[np.argsort(order)], permuted)
    chex.assert_trees_all_close(permuted, first, rtol=EPSILON)


def test_padding_within_a_batch():
    """Padded batches, batched again, have graphs without vertices among the others."""
    parts = [[dag_graph("2_02"), dag_graph("1_22")], [dag_graph("2_12_002")]]
    found = statistics(jraph.batch_np([pad(part) for part in parts]), max_vertices=4)
    for start, graphs in ((0, parts[0]), (16, parts[1])):
        rows = jax.tree.map(lambda values, start=start: values[start : start + 16], found)
        assert_agrees(rows, [path_statistics(graph) for graph in graphs], rtol=4 * EPSILON)
        assert_no_paths(rows, slice(len(graphs), None))


def test_compiled_and_interpreted_agree():
    max_vertices = 6
    graphs = pad([seeded_graph(seed, max_vertices) for seed in range(4)])
    compiled = jax.jit(batched_path_statistics, static_argnames="max_vertices")(
        graphs, max_vertices=max_vertices
    )
    with jax.disable_jit():
        interpreted = statistics(graphs, max_vertices=max_vertices)
    chex.assert_trees_all_close(compiled, interpreted, rtol=4 * EPSILON)


def test_default_size_leaves_padding_out():
    found = statistics(pad([dag_graph("2_02"), dag_graph("1")], num_vertices=100_000))
    np.testing.assert_array_equal(found.max_depth, [2, 0] + [-1] * 14)
    assert_no_paths(found, slice(2, None))


def test_padding_alone_has_no_paths():
    real = dag_graph("2_02")
    zeros = {"operator": np.zeros_like(real.edges["operator"])}
    assert_no_paths(statistics(real._replace(edges=zeros)), slice(None))
    edgeless = real._replace(
        senders=real.senders[:0],
        receivers=real.receivers[:0],
        edges={"operator": real.edges["operator"][:0]},
        n_edge=np.zeros(1, np.int32),
    )
    assert_no_paths(statistics(edgeless), slice(None))


@pytest.mark.parametrize("max_vertices", [UNROLLED, LOOPED])
def test_graph_beyond_max_vertices_is_unknown(max_vertices):
    depths = np.array([2, max_vertices, max_vertices - 1])
    graphs = pad([dag_graph(chain_string(depth)) for depth in depths.tolist()])
    found = statistics(graphs, max_vertices=max_vertices)
    shown = np.array([1, np.nan, 1])
    np.testing.assert_array_equal(found.log2_count[:3], 0 * shown)
    np.testing.assert_array_equal(found.mean_depth[:3], depths * shown)
    np.testing.assert_array_equal(found.mean_depth_cubed[:3], depths**3 * shown)
    np.testing.assert_array_equal(found.min_depth[:3], np.where(shown == 1, depths, -1))
    np.testing.assert_array_equal(found.max_depth[:3], np.where(shown == 1, depths, -1))
    assert_no_paths(found, slice(3, None))


def test_batched_statistics_raise_on_bad_input():
    graphs = jraph.batch_np([dag_graph("2_02"), dag_graph("2")])
    with pytest.raises(ValueError, match="pass max_vertices"):
        jax.jit(batched_path_statistics)(graphs)
    with pytest.raises(ValueError, match="max_vertices must be at least 1, found 0"):
        statistics(graphs, max_vertices=0)
    with pytest.raises(ValueError, match="2 graphs of up to 100000 vertices do not fit"):
        statistics(graphs, max_vertices=100_000)
