"""The loss and its gradient: what they are finite of, depend on, and are multiplied by."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from archscale_jax._architecture import Architecture, Parameter
from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._expressions import Expression, Variable
from archscale_jax._frameworks import dynamic
from archscale_jax._parametrize import Parametrization
from archscale_jax._quadrature import slope
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.tracing.constants import constants_behind
from archscale_jax.tracing.trace import trace

Loss = Callable[[PyTree, Any], Any]


class Gradient(NamedTuple):
    """The loss and its gradient on the batch.

    Attributes:
      loss: the value.
      leaves: a tree like params.
      sizes: root mean square by name; 0 where no entry is other than 0, NaN where one is not
        finite.
    """

    loss: float
    leaves: PyTree
    sizes: dict[str, float]

    @property
    def is_finite(self) -> bool:
        """Whether the loss and every entry of the gradient are."""
        return all(map(math.isfinite, (self.loss, *self.sizes.values())))

    @property
    def norm(self) -> float:
        """Root mean square of all entries."""
        counts = {name: leaf.size for name, leaf in named_leaves(self.leaves).items()}
        total = sum(self.sizes[name] ** 2 * count for name, count in counts.items())
        return math.sqrt(total / sum(counts.values()))


def scalar(loss_fn: Loss) -> Loss:
    """Returns a loss without what it returns beside its value."""

    def value(params: PyTree, batch: Any) -> jax.Array:
        found = loss_fn(params, batch)
        return found[0] if isinstance(found, tuple) else found

    return value


def gradient_of(loss_fn: Loss, params: PyTree, batch: Any) -> Gradient:
    """Returns the loss and its gradient."""

    @jax.jit
    def evaluate(params: PyTree, batch: Any) -> tuple[jax.Array, PyTree, dict[str, jax.Array]]:
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        sizes = {name: _size(leaf) for name, leaf in named_leaves(gradient).items()}
        return loss, gradient, sizes

    loss, gradient, sizes = evaluate(params, batch)
    return Gradient(
        float(loss), gradient, {name: float(one) for name, one in jax.device_get(sizes).items()}
    )


def _size(leaf: jax.Array) -> jax.Array:
    g = leaf.astype(jnp.float32)
    peak = jnp.maximum(jnp.max(jnp.abs(g)), jnp.finfo(jnp.float32).tiny)
    return peak * jnp.sqrt(jnp.mean((g / peak) ** 2))


def checked_gradient(
    plan: Parametrization, loss_fn: Loss, params: PyTree, batch: Any, gradient: Gradient
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
    kept = {one.name for one in plan.architecture.parameters if not one.trained}
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
        double = float(jax.jit(loss_fn)(params, jax.tree.map(twice, batch)))
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


# Forward multipliers.


def checked_multipliers(
    plan: Parametrization, loss_fn: Loss, params: PyTree, batch: Any
) -> list[Finding]:
    """Findings on forward multipliers that the loss does not apply.

    Raises:
      TraceError: a loss that cannot be read.
    """
    forward = plan.choice.forward
    if not (forward.leaves or forward.in_products):
        return []
    function, arrays = dynamic(plan._model.apply, plan._inputs)
    findings = []
    if forward.tables:
        bare = constants_behind(function, _shapes(params), arrays, forward.tables)
        found = constants_behind(loss_fn, _shapes(params), (batch,), forward.tables)
        for name, promised in forward.tables.items():
            own = bare.get(name, set())
            ratios = {one / two for one in found.get(name, ()) for two in own if len(own) == 1}
            findings += _multiplied(name, "its logits", ratios, promised)
    if not forward.leaves and forward.attention == 1:
        return findings
    read = trace(loss_fn, _shapes(params), batch, unknown="warn")
    own, others = (
        {one.name: _factor(one) for one in each.parameters} for each in (plan.architecture, read)
    )
    for name, promised in forward.leaves.items():
        before, after = own.get(name), others.get(name)
        if before and after:
            findings += _multiplied(name, "the leaf", {after / before}, promised)
    return findings + list(_attention(plan.architecture, read, forward.attention))


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


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
            "train through plan.apply, or parametrize with form='folded'",
        )
    ]


def spread(gradient: Gradient) -> Mapping[str, float]:
    """Returns sizes of leaves that have more than rounding in their gradient."""
    largest = max(gradient.sizes.values(), default=0.0)
    return {name: size for name, size in gradient.sizes.items() if size > 1e-5 * largest}
