"""NAS-Bench-201 cells to graphs and back, in both notations.

The benchmark writes `|nor_conv_3x3~0|+|skip_connect~0|none~1|+|…~0|…~1|…~2|`; the authors of [AAS]
write the same cell as a code of digits in the same order, `3_10_…`, with 0 none, 1 skip_connect,
2 nor_conv_1x1, 3 nor_conv_3x3, 4 avg_pool_3x3. A nor_conv edge is ReLU, convolution, batch norm.
"""

import jraph
import numpy as np

from archscale_jax._graph import Operator, Space, build_graph, number_of_vertices

OPERATION_NAMES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""Operation names; the position is the digit in a code."""

NUM_CELL_VERTICES = 4

STEM_KERNEL_SIZE = 3
"""Kernel size of the benchmark's stem, the largest in the network whatever the cell."""

CELL_EDGES = tuple(
    (sender, receiver) for receiver in range(1, NUM_CELL_VERTICES) for sender in range(receiver)
)
"""Source and target of every edge of a cell, in the order of a code's digits."""

OPERATORS = {  # digit -> operator, kernel size
    1: (Operator.SKIP, 1),
    2: (Operator.CONV, 1),
    3: (Operator.CONV, 3),
    4: (Operator.AVG_POOL, 3),
}
_DIGITS = {operator: digit for digit, operator in OPERATORS.items()}


def cell_graph(text_or_code: str) -> jraph.GraphsTuple:
    """Parses a NAS-Bench-201 cell of four vertices in either notation.

    Args:
      text_or_code: a code such as `3_34_131`, or the benchmark's string.

    Returns:
      The graph of one cell; its `globals` mark the space as `Space.CELL`.

    Raises:
      TypeError: the argument is not a string.
      ValueError: malformed text, an unknown operation, or no path from input to output.
    """
    edges = [
        (sender, receiver, *OPERATORS[digit])
        for receiver, group in enumerate(cell_digits(text_or_code), start=1)
        for sender, digit in enumerate(group)
        if digit
    ]
    columns = np.array(edges, np.int32).reshape(-1, 4).T
    try:
        return build_graph(
            NUM_CELL_VERTICES, *columns, network_kernel=STEM_KERNEL_SIZE, space=Space.CELL
        )
    except ValueError as error:
        raise ValueError(f"cell {text_or_code!r}: {error}") from None


def cell_digits(text_or_code: str) -> list[list[int]]:
    """Reads a cell in either notation, one without a path from input to output as well.

    Returns:
      The digit of the edge sender -> receiver at `[receiver - 1][sender]`.

    Raises:
      TypeError: the argument is not a string.
      ValueError: malformed text, or an unknown operation.
    """
    if not isinstance(text_or_code, str):
        raise TypeError(f"a cell must be a str, found {type(text_or_code).__name__}")
    read = _digits_of_string if "|" in text_or_code else _digits_of_code
    return read(text_or_code)


def cell_code(graph: jraph.GraphsTuple) -> str:
    """Prints a cell as a code of digits; `cell_graph` reads it back.

    Raises:
      ValueError: the graph is not a cell of this space.
    """
    return code_of_digits(_digits_of_graph(graph))


def cell_string(graph: jraph.GraphsTuple) -> str:
    """Prints a cell in the benchmark's notation; `cell_graph` reads it back.

    Raises:
      ValueError: the graph is not a cell of this space.
    """
    return string_of_digits(_digits_of_graph(graph))


def code_of_digits(digits: list[list[int]]) -> str:
    """Prints the digits of a cell as a code."""
    return "_".join("".join(map(str, group)) for group in digits)


def string_of_digits(digits: list[list[int]]) -> str:
    """Prints the digits of a cell in the benchmark's notation."""
    return "+".join(
        "|" + "".join(f"{OPERATION_NAMES[digit]}~{sender}|" for sender, digit in enumerate(group))
        for group in digits
    )


def _digits_of_code(code: str) -> list[list[int]]:
    groups = code.split("_")
    if [len(group) for group in groups] != list(range(1, NUM_CELL_VERTICES)):
        raise ValueError(
            f"cell code {code[:60]!r}; accepted are groups of 1, 2 and 3 digits: '3_34_131'"
        )
    for group in groups:
        for character in group:
            if character not in "01234":
                raise ValueError(
                    f"cell code {code!r} has the operation {character!r}; accepted are "
                    + ", ".join(f"{digit} ({name})" for digit, name in enumerate(OPERATION_NAMES))
                )
    return [[int(character) for character in group] for group in groups]


def _digits_of_string(text: str) -> list[list[int]]:
    groups = text.split("+")
    if len(groups) != NUM_CELL_VERTICES - 1:
        raise ValueError(
            f"cell {text[:60]!r} has {len(groups)} vertex groups; accepted are 3, joined by +"
        )
    digits: list[list[int]] = []
    for receiver, group in enumerate(groups, start=1):
        entries = group.split("|")
        if len(entries) != receiver + 2 or entries[0] or entries[-1]:
            raise ValueError(
                f"group {receiver} of cell {text[:200]!r} is {group[:60]!r}; accepted are "
                f"{receiver} entries |operation~vertex|"
            )
        digits.append([])
        for sender, entry in enumerate(entries[1:-1]):
            name, _, vertex = entry.partition("~")
            if name not in OPERATION_NAMES or vertex != str(sender):
                raise ValueError(
                    f"entry {entry[:60]!r} of cell {text[:200]!r}; accepted is one of "
                    f"{', '.join(OPERATION_NAMES)} followed by ~{sender}"
                )
            digits[-1].append(OPERATION_NAMES.index(name))
    return digits


def _digits_of_graph(graph: jraph.GraphsTuple) -> list[list[int]]:
    if number_of_vertices(graph) != NUM_CELL_VERTICES:
        raise ValueError(
            f"a cell has {NUM_CELL_VERTICES} vertices, found {number_of_vertices(graph)}"
        )
    groups = [[0] * vertex for vertex in range(1, NUM_CELL_VERTICES)]
    columns = (graph.senders, graph.receivers, graph.edges["operator"], graph.edges["kernel_size"])
    for sender, receiver, operator, kernel_size in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        digit = _DIGITS.get((Operator(operator), kernel_size))
        if digit is None:
            raise ValueError(
                f"edge {sender}->{receiver} is {Operator(operator).name} with kernel size "
                f"{kernel_size}; a cell holds only {', '.join(OPERATION_NAMES)}"
            )
        groups[receiver - 1][sender] = digit
    return groups
