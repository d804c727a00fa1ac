"""Trains one network of a DAG string by SGD, its learning rate scaled from a base network's.

    python -m experiments.train --architecture=2_02_002 --base_rate=0.1 --workdir=runs/train

Writes config.json, results.jsonl (a line an epoch), checkpoints, table.md, train.png and
report.html, and prints the answer. Killed and started again it goes on from the last checkpoint and
ends bit for bit where it would have ended. With more --steps or --epochs a run of the constant
schedule goes on from where it ended, to rounding as one long training would.
"""

import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import optax
from absl import flags

import archscale_jax as archscale
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments.lab import checkpoints, common, display, files, page, ranges, recipe, training
from experiments.lab.networks import Network
from experiments.lab.panels import create_panels, save
from experiments.lab.tables import number

FLAGS = flags.FLAGS

common.define_flags(batch_size=64, epochs=10, workdir="runs/train")
flags.adopt_module_key_flags(common)
ranges.define("architecture", "2_02_002", "DAG string of the network.")
ranges.define("base_rate", 0.1, "Learning rate tuned on the base network.", "rate")
flags.DEFINE_bool("autoscale", True, "Scale the rate from the base network by --rule.")
ranges.define_rule("rule", "path_sum_activations", "Learning-rate rule.", LEARNING_RATE_RULES)
ranges.define("steps", None, "Updates in all, instead of --epochs.")
ranges.define("seed", 0, "Seed of weights, batches and augmentation.")
flags.DEFINE_bool("resume", False, "Has no effect: every run goes on.")


def run() -> None:
    """Trains and prints, as the flags say."""
    settings = common.settings(sys.argv[0])
    dataset = recipe.load_dataset(FLAGS.dataset, FLAGS.data_dir)
    display.note(f"{dataset!r}")
    steps = recipe.count_steps(settings, dataset, FLAGS.epochs)
    steps = FLAGS.steps or steps
    rule = FLAGS.rule if FLAGS.autoscale else "none"
    network = recipe.build_network(settings, FLAGS.architecture, dataset)
    base = recipe.parse_graph(settings, FLAGS.base_architecture)
    scale = archscale.learning_rate_scale(
        recipe.parse_graph(settings, FLAGS.architecture), base, rule
    )
    optimizer = optax.chain(
        recipe.build_optimizer(settings, FLAGS.base_rate, steps),
        archscale.scale_by_architecture(network.architecture, base, rule),
    )
    recipe.check_training(settings, network, steps)

    workdir = claim(settings, steps)
    rate = f"rate {FLAGS.base_rate * scale:.4g}, {FLAGS.base_rate:g} x {scale:.4g} ({rule})"
    display.note(f"{FLAGS.architecture} on {dataset.name}: {rate}")
    records = train(settings, network, optimizer, steps, workdir)
    figure = workdir / "train.png"
    _draw(records, figure)
    page.publish(
        workdir,
        f"{FLAGS.architecture} on {dataset.name}, seed {FLAGS.seed}",
        __doc__,
        remarks=[answer(records), f"R{rate[1:]}."],
        tables={"Loss (nats) and accuracy after every epoch.": _lines(records)},
        figures={figure: "Loss and accuracy after every epoch."},
    )


LENGTHS = ("epochs", "steps")
"""Flags that say how long is trained."""


def claim(settings: dict[str, Any], steps: int) -> pathlib.Path:
    """Claims the folder of a training, also of a shorter one that is the same so far.

    Raises:
      ValueError: the folder holds another training, or one that is longer.
    """
    records = files.read_records(pathlib.Path(FLAGS.workdir) / "results.jsonl")
    done = records[-1].get("step", 0) if records else 0
    constant = settings["schedule"] == "constant"
    if constant and done <= steps:
        return common.claim_directory(FLAGS.workdir, settings, extensible=LENGTHS)
    reason = f"it has done {done} updates, more than {steps}"
    if not constant:
        reason = (
            f"--schedule={settings['schedule']} spreads over all updates, so that none of another "
            "length goes on from it; those of --schedule=constant do"
        )
    common.check_length(FLAGS.workdir, settings, LENGTHS, reason)
    return common.claim_directory(FLAGS.workdir, settings)


def train(
    settings: Mapping[str, Any],
    network: Network,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    workdir: pathlib.Path,
) -> list[dict[str, Any]]:
    """Trains from the last checkpoint in a folder; returns the metrics of all epochs.

    The checkpoint has those so far, so results.jsonl never says more or less than it.
    """
    results, saves = workdir / "results.jsonl", workdir / "checkpoints"
    state = recipe.initial_state(network, optimizer, settings["seed"])
    records = files.read_records(results)[:0]  # raises where the file is another's
    last = None
    if found := checkpoints.restore_checkpoint(saves, state, settings, extensible=LENGTHS):
        _, state, records = found
        last = records[-1]
        if last["step"] > total_steps:  # its journal was cut off behind the checkpoint
            raise ValueError(
                f"{saves} holds a training of {last['step']} updates, more than {total_steps}; "
                "raise --steps, or choose another --workdir"
            )
        display.note(f"resumed after epoch {last['epoch']}, update {last['step']}")
    files.write_records(results, records)
    dataset, options = network.dataset, recipe.batching(settings)
    options |= {"graphdef": network.graphdef, "optimizer": optimizer}
    epochs = math.ceil(total_steps / max(len(dataset.train_images) // settings["batch_size"], 1))
    done = last["step"] * epochs // total_steps if last else 0
    with display.progress("epochs", epochs, done=done) as advance:
        fitting = training.fit(state, dataset, total_steps=total_steps, last=last, **options)
        for after, metrics in fitting:
            finishes = bool(records) and records[-1]["epoch"] == metrics["epoch"]
            records[len(records) - finishes :] = [files.strict_json(metrics)]
            checkpoints.save_checkpoint(saves, int(after.epoch), after, settings, log=records)
            if finishes:
                files.write_records(results, records)
            else:
                files.append_record(results, metrics)
            advance(note=_line(metrics))
    return records


def answer(records: list[dict[str, Any]]) -> str:
    """Returns where the training ended."""
    last = records[-1]
    if last["diverged"]:
        return f"After {last['step']} updates it is no better than guessing: take a smaller rate."
    return (
        f"After {last['step']} updates it reads {last['test_accuracy']:.1%} of the test examples "
        f"right, at a loss of {number(last['test_loss'], '.4f', 'no finite number of')} nats; "
        "one seed."
    )


def _line(metrics: dict) -> str:
    return (
        f"train loss {metrics['train_loss']:.4f}, test accuracy {metrics['test_accuracy']:.4f}"
        + ", no better than guessing" * bool(metrics["diverged"])
    )


COLUMNS = {"epoch": "d", "step": "d"} | dict.fromkeys(
    ("train_loss", "train_accuracy", "test_loss", "test_accuracy"), ".4f"
)
"""How what is recorded is shown."""


def _lines(records: list[dict]) -> list[list[str]]:
    """A line an epoch, after a heading."""
    heading = [name.replace("_", " ") for name in COLUMNS]
    lines = [
        [number(record[name], spec, "diverged") for name, spec in COLUMNS.items()]
        for record in records
    ]
    return [heading, *lines]


def _draw(records: list[dict], path: pathlib.Path) -> None:
    """Draws loss and accuracy over epochs, of training and of test examples."""
    figure, panels = create_panels(2, 2.8, width=3.6, columns=2)
    epochs = [record["epoch"] for record in records]
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        for part, style in (("train", "o-"), ("test", "^--")):
            values = [record[f"{part}_{name}"] for record in records]
            known = [math.nan if value is None else value for value in values]
            panel.plot(epochs, known, style, markersize=3, linewidth=1.2, label=part)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel="epoch", ylabel=f"{name} (nats)" if name == "loss" else name)
        panel.legend(fontsize=8, frameon=False)
    save(figure, path)


if __name__ == "__main__":
    common.run_binary(run)
