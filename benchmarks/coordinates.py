"""Does an update change features as much at every size? `python -m benchmarks.coordinates`

Networks of `tests/coordinate_networks.py` are drawn and trained for five updates as their
parametrization says, through `plan.apply`, over width and over depth. The measure is the root mean
square change of the features, over a fixed batch, of the last vertex of every kind, of the residual
stream and of the logits: the largest over the smallest of all sizes. Optimizers: AdamW with decay
0.1; the same with epsilon ten times the root mean square gradient of the base, at ten times the
rate, where gradients count and not their signs; Muon. Beside it the standard parametrization: the
framework's weights, one rate for all.
"""

import json
import math
from typing import Any

import numpy as np
from absl import flags

from benchmarks import common
from tests.coordinate_steps import LOGITS, STREAM, Sized, Training, root_mean_square

FLAGS = flags.FLAGS
flags.DEFINE_list("widths", ["64", "256", "1024"], "Widths, at depth 1; the first is the base's.")
flags.DEFINE_list("depths", ["2", "8", "32"], "Depths, at width 64; the first is the base's.")
flags.DEFINE_integer("num_seeds", 2, "Seeds of weights.", lower_bound=1)
flags.DEFINE_list(
    "network",
    ["transformer", "gated transformer", "residual MLP", "ResNet", "ResNet, batch norm",
     "mixture of experts", "state space", "GPT", "GPT, tied"],
    "Networks, see tests/coordinate_networks.py.",
)  # fmt: skip
FLAT = 1.3
CASES = {  # optimizer, rate, epsilon over the base's gradient, options of parametrize
    "AdamW": ("adamw", 3e-3, None, {}),
    "AdamW, large ε, as published": ("adamw", 3e-2, 10.0, {}),
    "AdamW, large ε, as gradients": ("adamw", 3e-2, 10.0, {"epsilon_rule": "gradient"}),
    "Muon": ("muon", 3e-3, None, {}),
    "AdamW, standard": ("adamw", 3e-3, None, None),
}


def main() -> None:
    axes = {
        "width": ([*map(int, FLAGS.widths)], {"depth": 1}),
        "depth": ([*map(int, FLAGS.depths)], {"width": 64}),
    }
    axes = common.sized(axes, {"width": ([16, 32], {"depth": 1})})
    networks = common.sized(FLAGS.network, FLAGS.network[:1])
    rows, lines = [], [["network", "over", *CASES]]
    for network in networks:
        for axis, (sizes, fixed) in axes.items():
            found = {}
            for case in CASES:
                if axis == "width" and "published" in case:
                    continue  # the rules of epsilon differ over depth alone
                found[case] = ratios(network, axis, sizes, fixed, case)
                print(
                    network,
                    axis,
                    case,
                    json.dumps(found[case]["largest over smallest"]),
                    flush=True,
                )
            rows.append({"network": network, "over": axis, "sizes": sizes, "cases": found})
            lines.append([network, f"{axis} {'…'.join(map(str, (sizes[0], sizes[-1])))}",
                          *(_cell(found.get(case)) for case in CASES)])  # fmt: skip
    common.show(
        f"Change in five updates, largest over smallest: logits, worst vertex (flat: {FLAT})", lines
    )
    common.write_results("coordinates", {"flat": FLAT, "seeds": FLAGS.num_seeds, "rows": rows})


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    ratio = found["largest over smallest"]
    return f"{ratio[LOGITS]:.2f}, {max(ratio.values()):.2f}"


def ratios(
    network: str, axis: str, sizes: list[int], fixed: dict[str, int], case: str
) -> dict[str, Any]:
    """Returns the changes of the last vertex of every kind by size, and their ratios."""
    optimizer, rate, epsilon, options = CASES[case]
    training = Training(optimizer, rate, 0.1, epsilon, options or {}, options is None)
    changes: dict[str, list[float]] = {}
    base: Sized | None = None
    eps = 1e-8
    for size in sizes:
        one = Sized(network, {**fixed, axis: size}, base, training)
        if base is None:
            base = one
            if epsilon is not None:
                gradients = [
                    root_mean_square(one.gradient(one.draw(seed), *one.family.batch(0))[1]) ** 2
                    for seed in range(FLAGS.num_seeds)
                ]
                eps = epsilon * math.sqrt(np.mean(gradients))
        draws = [one.changes(training, eps, seed) for seed in range(FLAGS.num_seeds)]
        last = {kind: vertex for vertex, kind in one.kinds.items()}  # the last of its kind
        for kind, vertex in last.items():
            change = math.sqrt(np.mean([draw[vertex][0] ** 2 for draw in draws]))
            changes.setdefault(kind, []).append(change)
    complete = {kind: found for kind, found in changes.items() if len(found) == len(sizes)}
    return {
        "changes": complete,
        "largest over smallest": {
            kind: round(max(found) / min(found), 3) for kind, found in complete.items()
        },
        "stream": STREAM in complete,
    }


if __name__ == "__main__":
    common.run(main)
