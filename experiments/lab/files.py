"""Files that are whole or not there: bounded reads, atomic writes, a journal that survives a cut.

What is read may have been damaged or may be another's: errors name the file, and no file is waited
for or read into memory without a bound.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from archscale_jax._files import write_atomically

MOST_BYTES = 2**30
"""What is read of a configuration or a journal; of data sets see `experiments.lab.datasets`."""
MOST_NESTED = 100
"""How deep lists and objects of JSON may lie in each other."""


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes text in UTF-8, whatever the locale, atomically; what UTF-8 lacks is escaped."""
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda target: target.write_bytes(content))


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> io.FileIO:
    """Opens a file by the flags of `os.open`, and waits for nobody, as a pipe would.

    Raises:
      OSError: it cannot be opened.
      ValueError: it is a folder, a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file; accepted are files on a disk")
    return io.FileIO(descriptor, "r+" if flags & os.O_RDWR else "r")


def read_bytes(path: str | pathlib.Path, most: int = MOST_BYTES) -> bytes:
    """Reads a regular file.

    Raises:
      OSError: it cannot be read.
      ValueError: see `open_regular`; or it holds more bytes than `most`.
    """
    with open_regular(path) as file:
        content = read_at_most(file.read, most)
    if len(content) > most:
        raise ValueError(f"{path} holds more than the {most} bytes that are accepted")
    return content


def read_at_most(read: Callable[[int], bytes | None], most: int) -> bytes:
    """Reads by a file's `read`, which may unpack meanwhile; one byte more where there are more."""
    parts, left = [], most + 1
    while left and (part := read(min(left, 2**24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds something else; the message names it.
    """
    return _parse(read_bytes(path), str(path))


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object, but {type(value).__name__}")
    level, depth = [value], 0
    while level := [
        item
        for one in level
        if isinstance(one, dict | list)
        for item in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError(f"{where} is nested more than {MOST_NESTED} deep")
    return value


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """`read_json` of a run's `config.json`; the error says what to do."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; remove it, if this command has the flags of its run, or choose another "
            "--workdir"
        ) from None


def check_fields(value: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where a field is missing, or not of its type, as `isinstance` takes it."""
    for name, kind in fields.items():
        if not isinstance(found := value.get(name, "nothing"), kind):
            raise ValueError(f"{where} has {found!r} as {name!r}, which must be of {kind}")


def different_settings(found: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Lists the settings that differ, `name=found (now value)`; empty where none does.

    NaN does not differ from NaN, also inside lists and dictionaries.
    """
    return ", ".join(
        f"{name}={found.get(name)!r} (now {now.get(name)!r})"
        for name in sorted({*found, *now})
        if not _same(found.get(name), now.get(name))
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other or (one != one and other != other)  # NaN is what differs from itself


def append_record(path: str | pathlib.Path, record: Mapping[str, Any]) -> None:
    """Appends one line to a JSON-lines journal and waits until it is on disk.

    A line that an earlier run left unfinished is cut off first. A number that is not finite is
    written as null, since JSON has none. Only the journal's end is read, so its length costs
    nothing.

    Raises:
      OSError: the line could not be written, as on a full disk; the lines before it are kept.
      ValueError: what is there is not a journal, and is left alone.
    """
    path = pathlib.Path(path)
    line = _line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as journal:
            end = _end_of_last_line(journal)
            journal.seek(end)
            if _last_record(read_at_most(journal.read, MOST_BYTES), path) is not None:
                line = b"\n" + line  # its newline alone is missing
            else:
                journal.truncate(end)
            while line:  # a disk that is nearly full takes a part
                line = line[journal.write(line) :]
            os.fsync(journal.fileno())
    except OSError as error:
        text = f"{error.strerror}; the records before are kept, mend it and start again"
        raise OSError(error.errno, text, str(path)) from error


def _end_of_last_line(journal: io.FileIO, block: int = 4096) -> int:
    """The position behind the last newline, sought from the end in blocks of bytes; 0 if none."""
    end = journal.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        journal.seek(start)
        newline = journal.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _last_record(tail: bytes, path: pathlib.Path) -> dict[str, Any] | None:
    """The record behind the last newline; None where a kill or a lost block has cut it.

    Raises:
      ValueError: it is neither, so the file is not a journal.
    """
    if not (cut := tail.strip(b"\0")):
        return None
    with contextlib.suppress(ValueError):
        return _parse(tail, str(path))
    if cut.startswith(b"{") and b"\r" not in cut:
        return None
    raise ValueError(
        f"{path} is not a journal of ours: it ends in {cut[:40]!r}; remove it, or choose another"
    )


def write_records(path: str | pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines journal atomically; one that holds just these lines is left alone.

    A number that is not finite is written as null.
    """
    path = pathlib.Path(path)
    content = b"".join(map(_line, records))
    if not path.exists() or read_bytes(path) != content:
        write_atomically(path, lambda target: target.write_bytes(content))


def strict_json(value: Any) -> Any:
    """Copies JSON values at any depth: a number that is not finite becomes None, a tuple a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: strict_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def _line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON."""
    return json.dumps(strict_json(record), allow_nan=False).encode() + b"\n"


def read_records(path: str | pathlib.Path, remedy: str = "remove the line") -> list[dict[str, Any]]:
    """Reads a JSON-lines journal; an unfinished last line is ignored.

    Args:
      path: the file.
      remedy: what the error of a damaged line tells to do.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not a regular file, or a line is not a JSON object, by number.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    *lines, tail = read_bytes(path).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(line, f"{path} line {number}"))
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from None
    last = _last_record(tail, path)
    return records if last is None else [*records, last]


@contextlib.contextmanager
def locked(journal: str | pathlib.Path) -> Iterator[None]:
    """Keeps other processes off a journal, whose folder is made.

    The lock ends with the process, however that ends. Its file stays: if it were removed, one
    process might lock the old file and another a new one.

    Raises:
      OSError: the folder cannot be made, or the lock not be written.
      ValueError: another process holds the lock, or its file is not a regular one.
    """
    journal = pathlib.Path(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(journal.with_name(journal.name + ".lock"), os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process writes to this journal, {journal}; wait for it or stop it, or "
                "choose another --workdir"
            ) from None
        yield


def claim_directory(
    directory: str | pathlib.Path, config: Mapping[str, Any], *, extensible: Sequence[str] = ()
) -> pathlib.Path:
    """Makes a run's folder with its `config.json`, or checks that it belongs to the same run.

    What killed writers of `write_atomically` left there is removed.

    Args:
      directory: the folder, to which no other process writes.
      config: JSON values that decide what the run computes.
      extensible: settings that may differ from those found, since they only say which trials are
        run; the new ones are written.

    Raises:
      OSError: the folder cannot be made or written.
      ValueError: the folder holds the results of a run with another config, whose settings that
        differ are named, or a config that cannot be read.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        found = read_config(path)
        fixed = ({k: v for k, v in one.items() if k not in extensible} for one in (found, config))
        if different := different_settings(*fixed):
            raise ValueError(
                f"{directory} holds a run with {different}; choose another --workdir or remove it"
            )
    for left in directory.glob(".*-????????.tmp*"):
        left.unlink()
    write_json(path, config)
    return directory
