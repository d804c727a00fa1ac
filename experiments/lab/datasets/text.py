"""Text as bytes: the sources of Python's standard library, or files of your own.

Files are split, not bytes: what is held out shares no file with what is trained on.
"""

import functools
import pathlib
import sysconfig
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

STANDARD_LIBRARY = "stdlib"
HELD_OUT = 20
"""One file in so many is held out."""


class Text(NamedTuple):
    """Bytes of the files for training and of those held out, each file ended by a zero byte.

    Attributes:
      name: what was asked for, with a checksum of all bytes, by which it can be asked for again.
      train: [n] bytes.
      validation: [m] bytes.
    """

    name: str
    train: UInt8[np.ndarray, " n"]
    validation: UInt8[np.ndarray, " m"]


@functools.lru_cache(maxsize=2)
def load_text(name: str) -> Text:
    """Reads a text.

    Args:
      name: `stdlib`, for the sources of Python's standard library of this interpreter, or the path
        of a folder, whose files are all read. `#` and a checksum may follow.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: bytes of another checksum, or too few files to hold one out.
    """
    path, _, checksum = name.partition("#")
    train, validation = (b"".join(one + b"\0" for one in part) for part in split(_files(path)))
    found = f"{zlib.crc32(validation, zlib.crc32(train)):08x}"
    if checksum and checksum != found:
        raise ValueError(
            f"the text {path} has the checksum {found} here, and {checksum} where this run began: "
            "take the same files, of the standard library the same version of Python"
        )
    if not (train and validation):
        raise ValueError(
            f"text {path}: one file in {HELD_OUT} is held out, and none was; give more files"
        )
    arrays = (np.frombuffer(one, np.uint8) for one in (train, validation))
    return Text(f"{path}#{found}", *arrays)


def split(files: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Returns the files to train on and those held out, by content: copies stay together."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for one in files:
        parts[zlib.crc32(one) % HELD_OUT == 0].append(one)
    return parts


def _files(path: str) -> list[bytes]:
    folder, pattern = pathlib.Path(path), "*"
    if path == STANDARD_LIBRARY:
        folder, pattern = pathlib.Path(sysconfig.get_paths()["stdlib"]), "*.py"
    if not folder.is_dir():
        raise FileNotFoundError(f"text {path}: no such folder; {STANDARD_LIBRARY} is always there")
    installed = {"site-packages", "dist-packages"}
    found = sorted(one for one in folder.rglob(pattern) if one.is_file())
    inside = (one for one in found if not installed & set(one.relative_to(folder).parts))
    return [one.read_bytes() for one in inside]


def random_windows(
    text: UInt8[Array, " n"], key: Array, batch_size: int, length: int
) -> Int[Array, "b t"]:
    """Returns windows of a text from random places, as integers."""
    starts = jax.random.randint(key, (batch_size,), 0, len(text) - length + 1)
    return _windows(text, starts, length)


def even_windows(text: UInt8[Array, " n"], number: int, length: int) -> Int[Array, "b t"]:
    """Returns windows that lie evenly over a text, always the same."""
    starts = np.linspace(0, len(text) - length, number).astype(np.int32)
    return _windows(text, jnp.asarray(starts), length)


def _windows(text: Array, starts: Array, length: int) -> Array:
    return text[starts[:, None] + jnp.arange(length)].astype(jnp.int32)
