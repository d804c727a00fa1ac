"""Where the trials of a study run: the flags, and the executor that they name."""

import contextlib
from collections.abc import Iterator
from typing import Any

from absl import flags

from archscale_jax.sweeps import ProcessExecutor
from archscale_jax.sweeps.devices import DeviceExecutor
from archscale_jax.sweeps.ray_executor import RayExecutor, connected

FLAGS = flags.FLAGS


def define_flags(*, workers: int = 1) -> None:
    """Defines the flags of a study's runner, none of which changes what a trial computes."""
    flags.DEFINE_enum(
        "runner",
        "local",
        ["local", "devices", "processes", "ray"],
        "Where trials run: in threads of this process, in a thread for each of its devices, in "
        "processes pinned to cores of their own, or on a Ray cluster.",
    )
    flags.DEFINE_integer(
        "workers", workers, "Trials at a time, of local and processes.", lower_bound=1
    )
    flags.DEFINE_string(
        "ray_address",
        None,
        "host:port of a Ray cluster's head, or auto; by default RAY_ADDRESS, or this machine.",
    )
    flags.DEFINE_float("cpus_per_trial", 1.0, "Cores that Ray keeps for a trial.", lower_bound=0.0)
    flags.DEFINE_float("gpus_per_trial", 0.0, "GPUs that Ray keeps for a trial.", lower_bound=0.0)
    flags.DEFINE_integer(
        "attempts", 10, "Workers that a trial may lose before it has failed.", lower_bound=1
    )
    flags.DEFINE_bool("retry_failed", False, "Run again what failed before.")


@contextlib.contextmanager
def runner() -> Iterator[dict[str, Any]]:
    """Gives the options of `run_study` that the flags stand for; ends workers at the end.

    Raises:
      ImportError: Ray is not installed.
      ConnectionError: no Ray cluster answers at the address.
      ValueError: an address of another form, or beside another runner.
    """
    options: dict[str, Any] = {"retry_failed": FLAGS.retry_failed}
    if FLAGS.ray_address and FLAGS.runner != "ray":
        raise ValueError(f"--ray_address is of --runner=ray, found --runner={FLAGS.runner}")
    if FLAGS.runner == "local":
        yield options | {"workers": FLAGS.workers}
    elif FLAGS.runner == "devices":
        with DeviceExecutor() as executor:
            yield options | {"executor": executor}
    elif FLAGS.runner == "processes":
        with ProcessExecutor(FLAGS.workers, attempts=FLAGS.attempts) as executor:
            yield options | {"executor": executor}
    else:
        threads = max(1, round(FLAGS.cpus_per_trial))
        environment = {"env_vars": {"NPROC": str(threads)}}  # sizes XLA's thread pools
        resources = {"num_cpus": FLAGS.cpus_per_trial, "num_gpus": FLAGS.gpus_per_trial}
        with (
            connected(FLAGS.ray_address, runtime_env=environment),
            RayExecutor(attempts=FLAGS.attempts, **resources) as executor,
        ):
            yield options | {"executor": executor}
