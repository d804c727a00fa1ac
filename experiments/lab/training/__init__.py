"""Training loops for Flax NNX classifiers: one jitted call an epoch.

A network is split into its `nnx.GraphDef` and its state, and `TrainState` is a plain pytree: vmap
it over seeds or rates, shard it, save it. The examples are arguments, never constants of a compiled
program.

Precision is the network's: `dtype` and `param_dtype` of its layers say what is computed in and what
is trained. Losses are taken in float32 at least.
"""

from archscale_jax._extras import needed_by

with needed_by("experiments.lab.training", "models"):
    from experiments.lab.training.epoch import (
        TrainState,
        count_steps,
        create_train_state,
        epoch_batches,
        jitted_train_batches,
        jitted_train_epoch,
        scan_updates,
        train_batches,
        train_epoch,
    )
    from experiments.lab.training.loops import fit, part_length, train_losses, train_parts
    from experiments.lab.training.network import (
        cross_entropy,
        evaluate,
        has_diverged,
        vertex_features,
    )
    from experiments.lab.training.optimizer import (
        check_learning_rate,
        create_optimizer,
        create_schedule,
    )

__all__ = [
    "TrainState",
    "check_learning_rate",
    "count_steps",
    "create_optimizer",
    "create_schedule",
    "create_train_state",
    "cross_entropy",
    "epoch_batches",
    "evaluate",
    "fit",
    "has_diverged",
    "jitted_train_batches",
    "jitted_train_epoch",
    "part_length",
    "scan_updates",
    "train_batches",
    "train_epoch",
    "train_losses",
    "train_parts",
    "vertex_features",
]
