"""Trials on the devices of one process: a thread for every device."""

import concurrent.futures
import queue
from collections.abc import Sequence
from typing import Any

import jax


class DeviceExecutor(concurrent.futures.ThreadPoolExecutor):
    """Runs every call in one of several threads, each with a device of its own.

    A call computes on its thread's device: what it puts nowhere lies there.

        with DeviceExecutor() as executor:
            run_study(trials, run, "results.jsonl", executor=executor)
    """

    def __init__(self, devices: Sequence[Any] | None = None) -> None:
        """Starts no thread before it is needed.

        Args:
          devices: one for every thread; None takes all of this process.
        """
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        devices = jax.local_devices() if devices is None else devices
        for device in devices:
            free.put(device)

        def settle() -> None:
            # Left with the thread, whose own it is.
            jax.default_device(free.get()).__enter__()

        super().__init__(len(devices), initializer=settle)
