"""What a public model is for the benchmark: a model, its inputs, and how it is called."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Subject(NamedTuple):
    """A model of one size.

    Attributes:
      model: as `archscale_jax.parametrize` takes it.
      inputs: shapes; integers are tokens below `vocabulary`.
      params: of a function, shapes.
      options: of `parametrize`.
      vocabulary: how many tokens there are.
      outputs: the part of the outputs that a loss is of.
      classes: whether they are logits of classes.
    """

    model: Any
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    params: Any = None
    options: Mapping[str, Any] = {}
    vocabulary: int = 17
    outputs: Callable[[Any], jax.Array] = lambda outputs: outputs
    classes: bool = False


Build = Callable[[str], Subject]
"""From a size, `small` or `real`, to a model."""

Sized = Callable[[int], Subject]
"""From a width, in units of that of a base, to a model."""


def tokens(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def batch(subject: Subject, seed: int = 0) -> tuple[jax.Array, ...]:
    """Tokens uniformly, floats normally distributed."""
    random = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(
            random.integers(1, subject.vocabulary, one.shape)
            if jnp.issubdtype(one.dtype, jnp.integer)
            else random.standard_normal(one.shape),
            one.dtype,
        )
        for one in subject.inputs
    )


def count(shapes: Any) -> int:
    """The number of parameters."""
    return sum(math.prod(one.shape) for one in jax.tree.leaves(shapes) if hasattr(one, "shape"))
