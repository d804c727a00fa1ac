"""Operations that take many entries to one: sums, extremes, pools, cumulative sums."""

import math
from typing import Any

import numpy as np

from archscale_jax._expressions import (
    UNKNOWN,
    Constant,
    Expression,
    Moments,
    Statistic,
    times,
    variables,
)
from archscale_jax._graph import Operator
from archscale_jax._quadrature import moments
from archscale_jax.tracing.axes import dtype_of, moved, shape_of
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.primitives.elementwise import made_of_params
from archscale_jax.tracing.primitives.layer import Contraction, layer
from archscale_jax.tracing.primitives.registry import register_primitive
from archscale_jax.tracing.state import Call, State, mean_over
from archscale_jax.tracing.values import Feature, Known, OuterProduct, Value, changed


@register_primitive("reduce_sum", "reduce_max", "reduce_min")
def reduction(state: State, call: Call) -> Value:
    """A sum is the mean times the number of entries; extremes stand for their axis."""
    (value,) = call.values
    reduced = call.parameters["axes"]
    # A product that is read again, as by a normalization, is not part of a matrix product.
    alone = call.equation.invars[0] in call.finished
    if call.name == "reduce_sum" and alone and isinstance(value, Feature) and value.outer:
        product = _matrix_product(state, call, value, value.outer)
        if product is not None:
            return product
    labels = (
        frozenset().union(*(value.axes[axis] for axis in reduced)) if value.axes else frozenset()
    )
    sizes = [call.shapes[0][axis] for axis in reduced]
    varying = [s for axis, s in zip(reduced, sizes, strict=True) if value.axes and value.axes[axis]]
    name = {"reduce_max": "max", "reduce_min": "min"}.get(call.name, "mean")
    expression = mean_over(state, value.expression, labels, math.prod(varying), name)
    if isinstance(value, Known) and isinstance(expression, Statistic):
        expression = _of_constants(expression)
    if call.name == "reduce_sum":
        expression = times(expression, math.prod(sizes))
    axes = moved(call.equation, value.axes)
    if isinstance(value, Feature):
        kept = changed(value, expression=expression, axes=axes, array=None, bare=False)
        return changed(kept, one_hot=frozenset())
    return made_of_params(call, expression, axes) if call.weights else Known(expression, axes)


def _matrix_product(state: State, call: Call, value: Feature, outer: OuterProduct) -> Value | None:
    """A layer that is written as a product of entries and a sum; None if it is not a layer."""
    weight, feature, reduced = outer.weight, outer.feature, call.parameters["axes"]
    places = range(len(weight.axes))
    sums = all(
        weight.axes[axis] and (state.has_units(feature.axes[axis]) or state.is_data(feature))
        for axis in reduced
    )
    changed = value.expression is not outer.expression or value.axes is not outer.axes
    if not sums or changed:
        return None
    written = [axis for axis in places if weight.axes[axis] and not feature.axes[axis]]
    shared = [axis for axis in places if weight.axes[axis] and axis not in (*reduced, *written)]
    kept = [axis for axis in places if axis not in reduced]
    axes = tuple(feature.axes[axis] for axis in kept)
    along = tuple((feature.axes[axis], call.shapes[0][axis]) for axis in shared)
    how = Contraction(tuple(reduced), tuple(shared), tuple(written), along=along)
    labels = frozenset().union(*(feature.axes[axis] for axis in reduced))
    # What was noted as the use of a scale is the use of a matrix.
    noted = value.passed - feature.passed
    for number in noted:
        state.replaced.add(number)
    own = [kept.index(axis) for axis in written]
    return layer(state, call, weight, feature, Operator.LINEAR, how, (axes, own), labels, 0)


def _of_constants(statistic: Statistic) -> Expression:
    """The mean of what neither inputs nor params reach, at once."""
    if statistic.name == "mean" and all(one.nodes is not None for one in variables(statistic)):
        return Constant(moments(statistic.operand, lambda variable: Moments(0.0, 1.0)).mean)
    return UNKNOWN


@register_primitive("reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "reduce", "pmax",
                    "pmin", "cholesky", "eig", "eigh", "householder_product", "lu", "qr", "schur",
                    "svd",
                    "triangular_solve", "tridiagonal", "tridiagonal_solve", "custom_linear_solve",
                    "symmetric_product", "hessenberg", "geqrf", "geqp3", "ormqr")  # fmt: skip
def opaque(state: State, call: Call) -> list[Value]:
    """Functions of whole arrays, such as decompositions, whose moments are not known."""
    return [
        _unknown_function(state, call, shape_of(variable), dtype_of(variable))
        for variable in call.equation.outvars
    ]


@register_primitive("argmax", "argmin", "sort", "top_k", "approx_top_k")
def choice(state: State, call: Call) -> list[Value]:
    """Places of extremes are indices; sorted values are values."""
    results: list[Value] = []
    if call.name in ("top_k", "approx_top_k", "sort") and any(
        not state.is_data(one) for one in call.features
    ):
        state.note(
            f"{call.name} at {call.line}: what is chosen by size is taken to have the second "
            "moment of what it is chosen from"
        )
    for place, variable in enumerate(call.equation.outvars):
        value = call.values[min(place, len(call.values) - 1)]
        indices = not np.issubdtype(dtype_of(variable), np.inexact)
        results.append(_of_shape(state, call, value, len(shape_of(variable)), indices))
    return results


def _of_shape(state: State, call: Call, value: Value, rank: int, indices: bool) -> Value:
    axes = value.axes
    if len(axes) != rank:
        axes = moved(call.equation, axes)
        axes = axes if len(axes) == rank else (frozenset(),) * rank
    if isinstance(value, Known):
        return Known(UNKNOWN, axes)
    expression = UNKNOWN if indices else value.expression
    return changed(value, expression=expression, axes=axes, array=None)


def _unknown_function(state: State, call: Call, shape: tuple[int, ...], dtype: Any) -> Value:
    value = next(iter([*call.features, *call.weights]), call.values[0])
    axes = moved(call.equation, value.axes)
    axes = axes if len(axes) == len(shape) else (frozenset(),) * len(shape)
    if isinstance(value, Feature):
        if np.issubdtype(dtype, np.inexact):
            state.note(f"{call.name} at {call.line}: its second moment is not known, taken as 1")
        return changed(value, expression=UNKNOWN, axes=axes, array=None, bare=False)
    return made_of_params(call, UNKNOWN, axes) if call.weights else Known(UNKNOWN, axes)


@register_primitive("cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod")
def cumulative(state: State, call: Call) -> Value:
    """Sums of what came before, whose number differs by place."""
    (value,) = call.values
    if isinstance(value, Feature) and not state.is_data(value):
        state.note(
            f"{call.name} at {call.line}: how much it adds up depends on the data; the second "
            "moment is taken as unchanged"
        )
    if isinstance(value, Known):
        return Known(UNKNOWN, value.axes)
    return changed(value, array=None)


@register_primitive("reduce_window_sum")
def average_pool(state: State, call: Call) -> Value:
    """An average pool, whose division by the size of its window follows."""
    (value,) = call.values
    window = call.parameters["window_dimensions"]
    expression = times(value.expression, math.prod(window))
    if not isinstance(value, Feature) or state.is_data(value) or max(window) == 1:
        return changed(value, expression=expression, array=None)
    result = state.new_vertex(Kind.LAYER, value.axes, bare=True)
    state.flow.add_edge(
        value.vertex,
        result.vertex,
        Operator.AVG_POOL,
        before=value.expression,
        kernel_size=max(window),
        passed=value.passed,
    )
    return changed(result, expression=times(result.expression, math.prod(window)))


@register_primitive("reduce_window_max", "reduce_window_min", "reduce_window",
                    "select_and_gather_add")  # fmt: skip
def extreme_pool(state: State, call: Call) -> Value:
    """The largest of a window: as if its entries were the same, as in an average pool."""
    value = next(iter(call.features), call.values[0])
    if isinstance(value, Feature) and not state.is_data(value):
        state.note(
            f"{call.name} at {call.line}: the largest of a window is taken to have the second "
            "moment of one entry; of independent entries it has more"
        )
        return changed(value, array=None, bare=False)
    return changed(value, array=None)
