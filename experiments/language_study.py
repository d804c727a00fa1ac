"""What experiments.language_transfer trains: methods, sizes, and the search for best values."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._trees import PyTree, map_with_names
from experiments import language
from experiments.lab import files, ranges, runners
from experiments.lab.sweeps import run_study, trial_hash
from experiments.language import Parametrized, Trial

FLAGS = flags.FLAGS
ranges.define("num_seeds", 3, "Seeds of every point.")
flags.DEFINE_bool("only_finished", False, "Train nothing more; show what is finished.")

RATE, DECAY = 2**-7, 0.1
"""Where searches begin."""
RATIO = 4
"""Of batch, and of updates."""

FEW_SEEDS = 2
"""Of every point beside the transferred one."""
MOST = 5
"""Steps from the transferred point to the last that is searched."""

GROWN = {"twice": 2, "four": 4}
"""Sizes between base and target, as multiples of the base's depth and width."""
SIZES = {
    "target": "deep and wide",
    **{name: f"base × {ratio}" for name, ratio in GROWN.items()},
    "wide": "wide",
    "deep": "deep",
    "batch": f"batch × {RATIO}, updates ÷ {RATIO}",
    "updates": f"updates × {RATIO}",
}
"""Sizes at which the base's values are used; the last two are the base's network."""
USUAL = tuple(name for name in SIZES if name not in GROWN)

Point = tuple[int, int]
"""Rate and decay as powers of 2 beside `RATE` and `DECAY`."""
RATES, DECAYS = (1, 0), (0, 1)
"""Directions in which points are searched."""
LINES = {"rate": RATES, "decay": DECAYS}
Losses = dict[Point, list[float]]
"""Held-out losses of seeds 0, 1, … by point, infinite where one diverged."""


class Method(NamedTuple):
    """A way to train at the target what was tuned at the base.

    Attributes:
      label: in tables.
      base: method under which the base was tuned.
      direction: of the search for the best rate, as a step of `Point`.
    """

    label: str
    base: str
    direction: Point = RATES


METHODS = {
    "standard": Method("optax defaults", "standard"),
    "plan": Method("parametrize", "plan"),
    "embedding": Method("optax defaults, embedding's rate × width", "standard"),
    "decay_before": Method("parametrize, decay × the rate's multipliers", "plan"),
    "decay_root": Method("parametrize, decay ∝ √width", "plan"),
    "half": Method("parametrize, α = ½", "plan"),
    "warmup": Method("optax defaults, warm-up × width", "standard"),
    "independent": Method("optax defaults, decay independent of the rate", "standard", (1, -1)),
    "sde": Method("parametrize, SDE rule", "plan"),
}

ranges.define_list("sizes", USUAL, "Sizes beside the base.", ranges.name_of("size", SIZES))
ranges.define_list("methods", list(METHODS), "Methods.", ranges.name_of("method", METHODS))
ranges.define_list("searches", list(LINES), "What is searched at them.",
                   ranges.name_of("search", LINES))  # fmt: skip


# What is trained, in order.


STAGES: tuple[tuple[str, str, Point | None], ...] = (
    ("standard", "target", None),
    ("plan", "target", None),
    ("plan", "target", RATES),
    ("standard", "target", RATES),
    *((method, size, RATES) for size in GROWN for method in ("plan", "standard")),
    ("embedding", "wide", None),
    ("decay_before", "wide", None),
    ("decay_root", "wide", None),
    ("plan", "wide", RATES),
    ("standard", "wide", RATES),
    ("embedding", "wide", RATES),
    ("plan", "deep", RATES),
    ("standard", "deep", RATES),
    ("half", "deep", RATES),
    ("plan", "batch", RATES),
    ("sde", "batch", RATES),
    ("plan", "wide", DECAYS),
    ("standard", "base", RATES),
    ("plan", "base", RATES),
    ("warmup", "wide", None),
    ("standard", "wide", DECAYS),
    ("plan", "updates", RATES),
    ("sde", "updates", RATES),
    ("decay_before", "wide", RATES),
    ("independent", "wide", (1, -1)),
    ("embedding", "target", None),
    ("decay_before", "target", None),
    ("half", "target", None),
    ("decay_root", "target", None),
    ("warmup", "target", None),
    ("plan", "target", DECAYS),
    ("standard", "target", DECAYS),
    ("half", "target", RATES),
    ("embedding", "target", RATES),
)
"""Method, size, and the direction in which is searched, none for the transferred values alone; what
matters most first."""


def chosen() -> list[tuple[str, str, Point | None]]:
    """Returns the stages that --methods, --sizes and --searches name."""
    searches = [None, *(LINES[name] for name in FLAGS.searches)]
    if RATES in searches:  # along which η·λ is kept
        searches.append((1, -1))
    return [
        stage
        for stage in STAGES
        if stage[0] in FLAGS.methods and stage[1] in ("base", *FLAGS.sizes) and stage[2] in searches
    ]


class UnfinishedError(ValueError):
    """A training is missing, and none is to be run."""


class Study:
    """The trainings of a study, by method, size and point; run as they are asked for.

    Attributes:
      best: base's best point by method.
      losses: by method and size.
    """

    def __init__(self, settings: Trial, journal: pathlib.Path, options: Mapping[str, Any]) -> None:
        self._settings, self._journal, self._options = settings, journal, options
        found = files.read_records(journal)
        self._records = {one["hash"]: one for one in found if "result" in one}
        self.best: dict[str, Point] = {}
        self.losses: dict[tuple[str, str], Losses] = {}

    def run(self) -> bool:
        """Runs all, what matters most first; returns whether all is finished.

        Raises:
          UnfinishedError: trainings of the base are missing, without which nothing can be shown.
        """
        for method in ("standard", "plan"):
            measure = functools.partial(self.measure, method, "base")
            self.best[method] = descend(measure, self.losses.setdefault((method, "base"), {}))
        finished = True
        for method, size, direction in chosen():
            try:
                if direction is None:
                    self.at_transferred(method, size)
                else:
                    self.along(method, size, direction)
            except UnfinishedError:
                finished = False
        return finished

    def at_transferred(self, method: str, size: str) -> None:
        """Measures all seeds at the transferred values."""
        self.measure(method, size, [self.best[METHODS[method].base]])

    def along(self, method: str, size: str, direction: Point) -> None:
        """Measures points on both sides of the transferred one until the best lies between."""
        self.at_transferred(method, size)
        measure = functools.partial(
            self.measure, method, size, seeds=min(FEW_SEEDS, FLAGS.num_seeds)
        )
        start, found = self.best[METHODS[method].base], self.losses[method, size]
        if size == "base":  # for the figure
            line = [shift(start, direction, step) for step in range(-3, 4)]
            measure([point for point in line if point not in found])
            return
        if FLAGS.only_finished:  # points of a search that was cut off
            for point in (shift(start, direction, step) for step in range(-MOST, MOST + 1)):
                with contextlib.suppress(UnfinishedError):
                    measure([point] if point not in found else [])
        bracket(measure, found, start, direction)

    def measure(
        self, method: str, size: str, points: Sequence[Point], *, seeds: int | None = None
    ) -> None:
        """Trains seeds at points, all by default; see `losses`."""
        number_of_seeds = FLAGS.num_seeds if seeds is None else seeds
        trials = {
            point: [self.trial(method, size, point, seed) for seed in range(number_of_seeds)]
            for point in points
        }
        missing = [
            one
            for of_point in trials.values()
            for one in of_point
            if trial_hash(one) not in self._records
        ]
        if missing and not FLAGS.only_finished:
            name = f"{method} at {size}"
            run = functools.partial(train, rematerialize=FLAGS.rematerialize)
            found = run_study(missing, run, self._journal, description=name, **self._options)
            runners.check_finished(found, self._journal)
            self._records |= {one["hash"]: one for one in found}
        of_size = self.losses.setdefault((method, size), {})
        for point, of_point in trials.items():
            done = [self._records.get(trial_hash(one)) for one in of_point]
            if None not in done:
                of_size[point] = [_loss(one) for one in done if one is not None]
        if any(point not in of_size for point in points):
            raise UnfinishedError(
                f"{self._journal} lacks {len(missing)} of the {number_of_seeds * len(points)} "
                f"trainings that the search of {method} at {size} needs next; run the same command "
                "without --only_finished"
            )

    def trial(self, method: str, size: str, point: Point, seed: int) -> dict[str, Any]:
        """Returns the settings of a training."""
        settings = dict(self._settings)
        ratio = GROWN.get(size, 1)
        if size not in ("target", "deep"):
            settings["depth"] = ratio * settings["base_depth"]
        if size not in ("target", "wide"):
            settings["width"] = ratio * settings["base_width"]
        base = {"base_batch_size": settings["batch_size"], "base_steps": settings["steps"]}
        if size == "batch":
            settings["batch_size"] *= RATIO
            settings["steps"] //= RATIO
        if size == "updates":
            settings["steps"] *= RATIO
        if method != "sde":  # nothing is known of batch and duration
            base = {"base_batch_size": settings["batch_size"], "base_steps": settings["steps"]}
        if method == "warmup":
            settings["warmup"] *= settings["width"] / settings["base_width"]
        named = {"method": "standard" if method == "independent" else method, "size": size}
        rate, decay = RATE * 2.0 ** point[0], DECAY * 2.0 ** point[1]
        return settings | base | named | {"rate": rate, "weight_decay": decay, "seed": seed}

    def frame(self) -> pd.DataFrame:
        """Returns a row for every training of the journal."""
        rows = []
        for one in self._records.values():
            trial, result = one["trial"], one["result"]
            names = ("method", "size", "depth", "width", "batch_size", "steps", *language.LISTS)
            row = {name: trial[name] for name in names}
            row |= {"training": result["losses"][-1], "held_out": result["validation"][-1]}
            rows.append(row)
        return pd.DataFrame(rows)


def _loss(record: Mapping[str, Any]) -> float:
    found = record["result"]["validation"][-1]
    return math.inf if found is None else found


def shift(point: Point, direction: Point, step: int) -> Point:
    return point[0] + step * direction[0], point[1] + step * direction[1]


def common_seeds(losses: Mapping[Any, Sequence[float]]) -> dict[Any, np.ndarray]:
    """Returns the losses of the seeds that all have."""
    seeds = min(map(len, losses.values()), default=0)
    return {key: np.asarray(one[:seeds]) for key, one in losses.items()}


def lowest_of(losses: Mapping[Any, Sequence[float]]) -> Any:
    """Returns the key of the lowest mean."""
    means = {key: float(np.mean(one)) for key, one in common_seeds(losses).items()}
    return min(means, key=means.__getitem__)


def descend(
    measure: Callable[[Sequence[Point]], None], losses: Losses, start: Point = (0, 0)
) -> Point:
    """Returns the best point: better than its four neighbours."""
    best = start
    while True:
        around = [shift(best, axis, step) for axis in (RATES, DECAYS) for step in (-1, 1)]
        measure([point for point in (best, *around) if point not in losses])
        lowest = lowest_of({point: losses[point] for point in (best, *around)})
        if lowest == best:
            return best
        best = lowest


def bracket(
    measure: Callable[[Sequence[Point]], None],
    losses: Losses,
    start: Point,
    direction: Point,
    most: int = MOST,
) -> None:
    """Measures steps from a point until the best has worse neighbours on both sides."""
    low, high = -1, 1
    while True:
        line = [shift(start, direction, step) for step in range(low, high + 1)]
        measure([point for point in line if point not in losses])
        best = line.index(lowest_of({point: losses[point] for point in line}))
        if 0 < best < len(line) - 1 or max(-low, high) == most:
            return
        low, high = low - (best == 0), high + (best > 0)


# Methods.


def train(trial: Trial, *, rematerialize: bool = False) -> dict[str, Any]:
    return language.train(trial, parametrize=parametrized, rematerialize=rematerialize)


def parametrized(trial: Trial) -> Parametrized:
    """Returns how the decoder of a trial is trained under its method."""
    method = trial["method"]
    if METHODS[method].base == "standard":
        how = language.standard(trial)
        if method != "embedding":
            return how
        ratio = trial["width"] / trial["base_width"]
        return how._replace(optimizer=with_embedding_rate(how.optimizer, ratio))
    plan = language.plan_of(trial, depth_exponent=0.5 if method == "half" else None)
    if method in ("decay_before", "decay_root"):
        width = trial["width"] / trial["base_width"]
        return Parametrized(plan.init, plan.apply, with_decay(plan, method, width))
    return Parametrized(plan.init, plan.apply, plan.optimizer)


def with_embedding_rate(make: Callable[..., Any], ratio: float) -> Callable[..., Any]:
    """Multiplies the rate of the embedding, and so its decay, by a ratio."""

    def optimizer(rate: Any, decay: Any) -> optax.GradientTransformation:
        def update(updates: PyTree, state: Any, params: Any = None):
            del params
            return map_with_names(
                lambda name, leaf: leaf * ratio if "table" in name else leaf, updates
            ), state

        scale = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
        return optax.chain(make(rate, decay), scale)

    return optimizer


def decay_multipliers(plan: archscale.Parametrization, method: str, width: float) -> PyTree:
    """Returns what decays are multiplied by instead of the plan's multipliers.

    `decay_before`: 1, as `optax.adamw` in front of the multipliers of the rate has it.
    `decay_root`: those of the plan, whose part of the width is the square root.
    """
    if method == "decay_before":
        return jax.tree.map(lambda own: float(own > 0), plan.weight_decay)
    return jax.tree.map(lambda own: own / width**0.5 if own > 1 else own, plan.weight_decay)


def with_decay(plan: archscale.Parametrization, method: str, width: float) -> Callable[..., Any]:
    """The optimizer of a plan with other multipliers of the decay."""
    multipliers = decay_multipliers(plan, method, width)

    def optimizer(rate: Any, decay: Any) -> optax.GradientTransformation:
        def update(updates: PyTree, step: Any, params: Any = None):
            share = rate(step) * decay
            decayed = jax.tree.map(
                lambda one, weight, own, lr: one - share * lr * own * weight,
                *(updates, params, multipliers, plan.learning_rate),
            )
            return decayed, step + 1

        late = optax.GradientTransformation(lambda params: jax.numpy.int32(0), update)
        return optax.chain(plan.optimizer(rate), late)

    return optimizer
