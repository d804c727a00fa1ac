"""What one step of one leaf does, and whether it is the same at every width.

Weights are drawn by `initialize`; the update is the optimizer's first one for the gradient of one
batch; of one leaf alone, times its width multiplier, all others stay. Two effects are measured, to
first order in the rate: the change of the logits, and the largest change of a vertex relative to
the vertex. Both must neither grow nor shrink with the width [μP].

Effects at a width n are those at infinite width times 1 + b/n, b growing with the number of
predictions, that disturb one another: 0.5 between the widths 64 and 1,024 has been seen where
there are 16. Such a trend fades from step to step of the width, and a wrong power of the width
does not. So an effect counts as flat if its ratio is within a factor 1.3; as settling, if that
holds of the last step alone and the last step is clearly smaller than the first.

At initialization the readout knows nothing of the features, so that what a gate or a router of a
fixed size does to the logits averages out over the width, whatever its rate: the effect vanishes.
What is not flat there is measured again with a readout that a step of its own has made: from zero
(a tied table: from where it is) along its gradient to logits of size 1. The learning rates must
make that flat.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._trees import named_leaves, with_leaves
from tests.step_networks import Network

FACTOR = 1.3
"""Largest ratio of effects between the smallest and the largest width."""
NOTHING = 1e-6
"""Effects smaller than this part of the largest one of the network are rounding."""

SMALLEST = 1e-30  # in place of ε, which would make a width of its own


class Optimizer(NamedTuple):
    """An optimizer at rate 1, and the options of `learning_rate_multipliers` that fit it."""

    create: Callable[[], optax.GradientTransformation]
    options: Mapping[str, Any]


OPTIMIZERS = {
    "sgd": Optimizer(lambda: optax.sgd(1.0), {"width_rule": "sgd"}),
    "adam": Optimizer(lambda: optax.adam(1.0, eps=SMALLEST), {"width_rule": "adam"}),
    "muon": Optimizer(lambda: optax.contrib.muon(1.0, eps=SMALLEST), {"width_rule": "muon"}),
    "muon, consistent RMS": Optimizer(
        lambda: optax.contrib.muon(1.0, eps=SMALLEST, consistent_rms=0.2),
        {"width_rule": "muon", "consistent_rms": 0.2},
    ),
}


class Effects(NamedTuple):
    """Mean squares, by leaf [leaves] and by leaf and vertex [leaves, vertices]."""

    logits: np.ndarray
    vertices: np.ndarray


class Verdict(enum.StrEnum):
    """What an effect does as the width grows."""

    FLAT = "flat"
    SETTLING = "settling"
    WRONG = "not flat"
    NOTHING = "no effect"


@dataclasses.dataclass(frozen=True)
class Trend:
    """An effect of a leaf as a function of the width.

    Attributes:
      effects: root mean squares by width, in ascending order.
      errors: standard errors of their logarithms, from the draws.
      present: whether they are more than rounding.
    """

    effects: dict[int, float]
    errors: dict[int, float]
    present: bool = True

    @property
    def slope(self) -> tuple[float, float]:
        """Power of the width, by a line through logarithms, and its standard error."""
        widths = np.log(np.array(list(self.effects), float))
        centred = (widths - widths.mean()) / np.sum((widths - widths.mean()) ** 2)
        effects, errors = (np.array(list(one.values())) for one in (self.effects, self.errors))
        return float(centred @ np.log(effects)), float(np.sqrt(np.sum((centred * errors) ** 2)))

    @property
    def ratio(self) -> float:
        """Effect at the largest width over that at the smallest, on the line."""
        widths = list(self.effects)
        return (widths[-1] / widths[0]) ** self.slope[0] if self.present else math.nan

    @property
    def error(self) -> float:
        """Standard error of the logarithm of the ratio."""
        widths = list(self.effects)
        return math.log(widths[-1] / widths[0]) * self.slope[1] if self.present else math.nan

    @property
    def verdict(self) -> Verdict:
        """What it does, as far as the draws can tell."""
        if not self.present:
            return Verdict.NOTHING
        if abs(math.log(self.ratio)) <= math.log(FACTOR) + 2 * self.error:
            return Verdict.FLAT
        logarithms = np.log(list(self.effects.values()))
        first, last = abs(logarithms[1] - logarithms[0]), abs(logarithms[-1] - logarithms[-2])
        error = math.hypot(*list(self.errors.values())[-2:])
        fades = len(self.effects) > 2 and last <= 0.6 * first + error
        fades = fades and last <= math.log(FACTOR) + error
        return Verdict.SETTLING if fades else Verdict.WRONG

    @property
    def holds(self) -> bool:
        return self.verdict != Verdict.WRONG


class LeafSteps(NamedTuple):
    """The check of one leaf."""

    leaf: str
    role: str
    shape: tuple[int, ...]
    multiplier: float
    logits: Trend
    vertices: Trend
    later: tuple[Trend, Trend] | None = None
    """Both once the readout has moved, where one of them is not flat before."""

    @property
    def holds(self) -> bool:
        """Whether both are flat, or vanish at first and are flat once the readout has moved."""
        if self.later is None:
            return self.logits.holds and self.vertices.holds
        at_first = (self.logits, self.vertices)
        vanish = all(one.holds or one.ratio < 1 for one in at_first)
        return vanish and all(one.holds for one in self.later)


def leaf_steps(
    make: Callable[[int], Network], optimizer: str, draws: Mapping[int, int]
) -> list[LeafSteps]:
    """Checks every leaf of a network.

    Args:
      make: the network of a width.
      optimizer: name in `OPTIMIZERS`.
      draws: by width, in ascending order, the number of draws of the weights.
    """
    chosen = OPTIMIZERS[optimizer]
    built = {width: make(width) for width in draws}
    traced = {
        width: archscale.trace(one.apply, one.shapes, one.inputs) for width, one in built.items()
    }
    base, last = traced[min(draws)], max(draws)
    multipliers = {
        width: archscale.learning_rate_multipliers(one, base, "none", **chosen.options)
        for width, one in traced.items()
    }

    def measured(moved: bool) -> list[tuple[Trend, Trend]]:
        effects = {
            width: measure(
                built[width], traced[width], chosen.create(), multipliers[width], count, moved
            )
            for width, count in draws.items()
        }
        logits = trends({width: one.logits for width, one in effects.items()})
        vertices = trends({width: one.vertices for width, one in effects.items()})
        return list(zip(logits, vertices, strict=True))

    found = [
        LeafSteps(
            one.name, str(one.role), one.shape, float(np.mean(multipliers[last][one.name])), *both
        )
        for one, both in zip(traced[last].parameters, measured(False), strict=True)
    ]
    if all(one.holds for one in found):
        return found
    later = measured(True)
    return [
        one if one.holds else one._replace(later=both)
        for one, both in zip(found, later, strict=True)
    ]


def measure(
    built: Network,
    architecture: archscale.Architecture,
    optimizer: optax.GradientTransformation,
    multipliers: Mapping[str, Any],
    draws: int,
    moved: bool,
) -> Effects:
    """Measures the effects of all leaves: `Effects` with draws as their first axis.

    Args:
      built: the network.
      architecture: its architecture.
      optimizer: at rate 1.
      multipliers: of the leaves.
      draws: number of draws of the weights.
      moved: whether the readout moves first.
    """

    def loss(params):
        logits = built.apply(params, built.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, built.labels).mean()

    @jax.jit
    def first_step(params):
        params = _with_moved_readout(built, params, loss) if moved else params
        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
        return params, updates

    @jax.jit
    def effects(params, updates):
        def features(params):
            found = archscale.vertex_features(built.apply, params, built.inputs)
            return built.apply(params, built.inputs), list(found.values())

        (_, values), (logits, changes) = jax.jvp(features, (params,), (updates,))
        relative = [_relative(*pair) for pair in zip(values, changes, strict=True)]
        return jnp.mean(logits**2), jnp.stack(relative)

    names = [parameter.name for parameter in architecture.parameters]
    found = []
    for number in range(draws):
        key = jax.random.key(number, impl="rbg")  # quicker than the default
        params, updates = first_step(archscale.initialize(key, built.shapes, architecture))
        steps, nothing = named_leaves(updates), jax.tree.map(jnp.zeros_like, updates)
        alone = {
            name: (steps[name] * multipliers[name]).astype(steps[name].dtype) for name in names
        }
        found.append([
            jax.device_get(effects(params, with_leaves(nothing, {name: step})))
            for name, step in alone.items()
        ])  # fmt: skip
    return Effects(*(np.array([[leaf[side] for leaf in one] for one in found], float)
                     for side in range(2)))  # fmt: skip


def _with_moved_readout(built: Network, params: Any, loss: Callable[[Any], jax.Array]) -> Any:
    """Moves the readout, from zero unless it is tied, to where it changes the logits by 1."""
    if built.readout != "tokens":
        nothing = jnp.zeros_like(named_leaves(params)[built.readout])
        params = with_leaves(params, {built.readout: nothing})
    gradient = named_leaves(jax.grad(loss)(params))[built.readout]
    direction = with_leaves(jax.tree.map(jnp.zeros_like, params), {built.readout: -gradient})
    _, change = jax.jvp(lambda params: built.apply(params, built.inputs), (params,), (direction,))
    size = jnp.sqrt(jnp.mean(change**2))
    return jax.tree.map(lambda leaf, step: leaf + step / size, params, direction)


def _relative(value: jax.Array, change: jax.Array) -> jax.Array:
    """Mean square of a change over that of the features; 0 where these are 0, as first states."""
    size = jnp.mean(jnp.square(value))
    return jnp.where(size > 0, jnp.mean(jnp.square(change)) / jnp.where(size > 0, size, 1), 0)


def trends(measured: dict[int, np.ndarray]) -> list[Trend]:
    """Fits a line to the effects of every leaf.

    Args:
      measured: by width, mean squares [draws, leaves] or [draws, leaves, vertices], of which the
        vertex with the largest mean counts.
    """
    squares = {width: _largest(one) for width, one in measured.items()}
    means = {width: one.mean(0) for width, one in squares.items()}
    present = np.any([one > NOTHING**2 * one.max(initial=0) for one in means.values()], axis=0)
    found = []
    for leaf, is_present in enumerate(present):
        effects, errors = {}, {}
        for width, one in squares.items():
            mean = max(float(means[width][leaf]), SMALLEST)
            effects[width] = math.sqrt(mean)
            # Half of the relative error of a square is that of the logarithm of its root.
            errors[width] = float(one[:, leaf].std(ddof=1)) / len(one) ** 0.5 / mean / 2
        found.append(Trend(effects, errors, bool(is_present)))
    return found


def _largest(squares: np.ndarray) -> np.ndarray:
    """[draws, leaves], of every leaf the vertex that changes most."""
    if squares.ndim == 2:
        return squares
    chosen = squares.mean(0).argmax(axis=-1)  # [leaves]
    return np.take_along_axis(squares, chosen[None, :, None], axis=-1)[..., 0]
