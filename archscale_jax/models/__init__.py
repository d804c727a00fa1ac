"""Flax NNX networks that realise an architecture graph."""

from archscale_jax.models.dag import (
    ACTIVATIONS,
    NORMALIZATIONS,
    DagCNN,
    DagMLP,
    DagNetwork,
    create_network,
)

__all__ = ["ACTIVATIONS", "NORMALIZATIONS", "DagCNN", "DagMLP", "DagNetwork", "create_network"]
