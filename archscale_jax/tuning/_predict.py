"""The learning rate of a network from that of another, without a search (theory §4 to §6).

A closed-form rule compares two graphs. A measured rule compares what one batch told about two
networks at initialization, and so knows what no graph tells: activation, normalization, width,
optimizer and data.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._architecture import Architecture
from archscale_jax._errors import unknown
from archscale_jax.rules import LEARNING_RATE_RULES, learning_rate_scale
from archscale_jax.rules._registry import Registry, Rule
from archscale_jax.tuning._measure import UpdateSize

MeasuredRule = Callable[..., Float[Array, "..."]]

MEASURED_RULES: Registry[Float[Array, "..."]] = Registry("measured rule")
register_measured_rule = MEASURED_RULES.register


@register_measured_rule(
    "standardized_update",
    equation="η ∝ max_v (S_v / Var z_v)^(-1/2)",
    citation="(theory §6)",
    compares="UpdateSize",
)
def standardized_update(size: UpdateSize) -> Float[Array, "..."]:
    """The largest change in units of what tells examples apart is the same everywhere.

    The measured rule to use (docs/results/learning_rates.md): `relative_update`, with features
    counted from their mean over examples. Through deep ReLU networks that mean grows at the cost of
    what tells examples apart, and `relative_update` overrates their rates.
    """
    return jnp.sqrt(jnp.max(size.standardized, axis=-1))


@register_measured_rule(
    "relative_update",
    equation="η ∝ max_v R_v^(-1/2)",
    citation="(theory §6)",
    compares="UpdateSize",
)
def relative_update(size: UpdateSize) -> Float[Array, "..."]:
    """The largest relative change is the same everywhere."""
    return jnp.sqrt(jnp.max(size.relative, axis=-1))


@register_measured_rule(
    "absolute_update",
    equation="η ∝ max_v S_v^(-1/2)",
    citation="(theory §6)",
    compares="UpdateSize",
)
def absolute_update(size: UpdateSize) -> Float[Array, "..."]:
    """The largest change of a vertex is the same everywhere."""
    return jnp.sqrt(jnp.max(size.absolute, axis=-1))


@register_measured_rule("sharpness", equation="η ∝ 1/λ_max", compares="eigenvalue")
def sharpness(eigenvalue: Float[Array, "..."]) -> Float[Array, "..."]:
    """λ_max of the Hessian: the stability limit of gradient descent on a quadratic."""
    return jnp.asarray(eigenvalue)


Measurement = UpdateSize | float | Array | np.ndarray
Network = jraph.GraphsTuple | Architecture

_COMPARED = {
    "graphs": (jraph.GraphsTuple, "two graphs or Architectures"),
    "UpdateSize": (UpdateSize, "two UpdateSizes, see measure_update"),
    "eigenvalue": ((float, int, jax.Array, np.ndarray, np.generic), "eigenvalues"),
}
"""Types of what rules compare, and their names in errors."""


def predict_learning_rate(
    target: Measurement | Network,
    base: Measurement | Network,
    base_rate: float,
    rule: str | Callable[..., Any] = "standardized_update",
    *,
    rule_options: Mapping[str, Any] | None = None,
) -> float:
    """Returns the learning rate of a network from that of the base network.

    Args:
      target: what the rule compares. `standardized_update`, `relative_update` and
        `absolute_update`: the `UpdateSize` of the network from `measure_update`, [V] or, of several
        seeds, [seeds, V]. `sharpness`: the eigenvalue, a scalar or [seeds]. A closed-form rule: its
        graph or `Architecture`.
      base: the same of the base network, measured with the same optimizer at rate 1 and on a batch
        of the same size.
      base_rate: the best rate of the base network, e.g. from `find_learning_rate`.
      rule: name of a measured or of a closed-form rule, or a function: of a measurement to a size
        that is inverse to the rate, or a learning-rate rule of two graphs.
      rule_options: options of the rule.

    Returns:
      The rate; seeds are averaged in log rate.

    Raises:
      ValueError: an unknown rule, a base rate that is not positive and finite, or a size that is
        not (a vertex with features that are all 0 has no relative size; an update of 0, as the
        first one of a warm-up from 0 or of `optax.MultiSteps`, has no size).
      TypeError: a target or base of another kind than the rule compares, or an option that the rule
        does not have.
    """
    if not 0 < base_rate < math.inf:
        raise ValueError(f"base_rate must be positive and finite, found {base_rate}")
    pair = [one.graph if isinstance(one, Architecture) else one for one in (target, base)]
    graphs = [isinstance(one, jraph.GraphsTuple) for one in pair]
    if isinstance(rule, str) and rule not in MEASURED_RULES and rule not in LEARNING_RATE_RULES:
        raise ValueError(unknown("rule", rule, (*MEASURED_RULES, *LEARNING_RATE_RULES)))
    closed_form = rule in LEARNING_RATE_RULES if isinstance(rule, str) else all(graphs)
    found: Rule[Any] = (LEARNING_RATE_RULES if closed_form else MEASURED_RULES).resolve(rule)
    compared = "graphs" if closed_form else found.compares
    types, wanted = _COMPARED.get(compared, (object, "measurements"))
    if not all(isinstance(one, types) for one in pair) or (any(graphs) and not closed_form):
        kinds = " and ".join(type(one).__name__ for one in pair)
        raise TypeError(f"rule {found.name!r} compares {wanted}, found {kinds}")
    if closed_form:
        return base_rate * learning_rate_scale(pair[0], pair[1], found, rule_options=rule_options)
    for name, one in zip(("target", "base"), pair, strict=True):
        _check_update(name, one)
    sizes = [_log_size(found(one, **(rule_options or {})), found.name) for one in pair]
    return base_rate * math.exp(sizes[1] - sizes[0])


def _check_update(name: str, size: Any) -> None:
    """Checks that the optimizer changed something, of every seed."""
    if isinstance(size, UpdateSize) and not np.all(np.any(np.asarray(size.absolute) != 0, axis=-1)):
        raise ValueError(
            f"{name} was measured on an update of 0: no vertex changes. An optimizer whose first "
            "update is 0 (a schedule that warms up from 0, optax.MultiSteps) takes measure_update("
            "..., updates=k), which measures the first of k updates that is not 0, or a constant "
            "learning rate of 1 without MultiSteps; if its first update is not 0, the gradient is: "
            "check that the loss depends on the parameters of the vertices"
        )


def _log_size(size: Any, rule: Any) -> float:
    """The mean logarithm over seeds, in float64."""
    sizes = np.asarray(size, np.float64)
    if not np.all((sizes > 0) & np.isfinite(sizes)):
        raise ValueError(
            f"rule {rule!r} gives the size {sizes.tolist()}; a size must be positive and finite: "
            "measure vertices on end-to-end paths only, at weights that are not all 0, on a batch "
            "of several examples"
        )
    return float(np.mean(np.log(sizes)))
