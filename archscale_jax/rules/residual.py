"""Depth factors of residual stacks: depth-μP, CompleteP (theory §5), without forward multipliers.

A stack of n residual additions whose branches are multiplied by m^(-α), m = n / base n, keeps its
rate, whatever the depth. Without multipliers the factor sits in the weights that end a branch,
which the initialization rule `moment` draws smaller by n^(-α), and in the rates:

| optimizer   | weights that end a branch | other weights of a branch | all else |
|-------------|---------------------------|---------------------------|----------|
| SGD         | 1/m                       | m^(2α-1)                  | 1        |
| Adam, Muon  | 1/m                       | m^(α-1)                   | 1        |

A rate η of a weight that a multiplier a follows is a rate η·a² of their product for SGD and η·a for
Adam; with L layers that change a feature together, the change is η·a²·L or η·a·L.
"""

import collections
from typing import Literal

import jraph

from archscale_jax.architecture import Architecture, Parameter, Role
from archscale_jax.graph import Operator, is_weight, live_edges
from archscale_jax.refusals import unknown
from archscale_jax.rules.registry import Explained

Optimizer = Literal["sgd", "adam", "muon"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "muon")

_WEIGHTLESS = (Operator.SKIP, Operator.AVG_POOL)


def residual_branches(graph: jraph.GraphsTuple) -> dict[int, set[int]]:
    """Returns the edges of the branches that end in every residual addition, by vertex.

    A vertex is a residual addition where an edge without weight brings what another way, the
    branch, brings too.
    """
    live = live_edges(graph)
    incoming: dict[int, list[int]] = collections.defaultdict(list)
    for edge in live.nonzero()[0].tolist():
        incoming[int(graph.receivers[edge])].append(edge)
    branches: dict[int, set[int]] = {}
    for vertex, edges in incoming.items():
        skips = [edge for edge in edges if graph.edges["operator"][edge] in _WEIGHTLESS]
        for skip in skips:
            around = _edges_between(graph, incoming, int(graph.senders[skip]), vertex) - {skip}
            if around:
                branches.setdefault(vertex, set()).update(around)
    return branches


def _edges_between(
    graph: jraph.GraphsTuple, incoming: dict[int, list[int]], source: int, target: int
) -> set[int]:
    """The edges on paths from one vertex to another."""
    reached, wanted = {source}, [target]
    behind: dict[int, list[int]] = {}
    while wanted:  # back from the target, not beyond the source
        vertex = wanted.pop()
        if vertex in behind or vertex <= source:
            continue
        behind[vertex] = incoming[vertex]
        wanted.extend(int(graph.senders[edge]) for edge in incoming[vertex])
    found: set[int] = set()
    for vertex in sorted(behind):
        here = {edge for edge in behind[vertex] if int(graph.senders[edge]) in reached}
        if here:
            reached.add(vertex)
            found |= here
    return found if target in reached else set()


def depth_factors(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple,
    optimizer: Optimizer,
    *,
    exponent: float = 0.5,
) -> dict[str, Explained]:
    """Returns the depth factor of every parameter by name, see above, and which one it is.

    Use it with weights from the initialization rule `moment` and its `depth_exponent`. What the
    record of a parameter does not place, such as scales of normalization, counts as within a branch
    if it belongs to a hidden layer.

    Args:
      architecture: the network to train.
      base: the network on which the rate was tuned, or its graph.
      optimizer: `sgd`, `adam` or `muon`.
      exponent: α, 1/2 for depth-μP, 1 for CompleteP.

    Raises:
      ValueError: another optimizer, a network without residual additions, or a branch that ends in
        no layer of its own, so that no weight can take the factor.
    """
    check_optimizer(optimizer)
    base_graph = base.graph if isinstance(base, Architecture) else base
    branches = residual_branches(architecture.graph)
    counts = len(branches), len(residual_branches(base_graph))
    if not all(counts):
        raise ValueError(
            f"depth rule: the network has {counts[0]} residual additions and the base {counts[1]}; "
            "both need some. Chains have the rules depth and path_sum"
        )
    ratio = counts[0] / counts[1]
    power = 2 * exponent - 1 if optimizer == "sgd" else exponent - 1
    numbers = f"m = {ratio:.4g}, α = {exponent:g}"
    end = Explained(1 / ratio, f"ends a branch: 1/m, {numbers}")
    inner = Explained(ratio**power, f"in a branch: m^({power:g}), {numbers}")
    other = Explained(1.0, "in no branch")
    inside = set().union(*branches.values())
    ends = _ends(architecture.graph, branches)

    def factor(parameter: Parameter) -> Explained:
        if parameter.layer != Role.HIDDEN or parameter.role == Role.EMBEDDING:
            return other
        edges = {parameter.edge, *parameter.further_edges} - {None}
        if not edges:  # of a normalization
            return inner._replace(reason=f"counted as {inner.reason}, wherever it stands")
        if edges & ends:
            return end
        return inner if edges <= inside else other

    return {parameter.name: factor(parameter) for parameter in architecture.parameters}


def check_optimizer(optimizer: str) -> None:
    """Checks that a depth rule has this name.

    Raises:
      ValueError: it has not.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("depth rule", optimizer, OPTIMIZERS))


def _ends(graph: jraph.GraphsTuple, branches: dict[int, set[int]]) -> set[int]:
    """The weight edges that end the branches."""
    weight = is_weight(graph)
    ends: set[int] = set()
    for vertex, edges in branches.items():
        last = {edge for edge in edges if graph.receivers[edge] == vertex}
        for edge in last:
            if not weight[edge]:
                raise ValueError(
                    f"depth rule: a branch that ends in vertex {vertex} brings vertex "
                    f"{graph.senders[edge]} there without a layer of its own (a product, or a "
                    "layer that others read too), so that no weight can take the factor m^(-α)"
                )
        ends |= last
    return ends
