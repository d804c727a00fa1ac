"""The harness of all benchmarks: starting, fair timing, tables, and results on disk.

Times on a shared machine drift, so programs to be compared are timed in turns within one run and
summed up by medians and quartiles, never by means or by the best time.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar
from unittest import mock

import jax
import numpy as np
from absl import app, flags, logging

import archscale_jax
from experiments.lab import files, provenance

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Try everything at a tiny size; no result is kept.")

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_XLA = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _XLA,
)
"""What JAX reports of compiling a program: tracing, lowering, XLA."""


# Starting.


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; JAX compiles what it is asked for, and reads no cache."""

    def checked(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
        logging.set_verbosity(logging.WARNING)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # of processes that are started from here
        jax.config.update("jax_enable_compilation_cache", False)
        main()

    FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS["quick"])  # --help shows it too
    app.run(checked, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return FLAGS(arguments)
    except SystemExit:  # absl has printed the help, and would end with 1
        sys.exit(0)


def sized(full: Value, tiny: Value) -> Value:
    """Returns how much is done: `tiny` with `--quick`."""
    return tiny if FLAGS.quick else full


def in_fresh_process(
    function: Callable[..., Value], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Value:
    """Calls a function in a new process: nothing is compiled there, and its memory is its own.

    Args:
      function: of a module, found there by its name; no flags are parsed.
      *arguments: that can be pickled, as what it returns.
      environment: variables to set; JAX and XLA read them when they start.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment or {}),
        concurrent.futures.ProcessPoolExecutor(1, spawn) as executor,
    ):
        return executor.submit(function, *arguments).result()


def peak_memory() -> int:
    """Returns the largest memory that this process has had, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process that started this one had then
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Timing.


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lower:{spec}}-{self.upper:{spec}})"


def spread(sample) -> Spread:
    """Returns the median and the quartiles of a sample."""
    lower, median, upper = np.quantile(np.asarray(sample, float), [0.25, 0.5, 0.75]).tolist()
    return Spread(median, lower, upper)


def timed(program: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result of one call and its seconds, until its arrays are ready."""
    start = time.perf_counter()
    result = jax.block_until_ready(program())
    return result, time.perf_counter() - start


def alternate(
    programs: Mapping[Name, Callable[[], Any]], *, rounds: int, warm_up: int = 1
) -> dict[Name, list[float]]:
    """Times programs in turns: every round calls each once, and begins with another one.

    Args:
      programs: name -> function without arguments; its result is waited for.
      rounds: number of timed calls of each program.
      warm_up: rounds before the timed ones (compilation, caches); not counted.

    Returns:
      name -> seconds of each round, in order; round i of one program is next to round i of another.
    """
    names = list(programs)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for current in range(-warm_up, rounds):
        first = current % len(names)
        for name in names[first:] + names[:first]:
            _, seconds = timed(programs[name])
            if current >= 0:
                times[name].append(seconds)
    return times


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """Compares two programs timed by `alternate`: how many times faster is `fast`?

    Returns:
      The ratio of medians, with the quartiles of the ratios within one round as its spread.
    """
    rounds = spread(np.divide(slow, fast))
    return dataclasses.replace(rounds, median=float(np.median(slow) / np.median(fast)))


class Compilations:
    """Counts the programs that XLA compiles inside a `with`, and the seconds that go into it."""

    def __enter__(self):
        self._spans: list[tuple[float, float, str]] = []
        jax.monitoring.register_event_time_span_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event in _COMPILING:
            self._spans.append((start_time, end_time, event))

    @property
    def count(self) -> int:
        """The programs so far."""
        return sum(event == _XLA for *_, event in self._spans)

    @property
    def seconds(self) -> float:
        """Tracing, lowering and XLA so far; what lies in one another counts once."""
        total, until = 0.0, -math.inf
        for start, end, _ in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total


def compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Compiles what `lower` returns, `jax.stages.Lowered`; tracing counts.

    Returns:
      The program, and `compile_seconds`, `compilations` and `temporary_bytes`.
    """
    with Compilations() as compilations:
        program, elapsed = timed(lambda: lower().compile())
    memory = program.memory_analysis().temp_size_in_bytes
    costs = {"compile_seconds": elapsed, "compilations": compilations.count}
    return program, costs | {"temporary_bytes": memory}


# Results.


def show(title: str, lines: list[list[str]], caption: str = "") -> None:
    """Prints a table as Markdown; its heading is the first line."""
    from experiments.lab.tables import markdown  # pandas takes memory, which is measured here

    print(f"\n{title}\n\n{markdown(lines)}" + f"\n{caption}\n" * bool(caption), flush=True)


def write_results(name: str, results: Mapping[str, Any], *packages: str) -> bool:
    """Writes `benchmarks/results/NAME.json`: results, machine, versions, command and date.

    A reader sees the old file or the new one, never a part of it.

    Args:
      name: of the file, that of the benchmark as a rule.
      results: what was measured; NumPy scalars and arrays, JAX arrays and `Spread` are allowed.
      *packages: further packages whose versions matter.

    Returns:
      Whether it was written: not with `--quick`.
    """
    if FLAGS.quick:
        return False
    module = getattr(sys.modules["__main__"], "__spec__", None)
    record = {
        "machine": {
            "processor": provenance.machine(),
            "devices": [device.device_kind for device in jax.devices()],
            # A machine shared with others: its times say less than the ratios within a run.
            "load_average": os.getloadavg()[0],
        },
        "versions": provenance.versions()
        | {package: importlib.metadata.version(package) for package in packages},
        "command": shlex.join(["python", "-m", module.name if module else name, *sys.argv[1:]]),
        "date": provenance.now(),
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    plain = json.loads(json.dumps(record, default=_json))
    files.write_json(path, files.strict_json(plain))  # what is not finite becomes null
    print(f"results: {path.relative_to(ROOT)}", flush=True)
    return True


def _json(value: Any) -> Any:
    if isinstance(value, Spread):
        return dataclasses.asdict(value)
    return np.asarray(value).tolist()


def read_results(name: str) -> Any:
    """Returns the results that `write_results` has written."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def journal(name: str, label: str, tests: list[str]) -> pathlib.Path:
    """Returns where a benchmark of many checks keeps what is done, to go on from there.

    Args:
      name: of the benchmark.
      label: its settings.
      tests: files of `tests` that it runs; another journal is taken when one of them changes, or
        the library.
    """
    library = pathlib.Path(archscale_jax.__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(library.rglob("*.py")), *(ROOT / "tests" / test for test in tests)]:
        digest.update(path.read_bytes())
    return ROOT / "build" / name / f"{digest.hexdigest()[:16]}-{label}.jsonl"
