"""Sums, means and quotients are taken in float32 at least, whatever the dtype of a model."""

import jax.numpy as jnp
from jaxtyping import Array


def exact(array: Array) -> Array:
    """Returns the array in float32 at least; float64 stays."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
