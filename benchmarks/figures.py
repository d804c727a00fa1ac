"""Draws the figures of pages that report a benchmark, from its results; measures nothing.

python -m benchmarks.figures
"""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from benchmarks import common
from experiments.lab.files import write_atomically

FOLDER = common.ROOT / "docs" / "figures"


def main() -> None:
    for one in (initialization, paths_scaling):
        draw(one)


def draw(one: Callable[[Figure], None]) -> None:
    """Draws one figure of this module to the file of its name."""
    figure = Figure(layout="constrained")
    one(figure)
    path = FOLDER / f"{one.__name__}.png"
    write_atomically(path, lambda target: figure.savefig(target, dpi=120))
    print(f"figure: {path.relative_to(common.ROOT)}")


def initialization(figure: Figure) -> None:
    """Largest over smallest second moment of every random graph, by rule."""
    figure.set_size_inches(10.5, 4.4)
    rules = common.read_results("initialization")["rules"]
    panels = figure.subplots(1, len(rules), sharey=True)
    looks = {"weights alone": ("#0072B2", "o", -0.18), "with skips": ("#D55E00", "^", 0.18)}
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


if __name__ == "__main__":
    common.run(main)
