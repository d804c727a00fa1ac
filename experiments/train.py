"""Trains one network of a DAG string, with its learning rate scaled from a base network's.

    python -m experiments.train --architecture=2_02_002 --base_rate=0.1 --workdir=runs/train

Writes config.json, results.jsonl (a line an epoch) and checkpoints, and prints a table. The same
command with --resume goes on after a kill and ends bit for bit where it would have ended.
"""

import pathlib
import sys

import optax
from absl import flags
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from archscale_jax import checkpoints, datasets, files, training
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments import common

FLAGS = flags.FLAGS

common.define_flags(batch_size=64, epochs=10, workdir="runs/train")
flags.adopt_module_key_flags(common)
flags.DEFINE_string("architecture", "2_02_002", "DAG string of the network.")
flags.DEFINE_float("base_rate", 0.1, "Learning rate tuned on the base network.")
flags.DEFINE_bool("autoscale", True, "Scale the rate from the base network by --rule.")
flags.DEFINE_enum("rule", "path_sum", list(LEARNING_RATE_RULES), "Learning-rate rule.")
flags.DEFINE_integer("steps", None, "Updates in all, instead of --epochs.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of weights, batches and augmentation.")
flags.DEFINE_bool("resume", False, "Go on from the last checkpoint in --workdir.")


def run() -> None:
    """Trains, checkpoints and prints, as the flags say."""
    settings = common.settings(sys.argv[0])
    workdir = pathlib.Path(FLAGS.workdir)
    results = workdir / "results.jsonl"
    saves = workdir / "checkpoints"
    if not FLAGS.resume and (results.exists() or saves.exists()):
        raise ValueError(f"{workdir} holds a run; pass --resume, or choose another --workdir")
    training.check_learning_rate(FLAGS.base_rate)
    graph, base = (
        common.parse_graph(FLAGS.architecture),
        common.parse_graph(FLAGS.base_architecture),
    )
    rule = FLAGS.rule if FLAGS.autoscale else "none"
    scale = archscale.learning_rate_scale(graph, base, rule)

    dataset = datasets.load(FLAGS.dataset, data_dir=FLAGS.data_dir)
    network = common.build_network(graph, dataset)
    total_steps = FLAGS.steps or common.count_steps(dataset, FLAGS.epochs)
    optimizer = optax.chain(
        common.build_optimizer(FLAGS.base_rate, total_steps),
        archscale.scale_by_architecture(network.architecture, base, rule),
    )
    state = common.initial_state(network, optimizer, FLAGS.seed)

    files.claim_directory(workdir, settings)
    saved = checkpoints.restore_checkpoint(saves, state, settings)
    if saved:
        state = saved[1]
    _keep_records(results, int(state.epoch))
    console = Console()
    console.print(
        f"{FLAGS.architecture} on {FLAGS.dataset}: rate {FLAGS.base_rate:g} x {scale:.4g} ({rule})"
        + (f", resumed after epoch {int(state.epoch)}" if saved else "")
    )
    for after, metrics in common.fit(state, dataset, network, optimizer, total_steps):
        files.append_record(results, metrics)
        checkpoints.save_checkpoint(saves, int(after.epoch), after, settings)
        console.print(_line(metrics))
    console.print(_table(files.read_records(results)))
    console.print(f"results: {results}", soft_wrap=True)


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
        f"epoch {metrics['epoch']:>3}  train loss {metrics['train_loss']:.4f}  "
        f"test accuracy {metrics['test_accuracy']:.4f}" + ("  diverged" * bool(metrics["diverged"]))
    )


def _table(records: list[dict]) -> Table:
    table = Table(title=f"{FLAGS.architecture} on {FLAGS.dataset}, seed {FLAGS.seed}")
    columns = ["epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for record in records:
        table.add_row(
            *(
                f"{record[c]:.4f}" if isinstance(record[c], float) else str(record[c])
                for c in columns
            )
        )
    return table


if __name__ == "__main__":
    common.run_binary(run)
