"""Initialization rules: the variance of every weight from its place in the graph (theory §3, §9).

A hidden weight on edge u->v is drawn from N(0, C/n), the readout from N(0, gain²/n²), n being the
fan [AAS Eq. 2, 4]. A rule is a function `(architecture, **options) -> WeightVariances` that says
what C is for every edge; `register_initialization_rule` gives a function of yours a name.

The rules of the library choose the second moment that every layer brings to its vertex; C follows
from what the layer reads, C = wanted / ρ with ρ = E[φ(z)²] of what stands before it (theory §9): of
ReLU half the source's second moment, so that C = 2 brings all of it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from archscale_jax.architecture import (
    OUTPUT,
    Architecture,
    Arrangement,
    Parameter,
    ParameterUse,
    Role,
    check_architecture,
)
from archscale_jax.expressions import Moments, Variable, moments, slope, statistics, variables
from archscale_jax.graph import Operator, Space, in_degrees, is_weight, reachable_vertices
from archscale_jax.moments import (
    Propagation,
    first_moments,
    input_moment,
    kernel_moments,
    leaf_distribution,
    leaf_kernel,
    vertex_moments,
)
from archscale_jax.rules.registry import Description, Explained, Registry
from archscale_jax.rules.residual import (
    branch_ends,
    linear_slices,
    number_of_uses,
    residual_branches,
)

STEM_NUMERATOR = 2.0
"""C of a layer that reads the inputs, times the contributions to its vertex [AAS Eq. 4]."""


class WeightVariances(NamedTuple):
    """What an initialization rule says of a graph with E edges.

    Attributes:
      edges: float64 [E]; the weights of edge e have variance `edges[e] / n`. Entries of edges
        without weight mean nothing.
      readout_gain: the readout has standard deviation `readout_gain / n`.
      fan: which fan n is, receptive field included.
      gains: by edge, the value of the gain of a normalization behind its layer, where the rule
        chooses one.
      free: edges whose layers read nothing but zeros, as in the first step of a loop, or are
        multiplied by them: of a weight of several layers the others decide.
      slices: by edge, axis and entries of its leaf whose variance is a factor of the edge's, and
        the factor, where one leaf holds both halves of a gate.
    """

    edges: np.ndarray
    readout_gain: float = math.sqrt(2.0)
    fan: Literal["fan_in", "fan_out"] = "fan_in"
    gains: Mapping[int, float] = {}
    free: Collection[int] = ()
    slices: Mapping[int, Collection[tuple[int, range, float]]] = {}


InitializationRule = Callable[..., WeightVariances]

INITIALIZATION_RULES: Registry[InitializationRule] = Registry("initialization rule")
register_initialization_rule = INITIALIZATION_RULES.register

Deviation = float | np.ndarray
"""A standard deviation; where the slices of a leaf differ, an array that broadcasts over them."""


def weight_standard_deviations(
    architecture: Architecture, rule: str | InitializationRule | None = None, **options: Any
) -> dict[str, Deviation]:
    """Returns the standard deviation of every input, hidden and readout weight by name.

    Rows of an embedding table are chosen one at a time, so that its entries have standard deviation
    1; those of a table that is the readout too are scaled to rows of norm 1, which fits both, and
    so are those of positions that are added to it.

    Args:
      architecture: the graph with its parameters.
      rule: name of a rule, or a function `(architecture) -> WeightVariances`. None takes the rule
        that measurably preserves the flow: `target` where vertices sum pre-activations,
        `source` where they sum activations (docs/initialization.md).
      **options: passed to the rule, e.g. `branch_share` of `second_moment`.

    Returns:
      A number for every leaf that is drawn; for one that holds the layers of a stack, as scanned
      layers are, or both halves of a gate, an array with the leaf's number of axes if they differ.

    Raises:
      TypeError: no architecture.
      ValueError: an unknown rule, or a rule that gives a variance that is not finite or negative.
    """
    check_architecture(architecture)
    rule = default_rule(architecture) if rule is None else rule
    variances = INITIALIZATION_RULES.resolve(rule)(architecture, **options)
    description = INITIALIZATION_RULES.describe(rule)
    return {
        parameter.name: standard_deviation(parameter, architecture, variances, description).value
        for parameter in architecture.parameters
        if parameter.is_drawn
    }


def default_rule(architecture: Architecture) -> str:
    """Returns the name of the rule that fits what the vertices sum."""
    return DEFAULT_RULES[architecture.arrangement]


DEFAULT_RULES = {
    Arrangement.PRE_ACTIVATION: "target",
    Arrangement.ACTIVATION: "source",
}


def start_values(
    architecture: Architecture, rule: str | InitializationRule | None = None, **options: Any
) -> dict[str, Deviation]:
    """Returns the values of the leaves that a rule sets without drawing them, by name.

    These are the gains of normalizations that end a residual branch, under `second_moment`: they,
    and not the layer before them, decide what the branch adds.

    Raises:
      TypeError, ValueError: see `weight_standard_deviations`.
    """
    check_architecture(architecture)
    rule = default_rule(architecture) if rule is None else rule
    gains = INITIALIZATION_RULES.resolve(rule)(architecture, **options).gains
    found: dict[str, Deviation] = {}
    for parameter in architecture.parameters:
        neutral = parameter.neutral_value
        if parameter.role != Role.SCALE or not parameter.start_known:
            continue
        if parameter.given not in (None, neutral):
            continue  # as a gain that the model starts at 0
        offset = 1.0 - neutral  # of 1 + w, w
        by_use = [
            (use, [gains[edge] - offset for edge in use.ends if edge in gains])
            for use in parameter.uses
            if use.kind == "scale"
        ]
        values = [(use, min(own)) for use, own in by_use if own]
        if values:
            found[parameter.name] = _by_slice(parameter, values)
    return found


def standard_deviation(
    parameter: Parameter,
    architecture: Architecture,
    variances: WeightVariances,
    rule: Description,
) -> Explained:
    """Returns the standard deviation of a parameter that is drawn, and its reason.

    Args:
      parameter: the parameter.
      architecture: the network that it is part of.
      variances: what the rule says of the graph.
      rule: what the registry tells of the rule.

    Raises:
      ValueError: a variance that is not finite or negative.
    """
    if parameter.role == Role.EMBEDDING:
        return _embedding_deviation(parameter, architecture)
    uses = [use for use in parameter.uses if use.kind == "weight"] or [
        ParameterUse("weight", edge=edge, layer=parameter.layer, fan_in=parameter.fan_in)
        for edge in dict.fromkeys((parameter.edge, *parameter.further_edges))
    ]
    linear: list[tuple[ParameterUse, float]] = []
    others: list[tuple[ParameterUse, float]] = []
    reasons: dict[str, None] = {}
    for use in uses:
        layer = use.layer if parameter.uses else parameter.role
        deviation, reason = _kernel_deviation(parameter, architecture, use, layer, variances, rule)
        kernel = leaf_kernel(use.expression, parameter.name, leaf_distribution(architecture))
        if not kernel.linear:
            reason += ", as if its kernel were linear in it"
        if kernel.factor not in (0.0, 1.0):
            deviation /= kernel.factor
            reason += f", over the constant {kernel.factor:.4g} in front"
        deviation = _finite(parameter, deviation, rule)
        for part, factor in _slices_of_use(use, variances):
            (linear if kernel.linear else others).append((part, deviation * math.sqrt(factor)))
            reasons[reason if factor == 1 else f"{reason}, C times {factor:.4g}"] = None
    # What a square of a weight brings, as the norm of its columns, follows from its other uses.
    found = linear or others
    value: Any = _by_slice(parameter, _steps_of_loops(architecture, found, variances.free))
    reason = next(iter(reasons))
    if len(reasons) > 1:
        reason += " (the smallest of its uses)" if isinstance(value, float) else " (first slice)"
    return Explained(value, reason)


def stem_numerator(architecture: Architecture, name: str) -> float:
    """Returns C of a layer that feeds vertex 0 from the inputs: 2 over the number of such layers.

    A constant behind it, and zeros that a transposed convolution meets, are made good.
    """
    found = STEM_NUMERATOR
    for function in architecture.stems:
        if name in function.weights:
            found /= len(architecture.stems)
            factor = slope(function.after, OUTPUT, lambda variable: 1.0)
            if factor and not statistics(function.after):
                found /= factor**2
            found /= input_moment(function)
            if function.reach:
                fans = {one.name: one.fan_in for one in architecture.parameters}
                found *= fans[name] / function.reach
    return found


def _kernel_deviation(
    parameter: Parameter,
    architecture: Architecture,
    use: ParameterUse,
    layer: Role,
    variances: WeightVariances,
    rule: Description,
) -> tuple[float, str]:
    fan = use.fan_in if variances.fan == "fan_in" and parameter.uses else getattr(
        parameter, variances.fan
    )  # fmt: skip
    if layer == Role.READOUT and any(one.layer != Role.READOUT for one in parameter.uses):
        return fan**-0.5, f"another layer's weight and readout: rows of norm 1, n = {fan}"
    if layer == Role.READOUT:
        gain = variances.readout_gain
        return gain / fan, f"readout: C = {gain**2:.4g}, N(0, C/n²), n = {fan} [AAS Eq. 2]"
    if use.edge is None:
        numerator = stem_numerator(architecture, parameter.name)
        return math.sqrt(numerator / fan), f"stem: C = {numerator:.4g}, n = {fan} [AAS Eq. 4]"
    numerator = float(variances.edges[use.edge])
    if numerator < 0:
        raise ValueError(f"{parameter.name!r} would get the variance {numerator} / {fan}")
    reason = f"{rule.name}: C = {numerator:.4g}, n = {fan} {rule.source}".rstrip()
    return math.sqrt(numerator / fan), reason


def _steps_of_loops(
    architecture: Architecture,
    values: list[tuple[ParameterUse, float]],
    free: Collection[int],
) -> list[tuple[ParameterUse, float]]:
    """Of a line that is run again and again, as by a loop over time, one use.

    It is the first of those whose vertex has the most contributions: the first step of a loop reads
    a state of zeros, and later ones differ by what has settled meanwhile.
    """
    if len(values) == 1:
        return values
    degrees = in_degrees(architecture.graph)[architecture.graph.receivers]

    def contributions(use: ParameterUse) -> int:
        return 0 if use.edge is None else int(degrees[use.edge])

    bound = [one for one in values if one[0].edge not in free]

    def bounded(group: list[tuple[ParameterUse, float]]) -> tuple[ParameterUse, float]:
        use, value = max(group, key=lambda one: contributions(one[0]))
        if len(group) > 1 and use.edge is not None and use.layer == Role.HIDDEN:
            # What a weight is applied to again and again must not grow: at most He's variance.
            value = min(value, math.sqrt(2 / max(contributions(use), 1) / use.fan_in))
        return use, value

    groups: dict[Any, list[tuple[ParameterUse, float]]] = {}
    for use, value in bound or values:
        key = (use.source, use.slices) if use.source else id(use)
        groups.setdefault(key, []).append((use, value))
    return [bounded(group) for group in groups.values()]


def _by_slice(parameter: Parameter, values: list[tuple[ParameterUse, float]]) -> Deviation:
    """One value for a leaf, the smallest of its uses; or one for every slice of a stack."""
    values = [(use, float(f"{value:.12g}")) for use, value in values]
    axes = {axis for use, _ in values for axis, _ in use.slices}
    smallest = min(value for _, value in values)
    if not axes or np.allclose([value for _, value in values], smallest, rtol=1e-9):
        return smallest
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(parameter.shape))
    stacked = np.full(shape, np.inf)
    for use, value in values:
        place: list[Any] = [slice(None)] * len(shape)
        for axis, entry in use.slices:
            place[axis] = entry
        stacked[tuple(place)] = np.minimum(stacked[tuple(place)], value)
    stacked[np.isinf(stacked)] = smallest  # a slice that nothing reads
    return stacked


def _slices_of_use(
    use: ParameterUse, variances: WeightVariances
) -> list[tuple[ParameterUse, float]]:
    """A use with the factor 1; or every slice of it that a rule draws by itself with its own."""
    slices = variances.slices.get(use.edge, ()) if use.edge is not None else ()
    return [
        (dataclasses.replace(use, slices=use.slices | {(axis, entries)}), factor)
        for axis, entries, factor in slices
    ] or [(use, 1.0)]


def _embedding_deviation(parameter: Parameter, architecture: Architecture) -> Explained:
    small = Explained(1 / math.sqrt(parameter.fan_out), f"rows of norm 1, n = {parameter.fan_out}")
    if parameter.is_tied:
        return small._replace(reason=f"table and readout: {small.reason}")
    added = parameter.layer == Role.INPUT and any(one.is_tied for one in architecture.parameters)
    if added:  # rows of norm √n would drown those of the tied table
        return small._replace(reason=f"added to a tied table: {small.reason}")
    return Explained(1.0, "embedding: std 1")


def _finite(parameter: Parameter, deviation: Deviation, rule: Description) -> Any:
    if not np.all(np.isfinite(deviation)):
        raise ValueError(
            f"initialization rule {rule.name!r} gives {parameter.name!r} the standard deviation "
            f"{deviation}"
        )
    return deviation


def second_moments(
    architecture: Architecture, rule: str | InitializationRule | None = None, **options: Any
) -> dict[int, float]:
    """Returns the second moment of every vertex that a rule promises (theory §9).

    That of an entry before normalization and activation, as `vertex_features` gives it, at infinite
    width, averaged over positions. What is averaged over positions, by a pool or by attention, is
    promised as if all positions held the same, and is less where they differ. It holds for inputs
    of second moment 1. At width n, with d layers before it, a draw deviates from it by about
    √(d/n), relative.

        promised = second_moments(arch, "second_moment")
        measured = {v: jnp.mean(z**2) for v, z in vertex_features(apply, params, x).items()}

    Args:
      architecture: the network.
      rule: initialization rule, see `weight_standard_deviations`.
      **options: passed to the rule.

    Raises:
      TypeError, ValueError: see `weight_standard_deviations`.
    """
    deviations = weight_standard_deviations(architecture, rule, **options)
    starts = start_values(architecture, rule, **options)
    parameters = tuple(
        dataclasses.replace(one, given=float(np.mean(starts[one.name])))
        if one.name in starts
        else one
        for one in architecture.parameters
    )
    architecture = dataclasses.replace(architecture, parameters=parameters)
    found = vertex_moments(architecture, deviations)
    return {vertex: found[vertex].second for vertex in sorted(found)}


# Rules that choose the second moment of every contribution.


class _Allocation(Propagation):
    """Second moments as a rule chooses them, vertex by vertex.

    Attributes:
      numerators: C of every edge so far.
      gains: see `WeightVariances`.
      free: see `WeightVariances`.
      uses: by edge, how often its weight is used.
    """

    def __init__(self, architecture: Architecture):
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
        stems = {
            one.name: math.sqrt(stem_numerator(architecture, one.name) / one.fan_in)
            for one in architecture.parameters
            if one.role == Role.INPUT and one.edge is None and one.is_drawn
        }
        tables = {
            one.name: _embedding_deviation(one, architecture).value
            for one in architecture.parameters
            if one.role == Role.EMBEDDING and one.is_drawn
        }
        self.tables = tables
        self.zero = {one.name for one in architecture.parameters if one.given == 0.0}
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
        """The second moment of a vertex as its layers gave it.

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
                self._nominal[vertex] = self.found[vertex].second
        return self._nominal[vertex]

    def allot(self, edge: int, wanted: float, *, sets_gains: bool = False) -> float:
        """Gives an edge the C that brings `wanted`; returns the variance of its layer's outputs.

        What stands before a normalization brings no more or less for it: that is left to the gain,
        where the rule sets gains.
        """
        function = self.functions[edge]
        if any(self.roles[name] == Role.EMBEDDING for name in function.weights):
            return self.tables.get(function.weights[0], 0.0) ** 2
        if not self.brings(edge):
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
        second = self.read(edge)
        self.numerators[edge] = variance / (second if math.isfinite(second) else 1.0) * met
        return variance

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
            if max(self.senders[edge] for edge in pair) < vertex
        }

    def brings(self, edge: int) -> bool:
        """Whether a layer holds and reads more than zeros, and is not multiplied by them."""
        function = self.functions[edge]
        zero = bool(function.weights) and self.zero.issuperset(function.weights)
        return not zero and self.read(edge) > 0 and bool(variables(function.after))

    def linear_slices(self, edge: int) -> set[tuple[Any, ...]]:
        """The slices of a layer's outputs that go on linearly; none where all or none of them do.

        Of a leaf that holds a gate, σ(a) * b, it is the half that makes b.
        """
        vertex = self.receivers[edge]
        ways = self.ways_from(vertex)
        linear = {one.part for way in ways for one in linear_slices(way, vertex)}
        return linear if linear < self.read_slices(vertex) else set()

    def shrink(self, edge: int, factor: float) -> float:
        """Shrinks the variance of the slices of a layer's outputs that go on linearly.

        So the gate is drawn as one that has a leaf of its own. Where it is not known which entries
        of the leaf they are, as behind a reshape, all shrink: the product as the factor's square.

        Returns:
          The factor that is left for the layer as a whole.
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


def _in_equal_parts(architecture: Architecture, degrees: np.ndarray) -> WeightVariances:
    """Every layer brings what it carries, over a number of contributions by edge."""
    allocation = _Allocation(architecture)
    allocation.numerators /= degrees
    for vertex in range(1, len(allocation.incoming)):
        variances = {
            edge: allocation.allot(edge, allocation.carried_by(edge) / degrees[edge])
            for edge in allocation.incoming[vertex]
            if allocation.layers[edge]
        }
        allocation.close(vertex, variances)
    return allocation.result()


@register_initialization_rule("target")
def target(architecture: Architecture) -> WeightVariances:
    """C = 1 / (d_in(v) ρ), the target's live in-degree [AAS Eq. 12]; for summed pre-activations."""
    return _in_equal_parts(architecture, _contributions(architecture)[architecture.graph.receivers])


@register_initialization_rule("source")
def source(architecture: Architecture) -> WeightVariances:
    """C = 1 / (d_in(u) ρ), the source's live in-degree [AAS Eq. 4]; for summed activations."""
    return _in_equal_parts(architecture, _contributions(architecture)[architecture.graph.senders])


def _contributions(architecture: Architecture) -> np.ndarray:
    """Live in-degree of every vertex, at least 1, without layers that the model starts at zero."""
    graph = architecture.graph
    degrees, counted = in_degrees(graph), reachable_vertices(graph)[graph.senders]
    zero = {one.name for one in architecture.parameters if one.given == 0.0}
    for edge, function in enumerate(architecture.functions or ()):
        if counted[edge] and function.weights and zero.issuperset(function.weights):
            degrees[graph.receivers[edge]] -= 1
    return np.maximum(degrees, 1)


@register_initialization_rule("none")
def none(architecture: Architecture) -> WeightVariances:
    """C = 2 for every edge (He), whatever the graph; half where the layer reads no activation."""
    edges = np.full(len(architecture.graph.senders), 2.0)
    return WeightVariances(edges / (1 + _reads_features(architecture)))


def _reads_features(architecture: Architecture) -> np.ndarray:
    """Bool [E], the edges whose layers read no activation."""
    found = np.zeros(len(architecture.graph.senders), bool)
    for parameter in architecture.parameters:
        for edge in (parameter.edge, *parameter.further_edges):
            if edge is not None and parameter.role == Role.HIDDEN:
                found[edge] |= not parameter.activated
    return found


@register_initialization_rule("author_code")
def author_code(architecture: Architecture) -> WeightVariances:
    """C = 2 / d_in(u) as in the authors' published code (theory §3).

    The in-degree counts dead edges too, in a network of cells within one cell. MLP and CNN take the
    fan-out, cells the fan-in, and the readout has standard deviation 2/n, where the text has
    sqrt(2)/n. Layers that read no activation get half.
    """
    graph = architecture.graph
    space = graph.globals["space"][0]
    degrees = np.maximum(in_degrees(graph, live=False), 1)[graph.senders]
    edges = _author_cell_variances(graph) if space == Space.CELL_NETWORK else 2 / degrees
    return WeightVariances(
        edges / (1 + _reads_features(architecture)),
        readout_gain=2.0,
        fan="fan_out" if space == Space.DAG else "fan_in",
    )


def _author_cell_variances(graph) -> np.ndarray:
    """Cells and reductions are blocks of three vertices and an input, whose in-degree is 1.

    The convolutions of a reduction get 2, 1 and, on its shortcut, 2.
    """
    block = (graph.receivers - 1) // 3
    source = graph.senders - 3 * block
    degrees = np.maximum(in_degrees(graph, live=False)[graph.senders], 1)
    degrees = np.where(source == 0, 1, degrees)
    operator, size = graph.edges["operator"], graph.edges["kernel_size"]
    reduction = np.isin(block, block[(operator == Operator.AVG_POOL) & (size == 2)])
    degrees = np.where(reduction, np.where(source == 1, 1, 2), degrees)
    # Only the shortcut reads no activation, for which the rule halves.
    return np.where(reduction & (source == 2), 2, 1) * 2 / degrees


@register_initialization_rule("second_moment")
def second_moment(
    architecture: Architecture, *, branch_share: float = 0.25, depth_exponent: float = 0.5
) -> WeightVariances:
    """Second moments carried through the graph, equal as far as skips allow (theory §3).

    The layers that feed a vertex bring, in equal parts, what its skips lack to the second moment of
    vertex 0, or to 1 if that is less and they read normalized features. Skips from any vertex bring
    at least that; there the layers add `branch_share` / n^(2·depth_exponent) of what the skips
    bring, n being the number of vertices with both: n residual blocks in a row grow the second
    moment at most by exp(branch_share), and no weight starts at zero. A branch that ends in a
    product gets the same share through the layer that enters it linearly, and one that ends in a
    normalization through its gain. Blocks that share their weights count as one, whose additions
    point the same way. Exact at infinite width.

    Args:
      architecture: the network.
      branch_share: see above; 0 would start saturated branches at zero weights.
      depth_exponent: α of depth-μP (1/2) or CompleteP (1), see `archscale_jax.rules.residual`.

    Raises:
      ValueError: a branch share or exponent that is negative or not finite.
    """
    if not 0 <= branch_share < math.inf:
        raise ValueError(f"branch_share must be finite and not negative, found {branch_share}")
    if not 0 <= depth_exponent < math.inf:
        raise ValueError(f"depth_exponent must be finite and not negative, found {depth_exponent}")
    layers = is_weight(architecture.graph)
    branches = residual_branches(architecture)
    probe = _Allocation(architecture)
    features = _vertices_with_features(probe)
    mixed = {
        vertex
        for vertex, edges in enumerate(probe.incoming)
        if {bool(layers[edge]) for edge in edges if probe.senders[edge] in features}
        == {True, False}
    }
    products: dict[int, dict[int, float]] = {}
    for vertex in set(branches) - mixed:
        try:
            products[vertex] = branch_ends(architecture, {vertex: branches[vertex]})[vertex]
        except ValueError:
            continue  # nothing linear ends it: it brings what it brings
    number = sum(1 / probe.uses_into(vertex) for vertex in mixed | set(products))
    share = branch_share / max(number, 1) ** (2 * depth_exponent)
    allocation = _shared(architecture, share, mixed, products, set(branches))
    return allocation.result(gains=allocation.gains)


def _vertices_with_features(allocation: _Allocation) -> set[int]:
    """The vertices that hold more than zeros."""
    found: set[int] = {0}

    def distribution(one: Variable) -> Moments | float:
        if one.kind == "vertex" and one.source not in found:
            return 0.0
        return allocation.distribution(one)

    for vertex, edges in enumerate(allocation.incoming):
        expression = allocation.architecture.expressions.get(vertex)
        if expression is not None:
            filled = moments(expression, distribution).second > 0
        else:
            filled = any(allocation.senders[edge] in found for edge in edges)
        if filled:
            found.add(vertex)
    return found


def _shared(
    architecture: Architecture,
    share: float,
    mixed: set[int],
    products: Mapping[int, dict[int, float]],
    blocks: set[int],
) -> _Allocation:
    """Allots parts vertex by vertex; where a product ends a branch, once more with its share."""
    allocation = _Allocation(architecture)
    reference = allocation.found[0].second
    read = [edge for edge, sender in enumerate(allocation.senders) if sender == 0]
    activation = min((allocation.source(edge).second for edge in read), default=reference)
    units = {0: reference}
    shrink: dict[int, float] = {}
    rounds = {  # one is enough for what is linear, and the next sees that
        vertex: 6 if any(map(allocation.linear_slices, ends)) else 2
        for vertex, ends in products.items()
    }
    vertex = 1
    while vertex < len(allocation.incoming):
        edges = [edge for edge in allocation.incoming[vertex] if allocation.layers[edge]]
        skipped = allocation.skipped(vertex).second if vertex in mixed else 0.0
        units[vertex] = _unit(allocation, vertex, units, max(reference, 1.0))
        activated = any(allocation.activates(edge) for edge in edges)
        total = activation if activated else units[vertex]
        if vertex in mixed:
            total = max(total, skipped * (1 + share))
        bringing = [edge for edge in edges if allocation.brings(edge)]
        parts = _parts(allocation, bringing, total - skipped)
        if vertex in mixed and vertex in blocks:
            # What one weight adds to a stream again and again points the same way every time.
            parts = {edge: part / allocation.uses.get(edge, 1) ** 2 for edge, part in parts.items()}
        variances = {
            edge: allocation.allot(
                edge, parts.get(edge, 0.0) * shrink.get(edge, 1.0), sets_gains=True
            )
            for edge in edges
        }
        allocation.close(vertex, variances)
        if rounds.get(vertex):
            rounds[vertex] -= 1
            if _balance(allocation, vertex, products[vertex], share, shrink):
                vertex = min(allocation.receivers[edge] for edge in products[vertex])
                allocation.forget(vertex)
                continue
        vertex += 1
    return allocation


def _unit(
    allocation: _Allocation, vertex: int, units: Mapping[int, float], normalized: float
) -> float:
    """The second moment that a vertex should have: its sources', or that of what is normalized."""
    edges = allocation.incoming[vertex]
    skips = [edge for edge in edges if not allocation.layers[edge]]
    parts = [
        normalized
        if allocation.normalizes(allocation.functions[edge].before)
        else units[allocation.senders[edge]]
        for edge in skips or edges
    ]
    # A stream of zeros, as behind a gate that is closed, tells nothing.
    return (float(np.mean(parts)) if parts else units[0]) or 1.0


def _parts(allocation: _Allocation, edges: list[int], missing: float) -> dict[int, float]:
    """What every layer brings to a vertex; where activations are summed, their means add up too."""
    if missing <= 0:
        return dict.fromkeys(edges, 0.0)
    equal = {edge: missing / len(edges) for edge in edges}
    if all(isinstance(allocation.functions[edge].after, Variable) for edge in edges):
        return equal
    return _with_means(allocation, edges, equal, missing)


def _with_means(
    allocation: _Allocation, edges: list[int], equal: dict[int, float], missing: float
) -> dict[int, float]:
    """Scales contributions so that with the products of their means they bring what is missing."""
    vertex = allocation.receivers[edges[0]]
    skipped = allocation.skipped(vertex)

    def brought(scale: float) -> float:
        variances = {
            edge: allocation.output_variance(edge, part * scale) for edge, part in equal.items()
        }
        found = [
            allocation.contribution(edge, 1.0 if one is None else one)
            for edge, one in variances.items()
        ]
        mean = skipped.mean + sum(one.mean for one in found)
        variance = sum(one.variance for one in found)
        return variance + mean**2 - skipped.mean**2 - missing

    from scipy.optimize import brentq

    if missing <= 0 or all(allocation.ends_in_norm(edge) for edge in edges):
        return equal
    if not brought(1e-9) < 0 < brought(1.0):
        return equal
    scale = brentq(brought, 1e-9, 1.0, xtol=1e-14, rtol=1e-14)
    return {edge: part * scale for edge, part in equal.items()}


def _balance(
    allocation: _Allocation,
    vertex: int,
    ends: Mapping[int, float],
    share: float,
    shrink: dict[int, float],
) -> bool:
    """Notes by how much layers that end a branch must shrink for their share of the stream.

    Returns:
      Whether that is news.
    """
    skips = [edge for edge in allocation.incoming[vertex] if not allocation.layers[edge]]
    sources = {allocation.senders[edge]: edge for edge in skips}
    stream = min(sources)
    brought = sum(
        allocation.carried(edge).second for source, edge in sources.items() if source != stream
    )
    wanted = share * allocation.carried(sources[stream]).second
    if brought <= 0 or math.isclose(wanted, brought, rel_tol=1e-12):
        return False
    for edge, part in ends.items():
        factor = allocation.shrink(edge, (wanted / brought) ** part)
        shrink[edge] = shrink.get(edge, 1.0) * factor
    return True


INITIALIZATION_RULES.alias("moment", "second_moment")
