"""Where names of version 0.1 are now. The old places work until version 0.3, with a warning."""

import importlib
import sys
import types
import warnings
from typing import Any

NAMES = {
    "archscale_jax.contrib": (
        "Bottleneck Edit GradInitRecord Growth GrowthSchedule Link Units choose_growth compact "
        "count_neurons count_parameters find_units geometric grown_architecture scale_parameters "
        "vertex_groups widen"
    ),
    "archscale_jax.tuning": (
        "Basin Coordinate RateSearch Run TransferCheck UpdateSize coordinate_curves flatness "
        "loss_at mean_losses register_measured_rule sharpness summarise_runs summarise_transfer"
    ),
    "archscale_jax.rules": (
        "WeightVariances register_initialization_rule register_learning_rate_rule "
        "register_width_rule"
    ),
    "archscale_jax._draw": "draw_graph",
    "archscale_jax._graph": "validate_graph",
    "archscale_jax._paths": "BatchedPathStatistics batched_path_statistics",
    "archscale_jax._spaces": (
        "cell_code cell_string chain_string dag_string random_dag_string random_sparse_dag"
    ),
    "experiments.lab.graph_growth": "GraphGrowth grow_graph",
}
"""Names that `archscale_jax` had, by the module that has them."""

RENAMED = {
    "archscale_jax.learning_rate_factors": ("archscale_jax", "learning_rate_multipliers"),
    "archscale_jax.rules.kernel_size_factor": ("archscale_jax.rules", "kernel_size_multiplier"),
    "archscale_jax.rules.width_factors": ("archscale_jax.rules", "width_multipliers"),
}
"""Names that packages had, and what they are called now."""

MODULES = {
    "architecture": "archscale_jax._architecture",
    "benchmark_tables": "experiments.nasbench.benchmark_tables",
    "checkpoints": "experiments.lab.checkpoints",
    "coordinate": "archscale_jax.tuning._coordinate",
    "datasets": "experiments.lab.datasets",
    "drawing": "archscale_jax._draw.graph",
    "expressions": "archscale_jax._expressions",
    "files": "experiments.lab.files",
    "graph": "archscale_jax._graph",
    "growth": "archscale_jax.contrib",
    "initializer": "archscale_jax._initialize",
    "measure": "archscale_jax.tuning._measure",
    "models": "experiments.lab.models",
    "paths": "archscale_jax._paths",
    "predict": "archscale_jax.tuning._predict",
    "ranking": "experiments.nasbench.ranking",
    "search": "archscale_jax.tuning._search",
    "spaces": "archscale_jax._spaces",
    "sweeps": "experiments.lab.sweeps",
    "training": "experiments.lab.training",
    "transform": "archscale_jax._optax",
    "trees": "archscale_jax._trees",
}
"""Modules that `archscale_jax` had, by where they are. `experiments` is in the repository alone."""

_PLACES = RENAMED | {
    f"archscale_jax.{name}": (place, name)
    for place, names in NAMES.items()
    for name in names.split()
}


class _Moved(types.ModuleType):
    """Stands where a module was."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        place = MODULES[self.__name__.partition(".")[2]]
        _warn(f"{self.__name__}.{name}", f"{place}.{name}")
        return getattr(importlib.import_module(place), name)


for _name in MODULES:
    sys.modules[f"archscale_jax.{_name}"] = _Moved(f"archscale_jax.{_name}")


def moved(name: str, package: str = "archscale_jax") -> Any:
    """Returns what a package had by a name, and warns.

    Raises:
      AttributeError: it never had it.
    """
    if package == "archscale_jax" and name in MODULES:
        return sys.modules[f"archscale_jax.{name}"]
    old = f"{package}.{name}"
    if old not in _PLACES:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    place, new = _PLACES[old]
    _warn(old, f"{place}.{new}")
    return getattr(importlib.import_module(place), new)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} moved to {new}; the old name is removed in version 0.3",
        DeprecationWarning,
        stacklevel=4,
    )
