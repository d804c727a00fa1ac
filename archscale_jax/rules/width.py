"""Width factors [μP] in the form without forward multipliers (theory §5).

With r = fan_in / base fan_in and s = fan_out / base fan_out, counted in features, the learning rate
of a parameter is multiplied by

| optimizer | input weights, biases and scales | hidden weights | readout weights |
|-----------|----------------------------------|----------------|-----------------|
| SGD       | s                                | 1              | 1/r             |
| Adam      | 1                                | 1/r            | 1/r             |
"""

from collections.abc import Callable

from archscale_jax.architecture import Architecture, Parameter, Role
from archscale_jax.rules.registry import Registry

WidthRule = Callable[[Role, float, float], float]

WIDTH_RULES: Registry[WidthRule] = Registry("width rule")
register_width_rule = WIDTH_RULES.register


@register_width_rule("sgd")
def sgd(role: Role, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Factor for SGD with or without momentum [μP]."""
    if role == Role.HIDDEN:
        return 1.0
    return 1 / fan_in_ratio if role == Role.READOUT else fan_out_ratio


@register_width_rule("adam")
def adam(role: Role, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Factor for Adam and other optimizers whose update does not depend on the gradient's size."""
    del fan_out_ratio
    return 1 / fan_in_ratio if role in (Role.HIDDEN, Role.READOUT) else 1.0


def width_factors(
    architecture: Architecture, base: Architecture, rule: str | WidthRule
) -> dict[str, float]:
    """Returns the width factor of every parameter by name.

    A parameter is compared with the base parameters of its role and layer, whatever the depth.

    Args:
      architecture: the network to train.
      base: the network on which the rate was tuned.
      rule: `sgd`, `adam`, or a function `(role, fan_in_ratio, fan_out_ratio) -> float`.

    Raises:
      ValueError: an unknown rule, or a parameter whose counterparts in the base are missing or
        differ in fan, so that there is no one width to compare with.
    """
    function = WIDTH_RULES.resolve(rule)
    fans: dict[tuple[Role, Role], set[tuple[int, int]]] = {}
    for parameter in base.parameters:
        fans.setdefault((parameter.role, parameter.layer), set()).add(_features(parameter))
    factors = {}
    for parameter in architecture.parameters:
        found = fans.get((parameter.role, parameter.layer), set())
        if len(found) != 1:
            raise ValueError(
                f"the width factor of {parameter.name!r} needs one base fan for {parameter.role} "
                f"parameters of the {parameter.layer} layer(s); the base network has "
                f"{sorted(found) or 'none'} (fan-in, fan-out)"
            )
        (base_fan_in, base_fan_out) = next(iter(found))
        fan_in, fan_out = _features(parameter)
        factors[parameter.name] = function(
            parameter.role, fan_in / base_fan_in, fan_out / base_fan_out
        )
    return factors


def _features(parameter: Parameter) -> tuple[int, int]:
    positions = parameter.kernel_positions
    return parameter.fan_in // positions, parameter.fan_out // positions
