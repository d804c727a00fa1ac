"""Matrix products, convolutions and lookups: layers where one side is a weight, else products."""

import math
from collections.abc import Sequence

import numpy as np

from archscale_jax._expressions import (
    UNKNOWN,
    Constant,
    Expression,
    Variable,
    multiplied,
)
from archscale_jax._graph import Operator
from archscale_jax.tracing.axes import dot_axes, free_axes, gathered
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.primitives.elementwise import made_of_params, neutral_value
from archscale_jax.tracing.primitives.layer import Contraction, check_split, layer, learned_features
from archscale_jax.tracing.primitives.mixtures import (
    check_kernels,
    constant_product,
    mixed_by_constants,
    of_features,
    over_units,
    product_of,
)
from archscale_jax.tracing.primitives.registry import register_primitive
from archscale_jax.tracing.primitives.reshuffles import like, part_of
from archscale_jax.tracing.sharding import whole_shape
from archscale_jax.tracing.state import Call, State
from archscale_jax.tracing.values import (
    NO_LABELS,
    Axes,
    Feature,
    Known,
    Labels,
    Value,
    Weight,
    changed,
)

# Matrix products.


@register_primitive("dot_general")
def dot(state: State, call: Call) -> Value | list[Value]:
    """A layer where one side is a weight; else a product or mixture of features."""
    left, right = call.values
    sides = [side for side, value in enumerate(call.values) if isinstance(value, Weight)]
    axes = dot_axes(call.equation, left.axes, right.axes)
    if len(sides) == 2:
        return _weights(state, call, axes)
    if len(sides) == 1:
        return _weighted(state, call, sides[0], axes)
    if isinstance(left, Feature) and isinstance(right, Feature):
        return of_features(state, call, axes)
    if isinstance(left, Known) and isinstance(right, Known):
        return Known(constant_product(call), axes)
    return mixed_by_constants(state, call, axes)


def _weighted(state: State, call: Call, side: int, axes: Axes) -> Value:
    weight, source = call.values[side], call.values[1 - side]
    assert isinstance(weight, Weight)
    contracted, batch = (pair[side] for pair in call.parameters["dimension_numbers"])
    free = free_axes(len(weight.axes), contracted, batch)
    single = all(call.shapes[side][axis] == 1 for axis in free)
    # Nothing is summed, and every feature has weights of its own: a scale, as h[..., None] * w.
    if not contracted and (batch or single) and isinstance(source, Feature):
        return _scaled(state, call, weight, source, tuple(batch), axes)
    other_contracted = call.parameters["dimension_numbers"][0][1 - side]
    chosen = len(other_contracted) == 1 and source.axes[other_contracted[0]] & _hot(source)
    if chosen and isinstance(source, Feature):
        rows, features = tuple(contracted), tuple(free)
        return _looked_up(state, call, weight, source, rows, features, axes, side)
    if chosen:
        return _chosen_rows(call, weight, side, axes)
    other_batch = call.parameters["dimension_numbers"][1][1 - side]
    along = tuple((source.axes[axis], call.shapes[1 - side][axis]) for axis in other_batch)
    how = Contraction(tuple(contracted), tuple(batch), tuple(free), along=along)
    labels = frozenset().union(*(source.axes[axis] for axis in other_contracted))
    return layer(
        state, call, weight, source, Operator.LINEAR, how, _places(call, side, axes), labels, side
    )


def _hot(value: Value) -> Labels:
    return NO_LABELS if isinstance(value, Weight) else value.one_hot


def _chosen_rows(call: Call, weight: Weight, side: int, axes: Axes) -> Value:
    """Rows of a parameter at places that no input decides, chosen by a product."""
    (row,) = call.parameters["dimension_numbers"][0][side]
    own = _places(call, side, axes)[1]
    found = tuple(
        frozenset(one for one in labels if isinstance(one, tuple))
        if place in own
        else weight.axes[row]
        if call.shape[place] > 1
        else NO_LABELS
        for place, labels in enumerate(axes)
    )
    return changed(like(call.of([weight]), weight, found), slices=weight.slices)


def _places(call: Call, side: int, axes: Axes) -> tuple[Axes, list[int]]:
    """The labels of a product, and which of its axes are the weight's own."""
    (contracted, batch) = call.parameters["dimension_numbers"]
    ranks = [len(shape) for shape in call.shapes]
    own = ranks[side] - len(contracted[side]) - len(batch[side])
    start = len(batch[0]) + (0 if side == 0 else ranks[0] - len(contracted[0]) - len(batch[0]))
    return axes, list(range(start, start + own))


def _scaled(
    state: State, call: Call, weight: Weight, source: Feature, batch: tuple[int, ...], axes: Axes
) -> Value:
    numbers = state.use(
        call, weight, "scale", source.vertex, {"batch": batch},
        neutral=neutral_value(weight.expression, weight.leaves[0]), known=False,
    )  # fmt: skip
    return changed(
        source,
        expression=multiplied(source.expression, weight.expression),
        axes=axes,
        passed=source.passed | frozenset(numbers),
        bare=False,
        array=None,
    )


def _looked_up(state, call, weight, source, contracted, free, axes, side) -> Value:
    """A product with one-hot rows chooses rows."""
    result = _table(state, call, weight, source, contracted, free, axes)
    return changed(result, axes=_labelled(state, axes, _places(call, side, axes)[1], result))


def _labelled(state: State, axes: Axes, own: Sequence[int], result: Feature) -> Axes:
    del result
    found = list(axes)
    for place in own:
        found[place] = frozenset([state.unit_label()])
    return tuple(found)


def _table(
    state: State,
    call: Call,
    weight: Weight,
    index: Feature,
    rows: Sequence[int],
    features: Sequence[int],
    axes: Axes,
) -> Feature:
    check_split(state, call, weight)
    result = state.new_vertex(Kind.LAYER, axes)
    edge = state.flow.add_edge(
        index.vertex, result.vertex, Operator.LINEAR, before=index.expression, passed=index.passed
    )
    if not state.is_data(index):
        edge.before = _unit(index)
    state.inputs_read |= index.inputs
    shape = whole_shape(weight, call.shapes[call.values.index(weight)])
    fan_out = math.prod(shape[axis] for axis in features)
    roles = {"positions": list(rows), "output": list(features)}
    numbers = state.use(
        call, weight, "embedding", result.vertex, roles,
        edge=edge, fan_out=fan_out, expression=weight.expression,
    )  # fmt: skip
    state.layers[result.vertex] = numbers
    return changed(result, bare=True)


def _unit(index: Feature) -> Expression:
    """An index computed from features chooses one row: of second moment 1, as an input does."""
    return Variable("vertex", index.vertex)


def _weights(state: State, call: Call, axes: Axes) -> Value | list[Value]:
    """Two values made of params: a kernel of low rank, or learned features that a layer reads."""
    contracted = call.parameters["dimension_numbers"][0]
    inner = math.prod(call.shapes[0][axis] for axis in contracted[0])
    outer = [math.prod(shape) // max(inner, 1) for shape in call.shapes]
    shared = set(call.weights[0].leaves) & set(call.weights[1].leaves)
    if not contracted[0] or inner < min(outer) or shared:
        left, right = call.weights
        expression = product_of(state, call, left.expression, right.expression)
        return made_of_params(call, expression, axes)
    # A kernel maps features to about as many; learned features are few or many, and come first in
    # x @ W where that does not tell.
    apart = [abs(math.log(max(size, 1) / max(inner, 1))) for size in outer]
    side = 0 if apart[0] < apart[1] else 1
    features = call.values[1 - side]
    assert isinstance(features, Weight)
    learned = learned_features(state, call, features)
    values = list(call.values)
    values[1 - side] = learned
    call = call.of(values)
    return dot(state, call)


@register_primitive("ragged_dot", "ragged_dot_general")
def ragged_dot(state: State, call: Call) -> Value:
    """Rows of features, each times the matrix of its group: experts."""
    source, weight = call.values[:2]
    axes = (source.axes[0], NO_LABELS)
    if not isinstance(weight, Weight):
        if isinstance(source, Feature) and isinstance(weight, Feature):
            product = multiplied(source.expression, weight.expression)
            return state.join(Kind.PRODUCT, [source, weight], axes, expression=product)
        raise state.fail(call, "its groups are not parameters; write it as an einsum")
    how = Contraction((1,), (0,), (2,))
    return layer(state, call, weight, source, Operator.LINEAR, how, (axes, [1]), source.axes[1], 1)


@register_primitive("conv_general_dilated")
def convolution(state: State, call: Call) -> Value:
    """A convolution with a learned kernel, with features as the kernel, or with a fixed filter."""
    data, kernel = call.values
    numbers = call.parameters["dimension_numbers"]
    axes: list[Labels] = [NO_LABELS] * len(call.shape)
    for ours, theirs in zip(numbers.out_spec, numbers.lhs_spec, strict=True):
        axes[ours] = data.axes[theirs]
    if isinstance(kernel, Weight) and not isinstance(data, Weight):
        return _convolved(state, call, kernel, data, axes)
    if isinstance(data, Weight) and isinstance(kernel, Known | Weight):
        return made_of_params(call, data.expression, tuple(axes))
    if isinstance(data, Feature) and isinstance(kernel, Feature):
        summed = numbers.rhs_spec[1]
        check_kernels(state, call, (NO_LABELS, kernel.axes[summed]))
        count = math.prod(call.shapes[1]) // call.shapes[1][numbers.rhs_spec[0]]
        expression = over_units(state, data, kernel, kernel.axes[summed], count)
        if data.vertex == kernel.vertex:
            return changed(data, expression=expression, axes=tuple(axes), array=None)
        return state.join(Kind.PRODUCT, [data, kernel], tuple(axes), expression=expression)
    if isinstance(data, Weight):
        raise state.fail(call, "features convolve a parameter; bind it to the function, or write "
                         "the features first", [data])  # fmt: skip
    if isinstance(data, Feature):
        state.note(f"{call.name} at {call.line}: a fixed filter is taken to keep second moments")
        return changed(data, axes=tuple(axes), array=None, bare=False)
    return Known(UNKNOWN, tuple(axes))


def _convolved(
    state: State, call: Call, kernel: Weight, data: Feature | Known, axes: list[Labels]
) -> Value:
    numbers, parameters = call.parameters["dimension_numbers"], call.parameters
    shape = whole_shape(kernel, call.shapes[1])
    out_axis, in_axis, *spatial_axes = numbers.rhs_spec
    spatial = tuple(shape[axis] for axis in spatial_axes)
    groups = parameters["feature_group_count"]
    fan_in = shape[in_axis] * math.prod(spatial)
    how = Contraction(
        contracted=(in_axis, *spatial_axes),
        batch=(),
        free=(out_axis,),
        spatial=spatial,
        positions=tuple(spatial_axes),
        groups=groups,
        reach=fan_in / math.prod(parameters["lhs_dilation"]),
        covered=_covered(call, spatial),
    )
    place = numbers.out_spec[1]
    labels = data.axes[numbers.lhs_spec[1]]
    return layer(state, call, kernel, data, Operator.CONV, how, (tuple(axes), [place]), labels, 1)


def _covered(call: Call, spatial: tuple[int, ...]) -> float:
    """The part of a kernel's positions that meets the image, averaged over the outputs."""
    numbers, parameters = call.parameters["dimension_numbers"], call.parameters
    covered = 1.0
    for place, size in enumerate(spatial):
        image = call.shapes[0][numbers.lhs_spec[2 + place]]
        outputs = call.shape[numbers.out_spec[2 + place]]
        spread = parameters["lhs_dilation"][place]
        starts = np.arange(outputs) * parameters["window_strides"][place]
        starts = starts - parameters["padding"][place][0]
        places = starts[:, None] + np.arange(size) * parameters["rhs_dilation"][place]
        met = (places >= 0) & (places <= (image - 1) * spread) & (places % spread == 0)
        covered *= min(float(met.mean()) * spread, 1.0) if met.size else 1.0
    return covered


# Lookups.


@register_primitive("gather")
def gather(state: State, call: Call) -> Value:
    """Rows of a table by ids; or some entries of an array."""
    table, index = call.values[:2]
    axes = gathered(call.equation, table.axes, index.axes)
    numbers = call.parameters["dimension_numbers"]
    if isinstance(table, Weight) and isinstance(index, Feature):
        rows = _taken_one_by_one(call)
        features = [axis for axis in range(len(table.axes)) if axis not in rows]
        result = _table(state, call, table, index, rows, features, axes)
        own = [
            place for place in numbers.offset_dims if call.shape[place] > 1 or len(features) == 1
        ]
        return changed(result, axes=_labelled(state, axes, own, result))
    if isinstance(table, Known):
        if isinstance(index, Feature):
            return changed(index, expression=UNKNOWN, axes=axes, array=None, mask=False)
        constant = isinstance(table.expression, Constant)
        return Known(table.expression if constant else _picked(table, index), axes)
    if isinstance(table, Weight):
        return _rows(state, call, table, index, axes)
    cuts: list[tuple] = []
    for axis, labels in enumerate(table.axes):
        taken = call.parameters["slice_sizes"][axis]
        if taken != call.shapes[0][axis] and state.has_units(labels):
            cuts.append((tuple(sorted(labels, key=repr)), state.fresh()))
    expression = part_of(state, table, cuts)
    return changed(table, expression=expression, axes=axes, array=None, bare=False)


def _taken_one_by_one(call: Call) -> list[int]:
    """Axes of the table of which every index chooses one entry."""
    sizes = call.parameters["slice_sizes"]
    collapsed = call.parameters["dimension_numbers"].collapsed_slice_dims
    return [
        axis
        for axis, (size, whole) in enumerate(zip(sizes, call.shapes[0], strict=True))
        if axis in collapsed or size == 1 != whole
    ]


def _picked(table: Known, index: Value) -> Expression:
    expression = table.expression
    if isinstance(expression, Variable) and expression.kind == "index":
        return index.expression if isinstance(index, Known) else UNKNOWN
    return expression


def _rows(state: State, call: Call, table: Weight, index: Value, axes: Axes) -> Value:
    """Entries of a parameter at places that no input decides: a slice, or a relative position."""
    numbers = call.parameters["dimension_numbers"]
    collapsed = [axis for axis in _taken_one_by_one(call) if call.shapes[0][axis] > 1]
    found = list(axes)
    positions = [
        place
        for place in range(len(axes))
        if place not in numbers.offset_dims and call.shape[place] > 1
    ]
    slices = table.slices
    for axis in collapsed:
        if positions:
            for place in positions:
                found[place] = table.axes[axis]
        elif len(collapsed) == 1 and isinstance(index.expression, Constant):
            entry = int(np.ravel(index.expression.value)[0])
            slices |= {
                (leaf, own, entry % state.shapes[leaf][own]) for leaf, own in table.axes[axis]
            }
    found = [frozenset(one for one in labels if isinstance(one, tuple)) for labels in found]
    result = like(call, table, tuple(found))
    assert isinstance(result, Weight)
    return changed(result, slices=slices, rows=bool(positions))
