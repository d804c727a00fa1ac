"""Where the trials of a study run: the flags, and the executor that they name."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.lab import display, interrupts, ranges
from experiments.lab.sweeps import ProcessExecutor
from experiments.lab.sweeps.devices import DeviceExecutor
from experiments.lab.sweeps.ray_executor import RayExecutor, connected

FLAGS = flags.FLAGS

WAITING = "interrupted: waiting for the trials that have begun; again ends at once"
"""The answer to Ctrl-C where trials run beside the main thread."""


def define_flags(*, workers: int = 1) -> None:
    """Defines the flags of a study's runner, none of which changes what a trial computes."""
    flags.DEFINE_enum(
        "runner",
        "local",
        ["local", "devices", "processes", "ray"],
        "Where trials run: in threads of this process, in a thread for each of its devices, in "
        "processes pinned to cores of their own, or on a Ray cluster.",
    )
    ranges.define("workers", workers, "Trials at a time, of local and processes.")
    flags.DEFINE_string(
        "ray_address",
        None,
        "host:port of a Ray cluster's head, or auto; by default RAY_ADDRESS, or this machine.",
    )
    ranges.define("cpus_per_trial", 1.0, "Cores that Ray keeps for a trial.", "resources")
    ranges.define("gpus_per_trial", 0.0, "GPUs that Ray keeps for a trial.", "resources")
    ranges.define("attempts", 10, "Workers that a trial may lose before it has failed.")
    flags.DEFINE_bool("retry_failed", False, "Run again what failed before.")


class FailedTrialsError(RuntimeError):
    """Trials failed without which a study has no answer."""


def check_finished(records: Sequence[Mapping[str, Any]], journal: pathlib.Path) -> None:
    """Checks that no trial of a study has failed.

    Raises:
      FailedTrialsError: some have; the message names the first, and the way to run them again.
    """
    failed = [record for record in records if "error" in record]
    if failed:
        raise FailedTrialsError(
            f"{len(failed)} of {len(records)} trials failed, the first, {failed[0]['trial']}, with "
            f"{failed[0]['error']}; {journal} has the others, and --retry_failed runs them again"
        )


@contextlib.contextmanager
def runner() -> Iterator[dict[str, Any]]:
    """Gives the options of `run_study` that the flags stand for; ends workers at the end.

    Raises:
      ImportError: Ray is not installed.
      ConnectionError: no Ray cluster answers at the address.
      ValueError: an address of another form, or beside another runner.
    """
    options: dict[str, Any] = {"retry_failed": FLAGS.retry_failed, "progress": display.shown()}
    if FLAGS.ray_address and FLAGS.runner != "ray":
        raise ValueError(f"--ray_address is of --runner=ray, found --runner={FLAGS.runner}")
    if FLAGS.runner == "local" and FLAGS.workers == 1:
        yield options
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupts.announced(WAITING))
        if FLAGS.runner == "local":
            yield options | {"workers": FLAGS.workers}
        else:
            yield options | {"executor": stack.enter_context(_executor())}


@contextlib.contextmanager
def _executor() -> Iterator[concurrent.futures.Executor]:
    if FLAGS.runner == "devices":
        with DeviceExecutor() as executor:
            yield executor
    elif FLAGS.runner == "processes":
        # A second Ctrl-C ends all at once; what is left, multiprocessing cleans up with a warning.
        quiet = filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"))
        os.environ["PYTHONWARNINGS"] = ",".join(quiet)
        with ProcessExecutor(FLAGS.workers, attempts=FLAGS.attempts) as executor:
            yield executor
    else:
        threads = max(1, round(FLAGS.cpus_per_trial))
        environment = {"env_vars": {"NPROC": str(threads)}}  # sizes XLA's thread pools
        level = "error" if FLAGS.quiet else "warning"
        resources = {"num_cpus": FLAGS.cpus_per_trial, "num_gpus": FLAGS.gpus_per_trial}
        with (
            connected(FLAGS.ray_address, runtime_env=environment, logging_level=level),
            RayExecutor(attempts=FLAGS.attempts, **resources) as executor,
        ):
            yield executor
