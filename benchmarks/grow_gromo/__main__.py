"""Whole trainings that grow by TINY, against the package gromo: `python -m benchmarks.grow_gromo`

The perceptron of `experiments/grow.py` on Fashion-MNIST, with the same weights at the start, the
same batches, optimizer and growths. Alike in all (64 and 32 bits of gromo), and each as it is
used, see `cases.ARMS`. Every one of these has a process with one thread, which trains all rates and
seeds, in turns with the others. At the first rate every training is repeated at once, with all
programs compiled: what the first takes longer is compiling. Times are those of the processor, which
other programs on the machine change little. A run that was cut off goes on. The package stands in
an environment of its own, made on the first call.
"""

import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import common
from benchmarks.grow_gromo import cases, ours, report
from experiments.lab import studies

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
flags.DEFINE_integer("seeds", 3, "Seeds of weights, batches and statistics.", lower_bound=1)
flags.DEFINE_multi_float("rate", [0.005, 0.01], "Learning rates; the best of each counts.")

PACKAGES = ("gromo==0.1.0", "torch==2.14.1", f"numpy=={np.__version__}")
ENVIRONMENT = common.ROOT / "build" / "gromo-env"
ONE_THREAD = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SETTINGS: dict[str, Any] = {
    "dataset": "fashion_mnist", "start_width": 4, "steps": 2000, "batch_size": 64, "growths": 12,
    "interval": 80, "statistics": 1024, "held_out": 1000,
}  # fmt: skip
TINY: dict[str, Any] = {
    "dataset": "digits", "start_width": 4, "steps": 12, "batch_size": 16, "growths": 5,
    "interval": 2, "statistics": 128, "held_out": 100,
}  # fmt: skip


def main() -> None:
    settings = common.sized(SETTINGS, TINY)
    rates, seeds = common.sized((FLAGS.rate, FLAGS.seeds), (FLAGS.rate[:1], 2))
    shared, records = settings | {"data_dir": FLAGS.data_dir}, []
    journal = common.journal("grow_gromo", "quick" if FLAGS.quick else "trainings", [])
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = read_journal(journal)
    with tempfile.TemporaryDirectory() as folder, workers() as running:
        shared["folder"] = folder
        write_data(shared)
        for seed in range(seeds):
            write_arrays(shared, seed)
        for number, (rate, seed) in enumerate(itertools.product(rates, range(seeds))):
            for name in turns(list(cases.ARMS), number):
                case = cases.ARMS[name] | {"rate": rate, "seed": seed, "again": rate == rates[0]}
                label = json.dumps(settings | case, sort_keys=True)
                if label not in done:
                    done[label] = ask(running[name], shared | case | {"arrays": f"{seed}.npz"})
                    with journal.open("a") as file:
                        print(json.dumps([label, done[label]]), file=file)
                records.append({"arm": name, "rate": rate, "seed": seed} | done[label])
                shown = {key: done[label].get(key) for key in ("accuracy", "error")}
                print(f"rate {rate:g}, seed {seed}, {name}: {shown}", flush=True)
            results = {"settings": settings | {"rates": rates, "seeds": seeds},
                       "trainings": records}  # fmt: skip
            common.write_results("grow_gromo", results)
    arms = report.best_rates(records)
    common.show("Growing by TINY, each at its best rate", report.lines(arms, records, settings))
    common.show("Ours against gromo, by seed", report.differences(arms, records))
    print("\n".join(report.notes(records)))


@contextlib.contextmanager
def workers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Starts a process with one thread for every arm, and ends them."""
    modules = {"archscale_jax": (sys.executable, "ours"), "gromo": (python_with_gromo(), "theirs")}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, arm in cases.ARMS.items():
            python, module = modules[arm["package"]]
            worker = subprocess.Popen(
                [str(python), "-m", f"benchmarks.grow_gromo.{module}"], cwd=common.ROOT,
                env=os.environ | ONE_THREAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            running[name] = stack.enter_context(worker)  # its end closes the pipe, then waits
        yield running


def ask(worker: subprocess.Popen[str], case: dict[str, Any]) -> dict[str, Any]:
    """Returns what a process answers to a case."""
    assert worker.stdin is not None and worker.stdout is not None  # they are pipes
    print(json.dumps(case), file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("{"):  # the package prints too
            return json.loads(line)
    raise RuntimeError(f"{worker.args} ended with {worker.wait()}; its error stands above")


def read_journal(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the trainings that were finished before, by their cases."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(map(json.loads, lines))


def turns(names: list[str], number: int) -> list[str]:
    """All names, beginning with another one in every round."""
    first = number % len(names)
    return names[first:] + names[:first]


def write_data(case: dict[str, Any]) -> None:
    """Writes images [n, pixels] and labels [n] of both splits to the folder of a case."""
    data, folder = studies.load(case["dataset"], case["data_dir"], 1), pathlib.Path(case["folder"])
    for split in ("train", "test"):
        images = np.asarray(getattr(data, f"{split}_images"))
        np.save(folder / f"{split}_images.npy", images.reshape(len(images), -1))
        np.save(folder / f"{split}_labels.npy", np.asarray(getattr(data, f"{split}_labels")))


def write_arrays(case: dict[str, Any], seed: int) -> None:
    """Writes the weights at the start of a seed, and the examples of updates and growths."""
    data = studies.load(case["dataset"], case["data_dir"], 1)
    arrays: dict[str, Any] = cases.draw_indices(seed, len(data.train_images), case)
    arrays |= ours.create(case["dataset"], case["data_dir"], case["start_width"], seed)
    np.savez(pathlib.Path(case["folder"]) / f"{seed}.npz", **arrays)


def python_with_gromo() -> pathlib.Path:
    """Returns the Python of the environment of PyTorch and gromo, made on the first call."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), *install, *PACKAGES], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise app.UsageError(f"{', '.join(PACKAGES)} cannot be installed: {error}") from error
    return python


if __name__ == "__main__":
    common.run(main)
