"""Whole runs, read as they go: part by part with their losses, or epoch by epoch with metrics."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.lab.datasets import Dataset
from experiments.lab.training.epoch import (
    TrainState,
    epoch_batches,
    jitted_train_batches,
    jitted_train_epoch,
)
from experiments.lab.training.network import evaluate, has_diverged

_jitted_epoch_batches = jax.jit(epoch_batches, static_argnums=(1, 2))


def train_losses(state: TrainState, dataset: Dataset, **options: Any) -> Iterator[float]:
    """Yields the losses of `train_parts` alone."""
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
    last: Mapping[str, Any] | None = None,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Trains from `state.epoch` to the end, epoch by epoch.

    An epoch that an earlier call with fewer steps ended in is finished, and its metrics come anew.

    Args:
      state: a new state, or one restored from a checkpoint.
      dataset: what to train and to test on.
      graphdef: structure of the network.
      optimizer: see `train_epoch`.
      batch_size: examples an update.
      total_steps: updates in all; the last epoch stops where they are done.
      flip: see `train_epoch`.
      padding: see `train_epoch`.
      last: the metrics that came with a restored state.

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
    options = {"graphdef": graphdef, "optimizer": optimizer, "flip": flip, "padding": padding}
    start, begun = int(state.epoch), 0
    if last is not None and last["step"] < min(start * steps_per_epoch, total_steps):
        start -= 1
        begun = last["step"] - start * steps_per_epoch
        state = state._replace(epoch=jnp.int32(start))
    for epoch in range(start, math.ceil(total_steps / max(steps_per_epoch, 1))):
        left = min(total_steps - epoch * steps_per_epoch, steps_per_epoch)
        if begun and last is not None:
            state, losses = _finish_epoch(state, *splits["train"], begun, left, batch_size, options)
            before = math.nan if last["running_loss"] is None else last["running_loss"]
            losses = jnp.concatenate([jnp.full(begun, before, losses.dtype), losses])
        else:
            state, losses = jitted_train_epoch(
                state,
                *splits["train"],
                batch_size=batch_size,
                max_steps=left if left < steps_per_epoch else None,
                **options,
            )
        begun = 0
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


def _finish_epoch(
    state: TrainState,
    images: Any,
    labels: Any,
    begun: int,
    end: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> tuple[TrainState, Any]:
    """The updates of an epoch from `begun` to `end`, and their losses."""
    batches = _jitted_epoch_batches(state, len(images), batch_size)[begun:end]
    state, losses = jitted_train_batches(
        state, images, labels, batches, jnp.int32(begun), **options
    )
    return state._replace(epoch=state.epoch + 1), losses
