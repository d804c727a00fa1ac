"""An architecture: the graph of a network, and which parameter leaf belongs to which edge."""

import collections
import dataclasses
import enum
import functools
from collections.abc import Collection
from typing import Any

import jraph

from archscale_jax.graph import is_weight
from archscale_jax.refusals import unknown
from archscale_jax.trees import PyTree, named_leaves


class Role(enum.StrEnum):
    """What a parameter does in its network, as the initialization and width rules tell apart."""

    INPUT = "input"
    HIDDEN = "hidden"
    READOUT = "readout"
    BIAS = "bias"
    SCALE = "scale"
    EMBEDDING = "embedding"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(unknown("role", value, cls))


class Arrangement(enum.StrEnum):
    """What the vertices of a network sum (theory §3).

    PRE_ACTIVATION: z_v = Σ W σ(z_u), [AAS Eq. 1]. ACTIVATION: h_v = Σ σ(W h_u), the authors' code.
    """

    PRE_ACTIVATION = "pre_activation"
    ACTIVATION = "activation"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(unknown("arrangement", value, cls))


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter leaf.

    Attributes:
      name: path of the leaf in the params tree, `parameter_name` of its key path.
      role: what it does.
      layer: role of the layer it belongs to: INPUT (the stem), HIDDEN or READOUT; READOUT for an
        embedding that is the readout's weight too.
      shape: shape of the leaf.
      fan_in: inputs that reach one unit of its layer, the kernel's positions included.
      fan_out: units that one input of its layer reaches, the kernel's positions included.
      kernel_size: spatial size q of its layer, 1 for a dense layer.
      kernel_positions: number of spatial positions of the kernel, q² for an image.
      edge: index of its layer among the edges of the graph; None for the stem, the readout and
        normalization.
      further_edges: those of a leaf that is the weight of several layers, shared or stacked.
      activated: whether its layer reads activations, half of whose second moment ReLU takes; a
        hidden weight that reads features as they are gets half the variance.

    Raises:
      ValueError: an unknown role or layer, or a fan or size below 1.
    """

    name: str
    role: Role
    layer: Role
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    kernel_size: int = 1
    kernel_positions: int = 1
    edge: int | None = None
    further_edges: tuple[int, ...] = ()
    activated: bool = True

    @property
    def is_tied(self) -> bool:
        """Whether it is a table of embeddings and the readout's weight in one."""
        return self.role == Role.EMBEDDING and self.layer == Role.READOUT

    def __post_init__(self):
        where = f"parameter {self.name!r}"
        for field in ("role", "layer"):
            try:
                object.__setattr__(self, field, Role(getattr(self, field)))
            except ValueError:
                raise ValueError(
                    f"{where} has {field} {getattr(self, field)!r}; accepted are {', '.join(Role)}"
                ) from None
        object.__setattr__(self, "shape", tuple(self.shape))
        for field in ("fan_in", "fan_out", "kernel_size", "kernel_positions"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{where} has {field} {getattr(self, field)}; accepted are integers from 1"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """The graph of a network with its parameters bound to it.

    Attributes:
      graph: see `archscale_jax.graph`.
      parameters: one entry per leaf of the params tree.
      arrangement: what the vertices sum.

    Raises:
      ValueError: two parameters of one name, an edge that the graph does not have, a hidden weight
        without an edge or on an edge without weight, or an unknown arrangement.
    """

    graph: jraph.GraphsTuple
    parameters: tuple[Parameter, ...]
    arrangement: Arrangement = Arrangement.PRE_ACTIVATION

    def __post_init__(self):
        object.__setattr__(self, "arrangement", Arrangement(self.arrangement))
        weight = is_weight(self.graph)
        counts = collections.Counter(parameter.name for parameter in self.parameters)
        for parameter in self.parameters:
            if counts[parameter.name] > 1:
                raise ValueError(
                    f"{counts[parameter.name]} parameters are named {parameter.name!r}; names must "
                    "differ"
                )
            edges = (parameter.edge, *parameter.further_edges)
            for edge in edges:
                if edge is not None and not 0 <= edge < len(self.graph.senders):
                    raise ValueError(
                        f"parameter {parameter.name!r} belongs to edge {edge}; the graph has "
                        f"edges 0 to {len(self.graph.senders) - 1}"
                    )
                if parameter.role == Role.HIDDEN and (edge is None or not weight[edge]):
                    raise ValueError(
                        f"hidden weight {parameter.name!r} belongs to edge {edge}; accepted "
                        "is the index of a linear or convolution edge"
                    )

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {parameter.name: parameter.shape for parameter in self.parameters}


def check_architecture(value: object, hint: str = "") -> None:
    """Checks that a value is an `Architecture`.

    Args:
      value: what was passed as one.
      hint: what to do instead; by default, where an architecture comes from.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(value, Architecture):
        hint = hint or (
            "trace(function, params, *inputs) reads one, and the networks of archscale_jax.models "
            "have architecture()"
        )
        raise TypeError(f"expected an Architecture, found {type(value).__name__}; {hint}")


def check_leaf(architecture: Architecture, name: str, shape: tuple[int, ...]) -> None:
    """Checks that a leaf is a parameter of the architecture.

    Raises:
      ValueError: the architecture has no parameter of this name, or one of another shape.
    """
    shapes = architecture.shapes
    if name not in shapes:
        raise ValueError(
            f"params hold a leaf {name!r} of shape {shape} that the architecture does not know; it "
            f"knows {_listed(shapes)}. {_instead(name, shapes)}"
        )
    if tuple(shape) != shapes[name]:
        raise ValueError(
            f"parameter {name!r} has shape {tuple(shape)}; the architecture expects "
            f"{shapes[name]}. Pass the params of the network that it was read from"
        )


def check_parameters(
    architecture: Architecture, params: PyTree, *, masked: type | tuple[type, ...] = ()
) -> None:
    """Checks that the leaves of a params tree are the parameters of the architecture.

    Args:
      architecture: what the params should be.
      params: the params tree.
      masked: types of nodes that stand for the parameters at or below them (`optax.MaskedNode`).

    Raises:
      TypeError: no architecture, or a leaf without a shape; the message names it.
      ValueError: a leaf that is missing, unknown, or of another shape; the message names it.
    """
    check_architecture(architecture)
    leaves = named_leaves(params, is_leaf=lambda node: isinstance(node, masked))
    absent = tuple(name for name, leaf in leaves.items() if isinstance(leaf, masked))
    for name, leaf in leaves.items():
        if name not in absent:
            if not hasattr(leaf, "shape"):
                raise TypeError(
                    f"params hold {leaf!r} of type {type(leaf).__name__} as {name!r}; accepted are "
                    "arrays and jax.ShapeDtypeStruct"
                )
            check_leaf(architecture, name, leaf.shape)
    for parameter in architecture.parameters:
        covered = any(
            not name or parameter.name == name or parameter.name.startswith(name + "/")
            for name in absent
        )
        if parameter.name not in leaves and not covered:
            raise ValueError(
                f"params lack {parameter.name!r} of shape {parameter.shape}; they hold "
                f"{_listed(leaves)}. {_instead(parameter.name, leaves)}"
            )


def _instead(name: str, accepted: Collection[str]) -> str:
    """What to do about a name that one of two trees lacks."""
    first, _, rest = name.partition("/")
    if first == "batch_stats" or (first == "params" and rest in accepted):
        return "Of the variables of a linen model, pass variables['params']"
    if f"params/{name}" in accepted:
        return "It was read from the variables of a linen model: trace their 'params' alone"
    return "Pass the params of the network that the architecture was read from"


def _listed(names: dict[str, Any], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return (shown + more) or "nothing"
