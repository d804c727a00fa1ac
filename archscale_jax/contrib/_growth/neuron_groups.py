"""Neurons of a network that are one group, and the entries of params that belong to them.

A neuron is one feature of the output of a layer (its column in the weight), with what stands
between that layer and the next: an entry of a bias or scale, and a row in the weights of every
layer that reads it. Layers whose outputs are added have their neurons in common.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Joint = Literal["same", "mean", "flat"]


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
