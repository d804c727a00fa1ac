"""Convolutions whose gradients are fast inside loops on a CPU.

XLA rewrites a convolution for the CPU into the one layout that its fast kernel takes (NHWC images,
HWIO kernels) in the entry computation, but not in the body of a loop or in a branch
(https://github.com/jax-ml/jax/issues/12868). The gradients that autodiff emits have other layouts,
so that inside a scan over training steps they run as a naive loop, many times slower. Here the
derivative is written as convolutions whose transposes, the gradients, have the fast layout.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Padding = str | Sequence[tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PART_BYTES = 2**20  # of the inputs; parts of 0.5 to 2 MiB were the fastest


def convolution(
    inputs: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    padding: Padding = "SAME",
    precision: lax.PrecisionLike = None,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves at stride 1: `jax.lax.conv_general_dilated` with other derivatives.

    They are JAX operations in turn, so that forward and reverse mode compose to any order. Forward
    mode pays for the reverse: its derivative by the inputs has a slow layout.

    Args:
      inputs: images.
      kernel: of the same dtype.
      padding: `SAME`, `SAME_LOWER`, `VALID`, or the zeros (before, after) rows and columns.
      precision: see `jax.lax.Precision`.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], (1, 1), padding)
    return _convolution(inputs, kernel, tuple((low, high) for low, high in padding), precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolution(inputs, kernel, padding, precision):
    return lax.conv_general_dilated(
        inputs, kernel, (1, 1), padding, dimension_numbers=_LAYOUT, precision=precision
    )


@functools.partial(_convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(padding, precision, primals, tangents):
    inputs, kernel = primals
    inputs_change, kernel_change = tangents
    output = _convolution(inputs, kernel, padding, precision)
    change = jnp.zeros_like(output)
    if not isinstance(inputs_change, SymbolicZero):
        change += _change_by_inputs(inputs_change, kernel, padding, precision)
    if not isinstance(kernel_change, SymbolicZero):
        change += _change_by_kernel(inputs, kernel_change, padding, precision)
    return output, change


# Jitted, so that derivatives outside of jit are compiled once.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _change_by_inputs(inputs_change, kernel, padding, precision):
    """Convolves with the kernel, turned and turned back, input and output channels swapped.

    The transpose turns it again and swaps again, and has the fast layout. The barrier keeps XLA
    from cancelling the turns, which would put the slow layout back.
    """
    turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    return lax.conv_general_dilated(
        inputs_change,
        jnp.flip(turned, (0, 1)),
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
        precision=precision,
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _change_by_kernel(inputs, kernel_change, padding, precision):
    """Convolves with every array transposed, such that the transpose has the fast layout.

    In the transpose the output's gradient stands as the kernel and the batch as its channels. A
    long batch is cut into parts that fit a cache.
    """
    batch = len(inputs)
    parts = max(1, min(batch, math.ceil(inputs.nbytes / _PART_BYTES)))
    size = math.ceil(batch / parts)
    kernel_change = lax.optimization_barrier(kernel_change.transpose(2, 0, 1, 3))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no transposed copy of the inputs
    def change_of(part):
        change = lax.conv_general_dilated(
            lax.optimization_barrier(part.transpose(3, 1, 2, 0)),
            kernel_change,
            (1, 1),
            padding,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            precision=precision,
        )
        return lax.optimization_barrier(change).transpose(2, 0, 1, 3)

    if parts == 1:
        return change_of(inputs)
    filled = jnp.pad(inputs, [(0, parts * size - batch), (0, 0), (0, 0), (0, 0)])
    changes = lax.map(change_of, filled.reshape(parts, size, *inputs.shape[1:]))
    return changes.reshape(parts * size, *changes.shape[2:])[:batch]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jnp.dtype | type | None = None,
    out_sharding=None,
) -> Array:
    """Replaces `jax.lax.conv_general_dilated`, for one in `nnx.Conv(conv_general_dilated=…)`.

    Calls `convolution` where JAX runs on a CPU and stride, dilation and groups are 1, images NHWC,
    kernels HWIO and dtypes floating, and else what it replaces; arguments as there.
    """
    ones = (window_strides, lhs_dilation or (1,), rhs_dilation or (1,))
    plain = (
        jax.default_backend() == "cpu"
        and lhs.ndim == 4
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and all(number == 1 for numbers in ones for number in numbers)
        and feature_group_count == batch_group_count == 1
        and preferred_element_type in (None, lhs.dtype)
        and out_sharding is None
    )
    if plain:
        return convolution(lhs, rhs, padding, precision)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
    )
