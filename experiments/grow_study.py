"""Growing networks: what one trial of the study trains, and how it goes on after a kill."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from experiments import grow_cost, transfer_study
from experiments.grow_networks import NETWORKS
from experiments.lab import checkpoints, files
from experiments.lab.datasets import Dataset
from experiments.lab.sweeps import trial_hash

Trial = Mapping[str, Any]

METHODS = {
    "tiny": ("tiny", "none", False),
    "tiny_update": ("tiny", "none", True),
    "tiny_width": ("tiny", "width", False),
    "tiny_measured": ("tiny", "measured", False),
    "gradmax": ("gradmax", "none", False),
    "random": ("random", "none", False),
}
"""Arms that grow: their method, how the learning rate follows the architecture, and whether the
layers that read new neurons move by their best update."""
ARMS = (*METHODS, "large", "scratch")
INITIALIZATION = {
    "mlp": "target_in_degree",
    "dag_cnn": "target_in_degree",
    "resnet18": "second_moment",
}
HELD_OUT = 1000
"""Training examples that amplitudes are chosen on, and nothing is trained on."""
MOMENTUM = 0.9
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
    "arms": ("tiny", "tiny_update", "tiny_width", "gradmax", "random", "large", "scratch"),
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
        "schedule": {"order": "round_robin", "growths": 12, "every": 80, "factor": 2.0},
    },
    "dag_cnn": {
        "network": "dag_cnn",
        "downscale": 2,
        "start_width": 2,
        "large_width": 16,
        "steps": 800,
        "rates": (0.03, 0.06),
        "arms": ("tiny", "tiny_update", "tiny_width", "gradmax", "random", "large", "scratch"),
        "statistics": 512,
        "held_out": 500,
        "schedule": {"order": "round_robin", "growths": 8, "every": 60, "factor": 2.0},
    },
    "resnet18_sixteenth": {
        **_RESNET,
        "start_width": 1,
        "schedule": {"order": "all", "growths": 3, "every": 60, "factor": 2.0},
    },
    "resnet18_quarter": {
        **_RESNET,
        "start_width": 4,
        "arms": ("tiny", "tiny_width", "random", "scratch"),
        "schedule": {"order": "all", "growths": 1, "every": 60, "factor": 2.0},
    },
}
"""What grows: from which width, by which schedule, by which arms (all where none are named), and
the width of the large network."""
SPECS["mlp_largest"] = {
    **SPECS["mlp"],
    "schedule": {**SPECS["mlp"]["schedule"], "order": "largest"},
    "arms": ("tiny", "scratch"),
}


class Problem(NamedTuple):
    """A network of any width on a data set."""

    dataset: Dataset
    create: Callable[[int, int], PyTree]  # from width and seed to params, drawn by our rule
    draw: Callable[[PyTree, int], PyTree]  # params of the same shapes
    loss: Callable[[PyTree, Any], jax.Array]
    hits: Callable[[PyTree, Any, Any], jax.Array]  # right answers and summed loss, jitted
    step: Callable[..., tuple[PyTree, Any, jax.Array]]  # one update, jitted
    size: Callable[[PyTree, Any], archscale.tuning.UpdateSize]  # of one update, jitted
    units: tuple[archscale.contrib.Units, ...]


@functools.lru_cache(maxsize=2)
def build(name: str, dataset: str, data_dir: str | None, downscale: int) -> Problem:
    """Builds a problem once: trials that share it compile nothing anew."""
    data = transfer_study.load(dataset, data_dir, downscale)
    height, side, channels = data.train_images.shape[1:]
    optimizer = create_optimizer()

    def split(width: int):
        make = NETWORKS[name]
        return nnx.split(make((height, side, channels), width, data.num_classes, rngs=nnx.Rngs(0)))

    graphdef, template = split(2)

    def logits(params: PyTree, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(images)

    def losses(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)

    def loss(params: PyTree, batch: Any) -> jax.Array:
        return jnp.mean(losses(params, *batch))

    @jax.jit
    def hits(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        right = jnp.argmax(logits(params, images), axis=-1) == labels
        return jnp.stack([jnp.sum(right), jnp.sum(losses(params, images, labels))])

    @jax.jit
    def step(params: PyTree, state: Any, batch: Any, rates: dict[str, jax.Array]):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        updates = map_with_names(lambda name, update: rates[name] * update, updates)
        return optax.apply_updates(params, updates), state, value

    def features(params: PyTree, batch: Any) -> dict[int, jax.Array]:
        return archscale.vertex_features(logits, params, batch[0])

    @jax.jit
    def size(params: PyTree, batch: Any) -> archscale.tuning.UpdateSize:
        return archscale.measure_update(features, loss, params, batch, optax.sgd(1.0))

    images = jax.ShapeDtypeStruct((2, height, side, channels), jnp.float32)

    def draw(params: PyTree, seed: int) -> PyTree:
        architecture = archscale.trace(logits, params, images)
        key = jax.random.key(seed)
        return archscale.initialize(key, params, architecture, INITIALIZATION[name])

    batch = data.train_images[:2], data.train_labels[:2]
    units = tuple(
        one for one in archscale.contrib.find_units(loss, template, batch) if not one.obstacle
    )

    def create(width: int, seed: int) -> PyTree:
        return draw(split(width)[1], seed)

    return Problem(data, create, draw, loss, hits, step, size, units)


def chosen_specs(networks, arms, settings: Trial) -> dict[str, dict[str, Any]]:
    """Returns the specs of networks, with what the settings change in them.

    Raises:
      ValueError: an unknown network or arm, growths after the last update, or a start that is
        wider than the large network.
    """
    for what, names, known in (("network", networks, SPECS), ("arm", arms, ARMS)):
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
        for key in ("growths", "every"):
            if settings[key] is not None:
                spec["schedule"][key] = settings[key]
        if settings["rate"] is not None:
            spec["rates"] = tuple(float(rate) for rate in settings["rate"])
        _check_spec(spec)
        found[name] = spec
    return found


def _check_spec(spec: Mapping[str, Any]) -> None:
    growths, every = spec["schedule"]["growths"], spec["schedule"]["every"]
    if growths * every >= spec["steps"]:
        raise ValueError(
            f"--growths={growths} growths, one --every={every} updates, need --steps above "
            f"{growths * every}, found {spec['steps']}"
        )
    if spec["start_width"] > spec["large_width"]:
        raise ValueError(
            f"--start_width={spec['start_width']} exceeds --large_width={spec['large_width']}"
        )


def all_trials(specs: Mapping[str, Mapping[str, Any]], arms, settings: Trial) -> list[dict]:
    """Returns the trials whose settings are known in advance: all but those of `scratch`.

    Args:
      specs: of networks, as in `SPECS`, by name.
      arms: names of arms.
      settings: num_seeds, and what all trials have in common.
    """
    common = {name: settings[name] for name in ("dataset", "batch_size", "normalize")}
    trials = []
    for name, spec in specs.items():
        plain = {
            key: value for key, value in spec.items() if key not in ("rates", "schedule", "arms")
        }
        for arm in arms:
            if arm == "scratch" or arm not in spec.get("arms", ARMS):
                continue
            grows = {"schedule": dict(spec["schedule"])} if arm in METHODS else {}
            trials += [
                {"spec": name, "arm": arm, "rate": rate, "seed": seed, **plain, **grows, **common}
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


def create_optimizer() -> optax.GradientTransformation:
    """SGD with momentum at rate 1; rates are arguments of a step, so that they compile nothing."""
    return optax.sgd(1.0, momentum=MOMENTUM)


@dataclasses.dataclass
class Run:
    """Where a run is; all of it is saved at growths.

    Attributes:
      step: updates so far.
      params: the network.
      optimizer_state: its optimizer's.
      flops: floating-point operations so far, of which `growth_flops` for growing.
      edits: the log of growths.
      curve: points over time.
    """

    step: int
    params: PyTree
    optimizer_state: Any
    flops: float = 0.0
    growth_flops: float = 0.0
    edits: list[archscale.contrib.Edit] = dataclasses.field(default_factory=list)
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)


def run(trial: Trial, data_dir: str | None = None, partial: pathlib.Path | None = None) -> dict:
    """Trains one network, growing or not; JSON values.

    Args:
      trial: settings.
      data_dir: folder of the data set.
      partial: folder in which trials that grow leave their state at every growth.
    """
    problem = build(trial["network"], trial["dataset"], data_dir, trial["downscale"])
    if trial["arm"] == "large":
        params = problem.create(trial["large_width"], trial["seed"])
    else:
        params = problem.create(trial["start_width"], trial["seed"])
    if trial["arm"] == "scratch":
        wide, _ = archscale.contrib.widen(params, trial["neurons"], problem.units)
        params = problem.draw(wide, trial["seed"])
    folder = None
    if partial is not None and trial["arm"] in METHODS:
        folder = partial / trial_hash(trial)
    found = _train(problem, params, trial, folder)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _train(problem: Problem, start: PyTree, trial: Trial, folder: pathlib.Path | None) -> dict:
    optimizer = create_optimizer()
    schedule = (
        archscale.contrib.GrowthSchedule(**trial["schedule"]) if "schedule" in trial else None
    )
    now = Run(0, start, optimizer.init(start))
    if folder is not None:
        now = _restored(folder, trial, now, problem) or now
    factors = _factors(problem, start, now.params, trial)
    cost = grow_cost.forward_flops(problem.loss, now.params, _example(problem))
    last: list[jax.Array] = []
    for batch in _batches(problem.dataset, trial, now.step):
        if schedule is not None and _is_due(schedule, now):
            if not _point(problem, now, last):
                return _result(problem, now, trial)
            _grow(problem, now, trial, schedule)
            factors = _factors(problem, start, now.params, trial)
            cost = grow_cost.forward_flops(problem.loss, now.params, _example(problem))
            _point(problem, now, last)
            last = []  # a run that goes on from here knows no earlier ones
            if folder is not None:
                _save(folder, trial, now)
        rate = trial["rate"] * min(1.0, (1 - now.step / trial["steps"]) / DECAY)
        rates = {name: np.float32(rate * factor) for name, factor in factors.items()}
        now.params, now.optimizer_state, loss = problem.step(
            now.params, now.optimizer_state, batch, rates
        )
        last = [*last[-49:], loss]
        now.step += 1
        now.flops += 3 * cost * trial["batch_size"]
        if now.step % max(trial["steps"] // POINTS, 1) == 0 and not _point(problem, now, last):
            return _result(problem, now, trial)
    _point(problem, now, last, len(problem.dataset.test_images))
    return _result(problem, now, trial)


def _compact_flops(problem: Problem, params: PyTree) -> float:
    """Operations of a forward pass without empty rooms."""
    return grow_cost.forward_flops(
        problem.loss, archscale.contrib.compact(params, problem.units), _example(problem)
    )


def _is_due(schedule: archscale.contrib.GrowthSchedule, now: Run) -> bool:
    done = len(now.edits)
    return done < schedule.growths and now.step == schedule.every * (done + 1)


def _result(problem: Problem, now: Run, trial: Trial) -> dict[str, Any]:
    return {
        "neurons": archscale.contrib.count_neurons(now.params, problem.units),
        "parameters": archscale.contrib.count_parameters(now.params, problem.units),
        "flops": now.flops,
        "growth_flops": now.growth_flops,
        "last_step_flops": 3 * trial["batch_size"] * _compact_flops(problem, now.params),
        "curve": now.curve,
        "edits": [dataclasses.asdict(edit) for edit in now.edits],
        "accuracy": now.curve[-1]["accuracy"],
        "train_loss": now.curve[-1]["train_loss"],
    }


def _example(problem: Problem) -> Any:
    return problem.dataset.train_images[:1], problem.dataset.train_labels[:1]


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


def _point(
    problem: Problem, now: Run, last: list[jax.Array], examples: int = CURVE_EXAMPLES
) -> bool:
    """Adds a point to the curve, of so many test examples; says whether the loss is finite."""
    train_loss = float(np.mean([float(loss) for loss in last])) if last else math.nan
    images = problem.dataset.test_images[:examples]
    labels = problem.dataset.test_labels[:examples]
    totals = [
        np.asarray(problem.hits(now.params, images[one : one + 1000], labels[one : one + 1000]))
        for one in range(0, len(images), 1000)
    ]
    hits = np.sum(totals, axis=0) / len(images)
    now.curve.append(
        {
            "step": now.step,
            "parameters": archscale.contrib.count_parameters(now.params, problem.units),
            "flops": now.flops,
            "train_loss": train_loss,
            "accuracy": float(hits[0]) if np.isfinite(train_loss) else math.nan,
            "test_loss": float(hits[1]),
        }
    )
    return bool(np.isfinite(train_loss) and np.isfinite(hits[1]))


def _grow(
    problem: Problem, now: Run, trial: Trial, schedule: archscale.contrib.GrowthSchedule
) -> None:
    method, _, update = METHODS[trial["arm"]]
    count = len(problem.dataset.train_images) - HELD_OUT
    seed = (trial["seed"], len(now.edits), 1)
    chosen = np.random.default_rng(seed).permutation(count)[: trial["statistics"]]
    batches = [(problem.dataset.train_images[chosen], problem.dataset.train_labels[chosen])]
    held_out = (
        problem.dataset.train_images[-HELD_OUT:][: trial["held_out"]],
        problem.dataset.train_labels[-HELD_OUT:][: trial["held_out"]],
    )
    neurons = archscale.contrib.count_neurons(now.params, problem.units)
    bottlenecks, flops = None, 0.0
    if schedule.order == "largest":
        readers = [name for one in problem.units for name in one.consumers]
        bottlenecks = archscale.bottleneck(problem.loss, now.params, batches, layers=readers)
        flops += grow_cost.bottleneck_flops(problem.loss, now.params, batches[0], readers)
    numbers = archscale.contrib.choose_growth(
        schedule, len(now.edits), problem.units, neurons, bottlenecks
    )
    units = [one for one in problem.units if one.name in numbers]
    flops += grow_cost.growth_flops(
        problem.loss, now.params, batches[0], units, len(AMPLITUDES),
        trial["held_out"],
    )  # fmt: skip
    growth = archscale.grow(
        problem.loss,
        now.params,
        batches,
        held_out,
        units,
        number=numbers,
        budget=schedule.budget,
        method=method,
        normalize=trial["normalize"],
        update=update,
        rooms=archscale.contrib.geometric(2.0),
        key=jax.random.key(trial["seed"] * 1000 + len(now.edits)),
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
            archscale.contrib.count_neurons(now.params, problem.units),
            {one.name: leaves[one.producers[0]].shape[-1] for one in problem.units},
            growth.amplitude,
            [*growth.losses],
            growth.predicted,
            {name: one.relative for name, one in growth.bottlenecks.items()},
        )
    )


def _factors(problem: Problem, start: PyTree, params: PyTree, trial: Trial) -> dict[str, float]:
    """By what the rate of every leaf is multiplied."""
    _, rule, _ = METHODS.get(trial["arm"], (None, "none", False))
    names = list(named_leaves(params))
    if rule == "none" or jax.tree.all(jax.tree.map(lambda a, b: a is b, start, params)):
        return dict.fromkeys(names, 1.0)
    if rule == "width":
        grown, small = (
            archscale.contrib.grown_architecture(
                problem.loss, one, _example(problem), problem.units
            )
            for one in (params, start)
        )
        return archscale.learning_rate_multipliers(grown, small, width_rule="sgd")
    batch = (problem.dataset.train_images[:256], problem.dataset.train_labels[:256])
    now, then = (problem.size(one, batch) for one in (params, start))
    return dict.fromkeys(names, archscale.predict_learning_rate(now, then, 1.0))


def _save(folder: pathlib.Path, trial: Trial, now: Run) -> None:
    """Saves a run after a growth; the log first, so that it is never shorter than the state."""
    log = {
        "edits": [dataclasses.asdict(edit) for edit in now.edits],
        "curve": now.curve,
        "flops": now.flops,
        "growth_flops": now.growth_flops,
    }
    growth = len(now.edits)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / f"growth_{growth}.json", files.strict_json(log))
    tree = {"params": now.params, "optimizer_state": now.optimizer_state}
    checkpoints.save_checkpoint(folder / f"growth_{growth}", now.step, tree, {**trial}, keep=1)
    shutil.rmtree(folder / f"growth_{growth - 1}", ignore_errors=True)


def _restored(folder: pathlib.Path, trial: Trial, fresh: Run, problem: Problem) -> Run | None:
    logs = sorted(folder.glob("growth_*.json"), key=lambda path: int(path.stem.split("_")[1]))
    for path in logs[::-1]:
        log = json.loads(path.read_text())
        edits = [archscale.contrib.Edit(**edit) for edit in log["edits"]]
        params, state = archscale.contrib.widen(
            fresh.params, edits[-1].rooms, problem.units, optimizer_state=fresh.optimizer_state
        )
        like = {"params": params, "optimizer_state": state}
        found = checkpoints.restore_checkpoint(folder / path.stem, like, {**trial})
        if found is not None:
            step, tree = found
            return Run(step, tree["params"], tree["optimizer_state"], log["flops"],
                       log["growth_flops"], edits, log["curve"])  # fmt: skip
    return None
