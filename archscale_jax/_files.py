"""Files that are whole or not there."""

import pathlib
import secrets
from collections.abc import Callable


def write_atomically(path: str | pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then moves the file into place.

    The folder is made where it is missing. Where `write` fails, nothing is left behind; a process
    that is killed meanwhile leaves `.NAME-XXXXXXXX.tmp.SUFFIX`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
