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
from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._registry import Part
from archscale_jax.tracing.trace import vertex_features

GROUPS: tuple[str, ...] = ("stem", "hidden", "readout")
_GROUPS = {Role.INPUT: "stem", Role.HIDDEN: "hidden", Role.READOUT: "readout"}
TRAINED = 0.5
"""How far the readout is scaled to the size that training gives it, see `matched_multipliers`."""
LEAST_DRAWS, MOST_DRAWS = 4, 32
STANDARD_ERROR = 0.1
"""Of the log of a multiplier, at which no more draws are made."""
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
    trained: float = TRAINED,
    cap_readout: bool = False,
) -> dict[str, Part]:
    """Returns the multiplier of every parameter that makes its group do what the base's does.

    Stem and hidden layers change the last features relatively as much as in the base, each group by
    itself and then both together; the readout changes the outputs as much. Multipliers are
    averaged over 4 to 32 draws, in log, until their standard error is 0.1.

    Gradients pass through the readout, which is as drawn in the first updates only. Training makes
    outputs of one size, whatever that of the features: a readout that is drawn as in the base and
    gives outputs of c times the spread ends c times as small. It is measured half-way, in log: the
    network's readout over √c.

    Args:
      network: the network to train.
      base: the network on which the rate was tuned; same optimizer, a batch of the same size.
      loss: of the outputs.
      trained: power of 1/c by which the readout is scaled: 0 as drawn, 1 as trained.
      cap_readout: whether the readout's multiplier is at most 1.

    Raises:
      ValueError: a group whose update changes nothing in one network and something in the other.
    """
    measured = []
    for one in (network, base):
        groups = groups_of(one.architecture)
        updates = [{name: 1.0 for name in groups if groups[name] == group} for group in GROUPS]
        measured.append((measurer(one, loss), updates))
    spread_of = [_output_spread(one) for one in (network, base)]

    def of_draw(number: int) -> np.ndarray:
        key = jax.random.key(number)
        spreads = [float(spread(key)) for spread in spread_of]
        scales = [float(_ratio(spreads[1], spreads[0])) ** trained, 1.0]
        sizes = [
            group_sizes(measure(key, updates, scale))
            for (measure, updates), scale in zip(measured, scales, strict=True)
        ]
        _check_matched(*sizes)
        return np.log(matching(*sizes))

    logs: list[np.ndarray] = []
    while not _certain(logs):
        logs.append(of_draw(len(logs)))
    values = dict(zip(GROUPS, np.exp(np.mean(logs, axis=0)).tolist(), strict=True))
    if cap_readout:
        values["readout"] = min(values["readout"], 1.0)
    return {
        name: Part(values[group], "measured", group, {"draws": len(logs)}, "(theory §14)")
        for name, group in groups_of(network.architecture).items()
    }


def _certain(logs: Sequence[np.ndarray]) -> bool:
    """Whether the mean over draws is known well enough, or no more draws are made."""
    if len(logs) < LEAST_DRAWS:
        return False
    errors = np.std(logs, axis=0, ddof=1) / math.sqrt(len(logs))
    return len(logs) == MOST_DRAWS or bool(np.max(errors) <= STANDARD_ERROR)


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


def _ratio(base: jax.typing.ArrayLike, network: jax.typing.ArrayLike) -> jax.Array:
    base, network = jnp.asarray(base), jnp.asarray(network)
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
    """Returns a function of a key, R updates and a scale to what the updates do.

    An update is told by what it multiplies the optimizer's first update of every leaf with, by
    name; a leaf that is not named stays. Costs about a training step and one more pass forward an
    update. The scale, 1 by default, multiplies the drawn readout; a tied table stays.
    """
    scaled = {one.name for one in network.architecture.parameters if one.layer == Role.READOUT}

    @jax.jit
    def effects(key: jax.Array, rows: jax.Array, scale: jax.Array) -> Effects:
        params = map_with_names(
            lambda name, leaf: leaf * scale.astype(leaf.dtype) if name in scaled else leaf,
            network.draw(key),
        )
        gradients = jax.grad(lambda params: loss(network.apply(params, *network.inputs)))(params)
        optimizer = network.optimizer
        update, _ = optimizer.update(gradients, optimizer.init(params), params)
        return effects_of(network.apply, params, network.inputs, update, rows)

    names = list(named_leaves(jax.eval_shape(network.draw, jax.random.key(0))))

    def measured(
        key: jax.Array, updates: Sequence[Mapping[str, float]], scale: float = 1.0
    ) -> Effects:
        rows = [[one.get(name, 0.0) for name in names] for one in updates]
        return effects(key, np.array(rows, np.float32), jnp.float32(scale))

    return measured


def _output_spread(network: Measurable) -> Callable[[jax.Array], jax.Array]:
    """The standard deviation of outputs over examples, of the draw of a key."""

    @jax.jit
    def spread(key: jax.Array) -> jax.Array:
        outputs = jax.tree.leaves(network.apply(network.draw(key), *network.inputs))
        found = [exact(one) for one in outputs if jnp.ndim(one)]
        return _rms([one - jnp.mean(one, axis=0) for one in found]) if found else jnp.float32(0)

    return spread


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
    # As in `measure_update`: no forward mode, which functions with a `jax.custom_vjp` lack.
    _, push = jax.vjp(lambda cotangents: pull(cotangents)[0], values)
    order = {name: index for index, name in enumerate(named_leaves(params))}
    size = jnp.stack([_rms(one) for one in values[0]])
    spread = jnp.stack([jnp.sqrt(jnp.mean(jnp.var(one, axis=0))) for one in values[0]])

    def effect(before: jax.Array, row: jax.Array) -> tuple[jax.Array, Effects]:
        part = map_with_names(lambda name, leaf: leaf * row[order[name]].astype(leaf.dtype), update)
        changes, outputs = push(part)[0]
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
