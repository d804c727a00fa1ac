"""Networks of DAG strings and their training, as settings say: values of flags by their names.

`experiments.lab.common` defines the flags. The trials here need nothing but their settings, so they
run in any process; those of one network share its programs.
"""

import collections
import functools
import math
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from archscale_jax.tuning._search import Train
from experiments.lab import common, datasets, training
from experiments.lab.datasets import Dataset
from experiments.lab.models import create_network
from experiments.lab.networks import Network

Settings = Mapping[str, Any]

PRECISIONS = {
    "mixed": {"dtype": jnp.bfloat16, "param_dtype": jnp.float32},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}
"""What a network computes in, and its parameters' dtype, where that is not float32."""

MOST_PARAMETERS = 2**30


def parse_graph(settings: Settings, text: str) -> jraph.GraphsTuple:
    """Parses a DAG string with the kernel size of the settings."""
    return archscale.dag_graph(text, kernel_size=settings["kernel_size"])


def build_network(settings: Settings, text: str, dataset: Dataset) -> Network:
    """Builds the network of a DAG string for a data set; it draws as the settings say.

    Raises:
      ValueError: it has more than `MOST_PARAMETERS` parameters; no memory is taken before.
    """
    height, width, channels = dataset.train_images.shape[1:]
    normalization = settings["normalization"]

    def create():
        return create_network(
            parse_graph(settings, text),
            (height, width, channels),
            settings["width"],
            dataset.num_classes,
            activation=settings["activation"],
            normalization=None if normalization == "none" else normalization,
            arrangement=settings["arrangement"],
            rngs=nnx.Rngs(0),
            **PRECISIONS.get(settings["precision"], {}),
        )

    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(create))))
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"the network {text} of --width={settings['width']} and --kernel_size="
            f"{settings['kernel_size']} has {count:.2g} parameters; accepted are {MOST_PARAMETERS}"
        )
    network = create()
    graphdef, params, model_state = nnx.split(network, nnx.Param, ...)
    architecture = network.architecture()
    rule = None if settings["initialization"] == "auto" else settings["initialization"]

    def draw(seed: int) -> PyTree:
        weights_key, _ = jax.random.split(jax.random.key(seed))
        return archscale.initialize(weights_key, params, architecture, rule)

    return Network(graphdef, params, model_state, architecture, dataset, draw)


def build_optimizer(
    settings: Settings, learning_rate: Any, total_steps: int
) -> optax.GradientTransformation:
    """Returns SGD with schedule, momentum and weight decay."""
    schedule = training.create_schedule(
        learning_rate,
        total_steps,
        kind=settings["schedule"],
        warmup_steps=settings["warmup_steps"],
    )
    names = ("momentum", "nesterov", "weight_decay")
    return training.create_optimizer(schedule, **{name: settings[name] for name in names})


def initial_state(
    network: Network, optimizer: optax.GradientTransformation, seed: int
) -> training.TrainState:
    """Draws the initial weights of a seed."""
    _, batches_key = jax.random.split(jax.random.key(seed))
    params = network.draw(seed)
    return training.create_train_state(params, network.model_state, optimizer, batches_key)


def check_training(settings: Settings, network: Network, total_steps: int) -> None:
    """Checks that settings make an optimizer and draw weights, before anything is written.

    Raises:
      ValueError: Nesterov without momentum, a warm-up as long as the training, or an initialization
        that does not fit the network.
    """
    build_optimizer(settings, 1.0, total_steps)
    jax.eval_shape(network.draw, 0)


@functools.lru_cache(maxsize=2)
def load_dataset(name: str, data_dir: str | None) -> Dataset:
    """Loads a data set, once for the trials of a process."""
    return datasets.load(name, data_dir=data_dir)


def count_steps(settings: Settings, dataset: Dataset, epochs: float) -> int:
    """Returns the updates in so many epochs, of a data set that fits the settings.

    Raises:
      ValueError: padding or a batch that the data set is too small for.
    """
    common.check_padding(dataset, settings["padding"])
    size, examples = settings["batch_size"], len(dataset.train_images)
    if size > examples:
        raise ValueError(f"--batch_size={size} exceeds the {examples} training examples; lower it")
    return training.count_steps(examples, size, epochs)


def batching(settings: Settings) -> dict[str, Any]:
    """Returns batch size and augmentation, as `experiments.lab.training` takes them."""
    return {name: settings[name] for name in ("batch_size", "flip", "padding")}


# Trials are settings with `architecture`, `steps` and `seed`, and what each function says.


def last_loss(trial: Settings, data_dir: str | None = None) -> dict[str, Any]:
    """Trains at `rate`; returns `loss`, that of the last part, inf where the run has diverged."""
    with _BUILDING:
        train = _trainer(_shared(trial, "rate"), data_dir)
    loss = math.inf
    for loss in train(trial["rate"], trial["seed"]):
        if not math.isfinite(loss):
            return {"loss": math.inf}
    return {"loss": loss}


def last_metrics(trial: Settings, data_dir: str | None = None) -> dict[str, Any]:
    """Trains at `base_rate` scaled by `rule`; returns the `rate` and what `fit` has at the end."""
    with _BUILDING:
        network, optimizer, scale = _scaled(_shared(trial, "base_rate"), data_dir)
    rate = trial["base_rate"]
    state = initial_state(network, optimizer, trial["seed"])
    state = state._replace(optimizer_state=optax.tree.set(state.optimizer_state, rate=rate))
    epochs = training.fit(
        state,
        network.dataset,
        graphdef=network.graphdef,
        optimizer=optimizer,
        total_steps=trial["steps"],
        **batching(trial),
    )
    _, metrics = collections.deque(epochs, maxlen=1).pop()  # holds one state at a time
    return {"rate": rate * scale, **metrics}


def _shared(trial: Settings, rate: str) -> tuple[tuple[str, Any], ...]:
    """What of a trial shares a compiled program with others, to look it up by."""
    return tuple((name, value) for name, value in trial.items() if name not in (rate, "seed"))


_BUILDING = threading.Lock()
"""Threads that need one program wait for the first of them to build it."""


@functools.lru_cache(maxsize=2)
def _trainer(shared: tuple[tuple[str, Any], ...], data_dir: str | None) -> Train:
    settings = dict(shared)
    dataset = load_dataset(settings["dataset"], data_dir)
    network = build_network(settings, settings["architecture"], dataset)
    return common.rate_trainer(
        functools.partial(initial_state, network),
        lambda rate: build_optimizer(settings, rate, settings["steps"]),
        dataset,
        graphdef=network.graphdef,
        total_steps=settings["steps"],
        **batching(settings),
    )


@functools.lru_cache(maxsize=2)
def _scaled(shared: tuple[tuple[str, Any], ...], data_dir: str | None):
    """Network, optimizer, and by what the base rate is multiplied."""
    settings = dict(shared)
    dataset = load_dataset(settings["dataset"], data_dir)
    network = build_network(settings, settings["architecture"], dataset)
    graph, base = (
        parse_graph(settings, settings[name]) for name in ("architecture", "base_architecture")
    )
    optimizer = optax.chain(
        optax.inject_hyperparams(lambda rate: build_optimizer(settings, rate, settings["steps"]))(
            rate=1.0
        ),
        archscale.scale_by_architecture(network.architecture, base, settings["rule"]),
    )
    scale = archscale.learning_rate_scale(graph, base, settings["rule"])
    return network, optimizer, scale
