"""The report of an architecture: what every parameter gets from the rules, and why."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jraph
import numpy as np

from archscale_jax._architecture import (
    Architecture,
    Parameter,
    Role,
    check_architecture,
    check_parameters,
)
from archscale_jax._expressions import Moments
from archscale_jax._graph import in_degrees
from archscale_jax._paths import PathStatistics, path_statistics
from archscale_jax._reporting.header import graph_lines, rate_lines, rule_line
from archscale_jax._reporting.notes import NO_BASE, Subject, first_notes, further_notes
from archscale_jax._reporting.reasons import reason_text
from archscale_jax._trees import PyTree
from archscale_jax.rules._forward import Forward
from archscale_jax.rules._initialization import (
    gain_values,
    initialization_rule,
    standard_deviation,
    variances_of,
)
from archscale_jax.rules._learning_rate import LearningRateRule, MissingBaseError
from archscale_jax.rules._optimizer import Hyperparameters
from archscale_jax.rules._rates import RateRules
from archscale_jax.rules._registry import Explained, Part, Rule
from archscale_jax.rules._residual import Optimizer
from archscale_jax.rules._variances import InitializationRule
from archscale_jax.rules._width import WidthRule

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
        standard_deviation, learning_rate_multiplier: None where a rule raises, see the notes; the
          former a tuple where the slices of a stack, or the halves of a gate, differ;
        initialization_parts, learning_rate_parts: what each is the product of, tuples of rule,
          place, symbols, citation and value, see `archscale_jax.rules._registry.Part`;
        initialization_reason, learning_rate_reason: the same as text;
        of a plan, weight_decay_multiplier, weight_decay_reason, epsilon_multiplier and
          epsilon_reason; with base values learning_rate, weight_decay, epsilon, decay_per_update
          (η·λ) and timescale (1/(η·λ) updates, infinite without decay).
        optimizer: of a plan for Muon, `muon over axes …` or `adam: reason`.
      notes: what to know beyond the table, first what makes its numbers wrong unless it is seen to.
      header: graph and rules, line by line.
      paths: statistics of the network's paths, exact.
      first: how many of the notes are printed before the table.
    """

    records: list[dict[str, Any]]
    notes: list[str]
    header: list[str]
    paths: PathStatistics
    first: int = 0

    def __str__(self) -> str:
        """Returns text that fits the terminal, or 120 columns."""
        from archscale_jax._reporting.table import text_of  # slow to import: rich

        return text_of(self.header, self.records, self.notes, self.first)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from archscale_jax._reporting.table import html_of

        return html_of(self.header, self.records, self.notes, self.first)


class BaseValues(NamedTuple):
    """What the user tuned on the base."""

    learning_rate: float
    weight_decay: float
    eps: float


class PlanNumbers(NamedTuple):
    """What a parametrization knows beyond the rules that its parts have as functions.

    Attributes:
      hyperparameters: the multipliers of every parameter.
      starts: by what initial values are multiplied, by name.
      forward: the forward multipliers.
      base_values: to multiply, or None.
    """

    hyperparameters: Hyperparameters
    starts: Mapping[str, Part]
    forward: Forward
    base_values: BaseValues | None = None


def report(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    initialization: str | InitializationRule | None = None,
    initialization_options: Mapping[str, Any] | None = None,
    params: PyTree | None = None,
    rule_options: Mapping[str, Any] | None = None,
    kernel_per_layer: bool = False,
    width_rule: str | WidthRule | None = None,
    depth_rule: Optimizer | None = None,
    depth_exponent: float = 0.5,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
) -> Report:
    """Reports the standard deviation and learning-rate multiplier of every parameter, and why.

        print(report(arch, base))

    Args:
      architecture: the network to train.
      base: the network on which the base rate was tuned, or its graph.
      rule: learning-rate rule, see `learning_rate_multipliers`.
      initialization: initialization rule, see `weight_standard_deviations`.
      initialization_options: options of the initialization rule.
      params: tree of arrays or shapes, to be checked and to have its dtypes looked at.
      rule_options: this and what follows: see `learning_rate_multipliers`.
      kernel_per_layer: see there.
      width_rule: see there.
      depth_rule: see there.
      depth_exponent: see there.
      consistent_rms: see there.
      dimension_numbers: see there.

    Returns:
      The report. Numbers for which a rule raises are missing, and a note says why.

    Raises:
      TypeError: no architecture, or an option that the rule does not have.
      ValueError: an unknown rule, rules that contradict each other, or params that are not those of
        the architecture.
    """
    check_architecture(architecture)
    if params is not None:
        check_parameters(architecture, params)
    rates = RateRules(
        rule, rule_options, kernel_per_layer, width_rule, depth_rule, depth_exponent,
        consistent_rms, dimension_numbers,
    )  # fmt: skip
    return report_of(architecture, base, rates, initialization, initialization_options, params)


def report_of(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None,
    rates: RateRules,
    initialization: str | InitializationRule | None,
    initialization_options: Mapping[str, Any] | None,
    params: PyTree | None,
    *,
    plan: PlanNumbers | None = None,
) -> Report:
    """Does what `report` does; a plan's report excludes what concerns calls of its parts alone."""
    drawing = initialization_rule(architecture, initialization)
    drawn_options = initialization_options or {}
    deviations, undrawn = _deviations(architecture, drawing, drawn_options)
    rating, multipliers, missing = _multipliers(architecture, base, rates)
    if plan is not None:
        multipliers = plan.hyperparameters.rates
        deviations = {
            name: _times(one, plan.starts[name]) if name in plan.starts else one
            for name, one in deviations.items()
        }
    subject = Subject(architecture, base, rates, rating, drawing, drawn_options, params, plan)
    first = first_notes(subject)
    paths, degrees = path_statistics(architecture.graph), in_degrees(architecture.graph)
    records = [
        _record(one, subject, degrees, deviations.get(one.name), multipliers.get(one.name))
        for one in architecture.parameters
    ]
    if plan is not None:
        records = [{**one, **_of_plan(one["path"], plan)} for one in records]
    return Report(
        records,
        notes=[*first, *missing, *undrawn, *further_notes(subject)],
        first=len(first),
        header=[
            *graph_lines(architecture, base, paths),
            rule_line("initialization", drawing, " (default)" if initialization is None else ""),
            *rate_lines(rating, rates, multipliers.values()),
        ],
        paths=paths,
    )


def _times(found: Explained, part: Part) -> Explained:
    return Explained(found.value * part.value, (*found.parts, part))


def _of_plan(name: str, plan: PlanNumbers) -> dict[str, Any]:
    """Decay and epsilon of a parameter, and why; with base values what it gets of them."""
    found, base = plan.hyperparameters, plan.base_values
    decay, epsilon = found.decay[name], found.epsilon[name]
    values: dict[str, Any] = {}
    if base is not None:
        rate = base.learning_rate * found.rates[name].value
        decayed = base.weight_decay * decay.value
        values = {
            "learning_rate": rate,
            "weight_decay": decayed,
            "epsilon": base.eps * epsilon.value,
            "decay_per_update": rate * decayed,
            "timescale": 1 / (rate * decayed) if rate * decayed else math.inf,
        }
    return values | {
        "weight_decay_multiplier": decay.value,
        "weight_decay_reason": reason_text([decay.parts], values=True),
        "epsilon_multiplier": epsilon.value,
        "epsilon_reason": reason_text([epsilon.parts], values=True),
    }


def _deviations(
    architecture: Architecture, rule: Rule, options: Mapping[str, Any]
) -> tuple[dict[str, Explained], list[str]]:
    """Standard deviations by name, and notes on those for which the rule raises."""
    found, notes, variances, starts = {}, [], None, {}
    try:
        variances = variances_of(architecture, rule, options)
        starts = gain_values(architecture, variances.gains)
    except ValueError as error:
        notes.append(f"standard deviations left out: {error}")
    for one in architecture.parameters:
        if one.name in starts:
            start = {"start": float(np.mean(starts[one.name]))}
            found[one.name] = Explained(
                0.0, (Part(0.0, rule.name, f"{one.role} that ends a branch", start),)
            )
        elif not one.is_drawn:
            start = _start(one)
            found[one.name] = Explained(start.value, (start,))
        elif variances is not None:
            try:
                found[one.name] = standard_deviation(one, architecture, variances, rule)
            except ValueError as error:
                notes.append(f"standard deviation left out: {error}")
    return found, notes


def _start(parameter: Parameter) -> Part:
    """What a parameter that is not drawn starts at, and how far its entries are apart."""
    role, given = str(parameter.role), parameter.given
    if isinstance(given, Moments):
        return Part(given.variance**0.5, role, "the values traced")
    traced = parameter.starts_at_zero or given not in (None, parameter.neutral_value)
    start = {"start": parameter.initial_value}
    return Part(0.0, role, "as traced" if traced else "", start)


def _multipliers(
    architecture: Architecture, base: Architecture | jraph.GraphsTuple | None, rates: RateRules
) -> tuple[Rule | None, dict[str, Explained], list[str]]:
    """The rule of the network and the multipliers by name; or none, and a note on why."""
    rule = None
    try:
        rule = rates.of_network(architecture)
        return rule, rates.multipliers(architecture, base), []
    except MissingBaseError:
        return rule, {}, [NO_BASE]
    except ValueError as error:
        return rule, {}, [f"learning-rate multipliers left out: {error}"]


def _record(
    parameter: Parameter,
    subject: Subject,
    degrees: np.ndarray,
    deviation: Explained | None,
    multiplier: Explained | None,
) -> dict[str, Any]:
    graph = subject.architecture.graph
    target, source = (_degrees(parameter, end, degrees) for end in (graph.receivers, graph.senders))
    if target is None and parameter.layer == Role.INPUT:
        target = int(degrees[0])  # of the stem
    drawn, rated = (one.parts if one else () for one in (deviation, multiplier))
    return {
        "path": parameter.name,
        "role": str(parameter.role),
        "layer": str(parameter.layer),
        "shape": parameter.shape,
        "fan_in": parameter.fan_in,
        "fan_out": parameter.fan_out,
        "kernel_size": parameter.kernel_size,
        "in_degree": target,
        "source_in_degree": source if subject.drawing.reads_source else None,
        "standard_deviation": _plain(deviation.value, parameter) if deviation else None,
        "initialization_parts": drawn,
        "initialization_reason": reason_text([drawn]),
        "learning_rate_multiplier": multiplier.value if multiplier else None,
        "learning_rate_parts": rated,
        "learning_rate_reason": reason_text([rated], values=True),
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


def _degrees(parameter: Parameter, ends: np.ndarray, degrees: np.ndarray) -> InDegree:
    """In-degrees of the vertices at one of the ends of a parameter's edges."""
    edges = [edge for edge in (parameter.edge, *parameter.further_edges) if edge is not None]
    found = np.unique(degrees[ends[edges]]).tolist()
    return tuple(found) if len(found) > 1 else next(iter(found), None)
