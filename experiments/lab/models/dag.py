"""Flax NNX networks that realise an architecture graph: `DagMLP` and `DagCNN` [AAS Eq. 1].

A stem feeds vertex 0, one layer stands on every weight edge, a readout follows the last vertex.
With summed pre-activations (the default)

    z_0 = W x,    z_v = Σ_skip z_u + Σ_weight W σ(z_u),    y = W σ(z_last),

and with summed activations, the arrangement of the authors' code,

    h_0 = σ(W x),    h_v = Σ_skip h_u + Σ_weight σ(W h_u),    y = W h_last.

Normalization, where wanted, stands before every σ. The input of the readout of a `DagCNN` is
averaged over positions.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from archscale_jax._architecture import Architecture, Arrangement, Parameter, Role
from archscale_jax._errors import unknown
from archscale_jax._graph import (
    WEIGHT_OPERATORS,
    Operator,
    Space,
    build_graph,
    number_of_vertices,
    validate_graph,
)
from archscale_jax._trees import named_leaves
from experiments.lab.models.convolution import conv_general_dilated

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
NORMALIZATIONS = ("batch", "layer")
Normalization = Literal["batch", "layer"]
_EDGE_FEATURES = ("operator", "kernel_size")


class DagNetwork(nnx.Module):
    """What `DagMLP` and `DagCNN` share: everything but the kind of their layers.

    Args:
      graph: the architecture graph.
      in_features: features (channels) of the input.
      width: features of every vertex.
      out_features: features of the output.
      activation: `relu` or `gelu`.
      normalization: None, `batch` or `layer`.
      arrangement: what vertices sum.
      use_bias: whether stem, edges and readout have biases (0 at the start).
      dtype: what is computed in; None takes that of inputs and parameters together. With bfloat16
        and parameters in float32, precision is mixed.
      param_dtype: dtype of the parameters.
      rngs: random streams; weights are drawn by Flax's defaults, see `archscale_jax.initialize`.

    Raises:
      ValueError: an operator that the network lacks, parallel edges, a width below 1, or an unknown
        activation, normalization or arrangement.
    """

    operators: tuple[Operator, ...]

    def __init__(
        self,
        graph: jraph.GraphsTuple,
        in_features: int,
        width: int,
        out_features: int,
        *,
        activation: str = "relu",
        normalization: Normalization | None = None,
        arrangement: Arrangement | str = Arrangement.PRE_ACTIVATION,
        use_bias: bool = True,
        dtype: jnp.dtype | type | None = None,
        param_dtype: jnp.dtype | type = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self._check(in_features, width, out_features, activation, normalization)
        validate_graph(graph)
        self.arrangement = Arrangement(arrangement)
        self.activation = activation
        self.normalization = normalization
        self.num_vertices = number_of_vertices(graph)
        self.network_kernel = int(graph.globals["kernel_size"][0])
        self.space = Space(graph.globals["space"][0])
        # The edges as plain numbers, because arrays in a module would be taken for its state.
        columns = (graph.senders, graph.receivers, *map(graph.edges.get, _EDGE_FEATURES))
        edges = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
        self.edges = tuple(
            (sender, receiver, Operator(operator), kernel_size)
            for sender, receiver, operator, kernel_size in sorted(edges, key=lambda e: (e[1], e[0]))
        )
        for sender, receiver, operator, _ in self.edges:
            if operator not in self.operators:
                raise ValueError(
                    f"edge {sender}->{receiver} is {operator.name}; {type(self).__name__} has "
                    + ", ".join(known.name for known in self.operators)
                )

        if len({edge[:2] for edge in self.edges}) < len(self.edges):
            raise ValueError(f"{type(self).__name__} has at most one edge between two vertices")

        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        def layer(features: int, kernel_size: int) -> nnx.Module:
            options = {"use_bias": use_bias, "rngs": rngs, **dtypes}
            return self._layer(features, width, kernel_size, options)

        self.stem = layer(in_features, max(self.network_kernel, 1))
        self.layers = nnx.Dict(
            {
                _edge_name(sender, receiver): layer(width, kernel_size)
                for sender, receiver, operator, kernel_size in self.edges
                if operator in WEIGHT_OPERATORS
            }
        )
        self.readout = nnx.Linear(width, out_features, use_bias=use_bias, rngs=rngs, **dtypes)
        self.normalizations = nnx.Dict(self._normalizations(width, dtypes, rngs))

    def _check(self, in_features, width, out_features, activation, normalization) -> None:
        sizes = {"in_features": in_features, "width": width, "out_features": out_features}
        for name, size in sizes.items():
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} must be an integer from 1, found {size!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", activation, ACTIVATIONS))
        if normalization is not None and normalization not in NORMALIZATIONS:
            raise ValueError(unknown("normalization", normalization, (None, *NORMALIZATIONS)))

    def _layer(self, in_features: int, out_features: int, kernel_size: int, options) -> nnx.Module:
        raise NotImplementedError  # DagMLP and DagCNN

    def _normalizations(self, width: int, dtypes, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        if self.normalization is None:
            return {}
        make = nnx.BatchNorm if self.normalization == "batch" else nnx.LayerNorm
        if self.arrangement == Arrangement.PRE_ACTIVATION:
            sources = {
                sender for sender, _, operator, _ in self.edges if operator in WEIGHT_OPERATORS
            }
            names = [str(vertex) for vertex in sorted(sources | {self.num_vertices - 1})]
        else:
            names = ["stem", *self.layers]
        return {name: make(width, rngs=rngs, **dtypes) for name in names}

    def _activate(self, features: Array, name: str, train: bool) -> Array:
        if self.normalization == "batch":
            features = self.normalizations[name](features, use_running_average=not train)
        elif self.normalization == "layer":
            features = self.normalizations[name](features)
        return ACTIVATIONS[self.activation](features)

    def features(self, inputs: Float[Array, "..."], *, train: bool = False) -> list[Array]:
        """Returns the feature of every vertex, [batch, width] or [batch, height, width, channels].

        Args:
          inputs: the batch, images [batch, height, width, channels]; `DagMLP` flattens them.
          train: normalise by the batch and update its running averages.
        """
        pre_activation = self.arrangement == Arrangement.PRE_ACTIVATION
        first = self.stem(self._prepare(inputs))
        vertices = [first if pre_activation else self._activate(first, "stem", train)]
        activated: dict[int, Array] = {}  # σ(z_u) once for all edges out of u
        for vertex in range(1, self.num_vertices):
            terms = []
            for sender, receiver, operator, _ in self.edges:
                if receiver != vertex:
                    continue
                if operator == Operator.SKIP:
                    terms.append(vertices[sender])
                elif operator == Operator.AVG_POOL:
                    terms.append(
                        nnx.avg_pool(
                            vertices[sender], (3, 3), padding="SAME", count_include_pad=False
                        )
                    )
                elif pre_activation:
                    if sender not in activated:
                        activated[sender] = self._activate(vertices[sender], str(sender), train)
                    terms.append(self.layers[_edge_name(sender, receiver)](activated[sender]))
                else:
                    name = _edge_name(sender, receiver)
                    terms.append(self._activate(self.layers[name](vertices[sender]), name, train))
            # A vertex that nothing reaches is 0.
            vertices.append(sum(terms[1:], terms[0]) if terms else jnp.zeros_like(vertices[0]))
        return vertices

    def __call__(self, inputs: Float[Array, "..."], *, train: bool = False) -> Float[Array, "b o"]:
        """Returns the output [batch, out_features]; arguments as for `features`."""
        last = self.features(inputs, train=train)[-1]
        if self.arrangement == Arrangement.PRE_ACTIVATION:
            last = self._activate(last, str(self.num_vertices - 1), train)
        return self.readout(self._pool(last))

    def _prepare(self, inputs: Array) -> Array:
        return inputs

    def _pool(self, features: Array) -> Array:
        return features

    def graph(self) -> jraph.GraphsTuple:
        """Returns the architecture graph that the network realises."""
        columns = list(zip(*self.edges, strict=True))
        return build_graph(
            self.num_vertices, *columns, network_kernel=self.network_kernel, space=self.space
        )

    def architecture(self) -> Architecture:
        """Returns the graph with the leaves of `nnx.state(self, nnx.Param)` bound to it."""
        index = {_edge_name(edge[0], edge[1]): number for number, edge in enumerate(self.edges)}
        leaves = named_leaves(nnx.state(self, nnx.Param))
        return Architecture(
            self.graph(),
            tuple(_parameter(name, leaf.shape, leaves, index) for name, leaf in leaves.items()),
            self.arrangement,
        )


class DagMLP(DagNetwork):
    """A multilayer perceptron on a graph of linear and skip edges; see `DagNetwork`."""

    operators = (Operator.SKIP, Operator.LINEAR)

    def _layer(self, in_features: int, out_features: int, kernel_size: int, options) -> nnx.Module:
        return nnx.Linear(in_features, out_features, **options)

    def _prepare(self, inputs: Array) -> Array:
        return inputs.reshape(inputs.shape[0], -1)


class DagCNN(DagNetwork):
    """A convolutional network on a graph of convolution, skip and pooling edges, stride 1.

    The stem is a convolution of the network's kernel size; see `DagNetwork`.
    """

    operators = (Operator.SKIP, Operator.CONV, Operator.AVG_POOL)

    def _layer(self, in_features: int, out_features: int, kernel_size: int, options) -> nnx.Module:
        kernel = (kernel_size, kernel_size)
        return nnx.Conv(
            in_features,
            out_features,
            kernel,
            padding="SAME",
            conv_general_dilated=conv_general_dilated,
            **options,
        )

    def _pool(self, features: Array) -> Array:
        return jnp.mean(features, axis=(1, 2))


def _edge_name(sender: int, receiver: int) -> str:
    return f"{sender}_{receiver}"


def _parameter(name: str, shape: tuple[int, ...], leaves, edge_index: dict[str, int]) -> Parameter:
    """Binds one leaf, `stem/…`, `layers/0_1/…`, `readout/…` or `normalizations/…`."""
    module, _, leaf = name.rpartition("/")
    layer = {"stem": Role.INPUT, "readout": Role.READOUT}.get(module, Role.HIDDEN)
    role = {"kernel": layer, "bias": Role.BIAS, "scale": Role.SCALE}[leaf]
    if module.startswith("normalizations/"):
        return Parameter(name, role, layer, shape, fan_in=shape[-1], fan_out=shape[-1])
    *kernel, fan_in, fan_out = leaves[f"{module}/kernel"].shape
    positions = math.prod(kernel)
    return Parameter(
        name,
        role,
        layer,
        shape,
        fan_in=fan_in * positions,
        fan_out=fan_out * positions,
        kernel_size=max(kernel, default=1),
        kernel_positions=positions,
        edge=edge_index.get(module.removeprefix("layers/")),
    )


def create_network(
    graph: jraph.GraphsTuple,
    image_shape: tuple[int, int, int],
    width: int,
    num_classes: int,
    **options: Any,
) -> DagNetwork:
    """Returns the classifier of a graph for images: `DagMLP` if it is dense, else `DagCNN`.

    Args:
      graph: the architecture graph, made with or without a kernel size.
      image_shape: height, width, channels.
      width: features of every vertex.
      num_classes: outputs.
      **options: see `DagNetwork`.

    Raises:
      ValueError: see `DagNetwork`.
    """
    if graph.globals["kernel_size"][0]:
        return DagCNN(graph, image_shape[-1], width, num_classes, **options)
    return DagMLP(graph, math.prod(image_shape), width, num_classes, **options)
