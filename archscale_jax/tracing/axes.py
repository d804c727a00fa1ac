"""Which axes of features, inputs and leaves run along the axes of an array, through reshuffles."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core

from archscale_jax.tracing.values import NO_LABELS, Axes, Labels


def shape_of(atom) -> tuple[int, ...]:
    """Returns the shape of a variable or literal of a jaxpr."""
    return tuple(atom.aval.shape)


def dtype_of(atom) -> Any:
    """Returns the dtype of a variable or literal of a jaxpr."""
    return atom.aval.dtype


def joined(all_axes: Sequence[Axes], rank: int) -> Axes:
    """Returns the labels of what an elementwise function of arrays gives, scalars left out."""
    full = [axes for axes in all_axes if len(axes) == rank]
    if len(full) == 1 or (len(full) == 2 and full[0] == full[1]):
        return full[0]
    return tuple(map(union, zip(*full, strict=True))) if full else (NO_LABELS,) * rank


def union(sets: Iterable[Labels]) -> Labels:
    """Returns the union of sets; where all that are not empty are equal, one of them as it is."""
    different = {one for one in sets if one}
    return different.pop() if len(different) == 1 else NO_LABELS.union(*different)


def reshaped(axes: Axes, shape: tuple[int, ...], result: tuple[int, ...]) -> Axes:
    """Returns the labels after a reshape: an axis has those of the axes that it runs over."""
    if shape == result:
        return axes
    return tuple(union(axes[axis] for axis in places) for places in _run_over(shape, result))


@functools.lru_cache(maxsize=4096)
def _run_over(shape: tuple[int, ...], result: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Over which axes of an array every axis of its reshaped entries runs."""

    def spans(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        return [(stride, stride * size) for stride, size in zip(strides, sizes, strict=True)]

    before = spans(shape)
    return tuple(
        tuple(axis for axis, (low, high) in enumerate(before) if max(low, start) < min(high, stop))
        for start, stop in spans(result)
    )


def moved(equation: core.JaxprEqn, axes: Axes) -> Axes:
    """Returns the labels of the first result of an operation that reshuffles its first operand.

    Operations that keep all axes in place, and those that are not named here, keep their labels
    where the rank stays; reductions drop axes.
    """
    name, parameters = equation.primitive.name, equation.params
    shape, result = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    if name == "transpose":
        return tuple(axes[axis] for axis in parameters["permutation"])
    if name == "broadcast_in_dim":
        found: list[Labels] = [NO_LABELS] * len(result)
        for axis, target in enumerate(parameters["broadcast_dimensions"]):
            if shape[axis] == result[target]:
                found[target] = axes[axis]
        return tuple(found)
    if name in ("reshape", "squeeze", "expand_dims"):
        return reshaped(axes, shape, result)
    if name == "tile":
        return tuple(
            labels if repeats == 1 else NO_LABELS if size == 1 else labels
            for labels, repeats, size in zip(axes, parameters["reps"], shape, strict=True)
        )
    if "axes" in parameters and len(result) == len(shape) - len(parameters["axes"]):
        return tuple(labels for axis, labels in enumerate(axes) if axis not in parameters["axes"])
    return axes if len(result) == len(axes) else (NO_LABELS,) * len(result)


def dot_axes(equation: core.JaxprEqn, left: Axes, right: Axes) -> Axes:
    """Returns the labels of a product: batch axes, then those of the left and of the right."""
    (contracted, batch) = equation.params["dimension_numbers"]
    shared = tuple(left[a] | right[b] for a, b in zip(*batch, strict=True))
    return (
        *shared,
        *(left[axis] for axis in free_axes(len(left), contracted[0], batch[0])),
        *(right[axis] for axis in free_axes(len(right), contracted[1], batch[1])),
    )


def free_axes(rank: int, *taken: Sequence[int]) -> list[int]:
    """Returns the axes that are neither contracted nor shared."""
    return [axis for axis in range(rank) if all(axis not in some for some in taken)]


def gathered(equation: core.JaxprEqn, table: Axes, index: Axes) -> Axes:
    """Returns the labels of what is gathered: axes of the table, and those of the indices."""
    numbers = equation.params["dimension_numbers"]
    rank = len(shape_of(equation.outvars[0]))
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    kept = [
        axis
        for axis in range(len(table))
        if axis not in numbers.collapsed_slice_dims and axis not in batching
    ]
    positions = list(index[:-1])
    found: list[Labels] = []
    for axis in range(rank):
        if axis in numbers.offset_dims:
            found.append(table[kept.pop(0)] if kept else NO_LABELS)
        else:
            found.append(positions.pop(0) if positions else NO_LABELS)
    return tuple(found)
