"""Measured parametrization: what one update does, matched group by group (theory §14).

A formula bounds the change that a parameter makes; one batch measures it, for any network and
optimizer. With u the first update that the optimizer would apply, the derivative of the last
features and of the outputs along the part of u that is a group's tells what that group does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from archscale_jax._architecture import Architecture, Role
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, map_with_names
from archscale_jax.rules._registry import Part
from archscale_jax.tracing.trace import vertex_features

GROUPS = ("stem", "hidden", "readout")
_GROUPS = {Role.INPUT: "stem", Role.HIDDEN: "hidden", Role.READOUT: "readout"}


class GroupEffects(NamedTuple):
    """What one update of every group of parameters does, at learning rate 1.

    Attributes:
      features: by group, the RMS change of the last features over their RMS.
      outputs: by group, the RMS change of the outputs.
    """

    features: Mapping[str, float]
    outputs: Mapping[str, float]


class Measurable(NamedTuple):
    """A network to be measured.

    Attributes:
      apply: `(params, *inputs)` to the outputs.
      architecture: its graph.
      draw: from a key to initial params.
      optimizer: at learning rate 1.
      inputs: arrays, a batch.
    """

    apply: Callable[..., Any]
    architecture: Architecture
    draw: Callable[[jax.Array], PyTree]
    optimizer: optax.GradientTransformation
    inputs: tuple[PyTree, ...]


def groups_of(architecture: Architecture) -> dict[str, str]:
    """Returns the group of every parameter by name.

    `stem`: what reads the inputs, embeddings among it; `readout`: what the features enter last, a
    tied table too; `hidden`: all between.
    """
    return {
        one.name: "readout" if one.is_tied else _GROUPS[one.layer]
        for one in architecture.parameters
    }


def matched_multipliers(
    network: Measurable,
    base: Measurable,
    loss: Callable[[Any], jax.Array],
    *,
    seeds: int = 2,
    cap_readout: bool = False,
) -> dict[str, Part]:
    """Returns the multiplier of every parameter that makes its group do what the base's does.

    Stem and hidden layers change the last features relatively as much as in the base, each group by
    itself and then both together; the readout changes the outputs as much.

    Args:
      network: the network to train.
      base: the network on which the rate was tuned; same optimizer, a batch of the same size.
      loss: of the outputs.
      seeds: how many draws are averaged, in log.
      cap_readout: whether the readout's multiplier is at most 1.

    Raises:
      ValueError: a group whose update changes nothing in one network and something in the other.
    """
    logs: dict[str, list[float]] = {group: [] for group in GROUPS}
    measured = [measurer(one, loss) for one in (network, base)]
    for seed in range(seeds):
        key = jax.random.key(seed)
        ours, theirs = (one(key, {}) for one in measured)
        found = {
            "stem": _ratio("stem", theirs.features, ours.features),
            "hidden": _ratio("hidden", theirs.features, ours.features),
            "readout": _ratio("readout", theirs.outputs, ours.outputs),
        }
        together = [
            one(key, by_group).features["together"]
            for one, by_group in zip(measured, (found, {}), strict=True)
        ]
        joint = together[1] / together[0]
        for group, value in found.items():
            logs[group].append(math.log(value * (1.0 if group == "readout" else joint)))
    values = {group: math.exp(float(np.mean(found))) for group, found in logs.items()}
    if cap_readout:
        values["readout"] = min(values["readout"], 1.0)
    return {
        name: Part(values[group], "measured", group, {"draws": seeds}, "(theory §14)")
        for name, group in groups_of(network.architecture).items()
    }


def _ratio(group: str, base: Mapping[str, float], network: Mapping[str, float]) -> float:
    if not base[group] and not network[group]:
        return 1.0  # neither has such a group
    if not (base[group] and network[group]) or not math.isfinite(base[group] / network[group]):
        raise ValueError(
            f"learning_rate='measured': an update of the {group} changes {network[group]:.3g} in "
            f"the network and {base[group]:.3g} in the base; groups that one of them lacks, or "
            "weights that start at 0 behind them, cannot be matched: take the closed forms"
        )
    return base[group] / network[group]


def measurer(
    network: Measurable, loss: Callable[[Any], jax.Array]
) -> Callable[[jax.Array, Mapping[str, float]], GroupEffects]:
    """Returns a jitted function of a key and multipliers of groups to what the groups do.

    `features["together"]` is the effect of stem and hidden layers in one update. It costs about a
    training step and one more pass forward a group.
    """
    groups = groups_of(network.architecture)

    def last_features_and_outputs(params: PyTree) -> tuple[jax.Array, Any]:
        features = vertex_features(network.apply, params, *network.inputs)
        return exact(features[max(features)]), network.apply(params, *network.inputs)

    @jax.jit
    def effects(key: jax.Array, scales: Mapping[str, Any]) -> Any:
        params = network.draw(key)
        gradients = jax.grad(lambda params: loss(network.apply(params, *network.inputs)))(params)
        optimizer = network.optimizer
        update, _ = optimizer.update(gradients, optimizer.init(params), params)
        values, pull = jax.vjp(last_features_and_outputs, params)
        # As in `measure_update`: no forward mode, which functions with a `jax.custom_vjp` lack.
        _, push = jax.vjp(lambda cotangents: pull(cotangents)[0], values)
        size = _rms(values[0])
        found = {}
        for name, members in {**{one: (one,) for one in GROUPS}, "together": GROUPS[:2]}.items():
            part = map_with_names(
                lambda leaf, value, members=members: value * (groups[leaf] in members)
                * scales.get(groups[leaf], 1.0),
                update,
            )  # fmt: skip
            change, outputs = push(part)[0]
            found[name] = _rms(change) / size, _rms(outputs)
        return found

    def measured(key: jax.Array, scales: Mapping[str, float]) -> GroupEffects:
        found = effects(key, dict(scales))
        return GroupEffects(
            {name: float(one[0]) for name, one in found.items()},
            {name: float(one[1]) for name, one in found.items()},
        )

    return measured


def _rms(tree: PyTree) -> jax.Array:
    leaves = [exact(one) for one in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(one**2) for one in leaves) / sum(one.size for one in leaves))
