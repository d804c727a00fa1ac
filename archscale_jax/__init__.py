"""Initialization and learning rates from the architecture of a network."""

from archscale_jax.architecture import Architecture, Arrangement, Parameter, Role
from archscale_jax.drawing import draw_graph
from archscale_jax.graph import Operator, Space, build_graph, in_degrees, validate_graph
from archscale_jax.initializer import initialize
from archscale_jax.measure import UpdateSize, measure_update
from archscale_jax.paths import (
    BatchedPathStatistics,
    PathStatistics,
    batched_path_statistics,
    path_statistics,
)
from archscale_jax.predict import predict_learning_rate, register_measured_rule
from archscale_jax.rules import (
    WeightVariances,
    learning_rate_scale,
    register_initialization_rule,
    register_learning_rate_rule,
    register_width_rule,
    weight_standard_deviations,
)
from archscale_jax.search import Basin, RateSearch, Run, find_learning_rate, summarise_runs
from archscale_jax.sharpness import sharpness
from archscale_jax.spaces import (
    cell_code,
    cell_graph,
    cell_string,
    chain_string,
    dag_graph,
    dag_string,
    random_dag_string,
    random_sparse_dag,
)
from archscale_jax.tracing import TraceError, trace
from archscale_jax.transform import learning_rate_factors, scale_by_architecture

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Arrangement",
    "Basin",
    "BatchedPathStatistics",
    "Operator",
    "Parameter",
    "PathStatistics",
    "RateSearch",
    "Role",
    "Run",
    "Space",
    "TraceError",
    "UpdateSize",
    "WeightVariances",
    "batched_path_statistics",
    "build_graph",
    "cell_code",
    "cell_graph",
    "cell_string",
    "chain_string",
    "dag_graph",
    "dag_string",
    "draw_graph",
    "find_learning_rate",
    "in_degrees",
    "initialize",
    "learning_rate_factors",
    "learning_rate_scale",
    "measure_update",
    "path_statistics",
    "predict_learning_rate",
    "random_dag_string",
    "random_sparse_dag",
    "register_initialization_rule",
    "register_learning_rate_rule",
    "register_measured_rule",
    "register_width_rule",
    "scale_by_architecture",
    "sharpness",
    "summarise_runs",
    "trace",
    "validate_graph",
    "weight_standard_deviations",
]
