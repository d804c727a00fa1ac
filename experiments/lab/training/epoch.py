"""One epoch, or a part of it, as one jitted call: a scan over batches."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Scalar

from archscale_jax._trees import PyTree
from experiments.lab.datasets import augment, epoch_indices
from experiments.lab.training.network import cross_entropy


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


def create_train_state(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
) -> TrainState:
    """Returns the state before the first epoch."""
    return TrainState(params, model_state, optimizer.init(params), jnp.int32(0), key)


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
    """Trains one epoch: every example once, in random order, an incomplete batch excluded.

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

    def loss(params, model_state, batch):
        index, indices = batch
        inputs = images[indices]
        if flip or padding:
            key = jax.random.fold_in(augment_key, index)
            inputs = augment(key, inputs, flip=flip, padding=padding)
        mean, (_, new_state) = cross_entropy(
            graphdef, params, model_state, inputs, labels[indices], train=True
        )
        return mean, new_state

    carry = (state.params, state.model_state, state.optimizer_state)
    steps = (first_step + jnp.arange(len(batches)), batches)
    carry, losses = scan_updates(loss, optimizer, carry, steps)
    return TrainState(*carry, epoch=state.epoch, key=state.key), losses


def scan_updates(
    loss: Callable[[PyTree, PyTree, PyTree], tuple[Array, PyTree]],
    optimizer: optax.GradientTransformation,
    carry: tuple[PyTree, PyTree, PyTree],
    steps: PyTree,
) -> tuple[tuple[PyTree, PyTree, PyTree], Float[Array, " steps"]]:
    """Trains for one update a row of `steps`. Pure.

    Args:
      loss: from params, model state and a row of `steps` to the loss and the new model state.
      optimizer: see `train_epoch`.
      carry: params, model state and the optimizer's state.
      steps: tree of arrays [steps, …] that say what each update is computed on.

    Returns:
      The new `carry` and the loss of every update, taken before it.
    """

    def step(carry, row):
        params, model_state, optimizer_state = carry
        (mean, model_state), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, model_state, row
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), model_state, optimizer_state), mean

    return jax.lax.scan(step, carry, steps)


jitted_train_epoch = jax.jit(
    train_epoch,
    static_argnames=("graphdef", "optimizer", "batch_size", "max_steps", "flip", "padding"),
)
jitted_train_batches = jax.jit(
    train_batches, static_argnames=("graphdef", "optimizer", "flip", "padding")
)
