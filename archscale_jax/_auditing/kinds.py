"""Which optimizer a leaf has, from its responses."""

import enum

from archscale_jax._auditing.probe import KAPPA, SMALL, TINY, Answers, Response


class Kind(enum.StrEnum):
    """What an optimizer makes of the gradient of a leaf."""

    SGD = "proportional to the gradient, as SGD's"
    ADAM = "entries of one size, as Adam's"
    MUON = "orthogonalized, as Muon's"
    OTHER_AXES = "orthogonalized over other axes"
    NORMALIZED = "the gradient over its norm"
    NONE = "no update"
    UNKNOWN = "of no known kind"


_EXACT = {2: 0.02, 4: 2e-3, 8: 2e-3}
"""By bytes of an entry, what rounding may leave."""


def kind_of(answers: Answers, name: str, itemsize: int, promised: Kind) -> Kind:
    """Returns the kind of a leaf's updates.

    Args:
      answers: of the chain.
      name: of the leaf.
      itemsize: bytes of an entry.
      promised: which kind is meant. Adam with a huge epsilon and SGD whose entries are clipped are
        the same but for that.
    """
    large, small = answers.large[name], answers.small[name]
    if large.size == 0 and small.size == 0:
        return Kind.NONE
    exact = _EXACT.get(itemsize, 2e-3)
    linear = small.rest < exact and _grows(small, answers.tiny[name])
    if large.spread < 0.1 + exact and not linear:
        return Kind.ADAM
    # Newton-Schulz raises what rounding has left, by a factor of 500.
    least = 0.95 if itemsize > 2 else 0.4
    if orthogonal := orthogonal_of(answers, name, least):
        return Kind.MUON if orthogonal.uneven < 1.5 else Kind.OTHER_AXES
    if linear:
        bounded = large.rest > exact and promised == Kind.ADAM
        return Kind.ADAM if bounded else Kind.SGD
    if small.rest < exact:
        return Kind.NORMALIZED
    if large.size < 30 * small.size and large.explained < 0.98 and itemsize > 2:
        return Kind.OTHER_AXES
    return Kind.UNKNOWN


def orthogonal_of(answers: Answers, name: str, explained: float = 0.4) -> Response | None:
    """Returns the orthogonalized response to the smallest gradient, which clipping turns least."""
    responses = [one[name] for one in (answers.fine, answers.small, answers.large) if name in one]
    return next((one for one in responses if _orthogonal(one, explained)), None)


def _grows(small: Response, tiny: Response) -> bool:
    """Whether the update grows as the gradient does."""
    return tiny.size > 0 and abs(small.size / tiny.size * (TINY / SMALL) - 1) < 0.05


def _orthogonal(one: Response, explained: float) -> bool:
    """Whether D₁ and D₂ are there in parts that Newton-Schulz leaves, and little else."""
    return one.explained > explained and one.lowest > 2 * KAPPA and one.highest < 2


def rate_of(answers: Answers, name: str, kind: Kind) -> float:
    """Returns the size of the update over that of û of the kind: the rate, up to a constant.

    Of Muon it is the part of D₁ in one matrix, which is the spectral norm of the update.
    """
    if kind == Kind.SGD:
        return abs(answers.small[name].along) / SMALL
    if kind == Kind.MUON:
        return abs((orthogonal_of(answers, name) or answers.large[name]).first)
    if kind == Kind.NORMALIZED:
        return answers.large[name].size
    return answers.large[name].even
