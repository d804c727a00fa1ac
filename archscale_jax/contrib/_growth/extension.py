"""A network with slots and what growth adds to it, by an amplitude that is searched."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.contrib._growth.measured import Measured
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup, readers
from archscale_jax.contrib._growth.neurons import Neurons
from archscale_jax.contrib._growth.statistics import Block, blocks, deviations
from archscale_jax.contrib._growth.widen import occupied, widen
from archscale_jax.tracing.layers import LayerKind, Loss

AMPLITUDES = (0.0, *(2.0**power for power in range(-5, 8)))
"""What growth chooses from, where nothing else is asked for."""


class Extension(NamedTuple):
    """A network with slots, and what growth adds to it: three trees alike.

    Attributes:
      params: with slots; the function is that of before. What new neurons read before a batch
        normalization is in place, of unit variance, and their entry in its scale is 0.
      change: the new neurons at amplitude 1; before a batch normalization their entry in its scale.
      move: δW* of the layers that read them, or 0.
    """

    params: PyTree
    change: PyTree
    move: PyTree


def extend(
    params: PyTree,
    groups: Sequence[NeuronGroup],
    neurons: Mapping[str, Neurons],
    measured: Measured,
    *,
    restricted: bool = False,
    update: bool = False,
    capacity: Callable[[int], int] = int,
) -> Extension:
    """Makes slots for neurons, and returns what they add; see `grow`."""
    needed, free = {}, {}
    for group in groups:
        used, number = occupied(params, group), neurons[group.name].number
        total = int(used.sum()) + number
        needed[group.name] = len(used) if total <= len(used) else max(capacity(total), total)
        places = np.flatnonzero(~np.pad(used, (0, needed[group.name] - len(used))))
        free[group.name] = places[:number]
    wide, _ = widen(params, needed, groups)
    change = jax.tree.map(_zeros, wide)
    for group in groups:
        # Of a network in which this group alone is wider, then with the slots of the others.
        own, _ = widen(params, {group.name: needed[group.name]}, groups)
        made, read = blocks(group, measured.kinds, params, restricted)
        leaves, new, slots = named_leaves(own), neurons[group.name], free[group.name]
        placed: dict[str, np.ndarray] = {}
        if group.gates:
            new, like = _of_gates(new, measured.gates[group.name])
            placed = _copies(group, measured.kinds, leaves, like, slots)
        added = _changes(new, leaves, made, read, slots)
        sizes = deviations(group, made, measured.pairs[group.name], new.fan_in)
        placed |= _behind_norms(group, sizes, leaves, added, slots)
        empty = jax.tree.map(_zeros, own)
        others = {name: count for name, count in needed.items() if name != group.name}
        change, wide = (
            jax.tree.map(np.add, total, widen(with_leaves(empty, one), others, groups)[0])
            for total, one in ((change, added), (wide, placed))
        )
    move = jax.tree.map(_zeros, params)
    if update:
        updates = [measured.bottlenecks[name].update for name in readers(groups)]
        dtypes = {name: leaf.dtype for name, leaf in named_leaves(params).items()}
        move = with_leaves(
            move,
            {name: np.asarray(leaf, dtypes[name]) for one in updates for name, leaf in one.items()},
        )
    return Extension(wide, change, widen(move, needed, groups)[0])


def _zeros(leaf: Any) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)


def _changes(
    neurons: Neurons,
    leaves: Mapping[str, Any],
    made: list[Block],
    read: list[Block],
    slots: Int[np.ndarray, " k"],
) -> dict[str, np.ndarray]:
    """Returns what K neurons of amplitude 1, put in slots, add to leaves, by name; 0 elsewhere."""
    capacity = leaves[made[0].weight].shape[-1]
    found: dict[str, np.ndarray] = {}
    parts = np.split(neurons.fan_in, np.cumsum([block.size for block in made])[:-1])
    for block, rows in zip(made, parts, strict=True):
        weight = np.zeros(leaves[block.weight].shape)
        if block.bias is not None:
            found[block.bias] = np.zeros(leaves[block.bias].shape)
            found[block.bias][..., slots] = rows[-1]
            rows = rows[:-1]
        kernel = weight.shape[:-2]  # a layer that reads what it makes has slots on both sides
        inputs = len(rows) // math.prod(kernel)
        weight[..., :inputs, slots] = rows.reshape(*kernel, inputs, len(slots))
        found[block.weight] = weight
    parts = np.split(neurons.fan_out, np.cumsum([block.size for block in read])[:-1], axis=1)
    for block, columns in zip(read, parts, strict=True):
        shape = leaves[block.weight].shape
        weight = np.zeros((math.prod(shape[:-1]) // capacity, capacity, shape[-1]))
        outputs = block.size // len(block.entries)
        new = columns.reshape(len(slots), len(block.entries), outputs)
        weight[np.asarray(block.entries)[:, None], slots, :outputs] = new.swapaxes(0, 1)
        found[block.weight] = found.get(block.weight, 0) + weight.reshape(shape)
    return {name: value.astype(leaves[name].dtype) for name, value in found.items()}


def _of_gates(
    neurons: Neurons, gates: Int[np.ndarray, " g"]
) -> tuple[Neurons, Int[np.ndarray, " k"]]:
    """Returns gated neurons with the fan-ins of one gate, and the neurons that are gated alike."""
    rows = len(neurons.fan_in) // len(gates)
    by_gate = neurons.fan_in.reshape(len(gates), rows, neurons.number)
    chosen = np.argmax(np.any(by_gate != 0, axis=1), axis=0)
    return neurons._replace(fan_in=by_gate.sum(axis=0)), gates[chosen]


def _copies(
    group: NeuronGroup,
    kinds: tuple[LayerKind, ...],
    leaves: Mapping[str, Any],
    like: Int[np.ndarray, " k"],
    slots: Int[np.ndarray, " k"],
) -> dict[str, np.ndarray]:
    """Returns what makes K neurons gated, and scaled, as others are; see `_behind_norms`."""
    own = {kind.bias for kind in kinds if kind.weight in group.makers}
    copied = [(name, leaves[name].ndim - 1) for name in group.gates]
    copied += [(name, axis) for name, axis, _ in group.vectors if name not in own]
    placed = {}
    for name, axis in copied:
        leaf = np.asarray(leaves[name])
        index = [slice(None)] * axis
        placed[name] = np.zeros_like(leaf)
        placed[name][*index, slots] = leaf[*index, like] - leaf[*index, slots]
    return placed


def _behind_norms(
    group: NeuronGroup,
    sizes: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
    added: dict[str, np.ndarray],
    slots: Int[np.ndarray, " k"],
) -> dict[str, np.ndarray]:
    """Moves the sizes of neurons from fan-ins to the scales of normalizations behind them.

    Args:
      group: of the neurons.
      sizes: before the normalizations, by the weights behind which they stand.
      leaves: with slots.
      added: of `_changes`; fan-ins are taken out of it, and entries of scales put in.
      slots: of the neurons.

    Returns:
      What is to be added at every amplitude: fan-ins of unit variance, and what makes scales 0.
    """
    placed: dict[str, np.ndarray] = {}
    for name, size in sizes.items():
        # A layer that reads what it makes has fan-outs, which are no part of fan-ins, too.
        placed[name] = np.zeros_like(added[name])
        unit = added[name][..., slots] / np.where(size > 0, size, 1.0)
        placed[name][..., slots] = unit.astype(added[name].dtype)
        added[name][..., slots] = 0
        for scale, axis in group.scales(name):
            leaf = np.asarray(leaves[scale])
            entries = *[slice(None)] * axis, slots
            placed[scale], added[scale] = np.zeros_like(leaf), np.zeros_like(leaf)
            placed[scale][entries] = -leaf[entries]
            added[scale][entries] = size.reshape(-1, *[1] * (leaf.ndim - axis - 1))
    return placed


def extended(extension: Extension, amplitude: float | np.float32 | Float[Array, ""]) -> PyTree:
    """Returns params + γ·neurons + γ²·δW*; bit for bit the unchanged ones at γ = 0."""
    return jax.tree.map(
        lambda old, new, move: (old + amplitude * new + amplitude**2 * move).astype(old.dtype),
        *extension,
    )


def search_amplitude(
    extension: Extension, amplitudes: Sequence[float], held_out: Any, *, loss_fn: Loss
) -> tuple[float, list[float]]:
    """Returns the held-out loss before growth, and at every amplitude.

    Raises:
      ValueError: it is not finite before growth, or at no amplitude.
    """
    every = jnp.asarray((0.0, *amplitudes), jnp.float32)
    before, *losses = np.asarray(_losses(extension, every, held_out, loss_fn=loss_fn)).tolist()
    if not math.isfinite(before) or not np.any(np.isfinite(losses)):
        raise ValueError(
            f"the loss on held_out is {before} before growth and {losses} at the amplitudes "
            f"{tuple(amplitudes)}; it must be finite before growth and at one amplitude at least"
        )
    return before, losses


@functools.partial(jax.jit, static_argnames="loss_fn")
def _losses(
    extension: Extension, amplitudes: Float[Array, " a"], batch: Any, *, loss_fn: Loss
) -> Float[Array, " a"]:
    return jax.lax.map(
        lambda amplitude: exact(loss_fn(extended(extension, amplitude), batch)), amplitudes
    )
