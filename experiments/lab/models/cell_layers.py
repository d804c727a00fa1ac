"""What surrounds the cells of a `CellNetwork`: convolutions, batch normalization, reductions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Scalar

from experiments.lab.models.cell_edge import (
    Features,
    Moments,
    batch_moments,
    convolve,
    normalize,
)
from experiments.lab.models.convolution import conv_general_dilated

_KEPT = 0.9
"""Share of a running average that an update keeps, as in the benchmark."""


def convolution(in_features: int, out_features: int, size: int, options: Any) -> nnx.Conv:
    """Returns a square convolution without bias that keeps the size of images."""
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        padding="SAME",
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


class Normalization(nnx.Module):
    """What `nnx.BatchNorm` computes, with moments whose reduction is fast on CPUs."""

    def __init__(self, width: int, options: Any):
        dtype = options["param_dtype"]
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, features: Features, train: bool) -> Features:
        """Normalizes by the batch and moves the running averages, or by these."""
        moments = batch_moments(features) if train else self.running()
        if train:
            self.track(moments)
        return normalize(features, self.scale[...], self.bias[...], moments)

    def running(self) -> Moments:
        """Returns the running averages."""
        return Moments(self.mean[...], self.var[...])

    def track(self, moments: Moments, where: bool | Bool[Scalar, ""] = True) -> None:
        """Moves the running averages towards the moments of a batch, where a condition holds."""
        share = jnp.where(where, 1 - _KEPT, 0)
        for average, value in zip((self.mean, self.var), moments, strict=True):
            average[...] += share * (jax.lax.stop_gradient(value) - average[...])


class Reduction(nnx.Module):
    """The residual block that halves images and doubles channels."""

    def __init__(self, width: int, options: Any):
        self.convolution_a = convolution(width, 2 * width, 3, options)
        self.normalization_a = Normalization(2 * width, options)
        self.convolution_b = convolution(2 * width, 2 * width, 3, options)
        self.normalization_b = Normalization(2 * width, options)
        self.shortcut = convolution(width, 2 * width, 1, options)

    def __call__(self, features: Features, train: bool) -> list[Array]:
        """Returns the features of its three vertices: halved, pooled, and their sum."""
        halved = convolve_half(jax.nn.relu(features), self.convolution_a.kernel[...])
        halved = self.normalization_a(halved, train)
        pooled = pool_half(features)
        branch = self.normalization_b(convolve(halved, self.convolution_b.kernel[...]), train)
        return [halved, pooled, branch + self.shortcut(pooled)]


def convolve_half(features: Features, kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b i j d"]:
    """Convolves at stride 2 with a border of one zero; odd sizes get a row and a column more.

    As a convolution of 2 x 2 blocks at stride 1, whose gradient is fast in loops on CPUs.
    """
    blocks = _blocks(features)
    batch, height, _, width, _, channels = blocks.shape
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, 4 * channels)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(2, 2, 2, 2, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * channels, -1)
    layout = ("NHWC", "HWIO", "NHWC")
    return conv_general_dilated(blocks, kernel, (1, 1), ((1, 0), (1, 0)), dimension_numbers=layout)


def pool_half(features: Features) -> Features:
    """Returns the mean over 2 x 2 pixels, over those inside of the image if its sizes are odd."""
    counts = [np.minimum(2, size - np.arange(0, size, 2)) for size in features.shape[1:3]]
    sums = _blocks(features).sum(axis=(2, 4))
    return sums / jnp.asarray(np.outer(*counts)[..., None], features.dtype)


def _blocks(features: Features) -> Float[Array, "b i 2 j 2 c"]:
    batch, height, width, channels = features.shape
    features = jnp.pad(features, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    return features.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels)
