"""Width multipliers [μP] in the form without forward multipliers (theory §5, §10).

For every use of a parameter the traced operation tells which of its axes are summed over and which
are written; an axis whose size differs from the base's is a width. With k inputs that one unit
reads, N output features of the whole layer (all groups, all heads), r = k / base k and
s = N / base N, the learning rate of a parameter is multiplied by

| optimizer | vector-like: writes a width | matrix-like: reads and writes one | readout: reads one |
|-----------|-----------------------------|-----------------------------------|--------------------|
| SGD       | s                           | s/r                               | 1/r                |
| Adam      | 1                           | 1/r                               | 1/r                |

and by 1 where no axis is a width; for Muon see `archscale_jax.rules._matrix`. Input weights,
embeddings, biases, gains, depthwise kernels and kernels of groups or heads of a fixed size are
vector-like. Of several uses the strictest counts, so that a table that is the readout's weight too
follows the readout.

The multipliers suppose weights whose sizes follow [μP], as `initialize` draws them: a readout of
size 1/n, not 1/√n as frameworks draw it.
"""

import dataclasses
import functools
import itertools
import math
import re
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from archscale_jax._architecture import (
    Architecture,
    Parameter,
    Role,
    check_architecture,
    derived,
)
from archscale_jax._graph import Operator
from archscale_jax.rules._registry import Part, Registry

WidthRule = Callable[..., float]

WIDTH_RULES: Registry[float] = Registry("width rule")
register_width_rule = WIDTH_RULES.register

_MATRICES = (Role.HIDDEN, Role.READOUT)


@register_width_rule("sgd", equation="hidden weights s/r, readout 1/r, all else s", citation="[μP]")
def sgd(parameter: Parameter, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """SGD with or without momentum."""
    if parameter.role == Role.HIDDEN:
        return fan_out_ratio / fan_in_ratio
    if parameter.is_tied:
        return 1 / fan_out_ratio
    if parameter.role == Role.READOUT:
        return 1 / fan_in_ratio
    # The outputs of a network have no width, whatever their number.
    return 1.0 if parameter.layer == Role.READOUT else fan_out_ratio


@register_width_rule("adam", equation="hidden weights and readout 1/r, all else 1", citation="[μP]")
def adam(parameter: Parameter, fan_in_ratio: float, fan_out_ratio: float) -> float:
    """Adam and others that divide by the size of the gradient."""
    if parameter.is_tied:
        return 1 / fan_out_ratio
    return 1 / fan_in_ratio if parameter.role in _MATRICES else 1.0


def width_multipliers(
    architecture: Architecture, base: Architecture, rule: str | WidthRule
) -> dict[str, float]:
    """Returns the width multiplier of every parameter by name.

    Networks of one graph are compared parameter by parameter. Otherwise a parameter is compared
    with those of its role and layer in the base, or with those of them whose names differ from its
    own in numbers only, and these must be of one width, or of the same widths in one ratio.

    Args:
      architecture: the network to train.
      base: the network on which the rate was tuned; of widths alone, `with_widths` makes one.
      rule: `sgd`, `adam`, `muon`, or a function `(parameter, fan_in_ratio, fan_out_ratio)` to the
        multiplier; it sees a parameter of several uses once for every use, in the role of that use.

    Raises:
      ValueError: an unknown rule, or a parameter without a counterpart in the base, or with several
        of different widths, so that there is no one width to compare with.
    """
    found = width_parts(architecture, base, rule)
    return {name: part.value for name, part in found.items()}


def width_parts(
    architecture: Architecture,
    base: Architecture,
    rule: str | WidthRule,
    *,
    tables: Collection[str] = (),
    **options: Any,
) -> dict[str, Part]:
    """Returns what `width_multipliers` does, with the ratios that each comes from.

    Of `tables`, whose logits a forward multiplier scales, only the use as a table counts.
    """
    found = WIDTH_RULES.resolve(rule)
    whole = {one.name: one for one in architecture.parameters}

    def part(parameter: Parameter, r: float, s: float, shape: tuple[int, ...]) -> Part:
        known = {"base_shape": shape, "whole": whole[parameter.name]}
        context = {name: one for name, one in known.items() if name in found.parameters}
        value = float(found(parameter, r, s, **context, **options))
        role = "tied table" if parameter.is_tied else str(parameter.role)
        return Part(value, f"width {found.name}", role, {"r": r, "s": s}, found.citation)

    def counted(name: str, views: Sequence[_View]) -> Sequence[_View]:
        if name not in tables:
            return views
        return [view for view in views if view[0].uses[0].kind != "weight"]

    return {
        name: min((part(*view) for view in counted(name, views)), key=lambda part: part.value)
        for name, views in _compared(architecture, base).items()
    }


_View = tuple[Parameter, float, float, tuple[int, ...]]
"""A parameter in the role of one of its uses, with r and s, and its shape in the base."""


def _compared(architecture: Architecture, base: Architecture) -> Mapping[str, Sequence[_View]]:
    """The views of every parameter by name."""
    known = _comparisons(architecture)
    if base not in known:
        counterpart = _counterparts(architecture, base)
        known[base] = {one.name: _views(one, *counterpart(one)) for one in architecture.parameters}
    return known[base]


@derived
def _comparisons(architecture: Architecture) -> MutableMapping[Architecture, Any]:
    """What `_compared` has found, as long as the bases live."""
    del architecture
    return weakref.WeakKeyDictionary()


def _views(parameter: Parameter, shape: tuple[int, ...], fans: tuple[float, float]) -> list[_View]:
    """A parameter in the role of every one of its uses."""
    if not parameter.uses:
        own = features(parameter)
        return [(parameter, own[0] / fans[0], own[1] / fans[1], shape)]
    found = {}
    for use in parameter.uses:
        contracted = set(use.contracted) - set(use.positions)
        written = {*use.output, *use.batch} - set(use.positions) - contracted
        sliced = {axis for axis, _ in use.slices}
        r, s = (
            math.prod(parameter.sizes[axis] / shape[axis] for axis in axes - sliced)
            for axes in (contracted, written)
        )
        if use.layer == Role.INPUT and not use.made:
            r = 1.0  # inputs have no width
        if use.layer == Role.READOUT and use.kind not in ("scale", "embedding"):
            s = 1.0  # nor has the result
        if use.kind != "weight":
            role = Role.EMBEDDING if parameter.role == Role.EMBEDDING else parameter.role
            role = Role.SCALE if role in _MATRICES else role
        elif r == 1:
            role = Role.INPUT
        else:
            role = Role.READOUT if s == 1 else Role.HIDDEN
        if use.kind == "weight" and use.layer != Role.INPUT and parameter.sizes == shape:
            role = use.layer if use.layer in _MATRICES else Role.HIDDEN
        layer = Role.HIDDEN if role in (Role.INPUT, Role.EMBEDDING) else use.layer
        seen = dataclasses.replace(parameter, role=role, layer=layer, uses=(use,))
        found[role, r, s, use.contracted, use.output] = (seen, r, s, shape)
    return list(found.values())


def width_ratios(architecture: Architecture, base: Architecture) -> dict[str, tuple[float, float]]:
    """Returns r and s of every parameter by name, see above; of several uses the largest."""
    return {
        name: (max(view[1] for view in found), max(view[2] for view in found))
        for name, found in _compared(architecture, base).items()
    }


# Bases that were never built.


def with_widths(architecture: Architecture, widths: Mapping[int, int]) -> Architecture:
    """Returns the same network at other widths, to compare with as a base that was never built.

        with_widths(arch, {1024: 256, 4096: 1024})  # tuned at a quarter of both widths

    Axes of features count, alone or several together, as heads and their features; axes of
    positions do not, whatever their size. Features that were flattened or merged from several
    positions are a number of their own: list it too, `{64: 32, 1024: 512}`. So is the size of heads
    if it differs; unless it is listed the base has fewer heads.

    Args:
      architecture: the network to train.
      widths: what every number of features that scales is in the base. The features that enter and
        leave the network stay as they are.

    Raises:
      TypeError: not an architecture, or widths that are not a mapping.
      ValueError: a width below 1, one that no parameter has, or one that is missing beside a
        listed one in the same hidden layers; `{512: 512}` says that it stays.
    """
    check_architecture(architecture)
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths must map width to base width, as {{1024: 256}}, found {widths!r}")
    for width, base_width in widths.items():
        if base_width < 1:
            raise ValueError(f"widths map {width} to {base_width}; accepted are integers from 1")
    unused, missing = set(widths), {}
    unused -= {one.size for one in architecture.attention.values()}
    parameters = tuple(
        _narrowed(parameter, widths, unused, missing) for parameter in architecture.parameters
    )
    if unused:
        inner = sorted({size for one in architecture.parameters for size in features(one)})
        raise ValueError(
            f"widths name {sorted(unused)}, which no layer of the network has; its layers read and "
            f"write {', '.join(map(str, inner))} features"
        )
    if missing:
        width, name = max(missing.items())
        raise ValueError(
            f"widths list {sorted(widths)} and lack {width}, which {name!r} and layers like "
            f"it have beside a listed width; add {width}: base width, or {{{width}: {width}}} if "
            "it stays"
        )
    attention = {
        vertex: one.resized(widths.get(one.size, one.size))
        for vertex, one in architecture.attention.items()
    }
    narrowed = dataclasses.replace(architecture, parameters=parameters, attention=attention)
    _check_joined(architecture, narrowed, widths)
    return narrowed


def _check_joined(
    architecture: Architecture, narrowed: Architecture, widths: Mapping[int, int]
) -> None:
    """Checks that layers behind a concatenation read what its parts became."""
    graph, functions = architecture.graph, architecture.functions
    if functions is None:
        return
    sizes = {
        one.name: (features(one), features(other))
        for one, other in zip(architecture.parameters, narrowed.parameters, strict=True)
    }
    written: dict[int, float | None] = {0: _stem_ratio(architecture, sizes)}
    parts: dict[int, list[tuple[int, float | None]]] = {}
    for edge in np.argsort(graph.receivers, kind="stable").tolist():
        source, target = int(graph.senders[edge]), int(graph.receivers[edge])
        if graph.edges["operator"][edge] == Operator.CONCATENATION:
            parts.setdefault(target, []).append((functions[edge].count, written.get(source)))
        joined = parts.get(source, [])
        ratios = [ratio for _, ratio in joined if ratio is not None]
        for name in functions[edge].weights:
            before, after = sizes[name]
            written[target] = after[1] / before[1]
            if not joined or len(ratios) < len(joined):
                continue
            part = sum(count * ratio for (count, _), ratio in zip(joined, ratios, strict=True))
            made = round(before[0] * part / sum(count for count, _ in joined))
            if made != after[0]:
                raise ValueError(
                    f"widths list {sorted(widths)}: the {before[0]} joined features that {name!r} "
                    f"reads become {made}, of which it would read {after[0]}; list the widths of "
                    f"all that is joined, and {before[0]} with their sum"
                )


def _stem_ratio(architecture: Architecture, sizes: Mapping[str, Any]) -> float | None:
    names = [name for function in architecture.stems for name in function.weights]
    ratios = {sizes[name][1][1] / sizes[name][0][1] for name in names}
    return ratios.pop() if len(ratios) == 1 else None


def _narrowed(
    parameter: Parameter, widths: Mapping[int, int], unused: set[int], missing: dict[int, str]
) -> Parameter:
    if not parameter.uses:
        fan_in, fan_out = _fans_of(parameter, widths, unused)
        return dataclasses.replace(parameter, fan_in=fan_in, fan_out=fan_out)
    shape = list(parameter.shape)
    ratios = {"in": 1.0, "out": 1.0}
    done: set[int] = set()
    for use in parameter.uses:
        positions = {*use.positions, *(axis for axis, _ in use.slices)}
        sides = {
            "in": [] if use.layer == Role.INPUT and not use.made else list(use.contracted),
            "out": [*use.output, *use.batch],
        }
        if use.layer == Role.READOUT and use.kind not in ("scale", "embedding"):
            sides["out"] = []
        listed = {}
        for side, axes in sides.items():
            axes = [axis for axis in dict.fromkeys(axes) if axis not in positions]
            if not axes or any(axis in done for axis in axes):
                continue
            size = math.prod(parameter.shape[axis] for axis in axes)
            found = _base_sizes(parameter.shape, axes, widths, unused)
            listed[side] = size, bool(found)
            for axis, base in found.items():
                ratios[side] *= parameter.shape[axis] / base
                shape[axis] = base
            done.update(found)
        if len(listed) == 2 and use.kind == "weight" and use.layer == Role.HIDDEN:
            _note_missing(parameter, listed, widths, missing)
    return dataclasses.replace(
        parameter,
        shape=tuple(shape),
        fan_in=max(1, round(parameter.fan_in / ratios["in"])),
        fan_out=max(1, round(parameter.fan_out / ratios["out"])),
    )


def _base_sizes(
    shape: tuple[int, ...], axes: list[int], widths: Mapping[int, int], unused: set[int]
) -> dict[int, int]:
    """Sizes of axes in the base: of single ones that are listed, or of several together."""
    whole = math.prod(shape[axis] for axis in axes)
    if len(axes) > 1 and whole in widths:
        unused.discard(whole)
        ratio = whole / widths[whole]
        for axis in axes:
            if ratio >= 1 and shape[axis] % ratio == 0:
                return {axis: int(shape[axis] / ratio)}
            if ratio < 1:
                return {axis: round(shape[axis] / ratio)}
    found = {axis: widths[shape[axis]] for axis in axes if shape[axis] in widths}
    unused.difference_update(shape[axis] for axis in found)
    return found


def _note_missing(
    parameter: Parameter,
    listed: Mapping[str, tuple[int, bool]],
    widths: Mapping[int, int],
    missing: dict[int, str],
) -> None:
    (one, one_listed), (other, other_listed) = listed.values()
    if one_listed == other_listed:
        return
    size, listed_size = (other, one) if one_listed else (one, other)
    if 2 * size >= listed_size:  # less is a rank, a number of experts or the like
        missing[size] = parameter.name


def _fans_of(parameter: Parameter, widths: Mapping[int, int], unused: set[int]) -> tuple[int, int]:
    inner = (parameter.role, parameter.layer)
    scales = (
        Role.INPUT not in inner and parameter.role != Role.EMBEDDING,
        Role.READOUT not in inner or parameter.is_tied,
    )
    found = []
    for fan, own in zip((parameter.fan_in, parameter.fan_out), scales, strict=True):
        size = fan // parameter.kernel_positions
        if own and size in widths:
            unused.discard(size)
            size = widths[size]
        found.append(size * parameter.kernel_positions)
    return found[0], found[1]


def features(parameter: Parameter) -> tuple[int, int]:
    """Returns how many features a parameter's layer reads and writes, without positions."""
    uses = [use for use in parameter.uses if use.kind in ("weight", "embedding")]
    if not uses:
        positions = parameter.kernel_positions
        return max(1, parameter.fan_in // positions), max(1, parameter.fan_out // positions)
    skipped = {*uses[0].positions, *(axis for axis, _ in uses[0].slices)}
    sizes = parameter.sizes
    return (
        math.prod(sizes[axis] for axis in uses[0].contracted if axis not in skipped),
        math.prod(sizes[axis] for axis in {*uses[0].output, *uses[0].batch} - skipped),
    )


# Counterparts in the base.

_Sizes = tuple[tuple[int, ...], tuple[int, int]]
"""Shape and fans of a parameter."""


def _counterparts(architecture: Architecture, base: Architecture) -> Callable[[Parameter], _Sizes]:
    """Returns a function from a parameter to the shape and the fans that it has in the base."""
    exact = {parameter.name: parameter for parameter in base.parameters}
    if _same_graph(architecture, base) and exact.keys() == architecture.shapes.keys():
        return lambda parameter: _sizes(exact[parameter.name], parameter)
    kinds = (_kind_and_name, _kind)
    groups = [(kind, _members(architecture, kind), _members(base, kind)) for kind in kinds]

    @functools.cache
    def narrowed() -> dict[str, Parameter]:
        return {one.name: one for one in _at_widths_of(architecture, base)}

    def counterpart(parameter: Parameter) -> _Sizes:
        for kind, ours, theirs in groups:
            key = kind(parameter)
            matched = _matched(ours[key], theirs.get(key, {}), parameter)
            if matched is not None:
                return matched
        if parameter.name in (same := narrowed()):
            return _sizes(same[parameter.name], parameter)
        found = sorted({one[1] for one in groups[-1][2].get(_kind(parameter), ())})
        raise ValueError(
            f"the width multiplier of {parameter.name!r} needs one base fan for {parameter.role} "
            f"parameters of the {parameter.layer} layer(s); the base network has "
            f"{found or 'none'} (fan-in, fan-out). Pass a base that differs in width or in depth "
            "alone, or with_widths(architecture, {width: base width}); width_rule=None where "
            "only the depth differs"
        )

    return counterpart


def _at_widths_of(architecture: Architecture, base: Architecture) -> tuple[Parameter, ...]:
    """The parameters at the widths of a base, if its layers tell one width for each; else none."""
    if _widths(architecture) == _widths(base):
        return architecture.parameters
    found = _base_widths(architecture, base)
    return with_widths(architecture, found[0]).parameters if len(found) == 1 else ()


def _base_widths(architecture: Architecture, base: Architecture) -> list[dict[int, int]]:
    """What widths may be in a base of another depth: as they are or in one ratio, each as its own.

    All layers together then have the features that those of the base have, which rarely leaves two
    answers: where tokens of fixed size are joined to 256 features, only these stay.
    """
    ours, theirs = sorted(_widths(architecture)), _widths(base)
    wanted = _layers(base, {width: width for width in theirs})
    found: list[dict[int, int]] = []
    for ratio in {Fraction(one, other) for one in ours for other in theirs if one != other}:
        choices = [sorted({one, one / ratio} & theirs) for one in ours]
        if math.prod(map(len, choices)) > MOST_CHOICES:
            continue
        for chosen in itertools.product(*choices):
            widths = dict(zip(ours, map(int, chosen), strict=True))
            if widths not in found and _layers(architecture, widths) == wanted:
                found.append(widths)
    return found


def _layers(architecture: Architecture, widths: Mapping[int, int]) -> set[tuple[Any, ...]]:
    """Roles and features of all layers, at other widths."""
    return {
        (
            *_kind(one),
            *(widths[n] if side in INNER[one.role] else n for side, n in enumerate(features(one))),
        )
        for one in architecture.parameters
        if one.role in INNER
    }


INNER = {Role.HIDDEN: (0, 1), Role.INPUT: (1,), Role.READOUT: (0,)}
"""Which sides of a layer are features of the network: what it reads, what it writes."""

MOST_CHOICES = 4096
"""Widths that repeat in every ratio, as in no known model, would take for ever."""


def _widths(architecture: Architecture) -> set[int]:
    """Numbers of features that layers read from layers or write for them."""
    return {
        features(one)[side] for one in architecture.parameters for side in INNER.get(one.role, ())
    }


def _sizes(base: Parameter, parameter: Parameter) -> _Sizes:
    """Shape and fans of a counterpart; the sizes of a stack's own axes are the parameter's."""
    shape = _unstacked(base)
    own = list(parameter.sizes)
    free = [axis for axis in range(len(own)) if axis not in _stacked_axes(parameter)]
    if len(shape) == len(free):
        for axis, size in zip(free, shape, strict=True):
            own[axis] = size
    return tuple(own), features(base)


def _stacked_axes(parameter: Parameter) -> set[int]:
    return {axis for use in parameter.uses for axis, _ in use.slices}


def _unstacked(parameter: Parameter) -> tuple[int, ...]:
    stacked = _stacked_axes(parameter)
    return tuple(size for axis, size in enumerate(parameter.sizes) if axis not in stacked)


def _same_graph(architecture: Architecture, base: Architecture) -> bool:
    columns = (
        (one.senders, one.receivers, one.edges["operator"])
        for one in (architecture.graph, base.graph)
    )
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*columns, strict=True))


def _kind(parameter: Parameter) -> tuple[str, ...]:
    return parameter.role, parameter.layer


def _kind_and_name(parameter: Parameter) -> tuple[str, ...]:
    """The name is taken without numbers, which tell layers of one kind apart."""
    return (*_kind(parameter), re.sub(r"\d+", "#", parameter.name))


def _members(
    architecture: Architecture, kind: Callable[[Parameter], tuple[str, ...]]
) -> dict[tuple[str, ...], dict[_Sizes, Parameter]]:
    """Parameters of every kind by their sizes."""
    found: dict[tuple[str, ...], dict[_Sizes, Parameter]] = {}
    for one in architecture.parameters:
        sizes = _unstacked(one), features(one)
        found.setdefault(kind(one), {}).setdefault(sizes, one)
    return found


def _matched(
    ours: Mapping[_Sizes, Parameter], theirs: Mapping[_Sizes, Parameter], parameter: Parameter
) -> _Sizes | None:
    """The one counterpart, or the one of the same place where all sizes are in one ratio."""
    rank = len(_unstacked(parameter))
    candidates = [one for sizes, one in theirs.items() if len(sizes[0]) == rank]
    if len(candidates) == 1:
        return _sizes(candidates[0], parameter)
    if len(ours) != len(theirs) or not theirs:
        return None
    pairs = list(zip(sorted(ours), sorted(theirs), strict=True))
    ratios = {
        tuple(a / b for a, b in zip((*mine[0], *mine[1]), (*other[0], *other[1]), strict=True))
        if len(mine[0]) == len(other[0])
        else ()
        for mine, other in pairs
    }
    if len(ratios) != 1:
        return None
    by_sizes = dict(pairs)
    return _sizes(theirs[by_sizes[_unstacked(parameter), features(parameter)]], parameter)
