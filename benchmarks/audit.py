"""Does the audit find what is wrong, and nothing else? `python -m benchmarks.audit`, an hour.

Every fault of `tests/audit_faults.py` is made in six networks under three optimizers, where it can
be made, and the audit is asked. A fault is found if the findings of its kind name all leaves that
are wrong; it is told exactly if they name no other. Set-ups that are right, of the same networks,
shall give no finding. Cost is measured for transformers of one and of a hundred million parameters:
seconds, wall and processor, of the audit, compiling included, and the peak of memory over that of a
training step, each in a process of its own. The journal in `runs` lets a run that was stopped go
on.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import archscale_jax as archscale
from benchmarks import common
from tests import audit_faults, audit_networks, gpts

JOURNAL = pathlib.Path("runs/audit.jsonl")
SIZES = {"million": (128, 4, 1024), "hundred million": (768, 12, 8192), "tiny": (32, 1, 100)}
"""Width, layers and tokens of the transformers whose cost is measured."""


def main() -> None:
    # What is measured here holds of any compiler; cost is measured in processes of its own.
    jax.config.update("jax_disable_most_optimizations", True)
    names = common.sized(audit_networks.NAMES, ("mlp",))
    optimizers = common.sized(audit_networks.OPTIMIZERS, ("adamw",))
    known = {tuple(one["key"]): one for one in _journal()}
    faults, rights = [], []
    for name in names:  # of one network after the other, whose programs are compiled already
        for key in audit_faults.faulty([name], optimizers):
            faults.append(known.get(key) or _fault(key))
        for key in audit_faults.rightly(name, optimizers):
            rights.append(known.get(("right", *key)) or _right(*key))
    faults, rights = ([one for one in each if one["made"]] for each in (faults, rights))
    sizes = common.sized(
        [*(("million", one) for one in optimizers), ("hundred million", "adamw")],
        [("tiny", "adamw")],
    )
    cost = {
        f"{size}, {optimizer}": {
            what: common.in_fresh_process(_cost, what, size, optimizer)
            for what in ("step", "audit")
        }
        for size, optimizer in sizes
    }
    results = {"faults": _by_fault(faults), "right": _by_right(rights), "cost": cost}
    common.write_results("audit", results)
    missed = [one["key"] for one in faults if not one["found"]]
    inexact = [one["key"] for one in faults if one["found"] and not one["exact"]]
    alarms = [one["key"] for one in rights if one["findings"]]
    print(f"faults: {len(faults)}, missed: {missed}, not told exactly: {inexact}")
    print(f"right: {len(rights)}, false alarms: {alarms}")
    print(json.dumps(cost, indent=1))


def _journal() -> Iterator[dict[str, Any]]:
    if JOURNAL.exists() and not common.FLAGS.quick:
        yield from map(json.loads, JOURNAL.read_text().splitlines())


def _noted(record: dict[str, Any]) -> dict[str, Any]:
    if not common.FLAGS.quick:
        JOURNAL.parent.mkdir(exist_ok=True)
        with JOURNAL.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return record


def _fault(key: tuple[str, str, str]) -> dict[str, Any]:
    """One fault; found if all that is wrong is named, exact if nothing else is."""
    fault = audit_faults.FAULTS[key[0]]
    made = fault.make(*key[1:])
    if made is None:
        return _noted({"key": key, "made": False})
    setup, wrong = made
    audit = archscale.audit(*setup)
    named = {one.parameter for one in audit.findings if one.kind in fault.kinds}
    others = sorted({one.kind for one in audit.findings if one.kind not in fault.kinds})
    return _noted(
        {
            "key": key,
            "made": True,
            "found": wrong <= named,
            "exact": wrong == named,
            "wrong": sorted(wrong),
            "named": sorted(named),
            "other kinds": others,
            "seconds": audit.seconds,
        }
    )


def _right(key: str, name: str, optimizer: str) -> dict[str, Any]:
    """One right set-up and what is found of it."""
    full = ("right", key, name, optimizer)
    setup = audit_faults.RIGHT[key](name, optimizer)
    if setup is None:
        return _noted({"key": full, "made": False})
    audit = archscale.audit(*setup)
    findings = [[one.kind, one.parameter] for one in audit.findings]
    return _noted({"key": full, "made": True, "findings": findings, "seconds": audit.seconds})


def _by_fault(records: list[dict[str, Any]]) -> dict[str, Any]:
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


def _by_right(records: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in records:
        _, key, name, optimizer = one["key"]
        own = found.setdefault(key, {"made": 0, "false alarms": []})
        own["made"] += 1
        if one["findings"]:
            own["false alarms"].append({f"{name}, {optimizer}": one["findings"]})
    return found


def _cost(what: str, size: str, optimizer: str) -> dict[str, float]:
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
