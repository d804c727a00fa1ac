"""SGD and its schedules, as in the reference experiments."""

from typing import Literal

import optax
from jax.core import Tracer
from jaxtyping import Array

from archscale_jax._errors import unknown

SCHEDULES = ("constant", "cosine", "wsd")
DECAY_SHARE = 0.2
"""Of all updates, those in which the rate of `wsd` falls."""


def create_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns SGD with coupled weight decay, as in the reference experiments.

    Args:
      learning_rate: base rate or schedule; chain `scale_by_architecture` behind.
      momentum: in [0, 1); 0 keeps no trace.
      nesterov: Nesterov's form of momentum.
      weight_decay: added to the gradient, times the weight; not negative.

    Raises:
      ValueError: a rate that is not positive and finite, a momentum or decay outside its range,
        or Nesterov without momentum.
    """
    if not callable(learning_rate):
        check_learning_rate(learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), found {momentum}")
    if nesterov and not momentum:
        raise ValueError(f"nesterov=True needs a momentum above 0, found {momentum}")
    if not (weight_decay >= 0 and weight_decay < float("inf")):
        raise ValueError(f"weight_decay must be finite and not negative, found {weight_decay}")
    sgd = optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd) if weight_decay else sgd


def create_schedule(
    learning_rate: float | Array,
    total_steps: int,
    *,
    kind: Literal["constant", "cosine", "wsd"] = "constant",
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Returns a schedule that starts at 0 while warming up linearly, then holds or falls to 0.

    Args:
      learning_rate: the peak.
      total_steps: number of updates, warm-up included.
      kind: `constant`, `cosine` to 0 at `total_steps`, or `wsd` (warm-up, stable, decay): constant
        until the last fifth, then linearly to 0.
      warmup_steps: updates until the peak.

    Raises:
      ValueError: a rate that is not positive and finite, an unknown kind, or a warm-up that is
        negative or leaves no step.
    """
    check_learning_rate(learning_rate)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps), found {warmup_steps} of {total_steps}"
        )
    if kind not in SCHEDULES:
        raise ValueError(unknown("schedule", kind, SCHEDULES))
    left = total_steps - warmup_steps
    after = optax.constant_schedule(learning_rate)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, left)
    elif kind == "wsd":
        decay = min(max(round(DECAY_SHARE * total_steps), 1), left)
        after = optax.linear_schedule(learning_rate, 0.0, decay, left - decay)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def check_learning_rate(learning_rate: float | Array) -> None:
    """Checks a learning rate; one that is traced passes.

    Raises:
      ValueError: it is not a positive finite number.
    """
    if isinstance(learning_rate, Tracer):
        return
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"a learning rate must be positive and finite, found {learning_rate}")
