"""What an optimizer does to every leaf, against what the plan promises."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._auditing.judge import Judgement, causes_of, judged
from archscale_jax._auditing.kinds import Kind, kind_of, rate_of
from archscale_jax._auditing.probe import LIMIT, TINY, Answers
from archscale_jax._parametrize import Parametrization
from archscale_jax.rules._matrix import Matrix, matrix_of
from archscale_jax.rules._optimizer import OPTIMIZERS

BEHIND = "take plan.optimizer(…), or put plan.scale() behind the optimizer, once"


class Promises(NamedTuple):
    """What a plan promises of its optimizer, by name of leaf.

    Attributes:
      kinds: what the optimizer makes of gradients.
      rates: multipliers of the learning rate.
      decay: η·λ over the base's.
      epsilon: multipliers of epsilon.
      sizes: of Muon's leaves, inputs and outputs of a matrix.
      causes: what else may be applied instead of the rates.
      consistent: by what the rates of Muon's leaves are multiplied under `consistent_rms`.
    """

    kinds: dict[str, Kind]
    rates: dict[str, float]
    decay: dict[str, float]
    epsilon: dict[str, float]
    sizes: dict[str, tuple[int, int]]
    causes: dict[str, dict[str, float]]
    consistent: dict[str, float]

    @classmethod
    def of(cls, plan: Parametrization) -> "Promises":
        """Reads a plan."""
        found = plan._hyperparameters
        rates = {name: one.value for name, one in found.rates.items()}
        kinds, sizes = {}, {}
        optimizer = OPTIMIZERS[plan.optimizer_name]
        for one in plan.architecture.parameters:
            kinds[one.name] = Kind.SGD if optimizer == "sgd" else Kind.ADAM
            matrix = matrix_of(one) if optimizer == "muon" else ""
            if isinstance(matrix, Matrix):
                kinds[one.name] = Kind.MUON
                sizes[one.name] = matrix.sizes(one.shape)
        return cls(
            kinds,
            rates,
            {name: rates[name] * one.value for name, one in found.decay.items()},
            {name: one.value for name, one in found.epsilon.items()},
            sizes,
            causes_of(found.rates),
            plan._rms_multipliers() if optimizer == "muon" else {},
        )


class Leaf(NamedTuple):
    """What was measured of a leaf, for the records.

    Attributes:
      kind: what its updates are.
      rate: multiplier of the rate that was found; None where none can be told.
      decay: η·λ over the base's.
      epsilon: multiplier of epsilon.
    """

    kind: Kind
    rate: float | None = None
    decay: float | None = None
    epsilon: float | None = None


class Checked(NamedTuple):
    """What is found of a chain.

    Attributes:
      findings: what is wrong.
      leaves: what was measured, by name.
      notes: what was not judged, and why.
    """

    findings: list[Finding]
    leaves: dict[str, Leaf]
    notes: list[str]


def checked(answers: Answers, promises: Promises, itemsizes: Mapping[str, int]) -> Checked:
    """Compares the answers of a chain with what a plan promises.

    Args:
      answers: of the chain.
      promises: of the plan.
      itemsizes: bytes of an entry of every leaf.
    """
    if not answers.first:
        never = Finding(
            "frozen",
            ALL,
            f"{LIMIT} gradients move nothing",
            "an update, at the latest after the batches that are accumulated",
            "nothing is trained",
            "look for a schedule that stays at 0, set_to_zero, or a mask that holds no leaf",
        )
        return Checked([never], {}, [])
    kinds = {
        name: kind_of(answers, name, itemsizes[name], promises.kinds[name])
        for name in answers.large
    }
    findings = [*_motionless(answers), *_uphill(answers), *_calls(answers)]
    named = {one.parameter for one in findings}
    findings += _other_kinds(kinds, promises, named)
    rated = {
        name: kind for name, kind in kinds.items()
        if kind == promises.kinds[name] and name not in named
    }  # fmt: skip
    rates, epsilons, of_adam = {}, {}, 0.0
    for kind in (Kind.SGD, Kind.ADAM, Kind.MUON):
        names = [name for name, own in rated.items() if own == kind]
        found = {name: rate_of(answers, name, kind) for name in names}
        judgement, found = _judged_rates(
            found, promises, kind, of_adam, min(itemsizes.values(), default=4)
        )
        of_adam = judgement.scale if kind == Kind.ADAM and names else of_adam
        epsilon = _judged_epsilons(answers, names, promises) if kind == Kind.ADAM else None
        findings += _wrong_rates(judgement, promises, epsilon)
        rates |= {name: value / judgement.scale for name, value in found.items()}
        if epsilon is not None:
            findings += _wrong_epsilons(epsilon, promises, judgement)
            epsilons = epsilon.found
    decays, shrinkage = _decays(answers, rated, promises, rates)
    findings += decays
    leaves = {
        name: Leaf(kind, rates.get(name), shrinkage.get(name), epsilons.get(name))
        for name, kind in kinds.items()
    }
    unknown = [name for name, kind in kinds.items() if kind == Kind.UNKNOWN]
    notes = [f"the updates of {', '.join(unknown)} are of no known kind"] if unknown else []
    return Checked(findings, leaves, notes)


# Whether, when and which way leaves move.


def _motionless(answers: Answers) -> Iterator[Finding]:
    for name in sorted(answers.frozen):
        yield Finding(
            "frozen",
            name,
            "a gradient gives no update, twice, where other leaves move",
            "an update",
            "the leaf keeps its initial value",
            "look for a mask or label that takes the leaf for another, a multiplier of 0, or "
            "set_to_zero; accept=('frozen',) says that it is meant so",
        )


def _uphill(answers: Answers) -> Iterator[Finding]:
    for name, one in answers.large.items():
        if one.along > 0:
            yield Finding(
                "direction",
                name,
                "the update goes along the gradient",
                "against it",
                "the loss is climbed",
                "optax.masked passes the gradients of leaves that its mask leaves out on as they "
                "are: let optax.partition, or set_to_zero behind, take them; a chain of scale_by_… "
                "ends with optax.scale_by_learning_rate, which has the sign",
            )


def _calls(answers: Answers) -> Iterator[Finding]:
    if answers.first > answers.period:
        yield Finding(
            "schedule",
            ALL,
            f"{answers.first - answers.period} of the first {answers.first} calls of update "
            "move nothing though no batch is accumulated there: the schedule starts at 0",
            "an update from the first batch on",
            "these batches are lost, and an audit or a coordinate check of one step sees nothing",
            "start the warm-up above 0, as init_value=peak_value/warmup_steps",
        )
    if answers.period > 1 and answers.counters[0] >= answers.first > answers.counters[1]:
        yield Finding(
            "accumulation",
            ALL,
            f"after one update of {answers.first} batches the counter of a schedule stands at "
            f"{answers.counters[0]}, another one at {answers.counters[1]}",
            "schedules that count updates",
            f"a schedule runs {answers.period} times as fast as updates do",
            "put schedules inside of optax.MultiSteps, and let them count updates",
        )
    for name in sorted(answers.between):
        yield Finding(
            "accumulation",
            name,
            f"it decays in every call, though {answers.period} of them make an update",
            "decay once an update",
            f"decay is {answers.period} times as strong as weight_decay says",
            "put the decay inside of optax.MultiSteps",
        )
    ratios = {
        name: one.even / answers.large[name].even
        for name, one in answers.alone.items()
        if answers.large[name].spread < 0.05 and answers.large[name].even > 0
    }
    if ratios and max(ratios.values()) < 0.95:
        yield Finding(
            "accumulation",
            ALL,
            f"a gradient in one of {answers.period} batches moves entries "
            f"{number(max(ratios.values()))} times as far as one in all of them",
            "the same, as Adam divides the mean gradient by its size",
            "updates are accumulated instead of gradients: the step is as many times as large, and "
            "moments are those of single batches",
            "accumulate gradients with optax.MultiSteps, not updates with optax.apply_every",
        )


# Which optimizer a leaf has.

_CONSEQUENCES = {
    Kind.SGD: "its rate does not divide by the size of the gradient, which changes with width and "
    "depth",
    Kind.ADAM: "its entries move alike, so that its spectral norm grows with its size",
    Kind.MUON: "its update has one spectral norm whatever its shape, where entries should move "
    "alike",
    Kind.NORMALIZED: "its update does not grow with the gradient",
    Kind.OTHER_AXES: "what is made orthogonal is not the matrix that maps features to features",
}


def _other_kinds(
    kinds: Mapping[str, Kind], promises: Promises, named: set[str]
) -> Iterator[Finding]:
    for name, kind in kinds.items():
        promised = promises.kinds[name]
        if kind in (promised, Kind.NONE, Kind.UNKNOWN) or name in named:
            continue
        remedy = (
            "parametrize with optimizer= the one that is used, or use the plan's; multipliers of "
            "plan.scale() belong behind this kind of optimizer alone"
        )
        if Kind.MUON in (kind, promised) or kind == Kind.OTHER_AXES:
            remedy = (
                "give optax.contrib.muon muon_weight_dimension_numbers="
                "archscale_jax.muon_dimension_numbers(plan.architecture, params), or take "
                "plan.optimizer"
            )
        yield Finding(
            "axes" if kind == Kind.OTHER_AXES else "optimizer",
            name,
            f"updates {kind}",
            f"updates {promised}",
            _CONSEQUENCES[kind],
            remedy,
        )


# Rates.

_TOLERANCE = 0.05
_ROUNDED = 0.15
"""What Newton-Schulz leaves in half precision."""


def _judged_rates(
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
        plain = of_adam and all(0.6 < found[name] / default[name] / of_adam < 1.3 for name in found)
        if not judgement.wrong and not plain:
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
        found = {name: value / default[name] for name, value in found.items()}
    return judged(found, promised, causes, tolerance), found


def _default(inputs: int, outputs: int) -> float:
    return math.sqrt(max(1.0, outputs / inputs))


def _wrong_rates(
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


def _judged_epsilons(answers: Answers, names: list[str], promises: Promises) -> Epsilons:
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


def _wrong_epsilons(
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


# Decay.


def _decays(
    answers: Answers, kinds: Mapping[str, Kind], promises: Promises, rates: Mapping[str, float]
) -> tuple[list[Finding], dict[str, float]]:
    """Findings, and what η·λ was found."""
    found = {name: answers.still[name] for name in kinds if answers.still[name].size > 0}
    plain = {name: one.shrinkage for name, one in found.items() if one.rest <= 0.1}
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
        if name not in (*plain, *through) and any(weights.get(one) for one in plain):
            findings.append(_undecayed(name))
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


def _undecayed(name: str) -> Finding:
    return Finding(
        "decay",
        name,
        "it does not decay, where other weights do",
        "decay with η·λ as in the base",
        "its norm grows where that of the base's stays",
        "look for names that the mask of the decay misses, or pass weight_decay to plan.optimizer",
    )
