"""Data sets of one's own: from arrays, and from a .npz file that holds them."""

import hashlib
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from experiments.lab.datasets.dataset import (
    Dataset,
    RawSplits,
    check_labels,
    standardised_dataset,
)

SUFFIX = ".npz"
MOST_BYTES = 2**32
"""What the arrays of a file may take; what they become lies on the device."""
MOST_CLASSES = 2**16
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError),
    RuntimeError,  # encrypted, or compressed in a way that Python does not know
    MemoryError,  # a header that claims what the file does not hold
)
_MARK = "#sha256="
_DIGITS = 16  # hexadecimal, of the digest


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """Returns a data set of one's own arrays, standardised per channel by its training set.

    Args:
      train_images: numbers `[N, H, W, C]`, or `[N, H, W]` of one channel; any range.
      train_labels: integers `[N]` in `[0, num_classes)`.
      test_images: `[M, H, W, C]`, or `[M, H, W]`.
      test_labels: integers `[M]`.
      num_classes: the number of classes; where None the largest label plus one, and every class
        must have an example.
      name: what figures and errors call it.

    Raises:
      ValueError: arrays of another shape or kind, a split without examples, numbers that are not
        finite, or a label out of range; each by its name.
    """
    splits = RawSplits(
        _images(train_images, f"{name}: train_images"),
        _labels(train_labels, f"{name}: train_labels"),
        _images(test_images, f"{name}: test_images"),
        _labels(test_labels, f"{name}: test_labels"),
    )
    pairs = (("train", splits[0], splits[1]), ("test", splits[2], splits[3]))
    for split, images, labels in pairs:
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: {split}_images holds {len(images)} examples and {split}_labels "
                f"{len(labels)}; there must be one label an image"
            )
    if splits.train_images.shape[1:] != splits.test_images.shape[1:]:
        raise ValueError(
            f"{name}: an image of train_images has the shape {splits.train_images.shape[1:]}, one "
            f"of test_images {splits.test_images.shape[1:]}; they must be the same"
        )
    kinds = ["float" if one.dtype.kind == "f" else "integer" for one in splits[::2]]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{name}: train_images are of dtype {splits.train_images.dtype}, test_images of "
            f"{splits.test_images.dtype}; both must be on one scale, that of the training set"
        )
    if num_classes is None:
        num_classes = _count_classes(splits, name)
    if not 2 <= num_classes <= MOST_CLASSES:
        raise ValueError(
            f"{name}: num_classes must be from 2 to {MOST_CLASSES}, found {num_classes}"
        )
    for split, _, labels in pairs:
        check_labels(labels, num_classes, f"{name}: {split}_labels")
    return standardised_dataset(name, num_classes, splits)


def _count_classes(splits: RawSplits, name: str) -> int:
    """The largest label plus one; every class below must have an example in either split."""
    found = np.union1d(splits.train_labels, splits.test_labels)
    missing = np.setdiff1d(np.arange(len(found) + 1), found)
    if missing[0] < len(found):
        raise ValueError(
            f"{name}: labels reach from {found[0]} to {found[-1]}, and class {missing[0]} has no "
            "example; accepted are labels from 0 without gaps. Where a class is meant to be "
            "missing, pass num_classes"
        )
    return len(found)


def _images(images: np.ndarray, where: str) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype.kind not in "buif" or 0 in images.shape:
        raise ValueError(
            f"{where} has the shape {images.shape} and dtype {images.dtype}; accepted are numbers "
            "[examples, height, width, channels] or [examples, height, width], one example at least"
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        example = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0]
        raise ValueError(f"{where}: example {example} holds numbers that are not finite")
    return images


def _labels(labels: np.ndarray, where: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{where} has the shape {labels.shape} and dtype {labels.dtype}; accepted are integers "
            "[examples], one class each (of one-hot rows, argmax(axis=1))"
        )
    return labels


def with_digest(path: str | os.PathLike[str]) -> str:
    """Returns the name of a .npz file, without its folder, and the digest of what it holds.

        with_digest("data/mine.npz")  # mine.npz#sha256=9f86d081884c7d65

    What goes by this name, a study's trials, is never of a file that changed, wherever it lies.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a digest is given already, and the file's is another; or the name has characters
        that figures and terminals take for something else.
    """
    plain, mark, expected = os.path.expanduser(path).partition(_MARK)
    if strange := re.sub(r"[\w.+@() -]", "", os.path.basename(plain)):
        raise ValueError(
            f"the name of the data set {plain!r} has {strange[0]!r}; accepted are letters, digits, "
            "spaces and _.+@()-: rename the file"
        )
    if not pathlib.Path(plain).is_file():
        raise FileNotFoundError(
            f"the data set {plain!r} is not a file; make it by numpy.savez({plain!r}, "
            "train_images=…, train_labels=…, test_images=…, test_labels=…)"
        )
    with open(plain, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
    if mark and found != expected:
        raise ValueError(
            f"{plain} holds other arrays (sha256 {found}…) than those that were named "
            f"({expected}…); bring back the file, or name it anew"
        )
    return f"{pathlib.Path(plain).name}{_MARK}{found}"


def is_file_name(name: str) -> bool:
    """Whether a data set's name is that of a .npz file, with or without its digest."""
    return name.partition(_MARK)[0].lower().endswith(SUFFIX)


def read_arrays(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Reads a .npz file with the arrays of `from_arrays`, `num_classes` if it is there.

    Args:
      name: its path, in `data_dir` if that is given; with or without the digest of `with_digest`.
      data_dir: its folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: see `with_digest` and `from_arrays`; it is not an .npz file, or lacks an array.
    """
    path = os.path.join(data_dir or "", os.path.expanduser(name))
    name = with_digest(path).partition(_MARK)[0]
    path = path.partition(_MARK)[0]
    if not zipfile.is_zipfile(path):
        raise ValueError(f"the data set {path!r} is not an .npz file, as numpy.savez writes them")
    try:
        with zipfile.ZipFile(path) as archive:  # what arrays take is told before any is read
            total = sum(archive.getinfo(name).file_size for name in archive.namelist())
        if total > MOST_BYTES:
            raise ValueError(f"its arrays take {total} bytes; accepted are {MOST_BYTES}")
        with np.load(path, allow_pickle=False) as file:
            missing = [field for field in RawSplits._fields if field not in file]
            if missing:
                raise ValueError(
                    f"it holds {', '.join(file) or 'no array'}, not {', '.join(missing)}; "
                    f"accepted are {', '.join(RawSplits._fields)}"
                )
            arrays = [_read(file, field) for field in RawSplits._fields]
            num_classes = _number(file["num_classes"]) if "num_classes" in file else None
    except _UNREADABLE as error:
        raise ValueError(f"the data set {path!r} cannot be read: {error}") from None
    return from_arrays(*arrays, num_classes=num_classes, name=name)


def _number(value: np.ndarray) -> int:
    if value.ndim or value.dtype.kind not in "iu":
        raise ValueError(f"num_classes is {value!r}; accepted is one integer")
    return int(value)


def _read(file: Mapping[str, np.ndarray], field: str) -> np.ndarray:
    try:
        return file[field]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            f"{field} holds Python objects (images of several sizes?); stack them into one array"
        ) from None
