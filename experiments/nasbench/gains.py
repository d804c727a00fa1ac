"""Accuracies of architectures over seeds: what a recipe gains, and gaps against their noise.

Accuracies are arrays [A, S] of A architectures and S seeds, NaN where a run is missing. An
architecture counts with the mean over the seeds that are there; without any it is excluded, and
results say how many were. (A run that ended at chance is not a missing run: count it with
its accuracy, or a recipe is judged by the runs that it did not ruin.)
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

Accuracies = Float[np.ndarray, "A S"]
MIN_ARCHITECTURES = 3


class PairwiseGaps(NamedTuple):
    """Gaps between all pairs of architectures that have a run under both recipes.

    Attributes:
      reference: [pairs], absolute difference of the mean accuracies.
      other: [pairs], of the same pairs.
      flips: share of pairs that the recipes order oppositely; one tied under either is not a flip.
      clear_flips: share that they do with gaps above 2 standard errors under both; NaN where the
        noise of one is not known.
      noise: standard error of the gap between two architectures without a missing run, under each
        recipe; NaN where no architecture has two seeds.
      excluded: how many architectures lack a run under one of them.
    """

    reference: Float[np.ndarray, "pairs"]
    other: Float[np.ndarray, "pairs"]
    flips: float
    clear_flips: float
    noise: tuple[float, float]
    excluded: int


def pairwise_gaps(reference: Accuracies, other: Accuracies) -> PairwiseGaps:
    """Returns the accuracy gaps of all pairs of architectures under two recipes.

    The variance over seeds is pooled over the architectures of a recipe, since two or three seeds
    of one say too little about its own. Where noise differs, this is strict with steady ones.

    Raises:
      ValueError: see `check_accuracies`; fewer than 2 architectures with a run under both.
    """
    reference, other = check_accuracies(reference=reference, other=other)
    there = trained_in_both(reference, other)
    if there.sum() < 2:
        raise ValueError(f"gaps need 2 architectures with a run under both, found {there.sum()}")
    first, second = np.triu_indices(int(there.sum()), 1)
    gaps, clear, noise = [], [], []
    for accuracies in (reference[there], other[there]):
        means, deviation = seed_means(accuracies), pooled_deviation(accuracies)
        errors = deviation / np.sqrt(np.isfinite(accuracies).sum(1))
        gaps.append(np.round(means[first] - means[second], 12))
        clear.append(np.abs(gaps[-1]) > 2 * np.hypot(errors[first], errors[second]))
        noise.append(deviation * math.sqrt(2 / accuracies.shape[1]))
    flips = gaps[0] * gaps[1] < 0
    clear_flips = float(np.mean(flips & clear[0] & clear[1]))
    return PairwiseGaps(
        np.abs(gaps[0]),
        np.abs(gaps[1]),
        float(np.mean(flips)),
        math.nan if np.isnan(noise).any() else clear_flips,
        (noise[0], noise[1]),
        int((~there).sum()),
    )


class GainSummary(NamedTuple):
    """What a recipe gains over a fixed one, of the architectures with a run under both.

    Attributes:
      gains: [A], difference of the mean accuracies; NaN of an architecture that is excluded.
      mean: their mean.
      low: lower end of its bootstrap interval over architectures; NaN without a generator.
      high: its upper end.
      share: share of architectures that gain.
      p_value: of Wilcoxon's signed-rank test that gains are symmetric about 0; NaN if all are 0.
      spread_fixed: standard deviation of the mean accuracies over architectures under the fixed
        recipe, in which the noise of the seeds is included.
      spread_ours: the same under the other.
      excluded: how many architectures are excluded.
    """

    gains: Float[np.ndarray, "A"]
    mean: float
    low: float
    high: float
    share: float
    p_value: float
    spread_fixed: float
    spread_ours: float
    excluded: int


def gain_summary(
    fixed: Accuracies,
    ours: Accuracies,
    *,
    rng: np.random.Generator | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> GainSummary:
    """Returns what the recipe `ours` gains over `fixed`.

    Args:
      fixed: accuracies under the one.
      ours: accuracies of the same architectures under the other.
      rng: draws the resamples of the percentile bootstrap; without it there is no interval.
      resamples: their number.
      confidence: of the interval.

    Raises:
      ValueError: see `check_accuracies` and `draw_resamples`; fewer than 3 architectures with a run
        under both.
    """
    fixed, ours = check_accuracies(fixed=fixed, ours=ours)
    there = trained_in_both(fixed, ours)
    if there.sum() < MIN_ARCHITECTURES:
        raise ValueError(
            f"gains need {MIN_ARCHITECTURES} architectures with a run under both, "
            f"found {there.sum()}"
        )
    gains = np.where(there, np.round(seed_means(ours) - seed_means(fixed), 12), math.nan)
    found = gains[there]
    counts = draw_resamples(len(found), rng, resamples, confidence)
    low, high = percentile_interval(counts @ found / len(found), confidence)
    p_value = scipy.stats.wilcoxon(found[found != 0]).pvalue if np.any(found) else math.nan
    return GainSummary(
        gains,
        float(found.mean()),
        float(low),
        float(high),
        float(np.mean(found > 0)),
        float(p_value),
        float(np.std(seed_means(fixed)[there], ddof=1)),
        float(np.std(seed_means(ours)[there], ddof=1)),
        int((~there).sum()),
    )


def check_accuracies(**named: np.ndarray) -> list[Accuracies]:
    """Returns accuracies as floats.

    Raises:
      ValueError: one that is not [A, S] with a seed at least, or infinite; different numbers of
        architectures.
    """
    checked = {name: np.asarray(values, float) for name, values in named.items()}
    for name, values in checked.items():
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"{name} must be [architectures, seeds], found shape {values.shape}")
        if np.isinf(values).any():
            raise ValueError(f"{name} must be finite, or NaN where a run is missing; found inf")
    if len({len(values) for values in checked.values()}) > 1:
        found = ", ".join(f"{name} of {len(values)}" for name, values in checked.items())
        raise ValueError(f"accuracies must be of the same architectures, found {found}")
    return list(checked.values())


def trained_in_both(first: Accuracies, second: Accuracies) -> Bool[np.ndarray, "A"]:
    """Returns which architectures have a run under both recipes."""
    return np.asarray(np.isfinite(first).any(1) & np.isfinite(second).any(1))


def seed_means(accuracies: Accuracies) -> Float[np.ndarray, "A"]:
    """Returns the means over the seeds that are there; NaN where none is.

    They are rounded to 12 decimals, so that equal means tie whatever the order of their seeds.
    """
    if accuracies.shape[1] == 1:
        return accuracies[:, 0]
    number = np.isfinite(accuracies).sum(1)
    means = np.full(len(accuracies), math.nan)
    np.divide(np.nansum(accuracies, 1), number, out=means, where=number > 0)
    return np.round(means, 12)


def pooled_deviation(accuracies: Accuracies) -> float:
    """Returns the standard deviation over seeds, its variance pooled over architectures.

    NaN where no architecture has two seeds.
    """
    number = np.isfinite(accuracies).sum(1)
    squares = np.nansum((accuracies - seed_means(accuracies)[:, None]) ** 2)
    freedom = np.maximum(number - 1, 0).sum()
    return math.sqrt(squares / freedom) if freedom else math.nan


def draw_resamples(
    architectures: int, rng: np.random.Generator | None, resamples: int, confidence: float
) -> Int[np.ndarray, "resamples A"]:
    """Returns how often each resample of a bootstrap holds each architecture; none without `rng`.

    Raises:
      ValueError: no resamples, or a confidence outside (0, 1).
    """
    if resamples < 1:
        raise ValueError(f"resamples must be 1 at least, found {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, found {confidence}")
    if rng is None or not architectures:
        return np.zeros((0, architectures), int)
    return rng.multinomial(architectures, np.full(architectures, 1 / architectures), resamples)


def percentile_interval(
    samples: Float[np.ndarray, "resamples ..."], confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of a percentile interval; NaN where over half of the samples are NaN."""
    known = np.isfinite(samples)
    enough = 2 * known.sum(0) >= max(len(samples), 1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    usable = np.where(enough, samples, 0.0) if len(samples) else np.zeros((1, *samples.shape[1:]))
    low, high = np.nanquantile(usable, tails, axis=0)
    return np.where(enough, low, math.nan), np.where(enough, high, math.nan)
