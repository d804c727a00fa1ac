"""Depth multipliers by place: inside a branch, at its end, outside of every branch (theory §11).

m is the ratio of residual additions, α the exponent. Adam: m^(α-1) inside a branch, 1/m for what
ends it, 1 outside; SGD: m^(2α-1) inside, 1/m at the end, 1 outside. A leaf used K times has K_b/K
more with SGD, whose gradient is a sum over uses. Outside stand stem, readout, and norms that no
addition is around [CompleteP, Table 1; final_ln_params of its code have lr_scale 1].
"""

import functools
import itertools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from archscale_jax.rules._residual import residual_branches, residual_depth
from tests.kinds.helpers import (
    Model,
    equinox_model,
    haiku_model,
    linen_model,
    multipliers,
    normal,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def unit(h):
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def expected(optimizer, m, exponent):
    """Multipliers inside a branch and at its end."""
    power = 2 * exponent - 1 if optimizer == "sgd" else exponent - 1
    return m**power, 1 / m


# Norms that stand outside of the branches


class PreLN(nn.Module):
    depth: int
    around: bool = False
    embedded: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16, name="stem")(x)
        if self.embedded:
            h = nn.LayerNorm(name="first_norm")(h)
        for i in range(self.depth):
            y = nn.LayerNorm(name=f"norm{i}")(h)
            y = nn.Dense(32, name=f"widen{i}")(y)
            h = h + nn.Dense(16, name=f"narrow{i}")(nn.gelu(y))
        return nn.Dense(8, name="head")(nn.LayerNorm(name="last_norm")(h))


@functools.cache
def pre_norm(depth):
    return linen_model(PreLN(depth, embedded=True), normal(2, 8))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_norms_outside_of_branches_keep_their_rate(optimizer, exponent):
    """8 blocks against 2, m = 4: the last norm 1, and one behind the stem; those inside as inside.

    CompleteP's code: hidden_ln_params m^(α-1), final_ln_params 1.
    """
    found = multipliers(pre_norm(8), pre_norm(2), depth_rule=optimizer, depth_exponent=exponent)
    inside, end = expected(optimizer, 4, exponent)
    for name in ("stem/kernel", "stem/bias", "head/kernel", "head/bias"):
        assert value(found, name) == pytest.approx(1), name
    for name in ("first_norm/scale", "first_norm/bias", "last_norm/scale", "last_norm/bias"):
        assert value(found, name) == pytest.approx(1), name
    for name in ("norm0/scale", "norm7/bias", "widen0/kernel", "widen3/bias"):
        assert value(found, name) == pytest.approx(inside), name
    for name in ("narrow0/kernel", "narrow7/bias"):
        assert value(found, name) == pytest.approx(end), name


def test_last_norm_of_equinox_and_haiku():
    """RMSNorm before the readout of a scanned or listed stack: 1."""

    class Net(eqx.Module):
        stem: eqx.nn.Linear
        blocks: list
        last: eqx.nn.RMSNorm
        head: eqx.nn.Linear

        def __init__(self, key, depth):
            self.stem = eqx.nn.Linear(8, 16, key=key)
            self.blocks = [
                (eqx.nn.RMSNorm(16), eqx.nn.Linear(16, 16, key=key), eqx.nn.Linear(16, 16, key=key))
                for _ in range(depth)
            ]
            self.last = eqx.nn.RMSNorm(16)
            self.head = eqx.nn.Linear(16, 3, key=key)

        def __call__(self, x):
            h = self.stem(x)
            for norm, up, down in self.blocks:
                h = h + down(RELU(up(norm(h))))
            return self.head(self.last(h))

    def of_equinox(depth):
        return equinox_model(lambda key: Net(key, depth), normal(2, 8))

    found = multipliers(of_equinox(8), of_equinox(2), depth_rule="adam", depth_exponent=0.5)
    assert value(found, "last/weight") == pytest.approx(1)
    assert value(found, "blocks/0/0/weight") == pytest.approx(0.5)
    assert value(found, "blocks/0/2/weight") == pytest.approx(0.25)

    def of_haiku(depth):
        def network(x):
            h = hk.Linear(16, name="stem")(x)
            for i in range(depth):
                y = hk.LayerNorm(-1, True, True, name=f"norm{i}")(h)
                h = h + hk.Linear(16, name=f"down{i}")(RELU(hk.Linear(16)(y)))
            h = hk.LayerNorm(-1, True, True, name="last")(h)
            return hk.Linear(3, name="head")(h)

        return haiku_model(network, normal(2, 8))

    found = multipliers(of_haiku(8), of_haiku(2), depth_rule="adam", depth_exponent=0.5)
    assert value(found, "last/scale") == pytest.approx(1)
    assert value(found, "last/offset") == pytest.approx(1)
    assert value(found, "norm3/scale") == pytest.approx(0.5)
    assert value(found, "down3/b") == pytest.approx(0.25)


# Biases that meet the sum


def stack(depth, add, width=16):
    def apply(p, x):
        h = x @ p["stem"]
        for w, v, b in zip(p["w"], p["v"], p["b"], strict=True):
            h = add(h, RELU(RELU(h) @ w) @ v, b)
        return RELU(h) @ p["out"]

    shapes = specs(stem=(8, width), out=(width, 3)) | {
        "w": [spec(width, width)] * depth,
        "v": [spec(width, width)] * depth,
        "b": [spec(width)] * depth,
    }
    return Model(apply, shapes, (spec(2, 8),))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "add",
    [
        lambda h, y, b: h + y + b,
        lambda h, y, b: h + (y + b),
        lambda h, y, b: b + (h + y),
        lambda h, y, b: (h + b) + y,
    ],
    ids=["(h + y) + b", "h + (y + b)", "b + (h + y)", "(h + b) + y"],
)
def test_a_bias_added_to_the_sum_ends_the_branch(add, optimizer):
    """By hand, Adam: n biases move the stream by n·η·f, so that f = 1/m keeps it; SGD as well."""
    found = multipliers(stack(8, add), stack(2, add), depth_rule=optimizer, depth_exponent=0.5)
    inside, end = expected(optimizer, 4, 0.5)
    assert found["w/0"] == pytest.approx(inside)
    assert found["v/0"] == pytest.approx(end)
    assert found["b/0"] == pytest.approx(end)


# A skip around the whole network


class Denoiser(nn.Module):
    depth: int
    result: str

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16, name="stem")(x)
        for i in range(self.depth):
            y = nn.Dense(16, name=f"widen{i}")(RELU(h))
            h = h + nn.Dense(16, name=f"narrow{i}")(RELU(y))
        out = nn.Dense(8, name="head")(RELU(h))
        return {"net(x)": out, "x - net(x)": x - out, "x + net(x)": x + out}[self.result]


@functools.cache
def denoiser(depth, result):
    return linen_model(Denoiser(depth, result), normal(2, 8))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("result", ["x - net(x)", "x + net(x)"])
def test_a_skip_around_the_network_is_not_a_block(result, optimizer):
    """The numbers of net(x): m = n/n_b, and the readout ends no branch."""

    def numbers(result):
        models = (denoiser(depth, result) for depth in (8, 1))
        return multipliers(*models, depth_rule=optimizer, depth_exponent=0.5)

    plain = numbers("net(x)")
    assert value(plain, "head/kernel") == pytest.approx(1)
    assert value(plain, "narrow0/kernel") == pytest.approx(1 / 8)
    assert numbers(result) == pytest.approx(plain)


def test_a_global_skip_of_convolutions():
    """EDSR: a skip from behind the first convolution around all blocks, and x + net(x) in Haiku.

    The inner one is an addition as others are, the outer one is not: head 1.
    """

    def make(depth):
        def network(x):
            h = hk.Conv2D(8, 3, name="first")(x)
            for i in range(depth):
                y = RELU(hk.Conv2D(8, 3, name=f"up{i}")(h))
                h = h + hk.Conv2D(8, 3, name=f"down{i}")(y)
            return x + hk.Conv2D(3, 3, name="head")(h)

        return haiku_model(network, normal(1, 6, 6, 3))

    found = multipliers(make(8), make(2), depth_rule="adam", depth_exponent=0.5)
    assert value(found, "head/w") == pytest.approx(1)
    assert value(found, "first/w") == pytest.approx(1)
    assert value(found, "down0/w") == pytest.approx(0.25)
    assert value(found, "up0/w") == pytest.approx(0.5)


# Cross-attention


def translation(depth):
    def apply(p, source, target):
        memory = source @ p["encoder"]
        for layer in p["encoder_layers"]:
            memory = memory + RELU(memory @ layer["up"]) @ layer["down"]
        z = target @ p["decoder"]
        for layer in p["layers"]:
            q, k, v = z @ layer["q"], memory @ layer["k"], memory @ layer["v"]
            z = z + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v @ layer["o"]
        return z @ p["readout"]

    shapes = specs(encoder=(4, 16), decoder=(4, 16), readout=(16, 3)) | {
        "encoder_layers": [specs(up=(16, 16), down=(16, 16))] * depth,
        "layers": [{name: spec(16, 16) for name in "qkvo"}] * depth,
    }
    return Model(apply, shapes, (spec(2, 5, 4), spec(2, 3, 4)))


def test_keys_and_values_of_cross_attention_stand_in_the_branch():
    """q, k and v alike m^(-½) at m = 2, though k and v read the encoder; o 1/m."""
    found = multipliers(translation(4), translation(2), depth_rule="adam", depth_exponent=0.5)
    for name in "qkv":
        assert found[f"layers/1/{name}"] == pytest.approx(2**-0.5), name
    assert found["layers/1/o"] == pytest.approx(0.5)
    assert found["encoder_layers/1/up"] == pytest.approx(2**-0.5)
    assert found["encoder_layers/1/down"] == pytest.approx(0.5)
    for name in ("encoder", "decoder", "readout"):
        assert found[name] == pytest.approx(1), name


def test_cross_attention_of_linen():
    """A conditioned stack: attention to a context that a layer outside of the stack makes."""

    class Net(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x, context):
            h, memory = nn.Dense(16, name="stem")(x), nn.Dense(16, name="context")(context)
            for i in range(self.depth):
                y = nn.LayerNorm(name=f"norm{i}")(h)
                h = h + nn.MultiHeadDotProductAttention(2, name=f"cross{i}")(y, memory)
            return nn.Dense(3, name="head")(nn.LayerNorm(name="last")(h))

    inputs = normal(2, 4, 8), normal(2, 5, 6)
    found = multipliers(
        *(linen_model(Net(depth), *inputs) for depth in (8, 2)),
        depth_rule="adam",
        depth_exponent=0.5,
    )
    for part in ("query", "key", "value"):
        assert value(found, f"cross0/{part}/kernel") == pytest.approx(0.5), part
        assert value(found, f"cross0/{part}/bias") == pytest.approx(0.5), part
    assert value(found, "cross0/out/kernel") == pytest.approx(0.25)
    assert value(found, "context/kernel") == pytest.approx(1)
    assert value(found, "last/scale") == pytest.approx(1)


# Branches that end in products


def plain_block(layer, z, c):
    return RELU(z @ layer["a"]) @ layer["b"]


def adaln(layer, z, c):
    return (c @ layer["gate"]) * plain_block(layer, z, c)


def experts(layer, z, c):
    hidden = RELU(jnp.einsum("bd,edf->bef", z, layer["up"]))
    outputs = jnp.einsum("bef,efd->bed", hidden, layer["down"])
    return jnp.einsum("be,bed->bd", jax.nn.softmax(z @ layer["router"]), outputs)


def state_space(layer, z, c):
    u = z @ layer["a"]
    return (jax.nn.softplus(z @ layer["b"]) * u + layer["D"] * u) @ layer["gate"]


LAYER = specs(a=(16, 16), b=(16, 16), gate=(16, 16), D=(16,), router=(16, 4)) | {
    "up": spec(4, 16, 16),
    "down": spec(4, 16, 16),
}


def stacked_products(block, names, depth):
    gated = block is adaln

    def apply(p, x):
        z, c = x @ p["stem"], RELU(x @ p["condition"]) if gated else None
        for layer in p["layers"]:
            z = z + block(layer, z, c)
        return z @ p["readout"]

    shapes = specs(stem=(8, 16), readout=(16, 3)) | (specs(condition=(8, 16)) if gated else {})
    layers = [{name: LAYER[name] for name in names}] * depth
    return Model(apply, shapes | {"layers": layers}, (normal(4, 8),))


@pytest.mark.parametrize(
    ("block", "inside", "end"),
    [
        (plain_block, ("a",), ("b",)),
        (experts, ("router", "up"), ("down",)),
        (state_space, ("a", "b", "D"), ("gate",)),
    ],
    ids=["plain", "mixture of experts", "state space"],
)
def test_products_in_branches(block, inside, end):
    """m = 2, Adam: what ends the branch 1/m, whatever product stands in it; the rest m^(-½).

    The combine weights of experts are a softmax, so that only the experts' last layer can end it.
    """
    names = (*inside, *end)
    found = multipliers(
        stacked_products(block, names, 4),
        stacked_products(block, names, 2),
        depth_rule="adam",
        depth_exponent=0.5,
    )
    for name in inside:
        np.testing.assert_allclose(found[f"layers/0/{name}"], 2**-0.5, rtol=1e-6, err_msg=name)
    for name in end:
        np.testing.assert_allclose(found[f"layers/0/{name}"], 0.5, rtol=1e-6, err_msg=name)


def test_gated_residuals_are_read():
    """adaLN: gate(c)·f(z). The two layers of the product share n^(-α): either may take it.

    What is inside for sure is m^(-½); the two lie between 1/m and m^(-½), one below m^(-½).
    """
    names = ("a", "b", "gate")
    found = multipliers(
        stacked_products(adaln, names, 4),
        stacked_products(adaln, names, 2),
        depth_rule="adam",
        depth_exponent=0.5,
    )
    assert found["layers/0/a"] == pytest.approx(2**-0.5)
    last = [float(found[f"layers/0/{name}"]) for name in ("b", "gate")]
    assert all(0.5 * 0.999 <= one <= 2**-0.5 * 1.001 for one in last)
    assert min(last) < 2**-0.5 * 0.99


class ModulatedBlock(nn.Module):
    """A block of a diffusion transformer: one layer modulates both branches."""

    zero: bool

    @nn.compact
    def __call__(self, x, c):
        start = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        made = nn.Dense(6 * 16, name="ada", kernel_init=start)(nn.silu(c))
        parts = jnp.split(made[:, None], 6, -1)
        norm = nn.LayerNorm(use_bias=False, use_scale=False)
        y = norm(x) * (1 + parts[0]) + parts[1]
        x = x + parts[2] * nn.MultiHeadDotProductAttention(2, name="attention")(y, y)
        y = norm(x) * (1 + parts[3]) + parts[4]
        y = nn.Dense(16, name="down")(nn.gelu(nn.Dense(64, name="up")(y)))
        return x + parts[5] * y


class DiffusionTransformer(nn.Module):
    depth: int
    zero: bool = True

    @nn.compact
    def __call__(self, x, c):
        x = nn.Dense(16, name="stem")(x)
        c = nn.Dense(16, name="condition")(c)
        for place in range(self.depth):
            x = ModulatedBlock(self.zero, name=f"block{place}")(x, c)
        return nn.Dense(4, name="head")(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("given", ["arrays", "shapes"])
def test_modulated_blocks_of_a_diffusion_transformer(given):
    """Two additions a block; a shift is not a skip. What modulates a block is inside of it."""
    x, c = normal(2, 4, 8), normal(2, 8, seed=2)

    def start(path, leaf):
        if path[-1].key == "kernel" and path[-2].key != "ada":
            return normal(*leaf.shape)
        return jnp.full(leaf.shape, float(path[-1].key == "scale"))

    def traced(depth):
        module = DiffusionTransformer(depth)
        params = linen_model(module, x, c).shapes
        params = params if given == "shapes" else jax.tree_util.tree_map_with_path(start, params)
        apply = lambda params, *inputs: module.apply({"params": params}, *inputs)  # noqa: E731
        return archscale.trace(apply, params, x, c)

    network, base = traced(4), traced(2)
    assert len(residual_branches(network)) == 8
    found = archscale.learning_rate_multipliers(network, base, "none", depth_rule="adam")
    inside = (
        "ada",
        "up",
        "condition",
        *(f"attention/{name}" for name in ("query", "key", "value")),
    )
    expected = dict.fromkeys(inside, 2**-0.5) | dict.fromkeys(("down", "attention/out"), 0.5)
    expected |= dict.fromkeys(("stem", "condition", "head", "norm"), 1.0)
    for name, multiplier in found.items():
        (one,) = (value for layer, value in expected.items() if f"/{layer}/" in f"/{name}")
        np.testing.assert_allclose(multiplier, one, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("framework", ["linen", "equinox"])
def test_gated_feed_forward_layers_in_branches(framework):
    """SwiGLU blocks: gate and up inside, down at the end."""

    class Linen(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16, name="stem")(x)
            for i in range(self.depth):
                y = nn.RMSNorm(name=f"norm{i}")(h)
                gate, up = nn.Dense(32, name=f"gate{i}")(y), nn.Dense(32, name=f"up{i}")(y)
                h = h + nn.Dense(16, name=f"down{i}")(nn.silu(gate) * up)
            return nn.Dense(3, name="head")(h)

    class Block(eqx.Module):
        gate: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            self.gate, self.up = eqx.nn.Linear(16, 32, key=key), eqx.nn.Linear(16, 32, key=key)
            self.down = eqx.nn.Linear(32, 16, key=key)

        def __call__(self, x, *, key=None):
            return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def make(depth):
        if framework == "linen":
            return linen_model(Linen(depth), normal(2, 8))

        def build(key):
            ends = eqx.nn.Linear(8, 16, key=key), eqx.nn.Linear(16, 3, key=key)
            return eqx.nn.Sequential([ends[0], *(Block(key) for _ in range(depth)), ends[1]])

        return equinox_model(build, normal(2, 8))

    found = multipliers(make(8), make(2), depth_rule="adam", depth_exponent=0.5)
    where = {"linen": ("gate1", "up1", "down1"), "equinox": ("2/gate", "2/up", "2/down")}
    weight = {"linen": "kernel", "equinox": "weight"}[framework]
    gate, up, down = (value(found, f"{one}/{weight}") for one in where[framework])
    assert (gate, up, down) == pytest.approx((0.5, 0.5, 0.25))


# Norms that end a branch


class PostNorm(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16, name="stem")(x)
        for i in range(self.depth):
            y = nn.Dense(32, name=f"up{i}")(nn.LayerNorm(name=f"pre{i}")(h))
            y = nn.Dense(16, name=f"down{i}")(RELU(y))
            h = h + nn.LayerNorm(name=f"post{i}")(y)
        return nn.Dense(5, name="out")(nn.LayerNorm(name="last")(h))


def test_the_gain_of_a_norm_that_ends_a_branch_is_its_end():
    """Gemma 2, OLMo 2, Swin v2: the last layer's size is undone, its norm's gain takes 1/m.

    The layer before it is inside: with s = n^-α the branch changes by s·η for Adam, s²·η for SGD.
    """
    models = [linen_model(PostNorm(depth), normal(2, 8)) for depth in (8, 2)]
    for optimizer, exponent in itertools.product(("sgd", "adam"), (0.5, 1.0)):
        found = multipliers(*models, depth_rule=optimizer, depth_exponent=exponent)
        inside, end = expected(optimizer, 4, exponent)
        assert value(found, "post0/scale") == pytest.approx(end)
        assert value(found, "post0/bias") == pytest.approx(end)
        assert value(found, "down0/kernel") == pytest.approx(inside)
        assert value(found, "up0/kernel") == pytest.approx(inside)
        assert value(found, "last/scale") == pytest.approx(1)


def test_batch_norm_that_ends_a_branch_of_convolutions():
    """ResNet: convolution, batch norm, added: the gain of the second norm ends the branch."""

    def batch_norm(y, scale, offset):
        mean = y.mean((0, 1, 2))
        return (y - mean) / jnp.sqrt(((y - mean) ** 2).mean((0, 1, 2)) + 1e-5) * scale + offset

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def make(depth):
        def apply(p, x):
            h = convolve(x, p["stem"])
            for layer in p["layers"]:
                y = RELU(batch_norm(convolve(h, layer["a"]), layer["s"], layer["t"]))
                h = RELU(h + batch_norm(convolve(y, layer["b"]), layer["gain"], layer["shift"]))
            return h.mean((1, 2)) @ p["out"]

        layer = {"a": spec(3, 3, 8, 8), "b": spec(3, 3, 8, 8)}
        layer |= {name: spec(8) for name in ("s", "t", "gain", "shift")}
        shapes = {"stem": spec(3, 3, 3, 8), "out": spec(8, 3), "layers": [layer] * depth}
        return Model(apply, shapes, (spec(2, 6, 6, 3),))

    try:
        found = multipliers(make(8), make(2), depth_rule="adam", depth_exponent=0.5)
    except ValueError as error:  # relu behind the sum: no stack whose stream is linear
        assert "residual" in str(error)
        return
    assert found["layers/0/gain"] == pytest.approx(0.25)
    assert found["layers/0/b"] == pytest.approx(0.5)


# Shared weights


def shared_stack(depth, shared, width=16):
    def apply(p, x):
        h = x @ p["stem"]
        for i in range(depth):
            layer = p["layers"][0 if shared else i]
            h = h + RELU(unit(h) @ layer["up"]) @ layer["down"]
        return unit(h) @ p["out"]

    layers = [specs(up=(width, width), down=(width, width))] * (1 if shared else depth)
    shapes = specs(stem=(8, width), out=(width, 3)) | {"layers": layers}
    return Model(apply, shapes, (normal(4, 8),))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_gradients_of_shared_weights_are_sums(exponent):
    """K uses, K/K_b = m: SGD m^(2α-1)/m inside, 1/m² at the end; Adam divides the sum out.

    Own leaves: η·n of change; one leaf used n times: a gradient of n terms that acts n times.
    """
    for optimizer in ("sgd", "adam"):
        inside, end = expected(optimizer, 8, exponent)
        for shared in (False, True):
            found = multipliers(
                shared_stack(16, shared),
                shared_stack(2, shared),
                depth_rule=optimizer,
                depth_exponent=exponent,
            )
            uses = 8 if shared and optimizer == "sgd" else 1
            assert found["layers/0/up"] == pytest.approx(inside / uses)
            assert found["layers/0/down"] == pytest.approx(end / uses)
            assert found["out"] == pytest.approx(1)


@pytest.mark.parametrize("how", ["scan", "linen", "haiku"])
def test_shared_weights_of_loops(how):
    """The same of a scan over nothing, of a linen submodule and of a Haiku module called again."""

    class Net(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16, name="stem")(x)
            up, down = nn.Dense(16, name="up"), nn.Dense(16, name="down")
            for _ in range(self.depth):
                h = h + down(RELU(up(RELU(h))))
            return nn.Dense(3, name="out")(h)

    def make(depth):
        if how == "linen":
            return linen_model(Net(depth), normal(2, 8)), "up/kernel", "down/kernel"

        if how == "haiku":

            def network(x):
                h = hk.Linear(16)(x)
                up, down = hk.Linear(16, name="up"), hk.Linear(16, name="down")
                for _ in range(depth):
                    h = h + down(RELU(up(RELU(h))))
                return hk.Linear(3)(h)

            return haiku_model(network, normal(2, 8)), "up/w", "down/w"

        def apply(p, x):
            def body(h, _):
                return h + RELU(RELU(h) @ p["up"]) @ p["down"], None

            return jax.lax.scan(body, x @ p["stem"], length=depth)[0] @ p["out"]

        shapes = specs(stem=(8, 16), up=(16, 16), down=(16, 16), out=(16, 3))
        return Model(apply, shapes, (normal(2, 8),)), "up", "down"

    wide, up, down = make(8)
    found = multipliers(wide, make(2)[0], depth_rule="sgd", depth_exponent=1.0)
    assert value(found, up) == pytest.approx(4 / 4)
    assert value(found, down) == pytest.approx(1 / 16)


def test_scanned_slices_are_leaves_of_their_own():
    """Stacked weights are used once a slice: the numbers of the loop over own leaves."""

    def make(depth):
        def apply(p, x):
            def body(h, layer):
                return h + RELU(unit(h) @ layer["up"]) @ layer["down"], None

            return unit(jax.lax.scan(body, x @ p["stem"], p["layers"])[0]) @ p["out"]

        shapes = specs(stem=(8, 16), out=(16, 3))
        layers = specs(up=(depth, 16, 16), down=(depth, 16, 16))
        return Model(apply, shapes | {"layers": layers}, (normal(4, 8),))

    for optimizer in ("sgd", "adam"):
        found = multipliers(make(16), make(2), depth_rule=optimizer, depth_exponent=1.0)
        inside, end = expected(optimizer, 8, 1.0)
        np.testing.assert_allclose(found["layers/up"], inside, rtol=1e-6)
        np.testing.assert_allclose(found["layers/down"], end, rtol=1e-6)


# The rule of effective depth, and kernels


def conditioned(how, projected, identity):
    """Blocks, the first with a layer in their skip, all of which read a condition in some way."""

    def apply(params, x, condition):
        condition = RELU(condition @ params["condition"])
        x = x0 = x @ params["stem"]
        for block in params["blocks"].values():
            h = unit(x) + (condition if how == "before the layer" else 0)
            h = h @ block["a"] + (condition if how == "inside" else 0)
            if how == "by a layer inside":
                h = h + condition @ block["c"]
            h = RELU(unit(h)) @ block["b"] + (condition if how == "at the end" else 0)
            x = h + (x @ block["skip"] if "skip" in block else x)
            if how == "by a layer of the stream":
                x = x + condition @ block["c"]
            elif how in ("in the stream", "from the start"):
                x = x + (condition if how == "in the stream" else x0)
        return unit(x) @ params["head"]

    def block(number):
        names = ["a", "b"] + ["skip"] * (number < projected)
        return specs(**dict.fromkeys(names + ["c"] * ("by a layer" in how), (16, 16)))

    blocks = {f"block{i:02}": block(i) for i in range(projected + identity)}
    params = specs(stem=(8, 16), condition=(4, 16), head=(16, 3)) | {"blocks": blocks}
    return archscale.trace(apply, params, spec(2, 8), spec(2, 4))


@pytest.mark.parametrize("how", [
    "not at all", "before the layer", "inside", "by a layer inside", "at the end", "in the stream",
    "by a layer of the stream", "from the start",
])  # fmt: skip
@pytest.mark.parametrize(("projected", "identity"), [(0, 2), (0, 5), (2, 2), (3, 0), (2, 5)])
def test_what_all_blocks_read_makes_no_block(how, projected, identity):
    architecture = conditioned(how, projected, identity)
    assert residual_depth(architecture) == projected + identity
    if not projected:  # what was there from the start skips the first of these
        assert len(residual_branches(architecture)) == identity


@pytest.mark.parametrize(
    ("factor", "noted"), [(1, False), (2**-0.5, True), (1.5, True), ("n", False)]
)
def test_a_stream_that_blocks_multiply_is_told(factor, noted):
    """(x+h)/√2 forgets; √(1-1/n) x + h/√n multiplies by 0.6 in all, whatever the depth."""

    def model(depth):
        kept, brought = (1 - 1 / depth) ** 0.5, depth**-0.5
        if factor != "n":
            kept = brought = factor

        def apply(params, x):
            x = x @ params["stem"]
            for block in params["blocks"].values():
                x = kept * x + brought * (RELU(unit(x) @ block["a"]) @ block["b"])
            return unit(x) @ params["head"]

        blocks = {f"block{i}": specs(a=(16, 16), b=(16, 16)) for i in range(depth)}
        return apply, specs(stem=(8, 16), head=(16, 3)) | {"blocks": blocks}

    (apply, params), base = model(8), model(4)
    plan = archscale.parametrize(apply, spec(2, 8), params=params, base=base, optimizer="adam")
    assert any("no rule answers for the depth" in one for one in plan.report().notes) == noted


def test_updates_of_a_stream_that_blocks_multiply_grow_with_depth():
    """What the note says: 16 blocks against 4, one step of Adam under the plan, three seeds."""

    def model(depth, factor):
        def apply(params, x):
            x = x @ params["stem"]
            for block in params["blocks"].values():
                x = (x + RELU(unit(x) @ block["a"]) @ block["b"]) * factor
            return unit(x) @ params["head"]

        blocks = {f"block{i:02}": specs(a=(32, 32), b=(32, 32)) for i in range(depth)}
        return apply, specs(stem=(8, 32), head=(32, 3)) | {"blocks": blocks}

    def change(depth, factor):
        (apply, params), x = model(depth, factor), normal(32, 8)
        plan = archscale.parametrize(apply, x, params=params, base=model(4, factor),
                                     optimizer="adam")  # fmt: skip
        optimizer = plan.optimizer(1e-4)

        @jax.jit
        def of_weights(weights):
            slopes = jax.grad(lambda w: jnp.mean(apply(w, x)[:, 0]))(weights)
            updates, _ = optimizer.update(slopes, optimizer.init(weights), weights)
            moved = jax.tree.map(jnp.add, weights, {**updates, "head": 0 * weights["head"]})
            return jnp.sqrt(jnp.mean((apply(moved, x) - apply(weights, x)) ** 2))

        return np.mean([of_weights(plan.init(jax.random.key(seed))) for seed in range(3)])

    assert change(16, 2**-0.5) > 3 * change(4, 2**-0.5)
    assert change(16, 1.0) < 1.5 * change(4, 1.0)


@pytest.mark.parametrize("skip", ["pool", "two layers"])
def test_a_skip_may_have_several_layers_if_the_branch_has_more(skip):
    """As where a block of a U-Net halves images before both ways, or ResNet-D pools in its skip."""

    def apply(params, x):
        x = x @ params["stem"]
        for block in params["blocks"].values():
            y = x @ block["shared"] if skip == "two layers" else x
            z = y if skip == "two layers" else nn.avg_pool(x, (2,), (1,), "SAME")
            x = RELU(y @ block["a"]) @ block["b"] + z @ block["skip"]
            x = x + RELU(unit(x) @ block["c"]) @ block["d"]
        return x.mean(1) @ params["head"]

    names = ["shared"] * (skip == "two layers") + [*"abcd", "skip"]
    blocks = {f"block{i}": specs(**dict.fromkeys(names, (16, 16))) for i in range(3)}
    params = specs(stem=(8, 16), head=(16, 3)) | {"blocks": blocks}
    architecture = archscale.trace(apply, params, spec(2, 6, 8))
    assert residual_depth(architecture) == 6
    assert len(residual_branches(architecture)) == 3


def test_effective_depth_counts_from_input_to_output():
    """[ED]: D counts layers and residual additions on the shortest way from input to output.

    Stem and readout are layers: 2 + 2·blocks, (4/18)^(3/2) for 8 blocks of two additions against 1.
    """

    def make(blocks):
        def apply(p, x):
            h = x @ p["stem"]
            for w in p["w"]:
                h = h + RELU(h) @ w
            return h @ p["out"]

        shapes = specs(stem=(8, 16), out=(16, 3)) | {"w": [spec(16, 16)] * (2 * blocks)}
        return Model(apply, shapes, (spec(2, 8),))

    found = archscale.learning_rate_multipliers(make(8).trace(), make(1).trace(), "effective_depth")
    assert found["stem"] == pytest.approx((4 / 18) ** 1.5)


def test_effective_depth_of_a_chain():
    """Layers alone: 10 against 4, stem and readout among them."""

    def make(hidden):
        return haiku_model(lambda x: hk.nets.MLP([16] * (hidden + 1) + [3])(x), normal(2, 8))

    found = archscale.learning_rate_multipliers(make(8).trace(), make(2).trace(), "effective_depth")
    np.testing.assert_allclose(list(found.values()), (4 / 10) ** 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    "kernel",
    [(1,), (9,), (1, 7), (3, 3), (5, 5), (3, 3, 3)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_kernels_divide_the_rate_by_the_root_of_their_positions(kernel):
    """[AAS Eq. 9] divides by q for q² positions: the root of the positions for any kernel."""

    def make(size):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Conv(4, size)(x)
                for _ in range(2):
                    x = nn.Conv(4, size)(RELU(x))
                return nn.Dense(3)(RELU(x).mean(tuple(range(1, x.ndim - 1))))

        return linen_model(Net(), spec(1, *(8,) * len(size), 2)).trace()

    base = make((1,) * len(kernel))
    found = archscale.learning_rate_multipliers(make(kernel), base, "path_sum")
    np.testing.assert_allclose(list(found.values()), np.prod(kernel) ** -0.5, rtol=1e-6)
