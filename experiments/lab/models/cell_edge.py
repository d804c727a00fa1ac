"""One edge of a cell whose operation is chosen when the program runs.

All cells of a space then share one compiled program. An edge is what `lax.switch` computes of its
features by one of the benchmark's five operations, 0 to 4 as in a cell's code:

    none: 0,  skip: z,  convolutions: BN(W σ(z)),  pooling: the mean over 3 x 3.

Autodiff of `lax.switch` would store, on every edge, what any of the operations might need for its
derivative. `chosen_edge` keeps the output of the convolution alone, and has both modes of
derivative.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float, Int, Scalar

from experiments.lab.models.convolution import conv_general_dilated

EPSILON = 1e-5
CONVOLUTIONS = {2: 1, 3: 3}
"""The digits of the operations that convolve, with their kernel sizes."""

Features = Float[Array, "b h w c"]


class EdgeWeights(NamedTuple):
    """The weights of all operations of an edge; both convolutions share one normalization.

    Attributes:
      kernel_1: [1, 1, c, c].
      kernel_3: [3, 3, c, c].
      scale: [c].
      bias: [c].
    """

    kernel_1: Float[Array, "1 1 c c"]
    kernel_3: Float[Array, "3 3 c c"]
    scale: Float[Array, " c"]
    bias: Float[Array, " c"]


class Moments(NamedTuple):
    """Mean and variance of every channel, [c]."""

    mean: Float[Array, " c"]
    variance: Float[Array, " c"]


def convolve(features: Features, kernel: Float[Array, "q q c d"]) -> Float[Array, "b h w d"]:
    """Convolves σ(features) with as many zeros around them as keep their size."""
    return conv_general_dilated(
        jax.nn.relu(features),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def average_pool(features: Features) -> Features:
    """Returns the mean over the 3 x 3 neighbours, those outside of the image excluded.

    As sums of shifted images, which on CPUs take half the time of `lax.reduce_window`.
    """
    height, width = features.shape[1:3]
    rows = jnp.pad(features, ((0, 0), (1, 1), (0, 0), (0, 0)))
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    columns = jnp.pad(total, ((0, 0), (0, 0), (1, 1), (0, 0)))
    total = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:]
    counts = np.outer(_neighbours(height), _neighbours(width))[..., None]
    return total / jnp.asarray(counts, total.dtype)


def _neighbours(size: int) -> np.ndarray:
    """How many of a pixel and the two beside it lie inside of the image, for every pixel."""
    position = np.arange(size)
    return np.minimum(position + 2, size) - np.maximum(position - 1, 0)


def batch_moments(features: Features) -> Moments:
    """Returns the moments of a batch; its images first, an order that is fast on CPUs."""
    mean = features.mean(axis=0).mean(axis=(0, 1))
    square = jnp.square(features).mean(axis=0).mean(axis=(0, 1))
    return Moments(mean, jnp.maximum(square - jnp.square(mean), 0))


def normalize(
    features: Features,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    moments: Moments | None = None,
) -> Features:
    """Normalizes every channel by the given moments, or else by those of the batch."""
    mean, variance = moments or batch_moments(features)
    return (features - mean) * (lax.rsqrt(variance + EPSILON) * scale) + bias


def fixed_edge(
    operation: Int[Scalar, ""], features: Features, weights: EdgeWeights, moments: Moments
) -> Features:
    """Computes an edge with normalization by the given moments, as after training."""

    def convolution(name: str):
        return lambda features, weights, moments: normalize(
            convolve(features, getattr(weights, name)), weights.scale, weights.bias, moments
        )

    branches = (
        lambda features, *_: jnp.zeros_like(features),
        lambda features, *_: features,
        convolution("kernel_1"),
        convolution("kernel_3"),
        lambda features, *_: average_pool(features),
    )
    return lax.switch(operation, branches, features, weights, moments)


@jax.custom_jvp
def chosen_edge(
    operation: Int[Scalar, ""], features: Features, weights: EdgeWeights
) -> tuple[Features, Moments]:
    """Computes an edge with normalization by the batch, as in training.

    Args:
      operation: 0 to 4.
      features: of the edge's source.
      weights: of all operations.

    Returns:
      The contribution to the edge's target, and the moments of the batch, which have no
      derivative; 0 where the operation does not convolve.
    """
    output, _, moments = lax.switch(operation, _FORWARD, features, weights)
    return output, moments


@chosen_edge.defjvp
def _chosen_edge_jvp(primals, tangents):
    operation, features, weights = primals
    output, convolved, moments = lax.switch(operation, _FORWARD, features, weights)
    change = linear_call(
        lambda known, changes: lax.switch(known[0], _JVP, *known[1:], *changes),
        lambda known, change: lax.switch(known[0], _TRANSPOSE, *known[1:], change),
        (operation, features, convolved, weights),
        (tangents[1], tangents[2]),
    )
    return (output, moments), (change, jax.tree.map(jnp.zeros_like, moments))


def _none(features):
    return jnp.zeros_like(features)


def _skip(features):
    return features


def _convolution_forward(name, features, weights):
    convolved = convolve(features, getattr(weights, name))
    output = normalize(convolved, weights.scale, weights.bias)
    return output, convolved, batch_moments(convolved)


def _convolution_jvp(name, features, convolved, weights, features_change, weights_change):
    pairs = (features, getattr(weights, name)), (features_change, getattr(weights_change, name))
    convolved_change = jax.jvp(convolve, *pairs)[1]
    return jax.jvp(
        normalize,
        (convolved, weights.scale, weights.bias),
        (convolved_change, weights_change.scale, weights_change.bias),
    )[1]


def _convolution_transpose(name, features, convolved, weights, change):
    _, normalize_vjp = jax.vjp(normalize, convolved, weights.scale, weights.bias)
    convolved_change, scale_change, bias_change = normalize_vjp(change)
    # What this call computes of the convolution itself is not used, and so is not computed.
    _, convolve_vjp = jax.vjp(convolve, features, getattr(weights, name))
    features_change, kernel_change = convolve_vjp(convolved_change)
    changes = jax.tree.map(jnp.zeros_like, weights)._replace(scale=scale_change, bias=bias_change)
    return features_change, changes._replace(**{name: kernel_change})


def _linear_forward(function, features, weights):
    nothing = jnp.zeros_like(weights.scale)
    return function(features), jnp.zeros_like(features), Moments(nothing, nothing)


def _linear_jvp(function, features, convolved, weights, features_change, weights_change):
    del features, convolved, weights, weights_change
    return function(features_change)


def _linear_transpose(function, features, convolved, weights, change):
    del convolved
    (features_change,) = jax.linear_transpose(function, features)(change)
    return features_change, jax.tree.map(jnp.zeros_like, weights)


def _branches(linear, convolution):
    """The five branches of one direction, from that of a linear map and that of a convolution."""
    return (
        functools.partial(linear, _none),
        functools.partial(linear, _skip),
        functools.partial(convolution, "kernel_1"),
        functools.partial(convolution, "kernel_3"),
        functools.partial(linear, average_pool),
    )


_FORWARD = _branches(_linear_forward, _convolution_forward)
_JVP = _branches(_linear_jvp, _convolution_jvp)
_TRANSPOSE = _branches(_linear_transpose, _convolution_transpose)
