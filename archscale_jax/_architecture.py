"""An architecture: the graph of a network, and which parameter leaf belongs to which edge."""

import collections
import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jraph

from archscale_jax._errors import unknown
from archscale_jax._expressions import Expression, Moments, Variable
from archscale_jax._graph import is_weight
from archscale_jax._trees import PyTree, named_leaves


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
class ParameterUse:
    """What a parameter leaf does at one place. Axes are those of the leaf.

    Attributes:
      kind: `weight`, `embedding` (rows chosen by an index), `bias` (added), `offset` (added to what
        a scale multiplies), `scale` (multiplied), `token` (joined to features along an axis),
        `features` (features that no input reaches, such as learned queries), `value` (any other
        function) or `result` (returned as it is).
      contracted: axes that are summed over, positions of a kernel included.
      output: axes along which the result varies and the features did not.
      batch: axes that run along an axis of the features: of a scale, a bias, a layer for each head;
        and along which the layers behind are such, as experts that read the same features.
      positions: axes that hold positions: of a kernel, of tokens; rows of a table.
      fan_in: of a weight, inputs that reach one unit.
      groups: of the kernel of a convolution, into how many groups features are divided.
      slices: (axis, entry) for every axis of which it is one entry: a layer of a stack.
      edge: index of the layer among the edges of the graph; None outside of it.
      edges: indices of the edges that read, or give, what it scales or adds to.
      ends: indices of those between whose operator and target it stands.
      vertex: number of the vertex whose features it touches; None outside of the graph.
      layer: see `Parameter`.
      expression: of a weight, what is made of the leaf before it is applied; None if nothing is.
      source: file, line and function.
      gates: of a weight, whether its outputs only scale whole groups of features, as those of the
        router of a mixture of experts.
      made: of a layer that reads inputs, whether the model makes the features that it sums, as the
        sines of a time, so that their number is one of its widths.
    """

    kind: str
    contracted: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    fan_in: int = 1
    groups: int = 1
    slices: frozenset[tuple[int, int]] = frozenset()
    edge: int | None = None
    edges: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    vertex: int | None = None
    layer: Role = Role.HIDDEN
    expression: Expression | None = None
    source: str = ""
    gates: bool = False
    made: bool = False


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter leaf.

    Attributes:
      name: path of the leaf in the params tree, as `named_leaves` gives it.
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
      activated: whether its layer reads activations. Where the edges of the architecture have no
        functions of their own, it stands for ReLU, which takes half of the second moment.
      uses: what it does, place by place; empty where that was not read off a function.
      start: its value before training where it is not drawn: of biases 0, of scales 1, or what
        makes 1 of the product, as 0 in 1 + w.
      given: its value in the arrays that were traced, or the moments of its entries where they
        differ; of a weight 0 if all its entries are, so that it is not drawn. None if unknown.
      start_known: whether that value is plain from what it does. Of a slope, a temperature or a
        decay it is not: `initialize` keeps the value that the model gave.
      filled: its shape without the unused capacity of a network that grows; None without such.
      trained: False where no gradient of the result comes to it, as behind `stop_gradient`, or
        where it does nothing to the result. It is kept as it is: it does not decay, and what arrays
        or the framework hold of it is not drawn anew.
      rows: of a table, by what its rows are drawn smaller than those of the base, as the model
        multiplies them by so much more.

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
    uses: tuple[ParameterUse, ...] = ()
    start: float | None = None
    start_known: bool = True
    given: float | Moments | None = None
    filled: tuple[int, ...] | None = None
    trained: bool = True
    rows: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape without unused capacity."""
        return self.shape if self.filled is None else self.filled

    @property
    def initial_value(self) -> float:
        """Its value before training where it is not drawn and no array tells another."""
        return self.given if isinstance(self.given, float) else self.neutral_value

    @property
    def neutral_value(self) -> float:
        """The value at which it changes nothing: 0 of biases, 1 of scales, 0 of w in 1 + w."""
        if self.start is not None:
            return self.start
        return 1.0 if self.role == Role.SCALE else 0.0

    @property
    def is_drawn(self) -> bool:
        """Whether it is drawn at random: a weight or table that does not start at zero."""
        return self.role not in (Role.BIAS, Role.SCALE) and not self.starts_at_zero

    @property
    def starts_at_zero(self) -> bool:
        """Whether it is a weight or table that is 0 in the arrays that were traced."""
        return self.role not in (Role.BIAS, Role.SCALE) and self.given == 0.0

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


OUTPUT = Variable("output", "")
"""What the operator of an edge gives, in `EdgeFunction.after`."""


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeFunction:
    """What stands on an edge beside its operator (theory §9).

    Attributes:
      before: what it makes of an entry of its source, `Variable("vertex", number)`, before the
        operator: activations, normalization, constants.
      after: what is made of an entry of the result, `OUTPUT`, before the target takes it.
      reach: of a layer, inputs that reach one unit on average, a fraction of its fan-in where a
        transposed convolution meets zeros; None is the fan-in.
      covered: the part of these inputs that does not lie beyond the borders of an image, on
        average. Variances suppose all of them, as the published rules do; promised second moments
        do not.
      count: of a concatenation, entries along its axis.
      weights: names of the leaves that a layer applies.
      share: the part of what a rule wants of the layer's outputs that they shall bring: of queries
        whose products with d keys are summed without 1/√d, 1/d.
    """

    before: Expression
    after: Expression = OUTPUT
    reach: float | None = None
    covered: float = 1.0
    count: int = 1
    weights: tuple[str, ...] = ()
    share: float = 1.0


class AttentionLogits(NamedTuple):
    """Sums of products of queries and keys.

    Attributes:
      queries: number of the vertex of the queries.
      size: how many products are summed, d_head.
      scale: the constant by which the model multiplies them, such as 1/√d_head.
    """

    queries: int
    size: int
    scale: float

    def resized(self, size: int) -> "AttentionLogits":
        """Returns those of heads of another size, scaled by the same power of it."""
        power = math.log(self.scale, self.size) if self.size > 1 else 0.0
        return self._replace(size=size, scale=float(size**power))


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """The graph of a network with its parameters bound to it.

    Attributes:
      graph: see `archscale_jax._graph`.
      parameters: one entry per leaf of the params tree.
      arrangement: what the vertices sum.
      functions: what stands on every edge of the graph. None: ReLU before every layer, or behind it
        where vertices sum activations.
      stems: what stands on the layers that feed vertex 0 from the inputs.
      expressions: by number, what an entry of a vertex is that is a product, or that no input
        reaches.
      added: by number, what biases that do not start at 0 add to the features of a vertex.
      attention: by number of their vertex, the products of queries and keys.
      notes: what could not be read off the function, and what was supposed instead.

    Raises:
      ValueError: two parameters of one name, an edge that the graph does not have, a hidden weight
        without an edge or on an edge without weight, or an unknown arrangement.
    """

    graph: jraph.GraphsTuple
    parameters: tuple[Parameter, ...]
    arrangement: Arrangement = Arrangement.PRE_ACTIVATION
    functions: tuple[EdgeFunction, ...] | None = None
    stems: tuple[EdgeFunction, ...] = ()
    expressions: Mapping[int, Expression] = dataclasses.field(default_factory=dict)
    added: Mapping[int, Expression] = dataclasses.field(default_factory=dict)
    attention: Mapping[int, AttentionLogits] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
                        "is the index of a linear or convolution edge, and for a leaf that no "
                        "layer uses another role, such as bias"
                    )

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {parameter.name: parameter.shape for parameter in self.parameters}

    @functools.cached_property
    def zero_edges(self) -> frozenset[int]:
        """Indices of the layers whose weights all start at 0."""
        zero = {one.name for one in self.parameters if one.starts_at_zero}
        functions = enumerate(self.functions or ())
        return frozenset(
            edge for edge, one in functions if one.weights and zero.issuperset(one.weights)
        )

    @functools.cached_property
    def _derived(self) -> dict[Callable[..., Any], Any]:
        """See `derived`."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """The fields: a copy, or another process, derives the rest anew."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


Function = TypeVar("Function", bound=Callable[..., Any])


def derived(function: Function) -> Function:
    """Lets a function of an architecture compute its result once for each architecture.

    An architecture does not change, so that what follows from it is kept with it; nobody may change
    that either. Of what else the function takes, such as a graph alone, nothing is kept.
    """

    @functools.wraps(function)
    def found(architecture: Any) -> Any:
        if not isinstance(architecture, Architecture):
            return function(architecture)
        known = architecture._derived
        if function not in known:
            known[function] = function(architecture)
        return known[function]

    return cast(Function, found)


def check_architecture(value: object, hint: str = "") -> None:
    """Checks that a value is an `Architecture`.

    Args:
      value: what was passed as one.
      hint: what to do instead; by default, where an architecture comes from.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(value, Architecture):
        hint = hint or ("archscale_jax.trace(function, params, *inputs) reads one")
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
        With one, so does None, as in trees that Equinox has filtered, but not as the whole tree;
        and the placeholder of `optax.tree_map_params` stands for any tree.

    Raises:
      TypeError: no architecture, or a leaf without a shape; the message names it.
      ValueError: a leaf that is missing, unknown, or of another shape; the message names it.
    """
    check_architecture(architecture)
    if masked and type(params).__name__ == _PLACEHOLDER:
        return
    if masked and params is not None:
        masked = (*(masked if isinstance(masked, tuple) else (masked,)), type(None))
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


_PLACEHOLDER = "_ParamsPlaceholder"
"""Name of the class, private to optax, of what `optax.tree_map_params` gives to `init`."""


def _instead(name: str, accepted: Collection[str]) -> str:
    """What to do about a name that one of two trees lacks."""
    first, _, rest = name.partition("/")
    if first == "batch_stats" or (first == "params" and rest in accepted):
        return "For the variables of a linen model, pass variables['params']"
    if f"params/{name}" in accepted:
        return (
            "It was read from the variables of a linen model, {'params': …}: pass these, as "
            "plan.init and module.init give them, not what 'params' holds"
        )
    return "Pass the params of the network that the architecture was read from"


def _listed(names: dict[str, Any], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return (shown + more) or "nothing"
