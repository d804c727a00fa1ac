"""DAG strings such as `2_02_002` [AAS §3.1] to graphs and back.

Groups separated by `_` are the vertices 1, 2, …; character u of group v is the operator on the
edge u->v: `0` zero, `1` skip, `2` linear or, with a kernel size, convolution.
"""

import jraph
import numpy as np

from archscale_jax._graph import WEIGHT_OPERATORS, Operator, build_graph, number_of_vertices


def dag_graph(text: str, *, kernel_size: int | None = None) -> jraph.GraphsTuple:
    """Parses a DAG string of any size.

    Args:
      text: the string; V vertices make V-1 groups of 1, 2, …, V-1 characters.
      kernel_size: None for linear edges, else the spatial size q of the convolutions.

    Returns:
      The graph, without the stem before vertex 0 and the readout behind the last vertex.

    Raises:
      TypeError: `text` is not a string, or `kernel_size` not an integer.
      ValueError: a group of the wrong length, an unknown character, a kernel size below 1, or no
        path from input to output.
    """
    if not isinstance(text, str):
        raise TypeError(f"a DAG string must be a str, found {type(text).__name__}")
    if kernel_size is None:
        weight = Operator.LINEAR
    elif isinstance(kernel_size, bool) or not isinstance(kernel_size, int | np.integer):
        raise TypeError(f"kernel_size must be an int or None, found {kernel_size!r}")
    elif not 1 <= kernel_size <= np.iinfo(np.int32).max:
        raise ValueError(f"kernel_size is {kernel_size}; accepted are 32-bit integers from 1")
    else:
        weight = Operator.CONV
    if "|" in text:
        raise ValueError(f"DAG string {_shown(text)} is written as a cell; cell_graph reads cells")
    operators = {"1": Operator.SKIP, "2": weight}
    groups = text.split("_")
    edges = []
    for receiver, group in enumerate(groups, start=1):
        if len(group) != receiver:
            raise ValueError(
                f"group {receiver} of DAG string {_shown(text)} is {_shown(group)}; accepted is "
                f"one character for each of the vertices 0 to {receiver - 1}, and _ between groups"
            )
        for sender, character in enumerate(group):
            if character in operators:
                edges.append((sender, receiver, operators[character]))
            elif character != "0":
                raise ValueError(
                    f"edge {sender}->{receiver} of DAG string {_shown(text)} is {character!r}; "
                    "accepted are 0 (zero), 1 (skip) and 2 (weight)"
                )
    senders, receivers, kinds = np.array(edges, np.int32).reshape(-1, 3).T
    kernel_sizes = np.where(kinds == weight, kernel_size or 1, 1)
    try:
        return build_graph(
            len(groups) + 1,
            senders,
            receivers,
            kinds,
            kernel_sizes,
            network_kernel=kernel_size or 0,
        )
    except ValueError as error:
        raise ValueError(f"DAG string {_shown(text)}: {error}") from None


def dag_string(graph: jraph.GraphsTuple) -> str:
    """Prints a graph as a DAG string; `dag_graph` reads it back, given the kernel size.

    Raises:
      ValueError: the graph has an operator that DAG strings lack (pooling), parallel edges, or
        weight edges that differ in operator or kernel size.
    """
    weights = {
        (int(operator), int(kernel_size))
        for operator, kernel_size in zip(
            graph.edges["operator"], graph.edges["kernel_size"], strict=True
        )
        if operator in WEIGHT_OPERATORS
    }
    if len(weights) > 1:
        raise ValueError(
            "a DAG string holds one kind of weight edge; the graph has operators and kernel sizes "
            f"{sorted(weights)}"
        )
    characters = {Operator.SKIP: "1"} | dict.fromkeys(WEIGHT_OPERATORS, "2")
    groups = [["0"] * vertex for vertex in range(1, number_of_vertices(graph))]
    columns = (graph.senders, graph.receivers, graph.edges["operator"])
    for sender, receiver, operator in zip(*(column.tolist() for column in columns), strict=True):
        if operator not in characters:
            raise ValueError(
                f"edge {sender}->{receiver} is {Operator(operator).name}; a DAG string holds only "
                "SKIP, LINEAR and CONV"
            )
        if groups[receiver - 1][sender] != "0":
            raise ValueError(f"a DAG string holds one edge {sender}->{receiver}, the graph several")
        groups[receiver - 1][sender] = characters[operator]
    return "_".join("".join(group) for group in groups)


def chain_string(depth: int) -> str:
    """Returns the DAG string of the plain chain of `depth` weight edges: `2`, `2_02`, ….

    Raises:
      ValueError: `depth` is not an integer from 1.
    """
    if not isinstance(depth, int | np.integer) or depth < 1:
        raise ValueError(f"depth must be an integer from 1, the weight edges, found {depth!r}")
    return "_".join("0" * vertex + "2" for vertex in range(depth))


def _shown(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
