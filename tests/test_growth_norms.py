"""Growth behind normalizations, against finite differences, random search and whole models."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.contrib._growth.extension import extend, extended
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.solve import predicted_decrease, solve
from tests import growing
from tests.growing import batch_norm, convolve, draw, scales

pytestmark = pytest.mark.quick_compilation


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def change_of_output(network, name):
    """V of every example at the output of a dense layer of `normalized`, by perturbing it."""
    params, (inputs, targets) = network.params, network.batch

    def loss(shift):
        first = inputs @ params["w1"] + params["b1"]
        hidden = jnp.tanh(batch_norm(first, params, "n1"))
        second = hidden @ params["w2"] + shift
        outputs = jnp.tanh(batch_norm(second, params, "n2")) @ params["w3"]
        return jnp.mean(jnp.sum(jnp.square(outputs - targets), axis=1)), hidden

    assert name == "w2"
    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((len(inputs), 3)))
    return -len(inputs) * np.asarray(gradient), np.asarray(hidden)


def test_no_neuron_of_unit_variance_gains_more_for_its_fan_out():
    """The closed form against 1000 random fan-ins, and fan-ins that climbed from them."""
    network = growing.normalized()
    group = next(one for one in growing.growable(network) if one.name == "w1")
    measured = measure(network.loss, network.params, [network.batch], [group], cutoff=1e-12)
    neurons = solve(network.params, measured, [group], threshold=0.0)["w1"]

    wanted, hidden = change_of_output(network, "w2")
    rest = wanted - hidden @ np.linalg.lstsq(hidden, wanted, rcond=None)[0]
    rows = np.asarray(network.batch[0])
    rows = rows - rows.mean(axis=0)

    def gains(fan_in):
        """<V_proj, ω f>/n of features of unit variance, with the best ω of norm 1."""
        features = rows @ fan_in
        return np.linalg.norm(features.T @ rest / len(rows), axis=1) / features.std(axis=0)

    # λ of a neuron is what it gains for sizes √λ before and behind.
    np.testing.assert_allclose(
        gains(neurons.fan_in[:-1]), neurons.singular_values, rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(neurons.fan_in[-1], 0, atol=1e-12)  # of the bias
    best = neurons.singular_values[0]
    drawn = np.random.default_rng(0).normal(size=(5, 1000))
    assert np.all(gains(drawn) <= best)
    moment = rows.T @ rest
    for _ in range(200):  # power iteration on the covariance of the batch
        drawn = np.linalg.solve(rows.T @ rows, moment @ (moment.T @ drawn))
        drawn /= np.linalg.norm(drawn, axis=0)
    np.testing.assert_allclose(gains(drawn), best, rtol=1e-6)


def difference(network, size):
    """A function of an extension to (L(0) - L(γ))/γ²."""

    @jax.jit
    def found(extension):
        losses = [network.loss(extended(extension, one), network.batch) for one in (0.0, size)]
        return (losses[0] - losses[1]) / size**2

    return found


def test_predictions_are_finite_differences_of_the_mean_slope_of_relu():
    network = growing.normalized(jax.nn.relu, 200)
    groups = growing.growable(network)
    # With slots, so that what grows has the same shapes, and compiles once.
    slots = dict.fromkeys((one.name for one in groups), 6)
    params, _ = archscale.contrib.widen(network.params, slots, groups)
    measured = measure(network.loss, params, [network.batch], groups)
    lowered = difference(network, 1e-4)
    for group, method in itertools.product(groups, ("tiny", "random")):
        assert all(link.scale and link.slope == 0.5 for link in group.links)
        found = solve(params, measured, [group], method=method, number=2, key=jax.random.key(0))
        one = found[group.name]
        opposite = {group.name: one._replace(fan_in=-one.fan_in, fan_out=-one.fan_out)}
        expected = predicted_decrease(found, measured, [group])
        both = [lowered(extend(params, [group], one, measured)) for one in (found, opposite)]
        np.testing.assert_allclose(np.mean(both), expected, rtol=3e-3)


def test_what_new_neurons_are():
    """Unit variance, sizes in scales, offsets and biases 0; the others stay as they are."""
    network = growing.normalized()
    group = next(one for one in growing.growable(network) if one.name == "w1")
    growth = archscale.grow(
        network.loss, network.params, [network.batch], network.batch, [group], number=2,
        amplitudes=(0.25,),
    )  # fmt: skip
    values = growth.singular_values["w1"]
    params, inputs = growth.params, network.batch[0]
    np.testing.assert_allclose(np.std(inputs @ params["w1"][:, 4:], axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(params["n1_scale"][4:], 0.25 * np.sqrt(values), rtol=1e-6)
    fan_out = np.linalg.norm(params["w2"][4:], axis=1)
    np.testing.assert_allclose(fan_out, 0.25 * np.sqrt(values), rtol=1e-6)
    np.testing.assert_allclose(params["b1"][4:], 0, atol=1e-12)
    np.testing.assert_array_equal(params["n1_offset"][4:], 0)
    for name, leaf in network.params.items():
        np.testing.assert_array_equal(params[name][tuple(map(slice, leaf.shape))], leaf)


def test_normalize_brings_scales_to_the_size_of_the_others():
    network = growing.normalized()
    group = next(one for one in growing.growable(network) if one.name == "w1")
    growth = archscale.grow(
        network.loss, network.params, [network.batch], network.batch, [group], number=2,
        normalize=True, amplitudes=(1.0,),
    )  # fmt: skip
    for leaf in (growth.params["n1_scale"], growth.params["w2"]):
        old, new = (np.sqrt(np.mean(np.sum(part**2, axis=tuple(range(1, leaf.ndim)))))
                    for part in (leaf[:4], leaf[4:]))  # fmt: skip
        np.testing.assert_allclose(new, old, rtol=1e-6)


def test_several_batches_are_centred_one_by_one():
    network = growing.normalized()
    group = next(one for one in growing.growable(network) if one.name == "w1")
    shifted = network.batch[0] + 5, network.batch[1]
    measured = measure(network.loss, network.params, [network.batch, shifted], [group])
    rows = np.asarray(network.batch[0])
    rows = np.hstack([rows - rows.mean(axis=0), np.zeros((len(rows), 1))])
    np.testing.assert_allclose(measured.pairs["w1"].before, 2 * rows.T @ rows, atol=1e-9)


def test_gradmax_has_no_variance():
    network = growing.normalized()
    arguments = network.loss, network.params, [network.batch], network.batch
    match = "'w1' cannot grow by 'gradmax': .* normalization of 'n1_scale'; accepted are tiny"
    with pytest.raises(ValueError, match=match):
        archscale.grow(*arguments, growing.growable(network)[:1], method="gradmax", number=1)


def test_scales_of_0_do_not_hide_layers():
    """Residual branches that begin with 0, as in large ResNets."""
    network = growing.normalized_residual()
    zeros = {name: jnp.zeros_like(network.params[name]) for name in ("b2_norm_scale",)}
    found = archscale.contrib.find_neuron_groups(
        network.loss, network.params | zeros, network.batch
    )
    assert [one for one in found if one.blocker is None] == growing.growable(network)


def test_two_normalizations_of_one_layer():
    def outputs(params, inputs):
        x = inputs @ params["w1"]
        first = jnp.tanh(batch_norm(x, params, "n")) @ params["a"]
        return first + jnp.tanh(batch_norm(x, params, "m")) @ params["b"]

    params = draw(0, w1=(5, 4), a=(4, 2), b=(4, 2)) | scales(1, n=4, m=4)
    batch = growing.data(1, 40, (5,), 2)
    network = growing.Network(growing.squared(outputs), outputs, params, batch)
    groups = growing.growable(network)
    assert groups[0].scales("w1") == (("m_scale", 0), ("n_scale", 0))
    measured = measure(network.loss, params, [batch], groups)
    neurons = solve(params, measured, groups, number=2)
    expected = predicted_decrease(neurons, measured, groups)
    assert expected > 1e-2
    extension = extend(params, groups, neurons, measured)
    np.testing.assert_allclose(difference(network, 1e-4)(extension), expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_types_do_not_matter(dtype):
    network = growing.normalized()
    params, batch = jax.tree.map(lambda leaf: leaf.astype(dtype), (network.params, network.batch))
    found = archscale.contrib.find_neuron_groups(network.loss, params, batch)
    for one, other in zip(found, growing.growable(network), strict=False):
        assert one.blocker is None and one._replace(links=()) == other._replace(links=())
        assert [link.scale for link in one.links] == [link.scale for link in other.links]
        assert one.slope == pytest.approx(1, abs=2e-2 if dtype == jnp.bfloat16 else 2e-3)
    if dtype == jnp.bfloat16:
        growth = archscale.grow(network.loss, params, [batch], batch, found[:1], number=1)
        assert {leaf.dtype for leaf in jax.tree.leaves(growth.params)} == {jnp.dtype(dtype)}
        assert growth.losses[1] < growth.losses[0]


# What stands in the way.


def first_of(outputs, params, inputs, count=2):
    generator = np.random.default_rng(0)
    targets = jnp.asarray(generator.normal(size=(len(inputs), count)))
    loss = growing.squared(outputs)
    return archscale.contrib.find_neuron_groups(loss, params, (inputs, targets))[0]


IMAGES = np.random.default_rng(3).normal(size=(6, 4, 4, 2))


def norm_of(axes, features, params, *, centred=True):
    if centred:
        features = features - jnp.mean(features, axes, keepdims=True)
    mean = jnp.mean(jnp.square(features), axes, keepdims=True)
    return features / jnp.sqrt(mean + 1e-5) * params["scale"]


def between_convolutions(between, params, inputs):
    hidden = convolve(jnp.tanh(between(convolve(inputs, params["k1"]), params)), params["k2"])
    return jnp.mean(jnp.tanh(hidden), axis=(1, 2))


OTHER = "the normalization of 'scale' before 'k2' is not taken of the outputs of 'k1' alone"
NO_SCALE = "a normalization without a scale that could be 0 stands before 'k2'"
OVER = ": the normalization of 'scale' before 'k2' is taken over features; "


@pytest.mark.parametrize(
    "between, words",
    [
        (functools.partial(norm_of, (1, 2)), OTHER),
        (functools.partial(norm_of, 0), OTHER),
        (functools.partial(norm_of, (0, 1, 2), centred=False), OTHER),
        (lambda x, p: norm_of((0, 1, 2), jax.nn.relu(x), p), OTHER),
        (lambda x, p: nn.avg_pool(norm_of((0, 1, 2), x, p), (2, 2)), OTHER),
        (lambda x, p: norm_of((0, 1, 2), p["scale"] * x, {"scale": 1.0}), OTHER),
        (lambda x, p: norm_of((0, 1, 2), x, {"scale": 1.0}), NO_SCALE),
        (lambda x, p: norm_of((0, 1, 2), x, {"scale": 1 + p["scale"]}), NO_SCALE),
        (functools.partial(norm_of, -1), OVER),
        (functools.partial(norm_of, (1, 2, 3)), OVER),
        (functools.partial(norm_of, -1, centred=False), OVER),
    ],
    ids=["instance", "per_position", "uncentred", "behind_relu", "pooled", "scale_before",
         "no_scale", "from_1", "layer", "group", "rms"],
)  # fmt: skip
def test_blockers_name_the_normalization_and_the_way_on(between, words):
    params = draw(0, k1=(3, 3, 2, 3), k2=(3, 3, 3, 2)) | {"scale": jnp.array([0.5, 1.0, 1.5])}
    outputs = functools.partial(between_convolutions, between)
    blocker = first_of(outputs, params, IMAGES).blocker
    assert blocker is not None and words in blocker
    assert blocker.endswith("contrib.expand widens it")


def test_normalizations_of_sums_are_blocked():
    def joint(params, inputs):
        both = inputs @ params["w1"] + jnp.tanh(inputs) @ params["w2"]
        return jnp.tanh(batch_norm(both, params, "n")) @ params["w3"]

    params = draw(0, w1=(5, 4), w2=(5, 4), w3=(4, 2)) | scales(1, n=4)
    inputs = IMAGES.reshape(-1, 12)[:, :5]
    group = first_of(joint, params, inputs)
    assert group.producers == ("w1", "w2")
    assert (group.blocker or "").startswith("the normalization of 'n_scale' takes the sum of")

    def stream(params, inputs):  # as Pre-LN
        x = inputs @ params["w1"]
        x += jnp.tanh(batch_norm(x, params, "n") @ params["a"]) @ params["b"]
        return jnp.tanh(batch_norm(x, params, "m")) @ params["w3"]

    params = draw(0, w1=(5, 4), a=(4, 6), b=(6, 4), w3=(4, 2)) | scales(1, n=4, m=4)
    loss = growing.squared(stream)
    batch = inputs, jnp.ones((len(inputs), 2))
    found = archscale.contrib.find_neuron_groups(loss, params, batch)
    assert (found[0].blocker or "").startswith("the normalization of 'm_scale' takes the sum of")
    assert [one.name for one in found if one.blocker is None] == ["a"]

    def raw(params, inputs):  # one layer reads what another reads normalized
        x = inputs @ params["w1"]
        return jnp.tanh(batch_norm(x, params, "n")) @ params["a"] + x @ params["w3"]

    params = draw(0, w1=(5, 4), a=(4, 2), w3=(4, 2)) | scales(1, n=4)
    blocker = first_of(raw, params, inputs).blocker or ""
    assert "'n_scale'" in blocker and "without it by 'w3'" in blocker


def test_one_example_does_not_tell_over_what():
    network = growing.normalized_residual()
    found = archscale.contrib.find_neuron_groups(
        network.loss, network.params, jax.tree.map(lambda leaf: leaf[:1], network.batch)
    )
    assert "1 examples do not tell over what; give 3" in (found[0].blocker or "")


# Models of other libraries.


def trains_on(outputs, params, batch, groups, number=2):
    """Grows, and trains by Adam: no loss but a smaller one, and more neurons."""
    loss = jax.jit(growing.squared(outputs))
    tx = optax.adam(1e-2)
    growth = archscale.grow(
        loss, params, [batch], batch, groups, number=number,
        optimizer=lambda params: tx, optimizer_state=tx.init(params),
    )  # fmt: skip
    np.testing.assert_allclose(growth.losses[0], loss(params, batch), rtol=1e-9)
    assert growth.amplitude > 0 and growth.losses[1] < growth.losses[0] and growth.predicted > 0

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    grown, state = growth.params, growth.optimizer_state
    for _ in range(10):
        grown, state, _ = step(grown, state)
    assert loss(grown, batch) < growth.losses[1]
    counts = [archscale.contrib.count_neurons(one, groups) for one in (params, grown)]
    assert counts[1] == {name: count + number for name, count in counts[0].items()}
    return growth


class Block(nn.Module):
    inner: int

    @nn.compact
    def __call__(self, x):
        def layer(features, x):
            conv = nn.Conv(features, (3, 3), use_bias=False, param_dtype=jnp.float64)
            return nn.BatchNorm(False, param_dtype=jnp.float64)(conv(x))

        return nn.relu(x + layer(x.shape[-1], nn.relu(layer(self.inner, x))))


class Residual(nn.Module):
    width: int
    inner: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False, param_dtype=jnp.float64)(x)
        x = nn.relu(nn.BatchNorm(False, param_dtype=jnp.float64)(x))
        x = Block(self.inner)(x)
        return nn.Dense(2, param_dtype=jnp.float64)(jnp.mean(x, axis=(1, 2)))


def image_batch(count=64):
    generator = np.random.default_rng(7)
    images = generator.normal(size=(count, 6, 6, 2))
    features = np.tanh(images.reshape(count, -1) @ generator.normal(size=(72, 6)) / 6)
    return jnp.asarray(images), jnp.asarray(features @ generator.normal(size=(6, 2)))


def test_a_residual_network_of_linen():
    def model_of(params):
        width, inner = (one["Conv_0"]["kernel"].shape[-1] for one in (params, params["Block_0"]))
        return Residual(width, inner)

    def outputs(params, inputs):
        model = model_of(params)
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["batch_stats"]
        averages = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
        variables = {"params": params, "batch_stats": averages}
        return model.apply(variables, inputs, mutable=["batch_stats"])[0]

    batch = image_batch()
    params = jax.jit(Residual(3, 2).init)(jax.random.key(0), batch[0])["params"]
    found = archscale.contrib.find_neuron_groups(growing.squared(outputs), params, batch)
    groups = [one for one in found if one.blocker is None]
    assert [one.producers for one in groups] == [
        ("Conv_0/kernel", "Block_0/Conv_1/kernel"),
        ("Block_0/Conv_0/kernel",),
    ]
    assert all(link.scale is not None for one in groups for link in one.links)
    growth = trains_on(outputs, params, batch, groups)
    assert growth.params["BatchNorm_0"]["scale"].shape == (5,)
    assert growth.params["Block_0"]["BatchNorm_0"]["bias"].shape == (4,)


def test_a_residual_network_of_nnx():
    class Network(nnx.Module):
        """Pre-activation: the stream is normalized by every block, what is inside grows."""

        def __init__(self, width, inner, rngs):
            def conv(inputs, outputs):
                return nnx.Conv(
                    inputs, outputs, (3, 3), use_bias=False, param_dtype=jnp.float64, rngs=rngs
                )

            self.stem = conv(2, width)
            self.norms = nnx.List([
                nnx.BatchNorm(count, param_dtype=jnp.float64, rngs=rngs)
                for count in (width, inner, width)
            ])  # fmt: skip
            self.first, self.second = conv(width, inner), conv(inner, width)
            self.readout = nnx.Linear(width, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            y = self.first(nnx.relu(self.norms[0](x)))
            x = self.norms[2](x + self.second(nnx.relu(self.norms[1](y))))
            return self.readout(jnp.mean(nnx.relu(x), axis=(1, 2)))

    def outputs(params, inputs):
        width, inner = params["first"]["kernel"].shape[-2:]
        empty = nnx.eval_shape(lambda: Network(width, inner, nnx.Rngs(0)))
        graphdef, _, rest = nnx.split(empty, nnx.Param, ...)
        rest = jax.tree.map(lambda one: jnp.zeros(one.shape), rest)
        return nnx.merge(graphdef, params, rest)(inputs)

    batch = image_batch()
    _, params, _ = nnx.split(Network(3, 2, nnx.Rngs(0)), nnx.Param, ...)
    found = archscale.contrib.find_neuron_groups(growing.squared(outputs), params, batch)
    groups = [one for one in found if one.blocker is None]
    assert [one.name for one in groups] == ["first/kernel"]
    assert "'norms/2/scale' takes the sum of" in (found[0].blocker or "")
    wide, _ = archscale.contrib.widen(params, {"first/kernel": 4}, groups)
    assert named_leaves(wide)["norms/1/scale"].shape == (4,)
    before, after = (jax.jit(outputs)(one, batch[0]) for one in (params, wide))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)


class Decoder(nn.Module):
    """A pre-norm block on tokens; attention is of layers of other forms."""

    hidden: int
    norm: Any
    gated: bool

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": jnp.float64}
        x = nn.Dense(8, name="embed", **options)(x)
        y = self.norm(**options)(x)
        x += nn.MultiHeadDotProductAttention(2, **options)(y, y)
        x = x + self.mlp(self.norm(**options)(x), options)
        return nn.Dense(2, name="readout", **options)(jnp.mean(self.norm(**options)(x), axis=1))

    def mlp(self, x, options):
        up = nn.Dense(self.hidden, name="up", **options)(x)
        gate = nn.Dense(self.hidden, name="gate", **options)(x) if self.gated else None
        hidden = nn.gelu(up) if gate is None else nn.silu(gate) * up
        return nn.Dense(8, name="down", **options)(hidden)


@pytest.mark.parametrize(
    "norm, gated", [(nn.LayerNorm, False), (nn.RMSNorm, True)], ids=["gpt2", "llama"]
)  # fmt: skip
def test_the_mlp_of_a_pre_norm_decoder(norm, gated):
    def outputs(params, inputs):
        hidden = params["up"]["kernel"].shape[-1]
        return Decoder(hidden, norm, gated).apply({"params": params}, inputs)

    images, targets = image_batch()
    batch = images.reshape(len(images), 12, 6), targets
    params = jax.jit(Decoder(3, norm, gated).init)(jax.random.key(0), batch[0])["params"]
    loss = growing.squared(outputs)
    found = archscale.contrib.find_neuron_groups(loss, params, batch)
    groups = [one for one in found if one.blocker is None]
    gates = ("gate/kernel",) if gated else ()
    assert [(one.makers, one.gates, one.consumers) for one in groups] == [
        (("up/kernel",), gates, ("down/kernel",))
    ]
    if gated:
        trains_on(outputs, params, batch, groups)
    stream = next(one for one in found if one.name == "embed/kernel")
    assert stream.producers == ("embed/kernel", "down/kernel")
    assert f"the normalization of '{norm.__name__}_1/scale' before 'up/kernel' is" in (
        stream.blocker or ""
    )
    heads = next(one for one in found if one.name.endswith("query/kernel"))
    assert "accepted are x @ W" in (heads.blocker or "")
    if not gated:
        return
    # What is not asked for may have any form.
    assert list(archscale.bottleneck(loss, params, [batch], layers=["up/kernel"])) == ["up/kernel"]
    with pytest.raises(archscale.TraceError, match="accepted are x @ W"):
        archscale.bottleneck(loss, params, [batch])


def random_stream(seed: int) -> growing.Network:
    """A residual stream of tokens: layers with and without norms, gates, scales and biases."""
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"w0": (4, 3)}
    counts: dict[str, int] = {}
    blocks = [
        (generator.choice(["plain", "normed", "gated"]), bool(generator.integers(2)), place)
        for place in range(3)
    ]
    for kind, normed, place in blocks:
        shapes |= {f"a{place}": (3, 2), f"b{place}": (2, 3), f"c{place}": (3,)}
        shapes |= {f"g{place}": (3, 2)} if kind == "gated" else {}
        counts |= {f"m{place}": 2} if kind == "normed" else {}
        counts |= {f"n{place}": 3} if normed else {}
    stem = bool(generator.integers(2))
    counts |= {"n": 3} if stem else {}

    def outputs(params, inputs):
        x = inputs @ params["w0"]
        x = batch_norm(x, params, "n") if stem else 2 * x
        for kind, normed, place in blocks:
            y = jnp.tanh(x) @ params[f"a{place}"]
            if kind == "normed":
                y = batch_norm(y, params, f"m{place}")
            gate = jax.nn.silu(jnp.tanh(x) @ params[f"g{place}"]) if kind == "gated" else None
            y = jax.nn.gelu(y) if gate is None else gate * y
            y = y @ params[f"b{place}"]
            x = x + (batch_norm(y, params, f"n{place}") if normed else y + params[f"c{place}"])
        return jnp.mean(jnp.tanh(x), axis=1) @ params["w"]

    params = draw(seed, **shapes, w=(3, 2)) | scales(seed, **counts)
    inputs, targets = growing.data(seed, 30, (3, 4), 2)
    return growing.Network(growing.squared(outputs), outputs, params, (inputs + 0.5, targets))


def test_predictions_of_random_programs():
    """Streams in which some layers are normalized and some are not, with gates beside."""
    network = random_stream(3)
    groups = growing.growable(network)
    assert len(groups) == 4  # the stream, and a hidden layer of every block
    measured = measure(network.loss, network.params, [network.batch], groups)
    neurons = solve(network.params, measured, groups, method="random", number=2,
                    key=jax.random.key(3))  # fmt: skip
    extension = extend(network.params, groups, neurons, measured)

    @jax.jit
    @jax.grad
    @jax.grad
    def curvature(amplitude):
        return network.loss(extended(extension, amplitude), network.batch)

    expected = predicted_decrease(neurons, measured, groups)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(-0.5 * curvature(0.0), expected, rtol=2e-3)
