"""From a JAX function to its architecture: `trace`."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from archscale_jax.architecture import Architecture, Arrangement, Role
from archscale_jax.graph import live_edges, live_vertices
from archscale_jax.refusals import unknown
from archscale_jax.tracing.binding import record, uses_by_leaf
from archscale_jax.tracing.flow import Kind, contract
from archscale_jax.tracing.interpreter import Interpreter
from archscale_jax.tracing.structure import Structure, graph_of
from archscale_jax.tracing.values import Feature, Known, TraceError, Value, Weight
from archscale_jax.trees import PyTree, named_leaves


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
      TypeError: no function, or params that are no arrays.
      TraceError: something that cannot be read; the message names the parameter, the operation, the
        line, and what to do.
    """
    names = list(named_leaves(params))
    declared = _declared(roles or {}, names)
    interpreter, outputs, _ = read(function, params, inputs, declared)
    flow = interpreter.flow
    structure = Structure.of(flow, outputs, arrangement)
    graph, numbers, _ = graph_of(flow, outputs, structure)
    alive = live_edges(graph)
    live = {edge: place for edge, place in numbers.items() if alive[place]}
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    uses = uses_by_leaf(names, interpreter.uses, declared)
    parameters = tuple(
        record(name, shapes[name], uses[name], structure, (live, numbers), declared)
        for name in names
    )
    return Architecture(graph, parameters, structure.arrangement)


def _declared(roles: Mapping[str, Role | str], names: list[str]) -> dict[str, Role]:
    declared = {}
    for name, role in roles.items():
        if name not in names:
            raise TraceError(unknown("parameter in roles", name, names))
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

    Of every vertex what it sums, before normalization and activation; of a layer that no sum
    reads, its output with its bias. The function runs as it is, loops over layers unrolled, all
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
    interpreter, outputs, _ = read(function, params, inputs, roles or (), evaluate=True)
    flow = interpreter.flow
    structure = Structure.of(flow, outputs, Arrangement.PRE_ACTIVATION)
    graph, _, numbers = graph_of(flow, outputs, structure)
    live = live_vertices(graph)
    features = interpreter.features
    wanted = {
        number: vertex
        for vertex, number in sorted(numbers.items(), key=lambda item: item[1])
        if live[number] and vertex != interpreter.data
    }
    for number, vertex in wanted.items():
        if vertex in interpreter.in_shards and vertex not in features:
            raise TraceError(
                f"the features of vertex {number} do not leave the jax.shard_map at "
                f"{interpreter.in_shards[vertex]}; evaluate the function without it"
            )
    return {number: features[vertex] for number, vertex in wanted.items() if vertex in features}


def read(
    function: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    declared: Collection[str],
    *,
    evaluate: bool = False,
    perturbations: Mapping[str, jax.Array] | None = None,
    outputs: Mapping[str, jax.Array] | None = None,
) -> tuple[Interpreter, set[int], list[Value]]:
    """Reads a function.

    Args:
      function: see `trace`.
      params: see `trace`.
      inputs: see `trace`.
      declared: names of the leaves whose roles the user has told.
      evaluate: compute the values too.
      perturbations: added to the outputs of layers, by the names of their weights.
      outputs: taken instead of the outputs of layers, by the names of their weights.

    Returns:
      The interpreter, its flow contracted; the output vertices; and the values of the results.
    """
    _check_call(function, params, inputs)
    weights = named_leaves(params)
    for name, leaf in weights.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"params hold {leaf!r} of type {type(leaf).__name__} as {name!r}; accepted are "
                "arrays and jax.ShapeDtypeStruct. Bind anything else to the function"
            )
    closed, results_shape = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    if isinstance(results_shape, tuple) and any(_has_averages(part) for part in results_shape):
        raise TraceError(
            "the function returns running averages ('batch_stats') beside its result, which would "
            "count as results; trace its first part alone: lambda params, x: apply(params, x)[0]"
        )
    data = closed.jaxpr.invars[len(weights) :]
    random = [jnp.issubdtype(one.aval.dtype, jax.dtypes.prng_key) for one in data]
    sources = {number for number, known in enumerate(random) if not known}

    def interpret(sources: set[int], evaluate: bool) -> tuple[Interpreter, list[Value]]:
        interpreter = Interpreter(
            declared=declared, evaluate=evaluate, perturbations=perturbations, outputs=outputs
        )
        count = len(closed.jaxpr.invars)
        leaves = jax.tree.leaves((params, inputs)) if evaluate else [None] * count
        arguments: list[Value] = [
            Weight((name,), math.prod(leaf.shape), array=array)
            for (name, leaf), array in zip(weights.items(), leaves, strict=False)
        ]
        for number, array in enumerate(leaves[len(weights) :]):
            known = number not in sources
            arguments.append(Known(array) if known else interpreter.input(number, array))
        constants = [Known(constant) for constant in closed.consts]
        return interpreter, interpreter.read(closed.jaxpr, constants, arguments)

    # An input that no layer reads, as targets and running averages are, is no source of features.
    interpreter, results = interpret(sources, evaluate=False)
    if evaluate or interpreter.inputs_read < sources:
        interpreter, results = interpret(sources & interpreter.inputs_read, evaluate)
    kinds = interpreter.flow.kinds
    found = {value.vertex for value in results if isinstance(value, Feature)}
    ends = {vertex for vertex in found if kinds[vertex] != Kind.DATA}
    if not ends:
        raise TraceError(
            "the result of the function does not depend on inputs and params; trace a function "
            "(params, *inputs) to features, logits or a loss"
        )
    contract(interpreter.flow, ends)
    return interpreter, ends, results


def _has_averages(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and "batch_stats" in tree


def _check_call(function: Any, params: PyTree, inputs: tuple[PyTree, ...]) -> None:
    """Refuses what is easily taken for a function, its params, or its inputs."""
    # By name, as Flax is not imported here. What its transformations return, nnx.jit say, is fine.
    modules = [base.__module__ for base in type(function).__mro__ if base.__name__ == "Module"]
    hint = ""
    if any(name.startswith("flax.linen") for name in modules):
        hint = "; of a linen module pass apply"
    elif any(name.startswith("flax.nnx") for name in modules):
        hint = "; of an NNX model pass lambda params, x: nnx.merge(graphdef, params)(x)"
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
    for one in inputs:
        if isinstance(one, tuple) and one and all(type(size) is int for size in one):
            raise TypeError(
                f"found the input {one!r}; of an array of this shape pass "
                f"jax.ShapeDtypeStruct({one!r}, jax.numpy.float32)"
            )
