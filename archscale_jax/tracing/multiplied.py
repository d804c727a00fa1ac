"""A function with some of its products multiplied by constants: forward multipliers.

Where a multiplier cannot be folded into a weight, as of a table that is the readout's weight too,
the jaxpr of the function is written anew: the equation of the product is followed by a
multiplication, inside the loops, calls and branches in which it lies.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from archscale_jax._trees import PyTree
from archscale_jax.tracing.state import line_of
from archscale_jax.tracing.trace import Reading, read
from archscale_jax.tracing.values import TraceError

Place = tuple[int, ...]
"""Ids of equations, each in the jaxpr of the one before it."""

_Factors = dict[int, "float | _Factors"]
"""By the id of an equation what multiplies its result, or the same of equations inside of it."""

_CLOSED = ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call", "linear_call",
           "composite", "call_hi_primitive")  # fmt: skip
"""Functions whose derivative, transpose or implementation is not that of their jaxpr."""


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
    reading = read(function, params, inputs, (), unknown="accept")
    rewritten = _rewritten(reading.closed.jaxpr, _by_equation(places(reading)))
    arrays = jax.tree.leaves((params, inputs))
    outputs = core.jaxpr_as_fun(core.ClosedJaxpr(rewritten, reading.closed.consts))(*arrays)
    return jax.tree.unflatten(jax.tree.structure(reading.shapes), outputs)


def _by_equation(factors: Mapping[Place, float]) -> _Factors:
    found: _Factors = {}
    for place, factor in factors.items():
        inner: Any = found
        for equation in place[:-1]:
            inner = inner.setdefault(equation, {})
        inner[place[-1]] = factor
    return found


def _rewritten(jaxpr: core.Jaxpr, factors: _Factors) -> core.Jaxpr:
    equations: list[core.JaxprEqn] = []
    for equation in jaxpr.eqns:
        found = factors.get(id(equation))
        if found is None:
            equations.append(equation)
        elif isinstance(found, dict):
            equations.append(_with_inner(equation, found))
        else:
            equations += _followed_by_product(equation, found)
    return jaxpr.replace(eqns=equations)


def _followed_by_product(equation: core.JaxprEqn, factor: float) -> list[core.JaxprEqn]:
    """The equation and what multiplies its result, as JAX writes it at this place."""
    (result,) = equation.outvars
    aval: Any = result.aval
    constant = np.asarray(factor, aval.dtype)
    scaled = jax.make_jaxpr(lambda one: one * constant)(aval).jaxpr
    plain = core.Var(aval)
    names = {scaled.invars[0]: plain, scaled.outvars[0]: result}
    return [
        equation.replace(outvars=[plain]),
        *(
            one.replace(
                invars=[atom if isinstance(atom, core.Literal) else names.get(atom, atom)
                        for atom in one.invars],
                outvars=[names.get(variable, variable) for variable in one.outvars],
                source_info=equation.source_info,
            )
            for one in scaled.eqns
        ),
    ]  # fmt: skip


def _with_inner(equation: core.JaxprEqn, factors: _Factors) -> core.JaxprEqn:
    """The equation with the jaxprs in it written anew."""
    if equation.primitive.name in _CLOSED:
        raise TraceError(
            f"{equation.primitive.name} at {line_of(equation)}: a product to be multiplied lies "
            "in a function with a derivative or an implementation of its own, which would not hold "
            "for the multiplied one; take the product out of it, or pass parametrize(…, "
            "form='folded') for logits, attention_scale=None for queries and keys"
        )
    if equation.primitive.name == "shard_map":
        return _mapped_anew(equation, factors)
    parameters = {name: _within(value, factors) for name, value in equation.params.items()}
    return equation.replace(params=parameters)


def _mapped_anew(equation: core.JaxprEqn, factors: _Factors) -> core.JaxprEqn:
    """A `shard_map` that is traced again: its context tells how a constant meets what varies."""
    parameters = equation.params
    names = ("newly_manual_axes", "manual_axes")  # the latter in JAX 0.10.0
    axes = next(parameters[name] for name in names if name in parameters)

    def function(*shards: Any) -> Any:
        inner = _rewritten(parameters["jaxpr"], factors)
        return tuple(core.jaxpr_as_fun(core.ClosedJaxpr(inner, ()))(*shards))

    mapped = jax.shard_map(
        function,
        mesh=parameters["mesh"],
        in_specs=parameters["in_specs"],
        out_specs=parameters["out_specs"],
        axis_names=set(axes),
        check_vma=parameters["check_vma"],
    )
    (anew,) = jax.make_jaxpr(mapped)(*(one.aval for one in equation.invars)).jaxpr.eqns
    return equation.replace(params=anew.params)


def _within(value: Any, factors: _Factors) -> Any:
    """A parameter of an equation with the jaxprs in it written anew."""
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr, factors))
    if isinstance(value, core.Jaxpr):
        return _rewritten(value, factors)
    if isinstance(value, tuple):
        return tuple(_within(one, factors) for one in value)
    return value
