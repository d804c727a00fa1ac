"""Reads a jaxpr, equation by equation and through the functions in it.

Operations on shapes only are never evaluated: the jaxpr is read on abstract values, unless the
features themselves are asked for. What single primitives do is in `primitives`; here are the
functions in functions: calls, loops, branches, shards.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from archscale_jax._expressions import (
    UNKNOWN,
    Constant,
    Expression,
    Variable,
)
from archscale_jax.tracing.axes import shape_of
from archscale_jax.tracing.flow import Kind
from archscale_jax.tracing.jaxprs import CALLS, inner_jaxpr, loop_operands
from archscale_jax.tracing.primitives import HANDLERS
from archscale_jax.tracing.primitives.elementwise import ADDITIONS
from archscale_jax.tracing.primitives.reshuffles import like
from archscale_jax.tracing.sharding import LAYOUTS, entered, first_taken, left
from archscale_jax.tracing.state import Call, State, mixture
from archscale_jax.tracing.values import (
    NO_LABELS,
    Axes,
    Feature,
    Known,
    TraceError,
    Use,
    Value,
    Weight,
    changed,
    features_of,
    weights_of,
)

_SAME_FEATURES = (
    *ADDITIONS,
    "transpose",
    "reshape",
    "squeeze",
    "convert_element_type",
    "div",
    "mul",
)
_BITS = ("random_bits", "threefry2x32", "rng_bit_generator", "shift_right_logical")
_UNSUPPORTED = {
    "while": "a while loop runs a number of times that no shape tells; write it as lax.scan",
    "custom_root": "a root search is not a layer; trace the function that it solves",
    "pure_callback": "a callback cannot be read; trace the function without it",
    "io_callback": "a callback cannot be read; trace the function without it",
}
_OF_ROWS = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "slice",
            "dynamic_slice", "concatenate", "gather", "copy", "stop_gradient", "add", "sub", "pad",
            "expand_dims", "select_n", "rev", "split", "stack", "tile")  # fmt: skip
"""What is done to tables of positions before they are added to features."""
_STEPS = 16
"""So many steps of a loop over time are read; the others repeat the last."""


class Layer(NamedTuple):
    """What a layer computed: `output` of `weight`, as it was uncast, and `inputs` by `equation`."""

    use: Use
    equation: core.JaxprEqn
    weight: jax.Array
    inputs: jax.Array
    output: jax.Array


@dataclasses.dataclass
class Evaluation:
    """What is computed while a function is read.

    Attributes:
      features: the features of the vertices that have been found.
      layers: what the weight of each layer was applied to, in order.
      perturbations: added to the outputs of layers, by the names of their weights.
      outputs: taken instead of the outputs of layers, by the names of their weights.
      in_shards: the lines of the `shard_map`s that vertices lie in.
    """

    features: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    layers: list[Layer] = dataclasses.field(default_factory=list)
    perturbations: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    in_shards: dict[int, str] = dataclasses.field(default_factory=dict)


class Interpreter:
    """Reads one jaxpr into a `State`, and computes its values if it is given an `Evaluation`."""

    def __init__(self, state: State, evaluation: Evaluation | None = None):
        self.state = state
        self.evaluation = evaluation

    def input(self, number: int, variable: core.Var, array: jax.Array | None = None) -> Feature:
        """Returns the feature of an input."""
        state = self.state
        if state.data is None:
            state.data = state.flow.add_vertex(Kind.DATA)
        axes = tuple(frozenset([state.fresh()]) for _ in shape_of(variable))
        state.given.update(*axes)
        expression = Variable("vertex", state.data, (number,))
        return Feature(state.data, expression, axes, inputs=frozenset([number]), array=array)

    def read(
        self,
        jaxpr: core.Jaxpr,
        constants: Sequence[Value],
        arguments: Sequence[Value],
        wanted: Sequence[bool] | None = None,
    ) -> list[Value]:
        """Returns the values of a jaxpr's outputs; of those that are not wanted, unknown ones."""
        values: dict[core.Var, Value] = {}
        values.update(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        live = _live(jaxpr, [True] * len(jaxpr.outvars) if wanted is None else wanted)

        def value(atom) -> Value:
            if isinstance(atom, core.Literal):
                return self.known(atom.val)
            return values[atom]

        for equation, finished in zip(jaxpr.eqns, _last_read(jaxpr), strict=True):
            used = tuple(out in live for out in equation.outvars)
            if wanted is not None and not any(used):
                continue
            operands = [value(atom) for atom in equation.invars]
            call = Call(equation, operands, used, finished)
            values.update(zip(equation.outvars, self._results(call), strict=True))
            for variable in finished:
                values.pop(variable, None)
        return [
            value(atom) if wanted is None or wanted[place] else Known()
            for place, atom in enumerate(jaxpr.outvars)
        ]

    def known(self, array: Any) -> Known:
        """Returns a constant; its entries, if there are several, are drawn from its values."""
        shape = np.shape(array)
        expression: Expression = UNKNOWN
        if not isinstance(array, Tracer) and not _is_key(array):
            values = np.ravel(np.asarray(array))
            if values.size:
                first, same = values[0], bool((values == values[0]).all())
                expression = (
                    Constant(_numeric(first))
                    if same
                    else Variable("array", self.state.fresh(), nodes=_some(values))
                )
        axes = tuple(frozenset([self.state.fresh()]) if size > 1 else NO_LABELS for size in shape)
        return Known(expression, axes, array if self.evaluation else None)

    # Equations.

    def _results(self, call: Call) -> list[Value]:
        state = self.state
        found, outer = self._found(), state.path
        state.path = (*outer, id(call.equation))
        results = [
            _ranked(result, variable)
            for result, variable in zip(self._equation(call), call.equation.outvars, strict=True)
        ]
        for vertex in range(found[0], len(state.flow.kinds)):
            state.places.setdefault(vertex, state.path)
        state.path = outer
        if self.evaluation is None:
            return results
        # What holds a vertex has been evaluated within; what does not is left whole, so that
        # custom derivatives stay.
        inside = call.name in (*CALLS, "scan", "cond") and found != self._found()
        if inside:
            return results
        uses = [] if call.name == "shard_map" else state.uses[found[1] :]
        return self._evaluated(call.equation, call.values, results, uses)

    def _found(self) -> tuple[int, int]:
        return len(self.state.flow.kinds), len(self.state.uses)

    def _equation(self, call: Call) -> list[Value]:
        name = call.name
        if name in CALLS:
            return self._call(call)
        if name == "shard_map":
            return self._shard_map(call)
        if all(isinstance(value, Known) for value in call.values):
            return self._constants(call)
        if not call.equation.outvars:  # prints, and changes nothing
            return []
        if name in _UNSUPPORTED:
            raise self.state.fail(call, _UNSUPPORTED[name])
        if name == "scan":
            return self._scan(call)
        if name == "cond":
            return self._cond(call)
        return self._primitive(call)

    def _primitive(self, call: Call) -> list[Value]:
        handler = HANDLERS.get(call.name)
        if handler is None:
            return self._unregistered(call)
        call = self._with_learned_features(call)
        try:
            result = handler(self.state, call)
        except TraceError as error:
            if not call.weights:
                raise
            self.state.unsupported[str(error)] = None
            result = _stand_in(call)
        return result if isinstance(result, list) else [result] * len(call.equation.outvars)

    def _with_learned_features(self, call: Call) -> Call:
        """Rows of a table that are chosen by something bound are features to a layer or norm."""
        if not call.weights:
            return call
        rows = [one for one in call.weights if one.rows]
        known = [one for one in call.weights if one in self.state.constants]
        if not rows or (call.name in _OF_ROWS and not known) or call.features:
            if not known:
                return call
            rows = known

        def feature(value: Value) -> Value:
            if not isinstance(value, Weight) or not any(value is one for one in rows):
                return value
            return self.state.learned(call, value, [len(value.axes) - 1])

        return call.of([feature(value) for value in call.values])

    def _unregistered(self, call: Call) -> list[Value]:
        error = self.state.fail(
            call,
            "the primitive is not registered, so that it is not known whether it is linear, an "
            "activation or a statistic; say so with archscale_jax.tracing.register_elementwise or "
            "register_primitive, or take it for the identity with trace(..., unknown='warn')",
        )
        if self.state.unknown != "error":
            if self.state.unknown == "warn":
                warnings.warn(str(error), stacklevel=2)
            self.state.note(f"{call.name} at {call.line} is not registered; taken for the identity")
        elif call.weights:
            self.state.unsupported[str(error)] = None
        else:
            raise error
        return [_stand_in(call)] * len(call.equation.outvars)

    def _constants(self, call: Call) -> list[Value]:
        """What neither inputs nor params reach: constants where they are plain, random bits."""
        name = call.name
        if name in ("scan", "while", "cond") or name not in HANDLERS:
            return [self._opaque(name, variable) for variable in call.equation.outvars]
        try:
            result = HANDLERS[name](self.state, call)
        except (TraceError, ValueError, TypeError, IndexError):
            return [self._opaque(name, variable) for variable in call.equation.outvars]
        return result if isinstance(result, list) else [result] * len(call.equation.outvars)

    def _opaque(self, name: str, variable: core.Var) -> Known:
        axes = tuple(frozenset([self.state.fresh()]) for _ in shape_of(variable))
        if name in _BITS and np.issubdtype(variable.aval.dtype, np.unsignedinteger):  # pyright: ignore
            dtype = np.dtype(variable.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            places = (np.arange(4096) + 0.5) / 4096
            nodes = (places * 2.0 ** (8 * dtype.itemsize)).astype(dtype)
            return Known(Variable("random", self.state.fresh(), nodes=nodes), axes)
        return Known(UNKNOWN, axes)

    # Values that are computed.

    def _evaluated(
        self,
        equation: core.JaxprEqn,
        operands: list[Value],
        results: list[Value],
        uses: Sequence[Use],
    ) -> list[Value]:
        """The results with their arrays, which are noted where they are a vertex's features.

        Those are what makes the vertex, then its bias added and its axes in the order of use; not a
        slice of it, nor what a constant scales.
        """
        assert self.evaluation is not None
        features = self.evaluation.features
        arrays = list(_evaluate(equation, [operand.array for operand in operands]))
        made = {use.edge: use for use in uses if use.kind == "weight"}
        for use in made.values():
            if len(operands) < 2:  # a sum of products of entries
                continue
            arrays[0] = self._layer_output(use, equation, operands, arrays[0])
        for result, array in zip(results, arrays, strict=True):
            if not isinstance(result, Feature) or result.vertex == self.state.data:
                continue
            name = equation.primitive.name
            if result.plain or name in LAYOUTS:
                noted = features.setdefault(result.vertex, array)
                same = name in _SAME_FEATURES and noted.size == array.size
                moved = name in LAYOUTS and noted is operands[0].array
                if (result.bare and same) or moved:
                    features[result.vertex] = array
        exact: Any = None
        if equation.primitive.name == "convert_element_type" and isinstance(operands[0], Weight):
            exact = operands[0].array if operands[0].exact is None else operands[0].exact
        found: list[Value] = []
        for result, array in zip(results, arrays, strict=True):
            result = changed(result, array=array)
            if isinstance(result, Weight):
                result = changed(result, exact=exact)
            found.append(result)
        return found

    def _layer_output(
        self, use: Use, equation: core.JaxprEqn, operands: list[Value], output: jax.Array
    ) -> jax.Array:
        assert self.evaluation is not None
        weight, inputs = operands[:2]
        if not isinstance(weight, Weight):
            weight, inputs = inputs, weight
        assert isinstance(weight, Weight)
        exact = weight.array if weight.exact is None else weight.exact
        self.evaluation.layers.append(Layer(use, equation, exact, inputs.array, output))
        if len(weight.leaves) == 1 and use.leaf in self.evaluation.outputs:
            return self.evaluation.outputs[use.leaf]
        if len(weight.leaves) == 1 and use.leaf in self.evaluation.perturbations:
            return output + self.evaluation.perturbations[use.leaf]
        return output

    # Functions in functions.

    def _closed(self, closed: core.ClosedJaxpr) -> list[Value]:
        return [self.known(constant) for constant in closed.consts]

    def _call(self, call: Call) -> list[Value]:
        inner = inner_jaxpr(call.equation)
        if inner is None:
            raise self.state.fail(call, "its jaxpr is not where it was looked for")
        # What leads nowhere is read whole: its layers stay where they are.
        wanted = call.live if len(set(call.live)) > 1 else None
        return self.read(inner.jaxpr, self._closed(inner), call.values, wanted)

    def _shard_map(self, call: Call) -> list[Value]:
        """Reads what one device does; only what leaves it is ever evaluated."""
        state, evaluation = self.state, self.evaluation
        start = len(state.flow.kinds)
        state.manual += 1
        self.evaluation = None
        results = self.read(call.parameters["jaxpr"], [], entered(call.equation, call.values))
        self.evaluation = evaluation
        state.manual -= 1
        if evaluation is not None:
            new = range(start, len(state.flow.kinds))
            evaluation.in_shards |= dict.fromkeys(new, call.line)
        return left(call.equation, results)

    def _scan(self, call: Call) -> list[Value]:
        """Reads the steps of a loop: all of a stack of layers, some of a loop over time.

        Every slice of a scanned parameter is a layer of its own. Steps over time apply the same
        parameters: what the first of them tell holds for the rest, and is read once.
        """
        closed, length = call.parameters["jaxpr"], call.parameters["length"]
        fixed, carried = loop_operands(call.equation)
        carry, stacked = call.values[fixed : fixed + carried], call.values[fixed + carried :]
        wanted = [place < carried or live for place, live in enumerate(call.live)]
        reverse = call.parameters["reverse"]
        steps = range(length)[::-1] if reverse else range(length)
        found: list[list[Value]] = []
        layered = bool(weights_of(stacked))
        for step in steps:
            if len(found) >= _STEPS and not layered:
                break
            sliced = len(self.state.uses)
            slices = [self._slice(call, value, step, length) for value in stacked]
            operands = [*call.values[:fixed], *carry, *slices]
            results = self.read(closed.jaxpr, self._closed(closed), operands, wanted)
            layered |= any(use.slices for use in self.state.uses[sliced:])
            carry = results[:carried]
            found.append(results[carried:])
        if not length:
            return [*carry, *(Known() for _ in call.equation.outvars[carried:])]
        remaining = steps[len(found) :]
        if remaining:
            self.state.note(
                f"the loop at {call.line} over {length} steps is read for its first {_STEPS}: "
                "numbers of vertices and paths are those of so many steps"
            )
        return self._outcome(call, carry, found, remaining)

    def _outcome(
        self, call: Call, carry: list[Value], found: list[list[Value]], remaining: range
    ) -> list[Value]:
        """What a loop returns: the last carry, and the values of all steps together."""
        fixed, carried = loop_operands(call.equation)
        arrays: list[Any] | None = None
        if self.evaluation is not None and remaining:
            arrays = _rest_of_loop(call, carry, fixed, carried, remaining)
            carry = [
                changed(value, array=array)
                for value, array in zip(carry, arrays[:carried], strict=True)
            ]
        found = found[::-1] if call.parameters["reverse"] else found
        outputs = []
        for place, values in enumerate(zip(*found, strict=True)):
            rest = None if arrays is None else arrays[carried + place]
            outputs.append(self._stacked(call, carried + place, values, rest))
        return [*carry, *outputs]

    def _slice(self, call: Call, value: Value, step: int, length: int) -> Value:
        axes = value.axes[1:]
        array = value.array[step] if self.evaluation is not None else None
        if isinstance(value, Weight):
            entries = {
                (leaf, axis, step)
                for leaf, axis in value.axes[0]
                if self.state.shapes[leaf][axis] == length
            }
            return changed(
                value, axes=axes, slices=value.slices | entries, split=first_taken(value.split),
                array=array, exact=None,
            )  # fmt: skip
        if isinstance(value, Known):
            expression = value.expression
            if isinstance(expression, Variable) and expression.kind == "index" and not any(axes):
                expression = Constant(np.int32(step))
            elif isinstance(expression, Variable) and expression.kind == "array" and not any(axes):
                expression = UNKNOWN
            return Known(expression, axes, array)
        return changed(value, axes=axes, array=array, bare=False)

    def _stacked(self, call: Call, place: int, values: Sequence[Value], rest: Any) -> Value:
        """What holds the values of all steps of a loop."""
        state = self.state
        label = frozenset([state.fresh()])
        features = features_of(values)
        axes: Axes = (label, *values[-1].axes)
        if len({one.vertex for one in features}) > 1:
            counts = [1] * len(features)
            result: Value = state.join(Kind.CONCATENATION, features, axes, counts=counts)
        elif features:
            result = changed(features[-1], axes=axes, bare=False)
        elif weights_of(values):
            last = weights_of(values)[-1]
            leaves = tuple(dict.fromkeys(n for one in weights_of(values) for n in one.leaves))
            entries = frozenset((leaf, axis) for leaf, axis, _ in last.slices)
            slices = frozenset(one for one in last.slices if one[:2] not in entries)
            result = changed(last, leaves=leaves, axes=(entries, *last.axes), slices=slices)
        else:
            result = Known(values[-1].expression, axes)
        if self.evaluation is not None:
            arrays = [value.array for value in values]
            if any(array is None for array in arrays):
                return result
            array = jnp.stack(arrays)
            if rest is not None:
                order = [rest, array] if call.parameters["reverse"] else [array, rest]
                array = jnp.concatenate(order)
            result = self._noted(changed(result, array=array))
        return result

    def _cond(self, call: Call) -> list[Value]:
        """Every branch is read; where they give different vertices, any of them may come."""
        results = [
            self.read(branch.jaxpr, self._closed(branch), call.values[1:])
            for branch in call.parameters["branches"]
        ]
        return [self._chosen(call, outcomes) for outcomes in zip(*results, strict=True)]

    def _chosen(self, call: Call, outcomes: Sequence[Value]) -> Value:
        features = features_of(outcomes)
        if len({feature.vertex for feature in features}) > 1:
            counts = [1] * len(features)
            result: Value = self.state.join(
                Kind.CONCATENATION, features, features[0].axes, counts=counts
            )
        elif features:
            parts = [(one.expression, 1) for one in features]
            same = all(one is parts[0][0] for one, _ in parts)
            expression = parts[0][0] if same else mixture(self.state, parts)
            result = changed(features[0], expression=expression, bare=False)
        else:
            result = next(iter(weights_of(outcomes)), outcomes[0])
        if self.evaluation is not None:
            which = call.values[0].array
            array = jax.lax.select_n(which, *[value.array for value in outcomes])
            result = self._noted(changed(result, array=array))
        return result

    def _noted(self, value: Value) -> Value:
        assert self.evaluation is not None
        if isinstance(value, Feature) and value.plain:
            self.evaluation.features.setdefault(value.vertex, value.array)
        return value


def _ranked(value: Value, variable: core.Var) -> Value:
    """A value with labels for every axis; without any where they are not known."""
    rank = len(shape_of(variable))
    return value if len(value.axes) == rank else changed(value, axes=(NO_LABELS,) * rank)


def _is_key(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _numeric(value: Any) -> Any:
    """A number as NumPy computes with it; narrow floats of JAX in float32."""
    array = np.asarray(value)
    return array.astype(np.float32)[()] if array.dtype.kind == "V" else array[()]


def _some(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32) if values.dtype.kind == "V" else values
    return values if values.size <= 4096 else values[:: values.size // 4096]


def _stand_in(call: Call) -> Value:
    """A value in place of one that could not be read, so that reading goes on."""
    value = next(itertools.chain(call.features, call.weights, call.values))
    rank = len(call.shape)
    axes = value.axes if len(value.axes) == rank else (NO_LABELS,) * rank
    if isinstance(value, Weight):
        return like(call, value, axes)
    return changed(value, axes=axes, array=None)


def _live(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> set[core.Var]:
    """The variables of a jaxpr on which its wanted outputs depend."""
    live = {
        atom
        for atom, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and isinstance(atom, core.Var)
    }
    for equation in reversed(jaxpr.eqns):
        if any(out in live for out in equation.outvars):
            live.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return live


def _last_read(jaxpr: core.Jaxpr) -> list[list[core.Var]]:
    """For every equation, the variables that none after it reads: their values can be let go."""
    read = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    found: list[list[core.Var]] = []
    for equation in reversed(jaxpr.eqns):
        own = [atom for atom in equation.invars if isinstance(atom, core.Var)]
        last = [variable for variable in (*own, *equation.outvars) if variable not in read]
        read.update(last)
        found.append(last)
    return found[::-1]


def _rest_of_loop(
    call: Call, carry: Sequence[Value], fixed: int, carried: int, remaining: range
) -> list[Any]:
    """Runs the steps of a loop that were not read."""
    closed = call.parameters["jaxpr"]
    constants = [value.array for value in call.values[:fixed]]
    steps = np.asarray(list(remaining))
    reverse = call.parameters["reverse"]
    order = steps[::-1] if reverse else steps
    slices = [value.array[order] for value in call.values[fixed + carried :]]

    def body(state, one):
        results = core.jaxpr_as_fun(closed)(*constants, *state, *one)
        return results[:carried], results[carried:]

    state, outputs = jax.lax.scan(
        body, [value.array for value in carry], slices, length=len(steps), reverse=reverse
    )
    return [*state, *outputs]


def _evaluate(equation: core.JaxprEqn, operands: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Evaluates one equation as a jaxpr of its own, the way that JAX keeps for others."""
    arrays = {
        atom: array
        for atom, array in zip(equation.invars, operands, strict=True)
        if not isinstance(atom, core.Literal)
    }
    names = ("",) * len(arrays), ("",) * len(equation.outvars)
    debug_info = core.DebugInfo("vertex_features", equation.primitive.name, *names)
    ends = list(arrays), list(equation.outvars)
    jaxpr = core.Jaxpr((), *ends, [equation], equation.effects, debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*arrays.values())
