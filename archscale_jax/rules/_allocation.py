"""Second moments as a rule allots them to the layers of a network, vertex by vertex (theory §9).

A rule chooses the second moment that every layer brings to its vertex; C follows from what the
layer reads, C = wanted / ρ with ρ = E[φ(z)²] of what stands before it: of ReLU half the source's
second moment, so that C = 2 brings all of it.
"""

import math
from typing import Any

import numpy as np

from archscale_jax._architecture import OUTPUT, Architecture, Role
from archscale_jax._expressions import Moments, statistics, variables
from archscale_jax._graph import Operator
from archscale_jax._moments import Propagation, first_moments, kernel_moments, leaf_distribution
from archscale_jax._quadrature import slope
from archscale_jax.rules._residual import linear_slices, number_of_uses
from archscale_jax.rules._variances import (
    STEM_NUMERATOR,
    WeightVariances,
    embedding_deviation,
    stem_numerator,
)


class Allocation(Propagation):
    """Second moments as a rule chooses them, vertex by vertex.

    Attributes:
      numerators: C of every edge so far.
      gains: see `WeightVariances`.
      free: see `WeightVariances`.
      uses: by edge, how often its weight is used.
    """

    def __init__(self, architecture: Architecture, table_rows: float = 1.0):
        super().__init__(architecture)
        self.fans = {one.name: one.fan_in for one in architecture.parameters}
        self.roles = {one.name: one.role for one in architecture.parameters}
        self.numerators = np.full(len(self.senders), 2.0)
        self.uses = {
            use.edge: number_of_uses(one)
            for one in architecture.parameters
            for use in one.uses
            if use.edge is not None and use.kind == "weight"
        }
        self.uncentered = _uncentered(architecture)
        self.gains: dict[int, float] = {}
        self.free: set[int] = set()
        self._nominal: dict[int, float] = {}
        self._before_biases: dict[int, float] = {}
        stems = {
            one.name: math.sqrt(stem_numerator(architecture, one.name) / one.fan_in)
            for one in architecture.parameters
            if one.role == Role.INPUT and one.edge is None and one.is_drawn
        }
        tables = {
            one.name: embedding_deviation(one, architecture, table_rows).value
            for one in architecture.parameters
            if one.role == Role.EMBEDDING and one.is_drawn
        }
        self.tables = tables
        self.found[0] = self.with_biases(0, first_moments(architecture, stems | tables))

    def uses_into(self, vertex: int) -> int:
        """How often the weights that feed a vertex are used, 1 if they are its own."""
        return max((self.uses.get(edge, 1) for edge in self.incoming[vertex]), default=1)

    def carried_by(self, edge: int) -> float:
        """The second moment that a layer carries on: its source's, or 1 of what is normalized."""
        sender = self.senders[edge]
        if self.activates(edge):
            return self.read(edge)
        if sender == 0 and self.data:
            return STEM_NUMERATOR  # as a stem does
        return self._carried(edge)

    def _carried(self, edge: int) -> float:
        if self.normalizes(self.functions[edge].before):
            return 1.0
        return self.nominal(self.senders[edge])

    def nominal(self, vertex: int) -> float:
        """The second moment of a vertex as its layers gave it, before biases.

        Activations stand on the edges of pools, concatenations and products; what a layer behind
        them shall carry on is what stood before these activations.
        """
        if vertex not in self._nominal:
            edges = self.incoming[vertex]
            operators = {self.operators[edge] for edge in edges}
            if edges and operators <= {Operator.AVG_POOL, Operator.CONCATENATION}:
                counts = [self.functions[edge].count for edge in edges]
                parts = [self._carried(edge) for edge in edges]
                self._nominal[vertex] = float(np.average(parts, weights=counts))
            elif edges and operators == {Operator.PRODUCT}:
                parts = [self._carried(edge) for edge in edges]
                self._nominal[vertex] = float(np.exp(np.mean(np.log(np.maximum(parts, 1e-30)))))
            else:
                self._nominal[vertex] = self._before_biases[vertex]
        return self._nominal[vertex]

    def with_biases(self, vertex: int, features: Moments) -> Moments:
        """Moments of a vertex with what biases add to it, which layers shall not carry on."""
        self._before_biases[vertex] = features.second
        return super().with_biases(vertex, features)

    def allot(self, edge: int, wanted: float, *, sets_gains: bool = False) -> float:
        """Gives an edge the C that brings `wanted`; returns the variance of its layer's outputs.

        What stands before a normalization brings no more or less for it: that is left to the gain,
        where the rule sets gains.
        """
        function = self.functions[edge]
        if any(self.roles[name] == Role.EMBEDDING for name in function.weights):
            return self.tables.get(function.weights[0], 0.0) ** 2
        if self._finite(edge) == 0 or not self.brings(edge):
            self.free.add(edge)
            return 0.0
        if self.contribution(edge, 1.0).second == 0:  # multiplied by zeros: let it carry its source
            wanted = self.carried_by(edge)
        wanted *= function.share
        variance = self.output_variance(edge, wanted) if wanted > 0 else 0.0
        if variance is None and not (sets_gains and self.ends_in_norm(edge)):
            variance = wanted
        elif variance is None:
            variance = self.carried_by(edge)
            natural = self.contribution(edge, variance).second
            if wanted and natural:
                self.gains[edge] = math.sqrt(wanted / natural)
        met = self.fans[function.weights[0]] / function.reach if function.reach else 1.0
        self.numerators[edge] = variance / self._finite(edge) * met
        return variance

    def _finite(self, edge: int) -> float:
        second = self.read(edge)
        if not math.isfinite(second):
            names = self.functions[edge].weights or ("a layer",)
            raise ValueError(
                f"what {names[0]!r} reads has no finite second moment for normal features, as the "
                "logarithm or root of what may be negative has none; take the initialization rule "
                "'he_normal', or bound the function (jnp.maximum, softplus)"
            )
        return second

    def activates(self, edge: int) -> bool:
        """Whether an activation stands between a layer and its vertex, which sums activations."""
        after = self.functions[edge].after
        return not statistics(after) and slope(after, OUTPUT, self.distribution) is None

    def forget(self, vertex: int) -> None:
        """Forgets what was found of a vertex and those behind it."""
        for found in (self.found, self._nominal):
            for one in [one for one in found if one >= vertex]:
                del found[one]
        self._covariances = {
            pair: value
            for pair, value in self._covariances.items()
            if max(source for source, _ in pair) < vertex
        }

    def brings(self, edge: int) -> bool:
        """Whether a layer holds and reads more than zeros, and is not multiplied by them."""
        zero = edge in self.architecture.zero_edges
        return not zero and self.read(edge) > 0 and bool(variables(self.functions[edge].after))

    def linear_slices(self, edge: int) -> set[tuple[Any, ...]]:
        """The slices of a layer's outputs that go on linearly; none where all or none of them do.

        It is the half that makes b, in a leaf that holds a gate, σ(a) * b.
        """
        vertex = self.receivers[edge]
        ways = self.ways_from(vertex)
        linear = {one.part for way in ways for one in linear_slices(way, vertex)}
        return linear if linear < self.read_slices(vertex) else set()

    def shrink(self, edge: int, factor: float) -> float:
        """Shrinks the variance of the slices of a layer's outputs that go on linearly.

        So the gate is drawn as one that has a leaf of its own. Where it is not known which entries
        of the leaf they are, as behind a reshape, all shrink: the product as the factor's square.
        What is returned is left for the layer as a whole.
        """
        linear = self.linear_slices(edge)
        if not linear:
            return factor
        for parameter in self.architecture.parameters:
            for use in parameter.uses:
                slices = self.output_slices(parameter, use) if use.edge == edge else {}
                if slices:
                    factors = self.slices.setdefault(
                        self.receivers[edge], dict.fromkeys(slices, 1.0)
                    )
                    factors.update({part: factor * factors[part] for part in linear})
                    return 1.0
        return math.sqrt(factor)

    def contribution(self, edge: int, output: Moments | float) -> Moments:
        """Moments of what a layer adds to its vertex, with the gain that the rule gives it."""
        if edge in self.uncentered and not isinstance(output, Moments):
            output = Moments(math.sqrt(output), output)  # a sum of entries with a mean is one
        found, gain = super().contribution(edge, output), self.gains.get(edge, 1.0)
        return Moments(gain * found.mean, gain**2 * found.second)

    def result(self, **options: Any) -> WeightVariances:
        """What the rule says of the graph."""
        return WeightVariances(
            self.numerators, free=frozenset(self.free), slices=self.drawn_slices(), **options
        )

    def drawn_slices(self) -> dict[int, list[tuple[int, range, float]]]:
        """Returns `WeightVariances.slices`."""
        found = {}
        for parameter in self.architecture.parameters:
            for use in parameter.uses:
                factors = {} if use.edge is None else self.slices.get(self.receivers[use.edge], {})
                if factors and use.kind == "weight":
                    slices = self.output_slices(parameter, use)
                    found[use.edge] = [(*slices[part], factors[part]) for part in slices]
        return found


def _uncentered(architecture: Architecture) -> set[int]:
    """The edges of layers whose kernels have a mean, as squares of parameters."""
    start = leaf_distribution(architecture)
    return {
        use.edge
        for one in architecture.parameters
        for use in one.uses
        if use.edge is not None
        and use.kind == "weight"
        and use.expression is not None
        and abs(kernel_moments(use.expression, one.name, 1.0, start).mean) > 1e-3
    }


def in_equal_parts(architecture: Architecture, degrees: np.ndarray) -> WeightVariances:
    """Every layer brings what it carries, over a number of contributions by edge."""
    allocation = Allocation(architecture)
    allocation.numerators /= degrees
    for vertex in range(1, len(allocation.incoming)):
        variances = {
            edge: allocation.allot(edge, allocation.carried_by(edge) / degrees[edge])
            for edge in allocation.incoming[vertex]
            if allocation.layers[edge]
        }
        allocation.close(vertex, variances)
    return allocation.result()
