"""The architecture graph of a whole `CellNetwork`, its parameters bound to it.

Vertex 0 is the normalized stem. A cell adds its vertices 1 to 3, and its vertex 0 is the last one
before it. A reduction adds three: the halved features, the pooled ones, and their sum.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._graph import WEIGHT_OPERATORS, Operator, Space, build_graph
from archscale_jax._spaces.cell import CELL_EDGES, OPERATORS


class _Edge(NamedTuple):
    sender: int
    receiver: int
    operator: Operator
    kernel_size: int
    layer: str = ""  # path of the module whose kernel it holds


def network_architecture(
    digits: Sequence[int], cells_per_stage: Sequence[int], leaves: Mapping[str, Any]
) -> Architecture:
    """Returns the architecture of a `CellNetwork`.

    Args:
      digits: of its cell, in the order of `CELL_EDGES`.
      cells_per_stage: number of cells in every stage.
      leaves: its parameters by name.

    Raises:
      ValueError: no path joins input and output.
    """
    edges = sorted(_edges(digits, cells_per_stage), key=lambda edge: (edge.receiver, edge.sender))
    columns = [list(column) for column in zip(*edges, strict=True)][:4]
    last = 3 * sum(count + 1 for count in cells_per_stage) - 3
    graph = build_graph(last + 1, *columns, space=Space.CELL_NETWORK)
    index = {edge.layer: number for number, edge in enumerate(edges) if edge.layer}
    return Architecture(graph, tuple(_parameter(name, leaves, index) for name in leaves))


def _edges(digits: Sequence[int], cells_per_stage: Sequence[int]) -> list[_Edge]:
    edges: list[_Edge] = []
    last = 0
    for stage, count in enumerate(cells_per_stage):
        if stage:
            where = f"reductions/{stage - 1}"
            halved, pooled, output = range(last + 1, last + 4)
            edges += [
                _Edge(last, halved, Operator.CONV, 3, f"{where}/convolution_a"),
                _Edge(last, pooled, Operator.AVG_POOL, 2),
                _Edge(halved, output, Operator.CONV, 3, f"{where}/convolution_b"),
                _Edge(pooled, output, Operator.CONV, 1, f"{where}/shortcut"),
            ]
            last = output
        for cell in range(count):
            for (sender, receiver), digit in zip(CELL_EDGES, digits, strict=True):
                if digit:
                    operator, size = OPERATORS[digit]
                    where = f"stages/{stage}/{cell}/edges/{sender}_{receiver}/convolution_{size}"
                    layer = where if operator in WEIGHT_OPERATORS else ""
                    edges.append(_Edge(last + sender, last + receiver, operator, size, layer))
            last += 3
    return edges


def _parameter(name: str, leaves: Mapping[str, Any], index: Mapping[str, int]) -> Parameter:
    module, _, leaf = name.rpartition("/")
    shape = leaves[name].shape
    if module == "readout":
        fan_in, fan_out = leaves["readout/kernel"].shape
        role = Role.READOUT if leaf == "kernel" else Role.BIAS
        return Parameter(name, role, Role.READOUT, shape, fan_in, fan_out)
    layer = Role.INPUT if module.startswith("stem") else Role.HIDDEN
    if leaf != "kernel":
        role = {"scale": Role.SCALE, "bias": Role.BIAS}[leaf]
        return Parameter(name, role, layer, shape, shape[-1], shape[-1])
    *kernel, fan_in, fan_out = shape
    positions = math.prod(kernel)
    return Parameter(
        name,
        layer,
        layer,
        shape,
        fan_in * positions,
        fan_out * positions,
        kernel_size=max(kernel),
        kernel_positions=positions,
        edge=index.get(module),
        activated=not module.endswith("shortcut"),  # it reads means of features as they are
    )
