"""Products and mixtures of features, and what constants make of them: attention, pools, gates."""

import math
from collections.abc import Sequence

import numpy as np

from archscale_jax._expressions import (
    UNKNOWN,
    ZERO,
    Apply,
    Constant,
    Expression,
    Moments,
    Statistic,
    Variable,
    multiplied,
    times,
    variables,
)
from archscale_jax._quadrature import moments
from archscale_jax.tracing.axes import free_axes
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.primitives.gates import note_gates
from archscale_jax.tracing.state import Call, State, mean_over
from archscale_jax.tracing.values import (
    NO_LABELS,
    Axes,
    Feature,
    Known,
    Labels,
    TraceError,
    Value,
    changed,
)


def product_of(state: State, call: Call, left: Expression, right: Expression) -> Expression:
    """Returns what an entry of a matrix product of two expressions is."""
    contracted = call.parameters["dimension_numbers"][0]
    count = math.prod(call.shapes[0][axis] for axis in contracted[0])
    labels = frozenset([("", 0)]) if count > 1 else NO_LABELS
    product = multiplied(left, right)
    return times(mean_over(state, product, labels, count), count)


def constant_product(call: Call) -> Expression:
    """Returns what an entry of a matrix product of constants is."""
    left, right = (value.expression for value in call.values)
    if isinstance(left, Constant) and isinstance(right, Constant):
        contracted = call.parameters["dimension_numbers"][0]
        count = math.prod(call.shapes[0][axis] for axis in contracted[0])
        return Constant(left.value * right.value * count)
    return UNKNOWN


def mixed_by_constants(state: State, call: Call, axes: Axes) -> Value:
    """Features multiplied with a constant matrix: a sum, an interpolation, a fixed transform."""
    side = 0 if isinstance(call.values[0], Feature) else 1
    feature, constant = call.values[side], call.values[1 - side]
    assert isinstance(feature, Feature)
    contracted = call.parameters["dimension_numbers"][0]
    count = math.prod(call.shapes[side][axis] for axis in contracted[side])
    labels = frozenset().union(*(feature.axes[axis] for axis in contracted[side]))
    expression = constant.expression
    if isinstance(expression, Constant):
        if np.all(expression.value == 0):
            return Known(ZERO, axes)
        mixed = mean_over(state, feature.expression, labels, count)
        mixed = times(mixed, count * float(expression))
    else:
        gain = _gain_of(expression, count, state.has_units(labels))
        if gain is None:
            state.note(
                f"{call.name} at {call.line}: features meet a constant matrix of unknown entries; "
                "their second moment is taken as unchanged"
            )
        mixed = times(feature.expression, 1.0 if gain is None else gain)
    return changed(feature, expression=mixed, axes=axes, array=None, bare=False)


def _gain_of(expression: Expression, count: int, units: bool) -> float | None:
    """How much larger features become that a constant matrix mixes."""
    found = variables(expression)
    if isinstance(expression, type(UNKNOWN)) or any(one.kind == "random" for one in found):
        return None
    mean, second = moments(expression, lambda variable: Moments(0.0, 1.0))
    independent = math.sqrt(count * second)
    return independent if units else max(abs(mean) * count, min(independent, 1.0))


def of_features(state: State, call: Call, axes: Axes) -> Value:
    """Reads a matrix product of features: attention, a bilinear form, a choice by inputs."""
    left, right = call.features
    contracted, batch = call.parameters["dimension_numbers"]
    sides = [
        frozenset().union(*(value.axes[axis] for axis in taken))
        for value, taken in zip(call.features, contracted, strict=True)
    ]
    count = math.prod(call.shapes[0][axis] for axis in contracted[0])
    deep = [one for one in (left, right) if not state.is_data(one)]
    if len(deep) == 1:  # inputs choose or add up features: neighbours in a graph, pooled tokens
        if contracted[0] and any(sides):
            state.note(
                f"{call.name} at {call.line}: inputs choose what is added up; the second moment is "
                "taken as unchanged"
            )
        return changed(deep[0], axes=axes, array=None, bare=False)
    check_kernels(state, call, sides)
    labels = sides[0] | sides[1]
    free = [
        free_axes(len(v.axes), c, b)
        for v, c, b in zip(call.features, contracted, batch, strict=True)
    ]
    for one, other in ((0, 1), (1, 0)):
        value = call.features[other]
        kept = frozenset().union(*(value.axes[axis] for axis in free[other]))
        moves = contracted[0] and state.has_units(kept) and not state.has_units(sides[other])
        if moves and _chooses(call.features[one].expression) and not _chooses(value.expression):
            state.note(
                f"{call.name} at {call.line}: features choose what is added up, as a router does; "
                "the second moment is taken as unchanged"
            )
            return changed(value, axes=axes, array=None, bare=False)
    of_queries = False
    if not contracted[0]:
        expression = multiplied(left.expression, right.expression)
    elif state.has_units(labels) or (not any(free) and left.vertex == right.vertex):
        expression = over_units(state, left, right, labels, count)
        of_queries = left.expression is not right.expression
        if of_queries:
            state.contracted |= {left.vertex, right.vertex}
    else:  # positions: each side by its mean, of which a softmax has 1 / count
        one, other = (
            mean_over(state, value.expression, side, count)
            for value, side in zip(call.features, sides, strict=True)
        )
        expression = times(multiplied(one, other), count)
    if left.vertex == right.vertex:
        if of_queries:
            state.note_logits(left.vertex, left.vertex, count)
        return changed(
            left, expression=expression, axes=axes, passed=left.passed | right.passed,
            inputs=left.inputs | right.inputs, bare=False, array=None,
        )  # fmt: skip
    result = state.join(Kind.PRODUCT, [left, right], axes, expression=expression)
    if of_queries:
        state.note_logits(result.vertex, left.vertex, count)
    kept, summed = (list(zip(*axes, strict=True)) for axes in (batch, contracted))
    note_gates(state, call, result.vertex, kept, summed)
    return result


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _chooses(expression: Expression) -> bool:
    """Whether an expression is a comparison, a one-hot, or a product or sum of such."""
    if isinstance(expression, Statistic):
        return _chooses(expression.operand)
    if isinstance(expression, Variable):
        return expression.kind == "index" and set(np.ravel(expression.nodes).tolist()) == {0, 1}
    if not isinstance(expression, Apply):
        return False
    if expression.name in _COMPARISONS:
        return True
    if expression.name.startswith("convert_element_type"):
        return _chooses(expression.operands[0])
    factors = [one for one in expression.operands if not isinstance(one, Constant)]
    return expression.name == "mul" and bool(factors) and all(map(_chooses, factors))


def check_kernels(state: State, call: Call, contracted: Sequence[Labels]) -> None:
    """Raises for kernels that features make of a matrix, or that an index chooses."""
    for value, labels in zip(call.features, contracted, strict=True):
        leaf = _chosen_matrix(state, value)
        if leaf and state.has_units(labels):
            raise TraceError(
                f"{call.name} of parameter {leaf!r} at {call.line}: its matrices are chosen by an "
                "index, as rows of a table are, and applied to features as kernels; choose them by "
                "a product with one-hots, as jnp.einsum('be,bi,eio->bo', jax.nn.one_hot(index, n), "
                "features, matrices), of which fan-in and role can be read"
            )
        for number in sorted(value.passed):
            if state.modulated.get(number, NO_LABELS) & labels:
                leaf = state.uses[number].leaf
                raise TraceError(
                    f"{call.name} of parameter {leaf!r} at {call.line}: features scale it, and "
                    "then it is applied to features as a kernel (a modulated or generated layer), "
                    "of which fan-in and role cannot be read; scale the features that it is "
                    "applied to instead, (features * scale) @ kernel"
                )


def _chosen_matrix(state: State, value: Feature) -> str | None:
    """The leaf of whose matrices an index chooses one, where the features are what it chose."""
    for number in state.layers.get(value.vertex, ()):
        use = state.uses[number]
        sizes = [state.shapes[use.leaf][axis] for axis in use.output]
        if use.kind == "embedding" and sum(size > 1 for size in sizes) > 1:
            return use.leaf
    return None


def over_units(
    state: State, left: Feature, right: Feature, labels: Labels, count: int
) -> Expression:
    """Returns what an entry of a sum of so many products of features is."""
    product = multiplied(left.expression, right.expression)
    return times(mean_over(state, product, labels or frozenset([state.unit_label()]), count), count)
