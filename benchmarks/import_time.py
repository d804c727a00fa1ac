"""What does importing the library cost? `python -m benchmarks.import_time`, two minutes.

Starts fresh interpreters in turns, each with one line of imports, and compares their times within
a round: the library beside what its users import anyway, JAX and Optax, and with Flax for those who
have it. Bytecode is compiled before, as an installation does. Goal: at most 0.15 seconds more. The
seconds of processors say it too where other work shares the machine.
"""

import os
import resource
import subprocess
import sys
import tempfile

import numpy as np
from absl import flags

from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 25, "Timed interpreters of every line.", lower_bound=3)

CLOCKS = ("seconds", "processor_seconds")
IMPORTS = {
    "nothing": "pass",
    "jax": "import jax",
    "jax, optax": "import jax, optax",
    "jax, optax, archscale_jax": "import jax, optax, archscale_jax",
    "jax, optax, flax": "import jax, optax, flax.nnx",
    "jax, optax, flax, archscale_jax": "import jax, optax, flax.nnx, archscale_jax",
    "jax, optax, flax, archscale_jax with models and training": (
        "import jax, optax, flax.nnx, experiments.lab.models, experiments.lab.training"
    ),
}
BESIDE = {  # what is added to what
    "jax, optax": "jax",
    "jax, optax, archscale_jax": "jax, optax",
    "jax, optax, flax": "jax, optax",
    "jax, optax, flax, archscale_jax": "jax, optax, flax",
    "jax, optax, flax, archscale_jax with models and training": "jax, optax, flax",
}


def clocks(line: str, environment: dict[str, str]) -> dict[str, float]:
    """Runs a line in a fresh interpreter: seconds by the clock, and of processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, elapsed = common.timed(
        lambda: subprocess.run([sys.executable, "-c", line], env=environment, check=True)
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": elapsed, "processor_seconds": used}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns name -> clock -> times, of all lines in turns."""
    times = {name: {clock: [] for clock in CLOCKS} for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for current in range(-2, rounds):  # the first rounds compile bytecode and fill caches
            for name, line in IMPORTS.items():
                for clock, value in clocks(line, environment).items():
                    if current >= 0:
                        times[name][clock].append(value)
    return times


def main() -> None:
    times = measure(common.sized(FLAGS.rounds, 1))
    results: dict[str, dict] = {}
    lines = [["imports", *CLOCKS, "added to", *(f"added {clock}" for clock in CLOCKS)]]
    for name, sample in times.items():
        found = {clock: common.spread(sample[clock]) for clock in CLOCKS}
        base, added = BESIDE.get(name), {}
        if base:
            more = {clock: np.subtract(sample[clock], times[base][clock]) for clock in CLOCKS}
            added = {clock: common.spread(more[clock]) for clock in CLOCKS}
        results[name] = {**found, "added_to": base, "added": added}
        cells = [[f"{one:.3f}" for one in spreads.values()] for spreads in (found, added)]
        lines.append([name, *cells[0], base or "", *(cells[1] or ["", ""])])
    common.show("Seconds of importing", lines)
    settings = {"rounds": FLAGS.rounds, "imports": IMPORTS}
    common.write_results("import_time", settings | {"measured": results})


if __name__ == "__main__":
    common.run(main)
