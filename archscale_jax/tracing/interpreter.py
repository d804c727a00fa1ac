"""Reads a jaxpr, equation by equation and through the functions in it.

Operations on shapes only are never evaluated: the jaxpr is read on abstract values, unless the
features themselves are asked for.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from archscale_jax.tracing.flow import Flow, Kind
from archscale_jax.tracing.operations import ADDITIONS, Operations, line
from archscale_jax.tracing.sharding import LAYOUTS, entered, first_taken, left
from archscale_jax.tracing.values import Feature, Known, Use, Value, Weight, features_of

_RANDOM = ("threefry2x32", "rng_bit_generator", "rng_uniform")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
          "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # fmt: skip
_SAME_FEATURES = (*ADDITIONS, "transpose", "reshape", "squeeze", "convert_element_type")
_REFUSED = {
    "while": "a while loop runs a number of times that no shape tells; write it as lax.scan",
    "custom_root": "a root search is no layer; trace the function that it solves",
    "pure_callback": "a callback cannot be read; trace the function without it",
    "io_callback": "a callback cannot be read; trace the function without it",
}


class Layer(NamedTuple):
    """What a layer computed: `output` of `weight`, as it was uncast, and `inputs` by `equation`."""

    use: Use
    equation: core.JaxprEqn
    weight: jax.Array
    inputs: jax.Array
    output: jax.Array


class Interpreter(Operations):
    """Reads one jaxpr into a `Flow` and a list of `Use`s.

    Attributes:
      declared: names of the leaves whose roles the user has told.
      flow: the vertices and edges found.
      uses: what the parameters do.
      data: number of the vertex that holds all inputs, once there is one.
      inputs_read: numbers of the inputs that layers read.
      features: with `evaluate`, the features of the vertices that have been found.
      in_shards: the lines of the `shard_map`s that vertices lie in.
      layers: with `evaluate`, what the weight of each layer was applied to, in order; see `Layer`.
    """

    def __init__(
        self,
        *,
        declared: Collection[str] = (),
        evaluate: bool = False,
        perturbations: Mapping[str, jax.Array] | None = None,
        outputs: Mapping[str, jax.Array] | None = None,
    ):
        self.declared = declared
        self.flow = Flow()
        self.uses: list[Use] = []
        self.data: int | None = None
        self.inputs_read: set[int] = set()
        self.features: dict[int, jax.Array] = {}
        self.layers: list[Layer] = []
        self.in_shards: dict[int, str] = {}
        self._perturbations = perturbations or {}  # added to the outputs of layers, by leaf
        self._outputs = outputs or {}  # taken instead of the outputs of layers, by leaf
        self._evaluate = evaluate
        self._constants: dict[int, tuple[Value, int]] = {}  # by identity; keeps the value alive
        self._without_inputs: set[int] = set()  # vertices that no input reaches
        self._casts: dict[int, tuple[jax.Array, jax.Array]] = {}  # by identity: after, before
        self._layers: dict[int, tuple[Use, int]] = {}  # the weight that made a vertex, its units
        self._manual = 0  # how many `shard_map`s what is read lies in

    def input(self, number: int, array: jax.Array | None = None) -> Feature:
        """Returns the feature of an input."""
        if self.data is None:
            self.data = self.flow.add_vertex(Kind.DATA)
        return Feature(self.data, inputs=frozenset([number]), array=array)

    def read(self, jaxpr: core.Jaxpr, constants: Sequence[Value], arguments: Sequence[Value]):
        """Returns the values of a jaxpr's outputs."""
        values: dict[core.Var, Value] = {}
        values.update(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        literal = Known()

        def value(atom) -> Value:
            if isinstance(atom, core.Literal):
                return Known(atom.val) if self._evaluate else literal
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [value(atom) for atom in equation.invars]
            found = len(self.flow.kinds), len(self.uses)
            results = self._equation(equation, operands)
            if self._evaluate:
                # What holds a vertex has been evaluated within; what does not is left whole, so
                # that custom derivatives stay.
                name = equation.primitive.name
                inside = name in (*_CALLS, "scan", "cond") and found != self._found()
                if not inside:
                    uses = [] if name == "shard_map" else self.uses[found[1] :]
                    results = self._evaluated(equation, operands, results, uses)
            values.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _found(self) -> tuple[int, int]:
        return len(self.flow.kinds), len(self.uses)

    def _equation(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        name = equation.primitive.name
        known = all(isinstance(value, Known) for value in values)
        holds = name in _CALLS or name == "shard_map"
        if name.startswith("random_") or name in _RANDOM or (known and not holds):
            return [Known() for _ in equation.outvars]
        if name in _REFUSED:
            self._refuse(equation, values, _REFUSED[name])
        if name in _CALLS:
            return self._call(equation, values)
        if name == "shard_map":
            return self._shard_map(equation, values)
        if name == "scan":
            return self._scan(equation, values)
        if name == "cond":
            return self._cond(equation, values)
        return [self._operation(equation, values)] * len(equation.outvars)

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
        arrays = list(_evaluate(equation, [operand.array for operand in operands]))
        for use in uses:
            if use.kind == "weight":
                arrays[0] = self._layer_output(use, equation, operands, arrays[0])
        for result, array in zip(results, arrays, strict=True):
            if not isinstance(result, Feature):
                continue
            noted = self.features.setdefault(result.vertex, array)
            name = equation.primitive.name
            same = name in _SAME_FEATURES and noted.size == array.size
            moved = name in LAYOUTS and noted is operands[0].array
            if (result.bare and same) or moved:
                self.features[result.vertex] = array
        if equation.primitive.name == "convert_element_type":
            self._casts[id(arrays[0])] = arrays[0], self._before_cast(operands[0].array)
        return [
            dataclasses.replace(result, array=array)
            for result, array in zip(results, arrays, strict=True)
        ]

    def _before_cast(self, array: jax.Array) -> jax.Array:
        return self._casts.get(id(array), (array, array))[1]

    def _layer_output(
        self, use: Use, equation: core.JaxprEqn, operands: list[Value], output: jax.Array
    ) -> jax.Array:
        weight, inputs = operands[:2]
        if not isinstance(weight, Weight):
            weight, inputs = inputs, weight
        exact = self._before_cast(weight.array)
        self.layers.append(Layer(use, equation, exact, inputs.array, output))
        if len(use.leaves) == 1 and use.leaves[0] in self._outputs:
            return self._outputs[use.leaves[0]]
        if len(use.leaves) == 1 and use.leaves[0] in self._perturbations:
            return output + self._perturbations[use.leaves[0]]
        return output

    # Functions in functions.

    def _constants_of(self, closed: core.ClosedJaxpr) -> list[Value]:
        return [Known(constant) for constant in closed.consts]

    def _call(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if name in equation.params:
                inner = equation.params[name]
                break
        else:
            self._refuse(equation, values, "its jaxpr is not where it was looked for")
        if isinstance(inner, core.ClosedJaxpr):
            return self.read(inner.jaxpr, self._constants_of(inner), values)
        return self.read(inner, [], values)

    def _shard_map(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Reads what one device does; only what leaves it is ever evaluated."""
        evaluate, self._evaluate = self._evaluate, False
        start = len(self.flow.kinds)
        self._manual += 1
        results = self.read(equation.params["jaxpr"], [], entered(equation, values))
        self._manual -= 1
        self._evaluate = evaluate
        self.in_shards |= dict.fromkeys(range(start, len(self.flow.kinds)), line(equation))
        return left(equation, results)

    def _scan(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Unrolls the loop: every slice of a scanned parameter is a layer of its own."""
        inner, length = equation.params["jaxpr"], equation.params["length"]
        fixed, carried = _loop_operands(equation)
        carry, stacked = values[fixed : fixed + carried], values[fixed + carried :]
        found: list[list[Value]] = []
        steps = range(length)[::-1] if equation.params["reverse"] else range(length)
        for step in steps:
            slices = [self._slice(value, step, length) for value in stacked]
            operands = [*values[:fixed], *carry, *slices]
            results = self.read(inner.jaxpr, self._constants_of(inner), operands)
            carry = results[:carried]
            found.append(results[carried:])
        if not length:
            return [*carry, *(Known() for _ in equation.outvars[carried:])]
        found = found[::-1] if equation.params["reverse"] else found
        return [*carry, *(self._stacked(steps) for steps in zip(*found, strict=True))]

    def _slice(self, value: Value, step: int, length: int) -> Value:
        if isinstance(value, Weight):
            split = first_taken(value.split)
            value = dataclasses.replace(value, index=step, size=value.size // length, split=split)
        return dataclasses.replace(value, array=value.array[step]) if self._evaluate else value

    def _stacked(self, values: Sequence[Value]) -> Value:
        """What holds the values of all steps of a loop."""
        result = values[0]
        for other in values[1:]:
            both = features_of([result, other])
            if len(both) == 2 and both[0].vertex != both[1].vertex:
                result = self._join(Kind.CONCATENATION, both)
            elif both:
                result = both[-1]
        if self._evaluate:
            array = jnp.stack([value.array for value in values])
            result = self._noted(dataclasses.replace(result, array=array))
        return result

    def _cond(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Every branch is read; where they give different vertices, any of them may come."""
        results = [
            self.read(branch.jaxpr, self._constants_of(branch), values[1:])
            for branch in equation.params["branches"]
        ]
        return [self._chosen(values[0], outcomes) for outcomes in zip(*results, strict=True)]

    def _chosen(self, which: Value, outcomes: Sequence[Value]) -> Value:
        features = features_of(outcomes)
        if len({feature.vertex for feature in features}) > 1:
            result = self._join(Kind.CONCATENATION, features)
        else:
            result = features[0] if features else outcomes[0]
        if self._evaluate:
            array = jax.lax.select_n(which.array, *[value.array for value in outcomes])
            result = self._noted(dataclasses.replace(result, array=array))
        return result

    def _noted(self, value: Value) -> Value:
        if isinstance(value, Feature):
            self.features.setdefault(value.vertex, value.array)
        return value


def _loop_operands(equation: core.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan every step reads, and how many follow that it hands on."""
    if "ft_in" in equation.params:  # JAX 0.11 and newer
        fixed, carried, _ = equation.params["ft_in"].unpack()
        return len(fixed), len(carried)
    return equation.params["num_consts"], equation.params["num_carry"]


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
