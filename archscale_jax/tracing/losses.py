"""What the program of a loss says: by what its value is multiplied, and which leaves it squares."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.tracing.jaxprs import CALLS, inner_jaxpr

_KEEPS = ("convert_element_type", "reshape", "squeeze", "copy", "broadcast_in_dim", "transpose",
          "expand_dims", "concatenate", "reduce_precision", "rev")  # fmt: skip


def shapes_of(tree: PyTree) -> PyTree:
    """Returns a tree of shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def factor_of(loss_fn: Callable[[PyTree, Any], Any], params: PyTree, batch: Any) -> float:
    """Returns by what a loss is multiplied behind its mean, or its sum.

    Of a sum of terms it is the first's. Constants alone count: `sum(losses * mask) / sum(mask)` is
    a mean.
    """
    closed = jax.make_jaxpr(loss_fn)(shapes_of(params), shapes_of(batch))
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return _factor(closed.jaxpr, closed.jaxpr.outvars[0], constants, 1.0)[0]


def _factor(
    jaxpr: Any, variable: Any, constants: Mapping[Any, Any], factor: float
) -> tuple[float, Any]:
    """The factor before a variable, and the input of the program it goes back to, or None."""
    made = {out: equation for equation in jaxpr.eqns for out in equation.outvars}

    def constant(one: Any) -> float | None:
        value = one.val if isinstance(one, Literal) else constants.get(one)
        return None if value is None or np.ndim(value) else float(value)

    while not isinstance(variable, Literal) and variable in made:
        equation = made[variable]
        operands, name = equation.invars, equation.primitive.name
        if inner := _inner(equation):
            place = equation.outvars.index(variable)
            own = {
                one: value
                for one, value in (
                    (one, constant(operand))
                    for one, operand in zip(inner.jaxpr.invars, operands, strict=True)
                )
                if value is not None
            }
            own |= dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
            factor, back = _factor(inner.jaxpr, inner.jaxpr.outvars[place], own, factor)
            if back is None:
                return factor, None
            variable = operands[inner.jaxpr.invars.index(back)]
            continue
        values = [constant(one) for one in operands]
        if name == "mul" and values.count(None) == 1:
            variable = operands[values.index(None)]
            factor *= next(one for one in values if one is not None)
        elif name == "div" and values[0] is None and values[1]:
            variable, factor = operands[0], factor / values[1]
        elif name in ("add", "sub", "neg", *_KEEPS) and not variable.aval.shape:
            variable = operands[0]
        elif name == "reduce_sum":
            count = math.prod(operands[0].aval.shape)
            return (factor if factor == 1 else factor * count), None
        else:
            return factor, None
    return factor, None if isinstance(variable, Literal) else variable


def _inner(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function that an equation calls with its own operands, or None."""
    found = inner_jaxpr(equation) if equation.primitive.name in CALLS else None
    same = found is not None and len(found.jaxpr.invars) == len(equation.invars)
    return found if same else None


def squared_leaves(function: Callable[..., Any], params: PyTree, *inputs: Any) -> set[str]:
    """Returns names of the leaves whose own entries a function squares, as penalties do."""
    closed = jax.make_jaxpr(function)(shapes_of(params), *map(shapes_of, inputs))
    names = [{name} for name in named_leaves(params)]
    rest: list[set[str]] = [set() for _ in closed.jaxpr.invars[len(names) :]]
    return _squared(closed.jaxpr, [*names, *rest])[0]


def _squared(jaxpr: Any, given: Sequence[set[str]]) -> tuple[set[str], list[set[str]]]:
    """What is squared, and which leaves the outputs hold unchanged."""
    held = dict(zip(jaxpr.invars, given, strict=True))
    of = lambda one: set() if isinstance(one, Literal) else held.get(one, set())  # noqa: E731
    found: set[str] = set()
    for equation in jaxpr.eqns:
        operands, name = equation.invars, equation.primitive.name
        if inner := _inner(equation):
            more, outputs = _squared(inner.jaxpr, [of(one) for one in operands])
            found |= more
            held |= dict(zip(equation.outvars, outputs, strict=True))
        elif name in _KEEPS:
            held[equation.outvars[0]] = set().union(*map(of, operands))
        elif (
            name == "square"
            or (name == "integer_pow" and equation.params["y"] == 2)
            or (name in ("mul", "dot_general") and operands[0] is operands[1])
        ):
            found |= of(operands[0])
    return found, [of(one) for one in jaxpr.outvars]
