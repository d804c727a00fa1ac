"""Which rules fit a network: what `parametrize` takes where the user says nothing."""

import dataclasses
import math
from typing import Any

import numpy as np

from archscale_jax._architecture import Architecture, Role
from archscale_jax._errors import unknown
from archscale_jax._graph import Operator, live_edges
from archscale_jax._moments import Propagation
from archscale_jax._paths import path_statistics
from archscale_jax.rules._forward import Forward, forward_multipliers
from archscale_jax.rules._learning_rate import LEARNING_RATE_RULES
from archscale_jax.rules._rates import RateRules
from archscale_jax.rules._residual import (
    Optimizer,
    layers_of_branches,
    residual_branches,
    residual_depth,
)
from archscale_jax.rules._variances import INITIALIZATION_RULES
from archscale_jax.rules._width import WIDTH_RULES, features

_BRANCHING = (Operator.CONCATENATION, Operator.PRODUCT)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rules of a parametrization.

    Attributes:
      initialization: name of the initialization rule.
      initialization_options: its options.
      rates: rules of the learning rates.
      forward: the forward multipliers.
      epsilon_rule: see `rules._optimizer`.
      reasons: why, one sentence a choice.
    """

    initialization: str
    initialization_options: dict[str, Any]
    rates: RateRules
    forward: Forward
    epsilon_rule: str
    reasons: tuple[str, ...]

    def lines(self, optimizer: str, has_base: bool) -> list[str]:
        """Returns the first lines of a report."""
        first = (
            f"parametrization for {optimizer}: use the base's learning rate"
            if has_base
            else f"parametrization for {optimizer} of a base: tune the rate on it, and pass it as "
            "base= of larger networks"
        )
        return [first, *self.reasons]


def chosen(
    architecture: Architecture,
    base: Architecture | None,
    kind: Optimizer,
    *,
    initialization: str | None,
    branch_share: float | None,
    width_rule: str | None,
    depth_rule: str | None,
    depth_exponent: float | None,
    form: str,
    attention_scale: str | None,
    epsilon_rule: str,
) -> Choice:
    """Returns the rules that fit a network and its base, or those that the user names.

    Args:
      architecture: the network to train.
      base: the network on which the rate is tuned; None where this is it.
      kind: `sgd`, `adam` or `muon`.
      initialization: name of an initialization rule, or None.
      branch_share: what the residual branches of the base add to their streams, or None.
      width_rule: name of a width rule, `auto` or None.
      depth_rule: `auto`, None, `residual`, or the name of a learning-rate rule.
      depth_exponent: α, or None.
      form: see `forward_multipliers`.
      attention_scale: see there.
      epsilon_rule: see `rules._optimizer`.

    Raises:
      ValueError: a rule that there is not, or one that is asked for without a base; a branch share
        that is not above 0, or of a rule that has none.
    """
    reasons: list[str] = []
    exponent = _depth_exponent(architecture) if depth_exponent is None else depth_exponent
    width = kind if width_rule == "auto" else width_rule
    if width is not None:
        WIDTH_RULES.resolve(width)
    rule = INITIALIZATION_RULES.resolve(initialization or "second_moment")
    derived = depth_exponent is None
    depth = _depth_rule(architecture, base, kind, depth_rule, reasons, exponent, derived)
    residual = depth == "residual"
    smallest = base or architecture
    options: dict[str, Any] = {}
    if "depth_exponent" in rule.parameters:
        options["depth_exponent"] = exponent
    if "branch_share" in rule.parameters:
        options["branch_share"] = _branch_share(smallest, exponent, branch_share)
    elif branch_share is not None:
        raise ValueError(
            f"branch_share is of the initialization 'second_moment'; {initialization!r} has none"
        )
    if "readout_gain" in rule.parameters and (fan := _base_readout(smallest)):
        options["readout_gain"] = math.sqrt(fan)
        reasons.append(f"readout: 1/√n at the base's n = {fan}, and 1/n beyond it [μP]")
    width = None if base is None else width
    forward = forward_multipliers(
        architecture,
        base,
        form=form,
        attention_scale=attention_scale,
        width=width is not None,
        depth_exponent=exponent if residual else None,
    )
    if "table_rows" in rule.parameters and forward.rows != 1:
        options["table_rows"], forward = forward.rows, forward._replace(rows=1.0)
    rates = RateRules(
        rule="none" if residual or depth is None else depth,
        width_rule=width,
        depth_rule=kind if residual else None,
        depth_exponent=exponent,
        dimension_numbers=width == "muon",
        tables=frozenset(forward.tables),
    )
    return Choice(
        initialization or "second_moment",
        options,
        rates,
        forward,
        epsilon_rule,
        tuple(reasons),
    )


def _depth_exponent(architecture: Architecture) -> float:
    """α: 1 where branches have two layers or more, 1/2 where all have one [WD-spec]."""
    layers = layers_of_branches(architecture)
    return 1.0 if max(layers.values(), default=1) > 1 else 0.5


def _depth_rule(
    architecture: Architecture,
    base: Architecture | None,
    kind: str,
    depth_rule: str | None,
    reasons: list[str],
    exponent: float,
    derived: bool,
) -> str | None:
    """`residual`, the name of a learning-rate rule, or None."""
    if depth_rule not in ("auto", "residual", None):
        if depth_rule not in LEARNING_RATE_RULES:
            raise ValueError(
                unknown("depth_rule", depth_rule, ("auto", "residual", *LEARNING_RATE_RULES))
            )
        return depth_rule if base is not None else None
    if base is None or depth_rule is None:
        return None
    counts = [residual_depth(one) for one in (architecture, base)]
    stacked = bool(residual_branches(architecture)) and counts[1] > 0
    if depth_rule == "residual" or (stacked and counts[0] != counts[1]):
        reasons.append(
            f"depth: {counts[0]} residual blocks, {counts[1]} in the base: multipliers by place, "
            f"α = {exponent:g}{_why(architecture) if derived else ''}"
        )
        return "residual"
    depths = [path_statistics(one.graph).max_depth for one in (architecture, base)]
    if stacked or depths[0] == depths[1]:
        return None
    what = f"depth: {depths[0]} layers, {depths[1]} in the base"
    if kind in _WITHOUT_STREAM and all(map(_sums_layers_alone, (architecture, base))):
        rule = _WITHOUT_STREAM[kind]
        reasons.append(f"{what}: rule {rule} of networks without residual stream")
        return rule
    reasons.append(
        f"{what}: no rule answers for it in this network under {kind}; measure the rate, or pass "
        f"depth_rule= ({', '.join(LEARNING_RATE_RULES)})"
    )
    return None


def _why(architecture: Architecture) -> str:
    counts = sorted(set(layers_of_branches(architecture).values()))
    if not counts:
        return ""
    layers = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f" as branches have {layers} layer{'s' * (counts[-1] > 1)}"


def _sums_layers_alone(architecture: Architecture) -> bool:
    """Whether paths tell how rates scale: no concatenations, products or normalizations.

    Outputs may be joined, as those of an actor and a critic.
    """
    graph = architecture.graph
    inner = live_edges(graph) & (graph.receivers != int(graph.n_node[0]) - 1)
    operators = graph.edges["operator"][inner]
    joined = np.isin(operators, [int(one) for one in _BRANCHING]).any()
    propagation = Propagation(architecture)
    return not joined and not any(
        propagation.normalizes(one.before) for one in propagation.functions
    )


def _base_readout(base: Architecture) -> int:
    """Inputs of the largest readout of a base, 0 without one."""
    return max((features(one)[0] for one in base.parameters if one.role == Role.READOUT), default=0)


def _branch_share(base: Architecture, exponent: float, share: float | None) -> float:
    """What residual branches add to their streams in a base, see `second_moment`.

    If the user names no share: twice the stream in all where branches normalize what they read, as
    frameworks' own weights do; a quarter where a larger stream makes the next branch larger too
    (measured on twelve families).
    """
    if share is not None and not 0 < share < math.inf:
        raise ValueError(f"branch_share is {share}; accepted are finite numbers above 0")
    branches, propagation = residual_branches(base), Propagation(base)
    if not branches:
        return _SHARE
    entries = [
        edge
        for edges in branches.values()
        for edge in edges
        if propagation.layers[edge]
        and propagation.senders[edge] not in {propagation.receivers[one] for one in edges}
    ]
    normalized = all(propagation.normalizes(propagation.functions[one].before) for one in entries)
    if share is None:
        share = _SHARE_OF_NORMALIZED if entries and normalized else _SHARE
    return share * len(branches) ** (2 * exponent - 1)


_SHARE, _SHARE_OF_NORMALIZED = 0.25, 2.0
_WITHOUT_STREAM = {"sgd": "path_sum_activations", "adam": "inverse_depth"}
"""Learning-rate rules of networks that only sum layers, by kind of optimizer."""
