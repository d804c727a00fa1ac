"""Table and figures of `experiments.transfer`."""

import math
import pathlib

import numpy as np
from rich import box
from rich.table import Table

from archscale_jax.rules import LEARNING_RATE_RULES
from archscale_jax.tuning import MEASURED_RULES
from experiments.lab import common
from experiments.lab.panels import save
from experiments.transfer_summary import Row, Summary

_COLUMNS = ("study", "rule", "n", "r (log)", "r (linear)", "slope",
            "RMS error, nats", "excess loss",
            "noise")  # fmt: skip


def _cells(one: Summary, *, intervals: bool) -> list[str]:
    correlation, error = _number(one.correlation), _number(one.error)
    if intervals:
        correlation += f" [{_number(one.correlation_low)}, {_number(one.correlation_high)}]"
        error += f" [{_number(one.error_low)}, {_number(one.error_high)}]"
    return [
        one.study,
        one.rule,
        str(one.networks),
        correlation,
        _number(one.linear_correlation),
        _number(one.slope),
        error,
        f"{one.excess_loss:.1%}" if math.isfinite(one.excess_loss) else "lost",
        _number(one.noise),
    ]


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def table(summaries: list[Summary]) -> Table:
    """Returns the table for a terminal, without intervals."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(_COLUMNS):
        result.add_column(column, justify="right" if index > 1 else "left")
    for before, one in zip([None, *summaries], summaries, strict=False):
        if before is not None and before.study != one.study:
            result.add_section()
        result.add_row(*_cells(one, intervals=False))
    return result


def overview(summaries: list[Summary]) -> list[list[str]]:
    """Returns a line per study after a heading: r, error and excess loss of each kind of rule."""
    known = {one.rule for one in summaries}
    kinds = [kind for kind in MEASURED_RULES if kind in known]
    heading = ["study", "n", "noise", *(f"{kind}: r, error, loss" for kind in kinds)]
    lines = [[*heading, "closed form of the smallest error: r, error, loss", "unscaled error"]]
    for study in dict.fromkeys(one.study for one in summaries):
        found = {one.rule: one for one in summaries if one.study == study}
        closed = [found[rule] for rule in LEARNING_RATE_RULES if rule in found and rule != "none"]
        best = min(closed, key=lambda one: one.error)
        one = found["standardized_update"]
        lines.append(
            [study, str(one.networks), _number(one.noise)]
            + [_r_and_error(found[kind]) if kind in found else "–" for kind in kinds]
            + [f"{best.rule}: {_r_and_error(best)}", _number(found["none"].error)]
        )
    return lines


def _r_and_error(one: Summary) -> str:
    excess = f"{one.excess_loss:.0%}" if math.isfinite(one.excess_loss) else "lost"
    return f"{_number(one.correlation)}, {_number(one.error)}, {excess}"


def markdown(summaries: list[Summary], spread: str) -> str:
    """Returns the overview, the spread of the answers and the whole table as Markdown."""
    tables = (overview(summaries), whole(summaries))
    return f"\n{spread}\n\n".join(map(common.markdown_table, tables))


def whole(summaries: list[Summary]) -> list[list[str]]:
    """Returns a line per study and rule after a heading, with intervals."""
    return [list(_COLUMNS), *(_cells(one, intervals=True) for one in summaries)]


_DRAWN = (
    "path_sum_activations",
    "chen2024_code",
    "path_sum",
    "absolute_update",
    "relative_update",
    "standardized_update",
)


def draw(study: str, rows: list[Row], summaries: list[Summary], path: pathlib.Path) -> None:
    """Draws true against predicted rates, a panel per rule, with the identity line; atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    by_rule = {one.rule: one for one in summaries}
    for axes, rule in zip(panels, _DRAWN, strict=True):
        if rule == "path_sum" and "sharpness" in by_rule:
            rule = "sharpness"
        points = [(row[rule], row["rate"], row["noise"]) for row in rows]
        predicted, true, noise = np.asarray(points, float).reshape(-1, 3).T
        spread = np.stack([true - true * np.exp(-noise), true * np.exp(noise) - true])
        axes.errorbar(predicted, true, yerr=spread, fmt="o", markersize=4, color="#0072B2",
                      ecolor="#bbbbbb", elinewidth=1, linewidth=0)  # fmt: skip
        axes.axline((0.1, 0.1), (1.0, 1.0), color="#777777", linewidth=0.8, zorder=0)
        if one := by_rule.get(rule):
            title = f"r = {_number(one.correlation)}, RMS error {_number(one.error)} nats"
            axes.set_title(f"{rule}\n{title}", fontsize=10)
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.supxlabel("predicted learning rate")
    figure.supylabel("best learning rate by search")
    figure.suptitle(f"{study}: {len(rows)} networks, predicted from the rate of the chain 2")
    save(figure, path, dpi=110)
