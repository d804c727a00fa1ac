"""Table of a ranking of cells under several recipes, with some seeds each.

Everything is of the cells that no recipe lost altogether, so that all numbers are of the same ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.nasbench import gains, ranking

Accuracies = Mapping[str, np.ndarray]
FRACTIONS = (1.0, 0.5, 0.2)


class Ranking(NamedTuple):
    """What the report is about.

    Attributes:
      accuracies: [A, S] by recipe, from 0 to 1, NaN where a run was lost; each cell has one left.
      cells: the A codes, such as `3_34_131`.
      fixed: the recipe that others are compared with.
      published: accuracy in percent by cell, of those that are known.
      lost: by recipe, how many of how many runs were lost.
    """

    accuracies: Accuracies
    cells: Sequence[str]
    fixed: str
    published: Mapping[str, float]
    lost: Mapping[str, str]

    @property
    def others(self) -> list[str]:
        return [recipe for recipe in self.accuracies if recipe != self.fixed]


def ranking_of(
    accuracies: Accuracies,
    cells: Sequence[str],
    *,
    fixed: str = "fixed",
    published: Mapping[str, float] | None = None,
) -> Ranking:
    """Returns the data of a report, checked, without the cells that some recipe lost altogether.

    Raises:
      ValueError: no recipe `fixed`, no other, accuracies that are not fractions or not of the
        cells, a cell that is named twice, or fewer than 3 cells left.
    """
    if fixed not in accuracies or len(accuracies) < 2:
        raise ValueError(f"recipes must be {fixed!r} and others, found {', '.join(accuracies)}")
    if twice := sorted({cell for cell in cells if list(cells).count(cell) > 1}):
        raise ValueError(f"cells must be different, found {twice[0]!r} twice")
    shape = (len(cells), np.shape(accuracies[fixed])[-1])
    for recipe, values in accuracies.items():
        if np.shape(values) != shape:
            raise ValueError(
                f"accuracies of {recipe!r} must be [cells, seeds] {shape}, found {np.shape(values)}"
            )
        if np.any((values < 0) | (values > 1)):
            raise ValueError(f"accuracies of {recipe!r} must be from 0 to 1, or NaN; found "
                             f"{np.nanmin(values):g} to {np.nanmax(values):g}")  # fmt: skip
    trained = np.all([np.isfinite(one).any(1) for one in accuracies.values()], axis=0)
    if trained.sum() < gains.MIN_ARCHITECTURES:
        raise ValueError(f"a ranking needs {gains.MIN_ARCHITECTURES} cells with a run under every "
                         f"recipe, found {trained.sum()} of {len(cells)}")  # fmt: skip
    return Ranking(
        {recipe: values[trained] for recipe, values in accuracies.items()},
        [cell for cell, there in zip(cells, trained, strict=True) if there],
        fixed,
        published or {},
        {one: f"{np.isnan(x).sum()} of {np.size(x)}" for one, x in accuracies.items()},
    )


def table(study: Ranking, *, resamples: int = 1000) -> list[list[str]]:
    """Returns header and rows, one a recipe: accuracy, gain, and taus beside their seed control.

    Tau and control are means over disjoint groups of half the seeds; see `ranking`.
    """
    shares = [f"top {fraction:.0%}" if fraction < 1 else "all" for fraction in FRACTIONS]
    head = [
        "recipe",
        f"accuracy of {len(study.cells)} cells, %",
        "spread over cells, %",
        "gain, points",
    ]
    head += ["cells that gain", "runs lost"]
    head += [f"tau to {study.fixed}, {share}" for share in shares]
    head += [f"seed control, {share}" for share in shares]
    head += ["tau below control, all"] + ["tau to published"] * bool(study.published)
    rows = [head]
    for recipe, accuracies in study.accuracies.items():
        means = 100 * gains.seed_means(accuracies)
        row = [recipe, f"{means.mean():.2f}", f"{means.std(ddof=1):.2f}"]
        row += _gain(study, recipe, resamples)
        row.append(study.lost[recipe])
        for curve in (tau_to_fixed(study, recipe, FRACTIONS, resamples),
                      control_of(study, recipe, FRACTIONS, resamples)):  # fmt: skip
            row += _shown(curve) if curve else ["–"] * len(shares)
        if recipe != study.fixed and num_seeds(study) > 1:
            pair = study.accuracies[study.fixed], accuracies
            row += _shown(ranking.tau_shortfall(*pair, (1.0,), **_options(resamples)))
        else:
            row.append("–")
        if study.published:
            row += _shown(_published(study, recipe, resamples))
        rows.append(row)
    return rows


def num_seeds(study: Ranking) -> int:
    """Returns S."""
    return np.shape(study.accuracies[study.fixed])[1]


def _options(resamples: int) -> dict:
    """The same resamples for every curve."""
    return {"rng": np.random.default_rng(0), "resamples": resamples}


def tau_to_fixed(study: Ranking, recipe: str, fractions, resamples: int) -> ranking.TauCurve | None:
    """Returns tau of a recipe to the fixed one at its top; None for that one."""
    if recipe == study.fixed:
        return None
    average = "halves" if num_seeds(study) > 1 else "all"
    pair = study.accuracies[study.fixed], study.accuracies[recipe]
    options = _options(resamples)
    return ranking.kendall_tau_at_top(*pair, fractions, average=average, **options)


def control_of(study: Ranking, recipe: str, fractions, resamples: int) -> ranking.TauCurve | None:
    """Returns the seed control of a recipe; None for one seed."""
    if num_seeds(study) < 2:
        return None
    return ranking.seed_control(study.accuracies[recipe], fractions, **_options(resamples))


def _published(study: Ranking, recipe: str, resamples: int) -> ranking.TauCurve:
    found = np.array([[study.published.get(cell, math.nan)] for cell in study.cells])
    ours = study.accuracies[recipe]
    options = _options(resamples)
    return ranking.kendall_tau_at_top(found, ours, (1.0,), average="all", **options)


def _gain(study: Ranking, recipe: str, resamples: int) -> list[str]:
    if recipe == study.fixed:
        return ["–", "–"]
    pair = study.accuracies[study.fixed], study.accuracies[recipe]
    one = gains.gain_summary(*pair, **_options(resamples))
    mean, low, high = (f"{100 * value:+z.2f}" for value in (one.mean, one.low, one.high))
    number = len(one.gains)
    return [f"{mean} [{low}, {high}]", f"{round(one.share * number)} of {number}"]


def _shown(curve: ranking.TauCurve) -> list[str]:
    return [
        f"{_number(value)} [{_number(low)}, {_number(high)}]" if math.isfinite(value) else "–"
        for value, low, high in zip(curve.value, curve.low, curve.high, strict=True)
    ]


def _number(value: float) -> str:
    return f"{value:z.2f}" if math.isfinite(value) else "–"
