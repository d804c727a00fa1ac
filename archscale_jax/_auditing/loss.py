"""The loss and its gradient: what they are finite of, depend on, and are multiplied by."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._expressions import Expression, Variable
from archscale_jax._frameworks import dynamic
from archscale_jax._parametrize import Parametrization
from archscale_jax._quadrature import slope
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.tracing.constants import constants_behind
from archscale_jax.tracing.losses import factor_of, shapes_of, squared_leaves
from archscale_jax.tracing.trace import trace

Loss = Callable[[PyTree, Any], Any]

_SCALED = 64.0
"""A factor of the loss from which it is taken for a scaled one."""

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What `jax_disable_most_optimizations` sets: for programs that are run once or twice."""


class Gradient(NamedTuple):
    """The loss and its gradient on the batch.

    Attributes:
      loss: the value.
      sizes: root mean square by name; 0 where no entry is other than 0, NaN where one is not
        finite.
      norm: root mean square of all entries.
      leaves: evaluates it again, a tree like params, which is not kept.
    """

    loss: float
    sizes: dict[str, float]
    norm: float
    leaves: Callable[[], PyTree]

    @property
    def is_finite(self) -> bool:
        """Whether the loss and every entry of the gradient are."""
        return all(map(math.isfinite, (self.loss, *self.sizes.values())))


def scalar(loss_fn: Loss) -> Loss:
    """Returns a loss without what it returns beside its value."""

    def value(params: PyTree, batch: Any) -> jax.Array:
        found = loss_fn(params, batch)
        return found[0] if isinstance(found, tuple) else found

    return value


def gradient_of(loss_fn: Loss, params: PyTree, batch: Any) -> Gradient:
    """Returns the loss and its gradient."""
    evaluate = jax.jit(jax.value_and_grad(loss_fn), compiler_options=QUICKLY)
    loss, leaves = evaluate(params, batch)
    leaves = named_leaves(leaves)
    sizes = jax.device_get({name: _size(leaf) for name, leaf in leaves.items()})
    sizes = {name: float(one) for name, one in sizes.items()}
    counts = {name: leaf.size for name, leaf in leaves.items()}
    total = sum(sizes[name] ** 2 * count for name, count in counts.items())
    norm = math.sqrt(total / sum(counts.values()))
    return Gradient(float(loss), sizes, norm, lambda: evaluate(params, batch)[1])


@jax.jit
def _size(leaf: jax.Array) -> jax.Array:
    g = leaf.astype(jnp.float32)
    peak = jnp.maximum(jnp.max(jnp.abs(g)), jnp.finfo(jnp.float32).tiny)
    return peak * jnp.sqrt(jnp.mean((g / peak) ** 2))


def checked_gradient(
    architecture: Architecture, loss_fn: Loss, params: PyTree, batch: Any, gradient: Gradient
) -> Iterator[Finding]:
    """Findings on values that are not finite, and on leaves without a gradient that want one."""
    broken = [name for name, size in gradient.sizes.items() if not math.isfinite(size)]
    if not math.isfinite(gradient.loss):
        yield Finding(
            "loss",
            ALL,
            f"a loss of {gradient.loss}",
            "a number",
            "nothing is learned",
            "look at the batch, at logarithms and divisions, and at the initial weights",
        )
    elif broken:
        for name in broken:
            yield Finding(
                "gradient",
                name,
                "entries that are not finite",
                "numbers",
                "the first update destroys the weights",
                "look for a square root, norm or logarithm at 0, and a where whose other branch "
                "is not finite",
            )
    if broken or not math.isfinite(gradient.loss):
        return
    kept = {one.name for one in architecture.parameters if not one.trained}
    missing = [name for name, size in gradient.sizes.items() if size == 0 and name not in kept]
    if missing and _hidden_by_zeros(params, missing):
        filled = gradient_of(loss_fn, _filled(params), batch)
        missing = [name for name in missing if filled.sizes[name] == 0]
    for name in missing:
        yield Finding(
            "gradient",
            name,
            "a gradient of 0 in every entry",
            "a gradient",
            "it is not trained",
            "look for activations that are 0 on the whole batch, stop_gradient, a detached copy of "
            "the weights, and outputs that the loss does not read",
        )


def _hidden_by_zeros(params: PyTree, missing: list[str]) -> bool:
    """Whether a leaf is 0, so that what stands before it has no gradient yet."""
    zero = jax.device_get(
        jax.jit(lambda leaves: {name: ~jnp.any(one) for name, one in leaves.items()})(
            named_leaves(params)
        )
    )
    return any(zero.values()) and bool(missing)


def _filled(params: PyTree) -> PyTree:
    """Params with small entries in the place of leaves that are 0."""

    def fill(name: str, leaf: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), len(name))
        noise = 0.02 * jax.random.normal(key, leaf.shape, jnp.float32)
        return jnp.where(jnp.any(leaf != 0), leaf, noise.astype(leaf.dtype))

    return jax.jit(lambda params: map_with_names(fill, params))(params)


def doubled(loss_fn: Loss, params: PyTree, batch: Any, loss: float) -> list[Finding]:
    """A finding where the loss of a batch that holds every example twice is twice the loss."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)]
    if not leaves or len({leaf.shape[0] for leaf in leaves}) > 1 or not loss:
        return []
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
        return []

    def twice(leaf: Any) -> Any:
        return jnp.concatenate([leaf, leaf]) if getattr(leaf, "ndim", 0) else leaf

    try:
        double = float(
            jax.jit(loss_fn, compiler_options=QUICKLY)(params, jax.tree.map(twice, batch))
        )
    except Exception:  # a loss that is made for one size of batch
        return []
    if abs(double / loss - 2) > 1e-3:
        return []
    return [
        Finding(
            "loss",
            ALL,
            "the same examples twice give twice the loss: it is a sum over the batch",
            "a mean",
            "gradients grow with the batch, and with them the steps of SGD, what clipping leaves "
            "and what epsilon is compared with",
            "take the mean over examples, and over the tokens that count",
        )
    ]


def multiplied(
    plan: Parametrization, loss_fn: Loss, params: PyTree, batch: Any, period: int
) -> Iterator[Finding]:
    """Findings on factors and penalties in the program of the loss.

    Args:
      plan: of the model.
      loss_fn: the loss.
      params: of the model.
      batch: of the loss.
      period: batches an update takes.
    """
    factor = abs(factor_of(loss_fn, params, batch))
    if factor >= _SCALED:
        yield Finding(
            "loss",
            ALL,
            f"the loss is multiplied by {number(factor)} at its end",
            "the mean",
            "gradients are as many times as large: the steps of SGD, what clipping leaves and what "
            "epsilon is compared with",
            "divide gradients of a scaled loss by the scale before the optimizer sees them",
        )
    # One half, as of squares, is usual.
    if period > 2 and abs(factor * period - 1) < 1e-3:
        yield Finding(
            "accumulation",
            ALL,
            f"the loss is divided by {period}, and {period} batches make an update",
            "the mean: optax.MultiSteps takes the mean of gradients itself",
            f"gradients are {period} times as small as those of the whole batch",
            "do not divide the loss",
        )
    squared = squared_leaves(loss_fn, params, batch)
    if squared:
        function, arrays = dynamic(plan._model.apply, plan._inputs)
        own = squared_leaves(lambda params, *inputs: function(params, *inputs), params, *arrays)
        for name in sorted(squared - own):
            yield Finding(
                "decay",
                name,
                "its squares are in the loss, as a penalty's",
                "decay that is added behind the optimizer",
                "the gradient of the penalty passes through the optimizer: it is scaled with the "
                "rate, and Adam divides it by its size",
                "drop the penalty, and give plan.optimizer weight_decay=",
            )


# Forward multipliers.


def checked_multipliers(
    plan: Parametrization, loss_fn: Loss, params: PyTree, batch: Any
) -> list[Finding]:
    """Findings on forward multipliers that the loss does not apply.

    Raises:
      TraceError: a loss that cannot be read.
    """
    forward = plan.choice.forward
    function, arrays = dynamic(plan._model.apply, plan._inputs)
    findings = []
    readouts = [one.name for one in plan.architecture.parameters if one.role == Role.READOUT]
    behind = {name: 1.0 for name in readouts if name not in forward.leaves} | {**forward.tables}
    if behind:
        bare = constants_behind(function, shapes_of(params), arrays, behind)
        found = constants_behind(loss_fn, shapes_of(params), (batch,), behind)
        for name, promised in behind.items():
            own = bare.get(name, set())
            ratios = {one / two for one in found.get(name, ()) for two in own if len(own) == 1}
            findings += _multiplied(name, "its logits", ratios, promised)
    if not forward.leaves and forward.attention == 1:
        return findings
    read = trace(loss_fn, shapes_of(params), batch, unknown="warn")
    own, others = (
        {one.name: _factor(one) for one in each.parameters} for each in (plan.architecture, read)
    )
    for name, promised in forward.leaves.items():
        before, after = own.get(name), others.get(name)
        if before and after:
            findings += _multiplied(name, "the leaf", {after / before}, promised)
    return findings + list(_attention(plan.architecture, read, forward.attention))


def _factor(parameter: Parameter) -> float | None:
    """By what a weight is multiplied before it is applied, None where that is not one number."""
    factors = {
        1.0 if use.expression is None else _slope(use.expression, parameter.name)
        for use in parameter.uses
        if use.kind == "weight"
    }
    return factors.pop() if len(factors) == 1 else None


def _slope(expression: Expression, leaf: str) -> float | None:
    return slope(expression, Variable("leaf", leaf), lambda variable: 1.0)


def _attention(own: Architecture, read: Architecture, promised: float) -> Iterator[Finding]:
    scales = [{one.scale for one in each.attention.values()} for each in (own, read)]
    if promised == 1 or any(len(one) != 1 for one in scales):
        return
    before, after = (one.pop() for one in scales)
    yield from _multiplied(ALL, "products of queries and keys", {after / before}, promised)


def _multiplied(name: str, what: str, found: set[float], promised: float) -> list[Finding]:
    """A finding unless one of the multipliers that were found is the promised one."""
    if not found or any(abs(math.log(abs(one / promised))) < 0.02 for one in found if one):
        return []
    return [
        Finding(
            "multipliers",
            name,
            f"{what} × {', '.join(map(number, sorted(found)))} in the loss",
            f"× {number(promised)}",
            "the multipliers of the plan are wrong for the model without its forward multipliers",
            "train through plan.apply, once, or parametrize with form='folded'",
        )
    ]
