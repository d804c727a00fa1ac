"""What does one step of one leaf do as the width grows? `python -m benchmarks.per_leaf`, hours.

For every network of `tests/step_networks.py`, every optimizer and every leaf: the change of the
logits and the largest relative change of a vertex, by one step of this leaf alone with its width
factor, at widths 64, 256 and 1,024. Both must be flat (`tests/leaf_steps.py`). What is done is kept
in `build/per_leaf`, for as long as the code of the library stays the same, and a second call goes
on from there. The results keep what earlier calls measured of networks that this one leaves out,
each with its date.

    python -m benchmarks.per_leaf --network="MLP with biases" --network=LSTM --optimizer=sgd
"""

import datetime
import hashlib
import json
import pathlib
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

import archscale_jax
from benchmarks import common
from experiments.lab.files import append_record, read_records
from tests.leaf_steps import FACTOR, OPTIMIZERS, LeafSteps, Trend, leaf_steps
from tests.step_networks import NETWORKS

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("network", None, "Name of a network; may be repeated. Default: all.")
flags.DEFINE_multi_string("optimizer", None, "Name of an optimizer; may be repeated.")
flags.DEFINE_list("draws", ["64:16", "256:8", "1024:4"], "Widths, each with its number of draws.")
flags.DEFINE_bool("again", False, "Whether to measure anew what has been measured.")

JOURNALS = pathlib.Path(__file__).parents[1] / "build" / "per_leaf"


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
        "leaf": one.leaf, "role": one.role, "shape": list(one.shape), "factor": one.factor,
        "logits": trend_record(one.logits), "vertices": trend_record(one.vertices),
    }  # fmt: skip
    if one.later:
        both = dict(zip(("logits", "vertices"), map(trend_record, one.later), strict=True))
        record["readout_moved"] = both
    return record | {"holds": one.holds}


def check(network: str, optimizer: str, draws: dict[int, int]) -> dict[str, Any]:
    """Checks one network with one optimizer; a refusal of the library is a result too."""
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record: dict[str, Any] = {"network": network, "optimizer": optimizer, "measured": today}
    try:
        found = leaf_steps(NETWORKS[network], optimizer, draws)
    except Exception as error:  # of any kind: the network is a network like any other
        return record | {"refused": f"{type(error).__name__}: {error}"}
    wrong = [one.leaf for one in found if not one.holds]
    return record | {"wrong": wrong, "leaves": [leaf_record(one) for one in found]}


def leaf_table(record: dict[str, Any]) -> Table | str:
    """Lays out the leaves of a network."""
    title = f"{record['network']}, {record['optimizer']}"
    if "refused" in record:
        return f"{title}: {record['refused'][:300]}\n"
    table = Table("leaf", "role", "shape", "factor", "logits ×", "vertex ×", "readout moved:",
                  "holds", title=title)  # fmt: skip
    for one in record["leaves"]:
        later = one.get("readout_moved")
        cells = [_effect(one["logits"]), _effect(one["vertices"])]
        cells.append(f"{_effect(later['logits'])}, {_effect(later['vertices'])}" if later else "")
        shape = "×".join(map(str, one["shape"]))
        holds = "yes" if one["holds"] else "NO"
        table.add_row(one["leaf"], one["role"], shape, f"{one['factor']:.3g}", *cells, holds)
    return table


def _effect(trend: dict[str, Any]) -> str:
    if "ratio" not in trend:
        return trend["verdict"]
    return f"{trend['ratio']:.2f} ± {trend['error']:.2f} {trend['verdict']}"


def summary_table(records: list[dict[str, Any]]) -> Table:
    """Lays out how many leaves of every network hold."""
    names = list(dict.fromkeys(record["optimizer"] for record in records))
    table = Table("network", *names, title=f"leaves with flat effects, within {FACTOR}")
    for network in dict.fromkeys(record["network"] for record in records):
        cells = []
        for optimizer in names:
            found = [one for one in records
                     if (one["network"], one["optimizer"]) == (network, optimizer)]  # fmt: skip
            cells.append(_cell(found[0]) if found else "")
        table.add_row(network, *cells)
    return table


def _cell(record: dict[str, Any]) -> str:
    if "refused" in record:
        return "refused"
    count, wrong = len(record["leaves"]), record["wrong"]
    return f"{count - len(wrong)} of {count}"


def earlier(records: list[dict[str, Any]], draws: dict[int, int]) -> list[dict[str, Any]]:
    """What the results hold, from as many draws, of other networks and optimizers than these."""
    path = common.RESULTS / "per_leaf.json"
    if not path.is_file():
        return []
    results = json.loads(path.read_text())["results"]
    if results["draws"] != {str(width): count for width, count in draws.items()}:
        return []
    measured = {(one["network"], one["optimizer"]) for one in records}
    return [one for one in results["checks"] if (one["network"], one["optimizer"]) not in measured]


def code_hash() -> str:
    """Hashes the code of the library and of the check."""
    library = pathlib.Path(archscale_jax.__file__).parent
    tests = [pathlib.Path(__file__).parents[1] / "tests" / name
             for name in ("leaf_steps.py", "step_networks.py")]  # fmt: skip
    digest = hashlib.sha256()
    for path in [*sorted(library.rglob("*.py")), *tests]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def chosen(names: list[str] | None, known: dict[str, Any], what: str) -> list[str]:
    """Returns the names that were asked for, all by default."""
    for name in names or ():
        if name not in known:
            raise app.UsageError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return names or list(known)


def main(arguments: list[str]) -> None:
    """Checks, prints the tables and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    draws = {int(width): int(count) for width, count in (one.split(":") for one in FLAGS.draws)}
    console = Console(width=120)
    journal = JOURNALS / f"{code_hash()}-{'-'.join(FLAGS.draws).replace(':', 'x')}.jsonl"
    done = {(one["network"], one["optimizer"]): one for one in read_records(journal)}
    records = []
    for network in chosen(FLAGS.network, NETWORKS, "network"):
        for optimizer in chosen(FLAGS.optimizer, OPTIMIZERS, "optimizer"):
            record = done.get((network, optimizer))
            if record is None or FLAGS.again:
                record = check(network, optimizer, draws)
                append_record(journal, record)
            records.append(record)
            console.print(leaf_table(record), markup=False)
    console.print(summary_table(records))
    checks = [*records, *earlier(records, draws)]
    results = {"draws": draws, "factor": FACTOR, "checks": checks}
    print(common.write_results("per_leaf", results, "optax", "flax", "equinox", "dm-haiku"))


if __name__ == "__main__":
    app.run(main)
