"""What every output position of a layer reads, and sums over examples of it."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from archscale_jax._precision import exact
from archscale_jax.tracing.layers import LayerKind, Window

Sums = TypeVar("Sums")
EXACT = lax.Precision.HIGHEST
"""Of products that are summed up: covariances are nearly singular, and accelerators would round
float32 to 8 or 11 bits first."""


def rows_of(
    kind: LayerKind, inputs: Float[Array, "n *s c"], *, ones: bool | None = None
) -> Float[Array, "n p r"]:
    """Returns what each of p output positions of a layer reads: of a convolution its patch.

    Args:
      kind: the layer.
      inputs: what it is applied to.
      ones: end every row with a 1; None where the layer has a bias.
    """
    inputs = exact(inputs)
    if kind.window is not None:
        inputs = jnp.concatenate(list(slices(inputs, kind.window)), axis=-1)
    rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if ones is None:
        ones = kind.bias is not None
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 1)), constant_values=1) if ones else rows


def slices(images: Float[Array, "n h w c"], window: Window):
    """Yields for every entry of a kernel, by rows and columns, what it is multiplied with.

    [n, h2, w2, c] each; XLA keeps them as views of the images.
    """
    padded = jnp.pad(images, ((0, 0), *window.padding, (0, 0)))
    reach = [d * (size - 1) for size, d in zip(window.size, window.dilation, strict=True)]
    ends = [padded.shape[axis + 1] - reach[axis] for axis in (0, 1)]
    for row in range(window.size[0]):
        for column in range(window.size[1]):
            top, left = row * window.dilation[0], column * window.dilation[1]
            yield padded[
                :,
                top : top + ends[0] : window.strides[0],
                left : left + ends[1] : window.strides[1],
            ]


def sum_over_examples(function: Callable[..., Sums], arrays: tuple, *, one_by_one: bool) -> Sums:
    """Returns a function's sums over the examples along the first axis of arrays.

    Args:
      function: of arrays of any number of examples to sums over them.
      arrays: its arguments, trees of arrays.
      one_by_one: hold what the function makes of one example only, as patches are larger than
        features by the size of a kernel.
    """
    if not one_by_one:
        return function(*arrays)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda array: array[:1], arrays))
    zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)

    def add(total: Sums, example: tuple) -> tuple[Sums, None]:
        sums = function(*jax.tree.map(lambda array: array[None], example))
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(add, zeros, arrays)[0]


def product(left: Array, right: Array) -> Array:
    """Returns the matrix product without rounding what is multiplied."""
    return jnp.matmul(left, right, precision=EXACT)
