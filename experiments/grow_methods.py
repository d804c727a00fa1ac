"""The networks and methods that `experiments.grow_doubling` compares."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Size = tuple[int, int]
"""Depth and width."""

LENGTHS = (0.5, 0.75, 1.0, 1.25)
"""Of trainings from scratch, over the usual one."""


class Task(NamedTuple):
    """What is trained.

    Attributes:
      small: depth and width at the start, of which the rate is.
      large: at the end.
      rate: where the search for the best rate begins.
      label: in tables.
      batch: examples of an update.
      length: of a training of the usual length, over `--steps`.
      head: features of a head of a decoder, 0 of a CNN.
      stream: where hidden layers alone have the width that grows, the width of the stream.
    """

    small: Size
    large: Size
    rate: float
    label: str
    batch: int
    length: float = 1.0
    head: int = 0
    stream: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are for it."""
        own = {"scratch", *OPERATORS} if self.stream else METHODS.keys() - OPERATORS
        return tuple(name for name in METHODS if name in own)


TASKS = {
    "narrow": Task((2, 16), (4, 32), 2**-7, "decoder 4 × 32", 16, length=2.5, head=8),
    "cnn": Task((3, 4), (6, 8), 2**-7, "residual CNN 6 × 8", 32),
    "decoder": Task((2, 32), (4, 64), 2**-7, "decoder 4 × 64", 16, head=16),
    "hidden": Task((6, 4), (6, 8), 2**-7, "residual CNN 6 × 8, hidden", 32, stream=8),
    "mlps": Task((4, 32), (4, 64), 2**-7, "decoder 4 × 64, MLPs", 16, head=16, stream=64),
}


class Method(NamedTuple):
    """A way to the large network.

    Attributes:
      label: in tables and figures.
      path: what is doubled, and at which part of all updates, or where there is a budget of its
        operations; of `nothing` nothing is, of `never` the small network stays.
      options: of `contrib.expand`; with a `method`, of `contrib.grow`, and on how many `batches` it
        looks at a network.
      moments: whether the optimizer's moments are carried over; else they start anew.
      lengths: of trainings, over the usual one.
      rate: over the best one from scratch.
      budget: operations over those of the usual training from scratch; None for as many updates.
    """

    label: str
    path: tuple[tuple[str, float], ...] = ()
    options: Mapping[str, Any] = {}
    moments: bool = True
    lengths: tuple[float, ...] = (1.0,)
    rate: float = 1.0
    budget: float | None = None


BOTH = (("width", 1 / 3), ("depth", 1 / 2))
THIRDS = (("width", 1 / 3), ("depth", 2 / 3))
HALF = (("width", 1 / 2),)
METHODS = {
    "scratch": Method("from scratch", lengths=LENGTHS),
    "both": Method("width at ⅓, depth at ½", BOTH),
    "depth": Method("depth at ½", (("depth", 1 / 2),)),
    "width": Method("width at ½", (("width", 1 / 2),)),
    "thirds": Method("width at ⅓, depth at ⅔ of operations", THIRDS, budget=0.75),
    "halves": Method("depth at ½ of operations", (("depth", 1 / 2),), budget=0.75),
    "thirds_faint": Method(
        "width at ⅓, depth at ⅔ of operations, noise 1/4", THIRDS, {"noise": 0.25}, budget=0.75
    ),
    "small": Method("the small one, never doubled", (("never", 1.0),), budget=0.75),
    "random": Method("both, new ones random", BOTH, {"new": "random"}),
    "faint": Method("both, noise 1/4", BOTH, {"noise": 0.25}),
    "loud": Method("both, noise 2", BOTH, {"noise": 2.0}),
    "fast": Method("both, rate × 2", BOTH, rate=2.0),
    "reset": Method("both, moments anew", BOTH, moments=False),
    "nothing": Method("nothing at ⅓ and ½", (("nothing", 1 / 3), ("nothing", 1 / 2))),
    "copies": Method("copies", HALF),
    "tiny": Method("TINY", HALF, {"method": "tiny"}),
    "drawn": Method("random neurons", HALF, {"method": "random"}),
    "copies_faint": Method("copies, noise 1/4", HALF, {"noise": 0.25}),
    "tiny_reset": Method("TINY, moments anew", HALF, {"method": "tiny"}, moments=False),
    "copies_reset": Method("copies, moments anew", HALF, moments=False),
    "tiny_informed": Method("TINY, 4 × the examples", HALF, {"method": "tiny", "batches": 48}),
    "tiny_sized": Method("TINY, sizes of the others", HALF, {"method": "tiny", "normalize": True}),
    "unread": Method("random ones that nothing reads", HALF, {"new": "random"}),
}
OPERATORS = ("copies", "tiny", "drawn", "copies_faint", "tiny_reset", "copies_reset",
             "tiny_informed", "tiny_sized", "unread")  # fmt: skip
"""Methods of tasks in which hidden layers alone grow."""
SHOWN = ("scratch", "both", "thirds", "halves", "random", "faint")
"""Methods of the figure."""
