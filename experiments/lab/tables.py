"""Tables of studies: data frames of the texts that a report shows.

A study lets pandas group and reduce what it found, and ends with a frame of texts, which `markdown`
writes and `experiments.lab.page` shows. Lists of rows, the heading first, do as well.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

NONE = "–"
"""What stands where there is no number."""

Table = pd.DataFrame | Sequence[Sequence[str]]


def lines_of(table: Table, caption: str = "") -> list[list[str]]:
    """Returns a table as rows of texts, the heading first; the index of a frame is not shown.

    Raises:
      ValueError: a row of another length than the heading, by the caption.
    """
    if not isinstance(table, Sequence):
        rows = [list(table.columns), *table.itertuples(index=False)]
        return [[str(cell) for cell in row] for row in rows]
    heading, *lines = ([str(cell) for cell in row] for row in table)
    for line in lines:
        if len(line) != len(heading):
            raise ValueError(
                f"table {caption!r} has {len(heading)} columns, and a row of {len(line)}: {line}"
            )
    return [heading, *lines]


def markdown(table: Table) -> str:
    """Returns a table as aligned Markdown; its first column holds texts, others numbers."""
    lines = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines_of(table)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for line in (lines[0], rule, *lines[1:]):
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        text += f"| {' | '.join(cells)} |\n"
    return text


def number(value: float | None, spec: str = ".2f", missing: str = NONE) -> str:
    """Returns a number as a text; `missing` where it is None or not finite."""
    return missing if value is None or not math.isfinite(value) else format(value, spec)


def spread(values: Sequence[float] | np.ndarray, spec: str = ".1f", *, ddof: int = 0) -> str:
    """Returns mean ± standard deviation; the mean alone of too few for one, – of no values."""
    if not len(values):
        return NONE
    mean = format(np.mean(values), spec)
    if len(values) <= ddof:
        return mean
    return f"{mean} ± {format(np.std(values, ddof=ddof), spec.lstrip('+z'))}"
