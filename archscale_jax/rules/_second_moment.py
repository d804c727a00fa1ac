"""The initialization rule `second_moment`: moments equal as far as skips allow (theory §3, §9)."""

import math
from collections.abc import Mapping

import numpy as np

from archscale_jax._architecture import Architecture
from archscale_jax._expressions import Moments, Variable
from archscale_jax._graph import is_weight
from archscale_jax._quadrature import moments
from archscale_jax.rules._allocation import Allocation
from archscale_jax.rules._residual import branch_ends, residual_branches
from archscale_jax.rules._variances import WeightVariances, register_initialization_rule


@register_initialization_rule("second_moment", citation="(theory §3)")
def second_moment(
    architecture: Architecture,
    *,
    branch_share: float = 0.25,
    depth_exponent: float = 0.5,
    readout_gain: float = math.sqrt(2.0),
    table_rows: float = 1.0,
) -> WeightVariances:
    """Second moments carried through the graph, equal as far as skips allow.

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
      depth_exponent: α of depth-μP (1/2) or CompleteP (1), see `archscale_jax.rules._residual`.
      readout_gain: readouts have standard deviation `readout_gain` / n.
      table_rows: norm of the rows of tables that are the readout too.

    Raises:
      ValueError: a branch share, exponent, gain or norm that is negative or not finite.
    """
    options = {"branch_share": branch_share, "depth_exponent": depth_exponent}
    sizes = {"readout_gain": readout_gain, "table_rows": table_rows}
    for name, value in (options | sizes).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, found {value}")
    layers = is_weight(architecture.graph)
    branches = residual_branches(architecture)
    probe = Allocation(architecture, table_rows)
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
            products[vertex] = branch_ends(probe, vertex, branches[vertex])
        except ValueError:
            continue  # nothing linear ends it: it brings what it brings
    number = sum(1 / probe.uses_into(vertex) for vertex in mixed | set(products))
    share = branch_share / max(number, 1) ** (2 * depth_exponent)
    allocation = Allocation(architecture, table_rows)
    _share(allocation, share, mixed, products, set(branches))
    return allocation.result(gains=allocation.gains)._replace(**sizes)


def _vertices_with_features(allocation: Allocation) -> set[int]:
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


def _share(
    allocation: Allocation,
    share: float,
    mixed: set[int],
    products: Mapping[int, dict[int, float]],
    blocks: set[int],
) -> None:
    """Allots parts vertex by vertex; where a product ends a branch, once more with its share."""
    reference = allocation.nominal(0)
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


def _unit(
    allocation: Allocation, vertex: int, units: Mapping[int, float], normalized: float
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


def _parts(allocation: Allocation, edges: list[int], missing: float) -> dict[int, float]:
    """What every layer brings to a vertex; where activations are summed, their means add up too."""
    if missing <= 0:
        return dict.fromkeys(edges, 0.0)
    equal = {edge: missing / len(edges) for edge in edges}
    if all(isinstance(allocation.functions[edge].after, Variable) for edge in edges):
        return equal
    return _with_means(allocation, edges, equal, missing)


def _with_means(
    allocation: Allocation, edges: list[int], equal: dict[int, float], missing: float
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

    normalized = all(allocation.ends_in_norm(edge) for edge in edges)
    if normalized or not brought(1e-9) < 0 < brought(1.0):
        return equal
    scale = brentq(brought, 1e-9, 1.0, xtol=1e-14, rtol=1e-14)
    return {edge: part * scale for edge, part in equal.items()}


def _balance(
    allocation: Allocation,
    vertex: int,
    ends: Mapping[int, float],
    share: float,
    shrink: dict[int, float],
) -> bool:
    """Notes by how much layers that end a branch must shrink; returns whether that is news."""
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
        left = allocation.shrink(edge, (wanted / brought) ** part)
        shrink[edge] = shrink.get(edge, 1.0) * left
    return True
