"""Finds the learning rate of one network under SGD: prints and draws training loss against rate.

    python -m experiments.find_lr --architecture=2_02_002 --workdir=runs/find_lr

Trains every rate of a log grid with every seed, or, with --adaptive, expands a bracket from a start
and trains only what can win. The start is --start, or what measuring predicts from --base_rate, the
rate of --base_architecture, or the middle of the grid. Writes config.json, results.jsonl (a line a
run), table.md, find_lr.png and report.html; a run that was cut off goes on where it stopped.
"""

import functools
import math
import pathlib
import shlex
import statistics
import sys
from types import NoneType

from absl import flags

import archscale_jax as archscale
from archscale_jax.tuning import _search as search
from experiments.lab import (
    common,
    display,
    interrupts,
    networks,
    page,
    ranges,
    recipe,
    runners,
)
from experiments.lab.networks import Network
from experiments.lab.panels import save
from experiments.lab.sweeps import Journal
from experiments.lab.tables import NONE, number

FLAGS = flags.FLAGS

common.define_flags(batch_size=64, epochs=1, workdir="runs/find_lr")
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
runners.define_flags(workers=1)

EXTENSIBLE = ("adaptive", "base_rate", "margin", "max_rate", "min_rate", "num_rates", "num_seeds",
              "refine", "start", "tolerance")  # fmt: skip
"""Flags that only say which runs a search has; those already done stay valid."""


def run() -> None:
    """Searches, prints and draws."""
    rates = common.rate_grid(FLAGS.min_rate, FLAGS.max_rate, FLAGS.num_rates)
    settings = common.settings()
    dataset = recipe.load_dataset(FLAGS.dataset, FLAGS.data_dir)
    display.note(f"{dataset!r}")
    total_steps = recipe.count_steps(settings, dataset, settings.pop("epochs"))
    network = recipe.build_network(settings, FLAGS.architecture, dataset)
    recipe.check_training(settings, network, total_steps)
    start = FLAGS.start
    if start is None and FLAGS.base_rate is not None:
        start = _predicted(settings, network)
    elif start is None and FLAGS.adaptive:
        start = math.sqrt(FLAGS.min_rate * FLAGS.max_rate)
    trial = settings | {"architecture": FLAGS.architecture, "steps": total_steps}
    with runners.runner() as options:
        workdir = common.claim_directory(
            FLAGS.workdir, common.settings(sys.argv[0]), extensible=EXTENSIBLE
        )
        found, others = _search(trial, rates, start, workdir / "results.jsonl", options)
    answer = (
        f"Learning rate {found.rate:.3g}, "
        f"basin {found.basin.lower:.3g} to {found.basin.upper:.3g}, "
        + _standard_error(found)
        + f", {len(found.runs)} runs."
    )
    figure = workdir / "find_lr.png"
    _draw(found, figure, dataset.name)
    remarks = [answer]
    if FLAGS.start is None and FLAGS.base_rate is not None:
        remarks.append(f"Predicted from the base rate {FLAGS.base_rate:.3g}: {start:.3g}.")
    if not all(found.basin.bracketed):
        remarks.append(common.cut_by_the_grid("The basin"))
    if others:
        remarks.append(
            f"Runs finished in this folder that are not of this search: {others}. The --num_rates, "
            "--num_seeds and other flags of before take them in; commands.jsonl has those."
        )
    remarks.append(f"Another network, with this one as its base: {_train_command(found.rate)}")
    page.publish(
        workdir,
        f"Learning rate of {FLAGS.architecture} on {dataset.name}",
        __doc__,
        remarks=remarks,
        tables={"Training loss (nats) by rate; * marks the rates in the basin.": _lines(found)},
        figures={figure: "Training loss of every run against its learning rate, with the basin."},
    )


def _train_command(rate: float) -> str:
    """The command that trains another network at a rate scaled from this one's."""
    given = (FLAGS[name] for name in (*common.settings(), "data_dir") if FLAGS[name].present)
    options = [
        flag.serialize() for flag in given if flag.name not in ("base_architecture", "epochs")
    ]
    base = [f"--base_architecture={FLAGS.architecture}", f"--base_rate={rate:.3g}"]
    return f"python -m experiments.train {shlex.join([*base, *options])} --architecture=…"


def _search(trial, rates: list[float], start: float | None, path: pathlib.Path, options):
    """Searches; each run is a trial of a journal. How many it takes is found on the way.

    Returns what is found, and how many finished runs of the journal it does not take.
    """
    run = functools.partial(recipe.last_loss, data_dir=FLAGS.data_dir)
    with (
        interrupts.announced(runners.WAITING),  # it searches in threads
        Journal.open(
            path, holds={"loss": float | NoneType}, retry_failed=options["retry_failed"]
        ) as journal,
        display.progress("runs", None) as advance,
    ):

        def train(rate: float, seed: int) -> list[float]:
            one = trial | {"rate": rate, "seed": seed}
            record = journal.run(one, run, options.get("executor"))
            runners.check_finished([record], path)
            loss = record["result"]["loss"]
            advance(note=f"rate {rate:.3g}: loss {_loss(math.inf if loss is None else loss)}")
            return [math.inf if loss is None else loss]

        found = archscale.find_learning_rate(
            train,
            rates,
            seeds=range(FLAGS.num_seeds),
            start=start,
            tolerance=FLAGS.tolerance,
            margin=FLAGS.margin,
            refine=FLAGS.refine,
            workers=FLAGS.workers,
        )
        journal.order(trial | {"rate": one.rate, "seed": one.seed} for one in found.runs)
    finished = sum("result" in record for record in journal.latest.values())
    return found, finished - len(found.runs)


def _predicted(settings, network: Network) -> float:
    """Returns the rate that measuring predicts from --base_rate."""
    base = recipe.build_network(settings, FLAGS.base_architecture, network.dataset)
    optimizer = recipe.build_optimizer(settings, 1.0, 1)
    trial = settings | {"seeds": FLAGS.num_seeds}
    sizes = [
        networks.measure_seeds(
            common.measurer(one.graphdef, one.model_state, optimizer), one, trial
        )
        for one in (network, base)
    ]
    return archscale.predict_learning_rate(sizes[0], sizes[1], FLAGS.base_rate)


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
    return NONE if loss is None else number(loss, ".4f", "diverged")


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
    diverged = sorted({run.rate for run in found.runs if not math.isfinite(run.loss)})
    top = axes.get_ylim()[1]
    label = "diverged" if diverged else None
    axes.plot(diverged, [top] * len(diverged), "x", color="#D55E00", label=label)
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
