"""Which layers give numbers that scale whole groups of features: routers, gates of heads."""

from collections.abc import Sequence

from archscale_jax.tracing.state import Call, State
from archscale_jax.tracing.values import Labels

Pairs = Sequence[tuple[int, int]]
"""Axes of two features that meet in a product."""


def note_gates(state: State, call: Call, product: int, kept: Pairs, summed: Pairs) -> None:
    """Notes which of two features that are multiplied are gates of groups of the other's.

    A gate is what a layer gives, alone or behind a softmax, whose axes of features all meet axes of
    the other's features, while the others are left: one number for each expert, for each head.
    Queries and keys are summed over the axis in which they meet, and keys that several heads share
    look like a gate there. So a sum counts only over outputs of matrices of their own, as experts
    are, along which the axis of a leaf runs.

    Args:
      state: where they are noted.
      call: of two features.
      product: the vertex of the product.
      kept: the axes of the first and second that meet and are axes of the product.
      summed: those that are summed over.
    """
    left, right = zip(call.features, call.shapes, strict=True)
    for (gate, sizes), (other, _), flip in ((left, right, False), (right, left, True)):
        if not any(state.uses[one].kind == "weight" for one in state.layers.get(gate.vertex, ())):
            continue
        met = {(b if flip else a): (a if flip else b) for a, b in (*kept, *summed)}
        own = {axis for axis, labels in enumerate(gate.axes) if state.has_units(labels)}
        own = {axis for axis in own if sizes[axis] > 1}
        groups = {
            axis
            for axis, labels in enumerate(other.axes)
            if state.has_units(labels) or _has_matrices(labels)
        }
        over = {(a if flip else b) for a, b in summed} & groups
        apart = all(_has_matrices(other.axes[axis]) for axis in over)
        meets = all(met.get(axis) in groups for axis in own)
        if apart and meets and groups - over - {met[axis] for axis in own}:
            state.gates.add((gate.vertex, product))


def _has_matrices(labels: Labels) -> bool:
    """Whether an axis of a leaf runs along an axis of features, with a matrix for every entry."""
    return any(isinstance(one, tuple) for one in labels)
