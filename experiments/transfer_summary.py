"""What the searches and the measurements of `experiments.transfer` say about the rules."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import archscale_jax as archscale
from archscale_jax.rules import LEARNING_RATE_RULES
from archscale_jax.tuning._search import excess_loss
from experiments.lab.sweeps import trial_hash
from experiments.transfer_study import Trial

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
      excess_loss: what the prediction costs: the training loss at the predicted rate over the
        smallest one, less 1, the median over networks; see `archscale_jax.tuning.loss_at`.
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
    excess_loss: float
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
            "losses": mean_losses(result),
            **{
                rule: _predict(rule, (trial, measured), (base_trial, base), truth["rate"])
                for rule in RULES
            },
        }
        for trial, result, measured in found[1:]
    ]


def mean_losses(result: Mapping[str, Any]) -> dict[float, float]:
    """Returns the loss by rate of a search, the mean over seeds; inf where a seed was lost."""
    losses: dict[float, list[float]] = {}
    for rate, _, loss in result["runs"]:
        losses.setdefault(rate, []).append(math.inf if loss is None else loss)
    return {rate: float(np.mean(losses[rate])) for rate in sorted(losses)}


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
            fields = archscale.tuning.UpdateSize._fields
            sizes = {name: jnp.asarray(np.asarray(measured[name], float)) for name in fields}
            pair.append(archscale.tuning.UpdateSize(**sizes))
    try:
        return archscale.predict_learning_rate(pair[0], pair[1], base_rate, rule)
    except ValueError:
        return math.nan


def summarise(study: str, rows: list[Row], *, resamples: int = 2000) -> list[Summary]:
    """Returns a summary per rule."""
    summaries = []
    for rule in RULES:
        known = [row for row in rows if math.isfinite(row[rule])]
        if len(known) < 3:
            continue
        pairs = np.asarray([(row[rule], row["rate"]) for row in known])
        logs, noise = np.log(pairs), np.asarray([row["noise"] for row in known])
        excess = [excess_loss(row[rule], row["losses"]) for row in known]
        generator = np.random.default_rng(0)
        samples = [logs[generator.integers(len(logs), size=len(logs))] for _ in range(resamples)]
        summaries.append(
            Summary(
                study,
                rule,
                len(logs),
                _correlation(logs),
                *_interval([_correlation(sample) for sample in samples]),
                _correlation(pairs),
                _slope(logs),
                _error(logs),
                *_interval([_error(sample) for sample in samples]),
                float(np.median(excess)),
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


def spread_of_answers(results: list[Mapping[str, Any]]) -> str:
    """Says how far the answers of single seeds lie apart, and how far the bare argmins do."""
    answers, argmins = [], []
    for result in results:
        runs = [
            archscale.tuning.Run(rate, seed, math.inf if loss is None else loss)
            for rate, seed, loss in result["runs"]
        ]
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
