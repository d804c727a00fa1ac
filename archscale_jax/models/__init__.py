"""Flax NNX networks that realise an architecture graph."""

from archscale_jax.extras import needed_by

with needed_by("archscale_jax.models", "models"):
    from archscale_jax.models.cell import CellNetwork, embed, select_cell
    from archscale_jax.models.cell_cost import multiply_adds, parameter_count
    from archscale_jax.models.dag import (
        ACTIVATIONS,
        NORMALIZATIONS,
        DagCNN,
        DagMLP,
        DagNetwork,
        create_network,
    )

__all__ = [
    "ACTIVATIONS",
    "NORMALIZATIONS",
    "CellNetwork",
    "DagCNN",
    "DagMLP",
    "DagNetwork",
    "create_network",
    "embed",
    "multiply_adds",
    "parameter_count",
    "select_cell",
]
