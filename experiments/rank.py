"""Do rankings of architectures survive when each is trained properly? Cells of NAS-Bench-201.

    python -m experiments.rank --data_dir=data/fashion_mnist --workdir=runs/rank

Samples cells and trains each under several recipes with several seeds: `fixed`, the benchmark's one
initialization and rate for all, and those whose initialization and rate follow from the cell:
`author_code`, `path_sum`, `measured`, and `mup`, which sees widths alone. First it searches the
rate of the base cells that the recipes scale from, and measures one update of every cell. Then it
says how accuracies, their order and their gaps change. Writes config.json, bases.jsonl,
measurements.jsonl, results.jsonl, figures, table.md and report.html, and prints the answer. Killed
and started again it goes on. The defaults are the run of the docs; --preset=paper is the paper's.
"""

import collections
import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from absl import flags

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import cell_code, cell_graph
from archscale_jax._spaces.cell import cell_digits, code_of_digits
from experiments.lab import common, page, panels, ranges, runners, studies
from experiments.lab.data_flags import define_data_flags
from experiments.lab.panels import COLOURS, GREY
from experiments.lab.sweeps import run_study
from experiments.lab.tables import NONE, number
from experiments.nasbench import benchmark_tables, gains, rank_study, ranking
from experiments.nasbench.rank_study import PRESETS, RECIPES

FLAGS = flags.FLAGS

flags.DEFINE_enum("preset", "small", list(PRESETS), "What is not said by a flag of its own.")
define_data_flags(None)
ranges.define("downscale", None, "Make images so many times smaller.")
ranges.define("channels", None, "C, channels of the first stage.", "width")
ranges.define("cells_per_stage", None, "N, cells in every stage.")
ranges.define("batch_size", None, "Examples an update.", "batch_size_of_two")
ranges.define("epochs", None, "Epochs; a fraction trains part of the last.")
flags.DEFINE_bool("flip", None, "Augmentation: mirror half of the images.")
ranges.define("padding", None, "Augmentation: shift by so many pixels.")
ranges.define("weight_decay", None, "Coupled weight decay.")
ranges.define("fixed_rate", None, "Learning rate of the recipe `fixed`.", "rate")
ranges.define("num_cells", None, "How many random cells, without isomorphic ones.")
ranges.define_list(
    "cell",
    [],
    "These cells, three at least, instead of random ones.",
    ranges.Checked(cell_graph, "a code such as 3_34_131"),
    least=0,
)
ranges.define_list(
    "recipe",
    list(RECIPES),
    "`fixed`, and those to compare with it.",
    ranges.name_of("recipe", RECIPES),
    least=2,
)
ranges.define("num_seeds", None, "Seeds of every cell and recipe.")
flags.DEFINE_string(
    "table", None, "CSV of published accuracies to compare with; see docs/results/nasbench201.md."
)
flags.DEFINE_string("table_column", "cifar10_test", "Its column.")
flags.DEFINE_string("workdir", "runs/rank", "Folder for config, results and figures.")
runners.define_flags(workers=2)

NOT_SETTINGS = ("data_dir", "workdir", "table", "table_column")
EXTENSIBLE = ("cell", "num_cells", "num_seeds", "recipe")


def settings() -> dict[str, Any]:
    """Returns what decides what is computed: the preset, and the flags that were given."""
    values = studies.flag_values()
    found = dict(PRESETS[FLAGS.preset])
    for name, value in values.items():
        if value is not None and name not in (*NOT_SETTINGS, "preset"):
            found[name] = value
    return found


def check(chosen: dict[str, Any]) -> None:
    """Checks what is chosen against the data set and what a ranking needs.

    Raises:
      FileNotFoundError: the data set is missing.
      ValueError: cells that are too few to have an order, no recipe `fixed`, or a size that the
        images or the examples are too small for.
    """
    if "fixed" not in chosen["recipe"]:
        raise ValueError(
            f"--recipe must name fixed, which others are compared with, found "
            f"{','.join(chosen['recipe'])}"
        )
    if 0 < len(chosen["cell"]) < gains.MIN_ARCHITECTURES:
        raise ValueError(
            f"--cell must name {gains.MIN_ARCHITECTURES} cells at least, as a ranking needs, found "
            f"{', '.join(chosen['cell'])}"
        )
    studies.check_trials([chosen], FLAGS.data_dir, "--downscale")
    images = studies.load(chosen["dataset"], FLAGS.data_dir, chosen["downscale"])
    common.check_padding(images, chosen["padding"])


def read_published() -> dict[str, float]:
    """Returns the published accuracy of every cell, by code, in percent.

    Raises:
      ValueError: a malformed table, or one without the column.
    """
    try:
        table = benchmark_tables.read_table(FLAGS.table)
    except OSError as error:
        raise ValueError(
            f"--table={FLAGS.table} cannot be read: {error.strerror or error}; give a CSV file"
        ) from None
    if FLAGS.table_column not in table.accuracies:
        column = unknown("column", FLAGS.table_column, table.accuracies)
        raise ValueError(f"{FLAGS.table}: {column}")
    codes = (code_of_digits(cell_digits(cell)) for cell in table.cells)
    column = table.accuracies[FLAGS.table_column].tolist()
    return dict(zip(codes, column, strict=True))


def report(
    records: list[dict[str, Any]], workdir: pathlib.Path, published: dict[str, float] | None
) -> None:
    """Tells what failed, and writes and prints the table and the figures."""
    failed = [
        f"{count} runs of {recipe} failed: {error}"
        for (recipe, error), count in collections.Counter(
            (record["trial"]["recipe"], record["error"]) for record in records if "error" in record
        ).items()
    ]
    for line in failed:
        print(line, file=sys.stderr)
    accuracies, cells = rank_study.accuracies_of(records)
    ranking_ = ranking_of(accuracies, cells, published=published)
    for name, (draw, _) in FIGURES.items():
        draw(ranking_, workdir / f"{name}.png")
    page.publish(
        workdir,
        f"Ranking of {len(ranking_.cells)} cells under {len(ranking_.accuracies)} recipes",
        __doc__,
        remarks=[*answer(ranking_), *failed],
        tables={
            "Accuracy, gain and Kendall's tau of every recipe, with 95 % intervals.":
                table(ranking_)
        },
        figures={workdir / f"{name}.png": caption for name, (_, caption) in FIGURES.items()},
    )  # fmt: skip


def run() -> None:
    """Searches, measures and trains what is missing, prints and draws."""
    chosen = settings()
    check(chosen)
    published = read_published() if FLAGS.table is not None else None
    plan = rank_study.plan_of(chosen, FLAGS.data_dir)

    def study(trials, function, name: str):
        run_trial = functools.partial(function, data_dir=FLAGS.data_dir)
        return run_study(trials, run_trial, workdir / f"{name}.jsonl", description=name, **options)

    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, chosen, extensible=EXTENSIBLE)
        bases = study(plan.searches, rank_study.search_rate, "bases")
        found = study(plan.measurements, rank_study.measure, "measurements")
        trials = rank_study.trials_of(plan, bases)
        train = functools.partial(rank_study.train, measurements=rank_study.by_cell(found))
        records = study(trials, train, "results")
    report(records, workdir, published)


# What they say, of the cells that have a run under every recipe: all numbers are of the same ones.

Accuracies = Mapping[str, np.ndarray]
FRACTIONS = (1.0, 0.5, 0.2)


class Ranking(NamedTuple):
    """What the report is about.

    Attributes:
      accuracies: [A, S] by recipe, from 0 to 1, NaN where a run is missing; each cell has one left.
      cells: the A codes, such as `3_34_131`.
      fixed: the recipe that others are compared with.
      published: accuracy in percent by cell, of those that are known.
      missing: by recipe, how many of how many runs are missing.
    """

    accuracies: Accuracies
    cells: Sequence[str]
    fixed: str
    published: Mapping[str, float]
    missing: Mapping[str, str]

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
    """Returns the data of a report, checked, of the cells with a run under every recipe.

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


def answer(study: Ranking, *, resamples: int = 1000) -> list[str]:
    """Returns a sentence for every recipe: whether the ranking under the fixed one survives it.

    It does where Kendall's tau to it lies no further below that of seeds among themselves than the
    95 % interval over cells allows.
    """
    return [_verdict(study, recipe, resamples) for recipe in study.others]


def _verdict(study: Ranking, recipe: str, resamples: int) -> str:
    pair = study.accuracies[study.fixed], study.accuracies[recipe]
    tau = tau_to_fixed(study, recipe, (1.0,), resamples)
    assert tau is not None
    found = f"Kendall's tau is {number(float(tau.value[0]), 'z.2f')}"
    gain = 100 * gains.gain_summary(*pair, **_options(resamples)).mean
    ranking_ = f"the ranking of {len(study.cells)} cells under {study.fixed}"
    ends = f"accuracy changes by {gain:+z.2f} points in the mean."
    if num_seeds(study) < 2:
        return f"Whether {ranking_} survives {recipe} one seed does not tell: {found}; {ends}"
    below = ranking.tau_shortfall(*pair, (1.0,), **_options(resamples))
    value, low, high = (float(one[0]) for one in (below.value, below.low, below.high))
    if not all(map(math.isfinite, (value, low, high))):
        return f"Whether {ranking_} survives {recipe} these runs do not tell: {found}; {ends}"
    survives = "does not survive" if low > 1e-9 else "survives"  # rounding of equal taus
    return (
        f"{ranking_[0].upper()}{ranking_[1:]} {survives} {recipe}, as far as {num_seeds(study)} "
        f"seeds tell: {found}, {value:z.2f} [{low:z.2f}, {high:z.2f}] below that of seeds among "
        f"themselves; {ends}"
    )


def table(study: Ranking, *, resamples: int = 1000) -> pd.DataFrame:
    """Returns a row for every recipe: accuracy, gain, and taus beside their seed control.

    Tau and control are means over disjoint groups of half the seeds; see `ranking`.
    """
    shares = [f"top {fraction:.0%}" if fraction < 1 else "all" for fraction in FRACTIONS]
    rows = []
    for recipe, accuracies in study.accuracies.items():
        pair = study.accuracies[study.fixed], accuracies
        means = 100 * gains.seed_means(accuracies)
        gain, gaining = _gain(study, recipe, resamples)
        row = {
            "recipe": recipe,
            f"accuracy of {len(study.cells)} cells, %": f"{means.mean():.2f}",
            "spread over cells, %": f"{means.std(ddof=1):.2f}",
            "gain, points": gain,
            "cells that gain": gaining,
            "runs missing": study.missing[recipe],
        }
        for name, curve in {
            f"tau to {study.fixed}": tau_to_fixed(study, recipe, FRACTIONS, resamples),
            "seed control": control_of(study, recipe, FRACTIONS, resamples),
        }.items():
            shown = _shown(curve) if curve else [NONE] * len(shares)
            row |= {f"{name}, {share}": one for share, one in zip(shares, shown, strict=True)}
        below = NONE
        if recipe != study.fixed and num_seeds(study) > 1:
            (below,) = _shown(ranking.tau_shortfall(*pair, (1.0,), **_options(resamples)))
        row["tau below control, all"] = below
        if study.published:
            (row["tau to published"],) = _shown(_published(study, recipe, resamples))
        rows.append(row)
    return pd.DataFrame(rows)


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


def _gain(study: Ranking, recipe: str, resamples: int) -> tuple[str, str]:
    if recipe == study.fixed:
        return NONE, NONE
    pair = study.accuracies[study.fixed], study.accuracies[recipe]
    one = gains.gain_summary(*pair, **_options(resamples))
    mean, low, high = (f"{100 * value:+z.2f}" for value in (one.mean, one.low, one.high))
    cells = len(one.gains)
    return f"{mean} [{low}, {high}]", f"{round(one.share * cells)} of {cells}"


def _shown(curve: ranking.TauCurve) -> list[str]:
    return [
        f"{number(value, 'z.2f')} [{number(low, 'z.2f')}, {number(high, 'z.2f')}]"
        if math.isfinite(value)
        else NONE
        for value, low, high in zip(curve.value, curve.low, curve.high, strict=True)
    ]


# Figures [AAS, figures on NAS-Bench-201].

CURVE_FRACTIONS = tuple((np.arange(1, 11) / 10).tolist())


def _colour(study: Ranking, recipe: str) -> str:
    return COLOURS[study.others.index(recipe) % len(COLOURS)] if recipe != study.fixed else GREY


_panels = functools.partial(panels.create_panels, width=3.5, columns=3)


def draw_accuracies(study: Ranking, path: pathlib.Path) -> None:
    """Draws accuracy under each recipe against that under `fixed`, a dot a cell."""
    figure, drawn = _panels(len(study.others), 3.8, sharex=True, sharey=True)
    x, x_error = _means_and_errors(study.accuracies[study.fixed])
    every = [_means_and_errors(one)[0] for one in study.accuracies.values()]
    margin = 0.04 * np.ptp(every) + 0.1
    low, high = np.min(every) - margin, np.max(every) + margin
    for panel, recipe in zip(drawn, study.others, strict=True):
        y, y_error = _means_and_errors(study.accuracies[recipe])
        panel.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", markersize=3.5, linewidth=0,
                       color=_colour(study, recipe), ecolor="#bbbbbb", elinewidth=0.8)  # fmt: skip
        panel.axline((low, low), slope=1, color=GREY, linewidth=0.8, zorder=0)
        panel.set(xlim=(low, high), ylim=(low, high), box_aspect=1)
        title = f"{recipe}: {np.mean(y > x):.0%} of {len(x)} cells above the line"
        panel.set_title(title, fontsize=9)
    errors = " (± standard error)" if num_seeds(study) > 1 else ""
    across = f"accuracy under {study.fixed}, %"
    panels.finish(figure, path, across=across, up=f"accuracy, %{errors}")


def _means_and_errors(accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percent; a cell with one seed has error 0."""
    number = np.isfinite(accuracies).sum(1)
    means = gains.seed_means(accuracies)
    squares = np.nansum((accuracies - means[:, None]) ** 2, axis=1)
    return 100 * means, 100 * np.sqrt(squares / np.maximum(number * (number - 1), 1))


def draw_taus(study: Ranking, path: pathlib.Path, *, resamples: int = 1000) -> None:
    """Draws tau to `fixed` at its top K% with bootstrap bands, beside the seed controls."""
    figure, drawn = _panels(len(study.others), 3.3, sharex=True, sharey=True)
    base = control_of(study, study.fixed, CURVE_FRACTIONS, resamples)
    percent = 100 * np.asarray(CURVE_FRACTIONS)
    for panel, recipe in zip(drawn, study.others, strict=True):
        colour = _colour(study, recipe)
        curve = tau_to_fixed(study, recipe, CURVE_FRACTIONS, resamples)
        own = control_of(study, recipe, CURVE_FRACTIONS, resamples)
        assert curve is not None
        panel.fill_between(percent, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(percent, curve.value, "o-", color=colour, markersize=3.5,
                   label=f"{recipe} to {study.fixed}")  # fmt: skip
        if base and own:
            panel.plot(percent, base.value, "--", color=GREY, label=f"seeds of {study.fixed}")
            panel.plot(percent, own.value, ":", color=colour, label=f"seeds of {recipe}")
        panel.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        panel.legend(fontsize=7.5, frameon=False, loc="lower right")
    label = f"top K % of cells under {study.fixed}"
    label += " (of seeds: under their recipe)" if base else ""
    panels.finish(figure, path, across=label, up="Kendall's tau")


def draw_gaps(study: Ranking, path: pathlib.Path) -> None:
    """Draws the distribution of the accuracy gaps between pairs of cells under each recipe."""
    figure, (panel,) = _panels(1, 3.3)
    figure.set_size_inches(6.2, 3.9)
    for recipe in study.accuracies:
        pair = study.accuracies[study.fixed], study.accuracies[recipe]
        found, colour = gains.pairwise_gaps(*pair), _colour(study, recipe)
        label = recipe
        if recipe != study.fixed:
            label += f": {found.flips:.1%} of pairs flip"
            if math.isfinite(found.clear_flips):
                label += f", {found.clear_flips:.1%} beyond noise"
        panel.ecdf(100 * found.other, color=colour, linewidth=1.4, label=label)
        if math.isfinite(found.noise[1]):
            panel.axvline(200 * found.noise[1], color=colour, linestyle=":", linewidth=1)
    panel.set_xscale("symlog", linthresh=0.1)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter("{x:g}")
    label = "gap between two cells, % (linear below 0.1; dotted: two standard errors of a gap)"
    panel.set_xlabel(label, fontsize=9)
    panel.set_ylabel("share of pairs with a smaller gap", fontsize=9)
    panel.legend(fontsize=8, frameon=False, loc="upper left")
    panels.finish(figure, path)


def draw_gains(study: Ranking, path: pathlib.Path) -> None:
    """Draws gain over `fixed` against the mean depth of a cell's paths, by its shortcut."""
    depths, shortcut = cell_features(study.cells)
    figure, drawn = _panels(len(study.others), 3.3, sharex=True, sharey=True)
    for panel, recipe in zip(drawn, study.others, strict=True):
        pair = study.accuracies[study.fixed], study.accuracies[recipe]
        found = 100 * gains.gain_summary(*pair).gains
        noise = 200 * math.hypot(*(gains.pooled_deviation(one) for one in pair))
        noise /= math.sqrt(num_seeds(study))
        if math.isfinite(noise):
            panel.axhspan(-noise, noise, color=GREY, alpha=0.15, linewidth=0, zorder=0,
                          label="within two standard errors of 0")  # fmt: skip
        for has, marker, colour in ((True, "o", COLOURS[0]), (False, "^", COLOURS[1])):
            chosen = shortcut == has
            label = f"input {'joins' if has else 'does not join'} output by a skip"
            panel.scatter(depths[chosen], found[chosen], s=18, marker=marker, color=colour,
                          alpha=0.75, linewidths=0, label=label)  # fmt: skip
        panel.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        title = f"{recipe}: mean {found.mean():+.2f} points"
        if np.ptp(depths) and np.ptp(found):
            tau = scipy.stats.kendalltau(depths, found).statistic
            title += f", tau with depth {tau:+.2f}"
        panel.set_title(title, fontsize=9)
    panels.finish(
        figure,
        path,
        across="convolutions on a path through the cell, mean over paths",
        up=f"gain over {study.fixed}, percentage points",
        columns=min(3, len(drawn)),
    )


def cell_features(cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean depth of each cell's paths, and whether a skip joins input and output."""
    depths, shortcut = [], []
    for cell in cells:
        graph = cell_graph(cell)
        paths = archscale.path_statistics(graph)
        depths.append(paths.depth_sum / paths.count)
        shortcut.append(cell_code(graph).split("_")[2][0] == "1")
    return np.array(depths), np.array(shortcut)


FIGURES = {
    "accuracies": (
        draw_accuracies, "Accuracy under each recipe against that under fixed, a dot a cell."
    ),
    "taus": (
        draw_taus,
        "Kendall's tau to fixed among its best cells, with bootstrap bands and seed controls.",
    ),
    "gaps": (
        draw_gaps, "Distribution of the gaps in accuracy between pairs of cells under each recipe."
    ),
    "gains": (
        draw_gains, "Gain over fixed against the mean depth of a cell's paths, a mark a cell."
    ),
}  # fmt: skip
"""What draws each figure, and what it shows."""


if __name__ == "__main__":
    common.run_binary(run)
