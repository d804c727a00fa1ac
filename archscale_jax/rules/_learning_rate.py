"""Learning-rate rules: what multiplies the rate tuned on a base network (theory §4, §5).

A rule is a function `(graph, base, **options) -> float` of two graphs. Pass one by name or pass
the function itself; `register_learning_rate_rule` gives a function of yours a name.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jraph
import numpy as np

from archscale_jax._graph import (
    Space,
    check_graph,
    in_degrees,
    is_weight,
    network_kernel_size,
    number_of_vertices,
)
from archscale_jax._paths import path_statistics
from archscale_jax.rules._registry import Registry

LearningRateRule = Callable[..., float]

LEARNING_RATE_RULES: Registry[float] = Registry("learning-rate rule")
register_learning_rate_rule = LEARNING_RATE_RULES.register


class MissingBaseError(ValueError):
    """A rule that compares with a base network got none."""


def learning_rate_scale(
    graph: jraph.GraphsTuple,
    base: jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule = "path_sum_activations",
    *,
    rule_options: Mapping[str, Any] | None = None,
) -> float:
    """Returns what multiplies the base network's learning rate for this network.

    Args:
      graph: graph of the network to train.
      base: graph of the network on which the rate was tuned; `chen2024_code` and `none` ignore it.
      rule: name of a rule, or a function `(graph, base, **options) -> float`.
      rule_options: options of the rule, such as `{"depth_offset": 1}` of `path_sum`.

    Returns:
      The multiplier, finite and positive.

    Raises:
      TypeError: a graph or base of another type, or an option that the rule does not have.
      ValueError: an unknown rule, no base where the rule needs one, a graph on which the rule says
        nothing, or a multiplier that is not a positive finite float.
    """
    check_graph(graph)
    if base is not None:
        check_graph(base, "base")
    found = LEARNING_RATE_RULES.resolve(rule)
    if found.needs_base and base is None:
        raise MissingBaseError(
            f"rule {found.name} compares with a base graph: pass base, e.g. dag_graph('2')"
        )
    try:
        scale = float(found(graph, base, **(rule_options or {})))
    except OverflowError:  # a ratio of path sums beyond the range of floats
        scale = math.inf
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"learning-rate rule {found.name!r} gives the multiplier {scale}; a multiplier must be "
            "finite and positive (a graph with very many paths leaves no usable rate)"
        )
    return scale


_rule_of_depth = functools.partial(register_learning_rate_rule, answers_for_depth=True)
_PATH_SUM = {"equation": "η ∝ (Σ_p L_p³)^(-1/2) q^(-1)", "needs_base": True, "sums_paths": True}


@_rule_of_depth("path_sum", citation="[AAS Eq. 8, 9]", **_PATH_SUM)
def path_sum(graph: jraph.GraphsTuple, base: jraph.GraphsTuple, *, depth_offset: int = 0) -> float:
    """L_p counts the layers on path p, q is the kernel size.

    `depth_offset` weight layers outside the graph (stem, readout) count in every L_p.
    """
    sums = []
    for name, one in (("graph", graph), ("base", base)):
        sums.append(path_statistics(one, depth_offset=depth_offset).depth_cubed_sum)
        if not sums[-1]:
            raise ValueError(
                f"rule path_sum: no path of the {name} crosses a weight edge, so Σ L_p³ is 0; "
                "depth_offset=1 counts the stem"
            )
    return math.sqrt(sums[1] / sums[0]) * kernel_size_multiplier(
        network_kernel_size(graph), network_kernel_size(base)
    )


@_rule_of_depth("path_sum_activations", citation="(theory §2)", **_PATH_SUM)
def path_sum_activations(graph: jraph.GraphsTuple, base: jraph.GraphsTuple) -> float:
    """L_p counts the activations on path p, the stem's included: `path_sum` counts one fewer."""
    return path_sum(graph, base, depth_offset=1)


@_rule_of_depth("chen2024_code", citation="(theory §4)", sums_paths=True)
def chen2024_code(graph: jraph.GraphsTuple, base: jraph.GraphsTuple | None = None) -> float:
    """The rates of the authors' published code, which differ from the text.

    MLP and CNN: (Σ_p (L_p + 3)³)^(-1/2) · 27^(1/2), times 3/q for a CNN; where every L_p is 0 the
    graph counts as one path. Cells: (Σ_p (L_p + 1)³)^(-1/2). `base` is ignored.

    Raises:
      ValueError: the graph of a whole network of cells.
    """
    del base
    if graph.globals["space"][0] == Space.CELL_NETWORK:
        raise ValueError(
            "chen2024_code scales rates by one cell, not by a whole network of cells: pass "
            "cell_graph(cell)"
        )
    if graph.globals["space"][0] == Space.CELL:
        return 1 / math.sqrt(path_statistics(graph, depth_offset=1).depth_cubed_sum)
    dense = graph.globals["kernel_size"][0] == 0
    kernel = 1.0 if dense else kernel_size_multiplier(network_kernel_size(graph), 3)
    statistics = path_statistics(graph, depth_offset=3)
    if statistics.max_depth == 3:
        return kernel
    return math.sqrt(27 / statistics.depth_cubed_sum) * kernel


@_rule_of_depth("depth", equation="η ∝ L^(-3/2)", citation="[Jelassi]", needs_base=True)
def depth(graph: jraph.GraphsTuple, base: jraph.GraphsTuple) -> float:
    """Derived for plain chains; here L is the depth of the deepest path."""
    return _ratio(*(path_statistics(one).max_depth for one in (base, graph))) ** 1.5


@_rule_of_depth("effective_depth", equation="η ∝ D^(-3/2)", citation="[ED]", needs_base=True)
def effective_depth(graph: jraph.GraphsTuple, base: jraph.GraphsTuple) -> float:
    """D is the shortest way from input to output in layers and residual additions.

    The stem and the readout, which stand outside of the graph, are layers of it.
    """
    pair = (base, graph)
    return _ratio(*(shortest_path_length(one) + _layers_outside(one) for one in pair)) ** 1.5


def _layers_outside(graph: Any) -> int:
    return int(graph.globals["layers_outside"][0])


def _ratio(before: int, now: int) -> float:
    if not (before and now):
        raise ValueError(
            f"rules of depth: the network has depth {now} and the base {before}; no path crosses a "
            "weight edge where it is 0"
        )
    return before / now


@_rule_of_depth("inverse_depth", equation="η ∝ 1/L", needs_base=True)
def inverse_depth(graph: jraph.GraphsTuple, base: jraph.GraphsTuple) -> float:
    """L layers on the deepest path, stem and readout too; Adam on plain chains, as measured (§4).

    Updates of Adam have one size, whatever the gradient, and those of all layers add up.
    """
    depths = [path_statistics(one).max_depth + _layers_outside(one) for one in (graph, base)]
    if not all(depths):
        raise ValueError("rule inverse_depth: no layers are known, so the depth is 0")
    return depths[1] / depths[0]


@register_learning_rate_rule("none", scales=False)
def none(graph: jraph.GraphsTuple, base: jraph.GraphsTuple | None = None) -> float:
    """No scaling: the base rate for every network."""
    del graph, base
    return 1.0


def kernel_size_multiplier(kernel_size: float, base_kernel_size: float = 1) -> float:
    """Returns q_base / q, the multiplier of one layer for its kernel size [AAS Eq. 9].

    Raises:
      ValueError: a size below 1.
    """
    if kernel_size < 1 or base_kernel_size < 1:
        raise ValueError(
            f"kernel sizes start at 1, found {kernel_size} and base {base_kernel_size}"
        )
    return base_kernel_size / kernel_size


def shortest_path_length(graph: jraph.GraphsTuple) -> int:
    """Returns D [ED]: the fewest layers and residual additions on a path from input to output.

    A weight edge counts 1 (with the addition it ends in, if any), any other edge counts 1 where it
    is added to other contributions and 0 where it stands alone.

    Raises:
      ValueError: no path joins input and output.
    """
    unreached = number_of_vertices(graph)
    shortest = [0] + [unreached] * (unreached - 1)
    cost = is_weight(graph) | (in_degrees(graph)[graph.receivers] > 1)
    columns = (graph.senders, graph.receivers, cost)
    order = np.argsort(graph.receivers, kind="stable")
    for sender, receiver, length in zip(*(c[order].tolist() for c in columns), strict=True):
        shortest[receiver] = min(shortest[receiver], shortest[sender] + length)
    if shortest[-1] >= unreached:
        raise ValueError("no path joins the input and the output of the graph")
    return shortest[-1]
