"""The architecture graph: its errors, liveness, in-degrees, batches."""

import itertools
import re

import chex
import hypothesis
import jax
import jraph
import numpy as np
import pytest
from hypothesis import strategies

from archscale_jax._graph import (
    JOIN_OPERATORS,
    Operator,
    Space,
    build_graph,
    in_degrees,
    is_weight,
    live_edges,
    live_vertices,
    network_kernel_size,
    number_of_vertices,
    reachable_vertices,
    validate_graph,
)
from archscale_jax._spaces import cell_graph, dag_graph

SUMMED = [Operator.SKIP, Operator.LINEAR, Operator.CONV, Operator.AVG_POOL]
QUICK = hypothesis.settings(deadline=None, max_examples=100)


@strategies.composite
def edge_lists(draw, max_vertices=7):
    """(V, [(sender, receiver, operator, kernel size)]) of a valid graph, in any order."""
    num_vertices = draw(strategies.integers(2, max_vertices))
    inner = draw(strategies.sets(strategies.integers(1, num_vertices - 1)))
    path = sorted({0, num_vertices - 1} | inner)
    pairs = list(itertools.combinations(range(num_vertices), 2))
    chosen = draw(strategies.sets(strategies.sampled_from(pairs))) | set(itertools.pairwise(path))
    kinds = [[one] for one in JOIN_OPERATORS] + [SUMMED] * 3
    kind = [draw(strategies.sampled_from(kinds)) for _ in range(num_vertices)]
    edges = {
        (*pair, draw(strategies.sampled_from(kind[pair[1]])), draw(strategies.integers(1, 9)))
        for pair in sorted(chosen)
    }
    parallel = {(*edge[:2], Operator.LINEAR, 1) for edge in edges if kind[edge[1]] == SUMMED}
    edges |= draw(strategies.sets(strategies.sampled_from(sorted(parallel)))) if parallel else set()
    return num_vertices, draw(strategies.permutations(sorted(edges)))


def graph_of(num_vertices, edges, **options):
    return build_graph(num_vertices, *np.array(edges, int).reshape(-1, 4).T, **options)


def paths_from(vertex, edges):
    """Every path out of `vertex`, as a list of vertices: the slow ground truth."""
    yield [vertex]
    for sender, receiver, *_ in edges:
        if sender == vertex:
            for path in paths_from(receiver, edges):
                yield [vertex, *path]


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((1, [], [], []), "at least 2 vertices.* found 1", id="one_vertex"),
        pytest.param((0, [], [], []), "at least 2 vertices.* found 0", id="no_vertex"),
        pytest.param((3, [], [], []), r"no path .*vertex 0.*vertex 2", id="no_edge"),
        pytest.param((3, [0], [1], [2]), r"no path .*vertex 0.*vertex 2", id="no_path"),
        pytest.param((3, [1], [2], [2]), "no path", id="no_path_from_input"),
        pytest.param((3, [0, 1, 1], [1, 1, 2], [1] * 3), "self loop at vertex 1", id="loop"),
        pytest.param(
            (3, [0, 1, 0], [1, 2, 1], [1, 2, 1]), "duplicate edge 0->1", id="duplicate_edge"
        ),
        pytest.param(
            (3, [0, 0, 1], [1, 2, 2], [2, 5, 1]), "vertex 2 .* SKIP, CONCATENATION", id="join"
        ),
        pytest.param((3, [0, 1], [1, 3], [1, 1]), "receivers .* 3; .* 0 to 2", id="receiver_3"),
        pytest.param((3, [0, -1], [1, 2], [1, 1]), "senders .* -1; .* 0 to 2", id="sender_-1"),
        pytest.param((3, [0, 7], [1, 2], [1, 1]), "senders .* 7; .* 0 to 2", id="sender_7"),
        pytest.param(
            (3, [9] * 8, [2] * 8, [1] * 8), "senders .* 9, 9, 9, 9, 9, …; ", id="many_senders"
        ),
        pytest.param(
            (4, [0, 1, 2, 2], [1, 2, 1, 3], [1] * 4), "cycle: (1 -> 2 -> 1|2 -> 1 -> 2)", id="cycle"
        ),
        pytest.param(
            (4, [0, 2, 1], [2, 1, 3], [1] * 3), "edge 2->1 points backwards", id="backwards"
        ),
        pytest.param((2, [0], [1], [9]), r"operator 9 on edge 0->1; .*1 \(SKIP\)", id="unknown"),
        pytest.param((2, [0], [1], [-1]), "operator -1 on edge 0->1", id="negative_operator"),
        pytest.param(
            (2, [0], [1], [Operator.ZERO]), r"operator 0 on edge 0->1; accepted are 1", id="zero"
        ),
        pytest.param(
            (3, [0, 1], [1, 2], [3, 3], [3, 0]), "kernel size 0 on edge 1->2", id="kernel_0"
        ),
        pytest.param((2, [0], [1], [1], [-3]), "kernel size -3 on edge 0->1", id="kernel_-3"),
        pytest.param(
            (3, [0, 1], [1], [1, 1]), r"receivers has shape \(1,\)", id="receivers_too_short"
        ),
        pytest.param((3, [0, 1], [1, 2], [1]), r"operators has shape \(1,\)", id="operators_short"),
        pytest.param(
            (3, [0, 1], [1, 2], [1, 1], [1, 1, 1]), r"kernel_sizes has shape \(3,\)", id="kernels"
        ),
        pytest.param((2, 0, 1, 1), r"senders has shape \(\)", id="scalars"),
        pytest.param((2, [[0]], [[1]], [[1]]), r"senders has shape \(1, 1\)", id="matrices"),
        pytest.param((2, [0.0], [1], [1]), "senders must be integers, found .*float", id="float"),
        pytest.param((2, [0], [1], ["2"]), "operators must be integers, found", id="text"),
        pytest.param((2, [0], [True], [1]), "receivers must be integers, found .*bool", id="bool"),
        pytest.param((2, [0], [1], [1], [1.5]), "kernel_sizes must be integers", id="kernel_1.5"),
        pytest.param((2, [0], [1], [2**70]), "operators must be integers", id="beyond_int64"),
        # As int32 these would wrap around to valid numbers.
        pytest.param((2, [2**32], [1], [1]), "senders hold 4294967296", id="sender_wraps"),
        pytest.param((2, [0], [1 - 2**32], [1]), "receivers hold -4294967295", id="negative_wraps"),
        pytest.param((2, [0], [1], [2**32 + 1]), "operators hold", id="operator_wraps"),
        pytest.param((2, [0], [1], [1], [2**63]), "kernel_sizes hold", id="unsigned_wraps"),
        pytest.param((-1, [0], [1], [1]), "num_vertices is -1", id="negative_vertices"),
        pytest.param((2**31, [0], [1], [1]), "num_vertices is 2147483648", id="huge_vertices"),
    ],
)
def test_bad_edge_lists_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_graph(*arguments)


@pytest.mark.parametrize("num_vertices", [2.0, "2", None, True, [2]])
def test_number_of_vertices_must_be_an_integer(num_vertices):
    with pytest.raises(TypeError, match="num_vertices must be an int"):
        build_graph(num_vertices, [0], [1], [1])


@pytest.mark.parametrize(
    ("network_kernel", "error"),
    [(-1, ValueError), (2**32, ValueError), (3.0, TypeError), (True, TypeError)],
)
def test_bad_network_kernels_raise(network_kernel, error):
    with pytest.raises(error, match="network_kernel"):
        build_graph(2, [0], [1], [1], network_kernel=network_kernel)


def test_unknown_space_raises():
    with pytest.raises(ValueError, match="7"):
        build_graph(2, [0], [1], [1], space=7)  # pyright: ignore[reportArgumentType]


@hypothesis.settings(QUICK)
@hypothesis.given(
    edge_lists(), strategies.lists(strategies.integers(0, 6), min_size=2, max_size=7, unique=True)
)
def test_every_cycle_is_found_and_its_edges_are_named(edge_list, cycle):
    num_vertices, edges = edge_list
    hypothesis.assume(max(cycle) < num_vertices)
    pairs = {edge[:2] for edge in edges} | set(itertools.pairwise([*cycle, cycle[0]]))
    senders, receivers = zip(*pairs, strict=True)
    with pytest.raises(ValueError, match="the graph has a cycle: ") as caught:
        build_graph(num_vertices, senders, receivers, [Operator.LINEAR] * len(pairs))
    named = [int(vertex) for vertex in re.findall(r"\d+", str(caught.value))]
    assert named[0] == named[-1]
    assert set(itertools.pairwise(named)) <= pairs


@QUICK
@hypothesis.given(edge_lists(), strategies.randoms(use_true_random=False))
def test_a_renumbered_graph_is_called_backwards_not_a_cycle(edge_list, random):
    num_vertices, edges = edge_list
    numbers = list(range(num_vertices))
    random.shuffle(numbers)
    renamed = [(numbers[u], numbers[v], *rest) for u, v, *rest in edges]
    backwards = {f"{u}->{v}" for u, v, *_ in renamed if u > v}
    hypothesis.assume(backwards)
    with pytest.raises(
        ValueError, match=r"edge \d+->\d+ points backwards: .*topological"
    ) as caught:
        graph_of(num_vertices, renamed)
    assert str(caught.value).split()[1] in backwards


def test_dead_vertices_raise_only_on_demand():
    graph = build_graph(5, [0, 0, 2], [1, 4, 3], [1, 2, 2])
    validate_graph(graph)
    with pytest.raises(ValueError, match="vertices 1, 2, 3 lie on no path"):
        validate_graph(graph, allow_dead_vertices=False)
    validate_graph(dag_graph("2_02_002"), allow_dead_vertices=False)


def test_a_batch_raises_where_one_graph_is_expected():
    batch = jraph.batch_np([dag_graph("2"), dag_graph("2_02")])
    for function in (validate_graph, number_of_vertices, live_vertices, in_degrees):
        with pytest.raises(ValueError, match="single graph, found a batch of 2"):
            function(batch)


# What is built.


@QUICK
@hypothesis.given(edge_lists(), strategies.sampled_from(Space), strategies.data())
def test_layout_does_not_depend_on_the_order_of_the_edges(edge_list, space, data):
    num_vertices, edges = edge_list
    graph = graph_of(num_vertices, edges, space=space)
    expected = np.array(sorted(edges, key=lambda edge: (edge[1], edge[0], *edge[2:]))).T
    senders, receivers, operators, kernel_sizes = expected
    np.testing.assert_array_equal(graph.senders, senders)
    np.testing.assert_array_equal(graph.receivers, receivers)
    np.testing.assert_array_equal(graph.edges["operator"], operators)
    np.testing.assert_array_equal(graph.edges["kernel_size"], kernel_sizes)
    np.testing.assert_array_equal(graph.nodes, range(num_vertices))
    np.testing.assert_array_equal(graph.globals["space"], [space])
    assert (graph.n_node.tolist(), graph.n_edge.tolist()) == ([num_vertices], [len(edges)])
    leaves = jax.tree.leaves(graph)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.int32 for leaf in leaves)
    shuffled = data.draw(strategies.permutations(edges))
    chex.assert_trees_all_equal(graph, graph_of(num_vertices, shuffled, space=space))


def test_kernel_sizes_default_to_one():
    graph = build_graph(3, [0, 1], [1, 2], [Operator.LINEAR, Operator.SKIP])
    np.testing.assert_array_equal(graph.edges["kernel_size"], [1, 1])


def test_inputs_are_not_changed():
    columns = [np.array(column) for column in ([1, 0], [2, 1], [2, 3], [1, 5])]
    copies = [column.copy() for column in columns]
    build_graph(3, *columns)
    for column, copy in zip(columns, copies, strict=True):
        np.testing.assert_array_equal(column, copy)


@QUICK
@hypothesis.given(edge_lists())
def test_network_kernel_size_is_the_largest_of_the_convolutions(edge_list):
    num_vertices, edges = edge_list
    kernels = [kernel for *_, operator, kernel in edges if operator == Operator.CONV]
    assert network_kernel_size(graph_of(num_vertices, edges)) == max(kernels, default=1)
    assert network_kernel_size(graph_of(num_vertices, edges, network_kernel=11)) == 11
    assert network_kernel_size(graph_of(num_vertices, edges, network_kernel=0)) == 1


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (dag_graph("2_02"), 1),
        (dag_graph("2_02", kernel_size=5), 5),
        (dag_graph("1", kernel_size=5), 5),  # the stem of a convolutional network has a kernel too
        (cell_graph("3_33_333"), 3),
        (cell_graph("2_22_222"), 3),  # of the stem, which every network of cells has
        (cell_graph("4_44_444"), 3),
    ],
)
def test_network_kernel_size_of_the_spaces(graph, expected):
    assert network_kernel_size(graph) == expected


# Liveness and in-degrees against the paths themselves.


@QUICK
@hypothesis.given(edge_lists())
def test_liveness_and_in_degrees_agree_with_the_listed_paths(edge_list):
    num_vertices, edges = edge_list
    graph = graph_of(num_vertices, edges)
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    paths = list(paths_from(0, edges))
    reached = {path[-1] for path in paths}
    complete = [path for path in paths if path[-1] == num_vertices - 1]
    on_path = {vertex for path in complete for vertex in path}
    crossed = {edge for path in complete for edge in itertools.pairwise(path)}
    assert number_of_vertices(graph) == num_vertices
    assert set(np.flatnonzero(reachable_vertices(graph))) == reached
    assert set(np.flatnonzero(live_vertices(graph))) == on_path
    assert live_edges(graph).tolist() == [pair in crossed for pair in pairs]
    assert is_weight(graph).tolist() == [
        operator in (Operator.LINEAR, Operator.CONV) for operator in graph.edges["operator"]
    ]
    incoming = [[u for u, v in pairs if v == vertex] for vertex in range(num_vertices)]
    joins = {receiver for _, receiver, operator, _ in edges if operator in JOIN_OPERATORS}

    def degree(vertex, senders):
        return min(len(senders), 1) if vertex in joins else len(senders)

    for live, counted in ((False, set(range(num_vertices))), (True, reached)):
        degrees = in_degrees(graph, live=live).tolist()
        assert degrees == [1] + [
            degree(vertex, [u for u in incoming[vertex] if u in counted])
            for vertex in range(1, num_vertices)
        ]


@pytest.mark.parametrize(
    ("file_name", "key", "read"),
    [("dag_n5_open.npz", "dag", dag_graph), ("nb201_open.npz", "code", cell_graph)],
)
def test_counting_dead_edges_gives_the_in_degrees_of_the_published_code(
    golden_dir, file_name, key, read
):
    with np.load(golden_dir / file_name) as golden:
        texts, expected, count = golden[key].astype(str), golden["in_degree"], golden["n_paths"]
    joined = np.flatnonzero(count > 0)[::11]  # all over the space
    found = np.array([in_degrees(read(text), live=False) for text in texts[joined].tolist()])
    np.testing.assert_array_equal(found, expected[joined, :-1])


# Batches.


def graph_lists(max_size):
    return strategies.lists(edge_lists(max_vertices=5), min_size=1, max_size=max_size).map(
        lambda many: [graph_of(*edge_list) for edge_list in many]
    )


@hypothesis.settings(QUICK, max_examples=50)
@hypothesis.given(graph_lists(max_size=5))
def test_batches_are_undone_exactly(graphs):
    batch = jraph.batch_np(graphs)
    for graph, again in zip(graphs, jraph.unbatch_np(batch), strict=True):
        chex.assert_trees_all_equal(graph, again)
        validate_graph(again)


@hypothesis.settings(QUICK, max_examples=4)  # every size of a batch is compiled anew
@hypothesis.given(graph_lists(max_size=3))
def test_padding_is_undone_exactly_and_counts_for_nothing(graphs):
    batch = jraph.batch_np(graphs)
    num_vertices, num_edges = int(batch.n_node.sum()), int(batch.n_edge.sum())
    padded = jraph.pad_with_graphs(batch, num_vertices + 3, num_edges + 2, len(graphs) + 2)
    assert np.all(padded.edges["operator"][num_edges:] == Operator.ZERO)
    assert not np.any(is_weight(padded)[num_edges:])
    unpadded = jraph.unpad_with_graphs(padded)
    for graph, again in zip(graphs, jraph.unbatch(unpadded), strict=True):
        chex.assert_trees_all_equal(graph, again)
        validate_graph(again)
