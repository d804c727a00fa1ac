"""Rates matched again and again during training, as an optax transformation (theory §14).

It is what `archscale_jax.parametrize(..., learning_rate="measured")` does at the first update, done
every so many updates, to what the base's updates did then. `experiments.matched --method=again`
trains with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Scalar

from archscale_jax import Architecture
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.tuning._measured import GROUPS, effects_of, group_sizes, groups_of, matching


class MatchState(NamedTuple):
    """State of `match_updates`.

    Attributes:
      step: updates so far.
      multipliers: of stem, hidden layers and readout.
      effects: what the updates of the three, and of stem and hidden layers together, did at every
        measurement; 0 where none was taken yet.
    """

    step: Int[Scalar, ""]
    multipliers: Float[Array, "3"]
    effects: Float[Array, "k 4"]


def match_updates(
    apply: Callable[..., Any],
    architecture: Architecture,
    inputs: tuple[PyTree, ...],
    *,
    every: int,
    base: Float[Array, "k 4"] | None = None,
    length: int = 0,
    cap_readout: bool = False,
) -> optax.GradientTransformation:
    """Measures every so many updates what the updates of three groups do, and matches the base's.

    Put it behind an optimizer of learning rate 1 and in front of the learning rate, in the base
    without `base`, where it records and passes updates on, and then in the network.

    Args:
      apply: `(params, *inputs)` to the outputs.
      architecture: its graph.
      inputs: a batch, kept for all measurements.
      every: updates from one measurement to the next.
      base: `effects` of the base's state after its training; None records.
      length: measurements to record.
      cap_readout: whether the readout's multiplier is at most 1.

    Returns:
      A transformation with `MatchState`; works under jit and scan.
    """
    groups = groups_of(architecture)
    length = length if base is None else len(base)

    def init_fn(params: PyTree) -> MatchState:
        del params
        return MatchState(jnp.int32(0), jnp.ones(3), jnp.zeros((length, 4)))

    def measure(updates: PyTree, params: PyTree) -> Float[Array, "4"]:
        names = list(named_leaves(params))
        rows = np.array([[groups[name] == one for name in names] for one in GROUPS], np.float32)
        return group_sizes(effects_of(apply, params, inputs, updates, jnp.asarray(rows)))

    def measured(updates: PyTree, params: PyTree, state: MatchState) -> MatchState:
        index = jnp.minimum(state.step // every, length - 1)
        found = measure(updates, params)
        multipliers = state.multipliers
        if base is not None:
            multipliers = matching(found, jnp.asarray(base)[index])
        if cap_readout:
            multipliers = multipliers.at[2].min(1.0)
        return MatchState(state.step, multipliers, state.effects.at[index].set(found))

    def update_fn(updates: PyTree, state: MatchState, params: PyTree | None = None):
        state = jax.lax.cond(
            state.step % every == 0, measured, lambda *given: given[-1], updates, params, state
        )
        of = dict(zip(GROUPS, state.multipliers, strict=True))
        updates = map_with_names(lambda name, leaf: leaf * of[groups[name]], updates)
        return updates, state._replace(step=state.step + 1)

    return optax.GradientTransformation(init_fn, update_fn)
