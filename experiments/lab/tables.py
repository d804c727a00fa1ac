"""Tables of studies: data frames of results, and of the texts that a report shows.

A study puts what it found into a frame (`frame_of`), lets pandas group and reduce it, and ends with
a frame of texts, which `markdown` prints and `experiments.lab.page` shows. Lists of rows, the
heading first, do as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

NONE = "–"
"""What stands where there is no number."""

Table = pd.DataFrame | Sequence[Sequence[str]]


def frame_of(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the finished trials of a study, a row each: settings and results as columns.

    Failed trials, whose records hold an `error`, are left out. Of a name that both have, the column
    is the result's.
    """
    return pd.DataFrame([{**one["trial"], **one["result"]} for one in records if "result" in one])


def lines_of(table: Table, caption: str = "") -> list[list[str]]:
    """Returns a table as rows of texts, the heading first; the index of a frame is not shown.

    Raises:
      ValueError: a row of another length than the heading, by the caption.
    """
    if isinstance(table, pd.DataFrame):
        heading = list(map(str, table.columns))
        return [heading, *(list(map(str, row)) for row in table.itertuples(index=False))]
    heading, *rows = ([str(cell) for cell in row] for row in table)
    for row in rows:
        if len(row) != len(heading):
            raise ValueError(
                f"table {caption!r} has {len(heading)} columns, and a row of {len(row)}: {row}"
            )
    return [heading, *rows]


def markdown(table: Table) -> str:
    """Returns a table as aligned Markdown; its first column holds texts, others numbers."""
    heading, *rows = (
        [cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines_of(table)
    )
    widths = [max(3, *(len(row[column]) for row in [heading, *rows]))
              for column in range(len(heading))]  # fmt: skip
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |\n"

    return "".join(map(line, [heading, rule, *rows]))


def number(value: float | None, spec: str = ".2f", missing: str = NONE) -> str:
    """Returns a number as a text; `missing` where it is None or not finite."""
    return missing if value is None or not math.isfinite(value) else format(value, spec)


def spread(values: Sequence[float], spec: str = ".1f", *, ddof: int = 0) -> str:
    """Returns mean ± standard deviation, of one value the mean alone; – of none.

    A deviation of a population (`ddof=0`) is known of one value too, 0.
    """
    if not len(values):
        return NONE
    mean = format(np.mean(values), spec)
    if len(values) <= ddof:
        return mean
    return f"{mean} ± {format(np.std(values, ddof=ddof), spec.lstrip('+').lstrip('z'))}"
