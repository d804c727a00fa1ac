"""Width multipliers from the axes that a parameter's uses contract and write (theory §10).

With N output features of the whole layer, k inputs that one unit reads, N_b and k_b the base's:
SGD (N/k)/(N_b/k_b), vectors N/N_b, readouts 1/r; Adam k_b/k for what contracts a width, else 1
[μP-TP5, Tables 3 and 8]. Several uses: the strictest counts. Measured where said: the change that
one step of a leaf alone makes must not depend on the width.
"""

import functools
import re
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    KEY,
    Model,
    equinox_model,
    haiku_model,
    linen_model,
    multipliers,
    normal,
    parameter,
    spec,
    specs,
    step_growth,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def both_multipliers(model, base):
    """Those of SGD and those of Adam."""
    return [multipliers(model, base, width_rule=rule) for rule in ("sgd", "adam")]


# Depthwise, grouped and per-head layers


def convolutional(width, groups, bias=True, kernel=(3, 3)):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = RELU(nn.Conv(width, kernel, name="stem", use_bias=False)(x))
            x = nn.Conv(width, kernel, feature_group_count=groups, name="grouped", use_bias=bias)(x)
            x = RELU(nn.Conv(width, (1,) * len(kernel), name="point", use_bias=False)(RELU(x)))
            return nn.Dense(5, use_bias=False)(x.mean(tuple(range(1, 1 + len(kernel)))))

    return linen_model(Net(), normal(4, *(5,) * len(kernel), 3))


def equinox_depthwise(width):
    class Net(eqx.Module):
        stem: eqx.nn.Conv2d
        grouped: eqx.nn.Conv2d
        point: eqx.nn.Conv2d
        out: eqx.nn.Linear

        def __init__(self, key):
            self.stem = eqx.nn.Conv2d(3, width, 3, key=key)
            self.grouped = eqx.nn.Conv2d(width, width, 3, groups=width, key=key)
            self.point = eqx.nn.Conv2d(width, width, 1, key=key)
            self.out = eqx.nn.Linear(width, 5, key=key)

        def __call__(self, x):
            x = RELU(self.point(RELU(self.grouped(RELU(self.stem(x))))))
            return self.out(x.mean((1, 2)))

    return equinox_model(Net, normal(2, 3, 6, 6))


def haiku_depthwise(width):
    def network(x):
        x = RELU(hk.Conv2D(width, 3, name="stem")(x))
        x = RELU(hk.DepthwiseConv2D(1, 3, name="grouped")(x))
        x = RELU(hk.Conv2D(width, 1, name="point")(x))
        return hk.Linear(5)(x.mean((1, 2)))

    return haiku_model(network, normal(2, 6, 6, 3))


def causal_depthwise(width):
    """Mamba's short convolution: a kernel [window, n] multiplied with shifted features."""

    def apply(p, x):
        z = x @ p["stem"]
        padded = jnp.pad(z, ((0, 0), (3, 0), (0, 0)))
        kernel = p["grouped"]["w"]
        z = sum(padded[:, i : i + z.shape[1]] * kernel[i] for i in range(4)) + p["grouped"]["b"]
        return RELU(RELU(z) @ p["point"]["w"]).mean(1) @ p["out"]

    shapes = {
        **specs(stem=(8, width), out=(width, 5)),
        "grouped": specs(w=(4, width), b=(width,)),
        "point": specs(w=(width, width)),
    }
    return Model(apply, shapes, (normal(4, 6, 8),))


LINEN = ("grouped/kernel", "grouped/bias", "point/kernel")
VECTORS = {
    "linen": (lambda n: convolutional(n, n), *LINEN),
    "linen, one dimension": (lambda n: convolutional(n, n, kernel=(3,)), *LINEN),
    "linen, 8 features a group": (lambda n: convolutional(n, n // 8), *LINEN),
    "equinox": (equinox_depthwise, "grouped/weight", "grouped/bias", "point/weight"),
    "haiku": (haiku_depthwise, "grouped/w", "grouped/b", "point/w"),
    "shifted sums": (causal_depthwise, "grouped/w", "grouped/b", "point/w"),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_kernels_of_a_fixed_group_are_vectors(kind):
    """They contract no width and write one: SGD N/N_b = 4, bias too; Adam 1 (microsoft/mup: vector-
    like). The pointwise layer is a hidden matrix: SGD 1, Adam ¼."""
    make, kernel, bias, point = VECTORS[kind]
    sgd, adam = both_multipliers(make(64), make(16))
    assert [value(sgd, name) for name in (kernel, bias, point)] == pytest.approx([4, 4, 1])
    assert [value(adam, name) for name in (kernel, bias, point)] == pytest.approx([1, 1, 0.25])


def test_kernels_of_growing_groups_are_matrices():
    """4 groups at every width: k = n/4 grows with N = n, a matrix: SGD 1, Adam ¼; the bias 4, 1."""
    sgd, adam = both_multipliers(convolutional(64, 4), convolutional(16, 4))
    assert value(sgd, "grouped/kernel") == pytest.approx(1)
    assert value(adam, "grouped/kernel") == pytest.approx(0.25)
    assert value(sgd, "grouped/bias") == pytest.approx(4)
    assert value(adam, "grouped/bias") == pytest.approx(1)


def per_head(width, growing):
    """A block-diagonal layer [heads, d, d] of which heads or d grow."""
    heads, size = (width // 8, 8) if growing == "heads" else (4, width // 4)

    def apply(p, x):
        h = RELU(x @ p["stem"]).reshape(x.shape[0], heads, size)
        h = RELU(jnp.einsum("bhi,hij->bhj", h, p["block"]).reshape(x.shape[0], width))
        return RELU(h @ p["mix"]) @ p["out"]

    shapes = specs(stem=(8, width), block=(heads, size, size), mix=(width, width), out=(width, 5))
    return Model(apply, shapes, (normal(4, 8),))


@pytest.mark.parametrize(("growing", "sgd", "adam"), [("heads", 4, 1), ("size", 1, 0.25)])
def test_block_diagonal_layers(growing, sgd, adam):
    """Heads that grow at a fixed size: N/k grows as the heads. A size that grows: a matrix."""
    found = both_multipliers(per_head(64, growing), per_head(16, growing))
    assert [one["block"] for one in found] == pytest.approx([sgd, adam])


def test_a_step_of_a_depthwise_leaf_moves_logits_as_in_the_base():
    """Measured, SGD, width 16 to 128: with N/N_b the change does not depend on the width."""
    growth = step_growth(lambda n: convolutional(n, n), (16, 128), "grouped/kernel", "sgd")
    assert 0.5 < growth < 2


# Vectors whose width stands on another axis


def channels_first(width):
    def apply(p, x):
        def convolve(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")

        h = convolve(x, p["in"])
        y = convolve(RELU(h), p["k"]) * p["gamma"]
        y = (y - y.mean((1, 2, 3), keepdims=True)) / jnp.sqrt(
            y.var((1, 2, 3), keepdims=True) + 1e-5
        )
        return RELU(h + y * p["scale"] + p["offset"]).mean((2, 3)) @ p["out"]

    shapes = {
        **specs(gamma=(width, 1, 1), scale=(width, 1, 1), offset=(width, 1, 1), out=(width, 5)),
        **{"in": spec(width, 3, 3, 3), "k": spec(width, width, 3, 3)},
    }
    return Model(apply, shapes, (normal(4, 3, 6, 6),))


def rows_first(width):
    """W @ x with examples last: biases and gains [n, 1]."""

    def apply(p, x):
        h = RELU(p["a"] @ x + p["ab"])
        h = RELU((p["b"] @ h) * p["gain"] + p["bb"])
        return p["c"] @ h

    shapes = specs(
        a=(width, 8), ab=(width, 1), b=(width, width), gain=(width, 1), bb=(width, 1), c=(5, width)
    )
    return Model(apply, shapes, (normal(8, 4),))


def equinox_group_norm(width):
    class Net(eqx.Module):
        stem: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        middle: eqx.nn.Conv2d
        out: eqx.nn.Linear

        def __init__(self, key):
            self.stem = eqx.nn.Conv2d(3, width, 3, key=key)
            self.norm = eqx.nn.GroupNorm(4, width)
            self.middle = eqx.nn.Conv2d(width, width, 3, key=key)
            self.out = eqx.nn.Linear(width, 5, key=key)

        def __call__(self, x):
            x = self.middle(RELU(self.norm(self.stem(x))))
            return self.out(RELU(x).mean((1, 2)))

    return equinox_model(Net, normal(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (channels_first, ("gamma", "scale", "offset")),
        (rows_first, ("ab", "bb", "gain")),
        (equinox_group_norm, ("norm/weight", "norm/bias", "stem/bias", "middle/bias")),
    ],
    ids=["[C, 1, 1]", "[n, 1]", "equinox"],
)
def test_vectors_of_any_axis_are_vectors(make, names):
    """SGD N/N_b = 8, Adam 1, wherever the width stands in the shape."""
    sgd, adam = both_multipliers(make(128), make(16))
    for name in names:
        assert value(sgd, name) == pytest.approx(8), name
        assert value(adam, name) == pytest.approx(1), name


def test_widths_on_the_second_axis_of_a_scan():
    """nn.scan with parameters stacked along axis 1, [n, L, n]: the numbers of axis 0."""

    def make(width, axis):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, h, _):
                return h + nn.Dense(width, name="layer")(RELU(h)), None

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                stack = nn.scan(
                    Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
                )
                h, _ = stack(name="stack")(nn.Dense(width, name="stem")(x), None)
                return nn.Dense(3, name="out")(RELU(h))

        return linen_model(Net(), normal(2, 8))

    for axis in (0, 1):
        both = both_multipliers(make(64, axis), make(16, axis))
        for found, kernel, bias in zip(both, (1, 0.25), (4, 1), strict=True):
            np.testing.assert_allclose(value(found, "layer/kernel"), kernel, rtol=1e-6)
            np.testing.assert_allclose(value(found, "layer/bias"), bias, rtol=1e-6)


# Several uses of one leaf


def haiku_lstm(width):
    def network(x):
        core = hk.LSTM(width)
        h, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(5)(h[-1])

    return haiku_model(network, normal(5, 2, 7))


def joined_cell(width):
    def apply(p, x):
        def step(h, xt):
            h = jnp.tanh(jnp.concatenate([xt, h], -1) @ p["cell"])
            return h, None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], width)), x)
        return h @ p["out"]

    return Model(apply, specs(cell=(7 + width, width), out=(width, 5)), (normal(5, 2, 7),))


def unrolled_cell(width):
    """The state first and the input behind it, the loop in Python, as a gate."""

    def apply(p, x):
        h = jnp.zeros((x.shape[1], width))
        for xt in x:
            z = jnp.concatenate([h, xt], -1)
            gate = jax.nn.sigmoid(z @ p["gate"])
            h = gate * h + (1 - gate) * jnp.tanh(z @ p["cell"])
        return h @ p["out"]

    shapes = specs(cell=(7 + width, width), gate=(7 + width, width), out=(width, 5))
    return Model(apply, shapes, (normal(5, 2, 7),))


@pytest.mark.parametrize(
    ("make", "name"),
    [(haiku_lstm, "lstm/linear/w"), (joined_cell, "cell"), (unrolled_cell, "gate")],
    ids=["hk.LSTM", "scan", "Python loop"],
)
def test_cells_over_joined_input_and_state_contract_the_width(make, name):
    """The first step reads a constant state, all others the width: hidden, Adam k_b/k.

    k = 7 + n inputs of one unit: 23/71; of the part that grows alone it is 16/64.
    """
    assert parameter(make(64).trace(), name).role == "hidden"
    found = value(multipliers(make(64), make(16), width_rule="adam"), name)
    assert 16 / 64 * 0.999 <= found <= 23 / 71 * 1.001


def test_a_step_of_a_cell_moves_its_state_as_in_the_base():
    """Measured, Adam, width 32 to 256: the relative change of the last state."""

    def state(width):
        def apply(p, x):
            def step(h, xt):
                return jnp.tanh(jnp.concatenate([xt, h], -1) @ p["cell"]), None

            return jax.lax.scan(step, jnp.zeros((x.shape[1], width)), x)[0]

        return apply

    growth = step_growth(joined_cell, (32, 256), "cell", "adam", state)
    assert 0.5 < growth < 2


def tied_autoencoder(width, how="transposed"):
    def apply(p, x):
        h = RELU(x @ p["w"])
        return h @ p["w"].T if how == "transposed" else jnp.einsum("bn,in->bi", h, p["w"])

    return Model(apply, specs(w=(24, width)), (normal(4, 24),))


def tied_convolution(width):
    """A convolutional autoencoder that decodes with the kernel of its encoder."""

    def apply(p, x):
        h = RELU(jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME"))
        return jax.lax.conv_general_dilated(h, jnp.swapaxes(p["w"], 0, 1), (1, 1), "SAME")

    return Model(apply, specs(w=(width, 3, 3, 3)), (normal(2, 3, 6, 6),))


def tied_language(width, how="one_hot"):
    def apply(p, ids):
        if how == "one_hot":
            x = jax.nn.one_hot(ids, 50) @ p["table"]
        elif how == "compare":
            x = (ids[..., None] == jnp.arange(50)).astype(jnp.float32) @ p["table"]
        else:
            x = p["table"][ids]
        x = x + RELU(x @ p["a"]) @ p["b"]
        return x @ p["table"].T

    shapes = specs(table=(50, width), a=(width, width), b=(width, width))
    return Model(apply, shapes, (jax.random.randint(KEY, (4, 6), 0, 50),))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tied_autoencoder, "w"),
        (functools.partial(tied_autoencoder, how="einsum"), "w"),
        (tied_convolution, "w"),
        (tied_language, "table"),
        (functools.partial(tied_language, how="compare"), "table"),
        (functools.partial(tied_language, how="lookup"), "table"),
    ],
    ids=["autoencoder", "einsum", "convolution", "one_hot", "compare", "lookup"],
)
def test_weights_that_are_tied_follow_the_strictest_use(make, name):
    """What contracts the width anywhere has Adam's 1/r."""
    assert multipliers(make(64), make(16), width_rule="adam")[name] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "name"), [(tied_autoencoder, "w"), (tied_language, "table")], ids=["w", "table"]
)
def test_a_step_of_a_tied_weight_does_not_grow_with_width(make, name):
    """Measured, Adam, width 32 to 256: the change of the result grows at most by half."""
    assert step_growth(make, (32, 256), name, "adam") < 1.5


# Base networks that were never built


class Mixer(nn.Module):
    width: int
    tokens_hidden: int = 64

    @nn.compact
    def __call__(self, x):
        def mlp(x, hidden, name):
            inner = nn.gelu(nn.Dense(hidden, name=name + "_up")(x))
            return nn.Dense(x.shape[-1], name=name + "_down")(inner)

        x = nn.Dense(self.width, name="stem")(x)
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(mlp(y, self.tokens_hidden, "tokens"), 1, 2)
        x = x + mlp(nn.LayerNorm()(x), 4 * self.width, "features")
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


@pytest.mark.parametrize("tokens", [16, 64])
def test_with_widths_names_places_and_not_numbers(tokens):
    """Tokens, or 4 x tokens, that equal a width stay: as with the base that was traced."""

    def make(width):
        return linen_model(Mixer(width, 4 * tokens), spec(2, tokens, 12))

    model, small = make(64), make(32)
    arch = model.trace()
    base = archscale.with_widths(arch, {64: 32, 256: 128})
    for rule in ("adam", "sgd"):
        found = archscale.learning_rate_multipliers(arch, base, "none", width_rule=rule)
        traced = multipliers(model, small, width_rule=rule)
        assert found == pytest.approx(traced), rule
    found = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
    assert value(found, "tokens_up/kernel") == pytest.approx(1)
    assert value(found, "tokens_down/kernel") == pytest.approx(1)
    assert value(found, "features_up/kernel") == pytest.approx(0.5)
    assert value(found, "features_down/kernel") == pytest.approx(0.5)


def test_with_widths_leaves_positions_of_a_token_mixing_layer():
    """The same in Equinox: layers over 32 positions, hidden 128, of a network of width 128."""

    class Net(eqx.Module):
        stem: eqx.nn.Linear
        over: list
        features: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            self.stem = eqx.nn.Linear(6, 128, key=key)
            self.over = [eqx.nn.Linear(32, 128, key=key), eqx.nn.Linear(128, 32, key=key)]
            self.features = eqx.nn.Linear(128, 128, key=key)
            self.out = eqx.nn.Linear(128, 3, key=key)

        def __call__(self, x):
            h = jax.vmap(self.stem)(x)
            mixed = jax.vmap(lambda one: self.over[1](RELU(self.over[0](one))))(h.T).T
            h = h + jax.vmap(self.features)(RELU(h + mixed))
            return self.out(h.mean(0))

    arch = equinox_model(Net, normal(2, 32, 6)).trace()
    base = archscale.with_widths(arch, {128: 32})
    found = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
    assert value(found, "features/weight") == pytest.approx(0.25)
    assert value(found, "out/weight") == pytest.approx(0.25)
    assert value(found, "over/0/weight") == pytest.approx(1)
    assert value(found, "over/1/weight") == pytest.approx(1)


def feed_forward(width, hidden, name="widen"):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(width, name="stem")(x)
            for i in range(2):
                y = RELU(nn.Dense(hidden, name=f"{name}{i}")(nn.LayerNorm()(x)))
                x = x + nn.Dense(width, name=f"narrow{i}")(y)
            return nn.Dense(10, name="head")(x)

    return linen_model(Net(), normal(2, 8))


def test_with_widths_must_list_all_widths_of_the_hidden_layers():
    """128 listed and 512 = 4·128 forgotten: an error that names 512; {512: 512} says it stays."""
    arch = feed_forward(128, 512).trace()
    with pytest.raises(ValueError, match="512"):
        archscale.with_widths(arch, {128: 32})
    whole = archscale.with_widths(arch, {128: 32, 512: 128})
    found = archscale.learning_rate_multipliers(arch, whole, "none", width_rule="adam")
    assert value(found, "narrow0/kernel") == pytest.approx(0.25)
    fixed = archscale.with_widths(arch, {128: 32, 512: 512})
    found = archscale.learning_rate_multipliers(arch, fixed, "none", width_rule="adam")
    assert value(found, "widen0/kernel") == pytest.approx(0.25)
    assert value(found, "narrow0/kernel") == pytest.approx(1)


def test_with_widths_must_list_widths_of_a_plain_chain():
    """The same of a chain 64, 48, 64 without norms and skips."""

    def apply(p, x):
        return RELU(RELU(RELU(x @ p["a"]) @ p["b"]) @ p["c"]) @ p["d"]

    arch = Model(apply, specs(a=(8, 64), b=(64, 48), c=(48, 64), d=(64, 3)), (spec(2, 8),)).trace()
    with pytest.raises(ValueError, match="48"):
        archscale.with_widths(arch, {64: 16})
    found = archscale.learning_rate_multipliers(
        arch, archscale.with_widths(arch, {64: 16, 48: 12}), "none", width_rule="adam"
    )
    assert (found["a"], found["b"], found["c"], found["d"]) == pytest.approx((1, 0.25, 0.25, 0.25))


# What a width rule must not do silently


def deep(depth, width):
    def apply(p, x):
        h = x @ p["stem"]
        for w, v in zip(p["w"], p["v"], strict=True):
            h = h + RELU(RELU(h) @ w) @ v
        return RELU(h) @ p["out"]

    shapes = specs(stem=(8, width), out=(width, 3)) | {
        name: [spec(width, width)] * depth for name in "wv"
    }
    return Model(apply, shapes, (spec(2, 8),))


def test_a_width_rule_alone_is_a_width_rule_alone():
    """Depth 4 against 2, width 64 against 16: 1/r = ¼; no path sum is multiplied in.

    With a path sum it was 0.025.
    """
    arch, base = deep(4, 64).trace(), deep(2, 16).trace()
    found = archscale.learning_rate_multipliers(arch, base, width_rule="adam")
    assert found["w/0"] == pytest.approx(0.25)
    assert found["out"] == pytest.approx(0.25)
    assert found["stem"] == pytest.approx(1)
    assert found == pytest.approx(
        archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
    )
    transformation = archscale.scale_by_architecture(arch, base, width_rule="adam")
    updates = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), deep(4, 64).shapes)
    scaled, _ = transformation.update(updates, transformation.init(updates))
    largest: Any = jax.tree.map(jnp.max, scaled)
    assert float(largest["w"][0]) == pytest.approx(0.25)


@pytest.mark.parametrize("rule", ["sgd", "muon"])
def test_a_width_rule_alone_for_chains_of_linen(rule):
    """MLPs of depth 5 and 2: the same multipliers as with the rule none."""

    def make(depth, width):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                for _ in range(depth):
                    x = RELU(nn.Dense(width)(x))
                return nn.Dense(3)(x)

        return linen_model(Net(), normal(2, 8)).trace()

    arch, base = make(5, 64), make(2, 16)
    found = archscale.learning_rate_multipliers(arch, base, width_rule=rule)
    expected = archscale.learning_rate_multipliers(arch, base, "none", width_rule=rule)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("make", [lambda n: feed_forward(n, 4 * n), lambda n: deep(2, n)])
def test_a_base_wider_than_the_network_is_warned_of_first(make):
    """Base and network swapped: the first note of the report says so."""
    large, small = make(64).trace(), make(16).trace()
    swapped = archscale.report(small, large, "none", width_rule="adam").notes
    assert swapped
    assert re.search(r"wider|swapped|larger", swapped[0])
    right = archscale.report(large, small, "none", width_rule="adam").notes
    assert not any(re.search(r"swapped|base is wider|base is larger", note) for note in right)


def test_the_report_says_what_weights_a_width_rule_supposes():
    """μP's multipliers hold for weights drawn as μP wants: a readout of 1/√n (Flax) is not."""

    class MLP(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width)(x)
            for _ in range(2):
                x = nn.Dense(self.width)(RELU(x))
            return nn.Dense(5)(RELU(x))

    x = normal(4, 20)
    arch, base = (linen_model(MLP(width), x).trace() for width in (256, 64))
    for rule in ("sgd", "adam"):
        notes = " ".join(archscale.report(arch, base, "none", width_rule=rule).notes)
        assert re.search(r"\binitialize\b|archscale\.initialize", notes), rule
    documentation = archscale.scale_by_architecture.__doc__ or ""
    assert "initialize" in documentation


@pytest.mark.parametrize(("rule", "name"), [("sgd", "b"), ("adam", "b"), ("adam", "c")])
def test_weights_of_initialize_are_those_that_width_rules_suppose(rule, name):
    """Measured, width 32 to 256: one step moves the result as far as in the base."""

    def make(width):
        def apply(p, x):
            return RELU(RELU(x @ p["a"]) @ p["b"]) @ p["c"]

        shapes = specs(a=(20, width), b=(width, width), c=(width, 5))
        return Model(apply, shapes, (normal(16, 20),))

    assert 0.5 < step_growth(make, (32, 256), name, rule) < 2


def joined(p, x):
    h = jnp.concatenate([x @ p["a"], x @ p["b"]], axis=-1)
    return RELU(RELU(h) @ p["w"]) @ p["o"]


@pytest.mark.parametrize("widths", [{64: 32}, {128: 64}, {64: 32, 128: 32}])
def test_widths_of_joined_features_must_fit(widths):
    """64 and 64 features are joined to 128: listing one without the other names what is wrong."""
    architecture = archscale.trace(
        joined, specs(a=(8, 64), b=(8, 64), w=(128, 128), o=(128, 3)), spec(2, 8)
    )
    with pytest.raises(ValueError, match="128 joined features that 'w' reads"):
        archscale.with_widths(architecture, widths)
    base = archscale.with_widths(architecture, {64: 32, 128: 64})
    found = archscale.learning_rate_multipliers(architecture, base, "none", width_rule="adam")
    assert found == {"a": 1.0, "b": 1.0, "w": 0.5, "o": 0.5}
