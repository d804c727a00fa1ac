"""Sharpness: the largest eigenvalue of the Hessian of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Scalar

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree


def sharpness(
    loss: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    batch: Any,
    *,
    key: Array | None = None,
    max_iterations: int = 30,
) -> Float[Scalar, ""]:
    """Returns the largest eigenvalue of the Hessian, by LOBPCG on Hessian-vector products.

    Gradient descent on a quadratic is stable up to the rate 2/sharpness. Costs up to
    `max_iterations` Hessian-vector products of about four gradients each. Pure: `jax.jit` it with
    `loss` bound, `jax.vmap` it over parameters.

    Args:
      loss: `(params, batch)` to a scalar.
      params: where the Hessian is taken; leaves below float32 are cast to it, which is exact, but
        for what the loss itself rounds.
      batch: what `loss` reads.
      key: of the random start; None takes `jax.random.key(0)`.
      max_iterations: products at most, and one more; fewer where the eigenvalue has converged.

    Returns:
      The eigenvalue; NaN where the Hessian is 0 (a loss that is linear in the parameters).

    Raises:
      ValueError: params of fewer than 6 entries, of which LOBPCG finds no eigenvalue.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard  # slow to import: SciPy's matrices

    # Eigenvectors need float32 at least, and so do sums along them.
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: exact(jnp.asarray(leaf)), params))
    if len(flat) < 6:
        raise ValueError(f"params must hold at least 6 entries, found {len(flat)}")
    gradient = jax.grad(lambda flat: loss(unravel(flat), batch))

    def multiply(vectors: Float[Array, "n k"]) -> Float[Array, "n k"]:
        return jax.vmap(
            lambda vector: jax.jvp(gradient, (flat,), (vector,))[1], in_axes=1, out_axes=1
        )(vectors)

    key = jax.random.key(0) if key is None else key
    start = jax.random.normal(key, (len(flat), 1), flat.dtype)
    values, *_ = lobpcg_standard(multiply, start, max_iterations)
    # A random start is an eigenvector where all eigenvalues are equal; LOBPCG divides by its error.
    product = multiply(start)
    quotient = jnp.vdot(start, product) / jnp.vdot(start, start)
    error = jnp.linalg.norm(product - quotient * start)
    is_exact = (quotient != 0) & (error <= 10 * jnp.finfo(flat).eps * jnp.linalg.norm(product))
    return jnp.where(is_exact, quotient, values[0])
