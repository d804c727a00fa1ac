"""Networks of NAS-Bench-201 against the same in PyTorch; see `benchmarks.torch_process`.

The part of `benchmarks.cell_cost` about PyTorch: `benchmarks/torch_cell.py` has the benchmark's own
operations. Equal losses from the same weights say that both are the same networks, on images whose
sizes can be halved twice; in 64 bits, since in 32 bits rounding flips some σ'(z), and losses part.
"""

import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from archscale_jax._spaces.cell import cell_digits
from archscale_jax._trees import named_leaves
from benchmarks import cell_programs, common, torch_process
from benchmarks.cell_programs import RATE, SMALL, TOTAL_STEPS, Network, Size

PIXELS = 16
TOLERANCE = 1e-6  # of five losses in 64 bits, relative; ours are rounded to 32 bits at last
TOLERANCE_32 = 1e-5  # of the first loss in 32 bits
OURS = ("ours", "ours, for all")


def against_torch(size: Size) -> dict[str, Any]:
    """Times steps of ours and of PyTorch in turns, on the same data from the same weights."""
    if reason := torch_process.why_no_torch():
        return {"skipped": reason}
    space = cell_programs.create_network(None)
    networks = {cell: cell_programs.create_network(cell) for cell in size.cells}
    with tempfile.TemporaryDirectory() as folder:
        difference = check_networks(pathlib.Path(folder), space, networks, size.batch_size)
        results = race(pathlib.Path(folder), space, networks, size)
    return results | {"largest_difference_of_losses_in_64_bits": difference}


def check_networks(
    folder: pathlib.Path, space: Network, networks: Mapping[str, Network], batch_size: int
) -> float:
    """Returns the largest relative difference of five losses in 64 bits.

    Raises:
      RuntimeError: one that is too large.
    """
    images, *others = cell_programs.random_data(PIXELS, batch_size, 5)
    data = (images.astype(np.float64), *others)
    with jax.enable_x64(True):
        space, optimizer = as_double(space), cell_programs.create_optimizer()
        shared, _ = cell_programs.compile_steps(space, data, flip=False)
        programs, cases = {}, {}
        for cell, network in networks.items():
            network = as_double(network)
            path = write_arrays(folder / "doubles" / cell, network, data)
            cases[cell] = next(iter(torch_cases(cell, path).values()))
            state = cell_programs.start(cell_programs.as_cell(space, cell, network), optimizer)
            programs[cell] = functools.partial(shared, state)
        with torch_process.torch_server("torch_cell", cases) as (server, _):
            return max(
                torch_process.take_turns(
                    server, {"ours": program}, [cell], 5, 0, tolerance=TOLERANCE
                )[1]
                for cell, program in programs.items()
            )


def as_double(network: Network) -> Network:
    """Returns a network with all numbers but integers in 64 bits."""

    def double(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return network._replace(
        params=jax.tree.map(double, network.params),
        model_state=jax.tree.map(double, network.model_state),
    )


def race(
    folder: pathlib.Path, space: Network, networks: Mapping[str, Network], size: Size
) -> dict[str, Any]:
    """Times what `against_torch` says; JSON values."""
    data = cell_programs.random_data(PIXELS, size.batch_size, size.steps)
    optimizer = cell_programs.create_optimizer()
    shared, _ = cell_programs.compile_steps(space, data, flip=False)
    cases = {}
    for cell, network in networks.items():
        cases |= torch_cases(cell, write_arrays(folder / cell, network, data))
    with torch_process.torch_server("torch_cell", cases) as (server, results):
        results |= {"pixels": PIXELS, "steps": size.steps, "rounds": size.rounds, "cells": {}}
        for cell, network in networks.items():
            own, _ = cell_programs.compile_steps(network, data, flip=False)
            same = cell_programs.as_cell(space, cell, network)
            programs = (
                functools.partial(own, cell_programs.start(network, optimizer)),
                functools.partial(shared, cell_programs.start(same, optimizer)),
            )
            times, difference = torch_process.take_turns(
                server,
                dict(zip(OURS, programs, strict=True)),
                [name for name in cases if name.startswith(cell)],
                size.steps,
                size.rounds,
                tolerance=TOLERANCE_32,
                checked=1,
            )
            results["cells"][cell] = summary(cell, times, difference)
    return results


def write_arrays(
    folder: pathlib.Path, network: Network, data: tuple[np.ndarray, ...]
) -> pathlib.Path:
    """Writes data and weights for `benchmarks/torch_cell.py`; returns the file."""
    folder.mkdir(parents=True)
    leaves = named_leaves(network.params)
    weights: dict[str, Any] = {f"params/{name}": np.asarray(leaves[name]) for name in leaves}
    arrays = dict(zip(("images", "labels", "batches"), data, strict=True))
    np.savez(folder / "arrays.npz", **arrays, **weights)
    return folder / "arrays.npz"


def torch_cases(cell: str, path: pathlib.Path) -> dict[str, Any]:
    """Returns the cases of a cell: with all threads and with one, channels last and not."""
    case = {
        "arrays": str(path),
        "cell": cell_digits(cell),
        "sizes": [1, SMALL["channels"], SMALL["cells_per_stage"], cell_programs.NUM_CLASSES],
        "rate": RATE,
        "weight_decay": SMALL["weight_decay"],
        "total_steps": TOTAL_STEPS,
    }
    found = {}
    for threads in sorted({torch_process.threads(), 1}, reverse=True):
        for last in (False, True):
            name = f"{cell}, {threads} threads" + last * ", channels last"
            found[name] = case | {"threads": threads, "channels_last": last}
    return found


def summary(cell: str, times: Mapping[str, list[float]], difference: float) -> dict[str, Any]:
    """Returns JSON values: times of a step and of a training, and ratios to PyTorch's fastest."""
    fastest = torch_process.fastest_torch(times)
    spreads = {
        name.replace(f"PyTorch, {cell}", "PyTorch"): common.spread(values)
        for name, values in times.items()
    }
    return {
        "milliseconds": spreads,
        "training_seconds": {name: one.median * TOTAL_STEPS / 1e3 for name, one in spreads.items()},
        "fastest_of_torch": fastest.replace(f"PyTorch, {cell}", "PyTorch"),
        "ratios_to_it": {name: common.ratio(times[name], times[fastest]) for name in OURS},
        "largest_difference_of_losses": difference,
    }


def torch_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of `against_torch`, or why there is none."""
    if "skipped" in results:
        return Table(title=f"PyTorch: skipped, {results['skipped']}")
    cells = results["cells"]
    programs = next(iter(cells.values()))["milliseconds"]
    difference = results["largest_difference_of_losses_in_64_bits"]
    table = Table(
        title=f"Milliseconds of a training step, {PIXELS} x {PIXELS} pixels, PyTorch "
        f"{results['torch']}; ours with {results['threads']} threads",
        caption=f"Training: seconds of {TOTAL_STEPS} steps, ours / PyTorch's fastest. Losses of "
        f"five steps differ by at most {difference:.0e} in 64 bits.",
    )
    for column in ("cell", *programs):
        table.add_column(column)
    for column in ("ours/fastest", "for all/fastest", "training"):
        table.add_column(column, justify="right")
    for cell, one in cells.items():
        seconds = one["training_seconds"]
        table.add_row(
            cell,
            *(f"{one['milliseconds'][name]:.3g}" for name in programs),
            *(f"{one['ratios_to_it'][name]:.2f}" for name in OURS),
            f"{seconds['ours']:.1f} / {seconds[one['fastest_of_torch']]:.1f}",
        )
    return table
