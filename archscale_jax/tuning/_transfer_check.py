"""Transfer check: does one learning rate serve networks of all sizes?"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, overload

from archscale_jax._deprecated import renamed_field
from archscale_jax.tuning._basin import excess_loss, excess_of
from archscale_jax.tuning._search import (
    HyperparameterSearch,
    RateSearch,
    Train,
    find_learning_rate,
    last_loss,
    mean_losses,
)


class TransferCheck(NamedTuple):
    """What `transfer_check` found.

    Attributes:
      searches: the search of every size.
      drift: how far the best rates lie apart, largest over smallest, in nats of log rate. It is the
        range of as many noisy rates as there are sizes, and so is above 0 where nothing moves.
      uncertainty: the standard error of the distance of two rates in nats, √2 times that of one
        rate, pooled over sizes; nan for one seed.
      excess: by how much the loss exceeds the smallest one, as a fraction of the latter's size, at
        the rate that is best for the first size; never negative, inf where runs at it diverge.
        See `find_learning_rate` for a smallest loss of 0.
      bracketed: whether every search saw rates that are too small and too large.
      limit: the drift in nats that 95 of 100 checks stay below where nothing moves; nan for one
        seed. The root of the sum of two squares: the `seed_error` of one rate, pooled over sizes,
        times the 95 % quantile of the studentized range of as many rates as there are sizes with
        the degrees of freedom of all seeds; and twice the root mean square of `grid_error`, which
        is bounded and alike for curves of one shape.
    """

    searches: dict[Any, RateSearch]
    drift: float
    uncertainty: float
    excess: dict[Any, float]
    bracketed: bool
    limit: float

    stays = renamed_field("stays", "transfers")
    closed = renamed_field("closed", "bracketed")

    @property
    def transfers(self) -> bool:
        """Whether every search is bracketed, and rates lie no further apart than noise explains.

        True in about 95 of 100 checks where nothing moves, whatever the number of sizes. False for
        one seed, which tells nothing of the noise.
        """
        return self.bracketed and self.drift <= self.limit + 1e-9  # rounding of equal rates


class HyperparameterTransfer(NamedTuple):
    """What `transfer_check` found over several hyperparameters.

    Attributes:
      searches: the search of every size.
      axes: by name, what the searches along one hyperparameter say; each through the size's own
        best point.
      excess: by how much the loss at the best values of the first size, all together, exceeds the
        smallest one that the size reached, as a fraction of the latter's size; trained, with every
        seed. Never negative, inf where a run diverges.
    """

    searches: dict[Any, HyperparameterSearch]
    axes: dict[str, TransferCheck]
    excess: dict[Any, float]

    @property
    def transfers(self) -> bool:
        """Whether every hyperparameter does; see `TransferCheck.transfers`."""
        return all(one.transfers for one in self.axes.values())


@overload
def transfer_check(
    train: Mapping[Any, Train], rates: Sequence[float], **options: Any
) -> TransferCheck: ...


@overload
def transfer_check(
    train: Mapping[Any, Callable[[dict[str, float], int], Iterable[float]]],
    rates: Mapping[str, Sequence[float]],
    **options: Any,
) -> HyperparameterTransfer: ...


def transfer_check(
    train: Mapping[Any, Any], rates: Sequence[float] | Mapping[str, Sequence[float]], **options: Any
) -> TransferCheck | HyperparameterTransfer:
    """Searches the best rate of networks of several sizes, trained with one parametrization.

    A flat coordinate check says that features change alike at the start; this says whether the best
    rate transfers [μP], and with it weight decay, batch or steps, if they are searched too.

    Args:
      train: by size, first the one on which the rate would be tuned: `(rate, seed)` to training
        losses, with the optimizer as the parametrization scales it; of several hyperparameters
        `(values, seed)`. See `find_learning_rate`.
      rates: the grid for all sizes, or grids by name.
      **options: of `find_learning_rate`; `start` is for the first size, others start where the one
        before ended.

    Raises:
      TypeError: an option that `find_learning_rate` does not have; what it raises.
      ValueError: fewer than two sizes; what `find_learning_rate` raises.
    """
    if len(train) < 2:
        raise ValueError(f"train must hold at least two sizes to compare, found {list(train)}")
    several = isinstance(rates, Mapping)
    searches: dict[Any, Any] = {}
    for size, one in train.items():
        searches[size] = find_learning_rate(one, rates, **options)  # type: ignore
        if several or options.get("start") is not None:
            options["start"] = searches[size].point if several else searches[size].rate
    if not several:
        return summarise_transfer(searches)
    first = next(iter(searches.values())).values
    seeds, limit = options.get("seeds", (0, 1, 2)), options.get("max_loss", math.inf)
    return HyperparameterTransfer(
        searches,
        {
            name: summarise_transfer({size: one.axes[name] for size, one in searches.items()})
            for name in rates
        },
        {
            size: _excess(search, [last_loss(train[size], (first, seed), limit) for seed in seeds])
            for size, search in searches.items()
        },
    )


def _excess(search: HyperparameterSearch, losses: Sequence[float]) -> float:
    """By what fraction of its size the mean of losses exceeds the smallest of a search."""
    found = statistics.fmean(losses)
    reached = [loss for one in search.axes.values() for loss in mean_losses(one).values()]
    return excess_of(found, [found, *reached])


def summarise_transfer(searches: Mapping[Any, RateSearch]) -> TransferCheck:
    """Returns what searches of two or more sizes, by size and in order, say about transfer."""
    found = list(searches.values())
    rates = [search.rate for search in found]
    freedom = sum(len(search.seed_rates) - 1 for search in found)
    seed_error = _root_mean_square(search.seed_error for search in found)
    grid_error = _root_mean_square(search.grid_error for search in found)
    return TransferCheck(
        dict(searches),
        math.log(max(rates) / min(rates)),
        math.sqrt(2) * _root_mean_square(search.uncertainty for search in found),
        {size: excess_loss(rates[0], mean_losses(one)) for size, one in searches.items()},
        all(all(search.basin.bracketed) for search in found),
        math.hypot(_range_quantile(len(found), freedom) * seed_error, 2 * grid_error),
    )


def _root_mean_square(values: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


@functools.cache
def _range_quantile(count: int, freedom: int) -> float:
    """The 95 % quantile of the studentized range; nan without a degree of freedom."""
    from scipy.stats import studentized_range  # slow to import

    return float(studentized_range.ppf(0.95, count, freedom)) if freedom else math.nan
