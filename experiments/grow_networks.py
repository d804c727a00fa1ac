"""The networks that grow: perceptrons and convolutional networks on graphs, and ResNet-18.

Every one is an ordinary Flax NNX module that takes kernels of any width, so that one loss function
serves a network of any size.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import archscale_jax as archscale
from archscale_jax._spaces import chain_string
from experiments.lab.models import create_network

STAGE_BLOCKS = (2, 2, 2, 2)
"""Residual blocks of the stages of ResNet-18."""


def _convolution(inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (size, size), strides=(stride, stride), padding="SAME", rngs=rngs
    )


class ResidualBlock(nnx.Module):
    """x + L₂ σ(L₁ σ(x)); where width or stride change, the skip is a convolution 1 x 1 of σ(x)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.first = _convolution(inputs, inner, 3, stride, rngs)
        self.second = _convolution(inner, outputs, 3, 1, rngs)
        projected = stride > 1
        self.skip = _convolution(inputs, outputs, 1, stride, rngs) if projected else None

    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        active = nnx.relu(features)
        branch = self.second(nnx.relu(self.first(active)))
        return branch + (features if self.skip is None else self.skip(active))


class ResNet18(nnx.Module):
    """ResNet-18 without normalization: 4 stages of 2 blocks, activations before convolutions.

    Args:
      image: height, width, channels.
      width: channels of the first stage; they double at every other.
      classes: outputs.
      rngs: random streams.
    """

    def __init__(self, image, width: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = _convolution(image[-1], width, 3, 1, rngs)
        blocks, inputs = [], width
        for stage, count in enumerate(STAGE_BLOCKS):
            outputs = width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(ResidualBlock(inputs, outputs, outputs, stride, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.readout = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        del train
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.readout(jnp.mean(nnx.relu(features), axis=(1, 2)))


def mlp(image, width: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A perceptron of four layers."""
    graph = archscale.dag_graph(chain_string(3))
    return create_network(graph, image, width, classes, rngs=rngs)


def dag_cnn(image, width: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A convolutional network of four vertices, each of which reads all before it."""
    graph = archscale.dag_graph("2_22_222", kernel_size=3)
    return create_network(graph, image, width, classes, rngs=rngs)


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp,
    "dag_cnn": dag_cnn,
    "resnet18": ResNet18,
}
