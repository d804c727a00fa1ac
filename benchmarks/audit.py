"""Does the audit find what is wrong, and nothing else? `python -m benchmarks.audit`, two hours.

Every fault of `tests/audit_faults.py` is made in six networks under three optimizers, where it can
be made, and the audit is asked. A fault is found if the findings of its kind name all leaves that
are wrong; it is told exactly if they name no other. Set-ups that are right, of the same networks,
shall give no finding. Cost is measured for transformers of one and of a hundred million parameters:
seconds, wall and processor, of the audit, compiling included, and the peak of memory over that of a
training step, each in a process of its own. The journal in `runs` lets a run that was stopped go
on; `--known` sums up what it holds.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

import archscale_jax as archscale
from benchmarks import common
from tests import audit_faults, audit_networks, gpts

flags.DEFINE_bool("known", False, "Sum up what the journal holds, and run nothing.")

JOURNAL = pathlib.Path("runs/audit.jsonl")
Key = tuple[str, ...]
Record = dict[str, Any]
SIZES = {"million": (128, 4, 1024), "hundred million": (768, 12, 8192), "tiny": (32, 1, 100)}
"""Width, layers and tokens of the transformers whose cost is measured."""


def main() -> None:
    # What is measured here holds of any compiler; cost is measured in processes of its own.
    jax.config.update("jax_disable_most_optimizations", True)
    known = {tuple(one["key"]): one for one in _journal()}
    tasks = _tasks()
    records = {
        key: known.get(key) or _noted({"key": key, **function(*key)})
        for key, function in tasks.items()
        if key in known or not common.FLAGS.known
    }
    made = [one for one in records.values() if one.get("made")]
    faults = [one for one in made if "found" in one]
    rights = [one for one in made if "findings" in one]
    steps = ("step", "audit")
    left = [key[-2] for key in tasks.keys() - records.keys() if key[0] != "cost"]
    results = {
        "faults": _by_fault(faults),
        "right": _by_right(rights),
        "cost": {
            ", ".join(key[1:]): {what: one[what] for what in steps}
            for key, one in records.items()
            if key[0] == "cost"
        },
        "not run": {name: left.count(name) for name in sorted(set(left))},
    }
    common.write_results("audit", results)
    missed = [one["key"] for one in faults if not one["found"]]
    inexact = [one["key"] for one in faults if one["found"] and not one["exact"]]
    alarms = [one["key"] for one in rights if one["findings"]]
    print(f"faults: {len(faults)}, missed: {missed}, not told exactly: {inexact}")
    print(f"right: {len(rights)}, false alarms: {alarms}")
    print(json.dumps({key: results[key] for key in ("cost", "not run")}, indent=1))


def _tasks() -> dict[Key, Callable[..., Record]]:
    """Everything there is to run, by the arguments of the function that runs it."""
    names = common.sized(audit_networks.NAMES, ("mlp",))
    optimizers = common.sized(audit_networks.OPTIMIZERS, ("adamw",))
    tasks: dict[Key, Callable[..., Record]] = {}
    for name in names:  # of one network after the other, whose programs are compiled already
        tasks |= dict.fromkeys(audit_faults.faulty([name], optimizers), _fault)
        tasks |= {("right", *key): _right for key in audit_faults.rightly(name, optimizers)}
    sizes = common.sized(
        [*(("million", one) for one in optimizers), ("hundred million", "adamw")],
        [("tiny", "adamw")],
    )
    return tasks | {("cost", *key): _cost for key in sizes}


def _journal() -> Iterator[Record]:
    if JOURNAL.exists() and not common.FLAGS.quick:
        yield from map(json.loads, JOURNAL.read_text().splitlines())


def _noted(record: Record) -> Record:
    if not common.FLAGS.quick:
        JOURNAL.parent.mkdir(exist_ok=True)
        with JOURNAL.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return record


def _fault(key: str, name: str, optimizer: str) -> Record:
    """One fault; found if all that is wrong is named, exact if nothing else is."""
    fault = audit_faults.FAULTS[key]
    made = fault.make(name, optimizer)
    if made is None:
        return {"made": False}
    setup, wrong = made
    audit = archscale.audit(*setup)
    named = {one.parameter for one in audit.findings if one.kind in fault.kinds}
    others = sorted({one.kind for one in audit.findings if one.kind not in fault.kinds})
    return {
        "made": True,
        "found": wrong <= named,
        "exact": wrong == named,
        "wrong": sorted(wrong),
        "named": sorted(named),
        "other kinds": others,
        "seconds": audit.seconds,
    }


def _right(_: str, key: str, name: str, optimizer: str) -> Record:
    """One right set-up and what is found of it."""
    setup = audit_faults.RIGHT[key](name, optimizer)
    if setup is None:
        return {"made": False}
    audit = archscale.audit(*setup)
    findings = [[one.kind, one.parameter] for one in audit.findings]
    return {"made": True, "findings": findings, "seconds": audit.seconds}


def _cost(_: str, size: str, optimizer: str) -> Record:
    """What a training step and an audit take, each in a process of its own."""
    steps = ("step", "audit")
    return {what: common.in_fresh_process(_taken, what, size, optimizer) for what in steps}


def _by_fault(records: list[Record]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in records:
        key, name, optimizer = one["key"]
        own = found.setdefault(
            key, {"source": audit_faults.FAULTS[key].source, "made": 0, "found": 0, "exact": 0,
                  "missed": [], "inexact": []}
        )  # fmt: skip
        own["made"] += 1
        own["found"] += one["found"]
        own["exact"] += one["exact"]
        if not one["found"]:
            own["missed"].append(f"{name}, {optimizer}")
        elif not one["exact"]:
            own["inexact"].append(f"{name}, {optimizer}")
    return found


def _by_right(records: list[Record]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in records:
        _, key, name, optimizer = one["key"]
        own = found.setdefault(key, {"made": 0, "false alarms": []})
        own["made"] += 1
        if one["findings"]:
            own["false alarms"].append({f"{name}, {optimizer}": one["findings"]})
    return found


def _taken(what: str, size: str, optimizer: str) -> dict[str, float]:
    """Seconds, and the growth of this process's peak memory, of a training step or of an audit."""
    plan, loss, batch = _transformer(*SIZES[size], optimizer)
    params = jax.block_until_ready(plan.init(jax.random.key(0)))
    tx = plan.optimizer(1e-3, 0.1)
    before, start, busy = common.peak_memory(), time.perf_counter(), time.process_time()
    if what == "audit":
        audit = archscale.audit(plan, tx, loss, params, batch, tuned_here=True)
        assert not audit.findings, audit
    else:

        @jax.jit
        def step(params, state, batch):
            gradients = jax.grad(loss)(params, batch)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        jax.block_until_ready(step(params, jax.jit(tx.init)(params), batch))
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - busy,
        "megabytes": (common.peak_memory() - before) / 2**20,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def _transformer(width: int, depth: int, words: int, optimizer: str) -> tuple[Any, Any, Any]:
    """The plan of a GPT, its loss and a batch."""
    config = gpts.Config(depth, width, 4, words, 64, False, False, "in_out", jnp.float32)
    base = dataclasses.replace(config, width=width // 2, depth=max(depth // 2, 1))
    tokens = jax.random.randint(jax.random.key(1), (8, 65), 0, words)
    plan = archscale.parametrize(
        gpts.LinenGPT(config), tokens[:, :-1], base=gpts.LinenGPT(base), optimizer=optimizer
    )

    def loss(params, batch):
        logits = plan.apply(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    return plan, loss, tokens


if __name__ == "__main__":
    common.run(main)
