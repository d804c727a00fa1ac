"""Width factors [μP] in the form without forward multipliers (theory §5).

With r = fan_in / base fan_in and s = fan_out / base fan_out, counted in features, the learning rate
of a parameter is multiplied by

| optimizer | input weights, embeddings, biases, scales | hidden weights | readout weights |
|-----------|-------------------------------------------|----------------|-----------------|
| SGD       | s                                         | s/r            | 1/r             |
| Adam      | 1                                         | 1/r            | 1/r             |
| Muon      | 1, or as matrices below                   | m              | m               |

A table that is the readout's weight too follows the readout, with r the ratio of its rows' lengths.
Muon as in `optax.contrib.muon`, which orthogonalizes matrices, scales them by sqrt(max(1, o/i)),
and leaves the rest to Adam: a matrix of i rows and o columns should change by sqrt(o/i) in
spectral norm, so that m is the ratio of sqrt(min(1, o/i)) to that of the base.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from archscale_jax.architecture import Architecture, Parameter, Role, check_architecture
from archscale_jax.rules.registry import Explained, Registry

WidthRule = Callable[[Parameter, float, float], float]

WIDTH_RULES: Registry[WidthRule] = Registry("width rule")
register_width_rule = WIDTH_RULES.register


@register_width_rule("sgd")
def sgd(parameter: Parameter, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Hidden weights s/r, readout 1/r, all else s: SGD with or without momentum [μP]."""
    if parameter.role == Role.HIDDEN:
        return fan_out_ratio / fan_in_ratio
    if parameter.is_tied:
        return 1 / fan_out_ratio
    if parameter.role == Role.READOUT:
        return 1 / fan_in_ratio
    # The outputs of a network have no width, whatever their number.
    return 1.0 if parameter.layer == Role.READOUT else fan_out_ratio


@register_width_rule("adam")
def adam(parameter: Parameter, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Hidden weights and readout 1/r, all else 1: Adam and others that divide by gradients [μP]."""
    if parameter.is_tied:
        return 1 / fan_out_ratio
    return 1 / fan_in_ratio if parameter.role in (Role.HIDDEN, Role.READOUT) else 1.0


@register_width_rule("muon")
def muon(parameter: Parameter, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Matrices sqrt(min(1, o/i)) over the base's, all else as `adam`: `optax.contrib.muon`.

    With its default dimension numbers and scaling. Matrices are of any role; kernels of attention
    heads and of stacked layers have three axes and are none.
    """
    matrix = parameter.role in (Role.INPUT, Role.HIDDEN, Role.READOUT)
    if len(parameter.shape) != 2 or not matrix:
        return adam(parameter, fan_in_ratio, fan_out_ratio)
    rows, columns = parameter.fan_in, parameter.fan_out
    wanted = math.sqrt(min(1, columns / rows))
    return wanted / math.sqrt(min(1, columns / fan_out_ratio * fan_in_ratio / rows))


def width_factors(
    architecture: Architecture, base: Architecture, rule: str | WidthRule
) -> dict[str, float]:
    """Returns the width factor of every parameter by name.

    Networks of one graph are compared parameter by parameter. Otherwise a parameter is compared
    with those of its role and layer in the base, or with those of them whose names differ from its
    own in numbers only, and these must be of one width, or of the same widths in one ratio.

    Args:
      architecture: the network to train.
      base: the network on which the rate was tuned; of widths alone, `with_widths` makes one.
      rule: `sgd`, `adam`, `muon`, or a function `(parameter, fan_in_ratio, fan_out_ratio)` to the
        factor.

    Raises:
      ValueError: an unknown rule, or a parameter without a counterpart in the base, or with several
        of different fans, so that there is no one width to compare with.
    """
    found = explained_width_factors(architecture, base, rule)
    return {name: factor.value for name, factor in found.items()}


def explained_width_factors(
    architecture: Architecture, base: Architecture, rule: str | WidthRule
) -> dict[str, Explained]:
    """Returns what `width_factors` does, with the ratios that each comes from."""
    function, description = WIDTH_RULES.resolve(rule), WIDTH_RULES.describe(rule)
    ratios = width_ratios(architecture, base)
    factors = {}
    for parameter in architecture.parameters:
        r, s = ratios[parameter.name]
        factor = float(function(parameter, r, s))
        role = "tied table" if parameter.is_tied else parameter.role
        reason = f"width {description.name}, {role}: {factor:.4g} at r = {r:.4g}, s = {s:.4g}"
        factors[parameter.name] = Explained(factor, f"{reason} {description.source}".rstrip())
    return factors


def width_ratios(architecture: Architecture, base: Architecture) -> dict[str, tuple[float, float]]:
    """Returns r and s of every parameter by name, see above.

    Raises:
      ValueError: see `width_factors`.
    """
    counterpart = _counterparts(architecture, base)
    ratios = {}
    for parameter in architecture.parameters:
        base_fan_in, base_fan_out = counterpart(parameter)
        fan_in, fan_out = features(parameter)
        ratios[parameter.name] = fan_in / base_fan_in, fan_out / base_fan_out
    return ratios


def with_widths(architecture: Architecture, widths: Mapping[int, int]) -> Architecture:
    """Returns the same network at other widths, to compare with as a base that was never built.

        with_widths(arch, {1024: 256, 4096: 1024})  # tuned at a quarter of both widths

    Args:
      architecture: the network to train.
      widths: what every number of features that scales is in the base. Numbers that are not listed
        stay as they are, and so do the features that enter and leave the network, and shapes.

    Raises:
      TypeError: no architecture, or widths that are no mapping.
      ValueError: a width below 1, or one that no parameter has.
    """
    check_architecture(architecture)
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths must map width to base width, as {{1024: 256}}, found {widths!r}")
    unused = set(widths)

    def resized(size: int, positions: int, scales: bool) -> int:
        size //= positions
        if scales and size in widths:
            unused.discard(size)
            size = widths[size]
        return size * positions

    def narrowed(parameter: Parameter) -> Parameter:
        inner = (parameter.role, parameter.layer)
        scales_in = Role.INPUT not in inner and parameter.role != Role.EMBEDDING
        scales_out = Role.READOUT not in inner or parameter.is_tied
        positions = parameter.kernel_positions
        fan_in = resized(parameter.fan_in, positions, scales_in)
        fan_out = resized(parameter.fan_out, positions, scales_out)
        return dataclasses.replace(parameter, fan_in=fan_in, fan_out=fan_out)

    for width, base_width in widths.items():
        if base_width < 1:
            raise ValueError(f"widths map {width} to {base_width}; accepted are integers from 1")
    parameters = tuple(narrowed(parameter) for parameter in architecture.parameters)
    if unused:
        inner = sorted({size for one in architecture.parameters for size in features(one)})
        raise ValueError(
            f"widths name {sorted(unused)}, which no layer of the network has; its layers read and "
            f"write {', '.join(map(str, inner))} features"
        )
    return dataclasses.replace(architecture, parameters=parameters)


def features(parameter: Parameter) -> tuple[int, int]:
    """Returns fan-in and fan-out counted in features: without the positions of the kernel."""
    positions = parameter.kernel_positions
    return parameter.fan_in // positions, parameter.fan_out // positions


def _counterparts(
    architecture: Architecture, base: Architecture
) -> Callable[[Parameter], tuple[int, int]]:
    """Returns a function from a parameter to the fans that it has in the base."""
    exact = {parameter.name: parameter for parameter in base.parameters}
    if _same_graph(architecture, base) and exact.keys() == architecture.shapes.keys():
        return lambda parameter: features(exact[parameter.name])
    kinds = (_kind, lambda parameter: (*_kind(parameter), _pattern(parameter)))
    groups = [(kind, _fans(architecture, kind), _fans(base, kind)) for kind in kinds]

    def counterpart(parameter: Parameter) -> tuple[int, int]:
        for kind, ours, theirs in groups:
            key = kind(parameter)
            matched = _matched(sorted(ours[key]), sorted(theirs.get(key, ())))
            if matched:
                return matched[features(parameter)]
        found = sorted(groups[0][2].get(_kind(parameter), ()))
        raise ValueError(
            f"the width factor of {parameter.name!r} needs one base fan for {parameter.role} "
            f"parameters of the {parameter.layer} layer(s); the base network has "
            f"{found or 'none'} (fan-in, fan-out). Pass a base that differs in width or in depth "
            "alone, or with_widths(architecture, {width: base width})"
        )

    return counterpart


def _same_graph(architecture: Architecture, base: Architecture) -> bool:
    columns = (
        (one.senders, one.receivers, one.edges["operator"])
        for one in (architecture.graph, base.graph)
    )
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*columns, strict=True))


def _kind(parameter: Parameter) -> tuple[str, ...]:
    return parameter.role, parameter.layer


def _pattern(parameter: Parameter) -> str:
    """The name without numbers, which tell layers of one kind apart."""
    return re.sub(r"\d+", "#", parameter.name)


def _fans(
    architecture: Architecture, kind: Callable[[Parameter], tuple[str, ...]]
) -> dict[tuple[str, ...], set[tuple[int, int]]]:
    fans: dict[tuple[str, ...], set[tuple[int, int]]] = {}
    for parameter in architecture.parameters:
        fans.setdefault(kind(parameter), set()).add(features(parameter))
    return fans


def _matched(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Pairs of fans: all with the one of the base, or one by one where they are in one ratio."""
    if len(theirs) == 1:
        return dict.fromkeys(ours, theirs[0])
    ratios = {
        (fan_in / base_in, fan_out / base_out)
        for (fan_in, fan_out), (base_in, base_out) in zip(ours, theirs, strict=False)
    }
    one_ratio = len(ours) == len(theirs) and len(ratios) == 1
    return dict(zip(ours, theirs, strict=True)) if one_ratio else {}
