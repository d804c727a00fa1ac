"""How a leaf grows, and what an optimizer keeps of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Axis(NamedTuple):
    """An axis of a leaf that grows.

    Attributes:
      axis: its place.
      sources: for every large entry, the small one from which it comes.
      share: the part of that one's value which it gets, where layers sum over the axis; else 1.
      copies: how many large entries share a gradient.
      new: which large entries hold new values, and which get none of the old weights.
      noisy: whether weights of copies may differ as long as their sum stays.
    """

    axis: int
    sources: Int[np.ndarray, " m"]
    share: Float[np.ndarray, " m"]
    copies: Float[np.ndarray, " m"]
    new: Bool[np.ndarray, " m"]
    noisy: bool = False


@dataclasses.dataclass(frozen=True)
class LeafGrowth:
    """How a leaf grows.

    Attributes:
      source: name of the leaf of the small network.
      axes: those that grow.
      factor: what its values are multiplied by beside.
      blocks: whether it belongs to a new block of the network; of a stack, a vector along its
        axis in the shape of the leaf.
      end: whether it is what makes a residual branch 0 where it is 0.
      fresh: whether new blocks hold new values; else copies.
    """

    source: str
    axes: tuple[Axis, ...] = ()
    factor: float = 1.0
    blocks: Bool[np.ndarray, "..."] = dataclasses.field(default_factory=lambda: np.zeros((), bool))
    end: bool = False
    fresh: bool = False

    @property
    def needs_values(self) -> bool:
        """Whether it takes values that are no copies."""
        blocks = self.fresh and not self.end and bool(self.blocks.any())
        return blocks or any(_is_written_anew(one) for one in self.axes)


def along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Returns a vector in the shape of an array of this rank, along an axis of it."""
    return values.reshape([-1 if place == axis else 1 for place in range(rank)])


def grown_leaf(leaf: Array, like: Array, growth: LeafGrowth, key: Any, noise: float) -> Array:
    """Returns the values of a leaf of the large network. Works on the host, with NumPy.

    Args:
      leaf: of the small one.
      like: new values.
      growth: see `LeafGrowth`.
      key: random key of the noise; may be None where that is 0.
      noise: its size, see `expand`.
    """
    if growth.fresh and growth.blocks.shape == () and growth.blocks:
        found = np.zeros(like.shape) if growth.end else _wide(like)
        return jnp.asarray(found, leaf.dtype)
    old = _wide(leaf)
    found = _copied(old, growth)
    for one in growth.axes:
        found = found * along(one.share, one.axis, found.ndim)
    found = found * growth.factor
    noisy = [one for one in growth.axes if one.noisy]
    if noise and noisy:
        found = found + noise * _noise(old, noisy[0], growth, key)
    for one in growth.axes:
        if _is_written_anew(one):
            found = np.where(along(one.new, one.axis, found.ndim), _wide(like), found)
    if growth.blocks.any() and (growth.end or growth.fresh):
        found = np.where(growth.blocks, 0.0 if growth.end else _wide(like), found)
    return jnp.asarray(found, leaf.dtype)


def grown_moment(moment: Array, shape: tuple[int, ...], growth: LeafGrowth, degree: int) -> Array:
    """Returns what an optimizer keeps of a leaf, if it scales with a power of the gradient.

    With k copies of an entry, each e times its value, the gradient of a copy is that of the entry
    over k·e. First moments of what is new are 0; second moments of a leaf of another shape than its
    source are the mean of that one's.
    """
    found = _copied(_wide(moment), growth)
    if found.shape != shape:
        found = np.full(shape, found.mean())
    scale = np.full(found.shape, growth.factor)
    for one in growth.axes:
        own = np.where(one.new, 1.0, one.copies * one.share)
        scale = scale * along(own, one.axis, found.ndim)
    found = found * scale**-degree
    if degree % 2:
        for one in growth.axes:
            found = np.where(along(one.new, one.axis, found.ndim), 0.0, found)
        found = np.where(growth.blocks, 0.0, found)
    return jnp.asarray(found, moment.dtype)


def _is_written_anew(axis: Axis) -> bool:
    """Whether entries of the axis are those of new features; of one that is read they are 0."""
    return bool(axis.new.any() and np.all(axis.share == 1))


def _wide(leaf: Any) -> np.ndarray:
    """An array of a dtype in which NumPy computes: not bfloat16."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.float64 if leaf.dtype == np.float64 else np.float32)


def _copied(leaf: np.ndarray, growth: LeafGrowth) -> np.ndarray:
    for one in growth.axes:
        leaf = np.take(leaf, one.sources, one.axis)
    return leaf


def _noise(leaf: np.ndarray, axis: Axis, growth: LeafGrowth, key: Any) -> np.ndarray:
    """Normal noise that sums to 0 over copies, of (1/c - 1/c²) times the leaf's mean square."""
    stack = [place for place, size in enumerate(growth.blocks.shape) if size > 1]
    others = tuple(place for place in range(leaf.ndim) if place not in stack)
    size = np.sqrt(np.mean(np.square(leaf), axis=others, keepdims=True))
    size = _copied(np.broadcast_to(size, leaf.shape), growth)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    drawn = np.moveaxis(generator.standard_normal(size.shape), axis.axis, 0)
    sums = np.zeros((axis.sources.max() + 1, *drawn.shape[1:]))
    np.add.at(sums, axis.sources, drawn)
    copies = along(np.bincount(axis.sources)[axis.sources], 0, drawn.ndim)
    centred = (drawn - sums[axis.sources] / copies) / np.sqrt(copies)
    return size * np.moveaxis(centred, 0, axis.axis)
