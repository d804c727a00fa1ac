"""Binaries in processes forked from one that has imported what they all import.

Starting Python with JAX, Flax, SciPy and Matplotlib takes most of the time that a binary takes on
bad flags, or where it has little left to do.
"""

import importlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable

import jax
from absl import flags

# Nothing in these may run a JAX program: a process with threads is not forked safely.
for _name in (
    "archscale_jax",
    "matplotlib.figure",
    "orbax.checkpoint",
    "pandas",
    "sklearn.datasets",
):
    importlib.import_module(_name)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(__name__, "flax.linen", "flax.nnx", "scipy.stats"),
        *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
        *("experiments.lab.checkpoints", "experiments.lab.common", "experiments.lab.families"),
        *("experiments.lab.models", "experiments.lab.page", "experiments.lab.recipe"),
        *("experiments.lab.studies", "experiments.lab.training"),
    ]
)


def run_forked(
    name: str,
    flags: list[str],
    folder: pathlib.Path,
    root: pathlib.Path,
    interrupt_at: pathlib.Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m experiments.<name>` with flags; its output goes through files in a folder.

    Where a path is given, Ctrl-C comes as soon as something is there. What `prepare` does, the
    process does first: it is a function of the top of a module, or functools.partial of one.
    """
    files = [folder / stream for stream in ("stdout", "stderr")]
    for file in files:
        file.touch()
    arguments = (f"experiments.{name}", flags, files, root, interrupt_at, prepare)
    process = FORKS.Process(target=become, args=arguments)
    process.start()
    process.join(60 if interrupt_at is not None else 300)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    output, errors = (file.read_text() for file in files)
    finished = subprocess.CompletedProcess(flags, process.exitcode, output, errors)
    process.close()
    return finished


def become(
    module: str,
    flags: list[str],
    files: list[pathlib.Path],
    root: pathlib.Path,
    interrupt_at: pathlib.Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Makes the process that calls it `python -m <module>` with flags."""
    for descriptor, file in enumerate(files, start=1):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.chdir(root)
    jax.config.update("jax_disable_most_optimizations", True)
    if interrupt_at is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # fork servers ignore it
        threading.Thread(target=_interrupt, args=(interrupt_at,), daemon=True).start()
    if prepare is not None:
        prepare()
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _interrupt(path: pathlib.Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def imported(name: str) -> types.ModuleType:
    """The module of a binary, without its flags: other binaries define flags of the same names."""
    importlib.import_module("experiments.lab.common")
    before = set(flags.FLAGS)
    module = importlib.import_module(f"experiments.{name}")
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    return module
