"""From a JAX function to its architecture: `trace`."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from archscale_jax._architecture import (
    Architecture,
    Arrangement,
    EdgeFunction,
    Parameter,
    Role,
)
from archscale_jax._errors import unknown as unknown_name
from archscale_jax._expressions import (
    Expression,
    Variable,
)
from archscale_jax._graph import live_vertices
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.tracing.attention import attention_logits, queries_of, query_shares
from archscale_jax.tracing.binding import Binding, Untrained, records
from archscale_jax.tracing.flow import Edge, Kind, contract, split_fused
from archscale_jax.tracing.gradients import inputs_with_gradient
from archscale_jax.tracing.interpreter import Evaluation, Interpreter
from archscale_jax.tracing.starts import Start, starting_values
from archscale_jax.tracing.state import State
from archscale_jax.tracing.structure import Built, Structure, graph_of
from archscale_jax.tracing.values import Feature, Known, TraceError, Use, Value, Weight


def trace(
    function: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    roles: Mapping[str, Role | str] | None = None,
    arrangement: Arrangement | str | None = None,
    unknown: Literal["error", "warn"] = "error",
) -> Architecture:
    """Reads the architecture of a JAX function: its graph, and what every parameter does in it.

    Vertices are where contributions are summed (and where features are multiplied or joined along
    an axis), edges are layers, skips and average pools [AAS §3.1]; what else stands on an edge, an
    activation or a constant, is kept as an expression (theory §9). Layers that read the inputs are
    the stem; layers that features enter last on every way to the result are the readout, also where
    their outputs are added, joined, pooled or compared with targets. If stems feed different
    vertices, vertex 0 stands for the inputs and stems are edges.

    Nothing is computed: params and inputs may be `jax.ShapeDtypeStruct`. Params that are arrays
    tell the values before training of what is not drawn, and which weights start at 0. Of a loop
    over time its first 16 steps are read, of a loop over a stack of layers all.

    Args:
      function: `(params, *inputs)` to features, logits or a loss, in any framework.
      params: tree of arrays or shapes. Everything in it is a parameter; bind what is not trained
        (running averages, random keys) to the function or pass it among the inputs.
      *inputs: trees of arrays or shapes.
      roles: roles of parameters that the function does not tell, by name.
      arrangement: what vertices sum, if the initialization shall not go by what each sums.
      unknown: what to do at a primitive of JAX that nobody registered, see
        `archscale_jax.tracing.register_primitive`: raise, or warn and take it for the identity.

    Returns:
      The architecture; its `notes` say what was supposed.

    Raises:
      TypeError: not a function, or params that are not arrays.
      ValueError: another value of `unknown`.
      TraceError: something that cannot be read; the message names all parameters, operations and
        lines, and what to do.
    """
    starts = starting_values(named_leaves(params))
    return trace_with_starts(
        function, params, inputs, starts, roles=roles, arrangement=arrangement, unknown=unknown
    )


def trace_with_starts(
    function: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    starts: Mapping[str, Start],
    *,
    roles: Mapping[str, Role | str] | None = None,
    arrangement: Arrangement | str | None = None,
    unknown: Literal["error", "warn"] = "error",
) -> Architecture:
    """Does what `trace` does, with values before training that are known though params are shapes.

    Raises:
      TypeError, ValueError, TraceError: see `trace`.
    """
    if unknown not in ("error", "warn"):
        raise ValueError(f"unknown is {unknown!r}; accepted are 'error' and 'warn'")
    declared = _declared(roles or {}, list(named_leaves(params)))
    reading = read(function, params, inputs, declared, unknown=unknown, starts=starts)
    state = reading.state
    structure = Structure.of(state.flow, reading.outputs, state.contracted, arrangement)
    built = graph_of(state.flow, reading.outputs, structure)
    binding = Binding.of(state, structure, built, reading.moved, declared, reading.untrained)
    parameters, idle = records(binding)
    problems = [*state.unsupported, *idle]
    if problems:
        raise TraceError("; ".join(problems))
    return _architecture(state, structure, built, parameters)


def _architecture(
    state: State, structure: Structure, built: Built, parameters: tuple[Parameter, ...]
) -> Architecture:
    leaves: dict[Edge, list[str]] = {}
    for use in state.uses:
        if use.edge is not None and use.kind in ("weight", "embedding"):
            leaves.setdefault(use.edge, []).append(use.leaf)

    logits, met = attention_logits(state), queries_of(state)
    shares = query_shares(logits)

    def function(edge: Edge) -> EdgeFunction:
        weights = tuple(dict.fromkeys(leaves.get(edge, ())))
        return EdgeFunction(
            built.renamed(edge.before),
            built.renamed(edge.after),
            reach=edge.reach if weights else None,
            covered=edge.covered,
            count=edge.count,
            weights=weights,
            share=shares.get(edge.target, 1.0),
        )

    return Architecture(
        built.graph,
        parameters,
        structure.arrangement,
        functions=tuple(function(edge) for edge in built.edges),
        stems=tuple(function(edge) for edge in structure.stems),
        expressions=_renamed(state.flow.expressions, built),
        added=_renamed(state.flow.added, built),
        attention={
            built.numbers[vertex]: one._replace(queries=built.numbers[one.queries])
            for vertex, one in logits.items()
            if vertex in met and vertex in built.numbers and one.queries in built.numbers
        },
        notes=tuple(state.notes),
    )


def _renamed(expressions: Mapping[int, Expression], built: Built) -> dict[int, Expression]:
    """Expressions by the numbers that vertices have in the graph."""
    return {
        built.numbers[vertex]: built.renamed(expression)
        for vertex, expression in expressions.items()
        if vertex in built.numbers
    }


def _declared(roles: Mapping[str, Role | str], names: list[str]) -> dict[str, Role]:
    declared = {}
    for name, role in roles.items():
        if name not in names:
            raise TraceError(unknown_name("parameter in roles", name, names))
        try:
            declared[name] = Role(role)
        except ValueError as error:
            raise TraceError(f"roles of {name!r}: {error}") from None
    return declared


def vertex_features(
    function: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    roles: Mapping[str, Role | str] | None = None,
) -> dict[int, jax.Array]:
    """Evaluates a function and returns the features of the vertices that `trace` finds in it.

    A vertex has what it sums, before normalization and activation; a layer that no sum reads
    has its output with its bias. The function runs as it is, loops over layers unrolled, all
    branches of a `cond` evaluated. Works under `jit`, `grad`, `jvp` and `vmap`; jit it, as eagerly
    every operation is compiled by itself. Axes are those that the function has inside: where it is
    a function of one example mapped by `jax.vmap` over `W @ x`, examples may come last, and the
    standardized sizes of `measure_update`, which take them first, mean nothing; write `x @ W`.

        measure_update(lambda params, batch: vertex_features(apply, params, batch[0]), …)

    Args:
      function: see `trace`.
      params: tree of arrays.
      *inputs: trees of arrays.
      roles: as for `trace`.

    Returns:
      Features by vertex number, of the vertices on paths from input to output; without vertex 0
      where it stands for the inputs, and without the readout.

    Raises:
      TraceError: see `trace`; a vertex inside `jax.shard_map`, where each device has its own part.
    """
    reading = read(function, params, inputs, roles or (), evaluate=True)
    flow, evaluation = reading.state.flow, reading.evaluation
    assert evaluation is not None
    structure = Structure.of(flow, reading.outputs, reading.state.contracted)
    built = graph_of(flow, reading.outputs, structure)
    live = live_vertices(built.graph)
    features = evaluation.features
    wanted = {
        number: vertex
        for vertex, number in sorted(built.numbers.items(), key=lambda item: item[1])
        if live[number] and vertex != reading.state.data
    }
    for number, vertex in wanted.items():
        if vertex in evaluation.in_shards and vertex not in features:
            raise TraceError(
                f"the features of vertex {number} do not leave the jax.shard_map at "
                f"{evaluation.in_shards[vertex]}; evaluate the function without it"
            )
    return {number: features[vertex] for number, vertex in wanted.items() if vertex in features}


class Reading(NamedTuple):
    """A function that has been read.

    Attributes:
      state: what was found, its flow contracted.
      evaluation: what was computed, or None.
      outputs: the vertices of the results.
      results: the values of the results.
      moved: where the contents of vertices that no longer exist have gone.
      closed: the jaxpr.
      shapes: the tree of the results, as shapes.
      untrained: the leaves to which no gradient comes.
    """

    state: State
    evaluation: Evaluation | None
    outputs: set[int]
    results: list[Value]
    moved: dict[int, int]
    closed: core.ClosedJaxpr
    shapes: PyTree
    untrained: Untrained


def _untrained(closed: core.ClosedJaxpr, names: Sequence[str]) -> Untrained:
    results = [True] * len(closed.jaxpr.outvars)
    found = dce_jaxpr(closed.jaxpr, results)[1], inputs_with_gradient(closed.jaxpr, results)
    read, trained = (dict(zip(names, one, strict=False)) for one in found)
    return Untrained(
        tuple(name for name in names if read[name] and not trained[name]),
        tuple(name for name in names if not read[name]),
    )


def read(
    function: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    declared: Collection[str],
    *,
    evaluate: bool = False,
    perturbations: Mapping[str, jax.Array] | None = None,
    outputs: Mapping[str, jax.Array] | None = None,
    unknown: str = "error",
    starts: Mapping[str, Start] | None = None,
) -> Reading:
    """Reads a function.

    Args:
      function: see `trace`.
      params: see `trace`.
      inputs: see `trace`.
      declared: names of the leaves whose roles the user has told.
      evaluate: compute the values too.
      perturbations: added to the outputs of layers, by the names of their weights.
      outputs: taken instead of the outputs of layers, by the names of their weights.
      unknown: see `trace`; `accept` says nothing, of a function that was read before.
      starts: values of leaves before training, by name.
    """
    _check_call(function, params, inputs)
    weights = named_leaves(params)
    closed, results_shape = _jaxpr(function, params, inputs)
    if isinstance(results_shape, tuple) and any(_has_averages(part) for part in results_shape):
        raise TraceError(
            "the function returns running averages ('batch_stats') beside its result, which would "
            "count as results; trace its first part alone: lambda params, x: apply(params, x)[0]"
        )
    untrained = _untrained(closed, list(weights))
    given = _Given(params, inputs, declared, unknown, starts or {}, evaluate,
                   perturbations or {}, outputs or {}, (results_shape, untrained))  # fmt: skip
    try:
        reading = _read(closed, given)
        if not reading.state.unsupported or not any(untrained):
            return reading
    except TraceError:
        if not any(untrained):
            raise
    # What cannot be read of constants, or of what does nothing to the result, need not be.
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return _read(core.ClosedJaxpr(jaxpr, closed.consts), given, untrained.constant)


class _Given(NamedTuple):
    """What a function is read with: the arguments of `read`, and what both readings give alike."""

    params: PyTree
    inputs: tuple[PyTree, ...]
    declared: Collection[str]
    unknown: str
    starts: Mapping[str, Start]
    evaluate: bool
    perturbations: Mapping[str, jax.Array]
    outputs: Mapping[str, jax.Array]
    found: tuple[PyTree, Untrained]


def _read(closed: core.ClosedJaxpr, given: _Given, constants: Collection[str] = ()) -> Reading:
    """Reads a jaxpr, leaves of these names as constants."""
    weights = named_leaves(given.params)
    data = closed.jaxpr.invars[len(weights) :]
    random = [jnp.issubdtype(one.aval.dtype, jax.dtypes.prng_key) for one in data]
    sources = {number for number, known in enumerate(random) if not known}
    leaves = jax.tree.leaves((given.params, given.inputs))
    shapes = {name: tuple(leaf.shape) for name, leaf in weights.items()}

    def interpret(sources: set[int], evaluate: bool) -> tuple[Interpreter, list[Value]]:
        state = State(shapes, given.declared, given.unknown, given.starts)
        evaluation = Evaluation(perturbations=given.perturbations, outputs=given.outputs)
        interpreter = Interpreter(state, evaluation if evaluate else None)
        arrays = leaves if evaluate else [None] * len(leaves)
        arguments: list[Value] = [
            Known(axes=tuple(frozenset([state.fresh()]) for _ in shape), array=array)
            if name in constants
            else Weight(
                (name,),
                Variable("leaf", name),
                tuple(frozenset([(name, axis)]) for axis in range(len(shape))),
                array=array,
            )
            for (name, shape), array in zip(shapes.items(), arrays, strict=False)
        ]
        for number, variable in enumerate(data):
            array = arrays[len(weights) + number]
            if number in sources:
                arguments.append(interpreter.input(number, variable, array))
            else:
                known = _concrete(leaves[len(weights) + number])
                value = interpreter.known(known) if known is not None else Known()
                axes = tuple(frozenset([state.fresh()]) for _ in variable.aval.shape)
                arguments.append(Known(value.expression, axes, array))
        bound = [interpreter.known(constant) for constant in closed.consts]
        return interpreter, interpreter.read(closed.jaxpr, bound, arguments)

    # Inputs that no layer reads, such as targets and running averages, are not sources of features.
    interpreter, results = interpret(sources, evaluate=False)
    read_by_layers = interpreter.state.inputs_read
    if given.evaluate or read_by_layers < sources:
        interpreter, results = interpret(sources & read_by_layers, given.evaluate)
    state = interpreter.state
    _note_results(state, results)
    found = {value.vertex for value in results if isinstance(value, Feature)}
    ends = {vertex for vertex in found if state.flow.kinds[vertex] != Kind.DATA}
    if not ends:
        raise TraceError(
            "the result of the function does not depend on inputs and params; trace a function "
            "(params, *inputs) to features, logits or a loss"
        )
    for layer, copies in split_fused(state.flow, ends).items():
        own = [use for use in state.uses if use.edge is layer]
        state.uses += [dataclasses.replace(use, edge=copy) for copy in copies for use in own]
    moved = contract(state.flow, ends)
    return Reading(state, interpreter.evaluation, ends, results, moved, closed, *given.found)


def _jaxpr(function: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]) -> Any:
    try:
        return jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    except Exception as error:
        names = list(named_leaves(params))
        error.add_note(
            "raised by the function, which trace calls as function(params, *inputs) with "
            f"{len(inputs)} inputs and params of {len(names)} leaves, {', '.join(names[:4])}"
        )
        raise


def _concrete(array: Any) -> Any:
    """An array whose entries can be looked at, or None: a shape, a tracer, or a large one."""
    concrete = hasattr(array, "dtype") and hasattr(array, "__array__")
    if not concrete or isinstance(array, Tracer) or math.prod(array.shape) > 2**16:
        return None
    return None if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def _note_results(state: State, results: list[Value]) -> None:
    """Params that are returned as they are, as the log standard deviation of a policy."""
    for value in results:
        if isinstance(value, Weight):
            for leaf in value.leaves:
                axes = tuple(range(len(state.shapes[leaf])))
                state.uses.append(Use(leaf, "result", -1, "the result", batch=axes, known=False))


def _has_averages(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and "batch_stats" in tree


def _check_call(function: Any, params: PyTree, inputs: tuple[PyTree, ...]) -> None:
    """Raises on what is easily taken for a function, its params, or its inputs."""
    # By name, as Flax is not imported here. What its transformations return, nnx.jit say, is fine.
    modules = [base.__module__ for base in type(function).__mro__ if base.__name__ == "Module"]
    hint = ""
    if any(name.startswith("flax.linen") for name in modules):
        hint = "; for a linen module pass apply"
    elif any(name.startswith("flax.nnx") for name in modules):
        hint = "; for an NNX model pass lambda params, x: nnx.merge(graphdef, params)(x)"
    if not callable(function) or hint:
        raise TypeError(
            "trace takes (function, params, *inputs); expected a function first, found "
            f"{type(function).__name__}{hint}"
        )
    if _has_averages(params):
        raise TypeError(
            "params hold 'batch_stats', running averages that are not trained: pass "
            "variables['params'], and the averages among the inputs"
        )
    for name, leaf in named_leaves(params).items():
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"params hold {leaf!r} of type {type(leaf).__name__} as {name!r}; accepted are "
                "arrays and jax.ShapeDtypeStruct. Bind anything else to the function"
            )
    for one in inputs:
        if isinstance(one, tuple) and one and all(type(size) is int for size in one):
            raise TypeError(
                f"found the input {one!r}; for an array of this shape pass "
                f"jax.ShapeDtypeStruct({one!r}, jax.numpy.float32)"
            )
