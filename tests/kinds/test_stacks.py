"""Stacks whose leaves are scanned, indexed or shared: one value per slice (theory §11).

A scanned stack is the loop over leaves of its own, so that the loop tells what each slice gets.
`weight_standard_deviations` returns an array that broadcasts over the leaf, or a number where all
slices agree.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    Model,
    array_of,
    deviation,
    haiku_model,
    linen_model,
    moments,
    multipliers,
    normal,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu
DEPTH = 4
RULES = [None, "second_moment"]


def slices(found, depth, shape):
    """A deviation or multiplier of a stacked leaf: one number per slice."""
    full = array_of(found, (depth, *shape))
    flat = full.reshape(depth, -1)
    assert np.all(flat == flat[:, :1])
    return flat[:, 0]


def residual(how, depth=DEPTH, width=16):
    """h + relu(relu(h) @ up) @ down, from one loop over leaves to one scan."""

    def block(h, up, down):
        return h + RELU(RELU(h) @ up) @ down

    def run(p, x):
        h = x @ p["stem"]
        streams = [h]
        if how == "scan":
            h = jax.lax.scan(lambda h, w: (block(h, *w), None), h, (p["up"], p["down"]))[0]
        elif how == "reversed scan":
            pair = (p["up"], p["down"])
            h = jax.lax.scan(lambda h, w: (block(h, *w), None), h, pair, reverse=True)[0]
        elif how == "fori_loop":
            h = jax.lax.fori_loop(0, depth, lambda i, h: block(h, p["up"][i], p["down"][i]), h)
        elif how == "shared":
            for _ in range(depth):
                h = block(h, p["up"], p["down"])
        elif how == "shared scan":
            body = lambda h, _: (block(h, p["up"], p["down"]), None)  # noqa: E731
            h = jax.lax.scan(body, h, length=depth)[0]
        else:
            for up, down in zip(p["up"], p["down"], strict=True):
                h = block(h, up, down)
        streams.append(h)
        return RELU(h) @ p["out"], streams

    one = spec(width, width)
    leaf = {"loop": [one] * depth, "shared": one, "shared scan": one}.get(
        how, spec(depth, width, width)
    )
    shapes = specs(stem=(8, width), out=(width, 3)) | {"up": leaf, "down": leaf}
    return Model(lambda p, x: run(p, x)[0], shapes, (normal(32, 8),)), run


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["scan", "indexed", "fori_loop", "reversed scan"])
def test_a_stack_has_the_deviations_of_the_loop(how, rule):
    """Slice i is drawn as the i-th leaf of the loop; stem and readout too."""
    stacked, loop = residual(how)[0], residual("loop")[0]
    for name in ("up", "down"):
        expected = [float(deviation(loop, f"{name}/{i}", rule)) for i in range(DEPTH)]
        if how == "reversed scan":
            expected = expected[::-1]
        found = slices(deviation(stacked, name, rule), DEPTH, (16, 16))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name in ("stem", "out"):
        np.testing.assert_allclose(deviation(stacked, name, rule), deviation(loop, name, rule))


def test_leaves_that_differ_by_rounding_are_equal():
    """Branches of one layer: C = 2·share whatever the stream has grown to; one number, not L."""

    def scanned(p, x):
        return (
            jax.lax.scan(lambda h, w: (h + RELU(h) @ w, None), x @ p["stem"], p["w"])[0] @ p["out"]
        )

    def loop(p, x):
        h = x @ p["stem"]
        for w in p["w"]:
            h = h + RELU(h) @ w
        return h @ p["out"]

    ends = specs(stem=(8, 16), out=(16, 3))
    stacked = Model(scanned, ends | specs(w=(7, 16, 16)), (normal(2, 8),))
    apart = Model(loop, ends | {"w": [spec(16, 16)] * 7}, (normal(2, 8),))
    found = deviation(stacked, "w", "second_moment")
    assert found.ndim == 0
    assert found**2 * 16 == pytest.approx(2 * 0.25 / 7)
    leaves = {float(deviation(apart, f"w/{i}", "second_moment")) for i in range(7)}
    assert leaves == {float(found)}


@pytest.mark.parametrize("how", ["scan", "fori_loop", "shared", "shared scan"])
def test_stacks_keep_the_promise_of_moments(how):
    """The stream grows at most by exp(1/4) = 1.28 over the stack, and it grows; measured."""
    model, run = residual(how, width=256)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert 1.02 < found[1] / found[0] < 1.28 * (1.4 if how.startswith("shared") else 1.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["shared", "shared scan"])
def test_shared_weights_have_one_deviation(how, rule):
    """ALBERT, universal transformers: one number, at most that of the leaves of the loop.

    What a shared weight adds to the stream points the same way every time, so that K additions of
    one have K times the second moment of K of their own: by moments its deviation is up to √K less.
    """
    loop = residual("loop")[0]
    for name in ("up", "down"):
        found = deviation(residual(how)[0], name, rule)
        assert found.size == 1
        leaves = [float(deviation(loop, f"{name}/{i}", rule)) for i in range(DEPTH)]
        least = min(leaves) / (DEPTH**0.5 if rule == "second_moment" else 1)
        assert least * 0.999 <= float(found.ravel()[0]) <= max(leaves) * 1.001


def test_slices_are_drawn_with_their_own_deviation():
    """`initialize` of a stack whose layers differ: the spread of each slice, 32·32 entries.

    Without skips and with dense connections the in-degree rises: C falls from slice to slice.
    """

    def apply(p, x):
        h = x @ p["stem"]
        for i in range(4):
            h = h + RELU(h) @ p["w"][i] if i % 2 else RELU(h) @ p["w"][i]
        return RELU(h) @ p["out"]

    shapes = specs(stem=(8, 32), w=(4, 32, 32), out=(32, 3))
    model = Model(apply, shapes, (normal(2, 8),))
    found = slices(deviation(model, "w", "second_moment"), 4, (32, 32))
    assert found[1] < found[0] * 0.8
    assert found[3] < found[2] * 0.8
    params = archscale.initialize(jax.random.key(3), shapes, model.trace(), "second_moment")
    spread = np.asarray(params["w"]).reshape(4, -1).std(1)
    np.testing.assert_allclose(spread, found, rtol=0.1)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, h, _):
        y = nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="norm")(h))
        return h + nn.Dense(self.width, name="down")(RELU(y)), None


def linen_stack(scanned, depth, width=16):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(width, name="stem")(x)
            if scanned:
                stack = nn.scan(
                    Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth
                )
                h, _ = stack(width, name="stack")(h, None)
            else:
                for i in range(depth):
                    h, _ = Block(width, name=f"block{i}")(h, None)
            return nn.Dense(3, name="out")(nn.LayerNorm(name="last")(h))

    return linen_model(Net(), normal(2, 8))


@pytest.mark.parametrize("rule", RULES)
def test_nn_scan_has_the_deviations_of_the_loop(rule):
    scanned, loop = linen_stack(True, DEPTH), linen_stack(False, DEPTH)
    for name, shape in (("up/kernel", (16, 32)), ("down/kernel", (32, 16))):
        expected = [float(deviation(loop, f"block{i}/{name}", rule)) for i in range(DEPTH)]
        found = slices(deviation(scanned, f"stack/{name}", rule), DEPTH, shape)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nn_scan_has_the_multipliers_of_the_loop(optimizer):
    """Depth 8 against 2 and both rules at once, width 32 against 16."""

    def numbers(scanned):
        return multipliers(
            linen_stack(scanned, 8, 32),
            linen_stack(scanned, 2, 16),
            width_rule=optimizer,
            depth_rule=optimizer,
            depth_exponent=1.0,
        )

    found, expected = numbers(True), numbers(False)
    for name in ("up/kernel", "up/bias", "down/kernel", "down/bias", "norm/scale", "norm/bias"):
        stacked = np.unique(value(found, f"stack/{name}"))
        np.testing.assert_allclose(stacked, value(expected, f"block3/{name}"), rtol=1e-6)
    for name in ("stem/kernel", "last/scale", "out/kernel"):
        np.testing.assert_allclose(value(found, name), value(expected, name), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_stacks_of_haiku_and_equinox(rule):
    """hk.layer_stack, and a vmapped Equinox block that jax.lax.scan runs through."""

    def of_haiku(stacked):
        def network(x):
            h = hk.Linear(16, name="stem")(x)

            def block(h):
                return h + hk.Linear(16, name="down")(RELU(hk.Linear(32, name="up")(RELU(h))))

            if stacked:
                h = hk.layer_stack(DEPTH)(block)(h)
            else:
                for _ in range(DEPTH):
                    h = block(h)
            return hk.Linear(3, name="out")(h)

        return haiku_model(network, normal(2, 8))

    loop = [f"down_{i}/w" if i else "down/w" for i in range(DEPTH)]
    expected = [float(deviation(of_haiku(False), name, rule)) for name in loop]
    found = slices(deviation(of_haiku(True), "down/w", rule), DEPTH, (32, 16))
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    def make(key):
        keys = jax.random.split(key, DEPTH)
        ends = eqx.nn.Linear(8, 16, key=key), eqx.nn.Linear(16, 3, key=key)
        up = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 32, key=key))(keys)
        down = eqx.filter_vmap(lambda key: eqx.nn.Linear(32, 16, key=key))(keys)
        return ends, up, down

    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.key(0)),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def apply(params, x):
        (_, up_static, down_static), (ends, up, down) = static, params
        stem, out = eqx.combine(ends, static[0])

        def body(h, layer):
            up, down = eqx.combine(layer, (up_static, down_static))
            return h + down(RELU(up(RELU(h)))), None

        return jax.vmap(lambda one: out(jax.lax.scan(body, stem(one), (up, down))[0]))(x)

    found = deviation(Model(apply, shapes, (normal(2, 8),)), "2/weight", rule)
    np.testing.assert_allclose(slices(found, DEPTH, (16, 32)), expected, rtol=1e-6)


def intermediates(how, depth):
    def apply(p, x):
        def block(z, layer):
            branch = RELU(RELU(z) @ layer["up"]) @ layer["down"]
            kept = {
                "nothing": None,
                "branch": {"branch": branch},
                "stream": z,
                "norms": jnp.sqrt(jnp.mean(branch**2, -1)),
            }[how]
            return z + branch, kept

        z, _ = jax.lax.scan(block, x @ p["stem"], p["stack"])
        return RELU(z) @ p["out"]

    shapes = specs(stem=(8, 16), out=(16, 3))
    stack = specs(up=(depth, 16, 16), down=(depth, 16, 16))
    return Model(apply, shapes | {"stack": stack}, (spec(2, 8),))


@pytest.mark.parametrize("how", ["branch", "stream", "norms"])
def test_outputs_of_a_scan_that_nobody_takes_change_nothing(how):
    """big_vision's intermediates, dropped: graph, deviations and multipliers are as without."""
    model, plain = intermediates(how, 4), intermediates("nothing", 4)
    assert int(model.trace().graph.n_node[0]) == int(plain.trace().graph.n_node[0])
    for rule in RULES:
        found = archscale.weight_standard_deviations(model.trace(), rule)
        expected = archscale.weight_standard_deviations(plain.trace(), rule)
        assert found.keys() == expected.keys()
        for name, one in found.items():
            np.testing.assert_allclose(one, expected[name], rtol=1e-6)
    found = multipliers(model, intermediates(how, 2), depth_rule="adam", depth_exponent=0.5)
    np.testing.assert_allclose(found["stack/down"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["stack/up"], 2**-0.5, rtol=1e-6)


def test_sown_intermediates_of_a_linen_scan_change_nothing():
    """The same of nn.scan whose body returns what it computed, unused."""

    class Returning(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            y = nn.Dense(16, name="down")(RELU(nn.Dense(16, name="up")(RELU(h))))
            return h + y, {"branch": y, "mean": y.mean()}

    class Net(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Returning,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            h, kept = stack(name="stack")(nn.Dense(16, name="stem")(x), None)
            del kept
            return nn.Dense(3, name="out")(h)

    x = normal(2, 8)
    found = multipliers(
        linen_model(Net(8), x), linen_model(Net(2), x), depth_rule="adam", depth_exponent=0.5
    )
    np.testing.assert_allclose(value(found, "down/kernel"), 0.25, rtol=1e-6)
    np.testing.assert_allclose(value(found, "up/kernel"), 0.5, rtol=1e-6)
