"""Threads of one process or processes on cores of their own? `python -m benchmarks.workers`.

Trials per second of the same study in threads and in pinned processes, one and two at a time, every
way in turns. All are on digits: `mlp` and `cnn`, rate searches of a transfer study, which compile a
program each and run for a little; `steps`, trainings of the growth study's large network, which
share a program and call it once an update.
Workers have run a trial before the clock starts; what they cost to start is told apart. Quiet
machines only: one core more or less is what is measured.
"""

import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags

from benchmarks import common
from experiments import grow_study, transfer_study
from experiments.lab.common import markdown_table
from experiments.lab.sweeps import ProcessExecutor, run_study

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "Rounds of all ways.", lower_bound=1)
flags.DEFINE_integer("trials", 8, "Trials of a round.", lower_bound=2)
flags.DEFINE_list("study", ["mlp", "cnn", "steps"], "Of mlp, cnn, steps.")

MLP = {"dataset": "digits", "downscale": 1, "batch_size": 64, "steps": 22, "seeds": 1}
CNN = {"dataset": "digits", "downscale": 1, "batch_size": 64, "steps": 22, "seeds": 1}
STEPS = {"steps": 6000, "large_width": 32, "rates": (0.01,), "statistics": 64, "held_out": 100}
WAYS = {
    "one thread": ("threads", 1, None),
    "two threads": ("threads", 2, None),
    "one process on one core": ("processes", 1, 1),
    "two processes": ("processes", 2, None),
}
"""Runner, workers, and how many cores there are for all of them (None: all)."""


def main(arguments: list[str]) -> None:
    """Measures, prints the table and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    # Workers inherit it. A trial that another has compiled would cost nothing.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    jax.config.update("jax_enable_compilation_cache", False)
    seconds: dict[str, dict[str, list[float]]] = {}
    starting: dict[str, list[float]] = {name: [] for name in WAYS}
    for count in range(FLAGS.rounds):
        for study in FLAGS.study:
            for name, way in WAYS.items():
                start, ran = run(study, count, *way)
                seconds.setdefault(study, {}).setdefault(name, []).append(ran)
                starting[name].append(start)
                print(f"{study}, {name}: {ran:.1f} s", file=sys.stderr)
    results = {
        "trials": FLAGS.trials,
        "rounds": FLAGS.rounds,
        "seconds": seconds,
        "first_trial_seconds": starting,
        "efficiency": {
            study: statistics.median(
                one / (2 * two)
                for one, two in zip(
                    by_way["one process on one core"], by_way["two processes"], strict=True
                )
            )
            for study, by_way in seconds.items()
        },
    }
    print(markdown_table(rows(seconds)))
    for study, efficiency in results["efficiency"].items():
        print(f"{study}: two processes are {efficiency:.0%} of twice one process on one core")
    path = common.write_results(f"workers_{'_'.join(FLAGS.study)}", results)
    print(f"results: {path.relative_to(path.parents[2])}")


def rows(seconds: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Returns the lines of the table, its heading first: trials per second, lowest to highest."""
    lines = [["study", *WAYS]]
    for study, by_way in seconds.items():
        cells = []
        for values in by_way.values():
            rates = sorted(FLAGS.trials / one for one in values)
            middle = statistics.median(rates)
            cells.append(f"{middle:.2f} ({rates[0]:.2f}–{rates[-1]:.2f})")
        lines.append([study, *cells])
    return lines


def run(study: str, count: int, runner: str, workers: int, cores: int | None) -> tuple[float, ...]:
    """Returns the seconds of the workers' first trials, and of the others after them."""
    first, rest = trials(study, count, workers), trials(study, count, FLAGS.trials, 40)
    with tempfile.TemporaryDirectory() as folder, on_cores(cores), options(runner, workers) as how:
        journal = pathlib.Path(folder) / "results.jsonl"
        times = []
        for chosen in (first, rest):
            start = time.perf_counter()
            function = grow_study.run if study == "steps" else transfer_study.search_rate
            records = run_study(chosen, function, journal, progress=False, **how)
            times.append(time.perf_counter() - start)
            if errors := [record["error"] for record in records if "error" in record]:
                raise RuntimeError(f"a trial failed: {errors[0]}")
        jax.clear_caches()
    return tuple(times)


def trials(study: str, count: int, number: int, width: int = 20) -> list[dict[str, Any]]:
    """Returns trials of about the same cost, others for another width."""
    if study == "steps":
        spec = {"mlp": grow_study.SPECS["mlp"] | STEPS}
        common = {"dataset": "digits", "batch_size": 64, "normalize": True, "num_seeds": number}
        found = grow_study.all_trials(spec, ["large"], common)
        return [trial | {"seed": trial["seed"] + 100 * width, "round": count} for trial in found]
    sizes = CNN if study == "cnn" else MLP
    found = []
    for index in range(number):
        trial = transfer_study.DEFAULTS | sizes | {"refine": 0, "kernel_size": None}
        trial |= {"architecture": "2_02" if study == "mlp" else "2", "width": width + index}
        if study == "cnn":
            trial |= {"kernel_size": 3, "width": width // 2 + index}
        found.append(trial | {"round": count})
    return found


@contextlib.contextmanager
def options(runner: str, workers: int) -> Iterator[dict[str, Any]]:
    """Gives the options of `run_study` for a runner."""
    if runner == "threads":
        yield {"workers": workers}
    else:
        with ProcessExecutor(workers) as executor:
            yield {"executor": executor}


@contextlib.contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Keeps this thread, and processes that it starts, on so many cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    app.run(main)
