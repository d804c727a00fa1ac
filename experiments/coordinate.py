"""Coordinate checks: do updates change networks of all widths and depths alike?

    python -m experiments.coordinate --family=mlp,transformer --axis=width

Trains every network for a few steps and measures the change of all its vertices: with the standard
parametrization (Flax's initialization, one rate), with the closed forms of this library, and with
the rate that a measurement predicts. Writes config.json, results.jsonl, a figure for each axis,
table.md and report.html, and prints the table. Killed and started again it goes on with the
networks that are missing. The defaults are the run of the docs; it takes about an hour on two
cores.
"""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import optax
from absl import flags

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax.tuning import _coordinate as coordinate
from experiments import coordinate_report, transfer_study
from experiments.lab import common, datasets, families, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
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
    curves = coordinate_report.curves_of(trials, records)
    table = coordinate_report.table(curves)
    text = common.markdown_table(table)
    files.write_text(workdir / "table.md", text)
    print(text)
    figures = {}
    for axis in FLAGS.axis:
        path = workdir / f"coordinate_{axis}.png"
        coordinate_report.draw(
            {key: value for key, value in curves.items() if key[1] == axis}, path
        )
        print(f"figure: {path}")
        figures[path] = f"Change of features against {axis}; the line of the output is orange."
    report = page.write(
        workdir,
        f"Coordinate checks of {', '.join(FLAGS.family)} on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        tables={"Largest over smallest change of a feature over all sizes; 1 is best.": table},
        figures=figures,
    )
    print(f"report: {report}")


def all_trials(settings: Mapping[str, Any]) -> list[Trial]:
    """Returns one trial for every network.

    Raises:
      ValueError: an unknown family or axis, or sizes that are not increasing.
    """
    sizes = {}
    for axis in settings["axis"]:
        if axis not in AXES:
            raise ValueError(unknown("axis", axis, AXES))
        sizes[axis] = [int(size) for size in settings[axis]]
        if sizes[axis] != sorted(set(sizes[axis])) or sizes[axis][0] < 1:
            raise ValueError(f"--{axis} must be increasing numbers from 1, found {sizes[axis]}")
    trials = []
    for family, axis, how in itertools.product(settings["family"], sizes, PARAMETRIZATIONS):
        if family not in families.FAMILIES:
            raise ValueError(unknown("family", family, families.FAMILIES))
        if axis == "width" and how == "measured":
            continue  # measured rules fail across widths (docs/transfer.md)
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
    """Checks that the data of trials are there and fit them; see `transfer_study.check_trials`."""
    transfer_study.check_trials(trials, data_dir)
    for trial in trials:
        if trial["family"] == "transformer":
            width = trial["size"] if trial["axis"] == "width" else trial["width"]
            images = transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
            families.check_transformer(images, width, "--width")


def check(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Runs the coordinate check of one network, and returns its records as lists."""
    dataset = transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
    batches = []
    for step in range(trial["steps"]):
        batches.append(common.first_batch(dataset, trial["batch_size"], step))
    records = archscale.coordinate_check(
        lambda size: make(trial, dataset, batches),
        [trial["size"]],
        batches,
        families.loss,
        seeds=range(trial["seeds"]),
    )
    return {"records": [list(record) for record in records]}


def make(trial: Mapping[str, Any], dataset: datasets.Dataset, batches) -> coordinate.Network:
    """Returns the network of a trial as it is parametrized."""
    sizes = trial["base"] | {trial["axis"]: trial["size"]}
    model, base = (
        families.create_model(trial["family"], dataset, **one, abstract=True)
        for one in (sizes, trial["base"])
    )
    apply = families.applier(model.graphdef, model.model_state)
    optimizer, rate = families.OPTIMIZERS[trial["optimizer"]], trial["rate"]
    if trial["parametrization"] == "standard":
        standard = functools.partial(families.create_model, trial["family"], dataset, **sizes)
        return apply, lambda seed: standard(seed=seed).params, optimizer(rate)
    draw, draw_base = (
        functools.partial(families.draw, one, trial["family"]) for one in (model, base)
    )
    if trial["parametrization"] == "measured":
        target_size, base_size = (
            common.measure_seeds(
                families.measurer(one, optimizer), drawn, batches[: trial["seeds"]]
            )
            for one, drawn in ((model, draw), (base, draw_base))
        )
        predicted = archscale.predict_learning_rate(target_size, base_size, rate)
        return apply, draw, optimizer(predicted)
    options: dict[str, Any] = {"rule": "none"}
    if trial["axis"] == "width":
        options["width_rule"] = trial["optimizer"]
    elif families.is_residual(trial["family"]):
        options["depth_rule"] = trial["optimizer"]
    else:
        options["rule"] = "path_sum_activations"
    scaling = archscale.scale_by_architecture(model.architecture, base.architecture, **options)
    return apply, draw, optax.chain(optimizer(rate), scaling)


if __name__ == "__main__":
    common.run_binary(run)
