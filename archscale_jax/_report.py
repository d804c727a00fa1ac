"""The report of an architecture: what every parameter gets from the rules, and why."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jraph
import numpy as np

from archscale_jax._architecture import (
    Architecture,
    Parameter,
    Role,
    check_architecture,
    check_parameters,
)
from archscale_jax._graph import in_degrees
from archscale_jax._optax import chosen_rule, explained_factors
from archscale_jax._paths import PathStatistics, path_statistics
from archscale_jax._reporting.header import graph_lines, rate_lines, rule_line
from archscale_jax._reporting.notes import (
    NO_BASE,
    first_notes,
    graph_notes,
    params_notes,
    rate_notes,
)
from archscale_jax._trees import PyTree
from archscale_jax.rules._initialization import DEFAULT_RULES, standard_deviation
from archscale_jax.rules._learning_rate import (
    LEARNING_RATE_RULES,
    LearningRateRule,
    MissingBaseError,
)
from archscale_jax.rules._registry import Explained
from archscale_jax.rules._residual import check_optimizer
from archscale_jax.rules._variances import INITIALIZATION_RULES, InitializationRule
from archscale_jax.rules._width import WIDTH_RULES

InDegree = int | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `report` says. Printed, it is a table that joins repeated layers; notebooks show HTML.

    Attributes:
      records: one dictionary per parameter, in the order of the architecture; a data frame reads
        it, `pandas.DataFrame(report.records)`. Keys:
        path, role, layer, shape, fan_in, fan_out, kernel_size: see `Parameter`;
        in_degree: live in-degree of the vertex that its layer leads to, a tuple where its layers
          have several, None for a parameter of the readout or of no layer;
        source_in_degree: that of the vertex that its layer reads, where the equation of the
          initialization rule is one of d_in(u), None elsewhere;
        standard_deviation, learning_rate_factor: None where a rule raises, see the notes; the
          former a tuple where the slices of a stack, or the halves of a gate, differ;
        initialization_reason, learning_rate_reason: rule, numbers and equation of the two.
      notes: what to know beyond the table.
      header: graph and rules, line by line.
      paths: statistics of the network's paths, exact.
    """

    records: list[dict[str, Any]]
    notes: list[str]
    header: list[str]
    paths: PathStatistics

    def __str__(self) -> str:
        """Returns text that fits the terminal, or 120 columns."""
        from archscale_jax._reporting.table import text_of  # slow to import: rich

        return text_of(self.header, self.records, self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from archscale_jax._reporting.table import html_of

        return html_of(self.header, self.records, self.notes)


def report(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    initialization: str | InitializationRule | None = None,
    initialization_options: Mapping[str, Any] | None = None,
    params: PyTree | None = None,
    **options: Any,
) -> Report:
    """Reports the standard deviation and the learning-rate factor of every parameter, and why.

        print(report(arch, base))

    Args:
      architecture: the network to train.
      base: the network on which the base rate was tuned, or its graph.
      rule: learning-rate rule, see `learning_rate_factors`.
      initialization: initialization rule, see `weight_standard_deviations`.
      initialization_options: passed to the initialization rule.
      params: tree of arrays or shapes, to be checked and to have its dtypes looked at.
      **options: see `learning_rate_factors`.

    Returns:
      The report. What a rule refuses is left out, and its reason is a note.

    Raises:
      TypeError: no architecture, or an option that the rule does not have.
      ValueError: an unknown rule, or params that are not those of the architecture.
    """
    check_architecture(architecture)
    if params is not None:
        check_parameters(architecture, params)
    rule = chosen_rule(rule, options.get("depth_rule"), options.get("width_rule"))
    if options.get("depth_rule") is not None:
        check_optimizer(options["depth_rule"])
    drawn = DEFAULT_RULES[architecture.arrangement] if initialization is None else initialization
    drawn_options = {**getattr(drawn, "keywords", {}), **(initialization_options or {})}
    drawing, rating = INITIALIZATION_RULES.describe(drawn), LEARNING_RATE_RULES.describe(rule)
    if options.get("width_rule") is not None:
        WIDTH_RULES.resolve(options["width_rule"])
    deviations, undrawn = _deviations(architecture, drawn, drawn_options)
    factors, missing = _factors(architecture, base, rule, options)
    degrees = _degrees(architecture, sources="d_in(u)" in drawing.summary)
    paths = path_statistics(architecture.graph)
    return Report(
        [
            _record(
                parameter,
                degrees[parameter.name],
                deviations.get(parameter.name, _REFUSED),
                factors.get(parameter.name, _REFUSED),
            )
            for parameter in architecture.parameters
        ],
        notes=[
            *first_notes(architecture, base, rating.name, params, options),
            *missing,
            *undrawn,
            *rate_notes(architecture, base, rating.name, drawing.name, drawn_options, options),
            *graph_notes(architecture, drawing.name),
            *(params_notes(params) if params is not None else ()),
        ],
        header=[
            *graph_lines(architecture, base, paths),
            rule_line("initialization", drawing, " (default)" if initialization is None else ""),
            *rate_lines(rating, factors, options),
        ],
        paths=paths,
    )


def _deviations(
    architecture: Architecture, rule: str | InitializationRule, options: dict[str, Any]
) -> tuple[dict[str, Explained], list[str]]:
    """Standard deviations by name, and notes on those that the rule refuses."""
    deviations = {
        parameter.name: Explained(0.0, _value_reason(parameter))
        for parameter in architecture.parameters
        if not parameter.is_drawn
    }
    function, description = INITIALIZATION_RULES.resolve(rule), INITIALIZATION_RULES.describe(rule)
    try:
        variances = function(architecture, **options)
    except ValueError as error:
        return deviations, [f"standard deviations left out: {error}"]
    notes = []
    for parameter in architecture.parameters:
        if parameter.is_drawn:
            try:
                found = standard_deviation(parameter, architecture, variances, description)
            except ValueError as error:
                notes.append(f"standard deviation left out: {error}")
            else:
                deviations[parameter.name] = found
    return deviations, notes


def _value_reason(parameter: Parameter) -> str:
    """What a parameter that is not drawn starts at."""
    if parameter.given is None or parameter.given == parameter.neutral_value:
        return {Role.BIAS: "bias: 0", Role.SCALE: "scale: 1"}.get(parameter.role, "0 as traced")
    if isinstance(parameter.given, float):
        return f"{parameter.role}: {parameter.given:.4g} as traced"
    return f"{parameter.role}: the values traced"


_REFUSED = Explained(math.nan, "")


def _factors(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None,
    rule: str | LearningRateRule,
    options: Mapping[str, Any],
) -> tuple[dict[str, Explained], list[str]]:
    """Learning-rate factors by name; or none, and a note on why."""
    try:
        return explained_factors(architecture, base, rule, **options), []
    except MissingBaseError:
        return {}, [NO_BASE]
    except ValueError as error:
        return {}, [f"learning-rate factors left out: {error}"]


def _record(
    parameter: Parameter,
    degrees: tuple[InDegree, InDegree],
    deviation: Explained,
    factor: Explained,
) -> dict[str, Any]:
    return {
        "path": parameter.name,
        "role": str(parameter.role),
        "layer": str(parameter.layer),
        "shape": parameter.shape,
        "fan_in": parameter.fan_in,
        "fan_out": parameter.fan_out,
        "kernel_size": parameter.kernel_size,
        "in_degree": degrees[0],
        "source_in_degree": degrees[1],
        "standard_deviation": None if deviation is _REFUSED else _plain(deviation.value, parameter),
        "initialization_reason": deviation.reason,
        "learning_rate_factor": None if factor is _REFUSED else factor.value,
        "learning_rate_reason": factor.reason,
    }


def _plain(value: Any, parameter: Parameter) -> float | tuple[float, ...]:
    """A number, or the numbers of the slices of a stack or of the halves of a gate."""
    if np.ndim(value) == 0:
        return value
    stacked = {axis for use in parameter.uses for axis, _ in use.slices}
    for axis in set(range(np.ndim(value))) - stacked:  # a half is many entries that are alike
        entries = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        starts = [0, *(np.diff(entries, axis=0).any(1).nonzero()[0] + 1)]
        value = np.take(value, starts, axis)
    return tuple(np.ravel(value).tolist())


def _degrees(architecture: Architecture, *, sources: bool) -> dict[str, tuple[InDegree, InDegree]]:
    """In-degrees of the targets of every parameter's edges, and of their sources if asked."""
    graph = architecture.graph
    degrees = in_degrees(graph)
    found = {}
    for parameter in architecture.parameters:
        edges = [edge for edge in (parameter.edge, *parameter.further_edges) if edge is not None]
        stem = not edges and parameter.layer == Role.INPUT
        targets = [0] if stem else graph.receivers[edges]
        found[parameter.name] = (
            _distinct(degrees[targets]),
            _distinct(degrees[graph.senders[edges if sources else []]]),
        )
    return found


def _distinct(degrees: np.ndarray) -> InDegree:
    found = np.unique(degrees).tolist()
    return tuple(found) if len(found) > 1 else next(iter(found), None)
