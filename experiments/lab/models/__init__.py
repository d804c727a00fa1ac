"""Flax NNX networks that realise an architecture graph."""

from archscale_jax._extras import needed_by

with needed_by("experiments.lab.models", "models"):
    from experiments.lab.models.cell import CellNetwork, embed, select_cell
    from experiments.lab.models.cell_cost import multiply_adds, parameter_count
    from experiments.lab.models.dag import (
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
