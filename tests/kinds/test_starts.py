"""What `initialize` does with leaves that are not drawn: it keeps what the model gave.

With arrays every leaf but drawn weights keeps its value: biases, gains, slopes, logarithms.
With shapes there is nothing to keep: biases become 0 and scales 1, and the first note of the
report names the leaves for which that is a guess.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import KEY, Model, haiku_model, linen_model, normal, spec, specs

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def names_of(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_kept(apply, params, inputs, kept):
    """Leaves whose name contains one of `kept` stay, all that are drawn change."""
    arch = archscale.trace(apply, params, *inputs)
    new = names_of(archscale.initialize(jax.random.key(5), params, arch))
    drawn = archscale.weight_standard_deviations(arch)
    old = names_of(params)
    assert any(any(one in name for one in kept) for name in old)
    for name, leaf in old.items():
        if any(one in name for one in kept):
            assert name not in drawn, name
        if name in drawn:
            assert not np.allclose(new[name], leaf), name
        else:
            np.testing.assert_array_equal(new[name], leaf, err_msg=name)


def first_note(apply, shapes, inputs):
    """The first note of the report of a network whose shapes alone are known."""
    arch = archscale.trace(apply, shapes, *inputs)
    notes = archscale.report(arch, rule="none", params=shapes).notes
    return notes[0] if notes else ""


def shapes_of(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


# Slopes


def test_prelu_of_linen_keeps_its_slope():
    """Flax gives 0.01; with 1 the network would be a linear map."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.PReLU()(nn.Dense(16)(x))
            return nn.Dense(3)(x)

    x = normal(8, 8)
    model = Net()
    params = model.init(KEY, x)["params"]
    apply = linen_model(model, x).apply
    check_kept(apply, params, (x,), ["negative_slope"])
    new = archscale.initialize(KEY, params, archscale.trace(apply, params, x))
    assert float(jnp.abs(apply(new, x) + apply(new, -x)).max()) > 0.01


def test_prelu_of_equinox_and_by_hand():
    """0.25 of Equinox; a slope per feature."""

    class Net(eqx.Module):
        first: eqx.nn.Linear
        slope: eqx.nn.PReLU
        out: eqx.nn.Linear

        def __init__(self, key):
            self.first, self.slope = eqx.nn.Linear(8, 16, key=key), eqx.nn.PReLU()
            self.out = eqx.nn.Linear(16, 3, key=key)

        def __call__(self, x):
            return self.out(self.slope(self.first(x)))

    params, static = eqx.partition(Net(KEY), eqx.is_array)
    x = normal(4, 8)
    check_kept(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, (x,), ["negative_slope"])

    def apply(p, x):
        z = x @ p["a"]
        return jnp.where(z > 0, z, p["slope"] * z) @ p["b"]

    params = {"a": jnp.ones((8, 16)), "slope": jnp.full(16, 0.25), "b": jnp.ones((16, 3))}
    check_kept(apply, params, (x,), ["slope"])
    assert "slope" in first_note(apply, shapes_of(params), (x,))


def test_other_learned_activations_keep_their_parameters():
    """Swish with a learned temperature, and Snake: start values are the activation."""

    def apply(p, x):
        z = x @ p["a"]
        z = z * jax.nn.sigmoid(p["beta"] * z)
        z = z @ p["b"]
        return (z + jnp.sin(p["frequency"] * z) ** 2 / p["frequency"]) @ p["c"]

    params = {
        "a": jnp.ones((8, 16)),
        "beta": jnp.full((), 1.5),
        "b": jnp.ones((16, 16)),
        "frequency": jnp.full(16, 0.5),
        "c": jnp.ones((16, 3)),
    }
    check_kept(apply, params, (normal(4, 8),), ["beta", "frequency"])
    note = first_note(apply, shapes_of(params), (normal(4, 8),))
    assert "beta" in note
    assert "frequency" in note


# Gains whose 0 or whose logarithm means something


class GemmaNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + w)


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="stem")(x)
        x = x + nn.Dense(64, name="block")(RELU(GemmaNorm(name="norm")(x)))
        return nn.Dense(3, name="head")(GemmaNorm(name="final")(x))


def test_gains_of_one_plus_w_stay_zero():
    """x·(1 + w): w = 1 would double the features; 0 is what the model gives."""
    x = normal(4, 8)
    params = Gemma().init(KEY, x)["params"]
    model = linen_model(Gemma(), x)
    check_kept(model.apply, params, (x,), ["norm/w", "final/w"])


def test_gains_of_one_plus_w_are_named_or_right():
    """From shapes: either 0, as 1 + w shows, or named in the first note."""
    model = linen_model(Gemma(), normal(4, 8))
    params = archscale.initialize(KEY, model.shapes, model.trace())
    right = float(jnp.abs(params["norm"]["w"]).max()) == 0
    note = first_note(model.apply, model.shapes, model.inputs)
    assert right or ("norm/w" in note and "final/w" in note)


class Clip(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        towers = []
        for name, z in (("a", a), ("b", b)):
            z = nn.Dense(16, name=name + "2")(RELU(nn.Dense(32, name=name)(z)))
            towers.append(z / jnp.linalg.norm(z, axis=-1, keepdims=True))
        scale = self.param("logit_scale", lambda key: jnp.log(1 / 0.07))
        shift = self.param("logit_bias", lambda key: jnp.asarray(-10.0))
        return jnp.exp(scale) * towers[0] @ towers[1].T + shift


def test_temperature_and_bias_of_a_contrastive_loss_stay():
    """CLIP's logit scale log(1/0.07), SigLIP's bias -10; from shapes both are named."""
    inputs = normal(4, 8), normal(4, 8, seed=3)
    params = Clip().init(KEY, *inputs)["params"]
    model = linen_model(Clip(), *inputs)
    check_kept(model.apply, params, inputs, ["logit_scale", "logit_bias"])
    note = first_note(model.apply, model.shapes, inputs)
    assert "logit_scale" in note
    assert "logit_bias" in note


def test_log_std_of_a_policy_stays():
    """exp(log_std) in a log probability, and returned as it is."""

    class Actor(nn.Module):
        @nn.compact
        def __call__(self, x, action):
            h = nn.tanh(nn.Dense(16)(x))
            mean, log_std = nn.Dense(2)(h), self.param("log_std", nn.initializers.zeros, (2,))
            probability = -0.5 * jnp.square((action - mean) / jnp.exp(log_std)) - log_std
            return probability.sum(-1), nn.Dense(1)(h)

    inputs = normal(4, 8), jnp.zeros((4, 2))
    params = Actor().init(KEY, *inputs)["params"]
    params["log_std"] = jnp.full(2, -0.5)
    model = linen_model(Actor(), *inputs)
    check_kept(model.apply, params, inputs, ["log_std"])
    assert "log_std" in first_note(model.apply, model.shapes, inputs)

    def network(x):
        h = jnp.tanh(hk.Linear(16)(x))
        return hk.Linear(2)(h), hk.get_parameter("log_std", (2,), init=hk.initializers.Constant(-1))

    other = haiku_model(network, inputs[0])
    net = hk.without_apply_rng(hk.transform(network))
    check_kept(other.apply, net.init(KEY, inputs[0]), (inputs[0],), ["log_std"])


def test_layer_scale_and_rezero_stay():
    """1e-4 in front of a branch (CaiT, ConvNeXt), 0 in front of a branch (ReZero)."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16)(x)
            gamma = self.param("gamma", nn.initializers.constant(1e-4), (16,))
            h = h + gamma * nn.Dense(16)(RELU(nn.Dense(16)(h)))
            alpha = self.param("alpha", nn.initializers.zeros, ())
            h = h + alpha * nn.Dense(16)(RELU(h))
            return nn.Dense(3)(h)

    x = normal(4, 8)
    model = linen_model(Net(), x)
    check_kept(model.apply, Net().init(KEY, x)["params"], (x,), ["gamma", "alpha"])
    note = first_note(model.apply, model.shapes, (x,))
    assert "alpha" in note
    assert "gamma" in note


# State space models


def mamba(p, x):
    u = x @ p["stem"]
    decay = jnp.exp(-jnp.exp(p["A_log"]))

    def step(h, u):
        h = decay * h + u[..., None]
        return h, (h * p["C"]).sum(-1)

    _, y = jax.lax.scan(step, jnp.zeros((x.shape[0], *p["A_log"].shape)), jnp.swapaxes(u, 0, 1))
    return RELU(jnp.swapaxes(y, 0, 1)) @ p["out"]


def test_decays_of_a_state_space_model_stay():
    """A_log = log(1 … N) [n, N], read without declared roles; from shapes it is named."""
    params = {
        "stem": jnp.ones((8, 16)),
        "A_log": jnp.log(jnp.tile(jnp.arange(1.0, 5), (16, 1))),
        "C": jnp.ones((16, 4)),
        "out": jnp.ones((16, 3)),
    }
    x = normal(2, 6, 8)
    arch = archscale.trace(mamba, params, x)
    new = archscale.initialize(KEY, params, arch)
    np.testing.assert_array_equal(new["A_log"], params["A_log"])
    assert "A_log" in first_note(mamba, shapes_of(params), (x,))


def selective(p, x):
    z = x @ p["stem"]
    dt = jax.nn.softplus(z @ p["dt"] + p["dt_bias"])
    decay = -jnp.exp(p["A_log"])

    def step(h, t):
        u, d = t
        h = jnp.exp(d * decay) * h + d * u
        return h, h

    start = jnp.zeros((z.shape[0], z.shape[2]))
    _, h = jax.lax.scan(step, start, (jnp.swapaxes(z, 0, 1), jnp.swapaxes(dt, 0, 1)))
    e = jnp.mean(jnp.swapaxes(h, 0, 1) + p["D"] * z, axis=1) @ p["out"]
    e = e / jnp.linalg.norm(e, axis=-1, keepdims=True)
    return e @ e.T * jnp.exp(p["logit_scale"]) + p["logit_bias"]


SELECTIVE = specs(
    stem=(4, 16),
    dt=(16, 16),
    dt_bias=(16,),
    A_log=(16,),
    D=(16,),
    out=(16, 8),
    logit_scale=(),
    logit_bias=(),
)


def test_a_selective_layer_with_a_contrastive_head_is_read():
    """No arrangement to declare; starts stay; from shapes the report names them first."""
    x = normal(3, 5, 4)
    params = {
        name: jnp.full(one.shape, 0.1 * i - 0.3) for i, (name, one) in enumerate(SELECTIVE.items())
    }
    arch = archscale.trace(selective, params, x)
    new = archscale.initialize(KEY, params, arch)
    for name in ("dt_bias", "A_log", "D", "logit_scale", "logit_bias"):
        np.testing.assert_array_equal(new[name], params[name], err_msg=name)
    for name in ("stem", "dt", "out"):
        assert float(jnp.std(new[name])) > 0.01, name
    note = first_note(selective, SELECTIVE, (x,))
    for name in ("A_log", "logit_scale", "logit_bias"):
        assert name in note, name


def test_forget_gates_keep_their_bias():
    """A forget gate that starts at 1, plain JAX, and the LSTM of Haiku that adds it itself."""

    def apply(p, x):
        def step(carry, xt):
            h, c = carry
            z = xt @ p["in"] + h @ p["rec"]
            keep = jax.nn.sigmoid(z @ p["f"] + p["forget_bias"])
            c = keep * c + jnp.tanh(z)
            return (jnp.tanh(c), c), None

        zeros = jnp.zeros((x.shape[1], 16))
        (h, _), _ = jax.lax.scan(step, (zeros, zeros), x)
        return h @ p["out"]

    sizes = {"in": (4, 16), "rec": (16, 16), "f": (16, 16), "out": (16, 3)}
    params = {name: jnp.ones(size) for name, size in sizes.items()}
    params["forget_bias"] = jnp.ones(16)
    check_kept(apply, params, (normal(3, 2, 4),), ["forget_bias"])


# Plain biases and gains


def plain_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(name="norm")(nn.Dense(16, name="stem")(x))
            return nn.Dense(3, name="head")(RELU(nn.Dense(16, name="hidden")(x)))

    return Net()


def test_biases_and_gains_are_kept_with_arrays():
    """Values that the model gave: biases of 0.3, gains of 0.7."""
    x = normal(4, 8)
    model = plain_model()
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, 0.3 if "bias" in str(path) else 0.7),
        model.init(KEY, x)["params"],
    )
    check_kept(linen_model(model, x).apply, params, (x,), ["bias", "scale"])


def test_biases_and_gains_from_shapes():
    """0 and 1, which no note mentions: a plain layer's bias, a plain norm's gain."""
    model = linen_model(plain_model(), normal(4, 8))
    params = archscale.initialize(KEY, model.shapes, model.trace())
    assert float(jnp.abs(params["hidden"]["bias"]).max()) == 0
    assert float(jnp.abs(params["norm"]["scale"] - 1).max()) == 0
    note = first_note(model.apply, model.shapes, model.inputs)
    for name in ("hidden/bias", "norm/scale", "stem/bias", "head/bias"):
        assert name not in note


def test_values_are_kept_under_jit_and_in_their_dtype():
    """The same inside jax.jit, where params are tracers, and in bfloat16."""

    def apply(p, x):
        return (RELU(x @ p["a"] + p["bias"]) * p["gain"]) @ p["b"]

    shapes = specs(a=(8, 16), bias=(16,), gain=(16,), b=(16, 3))
    params = {name: jnp.full(one.shape, 0.3, jnp.bfloat16) for name, one in shapes.items()}
    model = Model(apply, shapes_of(params), (spec(2, 8, dtype=jnp.bfloat16),))
    arch = model.trace()
    new = jax.jit(lambda key, params: archscale.initialize(key, params, arch))(KEY, params)
    for name in ("bias", "gain"):
        assert new[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            new[name].astype(jnp.float32), params[name].astype(jnp.float32)
        )
    abstract = jax.eval_shape(lambda key: archscale.initialize(key, model.shapes, arch), KEY)
    assert {name: one.shape for name, one in abstract.items()} == {
        name: one.shape for name, one in shapes.items()
    }


@pytest.mark.parametrize("kind", ["tied embeddings", "no bias"])
def test_nothing_is_noted_where_all_leaves_are_drawn(kind):
    """A network of weights alone: the first note names no leaf."""

    def apply(p, ids):
        h = RELU(p["table"][ids] @ p["mix"])
        return h @ (p["table"].T if kind == "tied embeddings" else p["out"])

    shapes = specs(table=(20, 16), mix=(16, 16))
    shapes |= {} if kind == "tied embeddings" else specs(out=(16, 20))
    note = first_note(apply, shapes, (spec(2, 4, dtype=jnp.int32),))
    assert "mix" not in note
