"""A training step of ours against PyTorch's, in an environment of its own.

The part of `benchmarks.lr_cost` about steps; see `benchmarks.torch_process`.
"""

import functools
import pathlib
import subprocess
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
from archscale_jax._spaces import chain_string
from benchmarks import common, torch_process
from experiments.lab import training
from experiments.lab.models import create_network

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
    if reason := torch_process.why_no_torch():
        return {"skipped": reason}
    mlp = (None, size.width, size.batch, size.mlp_steps)
    cnn = (3, size.cnn_width, size.cnn_batch, size.cnn_steps)
    with tempfile.TemporaryDirectory() as folder:
        programs, orders = {}, {}
        for name, case in {"MLP": mlp, "CNN": cnn}.items():
            path = pathlib.Path(folder) / f"{name}.npz"
            programs[name] = our_steps(*case, path=path)
            orders[name] = {"arrays": str(path), "rate": RATE, "channels_last": False}
        orders["CNN, channels last"] = orders["CNN"] | {"channels_last": True}
        with torch_process.torch_server("torch_step", orders) as (server, results):
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
    # Without the project's convolution, in a loop: too slow to take turns.
    stock = our_steps(3, size.cnn_width, size.cnn_batch, 2, stock=True)
    results["cases"]["CNN"]["milliseconds"]["ours, lax.conv_general_dilated"] = common.spread(
        [common.seconds(stock) / 2 * 1e3]
    )
    return results


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
    graph = archscale.dag_graph(chain_string(4), kernel_size=kernel_size)
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
    """Times ours and the cases of the server in turns, which must agree to 1e-5 at first."""
    times, difference = torch_process.take_turns(server, {"ours": ours}, names, steps, rounds)
    fastest = torch_process.fastest_torch(times)
    return {
        "milliseconds": {name: common.spread(values) for name, values in times.items()},
        "ratio_to_fastest_of_torch": common.ratio(times["ours"], times[fastest]),
        "steps": steps,
        "rounds": rounds,
        "largest_difference_of_losses": difference,
    }


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
