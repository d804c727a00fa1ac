"""Initialization: the standard deviation of every leaf from its place in the graph (theory §3, §9).

A rule says C of every edge (modules `_in_degree` and `_second_moment`); what that means for a
leaf, which may be the weight of several layers or of a stack, is said here.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from archscale_jax._architecture import (
    Architecture,
    Parameter,
    ParameterUse,
    Role,
    check_architecture,
    derived,
)
from archscale_jax._graph import in_degrees
from archscale_jax._moments import leaf_distribution, leaf_kernel, vertex_moments
from archscale_jax.rules._registry import Explained, Part, Rule
from archscale_jax.rules._variances import (
    INITIALIZATION_RULES,
    Deviation,
    InitializationRule,
    WeightVariances,
    embedding_deviation,
    stem_numerator,
)


def weight_standard_deviations(
    architecture: Architecture,
    rule: str | InitializationRule | None = None,
    *,
    rule_options: Mapping[str, Any] | None = None,
) -> dict[str, Deviation]:
    """Returns the standard deviation of every input, hidden and readout weight by name.

    Rows of an embedding table are chosen one at a time, so that its entries have standard deviation
    1; those of a table that is the readout too are scaled to rows of norm 1, which fits both, and
    so are those of positions that are added to it.

    Args:
      architecture: the graph with its parameters.
      rule: name of a rule, or a function `(architecture) -> WeightVariances`. None takes the rule
        that measurably preserves the flow: `target_in_degree` where vertices sum pre-activations,
        `source_in_degree` where they sum activations (docs/results/initialization.md).
      rule_options: options of the rule, e.g. `{"branch_share": 0.5}` of `second_moment`.

    Returns:
      A number for every leaf that is drawn; for one that holds the layers of a stack, as scanned
      layers are, or both halves of a gate, an array with the leaf's number of axes if they differ.

    Raises:
      TypeError: no architecture, or an option that the rule does not have.
      ValueError: an unknown rule, a rule that gives a variance that is not finite or negative, or a
        layer that reads what has no finite second moment.
    """
    return drawn_and_set(architecture, rule, rule_options)[0]


def drawn_and_set(
    architecture: Architecture,
    rule: str | InitializationRule | None = None,
    rule_options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Deviation], dict[str, Deviation]]:
    """Returns standard deviations, and the values of leaves that a rule sets without drawing them.

    The latter are the gains of normalizations that end a residual branch, under `second_moment`:
    they, and not the layer before them, decide what the branch adds.
    """
    found = initialization_rule(architecture, rule)
    variances = variances_of(architecture, found, rule_options or {})
    deviations = {
        parameter.name: standard_deviation(parameter, architecture, variances, found).value
        for parameter in architecture.parameters
        if parameter.is_drawn
    }
    return deviations, gain_values(architecture, variances.gains)


def variances_of(
    architecture: Architecture, rule: Rule[WeightVariances], options: Mapping[str, Any]
) -> WeightVariances:
    """Returns what a rule says of an architecture.

    The last answer is kept: a plan, its every draw and its report ask for the same.
    """
    if not all(isinstance(value, int | float | str) for value in options.values()):
        return rule(architecture, **options)
    known, question = _last_variances(architecture), (rule, *sorted(options.items()))
    if question not in known:
        answer = rule(architecture, **options)
        known.clear()
        known[question] = answer
    return known[question]


@derived
def _last_variances(architecture: Architecture) -> dict[tuple[Any, ...], WeightVariances]:
    """What `variances_of` found last, by rule and options."""
    del architecture
    return {}


def initialization_rule(
    architecture: Architecture, rule: str | InitializationRule | None
) -> Rule[WeightVariances]:
    """Returns a rule; of None the one that fits what the vertices sum."""
    check_architecture(architecture)
    if rule is not None:
        return INITIALIZATION_RULES.resolve(rule)
    rules = map(INITIALIZATION_RULES.resolve, INITIALIZATION_RULES)
    return next(one for one in rules if one.arrangement == architecture.arrangement)


def gain_values(architecture: Architecture, gains: Mapping[int, float]) -> dict[str, Deviation]:
    """The values of gains by name, from those behind the layers of edges."""
    found: dict[str, Deviation] = {}
    for parameter in architecture.parameters:
        neutral = parameter.neutral_value
        chosen = parameter.given not in (None, neutral)  # as a gain that the model starts at 0
        if parameter.role != Role.SCALE or not parameter.start_known or chosen:
            continue
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
    parameter: Parameter, architecture: Architecture, variances: WeightVariances, rule: Rule
) -> Explained:
    """Returns the standard deviation of a parameter that is drawn, and what decides it."""
    if parameter.role == Role.EMBEDDING:
        part = embedding_deviation(parameter, architecture, variances.table_rows)
        return Explained(part.value, (part,))
    uses = [use for use in parameter.uses if use.kind == "weight"] or [
        ParameterUse("weight", edge=edge, layer=parameter.layer, fan_in=parameter.fan_in)
        for edge in dict.fromkeys((parameter.edge, *parameter.further_edges))
    ]
    linear: list[tuple[ParameterUse, float]] = []
    others: list[tuple[ParameterUse, float]] = []
    parts: list[Part] = []
    for use in uses:
        layer = use.layer if parameter.uses else parameter.role
        part = _kernel_deviation(parameter, architecture, use, layer, variances, rule)
        kernel = leaf_kernel(use.expression, parameter.name, leaf_distribution(architecture))
        if not kernel.linear:
            part = part.at("as if its kernel were linear in it")
        if kernel.factor not in (0.0, 1.0):
            symbols = {**part.symbols, "constant in front": kernel.factor}
            part = part._replace(value=part.value / kernel.factor, symbols=symbols)
        if not math.isfinite(part.value):
            raise ValueError(
                f"initialization rule {rule.name!r} gives {parameter.name!r} the standard "
                f"deviation {part.value}"
            )
        for one, factor in _slices_of_use(use, variances):
            (linear if kernel.linear else others).append((one, part.value * math.sqrt(factor)))
            sliced = {**part.symbols, "times": factor}
            parts.append(part if factor == 1 else part._replace(symbols=sliced))
    # What a square of a weight brings, as the norm of its columns, follows from its other uses.
    found = linear or others
    value: Any = _by_slice(parameter, _steps_of_loops(architecture, found, variances.free))
    first = parts[0]
    if not all(_alike(one, first) for one in parts):
        first = first.at("the smallest of its uses" if isinstance(value, float) else "first slice")
    return Explained(value, (first,))


def _alike(one: Part, other: Part) -> bool:
    numbers = [list(part.symbols.values()) for part in (one, other)]
    return one.kind == other.kind and np.allclose(*numbers, rtol=1e-4)


def _kernel_deviation(
    parameter: Parameter,
    architecture: Architecture,
    use: ParameterUse,
    layer: Role,
    variances: WeightVariances,
    rule: Rule,
) -> Part:
    fan = use.fan_in if variances.fan == "fan_in" and parameter.uses else getattr(
        parameter, variances.fan
    )  # fmt: skip
    if layer == Role.READOUT and any(one.layer != Role.READOUT for one in parameter.uses):
        return Part(fan**-0.5, "another layer's weight and readout", "rows of norm 1", {"n": fan})
    if layer == Role.READOUT:
        gain = variances.readout_gain
        symbols = {"C": gain**2, "n": fan}
        return Part(gain / fan, "readout", "N(0, C/n²)", symbols, "[AAS Eq. 2]")
    stem = use.edge is None
    numerator = (
        stem_numerator(architecture, parameter.name) if stem else float(variances.edges[use.edge])
    )
    if numerator < 0:
        raise ValueError(f"{parameter.name!r} would get the variance {numerator} / {fan}")
    name, citation = ("stem", "[AAS Eq. 4]") if stem else (rule.name, rule.citation)
    return Part(math.sqrt(numerator / fan), name, "", {"C": numerator, "n": fan}, citation)


def _steps_of_loops(
    architecture: Architecture,
    values: list[tuple[ParameterUse, float]],
    free: Collection[int],
) -> list[tuple[ParameterUse, float]]:
    """One use of a line that is run again and again, as by a loop over time.

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


def second_moments(
    architecture: Architecture,
    rule: str | InitializationRule | None = None,
    *,
    rule_options: Mapping[str, Any] | None = None,
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
      rule_options: options of the rule.

    Raises:
      TypeError, ValueError: see `weight_standard_deviations`; a vertex without a finite moment.
    """
    deviations, starts = drawn_and_set(architecture, rule, rule_options)
    parameters = tuple(
        dataclasses.replace(one, given=float(np.mean(starts[one.name])))
        if one.name in starts
        else one
        for one in architecture.parameters
    )
    architecture = dataclasses.replace(architecture, parameters=parameters)
    found = vertex_moments(architecture, deviations)
    unknown = [vertex for vertex in sorted(found) if not math.isfinite(found[vertex].second)]
    if unknown:
        raise ValueError(
            f"vertex {unknown[0]} has no finite second moment for normal features, as the "
            "logarithm or root of what may be negative has none; measure vertex_features instead"
        )
    return {vertex: found[vertex].second for vertex in sorted(found)}
