"""Values before training, read off the arrays that were traced."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from archscale_jax.expressions import Moments

Start = float | Moments
"""The value of all entries of a leaf, or their moments where entries differ."""

_LARGE = 2**16
"""Entries of a leaf above which only zeros are told from other values."""


def starting_values(leaves: Mapping[str, Any]) -> dict[str, Start]:
    """Returns what arrays hold, by name: their one value, or their moments.

    Of large arrays it is told only whether all entries are 0. Nothing is known of shapes, of what
    is traced or lies on other machines, nor where all leaves hold one and the same value, as
    arrays that stand for their shapes do.
    """
    found = {
        name: value
        for name, leaf in leaves.items()
        if _is_readable(leaf) and (value := _start(leaf)) is not None
    }
    alike = len(found) == len(leaves) and len(set(found.values())) == 1
    return {} if alike else found


def _is_readable(leaf: Any) -> bool:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
        return False
    if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return isinstance(leaf, np.ndarray) or (leaf.is_fully_addressable and not leaf.is_deleted())


def _start(leaf: Any) -> Start | None:
    if leaf.size > _LARGE:
        row = (0,) * (leaf.ndim - 1)  # where nearly all weights differ from 0 already
        return None if np.asarray(leaf[row]).any() or bool((leaf != 0).any()) else 0.0
    values = np.asarray(leaf).astype(np.float64)
    first = float(values.flat[0])
    if (values == first).all():
        return first
    mean, second = float(values.mean()), float(np.mean(values**2))
    return Moments(mean, second) if math.isfinite(second) else None
