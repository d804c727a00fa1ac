"""A training step of ours against PyTorch's, in an environment of its own.

The part of `benchmarks.lr_cost` about steps. The environment is made on the first call; PyTorch is
no dependency of the project.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.table import Table

import archscale_jax as archscale
from archscale_jax import training
from archscale_jax.models import create_network
from benchmarks import common

TORCH = "2.13.0"
TORCH_ENV = pathlib.Path(__file__).parents[1] / "build" / "torch-env"
RATE = 0.1  # where losses are compared; a wrong update shows


class Size(NamedTuple):
    """How much is done; see `--quick` of `benchmarks.lr_cost`."""

    width: int = 128
    batch: int = 256
    mlp_steps: int = 100
    cnn_width: int = 32
    cnn_batch: int = 128
    cnn_steps: int = 5
    rounds: int = 15


QUICK = Size(32, 32, 5, 4, 8, 5, 2)


def against_torch(size: Size) -> dict[str, Any]:
    """Times steps of ours and of PyTorch in turns, on the same data from the same weights."""
    try:
        python = torch_python()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return {"skipped": f"torch=={TORCH} cannot be installed: {lines[-1] if lines else error}"}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mlp = (None, size.width, size.batch, size.mlp_steps)
    cnn = (3, size.cnn_width, size.cnn_batch, size.cnn_steps)
    with tempfile.TemporaryDirectory() as folder:
        programs, orders = {}, {}
        for name, case in {"MLP": mlp, "CNN": cnn}.items():
            path = pathlib.Path(folder) / f"{name}.npz"
            programs[name] = our_steps(*case, path=path)
            orders[name] = {"arrays": str(path), "rate": RATE, "channels_last": False}
        orders["CNN, channels last"] = orders["CNN"] | {"channels_last": True}
        command = [str(python), str(pathlib.Path(__file__).with_name("torch_step.py"))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            results = _ask(server, {"threads": threads, "cases": orders})
            results["cases"] = {
                name: race(
                    server,
                    programs[name],
                    [order for order in orders if order.startswith(name)],
                    steps,
                    size.rounds,
                )
                for name, steps in {"MLP": size.mlp_steps, "CNN": size.cnn_steps}.items()
            }
            assert server.stdin is not None
            server.stdin.close()
    # Without the project's convolution, in a loop: too slow to take turns.
    stock = our_steps(3, size.cnn_width, size.cnn_batch, 2, stock=True)
    results["cases"]["CNN"]["milliseconds"]["ours, lax.conv_general_dilated"] = common.spread(
        [common.seconds(stock) / 2 * 1e3]
    )
    return results


def torch_python() -> pathlib.Path:
    """Returns the Python of the environment with PyTorch, made on the first call.

    Raises:
      OSError, subprocess.CalledProcessError: it cannot be made.
    """
    python = TORCH_ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    check = [str(python), "-c", "import numpy, torch; print(torch.__version__)"]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    try:
        if run(check).stdout.startswith(TORCH):
            return python
    except (OSError, subprocess.CalledProcessError):
        pass  # not there, or not whole
    run([sys.executable, "-m", "venv", "--clear", str(TORCH_ENV)])
    run([str(python), "-m", "pip", "install", "--quiet", f"torch=={TORCH}", "numpy"])
    run(check)
    return python


def our_steps(
    kernel_size: int | None,
    width: int,
    batch: int,
    steps: int,
    *,
    path: pathlib.Path | None = None,
    stock: bool = False,
) -> Callable[[], jax.Array]:
    """Returns compiled steps of a chain of four layers, from its initial weights to the losses.

    Args:
      kernel_size: None for `DagMLP`.
      width: features of every vertex.
      batch: examples an update.
      steps: updates of a call.
      path: where data and weights are written for `benchmarks/torch_step.py`.
      stock: convolve as Flax does by default.
    """
    graph = archscale.dag_graph(archscale.chain_string(4), kernel_size=kernel_size)
    model = create_network(graph, (28, 28, 1), width, 10, rngs=nnx.Rngs(0))
    layers: list[Any] = [model.stem, *model.layers.values()]
    if stock:
        for layer in layers:
            layer.conv_general_dilated = lax.conv_general_dilated
    generator = np.random.default_rng(0)
    images = generator.standard_normal((8192, 28, 28, 1), np.float32)
    labels = generator.integers(0, 10, 8192, np.int32)
    batches = generator.integers(0, 8192, (steps, batch), np.int32)
    if path is not None:
        weights: dict[str, Any] = {}
        for number, layer in enumerate([*layers, cast(Any, model.readout)]):
            weights[f"kernel_{number}"] = np.asarray(layer.kernel[...])
            weights[f"bias_{number}"] = np.asarray(layer.bias[...])
        np.savez(path, images=images, labels=labels, batches=batches, **weights)
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(RATE)
    state = training.create_train_state(params, model_state, optimizer, jax.random.key(0))
    arguments = (state, *map(jnp.asarray, (images, labels, batches)), jnp.int32(0))
    lower = functools.partial(training.jitted_train_batches.lower, *arguments)
    program = lower(graphdef=graphdef, optimizer=optimizer).compile()
    return lambda: program(*arguments)[1]


def race(
    server: subprocess.Popen,
    ours: Callable[[], jax.Array],
    names: list[str],
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Times ours and the cases of the server in turns; the first round is not counted.

    Raises:
      RuntimeError: the losses differ.
    """
    times: dict[str, list[float]] = {"ours": [], **{f"PyTorch, {name}": [] for name in names}}
    difference = 0.0
    for current in range(-1, rounds):
        losses, seconds = common.timed(ours)
        answers = [({"seconds": seconds}, "ours")]
        for name in names:
            answer = _ask(server, {"case": name, "steps": steps})
            answers.append((answer, f"PyTorch, {name}"))
            apart = np.abs(np.asarray(answer["losses"]) / np.asarray(losses) - 1)
            if not apart[:5].max() < 1e-5:
                raise RuntimeError(f"{name}: losses of ours and of PyTorch differ by {apart[:5]}")
            difference = max(difference, float(apart.max()))
        if current >= 0:
            for answer, name in answers:
                times[name].append(answer["seconds"] / steps * 1e3)
    fastest = min((name for name in times if name != "ours"), key=lambda one: np.median(times[one]))
    return {
        "milliseconds": {name: common.spread(values) for name, values in times.items()},
        "ratio_to_fastest_of_torch": common.ratio(times["ours"], times[fastest]),
        "steps": steps,
        "rounds": rounds,
        "largest_difference_of_losses": difference,
    }


def _ask(server: subprocess.Popen, order: dict[str, Any]) -> dict[str, Any]:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"benchmarks/torch_step.py ended with status {server.wait()}")
    return json.loads(answer)


def torch_table(results: dict[str, Any]) -> Table:
    """Returns the table of `against_torch`, or why there is none."""
    if "skipped" in results:
        return Table(title=f"PyTorch: skipped, {results['skipped']}")
    table = Table(
        title=f"Milliseconds of a training step, PyTorch {results['torch']}, "
        f"{results['threads']} threads",
        caption="; ".join(
            f"{name}: ours / fastest PyTorch {case['ratio_to_fastest_of_torch']:.2f}, losses "
            f"differ by at most {case['largest_difference_of_losses']:.0e}"
            for name, case in results["cases"].items()
        ),
    )
    for column in ("network", "program", "median (quartiles)"):
        table.add_column(column)
    for name, case in results["cases"].items():
        for program, times in case["milliseconds"].items():
            table.add_row(name, program, f"{times:.3g}")
    return table
