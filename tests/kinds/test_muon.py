"""A plan for Muon: which leaves are matrices, and that their updates are as large at every width.

By axes that were written down by hand, of ten models of four frameworks (`tests/matrix_models.py`):
the update of a matrix is √(out/in) in spectral norm, times what its base has (theory §10, §13).
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import archscale_jax as archscale
from archscale_jax._architecture import Role
from archscale_jax._trees import named_leaves
from archscale_jax.rules import muon_dimension_numbers
from archscale_jax.rules._matrix import Matrix, matrix_of, optimizer_labels
from tests.kinds.helpers import Model, normal, specs
from tests.matrix_models import MODELS
from tests.matrix_steps import axes_of, optimizer_of, steps

pytestmark = pytest.mark.quick_compilation

ROUNDING = 1e-4
"""Of float32 in two programs, which the iteration of Muon enlarges."""

BASE, WIDE = 32, 64
KEY = jax.random.key(0)


@functools.cache
def plan_of(name, width):
    one = MODELS[name]
    base = plan_of(name, BASE) if width > BASE else None
    return archscale.parametrize(one.make(width), one.inputs, base=base, optimizer="muon")


@functools.cache
def shapes_of(name, width):
    return jax.eval_shape(plan_of(name, width).init, KEY)


def steps_of(name, width, **options):
    make = optimizer_of(plan_of(name, width), **options)
    iterations = options.get("ns_steps", 5)
    return steps(MODELS[name], make, shapes_of(name, width), iterations)


def shape_of_matrix(name, leaf, width):
    """Numbers of inputs and outputs, by hand."""
    shape, axes = named_leaves(shapes_of(name, width))[leaf].shape, axes_of(MODELS[name], leaf)
    assert axes is not None
    return [math.prod(shape[axis] for axis in one) for one in axes]


# Whose a leaf is.


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_is_whose_it_is(name):
    """Muon's over the axes written down, Adam's for the reason; in the base too, and as printed."""
    one = MODELS[name]
    for width in (BASE, WIDE):
        plan = plan_of(name, width)
        for leaf, found in optimizer_labels(plan.architecture).items():
            axes = axes_of(one, leaf)
            if axes is None:
                why = next(why for other, why in one.others.items() if re.fullmatch(other, leaf))
                assert re.fullmatch(f"adam: {why}", found), leaf
            else:
                assert found == f"muon over {Matrix(*axes)}", leaf
    records = {record["path"]: record["optimizer"] for record in plan.report().records}
    assert records == optimizer_labels(plan.architecture)


def test_the_table_says_whose_a_leaf_is():
    text = str(plan_of("linen transformer", WIDE))
    for said in ("muon over axes (0)->(1, 2)", "muon over axes (0, 1)->(2)", "adam: table"):
        assert said in text
    assert "adam: readout" in plan_of("linen transformer", WIDE)._repr_html_()
    assert (
        "optimizer"
        not in archscale.parametrize(MODELS["Equinox MLP"].make(BASE), MODELS["Equinox MLP"].inputs)
        .report()
        .records[0]
    )


# The law.


@pytest.mark.parametrize(
    "name",
    [
        "linen decoder, scanned",
        "NNX mixture of experts",
        "Haiku transformer, fused qkv",
    ],
)
def test_matrices_change_alike_at_every_width(name):
    """Of every matrix of a stack, scale · √(in/out): √max(1, in/out of the base).

    Of a table, a vector, a depthwise kernel: entries of one size at every width; of what sums over
    a width (readouts, routers) smaller by base width over width, as Adam's.
    """
    base, wide = (steps_of(name, width) for width in (BASE, WIDE))
    for leaf, found in wide.items():
        if found.is_matrix:
            inputs, outputs = shape_of_matrix(name, leaf, BASE)
            expected = math.sqrt(max(1, inputs / outputs))
            for step in (found, base[leaf]):
                assert step.scale == pytest.approx(expected, rel=1e-3), leaf
                assert step.spread > 0.999, leaf
                assert step.error < 1e-3, leaf
                assert step.spectral == pytest.approx(1.12 * expected, rel=0.15), leaf
        else:
            ratio = BASE / WIDE if re.fullmatch(MODELS[name].reads_width, leaf) else 1
            assert found.scale / base[leaf].scale == pytest.approx(ratio, rel=1e-3), leaf
            assert found.spread > 0.99, leaf


def test_updates_of_consistent_size_are_alike_at_every_width_too():
    """consistent_rms=ρ: scale · √(in/out) is ρ·√in·√max(1, in/out), all of the base."""
    for width in (BASE, WIDE):
        for leaf, found in steps_of("Equinox MLP", width, consistent_rms=0.2).items():
            if found.is_matrix:
                inputs, outputs = shape_of_matrix("Equinox MLP", leaf, BASE)
                size = 0.2 * math.sqrt(inputs * max(1, inputs / outputs))
                assert found.scale == pytest.approx(size, rel=1e-3), leaf


def test_spectral_norms_are_flat_where_the_iteration_has_steps_enough():
    """Twelve steps: the largest of the values between which singular values then change."""
    values = np.linspace(0.01, 1, 1000)
    for _ in range(60):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = {width: steps_of("Equinox MLP", width, ns_steps=12) for width in (BASE, WIDE)}
    for layer, expected in {1: 1, 2: math.sqrt(64 / 24), 3: 1}.items():
        for one in found.values():
            spectral = one[f"inner/layers/{layer}/weight"].spectral
            assert spectral == pytest.approx(values.max() * expected, rel=0.03), layer


def test_optax_alone_is_off_where_outputs_come_first():
    """[24, 2n], a bottleneck that no width enters: optax takes 24 inputs to 2n outputs.

    Size √(2n/24) where √(24/2n) is wanted: 2n/24, times 2; [n, 24] has √1 where √(n/24) is wanted,
    n above 24: times √½.
    """
    name = "Equinox MLP"
    alone = functools.partial(optax.contrib.muon, 1.0)
    base, wide = (steps(MODELS[name], alone, shapes_of(name, width)) for width in (BASE, WIDE))
    for layer, ratio in {1: 1, 2: 2, 3: math.sqrt(1 / 2)}.items():
        leaf = f"inner/layers/{layer}/weight"
        assert wide[leaf].scale / base[leaf].scale == pytest.approx(ratio, rel=1e-3), leaf


def test_matrices_of_a_stack_are_orthogonalized_one_by_one():
    """A scan stack and experts: as optax does with each matrix by itself."""

    def apply(p, x):
        h, _ = lax.scan(lambda h, w: (jax.nn.relu(h) @ w, None), x @ p["stem"], p["layers"])
        h = jnp.einsum(
            "bef,efo->beo", jax.nn.relu(jnp.einsum("bi,efi->bef", h, p["up"])), p["down"]
        )
        return h.sum(1) @ p["out"]

    shapes = specs(stem=(8, 16), layers=(3, 16, 16), up=(4, 24, 16), down=(4, 24, 16), out=(16, 3))
    plan = archscale.parametrize((apply, shapes), normal(4, 8), optimizer="muon")
    axes = {"layers": ((1,), (2,)), "up": ((2,), (1,)), "down": ((1,), (2,))}
    gradients = {
        name: jax.random.normal(jax.random.key(place), one.shape)
        for place, (name, one) in enumerate(shapes.items())
    }
    tx = plan.optimizer(1.0)
    updates = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(gradients)
    alone = optax.contrib.muon(1.0)
    update_of = jax.jit(lambda g: alone.update(g, alone.init(g), g)[0])
    for name, (inputs, outputs) in axes.items():
        for one in range(shapes[name].shape[0]):
            gradient = jnp.transpose(gradients[name][one], (inputs[0] - 1, outputs[0] - 1))
            expected = update_of(gradient)
            found = jnp.transpose(updates[name][one], (inputs[0] - 1, outputs[0] - 1))
            np.testing.assert_allclose(found, expected, atol=ROUNDING)


# Options of the optimizer.


def mlp(width):
    """A matrix without a width among its outputs, so that multipliers are none of 1."""

    def apply(p, x):
        h = jax.nn.relu(x @ p["stem"])
        return jax.nn.relu(jax.nn.relu(h @ p["narrow"]) @ p["wide"]) @ p["out"]

    shapes = specs(stem=(8, width), narrow=(width, 12), wide=(12, width), out=(width, 3))
    return apply, shapes


def updates_of(tx, params, count=1):
    """What `count` steps with one gradient give last."""
    gradients = jax.tree.map(
        lambda leaf: jnp.sin(jnp.arange(leaf.size) ** 2).reshape(leaf.shape), params
    )
    updates: Any = None
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(count):
        updates, state = update(gradients, state, params)
    return updates


def test_options_go_to_optax():
    """Of a base, whose multipliers are 1, the optimizer is that of optax with the same options."""
    plan = archscale.parametrize(mlp(16), normal(4, 8), optimizer="muon")
    params = plan.init(KEY)
    options: dict[str, Any] = {
        "beta": 0.8, "ns_steps": 3, "consistent_rms": 0.3, "eps": 1e-6, "nesterov": False,
    }  # fmt: skip
    numbers = muon_dimension_numbers(plan.architecture, params)
    theirs = optax.contrib.muon(
        0.1, adam_learning_rate=0.02, muon_weight_dimension_numbers=numbers, **options
    )
    ours = plan.optimizer(0.1, adam_learning_rate=0.02, **options)
    found, expected = (updates_of(tx, params, count=3) for tx in (ours, theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), found, expected
    )


def test_a_plan_is_what_its_parts_are():
    """`muon_dimension_numbers` for optax, and the multipliers for them behind it."""
    rms = 0.2
    plan = archscale.parametrize(mlp(64), normal(4, 8), base=mlp(16), optimizer="muon")
    params = plan.init(KEY)
    numbers = muon_dimension_numbers(plan.architecture, params)
    scale = archscale.scale_by_architecture(
        plan.architecture, plan.base, width_rule="muon", dimension_numbers=True, consistent_rms=rms
    )
    theirs = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers, consistent_rms=rms)
    found, expected = (
        updates_of(tx, params)
        for tx in (plan.optimizer(0.1, consistent_rms=rms), optax.chain(theirs, scale))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_adam_has_a_rate_of_its_own():
    """-η (û + λW/f)·f, η that of the leaf's optimizer, a schedule or a number; f from the plan."""
    plan = archscale.parametrize(mlp(64), normal(4, 8), base=mlp(16), optimizer="muon")
    params = plan.init(KEY)
    rates = named_leaves(plan.learning_rate)
    assert rates == pytest.approx({"stem": 1, "narrow": 0.5, "wide": 1, "out": 0.25})
    schedule = lambda count: 0.01 / (1 + count)  # noqa: E731
    bare = updates_of(plan.optimizer(1.0), params, count=2)
    for adams, second in ((0.01, 0.01), (schedule, 0.005)):
        tx = plan.optimizer(0.1, 0.5, adam_learning_rate=adams)
        found = updates_of(tx, params, count=2)
        for name, rate in {"stem": second, "narrow": 0.1, "wide": 0.1, "out": second}.items():
            expected = rate * (bare[name] - 0.5 * params[name])
            np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-7)
    same = updates_of(plan.optimizer(0.1, adam_learning_rate=0.1), params)
    jax.tree.map(np.testing.assert_array_equal, same, updates_of(plan.optimizer(0.1), params))


@pytest.mark.parametrize(
    "name", ["linen decoder, scanned", "NNX mixture of experts", "Equinox ViT", "Haiku CNN"]
)
def test_rates_of_two_optimizers_in_every_framework(name):
    """The trees of optax hold: an update is a tree like params, under both rates and a schedule."""
    tx = plan_of(name, WIDE).optimizer(
        optax.constant_schedule(0.1), 0.1, adam_learning_rate=0.01, consistent_rms=0.2
    )
    params = shapes_of(name, WIDE)
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_rates_can_be_injected():
    plan = archscale.parametrize(mlp(64), normal(4, 8), base=mlp(16), optimizer="muon")
    params = plan.init(KEY)
    options: dict[str, Any] = {
        "learning_rate": 0.1,
        "adam_learning_rate": 0.02,
        "consistent_rms": 0.2,
    }
    injected = optax.inject_hyperparams(plan.optimizer)(**options)
    found, expected = (updates_of(tx, params) for tx in (injected, plan.optimizer(**options)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING), found, expected)


def test_options_of_muon_are_of_muon():
    for optimizer, accepted in (("adamw", "b1"), ("sgd", "momentum")):
        plan = archscale.parametrize(mlp(16), normal(4, 8), optimizer=optimizer)
        for option in ("beta", "ns_steps", "consistent_rms", "adam_learning_rate"):
            given: dict[str, Any] = {option: 1}
            with pytest.raises(TypeError, match=rf"no option \['{option}'\]; it has .*{accepted}"):
                plan.optimizer(0.1, **given)
    plan = archscale.parametrize(mlp(16), normal(4, 8), optimizer="muon")
    with pytest.raises(ValueError, match="consistent_rms is -0.2; accepted are numbers above 0"):
        plan.optimizer(0.1, consistent_rms=-0.2)


# What a router is, and what it is not.

EXPERTS, SIZE = 4, 16
EXPERT_SHAPES = specs(
    stem=(8, SIZE), router=(SIZE, EXPERTS), up=(EXPERTS, SIZE, 2 * SIZE),
    down=(EXPERTS, 2 * SIZE, SIZE), out=(SIZE, 3),
)  # fmt: skip


def all_experts(p, h, gates):
    """Every expert reads every token: the outputs of `up` are read by matrices of their own."""
    inner = jax.nn.gelu(jnp.einsum("bd,edf->bef", h, p["up"]))
    return jnp.einsum("be,bed->bd", gates, jnp.einsum("bef,efd->bed", inner, p["down"]))


def scaled_outside(p, h, gates):
    inner = jax.nn.gelu(jnp.einsum("bd,edf->ebf", h, p["up"]))
    return (gates.T[:, :, None] * jnp.einsum("ebf,efd->ebd", inner, p["down"])).sum(0)


def mapped_experts(p, h, gates):
    expert = jax.vmap(lambda up, down: jax.nn.gelu(h @ up) @ down)
    return jnp.einsum("eb,ebd->bd", gates.T, expert(p["up"], p["down"]))


def one_by_one(p, h, gates):
    return sum(
        gates[:, one, None] * (jax.nn.gelu(h @ p["up"][one]) @ p["down"][one])
        for one in range(EXPERTS)
    )


def dispatched(p, h, gates):
    """Tokens are sent to places of experts by one-hots, as with a capacity."""
    chosen = jax.nn.one_hot(jnp.argsort(-gates, 0), h.shape[0])  # [places, experts, tokens]
    sent = jnp.einsum("ceb,bd->ecd", chosen, h)
    found = jnp.einsum(
        "ecf,efd->ecd", jax.nn.gelu(jnp.einsum("ecd,edf->ecf", sent, p["up"])), p["down"]
    )
    return jnp.einsum("ceb,be,ecd->bd", chosen, gates, found)


def ragged(p, h, gates):
    expert = gates.argmax(-1)
    order, counts = jnp.argsort(expert), jnp.bincount(expert, length=EXPERTS)
    inner = jax.nn.gelu(lax.ragged_dot(h[order], p["up"], counts))
    found = lax.ragged_dot(inner, p["down"], counts)[jnp.argsort(order)]
    return found * gates.max(-1, keepdims=True)


def top_2(gates):
    weights, chosen = lax.top_k(gates, 2)
    return jnp.einsum("bk,bke->be", weights, jax.nn.one_hot(chosen, EXPERTS))


@pytest.mark.parametrize(
    "mix", [all_experts, scaled_outside, mapped_experts, one_by_one, dispatched, ragged]
)
@pytest.mark.parametrize(
    "squash",
    [jax.nn.softmax, jax.nn.sigmoid, lambda z: top_2(jax.nn.softmax(z))],
    ids=["softmax", "sigmoid", "top 2"],
)
def test_routers_are_left_to_adam_and_experts_are_matrices_of_their_own(mix, squash):
    def apply(p, x):
        h = x @ p["stem"]
        return jax.nn.relu(h + mix(p, h, squash(h @ p["router"]))) @ p["out"]

    found = optimizer_labels(Model(apply, EXPERT_SHAPES, (normal(12, 8),)).trace())
    assert found["router"] == "adam: router: scales groups of features"
    assert found["up"] == found["down"] == "muon over axes (1)->(2)"


def test_routers_of_a_scan_that_returns_their_outputs():
    """As for a loss that balances the experts."""

    def apply(p, x):
        def block(h, layer):
            scores = h @ layer["router"]
            return h + all_experts(layer, h, jax.nn.softmax(scores)), scores

        layers = {name: p[name] for name in ("router", "up", "down")}
        h, scores = lax.scan(block, x @ p["stem"], layers)
        return h @ p["out"], scores

    stacked = {
        name: (2, *one.shape) for name, one in EXPERT_SHAPES.items() if name not in ("stem", "out")
    }
    shapes = EXPERT_SHAPES | specs(**stacked)
    found = optimizer_labels(Model(apply, shapes, (normal(12, 8),)).trace())
    assert found["router"] == "adam: router: scales groups of features"
    assert found["up"] == found["down"] == "muon over axes (2)->(3)"


def labels_of(inner, **leaves):
    """Whose the leaves of a function of 16 features are, between a stem and a readout."""

    def apply(p, x):
        return inner(p, x @ p["stem"]) @ p["out"]

    shapes = specs(stem=(8, SIZE), out=(SIZE, 3), **leaves)
    return optimizer_labels(Model(apply, shapes, (normal(2, 6, 8),)).trace())


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1)


def test_gates_of_heads_are_left_to_adam():
    def inner(p, h):
        gates = jax.nn.sigmoid(h @ p["gate"])
        return h + (heads(h @ p["value"], 4) * gates[..., None]).reshape(h.shape) @ p["mix"]

    found = labels_of(inner, gate=(SIZE, 4), value=(SIZE, SIZE), mix=(SIZE, SIZE))
    assert found["gate"] == "adam: router: scales groups of features"
    assert found["value"] == found["mix"] == "muon over axes (0)->(1)"


def gated_unit(p, h):
    return h + (jax.nn.silu(h @ p["a"]) * (h @ p["b"])) @ p["c"]


def shared_keys(p, h):
    """Queries of four heads, keys and values that they share."""
    query, key, value = heads(h @ p["a"], 4), h @ p["b"], h @ p["c"]
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", query, key))
    return h + jnp.einsum("bhqk,bkd->bqhd", scores, value).reshape(h.shape)


def excitation(p, h):
    """Squeeze and excitation: every feature has a gate of its own."""
    gates = jax.nn.sigmoid(jax.nn.relu(h.mean(1) @ p["a"]) @ p["b"])
    return h + (h @ p["c"]) * gates[:, None]


def fused_gates(p, h):
    """One matrix writes features, and gates of groups of them, as in state-space models."""
    features, gates = jnp.split(h @ p["a"], [SIZE], -1)
    scaled = heads(features, 4) * jax.nn.softplus(gates)[..., None]
    return h + scaled.reshape(h.shape) @ p["b"] @ p["c"]


@pytest.mark.parametrize(
    ("inner", "shapes"),
    [
        (gated_unit, {"a": (SIZE, 40), "b": (SIZE, 40), "c": (40, SIZE)}),
        (shared_keys, {"a": (SIZE, SIZE), "b": (SIZE, 4), "c": (SIZE, 4)}),
        (excitation, {"a": (SIZE, 4), "b": (4, SIZE), "c": (SIZE, SIZE)}),
        (fused_gates, {"a": (SIZE, SIZE + 4), "b": (SIZE, SIZE), "c": (SIZE, SIZE)}),
    ],
)
def test_what_multiplies_features_one_by_one_is_no_router(inner, shapes):
    found = labels_of(inner, **shapes)
    assert {found[name] for name in "abc"} == {"muon over axes (0)->(1)"}


# What else is no matrix.


def test_reasons():
    def inner(p, h):
        h = h + jax.nn.relu(h @ p["tied"]) @ p["tied"].T
        h = h + jax.nn.sigmoid(h @ p["gate"]) * h
        h = h + jax.nn.relu(h @ p["vector"]) @ jnp.ones((1, SIZE))
        h = h + jax.nn.relu(h @ p["mean"].mean(0))
        return h + jax.nn.relu(h @ p["both"]) + p["both"][0]

    found = labels_of(
        inner, tied=(SIZE, 40), gate=(SIZE, 1), vector=(SIZE, 1), mean=(3, SIZE, SIZE),
        both=(SIZE, SIZE),
    )  # fmt: skip
    assert found["tied"] == "adam: tied: applied over axes (0)->(1) and axes (1)->(0)"
    assert found["gate"] == "adam: router: scales groups of features"
    assert found["vector"] == "adam: vector: 16 to 1 features"
    assert found["mean"] == "adam: axis 0 is not an axis of inputs, outputs or matrices alone"
    assert found["both"] == "adam: hidden, used as bias"


def test_a_leaf_whose_use_was_not_read_is_left_to_adam():
    one = archscale.Parameter("w", Role.HIDDEN, Role.HIDDEN, (16, 16), 16, 16, edge=0)
    assert matrix_of(one) == "no use of it is known"


def test_factors_of_a_kernel_are_matrices():
    """x @ (A @ B), of rank 4, as of an adapter."""
    found = labels_of(lambda p, h: h + h @ (p["a"] @ p["b"]), a=(SIZE, 4), b=(4, SIZE))
    assert found["a"] == found["b"] == "muon over axes (0)->(1)"
