"""The header of a report: the graph and the rules."""

import math
from collections.abc import Iterable

import jraph

from archscale_jax._architecture import Architecture
from archscale_jax._graph import is_weight, number_of_vertices
from archscale_jax._paths import PathStatistics, path_statistics
from archscale_jax._reporting.names import count_text
from archscale_jax._reporting.reasons import reason_text
from archscale_jax.rules._rates import RateRules
from archscale_jax.rules._registry import Explained, Rule
from archscale_jax.rules._width import WIDTH_RULES


def graph_lines(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None,
    paths: PathStatistics,
) -> list[str]:
    """Returns what there is in the network, and the statistics of its paths and the base's."""
    graph = architecture.graph
    edges, weights = len(graph.senders), int(is_weight(graph).sum())
    sizes = [math.prod(parameter.shape) for parameter in architecture.parameters]
    summed = architecture.arrangement.replace("_", "-") + "s"
    lines = [
        f"{count_text(sum(sizes))} parameters in {len(sizes)} leaves; {number_of_vertices(graph)} "
        f"vertices, which sum {summed}; {edges} edges, {weights} with weights",
        f"paths: {_paths_text(paths)}",
    ]
    if base is not None:
        base_graph = base.graph if isinstance(base, Architecture) else base
        lines.append(f"paths of the base: {_paths_text(path_statistics(base_graph))}")
    return lines


def _paths_text(paths: PathStatistics) -> str:
    count, first, third = map(count_text, (paths.count, paths.depth_sum, paths.depth_cubed_sum))
    return f"{count}, ΣL = {first}, ΣL³ = {third}, L from {paths.min_depth} to {paths.max_depth}"


def rate_lines(rule: Rule | None, rules: RateRules, multipliers: Iterable[Explained]) -> list[str]:
    """Returns the rules of the learning rate; and the parts of the multiplier, if all have one."""
    lines = [rule_line("learning rate", rule)] if rule is not None and rule.scales else []
    if rules.width_rule is not None:
        line = rule_line("width", WIDTH_RULES.resolve(rules.width_rule))
        lines.append(f"{line}; r, s: fan-in, fan-out over the base's")
    if rules.depth_rule is not None:
        lines.append(f"depth {rules.depth_rule}; m: residual additions over the base's")
    texts = {reason_text([one.parts], values=True) for one in multipliers}
    if len(texts) == 1 and texts != {""}:
        lines.append(f"multiplier of all parameters: {texts.pop()}")
    return lines


def rule_line(kind: str, rule: Rule, remark: str = "") -> str:
    """Returns a rule and its equation."""
    said = f"{rule.equation or rule.summary} {rule.citation}".strip()
    if rule.equation and rule.summary:
        said = f"{said}; {rule.summary}"
    return f"{kind} {rule.name}{remark}" + (f": {said}" if said else "")
