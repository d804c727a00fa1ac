"""A growth step against the package `gromo` for PyTorch: `python -m benchmarks.grow_against_torch`.

TINY adds neurons to the first hidden layer of perceptrons with tanh on Fashion-MNIST, ours and the
package's (in an environment of its own, see `benchmarks.torch_process`) from the same weights and
examples. They are compared first, in 64 bits, where they must agree, and in 32, and timed then in
turns, in a process of its own for every number of threads.

Ours drops eigenvalues of S below a part of the largest, the package those below a number. Of these
pixels some hardly vary: eigenvalues of S come down to 1e-9 of the largest without a gap, so each
threshold drops others. So both get the same one: the middle of the widest gap between eigenvalues
from 1e-6 to 1e-5 of the largest, ours (whose default is 1e-6) as this part, the package as this
part times the largest eigenvalue of S/n; then rounding moves none across. For δW* the package
inverts what the layer behind reads without a threshold; ours must drop nothing there. Each with its
own defaults is compared too, 32 bits with 64: what is left then is what rounding does to it.

Statistics of ours are what `measure` takes: two compiled passes, the tracing before each and δW*
on the host; the passes are timed alone too. Of the package they are one pass forward and back.
What is solved is from the sums on; for the package δW* counts here.
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from archscale_jax.contrib import find_neuron_groups
from archscale_jax.contrib._growth.bottleneck import layer_statistics
from archscale_jax.contrib._growth.measured import Measured, measure
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup
from archscale_jax.contrib._growth.solve import solve
from archscale_jax.contrib._growth.statistics import pair_statistics
from benchmarks import common, torch_process
from experiments.lab import datasets
from experiments.lab.common import markdown_table

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
flags.DEFINE_integer("examples", 4096, "Examples of the statistics.", lower_bound=1024)
flags.DEFINE_multi_integer("width", [64, 256], "Neurons of both hidden layers.", lower_bound=16)
flags.DEFINE_integer("neurons", 16, "New neurons.", lower_bound=1)
flags.DEFINE_integer("rounds", 3, "Turns of each program.", lower_bound=1)
flags.DEFINE_integer("repeats", 7, "Timed steps of a program in a turn.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the weights.")
flags.DEFINE_bool("quick", False, "Try everything at a tiny size; times say nothing, none is kept.")

PACKAGE = "gromo==0.1.0"
CLASSES = 10
TOLERANCE = 1e-6  # of all differences in 64 bits
CUTOFF, THRESHOLD = 1e-6, 1e-3  # the defaults of `grow`
NONE = 0.0  # threshold of singular values: the number of neurons decides
THEIRS = {
    "gromo, solved in 32 bits": ("--solution-dtype=float32",),
    "gromo, solved in 64 bits": ("--solution-dtype=float64",),
}
PARTS = ("statistics", "solving", "both")


class Case(NamedTuple):
    """A network, data, and how both are asked.

    Attributes:
      path: of the arrays for `benchmarks/torch_gromo.py`, in 64 bits.
      number: of new neurons.
      cutoff: of ours, relative.
      threshold: of the package's, absolute.
    """

    path: pathlib.Path
    number: int
    cutoff: float
    threshold: float


class Found(NamedTuple):
    """What a growth step found, biases below weights.

    Attributes:
      update: δW* of the layer that reads the new neurons.
      fan_in: α.
      fan_out: ω.
      singular_values: λ.
      explained: how fast δW* lowers the loss.
    """

    update: np.ndarray
    fan_in: np.ndarray
    fan_out: np.ndarray
    singular_values: np.ndarray
    explained: float


def main(arguments: list[str]) -> None:
    """Compares, times, prints the tables and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    if reason := torch_process.why_no_torch([PACKAGE]):
        raise app.UsageError(reason)
    widths, examples, number, rounds, repeats = FLAGS.width, FLAGS.examples, FLAGS.neurons, 1, 1
    if FLAGS.quick:
        widths, examples, number = [16], 1024, 4
    else:
        rounds, repeats = FLAGS.rounds, FLAGS.repeats
    python = torch_process.torch_python([PACKAGE])
    results: dict[str, Any] = {"settings": {
        "dataset": "fashion_mnist", "examples": examples, "number": number, "rounds": rounds,
        "repeats": repeats, "seed": FLAGS.seed, "package": PACKAGE, "torch": torch_process.TORCH,
    }, "networks": {}}  # fmt: skip
    inputs, labels = read_data(FLAGS.data_dir, examples)
    with tempfile.TemporaryDirectory() as folder:
        cases = {}
        for width in widths:
            path = pathlib.Path(folder) / f"{width}.npz"
            case, spectrum = create_case(path, inputs, labels, width, number, FLAGS.seed)
            name = f"{inputs.shape[1]}-{width}-{width}-{CLASSES}"
            results["networks"][name] = spectrum | {"agreement": agreement(case, python)}
            cases[name] = case
        print(markdown_table(agreement_rows(results["networks"])))
        for name, case in cases.items():
            results["networks"][name]["times"] = {
                str(threads): in_process_of(threads, race, case, python, threads, rounds, repeats)
                for threads in sorted({1, torch_process.threads()})
            }
    print(markdown_table(time_rows(results["networks"])))
    if not FLAGS.quick:
        path = common.write_results("grow_against_torch", results, "optax")
        print(f"results: {path.relative_to(path.parents[2])}")


# The case.


def read_data(data_dir: str | None, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first images as rows, in 64 bits, and their labels."""
    data = datasets.load("fashion_mnist", data_dir=data_dir)
    images = np.asarray(data.train_images[:examples], np.float64)
    return images.reshape(len(images), -1), np.asarray(data.train_labels[:examples], np.int32)


def create_case(
    path: pathlib.Path, inputs: np.ndarray, labels: np.ndarray, width: int, number: int, seed: int
) -> tuple[Case, dict[str, Any]]:
    """Draws weights and writes all; returns the case and where the spectrum of S is cut."""
    generator = np.random.default_rng(seed)
    sizes = (inputs.shape[1], width, width, CLASSES)
    arrays: dict[str, Any] = {"inputs": inputs, "labels": labels, "number": number}
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        arrays[f"w{index}"] = generator.normal(0, rows**-0.5, (rows, columns))
        arrays[f"b{index}"] = generator.normal(0, 0.1, columns)
    np.savez(path, **arrays)
    values = np.linalg.eigvalsh(covariance(inputs))
    parts = values[(values > 1e-6 * values[-1]) & (values < 1e-5 * values[-1])] / values[-1]
    widest = int(np.argmax(parts[1:] / parts[:-1]))
    below, above = parts[widest : widest + 2]
    cutoff = float(np.sqrt(below * above))
    case = Case(path, number, cutoff, cutoff * float(values[-1]))
    spectrum = {
        "inputs": len(values),
        "directions": int(np.sum(values > case.threshold)),
        "cutoff": case.cutoff,
        "numerical_threshold": case.threshold,
        "gap": above / below,
    }
    return case, spectrum


def covariance(inputs: np.ndarray) -> np.ndarray:
    """Returns S of rows, with a 1 for the bias."""
    rows = np.hstack([inputs, np.ones((len(inputs), 1))])
    return rows.T @ rows / len(rows)


# Ours.


def loss(params: Mapping[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross-entropy of the perceptron."""
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["w0"] + params["b0"])
    hidden = jnp.tanh(hidden @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def read_case(case: Case, dtype: Any) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the parameters and the batch on the device."""
    with np.load(case.path) as arrays:
        params = {
            f"{kind}{index}": jnp.asarray(arrays[f"{kind}{index}"], dtype)
            for index in range(3)
            for kind in "wb"
        }
        batch = jnp.asarray(arrays["inputs"], dtype), jnp.asarray(arrays["labels"], jnp.int32)
    return jax.block_until_ready((params, batch))


def first_group(params: Any, batch: Any) -> NeuronGroup:
    """Returns the neurons of the first hidden layer."""
    units = find_neuron_groups(loss, params, batch)[0]
    if (units.producers, units.consumers) != (("w0",), ("w1",)):
        raise RuntimeError(f"the first hidden layer was not found: {units}")
    return units


def ours(case: Case, dtype: Any, cutoff: float, threshold: float) -> Found:
    """Takes a step of ours."""
    params, batch = read_case(case, dtype)
    units = first_group(params, batch)
    measured = measure(loss, params, [batch], [units], cutoff=cutoff)
    layer = measured.bottlenecks["w1"]
    if layer.rank != len(params["w1"]) + 1:
        raise RuntimeError(f"δW* was found in {layer.rank} directions only")
    new = solve(params, measured, [units], number=case.number, threshold=threshold, cutoff=cutoff)[
        units.name
    ]
    update = np.vstack([layer.update["w1"], layer.update["b1"]])
    return Found(update, new.fan_in, new.fan_out, new.singular_values, layer.explained)


# The package's.


def theirs(
    case: Case, python: pathlib.Path, options: Sequence[str]
) -> tuple[Found, dict[str, np.ndarray]]:
    """Takes a step of the package's; returns it and all that the script answers."""
    with tempfile.TemporaryDirectory() as folder:
        answer = pathlib.Path(folder) / "answer.npz"
        command = [python, "-m", "benchmarks.torch_gromo", case.path, answer, "--reduction=sum"]
        subprocess.run([*map(str, command), *options], cwd=torch_process.ROOT, check=True)
        with np.load(answer) as arrays:
            found = {name: np.array(arrays[name]) for name in arrays}
    return Found(
        -np.vstack([found["delta_weight"], found["delta_bias"]]),
        np.vstack([found["alpha_weight"], found["alpha_bias"]]),
        found["omega"],
        found["singular_values"],
        float(found["decrease"]),
    ), found


def thresholds(case: Case) -> tuple[str, ...]:
    """Returns the options by which the package drops what ours drops."""
    return f"--numerical-threshold={case.threshold!r}", f"--statistical-threshold={NONE}"


# Do they agree?


def agreement(case: Case, python: pathlib.Path) -> dict[str, dict[str, float]]:
    """Returns differences of ours and the package's, and of 32 bits from 64 of each.

    Raises:
      RuntimeError: one of ours and the package's in 64 bits is too large.
    """
    found: dict[tuple[str, str], Found] = {}
    for bits, dtype in (("64", jnp.float64), ("32", jnp.float32)):
        with jax.enable_x64(bits == "64"):
            found["ours", bits] = ours(case, dtype, case.cutoff, NONE)
            found["ours, defaults", bits] = ours(case, dtype, CUTOFF, THRESHOLD)
        options = (f"--dtype=float{bits}",)  # solved alike
        found["gromo", bits] = theirs(case, python, [*options, *thresholds(case)])[0]
        found["gromo, defaults", bits] = theirs(case, python, options)[0]
    mixed = ("--dtype=float32", "--solution-dtype=float64", *thresholds(case))
    found["gromo", "solved in 64"] = theirs(case, python, mixed)[0]
    with np.load(case.path) as arrays:
        values, vectors = np.linalg.eigh(covariance(arrays["inputs"]))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    compared = {
        "ours and gromo, 64 bits": (("ours", "64"), ("gromo", "64")),
        "ours and gromo, 32 bits": (("ours", "32"), ("gromo", "32")),
        "ours and gromo, 32 bits, solved in 64": (("ours", "32"), ("gromo", "solved in 64")),
        "ours, 64 and 32 bits": (("ours", "64"), ("ours", "32")),
        "gromo, 64 and 32 bits": (("gromo", "64"), ("gromo", "32")),
        "gromo, 64 and 32 bits, solved in 64": (("gromo", "64"), ("gromo", "solved in 64")),
    } | {
        f"{name}, 64 and 32 bits": ((name, "64"), (name, "32"))
        for name in ("ours, defaults", "gromo, defaults")
    }
    result = {
        name: differences(found[one], found[other], root) for name, (one, other) in compared.items()
    }
    for name, value in result["ours and gromo, 64 bits"].items():
        if not value < TOLERANCE:
            raise RuntimeError(f"{PACKAGE}: {name.replace('_', ' ')} in 64 bits differ by {value}")
    return result


def differences(one: Found, other: Found, root: np.ndarray) -> dict[str, float]:
    """Returns the largest relative differences, and the largest principal angle in radians.

    Of matrices relative to the largest entry. The signs of α and ω are free, so that their product
    is compared, and the span of S^½ α.

    Args:
      one: to which differences are relative.
      other: of the same network.
      root: S^½.
    """
    if len(one.singular_values) != len(other.singular_values):
        raise RuntimeError(
            f"{len(one.singular_values)} and {len(other.singular_values)} neurons were found"
        )
    bases = [np.linalg.qr(root @ step.fan_in.astype(np.float64))[0] for step in (one, other)]
    rest = bases[1] - bases[0] @ (bases[0].T @ bases[1])
    sine = np.linalg.norm(rest, 2)
    return {
        "singular_values": relative(one.singular_values, other.singular_values, entries=True),
        "update": relative(one.update, other.update),
        "explained": abs(other.explained / one.explained - 1),
        "product": relative(one.fan_in @ one.fan_out, other.fan_in @ other.fan_out),
        "principal_angle": float(np.arcsin(min(sine, 1.0))),
    }


def relative(one: np.ndarray, other: np.ndarray, *, entries: bool = False) -> float:
    """Returns the largest difference, relative to the largest entry or to each."""
    size = np.abs(one) if entries else np.abs(one).max()
    return float(np.max(np.abs(other.astype(np.float64) - one) / size))


# Times.


def in_process_of(threads: int, function: Any, *arguments: Any) -> Any:
    """Calls a function in a new process with so many threads; XLA reads NPROC when it starts."""
    names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, dict.fromkeys(names, str(threads))),
        concurrent.futures.ProcessPoolExecutor(1, spawn) as executor,
    ):
        return executor.submit(function, *arguments).result()


def race(
    case: Case, python: pathlib.Path, threads: int, rounds: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Times steps in 32 bits in turns; JSON values, milliseconds by programs and parts.

    Of ours it gives too: the time of the `passes` alone; `compile_seconds`, by which the first
    `measure` took longer than later ones, and how many programs it compiled; and the seconds of the
    first `find_neuron_groups` and of another.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    params, batch = read_case(case, jnp.float32)
    units, finding = common.timed(lambda: first_group(params, batch))
    found_again = common.seconds(lambda: first_group(params, batch))
    with common.Compilations() as compilations:
        _, first, _ = our_step(case, params, batch, units)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("ours", *THEIRS)}
    passes: list[float] = []
    for _ in range(rounds):
        measured, *_ = our_step(case, params, batch, units)  # as the script does, one before
        alone = functools.partial(our_passes, measured, params, batch, units)
        for _ in range(repeats):
            _, statistics, solving = our_step(case, params, batch, units)
            times["ours"].append((statistics, solving))
            passes.append(common.seconds(alone))
        for name, options in THEIRS.items():
            options = [*thresholds(case), *options, f"--threads={threads}", f"--repeats={repeats}"]
            _, answer = theirs(case, python, options)
            parts = answer["statistics_seconds"], answer["solution_seconds"]
            times[name] += zip(*(part.tolist() for part in parts), strict=True)
    found: dict[str, dict[str, Any]] = {}
    for name, steps in times.items():
        both = [*zip(*steps, strict=True), [sum(step) for step in steps]]
        found[name] = {
            part: common.spread(np.multiply(values, 1e3))
            for part, values in zip(PARTS, both, strict=True)
        }
    found["ours"] |= {
        "passes": common.spread(np.multiply(passes, 1e3)),
        "compile_seconds": first - found["ours"]["statistics"].median / 1e3,
        "compilations": compilations.count,
        "find_units_seconds": finding,
        "find_units_again_seconds": found_again,
    }
    return found


def our_step(
    case: Case, params: Any, batch: Any, units: NeuronGroup
) -> tuple[Measured, float, float]:
    """Takes a step of ours; returns the seconds of the statistics and of solving too."""
    measured, statistics = common.timed(
        lambda: measure(loss, params, [batch], [units], cutoff=case.cutoff)
    )
    solving = common.seconds(
        lambda: solve(
            params, measured, [units], number=case.number, threshold=NONE, cutoff=case.cutoff
        )
    )
    return measured, statistics, solving


def our_passes(measured: Measured, params: Any, batch: Any, units: NeuronGroup) -> Any:
    """Runs the compiled passes of `measure` alone."""
    kinds = tuple(kind for kind in measured.kinds if kind.weight in units.consumers)
    layers = layer_statistics(params, batch, loss_fn=loss, kinds=kinds)
    update = measured.bottlenecks["w1"].update
    updates = {"w1": np.vstack([update["w1"], update["b1"]])}
    # Named as `measure` names them, or it would be compiled again.
    pairs = pair_statistics(
        params,
        batch,
        updates,
        loss_fn=loss,
        kinds=measured.kinds,
        groups=(units,),
        restricted=False,
    )
    return layers, pairs


# Tables.


def agreement_rows(networks: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of `agreement`."""
    rows = [["network", "compared", "λ", "δW*", "gain of δW*", "Σ α ω", "angle"]]
    for name, network in networks.items():
        for pair, values in network["agreement"].items():
            rows.append([name, pair, *(f"{value:.1e}" for value in values.values())])
    return rows


def time_rows(networks: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of `race`."""
    heading = ["network", "threads", "milliseconds of", *PARTS, "both, to ours"]
    rows = [[*heading, "passes alone", "compiling, s"]]
    for name, network in networks.items():
        for threads, programs in network["times"].items():
            base = programs["ours"]["both"].median
            for program, values in programs.items():
                row = [name, threads, program, *(f"{values[part]:.3g}" for part in PARTS)]
                row.append(f"{values['both'].median / base:.2f}")
                own = "passes" in values
                row.append(f"{values['passes']:.3g}" if own else "")
                row.append(f"{values['compile_seconds']:.2f}" if own else "")
                rows.append(row)
    return rows


if __name__ == "__main__":
    app.run(main)
