"""A network taken apart into functions of its parameters, and the search of its best rate."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from jaxtyping import Array, Float, Scalar

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from archscale_jax.tuning._basin import loss_at
from experiments.lab import common, training
from experiments.lab.datasets import Dataset

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
}
RATES = {"sgd": (2**-11, 4.0), "momentum": (2**-14, 0.5), "adam": (2**-16, 0.25)}
"""Smallest and largest rate of a search, by optimizer."""


class Network(NamedTuple):
    """A Flax NNX network taken apart, ready to draw, to measure and to train.

    Attributes:
      graphdef: its structure.
      params: its parameters as Flax drew them, or their shapes.
      model_state: what is not trained.
      architecture: its graph, bound to the parameters.
      dataset: what it is trained on.
      draw: from a seed to initial parameters.
      optimizer: from a rate to the optimizer.
    """

    graphdef: nnx.GraphDef
    params: PyTree
    model_state: PyTree
    architecture: archscale.Architecture
    dataset: Dataset
    draw: Callable[[int], PyTree]
    optimizer: Callable[..., optax.GradientTransformation] = optax.sgd

    def apply(self, params: PyTree, images: Float[Array, "b h w c"]) -> Float[Array, "b o"]:
        """Returns the logits in training mode; running averages are not kept."""
        return nnx.merge(self.graphdef, params, self.model_state, copy=True)(images, train=True)

    def loss(self, params: PyTree, batch: tuple[Array, Array]) -> Float[Scalar, ""]:
        """Returns the mean cross entropy in nats of a batch of images and labels."""
        parts = (self.graphdef, params, self.model_state)
        return training.cross_entropy(*parts, *batch, train=True)[0]

    def measure(self, params: PyTree, batch: tuple[Array, Array]) -> archscale.tuning.UpdateSize:
        """Measures an update at rate 1 as every vertex sees it; compiled once."""
        return _measure(
            params, self.model_state, batch, graphdef=self.graphdef, optimizer=self.optimizer
        )


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"))
def _measure(params, model_state, batch, *, graphdef, optimizer) -> archscale.tuning.UpdateSize:
    def apply(params: PyTree, images: Array) -> Array:
        return nnx.merge(graphdef, params, model_state, copy=True)(images, train=True)

    def loss(params: PyTree, batch: Any) -> Array:
        return training.cross_entropy(graphdef, params, model_state, *batch, train=True)[0]

    def features(params: PyTree, batch: Any) -> dict[int, Array]:
        return archscale.vertex_features(apply, params, batch[0])

    return archscale.measure_update(features, loss, params, batch, optimizer(1.0))


def cross_entropy(logits: Float[Array, "b o"], labels: Array) -> Float[Scalar, ""]:
    """Returns the mean cross entropy in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def take_apart(module: nnx.Module, dataset: Dataset, rule: str | None = None) -> Network:
    """Takes a module apart and traces it on images of a data set.

    Args:
      module: of arrays, or of shapes (`nnx.eval_shape`).
      dataset: what it is trained on.
      rule: of the initialization that `draw` is; None takes the library's default.
    """
    graphdef, params, model_state = nnx.split(module, nnx.Param, ...)

    def apply(params: PyTree, images: Array) -> Array:
        return nnx.merge(graphdef, params, model_state, copy=True)(images, train=True)

    images = jax.ShapeDtypeStruct((2, *dataset.train_images.shape[1:]), jnp.float32)
    architecture = archscale.trace(apply, params, images)

    def draw(seed: int) -> PyTree:
        return archscale.initialize(jax.random.key(seed), params, architecture, rule)

    return Network(graphdef, params, model_state, architecture, dataset, draw)


def trainer(network: Network, trial: Mapping[str, Any]) -> Callable[[float, int], Iterator[float]]:
    """Returns what trains a network at a rate with a seed, yielding losses; compiled once."""

    def create_state(optimizer: optax.GradientTransformation, seed: int) -> training.TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        params = network.draw(seed)
        return training.create_train_state(params, network.model_state, optimizer, key)

    return common.rate_trainer(
        create_state,
        network.optimizer,
        network.dataset,
        graphdef=network.graphdef,
        batch_size=trial["batch_size"],
        total_steps=trial["steps"],
    )


def search_rate(network: Network, trial: Mapping[str, Any], *, refine: int) -> dict[str, Any]:
    """Searches the best rate of a network; see `archscale_jax.find_learning_rate`.

    The start is the middle of the rates, the same for every network: the ground truth uses no rule.

    Args:
      network: what is trained.
      trial: with `optimizer` (its name), `batch_size`, `steps` and `seeds`.
      refine: how often the grid is halved around the best rates.

    Returns:
      JSON values: `rate`, `uncertainty` (of the seeds), `lower`, `upper`, and `runs` as
      [rate, seed, loss] with null for a run that diverged.
    """
    low, high = RATES[trial["optimizer"]]
    found = archscale.find_learning_rate(
        trainer(network, trial),
        np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist(),
        seeds=range(trial["seeds"]),
        start=math.sqrt(low * high),
        refine=refine,
        max_loss=100.0,
    )
    return {
        "rate": found.rate,
        "uncertainty": found.seed_error,
        "lower": found.basin.lower,
        "upper": found.basin.upper,
        "runs": [list(run) for run in found.runs],
    }


def batches_of(network: Network, trial: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    """Returns the batch of every seed of a trial."""
    size, seeds = trial["batch_size"], range(trial["seeds"])
    return [common.first_batch(network.dataset, size, seed) for seed in seeds]


def measure_seeds(
    measure: Callable[[PyTree, Any], Any], network: Network, trial: Mapping[str, Any]
) -> Any:
    """Measures what a network draws for every seed of a trial, each on its batch; stacked."""
    return common.measure_seeds(measure, network.draw, batches_of(network, trial))


def as_lists(sizes: archscale.tuning.UpdateSize) -> dict[str, Any]:
    """Returns what was measured as JSON values, by name."""
    return {name: np.asarray(values, float).tolist() for name, values in sizes._asdict().items()}


def sizes_of(measured: Mapping[str, Any]) -> archscale.tuning.UpdateSize:
    """Returns what `as_lists` was given; null is NaN."""
    names = archscale.tuning.UpdateSize._fields
    sizes = {name: jnp.asarray(np.asarray(measured[name], float)) for name in names}
    return archscale.tuning.UpdateSize(**sizes)


def runs_of(result: Mapping[str, Any]) -> list[archscale.tuning.Run]:
    """Returns the runs of a search's result; the loss of one that diverged is infinite."""
    return [
        archscale.tuning.Run(rate, seed, math.inf if loss is None else loss)
        for rate, seed, loss in result["runs"]
    ]


def mean_losses(result: Mapping[str, Any]) -> dict[float, float]:
    """Returns the loss by rate of a search, the mean over seeds; inf where a seed diverged."""
    losses: dict[float, list[float]] = {}
    for run in sorted(runs_of(result)):
        losses.setdefault(run.rate, []).append(run.loss)
    return {rate: float(np.mean(found)) for rate, found in losses.items()}


def transfer_row(
    result: Mapping[str, Any], of_base: Mapping[str, Any], uniform: Mapping[str, Any]
) -> dict[str, float]:
    """Returns how a search's best rate compares with that of its base.

    `nats`: the log of the best rate over the base's, and `noise`, its standard error. `given_up`:
    the loss at the base's rate over the best loss of one rate for all parameters, less 1;
    `at_best`: the same at the method's own best rate.

    Args:
      result: of the network under a method; see `search_rate`.
      of_base: of the base under that method.
      uniform: of the network, with one rate for all parameters.
    """
    losses, best = mean_losses(result), min(mean_losses(uniform).values())
    noise = (result["uncertainty"] or math.nan, of_base["uncertainty"] or math.nan)
    return {
        "nats": math.log(result["rate"] / of_base["rate"]),
        "noise": math.hypot(*noise),
        "given_up": loss_at(of_base["rate"], losses) / best - 1,
        "at_best": min(losses.values()) / best - 1,
    }


def transfer_summary(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Returns a row for every group of `transfer_row`s: RMS distance, and the loss given up."""
    found = []
    for names, group in rows.groupby(list(by), sort=False):
        lost = 100 * group["given_up"]
        found.append(
            {
                **dict(zip(by, names, strict=True)),
                "networks": len(group),
                "nats": f"{np.sqrt(np.mean(group['nats'] ** 2)):.2f}",
                "noise": f"{np.sqrt(np.mean(group['noise'] ** 2)):.2f}",
                "given up, %: median": f"{lost.median():+.1f}",
                "most": f"{lost.max():+.1f}",
                "at its best, %": f"{100 * group['at_best'].median():+.1f}",
            }
        )
    return pd.DataFrame(found)
