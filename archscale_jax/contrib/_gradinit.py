"""The scale of every parameter tensor learned from data before training: GradInit, and NIO.

Every tensor W_i gets one multiplier m_i. They minimise the loss after one step of the optimizer,
while the gradient's norm stays below γ. No weight is trained, so that about as many iterations as
an epoch has updates suffice, and any network will do: nothing is known of it but its loss.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from archscale_jax._architecture import Architecture, Parameter, Role, check_architecture
from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, check_values, map_with_names, named_leaves
from archscale_jax.contrib._gradinit_step import (
    Loss,
    Update,
    Variant,
    agreement_step,
    branch_in_python,
    initial_state,
    jitted_step,
    product,
    step,
)

DEFAULTS: dict[str, tuple[float, float]] = {
    "sgd": (0.1, 1.0),
    "plain_sgd": (0.1, 1.0),
    "adam": (1e-3, 1000.0),
}
"""Learning rate η and largest gradient norm γ of the paper, by optimizer."""

BIAS_NAMES = ("bias", "b", "beta", "offset")
"""Last part of the name of a leaf whose multiplier may fall to 0."""


class GradInitRecord(NamedTuple):
    """What happened in each of T iterations.

    Attributes:
      multipliers: after the iteration, by the name of the tensor; one that is frozen has none.
      gradient_norm: ‖∇L(S; θ)‖_p before it: p = 1 for Adam, else 2.
      tensor_gradient_norms: the L2 norm of the part of each trained tensor, by its name.
      constrained: whether the gradient norm exceeded γ, so that the iteration lowered it.
      loss: L(S; θ).
      updated_loss: L(S̃; θ - η A), after one step; NaN where it was not taken.
    """

    multipliers: dict[str, Float[Array, " t"]]
    gradient_norm: Float[Array, " t"]
    tensor_gradient_norms: dict[str, Float[Array, " t"]]
    constrained: Bool[Array, " t"]
    loss: Float[Array, " t"]
    updated_loss: Float[Array, " t"]


def gradinit(
    loss_fn: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    optimizer: Update = "sgd",
    learning_rate: float | None = None,
    max_gradient_norm: float | None = None,
    scale_learning_rate: float = 1e-2,
    num_steps: int | None = None,
    bounds: tuple[float, float] = (0.01, math.inf),
    clip: float = 1.0,
    groups: Mapping[str, str | None] | None = None,
    second_order: bool = False,
    penalty: float | None = None,
) -> tuple[PyTree, GradInitRecord]:
    """Learns one multiplier for every parameter tensor [GradInit, Eq. 1 and Alg. 1].

    An iteration reads three batches a, b, c. Where the gradient on S = [a, b] has a norm above γ,
    it lowers that norm; else it lowers L(S̃; θ - η A)/η on S̃ = [a, c], with A the direction of the
    optimizer's first update. Signs of weights and all that is 0 stay as they are.

    The step is compiled once for each `loss_fn`: pass the same function for other seeds.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the batch, a scalar. Batch normalization
        should take the statistics of the batch; state that it would change is to be left alone.
      params: tree of floating arrays, drawn by any initializer.
      batches: trees of arrays [h, ...], all of one shape: half of what the optimizer would see.
      optimizer: `sgd` takes A = g/‖g‖₂, as in the paper's experiments, `plain_sgd` A = g, `adam`
        A = sign g.
      learning_rate: η > 0 of the step; None takes 0.1, or 0.001 for Adam.
      max_gradient_norm: γ > 0, in the L2 norm or for Adam the L1 norm, so that η γ bounds the
        decrease that one step promises; None takes 1, or 1000 for Adam.
      scale_learning_rate: rate of the multipliers, 1e-3 to 1e-1 in the paper.
      num_steps: iterations; None reads `batches` to their end, but for an incomplete triple.
      bounds: smallest and largest multiplier. That of a bias (`BIAS_NAMES`) may fall to 0.
      clip: largest size of the derivative by one multiplier.
      groups: from the names of tensors to the multiplier that they share; a tensor that is not in
        it has its own, and one with None is frozen: no part of gradient and step. See
        `vertex_groups`.
      second_order: let the objective's gradient see that A depends on the multipliers too, which
        costs as much as lowering the norm. Adam's sign has no derivative.
      penalty: None takes one of both ways in each iteration; a number λ > 0 lowers
        L(S̃; θ - η A)/η + λ max(‖g‖ - γ, 0) in all.

    Returns:
      The rescaled params, and the record; see `GradInitRecord`.

    Raises:
      TypeError: params without values, integer parameters that are not frozen, or a loss that is
        not floating.
      ValueError: an option out of its range, groups of unknown tensors, a loss that is not a
        scalar, batches of different shapes or too few of them, a loss or gradient that is not
        finite at the start (nothing can be learned from it) or becomes so later.
    """
    if optimizer not in DEFAULTS:
        raise ValueError(unknown("optimizer", optimizer, DEFAULTS))
    rate, limit = DEFAULTS[optimizer]
    rate = rate if learning_rate is None else learning_rate
    limit = limit if max_gradient_norm is None else max_gradient_norm
    _check_positive(max_gradient_norm=limit, scale_learning_rate=scale_learning_rate, clip=clip)
    _check_positive(finite=True, learning_rate=rate, penalty=1.0 if penalty is None else penalty)
    _check_options(optimizer, bounds, second_order, num_steps)
    labels = _labels(params, groups or {})
    names = _group_names(labels)
    settings = {
        "rate": rate,
        "limit": limit,
        "scale_rate": scale_learning_rate,
        "clip": clip,
        "penalty": penalty or 0.0,
        "bounds": _group_bounds(labels, names, bounds),
    }
    variant = Variant(
        loss_fn, _indices(labels, names), optimizer, second_order, penalty is not None
    )
    run = jitted_step
    if jax.default_backend() == "cpu":
        run = functools.partial(step, branch=branch_in_python)
    records = _iterate(
        functools.partial(run, variant=variant), loss_fn, params, batches, settings, num_steps
    )
    arrays = _stacked(records, names, labels)
    norms = arrays.pop("tensor_gradient_norms").T
    norms = dict(zip(arrays["multipliers"], norms, strict=True))
    record = GradInitRecord(**arrays, tensor_gradient_norms=norms)
    _check_end(record.multipliers, {"loss": record.loss, "updated loss": record.updated_loss})
    learned = {name: values[-1] for name, values in record.multipliers.items()}
    return scale_parameters(params, learned), record


class NioRecord(NamedTuple):
    """What happened in each of T iterations of NIO.

    Attributes:
      multipliers: after the iteration, by the name of the tensor; one that is frozen has none.
      gradient_norm: the mean of ‖g₁‖₂ and ‖g₂‖₂ before it.
      cosine: of g₁ and g₂.
      constrained: whether the norm exceeded γ, so that the iteration lowered it.
      loss: the mean loss of both batches.
    """

    multipliers: dict[str, Float[Array, " t"]]
    gradient_norm: Float[Array, " t"]
    cosine: Float[Array, " t"]
    constrained: Bool[Array, " t"]
    loss: Float[Array, " t"]


def nio(
    loss_fn: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    max_gradient_norm: float = 5.0,
    scale_learning_rate: float = 0.05,
    num_steps: int | None = 100,
    bounds: tuple[float, float] = (0.01, math.inf),
    clip: float = 1.0,
    groups: Mapping[str, str | None] | None = None,
) -> tuple[PyTree, NioRecord]:
    """Learns one multiplier for every parameter tensor so that gradients of batches agree [NIO].

    An iteration reads three batches a, b, c; g₁ is the gradient on [a, b], g₂ on [a, c]. Where the
    mean of their norms exceeds γ it lowers that, else it raises their cosine. No update is made, so
    that nothing depends on the optimizer or its rate. The interface is that of `gradinit`.

    Args:
      loss_fn: see `gradinit`.
      params: see `gradinit`.
      batches: trees of arrays [h, ...], all of one shape: half of a chunk.
      max_gradient_norm: γ > 0, in the L2 norm.
      scale_learning_rate: Adam's rate of the multipliers.
      num_steps: iterations; None reads `batches` to their end, but for an incomplete triple.
      bounds: smallest and largest multiplier. That of a bias (`BIAS_NAMES`) may fall to 0.
      clip: largest size of the derivative by one multiplier.
      groups: see `gradinit`.

    Returns:
      The rescaled params, and the record; see `NioRecord`.

    Raises:
      TypeError, ValueError: what `gradinit` raises.
    """
    _check_positive(
        max_gradient_norm=max_gradient_norm, scale_learning_rate=scale_learning_rate, clip=clip
    )
    _check_options("sgd", bounds, False, num_steps)
    labels = _labels(params, groups or {})
    names = _group_names(labels)
    settings = {
        "limit": max_gradient_norm,
        "scale_rate": scale_learning_rate,
        "clip": clip,
        "bounds": _group_bounds(labels, names, bounds),
    }
    run = functools.partial(agreement_step, variant=Variant(loss_fn, _indices(labels, names)))
    records = _iterate(run, loss_fn, params, batches, settings, num_steps)
    record = NioRecord(**_stacked(records, names, labels))
    _check_end(record.multipliers, {"loss": record.loss})
    learned = {name: values[-1] for name, values in record.multipliers.items()}
    return scale_parameters(params, learned), record


def _iterate(
    run: Any,
    loss_fn: Loss,
    params: PyTree,
    batches: Iterable[Any],
    settings: Mapping[str, Any],
    num_steps: int | None,
) -> list[dict[str, Any]]:
    """Runs iterations on triples of batches; returns what each recorded."""
    state = initial_state(len(settings["bounds"][0]))
    records: list[dict[str, Any]] = []
    for index, triple in enumerate(itertools.islice(_triples(batches), num_steps)):
        if not index:
            _check_loss(loss_fn, params, triple)
        state, record = run(state, params, triple, settings)
        records.append(record)
        if not index:
            _check_start(record)
    if not records or len(records) < (num_steps or 0):
        raise ValueError(
            f"batches ended in iteration {len(records)} of {num_steps or 'any'}; an iteration "
            "reads three"
        )
    return records


def _group_names(labels: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label for label in labels.values() if label is not None))


def _indices(labels: Mapping[str, str | None], names: tuple[str, ...]) -> tuple[int | None, ...]:
    return tuple(None if one is None else names.index(one) for one in labels.values())


def scale_parameters(params: PyTree, multipliers: Mapping[str, Float[Array, ""] | float]) -> PyTree:
    """Multiplies some tensors of a tree, and keeps the others.

    Args:
      params: what the multipliers were learned on.
      multipliers: by the names of tensors, scalars; the product has the dtype of the tensor.

    Raises:
      ValueError: a name that params does not hold.
    """
    _check_names(multipliers, params, "multipliers")

    def scaled(name: str, leaf: Any) -> Any:
        return product(multipliers[name], leaf) if name in multipliers else leaf

    return map_with_names(scaled, params)


def vertex_groups(architecture: Architecture) -> dict[str, str]:
    """Returns groups for `gradinit` that give one multiplier to each vertex of the architecture.

    The weights of all edges into a vertex share it, and their biases; so do those of the stem, and
    those of the readout. Scales and biases of normalization keep their own.

    Args:
      architecture: of the params that `gradinit` shall scale, as `trace` returns it.

    Raises:
      TypeError: `architecture` is not an `Architecture`.
    """
    check_architecture(architecture)
    receivers = np.asarray(architecture.graph.receivers)

    def group(one: Parameter) -> str:
        if one.edge is not None:
            return f"vertex {receivers[one.edge]}"
        return one.name if one.layer == Role.HIDDEN else str(one.layer)

    return {one.name: group(one) for one in architecture.parameters}


def _check_positive(finite: bool = False, **options: float) -> None:
    for name, value in options.items():
        if not value > 0 or (finite and math.isinf(value)):
            kind = "positive and finite" if finite else "positive"
            raise ValueError(f"{name} must be {kind}, found {value}")


def _check_options(
    optimizer: str, bounds: tuple[float, float], second_order: bool, num_steps: int | None
) -> None:
    if not 0 <= bounds[0] < 1 < bounds[1]:
        raise ValueError(
            f"bounds must hold 1, where multipliers start, and nothing negative; found {bounds}"
        )
    if second_order and optimizer == "adam":
        raise ValueError(
            "second_order changes nothing for adam, whose sign has no derivative; leave it out"
        )
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps must be None or at least 1, found {num_steps}")


def _labels(params: PyTree, groups: Mapping[str, str | None]) -> dict[str, str | None]:
    """Returns the group of every tensor, its own name where it has none."""
    check_values(params, "params")
    _check_names(groups, params, "groups")
    leaves = named_leaves(params)
    labels = {name: groups.get(name, name) for name in leaves}
    for name, leaf in leaves.items():
        dtype = jnp.result_type(leaf)
        if labels[name] is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}; accepted are floating dtypes, or "
                f"groups={{{name!r}: None}}, which freezes it"
            )
    if all(label is None for label in labels.values()):
        raise ValueError("params holds frozen tensors alone; give one of them a name in groups")
    return labels


def _check_names(names: Iterable[str], params: PyTree, what: str) -> None:
    known = named_leaves(params)
    for name in names:
        if name not in known:
            raise ValueError(unknown(f"parameter in {what}", name, known))


def _group_bounds(
    labels: Mapping[str, str | None], names: tuple[str, ...], bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of every group; one of biases alone may fall to 0."""
    lower = dict.fromkeys(names, 0.0)
    for name, label in labels.items():
        if label is not None and name.split("/")[-1] not in BIAS_NAMES:
            lower[label] = bounds[0]
    return np.array(list(lower.values())), np.full(len(names), bounds[1])


def _triples(batches: Iterable[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yields three batches at a time; all must have the shapes of the first."""
    triple: list[Any] = []
    expected: dict[str, tuple[int, ...]] = {}
    for index, batch in enumerate(batches):
        shapes = {name: jnp.shape(leaf) for name, leaf in named_leaves(batch).items()}
        expected = expected or shapes
        if shapes != expected or not all(shapes.values()):
            raise ValueError(
                f"batch {index} has arrays {shapes}, the first {expected}; accepted are batches of "
                "one size, examples along the first axis of every array"
            )
        triple.append(batch)
        if len(triple) == 3:
            yield triple[0], triple[1], triple[2]
            triple = []


def _check_loss(loss_fn: Loss, params: PyTree, triple: tuple[Any, Any, Any]) -> None:
    if not all(map(jnp.size, jax.tree.leaves(triple))):
        raise ValueError("batches hold an array without examples; accepted are one or more")
    found = jax.eval_shape(loss_fn, params, triple[0])
    if getattr(found, "shape", None) != ():
        raise ValueError(f"loss_fn must return a scalar, found {found}; take the mean over a batch")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a floating number, found {found.dtype}")


def _check_start(record: dict[str, Any]) -> None:
    for name in ("loss", "gradient_norm"):
        value = float(record[name])
        if not math.isfinite(value):
            raise ValueError(
                f"the {name.replace('_', ' ')} of the initial params is {value}: nothing can be "
                "learned from it; draw smaller weights"
            )


def _stacked(
    records: list[dict[str, Any]], names: tuple[str, ...], labels: Mapping[str, str | None]
) -> dict[str, Any]:
    """Arrays over iterations by field, the multipliers by the names of tensors."""
    arrays = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(records))
    by_group = dict(zip(names, arrays["multipliers"].T, strict=True))
    multipliers = {name: by_group[label] for name, label in labels.items() if label is not None}
    return arrays | {"multipliers": multipliers}


def _check_end(
    multipliers: Mapping[str, Float[Array, " t"]], losses: Mapping[str, Float[Array, " t"]]
) -> None:
    finite = np.all([np.isfinite(one) for one in multipliers.values()], axis=0)
    if not finite.all():
        first = int(np.argmin(finite))
        found = " and ".join(f"{name} is {one[first]}" for name, one in losses.items())
        raise ValueError(
            f"a multiplier is not finite after iteration {first}, whose {found}; take a smaller "
            "scale_learning_rate or learning_rate, or smaller initial weights"
        )
