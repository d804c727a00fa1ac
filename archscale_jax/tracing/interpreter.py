"""Reads a jaxpr: which of its values are features, which are weights, and what joins them.

The only module that touches jaxprs, which JAX does not promise to keep. Every value is one of

* `Known`: it depends on neither inputs nor params (literals, masks, random numbers),
* `Weight`: it is made of params alone,
* `Feature`: it depends on inputs (or on features that no input reaches), and belongs to a vertex of
  the `Flow`; `active` where an activation has been applied since that vertex.

Operations on shapes only are never evaluated: the jaxpr is read on abstract values.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jax.extend import core

from archscale_jax.tracing.flow import Edge, Flow, Kind, Operation


class TraceError(ValueError):
    """A function, or a part of it, that cannot be read as an architecture."""


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A value that depends on neither inputs nor params."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value made of params.

    Attributes:
      leaves: their names.
      index: of a leaf whose first axis is scanned, the number of the slice.
    """

    leaves: tuple[str, ...]
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Feature:
    """A value that belongs to a vertex.

    Attributes:
      vertex: its number.
      active: whether an activation came between.
      statistic: whether it is a mean, maximum or the like of the vertex; joined with the features
        it normalizes them, which is no activation.
      bare: whether nothing came between: what is added now is the layer's bias.
    """

    vertex: int
    active: bool = False
    statistic: bool = False
    bare: bool = False


Value = Known | Weight | Feature


@dataclasses.dataclass(frozen=True)
class Use:
    """What a parameter leaf does at one place.

    Attributes:
      leaves: names of the leaves that the value is made of.
      index: see `Weight`.
      kind: `weight`, `embedding` (rows chosen by an index), `bias` (added), `scale` (multiplied) or
        `token` (joined to features along an axis).
      vertex: the vertex whose features it touches; of a weight, the one that it makes.
      edge: of a weight, its edge.
      fan_in: of a weight, inputs that reach one unit.
      fan_out: of a weight, units that one input reaches.
      spatial: of a convolution, the sizes of its kernel.
      source: file and line.
    """

    leaves: tuple[str, ...]
    index: int | None
    kind: str
    vertex: int
    source: str
    edge: Edge | None = None
    fan_in: int = 1
    fan_out: int = 1
    spatial: tuple[int, ...] = ()


_RANDOM = ("threefry2x32", "rng_bit_generator", "rng_uniform")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
          "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
          "shard_map")  # fmt: skip
_ADDITIONS = ("add", "sub", "add_any")
_PRODUCTS = ("mul", "div")
_LINEAR = ("neg", "reshape", "broadcast_in_dim", "squeeze", "transpose", "rev", "slice", "copy",
           "convert_element_type", "stop_gradient", "device_put", "sharding_constraint", "name",
           "reduce_precision", "pad", "dynamic_slice", "split", "cumsum", "real",
           "optimization_barrier", "mul", "div")  # fmt: skip
"""Operations on one feature that are no activation."""
_STATISTICS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
               "reduce", "argmax", "argmin")  # fmt: skip
_REFUSED = {
    "while": "a while loop runs a number of times that no shape tells; write it as lax.scan",
    "custom_root": "a root search is no layer",
    "pure_callback": "a callback cannot be read",
    "io_callback": "a callback cannot be read",
}


class Interpreter:
    """Reads one jaxpr into a `Flow` and a list of `Use`s."""

    def __init__(self):
        self.flow = Flow()
        self.uses: list[Use] = []
        self.data: int | None = None  # the vertex of all inputs
        self._constants: dict[int, tuple[Value, int]] = {}  # by identity; keeps the value alive
        self._layers: dict[int, Use] = {}  # the weight that made a vertex

    def input(self) -> Feature:
        """Returns a feature of the vertex that holds the inputs."""
        if self.data is None:
            self.data = self.flow.add_vertex(Kind.DATA)
        return Feature(self.data)

    def read(self, jaxpr: core.Jaxpr, constants: Sequence[Value], arguments: Sequence[Value]):
        """Returns the values of a jaxpr's outputs."""
        values: dict[core.Var, Value] = {}
        values.update(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        literal = Known()

        def value(atom) -> Value:
            return literal if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [value(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        name = equation.primitive.name
        known = all(isinstance(value, Known) for value in values)
        if name.startswith("random_") or name in _RANDOM or (known and name not in _CALLS):
            return [Known() for _ in equation.outvars]
        if name in _REFUSED:
            self._refuse(equation, values, _REFUSED[name])
        if name in _CALLS:
            return self._call(equation, values)
        if name == "scan":
            return self._scan(equation, values)
        if name == "cond":
            return self._cond(equation, values)
        special: dict[str, Callable[..., Value]] = {
            "dot_general": self._dot,
            "conv_general_dilated": self._convolution,
            "gather": self._gather,
            "concatenate": self._concatenation,
            "select_n": self._select,
            "reduce_window_sum": self._pooling,
        }
        if name in special:
            result = special[name](equation, values)
        elif any(isinstance(value, Feature) for value in values):
            result = self._elementwise(equation, values)
        else:
            result = self._made_of_params(values)
        return [result] * len(equation.outvars)

    # Operations on single values and pairs.

    def _elementwise(self, equation: core.JaxprEqn, values: list[Value]) -> Feature:
        """Joins features, and binds the weights that are added to them or multiplied with them."""
        name = equation.primitive.name
        features = _features(values)
        weights = [value for value in values if isinstance(value, Weight)]
        linear = name in _LINEAR or name in _ADDITIONS
        vertices = list(dict.fromkeys(feature.vertex for feature in features))
        if len(vertices) == 1:
            result = self._own(name, linear, features)
        elif name in _ADDITIONS:
            result = self._join(Kind.SUM, features)
        else:
            result = self._gate(features)
        for weight in weights:
            if name in _ADDITIONS:
                self._bias(equation, weight, features[0])
            elif name in _PRODUCTS:
                self._use(equation, weight, "scale", result.vertex)
                result = dataclasses.replace(result, bare=False)
            else:
                self._refuse(equation, values, f"{name} of features and a parameter is no layer")
        return result

    def _own(self, name: str, linear: bool, features: list[Feature]) -> Feature:
        """A function of features of one vertex."""
        values = [feature for feature in features if not feature.statistic]
        statistic = not values or name in _STATISTICS
        values = values or features
        active = any(feature.active for feature in values)
        if name not in _ADDITIONS and name not in _STATISTICS:
            active |= not linear or len(values) > 1
        bare = linear and len(features) == 1 and features[0].bare and not statistic
        return Feature(features[0].vertex, active, statistic, bare)

    def _bias(self, equation: core.JaxprEqn, weight: Weight, feature: Feature) -> None:
        layer = self._layers.get(feature.vertex) if feature.bare else None
        if layer is None:
            self._use(equation, weight, "bias", feature.vertex)
        else:
            options = {"fan_in": layer.fan_in, "fan_out": layer.fan_out, "spatial": layer.spatial}
            self._use(equation, weight, "bias", feature.vertex, edge=layer.edge, **options)

    def _gate(self, features: list[Feature]) -> Feature:
        """The product of features, or any other function of several; data only gates."""
        deep = [feature for feature in features if self._kind(feature) != Kind.DATA]
        if len({feature.vertex for feature in deep}) < 2:
            return Feature((deep or features)[0].vertex, True)
        return self._join(Kind.PRODUCT, deep)

    def _join(self, kind: Kind, features: list[Feature]) -> Feature:
        vertex = self.flow.add_vertex(kind)
        sources: dict[int, bool] = {}
        for feature in features:
            sources[feature.vertex] = sources.get(feature.vertex, False) or feature.active
        for source, active in sources.items():
            self.flow.add_edge(source, vertex, Operation.SKIP, before=active)
        return Feature(vertex)

    def _select(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        chosen = values[1:]  # the first says which
        if not _features(chosen):
            weights = [value for value in chosen if isinstance(value, Weight)]
            if weights:
                return self._made_of_params(chosen)
            return values[0] if isinstance(values[0], Feature) else Known()
        features = _features(chosen)
        for weight in chosen:
            if isinstance(weight, Weight):
                self._use(equation, weight, "token", features[0].vertex)
        if len({feature.vertex for feature in features}) == 1:
            return Feature(features[0].vertex, True)
        return self._gate(features)

    def _concatenation(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        features = _features(values)
        if not features:
            return self._made_of_params(values)
        if len({feature.vertex for feature in features}) == 1:
            result = Feature(features[0].vertex, any(feature.active for feature in features))
        else:
            result = self._join(Kind.CONCATENATION, features)
        for value in values:
            if isinstance(value, Weight):
                self._use(equation, value, "token", result.vertex)
        return result

    def _pooling(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        (value,) = values
        window = equation.params["window_dimensions"]
        if not isinstance(value, Feature) or self._kind(value) == Kind.DATA or max(window) == 1:
            return value
        vertex = self.flow.add_vertex(Kind.LAYER)
        self.flow.add_edge(
            value.vertex,
            vertex,
            Operation.AVG_POOL,
            kernel_size=max(window),
            before=value.active,
        )
        return Feature(vertex)

    # Operations that hold a weight.

    def _dot(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        left, right = values
        if isinstance(left, Feature) and isinstance(right, Feature):
            if left.vertex == right.vertex:
                return Feature(left.vertex, True)
            return self._gate([left, right])
        sides = [side for side, value in enumerate(values) if isinstance(value, Weight)]
        if len(sides) == 2:
            return self._made_of_params(values)
        if not sides:
            return next(value for value in values if isinstance(value, Feature))
        (side,) = sides
        weight, other = values[side], values[1 - side]
        contracting, batch = equation.params["dimension_numbers"]
        shape = _shape(equation.invars[side])
        fan_in = math.prod(shape[axis] for axis in contracting[side])
        rest = set(range(len(shape))) - set(contracting[side]) - set(batch[side])
        fan_out = math.prod(shape[axis] for axis in rest)
        return self._layer(equation, weight, other, Operation.LINEAR, fan_in, fan_out)

    def _convolution(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        data, kernel = values
        if isinstance(data, Weight):
            self._refuse(equation, values, "a parameter is convolved")
        if isinstance(kernel, Feature):
            return self._gate(_features(values))
        if not isinstance(kernel, Weight):
            return data
        shape = _shape(equation.invars[1])
        out_axis, in_axis, *spatial_axes = equation.params["dimension_numbers"].rhs_spec
        spatial = tuple(shape[axis] for axis in spatial_axes)
        positions = math.prod(spatial)
        fan_in = shape[in_axis] * positions
        fan_out = shape[out_axis] // equation.params["feature_group_count"] * positions
        return self._layer(equation, kernel, data, Operation.CONV, fan_in, max(fan_out, 1), spatial)

    def _gather(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        table, index = values[:2]
        if isinstance(table, Weight) and isinstance(index, Feature):
            shape = _shape(equation.invars[0])
            fan_out = shape[-1]
            vertex = self.flow.add_vertex(Kind.LAYER)
            edge = self.flow.add_edge(index.vertex, vertex, Operation.LINEAR)
            self._use(equation, table, "embedding", vertex, edge=edge, fan_out=fan_out)
            return Feature(vertex)
        if isinstance(table, Known):
            return index if isinstance(index, Feature) else Known()
        return table

    def _layer(
        self,
        equation: core.JaxprEqn,
        weight: Value,
        source: Value,
        operation: Operation,
        fan_in: int,
        fan_out: int,
        spatial: tuple[int, ...] = (),
    ) -> Feature:
        assert isinstance(weight, Weight)
        if isinstance(source, Known):
            source = Feature(self._constant(source))
        assert isinstance(source, Feature)
        vertex = self.flow.add_vertex(Kind.LAYER)
        edge = self.flow.add_edge(
            source.vertex,
            vertex,
            operation,
            kernel_size=max(spatial, default=1),
            before=source.active,
        )
        fans = {"fan_in": fan_in, "fan_out": fan_out, "spatial": spatial}
        self._use(equation, weight, "weight", vertex, edge=edge, **fans)
        self._layers[vertex] = self.uses[-1]
        return Feature(vertex, bare=True)

    def _constant(self, value: Known) -> int:
        """The vertex of features that no input reaches."""
        if id(value) not in self._constants:
            self._constants[id(value)] = (value, self.flow.add_vertex(Kind.CONSTANT))
        return self._constants[id(value)][1]

    # Functions in functions.

    def _call(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if name in equation.params:
                inner = equation.params[name]
                break
        else:
            self._refuse(equation, values, "its jaxpr is not where it was looked for")
        if isinstance(inner, core.ClosedJaxpr):
            return self.read(inner.jaxpr, [Known() for _ in inner.consts], values)
        return self.read(inner, [], values)

    def _scan(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Unrolls the loop: every slice of a scanned parameter is a layer of its own."""
        inner = equation.params["jaxpr"]
        constants = [Known() for _ in inner.consts]
        fixed, carried = equation.params["num_consts"], equation.params["num_carry"]
        carry, stacked = values[fixed : fixed + carried], values[fixed + carried :]
        outputs: list[Value] = []
        for step in range(equation.params["length"]):
            slices = [
                dataclasses.replace(value, index=step) if isinstance(value, Weight) else value
                for value in stacked
            ]
            results = self.read(inner.jaxpr, constants, [*values[:fixed], *carry, *slices])
            carry = results[:carried]
            found = results[carried:]
            outputs = found if step == 0 else [
                self._both(one, other) for one, other in zip(outputs, found, strict=True)
            ]  # fmt: skip
        if not outputs:
            outputs = [Known()] * (len(equation.outvars) - carried)
        return [*carry, *outputs]

    def _both(self, one: Value, other: Value) -> Value:
        """What holds two values, as the stacked outputs of a loop do."""
        features = _features([one, other])
        if len(features) < 2 or features[0].vertex == features[1].vertex:
            return features[-1] if features else one
        return self._join(Kind.CONCATENATION, features)

    def _cond(self, equation: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Every branch is read; where they give different vertices, any of them may come."""
        branches = equation.params["branches"]
        results = [
            self.read(branch.jaxpr, [Known() for _ in branch.consts], values[1:])
            for branch in branches
        ]
        chosen = []
        for outcomes in zip(*results, strict=True):
            features = _features(outcomes)
            if len({feature.vertex for feature in features}) > 1:
                chosen.append(self._join(Kind.CONCATENATION, features))
            else:
                chosen.append(features[0] if features else outcomes[0])
        return chosen

    # Bookkeeping.

    def _made_of_params(self, values: Sequence[Value]) -> Value:
        weights = [value for value in values if isinstance(value, Weight)]
        leaves = tuple(dict.fromkeys(leaf for weight in weights for leaf in weight.leaves))
        indices = {weight.index for weight in weights} - {None}
        return Weight(leaves, indices.pop() if len(indices) == 1 else None)

    def _use(self, equation, weight: Value, kind: str, vertex: int, **options) -> None:
        assert isinstance(weight, Weight)
        use = Use(weight.leaves, weight.index, kind, vertex, _line(equation), **options)
        self.uses.append(use)

    def _kind(self, feature: Feature) -> Kind:
        return self.flow.kinds[feature.vertex]

    def _refuse(self, equation: core.JaxprEqn, values: Sequence[Value], reason: str):
        leaves = [leaf for value in values if isinstance(value, Weight) for leaf in value.leaves]
        named = f" of parameter {', '.join(map(repr, leaves))}" if leaves else ""
        raise TraceError(f"{equation.primitive.name}{named} at {_line(equation)}: {reason}")


def _features(values: Sequence[Value]) -> list[Feature]:
    return [value for value in values if isinstance(value, Feature)]


def _shape(atom) -> tuple[int, ...]:
    return atom.aval.shape


def _line(equation: core.JaxprEqn) -> str:
    from jax._src import source_info_util  # JAX offers no public way to an equation's place

    return source_info_util.summarize(equation.source_info)
