"""Initialization and learning rates from the architecture of a network."""

from archscale_jax.architecture import Architecture, Arrangement, Parameter, Role
from archscale_jax.architecture_drawing import draw
from archscale_jax.coordinate import (
    Coordinate,
    coordinate_check,
    coordinate_curves,
    flatness,
)
from archscale_jax.drawing import draw_graph
from archscale_jax.gradinit import (
    GradInitRecord,
    gradinit,
    scale_parameters,
    vertex_groups,
)
from archscale_jax.graph import Operator, Space, build_graph, in_degrees, validate_graph
from archscale_jax.growth import (
    Bottleneck,
    Edit,
    GraphGrowth,
    Growth,
    GrowthSchedule,
    Link,
    Units,
    bottleneck,
    choose_growth,
    compact,
    count_neurons,
    count_parameters,
    find_units,
    geometric,
    grow,
    grow_graph,
    grown_architecture,
    widen,
)
from archscale_jax.initializer import initialize
from archscale_jax.measure import UpdateSize, measure_update
from archscale_jax.paths import (
    BatchedPathStatistics,
    PathStatistics,
    batched_path_statistics,
    path_statistics,
)
from archscale_jax.predict import predict_learning_rate, register_measured_rule
from archscale_jax.report import Report, report
from archscale_jax.rules import (
    WeightVariances,
    learning_rate_scale,
    muon_dimension_numbers,
    register_initialization_rule,
    register_learning_rate_rule,
    register_width_rule,
    second_moments,
    weight_standard_deviations,
    with_widths,
)
from archscale_jax.search import (
    Basin,
    RateSearch,
    Run,
    find_learning_rate,
    loss_at,
    mean_losses,
    summarise_runs,
)
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
from archscale_jax.tracing import TraceError, trace, vertex_features
from archscale_jax.transfer_check import TransferCheck, summarise_transfer, transfer_check
from archscale_jax.transform import learning_rate_factors, scale_by_architecture

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Arrangement",
    "Basin",
    "BatchedPathStatistics",
    "Bottleneck",
    "Coordinate",
    "Edit",
    "GradInitRecord",
    "GraphGrowth",
    "Growth",
    "GrowthSchedule",
    "Link",
    "Operator",
    "Parameter",
    "PathStatistics",
    "RateSearch",
    "Report",
    "Role",
    "Run",
    "Space",
    "TraceError",
    "TransferCheck",
    "Units",
    "UpdateSize",
    "WeightVariances",
    "batched_path_statistics",
    "bottleneck",
    "build_graph",
    "cell_code",
    "cell_graph",
    "cell_string",
    "chain_string",
    "choose_growth",
    "compact",
    "coordinate_check",
    "coordinate_curves",
    "count_neurons",
    "count_parameters",
    "dag_graph",
    "dag_string",
    "draw",
    "draw_graph",
    "find_learning_rate",
    "find_units",
    "flatness",
    "geometric",
    "gradinit",
    "grow",
    "grow_graph",
    "grown_architecture",
    "in_degrees",
    "initialize",
    "learning_rate_factors",
    "learning_rate_scale",
    "loss_at",
    "mean_losses",
    "measure_update",
    "muon_dimension_numbers",
    "path_statistics",
    "predict_learning_rate",
    "random_dag_string",
    "random_sparse_dag",
    "register_initialization_rule",
    "register_learning_rate_rule",
    "register_measured_rule",
    "register_width_rule",
    "report",
    "scale_by_architecture",
    "scale_parameters",
    "second_moments",
    "sharpness",
    "summarise_runs",
    "summarise_transfer",
    "trace",
    "transfer_check",
    "validate_graph",
    "vertex_features",
    "vertex_groups",
    "weight_standard_deviations",
    "widen",
    "with_widths",
]
