"""Threads of one process or processes on cores of their own? `python -m benchmarks.workers`.

Trials per second of the same study in threads and in pinned processes, one and two at a time, every
way in turns. All are on digits: `mlp` and `cnn`, rate searches of a transfer study, which compile a
program each and run for a little; `steps`, trainings of the growth study's large network, which
share a program and call it once an update.
Workers have run a trial before the clock starts; what they cost to start is told apart. Quiet
machines only: one core more or less is what is measured.
"""

import contextlib
import functools
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from benchmarks import common
from experiments import grow_study, transfer_study
from experiments.lab.sweeps import ProcessExecutor, run_study

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "Rounds of all ways.", lower_bound=1)
flags.DEFINE_integer("trials", 8, "Trials of a round.", lower_bound=2)
flags.DEFINE_list("study", ["mlp", "cnn", "steps"], "Of mlp, cnn, steps.")

SEARCH = {"dataset": "digits", "downscale": 1, "batch_size": 64, "steps": 22, "seeds": 1}
STEPS = {"large_width": 32, "rates": (0.01,), "statistics": 64, "held_out": 100}
WAYS = {
    "one thread": ("threads", 1, None),
    "two threads": ("threads", 2, None),
    "one process on one core": ("processes", 1, 1),
    "two processes": ("processes", 2, None),
}
"""Runner, workers, and how many cores there are for all of them (None: all)."""


def main() -> None:
    seconds: dict[str, dict[str, list[float]]] = {}
    starting: dict[str, list[float]] = {name: [] for name in WAYS}
    for count in range(FLAGS.rounds):
        for study in FLAGS.study:
            for name, way in WAYS.items():
                start, ran = run(study, count, *way)
                seconds.setdefault(study, {}).setdefault(name, []).append(ran)
                starting[name].append(start)
                print(f"{study}, {name}: {ran:.1f} s", file=sys.stderr)
    efficiency = {}
    lines = [["study", *WAYS, "two processes of twice one"]]
    for study, by_way in seconds.items():
        pairs = zip(by_way["one process on one core"], by_way["two processes"], strict=True)
        efficiency[study] = statistics.median(one / (2 * two) for one, two in pairs)
        cells = [_rates(values) for values in by_way.values()]
        lines.append([study, *cells, f"{efficiency[study]:.0%}"])
    common.show("Trials per second, median (lowest to highest)", lines)
    results = {
        "trials": FLAGS.trials,
        "rounds": FLAGS.rounds,
        "seconds": seconds,
        "first_trial_seconds": starting,
        "efficiency": efficiency,
    }
    common.write_results(f"workers_{'_'.join(FLAGS.study)}", results)


def _rates(seconds: list[float]) -> str:
    rates = sorted(FLAGS.trials / one for one in seconds)
    return f"{statistics.median(rates):.2f} ({rates[0]:.2f}–{rates[-1]:.2f})"


def run(study: str, count: int, runner: str, workers: int, cores: int | None) -> tuple[float, ...]:
    """Returns the seconds of the workers' first trials, and of the others after them."""
    first, rest = trials(study, count, workers), trials(study, count, FLAGS.trials, 40)
    function = grow_study.run if study == "steps" else transfer_study.search_rate
    with tempfile.TemporaryDirectory() as folder, on_cores(cores), options(runner, workers) as how:
        journal = pathlib.Path(folder) / "results.jsonl"
        times = []
        for chosen in (first, rest):
            run = functools.partial(run_study, chosen, function, journal, progress=False, **how)
            records, seconds = common.timed(run)
            times.append(seconds)
            if errors := [record["error"] for record in records if "error" in record]:
                raise RuntimeError(f"a trial failed: {errors[0]}")
        jax.clear_caches()
    return tuple(times)


def trials(study: str, count: int, number: int, width: int = 20) -> list[dict[str, Any]]:
    """Returns trials of about the same cost, others for another width."""
    if study == "steps":
        steps = {"steps": common.sized(6000, 20)}
        spec = {"mlp": grow_study.SPECS["mlp"] | STEPS | steps}
        settings = {"dataset": "digits", "batch_size": 64, "normalize": True, "num_seeds": number}
        found = grow_study.all_trials(spec, ["large"], settings)
        return [trial | {"seed": trial["seed"] + 100 * width, "round": count} for trial in found]
    network = {"architecture": "2_02", "kernel_size": None}
    if study == "cnn":
        network, width = {"architecture": "2", "kernel_size": 3}, width // 2
    shared = transfer_study.DEFAULTS | SEARCH | network | {"refine": 0, "round": count}
    return [shared | {"width": width + index} for index in range(number)]


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
    common.run(main)
