"""Whether gradients of the size of this batch's reach the optimizer whole.

SGD shows it at once. Adam divides by the size of the gradient, so that clipping shows in how a
second gradient, ten times the first, compares with it: where both are clipped they are alike.
"""

import statistics
from collections.abc import Mapping

from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._auditing.kinds import Kind
from archscale_jax._auditing.probe import TINY, Answers, Chain, Probes

_PART = 0.1
"""Clipping that leaves less is one that always acts."""


def clipped(
    chain: Chain, probes: Probes, answers: Answers, kinds: Mapping[str, Kind], size: float
) -> list[Finding]:
    """Returns a finding where less than a tenth of the gradient passes.

    Args:
      chain: the optimizer.
      probes: of its params.
      answers: of the chain.
      kinds: of its leaves.
      size: root mean square of the gradient on the batch.
    """
    if not size > 100 * TINY:
        return []
    names = {kind: [name for name in kinds if kinds[name] == kind] for kind in Kind}
    if names[Kind.SGD]:
        part = _part(chain, probes, answers, names[Kind.SGD], size)
        return [_finding(f"{number(part)} passes")] if part < _PART else []
    if names[Kind.ADAM] and _alike(chain, probes, answers, names[Kind.ADAM], size):
        return [_finding("it passes as one that is ten times as small does")]
    return []


def _part(chain: Chain, probes: Probes, answers: Answers, names: list[str], size: float) -> float:
    """What part of a gradient of this size passes, next to one that nothing clips."""
    (move,) = _along(chain, probes, [[size] * answers.first], names)
    return statistics.median(
        move[name] / size / (answers.tiny[name].along / TINY) for name in names
    )


def _alike(chain: Chain, probes: Probes, answers: Answers, names: list[str], size: float) -> bool:
    """Whether no more than a tenth of a gradient of this size passes.

    Behind one of a tenth of its size it then moves as one that equals the one before it, and behind
    one of a hundredth as one that is no more than ten times the one before it.
    """
    below = 1e-5
    if size < 10 * below:
        return False
    pairs = ((below, below), (below / 10, below), (size, size), (size / 10, size),
             (size / 100, size))  # fmt: skip
    sizes = [[one] * answers.first + [two] * answers.period for one, two in pairs]
    moves = _along(chain, probes, sizes, names)
    equal, tenfold, *own = (statistics.median(map(abs, one.values())) for one in moves)
    if abs(tenfold / equal - 1) < 0.05:
        return False
    alike = (own[1] - tenfold) / (equal - tenfold) > 0.9
    return alike and (own[2] / own[0] - tenfold / equal) / (1 - tenfold / equal) > -0.01


def _along(
    chain: Chain, probes: Probes, sizes: list[list[float]], names: list[str]
) -> list[dict[str, float]]:
    """How far probes of these sizes, one after the other, move leaves along the probe.

    At params of size 1, as clipping may be relative to them; what decays is taken off.
    """
    weights = probes.weights()
    still, *moved = (probes.asked(chain, each, weights) for each in ([0.0] * len(sizes[0]), *sizes))
    return [{name: one[name].along - still[name].along for name in names} for one in moved]


def _finding(found: str) -> Finding:
    return Finding(
        "clipping",
        ALL,
        f"of a gradient as large as this batch's {found}",
        "all of it, or most",
        "clipping always acts: every batch counts the same, whatever its gradient, and the step "
        "of SGD is the threshold's instead of the gradient's",
        "raise the threshold above the norm of usual gradients, and look whether the loss is a sum",
    )
