"""Initialization rules that divide by the number of contributions [AAS Eq. 4, 12], and plain He."""

import numpy as np

from archscale_jax._architecture import Architecture, Arrangement, Role
from archscale_jax._graph import Operator, Space, in_degrees, reachable_vertices
from archscale_jax.rules._allocation import in_equal_parts
from archscale_jax.rules._variances import WeightVariances, register_initialization_rule


@register_initialization_rule(
    "target_in_degree",
    equation="C = 1 / (d_in(v) ρ)",
    citation="[AAS Eq. 12]",
    blind_to_skips=True,
    arrangement=Arrangement.PRE_ACTIVATION,
)
def target_in_degree(architecture: Architecture) -> WeightVariances:
    """Divides by the live in-degree of the target; for summed pre-activations."""
    return in_equal_parts(architecture, _contributions(architecture)[architecture.graph.receivers])


@register_initialization_rule(
    "source_in_degree",
    equation="C = 1 / (d_in(u) ρ)",
    citation="[AAS Eq. 4]",
    blind_to_skips=True,
    reads_source=True,
    arrangement=Arrangement.ACTIVATION,
)
def source_in_degree(architecture: Architecture) -> WeightVariances:
    """Divides by the live in-degree of the source; for summed activations."""
    return in_equal_parts(architecture, _contributions(architecture)[architecture.graph.senders])


def _contributions(architecture: Architecture) -> np.ndarray:
    """Live in-degree of every vertex, at least 1, without layers that the model starts at zero."""
    graph = architecture.graph
    degrees, counted = in_degrees(graph), reachable_vertices(graph)[graph.senders]
    for edge in architecture.zero_edges:
        degrees[graph.receivers[edge]] -= counted[edge]
    return np.maximum(degrees, 1)


@register_initialization_rule("he_normal", equation="C = 2", blind_to_skips=True)
def he_normal(architecture: Architecture) -> WeightVariances:
    """The same for every layer (He), whatever the graph; half where it reads no activation."""
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


@register_initialization_rule(
    "chen2024_code",
    equation="C = 2 / d_in(u)",
    citation="(theory §3)",
    blind_to_skips=True,
    reads_source=True,
)
def chen2024_code(architecture: Architecture) -> WeightVariances:
    """As in the authors' published code.

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
