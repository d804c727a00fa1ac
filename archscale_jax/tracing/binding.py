"""What every parameter leaf is: its record, from what it does."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from archscale_jax._architecture import Arrangement, Parameter, ParameterUse, Role
from archscale_jax._graph import WEIGHT_OPERATORS, Operator, live_edges
from archscale_jax.tracing.flow import Edge, Kind
from archscale_jax.tracing.starts import Start
from archscale_jax.tracing.state import State
from archscale_jax.tracing.structure import Built, Structure
from archscale_jax.tracing.values import Use


class Untrained(NamedTuple):
    """Names of leaves to which no gradient of the results comes.

    Attributes:
      constant: those that the results depend on, behind `stop_gradient`.
      idle: those that do nothing to the results.
    """

    constant: tuple[str, ...]
    idle: tuple[str, ...]


class Binding(NamedTuple):
    """What tells the place of a use.

    Attributes:
      state: what has been read.
      structure: what its layers are.
      built: its graph.
      live: indices of the edges on paths.
      moved: where the contents of vertices that no longer exist have gone.
      declared: roles that the user gave.
      untrained: the leaves to which no gradient comes.
      arriving: the edges of the flow into every vertex that has some.
      gates: the vertices of layers whose outputs do nothing but scale groups of features.
    """

    state: State
    structure: Structure
    built: Built
    live: set[int]
    moved: Mapping[int, int]
    declared: Mapping[str, Role]
    untrained: Untrained
    arriving: Mapping[int, list[Edge]]
    gates: set[int]

    @classmethod
    def of(
        cls,
        state: State,
        structure: Structure,
        built: Built,
        moved: Mapping[int, int],
        declared: Mapping[str, Role],
        untrained: Untrained,
    ) -> "Binding":
        """Adds what follows from the graph and the flow."""
        live = set(live_edges(built.graph).nonzero()[0].tolist())
        arriving: dict[int, list[Edge]] = {}
        for edge in state.flow.edges:
            arriving.setdefault(edge.target, []).append(edge)
        gates = _gates(state)
        return cls(state, structure, built, live, moved, declared, untrained, arriving, gates)


def _gates(state: State) -> set[int]:
    """The layers whose outputs scale groups of features, and enter no layer or other product."""
    read = (*WEIGHT_OPERATORS, Operator.PRODUCT)
    others = {
        edge.source
        for edge in state.flow.edges
        if edge.operator in read and (edge.source, edge.target) not in state.gates
    }
    return {layer for layer, _ in state.gates} - others


def records(binding: Binding) -> tuple[tuple[Parameter, ...], list[str]]:
    """Returns the record of every leaf, and messages on those that do nothing."""
    numbers = {edge: place for place, edge in enumerate(binding.built.edges)}
    by_leaf: dict[str, list[tuple[int, Use]]] = {name: [] for name in binding.state.shapes}
    for number, use in enumerate(binding.state.uses):
        if number in binding.state.replaced:
            continue
        by_leaf[use.leaf].append((number, use))
    edges_behind = _edges_by_use(binding.built.edges)
    found, idle = [], []
    for name, uses in by_leaf.items():
        held = _held(binding, uses, numbers)
        if held:
            places = [_place(binding, n, use, numbers, edges_behind) for n, use in held]
            found.append(_record(binding, name, [use for _, use in held], places))
        elif name in binding.declared or _is_kept(binding, name):
            found.append(_without_use(binding, name))
        else:
            idle.append(
                f"parameter {name!r} does nothing to the result; leave it out of params, or "
                f"declare its role with roles={{{name!r}: role}}"
            )
    return tuple(found), idle


def _is_kept(binding: Binding, name: str) -> bool:
    """Whether a leaf that was not read can stay as it is without harm.

    A constant can. So can a vector that does nothing here but may in training, as the token of
    masked inputs: it does not decay, and is trained at the rate of all vectors.
    """
    long = sum(size > 1 for size in binding.state.shapes[name])
    constant, idle = binding.untrained
    return name in constant or (name in idle and long <= 1)


def _without_use(binding: Binding, name: str) -> Parameter:
    shape, role = binding.state.shapes[name], binding.declared.get(name)
    width = shape[-1] if shape else 1
    if role is not None:
        return Parameter(name, role, Role.HIDDEN, shape, width, width)
    given = binding.state.starts.get(name)
    known = name not in binding.untrained.constant
    return Parameter(name, Role.BIAS, Role.HIDDEN, shape, width, width, given=given,
                     start_known=known, trained=False)  # fmt: skip


def _edges_by_use(edges: list[Edge]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Which edges read what a use scales, and behind which operators it stands."""
    reading: dict[int, list[int]] = {}
    behind: dict[int, list[int]] = {}
    for place, edge in enumerate(edges):
        for number in edge.passed:
            reading.setdefault(number, []).append(place)
        for number in edge.passed_after:
            behind.setdefault(number, []).append(place)
    return reading, behind


def _held(
    binding: Binding, uses: list[tuple[int, Use]], numbers: Mapping[Edge, int]
) -> list[tuple[int, Use]]:
    """The uses at live layers; at layers of the graph if there are none; or nothing."""
    ends = {*binding.structure.stems, *binding.structure.readouts}

    def on(use: Use, live: bool) -> bool:
        if use.edge is None or use.edge in ends:
            return True
        return use.edge in numbers and (not live or numbers[use.edge] in binding.live)

    alive = [(number, use) for number, use in uses if on(use, True)]
    return alive or [(number, use) for number, use in uses if on(use, False)]


def _place(
    binding: Binding,
    number: int,
    use: Use,
    numbers: Mapping[Edge, int],
    edges_behind: tuple[dict[int, list[int]], dict[int, list[int]]],
) -> ParameterUse:
    vertex = binding.moved.get(use.vertex, use.vertex)
    expression = use.expression
    weight = use.kind == "weight"
    apart = {axis for axis in use.output if weight and (use.leaf, axis) in binding.state.apart}
    return ParameterUse(
        use.kind,
        contracted=use.contracted,
        output=tuple(axis for axis in use.output if axis not in apart),
        batch=tuple(sorted({*use.batch, *apart})),
        positions=use.positions,
        fan_in=use.fan_in,
        groups=use.groups,
        slices=use.slices,
        edge=numbers.get(use.edge) if use.edge is not None else None,
        edges=tuple(edges_behind[0].get(number, ())),
        ends=tuple(edges_behind[1].get(number, ())),
        vertex=binding.built.numbers.get(vertex),
        layer=_layer(binding, use, vertex),
        expression=expression,
        source=use.source,
        gates=weight and use.vertex in binding.gates,
        made=use.made,
    )


def _layer(binding: Binding, use: Use, vertex: int) -> Role:
    """The layer that a use belongs to: its own, or the one that makes the vertex it touches."""
    structure = binding.structure
    if use.edge is not None:
        return structure.layer(use.edge)
    if use.kind in ("bias", "token", "result"):
        if vertex in structure.tail or use.kind == "result":
            return Role.READOUT
        makers = [edge for edge in structure.reading if edge.target == vertex]
        if makers and all(edge in structure.stems for edge in makers):
            return Role.INPUT
        if binding.state.flow.kinds[vertex] == Kind.DATA:
            return Role.INPUT
    return Role.HIDDEN


_RANK = ("embedding", "weight", "features", "bias", "offset", "scale", "value", "token", "result")
_LAYERS = (Role.HIDDEN, Role.READOUT, Role.INPUT)
"""A leaf of several layers is what its strictest use says: a sum over the width anywhere counts."""


def _record(binding: Binding, name: str, uses: list[Use], places: list[ParameterUse]) -> Parameter:
    shape = binding.state.shapes[name]
    order = range(len(uses))
    layers = {places[i].layer for i in order if uses[i].kind == "weight"}
    first = min(order, key=lambda i: (_RANK.index(uses[i].kind), _LAYERS.index(places[i].layer)))
    use, place = uses[first], places[first]
    role = binding.declared.get(name) or _role(use, place)
    layer = place.layer
    if role == Role.EMBEDDING and Role.READOUT in layers:
        layer = Role.READOUT
    edges = list(dict.fromkeys(one.edge for one in places if one.edge is not None))
    fans = use.fan_in, use.fan_out
    if use.edge is None and use.kind != "features":
        width = _width(shape, use)
        fans = width, width
    scales = [one for one in uses if one.kind in ("scale", "value")]
    constant, idle = binding.untrained
    on_edge = any(one.edge is not None for one in uses)  # a layer that leads nowhere is named so
    start = next((one.neutral for one in scales if one.neutral is not None), None)
    return Parameter(
        name,
        role,
        layer,
        shape,
        *fans,
        kernel_size=max(use.spatial, default=1),
        kernel_positions=math.prod(use.spatial),
        edge=edges[0] if edges else None,
        further_edges=tuple(edges[1:]),
        activated=role != Role.HIDDEN or _activated(binding, uses),
        uses=tuple(places),
        start=start if role == Role.SCALE else None,
        given=_given(binding.state.starts.get(name), role),
        start_known=role not in (Role.BIAS, Role.SCALE) or all(one.known for one in uses),
        trained=name not in constant and (name not in idle or on_edge),
    )


def _given(start: Start | None, role: Role) -> Start | None:
    """What arrays tell of a leaf: of a weight only that it starts at zero."""
    return start if role in (Role.BIAS, Role.SCALE) or start == 0.0 else None


def _width(shape: tuple[int, ...], use: Use) -> int:
    """Entries of a vector along features."""
    held = [axis for axis in (*use.batch, *use.output) if axis not in use.positions]
    return math.prod(shape[axis] for axis in dict.fromkeys(held)) if held else 1


def _role(use: Use, place: ParameterUse) -> Role:
    if use.kind == "weight":
        return place.layer
    if use.kind in ("embedding", "features", "token"):
        return Role.EMBEDDING
    if use.kind in ("scale", "value"):
        return Role.SCALE
    return Role.EMBEDDING if use.table else Role.BIAS


def _activated(binding: Binding, uses: list[Use]) -> bool:
    """Whether a hidden weight reads activations, or its own output is one, as vertices sum."""
    activations = binding.structure.arrangement == Arrangement.ACTIVATION
    edges = [use.edge for use in uses if use.edge is not None]
    return activations or any(_reads_activations(binding.arriving, edge) for edge in edges)


def _reads_activations(arriving: Mapping[int, list[Edge]], edge: Edge) -> bool:
    """Whether an activation stands before a layer, or before all that a pool or join takes."""
    if edge.activated:
        return True
    joins = (Operator.AVG_POOL, Operator.CONCATENATION)
    behind = arriving.get(edge.source, [])
    return bool(behind) and all(
        one.operator in joins and _reads_activations(arriving, one) for one in behind
    )
