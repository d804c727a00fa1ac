"""Two operators that widen the hidden layers of residual blocks, for `experiments.grow_doubling`.

`contrib.expand` copies neurons, `contrib.grow` adds those in closed form [TINY] or random ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from archscale_jax import contrib
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from experiments import grow_cost
from experiments.lab.models.images import ResidualStages

POSITIVE = tuple(one for one in AMPLITUDES if one)
"""What neurons are multiplied by; 0 is none of them, as all operators have to end at one width."""


class HiddenStages(ResidualStages):
    """`ResidualStages` with batch normalization, in which hidden layers have their own width.

    Args:
      image: height, width, channels.
      width: channels of the stream in the first stage; they double at every other.
      hidden: channels of hidden layers, likewise.
      depth: blocks.
      classes: outputs.
      rngs: random streams.
    """

    def __init__(self, image, width: int, hidden: int, depth: int, classes: int, *, rngs: nnx.Rngs):
        super().__init__(image, width, depth, classes, True, rngs=rngs)
        for place, (first, second) in enumerate(self.blocks):
            outputs = second.convolution.out_features
            inner, layer = outputs * hidden // width, type(first)
            self.blocks[place] = nnx.List(
                [
                    layer(first.convolution.in_features, inner, True, rngs=rngs),
                    layer(inner, outputs, True, rngs=rngs),
                ]
            )

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        features = self.stem(images, train)
        for first, second in self.blocks:
            added = second.convolution.out_features - features.shape[-1]
            if added:
                features = nnx.avg_pool(features, (2, 2), (2, 2))
            branch = second(nnx.relu(first(nnx.relu(features), train)), train)
            features = jnp.pad(features, ((0, 0), (0, 0), (0, 0), (0, added))) + branch
        return self.readout(jnp.mean(nnx.relu(features), axis=(1, 2)))


class Added(NamedTuple):
    """A network with new neurons, the state of its optimizer, and what they took to find.

    Attributes:
      params: in the shapes that were asked for.
      optimizer_state: moments of new entries are 0.
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
      state: of the optimizer.
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
