"""The features on the batch, against the second moments that the plan promises."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from archscale_jax._auditing.findings import ALL, Finding, number
from archscale_jax._auditing.loss import QUICKLY
from archscale_jax._parametrize import Parametrization
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree
from archscale_jax.rules._initialization import second_moments
from archscale_jax.tracing.trace import vertex_features

_FAR = 50.0
"""By so much in the root mean square features may differ from those of inputs of size 1."""


class Features(NamedTuple):
    """Features by number of vertex.

    Attributes:
      measured: second moments on the batch.
      promised: those of the plan, for inputs of second moment 1; empty where the loss has other
        vertices than the model, or no moment is known.
      changes: root mean square of the change in the first update over that of the features.
    """

    measured: dict[int, float]
    promised: dict[int, float]
    changes: dict[int, float]


def features_of(
    plan: Parametrization,
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Any,
    updates: PyTree | None,
) -> Features:
    """Returns the features that the loss makes, and what updates change of them.

    Raises:
      TraceError: a loss that cannot be read.
    """

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def evaluate(params: PyTree, batch: Any) -> dict[int, jax.Array]:
        return vertex_features(loss_fn, params, batch)

    before = evaluate(params, batch)
    after = before if updates is None else evaluate(_moved(params, updates), batch)
    found = jax.device_get(_moments(before, after))
    measured = {vertex: float(row[0]) for vertex, row in found.items()}
    changes = {
        vertex: math.sqrt(row[1] / row[0]) if row[0] else math.inf for vertex, row in found.items()
    }
    promised = {}
    try:
        options = plan.choice.initialization_options
        promised = second_moments(
            plan.architecture, plan.choice.initialization, rule_options=options
        )
    except ValueError:  # no finite moment
        pass
    if not measured.keys() <= promised.keys():
        promised = {}
    return Features(measured, {name: float(promised[name]) for name in measured if promised},
                    changes)  # fmt: skip


@jax.jit
def _moved(params: PyTree, updates: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, update: (leaf + update).astype(leaf.dtype), params, updates)


@jax.jit
def _moments(before: dict[int, jax.Array], after: dict[int, jax.Array]) -> dict[int, jax.Array]:
    return {
        vertex: jnp.stack(
            [jnp.mean(exact(one) ** 2), jnp.mean((exact(after[vertex]) - exact(one)) ** 2)]
        )
        for vertex, one in before.items()
    }


def checked_inputs(features: Features) -> list[Finding]:
    """A finding where features of the first vertex are far from those of normalized inputs."""
    if not features.promised:
        return []
    vertex = min(features.promised)
    measured, promised = features.measured[vertex], features.promised[vertex]
    if not (measured and promised) or abs(math.log(measured / promised)) < 2 * math.log(_FAR):
        return []
    size = number(math.sqrt(measured / promised))
    return [
        Finding(
            "inputs",
            ALL,
            f"features of the first vertex are {size} times those of inputs of size 1",
            "inputs with a mean square near 1",
            "the stem is trained at another rate than the rest, and activations saturate or vanish",
            "normalize the inputs, as (x - mean)/deviation",
        )
    ]
