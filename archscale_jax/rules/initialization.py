"""Initialization rules: the variance of every weight from its place in the graph (theory §3).

A hidden weight on edge u->v is drawn from N(0, C/n), the readout from N(0, gain²/n²), n being the
fan [AAS Eq. 2, 4]. A rule is a function `(graph, arrangement, **options) -> WeightVariances` that
says what C is for every edge; `register_initialization_rule` gives a function of yours a name.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jraph
import numpy as np

from archscale_jax.architecture import (
    Architecture,
    Arrangement,
    Parameter,
    Role,
    check_architecture,
)
from archscale_jax.graph import (
    Operator,
    Space,
    in_degrees,
    is_join,
    is_weight,
    number_of_vertices,
    reachable_vertices,
)
from archscale_jax.rules.registry import Description, Explained, Registry

STEM_NUMERATOR = 2.0
"""C of the stem, whose target vertex 0 has one contribution [AAS Eq. 4]."""


class WeightVariances(NamedTuple):
    """What an initialization rule says of a graph with E edges.

    Attributes:
      edges: float64 [E]; the weights of edge e have variance `edges[e] / n`. Entries of edges
        without weight mean nothing.
      readout_gain: the readout has standard deviation `readout_gain / n`.
      fan: which fan n is, receptive field included.
    """

    edges: np.ndarray
    readout_gain: float = math.sqrt(2.0)
    fan: Literal["fan_in", "fan_out"] = "fan_in"


InitializationRule = Callable[..., WeightVariances]

INITIALIZATION_RULES: Registry[InitializationRule] = Registry("initialization rule")
register_initialization_rule = INITIALIZATION_RULES.register


def weight_standard_deviations(
    architecture: Architecture, rule: str | InitializationRule | None = None, **options: Any
) -> dict[str, float]:
    """Returns the standard deviation of every input, hidden and readout weight by name.

    Rows of an embedding table are chosen one at a time, so that its entries have standard deviation
    1; those of a table that is the readout too are scaled to rows of norm 1, which fits both, and
    so are those of positions that are added to it.

    Args:
      architecture: the graph with its parameters.
      rule: name of a rule, or a function `(graph, arrangement) -> WeightVariances`. None takes the
        rule that measurably preserves the flow: `target` where vertices sum pre-activations,
        `source` where they sum activations (docs/initialization.md).
      **options: passed to the rule, e.g. `branch_share` of `moment`.

    Raises:
      TypeError: no architecture.
      ValueError: an unknown rule, or a rule that gives a variance that is not finite or negative.
    """
    check_architecture(architecture)
    if rule is None:
        rule = DEFAULT_RULES[architecture.arrangement]
    function, description = INITIALIZATION_RULES.resolve(rule), INITIALIZATION_RULES.describe(rule)
    variances = function(architecture.graph, architecture.arrangement, **options)
    return {
        parameter.name: standard_deviation(parameter, architecture, variances, description).value
        for parameter in architecture.parameters
        if parameter.role in DRAWN_ROLES
    }


DEFAULT_RULES = {Arrangement.PRE_ACTIVATION: "target", Arrangement.ACTIVATION: "source"}

DRAWN_ROLES = (Role.INPUT, Role.HIDDEN, Role.READOUT, Role.EMBEDDING)
"""The roles that are drawn at random; biases are 0, scales 1."""


def standard_deviation(
    parameter: Parameter,
    architecture: Architecture,
    variances: WeightVariances,
    rule: Description,
) -> Explained:
    """Returns the standard deviation of a parameter of one of the `DRAWN_ROLES`, and its reason.

    Args:
      parameter: the parameter.
      architecture: the network that it is part of.
      variances: what the rule says of the graph.
      rule: what the registry tells of the rule.

    Raises:
      ValueError: a variance that is not finite or negative, or layers with different ones.
    """
    fan = getattr(parameter, variances.fan)
    if parameter.role == Role.READOUT:
        gain = variances.readout_gain
        reason = f"readout: C = {gain**2:.4g}, N(0, C/n²), n = {fan} [AAS Eq. 2]"
        return _finite(parameter, gain / fan, reason, rule)
    if parameter.role == Role.EMBEDDING:
        return _embedding_deviation(parameter, architecture)
    if parameter.role == Role.INPUT:
        deviation = math.sqrt(STEM_NUMERATOR / fan)
        return Explained(deviation, f"stem: C = {STEM_NUMERATOR:g}, n = {fan} [AAS Eq. 4]")
    assert parameter.edge is not None  # Architecture checks
    numerators = variances.edges[[parameter.edge, *parameter.further_edges]]
    if not np.allclose(numerators, numerators[0], rtol=1e-9, equal_nan=True):
        different = ", ".join(f"{value:.4g}" for value in np.unique(numerators))
        raise ValueError(
            f"{parameter.name!r} is the weight of several layers, which would get the variances "
            f"[{different}] / {fan}; one leaf has one, which the rule none gives"
        )
    numerator = float(numerators[0]) / (1 if parameter.activated else 2)
    if numerator < 0:
        raise ValueError(f"{parameter.name!r} would get the variance {numerator} / {fan}")
    reason = f"{rule.name}: C = {numerators[0]:.4g}, n = {fan} {rule.source}".rstrip()
    reason += "" if parameter.activated else "; reads no activation: half"
    return _finite(parameter, math.sqrt(numerator / fan), reason, rule)


def _embedding_deviation(parameter: Parameter, architecture: Architecture) -> Explained:
    small = Explained(1 / math.sqrt(parameter.fan_out), f"rows of norm 1, n = {parameter.fan_out}")
    if parameter.is_tied:
        return small._replace(reason=f"table and readout: {small.reason}")
    added = parameter.layer == Role.INPUT and any(one.is_tied for one in architecture.parameters)
    if added:  # rows of norm √n would drown those of the tied table
        return small._replace(reason=f"added to a tied table: {small.reason}")
    return Explained(1.0, "embedding: std 1")


def _finite(parameter: Parameter, deviation: float, reason: str, rule: Description) -> Explained:
    if not math.isfinite(deviation):
        raise ValueError(
            f"initialization rule {rule.name!r} gives {parameter.name!r} the standard deviation "
            f"{deviation}"
        )
    return Explained(float(deviation), reason)


@register_initialization_rule("target")
def target(graph: jraph.GraphsTuple, arrangement: Arrangement) -> WeightVariances:
    """C = 2 / d_in(v), the target's live in-degree [AAS Eq. 12]; for summed pre-activations."""
    del arrangement
    return WeightVariances(2 / np.maximum(in_degrees(graph), 1)[graph.receivers])


@register_initialization_rule("source")
def source(graph: jraph.GraphsTuple, arrangement: Arrangement) -> WeightVariances:
    """C = 2 / d_in(u), the source's live in-degree [AAS Eq. 4]; for summed activations."""
    del arrangement
    return WeightVariances(2 / np.maximum(in_degrees(graph), 1)[graph.senders])


@register_initialization_rule("none")
def none(graph: jraph.GraphsTuple, arrangement: Arrangement) -> WeightVariances:
    """C = 2 for every edge (He), whatever the graph."""
    del arrangement
    return WeightVariances(np.full(len(graph.senders), 2.0))


@register_initialization_rule("author_code")
def author_code(graph: jraph.GraphsTuple, arrangement: Arrangement) -> WeightVariances:
    """C = 2 / d_in(u) as in the authors' published code (theory §3).

    The in-degree counts dead edges too, in a network of cells within one cell. MLP and CNN take the
    fan-out, cells the fan-in, and the readout has standard deviation 2/n, where the text has
    sqrt(2)/n.
    """
    del arrangement
    space = graph.globals["space"][0]
    degrees = np.maximum(in_degrees(graph, live=False), 1)[graph.senders]
    return WeightVariances(
        _author_cell_variances(graph) if space == Space.CELL_NETWORK else 2 / degrees,
        readout_gain=2.0,
        fan="fan_out" if space == Space.DAG else "fan_in",
    )


def _author_cell_variances(graph: jraph.GraphsTuple) -> np.ndarray:
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
    # Only the shortcut reads no activation, for which `standard_deviation` halves.
    return np.where(reduction & (source == 2), 2, 1) * 2 / degrees


@register_initialization_rule("moment")
def moment(
    graph: jraph.GraphsTuple,
    arrangement: Arrangement,
    *,
    branch_share: float = 0.25,
    depth_exponent: float = 0.5,
) -> WeightVariances:
    """Second moments carried through the graph, equal as far as skips allow (theory §3).

    The weighted edges of a vertex get, in equal parts, what its skips lack to the second moment 1
    of vertex 0. Skips from any vertex bring at least that; there the weighted edges add
    `branch_share` / n^(2·depth_exponent) of what the skips bring, n being the number of vertices
    with both kinds of edges: n residual blocks in a row grow the second moment at most by
    exp(branch_share), and no weight starts at zero. A branch that ends in a vertex of its own,
    which a skip then carries on, is a full vertex of moment 1: put the weight edge into the vertex
    that sums. Vertices that join count as independent sources of moment 1. Exact at infinite width
    for ReLU. Time and memory are quadratic in vertices.

    Args:
      graph: a single graph.
      arrangement: what vertices sum; activations have positive means, whose products add.
      branch_share: see above; 0 would start saturated branches at zero weights.
      depth_exponent: α of depth-μP (1/2) or CompleteP (1), see `archscale_jax.rules.residual`.

    Raises:
      ValueError: a branch share or exponent that is negative or not finite.
    """
    if not 0 <= branch_share < math.inf:
        raise ValueError(f"branch_share must be finite and not negative, found {branch_share}")
    if not 0 <= depth_exponent < math.inf:
        raise ValueError(f"depth_exponent must be finite and not negative, found {depth_exponent}")
    num_vertices = number_of_vertices(graph)
    weight, live = is_weight(graph), reachable_vertices(graph)[graph.senders]
    skips = [graph.senders[live & ~weight & (graph.receivers == v)] for v in range(num_vertices)]
    weights = [np.flatnonzero(live & weight & (graph.receivers == v)) for v in range(num_vertices)]
    mixed = sum(1 for s, w in zip(skips, weights, strict=True) if len(s) and len(w))
    share = branch_share / max(mixed, 1) ** (2 * depth_exponent)
    joins = set(graph.receivers[is_join(graph)].tolist())

    activation = arrangement == Arrangement.ACTIVATION
    products = np.zeros((num_vertices, num_vertices))  # E[feature_u feature_v], one unit each
    means = np.zeros(num_vertices)
    products[0, 0], means[0] = 1.0, _RELU_MEAN * math.sqrt(2.0) if activation else 0.0
    edges = np.full(len(graph.senders), 2.0)
    for vertex in range(1, num_vertices):
        if vertex in joins:
            products[vertex, vertex], means[vertex] = 1.0, means[0]
            continue
        skipped = products[np.ix_(skips[vertex], skips[vertex])].sum()
        products[vertex] = products[:, vertex] = products[skips[vertex]].sum(axis=0)
        means[vertex] = means[skips[vertex]].sum()
        count, second = len(weights[vertex]), skipped
        if count:
            second = max(1.0, skipped * (1 + share))
            solve = _activation_variance if activation else _pre_activation_variance
            variance = solve(second - skipped, count, means[vertex])
            sources = graph.senders[weights[vertex]]
            edges[weights[vertex]] = variance / products[sources, sources]
            if activation:
                added = count * _RELU_MEAN * math.sqrt(variance)
                products[vertex] += added * means
                means[vertex] += added
                products[:, vertex] = products[vertex]
        products[vertex, vertex] = second
    return WeightVariances(edges)


_RELU_MEAN = 1 / math.sqrt(2 * math.pi)
"""E[σ(z)] for z ~ N(0, 1); E[σ(z)²] is 1/2."""


def _pre_activation_variance(missing: float, count: int, mean: float) -> float:
    """Variance c of W z_u with count · c/2 = missing, since E[(W σ(z_u))²] = c/2."""
    del mean
    return 2 * missing / count


def _activation_variance(missing: float, count: int, mean: float) -> float:
    """Variance a² of W h_u such that `count` terms σ(W h_u) add `missing` to a sum of this mean.

    The sum's second moment grows by 2·mean·count·m·a + count·a²/2 + count·(count-1)·m²·a², with
    m·a the mean of one term; a is the positive root.
    """
    half_linear = mean * count * _RELU_MEAN
    quadratic = count / 2 + count * (count - 1) * _RELU_MEAN**2
    root = (math.sqrt(half_linear**2 + quadratic * missing) - half_linear) / quadratic
    return root**2
