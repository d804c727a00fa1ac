"""Whole trainings against the package `mup` for PyTorch: `python -m benchmarks.width_against_mup`.

Perceptrons with tanh and biases, the same function at the start in both, trained by SGD with
momentum (without and with decay), Adam and AdamW in 64 bits: ours by `parametrize`, without
multipliers, the package (in an environment of its own, made on the first call) with its optimizers
and its readout. Weights decay, biases do not. The
losses must be equal, hidden widths in one ratio or in several. Adam's ε is next to nothing: the
forms differ by it, since gradients of theirs are another size.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import archscale_jax as archscale
from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_integer("updates", 20, "Updates of every training.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of weights and data.")

PACKAGE, TORCH = "mup==1.0.0", "torch==2.13.0"
ENVIRONMENT = common.ROOT / "build" / "torch-env"
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


def create_optimizer(name: str, plan: archscale.Parametrization):
    """Returns the optimizer of `benchmarks/torch_mup.py`, parametrized."""
    if name == "adam":
        return plan.optimizer(1e-2, eps=1e-30)
    if name == "adamw":
        return plan.optimizer(1e-2, 0.1, eps=1e-30)
    if name == "sgd":
        return plan.optimizer(0.1, momentum=0.9)
    # The package adds the decay to the gradient, in front of the momentum.
    return optax.chain(optax.stateless(functools.partial(decayed, plan)),
                       plan.optimizer(0.1, momentum=0.9))  # fmt: skip


def decayed(plan: archscale.Parametrization, gradients, params):
    return jax.tree.map(
        lambda gradient, weight, decay: gradient + 0.1 * decay * weight,
        gradients, params, plan.weight_decay,
    )  # fmt: skip


def train(case: dict[str, Any]) -> np.ndarray:
    """Returns the losses of a case of ours."""
    x, y = jnp.asarray(case["x"]), jnp.asarray(case["y"])
    params = [(jnp.asarray(kernel), jnp.asarray(bias)) for kernel, bias in case["params"]]

    def shapes_of(sizes):
        pairs = itertools.pairwise(sizes)
        shapes = [(jax.ShapeDtypeStruct(pair, x.dtype), jax.ShapeDtypeStruct(pair[1:], x.dtype))
                  for pair in pairs]  # fmt: skip
        return perceptron, shapes

    plan = archscale.parametrize(
        shapes_of(case["sizes"]), x, base=shapes_of(case["base"]),
        optimizer=case["optimizer"].split()[0],
    )  # fmt: skip
    optimizer = create_optimizer(case["optimizer"], plan)

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
        for optimizer in ("sgd", "sgd with decay", "adam", "adamw")
        for network, (sizes, base) in NETWORKS.items()
    ]  # fmt: skip


def python_with_mup() -> pathlib.Path:
    """Returns the Python of the environment of PyTorch and the package, made on the first call."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([str(python), *install, TORCH, PACKAGE, "numpy"], check=True)
    return python


def train_with_mup(cases: list[dict[str, Any]]) -> list[list[float]]:
    """Returns the losses of every case of the package's."""
    try:
        python = python_with_mup()
    except (OSError, subprocess.CalledProcessError) as error:
        raise app.UsageError(f"{TORCH} and {PACKAGE} cannot be installed: {error}") from error
    answer = subprocess.run(
        [str(python), "-m", "benchmarks.torch_mup"], input=json.dumps(cases), cwd=common.ROOT,
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(answer.stdout)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    cases = create_cases(common.sized(FLAGS.updates, 2), FLAGS.seed)
    trainings = []
    lines = [["optimizer", "hidden widths", "first loss", "last, ours", "last, mup", "difference"]]
    for case, theirs in zip(cases, train_with_mup(cases), strict=True):
        ours = train(case)
        difference = float(np.abs(ours / np.asarray(theirs) - 1).max())
        names = {name: case[name] for name in ("optimizer", "network")}
        trainings.append(names | {"ours": ours, "mup": theirs, "difference": difference})
        losses = [f"{loss:.4f}" for loss in (ours[0], ours[-1], theirs[-1])]
        lines.append([*names.values(), *losses, f"{difference:.0e}"])
    common.show("Losses of trainings", lines)
    apart = [one["network"] for one in trainings if not one["difference"] < TOLERANCE]
    if apart:
        raise RuntimeError(f"losses differ from mup's by more than {TOLERANCE}: {apart}")
    settings = {"package": PACKAGE, "torch": TORCH, "updates": FLAGS.updates, "seed": FLAGS.seed}
    common.write_results("width_against_mup", settings | {"trainings": trainings})


if __name__ == "__main__":
    common.run(main)
