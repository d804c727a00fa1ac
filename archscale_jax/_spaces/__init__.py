"""Search spaces: strings and seeds to architecture graphs, and back."""

from archscale_jax._spaces.cell import cell_code, cell_graph, cell_string
from archscale_jax._spaces.dag import chain_string, dag_graph, dag_string
from archscale_jax._spaces.isomorphism import canonical_cell, cell_function
from archscale_jax._spaces.random import random_dag_string, random_sparse_dag

__all__ = [
    "canonical_cell",
    "cell_code",
    "cell_function",
    "cell_graph",
    "cell_string",
    "chain_string",
    "dag_graph",
    "dag_string",
    "random_dag_string",
    "random_sparse_dag",
]
