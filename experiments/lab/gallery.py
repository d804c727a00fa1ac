"""The models whose pictures the docs show."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

import archscale_jax as archscale

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 64), jnp.int32)


class ResidualBlock(linen.Module):
    """Two convolutions with batch norm beside a skip, or beside a projection."""

    features: int
    stride: int = 1

    @linen.compact
    def __call__(self, x):
        def layer(x, name, size, stride=1):
            conv = linen.Conv(
                self.features, (size, size), (stride, stride), use_bias=False, name=name
            )
            return linen.BatchNorm(use_running_average=True, name=f"{name}_norm")(conv(x))

        y = layer(linen.relu(layer(x, "conv1", 3, self.stride)), "conv2", 3)
        if x.shape != y.shape:
            x = layer(x, "shortcut", 1, self.stride)
        return linen.relu(x + y)


class ResNet(linen.Module):
    """For CIFAR; of 18 layers where every stage has two blocks."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(64, (3, 3), use_bias=False, name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, name="norm1")(x))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                name = f"layer{stage + 1}_block{block}"
                x = ResidualBlock(64 * 2**stage, stride, name=name)(x)
        return linen.Dense(10, name="head")(x.mean((1, 2)))


class TransformerBlock(linen.Module):
    """Attention and MLP, each behind a layer norm and beside a skip."""

    width: int = 512

    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(name="norm1")(x)
        x = x + linen.MultiHeadDotProductAttention(8, name="attention")(y, y)
        y = linen.Dense(4 * self.width, name="mlp_in")(linen.LayerNorm(name="norm2")(x))
        return x + linen.Dense(self.width, name="mlp_out")(linen.gelu(y))


class OneBlock(linen.Module):
    """A transformer block between its embedding and its readout."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(1000, 512, name="tokens")(tokens)
        x = TransformerBlock(512, name="block")(x)
        return linen.Dense(1000, name="head")(linen.LayerNorm(name="norm")(x))


def traced(model: linen.Module, inputs: Any) -> archscale.Architecture:
    """Traces a linen model on shapes, its running averages bound to the function."""
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    return archscale.trace(
        lambda params, inputs: model.apply({"params": params, **state}, inputs), params, inputs
    )
