"""Does a rule give the learning rate of a network from that of a shallow one? [AAS Fig. 2, 3, 5, 7]

    python -m experiments.transfer --study=chains --workdir=runs/transfer

Searches the best rate of every network of the studies (the ground truth), measures every network at
initialization, and predicts its rate from that of the base network by every rule. Writes
config.json, results.jsonl (the searches), measurements.jsonl, sharpness.jsonl, table.md,
summary.json, a figure a study and report.html, and prints the table. Killed and started again it
runs what is missing; the same --workdir takes more studies later. At the paper's size:
--dataset=cifar10 --cnn_downscale=1 --cnn_width=128 --cnn_steps=0 --steps=0 (0 is one epoch).
"""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax.rules import LEARNING_RATE_RULES
from archscale_jax.tuning._basin import excess_loss
from experiments import transfer_study
from experiments.lab import common, files, networks, page, panels, ranges, runners, studies
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study, trial_hash
from experiments.lab.tables import NONE, number
from experiments.transfer_study import Trial

FLAGS = flags.FLAGS

ranges.define_list(
    "study",
    ["chains"],
    "Which networks; all takes every study.",
    ranges.name_of("study", ("all", *transfer_study.STUDIES)),
)
define_data_flags("digits")
ranges.define("width", 128, "Features of every vertex of an MLP.")
ranges.define("batch_size", 256, "Examples an update of an MLP.")
ranges.define("steps", 0, "Updates of a run of an MLP; 0 is one epoch.", "steps_or_0")
ranges.define("cnn_width", 8, "Channels of every vertex of a CNN.", "width")
ranges.define("cnn_batch_size", 64, "Examples an update of a CNN.", "batch_size")
ranges.define("cnn_steps", 100, "Updates of a run of a CNN; 0 is one epoch.", "steps_or_0")
ranges.define(
    "cnn_downscale", 2, "A CNN sees images averaged over squares of so many pixels.", "downscale"
)
ranges.define("num_seeds", 3, "Seeds of every search.")
ranges.define("max_networks", None, "Networks a study, its base included.")
flags.DEFINE_bool("sharpness", False, "Measure the sharpness too, which costs the most.")
flags.DEFINE_string("workdir", "runs/transfer", "Folder for config, results and figures.")
runners.define_flags(workers=2)

NOT_SETTINGS = ("data_dir", "max_networks", "sharpness", "study", "workdir")
"""Flags that do not change the result of a trial."""


def run() -> None:
    """Searches and measures what is missing, predicts, prints and draws."""
    settings = studies.flag_values(NOT_SETTINGS)
    names = list(transfer_study.STUDIES) if FLAGS.study == ["all"] else dict.fromkeys(FLAGS.study)
    chosen = {
        name: transfer_study.trials_of(name, settings, FLAGS.data_dir)[: FLAGS.max_networks]
        for name in names
    }
    unique = {trial_hash(trial): trial for trials in chosen.values() for trial in trials}
    functions = {
        "results": transfer_study.search_rate,
        "measurements": transfer_study.measure,
        "sharpness": transfer_study.measure_sharpness,
    }
    if not FLAGS.sharpness:
        del functions["sharpness"]
    records: dict[str, dict[str, Any]] = {"sharpness": {}}
    failed: list[str] = []
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        for name, function in functions.items():
            found = run_study(
                list(unique.values()),
                functools.partial(function, data_dir=FLAGS.data_dir),
                workdir / f"{name}.jsonl",
                description=name,
                **options,
            )
            failed += studies.failures(found)
            records[name] = {r["hash"]: r["result"] for r in found if "result" in r}
    _report(chosen, records, failed, workdir)


def _report(chosen, records, failed: list[str], workdir: pathlib.Path) -> None:
    found, figures, said = [], {}, []
    for name, trials in chosen.items():
        rows = rows_of(trials, records)
        found.append(summarise(name, rows))
        said.append(answer(name, rows, found[-1]))
        path = workdir / f"{name}.png"
        draw(name, rows, found[-1], path)
        figures[path] = f"{name}: best rates by search against predicted ones."
    summaries = pd.concat(found, ignore_index=True)
    files.write_json(
        workdir / "summary.json", files.strict_json(summaries.to_dict(orient="records"))
    )
    spread = spread_of_answers(list(records["results"].values()))
    page.publish(
        workdir,
        f"Predicted learning rates on {FLAGS.dataset.partition('#')[0]}: {', '.join(chosen)}",
        __doc__,
        remarks=[*said, f"{spread[0].upper()}{spread[1:]}.", *failed],
        tables={
            "Correlation, RMS error in nats and excess loss by kind of rule.": overview(summaries),
            "Every rule, with 95 % intervals over networks.": table(summaries),
        },
        figures=figures,
    )


# What the searches and the measurements say about the rules.

RULES = (
    "standardized_update",
    "relative_update",
    "absolute_update",
    "sharpness",
    "path_sum",
    "path_sum_activations",
    "chen2024_code",
    "depth",
    "effective_depth",
    "none",
)
Row = dict[str, Any]
LEAST_NETWORKS = 3
"""A correlation over fewer, without the base, says nothing."""


def rows_of(trials: list[Trial], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Returns a row per network: its trial, its true rate, and the rate that every rule predicts.

    Args:
      trials: of one study, that of the base network first.
      records: `results`, `measurements` and `sharpness` by the trial's hash. A network whose search
        or measurement failed is excluded; so is every one if the base failed.
    """
    found = []
    for trial in trials:
        name = trial_hash(trial)
        if name in records["results"] and name in records["measurements"]:
            measured = records["measurements"][name] | records["sharpness"].get(name, {})
            found.append((trial, records["results"][name], measured))
    if not found or found[0][0] is not trials[0]:
        return []
    base_trial, searched, base = found[0]
    return [
        {
            "trial": trial,
            "rate": result["rate"],
            "noise": math.hypot(_noise(result), _noise(searched)),
            "losses": networks.mean_losses(result),
            **{
                rule: _predict(rule, (trial, measured), (base_trial, base), searched["rate"])
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
            pair.append(networks.sizes_of(measured))
    try:
        return archscale.predict_learning_rate(pair[0], pair[1], base_rate, rule)
    except ValueError:
        return math.nan


def summarise(study: str, rows: list[Row], *, resamples: int = 2000) -> pd.DataFrame:
    """Returns how well every rule predicts the rates of one study, without the base.

    Returns:
      A row for every rule that says something about three networks at least: `study`, `rule`,
      `networks` (how many those are), `correlation` (Pearson's r of predicted and true log rates,
      with the ends `_low` and `_high` of its 95 % bootstrap interval over networks),
      `linear_correlation` (r of the rates themselves), `slope` (of true on predicted log rates; 1
      is calibrated), `error` (zero-shot RMS error in nats, with its interval), `excess_loss` (the
      training loss at the predicted rate over the smallest one, less 1, the median over networks;
      see `archscale_jax.tuning.loss_at`) and `noise` (RMS standard error of the true log ratio to
      the base, from its seeds).
    """
    summaries = []
    for rule in RULES:
        known = [row for row in rows if math.isfinite(row[rule])]
        if len(known) < LEAST_NETWORKS:
            continue
        pairs = np.asarray([(row[rule], row["rate"]) for row in known])
        logs, noise = np.log(pairs), np.asarray([row["noise"] for row in known])
        excess = [excess_loss(row[rule], row["losses"]) for row in known]
        generator = np.random.default_rng(0)
        samples = [logs[generator.integers(len(logs), size=len(logs))] for _ in range(resamples)]
        summary: Row = {"study": study, "rule": rule, "networks": len(logs)}
        summary |= _with_interval("correlation", _correlation, logs, samples)
        summary |= {"linear_correlation": _correlation(pairs), "slope": _slope(logs)}
        summary |= _with_interval("error", _error, logs, samples)
        summary["excess_loss"] = float(np.median(excess))
        summary["noise"] = float(np.sqrt(np.mean(noise**2)))
        summaries.append(summary)
    return pd.DataFrame(summaries)


def answer(study: str, rows: list[Row], summaries: pd.DataFrame) -> str:
    """Returns a sentence: which rule predicts best; of networks too few to say, their rates."""
    if len(summaries):
        none = summaries["rule"] == "none"
        best = summaries[~none].sort_values("error").iloc[0]
        return (
            f"On {best['networks']} networks of {study} the rates predicted by {best['rule']} miss "
            f"the best ones least, by {number(best['error'])} nats RMS; one rate for all misses by "
            f"{number(summaries[none].iloc[0]['error'])}."
        )
    misses = "".join(
        f" {row['trial']['architecture']}: best {row['rate']:.3g}, predicted by "
        f"standardized_update {row['standardized_update']:.3g}, one rate for all {row['none']:.3g}."
        for row in rows
    )
    return (
        f"Networks of {study} beside the base whose rates are known: {len(rows)}; rules are "
        f"compared from {LEAST_NETWORKS} on: raise --max_networks, or see what failed.{misses}"
    )


def _with_interval(name: str, statistic, pairs: np.ndarray, samples: list[np.ndarray]) -> Row:
    low, high = _interval([statistic(sample) for sample in samples])
    return {name: statistic(pairs), f"{name}_low": low, f"{name}_high": high}


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


def spread_of_answers(results: list[Mapping[str, Any]]) -> str:
    """Says how far the answers of single seeds lie apart, and how far the bare argmins do."""
    answers, argmins = [], []
    for result in results:
        runs = networks.runs_of(result)
        rates = archscale.tuning.summarise_runs(runs).seed_rates
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


def _loss_then_rate(run: archscale.tuning.Run) -> tuple[float, float]:
    return run.loss, -run.rate


# Tables and figures.


def table(summaries: pd.DataFrame) -> pd.DataFrame:
    """Returns a line per study and rule, with intervals."""
    rows = []
    for one in summaries.itertuples(index=False):
        rows.append(
            {
                "study": one.study,
                "rule": one.rule,
                "n": one.networks,
                "r (log)": f"{number(one.correlation)} "
                f"[{number(one.correlation_low)}, {number(one.correlation_high)}]",
                "r (linear)": number(one.linear_correlation),
                "slope": number(one.slope),
                "RMS error, nats": f"{number(one.error)} "
                f"[{number(one.error_low)}, {number(one.error_high)}]",
                "excess loss": number(one.excess_loss, ".1%", missing="diverged"),
                "noise": number(one.noise),
            }
        )
    return pd.DataFrame(rows)


def overview(summaries: pd.DataFrame) -> pd.DataFrame:
    """Returns a line per study: r, error and excess loss of each kind of rule."""
    if not len(summaries):
        return summaries
    kinds = [kind for kind in RULES[:4] if kind in set(summaries["rule"])]
    rows = []
    for study, group in summaries.groupby("study", sort=False):
        found = {one.rule: one for one in group.itertuples(index=False)}
        closed = [found[rule] for rule in LEARNING_RATE_RULES if rule in found and rule != "none"]
        best = min(closed, key=lambda one: one.error)
        row = {"study": study, "n": found["standardized_update"].networks}
        row["noise"] = number(found["standardized_update"].noise)
        for kind in kinds:
            row[f"{kind}: r, error, loss"] = _in_short(found[kind]) if kind in found else NONE
        row["closed form of the smallest error: r, error, loss"] = f"{best.rule}: {_in_short(best)}"
        rows.append(row | {"unscaled error": number(found["none"].error)})
    return pd.DataFrame(rows)


def _in_short(one: Any) -> str:
    excess = number(one.excess_loss, ".0%", missing="diverged")
    return f"{number(one.correlation)}, {number(one.error)}, {excess}"


_DRAWN = (
    "path_sum_activations",
    "chen2024_code",
    "path_sum",
    "absolute_update",
    "relative_update",
    "standardized_update",
)


def draw(study: str, rows: Sequence[Row], summaries: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws true against predicted rates, a panel per rule, with the identity line."""
    figure, drawn = panels.create_panels(6, 3.0, width=3.4, columns=3, sharex=True, sharey=True)
    by_rule = {one.rule: one for one in summaries.itertuples(index=False)}
    for panel, rule in zip(drawn, _DRAWN, strict=True):
        if rule == "path_sum" and "sharpness" in by_rule:
            rule = "sharpness"
        points = [(row[rule], row["rate"], row["noise"]) for row in rows]
        predicted, true, noise = np.asarray(points, float).reshape(-1, 3).T
        spread = np.stack([true - true * np.exp(-noise), true * np.exp(noise) - true])
        panel.errorbar(predicted, true, yerr=spread, fmt="o", markersize=4, linewidth=0,
                       color=panels.COLOURS[0], ecolor="#bbbbbb", elinewidth=1)  # fmt: skip
        panel.axline((0.1, 0.1), (1.0, 1.0), color=panels.GREY, linewidth=0.8, zorder=0)
        if one := by_rule.get(rule):
            title = f"r = {number(one.correlation)}, RMS error {number(one.error)} nats"
            panel.set_title(f"{rule}\n{title}", fontsize=10)
        panel.set(xscale="log", yscale="log")
    figure.suptitle(f"{study}: {len(rows)} networks, predicted from the rate of the chain 2")
    panels.finish(figure, path, across="predicted learning rate", up="best learning rate by search")


if __name__ == "__main__":
    common.run_binary(run)
