"""Does learning the scale of every tensor before training help? GradInit and NIO, and rules.

    python -m experiments.gradinit --workdir=runs/gradinit

Draws every network by two initializations, learns multipliers on each, measures, and trains over a
range of learning rates without warm-up. Writes config.json, results.jsonl, multipliers.json,
table.md, figures and report.html, and prints the answer. Killed and started again it runs what is
missing; the same --workdir takes more networks later. At the paper's size: --dataset=cifar10
--network=plain_19,plain_19_norm,residual_54,residual_54_norm --images_downscale=1 --images_width=64
--batch_size=128 --gradinit_steps=390 --steps=78000.
"""

import functools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import flags

import archscale_jax as archscale
from experiments import gradinit_study
from experiments.gradinit_study import BASES, parse_name
from experiments.lab import common, files, networks, page, panels, ranges, runners, studies
from experiments.lab.data_flags import define_data_flags
from experiments.lab.panels import Figure
from experiments.lab.sweeps import run_study
from experiments.lab.tables import NONE, number, spread

FLAGS = flags.FLAGS

ranges.define_list(
    "network",
    [
        *("plain_6", "plain_12", "plain_24", "plain_12_norm"),
        *("residual_3", "residual_9", "residual_18", "residual_9_norm"),
        *("dag_1", "dag_5"),
        *("transformer_2", "transformer_6", "transformer_12"),
    ],
    f"FAMILY_DEPTH, or FAMILY_DEPTH_norm, of {', '.join(gradinit_study.NETWORKS)}.",
    ranges.Checked(gradinit_study.parse_name, "FAMILY_DEPTH"),
)
ranges.define_list(
    "learned",
    list(gradinit_study.LEARNED),
    f"What is learned before training, of {', '.join(gradinit_study.LEARNED)}.",
    ranges.name_of("method", gradinit_study.LEARNED),
)
define_data_flags("fashion_mnist")
ranges.define("images_width", 8, "Channels of a convolution's first stage.", "width")
ranges.define("images_downscale", 2, "Side of the squares averaged first.", "downscale")
ranges.define("patches_width", 32, "Features of a transformer.", "width")
ranges.define("patches_downscale", 1, "The same for a transformer.", "downscale")
ranges.define("batch_size", 32, "Examples an update, even.", "batch_size_of_two")
ranges.define("steps", 250, "Updates of a training run.")
ranges.define("test_examples", 4000, "Test examples of the accuracy.")
ranges.define("gradinit_steps", 120, "Iterations of GradInit.", "steps")
ranges.define("scale_rate", 0.03, "Learning rate of the multipliers.", "rate")
ranges.define("sgd_rate", 0.1, "GradInit's step for SGD.", "rate")
ranges.define("sgd_norm", 1.0, "GradInit's largest gradient norm for SGD, L2.", "norm")
ranges.define("adam_rate", 1e-3, "GradInit's step for Adam.", "rate")
ranges.define("adam_norm", 1000.0, "GradInit's largest gradient norm for Adam, L1.", "norm")
ranges.define("penalty", 10.0, "Weight of the variant with a penalty.")
ranges.define("num_seeds", 3, "Seeds.")
flags.DEFINE_string("workdir", "runs/gradinit", "Folder for config, results and figures.")
runners.define_flags(workers=1)

NOT_SETTINGS = ("data_dir", "learned", "network", "num_seeds", "workdir")


def run() -> None:
    """Runs what is missing, prints and draws."""
    every = studies.flag_values()
    trials = gradinit_study.all_trials(FLAGS.network, every)
    gradinit_study.check_trials(trials, FLAGS.data_dir)
    settings = {name: value for name, value in every.items() if name not in NOT_SETTINGS}
    run_trial = functools.partial(gradinit_study.run, data_dir=FLAGS.data_dir)
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
    _report(records, workdir)


def _report(records: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    learned = {
        record["hash"]: {
            **{key: record["trial"][key] for key in ("network", "start", "learned", "seed")},
            "multipliers": record["result"]["record"]["multipliers"],
        }
        for record in records
        if "record" in record.get("result", {})
    }
    files.write_json(workdir / "multipliers.json", learned)
    every = methods(records)
    page.publish(
        workdir,
        f"GradInit on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        remarks=[*answer(every), *studies.failures(records)],
        tables={
            "Each network at its best rate: mean and deviation over seeds.": table(every),
            "What learning the scales changes, seed by seed.": gains(every),
        },
        figures=panels.draw_figures(FIGURES, every, workdir, height=2.5, width=2.9, columns=4),
    )


# What they say.

TRAINED = 1.5
"""A run trains if its loss ends below so many nats; guessing among ten classes is 2.3."""
LAST = 2
"""Tenths of the training over which the final loss is the mean."""


class Method(NamedTuple):
    """One network, start and way of learning, over rates and seeds.

    Attributes:
      results: of `gradinit_study.run`, one a seed.
      search: final training losses of all rates; see `archscale_jax.tuning.summarise_runs`.
    """

    network: str
    start: str
    learned: str
    results: list[Mapping[str, Any]]
    search: archscale.tuning.RateSearch


Methods = Mapping[tuple[str, str, str], Method]


def methods(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], Method]:
    """Groups the finished trials; the method of a failed trial misses its seed."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if "result" in record:
            trial = record["trial"]
            key = (trial["network"], trial["start"], trial["learned"])
            found.setdefault(key, []).append(record)
    return {key: _method(key, of_method) for key, of_method in found.items()}


def _method(key: tuple[str, str, str], records: Sequence[Mapping[str, Any]]) -> Method:
    runs = [
        archscale.tuning.Run(run["rate"], record["trial"]["seed"], final_loss(run))
        for record in records
        for run in record["result"]["runs"]
    ]
    results = [record["result"] for record in records]
    return Method(*key, results, archscale.tuning.summarise_runs(runs))


def final_loss(run: Mapping[str, Any]) -> float:
    """Mean training loss over the last tenths; inf where it was not finite."""
    if run["accuracy"] is None or None in run["losses"]:
        return math.inf
    return float(np.mean(run["losses"][-LAST:]))


def best_rate(method: Method) -> float:
    """The rate with the smallest mean loss among those that were trained at."""
    losses = archscale.tuning.mean_losses(method.search)
    return min(losses, key=lambda rate: losses[rate])


def best_runs(method: Method) -> list[Mapping[str, Any]]:
    """The run of every seed at the best rate."""
    best = best_rate(method)
    return [next(run for run in result["runs"] if run["rate"] == best) for result in method.results]


def trained_rates(method: Method) -> list[float]:
    """The rates at which all seeds train."""
    worst = pd.DataFrame(method.search.runs).groupby("rate", sort=False)["loss"].max()
    return [rate for rate, loss in worst.items() if loss < TRAINED]


def predicted_rate(method: Method, every: Methods) -> float | None:
    """The rate by the rule `measured` from the best rate of the family's base, if that was run."""
    base_name = BASES[parse_name(method.network).family]
    base = next((one for one in every.values() if one.network == base_name), None)
    if base is None or base is method:
        return None
    try:
        return archscale.predict_learning_rate(_measured(method), _measured(base), base.search.rate)
    except ValueError:  # a vertex that tells no examples apart
        return None


def _measured(method: Method) -> archscale.tuning.UpdateSize:
    measured = [result["measured"] for result in method.results]
    return networks.sizes_of({name: [one[name] for one in measured] for name in measured[0]})


def table(every: Methods) -> pd.DataFrame:
    """Returns a row for every method."""
    rows = []
    for method in every.values():
        runs = best_runs(method)
        losses = [final_loss(run) for run in runs]
        accuracies = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
        rates = trained_rates(method)
        predicted = predicted_rate(method, every)
        rows.append(
            {
                "network": method.network,
                "start": method.start,
                "GradInit": {"none": NONE, "gradinit": "yes"}.get(method.learned, method.learned),
                "best rate": f"{best_rate(method):.3g}",
                "final loss": spread(losses, ".3f") if max(losses) < math.inf else "diverged",
                "test accuracy": (spread(accuracies) if accuracies else "diverged") + " %",
                "trains at": f"{min(rates):.3g} to {max(rates):.3g}" if rates else "none",
                "measured rate": number(predicted, ".2g"),
                "costs": _cost(method, predicted),
            }
        )
    return pd.DataFrame(rows)


def _cost(method: Method, rate: float | None) -> str:
    """By how much the loss at a rate exceeds that at the best."""
    if rate is None:
        return NONE
    losses = archscale.tuning.mean_losses(method.search)
    excess = archscale.tuning.loss_at(rate, losses) - min(losses.values())
    return number(excess, "+.3f", missing="diverged")


def compared(every: Methods) -> Iterator[tuple[Method, Method]]:
    """Yields each way of learning beside the same start without it, of as many seeds."""
    for (network, start, learned), method in every.items():
        plain = every.get((network, start, "none"))
        if learned != "none" and plain is not None and len(plain.results) == len(method.results):
            yield method, plain


def changes(method: Method, plain: Method) -> list[float]:
    """By how much learning changes the final loss at the best rate of either, seed by seed."""
    pairs = zip(best_runs(method), best_runs(plain), strict=True)
    return [final_loss(new) - final_loss(old) for new, old in pairs]


def answer(every: Methods) -> list[str]:
    """Returns a sentence for every way of learning: on how many starts of networks it helps."""
    found: dict[str, list[list[float]]] = {}
    for method, plain in compared(every):
        found.setdefault(method.learned, []).append(changes(method, plain))
    lines = []
    for learned, starts in found.items():
        helped = sum(max(one) < 0 for one in starts)
        harmed = sum(min(one) > 0 for one in starts)
        median = np.median([np.mean(one) for one in starts])
        lines.append(
            f"{learned} helps on {helped} of {len(starts)} starts of networks: the final loss at "
            f"the best rate falls with every seed; on {harmed} it rises with every seed. The "
            f"median change is {number(float(median), '+.3f', 'not finite')} nats."
        )
    if any(len(one) == 1 for starts in found.values() for one in starts):
        lines.append("Of one seed, as here, noise alone lets a loss fall or rise.")
    return lines


def gains(every: Methods) -> pd.DataFrame:
    """Returns what each way of learning changes, at the best rate of either, seed by seed."""
    rows = []
    for method, plain in compared(every):
        pairs = zip(best_runs(method), best_runs(plain), strict=True)
        points = [100 * ((new["accuracy"] or 0) - (old["accuracy"] or 0)) for new, old in pairs]
        costs = [_cost(one, predicted_rate(one, every)) for one in (plain, method)]
        rows.append(
            {
                "network": method.network,
                "start": method.start,
                "learned": method.learned,
                "loss": _signed(changes(method, plain), "+.3f"),
                "accuracy, points": _signed(points, "+.1f"),
                "rates that train": f"{len(trained_rates(plain))} → {len(trained_rates(method))}",
                "measured rate costs": " → ".join(costs),
            }
        )
    return pd.DataFrame(rows)


def _signed(values: Sequence[float], spec: str) -> str:
    mean, low, high = (format(one, spec) for one in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


# Figures [GradInit, Fig. 1, 3 and 5].

COLOURS = {"flax": "#777777", "he": "#0072B2", "topology": "#D55E00"}
GUESS = math.log(10)


def by_network(methods: Methods) -> dict[str, list[Method]]:
    """The methods of networks on which GradInit was run, without its variants."""
    networks: dict[str, list[Method]] = {}
    for method in methods.values():
        if method.learned in ("none", "gradinit"):
            networks.setdefault(method.network, []).append(method)
    both = {"none", "gradinit"}
    return {
        name: one for name, one in networks.items() if {method.learned for method in one} == both
    }


def _style(method: Method) -> dict[str, object]:
    learned = method.learned == "gradinit"
    return {
        "color": COLOURS[method.start],
        "linestyle": "-" if learned else ":",
        "marker": "o" if learned else "x",
        "markersize": 3.5,
        "linewidth": 1.4,
        "label": f"{method.start}{', GradInit' if learned else ''}",
    }


def _draw_success(panel, methods: Sequence[Method]) -> None:
    """The final training loss against the learning rate, mean and range over seeds."""
    rates = [run["rate"] for run in methods[0].results[0]["runs"]]
    for method in methods:
        losses = [[final_loss(run) for run in each["runs"]] for each in method.results]
        shown = np.minimum(losses, 1.05 * GUESS)
        panel.plot(rates, shown.mean(0), **_style(method))
        panel.fill_between(
            rates, shown.min(0), shown.max(0), color=COLOURS[method.start], alpha=0.13, lw=0
        )
    panel.axhline(GUESS, color="black", linewidth=0.6)
    panels.plain_sizes(panel, rates, fontsize=6.5, rotation=30)


def _draw_curves(panel, methods: Sequence[Method]) -> None:
    """The training loss over the training at the best rate of every method."""
    for method in methods:
        curves = [run["losses"] for run in best_runs(method)]
        if any(None in curve or len(curve) != len(curves[0]) for curve in curves):
            continue
        parts = (np.arange(len(curves[0])) + 0.5) / len(curves[0]) * 100
        panel.plot(parts, np.mean(curves, axis=0), **_style(method) | {"marker": None})


def _learned(methods: Methods) -> dict[str, list[Method]]:
    """The methods with GradInit alone."""
    return {
        name: [method for method in found if method.learned == "gradinit"]
        for name, found in by_network(methods).items()
    }


def _weights(names: Iterable[str]) -> list[str]:
    """The names of weights, without those of biases: stem first, readout last, as data flow."""
    places = {"stem": 0, "positions": 0, "readout": 2}
    found = (name for name in names if not name.endswith("bias"))
    return sorted(found, key=lambda name: places.get(name.split("/")[0], 1))


def _draw_multipliers(panel, methods: Sequence[Method]) -> None:
    """The multipliers of weights, from stem to readout."""
    from matplotlib import ticker

    for method in methods:
        records = [each["record"]["multipliers"] for each in method.results]
        names = _weights(records[0])
        for scale, marker in ((False, "o"), (True, "^")):
            places = [i for i, one in enumerate(names) if one.endswith("scale") == scale]
            values = [[record[names[i]] for i in places] for record in records]
            if places:
                panel.plot(
                    np.array(places) / (len(names) - 1),
                    np.mean(values, axis=0),
                    marker,
                    color=COLOURS[method.start],
                    markersize=3.2,
                    alpha=0.8,
                    label=f"{method.start}{', scales of normalization' if scale else ''}",
                )
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set(yscale="log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_gradients(panel, methods: Sequence[Method]) -> None:
    """The gradient's deviation over batches by the weight's size, before and after."""
    for method in methods:
        for key, learned in (("tensors", "none"), ("tensors_after", "gradinit")):
            names = _weights(method.results[0][key])
            sizes = np.array([[each[key][one] for one in names] for each in method.results])
            ratio = np.exp(np.mean(np.log(sizes[..., 1] / sizes[..., 0]), axis=0))
            places = np.arange(len(names)) / (len(names) - 1)
            panel.plot(places, ratio, **_style(method._replace(learned=learned)))
    panel.set(yscale="log")


_PLACE = "place in the network, stem to readout"
FIGURES = {
    "success": Figure(
        by_network,
        _draw_success,
        "learning rate",
        "final training loss, nats (line: guessing)",
        "Final training loss against the learning rate: mean and range over seeds.",
        {"sharey": True},
    ),
    "curves": Figure(
        by_network,
        _draw_curves,
        "percent of the training",
        "training loss at the best rate, nats",
        "Training loss over the training, at the best rate of every start.",
        {"sharey": True},
    ),
    "multipliers": Figure(
        _learned,
        _draw_multipliers,
        _PLACE,
        "multiplier",
        "Multipliers of the weights without biases, from stem to readout.",
    ),
    "gradients": Figure(
        _learned,
        _draw_gradients,
        _PLACE,
        "deviation of the gradient / size of the weight",
        "Deviation of the gradient over batches by the size of the weight.",
    ),
}


if __name__ == "__main__":
    common.run_binary(run)
