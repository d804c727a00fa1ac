"""Are plans right? Plans studies, runs them, and compares the wall times.

    python -m benchmarks.plan_check --core=1

Every study is planned and run as its users do, in processes kept to one core, one after the other.
A plan takes the machine to be as busy as it found it. Where others come and go, the wall times of
one core are compared at an equal share of it: each times processor seconds over wall seconds.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_list("core", None, "Cores to run on; all that this process has, if left out.")
flags.DEFINE_integer("workers", 1, "Workers of the studies.", lower_bound=1)
flags.DEFINE_enum("runner", "local", ["local", "processes"], "Runner of the studies.")
flags.DEFINE_list("studies", None, "Names, all if left out.")
flags.DEFINE_integer("rounds", 1, "How often everything is done.", lower_bound=1)

STUDIES = {
    "small MLPs": ["--study=chains", "--width=16", "--max_networks=8"],
    "wide MLPs": ["--study=chains", "--dataset=fashion_mnist", "--width=512", "--steps=40",
                  "--max_networks=4", "--num_seeds=2"],
    "CNNs": ["--study=cnns", "--dataset=fashion_mnist", "--max_networks=4", "--num_seeds=2",
             "--cnn_steps=60", "--cnn_width=16"],
}  # fmt: skip
"""Limited by compiling, by computing, and by both."""


def main(_) -> None:
    if FLAGS.core:
        os.sched_setaffinity(0, set(map(int, FLAGS.core)))
    environment = {key: value for key, value in os.environ.items()
                   if key != "JAX_COMPILATION_CACHE_DIR"}  # fmt: skip
    rows = []
    for _ in range(FLAGS.rounds):
        for name in FLAGS.studies or STUDIES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_check(name, pathlib.Path(folder), environment))
            print(_line(rows[-1]), flush=True)
    results = {"workers": FLAGS.workers, "runner": FLAGS.runner}
    for name in ("error", "error_at_equal_share"):
        results[f"largest_{name}"] = max(abs(row[name]) for row in rows)
    cores = len(os.sched_getaffinity(0))
    common.write_results("plan_check", results | {"cores_used": cores, "rows": rows}, "flax")


def _check(name: str, folder: pathlib.Path, environment: dict[str, str]) -> dict:
    shared = [*STUDIES[name], f"--workers={FLAGS.workers}", f"--runner={FLAGS.runner}",
              f"--workdir={folder / 'study'}"]  # fmt: skip

    def called(module: str, *further: str) -> tuple[float, float]:
        start, cpu = time.perf_counter(), _cpu_seconds()
        command = [sys.executable, "-m", f"experiments.{module}", *shared, *further]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start, _cpu_seconds() - cpu

    load = os.getloadavg()[0]
    planning, planning_cpu = called("plan", f"--json={folder / 'plan.json'}")
    seconds, cpu = called("transfer")
    plan = json.loads((folder / "plan.json").read_text())
    searches = (folder / "study" / "results.jsonl").read_text().splitlines()
    runs = [json.loads(line)["result"]["runs"] for line in searches]
    row = {
        "study": name,
        "flags": STUDIES[name],
        "planning_seconds": planning,
        "planned_seconds": plan["wall"],
        "seconds": seconds,
        "planning_cpu_seconds": planning_cpu,
        "cpu_seconds": cpu,
        "limit": plan["limit"],
        "costs": plan["costs"],
        "start": plan["start"],
        "planned_trainings": sum(one["trainings"] * one["networks"] for one in plan["kinds"]),
        "trainings": sum(map(len, runs)),
        "load_average": [load, os.getloadavg()[0]],
    }
    row["error"] = row["planned_seconds"] / row["seconds"] - 1
    shares = _share(row, "planning_") / _share(row, "")
    row["error_at_equal_share"] = row["planned_seconds"] / row["seconds"] * shares - 1
    return row


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _share(row: dict, name: str) -> float:
    """Processor seconds over wall seconds: below 1 with one core, others had the rest."""
    return row[f"{name}cpu_seconds"] / row[f"{name}seconds"]


def _line(row: dict) -> str:
    return (
        f"{row['study']:12} {row['limit']:8} planned {row['planned_seconds']:6.1f} s, took "
        f"{row['seconds']:6.1f} s ({row['error']:+.0%}, at an equal share of the core "
        f"{row['error_at_equal_share']:+.0%}); trainings {row['planned_trainings']:.0f}, "
        f"{row['trainings']}; planning took {row['planning_seconds']:.1f} s; shares "
        f"{_share(row, 'planning_'):.2f}, {_share(row, ''):.2f}"
    )


if __name__ == "__main__":
    app.run(main)
