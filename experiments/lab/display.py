"""What binaries show while they run: progress and notes on standard error, unless --quiet is given.

Standard output is for results: tables, and the names of files.
"""

import contextlib
import sys

from absl import flags

from experiments.lab.progress import Advance, progress_of

FLAGS = flags.FLAGS

flags.DEFINE_bool(
    "quiet",
    False,
    "Show neither progress nor notes, which go to standard error; results are still printed.",
)


def shown() -> bool:
    """Whether progress and notes are shown."""
    return not FLAGS.quiet


def progress(
    description: str, total: int | None, *, done: int = 0
) -> contextlib.AbstractContextManager[Advance]:
    """`experiments.lab.progress.progress_of`, unless --quiet was given."""
    return progress_of(description, total, done=done, visible=shown())


def note(text: str) -> None:
    """Prints a line that is not a result, unless --quiet was given."""
    if shown():
        print(text, file=sys.stderr, flush=True)
