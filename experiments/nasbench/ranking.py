"""Whether a ranking of architectures survives another recipe of training [AAS, NAS-Bench-201].

Kendall's tau between accuracies under two recipes, arrays [A, S] as in `gains`.

Noise alone lowers tau, the more the fewer seeds are averaged. So that tau between two recipes is on
the footing of tau between the seeds of one, both are, by default, means over all pairs of disjoint
groups of half the seeds, one for each side. Between two recipes the groups are disjoint as well,
since runs of one seed may share their batches. The control of a recipe is then its comparison with
itself.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from archscale_jax._errors import unknown
from experiments.nasbench.gains import (
    MIN_ARCHITECTURES,
    Accuracies,
    check_accuracies,
    draw_resamples,
    percentile_interval,
    seed_means,
    trained_in_both,
)

AVERAGES = ("halves", "single", "all")
_Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]


class TauCurve(NamedTuple):
    """A statistic at the top K% of architectures, for F fractions K.

    Attributes:
      fractions: each K, in (0, 1].
      value: [F]; NaN where some pair of groups has fewer than 3 architectures at the top, or one of
        its sides is constant there.
      low: [F], lower end of the bootstrap interval; NaN without a generator, and where the value or
        more than half of the resamples are.
      high: [F], its upper end.
      architectures: how many have a run under both recipes.
      excluded: how many have not.
    """

    fractions: tuple[float, ...]
    value: Float[np.ndarray, "F"]
    low: Float[np.ndarray, "F"]
    high: Float[np.ndarray, "F"]
    architectures: int
    excluded: int


def kendall_tau_at_top(
    reference: Accuracies,
    other: Accuracies,
    fractions: Sequence[float],
    *,
    average: str = "halves",
    rng: np.random.Generator | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> TauCurve:
    """Returns Kendall's tau-b between two recipes at the top K% of `reference`.

    The top are the ⌈K·A⌉ best of the group of `reference` and what ties with the last of them; swap
    the arguments to select by the other recipe. The interval is a percentile bootstrap over
    architectures: it says how tau depends on which were drawn, for the seeds that were run.

    Args:
      reference: accuracies, of which the best are selected.
      other: accuracies of the same architectures.
      fractions: each K.
      average: `halves`, the mean over all pairs of disjoint groups of half the seeds (rounded
        down); `single`, over all pairs of two different seeds; `all`, one tau of the means over all
        seeds, which is higher, and which no control matches.
      rng: draws the resamples; without it there is no interval. Memory grows with the square of A.
      resamples: their number.
      confidence: of the interval.

    Raises:
      ValueError: a fraction outside (0, 1], an unknown `average`, fewer than two seeds, or unequal
        numbers of them, for groups; see also `check_accuracies` and `draw_resamples`.
    """
    terms = [(1.0, reference, other)]
    return _curve(terms, fractions, average, rng, resamples, confidence)


def seed_control(
    accuracies: Accuracies, fractions: Sequence[float], *, average: str = "halves", **options: Any
) -> TauCurve:
    """Returns tau between the seeds of one recipe, selected by one side: what noise leaves of it.

    For arguments and errors see `kendall_tau_at_top`; `all` leaves no seeds for the other side.
    """
    _reject_all(average)
    return kendall_tau_at_top(accuracies, accuracies, fractions, average=average, **options)


def tau_shortfall(
    reference: Accuracies,
    other: Accuracies,
    fractions: Sequence[float],
    *,
    average: str = "halves",
    **options: Any,
) -> TauCurve:
    """Returns by how much tau between recipes is below the mean of their two seed controls.

    About 0 where they rank alike and noise alone parts them. The interval is that of the difference
    (all three taus of the same resamples). For K < 1 each control selects by its own recipe.
    Arguments and errors are those of `seed_control`.
    """
    _reject_all(average)
    terms = [(-1.0, reference, other), (0.5, reference, reference), (0.5, other, other)]
    return _curve(terms, fractions, average, **options)


class RankingComparison(NamedTuple):
    """Two tables joined by name.

    Attributes:
      common: how many architectures have a finite value in both.
      only_first: how many have one in the first alone.
      only_second: how many have one in the second alone.
      curve: tau at the top of the first.
    """

    common: int
    only_first: int
    only_second: int
    curve: TauCurve


def compare_rankings(
    first: Mapping[str, float],
    second: Mapping[str, float],
    fractions: Sequence[float] = (1.0,),
    **options: Any,
) -> RankingComparison:
    """Compares two tables, accuracy by architecture, as they stand: published ones, say.

    Args:
      first: the table that selects.
      second: the other.
      fractions: each K.
      **options: `rng`, `resamples` and `confidence` of `kendall_tau_at_top`.

    Raises:
      ValueError: fewer than 3 architectures in common; what `kendall_tau_at_top` raises.
    """
    tables = (first, second)
    known = [{name for name in one if math.isfinite(one[name])} for one in tables]
    names = sorted(known[0] & known[1])
    if len(names) < MIN_ARCHITECTURES:
        raise ValueError(
            f"a comparison needs {MIN_ARCHITECTURES} architectures in common, found {len(names)}: "
            f"the first table has {len(known[0])} such as {min(known[0], default='')!r}, "
            f"the second {len(known[1])} such as {min(known[1], default='')!r}"
        )
    left, right = (np.array([[one[name]] for name in names], float) for one in tables)
    curve = kendall_tau_at_top(left, right, fractions, average="all", **options)
    only_first, only_second = (len(one) - len(names) for one in known)
    return RankingComparison(len(names), only_first, only_second, curve)


def _reject_all(average: str) -> None:
    if average == "all":
        raise ValueError("a seed control averages 'halves' or 'single'; 'all' leaves no other side")


def _curve(
    terms, fractions, average, rng=None, resamples: int = 1000, confidence: float = 0.95
) -> TauCurve:
    """The sum of taus by weight; `terms` are (weight, first, second), both recipes in the first."""
    _, reference, other = terms[0]
    reference, other = check_accuracies(reference=reference, other=other)
    fractions = tuple(map(float, fractions))
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions must be in (0, 1], found {fraction}")
    pairs = _group_pairs(reference, other, average)
    there = trained_in_both(reference, other)
    counts = draw_resamples(int(there.sum()), rng, resamples, confidence)
    value, samples = np.zeros(len(fractions)), np.zeros((len(counts), len(fractions)))
    for weight, first, second in terms:
        for left, right in pairs:
            x, y = (
                seed_means(np.asarray(one, float)[there][:, list(group)])
                for one, group in ((first, left), (second, right))
            )
            share = weight / len(pairs)
            value += share * np.array([_tau(x, y, fraction) for fraction in fractions])
            if len(counts):
                samples += share * _resampled_taus(x, y, fractions, counts)
    low, high = (
        np.where(np.isnan(value), math.nan, end) for end in percentile_interval(samples, confidence)
    )
    return TauCurve(fractions, value, low, high, int(there.sum()), int((~there).sum()))


def _group_pairs(reference: Accuracies, other: Accuracies, average: str) -> _Pairs:
    """Every pair of disjoint groups of seeds, or one of all seeds on both sides."""
    numbers = (reference.shape[1], other.shape[1])
    if average not in AVERAGES:
        raise ValueError(unknown("average", average, AVERAGES))
    if average == "all":
        return [(tuple(range(numbers[0])), tuple(range(numbers[1])))]
    if numbers[0] != numbers[1] or numbers[0] < 2:
        raise ValueError(
            f"average {average!r} needs the same seeds, two at least, on both sides, found "
            f"{numbers[0]} and {numbers[1]}; 'all' takes any"
        )
    size = 1 if average == "single" else numbers[0] // 2
    groups = list(itertools.combinations(range(numbers[0]), size))
    return [pair for pair in itertools.product(groups, groups) if set(pair[0]).isdisjoint(pair[1])]


def _number_at_top(fraction: float, total):
    return np.ceil(fraction * total - 1e-9)  # 0.07 · 100 is 7.000000000000001


def _tau(x: Float[np.ndarray, "A"], y: Float[np.ndarray, "A"], fraction: float) -> float:
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) < MIN_ARCHITECTURES:
        return math.nan
    top = x >= np.sort(x)[-int(_number_at_top(fraction, len(x)))]
    if top.sum() < MIN_ARCHITECTURES or np.ptp(x[top]) == 0 or np.ptp(y[top]) == 0:
        return math.nan
    return float(scipy.stats.kendalltau(x[top], y[top]).statistic)


def _resampled_taus(
    x: Float[np.ndarray, "A"],
    y: Float[np.ndarray, "A"],
    fractions: Sequence[float],
    counts: Int[np.ndarray, "resamples A"],
) -> Float[np.ndarray, "resamples F"]:
    """`_tau` of every resample, NaN with fewer than 3 different architectures at its top.

    Numerator and denominator of tau-b are quadratic forms in the counts. Sorting every resample
    anew, as SciPy's bootstrap of SciPy's tau would, takes minutes.
    """
    there = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(-x[there], kind="stable")
    x, y, counts = x[there][order], y[there][order], counts[:, there][:, order]
    signs = [np.sign(values[:, None] - values[None, :]) for values in (x, y)]
    forms = (signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1]))
    better = np.cumsum(counts, 1) - counts  # how many of a resample come before
    better = better[:, np.searchsorted(-x, -x)]  # the same for all that tie
    taus = np.full((len(counts), len(fractions)), math.nan)
    for column, fraction in enumerate(fractions):
        number = _number_at_top(fraction, counts.sum(1, keepdims=True))
        top = np.where(better < number, counts, 0).astype(float)
        agree, differ_x, differ_y = (((top @ form) * top).sum(1) for form in forms)
        scale = np.sqrt(differ_x * differ_y)
        known = (scale > 0) & (np.count_nonzero(top, 1) >= MIN_ARCHITECTURES)
        np.divide(agree, scale, out=taus[:, column], where=known)
    return taus
