"""Numbers of leaves against those promised, up to one constant that is not known.

What a chain shows of a leaf is η·m, with m its multiplier and η the user's base value, which nobody
tells. So ratios between leaves are compared: η is what makes most of the leaves right, and where an
explanation of all leaves is at hand, such as multipliers that were applied twice, η is that of the
explanation.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from archscale_jax.rules._registry import Explained

Numbers = Mapping[str, float]


class Judgement(NamedTuple):
    """What is wrong.

    Attributes:
      wrong: by name, the multiplier that was found.
      cause: what explains all of it, or None.
      scale: η.
    """

    wrong: dict[str, float]
    cause: str | None
    scale: float


def judged(
    found: Numbers, promised: Numbers, causes: Mapping[str, Numbers], tolerance: float
) -> Judgement:
    """Compares numbers up to a constant.

    Args:
      found: positive numbers by name.
      promised: positive numbers by name.
      causes: what else may have been applied, by what is said of it.
      tolerance: largest deviation, in log.
    """
    if not found:
        return Judgement({}, None, 1.0)
    scale = _common(found, promised, tolerance)
    if scale is not None:
        return Judgement({}, None, scale)
    for cause, applied in sorted(causes.items(), key=lambda item: _spread(found, item[1])):
        scale = _common(found, applied, tolerance)
        if scale is not None:
            wrong = {
                name: applied[name]
                for name in found
                if abs(math.log(applied[name] / promised[name])) > tolerance
            }
            return Judgement(wrong, cause, scale)
    scale = _most_common(
        {name: found[name] / promised[name] for name in found}, promised, tolerance
    )
    wrong = {
        name: value / scale
        for name, value in found.items()
        if abs(math.log(value / promised[name] / scale)) > tolerance
    }
    return Judgement(wrong, None, scale)


def causes_of(multipliers: Mapping[str, Explained]) -> dict[str, dict[str, float]]:
    """Returns what may have been applied instead of multipliers, by what is said of it."""
    values = {name: one.value for name, one in multipliers.items()}
    found = {
        "no multiplier is applied": dict.fromkeys(values, 1.0),
        "multipliers are applied twice": {name: value**2 for name, value in values.items()},
        "multipliers are applied the other way round": {
            name: 1 / value for name, value in values.items()
        },
    }
    rules = {part.rule for one in multipliers.values() for part in one.parts if part.value != 1}
    for rule in sorted(rules):
        parts = {
            name: math.prod(part.value for part in one.parts if part.rule == rule)
            for name, one in multipliers.items()
        }
        found[f"the multipliers of {rule} are left out"] = {
            name: values[name] / parts[name] for name in values
        }
        found[f"the multipliers of {rule} are applied twice"] = {
            name: values[name] * parts[name] for name in values
        }
        found[f"the multipliers of {rule} are applied by their root"] = {
            name: values[name] * parts[name] ** -0.5 for name in values
        }
    return found


def _common(found: Numbers, promised: Numbers, tolerance: float) -> float | None:
    """The constant between them, None where there is none."""
    if _spread(found, promised) > 2 * tolerance:
        return None
    return math.exp(sum(math.log(found[name] / promised[name]) for name in found) / len(found))


def _spread(found: Numbers, promised: Numbers) -> float:
    """Largest over smallest quotient, in log, rounded so that what fits equally well stays."""
    logs = [math.log(found[name] / promised[name]) for name in found]
    return round(max(logs) - min(logs), 2)


def _most_common(ratios: Numbers, promised: Numbers, tolerance: float) -> float:
    """The constant that is right for most leaves; of several, for those with multipliers near 1."""
    names = sorted(ratios, key=lambda name: ratios[name])
    logs = np.log([ratios[name] for name in names])
    weights = np.array([1 - 1e-3 * min(abs(math.log(promised[name])), 100) for name in names])
    ends = np.searchsorted(logs, logs + 2 * tolerance, side="right")
    totals = [weights[start:end].sum() for start, end in enumerate(ends)]
    start = int(np.argmax(totals))
    return float(np.exp(np.median(logs[start : ends[start]])))
