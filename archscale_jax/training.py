"""Training loops for Flax NNX classifiers: one jitted call an epoch.

A network is split into its `nnx.GraphDef` and its state, and `TrainState` is a plain pytree: vmap
it over seeds or rates, shard it, save it. The examples are arguments, never constants of a compiled
program.

Precision is the network's: `dtype` and `param_dtype` of its layers say what is computed in and what
is trained. Losses are taken in float32 at least.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Scalar

from archscale_jax.architecture import PyTree
from archscale_jax.datasets import Dataset, augment, epoch_indices
from archscale_jax.graph import live_vertices
from archscale_jax.precision import exact


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      params: trainable state, `nnx.Param`.
      model_state: the rest of the network's state (batch statistics).
      optimizer_state: optax state.
      epoch: number of finished epochs, int32.
      key: random key that, with the epoch, fixes batches and augmentation.
    """

    params: PyTree
    model_state: PyTree
    optimizer_state: PyTree
    epoch: Int[Scalar, ""]
    key: Array


def create_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns SGD with coupled weight decay, as in the reference experiments.

    Args:
      learning_rate: base rate or schedule; chain `scale_by_architecture` behind.
      momentum: in [0, 1); 0 keeps no trace.
      nesterov: Nesterov's form of momentum.
      weight_decay: added to the gradient, times the weight; not negative.

    Raises:
      ValueError: a rate that is not positive and finite, a momentum or decay outside its range,
        or Nesterov without momentum.
    """
    if not callable(learning_rate):
        check_learning_rate(learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), found {momentum}")
    if nesterov and not momentum:
        raise ValueError("Nesterov's momentum needs momentum > 0")
    if not (weight_decay >= 0 and weight_decay < float("inf")):
        raise ValueError(f"weight_decay must be finite and not negative, found {weight_decay}")
    sgd = optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd) if weight_decay else sgd


def create_schedule(
    learning_rate: float | Array,
    total_steps: int,
    *,
    kind: Literal["constant", "cosine"] = "constant",
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Returns a schedule that starts at 0 while warming up linearly, then holds or falls to 0.

    Args:
      learning_rate: the peak.
      total_steps: number of updates, warm-up included.
      kind: `constant`, or `cosine` to 0 at `total_steps`.
      warmup_steps: updates until the peak.

    Raises:
      ValueError: a rate that is not positive and finite, an unknown kind, or a warm-up that is
        negative or leaves no step.
    """
    check_learning_rate(learning_rate)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps), found {warmup_steps} of {total_steps}"
        )
    if kind not in ("constant", "cosine"):
        raise ValueError(f"unknown schedule {kind!r}; accepted are constant, cosine")
    if kind == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def check_learning_rate(learning_rate: float | Array) -> None:
    """Checks a learning rate; one that is traced passes.

    Raises:
      ValueError: it is not a positive finite number.
    """
    if isinstance(learning_rate, Tracer):
        return
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"a learning rate must be positive and finite, found {learning_rate}")


def create_train_state(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
) -> TrainState:
    """Returns the state before the first epoch."""
    return TrainState(params, model_state, optimizer.init(params), jnp.int32(0), key)


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
    logits = exact(network(images, train=train))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), (logits, nnx.state(network, nnx.Not(nnx.Param)))


def vertex_features(
    graphdef: nnx.GraphDef, params: PyTree, model_state: PyTree, images: Float[Array, "b h w c"]
) -> list[Array]:
    """Returns the features that `measure_update` reads of a `DagMLP` or `DagCNN`.

    Those of the vertices on end-to-end paths, in order, normalised as in training.
    """
    network = nnx.merge(graphdef, params, model_state, copy=True)
    features = network.features(images, train=True)
    return [features[vertex] for vertex in np.flatnonzero(live_vertices(network.graph()))]


def count_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Returns the number of updates in so many epochs, at least 1.

    Raises:
      ValueError: a batch larger than the training set, or epochs that are not positive.
    """
    if batch_size > num_examples:
        raise ValueError(f"batch_size {batch_size} exceeds the {num_examples} training examples")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be positive and finite, found {epochs}")
    return max(round(epochs * (num_examples // batch_size)), 1)


def train_epoch(
    state: TrainState,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    max_steps: int | None = None,
    flip: bool = False,
    padding: int = 0,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Trains one epoch: every example once, in random order, an incomplete batch left out.

    Pure; wrap it in `jax.jit` (as `jitted_train_epoch` does) and `jax.vmap` over states as needed.

    Args:
      state: see `TrainState`.
      images: the training images.
      labels: their classes.
      graphdef: structure of the network.
      optimizer: the transformation whose state is `state.optimizer_state`.
      batch_size: examples an update.
      max_steps: stop the epoch after so many updates.
      flip: mirror half of the images.
      padding: shift images by up to so many pixels (pad and crop).

    Returns:
      The new state and the training loss of every update, taken before it.

    Raises:
      ValueError: a batch size below 1 or above the number of examples.
    """
    batches = epoch_batches(state, len(images), batch_size)[:max_steps]
    state, losses = train_batches(
        state,
        images,
        labels,
        batches,
        graphdef=graphdef,
        optimizer=optimizer,
        flip=flip,
        padding=padding,
    )
    return state._replace(epoch=state.epoch + 1), losses


def epoch_batches(
    state: TrainState, num_examples: int, batch_size: int
) -> Int[Array, "steps batch_size"]:
    """Returns the examples of every update of the epoch that `state` is in; see `train_epoch`."""
    return epoch_indices(_epoch_keys(state)[0], num_examples, batch_size)


def _epoch_keys(state: TrainState) -> Array:
    return jax.random.split(jax.random.fold_in(state.key, state.epoch))


def train_batches(
    state: TrainState,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    batches: Int[Array, "steps batch_size"],
    first_step: int | Int[Scalar, ""] = 0,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    flip: bool = False,
    padding: int = 0,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Trains on consecutive rows of `epoch_batches`; the epoch's number stays. Pure.

    Args:
      state: see `TrainState`.
      images: the training images.
      labels: their classes.
      batches: indices of the examples of every update.
      first_step: number of the first update in its epoch, which fixes its augmentation.
      graphdef: structure of the network.
      optimizer: see `train_epoch`.
      flip: see `train_epoch`.
      padding: see `train_epoch`.

    Returns:
      The new state and the training loss of every update, taken before it.
    """
    augment_key = _epoch_keys(state)[1]

    def step(carry, batch):
        params, model_state, optimizer_state = carry
        index, indices = batch
        inputs = images[indices]
        if flip or padding:
            key = jax.random.fold_in(augment_key, index)
            inputs = augment(key, inputs, flip=flip, padding=padding)
        (loss, (_, model_state)), gradients = jax.value_and_grad(
            lambda params: cross_entropy(
                graphdef, params, model_state, inputs, labels[indices], train=True
            ),
            has_aux=True,
        )(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), model_state, optimizer_state), loss

    carry = (state.params, state.model_state, state.optimizer_state)
    steps = (first_step + jnp.arange(len(batches)), batches)
    carry, losses = jax.lax.scan(step, carry, steps)
    return TrainState(*carry, epoch=state.epoch, key=state.key), losses


jitted_train_epoch = jax.jit(
    train_epoch,
    static_argnames=("graphdef", "optimizer", "batch_size", "max_steps", "flip", "padding"),
)
jitted_train_batches = jax.jit(
    train_batches, static_argnames=("graphdef", "optimizer", "flip", "padding")
)
_jitted_epoch_batches = jax.jit(epoch_batches, static_argnums=(1, 2))


def train_losses(state: TrainState, dataset: Dataset, **options: Any) -> Iterator[float]:
    """`train_parts`, of which it yields the losses alone."""
    return (loss for _, loss in train_parts(state, dataset, **options))


def train_parts(
    state: TrainState,
    dataset: Dataset,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    total_steps: int,
    flip: bool = False,
    padding: int = 0,
) -> Iterator[tuple[TrainState, float]]:
    """Trains, every epoch in about ten equal parts, and yields state and mean loss after each.

    A loss is taken before its update, on examples that were not seen in this epoch. Stop reading to
    stop training. Several threads may train at once.

    Args:
      state: a new state.
      dataset: its training split is used.
      graphdef: structure of the network.
      optimizer: see `train_epoch`.
      batch_size: examples an update.
      total_steps: updates in all.
      flip: see `train_epoch`.
      padding: see `train_epoch`.

    Raises:
      ValueError: a batch size below 1 or above the number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    images, labels = dataset.train_images, dataset.train_labels
    steps_per_epoch = len(images) // batch_size
    part = part_length(min(steps_per_epoch, total_steps))
    for epoch in range(math.ceil(total_steps / max(steps_per_epoch, 1))):
        state = state._replace(epoch=jnp.int32(epoch))
        batches = _jitted_epoch_batches(state, len(images), batch_size)
        batches = batches[: total_steps - epoch * steps_per_epoch]
        for first in range(0, len(batches), part):
            state, losses = jitted_train_batches(
                state,
                images,
                labels,
                batches[first : first + part],
                jnp.int32(first),
                graphdef=graphdef,
                optimizer=optimizer,
                flip=flip,
                padding=padding,
            )
            yield state, float(jnp.mean(losses))


def part_length(steps: int) -> int:
    """Returns the updates of a part of `train_parts`, of so many in an epoch.

    About a tenth, without remainder if possible: parts of one length share a program.
    """
    for parts in (10, 9, 11, 8, 12, 7, 13):
        if steps % parts == 0:
            return steps // parts
    return math.ceil(steps / 10)


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


def fit(
    state: TrainState,
    dataset: Dataset,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    total_steps: int,
    flip: bool = False,
    padding: int = 0,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Trains from `state.epoch` to the end, epoch by epoch.

    Args:
      state: a new state, or one restored from a checkpoint.
      dataset: what to train and to test on.
      graphdef: structure of the network.
      optimizer: see `train_epoch`.
      batch_size: examples an update.
      total_steps: updates in all; the last epoch stops where they are done.
      flip: see `train_epoch`.
      padding: see `train_epoch`.

    Yields:
      After each epoch the state and its metrics: `epoch`, `step`, `running_loss` (mean over the
      epoch's updates), `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy` (after it,
      over whole splits) and `diverged` (1.0 or 0.0, see `has_diverged`).

    Raises:
      ValueError: at the first epoch, a batch size below 1 or above the number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    steps_per_epoch = len(dataset.train_images) // batch_size
    splits = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    for epoch in range(int(state.epoch), math.ceil(total_steps / max(steps_per_epoch, 1))):
        left = total_steps - epoch * steps_per_epoch
        state, losses = jitted_train_epoch(
            state,
            *splits["train"],
            graphdef=graphdef,
            optimizer=optimizer,
            batch_size=batch_size,
            max_steps=left if left < steps_per_epoch else None,
            flip=flip,
            padding=padding,
        )
        metrics = {
            "epoch": epoch + 1,
            "step": epoch * steps_per_epoch + len(losses),
            "running_loss": float(jnp.mean(losses)),
        }
        for split, examples in splits.items():
            measured = evaluate(state.params, state.model_state, *examples, graphdef=graphdef)
            metrics |= {f"{split}_{name}": float(value) for name, value in measured.items()}
        metrics["diverged"] = float(has_diverged(metrics["train_loss"], dataset.num_classes))
        yield state, metrics


def has_diverged(train_loss: float, num_classes: int) -> bool:
    """Whether a loss is not finite or no better than guessing, log(num_classes)."""
    return not train_loss < math.log(num_classes)
