"""What do deep and branched networks gain from a learning rate scaled from a shallow one?

    python -m experiments.scaling --workdir=runs/scaling

Searches the best rate of the base network on a grid (the largest rate with the smallest training
loss), then trains chains and random DAGs at rates scaled from it by every rule in --rules (`none`
is the unscaled rate). Writes config.json, results.jsonl (a line a trial), table.md, scaling.png and
report.html, and prints the table. A run that was cut off goes on where it stopped, and the same
--workdir takes more rules, networks and seeds later.
"""

import collections
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import optax
from absl import flags
from rich.console import Console

import archscale_jax as archscale
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments import scaling_report
from experiments.lab import common, display, files, page, ranges
from experiments.lab.datasets import Dataset

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
    ranges.RuleName(LEARNING_RATE_RULES),
)
ranges.define("min_rate", 0.01, "Smallest rate of the search on the base network.", "rate")
ranges.define("max_rate", 3.0, "Largest rate of the search.", "rate")
ranges.define("num_rates", 12, "Rates of the search, a log grid.")
ranges.define("search_epochs", 1.0, "Epochs of a trial of the search.", "epochs")
ranges.define("base_rate", None, "Rate of the base network; leave out to search it.", "rate")
ranges.define("num_seeds", 3, "Seeds of every trial.")

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


def run() -> None:
    """Searches, trains what is missing, prints and draws."""
    networks = _networks()
    rules = FLAGS.rules
    if not networks:
        raise ValueError(
            "nothing to train: give a network by --architecture, --chain_depths or --num_random"
        )
    for rule in rules:  # every factor is known to exist before the first step is trained
        for text in networks.values():
            _scale(text, rule)
    rates = [] if FLAGS.base_rate is not None else common.rate_grid()
    dataset = common.load_dataset()
    search_steps = common.count_steps(dataset, FLAGS.search_epochs)
    total_steps = common.count_steps(dataset, FLAGS.epochs)
    base = common.build_network(common.parse_graph(FLAGS.base_architecture), dataset)
    for steps in (search_steps, total_steps):
        common.check_training(base, steps)
    workdir = common.claim_directory(
        FLAGS.workdir, common.settings(sys.argv[0]), extensible=EXTENSIBLE
    )
    journal = workdir / "results.jsonl"

    searched = [(FLAGS.base_architecture, "none", rate) for rate in rates]
    _train_missing(journal, "search", dataset, searched, search_steps)
    records = files.read_records(journal)
    seeds = range(FLAGS.num_seeds)
    base_rate = FLAGS.base_rate or best_rate(
        [r for r in records if r["phase"] == "search" and r["seed"] in seeds]
    )
    trials = [(text, rule, base_rate) for text in networks.values() for rule in rules]
    _train_missing(journal, "transfer", dataset, trials, total_steps)

    transferred = [
        r
        for r in files.read_records(journal)
        if r["phase"] == "transfer" and r["base_rate"] == base_rate and r["seed"] in seeds
    ]
    rows = scaling_report.summarise(
        networks, common.parse_graph, rules, transferred, math.log(dataset.num_classes)
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
    console.print(f"results: {journal}\nfigure:  {figure}\nreport:  {report}", soft_wrap=True)


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


def _scale(text: str, rule: str) -> float:
    base = common.parse_graph(FLAGS.base_architecture)
    return archscale.learning_rate_scale(common.parse_graph(text), base, rule)


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


Trial = tuple[str, str, float]  # DAG string, rule, base rate


def _train_missing(
    journal: pathlib.Path, phase: str, dataset: Dataset, trials: list[Trial], total_steps: int
) -> None:
    """Trains every trial and seed that the journal lacks, and appends a record for each."""
    done = {_identity(record) for record in files.read_records(journal)}
    missing_of = {
        (text, rule): [
            (rate, seed)
            for rate in rates
            for seed in range(FLAGS.num_seeds)
            if (phase, text, rule, rate, seed) not in done
        ]
        for text, rule, rates in _grouped(trials)
    }
    total = len(trials) * FLAGS.num_seeds
    recorded = total - sum(map(len, missing_of.values()))
    with display.progress(f"{phase} trials", total, done=recorded) as advance:
        for (text, rule), missing in missing_of.items():
            for record in _train(dataset, text, rule, missing, total_steps):
                files.append_record(journal, {"phase": phase, **record})
                advance(note=f"{text} by {rule}" if rule != "none" else f"{text} unscaled")


def _identity(record: dict[str, Any]) -> tuple:
    return tuple(record[k] for k in ("phase", "architecture", "rule", "base_rate", "seed"))


def _grouped(trials: list[Trial]) -> Iterator[tuple[str, str, list[float]]]:
    """One entry for each network and rule, which share a compiled program."""
    groups: dict[tuple[str, str], list[float]] = {}
    for text, rule, rate in trials:
        groups.setdefault((text, rule), []).append(rate)
    for (text, rule), rates in groups.items():
        yield text, rule, rates


def _train(
    dataset: Dataset,
    text: str,
    rule: str,
    rates_and_seeds: list[tuple[float, int]],
    total_steps: int,
) -> Iterator[dict[str, Any]]:
    """Trains one network by one rule at base rates and seeds; compiles once."""
    if not rates_and_seeds:
        return
    network = common.build_network(common.parse_graph(text), dataset)
    optimizer = optax.chain(
        optax.inject_hyperparams(lambda rate: common.build_optimizer(rate, total_steps))(rate=1.0),
        archscale.scale_by_architecture(
            network.architecture, common.parse_graph(FLAGS.base_architecture), rule
        ),
    )
    for rate, seed in rates_and_seeds:
        state = common.initial_state(network, optimizer, seed)
        state = state._replace(optimizer_state=optax.tree.set(state.optimizer_state, rate=rate))
        epochs = common.fit(state, dataset, network, optimizer, total_steps)
        _, metrics = collections.deque(epochs, maxlen=1).pop()  # holds one state at a time
        yield {
            "architecture": text,
            "rule": rule,
            "base_rate": rate,
            "seed": seed,
            "rate": rate * _scale(text, rule),
            **metrics,
        }


if __name__ == "__main__":
    common.run_binary(run)
