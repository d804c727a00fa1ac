"""Which neurons a function has, and which entries of its parameters belong to one of them.

A neuron is one feature of the output of a layer (its column in the weight), with what stands
between that layer and the next: an entry of a bias or scale, and a row in the weights of every
layer that reads it. Layers whose outputs are added have their neurons in common. What belongs
together is found by trial: the function between the layers is evaluated with one feature changed,
and what changes with it is noted; so it does not matter how a model is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.tracing.layers import BetweenLayers, Loss, between_layers, find_layers

Joint = Literal["same", "mean", "flat"]
WIDEN = "contrib.expand widens it"
_STEP = 1e-3  # of a feature, to measure the slope of what follows it at 0
_TOLERANCE = 1e-2  # of the responses to it, relative; in low precision so many epsilons at least:
_EPSILONS = 16  # means over positions cancel
_EXAMPLES = 3  # two that are standardized are 1 and -1, whatever they were
_SIZES = (1.0, 0.03)  # of features; activations that saturate are flat at the one or the other


class Link(NamedTuple):
    """From a layer that makes neurons to one that reads them.

    Attributes:
      producer: name of the weight that makes them.
      consumer: name of the weight that reads them.
      joint: what happens to their positions: the `same`, their `mean`, or joined into one vector,
        `flat`, features last.
      slope: of what stands between, activations and pools, at 0; of ReLU 1/2, the mean of its two.
      scale: of a batch normalization that stands between, the name of its scale: the size of a
        neuron is its entry there, and that of its fan-in does not matter. None where it does.
    """

    producer: str
    consumer: str
    joint: Joint
    slope: float
    scale: str | None = None


class NeuronGroup(NamedTuple):
    """The neurons that one or more layers make, and where params hold them; hashable.

    Sizes of arrays are not part of it, so it holds for the same network of any width.

    Attributes:
      name: weight of the first layer that makes them.
      producers: weights that hold a neuron in their last axis.
      vectors: leaves with an entry for every neuron, their axis, and the value of a new entry:
        `zero` of biases and offsets, `mean` of the others.
      links: to every layer that reads them; each holds rows of a neuron in its weight's last axis
        but one.
      blocker: why the group cannot grow, or None.
      gates: those of the producers that only make what the outputs of the last are multiplied by. A
        new neuron is gated as one that is there.
    """

    name: str
    producers: tuple[str, ...]
    vectors: tuple[tuple[str, int, str], ...]
    links: tuple[Link, ...]
    blocker: str | None
    gates: tuple[str, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        """The producers that are no gates."""
        return tuple(name for name in self.producers if name not in self.gates)

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the weights that read the neurons, each once, in the order of the layers."""
        return tuple(dict.fromkeys(link.consumer for link in self.links))

    @property
    def slope(self) -> float:
        """The largest size of a link's slope."""
        return max(abs(link.slope) for link in self.links)

    def capacity(self, leaves: Mapping[str, Any]) -> int:
        """Returns the number of slots for neurons in the leaves of a network, by name."""
        return leaves[self.producers[0]].shape[-1]

    def slope_between(self, producer: str, consumer: str) -> float:
        """Returns the slope between two layers, 0 if the one does not reach the other."""
        slopes = {(link.producer, link.consumer): link.slope for link in self.links}
        return slopes.get((producer, consumer), 0.0)

    def scales(self, producer: str) -> tuple[tuple[str, int], ...]:
        """Returns the scales of the normalizations behind a layer, and their axes of neurons."""
        names = {link.scale for link in self.links if link.producer == producer}
        return tuple((name, axis) for name, axis, _ in self.vectors if name in names)

    def joint(self, consumer: str) -> Joint:
        """Returns what happens to positions before a layer reads them."""
        return next(link.joint for link in self.links if link.consumer == consumer)


def readers(groups: Iterable[NeuronGroup]) -> tuple[str, ...]:
    """Returns the names of the weights that read any of the groups, each once."""
    return tuple(dict.fromkeys(name for group in groups for name in group.consumers))


def find_neuron_groups(loss_fn: Loss, params: PyTree, batch: Any) -> tuple[NeuronGroup, ...]:
    """Finds the groups of neurons of a function (theory §8), in the order of the layers.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar.
      params: tree of arrays.
      batch: tree of arrays [n, ...], n examples; three of them are read.

    Returns:
      All groups; those that cannot grow say why in `blocker`. Layers that are neither `x @ W` nor a
      convolution of images [n, rows, columns, inputs] in one group, or share their weights, as
      projections to heads [inputs, heads, features] and layers of a scan, come last.

    Raises:
      TraceError: what `trace` raises.
      ValueError: a batch that holds anything but arrays of examples.
    """
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf) < 1 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"batch holds {leaf!r}; accepted are arrays with examples along their first axis: "
                "bind keys and constants to loss_fn"
            )
    batch = jax.tree.map(lambda array: array[:_EXAMPLES], batch)
    probe = _Probe(loss_fn, params, batch)
    found = [_group(probe, producers) for producers in _summed(probe)]
    others = probe.others.items()
    return (*found, *(NeuronGroup(name, (name,), (), (), reason) for name, reason in others))


def _summed(probe: "_Probe") -> list[list[str]]:
    """The layers that make neurons in common, as they reach a feature in common, in their order."""
    found: list[list[str]] = []
    for name in probe.outputs:
        reached = set(probe.reached[name])
        joined = [names for names in found if any(reached & set(probe.reached[o]) for o in names)]
        found = [names for names in found if names not in joined]
        found.append([*(one for names in joined for one in names), name])
    place = list(probe.outputs).index
    return sorted((sorted(names, key=place) for names in found), key=lambda names: place(names[0]))


class _Probe:
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
                changed[_first(axis)] += np.asarray(0.25, changed.dtype)
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


def _first(axis: int) -> tuple[slice | int, ...]:
    """The index of the first entries along an axis."""
    return (*[slice(None)] * axis, 0)


def _group(probe: _Probe, producers: list[str]) -> NeuronGroup:
    first = producers[0]
    count = probe.outputs[first].shape[-1]
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
    group = NeuronGroup(first, tuple(producers), vectors, (), None)
    if any(name in probe.observed for name in producers):
        follows = "no layer follows" if not probe.others else "no layer that could grow follows"
        return group._replace(blocker=f"{follows}: the result depends on its outputs themselves")
    if not patterns:
        return group._replace(blocker="no layer reads its outputs")
    if any(name in probe.mixed for name in producers):
        return group._replace(
            blocker="features of a layer that reads it depend on others of its features too: "
            f"{_mixture(probe, producers, [one for one in probe.outputs if one in patterns])}"
        )
    shared = [name for name in biases if name not in axes]
    if shared:
        return group._replace(blocker=f"its neurons share the bias {shared[0]!r}")
    return _linked(probe, group)


def _linked(probe: _Probe, group: NeuronGroup) -> NeuronGroup:
    """Measures what stands between, on the neutral first neuron of a network that is 0 else."""
    trial, true = _Trial(probe, group, {}), _Trial(probe, group, probe.hiding)
    pairs = [(producer, consumer) for producer in group.producers for consumer in probe.outputs
             if consumer in probe.reached[producer]]  # fmt: skip
    if len(group.producers) > 1 and any(trial.is_multiplied(*pair) for pair in pairs):
        return _gated(probe, group, trial, list(dict.fromkeys(one for _, one in pairs)))
    links = []
    for producer, consumer in pairs:
        link = trial.link(producer, consumer)
        if probe.hiding and not isinstance(link, str):
            link = true.measured(producer, consumer, link.scale) or _moved(producer, consumer)
        if isinstance(link, str):
            return group._replace(blocker=link)
        links.append(link)
    grids = {probe.outputs[name].shape[:-1] for name in group.producers}
    if len(grids) > 1:
        return group._replace(blocker="the layers that make it have different positions")
    if not any(link.slope for link in links):
        return group._replace(blocker="what follows is flat at 0: a small neuron has no effect")
    blocker = _shared_norm(links)
    return group._replace(links=() if blocker else tuple(links), blocker=blocker)


def _gated(probe: _Probe, group: NeuronGroup, trial: "_Trial", consumers: list[str]) -> NeuronGroup:
    """A group some of whose layers multiply the others: one that is linear, given the rest."""
    biases = {probe.biases.get(name) for name in group.producers}
    offsets = [name for name, _, value in group.vectors if value == "zero" and name not in biases]
    shapes = {probe.outputs[name].shape for name in group.producers}
    for name in reversed(group.producers if len(shapes) == 1 and not offsets else ()):
        if len(consumers) == 1 and trial.is_linear(name, group.producers, consumers[0]):
            gates = tuple(one for one in group.producers if one != name)
            link = Link(name, consumers[0], "same", 1.0)
            return group._replace(gates=gates, links=(link,))
    return group._replace(
        blocker=f"{_named(group.producers)} are multiplied before {_named(consumers)} reads them: "
        "a neuron that is small in both is of second order, and the product is not linear in one "
        f"of them, entry by entry, of one reader and without offsets between; {WIDEN}"
    )


def _shared_norm(links: Sequence[Link]) -> str | None:
    """What keeps the size of a neuron from being an entry of scales of its layer's own."""
    for link in links:
        if link.scale is None:
            continue
        others = [one for one in links if one.scale != link.scale and one.producer == link.producer]
        makers = {one.producer for one in links if one.scale == link.scale}
        if len(makers) > 1:
            return (
                f"the normalization of {link.scale!r} takes the sum of {_named(makers)}: new "
                f"neurons of theirs have no closed form; {WIDEN}"
            )
        if any(one.scale is None for one in others):
            return (
                f"the outputs of {link.producer!r} are read behind the normalization of "
                f"{link.scale!r}, where the size of a neuron does not matter, and without it by "
                f"{_named(one.consumer for one in others if one.scale is None)}; {WIDEN}"
            )
    return None


def _named(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _mixture(probe: _Probe, producers: list[str], consumers: list[str]) -> str:
    """Says what makes features depend on others: a normalization is told by what it forgets."""
    count = probe.outputs[producers[0]].shape[-1]
    axes = [one for one in probe.vectors if probe.leaves[one[0]].shape[one[1]] == count]
    scales = [one for one in axes if "scale" in probe.kinds.get(one[0], set())]
    added = {name: np.zeros_like(probe.leaves[name]) for name, axis in axes
             if (name, axis) not in scales}  # fmt: skip
    once, twice = (
        probe.between(
            {name: (size * probe.base[name]).astype(probe.base[name].dtype) for name in producers},
            added,
        ).inputs
        for size in (1 / _SIZES[-1], 2 / _SIZES[-1])
    )
    for consumer in consumers:
        if np.any(once[consumer]) and np.allclose(once[consumer], twice[consumer], rtol=1e-2):
            own = [name for name, axis in scales if probe.vectors[name, axis].get(consumer) == (0,)]
            of = f" of {_named(own)}" if own else ""
            return f"the normalization{of} before {consumer!r} is taken over features; {WIDEN}"
    return (
        "they are joined to others, split, or multiplied by others as in heads of attention; "
        "contrib.expand may widen them"
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether arrays are the same but for rounding."""
    tolerance = max(1e-3, 4 * float(jnp.finfo(one.dtype).eps))
    return np.allclose(one.astype(np.float64), other.astype(np.float64), rtol=tolerance)


def _moved(producer: str, consumer: str) -> str:
    return f"positions are pooled or moved between {producer!r} and {consumer!r}"


class _Trial:
    """The neutral first neuron of a group, in a network that is 0 else, at several sizes."""

    def __init__(self, probe: _Probe, group: NeuronGroup, leaves: Mapping[str, Any]):
        self._probe = probe
        self._scales = {
            name: axis for name, axis, value in group.vectors if value != "zero"
        }  # of what may be the scale of a normalization
        self._neutral = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        for name, axis, value in group.vectors:
            leaf = np.asarray(leaves.get(name, probe.leaves[name]))
            self._neutral[name] = np.array(self._neutral.get(name, leaf))
            self._neutral[name][_first(axis)] = 0 if value == "zero" else leaf.mean(axis=axis)
        self._zeros = {name: np.zeros_like(output) for name, output in probe.base.items()}
        self._read: dict[tuple[str, float, str | None, float], BetweenLayers] = {}

    def is_multiplied(self, producer: str, consumer: str) -> bool:
        """Whether the neuron does nothing where what other layers make is 0, though it is read."""
        return not any(np.any(self._answer(producer, consumer, size)) for size in (0, 1))

    def is_linear(self, producer: str, producers: Iterable[str], consumer: str) -> bool:
        """Whether a layer reads the outputs of one times what those of others say, by entry."""
        shape = self._zeros[producer].shape[:-1]
        drawn = np.random.default_rng(2).normal(size=(2, *shape))
        others = {name: self._zeros[name].copy() for name in producers if name != producer}
        for place, entries in enumerate(others.values()):
            entries[..., 0] = np.random.default_rng(3 + place).normal(size=shape)

        def read(entries: np.ndarray) -> np.ndarray:
            outputs = {**self._zeros, **others, producer: self._zeros[producer].copy()}
            outputs[producer][..., 0] = entries
            inputs = self._probe.between(outputs, self._neutral).inputs[consumer]
            return np.asarray(inputs, np.float64)[..., :: self._zeros[producer].shape[-1]]

        first, second = read(drawn[0]), read(drawn[1])
        if first.shape != (*shape, 1) or not np.any(first) or np.any(read(0 * drawn[0])):
            return False
        crossed = first * drawn[1][..., None], second * drawn[0][..., None]
        error = np.linalg.norm(crossed[0] - crossed[1])
        tolerance = max(_TOLERANCE, _EPSILONS * float(jnp.finfo(self._zeros[producer].dtype).eps))
        return bool(error <= tolerance * np.linalg.norm(crossed[0]))

    def link(self, producer: str, consumer: str) -> Link | str:
        """Returns how a layer reads the neuron, or what blocks it."""
        rest, once, twice = (self._answer(producer, consumer, size) for size in (0, 1, 2))
        if np.any(rest != 0):
            return (
                f"a neuron that is 0 is not 0 where {consumer!r} reads it: its activation is not 0 "
                "at 0"
            )
        if np.any(once) and _same(once, twice):
            return self._behind_norm(producer, consumer)
        return self.measured(producer, consumer, None) or _moved(producer, consumer)

    def _behind_norm(self, producer: str, consumer: str) -> Link | str:
        examples = len(self._zeros[producer])
        if examples < _EXAMPLES:
            return (
                f"a normalization stands before {consumer!r}, of which {examples} examples do not "
                f"tell over what; give {_EXAMPLES}"
            )
        seen = [name for name in self._scales
                if not np.any(self._answer(producer, consumer, 1, name, 0))]  # fmt: skip
        if not seen:
            return (
                f"a normalization without a scale that could be 0 stands before {consumer!r}: the "
                f"size of a new neuron would not matter, and it would not begin at 0; {WIDEN}"
            )
        for name in seen:
            once, twice = (self._answer(producer, consumer, 1, name, size) for size in (1, 2))
            before = _same(once, twice)
            link = None if before else self.measured(producer, consumer, name)
            if link is not None:
                return link
        return (
            f"the normalization of {_named(seen)} before {consumer!r} is not taken of the outputs "
            f"of {producer!r} alone and over all examples and positions, or positions are pooled "
            f"or moved behind it; {WIDEN}"
        )

    def measured(self, producer: str, consumer: str, scale: str | None) -> Link | None:
        """Returns the link whose size is that of a fan-in, or an entry of a scale, if it is one."""
        entries, dtype = self._entries(producer), self._zeros[producer].dtype
        if scale is None:
            up, down = (self._answer(producer, consumer, size) for size in (_STEP, -_STEP))
            # Low precision rounds a step, and the slope is one over the step that was made.
            made = np.asarray(_STEP * entries, dtype).astype(np.float64)
        else:
            up, down = (
                self._answer(producer, consumer, 1, scale, size) for size in (_STEP, -_STEP)
            )
            made = float(np.asarray(_STEP, dtype)) * (entries - entries.mean()) / entries.std()
        response = (up.astype(np.float64) - down.astype(np.float64)) / 2
        joint, expected = "same", made[..., None]
        if response.shape != expected.shape:
            joint, expected = "mean", made.reshape(len(made), -1).mean(axis=1, keepdims=True)
        if response.shape != expected.shape:
            joint, expected = "flat", made.reshape(len(made), -1)
        if response.shape != expected.shape:
            return None
        slope = np.vdot(response, expected) / np.vdot(expected, expected)
        tolerance = max(_TOLERANCE, _EPSILONS * float(jnp.finfo(up.dtype).eps))
        if np.linalg.norm(response - slope * expected) > tolerance * np.linalg.norm(response):
            return None
        return Link(producer, consumer, joint, float(f"{slope:.4g}"), scale)

    def _entries(self, producer: str) -> np.ndarray:
        """Entries of the neuron, of unit variance: statistics of examples and of all differ."""
        shape = self._zeros[producer].shape[:-1]
        drawn = np.random.default_rng(1).normal(size=shape)
        sizes = (1 + np.arange(len(drawn))).reshape(-1, *[1] * (drawn.ndim - 1))
        drawn = drawn * sizes
        if drawn.size > 1:
            drawn = (drawn - drawn.mean()) / drawn.std()
        return 0.5 + drawn

    def _answer(
        self, producer: str, consumer: str, size: float, scale: str | None = None, entry: float = 0
    ) -> np.ndarray:
        """What a layer reads of so many times the entries, [n, ..., copies]."""
        key = producer, size, scale, entry
        if key not in self._read:
            moved = self._zeros[producer].copy()
            moved[..., 0] = size * self._entries(producer)
            neutral = dict(self._neutral)
            if scale is not None:
                neutral[scale] = neutral[scale].copy()
                neutral[scale][_first(self._scales[scale])] = entry
            self._read[key] = self._probe.between({**self._zeros, producer: moved}, neutral)
        count = self._zeros[producer].shape[-1]
        return np.asarray(self._read[key].inputs[consumer])[..., ::count]
