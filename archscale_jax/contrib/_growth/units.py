"""Which neurons a function has, and which entries of its parameters belong to one of them.

A neuron is one feature of the output of a layer (its column in the weight), with what stands
between that layer and the next: an entry of a bias or scale, and a row in the weights of every
layer that reads it. Layers whose outputs are added have their neurons in common. What belongs
together is found by trial: the function between the layers is evaluated with one feature changed,
and what changes with it is noted; so it does not matter how a model is written.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.tracing.layers import (
    BetweenLayers,
    between_layers,
    layer_kinds,
    layer_outputs,
    parameter_kinds,
)

Loss = Callable[[PyTree, Any], Float[Array, ""]]
Joint = Literal["same", "mean", "flat"]
_STEP = 1e-3  # of a feature, to measure the slope of what follows it at 0
_TOLERANCE = 1e-2  # of the responses to it, relative; in low precision so many units at least:
_UNITS = 16  # means over positions cancel
_SIZES = (1.0, 0.03)  # of features; activations that saturate are flat at the one or the other


class Link(NamedTuple):
    """From a layer that makes neurons to one that reads them.

    Attributes:
      producer: name of the weight that makes them.
      consumer: name of the weight that reads them.
      joint: what happens to their positions: the `same`, their `mean`, or joined into one vector,
        `flat`, features last.
      slope: of what stands between, activations and pools, at 0; of ReLU 1/2, the mean of its two.
    """

    producer: str
    consumer: str
    joint: Joint
    slope: float


class Units(NamedTuple):
    """The neurons that one or more layers make, and where params hold them; hashable.

    Sizes of arrays are not part of it, so it holds for the same network of any width.

    Attributes:
      name: weight of the first layer that makes them.
      producers: weights that hold a neuron in their last axis.
      vectors: leaves with an entry for every neuron, their axis, and the value of a new entry:
        `zero` of biases and offsets, `mean` of the others.
      links: to every layer that reads them; each holds rows of a neuron in its weight's last axis
        but one.
      obstacle: why they cannot grow, or None.
    """

    name: str
    producers: tuple[str, ...]
    vectors: tuple[tuple[str, int, str], ...]
    links: tuple[Link, ...]
    obstacle: str | None

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the weights that read the neurons, each once, in the order of the layers."""
        return tuple(dict.fromkeys(link.consumer for link in self.links))

    @property
    def slope(self) -> float:
        """The largest size of a link's slope."""
        return max(abs(link.slope) for link in self.links)

    def slope_between(self, producer: str, consumer: str) -> float:
        """Returns the slope between two layers, 0 if the one does not reach the other."""
        slopes = {(link.producer, link.consumer): link.slope for link in self.links}
        return slopes.get((producer, consumer), 0.0)

    def joint(self, consumer: str) -> Joint:
        """Returns what happens to positions before a layer reads them."""
        return next(link.joint for link in self.links if link.consumer == consumer)


def find_units(loss_fn: Loss, params: PyTree, batch: Any) -> tuple[Units, ...]:
    """Finds the neurons of a function [TINY], in the order of the layers.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar.
      params: tree of arrays.
      batch: tree of arrays, examples along their first axes; two examples are read.

    Returns:
      Those that cannot grow too, with their obstacle.

    Raises:
      TraceError: see `archscale_jax.tracing.layers.layer_kinds`.
      ValueError: a batch with other things than arrays of examples.
    """
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf) < 1 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"a batch holds {leaf!r}; accepted are arrays with examples along their first "
                "axis. Bind keys and constants to the function"
            )
    batch = jax.tree.map(lambda array: array[:2], batch)
    probe = _Probe(loss_fn, params, batch)
    groups: list[list[str]] = []
    for name in probe.outputs:
        reached = set(probe.reached[name])
        joined = [group for group in groups if any(reached & set(probe.reached[o]) for o in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(one for group in joined for one in group), name])
    order = list(probe.outputs)
    groups = sorted((sorted(group, key=order.index) for group in groups),
                    key=lambda group: order.index(group[0]))  # fmt: skip
    return tuple(_units(probe, group) for group in groups)


class _Probe:
    """The function between the layers, and which features of which layers depend on which others.

    What is added to features, biases and offsets, is taken as 0.

    Attributes:
      order: names of the weights in the order of the layers.
      biases: of the layers that have one, its name.
      outputs: shapes of the outputs of the layers, by the names of weights.
      reached: by producer, the consumers whose inputs depend on it, and which of their features
        depend on its first.
      mixed: producers of whose features others than their own depend.
      observed: producers on which the loss depends without a layer between.
      vectors: by leaf and axis, the consumers that the first entry reaches, as in `reached`.
    """

    def __init__(self, loss_fn: Loss, params: PyTree, batch: Any):
        kinds = layer_kinds(loss_fn, params, batch)
        self.order = [kind.weight for kind in kinds]
        self.biases = {kind.weight: kind.bias for kind in kinds if kind.bias is not None}
        shapes = layer_outputs(loss_fn, params, batch)
        self.outputs = {name: shapes[name] for name in self.order}
        self.leaves = {name: jnp.asarray(leaf) for name, leaf in named_leaves(params).items()}
        self.kinds = parameter_kinds(loss_fn, params, batch)
        for name, leaf in self.leaves.items():
            # What is added could hold an activation where it is flat.
            if self.is_offset(name) and name not in self.outputs:
                self.leaves[name] = jnp.zeros_like(leaf)

        @jax.jit
        def evaluate(outputs: dict[str, Array], leaves: dict[str, Array]) -> BetweenLayers:
            return between_layers(loss_fn, with_leaves(params, leaves), batch, outputs)

        self._evaluate = evaluate
        generator = np.random.default_rng(0)
        self._generator = generator
        self.reached: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in self.order}
        self.mixed: set[str] = set()
        self.observed: set[str] = set()
        self.vectors: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
        for size in _SIZES:
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
            for unit in sorted({0, count - 1}):
                changed = self.base[name].copy()
                changed[..., unit] = self.random(name, size)[..., unit]
                loss, found = self._changes(self.between({name: changed}))
                if loss:
                    self.observed.add(name)
                expected = all(_is_tiled(self._width(one), count, unit, places)
                               for one, places in found.items())  # fmt: skip
                if not expected:
                    self.mixed.add(name)
                if unit == 0:
                    self.reached[name] |= found
        for name, leaf in self.leaves.items():
            if name in self.outputs or not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            for axis in range(leaf.ndim):
                index = (slice(None),) * axis + (0,)
                changed = np.array(leaf)
                changed[index] += np.asarray(0.25, changed.dtype)
                found = self._changes(self.between({}, {name: changed}))[1]
                self.vectors[name, axis] = self.vectors.get((name, axis), {}) | found

    def _width(self, consumer: str) -> int:
        return self._before.inputs[consumer].shape[-1]

    def _changes(self, found: BetweenLayers) -> tuple[bool, dict[str, tuple[int, ...]]]:
        places = {}
        for name, inputs in found.inputs.items():
            differs = inputs != self._before.inputs[name]
            where = np.flatnonzero(differs.reshape(-1, differs.shape[-1]).any(axis=0))
            if len(where):
                places[name] = tuple(where.tolist())
        return bool(found.loss != self._before.loss), places


def _is_tiled(width: int, count: int, unit: int, places: tuple[int, ...]) -> bool:
    return width % count == 0 and places == tuple(range(unit, width, count))


def _units(probe: _Probe, producers: list[str]) -> Units:
    first = producers[0]
    count = probe.outputs[first].shape[-1]
    reached = {one for name in producers for one in probe.reached[name]}
    patterns = {one: places for name in producers for one, places in probe.reached[name].items()}
    biases = {probe.biases[name] for name in producers if name in probe.biases}
    axes = {  # of every leaf the last axis that fits, as all may where there is one neuron
        name: axis
        for (name, axis), found in probe.vectors.items()
        if probe.leaves[name].shape[axis] == count
        and (name in biases or found)
        and all(patterns.get(one) == places for one, places in found.items())
    }
    vectors = tuple(
        (name, axis, "zero" if probe.is_offset(name) else "mean") for name, axis in axes.items()
    )
    units = Units(first, tuple(producers), vectors, (), None)
    make = functools.partial(units._replace)
    if any(name in probe.observed for name in producers):
        return make(obstacle="no layer follows: the result depends on its outputs themselves")
    if not reached:
        return make(obstacle="no layer reads its outputs")
    if any(name in probe.mixed for name in producers):
        return make(
            obstacle="features of a layer that reads it depend on others of its features too: it "
            "is normalized over features, joined to others or split"
        )
    shared = [name for name in biases if name not in axes]
    if shared:
        return make(obstacle=f"its neurons share the bias {shared[0]!r}")
    return _linked(probe, units)


def _linked(probe: _Probe, units: Units) -> Units:
    """Measures what stands between, on the neutral first neuron of a network that is 0 else."""
    neutral = {}
    for name, axis, value in units.vectors:
        leaf = np.asarray(probe.leaves[name])
        index = (slice(None),) * axis + (0,)
        neutral[name] = np.array(neutral.get(name, leaf))
        neutral[name][index] = 0 if value == "zero" else leaf.mean(axis=axis)
    zeros = {name: np.zeros_like(output) for name, output in probe.base.items()}
    rest = probe.between(zeros, neutral).inputs
    links = []
    for producer in units.producers:
        entries = np.random.default_rng(1).normal(size=zeros[producer].shape[:-1])
        # Low precision rounds a step, and the slope is one over the step that was made.
        made = np.asarray(_STEP * entries, zeros[producer].dtype).astype(np.float64) / _STEP
        answers = []
        for size in (_STEP, -_STEP, 1.0, 2.0):
            moved = zeros[producer].copy()
            moved[..., 0] = size * entries
            answers.append(probe.between({**zeros, producer: moved}, neutral).inputs)
        count = zeros[producer].shape[-1]
        for consumer in (one for one in probe.order if one in probe.reached[producer]):
            up, down, once, twice = (answer[consumer][..., ::count] for answer in answers)
            if np.any(rest[consumer][..., ::count] != 0):
                return units._replace(
                    obstacle=f"a neuron that is 0 is not 0 where {consumer!r} reads it: its "
                    "activation is not 0 at 0"
                )
            if np.allclose(once, twice, rtol=1e-3):
                return units._replace(
                    obstacle=f"a normalization stands before {consumer!r}: the size of a new "
                    "neuron would not matter, and it would not begin at 0"
                )
            response = (up.astype(np.float64) - down.astype(np.float64)) / (2 * _STEP)
            tolerance = max(_TOLERANCE, _UNITS * float(jnp.finfo(up.dtype).eps))
            link = _link(response, made, tolerance)
            if link is None:
                return units._replace(
                    obstacle=f"positions are pooled or moved between {producer!r} and {consumer!r}"
                )
            links.append(Link(producer, consumer, *link))
    grids = {probe.outputs[name].shape[:-1] for name in units.producers}
    if len(grids) > 1:
        return units._replace(obstacle="the layers that make it have different positions")
    if not any(link.slope for link in links):
        return units._replace(obstacle="what follows is flat at 0: a small neuron has no effect")
    return units._replace(links=tuple(links))


def _link(
    response: Float[np.ndarray, "..."], entries: Float[np.ndarray, "n *s"], tolerance: float
) -> tuple[Joint, float] | None:
    """How a response [n, …, copies] follows from the entries that caused it, and its slope."""
    choices: dict[Joint, np.ndarray] = {}
    if response.shape[:-1] == entries.shape and response.shape[-1] == 1:
        choices["same"] = entries[..., None]
    elif response.ndim == 2 and response.shape == (len(entries), 1):
        choices["mean"] = entries.reshape(len(entries), -1).mean(axis=1, keepdims=True)
    elif response.shape == (len(entries), entries[0].size):
        choices["flat"] = entries.reshape(len(entries), -1)
    for joint, expected in choices.items():
        slope = np.vdot(response, expected) / np.vdot(expected, expected)
        rest = np.linalg.norm(response - slope * expected)
        if rest <= tolerance * np.linalg.norm(response):
            return joint, float(f"{slope:.4g}")
    return None
