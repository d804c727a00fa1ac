"""The networks of NAS-Bench-201, against a plain reference and against published numbers."""

import functools
import itertools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

import archscale_jax as archscale
from archscale_jax._spaces.cell import CELL_EDGES, cell_digits
from archscale_jax._trees import named_leaves, parameter_name
from archscale_jax.rules import weight_standard_deviations
from experiments.lab import training
from experiments.lab.models import CellNetwork, embed, multiply_adds, parameter_count, select_cell
from experiments.lab.models.cell_edge import EdgeWeights, average_pool, chosen_edge
from experiments.lab.models.cell_layers import convolve_half, pool_half

pytestmark = pytest.mark.quick_compilation

LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.cache
def abstract(cell, channels=2, cells=1, image_channels=1, classes=3, **options):
    """A network without arrays, which no test may change."""
    return nnx.eval_shape(
        lambda: CellNetwork(
            cell, image_channels, channels, cells, classes, rngs=nnx.Rngs(0), **options
        )
    )


def network(*arguments, **options):
    """A network whose parameters are all random, biases and scales too; NumPy compiles nothing."""
    model = nnx.clone(abstract(*arguments, **options))
    generator = np.random.default_rng(0)
    draws = {
        "kernel": lambda shape: generator.normal(size=shape) / np.sqrt(np.prod(shape[:-1])),
        "scale": lambda shape: generator.uniform(0.5, 2, shape),
        "bias": lambda shape: generator.normal(size=shape),
        "var": np.ones,
    }

    def fill(path, leaf):
        draw = draws.get(parameter_name(path).split("/")[-1], np.zeros)
        return jnp.asarray(draw(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(fill, nnx.state(model)))
    return model


def split(model):
    return nnx.split(model, nnx.Param, ...)


# Published numbers.


@pytest.mark.parametrize(
    ("cell", "classes", "size", "parameters", "cost"),
    [  # of NATS-Bench: CIFAR-10, CIFAR-100, ImageNet16-120
        ("4_21_211", 10, 32, 129_306, 15_647_370),
        ("4_21_211", 100, 32, 135_156, 15_653_220),
        ("4_21_211", 120, 16, 136_456, 3_919_480),
        ("3_34_034", 10, 32, 802_426, 113_951_370),
        ("1_11_020", 10, 32, 101_306, 11_715_210),
    ],
)
def test_parameters_and_flops_are_the_published_ones(cell, classes, size, parameters, cost):
    found = abstract(cell, 16, 5, 3, classes)
    assert parameter_count(found) == parameters
    assert multiply_adds(found, size, size) == cost


def test_the_author_codes_deviations_are_those_of_every_layer(golden_dir):
    content = json.loads((golden_dir / "weight_std_open.json").read_text())
    records = [record for record in content["records"] if record["model"] == "tinynetwork"]
    assert len(records) == 5
    for record in records:
        model = abstract(record["code"], record["C"], record["N"], 3, record["classes"])
        found = weight_standard_deviations(model.architecture(), "chen2024_code")
        expected = {our_name(layer["layer"]): layer["std"] for layer in record["layers"]}
        assert found == pytest.approx(expected, rel=1e-6)


def our_name(layer):
    """`cell2 edge 0->1 conv3` and the like, where every second `cell` is a reduction; N = 1."""
    names = {"stem": "stem/kernel", "classifier": "readout/kernel"}
    names |= {"conv_a": "convolution_a", "conv_b": "convolution_b", "downsample1x1": "shortcut"}
    words = layer.split()
    if len(words) == 1:
        return names[layer]
    stage = int(words[0].removeprefix("cell")) // 2
    if words[1] == "res":
        return f"reductions/{stage}/{names[words[2]]}/kernel"
    edge, size = words[2].replace("->", "_"), words[3].removeprefix("conv")
    return f"stages/{stage}/0/edges/{edge}/convolution_{size}/kernel"


def test_a_network_of_cells_has_no_author_code_rate():
    graph = abstract("3_33_333").architecture().graph
    with pytest.raises(ValueError, match="pass cell_graph"):
        archscale.learning_rate_scale(graph, rule="chen2024_code")


# Against a reference in plain operations.


def plain_normalization(features, scale, bias):
    mean, variance = features.mean((0, 1, 2)), features.var((0, 1, 2))
    return (features - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def plain_convolution(features, kernel, stride):
    border = [(kernel.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(
        features, kernel, (stride, stride), border, dimension_numbers=LAYOUT
    )


def plain_pool(features):
    return nnx.avg_pool(features, (3, 3), padding="SAME", count_include_pad=False)


def reference(leaves, cell, images):
    """The benchmark's network while training, from its description; images of even sizes."""

    def normalized(name, features):
        return plain_normalization(features, leaves[f"{name}/scale"], leaves[f"{name}/bias"])

    def convolved(name, features, stride=1):
        return plain_convolution(features, leaves[f"{name}/kernel"], stride)

    def edge(name, digit, features):
        if digit in (2, 3):
            layer = convolved(f"{name}/convolution_{2 * digit - 3}", jax.nn.relu(features))
            return normalized(f"{name}/normalization", layer)
        if digit == 4:
            return plain_pool(features)
        return features * digit

    features = normalized("stem_normalization", convolved("stem", images))
    for stage in range(3):
        if stage:
            block = f"reductions/{stage - 1}"
            inner = convolved(f"{block}/convolution_a", jax.nn.relu(features), 2)
            inner = jax.nn.relu(normalized(f"{block}/normalization_a", inner))
            inner = convolved(f"{block}/convolution_b", inner)
            pooled = nnx.avg_pool(features, (2, 2), strides=(2, 2))
            features = normalized(f"{block}/normalization_b", inner)
            features += convolved(f"{block}/shortcut", pooled)
        vertices = [features]
        for receiver, group in enumerate(cell_digits(cell), start=1):
            edges = f"stages/{stage}/0/edges"
            terms = [
                edge(f"{edges}/{sender}_{receiver}", digit, vertices[sender])
                for sender, digit in enumerate(group)
            ]
            vertices.append(sum(terms))
        features = vertices[-1]
    features = jax.nn.relu(normalized("normalization", features)).mean((1, 2))
    return features @ leaves["readout/kernel"] + leaves["readout/bias"]


CELLS = ("3_24_130", "4_20_000")  # the last has dead vertices and no path


@pytest.fixture(scope="module")
def example():
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.enable_x64(True):
        images = jax.random.normal(keys[0], (5, 8, 8, 1), jnp.float64)
        return images, jnp.arange(5) % 3


@functools.cache
def space_in_float64():
    return network(None, param_dtype=jnp.float64)


traces = []


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(graphdef, params, model_state, images, labels):
    traces.append(graphdef)

    def loss(params):
        return training.cross_entropy(graphdef, params, model_state, images, labels, train=True)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def in_training(graphdef, params, model_state, images, labels):
    return training.cross_entropy(graphdef, params, model_state, images, labels, train=True)


@functools.partial(jax.jit, static_argnums=0)
def evaluated(graphdef, params, model_state, images):
    return nnx.merge(graphdef, params, model_state, copy=True)(images)


@pytest.mark.parametrize("cell", CELLS)
def test_loss_and_gradient_are_those_of_the_reference(cell, example):
    with jax.enable_x64(True):
        images, labels = example
        model = network(cell, param_dtype=jnp.float64)
        graphdef, params, model_state = split(model)

        @jax.jit
        @jax.value_and_grad
        def expected(leaves):
            logits = reference(leaves, cell, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.astype(jnp.float32).mean()

        loss, gradient = expected(named_leaves(params))
        space, space_params, space_state = split(space_in_float64())
        (chosen_loss, (_, chosen_state)), chosen = loss_and_gradient(
            space, embed(params, space_params), select_cell(space_state, cell), images, labels
        )
        own_loss, (_, own_state) = in_training(graphdef, params, model_state, images, labels)
        assert chosen_loss == pytest.approx(float(loss), rel=1e-5)
        assert own_loss == pytest.approx(float(loss), rel=1e-5)
        for name, leaf in named_leaves(chosen).items():
            if name in gradient:
                np.testing.assert_allclose(leaf, gradient[name], rtol=1e-4, atol=1e-5)
            elif "convolution" in name:  # of an operation that the cell does not have
                np.testing.assert_array_equal(leaf, 0)
        tracked = named_leaves(chosen_state)
        for name, leaf in named_leaves(own_state).items():
            np.testing.assert_allclose(tracked[name], leaf, rtol=1e-5, atol=1e-6)


def test_after_training_both_networks_normalize_by_the_running_averages(example):
    images, labels = example
    images = images.astype(jnp.float32)
    graphdef, params, model_state = split(network("3_24_134"))
    space, space_params, space_state = split(network(None))
    _, (_, model_state) = in_training(graphdef, params, model_state, images, labels)
    averages = named_leaves(model_state)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: averages.get(parameter_name(path), leaf),
        select_cell(space_state, "3_24_134"),
    )
    expected = evaluated(graphdef, params, model_state, images)
    found = evaluated(space, embed(params, space_params), filled, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    alone = evaluated(graphdef, params, model_state, images[:1])
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-5, atol=1e-6)  # not by the batch


def test_one_program_serves_every_cell(example):
    with jax.enable_x64(True):
        space, params, model_state = split(space_in_float64())
        before = traces.count(space)
        cells = (*CELLS, "2_22_222", "1_11_111")
        states = [select_cell(model_state, cell) for cell in cells]
        losses = {float(loss_and_gradient(space, params, one, *example)[0][0]) for one in states}
        assert len(losses) == len(cells)
        assert traces.count(space) - before <= 1


# The parts.


@pytest.mark.parametrize("operation", range(5))
def test_the_derivatives_of_a_chosen_edge(operation):
    with jax.enable_x64(True):
        generator = np.random.default_rng(operation)
        shapes = ((1, 1, 2, 2), (3, 3, 2, 2), (2,), (2,))
        weights = EdgeWeights(*(jnp.asarray(generator.normal(size=shape)) for shape in shapes))
        features = jnp.asarray(generator.normal(size=(3, 4, 5, 2)))
        check_grads(
            lambda features, weights: chosen_edge(operation, features, weights)[0],
            (features, weights),
            order=1,
            modes=("fwd", "rev"),
        )


@jax.jit
def pooled_and_halved(features, kernel):
    """What is found, and what is expected."""
    pool = functools.partial(nnx.avg_pool, padding="SAME", count_include_pad=False)
    found = average_pool(features), pool_half(features), convolve_half(features, kernel)
    halved = lax.conv_general_dilated(
        features, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=LAYOUT
    )
    return found, (pool(features, (3, 3)), pool(features, (2, 2), strides=(2, 2)), halved)


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
@hypothesis.example(1, 1, 0)
@hypothesis.example(2, 3, 0)
def test_pooling_and_halving_are_those_of_the_benchmark(height, width, seed):
    generator = np.random.default_rng(seed)
    features = jnp.asarray(generator.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(3, 3, 3, 4)), jnp.float32)
    for found, expected in zip(*pooled_and_halved(features, kernel), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# The architecture.


# Where a vertex is only skipped on, `trace` joins it with the next.
@pytest.mark.parametrize("cell", ["3_24_130", "2_33_333"])
def test_the_architecture_is_the_one_that_trace_reads(cell, example):
    model = network(cell, cells=2)
    graphdef, params, model_state = split(model)

    def apply(params, images):
        return nnx.merge(graphdef, params, model_state, copy=True)(images, train=True)

    shapes = jax.eval_shape(lambda: params)  # these params are not those of an initialization
    traced = archscale.trace(apply, shapes, example[0].astype(jnp.float32))
    ours = model.architecture()
    for rule in ("target_in_degree", "he_normal"):
        deviations = [weight_standard_deviations(one, rule) for one in (ours, traced)]
        for one in deviations:  # of which `trace` sees a kernel that is padded for speed
            for block in range(2):
                del one[f"reductions/{block}/convolution_a/kernel"]
        assert deviations[0] == pytest.approx(deviations[1])
    counts = [archscale.path_statistics(one.graph) for one in (ours, traced)]
    assert counts[0] == counts[1]


def test_the_features_are_those_of_the_vertices():
    model = abstract("3_24_130", cells=2)
    features = nnx.eval_shape(
        lambda model, images: model.features(images), model, jnp.zeros((2, 8, 8, 1))
    )
    graph = model.architecture().graph
    assert len(features) == len(graph.nodes) == 1 + 3 * (3 * 2 + 2)
    assert [one.shape[-1] for one in features[:: 3 * 3]] == [2, 4, 8]


def test_the_paths_of_the_network_are_products_of_those_of_its_cells():
    cell = archscale.path_statistics(archscale.cell_graph("3_34_131"))
    whole = archscale.path_statistics(abstract("3_34_131", cells=2).architecture().graph)
    assert whole.count == cell.count**6 * 2**2
    assert whole.max_depth == 6 * cell.max_depth + 2 * 2
    assert whole.min_depth == 6 * cell.min_depth + 2 * 1


# Bad input.


def test_bad_input_raises_by_name(example):
    with pytest.raises(ValueError, match="channels must be at least 1, found 0"):
        network("3_24_130", channels=0)
    with pytest.raises(ValueError, match="cell code '3_24'"):
        network("3_24")
    with pytest.raises(ValueError, match="cell code 'none'"):
        select_cell(nnx.state(network(None), nnx.Not(nnx.Param)), "none")
    with pytest.raises(ValueError, match="a network of the whole space has no single graph"):
        abstract(None).architecture()
    with pytest.raises(ValueError, match="no path joins"):
        abstract("0_00_010").architecture()
    with pytest.raises(ValueError, match="a network of the whole space has no single cost"):
        multiply_adds(abstract(None), 32, 32)
    params = nnx.state(network("3_24_130", channels=4), nnx.Param)
    with pytest.raises(ValueError, match="'normalization/bias' has shape .16,.; accepted is .8,."):
        embed(params, nnx.state(abstract(None), nnx.Param))
    with pytest.raises(ValueError, match="has no parameters .'alone'"):
        embed(nnx.State({"alone": nnx.Param(jnp.ones(1))}), nnx.state(abstract(None), nnx.Param))


def test_embedding_fills_with_zeros_and_cells_of_all_codes_are_of_the_space():
    space = nnx.state(abstract(None), nnx.Param)
    names = set(named_leaves(space))
    generator = np.random.default_rng(0)
    for digits in generator.integers(0, 5, (6, 6)):
        code = "_".join("".join(map(str, part)) for part in (digits[:1], digits[1:3], digits[3:]))
        assert names >= set(named_leaves(nnx.state(abstract(code), nnx.Param)))
    params = nnx.state(network("3_00_100"), nnx.Param)
    filled = named_leaves(embed(params, space))
    held = named_leaves(params)
    assert filled.keys() == names
    for name, leaf in filled.items():
        np.testing.assert_array_equal(leaf, held.get(name, 0))


def test_edges_are_in_the_order_of_a_code():
    expected = [(s, r) for r, s in itertools.product(range(4), repeat=2) if s < r]
    assert list(CELL_EDGES) == expected
