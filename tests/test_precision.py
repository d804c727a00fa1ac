"""Low and mixed precision: every path against float32, float64 and closed forms.

Sums must not be taken in low precision: closed forms in float16, whose squares overflow beyond 256,
and in bfloat16, whose sums stop growing at 256 terms, are compared with NumPy in float64.

Whole networks are compared with float32. A layer rounds its input, weight, product and sum to the
unit u (2⁻⁸ of bfloat16, 2⁻¹¹ of float16), and so does every derivative through it. These roundings
are independent, so that r of them add up to √r·u in norms over batch and features, where networks
are as well conditioned as random ones are; see `bound`.
"""

import functools
import json
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import archscale_jax as archscale
from archscale_jax.contrib._growth.bottleneck import layer_statistics
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.solve import predicted_decrease, solve
from archscale_jax.tracing.layers import layer_kinds
from experiments.lab import recipe, training
from experiments.lab.datasets import load
from experiments.lab.files import read_records
from experiments.lab.models import DagMLP

pytestmark = pytest.mark.quick_compilation

KEY = jax.random.key(0)
UNIT = {"mixed": 2.0**-8, "cast": 2.0**-8, "bfloat16": 2.0**-8, "float16": 2.0**-11}
MODES = ("mixed", "cast")
DEPTH = 4
FLOAT16 = 300.0  # its square is beyond float16


class Perceptron(linen.Module):
    """Four layers, a skip."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, inputs):
        dense = functools.partial(linen.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = dense(8)(inputs.reshape(len(inputs), -1))
        hidden = hidden + dense(8)(jnp.tanh(hidden))
        return dense(3)(jnp.tanh(dense(6)(jnp.tanh(hidden))))


class Attention(linen.Module):
    """A convolution, attention over its positions, a layer on tokens, a mean."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, inputs):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        image = linen.Conv(6, (3, 3), strides=2, **dtypes)(inputs)
        tokens = image.reshape(len(image), -1, 6)
        normal = linen.LayerNorm(**dtypes)(tokens)
        tokens = tokens + linen.MultiHeadDotProductAttention(2, **dtypes)(normal)
        hidden = jnp.tanh(linen.Dense(5, **dtypes)(tokens))
        return linen.Dense(3, **dtypes)(jnp.mean(linen.Dense(6, **dtypes)(hidden), axis=1))


class Case(NamedTuple):
    """A network in some precision, its loss and its parameters."""

    apply: Any
    loss: Any
    params: Any
    batch: Any
    architecture: archscale.Architecture

    def features(self, params, batch):
        return archscale.vertex_features(self.apply, params, batch[0])


@functools.cache
def case(make, mode: str) -> Case:
    """`mixed` as Flax does it, `cast` as a policy that casts params in the function does."""
    half = jnp.float16 if mode == "float16" else jnp.bfloat16
    dtypes = {
        "float32": {},
        "cast": {},
        "mixed": {"dtype": half},
        "bfloat16": {"dtype": half, "param_dtype": half},
        "float16": {"dtype": half, "param_dtype": half},
    }
    network = make(**dtypes[mode])
    keys = jax.random.split(KEY)
    images = jax.random.normal(keys[0], (96, 4, 4, 1))
    batch = images, jax.random.randint(keys[1], (96,), 0, 3)

    def apply(params, inputs):
        if mode == "cast":
            params, inputs = jax.tree.map(lambda one: one.astype(half), (params, inputs))
        return network.apply({"params": params}, inputs)

    def loss(params, batch):
        logits = apply(params, batch[0]).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    shapes = jax.eval_shape(network.init, KEY, images)["params"]
    architecture = archscale.trace(apply, shapes, images)
    if mode == "float32":
        draw = jax.jit(lambda: archscale.initialize(KEY, shapes, architecture, "target_in_degree"))
        params = draw()
    else:  # the same, rounded once, as is tested below
        exact = case(make, "float32").params
        params = jax.tree.map(lambda one, like: one.astype(like.dtype), exact, shapes)
    return Case(apply, loss, params, batch, architecture)


def relative(found, expected) -> float:
    """The distance of two trees over the norm of the second."""
    found, expected = (
        np.concatenate([np.ravel(np.asarray(one, np.float64)) for one in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def reference(make):
    return case(make, "float32")


# What the architecture says does not depend on precision.


@pytest.mark.parametrize("make", [Perceptron, Attention])
def test_an_architecture_is_read_through_casts(make):
    expected = reference(make).architecture
    for mode in MODES:
        found = case(make, mode).architecture
        assert found.parameters == expected.parameters
        assert found.arrangement == expected.arrangement
        jax.tree.map(np.testing.assert_array_equal, found.graph, expected.graph)


def test_multipliers_are_those_of_exact_arithmetic_in_any_precision():
    # Paths from the stem to the last vertex cross 1 + the layer, or skip it: depths 1 and 2.
    exact = Fraction(1, 1**3 + 2**3)  # over the base `2`, one path of depth 1
    wanted = float(exact) ** 0.5
    base = archscale.dag_graph("2")
    found = set()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, *([jnp.float64] if x64 else [])):
                network = Perceptron(dtype, dtype)
                images = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
                shapes = jax.eval_shape(network.init, KEY, images)["params"]
                architecture = archscale.trace(
                    lambda params, x, network=network: network.apply({"params": params}, x),
                    shapes, images,
                )  # fmt: skip
                found.add(
                    json.dumps(archscale.learning_rate_multipliers(architecture, base, "path_sum"))
                )
    assert len(found) == 1
    multipliers = json.loads(found.pop())
    assert set(multipliers) == {
        f"Dense_{i}/{leaf}" for i in range(4) for leaf in ("kernel", "bias")
    }
    assert all(abs(multiplier - wanted) <= 2**-52 * wanted for multiplier in multipliers.values())


def test_draws_are_those_of_float32_rounded_once_whatever_x64_says():
    architecture = reference(Perceptron).architecture
    exact = reference(Perceptron).params
    for x64, dtype in ((False, jnp.bfloat16), (True, jnp.bfloat16), (True, jnp.float32)):
        with jax.enable_x64(x64):
            shapes = jax.tree.map(lambda one, d=dtype: jax.ShapeDtypeStruct(one.shape, d), exact)
            drawn = archscale.initialize(KEY, shapes, architecture, "target_in_degree")
            rounded = jax.tree.map(lambda one, d=dtype: np.asarray(one).astype(d), exact)
            jax.tree.map(np.testing.assert_array_equal, drawn, rounded)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_multiplier_is_applied_with_one_rounding(dtype):
    architecture = reference(Perceptron).architecture
    base = archscale.dag_graph("2")
    multipliers = archscale.learning_rate_multipliers(architecture, base, "path_sum")
    updates = jax.tree.map(lambda one: one.astype(dtype), reference(Perceptron).params)
    scaled, _ = archscale.scale_by_architecture(architecture, base, "path_sum").update(
        updates, optax.EmptyState()
    )
    kernel = updates["Dense_1"]["kernel"]
    exact = np.asarray(kernel, np.float64) * multipliers["Dense_1/kernel"]
    # The product is rounded to float32 first, which may move it over the middle of two neighbours.
    unit = float(jnp.finfo(dtype).eps) / 2
    error = np.abs(np.asarray(scaled["Dense_1"]["kernel"], np.float64) - exact)
    assert scaled["Dense_1"]["kernel"].dtype == dtype
    assert np.all(error <= np.abs(exact) * unit * (1 + 2**-12))


# Sums are not taken in low precision: closed forms.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sizes_of_updates_are_summed_in_float32(dtype):
    slopes = np.random.default_rng(0).uniform(200, 400, (40, 50)).astype(dtype)
    values = np.random.default_rng(1).uniform(200, 400, (40, 50)).astype(dtype)

    def loss(params, batch):  # of whose update the slopes are the negative, exactly
        return jnp.sum(params.astype(jnp.float32) * slopes.astype(np.float32))

    found = archscale.measure_update(
        lambda params, batch: [params], loss, jnp.asarray(values), None, optax.sgd(1.0)
    )
    exact, size = (np.square(one.astype(np.float64)) for one in (slopes, values))
    centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found.absolute, [exact.mean()], rtol=1e-6)
    np.testing.assert_allclose(found.relative, [exact.mean() / size.mean()], rtol=1e-6)
    expected = exact.mean() / np.square(centred).mean()
    np.testing.assert_allclose(found.standardized, [expected], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_coordinate_checks_sum_in_float32(dtype):
    width, inputs = 600, jnp.ones((1, 1), dtype)
    start = jnp.full((1, width), FLOAT16, dtype)

    def make(size):
        return (lambda params, x: x @ params["w"]), (lambda seed: {"w": start}), optax.sgd(1.0)

    def loss(outputs, targets):  # the update is 512 everywhere
        return -512 * jnp.sum(outputs.astype(jnp.float32))

    records = archscale.coordinate_check(make, [1], [(inputs, inputs)], loss, seeds=(0,))
    last = {record.step: record for record in records if record.vertex == "output"}
    assert last[0].feature == FLOAT16
    assert (last[0].change, last[1].change) == (0, 512)


def test_coordinate_checks_keep_float64():
    with jax.enable_x64(True):
        start = {"w": jnp.ones((1, 4))}

        def make(size):
            return (lambda params, x: x @ params["w"]), (lambda seed: start), optax.sgd(1e-10)

        inputs = jnp.ones((1, 1))
        records = archscale.coordinate_check(
            make, [1], [(inputs, inputs)], lambda outputs, targets: jnp.sum(outputs), seeds=(0,)
        )
    change = next(one.change for one in records if one.step and one.vertex == "output")
    np.testing.assert_allclose(change, 1e-10, rtol=1e-5)  # below the unit of float32 at 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradinit_sums_and_divides_in_float32(dtype):
    slopes = np.random.default_rng(0).uniform(200, 400, 3000).astype(dtype)
    params = {"w": jnp.full(3000, 1e-3, dtype), "v": jnp.ones(3000, dtype)}

    def loss(params, batch):
        slope = jnp.asarray(slopes, jnp.float32)
        return jnp.sum(params["w"].astype(jnp.float32) * slope) * batch[0].astype(jnp.float32)

    batches = [jnp.ones(2, dtype)] * 6
    rescaled, record = archscale.gradinit(
        loss, params, batches, optimizer="adam", max_gradient_norm=1e9, scale_learning_rate=2**-9
    )
    exact = np.sum(np.abs(slopes.astype(np.float64)))
    np.testing.assert_allclose(record.gradient_norm[0], exact, rtol=1e-6)
    # The derivative by the multiplier is Σ slope·w/η, with slopes/η beyond float16.
    assert np.all(np.isfinite(record.multipliers["w"]))
    np.testing.assert_allclose(record.multipliers["w"], [1 - 2**-9, 1 - 2**-8], rtol=1e-5)
    assert record.multipliers["w"].dtype == np.float32
    assert rescaled["w"].dtype == dtype


def test_losses_keep_float64():
    with jax.enable_x64(True):
        network = DagMLP(
            archscale.dag_graph("2"), 4, 3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        graphdef, params, rest = nnx.split(network, nnx.Param, ...)
        images, labels = jax.random.normal(KEY, (5, 2, 2, 1), jnp.float64), jnp.zeros(5, int)
        loss, (logits, _) = training.cross_entropy(
            graphdef, params, rest, images, labels, train=False
        )
        logits = np.asarray(logits)
        exact = np.mean(np.log(np.sum(np.exp(logits), axis=1)) - logits[:, 0])
    np.testing.assert_allclose(float(loss), exact, rtol=1e-13)


# Whole networks, against float32.


def bound(mode: str, passes: int, power: int = 1) -> float:
    """Relative error of a quantity behind so many passes through a network, to a power."""
    return power * (4 * DEPTH * passes) ** 0.5 * UNIT[mode]


@functools.cache
def update_size(make, mode):
    one = case(make, mode)
    size = functools.partial(archscale.measure_update, one.features, one.loss)
    found = jax.jit(lambda params: size(params, one.batch, optax.sgd(1.0)))(one.params)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("mode", ["float16", "mixed"])
def test_measured_updates(mode):
    make = Perceptron
    found, expected = update_size(make, mode), update_size(make, "float32")
    assert {one.dtype for one in found} == {np.dtype(np.float32)}
    # Forward, backward, and the update pushed forward; of ratios forward once more. Squares.
    assert relative(found.absolute, expected.absolute) < bound(mode, 3, power=2)
    assert relative(found.relative, expected.relative) < bound(mode, 4, power=2)
    assert relative(found.standardized, expected.standardized) < bound(mode, 4, power=2)


def test_sharpness_in_low_precision():
    matrix = jnp.diag(jnp.array([1.0, 2, 3, 4, 5, 300]))  # exact in float16; its square is not

    def quadratic(params, dtype):
        return params.astype(dtype) @ matrix.astype(dtype) @ params.astype(jnp.float32) / 2

    for of_params, computed in ((jnp.float16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        found = archscale.tuning.sharpness(quadratic, jnp.ones(6, of_params), computed)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, 300, rtol=1e-5 if computed == jnp.float32 else 2.0**-7)


@functools.cache
def growth(mode):
    one = case(Perceptron, mode)
    found = archscale.contrib.find_neuron_groups(one.loss, one.params, one.batch)
    groups = [one for one in found if not one.blocker]
    measured = measure(one.loss, one.params, [one.batch], groups)
    neurons = solve(one.params, measured, groups)
    every = archscale.bottleneck(one.loss, one.params, [one.batch])
    return groups, neurons, predicted_decrease(neurons, measured, groups), every


def test_bottlenecks_and_new_neurons():
    mode = "mixed"
    groups, neurons, predicted, bottlenecks = growth(mode)
    exact_groups, exact_neurons, exact_predicted, exact_bottlenecks = growth("float32")
    assert [one.name for one in groups] == [one.name for one in exact_groups]
    for one, exact in zip(groups, exact_groups, strict=True):
        slopes = [[link.slope for link in group.links] for group in (one, exact)]
        np.testing.assert_allclose(*slopes, rtol=UNIT[mode])  # of tanh: 1
    for name, exact in exact_bottlenecks.items():
        # Ψ, a square, of what went forward and backward.
        assert abs(bottlenecks[name].absolute / exact.absolute - 1) < bound(mode, 2, power=2)
        assert abs(bottlenecks[name].relative / exact.relative - 1) < bound(mode, 2, power=2)
    for name, exact in exact_neurons.items():
        # λ are products of both; noise turns small ones, the largest is their scale.
        values, wanted = neurons[name].singular_values, exact.singular_values
        assert np.max(np.abs(values - wanted)) < bound(mode, 2, power=2) * wanted[0]
    assert abs(predicted / exact_predicted - 1) < bound(mode, 2, power=4)


def test_neurons_are_found_behind_a_mean_over_positions():
    dtype = jnp.bfloat16

    # Halves of a mean over 196 positions cancel, each rounded.
    def outputs(params, inputs):
        hidden = jax.nn.relu(inputs.astype(dtype) @ params["a"].astype(dtype))
        return jnp.mean(hidden, axis=1) @ params["b"].astype(dtype)

    params = {"a": jnp.full((2, 3), 0.5), "b": jnp.full((3, 2), 0.5)}
    inputs = jax.random.normal(KEY, (2, 196, 2))
    found = archscale.contrib.find_neuron_groups(
        lambda params, batch: jnp.mean(outputs(params, batch).astype(jnp.float32)), params, inputs
    )
    assert [(one.blocker, one.joint("b")) for one in found[:1]] == [(None, "mean")]
    # The mean of both slopes of ReLU.
    assert abs(found[0].slope - 0.5) < 16 * float(jnp.finfo(dtype).eps)


def test_a_grown_network_keeps_its_precision():
    one = case(Perceptron, "mixed")

    def loss(params, batch):  # a linen module is built for the widths that it finds
        def dense(name, inputs):
            kernel, bias = (params[name][leaf].astype(jnp.bfloat16) for leaf in ("kernel", "bias"))
            return inputs @ kernel + bias

        hidden = dense("Dense_0", batch[0].reshape(len(batch[0]), -1).astype(jnp.bfloat16))
        hidden = hidden + dense("Dense_1", jnp.tanh(hidden))
        logits = dense("Dense_2", jnp.tanh(dense("Dense_3", jnp.tanh(hidden))))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return jnp.mean(losses)  # in bfloat16, too

    found = [
        group
        for group in archscale.contrib.find_neuron_groups(loss, one.params, one.batch)
        if not group.blocker
    ]
    grown = archscale.grow(loss, one.params, [one.batch], one.batch, found[1:], number=2)
    assert grown.losses[1] <= grown.losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(grown.params)} == {jnp.dtype(jnp.float32)}
    assert grown.params["Dense_3"]["kernel"].shape == (8, 8)


def test_layers_whose_weights_are_more_than_cast_raise():
    order = jnp.array([1, 0])

    def loss(params, batch):
        return jnp.mean(batch @ params.astype(jnp.bfloat16)[order])

    def cast(params, batch):  # twice, and inside a function
        return jax.jit(lambda params: jnp.mean(batch @ params.astype(jnp.bfloat16)))(
            params.astype(jnp.float16)
        )

    assert [one.weight for one in layer_kinds(cast, {"w": jnp.ones((2, 3))}["w"], jnp.ones((4, 2)))]
    with pytest.raises(archscale.TraceError, match="transposed or changed"):
        layer_kinds(loss, jnp.ones((2, 3)), jnp.ones((4, 2)))


def test_products_of_statistics_are_not_rounded_on_accelerators():
    one = case(Perceptron, "bfloat16")
    kinds = layer_kinds(one.loss, one.params, one.batch)
    sums = functools.partial(layer_statistics, loss_fn=one.loss, kinds=kinds)
    text = str(jax.make_jaxpr(sums)(one.params, one.batch))
    # Σ B Bᵀ and Σ B Vᵀ of every layer; the network's own products are its own affair.
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2 * len(kinds)


@functools.cache
def learned(mode):
    one = case(Perceptron, mode)
    batches = [
        jax.tree.map(lambda leaf, i=i: leaf[i : i + 16], one.batch) for i in range(0, 96, 16)
    ]
    return archscale.gradinit(one.loss, one.params, batches * 2)


def test_gradinit():
    (rescaled, found), (_, exact) = learned("mixed"), learned("float32")
    assert relative(found.gradient_norm[0], exact.gradient_norm[0]) < bound("mixed", 2)
    # Steps of Adam are at most the rate long, and relative errors of derivatives are theirs.
    steps = len(exact.loss) * 1e-2
    for name, wanted in exact.multipliers.items():
        assert found.multipliers[name].dtype == np.float32
        assert abs(found.multipliers[name][-1] - wanted[-1]) < bound("mixed", 4, power=2) * steps
    assert {leaf.dtype for leaf in jax.tree.leaves(rescaled)} == {jnp.dtype(jnp.float32)}


# Training.


@functools.cache
def trained(dtype, param_dtype):
    """Parameters before and after four updates at a small rate, and the losses.

    Without ReLU, whose derivatives rounding flips.
    """
    network = DagMLP(
        archscale.dag_graph("2_02"), 16, 8, 3, activation="gelu", normalization="batch",
        dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, shapes, rest = nnx.split(network, nnx.Param, ...)
    start = archscale.initialize(KEY, shapes, network.architecture())
    optimizer = optax.sgd(1e-3)
    state = training.create_train_state(start, rest, optimizer, KEY)
    images, labels = case(Perceptron, "float32").batch
    after, losses = training.jitted_train_epoch(
        state, images, labels, graphdef=graphdef, optimizer=optimizer, batch_size=24
    )
    return start, after, np.asarray(losses)


def test_mixed_precision_trains_weights_that_bfloat16_cannot_move():
    start, exact, exact_losses = trained(None, jnp.float32)
    _, mixed, losses = trained(jnp.bfloat16, jnp.float32)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, exact_losses, rtol=bound("mixed", 1))
    moves = [
        jax.tree.map(np.subtract, *map(jax.device_get, (after.params, start)))
        for after in (mixed, exact)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.params)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.model_state)} == {jnp.dtype(jnp.float32)}
    assert relative(*moves) < bound("mixed", 2, power=2)

    start, low, _ = trained(jnp.bfloat16, jnp.bfloat16)
    before, after = (
        np.asarray(state["readout"]["kernel"], np.float32) for state in (start, low.params)
    )
    change = np.asarray(nnx.to_pure_dict(moves[1])["readout"]["kernel"])
    # An update below half the distance to the next number is lost, however many there are.
    lost = np.abs(change) < np.abs(before) * 2.0**-10
    assert lost.mean() > 0.5
    np.testing.assert_array_equal(after[lost], before[lost])


def test_the_binary_trains_in_the_precision_of_its_flag(tmp_path, run_again):
    mixed = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    assert {"mixed": mixed, "bfloat16": low} == recipe.PRECISIONS
    graph, base = archscale.dag_graph("2_02"), archscale.dag_graph("2")
    digits = load("digits")
    network = DagMLP(graph, 64, 8, 10, rngs=nnx.Rngs(0), **low)
    graphdef, shapes, rest = nnx.split(network, nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0))
    params = archscale.initialize(keys[0], shapes, network.architecture())
    optimizer = optax.chain(
        training.create_optimizer(training.create_schedule(0.1, 3)),
        archscale.scale_by_architecture(network.architecture(), base),
    )
    state = training.create_train_state(params, rest, optimizer, keys[1])
    found = training.fit(
        state, digits, graphdef=graphdef, optimizer=optimizer, batch_size=64, total_steps=3
    )
    expected = next(found)[1]

    flags = ("--architecture=2_02", "--width=8", "--steps=3", "--precision=bfloat16")
    finished = run_again("train", tmp_path, *flags)
    assert finished.returncode == 0, finished.stderr
    (record,) = read_records(tmp_path / "results.jsonl")
    for name in ("running_loss", "test_loss"):
        np.testing.assert_allclose(record[name], expected[name], rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
