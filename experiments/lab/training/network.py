"""A network as functions of its state: loss, vertex features, evaluation."""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Scalar

from archscale_jax._graph import live_vertices
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree


def cross_entropy(
    graphdef: nnx.GraphDef,
    params: PyTree,
    model_state: PyTree,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    *,
    train: bool,
) -> tuple[Float[Scalar, ""], tuple[Array, PyTree]]:
    """Returns the mean cross entropy in nats, with the logits [b, classes] and the new state."""
    network = nnx.merge(graphdef, params, model_state, copy=True)  # this trace owns its state
    logits = exact(_call(network, images, train))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), (logits, nnx.state(network, nnx.Not(nnx.Param)))


def _call(network: nnx.Module, images: Array, train: bool) -> Array:
    """Calls a network in training or evaluation mode, by its argument `train` or as NNX has it."""
    parameters = inspect.signature(network.__call__).parameters.values()
    if any(one.name == "train" or one.kind == one.VAR_KEYWORD for one in parameters):
        return network(images, train=train)
    (network.train if train else network.eval)()
    return network(images)


def vertex_features(
    graphdef: nnx.GraphDef, params: PyTree, model_state: PyTree, images: Float[Array, "b h w c"]
) -> list[Array]:
    """Returns the features that `measure_update` reads of a `DagMLP` or `DagCNN`.

    Those of the vertices on end-to-end paths, in order, normalised as in training.
    """
    network = nnx.merge(graphdef, params, model_state, copy=True)
    features = network.features(images, train=True)
    return [features[vertex] for vertex in np.flatnonzero(live_vertices(network.graph()))]


@functools.partial(jax.jit, static_argnames=("graphdef", "batch_size"))
def evaluate(
    params: PyTree,
    model_state: PyTree,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    *,
    graphdef: nnx.GraphDef,
    batch_size: int = 1000,
) -> dict[str, Any]:
    """Returns the mean loss (nats) and the accuracy (0 to 1) over all examples, scalars.

    Raises:
      ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")

    def measure(images, labels):
        loss, (logits, _) = cross_entropy(
            graphdef, params, model_state, images, labels, train=False
        )
        hits = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return jnp.array([loss * len(labels), hits.astype(loss.dtype)])

    count = len(images)
    whole = count - count % batch_size
    batched = [
        array[:whole].reshape(-1, batch_size, *array.shape[1:]) for array in (images, labels)
    ]
    totals = jax.lax.map(lambda batch: measure(*batch), tuple(batched)).sum(axis=0)
    if whole < count:
        totals += measure(images[whole:], labels[whole:])
    return {"loss": totals[0] / count, "accuracy": totals[1] / count}


def has_diverged(train_loss: float, num_classes: int) -> bool:
    """Whether a loss is not finite or no better than guessing, log(num_classes)."""
    return not train_loss < math.log(num_classes)
