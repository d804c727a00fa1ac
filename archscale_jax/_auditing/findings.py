"""What an audit finds, as records, text and HTML."""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from archscale_jax._reporting.names import merged_names

ALL = "all parameters"
"""Stands for the parameter of a finding that concerns the whole set-up."""

_COLUMNS = 100
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


class Finding(NamedTuple):
    """One thing that is not as the plan promises.

    Attributes:
      kind: `base`, `start`, `dtype`, `loss`, `gradient`, `multipliers`, `inputs`, `optimizer`,
        `frozen`, `direction`, `axes`, `rate`, `decay`, `epsilon`, `clipping`, `schedule` or
        `accumulation`.
      parameter: name of the leaf, or `all parameters`.
      found: what was measured.
      expected: what the plan promises.
      consequence: what it does to the training.
      remedy: what to do.
    """

    kind: str
    parameter: str
    found: str
    expected: str
    consequence: str
    remedy: str

    def __str__(self) -> str:
        return _text([self])


def text_of(findings: Sequence[Finding], notes: Sequence[str], header: str) -> str:
    """Returns the text of an audit; findings that differ in parameter and numbers are joined."""
    parts = [header, *(_text(group) for group in grouped(findings))]
    parts += [_wrapped(note, "• ", "  ") for note in notes]
    return "\n".join(parts)


def html_of(findings: Sequence[Finding], notes: Sequence[str], header: str) -> str:
    """Returns the HTML of an audit."""
    fields = ("kind", "parameter", "found", "expected", "consequence", "remedy")
    head = "".join(f"<th>{name}</th>" for name in fields)
    rows = []
    for group in grouped(findings):
        one = _joined(group)
        cells = [one.kind, _names(group), *one[2:]]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><tr>{head}</tr>{body}</table>" if rows else ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<p>{html.escape(header)}</p>{table}" + (f"<ul>{items}</ul>" if items else "")


def number(value: float) -> str:
    """Returns a number with three digits."""
    return f"{value:.3g}"


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Returns findings that differ only in the parameter, and in numbers of what was found."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.kind, _NUMBER.sub("", one.found), *one[3:]), []).append(one)
    return list(groups.values())


def _joined(group: Sequence[Finding]) -> Finding:
    """The first of a group, with ranges where numbers of what was found differ."""
    places = zip(*(_NUMBER.findall(one.found) for one in group), strict=True)
    ends = ([end(found, key=_value) for end in (min, max)] for found in places)
    shown = ("…".join(dict.fromkeys(both)) for both in ends)
    return group[0]._replace(found=_NUMBER.sub(lambda _: next(shown), group[0].found))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def _names(group: Sequence[Finding]) -> str:
    return ", ".join(merged_names([one.parameter for one in group]))


def _text(group: Sequence[Finding]) -> str:
    first = _joined(group)
    lines = [_wrapped(f"{first.kind}: {_names(group)}", "✗ ", "  ")]
    for name in ("found", "expected", "consequence", "remedy"):
        lines.append(_wrapped(getattr(first, name), f"    {name:<12}", " " * 16))
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
