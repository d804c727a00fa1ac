"""The networks of `experiments.defaults`: twelve families in Flax linen, as their users write them.

Every network has a depth and a width, and a batch of real data for every update. None was changed
for this library.
"""

import functools
import pathlib
import sysconfig
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.lab.datasets import Dataset, downscale, load

TOKENS = 64
VOCABULARY = 256


class Family(NamedTuple):
    """A family of networks and what it is trained on.

    Attributes:
      build: `(depth, width)` to a linen module.
      base: depth and width of the network on which rates are tuned.
      inputs: of a batch, what the module is called with.
      loss: `(outputs, batch)` to the loss.
      batches: `(data, seed, step)` to a batch.
      data: loads the data.
      optimizer: `sgd` (momentum 0.9) or `adam`.
      arguments: keyword arguments of the module's call.
    """

    build: Callable[[int, int], nn.Module]
    base: tuple[int, int]
    inputs: Callable[[Any], tuple]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[Any, int, int], Any]
    data: Callable[[], Any]
    optimizer: str
    arguments: Mapping[str, Any] = types.MappingProxyType({})


# Images.


class Mlp(nn.Module):
    depth: int
    width: int
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x.reshape(len(x), -1))
        for _ in range(self.depth):
            if self.residual:
                x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(nn.relu(x))))
            else:
                x = nn.Dense(self.width)(nn.relu(x))
        return nn.Dense(10)(nn.relu(x))


class Cnn(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(x))
        for _ in range(self.depth):
            x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class ResNet(nn.Module):
    """Post-activation blocks with batch normalization, as He et al. have them, in two stages."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage in range(2):
            for block in range(self.depth):
                features, strides = self.width * 2**stage, 2 if stage and not block else 1
                y = nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)
                y = nn.Conv(features, (3, 3), use_bias=False)(nn.relu(norm()(y)))
                y = norm()(y)
                if x.shape != y.shape:
                    x = norm()(nn.Conv(features, (1, 1), strides=strides, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class WideResNet(nn.Module):
    """Pre-activation blocks with batch normalization [Zagoruyko and Komodakis]."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for stage in range(2):
            for block in range(self.depth):
                features, strides = self.width * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(x))
                if x.shape[-1] != features or strides > 1:
                    x = nn.Conv(features, (1, 1), strides=strides, use_bias=False)(y)
                y = nn.Conv(features, (3, 3), strides=strides, use_bias=False)(y)
                x = x + nn.Conv(features, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        return nn.Dense(10)(nn.relu(norm()(x)).mean(axis=(1, 2)))


class DenseNet(nn.Module):
    """Two dense blocks of `depth` layers that grow by `width` features each."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(2 * self.width, (3, 3), use_bias=False)(x)
        for block in range(2):
            for _ in range(self.depth):
                y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(x)))
                x = jnp.concatenate([x, y], axis=-1)
            if not block:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(norm()(x)).mean(axis=(1, 2)))


class UNet(nn.Module):
    """Two resolutions, group normalization, a skip that is concatenated."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        def blocks(x, features):
            x = nn.Conv(features, (3, 3))(x)
            for _ in range(self.depth):
                y = nn.Conv(features, (3, 3))(nn.silu(nn.GroupNorm(num_groups=4)(x)))
                x = x + nn.Conv(features, (3, 3))(nn.silu(nn.GroupNorm(num_groups=4)(y)))
            return x

        fine = blocks(x, self.width)
        coarse = blocks(nn.avg_pool(fine, (2, 2), strides=(2, 2)), 2 * self.width)
        up = nn.ConvTranspose(self.width, (2, 2), strides=(2, 2))(coarse)
        x = blocks(jnp.concatenate([fine, up], axis=-1), self.width)
        return nn.Conv(1, (3, 3))(nn.silu(nn.GroupNorm(num_groups=4)(x)))


def _patches(x):
    batch, height, width, _ = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, (height // 2) * (width // 2), -1)


class Mixer(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(_patches(x))
        for _ in range(self.depth):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(64)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class Block(nn.Module):
    """A pre-LN transformer block."""

    width: int
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        heads = max(1, self.width // 16)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(heads)(y, y, mask=mask)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))


class Vit(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(_patches(x))
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            x = Block(self.width)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


# Text.


class Gpt(nn.Module):
    depth: int
    width: int
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCABULARY, self.width)
        x = table(tokens) + nn.Embed(TOKENS, self.width)(jnp.arange(tokens.shape[-1]))
        for _ in range(self.depth):
            x = Block(self.width, causal=True)(x)
        x = nn.LayerNorm()(x)
        return table.attend(x) if self.tied else nn.Dense(VOCABULARY, use_bias=False)(x)


class ScanDecoder(nn.Module):
    """The same decoder, its blocks stacked and scanned over."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, self.width)(tokens)
        x = x + nn.Embed(TOKENS, self.width)(jnp.arange(tokens.shape[-1]))
        stack = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = stack(Block(self.width, causal=True, name="blocks"), x, None)
        return nn.Dense(VOCABULARY, use_bias=False)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x: Any = nn.Embed(VOCABULARY, self.width)(tokens)
        for _ in range(self.depth):
            x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(VOCABULARY)(x)


# Graphs and control.


class GraphNetwork(nn.Module):
    """Residual message passing: means over neighbours, one layer of messages, one of updates."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        count = jax.ops.segment_sum(jnp.ones(len(receivers)), receivers, len(nodes))[:, None]
        x = nn.Dense(self.width)(nodes)
        for _ in range(self.depth):
            messages = nn.Dense(self.width)(nn.relu(x))[senders]
            y = jax.ops.segment_sum(messages, receivers, len(nodes)) / count
            x = x + nn.Dense(self.width)(nn.relu(y))
        return nn.Dense(10)(nn.relu(x))


class ActorCritic(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, observations):
        heads = []
        for outputs in (2, 1):
            x = observations
            for _ in range(self.depth):
                x = nn.tanh(nn.Dense(self.width)(x))
            heads.append(nn.Dense(outputs)(x))
        return jnp.concatenate(heads, axis=-1)


# Data.


@functools.cache
def _images(dataset: str, factor: int) -> Dataset:
    return downscale(load(dataset), factor)


def _image_batch(data: Dataset, seed: int, step: int, size: int = 64) -> Any:
    chosen = np.random.default_rng((seed, step)).integers(0, len(data.train_images), size)
    return data.train_images[chosen], data.train_labels[chosen]


def _noisy_batch(data: Dataset, seed: int, step: int) -> Any:
    images = jnp.pad(_image_batch(data, seed, step, 32)[0], ((0, 0), (1, 1), (1, 1), (0, 0)))
    noise = np.random.default_rng((seed, step, 1)).standard_normal(images.shape, np.float32)
    return images + noise, images


@functools.cache
def _text() -> np.ndarray:
    """The sources of Python's standard library, as bytes."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    return np.frombuffer(b"".join(one.read_bytes() for one in files), np.uint8)


def _text_batch(text: np.ndarray, seed: int, step: int) -> Any:
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - TOKENS - 1, 16)
    rows = np.stack([text[start : start + TOKENS + 1] for start in starts]).astype(np.int32)
    return rows[:, :-1], rows[:, 1:]


@functools.cache
def _neighbours() -> Any:
    """The digits, each with edges from the eight digits that are nearest to it."""
    data = load("digits")
    nodes = np.asarray(data.train_images).reshape(len(data.train_images), -1)
    distances = ((nodes[:, None] - nodes[None]) ** 2).sum(-1)
    senders = np.argsort(distances, axis=1)[:, 1:9].reshape(-1)
    receivers = np.repeat(np.arange(len(nodes)), 8)
    return nodes, senders, receivers, np.asarray(data.train_labels)


def _graph_batch(data: Any, seed: int, step: int) -> Any:
    chosen = np.random.default_rng((seed, step)).integers(0, len(data[3]), 256)
    return *data, chosen


def _cross_entropy(outputs: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch[-1]).mean()


def _node_loss(outputs: jax.Array, batch: Any) -> jax.Array:
    *_, labels, chosen = batch
    return _cross_entropy(outputs[chosen], (labels[chosen],))


def _squared_error(outputs: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean((outputs - batch[1]) ** 2)


def _first(batch: Any) -> tuple:
    return batch[:1]


_FASHION = functools.partial(_images, "fashion_mnist", 2)


def _images_by(
    build: Callable[[int, int], nn.Module], depth: int, width: int, optimizer: str = "sgd"
) -> Family:
    return Family(build, (depth, width), _first, _cross_entropy, _image_batch, _FASHION, optimizer)


def _in_training(family: Family) -> Family:
    return family._replace(arguments={"train": True})


def _text_by(build: Callable[[int, int], nn.Module], depth: int, width: int) -> Family:
    return Family(build, (depth, width), _first, _cross_entropy, _text_batch, _text, "adam")


FAMILIES: dict[str, Family] = {
    "mlp": _images_by(Mlp, 4, 64),
    "residual_mlp": _images_by(functools.partial(Mlp, residual=True), 2, 64),
    "cnn": _images_by(Cnn, 4, 16),
    "resnet": _in_training(_images_by(ResNet, 1, 8)),
    "wide_resnet": _in_training(_images_by(WideResNet, 1, 8)),
    "densenet": _in_training(_images_by(DenseNet, 3, 4)),
    "unet": Family(UNet, (1, 8), _first, _squared_error, _noisy_batch, _FASHION, "adam"),
    "mixer": _images_by(Mixer, 2, 32, "adam"),
    "vit": _images_by(Vit, 2, 32, "adam"),
    "gpt": _text_by(Gpt, 2, 32),
    "gpt_tied": _text_by(functools.partial(Gpt, tied=True), 2, 32),
    "scan_decoder": _text_by(ScanDecoder, 2, 32),
    "lstm": _text_by(Lstm, 1, 32),
    "graph": Family(
        GraphNetwork,
        (2, 32),
        lambda batch: batch[:3],
        _node_loss,
        _graph_batch,
        _neighbours,
        "adam",
    ),
    "ppo": Family(
        ActorCritic,
        (2, 32),
        lambda batch: batch,
        lambda outputs, batch: jnp.square(outputs).mean(),  # see `experiments.default_ppo`
        lambda data, seed, step: (np.ones((1, 4), np.float32),),
        lambda: None,
        "adam",
    ),
}
"""Families by name, and `ppo`, which has a training of its own."""
