"""Functions in processes of their own, with as many virtual CPU devices as they need.

The number of devices is settled when JAX starts, and one serves all other tests best.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax

import tests.binaries  # noqa: F401 - what a process is forked from has imported all this


def on_devices(
    function: Callable[..., Any], *arguments: Any, count: int = 8, as_users: bool = False
) -> Any:
    """Returns what a function of a module returns on `count` devices.

    With `as_users` compiled by XLA's default generator of code, where bits or programs are looked
    at; otherwise by that of the other tests.
    """
    if as_users:
        arguments = (function, *arguments)
        function = _as_users
    return _run([(function, arguments, {"jax_num_cpu_devices": count})])[0]


def _as_users(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function without the flag that `conftest` sets; XLA reads it at its first program."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(one for one in flags if "fusion_emitters" not in one)
    return function(*arguments)


def on_hosts(function: Callable[..., Any], *arguments: Any, hosts: int = 2, count: int = 4) -> list:
    """Returns what a function returns in each of several processes that `jax.distributed` joins."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = {"jax_num_cpu_devices": count, "jax_cpu_collectives_implementation": "gloo"}
    return _run(
        [
            (_joined, (address, hosts, number, function, arguments), options)
            for number in range(hosts)
        ]
    )


def _joined(address: str, hosts: int, number: int, function, arguments) -> Any:
    jax.distributed.initialize(address, hosts, number, initialization_timeout=60)
    answer = function(*arguments)
    jax.distributed.shutdown()  # waits for the others, so not after a failure
    return answer


def _run(calls: list[tuple], seconds: float = 240) -> list[Any]:
    """Calls every function in a process; where one fails, the others are ended."""
    context = multiprocessing.get_context("forkserver")
    quick = jax.config.read("jax_disable_most_optimizations")
    running = {}
    results: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        for number, (function, arguments, options) in enumerate(calls):
            here, there = context.Pipe(duplex=False)
            options = {**options, "jax_disable_most_optimizations": quick}
            process = context.Process(target=_call, args=(there, function, arguments, options))
            process.start()
            there.close()
            running[here] = number, process
        waiting = set(running)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer within {seconds} s"
            for here in [one for one in waiting if one in ready]:
                number, process = running[here]
                try:
                    failure, results[number] = here.recv()
                except EOFError:
                    process.join()
                    failure = f"ended with exit code {process.exitcode}"
                assert not failure, f"process {number}: {failure}"
                waiting.discard(here)
        for _, process in running.values():
            process.join(max(1.0, deadline - time.monotonic()))
    finally:
        for here, (_, process) in running.items():
            process.kill()
            process.join()
            here.close()
    return [results[number] for number in range(len(calls))]


def _call(there, function, arguments, options: dict[str, Any]) -> None:
    try:
        warnings.simplefilter("error")
        jax.config.update("jax_platforms", "cpu")
        for name, value in options.items():
            jax.config.update(name, value)
        answer = None, function(*arguments)
    except BaseException:
        answer = traceback.format_exc(), None
    there.send(answer)
