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
    "archscale_jax": "draw_graph learning_rate_factors",
    "archscale_jax._graph": "validate_graph",
    "archscale_jax._paths": "BatchedPathStatistics batched_path_statistics",
    "archscale_jax._spaces": (
        "cell_code cell_string chain_string dag_string random_dag_string random_sparse_dag"
    ),
    "experiments.lab.graph_growth": "GraphGrowth grow_graph",
}
"""Names that `archscale_jax` had, by the module that has them."""

RENAMED = {
    "Units": "NeuronGroup",
    "draw_graph": "draw",
    "find_units": "find_neuron_groups",
    "kernel_size_factor": "kernel_size_multiplier",
    "learning_rate_factors": "learning_rate_multipliers",
    "width_factors": "width_multipliers",
}
"""What is called otherwise where it is now, by its old name."""

MODULES = {
    "architecture": "archscale_jax._architecture",
    "benchmark_tables": "experiments.nasbench.benchmark_tables",
    "checkpoints": "experiments.lab.checkpoints",
    "coordinate": "archscale_jax.tuning._coordinate",
    "datasets": "experiments.lab.datasets",
    "drawing": "archscale_jax._draw",
    "expressions": "archscale_jax._expressions",
    "files": "experiments.lab.files",
    "gains": "experiments.nasbench.gains",
    "gradinit": "archscale_jax.contrib",
    "graph": "archscale_jax._graph",
    "growth": "archscale_jax.contrib",
    "initializer": "archscale_jax._initialize",
    "measure": "archscale_jax.tuning._measure",
    "models": "experiments.lab.models",
    "paths": "archscale_jax._paths",
    "predict": "archscale_jax.tuning._predict",
    "ranking": "experiments.nasbench.ranking",
    "report": "archscale_jax",
    "search": "archscale_jax.tuning",
    "spaces": "archscale_jax._spaces",
    "sweeps": "experiments.lab.sweeps",
    "training": "experiments.lab.training",
    "transfer_check": "archscale_jax.tuning",
    "transform": "archscale_jax",
    "trees": "archscale_jax._trees",
}
"""Modules that `archscale_jax` had, by where they are. `experiments` is in the repository alone."""

_PLACES = {name: place for place, names in NAMES.items() for name in names.split()}


class _Moved(types.ModuleType):
    """Stands where a module was."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _found(self.__name__, name, MODULES[self.__name__.partition(".")[2]])


for _name in MODULES:
    sys.modules[f"archscale_jax.{_name}"] = _Moved(f"archscale_jax.{_name}")


def moved(name: str) -> Any:
    """Returns what `archscale_jax` had by a name, and warns.

    Raises:
      AttributeError: it never had it.
    """
    if name in MODULES:
        return sys.modules[f"archscale_jax.{name}"]
    if name not in _PLACES:
        raise AttributeError(f"module 'archscale_jax' has no attribute {name!r}")
    return _found("archscale_jax", name, _PLACES[name])


def renamed(module: str, name: str) -> Any:
    """Returns what a module has by another name now, and warns.

    Raises:
      AttributeError: it never had it.
    """
    if name not in RENAMED or not hasattr(sys.modules[module], RENAMED[name]):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _found(module, name, module)


def renamed_field(old: str, new: str) -> Any:
    """Returns a property that gives a field by its old name, and warns."""

    def field(self: Any) -> Any:
        warnings.warn(
            f"{old} is {new} now; the old name is removed in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, new)

    return property(field)


def _found(module: str, name: str, place: str) -> Any:
    new = RENAMED.get(name, name)
    warnings.warn(
        f"{module}.{name} moved to {place}.{new}; the old name is removed in version 0.3",
        DeprecationWarning,
        stacklevel=4,
    )
    return getattr(importlib.import_module(place), new)
