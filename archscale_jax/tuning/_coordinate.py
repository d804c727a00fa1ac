"""Coordinate check: does an update change networks of all sizes alike?

A parametrization that transfers changes every feature by the same amount in every step, whatever
the size of the network [AAS Eq. 7; μP]. That is necessary, not sufficient: whether the best rate
transfers, only training tells, and `archscale_jax.transfer_check` asks that.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from archscale_jax._errors import unknown
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree
from archscale_jax.tracing import vertex_features

Network = tuple[Callable[..., Array], Callable[[int], PyTree], optax.GradientTransformation]

OUTPUT = "output"
"""What stands for the number of a vertex where the output of the function is meant."""


class Coordinate(NamedTuple):
    """One measurement of a coordinate check.

    Attributes:
      size: which network.
      seed: which of its initializations.
      step: number of updates before the measurement.
      vertex: number of the vertex in the traced graph, or `OUTPUT`.
      change: root mean square, over batch and features, of the change since initialization.
      feature: root mean square of the feature itself.
    """

    size: float
    seed: int
    step: int
    vertex: int | str
    change: float
    feature: float


def coordinate_check(
    make: Callable[[Any], Network],
    sizes: Sequence[Any],
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Array, Any], Float[Array, ""]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[Coordinate]:
    """Trains networks of several sizes for a few steps and measures every vertex [AAS Eq. 7; μP].

    Args:
      make: from a size to the function `(params, inputs)` to outputs, which `trace` can read; the
        function from a seed to params; and the optimizer at its learning rate.
      sizes: widths or depths, increasing.
      batches: `(inputs, targets)` of every step, of one shape; on the inputs of the first all
        features are measured.
      loss: `(outputs, targets)` to a scalar.
      seeds: of the initializations.

    Returns:
      One record for every size, seed, step from 0 to `len(batches)`, and vertex.

    Raises:
      ValueError: no size, batch or seed.
      TraceError: a function that `trace` cannot read.
    """
    for name, values in (("sizes", sizes), ("batches", batches), ("seeds", seeds)):
        if not len(values):
            raise ValueError(f"{name} is empty; a coordinate check needs at least one")
    records = []
    for size in sizes:
        records += _train(size, *make(size), batches, loss, seeds)
    return records


def _train(size, function, draw, optimizer, batches, loss, seeds) -> list[Coordinate]:
    @jax.jit
    def step(params, state, batch):
        inputs, targets = batch
        gradients = jax.grad(lambda params: loss(function(params, inputs), targets))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def measure(params, start, inputs):
        before, after = (
            (vertex_features(function, one, inputs), function(one, inputs))
            for one in (start, params)
        )
        return jax.tree.map(
            lambda old, new: [_root_mean_square(exact(new) - exact(old)), _root_mean_square(new)],
            before,
            after,
        )

    records = []
    for seed in seeds:
        params = start = draw(seed)
        state = optimizer.init(params)
        for number, batch in enumerate([*batches, None]):
            sizes, output = jax.device_get(measure(params, start, batches[0][0]))
            for vertex, pair in {**sizes, OUTPUT: output}.items():
                records.append(Coordinate(size, seed, number, vertex, *map(float, pair)))
            if batch is not None:
                params, state = step(params, state, batch)
    return records


def _root_mean_square(values: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(exact(values))))


def coordinate_curves(
    records: Sequence[Coordinate], *, step: int | None = None, quantity: str = "change"
) -> dict[int | str, dict[float, float]]:
    """Returns the mean over seeds at every size, by vertex.

    Networks whose graphs differ, as those of different depths do, have the output in common, the
    last vertex (`"last"`), and the vertex of the largest value (`"largest"`).

    Args:
      records: of `coordinate_check`.
      step: after how many updates; None takes the last.
      quantity: `change` or `feature`.

    Returns:
      By vertex, by size, the root mean square of the quantity.

    Raises:
      ValueError: no records, another quantity, or a step that was not measured.
    """
    if quantity not in ("change", "feature"):
        raise ValueError(unknown("quantity", quantity, ("change", "feature")))
    if not records:
        raise ValueError("records is empty; pass what coordinate_check returns")
    steps = sorted({record.step for record in records})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"step must be one that was measured, of {steps}, found {step}")
    values: dict[float, dict[int | str, list[float]]] = {}
    for record in records:
        if record.step == step:
            at_size = values.setdefault(record.size, {})
            at_size.setdefault(record.vertex, []).append(getattr(record, quantity))
    found = {
        size: {vertex: float(np.mean(one)) for vertex, one in vertices.items()}
        for size, vertices in values.items()
    }
    if len({frozenset(vertices) for vertices in found.values()}) > 1:
        for size, vertices in found.items():
            inner = {one: value for one, value in vertices.items() if isinstance(one, int)}
            largest, last = max(inner.values()), inner[max(inner)]
            found[size] = {"largest": largest, "last": last, OUTPUT: vertices[OUTPUT]}
    names = next(iter(found.values()))
    return {name: {size: found[size][name] for size in found} for name in names}


def flatness(curves: Mapping[Any, Mapping[float, float]]) -> dict[Any, float]:
    """Returns the largest value of every curve over its smallest; 1 is flat.

    A curve with a value that is 0 or not finite, as after a run that diverged, has inf.

    Args:
      curves: of `coordinate_curves`, or any values by size, by name.
    """
    found = {name: list(curve.values()) for name, curve in curves.items()}
    return {
        name: max(values) / min(values) if all(0 < one < math.inf for one in values) else math.inf
        for name, values in found.items()
    }
