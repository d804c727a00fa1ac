"""Numbers that a model makes of its own width: constants behind tables, features of a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale

pytestmark = pytest.mark.quick_compilation

V, T, BASE, WIDE = 11, 6, 32, 128
IDS = jax.ShapeDtypeStruct((2, T), jnp.int32)


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def norm(h):
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)


def tied(width, rows, *, own_readout=False):
    """A residual network of tokens whose rows are multiplied."""

    def apply(p, ids):
        h = rows(p["table"], ids, width)
        h = h + jax.nn.gelu(norm(h) @ p["up"]) @ p["down"]
        return norm(h) @ (p["readout"] if own_readout else p["table"].T)

    sizes = {"table": (V, width), "up": (width, 2 * width), "down": (2 * width, width)}
    if own_readout:
        sizes["readout"] = (width, V)
    return apply, shapes(**sizes)


ROWS = {
    "times √n": (lambda table, ids, n: table[ids] * n**0.5, 0.5),
    "the table times √n": (lambda table, ids, n: (table * jnp.sqrt(float(n)))[ids], 0.5),
    "over 1/n": (lambda table, ids, n: table[ids] / (1 / n), 1.0),
    "one-hots": (lambda table, ids, n: (jax.nn.one_hot(ids, V) @ table) * n**0.5, 0.5),
    "as they are": (lambda table, ids, n: table[ids], 0.0),
    "times 8": (lambda table, ids, n: table[ids] * 8, 0.0),
}


@pytest.mark.parametrize("own_readout", [False, True])
@pytest.mark.parametrize("spelling", ROWS)
def test_what_a_table_brings_is_that_of_the_base(spelling, own_readout):
    rows, power = ROWS[spelling]
    small, large = (tied(width, rows, own_readout=own_readout) for width in (BASE, WIDE))
    base = archscale.parametrize(small, IDS, optimizer="adamw")
    plan = archscale.parametrize(large, IDS, base=small, optimizer="adamw")
    ratio = (WIDE / BASE) ** power
    assert plan.learning_rate["table"] == pytest.approx(1 / ratio)
    assert plan.init_std["table"] * ratio == pytest.approx(base.init_std["table"])
    assert plan.learning_rate["table"] * plan.weight_decay["table"] == pytest.approx(1)
    factor = plan.choice.forward.tables.get("table", 1.0)
    assert factor == pytest.approx(1.0 if own_readout else ratio * BASE / WIDE)


def test_a_constant_behind_a_table_trains_as_one_in_it():
    """E times c under Adam is c·E, with c²: gradients, ε and decay follow (theory §12)."""
    plans = {}
    for name, rows in (("behind", lambda table, ids, n: table[ids] * (n / BASE)),
                       ("within", lambda table, ids, n: table[ids])):  # fmt: skip
        small, large = (tied(width, rows, own_readout=True) for width in (BASE, WIDE))
        plans[name] = large[0], archscale.parametrize(large, IDS, base=small, optimizer="adamw")
    ids = jnp.asarray(np.random.default_rng(1).integers(V, size=IDS.shape), jnp.int32)
    ended = {}
    for name, (apply, plan) in plans.items():
        tx = plan.optimizer(3e-3, weight_decay=0.1, eps=1e-3)

        def step(carry, _, apply=apply, tx=tx):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.mean(apply(p, ids)[..., 0] ** 2))(params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def trained(params, apply=apply, tx=tx, step=step):
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 3)
            return apply(params, ids)

        ended[name] = trained(plan.init(jax.random.key(0)))
    np.testing.assert_allclose(ended["behind"], ended["within"], rtol=2e-4, atol=2e-5)


# Features that a model makes of its inputs.


def timed(width, features):
    """A network of a time, of which it makes as many sines as it is wide."""

    def apply(p, t):
        h = features(t, width) @ p["stem"]
        return jax.nn.silu(h) @ p["readout"]

    wide = jax.eval_shape(lambda t: features(t, width), jnp.zeros(3)).shape[-1]
    return apply, shapes(stem=(wide, width), readout=(width, 2))


def sines(t, width):
    angles = t[:, None] * jnp.exp(-jnp.arange(width // 2))[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


MADE = {
    "sines and cosines": sines,
    "cosines of random frequencies": lambda t, n: jnp.cos(jnp.outer(t, jnp.asarray(
        np.random.default_rng(0).normal(size=n)))),
    "bumps": lambda t, n: jnp.exp(-((t[:, None] - jnp.linspace(0, 1, n)) ** 2)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", MADE)
def test_features_that_a_model_makes_are_a_width(spelling):
    time = jax.ShapeDtypeStruct((3,), jnp.float32)
    small, large = (timed(width, MADE[spelling]) for width in (BASE, WIDE))
    plan = archscale.parametrize(large, time, base=small, optimizer="adamw")
    assert plan.learning_rate["stem"] == pytest.approx(BASE / WIDE)
    assert {str(one.role) for one in plan.architecture.parameters} == {"input", "readout"}
    assert "as if inputs grew" not in str(plan)


def test_features_that_are_given_are_no_width():
    def network(inputs, width):
        apply = lambda p, x: jax.nn.silu(x.reshape(3, -1) @ p["stem"]) @ p["readout"]  # noqa: E731
        return apply, shapes(stem=(inputs, width), readout=(width, 2))

    few, many = (jax.ShapeDtypeStruct((3, *size), jnp.float32) for size in ((2, 5), (4, 5)))
    plan = archscale.parametrize(
        network(20, WIDE), many, base=network(10, BASE), base_inputs=(few,), optimizer="adamw"
    )
    assert plan.learning_rate["stem"] == 1
    assert math.isclose(plan.learning_rate["readout"], BASE / WIDE)
