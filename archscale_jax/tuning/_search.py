"""Search for the learning rate of a network: the paper's protocol, made stable [AAS §4 protocol].

The protocol takes the largest rate with the smallest training loss after one epoch. Near its
minimum the loss is flat and that argmin jumps from seed to seed. The answer here is the vertex of a
parabola through the losses around the minimum, in log rate, held inside the basin: the rates whose
loss is within a tolerance of the smallest. Where the loss falls until runs diverge there is no such
vertex, and the answer is the best rate that was trained.

Tolerance, margin and excess are fractions of the size of the smallest loss, |min|, so that they
hold for negative losses too, such as log-likelihoods of densities. Where the smallest loss is 0
they are fractions of the median of what the larger finite losses exceed it by.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

Train = Callable[[float, int], Iterable[float]]
Losses = dict[tuple[float, int], float]


class Run(NamedTuple):
    """One training: its rate, its seed and the training loss at its end, inf where it was lost."""

    rate: float
    seed: int
    loss: float


class Basin(NamedTuple):
    """The rates that do about as well as the best one.

    Attributes:
      rate: the vertex of the parabola, inside the basin; the best rate trained where the loss falls
        until runs diverge or the rates end.
      lower: where the loss leaves the tolerance on the side of small rates, interpolated.
      upper: the same on the side of large rates; halfway (in log rate) to a rate that was lost.
      loss: the smallest loss.
      closed: whether a rate outside the tolerance was seen below, and above.
    """

    rate: float
    lower: float
    upper: float
    loss: float
    closed: tuple[bool, bool]


class RateSearch(NamedTuple):
    """What `find_learning_rate` found.

    Attributes:
      rate: the learning rate.
      uncertainty: its standard error in nats of log rate: the root of the sum of the squares of
        `seed_error` and `grid_error`; nan for one seed.
      basin: of the mean loss over seeds.
      seed_rates: the answer of every seed alone.
      runs: every training, by rate and seed.
      seed_error: the standard error of the seeds' answers in nats; nan for one seed.
      grid_error: what the spacing of the rates and the shape of the curve add, in nats. Between
        finite losses: the largest distance from the answer to the vertex of a parabola through
        three rates in a row, of which one is the best, less the part of it that the seeds explain;
        0 where the losses lie on one parabola. Where the loss falls until runs diverge: the
        distance to the next rate over √3, the RMS error of the lower end of that interval. inf
        where the loss falls until the rates end.
    """

    rate: float
    uncertainty: float
    basin: Basin
    seed_rates: tuple[float, ...]
    runs: tuple[Run, ...]
    seed_error: float
    grid_error: float


def find_learning_rate(
    train: Train,
    rates: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    start: float | None = None,
    tolerance: float = 0.02,
    margin: float = 0.25,
    refine: int = 1,
    max_loss: float = math.inf,
    workers: int = 1,
) -> RateSearch:
    """Finds the learning rate with which a network trains best.

    Without `start` every rate is trained with every seed. With it, the first seed walks from there
    up and down the grid until the loss leaves `margin`, and the other seeds train only the rates
    that can win. Then the spacing around the minimum is halved.

    Args:
      train: `(rate, seed)` to the training losses of successive parts of a run from scratch, of
        any sign, of which the last one counts. A run is stopped, and lost, when a loss is not
        finite or exceeds `max_loss`. It must depend on its arguments alone; with several workers it
        is called from several threads.
      rates: the grid, e.g. `numpy.geomspace(1e-3, 4, 13)`.
      seeds: seeds of the runs.
      start: a guess, such as `predict_learning_rate` gives.
      tolerance: depth of the basin, as a fraction of the size of the smallest loss.
      margin: with `start`, losses within this fraction of the smallest can still win.
      refine: how often the spacing of the rates in the basin is halved.
      max_loss: see `train`.
      workers: runs at a time, in threads.

    Raises:
      TypeError: rates that are no numbers, seeds that are no sequence, or a `train` that does not
        return or yield losses; a single number, of Python, NumPy or JAX, is not accepted.
      ValueError: rates that are not positive, finite and different, seeds that are missing or
        repeated, a tolerance or margin that is not positive, `workers` below 1, a `train` that
        yields no loss, or no rate with a finite loss for every seed.
    """
    grid, seeds = _checked(rates, seeds, start, tolerance, margin)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    losses: Losses = {}
    with ThreadPoolExecutor(workers) as pool:

        def run(pairs: Iterable[tuple[float, int]]) -> None:
            missing = [pair for pair in pairs if pair not in losses]
            ends = pool.map(lambda pair: _last_loss(train, pair, max_loss), missing)
            losses.update(zip(missing, ends, strict=True))

        if start is None:
            run((rate, seed) for rate in grid for seed in seeds)
        else:
            _walk(run, losses, grid, seeds[0], start, margin)
            _follow(run, losses, grid, seeds, margin, tolerance)
        for _ in range(refine):
            rates = _midpoints(_mean_losses(losses, seeds), tolerance)
            run((rate, seed) for rate in rates for seed in seeds)
    runs = tuple(Run(rate, seed, loss) for (rate, seed), loss in sorted(losses.items()))
    return summarise_runs(runs, tolerance=tolerance)


def summarise_runs(runs: Iterable[Run], *, tolerance: float = 0.02) -> RateSearch:
    """Returns the answer that runs give; rates that not every seed has trained are left out.

    Raises:
      ValueError: no rate has a finite loss for every seed.
    """
    runs = tuple(sorted(runs))
    losses = {(run.rate, run.seed): run.loss for run in runs}
    seeds = sorted({run.seed for run in runs})
    means = _mean_losses(losses, seeds)
    if not any(map(math.isfinite, means.values())):
        tried = sorted({run.rate for run in runs})
        raise ValueError(
            f"no rate from {min(tried, default=math.nan):.3g} to {max(tried, default=math.nan):.3g}"
            f" ends with a finite loss for every seed of {seeds}; try smaller rates"
        )
    curves = [{rate: losses[rate, seed] for rate in means} for seed in seeds]
    basin = find_basin(means, tolerance)
    seed_rates = tuple(find_basin(curve, tolerance).rate for curve in curves)
    logs = list(map(math.log, seed_rates))
    seed_error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    grid_error = _grid_error(means, curves, seed_rates, tolerance)
    uncertainty = math.sqrt(seed_error**2 + grid_error**2)  # of nan and inf: nan
    return RateSearch(basin.rate, uncertainty, basin, seed_rates, runs, seed_error, grid_error)


def mean_losses(search: RateSearch) -> dict[float, float]:
    """Returns the mean loss over seeds of every rate that all seeds have trained, by rate."""
    losses = {(run.rate, run.seed): run.loss for run in search.runs}
    return _mean_losses(losses, sorted({run.seed for run in search.runs}))


def find_basin(losses: Mapping[float, float], tolerance: float = 0.02) -> Basin:
    """Returns the basin around the smallest loss.

    Args:
      losses: loss by rate, inf where lost; one at least is finite.
      tolerance: depth of the basin, as a fraction of the size of the smallest loss.
    """
    logs, values = _curve(losses)
    best = _best(values)
    limit = _limit(values, tolerance)
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
    (lower, low_seen), (upper, high_seen) = edges
    vertex = np.clip(_answer(logs, values, tolerance)[0], lower, upper)
    rate, lower, upper = (math.exp(value) for value in (vertex, lower, upper))
    return Basin(rate, lower, upper, float(values[best]), (low_seen, high_seen))


def loss_at(rate: float, losses: Mapping[float, float]) -> float:
    """Returns the loss at a rate, interpolated in log rate; that of the nearest one outside."""
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
    values = np.asarray(list(losses.values()))
    excess = max(loss_at(rate, losses) - float(values.min()), 0.0)
    return excess / _scale(values)


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
    near = np.isfinite(values) & (values <= _limit(values, tolerance))
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
    curvature, slope = 0.0, float(np.polyfit(logs - middle, values, 1)[0])
    if len(logs) > 2:
        curvature, slope, _ = np.polyfit(logs - middle, values, 2)
    if curvature <= 0:
        return -math.copysign(math.inf, slope)
    return float(middle - slope / (2 * curvature))


def _grid_error(
    means: Mapping[float, float],
    curves: Sequence[Mapping[float, float]],
    seed_rates: Sequence[float],
    tolerance: float,
) -> float:
    """How far the minimum may lie from the answer beside what the seeds tell, see `RateSearch`."""
    logs, values = _curve(means)
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


def _scale(values: np.ndarray) -> float:
    """What tolerance, margin and excess are fractions of: |min|, see the module."""
    smallest = float(values.min())
    if smallest:
        return abs(smallest)
    above = values[(values > smallest) & np.isfinite(values)]
    return float(np.median(above)) if len(above) else 1.0


def _limit(values: Iterable[float], fraction: float) -> float:
    """The largest loss within a fraction of the smallest; inf where there is none."""
    losses = np.asarray(list(values))
    smallest = float(losses.min(initial=math.inf))
    return smallest + fraction * _scale(losses) if math.isfinite(smallest) else math.inf


def _last_loss(train: Train, pair: tuple[float, int], max_loss: float) -> float:
    parts = train(*pair)
    # JAX and NumPy arrays without axes are Iterable by their class, and cannot be iterated.
    if not isinstance(parts, Iterable) or getattr(parts, "ndim", 1) == 0:
        raise TypeError(
            f"train{pair} returned {parts!r}; accepted are training losses in a row: yield them, "
            "or return [loss]"
        )
    loss = None
    for part in parts:
        loss = _number(part, pair)
        if not (math.isfinite(loss) and loss <= max_loss):
            return math.inf
    if loss is None:
        raise ValueError(
            f"train{pair} yielded no loss; accepted is one at least: check that its data gives a "
            "batch and that it trains at least one step"
        )
    return loss


def _number(part: Any, pair: tuple[float, int]) -> float:
    try:
        return float(part)
    except (TypeError, ValueError):
        raise TypeError(
            f"train{pair} yielded {part!r}; accepted are numbers: yield the loss alone, as a scalar"
        ) from None


def _mean_losses(losses: Losses, seeds: Sequence[int]) -> dict[float, float]:
    """Mean loss of the rates that every seed has trained."""
    rates = sorted({rate for rate, _ in losses})
    return {
        rate: statistics.fmean(losses[rate, seed] for seed in seeds)
        for rate in rates
        if all((rate, seed) in losses for seed in seeds)
    }


def _walk(run, losses: Losses, grid: list[float], seed: int, start: float, margin: float) -> None:
    """Trains one seed from the rate nearest to `start` up and down, until the loss is too high."""
    first = int(np.argmin(np.abs(np.log(np.asarray(grid) / start))))
    for step in (1, -1):
        for index in range(first, len(grid) if step > 0 else -1, step):
            run([(grid[index], seed)])
            found = losses[grid[index], seed]
            if found > _limit(losses.values(), margin) or (step > 0 and math.isinf(found)):
                break


def _follow(run, losses: Losses, grid, seeds, margin: float, tolerance: float) -> None:
    """Trains the other seeds where the first can win, and on until the basin is closed."""
    scout = {rate: losses[rate, seeds[0]] for rate in grid if (rate, seeds[0]) in losses}
    limit = _limit(scout.values(), margin)
    can_win = [rate for rate, loss in scout.items() if loss <= limit and math.isfinite(loss)]
    if not can_win:
        return
    between = [rate for rate in scout if can_win[0] <= rate <= can_win[-1]]
    run((rate, seed) for rate in between for seed in seeds)
    while True:
        means = _mean_losses(losses, seeds)
        if any(map(math.isfinite, means.values())):
            closed_below, closed_above = find_basin(means, tolerance).closed
        else:  # another seed lost all of them
            closed_below, closed_above = False, True
        below = [] if closed_below else [rate for rate in grid if rate < min(means)][-1:]
        above = [] if closed_above else [rate for rate in grid if rate > max(means)][:1]
        if not below and not above:
            return
        run((rate, seed) for rate in below + above for seed in seeds)


def _midpoints(means: dict[float, float], tolerance: float) -> list[float]:
    """Rates halfway between neighbours of which at least one is in the basin."""
    limit = _limit(means.values(), tolerance)
    return [
        math.sqrt(low * high)
        for low, high in itertools.pairwise(sorted(means))
        if math.isfinite(limit) and min(means[low], means[high]) <= limit
    ]


def _checked(
    rates: Sequence[float],
    seeds: Sequence[int],
    start: float | None,
    tolerance: float,
    margin: float,
) -> tuple[list[float], list[int]]:
    try:
        grid = sorted(map(float, rates))
    except (TypeError, ValueError):
        raise TypeError(
            f"rates must be numbers, as numpy.geomspace(1e-3, 4, 13) gives, found {rates!r}"
        ) from None
    if not isinstance(seeds, Sequence):
        raise TypeError(f"seeds must be a sequence, as (0, 1, 2) or range(3), found {seeds!r}")
    if not grid or not all(0 < rate < math.inf for rate in grid) or len(set(grid)) < len(grid):
        raise ValueError(f"rates must be positive, finite and different, found {list(rates)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, and one at least, found {list(seeds)}")
    for name, value in {"start": start, "tolerance": tolerance, "margin": margin}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, found {value}")
    return grid, list(seeds)
