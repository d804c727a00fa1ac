"""Which optimizer a leaf has, from its responses."""

import enum

from archscale_jax._auditing.probe import KAPPA, SMALL, Answers, Response


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


def kind_of(answers: Answers, name: str, itemsize: int) -> Kind:
    """Returns the kind of a leaf's updates.

    Args:
      answers: of the chain.
      name: of the leaf.
      itemsize: bytes of an entry.
    """
    large, small = answers.large[name], answers.small[name]
    if large.size == 0 and small.size == 0:
        return Kind.NONE
    exact = _EXACT.get(itemsize, 2e-3)
    if small.rest < exact and _grows(answers.small[name], answers.tiny[name]):
        return Kind.SGD
    if large.spread < 0.1 + exact:
        return Kind.ADAM
    if _orthogonal(large):
        return Kind.MUON
    if small.rest < exact:
        return Kind.NORMALIZED
    if large.size < 30 * small.size and large.explained < 0.98:
        return Kind.OTHER_AXES
    return Kind.UNKNOWN


def _grows(small: Response, tiny: Response) -> bool:
    """Whether a gradient of 10⁻⁴ moves a leaf 10⁸ times as far as one of 10⁻¹²."""
    return tiny.size > 0 and abs(small.size / tiny.size / 1e8 - 1) < 0.05


def _orthogonal(one: Response) -> bool:
    """Whether D₁ and D₂ are there in parts that Newton-Schulz leaves, and little else."""
    return one.explained > 0.95 and one.lowest > 2 * KAPPA and one.highest < 2


def rate_of(answers: Answers, name: str, kind: Kind) -> float:
    """Returns the size of the update over that of û of the kind: the rate, up to a constant.

    Of Muon it is the part of D₁ in one matrix, which is the spectral norm of the update.
    """
    if kind == Kind.SGD:
        return abs(answers.small[name].along) / SMALL
    if kind == Kind.MUON:
        return abs(answers.large[name].first)
    if kind == Kind.NORMALIZED:
        return answers.large[name].size
    return answers.large[name].even
