"""Loading a data set by its name."""

import os
from collections.abc import Callable

from archscale_jax._errors import unknown
from experiments.lab.datasets import arrays, digits, fashion_mnist, tfds_source
from experiments.lab.datasets.dataset import Dataset, RawSplits, standardised_dataset

_DataDir = str | os.PathLike[str] | None


def _tfds(source: tfds_source.TfdsSource) -> tuple[int, Callable[[_DataDir], RawSplits]]:
    return source.num_classes, lambda data_dir: tfds_source.read_tfds(source, data_dir)


# Name -> number of classes, reader.
_SOURCES: dict[str, tuple[int, Callable[[_DataDir], RawSplits]]] = {
    "digits": (10, lambda data_dir: digits.read_digits()),
    "fashion_mnist": (fashion_mnist.NUM_CLASSES, fashion_mnist.read_fashion_mnist),
    "cifar10": _tfds(tfds_source.CIFAR10),
    "cifar100": _tfds(tfds_source.CIFAR100),
    "imagenet16_120": _tfds(tfds_source.IMAGENET16_120),
}

DATASET_NAMES = tuple(_SOURCES)


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is one of `DATASET_NAMES`, or names a .npz file."""
    if name not in _SOURCES and not arrays.is_file_name(name):
        message = unknown("data set", name, DATASET_NAMES)
        raise ValueError(f"{message}; a file of your own ends in {arrays.SUFFIX}")


def load(name: str, *, data_dir: _DataDir = None) -> Dataset:
    """Loads a data set onto the default device, standardised per channel by its training set.

    Nothing is downloaded. Accepted names, and where they are read from:

    * `digits`: 8x8x1, shipped with scikit-learn; one fifth is held out, always the same one.
    * `fashion_mnist`: 28x28x1, four IDX files (plain or `.gz`) in `data_dir`,
      `data_dir/fashion_mnist`, `/usr/share/datasets/fashion-mnist`, or `data/fashion_mnist` below
      the working directory, where `make data` puts them.
    * `cifar10`, `cifar100`: 32x32x3, prepared by TensorFlow Datasets in `data_dir` (its default
      folder where None).
    * `imagenet16_120`: 16x16x3, the first 120 classes of the prepared TFDS data set
      `imagenet_resized/16x16`; its validation split is the test set.
    * a path that ends in `.npz`: arrays of your own, `train_images`, `train_labels`, `test_images`
      and `test_labels`, see `from_arrays`; in `data_dir`, if that is given.

    Args:
      name: One of the names above (`DATASET_NAMES`), or a path.
      data_dir: Where to look for the files.

    Returns:
      The data set; see `Dataset` for the shapes.

    Raises:
      ValueError: If the name is unknown, or if a file does not hold what it should.
      FileNotFoundError: If the files are missing; the message says where they were looked for and
        how to get them.
    """
    check_name(name)
    if arrays.is_file_name(name):
        return arrays.read_arrays(name, data_dir)
    num_classes, read = _SOURCES[name]
    return standardised_dataset(name, num_classes, read(data_dir))
