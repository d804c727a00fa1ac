"""From statistics to new neurons, on the host in float64, and what they promise (theory §8)."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth import candidates
from archscale_jax.contrib._growth.measured import Measured
from archscale_jax.contrib._growth.neurons import Neurons
from archscale_jax.contrib._growth.statistics import blocks
from archscale_jax.contrib._growth.units import Units
from archscale_jax.contrib._growth.widen import taken


def solve(
    params: PyTree,
    measured: Measured,
    units: Sequence[Units],
    *,
    method: str = "tiny",
    restricted: bool = False,
    normalize: bool = False,
    number: int | Mapping[str, int] | None = None,
    threshold: float = 1e-3,
    budget: int | None = None,
    cutoff: float = 1e-6,
    key: Array | None = None,
) -> dict[str, Neurons]:
    """Returns the new neurons of units by name, computed on the host in float64; see `grow`."""
    found = {}
    for index, one in enumerate(units):
        pair = measured.pairs[one.name]
        most = number.get(one.name) if isinstance(number, Mapping) else number
        found[one.name] = candidates.directions(
            pair,
            method,
            number=min(pair.projected.shape) if most is None else most,
            threshold=threshold,
            cutoff=cutoff,
            key=None if key is None else jax.random.fold_in(key, index),
        )
    if budget is not None:
        numbers = candidates.within_budget(found, budget)
        found = {name: candidates.first(one, numbers[name]) for name, one in found.items()}
    if normalize or method != "tiny":
        leaves = named_leaves(params)
        for one in units:
            both = blocks(one, measured.kinds, params, restricted)
            used = np.flatnonzero(taken(params, one))
            found[one.name] = candidates.normalized(found[one.name], leaves, *both, used)
    return found


def predicted_decrease(
    neurons: Mapping[str, Neurons],
    measured: Measured,
    units: Sequence[Units],
    *,
    update: bool = False,
) -> float:
    """Returns -dL/d(γ²) of neurons at γ = 0 on the batches that were measured.

    Σ <V, ω σ'(0) α B⁻>/n, and with `update` Σ <V, δW* B>/n too. Of TINY's neurons σ'(0) Σλ² is the
    part beyond δW*; the rest is what they have in common with it.

    Args:
      neurons: see `solve`.
      measured: see `measure`.
      units: see `grow`.
      update: as for `grow`.
    """
    total = 0.0
    for one in units:
        pair, new = measured.pairs[one.name], neurons[one.name]
        moments = np.asarray(pair.targets, np.float64) / float(pair.examples)
        total += one.slope * float(np.vdot(new.fan_in @ new.fan_out, moments))
    if update:
        for name in dict.fromkeys(name for one in units for name in one.consumers):
            total += measured.bottlenecks[name].explained
    return total
