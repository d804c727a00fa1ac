"""What does one step of one leaf do as the width grows? `python -m benchmarks.per_leaf`, hours.

For every network of `tests/step_networks.py`, every optimizer and every leaf: the change of the
logits and the largest relative change of a vertex, by one step of this leaf alone with its width
multiplier, at widths 64, 256 and 1,024. Both must be flat (`tests/leaf_steps.py`). What is done is
kept in `build/per_leaf`, for as long as the code of the library stays the same, and a second call
goes on from there. The results keep what earlier calls measured of networks that this one omits,
each with its date.

    python -m benchmarks.per_leaf --network="MLP with biases" --network=LSTM --optimizer=sgd
"""

from typing import Any

from absl import app, flags

from benchmarks import common
from experiments.lab import provenance
from experiments.lab.files import append_record, read_records
from tests.leaf_steps import FACTOR, OPTIMIZERS, LeafSteps, Trend, leaf_steps
from tests.step_networks import NETWORKS

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("network", None, "Name of a network; may be repeated. Default: all.")
flags.DEFINE_multi_string("optimizer", None, "Name of an optimizer; may be repeated.")
flags.DEFINE_list("draws", ["64:16", "256:8", "1024:4"], "Widths, each with its number of draws.")
flags.DEFINE_bool("again", False, "Whether to measure anew what has been measured.")


def trend_record(trend: Trend) -> dict[str, Any]:
    """What the results keep of a trend."""
    if not trend.present:
        return {"verdict": str(trend.verdict)}
    return {
        "verdict": str(trend.verdict),
        "ratio": trend.ratio,
        "error": trend.error,
        "effects": {str(width): effect for width, effect in trend.effects.items()},
    }


def leaf_record(one: LeafSteps) -> dict[str, Any]:
    """What the results keep of a leaf."""
    record = {
        "leaf": one.leaf, "role": one.role, "shape": list(one.shape), "factor": one.multiplier,
        "logits": trend_record(one.logits), "vertices": trend_record(one.vertices),
    }  # fmt: skip
    if one.later:
        both = dict(zip(("logits", "vertices"), map(trend_record, one.later), strict=True))
        record["readout_moved"] = both
    return record | {"holds": one.holds}


def check(network: str, optimizer: str, draws: dict[int, int]) -> dict[str, Any]:
    """Checks one network with one optimizer; an error of the library is a result too."""
    record: dict[str, Any] = {
        "network": network, "optimizer": optimizer, "measured": provenance.now(),
    }  # fmt: skip
    try:
        found = leaf_steps(NETWORKS[network], optimizer, draws)
    except Exception as error:  # of any kind: the network is a network like any other
        return record | {"error": f"{type(error).__name__}: {error}"}
    wrong = [one.leaf for one in found if not one.holds]
    return record | {"wrong": wrong, "leaves": [leaf_record(one) for one in found]}


def show_leaves(record: dict[str, Any]) -> None:
    """Prints the leaves of a network."""
    title = f"{record['network']}, {record['optimizer']}"
    if "error" in record:
        print(f"\n{title}: {record['error'][:300]}\n", flush=True)
        return
    lines = [
        ["leaf", "role", "shape", "multiplier", "logits ×", "vertex ×", "readout moved:", "holds"]
    ]
    for one in record["leaves"]:
        later = one.get("readout_moved")
        cells = [_effect(one["logits"]), _effect(one["vertices"])]
        cells.append(f"{_effect(later['logits'])}, {_effect(later['vertices'])}" if later else "")
        shape = "×".join(map(str, one["shape"]))
        holds = "yes" if one["holds"] else "NO"
        lines.append([one["leaf"], one["role"], shape, f"{one['factor']:.3g}", *cells, holds])
    common.show(title, lines)


def _effect(trend: dict[str, Any]) -> str:
    if "ratio" not in trend:
        return trend["verdict"]
    return f"{trend['ratio']:.2f} ± {trend['error']:.2f} {trend['verdict']}"


def summary(records: list[dict[str, Any]]) -> list[list[str]]:
    """Lays out how many leaves of every network hold, the heading first."""
    names = list(dict.fromkeys(record["optimizer"] for record in records))
    cells = {(one["network"], one["optimizer"]): _cell(one) for one in records}
    networks = dict.fromkeys(record["network"] for record in records)
    return [["network", *names]] + [
        [network, *(cells.get((network, name), "") for name in names)] for network in networks
    ]


def _cell(record: dict[str, Any]) -> str:
    if "error" in record:
        return "error"
    count, wrong = len(record["leaves"]), record["wrong"]
    return f"{count - len(wrong)} of {count}"


def earlier(records: list[dict[str, Any]], draws: dict[int, int]) -> list[dict[str, Any]]:
    """What the results hold, from as many draws, of other networks and optimizers than these."""
    if not (common.RESULTS / "per_leaf.json").is_file():
        return []
    results = common.read_results("per_leaf")
    if results["draws"] != {str(width): count for width, count in draws.items()}:
        return []
    measured = {(one["network"], one["optimizer"]) for one in records}
    return [one for one in results["checks"] if (one["network"], one["optimizer"]) not in measured]


def chosen(names: list[str] | None, known: dict[str, Any], what: str) -> list[str]:
    """Returns the names that were asked for, all by default."""
    for name in names or ():
        if name not in known:
            raise app.UsageError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return names or list(known)


def main() -> None:
    widths = common.sized(FLAGS.draws, ["16:2", "32:2"])
    draws = {int(width): int(count) for width, count in (one.split(":") for one in widths)}
    label = "-".join(widths).replace(":", "x")
    journal = common.journal("per_leaf", label, ["leaf_steps.py", "step_networks.py"])
    done = {(one["network"], one["optimizer"]): one for one in read_records(journal)}
    networks = FLAGS.network or common.sized(None, ["MLP with biases"])
    records = []
    for network in chosen(networks, NETWORKS, "network"):
        for optimizer in chosen(FLAGS.optimizer, OPTIMIZERS, "optimizer"):
            record = done.get((network, optimizer))
            if record is None or FLAGS.again:
                record = check(network, optimizer, draws)
                append_record(journal, record)
            records.append(record)
            show_leaves(record)
    common.show(f"Leaves with flat effects, within {FACTOR}", summary(records))
    checks = [*records, *earlier(records, draws)]
    results = {"draws": draws, "factor": FACTOR, "checks": checks}
    common.write_results("per_leaf", results, "equinox", "dm-haiku")


if __name__ == "__main__":
    common.run(main)
