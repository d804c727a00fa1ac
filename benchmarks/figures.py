"""Draws the figures of pages that report a benchmark, from its results; measures nothing.

python -m benchmarks.figures
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from experiments.lab.files import write_atomically

FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
SHADES = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


def main() -> None:
    for draw in (devices, precision, transform, workers):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        draw(figure.subplots())
        path = FIGURES / f"{draw.__name__}.png"
        write_atomically(path, lambda target, figure=figure: figure.savefig(target, dpi=120))
        print(path)


def devices(axes: Axes) -> None:
    """Temporary memory of a device, by program and sharding."""
    meshes = {
        name: one["programs"]
        for name, one in _results("sharding").items()
        if one["parameters"] < 1e9 and "scan" not in name
    }
    programs = ("initialize", "scale", "step", "measure_update")
    mebibytes = {
        program: [one[program]["temporary"] / 2**20 for one in meshes.values()]
        for program in programs
    }
    mebibytes["scale_by_architecture"] = mebibytes.pop("scale")
    mebibytes["training step"] = mebibytes.pop("step")
    _bars(axes, [name.replace(", ", " devices,\n") for name in meshes], mebibytes)
    axes.set(ylabel="temporary memory of a device, MiB")
    axes.set_title(
        "a decoder of 17 million parameters; scale_by_architecture takes none", fontsize=9
    )


def precision(axes: Axes) -> None:
    """What is measured in another precision, against float32."""
    rows = _results("precision")["rows"]
    what = [key for key in rows[0] if key not in ("network", "precision", "sharpness")]
    markers = {"MLP": "o", "CNN": "s"}
    for row in rows:
        shade = SHADES[("mixed", "bfloat16", "float16").index(row["precision"])]
        label, style = f"{row['network']}, {row['precision']}", markers[row["network"]]
        axes.plot([100 * row[key] for key in what], style, color=shade, label=label, alpha=0.8)
    axes.set(yscale="log", ylabel="largest difference from float32, %")
    axes.set_xticks(range(len(what)), [key.replace(" ", "\n", 1) for key in what], fontsize=8)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)


def transform(axes: Axes) -> None:
    """A step with the factors over one without, and one without over another."""
    cases = _results("step")["cases"]
    for shift, key, label in (
        (-0.1, "ratio", "with factors / without"),
        (0.1, "ratio_of_noise", "without / without: the noise"),
    ):
        middle = np.array([case[key]["median"] for case in cases])
        ends = np.array([case[f"{key}_interval"] for case in cases]).T
        places = np.arange(len(cases)) + shift
        reach = np.maximum([middle - ends[0], ends[1] - middle], 0)
        color = SHADES[0] if key == "ratio" else "#999999"
        axes.errorbar(places, middle, reach, fmt="o", color=color, label=label, capsize=2)
    axes.axhline(1, color="black", linewidth=0.6)
    names = [f"{case['network']}\n{case['optimizer'].replace(' ', chr(10))}" for case in cases]
    axes.set_xticks(range(len(cases)), names, fontsize=7.5)
    axes.set(ylabel="time of a step, ratio of medians")
    axes.legend(fontsize=8)


def workers(axes: Axes) -> None:
    """Trials per second, by where they run."""
    studies: dict[str, Any] = {}
    for name in ("workers_mlp_cnn", "workers_steps"):
        found = _results(name)
        for study, ways in found["seconds"].items():
            studies[study] = {
                way: found["trials"] / np.median(taken) for way, taken in ways.items()
            }
    names = {
        "mlp": "searches of\nperceptrons",
        "cnn": "searches of\nconvolutional networks",
        "steps": "updates called\nfrom Python",
    }
    ways = list(next(iter(studies.values())))
    rates = {way: [studies[study][way] for study in names] for way in ways}
    _bars(axes, list(names.values()), rates)
    axes.set(ylabel="trials per second, two cores")


def _bars(axes: Axes, groups: Sequence[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        left = np.arange(len(groups)) - 0.4 + width * (place + 0.5)
        axes.bar(left, values, width, label=label, color=SHADES[place])
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.legend(fontsize=8)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


if __name__ == "__main__":
    main()
