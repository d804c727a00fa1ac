"""Does a study survive `kill -9`? `python -m benchmarks.kill_study`, about ten minutes.

Runs a small transfer study on digits undisturbed, then again, killed at random moments and started
anew each time, until it was killed so often. What both leave must have the same bytes: the
journals (so nothing is lost and nothing doubled), the tables and the summary.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from rich.console import Console

from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 20, "Kills in all.", lower_bound=1)
flags.DEFINE_integer("max_networks", 13, "Networks of the study.", lower_bound=2)
flags.DEFINE_integer("workers", 2, "Networks at a time.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the moments.")

JOURNALS = ("results.jsonl", "measurements.jsonl")
COMPARED = (*JOURNALS, "table.md", "summary.json", "config.json")


def main(arguments: list[str]) -> None:
    """Runs, kills, compares and writes the result."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    moments = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = pathlib.Path(folder) / "undisturbed", pathlib.Path(folder) / "killed"
        start = time.perf_counter()
        _study(undisturbed).communicate()
        seconds = time.perf_counter() - start
        expected = _contents(undisturbed)
        records, rounds = [], 1
        while len(records) < FLAGS.kills:
            process = _study(killed)
            try:
                # Half of a run at most, so that the moments fall everywhere while it gets ahead.
                process.communicate(timeout=moments.uniform(0, seconds / 2))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                records.append(_count(killed))
                print(f"kill {len(records)}: {records[-1]} records", file=sys.stderr)
                continue
            if process.returncode:
                raise RuntimeError(f"the study ended with status {process.returncode}")
            _compare(killed, expected)  # finished between two kills: begin another
            killed, rounds = killed.with_name(f"killed_{rounds}"), rounds + 1
        last = _study(killed)
        last.communicate()
        if last.returncode:
            raise RuntimeError(f"the study ended with status {last.returncode}")
        _compare(killed, expected)
    found = {"kills": FLAGS.kills, "rounds": rounds, "records_at_kills": records}
    path = common.write_results("kill_study", found | {"identical": True, "files": COMPARED})
    console = Console()
    console.print(
        f"{FLAGS.kills} kills in {rounds} runs of {seconds:.0f} s; records kept: {records}"
    )
    console.print(f"same bytes as undisturbed: {', '.join(COMPARED)}")
    console.print(f"results: {path.relative_to(path.parents[2])}")


def _study(workdir: pathlib.Path) -> subprocess.Popen:
    """Starts the study. Output goes nowhere: a pipe would outlive the killed process."""
    command = [sys.executable, "-m", "experiments.transfer", f"--workdir={workdir}"]
    command += ["--study=chains", f"--max_networks={FLAGS.max_networks}", "--width=16"]
    command += ["--batch_size=64", "--num_seeds=2", f"--workers={FLAGS.workers}"]
    return subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _count(workdir: pathlib.Path) -> int:
    """Number of whole records in the journals."""
    paths = [workdir / name for name in JOURNALS]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def _contents(workdir: pathlib.Path) -> dict[str, bytes]:
    contents = {name: (workdir / name).read_bytes() for name in COMPARED}
    for name in JOURNALS:
        hashes = [json.loads(line)["hash"] for line in contents[name].splitlines()]
        if len(set(hashes)) != FLAGS.max_networks or len(hashes) != FLAGS.max_networks:
            raise RuntimeError(f"{name} holds {len(hashes)} records of {FLAGS.max_networks} trials")
    return contents


def _compare(workdir: pathlib.Path, expected: dict[str, bytes]) -> None:
    found = _contents(workdir)
    if different := [name for name in COMPARED if found[name] != expected[name]]:
        raise RuntimeError(f"{', '.join(different)} differ from those of the undisturbed study")


if __name__ == "__main__":
    app.run(main)
