"""Data sets: what is loaded is what the files hold, and damage is reported, never read."""

import dataclasses
import functools
import gzip
import io
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import jax
import numpy as np
import pytest
from hypothesis import strategies

from experiments.lab import datasets
from experiments.lab.data_flags import DatasetParser
from experiments.lab.datasets import arrays, fashion_mnist
from experiments.lab.datasets.dataset import channel_statistics

FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    """An independent writer of the format."""
    code = IDX_CODES[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def recovered_pixels(images, train_pixels):
    """Undoes the standardisation with numbers that numpy takes from the expected training set."""
    mean = train_pixels.mean(axis=(0, 1, 2), dtype=np.float64)
    std = train_pixels.std(axis=(0, 1, 2), dtype=np.float64)
    pixels = np.asarray(images, np.float64) * np.where(std > 0, std, 1) + mean
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)
    return np.rint(pixels).astype(np.uint8)


def as_multiset(images, labels):
    """Examples in an order that does not depend on the order they are stored in."""
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def assert_well_formed(dataset, name, num_classes, image_shape):
    assert (dataset.name, dataset.num_classes) == (name, num_classes)
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        assert isinstance(images, jax.Array)
        assert isinstance(labels, jax.Array)
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)
        assert images.shape == (len(labels), *image_shape)
        assert 0 <= labels.min() <= labels.max() < num_classes


# ---------------------------------------------------------------------------------------- IDX files


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    array=strategies.sampled_from(sorted(IDX_CODES)).flatmap(
        lambda dtype: hypothesis.extra.numpy.arrays(
            dtype, hypothesis.extra.numpy.array_shapes(min_dims=1, max_dims=4, min_side=0)
        )
    ),
    compressed=strategies.booleans(),
)
def test_idx_round_trip(tmp_path_factory, array, compressed):
    path = tmp_path_factory.mktemp("idx") / "array"
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if compressed else content)
    result = datasets.read_idx(path)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    assert result.flags.writeable


WELL_FORMED = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes"),
        (WELL_FORMED[:3], "found 3 bytes"),
        (b"\x01" + WELL_FORMED[1:], "found first bytes 01 00"),
        (b"\x00\x00\x0a" + WELL_FORMED[3:], "found element type 0x0a, expected one of 0x08"),
        (b"\x00\x00\x08\x00", "found 0 dimensions"),
        (b"\x00\x00\x08\xff" + bytes(4 * 255), "found 255 dimensions"),
        (WELL_FORMED[:12], "found 12 bytes, expected a header of 16"),
        (WELL_FORMED[:-1], "found 39 bytes, expected 40"),
        (WELL_FORMED + b"\x00", "found more than 40 bytes, expected 40"),
        (b"\x00\x00\x0e\x20" + b"\xff" * 128, "expected .* accepted are 4294967296 bytes"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_damage_is_reported(tmp_path, content, message, compressed):
    path = tmp_path / "damaged"
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.read_idx(path)
    assert str(path) in str(caught.value)


def test_idx_truncated_gzip_is_reported_wherever_it_ends(tmp_path):
    path = tmp_path / "truncated.gz"
    content = gzip.compress(WELL_FORMED)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"truncated\.gz: found"):
            datasets.read_idx(path)


@pytest.mark.parametrize("position", [10, -1, -6])
def test_idx_damaged_gzip_is_reported(tmp_path, position):
    content = bytearray(gzip.compress(WELL_FORMED))
    content[position] ^= 0xFF
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged gzip stream"):
        datasets.read_idx(path)
    path.write_bytes(gzip.compress(WELL_FORMED) + b"more")
    with pytest.raises(ValueError, match="damaged gzip stream"):
        datasets.read_idx(path)


def test_idx_bomb_is_unpacked_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(WELL_FORMED + bytes(2**27), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="found more than 40 bytes, expected 40"):
        datasets.read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_idx_of_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        datasets.read_idx(tmp_path / "pipe")


def test_idx_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        datasets.read_idx(tmp_path / "nothing")


# ------------------------------------------------------------------------------------ Fashion-MNIST


@pytest.fixture
def only_here(tmp_path, monkeypatch):
    """Hides data that this machine may have; the working directory is empty."""
    monkeypatch.setattr(fashion_mnist, "_SYSTEM_FOLDER", str(tmp_path / "system"))
    working_directory = tmp_path / "work"
    working_directory.mkdir()
    monkeypatch.chdir(working_directory)
    return tmp_path


@functools.cache
def fashion_arrays():
    generator = np.random.RandomState(0)
    return tuple(
        array
        for number in (30, 12)
        for array in (
            generator.randint(0, 256, (number, 28, 28)).astype(np.uint8),
            generator.randint(0, 10, number).astype(np.uint8),
        )
    )


def write_fashion(folder, compressed=False, **replaced):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILE_NAMES, fashion_arrays(), strict=True):
        content = idx_bytes(replaced.get(name.split("-idx")[0].replace("-", "_"), array))
        path = folder / (name + ".gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "place", ["given", "given/fashion_mnist", "system", "work/data/fashion_mnist"]
)
def test_fashion_mnist_is_found_in_every_documented_folder(only_here, place, compressed):
    write_fashion(only_here / place, compressed)
    data_dir = only_here / "given" if place.startswith("given") else None
    dataset = datasets.load("fashion_mnist", data_dir=data_dir)
    assert_well_formed(dataset, "fashion_mnist", 10, (28, 28, 1))
    train_images, train_labels, test_images, test_labels = fashion_arrays()
    train_images = train_images[..., np.newaxis]
    np.testing.assert_array_equal(
        recovered_pixels(dataset.train_images, train_images), train_images
    )
    np.testing.assert_array_equal(
        recovered_pixels(dataset.test_images, train_images), test_images[..., np.newaxis]
    )
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


def test_fashion_mnist_missing_everywhere(only_here):
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("fashion_mnist")
    message = str(caught.value)
    for part in (*FILE_NAMES, str(only_here / "system"), "data/fashion_mnist", "make data"):
        assert part in message


def test_fashion_mnist_is_read_from_the_given_folder_or_not_at_all(only_here):
    write_fashion(only_here / "system")
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("fashion_mnist", data_dir=only_here / "given")
    message = str(caught.value)
    for part in (*FILE_NAMES, only_here / "given", only_here / "given" / "fashion_mnist"):
        assert str(part) in message


def test_fashion_mnist_incomplete_folder_is_not_passed_over(only_here):
    write_fashion(only_here / "system")
    write_fashion(only_here / "given")
    for name in FILE_NAMES[1:3]:
        (only_here / "given" / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("fashion_mnist", data_dir=only_here / "given")
    message = str(caught.value)
    assert [name in message for name in FILE_NAMES] == [False, True, True, False]
    assert str(only_here / "given") in message
    assert "make data" in message


@pytest.mark.parametrize(
    ("replaced", "file_name", "message"),
    [
        ({"train_labels": np.zeros(29, np.uint8)}, FILE_NAMES[1], r"\(29,\).*expected.*\(30,\)"),
        ({"t10k_labels": np.full(12, 10, np.uint8)}, FILE_NAMES[3], "label 10 .*0 to 9"),
        ({"train_labels": np.zeros((30, 1), np.uint8)}, FILE_NAMES[1], r"\(30, 1\)"),
        ({"train_labels": np.zeros(30, np.int32)}, FILE_NAMES[1], "int32"),
        ({"train_images": np.zeros((30, 27, 28), np.uint8)}, FILE_NAMES[0], "27"),
        ({"t10k_images": np.zeros((12, 784), np.uint8)}, FILE_NAMES[2], "784"),
        ({"t10k_images": np.zeros((12, 28, 28), np.float32)}, FILE_NAMES[2], "float32"),
        ({"t10k_images": np.zeros((0, 28, 28), np.uint8)}, FILE_NAMES[2], "N > 0"),
    ],
)
def test_fashion_mnist_wrong_content_names_the_file(only_here, replaced, file_name, message):
    write_fashion(only_here / "given", **replaced)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load("fashion_mnist", data_dir=only_here / "given")
    assert str(caught.value).startswith(str(only_here / "given" / file_name))


# ------------------------------------------------------------------ digits, and what all have alike


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def test_digits_are_those_of_scikit_learn(digits):
    import sklearn.datasets

    true_pixels, true_labels = sklearn.datasets.load_digits(return_X_y=True)
    assert_well_formed(digits, "digits", 10, (8, 8, 1))
    images = np.concatenate([digits.train_images, digits.test_images]).astype(np.float64)
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    # The pixels of all digits range from 0 to 16: that alone undoes any standardisation.
    pixels = 16 * (images - images.min()) / (images.max() - images.min())
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    assert as_multiset(np.rint(pixels).astype(np.uint8), labels) == as_multiset(
        np.asarray(true_pixels).astype(np.uint8), true_labels
    )


def test_digits_split_is_stratified_mixed_and_always_the_same(digits):
    train_counts, test_counts = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    np.testing.assert_allclose(test_counts, 0.2 * (train_counts + test_counts), atol=0.5)
    assert len(set(np.asarray(digits.train_labels[:50]).tolist())) == 10
    again = datasets.load("digits")
    np.testing.assert_array_equal(digits.train_images, again.train_images)
    # Written down once: a change of library versions must not move examples between the splits.
    first_test_labels = "".join(map(str, digits.test_labels[:30]))
    assert first_test_labels == "063818415897526942019140457621"


def test_training_images_are_standardised(digits):
    train_images = np.asarray(digits.train_images, np.float64)
    assert abs(train_images.mean()) < 1e-6
    assert abs(train_images.std() - 1) < 1e-6


def test_channel_statistics_of_many_images_agree_with_numpy():
    # More images than are converted at a time, and one channel that is constant.
    images = np.random.RandomState(1).randint(0, 256, (9001, 2, 3, 3)).astype(np.uint8)
    images[..., 1] = 77
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-12)
    expected_std = images.std(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(std, [expected_std[0], 1, expected_std[2]], rtol=1e-12)


def test_dataset_passes_through_jit(digits):
    result = jax.jit(
        lambda dataset: dataclasses.replace(dataset, train_labels=-dataset.test_labels)
    )(digits)
    assert (result.name, result.num_classes) == ("digits", 10)
    np.testing.assert_array_equal(result.train_labels, -np.asarray(digits.test_labels))
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.name = "other"


def test_unknown_name_lists_the_accepted_ones():
    with pytest.raises(ValueError, match="unknown data set 'mnist'") as caught:
        datasets.load("mnist")
    for name in ("digits", "fashion_mnist", "cifar10", "cifar100", "imagenet16_120"):
        assert name in str(caught.value)
        assert name in datasets.DATASET_NAMES


def test_importing_the_package_leaves_heavy_libraries_alone():
    program = (
        "import sys, experiments.lab.datasets\n"
        "print([name for name in ('tensorflow_datasets', 'sklearn', 'array_record') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


# --------------------------------------------------------------------------------- TFDS stand-ins

# name: (TFDS name, config, side, classes stored, test split)
STAND_INS = {
    "cifar10": ("cifar10", None, 32, 10, "test"),
    "cifar100": ("cifar100", None, 32, 100, "test"),
    "imagenet16_120": ("imagenet_resized", "16x16", 16, 1000, "validation"),
}


def png(pixels):
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def stand_in_examples(name, split, number=25):
    """Random images; labels hit the first class, the last one and, in ImageNet, the borderline."""
    _, _, side, classes, _ = STAND_INS[name]
    generator = np.random.RandomState(list(STAND_INS).index(name) + 10 * (split == "train"))
    images = generator.randint(0, 256, (number, side, side, 3)).astype(np.uint8)
    labels = generator.randint(0, classes, number)
    labels[:4] = 0, min(119, classes - 1), min(120, classes - 1), classes - 1
    return images, labels


def prepare(data_dir, name, *, as_png=True, labels=None, image_side=None, splits=None):
    """Writes a stand-in with TFDS's own writer, laid out as the real data set is."""
    import tensorflow_datasets as tfds

    builder_name, config, side, classes, test_split = STAND_INS[name]
    tfds.disable_progress_bar()

    unregistered: Any = {"skip_registration": True}  # a keyword of TFDS's that has no type

    class StandIn(tfds.core.GeneratorBasedBuilder, **unregistered):
        name = builder_name
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            shape = (image_side or side, image_side or side, 3)
            image = (
                tfds.features.Image(shape=shape)
                if as_png
                else tfds.features.Tensor(shape=shape, dtype=np.uint8)
            )
            label = tfds.features.ClassLabel(num_classes=classes) if labels is None else np.int64
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"id": tfds.features.Text(), "image": image, "label": label}
                ),
            )

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(s) for s in splits or ("train", test_split)}

        def _generate_examples(self, split):
            images, given_labels = stand_in_examples(name, split)
            images = images[:, : image_side or side, : image_side or side]
            given_labels = given_labels if labels is None else labels
            for index, (image, label) in enumerate(zip(images, given_labels, strict=False)):
                stored = png(image) if as_png else image
                yield index, {"id": f"{split}_{index}", "image": stored, "label": int(label)}

    builder = StandIn(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder.data_path


@pytest.mark.parametrize("as_png", [True, False])
@pytest.mark.parametrize("name", STAND_INS)
def test_tfds_data_is_read_without_tensorflow(tmp_path, name, as_png):
    prepare(tmp_path, name, as_png=as_png)
    imported_before = "tensorflow" in sys.modules
    dataset = datasets.load(name, data_dir=tmp_path)
    assert ("tensorflow" in sys.modules) == imported_before
    _, _, side, classes, test_split = STAND_INS[name]
    num_classes = min(classes, 120)
    assert_well_formed(dataset, name, num_classes, (side, side, 3))
    expected = []
    for split in ("train", test_split):
        images, labels = stand_in_examples(name, split)
        expected.append((images[labels < num_classes], labels[labels < num_classes]))
    (train_images, train_labels), (test_images, test_labels) = expected
    assert as_multiset(
        recovered_pixels(dataset.train_images, train_images), dataset.train_labels
    ) == as_multiset(train_images, train_labels)
    assert as_multiset(
        recovered_pixels(dataset.test_images, train_images), dataset.test_labels
    ) == as_multiset(test_images, test_labels)


def test_imagenet_stand_in_has_classes_to_drop():
    for split in ("train", "validation"):
        labels = stand_in_examples("imagenet16_120", split)[1]
        assert {119, 120, 999} <= set(labels.tolist())


@pytest.mark.parametrize("name", STAND_INS)
def test_tfds_unprepared_says_where_and_how(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
    builder = {"imagenet16_120": "imagenet_resized/16x16"}.get(name, name)
    for data_dir, folder in ((tmp_path, tmp_path), (None, tmp_path / "default")):
        command = f"tfds build {builder} --file_format=array_record --data_dir={folder}`"
        with pytest.raises(FileNotFoundError) as caught:
            datasets.load(name, data_dir=data_dir)
        assert f"{builder}: no prepared data in {folder}; " in str(caught.value)
        assert command in str(caught.value)


def test_tfds_other_config_is_not_taken(tmp_path):
    folder = prepare(tmp_path, "imagenet16_120")
    shutil.move(folder.parent, folder.parent.parent / "8x8")
    with pytest.raises(FileNotFoundError, match="16x16"):
        datasets.load("imagenet16_120", data_dir=tmp_path)


def test_tfds_wrong_format_says_how_to_prepare(tmp_path):
    info = prepare(tmp_path, "imagenet16_120") / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="found files of format tfrecord") as caught:
        datasets.load("imagenet16_120", data_dir=tmp_path)
    assert str(info.parent) in str(caught.value)
    assert f"--file_format=array_record --data_dir={tmp_path}`" in str(caught.value)


def test_tfds_missing_and_damaged_shards_are_reported(tmp_path):
    folder = prepare(tmp_path, "cifar10")
    (shard,) = folder.glob("*test*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"'test'.*cannot be read"):
        datasets.load("cifar10", data_dir=tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"cannot be read.*No such file"):
        datasets.load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar10", {"labels": [3, 11]}, "label 11 .*0 to 9"),
        ("imagenet16_120", {"labels": [3, -1]}, "label -1 .*0 to 119"),
        ("imagenet16_120", {"labels": [120, 500]}, "no examples of the first 120 classes"),
        ("cifar10", {"image_side": 31}, r"uint8 of shape \(31, 31, 3\), expected"),
        ("imagenet16_120", {"splits": ("train",)}, r"'validation'.*found \['train'\]"),
    ],
)
def test_tfds_wrong_content_names_the_folder(tmp_path, name, options, message):
    folder = prepare(tmp_path, name, **options)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(name, data_dir=tmp_path)
    assert str(caught.value).startswith(str(folder))


# ------------------------------------------------------------------------------------- augmentation


@pytest.fixture
def images():
    """Every pixel of every image has its own value, none is zero: a crop tells where it is from."""
    return np.arange(1, 1 + 400 * 4 * 5 * 2, dtype=np.float32).reshape(400, 4, 5, 2)


def valid_crops(image, padding):
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, image.shape[2]), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    places = itertools.product(range(2 * padding + 1), repeat=2)
    return {(y, x): padded[y : y + height, x : x + width] for y, x in places}


def place_of(crops, result):
    (place,) = [place for place, crop in crops.items() if np.array_equal(crop, result)]
    return place


def test_random_crop_gives_valid_crops_at_every_place(images):
    results = np.asarray(datasets.random_crop(jax.random.key(0), images, 2))
    assert results.dtype == images.dtype
    places = [
        place_of(valid_crops(image, 2), result)
        for image, result in zip(images, results, strict=True)
    ]
    counts = np.zeros((5, 5))
    for place in places:
        counts[place] += 1
    # 400 draws over 25 places: 16 each, with a standard deviation of 3.9.
    assert counts.min() > 0
    assert counts.max() < 36


def test_random_flip_mirrors_about_half(images):
    results = np.asarray(datasets.random_flip(jax.random.key(1), images))
    kept = (results == images).all(axis=(1, 2, 3))
    mirrored = (results == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_augment_composes_crop_and_flip(images):
    results = np.asarray(datasets.augment(jax.random.key(2), images, flip=True, padding=1))
    outcomes = set()
    for image, result in zip(images, results, strict=True):
        mirrored = {(*at, True): crop[:, ::-1] for at, crop in valid_crops(image, 1).items()}
        kept = {(*at, False): crop for at, crop in valid_crops(image, 1).items()}
        outcomes.add(place_of(kept | mirrored, result))
    assert len(outcomes) == 18


def test_augment_leaves_out_what_is_not_asked_for(images):
    key = jax.random.key(3)
    np.testing.assert_array_equal(datasets.augment(key, images, flip=False, padding=0), images)
    only_flipped = np.asarray(datasets.augment(key, images, flip=True, padding=0))
    np.testing.assert_array_equal(np.sort(only_flipped, axis=2), np.sort(images, axis=2))
    only_shifted = np.asarray(datasets.augment(key, images, flip=False, padding=1))
    for image, result in zip(images[:20], only_shifted, strict=False):
        place_of(valid_crops(image, 1), result)


def test_augmentation_is_a_function_of_its_key(images):
    both = functools.partial(datasets.augment, flip=True, padding=2)
    first = both(jax.random.key(4), images)
    np.testing.assert_array_equal(first, both(jax.random.key(4), images))
    assert not np.array_equal(first, both(jax.random.key(5), images))


def test_negative_padding_raises(images):
    with pytest.raises(ValueError, match="padding must be 0 or more, found -1"):
        datasets.random_crop(jax.random.key(0), images, -1)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1, 1), (9, 9), (9, 1), (50, 7)])
def test_epoch_indices_visit_every_example_at_most_once(num_examples, batch_size):
    for seed in range(5):
        indices = np.asarray(datasets.epoch_indices(jax.random.key(seed), num_examples, batch_size))
        assert indices.dtype == np.int32
        assert indices.shape == (num_examples // batch_size, batch_size)
        assert len(np.unique(indices)) == indices.size
        assert set(indices.ravel().tolist()) <= set(range(num_examples))


def test_epoch_indices_shuffle_anew_for_every_key():
    first, second = (
        np.asarray(datasets.epoch_indices(jax.random.key(seed), 96, 8)) for seed in (0, 1)
    )
    for indices in (first, second):
        assert sorted(indices.ravel().tolist()) == list(range(96))
    assert (first != second).mean() > 0.9
    assert (first.ravel() != np.arange(96)).mean() > 0.9


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_epoch_indices_raise_on_impossible_batches(batch_size):
    with pytest.raises(ValueError, match=f"10 examples, found {batch_size}"):
        datasets.epoch_indices(jax.random.key(0), 10, batch_size)


# ----------------------------------------------------------------------------------- one's own data


def own_arrays() -> dict[str, Any]:
    drawn = np.random.default_rng(0)
    return {
        "train_images": drawn.integers(0, 256, (12, 3, 5, 2)).astype(np.uint8),
        "train_labels": np.arange(12) % 4,
        "test_images": drawn.integers(0, 256, (6, 3, 5, 2)).astype(np.uint8),
        "test_labels": np.arange(6) % 3,
    }


def test_own_arrays_are_standardised_and_read_from_a_file(tmp_path):
    arrays, path = own_arrays(), str(tmp_path / "mine.npz")
    np.savez(path, **arrays)
    for found in (datasets.from_arrays(**arrays, name="mine.npz"), datasets.load(path)):
        assert_well_formed(found, "mine.npz", 4, (3, 5, 2))
        for split in ("train", "test"):
            images = getattr(found, f"{split}_images")
            pixels = recovered_pixels(images, arrays["train_images"])
            np.testing.assert_array_equal(pixels, arrays[f"{split}_images"])
    flat = [np.full((len(arrays[f"{split}_labels"]), 2, 2, 1), value)
            for split, value in (("train", 0.1), ("test", 0.2))]  # fmt: skip
    found = datasets.from_arrays(flat[0], arrays["train_labels"], flat[1], arrays["test_labels"])
    np.testing.assert_array_equal(found.train_images, 0)
    np.testing.assert_allclose(found.test_images, 0.1)
    gray: dict[str, Any] = arrays | {
        name: arrays[name][..., 0] for name in ("train_images", "test_images")
    }
    assert datasets.from_arrays(**gray).train_images.shape == (12, 3, 5, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((12, 4))}, r"train_images has the shape \(12, 4\)"),
        ({"train_images": np.full((12, 3, 5, 2), np.nan)}, "train_images: example 0 holds numbers"),
        ({"test_images": np.zeros((6, 3, 4, 2), int)}, r"one of test_images \(3, 4, 2\)"),
        ({"test_labels": np.zeros(5, int)}, "test_images holds 6 examples and test_labels 5"),
        ({"test_labels": np.zeros(6)}, r"test_labels has the shape \(6,\) and dtype float64"),
        ({"train_labels": np.full(12, -1)}, "labels reach from -1 to 2"),
        ({"train_labels": np.arange(12) % 4 + 1, "test_labels": np.ones(6, int)}, "class 0 has no"),
        ({"train_labels": np.append(np.arange(11), 2**40)}, "labels reach from 0 to 1099511627776"),
        (
            {"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)},
            "from 2 to 65536, found 1",
        ),
        ({"test_images": np.zeros((6, 3, 5, 2))}, "uint8, test_images of float64; both must be on"),
        ({"num_classes": 3}, "train_labels: label 3 of example 3"),
    ],
)
def test_wrong_arrays_raise_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        datasets.from_arrays(**{**own_arrays(), **changed})


def test_a_file_that_changes_under_its_name_is_noticed(tmp_path):
    arrays, path = own_arrays(), tmp_path / "mine.npz"
    np.savez(path, **arrays)
    named = DatasetParser().parse(str(path))
    assert re.fullmatch("mine.npz#sha256=[0-9a-f]{16}", named)
    assert datasets.load(named, data_dir=tmp_path).num_classes == 4
    arrays["train_labels"] = arrays["train_labels"][::-1].copy()
    np.savez(path, **arrays)
    assert DatasetParser().parse(str(path)) != named
    with pytest.raises(ValueError, match="holds other arrays"):
        datasets.load(named, data_dir=tmp_path)
    np.savez(path, **{**arrays, "test_images": np.array([1, None])})
    with pytest.raises(ValueError, match="test_images holds Python objects"):
        datasets.load(str(path))
    np.savez(path, images=arrays["train_images"])
    with pytest.raises(ValueError, match="it holds images, not train_images, train_labels"):
        datasets.load(str(path))
    np.save(tmp_path / "one.npy", arrays["train_images"])
    for content in ((tmp_path / "one.npy").read_bytes(), b"text", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an .npz file, as numpy.savez writes them"):
            datasets.load(str(path))
    with pytest.raises(ValueError, match="is not a file; make it by numpy.savez"):
        DatasetParser().parse("absent.npz")


def claim(number):
    """The header of an array of so many examples, without their numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (number, 3, 5, 2)}
    )
    return header.getvalue()


def in_headers(content, offset, value):
    """Sets a number of two bytes in the headers of all members of an archive."""
    changed = bytearray(content)
    for magic, place in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
        for found in re.finditer(re.escape(magic), content):
            struct.pack_into("<H", changed, found.start() + place, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: in_headers(content, 6, 1), "encrypted"),
        (lambda content: in_headers(content, 8, 97), "compression"),
        (lambda content: content[:200] + content[201:], "cannot be read"),
    ],
)
def test_archives_that_cannot_be_unpacked_are_named(tmp_path, spoil, message):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **own_arrays())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"mine.npz' cannot be read: .*{message}|{message}"):
        datasets.load(str(path))


def test_arrays_that_do_not_hold_what_they_claim_take_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    np.savez(path, **own_arrays())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        archive.writestr("train_images.npy", claim(10**12))
    with pytest.raises(ValueError, match="mine.npz' cannot be read: "):
        datasets.load(str(path))
    given: dict[str, Any] = own_arrays() | {"train_images": np.zeros((12, 99, 99, 9))}
    np.savez_compressed(path, **given)
    monkeypatch.setattr(arrays, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="its arrays take .* bytes; accepted are 100000"):
        datasets.load(str(path))


@pytest.mark.parametrize("value", [np.inf, 2j, [4, 4], "4", True, 4.0, 1, 2**40])
def test_a_number_of_classes_is_one_integer(tmp_path, value):
    np.savez(tmp_path / "mine.npz", **own_arrays(), num_classes=value)
    with pytest.raises(ValueError, match="num_classes (is array|must be from 2 to 65536)"):
        datasets.load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize(
    "name", ["a$\\foo$c", "[red]a", "a\x1b[1m", "a\udcff", "a|b", "a,b", "a\n"]
)
def test_names_that_figures_or_terminals_would_change_are_told(tmp_path, name):
    path = tmp_path / f"{name}.npz"
    np.savez(path, **own_arrays())
    with pytest.raises(ValueError, match="accepted are letters, digits, spaces"):
        DatasetParser().parse(str(path))
    path.rename(tmp_path / "größe 2 (a).npz")
    DatasetParser().parse(str(tmp_path / "größe 2 (a).npz"))


@pytest.mark.parametrize("factors", [(1, 1e300), (1, 1e-310), (1e300, 1e300), (1e-310, 1e-310)])
def test_images_on_another_scale_are_told(factors):
    given = own_arrays()
    for split, factor in zip(("train", "test"), factors, strict=True):
        given[f"{split}_images"] = given[f"{split}_images"] * np.float64(factor)
    with pytest.raises(ValueError, match="channel 0 of (train_images deviates|test_images holds)"):
        datasets.from_arrays(**given)
