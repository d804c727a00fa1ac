"""Coordinate checks: do updates change networks of all widths and depths alike?

    python -m experiments.coordinate --family=mlp,transformer --axis=width

Trains every network for a few steps and measures the change of all its vertices: with the standard
parametrization (Flax's initialization, one rate), with the closed forms of this library, and with
the rate that a measurement predicts. Writes config.json, results.jsonl, a figure for each axis,
table.md and report.html, and prints the answer. Killed and started again it goes on with the
networks that are missing. The defaults are the run of the docs; it takes about a quarter of an hour
on two cores.
"""

import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax.tuning import _coordinate as coordinate
from experiments.lab import (
    common,
    families,
    networks,
    page,
    panels,
    ranges,
    runners,
    studies,
    tables,
)
from experiments.lab.data_flags import define_data_flags
from experiments.lab.datasets import Dataset
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS

AXES = ("width", "depth")

ranges.define_list(
    "family",
    list(families.FAMILIES),
    "Families of networks.",
    ranges.name_of("family", families.FAMILIES),
)
ranges.define_list("axis", list(AXES), "What grows.", ranges.name_of("axis", AXES))
ranges.define_list(
    "width", [str(2**k) for k in range(6, 12)], "Widths; tuned at the first.", "width"
)
ranges.define_list("depth", ["2", "4", "8", "16", "32"], "Depths; tuned at the first.", "depth")
define_data_flags("fashion_mnist")
ranges.define("batch_size", 16, "Examples an update.", "batch_size_of_two")
ranges.define("steps", 5, "Updates.")
ranges.define("num_seeds", 3, "Seeds of the weights.")
flags.DEFINE_string("workdir", "runs/coordinate", "Folder for results, figures and the table.")
runners.define_flags(workers=1)

SETTINGS = {
    "mlp": {"optimizer": "sgd", "rate": 0.1, "downscale": 2, "width": 512},
    "cnn": {"optimizer": "sgd", "rate": 0.1, "downscale": 7, "width": 128, "depth": 1},
    "resnet": {"optimizer": "sgd", "rate": 0.1, "downscale": 7, "width": 64, "depth": 1},
    "transformer": {"optimizer": "adam", "rate": 2e-3, "downscale": 1, "width": 64},
}
# Zero padding takes a part of every feature: the smaller the image the more, and once a layer.
DEPTH_SETTINGS = {"cnn": {"downscale": 1, "width": 64}}
PARAMETRIZATIONS = ("standard", "closed_form", "measured")

Trial = dict[str, Any]


def run() -> None:
    """Measures what is missing, prints and draws."""
    trials = all_trials(common.settings(sys.argv[0]))
    check_trials(trials, FLAGS.data_dir)
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, common.settings(sys.argv[0]))
        records = run_study(
            trials,
            functools.partial(check, data_dir=FLAGS.data_dir),
            workdir / "results.jsonl",
            description="networks",
            **options,
        )
    runners.check_finished(records, workdir / "results.jsonl")
    curves = curves_of(trials, records)
    figures = {}
    for axis in FLAGS.axis:
        path = workdir / f"coordinate_{axis}.png"
        draw({key: value for key, value in curves.items() if key[1] == axis}, path)
        figures[path] = f"Change of features and of the output against {axis}."
    page.publish(
        workdir,
        f"Coordinate checks of {', '.join(FLAGS.family)} on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        remarks=answer(curves, FLAGS.num_seeds),
        tables={"Largest over smallest change of a feature over all sizes; 1 is best.":
                table(curves)},
        figures=figures,
    )  # fmt: skip


def all_trials(settings: Mapping[str, Any]) -> list[Trial]:
    """Returns one trial for every network.

    Raises:
      ValueError: an unknown family or axis, a single size, or sizes that are not increasing.
    """
    sizes = {}
    for axis in settings["axis"]:
        if axis not in AXES:
            raise ValueError(unknown("axis", axis, AXES))
        sizes[axis] = [int(size) for size in settings[axis]]
        if sizes[axis] != sorted(set(sizes[axis])) or len(sizes[axis]) < 2 or sizes[axis][0] < 1:
            raise ValueError(
                f"--{axis} must hold two different sizes at least, increasing, found "
                f"{sizes[axis]}; --axis leaves an axis out"
            )
    trials = []
    for family, axis, how in itertools.product(settings["family"], sizes, PARAMETRIZATIONS):
        if family not in families.FAMILIES:
            raise ValueError(unknown("family", family, families.FAMILIES))
        if axis == "width" and how == "measured":
            continue  # measured rules fail across widths (docs/results/learning_rates.md)
        options = SETTINGS[family] | (DEPTH_SETTINGS.get(family, {}) if axis == "depth" else {})
        base = {"width": options["width"], "depth": options.get("depth", 2)}
        base |= {axis: sizes[axis][0]}
        for size in sizes[axis]:
            trial = {"family": family, "axis": axis, "parametrization": how, "base": base}
            trial |= {"size": size, "dataset": settings["dataset"], **options}
            names = {"batch_size": "batch_size", "steps": "steps", "seeds": "num_seeds"}
            trials.append(trial | {key: settings[flag] for key, flag in names.items()})
    return trials


def check_trials(trials: Sequence[Trial], data_dir: str | None) -> None:
    """Checks that the data of trials are there and fit them; see `studies.check_trials`."""
    studies.check_trials(trials, data_dir)
    for trial in trials:
        if trial["family"] == "transformer":
            width = trial["size"] if trial["axis"] == "width" else trial["width"]
            images = studies.load(trial["dataset"], data_dir, trial["downscale"])
            families.check_transformer(images, width, "--width")


def check(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Runs the coordinate check of one network, and returns its records as lists."""
    dataset = studies.load(trial["dataset"], data_dir, trial["downscale"])
    batches = []
    for step in range(trial["steps"]):
        batches.append(common.first_batch(dataset, trial["batch_size"], step))
    records = archscale.coordinate_check(
        lambda size: make(trial, dataset, batches),
        [trial["size"]],
        batches,
        networks.cross_entropy,
        seeds=range(trial["seeds"]),
    )
    return {"records": [list(record) for record in records]}


def make(trial: Mapping[str, Any], dataset: Dataset, batches) -> coordinate.Network:
    """Returns the network of a trial as it is parametrized."""
    sizes = trial["base"] | {trial["axis"]: trial["size"]}
    create = functools.partial(families.create_network, trial["family"], dataset)
    optimizer, rate = networks.OPTIMIZERS[trial["optimizer"]], trial["rate"]
    target, base = (
        create(**one, abstract=True)._replace(optimizer=optimizer) for one in (sizes, trial["base"])
    )
    if trial["parametrization"] == "standard":
        return target.apply, lambda seed: create(**sizes, seed=seed).params, optimizer(rate)
    if trial["parametrization"] == "measured":
        target_size, base_size = (
            common.measure_seeds(one.measure, one.draw, batches[: trial["seeds"]])
            for one in (target, base)
        )
        predicted = archscale.predict_learning_rate(target_size, base_size, rate)
        return target.apply, target.draw, optimizer(predicted)
    options: dict[str, Any] = {"rule": "none"}
    if trial["axis"] == "width":
        options["width_rule"] = trial["optimizer"]
    elif families.is_residual(trial["family"]):
        options["depth_rule"] = trial["optimizer"]
    else:
        options["rule"] = "path_sum_activations"
    scaling = archscale.scale_by_architecture(target.architecture, base.architecture, **options)
    return target.apply, target.draw, optax.chain(optimizer(rate), scaling)


# What they say.

Curves = dict[tuple[str, str, str], dict[int, dict[Any, dict[float, float]]]]


def curves_of(trials: Sequence[Trial], records: Sequence[Mapping[str, Any]]) -> Curves:
    """Returns the curves by family, axis and parametrization, and by step."""
    found: dict[tuple[str, str, str], list[coordinate.Coordinate]] = {}
    for trial, record in zip(trials, records, strict=True):
        key = (trial["family"], trial["axis"], trial["parametrization"])
        found.setdefault(key, []).extend(_coordinates(record["result"]["records"]))
    return {
        key: {
            step: archscale.tuning.coordinate_curves(rows, step=step)
            for step in sorted({row.step for row in rows} - {0})
        }
        for key, rows in found.items()
    }


def _coordinates(rows: Sequence[Sequence[Any]]) -> Iterator[coordinate.Coordinate]:
    """What JSON lists hold; null is a number that was not finite."""
    for *place, change, feature in rows:
        values = (math.nan if value is None else value for value in (change, feature))
        yield coordinate.Coordinate(*place, *values)


def answer(curves: Curves, num_seeds: int) -> list[str]:
    """Returns a sentence for every family and axis: under what updates change all sizes most alike.

    A parametrization counts by its worst vertex, the output included, after the last update.
    """
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for (family, axis, how), steps in curves.items():
        ratios = archscale.tuning.flatness(steps[max(steps)])
        worst.setdefault((family, axis), {})[how.replace("_", " ")] = max(ratios.values())
    lines = []
    for (family, axis), found in worst.items():
        steps = next(one for key, one in curves.items() if key[:2] == (family, axis))
        step, sizes = max(steps), list(steps[max(steps)]["output"])
        best = min(found, key=found.__getitem__)
        where = f"the {family} of {axis} {sizes[0]} to {sizes[-1]}"
        if math.isinf(found[best]):
            lines.append(f"Updates change {where} alike under no parametrization: all diverged.")
            continue
        others = "".join(f", {how} {_factor(ratio)}" for how, ratio in found.items() if how != best)
        lines.append(
            f"Updates change {where} most alike under {best}: by factors up to "
            f"{_factor(found[best])} after {step} updates{others}."
        )
    if num_seeds == 1:
        lines.append("One seed: how far these factors scatter is not known.")
    return lines


def _factor(ratio: float) -> str:
    return tables.number(ratio, ".3g", missing="without bound")


def table(curves: Curves) -> pd.DataFrame:
    """Returns the largest over the smallest change, of the worst vertex and of the output."""
    last = max(step for steps in curves.values() for step in steps)
    rows = []
    for key, steps in curves.items():
        row: dict[str, str] = dict(zip(("family", "axis", "parametrization"), key, strict=True))
        for step in sorted({1, last}):
            ratios = archscale.tuning.flatness(steps[step])
            output = ratios.pop("output")
            row[f"vertices, step {step}"] = _shown(max(ratios.values()))
            row[f"output, step {step}"] = _shown(output)
        rows.append(row)
    return pd.DataFrame(rows)


def _shown(ratio: float) -> str:
    return tables.number(ratio, ".3g", missing="diverged")


def draw(curves: Curves, path: pathlib.Path) -> None:
    """Draws one panel for every family and parametrization of an axis, a row a family."""
    names = list(dict.fromkeys(family for family, _, _ in curves))
    hows = list(dict.fromkeys(how for _, _, how in curves))
    axis = next(iter(curves))[1]
    places = list(itertools.product(names, hows))
    figure, drawn = panels.create_panels(
        len(places), 1.7, width=2.2, columns=len(hows), sharex=True, sharey="row"
    )
    for panel, (family, how) in zip(drawn, places, strict=True):
        steps = curves[family, axis, how]
        found = steps[max(steps)]
        ratios = archscale.tuning.flatness(found)
        inner = [name for name in found if name != "output"]
        for name in inner:
            label = {"label": "features"} if name == inner[0] else {}
            _draw_curve(panel, found[name], panels.COLOURS[0], **label)
        _draw_curve(panel, found["output"], panels.COLOURS[1], label="output")
        worst = _shown(max(ratios[name] for name in inner))
        ratio = worst if worst == "diverged" else f"×{worst}"
        panel.set_title(f"{family}, {how.replace('_', ' ')}: {ratio}", fontsize=8.5)
        panels.plain_sizes(panel, list(found["output"]))
        panel.set_yscale("log")
    for panel in drawn[:: len(hows)]:
        _widen(panel)
    change = "change since initialization"
    panels.finish(figure, path, across=axis, up=change, columns=2)


def _widen(panel) -> None:
    """Shows a factor of 30 or more, so that what is flat looks flat; whole powers of ten alone."""
    low, high = panel.get_ylim()
    if high < 30 * low:
        middle = math.sqrt(low * high)
        panel.set_ylim(middle / math.sqrt(30), middle * math.sqrt(30))
    panel.yaxis.minorticks_off()


def _draw_curve(panel, curve: Mapping[float, float], colour: str, **label: str) -> None:
    finite = {size: value for size, value in curve.items() if 0 < value < math.inf}
    panel.plot(list(finite), list(finite.values()), ".-", color=colour, linewidth=1.1, **label)


if __name__ == "__main__":
    common.run_binary(run)
