"""Transfer check: does one learning rate serve networks of all sizes?"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from archscale_jax.search import RateSearch, excess_loss, find_learning_rate, mean_losses


class TransferCheck(NamedTuple):
    """What `transfer_check` found.

    Attributes:
      searches: the search of every size.
      drift: how far the best rates lie apart, in nats of log rate.
      uncertainty: the standard error of that distance, from those of the two rates; nan for one
        seed.
      excess: by how much the loss exceeds the smallest one, as a fraction, at the rate that is best
        for the first size; inf where runs at it are lost.
      closed: whether every search saw rates that are too small and too large.
    """

    searches: dict[Any, RateSearch]
    drift: float
    uncertainty: float
    excess: dict[Any, float]
    closed: bool

    @property
    def stays(self) -> bool:
        """Whether the rates lie within two standard errors of each other."""
        return self.closed and self.drift <= 2 * self.uncertainty


def transfer_check(
    train: Mapping[Any, Callable[[float, int], Iterable[float]]],
    rates: Sequence[float],
    **options: Any,
) -> TransferCheck:
    """Searches the best rate of networks of several sizes, trained with one parametrization.

    A flat coordinate check says that features change alike at the start; this says whether the best
    rate stays where it is.

    Args:
      train: by size, first the one on which the rate would be tuned: `(rate, seed)` to training
        losses, with the optimizer as the parametrization scales it; see `find_learning_rate`.
      rates: the grid for all sizes.
      **options: of `find_learning_rate`; `start` is for the first size, others start where the one
        before ended.

    Raises:
      ValueError: fewer than two sizes; what `find_learning_rate` raises.
    """
    if len(train) < 2:
        raise ValueError(f"a transfer check compares sizes, and needs two; found {list(train)}")
    searches: dict[Any, RateSearch] = {}
    for size, one in train.items():
        searches[size] = find_learning_rate(one, rates, **options)
        if options.get("start") is not None:
            options["start"] = searches[size].rate
    return summarise_transfer(searches)


def summarise_transfer(searches: Mapping[Any, RateSearch]) -> TransferCheck:
    """Returns what searches, in order of size, say about transfer."""
    ordered = sorted(searches.values(), key=lambda search: search.rate)
    lowest, highest = ordered[0], ordered[-1]
    first = next(iter(searches.values()))
    return TransferCheck(
        dict(searches),
        math.log(highest.rate / lowest.rate),
        math.hypot(lowest.uncertainty, highest.uncertainty),
        {size: excess_loss(first.rate, mean_losses(one)) for size, one in searches.items()},
        all(all(search.basin.closed) for search in searches.values()),
    )
