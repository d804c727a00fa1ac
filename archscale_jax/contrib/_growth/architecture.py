"""The architecture of a network with empty rooms."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float

from archscale_jax._architecture import Architecture, Parameter
from archscale_jax._trees import PyTree
from archscale_jax.contrib._growth.units import Units
from archscale_jax.contrib._growth.widen import taken
from archscale_jax.tracing import trace
from archscale_jax.tracing.layers import layer_kinds

Loss = Callable[[PyTree, Any], Float[Array, ""]]


def grown_architecture(
    loss_fn: Loss, params: PyTree, batch: Any, units: Sequence[Units]
) -> Architecture:
    """Traces a network that may have empty rooms: they count in shapes, not in fans.

    So learning-rate factors of it follow from its neurons, and fit its params.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: tree of arrays.
      batch: tree of arrays or shapes.
      units: neurons of `find_units`.

    Raises:
      TraceError: see `trace`.
    """
    architecture = trace(loss_fn, params, batch)
    parts: dict[tuple[str, str], tuple[int, int]] = {}
    for one in units:
        used = taken(params, one)
        part = max(int(used.sum()), 1), len(used)
        vectors = [name for name, _, _ in one.vectors]
        parts |= {(name, "fan_out"): part for name in (*one.producers, *vectors)}
        parts |= {(name, "fan_in"): part for name in (*one.consumers, *vectors)}
    for kind in layer_kinds(loss_fn, params, batch):
        if kind.bias is not None:  # has the fans of its weight
            for field in ("fan_in", "fan_out"):
                parts[kind.bias, field] = parts.get((kind.weight, field), (1, 1))

    def counted(parameter: Parameter) -> Parameter:
        found = {}
        for field in ("fan_in", "fan_out"):
            used, every = parts.get((parameter.name, field), (1, 1))
            found[field] = max(getattr(parameter, field) * used // every, 1)
        sides = [parts.get((parameter.name, field), (1, 1)) for field in ("fan_in", "fan_out")]
        return dataclasses.replace(parameter, **found, filled=_filled(parameter, *sides))

    parameters = tuple(counted(one) for one in architecture.parameters)
    return dataclasses.replace(architecture, parameters=parameters)


def _filled(
    parameter: Parameter, inputs: tuple[int, int], outputs: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a leaf without empty rooms, of parts of what it reads and writes."""
    sizes = list(parameter.shape)
    done: set[int] = set()
    for use in parameter.uses:
        for axes, (used, every) in ((use.contracted, inputs), ((*use.output, *use.batch), outputs)):
            for axis in axes:
                if axis not in use.positions and axis not in done and sizes[axis] % every == 0:
                    sizes[axis] = max(sizes[axis] * used // every, 1)
                    done.add(axis)
                    break
    return tuple(sizes)
