"""Weights whose outputs multiply features, as those of routers do (theory §10).

A weight inside of a model that reads n features and writes a fixed number of them, of size 1/√n as
hidden weights have it, brings gradients of size 1/√n to every feature that it reads, where the
readout brings 1/n. What multiplies all features of a layer, as the shares of experts and the states
of a selective scan do, gets the sum over these features as its own gradient, which a few updates
make one of size 1, whatever n. So updates add up along the weight, and its outputs change by √n
(measured, `benchmarks/coordinates.py`). Such a weight is drawn as a readout is: smaller by 1/√r
beyond the base.

Of a bottleneck, whose outputs other layers read, and of keys and values that many heads share the
gradients come through weights, and their parts do not add up: they keep their size.
"""

from collections.abc import Mapping

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._expressions import statistics
from archscale_jax._graph import Operator
from archscale_jax._moments import Propagation


def gate_ratios(
    architecture: Architecture, ratios: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Returns r of every weight that reads a width, writes none, and multiplies features.

    Args:
      architecture: the network.
      ratios: r and s by name, see `rules._width.width_ratios`.
    """
    candidates = [
        one
        for one in architecture.parameters
        if one.role == Role.HIDDEN and one.name in ratios and _only_reads(*ratios[one.name])
    ]
    if not candidates:
        return {}
    propagation = Propagation(architecture)
    return {one.name: ratios[one.name][0] for one in candidates if _multiplies(propagation, one)}


def _only_reads(r: float, s: float) -> bool:
    return r != 1 and s == 1


def _multiplies(propagation: Propagation, parameter: Parameter) -> bool:
    """Whether what a weight writes reaches a product of features before it reaches a layer."""
    edges = {use.edge for use in parameter.uses if use.kind == "weight" and use.edge is not None}
    wanted = [propagation.receivers[edge] for edge in edges]
    seen: set[int] = set()
    while wanted:
        vertex = wanted.pop()
        if vertex in seen:
            continue
        seen.add(vertex)
        for edge, source in enumerate(propagation.senders):
            if source != vertex or propagation.layers[edge]:
                continue
            target = propagation.receivers[edge]
            if not _is_product(propagation, target):
                wanted.append(target)
            elif not _is_attention(propagation, target, edge):
                return True
    return False


def _is_product(propagation: Propagation, vertex: int) -> bool:
    operators = {propagation.operators[edge] for edge in propagation.incoming[vertex]}
    return vertex in propagation.architecture.expressions or Operator.PRODUCT in operators


def _is_attention(propagation: Propagation, vertex: int, edge: int) -> bool:
    """Whether a product is one of queries and keys, or of their softmax and values."""
    others = [one for one in propagation.incoming[vertex] if one != edge]
    behind = [one for one, source in enumerate(propagation.senders) if source == vertex]
    return any(_averages_positions(propagation, one) for one in (*others, *behind))


def _averages_positions(propagation: Propagation, edge: int) -> bool:
    """Whether an edge divides by a mean over positions, as a softmax over keys does."""
    means = statistics(propagation.functions[edge].before)
    return any(one.name == "mean" and not one.units for one in means)
