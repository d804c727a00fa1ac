"""Measured parametrization: what one update does, matched group by group (theory §14).

A formula bounds the change that a parameter makes; one batch measures it, for any network and
optimizer. With u the first update that the optimizer would apply, the derivative of the last
features and of the outputs along the part of u that is a group's tells what that group does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from archscale_jax._architecture import Architecture, Role
from archscale_jax._precision import exact
from archscale_jax._trees import PyTree, map_with_names, named_leaves, with_leaves
from archscale_jax.rules._registry import Part
from archscale_jax.tracing.trace import vertex_features

GROUPS: tuple[str, ...] = ("stem", "hidden", "readout")
_GROUPS = {Role.INPUT: "stem", Role.HIDDEN: "hidden", Role.READOUT: "readout"}
FITS = (0, 10)
"""Updates that fit the readout to the batch before effects are measured, of either measurement."""
_MOVES = np.array([0.0, *(2.0 ** np.arange(-10, 7))])
"""RMS changes of the outputs that an update of the fit chooses from."""
BATCH_NOTE = (
    "measured rates: outputs of an example depend on the others of its batch, as under batch "
    "normalization, where measured rates of deep chains are far too small; compare with "
    "learning_rate='rules' (docs/results/learning_rates.md)"
)


class Effects(NamedTuple):
    """What R updates do at learning rate 1, to first order; V vertices.

    Attributes:
      features: the RMS change of the features of every vertex over their RMS, [R, V].
      spread: the same change over the standard deviation of the features over examples, [R, V].
      outputs: the RMS change of the outputs, [R].
      overlap: the mean product of the change of the last features with that of the update before,
        over their mean square, [R]; 0 of the first.
    """

    features: Float[Array, "r v"]
    spread: Float[Array, "r v"]
    outputs: Float[Array, " r"]
    overlap: Float[Array, " r"]


class Measurable(NamedTuple):
    """A network to be measured.

    Attributes:
      apply: `(params, *inputs)` to the outputs.
      architecture: its graph.
      draw: from a key to initial params.
      optimizer: at learning rate 1.
      inputs: arrays, a batch.
    """

    apply: Callable[..., Any]
    architecture: Architecture
    draw: Callable[[jax.Array], PyTree]
    optimizer: optax.GradientTransformation
    inputs: tuple[PyTree, ...]


def groups_of(architecture: Architecture) -> dict[str, str]:
    """Returns the group of every parameter by name.

    `stem`: what reads the inputs, embeddings among it; `readout`: what the features enter last, a
    tied table too; `hidden`: all between.
    """
    return {
        one.name: "readout" if one.is_tied else _GROUPS[one.layer]
        for one in architecture.parameters
    }


def matched_multipliers(
    network: Measurable,
    base: Measurable,
    loss: Callable[[Any], jax.Array],
    *,
    seeds: int = 2,
    fits: Sequence[int] = FITS,
    cap_readout: bool = False,
) -> dict[str, Part]:
    """Returns the multiplier of every parameter that makes its group do what the base's does.

    Stem and hidden layers change the last features relatively as much as in the base, each group by
    itself and then both together; the readout changes the outputs as much. That holds as drawn and
    with a readout that is fitted to the batch, in the geometric mean: the gradient that reaches the
    features is that of the drawn readout in the first updates, and of a trained one soon after.

    Args:
      network: the network to train.
      base: the network on which the rate was tuned; same optimizer, a batch of the same size.
      loss: of the outputs.
      seeds: how many draws are averaged, in log.
      fits: updates that fit the readout to the batch before each measurement, see `fitted`; what
        they lead to is averaged, in log.
      cap_readout: whether the readout's multiplier is at most 1.

    Raises:
      ValueError: a group whose update changes nothing in one network and something in the other.
    """
    measured = []
    for one in (network, base):
        groups = groups_of(one.architecture)
        updates = [{name: 1.0 for name in groups if groups[name] == group} for group in GROUPS]
        measured.append((measurer(one, loss), updates))
    logs = []
    for seed in range(seeds):
        for count in fits:
            key = jax.random.key(seed)
            sizes = [group_sizes(measure(key, updates, count)) for measure, updates in measured]
            _check_matched(*sizes)
            logs.append(np.log(matching(*sizes)))
    values = dict(zip(GROUPS, np.exp(np.mean(logs, axis=0)).tolist(), strict=True))
    if cap_readout:
        values["readout"] = min(values["readout"], 1.0)
    return {
        name: Part(values[group], "measured", group, {"draws": seeds}, "(theory §14)")
        for name, group in groups_of(network.architecture).items()
    }


def group_sizes(effects: Effects) -> Float[Array, "4"]:
    """Returns what stem, hidden layers, readout, and stem and hidden layers together do.

    Args:
      effects: of updates of the three groups.

    Returns:
      RMS changes: of the last features, relative; of the readout that of the outputs.
    """
    stem, hidden = effects.features[0, -1], effects.features[1, -1]
    both = stem**2 + hidden**2 + 2 * effects.overlap[1]
    return jnp.stack([stem, hidden, effects.outputs[2], jnp.sqrt(jnp.maximum(both, 0.0))])


def matching(network: Float[Array, "4"], base: Float[Array, "4"]) -> Float[Array, "3"]:
    """Returns the multipliers with which the three groups do what the base's do (theory §14).

    Args:
      network: `group_sizes` of the network.
      base: those of its base; a group that does nothing in one of them keeps its rate.
    """
    stem, hidden, readout = _ratio(base[:3], network[:3])
    # Derivatives are linear: what both do after their multipliers follows from what they did.
    overlap = network[3] ** 2 - network[0] ** 2 - network[1] ** 2
    both = base[0] ** 2 + base[1] ** 2 + stem * hidden * overlap
    joint = _ratio(base[3], jnp.sqrt(jnp.maximum(both, 0.0)))
    return jnp.stack([stem * joint, hidden * joint, readout])


def _ratio(base: jax.Array, network: jax.Array) -> jax.Array:
    return jnp.where((base > 0) & (network > 0), base / network, 1.0)


def _check_matched(network: Float[Array, "4"], base: Float[Array, "4"]) -> None:
    for group, ours, theirs in zip(GROUPS, network.tolist(), base.tolist(), strict=False):
        neither = not ours and not theirs  # has such a group
        if not neither and not (ours and theirs and math.isfinite(theirs / ours)):
            raise ValueError(
                f"learning_rate='measured': an update of the {group} changes {ours:.3g} in "
                f"the network and {theirs:.3g} in the base; groups that one of them lacks, or "
                "weights that start at 0 behind them, cannot be matched: take the closed forms"
            )


def measurer(network: Measurable, loss: Callable[[Any], jax.Array]) -> Callable[..., Effects]:
    """Returns a function of a key, R updates and a count to what the updates do.

    An update is told by what it multiplies the optimizer's first update of every leaf with, by
    name; a leaf that is not named stays. Costs about a training step and one more pass forward an
    update. The count, 0 by default, is of the updates that fit the readout before; see `fitted`.
    """

    @jax.jit
    def effects(key: jax.Array, rows: jax.Array, fits: jax.Array) -> Effects:
        params = fitted(network, loss, network.draw(key), fits)
        gradients = jax.grad(lambda params: loss(network.apply(params, *network.inputs)))(params)
        optimizer = network.optimizer
        update, _ = optimizer.update(gradients, optimizer.init(params), params)
        return effects_of(network.apply, params, network.inputs, update, rows)

    def measured(key: jax.Array, updates: Sequence[Mapping[str, float]], fits: int = 0) -> Effects:
        names = list(named_leaves(jax.eval_shape(network.draw, key)))
        rows = [[one.get(name, 0.0) for name in names] for one in updates]
        return effects(key, np.array(rows, np.float32), fits)

    return measured


def fitted(
    network: Measurable, loss: Callable[[Any], jax.Array], params: PyTree, updates: jax.Array | int
) -> PyTree:
    """Returns params whose readout is fitted to the batch, the features as they are.

    Every update goes down the readout's gradient to the smallest loss of a grid. Along it outputs
    are taken as linear, as they are in the weights of a readout.
    """
    groups = groups_of(network.architecture)
    leaves = named_leaves(params)
    readout = {name: leaf for name, leaf in leaves.items() if groups.get(name) == "readout"}

    def outputs(readout: Mapping[str, jax.Array]) -> Any:
        return network.apply(with_leaves(params, readout), *network.inputs)

    def update(_: Any, readout: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values, pull = jax.vjp(outputs, readout)
        before, cotangents = jax.value_and_grad(loss)(values)
        (gradient,) = pull(cotangents)
        change = _pushed(pull, values, gradient)
        steps = _MOVES / jnp.maximum(_rms(change), np.finfo(np.float32).tiny)
        losses = jax.lax.map(lambda step: loss(_moved(values, change, step)), steps)
        step = steps[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
        moved = _moved(readout, gradient, step)
        # A tied table moves the features too: only what lowers the loss is taken.
        better = loss(outputs(moved)) < before
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), moved, readout)

    return with_leaves(params, jax.lax.fori_loop(0, updates, update, readout))


def _moved(tree: PyTree, change: PyTree, step: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf, of: leaf - (step * of).astype(leaf.dtype), tree, change)


def _pushed(pull: Callable[..., Any], values: Any, tangent: Any) -> Any:
    """The derivative along a tangent; forward mode is what a `jax.custom_vjp` lacks."""
    _, push = jax.vjp(lambda cotangents: pull(cotangents)[0], values)
    return push(tangent)[0]


def effects_of(
    apply: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    update: PyTree,
    rows: Float[Array, "r leaves"],
) -> Effects:
    """Returns what parts of an update do: the update times a row, leaf by leaf in their order."""

    def features_and_outputs(params: PyTree) -> tuple[list[jax.Array], Any]:
        features = vertex_features(apply, params, *inputs)
        return [exact(features[one]) for one in sorted(features)], apply(params, *inputs)

    values, pull = jax.vjp(features_and_outputs, params)
    order = {name: index for index, name in enumerate(named_leaves(params))}
    size = jnp.stack([_rms(one) for one in values[0]])
    spread = jnp.stack([jnp.sqrt(jnp.mean(jnp.var(one, axis=0))) for one in values[0]])

    def effect(before: jax.Array, row: jax.Array) -> tuple[jax.Array, Effects]:
        part = map_with_names(lambda name, leaf: leaf * row[order[name]].astype(leaf.dtype), update)
        changes, outputs = _pushed(pull, values, part)
        change = jnp.stack([_rms(one) for one in changes])
        overlap = jnp.mean(changes[-1] * before) / size[-1] ** 2
        return changes[-1], Effects(change / size, change / spread, _rms(outputs), overlap)

    return jax.lax.scan(effect, jnp.zeros_like(values[0][-1]), rows)[1]


def examples_interact(network: Measurable) -> bool:
    """Whether outputs of an example depend on the others of its batch, as batch normalization has.

    Tried on one draw: copies of the first half of the batch in the place of the second.
    """
    leaves = [one for one in jax.tree.leaves(network.inputs) if jnp.ndim(one)]
    size = min((len(one) for one in leaves), default=0)
    if size < 2:
        return False

    def copied(leaf: Any) -> Any:
        whole = jnp.ndim(leaf) and len(leaf) == size
        return jnp.asarray(leaf)[np.arange(size) % (size // 2)] if whole else leaf

    @jax.jit
    def outputs(key: jax.Array, inputs: tuple[PyTree, ...]) -> list[jax.Array]:
        found = jax.tree.leaves(network.apply(network.draw(key), *inputs))
        return [exact(one[: size // 2]) for one in found if one.ndim and len(one) == size]

    key = jax.random.key(0)
    before = outputs(key, network.inputs)
    after = outputs(key, jax.tree.map(copied, network.inputs))
    moved = jax.tree.map(jnp.subtract, before, after)
    return bool(before) and bool(_rms(moved) > 1e-2 * _rms(before))


def _rms(tree: PyTree) -> jax.Array:
    leaves = [exact(one) for one in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(one**2) for one in leaves) / sum(one.size for one in leaves))
