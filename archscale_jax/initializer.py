"""The pure initializer: redraws the weights of a params tree for its topology (theory §3)."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from archscale_jax.architecture import (
    Architecture,
    PyTree,
    Role,
    check_parameters,
    parameter_name,
)
from archscale_jax.rules.initialization import InitializationRule, weight_standard_deviations


def initialize(
    key: jax.Array,
    params: PyTree,
    architecture: Architecture,
    rule: str | InitializationRule | None = None,
    **options: Any,
) -> PyTree:
    """Draws new parameters of the same structure, shapes and dtypes.

    Weights are normal with the standard deviation of the rule, biases 0, scales 1. The draw of a
    leaf depends on the key and the leaf's name alone: other layers may come and go.

    Pure; works under `jax.jit` (there, pass `out_shardings` to have the result born sharded) and
    `jax.eval_shape`. Called eagerly, each new leaf goes where the old one was put.

    Args:
      key: a JAX random key.
      params: tree of arrays or `jax.ShapeDtypeStruct`; only shapes, dtypes and shardings are read.
      architecture: the architecture of these params.
      rule: see `archscale_jax.rules.weight_standard_deviations`; None fits the arrangement.
      **options: passed to the rule.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: an unknown rule, or params that are not those of the architecture; the message
        names the leaf.
    """
    check_parameters(architecture, params)
    deviations = weight_standard_deviations(architecture, rule, **options)
    roles = {parameter.name: parameter.role for parameter in architecture.parameters}

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = parameter_name(path)
        if name in deviations:
            new = _draw_normal(key, name, deviations[name], leaf)
        else:
            new = jnp.full(leaf.shape, float(roles[name] == Role.SCALE), leaf.dtype)
        return _placed_like(leaf, new)

    return jax.tree_util.tree_map_with_path(draw, params)


def _draw_normal(key: jax.Array, name: str, deviation: float, leaf: Any) -> jax.Array:
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    # Low precision would round the draw before it is scaled.
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    # The barrier keeps XLA from merging the factor into those of `normal`: same bits under jit.
    normal = jax.lax.optimization_barrier(jax.random.normal(key, leaf.shape, dtype))
    return (deviation * normal).astype(leaf.dtype)


def _placed_like(leaf: Any, new: jax.Array) -> jax.Array:
    if isinstance(leaf, Tracer) or isinstance(new, Tracer):
        return new
    # An array that was put nowhere stays free to join others, on whatever devices they are.
    free = isinstance(leaf, jax.Array) and not leaf.committed
    sharding = None if free else getattr(leaf, "sharding", None)
    return new if sharding is None else jax.device_put(new, sharding)
