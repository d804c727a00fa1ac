"""Figures of the GradInit study [GradInit, Fig. 1, 3 and 5]."""

import functools
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments import gradinit_report
from experiments.gradinit_report import Arm
from experiments.lab.panels import create_panels, save

COLOURS = {"flax": "#777777", "he": "#0072B2", "topology": "#D55E00"}
GUESS = math.log(10)
Arms = Mapping[tuple[str, str, str], Arm]


_panels = functools.partial(create_panels, height=2.5, width=2.9, columns=4)


def has_networks(arms: Arms) -> bool:
    """Whether there is a network to draw: one with GradInit and without."""
    return bool(_by_network(arms))


def _by_network(arms: Arms) -> dict[str, list[Arm]]:
    """The arms of networks on which GradInit was run, without its variants."""
    networks: dict[str, list[Arm]] = {}
    for arm in arms.values():
        if arm.learned in ("none", "gradinit"):
            networks.setdefault(arm.network, []).append(arm)
    both = {"none", "gradinit"}
    return {name: one for name, one in networks.items() if {arm.learned for arm in one} == both}


def _finish(figure, panels, path: pathlib.Path) -> None:
    entries: dict[str, object] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=2 if len(panels) == 1 else len(entries) if len(entries) < 5 else 3,
        fontsize=8,
        frameon=False,
    )
    save(figure, path)


def _style(arm: Arm) -> dict[str, object]:
    learned = arm.learned == "gradinit"
    return {
        "color": COLOURS[arm.start],
        "linestyle": "-" if learned else ":",
        "marker": "o" if learned else "x",
        "markersize": 3.5,
        "linewidth": 1.4,
        "label": f"{arm.start}{', GradInit' if learned else ''}",
    }


def draw_success(arms: Arms, path: pathlib.Path) -> None:
    """Draws the final training loss against the learning rate, mean and range over seeds."""
    networks = _by_network(arms)
    figure, panels = _panels(len(networks), sharey=True)
    for panel, (name, found) in zip(panels, networks.items(), strict=True):
        for arm in found:
            rates, losses = _losses(arm)
            shown = np.minimum(losses, 1.05 * GUESS)
            panel.plot(rates, shown.mean(0), **_style(arm))
            panel.fill_between(
                rates, shown.min(0), shown.max(0), color=COLOURS[arm.start], alpha=0.13, lw=0
            )
        panel.axhline(GUESS, color="black", linewidth=0.6)
        panel.set(xscale="log")
        rates = [run["rate"] for run in found[0].results[0]["runs"]]
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=6.5, rotation=30)
        panel.minorticks_off()
        panel.set_title(name, fontsize=9)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("final training loss, nats (line: guessing)", fontsize=9)
    _finish(figure, panels, path)


def _losses(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Rates, and final losses [seeds, rates]."""
    rates = [run["rate"] for run in arm.results[0]["runs"]]
    losses = [[gradinit_report.final_loss(run) for run in each["runs"]] for each in arm.results]
    return np.array(rates), np.array(losses)


def draw_curves(arms: Arms, path: pathlib.Path) -> None:
    """Draws the training loss over the training at the best rate of every arm."""
    networks = _by_network(arms)
    figure, panels = _panels(len(networks), sharey=True)
    for panel, (name, found) in zip(panels, networks.items(), strict=True):
        for arm in found:
            curves = [run["losses"] for run in gradinit_report.best_runs(arm)]
            if any(None in curve or len(curve) != len(curves[0]) for curve in curves):
                continue
            parts = (np.arange(len(curves[0])) + 0.5) / len(curves[0]) * 100
            style = _style(arm) | {"marker": None}
            panel.plot(parts, np.mean(curves, axis=0), **style)
        panel.set_title(name, fontsize=9)
    figure.supxlabel("percent of the training", fontsize=9)
    figure.supylabel("training loss at the best rate, nats", fontsize=9)
    _finish(figure, panels, path)


def _learned(arms: Arms) -> dict[str, list[Arm]]:
    """The arms with GradInit alone."""
    return {
        name: [arm for arm in found if arm.learned == "gradinit"]
        for name, found in _by_network(arms).items()
    }


def _order(name: str) -> int:
    """Stem first, readout last, as data flow."""
    return {"stem": 0, "positions": 0, "readout": 2}.get(name.split("/")[0], 1)


def draw_multipliers(arms: Arms, path: pathlib.Path) -> None:
    """Draws the multipliers of weights, biases left out, from stem to readout."""
    from matplotlib import ticker

    networks = _learned(arms)
    figure, panels = _panels(len(networks))
    for panel, (name, found) in zip(panels, networks.items(), strict=True):
        for arm in found:
            records = [each["record"]["multipliers"] for each in arm.results]
            names = sorted((one for one in records[0] if not one.endswith("bias")), key=_order)
            for scale, marker in ((False, "o"), (True, "^")):
                places = [i for i, one in enumerate(names) if one.endswith("scale") == scale]
                values = [[record[names[i]] for i in places] for record in records]
                if places:
                    panel.plot(
                        np.array(places) / (len(names) - 1),
                        np.mean(values, axis=0),
                        marker,
                        color=COLOURS[arm.start],
                        markersize=3.2,
                        alpha=0.8,
                        label=f"{arm.start}{', scales of normalization' if scale else ''}",
                    )
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(yscale="log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_title(name, fontsize=9)
    figure.supxlabel("place in the network, stem to readout", fontsize=9)
    figure.supylabel("multiplier", fontsize=9)
    _finish(figure, panels, path)


def draw_gradients(arms: Arms, path: pathlib.Path) -> None:
    """Draws the gradient's deviation over batches by the weight's size, before and after."""
    networks = _learned(arms)
    figure, panels = _panels(len(networks))
    for panel, (name, found) in zip(panels, networks.items(), strict=True):
        for arm in found:
            for key, learned in (("tensors", "none"), ("tensors_after", "gradinit")):
                weights = (one for one in arm.results[0][key] if not one.endswith("bias"))
                names = sorted(weights, key=_order)
                sizes = np.array([[each[key][one] for one in names] for each in arm.results])
                ratio = np.exp(np.mean(np.log(sizes[..., 1] / sizes[..., 0]), axis=0))
                places = np.arange(len(names)) / (len(names) - 1)
                panel.plot(places, ratio, **_style(arm._replace(learned=learned)))
        panel.set(yscale="log")
        panel.set_title(name, fontsize=9)
    figure.supxlabel("place in the network, stem to readout", fontsize=9)
    figure.supylabel("deviation of the gradient / size of the weight", fontsize=9)
    _finish(figure, panels, path)


FIGURES = {
    "success": draw_success,
    "curves": draw_curves,
    "multipliers": draw_multipliers,
    "gradients": draw_gradients,
}
CAPTIONS = {
    "success": "Final training loss against the learning rate: mean and range over seeds.",
    "curves": "Training loss over the training, at the best rate of every start.",
    "multipliers": "Multipliers of the weights, biases left out, from stem to readout.",
    "gradients": "Deviation of the gradient over batches by the size of the weight.",
}
"""What each shows."""
