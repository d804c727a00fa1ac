"""The optax transformation: one factor on the update of every parameter [AAS Eq. 9]."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import optax

from archscale_jax._architecture import Architecture, check_architecture, check_parameters
from archscale_jax._graph import network_kernel_size
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, map_with_names
from archscale_jax.rules._learning_rate import (
    LEARNING_RATE_RULES,
    LearningRateRule,
    MissingBaseError,
    kernel_size_factor,
    learning_rate_scale,
)
from archscale_jax.rules._registry import Explained
from archscale_jax.rules._residual import Optimizer, depth_factors
from archscale_jax.rules._width import WidthRule, explained_width_factors, muon


def learning_rate_factors(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    kernel_per_layer: bool = False,
    width_rule: str | WidthRule | None = None,
    depth_rule: Optimizer | None = None,
    depth_exponent: float = 0.5,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Returns the learning-rate factor of every parameter by name.

    Args:
      architecture: the network to train.
      base: the network on which the base rate was tuned, or its graph.
      rule: see `archscale_jax.rules.learning_rate_scale`: one factor for all weights and biases.
        None is `path_sum`, or `none` with a width rule or a depth rule, which are asked for what
        they say alone.
      kernel_per_layer: [AAS Eq. 9] divides by one kernel size for the whole network. True gives
        every layer its own: q_network / q_layer on top, which raises layers of smaller kernels.
      width_rule: None, `sgd`, `adam` or `muon`: multiply by the width factors [μP], see
        `archscale_jax.rules._width`.
      depth_rule: None, `sgd`, `adam` or `muon`: multiply by the depth factors of residual stacks,
        see `archscale_jax.rules._residual`.
      depth_exponent: α of the depth rule.
      consistent_rms: of the width rule `muon`, as given to `optax.contrib.muon`.
      dimension_numbers: of the width rule `muon`, whether optax is given
        `muon_dimension_numbers(architecture, params)`.
      **options: passed to the rule.

    Raises:
      TypeError: no architecture, or a base that is neither architecture nor graph.
      ValueError: what the rules raise; a width rule without an architecture as base; a factor that
        is not positive, or outside the range of float32.
    """
    found = explained_factors(
        architecture,
        base,
        rule,
        kernel_per_layer=kernel_per_layer,
        width_rule=width_rule,
        depth_rule=depth_rule,
        depth_exponent=depth_exponent,
        consistent_rms=consistent_rms,
        dimension_numbers=dimension_numbers,
        **options,
    )
    return {name: factor.value for name, factor in found.items()}


def explained_factors(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    kernel_per_layer: bool = False,
    width_rule: str | WidthRule | None = None,
    depth_rule: Optimizer | None = None,
    depth_exponent: float = 0.5,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
    **options: Any,
) -> dict[str, Explained]:
    """Returns what `learning_rate_factors` does, with the parts whose product each factor is.

    Raises:
      ValueError: see `learning_rate_factors`.
    """
    check_architecture(architecture)
    rule = chosen_rule(rule, depth_rule, width_rule)
    base_graph = base.graph if isinstance(base, Architecture) else base
    scale = learning_rate_scale(architecture.graph, base_graph, rule, **options)
    description = LEARNING_RATE_RULES.describe(rule)
    reason = f"{description.name} {scale:.4g} {description.source}".rstrip()
    names = [parameter.name for parameter in architecture.parameters]
    parts = {name: [Explained(scale, reason)] for name in names}
    if kernel_per_layer:
        network = network_kernel_size(architecture.graph)
        for one in architecture.parameters:
            own = math.sqrt(one.kernel_positions)
            factor = kernel_size_factor(own, network)
            parts[one.name].append(Explained(factor, f"kernel {network:g}/{own:g}"))
    if width_rule is not None:
        if not isinstance(base, Architecture):
            error = MissingBaseError if base is None else ValueError
            raise error(
                "width_rule compares fans: pass the base network's Architecture, or with_widths("
                f"architecture, {{width: base width}}); found {type(base).__name__}"
            )
        if width_rule == "muon":
            width_rule = functools.partial(
                muon, consistent_rms=consistent_rms, dimension_numbers=dimension_numbers
            )
        for name, part in explained_width_factors(architecture, base, width_rule).items():
            parts[name].append(part)
    if depth_rule is not None:
        if base is None:
            raise MissingBaseError(
                "depth_rule compares depths: pass the base network, or its graph, as base"
            )
        found = depth_factors(architecture, base, depth_rule, exponent=depth_exponent)
        for name, (factor, place) in found.items():
            parts[name].append(Explained(factor, f"depth {depth_rule} {factor:.4g}, {place}"))
    return {name: _product(name, parts[name]) for name in names}


def chosen_rule(
    rule: str | LearningRateRule | None,
    depth_rule: Optimizer | None,
    width_rule: str | WidthRule | None = None,
) -> str | LearningRateRule:
    """Returns a rule, or what None stands for, see `learning_rate_factors`."""
    if rule is not None:
        return rule
    return "path_sum" if depth_rule is None and width_rule is None else "none"


def _product(name: str, parts: list[Explained]) -> Explained:
    factor = math.prod(part.value for part in parts)
    smallest, largest = (float(getattr(jnp.finfo(jnp.float32), end)) for end in ("tiny", "max"))
    if not smallest <= factor <= largest:
        raise ValueError(
            f"the learning-rate factor of {name!r} is {factor}; a factor must be positive and in "
            "the range of float32"
        )
    return Explained(factor, " × ".join(part.reason for part in parts))


def scale_by_architecture(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Multiplies the update of every parameter by its learning-rate factor.

    Put it last, behind the optimizer, so that a factor f turns the rate η into f·η:

        optax.chain(optax.sgd(0.1, momentum=0.9), scale_by_architecture(arch, base))

    With a width or depth rule the factors suppose weights drawn by `initialize`: a framework draws
    a readout √n times larger than [μP] has it.

    Everything before it in the chain is scaled: with `optax.adamw` the decoupled weight decay is f
    times weaker too, as it is for a smaller rate. Keep the decay as it is by adding it behind:

        optax.chain(optax.scale_by_adam(), scale_by_architecture(arch, base),
                    optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))

    Coupled weight decay (`add_decayed_weights` before the momentum) is part of the gradient and is
    scaled with it. Momentum is linear, so factors before and behind it do the same; Adam divides
    the size of the gradient out, so a factor before it does nothing.

    Put it inside what keeps a copy of the params and takes those it is given for those it wrote:
    `optax.contrib.schedule_free`, `sam`, `mechanize`, and `optax.lookahead`. Behind these the rate
    is not f·η, and no message says so, since a transformation sees only the update that reaches it:

        optax.contrib.schedule_free(
            optax.chain(optax.sgd(0.1), scale_by_architecture(arch, base)), learning_rate=0.1)

    `schedule_free_sgd`, `schedule_free_adamw`, `cocob` and `madgrad` have no inside: write the
    first two as `schedule_free` of a chain, and do not use the last two with factors.

    Args:
      architecture: the network to train.
      base: the network on which the base rate was tuned, or its graph.
      rule: learning-rate rule; None is `path_sum`, or `none` with a width or depth rule.
      **options: see `learning_rate_factors`.

    Returns:
      A transformation without state. Factors are Python floats fixed here; the product is taken in
      float32 at least and rounded once to the dtype of the update. `init` checks params, `update`
      checks updates. Parameters that `optax.masked` hides are left out.

    Raises:
      ValueError: here, what `learning_rate_factors` raises; in `init` and `update`, a leaf that is
        missing, unknown or of another shape, by name.
    """
    factors = learning_rate_factors(architecture, base, rule, **options)

    def init_fn(params: PyTree) -> optax.EmptyState:
        check_parameters(architecture, params, masked=optax.MaskedNode)
        return optax.EmptyState()

    def update_fn(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        del params
        check_parameters(architecture, updates, masked=optax.MaskedNode)
        return map_with_names(scaled, updates), state

    def scaled(name: str, update: jax.Array) -> jax.Array:
        return (exact(update) * factors[name]).astype(update.dtype)

    return optax.GradientTransformation(init_fn, update_fn)
