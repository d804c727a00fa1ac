"""Finds the groups of neurons of a function, and says which of them can grow."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from archscale_jax._trees import PyTree
from archscale_jax.contrib._growth.neuron_groups import Link, NeuronGroup
from archscale_jax.contrib._growth.probe import SIZES, Probe
from archscale_jax.contrib._growth.trial import EXAMPLES, WIDEN, Trial, moved, quoted
from archscale_jax.tracing.layers import Loss


def find_neuron_groups(loss_fn: Loss, params: PyTree, batch: Any) -> tuple[NeuronGroup, ...]:
    """Finds the groups of neurons of a function (theory §8), in the order of the layers.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar, without
        dropout: groups are found by what it does to features that change.
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
    batch = jax.tree.map(lambda array: array[:EXAMPLES], batch)
    probe = Probe(loss_fn, params, batch)
    found = [_group(probe, producers) for producers in _summed(probe)]
    others = probe.others.items()
    return (*found, *(NeuronGroup(name, (name,), (), (), reason) for name, reason in others))


def _summed(probe: Probe) -> list[list[str]]:
    """The layers that make neurons in common, as they reach a feature in common, in their order."""
    found: list[list[str]] = []
    for name in probe.outputs:
        reached = set(probe.reached[name])
        joined = [names for names in found if any(reached & set(probe.reached[o]) for o in names)]
        found = [names for names in found if names not in joined]
        found.append([*(one for names in joined for one in names), name])
    place = list(probe.outputs).index
    return sorted((sorted(names, key=place) for names in found), key=lambda names: place(names[0]))


def _group(probe: Probe, producers: list[str]) -> NeuronGroup:
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


def _linked(probe: Probe, group: NeuronGroup) -> NeuronGroup:
    """Measures what stands between, on the neutral first neuron of a network that is 0 else."""
    trial, true = Trial(probe, group, {}), Trial(probe, group, probe.hiding)
    pairs = [(producer, consumer) for producer in group.producers for consumer in probe.outputs
             if consumer in probe.reached[producer]]  # fmt: skip
    if len(group.producers) > 1 and any(trial.is_multiplied(*pair) for pair in pairs):
        return _gated(probe, group, trial, list(dict.fromkeys(one for _, one in pairs)))
    links = []
    for producer, consumer in pairs:
        link = trial.link(producer, consumer)
        if probe.hiding and not isinstance(link, str):
            link = true.measured(producer, consumer, link.scale) or moved(producer, consumer)
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


def _gated(probe: Probe, group: NeuronGroup, trial: Trial, consumers: list[str]) -> NeuronGroup:
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
        blocker=f"{quoted(group.producers)} are multiplied before {quoted(consumers)} reads them: "
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
                f"the normalization of {link.scale!r} takes the sum of {quoted(makers)}: new "
                f"neurons of theirs have no closed form; {WIDEN}"
            )
        if any(one.scale is None for one in others):
            return (
                f"the outputs of {link.producer!r} are read behind the normalization of "
                f"{link.scale!r}, where the size of a neuron does not matter, and without it by "
                f"{quoted(one.consumer for one in others if one.scale is None)}; {WIDEN}"
            )
    return None


def _mixture(probe: Probe, producers: list[str], consumers: list[str]) -> str:
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
        for size in (1 / SIZES[-1], 2 / SIZES[-1])
    )
    for consumer in consumers:
        if np.any(once[consumer]) and np.allclose(once[consumer], twice[consumer], rtol=1e-2):
            own = [name for name, axis in scales if probe.vectors[name, axis].get(consumer) == (0,)]
            of = f" of {quoted(own)}" if own else ""
            return f"the normalization{of} before {consumer!r} is taken over features; {WIDEN}"
    return (
        "they are joined to others, split, or multiplied by others as in heads of attention; "
        "contrib.expand may widen them"
    )
