"""What flags accept: one range for every meaning, the same in all binaries.

Values are checked as flags are parsed, before a binary begins. An error names the flag, what was
found and what is accepted.
"""

import csv
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax.rules import Registry

flags.disclaim_key_flags()  # they belong to the binary that defines them by this module

Parser = flags.ArgumentParser


class Number(flags.ArgumentParser):
    """A finite number from `low` to `high`, without the bounds that `open` names."""

    def __init__(self, kind: type, low: float, high: float, *, open: tuple[str, ...] = ()):
        self._kind, self._low, self._high, self._open = kind, low, high, open
        name = "an integer" if kind is int else "a number"
        least = f"above {low:g}" if "low" in open else f"from {low:g}"
        self.syntactic_help = f"{name} {least}"
        self.syntactic_help += f" and below {high:g}" if "high" in open else f" to {high:.15g}"

    def parse(self, argument: Any) -> Any:
        try:
            value = self._kind(argument)
        except (TypeError, ValueError):
            raise ValueError(f"accepted is {self.syntactic_help}") from None
        low = value > self._low if "low" in self._open else value >= self._low
        high = value < self._high if "high" in self._open else value <= self._high
        if not (low and high):
            raise ValueError(f"accepted is {self.syntactic_help}")
        return value

    def flag_type(self) -> str:
        return self._kind.__name__


class Checked(flags.ArgumentParser):
    """A text that a function takes without a ValueError."""

    def __init__(self, check: Callable[[str], Any], syntactic_help: str):
        self._check, self.syntactic_help = check, syntactic_help

    def parse(self, argument: str) -> str:
        self._check(argument)
        return argument


def name_of(what: str, names: Iterable[str]) -> Checked:
    """Returns the parser of a name among others."""
    known = tuple(names)

    def check(text: str) -> None:
        if text not in known:
            raise ValueError(unknown(what, text, known))

    return Checked(check, f"of {', '.join(known)}")


class RuleName(Checked):
    """The name of a rule of a registry, also one that it had before, or one of other texts."""

    def __init__(self, registry: Registry, *others: str):
        super().__init__(registry.canonical, f"of {', '.join([*others, *registry])}")
        self._others = others

    def parse(self, argument: str) -> str:
        return argument if argument in self._others else self._check(argument)


class Items(flags.ArgumentParser):
    """Texts between commas, each as its parser takes it; one that is given again counts once."""

    def __init__(self, item: Parser, *, least: int = 1, most: int = 1000):
        self._item, self._least, self._most = item, least, most
        self.syntactic_help = f"between commas: {item.syntactic_help}"

    def parse(self, argument: Any) -> list[str]:
        if not isinstance(argument, list | tuple):
            argument = next(csv.reader([argument], strict=True), []) if argument else []
        items = list(dict.fromkeys(str(item).strip() for item in argument))
        names = []
        for item in items:
            try:
                found = self._item.parse(item)
                names.append(found if isinstance(found, str) else item)
            except ValueError as error:
                alone = items == [item]  # the flag is named with all that was found
                raise ValueError(str(error) if alone else f"item {item!r}: {error}") from None
        if not self._least <= len(items) <= self._most:
            raise ValueError(
                f"accepted are {self._least} to {self._most} items between commas, "
                f"found {len(items)}"
            )
        return list(dict.fromkeys(names))

    def flag_type(self) -> str:
        return "list"


def check_dag(text: str) -> None:
    """Raises ValueError unless a text is a DAG string whose weights can be scaled."""
    if text.count("_") >= MOST_LAYERS:
        raise ValueError(f"accepted are DAG strings of {MOST_LAYERS + 1} vertices at most")
    try:
        archscale.learning_rate_scale(
            archscale.dag_graph(text), archscale.dag_graph("2"), "path_sum"
        )
    except ValueError as error:
        if "weight edge" not in str(error):
            raise
        raise ValueError(
            "no path crosses a weight edge; accepted are DAG strings with a 2 on a path"
        ) from None


MOST_LAYERS = 256
_LARGEST = 2**31 - 1
_POSITIVE = Number(float, 0, 1e6, open=("low",))
_COUNT = Number(int, 1, _LARGEST)

KINDS: dict[str, Parser] = {
    # Networks.
    "architecture": Checked(check_dag, "a DAG string"),
    "width": Number(int, 1, 2**14),
    "depth": Number(int, 1, MOST_LAYERS),
    "kernel_size": Number(int, 1, 255),
    "cells_per_stage": Number(int, 1, MOST_LAYERS),
    "random_vertices": Number(int, 2, 64),
    "growth": Number(int, 2, 64),
    "growths": Number(int, 0, 1000),
    # Data.
    "batch_size": Number(int, 1, 2**20),
    "batch_size_of_two": Number(int, 2, 2**20),
    "downscale": Number(int, 1, 256),
    "padding": Number(int, 0, 256),
    "test_examples": _COUNT,
    # Training.
    "steps": _COUNT,
    "steps_of_20": Number(int, 20, _LARGEST),
    "steps_or_0": Number(int, 0, _LARGEST),
    "epochs": Number(float, 0, 1e6, open=("low",)),
    "rate": _POSITIVE,
    "norm": Number(float, 0, 1e12, open=("low",)),
    "momentum": Number(float, 0, 1, open=("high",)),
    "weight_decay": Number(float, 0, 1000),
    "penalty": Number(float, 0, 1e12, open=("low",)),
    # Studies.
    "seed": Number(int, 0, 2**32 - 1),
    "num_seeds": Number(int, 1, 1000),
    "num_rates": Number(int, 2, 1000),
    "num_random": Number(int, 0, 1000),
    "num_cells": Number(int, 3, 5**6),
    "max_networks": Number(int, 2, 10_000),
    "max_networks_of_four": Number(int, 4, 10_000),
    "refine": Number(int, 0, 8),
    "fraction": _POSITIVE,
    # Where trials run.
    "workers": Number(int, 1, 1024),
    "attempts": Number(int, 1, 1000),
    "devices": Number(int, 1, 10**6),
    "resources": Number(float, 0, 1024),
    "price": Number(float, 0, 1e6),
    "samples": Number(int, 1, 1000),
    "seconds": Number(float, 0, 1e6),
}
"""What is accepted, by meaning; a flag of another name says which is its own."""


def define(name: str, default: Any, text: str, kind: str | None = None) -> None:
    """Defines a flag of a kind, that of its name if none is given."""
    flags.DEFINE(KINDS[kind or name], name, default, text, serializer=flags.ArgumentSerializer())


def define_rule(name: str, default: str, text: str, registry: Registry, *others: str) -> None:
    """Defines a flag that names a rule, or one of other texts."""
    parser = RuleName(registry, *others)
    flags.DEFINE(parser, name, default, text, serializer=flags.ArgumentSerializer())


def define_multi(name: str, default: Any, text: str, kind: str | None = None) -> None:
    """Defines a flag of a kind that may be given several times."""
    flags.DEFINE_multi(KINDS[kind or name], flags.ArgumentSerializer(), name, default, text)


def define_list(name: str, default: Any, text: str, item: Parser | str, *, least: int = 1) -> None:
    """Defines a flag of several texts, each of a kind or as its parser takes it."""
    parser = KINDS[item] if isinstance(item, str) else item
    items = Items(parser, least=least)
    flags.DEFINE(items, name, default, text, serializer=flags.CsvListSerializer(","))
