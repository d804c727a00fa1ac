"""Data sets that TensorFlow Datasets has prepared on disk, read without TensorFlow.

Nothing is ever downloaded here. Preparing needs TensorFlow, once, anywhere; reading does not.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from archscale_jax._extras import needed_by
from experiments.lab.datasets.dataset import RawSplits, check_labels

# Records fetched per call; reading one at a time would pay array_record's overhead for each.
_RECORDS_PER_READ = 1024


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Where TFDS keeps a data set, and what must be found there.

    Attributes:
      builder: TFDS name, with its config where it has one.
      num_classes: Number of classes to deliver.
      image_shape: `(H, W, C)` of every image.
      test_split: TFDS split that serves as the test set.
      drop_other_classes: Whether examples with a label of `num_classes` or more are excluded; where
        False they are an error.
    """

    builder: str
    num_classes: int
    image_shape: tuple[int, int, int]
    test_split: str = "test"
    drop_other_classes: bool = False


CIFAR10 = TfdsSource("cifar10", 10, (32, 32, 3))
CIFAR100 = TfdsSource("cifar100", 100, (32, 32, 3))
# The first 120 classes of 16x16 ImageNet are what NAS-Bench-201 calls ImageNet16-120. ImageNet's
# own test labels are not public: its validation split is the test set.
IMAGENET16_120 = TfdsSource(
    "imagenet_resized/16x16", 120, (16, 16, 3), test_split="validation", drop_other_classes=True
)


def read_tfds(source: TfdsSource, data_dir: str | os.PathLike[str] | None) -> RawSplits:
    """Reads a prepared data set.

    Args:
      source: Which one.
      data_dir: The folder TFDS prepared it in, or None for TFDS's default.

    Returns:
      Images uint8 `[N, *source.image_shape]`, labels int64 `[N]`, in the order of the files.

    Raises:
      FileNotFoundError: If it has not been prepared; the message names the folders that were
        searched and says how to prepare it.
      ValueError: If it was prepared in a format that TensorFlow alone can read, if its files are
        damaged, or if they do not hold the images and labels that `source` declares.
    """
    with needed_by(f"the data set {source.builder}", "data"):
        # Lazy: slow to import, and most runs do without.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder
        from tensorflow_datasets.core.utils import file_utils

    directory = None if data_dir is None else os.path.expanduser(data_dir)
    try:
        builder = read_only_builder.builder_from_files(source.builder, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        searched = [str(folder) for folder in file_utils.list_data_dirs(directory)]
        raise FileNotFoundError(
            f"{source.builder}: no prepared data in {', '.join(searched)}; "
            + _how_to_prepare(source, searched[0])
        ) from error
    train = _read_split(builder, source, "train")
    return RawSplits(*train, *_read_split(builder, source, source.test_split))


def _how_to_prepare(source: TfdsSource, data_dir: str) -> str:
    return (
        "prepare it, wherever TensorFlow is installed (reading does not need it), with "
        f"`tfds build {source.builder} --file_format=array_record --data_dir={data_dir}`"
    )


def _read_split(builder: Any, source: TfdsSource, split: str) -> tuple[np.ndarray, np.ndarray]:
    where = f"{builder.data_dir} (split {split!r})"
    # The folder is root/name/version or root/name/config/version.
    root = pathlib.Path(builder.data_dir).parents[1 + source.builder.count("/")]
    if not {"image", "label"} <= set(builder.info.features):
        raise ValueError(
            f"{where}: found {sorted(builder.info.features)}, expected image and label"
        )
    if split not in builder.info.splits:
        raise ValueError(f"{where}: no such split, found {sorted(builder.info.splits)}")
    try:
        images, labels = _read_examples(builder, source, split)
    except NotImplementedError as error:
        raise ValueError(
            f"{where}: found files of format {builder.info.file_format.value}, expected "
            f"array_record; remove that folder, then " + _how_to_prepare(source, str(root))
        ) from error
    except RuntimeError as error:  # what array_record raises for missing and for damaged files
        raise ValueError(f"{where}: files cannot be read ({error})") from error
    if not labels:
        raise ValueError(f"{where}: no examples of the first {source.num_classes} classes")
    for index, image in enumerate(images):
        if image.shape != source.image_shape or image.dtype != np.uint8:
            raise ValueError(
                f"{where}: image {index} is {image.dtype} of shape {image.shape}, "
                f"expected uint8 of shape {source.image_shape}"
            )
    label_array = np.asarray(labels, np.int64)
    check_labels(label_array, source.num_classes, where)
    return np.stack(images), label_array


def _read_examples(
    builder: Any, source: TfdsSource, split: str
) -> tuple[list[np.ndarray], list[int]]:
    import tensorflow_datasets as tfds

    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    # Decoded by hand, after looking at the label: of ImageNet only one image in eight is kept.
    decode_image = builder.info.features["image"].decode_example_np
    images, labels = [], []
    for start in range(0, len(records), _RECORDS_PER_READ):
        indices = range(start, min(start + _RECORDS_PER_READ, len(records)))
        for record in records.__getitems__(list(indices)):
            if source.drop_other_classes and record["label"] >= source.num_classes:
                continue
            images.append(decode_image(record["image"]))
            labels.append(record["label"])
    return images, labels
