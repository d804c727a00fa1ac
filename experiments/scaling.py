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
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._spaces import chain_string, random_dag_string
from archscale_jax.rules import LEARNING_RATE_RULES
from experiments.lab import common, display, page, panels, ranges, recipe, runners
from experiments.lab.sweeps import run_study
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
    ["none", "path_sum_activations"],
    "Learning-rate rules to compare.",
    ranges.RuleName(LEARNING_RATE_RULES),
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
    for rule in rules:  # every multiplier is known to exist before the first step is trained
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

    results = summarise(networks, transferred, math.log(dataset.num_classes))
    at_the_end = base_rate in (*rates[:1], *rates[-1:])
    figure = workdir / "scaling.png"
    draw(results, figure)
    page.publish(
        workdir,
        f"Gains of scaled learning rates on {dataset.name}",
        __doc__,
        remarks=[
            f"Base rate {base_rate:.3g}, tuned on the network {FLAGS.base_architecture}.",
            *[common.cut_by_the_grid("The base rate")] * at_the_end,
            *answer(results),
        ],
        tables={
            "What every rule gains over all networks; a seed that diverged counts with the loss of "
            "guessing.": overview(results),
            f"Training loss (nats) and test accuracy: means over {results['seeds'].max()} seeds; "
            "n†: n of them diverged and are excluded; group k of a DAG string lists the edges into "
            "vertex k: 0 none, 1 skip, 2 weights.": by_network(results),
        },
        figures={
            figure: "Training loss of every network under every rule over that unscaled, a mark a "
            "network: the mean of its seeds; of those that diverged it is the loss of guessing."
        },
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


# What they say. Frames have a row for every network and rule, in the order of both.


def summarise(
    networks: Mapping[str, str], records: Sequence[Mapping[str, Any]], guessing: float
) -> pd.DataFrame:
    """Returns what the trainings of every network by every rule ended with, over seeds.

    Args:
      networks: DAG strings by name.
      records: of trainings; other networks are ignored.
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
                    "multiplier": group["rate"].iloc[0] / group["base_rate"].iloc[0],
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
    """Returns a row for every network: its paths; multiplier, loss and accuracy by rule."""
    rows: dict[str, dict[str, str]] = {}
    for one in results.itertuples(index=False):
        row = rows.setdefault(one.network, {})
        if not row:
            paths = archscale.path_statistics(archscale.dag_graph(one.architecture))
            row |= {"network": one.network, "paths": f"{paths.count}"}
            row["Σ L³"] = f"{paths.depth_cubed_sum}"
        if one.rule != "none":
            row[f"{one.rule} multiplier"] = f"{one.multiplier:.3f}"
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


def draw(results: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws the loss of every network under each rule over that unscaled, or under the first."""
    from matplotlib.ticker import LogLocator, NullLocator

    counted, diverged = _by_rule(results, "counted"), _by_rule(results, "diverged")
    first = "none" if "none" in counted else counted.columns[0]
    rules = [rule for rule in counted.columns if rule != first] or [first]
    ends = counted.min(axis=None) / 1.05, counted.max(axis=None) * 1.05
    figure, drawn = panels.create_panels(len(rules), 2.7, width=2.7, columns=2, sharex=True,
                                         sharey=True)  # fmt: skip
    chains = counted.index.str.startswith("chain")
    for panel, rule in zip(drawn, rules, strict=True):
        panel.axline((ends[0],) * 2, (ends[1],) * 2, color=panels.GREY, lw=0.8)
        lost = (diverged[first] + diverged[rule] > 0).to_numpy()
        for kind, which, marker in (("chain", chains, "o"), ("graph", ~chains, "^")):
            for ending, seeds, face in (("", ~lost, True), (", seeds diverged", lost, False)):
                x, y = (counted[name][which & seeds] for name in (first, rule))
                colour = panels.COLOURS[kind != "chain"]
                panel.scatter(x, y, s=22, marker=marker, linewidths=1, edgecolors=colour,
                              facecolors=colour if face else "none",
                              label=f"{kind}{ending}")  # fmt: skip
        lower = (counted[rule] < counted[first]).sum()
        panel.set_title(f"{_label(rule)}: lower on {lower} of {len(counted)}", fontsize=9)
        panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    panels.finish(figure, path, across=f"training loss {_label(first)} (nats)",
                  up="under the rule (nats)", columns=2)  # fmt: skip


if __name__ == "__main__":
    common.run_binary(run)
