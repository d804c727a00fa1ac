"""What do deep and branched networks gain from a learning rate scaled from a shallow one?

    python -m experiments.scaling --workdir=runs/scaling

Searches the best rate of the base network on a grid (the largest rate with the smallest training
loss), then trains chains and random DAGs at rates scaled from it by every rule in --rules (`none`
is the unscaled rate). Writes config.json, results.jsonl (a line a trial), table.md, scaling.png and
report.html, and prints the table. A run that was cut off goes on where it stopped, and the same
--workdir takes more rules, networks and seeds later.
"""

import functools
import math
import pathlib
import statistics
import sys
from types import NoneType
from typing import Any

from absl import flags
from rich.console import Console

import archscale_jax as archscale
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments import scaling_report
from experiments.lab import common, display, files, page, ranges, recipe, runners
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS

common.define_flags(batch_size=32, epochs=5, workdir="runs/scaling")
flags.adopt_module_key_flags(common)
ranges.define_multi(
    "architecture",
    None,
    "DAG string of a network; repeat the flag for several, beside the others.",
)
ranges.define_list(
    "chain_depths", ["2", "4", "6", "8"], "Depths of plain chains.", "depth", least=0
)
ranges.define("num_random", 4, "Number of random DAGs.")
ranges.define("random_vertices", 7, "Vertices of a random DAG.")
ranges.define("random_seed", 0, "Seed of the random DAGs.", "seed")
ranges.define_list(
    "rules",
    ["none", "path_sum"],
    "Learning-rate rules to compare.",
    ranges.name_of("learning-rate rule", LEARNING_RATE_RULES),
)
ranges.define("min_rate", 0.01, "Smallest rate of the search on the base network.", "rate")
ranges.define("max_rate", 3.0, "Largest rate of the search.", "rate")
ranges.define("num_rates", 12, "Rates of the search, a log grid.")
ranges.define("search_epochs", 1.0, "Epochs of a trial of the search.", "epochs")
ranges.define("base_rate", None, "Rate of the base network; leave out to search it.", "rate")
ranges.define("num_seeds", 3, "Seeds of every trial.")
runners.define_flags(workers=1)

EXTENSIBLE = (
    "architecture",
    "chain_depths",
    "num_random",
    "num_seeds",
    "random_seed",
    "random_vertices",
    "rules",
)
"""Flags that only say which trials a study has; results of the others stay valid."""
HOLDS = {"rate": float, "train_loss": float | NoneType, "test_accuracy": float, "diverged": float}
"""What the report takes of a trial."""


def run() -> None:
    """Searches, trains what is missing, prints and draws."""
    networks = _networks()
    rules, settings = FLAGS.rules, common.settings()
    if not networks:
        raise ValueError(
            "nothing to train: give a network by --architecture, --chain_depths or --num_random"
        )
    parse = functools.partial(recipe.parse_graph, settings)
    for rule in rules:  # every factor is known to exist before the first step is trained
        for text in networks.values():
            archscale.learning_rate_scale(parse(text), parse(FLAGS.base_architecture), rule)
    rates = []
    if FLAGS.base_rate is None:
        rates = common.rate_grid(FLAGS.min_rate, FLAGS.max_rate, FLAGS.num_rates)
    dataset = recipe.load_dataset(FLAGS.dataset, FLAGS.data_dir)
    display.note(f"{dataset!r}")
    base = recipe.build_network(settings, FLAGS.base_architecture, dataset)
    steps = {}
    for phase, epochs in {
        "search": FLAGS.search_epochs,
        "transfer": settings.pop("epochs"),
    }.items():
        steps[phase] = recipe.count_steps(settings, dataset, epochs)
        recipe.check_training(settings, base, steps[phase])
    with runners.runner() as options:
        workdir = common.claim_directory(
            FLAGS.workdir, common.settings(sys.argv[0]), extensible=EXTENSIBLE
        )
        journal = workdir / "results.jsonl"
        base_rate, transferred = _train(settings, networks, rates, steps, journal, options)

    rows = scaling_report.summarise(
        networks, parse, rules, transferred, math.log(dataset.num_classes)
    )
    title = f"{dataset.name}: base rate {base_rate:.3g} tuned on {FLAGS.base_architecture}"
    table = scaling_report.table(rows, rules, title)
    console = Console()
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    answer = scaling_report.answer(rows, rules)
    console.print(table, scaling_report.overview_table(rows, rules), *answer, "", sep="\n")
    markdown = scaling_report.markdown(rows, rules, title)
    files.write_text(workdir / "table.md", markdown)
    figure = workdir / "scaling.png"
    scaling_report.draw(rows, rules, title, figure)
    report = page.write(
        workdir,
        f"Gains of scaled learning rates on {dataset.name}",
        __doc__,
        remarks=[
            f"Base rate {base_rate:.3g}, tuned on the network {FLAGS.base_architecture}.",
            *answer,
        ],
        tables={
            f"What every rule gains {scaling_report.OVERVIEW}.":
                scaling_report.overview(rows, rules),
            f"Training loss (nats) and test accuracy: {scaling_report.caption(rows, rules)}.":
                scaling_report.by_network(rows, rules),
        },
        figures={figure: "Training loss of every network under every rule, a mark a seed."},
    )  # fmt: skip
    print(f"results: {journal}\nfigure:  {figure}\nreport:  {report}")


def _networks() -> dict[str, str]:
    """Returns the DAG strings to train by their names, each string once."""
    names: dict[str, str] = {}
    for depth in FLAGS.chain_depths:
        names.setdefault(chain_string(int(depth)), f"chain {depth}")
    for text in FLAGS.architecture or []:
        names.setdefault(text, text)
    wanted = len(names) + FLAGS.num_random
    last = FLAGS.random_seed  # seed of the newest one; a thousand others without one are enough
    for seed in range(FLAGS.random_seed, FLAGS.random_seed + 100 * FLAGS.num_random):
        if len(names) == wanted or seed > last + 1000:
            break
        text = random_dag_string(seed, FLAGS.random_vertices)
        last = last if text in names else seed
        names.setdefault(text, text)
    if len(names) < wanted:
        raise ValueError(
            f"found too few different DAGs of --random_vertices={FLAGS.random_vertices} for "
            f"--num_random={FLAGS.num_random}; ask for more vertices or fewer DAGs"
        )
    return {name: text for text, name in names.items()}


def best_rate(records: list[dict[str, Any]]) -> float:
    """Returns the largest rate with the smallest training loss, mean over seeds [AAS protocol].

    Raises:
      ValueError: no rate has a finite loss.
    """
    losses: dict[float, list[float]] = {}
    for record in records:
        loss = record["train_loss"]  # None where it was not finite
        losses.setdefault(record["base_rate"], []).append(math.inf if loss is None else loss)
    means = {rate: statistics.fmean(values) for rate, values in losses.items()}
    smallest = min((mean for mean in means.values() if math.isfinite(mean)), default=None)
    if smallest is None:
        raise ValueError(
            f"the base network has no finite loss at any rate from {min(means)} to {max(means)}; "
            "lower --min_rate"
        )
    return max(rate for rate, loss in means.items() if loss == smallest)


def _train(
    settings: dict[str, Any],
    networks: dict[str, str],
    rates: list[float],
    steps: dict[str, int],
    journal: pathlib.Path,
    options: dict[str, Any],
) -> tuple[float, list[dict[str, Any]]]:
    """Searches, and trains the networks; returns the base rate, and what came of the networks."""

    def study(trials: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
        run_trial = functools.partial(recipe.last_metrics, data_dir=FLAGS.data_dir)
        records = run_study(
            trials, run_trial, journal, holds=HOLDS, description=f"{phase} trials", **options
        )
        runners.check_finished(records, journal)
        return [one["trial"] | one["result"] for one in records]

    def trials_of(phase: str, text: str, rule: str, rate: float) -> list[dict[str, Any]]:
        trial = {"phase": phase, "architecture": text, "rule": rule, "base_rate": rate}
        trial |= settings | {"steps": steps[phase]}
        return [trial | {"seed": seed} for seed in range(FLAGS.num_seeds)]

    searched = []
    for rate in rates:
        searched += trials_of("search", FLAGS.base_architecture, "none", rate)
    base_rate = FLAGS.base_rate or best_rate(study(searched, "search"))
    trials = list(searched)
    for text in networks.values():
        for rule in FLAGS.rules:
            trials += trials_of("transfer", text, rule, base_rate)
    return base_rate, study(trials, "transfer")[len(searched) :]


if __name__ == "__main__":
    common.run_binary(run)
