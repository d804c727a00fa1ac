"""What do GradInit and NIO cost? `python -m benchmarks.gradinit_cost`, several minutes.

An iteration against a training step: time, compiling and memory, of both branches and of the
variants. A gradient is one training step, so that lowering the objective should cost two. Lowering
the norm takes a gradient, and then its derivative in forward mode. γ forces the branch: above every
norm the objective is lowered, below every norm the norm. NIO takes two gradients and a product with
the Hessian of each, whatever it lowers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib import _gradinit_step as gradinit_step
from archscale_jax.contrib._gradinit import DEFAULTS
from archscale_jax.contrib._gradinit_step import Update
from benchmarks import common
from experiments import gradinit_study
from experiments.lab.networks import Network

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")

SIZES = {"plain": (2, 8), "residual": (2, 8), "transformer": (1, 32)}
"""How images are made smaller, and the width, as the study of GradInit has them."""

ALWAYS, NEVER = 1e-9, 1e9  # γ: the norm is lowered always, or never
RATE = 0.01  # of training
PAPER_ITERATIONS = 390


class Size(NamedTuple):
    """How much is done."""

    networks: tuple[str, ...] = ("plain_12", "residual_9", "transformer_6")
    batch_size: int = 128
    iterations: int = 4  # of a timed call
    rounds: int = 9


QUICK = Size(("plain_3",), 8, 2, 2)


class Way(NamedTuple):
    """How an iteration is taken: γ, the program after measuring, and variants of `gradinit`."""

    limit: float
    program: str
    second_order: bool = False
    penalised: bool = False


WAYS = {
    "objective": Way(NEVER, "lower_objective"),
    "norm": Way(ALWAYS, "lower_norm"),
    "objective, second order": Way(NEVER, "lower_objective", second_order=True),
    "objective + penalty": Way(ALWAYS, "lower_objective", penalised=True),
}


def main() -> None:
    size = common.sized(Size(), QUICK)
    found = {text: cost_of_network(text, size) for text in size.networks}
    common.show(
        "An iteration of GradInit against a training step on as many examples",
        program_lines(found),
    )
    common.show("Seconds of whole runs", run_lines(found))
    common.write_results("gradinit_cost", {"settings": size._asdict(), "iterations": found})


def cost_of_network(text: str, size: Size) -> dict[str, Any]:
    """Measures training steps and every way to take an iteration."""
    name = gradinit_study.parse_name(text)
    sizes = SIZES[name.family]
    network = gradinit_study.build(text, "fashion_mnist", FLAGS.data_dir, *sizes)
    params = gradinit_study.draw(network, "he", 0)
    train, cost = training_steps(network, params, size)
    programs, costs = {"training step": train}, {"training step": cost}
    halves = gradinit_study.halves(network.dataset, size.batch_size // 2, 0)
    triples = list(itertools.islice(zip(halves, halves, halves, strict=False), size.iterations))
    for label, way in WAYS.items():
        if not (way.second_order and name.optimizer == "adam"):  # changes nothing there
            programs[label], costs[label] = iterations(
                network, params, triples, way, name.optimizer
            )
    programs["nio"], costs["nio"] = agreements(network, params, triples)
    times = common.alternate(programs, rounds=size.rounds)
    found = {
        label: costs[label]
        | {
            "milliseconds": common.spread(np.multiply(seconds, 1e3 / size.iterations)),
            "training_steps": common.ratio(seconds, times["training step"]),
        }
        for label, seconds in times.items()
    }
    epoch_steps = len(network.dataset.train_images) // size.batch_size
    return {"programs": found, "seconds": whole_runs(found, epoch_steps)}


def training_steps(
    network: Network, params: PyTree, size: Size
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a program of steps of SGD, and what compiling it costs."""
    batches = gradinit_study.halves(network.dataset, size.batch_size, 0)
    chosen = list(itertools.islice(batches, size.iterations))

    @jax.jit
    def step(params: PyTree, batch: Any) -> tuple[PyTree, jax.Array]:
        loss, gradient = jax.value_and_grad(network.loss)(params, batch)
        return jax.tree.map(lambda w, g: w - RATE * g, params, gradient), loss

    def train() -> PyTree:
        trained = params
        for batch in chosen:
            trained, _ = step(trained, batch)
        return trained

    return train, common.compiled(functools.partial(step.lower, params, chosen[0]))[1]


def iterations(
    network: Network, params: PyTree, triples: list[Any], way: Way, optimizer: Update
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a program of iterations, and what compiling it costs.

    Args:
      network: what is learned on.
      params: its weights.
      triples: half-batches a, b, c of each iteration.
      way: how it is taken.
      optimizer: whose update it looks at.

    Raises:
      RuntimeError: the other branch is taken.
    """
    count = len(named_leaves(params))
    variant = gradinit_step.Variant(
        network.loss, tuple(range(count)), optimizer, way.second_order, way.penalised
    )
    settings = {
        "rate": DEFAULTS[optimizer][0], "limit": way.limit, "penalty": 10.0,
        # Small: the networks that are timed stay what they are.
        "scale_rate": 1e-3, "clip": math.inf, "bounds": (0.01, math.inf),
    }  # fmt: skip
    start = gradinit_step.initial_state(count)
    run = functools.partial(gradinit_step.step, branch=gradinit_step.branch_in_python)

    def iterate() -> tuple[gradinit_step.State, jax.Array]:
        state, record = start, {}
        for triple in triples:
            state, record = run(state, params, triple, settings, variant=variant)
        return state, record["constrained"]

    def cost_of(program: str, *operands: Any) -> dict[str, Any]:
        lower = getattr(gradinit_step, program).lower
        return common.compiled(functools.partial(lower, *operands, variant=variant))[1]

    measured = (start.multipliers, params, triples[0])
    costs = [cost_of("measure", *measured)]
    gradient, record = gradinit_step.measure(*measured, variant=variant)
    barrier = [settings["penalty"] * (record["gradient_norm"] > way.limit)] * way.penalised
    costs.append(cost_of(way.program, start, gradient, params, triples[0], settings, *barrier))
    if bool(iterate()[1]) != (way.limit == ALWAYS):
        raise RuntimeError(f"{way}: γ did not force the branch")
    return iterate, {
        "compile_seconds": sum(one["compile_seconds"] for one in costs),
        "temporary_bytes": max(one["temporary_bytes"] for one in costs),
        "after_measuring": costs[1],
    }


def agreements(
    network: Network, params: PyTree, triples: list[Any]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a program of iterations of NIO, and what compiling it costs."""
    count = len(named_leaves(params))
    variant = gradinit_step.Variant(network.loss, tuple(range(count)))
    settings = {"limit": 5.0, "scale_rate": 1e-3, "clip": 1.0, "bounds": (0.01, math.inf)}
    start = gradinit_step.initial_state(count)
    run = functools.partial(gradinit_step.agreement_step, variant=variant)

    def iterate() -> gradinit_step.State:
        state = start
        for triple in triples:
            state, _ = run(state, params, triple, settings)
        return state

    lower = gradinit_step.agreement_step.lower
    lower = functools.partial(lower, start, params, triples[0], settings, variant=variant)
    return iterate, common.compiled(lower)[1]


def whole_runs(programs: Mapping[str, Any], epoch_steps: int) -> dict[str, float]:
    """Returns seconds of an epoch, of compiling, and of iterations, every other on the norm."""
    milliseconds = {name: one["milliseconds"].median for name, one in programs.items()}
    mean = (milliseconds["objective"] + milliseconds["norm"]) / 2
    return {
        "epoch": milliseconds["training step"] * epoch_steps / 1e3,
        "epoch_steps": epoch_steps,
        f"{PAPER_ITERATIONS} iterations": mean * PAPER_ITERATIONS / 1e3,
        "compiling": programs["objective"]["compile_seconds"]
        + programs["norm"]["after_measuring"]["compile_seconds"],
        "mean_training_steps": mean / milliseconds["training step"],
    }


def program_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Lays out the programs of every network, the heading first."""
    lines = [["network", "program", "ms", "training steps", "compiling, s", "temporary MiB"]]
    for text, one in found.items():
        for name, program in one["programs"].items():
            times = (f"{program['milliseconds']:.3g}", f"{program['training_steps']:.2f}")
            memory = f"{program['temporary_bytes'] / 2**20:.2f}"
            lines.append([text, name, *times, f"{program['compile_seconds']:.1f}", memory])
    return lines


def run_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Lays out what whole runs of every network take, the heading first."""
    runs = {text: one["seconds"] for text, one in found.items()}
    lines = [["network", *next(iter(runs.values()))]]
    return lines + [[text, *(f"{one:.3g}" for one in run.values())] for text, run in runs.items()]


if __name__ == "__main__":
    common.run(main)
