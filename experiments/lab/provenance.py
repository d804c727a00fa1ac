"""Which commands made the results in a folder: when, on which machine, with which versions."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import archscale_jax as archscale
from experiments.lab import files

JOURNAL = "commands.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib")

Command = dict[str, Any]

_FIELDS = {"command": str, "started": str, "resumed": bool, "machine": str, "devices": list,
           "versions": dict}  # fmt: skip


def record_command(workdir: pathlib.Path, *, resumed: bool, devices: Sequence[Any] = ()) -> None:
    """Appends this process to the journal of the commands that worked in a folder.

    Args:
      workdir: the folder of a run.
      resumed: whether it held the run before.
      devices: those of JAX that compute, where it is this process that computes.
    """
    kinds = [device.device_kind for device in devices]
    record = {
        "command": command(),
        "started": now(),
        "resumed": resumed,
        "machine": machine(),
        "devices": [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)],
        "versions": versions(),
    }
    files.append_record(workdir / JOURNAL, record)


def command(python: str = "python") -> str:
    """Returns the command that started this process."""
    return shlex.join([python, "-m", _module(sys.argv[0]), *sys.argv[1:]])


def study_of(command: str) -> str:
    """Returns the binary of what `command` returns, such as `experiments.train`."""
    return command.partition(" -m ")[2].partition(" ")[0]


def read_commands(workdir: pathlib.Path) -> list[Command]:
    """Returns the commands that worked in a folder, oldest first.

    Raises:
      ValueError: the journal holds something else; the message names it.
    """
    commands = files.read_records(workdir / JOURNAL)
    for number, one in enumerate(commands, start=1):
        files.check_fields(one, _FIELDS, f"{workdir / JOURNAL} line {number}")
    return commands


def now() -> str:
    """Returns date and time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine() -> str:
    """Returns processor, cores of this process and system in words; neither host nor user."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = _processor() or platform.machine()
    return f"{processor}, {cores} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this library, and of those that results depend on."""
    found = {"Python": platform.python_version(), "archscale_jax": archscale.__version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _module(script: str) -> str:
    """`experiments.train` for the path of its file, or for itself."""
    return "experiments." + script.removesuffix(".py").rpartition("/")[2].removeprefix(
        "experiments."
    )


def _processor() -> str:
    """The processor's name as Linux tells it; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")
