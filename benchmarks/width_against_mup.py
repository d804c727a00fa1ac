"""Whole trainings against the package `mup` for PyTorch: `python -m benchmarks.width_against_mup`.

Perceptrons with tanh and biases, the same function at the start in both, trained by SGD with
momentum, Adam and AdamW in 64 bits: ours with `width_rule`, without multipliers, the package (in
an environment of its own, see `benchmarks.torch_process`) with its optimizers and its readout. The
losses must be equal, hidden widths in one ratio or in several. Adam's ε is next to nothing: the
forms differ by it, since gradients of theirs are another size.
"""

import itertools
import json
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import archscale_jax as archscale
from benchmarks import common, torch_process
from experiments.lab.common import markdown_table

FLAGS = flags.FLAGS
flags.DEFINE_integer("updates", 20, "Updates of every training.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of weights and data.")

PACKAGE = "mup==1.0.0"
TOLERANCE = 1e-10  # relative, of losses
NETWORKS = {  # features of the layers, and of those of the base
    "all widths × 4": ([64, 128, 128, 10], [64, 32, 32, 10]),
    "× 4, × 2, × 4": ([64, 128, 32, 128, 10], [64, 32, 16, 32, 10]),
}


def perceptron(params, x):
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


def create_optimizer(name: str, scale: optax.GradientTransformation):
    """Returns the optimizer of `benchmarks/torch_mup.py`, its rates scaled."""
    if name == "sgd":
        return optax.chain(optax.sgd(0.1, momentum=0.9), scale)
    if name == "adam":
        return optax.chain(optax.adam(1e-2, eps=1e-30), scale)
    # The package keeps rate × decay, so the decay stands behind the factors.
    return optax.chain(
        optax.scale_by_adam(eps=1e-30), scale,
        optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2),
    )  # fmt: skip


def train(case: dict[str, Any]) -> np.ndarray:
    """Returns the losses of a case of ours."""
    x, y = jnp.asarray(case["x"]), jnp.asarray(case["y"])
    params = [(jnp.asarray(kernel), jnp.asarray(bias)) for kernel, bias in case["params"]]

    def traced(sizes):
        pairs = itertools.pairwise(sizes)
        shapes = [(jax.ShapeDtypeStruct(pair, x.dtype), jax.ShapeDtypeStruct(pair[1:], x.dtype))
                  for pair in pairs]  # fmt: skip
        return archscale.trace(perceptron, shapes, x)

    scale = archscale.scale_by_architecture(
        traced(case["sizes"]), traced(case["base"]), "none",
        width_rule=case["optimizer"].removesuffix("w"),
    )  # fmt: skip
    optimizer = create_optimizer(case["optimizer"], scale)

    def loss(params):
        logits = perceptron(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, optimizer.init(params))
    return np.asarray(jax.lax.scan(step, carry, length=case["updates"])[1])


def create_cases(updates: int, seed: int) -> list[dict[str, Any]]:
    """Returns every optimizer on every network, with weights and data as lists."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(32, 64)).tolist(), random.integers(0, 10, 32).tolist()

    def draw(sizes):
        return [
            ((random.normal(size=pair) / pair[0] ** 0.5).tolist(),
             (0.1 * random.normal(size=pair[1])).tolist())
            for pair in itertools.pairwise(sizes)
        ]  # fmt: skip

    return [
        {"optimizer": optimizer, "network": network, "sizes": sizes, "base": base,
         "params": draw(sizes), "x": x, "y": y, "updates": updates}
        for optimizer in ("sgd", "adam", "adamw")
        for network, (sizes, base) in NETWORKS.items()
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Trains, compares, prints the table and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    if reason := torch_process.why_no_torch([PACKAGE]):
        raise app.UsageError(reason)
    jax.config.update("jax_enable_x64", True)
    cases = create_cases(FLAGS.updates, FLAGS.seed)
    command = [str(torch_process.torch_python([PACKAGE])), "-m", "benchmarks.torch_mup"]
    answer = subprocess.run(
        command, input=json.dumps(cases), cwd=torch_process.ROOT,
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    trainings = []
    for case, theirs in zip(cases, json.loads(answer.stdout), strict=True):
        ours = train(case)
        difference = float(np.abs(ours / np.asarray(theirs) - 1).max())
        trainings.append(
            {"optimizer": case["optimizer"], "network": case["network"],
             "ours": ours.tolist(), "mup": theirs, "difference": difference}
        )  # fmt: skip
    rows = [["optimizer", "hidden widths", "first loss", "last, ours", "last, mup", "difference"]]
    for one in trainings:
        losses = [one["ours"][0], one["ours"][-1], one["mup"][-1]]
        numbers = [*(f"{loss:.4f}" for loss in losses), f"{one['difference']:.0e}"]
        rows.append([one["optimizer"], one["network"], *numbers])
    print(markdown_table(rows))
    apart = [one["network"] for one in trainings if not one["difference"] < TOLERANCE]
    if apart:
        raise RuntimeError(f"losses differ from mup's by more than {TOLERANCE}: {apart}")
    results = {"package": PACKAGE, "torch": torch_process.TORCH, "updates": FLAGS.updates,
               "seed": FLAGS.seed, "trainings": trainings}  # fmt: skip
    common.write_results("width_against_mup", results)


if __name__ == "__main__":
    app.run(main)
