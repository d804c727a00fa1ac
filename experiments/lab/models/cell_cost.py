"""What a cell costs: parameters and multiply-adds, as NAS-Bench-201 publishes them."""

import math

from flax import nnx

from archscale_jax._trees import named_leaves
from experiments.lab.models.cell import CellNetwork


def parameter_count(network: CellNetwork) -> int:
    """Returns the number of trained numbers of a network, built or abstract (`nnx.eval_shape`).

    For the network of the whole space, all that it holds.
    """
    leaves = named_leaves(nnx.state(network, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def multiply_adds(network: CellNetwork, height: int, width: int) -> int:
    """Returns the multiply-adds of an image, published as FLOPs: convolutions and the readout.

    The readout's bias counts, normalization and pooling do not, as in the benchmark. Edges that lie
    on no path count as well, since they are computed.

    Args:
      network: of one cell, built or abstract.
      height: of the images, pixels.
      width: of the images, pixels.

    Raises:
      ValueError: the network is that of the whole space.
    """
    if network.digits is None:
        raise ValueError("a network of the whole space has no single cost; pass that of a cell")
    total = 0
    for name, leaf in named_leaves(nnx.state(network, nnx.Param)).items():
        place, *rest = name.split("/")
        if place == "readout":
            total += math.prod(leaf.shape)
        elif name.endswith("kernel"):
            halvings = int(rest[0]) + (place == "reductions") if place != "stem" else 0
            pixels = math.prod(-(-size // 2**halvings) for size in (height, width))
            total += pixels * math.prod(leaf.shape)
    return total
