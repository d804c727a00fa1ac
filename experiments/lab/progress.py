"""Progress of what takes long, on standard error: a bar on a terminal, elsewhere a line at times.

Standard output is left to results. Lines hold no control characters, so that a log can be read.
"""

import contextlib
import datetime
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

FIRST_SECONDS = 2.0
"""What is over before is not told of."""

LINE_SECONDS = 30.0
"""A log gets a line after so long, or, not before `FIRST_SECONDS`, after a tenth of the work."""


class Advance(Protocol):
    """What counts work as done; any thread may call it."""

    def __call__(self, amount: int = 1, *, note: str | None = None) -> None:
        """Counts so much more, and replaces the note beside the count."""


@contextlib.contextmanager
def progress_of(
    description: str, total: int | None, *, done: int = 0, note: str = "", visible: bool = True
) -> Iterator[Advance]:
    """Shows progress inside a `with`, and gives what advances it.

        with progress_of("epochs", 10) as advance:
            for epoch in range(10):
                advance(note=f"loss {train(epoch):.4f}")

    Args:
      description: what is counted, as a plural.
      total: how many there are; None where it is not known.
      done: how many are done already.
      note: what is said beside the count at first.
      visible: False shows nothing.
    """
    if not visible:
        yield lambda amount=1, *, note=None: None
        return
    from rich.console import Console  # slow to import

    console = Console(stderr=True)
    live = console.is_interactive and not console.is_jupyter
    with (
        _bar(console, description, total, done, note)
        if live
        else _lines(description, total, done, note)
    ) as advance:
        yield advance


@contextlib.contextmanager
def _bar(console, description: str, total: int | None, done: int, note: str) -> Iterator[Advance]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # The estimate of the time left looks back without a limit, as a trial may take hours.
    with progress.Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        speed_estimate_period=math.inf,
    ) as shown:
        task = shown.add_task(description, total=total, completed=done, note=note)

        def advance(amount: int = 1, *, note: str | None = None) -> None:
            if note is not None:
                shown.update(task, note=note)
            shown.advance(task, amount)

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: int | None, done: int, note: str) -> Iterator[Advance]:
    start = time.monotonic()
    first, told, told_at = done, -1, start
    lock = threading.Lock()

    def tell() -> None:
        nonlocal told, told_at
        elapsed = time.monotonic() - start
        parts = [f"{description}: {done}" + (f" of {total}" if total is not None else "")]
        parts += [note] if note else []
        parts.append(f"{_clock(elapsed)} elapsed")
        if total is not None and first < done < total:
            parts.append(f"about {_clock(elapsed / (done - first) * (total - done))} left")
        print(", ".join(parts), file=sys.stderr, flush=True)
        told, told_at = done, time.monotonic()

    def tell_late() -> None:  # a first trial may take hours
        with lock:
            if told < 0:
                tell()

    def advance(amount: int = 1, *, note: str | None = None) -> None:
        with lock:
            renew(amount, note)
            since = time.monotonic() - told_at
            tenth = total is not None and 10 * (done - max(told, first)) >= total
            if since >= (FIRST_SECONDS if tenth else LINE_SECONDS):
                tell()

    def renew(amount: int, text: str | None) -> None:
        nonlocal done, note
        done += amount
        note = note if text is None else text

    timer = threading.Timer(FIRST_SECONDS, tell_late)
    timer.daemon = True
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        with lock:
            if 0 <= told < done:
                tell()


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
