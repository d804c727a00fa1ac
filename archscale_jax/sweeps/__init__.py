"""Studies: many trials, run once each, that go on where they were stopped."""

from archscale_jax.sweeps.study import missing_trials, run_study, run_trial, trial_hash

__all__ = ["missing_trials", "run_study", "run_trial", "trial_hash"]
