"""Ctrl-C: one sentence and the status 130, whenever it comes and however often.

The first raises KeyboardInterrupt, so that what runs can keep what is finished. Those within the
next second belong to it. A later one ends the process at once: journals and checkpoints survive
that at any moment.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STATUS = 130
BURST_SECONDS = 1.0
"""Interrupts so close to the first are one: a key held down, or a shell that passes its own on."""

_first: float | None = None
"""When the interrupt came that is being answered."""
_announcement = ""
"""What is said at once when it comes."""


def end(sentence: str) -> NoReturn:
    """Ends this process, and the worker processes that it has started, with a sentence.

    Python is not torn down. XLA compiles in a thread of its own, which an interrupt of the thread
    that waits for it leaves running; it crashes once Python has freed JAX's devices.
    """
    for process in multiprocessing.active_children():
        process.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # gone, or being written to
            stream.flush()
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # shown again: a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}{sentence}\n".encode())
    os._exit(STATUS)


def came() -> bool:
    """Whether an interrupt is being answered."""
    return _first is not None


def answer_while_importing() -> None:
    """Answers Ctrl-C before there is anything to keep: imports take seconds."""
    if _is_heard():
        signal.signal(signal.SIGINT, lambda *_: end("interrupted; nothing was written"))


@contextlib.contextmanager
def answered(kept: Callable[[], str]) -> Iterator[None]:
    """Answers Ctrl-C in the block as this module says, and afterwards not at all.

    Args:
      kept: tells what is kept, for the sentence.
    """

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        global _first
        if _first is None:
            _first = time.monotonic()
            if _announcement:
                os.write(2, f"\n{_announcement}\n".encode())  # prints may be cut
            raise KeyboardInterrupt
        if time.monotonic() > _first + BURST_SECONDS:
            end(f"interrupted; {kept()}")

    heard = _is_heard()
    if heard:
        sys.unraisablehook = _interrupt_again
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:  # an interrupt may surface as an error of what it cut
        if isinstance(error, KeyboardInterrupt) or came():
            end(f"interrupted; {kept()}")
        raise
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written


@contextlib.contextmanager
def announced(sentence: str) -> Iterator[None]:
    """Says a sentence as soon as Ctrl-C comes in the block, where its answer takes longer."""
    global _announcement
    _announcement = sentence
    try:
        yield
    finally:
        _announcement = ""


@contextlib.contextmanager
def later() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done; other threads than the first never hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, types.FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])


def _is_heard() -> bool:
    """Whether Ctrl-C is for this process; shells make what they run in the background ignore it."""
    return signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)


def _interrupt_again(unraisable: Any, before: Callable = sys.unraisablehook) -> None:
    """Raises Ctrl-C anew where Python drops it: in garbage collection, where JAX has a callback."""
    global _first
    if unraisable.exc_type is not KeyboardInterrupt:
        before(unraisable)
        return
    _first = None
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
