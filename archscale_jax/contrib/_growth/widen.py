"""Capacity for neurons in the arrays of a network: more of it, what is occupied, and no more.

The capacity of a group is the number of its slots, places for a neuron in all its arrays. A slot is
occupied if any weight into or out of it is not 0. An empty one changes nothing: its feature is 0,
nothing reads it, and its gradients are 0.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, map_with_names, named_leaves, with_leaves
from archscale_jax.contrib._growth.leaf_growth import Axis, LeafGrowth
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup

Pad = Callable[[np.ndarray, bool], np.ndarray]
"""Of an array, and whether new entries are like the others (or 0)."""


def occupied(params: PyTree, group: NeuronGroup) -> Bool[np.ndarray, " c"]:
    """Returns which of C slots hold a neuron."""
    leaves = named_leaves(params)
    count = group.capacity(leaves)
    found = np.zeros(count, bool)
    for name in group.producers:
        found |= np.any(np.asarray(leaves[name]).reshape(-1, count) != 0, axis=0)
    for name in group.consumers:
        leaf = np.asarray(leaves[name])
        found |= np.any(leaf.reshape(-1, count, leaf.shape[-1]) != 0, axis=(0, 2))
    return found


def count_neurons(params: PyTree, groups: Iterable[NeuronGroup]) -> dict[str, int]:
    """Returns the neurons that params hold, by the names of groups; empty slots do not count."""
    return {group.name: int(occupied(params, group).sum()) for group in groups}


def count_parameters(params: PyTree, groups: Iterable[NeuronGroup]) -> int:
    """Returns the number of parameters of the network without its empty slots."""
    return sum(leaf.size for leaf in jax.tree.leaves(compact(params, groups)))


def widen(
    params: PyTree,
    capacity: Mapping[str, int],
    groups: Iterable[NeuronGroup],
    *,
    optimizer_state: Any = None,
) -> tuple[PyTree, Any]:
    """Adds empty slots, and keeps all else, the optimizer's moments included (theory §8).

    Works on the host, with NumPy.

    Args:
      params: tree of arrays.
      capacity: how many slots each group shall have, by its name; others keep theirs.
      groups: of `find_neuron_groups`.
      optimizer_state: of any optax optimizer that keeps arrays like the parameters, masked or not;
        entries of new slots are 0.

    Returns:
      params and optimizer_state.

    Raises:
      ValueError: less capacity than there is; a name of no group; an optimizer that keeps sums over
        axes, as Adafactor.
    """
    by_name = {group.name: group for group in groups}
    leaves = named_leaves(params)
    pads: dict[str, list[Pad]] = collections.defaultdict(list)
    for name, number in capacity.items():
        if name not in by_name:
            raise ValueError(unknown("neuron group in capacity", name, by_name))
        count = by_name[name].capacity(leaves)
        if number < count:
            raise ValueError(
                f"capacity of {name!r} is {count}, found {number}; accepted is the same or more: "
                "compact removes empty slots"
            )
        for leaf, axis, value in _axes(by_name[name]) if number > count else ():
            pads[leaf].append(_pad(axis, count, number - count, value == "mean"))

    def padded(name: str, leaf: Any, like: bool) -> Any:
        leaf = np.asarray(leaf)
        for pad in pads[name]:
            leaf = pad(leaf, like)
        return leaf

    def padded_state(path: str, value: Any) -> Any:
        """Pads what an optimizer keeps of a leaf: its path in the state ends with its name."""
        names = [name for name in leaves if f"/{path}".endswith(f"/{name}")]
        name = max(names, key=len, default="")
        if name not in pads or value.shape == (1,) != leaves[name].shape:  # (1,): it is not used
            return value
        if value.shape != leaves[name].shape:
            raise ValueError(
                f"optimizer_state holds {value.shape} for {name!r}, which has "
                f"{leaves[name].shape}; accepted are states with the shapes of the parameters: "
                "begin with a new state"
            )
        return jnp.asarray(padded(name, value, False))

    wide = {name: padded(name, leaves[name], True) for name in pads}
    return with_leaves(params, jax.device_put(wide)), map_with_names(padded_state, optimizer_state)


def _axes(group: NeuronGroup) -> Iterator[tuple[str, int, str]]:
    """The leaves that hold a neuron, their axes, and the values of new entries: `zero` or `mean`.

    The axis of a layer that reads joined positions has every neuron several times.
    """
    yield from ((name, -1, "zero") for name in group.producers)
    yield from group.vectors
    yield from ((name, -2, "zero") for name in group.consumers)


def _pad(axis: int, count: int, extra: int, mean: bool) -> Pad:
    def pad(leaf: np.ndarray, like: bool) -> np.ndarray:
        place = axis % leaf.ndim
        before, after = leaf.shape[:place], leaf.shape[place + 1 :]
        blocks = leaf.reshape(*before, -1, count, *after)
        zero = np.zeros((), leaf.dtype)
        entry = blocks.mean(axis=place + 1, keepdims=True) if mean and like else zero
        new = np.broadcast_to(entry, (*blocks.shape[: place + 1], extra, *after))
        return np.concatenate([blocks, new], axis=place + 1).reshape(*before, -1, *after)

    return pad


def slot_growths(
    params: PyTree, grown: PyTree, groups: Iterable[NeuronGroup]
) -> dict[str, LeafGrowth]:
    """Returns how leaves have grown by neurons in slots; the moments of new ones are of others.

    Args:
      params: before.
      grown: the same with more neurons.
      groups: of `find_neuron_groups`.
    """
    small, large = named_leaves(params), named_leaves(grown)
    axes: dict[str, list[Axis]] = {name: [] for name in small}
    for group in groups:
        used = occupied(params, group)
        slots = np.pad(used, (0, group.capacity(large) - len(used)))
        new = occupied(grown, group) & ~slots
        new[len(used) :] = True
        sources = np.arange(len(slots))
        there = np.flatnonzero(used) if used.any() else np.arange(len(used))
        sources[new] = np.resize(there, int(new.sum()))
        for name, place, _ in _axes(group) if new.any() else ():
            axis = place % small[name].ndim
            # Joined positions hold the neurons several times.
            blocks = len(used) * np.arange(small[name].shape[axis] // len(used))
            entries = (blocks[:, None] + sources).ravel()
            ones = np.ones(len(entries))
            axes[name].append(Axis(axis, entries, ones, ones, np.resize(new, len(entries))))
    return {name: LeafGrowth(name, tuple(found)) for name, found in axes.items()}


def compact(params: PyTree, groups: Iterable[NeuronGroup]) -> PyTree:
    """Returns params without empty slots, as NumPy arrays: the network to keep.

    It computes the same function, up to the order of sums (theory §8). Groups with a blocker keep
    their slots.

    Args:
      params: tree of arrays.
      groups: of `find_neuron_groups`, for params of any capacity.
    """
    leaves: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    for group in groups:
        if group.blocker is None:
            used = occupied(params, group)
            for name, axis, _ in _axes(group):
                kept = np.resize(used, leaves[name].shape[axis])
                leaves[name] = np.compress(kept, leaves[name], axis=axis)
    return with_leaves(params, leaves)
