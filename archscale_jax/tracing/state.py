"""What is known of a function while it is read: one object that every primitive writes to."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from archscale_jax._expressions import (
    Constant,
    Expression,
    Statistic,
    Unknown,
    Variable,
    is_factor,
)
from archscale_jax._graph import Operator
from archscale_jax.tracing.axes import shape_of
from archscale_jax.tracing.flow import Edge, Flow, Kind
from archscale_jax.tracing.starts import Start
from archscale_jax.tracing.values import (
    Axes,
    Feature,
    Known,
    Labels,
    TraceError,
    Use,
    Value,
    Weight,
    changed,
    features_of,
    weights_of,
)


def line_of(equation: core.JaxprEqn) -> str:
    """Returns file, line and function of an equation."""
    from jax._src import source_info_util  # JAX offers no public way to an equation's place

    return source_info_util.summarize(equation.source_info)


class Call:
    """One equation of a jaxpr, the values of its operands, and which of its results are used.

    Attributes:
      equation: the equation.
      values: of its operands.
      live: whether each of its results is used.
      finished: variables that no equation behind it reads.
      name: of the primitive.
      features: those of the operands that are features.
      weights: those of the operands that are made of params alone.
    """

    def __init__(
        self,
        equation: core.JaxprEqn,
        values: list[Value],
        live: tuple[bool, ...] = (),
        finished: Collection[core.Var] = (),
    ):
        self.finished = finished
        self.equation = equation
        self.values = values
        self.live = live
        self.name: str = equation.primitive.name
        self.features = features_of(values)
        self.weights = weights_of(values)

    def of(self, values: Sequence[Value]) -> "Call":
        """Returns the same call of other values."""
        return Call(self.equation, list(values), self.live, self.finished)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of the primitive."""
        return self.equation.params

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return shape_of(self.equation.outvars[0])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the operands."""
        return [shape_of(atom) for atom in self.equation.invars]

    @property
    def line(self) -> str:
        """File, line and function."""
        return line_of(self.equation)

    @property
    def is_of_derivative(self) -> bool:
        """Whether a derivative that is taken inside of the function makes it."""
        scopes = self.equation.source_info.name_stack.stack
        return any(type(one).__name__ == "Transform" and one.name == "jvp" for one in scopes)


class Logits(NamedTuple):
    """Sums of products of queries and keys.

    Attributes:
      queries: number of the vertex of the queries.
      sizes: how many products are summed; heads of several sizes may share a vertex.
      places: the equations that lead to those that make the sums, of several heads several.
    """

    queries: int
    sizes: frozenset[int]
    places: frozenset[tuple[int, ...]]


@dataclasses.dataclass
class State:
    """What has been read of a function.

    Attributes:
      shapes: of the leaves, by name.
      declared: names of the leaves whose roles the user has told.
      unknown: what to do at a primitive that is not registered, `error`, `warn` or `accept`.
      starts: values of leaves before training, see `starting_values`.
      flow: the vertices and edges found.
      uses: what the parameters do.
      data: number of the vertex that holds all inputs, once there is one.
      inputs_read: numbers of the inputs that layers read.
      given: labels of the axes of inputs.
      units: labels of the axes that are features of layers; the others are positions.
      own: labels of the axes that the layer of a vertex writes.
      constants: vertices of values that no input reaches.
      learned_axes: labels of the axes of values that are learned features.
      without_inputs: vertices that no input reaches.
      contracted: vertices whose features are summed over in a product, as queries and keys are.
      queries: such products by their vertex, or by the one that holds queries and keys.
      places: by the vertex of a layer or product, the equations that lead to the one that made it.
      path: ids of the equations, one in another, that what is read lies in.
      layers: numbers of the uses that made a vertex.
      notes: what could not be known, and what was supposed.
      unsupported: messages on parameters that cannot be read.
      replaced: numbers of uses that turned out to be part of another.
      modulated: by the number of a use, labels of the features that scale a matrix of parameters.
      written: by the label of an axis that a layer writes, the axes of leaves that run along it.
      apart: axes of leaves, (leaf, axis), that write features of which the layers behind apply a
        matrix of its own to every entry: experts side by side.
      gates: pairs of vertices: a layer, and a product in which it scales whole groups of features.
      manual: how many `shard_map`s what is read lies in.
    """

    shapes: Mapping[str, tuple[int, ...]]
    declared: Collection[str] = ()
    unknown: str = "error"
    starts: Mapping[str, Start] = dataclasses.field(default_factory=dict)
    flow: Flow = dataclasses.field(default_factory=Flow)
    uses: list[Use] = dataclasses.field(default_factory=list)
    data: int | None = None
    inputs_read: set[int] = dataclasses.field(default_factory=set)
    given: set[Hashable] = dataclasses.field(default_factory=set)
    units: set[Hashable] = dataclasses.field(default_factory=set)
    own: dict[int, Labels] = dataclasses.field(default_factory=dict)
    constants: dict[Value, int] = dataclasses.field(default_factory=dict)
    learned_axes: dict[Value, Axes] = dataclasses.field(default_factory=dict)
    without_inputs: set[int] = dataclasses.field(default_factory=set)
    contracted: set[int] = dataclasses.field(default_factory=set)
    queries: dict[int, Logits] = dataclasses.field(default_factory=dict)
    places: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    path: tuple[int, ...] = ()
    layers: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    unsupported: dict[str, None] = dataclasses.field(default_factory=dict)
    replaced: set[int] = dataclasses.field(default_factory=set)
    modulated: dict[int, Labels] = dataclasses.field(default_factory=dict)
    written: dict[Hashable, Labels] = dataclasses.field(default_factory=dict)
    apart: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    gates: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    manual: int = 0
    _fresh: Any = dataclasses.field(default_factory=itertools.count)

    def fresh(self) -> int:
        """Returns a number that tells one thing from all others."""
        return next(self._fresh)

    def unit_label(self) -> int:
        """Returns the label of a new axis of features."""
        label = self.fresh()
        self.units.add(label)
        return label

    def has_units(self, labels: Labels) -> bool:
        """Whether an axis with these labels holds features of a layer."""
        return not self.units.isdisjoint(labels)

    def kind(self, feature: Feature) -> Kind:
        """What the vertex of a feature is."""
        return self.flow.kinds[feature.vertex]

    def is_data(self, value: Value) -> bool:
        """Whether a value is a feature that comes of inputs alone."""
        return isinstance(value, Feature) and self.kind(value) == Kind.DATA

    def reaches_no_input(self, features: Sequence[Feature]) -> bool:
        """Whether features depend on no input."""
        return all(feature.vertex in self.without_inputs for feature in features)

    def note(self, text: str) -> None:
        """Notes what was supposed."""
        self.notes[text] = None

    def fail(self, call: Call, reason: str, values: Sequence[Value] | None = None) -> TraceError:
        """Returns the error of an operation that cannot be read."""
        values = call.weights if values is None else values
        leaves = [leaf for value in weights_of(values) for leaf in value.leaves]
        named = f" of parameter {', '.join(map(repr, dict.fromkeys(leaves)))}" if leaves else ""
        return TraceError(f"{call.name}{named} at {call.line}: {reason}")

    def keep_apart(self, along: Sequence[tuple[Labels, int]]) -> None:
        """Notes the leaves that write the entries to which a layer applies matrices of their own.

        Args:
          along: labels and size of the axes of features that have a matrix for every entry.
        """
        for labels, size in along:
            for label in labels & self.units:
                own = self.written.get(label, frozenset())
                self.apart |= {one for one in own if self.shapes[one[0]][one[1]] == size}

    # Vertices.

    def new_vertex(
        self, kind: Kind, axes: Axes, expression: Expression | None = None, **options: Any
    ) -> Feature:
        """Returns the features of a new vertex."""
        vertex = self.flow.add_vertex(kind, expression)
        return Feature(vertex, Variable("vertex", vertex), axes, **options)

    def join(
        self,
        kind: Kind,
        features: Sequence[Feature],
        axes: Axes,
        *,
        expression: Expression | None = None,
        counts: Sequence[int] = (),
    ) -> Feature:
        """Returns a vertex that sums, multiplies or concatenates features of several vertices."""
        result = self.new_vertex(kind, axes, expression)
        by_source: dict[int, list[int]] = {}
        for place, feature in enumerate(features):
            by_source.setdefault(feature.vertex, []).append(place)
        for source, places in by_source.items():
            own = [features[place] for place in places]
            sizes = [counts[place] if counts else 1 for place in places]
            self.flow.add_edge(
                source,
                result.vertex,
                _JOINS[kind],
                before=mixture(
                    self, [(one.expression, n) for one, n in zip(own, sizes, strict=True)]
                ),
                count=sum(sizes),
                passed=frozenset().union(*(one.passed for one in own)),
            )
        if self.reaches_no_input(features):
            self.without_inputs.add(result.vertex)
        return result

    def constant(self, value: Known | Weight) -> Feature:
        """Returns features that no input reaches: a constant, or one that is learned."""
        if value not in self.constants:
            vertex = self.flow.add_vertex(Kind.CONSTANT, value.expression)
            self.constants[value] = vertex
            self.without_inputs.add(vertex)
        vertex = self.constants[value]
        axes = self.learned_axes.get(value, value.axes)
        return Feature(vertex, Variable("vertex", vertex), axes, array=value.array)

    def learned(self, call: Call, value: Weight, last: Sequence[int]) -> Feature:
        """Returns features that are parameters themselves.

        Args:
          call: where they are read.
          value: the parameters.
          last: axes of the value that are features; the others are positions.
        """
        fresh = value not in self.constants
        feature = self.constant(value)
        if not fresh:
            return feature
        axes = tuple(
            frozenset([self.unit_label()]) if place in last
            else frozenset([self.fresh()]) if labels else labels
            for place, labels in enumerate(value.axes)
        )  # fmt: skip
        roles = {
            "output": list(last),
            "positions": [place for place in range(len(axes)) if place not in last],
        }
        own = {one for place in last for one in value.axes[place]}
        # A table whose rows a norm has changed brings the gain and the bias of that norm.
        along = {
            leaf: {(place, axis) for place, labels in enumerate(value.axes)
                   for name, axis in labels if name == leaf and self.shapes[leaf][axis] > 1}
            for leaf in value.leaves
        }  # fmt: skip
        first = max(value.leaves, key=lambda leaf: len(along[leaf]))
        fan = math.prod(self.shapes[name][axis] for name, axis in own if name == first)
        for leaf in value.leaves:
            mine = changed(value, leaves=(leaf,))
            if len(along[leaf]) == len(along[first]):
                self.use(call, mine, "features", feature.vertex, roles, fan_in=fan, fan_out=fan,
                         expression=value.expression)  # fmt: skip
                continue
            variables = Variable("leaf", leaf), Variable("leaf", first)
            kind = "scale" if is_factor(value.expression, *variables) else "offset"
            self.use(call, mine, kind, feature.vertex, {**roles, "output": (), "batch": last})
        self.note(
            f"{', '.join(value.leaves)} at {call.line}: read as learned features, to which layers "
            "are applied"
        )
        feature = changed(feature, axes=axes)
        self.learned_axes[value] = axes
        return feature

    def note_logits(self, vertex: int, queries: int, size: int) -> None:
        """Notes that the equation at hand sums so many products of queries and keys."""
        sizes, places = frozenset([size]), frozenset([self.path])
        if vertex in self.queries:
            sizes |= self.queries[vertex].sizes
            places |= self.queries[vertex].places
        self.queries[vertex] = Logits(queries, sizes, places)

    # Uses of parameters.

    def use(
        self,
        call: Call,
        weight: Weight,
        kind: str,
        vertex: int,
        roles_of_axes: Mapping[str, Collection[int]],
        **options: Any,
    ) -> tuple[int, ...]:
        """Notes what the leaves of a value do; returns the numbers of the uses.

        Args:
          call: where.
          weight: the value.
          kind: see `Use`.
          vertex: see `Use`.
          roles_of_axes: axes of the value by what they do, `contracted`, `output`, `batch` and
            `positions`.
          **options: further fields of `Use`.
        """
        numbers = []
        for leaf in weight.leaves:
            own = {
                role: tuple(
                    sorted(
                        {
                            axis
                            for place in places
                            for name, axis in weight.axes[place]
                            if name == leaf
                        }
                    )
                )
                for role, places in roles_of_axes.items()
            }
            slices = frozenset((axis, entry) for name, axis, entry in weight.slices if name == leaf)
            fields: dict[str, Any] = {**own, **options}
            self.uses.append(Use(leaf, kind, vertex, call.line, slices=slices, **fields))
            numbers.append(len(self.uses) - 1)
        return tuple(numbers)

    def aligned(self, weight: Weight, feature: Feature) -> dict[str, list[int]]:
        """Returns which axes of a value run along features and which along positions."""
        last = len(weight.axes) - 1
        data = self.kind(feature) == Kind.DATA
        axes = feature.axes if len(feature.axes) == len(weight.axes) else weight.axes
        own = self.own.get(feature.vertex, frozenset())
        found: dict[str, list[int]] = {"batch": [], "positions": []}
        for place, labels in enumerate(axes):
            if data:
                along_units = place == last
            else:
                along_units = self.has_units(labels) or not labels or len(axes) == 1
                if labels & own and not self.has_units(labels):  # of a layer that mixes positions
                    found["batch"].append(place)
                    along_units = False
            found["batch" if along_units else "positions"].append(place)
        return found


_JOINS = {
    Kind.SUM: Operator.SKIP,
    Kind.PRODUCT: Operator.PRODUCT,
    Kind.CONCATENATION: Operator.CONCATENATION,
}


def mixture(state: State, parts: Sequence[tuple[Expression, int]]) -> Expression:
    """Returns what an entry is that is one of several expressions, in these proportions."""
    import numpy as np

    from archscale_jax._expressions import apply

    if len(parts) == 1:
        return parts[0][0]
    counts = np.array([count for _, count in parts], float)
    choice = Variable(
        "choice", state.fresh(), nodes=np.arange(len(parts)), weights=counts / counts.sum()
    )
    return apply("choose", _chosen, choice, *(expression for expression, _ in parts))


def mean_over(
    state: State, expression: Expression, labels: Labels, count: int, name: str = "mean"
) -> Expression:
    """Returns the statistic of an expression over an axis; itself where it is constant."""
    if not labels or isinstance(expression, Constant | Unknown):
        return expression
    units = state.has_units(labels) or any(isinstance(label, tuple) for label in labels)
    return Statistic(expression, labels, max(count, 1), units, name)


def _chosen(place, *values):
    import numpy as np

    return np.choose(place, values)


def edge_of(state: State, vertex: int) -> Edge | None:
    """Returns the edge of the layer that made a vertex."""
    numbers = state.layers.get(vertex, ())
    return state.uses[numbers[0]].edge if numbers else None
