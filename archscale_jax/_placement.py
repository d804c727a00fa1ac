"""Where a leaf lies: what of it is part of a type, and what the compiler is asked for."""

import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
)


def sharding_of(leaf: Any, traced: bool) -> Sharding | None:
    """Returns where a leaf says that it lies, if it does."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, Tracer) or (traced and isinstance(leaf, jax.Array)):
        return jax.typeof(leaf).sharding  # names explicit axes alone
    # An array that was put nowhere stays free to join others, on whatever devices they are.
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def explicit_part(sharding: Sharding | None) -> NamedSharding | None:
    """Returns the part of a sharding that belongs to the type of a value made in this context."""
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, _part(sharding.spec, mesh, AxisType.Explicit))


def constrained(value: jax.Array, sharding: Sharding | None) -> jax.Array:
    """Asks the compiler for the part of a sharding that types do not hold."""
    if not isinstance(sharding, NamedSharding):
        return value
    context = jax.sharding.get_abstract_mesh()
    mesh = context if AxisType.Explicit in context.axis_types else sharding.mesh
    part = _part(sharding.spec, mesh, AxisType.Auto)
    if not any(part):
        return value
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, part))


def _part(spec: PartitionSpec, mesh: Mesh | AbstractMesh, kind: AxisType) -> PartitionSpec:
    """Returns a spec with the mesh axes of one kind alone."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named = [tuple(name for name in axes if kinds.get(name) == kind) for axes in _axes(spec)]
    return PartitionSpec(*(names or None for names in named))


def _axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The names of the mesh axes over which every axis of an array is divided."""
    return [
        (axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else ()
        for axes in spec
    ]


def check_divides(name: str, shape: tuple[int, ...], sharding: Sharding | None) -> None:
    """Says which leaf it is; JAX would name its shape alone."""
    if not isinstance(sharding, NamedSharding):
        return
    for axis, (size, names) in enumerate(zip(shape, _axes(sharding.spec), strict=False)):
        sizes = {one: sharding.mesh.shape[one] for one in names}
        if size % math.prod(sizes.values()):
            raise ValueError(
                f"parameter {name!r} has shape {tuple(shape)}, and its axis {axis} cannot be "
                f"divided over the mesh axes {sizes}; accepted are axes whose sizes divide {size}, "
                "or None"
            )
