"""Does an update change features as much at every size? `python -m benchmarks.coordinates`

Networks of `tests/coordinate_networks.py` are drawn and trained for five updates as their
parametrization says, through `plan.apply`, over width and over depth. The measure is the change,
over a fixed batch, of a vertex of every kind and of the logits: the largest over the smallest of
all sizes. Over depth it is relative to the size of the vertex at initialization, as the stream of
a deep network starts smaller than that of two blocks. The vertices are the last of their kind in
the base, and elsewhere those before which the same share of the branches has been added.
Optimizers: AdamW with decay 0.1; the same with epsilon ten times the root mean square gradient of
the base, at ten times the rate, where gradients count and not their signs; Muon. Beside it the
standard parametrization: the framework's weights, one rate for all. A run that was cut off goes on.
"""

import pathlib
from typing import Any

from absl import flags

from benchmarks import common
from experiments.lab.sweeps import run_study
from tests.coordinate_steps import CASES, LOGITS, measure

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
flags.DEFINE_string("workdir", "runs/coordinates", "Folder for results.jsonl.")
FLAT = 1.3


def main() -> None:
    networks = common.sized(FLAGS.network, FLAGS.network[:1])
    sizes = {
        "width": common.sized([*map(int, FLAGS.widths)], [16, 32]),
        "depth": common.sized([*map(int, FLAGS.depths)], [1, 2]),
    }
    trials = [
        {"network": network, "over": over, "sizes": found, "case": case, "seeds": FLAGS.num_seeds}
        for network in networks for over, found in sizes.items() for case in CASES
        if over == "depth" or "as gradients" not in case  # which differs over depth alone
    ]  # fmt: skip
    workdir = pathlib.Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    records = run_study(trials, measure, workdir / "results.jsonl", description="coordinates")
    lines, rows = [["network", "over", *CASES]], []
    for record in records:
        trial, result = record["trial"], record.get("result", {})
        rows.append(trial | result | {key: record[key] for key in ("error",) if key in record})
        where = [trial["network"], f"{trial['over']} {trial['sizes'][0]}…{trial['sizes'][-1]}"]
        if lines[-1][:2] != where:
            lines.append([*where, *[""] * len(CASES)])
        lines[-1][2 + list(CASES).index(trial["case"])] = _cell(result)
    common.show(
        f"Change in five updates, largest over smallest: logits, worst vertex (flat: {FLAT})", lines
    )
    common.write_results("coordinates", {"flat": FLAT, "rows": rows})


def _cell(result: dict[str, Any]) -> str:
    """Of the logits, and the worst of the stream and of what layers end in."""
    ratios = {
        name: max(one) / min(one)
        for name, one in result.get("changes", {}).items()
        if not name.startswith("of (")
    }
    return f"{ratios.pop(LOGITS):.2f}, {max(ratios.values()):.2f}" if ratios else "failed"


if __name__ == "__main__":
    common.run(main)
