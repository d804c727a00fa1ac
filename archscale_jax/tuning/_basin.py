"""The best learning rate from losses at several rates: the vertex of a parabola, and its basin.

Near its minimum the loss is flat, and the rate of the smallest loss jumps from seed to seed; the
vertex of a parabola through the losses around it, in log rate, does not. It is held inside the
basin, the rates whose loss is within a tolerance of the smallest. Where the loss falls until runs
diverge there is no vertex, and the answer is the best rate that was trained. Tolerance, margin and
excess are fractions of |min|, the size of the smallest loss, which may be negative; where it is 0,
of the median of what the larger finite losses exceed it by.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from archscale_jax._deprecated import renamed_field


class Basin(NamedTuple):
    """The rates that do about as well as the best one.

    Attributes:
      rate: the vertex of the parabola, inside the basin; the best rate trained where the loss falls
        until runs diverge or the rates end.
      lower: where the loss leaves the tolerance on the side of small rates, interpolated.
      upper: the same on the side of large rates; halfway (in log rate) to a rate that diverged.
      loss: the smallest loss.
      bracketed: whether a rate outside the tolerance was seen below, and above.
    """

    rate: float
    lower: float
    upper: float
    loss: float
    bracketed: tuple[bool, bool]

    closed = renamed_field("closed", "bracketed")


def find_basin(losses: Mapping[float, float], tolerance: float = 0.02) -> Basin:
    """Returns the basin of losses by rate, inf where a run diverged; one at least is finite."""
    logs, values = _curve(losses)
    best = _best(values)
    limit = loss_limit(values, tolerance)
    edges = []
    for step in (-1, 1):
        inside = best
        while 0 <= inside + step < len(values) and values[inside + step] <= limit:
            inside += step
        outside = inside + step
        if not 0 <= outside < len(values):
            edges.append((logs[inside], False))
        else:
            rise = values[outside] - values[inside]
            part = (limit - values[inside]) / rise if math.isfinite(rise) else 0.5
            edges.append((logs[inside] + part * (logs[outside] - logs[inside]), True))
    (lower, below), (upper, above) = edges
    vertex = np.clip(_answer(logs, values, tolerance)[0], lower, upper)
    rate, lower, upper = (math.exp(value) for value in (vertex, lower, upper))
    return Basin(rate, lower, upper, float(values[best]), (below, above))


def loss_at(rate: float, losses: Mapping[float, float]) -> float:
    """Returns the loss at a rate, interpolated in log rate; that of the nearest one outside.

    Args:
      rate: above 0.
      losses: loss by rate, in rising order, such as `mean_losses` gives.
    """
    logs = np.log(list(losses))
    values = np.asarray(list(losses.values()))
    position = np.interp(math.log(rate), logs, np.arange(len(logs)))
    below, part = int(position), position % 1
    if part == 0:
        return float(values[below])
    return float((1 - part) * values[below] + part * values[below + 1])


def excess_loss(rate: float, losses: Mapping[float, float]) -> float:
    """Returns by what fraction of the size of the smallest loss the loss at a rate exceeds it.

    (loss − min)/|min|, never negative. Where min is 0: over the median of what the larger finite
    losses exceed it by.
    """
    return excess_of(loss_at(rate, losses), losses.values())


def excess_of(loss: float, losses: Iterable[float]) -> float:
    """Returns by what fraction of its size a loss exceeds the smallest; see `excess_loss`."""
    values = np.asarray(list(losses))
    return max(loss - float(values.min()), 0.0) / _scale(values)


def grid_error(
    means: Mapping[float, float],
    curves: Sequence[Mapping[float, float]],
    seed_rates: Sequence[float],
    tolerance: float,
) -> float:
    """How far the minimum may lie from the answer beside what the seeds tell, see `RateSearch`."""
    logs, values = _curve(means)
    if len(logs) == 1:  # as where the rates end on both sides
        return math.inf
    answer, gap = _answer(logs, values, tolerance)
    if gap:
        return gap / math.sqrt(3)
    seeds = [_curve(curve)[1] for curve in curves]
    best, squares = _best(values), []
    low, high = logs[max(best - 1, 0)], logs[min(best + 1, len(logs) - 1)]
    for first in range(max(best - 2, 0), min(best, len(logs) - 3) + 1):
        three = slice(first, first + 3)
        if not np.all(np.isfinite(values[three])):
            continue
        square = (np.clip(_vertex(logs[three], values[three]), low, high) - answer) ** 2
        if len(seeds) > 1:  # the noise of the distance is counted once, in the seeds' answers
            vertices = [np.clip(_vertex(logs[three], one[three]), low, high) for one in seeds]
            square -= 2 * np.var(np.asarray(vertices) - np.log(seed_rates), ddof=1) / len(seeds)
        squares.append(square)
    if len(squares) < 2:  # nothing tells the shape: anywhere between the neighbours
        return float(high - low) / math.sqrt(12)
    return math.sqrt(max(*squares, 0.0))


def _curve(losses: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Log rates, rising, and the losses at them."""
    rates = sorted(losses)
    return np.log(np.asarray(rates)), np.asarray([losses[rate] for rate in rates])


def _best(values: np.ndarray) -> int:
    """Where the smallest loss is; the largest of equal rates."""
    return len(values) - 1 - int(np.argmin(values[::-1]))


def _answer(logs: np.ndarray, values: np.ndarray, tolerance: float) -> tuple[float, float]:
    """The best log rate, and how far the next rate is on a side that does not bracket it.

    That is 0 where finite losses on both sides bracket the minimum, inf where the rates end.
    """
    best, count = _best(values), len(values)
    near = np.isfinite(values) & (values <= loss_limit(values, tolerance))
    near[max(best - 1, 0) : best + 2] |= np.isfinite(values[max(best - 1, 0) : best + 2])
    if near.sum() < 3:  # the minimum has one neighbour: take the one behind that too
        near[max(best - 2, 0) : best + 3] |= np.isfinite(values[max(best - 2, 0) : best + 3])
    vertex = _vertex(logs[near], values[near])
    if vertex != logs[best]:
        beside = best + (1 if vertex > logs[best] else -1)
        if not 0 <= beside < count:
            return float(logs[best]), math.inf
        if not math.isfinite(values[beside]):
            return float(logs[best]), abs(float(logs[beside] - logs[best]))
    return (vertex if math.isfinite(vertex) else float(np.mean(logs[near]))), 0.0


def _vertex(logs: np.ndarray, values: np.ndarray) -> float:
    """Where the parabola through points has its minimum; -inf or inf, downhill, if it has none."""
    if np.ptp(values) == 0:
        return float(np.mean(logs))
    middle = np.mean(logs)
    *curvature, slope, _ = np.polyfit(logs - middle, values, min(len(logs) - 1, 2)).tolist()
    if not curvature or curvature[0] <= 0:
        return -math.copysign(math.inf, slope)
    return float(middle - slope / (2 * curvature[0]))


def _scale(values: np.ndarray) -> float:
    """What tolerance, margin and excess are fractions of: |min|, see the module."""
    smallest = float(values.min())
    if smallest:
        return abs(smallest)
    above = values[(values > smallest) & np.isfinite(values)]
    return float(np.median(above)) if len(above) else 1.0


def loss_limit(values: Iterable[float], fraction: float) -> float:
    """The largest loss within a fraction of the smallest; inf where there is none."""
    losses = np.asarray(list(values))
    smallest = float(losses.min(initial=math.inf))
    return smallest + fraction * _scale(losses) if math.isfinite(smallest) else math.inf
