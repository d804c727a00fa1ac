"""Rules: against the authors' numbers, enumeration of paths, and moments worked out by other means.

Moments of networks of infinite width are worked out here once more, atom by atom: a feature is a
sum of independent terms, the stem's output and one per weight edge, each taken as often as there
are paths of skip edges from where it arises to the vertex.
"""

import functools
import importlib
import itertools
import json
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies

from archscale_jax._architecture import Architecture, Arrangement, Parameter, Role
from archscale_jax._graph import Operator, build_graph
from archscale_jax._initialize import initialize
from archscale_jax._spaces import cell_graph, chain_string, dag_graph, random_dag_string
from archscale_jax.rules import (
    INITIALIZATION_RULES,
    LEARNING_RATE_RULES,
    WIDTH_RULES,
    WeightVariances,
    kernel_size_multiplier,
    learning_rate_scale,
    register_initialization_rule,
    register_learning_rate_rule,
    register_width_rule,
    shortest_path_length,
    weight_standard_deviations,
    width_multipliers,
)
from archscale_jax.rules._registry import DEPRECATED, _warn_once
from archscale_jax.rules._residual import residual_branches
from archscale_jax.tuning import MEASURED_RULES
from experiments.lab.models.dag import DagCNN, DagMLP

PRE_ACTIVATION, ACTIVATION = Arrangement.PRE_ACTIVATION, Arrangement.ACTIVATION
RELU_MEAN = 1 / math.sqrt(2 * math.pi)


@strategies.composite
def dag_strings(draw, max_vertices=6, operators="012"):
    """DAG strings with a path from input to output that crosses a weight edge."""
    num_vertices = draw(strategies.integers(2, max_vertices))
    between = draw(strategies.sets(strategies.integers(1, num_vertices - 1)))
    path = sorted({0, num_vertices - 1} | between)
    groups = [
        [draw(strategies.sampled_from(operators)) for _ in range(vertex)]
        for vertex in range(1, num_vertices)
    ]
    for sender, receiver in itertools.pairwise(path):
        if groups[receiver - 1][sender] == "0":
            groups[receiver - 1][sender] = "2"
    groups[path[1] - 1][0] = "2"
    return "_".join(map("".join, groups))


def edge_lists(graph):
    """Edges as (sender, receiver, carries a weight)."""
    weight = np.isin(graph.edges["operator"], (Operator.LINEAR, Operator.CONV))
    return list(zip(graph.senders.tolist(), graph.receivers.tolist(), weight.tolist(), strict=True))


def end_to_end_paths(graph):
    """All paths from the input to the output, each a list of edges."""
    last = len(graph.nodes) - 1

    def walk(path, vertex):
        if vertex == last:
            yield path
        for edge in edge_lists(graph):
            if edge[0] == vertex:
                yield from walk([*path, edge], edge[1])

    return list(walk([], 0))


def reached_from_input(graph):
    """The vertices that the input reaches, by repeating until nothing changes."""
    reached = {0}
    while True:
        more = reached | {target for source, target, _ in edge_lists(graph) if source in reached}
        if more == reached:
            return reached
        reached = more


def residual_blocks(num_blocks, kernel_size=None):
    """Blocks z + W σ(z): the branch is a skip edge, then a weight edge."""
    groups = []
    for start in range(0, 2 * num_blocks, 2):
        groups += ["0" * start + "1", "0" * start + "12"]
    return dag_graph("_".join(groups), kernel_size=kernel_size)


def merging_blocks(num_blocks):
    """Blocks of the same paths; the branch is a weight edge, then a skip edge."""
    groups = []
    for start in range(0, 2 * num_blocks, 2):
        groups += ["0" * start + "2", "0" * start + "11"]
    return dag_graph("_".join(groups))


def network(graph, *, width=8, in_features=12, out_features=3, **options):
    """A network without arrays: shapes only."""
    make = DagCNN if graph.globals["kernel_size"][0] else DagMLP
    return nnx.eval_shape(
        lambda: make(graph, in_features, width, out_features, rngs=nnx.Rngs(0), **options)
    )


@pytest.fixture
def registries(monkeypatch):
    """Lets a test register rules, which are gone afterwards."""
    for registry in (INITIALIZATION_RULES, LEARNING_RATE_RULES, WIDTH_RULES):
        monkeypatch.setattr(registry, "_rules", dict(vars(registry)["_rules"]))


# Learning rates.


@pytest.mark.parametrize(("column", "kernel_size"), [("lr_mlp", None), ("lr_cnn_k5", 5)])
def test_author_code_gives_the_published_rates_of_dags(golden_dir, column, kernel_size):
    with np.load(golden_dir / "dag_n5_open.npz") as golden:
        texts, expected, count = golden["dag"].astype(str), golden[column], golden["n_paths"]
    joined = np.flatnonzero(count > 0)[::17]  # all over the space
    found = [
        learning_rate_scale(dag_graph(text, kernel_size=kernel_size), rule="chen2024_code")
        for text in texts[joined].tolist()
    ]
    np.testing.assert_allclose(found, expected[joined], rtol=1e-12, atol=0)


def test_author_code_gives_the_published_rates_of_cells(golden_dir):
    with np.load(golden_dir / "nb201_open.npz") as golden:
        codes, expected, count = golden["code"].astype(str), golden["lr_tiny"], golden["n_paths"]
    joined = np.flatnonzero(count > 0)
    assert not np.isnan(expected[joined]).any()
    joined = joined[::7]  # all over the space
    found = [
        learning_rate_scale(cell_graph(code), rule="chen2024_code")
        for code in codes[joined].tolist()
    ]
    np.testing.assert_allclose(found, expected[joined], rtol=1e-12, atol=0)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    dag_strings(),
    dag_strings(max_vertices=4),
    strategies.sampled_from([None, 1, 3, 5]),
    strategies.sampled_from([None, 1, 3, 7]),
    strategies.integers(0, 3),
)
def test_path_sum_is_the_sum_over_all_paths(text, base_text, kernel, base_kernel, offset):
    graph = dag_graph(text, kernel_size=kernel)
    base = dag_graph(base_text, kernel_size=base_kernel)

    def sum_of_cubes(one):
        return sum(
            (sum(weight for _, _, weight in path) + offset) ** 3 for path in end_to_end_paths(one)
        )

    expected = (
        math.sqrt(sum_of_cubes(base) / sum_of_cubes(graph)) * (base_kernel or 1) / (kernel or 1)
    )
    found = learning_rate_scale(graph, base, "path_sum", rule_options={"depth_offset": offset})
    assert found == pytest.approx(expected, rel=1e-12)
    back = learning_rate_scale(base, graph, "path_sum", rule_options={"depth_offset": offset})
    assert found * back == pytest.approx(1)
    if offset == 1:  # the activation of the stem
        assert found == learning_rate_scale(graph, base, "path_sum_activations")


def test_path_sum_takes_the_kernel_of_the_network_from_each_graph():
    assert learning_rate_scale(
        dag_graph("2_02", kernel_size=5), dag_graph("2_02", kernel_size=3)
    ) == (pytest.approx(3 / 5))
    # Networks of cells share a stem of kernel size 3, whatever the cell.
    assert learning_rate_scale(cell_graph("3_00_010"), cell_graph("2_00_010"), "path_sum") == 1


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(dag_strings(), strategies.sampled_from([None, 3]))
def test_the_base_keeps_its_own_rate(text, kernel_size):
    graph = dag_graph(text, kernel_size=kernel_size)
    for rule in ("path_sum", "effective_depth", "depth", "none"):
        assert learning_rate_scale(graph, graph, rule) == 1


@pytest.mark.parametrize("num_layers", [1, 2, 7, 30])
def test_rules_of_depth_agree_on_chains(num_layers):
    chain, base = dag_graph(chain_string(num_layers)), dag_graph("2")
    for rule in ("path_sum", "depth"):
        assert learning_rate_scale(chain, base, rule) == pytest.approx(num_layers**-1.5, rel=1e-12)
    # All layers of a chain count, stem and readout among them.
    found = learning_rate_scale(chain, base, "effective_depth")
    assert found == pytest.approx(((num_layers + 2) / 3) ** -1.5, rel=1e-12)


@pytest.mark.parametrize("make", [residual_blocks, merging_blocks])
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 18, 200])
def test_residual_blocks_have_their_closed_forms(make, num_blocks):
    graph, base = make(num_blocks), dag_graph("2")
    cubes = num_blocks**2 * (num_blocks + 3) * 2**num_blocks // 8
    assert learning_rate_scale(graph, base, "path_sum") == pytest.approx(cubes**-0.5, rel=1e-12)
    assert learning_rate_scale(graph, base, "depth") == pytest.approx(num_blocks**-1.5)


def path_length(graph, path):
    """Layers and residual additions on a path."""
    reached = reached_from_input(graph)
    summed = [target for source, target, _ in edge_lists(graph) if source in reached]
    return sum(weight or summed.count(target) > 1 for _, target, weight in path)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(dag_strings())
def test_the_shortest_path_is_the_shortest_of_all(text):
    graph = dag_graph(text)
    assert shortest_path_length(graph) == min(
        path_length(graph, path) for path in end_to_end_paths(graph)
    )


def test_effective_depth_counts_layers_and_additions():
    # Two sublayers with a residual connection each, as in a transformer block.
    assert shortest_path_length(residual_blocks(2)) == 2
    assert shortest_path_length(dag_graph("1_12")) == 1
    assert shortest_path_length(dag_graph("1_02")) == 1
    assert shortest_path_length(dag_graph("1")) == 0
    assert shortest_path_length(dag_graph("2_02_102")) == 1
    assert shortest_path_length(dag_graph("0_12_002")) == 1  # nothing arrives from vertex 1
    # 6 and 2 additions between stem and readout.
    scale = learning_rate_scale(residual_blocks(6), residual_blocks(2), "effective_depth")
    assert scale == pytest.approx((8 / 4) ** -1.5)
    assert learning_rate_scale(dag_graph("1"), dag_graph("2"), "effective_depth") == (
        pytest.approx((2 / 3) ** -1.5)
    )


def test_the_rule_none_needs_no_base():
    assert learning_rate_scale(dag_graph("2_22_222"), rule="none") == 1


def test_kernel_size_multiplier_divides_by_the_size():
    assert kernel_size_multiplier(5) == pytest.approx(1 / 5)
    assert kernel_size_multiplier(5, 3) == pytest.approx(3 / 5)
    assert kernel_size_multiplier(1) == 1
    for sizes in ((0, 1), (3, 0), (-1, 1)):
        with pytest.raises(ValueError, match="start at 1"):
            kernel_size_multiplier(*sizes)


def test_an_unknown_rule_raises_by_the_names_of_the_others():
    with pytest.raises(
        ValueError, match=r"'cubes'; accepted are .*path_sum, .*chen2024_code, depth"
    ):
        learning_rate_scale(dag_graph("2"), dag_graph("2"), "cubes")


@pytest.mark.parametrize("rule", ["path_sum", "depth", "effective_depth"])
def test_a_rule_that_compares_needs_a_base(rule):
    with pytest.raises(ValueError, match=f"{rule}.*base"):
        learning_rate_scale(dag_graph("2"), rule=rule)


@pytest.mark.parametrize("rule", ["path_sum", "depth"])
def test_graphs_without_weights_raise(rule):
    for pair in (("1", "2"), ("2", "1"), ("1_01", "1")):
        with pytest.raises(ValueError, match=rule):
            learning_rate_scale(dag_graph(pair[0]), dag_graph(pair[1]), rule)


def test_the_stem_gives_a_graph_without_weights_a_depth():
    found = learning_rate_scale(
        dag_graph("1_11"), dag_graph("2"), "path_sum", rule_options={"depth_offset": 1}
    )
    assert found == pytest.approx(math.sqrt(8 / 2))
    assert learning_rate_scale(dag_graph("1_11"), rule="chen2024_code") == 1


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_no_rule_may_give_a_multiplier_that_is_not_a_rate(multiplier):
    with pytest.raises(ValueError, match="finite and positive"):
        learning_rate_scale(dag_graph("2"), rule=lambda graph, base: multiplier)


@pytest.mark.parametrize("rule", ["path_sum", "chen2024_code"])
def test_a_multiplier_below_every_float_raises(rule):
    with pytest.raises(ValueError, match="many paths"):
        learning_rate_scale(residual_blocks(2200), dag_graph("2"), rule)


def test_a_function_is_its_own_rule():
    def inverse_size(graph, base, *, power=1):
        return (len(base.nodes) / len(graph.nodes)) ** power

    graph, base = dag_graph("2_22_222"), dag_graph("2")
    assert learning_rate_scale(graph, base, inverse_size) == 0.5
    assert learning_rate_scale(graph, base, inverse_size, rule_options={"power": 2}) == 0.25


@pytest.mark.usefixtures("registries")
def test_rules_can_be_added_by_name_once():
    @register_learning_rate_rule("half")
    def half(graph, base):
        return 0.5

    @register_initialization_rule("unit")
    def unit(architecture):
        return WeightVariances(np.ones(len(architecture.graph.senders)), readout_gain=1.0)

    @register_width_rule("unit")
    def no_width(parameter, fan_in_ratio, fan_out_ratio):
        return 1.0

    architecture = network(dag_graph("2_02")).architecture()
    assert learning_rate_scale(dag_graph("2"), rule="half") == half(None, None)
    assert weight_standard_deviations(architecture, "unit") == pytest.approx(
        weight_standard_deviations(architecture, unit)
    )
    assert set(width_multipliers(architecture, architecture, "unit").values()) == {1.0}
    assert no_width(None, 2.0, 2.0) == 1.0
    for name, register_again in {
        "half": lambda: register_learning_rate_rule("half")(half),
        "path_sum": lambda: register_learning_rate_rule("path_sum")(half),
        "target_in_degree": lambda: register_initialization_rule("target_in_degree")(unit),
        "adam": lambda: register_width_rule("adam")(no_width),
    }.items():
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register_again()


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [(kind, *names) for kind, table in DEPRECATED.items() for names in table.items()],
)
def test_names_of_version_0_1_warn_once(kind, old, new):
    registries = (INITIALIZATION_RULES, LEARNING_RATE_RULES, MEASURED_RULES)
    (registry,) = (one for one in registries if one._kind == kind)
    _warn_once.cache_clear()
    with pytest.warns(DeprecationWarning, match=f"the {kind} '{old}' is now '{new}'"):
        assert registry.resolve(old) is registry.resolve(new)
    assert registry.resolve(old).name == new  # without a warning, which would be an error here
    assert old in registry and old not in list(registry)
    with pytest.raises(ValueError, match=f"'{old}' is registered already"):
        registry.register(old)(len)


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("archscale_jax", "learning_rate_factors", "learning_rate_multipliers"),
        ("archscale_jax.rules", "width_factors", "width_multipliers"),
        ("archscale_jax.rules", "kernel_size_factor", "kernel_size_multiplier"),
    ],
)
def test_functions_of_version_0_1_warn(package, old, new):
    module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=f"{package}.{old} moved to {package}.{new}"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="has no attribute 'factors'"):
        module.factors  # noqa: B018


def test_what_a_rule_says_of_itself():
    moment = INITIALIZATION_RULES.resolve(
        functools.partial(INITIALIZATION_RULES.resolve("second_moment"), branch_share=1)
    )
    assert (moment.name, moment.citation) == ("second_moment", "(theory §3)")
    assert moment.option("branch_share", {}) == 1
    assert moment.option("depth_exponent", {"depth_exponent": 2}) == 2
    assert moment.option("power", {}) is None
    assert LEARNING_RATE_RULES.resolve(lambda graph, base: 1).name == "rule <lambda>"
    registries: tuple[Any, ...] = (
        INITIALIZATION_RULES, LEARNING_RATE_RULES, WIDTH_RULES, MEASURED_RULES,
    )  # fmt: skip
    for registry in registries:
        for name in registry:
            rule = registry.resolve(name)
            assert rule.name == name and rule.summary
            assert registry.resolve(rule) is registry.resolve(rule.function) is rule


def test_options_that_a_rule_does_not_have_are_named():
    graph = dag_graph("2")
    for call in (
        lambda: learning_rate_scale(graph, graph, "path_sum", rule_options={"depth_ofset": 1}),
        lambda: LEARNING_RATE_RULES.resolve("path_sum")(graph, graph, depth_ofset=1),
    ):
        with pytest.raises(TypeError, match="path_sum: 'depth_ofset'; .* mean 'depth_offset'"):
            call()
    with pytest.raises(TypeError, match="option of the rule depth: 'power'; there are none"):
        learning_rate_scale(graph, graph, "depth", rule_options={"power": 2})
    options = {"power": 2}
    for rule in (lambda graph, base, **any: 2.0, lambda graph, base, power: power):
        assert learning_rate_scale(graph, graph, rule, rule_options=options) == 2


def test_the_rules_that_others_name_are_there():
    assert {"path_sum", "chen2024_code", "depth", "effective_depth", "none"} <= {
        *LEARNING_RATE_RULES
    }
    assert {*INITIALIZATION_RULES} >= {
        "target_in_degree",
        "source_in_degree",
        "he_normal",
        "chen2024_code",
        "second_moment",
    }
    assert {"sgd", "adam"} <= {*WIDTH_RULES}


# Initialization: the authors' standard deviations.


@pytest.fixture(scope="module")
def golden_deviations(golden_dir):
    return json.loads((golden_dir / "weight_std_open.json").read_text())["records"]


def flax_shape(shape):
    """The shape of a PyTorch weight (out, in, kernel…) in Flax's order (kernel…, in, out)."""
    out_features, in_features, *kernel = shape
    return (*kernel, in_features, out_features)


def network_of_record(record):
    if record["model"] == "mlp":
        graph, in_features = dag_graph(record["dag"]), record["in_dim"]
    else:
        graph = dag_graph(record["dag"], kernel_size=record["kernel"])
        in_features = record["in_channels"]
    return network(
        graph,
        width=record["width"],
        in_features=in_features,
        out_features=record["classes"],
        arrangement="activation",
    )


def our_name(layer):
    """`edge 1->3` is `layers/1_3/kernel`."""
    if layer.startswith("edge "):
        layer = "layers/" + layer.removeprefix("edge ").replace("->", "_")
    return layer + "/kernel"


def test_author_code_gives_the_published_deviations_of_dags(golden_deviations):
    records = [record for record in golden_deviations if record["model"] in ("mlp", "cnn")]
    assert {record["model"] for record in records[::3]} == {"mlp", "cnn"}
    for record in records[::3]:
        architecture = network_of_record(record).architecture()
        found = weight_standard_deviations(architecture, "chen2024_code")
        expected = {our_name(layer["layer"]): layer["std"] for layer in record["layers"]}
        assert found == pytest.approx(expected, rel=1e-6)  # the same layers, none left over
        shapes = {one.name: one.shape for one in architecture.parameters if one.name in found}
        assert shapes == {
            our_name(layer["layer"]): flax_shape(layer["shape"]) for layer in record["layers"]
        }


@pytest.mark.quick_compilation
def test_drawn_weights_have_the_published_deviations(golden_deviations):
    record = next(record for record in golden_deviations if record["model"] == "cnn")
    one = network_of_record(record)
    params = nnx.state(one, nnx.Param)
    drawn = initialize(jax.random.key(0), params, one.architecture(), "chen2024_code")
    leaves = nnx.to_pure_dict(drawn)
    for layer in record["layers"]:
        leaf = leaves
        for part in our_name(layer["layer"]).split("/"):
            leaf = leaf[part]
        leaf, std = np.asarray(leaf, float), layer["std"]
        assert leaf.std() == pytest.approx(std, rel=5 / math.sqrt(2 * leaf.size))
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size)
        kurtosis = np.mean(leaf**4) / np.mean(leaf**2) ** 2
        assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / leaf.size))
    for bias in (leaves["stem"]["bias"], leaves["readout"]["bias"]):
        assert not np.asarray(bias).any()


def parameter_of(layer, role, edge=None):
    """A parameter like a layer of the authors' cell network, which we do not build."""
    shape = flax_shape(layer["shape"])
    *kernel, fan_in, fan_out = shape
    positions = math.prod(kernel)
    return Parameter(
        layer["layer"],
        role,
        role,
        shape,
        fan_in * positions,
        fan_out * positions,
        max(kernel, default=1),
        positions,
        edge,
    )


def test_author_code_gives_the_published_deviations_of_cells(golden_deviations):
    records = [record for record in golden_deviations if record["model"] == "tinynetwork"]
    assert records
    for record in records:
        graph = cell_graph(record["code"])
        edges = {
            (source, target): index for index, (source, target, _) in enumerate(edge_lists(graph))
        }
        weighted = sum(weight for _, _, weight in edge_lists(graph))
        parameters, reductions, expected, cells = [], {}, {}, set()
        for layer in record["layers"]:
            cell, kind, *rest = [*layer["layer"].split(" "), ""]
            if kind == "res":
                reductions.setdefault(cell, []).append(layer)
                continue
            expected[layer["layer"]] = layer["std"]
            if kind == "edge":
                cells.add(cell)
                source, target = map(int, rest[0].split("->"))
                parameters.append(parameter_of(layer, Role.HIDDEN, edges[source, target]))
            else:
                role = {"stem": Role.INPUT, "classifier": Role.READOUT}[cell]
                parameters.append(parameter_of(layer, role))
        # Every layer of ours has a counterpart: the weights of every cell, stem and classifier.
        assert len(parameters) == weighted * len(cells) + 2
        found = weight_standard_deviations(
            Architecture(graph, tuple(parameters), ACTIVATION), "chen2024_code"
        )
        assert found == pytest.approx(expected, rel=1e-6)
        # Degrees of the block between two cells, which are not in-degrees of any graph.
        assert len(reductions) == 2
        for block in reductions.values():
            architecture = Architecture(
                dag_graph("2_22"),
                tuple(parameter_of(layer, Role.HIDDEN, edge) for edge, layer in enumerate(block)),
                ACTIVATION,
            )
            degrees = np.array([2, 1, 2])
            assert weight_standard_deviations(
                architecture,
                lambda architecture, degrees=degrees: WeightVariances(2 / degrees),
            ) == pytest.approx({layer["layer"]: layer["std"] for layer in block}, rel=1e-6)


# Initialization: in-degrees by hand.


def behind_a_stem(graph, arrangement):
    """An architecture that knows its graph and that it has a stem, nothing else."""
    stem = Parameter("stem", Role.INPUT, Role.INPUT, (8, 8), 8, 8)
    return Architecture(graph, (stem,), arrangement)


def numerators(graph, rule, arrangement=PRE_ACTIVATION):
    """C of every weight edge by its ends."""
    variances = INITIALIZATION_RULES.resolve(rule)(behind_a_stem(graph, arrangement))
    return {
        (source, target): float(numerator)
        for (source, target, weight), numerator in zip(
            edge_lists(graph), variances.edges, strict=True
        )
        if weight
    }


def test_rules_take_the_in_degree_of_their_vertex():
    # Vertex 1 cannot be reached; 2 sums 1 live contribution, 3 sums 2, 4 sums 3 (one a skip).
    graph = dag_graph("0_22_202_1222")
    assert numerators(graph, "target_in_degree") == pytest.approx(
        {(0, 2): 2, (1, 2): 2, (0, 3): 1, (2, 3): 1, (1, 4): 2 / 3, (2, 4): 2 / 3, (3, 4): 2 / 3}
    )
    assert numerators(graph, "source_in_degree") == pytest.approx(
        {(0, 2): 2, (1, 2): 2, (0, 3): 2, (2, 3): 2, (1, 4): 2, (2, 4): 2, (3, 4): 1}
    )
    assert numerators(graph, "chen2024_code") == pytest.approx(
        {(0, 2): 2, (1, 2): 2, (0, 3): 2, (2, 3): 1, (1, 4): 2, (2, 4): 1, (3, 4): 1}
    )
    assert set(numerators(graph, "he_normal").values()) == {2.0}


def test_stem_and_readout_stand_outside_the_graph():
    architecture = network(dag_graph("2_22", kernel_size=3), in_features=4).architecture()
    for rule in ("target_in_degree", "source_in_degree", "he_normal", "second_moment"):
        deviations = weight_standard_deviations(architecture, rule)
        assert deviations["stem/kernel"] == pytest.approx(math.sqrt(2 / (4 * 9)))
        assert deviations["layers/0_1/kernel"] == pytest.approx(math.sqrt(2 / (8 * 9)))
        assert deviations["readout/kernel"] == pytest.approx(math.sqrt(2) / 8)
        assert set(deviations) == {
            f"{name}/kernel"
            for name in ("stem", "layers/0_1", "layers/0_2", "layers/1_2", "readout")
        }


def test_what_a_layer_reads_decides_its_deviation():
    hidden = {"role": Role.HIDDEN, "layer": Role.HIDDEN, "shape": (8, 16)}
    parameters = (
        Parameter("of_activations", fan_in=8, fan_out=16, edge=0, **hidden),
        Parameter("of_features", fan_in=8, fan_out=16, edge=1, activated=False, **hidden),
        Parameter("table", Role.EMBEDDING, Role.INPUT, (50, 16), fan_in=1, fan_out=16),
    )
    deviations = weight_standard_deviations(
        Architecture(dag_graph("2_02"), parameters), "he_normal"
    )
    # ReLU takes half of a second moment; a row of a table is one feature, read as it is.
    expected = {"of_activations": math.sqrt(2 / 8), "of_features": math.sqrt(1 / 8), "table": 1.0}
    assert deviations == pytest.approx(expected)


def test_the_default_rule_goes_with_what_vertices_sum():
    graph = dag_graph("2_22_222")
    rules = {PRE_ACTIVATION: "target_in_degree", ACTIVATION: "source_in_degree"}
    for arrangement, rule in rules.items():
        architecture = network(graph, arrangement=arrangement).architecture()
        default = weight_standard_deviations(architecture)
        assert default == weight_standard_deviations(architecture, rule)
        (other,) = {*rules.values()} - {rule}
        assert default != weight_standard_deviations(architecture, other)


def test_variances_that_are_not_variances_raise():
    architecture = network(dag_graph("2_12")).architecture()
    with pytest.raises(
        ValueError,
        match=r"'he'; accepted are target_in_degree, .*, he_normal, chen2024_code, second_moment",
    ):
        weight_standard_deviations(architecture, "he")
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="layers/0_1/kernel"):
            weight_standard_deviations(
                architecture, lambda architecture, bad=bad: WeightVariances(np.full(3, bad))
            )


# Initialization: second moments.


def edge_variances(graph, rule, arrangement, **options):
    architecture = behind_a_stem(graph, arrangement)
    return INITIALIZATION_RULES.resolve(rule)(architecture, **options).edges


def second_moments(graph, variances, arrangement):
    """E[feature²] of every vertex at infinite width, in units of vertex 0, and what skips bring.

    Returns two lists by vertex: the second moment, and the part without the weight edges into it.
    """
    edges = edge_lists(graph)
    num_vertices = len(graph.nodes)

    @functools.cache
    def skip_paths(start, end):
        if start == end:
            return 1
        return sum(
            skip_paths(start, source)
            for source, target, weight in edges
            if target == end and source >= start and not weight
        )

    relu_of_input = math.sqrt(2) * RELU_MEAN if arrangement == ACTIVATION else 0.0
    atoms = [(0, 1.0, relu_of_input)]  # vertex where it arises, second moment, mean
    total, skipped = [1.0], [0.0]

    def second(vertex):
        terms = [(skip_paths(born, vertex), square, mean) for born, square, mean in atoms]
        return sum(
            count * other_count * (square if atom == other else mean * other_mean)
            for atom, (count, square, mean) in enumerate(terms)
            for other, (other_count, _, other_mean) in enumerate(terms)
        )

    for vertex in range(1, num_vertices):
        skipped.append(second(vertex))
        for index, (source, target, weight) in enumerate(edges):
            if target == vertex and weight:
                size = variances[index] * total[source]  # E[(W h_u)²], or twice E[(W σ(z_u))²]
                mean = RELU_MEAN * math.sqrt(size) if arrangement == ACTIVATION else 0.0
                atoms.append((vertex, size / 2, mean))
        total.append(second(vertex))
    return total, skipped


def branches_end_in_layers(graph):
    """Whether a layer feeds every vertex that a skip feeds beside a way with layers."""
    reached = reached_from_input(graph)
    weighted = {
        target for source, target, weight in edge_lists(graph) if weight and source in reached
    }
    return set(residual_branches(graph)) <= weighted


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize(
    "rule", ["target_in_degree", "source_in_degree", "he_normal", "second_moment"]
)
def test_moments_are_those_of_wide_networks(rule, arrangement):
    # Skips, dead ends (4), vertices that the input cannot reach (1), and plain weights.
    for text in ("0_20_002_0220_10212", "2_12_112_0212"):
        graph = dag_graph(text)
        shapes = network(graph, width=64, in_features=64, arrangement=arrangement, use_bias=False)
        architecture = shapes.architecture()
        graphdef, params = nnx.split(shapes)

        def measure(key, graphdef=graphdef, params=params, architecture=architecture):
            drawn = initialize(key, params, architecture, rule)
            features = nnx.merge(graphdef, drawn).features(jax.random.normal(key, (16, 64)))
            return jnp.stack([jnp.mean(jnp.square(feature)) for feature in features])

        measured = jax.vmap(measure)(jax.random.split(jax.random.key(1), 128))
        expected, _ = second_moments(graph, edge_variances(graph, rule, arrangement), arrangement)
        unit = 2 if arrangement == PRE_ACTIVATION else 1  # of vertex 0: the stem has C = 2
        found = np.mean(np.asarray(measured), axis=0) / unit
        np.testing.assert_allclose(found, expected, rtol=0.12, atol=1e-9)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    dag_strings(max_vertices=7),
    strategies.sampled_from(Arrangement),
    strategies.floats(0.01, 2),
)
def test_moment_makes_second_moments_equal_where_skips_leave_a_share(text, arrangement, share):
    graph = dag_graph(text)
    hypothesis.assume(branches_end_in_layers(graph))
    reached = reached_from_input(graph)
    edges = edge_lists(graph)
    variances = edge_variances(graph, "second_moment", arrangement, branch_share=share)
    assert np.all(np.isfinite(variances) & (variances >= 0))
    assert all(
        variance > 0
        for (source, _, weight), variance in zip(edges, variances, strict=True)
        if weight and source in reached
    )
    total, skipped = second_moments(graph, variances, arrangement)
    weighted = {target for source, target, weight in edges if weight and source in reached}
    mixed = [vertex for vertex in weighted if skipped[vertex] > 0]
    for vertex in sorted(reached - {0}):
        if vertex not in weighted:
            expected = skipped[vertex]
        elif vertex in mixed:
            expected = max(1, skipped[vertex] * (1 + share / len(mixed)))
        else:
            expected = 1
        assert total[vertex] == pytest.approx(expected, rel=1e-9)
    # The weights into one vertex share in equal parts.
    for vertex in weighted:
        parts = [
            variance * total[source]
            for (source, target, weight), variance in zip(edges, variances, strict=True)
            if target == vertex and weight and source in reached
        ]
        assert parts == pytest.approx([parts[0]] * len(parts), rel=1e-9)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    dag_strings(max_vertices=6), strategies.integers(0, 2**16), strategies.floats(0.01, 2)
)
def test_no_variances_beat_moment_by_more_than_its_share(text, seed, share):
    graph = dag_graph(text)
    hypothesis.assume(branches_end_in_layers(graph))
    live = sorted(
        {vertex for path in end_to_end_paths(graph) for edge in path for vertex in edge[:2]}
    )

    def ratio(variances):
        total, _ = second_moments(graph, variances, PRE_ACTIVATION)
        moments = [total[vertex] for vertex in live]
        return max(moments) / min(moments)

    drawn = np.exp(2 * np.random.default_rng(seed).normal(size=len(edge_lists(graph))))
    found = ratio(edge_variances(graph, "second_moment", PRE_ACTIVATION, branch_share=share))
    assert found <= math.exp(share) * ratio(drawn) * (1 + 1e-9)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(dag_strings(max_vertices=7, operators="02"))
def test_without_skips_moment_is_target(text):
    graph = dag_graph(text)
    found, expected = numerators(graph, "second_moment"), numerators(graph, "target_in_degree")
    reached = reached_from_input(graph)
    for (source, target), numerator in found.items():
        if source in reached:
            assert numerator == pytest.approx(expected[source, target], rel=1e-12)


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize("num_blocks", [1, 3, 18])
@pytest.mark.parametrize("share", [0.05, 0.25, 1.0])
def test_moment_bounds_the_growth_of_residual_blocks(arrangement, num_blocks, share):
    graph = residual_blocks(num_blocks)
    variances = edge_variances(graph, "second_moment", arrangement, branch_share=share)
    total, _ = second_moments(graph, variances, arrangement)
    assert max(total) == pytest.approx((1 + share / num_blocks) ** num_blocks, rel=1e-9)
    assert max(total) <= math.exp(share)
    assert min(total) == 1


@pytest.mark.parametrize("num_blocks", [1, 3, 18])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_a_branch_that_a_skip_carries_on_brings_its_share_too(num_blocks, share):
    graph = merging_blocks(num_blocks)
    variances = edge_variances(graph, "second_moment", PRE_ACTIVATION, branch_share=share)
    total, _ = second_moments(graph, variances, PRE_ACTIVATION)
    growth = 1 + share / num_blocks
    assert total[::2] == pytest.approx([growth**block for block in range(num_blocks + 1)])
    assert total[1::2] == pytest.approx(
        [share / num_blocks * growth**block for block in range(num_blocks)]
    )


@pytest.mark.parametrize("arrangement", Arrangement)
def test_moment_leaves_a_saturated_vertex_alone_when_told_so(arrangement):
    graph = residual_blocks(4)
    variances = edge_variances(graph, "second_moment", arrangement, branch_share=0)
    total, _ = second_moments(graph, variances, arrangement)
    assert total == pytest.approx([1.0] * len(total))


# Width.


def roles_of(multipliers, architecture):
    """Multipliers by (role, layer), which must be one per pair."""
    by_role = {}
    for parameter in architecture.parameters:
        by_role.setdefault((parameter.role, parameter.layer), set()).add(
            multipliers[parameter.name]
        )
    assert all(len(values) == 1 for values in by_role.values())
    return {pair: values.pop() for pair, values in by_role.items()}


@pytest.mark.parametrize("kernel_sizes", [(None, None), (3, 3), (5, 3)])
@pytest.mark.parametrize("normalization", [None, "layer"])
def test_width_multipliers_are_those_of_the_table(kernel_sizes, normalization):
    # Deeper than the base, and with other kernels, which must not count.
    wide = network(
        dag_graph("2_12_002", kernel_size=kernel_sizes[0]), width=128, normalization=normalization
    ).architecture()
    base = network(
        dag_graph("2", kernel_size=kernel_sizes[1]), width=32, normalization=normalization
    ).architecture()
    # (role, role of the layer): multiplier for SGD, for Adam
    table = {
        (Role.INPUT, Role.INPUT): (4, 1),
        (Role.HIDDEN, Role.HIDDEN): (1, 1 / 4),
        (Role.READOUT, Role.READOUT): (1 / 4, 1 / 4),
        (Role.BIAS, Role.INPUT): (4, 1),
        (Role.BIAS, Role.HIDDEN): (4, 1),
        (Role.BIAS, Role.READOUT): (1, 1),
    }
    if normalization:
        table[Role.SCALE, Role.HIDDEN] = (4, 1)
    for column, rule in enumerate(("sgd", "adam")):
        found = roles_of(width_multipliers(wide, base, rule), wide)
        assert found == {pair: multipliers[column] for pair, multipliers in table.items()}


def test_networks_of_one_width_keep_their_rates():
    wide = network(dag_graph("2_22_222")).architecture()
    base = network(dag_graph("2")).architecture()
    for rule in ("sgd", "adam"):
        assert set(width_multipliers(wide, base, rule).values()) == {1.0}
    assert width_multipliers(wide, base, lambda role, r, s: r * s + 1)["stem/kernel"] == 2


def test_width_multipliers_need_one_counterpart():
    architecture = network(dag_graph("2")).architecture()
    with pytest.raises(ValueError, match="'lion'; accepted are sgd, adam"):
        width_multipliers(architecture, architecture, "lion")
    without_layers = network(dag_graph("1")).architecture()
    # A base of the same width without such layers: no width differs.
    assert set(width_multipliers(architecture, without_layers, "sgd").values()) == {1.0}
    two_widths = Architecture(
        dag_graph("2_02"),
        tuple(
            Parameter(f"w{edge}", Role.HIDDEN, Role.HIDDEN, (4, fan), 4, fan, edge=edge)
            for edge, fan in enumerate((4, 8))
        ),
    )
    one = Parameter("w0", Role.HIDDEN, Role.HIDDEN, (4, 4), 4, 4, edge=0)
    with pytest.raises(ValueError, match=r"'w0'.*\(4, 4\), \(4, 8\).*with_widths"):
        width_multipliers(Architecture(dag_graph("2"), (one,)), two_widths, "sgd")


@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(strategies.integers(0, 2**16), strategies.sampled_from(Arrangement))
def test_large_random_graphs_have_usable_variances(seed, arrangement):
    graph = dag_graph(random_dag_string(seed, 18))
    for rule in INITIALIZATION_RULES:
        variances = np.asarray(edge_variances(graph, rule, arrangement))
        assert len(variances) == len(edge_lists(graph))
        assert np.all(np.isfinite(variances) & (variances >= 0))


def test_moment_is_not_misled_by_the_order_of_edges():
    senders, receivers = np.triu_indices(6, 1)
    operators = np.where((senders + receivers) % 3 == 0, Operator.SKIP, Operator.LINEAR)
    shuffled = np.random.default_rng(0).permutation(senders.size)
    graphs = [
        build_graph(6, senders[order], receivers[order], operators[order])
        for order in (slice(None), shuffled)
    ]
    assert numerators(graphs[0], "second_moment") == numerators(graphs[1], "second_moment")


def test_a_base_with_more_paths_than_floats_reach_raises_by_value_error():
    blocks = 1100
    chain = np.arange(2 * blocks)
    starts = chain[::2]
    huge = build_graph(
        2 * blocks + 1,
        np.concatenate([chain, starts]),
        np.concatenate([chain + 1, starts + 2]),
        np.concatenate([np.full(2 * blocks, Operator.LINEAR), np.full(blocks, Operator.SKIP)]),
    )
    with pytest.raises(ValueError, match="path_sum' gives the multiplier inf"):
        learning_rate_scale(dag_graph("2"), huge, "path_sum")


def test_options_reach_an_initialization_rule():
    architecture = network(dag_graph("2_12")).architecture()
    small, large = (
        weight_standard_deviations(
            architecture, "second_moment", rule_options={"branch_share": share}
        )["layers/1_2/kernel"]
        for share in (0.25, 1.0)
    )
    assert large == pytest.approx(2 * small)


@pytest.mark.parametrize("share", [math.nan, math.inf, -1.0])
def test_moment_raises_on_a_share_out_of_range(share):
    architecture = network(dag_graph("2_12")).architecture()
    with pytest.raises(ValueError, match="branch_share"):
        weight_standard_deviations(
            architecture, "second_moment", rule_options={"branch_share": share}
        )


@pytest.mark.parametrize("rule", [None, 3])
def test_a_rule_is_a_name_or_a_function(rule):
    with pytest.raises(TypeError, match="learning-rate rule is a name or a function"):
        learning_rate_scale(dag_graph("2"), dag_graph("2"), rule)


def test_a_string_or_an_architecture_is_not_a_graph():
    for wrong in ("2_02", network(dag_graph("2")).architecture()):
        with pytest.raises(TypeError, match=r"expected a jraph\.GraphsTuple"):
            learning_rate_scale(wrong, dag_graph("2"))
