"""What every benchmark needs: fair timing, a description of the machine, results on disk.

Times on a shared machine drift, so programs to be compared are timed in turns within one run and
summed up by medians and quartiles, never by means or by the best time.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Name = TypeVar("Name")

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
RESULTS = pathlib.Path(__file__).parent / "results"


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lower:{spec}}-{self.upper:{spec}})"


def spread(sample) -> Spread:
    """Returns the median and the quartiles of a sample."""
    lower, median, upper = np.quantile(np.asarray(sample, float), [0.25, 0.5, 0.75])
    return Spread(float(median), float(lower), float(upper))


def timed(program: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result of one call and its seconds, until its arrays are ready."""
    start = time.perf_counter()
    result = jax.block_until_ready(program())
    return result, time.perf_counter() - start


def seconds(program: Callable[[], Any]) -> float:
    """Times one call, until its arrays are ready."""
    return timed(program)[1]


class Compilations:
    """Counts the programs that XLA compiles inside a `with`."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == COMPILE_EVENT

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Compiles what `lower` returns, `jax.stages.Lowered`; tracing counts.

    Returns:
      The program, and `compile_seconds` and `compilations`.
    """
    with Compilations() as compilations:
        program, elapsed = timed(lambda: lower().compile())
    return program, {"compile_seconds": elapsed, "compilations": compilations.count}


def alternate(
    programs: Mapping[Name, Callable[[], Any]], *, rounds: int, warm_up: int = 1
) -> dict[Name, list[float]]:
    """Times programs in turns: every round calls each once.

    Args:
      programs: name -> function without arguments; its result is waited for.
      rounds: number of timed calls of each program.
      warm_up: rounds before the timed ones (compilation, caches); not counted.

    Returns:
      name -> seconds of each round, in order; round i of one program is next to round i of another.
    """
    times: dict[Name, list[float]] = {name: [] for name in programs}
    for current in range(-warm_up, rounds):
        for name, program in programs.items():
            elapsed = seconds(program)
            if current >= 0:
                times[name].append(elapsed)
    return times


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """Compares two programs timed by `alternate`: how many times faster is `fast`?

    Returns:
      The ratio of medians, with the quartiles of the ratios within one round as its spread.
    """
    rounds = spread(np.divide(slow, fast))
    return rounds._replace(median=float(np.median(slow) / np.median(fast)))


def environment(*packages: str) -> dict[str, Any]:
    """Describes machine and software; `packages` are recorded besides Python, jax and numpy."""
    names = ("jax", "jaxlib", "numpy", *packages)
    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "devices": [device.device_kind for device in jax.devices()],
            "system": platform.system(),
            # A machine shared with others: its times say less than the ratios within a run.
            "load_average": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
    }


def write_results(name: str, results: Mapping[str, Any], *packages: str) -> pathlib.Path:
    """Writes `benchmarks/results/NAME.json`: results, machine, versions, command and date.

    A reader sees the old file or the new one, never a part of it.

    Args:
      name: the module of the benchmark, `python -m benchmarks.NAME`.
      results: what was measured; NumPy scalars and arrays, JAX arrays and `Spread` are allowed.
      *packages: further packages whose versions matter.

    Returns:
      Path of the file.
    """
    record = environment(*packages) | {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": _plain(results),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps(record, indent=2, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".part", delete=False) as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return value


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
