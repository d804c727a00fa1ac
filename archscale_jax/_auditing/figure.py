"""Measured over promised, leaf by leaf: rows, and a picture of them as SVG."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archscale_jax._auditing.findings import ALL, Finding

QUANTITIES = {
    "learning rate": ("#0072B2", "learning_rate"),
    "decay": ("#D55E00", "weight_decay"),
    "initial deviation": ("#009E73", "deviation"),
    "epsilon": ("#CC79A7", "epsilon"),
}
"""Colour, of Okabe and Ito, and key of the records."""

FARTHEST = 100.0
"""Ratios beyond it are drawn at it."""

_LINE, _NAMES, _PLOT, _KINDS = 17, 190, 170, 90


class Row(NamedTuple):
    """One leaf.

    Attributes:
      role: of the leaf.
      name: of the leaf.
      ratios: measured over promised, by quantity; what does not show is left out.
      kinds: of the findings on the leaf.
    """

    role: str
    name: str
    ratios: dict[str, float]
    kinds: list[str]


def rows_of(records: Sequence[Mapping[str, Any]], findings: Sequence[Finding]) -> list[Row]:
    """Returns the rows of records of an audit, by role in the order of the model."""
    roles = list(dict.fromkeys(one["role"] for one in records))
    kinds: dict[str, list[str]] = {}
    for one in findings:
        own = kinds.setdefault(one.parameter, [])
        own += [] if one.kind in own else [one.kind]
    kinds.pop(ALL, None)
    rows = [
        Row(one["role"], one["path"], _ratios(one), kinds.get(one["path"], [])) for one in records
    ]
    return sorted(rows, key=lambda row: roles.index(row.role))


def _ratios(record: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for quantity, (_, key) in QUANTITIES.items():
        promised = 1.0 if key == "deviation" else record.get(f"{key}_promised")
        value = record.get(key) if key != "deviation" or record.get("drawn") else None
        if value and promised and 0 < value / promised < math.inf:
            found[quantity] = value / promised
    return found


def placed(rows: Sequence[Row]) -> tuple[list[tuple[Row, int]], dict[str, int]]:
    """Returns the line of every row, from above, and of the title of every role."""
    lines, roles = [], {}
    for row in rows:
        if row.role not in roles:
            roles[row.role] = len(lines) + len(roles)
        lines.append((row, len(lines) + len(roles)))
    return lines, roles


def reach(rows: Sequence[Row]) -> float:
    """Returns the ratio at the right edge, that at the left is its inverse."""
    far = [max(one, 1 / one) for row in rows for one in row.ratios.values()]
    return 1.3 * min(max([3.0, *far]), FARTHEST)


def svg_of(rows: Sequence[Row]) -> str:
    """Returns the picture, empty where nothing was measured."""
    if not any(row.ratios for row in rows):
        return ""
    lines, roles = placed(rows)
    edge, top = math.log(reach(rows)), 3 * _LINE
    height = top + (len(rows) + len(roles)) * _LINE + 6
    across = lambda value: _NAMES + _PLOT * (0.5 + math.log(value) / edge / 2)  # noqa: E731
    parts = [_text(6, _LINE - 4, "measured / promised, up to one constant")]
    for number, (quantity, (colour, _)) in enumerate(QUANTITIES.items()):
        x = 10 + 112 * number
        parts += [_dot(x, 1.6 * _LINE, colour), _text(x + 6, 1.6 * _LINE + 4, quantity)]
    bound = math.exp(edge) / 1.3
    ticks = ((1 / bound, "middle"), (1.0, "middle"), (bound, "middle"))
    parts += [_text(across(one), top - 4, f"{one:.2g}", at) for one, at in ticks]
    parts.append(
        f'<path d="M{across(1):g} {top}V{height}" stroke="currentColor" stroke-opacity=".4"/>'
    )
    for role, line in roles.items():
        parts.append(_text(6, top + line * _LINE + 12, role, weight="bold"))
    for row, line in lines:
        middle = top + (line + 0.5) * _LINE
        colour = "#c00000" if row.kinds else "currentColor"
        name = row.name if len(row.name) < 32 else "…" + row.name[-30:]
        parts.append(_text(_NAMES - 6, middle + 4, name, "end", colour))
        if row.kinds:
            said = "✗ " + ", ".join(row.kinds)
            parts.append(_text(_NAMES + _PLOT + 4, middle + 4, said, "start", colour))
        for number, (quantity, (colour, _)) in enumerate(QUANTITIES.items()):
            if quantity in row.ratios:
                value = min(max(row.ratios[quantity], 1 / FARTHEST), FARTHEST)
                parts.append(_dot(across(value), middle + 3.6 * (number - 1.5), colour))
    width = _NAMES + _PLOT + _KINDS
    return (
        f'<svg viewBox="0 0 {width} {height:g}" style="width:100%;max-width:{width * 1.3:g}px" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "currentColor",
          weight: str = "normal") -> str:  # fmt: skip
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="2.1" fill="{colour}"/>'
