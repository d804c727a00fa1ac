"""Grows the graph of a `DagMLP` or `DagCNN`: a new edge, or a new vertex on the way [TINY]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from archscale_jax._architecture import Arrangement
from archscale_jax._errors import unknown
from archscale_jax._graph import WEIGHT_OPERATORS, Operator, build_graph
from archscale_jax._trees import PyTree, named_leaves, with_leaves
from archscale_jax.contrib._growth.extension import (
    AMPLITUDES,
    Extension,
    extended,
    search_amplitude,
)
from experiments.lab.connections import Connection, Vertex, connections

# Flax is slow to import, and growing the networks of other frameworks does without.
if TYPE_CHECKING:
    from flax import nnx

    from experiments.lab.models.dag import DagNetwork

Kind = Literal["edge", "vertex", "skip"]
Loss = Callable[[PyTree, Any], Float[Array, ""]]
KINDS = ("edge", "vertex", "skip")


class GraphGrowth(NamedTuple):
    """A network whose graph has grown.

    Attributes:
      network: the new one, with its parameters; the old one where nothing lowered the loss.
      kind: what was added, or None.
      sender: vertex of the old graph from which, or None.
      receiver: vertex of the old graph to which, or None.
      gains: of every edge that there could be, by sender and receiver, the part of the bottleneck
        of its receiver that it could do, from 0 to 1.
      amplitude: γ of the new weights.
      losses: held-out loss before and after.
    """

    network: DagNetwork
    kind: Kind | None
    sender: int | None
    receiver: int | None
    gains: dict[tuple[int, int], float]
    amplitude: float
    losses: tuple[float, float]


def grow_graph(
    network: DagNetwork,
    make_loss: Callable[[nnx.GraphDef], Loss],
    batches: Sequence[Any],
    held_out: Any,
    *,
    kind: Kind = "edge",
    number: int = 8,
    amplitudes: Sequence[float] = AMPLITUDES,
    cutoff: float = 1e-6,
) -> GraphGrowth:
    """Adds the edge, or the vertex, that lowers the bottleneck of a vertex the most [TINY].

    A new edge is a layer with γ² times its best weights; a new vertex holds the best neurons that
    read its sender, times γ, and is read by a 1 x 1 layer, times γ. The layers that the receiver
    sums already move by γ² times their best update, without which the new ones might do harm. At
    γ = 0 nothing has changed. A skip has no amplitude: every one that fits is tried on the held-out
    examples.

    Args:
      network: sums pre-activations, without normalization. It is not changed.
      make_loss: from the structure of a network to its loss, a function of params and a batch, the
        mean over its examples.
      batches: trees of arrays, examples along their first axes.
      held_out: a batch on which the amplitude is chosen.
      kind: `edge`, `vertex` or `skip`.
      number: the most neurons of a new vertex.
      amplitudes: to choose from.
      cutoff: eigenvalues of covariances below this part of the largest count as 0.

    Returns:
      A new network, or the old one where no edge is free, or none lowers the held-out loss.

    Raises:
      TraceError: see `archscale_jax.tracing.layers.layer_kinds`.
      ValueError: an unknown kind, a network that it cannot grow, or what `connections` raises.
    """
    from flax import nnx

    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    if number < 1:
        raise ValueError(f"number must be at least 1, found {number}")
    if network.arrangement != Arrangement.PRE_ACTIVATION or network.normalization is not None:
        raise ValueError(
            "grow_graph takes networks that sum pre-activations without normalization, found "
            f"{network.arrangement} with {network.normalization}"
        )
    graphdef, params = nnx.split(network)
    loss_fn = make_loss(graphdef)
    before = float(loss_fn(params, held_out))
    free = _free_edges(network)
    receivers = list(dict.fromkeys(receiver for _, receiver in free))
    vertices = [
        Vertex(_present(network, one), tuple(free[edge] for edge in free if edge[1] == one))
        for one in receivers
    ]
    found = connections(loss_fn, params, batches, vertices, cutoff=cutoff)
    by_edge = {edge: found[receivers.index(edge[1])][free[edge]] for edge in free}
    gains = {edge: one.relative for edge, one in by_edge.items()}
    same = GraphGrowth(network, None, None, None, gains, 0.0, (before, before))
    if kind == "skip":
        return _best_skip(network, make_loss, held_out, same)
    if not by_edge:
        return same

    def worth(edge: tuple[int, int]) -> float:
        one = by_edge[edge]
        if kind == "edge":
            return one.gain
        return float(np.sum(np.square(one.neurons.singular_values[:number])))

    sender, receiver = max(by_edge, key=worth)
    best = by_edge[sender, receiver]
    kernel = named_leaves(params)[free[sender, receiver]].shape[:-2]
    if kind == "edge":
        new_graphdef, extension = _with_edge(network, sender, receiver, best, kernel)
    else:
        new_graphdef, extension = _with_vertex(network, sender, receiver, best, kernel, number)
    loss_fn = make_loss(new_graphdef)
    _, losses = search_amplitude(extension, amplitudes, held_out, loss_fn=loss_fn)
    place = int(np.nanargmin(losses))
    if not losses[place] < before:
        return same
    grown = nnx.merge(new_graphdef, extended(extension, amplitudes[place]))
    return GraphGrowth(
        grown, kind, sender, receiver, gains, amplitudes[place], (before, losses[place])
    )


def _free_edges(network: DagNetwork) -> dict[tuple[int, int], str]:
    """Edges that are not there yet, with the weight of a layer that reads their senders.

    Their receivers sum a layer already, so that it is known what they ask for.
    """
    taken = {edge[:2] for edge in network.edges}
    weights = [edge for edge in network.edges if edge[2] in WEIGHT_OPERATORS]
    readers = {edge[0]: f"layers/{edge[0]}_{edge[1]}/kernel" for edge in weights}
    receivers = sorted({edge[1] for edge in weights})
    return {
        (sender, receiver): readers[sender]
        for receiver in receivers
        for sender in range(receiver)
        if sender in readers and (sender, receiver) not in taken
    }


def _present(network: DagNetwork, vertex: int) -> tuple[str, ...]:
    return tuple(
        f"layers/{sender}_{receiver}/kernel"
        for sender, receiver, operator, _ in network.edges
        if receiver == vertex and operator in WEIGHT_OPERATORS
    )


def _with_edge(
    network: DagNetwork, sender: int, receiver: int, found: Connection, kernel: tuple[int, ...]
) -> tuple[nnx.GraphDef, Extension]:
    """The network with a layer of zeros, and what to add to it."""
    operator = _weight_operator(network)
    edges = [*network.edges, (sender, receiver, operator, kernel[0] if kernel else 1)]
    name = f"{sender}_{receiver}"
    layers = {f"layers/{name}/kernel": found.update, **found.beside}
    moves = _weights(layers, {f"layers/{name}": kernel}, _uses_bias(network))
    return _rebuilt(network, network.num_vertices, edges, {}, {}, moves)


def _with_vertex(
    network: DagNetwork,
    sender: int,
    receiver: int,
    found: Connection,
    kernel: tuple[int, ...],
    number: int,
) -> tuple[nnx.GraphDef, Extension]:
    """The network with a vertex in front of the receiver, whose number it takes."""
    operator = _weight_operator(network)

    def moved(vertex: int) -> int:
        return vertex + (vertex >= receiver)

    edges = [(moved(one), moved(other), *rest) for one, other, *rest in network.edges]
    edges += [
        (sender, receiver, operator, kernel[0] if kernel else 1),
        (receiver, receiver + 1, operator, 1),
    ]
    names = {
        f"layers/{one}_{other}": f"layers/{moved(one)}_{moved(other)}"
        for one, other, operator, _ in network.edges
    }
    neurons, bias = found.neurons, _uses_bias(network)
    fan_out = neurons.fan_out[:number]
    if bias:
        fan_out = np.vstack([fan_out, np.zeros(fan_out.shape[1])])
    new = {
        f"layers/{sender}_{receiver}/kernel": neurons.fan_in[:, :number],
        f"layers/{receiver}_{receiver + 1}/kernel": fan_out,
    }
    kernels = {
        f"layers/{sender}_{receiver}": kernel,
        f"layers/{receiver}_{receiver + 1}": (1,) * len(kernel),
    }
    changes = _weights(new, kernels, bias)
    alone = {_renamed(name, names): rows for name, rows in found.alone.items()}
    moves = _weights(alone, {}, bias)
    return _rebuilt(network, network.num_vertices + 1, edges, names, changes, moves)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition("/")
    return f"{names.get(module, module)}/{leaf}"


def _weights(
    layers: Mapping[str, Float[np.ndarray, "r o"]],
    kernels: Mapping[str, tuple[int, ...]],
    bias: bool,
) -> dict[str, tuple[np.ndarray, tuple[int, ...] | None]]:
    """Kernels and biases by name, with the size of the kernel of new layers."""
    found = {}
    for name, rows in layers.items():
        module = name.removesuffix("/kernel")
        found[name] = rows[:-1] if bias else rows, kernels.get(module)
        if bias:
            found[f"{module}/bias"] = rows[-1], None
    return found


def _rebuilt(
    network: DagNetwork,
    num_vertices: int,
    edges: Sequence[tuple],
    renamed: Mapping[str, str],
    changes: Mapping[str, tuple],
    moves: Mapping[str, tuple],
) -> tuple[nnx.GraphDef, Extension]:
    """A network of a larger graph with the old weights, the new ones 0; and what to add."""
    from flax import nnx

    old = named_leaves(nnx.state(network, nnx.Param))
    columns = zip(*sorted(edges, key=lambda edge: (edge[1], edge[0])), strict=True)
    graph = build_graph(
        num_vertices, *map(list, columns), network_kernel=network.network_kernel,
        space=network.space,
    )  # fmt: skip
    new = type(network)(
        graph,
        old["stem/kernel"].shape[-2],
        old["stem/kernel"].shape[-1],
        old["readout/kernel"].shape[-1],
        activation=network.activation,
        use_bias=_uses_bias(network),
        param_dtype=old["stem/kernel"].dtype,
        rngs=nnx.Rngs(0),
    )
    graphdef, template = nnx.split(new)
    kept = {_renamed(name, renamed): value for name, value in old.items()}
    zeros = {}
    for name, (rows, kernel) in {**moves, **changes}.items():
        shape = rows.shape if kernel is None else (*kernel, -1, rows.shape[-1])
        if name not in kept:
            zeros[name] = jnp.zeros(rows.reshape(shape).shape, old["stem/kernel"].dtype)
    start = with_leaves(template, {**zeros, **kept})

    def tree(values: Mapping[str, tuple]) -> PyTree:
        leaves = named_leaves(start)
        return with_leaves(
            jax.tree.map(jnp.zeros_like, start),
            {
                name: jnp.asarray(rows.reshape(leaves[name].shape), leaves[name].dtype)
                for name, (rows, _) in values.items()
            },
        )

    return graphdef, Extension(start, tree(changes), tree(moves))


def _best_skip(
    network: DagNetwork,
    make_loss: Callable[[nnx.GraphDef], Loss],
    held_out: Any,
    same: GraphGrowth,
) -> GraphGrowth:
    from flax import nnx

    taken = {edge[:2] for edge in network.edges}
    best = same
    for receiver in range(1, network.num_vertices):
        for sender in range(receiver):
            if (sender, receiver) in taken:
                continue
            edges = [*network.edges, (sender, receiver, Operator.SKIP, 1)]
            graphdef, extension = _rebuilt(network, network.num_vertices, edges, {}, {}, {})
            try:
                loss = float(jax.jit(make_loss(graphdef))(extension.params, held_out))
            except TypeError:  # vertices of different widths
                continue
            if loss < best.losses[1]:
                best = same._replace(
                    network=nnx.merge(graphdef, extension.params),
                    kind="skip",
                    sender=sender,
                    receiver=receiver,
                    amplitude=1.0,
                    losses=(same.losses[0], loss),
                )
    return best


def _weight_operator(network: DagNetwork) -> Operator:
    from experiments.lab.models.dag import DagCNN

    return Operator.CONV if isinstance(network, DagCNN) else Operator.LINEAR


def _uses_bias(network: DagNetwork) -> bool:
    from flax import nnx

    return "stem/bias" in named_leaves(nnx.state(network, nnx.Param))
