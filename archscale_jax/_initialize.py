"""The pure initializer: redraws the weights of a params tree for its topology (theory §3)."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from archscale_jax._architecture import Architecture, check_parameters
from archscale_jax._placement import check_divides, constrained, explicit_part, sharding_of
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._initialization import drawn_and_set
from archscale_jax.rules._variances import Deviation, InitializationRule


def initialize(
    key: jax.Array,
    params: PyTree,
    architecture: Architecture,
    rule: str | InitializationRule | None = None,
    *,
    rule_options: Mapping[str, Any] | None = None,
) -> PyTree:
    """Draws new weights for a tree of parameters, and keeps what is not drawn.

    Weights are normal with the standard deviation of the rule. Biases, scales and whatever else the
    rule does not draw keep the values that arrays have: a slope of 0.25, a temperature, the zeros
    of a residual gate, and whatever no gradient comes to. Weights that were 0 in the arrays that
    `trace` got stay 0, as those of adaLN-Zero. Where only shapes are given, biases become 0 and
    scales 1 (of 1 + w, w becomes 0); `report` lists the leaves of which that is not plain. The draw
    of a leaf depends on the key and the leaf's name alone: other layers may come and go, and any
    sharding gives the same numbers.

    Pure; works under `jax.jit` and `jax.eval_shape`. A new leaf goes where the old one was put, or
    where its `jax.ShapeDtypeStruct` says; every device draws its own shard. Under `jax.jit`,
    `out_shardings` does the same for leaves that say nothing, but not in the context of a mesh
    whose axes are explicit: a draw whose type names no axis is made whole there, then cut.

    Args:
      key: a JAX random key.
      params: tree of arrays or `jax.ShapeDtypeStruct`. Of leaves that are drawn only shapes, dtypes
        and shardings are read.
      architecture: the architecture of these params.
      rule: see `archscale_jax.rules.weight_standard_deviations`; None fits the arrangement.
      rule_options: options of the rule.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: no key, no architecture, or params that are not floating arrays.
      ValueError: an unknown rule; several keys; params that are not those of the architecture; a
        sharding whose mesh axes do not divide the leaf. The message names the leaf.
    """
    check_parameters(architecture, params)
    check_key(key)
    for name, leaf in named_leaves(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"parameter {name!r} has dtype {leaf.dtype}; accepted are floating dtypes. Bind "
                "what is not trained to the function, not to params"
            )
    deviations, starts = drawn_and_set(architecture, rule, rule_options)
    plain = {parameter.name: parameter.initial_value for parameter in architecture.parameters}
    constant = {parameter.name for parameter in architecture.parameters if not parameter.trained}
    traced = isinstance(key, Tracer) or isinstance(jnp.zeros(()), Tracer)

    def draw(name: str, leaf: Any) -> jax.Array:
        sharding = sharding_of(leaf, traced)
        check_divides(name, leaf.shape, sharding)
        kept = name in constant or (name not in deviations and name not in starts)
        if kept and not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        make: Callable[..., jax.Array] = _full
        arguments: tuple[Any, ...] = (starts.get(name, plain[name]),)
        if name in deviations:
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            make, arguments = _normal, (own, deviations[name])
        if traced:
            return make(*arguments, shape=leaf.shape, dtype=leaf.dtype, sharding=sharding)
        return _placed(make, arguments, leaf, sharding)

    return map_with_names(draw, params)


def check_key(key: Any) -> None:
    """Checks that an argument `key` is one random key of JAX."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"key must be a JAX random key, as jax.random.key(0), found {type(key).__name__}"
        )
    new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not new and key.dtype != jnp.uint32:
        raise TypeError(f"key must be a JAX random key, found an array of dtype {key.dtype}")
    if key.ndim != (0 if new else 1):
        raise ValueError(
            f"key must be one JAX random key, found an array of shape {key.shape}; jax.vmap "
            "initializes for many keys"
        )


def _normal(
    key: jax.Array,
    deviation: Deviation,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding | None,
) -> jax.Array:
    # Low precision would round the draw before it is scaled.
    exact = jnp.promote_types(dtype, jnp.float32)
    normal = jax.random.normal(key, shape, exact, out_sharding=explicit_part(sharding))
    # The barrier keeps XLA from merging the factor into those of `normal`: same bits under jit.
    normal = jax.lax.optimization_barrier(constrained(normal, sharding))
    return (jnp.asarray(deviation, exact) * normal).astype(dtype)


def _full(
    value: Deviation, *, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None
) -> jax.Array:
    if np.ndim(value):
        return constrained(jnp.broadcast_to(jnp.asarray(value, dtype), shape), sharding)
    full = jax.lax.broadcast(jnp.asarray(value, dtype), shape, out_sharding=explicit_part(sharding))
    return constrained(full, sharding)


def _placed(
    make: Callable[..., jax.Array], arguments: tuple, leaf: Any, sharding: Sharding | None
) -> jax.Array:
    """Calls `make` outside of any trace, so that the leaf is where it belongs."""
    if isinstance(sharding, NamedSharding):
        # Keys that were put elsewhere come along: a program has one set of devices.
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        arguments = tuple(
            jax.device_put(one, everywhere) if _elsewhere(one, sharding) else one
            for one in arguments
        )
        return _compiled(make, leaf.shape, leaf.dtype, sharding)(*arguments)
    new = make(*arguments, shape=leaf.shape, dtype=leaf.dtype, sharding=None)
    return new if sharding is None else jax.device_put(new, sharding)


@functools.lru_cache(maxsize=1024)
def _compiled(
    make: Callable[..., jax.Array], shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> Callable[..., jax.Array]:
    """One program for all leaves of one shape and sharding, which makes nothing but shards."""
    function = functools.partial(make, shape=shape, dtype=dtype, sharding=sharding)
    return jax.jit(function, out_shardings=sharding)


def _elsewhere(argument: Any, sharding: Sharding) -> bool:
    put = isinstance(argument, jax.Array) and argument.committed
    return put and argument.sharding.device_set != sharding.device_set
