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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments.lab import common, display, files, page, panels, ranges
from experiments.lab.datasets import Dataset
from experiments.lab.tables import number

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
    results = summarise(networks, transferred, math.log(dataset.num_classes))
    figure = workdir / "scaling.png"
    title = f"{dataset.name}: base rate {base_rate:.3g} tuned on {FLAGS.base_architecture}"
    draw(results, title, figure)
    page.publish(
        workdir,
        f"Gains of scaled learning rates on {dataset.name}",
        __doc__,
        remarks=[
            f"Base rate {base_rate:.3g}, tuned on the network {FLAGS.base_architecture}.",
            *answer(results),
        ],
        tables={
            "What every rule gains over all networks; a seed that diverged counts with the loss of "
            "guessing.": overview(results),
            f"Training loss (nats) and test accuracy: means over {results['seeds'].max()} seeds; "
            "n†: n of them diverged and are left out; group k of a DAG string lists the edges into "
            "vertex k: 0 none, 1 skip, 2 weights.": by_network(results),
        },
        figures={figure: "Training loss of every network under every rule, a mark a seed."},
    )


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


# What they say. Frames have a row for every network and rule, in the order of both.


def summarise(
    networks: Mapping[str, str], records: Sequence[Mapping[str, Any]], guessing: float
) -> pd.DataFrame:
    """Returns what the trainings of every network by every rule ended with, over seeds.

    Args:
      networks: DAG strings by name.
      records: of trainings; other networks are left out.
      guessing: loss of guessing, with which a seed that diverged enters `counted`.
    """
    runs = pd.DataFrame.from_records(list(records))
    runs["diverged"] = runs["diverged"].astype(bool)
    runs["counted"] = runs["train_loss"].astype(float).mask(runs["diverged"], guessing)
    finished = ~runs["diverged"]
    for name in ("train_loss", "test_accuracy"):
        runs[name] = runs[name].astype(float).where(finished)
    rows = []
    for name, text in networks.items():
        for rule, group in runs[runs["architecture"] == text].groupby("rule", sort=False):
            rows.append(
                {
                    "network": name,
                    "architecture": text,
                    "rule": rule,
                    "factor": group["rate"].iloc[0] / group["base_rate"].iloc[0],
                    "diverged": group["diverged"].sum(),
                    "seeds": len(group),
                    "loss": group["train_loss"].mean(),
                    "accuracy": group["test_accuracy"].mean(),
                    "counted": group["counted"].mean(),
                    "losses": group["train_loss"].dropna().tolist(),
                }
            )
    return pd.DataFrame(rows)


def _label(rule: str) -> str:
    return "unscaled" if rule == "none" else rule


def _by_rule(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column by network and rule, both in their order."""
    table = results.pivot(index="network", columns="rule", values=column)
    return table.loc[results["network"].unique(), results["rule"].unique()]


def by_network(results: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for every network: its paths, and of every rule factor, loss and accuracy."""
    rows: dict[str, dict[str, str]] = {}
    for one in results.itertuples(index=False):
        row = rows.setdefault(one.network, {})
        if not row:
            paths = archscale.path_statistics(archscale.dag_graph(one.architecture))
            row |= {"network": one.network, "paths": f"{paths.count}"}
            row["Σ L³"] = f"{paths.depth_cubed_sum}"
        if one.rule != "none":
            row[f"{one.rule} factor"] = f"{one.factor:.3f}"
        diverged = f"{one.diverged}†" if one.diverged else ""
        row[f"{_label(one.rule)} loss"] = diverged + number(one.loss, ".3f")
        row[f"{_label(one.rule)} acc."] = number(one.accuracy, ".3f")
    return pd.DataFrame(list(rows.values()))


def overview(results: pd.DataFrame) -> pd.DataFrame:
    """Returns what every rule gained over all networks."""
    counted = _by_rule(results, "counted")
    rows = []
    for rule in counted.columns:
        own, better = results[results["rule"] == rule], "–"
        if rule != "none" and "none" in counted:
            better = f"{(counted[rule] < counted['none']).sum()} of {len(counted)}"
        rows.append(
            {
                "rule": _label(rule),
                "diverged": f"{own['diverged'].sum()} of {own['seeds'].sum()}",
                "mean loss": f"{counted[rule].mean():.3f}",
                "best on": f"{(counted[rule] == counted.min(axis=1)).sum()}",
                "better than unscaled on": better,
            }
        )
    return pd.DataFrame(rows)


def answer(results: pd.DataFrame) -> list[str]:
    """Returns a sentence a rule: what it saves, and what it gains where nothing needs saving."""
    counted, diverged = _by_rule(results, "counted"), _by_rule(results, "diverged")
    if "none" not in counted:
        return []
    alive = counted[diverged["none"] == 0]
    runs = _by_rule(results, "seeds")["none"].sum()
    return [
        f"Unscaled, {diverged['none'].sum()} of {runs} runs diverged; by {rule}, "
        f"{diverged[rule].sum()}. Where no unscaled run did, {rule} was better on "
        f"{(alive[rule] < alive['none']).sum()} of {len(alive)} networks."
        for rule in counted.columns
        if rule != "none"
    ]


MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(results: pd.DataFrame, title: str, path: pathlib.Path) -> None:
    """Draws training loss of every network under every rule, one mark a seed."""
    names, rules = (list(results[name].unique()) for name in ("network", "rule"))
    width = max(6.5, 0.42 * len(names) + 2.5)
    figure, (panel,) = panels.create_panels(1, 4.2, width=width, columns=1)
    losses = results["losses"].explode().dropna()
    top = 1.5 * losses.max() if len(losses) else 1.5
    for index, rule in enumerate(rules):
        shift = 0.7 * (index - (len(rules) - 1) / 2) / len(rules)
        colour = (panels.GREY, *panels.COLOURS)[index % 7]
        points = []
        for one in results[results["rule"] == rule].itertuples(index=False):
            place = names.index(one.network) + shift
            points += [(place, loss) for loss in one.losses]
            if one.diverged:
                text = f"{one.diverged}×"
                panel.text(place, top, text, color=colour, fontsize=8, ha="center")
        panel.scatter(*zip(*points, strict=True) if points else ([], []), s=18, alpha=0.8,
                      color=colour, marker=MARKERS[index % 6], linewidths=0,
                      label=_label(rule))  # fmt: skip
    panel.set(yscale="log", xlim=(-0.6, len(names) - 0.4), ylabel="training loss (nats)")
    panel.set_ylim(None if len(losses) else top / 10, top * 1.4)  # without a loss: no scale
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    panel.grid(axis="x", visible=False)
    panel.set_title(
        f"{title}\none mark a seed; n× in the top row: seeds that diverged", fontsize=10
    )
    panels.finish(figure, path, columns=len(rules))


if __name__ == "__main__":
    common.run_binary(run)
