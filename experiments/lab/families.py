"""Networks of four families at any width and depth, and how each is parametrized.

They are chains of `experiments.lab.models` and the networks of its module `images`.
"""

from flax import nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax._spaces import chain_string
from experiments.lab import models
from experiments.lab.datasets import Dataset
from experiments.lab.models.images import (
    HEAD_FEATURES,
    PATCH,
    ResidualNetwork,
    VisionTransformer,
)
from experiments.lab.networks import Network, take_apart

FAMILIES = ("mlp", "cnn", "resnet", "transformer")


def check_transformer(dataset: Dataset, width: int, flag: str) -> None:
    """Checks that a transformer of a width can be built on the images of a data set.

    Raises:
      ValueError: heads do not divide the width, which is of `flag`, or a patch exceeds an image.
    """
    heads = max(width // HEAD_FEATURES, 1)
    if width % heads:
        raise ValueError(
            f"{flag}={width} is not a multiple of the {heads} heads that a transformer of this "
            f"width has; accepted are multiples of {HEAD_FEATURES}, and what is below "
            f"{2 * HEAD_FEATURES}"
        )
    height, side = dataset.train_images.shape[1:3]
    if min(height, side) < PATCH:
        raise ValueError(
            f"images of {height} x {side} pixels hold no patch of a transformer, {PATCH} x "
            f"{PATCH}; choose another --dataset"
        )


def create_network(
    family: str, dataset: Dataset, width: int, depth: int, seed: int = 0, *, abstract: bool = False
) -> Network:
    """Builds a network of a family for a data set.

    It draws by the rule that fits the family: `moment` for residual stacks.

    Args:
      family: one of `FAMILIES`.
      dataset: of images.
      width: features of every layer, those within the blocks of a transformer's MLP four times.
      depth: weight layers between stem and readout, or blocks.
      seed: of Flax's initialization, the standard parametrization.
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
        return models.create_network(graph, image, width, classes, rngs=rngs)

    module = nnx.eval_shape(create) if abstract else create()
    return take_apart(module, dataset, "second_moment" if is_residual(family) else None)


def is_residual(family: str) -> bool:
    """Whether a family is a stack of residual blocks."""
    return family in ("resnet", "transformer")
