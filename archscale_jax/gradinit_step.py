"""One iteration of GradInit, equation by equation (theory §7)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archscale_jax.architecture import PyTree

Loss = Callable[[PyTree, Any], Float[Array, ""]]
Update = Literal["sgd", "plain_sgd", "adam"]


class State(NamedTuple):
    """Multipliers of G groups, and Adam's moments for them; index 0 the objective's, 1 the norm's.

    Loss and norm take turns, and their gradients differ by orders of magnitude: each has a first
    moment and a bias correction of its own, both share the second moment.
    """

    multipliers: Float[Array, " g"]
    first_moments: Float[Array, "2 g"]
    second_moment: Float[Array, " g"]
    steps: Int[Array, "2"]


def initial_state(count: int) -> State:
    """All multipliers 1."""
    return State(jnp.ones(count), jnp.zeros((2, count)), jnp.zeros(count), jnp.zeros(2, int))


def step(
    state: State,
    initial: PyTree,
    batches: tuple[Any, Any, Any],
    settings: Mapping[str, Any],
    **variant: Any,
) -> tuple[State, dict[str, Any]]:
    """One iteration: the derivative by the multipliers, and one step of Adam along it.

    Returns:
      The new state, and one entry of `GradInitRecord` by the names of its fields.
    """
    found, record = hypergradient(state.multipliers, initial, batches, settings, **variant)
    new = _adam(state, found, record["constrained"] & (not variant["penalised"]), settings)
    return new, record | {"multipliers": new.multipliers}


def hypergradient(
    multipliers: Float[Array, " g"],
    initial: PyTree,
    batches: tuple[Any, Any, Any],
    settings: Mapping[str, Any],
    *,
    loss_fn: Loss,
    indices: tuple[int | None, ...],
    optimizer: Update,
    second_order: bool,
    penalised: bool,
) -> tuple[Float[Array, " g"], dict[str, Any]]:
    """The derivative by the multipliers of what an iteration lowers: norm or objective.

    Args:
      multipliers: m.
      initial: the params W⁰.
      batches: a, b, c.
      settings: `rate` η, `limit` γ and `penalty` λ.
      loss_fn: see `gradinit`.
      indices: the multiplier of every leaf of the params, None where it is frozen.
      optimizer: see `gradinit`.
      second_order: see `gradinit`.
      penalised: whether to add the penalty, instead of one of both.

    Returns:
      ∂f/∂m_i = ⟨∂f/∂θ_i, W_i⁰⟩, and what happened.
    """
    leaves, structure = jax.tree.flatten(initial)
    weights = [leaf for leaf, index in zip(leaves, indices, strict=True) if index is not None]
    index = jnp.array([index for index in indices if index is not None])
    theta = [product(m, leaf) for m, leaf in zip(multipliers[index], weights, strict=True)]

    def loss(theta: list[Array], batch: Any) -> Array:
        trained = iter(theta)
        full = [
            leaf if index is None else next(trained)
            for leaf, index in zip(leaves, indices, strict=True)
        ]
        return loss_fn(jax.tree.unflatten(structure, full), batch)

    def gradient_and_loss(theta: list[Array]) -> tuple[list[Array], Array]:
        value, gradient = jax.value_and_grad(loss)(theta, _joined(batches[0], batches[1]))
        return gradient, value

    # Its Jacobian is the Hessian: symmetric, so that pulling v back gives Hv, in reverse mode only.
    gradient, pull, value = jax.vjp(gradient_and_loss, theta, has_aux=True)
    norm = _norm(gradient, 1 if optimizer == "adam" else 2)
    # What the norm's derivative by g is, too.
    steepest = _direction(gradient, "adam" if optimizer == "adam" else "sgd")

    def norm_gradient() -> tuple[list[Array], Array]:
        return pull(steepest)[0], jnp.full_like(value, jnp.nan)

    def objective_gradient() -> tuple[list[Array], Array]:
        direction, pull_direction = jax.vjp(lambda g: _direction(g, optimizer), gradient)
        rate = settings["rate"]
        moved = [_moved(t, d, rate) for t, d in zip(theta, direction, strict=True)]
        updated, slope = jax.value_and_grad(loss)(moved, _joined(batches[0], batches[2]))
        found = [one / rate for one in slope]
        if second_order:
            (curved,) = pull(pull_direction(slope)[0])
            found = [f - c for f, c in zip(found, curved, strict=True)]
        return found, updated

    exceeds = norm > settings["limit"]
    if penalised:
        found, updated = objective_gradient()
        weight = settings["penalty"] * exceeds
        (barrier,) = pull([(weight * one).astype(one.dtype) for one in steepest])
        found = [f + b for f, b in zip(found, barrier, strict=True)]
    else:
        found, updated = jax.lax.cond(exceeds, norm_gradient, objective_gradient)
    inner = [jnp.sum(_exact(f) * _exact(w)) for f, w in zip(found, weights, strict=True)]
    derivative = jax.ops.segment_sum(jnp.stack(inner), index, len(multipliers))
    return derivative, {
        "gradient_norm": norm,
        "tensor_gradient_norms": jnp.stack([_norm([one], 2) for one in gradient]),
        "constrained": exceeds,
        "loss": value,
        "updated_loss": updated,
    }


jitted_step = jax.jit(
    step, static_argnames=("loss_fn", "indices", "optimizer", "second_order", "penalised")
)


def _adam(
    state: State,
    derivative: Float[Array, " g"],
    of_norm: Bool[Array, ""],
    settings: Mapping[str, Any],
    betas: tuple[float, float] = (0.9, 0.999),
) -> State:
    branch = jnp.int32(of_norm)
    derivative = jnp.clip(derivative, -settings["clip"], settings["clip"])
    first = betas[0] * state.first_moments[branch] + (1 - betas[0]) * derivative
    second = betas[1] * state.second_moment + (1 - betas[1]) * derivative**2
    steps = state.steps.at[branch].add(1)
    unbiased = first / (1 - betas[0] ** steps[branch])
    size = jnp.sqrt(second / (1 - betas[1] ** jnp.sum(steps)))
    moved = state.multipliers - settings["scale_rate"] * unbiased / (size + 1e-8)
    # A multiplier of tensors that are 0 has no derivative and so stays 1.
    bounded = jnp.clip(moved, *settings["bounds"])
    return State(bounded, state.first_moments.at[branch].set(first), second, steps)


def _direction(gradient: list[Array], optimizer: str) -> list[Array]:
    """A(g), and of the norm's derivative by g: g/‖g‖₂ or sign g."""
    if optimizer == "adam":
        return [jnp.sign(one) for one in gradient]
    if optimizer == "plain_sgd":
        return gradient
    norm = _norm(gradient, 2)
    safe = jnp.where(norm > 0, norm, 1)
    return [(one / safe).astype(one.dtype) for one in gradient]


def _norm(tensors: list[Array], order: int) -> Float[Array, ""]:
    exact = [_exact(one) for one in tensors]
    if order == 1:
        return sum(jnp.sum(jnp.abs(one)) for one in exact)
    total = sum(jnp.sum(jnp.square(one)) for one in exact)
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)


def _exact(tensor: Array) -> Array:
    return tensor.astype(jnp.promote_types(tensor.dtype, jnp.float32))


def product(multiplier: Array | float, leaf: Array) -> Array:
    """Returns m W in the dtype of W; the product is taken in float32 at least."""
    return (multiplier * _exact(leaf)).astype(leaf.dtype)


def _moved(theta: Array, direction: Array, rate: Array) -> Array:
    moved = _exact(theta) - rate * _exact(direction)
    return moved.astype(theta.dtype)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)
