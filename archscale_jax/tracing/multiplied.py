"""A function with some of its products multiplied by constants: forward multipliers.

Where a multiplier cannot be folded into a weight, as of a table that is the readout's weight too,
the jaxpr of the function is written anew: the equation of the product is followed by a
multiplication, inside the loops, calls and branches in which it lies.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from archscale_jax._trees import PyTree
from archscale_jax.tracing.trace import Reading, read
from archscale_jax.tracing.values import TraceError

Place = tuple[int, ...]
"""Ids of equations, each in the jaxpr of the one before it."""

_OWN_DERIVATIVES = ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call")


def with_multipliers(
    function: Callable[..., PyTree],
    params: PyTree,
    *inputs: PyTree,
    places: Callable[[Reading], Mapping[Place, float]],
) -> PyTree:
    """Evaluates a function with some of its products multiplied.

    Works under `jit`, `grad`, `vmap`, in scans and under `jax.checkpoint`. Eagerly it reads the
    function at every call: jit it.

    Args:
      function: see `archscale_jax.trace`.
      params: tree of arrays.
      *inputs: trees of arrays.
      places: of what was read, the multipliers of the results of equations.

    Raises:
      TraceError: what `archscale_jax.trace` raises; a product inside of a function with a
        derivative of its own, which would not hold for the multiplied one.
    """
    reading = read(function, params, inputs, ())
    rewritten = _rewritten(reading.closed.jaxpr, places(reading), ())
    arrays = jax.tree.leaves((params, inputs))
    outputs = core.jaxpr_as_fun(core.ClosedJaxpr(rewritten, reading.closed.consts))(*arrays)
    return jax.tree.unflatten(jax.tree.structure(reading.shapes), outputs)


def _rewritten(jaxpr: core.Jaxpr, factors: Mapping[Place, float], path: Place) -> core.Jaxpr:
    equations: list[core.JaxprEqn] = []
    for equation in jaxpr.eqns:
        place = (*path, id(equation))
        if place in factors:
            equations += _followed_by_product(equation, factors[place])
        elif any(other[: len(place)] == place for other in factors):
            equations.append(_with_inner(equation, factors, place))
        else:
            equations.append(equation)
    return jaxpr.replace(eqns=equations)


def _followed_by_product(equation: core.JaxprEqn, factor: float) -> list[core.JaxprEqn]:
    (result,) = equation.outvars
    aval: Any = result.aval
    constant = np.asarray(factor, aval.dtype)
    scaled = jax.make_jaxpr(lambda one: one * constant)(jax.ShapeDtypeStruct((), aval.dtype))
    (product,), plain = scaled.jaxpr.eqns, core.Var(aval)
    operands = [one if isinstance(one, core.Literal) else plain for one in product.invars]
    return [
        equation.replace(outvars=[plain]),
        equation.replace(
            primitive=product.primitive,
            params=product.params,
            invars=operands,
            outvars=[result],
            effects=product.effects,
        ),
    ]


def _with_inner(
    equation: core.JaxprEqn, factors: Mapping[Place, float], place: Place
) -> core.JaxprEqn:
    """The equation with the jaxprs in it written anew."""
    if equation.primitive.name in _OWN_DERIVATIVES:
        raise TraceError(
            f"{equation.primitive.name}: a product to be multiplied lies in a function with a "
            "derivative of its own; take it out of it, or pass form='folded'"
        )
    rewrite = functools.partial(_rewritten_value, factors=factors, place=place)
    parameters = {name: rewrite(value) for name, value in equation.params.items()}
    return equation.replace(params=parameters)


def _rewritten_value(value: Any, factors: Mapping[Place, float], place: Place) -> Any:
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr, factors, place))
    if isinstance(value, core.Jaxpr):
        return _rewritten(value, factors, place)
    if isinstance(value, tuple):
        return tuple(_rewritten_value(one, factors, place) for one in value)
    return value
