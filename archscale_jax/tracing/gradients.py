"""To which inputs of a jaxpr a gradient of its results comes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from archscale_jax.tracing.jaxprs import inner_jaxpr, loop_operands

_CUTTING = ("stop_gradient", "sign", "floor", "ceil", "round")
"""Primitives whose derivative is 0 wherever there is one."""
_OWN_DERIVATIVE = ("custom_vjp_call", "custom_vjp_call_jaxpr")


def inputs_with_gradient(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Returns for every input of a jaxpr whether a gradient of wanted results comes to it.

    None comes through `stop_gradient`, a comparison or a conversion to integers. Where that cannot
    be told, as of a while loop, one does. Which inputs are read at all says JAX's `dce_jaxpr`.

    Args:
      jaxpr: of a function.
      wanted: for every result, whether it counts.
    """
    live = {
        atom
        for atom, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and isinstance(atom, core.Var) and not _is_discrete(atom)
    }
    for equation in reversed(jaxpr.eqns):
        found = [out in live for out in equation.outvars]
        if not any(found):
            continue
        operands = _operands_read(equation, found)
        for atom, read in zip(equation.invars, operands, strict=True):
            if read and isinstance(atom, core.Var) and not _is_discrete(atom):
                live.add(atom)
    return [variable in live for variable in jaxpr.invars]


def _is_discrete(variable: core.Var) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is None or not jnp.issubdtype(dtype, jnp.inexact)


def _operands_read(equation: Any, wanted: list[bool]) -> list[bool]:
    name, everything = equation.primitive.name, [True] * len(equation.invars)
    if name in _CUTTING:
        return [False] * len(equation.invars)
    if name == "cond":
        branches = [inputs_with_gradient(one.jaxpr, wanted) for one in equation.params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    inner = inner_jaxpr(equation)
    if inner is None or name == "while" or name in _OWN_DERIVATIVE:
        return everything
    jaxpr = inner.jaxpr
    if (len(jaxpr.invars), len(jaxpr.outvars)) != (len(everything), len(wanted)):
        return everything
    if name != "scan":
        return inputs_with_gradient(jaxpr, wanted)
    return _scanned(equation, jaxpr, wanted)


def _scanned(equation: Any, jaxpr: core.Jaxpr, wanted: list[bool]) -> list[bool]:
    """What a loop hands on counts as soon as a step that wants it does."""
    fixed, carried = loop_operands(equation)
    wanted = list(wanted)
    while True:
        read = inputs_with_gradient(jaxpr, wanted)
        again = [
            one or other
            for one, other in zip(wanted[:carried], read[fixed : fixed + carried], strict=True)
        ]
        if again == wanted[:carried]:
            return [
                own or (fixed <= place < fixed + carried and wanted[place - fixed])
                for place, own in enumerate(read)
            ]
        wanted[:carried] = again
