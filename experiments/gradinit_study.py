"""What a trial of the GradInit study does: draw, learn the multipliers, measure, train.

The networks are those where no formula is sure to fit: deep convolutional networks with and without
batch normalization, dense graphs of convolutions, and a transformer that normalizes behind every
addition.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._gradinit_step import Update
from experiments.lab import common, families, networks, ranges, studies, training
from experiments.lab.datasets import Dataset
from experiments.lab.models import create_network
from experiments.lab.models.images import (
    PlainNetwork,
    PostNormTransformer,
    ResidualStages,
    VisionTransformer,
)
from experiments.lab.networks import Network

Trial = Mapping[str, Any]

# Networks.


def complete_network(image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
    """A network on a complete DAG: every vertex sums a convolution of each before it."""
    text = "_".join("2" * vertex for vertex in range(1, depth + 1))
    return create_network(
        archscale.dag_graph(text, kernel_size=3),
        image,
        width,
        classes,
        normalization="batch" if normalized else None,
        rngs=rngs,
    )


def pre_norm_transformer(image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
    """A Pre-LN transformer."""
    del normalized  # it always is
    return VisionTransformer(image, width, depth, classes, rngs=rngs)


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "plain": PlainNetwork,
    "residual": ResidualStages,
    "dag": complete_network,
    "transformer": PostNormTransformer,
    "pre_ln": pre_norm_transformer,
}
TRANSFORMERS = ("transformer", "pre_ln")


# Trials.

LEARNED: dict[str, dict[str, Any]] = {
    "none": {},
    "gradinit": {},
    "second_order": {"second_order": True},
    "penalty": {},
    "vertices": {},
    "nio": {},
}
"""No GradInit, the paper's, its variants, and NIO; `learn` adds the penalty's weight and groups."""

RATES = {
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "adam": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}
"""Learning rates of the training runs, by optimizer."""

DEFAULT_STARTS = {
    "plain": ("flax", "he"),
    "residual": ("he", "topology"),
    "dag": ("he", "topology"),
    "transformer": ("flax", "topology"),
    "pre_ln": ("flax", "topology"),
}
"""Initializations by family: Flax's own, He's for every layer by itself, and this library's, the
topology; in a plain network every layer has one input, and topology is He."""

BASES = {
    "plain": "plain_6",
    "residual": "residual_3",
    "dag": "dag_1",
    "transformer": "transformer_2",
    "pre_ln": "pre_ln_2",
}
"""Networks whose best rate is taken as known when others are predicted."""

VARIANT_NETWORKS = ("plain_12", "residual_9", "dag_5", "transformer_6")
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
}
MEASURED_BATCHES = 8

SHARED = (
    "dataset",
    "batch_size",
    "steps",
    "test_examples",
    "gradinit_steps",
    "scale_rate",
    "sgd_rate",
    "sgd_norm",
    "adam_rate",
    "adam_norm",
    "penalty",
)
"""Settings of every trial."""


class Name(NamedTuple):
    """A network by name: `plain_24`, or `plain_24_norm` with batch normalization."""

    family: str
    depth: int
    normalized: bool

    @property
    def optimizer(self) -> Update:
        """What trains it, and whose update GradInit looks at."""
        return "adam" if self.family in TRANSFORMERS else "sgd"


def parse_name(text: str) -> Name:
    """Parses the name of a network.

    Raises:
      ValueError: another form, or an unknown family.
    """
    family, *rest = text.replace("pre_ln", "pre-ln").split("_")
    family = family.replace("-", "_")
    depth = int(rest[0]) if rest and rest[0].isdecimal() and len(rest[0]) < 9 else 0
    known = family in NETWORKS and rest[1:] in ([], ["norm"])
    if not known or not 1 <= depth <= ranges.MOST_LAYERS:
        raise ValueError(
            f"network {text!r}; accepted are FAMILY_DEPTH and FAMILY_DEPTH_norm with batch "
            f"normalization, of DEPTH 1 to {ranges.MOST_LAYERS} and the families "
            f"{', '.join(NETWORKS)}"
        )
    normalized = rest[1:] == ["norm"] or family in TRANSFORMERS
    return Name(family, depth, normalized)


def all_trials(names: list[str], settings: Mapping[str, Any]) -> list[Trial]:
    """Returns the trials of networks: every start with what is learned on it, variants, seeds.

    Raises:
      ValueError: see `parse_name`; an odd batch, or a rate or norm that is not positive.
    """
    if settings["batch_size"] % 2:
        raise ValueError(f"--batch_size must be even, found {settings['batch_size']}")
    for key in ("scale_rate", "sgd_rate", "sgd_norm", "adam_rate", "adam_norm", "penalty"):
        if not 0 < settings[key] < math.inf:
            raise ValueError(f"--{key} must be positive and finite, found {settings[key]}")
    trials: list[Trial] = []
    for text in dict.fromkeys(names):
        name = parse_name(text)
        starts = DEFAULT_STARTS[name.family]
        methods = [(start, learned) for start in starts for learned in ("none", "gradinit", "nio")]
        if text == BASES[name.family]:
            methods = [(starts[-1], "none")]
        if text in VARIANT_NETWORKS:
            variants = [one for one in LEARNED if one not in ("none", "gradinit", "nio")]
            if name.optimizer == "adam":
                variants.remove("second_order")  # changes nothing there
            methods += [(starts[0], one) for one in variants]
        sizes = "patches" if name.family in TRANSFORMERS else "images"
        methods = [one for one in methods if one[1] in settings["learned"]]
        shared = {key: settings[key] for key in SHARED}
        shared |= {key: settings[f"{sizes}_{key}"] for key in ("width", "downscale")}
        for start, learned in methods:
            for seed in range(settings["num_seeds"]):
                method = {"network": text, "start": start, "learned": learned, "seed": seed}
                trials.append(shared | method | {"rates": list(RATES[name.optimizer])})
    return trials


def check_trials(trials: Sequence[Trial], data_dir: str | None) -> None:
    """Checks that the data of trials are there and fit them; see `studies.check_trials`."""
    for sizes in ("images", "patches"):
        mine = [
            trial
            for trial in trials
            if (parse_name(trial["network"]).family in TRANSFORMERS) == (sizes == "patches")
        ]
        studies.check_trials(mine, data_dir, f"--{sizes}_downscale")
        for trial in mine if sizes == "patches" else ():
            images = studies.load(trial["dataset"], data_dir, trial["downscale"])
            families.check_transformer(images, trial["width"], "--patches_width")


@functools.lru_cache(maxsize=2)
def build(text: str, dataset: str, data_dir: str | None, downscale: int, width: int) -> Network:
    """Builds a network by name, once; it draws as Flax does."""
    name = parse_name(text)
    data = studies.load(dataset, data_dir, downscale)
    height, side, channels = data.train_images.shape[1:]

    def create(seed: int) -> nnx.Module:
        return NETWORKS[name.family](
            (height, side, channels),
            width,
            name.depth,
            data.num_classes,
            name.normalized,
            rngs=nnx.Rngs(seed),
        )

    return networks.take_apart(create(0), data)._replace(
        draw=lambda seed: nnx.state(create(seed), nnx.Param),
        optimizer=OPTIMIZERS[name.optimizer],
    )


def draw(network: Network, start: str, seed: int, family: str = "plain") -> PyTree:
    """Draws the params of a seed by an initialization; `topology` needs the family."""
    params = network.draw(seed)
    if start == "flax":
        return params
    residual = family in ("residual", *TRANSFORMERS)
    rule = "he_normal" if start == "he" else "second_moment" if residual else "target_in_degree"
    return archscale.initialize(jax.random.key(seed), params, network.architecture, rule)


def halves(dataset: Dataset, size: int, seed: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields random batches of so many examples, each example once an epoch, without end."""
    for epoch in range(10**6):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        order = jax.random.permutation(key, len(dataset.train_images))
        for first in range(0, len(order) - size + 1, size):
            chosen = order[first : first + size]
            yield dataset.train_images[chosen], dataset.train_labels[chosen]


def learn(
    network: Network, params: PyTree, trial: Trial
) -> tuple[PyTree, archscale.contrib.GradInitRecord | archscale.contrib.NioRecord]:
    """GradInit or NIO as a trial has it."""
    if trial["learned"] == "nio":
        batches = halves(network.dataset, trial["batch_size"] // 2, trial["seed"])
        return archscale.contrib.nio(network.loss, params, batches)
    optimizer = parse_name(trial["network"]).optimizer
    options = dict(LEARNED[trial["learned"]])
    if trial["learned"] == "penalty":
        options["penalty"] = trial["penalty"]
    if trial["learned"] == "vertices":
        options["groups"] = archscale.contrib.vertex_groups(network.architecture)
    return archscale.gradinit(
        network.loss,
        params,
        halves(network.dataset, trial["batch_size"] // 2, trial["seed"]),
        optimizer=optimizer,
        learning_rate=trial[f"{optimizer}_rate"],
        max_gradient_norm=trial[f"{optimizer}_norm"],
        scale_learning_rate=trial["scale_rate"],
        num_steps=trial["gradinit_steps"],
        **options,
    )


def run(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Draws, learns, measures, and trains at every rate; JSON values."""
    network = build(
        trial["network"], trial["dataset"], data_dir, trial["downscale"], trial["width"]
    )
    family = parse_name(trial["network"]).family
    params = draw(network, trial["start"], trial["seed"], family)
    found: dict[str, Any] = {"tensors": tensor_sizes(network, params, trial)}
    if trial["learned"] != "none":
        params, record = learn(network, params, trial)
        found["tensors_after"] = tensor_sizes(network, params, trial)
        found["record"] = summary(record)
    batch = common.first_batch(network.dataset, trial["batch_size"], trial["seed"])
    found["measured"] = networks.as_lists(network.measure(params, batch))
    found["runs"] = [train(network, params, rate, trial) for rate in trial["rates"]]
    return found


def summary(
    record: archscale.contrib.GradInitRecord | archscale.contrib.NioRecord,
) -> dict[str, Any]:
    """What is kept of a record: the last multipliers, and every iteration's scalars."""
    kept = set(record._fields) & {"gradient_norm", "loss", "updated_loss", "cosine"}
    return {
        "multipliers": {name: float(one[-1]) for name, one in record.multipliers.items()},
        "constrained": record.constrained.astype(int).tolist(),
        **{name: getattr(record, name).astype(float).tolist() for name in sorted(kept)},
    }


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(loss: Callable[[PyTree, Any], jax.Array], params: PyTree, batch: Any) -> PyTree:
    return jax.grad(loss)(params, batch)


def tensor_sizes(network: Network, params: PyTree, trial: Trial) -> dict[str, list[float]]:
    """Mean size of a tensor's entries, and mean deviation of their gradients over batches.

    By name, of tensors with two axes or more [GradInit, Fig. 1].
    """
    batches = halves(network.dataset, trial["batch_size"], trial["seed"] + 1000)
    sums: list[dict[str, np.ndarray]] = []
    for _ in range(MEASURED_BATCHES):
        leaves = named_leaves(_gradient(network.loss, params, next(batches)))
        sums.append({name: np.asarray(leaf, float) for name, leaf in leaves.items()})
    weights = named_leaves(params)
    return {
        one.name: [
            float(np.mean(np.abs(weights[one.name]))),
            float(np.mean(np.std([each[one.name] for each in sums], axis=0))),
        ]
        for one in network.architecture.parameters
        if len(one.shape) > 1
    }


def train(network: Network, params: PyTree, rate: float, trial: Trial) -> dict[str, Any]:
    """Trains at one rate without warm-up; the losses of every tenth, and the test accuracy.

    A run whose loss is not finite ends there, and has no accuracy.
    """
    optimizer = _optimizer(parse_name(trial["network"]).optimizer)
    key = jax.random.fold_in(jax.random.key(trial["seed"]), 1)
    state = training.create_train_state(params, network.model_state, optimizer, key)
    state = state._replace(optimizer_state=optax.tree.set(state.optimizer_state, rate=rate))
    losses: list[float] = []
    for trained, loss in training.train_parts(
        state,
        network.dataset,
        graphdef=network.graphdef,
        optimizer=optimizer,
        batch_size=trial["batch_size"],
        total_steps=trial["steps"],
    ):
        state = trained
        losses.append(loss)
        if not math.isfinite(loss):
            return {"rate": rate, "losses": losses, "accuracy": None}
    tested = slice(trial["test_examples"])
    measured = training.evaluate(
        state.params,
        state.model_state,
        network.dataset.test_images[tested],
        network.dataset.test_labels[tested],
        graphdef=network.graphdef,
        batch_size=500,
    )
    return {"rate": rate, "losses": losses, "accuracy": float(measured["accuracy"])}


@functools.cache
def _optimizer(name: str) -> optax.GradientTransformation:
    return optax.inject_hyperparams(lambda rate: OPTIMIZERS[name](rate))(rate=1.0)
