"""The optimizers of optax with every multiplier of a parametrization in its place.

An update is -η·η_p·(û + λ·λ_p·W), û what the optimizer makes of the gradient divided by ε_p: of
Adam û = m̂ / (√v̂ + ε·ε_p), as a factor before Adam does nothing else.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from archscale_jax._architecture import Architecture
from archscale_jax._optax import scale_by_multipliers
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._optimizer import OPTIMIZERS, Duration


class MuonParts(NamedTuple):
    """What Muon takes beside multipliers.

    Attributes:
      numbers: params to the dimension numbers of its matrices.
      labels: params to a tree of `muon` and `adam`, whose each leaf is.
      rms_multipliers: what rates are multiplied by further under `consistent_rms`, by name.
    """

    numbers: Callable[[PyTree], PyTree]
    labels: Callable[[PyTree], PyTree]
    rms_multipliers: Callable[[], dict[str, float]]


def _check_sizes(**sizes: Any) -> None:
    """Checks what is a number; schedules and tracers are not looked into."""
    for name, value in sizes.items():
        is_wrong = isinstance(value, float | int | np.floating) and not 0 <= value < math.inf
        if is_wrong or isinstance(value, str):
            raise ValueError(f"{name} must be a number from 0 or a schedule, found {value!r}")


def optimizer_of(
    name: str,
    architecture: Architecture,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    options: Mapping[str, Any],
    *,
    rates: Mapping[str, float],
    decay: Mapping[str, float],
    epsilon: Mapping[str, float],
    duration: Duration,
    muon: MuonParts,
) -> optax.GradientTransformation:
    """Returns an optimizer; see `Parametrization.optimizer`.

    Args:
      name: one of `rules._optimizer.OPTIMIZERS`.
      architecture: whose params it is for.
      learning_rate: that of the base.
      weight_decay: that of the base.
      options: of the optax optimizer; None takes its default.
      rates: multipliers η_p by name.
      decay: λ_p.
      epsilon: ε_p.
      duration: batch and tokens over the base's.
      muon: what Muon takes beside.

    Raises:
      TypeError: an option that the optimizer does not have.
      ValueError: a rate or decay that is negative or not finite, or an average that would be
        shorter than a step.
    """
    _check_sizes(learning_rate=learning_rate, weight_decay=weight_decay)
    make = _BARE[name]
    accepted = _options_of(make)
    given = {option: value for option, value in options.items() if value is not None}
    if others := given.keys() - accepted.keys():
        raise TypeError(
            f"optimizer {name!r} has no option {sorted(others)}; it has {', '.join(accepted)}"
        )
    if duration.kappa != 1:
        for option in ("b1", "b2"):
            given[option] = duration.decay_rate(given.get(option, accepted[option]))
    rate: Any = optax.scale_by_learning_rate(learning_rate)
    if name == "muon":
        if (of_adam := given.pop("adam_learning_rate", None)) is not None:
            both = {"muon": rate, "adam": optax.scale_by_learning_rate(of_adam)}
            rate = optax.partition(both, muon.labels)
        given |= {"parts": muon, "architecture": architecture}
    scaled = any(value != 1 for value in epsilon.values())
    inverse = {leaf: 1 / value for leaf, value in epsilon.items()}
    return optax.chain(
        scale_by_multipliers(architecture, inverse) if scaled else optax.identity(),
        make(**given),
        _decayed(decay, weight_decay),
        scale_by_multipliers(architecture, rates),
        rate,
    )


def _sgd(momentum: float | None = None, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


def _adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)


def _lion(b1: float = 0.9, b2: float = 0.99, mu_dtype: Any = None) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1, b2, mu_dtype)


def _muon(
    parts: MuonParts,
    architecture: Architecture,
    beta: float = 0.95,
    ns_steps: int = 5,
    consistent_rms: float | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    eps: float = 1e-8,
    nesterov: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    from optax.contrib import muon

    del adam_learning_rate  # taken by `optimizer_of`
    if isinstance(consistent_rms, int | float) and not consistent_rms > 0:
        raise ValueError(f"consistent_rms is {consistent_rms}; accepted are numbers above 0")
    options: dict[str, Any] = {"beta": beta, "ns_steps": ns_steps, "eps": eps}
    options |= {"nesterov": nesterov, "mu_dtype": mu_dtype, "consistent_rms": consistent_rms}
    # The rate follows behind the multipliers, with the sign.
    bare = optax.chain(
        muon(1.0, muon_weight_dimension_numbers=parts.numbers, **options), optax.scale(-1.0)
    )
    if consistent_rms is None:
        return bare
    # The plan's multipliers are those of the default scaling, and so stands the decay behind.
    return optax.chain(bare, scale_by_multipliers(architecture, parts.rms_multipliers()))


_BARE: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,
    "lion": _lion,
    "muon": _muon,
}
"""Optimizers without rate and decay; their options are the parameters of the functions."""
assert _BARE.keys() == OPTIMIZERS.keys()


def _options_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Options of an optimizer and their defaults."""
    parameters = inspect.signature(make).parameters
    return {
        name: one.default
        for name, one in parameters.items()
        if name not in ("parts", "architecture")
    }


def _decayed(
    multipliers: Mapping[str, float], weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Adds λ·λ_p·W to every update."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()

    def init(params: PyTree) -> optax.ScaleByScheduleState | optax.EmptyState:
        del params
        if callable(weight_decay):
            return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        if params is None:
            raise ValueError("weight decay needs params: call update(gradients, state, params)")
        now: Any = weight_decay
        if callable(weight_decay):
            now = weight_decay(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        weights = named_leaves(params)

        def decayed(name: str, update: jax.Array) -> jax.Array:
            if not multipliers.get(name):  # the rates behind say which name is unknown
                return update
            weight = weights.get(name)
            if (shape := getattr(weight, "shape", None)) != update.shape:
                found = f"hold {name!r} of shape {shape}" if name in weights else f"lack {name!r}"
                raise ValueError(
                    f"weight decay: params {found}, of shape {update.shape} in the gradients; pass "
                    "the params that the gradients are of"
                )
            return update + (multipliers[name] * now * weight).astype(update.dtype)

        return map_with_names(decayed, updates), state

    return optax.GradientTransformation(init, update)
