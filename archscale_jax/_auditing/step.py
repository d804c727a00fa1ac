"""The first update on the batch itself."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from archscale_jax._auditing.findings import Finding, number
from archscale_jax._auditing.kinds import Kind
from archscale_jax._auditing.loss import Gradient
from archscale_jax._auditing.probe import Answers, Chain, Probes
from archscale_jax._trees import PyTree, named_leaves


class Step(NamedTuple):
    """An update, by name of leaf.

    Attributes:
      updates: a tree like params.
      relative: root mean square of it over that of the leaf; inf where the leaf is 0.
    """

    updates: PyTree
    relative: dict[str, float]


def step_of(chain: Chain, answers: Answers, gradient: Gradient, params: PyTree) -> Step:
    """Returns the first update on the gradient of the batch; every call evaluates it."""
    updates = chain.follow([gradient.leaves] * answers.first, params)
    sizes, weights = sizes_of(updates), sizes_of(params)
    relative = {
        name: one / weights[name] if weights[name] else math.inf for name, one in sizes.items()
    }
    return Step(updates, relative)


def even_of(chain: Chain, probes: Probes, answers: Answers, gradient: Gradient) -> dict[str, float]:
    """Returns how far entries that have a gradient move at params that are 0, the mean by leaf."""
    updates = chain.follow([gradient.leaves] * answers.first, probes.zeros())
    return {name: row[1] for name, row in _numbers(updates).items()}


def sizes_of(params: PyTree) -> dict[str, float]:
    """Returns the root mean square of every leaf."""
    return {name: row[0] for name, row in _numbers(params).items()}


def _numbers(tree: PyTree) -> dict[str, list[float]]:
    found = jax.device_get({name: _sizes(leaf) for name, leaf in named_leaves(tree).items()})
    return {name: row.tolist() for name, row in found.items()}


@jax.jit
def _sizes(leaf: jax.Array) -> jax.Array:
    """Root mean square, and the mean of the absolute entries that are not 0."""
    u = jnp.abs(leaf.astype(jnp.float32))
    return jnp.stack([jnp.sqrt(jnp.mean(u**2)), jnp.sum(u) / jnp.maximum(jnp.sum(u > 0), 1)])


def checked_epsilon(
    even: Mapping[str, float],
    answers: Answers,
    kinds: Mapping[str, Kind],
    gradient: Gradient,
) -> Iterator[Finding]:
    """Findings on leaves of Adam whose gradients epsilon exceeds."""
    largest = max(gradient.sizes.values())
    for name, kind in kinds.items():
        # Gradients of less than 10⁻⁵ of others are rounding, as those of biases of keys are.
        if kind != Kind.ADAM or gradient.sizes[name] <= 1e-5 * largest:
            continue
        part = even[name] / answers.large[name].even
        if part < 0.5:
            yield Finding(
                "epsilon",
                name,
                f"at the gradient of this batch, {number(gradient.sizes[name])} in the root mean "
                f"square, entries move {number(part)} times as far as at a large one",
                "1: Adam divides by the size of the gradient",
                "epsilon exceeds the gradients: the update follows their size, which changes with "
                "width, depth and batch",
                "lower eps; plan.optimizer scales it leaf by leaf",
            )
