"""Values before training, read off arrays or off the function that makes them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from archscale_jax._expressions import Moments
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.tracing.jaxprs import inner_jaxpr, loop_operands

Start = float | Moments
"""The value of all entries of a leaf, or their moments where entries differ."""

_LARGE = 2**16
"""Entries of a leaf above which only zeros are told from other values."""


def starting_values(leaves: Mapping[str, Any]) -> dict[str, Start]:
    """Returns what arrays hold, by name: their one value, or their moments.

    It tells of large arrays only whether all entries are 0. Nothing is known of shapes, of what
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


# Values that a function of a random key makes without the key.

_SAME_ENTRIES = ("broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "copy")
_ARITHMETIC = ("add", "sub", "mul", "div", "neg", "max", "min", "integer_pow", "pow")
_FUNCTIONS = ("exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "tanh", "convert_element_type")


def constant_leaves(
    function: Callable[..., PyTree], *arguments: PyTree
) -> tuple[PyTree, dict[str, float]]:
    """Returns the shapes of a function's results, and what fills leaves whatever its arguments are.

    Nothing is computed but these numbers: of an initializer they are its zeros, its ones, and
    constants such as 1e-6.

    Args:
      function: as `module.init`, of a key and inputs.
      *arguments: arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The tree of shapes, and the numbers by names of leaves.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _results(closed, [_unknown] * len(closed.jaxpr.invars))
    return shapes, {
        name: value
        for (name, leaf), result in zip(named_leaves(shapes).items(), results, strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (value := result()) is not None
    }


def used_leaves(function: Callable[..., PyTree], tree: PyTree, *arguments: PyTree) -> list[str]:
    """Returns the names of the leaves of a function's first argument that its results depend on."""
    closed = jax.make_jaxpr(function)(tree, *arguments)
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return [name for name, is_used in zip(named_leaves(tree), used, strict=False) if is_used]


_Lazy = Callable[[], float | None]
"""The value of all entries of an array, None where they differ or are not known."""


def _unknown() -> None:
    return None


def _results(closed: core.ClosedJaxpr, given: Sequence[_Lazy]) -> list[_Lazy]:
    """The results of a jaxpr. Only what a result is made of is looked at: no forward pass."""
    jaxpr = closed.jaxpr
    arguments = dict(zip(jaxpr.invars, given, strict=True))
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    makers = {out: (eqn, place) for eqn in jaxpr.eqns for place, out in enumerate(eqn.outvars)}

    def value(atom: Any) -> float | None:
        return _uniform(atom.val) if isinstance(atom, core.Literal) else of_variable(atom)

    @functools.cache
    def of_variable(atom: Any) -> float | None:
        if atom in arguments:
            return arguments[atom]()
        if atom in constants:
            return _uniform(constants[atom])
        return _made(*makers[atom], value)

    return [functools.partial(value, atom) for atom in jaxpr.outvars]


def _made(eqn: Any, place: int, value: Callable[[Any], float | None]) -> float | None:
    """What an equation gives at one of its results."""
    name = eqn.primitive.name
    if name in _SAME_ENTRIES:
        return value(eqn.invars[0])
    if name in (*_ARITHMETIC, *_FUNCTIONS):
        operands = []
        for atom in eqn.invars:
            if (one := value(atom)) is None:
                return None
            operands.append(jnp.asarray(one, atom.aval.dtype))
        return float(eqn.primitive.bind(*operands, **{**eqn.params, **_unsharded(eqn)}))
    inner = inner_jaxpr(eqn)
    if inner is None or len(inner.jaxpr.invars) != len(eqn.invars):
        return None
    given: list[_Lazy] = [functools.partial(value, atom) for atom in eqn.invars]
    if name == "scan":
        constants, carries = loop_operands(eqn)
        if place < carries:
            return None
        given[constants : constants + carries] = [_unknown] * carries
    return _results(inner, given)[place]()


def _unsharded(eqn: Any) -> dict[str, None]:
    return {"sharding": None} if "sharding" in eqn.params else {}


def _uniform(array: Any) -> float | None:
    key = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    if isinstance(array, Tracer) or key or not 0 < np.size(array) <= _LARGE:
        return None
    values = np.asarray(array)
    if not np.isrealobj(values):
        return None
    return float(values.flat[0]) if (values == values.flat[0]).all() else None
