"""The table of a report: records to rows, and rows to text and HTML."""

import html
import io
import shutil
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from archscale_jax._reporting.names import blocks_of, grouped, merged_path, pattern_of
from archscale_jax._reporting.reasons import kind_of, range_text, reason_text

Record = Mapping[str, Any]

MAX_ROWS = 60
"""Tables that would be longer join rows that differ in standard deviation alone."""
CLOSE = 1.1
"""Largest over smallest standard deviation of rows that are joined in any table."""

_WIDTH = 120  # where there is no terminal
_REASONS = ("why std", "why lr", "optimizer")
_MULTIPLIERS = {
    "lr ×": "learning_rate_multiplier",
    "decay ×": "weight_decay_multiplier",
    "ε ×": "epsilon_multiplier",
}
_NUMBERS = {
    **_MULTIPLIERS,
    "η": "learning_rate",
    "λ": "weight_decay",
    "ε": "epsilon",
    "η·λ": "decay_per_update",
    "1/(η·λ)": "timescale",
}
"""Columns of what an optimizer gets, and their keys: multipliers, or with base values the product.
"""


class Row(NamedTuple):
    """One row of the table: its texts by column, and indices of the records that it stands for."""

    cells: dict[str, str]
    indices: list[int]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Returns the rows of a table: repeated layers share one.

    Records share a row if they are equal, as shown, up to numbers in the path. Rows that differ in
    the standard deviation alone show its range if it is `CLOSE`, or there are more than `MAX_ROWS`.
    """
    several = len({record["learning_rate_reason"] for record in records}) > 1
    rows, ranges = [], _rows(records, several, ranging=True)
    for joined in ranges:
        same = [records[index] for index in joined.indices]
        if _is_close([one for each in same for one in _numbers(each["standard_deviation"])]):
            rows.append(joined)
        else:
            rows += [
                Row(row.cells, [joined.indices[place] for place in row.indices])
                for row in _rows(same, several, ranging=False)
            ]
    return rows if len(rows) <= MAX_ROWS else ranges


def _is_close(deviations: Sequence[float]) -> bool:
    return not deviations or max(deviations) <= CLOSE * min(deviations)


def _rows(records: Sequence[Record], several: bool, *, ranging: bool) -> list[Row]:
    cells = [_cells([record], several) for record in records]

    def key(index: int) -> Hashable:
        shown = {**cells[index], "path": pattern_of(records[index]["path"])}
        if ranging:
            kind = kind_of(records[index]["initialization_parts"])
            shown |= {"init std": "", "why std": kind}
        return tuple(shown.items())

    rows = []
    for indices in grouped(range(len(records)), key):
        for block in blocks_of([records[index]["path"] for index in indices]):
            found = [indices[place] for place in block]
            rows.append(Row(_cells([records[index] for index in found], several), found))
    return rows


def text_of(
    header: Sequence[str], records: Sequence[Record], notes: Sequence[str], first: int = 0
) -> str:
    """Returns a report as text that fits the terminal, or 120 columns."""
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False)
    for line in header:
        console.print(Text(line, overflow="fold"))
    before, behind = (_listing(("•", note) for note in part) for part in _parted(notes, first))
    for part in [before, *_text_tables(rows_of(records), records), behind]:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def _parted(notes: Sequence[str], first: int) -> tuple[Sequence[str], Sequence[str]]:
    return notes[:first], notes[first:]


def html_of(
    header: Sequence[str], records: Sequence[Record], notes: Sequence[str], first: int = 0
) -> str:
    """Returns a report as HTML for notebooks: text escaped, in the colours of the page."""
    rows = rows_of(records)
    columns = _columns(rows)
    line = "border-bottom: 1px solid rgba(128, 128, 128, 0.4)"
    cell = f"padding: 0.15em 0.7em; vertical-align: top; color: inherit; {line}"

    def row_of(tag: str, texts: Iterable[str]) -> str:
        return "<tr>{}</tr>".format(
            "".join(
                f'<{tag} style="{cell}; text-align: {_side(name)}">{html.escape(text)}</{tag}>'
                for name, text in zip(columns, texts, strict=True)
            )
        )

    def items(notes: Sequence[str]) -> str:
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        return f"<ul>{listed}</ul>" if notes else ""

    before, behind = _parted(notes, first)
    body = "".join(row_of("td", (row.cells[name] for name in columns)) for row in rows)
    style = "border-collapse: collapse; margin: 0.7em 0; background: transparent"
    head = f'<table style="{style}"><thead>{row_of("th", columns)}</thead><tbody>'
    return (
        '<div style="color: inherit; background: transparent; overflow-x: auto">'
        + "".join(f"<div>{html.escape(line)}</div>" for line in header)
        + items(before)
        + (f"{head}{body}</tbody></table>" if rows else "")
        + items(behind)
        + "</div>"
    )


def _side(name: str) -> str:
    return "right" if name in ("kernel", "d_in", "init std", *_NUMBERS) else "left"


def _cells(same: Sequence[Record], several: bool) -> dict[str, str]:
    """What a row shows of records that are equal but for paths and standard deviations."""
    record = same[0]
    role, layer = record["role"], record["layer"]
    of_plan = "epsilon_multiplier" in record  # whose numbers need the room
    deviations = [one for each in same for one in _numbers(each["standard_deviation"])]
    return {
        "path": merged_path([one["path"] for one in same]),
        "role": role if layer in (role, "hidden") else f"{role} ({layer})",
        "shape": "×".join(map(str, record["shape"])) or "scalar",
        **({} if of_plan else {"fans": f"{record['fan_in']}→{record['fan_out']}"}),
        "kernel": str(record["kernel_size"]),
        "d_in": _degrees(record["source_in_degree"], record["in_degree"]),
        "init std": range_text(deviations, ".3g"),
        **{
            name: range_text(_numbers(record.get(key)), ".3g")
            for name, key in _NUMBERS.items()
            if key in record and not (name in _MULTIPLIERS and "learning_rate" in record)
        },
        "why std": _reason("why std", same),
        "why lr": _reason("why lr", same) if several else "",
        "optimizer": record.get("optimizer", ""),
    }


def _numbers(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    """The numbers of a cell: none, one, or those of the slices of a stack."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _degrees(source: Any, target: Any) -> str:
    """In-degrees of the ends of an edge, or of edges."""
    if target is None:
        return ""
    ends = [
        end if isinstance(end, tuple) else (end,) for end in (source, target) if end is not None
    ]
    return "→".join(",".join(map(str, end)) for end in ends)


def _columns(rows: Sequence[Row]) -> list[str]:
    """The columns to show: kernel sizes, reasons and decay only where there are some."""
    optional = {"kernel": "1", "ε ×": "1", "η·λ": "0", "1/(η·λ)": "inf"}
    optional |= dict.fromkeys(_REASONS, "")
    names = rows[0].cells if rows else ()
    return [name for name in names if any(row.cells[name] != optional.get(name) for row in rows)]


def _text_tables(rows: Sequence[Row], records: Sequence[Record]) -> list[RenderableType]:
    """The table with numbers for the reasons, and the reasons."""
    if not rows:
        return []
    names = [name for name in _columns(rows) if name not in _REASONS]
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in (*names, "why"):
        # Columns that may be folded give way to those that hold numbers.
        justify, folded = "right" if _side(name) == "right" else "left", name in ("path", "role")
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not folded)
    kinds: dict[tuple[str, Hashable], list[int]] = {}
    for name in _REASONS:
        for row in rows:
            if row.cells[name]:
                kinds.setdefault(_kind(name, row, records), []).extend(row.indices)
    numbers = {kind: str(number) for number, kind in enumerate(kinds, start=1)}
    for row in rows:
        why = [numbers[_kind(name, row, records)] for name in _REASONS if row.cells[name]]
        texts = [*(row.cells[name] for name in names), " ".join(why)]
        table.add_row(*(Text(text, overflow="fold") for text in texts))
    reasons = [
        (numbers[kind], _reason(kind[0], [records[index] for index in indices]))
        for kind, indices in kinds.items()
    ]
    return [table, Text("why"), _listing(reasons), Text()]


def _kind(name: str, row: Row, records: Sequence[Record]) -> tuple[str, Hashable]:
    """Reasons of one kind share a line; numbers that columns show tell none apart."""
    parts = records[row.indices[0]]["initialization_parts"]
    return name, kind_of(parts) if name == "why std" else row.cells[name]


def _reason(name: str, same: Sequence[Record]) -> str:
    if name == "optimizer":
        return same[0].get(name, "")
    if name == "why lr":
        return same[0]["learning_rate_reason"]
    return reason_text([record["initialization_parts"] for record in same])


def _listing(items: Iterable[tuple[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for mark, text in items:
        table.add_row(mark, Text(text, overflow="fold"))
    return table
