"""Search for the learning rate of a network: the paper's protocol, made stable [AAS §4 protocol].

The protocol takes the largest rate with the smallest training loss after one epoch; here the answer
is the vertex of a parabola through the losses around the minimum, see `_basin`.
"""

import itertools
import math
import numbers
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, overload

import numpy as np

from archscale_jax.tuning._basin import Basin, find_basin, grid_error, loss_limit

Train = Callable[[float, int], Iterable[float]]
Losses = dict[tuple[float, int], float]


class Run(NamedTuple):
    """One training: its rate, its seed and the training loss at its end, inf where it diverged."""

    rate: float
    seed: int
    loss: float


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


class HyperparameterSearch(NamedTuple):
    """What `find_learning_rate` found over several hyperparameters.

    Attributes:
      point: the best values that were trained with every seed.
      axes: by name, the search along one hyperparameter, the others at `point`; its `rate` and
        errors are those of that hyperparameter.
      loss: the mean loss over seeds at `point`.
      runs: every training, as values, seed and loss.
    """

    point: dict[str, float]
    axes: dict[str, RateSearch]
    loss: float
    runs: tuple[tuple[dict[str, float], int, float], ...]

    @property
    def values(self) -> dict[str, float]:
        """The best values, each between those that were trained; of integers, `point`."""
        return {
            name: self.point[name] if isinstance(self.point[name], int) else search.rate
            for name, search in self.axes.items()
        }


@overload
def find_learning_rate(
    train: Train,
    rates: Sequence[float],
    *,
    seeds: Sequence[int] = ...,
    start: float | None = ...,
    tolerance: float = ...,
    margin: float = ...,
    refine: int = ...,
    max_loss: float = ...,
    workers: int = ...,
) -> RateSearch: ...


@overload
def find_learning_rate(
    train: Callable[[dict[str, float], int], Iterable[float]],
    rates: Mapping[str, Sequence[float]],
    *,
    seeds: Sequence[int] = ...,
    start: Mapping[str, float] | None = ...,
    tolerance: float = ...,
    margin: float = ...,
    refine: int = ...,
    max_loss: float = ...,
    workers: int = ...,
) -> HyperparameterSearch: ...


def find_learning_rate(
    train: Callable[[Any, int], Iterable[float]],
    rates: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    start: float | Mapping[str, float] | None = None,
    tolerance: float = 0.02,
    margin: float = 0.25,
    refine: int = 1,
    max_loss: float = math.inf,
    workers: int = 1,
) -> RateSearch | HyperparameterSearch:
    """Finds the learning rate with which a network trains best [AAS §4 protocol].

    Without `start` every rate is trained with every seed. With it, the first seed expands a bracket
    from there up and down the grid until the loss leaves `margin`, and the other seeds train only
    the rates that can win. Then the spacing around the minimum is halved.

    Of several hyperparameters, `rates` by name, one after the other is searched so, from `start` or
    the middle of the grid, the others at the best that was trained, until none moves. That is the
    best point along every axis; where two depend on each other so closely that only a step of both
    gains, as the rate and a decay that is multiplied with it, it need not be the best of all.

    Args:
      train: `(rate, seed)` to the training losses of successive parts of a run from scratch, of
        any sign, of which the last one counts; of several hyperparameters `(values, seed)`, values
        by name. A run has diverged, and is stopped, when a loss is not finite or exceeds
        `max_loss`. It must depend on its arguments alone; with several workers it is called from
        several threads.
      rates: the grid, e.g. `numpy.geomspace(1e-3, 4, 13)`; or grids by name, e.g.
        `{"learning_rate": …, "weight_decay": …, "batch_size": (16, 32, 64)}`. Integers stay
        integers: nothing is trained between them.
      seeds: seeds of the runs.
      start: a guess, such as `predict_learning_rate` gives; of several by name, of any of them.
      tolerance: depth of the basin, as a fraction of the size of the smallest loss; where that is
        0, of the median of what the larger finite losses exceed it by.
      margin: with `start`, losses within this fraction of the smallest can still win.
      refine: how often the spacing of the rates in the basin is halved.
      max_loss: see `train`.
      workers: runs at a time, in threads.

    Raises:
      TypeError: rates that are not numbers, seeds that are not a sequence, or a `train` that does
        not return or yield losses; a single number, of Python, NumPy or JAX, is not accepted.
      ValueError: rates that are not positive, finite and different, seeds that are missing or
        repeated, a tolerance, margin or start that is not positive, an option out of its range, a
        `train` that yields no loss, or no rate with a finite loss for every seed.
    """
    for name, least, value in (("workers", 1, workers), ("refine", 0, refine)):
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")
    if not isinstance(max_loss, numbers.Real) or math.isnan(max_loss):
        raise ValueError(f"max_loss must be a number, found {max_loss!r}")
    if isinstance(rates, Mapping) or isinstance(start, Mapping):
        options = {"tolerance": tolerance, "margin": margin, "max_loss": max_loss}
        return _search_axes(train, rates, start, seeds, refine, options | {"workers": workers})
    grid, seeds = _checked(rates, seeds, start=start, tolerance=tolerance, margin=margin)
    losses: Losses = {}
    with ThreadPoolExecutor(workers) as pool:

        def run(pairs: Iterable[tuple[float, int]]) -> None:
            missing = [pair for pair in pairs if pair not in losses]
            ends = pool.map(lambda pair: last_loss(train, pair, max_loss), missing)
            losses.update(zip(missing, ends, strict=True))

        if start is None:
            run((rate, seed) for rate in grid for seed in seeds)
        else:
            _expand_bracket(run, losses, grid, seeds[0], start, margin)
            _train_other_seeds(run, losses, grid, seeds, margin, tolerance)
        for _ in range(refine):
            rates = _midpoints(_mean_losses(losses), tolerance)
            run((rate, seed) for rate in rates for seed in seeds)
    runs = tuple(Run(rate, seed, loss) for (rate, seed), loss in sorted(losses.items()))
    return summarise_runs(runs, tolerance=tolerance)


def _search_axes(
    train: Callable[[dict[str, float], int], Iterable[float]],
    grids: Any,
    start: Any,
    seeds: Sequence[int],
    refine: int,
    options: Mapping[str, Any],
) -> HyperparameterSearch:
    """The best point along every axis; losses of points are kept, so that none is trained twice."""
    point = _start_of(grids, start)
    losses: dict[tuple[tuple[float, ...], int], float] = {}

    def along(name: str, refine: int) -> RateSearch:
        is_integer = isinstance(point[name], int)

        def one(value: float, seed: int) -> Iterable[float]:
            values = {**point, name: int(value) if is_integer else value}
            key = tuple(values.values()), seed
            if key not in losses:
                losses[key] = last_loss(train, (values, seed), options["max_loss"])
            return [losses[key]]

        rounds = 0 if is_integer else refine
        return find_learning_rate(
            one, grids[name], seeds=seeds, start=point[name], refine=rounds, **options
        )

    def mean(values: Mapping[str, float]) -> float:
        found = [losses.get((tuple(values.values()), seed), math.inf) for seed in seeds]
        return statistics.fmean(found)

    before = None
    while point != before:  # the mean loss falls, on a finite grid
        before = point
        for name in point:
            tried = [point, *({**point, name: one} for one in mean_losses(along(name, 0)))]
            if isinstance(point[name], int):
                tried = [{**one, name: int(one[name])} for one in tried]
            point = min(tried, key=mean)
    axes = {name: along(name, refine) for name in point}
    runs = (
        (dict(zip(point, key, strict=True)), seed, loss) for (key, seed), loss in losses.items()
    )
    return HyperparameterSearch(point, axes, mean(point), tuple(runs))


def _start_of(grids: Any, start: Any) -> dict[str, float]:
    """The point where a search begins: the values nearest to `start`, else in the middle."""
    if not isinstance(grids, Mapping) or not grids:
        raise TypeError(
            "rates and start belong together: of several hyperparameters both are by name, found "
            f"rates {grids!r} and start {start!r}"
        )
    start = {} if start is None else start
    if not isinstance(start, Mapping) or not set(start) <= set(grids):
        raise ValueError(
            f"start must give values of {', '.join(grids)} by name, as {{{next(iter(grids))!r}: "
            f"…}}, found {start!r}"
        )
    point = {}
    for name, given in grids.items():
        try:
            grid = _checked(given, (0,), start=start.get(name))[0]
        except (TypeError, ValueError) as error:
            error.add_note(f"raised by the values of {name}")
            raise
        middle = start.get(name, grid[len(grid) // 2])
        nearest = int(np.argmin(np.abs(np.log(np.asarray(grid) / middle))))
        is_integer = all(isinstance(one, int | np.integer) for one in given)
        point[name] = int(grid[nearest]) if is_integer else grid[nearest]
    return point


def summarise_runs(runs: Iterable[Run], *, tolerance: float = 0.02) -> RateSearch:
    """Returns the answer that runs give; rates that not every seed has trained are excluded.

    Args:
      runs: in any order.
      tolerance: see `find_learning_rate`.

    Raises:
      ValueError: no rate has a finite loss for every seed.
    """
    runs = tuple(sorted(runs))
    losses = {(run.rate, run.seed): run.loss for run in runs}
    seeds = sorted({run.seed for run in runs})
    means = _mean_losses(losses)
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
    spacing_error = grid_error(means, curves, seed_rates, tolerance)
    uncertainty = math.sqrt(seed_error**2 + spacing_error**2)  # of nan and inf: nan
    return RateSearch(basin.rate, uncertainty, basin, seed_rates, runs, seed_error, spacing_error)


def mean_losses(search: RateSearch) -> dict[float, float]:
    """Returns the mean loss over seeds of every rate that all seeds have trained, by rate."""
    return _mean_losses({(run.rate, run.seed): run.loss for run in search.runs})


def last_loss(train: Callable[[Any, int], Any], pair: tuple[Any, int], max_loss: float) -> float:
    """Returns the last loss that a run yields, inf where it diverged; see `find_learning_rate`."""
    parts = train(*pair)
    # JAX and NumPy arrays without axes are Iterable by their class, and cannot be iterated.
    if not isinstance(parts, Iterable) or getattr(parts, "ndim", 1) == 0:
        raise TypeError(
            f"train{pair} returned {parts!r}; accepted are training losses in a row: yield them, "
            "or return [loss]"
        )
    loss = None
    for part in parts:
        try:
            loss = float(part)
        except (TypeError, ValueError):
            raise TypeError(
                f"train{pair} yielded {part!r}; accepted are numbers: yield the loss alone, as a "
                "scalar"
            ) from None
        if not (math.isfinite(loss) and loss <= max_loss):
            return math.inf
    if loss is None:
        raise ValueError(
            f"train{pair} yielded no loss; accepted is one at least: check that its data gives a "
            "batch and that it trains at least one step"
        )
    return loss


def _mean_losses(losses: Losses) -> dict[float, float]:
    """Mean loss of the rates that all seeds have trained."""
    seeds = {seed for _, seed in losses}
    return {
        rate: statistics.fmean(losses[rate, seed] for seed in seeds)
        for rate in sorted({rate for rate, _ in losses})
        if all((rate, seed) in losses for seed in seeds)
    }


def _expand_bracket(
    run, losses: Losses, grid: list[float], seed: int, start: float, margin: float
) -> None:
    """Trains one seed from the rate nearest to `start` up and down, until the loss is too high."""
    first = int(np.argmin(np.abs(np.log(np.asarray(grid) / start))))
    for step in (1, -1):
        for index in range(first, len(grid) if step > 0 else -1, step):
            run([(grid[index], seed)])
            found = losses[grid[index], seed]
            if found > loss_limit(losses.values(), margin) or (step > 0 and math.isinf(found)):
                break


def _train_other_seeds(
    run, losses: Losses, grid: list[float], seeds: Sequence[int], margin: float, tolerance: float
) -> None:
    """Trains them where the first can win, and on until the minimum is bracketed."""
    first = {rate: losses[rate, seeds[0]] for rate in grid if (rate, seeds[0]) in losses}
    limit = loss_limit(first.values(), margin)
    can_win = [rate for rate, loss in first.items() if loss <= limit and math.isfinite(loss)]
    if not can_win:
        return
    rates = [rate for rate in first if can_win[0] <= rate <= can_win[-1]]
    while rates:
        run((rate, seed) for rate in rates for seed in seeds)
        means = _mean_losses(losses)
        below, above = False, True  # where runs of another seed diverged at all of them
        if any(map(math.isfinite, means.values())):
            below, above = find_basin(means, tolerance).bracketed
        rates = [] if below else [rate for rate in grid if rate < min(means)][-1:]
        rates += [] if above else [rate for rate in grid if rate > max(means)][:1]


def _midpoints(means: dict[float, float], tolerance: float) -> list[float]:
    """Rates halfway between neighbours of which at least one is in the basin."""
    limit = loss_limit(means.values(), tolerance)
    return [
        math.sqrt(low * high)
        for low, high in itertools.pairwise(sorted(means))
        if math.isfinite(limit) and min(means[low], means[high]) <= limit
    ]


def _checked(
    rates: Sequence[float], seeds: Sequence[int], **positive: float | None
) -> tuple[list[float], list[int]]:
    try:
        grid = sorted(map(float, rates))
    except (TypeError, ValueError):
        raise TypeError(
            f"rates must be a sequence of numbers, as numpy.geomspace(1e-3, 4, 13), found {rates!r}"
        ) from None
    if not isinstance(seeds, Sequence):
        raise TypeError(f"seeds must be a sequence, as (0, 1, 2) or range(3), found {seeds!r}")
    if not grid or not all(0 < rate < math.inf for rate in grid) or len(set(grid)) < len(grid):
        raise ValueError(f"rates must be positive, finite and different, found {list(rates)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, and one at least, found {list(seeds)}")
    for name, value in positive.items():
        if value is not None and not (isinstance(value, numbers.Real) and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite, found {value!r}")
    return grid, list(seeds)
