"""Expressivity bottlenecks: changes that a layer is asked for and cannot make [TINY].

Of every layer the inputs B and the steepest descent V of the loss by its output are taken in one
pass, and summed over examples into small matrices as batches come by; no activation is kept.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._errors import unknown
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.neurons import LayerStatistics, least_squares
from archscale_jax.contrib._growth.patches import product, rows_of, sum_over_examples
from archscale_jax.tracing.layers import (
    LayerGradient,
    LayerKind,
    Loss,
    layer_gradients,
    layer_kinds,
)


class Bottleneck(NamedTuple):
    """What one layer cannot express.

    Attributes:
      update: δW*, the best change of its weight and bias, by the names of leaves.
      absolute: Ψ = min over δW of Σ‖V - δW B‖²/n, over n examples and all positions.
      relative: Ψ·n/Σ‖V‖², from 0, where the layer can express the change, to 1.
      rank: directions of its inputs that the examples span.
      explained: <V, δW* B>/n, what γ·δW* lowers the loss by for small γ, over γ.
    """

    update: dict[str, np.ndarray]
    absolute: float
    relative: float
    rank: int
    explained: float


def bottleneck(
    loss_fn: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    cutoff: float = 1e-6,
) -> dict[str, Bottleneck]:
    """Measures the expressivity bottleneck of every layer [TINY] (theory §8).

    One jitted pass a batch, about two training steps long. Normalization, skips and activations
    between the layers are part of the function and so of V; a layer is judged by itself.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar.
      params: tree of arrays.
      batches: trees of arrays [n, ...], n examples; sums are taken over all batches.
      layers: names of weights; None for all. Nothing is computed for others.
      cutoff: eigenvalues of Σ B Bᵀ below this part of the largest count as 0.

    Returns:
      By the names of the weights, in the order of the layers.

    Raises:
      TraceError: see `archscale_jax.tracing.layers.layer_kinds`.
      ValueError: no batch, statistics that are not finite, or a name of no layer.
    """
    kinds: tuple[LayerKind, ...] = ()
    total: dict[str, LayerStatistics] | None = None
    for batch in batches:
        if total is None:
            kinds = _chosen(layer_kinds(loss_fn, params, batch, layers), layers)
        found = layer_statistics(params, batch, loss_fn=loss_fn, kinds=kinds)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches is empty; bottleneck needs at least one")
    return bottlenecks(kinds, total, params, cutoff)


def bottlenecks(
    kinds: Iterable[LayerKind],
    statistics: Mapping[str, LayerStatistics],
    params: PyTree,
    cutoff: float,
) -> dict[str, Bottleneck]:
    """Returns the bottlenecks of layers from their sums, both by the names of weights.

    Raises:
      ValueError: statistics that are not finite.
    """
    leaves = named_leaves(params)
    return {kind.weight: _solved(kind, statistics[kind.weight], leaves, cutoff) for kind in kinds}


def _chosen(kinds: tuple[LayerKind, ...], layers: Sequence[str] | None) -> tuple[LayerKind, ...]:
    names = [kind.weight for kind in kinds]
    for name in layers or ():
        if name not in names:
            raise ValueError(unknown("layer in layers", name, names))
    return tuple(kind for kind in kinds if layers is None or kind.weight in layers)


def _solved(
    kind: LayerKind, statistics: LayerStatistics, leaves: dict[str, Any], cutoff: float
) -> Bottleneck:
    solution = least_squares(statistics, cutoff=cutoff)
    shape = leaves[kind.weight].shape
    rows = int(np.prod(shape[:-1]))
    update = {kind.weight: solution.update[:rows].reshape(shape)}
    if kind.bias is not None:
        update[kind.bias] = solution.update[rows].reshape(leaves[kind.bias].shape)
    return Bottleneck(update, *solution[1:])


@functools.partial(jax.jit, static_argnames=("loss_fn", "kinds"))
def layer_statistics(
    params: PyTree, batch: Any, *, loss_fn: Loss, kinds: tuple[LayerKind, ...]
) -> dict[str, LayerStatistics]:
    """Returns the sums of one batch by the names of weights."""
    names = [kind.weight for kind in kinds]
    return layer_sums(layer_gradients(loss_fn, params, batch, names)[1])


@jax.jit
def layer_sums(gradients: Mapping[str, LayerGradient]) -> dict[str, LayerStatistics]:
    """Returns the sums of one batch whose arrays are there, by the names of weights."""
    return {name: _sums(*one) for name, one in gradients.items()}


def _sums(kind: LayerKind, inputs: Array, gradient: Array) -> LayerStatistics:
    targets = desired_change(gradient)

    def sums(inputs: Array, targets: Array) -> tuple[Array, Array]:
        rows = rows_of(kind, inputs)
        rows = rows.reshape(-1, rows.shape[-1])
        return product(rows.T, rows), product(rows.T, targets.reshape(-1, targets.shape[-1]))

    of_inputs, of_targets = sum_over_examples(
        sums, (inputs, targets), one_by_one=kind.window is not None
    )
    square = jnp.sum(jnp.square(targets))
    return LayerStatistics(jnp.float32(len(inputs)), of_inputs, of_targets, square)


def desired_change(gradient: Float[Array, "n *s o"]) -> Float[Array, "n *s o"]:
    """V of every example, from the gradient of a loss that is the mean over n examples."""
    return -len(gradient) * exact(gradient)
