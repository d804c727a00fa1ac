"""From a JAX function to its architecture: `trace`."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph

from archscale_jax.architecture import (
    Architecture,
    Arrangement,
    Parameter,
    PyTree,
    Role,
    named_leaves,
)
from archscale_jax.graph import Operator, build_graph
from archscale_jax.tracing.flow import WEIGHTS, Edge, Flow, Kind, Operation, contract
from archscale_jax.tracing.interpreter import (
    Feature,
    Interpreter,
    Known,
    TraceError,
    Use,
    Weight,
)

_OPERATORS = {
    Operation.SKIP: Operator.SKIP,
    Operation.LINEAR: Operator.LINEAR,
    Operation.CONV: Operator.CONV,
    Operation.AVG_POOL: Operator.AVG_POOL,
}


def trace(
    function: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    roles: Mapping[str, Role | str] | None = None,
    arrangement: Arrangement | str | None = None,
) -> Architecture:
    """Reads the architecture of a JAX function: its graph, and what every parameter does in it.

    Vertices are where contributions are summed (and where features are multiplied or joined along
    an axis), edges are layers, skips and average pools [AAS §3.1]. Layers that read the inputs are
    the stem, layers whose outputs nothing reads but the function's result are the readout; if stems
    feed different vertices, vertex 0 stands for the inputs and stems are edges.

    Nothing is computed: params and inputs may be `jax.ShapeDtypeStruct`.

    Args:
      function: `(params, *inputs)` to features, logits or a loss, in any framework.
      params: tree of arrays or shapes. Everything in it is a parameter; bind what is not trained
        (running averages, random keys) to the function or pass it among the inputs.
      *inputs: trees of arrays or shapes.
      roles: roles of parameters that the function does not tell, by name.
      arrangement: what vertices sum, where the function has sums of both kinds.

    Raises:
      TraceError: something that cannot be read; the message names the parameter, the operation, the
        line, and what to do.
    """
    names = list(named_leaves(params))
    declared = {name: Role(role) for name, role in (roles or {}).items()}
    for name in declared:
        if name not in names:
            raise TraceError(f"roles name {name!r}; params hold {', '.join(map(repr, names[:8]))}")
    closed = jax.make_jaxpr(function)(params, *inputs)
    interpreter = Interpreter()
    arguments: list[Known | Weight | Feature] = [Weight((name,)) for name in names]
    for variable in closed.jaxpr.invars[len(names) :]:
        random = jnp.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
        arguments.append(Known() if random else interpreter.input())
    constants = [Known() for _ in closed.consts]
    results = interpreter.read(closed.jaxpr, constants, arguments)
    flow = interpreter.flow
    outputs = {value.vertex for value in results if isinstance(value, Feature)}
    outputs = {vertex for vertex in outputs if flow.kinds[vertex] != Kind.DATA}
    if not outputs:
        raise TraceError("the result of the function does not depend on inputs and params")
    contract(flow, outputs)
    structure = _Structure(
        _reading(flow), _stems(flow), _readouts(flow, outputs), _arrangement(flow, arrangement)
    )
    graph, numbers = _graph(flow, outputs, structure)
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    uses = _uses_by_leaf(names, interpreter.uses, declared)
    parameters = tuple(
        _parameter(name, shapes[name], uses[name], structure, numbers, declared) for name in names
    )
    return Architecture(graph, parameters, structure.arrangement)


def _stems(flow: Flow) -> list[Edge]:
    """The layers that read the inputs, if they all feed one vertex that nothing else feeds."""
    reading = _reading(flow)
    if not reading:
        raise TraceError("no parameter is applied to the inputs")
    targets = {edge.target for edge in reading}
    alone = all(
        flow.kinds[edge.source] == Kind.DATA for edge in flow.edges if edge.target in targets
    )
    one = len(targets) == 1 and alone and all(edge.operation in WEIGHTS for edge in reading)
    return reading if one else []


def _reading(flow: Flow) -> list[Edge]:
    return [edge for edge in flow.edges if flow.kinds[edge.source] == Kind.DATA]


def _readouts(flow: Flow, outputs: set[int]) -> list[Edge]:
    """The layers that only the result of the function reads."""
    read = {edge.source for edge in flow.edges}
    return [
        edge
        for edge in flow.edges
        if edge.target in outputs
        and edge.operation in WEIGHTS
        and flow.kinds[edge.target] == Kind.LAYER
        and edge.target not in read
        and flow.kinds[edge.source] != Kind.DATA
    ]


def _graph(
    flow: Flow, outputs: set[int], structure: "_Structure"
) -> tuple[jraph.GraphsTuple, dict[Edge, int]]:
    """Builds the graph between stem and readout, and numbers its edges.

    Vertices that lead nowhere are kept where they arise before the output, as in the spaces of DAG
    strings. Outputs of several vertices are joined in one that comes last.
    """
    outside = {*structure.stems, *structure.readouts}
    inputs = structure.reading[0].source
    first = structure.stems[0].target if structure.stems else inputs
    last = {edge.source for edge in structure.readouts}
    last |= outputs - {edge.target for edge in structure.readouts}
    final, joins = max(last), []
    if len(last) > 1 or final == first:
        final = len(flow.kinds)
        joins = [Edge(vertex, final, Operation.SKIP) for vertex in sorted(last)]
    edges = [
        edge
        for edge in [*flow.edges, *joins]
        if edge not in outside
        and max(edge.source, edge.target) <= final
        and (edge.source != inputs or first == inputs)
    ]
    vertices = {first, final} | {end for edge in edges for end in (edge.source, edge.target)}
    number = {vertex: place for place, vertex in enumerate([first, *sorted(vertices - {first})])}
    edges.sort(key=lambda edge: (number[edge.target], number[edge.source]))
    convolutions = [edge.kernel_size for edge in flow.edges if edge.operation == Operation.CONV]
    graph = build_graph(
        len(number),
        [number[edge.source] for edge in edges],
        [number[edge.target] for edge in edges],
        [_OPERATORS[edge.operation] for edge in edges],
        [edge.kernel_size for edge in edges],
        network_kernel=max(convolutions, default=0),
    )
    return graph, {edge: place for place, edge in enumerate(edges)}


def _uses_by_leaf(
    names: list[str], uses: list[Use], declared: Mapping[str, Role]
) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {name: [] for name in names}
    for use in uses:
        if len(use.leaves) > 1 and not all(leaf in declared for leaf in use.leaves):
            raise TraceError(
                f"parameters {', '.join(map(repr, use.leaves))} make one {use.kind} at "
                f"{use.source}; declare the role of each with roles={{name: role}}"
            )
        for leaf in use.leaves:
            found[leaf].append(use)
    for name, where in found.items():
        if not where and name not in declared:
            raise TraceError(_does_nothing(name))
    return found


def _does_nothing(name: str) -> str:
    return (
        f"parameter {name!r} does nothing to the result; leave it out of params, or declare its "
        f"role with roles={{{name!r}: role}}"
    )


def _parameter(
    name: str,
    shape: tuple[int, ...],
    uses: list[Use],
    structure: "_Structure",
    numbers: Mapping[Edge, int],
    declared: Mapping[str, Role],
) -> Parameter:
    width = shape[-1] if shape else 1
    if not uses:
        return Parameter(name, declared[name], Role.HIDDEN, shape, width, width)
    # A leaf that is tied is what it is first and foremost: a table, then a layer's weight.
    use = min(uses, key=lambda use: _RANK.index(use.kind))
    fans = {"fan_in": use.fan_in, "fan_out": use.fan_out}
    if use.edge is None:
        fans = {"fan_in": width, "fan_out": width}
    edges = [numbers[one.edge] for one in uses if one.edge is not None and one.edge in numbers]
    role, layer = declared.get(name) or structure.role(use, shape), structure.layer(use)
    if role == Role.EMBEDDING and any(use.edge in structure.readouts for use in uses):
        layer = Role.READOUT
    elif role == Role.EMBEDDING and use.vertex in {edge.target for edge in structure.stems}:
        layer = Role.INPUT
    if role == Role.HIDDEN and not edges:
        raise TraceError(_does_nothing(name))
    if use.kind == "scale" and name not in declared and _axes(use, shape) > 1:
        raise TraceError(
            f"parameter {name!r} of shape {shape} multiplies features at {use.source}, as a layer "
            f"written without a matrix product would; if it is a scale, say roles={{{name!r}: "
            "'scale'}"
        )
    return Parameter(
        name,
        role,
        layer,
        shape,
        **fans,
        kernel_size=max(use.spatial, default=1),
        kernel_positions=math.prod(use.spatial),
        edge=edges[0] if edges else None,
        further_edges=tuple(edges[1:]),
        activated=role != Role.HIDDEN or structure.activated(uses),
    )


_RANK = ("embedding", "weight", "scale", "bias", "token")


class _Structure(NamedTuple):
    """Which edges of a flow read the inputs, are the stem and the readout, and what is summed."""

    reading: list[Edge]
    stems: list[Edge]
    readouts: list[Edge]
    arrangement: Arrangement

    def layer(self, use: Use) -> Role:
        """The role of the layer at which a parameter is used."""
        if use.edge in self.readouts:
            return Role.READOUT
        return Role.INPUT if use.edge in self.reading else Role.HIDDEN

    def activated(self, uses: list[Use]) -> bool:
        """Whether a hidden weight reads activations, or its own output is one, as vertices sum."""
        activations = self.arrangement == Arrangement.ACTIVATION
        return activations or any(use.edge is not None and use.edge.before for use in uses)

    def role(self, use: Use, shape: tuple[int, ...]) -> Role:
        """The role of a parameter."""
        if use.kind == "weight":
            return self.layer(use)
        if use.kind == "bias":
            table = use.edge is None and _axes(use, shape) > 1
            return Role.EMBEDDING if table else Role.BIAS
        return Role.SCALE if use.kind == "scale" else Role.EMBEDDING


def _axes(use: Use, shape: tuple[int, ...]) -> int:
    """The number of axes of a parameter, or of one of its slices, that are longer than 1."""
    return sum(size > 1 for size in (shape if use.index is None else shape[1:]))


def _arrangement(flow: Flow, wanted: Arrangement | str | None) -> Arrangement:
    """What the sums of layers sum."""
    if wanted is not None:
        return Arrangement(wanted)
    reads = collections.Counter(edge.source for edge in flow.edges)
    after = set()
    for edge in flow.edges:
        if flow.kinds[edge.target] != Kind.SUM:
            continue
        if edge.operation in WEIGHTS:
            after.add(edge.after)
        elif flow.kinds[edge.source] == Kind.LAYER and reads[edge.source] == 1:
            after.add(edge.before)  # a layer beside a skip from its own source
    if len(after) > 1:
        raise TraceError(
            "some vertices sum activations and others pre-activations; say which with arrangement="
        )
    return Arrangement.ACTIVATION if after == {True} else Arrangement.PRE_ACTIVATION
