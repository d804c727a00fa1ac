"""Does an update change public models as much at every width? For the models of one module.

Run by `benchmarks.public_models --coordinates` in the environment that has the packages. A model is
drawn and trained for a few updates of AdamW as its parametrization says, through `plan.apply`, at
one, two and four times a width of at least 64, on few predictions: gradients of many that point
everywhere add up as noise does, and fall with the width. What is measured, on a fixed batch, is the
root mean square change of what the loss reads and of every vertex that a layer or a residual sum
ends in.
"""

import importlib
import json
import math
import pathlib
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import archscale_jax as archscale
from archscale_jax.rules._residual import residual_branches
from benchmarks.public_models.subject import Subject, batch

FLAGS = flags.FLAGS
flags.DEFINE_string("module", None, "Module of benchmarks.public_models, maybe with SIZED.")
flags.DEFINE_list("only", [], "Names of models; all by default.")
flags.DEFINE_string("journal", None, "File to which a line a model is added.")
flags.DEFINE_integer("seeds", 3, "Seeds of weights.", lower_bound=1)
flags.DEFINE_bool("standard", False, "One rate for all leaves, and no forward multipliers.")
RATIOS, STEPS, RATE, DECAY = (1, 2, 4), 5, 3e-3, 0.1
LOGITS = "outputs"


def main(arguments: list[str]) -> None:
    del arguments
    warnings.filterwarnings("ignore")
    module = importlib.import_module(f"benchmarks.public_models.{FLAGS.module}")
    models = getattr(module, "SIZED", {})
    journal = pathlib.Path(FLAGS.journal)
    lines = journal.read_text().splitlines() if journal.exists() else []
    done = {json.loads(line)["model"] for line in lines}
    for name in FLAGS.only or models:
        if name in done or name not in models:
            continue
        begun = time.perf_counter()
        row = {"model": name, "module": FLAGS.module, **measured(models[name])}
        row["seconds"] = round(time.perf_counter() - begun, 1)
        with journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        jax.clear_caches()


def measured(build: Callable[[int], Subject]) -> dict[str, Any]:
    """Returns the changes of the outputs and of the vertex that is least flat, by width."""
    base, found = None, []
    for ratio in RATIOS:
        subject = build(ratio)
        plan = archscale.parametrize(
            subject.model, *subject.inputs, params=subject.params, base=base, optimizer="adamw",
            **subject.options,
        )  # fmt: skip
        base = base or plan
        if FLAGS.standard:
            plan = archscale.parametrize(
                subject.model, *subject.inputs, params=subject.params, optimizer="adamw",
                form="folded", **subject.options,
            )  # fmt: skip
        found.append(_changes(subject, plan))
    assert base is not None
    names = _vertices(base.architecture)
    shared = [one for one in names if all(one in sizes for sizes in found)]
    changes = {vertex: [sizes[vertex] for sizes in found] for vertex in [LOGITS, *shared]}
    ratios = {vertex: max(one) / min(one) if min(one) else math.inf
              for vertex, one in changes.items()}  # fmt: skip
    worst = max(shared, key=lambda vertex: ratios[vertex])
    return {
        "outputs": _numbers(changes[LOGITS]), "outputs ratio": round(ratios[LOGITS], 2),
        "hidden": _numbers(changes[worst]), "hidden ratio": round(ratios[worst], 2),
        "worst": names[worst], "vertices": len(shared),
        "flat": sum(ratios[vertex] <= 1.5 for vertex in shared),
        "all": {f"{vertex} {names[vertex]}": _numbers(changes[vertex]) for vertex in shared},
    }  # fmt: skip


def _vertices(architecture: archscale.Architecture) -> dict[int, str]:
    """Vertices that layers or residual sums end in, by what ends there."""
    found = {0: "stem"} if architecture.stems else {}
    functions = architecture.functions or ()
    for edge, vertex in enumerate(architecture.graph.receivers.tolist()):
        for name in functions[edge].weights:
            short = re.sub(r"\d+", "", name.removesuffix("/kernel"))[-60:]
            found[vertex] = found.get(vertex, short)
    return found | dict.fromkeys(residual_branches(architecture), "stream")


def rms(values: Any) -> float:
    """The root mean square of all entries."""
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def _numbers(values: list[float]) -> list[float]:
    return [float(f"{one:.3g}") for one in values]


def _changes(subject: Subject, plan: archscale.Parametrization) -> dict[Any, float]:
    """Trains, and returns by how much outputs and vertices have changed."""
    tx = plan.optimizer(RATE, weight_decay=DECAY)

    def outputs(params: Any, inputs: Any) -> jax.Array:
        return subject.outputs(plan.apply(params, *inputs))

    def loss(params: Any, inputs: Any, target: jax.Array) -> jax.Array:
        found = outputs(params, inputs)
        if subject.classes:
            return optax.softmax_cross_entropy_with_integer_labels(found, target).mean()
        return jnp.mean((found - target) ** 2)

    @jax.jit
    def step(params: Any, state: Any, *batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def features(params: Any, inputs: Any) -> tuple[dict[int, jax.Array], jax.Array]:
        hidden = archscale.vertex_features(plan._model.apply, params, *inputs)
        return hidden, outputs(params, inputs)

    # Rows that the model multiplies by so much more than the base does are read so.
    read = {
        use.vertex or 0: 1 / one.rows
        for one in plan.architecture.parameters if one.rows != 1 for use in one.uses
        if use.kind == "embedding"
    }  # fmt: skip

    def once(seed: int) -> dict[Any, float]:
        params, inputs = plan.init(jax.random.key(seed)), batch(subject, seed)
        target = _target(subject, jax.eval_shape(outputs, params, inputs).shape, seed)
        before, state = jax.device_get(features(params, inputs)), tx.init(params)
        for _ in range(STEPS):
            params, state = step(params, state, inputs, target)
        after = jax.device_get(features(params, inputs))
        hidden = {
            vertex: rms(after[0][vertex] - one) * read.get(vertex, 1.0)
            for vertex, one in before[0].items()
        }
        return {**hidden, LOGITS: rms(after[1] - before[1])}

    changes = [once(seed) for seed in range(FLAGS.seeds)]
    return {key: rms([one[key] for one in changes]) for key in changes[0]}


def _target(subject: Subject, shape: tuple[int, ...], seed: int) -> jax.Array:
    random = np.random.default_rng(seed)
    if subject.classes:
        return jnp.asarray(random.integers(0, shape[-1], shape[:-1]))
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


if __name__ == "__main__":
    flags.mark_flags_as_required(["module", "journal"])
    app.run(main)
