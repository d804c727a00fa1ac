"""Floating-point operations of training and of growing, counted from the shapes of layers.

A multiply-add is two. Training costs three forward passes. What is no layer, such as elementwise
operations and the products of attention, is not counted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib import NeuronGroup
from archscale_jax.contrib._growth.statistics import blocks
from archscale_jax.tracing.layers import layer_kinds, layer_outputs

Loss = Callable[[PyTree, Any], jax.Array]


def forward_flops(loss_fn: Loss, params: PyTree, example: Any) -> float:
    """Returns the operations of one example's forward pass, empty slots included.

    Args:
      loss_fn: of params and a batch.
      params: tree of arrays.
      example: a batch of one.
    """
    leaves = named_leaves(params)
    outputs = layer_outputs(loss_fn, params, example)
    return sum(
        2.0 * output.size * _inputs(leaves[name].shape, output.shape)
        for name, output in outputs.items()
    )


def _inputs(weight: tuple[int, ...], output: tuple[int, ...]) -> int:
    """How many inputs one unit of a layer reads; units of heads have two axes in both shapes."""
    shared = 2 if len(weight) == 3 and weight[-2:] == output[-2:] else 1
    return math.prod(weight[:-shared])


def bottleneck_flops(
    loss_fn: Loss, params: PyTree, batch: Any, layers: Sequence[str] | None
) -> float:
    """Returns the operations of `bottleneck` on a batch: gradients, sums, eigendecompositions."""
    leaves, count = named_leaves(params), len(jax.tree.leaves(batch)[0])
    example = jax.tree.map(lambda array: array[:1], batch)
    outputs = layer_outputs(loss_fn, params, example)
    total = 3 * forward_flops(loss_fn, params, example) * count
    for kind in layer_kinds(loss_fn, params, example, layers):
        if layers is None or kind.weight in layers:
            *kernel, outs = leaves[kind.weight].shape
            rows = math.prod(kernel) + (kind.bias is not None)
            positions = math.prod(outputs[kind.weight].shape[:-1])
            total += 2 * count * positions * (rows * rows + rows * outs) + 9 * rows**3
    return total


def growth_flops(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    groups: Sequence[NeuronGroup],
    amplitudes: int,
    held_out: int,
) -> float:
    """Returns the operations of `grow` by TINY: statistics, eigen and singular values, search.

    Of one batch, which is read once.

    Args:
      loss_fn: of params and a batch.
      params: tree of arrays.
      batch: on which the statistics are taken.
      groups: that grow.
      amplitudes: how many are tried.
      held_out: on how many examples.
    """
    leaves, count = named_leaves(params), len(jax.tree.leaves(batch)[0])
    example = jax.tree.map(lambda array: array[:1], batch)
    outputs = layer_outputs(loss_fn, params, example)
    readers = [name for one in groups for name in one.consumers]
    makers = [name for one in groups for name in one.makers]
    kinds = layer_kinds(loss_fn, params, example, [*makers, *readers])
    forward = forward_flops(loss_fn, params, example)
    total = bottleneck_flops(loss_fn, params, batch, readers)
    total += forward * amplitudes * held_out
    for one in groups:
        made, read = blocks(one, kinds, params)
        rows, columns = (sum(block.size for block in part) for part in (made, read))
        total += 2 * count * math.prod(outputs[one.producers[0]].shape[:-1]) * rows * rows
        for name, block in zip(one.consumers, read, strict=True):
            positions = math.prod(outputs[name].shape[:-1])
            fan_in = math.prod(leaves[name].shape[:-1])
            outs = leaves[name].shape[-1]
            total += 2 * count * positions * (2 * rows * block.size + fan_in * outs)
        small, large = sorted((rows, columns))
        total += 9 * rows**3 + 4 * large**2 * small + 22 * small**3
    return total
