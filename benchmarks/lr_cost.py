"""What does a learning rate cost? `python -m benchmarks.lr_cost`, several minutes.

By measuring one update, by an adaptive search, by the full grid: seconds after compilation, and the
error against the grid. Goals: at most 1/500 and 1/5 of the grid.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

import archscale_jax as archscale
from archscale_jax._spaces import chain_string
from benchmarks import common
from experiments import transfer_study as study
from experiments.lab import datasets, networks, studies
from experiments.lab.common import measure_seeds, measurer

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "fashion_mnist", datasets.DATASET_NAMES, "Data set.")
flags.DEFINE_string("data_dir", None, "Folder of the data set; see README, Data.")
flags.DEFINE_string("architecture", chain_string(4), "DAG string of the first network.")

RANDOM_DAG = "2_02_011_1222"
GOALS = {"measured": 1 / 500, "adaptive": 1 / 5}
ADAPTIVE = {"margin": 0.02, "tolerance": 0.005, "refine": 0}
"""Scouts until the loss is 2 % above the smallest, then follows with about three rates."""


def main() -> None:
    epoch = len(studies.load(FLAGS.dataset, FLAGS.data_dir, 1).train_images) // 256
    full = {"width": 128, "batch_size": 256, "steps": epoch, "seeds": 3}
    tiny = {"width": 16, "batch_size": 8, "steps": 5, "seeds": 2}
    shared = {"dataset": FLAGS.dataset, "downscale": 1, "kernel_size": None}
    settings = study.DEFAULTS | shared | common.sized(full, tiny)
    rates = cost_of_rates([FLAGS.architecture, RANDOM_DAG], settings)
    base, goals = rates["base"], (f"{name} <= 1/{1 / goal:.0f}" for name, goal in GOALS.items())
    common.show(
        "Seconds to a learning rate", lines(rates),
        f"The base rate {base['rate']:.3g} was searched before ({base['seconds']:.1f} s, not "
        f"counted). compiling: first call - later call. Goals of the part: {', '.join(goals)}. "
        "adaptive counts the measurement that it starts from.",
    )  # fmt: skip
    common.write_results("lr_cost", {"settings": settings, "goals": GOALS, "rates": rates})


def cost_of_rates(architectures: list[str], settings: study.Trial) -> dict[str, Any]:
    """Compares three ways to a learning rate, one network after the other.

    The rate of the base network is searched once, by the same grid, and is not counted. Nor is
    building the networks and drawing the first batches, which training needs anyway.
    """
    low, high = networks.RATES["sgd"]
    rates = np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist()

    def search(trial: study.Trial, **options) -> tuple[archscale.tuning.RateSearch, dict[str, Any]]:
        train = networks.trainer(study.build(trial, FLAGS.data_dir), trial)
        # A rate that does not diverge, so that every part of a run is compiled.
        first, again = (common.timed(lambda: list(train(rates[0], 0)))[1] for _ in range(2))
        for seed in range(1, trial["seeds"]):
            next(iter(train(rates[0], seed)))  # draws the weights
        with common.Compilations() as compilations:
            found, seconds = common.timed(
                lambda: archscale.find_learning_rate(
                    train, rates, seeds=range(trial["seeds"]), max_loss=100.0, **options
                )
            )
        return found, {
            "rate": found.rate,
            "seconds": seconds,
            "compile_seconds": first - again,
            "compilations_while_timed": compilations.count,
            "runs": len(found.runs),
        }

    base = settings | {"architecture": study.BASE}
    base_found, base_cost = search(base)
    found = {}
    for text in architectures:
        trial: study.Trial = settings | {"architecture": text}
        measured, predicted = cost_of_measuring(trial, base, base_found.rate)
        grid, full = search(trial)
        ways = {"measured": measured}
        for seeds in range(1, trial["seeds"] + 1):
            fewer = trial | {"seeds": seeds}
            name = "adaptive, one seed" if seeds == 1 else f"adaptive, {seeds} seeds"
            _, ways[name] = search(fewer, start=predicted, **ADAPTIVE)
            ways[name]["seconds"] += measured["seconds"]  # its start
        ways["grid"] = full
        found[text] = {"uncertainty": grid.seed_error, "ways": ways}
        for cost in ways.values():
            cost["error"] = math.log(cost["rate"] / grid.rate)
            cost["part_of_grid"] = cost["seconds"] / full["seconds"]
    return {"base": base_cost, "networks": found}


def cost_of_measuring(
    trial: study.Trial, base: study.Trial, base_rate: float
) -> tuple[dict[str, Any], float]:
    """Times `measure_update` of both networks, for all seeds, and `predict_learning_rate`."""
    measure = [_measure(one) for one in (trial, base)]

    def predict() -> float:
        return archscale.predict_learning_rate(measure[0](), measure[1](), base_rate)

    first = common.timed(predict)[1]
    with common.Compilations() as compilations:
        times = [common.timed(predict) for _ in range(20)]
    seconds = common.spread([seconds for _, seconds in times])
    return {
        "rate": times[0][0],
        "seconds": seconds.median,
        "spread": seconds,
        "compile_seconds": first - seconds.median,
        "compilations_while_timed": compilations.count,
        "runs": 0,
    }, times[0][0]


def _measure(trial: study.Trial) -> Callable[[], archscale.tuning.UpdateSize]:
    """Returns what draws weights for every seed and measures an update on a batch at hand."""
    network = study.build(trial, FLAGS.data_dir)
    return functools.partial(
        measure_seeds,
        measurer(network.graphdef, network.model_state, network.optimizer(1.0)),
        network.draw,
        networks.batches_of(network, trial),
    )


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Lays the results of `cost_of_rates` out, the heading first."""
    found = [["network", "way", "rate", "error, nats", "runs", "seconds", "compiling, s",
              "part of the grid"]]  # fmt: skip
    for text, network in results["networks"].items():
        for name, cost in network["ways"].items():
            grid = name == "grid"
            found.append([
                text,
                name,
                f"{cost['rate']:.3g}",
                f"± {network['uncertainty']:.2f}" if grid else f"{cost['error']:+.2f}",
                str(cost["runs"]),
                f"{cost.get('spread', cost['seconds']):.3g}",
                f"{cost['compile_seconds']:.2f}",
                f"1/{1 / cost['part_of_grid']:.4g}",
            ])  # fmt: skip
    return found


if __name__ == "__main__":
    common.run(main)
