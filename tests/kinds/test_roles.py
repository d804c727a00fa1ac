"""What a parameter does in its network: readouts, biases, tables, layers of the recurrent kind.

A readout is what the features enter linearly for the last time on every way to the result,
whatever is done to it then (theory §10). Its standard deviation is √2/n [AAS Eq. 2]. What reads a
width anywhere is not an input weight, and leaves that are joined before one product are what they
are apart.
"""

import math
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
    deviation,
    equinox_model,
    haiku_model,
    linen_model,
    multipliers,
    normal,
    parameter,
    roles,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def check_readout(model, ending, fan):
    """Role, and the standard deviation √2/n [AAS Eq. 2]."""
    assert parameter(model.trace(), ending).role == "readout"
    assert deviation(model, ending) == pytest.approx(math.sqrt(2) / fan, rel=1e-6)


# Heads whose outputs are joined, added, stacked, pooled

JOINS = {
    "tuple": lambda a, b: (a, b),
    "dictionary": lambda a, b: {"policy": a, "value": b},
    "dueling": lambda a, b: b[:, :1] + a - a.mean(-1, keepdims=True),
    "concatenated": lambda a, b: jnp.concatenate([a, b], -1),
    "stacked": lambda a, b: jnp.stack([a, b]),
    "added": lambda a, b: a + b,
    "smaller of two": lambda a, b: jnp.minimum(a, b),
    "tanh": lambda a, b: (jnp.tanh(a), jax.nn.softplus(b)),
    "softmax": lambda a, b: jax.nn.log_softmax(a) + jax.nn.log_softmax(b),
    "reshaped": lambda a, b: jnp.concatenate([a.reshape(-1, 2, 2), b.reshape(-1, 2, 2)], 1),
    "padded": lambda a, b: jnp.pad(a, ((0, 0), (0, 2))) + jnp.pad(b, ((0, 0), (2, 0))),
}


@pytest.mark.parametrize("join", JOINS)
def test_heads_are_readouts_whatever_joins_them(join):
    """The same role and std, whether a model returns (mean, log variance) or their join."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = RELU(nn.Dense(64, name="hidden")(RELU(nn.Dense(64)(x))))
            return JOINS[join](nn.Dense(4, name="a")(h), nn.Dense(4, name="b")(h))

    model = linen_model(Net(), normal(4, 16))
    for name in ("a", "b"):
        check_readout(model, f"{name}/kernel", 64)
        assert parameter(model.trace(), f"{name}/bias").layer == "readout"
    assert parameter(model.trace(), "hidden/kernel").role == "hidden"


@pytest.mark.parametrize("join", ["dueling", "concatenated", "added"])
def test_heads_of_equinox_are_readouts(join):
    class Net(eqx.Module):
        body: eqx.nn.MLP
        a: eqx.nn.Linear
        b: eqx.nn.Linear

        def __init__(self, key):
            self.body = eqx.nn.MLP(8, 32, 32, 2, final_activation=RELU, key=key)
            self.a, self.b = eqx.nn.Linear(32, 4, key=key), eqx.nn.Linear(32, 4, key=key)

        def __call__(self, x):
            h = self.body(x)
            return JOINS[join](self.a(h)[None], self.b(h)[None])

    model = equinox_model(Net, normal(4, 8))
    check_readout(model, "a/weight", 32)
    check_readout(model, "b/weight", 32)


@pytest.mark.parametrize("sign", [lambda x, a: x - a, lambda x, a: x + 0.1 * a])
def test_a_network_that_predicts_what_to_subtract(sign):
    """A denoiser: x - net(x). The last layer is a readout all the same."""

    def network(x):
        h = RELU(hk.Linear(48)(RELU(hk.Linear(48)(x))))
        return sign(x, hk.Linear(16, name="last")(h))

    model = haiku_model(network, normal(4, 16))
    assert parameter(model.trace(), "last/w").role == "readout"
    subtracted = sign(1.0, -1.0) == 2.0
    if subtracted:
        check_readout(model, "last/w", 48)


def test_ensemble_of_heads_in_one_array():
    """Critics [heads, n, k] by einsum, the smallest of them: a readout of fan n."""

    def apply(p, x):
        h = RELU(RELU(x @ p["a"]) @ p["b"])
        return jnp.einsum("bn,hnk->hbk", h, p["heads"]).min(0)

    model = Model(apply, specs(a=(8, 32), b=(32, 32), heads=(5, 32, 3)), (spec(4, 8),))
    check_readout(model, "heads", 32)


def test_a_readout_inside_a_scan():
    """A character model whose readout is in the loop over time."""

    def char_rnn(p, x):
        def step(h, xt):
            h = jnp.tanh(xt @ p["in"] + h @ p["rec"])
            return h, h @ p["head"] + p["shift"]

        return jax.lax.scan(step, jnp.zeros((x.shape[1], 64)), x)[1]

    shapes = {"in": spec(16, 64), "rec": spec(64, 64), "head": spec(64, 4), "shift": spec(4)}
    model = Model(char_rnn, shapes, (spec(6, 2, 16),))
    check_readout(model, "head", 64)
    assert roles(model.trace())["rec"] == "hidden"
    assert parameter(model.trace(), "shift").layer == "readout"


def test_a_readout_inside_a_scan_of_linen():
    """nn.scan over a cell that has its own head; losses of steps are summed."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            h = nn.tanh(nn.Dense(32, name="rec")(h) + nn.Dense(32, name="in")(x))
            return h, nn.Dense(4, name="head")(h)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1
            )
            return scanned(name="step")(jnp.zeros((x.shape[0], 32)), x)[1].sum(0)

    check_readout(linen_model(Net(), normal(2, 5, 8)), "head/kernel", 32)


POOLS = {
    "mean": lambda x: x.mean((1, 2)),
    "nn.avg_pool": lambda x: nn.avg_pool(x, x.shape[1:3])[:, 0, 0],
    "hk.avg_pool": lambda x: hk.avg_pool(x, (1, *x.shape[1:3], 1), 1, "VALID")[:, 0, 0],
    "sum over count": lambda x: jnp.einsum("bhwc->bc", x) / (x.shape[1] * x.shape[2]),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_convolution_that_is_pooled_is_the_readout(pool):
    """Network in network: a 1x1 convolution to the classes, then the mean over positions."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = RELU(nn.Conv(16, (3, 3))(RELU(nn.Conv(16, (3, 3))(x))))
            return POOLS[pool](nn.Conv(10, (1, 1), name="last")(x))

    check_readout(linen_model(Net(), normal(1, 6, 6, 3)), "last/kernel", 16)


def test_width_multipliers_of_joined_heads():
    """Readouts contract a width and write none: 1/r for SGD and Adam [μP]."""

    def make(width):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = RELU(nn.Dense(width)(x))
                return JOINS["dueling"](nn.Dense(4, name="a")(h), nn.Dense(1, name="b")(h))

        return linen_model(Net(), normal(4, 16))

    for optimizer in ("sgd", "adam"):
        found = multipliers(make(64), make(16), width_rule=optimizer)
        assert value(found, "a/kernel") == pytest.approx(0.25)
        assert value(found, "b/kernel") == pytest.approx(0.25)
        assert value(found, "a/bias") == pytest.approx(1)


# The loss instead of the network


def network(p, x):
    return RELU(RELU(x @ p["in"]) @ p["mid"]) @ p["out"]


def cross_entropy(p, x, y):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(network(p, x)) * y, -1))


LOSSES = {
    "the network": (network, 1),
    "squared error of a target": (lambda p, x, y: jnp.mean((network(p, x) - y) ** 2), 2),
    "autoencoder": (lambda p, x: jnp.mean((network(p, x) - x) ** 2), 1),
    "autoencoder, absolute": (lambda p, x: jnp.mean(jnp.abs(network(p, x) - x)), 1),
    "diffusion": (lambda p, x, e: jnp.mean((network(p, x + e) - e) ** 2), 2),
    "cross entropy": (cross_entropy, 2),
    "velocity": (lambda p, x, e: jnp.mean((network(p, 0.5 * x + 0.5 * e) - (x - e)) ** 2), 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_has_the_readout_of_the_network(name):
    """What is compared with the inputs is still what the features enter last: √2/64 = 0.0221."""
    function, count = LOSSES[name]
    shapes = {"in": spec(32, 64), "mid": spec(64, 64), "out": spec(64, 32)}
    model = Model(function, shapes, (spec(8, 32),) * count)
    check_readout(model, "out", 64)
    assert roles(model.trace()) == {"in": "input", "mid": "hidden", "out": "readout"}


# Biases, stacked


def stacked(kind, depth=4, width=16):
    """x + relu(x) @ W[i] + b[i], written in several ways."""

    def one(h, w, b):
        if kind == "parentheses":
            return h + (RELU(h) @ w + b)
        if kind == "bias first":
            return b + h + RELU(h) @ w
        return h + RELU(h) @ w + b

    def apply(p, x):
        h = x @ p["stem"]
        if kind == "scan":
            h = jax.lax.scan(lambda h, wb: (one(h, *wb), None), h, (p["W"], p["b"]))[0]
        elif kind == "fori_loop":
            h = jax.lax.fori_loop(0, depth, lambda i, h: one(h, p["W"][i], p["b"][i]), h)
        elif kind == "unstack":
            for w, b in zip(jnp.unstack(p["W"]), jnp.unstack(p["b"]), strict=True):
                h = one(h, w, b)
        else:
            for i in range(depth):
                h = one(h, p["W"][i], p["b"][i])
        return RELU(h) @ p["out"]

    shapes = specs(stem=(8, width), W=(depth, width, width), b=(depth, width), out=(width, 3))
    return Model(apply, shapes, (normal(4, 8),))


STACKS = ["parentheses", "plain", "bias first", "fori_loop", "scan", "unstack"]


@pytest.mark.parametrize("kind", STACKS)
def test_biases_of_stacked_layers_are_biases(kind):
    """(h + y) + b: b meets the sum and not the layer; a leaf [L, n] with two long axes is a bias.

    0 from shapes, and not drawn.
    """
    model = stacked(kind)
    arch = model.trace()
    assert roles(arch)["b"] == "bias"
    assert "b" not in archscale.weight_standard_deviations(arch)
    params = archscale.initialize(KEY, model.shapes, arch)
    assert float(jnp.abs(params["b"]).max()) == 0


@pytest.mark.parametrize("kind", STACKS)
def test_stacked_biases_end_branches(kind):
    """Adam, depth 8 against 2: m = 4; the bias added to the sum goes as the layer does, 1/m."""
    found = multipliers(stacked(kind, 8), stacked(kind, 2), depth_rule="adam", depth_exponent=0.5)
    np.testing.assert_allclose(np.unique(found["W"]), 0.25, rtol=1e-6)
    np.testing.assert_allclose(np.unique(found["b"]), 0.25, rtol=1e-6)


@pytest.mark.parametrize("how", ["loop", "scan"])
def test_stacked_gains_are_scales(how):
    """Gains [L, n] of stacked norms: role scale, 1 from shapes."""

    def one(h, w, g):
        return h + RELU(h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True)) * g) @ w

    def apply(p, x):
        h = x @ p["stem"]
        if how == "scan":
            h = jax.lax.scan(lambda h, wg: (one(h, *wg), None), h, (p["W"], p["g"]))[0]
        else:
            for i in range(4):
                h = one(h, p["W"][i], p["g"][i])
        return h @ p["out"]

    shapes = specs(stem=(8, 16), W=(4, 16, 16), g=(4, 16), out=(16, 3))
    model = Model(apply, shapes, (normal(4, 8),))
    assert roles(model.trace())["g"] == "scale"
    params = archscale.initialize(KEY, shapes, model.trace())
    assert float(jnp.abs(params["g"] - 1).max()) == 0


def test_biases_of_stacked_heads():
    """Biases [L, heads, d] of stacked projections, added to a sum of two projections."""

    def apply(p, x):
        h = x @ p["stem"]
        for i in range(3):
            q = jnp.einsum("bd,dhk->bhk", h, p["q"][i]) + jnp.einsum("bd,dhk->bhk", h, p["r"][i])
            q = q + p["b"][i]
            h = h + RELU(q).reshape(h.shape) @ p["o"][i]
        return h @ p["out"]

    shapes = specs(stem=(8, 16), b=(3, 4, 4), o=(3, 16, 16), out=(16, 3))
    shapes |= {"q": spec(3, 16, 4, 4), "r": spec(3, 16, 4, 4)}
    model = Model(apply, shapes, (normal(4, 8),))
    assert roles(model.trace())["b"] == "bias"


# Spectral and weight normalization


def spectral(width):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = RELU(nn.Dense(width, name="stem")(x))
            x = nn.SpectralNorm(nn.Dense(2 * width, name="hidden"))(x, update_stats=True)
            return nn.Dense(3, name="last")(RELU(x))

    module, x = Net(), jnp.ones((2, 8))
    variables = jax.eval_shape(module.init, KEY, x)

    def apply(params, averages, x):
        variables = {"params": params, "batch_stats": averages}
        return module.apply(variables, x, mutable=["batch_stats"])[0]

    return Model(apply, variables["params"], (variables["batch_stats"], x))


def power_iteration(width):
    """Spectral normalization as it is written by hand, with the vector among the inputs."""

    def apply(p, u, x):
        w = p["hidden"]
        v = w @ u
        v = v / jnp.linalg.norm(v)
        u = v @ w
        u = jax.lax.stop_gradient(u / jnp.linalg.norm(u))
        v = jax.lax.stop_gradient(v)
        return RELU(RELU(x @ p["stem"]) @ (w / (v @ w @ u))) @ p["last"]

    shapes = specs(stem=(8, width), hidden=(width, 2 * width), last=(2 * width, 3))
    return Model(apply, shapes, (spec(2 * width), spec(2, 8)))


def weight_norm(width):
    """w/‖w‖·g (weight normalization): g is a scale, w the layer."""

    def apply(p, x):
        w = p["hidden"]["v"]
        w = w / jnp.linalg.norm(w, axis=0, keepdims=True) * p["hidden"]["g"]
        return RELU(RELU(x @ p["stem"]) @ w) @ p["last"]

    shapes: dict[str, Any] = dict(specs(stem=(8, width), last=(2 * width, 3)))
    shapes["hidden"] = {"v": spec(width, 2 * width), "g": spec(2 * width)}
    return Model(apply, shapes, (spec(2, 8),))


def haiku_spectral(width):
    """hk.SpectralNorm inside a network with state."""

    def network(x):
        x = RELU(hk.Linear(width, name="stem")(x))
        w = hk.get_parameter("hidden", (width, 2 * width), init=hk.initializers.VarianceScaling())
        x = x @ hk.SpectralNorm(name="sn")(w, update_stats=False)
        return hk.Linear(3, name="last")(RELU(x))

    net = hk.without_apply_rng(hk.transform_with_state(network))
    params, state = jax.eval_shape(net.init, KEY, jnp.ones((2, 8)))
    return Model(lambda p, s, x: net.apply(p, s, x)[0], params, (state, spec(2, 8)))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (spectral, "hidden/kernel"),
        (power_iteration, "hidden"),
        (weight_norm, "hidden/v"),
        (haiku_spectral, "hidden"),
    ],
    ids=["linen.SpectralNorm", "by hand", "weight normalization", "hk.SpectralNorm"],
)
def test_a_normalized_weight_is_the_weight_of_its_layer(make, name):
    """Not of the power iteration u·Wᵀ: fans n and 2n, role hidden, Adam 1/r."""
    arch, base = make(64).trace(), make(32).trace()
    one = parameter(arch, name)
    assert (str(one.role), one.fan_in, one.fan_out) == ("hidden", 64, 128)
    found = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
    assert value(found, name) == pytest.approx(0.5)
    if make is weight_norm:
        assert parameter(arch, "hidden/g").role == "scale"


# Learned queries


def map_head(width, tiled=True):
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(width, name="stem")(x)
            probe = self.param("probe", nn.initializers.normal(), (1, 1, width))
            probe = (
                jnp.tile(probe, (len(x), 1, 1))
                if tiled
                else jnp.broadcast_to(probe, (len(x), 1, width))
            )
            pooled = nn.MultiHeadDotProductAttention(width // 16, name="mha")(probe, x)
            return nn.Dense(3, name="head")(pooled[:, 0])

    return linen_model(Pooled(), normal(2, 5, 8))


def perceiver(width):
    """Latents [N, n] that attend to the inputs, in plain JAX."""

    def apply(p, x):
        z = x @ p["stem"]
        q, k, v = p["latents"] @ p["query"], z @ p["key"], z @ p["value"]
        weights = jax.nn.softmax(jnp.einsum("nd,btd->bnt", q, k) / width**0.5)
        h = p["latents"] + jnp.einsum("bnt,btd->bnd", weights, v) @ p["mix"]
        return RELU(h).mean(1) @ p["head"]

    shapes = specs(stem=(8, width), latents=(4, width), head=(width, 3))
    shapes |= {name: spec(width, width) for name in ("query", "key", "value", "mix")}
    return Model(apply, shapes, (spec(2, 5, 8),))


def object_queries(width):
    """DETR: object queries through a decoder layer of Equinox."""

    class Decoder(eqx.Module):
        stem: eqx.nn.Linear
        queries: jax.Array
        attention: eqx.nn.MultiheadAttention
        head: eqx.nn.Linear

        def __init__(self, key):
            self.stem = eqx.nn.Linear(8, width, key=key)
            self.queries = jax.random.normal(key, (6, width))
            self.attention = eqx.nn.MultiheadAttention(2, width, key=key)
            self.head = eqx.nn.Linear(width, 4, key=key)

        def __call__(self, x):
            memory = jax.vmap(self.stem)(x)
            h = self.queries + self.attention(self.queries, memory, memory)
            return jax.vmap(self.head)(h)

    return equinox_model(Decoder, normal(2, 5, 8))


@pytest.mark.parametrize(
    ("make", "table", "query", "key"),
    [
        (map_head, "probe", "mha/query/kernel", "mha/key/kernel"),
        (lambda n: map_head(n, False), "probe", "mha/query/kernel", "mha/key/kernel"),
        (perceiver, "latents", "query", "key"),
        (object_queries, "queries", "attention/query_proj/weight", "attention/key_proj/weight"),
    ],
    ids=["MAP head", "MAP head, broadcast", "Perceiver", "DETR"],
)
def test_learned_queries_are_embeddings_read_by_hidden_layers(make, table, query, key):
    """The layer that reads them contracts a width: hidden, Adam 1/r, C as the keys'."""
    arch, base = make(64).trace(), make(32).trace()
    assert parameter(arch, table).role == "embedding"
    one = parameter(arch, query)
    assert (str(one.role), one.fan_in, one.fan_out) == ("hidden", 64, 64)
    found = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
    assert value(found, query) == pytest.approx(0.5)
    assert value(found, table) == pytest.approx(1)
    np.testing.assert_allclose(deviation(make(64), query), deviation(make(64), key), rtol=0.5)


# Kernels that are joined before one product


def lstm(cell, layers=1, width=16):
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            h: Any = x
            for _ in range(layers):
                h = nn.RNN(cell(width))(h)
            return nn.Dense(3)(h[:, -1])

    return linen_model(Classifier(), normal(2, 5, 4))


def test_joined_kernels_of_an_lstm_are_what_they_are_apart():
    """OptimizedLSTMCell joins i, f, g, o before one product: LSTMCell by leaf, in all numbers."""

    def numbers(cell):
        arch, base = lstm(cell, width=32).trace(), lstm(cell, width=16).trace()
        deviations = archscale.weight_standard_deviations(arch)
        rates = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
        return {
            one.name.replace("Optimized", ""): (
                str(one.role),
                one.fan_in,
                one.fan_out,
                deviations.get(one.name),
                rates[one.name],
            )
            for one in arch.parameters
        }

    assert numbers(nn.OptimizedLSTMCell) == numbers(nn.LSTMCell)


@pytest.mark.parametrize("how", ["concatenate", "stack", "rows"])
def test_joined_kernels_in_plain_jax(how):
    """x @ concatenate([q, k]) and einsum over stack([q, k]) are the two layers; so are rows."""

    def make(how):
        def apply(p, x):
            h = x @ p["stem"]
            if how == "concatenate":
                a, b = jnp.split(h @ jnp.concatenate([p["q"], p["k"]], 1), 2, -1)
            elif how == "stack":
                a, b = jnp.einsum("bd,cde->cbe", h, jnp.stack([p["q"], p["k"]]))
            elif how == "rows":
                a, b = jnp.split(jnp.concatenate([p["q"].T, p["k"].T]) @ h.T, 2)
                a, b = a.T, b.T
            else:
                a, b = h @ p["q"], h @ p["k"]
            return RELU(RELU(a) @ p["c"] + jnp.tanh(b) @ p["d"]) @ p["out"]

        shapes = specs(stem=(8, 16), out=(16, 3)) | {name: spec(16, 16) for name in "qkcd"}
        return Model(apply, shapes, (normal(4, 8),))

    arch, expected = make(how).trace(), make("apart").trace()
    assert roles(arch) == roles(expected)
    for name in "qk":
        one, other = parameter(arch, name), parameter(expected, name)
        assert (one.fan_in, one.fan_out) == (other.fan_in, other.fan_out)
        np.testing.assert_allclose(
            deviation(make(how), name), deviation(make("apart"), name), rtol=1e-6
        )


# Usual layers and leaves that tell their role by their use


def moe(width):
    def apply(p, x):
        h = x @ p["embed"]
        gate = jax.nn.softmax(h @ p["router"])
        expert = gate.argmax(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4)
        up = jax.nn.gelu(jax.lax.ragged_dot(h[order], p["up"], sizes))
        down = jax.lax.ragged_dot(up, p["down"], sizes)[jnp.argsort(order)]
        return (h + down * gate.max(-1, keepdims=True)) @ p["out"]

    shapes = specs(
        embed=(8, width),
        router=(width, 4),
        up=(4, width, 4 * width),
        down=(4, 4 * width, width),
        out=(width, 3),
    )
    return Model(apply, shapes, (spec(12, 8),))


def test_experts_of_ragged_dot_are_layers():
    """Dropless mixtures: one expert reads n features and writes 4n; Adam 1/r, the router too."""
    arch = moe(32).trace()
    found = {one.name: (str(one.role), one.fan_in, one.fan_out) for one in arch.parameters}
    assert found["up"] == ("hidden", 32, 128)
    assert found["down"] == ("hidden", 128, 32)
    assert found["out"][0] == "readout"
    rates = multipliers(moe(64), moe(32), width_rule="adam")
    for name in ("up", "down", "router", "out"):
        assert rates[name] == pytest.approx(0.5), name
    assert rates["embed"] == pytest.approx(1)


def fno(p, x):
    h = x @ p["lift"]
    for i in range(2):
        modes = jnp.fft.rfft(h, axis=1)[:, :5]
        modes = jnp.einsum("bki,iok->bko", modes, p[f"spectral{i}"])
        modes = jnp.pad(modes, ((0, 0), (0, 4), (0, 0)))
        h = jax.nn.gelu(jnp.fft.irfft(modes, n=16, axis=1) + h @ p[f"local{i}"])
    return h @ p["out"]


def test_fourier_layers_read_what_the_layers_beside_them_read():
    """fft is linear: nothing to declare, and spectral0 is not drawn as if it read ReLUs.

    Both read the lifted input. 5 of 9 modes are kept, 9/16 of the power: to bring as much as
    local0, spectral0 may be up to 4/3 of it, but not √2 (an activation).
    """
    shapes = specs(lift=(2, 16), out=(16, 1), local0=(16, 16), local1=(16, 16))
    shapes |= {f"spectral{i}": spec(16, 16, 5, dtype=jnp.complex64) for i in (0, 1)}
    model = Model(fno, shapes, (spec(2, 16, 2),))
    assert roles(model.trace())["spectral0"] == "hidden"
    ratio = deviation(model, "spectral0") / deviation(model, "local0")
    assert 0.99 < ratio < 1.35


def test_a_returned_parameter_is_part_of_the_result():
    """State-independent log std of a policy: traced; the other leaves are as without it."""

    def actor(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"])
        return h @ p["mean"], p["log_std"]

    def without(p, x):
        return actor({**p, "log_std": 0.0}, x)[0]

    shapes = specs(w1=(8, 32), w2=(32, 32), mean=(32, 2))
    expected = Model(without, shapes, (spec(4, 8),))
    model = Model(actor, shapes | specs(log_std=(2,)), (spec(4, 8),))
    found = roles(model.trace())
    assert found.pop("log_std") in ("bias", "scale")
    assert found == roles(expected.trace())
    for name in ("w1", "w2", "mean"):
        np.testing.assert_allclose(deviation(model, name), deviation(expected, name))
    rates = multipliers(model, model, width_rule="adam")
    assert rates["log_std"] == pytest.approx(1)


@pytest.mark.parametrize("result", ["in a dictionary", "broadcast", "exponentiated"])
def test_a_returned_parameter_in_other_results(result):
    """The same in Haiku: a dictionary, a log std for every example, its exponential."""

    def network(x):
        h = jnp.tanh(hk.Linear(16)(jnp.tanh(hk.Linear(16)(x))))
        mean = hk.Linear(2, name="mean")(h)
        log_std = hk.get_parameter("log_std", (2,), init=jnp.zeros)
        if result == "in a dictionary":
            return {"mean": mean, "log_std": log_std}
        if result == "broadcast":
            return mean, jnp.broadcast_to(log_std, mean.shape)
        return mean, jnp.exp(log_std)

    model = haiku_model(network, normal(4, 8))
    check_readout(model, "mean/w", 16)
    assert parameter(model.trace(), "log_std").role in ("bias", "scale")


# Inputs that are bound to the function


def test_an_input_bound_to_the_function_is_read_or_named():
    """Decoder ids in the closure: either read as an input, or the message names the inputs."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, source, ids):
            memory = nn.Dense(16)(source)
            h = nn.Embed(10, 16, name="table")(ids)
            h = h + nn.Dense(16)(nn.LayerNorm()(h))
            q, k = nn.Dense(16, name="query")(h), nn.Dense(16)(memory)
            weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
            return nn.Dense(10)(h + jnp.einsum("bts,bsd->btd", weights, nn.Dense(16)(memory)))

    source, ids = jnp.ones((2, 5, 8)), jnp.zeros((2, 4), jnp.int32)
    whole = linen_model(Decoder(), source, ids)
    expected = roles(whole.trace())
    bound = Model(lambda p, x: whole.apply(p, x, ids), whole.shapes, (source,))
    try:
        found = roles(bound.trace())
    except archscale.TraceError as error:
        assert "inputs" in str(error)
        assert "constant" in str(error) or "bound" in str(error)
    else:
        assert found == expected


def test_features_of_a_graph_bound_to_the_function():
    """Node features in the closure beside an input per graph, in plain JAX."""
    nodes, adjacency = normal(6, 8), jnp.ones((6, 6)) / 6

    def apply(p, x):
        h = RELU(adjacency @ (nodes @ p["first"]))
        h = RELU(adjacency @ (h @ p["second"]) + (x @ p["global"])[:, None])
        return h.mean(1) @ p["out"]

    shapes = specs(first=(8, 16), second=(16, 16), out=(16, 3)) | {"global": spec(4, 16)}
    model = Model(apply, shapes, (spec(2, 4),))
    try:
        found = roles(model.trace())
    except archscale.TraceError as error:
        assert "inputs" in str(error)
    else:
        assert found["second"] == "hidden"
        assert found["first"] == "input"
        assert found["out"] == "readout"


NORMS = {
    "mean and var": lambda h: (
        (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-6)
    ),
    "einsum": lambda h: (
        (h - h.mean(-1, keepdims=True))
        * jax.lax.rsqrt(
            jnp.einsum("...i,...i->...", h - h.mean(-1, keepdims=True), h)[..., None] / h.shape[-1]
        )
    ),
    "sum": lambda h: h - jnp.sum(h, -1, keepdims=True) / h.shape[-1],
    "root mean square": lambda h: h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_gain_between_two_norms_is_a_scale(norm):
    """The second norm sums what the gain scaled; a sum that is a layer is all that reads it."""

    def apply(p, x):
        h = NORMS[norm](jax.nn.relu(x @ p["stem"]) @ p["w"]) * p["gain"]
        return (NORMS[norm](h) * p["last"]) @ p["head"]

    shapes = specs(stem=(8, 16), w=(16, 16), gain=(16,), last=(16,), head=(16, 3))
    architecture = archscale.trace(apply, shapes, spec(4, 8))
    found = {one.name: str(one.role) for one in architecture.parameters}
    assert found["gain"] == found["last"] == "scale"
    score = archscale.trace(
        lambda p, x: jnp.sum(jax.nn.relu(x @ p["stem"]) * p["a"], -1),
        specs(stem=(8, 16), a=(16,)),
        spec(4, 8),
    )
    assert {one.name: str(one.role) for one in score.parameters}["a"] == "readout"
