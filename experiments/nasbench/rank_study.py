"""What a ranking of cells of NAS-Bench-201 computes: its recipes, its trials, and what one does.

One compiled program serves all cells; see `experiments.lab.models.CellNetwork`.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._graph import live_vertices
from archscale_jax._spaces import canonical_cell, cell_code, cell_function, cell_graph
from archscale_jax._spaces.cell import CELL_EDGES
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from experiments.lab import networks, studies, training
from experiments.lab.datasets import Dataset
from experiments.lab.models import CellNetwork, embed, select_cell
from experiments.lab.networks import Network
from experiments.lab.runners import FailedTrialsError

Trial = Mapping[str, Any]

SETTINGS = (
    "dataset",
    "downscale",
    "channels",
    "cells_per_stage",
    "batch_size",
    "steps",
    "flip",
    "padding",
    "weight_decay",
)
"""What all trials of a study share."""


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


# Recipes.

SKIP_CELL, CONVOLUTION_CELL = "0_00_100", "0_00_300"
"""One path from input to output, of a skip or of one convolution 3 x 3: tuned on, scaled from."""


class Recipe(NamedTuple):
    """How a cell is trained.

    Attributes:
      initialization: `benchmark`, or the name of an initialization rule.
      rule: of the learning rate; None takes the rate of the benchmark for every cell.
      base: the cell whose rate is searched and scaled.
    """

    initialization: str
    rule: str | None = None
    base: str | None = None


RECIPES = {
    "fixed": Recipe("benchmark"),
    "author_code": Recipe("chen2024_code", "chen2024_code", SKIP_CELL),
    "path_sum": Recipe("target_in_degree", "path_sum", CONVOLUTION_CELL),
    "measured": Recipe("target_in_degree", "standardized_update", CONVOLUTION_CELL),
    "mup": Recipe("he_normal", "none", CONVOLUTION_CELL),
}
"""`fixed` is the benchmark's recipe; `mup` knows of widths alone, which are the same here."""


def pytorch_default(key: jax.Array, params: PyTree) -> PyTree:
    """Draws weights as PyTorch does by default, and so the benchmark: uniform in ±1/√fan_in."""
    fans = {
        name.rpartition("/")[0]: math.prod(leaf.shape[:-1])
        for name, leaf in named_leaves(params).items()
        if name.endswith("kernel")
    }
    index = itertools.count()

    def drawn(name, leaf):
        fan_in = fans.get(name.rpartition("/")[0])
        if fan_in is None:  # normalization
            return jnp.full(leaf.shape, float(name.endswith("scale")), leaf.dtype)
        bound = 1 / math.sqrt(fan_in)
        key_of_leaf = jax.random.fold_in(key, next(index))
        return jax.random.uniform(key_of_leaf, leaf.shape, leaf.dtype, -bound, bound)

    return map_with_names(drawn, params)


def learning_rate(trial: Trial, measurements: Mapping[str, Any] | None = None) -> float:
    """Returns the rate of a trial: its base rate, scaled by the rule of its recipe.

    Args:
      trial: with cell, recipe and `base_rate`.
      measurements: of `measure`, by cell; of the trial's and of the base cell.

    Raises:
      ValueError: the rule says nothing of the cell.
    """
    _, rule, base = RECIPES[trial["recipe"]]
    if rule is None or base is None:
        return trial["base_rate"]
    compare = cell_graph
    if rule == "standardized_update":
        compare = functools.partial(_live_sizes, measurements or {})
    target, base_size = compare(trial["cell"]), compare(base)
    return archscale.predict_learning_rate(target, base_size, trial["base_rate"], rule)


def _live_sizes(measurements: Mapping[str, Any], cell: str) -> archscale.tuning.UpdateSize:
    """The update sizes of the vertices that lie on a path, the others having none."""
    if cell not in measurements:
        raise ValueError(f"the cell {cell} has no measurement")
    live = np.asarray(measurements[cell]["live"])
    sizes = networks.sizes_of(measurements[cell])
    return jax.tree.map(lambda size: size[:, live], sizes)


# Trials.


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
"""Seeds of every search and measurement: more may be trained later, at the same rates."""


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
    dataset = studies.load(settings["dataset"], data_dir, settings["downscale"])
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


# What a trial does.


def network_of(trial: Trial, initialization: str, data_dir: str | None = None) -> Network:
    """Returns the network of a trial's cell as that of the whole space, drawn by an initialization.

    Networks of all cells share the structure, so that what is compiled for one serves all.
    """
    settings, cell = tuple((name, trial[name]) for name in SETTINGS), trial["cell"]
    graphdef, params, model_state, dataset, optimizer = _space(settings, data_dir)
    cell_params, architecture = _cell(cell, settings, data_dir)

    def draw(seed: int) -> PyTree:
        key = jax.random.fold_in(jax.random.key(seed), 0)
        if initialization == "benchmark":
            drawn = pytorch_default(key, cell_params)
        else:
            drawn = archscale.initialize(key, cell_params, architecture, initialization)
        return embed(drawn, params)

    state = select_cell(model_state, cell)
    return Network(graphdef, params, state, architecture, dataset, draw, optimizer)


@functools.lru_cache(maxsize=2)
def _space(settings: tuple[tuple[str, Any], ...], data_dir: str | None):
    """The network of all cells taken apart, its params as shapes; its data and its optimizer.

    The optimizer is one whose rate is an argument.
    """
    trial = dict(settings)
    dataset = studies.load(trial["dataset"], data_dir, trial["downscale"])

    def parts() -> tuple[PyTree, ...]:
        return nnx.split(_module(None, trial, dataset), nnx.Param, ...)

    graphdef, shapes, _ = jax.eval_shape(parts)
    model_state = jax.jit(lambda: parts()[2])()  # draws no weights: none are returned

    def with_schedule(rate) -> optax.GradientTransformation:
        schedule = training.create_schedule(rate, trial["steps"], kind="cosine")
        return _sgd(schedule, trial)

    adjustable = optax.inject_hyperparams(with_schedule)(rate=1.0)

    def optimizer(rate: float | None = None) -> optax.GradientTransformation:
        """The one for training, or, at a constant rate, the one to measure."""
        return adjustable if rate is None else _sgd(rate, trial)

    return graphdef, shapes, model_state, dataset, optimizer


def _sgd(rate, trial: Trial) -> optax.GradientTransformation:
    return training.create_optimizer(
        rate, momentum=0.9, nesterov=True, weight_decay=trial["weight_decay"]
    )


def _module(cell: str | None, trial: Trial, dataset: Dataset) -> CellNetwork:
    return CellNetwork(
        cell,
        dataset.train_images.shape[-1],
        trial["channels"],
        trial["cells_per_stage"],
        dataset.num_classes,
        rngs=nnx.Rngs(0),
    )


@functools.lru_cache(maxsize=1024)
def _cell(
    cell: str, settings: tuple[tuple[str, Any], ...], data_dir: str | None
) -> tuple[PyTree, archscale.Architecture]:
    """The shapes of a cell's parameters, and its architecture."""
    dataset = _space(settings, data_dir)[3]
    network = nnx.eval_shape(lambda: _module(cell, dict(settings), dataset))
    return nnx.state(network, nnx.Param), network.architecture()


def train(
    trial: Trial, data_dir: str | None = None, measurements: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Trains a cell under a recipe.

    Returns:
      JSON values: `rate`; `accuracy` on the test split, 0 to 1; `test_loss`, and `train_loss` over
      the last tenth of an epoch; `diverged`, see `training.has_diverged`.
    """
    rate = learning_rate(trial, measurements)
    network = network_of(trial, RECIPES[trial["recipe"]].initialization, data_dir)
    parts = _parts(network, trial, rate, trial["seed"])
    state, loss = next(parts)
    while math.isfinite(loss) and (part := next(parts, None)) is not None:
        state, loss = part
    test = network.dataset.test_images, network.dataset.test_labels
    found = training.evaluate(state.params, state.model_state, *test, graphdef=network.graphdef)
    return {
        "rate": rate,
        "accuracy": float(found["accuracy"]),
        "test_loss": float(found["loss"]),
        "train_loss": loss,
        "diverged": training.has_diverged(loss, network.dataset.num_classes),
    }


def _parts(
    network: Network, trial: Trial, rate: float, seed: int
) -> Iterator[tuple[training.TrainState, float]]:
    optimizer = network.optimizer()
    key = jax.random.fold_in(jax.random.key(seed), 1)
    state = training.create_train_state(network.draw(seed), network.model_state, optimizer, key)
    optimizer_state = optax.tree.set(state.optimizer_state, rate=jnp.float32(rate))
    return training.train_parts(
        state._replace(optimizer_state=optimizer_state),
        network.dataset,
        graphdef=network.graphdef,
        optimizer=optimizer,
        batch_size=trial["batch_size"],
        total_steps=trial["steps"],
        flip=trial["flip"],
        padding=trial["padding"],
    )


def search_rate(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Searches the best rate of a base cell under an initialization.

    Returns:
      JSON values: `rate`, `uncertainty` (of the seeds), and `runs` as [rate, seed, loss].
    """
    network = network_of(trial, trial["initialization"], data_dir)

    def losses(rate: float, seed: int) -> Iterator[float]:
        return (loss for _, loss in _parts(network, trial, rate, seed))

    rates = np.geomspace(2**-9, 4, 12).tolist()
    found = archscale.find_learning_rate(
        losses, rates, start=0.1, seeds=range(trial["seeds"]), refine=0
    )
    return {
        "rate": found.rate,
        "uncertainty": found.seed_error,
        "runs": [list(run) for run in found.runs],
    }


def measure(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Measures one update of a cell at rate 1, at the initialization `target`, for every seed.

    Returns:
      JSON values: the fields of `UpdateSize` as [seeds, vertices], null where a vertex has no
      features, and `live`, whether a vertex lies on a path.
    """
    network = network_of(trial, "target_in_degree", data_dir)

    def size(params: PyTree, batch: Any) -> archscale.tuning.UpdateSize:
        parts = {"graphdef": network.graphdef, "optimizer": network.optimizer}
        return _size(params, network.model_state, batch, **parts)

    sizes = networks.measure_seeds(size, network, trial)
    live = live_vertices(network.architecture.graph).tolist()
    return networks.as_lists(sizes) | {"live": live}


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"))
def _size(params, model_state, batch, *, graphdef, optimizer) -> archscale.tuning.UpdateSize:
    """Measures an update of any cell; the features are those of all vertices."""

    def features(params: PyTree, batch: Any) -> list[jax.Array]:
        network = nnx.merge(graphdef, params, model_state, copy=True)
        return network.features(batch[0], train=True)

    def loss(params: PyTree, batch: Any) -> jax.Array:
        return training.cross_entropy(graphdef, params, model_state, *batch, train=True)[0]

    return archscale.measure_update(features, loss, params, batch, optimizer(1.0))
