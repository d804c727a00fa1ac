"""Trials as tasks of a Ray cluster, behind the interface of `concurrent.futures`.

Ray schedules, restarts what died and moves what a machine took with it; nothing of that is ours.
Here is what a study needs beside: an address that cannot be reached raises at once, a worker
with other code or other versions computes nothing, and a trial that always kills its worker fails.
"""

import concurrent.futures
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from archscale_jax._extras import needed_by
from experiments.lab.sweeps.study import WorkerLostError
from experiments.lab.sweeps.versions import differing_versions, versions

CONNECT_SECONDS = 3.0
"""How long an address may take to answer."""
CHECK_SECONDS = 6.0
"""How long a Ray head may take to say that it is well."""


class VersionError(RuntimeError):
    """A worker would run other code, or other versions, than the process that leads the study."""


class RayExecutor(concurrent.futures.Executor):
    """Runs every call as a task of the Ray cluster that this process is connected to.

    A future that is cancelled cancels its task, be it waiting or running. The call and its
    arguments are sent with cloudpickle, which takes functions of a notebook too.
    """

    def __init__(self, *, attempts: int = 10, **options: Any) -> None:
        """Prepares tasks; `connected` makes the connection.

        Args:
          attempts: how many workers or machines a call may lose before it raises
            `WorkerLostError`.
          **options: of `ray.remote`: `num_cpus`, `num_gpus`, `resources`, `memory`, …

        Raises:
          ImportError: Ray is not installed.
          ValueError: attempts below 1.
        """
        with needed_by("experiments.lab.sweeps.ray_executor.RayExecutor", "ray"):
            import ray

        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, found {attempts}")
        self._attempts = attempts
        self._task = ray.remote(max_retries=attempts - 1, **options)(_call_where_same)
        self._versions: dict[tuple[str, ...], dict[str, str]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any):
        """Submits a task; see `concurrent.futures.Executor.submit`.

        The future raises `VersionError` where the worker's versions differ.
        """
        import ray

        reference = self._task.remote(*self._expected(fn, *args), fn, args, kwargs)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def finish(done: concurrent.futures.Future[Any]) -> None:
            if future.set_running_or_notify_cancel():
                if error := done.exception():
                    future.set_exception(self._translated(error))
                else:
                    future.set_result(done.result())

        def cancel(future: concurrent.futures.Future[Any]) -> None:
            if future.cancelled() and ray.is_initialized():
                ray.cancel(reference, force=True)

        future.add_done_callback(cancel)
        reference.future().add_done_callback(finish)
        return future

    def _expected(self, *called: Any) -> tuple[tuple[str, ...], dict[str, str]]:
        """The packages of the functions that are called, and the versions here."""
        functions = [getattr(one, "func", one) for one in called if callable(one)]
        packages = tuple(sorted({_package(one.__module__) for one in functions} - {""}))
        if packages not in self._versions:
            self._versions[packages] = versions(packages)
        return packages, self._versions[packages]

    def _translated(self, error: BaseException) -> BaseException:
        """The error that the task raised, or ours where its worker was lost."""
        from ray import exceptions

        if isinstance(error, exceptions.RayTaskError):
            return error.cause
        lost = (
            *(exceptions.WorkerCrashedError, exceptions.NodeDiedError),
            *(exceptions.LocalRayletDiedError, exceptions.OutOfMemoryError),
        )
        if isinstance(error, lost):
            return WorkerLostError(f"{self._attempts} workers died while they ran this: {error}")
        return error


def _package(module: str) -> str:
    """The package of a module, of the one that was started with `python -m` too; may be empty."""
    if module == "__main__":
        module = sys.modules["__main__"].__package__ or ""
    return module.partition(".")[0]


def _call_where_same(
    packages: tuple[str, ...],
    expected: Mapping[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Any,
) -> Any:
    if different := differing_versions(versions(packages), expected):
        raise VersionError(
            f"worker {socket.gethostname()} has {different}; install the same there, or submit the "
            "study as a Ray job with a working directory"
        )
    return fn(*args, **kwargs)


@contextmanager
def connected(address: str | None = None, **options: Any) -> Iterator[None]:
    """Connects this process to a Ray cluster, and ends the connection.

    Args:
      address: `host:port` of the head, `ray://host:port` of a Ray client server, `auto` for a
        cluster that runs on this machine; None for what RAY_ADDRESS names, and otherwise for a
        new cluster of this machine alone, which ends with the connection.
      **options: of `ray.init`.

    Raises:
      ImportError: Ray is not installed.
      ConnectionError: no cluster answers there, within ten seconds; or one of another Ray or
        Python version.
      ValueError: an address of another form.
    """
    with needed_by("a study on a Ray cluster", "ray"):
        import ray
    address = address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "auto", "local"):
        _check_reachable(address)
    settings: dict[str, Any] = {"address": address, "logging_level": "warning"} | options
    try:
        with warnings.catch_warnings():
            # A cluster of this machine is started by forks that become other programs at once.
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(**settings)
    except RuntimeError as error:  # Ray's word for versions that differ
        raise ConnectionError(f"the Ray cluster at {address or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises where no Ray head answers; `ray.init` itself would end the process after a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"a Ray address is host:port, ray://host:port or auto, found {address!r}")
    advice = "is `ray start --head` running there, and its port open?"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address} ({error}); {advice}") from None
    if address.startswith("ray://"):
        return
    check = "import sys; from ray.scripts.scripts import main; main()"
    command = [sys.executable, "-c", check, "health-check", "--address", address]
    nowhere = subprocess.DEVNULL
    try:
        subprocess.run(command, check=True, timeout=CHECK_SECONDS, stdout=nowhere, stderr=nowhere)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        text = f"what answers at {address} is not a healthy Ray head; {advice}"
        raise ConnectionError(text) from None
