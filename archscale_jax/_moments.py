"""Second moments carried through an architecture (theory §9).

A layer sums over many inputs, so that its output is normal, with the variance

    σ² · reach · ρ,    ρ = E[φ(z)²] for z of the moments of its source,

φ being what the edge makes of its source: an activation, a normalization, constants. Contributions
of layers are independent; those of skips are correlated where they have a common origin. Exact at
infinite width for weights that no two layers share.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from archscale_jax._architecture import (
    OUTPUT,
    Architecture,
    Arrangement,
    EdgeFunction,
    Parameter,
    ParameterUse,
    Role,
)
from archscale_jax._expressions import (
    Constant,
    Distribution,
    Expression,
    Moments,
    Variable,
    apply,
    multiplied,
    statistics,
    substituted,
    variables,
)
from archscale_jax._graph import Operator, is_weight, number_of_vertices
from archscale_jax._quadrature import is_affine, moments, slope, sums_to_one

INPUT_MOMENT = 1.0
"""Second moment of the entries of inputs: they are taken to be standardized."""


def relu(expression: Expression) -> Expression:
    """Returns the expression of ReLU."""
    return apply("max", np.maximum, expression, Constant(0.0))


def edge_functions(architecture: Architecture) -> tuple[EdgeFunction, ...]:
    """Returns what stands on every edge of the graph, ReLU where the architecture does not tell."""
    if architecture.functions is not None:
        return architecture.functions
    graph = architecture.graph
    weights: dict[int, list[str]] = {}
    linear: set[int] = set()
    for parameter in architecture.parameters:
        if parameter.role not in (Role.INPUT, Role.HIDDEN, Role.READOUT):
            continue
        for edge in (parameter.edge, *parameter.further_edges):
            if edge is not None:
                weights.setdefault(edge, []).append(parameter.name)
                if not parameter.activated:
                    linear.add(edge)
    activates = architecture.arrangement == Arrangement.ACTIVATION
    found = []
    for edge, (sender, layer) in enumerate(zip(graph.senders, is_weight(graph), strict=True)):
        source: Expression = Variable("vertex", int(sender))
        plain = not layer or edge in linear
        found.append(
            EdgeFunction(
                source if plain or activates else relu(source),
                OUTPUT if not layer or not activates else relu(OUTPUT),
                weights=tuple(weights.get(edge, ())),
            )
        )
    return tuple(found)


def leaf_distribution(architecture: Architecture) -> Callable[[Variable], Moments | float]:
    """Returns what is known of parameters in expressions: their values before training."""

    @functools.cache
    def starts() -> dict[str, Moments | float]:  # made once asked for: most weights need none
        return {one.name: _start_of(one) for one in architecture.parameters}

    def distribution(variable: Variable) -> Moments | float:
        if variable.kind == "leaf":
            return starts().get(str(variable.source), 1.0)
        return Moments(0.0, 1.0)

    return distribution


def _start_of(parameter: Parameter) -> Moments | float:
    if parameter.role == Role.EMBEDDING and parameter.is_drawn:
        return Moments(0.0, 1.0)
    return parameter.neutral_value if parameter.given is None else parameter.given


def input_moment(function: EdgeFunction) -> float:
    """Returns the second moment of what a layer reads of the inputs.

    Constants, such as 1/255, standardize the inputs; functions of standardized ones, such as sines
    of positions, have the moment that they give them.
    """
    if is_affine(function.before, _ones):
        return INPUT_MOMENT
    second = moments(function.before, _ones).second
    return second if second > 0 and math.isfinite(second) else INPUT_MOMENT


Way = tuple[int, Expression]
"""A vertex, and what is made of its features."""


class Propagation:
    """Moments of vertices, filled in one after the other in the order of the graph.

    Attributes:
      architecture: the network.
      functions: what stands on its edges.
      incoming: edges into every vertex.
      layers: bool [E], the edges that carry a weight.
      data: whether vertex 0 stands for the inputs.
      found: moments of the vertices so far.
      slices: by vertex and `Variable.part`, the second moment of a slice over that of the vertex,
        where its layer is not drawn alike for all of its outputs.
    """

    def __init__(self, architecture: Architecture):
        graph = architecture.graph
        self.architecture = architecture
        self.functions = edge_functions(architecture)
        self.layers = is_weight(graph)
        self.incoming: list[list[int]] = [[] for _ in range(number_of_vertices(graph))]
        for edge, vertex in enumerate(np.asarray(graph.receivers).tolist()):
            self.incoming[vertex].append(edge)
        self.senders: list[int] = np.asarray(graph.senders).tolist()
        self.receivers: list[int] = np.asarray(graph.receivers).tolist()
        self.operators: list[int] = np.asarray(graph.edges["operator"]).tolist()
        self.found: dict[int, Moments] = {}
        self.slices: dict[int, dict[tuple[Any, ...], float]] = {}
        self.data = (
            architecture.functions is not None  # else what feeds vertex 0 was not described
            and not architecture.stems
            and not any(
                one.role == Role.INPUT and one.edge is None for one in architecture.parameters
            )
        )
        self._covariances: dict[tuple[Way, Way], float] = {}
        self._leaves = leaf_distribution(architecture)

    def distribution(self, variable: Variable) -> Moments | float:
        """What is known of a variable of an expression."""
        if variable.kind == "vertex":
            found = self.found.get(variable.source, Moments(0.0, 1.0))  # pyright: ignore
            factor = self.slices.get(variable.source, {}).get(variable.part, 1.0)
            return Moments(math.sqrt(factor) * found.mean, factor * found.second)
        return self._leaves(variable)

    def output_slices(
        self, parameter: Parameter, use: ParameterUse
    ) -> dict[tuple[Any, ...], tuple[int, range]]:
        """Returns the slices in which the outputs of a layer are read, as those of a fused gate.

        Returns:
          By `Variable.part`, an axis of the leaf and its entries that give the slice. Empty where
          the vertex is more than this layer's outputs, or is read as a whole.
        """
        if use.edge is None or self.functions[use.edge].weights != (parameter.name,):
            return {}
        vertex = self.receivers[use.edge]
        if self.incoming[vertex] != [use.edge]:
            return {}
        found = {}
        for part in self.read_slices(vertex):
            if len(part) != 1 or len(part[0]) != 1 or len(part[0][0]) != 5:
                return {}
            _, start, stop, step, size = part[0][0]
            axes = [axis for axis in use.output if parameter.shape[axis] == size]
            if len(axes) != 1:
                return {}
            found[part] = (axes[0], range(start, stop, step))
        return found

    def read_slices(self, vertex: int) -> set[tuple[Any, ...]]:
        """The slices of a vertex that are read, as `Variable.part`."""
        return {
            one.part
            for way in self.ways_from(vertex)
            for one in variables(way)
            if one.kind == "vertex" and one.source == vertex
        }

    def ways_from(self, vertex: int) -> list[Expression]:
        """The expressions in which what a vertex holds goes on."""
        edges = [edge for edge, sender in enumerate(self.senders) if sender == vertex]
        ways = [self.functions[edge].before for edge in edges]
        products = {self.receivers[edge] for edge in edges} & self.architecture.expressions.keys()
        return [*ways, *(self.architecture.expressions[one] for one in sorted(products))]

    def source(self, edge: int) -> Moments:
        """Moments of what an edge makes of its source."""
        before = self.opened(self.functions[edge].before)
        if self.normalizes(before):  # of large features, beside which its ε is nothing
            return moments(before, lambda one: _larger(self.distribution(one), one, 1e4))
        return moments(before, self.distribution)

    def opened(self, expression: Expression) -> Expression:
        """Returns an expression with products of features written out where that matters.

        It does beside features that a product holds too, as the numerator and the denominator of a
        weighted average, and in a sum over positions for which the product was divided.
        """
        own = {one for one in variables(expression) if one.kind == "vertex"}
        products = {
            one: self.architecture.expressions[one.source]
            for one in own
            if one.source in self.architecture.expressions and not one.part
        }
        if not products:
            return expression
        sums = [one for one in statistics(expression) if not one.units]
        shared = {
            one: product
            for one, product in products.items()
            if variables(product) & (own - {one})
            or any(one in variables(each) and sums_to_one(product, each.axes) for each in sums)
        }
        return self.opened(substituted(expression, shared.get)) if shared else expression

    def entry(self, edge: int) -> Moments:
        """Moments of what a layer reads; of inputs the second is 1, whatever is made of them."""
        if self.senders[edge] == 0 and self.data:
            return Moments(0.0, input_moment(self.functions[edge]))
        return self.source(edge)

    def read(self, edge: int) -> float:
        """Second moment of what a layer reads."""
        return self.entry(edge).second

    def normalizes(self, expression: Expression) -> bool:
        """Whether an expression keeps its size whatever that of its source."""
        if not statistics(expression):
            return False
        larger = moments(expression, lambda one: _larger(self.distribution(one), one))
        found = moments(expression, self.distribution)
        return bool(np.isclose(found.second, larger.second, rtol=1e-3))

    def contribution(self, edge: int, output: Moments | float) -> Moments:
        """Moments of what a layer adds to its vertex, of the moments or variance of its outputs."""
        return moments(self.functions[edge].after, _output(output, self.distribution))

    def output_variance(self, edge: int, wanted: float) -> float | None:
        """Returns the variance of a layer's outputs for a contribution of this second moment.

        None where no variance gives it, as behind a normalization, or only a very large one.
        """
        after = self.functions[edge].after
        if after == OUTPUT:
            return wanted
        factor = slope(after, OUTPUT, self.distribution)
        if factor and not statistics(after):
            return wanted / factor**2
        if self.ends_in_norm(edge):
            return None

        def excess(log_variance: float) -> float:
            second = self.contribution(edge, math.exp(log_variance)).second
            return math.log(max(second, 1e-300) / wanted)

        from scipy.optimize import brentq

        start = math.log(wanted)
        if excess(start + 6.0) < 0.05:  # a bounded activation, near its largest second moment
            return None
        for half in (2.0, 8.0, 20.0):
            if excess(start - half) < 0 < excess(start + half):
                return math.exp(brentq(excess, start - half, start + half, xtol=1e-12))
        return None

    def ends_in_norm(self, edge: int) -> bool:
        """Whether a normalization stands between an edge's operator and its target."""
        after = self.functions[edge].after
        if not statistics(after):
            return False
        small, large = (self.contribution(edge, variance).second for variance in (1.0, 16.0))
        return bool(np.isclose(small, large, rtol=1e-3))

    def close(self, vertex: int, outputs: Mapping[int, Moments | float]) -> None:
        """Computes the moments of a vertex from those of its sources.

        Args:
          vertex: its number.
          outputs: of the layers that feed it their moments, or variances, by edge.
        """
        expression = self.architecture.expressions.get(vertex)
        edges = self.incoming[vertex]
        if expression is not None:
            self.found[vertex] = moments(self.opened(expression), self.distribution)
        elif edges and self.operators[edges[0]] == Operator.CONCATENATION:
            parts = [self.source(edge) for edge in edges]
            counts = np.array([self.functions[edge].count for edge in edges], float)
            mean, second = counts @ np.array(parts) / counts.sum()
            self.found[vertex] = Moments(float(mean), float(second))
        elif edges and self.operators[edges[0]] == Operator.PRODUCT:
            mean, second = np.prod([self.source(edge) for edge in edges], axis=0)
            self.found[vertex] = Moments(float(mean), float(second))
        else:
            self.found[vertex] = self._sum(edges, outputs)
        self.found[vertex] = self.with_biases(vertex, self.found[vertex])

    def with_biases(self, vertex: int, features: Moments) -> Moments:
        """Moments of a vertex with what biases that do not start at 0 add to it."""
        added = self.architecture.added.get(vertex)
        if added is None:
            return features
        bias = moments(added, self.distribution)
        second = features.second + 2 * features.mean * bias.mean + bias.second
        return Moments(features.mean + bias.mean, second)

    def _sum(self, edges: list[int], outputs: Mapping[int, Moments | float]) -> Moments:
        skips = [edge for edge in edges if edge not in outputs]
        parts = [
            self.contribution(edge, outputs[edge]) if edge in outputs else self.carried(edge)
            for edge in edges
        ]
        mean = sum(part.mean for part in parts)
        variance = sum(part.variance for part in parts)
        for place, one in enumerate(skips):
            for other in skips[:place]:
                variance += 2 * self.covariance(one, other)
        return Moments(mean, max(variance, 0.0) + mean**2)

    def carried(self, edge: int) -> Moments:
        """Moments of what an edge without weight brings; a pool as if its entries were alike."""
        found = self.source(edge)
        after = self.functions[edge].after
        if after == OUTPUT:
            return found
        return moments(after, _output(found.second, self.distribution))

    def skipped(self, vertex: int) -> Moments:
        """Moments of what the edges without weight bring to a vertex together."""
        return self._sum([edge for edge in self.incoming[vertex] if not self.layers[edge]], {})

    def _coefficient(self, expression: Expression, variable: Variable) -> float:
        """By how much an expression follows a variable: E[φ(z) (z - E z)] / Var z [Bussgang]."""
        if expression == variable:
            return 1.0
        factor = slope(expression, variable, self.distribution)
        alone = {one for one in variables(expression) if one.kind == "vertex"} == {variable}
        if factor is not None and alone:
            return factor
        found = self.distribution(variable)
        if not isinstance(found, Moments) or not found.variance:
            return 0.0
        centered = apply("sub", np.subtract, variable, Constant(found.mean))
        return moments(multiplied(expression, centered), self.distribution).mean / found.variance

    def covariance(self, one: int, other: int) -> float:
        """Covariance of what two skips bring, which a common origin makes.

        Exact where both read one vertex, or one that follows it linearly; elsewhere by the slope of
        the line that fits best.
        """
        ways = [(self.senders[edge], self.functions[edge].before) for edge in (one, other)]
        return self._covariance(*ways)

    def _covariance(self, one: Way, other: Way) -> float:
        if one[0] < other[0]:
            one, other = other, one
        if (one, other) not in self._covariances:
            self._covariances[one, other] = (
                self._of_one_vertex(one, other)
                if one[0] == other[0]
                else self._of_two_vertices(one, other)
            )
        return self._covariances[one, other]

    def _of_one_vertex(self, one: Way, other: Way) -> float:
        source, ways = one[0], (one[1], other[1])
        if all(way == Variable("vertex", source) for way in ways):
            return self.found[source].variance
        means = [moments(way, self.distribution).mean for way in ways]
        return moments(multiplied(*ways), self.distribution).mean - means[0] * means[1]

    def _of_two_vertices(self, one: Way, other: Way) -> float:
        """What the later vertex follows decides, as far as no layer stands between."""
        source, expression = one
        product, common = self.architecture.expressions.get(source), 0.0
        if product is not None:
            for each in variables(product):
                if each.kind == "vertex" and each.source != source and not each.part:
                    found = self._covariance((each.source, each), other)
                    common += found and found * self._coefficient(product, each)
        else:
            for edge in self.incoming[source]:
                passes = self.operators[edge] in (Operator.SKIP, Operator.AVG_POOL)
                if passes and not self.layers[edge]:
                    way = self.senders[edge], self.functions[edge].before
                    common += self._covariance(way, other)
        return common and common * self._coefficient(expression, Variable("vertex", source))


def _larger(value: Moments | float, variable: Variable, times: float = 2.0) -> Moments | float:
    if isinstance(value, Moments) and variable.kind in ("vertex", "output"):
        return Moments(times * value.mean, times**2 * value.second)
    return value


def _output(
    output: Moments | float, distribution: Callable[[Variable], Moments | float]
) -> Callable[[Variable], Moments | float]:
    found = output if isinstance(output, Moments) else Moments(0.0, output)
    return lambda one: found if one.kind == "output" else distribution(one)


def kernel_moments(
    expression: Expression | None, leaf: str, deviation: float, start: Distribution
) -> Moments:
    """Returns the moments of the entries of a kernel that is made of a leaf of this deviation.

    Args:
      expression: what is made of the leaf: nothing, a constant in front, a norm, a square.
      leaf: its name.
      deviation: standard deviation of its entries.
      start: what is known of other leaves.
    """
    variable = Variable("leaf", leaf)
    if expression is None or expression == variable or variable not in variables(expression):
        return Moments(0.0, deviation**2)
    own = Moments(0.0, deviation**2)
    return moments(expression, lambda one: own if one == variable else start(one))


class LeafKernel(NamedTuple):
    """How the entries of a kernel follow the leaf that it is made of."""

    factor: float
    """Deviation of the kernel's entries over that of the leaf's; 0 where it does not follow it."""
    linear: bool = True
    """Whether that factor holds for all deviations; a square or an exponential has none."""


def leaf_kernel(expression: Expression | None, leaf: str, start: Distribution) -> LeafKernel:
    """Returns how a kernel that is made of a leaf follows it: a constant in front, or a norm."""
    one, two = (
        math.sqrt(kernel_moments(expression, leaf, deviation, start).second)
        for deviation in (1.0, 2.0)
    )
    if not (math.isfinite(one) and math.isfinite(two) and one > 0):
        return LeafKernel(1.0, linear=False)
    if math.isclose(one, two, rel_tol=1e-3):
        return LeafKernel(0.0)
    centered = abs(kernel_moments(expression, leaf, 1.0, start).mean) < 1e-3 * one
    return LeafKernel(one, linear=centered and math.isclose(two, 2 * one, rel_tol=1e-3))


def vertex_moments(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, Moments]:
    """Returns the moments of every vertex for weights of these standard deviations.

    Args:
      architecture: the network.
      deviations: of the entries of every leaf that is drawn, by name.
    """
    propagation = Propagation(architecture)
    kernels = _kernels(architecture, deviations)
    propagation.slices = _slices(propagation, deviations)
    tables = _tables(architecture, deviations)
    parameters = {one.name: one for one in architecture.parameters}
    for vertex in range(len(propagation.incoming)):
        if vertex == 0:
            first = first_moments(architecture, deviations)
            propagation.found[0] = propagation.with_biases(0, first)
            continue
        outputs: dict[int, Moments | float] = {}
        for edge in propagation.incoming[vertex]:
            if not propagation.layers[edge]:
                continue
            function, kernel = propagation.functions[edge], kernels.get(edge, Moments(0.0, 0.0))
            names = function.weights
            if any(parameters[name].role == Role.EMBEDDING for name in names):
                outputs[edge] = kernel
                continue
            reach = function.reach or (parameters[names[0]].fan_in if names else 1)
            outputs[edge] = _summed(kernel, propagation.entry(edge), reach * function.covered)
        propagation.close(vertex, outputs)
        if vertex in tables:
            mean, second = propagation.found[vertex]
            propagation.found[vertex] = Moments(mean, second + tables[vertex])
    return propagation.found


def _summed(kernel: Moments, entry: Moments, count: float) -> Moments:
    """Moments of a sum over that many products of independent entries."""
    mean = kernel.mean * entry.mean
    return Moments(
        count * mean, count * (kernel.second * entry.second - mean**2) + (count * mean) ** 2
    )


def _slices(
    propagation: Propagation, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, dict[tuple[Any, ...], float]]:
    """Returns `Propagation.slices` of weights of these standard deviations."""
    found: dict[int, dict[tuple[Any, ...], float]] = {}
    for parameter in propagation.architecture.parameters:
        own = np.square(deviations.get(parameter.name, 0.0))
        for use in parameter.uses if own.ndim else ():
            if use.edge is None:
                continue
            entry, vertex = _entry(own, use), propagation.receivers[use.edge]
            for part, (axis, entries) in propagation.output_slices(parameter, use).items():
                if entry.shape[axis] > 1:
                    mean = np.mean(np.take(entry, entries, axis)) / np.mean(entry)
                    found.setdefault(vertex, {})[part] = float(mean)
    return found


def _entry(values: np.ndarray, use: ParameterUse) -> np.ndarray:
    """The values of the slices that a use reads, out of values that broadcast over a leaf."""
    for axis, place in use.slices:
        if values.ndim and values.shape[axis] > 1:
            values = np.take(values, [place], axis=axis)
    return values


def _tables(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, float]:
    """What tables that are added to vertices, as positions are, bring to their second moments."""
    found: dict[int, float] = {}
    for one in architecture.parameters:
        if one.role != Role.EMBEDDING or one.name not in deviations:
            continue
        for use in one.uses:
            if use.kind in ("bias", "offset") and use.vertex is not None:
                found[use.vertex] = found.get(use.vertex, 0.0) + _square(deviations, one.name)
    return found


def first_moments(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> Moments:
    """Returns the moments of vertex 0: of what the stem gives, or of the inputs."""
    parameters = {one.name: one for one in architecture.parameters}
    if not architecture.stems:
        stems = [
            one for one in architecture.parameters if one.role == Role.INPUT and one.edge is None
        ]
        if not stems:
            return Moments(0.0, INPUT_MOMENT)
        second = INPUT_MOMENT * sum(_square(deviations, one.name) * one.fan_in for one in stems)
        after = relu(OUTPUT) if architecture.arrangement == Arrangement.ACTIVATION else OUTPUT
        return moments(after, _output(second, _ones))
    mean = variance = 0.0
    start = leaf_distribution(architecture)
    for function in architecture.stems:
        weights = [parameters[name] for name in function.weights]
        output = Moments(0.0, 0.0)
        for one in weights:
            use = next((use for use in one.uses if use.kind in ("weight", "embedding")), None)
            deviation = math.sqrt(_square(deviations, one.name))
            kernel = kernel_moments(use.expression if use else None, one.name, deviation, start)
            if one.role != Role.EMBEDDING:
                entry = Moments(0.0, input_moment(function))
                count = (function.reach or one.fan_in) * function.covered
                kernel = _summed(kernel, entry, count)
            output = Moments(*(np.array(output) + np.array(kernel) / len(weights)))
        part = moments(function.after, _output(output, start))
        mean, variance = mean + part.mean, variance + part.variance
    variance += _tables(architecture, deviations).get(0, 0.0)
    return Moments(mean, variance + mean**2)


def _ones(variable: Variable) -> Moments | float:
    return 1.0 if variable.kind == "leaf" else Moments(0.0, 1.0)


def _square(deviations: Mapping[str, float | np.ndarray], name: str) -> float:
    return float(np.mean(np.square(deviations.get(name, 0.0))))


def _kernels(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, Moments]:
    """Returns the moments of the entries of the kernel of every edge that has one."""
    found: dict[int, list[Moments]] = {}
    start = leaf_distribution(architecture)
    for parameter in architecture.parameters:
        if parameter.name not in deviations:
            continue
        own = np.asarray(deviations[parameter.name], float)
        for use in parameter.uses:
            if use.edge is None or use.kind not in ("weight", "embedding"):
                continue
            entry = _entry(own, use)
            deviation = float(np.sqrt(np.mean(entry**2)))
            kernel = kernel_moments(use.expression, parameter.name, deviation, start)
            found.setdefault(use.edge, []).append(kernel)
        if not parameter.uses:
            for edge in (parameter.edge, *parameter.further_edges):
                if edge is not None:
                    found.setdefault(edge, []).append(Moments(0.0, float(np.mean(own**2))))
    return {edge: Moments(*np.mean(values, axis=0).tolist()) for edge, values in found.items()}
