"""Studies: many trials, run once each, that go on where they were stopped."""

from experiments.lab.sweeps.processes import ProcessExecutor
from experiments.lab.sweeps.study import (
    Journal,
    WorkerLostError,
    missing_trials,
    run_study,
    run_trial,
    trial_hash,
)

__all__ = [
    "Journal",
    "ProcessExecutor",
    "WorkerLostError",
    "missing_trials",
    "run_study",
    "run_trial",
    "trial_hash",
]
