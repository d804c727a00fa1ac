"""Worker processes on this machine, each with cores of its own.

Threads of one process share its Python interpreter and XLA's thread pool; small networks, whose
updates take less than a millisecond, wait for both. A process on cores of its own waits for none.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

from experiments.lab.sweeps.study import WorkerLostError


class ProcessExecutor(concurrent.futures.Executor):
    """Runs every call in one of several processes, each pinned to its share of the cores.

    A process that dies, for want of memory or by a signal, is replaced, and what it ran is run
    again. Functions are sent by name, so they must stand at the top of a module; nothing of this
    process is inherited, and the script's own module is imported again, as with `multiprocessing`:
    guard what it runs by `if __name__ == "__main__"`.

        with ProcessExecutor(8) as executor:
            run_study(trials, run, "results.jsonl", executor=executor)
    """

    def __init__(self, workers: int, *, attempts: int = 3) -> None:
        """Starts no process before it is needed.

        Args:
          workers: processes; those beyond the number of cores share them.
          attempts: how many processes a call may lose before it raises `WorkerLostError`.

        Raises:
          ValueError: workers or attempts below 1.
        """
        for name, value in {"workers": workers, "attempts": attempts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self._attempts = attempts
        # One thread for every process: it knows what a process that died was at.
        shares = iter(share_cores(_available_cores(), workers))
        self._mine = threading.local()
        self._processes: list[concurrent.futures.ProcessPoolExecutor] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(
            workers, initializer=lambda: self._begin(next(shares))
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any):
        """Schedules a call; see `concurrent.futures.Executor.submit`.

        Raises:
          TypeError: the function or an argument cannot be sent to a process.
        """
        try:
            pickle.dumps((fn, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{error}; worker processes take functions from the top of a module, and "
                "functools.partial of them, with plain arguments"
            ) from None
        return self._threads.submit(self._call, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes; see `concurrent.futures.Executor.shutdown`."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for process in self._processes:
            process.shutdown(wait)

    def _begin(self, cores: list[int]) -> None:
        """Begins a thread; its processes inherit that they do not hear a terminal's Ctrl-C."""
        self._mine.cores = cores
        if hasattr(signal, "pthread_sigmask"):
            resource_tracker.ensure_running()  # its start would lift the mask
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def _call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for _ in range(self._attempts):
            try:
                return self._process().submit(fn, *args, **kwargs).result()
            except BrokenProcessPool:
                self._processes.remove(self._mine.process)
                del self._mine.process
        raise WorkerLostError(
            f"{self._attempts} worker processes died while they ran this; was memory short?"
        )

    def _process(self) -> concurrent.futures.ProcessPoolExecutor:
        if not hasattr(self._mine, "process"):
            self._mine.process = concurrent.futures.ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),  # a fork of JAX's threads hangs
                initializer=_settle,
                initargs=(self._mine.cores,),
            )
            self._processes.append(self._mine.process)
        return self._mine.process


def share_cores(cores: Sequence[int], workers: int) -> list[list[int]]:
    """Splits cores into a share for every worker, as even as it goes and none empty.

    With more workers than cores, workers share them in turn.
    """
    if workers >= len(cores):
        return [[core] for core, _ in zip(itertools.cycle(cores), range(workers), strict=False)]
    ends = [len(cores) * worker // workers for worker in range(workers + 1)]
    return [list(cores[start:end]) for start, end in itertools.pairwise(ends)]


def _available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _settle(cores: list[int]) -> None:
    """Begins a worker process, before JAX starts its threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's: it waits for the trial
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ["NPROC"] = str(len(cores))  # sizes XLA's thread pools


def _end_with_parent() -> None:
    """Ends this worker process as soon as the one that started it has ended, however it did."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
