"""The notes of a report: where a network goes beyond what the rules say. One sentence each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph

from archscale_jax._architecture import Architecture, Role
from archscale_jax._graph import Operator, live_edges, network_kernel_size
from archscale_jax._paths import path_statistics
from archscale_jax._reporting.names import merged_names
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.rules._rates import RateRules
from archscale_jax.rules._registry import Rule
from archscale_jax.rules._residual import block_ratio, residual_branches, stream_factor
from archscale_jax.rules._width import features, width_ratios

NO_BASE = (
    "no base: pass the network on which the rate was tuned as base, or use predict_learning_rate "
    "with measure_update, which needs no graph"
)


class Subject(NamedTuple):
    """What a report is of; the rule is that of the whole network, None where none was chosen."""

    architecture: Architecture
    base: Architecture | jraph.GraphsTuple | None
    rates: RateRules
    rule: Rule | None
    drawing: Rule
    drawing_options: Mapping[str, Any]
    params: PyTree | None
    plan: Any = None


def first_notes(subject: Subject) -> list[str]:
    """Returns what makes the numbers of a report wrong unless it is seen to."""
    return [*_first_notes(subject), *subject.architecture.notes]


def further_notes(subject: Subject) -> list[str]:
    """Returns what else there is to know."""
    return [
        *_rate_notes(subject),
        *_graph_notes(subject),
        *(_params_notes(subject.params) if subject.params is not None else ()),
    ]


def _forward_notes(subject: Subject) -> Iterator[str]:
    if subject.plan is None:
        return
    forward = subject.plan.forward
    for name, a in forward.tables.items():
        yield (
            f"train through plan.apply: it multiplies the logits of {name}, embedding table and "
            f"readout in one, by {a:.4g}, and the multipliers below are wrong for the model "
            "without it; form='folded' needs no plan.apply, and does not transfer over width [μP]"
        )
    if forward.attention != 1:
        yield (
            f"train through plan.apply: it multiplies products of queries and keys by "
            f"{forward.attention:.4g}"
        )
    if forward.leaves:
        yield (
            f"train through plan.apply: it multiplies {len(forward.leaves)} leaves (ends of "
            f"branches, readouts) by their forward multipliers: {_listed(forward.leaves)}"
        )


def _first_notes(subject: Subject) -> Iterator[str]:
    yield from _forward_notes(subject)
    architecture, params = subject.architecture, subject.params
    leaves = {} if params is None else named_leaves(params)
    unknown = [
        one.name
        for one in architecture.parameters
        if not one.start_known
        and not isinstance(one.given, float)
        and (
            isinstance(leaves[one.name], jax.ShapeDtypeStruct)
            if one.name in leaves
            else not subject.plan  # whose model draws them itself
        )
    ]
    if unknown:
        yield (
            "the value before training is not plain from what these leaves do (slopes, "
            "temperatures, decays, gates): initialize keeps that of arrays, and of shapes alone "
            f"makes biases 0 and scales 1: {_listed(unknown, limit=40)}"
        )
    zero = [one.name for one in architecture.parameters if one.starts_at_zero]
    if zero:
        way = "" if subject.plan else "; trace shapes, as of jax.eval_shape, to draw them"
        yield (
            f"these weights are 0 in the model, and are left at 0 before training{way}: "
            f"{_listed(zero, limit=40)}"
        )
    kept = [one.name for one in architecture.parameters if not one.trained]
    if kept:
        yield (
            "no gradient of the result comes to these leaves, which stand behind stop_gradient or "
            "do nothing to it: they do not decay, and keep what arrays hold; of leaves that only "
            f"training reads, as tokens of masked inputs, declare the roles: {_listed(kept, 40)}"
        )
    if isinstance(subject.base, Architecture):
        yield from _comparison_notes(subject, subject.base)
    if subject.rates.width_rule is not None and not subject.plan:
        yield (
            "width_rule supposes weights drawn by initialize(...), readouts of size 1/n; on "
            "weights as frameworks draw them, 1/√n, these multipliers are not μP [μP]"
        )


def _comparison_notes(subject: Subject, base: Architecture) -> Iterator[str]:
    """Bases that were swapped, and depths that no rule answers for."""
    architecture, rule = subject.architecture, subject.rule
    ratios = [max(pair) for pair in _ratios(architecture, base).values()]
    counts = [len(residual_branches(one)) for one in (architecture, base)]
    depths = [path_statistics(one.graph).max_depth for one in (architecture, base)]
    narrower = bool(ratios) and min(ratios) < 1 and max(ratios) <= 1
    shallower = depths[0] < depths[1] and (not ratios or max(ratios) <= 1)
    if narrower or shallower:
        what = "wider" if narrower else "deeper"
        yield (
            f"the base is {what} than the network: base is the small network on which the rate was "
            "tuned, and may have been swapped with the network"
        )
    if subject.rates.depth_rule is not None and block_ratio(architecture, base) != 1:
        factor = stream_factor(architecture)
        if not 0.5 <= factor <= 2:
            yield (
                f"the residual additions multiply the stream by {factor:.2g} in all, as (x + h)/√2 "
                "does, and no rule answers for the depth of such a stack: the multipliers below "
                "are for x + h, and updates change the features more the deeper it is; keep the "
                "depth of the base, search the rate again, or multiply branches alone in the model"
            )
    unscaled = rule is not None and not rule.scales and subject.rates.depth_rule is None
    if unscaled and depths[0] != depths[1] and not subject.plan:
        way = (
            "depth_rule='sgd', 'adam' or 'muon' does"
            if all(counts)
            else "rule='path_sum_activations' or another learning-rate rule does"
        )
        yield (
            f"depths differ ({depths[0]} layers, {depths[1]} in the base), and no multiplier "
            f"answers for it: {way}"
        )


def _graph_notes(subject: Subject) -> Iterator[str]:
    """What there is to know of a network under an initialization rule."""
    architecture, parameters = subject.architecture, subject.architecture.parameters
    live = live_edges(architecture.graph)
    edges = {one.name: (one.edge, *one.further_edges) for one in parameters if one.edge is not None}
    dead = [name for name, places in edges.items() if not live[list(places)].any()]
    if dead:
        yield (
            f"dead layers, on no path from input to output, do not train ({len(dead)} leaves): "
            f"{_listed(dead)}"
        )
    additions = len(residual_branches(architecture))
    if additions and subject.drawing.blind_to_skips:
        yield (
            f"residual additions ({additions}) grow the second moment, as initialization rule "
            f"{subject.drawing.name} cannot scale a skip: rule second_moment bounds it"
        )
    hidden = [one for one in parameters if one.role == Role.HIDDEN]
    linear = [one for one in hidden if not one.activated]
    if linear:
        yield (
            f"{len(linear)} of {len(hidden)} hidden weights read features without an activation "
            "before, and get half the variance of those behind ReLU, which takes half of the "
            "second moment: nothing is to be done"
        )
    shared = [one.name for one in parameters if one.role in _WEIGHTS and one.further_edges]
    if shared:
        yield (
            "weights of several layers have one multiplier for all of them, and one standard "
            "deviation, the smallest that one of them wants, or one for every slice of a stack: "
            f"{_listed(shared)}"
        )
    multiplied = subject.plan.forward.tables if subject.plan else {}
    for name in [one.name for one in parameters if one.is_tied and one.name not in multiplied]:
        yield (
            f"{name} is embedding table and readout in one: its standard deviation and multiplier "
            "follow the readout. Over width that is not μP, which multiplies the logits and keeps "
            "the table: best rates fall as the width grows. Untie the two to transfer a rate [μP]"
        )


_WEIGHTS = (Role.INPUT, Role.HIDDEN, Role.READOUT, Role.EMBEDDING)


def _rate_notes(subject: Subject) -> Iterator[str]:
    """What there is to know of the learning rates."""
    architecture, base, rates, rule = subject[:4]
    additions = len(residual_branches(architecture))
    if additions > 1 and rule is not None and rule.sums_paths:
        yield (
            f"every residual addition ({additions}) doubles the paths over which rule {rule.name} "
            "sums, so that rates become far too small: take rule='none', with depth_rule='sgd', "
            "'adam' or 'muon' and initialization='second_moment'"
        )
    sizes = _kernel_sizes(architecture)
    if len(sizes) > 1 and rates.rule != "none" and not rates.kernel_per_layer:
        yield (
            f"kernel sizes {' and '.join(map(str, sizes))} are mixed: rules take the largest, "
            f"{network_kernel_size(architecture.graph):g}, for the whole network, unless "
            "kernel_per_layer=True"
        )
    ratios = _ratios(architecture, base)
    stem = [
        one.name
        for one in architecture.parameters
        if one.role == Role.INPUT and not any(use.made for use in one.uses)
    ]
    frozen = [name for name in stem if name in ratios and ratios[name][0] != 1]
    if frozen and rates.width_rule is not None:
        yield (
            "layers that read the inputs read other numbers of features in the base, as if inputs "
            "grew with the width; frozen layers before them belong in params, with "
            f"optax.multi_transform, not among the inputs: {_listed(frozen)}"
        )
    wider = any(pair != (1, 1) for pair in ratios.values())
    if isinstance(base, Architecture) and not ratios:
        wider = _hidden_features(architecture) != _hidden_features(base)
    if wider and rates.width_rule is None:
        yield (
            "the width differs from the base's, which no multiplier here accounts for: "
            "width_rule='sgd', 'adam' or 'muon' does [μP]"
        )
    if isinstance(base, Architecture) and _head_sizes(architecture) - _head_sizes(base):
        multiplied = subject.plan is not None and subject.plan.forward.attention != 1
        way = "parametrize(…, attention_scale='1/d') does that through plan.apply"
        if not multiplied:
            yield (
                f"heads have {_text_of(_head_sizes(architecture))} features, in the base "
                f"{_text_of(_head_sizes(base))}: μP multiplies queries and keys by 1/d_head "
                f"instead of 1/√d_head; {way} [μP]"
            )
    drawn = subject.drawing.option("depth_exponent", subject.drawing_options)
    if rates.depth_rule is not None and drawn != rates.depth_exponent:
        yield (
            "depth_rule belongs to weights drawn with initialization='second_moment' and "
            f"initialization_options={{'depth_exponent': {rates.depth_exponent}}}"
        )


def _params_notes(params: PyTree) -> Iterator[str]:
    """What there is to know of the dtypes of params."""
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(params).items()}
    inexact = [dtype for dtype in dtypes.values() if jnp.issubdtype(dtype, jnp.inexact)]
    names = sorted({str(dtype) for dtype in inexact})
    if len(names) > 1:
        yield (
            f"parameters of dtype {' and '.join(names)}: multipliers are computed in float64 and "
            "applied in float32 at least"
        )
    others = [name for name, dtype in dtypes.items() if not jnp.issubdtype(dtype, jnp.inexact)]
    if others:
        found = ", ".join(sorted({str(dtypes[name]) for name in others}))
        yield (
            f"leaves of dtype {found} have no gradient and are better kept out of params: "
            f"{_listed(others)}"
        )


def _kernel_sizes(architecture: Architecture) -> list[int]:
    """Sizes of the convolutions, the stem's among them."""
    edges = architecture.graph.edges
    inner = edges["kernel_size"][edges["operator"] == Operator.CONV].tolist()
    stems = [one for one in architecture.parameters if one.role == Role.INPUT and one.edge is None]
    return sorted({*inner, *(one.kernel_size for one in stems if one.kernel_size > 1)})


def _ratios(
    architecture: Architecture, base: Architecture | jraph.GraphsTuple | None
) -> dict[str, tuple[float, float]]:
    """Ratios of widths by parameter, where parameters can be compared one by one."""
    try:
        return width_ratios(architecture, base) if isinstance(base, Architecture) else {}
    except ValueError:
        return {}


def _hidden_features(architecture: Architecture) -> set[tuple[int, int]]:
    return {features(one) for one in architecture.parameters if one.role == Role.HIDDEN}


def _head_sizes(architecture: Architecture) -> set[int]:
    return {one.size for one in architecture.attention.values()}


def _text_of(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(numbers))) or "no"


def _listed(names: Iterable[str], limit: int = 6) -> str:
    merged = merged_names(list(names))
    return ", ".join(merged[:limit]) + (", …" if len(merged) > limit else "")
