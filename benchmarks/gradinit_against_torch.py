"""GradInit against the package `gradinit` for PyTorch; see `benchmarks.torch_process`.

The part of `benchmarks.gradinit_cost` about PyTorch. Where the gradient's norm is below γ, the
package lowers the plain loss and ours the loss after one step, so that only the derivative of the
norm can be the same. Besides, ours reads a third half of a batch, clips derivatives, and has a
first moment of Adam for each of both branches.
"""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.table import Table

import archscale_jax as archscale
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib import _gradinit_step as gradinit_step
from benchmarks import common, gradinit_ways, torch_process
from benchmarks.gradinit_ways import ALWAYS, NEVER, SCALE_RATE, Size
from experiments import gradinit_study
from experiments.gradinit_study import Network

PACKAGE = "gradinit==0.1.1"
MODULE = "torch_gradinit"
BATCH_SIZE = 32
TOLERANCE = 1e-10  # of losses and derivatives in 64 bits, relative
TOLERANCE_32 = 1e-5  # of the first loss in 32 bits
BRANCHES = {"norm": ALWAYS, "objective": NEVER}


def against_torch(size: Size, data_dir: str | None) -> dict[str, Any]:
    """Compares derivatives in 64 bits, and then times."""
    if reason := torch_process.why_no_torch([PACKAGE]):
        return {"skipped": reason}
    network = gradinit_ways.load_network(size.raced, data_dir)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        checked = check_derivatives(network, folder)
        results = race(network, size, folder)
    return results | {"network": size.raced, "package": PACKAGE} | checked


def write_case(
    path: pathlib.Path,
    params: PyTree,
    triples: list[Any],
    limit: float,
    scale_rate: float = SCALE_RATE,
) -> dict[str, Any]:
    """Writes weights and S = [a, b] of every iteration for `benchmarks/torch_gradinit.py`.

    Returns:
      The case.
    """
    whole = [[np.concatenate([a[i], b[i]]) for i in (0, 1)] for a, b, _ in triples]
    images, labels = (np.concatenate(parts) for parts in zip(*whole, strict=True))
    batches = np.arange(len(labels)).reshape(len(triples), -1)
    weights: dict[str, Any] = {
        f"params/{name}": np.asarray(leaf) for name, leaf in named_leaves(params).items()
    }
    np.savez(path, images=images, labels=labels, batches=batches, **weights)
    case = {"arrays": str(path), "limit": limit, "scale_rate": scale_rate}
    return case | {"channels_last": False}


def check_derivatives(network: Network, folder: pathlib.Path) -> dict[str, float]:
    """Returns the largest relative differences in 64 bits: of losses, of the norm's derivatives.

    Biases are drawn too: of zeros there is no derivative.

    Raises:
      RuntimeError: one that is too large.
    """
    with jax.enable_x64(True):
        params = doubles(gradinit_study.draw(network, "he", 0))
        generator = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: leaf + (leaf.ndim == 1) * generator.normal(0, 0.1, leaf.shape), params
        )
        triples = doubles(gradinit_ways.triples_of(network, BATCH_SIZE, 1, 0))
        loss, derivatives = derivatives_of_norm(network, params, triples[0])
        case = write_case(folder / "doubles.npz", params, triples, ALWAYS)
        with torch_process.torch_server(MODULE, {"case": case}, [PACKAGE]) as (server, _):
            theirs = torch_process.ask(server, {"case": "case", "steps": 1})
    found = {
        "largest_difference_of_losses": abs(theirs["losses"][0] / loss - 1),
        "largest_difference_of_derivatives": max(
            abs(theirs["derivatives"][name] / value - 1) for name, value in derivatives.items()
        ),
    }
    for name, value in found.items():
        if not value < TOLERANCE:
            raise RuntimeError(f"{PACKAGE}: {name.replace('_', ' ')} in 64 bits is {value}")
    return {f"{name}_in_64_bits": value for name, value in found.items()}


def doubles(tree: PyTree) -> PyTree:
    """Returns floating arrays in 64 bits."""
    return jax.tree.map(
        lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def derivatives_of_norm(
    network: Network, params: PyTree, triple: Any
) -> tuple[float, dict[str, float]]:
    """Returns the loss on S, and the derivative of its gradient's norm by every multiplier."""

    def loss(params: PyTree, batch: Any) -> jax.Array:  # the study's rounds to 32 bits
        images, labels = batch
        logits = nnx.merge(network.graphdef, params, network.model_state, copy=True)(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    names = list(named_leaves(params))
    variant = gradinit_step.Variant(loss, tuple(range(len(names))), "sgd", False, False)
    state = gradinit_step.initial_state(len(names))
    gradient, record = gradinit_step.measure(state.multipliers, params, triple, variant=variant)
    settings = gradinit_ways.settings_of(ALWAYS)
    state, _ = gradinit_step.lower_norm(state, gradient, params, triple, settings, variant=variant)
    derivatives = np.asarray(state.first_moments[1]) / (1 - 0.9)  # Adam's β₁, after one step
    return float(record["loss"]), dict(zip(names, derivatives.tolist(), strict=True))


def race(network: Network, size: Size, folder: pathlib.Path) -> dict[str, Any]:
    """Times iterations of both in turns, on the same data from the same weights; JSON values."""
    params = gradinit_study.draw(network, "he", 0)
    triples = gradinit_ways.triples_of(network, BATCH_SIZE, size.race_iterations, 0)
    cases = {}
    for branch, limit in BRANCHES.items():
        path = folder / f"{branch}.npz"
        case = write_case(path, params, triples, limit)
        for threads in sorted({torch_process.threads(), 1}, reverse=True):
            for last in (False, True):
                name = f"{branch}, {threads} threads" + last * ", channels last"
                cases[name] = case | {"threads": threads, "channels_last": last}
    with torch_process.torch_server(MODULE, cases, [PACKAGE]) as (server, results):
        results |= {"iterations": size.race_iterations, "branches": {}}
        for branch, limit in BRANCHES.items():
            times, difference = torch_process.take_turns(
                server,
                {"ours": functools.partial(our_losses, network, params, triples, limit)},
                [name for name in cases if name.startswith(branch)],
                size.race_iterations,
                size.rounds,
                tolerance=TOLERANCE_32,
                checked=1,
            )
            fastest = torch_process.fastest_torch(times)
            results["branches"][branch] = {
                "milliseconds": {
                    name.replace(f"PyTorch, {branch}", "PyTorch"): common.spread(values)
                    for name, values in times.items()
                },
                "ratio_to_fastest_of_torch": common.ratio(times["ours"], times[fastest]),
                "largest_difference_of_losses": difference,
            }
    return results


def our_losses(network: Network, params: PyTree, triples: list[Any], limit: float) -> jax.Array:
    """Returns the losses of all iterations, as a user calls it."""
    _, record = archscale.gradinit(
        network.loss,
        params,
        itertools.chain.from_iterable(triples),
        max_gradient_norm=limit,
        scale_learning_rate=SCALE_RATE,
    )
    return record.loss


def torch_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of `against_torch`, or why there is none."""
    if "skipped" in results:
        return Table(title=f"PyTorch: skipped, {results['skipped']}")
    table = Table(
        title=f"Milliseconds of an iteration, {results['network']}, batch {BATCH_SIZE}: ours and "
        f"{results['package']}, PyTorch {results['torch']}",
        caption="In 64 bits the derivatives of the norm differ by at most "
        f"{results['largest_difference_of_derivatives_in_64_bits']:.0e}.",
    )
    branches = results["branches"]
    columns = next(iter(branches.values()))["milliseconds"]
    for column in ("lowers", *columns, "ours/fastest of PyTorch"):
        table.add_column(column)
    for branch, one in branches.items():
        times = [f"{one['milliseconds'][name]:.3g}" for name in columns]
        table.add_row(branch, *times, f"{one['ratio_to_fastest_of_torch']:.2f}")
    return table
