"""Files that are whole or not there."""

import os
import pathlib
import tempfile
from collections.abc import Callable


def write_atomically(path: str | pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then moves the file into place.

    The folder is made where it is missing. Where `write` fails, nothing is left behind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
