"""Neurons found in functions that are known by construction, and slots for them."""

import functools
import re
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.contrib._growth.extension import extend, extended
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.neuron_groups import Link, NeuronGroup
from archscale_jax.contrib._growth.solve import predicted_decrease, solve
from archscale_jax.contrib._growth.widen import occupied
from tests import growing
from tests.growing import convolve, draw

pytestmark = pytest.mark.quick_compilation

LAST = "no layer follows: the result depends on its outputs themselves"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def learnable(*inputs: int, outputs: int = 2, count: int = 40):
    """Examples whose targets a network of a few neurons could compute."""
    generator = np.random.default_rng(5)
    found = generator.normal(size=(count, *inputs))
    rows = found.reshape(count, -1)
    hidden = np.tanh(rows @ generator.normal(size=(rows.shape[1], 8)) / np.sqrt(rows.shape[1]))
    return jnp.asarray(found), jnp.asarray(hidden @ generator.normal(size=(8, outputs)))


with jax.enable_x64(True):
    VECTORS = learnable(5)
    IMAGES = learnable(4, 4, 2)
    SEQUENCES = learnable(5, 4)
    CHAIN = draw(0, w1=(5, 4), b1=(4,), w2=(4, 2))
    CONVOLUTIONS = draw(0, k1=(3, 3, 2, 3), k2=(3, 3, 3, 2), w=(3, 2))


squared = functools.cache(growing.squared)  # what is compiled for a loss is found again


def find(outputs, params, batch=VECTORS) -> dict[str, NeuronGroup]:
    found = archscale.contrib.find_neuron_groups(squared(outputs), params, batch)
    assert [one.name for one in found] == [one.producers[0] for one in found]
    assert hash(found) == hash(found)
    return {one.name: one for one in found}


def hidden(between, params, inputs):
    """Two dense layers with something between."""
    return between(inputs @ params["w1"] + params["b1"]) @ params["w2"]


# What is found.


def test_a_chain_of_dense_layers():
    network = growing.chain()
    assert archscale.contrib.find_neuron_groups(network.loss, network.params, network.batch) == (
        NeuronGroup("w1", ("w1",), (("b1", 0, "zero"),), (Link("w1", "w2", "same", 1.0),), None),
        NeuronGroup("w2", ("w2",), (("b2", 0, "zero"),), (Link("w2", "w3", "same", 1.0),), None),
        NeuronGroup("w3", ("w3",), (), (), LAST),
    )


@pytest.mark.parametrize(
    "activation, slope",
    [
        (lambda x: x, 1.0),
        (jnp.sin, 1.0),
        (lambda x: 3 * jnp.tanh(x), 3.0),
        (jax.nn.relu, 0.5),
        (jax.nn.relu6, 0.5),
        (jax.nn.gelu, 0.5),
        (jax.nn.silu, 0.5),
        (jax.nn.leaky_relu, 0.505),
        (jax.nn.elu, 1.0),
    ],
    ids=["linear", "sin", "3tanh", "relu", "relu6", "gelu", "silu", "leaky_relu", "elu"],
)
def test_slopes(activation, slope):
    group = find(functools.partial(hidden, activation), CHAIN)["w1"]
    assert [link[:3] for link in group.links] == [("w1", "w2", "same")]
    assert group.links[0].slope == pytest.approx(slope, abs=1e-3)
    assert group.slope == group.slope_between("w1", "w2") == group.links[0].slope
    assert group.slope_between("w2", "w1") == 0 and group.joint("w2") == "same"


@pytest.mark.parametrize(
    "read, rows, joint, slope",
    [
        (lambda x: jnp.mean(jax.nn.relu(x), axis=(1, 2)), 3, "mean", 0.5),
        (lambda x: jax.nn.relu(jnp.mean(x, axis=(1, 2))), 3, "mean", 0.5),
        (lambda x: jnp.sum(jnp.tanh(x), axis=(1, 2)), 3, "mean", 16.0),
        (lambda x: nn.avg_pool(x, (4, 4)).reshape(len(x), -1), 3, "mean", 1.0),
        (lambda x: jnp.tanh(x).reshape(len(x), -1), 48, "flat", 1.0),
    ],
    ids=["activation_then_mean", "mean_then_activation", "sum", "pool", "flat"],
)
def test_positions_that_are_joined(read, rows, joint, slope):
    params = draw(0, k1=(3, 3, 2, 3), w=(rows, 2))
    group = find(lambda p, x: read(convolve(x, p["k1"])) @ p["w"], params, IMAGES)["k1"]
    assert group.links == (Link("k1", "w", joint, slope),)


def test_strides_and_dilations_leave_positions_to_the_layer():
    def outputs(params, inputs):
        hidden = jnp.tanh(convolve(inputs, params["k1"], 2))
        hidden = lax.conv_general_dilated(
            hidden, params["k2"], (1, 1), "SAME", rhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.mean(hidden, axis=(1, 2))

    groups = find(outputs, CONVOLUTIONS | {"w": CONVOLUTIONS["k2"]}, IMAGES)
    assert groups["k1"].links == (Link("k1", "k2", "same", 1.0),)
    assert groups["k2"].blocker == LAST


def test_vectors_and_what_a_new_neuron_begins_with():
    def outputs(params, inputs):
        x = (inputs @ params["w1"]) * params["scale"] + params["offset"]
        x = jnp.where(x > 0, x, params["alpha"] * x)  # PReLU
        return (x * jnp.exp(params["log_scale"])) @ params["w2"] * params["gain"]

    vectors = {
        "scale": jnp.array([1.0, 2.0, 1.0, 2.0]),
        "offset": jnp.array([0.3, 0.1, -0.2, 0.1]),
        "alpha": jnp.full(4, 0.2),
        "log_scale": jnp.zeros(4),
        "gain": jnp.ones(()),
    }
    params = {name: leaf for name, leaf in CHAIN.items() if name != "b1"} | vectors
    group = find(outputs, params)["w1"]
    assert set(group.vectors) == {
        ("scale", 0, "mean"), ("offset", 0, "zero"), ("alpha", 0, "mean"),
        ("log_scale", 0, "mean"),
    }  # fmt: skip
    assert group.slope == pytest.approx(1.5 * 0.6, abs=1e-3)
    wide, _ = archscale.contrib.widen(params, {"w1": 6}, [group])
    np.testing.assert_allclose(wide["scale"][4:], 1.5)
    np.testing.assert_array_equal(wide["offset"][4:], 0)
    np.testing.assert_allclose(wide["alpha"][4:], 0.2)
    assert wide["gain"].shape == ()


def test_biases_of_every_position():
    params = draw(0, w1=(4, 3), bias=(5, 3), w2=(3, 2))
    groups = find(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["w1"] + p["bias"]) @ p["w2"], axis=1),
        params,
        SEQUENCES,
    )
    assert groups["w1"].vectors == (("bias", 1, "zero"),)


def test_biases_with_axes_of_one_entry():
    params = CHAIN | {"b1": CHAIN["b1"][None]}
    assert find(functools.partial(hidden, jnp.tanh), params)["w1"].vectors == (("b1", 1, "zero"),)


@pytest.mark.parametrize("activation, bias", [(jax.nn.relu, -5.0), (jnp.tanh, 30.0)])
def test_biases_do_not_hide_features(activation, bias):
    params = CHAIN | {"b1": jnp.array([bias, 0, 0, 0])}
    assert find(functools.partial(hidden, activation), params)["w1"].blocker is None


def test_residual_streams_join_producers_and_consumers_in_layer_order():
    network = growing.residual()
    found = archscale.contrib.find_neuron_groups(network.loss, network.params, network.batch)
    assert [(one.producers, one.consumers) for one in found] == [
        (("stem", "a2"), ("a1", "skip", "b1")),
        (("a1",), ("a2",)),
        (("skip", "b2"), ("w",)),
        (("b1",), ("b2",)),
        (("w",), ()),
    ]
    first = found[0]
    assert {(link.producer, link.consumer) for link in first.links} == {
        ("stem", "a1"), ("stem", "skip"), ("stem", "b1"), ("a2", "skip"), ("a2", "b1"),
    }  # fmt: skip
    # What is written later is not read earlier.
    assert first.slope_between("a2", "a1") == 0 and first.slope_between("a2", "b1") == 1
    assert found[2].joint("w") == "mean"
    assert [one.blocker for one in found] == [None] * 4 + [LAST]


def test_a_layer_in_its_own_stream():
    def outputs(params, inputs):
        hidden = inputs @ params["w1"]
        return jnp.tanh(hidden + jnp.tanh(hidden @ params["mix"])) @ params["w2"]

    groups = find(outputs, draw(0, w1=(5, 3), mix=(3, 3), w2=(3, 2)))["w1"]
    assert groups.producers == ("w1", "mix") and groups.consumers == ("mix", "w2")
    assert groups.slope_between("mix", "mix") == 0


def test_two_readouts():
    def loss(params, batch):
        hidden = jnp.tanh(batch[0] @ params["w1"])
        policy, value = hidden @ params["policy"], hidden @ params["value"]
        return jnp.mean(jnp.square(policy - batch[1])) + jnp.mean(jnp.square(value))

    params = draw(0, w1=(5, 4), policy=(4, 2), value=(4, 1))
    found = archscale.contrib.find_neuron_groups(loss, params, VECTORS)
    assert [one.blocker for one in found] == [None, LAST, LAST]
    assert found[0].consumers == ("policy", "value")


# What stands in the way.


def normalized(axis, x):
    return (x - jnp.mean(x, axis, keepdims=True)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 1e-5)


def halves(x):
    first, second = jnp.split(x, 2, axis=-1)
    return first * jnp.tanh(second)


FEATURES = "features of a layer that reads it depend on others of its features too"
NOT_0 = "a neuron that is 0 is not 0 where 'w2' reads it: its activation is not 0 at 0"
FLAT = "what follows is flat at 0: a small neuron has no effect"
NORMALIZED = "a normalization without a scale that could be 0 stands before 'w2'"


@pytest.mark.parametrize(
    "between, rows, blocker",
    [
        (functools.partial(normalized, -1), 4, FEATURES),
        (lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)), 4, FEATURES),
        (jax.nn.softmax, 4, FEATURES),
        (halves, 2, FEATURES),
        (lambda x: x[:, ::-1], 4, FEATURES),
        (lambda x: x[:, :3], 3, FEATURES),
        (functools.partial(normalized, 0), 4, NORMALIZED),
        (jax.nn.sigmoid, 4, NOT_0),
        (jnp.cos, 4, NOT_0),
        (lambda x: x + 1, 4, NOT_0),
        (jnp.square, 4, FLAT),
        (jnp.abs, 4, FLAT),
        (lambda x: jax.nn.relu(x - 1), 4, FLAT),
    ],
    ids=["layer_norm", "rms_norm", "softmax", "split", "reversed", "slice", "batch_norm",
         "sigmoid", "cos", "shifted", "square", "abs", "dead"],
)  # fmt: skip
def test_blockers_between_dense_layers(between, rows, blocker):
    params = CHAIN | {"w2": CHAIN["w2"][:rows]}
    found = find(functools.partial(hidden, between), params)
    assert found["w1"].blocker is not None and blocker in found["w1"].blocker
    assert found["w1"].links == () and found["w2"].blocker == LAST


@pytest.mark.parametrize(
    "between",
    [
        functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
        functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2)),
        lambda x: jnp.roll(x, 1, axis=1),
        lambda x: jnp.repeat(x, 2, axis=1),
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x * jnp.arange(4.0)[:, None],
    ],
    ids=["max_pool", "avg_pool", "roll", "upsample", "transpose", "weighted"],
)
def test_blockers_between_convolutions(between):
    def outputs(params, inputs):
        hidden = jnp.tanh(convolve(between(jnp.tanh(convolve(inputs, params["k1"]))), params["k2"]))
        return jnp.max(hidden, axis=(1, 2)) @ params["w"]

    params = CONVOLUTIONS | {"w": CONVOLUTIONS["w"][:2]}
    found = find(outputs, params, IMAGES)
    assert found["k1"].blocker == "positions are pooled or moved between 'k1' and 'k2'"
    assert found["k2"].blocker == "positions are pooled or moved between 'k2' and 'w'"


def test_blockers_of_joined_features():
    def joined(params, inputs):
        both = [jnp.tanh(inputs @ params[name]) for name in ("w1", "w3")]
        return jnp.concatenate(both, axis=-1) @ params["w2"]

    for widths in ((4, 3), (4, 4)):
        params = draw(0, w1=(5, widths[0]), w3=(5, widths[1]), w2=(sum(widths), 2))
        found = find(joined, params)
        assert found["w1"].producers == ("w1", "w3")
        assert (found["w1"].blocker or "").startswith(FEATURES)

    def channels_first(params, inputs):
        features = jnp.tanh(convolve(inputs, params["k1"])).transpose(0, 3, 1, 2)
        return features.reshape(len(inputs), -1) @ params["w"]

    found = find(channels_first, draw(0, k1=(3, 3, 2, 3), w=(48, 2)), IMAGES)
    assert (found["k1"].blocker or "").startswith(FEATURES)


def test_layers_that_nothing_reads_do_not_matter_to_the_others():
    def outputs(params, inputs):
        _ = inputs @ params["w3"]
        return jnp.tanh(inputs @ params["w1"]) @ params["w2"] + 0 * jnp.sum(inputs @ params["w4"])

    found = find(outputs, draw(0, w1=(5, 4), w2=(4, 2), w3=(5, 3), w4=(5, 3)))
    assert found["w3"].blocker == found["w4"].blocker == "no layer reads its outputs"
    assert found["w1"].blocker is None


def test_layers_with_different_positions():
    def outputs(params, inputs):
        features = jnp.mean(convolve(inputs, params["k1"]), axis=(1, 2))
        return jnp.tanh(features + inputs[:, 0, 0] @ params["w1"]) @ params["w2"]

    params = draw(0, k1=(3, 3, 2, 3), w1=(2, 3), w2=(3, 2))
    found = find(outputs, params, IMAGES)
    assert found["k1"].producers == ("k1", "w1")
    assert found["k1"].blocker == "the layers that make it have different positions"


def test_widths_that_the_inputs_fix():
    def outputs(params, inputs):
        return jnp.tanh(inputs + inputs @ params["w1"]) @ params["w2"]

    params = draw(0, w1=(5, 5), w2=(5, 2))
    assert find(outputs, params)["w1"].blocker == NOT_0
    # Three examples whose first feature is 0, as pixels at an edge, do not tell; widening does.
    batch = VECTORS[0].at[:3, 0].set(0), VECTORS[1]
    group = find(outputs, params, batch)["w1"]
    assert group.blocker is None
    with pytest.raises(ValueError, match=r"does not take the wider arrays .*'w1': \(5, 6\)"):
        archscale.grow(squared(outputs), params, [batch], batch, [group], number=1)


# The same neurons however a function is written.


def test_transformations_and_types_do_not_matter():
    def outputs(params, inputs):
        return hidden(jnp.tanh, params, inputs)

    def one_by_one(params, inputs):
        return jax.vmap(functools.partial(outputs, params))(inputs)

    def moved(params, inputs):
        return jnp.einsum("io,ni->no", params["w2"], jnp.tanh(params["b1"] + inputs @ params["w1"]))

    expected = find(outputs, CHAIN)
    for other in (jax.jit(outputs), jax.checkpoint(outputs), one_by_one, moved):
        assert find(other, CHAIN) == expected
    assert find(outputs, CHAIN, jax.tree.map(lambda array: array[:1], VECTORS)) == expected
    bytes_ = jnp.arange(200, dtype=jnp.uint8).reshape(40, 5), VECTORS[1]
    assert find(lambda p, x: outputs(p, x / 255), CHAIN, bytes_) == expected
    for dtype, error in ((jnp.float32, 1e-3), (jnp.float16, 1e-3), (jnp.bfloat16, 1e-2)):
        params, batch = jax.tree.map(lambda leaf: leaf.astype(dtype), (CHAIN, VECTORS))  # noqa: B023
        found = find(outputs, params, batch)["w1"]
        assert found.slope == pytest.approx(1, abs=error)
        assert found._replace(links=()) == expected["w1"]._replace(links=())


def test_lists_of_pairs():
    def outputs(params, inputs):
        for weight, bias in params[:-1]:
            inputs = jax.nn.gelu(inputs @ weight + bias)
        return inputs @ params[-1][0] + params[-1][1]

    shapes = [(5, 4), (4, 3), (3, 2)]
    params = [(draw(seed, w=shape)["w"], jnp.zeros(shape[1])) for seed, shape in enumerate(shapes)]
    groups = find(outputs, params)
    assert [one.producers + one.consumers for one in groups.values()] == [
        ("0/0", "1/0"), ("1/0", "2/0"), ("2/0",),
    ]  # fmt: skip
    assert groups["1/0"].vectors == (("1/1", 0, "zero"),)


def test_embeddings_are_read_but_not_grown():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (40, 5))), VECTORS[1]
    params = draw(0, table=(7, 4), w1=(4, 3), b1=(3,), w2=(3, 4), w3=(4, 2))

    def outputs(params, tokens):
        embedded = params["table"][tokens]
        block = jnp.tanh(embedded @ params["w1"] + params["b1"]) @ params["w2"]
        return jnp.mean(embedded + block, axis=1) @ params["w3"]

    found = find(outputs, params, tokens)
    assert found["w1"].consumers == ("w2",) and found["w1"].blocker is None
    assert found["w2"].blocker == NOT_0.replace("'w2'", "'w3'")  # the table has no place for one
    check_slots(outputs, params, tokens[0], [found["w1"]])

    def added(params, batch):
        return jnp.tanh(params["table"][batch[0]] + batch[1] @ params["w1"]) @ params["w2"]

    params = draw(0, w1=(5, 4), w2=(4, 2)) | {"table": jnp.zeros((7, 4))}
    batch = (jnp.arange(40) % 7, VECTORS[0]), VECTORS[1]
    group = find(added, params, batch)["w1"]
    assert group.vectors == (("table", 1, "mean"),) and group.blocker is None
    wide, _ = archscale.contrib.widen(params, {"w1": 6}, [group])
    assert wide["table"].shape == (7, 6)


def depthwise(params, inputs):
    hidden = jnp.tanh(convolve(inputs, params["k1"]))
    hidden = lax.conv_general_dilated(
        hidden, params["depthwise"], (1, 1), "SAME", feature_group_count=3,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return jnp.mean(hidden, axis=(1, 2)) @ params["w"]


def scanned(params, inputs):
    def layer(features, weight):
        return jnp.tanh(features @ weight), None

    return lax.scan(layer, inputs @ params["w1"], params["stack"])[0] @ params["w2"]


OTHERS: dict[str, Any] = {
    "scan": (scanned, {"w1": (5, 4), "stack": (3, 4, 4), "w2": (4, 2)}, "stack",
             "the layer of .'stack'. .* made of several leaves"),
    "depthwise": (depthwise, {"k1": (3, 3, 2, 3), "depthwise": (3, 3, 1, 3), "w": (3, 2)},
                  "depthwise", "'depthwise' .* in one group"),
    "tied": (lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w1"] @ p["w2"],
             {"w1": (5, 5), "w2": (5, 2)}, "w1", "2 layers share the weight 'w1'"),
    "reordered": (
        lambda p, x: jnp.tanh(x @ p["w1"].astype(jnp.float32)[::-1]) @ p["w2"],
        {"w1": (5, 4), "w2": (4, 2)}, "w1", "'w1' .* is transposed or changed first"),
    "weight_norm": (
        lambda p, x: jnp.tanh(x @ (p["w1"] / jnp.linalg.norm(p["w1"], axis=0))) @ p["w2"],
        {"w1": (5, 4), "w2": (4, 2)}, "w1", "'w1' .* is transposed or changed first"),
    "transposed": (lambda p, x: jnp.einsum("oi,ni->no", p["w1"], x) @ p["w2"],
                   {"w1": (4, 5), "w2": (4, 2)}, "w1", "accepted are x @ W"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_forms_are_blocked_and_raise_where_they_are_measured(name):
    outputs, shapes, weight, match = OTHERS[name]
    params, batch = draw(0, **shapes), IMAGES if name == "depthwise" else VECTORS
    found = find(outputs, params, batch)
    assert re.search(match, found[weight].blocker or "") and found[weight].producers == (weight,)
    assert all(one.blocker for one in found.values())
    with pytest.raises(archscale.TraceError, match=match):
        archscale.bottleneck(squared(outputs), params, [batch])


# Models of other libraries.


def check_growth(outputs, params, batch, groups):
    """A neuron in each lowers the loss on other examples; the network trains on."""
    loss = squared(outputs)
    first, other = (jax.tree.map(lambda leaf: leaf[part::2], batch) for part in (0, 1))  # noqa: B023
    optimizer = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(loss)(params, first)
        updates, state = optimizer.update(gradients, state, params)
        after = optax.apply_updates(params, updates)
        return loss(params, other), loss(params, first), loss(after, first)

    state = jax.jit(optimizer.init)(params)
    growth = archscale.grow(
        loss, params, [first], other, groups, number=1,
        optimizer=lambda params: optimizer, optimizer_state=state,
    )  # fmt: skip
    assert growth.losses[1] < growth.losses[0] and growth.predicted > 0
    # The network with slots does what the one without did.
    np.testing.assert_allclose(growth.losses[0], jax.jit(loss)(params, other), rtol=1e-9)
    held_out, before, after = step(growth.params, growth.optimizer_state)
    np.testing.assert_allclose(growth.losses[1], held_out, rtol=1e-6)
    assert after < before
    counts = [archscale.contrib.count_neurons(one, groups) for one in (params, growth.params)]
    assert counts[1] == {name: count + 1 for name, count in counts[0].items()}
    return growth


def check_slots(outputs, params, inputs, groups):
    wide, _ = archscale.contrib.widen(
        params, {one.name: len(occupied(params, one)) + 2 for one in groups}, groups
    )
    outputs = jax.jit(outputs)
    np.testing.assert_allclose(outputs(wide, inputs), outputs(params, inputs), atol=1e-12)


class LinenMLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.tanh(nn.Dense(width, param_dtype=jnp.float64)(x))
        return nn.Dense(2, param_dtype=jnp.float64)(x)


def linen_names(groups):
    return {name: (one.vectors, one.consumers) for name, one in groups.items() if not one.blocker}


def test_a_linen_module_built_from_the_shapes_of_params():
    def outputs(params, inputs):
        widths = tuple(params[f"Dense_{place}"]["bias"].size for place in range(2))
        return LinenMLP(widths).apply({"params": params}, inputs)

    params = jax.jit(LinenMLP((4, 3)).init)(jax.random.key(0), VECTORS[0])["params"]
    groups = find(outputs, params)
    assert linen_names(groups) == {
        "Dense_0/kernel": ((("Dense_0/bias", 0, "zero"),), ("Dense_1/kernel",)),
        "Dense_1/kernel": ((("Dense_1/bias", 0, "zero"),), ("Dense_2/kernel",)),
    }
    growth = check_growth(outputs, params, VECTORS, list(groups.values())[:2])
    assert growth.params["Dense_1"]["kernel"].shape == (5, 4)


def test_a_linen_module_of_fixed_features():
    """It grows where it begins with empty slots, and says so where it does not."""

    def outputs(params, inputs):
        return LinenMLP((6,)).apply({"params": params}, inputs)

    full = jax.jit(LinenMLP((6,)).init)(jax.random.key(0), VECTORS[0])["params"]
    params = jax.tree.map(np.array, full)
    params["Dense_0"]["kernel"][:, 3:] = params["Dense_1"]["kernel"][3:] = 0
    groups = [find(outputs, params)["Dense_0/kernel"]]
    assert archscale.contrib.count_neurons(params, groups) == {"Dense_0/kernel": 3}
    growth = check_growth(outputs, params, VECTORS, groups)
    assert jax.tree.map(jnp.shape, growth.params) == jax.tree.map(jnp.shape, params)
    batch = jax.tree.map(lambda leaf: leaf[::2], VECTORS)
    with pytest.raises(ValueError, match="does not take the wider .* begin with empty slots"):
        archscale.grow(squared(outputs), full, [batch], batch, groups, number=1)


def test_a_linen_network_with_normalization():
    class Network(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x):
            x = nn.relu(self.norm()(nn.Dense(4, param_dtype=jnp.float64)(x)))
            return nn.Dense(2, param_dtype=jnp.float64)(x)

    def first(norm) -> NeuronGroup:
        model = Network(norm)
        variables = dict(jax.jit(model.init)(jax.random.key(0), VECTORS[0]))
        params = variables.pop("params")

        def outputs(params, inputs):
            return model.apply({"params": params, **variables}, inputs, mutable=list(variables))[0]

        return next(iter(find(outputs, params).values()))

    blocker = first(nn.LayerNorm).blocker or ""
    assert blocker.startswith(FEATURES) and "'LayerNorm_0/scale'" in blocker
    assert blocker.endswith("contrib.expand widens it")
    found = first(functools.partial(nn.BatchNorm, use_running_average=False))
    assert found.blocker is None and found.links == (
        Link("Dense_0/kernel", "Dense_1/kernel", "same", 0.5, "BatchNorm_0/scale"),
    )
    assert ("BatchNorm_0/scale", 0, "mean") in found.vectors
    assert ("BatchNorm_0/bias", 0, "zero") in found.vectors
    # With its averages fixed it is a scale.
    found = first(functools.partial(nn.BatchNorm, use_running_average=True))
    assert found.blocker is None and found.slope == pytest.approx(0.5, abs=1e-3)


class Affine(eqx.Module):
    """A layer of Equinox with the inputs first."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x, *, key=None):
        return x @ self.weight + self.bias


def test_equinox():
    model = eqx.nn.Sequential([
        Affine(*draw(0, w=(5, 4), b=(4,)).values()),
        eqx.nn.Lambda(jnp.tanh),
        Affine(*draw(1, w=(4, 2), b=(2,)).values()),
    ])  # fmt: skip
    params, static = eqx.partition(model, eqx.is_array)

    def outputs(params, inputs):
        return jax.vmap(eqx.combine(params, static))(inputs)

    group = find(outputs, params)["layers/0/weight"]
    assert group.vectors == (("layers/0/bias", 0, "zero"),)
    growth = check_growth(outputs, params, VECTORS, [group])
    grown = eqx.combine(growth.params, static)
    assert isinstance(grown.layers[0], Affine) and grown.layers[0].weight.shape == (5, 5)

    # Its own layers multiply from the left.
    mlp = eqx.nn.MLP(5, 2, 4, 1, key=jax.random.key(0), dtype=jnp.float64)
    params, rest = eqx.partition(mlp, eqx.is_array)
    found = find(lambda params, inputs: jax.vmap(eqx.combine(params, rest))(inputs), params)
    assert list(found) == [f"layers/{place}/weight" for place in range(2)]
    assert all("accepted are x @ W with W" in (one.blocker or "") for one in found.values())


def test_haiku():
    def transformed(widths):
        model = hk.transform(lambda x: hk.nets.MLP(widths, activation=jnp.tanh)(x))
        return hk.without_apply_rng(model)

    def outputs(params, inputs):
        widths = [params[f"mlp/~/linear_{place}"]["b"].size for place in range(3)]
        return transformed(widths).apply(params, inputs)

    params = jax.jit(transformed([4, 3, 2]).init)(jax.random.key(0), VECTORS[0])
    groups = find(outputs, params)
    assert linen_names(groups) == {
        f"mlp/~/linear_{place}/w": (
            ((f"mlp/~/linear_{place}/b", 0, "zero"),), (f"mlp/~/linear_{place + 1}/w",)
        )
        for place in range(2)
    }  # fmt: skip
    check_slots(outputs, params, VECTORS[0], [groups["mlp/~/linear_1/w"]])


def test_nnx_leaves_other_state_alone():
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(5, 4, param_dtype=jnp.float64, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.gelu(self.first(x))))

    network = Network(nnx.Rngs(0))
    network.eval()
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def outputs(params, inputs):
        return nnx.merge(graphdef, params, rest)(inputs)

    groups = find(outputs, params)
    check_slots(outputs, params, VECTORS[0], [groups["first/kernel"]])


def transformer(params, inputs):
    """A block on tokens, its layers normalized before."""
    x = inputs @ params["embed"]
    y = normalized(-1, x)
    query, key, value = (y @ params[name] for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("nid,njd->nij", query, key))
    x += jnp.einsum("nij,njd->nid", weights, value) @ params["output"]
    x += jax.nn.gelu(normalized(-1, x) @ params["widen"] + params["bias"]) @ params["narrow"]
    return jnp.mean(x, axis=1) @ params["head"]


def test_transformers_grow_their_feed_forward_blocks():
    params = draw(
        0, embed=(4, 6), query=(6, 4), key=(6, 4), value=(6, 4), output=(4, 6), widen=(6, 5),
        bias=(5,), narrow=(5, 6), head=(6, 2),
    )  # fmt: skip
    found = find(transformer, params, SEQUENCES)
    stream, attention = found["embed"], found["query"]
    assert stream.producers == ("embed", "output", "narrow")
    assert attention.producers == ("query", "key", "value")
    for one in (stream, attention):
        assert (one.blocker or "").startswith(FEATURES)
    assert "the normalization before 'query' is taken over features" in (stream.blocker or "")
    assert "as in heads of attention; contrib.expand" in (attention.blocker or "")
    able = [one for one in found.values() if one.blocker is None]
    assert [(one.producers, one.consumers) for one in able] == [(("widen",), ("narrow",))]
    check_growth(transformer, params, SEQUENCES, able)


# Slots.


@pytest.fixture(scope="module", params=growing.NETWORKS)
def slots_case(request):
    with jax.enable_x64(True):
        network = growing.NETWORKS[request.param]()
        yield network.params, growing.growable(network)


def equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@settings(max_examples=15)
@given(data=st.data())
def test_laws_of_slots(slots_case, data):
    params, groups = slots_case
    counts = archscale.contrib.count_neurons(params, groups)
    chosen = data.draw(st.lists(st.sampled_from(sorted(counts)), unique=True))
    extra = {name: data.draw(st.integers(0, 4)) for name in chosen}
    capacity = {name: counts[name] + extra[name] for name in chosen}
    wide, state = archscale.contrib.widen(params, capacity, groups)
    assert state is None
    leaves = named_leaves(wide)
    for one in groups:
        slots = capacity.get(one.name, counts[one.name])
        assert all(leaves[name].shape[-1] == slots for name in one.producers)
        assert all(leaves[name].shape[axis] == slots for name, axis, _ in one.vectors)
    # Nothing is occupied, counted or lost.
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert archscale.contrib.count_neurons(wide, groups) == counts
    assert archscale.contrib.count_parameters(wide, groups) == size
    back = archscale.contrib.compact(wide, groups)
    equal(jax.tree.map(jnp.asarray, back), params)
    # One after the other is as good as all at once, and less as good as more.
    step = params
    for name in chosen:
        step, _ = archscale.contrib.widen(step, {name: counts[name] + extra[name] // 2}, groups)
        step, _ = archscale.contrib.widen(step, {name: capacity[name]}, groups)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), step, wide)


@settings(max_examples=30)
@given(first=st.lists(st.booleans(), min_size=4, max_size=4),
       second=st.lists(st.booleans(), min_size=3, max_size=3))  # fmt: skip
def test_compact_takes_out_what_is_empty_wherever_it_is(first, second):
    network = growing.chain()
    params = jax.tree.map(np.asarray, network.params)
    left, right = np.array(first), np.array(second)
    params |= {"w1": params["w1"] * left, "w3": params["w3"] * right[:, None],
               "w2": params["w2"] * left[:, None] * right}  # fmt: skip
    groups = [
        NeuronGroup("w1", ("w1",), (("b1", 0, "zero"),), (Link("w1", "w2", "same", 1.0),), None),
        NeuronGroup("w2", ("w2",), (("b2", 0, "zero"),), (Link("w2", "w3", "same", 1.0),), None),
    ]
    # A neuron that others read has its fan-out left, whatever its own fan-in is.
    np.testing.assert_array_equal(occupied(params, groups[0]), left)
    small = archscale.contrib.compact(params, groups)
    assert small["w2"].shape == (left.sum(), right.sum())
    np.testing.assert_array_equal(small["b1"], params["b1"][left])

    def outputs(params):
        hidden = np.tanh(np.asarray(network.batch[0]) @ params["w1"] + params["b1"])
        return np.tanh(hidden @ params["w2"] + params["b2"]) @ params["w3"]

    np.testing.assert_allclose(outputs(small), outputs(params), atol=1e-12)
    assert archscale.contrib.count_parameters(params, groups) == sum(map(np.size, small.values()))


def test_one_neuron_is_enough():
    """Layers of one neuron, dense and convolutional, are found."""
    params = draw(0, w1=(5, 1), w2=(1, 1), w3=(1, 2)) | {"b1": jnp.ones(1)}

    def outputs(params, inputs):
        return (
            jnp.tanh(jnp.tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"]) @ params["w3"]
        )

    groups = find(outputs, params)
    assert groups["w1"].vectors == (("b1", 0, "zero"),) and groups["w2"].vectors == ()
    check_slots(outputs, params, VECTORS[0], list(groups.values())[:2])

    params = draw(0, k1=(3, 3, 2, 1), w=(16, 2))
    found = find(
        lambda p, x: jnp.tanh(convolve(x, p["k1"])).reshape(len(x), -1) @ p["w"], params, IMAGES
    )
    assert found["k1"].links == (Link("k1", "w", "flat", 1.0),)


# What was wrong once, and what raises although it could grow.


def defect(reason: str, error: type[Exception] = AssertionError):
    return pytest.mark.xfail(reason=reason, raises=error, strict=True)


def check_derivative(outputs, params, batch=VECTORS):
    """What is predicted is -½ d²L/dγ² at γ = 0, and a fall."""
    loss = squared(outputs)
    groups = archscale.contrib.find_neuron_groups(loss, params, batch)[:1]
    measured = measure(loss, params, [batch], groups)
    neurons = solve(params, measured, groups, number=1)
    extension = extend(params, groups, neurons, measured)

    @jax.jit
    @jax.grad
    @jax.grad
    def curvature(amplitude):
        return loss(extended(extension, amplitude), batch)

    predicted = predicted_decrease(neurons, measured, groups)
    assert predicted > 0
    np.testing.assert_allclose(-0.5 * curvature(0.0), predicted, rtol=2e-3)


def test_slopes_below_0():
    check_derivative(functools.partial(hidden, lambda x: jnp.tanh(-x)), CHAIN)


def test_a_layer_in_its_own_stream_grows():
    def outputs(params, inputs):
        hidden = inputs @ params["w1"]
        return jnp.tanh(hidden + jnp.tanh(hidden) @ params["mix"]) @ params["w2"]

    check_derivative(outputs, draw(0, w1=(5, 3), mix=(3, 3), w2=(3, 2)))


def test_scales_of_every_position():
    def outputs(params, inputs):
        return jnp.mean(jnp.tanh((inputs @ params["w1"]) * params["scale"]) @ params["w2"], axis=1)

    # A neuron has no one slope there.
    scale = jnp.arange(1.0, 6.0)[:, None] * jnp.ones(3)
    params = draw(0, w1=(4, 3), w2=(3, 2)) | {"scale": scale}
    assert find(outputs, params, SEQUENCES)["w1"].blocker is not None


def test_a_bias_that_features_share():
    params = CHAIN | {"b1": jnp.array([0.1])}
    group = find(functools.partial(hidden, jnp.tanh), params)["w1"]
    assert group.vectors == () and group.blocker is not None


def test_saturated_activations():
    group = find(functools.partial(hidden, lambda x: jnp.clip(x, -1, 1)), CHAIN)["w1"]
    assert group.blocker is None and group.slope == pytest.approx(1)


def test_small_slopes():
    group = find(functools.partial(hidden, lambda x: 1e-5 * jnp.tanh(x)), CHAIN)["w1"]
    assert group.blocker is None and group.slope == pytest.approx(1e-5, rel=1e-3)


def test_branches_that_begin_with_0():
    def outputs(params, inputs):
        stream = inputs @ params["w1"]
        stream += params["alpha"] * (jnp.tanh(stream @ params["w2"]) @ params["w3"])
        return jnp.tanh(stream) @ params["w4"]

    params = draw(0, w1=(5, 3), w2=(3, 4), w3=(4, 3), w4=(3, 2)) | {"alpha": jnp.zeros(())}
    found = find(outputs, params)
    assert found["w1"].producers == ("w1", "w3")
    assert found["w1"].slope_between("w1", "w4") == 1  # alpha is 0 as yet
    assert found["w1"].slope_between("w3", "w4") == 0


@defect("what is flat but not even counts as moved")
@pytest.mark.parametrize("activation", [lambda x: x**3, lambda x: jax.nn.relu(x) ** 2])
def test_curved_activations_are_flat_at_0(activation):
    assert find(functools.partial(hidden, activation), CHAIN)["w1"].blocker == FLAT


def test_gates():
    def outputs(params, inputs):
        gate = jax.nn.sigmoid(inputs @ params["gate"])
        return ((inputs @ params["w1"]) * gate) @ params["w2"]

    group = next(iter(find(outputs, draw(0, w1=(5, 4), gate=(5, 4), w2=(4, 2))).values()))
    assert set(group.producers) == {"w1", "gate"}
    assert not (group.blocker or "").startswith("a normalization")


def test_positions_among_the_examples():
    def outputs(params, inputs):
        features = jnp.tanh(inputs.reshape(-1, 4) @ params["w1"])
        return features.reshape(len(inputs), -1) @ params["w2"]

    assert find(outputs, draw(0, w1=(4, 3), w2=(15, 2)), SEQUENCES)["w1"].blocker is not None


def test_keys_and_scalars_in_batches():
    def loss(params, batch):
        features = jnp.tanh(batch["x"] @ params["w1"])
        features += 0 * jax.random.normal(batch["key"], features.shape)
        return batch["weight"] * jnp.mean(jnp.square(features @ params["w2"] - batch["y"]))

    batch = {"x": VECTORS[0], "y": VECTORS[1], "key": jax.random.key(0), "weight": jnp.ones(())}
    with pytest.raises(ValueError, match="batch holds"):
        archscale.contrib.find_neuron_groups(loss, draw(0, w1=(5, 4), w2=(4, 2)), batch)


def test_moments_of_one_neuron():
    params = draw(0, w1=(5, 1), w2=(1, 2)) | {"b1": jnp.ones(1)}
    group = NeuronGroup("w1", ("w1",), (("b1", 0, "zero"),), (Link("w1", "w2", "same", 1.0),), None)
    optimizer = optax.adam(1e-3)
    wide, state = archscale.contrib.widen(
        params, {"w1": 3}, [group], optimizer_state=optimizer.init(params)
    )
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(wide))


def test_readouts_of_0_are_kept():
    params = CHAIN | {"w2": jnp.zeros((4, 2))}
    found = find(functools.partial(hidden, jnp.tanh), params).values()
    assert archscale.contrib.compact(params, found)["w2"].shape == (4, 2)
    assert archscale.contrib.count_parameters(params, found) == 5 * 4 + 4 + 4 * 2


def test_slots_that_change_the_function_raise():
    def outputs(params, inputs):
        features = inputs @ params["w1"]
        width = features.shape[-1]
        scale = jnp.repeat(params["scale"], -(-width // 2), total_repeat_length=width)
        return jnp.tanh(features * scale) @ params["w2"]

    params = draw(0, w1=(5, 4), w2=(4, 2)) | {"scale": jnp.array([1.0, 2.0])}
    loss = squared(outputs)
    groups = archscale.contrib.find_neuron_groups(loss, params, VECTORS)[:1]
    with pytest.raises(ValueError, match="depends on the number of features|cannot grow"):
        archscale.grow(loss, params, [VECTORS], VECTORS, groups, number=2)


def test_penalties_on_weights_leave_the_growth_as_it_is():
    plain = squared(functools.partial(hidden, jnp.tanh))

    def loss(params, batch):
        return plain(params, batch) + 1e-3 * sum(jnp.sum(leaf**2) for leaf in params.values())

    groups = archscale.contrib.find_neuron_groups(loss, CHAIN, VECTORS)[:1]
    grown, expected = (
        archscale.grow(one, CHAIN, [VECTORS], VECTORS, groups, number=1) for one in (loss, plain)
    )
    assert grown.numbers == expected.numbers
    assert jax.tree.map(jnp.shape, grown.params) == jax.tree.map(jnp.shape, expected.params)


def test_the_names_of_version_0_1_warn():
    with pytest.warns(DeprecationWarning, match="Units moved to .*contrib.NeuronGroup; .* 0.3"):
        assert archscale.Units is NeuronGroup
    with pytest.warns(DeprecationWarning, match="contrib.find_neuron_groups"):
        assert archscale.find_units is archscale.contrib.find_neuron_groups
