"""Measured maximal update: the change of every vertex in one optimizer step (theory §6).

The paper asks that one step change every pre-activation by Θ(1) [AAS Eq. 7] and bounds that change.
Here it is measured: with u the update that the optimizer would apply on a batch, one derivative of
all vertex features along u gives the change Δ_v of every vertex v at once, to first order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree
from archscale_jax.tracing.layers import Loss


class UpdateSize(NamedTuple):
    """Size of one update as V vertices see it, means over batch and features.

    Attributes:
      absolute: S_v = mean(Δ_v²).
      relative: R_v = S_v / mean(z_v²).
      standardized: S_v / mean((z_v − mean over examples)²), the change in units of what tells
        examples apart; the part of z_v that all examples share carries no information.
    """

    absolute: Float[Array, " v"]
    relative: Float[Array, " v"]
    standardized: Float[Array, " v"]


def measure_update(
    features: Callable[[PyTree, Any], PyTree],
    loss: Loss,
    params: PyTree,
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    updates: int = 1,
) -> UpdateSize:
    """Measures how one step at learning rate 1 changes every vertex (theory §6).

    Costs about three training steps. Pure: `jax.jit` it with `features`, `loss` and `optimizer`
    bound, `jax.vmap` it over parameters drawn from several seeds. Needs reverse
    mode only, so that `features` may call functions with a `jax.custom_vjp`.

    Args:
      features: `(params, batch)` to a tree of the features z_v of the vertices on end-to-end paths,
        without the readout, [examples, ...] each; of a traced model its `vertex_features`.
      loss: `(params, batch)` to the scalar loss whose gradient is taken.
      params: where the step starts.
      batch: what both functions read.
      optimizer: at learning rate 1, e.g. `optax.sgd(1.0)`; its first update is taken.
      updates: how many updates the optimizer may take on the same params and gradient until one is
        not 0; that one is measured. For optimizers whose first update is 0: `optax.MultiSteps` of k
        steps takes k, a schedule that warms up from 0 takes 2 (its rate there multiplies the
        change, so measure the base with the same schedule, or give a constant rate of 1).

    Returns:
      Squared sizes, [V] each. A vertex whose features are all 0 has a relative size of inf, or NaN
      where it does not change either; one whose features are the same for all examples, as in a
      batch of one, has such a standardized size. All sizes are 0 where all updates are.

    Raises:
      TypeError: an optimizer that is not an optax transformation, or a loss that is not floating.
      ValueError: `updates` below 1.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, found {updates}")
    if not hasattr(optimizer, "update"):
        raise TypeError(
            f"optimizer must be an optax transformation, as optax.sgd(1.0), found {optimizer!r}"
        )
    gradients = jax.grad(loss)(params, batch)
    update = _first_update(optimizer, gradients, params, updates)
    values, pull = jax.vjp(lambda params: jax.tree.leaves(features(params, batch)), params)
    # The pull-back is linear, so that its own pull-back pushes forward, wherever it is taken.
    # `jax.jvp` would do, but for functions with a `jax.custom_vjp`, which have no forward mode.
    _, push = jax.vjp(lambda cotangents: pull(cotangents)[0], values)
    (changes,) = push(update)
    changes, values = ([exact(one) for one in both] for both in (changes, values))
    absolute, size, variance = (
        jnp.stack([jnp.mean(jnp.square(one)) for one in both])
        for both in (changes, values, [value - jnp.mean(value, axis=0) for value in values])
    )
    return UpdateSize(absolute, absolute / size, absolute / variance)


def _first_update(
    optimizer: optax.GradientTransformation, gradients: PyTree, params: PyTree, limit: int
) -> PyTree:
    """The first update that is not 0 of `limit` on one gradient; the last one if all are."""
    first = optimizer.update(gradients, optimizer.init(params), params)
    if limit == 1:
        return first[0]

    def is_zero(carry: tuple[Array, PyTree, PyTree]) -> Array:
        zero = [jnp.all(leaf == 0) for leaf in jax.tree.leaves(carry[1])]
        return (carry[0] < limit) & jnp.all(jnp.stack(zero))

    def next_update(carry: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree, PyTree]:
        return carry[0] + 1, *optimizer.update(gradients, carry[2], params)

    return jax.lax.while_loop(is_zero, next_update, (jnp.int32(1), *first))[1]
