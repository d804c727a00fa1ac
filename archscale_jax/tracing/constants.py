"""The constants by which a function multiplies what its layers give."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from archscale_jax._expressions import Apply, Constant, Expression, Statistic, Variable, variables
from archscale_jax._trees import PyTree
from archscale_jax.tracing.trace import read
from archscale_jax.tracing.values import Feature

_PASSING = ("convert_element_type", "neg", "copy", "stop_gradient")


def constants_behind(
    function: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    leaves: Collection[str],
) -> dict[str, set[float]]:
    """Returns what multiplies every output of the layers of leaves before anything else.

    Args:
      function: see `archscale_jax.trace`.
      params: tree of arrays or shapes.
      inputs: trees of arrays or shapes.
      leaves: names of weights.

    Returns:
      By name, the products of the constants that stand directly behind the layer, one for each
      place where its output is read.

    Raises:
      TraceError: see `archscale_jax.trace`.
    """
    reading = read(function, params, inputs, (), unknown="accept")
    found: dict[str, set[float]] = {}
    for use in reading.state.uses:
        if use.leaf not in leaves or use.kind != "weight":
            continue
        vertex = reading.moved.get(use.vertex, use.vertex)
        behind = [edge.before for edge in reading.state.flow.edges if edge.source == vertex]
        behind += [one.expression for one in reading.results if isinstance(one, Feature)]
        own = found.setdefault(use.leaf, set())
        for expression in behind:
            own |= factors_behind(expression, Variable("vertex", vertex))
    return found


def factors_behind(expression: Expression, variable: Variable) -> set[float]:
    """Returns the constants directly behind a variable or its slices, of all places that it has."""

    @functools.cache
    def places(one: Expression) -> frozenset[tuple[float, bool]]:
        """The constant of every place, and whether more may follow."""
        if isinstance(one, Statistic):
            return frozenset((constant, False) for constant, _ in places(one.operand))
        if not isinstance(one, Apply):
            return frozenset([(1.0, True)] if _reads(one, variable) else ())
        reading = [operand for operand in one.operands if _reads(operand, variable)]
        factor = _factor(one) if len(reading) == 1 else None
        return frozenset(
            (constant * factor, True) if more and factor is not None else (constant, False)
            for operand in reading
            for constant, more in places(operand)
        )

    return {constant for constant, _ in places(expression)}


def _reads(expression: Expression, variable: Variable) -> bool:
    return any(
        (one.kind, one.source) == (variable.kind, variable.source) for one in variables(expression)
    )


def _factor(expression: Apply) -> float | None:
    """By what a function multiplies its one operand; None where it does something else."""
    name = expression.name.split(" ")[0]
    constants = [one for one in expression.operands if isinstance(one, Constant)]
    if name in _PASSING:
        return 1.0
    if name == "mul" and constants:
        return abs(float(constants[0].value))
    if name == "div" and constants and expression.operands[1] is constants[0]:
        return 1 / abs(float(constants[0].value))
    return None
