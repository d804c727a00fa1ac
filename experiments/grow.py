"""Do networks that grow where they lack expressivity find a good architecture by themselves?

    python -m experiments.grow --workdir=runs/grow

Grows perceptrons, convolutional networks on graphs and ResNet-18 from tiny ones, by TINY with three
ways for the learning rate to follow, by GradMax and at random; trains the architecture that TINY
ended with from scratch for the same computation, and the large network. Writes config.json,
results.jsonl, table.md, figures and report.html, and prints the answer. Killed and started again it
goes on, a network that grows from its last growth; the same --workdir takes more networks, methods
and seeds later. ResNet-18 at the paper's size: --dataset=cifar10 --network=resnet18_sixteenth
--images_downscale=1 --start_width=1 --large_width=64 --growths=6 --interval=2000 --steps=60000
--batch_size=128.
"""

import functools
import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import flags

from experiments import grow_study
from experiments.grow_study import GROWING, METHODS, NETWORKS, SPECS
from experiments.lab import common, page, panels, ranges, runners, studies, tables
from experiments.lab.data_flags import define_data_flags
from experiments.lab.panels import Figure
from experiments.lab.sweeps import run_study
from experiments.lab.tables import NONE, spread

FLAGS = flags.FLAGS

ranges.define_list(
    "network",
    ["mlp", "mlp_largest", "dag_cnn", "resnet18_sixteenth", "resnet18_quarter"],
    "Networks that grow.",
    ranges.name_of("network", grow_study.SPECS),
)
ranges.define_list(
    "arm",
    list(grow_study.METHODS),
    "Ways to grow, and what they are compared with.",
    ranges.name_of("arm", grow_study.METHODS),
)
define_data_flags("fashion_mnist")
ranges.define("batch_size", 64, "Examples an update.")
flags.DEFINE_bool("normalize", True, "Bring new neurons to the size of the others first.")
ranges.define("num_seeds", 3, "Seeds.")
ranges.define(
    "images_downscale", None, "Side of the squares averaged first; None: preset.", "downscale"
)
ranges.define("start_width", None, "Channels or neurons at the start; None: preset.", "width")
ranges.define("large_width", None, "The same of the large network; None: preset.", "width")
ranges.define("growths", None, "How many growths; None: preset.")
ranges.define("interval", None, "Updates before each growth; None: preset.", "steps")
ranges.define("steps", None, "Updates in all; None: preset.")
ranges.define_list("rate", None, "Learning rates; None: preset.", "rate")
flags.DEFINE_string("workdir", "runs/grow", "Folder for config, results and figures.")
runners.define_flags(workers=1)

NOT_SETTINGS = ("arm", "data_dir", "network", "num_seeds", "rate", "workdir")


def run() -> None:
    """Trains what is missing, prints and draws."""
    every = studies.flag_values()
    specs = grow_study.chosen_specs(FLAGS.network, FLAGS.arm, every)
    settings = {name: value for name, value in every.items() if name not in NOT_SETTINGS}
    trials = grow_study.all_trials(specs, FLAGS.arm, every)
    if not trials:
        raise ValueError(f"--arm={','.join(FLAGS.arm)} trains none of --network; add tiny")
    studies.check_trials(trials, FLAGS.data_dir, "--images_downscale", held_out=grow_study.HELD_OUT)
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        options |= {"checkpoints": workdir / "checkpoints"}
        run_trial = functools.partial(grow_study.run, data_dir=FLAGS.data_dir)
        records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
        if "scratch" in FLAGS.arm:
            trials += grow_study.scratch_trials(records)
            records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
    studies.failures(records)
    _report(records, workdir)


def _report(records: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    runs = runs_of(records)
    page.publish(
        workdir,
        f"Growing networks on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        remarks=answer(runs),
        tables={
            "Every way of growing at its best rate.": table(runs),
            "TINY minus what it is compared with, by seed.": against(runs),
            "What the rules for the rate change: with minus without.": rescaling(runs),
            "Runs that failed, which are in no other table.": failures(records),
        },
        figures=draw(runs, workdir),
    )


# Tables: a run that diverged counts as guessing, and deviations over seeds are those of a sample.

GUESSES = {"cifar100": 1 / 100, "imagenet16_120": 1 / 120}
"""Accuracy of a guess where classes are not ten."""
LABELS = {
    "tiny": "TINY",
    "tiny_update": "TINY with δW*",
    "tiny_width": "TINY, rate by width",
    "tiny_measured": "TINY, rate by measured change",
    "gradmax": "GradMax",
    "random": "random neurons",
    "large": "large from the start",
    "scratch": "TINY's architecture from scratch",
}
SHARED = {
    "mlp_largest": ("mlp", ("gradmax", "random", "large")),
    "resnet18_quarter": ("resnet18_sixteenth", ("large",)),
}
"""Networks that are compared with methods of another network."""

COLUMNS = ("spec", "arm", "rate", "seed", "accuracy", "diverged", "parameters", "flops",
           "growth_flops", "edits", "curve")  # fmt: skip


def runs_of(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the ends of the finished trials, in the order of networks, methods, rates and seeds.

    The accuracy of a run that diverged is that of a guess, and `diverged` is true.
    """
    networks = list(NETWORKS)
    specs = sorted(SPECS, key=lambda spec: networks.index(SPECS[spec]["network"]))
    rows = []
    for record in records:
        if "result" in record:
            row = {**record["trial"], **record["result"]}
            row["diverged"] = row["accuracy"] is None
            if row["diverged"]:
                row["accuracy"] = GUESSES.get(row["dataset"], 0.1)
            rows.append({name: row[name] for name in COLUMNS})
    places = {name: place for names in (specs, METHODS) for place, name in enumerate(names)}
    rows.sort(key=lambda row: (places[row["spec"]], places[row["arm"]], row["rate"], row["seed"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def by_method(runs: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Returns the runs of every network and method."""
    return {
        (spec, method): one for (spec, method), one in runs.groupby(["spec", "arm"], sort=False)
    }


def best_rate(runs: pd.DataFrame) -> float:
    """The rate of best mean accuracy over seeds, among a method's rates with the most seeds."""
    by_rate = runs.groupby("rate")["accuracy"].agg(["size", "mean"])
    return by_rate["mean"][by_rate["size"] == by_rate["size"].max()].idxmax()


def at_rate(runs: pd.DataFrame, rate: float) -> pd.DataFrame:
    """The runs of a method at a rate."""
    return runs[runs["rate"] == rate]


def reference(runs: pd.DataFrame, spec: str, method: str) -> pd.DataFrame:
    """The runs that a network is compared with: its own, or those of the network it shares with."""
    own = runs[(runs["spec"] == spec) & (runs["arm"] == method)]
    other, shared = SHARED.get(spec, (spec, ()))
    if own.empty and method in shared:
        return runs[(runs["spec"] == other) & (runs["arm"] == method)]
    return own


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for every method at its best rate."""
    rows = []
    for (spec, method), every in by_method(runs).items():
        rate = best_rate(every)
        best = at_rate(every, rate)
        share = 100 * (best["growth_flops"] / best["flops"]).mean()
        diverged = best["diverged"].sum()
        rows.append(
            {
                "network": spec,
                "method": LABELS[method],
                "rate": f"{rate:g}",
                "test accuracy, %": spread(100 * best["accuracy"], "z.1f", ddof=1),
                "parameters": f"{best['parameters'].mean():,.0f}",
                "training, GFLOP": _figures(best["flops"].mean() / 1e9),
                "of it growing, %": f"{share:.0f}" if method in GROWING else NONE,
                "seeds": f"{len(best)}{f', {diverged} diverged' if diverged else ''}",
            }
        )
    return pd.DataFrame(rows)


def failures(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns which runs ended with an error, and are in no other table: how many, and the first.

    A neuron group whose gradients are all 0 cannot grow, for example.
    """
    errors: dict[tuple[str, str], list[str | None]] = {}
    for record in records:
        key = (record["trial"]["spec"], record["trial"]["arm"])
        errors.setdefault(key, []).append(record.get("error"))
    rows = []
    for (spec, method), found in errors.items():
        failed = [error for error in found if error is not None]
        if failed:
            count = f"{len(failed)} of {len(found)}"
            rows.append((spec, LABELS[method], count, failed[0]))
    return pd.DataFrame(rows, columns=["network", "method", "failed", "first error"])


def answer(runs: pd.DataFrame) -> list[str]:
    """Returns a sentence for every network: whether growing beats its own end from scratch."""
    lines = []
    for (spec, name), tiny in by_method(runs).items():
        scratch = reference(runs, spec, "scratch")
        if name != "tiny" or scratch.empty:
            continue
        points = _pairs(*(at_rate(one, best_rate(one)) for one in (tiny, scratch)))["points"]
        if not len(points):
            lines.append(f"{spec}: TINY and its architecture from scratch have no seed in common.")
            continue
        side = "ahead of" if points.mean() > 0 else "behind"
        size = spread(points if points.mean() > 0 else -points, "z.1f", ddof=1)
        lines.append(
            f"{spec}: TINY ends {size} points {side} the architecture that it grew, trained from "
            f"scratch for as many operations ({_seeds(len(points))})."
        )
    return lines


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def rescaling(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns what the rules for the rate change: accuracy with a rule minus without, by seed."""
    rows, methods = [], by_method(runs)
    for (spec, name), method in methods.items():
        plain = methods.get((spec, "tiny"))
        if plain is None or GROWING.get(name, ("", "none"))[1] == "none":
            continue
        best = (best_rate(method), best_rate(plain))
        shared = [(rate, rate) for rate in method["rate"].unique() if rate in set(plain["rate"])]
        for own, other in dict.fromkeys([best, *shared]):
            pairs = _pairs(at_rate(method, own), at_rate(plain, other))
            rows.append(
                {
                    "network": spec,
                    "rule": LABELS[name],
                    "rates with, without": f"{own:g}, {other:g}"
                    + (" (best of each)" if (own, other) == best else ""),
                    "accuracy, points": spread(pairs["points"], "+z.1f", ddof=1),
                    "seeds": f"{len(pairs)}",
                }
            )
    return pd.DataFrame(rows)


def against(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns TINY minus what it is compared with, by seed, and what either has and costs.

    From scratch there is a second row where the best rates differ: at the rate of TINY, and so of
    the same architectures.
    """
    rows = []
    for (spec, name), method in by_method(runs).items():
        for other in ("scratch", "gradmax", "random", "large") if name == "tiny" else ():
            found = reference(runs, spec, other)
            if found.empty:
                continue
            rate, best = best_rate(method), best_rate(found)
            rates = [best]
            if other == "scratch" and rate != best and rate in set(found["rate"]):
                rates.append(rate)
            shared = found["spec"].iloc[0]
            for theirs in rates:
                pairs = _pairs(at_rate(method, rate), at_rate(found, theirs))
                rows.append(
                    {
                        "network": spec,
                        "TINY against": LABELS[other] + (f" ({shared})" if shared != spec else ""),
                        "rates": f"{rate:g}, {theirs:g}",
                        "accuracy, points": spread(pairs["points"], "+z.1f", ddof=1),
                        "ratio of parameters": _figures(pairs["parameters"].mean()),
                        "ratio of operations": _figures(pairs["flops"].mean()),
                        "seeds": f"{len(pairs)}",
                    }
                )
    return pd.DataFrame(rows)


def _pairs(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Percentage points over the seeds that both have, and ratios of parameters and operations."""
    ours, theirs = ours.set_index("seed"), theirs.set_index("seed")
    both = ours.index.intersection(theirs.index, sort=False)
    ours, theirs = ours.loc[both], theirs.loc[both]
    ratios = ours[["parameters", "flops"]].astype(float) / theirs[["parameters", "flops"]]
    return ratios.assign(points=100 * (ours["accuracy"] - theirs["accuracy"]))


def _figures(value: float) -> str:
    """Three figures, never an exponent."""
    return tables.number(value, ",.0f" if value >= 100 else ".3g")


# Figures: a panel a network.

STYLES = {
    "tiny": ("#0072B2", "o"),
    "tiny_update": ("#F0E442", "p"),
    "tiny_width": ("#56B4E9", "s"),
    "tiny_measured": ("#009E73", "D"),
    "gradmax": ("#E69F00", "^"),
    "random": ("#CC79A7", "v"),
    "large": ("#000000", "P"),
    "scratch": ("#D55E00", "X"),
}
"""Colours of Okabe and Ito, and markers."""
LINES = ("-", "--", ":")
COMPARED = ("tiny", "gradmax", "random", "large", "scratch")
"""Methods whose operations are drawn."""
LINE_HEIGHT = 0.047
"""Height of a label, in parts of a panel's height."""
TICKS = {8: (1, 1.5, 2, 3, 5, 7), 30: (1, 2, 5), 3000: (1, 3), math.inf: (1,)}
"""Multiples of powers of ten, by the ratio of the ends of an axis."""


Result = Mapping[str, Any]


def _by_spec(runs: pd.DataFrame) -> dict[str, dict[str, list[Result]]]:
    """The results at the best rate, by network and method.

    With those of the networks that each is compared with.
    """
    found: dict[str, dict[str, list[Result]]] = {}
    for spec in runs["spec"].unique():
        for method in METHODS:
            every = reference(runs, spec, method)
            if not every.empty:
                best = at_rate(every, best_rate(every)).to_dict("records")
                found.setdefault(spec, {})[method] = best
    return found


def _of_tiny(runs: pd.DataFrame) -> dict[str, list[Result]]:
    """The results of `tiny` that grew, by network."""
    tiny = {spec: methods.get("tiny", []) for spec, methods in _by_spec(runs).items()}
    grown = {spec: [one for one in results if one["edits"]] for spec, results in tiny.items()}
    return {spec: results for spec, results in grown.items() if results}


def _draw_parameters(panel, found: Mapping[str, Sequence[Result]]) -> None:
    """Test accuracy against parameters: at the end, and of TINY just before growths."""
    for method, results in found.items():
        colour, marker = STYLES[method]
        for result in results if method == "tiny" else ():
            panel.plot(*_growth_path(result), color=colour, linewidth=0.8, alpha=0.6, zorder=1)
        ends = [(one["parameters"], 100 * one["accuracy"]) for one in results]
        panel.plot(*zip(*ends, strict=True), marker, color=colour, markersize=6, alpha=0.85,
                   markeredgecolor="white", markeredgewidth=0.6, label=LABELS[method])  # fmt: skip
    every = [100 * one["accuracy"] for results in found.values() for one in results]
    panel.set_ylim(bottom=max(min(every) - max(10, np.ptp(every)), panel.get_ylim()[0]))
    _log_axis(panel)


def _growth_path(result: Result) -> tuple[list[int], list[float]]:
    """Parameters, and the last accuracy in percent with as many."""
    points = [one for one in result["curve"] if one["accuracy"] is not None]
    last = {one["parameters"]: 100 * one["accuracy"] for one in points}
    return list(last), list(last.values())


class Ends(NamedTuple):
    """Where runs of a method end, over seeds: operations, mean accuracy and deviation, percent."""

    flops: float
    accuracy: float
    deviation: float


def _ends(runs: pd.DataFrame) -> dict[str, dict[str, Ends]]:
    """The ends by network and method, without the ways for TINY's rate to follow."""
    found: dict[str, dict[str, Ends]] = {}
    for spec, methods in _by_spec(runs).items():
        for method, results in methods.items():
            if method in COMPARED:
                accuracies = [100 * one["accuracy"] for one in results]
                deviation = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
                flops = float(np.mean([one["flops"] for one in results]))
                found.setdefault(spec, {})[method] = Ends(
                    flops, float(np.mean(accuracies)), deviation
                )
    return found


def _draw_compute(panel, found: Mapping[str, Ends]) -> None:
    """Test accuracy at the end against the operations of the training."""
    for method, end in found.items():
        colour, marker = STYLES[method]
        label = LABELS[method]
        panel.errorbar(*end, fmt=marker, color=colour, markersize=6, capsize=3, label=label)
    panel.margins(x=0.12)
    _log_axis(panel)


def _draw_bottlenecks(panel, results: Sequence[Result]) -> None:
    """The relative bottleneck of layers at growths, mean over the seeds that measure them."""
    layers = _bottlenecks(results)
    steps = sorted({step for line in layers.values() for step, _ in line})
    if len(steps) < 6:
        panel.set_xticks(steps)
    ends = []
    for (name, line), style in zip(layers.items(), _line_styles(len(layers)), strict=True):
        panel.plot(*zip(*line, strict=True), marker="o", markersize=3, **style)
        ends.append((_short(name), *line[-1], style["color"]))
    _label_ends(panel, ends)


def _bottlenecks(results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    """Updates and mean over seeds, by layer; the names of layers rise as data flow."""
    found: dict[str, dict[int, list[float]]] = {}
    for edit in (edit for result in results for edit in result["edits"]):
        for name, value in edit["bottlenecks"].items():
            if value is not None:
                found.setdefault(name, {}).setdefault(edit["step"], []).append(value)
    return {
        name: [(step, float(np.mean(values))) for step, values in sorted(by_step.items())]
        for name, by_step in sorted(found.items())
    }


def _draw_widths(panel, results: Sequence[Result]) -> None:
    """The neurons over updates, of the first seed; groups that grow alike share a line."""
    from matplotlib.ticker import LogLocator, NullFormatter

    edits = results[0]["edits"]
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, first in edits[0]["neurons"].items():
        neurons = (
            first - edits[0]["numbers"].get(name, 0),
            *(edit["neurons"][name] for edit in edits),
        )
        alike.setdefault(neurons, []).append(_short(name))
    steps = [0, *(edit["step"] for edit in edits), results[0]["curve"][-1]["step"]]
    ends = []
    for (neurons, names), style in zip(alike.items(), _line_styles(len(alike)), strict=True):
        panel.step(steps, [*neurons, neurons[-1]], where="post", **style)
        ends.append((textwrap.fill(", ".join(names), 24), steps[-1], neurons[-1], style["color"]))
    panel.set_yscale("log", base=2)
    low, high = panel.get_ylim()
    parts = 4 if high < 4 * low else 2 if high < 16 * low else 1
    panel.yaxis.set_major_locator(LogLocator(2, subs=[1 + part / parts for part in range(parts)]))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(panel, ends)


def _short(name: str) -> str:
    """`blocks/2/first/kernel` as `2 first`, which does not break, `layers/0_1/kernel` as `0→1`."""
    parts = [part for part in name.split("/")[:-1] if part not in ("blocks", "layers")]
    return "\N{NO-BREAK SPACE}".join(parts).replace("_", "→")


def _line_styles(number: int) -> list[dict[str, Any]]:
    """Styles of so many lines, from dark and thick to light and thin as data flow."""
    from matplotlib import colormaps

    return [
        {
            "color": colormaps["viridis"](0.85 * part),
            "linewidth": 2.2 - part,
            "linestyle": LINES[index % 3],
        }
        for index, part in enumerate(np.linspace(0, 1, number))
    ]


def _label_ends(panel, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Labels the ends of lines right of the panel, apart from each other."""
    panel.set_ylim(panel.get_ylim())
    to_axes = panel.transData + panel.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[2])
    heights = [LINE_HEIGHT * (1 + label.count("\n")) for label, *_ in ends]
    bottoms, top = [], 0.0
    for (_, x, y, _), height in zip(ends, heights, strict=True):
        bottoms.append(max(to_axes.transform((x, y))[1] - height / 2, top))
        top = bottoms[-1] + height
    top = max(1.0, sum(heights))
    for index in reversed(range(len(ends))):
        label, x, y, colour = ends[index]
        top = min(bottoms[index], top - heights[index])
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
        place = (1.1, top + heights[index] / 2)
        panel.annotate(label, (x, y), place, textcoords="axes fraction", va="center",
                       fontsize=6.5, arrowprops=line, annotation_clip=False)  # fmt: skip


def _log_axis(panel) -> None:
    """A logarithmic axis of x with prefixes as k and M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    low, high = panel.get_xlim()
    subs = next(subs for ratio, subs in TICKS.items() if high / low <= ratio)
    panel.xaxis.set_major_locator(LogLocator(subs=subs))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())


FIGURES = {
    "accuracy_parameters": Figure(
        _by_spec,
        _draw_parameters,
        "parameters",
        "test accuracy, % (lines: while TINY grows)",
        "Test accuracy against parameters; lines while TINY grows.",
    ),
    "accuracy_compute": Figure(
        _ends,
        _draw_compute,
        "floating-point operations of the training",
        "test accuracy, %",
        "Test accuracy at the end, mean and standard deviation over seeds, against the operations "
        "of the training.",
        {"sharey": True},
    ),
    "bottlenecks": Figure(
        _of_tiny,
        _draw_bottlenecks,
        "updates before the growth",
        "relative bottleneck Ψ of the layers measured",
        "Relative bottleneck of the layers measured, before every growth.",
    ),
    "widths": Figure(
        _of_tiny,
        _draw_widths,
        "updates",
        "neurons or channels",
        "Neurons or channels over the updates, of the first seed.",
    ),
}


def draw(runs: pd.DataFrame, folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """Draws the figures for which there are runs; returns their captions by path."""
    return panels.draw_figures(
        FIGURES, runs, folder, height=2.9, width=3.6, columns=3, order=LABELS.values()
    )


if __name__ == "__main__":
    common.run_binary(run)
