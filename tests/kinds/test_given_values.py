"""Values that the traced arrays hold enter what the rules suppose and promise.

Biases that do not start at 0, gains that do not start at 1, and weights that start at 0 (of
adaLN-Zero, LoRA, a readout) change the moments of everything behind them; measured at width 256.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import KEY, check_promised, normal, spec, specs, value

pytestmark = pytest.mark.quick_compilation

WIDTH, RELU = 256, jax.nn.relu
CONSTANT, ZEROS = nn.initializers.constant, nn.initializers.zeros
X = normal(256, 32)


def dense(name, **options):
    return nn.Dense(WIDTH, name=name, **options)


def head(x):
    return nn.Dense(4, name="head")(RELU(x))


class ClosedGate(nn.Module):
    """A highway layer whose transform gate starts nearly closed."""

    bias: float = -3.0

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        gate = nn.sigmoid(dense("gate", bias_init=CONSTANT(self.bias))(h))
        return head((1 - gate) * h + gate * dense("up")(h))


class StepSize(nn.Module):
    """The step of a selective layer: softplus of a layer with a bias of -4.6, drawn per channel."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        bias = lambda key, shape, dtype=None: jax.random.normal(key, shape) - 4.6  # noqa: E731
        step = nn.softplus(dense("dt", bias_init=bias)(h))
        return head(dense("out")(step * h))


class Shifted(nn.Module):
    """A bias that the stem adds, and one behind a normalization with gains of a half."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem", bias_init=CONSTANT(1.5))(x)
        norm = nn.LayerNorm(name="norm", scale_init=CONSTANT(0.5), bias_init=CONSTANT(-1.0))
        return head(dense("out")(RELU(norm(h))))


class SummedActivations(nn.Module):
    """A bias before an activation that is summed, as in the authors' code."""

    @nn.compact
    def __call__(self, x):
        h = RELU(dense("stem", bias_init=CONSTANT(0.5))(x))
        h = h + RELU(dense("inner", bias_init=CONSTANT(2.0))(h))
        return nn.Dense(4, name="head")(h)


class ScaledBranch(nn.Module):
    """A bias inside of a branch that a constant multiplies."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        return head(h + 0.5 * dense("inner", bias_init=CONSTANT(3.0))(RELU(h)))


class FusedGates(nn.Module):
    """One layer with a bias for two gates."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        both = nn.Dense(2 * WIDTH, name="both", bias_init=CONSTANT(2.0))(h)
        gate, feature = jnp.split(both, 2, -1)
        return head(nn.sigmoid(gate) * feature)


class ResponseNorm(nn.Module):
    """Global response normalization, whose gain starts at 0, as in ConvNeXt V2."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        y = nn.gelu(dense("up")(h))
        size = jnp.linalg.norm(y, axis=0, keepdims=True)
        size = size / (jnp.mean(size, -1, keepdims=True) + 1e-6)
        gain, bias = self.param("gain", ZEROS, (WIDTH,)), self.param("bias", ZEROS, (WIDTH,))
        return head(h + dense("down")(gain * (y * size) + bias + y))


class AdaptiveNorm(nn.Module):
    """adaLN-Zero: the layer that makes scale, shift and gate starts at zero."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        made = nn.Dense(3 * WIDTH, name="ada", kernel_init=ZEROS)(nn.silu(dense("cond")(x)))
        scale, shift, gate = jnp.split(made, 3, -1)
        y = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale) + shift
        h = h + gate * dense("out")(RELU(dense("in")(y)))
        return nn.Dense(4, name="head")(nn.LayerNorm(name="norm")(h))


class LowRank(nn.Module):
    """A low-rank addition (LoRA) whose second matrix starts at zero, and a readout that does."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        low = nn.Dense(256, name="A", use_bias=False)(RELU(h))
        h = dense("hidden")(RELU(h)) + dense("B", use_bias=False, kernel_init=ZEROS)(low)
        return nn.Dense(4, name="head", kernel_init=ZEROS)(RELU(h))


class ReZero(nn.Module):
    """A residual branch behind a scalar that starts at 0."""

    @nn.compact
    def __call__(self, x):
        h = dense("stem")(x)
        return head(h + self.param("alpha", ZEROS, ()) * dense("inner")(RELU(h)))


MODELS = [
    ClosedGate(), ClosedGate(2.0), StepSize(), Shifted(), SummedActivations(), ScaledBranch(),
    FusedGates(), ResponseNorm(), AdaptiveNorm(), LowRank(), ReZero(),
]  # fmt: skip


def read(module):
    params = module.init(KEY, X)["params"]
    apply = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return apply, params, archscale.trace(apply, params, X)


traced: Callable[[Any], Any] = functools.cache(read)


@pytest.mark.parametrize("rule", ["second_moment", "target_in_degree"])
@pytest.mark.parametrize("module", MODELS, ids=lambda module: type(module).__name__)
def test_moments_are_those_of_the_given_values(module, rule):
    apply, params, _ = traced(module)
    check_promised(apply, params, (X,), rule)


@pytest.mark.parametrize(
    ("module", "zero"),
    [(AdaptiveNorm(), ["ada/kernel"]), (LowRank(), ["B/kernel", "head/kernel"])],
    ids=["adaln", "lora"],
)
def test_weights_that_start_at_zero_stay_zero(module, zero):
    _, params, architecture = traced(module)
    assert not set(zero) & archscale.weight_standard_deviations(architecture).keys()
    for initialize in (archscale.initialize, jax.jit(archscale.initialize, static_argnums=2)):
        new = initialize(jax.random.key(3), params, architecture)
        for name in zero:
            layer, leaf = name.split("/")
            assert not new[layer][leaf].any(), name
    shapes = jax.eval_shape(lambda: params)
    new = archscale.initialize(jax.random.key(3), shapes, architecture)
    assert not new[zero[0].split("/")[0]]["kernel"].any()
    note = archscale.report(architecture, rule="none", params=params).notes[0]
    assert all(name in note for name in zero)
    assert "eval_shape" in note


def test_weights_are_drawn_where_shapes_or_placeholders_were_traced():
    apply, params, _ = traced(LowRank())
    for given in (jax.eval_shape(lambda: params), jax.tree.map(jnp.zeros_like, params)):
        architecture = archscale.trace(apply, given, X)
        assert value(archscale.weight_standard_deviations(architecture), "B/kernel") > 0
        assert archscale.initialize(KEY, given, architecture)["B"]["kernel"].any()


def test_a_layer_that_starts_at_zero_is_not_a_contribution():
    """The layer beside it gets the whole variance, 2/n, not half of it."""
    _, _, architecture = traced(LowRank())
    deviations = archscale.weight_standard_deviations(architecture, "target_in_degree")
    np.testing.assert_allclose(value(deviations, "hidden/kernel"), np.sqrt(2 / WIDTH))


@pytest.mark.parametrize("rule", ["second_moment", "target_in_degree"])
def test_a_branch_that_is_multiplied_by_zero_carries_its_source(rule):
    """Behind ReLU 2/n, as without the scalar; no share of the stream decides it."""
    _, _, architecture = traced(ReZero())
    deviations = archscale.weight_standard_deviations(architecture, rule)
    np.testing.assert_allclose(value(deviations, "inner/kernel"), np.sqrt(2 / WIDTH))


def test_given_values_are_what_shapes_become():
    _, params, architecture = traced(ClosedGate())
    new = archscale.initialize(KEY, jax.eval_shape(lambda: params), architecture)
    np.testing.assert_array_equal(new["gate"]["bias"], -3.0)


# Kernels that have a mean


@pytest.mark.parametrize(
    "made", [jnp.square, jnp.abs, jax.nn.softplus, jnp.exp], ids=lambda made: made.__name__
)
def test_a_kernel_with_a_mean_is_promised_with_it(made):
    """Outputs of n inputs of mean m have the mean n·m·E[w]: their moment grows with n²."""
    width = 256

    def apply(params, x):
        h = RELU(x @ params["stem"])
        return RELU(h @ made(params["inner"]) / width) @ params["head"]

    params = {
        name: jax.random.normal(jax.random.key(seed), shape)
        for seed, (name, shape) in enumerate(
            {"stem": (32, width), "inner": (width, width), "head": (width, 4)}.items()
        )
    }
    check_promised(apply, params, (X,), "second_moment")


def modulated(params, x, style):
    """A modulated layer with its demodulation, written on the features (StyleGAN 2)."""
    h = jax.nn.leaky_relu(x @ params["stem"], 0.2)
    scale = style @ params["affine"] + 1.0
    size = jnp.square(scale) @ jnp.square(params["kernel"])
    y = ((h * scale) @ params["kernel"]) * jax.lax.rsqrt(size + 1e-8)
    return jax.nn.leaky_relu(y, 0.2) @ params["head"]


MODULATED = specs(stem=(32, WIDTH), affine=(32, WIDTH), kernel=(WIDTH, WIDTH), head=(WIDTH, 3))


def test_a_norm_of_the_weights_columns_does_not_decide_their_size():
    params = jax.tree.map(lambda s: jax.random.normal(KEY, s.shape), MODULATED)
    inputs = normal(512, 32), normal(512, 32, seed=2)
    new = check_promised(modulated, params, inputs, "second_moment", rtol=0.2)
    assert 0.5 < float(jnp.std(new["kernel"])) * np.sqrt(WIDTH) < 2


def modulated_kernel(params, x, style):
    scale = style @ params["affine"]
    kernel = params["kernel"][None] * scale[:, :, None]
    kernel = kernel * jax.lax.rsqrt(jnp.sum(kernel**2, axis=1, keepdims=True) + 1e-8)
    h = jnp.einsum("bi,bio->bo", RELU(x @ params["stem"]), kernel)
    return RELU(h) @ params["head"]


def modulated_convolution(params, x, style):
    def one(features, style):
        scale = style @ params["affine"]
        kernel = params["kernel"] * scale[None, None, :, None]
        return jax.lax.conv_general_dilated(
            features[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]

    return RELU(jax.vmap(one)(RELU(x @ params["stem"]), style)) @ params["head"]


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_kernel_that_features_scale_raises_with_a_way_on(kind):
    if kind == "dense":
        apply, inputs, shapes = modulated_kernel, (spec(4, 32), spec(4, 32)), MODULATED
    else:
        apply, inputs = modulated_convolution, (spec(4, 6, 6, 32), spec(4, 32))
        shapes = MODULATED | specs(kernel=(3, 3, WIDTH, WIDTH))
    with pytest.raises(archscale.TraceError, match=r"kernel.*\(features \* scale\) @ kernel"):
        archscale.trace(apply, shapes, *inputs)
    archscale.trace(modulated, MODULATED, spec(4, 32), spec(4, 32))  # the way on that it names


@pytest.mark.parametrize("rule", ["target_in_degree", "second_moment"])
def test_what_a_bias_adds_is_not_carried_on(rule):
    """Layers behind a stem whose bias starts at 1.5 bring what the stem brings without it, 2."""
    _, _, architecture = traced(Shifted())
    plain = dict(Shifted().init(KEY, X)["params"])
    plain["stem"] = {**plain["stem"], "bias": jnp.zeros(WIDTH)}
    apply = lambda params, x: Shifted().apply({"params": params}, x)  # noqa: E731
    expected = archscale.second_moments(archscale.trace(apply, plain, X), rule)
    found = archscale.second_moments(architecture, rule)
    assert found[0] == pytest.approx(expected[0] + 1.5**2)
    assert found[1] == pytest.approx(expected[1], rel=0.01)


def test_a_chain_behind_a_bias_keeps_its_moment():
    def apply(params, x):
        h = x @ params["stem"] + params["bias"]
        for name in ("w0", "w1"):
            h = RELU(h) @ params[name]
        return h @ params["head"]

    width = 512
    shapes = {"stem": (32, width), "w0": (width, width), "w1": (width, width), "head": (width, 4)}
    params = {name: jax.random.normal(KEY, shape) for name, shape in shapes.items()}
    params["bias"] = jnp.full(width, 3.0)
    for rule in ("target_in_degree", "second_moment"):
        promised = archscale.second_moments(archscale.trace(apply, params, X), rule)
        np.testing.assert_allclose([promised[1], promised[2]], 2.0, rtol=1e-6)
        check_promised(apply, params, (X,), rule)
