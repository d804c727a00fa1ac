"""Where the vertices and lines of a picture stand: rows downwards, lanes side by side.

The chain with most weights is straight, in lane 0. Lines that leave it and come back to it run on
its left, branches with vertices of their own on its right. Shorter ones run in the inner lanes, so
that none crosses another that it lies within.
"""

import collections
import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""First and last row."""

Row = tuple[str, int]
"""("vertex", its number) or ("line", index of a marked line)."""


class Line(NamedTuple):
    """A line of the picture, from one vertex down to a later one.

    Attributes:
      sender: number of the vertex where it begins.
      receiver: number of the vertex where it ends.
      weight: whether it carries a weight.
      marked: whether it has a mark, and so a row of its own.
    """

    sender: int
    receiver: int
    weight: bool
    marked: bool


class Layout(NamedTuple):
    """Rows and lanes; lanes are numbered from the left, that of the chain is 0.

    Attributes:
      rows: what stands in every row, from the top.
      columns: lane of every vertex.
      lanes: lane in which every line runs between those of its sender and its receiver.
    """

    rows: list[Row]
    columns: list[int]
    lanes: list[int]


class _Chain(NamedTuple):
    vertices: list[int]
    lines: list[int]


def arrange(num_vertices: int, lines: Sequence[Line]) -> Layout:
    """Gives vertices, which are numbered in a topological order, and lines their places.

    Args:
      num_vertices: number of vertices V; a path joins the first and the last.
      lines: the lines between them, in any order.

    Returns:
      The layout; vertices stand in their order, the mark of a line above its receiver.
    """
    chain = _heaviest_chain(range(num_vertices), lines, 0, num_vertices - 1)
    rows = _rows(num_vertices, lines, chain)
    row_of = {vertex: row for row, (kind, vertex) in enumerate(rows) if kind == "vertex"}
    spans = [(row_of[line.sender], row_of[line.receiver]) for line in lines]
    columns, lanes = [0] * num_vertices, dict.fromkeys(chain.lines, 0)

    straight = set(chain.vertices)
    beside = [
        index
        for index, line in enumerate(lines)
        if index not in lanes and {line.sender, line.receiver} <= straight
    ]
    for index, lane in zip(beside, _nested([spans[index] for index in beside]), strict=True):
        lanes[index] = -lane

    branches = _branches(set(range(num_vertices)) - straight, lines)
    extents = []
    for branch in branches:
        ends = [row_of[vertex] for vertex in branch.vertices]
        ends += [row for index in branch.lines for row in spans[index]]
        extents.append((min(ends), max(ends)))
    taken: dict[int, list[Span]] = collections.defaultdict(list)
    for branch, extent, lane in zip(branches, extents, _nested(extents), strict=True):
        taken[lane].append(extent)
        lanes |= dict.fromkeys(branch.lines, lane)
        for vertex in branch.vertices:
            columns[vertex] = lane

    others = [index for index in range(len(lines)) if index not in lanes]
    for index in sorted(others, key=lambda index: _length(spans[index])):
        preferred = [columns[vertex] for vertex in lines[index][:2] if columns[vertex]]
        lanes[index] = next(
            lane
            for lane in itertools.chain(preferred, itertools.count(1))
            if not any(_overlap(spans[index], span) for span in taken[lane])
        )
        taken[lanes[index]].append(spans[index])
    return Layout(rows, columns, [lanes[index] for index in range(len(lines))])


def _heaviest_chain(
    vertices: Collection[int],
    lines: Sequence[Line],
    first: int | None = None,
    last: int | None = None,
) -> _Chain:
    """The vertices and lines of the path with most weights, of these the one with most lines."""
    best = {vertex: (0, 0, -1) for vertex in vertices if first is None or vertex == first}
    for index in sorted(range(len(lines)), key=lambda index: lines[index].receiver):
        sender, receiver, weight, _ = lines[index]
        if sender in best and receiver in vertices:
            weights, count, _ = best[sender]
            reached = (weights + weight, count + 1)
            if receiver not in best or reached > best[receiver][:2]:
                best[receiver] = (*reached, index)
    vertex = max(best, key=lambda vertex: (best[vertex][:2], -vertex)) if last is None else last
    chain = _Chain([vertex], [])
    while best[vertex][2] >= 0:
        chain.lines.insert(0, best[vertex][2])
        vertex = lines[chain.lines[0]].sender
        chain.vertices.insert(0, vertex)
    return chain


def _rows(num_vertices: int, lines: Sequence[Line], chain: _Chain) -> list[Row]:
    incoming: list[list[int]] = [[] for _ in range(num_vertices)]
    for index, line in enumerate(lines):
        if line.marked:
            incoming[line.receiver].append(index)
    rows: list[Row] = []
    for vertex, marks in enumerate(incoming):
        marks.sort(key=lambda index: (index not in chain.lines, -lines[index].sender))
        rows += [("line", index) for index in marks] + [("vertex", vertex)]
    return rows


def _branches(vertices: set[int], lines: Sequence[Line]) -> list[_Chain]:
    """Splits vertices into chains, each with a line that leads in and one that leads out."""
    branches: list[_Chain] = []
    used: set[int] = set()
    while vertices:
        branch = _heaviest_chain(vertices, lines)
        free = set(range(len(lines))) - used
        into = [index for index in free if lines[index].receiver == branch.vertices[0]]
        out = [index for index in free if lines[index].sender == branch.vertices[-1]]
        if into:
            branch.lines.append(max(into, key=lambda index: (lines[index].sender, -index)))
        if out:
            branch.lines.append(min(out, key=lambda index: (lines[index].receiver, index)))
        used |= set(branch.lines)
        vertices = vertices - set(branch.vertices)
        branches.append(branch)
    return sorted(branches, key=lambda branch: branch.vertices)


def _nested(spans: Sequence[Span]) -> list[int]:
    """Lanes from 1; of spans that overlap, the longer one is further outside."""
    lanes: dict[int, int] = {}
    for index in sorted(range(len(spans)), key=lambda index: _length(spans[index])):
        near = [lane for other, lane in lanes.items() if _overlap(spans[index], spans[other])]
        lanes[index] = 1 + max(near, default=0)
    return [lanes[index] for index in range(len(spans))]


def _length(span: Span) -> int:
    return span[1] - span[0]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
