"""Operations of the paper's setting, counted in compiled programs, and what follows for a study.

The part of `benchmarks.cell_cost` about accelerators. Nothing is run: one training step is compiled
for abstract inputs, and XLA counts its floating-point operations.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from rich.table import Table

from benchmarks import common
from benchmarks.cell_programs import Size
from experiments.lab import training
from experiments.lab.models import CellNetwork, cell_edge, cell_layers, multiply_adds
from experiments.nasbench.rank_study import PRESETS, RECIPES

PAPER = PRESETS["paper"]
CHANNELS_OF_IMAGES, NUM_CLASSES = 3, 10
MEAN_CELL = "3_20_014"  # each operation once; on average over all cells each is there 6/5 times
CELLS = ("3_33_333", "2_22_222", "1_11_111", MEAN_CELL)
OPERATIONS_OF_MULTIPLY_ADD = 2
PASSES = 3  # forward, and the gradients by features and by weights

DATASETS = {  # training images, and their pixels a side
    "cifar10": (50_000, 32),
    "cifar10, half of it": (25_000, 32),
    "cifar100": (50_000, 32),
    "imagenet16_120": (151_700, 16),
}
STUDY = ("cifar10", "cifar100", "imagenet16_120")
PEAK = 312e12  # FLOP/s of an A100 in bfloat16 by its data sheet
ASSUMED_UTILIZATIONS = (0.1, 0.3)  # not measured


def count_operations(size: Size) -> dict[str, Any]:
    """Counts the operations of a training step, for each image, and estimates a study's."""
    count, batch_size = size.flops_cells_per_stage, PAPER["batch_size"]
    networks = {cell: abstract_network(cell, count) for cell in CELLS}
    cells: dict[str, Any] = {}
    for cell, network in networks.items():
        formula = formula_operations(network, 32)
        cells[cell] = count_step(network, batch_size) | {"formula": formula}
        cells[cell]["compiled_to_formula"] = cells[cell]["operations"] / formula
    return {
        "cells": cells,
        # XLA counts the dearest branch of a conditional: this is no cell's cost.
        "space": count_step(abstract_network(None, count), batch_size),
        "cells_per_stage": count,
        "batch_size": batch_size,
        "study": estimate_study(networks, cells[MEAN_CELL]["compiled_to_formula"]),
    }


def abstract_network(cell: str | None, cells_per_stage: int) -> CellNetwork:
    """Returns a network of the paper's width without arrays."""
    sizes = CHANNELS_OF_IMAGES, PAPER["channels"], cells_per_stage, NUM_CLASSES
    with accelerator_convolutions():
        return nnx.eval_shape(lambda: CellNetwork(cell, *sizes, rngs=nnx.Rngs(0)))


@contextlib.contextmanager
def accelerator_convolutions() -> Iterator[None]:
    """Convolves as off the CPU: the gradients of ours have loops there, which XLA counts once."""
    with contextlib.ExitStack() as patches:
        for module in (cell_edge, cell_layers):
            name = "conv_general_dilated"
            patches.enter_context(mock.patch.object(module, name, lax.conv_general_dilated))
        yield


def count_step(network: CellNetwork, batch_size: int) -> dict[str, Any]:
    """Compiles one training step; returns its operations for an image, and what compiling took."""
    graphdef, params, model_state = nnx.split(network, nnx.Param, ...)
    optimizer = training.create_optimizer(
        PAPER["fixed_rate"], momentum=0.9, nesterov=True, weight_decay=PAPER["weight_decay"]
    )

    def step(params, model_state, optimizer_state, images, labels):
        (_, (_, model_state)), gradients = jax.value_and_grad(
            lambda params: training.cross_entropy(
                graphdef, params, model_state, images, labels, train=True
            ),
            has_aux=True,
        )(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), model_state, optimizer_state

    images = jax.ShapeDtypeStruct((batch_size, 32, 32, CHANNELS_OF_IMAGES), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    optimizer_state = jax.eval_shape(optimizer.init, params)
    with accelerator_convolutions():
        program, cost = common.compiled(
            lambda: jax.jit(step).lower(params, model_state, optimizer_state, images, labels)
        )
    return cost | {"operations": program.cost_analysis()["flops"] / batch_size}


def formula_operations(network: CellNetwork, pixels: int) -> float:
    """Returns the operations of training on an image by the published multiply-adds."""
    return PASSES * OPERATIONS_OF_MULTIPLY_ADD * multiply_adds(network, pixels, pixels)


def estimate_study(
    networks: Mapping[str, CellNetwork], compiled_to_formula: float
) -> dict[str, Any]:
    """Estimates the operations of the preset `paper`, and hours on an accelerator.

    Multiply-adds are linear in the numbers of convolutions, whose mean over the cells is 6/5 each.
    Tests, searches of base rates and measurements are left out.

    Args:
      networks: of the cells of one operation, see `CELLS`.
      compiled_to_formula: by which the published formula is scaled.
    """
    trainings = {}
    for name, (examples, pixels) in DATASETS.items():
        empty, small, large = (
            formula_operations(networks[cell], pixels)
            for cell in ("1_11_111", "2_22_222", "3_33_333")
        )
        mean = empty + (small - empty) / 5 + (large - empty) / 5
        trainings[name] = mean * compiled_to_formula * examples * PAPER["epochs"]
    count = PAPER["num_cells"] * len(RECIPES) * PAPER["num_seeds"]
    total = count * sum(trainings[name] for name in STUDY)
    return {
        "operations_of_a_training": trainings,
        "trainings_a_data_set": count,
        "data_sets": STUDY,
        "operations": total,
        "peak": PEAK,
        "assumed_hours_by_utilization": {
            share: total / (PEAK * share) / 3600 for share in ASSUMED_UTILIZATIONS
        },
    }


def operations_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of `count_operations`."""
    study = results["study"]
    trainings = study["operations_of_a_training"]
    hours = study["assumed_hours_by_utilization"]
    table = Table(
        title=f"10^6 operations of training on an image, C = {PAPER['channels']}, "
        f"N = {results['cells_per_stage']}, batch {results['batch_size']}",
        caption="Of the space the dearest branch is counted. The mean cell, "
        f"{PAPER['epochs']:.0f} epochs: "
        + ", ".join(f"{name} {value:.2e}" for name, value in trainings.items())
        + f". {study['trainings_a_data_set']} trainings on each of {', '.join(STUDY)}: "
        f"{study['operations']:.2e}; assumed, not measured: "
        + ", ".join(
            f"{value:.0f} hours at {share:.0%} of {PEAK / 1e12:.0f} TFLOP/s"
            for share, value in hours.items()
        ),
    )
    for column in ("cell", "compiled", "3 x 2 x multiply-adds", "ratio", "compiling, s"):
        table.add_column(column, justify="right")
    for cell, one in (results["cells"] | {"the space": results["space"]}).items():
        formula = ["", ""]
        if "formula" in one:
            formula = [f"{one['formula'] / 1e6:.1f}", f"{one['compiled_to_formula']:.3f}"]
        table.add_row(
            cell,
            f"{one['operations'] / 1e6:.1f}",
            *formula,
            f"{one['compile_seconds']:.0f}",
        )
    return table
