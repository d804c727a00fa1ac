"""What an optimizer needs of the rules: its kind, and the multipliers of its weight decay."""

from collections.abc import Mapping

from archscale_jax._architecture import Architecture, Role
from archscale_jax.rules._residual import Optimizer

OPTIMIZERS: dict[str, Optimizer] = {"sgd": "sgd", "adam": "adam", "adamw": "adam", "muon": "muon"}
"""Optimizers by name, and the kind of rules of each."""


def decay_multipliers(architecture: Architecture, rates: Mapping[str, float]) -> dict[str, float]:
    """Returns the multiplier λ of every parameter's decoupled weight decay, by name: 1/η.

    The share of a weight that is taken off per step is η·λ; 1/η behind multiplied rates leaves it
    what it is in the base, whatever the width and depth [CompleteP, at α = 1]. Gains and
    biases do not decay.

    Args:
      architecture: the network.
      rates: multipliers η of the learning rate, by name.
    """
    return {
        one.name: 0.0 if one.role in (Role.BIAS, Role.SCALE) else 1.0 / rates[one.name]
        for one in architecture.parameters
    }
