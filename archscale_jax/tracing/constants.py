"""The constants by which a function multiplies what its layers give."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from archscale_jax._expressions import Apply, Constant, Expression, Statistic, variables
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
            own.update(one for one, _ in _constants(expression, vertex))
    return found


def _constants(expression: Expression, vertex: int) -> Iterator[tuple[float, bool]]:
    """For every place of a vertex the constant directly behind it, and whether more may follow."""
    if isinstance(expression, Statistic):
        yield from ((one, False) for one, _ in _constants(expression.operand, vertex))
    elif isinstance(expression, Apply):
        operands = expression.operands
        reading = [one for one in operands if _reads(one, vertex)]
        factor = _factor(expression) if len(reading) == 1 else None
        for one in reading:
            for constant, more in _constants(one, vertex):
                follows = more and factor is not None
                yield constant * (factor or 1.0) if follows else constant, follows
    elif _reads(expression, vertex):
        yield 1.0, True


def _reads(expression: Expression, vertex: int) -> bool:
    return any((one.kind, one.source) == ("vertex", vertex) for one in variables(expression))


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
