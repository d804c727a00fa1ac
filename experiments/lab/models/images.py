"""Image classifiers as one writes them: plain, residual, transformers. Ordinary Flax NNX modules.

What is known about them, `archscale_jax.trace` reads off.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.lab.models.convolution import conv_general_dilated

PATCH = 7
"""Side of the transformers' patches, in pixels."""
HEAD_FEATURES = 16


class ResidualNetwork(nnx.Module):
    """A residual network without normalization, x + W₂ σ(W₁ σ(x)); depth counts blocks."""

    def __init__(self, channels: int, width: int, depth: int, classes: int, *, rngs: nnx.Rngs):
        def layer(features: int) -> nnx.Conv:
            return nnx.Conv(
                features,
                width,
                (3, 3),
                padding="SAME",
                conv_general_dilated=conv_general_dilated,
                rngs=rngs,
            )

        self.stem = layer(channels)
        self.blocks = nnx.List([nnx.List([layer(width), layer(width)]) for _ in range(depth)])
        self.readout = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        del train
        features = self.stem(images)
        for first, second in self.blocks:
            features = features + second(nnx.relu(first(nnx.relu(features))))
        return self.readout(jnp.mean(nnx.relu(features), axis=(1, 2)))


class VisionTransformer(nnx.Module):
    """A Pre-LN transformer on patches of an image; depth counts blocks of two additions each."""

    def __init__(self, image: tuple[int, int, int], width: int, depth: int, classes: int, *, rngs):
        height, side, channels = image
        tokens = (height // PATCH) * (side // PATCH)
        self.stem = nnx.Linear(PATCH * PATCH * channels, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (tokens, width)) * 0.02)
        self.blocks = nnx.List([_Block(width, rngs=rngs) for _ in range(depth)])
        self.normalization = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        del train
        features = self.stem(patches(images)) + self.positions[...]
        for block in self.blocks:
            features = block(features)
        return self.readout(jnp.mean(self.normalization(features), axis=1))


class _Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        heads = max(width // HEAD_FEATURES, 1)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, features: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        features = features + self.attention(self.before_attention(features))
        return features + self.contract(nnx.gelu(self.expand(self.before_mlp(features))))


def patches(images: Float[Array, "b h w c"]) -> Float[Array, "b t p"]:
    """Cuts images into patches, p pixels each; those at the edge that fill none are excluded."""
    batch, height, width, channels = images.shape
    rows, columns = height // PATCH, width // PATCH
    images = images[:, : rows * PATCH, : columns * PATCH]
    cut = images.reshape(batch, rows, PATCH, columns, PATCH, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


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

    Between stages the skip is pooled and joined by channels of zeros, without parameters. Outputs
    of L₁ have `hidden` channels in the first stage, by default `width`; both double at every other.
    """

    def __init__(
        self, image, width: int, depth: int, classes: int, normalized: bool, *, hidden=None, rngs
    ):
        self.stem = _Layer(image[-1], width, normalized, rngs=rngs)
        blocks = []
        for stage in range(STAGES):
            outputs = width * 2**stage
            for index in range(depth // STAGES + (stage < depth % STAGES)):
                inputs = outputs // 2 if stage and not index else outputs
                inner = (hidden or width) * 2**stage
                layers = [
                    _Layer(inputs, inner, normalized, rngs=rngs),
                    _Layer(inner, outputs, normalized, rngs=rngs),
                ]
                blocks.append(nnx.List(layers))
        self.blocks = nnx.List(blocks)
        self.readout = nnx.Linear(width * 2 ** (STAGES - 1), classes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> Array:
        features = self.stem(images, train)
        for first, second in self.blocks:
            added = second.convolution.out_features - features.shape[-1]
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
            raise ValueError("normalized must be True: a Post-LN transformer needs it")
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
