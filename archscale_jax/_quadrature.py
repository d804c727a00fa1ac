"""Moments of one entry of an array, by quadrature of what was traced (theory §9).

    moments(relu(z)) = (0.399, 0.5) for z ~ N(0, 1)

An average over the features of a layer converges to its expectation, by which a normalization is
one whatever its spelling. An average over positions (pixels, tokens, examples) is the expectation
where it is compared with the features that it was taken of, and where it stands alone, as a pool,
it is taken as if all positions held the same.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from archscale_jax._expressions import (
    ONE,
    Apply,
    Constant,
    Distribution,
    Expression,
    Keyed,
    Moments,
    Statistic,
    Unknown,
    Variable,
    distribution_of,
    evaluated,
    keyed,
    multiplied,
    replaced,
    statistics,
    times,
    variables,
)


def moments(expression: Expression, distribution: Distribution) -> Moments:
    """Returns the moments of an expression by quadrature.

    Args:
      expression: what to integrate.
      distribution: of its variables that have no nodes.

    Returns:
      Mean and second moment; NaN where a function is undefined on what it gets.
    """
    if isinstance(expression, Unknown):
        return Moments(0.0, 1.0)
    if isinstance(expression, Variable) and expression.nodes is None:
        found = distribution(expression)
        return found if isinstance(found, Moments) else Moments(found, found**2)
    return _moments(keyed(expression, distribution))


@functools.lru_cache(maxsize=8192)
def _moments(one: Keyed) -> Moments:
    split = _split(one.expression, one.distribution)
    if split is not None:
        return split
    return _integrated(_settled(one.expression, one.distribution), one.distribution)


def _split(expression: Expression, distribution: Distribution) -> Moments | None:
    """Products and sums of independent expressions, which need no joint quadrature."""
    if not isinstance(expression, Apply) or expression.name not in _SPLIT:
        return None
    if len(expression.operands) == 1:
        mean, second = moments(expression.operands[0], distribution)
        return Moments(-mean, second)
    one, other = expression.operands
    shared = variables(one) & variables(other)
    if any(isinstance(distribution_of(v, distribution), Moments) for v in shared):
        return None
    alone = [part for part in (one, other) if not (variables(part, raw=True) or _is_constant(part))]
    if alone and variables(expression, raw=True):
        return None  # a statistic in the company of features is an expectation
    (m1, s1), (m2, s2) = moments(one, distribution), moments(other, distribution)
    if expression.name == "mul":
        return Moments(m1 * m2, s1 * s2)
    sign = -1 if expression.name == "sub" else 1
    return Moments(m1 + sign * m2, s1 + s2 + sign * 2 * m1 * m2)


_SPLIT = ("mul", "add", "sub", "neg", "add_any")


def _is_constant(expression: Expression) -> bool:
    return not variables(expression)


def _settled(expression: Expression, distribution: Distribution) -> Expression:
    """Replaces statistics: by expectations beside features, by what they are taken of alone."""
    found = statistics(expression)
    if not found:
        return expression
    values: dict[Statistic, Expression] = {
        one: weighted for one in found if (weighted := _weighted_mean(one))
    }
    if values:
        return _settled(replaced(expression, values), distribution)
    varying = any(
        isinstance(distribution_of(one, distribution), Moments)
        for one in variables(expression, raw=True)
    )
    alone = [] if varying else [one for one in found if _is_pool(one, units=True)]
    if not varying and not alone:
        alone = [one for one in found if _is_pool(one, units=False)]
    beside = variables(expression, raw=True)
    for one in found:
        apart = varying and one.name == "mean" and not variables(one) & beside
        if not one.units and (one in alone or (apart and _is_pool(one, units=False))):
            values[one] = one.operand
        elif one.units and (one in alone or apart):
            values[one] = _over_units(one, distribution)
        else:
            values[one] = Constant(_expectation(one, distribution))
    settled = replaced(expression, values)
    # Pools of expressions that hold statistics themselves are settled in turn.
    return _settled(settled, distribution) if statistics(settled) else settled


def _over_units(statistic: Statistic, distribution: Distribution) -> Expression:
    """A statistic of independent entries: normal, or a number where it hardly varies."""
    if statistic.name == "mean":
        mean, second = moments(statistic.operand, distribution)
        variance = (second - mean**2) / statistic.count
    else:
        mean, second, _ = _extreme(statistic, distribution)
        variance = second - mean**2
    deviation = math.sqrt(max(variance, 0.0))
    if deviation <= 1e-3 * abs(mean):
        return Constant(mean)
    return Variable("normal", statistic, nodes=(mean, deviation))


def _is_pool(statistic: Statistic, *, units: bool) -> bool:
    """Whether a statistic that stands alone is features; what sums to one over its axis is not."""
    normalized = sums_to_one(statistic.operand, statistic.axes)
    return statistic.units == units and not (normalized and not statistic.units)


def sums_to_one(expression: Expression, axes: frozenset[Any]) -> bool:
    """Whether an expression is divided by its mean over positions, as weights of an average are."""
    means = (one for one in statistics(expression) if one.name == "mean" and not one.units)
    return any(one.axes <= axes for one in means)


def _weighted_mean(statistic: Statistic) -> Expression | None:
    """The product of means that a mean over positions of weights times features is taken for."""
    operand = statistic.operand
    if statistic.units or not isinstance(operand, Apply) or operand.name != "mul":
        return None
    weights = [sums_to_one(one, statistic.axes) for one in operand.operands]
    if sum(weights) != 1:
        return None
    features = operand.operands[weights.index(False)]
    if not variables(features, raw=True):
        return None
    return multiplied(*(dataclasses.replace(statistic, operand=one) for one in operand.operands))


def _expectation(statistic: Statistic, distribution: Distribution) -> float:
    """What a statistic is beside what varies with it.

    Extremes have the median, which a mask of -1e9 does not move; softmax divides it out again.
    """
    if statistic.name == "mean":
        return moments(statistic.operand, distribution).mean
    return _extreme(statistic, distribution).median


class Extreme(NamedTuple):
    """The largest or smallest of independent values."""

    mean: float
    second: float
    median: float


def _extreme(statistic: Statistic, distribution: Distribution) -> Extreme:
    sign = 1.0 if statistic.name == "max" else -1.0
    found = _largest(keyed(times(statistic.operand, sign), distribution), statistic.count)
    return Extreme(sign * found.mean, found.second, sign * found.median)


@functools.lru_cache(maxsize=8192)
def _largest(one: Keyed, count: int) -> Extreme:
    """The largest of so many values, whose distribution is that of one to that power."""
    result, weight = _sampled(_settled(one.expression, one.distribution), one.distribution)
    order = np.argsort(result, axis=None)
    result, below = result.ravel()[order], np.cumsum(weight.ravel()[order]) ** count
    mass = np.diff(below, prepend=0.0)
    median = result[np.searchsorted(below, 0.5)]
    return Extreme(float(mass @ result), float(mass @ result**2), float(median))


_NEGLIGIBLE = 1e-6
"""Probability below which it does not matter that a function is undefined."""


def _integrated(expression: Expression, distribution: Distribution) -> Moments:
    result, weight = _sampled(expression, distribution)
    return Moments(float(np.sum(weight * result)), float(np.sum(weight * result**2)))


def _sampled(expression: Expression, distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Values of an expression without statistics, and their probabilities."""
    found = sorted(variables(expression), key=repr)
    known = {one: distribution_of(one, distribution) for one in found}
    values: dict[Variable, Any] = {
        one: value for one, value in known.items() if not isinstance(value, Moments)
    }
    random = {one: value for one, value in known.items() if isinstance(value, Moments)}
    weight: Any = np.ones(())
    nodes_of = _nodes(random) if random else []
    for (variable, moment), (nodes, weights) in zip(random.items(), nodes_of, strict=True):
        values[variable] = _drawn(variable, moment, nodes)
        weight = weight * weights
    with np.errstate(all="ignore"):
        result = np.real(evaluated(expression, values).astype(complex))
    weight, result = np.broadcast_arrays(weight, result)
    weight = weight / np.sum(weight)
    defined = np.isfinite(result)
    if np.sum(weight[defined]) > 1 - _NEGLIGIBLE:  # else, as the log of half of all values, NaN
        weight, result = weight[defined], result[defined]
    return result, weight


def _nodes(random: Mapping[Variable, Moments]) -> list[tuple[Any, Any]]:
    """Nodes and weights of every variable: a grid of one or two, a sequence of more.

    Nodes are standard normal, or of a variable with nodes of its own their indices. For smooth
    functions the trapezoidal rule converges faster than any power of its spacing, and with a node
    at 0 it is exact for the squares of ReLU; weights in turn larger and smaller, those of Simpson's
    rule, make it so for ReLU too.
    """
    count = len(random)
    if count > 2:
        return [(points, 1.0) for points in _sequence(count)]
    found = []
    for place, variable in enumerate(random):
        if _is_discrete(variable):
            values = np.asarray(variable.nodes)
            step = max(len(values) // 512, 1)
            nodes = np.arange(len(values))[step // 2 :: step]
            weights = np.ones(len(nodes)) if variable.weights is None else variable.weights[nodes]
        else:
            nodes, weights = _trapezoid(count)
        shape = tuple(-1 if axis == place else 1 for axis in range(count))
        found.append((nodes.reshape(shape), np.asarray(weights).reshape(shape)))
    return found


def _is_discrete(variable: Variable) -> bool:
    return variable.nodes is not None and variable.kind != "normal"


@functools.cache
def _trapezoid(count: int) -> tuple[np.ndarray, np.ndarray]:
    half, spacing = ((6000, 0.002), (100, 0.08))[count - 1]
    indices = np.arange(-half, half + 1)
    points = indices * spacing
    return points, np.where(indices % 2, 4 / 3, 2 / 3) * np.exp(-(points**2) / 2)


@functools.cache
def _sequence(count: int) -> list[np.ndarray]:
    """Sobol's points in the unit cube, kept from its faces."""
    from scipy.stats import qmc

    return list(np.clip(qmc.Sobol(count, seed=0).random_base2(14), 1e-9, 1 - 1e-9).T)


def _drawn(variable: Variable, moment: Moments, nodes: np.ndarray) -> np.ndarray:
    cube = nodes.ndim == 1 and nodes.dtype != int and len(nodes) == 2**14
    if _is_discrete(variable):
        values = np.asarray(variable.nodes)
        if cube:
            weights = np.ones(len(values)) if variable.weights is None else variable.weights
            nodes = np.searchsorted(np.cumsum(weights) / np.sum(weights), nodes)
        return values[np.clip(nodes, 0, len(values) - 1)]
    normal = nodes
    if cube:
        from scipy.special import ndtri  # slow to import

        normal = ndtri(nodes)
    if variable.kind == "normal":
        mean, deviation = variable.nodes
        return mean + deviation * normal
    return moment.mean + math.sqrt(moment.variance) * normal


# What kind of function an expression is.


def is_affine(expression: Expression, distribution: Distribution) -> bool:
    """Whether an expression is affine in its variables, with statistics held fixed."""
    raw = [
        one
        for one in variables(expression, raw=True)
        if one.kind in ("vertex", "output", "data") and isinstance(distribution(one), Moments)
    ]
    if not raw:
        return True
    return len(raw) == 1 and slope(expression, raw[0], distribution) is not None


def slope(expression: Expression, variable: Variable, distribution: Distribution) -> float | None:
    """Returns the factor of a variable that an expression is affine in; None if it is not.

    Other variables are held at values that are not special.
    """
    if expression == variable:
        return 1.0
    if variable not in variables(expression):
        return 0.0
    one = keyed(expression, distribution)
    return _slope(one, one.variables.index(variable))


@functools.lru_cache(maxsize=8192)
def _slope(one: Keyed, place: int) -> float | None:
    expression, variable, distribution = one.expression, one.variables[place], one.distribution
    held = {each: Constant(_expectation(each, distribution)) for each in statistics(expression)}
    held = {each: value if math.isfinite(value.value) else ONE for each, value in held.items()}
    fixed = replaced(expression, held)
    others = sorted(variables(fixed) - {variable}, key=repr)
    values: dict[Variable, Any] = {}
    for number, other in enumerate(others):
        value = distribution_of(other, distribution)
        special = 0.37 + 0.21 * number
        values[other] = value if isinstance(value, float) else special
    discrete = {other: np.ravel(other.nodes) for other in others if _is_discrete(other)}
    for part in _PARTS_OF_NODES:
        chosen = {other: _node(nodes, part) for other, nodes in discrete.items()}
        found = _affine(fixed, variable, values | chosen)
        if found != 0 or not discrete:
            return found
    return 0.0


_PARTS_OF_NODES = (1 / 3, *np.linspace(0, 1, 33).tolist())
"""Where among the values of a discrete variable one is taken: a mask is 0 at most of them."""


def _node(nodes: np.ndarray, part: float) -> Any:
    """One of the values, not 0 if there are others, as what it multiplies would vanish."""
    if part == _PARTS_OF_NODES[0] and len(filled := np.flatnonzero(nodes)):
        return nodes[filled[len(filled) // 3]]
    return nodes[round(part * (len(nodes) - 1))]


def _affine(
    expression: Expression, variable: Variable, values: dict[Variable, Any]
) -> float | None:
    """The factor of a variable at values of the others; None if the expression is not affine."""
    points = np.array([-2.3, -1.1, -0.4, 0.3, 0.9, 2.1])
    with np.errstate(all="ignore"):
        try:
            result = np.broadcast_to(evaluated(expression, values | {variable: points}), (6,))
        except (TypeError, KeyError):
            return None
        result = np.real(result.astype(complex))
    factor = (result[-1] - result[0]) / (points[-1] - points[0])
    line = result[0] + factor * (points - points[0])
    size = max(np.abs(result).max(), abs(factor))
    close = np.isfinite(result).all() and np.allclose(result, line, atol=1e-5 * size, rtol=0)
    return float(factor) if close else None
