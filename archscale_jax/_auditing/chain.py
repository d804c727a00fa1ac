"""What an optimizer does to every leaf, against what the plan promises."""

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from archscale_jax._auditing.decay import decays
from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._auditing.kinds import Kind, kind_of, rate_of
from archscale_jax._auditing.probe import LARGE, LIMIT, PLACED, TINY, Answers
from archscale_jax._auditing.promises import Promises
from archscale_jax._auditing.rates import (
    judged_epsilons,
    judged_rates,
    wrong_epsilons,
    wrong_rates,
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
    findings = list(movements(answers))
    if not answers.first:
        return Checked(findings, {}, [])
    kinds = {
        name: kind_of(answers, name, itemsizes[name], promises.kinds[name])
        for name in answers.large
    }
    named = {one.parameter for one in findings}
    findings += _other_kinds(kinds, promises, named)
    relative = list(_relative(answers, kinds, named))
    named |= {one.parameter for one in relative}
    findings += [*relative, *_clipped_together(answers, kinds)]
    rated = {
        name: kind for name, kind in kinds.items()
        if kind == promises.kinds[name] and name not in named
    }  # fmt: skip
    rates, epsilons, of_adam = {}, {}, 0.0
    for kind in (Kind.SGD, Kind.ADAM, Kind.MUON):
        names = [name for name, own in rated.items() if own == kind]
        found = {name: rate_of(answers, name, kind) for name in names}
        judgement, found = judged_rates(
            found, promises, kind, of_adam, min(itemsizes.values(), default=4)
        )
        of_adam = judgement.scale if kind == Kind.ADAM and names else of_adam
        epsilon = judged_epsilons(answers, names, promises) if kind == Kind.ADAM else None
        findings += wrong_rates(judgement, promises, epsilon)
        rates |= {name: value / judgement.scale for name, value in found.items()}
        if epsilon is not None:
            findings += wrong_epsilons(epsilon, promises, judgement)
            epsilons = epsilon.found
    faults, shrinkage = decays(answers, rated, promises, rates)
    findings += faults
    leaves = {
        name: Leaf(kind, rates.get(name), shrinkage.get(name), epsilons.get(name))
        for name, kind in kinds.items()
    }
    unknown = [name for name, kind in kinds.items() if kind == Kind.UNKNOWN]
    notes = [f"the updates of {', '.join(unknown)} are of no known kind"] if unknown else []
    return Checked(findings, leaves, notes)


# Whether, when and which way leaves move.


def movements(answers: Answers) -> Iterator[Finding]:
    """Findings that need no plan: leaves that stay or go uphill, calls that move nothing."""
    if answers.first:
        yield from (*_motionless(answers), *_uphill(answers), *_calls(answers))
        return
    yield Finding(
        "frozen",
        ALL,
        f"{LIMIT} gradients move nothing",
        "an update, at the latest after the batches that are accumulated",
        "nothing is trained",
        "look for a schedule that stays at 0, set_to_zero, or a mask that holds no leaf",
    )


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
        each = f"{answers.period} calls make" if answers.period > 1 else "every call makes"
        yield Finding(
            "schedule",
            ALL,
            f"the params first move at call {answers.first} of update, though {each} an update: "
            "the schedule starts at 0",
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


def _relative(answers: Answers, kinds: Mapping[str, Kind], named: set[str]) -> Iterator[Finding]:
    """Updates whose size follows that of the weights."""
    for name, moved in answers.placed.items():
        large, tiny = answers.large[name], answers.tiny[name]
        whole = kinds[name] in (Kind.ADAM, Kind.MUON)
        if kinds[name] == Kind.SGD:  # what is clipped may be clipped relative to weights
            whole = tiny.along != 0 and _linear(large.along / LARGE, tiny.along / TINY)
        still = answers.still[name]
        linear = still.size == 0 or still.beside < 0.1  # decay that was taken off
        if name in named or not (whole and linear and large.along):
            continue
        ratio, most = moved / large.along, 1.25
        rate = rate_of(answers, name, kinds[name])
        if kinds[name] == Kind.MUON and not _linear(abs(large.first), rate):
            most = 4  # what is clipped unit by unit has another direction at other weights
        if not 1 / most < ratio < most:
            yield Finding(
                "optimizer",
                name,
                f"at weights of size {PLACED:g} it moves {number(ratio)} times as far as at 0",
                "the same: rates of a plan are absolute",
                "the step follows the size of the weight, which the multipliers of the rate are "
                "not for",
                "drop what divides by the norm of updates or multiplies by that of weights, as "
                "scale_by_trust_ratio",
            )


def _linear(one: float, other: float) -> bool:
    return abs(one / other - 1) < 0.05


def _clipped_together(answers: Answers, kinds: Mapping[str, Kind]) -> Iterator[Finding]:
    """Updates that grow when others are 0."""
    own = [name for name in answers.half if kinds[name] in (Kind.ADAM, Kind.MUON)]
    alone, together = (answers._replace(fine={}, small={}, large=one)
                       for one in (answers.half, answers.large))  # fmt: skip
    ratios = [
        rate_of(alone, name, kinds[name]) / rate_of(together, name, kinds[name])
        for name in own
        if answers.large[name].size
    ]
    if ratios and statistics.median(ratios) > 1.1:
        yield Finding(
            "clipping",
            ALL,
            f"where the larger half of the leaves has no gradient the others move "
            f"{number(statistics.median(ratios))} times as far",
            "the same",
            "updates are clipped or normalized together: the step is the threshold's, however the "
            "rate is tuned",
            "put clipping in front of the optimizer, where it sees gradients",
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
