"""Which inputs of a jaxpr its results depend on, and to which of them a gradient comes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

_CUTTING = ("stop_gradient", "sign", "floor", "ceil", "round")
"""Primitives whose derivative is 0 wherever there is one."""
_JAXPRS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_OWN_DERIVATIVE = ("custom_vjp_call", "custom_vjp_call_jaxpr")


def inputs_read(jaxpr: core.Jaxpr, wanted: Sequence[bool], *, derivative: bool) -> list[bool]:
    """Returns for every input of a jaxpr whether wanted results depend on it.

    Where that cannot be told, as of a while loop, they do.

    Args:
      jaxpr: of a function.
      wanted: for every result, whether it counts.
      derivative: ask for the derivative: what stands behind `stop_gradient`, a comparison or a
        conversion to integers has none.
    """
    live = {
        atom
        for atom, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and isinstance(atom, core.Var) and not (derivative and _is_discrete(atom))
    }
    for equation in reversed(jaxpr.eqns):
        found = [out in live for out in equation.outvars]
        if not any(found):
            continue
        operands = _operands_read(equation, found, derivative)
        for atom, read in zip(equation.invars, operands, strict=True):
            if read and isinstance(atom, core.Var) and not (derivative and _is_discrete(atom)):
                live.add(atom)
    return [variable in live for variable in jaxpr.invars]


def _is_discrete(variable: core.Var) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is None or not jnp.issubdtype(dtype, jnp.inexact)


def _operands_read(equation: Any, wanted: list[bool], derivative: bool) -> list[bool]:
    name, everything = equation.primitive.name, [True] * len(equation.invars)
    if derivative and name in _CUTTING:
        return [False] * len(equation.invars)
    if name == "cond":
        branches = [
            inputs_read(one.jaxpr, wanted, derivative=derivative)
            for one in equation.params["branches"]
        ]
        return [True, *map(any, zip(*branches, strict=True))]
    inner = next((equation.params[one] for one in _JAXPRS if one in equation.params), None)
    jaxpr = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    if not isinstance(jaxpr, core.Jaxpr) or name == "while" or name in _OWN_DERIVATIVE:
        return everything
    if (len(jaxpr.invars), len(jaxpr.outvars)) != (len(everything), len(wanted)):
        return everything
    if name != "scan":
        return inputs_read(jaxpr, wanted, derivative=derivative)
    return _scanned(equation, jaxpr, wanted, derivative)


def _scanned(equation: Any, jaxpr: core.Jaxpr, wanted: list[bool], derivative: bool) -> list[bool]:
    """What a loop hands on counts as soon as a step that wants it does."""
    fixed, carried = loop_operands(equation)
    wanted = list(wanted)
    while True:
        read = inputs_read(jaxpr, wanted, derivative=derivative)
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


def loop_operands(equation: core.JaxprEqn) -> tuple[int, int]:
    """Returns how many operands of a scan every step reads, and how many it hands on."""
    if "ft_in" in equation.params:  # JAX 0.11 and newer
        fixed, carried, _ = equation.params["ft_in"].unpack()
        return len(fixed), len(carried)
    return equation.params["num_consts"], equation.params["num_carry"]
