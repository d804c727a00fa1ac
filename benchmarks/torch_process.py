"""PyTorch in a process and an environment of its own, and programs that take turns with it.

The environment is made on the first call; PyTorch is no dependency of the project.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common

TORCH = "2.13.0"
ROOT = pathlib.Path(__file__).parents[1]
TORCH_ENV = ROOT / "build" / "torch-env"


def torch_python(packages: Sequence[str] = ()) -> pathlib.Path:
    """Returns the Python of the environment with PyTorch, made on the first call.

    Args:
      packages: what to install besides, `NAME==VERSION`; what is there stays.

    Raises:
      OSError, subprocess.CalledProcessError: it cannot be made.
    """
    python = TORCH_ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    check = [str(python), "-c", "import numpy, torch; print(torch.__version__)"]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install.append(f"torch=={TORCH}")  # named each time: no package may bring another
    try:
        there = run(check).stdout.startswith(TORCH)
    except (OSError, subprocess.CalledProcessError):
        there = False  # or not whole
    if not there:
        run([sys.executable, "-m", "venv", "--clear", str(TORCH_ENV)])
        run([*install, "numpy"])
        run(check)
    if packages:
        run([*install, *packages])
    return python


def why_no_torch(packages: Sequence[str] = ()) -> str:
    """Returns why PyTorch or a package is not there and cannot be installed, or else nothing."""
    try:
        torch_python(packages)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        wanted = ", ".join([f"torch=={TORCH}", *packages])
        return f"{wanted} cannot be installed: {lines[-1] if lines else error}"
    return ""


@contextlib.contextmanager
def torch_server(
    module: str, cases: Mapping[str, Any], packages: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen, dict[str, Any]]]:
    """Runs a module of `benchmarks` where PyTorch is; see `benchmarks/torch_step.py`.

    Args:
      module: its name.
      cases: what it is asked for.
      packages: see `torch_python`.

    Yields:
      The process, to `take_turns` with, and its `torch` and `threads`.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [str(torch_python(packages)), "-m", f"benchmarks.{module}"]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
        yield server, ask(server, {"threads": threads(), "cases": cases})


def threads() -> int:
    """Returns the cores this process may use, as XLA does."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_turns(
    server: subprocess.Popen,
    ours: Mapping[str, Callable[[], jax.Array]],
    names: Sequence[str],
    steps: int,
    rounds: int,
    *,
    tolerance: float = 1e-5,
    checked: int = 5,
) -> tuple[dict[str, list[float]], float]:
    """Times programs of ours and cases of the server in turns; the first round is not counted.

    Args:
      server: see `torch_server`.
      ours: name -> program of so many steps that returns their losses.
      names: of the cases.
      steps: updates of a call.
      rounds: timed calls of each.
      tolerance: relative, of losses against those of the first of ours.
      checked: how many of the first losses must keep it.

    Returns:
      Milliseconds of a step in each round, by names of ours and `PyTorch, NAME`; and the largest
      relative difference of losses.

    Raises:
      RuntimeError: the losses differ.
    """
    times: dict[str, list[float]] = {}
    difference = 0.0
    for current in range(-1, rounds):
        answers: dict[str, tuple[Any, float]] = {}
        for name, program in ours.items():
            answers[name] = common.timed(program)
        for name in names:
            answer = ask(server, {"case": name, "steps": steps})
            answers[f"PyTorch, {name}"] = (answer["losses"], answer["seconds"])
        expected = np.asarray(answers[next(iter(ours))][0])
        for name, (losses, seconds) in answers.items():
            apart = np.abs(np.asarray(losses) / expected - 1)
            if not apart[:checked].max() < tolerance:
                raise RuntimeError(f"{name}: losses differ from ours by {apart[:checked]}")
            difference = max(difference, float(apart.max()))
            if current >= 0:
                times.setdefault(name, []).append(seconds / steps * 1e3)
    return times, difference


def fastest_torch(times: Mapping[str, list[float]]) -> str:
    """Returns the case of PyTorch with the smallest median in `take_turns`."""
    cases = [name for name in times if name.startswith("PyTorch, ")]
    return min(cases, key=lambda name: np.median(times[name]))


def ask(server: subprocess.Popen, order: dict[str, Any]) -> dict[str, Any]:
    """Sends an order to a `torch_server` and returns its answer."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process with PyTorch ended with status {server.wait()}")
    return json.loads(answer)
