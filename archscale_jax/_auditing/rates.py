"""Learning rates of leaves, and epsilon, against the multipliers that a plan promises."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from archscale_jax._auditing.findings import Finding, number
from archscale_jax._auditing.judge import Judgement, judged
from archscale_jax._auditing.kinds import Kind
from archscale_jax._auditing.probe import TINY, Answers
from archscale_jax._auditing.promises import Promises

BEHIND = "take plan.optimizer(…), or put plan.scale() behind the optimizer, once"

_TOLERANCE = 0.05
_ROUNDED = 0.15
"""What Newton-Schulz leaves in half precision."""


def judged_rates(
    found: Mapping[str, float], promises: Promises, kind: Kind, of_adam: float, itemsize: int
) -> tuple[Judgement, Mapping[str, float]]:
    """What is wrong, and the multipliers that were found, up to η, which is that of Adam or 0."""
    tolerance = _ROUNDED if kind == Kind.MUON and itemsize < 4 else _TOLERANCE
    promised = {name: promises.rates[name] for name in found}
    causes = {
        cause: {name: values[name] for name in found} for cause, values in promises.causes.items()
    }
    if kind == Kind.MUON:
        default, turned, largest = (
            {name: shape(*promises.sizes[name]) for name in found}
            for shape in (_default, lambda i, o: _default(o, i), lambda i, o: math.sqrt(max(i, o)))
        )
        consistent = {
            name: found[name] / largest[name] / promises.consistent[name] for name in found
        }
        judgement = judged(consistent, promised, {}, tolerance)
        # The default scaling without multipliers can look like it; its spectral norm tells.
        plain = {name: found[name] / default[name] for name in found}
        bare = of_adam and all(0.6 < one / of_adam < 1.3 for one in plain.values())
        bare = bare and not judged(plain, dict.fromkeys(plain, 1.0), {}, tolerance).wrong
        if not judgement.wrong and not bare:
            return judgement, consistent
        causes |= {
            "the scale is that of the transposed matrix": {
                name: promised[name] * turned[name] / default[name] for name in found
            },
            "consistent_rms scales by √max(inputs, outputs), which the multipliers are not for": {
                name: promised[name] * largest[name] / default[name] for name in found
            },
            "updates are not scaled by the shape": {
                name: promised[name] / default[name] for name in found
            },
        }
        found = plain
    return judged(found, promised, causes, tolerance), found


def _default(inputs: int, outputs: int) -> float:
    return math.sqrt(max(1.0, outputs / inputs))


def wrong_rates(
    judgement: Judgement, promises: Promises, epsilon: "Epsilons | None"
) -> Iterator[Finding]:
    in_front = judgement.cause == "no multiplier is applied" and epsilon and epsilon.in_front
    cause = "the multipliers stand in front of Adam" if in_front else judgement.cause
    for name, value in judgement.wrong.items():
        promised = promises.rates[name]
        why = f", as if {cause}" if cause else ", other leaves being right"
        remedy = BEHIND
        if in_front:
            remedy = "put the multipliers behind Adam, which divides by the size of the gradient: "
            remedy += BEHIND
        elif cause and "transposed" in cause:
            remedy = "give optax the axes: archscale_jax.muon_dimension_numbers"
        yield Finding(
            "rate",
            name,
            f"learning rate × {number(value)}{why}",
            f"× {number(promised)}",
            f"it moves {number(value / promised)} times as far as on the base, relative to the "
            "other leaves: the rate that was tuned there is not this network's",
            remedy,
        )


# Epsilon.


class Epsilons(NamedTuple):
    """Multipliers of epsilon.

    Attributes:
      found: by name, up to the base's value.
      wrong: those that deviate.
      in_front: whether they are what multipliers of the rate in front of Adam make.
    """

    found: dict[str, float]
    wrong: dict[str, float]
    in_front: bool


def judged_epsilons(answers: Answers, names: list[str], promises: Promises) -> Epsilons:
    values = {}
    for name in names:
        tiny, large = answers.tiny[name], answers.large[name]
        if 0 < tiny.even < 0.2 * large.even:
            values[name] = -TINY * large.even / tiny.along if tiny.along else math.inf
    values = {name: value for name, value in values.items() if 0 < value < math.inf}
    promised = {name: promises.epsilon[name] for name in values}
    causes = {
        "none": dict.fromkeys(values, 1.0),
        "in front": {name: 1 / promises.rates[name] for name in values},
        "in front, both": {name: promised[name] / promises.rates[name] for name in values},
    }
    found = judged(values, promised, causes, 0.3)
    wrong = {} if found.cause else found.wrong
    front = found.cause in ("in front", "in front, both")
    return Epsilons({name: one / found.scale for name, one in values.items()}, wrong, front)


def wrong_epsilons(
    epsilons: Epsilons, promises: Promises, judgement: Judgement
) -> Iterator[Finding]:
    for name, value in epsilons.wrong.items():
        if name in judgement.wrong:
            continue  # what is in front of Adam is that leaf's fault already
        yield Finding(
            "epsilon",
            name,
            f"epsilon × {number(value)}, other leaves being right",
            f"× {number(promises.epsilon[name])}",
            "its updates fade at gradients of another size than those of the base",
            "take plan.optimizer, which divides the gradient by the multiplier in front of Adam",
        )
