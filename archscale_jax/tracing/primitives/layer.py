"""The application of a weight to features: a layer, an edge to a new vertex."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archscale_jax._expressions import (
    Apply,
    Expression,
    Variable,
    apply,
    is_factor,
    variables,
)
from archscale_jax._graph import Operator
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.primitives.elementwise import neutral_value
from archscale_jax.tracing.sharding import whole_shape
from archscale_jax.tracing.state import Call, State
from archscale_jax.tracing.values import (
    Axes,
    Feature,
    Known,
    Labels,
    Value,
    Weight,
    changed,
)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How a weight meets what it is applied to; axes of the weight's array.

    Attributes:
      contracted: axes that are summed over.
      batch: axes shared by both and the result.
      free: axes that only the result has.
      spatial: sizes of a kernel.
      positions: axes of the kernel's positions.
      groups: into how many groups features are divided.
      reach: inputs that reach one unit on average; None if it is all that are contracted.
      covered: the part of them that does not lie beyond the borders of the image, on average.
      along: labels and size of the features' axes that the batch axes run along.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    spatial: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    groups: int = 1
    reach: float | None = None
    covered: float = 1.0
    along: tuple[tuple[Labels, int], ...] = ()


def learned_features(state: State, call: Call, value: Weight) -> Feature:
    """Returns features that are parameters themselves: learned queries, latents, first states."""
    contracted = call.parameters["dimension_numbers"][0]
    return state.learned(call, value, contracted[call.values.index(value)])


def _features(state: State, call: Call, value: Value) -> Feature:
    """What a layer reads, as features."""
    if isinstance(value, Weight):
        return learned_features(state, call, value)
    return state.constant(value) if isinstance(value, Known) else value


_DERIVATIVE = (
    "a derivative is taken inside of the function (jax.grad, jax.jvp), and what it adds is read as "
    "further layers of the same parameters; trace the function that is differentiated, whose "
    "architecture holds for the same params"
)


def layer(
    state: State,
    call: Call,
    weight: Weight,
    source: Value,
    operator: Operator,
    how: Contraction,
    places: tuple[Axes, list[int]],
    contracted_labels: Labels,
    side: int,
) -> Value:
    """Reads the application of a weight to features: an edge to a new vertex."""
    check_split(state, call, weight)
    if call.is_of_derivative:
        state.note(_DERIVATIVE)
    axes, own = places
    source = _features(state, call, source)
    shape = whole_shape(weight, call.shapes[side])
    fan_in = math.prod(shape[axis] for axis in how.contracted)
    reach = fan_in if how.reach is None else how.reach
    result = state.new_vertex(Kind.LAYER, axes, bare=True)
    edge = state.flow.add_edge(
        source.vertex,
        result.vertex,
        operator,
        before=source.expression,
        kernel_size=max(how.spatial, default=1),
        positions=math.prod(how.spatial),
        reach=float(reach),
        covered=how.covered,
        passed=source.passed,
    )
    mixes = _mixes_positions(state, source, contracted_labels, side, call)
    found = list(axes)
    for place, axis in zip(own, how.free, strict=True):
        if call.shape[place] > 1 or not mixes:
            label = state.fresh() if mixes else state.unit_label()
            found[place] = frozenset([label])
            state.own[result.vertex] = state.own.get(result.vertex, frozenset()) | found[place]
            state.written[label] = weight.axes[axis]
    state.keep_apart(how.along)
    roles = {"contracted": how.contracted, "output": how.free, "batch": how.batch}
    positions = how.positions if not mixes else (*how.contracted, *how.free)
    # As the sines and cosines of a time, of which there are as many as the model wants.
    made = state.is_data(source) and not contracted_labels & state.given
    numbers = []
    held = {leaf: _held(state, weight, leaf, how) for leaf in weight.leaves}
    for leaf, (mine, summed, written, inner, _) in held.items():
        shared = len(weight.leaves) > 1 and bool(how.contracted)
        across = shared and not summed and not inner
        if across or _scales_kernel(weight.expression, leaf, held):
            # It multiplies the kernel of another leaf, as the gain of a weight normalization.
            neutral = neutral_value(weight.expression, leaf)
            kept = (*how.contracted, *how.free) if not across else how.free
            along = {"batch": set(kept) - set(positions), "positions": positions}
            plain: dict[str, Any] = {"neutral": neutral, "known": across and neutral is not None}
            numbers += state.use(call, mine, "scale", result.vertex, along, edge=edge, **plain)
            continue
        options: dict[str, Any] = {
            "edge": edge,
            "fan_in": max(1, round(reach)),
            "fan_out": _fan_out(state, weight, mine, shape, how),
            "spatial": how.spatial,
            "groups": how.groups,
            "expression": own_part(weight.expression, leaf),
            "made": made,
        }
        if inner and not (summed and written):
            options |= {"output" if summed else "contracted": tuple(sorted(inner))}
        numbers += state.use(
            call, mine, "weight", result.vertex, {**roles, "positions": positions}, **options
        )
    state.layers[result.vertex] = tuple(numbers)
    state.inputs_read |= source.inputs
    if state.reaches_no_input([source]):
        state.without_inputs.add(result.vertex)
    return changed(result, axes=tuple(found))


class _Held(NamedTuple):
    """What a kernel holds of a leaf.

    Attributes:
      part: of the kernel.
      summed: axes of the leaf that the layer sums over; here and below only those longer than 1.
      written: axes along which the result varies.
      inner: axes of which no trace is left: they were summed over when the kernel was made.
      places: axes of the kernel that the leaf runs along.
    """

    part: Weight
    summed: set[int]
    written: set[int]
    inner: set[int]
    places: set[int]


def _held(state: State, weight: Weight, leaf: str, how: Contraction) -> _Held:
    axes = (frozenset(one for one in labels if one[0] == leaf) for labels in weight.axes)
    mine = changed(weight, leaves=(leaf,), axes=tuple(axes))
    summed, written = (_axes_of(state, mine, places) for places in (how.contracted, how.free))
    inner = _axes_of(state, mine) - _axes_of(state, mine, range(len(mine.axes)))
    places = {place for place in range(len(mine.axes)) if _axes_of(state, mine, [place])}
    return _Held(mine, summed, written, inner, places)


def _axes_of(state: State, weight: Weight, places: Sequence[int] | range | None = None) -> set[int]:
    """Axes of a leaf that are longer than 1: all, or those that run along some of a value's."""
    (leaf,) = weight.leaves
    sizes = state.shapes[leaf]
    held = (
        set(range(len(sizes)))
        if places is None
        else {axis for place in places for _, axis in weight.axes[place]}
    )
    sliced = {axis for name, axis, _ in weight.slices if name == leaf}
    return {axis for axis in held if sizes[axis] > 1} - sliced


def _scales_kernel(expression: Expression, leaf: str, held: Mapping[str, _Held]) -> bool:
    """Whether a leaf does nothing but scale the kernel of others, which have more axes than it has.

    That is what a factor does that sums nothing with the others: the gain of a weight
    normalization along any axes, the step of a discretized state space, the logarithm of a scale.
    """
    others = (
        one
        for one in held
        if one != leaf and is_factor(expression, Variable("leaf", leaf), Variable("leaf", one))
    )
    return held[leaf].places < set().union(*(held[one].places for one in others))


def own_part(expression: Expression, leaf: str) -> Expression:
    """Returns what an entry of a joined kernel is where it is made of one of its leaves."""
    variable = Variable("leaf", leaf)

    def visit(one: Expression) -> Expression:
        if not isinstance(one, Apply):
            return one
        if one.name == "choose":
            parts = [part for part in one.operands[1:] if variable in variables(part)]
            return visit(parts[0]) if len(parts) == 1 else one
        return apply(one.name, one.function, *map(visit, one.operands))

    return visit(expression)


def _fan_out(
    state: State, weight: Weight, mine: Weight, shape: tuple[int, ...], how: Contraction
) -> int:
    if len(weight.leaves) == 1:
        free = math.prod(shape[axis] for axis in how.free)
    else:  # leaves side by side: of each its own part
        own = {axis for place in how.free for _, axis in mine.axes[place]}
        free = math.prod(state.shapes[mine.leaves[0]][axis] for axis in own)
    return max(1, free // how.groups * math.prod(how.spatial))


def _mixes_positions(state: State, source: Feature, labels: Labels, side: int, call: Call) -> bool:
    """Whether a layer sums over positions of features, as token mixing does."""
    if state.is_data(source) or state.has_units(labels):
        return False
    return bool(labels) and any(state.has_units(one) for one in source.axes)


def check_split(state: State, call: Call, weight: Weight) -> None:
    """Raises for a layer whose fans are unknown: shapes inside `shard_map` are those of shards."""
    if weight.split is None:
        raise state.fail(
            call,
            "inside jax.shard_map the devices hold parts of it that do not make up one layer, "
            "or it cannot be told which parts; trace the function without shard_map",
            [weight],
        )
