"""The networks of the GradInit study: where no formula is sure to fit.

Deep convolutional networks with and without batch normalization, dense graphs of convolutions, and
a transformer that normalizes behind every addition. Every one is an ordinary Flax NNX module.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import archscale_jax as archscale
from experiments.lab.families import HEAD_FEATURES, PATCH, patches
from experiments.lab.models import create_network
from experiments.lab.models.convolution import conv_general_dilated

STAGES = 3
"""Stages of a convolutional network; each halves the image and doubles the channels."""


class _Layer(nnx.Module):
    """A 3 x 3 convolution, and batch normalization behind it where asked."""

    def __init__(self, inputs: int, outputs: int, normalized: bool, *, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(
            inputs,
            outputs,
            (3, 3),
            padding="SAME",
            use_bias=not normalized,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.normalization = nnx.BatchNorm(outputs, rngs=rngs) if normalized else None

    def __call__(self, features: Float[Array, "b h w c"], train: bool) -> Array:
        features = self.convolution(features)
        if self.normalization is None:
            return features
        return self.normalization(features, use_running_average=not train)


class PlainNetwork(nnx.Module):
    """A VGG-style network: `depth` convolutions in three stages, max pooling, one readout."""

    def __init__(self, image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
        stages = []
        inputs = image[-1]
        for stage in range(STAGES):
            outputs = width * 2**stage
            count = depth // STAGES + (stage < depth % STAGES)
            layers = []
            for _ in range(count):
                layers.append(_Layer(inputs, outputs, normalized, rngs=rngs))
                inputs = outputs
            stages.append(nnx.List(layers))
        self.stages = nnx.List(stages)
        self.readout = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        features = images
        for index, stage in enumerate(self.stages):
            if index:
                features = nnx.max_pool(features, (2, 2), (2, 2))
            for layer in stage:
                features = nnx.relu(layer(features, train))
        return self.readout(jnp.mean(features, axis=(1, 2)))


class ResidualStages(nnx.Module):
    """A residual network of three stages: `depth` blocks x + L₂ σ(L₁ σ(x)), and one readout.

    Between stages the skip is pooled and joined by channels of zeros, without parameters.
    """

    def __init__(self, image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
        self.stem = _Layer(image[-1], width, normalized, rngs=rngs)
        blocks = []
        for stage in range(STAGES):
            outputs = width * 2**stage
            for index in range(depth // STAGES + (stage < depth % STAGES)):
                inputs = outputs // 2 if stage and not index else outputs
                layers = [
                    _Layer(inputs, outputs, normalized, rngs=rngs),
                    _Layer(outputs, outputs, normalized, rngs=rngs),
                ]
                blocks.append(nnx.List(layers))
        self.blocks = nnx.List(blocks)
        self.readout = nnx.Linear(width * 2 ** (STAGES - 1), classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        features = self.stem(images, train)
        for first, second in self.blocks:
            added = first.convolution.out_features - features.shape[-1]
            if added:
                features = nnx.avg_pool(features, (2, 2), (2, 2))
            branch = second(nnx.relu(first(nnx.relu(features), train)), train)
            features = jnp.pad(features, ((0, 0), (0, 0), (0, 0), (0, added))) + branch
        return self.readout(jnp.mean(nnx.relu(features), axis=(1, 2)))


class PostNormTransformer(nnx.Module):
    """A vision transformer whose layer normalizations follow the additions, as in the original.

    `depth` counts blocks. Without warm-up Adam trains it at small learning rates only.
    """

    def __init__(self, image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
        if not normalized:
            raise ValueError("normalized must be True: a Post-LN transformer is none without")
        height, side, channels = image
        tokens = (height // PATCH) * (side // PATCH)
        self.stem = nnx.Linear(PATCH * PATCH * channels, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (tokens, width)) * 0.02)
        self.blocks = nnx.List([_PostNormBlock(width, rngs=rngs) for _ in range(depth)])
        self.readout = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        del train
        features = self.stem(patches(images)) + self.positions[...]
        for block in self.blocks:
            features = block(features)
        return self.readout(jnp.mean(features, axis=1))


class _PostNormBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        heads = max(width // HEAD_FEATURES, 1)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.after_attention = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)
        self.after_mlp = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, features: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        features = self.after_attention(features + self.attention(features))
        return self.after_mlp(features + self.contract(nnx.relu(self.expand(features))))


def complete_network(image, width: int, depth: int, classes: int, normalized: bool, *, rngs):
    """A network on a complete DAG: every vertex sums a convolution of each before it."""
    text = "_".join("2" * vertex for vertex in range(1, depth + 1))
    return create_network(
        archscale.dag_graph(text, kernel_size=3),
        image,
        width,
        classes,
        normalization="batch" if normalized else None,
        rngs=rngs,
    )


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "plain": PlainNetwork,
    "residual": ResidualStages,
    "dag": complete_network,
    "transformer": PostNormTransformer,
}
