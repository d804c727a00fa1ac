"""The networks of NAS-Bench-201 (arXiv 2001.00326) in Flax NNX, one cell or all of them at once.

    stem: conv 3 x 3, BN → N cells, C channels → reduction → N cells, 2C channels → reduction
    → N cells, 4C channels → BN, σ → mean over positions → linear readout

A reduction halves the image: σ, conv 3 x 3 at stride 2, BN, σ, conv 3 x 3, BN, added to the mean
over 2 x 2 through a conv 1 x 1. Cells are those of `archscale_jax._spaces.cell`. The benchmark has
C = 16, N = 5.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Scalar

from archscale_jax._architecture import Architecture
from archscale_jax._spaces.cell import CELL_EDGES, STEM_KERNEL_SIZE, cell_digits
from archscale_jax._trees import named_leaves
from experiments.lab.models.cell_architecture import network_architecture
from experiments.lab.models.cell_edge import (
    CONVOLUTIONS,
    EdgeWeights,
    Features,
    average_pool,
    chosen_edge,
    convolve,
    fixed_edge,
)
from experiments.lab.models.cell_layers import Normalization, Reduction, convolution

NUM_STAGES = 3


class CellOperators(nnx.Variable):
    """The digits of the cell that a network of the whole space is, int32 [6]; not trained."""


class CellNetwork(nnx.Module):
    """A network of NAS-Bench-201.

    Args:
      cell: a cell in either notation, also one without a path. None holds the weights of every
        cell: which one it is, its variable `operators` says, set by `select_cell`, and one compiled
        program trains them all.
      in_channels: channels of the images.
      channels: C.
      cells_per_stage: N.
      num_classes: outputs.
      param_dtype: dtype of the parameters.
      rngs: random streams; weights are drawn by Flax's defaults, see `archscale_jax.initialize`.

    Raises:
      ValueError: a malformed cell, or a size below 1.
    """

    def __init__(
        self,
        cell: str | None,
        in_channels: int,
        channels: int,
        cells_per_stage: int,
        num_classes: int,
        *,
        param_dtype: jnp.dtype | type = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = {
            "in_channels": in_channels,
            "channels": channels,
            "cells_per_stage": cells_per_stage,
            "num_classes": num_classes,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        digits = None if cell is None else _flat_digits(cell)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.digits = digits
        if digits is None:
            self.operators = CellOperators(jnp.zeros(len(CELL_EDGES), jnp.int32))
        self.stem = convolution(in_channels, channels, STEM_KERNEL_SIZE, options)
        self.stem_normalization = Normalization(channels, options)
        widths = [channels * 2**stage for stage in range(NUM_STAGES)]
        self.stages = nnx.List(
            [
                nnx.List([_Cell(digits, width, options) for _ in range(cells_per_stage)])
                for width in widths
            ]
        )
        self.reductions = nnx.List([Reduction(width, options) for width in widths[:-1]])
        self.normalization = Normalization(widths[-1], options)
        self.readout = nnx.Linear(widths[-1], num_classes, **options)

    def features(self, images: Features, *, train: bool = False) -> list[Features]:
        """Returns the feature of every vertex of `architecture().graph`, in order.

        Args:
          images: the batch.
          train: normalize by the batch and update the running averages.
        """
        operators = self.digits if self.digits is not None else self.operators[...]
        features = self.stem_normalization(self.stem(images), train)
        vertices = [features]
        for stage, cells in enumerate(self.stages):
            if stage:
                vertices += self.reductions[stage - 1](vertices[-1], train)
            for cell in cells:
                vertices += cell(vertices[-1], operators, train)
        return vertices

    def __call__(self, images: Features, *, train: bool = False) -> Float[Array, "b o"]:
        """Returns the output [batch, num_classes]; arguments as for `features`."""
        last = self.features(images, train=train)[-1]
        last = jax.nn.relu(self.normalization(last, train))
        return self.readout(jnp.mean(last, axis=(1, 2)))

    def architecture(self) -> Architecture:
        """Returns the whole network's graph with the leaves of `nnx.state(self, nnx.Param)`.

        Its vertices are those of `features`. Rules of the cell alone, as the published rates are,
        take `cell_graph(cell)` instead.

        Raises:
          ValueError: the network is that of the whole space, or no path joins input and output.
        """
        if self.digits is None:
            raise ValueError("a network of the whole space has no single graph; pass a cell")
        leaves = named_leaves(nnx.state(self, nnx.Param))
        return network_architecture(self.digits, [len(cells) for cells in self.stages], leaves)


def select_cell(model_state: nnx.State, cell: str) -> nnx.State:
    """Returns the state of a network of the whole space that makes it the network of a cell.

    Args:
      model_state: what `nnx.split` gives beside the `nnx.Param`s.
      cell: in either notation.

    Raises:
      ValueError: a malformed cell.
    """
    operators = nnx.State({"operators": CellOperators(jnp.asarray(_flat_digits(cell), jnp.int32))})
    return nnx.merge_state(model_state, operators)


def embed(params: nnx.State, space_params: nnx.State) -> nnx.State:
    """Returns the params of the whole space's network that hold those of one cell, 0 elsewhere.

    Args:
      params: of the network of a cell.
      space_params: of the network of the whole space of the same sizes; only shapes are read.

    Raises:
      ValueError: a leaf that the network of the space lacks, or of another shape.
    """
    leaves = named_leaves(params)
    for name, leaf in named_leaves(space_params).items():
        if name in leaves and leaves[name].shape != leaf.shape:
            raise ValueError(f"{name!r} has shape {leaves[name].shape}; accepted is {leaf.shape}")
    unknown = leaves.keys() - named_leaves(space_params).keys()
    if unknown:
        raise ValueError(f"the network of the space has no parameters {sorted(unknown)}")
    filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), space_params)
    return nnx.merge_state(filled, params)


class _Cell(nnx.Module):
    def __init__(self, digits: Sequence[int] | None, width: int, options):
        held = [tuple(CONVOLUTIONS)] * len(CELL_EDGES)
        if digits is not None:
            held = [(digit,) if digit in CONVOLUTIONS else () for digit in digits]
        self.edges = nnx.Dict(
            {
                _edge_name(*edge): _Edge(convolutions, width, options)
                for edge, convolutions in zip(CELL_EDGES, held, strict=True)
                if convolutions
            }
        )

    def __call__(self, first, operators, train: bool) -> list[Features]:
        """Returns the features of all vertices but the first."""
        vertices = [first]
        for (sender, receiver), operator in zip(CELL_EDGES, operators, strict=True):
            if sender == 0:
                vertices.append(jnp.zeros_like(first))
            source, name = vertices[sender], _edge_name(sender, receiver)
            if not isinstance(operator, int):
                vertices[-1] += self.edges[name].chosen(operator, source, train)
            elif name in self.edges:
                vertices[-1] += self.edges[name](source, train)
            elif operator:
                vertices[-1] += source if operator == 1 else average_pool(source)
        return vertices[1:]


class _Edge(nnx.Module):
    """BN(W σ(z)) of one kernel size, or of one of both that is chosen at run time."""

    convolution_1: nnx.Conv
    convolution_3: nnx.Conv

    def __init__(self, operations: Sequence[int], width: int, options):
        for operation in operations:
            size = CONVOLUTIONS[operation]
            setattr(self, f"convolution_{size}", convolution(width, width, size, options))
        self.size = CONVOLUTIONS[operations[-1]]
        self.normalization = Normalization(width, options)

    def __call__(self, features: Features, train: bool) -> Features:
        kernel = getattr(self, f"convolution_{self.size}").kernel[...]
        return self.normalization(convolve(features, kernel), train)

    def chosen(self, operator: Int[Scalar, ""], features: Features, train: bool) -> Features:
        normalization = self.normalization
        weights = EdgeWeights(
            self.convolution_1.kernel[...],
            self.convolution_3.kernel[...],
            normalization.scale[...],
            normalization.bias[...],
        )
        if not train:
            return fixed_edge(operator, features, weights, normalization.running())
        output, moments = chosen_edge(operator, features, weights)
        convolves = jnp.isin(operator, jnp.array(list(CONVOLUTIONS)))
        normalization.track(moments, where=convolves)
        return output


def _edge_name(sender: int, receiver: int) -> str:
    return f"{sender}_{receiver}"


def _flat_digits(cell: str) -> tuple[int, ...]:
    return tuple(itertools.chain(*cell_digits(cell)))
