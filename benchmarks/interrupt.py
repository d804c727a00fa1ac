"""Does Ctrl-C end a binary well? `python -m benchmarks.interrupt`, about a quarter of an hour.

Starts each binary and interrupts it, after 1 s up to --latest; then the command that its last line
names goes on, and is interrupted in turn. Once a binary finishes, its results must have the bytes
of an undisturbed run, and another begins. The last interrupts are five in 0.2 s.
"""

import collections
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_list("binary", ["train", "scaling"], "Binaries to interrupt.")
flags.DEFINE_integer("interrupts", 24, "Interrupts of each, once.", lower_bound=1)
flags.DEFINE_integer("bursts", 6, "Interrupts of each, five times in 0.2 s.", lower_bound=0)
flags.DEFINE_float("latest", 25.0, "Seconds after which the last one comes.", lower_bound=1.0)

FLAGS_OF = {"train": ["--epochs=400"]}
"""Of binaries that are over too soon else."""
SIGNALLED, GOES_ON = "interrupted; ", "go on with: "


def main() -> None:
    found = {}
    for binary in FLAGS.binary:
        with tempfile.TemporaryDirectory() as folder:
            found[binary] = _study(binary, pathlib.Path(folder))
        print(f"{binary}: {found[binary]['summary']}")
    common.write_results("interrupt", found)


def _study(binary: str, folder: pathlib.Path) -> dict[str, Any]:
    start = [sys.executable, "-m", f"experiments.{binary}", *FLAGS_OF.get(binary, [])]
    once = np.linspace(1.0, FLAGS.latest, FLAGS.interrupts)
    bursts = np.linspace(1.0, FLAGS.latest, FLAGS.bursts)
    events: list[dict[str, Any]] = []
    runs = [folder / "0"]
    command = [*start, f"--workdir={runs[0]}"]
    for seconds, count in [*((one, 1) for one in once), *((one, 5) for one in bursts)]:
        event, errors = _interrupt(command, float(seconds), count)
        if event is None:  # it had finished: another begins
            runs.append(folder / str(len(runs)))
            command = [*start, f"--workdir={runs[-1]}"]
            event, errors = _interrupt(command, float(seconds), count)
        if event is None:
            raise RuntimeError(f"{binary} ends within {seconds:.0f} s; lower --latest")
        events.append(event)
        print(f"{binary}: {event}", file=sys.stderr)
        for line in errors.splitlines():
            if GOES_ON in line:
                command = shlex.split(line.partition(GOES_ON)[2])
    subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True)
    subprocess.run([*start, f"--workdir={folder / 'undisturbed'}"], cwd=common.ROOT, check=True,
                   capture_output=True)  # fmt: skip
    expected = (folder / "undisturbed" / "results.jsonl").read_bytes()
    identical = [(run / "results.jsonl").read_bytes() == expected for run in runs]
    statuses = collections.Counter(str(one["status"]) for one in events)
    summary = {
        "interrupts": len(events),
        "statuses": dict(statuses),
        "crashes": sum(one["status"] not in (130, -signal.SIGINT) for one in events),
        "clean": sum(one["clean"] for one in events),
        "longest_seconds": max(one["seconds"] for one in events),
        "finished_runs": len(runs),
        "identical": sum(identical),
    }
    return {"command": start[1:], "summary": summary, "events": events}


def _interrupt(command: list[str], seconds: float, count: int) -> tuple[dict[str, Any] | None, str]:
    """Interrupts a command; None where it has ended before, and what it wrote to standard error."""
    process = subprocess.Popen(
        command, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=seconds)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {errors}")
        return None, errors
    except subprocess.TimeoutExpired:
        sent = time.perf_counter()
        for _ in range(count):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.2 / count if count > 1 else 0)
        _, errors = process.communicate(timeout=300)
    lines = errors.splitlines()
    written = any(line.startswith(SIGNALLED) for line in lines[-1:])
    event = {
        "after_seconds": round(seconds, 2),
        "signals": count,
        "status": process.returncode,
        "seconds": round(time.perf_counter() - sent, 2),
        "last_line": lines[-1].partition(" /")[0] if lines else "",
        "clean": process.returncode == 130 and written and "Traceback" not in errors,
    }
    return event, errors


if __name__ == "__main__":
    common.run(main)
