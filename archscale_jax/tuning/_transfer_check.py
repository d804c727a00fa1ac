"""Transfer check: does one learning rate serve networks of all sizes?"""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from archscale_jax._deprecated import renamed_field
from archscale_jax.tuning._basin import excess_loss
from archscale_jax.tuning._search import RateSearch, Train, find_learning_rate, mean_losses


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


def transfer_check(
    train: Mapping[Any, Train], rates: Sequence[float], **options: Any
) -> TransferCheck:
    """Searches the best rate of networks of several sizes, trained with one parametrization.

    A flat coordinate check says that features change alike at the start; this says whether the best
    rate transfers [μP].

    Args:
      train: by size, first the one on which the rate would be tuned: `(rate, seed)` to training
        losses, with the optimizer as the parametrization scales it; see `find_learning_rate`.
      rates: the grid for all sizes.
      **options: of `find_learning_rate`; `start` is for the first size, others start where the one
        before ended.

    Raises:
      TypeError: an option that `find_learning_rate` does not have; what it raises.
      ValueError: fewer than two sizes; what `find_learning_rate` raises.
    """
    if len(train) < 2:
        raise ValueError(f"train must hold at least two sizes to compare, found {list(train)}")
    searches: dict[Any, RateSearch] = {}
    for size, one in train.items():
        searches[size] = find_learning_rate(one, rates, **options)
        if options.get("start") is not None:
            options["start"] = searches[size].rate
    return summarise_transfer(searches)


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
