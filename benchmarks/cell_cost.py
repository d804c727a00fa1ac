"""What do networks of NAS-Bench-201 cost? `python -m benchmarks.cell_cost`, several minutes.

Networks of the preset `small` of `experiments.rank`, each trained by a program of its own and by
one for all cells with their operations chosen at run time: compiling, steps, memory, and from how
much training on the first is ahead. Both must give the same losses.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import common
from experiments.lab import training
from experiments.lab.models import CellNetwork, embed, select_cell
from experiments.nasbench.rank_study import PRESETS, pytorch_default

CELLS = ("3_33_333", "2_22_222", "1_11_111", "4_44_444", "3_34_014", "1_43_202")
SMALL = PRESETS["small"]
TOTAL_STEPS = training.count_steps(60_000, SMALL["batch_size"], SMALL["epochs"])
NUM_CLASSES = 10
PIXELS = 28 // SMALL["downscale"]
RATE = 0.01  # where losses are compared: a wrong update shows, a σ'(z) that rounding flips does not
TOLERANCE = 2e-5  # of the first five losses, relative


class Size(NamedTuple):
    """How much is done."""

    cells: tuple[str, ...] = CELLS
    batch_size: int = SMALL["batch_size"]
    steps: int = 25
    rounds: int = 7


QUICK = Size(("3_34_014",), 4, 5, 2)


def main() -> None:
    size = common.sized(Size(), QUICK)
    programs = compare_programs(size)
    space = programs["space"]
    common.show(
        "Milliseconds of a training step, preset small: a program a cell, or one for all",
        cell_lines(programs["cells"]),
        f"For all: compiled in {space['compile_seconds']:.1f} s, "
        f"{space['temporary_bytes'] / 2**20:.1f} MiB of temporary memory.",
    )
    settings = SMALL | size._asdict()
    common.write_results("cell_cost", {"settings": settings, "programs": programs})


class Network(NamedTuple):
    """A `CellNetwork`, split."""

    graphdef: nnx.GraphDef
    params: Any
    model_state: Any


Program = Callable[[training.TrainState], jax.Array]  # steps, from a state to their losses


def create_network(cell: str | None) -> Network:
    """Returns the network of a cell, or of all; weights as the benchmark draws them."""
    sizes = 1, SMALL["channels"], SMALL["cells_per_stage"], NUM_CLASSES

    def split():
        return nnx.split(CellNetwork(cell, *sizes, rngs=nnx.Rngs(0)), nnx.Param, ...)

    graphdef, params, _ = nnx.eval_shape(split)
    model_state = jax.jit(lambda: split()[2])()
    key = jax.random.key(0, impl="rbg")  # its draws compile fast
    return Network(graphdef, pytorch_default(key, params), model_state)


def as_cell(space: Network, cell: str, network: Network) -> Network:
    """Returns the network of all cells as that of one, with its weights."""
    params = embed(network.params, space.params)
    return space._replace(params=params, model_state=select_cell(space.model_state, cell))


def create_optimizer() -> optax.GradientTransformation:
    """Returns the optimizer of the preset at `RATE`."""
    schedule = training.create_schedule(RATE, TOTAL_STEPS, kind="cosine")
    return training.create_optimizer(
        schedule, momentum=0.9, nesterov=True, weight_decay=SMALL["weight_decay"]
    )


def random_data(pixels: int, batch_size: int, steps: int) -> tuple[np.ndarray, ...]:
    """Returns images [n, pixels, pixels, 1], labels [n], and batches [steps, batch_size]."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((1024, pixels, pixels, 1), np.float32)
    labels = generator.integers(0, NUM_CLASSES, 1024, np.int32)
    return images, labels, generator.integers(0, 1024, (steps, batch_size), np.int32)


def start(network: Network, optimizer: optax.GradientTransformation) -> training.TrainState:
    """Returns a state before the first step."""
    key = jax.random.key(0)
    return training.create_train_state(network.params, network.model_state, optimizer, key)


def compile_steps(
    network: Network, data: tuple[np.ndarray, ...], *, flip: bool
) -> tuple[Program, dict[str, Any]]:
    """Compiles steps of training, and says what that costs and what memory they take."""
    # A new optimizer: one that was here before would bring its trace along.
    optimizer = create_optimizer()
    arguments = (*map(jnp.asarray, data), jnp.int32(0))
    program, cost = common.compiled(
        functools.partial(
            training.jitted_train_batches.lower,
            start(network, optimizer),
            *arguments,
            graphdef=network.graphdef,
            optimizer=optimizer,
            flip=flip,
        )
    )
    return lambda state: program(state, *arguments)[1], cost


def compare_programs(size: Size) -> dict[str, Any]:
    """Compares a program for each cell with one for all."""
    data = random_data(PIXELS, size.batch_size, size.steps)
    compile_ = functools.partial(compile_steps, data=data, flip=SMALL["flip"])
    compile_(create_network("0_00_100"))  # JAX's first steps are not what compiling costs
    space, optimizer = create_network(None), create_optimizer()
    shared, shared_cost = compile_(space)
    cells = {}
    for cell in size.cells:
        network = create_network(cell)
        own, cost = compile_(network)
        in_space = start(as_cell(space, cell, network), optimizer)
        programs = {
            "space": functools.partial(shared, in_space),
            "own": functools.partial(own, start(network, optimizer)),
        }
        difference = difference_of_losses(cell, programs)
        times = {
            name: [second / size.steps * 1e3 for second in seconds]
            for name, seconds in common.alternate(programs, rounds=size.rounds).items()
        }
        cells[cell] = cost | {
            "largest_difference_of_first_losses": difference,
            "milliseconds": {name: common.spread(values) for name, values in times.items()},
            "space_to_own": common.ratio(times["space"], times["own"]),
        }
        cells[cell] |= break_even(cells[cell])
    return {"space": shared_cost, "cells": cells}


def difference_of_losses(cell: str, programs: Mapping[str, Callable[[], jax.Array]]) -> float:
    """Returns how far the first five losses are from those of the cell's own program.

    Raises:
      RuntimeError: too far.
    """
    first = {name: np.asarray(program())[:5] for name, program in programs.items()}
    found = float(np.abs(first["space"] / first["own"] - 1).max())
    if not found < TOLERANCE:
        raise RuntimeError(f"{cell}: losses differ from those of its own program by {found}")
    return found


def break_even(cell: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the steps from which a program of its own is ahead, and their seconds for all."""
    own, space = (cell["milliseconds"][name].median / 1e3 for name in ("own", "space"))
    steps = cell["compile_seconds"] / (space - own) if space > own else None
    seconds = None if steps is None else steps * space
    return {"break_even_steps": steps, "break_even_seconds": seconds}


def cell_lines(cells: Mapping[str, Any]) -> list[list[str]]:
    """Lays out what the programs of every cell take, the heading first."""
    found = [["cell", "own", "for all", "all/own", "compiling, s", "MiB", "ahead from, s",
              "difference of losses"]]  # fmt: skip
    for cell, one in cells.items():
        even = one["break_even_seconds"]
        found.append([
            cell,
            *(f"{one['milliseconds'][name]:.3g}" for name in ("own", "space")),
            f"{one['space_to_own']:.2f}",
            f"{one['compile_seconds']:.1f}",
            f"{one['temporary_bytes'] / 2**20:.1f}",
            "never" if even is None else f"{even:.0f}",
            f"{one['largest_difference_of_first_losses']:.0e}",
        ])  # fmt: skip
    return found


if __name__ == "__main__":
    common.run(main)
