"""Sums over examples for pairs of layers, from which neurons between them follow (theory §8)."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.bottleneck import desired_change
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup
from archscale_jax.contrib._growth.patches import EXACT, product, rows_of, slices, sum_over_examples
from archscale_jax.tracing import trace
from archscale_jax.tracing.layers import (
    LayerGradient,
    LayerKind,
    Loss,
    layer_gradients,
    layer_response,
)


class PairStatistics(NamedTuple):
    """Sums over n examples and positions, for neurons with A inputs and O outputs.

    The inputs of all layers that make a neuron are stacked, a 1 for every bias included, those of a
    gated one times each of the gates that a new neuron may have, by gates, and so
    are the outputs of all that read it, those of a convolution by rows and columns of its kernel.

    Attributes:
      examples: n.
      positions: rows of B⁻ in all, examples times positions.
      before: Σ B⁻ B⁻ᵀ, [A, A]; where a batch normalization stands behind the layer, of B⁻ less
        its mean over the batch.
      targets: Σ B⁻ Vᵀ, [A, O].
      projected: Σ B⁻ V_projᵀ, [A, O].
    """

    examples: Float[Array, ""]
    positions: Float[Array, ""]
    before: Float[Array, "a a"]
    targets: Float[Array, "a o"]
    projected: Float[Array, "a o"]


class Block(NamedTuple):
    """The part of a layer in `PairStatistics`.

    Attributes:
      weight: name of the layer's weight.
      bias: name of its bias or None.
      entries: which of its entries along all axes but those of inputs and outputs it writes through
        (positions of a kernel, or joined positions); all of one that makes neurons.
      size: its rows along A, or columns along O.
    """

    weight: str
    bias: str | None
    entries: tuple[int, ...]
    size: int


class BatchArrays(NamedTuple):
    """What is summed of a batch of n examples.

    Attributes:
      gradients: of the layers of groups, by the names of weights.
      factors: what gates multiply neurons by, [n, …, gates], by the names of gated groups.
    """

    gradients: dict[str, LayerGradient]
    factors: dict[str, Array]


@functools.partial(jax.jit, static_argnames=("loss_fn", "groups"))
def batch_arrays(
    params: PyTree,
    batch: Any,
    gates: Mapping[str, Int[Array, " g"]],
    *,
    loss_fn: Loss,
    groups: tuple[NeuronGroup, ...],
) -> BatchArrays:
    """Runs the loss and its gradient once; `groups` have no blockers, see `grow`.

    `gates` are the neurons, by the names of gated groups, whose gates new ones may have.

    Raises:
      TraceError: what `trace` raises; one of the layers is none of `Layers.kinds`.
    """
    trace(loss_fn, params, batch)  # what grow would raise in the end; while it is compiled
    names = {name for group in groups for name in (*group.producers, *group.consumers)}
    _, gradients = layer_gradients(loss_fn, params, batch, names)

    def factors(group: NeuronGroup) -> Array:
        response = layer_response(loss_fn, params, batch, *group.links[0][:2])
        return exact(response[..., gates[group.name]])

    return BatchArrays(gradients, {one.name: factors(one) for one in groups if one.gates})


@functools.partial(jax.jit, static_argnames=("groups", "restricted"))
def pair_statistics(
    arrays: BatchArrays,
    updates: Mapping[str, Float[Array, "r o"]],
    *,
    groups: tuple[NeuronGroup, ...],
    restricted: bool,
) -> dict[str, PairStatistics]:
    """Returns the sums of one batch by the names of groups.

    `updates` are δW* of the layers that read the neurons, by the names of weights: what V asks for
    beyond them is summed.
    """
    return {
        one.name: _pair_sums(
            one, arrays.gradients, updates, arrays.factors.get(one.name), restricted
        )
        for one in groups
    }


def _pair_sums(
    group: NeuronGroup,
    gradients: Mapping[str, LayerGradient],
    updates: Mapping[str, Array],
    factors: Float[Array, "n *s g"] | None,
    restricted: bool,
) -> PairStatistics:
    names = group.makers, group.consumers
    kinds = {name: one.kind for name, one in gradients.items()}
    arrays = (
        {name: gradients[name].inputs for name in (*names[0], *names[1])},
        {name: desired_change(gradients[name].outputs) for name in names[1]},
        factors,
    )
    grid = gradients[names[0][0]].outputs.shape[1:-1]
    means = _means(group, kinds, arrays[0])

    def sums(
        inputs: dict[str, Array], targets: dict[str, Array], factors: Array | None
    ) -> tuple[Array, Array, Array]:
        rows = {name: rows_of(kinds[name], inputs[name]) for name in names[0]}
        rows |= {name: rows[name] - mean for name, mean in means.items()}
        if factors is not None:  # of one layer
            by_gate = factors.reshape(len(factors), -1, factors.shape[-1])
            (own,) = rows.values()
            rows = {
                names[0][0]: jnp.einsum("npg,npa->npga", by_gate, own).reshape(*own.shape[:2], -1)
            }
        stacked = jnp.concatenate([rows[name] for name in names[0]], axis=-1)
        wanted, rest = [], []
        for name in names[1]:
            # A layer that does not reach this one has no part in what it reads.
            slopes = [group.slope_between(producer, name) / group.slope for producer in names[0]]
            sizes = [rows[producer].shape[-1] for producer in names[0]]
            read = stacked * np.repeat(slopes, sizes).astype(stacked.dtype)
            target = targets[name].reshape(len(targets[name]), -1, targets[name].shape[-1])
            projected = target - product(rows_of(kinds[name], inputs[name]), updates[name])
            seen = functools.partial(_seen, kinds[name], group.joint(name), read, grid, restricted)
            wanted.append(seen(target))
            rest.append(seen(projected))
        flat = stacked.reshape(-1, stacked.shape[-1])
        return product(flat.T, flat), jnp.concatenate(wanted, axis=1), jnp.concatenate(rest, axis=1)

    convolutional = any(kinds[name].window is not None for name in (*names[0], *names[1]))
    found = sum_over_examples(sums, arrays, one_by_one=convolutional)
    count = len(arrays[0][names[0][0]])
    positions = count * math.prod(grid)
    return PairStatistics(jnp.float32(count), jnp.float32(positions), *found)


def _means(
    group: NeuronGroup, kinds: Mapping[str, LayerKind], inputs: Mapping[str, Array]
) -> dict[str, Float[Array, " r"]]:
    """The means of what the layers read behind which a batch normalization stands, by name."""

    def mean(name: str) -> Array:
        def sums(array: Array) -> tuple[Array, Array]:
            rows = rows_of(kinds[name], array)
            return rows.sum(axis=(0, 1)), jnp.float32(rows.shape[0] * rows.shape[1])

        one_by_one = kinds[name].window is not None
        total, count = sum_over_examples(sums, (inputs[name],), one_by_one=one_by_one)
        return total / count

    return {name: mean(name) for name in group.makers if group.scales(name)}


def _seen(
    kind: LayerKind,
    joint: str,
    rows: Float[Array, "n p a"],
    grid: tuple[int, ...],
    restricted: bool,
    rest: Float[Array, "n q o"],
) -> Float[Array, "a w"]:
    """Σ over examples and positions of what a layer's weight entries see times what they change."""
    einsum = functools.partial(jnp.einsum, precision=EXACT)
    if joint == "mean":
        return einsum("na,nqo->ao", rows.mean(axis=1), rest)
    if joint == "flat":
        return einsum("npa,nqo->apo", rows, rest).reshape(rows.shape[-1], -1)
    if kind.window is None:
        return einsum("npa,npo->ao", rows, rest)
    images = rows.reshape(len(rows), *grid, rows.shape[-1])
    middle = _middle(kind)
    found = [
        einsum("npa,npo->ao", part.reshape(len(rows), -1, rows.shape[-1]), rest)
        for place, part in enumerate(slices(images, kind.window))
        if not restricted or place == middle
    ]
    return jnp.stack(found, axis=1).reshape(rows.shape[-1], -1)


def _middle(kind: LayerKind) -> int:
    """The number of the middle entry of a kernel, by rows and columns."""
    assert kind.window is not None
    rows, columns = kind.window.size
    return (rows // 2) * columns + columns // 2


def blocks(
    group: NeuronGroup, kinds: tuple[LayerKind, ...], params: PyTree, restricted: bool = False
) -> tuple[list[Block], list[Block]]:
    """Returns the layers stacked along A and along O in the `PairStatistics` of a group.

    Of a gated group, along the part of A of one gate.
    """
    by_name = {kind.weight: kind for kind in kinds}
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    capacity = shapes[group.producers[0]][-1]

    def maker(name: str) -> Block:
        *kernel, _ = shapes[name]
        bias = by_name[name].bias
        entries = tuple(range(math.prod(kernel[:-1])))
        return Block(name, bias, entries, math.prod(kernel) + (bias is not None))

    def reader(name: str) -> Block:
        *kernel, inputs, outputs = shapes[name]
        entries = tuple(range(math.prod(kernel) * inputs // capacity))
        if restricted and by_name[name].window is not None:
            entries = (_middle(by_name[name]),)
        return Block(name, None, entries, len(entries) * outputs)

    return [maker(name) for name in group.makers], [reader(name) for name in group.consumers]


def deviations(
    group: NeuronGroup, made: list[Block], pair: PairStatistics, fan_in: Float[np.ndarray, "a k"]
) -> dict[str, Float[np.ndarray, " k"]]:
    """Returns the standard deviations of K neurons before batch normalizations.

    Of what every layer that has one behind it adds to them, by the names of weights.
    """
    found, start = {}, 0
    for block in made:
        own = slice(start, start + block.size)
        start += block.size
        if group.scales(block.weight):
            covariance = np.asarray(pair.before[own, own], np.float64) / float(pair.positions)
            variance = np.einsum("ak,ab,bk->k", fan_in[own], covariance, fan_in[own])
            found[block.weight] = np.sqrt(np.maximum(variance, 0.0))
    return found
