"""What a new layer between two vertices, or a new vertex on the way, could express (theory §8).

The bottleneck of a vertex is what all layers that are added in it cannot express together. A new
layer from the features B of another vertex lowers it by what B explains of the rest. Of a new
vertex between the two, whose neurons read B, the k best neurons do the k largest λ² of it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.bottleneck import desired_change
from archscale_jax.contrib._growth.neurons import (
    LayerStatistics,
    Neurons,
    least_squares,
    new_neurons,
)
from archscale_jax.contrib._growth.patches import product, rows_of, sum_over_examples
from archscale_jax.tracing.layers import (
    LayerGradient,
    LayerKind,
    layer_gradients,
    layer_kinds,
)

Loss = Callable[[PyTree, Any], Float[Array, ""]]


class Vertex(NamedTuple):
    """A sum of layers, and features from which another layer might be added; hashable.

    Attributes:
      present: names of the weights whose layers are added.
      candidates: names of weights that read the features which a new layer would read, with the
        window of whose layer it would read them.
    """

    present: tuple[str, ...]
    candidates: tuple[str, ...]


class Connection(NamedTuple):
    """What a new layer could do for a vertex.

    Attributes:
      update: its best weights, [inputs, outputs], the bias last of layers that have one.
      beside: the change of the layers that are there that goes with it, by names of weights.
      gain: by how much it lowers the bottleneck Ψ of the vertex.
      relative: the same as a part of Ψ.
      neurons: of a new vertex between the two: fan-ins as `update`, fan-outs at the same position.
      alone: δW*, the best change of the layers that are there without it, by names of weights.
    """

    update: Float[np.ndarray, "r o"]
    beside: dict[str, Float[np.ndarray, "r o"]]
    gain: float
    relative: float
    neurons: Neurons
    alone: dict[str, Float[np.ndarray, "r o"]]


def connections(
    loss_fn: Loss,
    params: PyTree,
    batches: Sequence[Any],
    vertices: Sequence[Vertex],
    *,
    cutoff: float = 1e-6,
) -> list[dict[str, Connection]]:
    """Measures what new layers could do, by the names of candidates, for every vertex.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar.
      params: tree of arrays.
      batches: trees of arrays, examples along their first axes.
      vertices: where layers might be added.
      cutoff: eigenvalues of covariances below this part of the largest count as 0.

    Raises:
      TraceError: see `archscale_jax.tracing.layers.layer_kinds`.
      ValueError: no batch; a name of no layer; layers whose positions differ from the vertex's;
        statistics that are not finite.
    """
    if not len(batches):
        raise ValueError("connections needs a batch, found none: batches is empty")
    kinds = layer_kinds(loss_fn, params, batches[0])
    names = [kind.weight for kind in kinds]
    for name in (name for one in vertices for name in (*one.present, *one.candidates)):
        if name not in names:
            raise ValueError(unknown("layer", name, names))
    total = None
    for batch in batches:
        sums = _statistics(params, batch, loss_fn=loss_fn, kinds=kinds, vertices=tuple(vertices))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None
    leaves = named_leaves(params)
    sizes = {
        kind.weight: math.prod(leaves[kind.weight].shape[:-1]) + (kind.bias is not None)
        for kind in kinds
    }
    return [
        _solved(one, found, sizes, cutoff)
        for one, found in zip(vertices, jax.tree.map(np.asarray, total), strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("loss_fn", "kinds", "vertices"))
def _statistics(
    params: PyTree,
    batch: Any,
    *,
    loss_fn: Loss,
    kinds: tuple[LayerKind, ...],
    vertices: tuple[Vertex, ...],
) -> list[LayerStatistics]:
    """The sums of every vertex, the inputs of its present layers and of its candidates stacked."""
    _, gradients = layer_gradients(loss_fn, params, batch)
    by_name = {kind.weight: kind for kind in kinds}
    return [_sums(one, by_name, gradients) for one in vertices]


def _sums(
    vertex: Vertex, kinds: Mapping[str, LayerKind], gradients: Mapping[str, LayerGradient]
) -> LayerStatistics:
    names = (*vertex.present, *vertex.candidates)
    targets = desired_change(gradients[vertex.present[0]].outputs)
    for name in names:
        grid = gradients[name].outputs.shape[:-1]
        if grid != targets.shape[:-1]:
            raise ValueError(
                f"the layer {name!r} has the positions {grid[1:]}, the vertex of "
                f"{vertex.present[0]!r} has {targets.shape[1:-1]}"
            )

    def sums(inputs: dict[str, Array], targets: Array) -> tuple[Array, Array]:
        rows = jnp.concatenate([rows_of(kinds[name], inputs[name]) for name in names], axis=-1)
        flat = rows.reshape(-1, rows.shape[-1])
        return product(flat.T, flat), product(flat.T, targets.reshape(-1, targets.shape[-1]))

    inputs = {name: gradients[name].inputs for name in names}
    convolutional = any(kinds[name].window is not None for name in names)
    before, wanted = sum_over_examples(sums, (inputs, targets), one_by_one=convolutional)
    square = jnp.sum(jnp.square(targets))
    return LayerStatistics(jnp.float32(len(targets)), before, wanted, square)


def _solved(
    vertex: Vertex, found: LayerStatistics, sizes: Mapping[str, int], cutoff: float
) -> dict[str, Connection]:
    names = (*vertex.present, *vertex.candidates)
    ends = np.cumsum([sizes[name] for name in names])
    places = {
        name: np.arange(end - sizes[name], end) for name, end in zip(names, ends, strict=True)
    }
    present = np.concatenate([places[name] for name in vertex.present])

    def solve(rows: np.ndarray):
        inputs, targets = np.asarray(found.inputs, np.float64), np.asarray(found.targets)
        part = found._replace(inputs=inputs[np.ix_(rows, rows)], targets=targets[rows])
        return least_squares(part, cutoff=cutoff)

    def split(update: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([sizes[name] for name in vertex.present])
        return dict(zip(vertex.present, np.split(update[: ends[-1]], ends[:-1]), strict=True))

    base = solve(present)
    results = {}
    for name in vertex.candidates:
        own = places[name]
        both = solve(np.concatenate([present, own]))
        gain = max(base.absolute - both.absolute, 0.0)
        covariance = np.asarray(found.inputs, np.float64)
        rest = np.asarray(found.targets, np.float64)[own]
        rest = rest - covariance[np.ix_(own, present)] @ base.update
        neurons = new_neurons(
            covariance[np.ix_(own, own)], rest, found.examples, threshold=0.0, cutoff=cutoff
        )
        relative = gain / base.absolute if base.absolute > 0 else 0.0
        results[name] = Connection(
            both.update[len(present) :], split(both.update), gain, relative, neurons,
            split(base.update),
        )  # fmt: skip
    return results
