"""Which parametrization a set-up looks like, where there is no plan to compare it with.

Rates are taken over those of leaves that read no width: stem, tables, biases and gains. μP divides
the rate of what reads a width n by m = n/n_b, under SGD that of a readout by m² over these leaves.
"""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._auditing.findings import number
from archscale_jax._auditing.kinds import Kind, kind_of, rate_of
from archscale_jax._auditing.probe import Answers

_TOLERANCE = 0.1


class Guess(NamedTuple):
    """What a leaf looks like.

    Attributes:
      kind: what its updates are.
      rate: its rate over that of leaves of the same kind that read no width; None without these.
      looks_like: in words.
    """

    kind: Kind
    rate: float | None
    looks_like: str


def guesses(
    architecture: Architecture, answers: Answers, itemsizes: Mapping[str, int]
) -> tuple[dict[str, Guess], str]:
    """Returns what every leaf looks like, by name, and what the set-up as a whole does.

    Args:
      architecture: of the loss.
      answers: of its optimizer.
      itemsizes: bytes of an entry of every leaf.
    """
    parameters = {one.name: one for one in architecture.parameters if one.name in answers.large}
    kinds = {name: kind_of(answers, name, itemsizes[name], Kind.UNKNOWN) for name in parameters}
    rates = {name: rate_of(answers, name, kind) for name, kind in kinds.items()}
    found = {}
    for name, one in parameters.items():
        unit = [
            rates[other]
            for other in parameters
            if kinds[other] == kinds[name] and not _reads(parameters[other])
        ]
        known = bool(unit) and rates[name] > 0
        rate = rates[name] / statistics.median(unit) if known else None
        found[name] = Guess(kinds[name], rate, _words(one, kinds[name], rate))
    return found, _whole(found, parameters)


def _reads(parameter: Parameter) -> bool:
    """Whether a leaf sums over a width."""
    return parameter.role in (Role.HIDDEN, Role.READOUT)


def _words(parameter: Parameter, kind: Kind, rate: float | None) -> str:
    if kind == Kind.MUON:
        return "Muon: one spectral norm at any width"
    if rate is None:
        return f"updates {kind}, no other leaf to compare the rate with"
    one = abs(math.log(rate)) < _TOLERANCE
    if not _reads(parameter):
        return "one rate" if one else f"a rate of its own, × {number(rate)}"
    if one:
        return f"standard, or its own base: the rate of what reads no width, {parameter.fan_in} in"
    return f"μP: × {number(rate)} for its {parameter.fan_in} inputs"


def _whole(found: Mapping[str, Guess], parameters: Mapping[str, Parameter]) -> str:
    """One sentence for the whole set-up."""
    ratios, fans = [], []
    for name, one in found.items():
        if _reads(parameters[name]) and one.rate is not None and one.kind != Kind.MUON:
            squared = one.kind == Kind.SGD and parameters[name].role == Role.READOUT
            ratios.append(one.rate ** (0.5 if squared else 1.0))
            fans.append(parameters[name].fan_in)
    if not ratios:
        return "no weight that reads a width has a rate that can be compared"
    if all(abs(math.log(ratio)) < _TOLERANCE for ratio in ratios):
        return "looks like the standard parametrization: one rate for all parameters"
    if _same(ratios):
        return f"looks like μP by rates, relative to a base {number(1 / ratios[0])} times narrower"
    if _same([ratio * fan for ratio, fan in zip(ratios, fans, strict=True)]):
        return "looks like rates in proportion to 1/fan-in"
    low, high = min(ratios), max(ratios)
    return (
        f"weights that read a width have rates × {number(low)} to × {number(high)}, of no one base"
    )


def _same(values: list[float]) -> bool:
    return math.log(max(values) / min(values)) < 2 * _TOLERANCE
