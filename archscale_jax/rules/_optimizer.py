"""The whole optimizer: multipliers of rate, decay and epsilon, batch and duration (theory §12).

With m_N and m_L the ratios of width and depth to the base, in the form without forward multipliers:

| | learning rate η | decay λ (AdamW, update -η(û + λW)) | epsilon ε |
|---|---|---|---|
| all | width, depth and path rules | η·λ = m_L^(α-1) in branches, 1 outside | m_L^(-α) / s |
| ends of branches | | | 1 / s |
| gains and biases | | 0 | |

s is by how much more features the layer writes than the base's: of a hidden layer m_N, of the
readout 1. Epsilon is what the gradient is compared with, and scales as gradients do. [CompleteP]
lowers it by m_L^(-α) outside of branches too, where gradients do not fall with depth.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.core import Tracer

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._errors import unknown
from archscale_jax.rules._forward import Forward
from archscale_jax.rules._registry import Explained, Part
from archscale_jax.rules._residual import Optimizer, block_ratio, places_of
from archscale_jax.rules._width import width_ratios

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": "sgd",
    "adam": "adam",
    "adamw": "adam",
    "lion": "adam",
    "muon": "muon",
}
"""Optimizers by name, and the kind of rules of each."""

UNSUPPORTED = {
    "adafactor": "it multiplies updates by the size of the weight, so that rates are relative",
    "lamb": "it multiplies updates by the size of the weight, so that rates are relative",
    "lars": "it multiplies updates by the size of the weight, so that rates are relative",
    "shampoo": "its exponent and blocks decide the rule, and optax has none",
    "soap": "optax has none",
}
"""Optimizers for which there is no rule here, and why."""

EPSILON_RULES = ("completep", "gradient")


class Duration(NamedTuple):
    """Batch and tokens, over those of the base's training, and what follows (theory §12).

    The SDE rule: with κ = batch ratio / token ratio an Adam run of 1/κ times the steps follows the
    same stochastic differential equation, in the time of the base.

    Attributes:
      batch_ratio: batch size over that of the base.
      token_ratio: examples of the whole training over those of the base.
    """

    batch_ratio: float = 1.0
    token_ratio: float = 1.0

    @property
    def kappa(self) -> float:
        """κ."""
        return self.batch_ratio / self.token_ratio

    def check(self, optimizer: str) -> None:
        """Raises ValueError for ratios that are not positive, or an optimizer without a rule."""
        for name, value in self._asdict().items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, found {value}")
        if self.kappa != 1 and optimizer not in ("adam", "adamw"):
            raise ValueError(
                f"batch_ratio and token_ratio: the rule is one of Adam, none is known for "
                f"{optimizer!r}; leave them out and tune the rate at the batch that is used"
            )

    def part(self, power: float) -> Part:
        """Returns κ to a power."""
        return Part(self.kappa**power, "batch", f"κ^({power:g})", {"κ": self.kappa}, "[SDE]")

    def decay_rate(self, beta: float) -> float:
        """Returns the decay rate of an average, 1 - κ(1 - β).

        Raises:
          ValueError: an average that would be shorter than a step.
        """
        found = 1 - self.kappa * (1 - beta)
        if not isinstance(found, Tracer) and found <= 0:  # as injected into a jitted step
            raise ValueError(
                f"batch_ratio {self.batch_ratio:g} and token_ratio {self.token_ratio:g}: an "
                f"average with decay rate {beta:g} over κ = {self.kappa:g} times shorter a time is "
                "shorter than a step; take a smaller batch, or pass b1 and b2 closer to 1"
            )
        return found

    def line(self) -> str:
        """Returns what a report says of it."""
        return (
            f"batch × {self.batch_ratio:g}, tokens × {self.token_ratio:g}: κ = {self.kappa:g}, "
            "η·√κ, λ·√κ, ε/√κ, (1-β)·κ [SDE]; a rule with evidence while κ is small, as gradients "
            "are noise then"
        )


class Hyperparameters(NamedTuple):
    """The multipliers of every parameter by name, with the parts that they are the product of."""

    rates: dict[str, Explained]
    decay: dict[str, Explained]
    epsilon: dict[str, Explained]


def hyperparameters(
    architecture: Architecture,
    base: Architecture | None,
    kind: Optimizer,
    rates: Mapping[str, Explained],
    forward: Forward,
    duration: Duration,
    *,
    width: bool,
    depth_exponent: float | None,
    epsilon_rule: str = "completep",
) -> Hyperparameters:
    """Returns what the whole optimizer multiplies, parameter by parameter.

    Args:
      architecture: the network to train.
      base: the network on which the base values were tuned.
      kind: `sgd`, `adam` or `muon`.
      rates: multipliers of the learning rate in the form without forward multipliers.
      forward: the forward multipliers.
      duration: batch and tokens.
      width: whether a width rule is in use.
      depth_exponent: α; None where no depth rule is in use.
      epsilon_rule: `completep`, the published one, or `gradient`: as gradients scale, leaf by leaf.

    Raises:
      ValueError: another epsilon rule.
    """
    if epsilon_rule not in EPSILON_RULES:
        raise ValueError(unknown("epsilon_rule", epsilon_rule, EPSILON_RULES))
    depth = _Depth.of(architecture, base, depth_exponent)
    written = _written(architecture, base, forward) if width else {}
    found = Hyperparameters({}, {}, {})
    for one in architecture.parameters:
        place, share = depth.places(one)
        a = forward.leaves.get(one.name, 1.0) * forward.lookups.get(one.name, 1.0)
        taken = forward.rate(one.name, kind)
        parts = [*rates[one.name].parts]
        if taken != 1:
            parts.append(Part(1 / taken, "forward multiplier", "1/a", {"a": a}))
        rate = math.prod(part.value for part in parts)
        kept = 1.0 if place == "outside" or kind == "sgd" else depth.ratio ** (depth.exponent - 1)
        found.decay[one.name] = _decay(one, kept, rate, duration)
        found.rates[one.name] = _explained(parts, duration, 0.5)
        epsilon = []
        if kind != "sgd":
            lower = place == "inside" or (place == "outside" and epsilon_rule == "completep")
            power = depth.exponent * (1 if lower else 1 - share if place == "end" else 0)
            epsilon = [
                Part(1 / written.get(one.name, 1.0), "width", "1/s"),
                Part(depth.ratio**-power, "depth", f"m^({-power:g})"),
                Part(a, "forward multiplier", "a"),
            ]
        found.epsilon[one.name] = _explained([one for one in epsilon if one.value != 1], duration,
                                             -0.5)  # fmt: skip
    return found


def optimizer_lines(kind: Optimizer, epsilon_rule: str) -> list[str]:
    """Returns what a report says of decay and epsilon."""
    if kind == "sgd":
        return ["decay: η·λ as in the base; gains and biases do not decay"]
    outside = "" if epsilon_rule == "completep" else ", 1/s outside of branches"
    return [
        "decay: η·λ as in the base, times m^(α-1) in branches; gains and biases do not decay "
        "[CompleteP]",
        f"epsilon {epsilon_rule}: m^(-α)/s, 1/s at the end of branches{outside} [CompleteP]",
    ]


def _explained(parts: list[Part], duration: Duration, power: float) -> Explained:
    if duration.kappa != 1:
        parts = [*parts, duration.part(power)]
    return Explained(math.prod(part.value for part in parts), tuple(parts))


def _decay(parameter: Parameter, kept: float, rate: float, duration: Duration) -> Explained:
    if not parameter.trained:
        return Explained(0.0, (Part(0.0, "decay", "no decay of what has no gradient"),))
    if parameter.role in (Role.BIAS, Role.SCALE):
        return Explained(0.0, (Part(0.0, "decay", f"no decay of a {parameter.role}"),))
    return _explained([Part(kept / rate, "decay", "η·λ", {"η·λ": kept})], duration, 0.5)


class _Depth(NamedTuple):
    """m_L, α and the places of parameters; m_L = 1 where no depth rule is in use."""

    ratio: float
    exponent: float
    places: Callable[[Parameter], tuple[str, float]]

    @classmethod
    def of(
        cls, architecture: Architecture, base: Architecture | None, exponent: float | None
    ) -> "_Depth":
        if base is None or exponent is None:
            return cls(1.0, 1.0, lambda parameter: ("outside", 1.0))
        return cls(block_ratio(architecture, base), exponent, places_of(architecture).of)


def _written(
    architecture: Architecture, base: Architecture | None, forward: Forward
) -> dict[str, float]:
    """S of every parameter: of several uses the largest, of a folded tied table the readout's 1."""
    if base is None:
        return {}
    folded = {one.name for one in architecture.parameters if one.is_tied} - forward.tables.keys()
    ratios = width_ratios(architecture, base)
    return {name: 1.0 if name in folded else s for name, (_, s) in ratios.items()}
