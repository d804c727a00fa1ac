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

from archscale_jax._reporting.names import (
    NUMBER,
    blocks_of,
    grouped,
    merged_path,
    pattern_of,
    range_of,
)

Record = Mapping[str, Any]

MAX_ROWS = 60
"""Tables that would be longer join rows that differ in standard deviation alone."""

_WIDTH = 120  # where there is no terminal
_FLEXIBLE = ("init std", "why std")
_REASONS = ("why std", "why factor")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      cells: its texts by column.
      indices: of the records that it stands for.
    """

    cells: dict[str, str]
    indices: list[int]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Returns the rows of a table: repeated layers share one.

    Records share a row if they are equal, as shown, up to numbers in the path. If there are more
    than `MAX_ROWS` such rows, rows that differ in the standard deviation alone show its range.
    """
    cells = _cells(records)
    rows = _rows(cells, ())
    return rows if len(rows) <= MAX_ROWS else _rows(cells, _FLEXIBLE)


def text_of(header: Sequence[str], records: Sequence[Record], notes: Sequence[str]) -> str:
    """Returns a report as text that fits the terminal, or 120 columns."""
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False)
    for line in header:
        console.print(Text(line, overflow="fold"))
    for part in [*_text_tables(rows_of(records)), _listing(("•", note) for note in notes)]:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def html_of(header: Sequence[str], records: Sequence[Record], notes: Sequence[str]) -> str:
    """Returns a report as HTML for notebooks: text escaped, in the colours of the page."""
    rows = rows_of(records)
    columns = _columns(rows)
    line = "border-bottom: 1px solid rgba(128, 128, 128, 0.4)"
    cell = f"padding: 0.15em 0.7em; vertical-align: top; color: inherit; {line}"

    def row_of(tag: str, texts: Iterable[str]) -> str:
        shown = map(html.escape, texts)
        parts = [
            f'<{tag} style="{cell}; text-align: {_side(name)}">{text}</{tag}>'
            for name, text in zip(columns, shown, strict=True)
        ]
        return "<tr>" + "".join(parts) + "</tr>"

    body = "".join(row_of("td", (row.cells[name] for name in columns)) for row in rows)
    style = "border-collapse: collapse; margin: 0.7em 0; background: transparent"
    head = f'<table style="{style}"><thead>{row_of("th", columns)}</thead><tbody>'
    return (
        '<div style="color: inherit; background: transparent; overflow-x: auto">'
        + "".join(f"<div>{html.escape(line)}</div>" for line in header)
        + (f"{head}{body}</tbody></table>" if rows else "")
        + "<ul>"
        + "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        + "</ul></div>"
    )


def _side(name: str) -> str:
    return "right" if name in ("kernel", "d_in", "init std", "lr factor") else "left"


def _cells(records: Sequence[Record]) -> list[dict[str, str]]:
    several = len({record["learning_rate_reason"] for record in records}) > 1

    def cells(record: Record) -> dict[str, str]:
        role, layer = record["role"], record["layer"]
        return {
            "path": record["path"],
            "role": role if layer in (role, "hidden") else f"{role} ({layer})",
            "shape": "×".join(map(str, record["shape"])) or "scalar",
            "fans": f"{record['fan_in']}→{record['fan_out']}",
            "kernel": str(record["kernel_size"]),
            "d_in": _degrees(record["source_in_degree"], record["in_degree"]),
            "init std": _number_text(record["standard_deviation"]),
            "lr factor": _number_text(record["learning_rate_factor"]),
            "why std": record["initialization_reason"],
            "why factor": record["learning_rate_reason"] if several else "",
        }

    return [cells(record) for record in records]


def _degrees(source: Any, target: Any) -> str:
    """In-degrees of the ends of an edge, or of edges."""
    if target is None:
        return ""
    ends = [
        end if isinstance(end, tuple) else (end,) for end in (source, target) if end is not None
    ]
    return "→".join(",".join(map(str, end)) for end in ends)


def _number_text(value: float | tuple[float, ...] | None) -> str:
    """A number; of several, as of a stack, the smallest and the largest."""
    if isinstance(value, tuple):
        return " to ".join(f"{one:.3g}" for one in (min(value), max(value)))
    return "" if value is None else f"{value:.3g}"


def _columns(rows: Sequence[Row]) -> list[str]:
    """The columns to show: kernel sizes and reasons only where there are some."""
    optional = {"kernel": "1", "why std": "", "why factor": ""}
    names = rows[0].cells if rows else ()
    return [name for name in names if any(row.cells[name] != optional.get(name) for row in rows)]


def _text_tables(rows: Sequence[Row]) -> list[RenderableType]:
    """The table with numbers for the reasons, and the reasons."""
    if not rows:
        return []
    names = [name for name in _columns(rows) if name not in _REASONS]
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in (*names, "why"):
        # Columns that may be folded give way to those that hold numbers.
        justify, folded = "right" if _side(name) == "right" else "left", name in ("path", "role")
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not folded)
    kinds: dict[Hashable, list[str]] = {}
    for name in _REASONS:
        for row in rows:
            if row.cells[name]:
                kinds.setdefault(_kind(name, row), []).append(row.cells[name])
    numbers = {kind: str(number) for number, kind in enumerate(kinds, start=1)}
    for row in rows:
        why = [numbers[kind] for kind in (_kind(name, row) for name in _REASONS) if kind in numbers]
        texts = [*(row.cells[name] for name in names), " ".join(why)]
        table.add_row(*(Text(text, overflow="fold") for text in texts))
    reasons = _listing((numbers[kind], range_of(texts)) for kind, texts in kinds.items())
    return [table, Text("why"), reasons, Text()]


def _kind(name: str, row: Row) -> Hashable:
    """Reasons of one kind share a line; numbers that columns show tell none apart."""
    text = row.cells[name]
    return name, tuple(NUMBER.split(text)) if name in _FLEXIBLE else text


def _listing(items: Iterable[tuple[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for mark, text in items:
        table.add_row(mark, Text(text, overflow="fold"))
    return table


def _rows(cells: Sequence[dict[str, str]], ranging: Sequence[str]) -> list[Row]:
    """Rows of cells that are equal up to numbers in the path and in columns that show ranges."""

    def key(index: int) -> Hashable:
        between = {name: tuple(NUMBER.split(cells[index][name])) for name in ranging}
        return tuple(
            ({**cells[index], **between, "path": pattern_of(cells[index]["path"])}).items()
        )

    rows = []
    for indices in grouped(range(len(cells)), key):
        for part in blocks_of([cells[index]["path"] for index in indices]):
            found = [cells[indices[place]] for place in part]
            merged = {name: range_of([one[name] for one in found]) for name in ranging}
            merged["path"] = merged_path([one["path"] for one in found])
            rows.append(Row({**found[0], **merged}, [indices[place] for place in part]))
    return rows
