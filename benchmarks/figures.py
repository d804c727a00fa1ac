"""Draws the figures of pages that report a benchmark, from its results; measures nothing.

python -m benchmarks.figures
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import common
from experiments.lab.files import write_atomically

FOLDER = common.ROOT / "docs" / "figures"
SHADES = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


def main() -> None:
    for one in (devices, initialization, paths_scaling, precision, trace, transform, workers):
        draw(one)


def draw(one: Callable[[Figure], None]) -> None:
    """Draws one figure of this module to the file of its name."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    one(figure)
    path = FOLDER / f"{one.__name__}.png"
    write_atomically(path, lambda target: figure.savefig(target, dpi=120))
    print(f"figure: {path.relative_to(common.ROOT)}")


def devices(figure: Figure) -> None:
    """Temporary memory of a device, by program and sharding."""
    meshes = {
        name: one["programs"]
        for name, one in common.read_results("sharding").items()
        if one["parameters"] < 1e9 and "scan" not in name
    }
    programs = {
        "initialize": "initialize",
        "measure_update": "measure_update",
        "scale": "scale_by_architecture",
        "step": "training step",
    }
    mebibytes = {
        label: [one[program]["temporary"] / 2**20 for one in meshes.values()]
        for program, label in programs.items()
    }
    axes = figure.subplots()
    _bars(axes, [name.replace(", ", " devices,\n") for name in meshes], mebibytes)
    axes.set(ylabel="temporary memory of a device, MiB")
    axes.set_title(
        "a decoder of 17 million parameters; scale_by_architecture takes none", fontsize=9
    )


def initialization(figure: Figure) -> None:
    """Largest over smallest second moment of every random graph, by rule."""
    figure.set_size_inches(10.5, 4.4)
    rules = common.read_results("initialization")["rules"]
    panels = figure.subplots(1, len(rules), sharey=True)
    looks = {"weights alone": (SHADES[0], "o", -0.18), "with skips": (SHADES[3], "^", 0.18)}
    for axes, (panel, by_kind) in zip(panels, rules.items(), strict=True):
        for kind, (color, marker, shift) in looks.items():
            for place, one in enumerate(by_kind[kind].values()):
                centre, marks = place + shift, one["by_graph"]
                places = centre + np.linspace(-0.09, 0.09, len(marks))
                look = {"color": color, "marker": marker, "label": None if place else kind}
                axes.scatter(places, marks, s=14, alpha=0.6, linewidths=0, **look)
                axes.hlines(one["spread"]["median"], centre - 0.16, centre + 0.16, color, lw=2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log", title=panel)
        names = [rule.replace("_", "\n") for rule in by_kind["with skips"]]
        axes.set_xticks(range(len(names)), names)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("largest / smallest second moment (1 is perfect)")
    panels[0].legend(loc="upper left", title="one mark a graph, bar: median", frameon=False)


def paths_scaling(figure: Figure) -> None:
    """Cost of path statistics against number of edges."""
    figure.set_size_inches(7, 5)
    axes = figure.subplots()
    measured = common.read_results("paths")["scaling"]
    for (family, one), marker in zip(measured.items(), "os", strict=True):
        edges = np.array(one["edges"])
        middle, lower, upper = (
            np.array([seconds[key] for seconds in one["seconds"]])
            for key in ("median", "lower", "upper")
        )
        reach = [middle - lower, upper - middle]
        points = axes.errorbar(edges, middle, reach, fmt=marker, capsize=3)
        lengths = sorted({min(one["bits_of_count"]), max(one["bits_of_count"])})
        bits = " to ".join(f"{length:,}" for length in lengths)
        label = f"{family}: edges$^{{{one['slope']:.2f}}}$, P of {bits} bits"
        fitted = one["seconds_at_one_edge"] * edges ** one["slope"]
        axes.plot(edges, fitted, "--", color=points[0].get_color(), label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="edges", ylabel="seconds (median, quartiles)",
        title="Exact path statistics of random sparse graphs\n"
        "Fits to all sizes; long numbers of paths P are part of the cost",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def precision(figure: Figure) -> None:
    """What is measured in another precision, against float32."""
    axes = figure.subplots()
    rows = common.read_results("precision")["rows"]
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


def trace(figure: Figure) -> None:
    """Seconds of tracing against layers, the first time and again, with a straight line beside."""
    axes = figure.subplots()
    stacks = {
        int(name.removeprefix("stack of ")): one
        for name, one in common.read_results("trace")["models"].items()
        if name.startswith("stack of ")
    }
    layers = [2 * depth + 2 for depth in stacks]
    first = [one["seconds"] for one in stacks.values()]
    again = [one["again"]["median"] for one in stacks.values()]
    linear = [first[-1] / layers[-1] * count for count in layers]
    axes.plot(layers, linear, ":", color="#888888", label="linear")
    axes.plot(layers, first, "o-", color=SHADES[0], label="first trace of a process")
    axes.plot(layers, again, "s--", color=SHADES[3], label="again, JAX's own caches filled")
    axes.set(xscale="log", yscale="log", xlabel="weight layers", ylabel="seconds")
    axes.set_xticks(layers, list(map(str, layers)))
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    axes.set_ylim(top=4 * first[-1])


def transform(figure: Figure) -> None:
    """A step with the factors over one without, and one without over another."""
    axes = figure.subplots()
    cases = common.read_results("step")["cases"]
    for shift, key, label, color in (
        (-0.1, "ratio", "with factors / without", SHADES[0]),
        (0.1, "ratio_of_noise", "without / without: the noise", "#999999"),
    ):
        middle = np.array([case[key]["median"] for case in cases])
        ends = np.array([case[f"{key}_interval"] for case in cases]).T
        places = np.arange(len(cases)) + shift
        reach = np.maximum([middle - ends[0], ends[1] - middle], 0)
        axes.errorbar(places, middle, reach, fmt="o", color=color, label=label, capsize=2)
    axes.axhline(1, color="black", linewidth=0.6)
    names = [f"{case['network']}\n{case['optimizer'].replace(' ', chr(10))}" for case in cases]
    axes.set_xticks(range(len(cases)), names, fontsize=7.5)
    axes.set(ylabel="time of a step, ratio of medians")
    axes.legend(fontsize=8)


def workers(figure: Figure) -> None:
    """Trials per second, by where they run."""
    rates: dict[str, list[float]] = {}
    for name in ("workers_mlp_cnn", "workers_steps"):
        found = common.read_results(name)
        for ways in found["seconds"].values():
            for way, taken in ways.items():
                rates.setdefault(way, []).append(found["trials"] / float(np.median(taken)))
    names = ["searches of\nperceptrons", "searches of\nconvolutional networks",
             "updates called\nfrom Python"]  # fmt: skip
    axes = figure.subplots()
    _bars(axes, names, rates)
    axes.set(ylabel="trials per second, two cores")


def _bars(axes: Axes, groups: Sequence[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        left = np.arange(len(groups)) - 0.4 + width * (place + 0.5)
        axes.bar(left, values, width, label=label, color=SHADES[place])
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    common.run(main)
