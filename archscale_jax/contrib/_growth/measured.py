"""What growth measures of a network: bottlenecks, and sums for pairs of layers (theory §8)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.bottleneck import Bottleneck, bottleneck
from archscale_jax.contrib._growth.statistics import PairStatistics, pair_statistics
from archscale_jax.contrib._growth.units import Units
from archscale_jax.tracing.layers import LayerKind, layer_kinds

Loss = Callable[[PyTree, Any], Float[Array, ""]]


class Measured(NamedTuple):
    """What growth needs to know of a network.

    Attributes:
      kinds: of its layers.
      bottlenecks: of the layers that read the units, by the names of weights.
      pairs: sums for the units, by name.
    """

    kinds: tuple[LayerKind, ...]
    bottlenecks: dict[str, Bottleneck]
    pairs: dict[str, PairStatistics]


def measure(
    loss_fn: Loss,
    params: PyTree,
    batches: Sequence[Any],
    units: Sequence[Units],
    *,
    restricted: bool = False,
    cutoff: float = 1e-6,
) -> Measured:
    """Takes the statistics of `grow`, in two jitted passes over the batches.

    Raises:
      TraceError: see `grow`.
      ValueError: see `grow`.
    """
    kinds = layer_kinds(loss_fn, params, batches[0])
    readers = dict.fromkeys(name for one in units for name in one.consumers)
    found = bottleneck(loss_fn, params, batches, layers=tuple(readers), cutoff=cutoff)
    leaves = named_leaves(params)
    by_name = {kind.weight: kind for kind in kinds}

    def best_update(name: str) -> np.ndarray:
        update = {**found[name].update}
        rows = update.pop(name).reshape(-1, leaves[name].shape[-1])
        return np.vstack([rows, *(bias.reshape(1, -1) for bias in update.values())])

    updates = {name: best_update(name) for name in readers}
    total: dict[str, PairStatistics] | None = None
    for batch in batches:
        sums = pair_statistics(
            params, batch, updates, loss_fn=loss_fn, kinds=kinds, units=tuple(units),
            restricted=restricted,
        )  # fmt: skip
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None  # there is a batch
    for one in units:
        _check_statistics(one, total[one.name], by_name)
    return Measured(kinds, found, jax.tree.map(np.asarray, total))


def _check_statistics(units: Units, pair: PairStatistics, kinds: Mapping[str, LayerKind]) -> None:
    alive = int(np.sum(np.diag(pair.before) > 0))
    biases = sum(kinds[name].bias is not None for name in units.producers)
    if alive <= biases or not np.any(np.asarray(pair.projected)):
        what = "inputs" if alive <= biases else "gradients"
        raise ValueError(
            f"units {units.name!r} are dead: the {what} of their layers are 0 on all "
            f"{int(pair.examples)} examples"
        )
    if pair.positions < alive:
        each = int(pair.positions // pair.examples)
        raise ValueError(
            f"units {units.name!r} have {alive} inputs; their covariance needs at least "
            f"{math.ceil(alive / each)} examples of {each} positions, found {int(pair.examples)}"
        )
