"""Networks of four families at any width and depth, and how each is parametrized.

Every one is an ordinary Flax NNX module; what is known about it, `archscale_jax.trace` reads off.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import chain_string
from archscale_jax._trees import PyTree
from experiments.lab.datasets import Dataset
from experiments.lab.models import create_network
from experiments.lab.models.convolution import conv_general_dilated

FAMILIES = ("mlp", "cnn", "resnet", "transformer")
PATCH = 7
"""Side of the transformer's patches, in pixels."""
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
    """Cuts images into patches, p pixels each; those at the edge that fill none are left out."""
    batch, height, width, channels = images.shape
    rows, columns = height // PATCH, width // PATCH
    images = images[:, : rows * PATCH, : columns * PATCH]
    cut = images.reshape(batch, rows, PATCH, columns, PATCH, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def check_transformer(dataset: Dataset, width: int, flag: str) -> None:
    """Checks that a transformer of a width can be built on the images of a data set.

    Raises:
      ValueError: heads do not divide the width, which is of `flag`, or a patch exceeds an image.
    """
    heads = max(width // HEAD_FEATURES, 1)
    if width % heads:
        raise ValueError(
            f"{flag}={width} is no multiple of the {heads} heads that a transformer of this width "
            f"has; accepted are multiples of {HEAD_FEATURES}, and what is below {2 * HEAD_FEATURES}"
        )
    height, side = dataset.train_images.shape[1:3]
    if min(height, side) < PATCH:
        raise ValueError(
            f"images of {height} x {side} pixels hold no patch of a transformer, {PATCH} x "
            f"{PATCH}; choose another --dataset"
        )


class Model(NamedTuple):
    """A network taken apart.

    Attributes:
      graphdef: its structure.
      params: as Flax initializes it, the standard parametrization.
      model_state: what is not trained.
      architecture: as it is traced.
    """

    graphdef: nnx.GraphDef
    params: PyTree
    model_state: PyTree
    architecture: archscale.Architecture


def create_model(
    family: str, dataset: Dataset, width: int, depth: int, seed: int = 0, *, abstract: bool = False
) -> Model:
    """Builds a network of a family for a data set.

    Args:
      family: one of `FAMILIES`.
      dataset: of images.
      width: features of every layer, those within the blocks of a transformer's MLP four times.
      depth: weight layers between stem and readout, or blocks.
      seed: of Flax's initialization.
      abstract: leave the params shapes.

    Raises:
      ValueError: an unknown family.
    """
    height, side, channels = dataset.train_images.shape[1:]
    image, classes = (height, side, channels), dataset.num_classes

    def create() -> nnx.Module:
        rngs = nnx.Rngs(seed)
        if family == "resnet":
            return ResidualNetwork(image[-1], width, depth, classes, rngs=rngs)
        if family == "transformer":
            return VisionTransformer(image, width, depth, classes, rngs=rngs)
        if family not in FAMILIES:
            raise ValueError(unknown("family", family, FAMILIES))
        kernel_size = 3 if family == "cnn" else None
        graph = archscale.dag_graph(chain_string(depth), kernel_size=kernel_size)
        return create_network(graph, image, width, classes, rngs=rngs)

    model = nnx.eval_shape(create) if abstract else create()
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    inputs = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    architecture = archscale.trace(applier(graphdef, model_state), params, inputs)
    return Model(graphdef, params, model_state, architecture)


def draw(model: Model, family: str, seed: int) -> PyTree:
    """Draws params by the rule that fits the family: `second_moment` for residual stacks."""
    rule = "second_moment" if is_residual(family) else None
    return archscale.initialize(jax.random.key(seed), model.params, model.architecture, rule)


def applier(graphdef: nnx.GraphDef, model_state: PyTree) -> Callable[[PyTree, Any], Array]:
    """Returns the function of params and images that a network is."""

    def apply(params: PyTree, images: Array) -> Array:
        return nnx.merge(graphdef, params, model_state, copy=True)(images, train=True)

    return apply


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def measurer(
    model: Model, optimizer: Callable[..., optax.GradientTransformation]
) -> Callable[..., archscale.tuning.UpdateSize]:
    """Returns the jitted function of params and batch that measures one update at rate 1."""
    apply = applier(model.graphdef, model.model_state)
    return jax.jit(
        lambda params, batch: archscale.measure_update(
            lambda params, batch: archscale.vertex_features(apply, params, batch[0]),
            lambda params, batch: loss(apply(params, batch[0]), batch[1]),
            params,
            batch,
            optimizer(1.0),
        )
    )


def is_residual(family: str) -> bool:
    """Whether a family is a stack of residual blocks."""
    return family in ("resnet", "transformer")


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
}
