"""Studies: many trials, run once each, that go on where they were stopped."""

from archscale_jax.sweeps.processes import ProcessExecutor
from archscale_jax.sweeps.study import (
    WorkerLostError,
    missing_trials,
    run_study,
    run_trial,
    trial_hash,
)

__all__ = [
    "ProcessExecutor",
    "WorkerLostError",
    "missing_trials",
    "run_study",
    "run_trial",
    "trial_hash",
]
