"""Image data sets as arrays on the device, and the functions that batch and augment them."""

from archscale_jax.datasets.arrays import from_arrays
from archscale_jax.datasets.augment import augment, epoch_indices, random_crop, random_flip
from archscale_jax.datasets.dataset import Dataset, downscale
from archscale_jax.datasets.idx import read_idx
from archscale_jax.datasets.sources import DATASET_NAMES, load

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
