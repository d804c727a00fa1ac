"""Image data sets as arrays on the device, and the functions that batch and augment them."""

from experiments.lab.datasets.arrays import from_arrays
from experiments.lab.datasets.augment import augment, epoch_indices, random_crop, random_flip
from experiments.lab.datasets.dataset import Dataset, downscale
from experiments.lab.datasets.idx import read_idx
from experiments.lab.datasets.sources import DATASET_NAMES, load

__all__ = [
    "DATASET_NAMES",
    "Dataset",
    "augment",
    "downscale",
    "epoch_indices",
    "from_arrays",
    "load",
    "random_crop",
    "random_flip",
    "read_idx",
]
