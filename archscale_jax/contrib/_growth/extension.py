"""A network with rooms and what growth adds to it, by an amplitude that is searched."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.contrib._growth import candidates
from archscale_jax.contrib._growth.measured import Measured
from archscale_jax.contrib._growth.neurons import Neurons
from archscale_jax.contrib._growth.statistics import blocks
from archscale_jax.contrib._growth.units import Units
from archscale_jax.contrib._growth.widen import taken, widen

Loss = Callable[[PyTree, Any], Float[Array, ""]]
AMPLITUDES = (0.0, *(2.0**power for power in range(-5, 8)))
"""What growth chooses from, where nothing else is asked for."""


class Extension(NamedTuple):
    """A network with rooms, and what growth adds to it: three trees alike.

    Attributes:
      params: with rooms; the function is that of before.
      change: the new neurons at amplitude 1.
      move: δW* of the layers that read them, or 0.
    """

    params: PyTree
    change: PyTree
    move: PyTree


def extend(
    params: PyTree,
    units: Sequence[Units],
    neurons: Mapping[str, Neurons],
    measured: Measured,
    *,
    restricted: bool = False,
    update: bool = False,
    rooms: Callable[[int], int] = int,
    optimizer_state: Any = None,
) -> tuple[Extension, Any]:
    """Makes rooms for neurons; returns what they add, and the optimizer's state; see `grow`."""
    needed, free = {}, {}
    for one in units:
        used = taken(params, one)
        total = int(used.sum()) + len(neurons[one.name].singular_values)
        needed[one.name] = len(used) if total <= len(used) else max(rooms(total), total)
        places = np.flatnonzero(~np.pad(used, (0, needed[one.name] - len(used))))
        free[one.name] = places[: len(neurons[one.name].singular_values)]
    wide, state = widen(params, needed, units, optimizer_state=optimizer_state)
    change = jax.tree.map(_zeros, wide)
    for one in units:
        # Of a network in which these units alone are wider, then with the rooms of the others.
        own, _ = widen(params, {one.name: needed[one.name]}, units)
        leaves = named_leaves(own)
        made, read = blocks(one, measured.kinds, params, restricted)
        added = candidates.changes(neurons[one.name], leaves, made, read, free[one.name])
        tree = with_leaves(jax.tree.map(_zeros, own), added)
        others = {name: count for name, count in needed.items() if name != one.name}
        change = jax.tree.map(np.add, change, widen(tree, others, units)[0])
    moves = {}
    if update:
        for name in dict.fromkeys(name for one in units for name in one.consumers):
            moves |= measured.bottlenecks[name].update
    leaves = {
        name: np.asarray(moves.get(name, _zeros(leaf)), leaf.dtype)
        for name, leaf in named_leaves(params).items()
    }
    move, _ = widen(with_leaves(params, leaves), needed, units)
    return Extension(wide, change, move), state


def _zeros(leaf: Any) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)


def extended(extension: Extension, amplitude: float | Float[Array, ""]) -> PyTree:
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
            f"the held-out loss is {before} before growth and {losses} at the amplitudes "
            f"{tuple(amplitudes)}"
        )
    return before, losses


@functools.partial(jax.jit, static_argnames="loss_fn")
def _losses(
    extension: Extension, amplitudes: Float[Array, " a"], batch: Any, *, loss_fn: Loss
) -> Float[Array, " a"]:
    return jax.lax.map(
        lambda amplitude: exact(loss_fn(extended(extension, amplitude), batch)), amplitudes
    )
