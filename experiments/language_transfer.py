"""Do learning rate and weight decay of a small language model serve one that is deeper and wider?

    python -m experiments.language_transfer --workdir=runs/language_transfer

Both are searched at the base, `--base_depth` × `--base_width`, and used under several methods, see
METHODS, at larger sizes, see SIZES. There the rate is searched at the transferred decay, and the
decay at the transferred rate, by factors of 2: how far the best ones lie from the transferred, and
what those give up. With --sizes=target,twice,four it fits laws over size. Writes results.jsonl (a
line a training), language.csv, a figure, table.md and report.html. Killed and started again it goes
on; with --only_finished it shows what there is. Other flags are those of experiments.language.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._trees import PyTree, map_with_names
from experiments import language, language_scaling
from experiments.lab import common, files, page, panels, ranges, runners
from experiments.lab.sweeps import run_study, trial_hash
from experiments.lab.tables import NONE, number
from experiments.language import Parametrized, Trial

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(language)
ranges.define("num_seeds", 3, "Seeds of every point.")
flags.DEFINE_bool("only_finished", False, "Train nothing more; show what is finished.")

SEARCHED = (*language.LISTS, "parametrization", "base_batch_size", "base_steps", "cost_only")
"""Flags of `language` that say what the study decides."""
TARGET = {"depth": 8, "width": 128}
RATE, DECAY = 2**-7, 0.1
"""Where searches begin."""
RATIO = 4
"""Of batch, and of updates."""

FEW_SEEDS = 2
"""Of every point beside the transferred one."""

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


def run() -> None:
    """Searches what is missing, prints and draws."""
    if given := [name for name in SEARCHED if FLAGS[name].present]:
        raise ValueError(f"--{given[0]} has no effect here: this study sets it itself, see --help")
    settings = language.resolved(**TARGET)
    del settings["parametrization"], settings["base_batch_size"], settings["base_steps"]
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        study = Study(settings, workdir / "results.jsonl", options)
        if not study.run():
            print("not finished; what is shown is of the trainings that are")
    study.frame().to_csv(workdir / "language.csv", index=False, float_format="%.6g")
    figure = workdir / "language_transfer.png"
    draw(study, figure)
    measured, laws = size_tables(study)
    page.publish(
        workdir,
        f"{language.title(settings)}, tuned at {settings['base_depth']} × {settings['base_width']}",
        __doc__,
        tables={
            "Best rate and decay at the base, by search.": base_table(study),
            "At other sizes: the loss at the base's values; how many nats the best rate or decay "
            "lies beside the base's, the other kept; its loss, and what the base's value gives up "
            "(± standard error over seeds, of percentages seed by seed).": target_table(study),
            "Over size: where the best rate lies, and what one nat beside it costs.": measured,
            "Laws over parameters N: the best rate N^b and the nats that it leaves, what a nat "
            "costs N^κ, and the lowest loss E + A·N^(-a).": laws,
        },
        figures={figure: "Held-out loss over the learning rate in units of the base's best."},
    )


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


class UnfinishedError(Exception):
    """A training is missing, and none is to be run."""


class Study:
    """The trainings of a study, by method, size and point; run as they are asked for.

    Attributes:
      best: base's best point by method.
      losses: by method and size.
    """

    def __init__(self, settings: Trial, journal: pathlib.Path, options: Mapping[str, Any]) -> None:
        self._settings, self._journal, self._options = settings, journal, options
        self._records = {one["hash"]: one for one in files.read_records(journal)}
        self.best: dict[str, Point] = {}
        self.losses: dict[tuple[str, str], Losses] = {}

    def run(self) -> bool:
        """Runs all, what matters most first; returns whether all is finished."""
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
        else:
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
            raise UnfinishedError

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
            trial, result = one["trial"], one.get("result")
            names = ("method", "size", "depth", "width", "batch_size", "steps", *language.LISTS)
            row = {name: trial[name] for name in names}
            if result is not None:
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
    most: int = 5,
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


# What they say.


class Found(NamedTuple):
    """What a line of points says.

    Attributes:
      drift: nats from the start to the best point, by a parabola through three, one a seed.
      best: the lowest mean loss's point.
      cost: what one nat beside the best costs by the same parabola, over the loss, one a seed.
    """

    drift: np.ndarray
    best: Point
    cost: np.ndarray


def vertex(losses: Losses, start: Point, direction: Point) -> Found | None:
    """Finds the best point of a line; None where its neighbours were not measured."""
    steps = line_of(losses, start, direction)
    best = lowest_of(steps) if steps else 0
    if not {best - 1, best, best + 1} <= steps.keys():
        return None
    low, middle, high = common_seeds({one: steps[best + one] for one in (-1, 0, 1)}).values()
    with np.errstate(invalid="ignore"):
        moved = (low - high) / (2 * (low - 2 * middle + high))
        cost = (low - 2 * middle + high) / (2 * math.log(2) ** 2 * middle)
    moved = np.where(np.isfinite(moved), np.clip(moved, -1, 1), 0.0)
    return Found((best + moved) * math.log(2), shift(start, direction, best), cost)


def error(values: Iterable[float]) -> float:
    """Standard error of a mean."""
    values = np.asarray(list(values))
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def drift(study: Study, method: str, size: str, direction: Point) -> tuple[float, float]:
    """Returns the nats from the base's best value to the target's, and the standard error."""
    base = METHODS[method].base
    start = study.best[base]
    ends = [
        vertex(study.losses.get(key, {}), start, direction)
        for key in ((method, size), (base, "base"))
    ]
    if direction not in (RATES, DECAYS):  # along which the base was not searched
        ends[1] = vertex(study.losses[base, "base"], start, RATES)
    if ends[0] is None or ends[1] is None:
        return math.nan, math.nan
    target, origin = (one.drift for one in ends if one is not None)
    return float(target.mean() - origin.mean()), math.hypot(error(target), error(origin))


def base_table(study: Study) -> pd.DataFrame:
    rows = []
    for method, best in study.best.items():
        losses = study.losses[method, "base"][best]
        rows.append(
            {
                "base": METHODS[method].label,
                "rate": f"{RATE * 2.0 ** best[0]:.4g}",
                "decay": f"{DECAY * 2.0 ** best[1]:.4g}",
                "loss": _mean(losses, ".4f"),
                "points": str(len(study.losses[method, "base"])),
            }
        )
    return pd.DataFrame(rows)


def target_table(study: Study) -> pd.DataFrame:
    """Returns a row for every method, size and direction of search."""
    rows = []
    for size, described in SIZES.items():
        for method, of in METHODS.items():
            losses = study.losses.get((method, size), {})
            start = study.best[of.base]
            if start not in losses:
                continue
            lines = {
                name: line
                for name, direction in (("rate", of.direction), ("decay", DECAYS))
                if len(line := line_of(losses, start, direction)) > 1
            }
            for name, line in (lines or {NONE: {0: losses[start]}}).items():
                direction = DECAYS if name == "decay" else of.direction
                row = {"method": of.label, "size": described, "searched": name}
                row |= {"transferred": _mean(losses[start], ".4f")}
                ours = study.losses.get(("plan", size), {}).get(study.best["plan"])
                row |= {"over parametrize, %": _percent(losses[start], ours)}
                best = line[lowest_of(line)]
                found = [_plus_minus(*drift(study, method, size, direction)), _mean(best, ".4f"),
                         _percent(losses[start], best)]  # fmt: skip
                names = ("best: nats", "its loss", "given up, %")
                rows.append(
                    row | dict(zip(names, found if name in lines else NOTHING, strict=True))
                )
    return pd.DataFrame(rows)


def size_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns what was found at base, sizes between and target, and the laws that fit it."""
    rows, laws = [], []
    lowest: dict[str, dict[float, Sequence[float]]] = {}
    for method in ("plan", "standard"):
        start = study.best[method]
        found: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        for size in ("base", *GROWN, "target"):
            losses = study.losses.get((method, size), {})
            if (bottom := vertex(losses, start, RATES)) is None:
                continue
            trial = study.trial(method, size, start, 0)
            count = language.parameters(trial)
            found[count] = bottom.drift, bottom.cost
            lowest.setdefault(method, {})[count] = best = losses[bottom.best]
            ours = lowest.get("plan", {}).get(count)
            rows.append(
                {"method": METHODS[method].label, "size": f"{trial['depth']} × {trial['width']}"}
                | {"parameters": f"{count:.3g}"}
                | {"best: nats": _mean(bottom.drift, ".2f")}
                | {"a nat costs, %": _mean(100 * bottom.cost, ".1f")}
                | {"loss at the base's values": _mean(losses[start], ".3f")}
                | {"lowest": _mean(best, ".3f"), "over parametrize, %": _percent(best, ours)}
            )
        if len(found) > 2:
            laws.append({"method": METHODS[method].label} | _laws(found, lowest[method]))
    return pd.DataFrame(rows), pd.DataFrame(laws)


def _laws(
    found: Mapping[float, tuple[np.ndarray, np.ndarray]], lowest: Mapping[float, Sequence[float]]
) -> dict[str, str]:
    """Returns the laws over size of best rates, of what a nat costs, and of lowest losses."""
    drifts, costs = (np.stack(list(common_seeds(dict(enumerate(one))).values()))
                     for one in zip(*found.values(), strict=True))  # fmt: skip
    rate = language_scaling.power_law(list(found), drifts)
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = language_scaling.power_law(list(found), np.log(costs))
    row = {"b": _mean(rate.exponent, ".2f"), "left, nats": f"{rate.residual:.2f}"}
    row |= {"κ": _mean(cost.exponent, ".2f")}
    law = language_scaling.saturation(
        list(lowest), [float(np.mean(one)) for one in lowest.values()]
    )
    if law is not None:
        row |= {"E": f"{law.limit:.2f}", "a": f"{law.exponent:.2f}"}
        row |= {"left, nats of loss": f"{law.residual:.3f}"}
    return row


NOTHING = (NONE,) * 3
"""Where a method was not searched."""


def line_of(losses: Losses, start: Point, direction: Point) -> dict[int, list[float]]:
    """Returns the losses of a line by steps from its start."""
    points = {step: shift(start, direction, step) for step in range(-9, 10)}
    return {step: losses[point] for step, point in points.items() if point in losses}


def _percent(losses: Sequence[float], others: Sequence[float] | None) -> str:
    """By how much losses exceed others, seed by seed, with the standard error."""
    if others is None:
        return NONE
    one, other = common_seeds({0: losses, 1: others}).values()
    excess = 100 * (one / other - 1)
    return _plus_minus(excess.mean(), error(excess))


def _mean(values: npt.ArrayLike, spec: str) -> str:
    values = np.asarray(values, float)
    return _plus_minus(values.mean(), error(values), spec)


def _plus_minus(value: Any, margin: float, spec: str = ".2f") -> str:
    shown = number(float(value), spec)
    return shown if not math.isfinite(margin) else f"{shown} ± {margin:{spec}}"


def draw(study: Study, path: pathlib.Path) -> None:
    """Draws losses over the rate at base and target, standard beside ours, on shared axes."""
    settings = study._settings
    sizes = {
        "base": f"{settings['base_depth']} blocks, width {settings['base_width']}",
        "target": f"{settings['depth']} blocks, width {settings['width']}",
    }
    titles = {"standard": "optax.adamw", "plan": "archscale.parametrize"}
    figure, drawn = panels.create_panels(2, 3.0, width=3.4, columns=2, sharex=True, sharey=True)
    for panel, (method, title) in zip(drawn, titles.items(), strict=True):
        panel.set_title(title, fontsize=9)
        panel.axvline(1.0, color=panels.GREY, lw=1, ls=":", label="the base's best")
        if method not in study.best:
            continue
        start = study.best[method]
        for (size, label), colour in zip(sizes.items(), panels.COLOURS, strict=False):
            steps = common_seeds(line_of(study.losses.get((method, size), {}), start, RATES))
            values = steps.values()
            across = [2.0**one for one in steps]
            panel.plot(across, [np.mean(one) for one in values], "o-", ms=4, lw=1.4,
                       color=colour, label=label)  # fmt: skip
            for x, one in zip(across, values, strict=True):
                panel.plot([x] * len(one), one, ".", ms=3, color=colour, alpha=0.5)
        panel.set_xscale("log", base=2)
    panels.finish(
        figure,
        path,
        across="learning rate over the base's best",
        up="held-out loss (nats a byte)",
        columns=3,
    )


if __name__ == "__main__":
    FLAGS.set_default("workdir", "runs/language_transfer")
    common.run_binary(run)
