"""Curves, table and figure of coordinate checks."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import archscale_jax as archscale
from archscale_jax.tuning import _coordinate as coordinate
from experiments.lab.panels import save

Curves = dict[tuple[str, str, str], dict[int, dict[Any, dict[float, float]]]]


def curves_of(trials: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Curves:
    """Returns the curves by family, axis and parametrization, and by step."""
    found: dict[tuple[str, str, str], list[coordinate.Coordinate]] = {}
    for trial, record in zip(trials, records, strict=True):
        key = (trial["family"], trial["axis"], trial["parametrization"])
        rows = [_coordinate(*row) for row in record["result"]["records"]]
        found.setdefault(key, []).extend(rows)
    return {
        key: {
            step: archscale.tuning.coordinate_curves(rows, step=step)
            for step in sorted({row.step for row in rows} - {0})
        }
        for key, rows in found.items()
    }


def _coordinate(size, seed, step, vertex, change, feature) -> coordinate.Coordinate:
    lost = (math.nan if value is None else value for value in (change, feature))  # as JSON has it
    return coordinate.Coordinate(size, seed, step, vertex, *lost)


def table(curves: Curves) -> list[list[str]]:
    """Returns header and rows: largest over smallest change, of the worst vertex and the output."""
    last = max(step for _, steps in curves.items() for step in steps)
    rows = [["family", "axis", "parametrization"]]
    rows[0] += [f"{what}, step {step}" for step in (1, last) for what in ("vertices", "output")]
    for key, steps in curves.items():
        rows.append(list(key))
        for step in (1, last):
            ratios = archscale.tuning.flatness(steps[step])
            output = ratios.pop("output")
            rows[-1] += [_shown(max(ratios.values())), _shown(output)]
    return rows


def _shown(ratio: float) -> str:
    return f"{ratio:.3g}" if math.isfinite(ratio) else "lost"


def draw(curves: Curves, path: pathlib.Path) -> None:
    """Draws one panel for every family and parametrization of an axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(family for family, _, _ in curves))
    hows = list(dict.fromkeys(how for _, _, how in curves))
    axis = next(iter(curves))[1]
    size = (2.6 * len(names) + 0.6, 2.2 * len(hows) + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(hows), len(names), squeeze=False, sharex=True)
    for (row, how), (column, family) in itertools.product(enumerate(hows), enumerate(names)):
        steps = curves[family, axis, how]
        panel, found = panels[row][column], steps[max(steps)]
        ratios = archscale.tuning.flatness(found)
        inner = [name for name in found if name != "output"]
        for place, name in enumerate(inner):
            shade = 0.25 + 0.6 * place / max(len(inner) - 1, 1)
            _draw_curve(panel, found[name], (0.0, 0.45 * shade, 0.7 * shade))
        _draw_curve(panel, found["output"], "#d55e00")
        worst = max(ratios[name] for name in inner)
        ratio = f"×{_shown(worst)}" if math.isfinite(worst) else "lost"
        panel.set_title(f"{family}, {how.replace('_', ' ')}: {ratio}", fontsize=8.5)
        panel.set(xscale="log", yscale="log")
        sizes = list(found["output"])
        panel.set_xticks(sizes, list(map(str, sizes)))
        panel.xaxis.minorticks_off()
        panel.tick_params(labelsize=7, which="both")
        low, high = panel.get_ylim()
        if high / low < 30:
            panel.set_ylim(low * (high / low / 30) ** 0.5, high * (30 * low / high) ** 0.5)
    figure.supxlabel(axis, fontsize=9)
    figure.supylabel("change of a feature since initialization (orange: output)", fontsize=9)
    save(figure, path, dpi="figure")


def _draw_curve(panel, curve: Mapping[float, float], color) -> None:
    finite = {size: value for size, value in curve.items() if 0 < value < math.inf}
    panel.plot(list(finite), np.asarray(list(finite.values())), ".-", color=color, linewidth=1.1)
