"""The one data type of this package, and the standardisation every source goes through."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_CHUNK = 2**26
"""Bytes that are converted to float64 at a time: bounds the memory that standardising takes."""


class RawSplits(NamedTuple):
    """What a source reads: both splits on the host, as stored.

    Images are numbers `[N, H, W, C]`, labels integers `[N]`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A classification data set that lies on the device as a whole.

    It is a pytree (the arrays are its leaves, `name` and `num_classes` are static), so that it can
    be passed to a jitted function. Pass it, do not close over it: a captured array becomes a
    constant of the program and makes compiling slow.

    Images are standardised per channel with the mean and the standard deviation of the training
    set, taken over all its pixels; the test set is transformed with the training set's numbers. A
    channel that is constant over the training set is only centred.

    Attributes:
      name: The name it was loaded by.
      num_classes: Number of classes; labels lie in `[0, num_classes)`.
      train_images: float32 `[N, H, W, C]`.
      train_labels: int32 `[N]`.
      test_images: float32 `[M, H, W, C]`.
      test_labels: int32 `[M]`.
    """

    name: str = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})
    train_images: Float[Array, "train height width channels"]
    train_labels: Int[Array, " train"]
    test_images: Float[Array, "test height width channels"]
    test_labels: Int[Array, " test"]

    def __repr__(self) -> str:
        images = "×".join(map(str, self.train_images.shape[1:]))
        examples = f"{len(self.train_labels)} + {len(self.test_labels)} images of {images}"
        return f"Dataset({self.name!r}, {examples}, {self.num_classes} classes)"


def check_labels(labels: np.ndarray, num_classes: int, source: str) -> None:
    """Raises ValueError, naming `source`, unless every label lies in `[0, num_classes)`."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"{source}: label {labels[wrong[0]]} of example {wrong[0]} is out of range; "
            f"accepted are 0 to {num_classes - 1}"
        )


def standardised_dataset(name: str, num_classes: int, splits: RawSplits) -> Dataset:
    """Standardises both splits by the training set and puts them on the device.

    Args:
      name: Name of the data set.
      num_classes: Number of classes.
      splits: Non-empty splits whose labels have been checked.

    Returns:
      The data set; see `Dataset` for shapes and for what standardising means.

    Raises:
      ValueError: numbers too large or too small to be standardised, or test images on another scale
        than the training images.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean, std = channel_statistics(splits.train_images)
    _check_scale(name, splits, mean, std)
    return Dataset(
        name=name,
        num_classes=num_classes,
        train_images=jnp.asarray(_standardise(splits.train_images, mean, std)),
        train_labels=jnp.asarray(splits.train_labels, dtype=jnp.int32),
        test_images=jnp.asarray(_standardise(splits.test_images, mean, std)),
        test_labels=jnp.asarray(splits.test_labels, dtype=jnp.int32),
    )


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all pixels of all images.

    Args:
      images: `[N, H, W, C]`, not empty.

    Returns:
      Two float64 arrays `[C]`; the standard deviation of a constant channel is given as 1.
    """
    pixels = images.size // images.shape[-1]
    mean = sum(chunk.sum(axis=(0, 1, 2)) for chunk in _float64_chunks(images)) / pixels
    # A second pass over the centred values: sums of squares would cancel where the mean is large.
    squares = sum(((chunk - mean) ** 2).sum(axis=(0, 1, 2)) for chunk in _float64_chunks(images))
    low, high = (images.min((0, 1, 2)).astype(float), images.max((0, 1, 2)).astype(float))
    constant = low == high  # not std == 0, which rounding of the mean hides in fractions
    return np.where(constant, low, mean), np.where(constant, 1.0, np.sqrt(squares / pixels))


def _check_scale(name: str, splits: RawSplits, mean: np.ndarray, std: np.ndarray) -> None:
    train, test = ((one.min((0, 1, 2)).astype(float), one.max((0, 1, 2)).astype(float))
                   for one in (splits.train_images, splits.test_images))  # fmt: skip
    varies = train[0] < train[1]
    low, high = 1e-150, 1e150  # what can be squared
    if splits.train_images.dtype.kind == "f":
        low = max(low, float(np.finfo(splits.train_images.dtype).smallest_normal))
    if wrong := np.flatnonzero(varies & ~((low < std) & (std < high))).tolist():
        raise ValueError(
            f"{name}: channel {wrong[0]} of train_images deviates by {std[wrong[0]]:.3g}; accepted "
            f"are {low:.3g} to {high:.3g}: scale the images"
        )
    spread = (test[1] - test[0]) / std
    far = np.maximum(np.abs(test[0] - mean), np.abs(test[1] - mean)) / std
    if wrong := np.flatnonzero((far > 1e6) | (varies & (spread > 0) & (spread < 1e-6))).tolist():
        raise ValueError(
            f"{name}: channel {wrong[0]} of test_images holds {test[0][wrong[0]]:.3g} to "
            f"{test[1][wrong[0]]:.3g}, that of train_images {train[0][wrong[0]]:.3g} to "
            f"{train[1][wrong[0]]:.3g}; both must be on one scale, that of the training set"
        )


def _standardise(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    result = np.empty(images.shape, np.float32)
    start = 0
    for chunk in _float64_chunks(images):
        result[start : start + len(chunk)] = (chunk - mean) / std
        start += len(chunk)
    return result


def _float64_chunks(images: np.ndarray):
    size = max(1, _CHUNK // (8 * math.prod(images.shape[1:])))
    for start in range(0, len(images), size):
        yield images[start : start + size].astype(np.float64)


def downscale(dataset: Dataset, factor: int) -> Dataset:
    """Returns smaller images: means of `factor` x `factor` pixels, standardised again.

    Raises:
      ValueError: a factor below 1 or one that does not divide height and width.
    """
    _, height, width, _ = dataset.train_images.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor {factor} does not divide images of {height} x {width} pixels")
    if factor == 1:
        return dataset
    small = [
        images.reshape(len(images), height // factor, factor, width // factor, factor, -1).mean(
            axis=(2, 4)
        )
        for images in (dataset.train_images, dataset.test_images)
    ]
    mean, deviation = (f(small[0], axis=(0, 1, 2)) for f in (jnp.mean, jnp.std))
    scale = jnp.where(deviation > 0, deviation, 1.0)
    train, test = ((images - mean) / scale for images in small)
    return dataclasses.replace(dataset, train_images=train, test_images=test)
