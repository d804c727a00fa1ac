"""How long a transfer study will take, what it will cost, and where its limit is.

    python -m experiments.plan --study=chains --dataset=fashion_mnist --workers=2

Takes the flags of `experiments.transfer` and plans what that call would still run; runs nothing of
it, and writes nothing but --json. Reads the program of every network (its operations as XLA counts
them), compiles and times a sample of them on this machine, and counts the trainings of the
searches: as many as the finished trials in --workdir had, or else as a search on parabolas has.
The report and the figures at the end are not counted.
"""

import math
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import plan_estimate, plan_probe, transfer, transfer_study
from experiments.lab import common, display, files, ranges
from experiments.lab.sweeps import missing_trials, trial_hash
from experiments.plan_estimate import Cost, Estimate

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(transfer)
ranges.define("devices", None, "Cores, or accelerators; left out, those of this machine.")
ranges.define("price_per_hour", None, "Of one device.", "price")
ranges.define("samples", 5, "Networks of a kind to compile and time.")
ranges.define("seconds", 3.0, "A training that takes longer is timed in part.")
flags.DEFINE_string("json", None, "File for the numbers.")

Trial = dict[str, Any]


def run() -> None:
    """Measures, estimates, prints."""
    imported = time.process_time()  # one thread has imported all that the study imports
    if FLAGS.runner not in ("local", "processes"):
        raise ValueError(
            f"--runner={FLAGS.runner}: other devices cannot be timed from here; plan local or "
            "processes, on one of them"
        )
    # A cache would have what is compiled here, and the study's own first call not.
    jax.config.update("jax_enable_compilation_cache", False)
    _take_share()
    start = time.perf_counter()
    trials = _trials()
    plan_probe.load_seconds(trials, FLAGS.data_dir)
    start = imported + time.perf_counter() - start
    if FLAGS.runner == "processes":
        start *= 2  # each process imports and reads, after the first has
    journals = _journals()
    missing = {name: missing_trials(trials, records, retry_failed=FLAGS.retry_failed)
               for name, records in journals.items()}  # fmt: skip
    wanted = {trial_hash(trial): dict(trial) for every in missing.values() for trial in every}
    if not wanted:
        raise ValueError(f"{FLAGS.workdir} holds the whole study; nothing is left to plan")
    console = Console()
    phases, flops, lines = _phases(wanted, missing, journals["results"])
    devices = FLAGS.devices or _devices()
    found = plan_estimate.estimate(
        [phase for phase in phases if phase],
        workers=FLAGS.workers,
        devices=devices,
        threads=FLAGS.runner == "local" and FLAGS.workers > 1,
        start=start,
        flops=flops,
    )
    console.print(_groups_table(lines))
    console.print(_table(found, devices))
    for line in plan_estimate.advice(found, workers=FLAGS.workers, devices=devices):
        console.print(line)
    if FLAGS.json:
        files.write_json(FLAGS.json, _record(found, devices, lines))


def _take_share() -> None:
    """Keeps this process to the cores that one of the workers will have."""
    if hasattr(os, "sched_setaffinity") and FLAGS.workers > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: max(len(cores) // FLAGS.workers, 1)])


_ALL_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _devices() -> int:
    return (_ALL_CORES or 1) if jax.default_backend() == "cpu" else jax.device_count()


def _trials() -> list[Trial]:
    """The trials of the studies, each once, in the order in which they run."""
    values = FLAGS.flags_by_module_dict()[transfer.__name__]
    settings = {flag.name: flag.value for flag in values}
    names = list(transfer_study.STUDIES) if FLAGS.study == ["all"] else dict.fromkeys(FLAGS.study)
    trials = [
        trial
        for name in names
        for trial in transfer_study.trials_of(name, settings, FLAGS.data_dir)[: FLAGS.max_networks]
    ]
    return list({trial_hash(trial): trial for trial in trials}.values())


def _journals() -> dict[str, list[dict[str, Any]]]:
    """What is finished, by the phase."""
    names = ["results", "measurements", *(["sharpness"] if FLAGS.sharpness else [])]
    return {name: files.read_records(pathlib.Path(FLAGS.workdir) / f"{name}.jsonl")
            for name in names}  # fmt: skip


def _kind(trial: Trial) -> tuple:
    """Trials of one kind differ in their network alone, and their costs follow its size."""
    apart = ("architecture", "kernel_size", "width")
    return bool(trial["kernel_size"]), *(trial[k] for k in sorted(trial) if k not in apart)


def _trainings(trial: Trial, finished) -> tuple[float, float]:
    """How many trainings a search has, those lost apart: of such as are finished, or estimated."""
    like = ("optimizer", "seeds", "refine", "steps", "dataset")
    counts = []
    for record in finished:
        other = record["trial"]
        same = bool(other["kernel_size"]) == bool(trial["kernel_size"])
        if "result" in record and same and all(other[key] == trial[key] for key in like):
            lost = sum(one[2] is None for one in record["result"]["runs"])
            counts.append((len(record["result"]["runs"]) - lost, lost))
    if counts:
        ended, lost = (statistics.fmean(one) for one in zip(*counts, strict=True))
        return ended, lost
    low, high = transfer_study.RATES[trial["optimizer"]]
    rates = np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist()
    middle = math.sqrt(low * high)
    return plan_estimate.count_trainings(rates, trial["seeds"], middle, trial["refine"])


def _phases(
    wanted: dict[str, Trial], missing, finished
) -> tuple[list[list[Cost]], float, list[dict[str, Any]]]:
    """Times a sample of every kind; the costs by phase, the operations, and a line a kind."""
    kinds: dict[tuple, list[str]] = {}
    for name, trial in wanted.items():
        kinds.setdefault(_kind(trial), []).append(name)
    costs: dict[str, dict[str, Cost]] = {phase: {} for phase in missing}
    flops, lines = 0.0, []
    sizes_of = _sizes(wanted)
    for number, names in enumerate(kinds.values()):
        trials = [wanted[name] for name in names]
        sizes = [sizes_of[name] for name in names]
        operations = [float(one.operations) for one in sizes]
        sample = plan_estimate.choose_samples(operations, FLAGS.samples)
        probes = {}
        with display.progress(f"networks timed, {_title(trials[0])}", len(sample)) as advance:
            for index in sample:
                probes[index] = plan_probe.probe(
                    trials[index], FLAGS.data_dir, seconds=FLAGS.seconds, sharpness=FLAGS.sharpness
                )
                advance()

        def spread(sizes: Sequence[float], part, probes=probes, first=number > 0) -> list[float]:
            return plan_estimate.interpolate(
                sizes, {index: part(one) for index, one in probes.items()}, first
            )

        once = [spread(operations, lambda one, f=f: one.once[f]) for f in range(3)]
        of_flops = [one.flops for one in sizes]
        runs, losts = spread(of_flops, lambda one: one.run), spread(of_flops, lambda one: one.lost)
        ended, lost = _trainings(trials[0], finished)
        for index, name in enumerate(names):
            compute = ended * runs[index] + lost * losts[index]
            costs["results"][name] = Cost(compute, once[1][index], once[2][index])
            flops += ended * sizes[index].flops * trials[index]["steps"]
        for place, phase in enumerate(list(missing)[1:]):
            parts = [spread(operations, lambda one, f=f, p=place: one.measurements[p][f])
                     for f in range(3)]  # fmt: skip
            costs[phase] |= {name: Cost(*(part[i] for part in parts))
                             for i, name in enumerate(names)}  # fmt: skip
        steps = trials[0]["steps"]
        lines.append({
            "kind": _title(trials[0]),
            "networks": len(names), "timed": len(sample), "trainings": ended + lost,
            "updates": round(ended * steps * len(names)),
            "step_flops": statistics.fmean(of_flops),
            "run_seconds": statistics.fmean(runs),
            "flops_per_second": sum(of_flops) * steps / sum(runs),
            "once_seconds": statistics.fmean(map(sum, zip(*once, strict=True))),
        })  # fmt: skip
    phases = [[costs[phase][trial_hash(trial)] for trial in missing[phase]] for phase in missing]
    return phases, flops, lines


def _sizes(wanted: dict[str, Trial]) -> dict[str, plan_probe.Size]:
    found = {}
    with display.progress("networks read", len(wanted)) as advance:
        for name, trial in wanted.items():
            found[name] = plan_probe.size(trial, FLAGS.data_dir)
            advance()
    return found


def _title(trial: Trial) -> str:
    return f"{'CNN' if trial['kernel_size'] else 'MLP'}, {trial['optimizer']}"


def _groups_table(lines: list[dict[str, Any]]) -> Table:
    result = Table(title="networks", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = {
        "kind": ("kind", "s"), "networks": ("count", "d"), "timed": ("timed", "d"),
        "trainings": ("trainings", ".1f"), "updates": ("updates", ".3g"),
        "run_seconds": ("s a training", ".3g"), "once_seconds": ("s to compile", ".3g"),
        "flops_per_second": ("FLOP/s", ".2e"),
    }  # fmt: skip
    for heading, _ in columns.values():
        result.add_column(heading, justify="right")
    for line in lines:
        result.add_row(*(format(line[name], spec) for name, (_, spec) in columns.items()))
    return result


def _table(found: Estimate, devices: int) -> Table:
    result = Table(title="plan", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "seconds", "share"):
        result.add_column(column, justify="right")
    start = found.start * found.workers
    parts = {"compute": found.costs.compute, "compile (XLA)": found.costs.compile,
             "trace, lower, build": found.costs.python, "start, input": start}  # fmt: skip
    for name, seconds in parts.items():
        result.add_row(name, f"{seconds:.1f}", f"{seconds / sum(parts.values()):.0%}")
    result.add_row(
        f"wall time, {found.workers} of {FLAGS.workers} workers", f"{found.wall:.1f}", ""
    )
    result.add_row("limit", plan_estimate.limit(found), "")
    result.add_row("operations", f"{found.flops:.3g}", "")
    result.add_row(f"device hours, {devices} devices", f"{found.device_seconds / 3600:.3g}", "")
    if FLAGS.price_per_hour is not None:
        cost = found.device_seconds / 3600 * FLAGS.price_per_hour
        result.add_row("cost", f"{cost:.2f}", "")
    return result


def _record(found: Estimate, devices: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    values = found._asdict() | {"costs": found.costs._asdict()}
    price = FLAGS.price_per_hour
    cost = None if price is None else found.device_seconds / 3600 * price
    return values | {"limit": plan_estimate.limit(found), "devices": devices, "cost": cost,
                     "kinds": lines}  # fmt: skip


if __name__ == "__main__":
    common.run_binary(run)
