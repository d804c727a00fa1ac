"""Table and figures of `experiments.transfer`."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import archscale_jax as archscale
from archscale_jax import files
from archscale_jax.rules import LEARNING_RATE_RULES
from archscale_jax.sweeps import trial_hash
from experiments import common
from experiments.transfer_study import Trial

RULES = (
    "measured",
    "relative",
    "absolute",
    "sharpness",
    "path_sum",
    "path_sum_activations",
    "author_code",
    "depth",
    "effective_depth",
    "none",
)
Row = dict[str, Any]


class Summary(NamedTuple):
    """How well one rule predicts the rates of one study, the base left out.

    Attributes:
      study: its name.
      rule: its name.
      networks: how many networks the rule could say something about.
      correlation: Pearson's r of predicted and true log rates.
      correlation_low: lower end of its 95 % bootstrap interval over networks.
      correlation_high: upper end.
      linear_correlation: r of the rates themselves.
      slope: of true on predicted log rates; 1 is calibrated.
      error: zero-shot RMS error in nats of log rate.
      error_low: lower end of its 95 % bootstrap interval.
      error_high: upper end.
      noise: RMS standard error of the true log ratio to the base, from its seeds.
    """

    study: str
    rule: str
    networks: int
    correlation: float
    correlation_low: float
    correlation_high: float
    linear_correlation: float
    slope: float
    error: float
    error_low: float
    error_high: float
    noise: float


def rows(trials: list[Trial], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Returns a row per network: its trial, its true rate, and the rate that every rule predicts.

    Args:
      trials: of one study, that of the base network first.
      records: `results`, `measurements` and `sharpness` by the trial's hash. A network whose search
        or measurement failed is left out; so is every one if the base failed.
    """
    found = []
    for trial in trials:
        name = trial_hash(trial)
        if name in records["results"] and name in records["measurements"]:
            measured = records["measurements"][name] | records["sharpness"].get(name, {})
            found.append((trial, records["results"][name], measured))
    if not found or found[0][0] is not trials[0]:
        return []
    base_trial, truth, base = found[0]
    return [
        {
            "trial": trial,
            "rate": result["rate"],
            "noise": math.hypot(_noise(result), _noise(truth)),
            **{
                rule: _predict(rule, (trial, measured), (base_trial, base), truth["rate"])
                for rule in RULES
            },
        }
        for trial, result, measured in found[1:]
    ]


def _noise(result: Mapping[str, Any]) -> float:
    return math.nan if result["uncertainty"] is None else result["uncertainty"]


def _predict(rule: str, target, base, base_rate: float) -> float:
    """The predicted rate; nan where the rule says nothing about a graph, or was not measured."""
    pair: list[Any] = []
    for trial, measured in (target, base):
        if rule in LEARNING_RATE_RULES:
            text, kernel_size = trial["architecture"], trial["kernel_size"]
            pair.append(archscale.dag_graph(text, kernel_size=kernel_size))
        elif rule == "sharpness":
            pair.append(np.asarray(measured.get("sharpness", math.nan)))
        else:
            fields = archscale.UpdateSize._fields
            sizes = {name: jnp.asarray(measured[name]) for name in fields}
            pair.append(archscale.UpdateSize(**sizes))
    try:
        return archscale.predict_learning_rate(pair[0], pair[1], base_rate, rule)
    except ValueError:
        return math.nan


def summarise(study: str, rows: list[Row], *, resamples: int = 2000) -> list[Summary]:
    """Returns a summary per rule."""
    summaries = []
    for rule in RULES:
        pairs = [(row[rule], row["rate"], row["noise"]) for row in rows]
        pairs = np.asarray([pair for pair in pairs if math.isfinite(pair[0])]).reshape(-1, 3)
        if len(pairs) < 3:
            continue
        logs, noise = np.log(pairs[:, :2]), pairs[:, 2]
        generator = np.random.default_rng(0)
        samples = [logs[generator.integers(len(logs), size=len(logs))] for _ in range(resamples)]
        summaries.append(
            Summary(
                study,
                rule,
                len(logs),
                _correlation(logs),
                *_interval([_correlation(sample) for sample in samples]),
                _correlation(pairs[:, :2]),
                _slope(logs),
                _error(logs),
                *_interval([_error(sample) for sample in samples]),
                float(np.sqrt(np.mean(noise**2))),
            )
        )
    return summaries


def _correlation(pairs: np.ndarray) -> float:
    if np.any(np.ptp(pairs, axis=0) < 1e-12):
        return math.nan  # a rule that predicts one rate for all
    return float(np.corrcoef(pairs.T)[0, 1])


def _slope(pairs: np.ndarray) -> float:
    predicted, true = pairs.T
    if np.ptp(predicted) < 1e-12:
        return math.nan
    return float(np.polyfit(predicted, true, 1)[0])


def _error(pairs: np.ndarray) -> float:
    return float(np.sqrt(np.mean((pairs[:, 0] - pairs[:, 1]) ** 2)))


def _interval(samples: list[float]) -> tuple[float, float]:
    if not np.any(np.isfinite(samples)):
        return math.nan, math.nan
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return float(low), float(high)


_COLUMNS = ("study", "rule", "n", "r (log)", "r (linear)", "slope", "RMS error, nats", "noise")


def _cells(one: Summary) -> list[str]:
    return [
        one.study,
        one.rule,
        str(one.networks),
        f"{_number(one.correlation)} [{_number(one.correlation_low)}, "
        f"{_number(one.correlation_high)}]",
        _number(one.linear_correlation),
        _number(one.slope),
        f"{_number(one.error)} [{_number(one.error_low)}, {_number(one.error_high)}]",
        _number(one.noise),
    ]


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def table(summaries: list[Summary]) -> Table:
    """Returns the table for a terminal."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(_COLUMNS):
        result.add_column(column, justify="right" if index > 1 else "left")
    for before, one in zip([None, *summaries], summaries, strict=False):
        if before is not None and before.study != one.study:
            result.add_section()
        result.add_row(*_cells(one))
    return result


def overview(summaries: list[Summary]) -> list[list[str]]:
    """Returns a line per study after a heading: r and error of each kind of rule."""
    kinds = ("measured", "relative", "absolute", "sharpness")
    heading = ["study", "n", "noise", *(f"{kind}: r, error" for kind in kinds)]
    lines = [[*heading, "closed form of the smallest error: r, error", "unscaled error"]]
    for study in dict.fromkeys(one.study for one in summaries):
        found = {one.rule: one for one in summaries if one.study == study}
        closed = [found[rule] for rule in LEARNING_RATE_RULES if rule in found and rule != "none"]
        best = min(closed, key=lambda one: one.error)
        one = found["measured"]
        lines.append(
            [study, str(one.networks), _number(one.noise)]
            + [_r_and_error(found[kind]) if kind in found else "–" for kind in kinds]
            + [f"{best.rule}: {_r_and_error(best)}", _number(found["none"].error)]
        )
    return lines


def _r_and_error(one: Summary) -> str:
    return f"{_number(one.correlation)}, {_number(one.error)}"


def spread_of_answers(results: list[Mapping[str, Any]]) -> str:
    """Says how far the answers of single seeds lie apart, and how far the bare argmins do."""
    answers, argmins = [], []
    for result in results:
        runs = [
            archscale.Run(rate, seed, math.inf if loss is None else loss)
            for rate, seed, loss in result["runs"]
        ]
        rates = archscale.summarise_runs(runs).seed_rates
        if len(rates) < 2:
            continue
        answers.append(np.var(np.log(rates), ddof=1))
        seeds = {run.seed for run in runs}
        shared = {r.rate for r in runs if {o.seed for o in runs if o.rate == r.rate} == seeds}
        best = [
            min(
                (run for run in runs if run.seed == seed and run.rate in shared),
                key=_loss_then_rate,
            )
            for seed in seeds
        ]
        argmins.append(np.var(np.log([run.rate for run in best]), ddof=1))
    if not answers:
        return "one seed: the spread of the answers is not known"
    spreads = (float(np.sqrt(np.mean(one))) for one in (answers, argmins))
    return (
        "standard deviation over seeds, RMS over {} networks: {:.2f} nats for the answers of the "
        "search, {:.2f} for the argmins"
    ).format(len(answers), *spreads)


def _loss_then_rate(run: archscale.Run) -> tuple[float, float]:
    return run.loss, -run.rate


def markdown(summaries: list[Summary], spread: str) -> str:
    """Returns the overview, the spread of the answers and the whole table as Markdown."""
    whole = [list(_COLUMNS), *map(_cells, summaries)]
    return (
        f"{common.markdown_table(overview(summaries))}\n{spread}\n\n{common.markdown_table(whole)}"
    )


_DRAWN = ("path_sum_activations", "author_code", "path_sum", "absolute", "relative", "measured")


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
    files.write_atomically(path, lambda target: figure.savefig(target, dpi=110))
