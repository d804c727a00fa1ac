"""Search spaces: what is read is what was written, anything else raises, naming it."""

import collections
import functools
import itertools
import re

import chex
import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies

from archscale_jax._graph import Operator, Space, build_graph, is_weight, live_vertices
from archscale_jax._spaces import (
    cell_code,
    cell_graph,
    cell_string,
    chain_string,
    dag_graph,
    dag_string,
    random_dag_string,
    random_sparse_dag,
)

CELL_OPERATIONS = {
    "0": ("none", None),
    "1": ("skip_connect", (Operator.SKIP, 1)),
    "2": ("nor_conv_1x1", (Operator.CONV, 1)),
    "3": ("nor_conv_3x3", (Operator.CONV, 3)),
    "4": ("avg_pool_3x3", (Operator.AVG_POOL, 3)),
}
CELL_FORM = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
THEORY_CELL = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|"
    "+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
)

# Digits that are not ASCII, separators, letters, blanks, a zero byte, a lone surrogate.
SOME_PAIRS = [*itertools.combinations(range(5), 2)] * 4 + [(1, 0), (3, 1), (2, 2), (0, 5), (6, 1)]
ODD_ENTRIES = [-1, 0, 9, 2**31, 2**32, 2**32 + 1, 2**63, -(2**70), 1.0, None, "1", [1]]

NASTY = "000111222_____34567|~+-. \t\n\x00x²\u0662\u0660①Ⅱ\U0001d7d0é\ud800"


def grouped(characters):
    """Cuts a sequence of operators into the groups of a string: `2`, `02`, `002`, …"""
    characters, groups = list(characters), []
    while characters:
        size = len(groups) + 1
        groups.append("".join(characters[:size]))
        characters = characters[size:]
    return groups


@functools.cache
def all_paths(num_vertices):
    """Every increasing sequence of vertices from the first to the last, as edges."""
    inner = range(1, num_vertices - 1)
    return [
        list(itertools.pairwise((0, *chosen, num_vertices - 1)))
        for size in range(num_vertices - 1)
        for chosen in itertools.combinations(inner, size)
    ]


def listed_paths(groups):
    """Operators along each path of a string's groups, by trying every sequence of vertices."""
    for path in all_paths(len(groups) + 1):
        characters = [groups[receiver - 1][sender] for sender, receiver in path]
        if "0" not in characters:
            yield characters


def has_path(groups):
    return next(listed_paths(groups), None) is not None


def is_reachable(groups):
    """As `has_path`, for graphs with too many paths to list."""
    reached = [True]
    for group in groups:
        reached.append(
            any(there and char != "0" for there, char in zip(reached, group, strict=True))
        )
    return reached[-1]


def edges_of(graph):
    """{(sender, receiver): (operator, kernel size)}."""
    columns = (graph.senders, graph.receivers, *map(graph.edges.get, ("operator", "kernel_size")))
    return {(u, v): rest for u, v, *rest in zip(*map(np.ndarray.tolist, columns), strict=True)}


def edges_of_groups(groups, operations):
    return {
        (sender, receiver): list(operations[character])
        for receiver, group in enumerate(groups, start=1)
        for sender, character in enumerate(group)
        if character != "0"
    }


def in_parts(part, strategy, num_inputs=1500, at_once=10):
    """Runs a check on inputs that differ from part to part, so that workers can share them.

    Drawing several inputs at once saves most of the time that an example costs.
    """

    def decorate(check):
        @hypothesis.seed(part)
        @hypothesis.settings(database=None, deadline=None, max_examples=num_inputs // at_once)
        @hypothesis.given(strategies.lists(strategy, min_size=at_once, max_size=at_once))
        def check_all(inputs):
            for one in inputs:
                check(one)

        check_all()

    return decorate


# DAG strings.


def test_strings_all_over_those_of_five_vertices_are_read_and_printed_or_have_no_path():
    operations = {"1": (Operator.SKIP, 1), "2": (Operator.LINEAR, 1)}
    for characters in itertools.islice(itertools.product("012", repeat=10), 0, None, 23):
        groups = grouped("".join(characters))
        text = "_".join(groups)
        if has_path(groups):
            graph = dag_graph(text)
            assert dag_string(graph) == text
            assert edges_of(graph) == edges_of_groups(groups, operations), text
        else:
            with pytest.raises(ValueError, match="no path joins"):
                dag_graph(text)


@pytest.mark.parametrize("num_vertices", [2, 3, 6, 12, 40, 100])
def test_random_strings_of_any_size_are_read_and_printed(num_vertices):
    generator = np.random.default_rng(num_vertices)
    outcomes = collections.Counter()
    for zero in np.linspace(0, 0.98, 8):
        chances = [zero, (1 - zero) / 2, (1 - zero) / 2]
        size = num_vertices * (num_vertices - 1) // 2
        groups = grouped(generator.choice(list("012"), size, p=chances))
        text = "_".join(groups)
        joined = is_reachable(groups)
        outcomes[joined] += 1
        if joined:
            graph = dag_graph(text, kernel_size=5)
            operations = {"1": (Operator.SKIP, 1), "2": (Operator.CONV, 5)}
            assert dag_string(graph) == text
            assert edges_of(graph) == edges_of_groups(groups, operations)
        else:
            with pytest.raises(ValueError, match="no path joins"):
                dag_graph(text, kernel_size=5)
    assert outcomes[True] > 0


def test_dag_strings_make_graphs_of_their_space():
    graph = dag_graph("2_02_002", kernel_size=3)
    assert graph.globals["space"].tolist() == [Space.DAG]
    assert is_weight(graph).all()
    assert graph.n_node.tolist() == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "group 1 .* is ''; accepted is one character"),
        ("_", "group 1"),
        ("22", "group 1 .* '22'"),
        ("2_2", "group 2 .* '2'; .* vertices 0 to 1"),
        ("2_02_", "group 3 .* is ''"),
        ("2_03", "edge 1->2 .* is '3'; accepted are 0 .zero., 1 .skip. and 2 .weight."),
        ("²", "edge 0->1 .* is '²'"),
        ("٢", "edge 0->1"),
        ("2_0 ", "edge 1->2 .* is ' '"),
        ("2\n", "group 1"),
        ("0", "DAG string '0': no path joins"),
        ("2_00", "DAG string '2_00': no path joins"),
    ],
)
def test_malformed_dag_strings_raise_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        dag_graph(text)


@pytest.mark.parametrize("read", [dag_graph, cell_graph])
@pytest.mark.parametrize("size", [1, 100_000])
def test_messages_stay_short(read, size):
    for text in ("9", "_", "|", "~", "2_", "|+|", "|x~0|+"):
        with pytest.raises(ValueError, match=".") as caught:
            read(text * size)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("read", [dag_graph, cell_graph])
@pytest.mark.parametrize("text", [None, 2, 2.0, True, b"2", ["2"], ("2", "02"), np.array("2")])
def test_only_strings_are_read(read, text):
    with pytest.raises(TypeError, match=f"must be a str, found {type(text).__name__}"):
        read(text)


@pytest.mark.parametrize(
    "kernel_size", [True, False, np.True_, 3.0, np.float32(3), "3", [3], (3, 3)]
)
def test_kernel_sizes_of_other_types_raise(kernel_size):
    with pytest.raises(TypeError, match="kernel_size must be an int or None, found"):
        dag_graph("2", kernel_size=kernel_size)


@pytest.mark.parametrize("kernel_size", [0, -1, np.int64(0), np.int8(-3), 2**31, 2**32 + 3, 2**70])
def test_kernel_sizes_out_of_range_raise(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size is {kernel_size}; accepted"):
        dag_graph("2", kernel_size=kernel_size)


@pytest.mark.parametrize("integer", [int, np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_kernel_sizes_of_every_integer_type_mean_the_same(integer):
    graph = dag_graph("2_12", kernel_size=integer(5))
    chex.assert_trees_all_equal(graph, dag_graph("2_12", kernel_size=5))
    assert edges_of(graph) == {
        (0, 1): [Operator.CONV, 5],
        (0, 2): [Operator.SKIP, 1],
        (1, 2): [Operator.CONV, 5],
    }


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_chains(depth):
    assert chain_string(1) == "2"
    assert chain_string(3) == "2_02_002"
    edges = edges_of(dag_graph(chain_string(depth)))
    assert edges == {(v, v + 1): [Operator.LINEAR, 1] for v in range(depth)}


@pytest.mark.parametrize("depth", [0, -1])
def test_chains_have_at_least_one_weight(depth):
    with pytest.raises(ValueError, match=f"integer from 1, the weight edges, found {depth}"):
        chain_string(depth)


def test_pooling_has_no_dag_string():
    with pytest.raises(ValueError, match="edge 0->3 is AVG_POOL"):
        dag_string(cell_graph("1_11_411"))


# Cells.


@functools.cache
def cells():
    """{code: the benchmark's string} of all 15,625 cells, and which of them have a path."""
    codes = ["_".join(grouped(digits)) for digits in itertools.product("01234", repeat=6)]
    names = {
        code: CELL_FORM.format(*(CELL_OPERATIONS[digit][0] for digit in code.replace("_", "")))
        for code in codes
    }
    return names, {code for code in codes if has_path(code.split("_"))}


def test_there_are_341_cells_without_a_path():
    names, joined = cells()
    assert (len(names), len(names) - len(joined)) == (15_625, 341)
    assert names["3_34_131"] == THEORY_CELL


def test_cells_of_all_kinds_are_read_and_printed_in_both_notations_or_have_no_path():
    names, joined = cells()
    operations = {digit: operation for digit, (_, operation) in CELL_OPERATIONS.items()}
    for code, text in itertools.islice(names.items(), 0, None, 7):
        if code not in joined:
            for notation in (code, text):
                with pytest.raises(ValueError, match="no path joins") as caught:
                    cell_graph(notation)
                assert repr(notation) in str(caught.value)
            continue
        graph = cell_graph(code)
        assert edges_of(graph) == edges_of_groups(code.split("_"), operations), code
        assert cell_code(graph) == code
        assert cell_string(graph) == text
        assert edges_of(cell_graph(text)) == edges_of(graph)
        assert graph.globals["space"].tolist() == [Space.CELL]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cell code ''; accepted are groups of 1, 2 and 3 digits: '3_34_131'"),
        ("3_34", "cell code '3_34'"),
        ("3_34_13", "cell code '3_34_13'"),
        ("3_34_131_0000", "cell code"),
        ("3_35_131", "operation '5'; accepted are 0 .none., 1 .skip_connect., "),
        ("3_3²_131", "operation '²'"),
        ("|nor_conv_3x3~0|", "has 1 vertex groups; accepted are 3"),
        (THEORY_CELL[:-1], "group 3 of cell"),
        (THEORY_CELL + "|", "group 3 of cell"),
        (THEORY_CELL.replace("|+|", "|+", 1), "group 2 of cell"),
        (THEORY_CELL.replace("avg", "max"), "entry 'max_pool_3x3~1' of cell .* accepted is one of"),
        (THEORY_CELL.replace("~2", "~1"), "entry 'skip_connect~1' .* followed by ~2"),
        (THEORY_CELL.replace("~2", "~²"), "entry 'skip_connect~²'"),
        (THEORY_CELL.replace("~2", ""), "entry 'skip_connect'"),
    ],
)
def test_malformed_cells_raise_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        cell_graph(text)


@pytest.mark.parametrize("write", [cell_code, cell_string])
def test_graphs_that_are_not_cells_are_not_printed_as_cells(write):
    with pytest.raises(ValueError, match="a cell has 4 vertices, found 3"):
        write(dag_graph("2_02", kernel_size=3))
    with pytest.raises(ValueError, match="edge 0->1 is LINEAR with kernel size 1"):
        write(dag_graph("2_02_002"))
    with pytest.raises(ValueError, match="edge 0->1 is CONV with kernel size 5"):
        write(dag_graph("2_02_002", kernel_size=5))


@pytest.mark.parametrize(
    ("file_name", "key", "read"),
    [("dag_n5_open.npz", "dag", dag_graph), ("nb201_open.npz", "code", cell_graph)],
)
def test_what_the_published_code_finds_without_a_path_raises(golden_dir, file_name, key, read):
    with np.load(golden_dir / file_name) as golden:
        texts = golden[key][golden["n_paths"] == 0].astype(str).tolist()
    assert texts
    for text in texts:
        with pytest.raises(ValueError, match="no path joins"):
            read(text)


# Any text and any edge list is accepted or a ValueError.


def valid_strings(num_strings=60):
    """DAG strings of 2 to 7 vertices, and cells in both notations."""
    generator = np.random.default_rng(0)
    strings = []
    for size in generator.choice([1, 3, 6, 10, 15, 21], 3 * num_strings):
        strings.append("_".join(grouped(generator.choice(list("012"), size))))
    for code in generator.choice(sorted(cells()[0]), num_strings).tolist():
        strings += [code, cells()[0][code]]
    return strings


@strategies.composite
def mutated(draw, strings):
    """One of the strings after an insertion, a deletion or a replacement, which may be empty."""
    text = draw(strategies.sampled_from(strings))
    place = draw(strategies.integers(0, len(text)))
    inserted = draw(strategies.sampled_from(["", *NASTY]))
    return text[:place] + inserted + text[place + draw(strategies.sampled_from([1, 1, 0, 2])) :]


def is_dag_string(text):
    groups = text.split("_")
    sizes = [len(group) for group in groups] == list(range(1, len(groups) + 1))
    return sizes and re.fullmatch("[012_]+", text) is not None and is_reachable(groups)


@pytest.mark.parametrize("part", range(2))
def test_any_text_is_read_and_printed_or_a_value_error(part):
    names, joined = cells()
    accepted_cells = joined | {names[code] for code in joined}

    @in_parts(part, strategies.text(NASTY, max_size=12) | mutated(valid_strings()))
    def check(text):
        try:
            graph = dag_graph(text)
        except ValueError:
            assert not is_dag_string(text)
        else:
            assert is_dag_string(text)
            assert dag_string(graph) == text
        try:
            graph = cell_graph(text)
        except ValueError:
            assert text not in accepted_cells
        else:
            assert text in accepted_cells
            assert text in (cell_code(graph), cell_string(graph))


def any_edge_list(packed):
    """(V, four columns) from bytes, two an edge: plausible rows, with odd entries now and then."""
    num_vertices, oddity, joined = (2, 3, 4, 5, 5, 6, 1, 0, -1)[packed[0] % 9], packed[1], packed[2]
    rows = [
        (*SOME_PAIRS[first % len(SOME_PAIRS)], 1 + second % 4, 1 + second // 4 % 3)
        for first, second in zip(packed[3::2], packed[4::2], strict=False)
    ]
    if num_vertices > 1 and joined % 2:
        rows.append((0, num_vertices - 1, Operator.SKIP.value, 1))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    if oddity % 3 == 0:
        column = columns[joined // 2 % 4]
        place = joined // 8 % (len(column) + 1)
        column[place : place + 1] = [ODD_ENTRIES[oddity // 3 % len(ODD_ENTRIES)]]
    return num_vertices, columns


def is_edge_list(num_vertices, columns):
    if len(set(map(len, columns))) != 1 or any(
        type(item) is not int for column in columns for item in column
    ):
        return False
    rows = list(zip(*columns, strict=True))
    weightless = [row for row in rows if row[2] not in (2, 3)]
    kinds = {(row[1], row[2] if row[2] in (5, 6) else 0) for row in rows}
    reached = {0}
    for sender, receiver in sorted((row[:2] for row in rows), key=lambda pair: pair[1]):
        reached |= {receiver} if sender in reached else set()
    return (
        num_vertices >= 2
        and all(0 <= u < v < num_vertices for u, v, *_ in rows)
        and len(set(weightless)) == len(weightless)
        and len({vertex for vertex, _ in kinds}) == len(kinds)
        and all(1 <= operator <= 6 and 1 <= kernel < 2**31 for *_, operator, kernel in rows)
        and num_vertices - 1 in reached
    )


@pytest.mark.parametrize("part", range(2))
def test_any_edge_list_is_a_graph_or_a_value_error(part):
    @in_parts(part, strategies.binary(min_size=3, max_size=17).map(any_edge_list))
    def check(edge_list):
        num_vertices, columns = edge_list
        try:
            graph = build_graph(num_vertices, *columns)
        except ValueError:
            assert not is_edge_list(num_vertices, columns)
        else:
            assert is_edge_list(num_vertices, columns)
            rows = zip(*columns, strict=True)
            columns_of = (graph.senders, graph.receivers, *graph.edges.values())
            assert sorted(zip(*columns_of, strict=True)) == sorted(rows)


# Random graphs.


def test_random_strings_depend_on_the_seed_alone():
    strings = [random_dag_string(seed, 9) for seed in range(50)]
    assert strings == [random_dag_string(seed, 9) for seed in range(50)]
    assert len(set(strings)) == 50


@pytest.mark.parametrize("num_vertices", range(2, 9))
@pytest.mark.parametrize("probabilities", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.45, 0.05)])
def test_random_strings_always_have_a_path_with_a_weight(num_vertices, probabilities):
    for seed in range(20):
        text = random_dag_string(seed, num_vertices, probabilities=probabilities)
        groups = text.split("_")
        assert [len(group) for group in groups] == list(range(1, num_vertices))
        assert any("2" in path for path in listed_paths(groups))


@pytest.mark.parametrize(
    "probabilities", [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.1, 0.3), (0.0, 0.5, 0.5), (0, 0, 1)]
)
def test_random_strings_have_their_distribution(probabilities):
    chances = dict(zip("012", probabilities, strict=True))
    weights = {}
    for characters in itertools.product("012", repeat=3):
        groups = grouped(characters)
        chance = np.prod([chances[character] for character in characters])
        if chance and any("2" in path for path in listed_paths(groups)):
            weights["_".join(groups)] = chance
    if all(chances.values()):
        assert len(weights) == 15  # 9 with a weight on 0->2, and 6 with one on 0->1->2 alone
    num_draws = 450
    counts = collections.Counter(
        random_dag_string(seed, 3, probabilities=probabilities) for seed in range(num_draws)
    )
    assert set(counts) <= set(weights)
    expected = np.array(list(weights.values())) / sum(weights.values()) * num_draws
    observed = [counts[text] for text in weights]
    if len(observed) > 1:
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "probabilities",
    [
        (0.5, 0.5),
        (0.25, 0.25, 0.25, 0.25),
        (0.3, 0.3, 0.3),
        (1.2, -0.2, 0.0),
        (float("nan"), 0.5, 0.5),
        (float("inf"), 0.5, 0.5),
        ((1 / 3, 1 / 3, 1 / 3),),
        (),
    ],
)
def test_bad_probabilities_raise(probabilities):
    with pytest.raises(ValueError, match="three non-negative numbers that sum to 1"):
        random_dag_string(0, 4, probabilities=probabilities)


def test_probabilities_may_be_typed_with_a_few_digits():
    assert random_dag_string(3, 6, probabilities=(0.333333, 0.333333, 0.333333))


@pytest.mark.parametrize("probabilities", [(1, 0, 0), (0.5, 0.5, 0)])
def test_probabilities_that_allow_no_weighted_path_are_given_up(probabilities):
    with pytest.raises(ValueError, match="no graph with a weighted path in 20 draws of 4 vertices"):
        random_dag_string(0, 4, probabilities=probabilities, max_tries=20)


@pytest.mark.parametrize("num_vertices", [1, 0, -2])
def test_random_strings_need_two_vertices(num_vertices):
    with pytest.raises(ValueError, match=f"num_vertices must be at least 2, found {num_vertices}"):
        random_dag_string(0, num_vertices)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    sizes=strategies.integers(2, 40).flatmap(
        lambda vertices: strategies.tuples(
            strategies.just(vertices),
            strategies.integers(vertices - 1, vertices * (vertices - 1) // 2),
        )
    ),
    seed=strategies.integers(0, 2**32),
    skip_fraction=strategies.sampled_from([0, 0.5, 1]),
)
def test_sparse_graphs_have_every_vertex_live(sizes, seed, skip_fraction):
    num_vertices, num_edges = sizes
    graph = random_sparse_dag(seed, num_vertices, num_edges, skip_fraction=skip_fraction)
    edges = edges_of(graph)
    assert (graph.n_node.tolist(), len(edges)) == ([num_vertices], num_edges)
    assert edges.keys() >= {(v, v + 1) for v in range(num_vertices - 1)}
    assert live_vertices(graph).all()
    operators = {operator for operator, _ in edges.values()}
    allowed = {0: {Operator.LINEAR}, 0.5: {Operator.SKIP, Operator.LINEAR}, 1: {Operator.SKIP}}
    assert operators <= allowed[skip_fraction]
    again = random_sparse_dag(seed, num_vertices, num_edges, skip_fraction=skip_fraction)
    chex.assert_trees_all_equal(graph, again)


def test_sparse_graphs_differ_from_seed_to_seed():
    graphs = {tuple(random_sparse_dag(seed, 30, 60).senders.tolist()) for seed in range(30)}
    assert len(graphs) == 30


@pytest.mark.parametrize(("num_vertices", "num_edges"), [(500, 1500), (500, 124_750)])
def test_large_graphs_sparse_and_complete(num_vertices, num_edges):
    graph = random_sparse_dag(0, num_vertices, num_edges, skip_fraction=0.3)
    assert graph.n_edge.tolist() == [num_edges]
    skips = np.mean(graph.edges["operator"] == Operator.SKIP)
    assert abs(skips - 0.3) < 5 * np.sqrt(0.3 * 0.7 / num_edges)


@pytest.mark.parametrize("num_vertices", [5, 12])
def test_the_extra_edge_of_a_sparse_graph_is_uniform(num_vertices):
    pairs = [pair for pair in itertools.combinations(range(num_vertices), 2) if np.diff(pair) > 1]
    counts = collections.Counter(
        pair
        for seed in range(20 * len(pairs))
        for pair in edges_of(random_sparse_dag(seed, num_vertices, num_vertices))
        if np.diff(pair) > 1
    )
    assert set(counts) <= set(pairs)
    assert scipy.stats.chisquare([counts[pair] for pair in pairs]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("num_vertices", "num_edges"), [(1, 0), (0, 0), (-3, 2), (5, 3), (5, 11), (2, 0), (2, 2)]
)
def test_sparse_graphs_out_of_range_raise(num_vertices, num_edges):
    with pytest.raises(
        ValueError, match=f"{num_vertices} vertices and {num_edges} edges; accepted"
    ):
        random_sparse_dag(0, num_vertices, num_edges)


@pytest.mark.parametrize("skip_fraction", [-0.1, 1.1, float("nan")])
def test_bad_skip_fractions_raise(skip_fraction):
    with pytest.raises(ValueError, match=r"skip_fraction must lie in \[0, 1\], found"):
        random_sparse_dag(0, 5, 6, skip_fraction=skip_fraction)
