"""The optax transformation: one multiplier on the update of every parameter [AAS Eq. 9]."""

from collections.abc import Mapping
from typing import Any

import jax
import jraph
import optax

from archscale_jax._architecture import Architecture, check_parameters
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, map_with_names
from archscale_jax.rules._learning_rate import LearningRateRule
from archscale_jax.rules._rates import RateRules
from archscale_jax.rules._residual import Optimizer
from archscale_jax.rules._width import WidthRule


def scale_by_architecture(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    rule_options: Mapping[str, Any] | None = None,
    kernel_per_layer: bool = False,
    width_rule: str | WidthRule | None = None,
    depth_rule: Optimizer | None = None,
    depth_exponent: float = 0.5,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
) -> optax.GradientTransformation:
    """Multiplies the update of every parameter by its learning-rate multiplier.

    Put it last, behind the optimizer, so that a multiplier f turns the rate η into f·η:

        optax.chain(optax.sgd(0.1, momentum=0.9), scale_by_architecture(arch, base))

    With a width or depth rule the multipliers suppose weights drawn by `initialize`: a framework
    draws a readout √n times larger than [μP] has it.

    Everything before it in the chain is scaled: with `optax.adamw` the decoupled weight decay is f
    times weaker too, as it is for a smaller rate. Keep the decay as it is by adding it behind:

        optax.chain(optax.scale_by_adam(), scale_by_architecture(arch, base),
                    optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))

    Put it inside what keeps a copy of the params (`optax.contrib.schedule_free`, `sam`,
    `mechanize`, `optax.lookahead`): behind these the rate is not f·η, and no message says so, since
    a transformation sees only the update that reaches it. Others: docs/which_parametrization.md.

        optax.contrib.schedule_free(
            optax.chain(optax.sgd(0.1), scale_by_architecture(arch, base)), learning_rate=0.1)

    Args: see `learning_rate_multipliers`.

    Returns:
      A transformation without state. Multipliers are Python floats fixed here; the product is taken
      in float32 at least and rounded once to the dtype of the update. `init` checks params,
      `update` checks updates. Parameters that `optax.masked` hides are excluded, and those in whose
      place is None, as in trees that Equinox has filtered.

    Raises:
      TypeError, ValueError: here, what `learning_rate_multipliers` raises; in `init` and `update`,
        a leaf that is missing, unknown or of another shape, by name.
    """
    rules = RateRules(
        rule, rule_options, kernel_per_layer, width_rule, depth_rule, depth_exponent,
        consistent_rms, dimension_numbers,
    )  # fmt: skip
    found = rules.multipliers(architecture, base)
    return scale_by_multipliers(architecture, {name: one.value for name, one in found.items()})


def scale_by_multipliers(
    architecture: Architecture, multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
    """Does what `scale_by_architecture` does, of multipliers by name."""

    def init_fn(params: PyTree) -> optax.EmptyState:
        check_parameters(architecture, params, masked=optax.MaskedNode)
        return optax.EmptyState()

    def update_fn(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        del params
        check_parameters(architecture, updates, masked=optax.MaskedNode)
        return map_with_names(scaled, updates), state

    def scaled(name: str, update: jax.Array) -> jax.Array:
        return (exact(update) * multipliers[name]).astype(update.dtype)

    return optax.GradientTransformation(init_fn, update_fn)
