"""Growing networks: what one trial of the study trains, and how it goes on after a kill.

The networks are perceptrons and convolutional networks on graphs, and ResNet-18. Every one is an
ordinary Flax NNX module that takes kernels of any width, so that one loss function serves a network
of any size.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import chain_string
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from experiments import grow_cost
from experiments.lab import checkpoints, networks, studies
from experiments.lab.datasets import Dataset
from experiments.lab.models import create_network
from experiments.lab.models.images import ResNet18
from experiments.lab.networks import Network

Trial = Mapping[str, Any]

GROWING = {
    "tiny": ("tiny", "none", False),
    "tiny_update": ("tiny", "none", True),
    "tiny_width": ("tiny", "width", False),
    "tiny_measured": ("tiny", "measured", False),
    "gradmax": ("gradmax", "none", False),
    "random": ("random", "none", False),
}
"""Methods that grow: how neurons are chosen, how the learning rate follows the architecture, and
whether the layers that read new neurons move by their best update."""
METHODS = (*GROWING, "large", "scratch")
INITIALIZATION = {
    "mlp": "target_in_degree",
    "dag_cnn": "target_in_degree",
    "resnet18": "second_moment",
}
HELD_OUT = 1000
"""Training examples that amplitudes are chosen on, and nothing is trained on."""
MOMENTUM = 0.9
OPTIMIZER = optax.sgd(1.0, momentum=MOMENTUM)
"""Rates are arguments of an update, so that they compile nothing."""
DECAY = 0.4
"""Last part of the updates, over which the rate falls linearly to 0."""
POINTS = 10
"""Points of a curve, besides those at growths."""
CURVE_EXAMPLES = 2000
"""Test examples of a point; the last point takes all."""


_RESNET = {
    "network": "resnet18",
    "downscale": 2,
    "large_width": 16,
    "steps": 400,
    "rates": (0.02, 0.04),
    "statistics": 512,
    "held_out": 500,
    "methods": ("tiny", "tiny_update", "tiny_width", "gradmax", "random", "large", "scratch"),
}
SPECS: dict[str, dict[str, Any]] = {
    "mlp": {
        "network": "mlp",
        "downscale": 1,
        "start_width": 4,
        "large_width": 128,
        "steps": 2000,
        "rates": (0.005, 0.01, 0.02, 0.05),
        "statistics": 1024,
        "held_out": 1000,
        "schedule": {"order": "round_robin", "growths": 12, "interval": 80, "factor": 2.0},
    },
    "dag_cnn": {
        "network": "dag_cnn",
        "downscale": 2,
        "start_width": 2,
        "large_width": 16,
        "steps": 800,
        "rates": (0.03, 0.06),
        "methods": ("tiny", "tiny_update", "tiny_width", "gradmax", "random", "large", "scratch"),
        "statistics": 512,
        "held_out": 500,
        "schedule": {"order": "round_robin", "growths": 8, "interval": 60, "factor": 2.0},
    },
    "resnet18_sixteenth": {
        **_RESNET,
        "start_width": 1,
        "schedule": {"order": "all", "growths": 3, "interval": 60, "factor": 2.0},
    },
    "resnet18_quarter": {
        **_RESNET,
        "start_width": 4,
        "methods": ("tiny", "tiny_width", "random", "scratch"),
        "schedule": {"order": "all", "growths": 1, "interval": 60, "factor": 2.0},
    },
}
"""What grows: from which width, by which schedule, by which methods (all where none are named), and
the width of the large network."""
SPECS["mlp_largest"] = {
    **SPECS["mlp"],
    "schedule": {**SPECS["mlp"]["schedule"], "order": "largest"},
    "methods": ("tiny", "scratch"),
}


def mlp(image, width: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A perceptron of four layers."""
    graph = archscale.dag_graph(chain_string(3))
    return create_network(graph, image, width, classes, rngs=rngs)


def dag_cnn(image, width: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A convolutional network of four vertices, each of which reads all before it."""
    graph = archscale.dag_graph("2_22_222", kernel_size=3)
    return create_network(graph, image, width, classes, rngs=rngs)


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp,
    "dag_cnn": dag_cnn,
    "resnet18": ResNet18,
}


# What a trial trains.

NeuronGroups = tuple[archscale.contrib.NeuronGroup, ...]


@functools.lru_cache(maxsize=2)
def build(
    name: str, dataset: str, data_dir: str | None, downscale: int
) -> tuple[Network, NeuronGroups]:
    """Builds a network of width 2, whose functions take params of any width, and its neuron groups.

    Once: trials that share it compile nothing anew.
    """
    data = studies.load(dataset, data_dir, downscale)
    network = networks.take_apart(_module(name, data, 2), data)
    batch = data.train_images[:2], data.train_labels[:2]
    groups = archscale.contrib.find_neuron_groups(network.loss, network.params, batch)
    return network, tuple(one for one in groups if not one.blocker)


def _module(name: str, data: Dataset, width: int) -> nnx.Module:
    height, side, channels = data.train_images.shape[1:]
    return NETWORKS[name]((height, side, channels), width, data.num_classes, rngs=nnx.Rngs(0))


def create(name: str, network: Network, width: int, seed: int) -> PyTree:
    """Returns params of a width, drawn by our rule."""
    params = nnx.state(_module(name, network.dataset, width), nnx.Param)
    return draw(name, network, params, seed)


def draw(name: str, network: Network, params: PyTree, seed: int) -> PyTree:
    """Returns params of the same shapes, drawn by our rule."""
    images = jax.ShapeDtypeStruct((2, *network.dataset.train_images.shape[1:]), jnp.float32)
    architecture = archscale.trace(network.apply, params, images)
    return archscale.initialize(jax.random.key(seed), params, architecture, INITIALIZATION[name])


@functools.partial(jax.jit, static_argnames="apply")
def hits(apply, params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many answers are right, and the summed loss."""
    logits = apply(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([jnp.sum(jnp.argmax(logits, axis=-1) == labels), jnp.sum(losses)])


@functools.partial(jax.jit, static_argnames="loss")
def update(loss, params: PyTree, state: Any, batch: Any, rates: dict[str, jax.Array]):
    """Makes one update; returns params, the optimizer's state, and the loss before it."""
    value, gradients = jax.value_and_grad(loss)(params, batch)
    updates, state = OPTIMIZER.update(gradients, state, params)
    updates = map_with_names(lambda name, update: rates[name] * update, updates)
    return optax.apply_updates(params, updates), state, value


def chosen_specs(networks, methods, settings: Trial) -> dict[str, dict[str, Any]]:
    """Returns the specs of networks, with what the settings change in them.

    Raises:
      ValueError: an unknown network or method, growths after the last update, or a start that is
        wider than the large network.
    """
    for what, names, known in (("network", networks, SPECS), ("arm", methods, METHODS)):
        for name in names:
            if name not in known:
                raise ValueError(unknown(what, name, known))
    found = {}
    for name in networks:
        spec = {**SPECS[name], "schedule": dict(SPECS[name]["schedule"])}
        for flag, key in (("images_downscale", "downscale"), ("start_width", "start_width"),
                          ("large_width", "large_width"), ("steps", "steps")):  # fmt: skip
            if settings[flag] is not None:
                spec[key] = settings[flag]
        for key in ("growths", "interval"):
            if settings[key] is not None:
                spec["schedule"][key] = settings[key]
        if settings["rate"] is not None:
            spec["rates"] = tuple(float(rate) for rate in settings["rate"])
        _check_spec(spec)
        found[name] = spec
    return found


def _check_spec(spec: Mapping[str, Any]) -> None:
    growths, interval = spec["schedule"]["growths"], spec["schedule"]["interval"]
    if growths * interval >= spec["steps"]:
        raise ValueError(
            f"--growths={growths} growths, one --interval={interval} updates, need --steps above "
            f"{growths * interval}, found {spec['steps']}"
        )
    if spec["start_width"] > spec["large_width"]:
        raise ValueError(
            f"--start_width={spec['start_width']} exceeds --large_width={spec['large_width']}"
        )


def all_trials(specs: Mapping[str, Mapping[str, Any]], methods, settings: Trial) -> list[dict]:
    """Returns the trials whose settings are known in advance: all but those of `scratch`.

    Args:
      specs: of networks, as in `SPECS`, by name.
      methods: names of methods.
      settings: num_seeds, and what all trials have in common.
    """
    common = {name: settings[name] for name in ("dataset", "batch_size", "normalize")}
    trials = []
    for name, spec in specs.items():
        plain = {
            key: value for key, value in spec.items() if key not in ("rates", "schedule", "methods")
        }
        for method in methods:
            if method == "scratch" or method not in spec.get("methods", METHODS):
                continue
            grows = {"schedule": dict(spec["schedule"])} if method in GROWING else {}
            trials += [
                {
                    "spec": name,
                    "arm": method,
                    "rate": rate,
                    "seed": seed,
                    **plain,
                    **grows,
                    **common,
                }
                for rate in spec["rates"]
                for seed in range(settings["num_seeds"])
            ]
    return trials


def scratch_trials(records) -> list[dict]:
    """Returns trials of the architectures that `tiny` ended with, drawn anew.

    At the same rate, on the same seed, for as many updates as cost the same operations.

    Args:
      records: of finished trials.
    """
    trials = []
    for record in records:
        trial = record["trial"]
        if "result" not in record or trial["arm"] != "tiny":
            continue
        result = record["result"]
        if result["accuracy"] is None:
            continue
        steps = round(result["flops"] / result["last_step_flops"])
        plain = {key: value for key, value in trial.items() if key != "schedule"}
        trials.append({**plain, "arm": "scratch", "steps": steps, "neurons": result["neurons"]})
    return trials


@dataclasses.dataclass
class Run:
    """Where a run is; all but its network and neuron groups is saved at growths.

    Attributes:
      network: what grows.
      groups: its neurons, by what makes and reads them.
      step: updates so far.
      params: of the network.
      optimizer_state: its optimizer's.
      flops: floating-point operations so far, of which `growth_flops` for growing.
      edits: the log of growths.
      curve: points over time.
    """

    network: Network
    groups: NeuronGroups
    step: int
    params: PyTree
    optimizer_state: Any
    flops: float = 0.0
    growth_flops: float = 0.0
    edits: list[archscale.contrib.Edit] = dataclasses.field(default_factory=list)
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)


def run(trial: Trial, saves: pathlib.Path | None = None, data_dir: str | None = None) -> dict:
    """Trains one network, growing or not; JSON values.

    Args:
      trial: settings.
      saves: folder of its checkpoints; those that grow save one at every growth, and go on from it.
      data_dir: folder of the data set.
    """
    name, seed = trial["network"], trial["seed"]
    network, groups = build(name, trial["dataset"], data_dir, trial["downscale"])
    width = trial["large_width" if trial["arm"] == "large" else "start_width"]
    params = create(name, network, width, seed)
    if trial["arm"] == "scratch":
        wide, _ = archscale.contrib.widen(params, trial["neurons"], groups)
        params = draw(name, network, wide, seed)
    now = Run(network, groups, 0, params, OPTIMIZER.init(params))
    return _train(now, trial, saves if trial["arm"] in GROWING else None)


def _train(now: Run, trial: Trial, folder: pathlib.Path | None) -> dict:
    start, network = now.params, now.network
    schedule = (
        archscale.contrib.GrowthSchedule(**trial["schedule"]) if "schedule" in trial else None
    )
    if folder is not None:
        now = _restored(folder, trial, now) or now
    multipliers, cost = _multipliers(now, start, trial), _flops(now, now.params)
    last: list[jax.Array] = []
    for batch in _batches(network.dataset, trial, now.step):
        if schedule is not None and _is_due(schedule, now):
            if not _point(now, last):
                return _result(now, trial)
            _grow(now, trial, schedule)
            multipliers, cost = _multipliers(now, start, trial), _flops(now, now.params)
            _point(now, last)
            last = []  # a run that goes on from here knows no earlier ones
            if folder is not None:
                _save(folder, trial, now)
        rate = trial["rate"] * min(1.0, (1 - now.step / trial["steps"]) / DECAY)
        rates = {name: np.float32(rate * multiplier) for name, multiplier in multipliers.items()}
        now.params, now.optimizer_state, loss = update(
            network.loss, now.params, now.optimizer_state, batch, rates
        )
        last = [*last[-49:], loss]
        now.step += 1
        now.flops += 3 * cost * trial["batch_size"]
        if now.step % max(trial["steps"] // POINTS, 1) == 0 and not _point(now, last):
            return _result(now, trial)
    _point(now, last, len(network.dataset.test_images))
    return _result(now, trial)


def _flops(now: Run, params: PyTree) -> float:
    """Operations of a forward pass, of empty capacity too."""
    return grow_cost.forward_flops(now.network.loss, params, _example(now))


def _is_due(schedule: archscale.contrib.GrowthSchedule, now: Run) -> bool:
    done = len(now.edits)
    return done < schedule.growths and now.step == schedule.interval * (done + 1)


def _result(now: Run, trial: Trial) -> dict[str, Any]:
    return {
        "neurons": archscale.contrib.count_neurons(now.params, now.groups),
        "parameters": archscale.contrib.count_parameters(now.params, now.groups),
        "flops": now.flops,
        "growth_flops": now.growth_flops,
        "last_step_flops": 3
        * trial["batch_size"]
        * _flops(now, archscale.contrib.compact(now.params, now.groups)),
        "curve": now.curve,
        "edits": [dataclasses.asdict(edit) for edit in now.edits],
        "accuracy": now.curve[-1]["accuracy"],
        "train_loss": now.curve[-1]["train_loss"],
    }


def _example(now: Run) -> Any:
    return now.network.dataset.train_images[:1], now.network.dataset.train_labels[:1]


def _batches(dataset: Dataset, trial: Trial, first: int) -> Iterator[Any]:
    """Batches of updates `first` and later; every example once an epoch, held-out ones never."""
    count, size = len(dataset.train_images) - HELD_OUT, trial["batch_size"]
    images, labels = np.asarray(dataset.train_images), np.asarray(dataset.train_labels)
    each = count // size
    order, epoch = np.arange(0), -1
    for step in range(first, trial["steps"]):
        if step // each != epoch:
            epoch = step // each
            order = np.random.default_rng((trial["seed"], epoch)).permutation(count)
        chosen = order[(step % each) * size : (step % each + 1) * size]
        yield images[chosen], labels[chosen]


def _point(now: Run, last: list[jax.Array], examples: int = CURVE_EXAMPLES) -> bool:
    """Adds a point to the curve, of so many test examples; says whether the loss is finite."""
    train_loss = float(np.mean([float(loss) for loss in last])) if last else math.nan
    images = now.network.dataset.test_images[:examples]
    labels = now.network.dataset.test_labels[:examples]
    totals = [
        np.asarray(
            hits(now.network.apply, now.params, images[one : one + 1000], labels[one : one + 1000])
        )
        for one in range(0, len(images), 1000)
    ]
    accuracy, test_loss = np.sum(totals, axis=0) / len(images)
    now.curve.append(
        {
            "step": now.step,
            "parameters": archscale.contrib.count_parameters(now.params, now.groups),
            "flops": now.flops,
            "train_loss": train_loss,
            "accuracy": float(accuracy) if np.isfinite(train_loss) else math.nan,
            "test_loss": float(test_loss),
        }
    )
    return bool(np.isfinite(train_loss) and np.isfinite(test_loss))


def _grow(now: Run, trial: Trial, schedule: archscale.contrib.GrowthSchedule) -> None:
    method, _, moves = GROWING[trial["arm"]]
    network = now.network
    count = len(network.dataset.train_images) - HELD_OUT
    seed = (trial["seed"], len(now.edits), 1)
    chosen = np.random.default_rng(seed).permutation(count)[: trial["statistics"]]
    batches = [(network.dataset.train_images[chosen], network.dataset.train_labels[chosen])]
    held_out = (
        network.dataset.train_images[-HELD_OUT:][: trial["held_out"]],
        network.dataset.train_labels[-HELD_OUT:][: trial["held_out"]],
    )
    neurons = archscale.contrib.count_neurons(now.params, now.groups)
    bottlenecks, flops = None, 0.0
    if schedule.order == "largest":
        readers = [name for one in now.groups for name in one.consumers]
        bottlenecks = archscale.bottleneck(network.loss, now.params, batches, layers=readers)
        flops += grow_cost.bottleneck_flops(network.loss, now.params, batches[0], readers)
    numbers = archscale.contrib.choose_growth(
        schedule, len(now.edits), now.groups, neurons, bottlenecks
    )
    groups = [one for one in now.groups if one.name in numbers]
    flops += grow_cost.growth_flops(
        network.loss, now.params, batches[0], groups, len(AMPLITUDES),
        trial["held_out"],
    )  # fmt: skip
    growth = archscale.grow(
        network.loss,
        now.params,
        batches,
        held_out,
        groups,
        number=numbers,
        budget=schedule.budget,
        method=method,
        normalize=trial["normalize"],
        update=moves,
        capacity=archscale.contrib.geometric(2.0),
        key=jax.random.key(trial["seed"] * 1000 + len(now.edits)),
        optimizer=lambda params: OPTIMIZER,
        optimizer_state=now.optimizer_state,
    )
    now.params, now.optimizer_state = growth.params, growth.optimizer_state
    now.growth_flops += flops
    now.flops += flops
    leaves = named_leaves(now.params)
    now.edits.append(
        archscale.contrib.Edit(
            now.step,
            growth.numbers,
            archscale.contrib.count_neurons(now.params, now.groups),
            {one.name: one.capacity(leaves) for one in now.groups},
            growth.amplitude,
            [*growth.losses],
            growth.predicted,
            {name: one.relative for name, one in growth.bottlenecks.items()},
        )
    )


def _multipliers(now: Run, start: PyTree, trial: Trial) -> dict[str, float]:
    """By what the rate of every leaf is multiplied."""
    network = now.network
    _, rule, _ = GROWING.get(trial["arm"], (None, "none", False))
    names = list(named_leaves(now.params))
    if rule == "none" or jax.tree.all(jax.tree.map(lambda a, b: a is b, start, now.params)):
        return dict.fromkeys(names, 1.0)
    if rule == "width":
        grown, small = (
            archscale.contrib.grown_architecture(network.loss, one, _example(now), now.groups)
            for one in (now.params, start)
        )
        return archscale.learning_rate_multipliers(grown, small, width_rule="sgd")
    batch = (network.dataset.train_images[:256], network.dataset.train_labels[:256])
    size, size_at_start = (network.measure(one, batch) for one in (now.params, start))
    return dict.fromkeys(names, archscale.predict_learning_rate(size, size_at_start, 1.0))


def _save(folder: pathlib.Path, trial: Trial, now: Run) -> None:
    """Saves a run after a growth."""
    log = {
        "edits": [dataclasses.asdict(edit) for edit in now.edits],
        "curve": now.curve,
        "flops": now.flops,
        "growth_flops": now.growth_flops,
    }
    tree = {"params": now.params, "optimizer_state": now.optimizer_state}
    checkpoints.save_checkpoint(folder, now.step, tree, trial, log=log)


def _restored(folder: pathlib.Path, trial: Trial, fresh: Run) -> Run | None:
    def like(log: Any) -> PyTree:
        capacity = log["edits"][-1]["capacity"]
        params, state = archscale.contrib.widen(
            fresh.params, capacity, fresh.groups, optimizer_state=fresh.optimizer_state
        )
        return {"params": params, "optimizer_state": state}

    found = checkpoints.restore_checkpoint(folder, like, trial)
    if found is None:
        return None
    log = found.log | {"edits": [archscale.contrib.Edit(**edit) for edit in found.log["edits"]]}
    return dataclasses.replace(fresh, step=found.step, **found.tree, **log)
