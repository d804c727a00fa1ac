"""Initialization and learning rates from the architecture of a network."""

from archscale_jax import _deprecated, contrib, rules, tuning
from archscale_jax._architecture import Architecture, Arrangement, Parameter, Role
from archscale_jax._audit import audit
from archscale_jax._draw import draw
from archscale_jax._graph import Operator, Space, build_graph, in_degrees
from archscale_jax._initialize import initialize
from archscale_jax._optax import scale_by_architecture
from archscale_jax._parametrize import Parametrization, parametrize
from archscale_jax._paths import PathStatistics, path_statistics
from archscale_jax._report import Report, report
from archscale_jax._spaces import cell_graph, dag_graph
from archscale_jax.contrib import bottleneck, gradinit, grow
from archscale_jax.rules import (
    learning_rate_multipliers,
    learning_rate_scale,
    muon_dimension_numbers,
    second_moments,
    weight_standard_deviations,
    with_widths,
)
from archscale_jax.tracing import TraceError, trace, vertex_features
from archscale_jax.tuning import (
    coordinate_check,
    find_learning_rate,
    measure_update,
    predict_learning_rate,
    transfer_check,
)

__version__ = "0.2.0"

__all__ = [
    "Architecture",
    "Arrangement",
    "Operator",
    "Parameter",
    "Parametrization",
    "PathStatistics",
    "Report",
    "Role",
    "Space",
    "TraceError",
    "audit",
    "bottleneck",
    "build_graph",
    "cell_graph",
    "contrib",
    "coordinate_check",
    "dag_graph",
    "draw",
    "find_learning_rate",
    "gradinit",
    "grow",
    "in_degrees",
    "initialize",
    "learning_rate_multipliers",
    "learning_rate_scale",
    "measure_update",
    "muon_dimension_numbers",
    "parametrize",
    "path_statistics",
    "predict_learning_rate",
    "report",
    "rules",
    "scale_by_architecture",
    "second_moments",
    "trace",
    "transfer_check",
    "tuning",
    "vertex_features",
    "weight_standard_deviations",
    "with_widths",
]


def __getattr__(name: str):
    return _deprecated.moved(name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
