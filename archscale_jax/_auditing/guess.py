"""Which parametrization a set-up looks like, where there is no plan to compare it with.

Rates are taken over those of leaves that read no width: stem and tables, or else biases and gains.
μP divides the rate of what reads a width n by m = n/n_b, under SGD that of a readout by m² over
these leaves; CompleteP, and readouts that are multiplied in the model, leave a readout the rate of
a table. Rules of depth give the last layers of branches another rate.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._auditing.findings import number
from archscale_jax._auditing.kinds import Kind, kind_of, rate_of
from archscale_jax._auditing.probe import Answers
from archscale_jax._reporting.names import merged_names
from archscale_jax.rules._matrix import Matrix, matrix_of

_TOLERANCE = 0.1


class Guess(NamedTuple):
    """What a leaf looks like.

    Attributes:
      kind: what its updates are.
      rate: its rate over that of leaves of the same kind that read no width, under Muon over that
        of most leaves; None without these.
      drawn: root mean square of its entries times √fan-in, of what reads a width; else None.
      looks_like: in words.
    """

    kind: Kind
    rate: float | None
    drawn: float | None
    looks_like: str


def guesses(
    architecture: Architecture,
    answers: Answers,
    itemsizes: Mapping[str, int],
    deviations: Mapping[str, float],
) -> tuple[dict[str, Guess], list[str]]:
    """Returns what every leaf looks like, by name, and sentences on the set-up as a whole.

    Args:
      architecture: of the loss.
      answers: of its optimizer.
      itemsizes: bytes of an entry of every leaf.
      deviations: root mean square of every leaf.
    """
    parameters = {one.name: one for one in architecture.parameters if one.name in answers.large}
    kinds = {name: kind_of(answers, name, itemsizes[name], Kind.UNKNOWN) for name in parameters}
    found = {}
    for name, one in parameters.items():
        same = [other for other in parameters if kinds[other] == kinds[name]]
        rates = {other: rate_of(answers, other, kinds[name]) for other in same}
        if kinds[name] == Kind.MUON:
            rates = _by_shape(rates, parameters)
        unit = _unit(rates, parameters, kinds[name])
        rate = rates[name] / unit if unit and rates[name] > 0 else None
        drawn = deviations[name] * math.sqrt(one.fan_in) if _reads(one) else None
        found[name] = Guess(kinds[name], rate, drawn, _words(one, kinds[name], rate))
    return found, list(_whole(found, parameters))


def _by_shape(rates: Mapping[str, float], parameters: Mapping[str, Parameter]) -> dict[str, float]:
    """Returns spectral norms over what they owe to the shape.

    By which law they do, nobody tells: it is the one that leaves most of them alike.
    """
    sizes = {name: matrix_of(parameters[name]) for name in rates}
    shapes = {
        name: one.sizes(parameters[name].shape)
        for name, one in sizes.items()
        if isinstance(one, Matrix)
    }
    laws = (lambda i, o: math.sqrt(max(1.0, o / i)), lambda i, o: math.sqrt(max(i, o)),
            lambda i, o: 1.0)  # fmt: skip
    found = [
        {name: rate / (law(*shapes[name]) if name in shapes else 1) for name, rate in rates.items()}
        for law in laws
    ]

    def alike(values: Mapping[str, float]) -> int:
        usual = _most_common(values.values())
        return sum(one > 0 and _close(one, usual) for one in values.values())

    return max(found, key=alike)


def _unit(rates: Mapping[str, float], parameters: Mapping[str, Parameter], kind: Kind) -> float:
    """The rate over which others are taken; 0 without leaves that have it."""
    if kind == Kind.MUON:
        return _most_common(rates.values())
    rest = {name: rate for name, rate in rates.items() if not _reads(parameters[name])}
    first = [
        rate for name, rate in rest.items()
        if parameters[name].role in (Role.INPUT, Role.EMBEDDING)
    ]  # fmt: skip
    return _most_common(first or rest.values())


def _most_common(values: Iterable[float]) -> float:
    """The value most others are close to, of several the largest; 0 of none."""
    values = [one for one in values if one > 0]
    count = lambda one: sum(_close(one, two) for two in values)  # noqa: E731
    return max(values, key=lambda one: (count(one), one), default=0.0)


def _close(one: float, other: float) -> bool:
    return abs(math.log(one / other)) < _TOLERANCE


def _reads(parameter: Parameter) -> bool:
    """Whether a leaf sums over a width."""
    return parameter.role in (Role.HIDDEN, Role.READOUT)


def _words(parameter: Parameter, kind: Kind, rate: float | None) -> str:
    if kind == Kind.MUON:
        own = "" if rate is None or _close(rate, 1) else f", × {number(rate)} of most"
        return f"Muon: one spectral norm at any width{own}"
    if rate is None:
        return f"updates {kind}, no other leaf to compare the rate with"
    one = _close(rate, 1)
    if not _reads(parameter):
        return "one rate" if one else f"a rate of its own, × {number(rate)}"
    if one and parameter.role == Role.READOUT:
        return "the rate of what reads no width: standard, or multiplied in the model"
    if one:
        return f"standard, or its own base: the rate of what reads no width, {parameter.fan_in} in"
    return f"μP: × {number(rate)} for its {parameter.fan_in} inputs"


def _whole(found: Mapping[str, Guess], parameters: Mapping[str, Parameter]) -> Iterator[str]:
    """What the set-up as a whole looks like, and what one network does not tell."""
    rated = {name: one for name, one in found.items() if one.rate is not None}
    muon = {name: one.rate or 1.0 for name, one in rated.items() if one.kind == Kind.MUON}
    hidden, readout = (
        {
            name: one.rate or 1.0 for name, one in rated.items()
            if parameters[name].role == role and one.kind != Kind.MUON
        }
        for role in (Role.HIDDEN, Role.READOUT)
    )  # fmt: skip
    if muon:
        yield (
            f"looks like Muon for {len(muon)} matrices: at any width one spectral norm, up to the "
            f"shape{_others(muon, 1.0)}"
        )
    if hidden:
        yield from _hidden(hidden, readout, rated, parameters)
    elif readout:
        yield from _readout(readout, parameters)
    elif not muon:
        yield "no weight that reads a width has a rate that can be compared"
    yield from _drawn(rated, parameters)


def _hidden(
    hidden: Mapping[str, float],
    readout: Mapping[str, float],
    rated: Mapping[str, Guess],
    parameters: Mapping[str, Parameter],
) -> Iterator[str]:
    usual, fans = _most_common(hidden.values()), {name: parameters[name].fan_in for name in hidden}
    products = [rate * fans[name] for name, rate in hidden.items()]
    alike = len(set(fans.values())) == 1
    squared = any(rated[name].kind == Kind.SGD for name in readout)
    last = _most_common(readout.values())
    if _close(usual, 1):
        end = ""
        if readout and not _close(last, 1):
            end = f", but × {number(last)} for the readout"
        yield f"looks like the standard parametrization: one rate for all parameters{end}" + (
            _others(hidden, 1.0)
        )
        yield (
            "one network does not tell this from μP at its own base: there every multiplier is 1. "
            "Audit a second width: under μP its hidden weights have another rate"
        )
        return
    if not alike and _same(products) and not _same(list(hidden.values())):
        yield f"looks like rates in proportion to 1/fan-in, × {number(usual)} for most"
        return
    base = f"a base {number(1 / usual)} times narrower"
    if not readout or _close(last, usual**2 if squared else usual):
        yield f"looks like μP by rates, relative to {base}{_others(hidden, usual)}"
    elif _close(last, 1):
        yield (
            f"looks like μP with a readout that is multiplied in the model, as MuReadout and "
            f"CompleteP have it, relative to {base}{_others(hidden, usual)}"
        )
        yield (
            "rates do not show whether the model multiplies its readout: without that the readout "
            "is standard"
        )
    else:
        yield (
            f"hidden weights look like μP relative to {base}{_others(hidden, usual)}, the readout, "
            f"× {number(last)}, like none"
        )
    counts = [sum(_close(one, two) for two in hidden.values()) for one in hidden.values()]
    if len(set(counts)) == 1 and counts[0] < len(hidden):
        yield (
            "hidden weights have several rates, none of them usual: one network does not tell "
            "multipliers of width from those of depth"
        )
    if alike:
        yield (
            f"all hidden weights have {next(iter(fans.values()))} inputs: one network does not "
            "tell μP from rates in proportion to 1/fan-in"
        )


def _readout(readout: Mapping[str, float], parameters: Mapping[str, Parameter]) -> Iterator[str]:
    last = _most_common(readout.values())
    if _close(last, 1):
        yield "the readout has the rate of a table: standard, or multiplied in the model"
    else:
        yield f"the readout looks like μP relative to a base {number(1 / last)} times narrower"


def _others(rates: Mapping[str, float], usual: float) -> str:
    """What is said of weights of other rates than most."""
    groups: dict[str, list[str]] = {}
    for name, rate in rates.items():
        if not _close(rate, usual):
            groups.setdefault(number(rate / usual), []).append(name)
    said = [
        f"× {ratio} of that for {', '.join(merged_names(own))}" for ratio, own in groups.items()
    ]
    return f"; {'; '.join(said)}, as rules of depth may have it" if said else ""


def _drawn(rated: Mapping[str, Guess], parameters: Mapping[str, Parameter]) -> Iterator[str]:
    """How the readout is drawn beside hidden weights."""
    sizes = {role: [one.drawn for name, one in rated.items() if parameters[name].role == role]
             for role in (Role.HIDDEN, Role.READOUT)}  # fmt: skip
    hidden, readout = ([one for one in each if one is not None] for each in sizes.values())
    if not (hidden and readout) or not statistics.median(hidden):
        return
    ratio = statistics.median(readout) / statistics.median(hidden)
    how = "as μP and small draws have it" if ratio < 0.7 else "as the standard draw has it"
    if not ratio:
        how = "which fits every parametrization"
    yield f"by √fan-in the readout is drawn × {number(ratio)} of what hidden weights are, {how}"


def _same(values: list[float]) -> bool:
    return math.log(max(values) / min(values)) < 2 * _TOLERANCE
