"""Weights inside `jax.shard_map`, where shapes are those of shards: how often each axis is divided.

Outside of it a sharding changes no shape, and the operations that ask for one change no value.
"""

import math
from collections.abc import Sequence

from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from archscale_jax.tracing.values import Feature, Value, Weight, changed

LAYOUTS = ("sharding_constraint", "layout_constraint", "reshard", "mesh_cast", "pvary", "pcast",
           "device_put")  # fmt: skip
"""Operations that change where a value lies and nothing else."""
GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
COLLECTIVES = ("psum", "psum_invariant", "reduce_scatter", "ppermute", "all_to_all", "pbroadcast",
               "unreduced_psum", "unreduced_reduce_scatter", *GATHERS)  # fmt: skip
"""Operations between devices that no activation hides in: sums of parts, and copies."""


def entered(equation: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Returns the arguments of a `shard_map` as its function sees them, without arrays."""
    found: list[Value] = []
    arguments = zip(values, equation.params["in_specs"], equation.invars, strict=True)
    for value, spec, argument in arguments:
        value = changed(value, array=None)
        if isinstance(value, Weight) and value.split is not None:
            split = _divided(equation.params["mesh"], spec, len(_shape(argument)))
            value = changed(value, split=_times(value.split, split))
        found.append(value)
    return found


def left(equation: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Returns the results of a `shard_map` as they are outside of it."""
    found: list[Value] = []
    results = zip(values, equation.params["jaxpr"].outvars, equation.outvars, strict=True)
    for value, shard, whole in results:
        if isinstance(value, Weight) and value.split is not None:
            size = math.prod(_shape(shard)) * math.prod(value.split)
            split = () if size == math.prod(_shape(whole)) else None
            value = changed(value, split=split)
        found.append(value)
    return found


def split_after(equation: core.JaxprEqn, values: Sequence[Value]) -> tuple[int, ...] | None:
    """Returns the `Weight.split` of what an operation makes of weights; None if it is not known."""
    splits = [
        (value.split, _shape(atom))
        for value, atom in zip(values, equation.invars, strict=False)
        if isinstance(value, Weight)
    ]
    if any(split is None for split, _ in splits):
        return None
    if all(math.prod(split or ()) == 1 for split, _ in splits):
        return ()
    name, parameters = equation.primitive.name, equation.params
    result = _shape(equation.outvars[0])
    split, shape = splits[0]
    assert split is not None
    if len(splits) > 1:
        same = all(other == (split, result) for other in splits)
        return split if same else None
    if name == "transpose":
        return tuple(split[axis] for axis in parameters["permutation"])
    if name == "broadcast_in_dim":
        found = [1] * len(result)
        for axis, target in enumerate(parameters["broadcast_dimensions"]):
            found[target] = split[axis]
        return tuple(found)
    if name in ("reshape", "squeeze"):
        return _reshaped(split, shape, result)
    if name == "slice":
        kept = all(times == 1 or a == b for times, a, b in zip(split, shape, result, strict=True))
        return split if kept else None
    if name in GATHERS:
        return _gathered(split, parameters)
    return split if result == shape and name not in COLLECTIVES else None


def whole_shape(value: Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the whole array, of which a device holds a shard of `shape`."""
    split = value.split if isinstance(value, Weight) else ()
    return tuple(size * times for size, times in zip(shape, split, strict=True)) if split else shape


def sliced(value: Value, before: tuple[int, ...], after: tuple[int, ...], manual: bool) -> Value:
    """Returns what a slice is; inside a `shard_map` devices may take different ones."""
    if isinstance(value, Feature):
        return changed(value, bare=False)
    if isinstance(value, Weight) and manual and before != after:
        return changed(value, split=None)
    return value


def first_taken(split: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Returns the `split` of an entry along the first axis, unless that axis is divided."""
    return split if not split else split[1:] if split[0] == 1 else None


def _divided(mesh: Mesh | AbstractMesh, spec: PartitionSpec, rank: int) -> tuple[int, ...]:
    """Returns into how many shards a spec divides every axis."""
    axes = [() if one is None else one if isinstance(one, tuple) else (one,) for one in spec]
    found = [math.prod(mesh.shape[name] for name in names) for names in axes]
    return (*found, *[1] * (rank - len(found)))


def _times(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(one, other, strict=True)) if one else other


def _gathered(split: tuple[int, ...], parameters) -> tuple[int, ...] | None:
    axis, size = parameters["all_gather_dimension"], parameters["axis_size"]
    if not parameters["tiled"] or split[axis] % size:
        return None
    return (*split[:axis], split[axis] // size, *split[axis + 1 :])


def _reshaped(
    split: tuple[int, ...], shape: tuple[int, ...], result: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A divided axis may stay, be the first of several that are joined, or become several.

    The first of them is divided then. One entry a device is not an axis: what is left of it
    may be a layer for each device.
    """
    found = [1] * len(result)
    for axis, times in enumerate(split):
        if times == 1:
            continue
        before = math.prod(shape[:axis])
        starts = [
            at for at, size in enumerate(result) if size > 1 and math.prod(result[:at]) == before
        ]
        if not starts or shape[axis] == 1 or found[starts[0]] > 1:
            return None
        found[starts[0]] = times
    return tuple(found)


def _shape(atom) -> tuple[int, ...]:
    return atom.aval.shape
