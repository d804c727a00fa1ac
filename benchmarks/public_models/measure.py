"""Columns of the table of public models, for the models of one module.

Run by `benchmarks.public_models` in the environment that has the packages.
"""

import importlib
import json
import pathlib
import re
import resource
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.rules._matrix import optimizer_labels
from benchmarks.public_models.subject import Subject, batch, count

FLAGS = flags.FLAGS
flags.DEFINE_string("module", None, "Module of benchmarks.public_models with MODELS.")
flags.DEFINE_list("only", [], "Names of models; all by default.")
flags.DEFINE_string("journal", None, "File to which a line a model is added.")
STEPS, RATE = 5, 1e-3


def main(arguments: list[str]) -> None:
    del arguments
    warnings.filterwarnings("ignore")
    models = importlib.import_module(f"benchmarks.public_models.{FLAGS.module}").MODELS
    journal = pathlib.Path(FLAGS.journal)
    done = {json.loads(line)["model"] for line in journal.read_text().splitlines()} if (
        journal.exists()) else set()  # fmt: skip
    for name in FLAGS.only or models:
        if name not in done:
            row = {"model": name, "module": FLAGS.module}
            for column, function in COLUMNS.items():
                try:
                    row |= function(models[name])
                except Exception as error:  # what a stranger's model does is a row, not the end
                    message = re.sub(r"/\S*site-packages/", "", f"{type(error).__name__}: {error}")
                    row |= {column: "failed", f"{column} error": message[:300]}
                    if column == "small":
                        break
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row)[:400], flush=True)
            jax.clear_caches()


def planned(subject: Subject, **options: Any) -> archscale.Parametrization:
    options = {"optimizer": "adamw", **subject.options, **options}
    return archscale.parametrize(subject.model, *subject.inputs, params=subject.params, **options)


def small(build: Any) -> dict[str, Any]:
    """Traces, binds every leaf, and trains for five updates as the plan says."""
    subject = build("small")
    begun = time.perf_counter()
    plan = planned(subject)
    seconds = time.perf_counter() - begun
    params = plan.init(jax.random.key(0))
    trained = {one.name for one in plan.architecture.parameters}
    leaves = named_leaves(params)
    inputs, tx = batch(subject), plan.optimizer(RATE, weight_decay=0.1)
    outputs = subject.outputs(plan.apply(params, *inputs))
    target = jax.random.normal(jax.random.key(1), outputs.shape)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((subject.outputs(plan.apply(params, *inputs)) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(STEPS + 1):
        params, state, value = step(params, state)
        losses.append(float(value))
    return {
        "small": "ok",
        "parameters": count(params),
        "seconds": round(seconds, 2),
        "bound": trained <= leaves.keys() and count(params) >= sum(
            int(np.prod(one.shape)) for one in plan.architecture.parameters),
        "losses": [float(f"{one:.4g}") for one in losses],
        "falls": bool(losses[-1] < losses[0]),
        "notes": len(plan.architecture.notes),
        "roles": roles(plan),
    }  # fmt: skip


def roles(plan: archscale.Parametrization) -> dict[str, str]:
    """Roles by name, layers of a kind together; `kept` of what no gradient comes to."""
    found: dict[str, set[str]] = {}
    for one in plan.architecture.parameters:
        role = str(one.role) if one.trained else "kept"
        found.setdefault(re.sub(r"\d+", "#", one.name), set()).add(role)
    return {name: " ".join(sorted(one)) for name, one in found.items()}


def audited(build: Any) -> dict[str, Any]:
    """What the audit finds in the set-up that the plan itself makes, which should be nothing."""
    subject = build("small")
    plan = planned(subject)
    findings = list(_audit(subject, plan).findings)
    return {
        "audit": len(findings),
        "findings": [f"{one.kind}: {one.parameter}"[:120] for one in findings[:5]],
    }


def _audit(subject: Subject, plan: archscale.Parametrization) -> Any:
    params, inputs = plan.init(jax.random.key(0)), batch(subject)
    target = jax.random.normal(
        jax.random.key(1), subject.outputs(plan.apply(params, *inputs)).shape
    )

    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((subject.outputs(plan.apply(params, *batch[0])) - batch[1]) ** 2)

    tx = plan.optimizer(RATE, weight_decay=0.1)
    return archscale.audit(plan, tx, loss, params, (inputs, target), tuned_here=True)


def muon(build: Any) -> dict[str, Any]:
    """Whether every matrix of hidden layers is Muon's, and nothing else."""
    subject = build("small")
    plan = planned(subject, optimizer="muon")
    labels = optimizer_labels(plan.architecture)
    hidden = {one.name for one in plan.architecture.parameters if str(one.role) == "hidden"}
    of_muon = {name for name, one in labels.items() if one.startswith("muon")}
    return {
        "muon": len(of_muon), "hidden": len(hidden),
        "muon elsewhere": sorted(of_muon - hidden)[:5],
        "hidden of adam": sorted(hidden - of_muon)[:5],
    }  # fmt: skip


def real(build: Any) -> dict[str, Any]:
    """Seconds and memory of `parametrize` at real size."""
    subject = build("real")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    plan = planned(subject)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = sum(int(np.prod(one.shape)) for one in plan.architecture.parameters)
    return {"real": number, "real seconds": round(seconds, 2),
            "real GiB": round((after - before) / 2**20, 2)}  # fmt: skip


COLUMNS = {"small": small, "audit": audited, "muon": muon, "real": real}


if __name__ == "__main__":
    flags.mark_flags_as_required(["module", "journal"])
    app.run(main)
