"""The decay of leaves, against the products η·λ that a plan promises."""

import math
from collections.abc import Mapping

from archscale_jax._auditing.findings import Finding, number
from archscale_jax._auditing.judge import judged
from archscale_jax._auditing.kinds import Kind
from archscale_jax._auditing.probe import Answers
from archscale_jax._auditing.promises import Promises


def decays(
    answers: Answers, kinds: Mapping[str, Kind], promises: Promises, rates: Mapping[str, float]
) -> tuple[list[Finding], dict[str, float]]:
    """Findings, and what η·λ was found."""
    found = {name: answers.still[name] for name in kinds if answers.still[name].size > 0}
    plain = {name: one.shrinkage for name, one in found.items() if one.beside <= 0.1}
    # What passes through the optimizer is as large as its updates; what is less is rounding.
    through = [
        name
        for name, one in found.items()
        if name not in plain and one.size > 0.01 * answers.large[name].size
    ]
    findings = [_coupled(name) for name in through]
    if not plain:
        return findings, {}
    largest = max(map(abs, plain.values()))
    for name, value in plain.items():
        if promises.decay[name] == 0 and abs(value) > 1e-3 * largest:
            findings.append(_decaying(name))
    weights = {name: one for name, one in promises.decay.items() if one > 0 and name in kinds}
    for name in weights:
        if name not in (*plain, *through):
            findings.append(_undecayed(name))
        elif plain.get(name, 0) < 0:
            findings.append(_growing(name))
    found = {name: value for name, value in plain.items() if name in weights and value > 0}
    shrinkage: dict[str, float] = {}
    for group in ({Kind.MUON}, {Kind.SGD, Kind.ADAM}):
        own = {name: value for name, value in found.items() if kinds[name] in group}
        judgement = judged(own, weights, _decay_causes(own, promises), 0.05)
        shrinkage |= {name: value / judgement.scale for name, value in own.items()}
        for name, value in judgement.wrong.items():
            # A rate that is wrong makes the decay wrong with it: that is said of the rate.
            excess = rates.get(name, promises.rates[name]) / promises.rates[name]
            if abs(math.log(value / weights[name] / excess)) > 0.1 or abs(math.log(excess)) < 0.05:
                findings.append(_wrong_decay(name, value, weights[name], judgement.cause))
    return findings, shrinkage


def _decay_causes(names: Mapping[str, float], promises: Promises) -> dict[str, dict[str, float]]:
    rates = {name: promises.rates[name] for name in names}
    decay = {name: promises.decay[name] / rates[name] for name in names}
    return {
        "weight_decay is multiplied by the multiplier of the rate, and by none of its own": rates,
        "the multiplier of the decay is applied twice": {
            name: rates[name] * decay[name] ** 2 for name in names
        },
        "the multiplier of the decay is applied, and none of the rate": decay,
        "the multiplier of the rate is applied twice": {
            name: rates[name] ** 2 * decay[name] for name in names
        },
        "no multiplier is applied": dict.fromkeys(names, 1.0),
    }


def _wrong_decay(name: str, found: float, promised: float, cause: str | None) -> Finding:
    why = f", as if {cause}" if cause else ", other leaves being right"
    return Finding(
        "decay",
        name,
        f"a step takes off {number(found)}·η·λ of the weight{why}",
        f"{number(promised)}·η·λ, as in the base",
        f"the weight decays {number(found / promised)} times as fast as on the base, relative to "
        "the other leaves",
        "pass weight_decay to plan.optimizer, which multiplies it by plan.weight_decay; "
        "plan.scale() behind optax.adamw scales the decay with the rate",
    )


def _coupled(name: str) -> Finding:
    return Finding(
        "decay",
        name,
        "without a gradient the update is not proportional to the weight: the decay passes through "
        "the optimizer",
        "decay that is added behind the optimizer",
        "the optimizer divides it by its own size, so that small weights decay as fast as large",
        "put optax.add_decayed_weights behind scale_by_adam, or give plan.optimizer weight_decay=",
    )


def _decaying(name: str) -> Finding:
    return Finding(
        "decay",
        name,
        "it decays",
        "no decay of gains and biases",
        "a gain is drawn to 0 and scales its layer down, a bias forgets its offset",
        "mask the decay, as optax.adamw(…, mask=…) does, or pass weight_decay to plan.optimizer",
    )


def _growing(name: str) -> Finding:
    return Finding(
        "decay",
        name,
        "without a gradient it grows",
        "decay",
        "the weight grows with every step until it overflows",
        "put optax.add_decayed_weights in front of scale_by_learning_rate, which has the sign",
    )


def _undecayed(name: str) -> Finding:
    return Finding(
        "decay",
        name,
        "it does not decay, where other leaves do",
        "decay with η·λ as in the base",
        "its norm grows where that of the base's stays",
        "look for names that the mask of the decay misses, or pass weight_decay to plan.optimizer",
    )
