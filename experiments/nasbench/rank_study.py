"""What a ranking of cells computes, as lists of trials, and what comes of it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from archscale_jax._errors import unknown
from archscale_jax._spaces import canonical_cell, cell_code, cell_function, cell_graph
from archscale_jax._spaces.cell import CELL_EDGES
from experiments import transfer_study
from experiments.lab import training
from experiments.lab.runners import FailedTrialsError
from experiments.nasbench.rank_networks import SETTINGS
from experiments.nasbench.rank_recipes import RECIPES, Trial

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "dataset": "fashion_mnist",
        "downscale": 2,
        "channels": 8,
        "cells_per_stage": 1,
        "batch_size": 32,
        "epochs": 0.4267,
        "flip": True,
        "padding": 0,
        "weight_decay": 5e-4,
        "fixed_rate": 0.1,
        "num_cells": 60,
        "num_seeds": 3,
    },
    "paper": {
        "dataset": "cifar10",
        "downscale": 1,
        "channels": 16,
        "cells_per_stage": 5,
        "batch_size": 256,
        "epochs": 200.0,
        "flip": True,
        "padding": 4,
        "weight_decay": 5e-4,
        "fixed_rate": 0.1,
        "num_cells": 500,
        "num_seeds": 3,
    },
}
"""`small` takes two cores about two hours; `paper` is the benchmark's setting, for accelerators."""


def sample_cells(count: int, seed: int = 0) -> list[str]:
    """Returns the codes of random cells with a path, no two of them isomorphic.

    Raises:
      ValueError: more cells than there are.
    """
    codes = [
        f"{''.join(digits[:1])}_{''.join(digits[1:3])}_{''.join(digits[3:])}"
        for digits in itertools.product("01234", repeat=len(CELL_EDGES))
    ]
    found: dict[str, str] = {}
    for index in np.random.default_rng(seed).permutation(len(codes)):
        if len(found) == count:
            break
        if cell_function(codes[index]) != "0":  # of a cell without a path
            found.setdefault(canonical_cell(codes[index]), codes[index])
    if len(found) < count:
        raise ValueError(
            f"there are {len(found)} different cells, asked for {count}; lower --num_cells"
        )
    return list(found.values())


SEARCH_SEEDS = 3
"""Of every search and measurement, so that more seeds may be trained later at the same rates."""


class Plan(NamedTuple):
    """What a study does: searches of base rates, measurements, and what it then trains."""

    searches: Sequence[Trial]
    measurements: Sequence[Trial]
    cells: list[str]
    shared: dict[str, Any]
    settings: Trial


def plan_of(settings: Mapping[str, Any], data_dir: str | None = None) -> Plan:
    """Returns the plan of a study.

    Args:
      settings: see `PRESETS`, with `cell`, the cells to take instead of random ones, and `recipe`.
      data_dir: folder of the data set.

    Raises:
      ValueError: an unknown recipe, no recipe `fixed`, a cell without a path or named twice, a
        batch larger than the training set, or epochs that are not positive.
    """
    if strange := [name for name in settings["recipe"] if name not in RECIPES]:
        raise ValueError(unknown("recipe", strange[0], RECIPES))
    if "fixed" not in settings["recipe"]:
        raise ValueError("recipe must name fixed, which the others are compared with")
    cells = [cell_code(cell_graph(cell)) for cell in settings["cell"]]
    if twice := [cell for cell in cells if cells.count(cell) > 1]:
        raise ValueError(f"the cell {twice[0]} is named twice")
    cells = cells or sample_cells(settings["num_cells"])
    dataset = transfer_study.load(settings["dataset"], data_dir, settings["downscale"])
    steps = training.count_steps(
        len(dataset.train_images), settings["batch_size"], settings["epochs"]
    )
    shared = {name: settings[name] for name in SETTINGS if name != "steps"} | {"steps": steps}
    seeds = {"seeds": SEARCH_SEEDS}
    recipes = [RECIPES[name] for name in settings["recipe"]]
    tuned = {(one.base, one.initialization) for one in recipes if one.base is not None}
    searches = [
        shared | seeds | {"cell": base, "initialization": initialization}
        for base, initialization in sorted(tuned)
    ]
    bases = {
        one.base for one in recipes if one.rule == "standardized_update" and one.base is not None
    }
    measured = sorted(bases.union(cells)) if bases else []
    measurements = [shared | seeds | {"cell": cell} for cell in measured]
    return Plan(searches, measurements, cells, shared, settings)


def trials_of(plan: Plan, bases: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Returns what is trained, a seed after the other, at the base rates that were found.

    Args:
      plan: of the study.
      bases: the records of its searches.

    Raises:
      FailedTrialsError: a search failed.
    """
    rates = {}
    for record in bases:
        if "error" in record:
            raise FailedTrialsError(
                f"the search on {record['trial']['cell']} failed with {record['error']}; "
                "--retry_failed runs it again"
            )
        trial = record["trial"]
        rates[trial["cell"], trial["initialization"]] = record["result"]["rate"]
    trials = []
    for seed in range(plan.settings["num_seeds"]):
        for cell, name in itertools.product(plan.cells, plan.settings["recipe"]):
            initialization, _, base = RECIPES[name]
            rate = rates[base, initialization] if base else plan.settings["fixed_rate"]
            trial = {"cell": cell, "recipe": name, "seed": seed, "base_rate": rate}
            trials.append(plan.shared | trial)
    return trials


def by_cell(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the results of the measurements that did not fail, by cell."""
    return {
        record["trial"]["cell"]: record["result"] for record in measurements if "result" in record
    }


def accuracies_of(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the accuracies [cells, seeds] by recipe, NaN where a run failed, and the cells."""
    cells = list(dict.fromkeys(record["trial"]["cell"] for record in records))
    seeds = 1 + max(record["trial"]["seed"] for record in records)
    found: dict[str, np.ndarray] = {}
    for record in records:
        trial = record["trial"]
        values = found.setdefault(trial["recipe"], np.full((len(cells), seeds), math.nan))
        accuracy = record["result"]["accuracy"] if "result" in record else math.nan
        values[cells.index(trial["cell"]), trial["seed"]] = accuracy
    return found, cells
