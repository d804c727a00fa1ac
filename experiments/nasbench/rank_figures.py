"""Figures of a ranking of cells under several recipes [AAS, figures on NAS-Bench-201]."""

import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import scipy.stats

import archscale_jax as archscale
from archscale_jax._spaces import cell_code
from experiments.lab.panels import create_panels, save
from experiments.nasbench import gains, rank_report

FRACTIONS = tuple((np.arange(1, 11) / 10).tolist())
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#777777"
CAPTIONS = {
    "accuracies": "Accuracy under each recipe against that under fixed, a dot a cell.",
    "taus": "Kendall's tau to fixed among its best cells, with bootstrap bands and seed controls.",
    "gaps": "Distribution of the gaps in accuracy between pairs of cells under each recipe.",
    "gains": "Gain over fixed against the mean depth of a cell's paths, a mark a cell.",
}
"""What each figure shows, by the name of its function."""


def _colour(study: rank_report.Ranking, recipe: str) -> str:
    return COLOURS[study.others.index(recipe) % len(COLOURS)] if recipe != study.fixed else GREY


_panels = functools.partial(create_panels, width=3.5, columns=3)


def draw_accuracies(study: rank_report.Ranking, path: pathlib.Path) -> None:
    """Draws accuracy under each recipe against that under `fixed`, a dot a cell."""
    figure, panels = _panels(len(study.others), 3.8, sharex=True, sharey=True)
    x, x_error = _means_and_errors(study.accuracies[study.fixed])
    every = [_means_and_errors(one)[0] for one in study.accuracies.values()]
    margin = 0.04 * np.ptp(every) + 0.1
    low, high = np.min(every) - margin, np.max(every) + margin
    for panel, recipe in zip(panels, study.others, strict=True):
        y, y_error = _means_and_errors(study.accuracies[recipe])
        panel.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", markersize=3.5, linewidth=0,
                       color=_colour(study, recipe), ecolor="#bbbbbb", elinewidth=0.8)  # fmt: skip
        panel.axline((low, low), slope=1, color=GREY, linewidth=0.8, zorder=0)
        panel.set(xlim=(low, high), ylim=(low, high), box_aspect=1)
        title = f"{recipe}: {np.mean(y > x):.0%} of {len(x)} cells above the line"
        panel.set_title(title, fontsize=9)
    figure.supxlabel(f"accuracy under {study.fixed}, %", fontsize=9)
    errors = " (± standard error)" if rank_report.num_seeds(study) > 1 else ""
    figure.supylabel(f"accuracy, %{errors}", fontsize=9)
    save(figure, path)


def _means_and_errors(accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percent; a cell with one seed has error 0."""
    number = np.isfinite(accuracies).sum(1)
    means = gains.seed_means(accuracies)
    squares = np.nansum((accuracies - means[:, None]) ** 2, axis=1)
    return 100 * means, 100 * np.sqrt(squares / np.maximum(number * (number - 1), 1))


def draw_taus(study: rank_report.Ranking, path: pathlib.Path, *, resamples: int = 1000) -> None:
    """Draws tau to `fixed` at its top K% with bootstrap bands, beside the seed controls."""
    figure, panels = _panels(len(study.others), 3.3, sharex=True, sharey=True)
    base = rank_report.control_of(study, study.fixed, FRACTIONS, resamples)
    percent = 100 * np.asarray(FRACTIONS)
    for panel, recipe in zip(panels, study.others, strict=True):
        colour = _colour(study, recipe)
        curve = rank_report.tau_to_fixed(study, recipe, FRACTIONS, resamples)
        own = rank_report.control_of(study, recipe, FRACTIONS, resamples)
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
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("Kendall's tau", fontsize=9)
    save(figure, path)


def draw_gaps(study: rank_report.Ranking, path: pathlib.Path) -> None:
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
    save(figure, path)


def draw_gains(study: rank_report.Ranking, path: pathlib.Path) -> None:
    """Draws gain over `fixed` against the mean depth of a cell's paths, by its shortcut."""
    depths, shortcut = cell_features(study.cells)
    figure, panels = _panels(len(study.others), 3.3, sharex=True, sharey=True)
    for panel, recipe in zip(panels, study.others, strict=True):
        pair = study.accuracies[study.fixed], study.accuracies[recipe]
        found = 100 * gains.gain_summary(*pair).gains
        noise = 200 * math.hypot(*(gains.pooled_deviation(one) for one in pair))
        noise /= math.sqrt(rank_report.num_seeds(study))
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
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(panels)),
                  fontsize=8, frameon=False)  # fmt: skip
    figure.supxlabel("convolutions on a path through the cell, mean over paths", fontsize=9)
    figure.supylabel(f"gain over {study.fixed}, percentage points", fontsize=9)
    save(figure, path)


def cell_features(cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean depth of each cell's paths, and whether a skip joins input and output."""
    depths, shortcut = [], []
    for cell in cells:
        graph = archscale.cell_graph(cell)
        paths = archscale.path_statistics(graph)
        depths.append(paths.depth_sum / paths.count)
        shortcut.append(cell_code(graph).split("_")[2][0] == "1")
    return np.array(depths), np.array(shortcut)
