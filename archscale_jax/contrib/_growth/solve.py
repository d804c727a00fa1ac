"""From statistics to new neurons, on the host in float64, and what they promise (theory §8).

Directions by TINY, by GradMax or at random; how many; and their sizes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.measured import Measured
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup, readers
from archscale_jax.contrib._growth.neurons import (
    Neurons,
    finite,
    gated_neurons,
    new_neurons,
    with_sign,
)
from archscale_jax.contrib._growth.statistics import Block, PairStatistics, blocks, deviations
from archscale_jax.contrib._growth.widen import occupied

METHODS = ("tiny", "gradmax", "random")


def solve(
    params: PyTree,
    measured: Measured,
    groups: Sequence[NeuronGroup],
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
    """Returns the new neurons by the names of groups; see `grow`."""
    found = {}
    for index, group in enumerate(groups):
        pair = measured.pairs[group.name]
        limit = number.get(group.name) if isinstance(number, Mapping) else number
        limit = min(pair.projected.shape) if limit is None else limit
        gates = len(measured.gates.get(group.name, ()))
        sums = pair.before, pair.projected, pair.examples
        options = {"number": limit, "threshold": threshold, "cutoff": cutoff}
        if method == "tiny":
            new = gated_neurons(*sums, gates, **options) if gates else new_neurons(*sums, **options)
        elif method == "gradmax":
            new = _largest_gradients(pair, limit)
        else:
            assert key is not None  # checked by grow
            new = _random(pair, limit, max(gates, 1), jax.random.fold_in(key, index))
        # Rounding must not reach into empty slots, nor random weights to inputs that are always 0.
        fan_in = new.fan_in * (np.diag(np.asarray(pair.before)) > 0)[:, None]
        fan_out = new.fan_out * np.any(np.asarray(pair.targets) != 0, axis=0)
        found[group.name] = new._replace(fan_in=fan_in, fan_out=fan_out)
    if budget is not None:
        prices = {group.name: _price(params, group, measured, restricted) for group in groups}
        numbers = _within_budget(found, prices, budget)
        found = {name: new.first(numbers[name]) for name, new in found.items()}
    if normalize or method != "tiny":
        leaves = named_leaves(params)
        for group in groups:
            both = blocks(group, measured.kinds, params, restricted)
            used = np.flatnonzero(occupied(params, group))
            pair = measured.pairs[group.name]
            found[group.name] = _normalized(found[group.name], group, pair, leaves, *both, used)
    return found


def _largest_gradients(statistics: PairStatistics, number: int) -> Neurons:
    """Fan-ins of 0, and the fan-outs that make the gradient by them the largest [GradMax]."""
    moment = finite("targets", statistics.targets) / float(statistics.examples)
    _, values, right = np.linalg.svd(moment, full_matrices=False)
    kept = np.flatnonzero(values > 0)[:number]
    return with_sign(Neurons(np.zeros((len(moment), len(kept))), right[kept], values[kept]))


def _random(statistics: PairStatistics, number: int, gates: int, key: Array) -> Neurons:
    """Neurons with random weights; the gates take turns."""
    rows, columns = statistics.projected.shape
    keys = jax.random.split(key)
    fan_in = np.asarray(jax.random.normal(keys[0], (rows, number)), np.float64)
    fan_in = fan_in * (
        np.repeat(np.arange(gates), rows // gates)[:, None] == np.arange(number) % gates
    )
    fan_out = np.asarray(jax.random.normal(keys[1], (number, columns)), np.float64)
    return Neurons(fan_in, fan_out, np.zeros(number))


def _price(params: PyTree, group: NeuronGroup, measured: Measured, restricted: bool) -> int:
    """Returns the parameters of the fan-in and fan-out of a neuron, and of its gates."""
    made, read = blocks(group, measured.kinds, params, restricted)
    leaves = named_leaves(params)
    gates = sum(math.prod(leaves[name].shape[:-1]) for name in group.gates)
    return sum(block.size for block in (*made, *read)) + gates


def _within_budget(
    found: Mapping[str, Neurons], prices: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Returns how many neurons of each group a number of parameters buys, the best value first.

    The worth of a neuron is λ², its price the parameters of its fan-in and fan-out; of random ones,
    whose λ are 0, groups take turns.
    """
    offers = []
    for name, neurons in found.items():
        price = prices[name]
        for rank, value in enumerate(neurons.singular_values):
            offers.append((-(value**2) / price, rank, name, price))
    numbers = dict.fromkeys(found, 0)
    done: set[str] = set()
    for _, _, name, price in sorted(offers):
        if name in done or price > budget:
            done.add(name)  # the neurons of a group are taken in order
            continue
        budget -= price
        numbers[name] += 1
    return numbers


def _normalized(
    neurons: Neurons,
    group: NeuronGroup,
    pair: PairStatistics,
    leaves: Mapping[str, Any],
    made: list[Block],
    read: list[Block],
    places: np.ndarray,
) -> Neurons:
    """Gives new neurons the size of those at `places`: the root mean squares of both norms.

    Behind a batch normalization the entry in its scale is the size of a neuron, not its fan-in.
    """
    if not len(places) or not neurons.number:
        return neurons
    capacity = leaves[made[0].weight].shape[-1]
    new_in = list(deviations(group, made, pair, neurons.fan_in).values()) or [neurons.fan_in]
    fan_in = [
        np.take(np.asarray(leaves[name]), places, axis)
        for one in made for name, axis in group.scales(one.weight)[:1]
    ] or [np.asarray(leaves[one.weight])[..., places] for one in made]  # fmt: skip
    fan_out = []
    for one in read:
        leaf = np.asarray(leaves[one.weight])
        fan_out.append(leaf.reshape(-1, capacity, leaf.shape[-1])[:, places])

    def scale(new: list[np.ndarray], old: list[np.ndarray]) -> float:
        size = np.sqrt(sum(np.sum(np.square(one)) for one in new) / neurons.number)
        total = sum(float(np.sum(np.square(part.astype(np.float64)))) for part in old)
        return np.sqrt(total / len(places)) / size if size > 0 and total > 0 else 1.0

    return neurons._replace(
        fan_in=neurons.fan_in * scale(new_in, fan_in),
        fan_out=neurons.fan_out * scale([neurons.fan_out], fan_out),
    )


def predicted_decrease(
    neurons: Mapping[str, Neurons],
    measured: Measured,
    groups: Sequence[NeuronGroup],
    *,
    update: bool = False,
) -> float:
    """Returns -dL/d(γ²) of neurons at γ = 0 on the batches that were measured.

    Σ <V, ω σ'(0) α B⁻>/n, and with `update` Σ <V, δW* B>/n too. Of TINY's neurons σ'(0) Σλ² is the
    part beyond δW*; the rest is what they have in common with it.
    """
    total = 0.0
    for group in groups:
        pair, new = measured.pairs[group.name], neurons[group.name]
        moments = np.asarray(pair.targets, np.float64) / float(pair.examples)
        total += group.slope * float(np.vdot(new.fan_in @ new.fan_out, moments))
    if update:
        for name in readers(groups):
            total += measured.bottlenecks[name].explained
    return total
