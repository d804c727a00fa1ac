"""Programs of GradInit to be timed: every way to take an iteration, and training steps.

γ forces the branch: above every norm the objective is lowered, below every norm the norm.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib import _gradinit_step as gradinit_step
from archscale_jax.contrib._gradinit import DEFAULTS
from benchmarks import common
from experiments import gradinit_study
from experiments.gradinit_study import Network
from experiments.lab.models import images

SIZES = {"plain": (2, 8), "residual": (2, 8), "transformer": (1, 32)}
"""How images are made smaller, and the width, as the study of GradInit has them."""

ALWAYS, NEVER = 1e-9, 1e9  # γ: the norm is lowered always, or never
PENALTY = 10.0
RATE = 0.01  # of training
SCALE_RATE = 1e-3  # small: the networks that are timed stay what they are
TWO_PROGRAMS = functools.partial(gradinit_step.step, branch=gradinit_step.branch_in_python)


class Size(NamedTuple):
    """How much is done; see `--quick` of `benchmarks.gradinit_cost`."""

    networks: tuple[str, ...] = ("plain_12", "residual_9", "transformer_6")
    batch_size: int = 128
    iterations: int = 4  # of a timed call
    rounds: int = 9
    slow_rounds: int = 4
    raced: str = "plain_12"  # against PyTorch, and with Flax's convolutions
    race_iterations: int = 20
    learned_iterations: int = 120
    seeds: int = 3
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    steps: int = 250


QUICK = Size(("plain_3", "transformer_1"), 8, 2, 2, 1, "plain_3", 2, 3, 1, (0.01,), 3)


class Way(NamedTuple):
    """How an iteration is taken.

    Attributes:
      limit: γ, which forces the branch.
      program: of `gradinit_step`, after `measure`, or in one with it.
      second_order: see `archscale_jax.gradinit`.
      penalised: likewise, with `PENALTY`.
      reverse: whether products with the Hessian are taken by reverse mode twice.
    """

    limit: float
    program: str
    second_order: bool = False
    penalised: bool = False
    reverse: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is no variant."""
        return not (self.second_order or self.penalised or self.reverse)


WAYS = {
    "objective": Way(NEVER, "lower_objective"),
    "norm": Way(ALWAYS, "lower_norm"),
    "norm, reverse over reverse": Way(ALWAYS, "lower_norm", reverse=True),
    "objective, second order": Way(NEVER, "lower_objective", second_order=True),
    "objective + penalty": Way(ALWAYS, "lower_objective", penalised=True),
    "objective, lax.cond": Way(NEVER, "jitted_step"),
    "norm, lax.cond": Way(ALWAYS, "jitted_step"),
}


def load_network(text: str, data_dir: str | None, *, stock: bool = False) -> Network:
    """Returns a network of the study, on Fashion-MNIST; `stock` convolves as Flax does."""
    downscale, width = SIZES[gradinit_study.parse_name(text).family]
    build = functools.partial(gradinit_study.build, text, "fashion_mnist", data_dir)
    if not stock:
        return build(downscale, width)
    gradinit_study.build.cache_clear()  # the same name, another network
    name, theirs = "conv_general_dilated", jax.lax.conv_general_dilated
    with mock.patch.object(images, name, theirs):
        network = build(downscale, width)
    gradinit_study.build.cache_clear()
    return network


def optimizer_of(network: Network) -> gradinit_step.Update:
    """Returns the name of what trains a network."""
    return "adam" if network.optimizer is gradinit_study.OPTIMIZERS["adam"] else "sgd"


def triples_of(network: Network, batch_size: int, count: int, seed: int) -> list[Any]:
    """Returns the half-batches a, b, c of so many iterations, as the study draws them."""
    halves = gradinit_study.halves(network.dataset, batch_size // 2, seed)
    return list(itertools.islice(zip(halves, halves, halves, strict=False), count))


def settings_of(limit: float, optimizer: str = "sgd") -> dict[str, Any]:
    """Returns `gradinit_step.Settings`: small steps of multipliers, derivatives as they are."""
    return {
        "rate": DEFAULTS[optimizer][0],
        "limit": limit,
        "penalty": PENALTY,
        "scale_rate": SCALE_RATE,
        "clip": math.inf,
        "bounds": (0.01, math.inf),
    }


def training_steps(
    network: Network, params: PyTree, size: Size
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a program of steps of SGD, and by its name what compiling it costs."""
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

    return train, {"training step": compile_cost(functools.partial(step.lower, params, chosen[0]))}


def iterations(
    network: Network, params: PyTree, triples: list[Any], way: Way, costs: dict[str, Any]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a program of iterations, and what compiling it costs.

    Args:
      network: what is learned on.
      params: its weights.
      triples: of each iteration.
      way: how it is taken.
      costs: of programs that several ways share; what is compiled is added.
    """
    count = len(named_leaves(params))
    # Another function by its identity, or the trace of the library's way would be used.
    loss = functools.partial(network.loss) if way.reverse else network.loss
    variant = gradinit_step.Variant(
        loss, tuple(range(count)), optimizer_of(network), way.second_order, way.penalised
    )
    settings = settings_of(way.limit, optimizer_of(network))
    start = gradinit_step.initial_state(count)
    one_program = way.program == "jitted_step"
    run = gradinit_step.jitted_step if one_program else TWO_PROGRAMS

    def iterate() -> tuple[gradinit_step.State, jax.Array]:
        state, record = start, {}
        for triple in triples:
            state, record = run(state, params, triple, settings, variant=variant)
        return state, record["constrained"]

    def cost_of(program: str, *operands: Any) -> dict[str, Any]:
        lower = getattr(gradinit_step, program).lower
        return compile_cost(functools.partial(lower, *operands, variant=variant))

    if one_program:
        if way.program not in costs:
            costs[way.program] = cost_of(way.program, start, params, triples[0], settings)
        return iterate, costs[way.program]
    measured = (start.multipliers, params, triples[0])
    if "measure" not in costs:
        costs["measure"] = cost_of("measure", *measured)
    gradient, record = gradinit_step.measure(*measured, variant=variant)
    barrier = [settings["penalty"] * (record["gradient_norm"] > way.limit)] * way.penalised
    lower = cost_of(way.program, start, gradient, params, triples[0], settings, *barrier)
    parts = (costs["measure"], lower)
    return iterate, {
        "compile_seconds": sum(one["compile_seconds"] for one in parts),
        "temporary_bytes": max(one["temporary_bytes"] for one in parts),
        "after_measuring": lower,
    }


def compile_cost(lower: Callable[[], Any]) -> dict[str, Any]:
    """Returns seconds of tracing and compiling, and bytes of temporary memory."""
    program, cost = common.compiled(lower)
    return cost | {"temporary_bytes": program.memory_analysis().temp_size_in_bytes}


def reverse_over_reverse():
    """Returns a context in which what is traced takes products with the Hessian that way."""

    def product(loss, theta, vector):
        return jax.vjp(jax.grad(loss), theta)[1](vector)[0]

    return mock.patch.object(gradinit_step, "_hessian_product", product)
