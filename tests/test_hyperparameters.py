"""Decay, epsilon, batch and duration, zero starts: what stands around the learning rate."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from tests import gpts

pytestmark = pytest.mark.quick_compilation

CASE = {
    "width": 32, "base_width": 16, "depth": 4, "base_depth": 1, "heads": 2, "vocab": 64,
    "length": 16, "batch": 8, "tied": False,
}  # fmt: skip
SMALL = gpts.base_of(CASE)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (8, 17)))
KEY = jax.random.key(0)


def gpt(framework="linen", case=CASE, **variant):
    return gpts.build(framework, case, dtype="float32", **variant)


def planned(case=CASE, base=True, optimizer="adamw", framework="linen", variant=None, **options):
    model, inputs = gpt(framework, case, **(variant or {}))
    small = gpt(framework, gpts.base_of(case), **(variant or {}))[0] if base else None
    return archscale.parametrize(model, *inputs, base=small, optimizer=optimizer, **options)


@functools.cache
def plan_of_adamw():
    return planned()


def zeros_of(plan):
    shapes = jax.eval_shape(plan.init, KEY)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def normal_like(tree, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(leaf.dtype), tree)


# Epsilon: as gradients scale.


def gradient_sizes(plan):
    """RMS of the gradient of every leaf at initialization, over four draws."""

    def sizes(seed):
        loss = lambda params: gpts.loss(plan.apply(params, TOKENS[:, :-1]), TOKENS)  # noqa: E731
        gradients = named_leaves(jax.grad(loss)(plan.init(jax.random.key(seed))))
        return {name: jnp.mean(leaf**2) for name, leaf in gradients.items()}

    found = jax.jit(jax.vmap(sizes))(jnp.arange(4))
    return {name: math.sqrt(np.mean(squares)) for name, squares in found.items()}


def test_epsilon_scales_as_gradients_do():
    """Rule `gradient` is what is measured at width × 2, depth × 4: a leaf within 2, the median 1.2.

    Gains are left out: at 1 their gradients are sums that cancel. The published rule is off by m
    outside of branches.
    """
    plan = planned(epsilon_rule="gradient")
    measured = gradient_sizes(plan)
    of_base = gradient_sizes(planned(SMALL, base=False))
    epsilon, published = (named_leaves(one.epsilon) for one in (plan, plan_of_adamw()))
    ratios = {
        name: measured[name] / of_base[name] / epsilon[name]
        for name in of_base
        if "/norm" not in name
    }
    assert set(epsilon.values()) == {1 / 8, 1 / 2, 1.0}
    assert all(1 / 2 < one < 2 for one in ratios.values()), ratios
    assert np.median(list(ratios.values())) == pytest.approx(1, rel=0.2)
    assert published["params/tokens/embedding"] == epsilon["params/tokens/embedding"] / 4


def test_epsilon_is_compared_with_the_gradient():
    """û = g / (|g| + ε·ε_p) of a first update, for gradients of the size of epsilon."""
    plan = plan_of_adamw()
    optimizer = plan.optimizer(1.0, eps=1e-4)

    @jax.jit
    def first_update(params):
        gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), params)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    updates = first_update(zeros_of(plan))
    rates, epsilon = named_leaves(plan.learning_rate), named_leaves(plan.epsilon)
    for name, update in named_leaves(updates).items():
        expected = -rates[name] / (1 + epsilon[name])
        np.testing.assert_allclose(update, expected, rtol=1e-4)


# Decay.


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 1.0), (0.5, 0.5)])
def test_decay_per_update_is_that_of_the_base_but_for_depth(alpha, kept):
    """η·λ = m^(α-1) in branches, m = 4; 1 outside; gains and biases do not decay [CompleteP]."""
    plan = planned(depth_exponent=alpha)
    rates, decay = named_leaves(plan.learning_rate), named_leaves(plan.weight_decay)
    for one in plan.architecture.parameters:
        product = rates[one.name] * decay[one.name]
        weight = one.role not in ("bias", "scale")
        assert product == pytest.approx((kept if "blocks" in one.name else 1) * weight)


# Batch and duration.


def test_the_rule_of_batches_is_adam_with_other_values():
    """κ = 4: an Adam of 2η, 2λ, ε/2, 1 - 4(1 - β)."""
    plan = planned(SMALL, base=False, batch_ratio=8, token_ratio=2)
    params = zeros_of(plan)
    other = optax.chain(
        optax.scale_by_adam(1 - 4 * 0.1, 1 - 4 * 0.001, 5e-4), optax.scale_by_learning_rate(0.02)
    )
    ours = plan.optimizer(0.01, b1=0.9, b2=0.999, eps=1e-3)
    states = [jax.jit(one.init)(params) for one in (ours, other)]
    steps = [jax.jit(one.update) for one in (ours, other)]
    for seed in range(3):
        gradients = jax.tree.map(lambda leaf: np.float32(1e-3) * leaf, normal_like(params, seed))
        found = []
        for number, update in enumerate(steps):
            updates, states[number] = update(gradients, states[number], params)
            found.append(jax.tree.leaves(updates))
        for mine, theirs in zip(*found, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=1e-9)
    assert set(named_leaves(plan.weight_decay).values()) == {0.0, 2.0}
    assert "κ = 4" in str(plan)


ERRORS = {
    "sgd and a batch": (
        {"optimizer": "sgd", "batch_ratio": 4},
        ValueError,
        "one of Adam, none is known for 'sgd'",
    ),
    "a batch of nothing": ({"batch_ratio": 0}, ValueError, "batch_ratio must be positive"),
    "adafactor": (
        {"optimizer": "adafactor"},
        ValueError,
        "no rule for it is known here: it multiplies updates by the size of the weight",
    ),
    "a form": ({"form": "folds"}, ValueError, "did you mean 'folded'"),
    "a scale": ({"attention_scale": "1/sqrt(d)"}, ValueError, "attention_scale"),
    "an epsilon rule": ({"epsilon_rule": "none"}, ValueError, "epsilon_rule"),
    "zeros as a string": ({"zero_init": "readout"}, TypeError, r"\('readout',\)"),
    "other zeros": ({"zero_init": ("reedout",)}, ValueError, "did you mean 'readout'"),
    "fused queries": ({"zero_init": ("queries",)}, ValueError, "none in a leaf of its own"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_options(name):
    options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        planned(SMALL, **options)


def test_averages_shorter_than_a_step():
    plan = planned(SMALL, base=False, batch_ratio=16)
    with pytest.raises(ValueError, match=r"decay rate 0.9 over κ = 16.*shorter than a step"):
        plan.optimizer(1e-3)
    plan.optimizer(1e-3, b1=0.99, b2=0.9999)


# Lion.


def test_lion_is_that_of_optax_on_a_base():
    plan = planned(SMALL, base=False, optimizer="lion")
    params = zeros_of(plan)
    gradients = normal_like(params, 0)
    ours, theirs = plan.optimizer(1e-3, b1=0.8), optax.lion(1e-3, b1=0.8, weight_decay=0.0)
    first = lambda one, *given: one.update(given[0], one.init(given[1]), given[1])[0]  # noqa: E731
    found = [jax.jit(functools.partial(first, one))(gradients, params) for one in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    rates = [
        named_leaves(one.learning_rate) for one in (planned(optimizer="lion"), plan_of_adamw())
    ]
    assert rates[0] == rates[1]
    with pytest.raises(TypeError, match=r"'lion' has no option \['eps'\]; it has b1, b2"):
        plan.optimizer(1e-3, eps=1e-8)


# Zero starts.


def drawn_and_read(plan):
    """Params, as numbers, and logits."""

    @jax.jit
    def both(key):
        params = plan.init(key)
        return params, plan.apply(params, TOKENS[:, :-1])

    return jax.device_get(both(KEY))


@pytest.mark.parametrize("framework", ["linen", "nnx", "function"])
def test_zero_starts(framework):
    """The stream is that of the embeddings, and logits are 0; everything else is drawn."""
    kinds = ("branch_ends", "queries", "readout")
    variant = {"fused": False}
    plan = planned(SMALL, base=False, framework=framework, variant=variant, zero_init=kinds)
    params, logits = drawn_and_read(plan)
    zero = [name for name, leaf in named_leaves(params).items() if leaf.ndim > 1 and not leaf.any()]
    wanted = r"(out|down|query|readout)/(kernel|weight|w)$"
    stacked = r"/bias$"  # biases of stacked layers have two axes, and start at 0
    for name, leaf in named_leaves(params).items():
        if leaf.ndim > 1 and not re.search(stacked, name):
            assert (name in zero) == bool(re.search(wanted, name)), name
    assert not np.any(logits)
    note = next(one for one in plan.report().notes if "these weights are 0" in one)
    assert "readout" in note


# The report.


def test_the_report_of_base_values():
    plan = plan_of_adamw()
    report = plan.report(learning_rate=1e-3, weight_decay=0.1, eps=1e-8)
    rates, decay, epsilon = (
        named_leaves(one) for one in (plan.learning_rate, plan.weight_decay, plan.epsilon)
    )
    for record in report.records:
        name = record["path"]
        assert record["learning_rate"] == pytest.approx(1e-3 * rates[name])
        assert record["weight_decay"] == pytest.approx(0.1 * decay[name])
        assert record["epsilon"] == pytest.approx(1e-8 * epsilon[name])
        share = record["learning_rate"] * record["weight_decay"]
        assert record["timescale"] == (pytest.approx(1 / share) if share else math.inf)
    for text in (str(report), report._repr_html_()):
        assert "1/(η·λ)" in text
        assert "lr ×" not in text
    assert "1e+04" in str(report)  # 1 / (1e-3 · 0.1) updates
    assert "lr ×" in str(plan)
    assert "ε ×" in str(plan)
    json.dumps(
        [
            {**one, "initialization_parts": 0, "learning_rate_parts": 0}
            for one in plan.report().records
        ]
    )


def test_averages_may_be_injected():
    plan = planned(SMALL, base=False, batch_ratio=2)
    params = zeros_of(plan)
    optimizer = optax.inject_hyperparams(plan.optimizer)(0.1, 0.1, b1=0.9)
    jax.eval_shape(jax.jit(optimizer.update), params, optimizer.init(params), params)
