"""Rooms for neurons in the arrays of a network: more of them, which are taken, and without them.

A room is taken if any weight into or out of it is not 0. An empty one changes nothing: its feature
is 0, nothing reads it, and its gradients are 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, map_with_names, named_leaves, with_leaves
from archscale_jax.contrib._growth.units import Units

Pad = Callable[[Any, str], Any]  # of an array, new entries `like` the others, or `zero`


def taken(params: PyTree, units: Units) -> Bool[np.ndarray, " c"]:
    """Returns which rooms hold a neuron."""
    leaves = named_leaves(params)
    count = leaves[units.producers[0]].shape[-1]
    found = np.zeros(count, bool)
    for name in units.producers:
        found |= np.any(np.asarray(leaves[name]).reshape(-1, count) != 0, axis=0)
    for name in units.consumers:
        leaf = np.asarray(leaves[name])
        outputs = leaf.shape[-1]
        found |= np.any(leaf.reshape(-1, count, outputs) != 0, axis=(0, 2))
    return found


def count_neurons(params: PyTree, units: Iterable[Units]) -> dict[str, int]:
    """Returns the neurons that params hold, by the names of units."""
    return {one.name: int(taken(params, one).sum()) for one in units}


def count_parameters(params: PyTree, units: Iterable[Units]) -> int:
    """Returns the number of parameters of the network without its empty rooms."""
    return sum(leaf.size for leaf in jax.tree.leaves(compact_shapes(params, units)))


def widen(
    params: PyTree,
    rooms: Mapping[str, int],
    units: Iterable[Units],
    *,
    optimizer_state: Any = None,
) -> tuple[PyTree, Any]:
    """Makes empty rooms, and keeps all else, the optimizer's moments included; on the host.

    Args:
      params: tree of arrays.
      rooms: how many each of the units shall have, by name.
      units: the neurons.
      optimizer_state: of any optax optimizer that keeps arrays like the parameters, masked or not;
        entries of new rooms are 0.

    Returns:
      params and optimizer_state.

    Raises:
      ValueError: fewer rooms than there are; a name of no units; an optimizer that keeps sums over
        axes, as Adafactor.
    """
    by_name = {one.name: one for one in units}
    leaves = named_leaves(params)
    pads: list[tuple[str, Pad]] = []
    for name, number in rooms.items():
        if name not in by_name:
            raise ValueError(unknown("units", name, by_name))
        one = by_name[name]
        count = leaves[one.producers[0]].shape[-1]
        if number < count:
            raise ValueError(f"units {name!r} have {count} rooms, more than {number}")
        pads += _pads(one, count, number - count)

    def widened(tree: PyTree, fill: str) -> PyTree:
        found = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
        for leaf, pad in pads:
            found[leaf] = pad(found[leaf], fill)
        return with_leaves(tree, {leaf: jnp.asarray(found[leaf]) for leaf, _ in pads})

    new = widened(params, "like")
    return new, _widened_state(optimizer_state, leaves, dict(_joined(pads)))


def _joined(pads: list[tuple[str, Pad]]) -> Iterator[tuple[str, list[Pad]]]:
    for name in dict.fromkeys(name for name, _ in pads):
        yield name, [pad for other, pad in pads if other == name]


def _widened_state(state: Any, leaves: Mapping[str, Any], pads: Mapping[str, list[Pad]]) -> Any:
    """Pads what an optimizer keeps of a leaf: its path in the state ends with the leaf's name."""

    def padded(path: str, value: Any) -> Any:
        names = [name for name in leaves if f"/{path}".endswith(f"/{name}")]
        name = max(names, key=len, default="")
        if name not in pads:
            return value
        if value.shape == (1,) != leaves[name].shape:  # a place that is not used
            return value
        if value.shape != leaves[name].shape:
            raise ValueError(
                f"the optimizer keeps {value.shape} of {name!r}, which has {leaves[name].shape}; "
                "accepted are states with the shapes of the parameters. Begin with a new state"
            )
        value = np.asarray(value)
        for pad in pads[name]:
            value = pad(value, "zero")
        return jnp.asarray(value)

    return map_with_names(padded, state)


def _pads(units: Units, count: int, extra: int) -> list[tuple[str, Pad]]:
    def along(axis: int, value: str) -> Pad:
        def pad(leaf: Any, fill: str) -> Any:
            shape = list(leaf.shape)
            shape[axis] = extra
            mean = value == "mean" and fill == "like"
            entry = np.mean(leaf, axis=axis, keepdims=True) if mean else np.zeros((), leaf.dtype)
            return np.concatenate([leaf, np.broadcast_to(entry, shape)], axis=axis)

        return pad

    def rows(leaf: Any, fill: str) -> Any:
        blocks = leaf.reshape(-1, count, leaf.shape[-1])  # a kernel's entries, or joined positions
        blocks = np.pad(blocks, ((0, 0), (0, extra), (0, 0)))
        copies = leaf.shape[-2] // count
        return blocks.reshape(*leaf.shape[:-2], copies * (count + extra), leaf.shape[-1])

    if not extra:
        return []
    return [
        *((name, along(-1, "zero")) for name in units.producers),
        *((name, along(axis, value)) for name, axis, value in units.vectors),
        *((name, rows) for name in units.consumers),
    ]


def compact(params: PyTree, units: Iterable[Units]) -> PyTree:
    """Returns params without empty rooms, as NumPy arrays: the network to keep.

    It computes the same function, up to the order of sums. Units with an obstacle stay.
    """
    return _without(params, units, np.take)


def compact_shapes(params: PyTree, units: Iterable[Units]) -> PyTree:
    """Returns what `compact` does as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), compact(params, units)
    )


def _without(params: PyTree, units: Iterable[Units], take: Callable[..., Any]) -> PyTree:
    leaves: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    kept: Sequence[tuple[Units, np.ndarray]] = [
        (one, np.flatnonzero(taken(params, one))) for one in units if one.obstacle is None
    ]
    for one, places in kept:
        count = len(taken(params, one))
        for name in one.producers:
            leaves[name] = take(leaves[name], places, axis=-1)
        for name, axis, _ in one.vectors:
            leaves[name] = take(leaves[name], places, axis=axis)
        for name in one.consumers:
            leaf = leaves[name]
            copies = leaf.shape[-2] // count
            every = (np.arange(copies)[:, None] * count + places).ravel()
            leaves[name] = take(leaf, every, axis=-2)
    return with_leaves(params, leaves)
