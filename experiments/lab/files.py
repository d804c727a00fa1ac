"""Files that are whole or not there: atomic writes, and a journal that survives a cut."""

import contextlib
import fcntl
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from archscale_jax._files import write_atomically


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes text in UTF-8, whatever the locale, atomically."""
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_atomically(path, lambda target: target.write_text(json.dumps(value, indent=2) + "\n"))


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
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab+", buffering=0) as journal:
            journal.truncate(_end_of_last_line(journal))
            line = _line(record).encode()
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


def write_records(path: str | pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines journal atomically; one that holds just these lines is left alone.

    A number that is not finite is written as null.
    """
    path = pathlib.Path(path)
    text = "".join(map(_line, records))
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, lambda target: target.write_text(text))


def strict_json(value: Any) -> Any:
    """Copies JSON values at any depth: a number that is not finite becomes None, a tuple a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: strict_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def _line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(strict_json(record), allow_nan=False) + "\n"


def read_records(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines journal; an unfinished last line is left out.

    Raises:
      ValueError: a finished line that is no JSON object, by number.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path} line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is no JSON object, but {type(record).__name__}")
        records.append(record)
    return records


@contextlib.contextmanager
def locked(journal: str | pathlib.Path) -> Iterator[None]:
    """Keeps other processes off a journal, whose folder is made.

    The lock ends with the process, however that ends. Its file stays: if it were removed, one
    process might lock the old file and another a new one.

    Raises:
      ValueError: another process holds the lock.
    """
    journal = pathlib.Path(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.with_name(journal.name + ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to this journal, {journal}") from None
        yield


def claim_directory(
    directory: str | pathlib.Path, config: Mapping[str, Any], *, extensible: Sequence[str] = ()
) -> pathlib.Path:
    """Makes a run's folder with its `config.json`, or checks that it belongs to the same run.

    Args:
      directory: the folder.
      config: JSON values that decide what the run computes.
      extensible: settings that may differ from those found, since they only say which trials are
        run; the new ones are written.

    Raises:
      OSError: the folder cannot be made or written.
      ValueError: the folder holds the results of a run with another config; the message names the
        settings that differ.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds no JSON object, but {type(found).__name__}")
        fixed = ({k: v for k, v in one.items() if k not in extensible} for one in (found, config))
        if different := different_settings(*fixed):
            raise ValueError(
                f"{directory} holds a run with {different}; choose another --workdir or remove it"
            )
    try:
        write_json(path, config)
    except OSError as error:
        text = f"{error.strerror}; choose another --workdir"
        raise OSError(error.errno, text, error.filename) from error
    return directory
