"""One iteration of GradInit, equation by equation, and of NIO (theory §7, §15).

An iteration either lowers the gradient's norm or lowers the objective. As one program the choice is
`jax.lax.cond`. On a CPU it is made in Python between two programs: XLA runs convolutions in a
branch as naive loops there (https://github.com/jax-ml/jax/issues/12868), and an iteration takes up
to five times as long (docs/results/gradinit.md).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree
from archscale_jax.tracing.layers import Loss

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


class Variant(NamedTuple):
    """What is compiled in.

    Attributes:
      loss_fn: see `gradinit`.
      indices: the multiplier of every leaf of the params, None where it is frozen.
      optimizer: see `gradinit`.
      second_order: see `gradinit`.
      penalised: whether to add the penalty to the objective, instead of either norm or objective.
    """

    loss_fn: Loss
    indices: tuple[int | None, ...]
    optimizer: Update = "sgd"
    second_order: bool = False
    penalised: bool = False


Batches = tuple[Any, Any, Any]
Settings = Mapping[str, Any]
"""`rate` η, `limit` γ, `penalty` λ, `scale_rate`, `clip` and `bounds`."""


def initial_state(count: int) -> State:
    """All multipliers 1."""
    return State(jnp.ones(count), jnp.zeros((2, count)), jnp.zeros(count), jnp.zeros(2, int))


def step(
    state: State,
    initial: PyTree,
    batches: Batches,
    settings: Settings,
    *,
    variant: Variant,
    branch: Callable[..., Any] = jax.lax.cond,
) -> tuple[State, dict[str, Any]]:
    """One iteration, from the params W⁰ and the batches a, b, c.

    Returns:
      The new state, and one entry of `GradInitRecord` by the names of its fields.
    """
    gradient, record = measure(state.multipliers, initial, batches, variant=variant)
    exceeds = record["gradient_norm"] > settings["limit"]
    operands = (state, gradient, initial, batches, settings)
    if variant.penalised:
        barrier = settings["penalty"] * exceeds
        state, updated = lower_objective(*operands, barrier, variant=variant)
    else:
        norm, objective = (
            functools.partial(lower, variant=variant) for lower in (lower_norm, lower_objective)
        )
        state, updated = branch(exceeds, norm, objective, *operands)
    record |= {"multipliers": state.multipliers, "constrained": exceeds, "updated_loss": updated}
    return state, record


jitted_step = jax.jit(step, static_argnames=("variant", "branch"))


def branch_in_python(condition: Array, if_true: Callable, if_false: Callable, *operands: Any):
    """`jax.lax.cond`, decided here."""
    return if_true(*operands) if condition else if_false(*operands)


@functools.partial(jax.jit, static_argnames="variant")
def measure(
    multipliers: Float[Array, " g"], initial: PyTree, batches: Batches, *, variant: Variant
) -> tuple[list[Array], dict[str, Any]]:
    """The gradient g = ∇L(S; θ) on S = [a, b], and what the record tells of it."""
    theta, loss = _network(multipliers, initial, variant)
    value, gradient = jax.value_and_grad(loss)(theta, _joined(batches[0], batches[1]))
    return gradient, {
        "gradient_norm": _norm(gradient, 1 if variant.optimizer == "adam" else 2),
        "tensor_gradient_norms": jnp.stack([_norm([one], 2) for one in gradient]),
        "loss": value,
    }


@functools.partial(jax.jit, static_argnames="variant")
def lower_norm(
    state: State,
    gradient: list[Array],
    initial: PyTree,
    batches: Batches,
    settings: Settings,
    *,
    variant: Variant,
) -> tuple[State, Float[Array, ""]]:
    """A step along ∂‖g‖_p/∂θ = H ∂‖g‖_p/∂g; the loss after an update is NaN, none was made."""
    theta, loss = _network(state.multipliers, initial, variant)
    slope = _hessian_product(
        lambda theta: loss(theta, _joined(batches[0], batches[1])),
        theta,
        _steepest(gradient, variant.optimizer),
    )
    derivative = by_multipliers(slope, initial, variant, len(state.multipliers))
    return adam(state, derivative, True, settings), jnp.full_like(state.multipliers[0], jnp.nan)


@functools.partial(jax.jit, static_argnames="variant")
def lower_objective(
    state: State,
    gradient: list[Array],
    initial: PyTree,
    batches: Batches,
    settings: Settings,
    barrier: Float[Array, ""] | None = None,
    *,
    variant: Variant,
) -> tuple[State, Float[Array, ""]]:
    """A step along ∂/∂θ of L(S̃; θ - η A(g))/η on S̃ = [a, c], and that loss.

    `barrier` is the weight of the norm's derivative that is added: λ where the norm exceeds γ.
    """
    theta, loss = _network(state.multipliers, initial, variant)
    direction, pull = jax.vjp(lambda g: _direction(g, variant.optimizer), gradient)
    rate = settings["rate"]
    moved = [
        (exact(t) - rate * exact(d)).astype(t.dtype) for t, d in zip(theta, direction, strict=True)
    ]
    updated, slope = jax.value_and_grad(loss)(moved, _joined(batches[0], batches[2]))
    found = [exact(one) / rate for one in slope]  # 1/η may take it out of the range of float16
    if variant.second_order or barrier is not None:
        # Both further terms are products with the Hessian, so that one product serves them.
        vector = [jnp.zeros_like(one) for one in theta]
        if variant.second_order:
            vector = [v - p for v, p in zip(vector, pull(slope)[0], strict=True)]
        if barrier is not None:
            steepest = _steepest(gradient, variant.optimizer)
            vector = [
                (v + barrier * one).astype(v.dtype) for v, one in zip(vector, steepest, strict=True)
            ]
        curved = _hessian_product(
            lambda theta: loss(theta, _joined(batches[0], batches[1])), theta, vector
        )
        found = [f + exact(c) for f, c in zip(found, curved, strict=True)]
    derivative = by_multipliers(found, initial, variant, len(state.multipliers))
    return adam(state, derivative, False, settings), updated.astype(state.multipliers.dtype)


# NIO: no update is made; gradients of two overlapping batches shall agree (theory §15).


@functools.partial(jax.jit, static_argnames="variant")
def agreement_step(
    state: State, initial: PyTree, batches: Batches, settings: Settings, *, variant: Variant
) -> tuple[State, dict[str, Any]]:
    """One iteration of NIO, from the params W⁰ and the batches a, b, c.

    Returns:
      The new state, and one entry of `NioRecord` by the names of its fields.
    """
    derivative, record = agreement(
        state.multipliers, initial, batches, settings["limit"], variant=variant
    )
    state = adam(state, derivative, record["constrained"], settings)
    return state, record | {"multipliers": state.multipliers}


def agreement(
    multipliers: Float[Array, " g"],
    initial: PyTree,
    batches: Batches,
    limit: float | Array,
    *,
    variant: Variant,
) -> tuple[Float[Array, " g"], dict[str, Any]]:
    """The derivative of what is lowered, and what the record tells.

    That is the mean norm of the gradients on [a, b] and [a, c] where it exceeds γ, else minus
    their cosine.
    """
    theta, loss = _network(multipliers, initial, variant)
    chunks = _joined(batches[0], batches[1]), _joined(batches[0], batches[2])
    losses, gradients = zip(*(jax.value_and_grad(loss)(theta, one) for one in chunks), strict=True)
    exceeds = _mean_norm(gradients) > limit

    def lowered(gradients: tuple[list[Array], ...]) -> Array:
        return jnp.where(exceeds, _mean_norm(gradients), -_cosine(gradients))

    vectors = jax.grad(lowered)(gradients)
    slopes = [
        _hessian_product(lambda theta, chunk=chunk: loss(theta, chunk), theta, vector)
        for chunk, vector in zip(chunks, vectors, strict=True)
    ]
    slope = [exact(one) + exact(other) for one, other in zip(*slopes, strict=True)]
    return by_multipliers(slope, initial, variant, len(multipliers)), {
        "gradient_norm": _mean_norm(gradients),
        "cosine": _cosine(gradients),
        "constrained": exceeds,
        "loss": (losses[0] + losses[1]) / 2,
    }


def _mean_norm(gradients: tuple[list[Array], ...]) -> Float[Array, ""]:
    return (_norm(gradients[0], 2) + _norm(gradients[1], 2)) / 2


def _cosine(gradients: tuple[list[Array], ...]) -> Float[Array, ""]:
    """Of two gradients, all tensors together; 0 where one of them is 0."""
    inner = sum(jnp.sum(exact(one) * exact(other)) for one, other in zip(*gradients, strict=True))
    norms = _norm(gradients[0], 2) * _norm(gradients[1], 2)
    return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1), 0)


def by_multipliers(
    slope: list[Array], initial: PyTree, variant: Variant, count: int
) -> Float[Array, " g"]:
    """∂f/∂m_i = ⟨∂f/∂θ_i, W_i⁰⟩, summed over the tensors that share m_i."""
    weights, indices = _trained(initial, variant)
    inner = [jnp.sum(exact(s) * exact(w)) for s, w in zip(slope, weights, strict=True)]
    return jax.ops.segment_sum(jnp.stack(inner), jnp.array(indices), count)


def adam(
    state: State,
    derivative: Float[Array, " g"],
    of_norm: bool | Bool[Array, ""],
    settings: Settings,
    betas: tuple[float, float] = (0.9, 0.999),
) -> State:
    """One step of Adam, with the first moment of the branch that ran."""
    branch = jnp.int32(of_norm)
    derivative = jnp.clip(derivative, -settings["clip"], settings["clip"])
    first = betas[0] * state.first_moments[branch] + (1 - betas[0]) * derivative
    second = betas[1] * state.second_moment + (1 - betas[1]) * derivative**2
    steps = state.steps.at[branch].add(1)
    unbiased = first / (1 - betas[0] ** steps[branch])
    size = jnp.sqrt(second / (1 - betas[1] ** jnp.sum(steps)))
    # A multiplier of tensors that are 0 has no derivative and so stays 1.
    moved = state.multipliers - settings["scale_rate"] * unbiased / (size + 1e-8)
    bounded = jnp.clip(moved, *settings["bounds"])
    return State(bounded, state.first_moments.at[branch].set(first), second, steps)


def product(multiplier: Array | float, leaf: Array) -> Array:
    """Returns m W in the dtype of W; the product is taken in float32 at least."""
    return (multiplier * exact(leaf)).astype(leaf.dtype)


def _trained(initial: PyTree, variant: Variant) -> tuple[list[Array], list[int]]:
    """The leaves that are not frozen, and the multiplier of each."""
    pairs = zip(jax.tree.leaves(initial), variant.indices, strict=True)
    found = [(leaf, index) for leaf, index in pairs if index is not None]
    return [leaf for leaf, _ in found], [index for _, index in found]


def _network(
    multipliers: Float[Array, " g"], initial: PyTree, variant: Variant
) -> tuple[list[Array], Callable[[list[Array], Any], Array]]:
    """Returns the trained tensors θ = m W⁰, and the loss as a function of them and a batch."""
    weights, indices = _trained(initial, variant)
    theta = [product(multipliers[i], leaf) for i, leaf in zip(indices, weights, strict=True)]

    def loss(theta: list[Array], batch: Any) -> Array:
        leaves, structure = jax.tree.flatten(initial)
        trained = iter(theta)
        full = [
            leaf if index is None else next(trained)
            for leaf, index in zip(leaves, variant.indices, strict=True)
        ]
        return variant.loss_fn(jax.tree.unflatten(structure, full), batch)

    return theta, loss


def _hessian_product(
    loss: Callable[[list[Array]], Array], theta: list[Array], vector: list[Array]
) -> list[Array]:
    try:
        return jax.jvp(jax.grad(loss), (theta,), (vector,))[1]
    except TypeError:  # a custom_vjp has no forward mode; the Hessian is symmetric
        return jax.vjp(jax.grad(loss), theta)[1](vector)[0]


def _direction(gradient: list[Array], optimizer: str) -> list[Array]:
    """A(g), the direction of the optimizer's first update."""
    if optimizer == "plain_sgd":
        return gradient
    return _steepest(gradient, optimizer)


def _steepest(gradient: list[Array], optimizer: str) -> list[Array]:
    """∂‖g‖_p/∂g: g/‖g‖₂, or sign g for Adam; 0 at 0."""
    if optimizer == "adam":
        return [jnp.sign(one) for one in gradient]
    norm = _norm(gradient, 2)
    safe = jnp.where(norm > 0, norm, 1)
    return [(one / safe).astype(one.dtype) for one in gradient]


def _norm(tensors: list[Array], order: int) -> Float[Array, ""]:
    tensors = [exact(one) for one in tensors]
    if order == 1:
        return jnp.sum(jnp.stack([jnp.sum(jnp.abs(one)) for one in tensors]))
    total = jnp.sum(jnp.stack([jnp.sum(jnp.square(one)) for one in tensors]))
    # The root has no derivative at 0.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)
