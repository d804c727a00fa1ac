"""Benchmarks of several parts: each is printed, and kept, as soon as it is measured."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console

from benchmarks import common

Measure = Callable[[], Any]
Tabulate = Callable[[Any], Any]


def define_flags(*, torch: bool) -> None:
    """Defines `quick`, and `torch` for benchmarks that compare with it."""
    flags.DEFINE_bool(
        "quick", False, "Try everything at a tiny size; times say nothing, none is kept."
    )
    if torch:
        flags.DEFINE_bool("torch", True, "Compare with PyTorch.")


def prepare(arguments: list[str]) -> None:
    """Refuses unknown arguments; logs warnings alone; lets JAX compile what it is asked for."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading


def run(
    name: str,
    about: Mapping[str, Any],
    parts: Mapping[str, tuple[Measure, *tuple[Tabulate, ...]]],
    *,
    torch: Collection[str] = (),
    show: Callable[[Any], None] | None = None,
) -> None:
    """Measures part by part, prints the tables and writes what there is after each.

    Args:
      name: of the benchmark, see `common.write_results`.
      about: what is written beside the parts, such as settings.
      parts: by name, how each is measured, and the tables of what was.
      torch: parts that `--notorch` skips.
      show: prints a table; None prints those of `rich`.
    """
    show = show or Console(width=150).print
    results = dict(about)
    for part, (measure, *tables) in parts.items():
        skipped = part in torch and not flags.FLAGS.torch
        results[part] = {"skipped": "--notorch"} if skipped else measure()
        for table in tables:
            show(table(results[part]))
        if not flags.FLAGS.quick:  # after each part: a run that is cut off keeps what it has
            path = common.write_results(name, results, "flax", "optax")
            print(f"results: {path.relative_to(path.parents[2])}")
