"""What is written beside the edges: which layer it is, and what it computes."""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._graph import Operator


class Layer(NamedTuple):
    """What is written of one layer.

    Attributes:
      name: the folder of its parameters, such as `block0/conv1`; "" without parameters.
      text: what it computes, such as `3×3 convolution, 64→128`; "" for skips and joins.
      operator: what it is.
      reads: whether it reads features; embedded positions and tokens do not.
    """

    name: str
    text: str
    operator: Operator
    reads: bool = True


def edge_layers(architecture: Architecture) -> list[Layer]:
    """Returns the layer of every edge [E]."""
    leaves: list[list[Parameter]] = [[] for _ in architecture.graph.senders]
    for leaf in architecture.parameters:
        for edge in dict.fromkeys(_edges(leaf)):
            leaves[edge].append(leaf)
    columns = (architecture.graph.edges[key].tolist() for key in ("operator", "kernel_size"))
    return [
        _edge_layer(architecture, members, edge, Operator(operator), kernel_size)
        for edge, (members, operator, kernel_size) in enumerate(zip(leaves, *columns, strict=True))
    ]


def outer_layers(architecture: Architecture, place: Role) -> list[Layer]:
    """Returns the layers of the stem (INPUT) or the readout; those that read features come first.

    A table that is the readout's weight too is a layer of both.
    """
    leaves = [leaf for leaf in architecture.parameters if leaf.edge is None or leaf.is_tied]
    groups = _groups([leaf for leaf in leaves if leaf.layer == place])
    if place == Role.INPUT:
        groups += [[leaf] for leaf in leaves if leaf.is_tied and leaf.edge is None]
    layers = []
    for members in groups:
        weight = _weight(members) or members[0]
        pointwise = len(weight.shape) > 3 and weight.shape.count(1) > 1  # a 1×1 convolution
        operator = Operator.CONV if pointwise or weight.kernel_positions > 1 else Operator.LINEAR
        text = _weight_text(weight, operator)
        if place == Role.READOUT and weight.role == Role.EMBEDDING:
            text = f"linear {weight.fan_out}→{math.prod(weight.shape) // weight.fan_out}"
        text += ", shared" if weight.is_tied else ""
        reads = place == Role.READOUT or weight.role != Role.EMBEDDING or weight.fan_in == 1
        layers.append(Layer(_name(architecture, members), text, operator, reads))
    return sorted(layers, key=lambda layer: not layer.reads)


def vertex_layers(architecture: Architecture) -> list[str]:
    """Returns the names of the layers that belong to vertices: normalization for the most part."""
    folders: dict[str, list[Parameter]] = collections.defaultdict(list)
    for leaf in architecture.parameters:
        if leaf.edge is None and leaf.layer not in (Role.INPUT, Role.READOUT):
            folders[_folder(leaf.name) or leaf.name].append(leaf)
    return [_name(architecture, members) for members in folders.values()]


def _edge_layer(
    architecture: Architecture,
    members: Sequence[Parameter],
    edge: int,
    operator: Operator,
    kernel_size: int,
) -> Layer:
    name = _name(architecture, members) if members else ""
    weight = _weight(members)
    if operator == Operator.AVG_POOL:
        kernel = f"{kernel_size}×{kernel_size} " if kernel_size > 1 else ""
        return Layer(name, f"{kernel}average pool", operator)
    if weight is None:
        convolution = f"{kernel_size}×{kernel_size} convolution"
        text = {Operator.LINEAR: "linear", Operator.CONV: convolution}.get(operator, "")
        return Layer(name, text, operator)
    slices = _slices(weight)
    text = _weight_text(weight, operator, slices)
    if slices > 1:
        name += f"[{_edges(weight).index(edge)}]"
    elif weight.further_edges or weight.is_tied:
        text += ", shared"
    return Layer(name, text, operator)


def _weight_text(weight: Parameter, operator: Operator, slices: int = 1) -> str:
    """What a weight computes; its widths follow from its size and fans, however its axes lie."""
    if weight.role == Role.EMBEDDING and weight.fan_in > 1:
        return "embedding " + "×".join(str(length) for length in weight.shape if length > 1)
    size = math.prod(weight.shape) // slices
    if weight.role == Role.EMBEDDING:
        return f"embedding {size // weight.fan_out}→{weight.fan_out}"
    widths = f"{max(size // weight.fan_out, 1)}→{max(size // weight.fan_in, 1)}"
    if operator != Operator.CONV:
        return f"linear {widths}"
    q, positions = weight.kernel_size, weight.kernel_positions
    kernels = {q: f"{q}-wide", q**3: f"{q}×{q}×{q}", q**2: f"{q}×{q}"}
    kernel = kernels.get(positions, f"{positions}-point")
    groups = size * positions // (weight.fan_in * weight.fan_out)
    return f"{kernel} convolution, {widths}" + (f", {groups} groups" if groups > 1 else "")


def _slices(weight: Parameter) -> int:
    """The number of layers whose weights are stacked in a leaf; 1 where they share one."""
    layers = len(_edges(weight))
    ratio = math.prod(weight.shape) * weight.kernel_positions // (weight.fan_in * weight.fan_out)
    stacked = layers > 1 and weight.shape[:1] == (layers,) and ratio and ratio % layers == 0
    return layers if stacked else 1


def _groups(leaves: Sequence[Parameter]) -> list[list[Parameter]]:
    """One group for every weight, with the biases of its folder."""
    groups = [[leaf] for leaf in leaves if _weight([leaf])]
    for leaf in leaves:
        if not _weight([leaf]):
            near = [group for group in groups if _folder(group[0].name) == _folder(leaf.name)]
            if near or groups:
                (near or groups)[0].append(leaf)
            else:
                groups.append([leaf])
    return groups


def _edges(leaf: Parameter) -> list[int]:
    return [edge for edge in (leaf.edge, *leaf.further_edges) if edge is not None]


def _weight(members: Sequence[Parameter]) -> Parameter | None:
    return next((leaf for leaf in members if leaf.role not in (Role.BIAS, Role.SCALE)), None)


def _name(architecture: Architecture, members: Sequence[Parameter]) -> str:
    """The folder that holds the leaves of a layer and no others, or else its weight's name."""
    names = {leaf.name for leaf in members}
    levels = zip(*(_folder(name).split("/") for name in names), strict=False)
    common = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    folder = "/".join(level[0] for level in common)
    inside = {leaf.name for leaf in architecture.parameters if leaf.name.startswith(f"{folder}/")}
    if folder and inside <= names:
        return folder
    return (_weight(members) or members[0]).name


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
