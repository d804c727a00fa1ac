"""A strict reader of IDX files, the format of MNIST and its relatives.

An IDX file is two zero bytes, one byte for the element type, one for the number of dimensions, one
big-endian uint32 per dimension, and then the elements, big-endian, last dimension fastest.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable

import numpy as np

from experiments.lab import files

_ELEMENT_TYPES = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
# What every NumPy can hold; the format itself would allow 255.
_MAX_DIMENSIONS = 32
_GZIP_MAGIC = b"\x1f\x8b"
MOST_BYTES = 2**32
"""What an array may take."""


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an IDX file, plain or compressed with gzip.

    Compression is recognised by content, not by the name: IDX starts with a zero byte, gzip never.

    Args:
      path: The file.

    Returns:
      A writable array of the shape and the element type that the header declares, in the machine's
      byte order.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is not exactly one IDX array: a wrong magic number, an unknown element
        type, no dimension or more than 32, fewer or more bytes than the header declares, a damaged
        or truncated gzip stream. The message names the file, what was found, what is expected.
    """
    with files.open_regular(path) as raw:
        is_compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        try:
            file = gzip.GzipFile(fileobj=raw) if is_compressed else raw
            return _read(file.read, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: found a damaged gzip stream ({error}), expected a complete one"
            ) from error


def _read(read: Callable[[int], bytes | None], path: str | os.PathLike[str]) -> np.ndarray:
    """Reads no more than the header claims, whatever a file would unpack to."""
    content = read(4 + 4 * _MAX_DIMENSIONS) or b""
    if len(content) < 4:
        raise ValueError(
            f"{path}: found {len(content)} bytes, expected an IDX header of at least 4"
        )
    if content[:2] != b"\x00\x00":
        raise ValueError(f"{path}: found first bytes {content[:2].hex(' ')}, expected 00 00 of IDX")
    element_type = _ELEMENT_TYPES.get(content[2])
    if element_type is None:
        accepted = ", ".join(f"0x{code:02x}" for code in _ELEMENT_TYPES)
        raise ValueError(
            f"{path}: found element type 0x{content[2]:02x}, expected one of {accepted}"
        )
    dimensions = content[3]
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(
            f"{path}: found {dimensions} dimensions, expected between 1 and {_MAX_DIMENSIONS}"
        )
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(
            f"{path}: found {len(content)} bytes, expected a header of {header_size} "
            f"for {dimensions} dimensions"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    expected_size = header_size + math.prod(shape) * element_type.itemsize
    where = f"{expected_size} for shape {shape} of {element_type.itemsize}-byte elements"
    if expected_size > MOST_BYTES:
        raise ValueError(f"{path}: expected {where}, accepted are {MOST_BYTES} bytes")
    content += files.read_at_most(read, max(expected_size - len(content), -1))
    if len(content) != expected_size:
        found = len(content) if len(content) < expected_size else f"more than {expected_size}"
        raise ValueError(f"{path}: found {found} bytes, expected {where}")
    elements = np.ndarray(shape, element_type, buffer=content, offset=header_size)
    return elements.astype(element_type.newbyteorder("="))
