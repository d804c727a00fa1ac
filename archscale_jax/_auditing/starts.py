"""The initial weights, against the standard deviations that the plan promises."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from archscale_jax._architecture import Parameter, Role
from archscale_jax._auditing.findings import Finding, number
from archscale_jax._parametrize import Parametrization
from archscale_jax._trees import PyTree, named_leaves

REDRAW = "draw the weights with plan.init(key)"


class Start(NamedTuple):
    """What a leaf holds before training.

    Attributes:
      deviation: root mean square over the promised one, of what is drawn; else the root mean
        square.
      lowest: the smallest of the slices of a stack.
      highest: the largest.
      mean: mean entry over the promised deviation, of what is drawn; else the mean.
      repeated: whether two slices of a stack hold the same.
      finite: whether all entries are.
    """

    deviation: float
    lowest: float
    highest: float
    mean: float
    repeated: bool
    finite: bool


def dtypes(params: PyTree) -> list[Finding]:
    """Findings on leaves that no gradient can train."""
    return [
        Finding(
            "dtype",
            name,
            f"dtype {leaf.dtype}",
            "a floating dtype",
            "it has no gradient",
            "cast it, or bind what is not trained to the function",
        )
        for name, leaf in named_leaves(params).items()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def mixed_dtypes(plan: Parametrization, params: PyTree) -> list[Finding]:
    """Findings on hidden weights of another dtype than most, where those of the model have one."""
    own, leaves = named_leaves(plan._model.params), named_leaves(params)
    names = [
        one.name
        for one in plan.architecture.parameters
        if one.role == Role.HIDDEN and one.name in leaves and not any(use.gates for use in one.uses)
    ]
    found = {name: str(leaves[name].dtype) for name in names}
    if len(names) < 3 or len({str(own[name].dtype) for name in names}) > 1:
        return []
    usual = max(found.values(), key=list(found.values()).count)
    others = [name for name in names if found[name] != usual]
    if len(others) * 3 > len(names):
        return []
    return [
        Finding(
            "dtype",
            name,
            f"dtype {found[name]}",
            f"{usual}, as other hidden weights",
            "its updates are rounded otherwise, and products take the wider dtype",
            "cast all of them, or none",
        )
        for name in others
    ]


def measured(plan: Parametrization, params: PyTree) -> dict[str, Start]:
    """Returns what leaves hold, in units of what the plan promises."""
    promised = plan._deviations
    factors = {name: part.value for name, part in plan._starts.items()}
    scales = {
        name: np.asarray(promised[name] * factors.get(name, 1.0), np.float32)
        for name in named_leaves(params)
        if name in promised
    }
    stacked = {one.name: _stacked(one) for one in plan.architecture.parameters}

    found = jax.device_get(
        {
            name: _start(leaf, scales.get(name), stacked[name])
            for name, leaf in named_leaves(params).items()
        }
    )
    return {
        name: Start(*(float(one) for one in row[:4]), repeated=bool(row[4]), finite=bool(row[5]))
        for name, row in found.items()
    }


def expected_starts(plan: Parametrization, names: list[str]) -> dict[str, tuple[float, float]]:
    """Returns smallest and largest entry of what `plan.init` does not draw, by name."""

    def kept(key: jax.Array) -> dict[str, jax.Array]:
        leaves = named_leaves(plan.init(key))
        return {
            name: jnp.stack([jnp.min(leaves[name]), jnp.max(leaves[name])]).astype(jnp.float32)
            for name in names
        }

    found = jax.device_get(jax.jit(kept)(jax.random.key(0)))
    return {name: (float(row[0]), float(row[1])) for name, row in found.items()}


def checked(plan: Parametrization, params: PyTree, starts: Mapping[str, Start]) -> list[Finding]:
    """Compares initial weights with the plan."""
    parameters = {one.name: one for one in plan.architecture.parameters}
    broken = [name for name, one in starts.items() if not one.finite]
    findings = [
        Finding(
            "start",
            name,
            "entries that are not finite",
            "numbers",
            "the loss is not finite",
            REDRAW,
        )
        for name in broken
    ]
    drawn = plan._deviations
    rest = [name for name in starts if name not in broken]
    for name in rest:
        if name in drawn:
            findings += _drawn(parameters[name], named_leaves(params)[name], starts[name])
    kept = [name for name in rest if name not in drawn]
    values = expected_starts(plan, kept)
    for name in kept:
        low, high = values[name]
        if low == high:
            findings += _constant(parameters[name], starts[name], low)
    return findings


def _stacked(parameter: Parameter) -> tuple[int, ...]:
    """Axes that tell the layers of a stack apart."""
    return tuple(sorted({axis for use in parameter.uses for axis, _ in use.slices}))


@functools.partial(jax.jit, static_argnames="stacked")
def _start(leaf: jax.Array, scale: Any, stacked: tuple[int, ...]) -> jax.Array:
    w = leaf.astype(jnp.float32)
    z = w if scale is None else w / scale
    own = tuple(axis for axis in range(w.ndim) if axis not in stacked)
    squares = jnp.sqrt(jnp.mean(z**2, own))
    rows = jnp.moveaxis(w, stacked, range(len(stacked)))
    rows = rows.reshape(math.prod(w.shape[axis] for axis in stacked), -1)
    repeated = jnp.asarray(False)
    if rows.shape[0] > 1 and rows.shape[1] > 1:
        repeated = jnp.any(jnp.all(rows[1:] == rows[:-1], 1) & jnp.any(rows[1:] != 0, 1))
    return jnp.stack(
        [jnp.sqrt(jnp.mean(z**2)), jnp.min(squares), jnp.max(squares), jnp.mean(z),
         repeated.astype(jnp.float32), jnp.all(jnp.isfinite(w)).astype(jnp.float32)]
    )  # fmt: skip


def _drawn(parameter: Parameter, leaf: Any, start: Start) -> Iterator[Finding]:
    slices = math.prod(parameter.shape[axis] for axis in _stacked(parameter))
    entries = math.prod(parameter.shape)
    whole, one = (0.1 + 5 / math.sqrt(2 * count) for count in (entries, entries / slices))
    role = f"{parameter.role}, {parameter.fan_in} inputs"
    if start.deviation == 0:
        yield Finding(
            "start",
            parameter.name,
            "all entries are 0",
            f"a draw ({role})",
            "it starts without features of its own, and what is before it without a gradient",
            f"{REDRAW}; zero_init= tells the plan of zeros that are meant",
        )
        return
    if start.repeated and entries / slices > 1:
        yield Finding(
            "start",
            parameter.name,
            "layers of the stack hold the same weights",
            "a draw for each",
            "they learn the same as long as nothing else tells them apart",
            f"{REDRAW}, or split the key, as split_rngs={{'params': True}} does",
        )
    logs = [math.log(max(value, 1e-30)) for value in (start.deviation, start.lowest, start.highest)]
    if abs(logs[0]) > whole or max(-logs[1], logs[2]) > one:
        # More digits would be those of the draw, and tell apart what is off by one factor.
        whole, lowest, highest = (
            number(float(f"{value:.2g}"))
            for value in (start.deviation, start.lowest, start.highest)
        )
        found = f"standard deviation × {whole} of the plan's"
        if slices > 1:
            found += f", of layers × {lowest} to × {highest}"
        yield Finding(
            "start",
            parameter.name,
            found,
            f"× 1 ({role})",
            "its layer's output is as many times as large, and a rate moves it by another part",
            REDRAW,
        )
    elif abs(start.mean) > 0.1 + 6 / math.sqrt(entries):
        yield Finding(
            "start",
            parameter.name,
            f"mean of {number(start.mean)} standard deviations",
            "mean 0",
            "its outputs share a part that grows with width",
            REDRAW,
        )


def _constant(parameter: Parameter, start: Start, value: float) -> Iterator[Finding]:
    near = max(1e-2 * abs(value), 1e-6)
    if abs(start.mean - value) > near or abs(start.deviation - abs(value)) > near:
        yield Finding(
            "start",
            parameter.name,
            f"mean {number(start.mean)}, root mean square {number(start.deviation)}",
            f"{number(value)} everywhere ({parameter.role})",
            "features start with another size or offset than the plan reckons with"
            if value
            else "it starts at 0 in the plan; what follows it starts otherwise",
            f"{REDRAW}; arrays passed to parametrize tell the plan of starts that are meant",
        )
