"""Is an update of Muon as large at every width? `python -m benchmarks.muon_steps`, half an hour.

For the ten models of `tests/matrix_models.py` and every leaf: the size of the first update for
random gradients of full rank, at widths 32, 128 and 512. Of a matrix, whose axes are written down
by hand, its spectral norm times √(in/out), the largest over the matrices of a stack; of other
leaves their entries, times width over base width where they sum over a width, as readouts do. A
leaf is flat if the largest over the smallest of the three is at most 1.1. Beside the plan stands
`optax.contrib.muon` alone, with the options that it has by default.

Newton-Schulz in five steps, as Muon takes them, leaves singular values between 0.7 and 1.2, and
spectral norms that hang on the shape by a tenth for this reason alone. So the law is measured with
twenty steps, after which the largest singular value is 1.134 whatever the shape (see
`tests/matrix_steps.py`); five steps are measured too, by spectral norms and by the root mean square
of the singular values, and by the ratio to what the same five steps in NumPy make of the gradient.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.rules._matrix import optimizer_labels
from benchmarks import common
from tests.matrix_models import MODELS, Example
from tests.matrix_steps import Step, optimizer_of, steps

WIDTHS = (32, 128, 512)
GOAL = 1.1
ENOUGH = 20
"""Steps of Newton-Schulz after which the spectral norm hangs on the shape no more."""
RMS = 0.2
MEASURES = {
    "plan": ("plan", "spectral"),
    "plan, consistent RMS": ("plan, consistent RMS", "spectral"),
    "five steps, over NumPy": ("plan, five steps", "scale"),
    "five steps, spectral": ("plan, five steps", "spectral"),
    "five steps, RMS": ("plan, five steps", "rms"),
    "optax alone": ("optax alone", "spectral"),
}
"""By what the table calls it, the optimizer and the size."""


def optimizers(plan: archscale.Parametrization) -> dict[str, tuple[Callable[[], Any], int]]:
    """Functions that make the optimizers, and their steps of Newton-Schulz."""
    return {
        "plan": (optimizer_of(plan, ns_steps=ENOUGH), ENOUGH),
        "plan, consistent RMS": (
            optimizer_of(plan, ns_steps=ENOUGH, consistent_rms=RMS), ENOUGH
        ),
        "plan, five steps": (optimizer_of(plan), 5),
        "optax alone": (functools.partial(optax.contrib.muon, 1.0, ns_steps=ENOUGH), ENOUGH),
    }  # fmt: skip


def measure(name: str, widths: tuple[int, ...]) -> dict[str, Any]:
    """Measures every leaf of a model.

    Returns:
      Its name and one record a leaf: shape at the largest width, multiplier there, optimizer, and
      by `MEASURES` the sizes by width and the largest over the smallest.
    """
    one, plans = MODELS[name], {}
    for width in widths:
        base = plans.get(widths[0])
        plans[width] = archscale.parametrize(
            one.make(width), one.inputs, base=base, optimizer="muon"
        )
    shapes = {width: jax.eval_shape(plan.init, jax.random.key(0)) for width, plan in plans.items()}
    found: dict[str, dict[int, dict[str, Step]]] = {}
    for width, plan in plans.items():
        for label, (make, iterations) in optimizers(plan).items():
            found.setdefault(label, {})[width] = steps(one, make, shapes[width], iterations)
    last = plans[widths[-1]]
    labels, multipliers = optimizer_labels(last.architecture), named_leaves(last.learning_rate)

    def record(leaf: str, shape: tuple[int, ...]) -> dict[str, Any]:
        measured = {}
        for measure, (label, size) in MEASURES.items():
            at = {width: by_leaf[leaf] for width, by_leaf in found[label].items()}
            measured[measure] = sizes(one, leaf, at, size)
        return {
            "leaf": leaf, "shape": list(shape), "optimizer": labels[leaf],
            "multiplier": multipliers[leaf], "sizes": measured,
        }  # fmt: skip

    leaves = named_leaves(shapes[widths[-1]])
    return {"model": name, "leaves": [record(leaf, array.shape) for leaf, array in leaves.items()]}


def sizes(one: Example, leaf: str, at: dict[int, Step], size: str) -> dict[str, Any]:
    """The sizes of a leaf by width, relative to what they are to be, and their ratio."""
    sums = not next(iter(at.values())).is_matrix and re.fullmatch(one.reads_width, leaf)
    found = {
        width: getattr(step, size) * (width / min(at) if sums else 1) for width, step in at.items()
    }
    return {"by_width": found, "ratio": max(found.values()) / min(found.values())}


def lines(results: list[dict[str, Any]]) -> list[list[str]]:
    """Of every model the worst ratio, and how many leaves are flat; the heading first."""
    found = [["model", "Muon's", *MEASURES]]
    for result in results:
        leaves = result["leaves"]
        muons = sum(one["optimizer"].startswith("muon") for one in leaves)
        cells = []
        for measured in MEASURES:
            ratios = [one["sizes"][measured]["ratio"] for one in leaves]
            flat = sum(ratio <= GOAL for ratio in ratios)
            cells.append(f"{max(ratios):.3f}, {flat} of {len(ratios)}")
        found.append([result["model"], f"{muons} of {len(leaves)}", *cells])
    return found


def worst(results: list[dict[str, Any]], measured: str, count: int = 12) -> list[list[str]]:
    """The leaves that are furthest from flat, the heading first."""
    rows = [
        (one["sizes"][measured]["ratio"], result["model"], one)
        for result in results
        for one in result["leaves"]
    ]
    rows.sort(key=lambda row: -row[0])
    return [["model", "leaf", "shape", "ratio", "sizes"]] + [
        [
            model,
            one["leaf"],
            "×".join(map(str, one["shape"])),
            f"{ratio:.3g}",
            " ".join(f"{size:.3g}" for size in one["sizes"][measured]["by_width"].values()),
        ]
        for ratio, model, one in rows[:count]
    ]


def main() -> None:
    names, widths = common.sized((tuple(MODELS), WIDTHS), (("Equinox MLP",), (32, 64)))
    results = []
    for name in names:
        results.append(measure(name, widths))
        print(f"{name}: {common.peak_memory() / 1e9:.1f} GB", flush=True)
    common.show(
        f"Updates at widths {', '.join(map(str, widths))}: largest over smallest, worst leaf; "
        f"leaves within {GOAL}",
        lines(results),
        f"plan and optax alone: {ENOUGH} steps of Newton-Schulz, spectral norms.",
    )
    common.show("optax alone: the leaves furthest from flat", worst(results, "optax alone"))
    record = {"widths": widths, "goal": GOAL, "steps": ENOUGH, "models": results}
    common.write_results("muon_steps", record, "equinox", "dm-haiku", "optax")


if __name__ == "__main__":
    common.run(main)
