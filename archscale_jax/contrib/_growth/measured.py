"""What growth measures of a network: bottlenecks, and sums for pairs of layers (theory §8)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.bottleneck import Bottleneck, bottleneck
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup, readers
from archscale_jax.contrib._growth.statistics import PairStatistics, pair_statistics
from archscale_jax.contrib._growth.widen import occupied
from archscale_jax.tracing.layers import LayerKind, Loss, layer_kinds

GATES = 8
"""The most neurons of a group whose gates new ones may have; sums grow with their square."""


class Measured(NamedTuple):
    """What growth needs to know of a network.

    Attributes:
      kinds: of its layers.
      bottlenecks: of the layers that read the groups, by the names of weights.
      pairs: sums for the groups, by name.
      gates: neurons whose gates new ones may have, by the names of gated groups.
    """

    kinds: tuple[LayerKind, ...]
    bottlenecks: dict[str, Bottleneck]
    pairs: dict[str, PairStatistics]
    gates: dict[str, np.ndarray]


def measure(
    loss_fn: Loss,
    params: PyTree,
    batches: Sequence[Any],
    groups: Sequence[NeuronGroup],
    *,
    restricted: bool = False,
    cutoff: float = 1e-6,
) -> Measured:
    """Takes the statistics of `grow`, in two jitted passes over the batches.

    Raises:
      TraceError: see `grow`.
      ValueError: see `grow`.
    """
    names = readers(groups)
    layers = {*names, *(name for group in groups for name in group.producers)}
    kinds = layer_kinds(loss_fn, params, batches[0], layers)
    found = bottleneck(loss_fn, params, batches, layers=names, cutoff=cutoff)
    leaves = named_leaves(params)
    by_name = {kind.weight: kind for kind in kinds}

    def best_update(name: str) -> np.ndarray:
        update = {**found[name].update}
        rows = update.pop(name).reshape(-1, leaves[name].shape[-1])
        return np.vstack([rows, *(bias.reshape(1, -1) for bias in update.values())])

    updates = {name: best_update(name) for name in names}
    gates = {group.name: _gates(params, group) for group in groups if group.gates}
    total: dict[str, PairStatistics] | None = None
    for batch in batches:
        sums = pair_statistics(
            params, batch, updates, loss_fn=loss_fn, kinds=kinds, groups=tuple(groups),
            restricted=restricted, gates=gates,
        )  # fmt: skip
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None  # there is a batch
    for group in groups:
        _check_statistics(group, total[group.name], by_name, gates.get(group.name, ()))
    return Measured(kinds, found, jax.tree.map(np.asarray, total), gates)


def _gates(params: PyTree, group: NeuronGroup) -> np.ndarray:
    """Neurons evenly among those that are there.

    Raises:
      ValueError: there is none.
    """
    used = np.flatnonzero(occupied(params, group))
    if not len(used):
        raise ValueError(
            f"neuron group {group.name!r} holds no neuron, and a new one is gated as one that is "
            "there; begin with one at least"
        )
    places = np.linspace(0, len(used) - 1, min(GATES, len(used)))
    return used[np.round(places).astype(int)]


def _check_statistics(
    group: NeuronGroup,
    pair: PairStatistics,
    kinds: Mapping[str, LayerKind],
    gates: Sequence[int] | np.ndarray,
) -> None:
    inputs = np.diag(pair.before).reshape(max(len(gates), 1), -1) > 0
    alive = int(np.max(np.sum(inputs, axis=1)))
    # A normalization takes the mean, and biases with it.
    biases = sum(kinds[name].bias is not None and not group.scales(name) for name in group.makers)
    if alive <= biases or not np.any(np.asarray(pair.projected)):
        what = "inputs" if alive <= biases else "gradients"
        raise ValueError(
            f"neuron group {group.name!r} is dead: the {what} of its layers are 0 on all "
            f"{int(pair.examples)} examples; leave it out of groups"
        )
    if pair.positions < alive:
        each = int(pair.positions // pair.examples)
        raise ValueError(
            f"neuron group {group.name!r} has {alive} inputs; their covariance needs at least "
            f"{math.ceil(alive / each)} examples of {each} positions, found {int(pair.examples)}"
        )
