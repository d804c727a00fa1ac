"""The networks of the transfer studies, their best rates by search, and their measurements."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax._trees import PyTree
from experiments.lab import common, networks
from experiments.lab.models import create_network
from experiments.lab.networks import OPTIMIZERS, Network
from experiments.lab.studies import check_batch, check_trials, load

Trial = dict[str, Any]

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

    optimizer = OPTIMIZERS[trial["optimizer"]]
    return Network(graphdef, params, model_state, architecture, dataset, draw, optimizer)


def search_rate(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Searches the best rate of a trial's network; see `networks.search_rate`."""
    return networks.search_rate(build(trial, data_dir), trial, refine=trial["refine"])


def measure(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Measures a trial's network at initialization, on one batch for every seed.

    Returns:
      JSON values, a list over seeds each: lists over the vertices on end-to-end paths (see
      `archscale_jax.measure_update`).
    """
    network = build(trial, data_dir)
    measured = common.measurer(network.graphdef, network.model_state, network.optimizer(1.0))
    return networks.as_lists(networks.measure_seeds(measured, network, trial))


def measure_sharpness(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Measures the sharpness of a trial's network on the same batches, a list over seeds."""
    network = build(trial, data_dir)
    largest = jax.jit(functools.partial(archscale.tuning.sharpness, network.loss))
    found = networks.measure_seeds(largest, network, trial)
    return {"sharpness": np.asarray(found, float).tolist()}
