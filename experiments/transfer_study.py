"""The networks of the transfer studies, their best rates by search, and their measurements."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax._trees import PyTree
from archscale_jax.tuning import _search as search
from experiments.lab import common, datasets, training
from experiments.lab.datasets import Dataset
from experiments.lab.models import create_network

Trial = dict[str, Any]

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
}
RATES = {"sgd": (2**-11, 4.0), "momentum": (2**-14, 0.5), "adam": (2**-16, 0.25)}
"""Smallest and largest rate of the search."""

BASE = "2"
"""The network whose rate is known: one weight edge."""

_FEW_CHAINS = (1, 2, 4, 8)
_CHAINS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20)


def _chains(depths) -> list[str]:
    return [chain_string(depth) for depth in depths]


def random_dags(count: int, vertices: tuple[int, ...], first_seed: int) -> list[str]:
    """Returns different random DAG strings, with as many vertices as `vertices` says in turn."""
    found: dict[str, None] = {}
    for seed in range(first_seed, first_seed + 100 * count):
        found[random_dag_string(seed, vertices[len(found) % len(vertices)])] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"found too few different DAGs of {vertices} vertices for {count}")


class Study(NamedTuple):
    """What one study trains: networks, their kernel sizes, and what differs from the defaults."""

    architectures: list[str]
    kernel_sizes: tuple[int | None, ...] = (None,)
    options: Mapping[str, Any] = {}
    widths: tuple[int | None, ...] = (None,)


_DAGS = random_dags(50, (5, 6, 7), 1000)
_CNNS = random_dags(30, (4, 5), 2000)
_MIXED = _chains(_FEW_CHAINS) + _DAGS[:10]

STUDIES = {
    "chains": Study(_chains(_CHAINS)),
    "dags": Study(_DAGS),
    "dags_source": Study(_DAGS, options={"initialization": "source_in_degree"}),
    "cnns": Study(_CNNS, (3, 5, 7)),
    "cnns_source": Study(_CNNS, (3, 5, 7), {"initialization": "source_in_degree"}),
    "gelu_chains": Study(_chains(_CHAINS), options={"activation": "gelu"}),
    "gelu_dags": Study(_DAGS[:16], options={"activation": "gelu"}),
    "gelu_cnns": Study(_CNNS[:9], (3, 5, 7), {"activation": "gelu"}),
    "batch_norm": Study(_MIXED, options={"normalization": "batch"}),
    "layer_norm": Study(_MIXED, options={"normalization": "layer"}),
    "momentum": Study(_MIXED, options={"optimizer": "momentum"}),
    "adam": Study(_MIXED, options={"optimizer": "adam"}),
    "widths": Study(_chains((1, 4)) + _DAGS[:2], widths=(32, 64, 256, 512)),
}


DEFAULTS: Trial = {
    "activation": "relu",
    "normalization": None,
    "initialization": "target_in_degree",
    "optimizer": "sgd",
}


def study_trials(study: Study, mlp: Trial, cnn: Trial) -> list[Trial]:
    """Returns the trials of a study, that of the base network first.

    Args:
      study: what to train.
      mlp: data set, width, batch size, steps and seeds.
      cnn: those of them that differ for a convolutional network.
    """
    base_kernel = min((size for size in study.kernel_sizes if size), default=None)
    networks: list[tuple[str, int | None, int | None]] = [(BASE, base_kernel, None)]
    for index, text in enumerate(study.architectures):
        kernel_size = study.kernel_sizes[index % len(study.kernel_sizes)]
        networks += [(text, kernel_size, width) for width in study.widths]
    found: list[Trial] = []
    for text, kernel_size, width in networks:
        settings = DEFAULTS | mlp | (cnn if kernel_size else {}) | dict(study.options)
        trial = settings | {
            "architecture": text,
            "kernel_size": kernel_size,
            "width": width or settings["width"],
            "refine": 0 if kernel_size else 1,
        }
        if trial not in found:
            found.append(trial)
    return found


def trials_of(name: str, settings: Mapping[str, Any], data_dir: str | None = None) -> list[Trial]:
    """Returns the trials of a study by name, that of the base network first.

    Args:
      name: of `STUDIES`.
      settings: the flags of `experiments.transfer`, as its config.json holds them.
      data_dir: folder of the data set.

    Raises:
      ValueError: an unknown study, or a batch larger than the training split.
    """
    if name not in STUDIES:
        raise ValueError(unknown("study", name, ("all", *STUDIES)))
    mlp = {key: settings[key] for key in ("dataset", "width", "batch_size", "steps")}
    mlp |= {"downscale": 1, "seeds": settings["num_seeds"]}
    cnn = {key: settings[f"cnn_{key}"] for key in ("downscale", "width", "batch_size", "steps")}
    examples = len(load(settings["dataset"], data_dir, 1).train_images)
    for flag, sizes in {"--batch_size": mlp, "--cnn_batch_size": cnn}.items():
        check_batch(flag, sizes["batch_size"], examples)
        sizes["steps"] = sizes["steps"] or examples // sizes["batch_size"]  # 0: one epoch
    trials = study_trials(STUDIES[name], mlp, cnn)
    check_trials(trials, data_dir, "--cnn_downscale")
    return trials


class Network(NamedTuple):
    """A network, its data and its optimizer, ready to draw and to train."""

    dataset: Dataset
    graphdef: nnx.GraphDef
    model_state: PyTree
    draw: Callable[[int], PyTree]  # from a seed to its initial params
    optimizer: Callable[[Any], optax.GradientTransformation]  # from a rate


@functools.lru_cache(maxsize=4)
def load(name: str, data_dir: str | None, downscale: int) -> Dataset:
    """Loads a data set once, with images made smaller by averaging."""
    return datasets.downscale(datasets.load(name, data_dir=data_dir), downscale)


def check_trials(
    trials: Sequence[Mapping[str, Any]],
    data_dir: str | None,
    downscale_flag: str = "the study's own factor",
    *,
    held_out: int = 0,
) -> None:
    """Checks, before the first of some trials runs, that their data are there and fit them.

    Args:
      trials: with `dataset`, `downscale` and `batch_size`.
      data_dir: folder of the data set.
      downscale_flag: what sets the `downscale`, for the message.
      held_out: examples of the training split that are not trained on.

    Raises:
      FileNotFoundError: the data set is missing; the message says how to get it.
      ValueError: a damaged data set, a factor that does not divide its images, or a batch that
        exceeds its training examples.
    """
    for name, factor, batch_size in dict.fromkeys(
        (trial["dataset"], trial["downscale"], trial["batch_size"]) for trial in trials
    ):
        examples = len(load(name, data_dir, 1).train_images)
        try:
            load(name, data_dir, factor)
        except ValueError as error:
            raise ValueError(f"{downscale_flag}, found {factor}: {error}") from None
        check_batch("--batch_size", batch_size, examples - held_out)


def check_batch(flag: str, batch_size: int, examples: int) -> None:
    """Raises ValueError where a batch, of a flag, exceeds the training examples."""
    if batch_size > examples:
        raise ValueError(
            f"{flag}={batch_size} exceeds the {max(examples, 0)} training examples; lower it, or "
            "choose another --dataset"
        )


def build(trial: Mapping[str, Any], data_dir: str | None = None) -> Network:
    """Builds the network of a trial."""
    dataset = load(trial["dataset"], data_dir, trial["downscale"])
    graph = archscale.dag_graph(trial["architecture"], kernel_size=trial["kernel_size"])
    height, width, channels = dataset.train_images.shape[1:]
    model = create_network(
        graph,
        (height, width, channels),
        trial["width"],
        dataset.num_classes,
        activation=trial["activation"],
        normalization=trial["normalization"],
        rngs=nnx.Rngs(0),
    )
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    architecture = model.architecture()

    @jax.jit
    def draw(seed: int) -> PyTree:
        key = jax.random.key(seed)
        return archscale.initialize(key, params, architecture, trial["initialization"])

    return Network(dataset, graphdef, model_state, draw, OPTIMIZERS[trial["optimizer"]])


def search_rate(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Searches the best rate of a trial's network; see `archscale_jax.find_learning_rate`.

    The start is the middle of the rates, the same for every network: no rule enters the truth.

    Returns:
      JSON values: `rate`, `uncertainty` (of the seeds), `lower`, `upper`, and `runs` as
      [rate, seed, loss] with null for a run that was lost.
    """
    train = trainer(trial, build(trial, data_dir))
    return search_result(train, trial["optimizer"], trial["seeds"], trial["refine"])


def search_result(train: search.Train, optimizer: str, seeds: int, refine: int) -> dict[str, Any]:
    """Searches the best rate of what `train` trains; returns what `search_rate` does."""
    low, high = RATES[optimizer]
    rates = np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist()
    found = search.find_learning_rate(
        train,
        rates,
        seeds=range(seeds),
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


def trainer(trial: Mapping[str, Any], network: Network) -> search.Train:
    """Returns the function that trains a network at a rate with a seed; compiled once."""

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


def measure(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Measures a trial's network at initialization, on one batch for every seed.

    Returns:
      JSON values, a list over seeds each: `absolute` and `relative`, lists over the vertices on
      end-to-end paths (see `archscale_jax.measure_update`).
    """
    network = build(trial, data_dir)
    measured = common.measurer(network.graphdef, network.model_state, network.optimizer(1.0))
    sizes = _measure_seeds(measured, network, trial)
    return {name: np.asarray(values, float).tolist() for name, values in sizes._asdict().items()}


def measure_sharpness(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Measures the sharpness of a trial's network on the same batches, a list over seeds."""
    network = build(trial, data_dir)

    def loss(params, batch):
        state = (params, network.model_state)
        return training.cross_entropy(network.graphdef, *state, *batch, train=True)[0]

    largest = jax.jit(lambda params, batch: archscale.tuning.sharpness(loss, params, batch))
    return {"sharpness": np.asarray(_measure_seeds(largest, network, trial), float).tolist()}


def _measure_seeds(measured, network: Network, trial: Mapping[str, Any]) -> Any:
    return common.measure_seeds(measured, network.draw, batches(trial, network))


def batches(trial: Mapping[str, Any], network: Network) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the batch of every seed of a trial."""
    size, seeds = trial["batch_size"], range(trial["seeds"])
    return [common.first_batch(network.dataset, size, seed) for seed in seeds]
