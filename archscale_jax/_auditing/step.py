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
      sizes: root mean square of it.
      relative: the same over that of the leaf; inf where the leaf is 0.
      even: at params that are 0, mean of the entries that have a gradient.
    """

    updates: PyTree
    sizes: dict[str, float]
    relative: dict[str, float]
    even: dict[str, float]


def step_of(
    chain: Chain, probes: Probes, answers: Answers, gradient: Gradient, params: PyTree
) -> Step:
    """Returns the first update on the gradient of the batch."""
    updates = chain.respond(gradient.leaves, params, answers.first)
    bare = chain.respond(gradient.leaves, probes.zeros(), answers.first)
    trees = [named_leaves(one) for one in (updates, params, bare, gradient.leaves)]
    found = jax.device_get({name: _sizes(*(tree[name] for tree in trees)) for name in trees[0]})
    rows = {name: list(map(float, row)) for name, row in found.items()}
    return Step(
        updates,
        {name: row[0] for name, row in rows.items()},
        {name: row[0] / row[1] if row[1] else math.inf for name, row in rows.items()},
        {name: row[2] for name, row in rows.items()},
    )


@jax.jit
def _sizes(update: jax.Array, leaf: jax.Array, bare: jax.Array, gradient: jax.Array) -> jax.Array:
    u, w, b = (one.astype(jnp.float32) for one in (update, leaf, bare))
    has = gradient != 0
    even = jnp.sum(jnp.where(has, jnp.abs(b), 0)) / jnp.maximum(jnp.sum(has), 1)
    return jnp.stack([jnp.sqrt(jnp.mean(u**2)), jnp.sqrt(jnp.mean(w**2)), even])


def checked_epsilon(
    step: Step, answers: Answers, kinds: Mapping[str, Kind], gradient: Gradient
) -> Iterator[Finding]:
    """Findings on leaves of Adam whose gradients epsilon exceeds."""
    largest = max(gradient.sizes.values())
    for name, kind in kinds.items():
        # Gradients of less than 10⁻⁵ of others are rounding, as those of biases of keys are.
        if kind != Kind.ADAM or gradient.sizes[name] <= 1e-5 * largest:
            continue
        part = step.even[name] / answers.large[name].even
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
