"""Blocks of a residual network: which of a deeper one come from which, by their numbers."""

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree
from archscale_jax.rules._residual import places_of
from archscale_jax.tracing import trace

Position = Literal["append", "interleave"]
POSITIONS = ("append", "interleave")


def placed(small: int, large: int, position: Position) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every block of a deeper network the one it comes from, and whether it is new.

    Args:
      small: number of blocks.
      large: number of blocks of the deeper network.
      position: `append`, the whole stack behind itself, or `interleave`, each behind its source.
    """
    if position not in POSITIONS:
        raise ValueError(unknown("position", position, POSITIONS))
    if large < small:
        raise ValueError(f"a stack of {small} blocks cannot become one of {large}")
    blocks = np.arange(large)
    if position == "append":
        return blocks % small, blocks >= small
    sources = blocks * small // large
    return sources, np.diff(sources, prepend=-1) == 0


def sources_of(
    small: Iterable[str], large: Iterable[str], position: Position
) -> dict[str, tuple[str, bool]]:
    """Returns for every leaf of a deeper network the leaf it comes from, and whether it is new.

    Numbers in names tell: the names of a stack are the same up to a number, of which the deeper
    network has more.

    Raises:
      ValueError: a leaf without counterpart.
    """
    small, large = list(small), list(large)
    ours, theirs = _numbers(small), _numbers(large)
    found: dict[str, tuple[str, bool]] = {}
    for name in large:
        parts = re.split(r"(\d+)", name)  # text, number, text, …
        source, is_new = parts[:1], False
        for place in range(1, len(parts), 2):
            stack = "".join(source)
            before, after = ours.get(stack, set()), theirs["".join(parts[:place])]
            number = int(parts[place])
            if before != after and before:
                sources, new = placed(len(before), len(after), position)
                index = sorted(after).index(number)
                number, is_new = sorted(before)[sources[index]], is_new or bool(new[index])
            source += [str(number), parts[place + 1]]
        found[name] = ("".join(source), is_new)
    for name, (source, _) in found.items():
        if source not in small:
            raise ValueError(
                f"like holds the leaf {name!r}, to which none of params corresponds; accepted are "
                "the same names, up to the numbers of blocks"
            )
    if missing := sorted(set(small) - {source for source, is_new in found.values() if not is_new}):
        raise ValueError(f"params hold the leaf {missing[0]!r}, which like lacks")
    return found


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers that follow each beginning of a name."""
    found: dict[str, set[int]] = collections.defaultdict(set)
    for name in names:
        parts = re.split(r"(\d+)", name)
        for place in range(1, len(parts), 2):
            found["".join(parts[:place])].add(int(parts[place]))
    return found


def ends(
    function: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> frozenset[str]:
    """Returns the names of the leaves that end residual branches, biases included."""
    architecture = trace(function, params, *inputs)
    places = places_of(architecture)
    return frozenset(one.name for one in architecture.parameters if places.of(one)[0] == "end")
