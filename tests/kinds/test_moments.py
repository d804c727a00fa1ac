"""Second moments at initialization: what an edge does, however it is written (theory §9).

The layer behind an edge of gain ρ is drawn with C = share / (d_in·ρ), so that every vertex has the
second moment of the first. ReLU takes half, a normalization gives its scale squared, whatever is
known of a chain of operations counts. Where no closed form is at hand, the judge is what the
network computes: second moments of its features, of width 512, over several draws.
"""

import functools
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
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu
WIDTH = 512
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


def test_second_moment_is_the_name_of_moment():
    """Both names are accepted and give the same numbers."""
    model = chain(RELU, 32)
    arch = model.trace()
    assert archscale.weight_standard_deviations(
        arch, "second_moment"
    ) == archscale.weight_standard_deviations(arch, "moment")


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
def test_a_norm_is_no_activation_however_it_is_written(spelling, rule):
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


def test_a_linear_transform_of_features_is_no_activation():
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


def blocks(sum_of, branch, inner=1.0, depth=8, width=WIDTH):
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
        (lambda x: x / 2**0.5, lambda y: y, 1.0),
        (lambda x: np.float32(2**-0.5) * x, lambda y: y, 1.0),
        (lambda x: x, lambda y: 0.1 * y, 1.0),
        (lambda x: x, lambda y: y / 10, 1.0),
        (lambda x: x, lambda y: jnp.full(y.shape[-1], 0.1) * y, 1.0),
        (lambda x: x, lambda y: y, 2**0.5),
    ],
    ids=[
        "plain",
        "sum divided by sqrt(2)",
        "sum times an array",
        "branch times 0.1",
        "branch divided by 10",
        "branch times a constant vector",
        "sqrt(2)·relu",
    ],
)
def test_constants_that_multiply_features_count(sum_of, branch, inner):
    """ρ = g²·E[φ²]: n blocks grow the stream at most by exp(1/4) = 1.28, whatever multiplies it.

    And they add what they shall, a quarter of the stream over the blocks: a tenth of the branch is
    not a hundredth of its share. Measured over 8 blocks.
    """
    model, run = blocks(sum_of, branch, inner)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert 0.9 < found[-1] / found[0] < 1.28 * 1.1
    if sum_of(1.0) == 1:
        assert found[-1] / found[0] == pytest.approx(math.exp(0.25), rel=0.12)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_multiplier_that_the_model_has_is_not_applied_twice(power):
    """x + f(x)/n^p, n = 16: by §9 its weights bring the share that they bring without 1/n^p.

    1/√n: the stream grows as without the multiplier, by exp(1/4). 1/n is CompleteP's own; a branch
    then brings at least 1/(4n²) of the stream, its share at α = 1, and never the n-th part of it.
    """
    depth = 16
    model, run = blocks(lambda x: x, lambda y: y / depth**power, depth=depth, width=256)
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
    depth, width = 4, 256

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


# Fused projections, gates, products


def gated(kind, act=jax.nn.silu, layers=3):
    """A stack of gated layers; the two projections apart or one matrix in several layouts."""

    def halves(h, w):
        if kind == "apart":
            return h @ w[0], h @ w[1]
        if kind == "split":
            return tuple(jnp.split(h @ w, 2, -1))
        if kind == "slices":
            both = h @ w
            return both[..., :WIDTH], both[..., WIDTH:]
        if kind == "reshape":
            both = (h @ w).reshape(*h.shape[:-1], 2, WIDTH)
            return both[..., 0, :], both[..., 1, :]
        gate, up = jnp.einsum("bd,cde->cbe", h, w)
        return gate, up

    def run(p, x):
        h = x @ p["stem"]
        streams = [h]
        for both, down in zip(p["both"], p["down"], strict=True):
            gate, up = halves(h, both)
            h = (act(gate) * up) @ down
            streams.append(h)
        return h @ p["out"], streams

    both = {"apart": [spec(WIDTH, WIDTH)] * 2, "einsum": spec(2, WIDTH, WIDTH)}.get(
        kind, spec(WIDTH, 2 * WIDTH)
    )
    shapes = specs(stem=(64, WIDTH), out=(WIDTH, 3)) | {
        "both": [both] * layers,
        "down": [spec(WIDTH, WIDTH)] * layers,
    }
    return Model(lambda p, x: run(p, x)[0], shapes, (normal(64, 64),)), run


@BOTH_RULES
@pytest.mark.parametrize("kind", ["split", "slices", "reshape", "einsum"])
def test_fused_gates_are_gates(kind, rule):
    """The same function of the same random weights: the same C of the layer behind the gate."""
    apart, fused = gated("apart")[0], gated(kind)[0]
    for name in ("down/0", "down/2"):
        assert numerator(fused, name, rule) == pytest.approx(numerator(apart, name, rule), rel=1e-5)


def gates_in_branches(kind, act, width=64):
    """h + σ(a) * b, twice; both layers apart or one matrix in several layouts."""

    def halves(h, w):
        if kind == "apart":
            return h @ w[0], h @ w[1]
        if kind == "einsum":
            return tuple(jnp.einsum("bd,cde->cbe", h, w))
        both = h @ w
        if kind == "slices":
            return both[..., :width], both[..., width:]
        if kind == "reshape":
            return jnp.unstack(both.reshape(-1, 2, width), axis=1)
        return jnp.split(both, 2, -1)

    def block(h, w):
        a, b = halves(jnp.tanh(h), w)
        return h + act(a) * b

    def apply(p, x):
        h = x @ p["stem"]
        if kind == "scan":
            return jax.lax.scan(lambda h, w: (block(h, w), None), h, p["both"])[0] @ p["out"]
        for both in p["both"]:
            h = block(h, both)
        return h @ p["out"]

    both = {
        "apart": [[spec(width, width)] * 2] * 2,
        "einsum": [spec(2, width, width)] * 2,
        "scan": spec(2, width, 2 * width),
    }.get(kind, [spec(width, 2 * width)] * 2)
    shapes = specs(stem=(16, width), out=(width, 3)) | {"both": both}
    return Model(apply, shapes, (normal(4, 16),))


GATES = [jax.nn.sigmoid, RELU, jax.nn.silu, lambda g: g]


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("kind", ["split", "slices", "einsum", "scan"])
def test_fused_gates_that_end_branches_are_drawn_as_two_layers(kind, act):
    """Only b of σ(a) * b brings the branch's share: of one matrix, its half that makes b."""
    apart = archscale.weight_standard_deviations(
        gates_in_branches("apart", act).trace(), "second_moment"
    )
    found = archscale.weight_standard_deviations(
        gates_in_branches(kind, act).trace(), "second_moment"
    )
    for block in range(2):
        one = np.asarray(found["both"])[block] if kind == "scan" else found[f"both/{block}"]
        halves = np.split(np.broadcast_to(one, (2, 1, 1) if kind == "einsum" else (1, 128)), 2,
                          axis=0 if kind == "einsum" else 1)  # fmt: skip
        for half, values in enumerate(halves):
            expected = apart[f"both/{block}/{half}"]
            np.testing.assert_allclose(values, expected, rtol=1e-9, err_msg=f"{block}, {half}")


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("kind", ["apart", "split", "scan", "reshape"])
def test_gates_that_end_branches_bring_their_share(kind, act):
    """Two blocks add 1/8 each; halves that a reshape hides are drawn alike, and bring it too."""
    architecture = gates_in_branches(kind, act).trace()
    promised = archscale.second_moments(architecture, "second_moment")
    assert promised[max(promised)] == pytest.approx(2 * 1.125**2, rel=2e-2)


def test_the_report_shows_what_differs_by_slice():
    """The smallest and the largest in print, one number for every half of a gate in records."""
    told = archscale.report(
        gates_in_branches("split", jax.nn.sigmoid).trace(), initialization="second_moment"
    )
    values = next(one for one in told.records if one["path"] == "both/0")["standard_deviation"]
    assert len(values) == 2 and values[0] != values[1]
    assert f"{min(values):.3g} to {max(values):.3g}" in str(told)


@pytest.mark.parametrize("kind", ["apart", "split"])
@pytest.mark.parametrize("act", [jax.nn.silu, jax.nn.gelu, jax.nn.sigmoid, lambda g: g])
def test_gates_keep_the_second_moment(act, kind):
    """A product of independent features has ρ = E[φ(z)²]·m: two gated layers keep m, measured.

    Products square what single examples fluctuate by: at width 512 a third layer has 1.35 to 1.76.
    """
    model, run = gated(kind, act, layers=2)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1], seeds=6)
    same_moments(found)


class Attention(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, use_bias=False)(x)
        h = nn.LayerNorm(use_scale=False, use_bias=False)(x)
        if self.kind == "apart":
            q, k, v = (nn.Dense(64, use_bias=False)(h) for _ in range(3))
        elif self.kind == "split":
            q, k, v = jnp.split(nn.Dense(192, use_bias=False)(h), 3, -1)
        else:
            q, k, v = jnp.unstack(nn.DenseGeneral((3, 64), use_bias=False)(h), axis=-2)
        y = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 8) @ v
        return nn.Dense(5)(x + nn.Dense(64, use_bias=False, name="out")(y))


@BOTH_RULES
@pytest.mark.parametrize("kind", ["split", "unstack"])
def test_fused_attention_is_attention(kind, rule):
    """Query, key and value as one matrix: the layer behind has the variance that it has apart."""
    x = normal(2, 4, 20)
    expected = deviation(linen_model(Attention("apart"), x), "out/kernel", rule)
    found = deviation(linen_model(Attention(kind), x), "out/kernel", rule)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fused_attention_of_haiku():
    """The same of Haiku, with heads: hk.Linear(3·n), reshape, index."""

    def network(fused):
        def apply(x):
            h = hk.Linear(32, with_bias=False)(x)
            if fused:
                all_three = hk.Linear(96, with_bias=False)(h).reshape(*h.shape[:2], 3, 4, 8)
                q, k, v = (all_three[:, :, i] for i in range(3))
            else:
                q, k, v = (
                    hk.Linear(32, with_bias=False)(h).reshape(*h.shape[:2], 4, 8) for _ in range(3)
                )
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5)
            y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape)
            return hk.Linear(3)(RELU(h + hk.Linear(32, name="mix")(y)))

        return haiku_model(apply, normal(2, 5, 12))

    for rule in (None, "second_moment"):
        np.testing.assert_allclose(
            deviation(network(True), "mix/w", rule),
            deviation(network(False), "mix/w", rule),
            rtol=1e-5,
        )


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
            x = nn.Conv(128, (1, 1))(x)
            for _ in range(2):
                x = nn.ConvTranspose(128, (2, 2), (2, 2), padding="VALID")(RELU(x))
            return nn.Dense(5)(x.mean((1, 2)))

    same_moments(moments(linen_model(Decoder(), normal(8, 2, 2, 64)), None, seeds=6))


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
    # Means of ReLUs add up, Σ of k has k(k-1)/π of cross terms [theory §3]: room for them.
    assert 1 < found[-1] / found[0] < 1.28 * 1.3


# Attention


def scores_of(scaled, split=True):
    """RMS of attention scores, with and without 1/sqrt(d) in the model."""
    heads, size = 4, 64

    def run(p, x):
        z = x @ p["stem"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        if scaled:
            scores = scores / size**0.5
        y = jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), v, p["o"])
        return (z + y) @ p["readout"], [scores]

    shapes = specs(stem=(8, 256), o=(heads, size, 256), readout=(256, 3))
    shapes |= {name: spec(256, heads, size) for name in "qkv"}
    model = Model(lambda p, x: run(p, x)[0], shapes, (normal(4, 16, 8),))
    return math.sqrt(moments(model, "second_moment", lambda p, x: run(p, x)[1])[0])


def test_scores_without_a_divisor_are_not_larger():
    """T5 has no 1/sqrt(d): the start of q and k carries it, so that scores are as with it."""
    assert scores_of(False) == pytest.approx(scores_of(True), rel=0.2)


def test_scores_without_a_divisor_in_linen():
    """The same with Dense layers and 2 heads by reshape, behind RMSNorm: q·k of RMS at most 3.

    Behind a norm q and k have second moments of at most 2, their product over sqrt(d) at most 2.
    """

    def run(p, x):
        z = x @ p["stem"]
        h = z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True))
        q, k = ((h @ p[n]).reshape(*h.shape[:2], 2, 64) for n in "qk")
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        y = jax.nn.softmax(scores) @ jnp.swapaxes((h @ p["v"]).reshape(q.shape), 1, 2)
        return (z + jnp.swapaxes(y, 1, 2).reshape(z.shape) @ p["o"]) @ p["out"], [scores]

    shapes = specs(stem=(8, 128), out=(128, 3)) | {n: spec(128, 128) for n in "qkvo"}
    model = Model(lambda p, x: run(p, x)[0], shapes, (normal(4, 8, 8),))
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert math.sqrt(found[0]) < 3


@pytest.mark.parametrize("kind", ["T5", "Swin", "per distance"])
def test_tables_added_to_scores_start_small(kind):
    """Relative positions added to attention scores start at 0 to 0.02 (T5, Swin), not at 1."""

    def apply(p, x):
        z = x @ p["stem"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n in "qkv")
        places = jnp.arange(4)[:, None] - jnp.arange(4)[None] + 3
        if kind == "T5":
            bias = jnp.moveaxis(p["relative"][places], -1, 0)
        elif kind == "Swin":
            bias = p["relative"][places.reshape(-1)].reshape(4, 4, -1).transpose(2, 0, 1)
        else:
            bias = jax.nn.one_hot(places, 7) @ p["relative"]
            bias = jnp.moveaxis(bias, -1, 0)[None]
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / 4 + bias
        y = jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), v, p["o"])
        return (z + y) @ p["readout"]

    shapes = specs(stem=(8, 32), o=(2, 16, 32), relative=(7, 2), readout=(32, 3))
    shapes |= {name: spec(32, 2, 16) for name in "qkv"}
    model = Model(apply, shapes, (spec(2, 4, 8),))
    params = archscale.initialize(KEY, shapes, model.trace())
    assert float(jnp.sqrt(jnp.mean(params["relative"] ** 2))) <= 0.05
    assert float(jnp.std(params["q"])) > 0.05


# Tables


def lookup(kind, table, ids):
    size = table.shape[0]
    if kind == "compare":
        return (ids[..., None] == jnp.arange(size)).astype(table.dtype) @ table
    if kind == "one_hot":
        return jax.nn.one_hot(ids, size) @ table
    if kind == "einsum":
        return jnp.einsum("bsv,vd->bsd", jax.nn.one_hot(ids, size), table)
    if kind == "where":
        return jnp.where(ids[..., None] == jnp.arange(size), 1.0, 0.0) @ table
    if kind == "take":
        return jnp.take(table, ids, axis=0)
    return table[ids]


TABLES = ["compare", "one_hot", "einsum", "where", "take"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_read_by_a_product_with_one_hots_is_a_table(kind):
    """Rows are chosen one at a time: role embedding, entries of std 1, as for table[ids]."""

    def make(kind):
        def apply(p, ids):
            z = lookup(kind, p["table"], ids)
            return (z + RELU(z @ p["up"]) @ p["down"]) @ p["readout"]

        shapes = specs(table=(300, 32), up=(32, 32), down=(32, 32), readout=(32, 300))
        return Model(apply, shapes, (spec(2, 5, dtype=jnp.int32),))

    arch = make(kind).trace()
    assert {one.name: str(one.role) for one in arch.parameters}["table"] == "embedding"
    for rule in (None, "second_moment"):
        assert archscale.weight_standard_deviations(arch, rule)["table"] == pytest.approx(1)
        for name in ("up", "down", "readout"):
            np.testing.assert_allclose(
                deviation(make(kind), name, rule), deviation(make("index"), name, rule)
            )


def test_a_table_of_haiku_by_one_hots():
    """hk.Embed in ONE_HOT style."""

    def network(ids):
        z = hk.Embed(40, 16, lookup_style=hk.EmbedLookupStyle.ONE_HOT, name="table")(ids)
        return hk.Linear(40)(RELU(hk.Linear(16)(z)))

    model = haiku_model(network, jnp.zeros((2, 5), jnp.int32))
    assert deviation(model, "table/embeddings") == pytest.approx(1)


@pytest.mark.parametrize("order", ["tok+pos+seg", "tok+seg+pos", "pos+tok+seg", "tok+pos"])
def test_positions_beside_a_tied_table_have_its_size(order):
    """Rows of a tied table have norm 1, entries std 1/√n; positions beside it have that too."""
    width = 64

    class Bert(nn.Module):
        @nn.compact
        def __call__(self, ids):
            tables = {
                "tok": nn.Embed(100, width, name="tok"),
                "pos": nn.Embed(12, width, name="pos"),
                "seg": nn.Embed(2, width, name="seg"),
            }
            read = {"tok": ids, "pos": jnp.arange(12), "seg": ids % 2}
            first, *others = order.split("+")
            x = tables[first](read[first])
            for name in others:
                x = x + tables[name](read[name])
            x = x + nn.Dense(width)(RELU(nn.Dense(width)(nn.LayerNorm()(x))))
            return tables["tok"].attend(nn.LayerNorm()(x))

    model = linen_model(Bert(), jnp.zeros((2, 12), jnp.int32))
    for name in order.split("+"):
        found = deviation(model, f"{name}/embedding")
        assert found == pytest.approx(width**-0.5, rel=1e-6), name


def test_positions_beside_a_tied_table_in_plain_jax():
    """The same with a slice of a longer table of positions, and with three sums in one."""

    def apply(p, ids):
        seen = p["pos"][: ids.shape[1]]
        x = sum((p["tok"][ids], seen, p["kind"][ids % 3]))
        x = x + RELU(x @ p["up"]) @ p["down"]
        return x @ p["tok"].T

    shapes = specs(tok=(50, 32), pos=(64, 32), kind=(3, 32), up=(32, 32), down=(32, 32))
    model = Model(apply, shapes, (spec(2, 8, dtype=jnp.int32),))
    for name in ("tok", "pos", "kind"):
        assert deviation(model, name) == pytest.approx(32**-0.5, rel=1e-6), name


# Norms that end a branch


def post_norm(depth, norm, width=256):
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
@pytest.mark.parametrize("depth", [2, 16])
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
            x = nn.Dense(256, name="stem")(x)
            for _ in range(8):
                y = nn.Dense(256)(RELU(nn.Dense(256)(nn.LayerNorm()(x))))
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


# Extremes


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("rule", ["second_moment", "target"])
def test_maxout_is_the_largest_of_its_pieces(pieces, rule):
    """E[max²] of 2 and 4 normal pieces is 1 and 1.551 [order statistics]."""

    def apply(params, x):
        h = jnp.max((x @ params["stem"]).reshape(*x.shape[:-1], 256, pieces), axis=-1)
        return RELU(h @ params["inner"]) @ params["head"]

    shapes = specs(stem=(32, 256 * pieces), inner=(256, 256), head=(256, 3))
    model = Model(apply, shapes, (normal(64, 32),))
    architecture = model.trace()
    promised = archscale.second_moments(architecture, rule)
    params = archscale.initialize(KEY, shapes, architecture, rule)
    for vertex, feature in archscale.vertex_features(apply, params, *model.inputs).items():
        np.testing.assert_allclose(promised[vertex], jnp.mean(feature**2), rtol=0.15)
    gain = {2: 1.0, 4: 1.5513}[pieces]
    wanted = {"second_moment": promised[0], "target": promised[0]}[rule]
    found = value(archscale.weight_standard_deviations(architecture, rule), "inner") ** 2
    np.testing.assert_allclose(found * 256 * gain * promised[0], wanted, rtol=1e-3)


def masked_attention(mask, fused):
    def apply(params, x):
        h = x @ params["stem"]
        if fused:
            q, k, v = jnp.split(h @ params["qkv"], 3, -1)
        else:
            q, k, v = (h @ params[name] for name in "qkv")
        scores = q @ jnp.swapaxes(k, -1, -2) / 8
        causal = jnp.tril(jnp.ones((6, 6), bool))
        scores = {
            "added": lambda: scores + jnp.where(causal, 0.0, -1e9),
            "multiplied": lambda: scores + -1e9 * (1.0 - causal),
            "chosen": lambda: jnp.where(causal, scores, -1e9),
            "infinite": lambda: jnp.where(causal, scores, -jnp.inf),
            "least": lambda: jnp.where(causal, scores, jnp.finfo(scores.dtype).min),
        }[mask]()
        return (h + jax.nn.softmax(scores) @ v @ params["out"]) @ params["head"]

    names = {"qkv": (64, 192)} if fused else dict.fromkeys("qkv", (64, 64))
    return Model(
        apply, specs(stem=(8, 64), out=(64, 64), head=(64, 3), **names), (normal(16, 6, 8),)
    )


@pytest.mark.parametrize("rule", ["second_moment", "target"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("mask", ["added", "multiplied", "chosen", "infinite", "least"])
def test_a_mask_however_it_is_written_leaves_a_mean_of_values(mask, fused, rule):
    """Attention brings at most the second moment of its values, whatever hides the scores."""
    model = masked_attention(mask, fused)
    architecture = model.trace()
    moments = archscale.second_moments(architecture, rule)
    assert all(np.isfinite(moment) for moment in moments.values())
    deviations = archscale.weight_standard_deviations(architecture, rule)
    plain = masked_attention("chosen", False).trace()
    expected = archscale.weight_standard_deviations(plain, rule)
    np.testing.assert_allclose(value(deviations, "out"), value(expected, "out"), rtol=0.05)


def test_experts_chosen_by_size_are_promised_about_what_they_bring():
    """2 of 8 experts: what top_k chooses is noted, and no order of magnitude is wrong."""
    shapes = specs(stem=(32, 128), router=(128, 8), up=(8, 128, 128), down=(8, 128, 128))

    def apply(params, x):
        h = x @ params["stem"]
        weights, chosen = jax.lax.top_k(jax.nn.softmax(h @ params["router"]), 2)
        weights = weights / jnp.sum(weights, -1, keepdims=True)
        gates = jnp.einsum("bk,bke->be", weights, jax.nn.one_hot(chosen, 8))
        y = RELU(jnp.einsum("bd,edf->bef", h, params["up"]))
        y = jnp.einsum("be,bed->bd", gates, jnp.einsum("bef,efd->bed", y, params["down"]))
        return RELU(h + y) @ params["head"]

    model = Model(apply, shapes | specs(head=(128, 3)), (normal(64, 32),))
    architecture = model.trace()
    assert any("top_k" in note for note in architecture.notes)
    promised = archscale.second_moments(architecture, "target")
    params = archscale.initialize(KEY, model.shapes, architecture, "target")
    features = archscale.vertex_features(apply, params, *model.inputs)
    ratios = [promised[vertex] / float(jnp.mean(z**2)) for vertex, z in features.items()]
    assert 0.5 < min(ratios) <= max(ratios) < 2


def test_what_has_no_finite_moment_is_refused_with_a_way_on():
    def apply(params, x):
        return jnp.log(x @ params["stem"]) @ params["inner"] @ params["head"]

    architecture = archscale.trace(
        apply, specs(stem=(8, 16), inner=(16, 16), head=(16, 3)), spec(2, 8)
    )
    for rule in ("target", "second_moment"):
        with pytest.raises(ValueError, match="'inner' reads has no finite second moment"):
            archscale.weight_standard_deviations(architecture, rule)
    assert archscale.weight_standard_deviations(architecture, "none")["inner"] > 0
    with pytest.raises(ValueError, match="vertex 1 has no finite second moment"):
        archscale.second_moments(architecture, "none")


# One function, its products and averages written in several ways


def check_moments(apply, shapes, inputs, rule="target", rtol=0.15):
    architecture = archscale.trace(apply, shapes, *inputs)
    promised = archscale.second_moments(architecture, rule)
    params = archscale.initialize(KEY, shapes, architecture, rule)
    features = jax.jit(lambda p: archscale.vertex_features(apply, p, *inputs))(params)
    for vertex, feature in features.items():
        np.testing.assert_allclose(
            promised[vertex], jnp.mean(feature**2), rtol=rtol, err_msg=str(vertex)
        )


JOINS = {
    "h + h*z": lambda h, z, n: h + h * z,
    "h * (1+z)": lambda h, z, n: h * (1 + z),
    "h - h*z": lambda h, z, n: h - h * z,
    "h * (1-z)": lambda h, z, n: h * (1 - z),
    "h + z*(n-h)": lambda h, z, n: h + z * (n() - h),
    "(1-z)*h + z*n": lambda h, z, n: (1 - z) * h + z * n(),
    "n + (1-z)*(h-n)": lambda h, z, n: n() + (1 - z) * (h - n()),
}


@pytest.mark.parametrize("rule", ["target", "second_moment"])
@pytest.mark.parametrize("join", JOINS)
def test_a_product_beside_what_it_holds_is_not_independent_of_it(join, rule):
    """z = σ(W h): E[h²(1 + z)²] is 4.64 for m = 2, not m + m·0.32."""

    def apply(p, x):
        h = x @ p["stem"]
        z = jax.nn.sigmoid(h @ p["z"])
        made = functools.cache(lambda: h @ p["n"])
        return RELU(JOINS[join](h, z, made) @ p["out"]) @ p["head"]

    shapes = specs(stem=(64, 512), z=(512, 512), out=(512, 512), head=(512, 3))
    if "n" in join:
        shapes |= specs(n=(512, 512))
    check_moments(apply, shapes, (normal(64, 64),), rule)


AVERAGES = {
    "sums": lambda k, v: (jnp.exp(k) * v).sum(1) / jnp.exp(k).sum(1),
    "shifted": lambda k, v: (
        (jnp.exp(k - k.max(1, keepdims=True)) * v).sum(1)
        / jnp.exp(k - k.max(1, keepdims=True)).sum(1)
    ),
    "softmax": lambda k, v: (jax.nn.softmax(k, 1) * v).sum(1),
    "einsum": lambda k, v: jnp.einsum("btd,btd->bd", jax.nn.softmax(k, 1), v),
}


def weighted_average(average, gated):
    def apply(p, x):
        h = x @ p["stem"]
        y = AVERAGES[average](h @ p["k"], h @ p["v"])
        y = y * jax.nn.sigmoid(h[:, 0] @ p["g"]) if gated else y
        return RELU(y @ p["out"]) @ p["head"]

    shapes = specs(stem=(8, 64), k=(64, 64), v=(64, 64), out=(64, 64), head=(64, 3))
    return Model(apply, shapes | (specs(g=(64, 64)) if gated else {}), (spec(4, 6, 8),))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("average", AVERAGES)
def test_a_weighted_average_keeps_the_moment_of_one_position(average, gated):
    """Weights that sum to one, as in attention-free transformers: 2 of values of moment 2.

    The layer behind carries the moment of what it reads, 2, or behind the gate 2 · E[σ(z)²].
    """
    found = deviation(weighted_average(average, gated), "out", "target")
    expected = deviation(weighted_average("einsum", gated), "out", "target")
    np.testing.assert_allclose(found, expected, rtol=0.02)
    architecture = weighted_average(average, gated).trace()
    assert max(archscale.second_moments(architecture, "target").values()) < 200
    if gated:
        out = next(one for one in architecture.parameters if one.name == "out")
        read = archscale.second_moments(architecture, "target")[
            int(architecture.graph.senders[out.edge])
        ]
        np.testing.assert_allclose(read, 2 * 0.3184, rtol=0.02)


@pytest.mark.parametrize("scale", ["scores", "masked", "shifted", "by hand", "decayed", "query"])
def test_the_divisor_of_scores_counts_wherever_it_stands(scale):
    """Queries are drawn as keys are, as the scores are divided by √d already."""

    def apply(p, x):
        h = x @ p["stem"]
        q, k, v = (h @ p[name] for name in "qkv")
        root = 64**0.5
        if scale == "query":
            q = q / root
        s = q @ jnp.swapaxes(k, 1, 2)
        s = {
            "scores": lambda: s / root,
            "masked": lambda: (s + jnp.where(jnp.tri(6) > 0, 0.0, -1e9)) / root,
            "shifted": lambda: (s - s.max(-1, keepdims=True)) / root,
            "by hand": lambda: s / root,
            "decayed": lambda: s * 0.9 ** jnp.arange(6.0) / root,
            "query": lambda: s,
        }[scale]()
        if scale == "by hand":
            s = jnp.exp(s - s.max(-1, keepdims=True))
            w = s / s.sum(-1, keepdims=True)
        else:
            w = jax.nn.softmax(s)
        return (h + w @ v @ p["out"]) @ p["head"]

    shapes = specs(stem=(8, 64), out=(64, 64), head=(64, 3), **dict.fromkeys("qkv", (64, 64)))
    found = archscale.weight_standard_deviations(archscale.trace(apply, shapes, spec(4, 6, 8)))
    np.testing.assert_allclose(value(found, "q"), value(found, "k"), rtol=1e-6)


@pytest.mark.parametrize("how", ["einsum", "vmap"])
def test_matrices_chosen_by_an_index_are_refused_with_a_way_on(how):
    """A matrix a task: as rows of a table they would be drawn with standard deviation 1."""

    def apply(p, x, task):
        h, chosen = RELU(x @ p["stem"]), p["tasks"][task]
        h = jnp.einsum("bi,bio->bo", h, chosen) if how == "einsum" else jax.vmap(jnp.dot)(h, chosen)
        return RELU(h) @ p["head"]

    def one_hot(p, x, task):
        h = RELU(x @ p["stem"])
        h = jnp.einsum("be,bi,eio->bo", jax.nn.one_hot(task, 4), h, p["tasks"])
        return RELU(h) @ p["head"]

    shapes = specs(stem=(8, 32), tasks=(4, 32, 32), head=(32, 3))
    inputs = spec(6, 8), spec(6, dtype=jnp.int32)
    with pytest.raises(archscale.TraceError, match=r"'tasks'.*be,bi,eio->bo"):
        archscale.trace(apply, shapes, *inputs)
    found = archscale.weight_standard_deviations(archscale.trace(one_hot, shapes, *inputs))
    np.testing.assert_allclose(found["tasks"], (2 / 32) ** 0.5)
