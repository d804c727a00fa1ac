"""An iteration of GradInit against a training step: time, compiling, memory.

The part of `benchmarks.gradinit_cost` about our own programs; see `benchmarks.gradinit_ways`. A
gradient is one training step, so that lowering the objective should cost two. Lowering the norm
takes a gradient, and then its derivative in forward mode.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from archscale_jax.contrib import _gradinit_step as gradinit_step
from benchmarks import common, gradinit_ways
from benchmarks.gradinit_ways import ALWAYS, WAYS, Size, Way
from experiments import gradinit_study
from experiments.gradinit_study import Network

PAPER_ITERATIONS = 390
TOLERANCE = 1e-3  # of derivatives by the multipliers, against the largest
SAME = {
    "objective": ["objective, lax.cond"],
    "norm": ["norm, lax.cond", "norm, reverse over reverse"],
}
"""Ways that must find the same derivatives."""


def cost_of_iterations(size: Size, data_dir: str | None) -> dict[str, Any]:
    """Measures every network, one of them with Flax's convolutions too; JSON values."""
    found = {
        text: cost_of_network(gradinit_ways.load_network(text, data_dir), size, WAYS)
        for text in size.networks
    }
    stock = gradinit_ways.load_network(size.raced, data_dir, stock=True)
    ways = {name: way for name, way in WAYS.items() if way.plain}
    found[f"{size.raced}, Flax's convolutions"] = cost_of_network(stock, size, ways)
    return found


def cost_of_network(network: Network, size: Size, ways: Mapping[str, Way]) -> dict[str, Any]:
    """Measures training steps and every way to take an iteration."""
    params = gradinit_study.draw(network, "he", 0)
    train, costs = gradinit_ways.training_steps(network, params, size)
    programs, derivatives = {"training step": train}, {}
    triples = gradinit_ways.triples_of(network, size.batch_size, size.iterations, 0)
    for name, way in ways.items():
        if way.second_order and gradinit_ways.optimizer_of(network) == "adam":
            continue  # changes nothing there
        with gradinit_ways.reverse_over_reverse() if way.reverse else contextlib.nullcontext():
            programs[name], costs[name] = gradinit_ways.iterations(
                network, params, triples, way, costs
            )
            derivatives[name] = check_branch(name, way, programs[name]())
    times = timed(programs, size)
    found = {name: costs[name] | times[name] for name in programs}
    return {
        "programs": found,
        "parts": {name: one for name, one in costs.items() if name not in programs},
        "largest_difference_of_derivatives": largest_difference(derivatives),
        "seconds": whole_runs(found, len(network.dataset.train_images) // size.batch_size),
    }


def check_branch(name: str, way: Way, found: tuple[gradinit_step.State, jax.Array]) -> np.ndarray:
    """Returns the first moments, mean derivatives by the multipliers.

    Raises:
      RuntimeError: another branch was taken.
    """
    state, constrained = found
    if bool(constrained) != (way.limit == ALWAYS):
        raise RuntimeError(f"{name}: γ = {way.limit:g} did not force the branch")
    return np.asarray(state.first_moments).sum(axis=0)


def largest_difference(derivatives: Mapping[str, np.ndarray]) -> float:
    """Returns how far derivatives by other ways are from the default's, against the largest.

    Raises:
      RuntimeError: too far.
    """
    found = 0.0
    for name, others in SAME.items():
        expected = derivatives[name]
        for other in set(others) & set(derivatives):
            apart = float(np.abs(derivatives[other] - expected).max() / np.abs(expected).max())
            if not apart < TOLERANCE:
                raise RuntimeError(f"{other}: derivatives differ from {name!r} by {apart}")
            found = max(found, apart)
    return found


def timed(programs: Mapping[str, Callable[[], Any]], size: Size) -> dict[str, Any]:
    """Times all in turns; those with a branch, too slow to take as many, in turns of their own."""
    slow = {name: one for name, one in programs.items() if "lax.cond" in name}
    fast = {name: one for name, one in programs.items() if name not in slow}
    step = {"training step": programs["training step"]}
    found = {}
    for chosen, rounds in ((step | slow, size.slow_rounds), (fast, size.rounds)):
        times = common.alternate(chosen, rounds=rounds)
        for name, seconds in times.items():
            found[name] = {
                "milliseconds": common.spread(np.multiply(seconds, 1e3 / size.iterations)),
                "training_steps": common.ratio(seconds, times["training step"]),
            }
    return found


def whole_runs(programs: Mapping[str, Any], epoch_steps: int) -> dict[str, float]:
    """Returns seconds of an epoch, of compiling, and of iterations, every other on the norm."""
    milliseconds = {name: one["milliseconds"].median for name, one in programs.items()}
    mean = (milliseconds["objective"] + milliseconds["norm"]) / 2
    return {
        "epoch": milliseconds["training step"] * epoch_steps / 1e3,
        "epoch_steps": epoch_steps,
        "100 iterations": mean * 100 / 1e3,
        f"{PAPER_ITERATIONS} iterations": mean * PAPER_ITERATIONS / 1e3,
        "compiling": programs["objective"]["compile_seconds"]
        + programs["norm"]["after_measuring"]["compile_seconds"],
        "mean_training_steps": mean / milliseconds["training step"],
    }


def iterations_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of `cost_of_iterations`."""
    captions = []
    for text, one in results.items():
        seconds = dict(one["seconds"])
        steps, mean = seconds.pop("epoch_steps"), seconds.pop("mean_training_steps")
        spans = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        captions.append(f"{text}: {spans} (epoch of {steps} steps; mean {mean:.2f} training steps)")
    table = Table(
        title="An iteration of GradInit against a training step on as many examples",
        caption="\n".join(captions),
    )
    for column in ("network", "program"):
        table.add_column(column)
    for column in ("ms, median (quartiles)", "training steps", "compiling, s", "temporary MiB"):
        table.add_column(column, justify="right")
    for text, one in results.items():
        for name, program in one["programs"].items():
            table.add_row(
                text,
                name,
                f"{program['milliseconds']:.3g}",
                f"{program['training_steps']:.2f}",
                f"{program['compile_seconds']:.1f}",
                f"{program['temporary_bytes'] / 2**20:.2f}",
            )
    return table
