"""Trains one network of a DAG string, with its learning rate scaled from a base network's.

    python -m experiments.train --architecture=2_02_002 --base_rate=0.1 --workdir=runs/train

Writes config.json, results.jsonl (a line an epoch), checkpoints, train.png and report.html, and
prints a table. The same command with --resume goes on after a kill and ends bit for bit where it
would have ended.
"""

import math
import pathlib
import sys

import optax
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments.lab import checkpoints, common, display, files, interrupts, page, ranges
from experiments.lab.panels import create_panels, save

FLAGS = flags.FLAGS

common.define_flags(batch_size=64, epochs=10, workdir="runs/train")
flags.adopt_module_key_flags(common)
ranges.define("architecture", "2_02_002", "DAG string of the network.")
ranges.define("base_rate", 0.1, "Learning rate tuned on the base network.", "rate")
flags.DEFINE_bool("autoscale", True, "Scale the rate from the base network by --rule.")
ranges.define_rule("rule", "path_sum", "Learning-rate rule.", LEARNING_RATE_RULES)
ranges.define("steps", None, "Updates in all, instead of --epochs.")
ranges.define("seed", 0, "Seed of weights, batches and augmentation.")
flags.DEFINE_bool("resume", False, "Go on from the last checkpoint in --workdir.")


def run() -> None:
    """Trains, checkpoints and prints, as the flags say."""
    settings = common.settings(sys.argv[0])
    workdir = pathlib.Path(FLAGS.workdir)
    results = workdir / "results.jsonl"
    saves = workdir / "checkpoints"
    _check_fresh(workdir)
    graph, base = (
        common.parse_graph(FLAGS.architecture),
        common.parse_graph(FLAGS.base_architecture),
    )
    rule = FLAGS.rule if FLAGS.autoscale else "none"
    scale = archscale.learning_rate_scale(graph, base, rule)

    dataset = common.load_dataset()
    network = common.build_network(graph, dataset)
    total_steps = FLAGS.steps or common.count_steps(dataset, FLAGS.epochs)
    optimizer = optax.chain(
        common.build_optimizer(FLAGS.base_rate, total_steps),
        archscale.scale_by_architecture(network.architecture, base, rule),
    )
    state = common.initial_state(network, optimizer, FLAGS.seed)

    common.claim_directory(workdir, settings)
    _check_fresh(workdir)  # another process may have begun meanwhile
    saved = checkpoints.restore_checkpoint(saves, state, settings)
    if saved:
        state = saved[1]
    _keep_records(results, int(state.epoch))
    console = Console()
    display.note(
        f"{FLAGS.architecture} on {dataset.name}: rate {FLAGS.base_rate:g} x {scale:.4g} ({rule})"
        + (f", resumed after epoch {int(state.epoch)}" if saved else "")
    )
    epochs = math.ceil(total_steps / max(len(dataset.train_images) // FLAGS.batch_size, 1))
    with display.progress("epochs", epochs, done=int(state.epoch)) as advance:
        for after, metrics in common.fit(state, dataset, network, optimizer, total_steps):
            with interrupts.later():
                files.append_record(results, metrics)
                checkpoints.save_checkpoint(saves, int(after.epoch), after, settings)
            advance(note=_line(metrics))
    records = files.read_records(results)
    title = f"{FLAGS.architecture} on {dataset.name}, seed {FLAGS.seed}"
    lines = _lines(records)
    figure = workdir / "train.png"
    _draw(records, figure)
    report = page.write(
        workdir,
        title,
        __doc__,
        remarks=[f"Rate {FLAGS.base_rate:g} x {scale:.4g} ({rule})."],
        tables={"Loss (nats) and accuracy after every epoch.": lines},
        figures={figure: "Loss and accuracy after every epoch."},
    )
    console.print(_table(title, lines))
    console.print(f"results: {results}\nfigure:  {figure}\nreport:  {report}", soft_wrap=True)


def _check_fresh(workdir: pathlib.Path) -> None:
    held = any((workdir / name).exists() for name in ("results.jsonl", "checkpoints"))
    if held and not FLAGS.resume:
        raise ValueError(f"{workdir} holds a run; pass --resume, or choose another --workdir")


def _keep_records(results: pathlib.Path, epochs: int) -> None:
    """Keeps the records up to the checkpoint; a kill before a checkpoint leaves one too many."""
    records = [record for record in files.read_records(results) if record["epoch"] <= epochs]
    if [record["epoch"] for record in records] != list(range(1, epochs + 1)):
        raise ValueError(
            f"{results} lacks epochs up to {epochs}, which the checkpoint has; start anew in "
            "another --workdir"
        )
    files.write_records(results, records)


def _line(metrics: dict) -> str:
    return (
        f"train loss {metrics['train_loss']:.4f}, test accuracy {metrics['test_accuracy']:.4f}"
        + ", no better than guessing" * bool(metrics["diverged"])
    )


def _lines(records: list[dict]) -> list[list[str]]:
    """A line an epoch, after a heading."""
    columns = ["epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    return [
        [column.replace("_", " ") for column in columns],
        *([_cell(record[column]) for column in columns] for record in records),
    ]


def _cell(value: float | None) -> str:
    if value is None:  # as JSON has what is not finite
        return "diverged"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(title: str, lines: list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in lines[0]:
        table.add_column(column, justify="right")
    for line in lines[1:]:
        table.add_row(*line)
    return table


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
