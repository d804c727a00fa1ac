"""How a layer reads a neuron: measured on one that is neutral, in a network that is 0 else."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from archscale_jax.contrib._growth.neuron_groups import Link, NeuronGroup
from archscale_jax.contrib._growth.probe import Probe, first_entries
from archscale_jax.tracing.layers import BetweenLayers

EXAMPLES = 3
"""Of a batch that are read; two that are standardized are 1 and -1, whatever they were."""
WIDEN = "contrib.expand widens it"
_STEP = 1e-3  # of a feature, to measure the slope of what follows it at 0
_TOLERANCE = 1e-2  # of the responses to it, relative; in low precision so many epsilons at least:
_EPSILONS = 16  # means over positions cancel


class Trial:
    """The neutral first neuron of a group, in a network that is 0 else, at several sizes."""

    def __init__(self, probe: Probe, group: NeuronGroup, leaves: Mapping[str, Any]):
        self._probe = probe
        self._scales = {
            name: axis for name, axis, value in group.vectors if value != "zero"
        }  # of what may be the scale of a normalization
        self._neutral = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        for name, axis, value in group.vectors:
            leaf = np.asarray(leaves.get(name, probe.leaves[name]))
            self._neutral[name] = np.array(self._neutral.get(name, leaf))
            mean = 0 if value == "zero" else leaf.mean(axis=axis)
            self._neutral[name][first_entries(axis)] = mean
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
        return self.measured(producer, consumer, None) or moved(producer, consumer)

    def _behind_norm(self, producer: str, consumer: str) -> Link | str:
        examples = len(self._zeros[producer])
        if examples < EXAMPLES:
            return (
                f"a normalization stands before {consumer!r}, of which {examples} examples do not "
                f"tell over what; give {EXAMPLES}"
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
            f"the normalization of {quoted(seen)} before {consumer!r} is not taken of the outputs "
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
            outputs = {**self._zeros, producer: self._zeros[producer].copy()}
            outputs[producer][..., 0] = size * self._entries(producer)
            neutral = dict(self._neutral)
            if scale is not None:
                neutral[scale] = neutral[scale].copy()
                neutral[scale][first_entries(self._scales[scale])] = entry
            self._read[key] = self._probe.between(outputs, neutral)
        count = self._zeros[producer].shape[-1]
        return np.asarray(self._read[key].inputs[consumer])[..., ::count]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether arrays are the same but for rounding."""
    tolerance = max(1e-3, 4 * float(jnp.finfo(one.dtype).eps))
    return np.allclose(one.astype(np.float64), other.astype(np.float64), rtol=tolerance)


def moved(producer: str, consumer: str) -> str:
    return f"positions are pooled or moved between {producer!r} and {consumer!r}"


def quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
