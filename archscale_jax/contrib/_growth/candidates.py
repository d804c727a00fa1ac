"""Which new neurons: directions by TINY, GradMax or at random, their sizes, and how many."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from archscale_jax.contrib._growth.neurons import Neurons, new_neurons, with_sign
from archscale_jax.contrib._growth.statistics import Block, PairStatistics

METHODS = ("tiny", "gradmax", "random")


def directions(
    statistics: PairStatistics,
    method: str,
    *,
    number: int,
    threshold: float,
    cutoff: float,
    key: Array | None,
) -> Neurons:
    """Returns at most so many new neurons, by falling worth.

    `tiny` takes the closed form [TINY]. `gradmax` has fan-ins of 0 and the fan-outs that make the
    gradient by them the largest, without the covariance of inputs [GradMax]. `random` draws both.

    Args:
      statistics: sums.
      method: `tiny`, `gradmax` or `random`.
      number: the most neurons.
      threshold: of `tiny`, the smallest λ.
      cutoff: of `tiny`, see `new_neurons`.
      key: of `random`.
    """
    # Rounding must not reach into empty rooms, nor random weights to inputs that are always 0.
    into = np.diag(np.asarray(statistics.before)) > 0
    out = np.any(np.asarray(statistics.targets) != 0, axis=0)
    found = _directions(statistics, method, number, threshold, cutoff, key)
    return found._replace(fan_in=found.fan_in * into[:, None], fan_out=found.fan_out * out)


def _directions(
    statistics: PairStatistics,
    method: str,
    number: int,
    threshold: float,
    cutoff: float,
    key: Array | None,
) -> Neurons:
    rows, columns = statistics.projected.shape
    if method == "tiny":
        return new_neurons(
            statistics.before,
            statistics.projected,
            statistics.examples,
            number=number,
            threshold=threshold,
            cutoff=cutoff,
        )
    if method == "gradmax":
        moment = np.asarray(statistics.targets, np.float64) / float(statistics.examples)
        if not np.all(np.isfinite(moment)):
            raise ValueError("the statistics are not finite: the loss or its gradient overflows")
        _, values, right = np.linalg.svd(moment, full_matrices=False)
        kept = np.flatnonzero(values > 0)[:number]
        return with_sign(Neurons(np.zeros((rows, len(kept))), right[kept], values[kept]))
    assert key is not None  # checked by grow
    keys = jax.random.split(key)
    fan_in = np.asarray(jax.random.normal(keys[0], (rows, number)), np.float64)
    fan_out = np.asarray(jax.random.normal(keys[1], (number, columns)), np.float64)
    return Neurons(fan_in, fan_out, np.zeros(number))


def normalized(
    neurons: Neurons,
    leaves: Mapping[str, Any],
    made: list[Block],
    read: list[Block],
    places: np.ndarray,
) -> Neurons:
    """Gives new neurons the size of those that are: the root mean squares of both sides' norms.

    Args:
      neurons: new ones.
      leaves: weights by name.
      made: see `blocks`.
      read: see `blocks`.
      places: the rooms that hold a neuron; where there is none, nothing is done.
    """
    if not len(places) or not len(neurons.singular_values):
        return neurons
    fan_in = [np.asarray(leaves[one.weight])[..., places].reshape(-1, len(places)) for one in made]
    rooms = leaves[made[0].weight].shape[-1]
    fan_out = []
    for one in read:
        leaf = np.asarray(leaves[one.weight])
        fan_out.append(leaf.reshape(-1, rooms, leaf.shape[-1])[:, places])

    def scale(new: np.ndarray, old: float) -> float:
        size = np.sqrt(np.mean(np.sum(np.square(new), axis=0)))
        return old / size if size > 0 and old > 0 else 1.0

    def norm(parts: list[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum(np.square(part.astype(np.float64))) for part in parts)
                             / len(places)))  # fmt: skip

    return neurons._replace(
        fan_in=neurons.fan_in * scale(neurons.fan_in, norm(fan_in)),
        fan_out=neurons.fan_out * scale(neurons.fan_out.T, norm(fan_out)),
    )


def within_budget(found: Mapping[str, Neurons], budget: int) -> dict[str, int]:
    """Returns how many neurons of each units a number of parameters buys, the best value first.

    The worth of a neuron is λ², its price the parameters of its fan-in and fan-out; of `random`,
    whose λ are 0, units take turns.

    Args:
      found: candidates by the names of units, by falling λ.
      budget: parameters.
    """
    offers = []
    for name, neurons in found.items():
        price = len(neurons.fan_in) + neurons.fan_out.shape[1]
        for rank, value in enumerate(neurons.singular_values):
            offers.append((-(value**2) / price, rank, name, price))
    numbers = dict.fromkeys(found, 0)
    closed: set[str] = set()
    for _, _, name, price in sorted(offers):
        if name in closed or price > budget:
            closed.add(name)  # the neurons of units are taken in order
            continue
        budget -= price
        numbers[name] += 1
    return numbers


def first(neurons: Neurons, number: int) -> Neurons:
    """Returns the first so many neurons."""
    return Neurons(
        neurons.fan_in[:, :number], neurons.fan_out[:number], neurons.singular_values[:number]
    )


def changes(
    neurons: Neurons,
    leaves: Mapping[str, Any],
    made: list[Block],
    read: list[Block],
    rooms: Int[np.ndarray, " k"],
) -> dict[str, np.ndarray]:
    """Returns what K neurons of amplitude 1 add to leaves, by name, 0 elsewhere.

    Args:
      neurons: new ones.
      leaves: arrays by name, with rooms for them.
      made: see `blocks`.
      read: see `blocks`.
      rooms: where they go.
    """
    count = leaves[made[0].weight].shape[-1]
    found: dict[str, np.ndarray] = {}
    parts = np.split(neurons.fan_in, np.cumsum([block.size for block in made])[:-1])
    for block, rows in zip(made, parts, strict=True):
        weight = np.zeros(leaves[block.weight].shape)
        if block.bias is not None:
            found[block.bias] = np.zeros(leaves[block.bias].shape)
            found[block.bias][..., rooms] = rows[-1]
            rows = rows[:-1]
        kernel = weight.shape[:-2]  # a layer that reads what it makes has rooms on both sides
        inputs = len(rows) // math.prod(kernel)
        weight[..., :inputs, rooms] = rows.reshape(*kernel, inputs, len(rooms))
        found[block.weight] = weight
    parts = np.split(neurons.fan_out, np.cumsum([block.size for block in read])[:-1], axis=1)
    for block, columns in zip(read, parts, strict=True):
        shape = leaves[block.weight].shape
        weight = np.zeros((math.prod(shape[:-1]) // count, count, shape[-1]))
        outputs = block.size // len(block.entries)
        new = columns.reshape(len(rooms), len(block.entries), outputs)
        weight[np.asarray(block.entries)[:, None], rooms, :outputs] = new.swapaxes(0, 1)
        found[block.weight] = found.get(block.weight, 0) + weight.reshape(shape)
    return {name: value.astype(leaves[name].dtype) for name, value in found.items()}
