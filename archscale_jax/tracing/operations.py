"""What one operation on features and weights is: layer, sum, product, concatenation, activation."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from jax.extend import core

from archscale_jax.graph import Operator
from archscale_jax.tracing.flow import Flow, Kind
from archscale_jax.tracing.sharding import COLLECTIVES, LAYOUTS, sliced, split_after, whole_shape
from archscale_jax.tracing.values import Feature, Known, TraceError, Use, Value, Weight, features_of

ADDITIONS = ("add", "sub", "add_any")
_PRODUCTS = ("mul", "div")
_LINEAR = ("neg", "reshape", "broadcast_in_dim", "squeeze", "transpose", "rev", "slice", "copy",
           "convert_element_type", "stop_gradient", "name", "reduce_precision", "pad",
           "dynamic_slice", "split", "cumsum", "real", "optimization_barrier", "mul", "div",
           *LAYOUTS, *COLLECTIVES)  # fmt: skip
"""Operations on one feature that are no activation."""
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite")
_STATISTICS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
               "reduce", "argmax", "argmin", "pmax", "pmin")  # fmt: skip
_JOINS = {
    Kind.SUM: Operator.SKIP,
    Kind.PRODUCT: Operator.PRODUCT,
    Kind.CONCATENATION: Operator.CONCATENATION,
}


class Operations:
    """What single operations do to the flow; `Interpreter` holds the state and the functions."""

    flow: Flow
    uses: list[Use]
    inputs_read: set[int]
    declared: Collection[str]
    _constants: dict[int, tuple[Value, int]]
    _without_inputs: set[int]
    _layers: dict[int, tuple[Use, int]]
    _manual: int

    def _operation(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        special: dict[str, Callable[..., Value]] = {
            "dot_general": self._dot,
            "conv_general_dilated": self._convolution,
            "gather": self._gather,
            "concatenate": self._concatenation,
            "select_n": self._select,
            "reduce_window_sum": self._pooling,
            "dynamic_slice": self._slicing,
            "dynamic_update_slice": self._update,
        }
        name = equation.primitive.name
        if name.startswith("scatter"):
            return self._update(equation, values)
        if name in special:
            return special[name](equation, values)
        if any(isinstance(value, Feature) for value in values):
            return self._elementwise(equation, values, name)
        return self._made_of_params(equation, values)

    # Operations on single values and pairs.

    def _elementwise(self, equation: core.JaxprEqn, values: list[Value], name: str) -> Value:
        """Joins features, and binds the weights that are added to them or multiplied with them."""
        features = self._without_masks(features_of(values))
        weights = [value for value in values if isinstance(value, Weight)]
        if weights and name in _PRODUCTS and self._is_constant(features):
            return self._made_of_params(equation, weights)  # as the weight over its norm
        linear = name in _LINEAR or name in ADDITIONS
        vertices = list(dict.fromkeys(feature.vertex for feature in features))
        if len(vertices) == 1:
            result = self._own(name, linear, features)
        elif name in ADDITIONS:
            result = self._join(Kind.SUM, features)
        else:
            result = self._gate(features)
        for weight in weights:
            if name in ADDITIONS:
                self._bias(equation, weight, features[0])
            elif name in _PRODUCTS:
                self._use(equation, weight, "scale", result.vertex)
                result = dataclasses.replace(result, bare=False, scaled=True)
            else:
                self._check_declared(equation, weight, f"{name} of features and a parameter")
                self._use(equation, weight, "scale", result.vertex)
                result = dataclasses.replace(result, active=True)
        return result

    def _own(self, name: str, linear: bool, features: list[Feature]) -> Feature:
        """A function of features of one vertex."""
        values = [feature for feature in features if not feature.statistic]
        statistic = not values or name in _STATISTICS
        values = values or features
        active = any(feature.active for feature in values)
        if self._kind(features[0]) == Kind.DATA and name in _COMPARISONS:
            statistic = True
        elif name not in ADDITIONS and name not in _STATISTICS:
            active |= not linear or len(values) > 1
        alone = linear and len(features) == 1 and not statistic
        return dataclasses.replace(
            _same(features),
            active=active,
            statistic=statistic,
            bare=alone and features[0].bare,
            scaled=alone and features[0].scaled and name not in ADDITIONS,
        )

    def _without_masks(self, features: list[Feature]) -> list[Feature]:
        """Leaves out masks made of inputs where they meet features of layers."""
        kept = [one for one in features if not (one.statistic and self._kind(one) == Kind.DATA)]
        return kept if any(self._kind(one) != Kind.DATA for one in kept) else features

    def _is_constant(self, features: list[Feature]) -> bool:
        return all(feature.vertex in self._without_inputs for feature in features)

    def _bias(self, equation: core.JaxprEqn, weight: Weight, feature: Feature) -> None:
        """A layer's bias has one entry a unit; what has more is a table, such as positions."""
        layer, units = self._layers.get(feature.vertex, (None, 0)) if feature.bare else (None, 0)
        if layer is None or weight.size > units:
            kind = "offset" if feature.scaled else "bias"
            self._use(equation, weight, kind, feature.vertex)
        else:
            options = {"fan_in": layer.fan_in, "fan_out": layer.fan_out, "spatial": layer.spatial}
            self._use(equation, weight, "bias", feature.vertex, edge=layer.edge, **options)

    def _gate(self, features: list[Feature]) -> Feature:
        """The product of features, or any other function of several; data only gates."""
        deep = [feature for feature in features if self._kind(feature) != Kind.DATA]
        if len({feature.vertex for feature in deep}) < 2:
            return dataclasses.replace(_same(deep or features), active=True)
        return self._join(Kind.PRODUCT, deep)

    def _join(self, kind: Kind, features: list[Feature]) -> Feature:
        vertex = self.flow.add_vertex(kind)
        sources: dict[int, bool] = {}
        for feature in features:
            sources[feature.vertex] = sources.get(feature.vertex, False) or feature.active
        for source, active in sources.items():
            self.flow.add_edge(source, vertex, _JOINS[kind], before=active)
        if self._is_constant(features):
            self._without_inputs.add(vertex)
        activations = kind == Kind.CONCATENATION and all(sources.values())
        return Feature(vertex, active=activations)

    def _select(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        which, chosen = values[0], values[1:]
        mask = isinstance(which, Feature) and self._kind(which) == Kind.DATA
        if not features_of(chosen):
            weights = [value for value in chosen if isinstance(value, Weight)]
            if weights:
                return self._made_of_params(equation, chosen)
            if not isinstance(which, Feature):
                return Known()
            return dataclasses.replace(which, statistic=True) if mask else which
        features = self._without_masks(features_of(chosen))
        for weight in chosen:
            if isinstance(weight, Weight):
                self._use(equation, weight, "token", features[0].vertex)
        if len({feature.vertex for feature in features}) > 1:
            return self._gate(features)
        if isinstance(which, Feature) and not mask:
            return dataclasses.replace(_same(features), active=True)
        return self._own("add", True, features)

    def _slicing(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        """Indices, which come after the first operand, change nothing."""
        shapes = _shape(equation.invars[0]), _shape(equation.outvars[0])
        return sliced(values[0], *shapes, self._manual > 0)

    def _update(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        """Values that are written into others, or added to them, at indices."""
        name = equation.primitive.name
        operand, update = (values[0], values[2]) if name != "dynamic_update_slice" else values[:2]
        both: list[Value] = [one for one in (operand, update) if not isinstance(one, Known)]
        if not features_of(both):
            return self._made_of_params(equation, both) if both else Known()
        if name in ("scatter-add", "scatter-sub"):
            return self._elementwise(equation, both, "add")
        return self._concatenation(equation, both)

    def _concatenation(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        features = features_of(values)
        if not features:
            return self._made_of_params(equation, values)
        if len({feature.vertex for feature in features}) == 1:
            active = any(feature.active for feature in features)
            result = dataclasses.replace(_same(features), active=active)
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
            Operator.AVG_POOL,
            kernel_size=max(window),
            before=value.active,
        )
        return Feature(vertex, active=value.active)

    # Operations that hold a weight.

    def _dot(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        left, right = values
        if isinstance(left, Feature) and isinstance(right, Feature):
            if left.vertex == right.vertex:
                return dataclasses.replace(_same([left, right]), active=True)
            return self._gate([left, right])
        sides = [side for side, value in enumerate(values) if isinstance(value, Weight)]
        if len(sides) == 2:
            return self._made_of_params(equation, values)
        if not sides:
            return next(value for value in values if isinstance(value, Feature))
        (side,) = sides
        weight, other = values[side], values[1 - side]
        contracting, batch = equation.params["dimension_numbers"]
        shape = whole_shape(weight, _shape(equation.invars[side]))
        fan_in = math.prod(shape[axis] for axis in contracting[side])
        rest = set(range(len(shape))) - set(contracting[side]) - set(batch[side])
        fan_out = math.prod(shape[axis] for axis in rest)
        units = fan_out * math.prod(shape[axis] for axis in batch[side])
        return self._layer(equation, weight, other, Operator.LINEAR, fan_in, fan_out, units)

    def _convolution(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        data, kernel = values
        if isinstance(data, Weight):
            if isinstance(kernel, Feature):
                self._check_declared(equation, data, "a parameter that features convolve")
                return kernel
            return self._made_of_params(equation, values)
        if isinstance(kernel, Feature):
            return self._gate(features_of(values))
        if not isinstance(kernel, Weight):
            return data
        shape = whole_shape(kernel, _shape(equation.invars[1]))
        out_axis, in_axis, *spatial_axes = equation.params["dimension_numbers"].rhs_spec
        spatial = tuple(shape[axis] for axis in spatial_axes)
        positions = math.prod(spatial)
        fan_in = shape[in_axis] * positions
        fan_out = shape[out_axis] // equation.params["feature_group_count"] * positions
        fans = fan_in, max(fan_out, 1), shape[out_axis]
        return self._layer(equation, kernel, data, Operator.CONV, *fans, spatial)

    def _gather(self, equation: core.JaxprEqn, values: list[Value]) -> Value:
        table, index = values[:2]
        if isinstance(table, Weight) and isinstance(index, Feature):
            self._check_split(equation, table)
            fan_out = whole_shape(table, _shape(equation.invars[0]))[-1]
            vertex = self.flow.add_vertex(Kind.LAYER)
            edge = self.flow.add_edge(index.vertex, vertex, Operator.LINEAR)
            self.inputs_read |= index.inputs
            self._use(equation, table, "embedding", vertex, edge=edge, fan_out=fan_out)
            return Feature(vertex)
        if isinstance(table, Known):
            return index if isinstance(index, Feature) else Known()
        return self._slicing(equation, values) if isinstance(table, Weight) else table

    def _layer(
        self,
        equation: core.JaxprEqn,
        weight: Value,
        source: Value,
        operator: Operator,
        fan_in: int,
        fan_out: int,
        units: int,
        spatial: tuple[int, ...] = (),
    ) -> Feature:
        assert isinstance(weight, Weight)
        self._check_split(equation, weight)
        if isinstance(source, Known):
            source = Feature(self._constant(source))
        assert isinstance(source, Feature)
        vertex = self.flow.add_vertex(Kind.LAYER)
        edge = self.flow.add_edge(
            source.vertex,
            vertex,
            operator,
            kernel_size=max(spatial, default=1),
            before=source.active,
        )
        fans = {"fan_in": fan_in, "fan_out": fan_out, "spatial": spatial}
        self._use(equation, weight, "weight", vertex, edge=edge, **fans)
        self._layers[vertex] = self.uses[-1], units
        self.inputs_read |= source.inputs
        if self._is_constant([source]):
            self._without_inputs.add(vertex)
        return Feature(vertex, bare=True)

    def _constant(self, value: Known) -> int:
        """The vertex of features that no input reaches."""
        if id(value) not in self._constants:
            self._constants[id(value)] = (value, self.flow.add_vertex(Kind.CONSTANT))
            self._without_inputs.add(self._constants[id(value)][1])
        return self._constants[id(value)][1]

    # Bookkeeping.

    def _made_of_params(self, equation: core.JaxprEqn, values: Sequence[Value]) -> Value:
        weights = [value for value in values if isinstance(value, Weight)]
        leaves = tuple(dict.fromkeys(leaf for weight in weights for leaf in weight.leaves))
        indices = {weight.index for weight in weights} - {None}
        largest = max(math.prod(_shape(result)) for result in equation.outvars)
        split = split_after(equation, values)
        size = min(sum(weight.size for weight in weights), largest * math.prod(split or ()))
        return Weight(leaves, size, indices.pop() if len(indices) == 1 else None, split=split)

    def _use(self, equation, weight: Value, kind: str, vertex: int, **options) -> None:
        assert isinstance(weight, Weight)
        use = Use(weight.leaves, weight.index, kind, vertex, line(equation), **options)
        self.uses.append(use)

    def _kind(self, feature: Feature) -> Kind:
        return self.flow.kinds[feature.vertex]

    def _check_declared(self, equation: core.JaxprEqn, weight: Weight, what: str) -> None:
        """Refuses what is no layer, unless the user has said what the parameter is."""
        for leaf in weight.leaves:
            if leaf not in self.declared:
                reason = (
                    f"{what} is no layer; declare its role with roles={{{leaf!r}: role}}, or bind "
                    "it to the function"
                )
                self._refuse(equation, [weight], reason)

    def _check_split(self, equation: core.JaxprEqn, weight: Weight) -> None:
        """Refuses a layer whose fans are unknown: shapes inside `shard_map` are those of shards."""
        if weight.split is None:
            self._refuse(
                equation,
                [weight],
                "inside jax.shard_map the devices hold parts of it that do not make up one layer, "
                "or it cannot be told which parts; trace the function without shard_map",
            )

    def _refuse(self, equation: core.JaxprEqn, values: Sequence[Value], reason: str):
        leaves = [leaf for value in values if isinstance(value, Weight) for leaf in value.leaves]
        named = f" of parameter {', '.join(map(repr, leaves))}" if leaves else ""
        raise TraceError(f"{equation.primitive.name}{named} at {line(equation)}: {reason}")


def _same(features: Sequence[Feature]) -> Feature:
    """A feature of the vertex of all of these, of which no more is known."""
    inputs = frozenset().union(*(feature.inputs for feature in features))
    return Feature(features[0].vertex, inputs=inputs)


def _shape(atom) -> tuple[int, ...]:
    return atom.aval.shape


def line(equation: core.JaxprEqn) -> str:
    """Returns file, line and function of an equation."""
    from jax._src import source_info_util  # JAX offers no public way to an equation's place

    return source_info_util.summarize(equation.source_info)
