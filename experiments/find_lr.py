"""Finds the learning rate of one network: prints and draws training loss against rate.

    python -m experiments.find_lr --architecture=2_02_002 --workdir=runs/find_lr

Trains every rate of a log grid with every seed, or, with --adaptive, expands a bracket from a start
and trains only what can win. The start is --start, or what measuring predicts from --base_rate, the
rate of --base_architecture, or the middle of the grid. Writes config.json, results.jsonl (a line a
run), table.md, find_lr.png and report.html; a run that was cut off goes on where it stopped.
"""

import functools
import math
import pathlib
import statistics
import sys
import threading
from collections.abc import Iterator

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from archscale_jax.tuning import _search as search
from experiments.lab import common, datasets, display, files, interrupts, page, ranges, runners
from experiments.lab.panels import save
from experiments.lab.progress import Advance

FLAGS = flags.FLAGS

common.define_flags(batch_size=32, epochs=1, workdir="runs/find_lr")
flags.adopt_module_key_flags(common)
ranges.define("architecture", "2_02_002", "DAG string of the network.")
ranges.define("min_rate", 1e-3, "Smallest rate of the grid.", "rate")
ranges.define("max_rate", 4.0, "Largest rate of the grid.", "rate")
ranges.define("num_rates", 13, "Rates of the log grid.")
ranges.define("num_seeds", 3, "Seeds.")
flags.DEFINE_bool("adaptive", False, "Train only the rates that can win.")
ranges.define("start", None, "Rate at which to start; makes the search adaptive.", "rate")
ranges.define("base_rate", None, "Best rate of the base architecture; predicts the start.", "rate")
ranges.define(
    "tolerance", 0.02, "Depth of the basin, as a fraction of the smallest loss.", "fraction"
)
ranges.define(
    "margin", 0.25, "An adaptive search trains losses this close to the smallest.", "fraction"
)
ranges.define("refine", 1, "How often the grid is halved in the basin.")
ranges.define("workers", 1, "Runs at a time, in threads.")

EXTENSIBLE = ("adaptive", "base_rate", "margin", "max_rate", "min_rate", "num_rates", "num_seeds",
              "refine", "start", "tolerance")  # fmt: skip
"""Flags that only say which runs a search has; those already done stay valid."""


def run() -> None:
    """Searches, prints and draws."""
    rates = common.rate_grid()
    graph = common.parse_graph(FLAGS.architecture)
    dataset = common.load_dataset()
    total_steps = common.count_steps(dataset, FLAGS.epochs)
    network = common.build_network(graph, dataset)
    common.check_training(network, total_steps)
    start = FLAGS.start
    if start is None and FLAGS.base_rate is not None:
        start = _predicted(network, dataset)
    elif start is None and FLAGS.adaptive:
        start = math.sqrt(FLAGS.min_rate * FLAGS.max_rate)
    workdir = common.claim_directory(
        FLAGS.workdir, common.settings(sys.argv[0]), extensible=EXTENSIBLE
    )
    train = common.rate_trainer(
        functools.partial(common.initial_state, network),
        lambda rate: common.build_optimizer(rate, total_steps),
        dataset,
        graphdef=network.graphdef,
        batch_size=FLAGS.batch_size,
        total_steps=total_steps,
        flip=FLAGS.flip,
        padding=FLAGS.padding,
    )
    # How many runs it takes is found on the way.
    with interrupts.announced(runners.WAITING), display.progress("runs", None) as advance:
        found = archscale.find_learning_rate(
            _remembered(train, workdir / "results.jsonl", advance),
            rates,
            seeds=range(FLAGS.num_seeds),
            start=start,
            tolerance=FLAGS.tolerance,
            margin=FLAGS.margin,
            refine=FLAGS.refine,
            workers=FLAGS.workers,
        )
    answer = (
        f"learning rate {found.rate:.3g}, "
        f"basin {found.basin.lower:.3g} to {found.basin.upper:.3g}, "
        + _standard_error(found)
        + f", {len(found.runs)} runs"
    )
    lines = _lines(found)
    markdown = f"{answer}\n\n{common.markdown_table(lines)}"
    files.write_text(workdir / "table.md", markdown)
    figure = workdir / "find_lr.png"
    _draw(found, figure, dataset.name)
    remarks = [f"{answer[0].upper()}{answer[1:]}."]
    if FLAGS.start is None and FLAGS.base_rate is not None:
        remarks.append(f"Predicted from the base rate {FLAGS.base_rate:.3g}: {start:.3g}.")
    console = Console()
    console.print(_table(lines))
    if not all(found.basin.bracketed):
        remarks.append(
            "The basin reaches the end of the rates tried: widen --min_rate, --max_rate."
        )
    report = page.write(
        workdir,
        f"Learning rate of {FLAGS.architecture} on {dataset.name}",
        __doc__,
        remarks=remarks,
        tables={"Training loss (nats) by rate; * marks the rates in the basin.": lines},
        figures={figure: "Training loss of every run against its learning rate, with the basin."},
    )
    console.print(*remarks[1:], sep="\n", end="\n" if remarks[1:] else "")
    console.print(f"{answer}\nfigure:  {figure}\nreport:  {report}", soft_wrap=True)


def _predicted(network: common.Network, dataset: datasets.Dataset) -> float:
    """Returns the rate that measuring predicts from --base_rate."""
    base = common.build_network(common.parse_graph(FLAGS.base_architecture), dataset)
    optimizer = common.build_optimizer(1.0, 1)
    batches = [
        common.first_batch(dataset, FLAGS.batch_size, seed) for seed in range(FLAGS.num_seeds)
    ]
    sizes = []
    for one in (network, base):
        sizes.append(
            common.measure_seeds(
                common.measurer(one.graphdef, one.model_state, optimizer),
                lambda seed, one=one: common.initial_state(one, optimizer, seed).params,
                batches,
            )
        )
    return archscale.predict_learning_rate(sizes[0], sizes[1], FLAGS.base_rate)


def _remembered(train: search.Train, journal: pathlib.Path, advance: Advance) -> search.Train:
    """Returns `train` with its ends kept in a journal: what is there is not trained again."""
    lock = threading.Lock()
    losses = {(one["rate"], one["seed"]): one["loss"] for one in files.read_records(journal)}

    def remembered(rate: float, seed: int) -> Iterator[float]:
        if (rate, seed) in losses:
            loss = losses[rate, seed]
            advance()
            yield math.inf if loss is None else loss
            return
        loss = math.inf
        for loss in train(rate, seed):
            if not math.isfinite(loss):
                break
            yield loss
        with lock:
            files.append_record(journal, {"rate": rate, "seed": seed, "loss": loss})
            advance(note=f"rate {rate:.3g}: loss {_loss(loss)}")
        yield loss

    return remembered


def _standard_error(found: search.RateSearch) -> str:
    if math.isnan(found.uncertainty):
        return "one seed, no standard error"
    if math.isinf(found.uncertainty):
        return "no standard error, the loss falls until the rates end"
    return f"standard error {100 * math.expm1(found.uncertainty):.0f} %"


def _lines(found: search.RateSearch) -> list[list[str]]:
    """A line per rate after a heading: the losses of the seeds, and their mean."""
    seeds = sorted({run.seed for run in found.runs})
    losses = {(run.rate, run.seed): run.loss for run in found.runs}
    lines = [["rate", *(f"seed {seed}" for seed in seeds), "mean", "basin"]]
    for rate in sorted({run.rate for run in found.runs}):
        ends = [losses.get((rate, seed)) for seed in seeds]
        trained = [loss for loss in ends if loss is not None]
        mean = statistics.fmean(trained) if len(trained) == len(seeds) else None
        inside = found.basin.lower <= rate <= found.basin.upper
        lines.append([f"{rate:.3g}", *map(_loss, ends), _loss(mean), "*" if inside else ""])
    return lines


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "lost"


def _table(rows: list[list[str]]) -> Table:
    heading, *lines = rows
    result = Table(title="training loss (nats)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in heading:
        result.add_column(column, justify="right")
    for line in lines:
        result.add_row(*line)
    return result


def _draw(found: search.RateSearch, path: pathlib.Path, name: str) -> None:
    """Draws the loss of every run against its rate, with the basin and the answer; atomically."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(found.basin.lower, found.basin.upper, color="#009E73", alpha=0.15, label="basin")
    axes.axvline(found.rate, color="#009E73", label=f"answer {found.rate:.3g}")
    for seed in sorted({run.seed for run in found.runs}):
        runs = [run for run in found.runs if run.seed == seed and math.isfinite(run.loss)]
        axes.plot([run.rate for run in runs], [run.loss for run in runs], "o-", markersize=3,
                  linewidth=0.8, label=f"seed {seed}")  # fmt: skip
    lost = sorted({run.rate for run in found.runs if not math.isfinite(run.loss)})
    top = axes.get_ylim()[1]
    axes.plot(lost, [top] * len(lost), "x", color="#D55E00", label="lost" if lost else None)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="training loss (nats)")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, few enough not to touch
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(f"{FLAGS.architecture} on {name}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path, dpi=150)


if __name__ == "__main__":
    common.run_binary(run)
