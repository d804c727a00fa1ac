"""What growth measures of a network: bottlenecks, and sums for pairs of layers (theory §8)."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from archscale_jax._trees import PyTree
from archscale_jax.contrib._growth.bottleneck import Bottleneck, bottlenecks, layer_sums
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup, readers
from archscale_jax.contrib._growth.statistics import PairStatistics, batch_arrays, pair_statistics
from archscale_jax.contrib._growth.widen import occupied
from archscale_jax.tracing.layers import LayerKind, Loss

Sums = TypeVar("Sums")
GATES = 8
"""The most neurons of a group whose gates new ones may have; sums grow with their square."""


class Measured(NamedTuple):
    """What growth needs to know of a network.

    Attributes:
      kinds: of the layers of the groups.
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
    """Takes the statistics of `grow`, in two passes over the batches.

    The first gives δW*, the second what is asked for beyond it. The loss and its gradient run twice
    on every batch but the last, whose arrays are still there; those of no other are kept.

    Raises:
      TraceError: see `grow`.
      ValueError: see `grow`.
    """
    groups, names = tuple(groups), readers(groups)
    gates = {group.name: _gates(params, group) for group in groups if group.gates}
    run = functools.partial(batch_arrays, params, gates=gates, loss_fn=loss_fn, groups=groups)
    arrays = sums = pairs = None
    for batch in batches:
        arrays = None  # frees those of the batch before
        arrays = run(batch)
        sums = _added(sums, layer_sums({name: arrays.gradients[name] for name in names}))
    assert arrays is not None and sums is not None  # there is a batch
    kinds = {name: one.kind for name, one in arrays.gradients.items()}
    found = bottlenecks([kinds[name] for name in names], sums, params, cutoff)
    updates = {name: _rows(name, found[name].update) for name in names}
    for batch in reversed(batches):
        arrays = arrays or run(batch)
        new = pair_statistics(arrays, updates, groups=groups, restricted=restricted)
        pairs, arrays = _added(pairs, new), None
    total: dict[str, PairStatistics] = jax.tree.map(np.asarray, pairs)
    for group in groups:
        _check_statistics(group, total[group.name], kinds, gates.get(group.name, ()))
    return Measured(tuple(kinds.values()), found, total, gates)


def _added(total: Sums | None, new: Sums) -> Sums:
    return new if total is None else jax.tree.map(jnp.add, total, new)


def _rows(name: str, update: Mapping[str, np.ndarray]) -> Float[np.ndarray, "r o"]:
    """The change of a weight, and of its bias as one more row."""
    weight, *bias = (update[name], *(one for leaf, one in update.items() if leaf != name))
    return np.vstack([weight.reshape(-1, weight.shape[-1]), *(one.reshape(1, -1) for one in bias)])


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
