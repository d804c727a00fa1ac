"""Tables of the GradInit study: what it gains, and at which rates networks train."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import archscale_jax as archscale
from experiments.gradinit_study import BASES, parse_name

Record = Mapping[str, Any]

TRAINED = 1.5
"""A run trains if its loss ends below so many nats; guessing among ten classes is 2.3."""
LAST = 2
"""Tenths of the training over which the final loss is the mean."""


class Arm(NamedTuple):
    """One network, start and way of learning, over rates and seeds.

    Attributes:
      results: of `gradinit_study.run`, one a seed.
      search: final training losses of all rates; see `archscale_jax.tuning.summarise_runs`.
    """

    network: str
    start: str
    learned: str
    results: list[Mapping[str, Any]]
    search: archscale.tuning.RateSearch


def arms(records: Iterable[Record]) -> dict[tuple[str, str, str], Arm]:
    """Groups the finished trials; of a failed one its arm misses the seed."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if "result" in record:
            trial = record["trial"]
            key = (trial["network"], trial["start"], trial["learned"])
            found.setdefault(key, []).append(record)
    return {key: _arm(key, of_arm) for key, of_arm in found.items()}


def _arm(key: tuple[str, str, str], records: Sequence[Record]) -> Arm:
    runs = [
        archscale.tuning.Run(run["rate"], record["trial"]["seed"], final_loss(run))
        for record in records
        for run in record["result"]["runs"]
    ]
    results = [record["result"] for record in records]
    return Arm(*key, results, archscale.tuning.summarise_runs(runs))


def final_loss(run: Mapping[str, Any]) -> float:
    """Mean training loss over the last tenths; inf where it was not finite."""
    if run["accuracy"] is None or None in run["losses"]:
        return math.inf
    return float(np.mean(run["losses"][-LAST:]))


def best_rate(arm: Arm) -> float:
    """The rate with the smallest mean loss among those that were trained at."""
    losses = archscale.tuning.mean_losses(arm.search)
    return min(losses, key=lambda rate: losses[rate])


def best_runs(arm: Arm) -> list[Mapping[str, Any]]:
    """The run of every seed at the best rate."""
    best = best_rate(arm)
    return [next(run for run in result["runs"] if run["rate"] == best) for result in arm.results]


def trained_rates(arm: Arm) -> list[float]:
    """The rates at which all seeds train."""
    return [rate for rate, loss in worst_losses(arm).items() if loss < TRAINED]


def worst_losses(arm: Arm) -> dict[float, float]:
    """The largest final loss over seeds at every rate."""
    worst: dict[float, float] = {}
    for result in arm.results:
        for run in result["runs"]:
            worst[run["rate"]] = max(worst.get(run["rate"], -math.inf), final_loss(run))
    return worst


def predicted_rate(arm: Arm, every: Mapping[tuple[str, str, str], Arm]) -> float | None:
    """The rate by the rule `measured` from the best rate of the family's base, if that was run."""
    base_name = BASES[parse_name(arm.network).family]
    base = next((one for one in every.values() if one.network == base_name), None)
    if base is None or base is arm:
        return None
    try:
        return archscale.predict_learning_rate(_measured(arm), _measured(base), base.search.rate)
    except ValueError:  # a vertex that tells no examples apart
        return None


def _measured(arm: Arm) -> archscale.tuning.UpdateSize:
    names = archscale.tuning.UpdateSize._fields
    numbers = {
        name: jnp.asarray(
            [[math.nan if one is None else one for one in result["measured"][name]]
             for result in arm.results]
        )
        for name in names
    }  # fmt: skip
    return archscale.tuning.UpdateSize(**numbers)


def table(every: Mapping[tuple[str, str, str], Arm]) -> list[list[str]]:
    """Returns header and rows, one an arm."""
    head = ["network", "start", "GradInit", "best rate", "final loss", "test accuracy",
            "trains at", "measured rate", "costs"]  # fmt: skip
    rows = [head]
    for arm in every.values():
        runs = best_runs(arm)
        losses = [final_loss(run) for run in runs]
        accuracies = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
        rates = trained_rates(arm)
        predicted = predicted_rate(arm, every)
        rows.append(
            [
                arm.network,
                arm.start,
                {"none": "–", "gradinit": "yes"}.get(arm.learned, arm.learned),
                f"{best_rate(arm):.3g}",
                _spread(losses, 3),
                _spread(accuracies, 1) + " %",
                f"{min(rates):.3g} to {max(rates):.3g}" if rates else "none",
                "–" if predicted is None else f"{predicted:.2g}",
                _cost(arm, predicted),
            ]
        )
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    if not values or not np.all(np.isfinite(values)):
        return "diverged"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _cost(arm: Arm, rate: float | None) -> str:
    """By how much the loss at a rate exceeds that at the best."""
    if rate is None:
        return "–"
    losses = archscale.tuning.mean_losses(arm.search)
    excess = archscale.tuning.loss_at(rate, losses) - min(losses.values())
    return f"{excess:+.3f}" if math.isfinite(excess) else "lost"


def gains(every: Mapping[tuple[str, str, str], Arm]) -> list[list[str]]:
    """Returns what each way of learning changes, at the best rate of either, seed by seed."""
    head = ["network", "start", "learned", "loss", "accuracy, points", "rates that train"]
    rows = [[*head, "measured rate costs"]]
    for (network, start, learned), arm in every.items():
        plain = every.get((network, start, "none"))
        if learned == "none" or plain is None or len(plain.results) != len(arm.results):
            continue
        pairs = list(zip(best_runs(arm), best_runs(plain), strict=True))
        losses = [final_loss(new) - final_loss(old) for new, old in pairs]
        points = [100 * ((new["accuracy"] or 0) - (old["accuracy"] or 0)) for new, old in pairs]
        rows.append(
            [
                network,
                start,
                learned,
                _signed(losses, 3),
                _signed(points, 1),
                f"{len(trained_rates(plain))} → {len(trained_rates(arm))}",
                " → ".join(_cost(one, predicted_rate(one, every)) for one in (plain, arm)),
            ]
        )
    return rows


def _signed(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"
