"""Widens hidden layers by `contrib.grow`, for `experiments.grow_doubling`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from archscale_jax import contrib
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from experiments import grow_cost

POSITIVE = tuple(one for one in AMPLITUDES if one)
"""What neurons are multiplied by; 0 is none of them, as all operators have to end at one width."""


class Added(NamedTuple):
    """A network with new neurons, the state of its optimizer, and what they took to find.

    Attributes:
      params: in the shapes that were asked for.
      optimizer_state: see `contrib.grow`.
      operations: of statistics, decompositions and the search of the amplitude, see `grow_cost`.
      amplitude: by which the neurons are multiplied.
    """

    params: PyTree
    optimizer_state: Any
    operations: float
    amplitude: float


def add_neurons(
    loss: Any,
    params: PyTree,
    like: PyTree,
    batch: Any,
    held_out: Any,
    optimizer: Callable[[PyTree], optax.GradientTransformation] | None,
    state: Any,
    *,
    key: jax.Array,
    **options: Any,
) -> Added:
    """Grows params to the shapes of another tree by `contrib.grow`.

    Args:
      loss: `(params, batch)` to the mean loss, for params of either shapes.
      params: of the narrow network.
      like: a tree of the shapes of the wide one.
      batch: on which statistics are taken.
      held_out: on which the amplitude is chosen.
      optimizer: from params of either shapes to their optimizer, if its state is carried over.
      state: of that of params.
      key: of random neurons.
      **options: of `contrib.grow`.

    Raises:
      ValueError: a leaf whose growth `grow` cannot do, or neurons that are missing.
    """
    wanted, leaves = named_leaves(like), named_leaves(params)
    numbers, groups = {}, []
    for group in contrib.find_neuron_groups(loss, params, batch):
        name = group.producers[0]
        number = wanted[name].shape[-1] - leaves[name].shape[-1]
        if number:
            numbers[group.name] = number
            groups.append(group)
    growth = contrib.grow(
        loss,
        params,
        [batch],
        held_out,
        groups,
        number=numbers,
        threshold=0.0,
        amplitudes=POSITIVE,
        optimizer=optimizer,
        optimizer_state=state,
        key=key,
        **options,
    )
    _check_shapes(named_leaves(growth.params), wanted)
    operations = grow_cost.growth_flops(loss, params, batch, groups, 0, 0)
    operations += search_operations(loss, growth.params, held_out)
    return Added(growth.params, growth.optimizer_state, operations, growth.amplitude)


def search_operations(loss: Any, params: PyTree, held_out: Any) -> float:
    """Returns the operations of forward passes of a wide network at 0 and at every amplitude."""
    example = jax.tree.map(lambda one: one[:1], held_out)
    examples = len(jax.tree.leaves(held_out)[0])
    return (1 + len(POSITIVE)) * examples * grow_cost.forward_flops(loss, params, example)


def _check_shapes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape:
            raise ValueError(
                f"{name!r} has shape {found[name].shape} after growth, and {leaf.shape} in like; "
                "accepted are shapes that differ in neurons that contrib.grow can add"
            )
