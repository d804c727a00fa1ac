"""When networks grow, where and by how much: plain data, and what follows from it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from archscale_jax._errors import unknown
from archscale_jax.contrib._growth.bottleneck import Bottleneck
from archscale_jax.contrib._growth.neuron_groups import NeuronGroup

ORDERS = ("round_robin", "largest", "all")


@dataclasses.dataclass(frozen=True)
class GrowthSchedule:
    """A plan of growth; with the seed of a run it fixes the run.

    Attributes:
      order: `round_robin`, the groups in turn as in [TINY]; `largest`, the group whose readers have
        the largest relative bottleneck; `all` at once.
      growths: how many times.
      interval: updates before each growth.
      factor: neurons of a group that grows are multiplied by it, rounded up.
      max_neurons: that no group shall exceed, by name, or for all; None for no limit.
      budget: the most new parameters of one growth, for `grow`; None for no limit.

    Raises:
      ValueError: an unknown order, or a number outside its range.
    """

    order: Literal["round_robin", "largest", "all"] = "round_robin"
    growths: int = 8
    interval: int = 100
    factor: float = 2.0
    max_neurons: Mapping[str, int] | int | None = None
    budget: int | None = None

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(unknown("order", self.order, ORDERS))
        for name, least in (("growths", 0), ("interval", 1), ("budget", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1 and finite, found {self.factor}")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One growth, as the log of a run keeps it: JSON values.

    Attributes:
      step: updates before it.
      numbers: of new neurons, by the names of groups.
      neurons: of all neurons after it, by the names of groups.
      capacity: of all slots after it, by the names of groups.
      amplitude: see `Growth`.
      losses: see `Growth`.
      predicted: see `Growth`.
      bottlenecks: relative bottlenecks of the layers before it, by the names of weights.
    """

    step: int
    numbers: Mapping[str, int]
    neurons: Mapping[str, int]
    capacity: Mapping[str, int]
    amplitude: float
    losses: list[float]
    predicted: float
    bottlenecks: Mapping[str, float]


def choose_growth(
    schedule: GrowthSchedule,
    growth: int,
    groups: Sequence[NeuronGroup],
    neurons: Mapping[str, int],
    bottlenecks: Mapping[str, Bottleneck] | None = None,
) -> dict[str, int]:
    """Returns how many neurons to add [TINY], by the names of groups; empty where none may grow.

    Args:
      schedule: the plan.
      growth: how many growths there were.
      groups: of `find_neuron_groups`; those with a blocker do not grow.
      neurons: how many there are, by the names of groups.
      bottlenecks: of the layers by the names of weights; `largest` needs them.

    Raises:
      ValueError: `largest` without bottlenecks.
    """

    def wanted(name: str) -> int:
        # Rounded first: 1.1 * 50 is 55.00000000000001.
        new = math.ceil(round(schedule.factor * neurons[name], 9)) - neurons[name]
        limit = schedule.max_neurons
        limit = limit.get(name) if isinstance(limit, Mapping) else limit
        return new if limit is None else min(new, limit - neurons[name])

    growing = [group for group in groups if group.blocker is None]
    able = [group for group in growing if wanted(group.name) > 0]
    if not able or growth >= schedule.growths:
        return {}
    chosen = able
    if schedule.order == "round_robin":
        turn = growth % len(growing)
        chosen = [group for group in (*growing[turn:], *growing[:turn]) if group in able][:1]
    elif schedule.order == "largest":
        if bottlenecks is None:
            raise ValueError("order 'largest' compares bottlenecks; pass them, as bottleneck gives")
        found = [max(bottlenecks[name].relative for name in group.consumers) for group in able]
        chosen = [able[found.index(max(found))]]
    return {group.name: wanted(group.name) for group in chosen}


def geometric(ratio: float = 2.0) -> Callable[[int], int]:
    """Returns a function from neurons to their capacity: the next of the numbers ceil(ratioᵏ).

    Networks of many widths then share few shapes, so that few programs are compiled, while the
    empty slots cost up to `ratio` times the computation of a layer's neurons on either side.

    Raises:
      ValueError: a ratio that is not above 1.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1 and finite, found {ratio}")

    def capacity(neurons: int) -> int:
        power, found = 0, 1
        while found < neurons:
            power += 1
            found = math.ceil(ratio**power)
        return found

    return capacity
