"""Second moments at initialization: what an edge does, however it is written (theory §9).

The layer behind an edge of gain ρ is drawn with C = share / (d_in·ρ), so that every vertex has the
second moment of the first. ReLU takes half, a normalization gives its scale squared, whatever is
known of a chain of operations counts. Where no closed form is at hand, the judge is what the
network computes: second moments of its features, of width 256, over several draws.
"""

import math
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    KEY,
    Model,
    deviation,
    equinox_model,
    haiku_model,
    linen_model,
    moments,
    normal,
    same_moments,
    spec,
    specs,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu
WIDTH = 256
BOTH_RULES = pytest.mark.parametrize("rule", [None, "second_moment"])


def chain(function, width=WIDTH, between=None):
    """Stem, an elementwise or other function of its features, a layer, and a readout."""

    def apply(p, x):
        return (RELU if between is None else between)(function(x @ p["a"]) @ p["b"]) @ p["c"]

    return Model(apply, specs(a=(64, width), b=(width, width), c=(width, 3)), (normal(128, 64),))


def numerator(model, ending="b", rule=None, fan=WIDTH):
    """C of a layer: its variance times its fan-in."""
    return float(deviation(model, ending, rule)) ** 2 * fan


# Names of rules


# Normalization, in any spelling

NORMS = {
    "mean of squares": lambda h: h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True)),
    "einsum": lambda h: (
        h * jax.lax.rsqrt(jnp.einsum("...i,...i->...", h, h)[..., None] / h.shape[-1])
    ),
    "inner product of one example": lambda h: jax.vmap(
        lambda one: one / jnp.sqrt(one @ one / one.shape[-1])
    )(h),
    "vdot": lambda h: jax.vmap(lambda one: one * (one.shape[0] / jnp.vdot(one, one)) ** 0.5)(h),
    "where guard": lambda h: (
        h
        * h.shape[-1] ** 0.5
        / jnp.where(
            jnp.sum(h * h, -1, keepdims=True) > 0, jnp.sqrt(jnp.sum(h * h, -1, keepdims=True)), 1.0
        )
    ),
    "optax.safe_norm": lambda h: (
        h * h.shape[-1] ** 0.5 / optax.safe_norm(h, 1e-6, axis=-1, keepdims=True)
    ),
    "linalg.norm": lambda h: h * h.shape[-1] ** 0.5 / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "maximum guard": lambda h: (
        h * h.shape[-1] ** 0.5 / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
    ),
    "mean and variance": lambda h: (
        (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    ),
    "jax.nn.standardize": lambda h: jax.nn.standardize(h),
    "groups": lambda h: (lambda g: g / jnp.sqrt(jnp.mean(g * g, -1, keepdims=True) + 1e-6))(
        h.reshape(h.shape[0], 8, -1)
    ).reshape(h.shape),
    "eqx.nn.RMSNorm": lambda h: jax.vmap(
        eqx.nn.RMSNorm(h.shape[-1], use_weight=False, use_bias=False)
    )(h),
    "eqx.nn.LayerNorm": lambda h: jax.vmap(
        eqx.nn.LayerNorm(h.shape[-1], use_weight=False, use_bias=False)
    )(h),
}


@BOTH_RULES
@pytest.mark.parametrize("spelling", NORMS)
def test_a_norm_is_not_an_activation_however_it_is_written(spelling, rule):
    """ρ = scale² = 1 behind a norm, as at the inputs: C of the stem by moments, 1 by `target`.

    The default rule halves C = 2 where no activation is read; by moments the layer behind a norm
    must bring what the stem brings, from features of the same second moment 1.
    """
    model = chain(NORMS[spelling])
    expected = 1.0 if rule is None else numerator(model, "a", rule, 64)
    assert numerator(model, rule=rule) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("spelling", ["mean of squares", "einsum", "where guard", "groups"])
def test_moments_behind_a_norm_are_those_before_it(spelling):
    """Measured: every vertex has the second moment of the first."""
    same_moments(moments(chain(NORMS[spelling]), "second_moment"))


def test_norms_of_frameworks_are_one_norm():
    """RMSNorm of linen, Haiku and Equinox: the same network, the same standard deviations."""
    x = normal(4, 16)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RMSNorm()(nn.Dense(32, use_bias=False)(x))
            return nn.Dense(3, name="c")(RELU(nn.Dense(32, name="b")(h)))

    def of_haiku(x):
        h = hk.RMSNorm(-1)(hk.Linear(32, with_bias=False)(x))
        return hk.Linear(3, name="c")(RELU(hk.Linear(32, name="b")(h)))

    def of_equinox(key):
        linear = eqx.nn.Linear
        return eqx.nn.Sequential(
            [
                linear(16, 32, use_bias=False, key=key),
                eqx.nn.RMSNorm(32),
                linear(32, 32, key=key),
                eqx.nn.Lambda(RELU),
                linear(32, 3, key=key),
            ]
        )

    for rule in (None, "second_moment"):
        found = [
            deviation(linen_model(Linen(), x), "b/kernel", rule),
            deviation(haiku_model(of_haiku, x), "b/w", rule),
            deviation(equinox_model(of_equinox, x), "layers/2/weight", rule),
        ]
        np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_a_linear_transform_of_features_is_not_an_activation():
    """fft is linear: the layer behind it reads no activation, so that its C is not doubled."""

    def there_and_back(h):
        return jnp.fft.irfft(jnp.fft.rfft(h, axis=-1), n=h.shape[-1], axis=-1)

    assert numerator(chain(there_and_back)) == pytest.approx(1, rel=0.02)


# Activations

ACTIVATIONS = {
    "relu": RELU,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "silu": jax.nn.silu,
    "silu by hand": lambda h: h / (1 + jnp.exp(-h)),
    "tanh": jnp.tanh,
    "squared relu": lambda h: jnp.square(RELU(h)),
    "abs": jnp.abs,
    "leaky relu": lambda h: jnp.where(h > 0, h, 0.2 * h),
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sine": lambda h: jnp.sin(3 * h),
    "mish": lambda h: h * jnp.tanh(jax.nn.softplus(h)),
    "clipped": lambda h: jnp.clip(h, -1, 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_its_own_gain(name):
    """ρ = E[φ(z)²], z ~ N(0, m): the layer behind φ has the second moment before it, measured."""
    same_moments(moments(chain(ACTIVATIONS[name]), "second_moment"))


def test_gain_of_an_activation_is_its_gaussian_integral():
    """C·E[φ(z)²] = m, m what the stem gives, the integral by equidistant points."""
    z = np.linspace(-20, 20, 200_001)
    for name in ("relu", "gelu", "silu", "tanh", "abs", "squared relu"):
        model = chain(ACTIVATIONS[name])
        moment = numerator(model, "a", "second_moment", 64)
        density = np.exp(-(z**2) / (2 * moment)) / math.sqrt(2 * math.pi * moment)
        phi = np.asarray(ACTIVATIONS[name](jnp.asarray(z, jnp.float32)), np.float64)
        expected = moment / (np.sum(phi**2 * density) * (z[1] - z[0]))
        found = numerator(model, rule="second_moment")
        assert found == pytest.approx(expected, rel=0.02), name


@BOTH_RULES
@pytest.mark.parametrize(
    "spelling",
    [
        lambda h: jnp.maximum(h, 0),
        lambda h: jnp.where(h > 0, h, 0),
        lambda h: h * (h > 0),
        lambda h: 0.5 * (h + jnp.abs(h)),
        lambda h: jax.nn.leaky_relu(h, 0.0),
        lambda h: jnp.clip(h, min=0),
        lambda h: jax.lax.select(h > 0, h, jnp.zeros_like(h)),
    ],
    ids=["maximum", "where", "mask", "half of h + |h|", "leaky_relu", "clip", "select"],
)
def test_relu_is_relu_however_it_is_written(spelling, rule):
    """C = 2 behind ReLU, as it takes half [AAS Eq. 4]."""
    assert numerator(chain(spelling), rule=rule) == pytest.approx(2, rel=0.02)


# Constants that multiply


def blocks(sum_of, branch, inner=1.0, depth=4, width=WIDTH):
    """A residual stack x -> c·(x + s·f(x)), with what it adds and the stream behind every block."""

    def run(p, x):
        x = x @ p["stem"]
        streams, branches = [x], []
        for up, down in zip(p["up"], p["down"], strict=True):
            hidden = inner * RELU((inner * RELU(x)) @ up)
            branches.append(branch(hidden @ down))
            streams.append(x + branches[-1])
            x = sum_of(streams[-1])
        return x @ p["out"], streams, branches

    shapes = specs(stem=(64, width), out=(width, 3)) | {
        name: [spec(width, width)] * depth for name in ("up", "down")
    }
    return Model(lambda p, x: run(p, x)[0], shapes, (normal(64, 64),)), run


@pytest.mark.parametrize(
    ("sum_of", "branch", "inner"),
    [
        (lambda x: x, lambda y: y, 1.0),
        (lambda x: np.float32(2**-0.5) * x, lambda y: y, 1.0),
        (lambda x: x, lambda y: y / 10, 1.0),
        (lambda x: x, lambda y: jnp.full(y.shape[-1], 0.1) * y, 1.0),
        (lambda x: x, lambda y: y, 2**0.5),
    ],
    ids=[
        "plain",
        "sum times 1/sqrt(2)",
        "branch divided by 10",
        "branch times a constant vector",
        "sqrt(2)·relu",
    ],
)
def test_constants_that_multiply_features_count(sum_of, branch, inner):
    """ρ = g²·E[φ²]: n blocks grow the stream at most by exp(1/4) = 1.28, whatever multiplies it.

    And they add what they shall, a quarter of the stream over the blocks: a tenth of the branch is
    not a hundredth of its share. Measured over 4 blocks.
    """
    model, run = blocks(sum_of, branch, inner)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert 0.9 < found[-1] / found[0] < 1.28 * 1.1
    if sum_of(1.0) == 1:
        assert found[-1] / found[0] == pytest.approx(math.exp(0.25), rel=0.12)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_multiplier_that_the_model_has_is_not_applied_twice(power):
    """x + f(x)/n^p, n = 8: by §9 its weights bring the share that they bring without 1/n^p.

    1/√n: the stream grows as without the multiplier, by exp(1/4). 1/n is CompleteP's own; a branch
    then brings at least 1/(4n²) of the stream, its share at α = 1, and never the n-th part of it.
    """
    depth = 8
    model, run = blocks(lambda x: x, lambda y: y / depth**power, depth=depth)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[2] + run(p, x)[1])
    added, streams = found[:depth], found[depth:]
    shares = added / streams[:-1]
    assert np.all(shares < 0.25 / depth * 1.4)
    if power == 0.5:
        np.testing.assert_allclose(shares.mean(), 0.25 / depth, rtol=0.15)
    else:
        assert shares.mean() > 0.25 / depth**2 * 0.85


def test_multiplied_embeddings():
    """table[ids]·√d (Gemma, the first transformer): branches add a quarter of what it gives."""
    depth, width = 4, 128

    def run(p, ids):
        x = p["table"][ids] * width**0.5
        added, streams = [], [x]
        for up, down in zip(p["up"], p["down"], strict=True):
            added.append(RELU(x @ up) @ down)
            x = x + added[-1]
            streams.append(x)
        return x @ p["out"], added, streams

    shapes = specs(table=(50, width), out=(width, 50)) | {
        name: [spec(width, width)] * depth for name in ("up", "down")
    }
    ids = jax.random.randint(KEY, (4, 16), 0, 50)
    model = Model(lambda p, ids: run(p, ids)[0], shapes, (ids,))
    found = moments(model, "second_moment", lambda p, ids: run(p, ids)[1] + run(p, ids)[2])
    shares = found[:depth] / found[depth:-1]
    np.testing.assert_allclose(shares.mean(), 0.25 / depth, rtol=0.15)


def test_a_constant_on_a_hidden_chain():
    """sqrt(2)·relu keeps the second moment by itself: the layer behind it has C = 1."""
    model = chain(lambda h: 2**0.5 * RELU(h))
    assert numerator(model, rule="second_moment") == pytest.approx(1, rel=0.02)
    same_moments(moments(model, "second_moment"))


@BOTH_RULES
@pytest.mark.parametrize(
    "scaled",
    [
        lambda w: w * (2 / w.shape[0]) ** 0.5,
        lambda w: w / (w.shape[0] / 2) ** 0.5,
        lambda w: jnp.float32(3.0) * w,
    ],
    ids=["equalized rate", "divided", "three"],
)
def test_a_constant_in_front_of_the_weight_divides_its_deviation(scaled, rule):
    """Equalized learning rates (StyleGAN): std·c is what std is without c."""

    def make(scale):
        def apply(p, x):
            return RELU(RELU(x @ p["a"]) @ scale(p["b"])) @ p["c"]

        return Model(apply, specs(a=(16, 64), b=(64, 64), c=(64, 3)), (normal(4, 16),))

    constant = float(scaled(jnp.ones((64, 64)))[0, 0])
    found = deviation(make(scaled), "b", rule) * constant
    np.testing.assert_allclose(found, deviation(make(lambda w: w), "b", rule), rtol=1e-5)


def test_equalized_rate_of_stem_and_readout():
    """The same at both ends: features of the stem and the logits are of the size without c."""

    def apply(p, x):
        return RELU(x @ (0.1 * p["a"])) @ (p["c"] / 8)

    model = Model(apply, specs(a=(16, 64), c=(64, 3)), (normal(4, 16),))
    assert deviation(model, "a") == pytest.approx(10 * math.sqrt(2 / 16), rel=1e-5)
    assert deviation(model, "c") == pytest.approx(8 * math.sqrt(2) / 64, rel=1e-5)


# Layers that read the inputs, among others


class Inject(nn.Module):
    layers: int = 4
    width: int = WIDTH

    @nn.compact
    def __call__(self, x):
        z = nn.Dense(self.width, name="first")(x)
        for i in range(self.layers):
            hidden = nn.Dense(self.width, name=f"hidden{i}")(RELU(z))
            z = hidden + nn.Dense(self.width, name=f"input{i}")(x)
        return nn.Dense(10)(z)


class Seven(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.Dense(WIDTH, name="hidden")(RELU(nn.Dense(WIDTH, name="first")(x)))
        for i in range(7):
            z = z + nn.Dense(WIDTH, name=f"input{i}")(x[:, 32 * i : 32 * i + 32])
        return nn.Dense(10)(RELU(z))


@BOTH_RULES
def test_injected_inputs_count_in_the_in_degree(rule):
    """[AAS Eq. 12] at input edges too: C = 2/d_in(v), here 1 beside one hidden layer."""
    model = linen_model(Inject(), normal(64, 256))
    first = numerator(model, "first/kernel", rule, 256)
    assert rule is not None or first == pytest.approx(2, rel=0.02)
    for i in range(4):
        assert numerator(model, f"input{i}/kernel", rule, 256) == pytest.approx(first / 2, rel=0.02)
        assert numerator(model, f"hidden{i}/kernel", rule) == pytest.approx(1, rel=0.02)


@BOTH_RULES
def test_injected_inputs_leave_all_vertices_alike(rule):
    """Measured, with one input layer beside a hidden one and with seven."""
    same_moments(moments(linen_model(Inject(), normal(64, 256)), rule))
    same_moments(moments(linen_model(Seven(), normal(64, 256)), rule))


@BOTH_RULES
def test_eight_contributions_get_an_eighth_each(rule):
    """C = 2/8 for seven layers that read the inputs and one that reads ReLUs of moment 2·½."""
    model = linen_model(Seven(), normal(64, 256))
    first = numerator(model, "first/kernel", rule, 256)
    assert numerator(model, "hidden/kernel", rule) == pytest.approx(0.25, rel=0.02)
    for i in range(7):
        found = numerator(model, f"input{i}/kernel", rule, 32)
        assert found == pytest.approx(first / 8, rel=0.02)


def test_deep_set_with_two_inputs():
    """A hidden layer of one input beside the stem of another (Equinox, `W @ x`): C = 1 for both."""

    class Two(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear
        deeper: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(16, 32, key=key)
            self.second = eqx.nn.Linear(24, 32, key=key)
            self.deeper = eqx.nn.Linear(32, 32, key=key)
            self.out = eqx.nn.Linear(32, 3, key=key)

        def __call__(self, x, y):
            return self.out(RELU(self.deeper(RELU(self.first(x))) + self.second(y)))

    model = equinox_model(Two, normal(4, 16), normal(4, 24, seed=2))
    assert numerator(model, "second/weight", fan=24) == pytest.approx(1, rel=0.02)
    assert numerator(model, "deeper/weight", fan=32) == pytest.approx(1, rel=0.02)
    assert numerator(model, "first/weight", fan=16) == pytest.approx(2, rel=0.02)


# Convolutions and pools


@pytest.mark.parametrize(
    ("kernel", "stride"), [(2, 2), (4, 2), (3, 2), (3, 3), (3, 1)], ids=lambda size: str(size)
)
def test_transposed_convolutions_reach_a_unit_with_fewer_inputs(kernel, stride):
    """k²/s² positions of the kernel reach one unit: C = 2 over that fan (linen, Haiku)."""
    x = normal(1, 8, 8, 4)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3))(x)
            window, strides = (kernel, kernel), (stride, stride)
            x = nn.ConvTranspose(16, window, strides, name="up")(RELU(x))
            return nn.Dense(5)(RELU(x).mean((1, 2)))

    def of_haiku(x):
        x = hk.Conv2DTranspose(16, kernel, stride, name="up")(RELU(hk.Conv2D(16, 3)(x)))
        return hk.Linear(5)(RELU(x).mean((1, 2)))

    fan = 16 * kernel**2 / stride**2
    for rule in (None, "second_moment"):
        assert numerator(linen_model(Linen(), x), "up/kernel", rule, fan) == pytest.approx(2, 0.02)
        assert numerator(haiku_model(of_haiku, x), "up/w", rule, fan) == pytest.approx(2, 0.02)


def test_transposed_convolutions_in_one_and_three_dimensions():
    """The same of Equinox, channels first: 4 positions at stride 2 are 2, 2³ at stride 2 are 1."""
    for dimensions, layer, window in (
        (1, eqx.nn.ConvTranspose1d, 4),
        (3, eqx.nn.ConvTranspose3d, 2),
    ):
        plain = {1: eqx.nn.Conv1d, 3: eqx.nn.Conv3d}[dimensions]

        class Up(eqx.Module):
            first: Any
            up: Any
            out: eqx.nn.Linear

            def __init__(self, key, plain=plain, layer=layer, window=window):
                self.first = plain(3, 8, 1, key=key)
                self.up = layer(8, 8, window, 2, key=key)
                self.out = eqx.nn.Linear(8, 2, key=key)

            def __call__(self, x):
                z = RELU(self.up(RELU(self.first(x))))
                return self.out(z.reshape(8, -1).mean(1))

        model = equinox_model(Up, normal(2, 3, *[4] * dimensions))
        fan = 8 * window**dimensions / 2**dimensions
        assert numerator(model, "up/weight", fan=fan) == pytest.approx(2, rel=0.02)


def test_moments_behind_transposed_convolutions():
    """Measured in a decoder whose windows tile, so that no border differs: all vertices alike."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(64, (1, 1))(x)
            for _ in range(2):
                x = nn.ConvTranspose(64, (2, 2), (2, 2), padding="VALID")(RELU(x))
            return nn.Dense(5)(x.mean((1, 2)))

    same_moments(moments(linen_model(Decoder(), normal(8, 2, 2, 64)), None))


def test_dilation_and_stride_of_a_convolution_leave_the_fan():
    """A dilated or strided convolution reads k² positions as any: the same variance."""

    class Net(nn.Module):
        dilation: int = 1
        stride: int = 1

        @nn.compact
        def __call__(self, x):
            x = RELU(nn.Conv(8, (3, 3))(x))
            steps, holes = (self.stride,) * 2, (self.dilation,) * 2
            x = nn.Conv(8, (3, 3), steps, kernel_dilation=holes, name="middle")(x)
            return nn.Dense(3)(RELU(x).mean((1, 2)))

    x = normal(1, 8, 8, 4)
    for net in (Net(), Net(dilation=2), Net(stride=2)):
        model = linen_model(net, x)
        assert numerator(model, "middle/kernel", fan=72) == pytest.approx(2, rel=0.02)


def averaged(how, h):
    b, rows, columns, c = h.shape
    if how == "reshape":
        return h.reshape(b, rows // 4, 4, columns // 4, 4, c).mean((2, 4))
    if how == "linen":
        return nn.avg_pool(h, (4, 4), (4, 4))
    if how == "haiku":
        return hk.avg_pool(h, (1, 4, 4, 1), (1, 4, 4, 1), "VALID")
    if how == "equinox":
        pool = eqx.nn.AvgPool2d(4, 4)
        return jnp.moveaxis(jax.vmap(pool)(jnp.moveaxis(h, 3, 1)), 1, 3)
    window = (1, 4, 4, 1)
    return jax.lax.reduce_window(h, 0.0, jax.lax.add, window, window, "VALID") / 16


@pytest.mark.parametrize("how", ["linen", "haiku", "equinox", "reduce_window"])
def test_a_vertex_of_an_average_pool_is_a_mean(how):
    """Features are those of the same function that writes reshape and mean; the pool's its mean."""

    def make(how):
        def apply(p, x):
            h = RELU(x @ p["a"]) @ p["b"]
            h = averaged(how, h)
            return RELU(RELU(h) @ p["c"]).mean((1, 2)) @ p["d"]

        shapes = specs(a=(3, 16), b=(16, 16), c=(16, 16), d=(16, 5))
        return Model(apply, shapes, (normal(4, 8, 8, 3),))

    def pooled(p, x):
        return [averaged("reshape", RELU(x @ p["a"]) @ p["b"])]

    found, expected = moments(make(how), None, seeds=1), moments(make("reshape"), None, seeds=1)
    pool = moments(make("reshape"), None, pooled, seeds=1)
    np.testing.assert_allclose(sorted(found), sorted([*expected, *pool]), rtol=1e-4)


# Dropout, sums of one feature, concatenation


@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize("framework", ["linen", "haiku", "equinox", "plain"])
def test_dropout_raises_the_second_moment(framework, keep):
    """Features·mask/keep have 1/keep of the second moment: C is keep times what it is without."""
    rate = 1 - keep
    x = normal(4, 16)

    def drop(h, rate, key):
        if framework == "equinox":
            return eqx.nn.Dropout(rate)(h, key=key)
        if framework == "haiku":
            return hk.dropout(key, rate, h)
        if framework == "linen":
            return nn.Dropout(rate, deterministic=False).apply({}, h, rngs={"dropout": key})
        return jnp.where(jax.random.bernoulli(key, keep, h.shape), h / keep, 0)

    def make(used):
        def apply(p, x, key):
            h = RELU(x @ p["a"])
            h = drop(h, rate, key) if used else h
            return RELU(h @ p["b"]) @ p["c"]

        return Model(apply, specs(a=(16, 32), b=(32, 32), c=(32, 3)), (x, KEY))

    without = numerator(make(False), rule="second_moment", fan=32)
    found = numerator(make(True), rule="second_moment", fan=32)
    assert found == pytest.approx(keep * without, rel=0.02)


def test_dropout_that_is_off_is_nothing():
    """`deterministic=True` leaves the numbers of the network without dropout."""

    class Net(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x):
            h = nn.Dropout(self.rate, deterministic=True)(RELU(nn.Dense(16)(x)))
            return nn.Dense(3)(RELU(nn.Dense(16, name="b")(h)))

    x = normal(2, 8)
    for rule in (None, "second_moment"):
        np.testing.assert_allclose(
            deviation(linen_model(Net(0.5), x), "b/kernel", rule),
            deviation(linen_model(Net(0.0), x), "b/kernel", rule),
        )


@pytest.mark.parametrize(
    "double",
    [lambda h: h + h, lambda h: 2 * h, lambda h: h * 2.0, lambda h: h + h + h - h],
    ids=["h + h", "2·h", "h·2.0", "h + h + h - h"],
)
def test_a_feature_added_to_itself_is_doubled(double):
    """Two skips from one vertex add coherently, 4m: the layer behind has a quarter of C, m again.

    Measured, and compared with the network without.
    """

    def make(function):
        def run(p, x):
            h = x @ p["a"]
            y = function(h) @ p["b"]
            return RELU(y) @ p["c"], [h, y]

        shapes = specs(a=(64, WIDTH), b=(WIDTH, WIDTH), c=(WIDTH, 3))
        return Model(lambda p, x: run(p, x)[0], shapes, (normal(64, 64),)), run

    model, run = make(double)
    plain = numerator(make(lambda h: h)[0], rule="second_moment")
    assert numerator(model, rule="second_moment") == pytest.approx(plain / 4, rel=0.02)
    same_moments(moments(model, "second_moment", lambda p, x: run(p, x)[1]))


@pytest.mark.parametrize(
    "parts",
    [
        lambda h, g: [RELU(h), g],
        lambda h, g: [RELU(h), RELU(g), g],
        lambda h, g: [jnp.tanh(h), 3 * g],
        lambda h, g: [h, h[..., :100], g],
    ],
    ids=["relu and linear", "two relus and linear", "tanh and 3·linear", "slices"],
)
def test_a_concatenation_has_the_mean_of_its_parts(parts):
    """ρ = Σ n_i ρ_i / Σ n_i, sources keep their own gains: the layer behind has m, measured."""

    def run(p, x):
        h = x @ p["a"]
        g = RELU(h) @ p["side"]
        y = jnp.concatenate(parts(h, g), -1) @ p["b"]
        return RELU(y) @ p["c"], [h, g, y]

    x = normal(64, 64)
    fan = sum(part.shape[-1] for part in parts(jnp.ones((1, WIDTH)), jnp.ones((1, 256))))
    shapes = specs(a=(64, WIDTH), side=(WIDTH, 256), b=(fan, WIDTH), c=(WIDTH, 3))
    model = Model(lambda p, x: run(p, x)[0], shapes, (x,))
    same_moments(moments(model, "second_moment", lambda p, x: run(p, x)[1]))


def test_concatenated_layers_of_different_gain_by_hand():
    """ReLU features (½) and linear ones (1) of equal number: ρ = ¾, C = 4/3."""

    def apply(p, x):
        h = x @ p["a"]
        return RELU(jnp.concatenate([RELU(h), h], -1) @ p["b"]) @ p["c"]

    model = Model(apply, specs(a=(8, 64), b=(128, 64), c=(64, 3)), (normal(2, 8),))
    assert numerator(model, rule="second_moment", fan=128) == pytest.approx(4 / 3, rel=0.02)


# Sums of both kinds


def test_vae_is_read():
    """mean + eps·exp(log σ), and a skip projection of the code: nothing to declare."""

    def vae(p, x, key):
        h = RELU(x @ p["encoder"])
        mean, logvar = h @ p["mean"], h @ p["logvar"]
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        h = RELU(z @ p["decoder"])
        return RELU(h @ p["inner"] + z @ p["skip"]) @ p["readout"]

    shapes = specs(
        encoder=(20, 16),
        mean=(16, 4),
        logvar=(16, 4),
        decoder=(4, 16),
        inner=(16, 16),
        skip=(4, 16),
        readout=(16, 20),
    )
    arch = Model(vae, shapes, (spec(2, 20), jax.eval_shape(lambda: KEY))).trace()
    found = {one.name: str(one.role) for one in arch.parameters}
    assert found["encoder"] == "input"
    assert found["readout"] == "readout"
    assert {found[name] for name in ("mean", "logvar", "decoder", "inner", "skip")} == {"hidden"}
    for rule in (None, "second_moment"):
        deviations = archscale.weight_standard_deviations(arch, rule)
        assert all(np.all(np.isfinite(one)) for one in deviations.values())


@pytest.mark.parametrize("rule", [None, "second_moment"])
def test_a_sum_of_features_and_an_activation_is_read(rule):
    """wav2vec 2.0: z + gelu(conv(z)), then a stack; and the linen form with a convolution."""

    def positional(p, x):
        z = x @ p["stem"]
        z = z + jax.nn.gelu(z @ p["positions"])
        z = z + RELU(z @ p["up"]) @ p["down"]
        return z @ p["readout"]

    shapes = specs(stem=(8, 16), positions=(16, 16), up=(16, 32), down=(32, 16), readout=(16, 3))
    arch = Model(positional, shapes, (spec(2, 8),)).trace()
    assert len(archscale.weight_standard_deviations(arch, rule)) == 5

    class Conditional(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Dense(16)(x)
            z = z + nn.gelu(nn.Conv(16, (3,), feature_group_count=4)(z))
            z = z + nn.Dense(16)(RELU(nn.Dense(32)(nn.LayerNorm()(z))))
            return nn.Dense(3)(z.mean(1))

    arch = linen_model(Conditional(), normal(2, 6, 8)).trace()
    assert len(archscale.weight_standard_deviations(arch, rule)) == 5


def test_dense_skip_of_an_activation():
    """h + relu(h W) repeated, whose sums hold a skip and an activation: measured growth.

    The skip brings what it brings and the activated part the share: at most exp(1/4) over all.
    """

    def run(p, x):
        h = x @ p["stem"]
        streams = [h]
        for w in p["w"]:
            h = h + RELU(h @ w)
            streams.append(h)
        return h @ p["out"], streams

    shapes = specs(stem=(64, WIDTH), out=(WIDTH, 3)) | {"w": [spec(WIDTH, WIDTH)] * 4}
    model = Model(lambda p, x: run(p, x)[0], shapes, (normal(64, 64),))
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    # Means of ReLUs add up, Σ of k has k(k-1)/π of cross terms [theory §3]: a tolerance for them.
    assert 1 < found[-1] / found[0] < 1.28 * 1.3


# Norms that end a branch


def post_norm(depth, norm, width=128):
    """x + norm(f(norm(x))): Gemma 2, OLMo 2, Swin v2."""

    def unit(h):
        return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)

    def run(p, x):
        x = x @ p["stem"]
        streams = [x]
        for block in p["blocks"]:
            y = RELU(unit(x) @ block["up"]) @ block["down"]
            gain = 1 + block["post"] if norm == "1 + w" else block["post"]
            x = x + unit(y) * gain
            streams.append(x)
        return unit(x) @ p["out"], streams

    block = specs(up=(width, width), down=(width, width), post=(width,))
    shapes = specs(stem=(20, width), out=(width, 5)) | {"blocks": [block] * depth}
    return Model(lambda p, x: run(p, x)[0], shapes, (normal(32, 20),)), run


@pytest.mark.parametrize("norm", ["w", "1 + w"])
@pytest.mark.parametrize("depth", [2, 8])
def test_a_norm_that_ends_a_branch_bounds_the_stream(depth, norm):
    """Its gain is drawn n^-α: the stream grows by at most exp(1/4) at any depth, measured."""
    model, run = post_norm(depth, norm)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert 1.02 < found[-1] / found[0] < 1.28 * 1.05


def test_gains_that_end_branches_fall_with_the_root_of_depth():
    """n^-α at α = ½: from 2 to 16 blocks by √8; what stands before the norm is not shrunk."""
    gains, inner = [], []
    for depth in (2, 16):
        model, _ = post_norm(depth, "w", width=32)
        arch = model.trace()
        params = archscale.initialize(KEY, model.shapes, arch, "second_moment")
        gains.append(float(params["blocks"][0]["post"].mean()))
        inner.append(float(deviation(model, "blocks/0/down", "second_moment")))
    assert gains[0] / gains[1] == pytest.approx(8**0.5, rel=1e-3)
    assert inner[0] == pytest.approx(inner[1], rel=1e-3)


def test_layer_norm_of_linen_that_ends_a_branch():
    """nn.LayerNorm behind the last layer, its scale given as 1: bounded all the same."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(128, name="stem")(x)
            for _ in range(4):
                y = nn.Dense(128)(RELU(nn.Dense(128)(nn.LayerNorm()(x))))
                x = x + nn.LayerNorm()(y)
            return nn.Dense(5)(nn.LayerNorm()(x))

    x = normal(32, 20)
    model = linen_model(Net(), x)
    given = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", np.float32), model.shapes
    )
    params = archscale.initialize(KEY, given, model.trace(), "second_moment")
    found = jax.jit(lambda p: archscale.vertex_features(model.apply, p, x))(params)
    stream = [float(jnp.mean(found[vertex] ** 2)) for vertex in (min(found), max(found))]
    assert stream[1] / stream[0] < 1.28 * 1.1
