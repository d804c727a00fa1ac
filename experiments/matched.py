"""Does one batch give a network the rates of a small one, group by group? (theory §14)

    python -m experiments.matched --workdir=runs/matched

Networks of `experiments.transfer`, and their ground truth: the best rate of every network by
search, once with one rate for all parameters (`uniform`), once with the rates of stem, hidden
layers and readout matched to the base's by what one update of each does (`matched`). Where the
match is right, the base's best rate is the best of every network. Writes results.jsonl (a line a
search) and table.md; a run that was cut off goes on.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._optax import scale_by_multipliers
from archscale_jax._spaces import chain_string
from archscale_jax.tuning._basin import loss_at
from archscale_jax.tuning._measured import Measurable, matched_multipliers
from experiments import transfer_study
from experiments.lab import common, files, networks, tables
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS
METHODS = ("uniform", "matched")
_DAGS, _CNNS = transfer_study._DAGS, transfer_study._CNNS
_SMALL = [chain_string(depth) for depth in (4, 10)] + _DAGS[:2]
STUDIES: dict[str, tuple[Sequence[tuple[str, int | None, int | None]], dict[str, Any]]] = {
    # (architecture, width or the default, kernel size), and what differs from the defaults
    "chains": ([(chain_string(depth), None, None) for depth in (2, 4, 7, 10, 14, 20)], {}),
    "dags": ([(text, None, None) for text in _DAGS[:8]], {}),
    "widths": ([(chain_string(4), width, None) for width in (32, 64, 256, 512)], {}),
    "gelu": ([(chain_string(depth), None, None) for depth in (4, 7, 10)], {"activation": "gelu"}),
    "adam": (
        [(text, None, None) for text in [*_SMALL, chain_string(20)]]
        + [(chain_string(4), width, None) for width in (32, 512)],
        {"optimizer": "adam"},
    ),
    "momentum": ([(text, None, None) for text in _SMALL], {"optimizer": "momentum"}),
    "layer_norm": ([(text, None, None) for text in _SMALL], {"normalization": "layer"}),
    "batch_norm": ([(text, None, None) for text in _SMALL], {"normalization": "batch"}),
    "cnns": ([(text, None, 3) for text in _CNNS[:5]], {}),
}
flags.DEFINE_list("study", list(STUDIES), "Studies, see STUDIES.")
flags.DEFINE_string("dataset", "fashion_mnist", "Data set of all.")
flags.DEFINE_integer("steps", 117, "Updates of every training.", lower_bound=2)
flags.DEFINE_integer("num_seeds", 3, "Seeds of every search.", lower_bound=1)
flags.DEFINE_integer("draws", 2, "Draws that a measurement averages.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/matched", "Folder for results and the table.")


def main() -> None:
    workdir = pathlib.Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for study in FLAGS.study for row in compare(study, workdir / "results.jsonl")]
    text = "\n".join(map(tables.markdown, (summary(rows), pd.DataFrame(rows))))
    files.write_text(workdir / "table.md", text)
    print(text)


def compare(study: str, journal: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a row a network: distances in nats from the base's best rate, and losses at it."""
    chosen, options = STUDIES[study]
    base = trial_of((transfer_study.BASE, None, chosen[0][2]), options, "uniform")
    trials = [base] + [trial_of(one, options, method) for one in chosen for method in METHODS]
    records = run_study(trials, search, journal, description=study)
    found = {name(one["trial"]): one["result"] for one in records if "result" in one}
    rate, rows = found[name(base)]["rate"], []
    for one in chosen:
        row: dict[str, Any] = {"study": study, "network": f"{one[0][:24]} {one[1] or ''}".strip()}
        pair = [found[name(trial_of(one, options, method))] for method in METHODS]
        best = min(networks.mean_losses(pair[0]).values())  # of the best rate for all parameters
        for method, result in zip(METHODS, pair, strict=True):
            losses = networks.mean_losses(result)
            row[f"{method}, nats"] = math.log(result["rate"] / rate)
            row[f"{method} at base's rate, %"] = 100 * (loss_at(rate, losses) / best - 1)
            row[f"{method} at its best, %"] = 100 * (min(losses.values()) / best - 1)
        row["noise"] = math.hypot(
            *(one["uncertainty"] or math.nan for one in (pair[0], found[name(base)]))
        )
        row["multipliers"] = " ".join(f"{one:.3g}" for one in pair[1]["multipliers"].values())
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns a row a study: RMS distances, and the median and largest loss given up."""
    found = []
    for study, group in pd.DataFrame(rows).groupby("study", sort=False):
        row = {"study": study, "networks": len(group)}
        for method in METHODS:
            error = np.sqrt(np.mean(group[f"{method}, nats"] ** 2))
            given_up = group[f"{method} at base's rate, %"]
            row |= {
                f"{method}, nats": f"{error:.2f}",
                f"{method}: loss given up, % (median, most)": (
                    f"{given_up.median():+.1f}, {given_up.max():+.1f}"
                ),
            }
        found.append(row | {"noise": f"{np.sqrt(np.mean(group['noise'] ** 2)):.2f}"})
    return pd.DataFrame(found)


def trial_of(
    network: tuple[str, int | None, int | None], options: dict[str, Any], method: str
) -> dict[str, Any]:
    """Returns a trial: a network under a method."""
    architecture, width, kernel_size = network
    sizes = (
        {"width": width or 128, "batch_size": 256, "steps": FLAGS.steps, "downscale": 1}
        if kernel_size is None
        else {"width": width or 8, "batch_size": 64, "steps": min(FLAGS.steps, 100), "downscale": 2}
    )
    return (
        transfer_study.DEFAULTS
        | sizes
        | options
        | {
            "dataset": FLAGS.dataset,
            "seeds": FLAGS.num_seeds,
            "architecture": architecture,
            "kernel_size": kernel_size,
            "method": method,
            "draws": FLAGS.draws if method == "matched" else 0,
        }
    )


def name(trial: dict[str, Any]) -> str:
    return repr(sorted(trial.items(), key=str))


def search(trial: dict[str, Any]) -> dict[str, Any]:
    """Searches the best rate of a network under a method."""
    network, multipliers = transfer_study.build(trial), {}
    if trial["method"] == "matched":
        parts = matched(trial, network)
        multipliers = {part.place: part.value for part in parts.values()}
        scale = scale_by_multipliers(
            network.architecture, {leaf: part.value for leaf, part in parts.items()}
        )
        plain = network.optimizer
        network = network._replace(optimizer=lambda rate: optax.chain(plain(rate), scale))
    found = networks.search_rate(network, trial, refine=0 if trial["kernel_size"] else 1)
    return found | {"multipliers": multipliers}


def matched(trial: dict[str, Any], network: networks.Network) -> dict[str, Any]:
    """Returns what `archscale_jax.tuning` measures between a network and the base of its study."""
    width = 8 if trial["kernel_size"] else 128
    base = transfer_study.build(trial | {"architecture": transfer_study.BASE, "width": width})
    images, labels = common.first_batch(network.dataset, trial["batch_size"], 0)
    draw = functools.partial(_draw, rule=trial["initialization"])
    ours, theirs = (
        Measurable(
            one.apply, one.architecture, functools.partial(draw, one), one.optimizer(1.0), (images,)
        )
        for one in (network, base)
    )
    return matched_multipliers(
        ours,
        theirs,
        lambda logits: networks.cross_entropy(logits, labels),
        seeds=trial["draws"],
        cap_readout=trial["optimizer"] != "adam",
    )


def _draw(network: networks.Network, key: Any, rule: str) -> Any:
    return archscale.initialize(key, network.params, network.architecture, rule)


if __name__ == "__main__":
    common.run_binary(main)
