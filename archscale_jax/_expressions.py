"""What one entry of an array is, as a function of independent random variables (theory §9).

In a wide network at initialization the features of a vertex are draws of one distribution. What
stands between two vertices is therefore read as an `Expression` of one entry: constants,
elementwise functions of `Variable`s, and `Statistic`s, averages over an axis. Its moments follow by
quadrature of the traced functions themselves, however they were spelled
(`archscale_jax._quadrature`).
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Expression:
    """One entry of an array; see the module."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A number that is known when the function is read."""

    value: Any

    def __float__(self) -> float:
        return float(np.real(self.value))


@dataclasses.dataclass(frozen=True)
class Variable(Expression):
    """A random variable.

    Attributes:
      kind: `vertex` (features of a vertex), `leaf` (entries of a parameter), `output` (what the
        operator of an edge gives), `random` (random bits), `index` (0 … size - 1), `array` (entries
        of a constant array), `choice` (which part of a concatenation) or `data`.
      source: number of the vertex, name of the leaf, or what else tells variables apart.
      part: which slice of it; two slices of one vertex are two variables.
      nodes: of `random`, `index`, `array` and `choice`, its values; None of the others.
      weights: of `choice`, their probabilities; equal where None.
    """

    kind: str
    source: Any
    part: tuple[Any, ...] = ()
    nodes: Any = dataclasses.field(default=None, compare=False)
    weights: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Apply(Expression):
    """An elementwise function of expressions, which its name tells from all others."""

    name: str
    function: Callable[..., Any]
    operands: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic(Expression):
    """The mean of an expression over an axis, or its largest or smallest value there.

    Attributes:
      operand: the expression.
      axes: labels of the axis.
      count: how many entries it has.
      units: whether they are features of a layer, which are independent; else positions.
      name: `mean`, `max` or `min`.
    """

    operand: Expression
    axes: frozenset[Any]
    count: int
    units: bool
    name: str = "mean"


class Unknown(Expression):
    """A value of which nothing is known; what it is combined with ignores it."""


UNKNOWN = Unknown()
ZERO, ONE = Constant(0.0), Constant(1.0)


class Moments(NamedTuple):
    """First and second moment of an entry."""

    mean: float
    second: float

    @property
    def variance(self) -> float:
        """The variance; not below 0."""
        return max(self.second - self.mean**2, 0.0)


Distribution = Callable[[Variable], Moments | float]
"""Moments of a normal variable, or the value of a constant one, by variable."""


def apply(name: str, function: Callable[..., Any], *operands: Expression) -> Expression:
    """Returns an elementwise function of expressions; of constants its value."""
    kinds = set(map(type, operands))
    if Unknown in kinds:
        known = [one for one in operands if not isinstance(one, Unknown)]
        varying = [one for one in known if not isinstance(one, Constant)]
        return varying[0] if len(varying) == 1 else UNKNOWN
    if kinds == {Constant}:
        with np.errstate(all="ignore"):
            return Constant(np.asarray(function(*(one.value for one in operands)))[()])  # pyright: ignore[reportAttributeAccessIssue]
    return Apply(name, function, operands)


def multiplied(one: Expression, other: Expression) -> Expression:
    """Returns the product of two expressions."""
    for constant, rest in ((one, other), (other, one)):
        if isinstance(constant, Constant) and np.all(constant.value == 1):
            return rest
    return apply("mul", np.multiply, one, other)


def times(expression: Expression, factor: float) -> Expression:
    """Returns an expression times a number."""
    return multiplied(expression, Constant(float(factor)))


def parts(expression: Expression, *, raw: bool = False) -> list[Expression]:
    """Returns all that an expression is made of, once each, operands before what is made of them.

    Args:
      expression: which is the last of its parts.
      raw: leave out what stands within statistics.
    """
    found: dict[Expression, None] = {}
    waiting = [expression]
    while waiting:
        one = waiting[-1]
        operands: tuple[Expression, ...] = ()
        if isinstance(one, Apply):
            operands = one.operands
        elif isinstance(one, Statistic) and not raw:
            operands = (one.operand,)
        missing = [operand for operand in operands if operand not in found]
        if missing and one not in found:
            waiting += missing[::-1]
        else:
            found[waiting.pop()] = None
    return list(found)


def substituted(
    expression: Expression, found: Callable[[Variable], Expression | None]
) -> Expression:
    """Returns an expression with its variables replaced where `found` gives something."""
    if isinstance(expression, Variable):
        return found(expression) or expression
    done: dict[Expression, Expression] = {}
    for one in parts(expression):
        if isinstance(one, Variable):
            done[one] = found(one) or one
        elif isinstance(one, Apply):
            operands = (done[operand] for operand in one.operands)
            done[one] = apply(one.name, one.function, *operands)
        elif isinstance(one, Statistic):
            done[one] = dataclasses.replace(one, operand=done[one.operand])
        else:
            done[one] = one
    return done[expression]


def _kept(function: Callable[[Expression], Any]) -> Callable[[Expression], Any]:
    """Keeps what a function finds of an expression with it: expressions never change."""
    name = f"_kept{function.__name__}"

    @functools.wraps(function)
    def found(expression: Expression) -> Any:
        kept = expression.__dict__.get(name)
        if kept is None:
            kept = function(expression)
            object.__setattr__(expression, name, kept)
        return kept

    return found


def variables(expression: Expression, *, raw: bool = False) -> frozenset[Variable]:
    """Returns the variables of an expression; with `raw`, those outside of all statistics."""
    return _raw_variables(expression) if raw else _variables(expression)


@_kept
def _variables(expression: Expression) -> frozenset[Variable]:
    return frozenset(one for one in parts(expression) if isinstance(one, Variable))


@_kept
def _raw_variables(expression: Expression) -> frozenset[Variable]:
    return frozenset(one for one in parts(expression, raw=True) if isinstance(one, Variable))


@_kept
def statistics(expression: Expression) -> tuple[Statistic, ...]:
    """Returns the outermost statistics of an expression, each once."""
    return tuple(one for one in parts(expression, raw=True) if isinstance(one, Statistic))


def is_factor(expression: Expression, variable: Variable, other: Variable) -> bool:
    """Returns whether a variable only stands in factors of products in which another does not."""
    if not isinstance(expression, Apply):
        return False
    there = any(other in variables(one) for one in expression.operands)
    product = expression.name in ("mul", "div") and there
    held = [one for one in expression.operands if variable in variables(one)]
    return bool(held) and all(
        is_factor(one, variable, other) if other in variables(one) else product for one in held
    )


def replaced(expression: Expression, values: Mapping[Statistic, Expression]) -> Expression:
    """Returns an expression with its outermost statistics replaced where values are given."""
    done: dict[Expression, Expression] = {}
    for one in parts(expression, raw=True):
        if isinstance(one, Statistic):
            done[one] = values.get(one, one)
        elif isinstance(one, Apply):
            operands = (done[operand] for operand in one.operands)
            done[one] = apply(one.name, one.function, *operands)
        else:
            done[one] = one
    return done[expression]


def evaluated(expression: Expression, values: Mapping[Variable, Any]) -> np.ndarray:
    """Returns an expression at given values of its variables."""
    done: dict[Expression, Any] = {}
    for one in parts(expression, raw=True):
        if isinstance(one, Constant):
            done[one] = one.value
        elif isinstance(one, Variable):
            done[one] = values[one]
        elif isinstance(one, Apply):
            done[one] = one.function(*(done[operand] for operand in one.operands))
        else:
            raise TypeError(f"no value of {one}")
    return np.asarray(done[expression])


# The same function of other variables has the same moments, and need not be integrated again.


class Keyed(NamedTuple):
    """An expression with what it depends on; equal where the functions and distributions are.

    Attributes:
      program: its operations, with variables and axes numbered as they come.
      values: what is known of its variables, in that order.
      expression: the expression itself.
      variables: its variables, in that order.
    """

    program: tuple[Hashable, ...]
    values: tuple[Moments | float, ...]
    expression: Expression
    variables: tuple[Variable, ...]

    def __hash__(self) -> int:
        return hash((self.program, self.values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self[:2] == other[:2]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def distribution(self, variable: Variable) -> Moments | float:
        """What is known of a variable."""
        return self.values[self.variables.index(variable)]


def distribution_of(variable: Variable, distribution: Distribution) -> Moments | float:
    """Returns the moments of a variable, or its value if it has only one."""
    if variable.nodes is not None:
        return Moments(0.0, 1.0)
    return distribution(variable)


def keyed(expression: Expression, distribution: Distribution) -> Keyed:
    """Returns an expression with what it depends on."""
    program, found = _program(expression)
    values = tuple(distribution_of(one, distribution) for one in found)
    return Keyed(program, values, expression, found)


@_kept
def _program(expression: Expression) -> tuple[tuple[Hashable, ...], tuple[Variable, ...]]:
    places: dict[Expression, int] = {}
    found: dict[Variable, int] = {}
    axes: dict[frozenset[Any], int] = {}
    steps: list[Hashable] = []

    for one in parts(expression):
        step: Hashable
        if isinstance(one, Variable):
            number = found.setdefault(one, len(found))
            nodes = None if one.nodes is None else _fingerprint(one)
            step = ("variable", number, one.kind if nodes or one.kind == "output" else "", nodes)
        elif isinstance(one, Constant):
            step = ("constant", repr(one.value))
        elif isinstance(one, Apply):
            step = (one.name, *(places[operand] for operand in one.operands))
        elif isinstance(one, Statistic):
            number = axes.setdefault(one.axes, len(axes))
            step = ("statistic", one.name, places[one.operand], number, one.count, one.units)
        else:
            step = ("unknown",)
        places[one] = len(steps)
        steps.append(step)
    # Only which axes run along others matters, as many labels as they may have.
    within = ((place, axes[other]) for one, place in axes.items() for other in axes if one < other)
    return (*steps, *within), tuple(found)


def same_function(one: Expression, other: Expression) -> bool:
    """Whether two expressions are the same function of the same variables."""
    return one is other or _program(one) == _program(other)


def _fingerprint(variable: Variable) -> Hashable:
    weights = None if variable.weights is None else np.asarray(variable.weights).tobytes()
    if variable.kind == "normal":
        return variable.nodes
    return hash((np.asarray(variable.nodes).tobytes(), weights))
