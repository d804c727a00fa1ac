"""Operations that move entries, cut and join arrays, and change no entry."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from archscale_jax._expressions import (
    UNKNOWN,
    Constant,
    Expression,
    Unknown,
    Variable,
    apply,
    same_function,
    substituted,
    times,
)
from archscale_jax.tracing.axes import moved
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.primitives.elementwise import made_of_params
from archscale_jax.tracing.primitives.registry import register_primitive
from archscale_jax.tracing.sharding import COLLECTIVES, LAYOUTS, sliced
from archscale_jax.tracing.state import Call, State, mixture
from archscale_jax.tracing.values import (
    NO_LABELS,
    Axes,
    Feature,
    Known,
    Value,
    Weight,
    changed,
    features_of,
)


def like(call: Call, value: Value, axes: Axes, expression: Expression | None = None) -> Value:
    """Returns a value whose entries another holds, with new axes."""
    expression = value.expression if expression is None else expression
    if isinstance(value, Weight):
        return changed(
            made_of_params(call.of([value]), expression, axes),
            slices=value.slices,
            rows=value.rows,
        )
    value = changed(value, expression=expression, axes=axes, array=None)
    return value


@register_primitive("transpose", "tile", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
                    "rev", "pad", "copy", "copy_p", "stop_gradient", "name", "reduce_precision",
                    "real", "custom_lin", "pbroadcast", *LAYOUTS, *COLLECTIVES)  # fmt: skip
def reshuffle(state: State, call: Call) -> Value:
    """Entries stay what they are; of a pad, where they are not zeros."""
    value = call.values[0]
    return like(call, value, moved(call.equation, value.axes))


@register_primitive("optimization_barrier")
def barrier(state: State, call: Call) -> list[Value]:
    """Every operand is a result."""
    return [changed(value, array=None) for value in call.values]


@register_primitive("iota")
def iota(state: State, call: Call) -> Value:
    """Numbers 0, 1, … along an axis."""
    axis, size = call.parameters["dimension"], call.shape[call.parameters["dimension"]]
    nodes = np.unique(np.linspace(0, max(size - 1, 0), min(max(size, 1), 257)).astype(int))
    axes = [NO_LABELS] * len(call.shape)
    axes[axis] = frozenset([state.fresh()]) if size > 1 else NO_LABELS
    expression = (
        Variable("index", state.fresh(), nodes=nodes) if size > 1 else Constant(np.int32(0))
    )
    return Known(expression, tuple(axes))


# Slices.


def part_of(state: State, value: Value, cuts: list[tuple]) -> Expression:
    """What an entry of a slice is: of features another variable than of any other slice."""
    if not cuts or not isinstance(value, Feature) or state.is_data(value):
        return value.expression
    key = tuple(cuts)

    def cut(variable: Variable) -> Variable | None:
        if variable.kind != "vertex":
            return None
        return dataclasses.replace(variable, part=(*variable.part, key))

    return substituted(value.expression, cut)


@register_primitive("slice")
def static_slice(state: State, call: Call) -> Value:
    """A part of an array, known by where it starts and ends."""
    (value,) = call.values
    start, limit = call.parameters["start_indices"], call.parameters["limit_indices"]
    strides = call.parameters["strides"] or (1,) * len(start)
    cuts = [
        (_stable(value.axes[axis]), begin, end, step, size)
        for axis, (begin, end, step, size) in enumerate(
            zip(start, limit, strides, call.shapes[0], strict=True)
        )
        if (begin, end, step) != (0, size, 1) and value.axes[axis]
    ]
    return _sliced(state, call, value, cuts, dict(enumerate(start)))


@register_primitive("dynamic_slice")
def dynamic_slice(state: State, call: Call) -> Value:
    """A part of an array whose place is computed; of params and constants it may be known."""
    value, indices = call.values[0], call.values[1:]
    starts: dict[int, int] = {}
    cuts = []
    for axis, (index, size, whole) in enumerate(
        zip(indices, call.shape, call.shapes[0], strict=True)
    ):
        if isinstance(index.expression, Constant):
            start = int(np.clip(index.expression.value, 0, whole - size))
            starts[axis] = start
            place: object = start
        else:
            place = state.fresh()
        if size != whole and value.axes[axis]:
            cuts.append((_stable(value.axes[axis]), place, size))
    return _sliced(state, call, value, cuts, starts)


def _stable(labels) -> tuple:
    return tuple(sorted(labels, key=repr))


def _sliced(state: State, call: Call, value: Value, cuts: list, starts: dict[int, int]) -> Value:
    axes = tuple(
        NO_LABELS if size == 1 and whole != 1 else labels
        for labels, size, whole in zip(value.axes, call.shape, call.shapes[0], strict=True)
    )
    if isinstance(value, Weight):
        entries = {
            (leaf, axis, starts[place])
            for place, labels in enumerate(value.axes)
            if place in starts and call.shape[place] == 1 != call.shapes[0][place]
            for leaf, axis in labels
            if state.shapes[leaf][axis] == call.shapes[0][place]
        }
        value = sliced(value, call.shapes[0], call.shape, state.manual > 0)
        assert isinstance(value, Weight)
        result = like(call, value, axes)
        assert isinstance(result, Weight)
        # A slice that devices take differently is unknown.
        split = None if value.split is None else result.split
        return changed(result, slices=value.slices | entries, split=split)
    if isinstance(value, Known):
        whole = isinstance(value.expression, Constant)
        small = not any(axes) and not whole
        return Known(_entry(value, starts) if small else value.expression, axes)
    result = changed(value, expression=part_of(state, value, cuts), axes=axes, array=None)
    return changed(result, bare=value.bare and not cuts)


def _entry(value: Known, starts: dict[int, int]) -> Expression:
    """One entry of 0, 1, …: the number where the slice starts."""
    expression = value.expression
    if isinstance(expression, Variable) and expression.kind == "index":
        varying = [axis for axis, labels in enumerate(value.axes) if labels]
        if len(varying) == 1 and varying[0] in starts:
            return Constant(np.int32(starts[varying[0]]))
    return expression


@register_primitive("split")
def split(state: State, call: Call) -> list[Value]:
    """Several parts of an array along an axis."""
    (value,) = call.values
    axis, start, results = call.parameters["axis"], 0, []
    whole = call.shapes[0][axis]
    for size in call.parameters["sizes"]:
        cuts = [(_stable(value.axes[axis]), start, start + size, 1, whole)]
        expression = part_of(state, value, cuts if size != whole else [])
        axes = tuple(
            NO_LABELS if place == axis and size == 1 != whole else labels
            for place, labels in enumerate(value.axes)
        )
        result = like(call, value, axes, expression)
        if isinstance(result, Feature) and size != whole:
            result = changed(result, bare=False)
        if isinstance(result, Weight) and size == 1 != whole:
            entries = {(leaf, a, start) for leaf, a in value.axes[axis]}
            result = changed(result, slices=result.slices | entries)
        results.append(result)
        start += size
    return results


@register_primitive("unstack")
def unstack(state: State, call: Call) -> list[Value]:
    """Every entry of an array along an axis."""
    (value,) = call.values
    axis, size = call.parameters["axis"], call.shapes[0][call.parameters["axis"]]
    results: list[Value] = []
    for entry in range(size):
        cuts = [(_stable(value.axes[axis]), entry, entry + 1, 1, size)] if size > 1 else []
        axes = tuple(labels for place, labels in enumerate(value.axes) if place != axis)
        result = like(call, value, axes, part_of(state, value, cuts))
        if isinstance(result, Feature) and cuts:
            result = changed(result, bare=False)
        if isinstance(result, Weight):
            entries = {(leaf, own, entry) for leaf, own in value.axes[axis]}
            result = changed(result, slices=result.slices | entries)
        results.append(result)
    return results


# Joining along an axis, and writing into arrays.


@register_primitive("stack")
def stack(state: State, call: Call) -> Value:
    """Arrays side by side along a new axis."""
    axis = call.parameters["axis"]
    along = frozenset([state.fresh()])

    def wider(value: Value) -> Value:
        labels = NO_LABELS if isinstance(value, Weight) else along
        return changed(value, axes=(*value.axes[:axis], labels, *value.axes[axis:]))

    values = [wider(value) for value in call.values]
    return joined_values(state, call.of(values), values, [1] * len(values))


@register_primitive("concatenate")
def concatenation(state: State, call: Call) -> Value:
    """Arrays one behind the other."""
    axis = call.parameters["dimension"]
    counts = [shape[axis] for shape in call.shapes]
    return joined_values(state, call, call.values, counts)


def joined_values(
    state: State, call: Call, values: Sequence[Value], counts: Sequence[int]
) -> Value:
    """Returns what holds the entries of several values along an axis, in these proportions."""
    rank = len(call.shape)
    features = features_of(values)
    # Labels of leaves are those of values that are made of params alone.
    labelled = [one for one in values if not features or not isinstance(one, Weight)]
    axes = tuple(
        frozenset().union(*(one.axes[place] for one in labelled if len(one.axes) == rank))
        for place in range(rank)
    )
    if not features:
        parts = [
            (one.expression, count)
            for one, count in zip(values, counts, strict=True)
            if isinstance(one, Weight) or not call.weights
        ]
        expression = parts[0][0]
        if any(one is not expression for one, _ in parts):
            expression = _alike(state, parts)
        if call.weights:
            return made_of_params(call, expression, axes)
        return Known(expression, axes)
    own = [c for one, c in zip(values, counts, strict=True) if isinstance(one, Feature)]
    if len({one.vertex for one in features}) > 1:
        result = state.join(Kind.CONCATENATION, features, axes, counts=own)
    else:
        result = changed(
            features[0],
            expression=_rejoined(state, features, own),
            axes=axes,
            passed=frozenset().union(*(one.passed for one in features)),
            inputs=frozenset().union(*(one.inputs for one in features)),
            bare=False,
            array=None,
        )
    for one in values:
        if isinstance(one, Weight):
            state.use(call, one, "token", result.vertex, state.aligned(one, result))
    return result


def _alike(state: State, parts: list[tuple[Expression, int]]) -> Expression:
    """Constants of one value, or a mixture."""
    first = parts[0][0]
    if isinstance(first, Constant) and all(
        isinstance(one, Constant) and np.all(one.value == first.value) for one, _ in parts
    ):
        return first
    if any(isinstance(one, Unknown) for one, _ in parts):
        return UNKNOWN
    return mixture(state, parts)


def _rejoined(state: State, features: list[Feature], counts: list[int]) -> Expression:
    """Parts of one vertex side by side are its features again, in whatever order and sign."""
    signed = [_without_sign(one.expression) for one in features]
    if all(isinstance(one, Variable) and one.kind == "vertex" for one in signed):
        parts = [one.part for one in signed if isinstance(one, Variable)]
        if all(one.part == parts[0] for one in signed if isinstance(one, Variable)):
            return features[0].expression
        whole = changed(signed[0], part=parts[0][:-1])  # pyright: ignore
        ends = [part[-1][0][1:3] for part in parts if part and len(part[-1][0]) == 5]
        contiguous = len(ends) == len(parts) and all(
            a[1] == b[0] for a, b in itertools.pairwise(ends)
        )
        plain = all(one is other.expression for one, other in zip(signed, features, strict=True))
        if contiguous and plain and ends[0][0] == 0 and ends[-1][1] == parts[0][-1][0][4]:
            return whole
        return dataclasses.replace(whole, part=(*parts[0][:-1], ("joined", state.fresh())))
    whole = [_of_all_positions(state, one.expression) for one in features]
    if all(same_function(one, whole[0]) for one in whole):
        return whole[0]
    return mixture(state, list(zip([one.expression for one in features], counts, strict=True)))


def _of_all_positions(state: State, expression: Expression) -> Expression:
    """An expression without slices of positions, all of which hold entries of one distribution."""

    def whole(one: Variable) -> Variable | None:
        if one.kind != "vertex" or not one.part:
            return None
        kept = tuple(
            key
            for key in one.part
            if not isinstance(key, tuple)
            or key[0] == "joined"
            or any(state.has_units(frozenset(cut[0])) for cut in key)
        )
        return dataclasses.replace(one, part=kept)

    return substituted(expression, whole)


def _without_sign(expression: Expression) -> Expression:
    from archscale_jax._expressions import Apply

    if isinstance(expression, Apply) and expression.name == "neg":
        return expression.operands[0]
    return expression


@register_primitive("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter_mul",
                    "scatter_min", "scatter_max", "scatter-mul",
                    "scatter-min", "scatter-max", "dynamic_update_slice")  # fmt: skip
def update(state: State, call: Call) -> Value:
    """Values that are written into others, or added to them, at indices.

    Sums over segments, as over the neighbours in a graph, add up as many values as there are for an
    entry on average, as if all were the same.
    """
    place = 1 if call.name == "dynamic_update_slice" else 2
    operand, written = call.values[0], call.values[place]
    rank = len(call.shape)
    axes = operand.axes if any(operand.axes) or len(written.axes) != rank else written.axes
    both = [one for one in (operand, written) if not isinstance(one, Known)]
    summed = math.prod(call.shapes[place]) / max(math.prod(call.shapes[0]), 1)
    start = operand.expression
    from_zeros = isinstance(start, Constant) and not np.any(start.value)
    if call.name not in ("scatter-add", "scatter_add") or not from_zeros:
        summed = 1.0
    if not both and summed > 1:
        return Known(times(written.expression, summed), axes)
    if not both:
        return Known(_alike(state, [(operand.expression, 1), (written.expression, 1)]), axes)
    if not features_of(both):
        weights = [one for one in both if isinstance(one, Weight)]
        call = call.of(list(weights))
        return made_of_params(call, weights[0].expression, weights[0].axes)
    if len(both) == 1:
        (one,) = both
        axes = axes if len(axes) == rank else (NO_LABELS,) * rank
        result = like(call, one, one.axes if len(one.axes) == rank else axes)
        if isinstance(result, Feature) and one is written:
            result = changed(result, filled=math.prod(call.shapes[place]), bare=False)
        if isinstance(result, Feature) and summed > 1:
            result = changed(result, expression=times(result.expression, summed), array=None)
        return result
    if call.name in ("scatter-add", "scatter_add", "scatter-sub"):
        feature = features_of(both)[0]
        return _added(state, call, both, feature)
    size, held = math.prod(call.shapes[place]), getattr(operand, "filled", 0)
    sizes = [held or max(math.prod(call.shapes[0]) - size, 1), size]
    aligned = [one if len(one.axes) == rank else changed(one, axes=axes) for one in both]
    result = joined_values(state, call.of(aligned), aligned, sizes)
    if isinstance(result, Feature) and held:
        result = changed(result, filled=held + size)
    return result


def _added(state: State, call: Call, both: Sequence[Value], feature: Feature) -> Value:
    features = features_of(both)
    if len({one.vertex for one in features}) > 1:
        return state.join(Kind.SUM, features, feature.axes)
    for one in both:
        if isinstance(one, Weight):
            state.use(call, one, "bias", feature.vertex, state.aligned(one, feature), known=False)
    if len(features) == 2:
        expression = apply("add", np.add, *(one.expression for one in features))
        return changed(feature, expression=expression, array=None, bare=False)
    return changed(feature, array=None, bare=False)


# Linear in all entries along an axis.


@register_primitive("fft")
def fft(state: State, call: Call) -> Value:
    """A Fourier transform: sums of n entries with weights of size 1, or its inverse."""
    (value,) = call.values
    size = math.prod(call.parameters["fft_lengths"])
    inverse = call.parameters["fft_type"] in (jax.lax.FftType.IFFT, jax.lax.FftType.IRFFT)
    factor = size**-0.5 if inverse else size**0.5
    axes = moved(call.equation, value.axes)
    if isinstance(value, Known):
        return Known(UNKNOWN, axes)
    return like(call, value, axes, times(value.expression, factor))


@register_primitive("device_put")
def placed(state: State, call: Call) -> list[Value]:
    """Where values lie does not matter."""
    return [changed(value, array=None) for value in call.values]
