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
from typing import NamedTuple

import numpy as np

from archscale_jax.architecture import (
    OUTPUT,
    Architecture,
    Arrangement,
    EdgeFunction,
    Role,
)
from archscale_jax.expressions import (
    Constant,
    Expression,
    Moments,
    Variable,
    apply,
    is_affine,
    moments,
    multiplied,
    slope,
    statistics,
    variables,
)
from archscale_jax.graph import Operator, is_weight, number_of_vertices

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
        return {
            one.name: Moments(0.0, 1.0) if one.role == Role.EMBEDDING else one.initial_value
            for one in architecture.parameters
        }

    def distribution(variable: Variable) -> Moments | float:
        if variable.kind == "leaf":
            return starts().get(str(variable.source), 1.0)
        return Moments(0.0, 1.0)

    return distribution


def input_moment(function: EdgeFunction) -> float:
    """Returns the second moment of what a layer reads of the inputs.

    Constants, such as 1/255, standardize the inputs; functions of standardized ones, such as sines
    of positions, have the moment that they give them.
    """
    if is_affine(function.before, _ones):
        return INPUT_MOMENT
    second = moments(function.before, _ones).second
    return second if second > 0 and math.isfinite(second) else INPUT_MOMENT


class Propagation:
    """Moments of vertices, filled in one after the other in the order of the graph.

    Attributes:
      architecture: the network.
      functions: what stands on its edges.
      incoming: edges into every vertex.
      layers: bool [E], the edges that carry a weight.
      data: whether vertex 0 stands for the inputs.
      found: moments of the vertices so far.
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
        self.data = (
            architecture.functions is not None  # else what feeds vertex 0 was not described
            and not architecture.stems
            and not any(
                one.role == Role.INPUT and one.edge is None for one in architecture.parameters
            )
        )
        self._covariances: dict[tuple[int, int], float] = {}
        self._leaves = leaf_distribution(architecture)

    def distribution(self, variable: Variable) -> Moments | float:
        """What is known of a variable of an expression."""
        if variable.kind == "vertex":
            return self.found.get(variable.source, Moments(0.0, 1.0))  # pyright: ignore
        return self._leaves(variable)

    def source(self, edge: int) -> Moments:
        """Moments of what an edge makes of its source."""
        before = self.functions[edge].before
        if self.normalizes(before):  # of large features, beside which its ε is nothing
            return moments(before, lambda one: _larger(self.distribution(one), one, 1e4))
        return moments(before, self.distribution)

    def read(self, edge: int) -> float:
        """Second moment of what a layer reads; of inputs 1, whatever is made of them first."""
        if self.senders[edge] == 0 and self.data:
            return input_moment(self.functions[edge])
        return self.source(edge).second

    def normalizes(self, expression: Expression) -> bool:
        """Whether an expression keeps its size whatever that of its source."""
        if not statistics(expression):
            return False
        larger = moments(expression, lambda one: _larger(self.distribution(one), one))
        found = moments(expression, self.distribution)
        return bool(np.isclose(found.second, larger.second, rtol=1e-3))

    def contribution(self, edge: int, variance: float) -> Moments:
        """Moments of what a layer adds to its vertex, its outputs having this variance."""
        return moments(self.functions[edge].after, _output(variance, self.distribution))

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

    def close(self, vertex: int, variances: Mapping[int, float]) -> None:
        """Computes the moments of a vertex from those of its sources.

        Args:
          vertex: its number.
          variances: of the outputs of the layers that feed it, by edge.
        """
        expression = self.architecture.expressions.get(vertex)
        edges = self.incoming[vertex]
        if expression is not None:
            self.found[vertex] = moments(expression, self.distribution)
        elif edges and self.operators[edges[0]] == Operator.CONCATENATION:
            parts = [self.source(edge) for edge in edges]
            counts = np.array([self.functions[edge].count for edge in edges], float)
            mean, second = counts @ np.array(parts) / counts.sum()
            self.found[vertex] = Moments(float(mean), float(second))
        elif edges and self.operators[edges[0]] == Operator.PRODUCT:
            mean, second = np.prod([self.source(edge) for edge in edges], axis=0)
            self.found[vertex] = Moments(float(mean), float(second))
        else:
            self.found[vertex] = self._sum(edges, variances)

    def _sum(self, edges: list[int], variances: Mapping[int, float]) -> Moments:
        skips = [edge for edge in edges if edge not in variances]
        parts = [
            self.contribution(edge, variances[edge]) if edge in variances else self.carried(edge)
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

    def coefficient(self, edge: int) -> float:
        """By how much a skip follows its source: E[φ(z) (z - E z)] / Var z [Bussgang]."""
        variable = Variable("vertex", self.senders[edge])
        expression = self.functions[edge].before
        if expression == variable:
            return 1.0
        factor = slope(expression, variable, self.distribution)
        if factor is not None:
            return factor
        mean, variance = self.found[variable.source].mean, self.found[variable.source].variance  # pyright: ignore
        if not variance:
            return 0.0
        centered = apply("sub", np.subtract, variable, Constant(mean))
        return moments(multiplied(expression, centered), self.distribution).mean / variance

    def covariance(self, one: int, other: int) -> float:
        """Covariance of what two skips bring, which a common origin makes.

        Exact where both read one vertex, or one that follows it linearly; elsewhere by the slope of
        the line that fits best.
        """
        if self.senders[one] < self.senders[other]:
            one, other = other, one
        if (one, other) not in self._covariances:
            self._covariances[one, other] = self._covariance(one, other)
        return self._covariances[one, other]

    def _covariance(self, one: int, other: int) -> float:
        source = self.senders[one]
        if source == self.senders[other]:
            ways = [self.functions[edge].before for edge in (one, other)]
            variable = Variable("vertex", source)
            if all(way == variable for way in ways):
                return self.found[source].variance
            means = [moments(way, self.distribution).mean for way in ways]
            return moments(multiplied(*ways), self.distribution).mean - means[0] * means[1]
        if source in self.architecture.expressions:
            return 0.0
        common = sum(
            self.covariance(edge, other)
            for edge in self.incoming[source]
            if not self.layers[edge] and self.operators[edge] in (Operator.SKIP, Operator.AVG_POOL)
        )
        return common * self.coefficient(one) if common else 0.0


def _larger(value: Moments | float, variable: Variable, times: float = 2.0) -> Moments | float:
    if isinstance(value, Moments) and variable.kind in ("vertex", "output"):
        return Moments(times * value.mean, times**2 * value.second)
    return value


def _output(
    variance: float, distribution: Callable[[Variable], Moments | float]
) -> Callable[[Variable], Moments | float]:
    return lambda one: Moments(0.0, variance) if one.kind == "output" else distribution(one)


class LeafDeviations(NamedTuple):
    """How the deviation of a leaf's entries and of a kernel that is made of it belong together."""

    factor: float
    """Deviation of the kernel's entries over that of the leaf's; 0 where it does not follow it."""
    fixed: float
    """Deviation of the kernel's entries where a normalization sets it."""


def leaf_deviations(
    expression: Expression | None, leaf: str, start: Callable[[Variable], Moments | float]
) -> LeafDeviations:
    """Returns how a kernel that is made of a leaf follows it: a constant in front, or a norm."""
    variable = Variable("leaf", leaf)
    if expression is None or expression == variable or variable not in variables(expression):
        return LeafDeviations(1.0, 0.0)

    def at(scale: float) -> float:
        def distribution(one: Variable) -> Moments | float:
            return Moments(0.0, scale**2) if one == variable else start(one)

        return math.sqrt(moments(expression, distribution).second)

    one, two = at(1.0), at(2.0)
    if not (math.isfinite(one) and math.isfinite(two) and one > 0):
        return LeafDeviations(1.0, 0.0)
    if math.isclose(one, two, rel_tol=1e-3):
        return LeafDeviations(0.0, one)
    return LeafDeviations(one, 0.0)


def vertex_moments(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, Moments]:
    """Returns the moments of every vertex for weights of these standard deviations.

    Args:
      architecture: the network.
      deviations: of the entries of every leaf that is drawn, by name.
    """
    propagation = Propagation(architecture)
    kernels = kernel_variances(architecture, deviations)
    tables = _tables(architecture, deviations)
    parameters = {one.name: one for one in architecture.parameters}
    for vertex in range(len(propagation.incoming)):
        if vertex == 0:
            propagation.found[0] = first_moments(architecture, deviations)
            continue
        variances = {}
        for edge in propagation.incoming[vertex]:
            if not propagation.layers[edge]:
                continue
            function = propagation.functions[edge]
            names = function.weights
            if any(parameters[name].role == Role.EMBEDDING for name in names):
                variances[edge] = kernels[edge]
                continue
            reach = function.reach or (parameters[names[0]].fan_in if names else 1)
            second = propagation.read(edge)
            variances[edge] = kernels.get(edge, 0.0) * reach * function.covered * second
        propagation.close(vertex, variances)
        if vertex in tables:
            mean, second = propagation.found[vertex]
            propagation.found[vertex] = Moments(mean, second + tables[vertex])
    return propagation.found


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
    for function in architecture.stems:
        weights = [parameters[name] for name in function.weights]
        output = 0.0
        for one in weights:
            use = next((use for use in one.uses if use.kind in ("weight", "embedding")), None)
            kernel = leaf_deviations(use.expression if use else None, one.name, _ones)
            square = _square(deviations, one.name) * kernel.factor**2 or kernel.fixed**2
            inputs = 1 if one.role == Role.EMBEDDING else function.reach or one.fan_in
            read = 1.0 if one.role == Role.EMBEDDING else input_moment(function)
            output += square * inputs * function.covered * read / len(weights)
        part = moments(function.after, _output(output, _ones))
        mean, variance = mean + part.mean, variance + part.variance
    variance += _tables(architecture, deviations).get(0, 0.0)
    return Moments(mean, variance + mean**2)


def _ones(variable: Variable) -> Moments | float:
    return 1.0 if variable.kind == "leaf" else Moments(0.0, 1.0)


def _square(deviations: Mapping[str, float | np.ndarray], name: str) -> float:
    return float(np.mean(np.square(deviations.get(name, 0.0))))


def kernel_variances(
    architecture: Architecture, deviations: Mapping[str, float | np.ndarray]
) -> dict[int, float]:
    """Returns the variance of the entries of the kernel of every edge that has one."""
    found: dict[int, list[float]] = {}
    start = leaf_distribution(architecture)
    for parameter in architecture.parameters:
        if parameter.name not in deviations:
            continue
        own = np.asarray(deviations[parameter.name], float)
        for use in parameter.uses:
            if use.edge is None or use.kind not in ("weight", "embedding"):
                continue
            entry = own
            for axis, place in use.slices:
                if own.ndim and own.shape[axis] > 1:
                    entry = np.take(entry, [place], axis=axis)
            kernel = leaf_deviations(use.expression, parameter.name, start)
            deviation = float(np.sqrt(np.mean(entry**2))) * kernel.factor or kernel.fixed
            found.setdefault(use.edge, []).append(deviation**2)
        if not parameter.uses:
            for edge in (parameter.edge, *parameter.further_edges):
                if edge is not None:
                    found.setdefault(edge, []).append(float(np.mean(own**2)))
    return {edge: float(np.mean(values)) for edge, values in found.items()}
