"""The architecture of a network with empty slots."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from archscale_jax._architecture import Architecture, Parameter
from archscale_jax._trees import PyTree
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup
from archscale_jax.contrib._growth.widen import occupied
from archscale_jax.tracing import trace
from archscale_jax.tracing.layers import LayerKind, Loss, find_layers

_WHOLE = (1, 1)


def grown_architecture(
    loss_fn: Loss, params: PyTree, batch: Any, groups: Sequence[NeuronGroup]
) -> Architecture:
    """Traces a network that may have empty slots: they count in shapes, not in fans.

    So the learning-rate multipliers of it follow from its neurons, and fit its params.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: tree of arrays.
      batch: tree of arrays or shapes.
      groups: of `find_neuron_groups`.

    Raises:
      TraceError: see `trace`.
    """
    kinds = find_layers(loss_fn, params, batch).kinds
    return without_slots(trace(loss_fn, params, batch), params, groups, kinds)


def without_slots(
    architecture: Architecture,
    params: PyTree,
    groups: Sequence[NeuronGroup],
    kinds: Sequence[LayerKind],
) -> Architecture:
    """Returns the architecture of params with fans of neurons alone; see `grown_architecture`.

    `kinds` are the layers of the network at any width.
    """
    parts: dict[tuple[str, str], tuple[int, int]] = {}  # occupied slots, and all, by leaf and fan
    for group in groups:
        used = occupied(params, group)
        part = max(int(used.sum()), 1), len(used)
        vectors = [name for name, _, _ in group.vectors]
        parts |= {(name, "fan_out"): part for name in (*group.producers, *vectors)}
        parts |= {(name, "fan_in"): part for name in (*group.consumers, *vectors)}
    for kind in kinds:
        if kind.bias is not None:  # has the fans of its weight
            for fan in ("fan_in", "fan_out"):
                parts[kind.bias, fan] = parts.get((kind.weight, fan), _WHOLE)

    def counted(parameter: Parameter) -> Parameter:
        inputs = parts.get((parameter.name, "fan_in"), _WHOLE)
        outputs = parts.get((parameter.name, "fan_out"), _WHOLE)
        return dataclasses.replace(
            parameter,
            fan_in=_part(parameter.fan_in, inputs),
            fan_out=_part(parameter.fan_out, outputs),
            filled=_filled(parameter, inputs, outputs),
        )

    parameters = tuple(counted(parameter) for parameter in architecture.parameters)
    return dataclasses.replace(architecture, parameters=parameters)


def _part(size: int, part: tuple[int, int]) -> int:
    return max(size * part[0] // part[1], 1)


def _filled(
    parameter: Parameter, inputs: tuple[int, int], outputs: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a leaf without empty slots, of parts of what it reads and writes."""
    sizes = list(parameter.shape)
    done: set[int] = set()
    for use in parameter.uses:
        for axes, part in ((use.contracted, inputs), ((*use.output, *use.batch), outputs)):
            for axis in axes:
                if axis not in use.positions and axis not in done and sizes[axis] % part[1] == 0:
                    sizes[axis] = _part(sizes[axis], part)
                    done.add(axis)
                    break
    return tuple(sizes)
