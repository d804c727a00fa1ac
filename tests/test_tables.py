"""Tables of studies as texts."""

import math

import pandas as pd
import pytest

from experiments.lab import tables


@pytest.mark.parametrize("as_frame", [False, True])
def test_markdown_is_aligned_and_one_line_a_row(as_frame):
    rows = [["name", "a"], ["a|b\nc", "1.5"], ["d", "–"]]
    table = pd.DataFrame(rows[1:], columns=rows[0]) if as_frame else rows
    assert tables.markdown(table).splitlines() == [
        r"| name   |   a |",
        r"| ------ | --: |",
        r"| a\|b c | 1.5 |",
        r"| d      |   – |",
    ]


def test_rows_of_another_length_are_named():
    with pytest.raises(ValueError, match="table 'T' has 2 columns, and a row of 1"):
        tables.lines_of([["a", "b"], ["1"]], "T")


def test_numbers_and_spreads():
    assert tables.number(1.234) == "1.23" and tables.number(math.nan) == tables.NONE
    assert tables.number(None, missing="diverged") == "diverged"
    assert tables.spread([1.0, 3.0]) == "2.0 ± 1.0"
    assert tables.spread([1.0, 3.0], "+.1f", ddof=1) == "+2.0 ± 1.4"
    assert tables.spread([1.0], ddof=1) == "1.0" and tables.spread([]) == tables.NONE
