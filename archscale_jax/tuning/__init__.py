"""Learning rates by search and by measurement, and checks that one rate serves all sizes."""

from archscale_jax.tuning._basin import Basin, loss_at
from archscale_jax.tuning._coordinate import (
    Coordinate,
    coordinate_check,
    coordinate_curves,
    flatness,
)
from archscale_jax.tuning._measure import UpdateSize, measure_update
from archscale_jax.tuning._predict import (
    MEASURED_RULES,
    predict_learning_rate,
    register_measured_rule,
)
from archscale_jax.tuning._search import (
    HyperparameterSearch,
    RateSearch,
    Run,
    find_learning_rate,
    mean_losses,
    summarise_runs,
)
from archscale_jax.tuning._sharpness import sharpness
from archscale_jax.tuning._transfer_check import (
    HyperparameterTransfer,
    TransferCheck,
    summarise_transfer,
    transfer_check,
)

__all__ = [
    "MEASURED_RULES",
    "Basin",
    "Coordinate",
    "HyperparameterSearch",
    "HyperparameterTransfer",
    "RateSearch",
    "Run",
    "TransferCheck",
    "UpdateSize",
    "coordinate_check",
    "coordinate_curves",
    "find_learning_rate",
    "flatness",
    "loss_at",
    "mean_losses",
    "measure_update",
    "predict_learning_rate",
    "register_measured_rule",
    "sharpness",
    "summarise_runs",
    "summarise_transfer",
    "transfer_check",
]


def __dir__() -> list[str]:
    return __all__
