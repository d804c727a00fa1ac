"""When networks grow, where and by how much: plain data, and what follows from it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from archscale_jax._errors import unknown
from archscale_jax.contrib._growth.bottleneck import Bottleneck
from archscale_jax.contrib._growth.units import Units

ORDERS = ("round_robin", "largest", "all")


@dataclasses.dataclass(frozen=True)
class GrowthSchedule:
    """A plan of growth; with the seed of a run it fixes the run.

    Attributes:
      order: `round_robin`, the units in turn as in [TINY]; `largest`, the units whose readers have
        the largest relative bottleneck; `all` at once.
      growths: how many times.
      every: updates before each growth.
      factor: neurons of units that grow are multiplied by it, rounded up.
      most: neurons that no units shall exceed, by name, or for all; None for no limit.
      budget: the most new parameters of one growth, for `grow`; None for no limit.

    Raises:
      ValueError: an unknown order, or a number outside its range.
    """

    order: Literal["round_robin", "largest", "all"] = "round_robin"
    growths: int = 8
    every: int = 100
    factor: float = 2.0
    most: Mapping[str, int] | int | None = None
    budget: int | None = None

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(unknown("order", self.order, ORDERS))
        for name, least in (("growths", 0), ("every", 1), ("budget", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1 and finite, found {self.factor}")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One growth, as a run's log keeps it: JSON values.

    Attributes:
      step: updates before it.
      numbers: of new neurons, by the names of units.
      neurons: of all neurons after it, by the names of units.
      rooms: of all rooms after it, by the names of units.
      amplitude: see `Growth`.
      losses: see `Growth`.
      predicted: see `Growth`.
      bottlenecks: relative bottlenecks of the layers before it, by the names of weights.
    """

    step: int
    numbers: Mapping[str, int]
    neurons: Mapping[str, int]
    rooms: Mapping[str, int]
    amplitude: float
    losses: list[float]
    predicted: float
    bottlenecks: Mapping[str, float]


def choose_growth(
    schedule: GrowthSchedule,
    growth: int,
    units: Sequence[Units],
    neurons: Mapping[str, int],
    bottlenecks: Mapping[str, Bottleneck] | None = None,
) -> dict[str, int]:
    """Returns how many neurons to add, by the names of units; empty where none may grow.

    Args:
      schedule: the plan.
      growth: how many growths there were.
      units: neurons of `find_units`; those with an obstacle are left out.
      neurons: how many there are, by the names of units.
      bottlenecks: of the layers by the names of weights; `largest` needs them.

    Raises:
      ValueError: `largest` without bottlenecks.
    """

    def room(name: str) -> int:
        # Rounded first: 1.1 * 50 is 55.00000000000001.
        wanted = math.ceil(round(schedule.factor * neurons[name], 9)) - neurons[name]
        most = schedule.most.get(name) if isinstance(schedule.most, Mapping) else schedule.most
        return wanted if most is None else min(wanted, most - neurons[name])

    able = [one for one in units if one.obstacle is None and room(one.name) > 0]
    if not able or growth >= schedule.growths:
        return {}
    if schedule.order == "all":
        chosen = able
    elif schedule.order == "round_robin":
        growing = [one for one in units if one.obstacle is None]
        turn = growth % len(growing)
        chosen = [one for one in (*growing[turn:], *growing[:turn]) if one in able][:1]
    else:
        if bottlenecks is None:
            raise ValueError("order 'largest' compares bottlenecks; pass them")
        found = {
            one.name: max(bottlenecks[name].relative for name in one.consumers) for one in able
        }
        chosen = [max(able, key=lambda one: found[one.name])]
    return {one.name: room(one.name) for one in chosen}


def geometric(ratio: float = 2.0):
    """Returns a function from neurons to rooms: the next of the numbers ceil(ratioᵏ).

    Networks of many widths then share few shapes, so that few programs are compiled, while the
    empty rooms cost up to `ratio` times the computation of a layer's neurons on either side.

    Raises:
      ValueError: a ratio that is not above 1.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1 and finite, found {ratio}")

    def rooms(neurons: int) -> int:
        power, found = 0, 1
        while found < neurons:
            power += 1
            found = math.ceil(ratio**power)
        return found

    return rooms
