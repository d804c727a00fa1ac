"""NIO against finite differences, a plain re-derivation, and what it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from archscale_jax.contrib import nio
from archscale_jax.contrib._gradinit_step import Variant, agreement
from tests.test_gradinit import joined, mlp_loss, mlp_params, random_batches

pytestmark = pytest.mark.quick_compilation


def measured(multipliers, params, batches):
    """Mean norm and cosine of the gradients on [a, b] and [a, c], written out."""
    a, b, c = batches
    leaves, tree = jax.tree.flatten(params)
    theta = jax.tree.unflatten(tree, [m * leaf for m, leaf in zip(multipliers, leaves)])  # noqa: B905
    one, other = (ravel_pytree(jax.grad(mlp_loss)(theta, joined(a, half)))[0] for half in (b, c))
    norms = jnp.linalg.norm(one), jnp.linalg.norm(other)
    return sum(norms) / 2, one @ other / (norms[0] * norms[1])


@pytest.mark.parametrize("limit", [1e9, 1e-9])
def test_derivatives_are_those_of_small_steps(limit):
    """Of the cosine where the norm is small enough, else of the norm; in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mlp_params())
        first, second, third = random_batches(3)
        batches = first, second, third
        variant = Variant(mlp_loss, tuple(range(6)))
        at = np.linspace(0.7, 1.5, 6)
        step = jax.jit(functools.partial(agreement, variant=variant))
        found, record = step(jnp.asarray(at), params, batches, limit)
        steps = 1e-5 * np.eye(6)
        points = np.concatenate([at[None], at + steps, at - steps])
        every = jax.jit(jax.vmap(functools.partial(measured, params=params, batches=batches)))
        norms, cosines = map(np.asarray, every(points))
        norm, cosine = norms[0], cosines[0]
        assert float(record["gradient_norm"]) == pytest.approx(norm)
        assert float(record["cosine"]) == pytest.approx(cosine)
        assert bool(record["constrained"]) == (limit < norm)
        lowered = norms if limit < norm else -cosines
        expected = (lowered[1:7] - lowered[7:]) / 2e-5
        assert np.asarray(found) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_batches_that_are_alike_agree_and_give_nothing_to_learn():
    batch = next(random_batches(1))
    learned, record = nio(mlp_loss, mlp_params(), [batch] * 6, num_steps=2, max_gradient_norm=1e9)
    assert record.cosine == pytest.approx(1.0, abs=1e-6)
    assert not record.constrained.any()
    assert all(abs(values[-1] - 1) <= 0.11 for values in record.multipliers.values())
    assert jax.tree.structure(learned) == jax.tree.structure(mlp_params())


def test_it_lowers_the_norm_below_the_limit_then_raises_the_cosine():
    params = mlp_params(sizes=(3, 8, 8, 8, 8, 2), scale=3.0)
    batches = functools.partial(random_batches, 3 * 150, 16)
    _, record = nio(mlp_loss, params, batches(), max_gradient_norm=1.0, num_steps=150)
    assert record.gradient_norm[0] > 2 and record.constrained[0]
    assert np.mean(record.gradient_norm[-20:]) < 1.3
    free = ~record.constrained
    assert free[-50:].any(), "the norm is lowered only where it exceeds the limit"
    assert np.mean(record.cosine[-20:]) > np.mean(record.cosine[:5])


def test_groups_share_freeze_and_zeros_stay():
    params = mlp_params() | {"layer_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    groups = {"layer_1/kernel": "both", "layer_2/kernel": "both", "layer_2/bias": None}
    learned, record = nio(mlp_loss, params, random_batches(30), num_steps=10, groups=groups)
    assert "layer_2/bias" not in record.multipliers
    assert record.multipliers["layer_1/kernel"].tolist() == (
        record.multipliers["layer_2/kernel"].tolist()
    )
    assert learned["layer_0"]["bias"].tolist() == [0] * 4
    assert record.multipliers["layer_0/bias"].tolist() == [1] * 10
    assert record.multipliers["layer_1/bias"][-1] != 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_gradient_norm": 0}, ValueError, "max_gradient_norm must be positive"),
        ({"scale_learning_rate": -1}, ValueError, "scale_learning_rate must be positive"),
        ({"bounds": (2, 3)}, ValueError, "bounds must hold 1"),
        ({"num_steps": 9}, ValueError, "batches ended in iteration 1 of 9"),
        ({"groups": {"layer_9": "x"}}, ValueError, "unknown parameter in groups 'layer_9'"),
    ],
)
def test_wrong_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        nio(mlp_loss, mlp_params(), random_batches(3), **options)


def test_a_loss_that_is_not_finite_is_named():
    bad = lambda params, batch: mlp_loss(params, batch) * jnp.nan  # noqa: E731
    with pytest.raises(ValueError, match="loss of the initial params is nan"):
        nio(bad, mlp_params(), random_batches(3), num_steps=1)
