"""What the values of a jaxpr are to an architecture, and what its parameters do.

Every value is one of

* `Known`: it depends on neither inputs nor params (literals, masks, random numbers),
* `Weight`: it is made of params alone,
* `Feature`: it depends on inputs (or on features that no input reaches), and belongs to a vertex of
  the `Flow`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from archscale_jax.tracing.flow import Edge


class TraceError(ValueError):
    """A function, or a part of it, that cannot be read as an architecture."""


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A value that depends on neither inputs nor params.

    Attributes:
      array: here and below, the value itself, where it is computed.
    """

    array: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A value made of params.

    Attributes:
      leaves: their names.
      size: number of their entries that it holds, before they are repeated.
      index: of a leaf whose first axis is scanned, the number of the slice.
      split: inside `jax.shard_map`, into how many shards every axis is divided; () where none is,
        None where that is not known.
    """

    leaves: tuple[str, ...]
    size: int
    index: int | None = None
    array: Any = None
    split: tuple[int, ...] | None = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
    """A value that belongs to a vertex.

    Attributes:
      vertex: its number.
      active: whether an activation came between.
      statistic: whether it is a mean, maximum or the like of the vertex, or a mask made of inputs;
        joined with the features it normalizes or masks them, which is no activation.
      bare: whether nothing came between: what is added now is the layer's bias.
      scaled: whether a parameter has just multiplied it: what is added now is its offset.
      inputs: numbers of the inputs that it is made of, before any layer.
    """

    vertex: int
    active: bool = False
    statistic: bool = False
    bare: bool = False
    scaled: bool = False
    inputs: frozenset[int] = frozenset()
    array: Any = None


Value = Known | Weight | Feature


@dataclasses.dataclass(frozen=True)
class Use:
    """What a parameter leaf does at one place.

    Attributes:
      leaves: names of the leaves that the value is made of.
      index: see `Weight`.
      kind: `weight`, `embedding` (rows chosen by an index), `bias` (added), `offset` (added to what
        a scale multiplies), `scale` (multiplied) or `token` (joined to features along an axis).
      vertex: the vertex whose features it touches; of a weight, the one that it makes.
      edge: of a weight, its edge.
      fan_in: of a weight, inputs that reach one unit.
      fan_out: of a weight, units that one input reaches.
      spatial: of a convolution, the sizes of its kernel.
      source: file and line.
    """

    leaves: tuple[str, ...]
    index: int | None
    kind: str
    vertex: int
    source: str
    edge: Edge | None = None
    fan_in: int = 1
    fan_out: int = 1
    spatial: tuple[int, ...] = ()


def features_of(values: Sequence[Value]) -> list[Feature]:
    """Returns those of the values that are features."""
    return [value for value in values if isinstance(value, Feature)]
