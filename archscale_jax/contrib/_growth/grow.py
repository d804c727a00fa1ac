"""Grows a network where it lacks expressivity: new neurons in closed form [TINY] (theory §8)."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from archscale_jax._architecture import Architecture
from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree, check_values, named_leaves
from archscale_jax.contrib._growth.architecture import without_slots
from archscale_jax.contrib._growth.bottleneck import Bottleneck
from archscale_jax.contrib._growth.extension import AMPLITUDES, extend, extended, search_amplitude
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.moments import carried_state
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup
from archscale_jax.contrib._growth.solve import METHODS, predicted_decrease, solve
from archscale_jax.contrib._growth.widen import slot_growths
from archscale_jax.tracing import trace
from archscale_jax.tracing.layers import Loss


class Growth(NamedTuple):
    """A network that has grown.

    Attributes:
      params: its parameters; the old ones where no amplitude lowered the held-out loss.
      optimizer_state: the state of its optimizer; the old one where nothing was added.
      architecture: its architecture; empty slots count in shapes, not in fans.
      numbers: of new neurons, by the names of groups; 0 where no amplitude lowered the held-out
        loss: more examples, or the end of growing.
      amplitude: γ, which multiplies their fan-outs, and their fan-ins or, behind a batch
        normalization, their entries in its scale.
      losses: held-out loss before and after.
      predicted: how much the loss falls to first order, -dL/d(γ²) on the batches measured, by the
        neurons that were found, added or not; with ReLU, of the mean of its two slopes. An estimate
        where one ReLU follows another, as the sums of a stream, or where batch normalizations see
        several batches, whose variances differ.
      singular_values: λ of the neurons found, by the names of groups.
      bottlenecks: of the layers that read the groups, before, by the names of weights.
    """

    params: PyTree
    optimizer_state: Any
    architecture: Architecture
    numbers: dict[str, int]
    amplitude: float
    losses: tuple[float, float]
    predicted: float
    singular_values: dict[str, np.ndarray]
    bottlenecks: dict[str, Bottleneck]


def grow(
    loss_fn: Loss,
    params: PyTree,
    batches: Sequence[Any],
    held_out: Any,
    groups: Sequence[NeuronGroup],
    *,
    number: int | Mapping[str, int] | None = None,
    threshold: float = 1e-3,
    budget: int | None = None,
    method: str = "tiny",
    restricted: bool = False,
    normalize: bool = False,
    update: bool = False,
    amplitudes: Sequence[float] = AMPLITUDES,
    capacity: Callable[[int], int] = int,
    cutoff: float = 1e-6,
    key: Array | None = None,
    optimizer: Callable[[PyTree], optax.GradientTransformation] | None = None,
    optimizer_state: Any = None,
) -> Growth:
    """Adds the neurons that lower the loss the most to first order [TINY] (theory §8).

    Behind a batch normalization fan-ins have unit variance whatever the amplitude, and it is in the
    scale. A gated neuron has the gate of one that is there.

    Empty slots are filled first; if there are too few, arrays are widened, and `loss_fn` must take
    the wider ones: Flax NNX, Equinox and plain functions do; for a linen module build the module in
    it from the shapes of params. Pure: nothing is changed in place.

    Args:
      loss_fn: `(params, batch)` to the mean loss over the examples of a batch, a scalar, without
        dropout, whose mask changes with the number of features. Programs are compiled once for it
        and every shape of params.
      params: tree of arrays.
      batches: trees of arrays [n, ...], n examples; all but the last are read twice.
      held_out: a batch on which the amplitude is chosen.
      groups: where to add neurons, of `find_neuron_groups`.
      number: the most new neurons of each group, or of a group by its name; None, or a name that
        is missing, for no limit.
      threshold: the smallest λ of `tiny`, whose square is what a neuron gains at amplitude 1. The
        best neuron is taken in any case that a budget allows.
      budget: the most new parameters, all groups together.
      method: `tiny`; for comparison `gradmax`, whose new neurons have fan-ins of 0, fan-outs of the
        size of the others' and no amplitude, and `random`.
      restricted: new neurons write through the middle of a kernel only: less to compute.
      normalize: bring new neurons to the size of the others before the amplitude is chosen; always
        done for `gradmax` and `random`, whose sizes mean nothing.
      update: change the layers that read the neurons by γ² δW* too.
      amplitudes: to choose from.
      capacity: from the neurons that a group needs to the slots that it gets, where arrays are
        widened; by default as many. See `geometric`.
      cutoff: eigenvalues of covariances below this part of the largest count as 0.
      key: random key of `random`.
      optimizer: from params of any width to their optimizer, if its state is carried over:
        `lambda params: tx`, or that of a plan for them.
      optimizer_state: of `optimizer(params)`. First moments of new entries are 0, second moments
        those of neurons that are there; all are scaled as the optimizers scale gradients.

    Raises:
      TraceError: what `trace` raises.
      TypeError: params without values; groups of another kind; only one of optimizer and
        optimizer_state; an optimizer for a function to it.
      ValueError: a group with a blocker, one of gates without a neuron, `gradmax` behind a batch
        normalization or gates, or whose layers are dead (read or pass back nothing but 0); too few
        examples for the statistics; no batch; statistics or losses that are not finite; a function
        that does not take wider arrays; an optimizer whose state `expand` does not carry over; an
        option outside its range.
    """
    check_values(params, "params")
    _check_batches(batches, held_out)
    _check_groups(groups, method)
    _check_numbers(groups, number, budget, amplitudes)
    if method == "random" and (key is None or (number is None and budget is None)):
        raise ValueError("method 'random' needs a key, and a number or a budget")
    _check_optimizer(optimizer, optimizer_state)
    measured = measure(loss_fn, params, batches, groups, restricted=restricted, cutoff=cutoff)
    neurons = solve(
        params,
        measured,
        groups,
        method=method,
        restricted=restricted,
        normalize=normalize,
        number=number,
        threshold=threshold,
        budget=budget,
        cutoff=cutoff,
        key=key,
    )
    extension = extend(
        params,
        groups,
        neurons,
        measured,
        restricted=restricted,
        update=update,
        capacity=capacity,
    )
    is_wider = jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, extension.params)
    if is_wider:
        _check_shapes(loss_fn, extension.params, batches[0])
    if method == "gradmax":  # nothing but fan-outs, which change nothing yet
        amplitudes = (1.0,)
    before, losses = search_amplitude(extension, amplitudes, held_out, loss_fn=loss_fn)
    if is_wider:
        _check_unchanged(float(_loss(params, held_out, loss_fn=loss_fn)), before)
    best = int(np.nanargmin(losses))
    amplitude = amplitudes[best]
    grown, state = params, optimizer_state
    if amplitude != 0:
        grown = jax.device_put(extended(extension, np.float32(amplitude)))
        if optimizer is not None:
            growths = slot_growths(params, grown, groups)
            optimizers = optimizer(params), optimizer(grown)
            state = carried_state(optimizers, state, params, grown, growths)
    architecture = trace(loss_fn, grown, batches[0])
    return Growth(
        grown,
        state,
        without_slots(architecture, grown, groups, measured.kinds),
        {name: one.number * (amplitude != 0) for name, one in neurons.items()},
        amplitude,
        (before, losses[best]),
        predicted_decrease(neurons, measured, groups, update=update),
        {name: one.singular_values for name, one in neurons.items()},
        measured.bottlenecks,
    )


def _check_batches(batches: Sequence[Any], held_out: Any) -> None:
    if not len(batches):
        raise ValueError("batches is empty; grow needs at least one")
    found, accepted = map(jax.tree.structure, (batches[0], held_out))
    if found != accepted:
        raise ValueError(
            f"batches[0] is {found} and held_out {accepted}; accepted is a list of batches, each a "
            "tree like held_out"
        )
    for name, batch in (*((f"batches[{i}]", one) for i, one in enumerate(batches)),
                        ("held_out", held_out)):  # fmt: skip
        if not all(map(jnp.size, jax.tree.leaves(batch))):
            raise ValueError(f"{name} holds no example; accepted is one or more")


def _check_groups(groups: Sequence[NeuronGroup], method: str) -> None:
    if not len(groups):
        raise ValueError(
            "groups is empty; grow needs at least one of find_neuron_groups, which says in blocker "
            "why one cannot grow"
        )
    for group in groups:
        if not isinstance(group, NeuronGroup):
            raise TypeError(f"groups must be of find_neuron_groups, found {group!r}")
        if group.blocker is not None:
            raise ValueError(f"neuron group {group.name!r} cannot grow: {group.blocker}")
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    for group in groups if method == "gradmax" else ():
        _check_gradmax(group)


def _check_gradmax(group: NeuronGroup) -> None:
    scales = [link.scale for link in group.links if link.scale is not None]
    reason = ""
    if group.gates:
        reason = f"its neurons are gated by {', '.join(map(repr, group.gates))}"
    elif scales:
        reason = f"fan-ins of 0 have no variance for the normalization of {scales[0]!r}"
    if reason:
        raise ValueError(
            f"neuron group {group.name!r} cannot grow by 'gradmax': {reason}; accepted are tiny, "
            "random"
        )


def _check_numbers(
    groups: Sequence[NeuronGroup],
    number: int | Mapping[str, int] | None,
    budget: int | None,
    amplitudes: Sequence[float],
) -> None:
    wanted = number if isinstance(number, Mapping) else {groups[0].name: number}
    names = [group.name for group in groups]
    for name in wanted:
        if name not in names:
            raise ValueError(unknown("neuron group in number", name, names))
    for name, value in (*(("number", one) for one in wanted.values()), ("budget", budget)):
        if value is not None and not (isinstance(value, numbers.Integral) and value >= 1):
            raise ValueError(f"{name} must be None or an integer of at least 1, found {value!r}")
    if not len(amplitudes):
        raise ValueError("amplitudes is empty; grow needs at least one")
    if not all(0 <= one < math.inf for one in amplitudes):
        raise ValueError(f"amplitudes must be finite and not negative, found {tuple(amplitudes)}")


def _check_optimizer(optimizer, optimizer_state) -> None:
    if (optimizer is None) != (optimizer_state is None):
        raise TypeError(
            "optimizer and optimizer_state belong together; only one of them was given: pass "
            "optimizer=lambda params: tx, optimizer_state=state"
        )
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function from params to their optimizer, found a "
            f"{type(optimizer).__name__}; one of any width is passed as lambda params: tx"
        )


@functools.partial(jax.jit, static_argnames="loss_fn")
def _loss(params: PyTree, batch: Any, *, loss_fn: Loss) -> Array:
    return loss_fn(params, batch)


def _check_unchanged(loss: float, before: float) -> None:
    """What else depends on the number of features is seen here alone."""
    if not math.isclose(loss, before, rel_tol=1e-2, abs_tol=1e-3):
        raise ValueError(
            f"the loss on held_out is {loss}, and {before} with empty slots: loss_fn depends on "
            "the number of features; leave the groups out whose features it counts"
        )


def _check_shapes(loss_fn: Loss, params: PyTree, batch: Any) -> None:
    try:
        jax.eval_shape(loss_fn, params, batch)
    except Exception as error:
        shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
        raise ValueError(
            f"loss_fn does not take the wider arrays {shapes}: {type(error).__name__}: {error}. "
            "Build the model, and running averages of its normalizations, inside loss_fn from the "
            "shapes of params, or begin with empty slots (rows and columns of 0)"
        ) from error
