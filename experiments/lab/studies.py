"""What trials of a study share: their settings from flags, and their data, checked beforehand."""

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.lab import datasets
from experiments.lab.datasets import Dataset


def flag_values(without: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the values of the flags that the running binary defines, by name."""
    own = flags.FLAGS.flags_by_module_dict()[sys.argv[0]]
    return {flag.name: flag.value for flag in own if flag.name not in without}


@functools.lru_cache(maxsize=4)
def load(name: str, data_dir: str | None, downscale: int) -> Dataset:
    """Loads a data set once, with images made smaller by averaging."""
    return datasets.downscale(datasets.load(name, data_dir=data_dir), downscale)


def check_trials(
    trials: Sequence[Mapping[str, Any]],
    data_dir: str | None,
    downscale_flag: str = "the study's own factor",
    *,
    held_out: int = 0,
) -> None:
    """Checks, before the first of some trials runs, that their data are there and fit them.

    Args:
      trials: with `dataset`, `downscale` and `batch_size`.
      data_dir: folder of the data set.
      downscale_flag: what sets the `downscale`, for the message.
      held_out: examples of the training split that are not trained on.

    Raises:
      FileNotFoundError: the data set is missing; the message says how to get it.
      ValueError: a damaged data set, a factor that does not divide its images, or a batch that
        exceeds its training examples.
    """
    for name, factor, batch_size in dict.fromkeys(
        (trial["dataset"], trial["downscale"], trial["batch_size"]) for trial in trials
    ):
        examples = len(load(name, data_dir, 1).train_images)
        try:
            load(name, data_dir, factor)
        except ValueError as error:
            raise ValueError(f"{downscale_flag}, found {factor}: {error}") from None
        check_batch("--batch_size", batch_size, examples - held_out)


def check_batch(flag: str, batch_size: int, examples: int) -> None:
    """Raises ValueError where a batch, of a flag, exceeds the training examples."""
    if batch_size > examples:
        raise ValueError(
            f"{flag}={batch_size} exceeds the {max(examples, 0)} training examples; lower it, or "
            "choose another --dataset"
        )


def failures(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a line for every trial that failed, and prints them on standard error."""
    lines = [f"failed: {one['trial']}: {one['error']}" for one in records if "error" in one]
    for line in lines:
        print(line, file=sys.stderr)
    return lines
