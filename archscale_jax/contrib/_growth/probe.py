"""Which features depend on which, found by trial: one is changed, and what changes with it noted.

So it does not matter how a model is written.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.tracing.layers import BetweenLayers, Loss, between_layers, find_layers

SIZES = (1.0, 0.03)
"""Of features; activations that saturate are flat at the one or the other."""


class Probe:
    """The function between the layers, and which features of which layers depend on which others.

    What is added to features, biases and offsets, is taken as 0, and a scale of 0 as 1.

    Attributes:
      others: layers that cannot grow, and why; they are a part of what stands between.
      hiding: scales with entries of 0, as they are.
      biases: of the layers that have one, its name.
      outputs: shapes of the outputs of the layers, by the names of weights, in their order.
      reached: by producer, the consumers whose inputs depend on it, and which of their features
        depend on its first.
      mixed: producers of whose features others than their own depend.
      observed: producers on which the loss depends without a layer between.
      vectors: by leaf and axis, the consumers that the first entry reaches, as in `reached`.
    """

    def __init__(self, loss_fn: Loss, params: PyTree, batch: Any):
        kinds, self.others, shapes, self.kinds = find_layers(loss_fn, params, batch)
        self.biases = {kind.weight: kind.bias for kind in kinds if kind.bias is not None}
        self.outputs = {kind.weight: shapes[kind.weight] for kind in kinds}
        self.leaves = {name: jnp.asarray(leaf) for name, leaf in named_leaves(params).items()}
        for name, leaf in self.leaves.items():
            # What is added could hold an activation where it is flat.
            if self.is_offset(name) and name not in self.outputs:
                self.leaves[name] = jnp.zeros_like(leaf)
        self.hiding = {
            name: leaf
            for name, leaf in self.leaves.items()
            if "scale" in self.kinds.get(name, set()) and np.any(leaf == 0)
        }
        for name, leaf in self.hiding.items():
            self.leaves[name] = jnp.where(leaf == 0, jnp.ones_like(leaf), leaf)

        @jax.jit
        def evaluate(outputs: dict[str, Array], leaves: dict[str, Array]) -> BetweenLayers:
            return between_layers(loss_fn, with_leaves(params, leaves), batch, outputs)

        self._evaluate = evaluate
        self._generator = np.random.default_rng(0)
        self.reached: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in self.outputs}
        self.mixed: set[str] = set()
        self.observed: set[str] = set()
        self.vectors: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
        for size in SIZES:
            self.base = {name: self.random(name, size) for name in self.outputs}
            self._before = self.between(self.base)
            self._find(size)

    def is_offset(self, name: str) -> bool:
        """Whether a leaf is added to features."""
        return bool(self.kinds.get(name, set()) & {"bias", "offset"})

    def random(self, name: str, size: float) -> np.ndarray:
        """Outputs of about so much, positive of one example and negative of the other."""
        shape = self.outputs[name].shape
        entries = size * self._generator.uniform(0.5, 1.5, shape)
        return np.asarray(entries * np.resize([1, -1], (shape[0], *[1] * (len(shape) - 1))),
                          self.outputs[name].dtype)  # fmt: skip

    def between(
        self, outputs: Mapping[str, Any], leaves: Mapping[str, Any] | None = None
    ) -> BetweenLayers:
        """Evaluates, with some outputs and leaves replaced."""
        found = self._evaluate({**self.base, **outputs}, {**self.leaves, **(leaves or {})})
        return jax.tree.map(np.asarray, found)

    def _find(self, size: float) -> None:
        """Adds what is seen with outputs of one size to what was with others."""
        for name, shape in self.outputs.items():
            count = shape.shape[-1]
            for neuron in sorted({0, count - 1}):
                changed = self.base[name].copy()
                changed[..., neuron] = self.random(name, size)[..., neuron]
                loss, found = self._changes(self.between({name: changed}))
                if loss:
                    self.observed.add(name)
                for consumer, places in found.items():
                    width = self._before.inputs[consumer].shape[-1]
                    if width % count or places != tuple(range(neuron, width, count)):
                        self.mixed.add(name)
                if neuron == 0:
                    self.reached[name] |= found
        for name, leaf in self.leaves.items():
            if name in self.outputs or not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            for axis in range(leaf.ndim):
                changed = np.array(leaf)
                changed[first_entries(axis)] += np.asarray(0.25, changed.dtype)
                found = self._changes(self.between({}, {name: changed}))[1]
                self.vectors[name, axis] = self.vectors.get((name, axis), {}) | found

    def _changes(self, found: BetweenLayers) -> tuple[bool, dict[str, tuple[int, ...]]]:
        places = {}
        for name, inputs in found.inputs.items():
            differs = inputs != self._before.inputs[name]
            where = np.flatnonzero(differs.reshape(-1, differs.shape[-1]).any(axis=0))
            if len(where):
                places[name] = tuple(where.tolist())
        return bool(found.loss != self._before.loss), places


def first_entries(axis: int) -> tuple[slice | int, ...]:
    """The index of the first entries along an axis."""
    return (*[slice(None)] * axis, 0)
