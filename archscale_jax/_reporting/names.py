"""Names and numbers in short: what differs in numbers alone is written once."""

import collections
import decimal
import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence


def merged_names(names: Sequence[str]) -> list[str]:
    """Returns names with those joined that differ in numbers only, `blocks/{0…11}/kernel ×12`."""
    merged = []
    for indices in grouped(range(len(names)), lambda index: pattern_of(names[index])):
        found = [names[index] for index in indices]
        merged += [merged_path([found[place] for place in part]) for part in blocks_of(found)]
    return merged


def pattern_of(path: str) -> tuple[str, ...]:
    """Returns what is between the numbers of a path."""
    return tuple(re.split(r"\d+", path))


def grouped(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Returns indices by key, in the order in which keys first appear."""
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index in indices:
        groups[key(index)].append(index)
    return list(groups.values())


def blocks_of(paths: Sequence[str]) -> list[list[int]]:
    """Indices of paths of one pattern by block, in which every number goes with every other."""
    numbers = [re.findall(r"\d+", path) for path in paths]

    def split(indices: list[int]) -> list[list[int]]:
        values = [
            len(set(column)) for column in zip(*(numbers[one] for one in indices), strict=True)
        ]
        if math.prod(values) == len(indices):
            return [indices]
        fewest = min((count, place) for place, count in enumerate(values) if count > 1)[1]
        parts = grouped(indices, lambda index: numbers[index][fewest])
        return [block for part in parts for block in split(part)]

    return split(list(range(len(paths))))


def merged_path(paths: Sequence[str]) -> str:
    """Returns one name for all paths of a block."""
    if len(paths) == 1:
        return paths[0]
    texts = pattern_of(paths[0])
    columns = zip(*(re.findall(r"\d+", path) for path in paths), strict=True)
    order = lambda text: (int(text), text)  # noqa: E731
    numbers = [_numbers(sorted(set(column), key=order)) for column in columns]
    merged = "".join(text + number for text, number in zip(texts, [*numbers, ""], strict=True))
    return f"{merged} ×{len(paths)}"


def _numbers(numbers: Sequence[str]) -> str:
    """Ascending numbers in short: `{0…11}`, `{0,2…22}`, `{0,3,4}`."""
    if len(numbers) == 1:
        return numbers[0]
    values = [int(number) for number in numbers]
    step = values[1] - values[0]
    even = step > 0 and values == list(range(values[0], values[-1] + 1, step))
    if even and len(values) > 2:
        start = numbers[0] if step == 1 else f"{numbers[0]},{numbers[1]}"
        return f"{{{start}…{numbers[-1]}}}"
    if len(values) > 5:
        return f"{{{','.join(numbers[:3])},…,{numbers[-1]}}}"
    return f"{{{','.join(numbers)}}}"


def count_text(number: int) -> str:
    """Returns an integer of any size in a few characters: `1,234`, `1.3e12`."""
    if abs(number) < 10**6:
        return f"{number:,}"
    return f"{decimal.Decimal(number):.1e}".replace("e+", "e")  # floats end at 1.8e308
