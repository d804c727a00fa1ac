"""Multipliers of a network's rates from what updates do in it and in its base, by several rules.

`matched` is that of `archscale_jax.parametrize(..., learning_rate="measured")`; the others are what
it was chosen among (docs/results/learning_rates.md):

  drawn      as `matched`, the readout as drawn
  trained    as `matched`, the readout scaled until outputs are as large as the base's
  uncapped   as `matched`, without the cap of the readout's multiplier under SGD
  inner      as `matched`, the readout left as it is
  outputs    every group changes the outputs as in the base
  flerm      every leaf changes the outputs as the base's leaves of its role do, which it shares
             with the other leaves of its role [FLeRM]
  local      every group changes its own vertices as in the base, in units of their spread
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from archscale_jax.tuning._measured import (
    GROUPS,
    TRAINED,
    Effects,
    Measurable,
    groups_of,
    matched_multipliers,
    measurer,
)

BY_DRAWS = ("outputs", "flerm", "local")
"""Rules that average a given number of draws; the others as many as they need."""
Loss = Callable[[Any], jax.Array]


def multipliers(
    rule: str, network: Measurable, base: Measurable, loss: Loss, *, draws: int, is_sgd: bool
) -> dict[str, float]:
    """Returns the multiplier of every leaf of the network by a rule.

    Args:
      rule: see the module.
      network: the network to train.
      base: the network whose rate is known.
      loss: of the outputs.
      draws: how many draws `outputs`, `flerm` and `local` average, in log.
      is_sgd: whether the optimizer is SGD, with momentum or without.
    """
    if rule in ("matched", "drawn", "trained", "uncapped", "inner"):
        capped = is_sgd and rule not in ("uncapped", "inner")
        trained = {"drawn": 0.0, "trained": 1.0}.get(rule, TRAINED)
        parts = matched_multipliers(network, base, loss, trained=trained, cap_readout=capped)
        left = "readout" if rule == "inner" else ""
        return {name: 1.0 if one.place == left else one.value for name, one in parts.items()}
    of = {"outputs": _outputs, "flerm": _by_leaf, "local": _by_vertex}[rule]
    found = [_logs(one, of, loss, draws) for one in (network, base)]
    places = _roles(network) if rule == "flerm" else groups_of(network.architecture)
    values = {place: math.exp(found[1].get(place, 0.0) - found[0][place]) for place in found[0]}
    if is_sgd and rule != "flerm":
        values["readout"] = min(values["readout"], 1.0)
    return {name: values[place] for name, place in places.items()}


def _logs(network: Measurable, of: Callable, loss: Loss, draws: int) -> dict[str, float]:
    measure = measurer(network, loss)
    found = [of(network, functools.partial(measure, jax.random.key(seed))) for seed in range(draws)]
    return {place: float(np.mean([np.log(one[place]) for one in found])) for place in found[0]}


def _group_rows(network: Measurable) -> list[dict[str, float]]:
    groups = groups_of(network.architecture)
    return [{name: 1.0 for name in groups if groups[name] == one} for one in GROUPS]


def _outputs(network: Measurable, measure: Callable[..., Effects]) -> dict[str, float]:
    return dict(zip(GROUPS, measure(_group_rows(network)).outputs.tolist(), strict=True))


def _roles(network: Measurable) -> dict[str, str]:
    """By name, the group of every leaf and whether it is a weight, a bias or a gain."""
    groups, kinds = groups_of(network.architecture), ("bias", "scale")
    return {
        one.name: f"{groups[one.name]} {one.role if one.role in kinds else 'weight'}"
        for one in network.architecture.parameters
    }


def _by_leaf(network: Measurable, measure: Callable[..., Effects]) -> dict[str, float]:
    """By role, the geometric mean of what its leaves do, times their number.

    Biases that a normalization removes do nothing, and are not counted.
    """
    roles = _roles(network)
    outputs = dict(zip(roles, measure([{one: 1.0} for one in roles]).outputs.tolist(), strict=True))
    found: dict[str, list[float]] = {role: [] for role in roles.values()}
    for name, role in roles.items():
        if outputs[name] > 1e-5 * max(outputs.values()):
            found[role].append(outputs[name])
    return {
        role: len(one) * math.exp(np.mean(np.log(one))) if one else 1.0
        for role, one in found.items()
    }


def _by_vertex(network: Measurable, measure: Callable[..., Effects]) -> dict[str, float]:
    """By group, the RMS over its weights of the change of the vertex that each gives."""
    groups, vertices = groups_of(network.architecture), _own_vertices(network)
    found = measure([{one: 1.0} for one in vertices])
    squares: dict[str, list[float]] = {}
    for row, (name, vertex) in enumerate(vertices.items()):
        readout = groups[name] == "readout"
        change = found.outputs[row] if readout else found.spread[row, vertex]
        squares.setdefault(groups[name], []).append(float(change) ** 2)
    return {group: math.sqrt(np.mean(one)) for group, one in squares.items()}


def _own_vertices(network: Measurable) -> Mapping[str, int]:
    """Weights by name, and the vertex that each gives; of the readout any."""
    edges = network.architecture.graph.receivers
    return {
        one.name: 0 if one.edge is None else int(edges[one.edge])
        for one in network.architecture.parameters
        if one.is_drawn
    }
