"""Networks trained after GradInit: ours, the package for PyTorch, and neither.

The part of `benchmarks.gradinit_cost` about quality. Both learn multipliers of the same weights on
the same batches; our loop trains all, at several rates. See `benchmarks.gradinit_against_torch`.
"""

import math
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from benchmarks import gradinit_against_torch, gradinit_ways, torch_process
from benchmarks.gradinit_against_torch import BATCH_SIZE, MODULE, PACKAGE
from benchmarks.gradinit_ways import Size
from experiments import gradinit_study
from experiments.gradinit_study import Network

TRIAL = {
    "learned": "gradinit",
    "batch_size": BATCH_SIZE,
    "scale_rate": 0.03,
    "sgd_rate": 0.1,
    "sgd_norm": 1.0,
    "test_examples": 4000,
}
"""As the study of GradInit has it."""


def compare_learned(size: Size, data_dir: str | None) -> dict[str, Any]:
    """Trains He's weights as they are, and as either rescales them; JSON values."""
    if reason := torch_process.why_no_torch([PACKAGE]):
        return {"skipped": reason}
    network = gradinit_ways.load_network(size.raced, data_dir)
    starts, cases = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(size.seeds):
            starts.append(gradinit_study.draw(network, "he", seed))
            cases[str(seed)] = gradinit_against_torch.write_case(
                pathlib.Path(folder) / f"{seed}.npz",
                starts[seed],
                gradinit_ways.triples_of(network, BATCH_SIZE, size.learned_iterations, seed),
                TRIAL["sgd_norm"],
                TRIAL["scale_rate"],
            )
        with torch_process.torch_server(MODULE, cases, [PACKAGE]) as (server, _):
            order = {"steps": size.learned_iterations}
            theirs = [torch_process.ask(server, {"case": case} | order) for case in cases]
    arms: dict[str, list[Any]] = {"He": [], "He, ours": [], "He, PyTorch": []}
    for seed, start in enumerate(starts):
        trial = TRIAL | {
            "seed": seed,
            "steps": size.steps,
            "gradinit_steps": size.learned_iterations,
        }
        ours, record = gradinit_study.learn(network, start, trial)
        rescaled = archscale.contrib.scale_parameters(start, theirs[seed]["multipliers"])
        for arm, params, constrained in (
            ("He", start, None),
            ("He, ours", ours, record.constrained),
            ("He, PyTorch", rescaled, theirs[seed]["constrained"]),
        ):
            found: dict[str, Any] = {
                "runs": [train(network, params, rate, trial) for rate in size.rates]
            }
            if constrained is not None:
                found["constrained"] = float(np.mean(constrained))
            arms[arm].append(found)
    return {
        "network": size.raced,
        "iterations": size.learned_iterations,
        "steps": size.steps,
        "arms": {arm: at_best_rate(seeds) | {"seeds": seeds} for arm, seeds in arms.items()},
    }


def train(
    network: Network, params: PyTree, rate: float, trial: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains at a rate; the mean loss of the last tenth and the test accuracy, None if lost."""
    run = gradinit_study.train(network, params, rate, trial)
    loss = run["losses"][-1]
    return {
        "rate": rate,
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": run["accuracy"],
    }


def at_best_rate(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rate of the smallest loss, mean over seeds; losses and accuracies there.

    Raises:
      RuntimeError: at every rate a run is lost.
    """
    by_rate = list(zip(*(one["runs"] for one in seeds), strict=True))
    means = [
        math.inf if any(one["loss"] is None for one in runs) else mean(runs, "loss")
        for runs in by_rate
    ]
    if min(means) == math.inf:
        raise RuntimeError("no rate trains the network from every seed")
    best = by_rate[int(np.argmin(means))]
    return {
        "losses_by_rate": [None if math.isinf(loss) else loss for loss in means],
        "best_rate": best[0]["rate"],
        "losses": [one["loss"] for one in best],
        "accuracies": [one["accuracy"] for one in best],
        "loss": mean(best, "loss"),
        "accuracy": mean(best, "accuracy"),
    }


def mean(found: Iterable[Mapping[str, Any]], key: str) -> float:
    """Returns the mean of an entry."""
    return float(np.mean([one[key] for one in found]))


def learned_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of `compare_learned`, or why there is none."""
    if "skipped" in results:
        return Table(title=f"PyTorch: skipped, {results['skipped']}")
    table = Table(
        title=f"Training {results['network']} for {results['steps']} steps after "
        f"{results['iterations']} iterations",
        caption="Losses: means over the last tenth of training, and over seeds. The best rate is "
        "that of the smallest. Constrained: part of the iterations that lowered the norm.",
    )
    arms = results["arms"]
    rates = [one["rate"] for one in next(iter(arms.values()))["seeds"][0]["runs"]]
    table.add_column("start")
    for column in ("constrained", *(f"loss at {rate:g}" for rate in rates)):
        table.add_column(column, justify="right")
    for column in ("best loss, by seed", "accuracy there, by seed"):
        table.add_column(column, justify="right")
    for arm, one in arms.items():
        constrained = "" if arm == "He" else f"{mean(one['seeds'], 'constrained'):.0%}"
        table.add_row(
            arm,
            constrained,
            *("lost" if loss is None else f"{loss:.3f}" for loss in one["losses_by_rate"]),
            " ".join(f"{value:.3f}" for value in one["losses"]),
            f"{one['accuracy']:.1%}: " + " ".join(f"{value:.1%}" for value in one["accuracies"]),
        )
    return table
