"""Figures of the study of growing networks: a panel a network."""

import functools
import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.grow_report import LABELS, Arm, Arms, Result, reference
from experiments.grow_study import ARMS
from experiments.lab.panels import create_panels, save

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
SHOWN = 200
"""By how much the most operations of a panel exceed the fewest, at most."""
LINE_HEIGHT = 0.047
"""Of a label, in parts of a panel's height."""
TICKS = {8: (1, 1.5, 2, 3, 5, 7), 30: (1, 2, 5), 3000: (1, 3), math.inf: (1,)}
"""Multiples of powers of ten, by the ratio of the ends of an axis."""


def _draw(
    select: Callable[[Arms], Mapping[str, Any]],
    draw_panel: Callable[[Any, Any], None],
    across: str,
    up: str,
    arms: Arms,
    path: pathlib.Path,
) -> bool:
    """Draws what is selected, with one legend; says whether there was anything."""
    networks = select(arms)
    if not networks:
        return False
    figure, panels = create_panels(len(networks), 2.9, width=3.6, columns=3)
    entries: dict[str, Any] = {}
    for panel, (spec, found) in zip(panels, networks.items(), strict=True):
        draw_panel(panel, found)
        panel.set_title(spec, fontsize=9)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    if entries:
        names = [label for label in LABELS.values() if label in entries]
        figure.legend([entries[name] for name in names], names, loc="outside upper center",
                      ncols=3 if len(panels) > 1 else 2, fontsize=8, frameon=False)  # fmt: skip
    save(figure, path)
    return True


def _by_spec(arms: Arms) -> dict[str, list[Arm]]:
    """The arms of every network, with those it is compared with."""
    specs = dict.fromkeys(spec for spec, _ in arms)
    return {spec: [one for arm in ARMS if (one := reference(arms, spec, arm))] for spec in specs}


def _of_tiny(arms: Arms) -> dict[str, list[Result]]:
    """The results of `tiny` that grew, by network."""
    tiny = [arm for arm in arms.values() if arm.arm == "tiny"]
    grown = {arm.spec: [one for one in arm.results if one["edits"]] for arm in tiny}
    return {spec: results for spec, results in grown.items() if results}


def _draw_parameters(panel, found: Sequence[Arm]) -> None:
    """Test accuracy against parameters: at the end, and of TINY just before growths."""
    for arm in found:
        colour, marker = STYLES[arm.arm]
        for result in arm.results if arm.arm == "tiny" else ():
            panel.plot(*_growth_path(result), color=colour, linewidth=0.8, alpha=0.6, zorder=1)
        ends = [(one["parameters"], 100 * one["accuracy"]) for one in arm.results]
        panel.plot(*zip(*ends, strict=True), marker, color=colour, markersize=6, alpha=0.85,
                   markeredgecolor="white", markeredgewidth=0.6, label=LABELS[arm.arm])  # fmt: skip
    every = [100 * one["accuracy"] for arm in found for one in arm.results]
    panel.set_ylim(bottom=max(min(every) - max(10, np.ptp(every)), panel.get_ylim()[0]))
    _log_axis(panel)


def _growth_path(result: Result) -> tuple[list[int], list[float]]:
    """Parameters, and the last accuracy in percent with as many."""
    points = [one for one in result["curve"] if one["accuracy"] is not None]
    last = {one["parameters"]: 100 * one["accuracy"] for one in points}
    return list(last), list(last.values())


def _draw_compute(panel, found: Sequence[Arm]) -> None:
    """Test accuracy over training against operations so far; a cross ends a lost run."""
    for arm in found:
        colour, _ = STYLES[arm.arm]
        for result in arm.results:
            flops, accuracies = _curve(result)
            panel.plot(flops, accuracies, color=colour, linewidth=0.6, alpha=0.35)
            if result["lost"]:
                panel.plot(flops[-1:], accuracies[-1:], "x", color=colour, markersize=5)
        curves = [_curve(result) for result in arm.results if not result["lost"]]
        panel.plot(*_mean_curve(curves), color=colour, linewidth=1.7, label=LABELS[arm.arm])
    _log_axis(panel, SHOWN)


def _curve(result: Result) -> np.ndarray:
    """Operations so far, and accuracy in percent: two rows."""
    points = [one for one in result["curve"] if one["accuracy"] is not None]
    return np.array([[one["flops"] for one in points], [100 * one["accuracy"] for one in points]])


def _mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of curves at equal parts of their points; no points of no curves."""
    if not curves:
        return np.empty((2, 0))
    parts = np.linspace(0, 1, 200)
    sampled = [
        [np.interp(parts, np.linspace(0, 1, len(one)), one) for one in (np.log(flops), accuracies)]
        for flops, accuracies in curves
    ]
    logs, accuracies = np.mean(sampled, axis=0)
    return np.array([np.exp(logs), accuracies])


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
    """The neurons over updates, of the first seed; units that grow alike share a line."""
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


def _log_axis(panel, most: float = math.inf) -> None:
    """A logarithmic axis of x with prefixes as k and M, its end at most so many times its start."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    low, high = panel.get_xlim()
    shown = min(high / low, most)
    panel.set_xlim(left=high / shown)
    subs = next(subs for ratio, subs in TICKS.items() if shown <= ratio)
    panel.xaxis.set_major_locator(LogLocator(subs=subs))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())


_OPERATIONS = "floating-point operations of the training so far"
_DRAWN = {
    "accuracy_parameters": (_by_spec, _draw_parameters, "parameters",
                            "test accuracy, % (lines: while TINY grows)"),
    "accuracy_compute": (_by_spec, _draw_compute, _OPERATIONS, "test accuracy, % (thin: seeds)"),
    "bottlenecks": (_of_tiny, _draw_bottlenecks, "updates before the growth",
                    "relative bottleneck Ψ of the layers measured"),
    "widths": (_of_tiny, _draw_widths, "updates", "neurons or channels"),
}  # fmt: skip
FIGURES: dict[str, Callable[[Arms, pathlib.Path], bool]] = {
    name: functools.partial(_draw, *how) for name, how in _DRAWN.items()
}
"""From arms and a path to whether there was something to draw."""
CAPTIONS = {
    "accuracy_parameters": "Test accuracy against parameters; lines while TINY grows.",
    "accuracy_compute": "Test accuracy against the operations of the training so far.",
    "bottlenecks": "Relative bottleneck of the layers measured, before every growth.",
    "widths": "Neurons or channels over the updates, of the first seed.",
}
"""What each shows."""
