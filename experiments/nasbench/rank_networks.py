"""Cells of NAS-Bench-201 drawn, measured and trained: one program serves all of them.

See `experiments.lab.models.CellNetwork`.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._graph import live_vertices
from archscale_jax._trees import PyTree
from experiments import transfer_study
from experiments.lab import common, datasets, training
from experiments.lab.models import CellNetwork, embed, select_cell
from experiments.nasbench.rank_recipes import (
    RECIPES,
    Trial,
    learning_rate,
    pytorch_default,
)

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


class Space(NamedTuple):
    """The network of all cells, its data and its optimizer."""

    dataset: datasets.Dataset
    graphdef: nnx.GraphDef
    params: PyTree  # shapes
    model_state: PyTree
    optimizer: optax.GradientTransformation


def space_of(trial: Trial, data_dir: str | None = None) -> Space:
    """Builds what the trials of a study share, once."""
    return _space(settings_of(trial), data_dir)


def settings_of(trial: Trial) -> tuple[tuple[str, Any], ...]:
    """Returns the settings of a trial that it shares with others, to look them up by."""
    return tuple((name, trial[name]) for name in SETTINGS)


@functools.lru_cache(maxsize=2)
def _space(settings: tuple[tuple[str, Any], ...], data_dir: str | None) -> Space:
    trial = dict(settings)
    dataset = transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
    graphdef, params, model_state = nnx.split(_network(None, trial, dataset), nnx.Param, ...)

    def create_optimizer(rate) -> optax.GradientTransformation:
        schedule = training.create_schedule(rate, trial["steps"], kind="cosine")
        return training.create_optimizer(
            schedule, momentum=0.9, nesterov=True, weight_decay=trial["weight_decay"]
        )

    optimizer = optax.inject_hyperparams(create_optimizer)(rate=1.0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return Space(dataset, graphdef, shapes, model_state, optimizer)


def _network(cell: str | None, trial: Trial, dataset: datasets.Dataset) -> CellNetwork:
    return CellNetwork(
        cell,
        dataset.train_images.shape[-1],
        trial["channels"],
        trial["cells_per_stage"],
        dataset.num_classes,
        rngs=nnx.Rngs(0),
    )


@functools.lru_cache(maxsize=1024)
def _abstract(
    cell: str, settings: tuple[tuple[str, Any], ...], data_dir: str | None
) -> tuple[PyTree, archscale.Architecture]:
    """The shapes of a cell's parameters, and its architecture."""
    trial = dict(settings)
    dataset = _space(settings, data_dir).dataset
    network = nnx.eval_shape(lambda: _network(cell, trial, dataset))
    return nnx.state(network, nnx.Param), network.architecture()


def draw(trial: Trial, cell: str, initialization: str, seed: int, data_dir: str | None) -> PyTree:
    """Draws the weights of a cell's network, as a network of the whole space holds them."""
    settings = settings_of(trial)
    params, architecture = _abstract(cell, settings, data_dir)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if initialization == "benchmark":
        drawn = pytorch_default(key, params)
    else:
        drawn = archscale.initialize(key, params, architecture, initialization)
    return embed(drawn, _space(settings, data_dir).params)


def train(
    trial: Trial, data_dir: str | None = None, measurements: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Trains a cell under a recipe.

    Returns:
      JSON values: `rate`; `accuracy` on the test split, 0 to 1; `test_loss`, and `train_loss` over
      the last tenth of an epoch; `diverged`, see `training.has_diverged`.
    """
    space = space_of(trial, data_dir)
    rate = learning_rate(trial, measurements)
    recipe = RECIPES[trial["recipe"]]
    parts = _parts(trial, recipe.initialization, rate, trial["seed"], data_dir)
    state, loss = next(parts)
    while math.isfinite(loss) and (part := next(parts, None)) is not None:
        state, loss = part
    test = space.dataset.test_images, space.dataset.test_labels
    found = training.evaluate(state.params, state.model_state, *test, graphdef=space.graphdef)
    return {
        "rate": rate,
        "accuracy": float(found["accuracy"]),
        "test_loss": float(found["loss"]),
        "train_loss": loss,
        "diverged": training.has_diverged(loss, space.dataset.num_classes),
    }


def _parts(
    trial: Trial, initialization: str, rate: float, seed: int, data_dir: str | None
) -> Iterator[tuple[training.TrainState, float]]:
    space = space_of(trial, data_dir)
    cell = trial["cell"]
    state = training.create_train_state(
        draw(trial, cell, initialization, seed, data_dir),
        select_cell(space.model_state, cell),
        space.optimizer,
        jax.random.fold_in(jax.random.key(seed), 1),
    )
    optimizer_state = optax.tree.set(state.optimizer_state, rate=jnp.float32(rate))
    return training.train_parts(
        state._replace(optimizer_state=optimizer_state),
        space.dataset,
        graphdef=space.graphdef,
        optimizer=space.optimizer,
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

    def train(rate: float, seed: int) -> Iterator[float]:
        parts = _parts(trial, trial["initialization"], rate, seed, data_dir)
        return (loss for _, loss in parts)

    found = archscale.find_learning_rate(
        train, np.geomspace(2**-9, 4, 12).tolist(), start=0.1, seeds=range(trial["seeds"]), refine=0
    )
    return {
        "rate": found.rate,
        "uncertainty": found.seed_error,
        "runs": [list(run) for run in found.runs],
    }


def measure(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Measures one update of a cell at rate 1, at the initialization `target`, for every seed.

    Returns:
      JSON values: `absolute`, `relative` and `standardized` as [seeds, vertices], null where a
      vertex has no features, and `live`, whether a vertex lies on a path.
    """
    space = space_of(trial, data_dir)
    cell, seeds = trial["cell"], range(trial["seeds"])
    measured = _measurer(settings_of(trial), data_dir)
    model_state = select_cell(space.model_state, cell)
    sizes = common.measure_seeds(
        lambda params, batch: measured(params, model_state, batch),
        lambda seed: draw(trial, cell, "target_in_degree", seed, data_dir),
        [common.first_batch(space.dataset, trial["batch_size"], seed) for seed in seeds],
    )
    _, architecture = _abstract(cell, settings_of(trial), data_dir)
    found = {name: np.asarray(values, float).tolist() for name, values in sizes._asdict().items()}
    return found | {"live": live_vertices(architecture.graph).tolist()}


@functools.lru_cache(maxsize=2)
def _measurer(settings: tuple[tuple[str, Any], ...], data_dir: str | None):
    """The compiled function of params, state and batch that measures an update of any cell."""
    space = _space(settings, data_dir)
    weight_decay = dict(settings)["weight_decay"]
    optimizer = training.create_optimizer(
        1.0, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )

    def size(params, model_state, batch):
        def features(params, batch):
            network = nnx.merge(space.graphdef, params, model_state, copy=True)
            return network.features(batch[0], train=True)

        def loss(params, batch):
            parts = (space.graphdef, params, model_state)
            return training.cross_entropy(*parts, *batch, train=True)[0]

        return archscale.measure_update(features, loss, params, batch, optimizer)

    return jax.jit(size)
