"""The arithmetic of a plan: from the costs of trials to the time and the price of a study."""

import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from archscale_jax.tuning._search import find_learning_rate

CURVATURE = 0.1
"""Of the loss, relative to its smallest value, by squared nats from the best rate.

Searches on such losses run as many trainings as in the transfer studies (docs/planning.md).
"""
_LOST = 2.5  # nats above the best rate where trainings are lost
_BEST = np.linspace(-2, 2, 9)  # the best rate, in nats from the start of the search


class Cost(NamedTuple):
    """Seconds of one trial, or of many, on one device.

    Attributes:
      compute: running programs.
      compile: XLA.
      python: tracing and lowering, and building the model.
    """

    compute: float
    compile: float
    python: float

    @property
    def total(self) -> float:
        return sum(self)


class Estimate(NamedTuple):
    """What a study takes.

    Attributes:
      wall: seconds from start to end.
      costs: seconds of all trials together.
      start: seconds before the first trial: importing and reading data.
      workers: workers of use: no more than trials, nor than devices.
      mean_load: seconds of a worker, if all had the same.
      longest: seconds of the longest trial.
      packed: seconds from the first trial to the last, in the order of the study.
      sorted: the same, if trials ran the longest first.
      serial: seconds that no second worker shortens, as threads of one process hold one lock
        while they trace.
      flops: floating-point operations of all trainings.
      device_seconds: wall seconds times devices that are paid.
    """

    wall: float
    costs: Cost
    start: float
    workers: int
    mean_load: float
    longest: float
    packed: float
    sorted: float
    serial: float
    flops: float
    device_seconds: float


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Returns when the last trial ends, if the next one in order goes to the first free worker.

    Raises:
      ValueError: fewer than one worker, or a time that is negative or not finite.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    if not all(0 <= one < math.inf for one in seconds):
        raise ValueError(f"seconds must be finite and not negative, found {list(seconds)}")
    free = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def longest_first(seconds: Sequence[float], workers: int) -> float:
    """`makespan` of the longest-processing-time order, at most 4/3 of the best one [Graham]."""
    return makespan(sorted(seconds, reverse=True), workers)


def estimate(
    phases: Sequence[Sequence[Cost]],
    *,
    workers: int,
    devices: int,
    threads: bool,
    start: float = 0.0,
    flops: float = 0.0,
) -> Estimate:
    """Estimates a study.

    Args:
      phases: costs of the trials of every phase, one phase after the other.
      workers: trials at a time.
      devices: processors, or accelerators; workers beyond them gain nothing.
      threads: whether workers are threads of one process, which trace one at a time.
      start: seconds before the first trial.
      flops: operations of all trainings.

    Raises:
      ValueError: no trial, fewer than one worker or device, or a time out of range.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, found {devices}")
    every = [cost for phase in phases for cost in phase]
    if not every:
        raise ValueError("phases hold no trial: there is nothing to estimate")
    used = min(workers, devices, max(map(len, phases)))
    serial = sum(one.python for one in every) if threads else 0.0
    loads = [[one.total for one in phase] for phase in phases]
    packed = sum(makespan(load, used) for load in loads)
    wall = start + max(packed, serial)
    return Estimate(
        wall=wall,
        costs=Cost(*(sum(parts) for parts in zip(*every, strict=True))),
        start=start,
        workers=used,
        mean_load=sum(map(sum, loads)) / used,
        longest=max(map(max, loads)),
        packed=packed,
        sorted=sum(longest_first(load, used) for load in loads),
        serial=serial,
        flops=flops,
        device_seconds=wall * devices,
    )


def limit(found: Estimate) -> str:
    """Returns what takes the most: `compute`, `compile` (tracing included) or `input` (the start).

    The start counts once for every worker, since all wait for it.
    """
    costs = found.costs
    parts = {
        "compute": costs.compute,
        "compile": costs.compile + costs.python,
        "input": found.start * found.workers,
    }
    return max(parts, key=lambda name: parts[name])


def advice(found: Estimate, *, workers: int, devices: int) -> list[str]:
    """Returns what would make a study shorter or cheaper, a sentence each."""
    lines = []
    if workers > found.workers:
        lines.append(
            f"{workers} workers gain nothing over {found.workers}: there are no more trials, or no "
            "more devices, at a time."
        )
    elif devices > found.workers:
        lines.append(f"{devices - found.workers} devices have no worker: take more workers.")
    if found.packed > 1.1 * max(found.mean_load, found.longest):
        idle = 1 - found.mean_load / found.packed
        lines.append(
            f"Workers are idle for {idle:.0%}: with the longest trials first it would be "
            f"{found.sorted:.0f} s instead of {found.packed:.0f} s."
        )
    if found.workers > 1 and found.longest > found.mean_load:
        lines.append(
            "The longest trial is longer than a worker's share: more workers gain nothing."
        )
    if found.serial > found.packed:
        lines.append("Threads wait for each other while they trace: take --runner=processes.")
    what = limit(found)
    if what == "compile":
        lines.append(
            "Compiling takes the most: longer runs cost little more; "
            "JAX_COMPILATION_CACHE_DIR keeps programs for a second study."
        )
    elif what == "input":
        lines.append("Starting takes the most: put more studies into one call.")
    else:
        lines.append("Computing takes the most: fewer --steps or --num_seeds shorten it.")
    return lines


def count_trainings(
    rates: Sequence[float], seeds: int, start: float, refine: int, curvature: float = CURVATURE
) -> tuple[float, float]:
    """Returns how many trainings a search runs to their end, and how many it loses, on average.

    The search itself is run, on losses that are parabolas over the logarithm of the rate, with the
    best rate up to two nats from the start.

    Args:
      rates: its grid.
      seeds: number of its seeds.
      start: where it starts.
      refine: how often the grid is halved.
      curvature: see `CURVATURE`.
    """
    ended, lost = 0, 0
    for nats in _BEST:
        train = functools.partial(_parabola, math.log(start) + nats, curvature)
        found = find_learning_rate(train, rates, seeds=range(seeds), start=start, refine=refine)
        gone = sum(math.isinf(run.loss) for run in found.runs)
        ended, lost = ended + len(found.runs) - gone, lost + gone
    return ended / len(_BEST), lost / len(_BEST)


def _parabola(best: float, curvature: float, rate: float, seed: int) -> list[float]:
    distance = math.log(rate) - best
    return [math.inf if distance > _LOST else 1 + curvature * distance**2]


def choose_samples(sizes: Sequence[float], count: int) -> list[int]:
    """Returns the indices of so many trials to time: the first, and others spread over sizes.

    The first trial of a process pays for what all share, and so stands for itself alone.

    Raises:
      ValueError: fewer than one.
    """
    if count < 1:
        raise ValueError(f"at least 1 trial must be timed, found {count}")
    order = sorted(range(1, len(sizes)), key=lambda index: (sizes[index], index))
    if not order or count == 1:
        return [0] if sizes else []
    places = np.linspace(0, len(order) - 1, min(count - 1, len(order)))
    return [0, *sorted({order[round(place)] for place in places})]


def interpolate(
    sizes: Sequence[float], timed: Mapping[int, float], first_counts: bool = False
) -> list[float]:
    """Returns the seconds of every trial from those that were timed.

    A line through them over sizes, least squares, with neither slope nor value negative; of one
    time in proportion to size. The first trial is left out of the line unless it is all there is.

    Args:
      sizes: of trials, operations or the like; positive.
      timed: seconds by index.
      first_counts: take the first trial into the line too.
    """
    fitted = {i: s for i, s in timed.items() if i or first_counts} or dict(timed)
    x, y = np.array([sizes[i] for i in fitted]), np.array(list(fitted.values()))
    if len(fitted) > 1 and np.ptp(x) > 0:
        slope, offset = np.polyfit(x, y, 1)
        if slope < 0:
            slope, offset = 0.0, y.mean()
        elif offset < 0:
            slope, offset = np.vdot(x, y) / np.vdot(x, x), 0.0
    else:
        slope, offset = (y.mean() / x.mean(), 0.0) if len(fitted) == 1 else (0.0, y.mean())
    return [timed.get(i, float(max(offset + slope * size, 0.0))) for i, size in enumerate(sizes)]
