"""Fashion-MNIST from the four IDX files it is distributed as."""

import os
import pathlib

import numpy as np

from experiments.lab.datasets.dataset import RawSplits, check_labels
from experiments.lab.datasets.idx import read_idx

NUM_CLASSES = 10
_SIDE = 28
_FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Where Debian's package dataset-fashion-mnist installs the files.
_SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"
# Where `make data` puts them, relative to the working directory.
_LOCAL_FOLDER = os.path.join("data", "fashion_mnist")


def read_fashion_mnist(data_dir: str | os.PathLike[str] | None) -> RawSplits:
    """Reads Fashion-MNIST from the first folder that holds any of its files.

    Folders are `data_dir` and `data_dir/fashion_mnist` where one is given, and no other; else
    `/usr/share/datasets/fashion-mnist`, then `data/fashion_mnist` below the working directory. A
    file may be plain or end in `.gz`; the plain one wins where both are there.

    Args:
      data_dir: The folder to read, or None for the usual places.

    Returns:
      Images uint8 `[N, 28, 28, 1]`, labels uint8 `[N]`.

    Raises:
      FileNotFoundError: If files are missing; a folder that holds only some of the four is an
        error too, never passed over. The message names the missing files and the folders.
      ValueError: If a file is damaged or does not hold what its name says; it is named.
    """
    paths = _find_files(_folders(data_dir))
    return RawSplits(*_read_split(*paths[:2]), *_read_split(*paths[2:]))


def _folders(data_dir: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    if data_dir is None:
        return [pathlib.Path(_SYSTEM_FOLDER), pathlib.Path(_LOCAL_FOLDER)]
    given = pathlib.Path(data_dir).expanduser()
    return [given, given / "fashion_mnist"]


def _find_files(folders: list[pathlib.Path]) -> list[pathlib.Path]:
    for folder in folders:
        found = [_plain_or_compressed(folder / name) for name in _FILE_NAMES]
        missing = [name for name, path in zip(_FILE_NAMES, found, strict=True) if path is None]
        if not missing:
            return [path for path in found if path is not None]
        if len(missing) < len(_FILE_NAMES):
            raise _missing_error(missing, [folder])
    raise _missing_error(list(_FILE_NAMES), folders)


def _plain_or_compressed(path: pathlib.Path) -> pathlib.Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _missing_error(missing: list[str], folders: list[pathlib.Path]) -> FileNotFoundError:
    return FileNotFoundError(
        f"fashion_mnist: no {', '.join(missing)} (plain or .gz) in "
        f"{', '.join(str(folder) for folder in folders)}; run `make data`, "
        f"or put the four IDX files into {_LOCAL_FOLDER}"
    )


def _read_split(
    images_path: pathlib.Path, labels_path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != (_SIDE, _SIDE) or not len(images):
        raise ValueError(
            f"{images_path}: found {images.dtype} of shape {images.shape}, "
            f"expected uint8 of shape (N, {_SIDE}, {_SIDE}) with N > 0"
        )
    if labels.dtype != np.uint8 or labels.shape != (len(images),):
        raise ValueError(
            f"{labels_path}: found {labels.dtype} of shape {labels.shape}, "
            f"expected uint8 of shape ({len(images)},) for the images in {images_path}"
        )
    check_labels(labels, NUM_CLASSES, str(labels_path))
    return images[..., np.newaxis], labels
