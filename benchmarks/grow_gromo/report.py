"""Tables of `benchmarks.grow_gromo`, from its records."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.grow_gromo import cases
from experiments.lab.tables import spread

Record = Mapping[str, Any]
PAIRS = (("ours", "gromo, 64 bits"), ("ours", "gromo, 32 bits"),
         ("ours, as used", "gromo, as used"))  # fmt: skip


def best_rates(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the finished trainings of every arm at its best rate, by the mean accuracy.

    Among the rates with the most finished trainings.
    """
    found = {}
    for arm in dict.fromkeys(record["arm"] for record in records):
        by_rate: dict[float, list[Record]] = {}
        for record in records:
            if record["arm"] == arm and "accuracy" in record:
                by_rate.setdefault(record["rate"], []).append(record)
        if by_rate:
            found[arm] = max(
                by_rate.values(),
                key=lambda some: (len(some), np.mean([one["accuracy"] for one in some])),
            )
    return found


def parameters(widths: Sequence[int]) -> int:
    """Weights and biases of dense layers of these widths."""
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def operations(record: Record, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the operations of a training in all, empty slots included, and of its growths."""
    case = {**settings, **cases.ARMS[record["arm"]]}
    every = record.get("capacity", record["widths"])
    growths = [
        cases.growth_flops(widths, growth % (len(widths) - 2), case)
        for growth, widths in enumerate(every[:-1])
    ]
    interval = case["interval"]
    lengths = [interval] * case["growths"] + [case["steps"] - interval * case["growths"]]
    training = sum(
        3 * cases.forward_flops(widths) * case["batch_size"] * length
        for widths, length in zip(every, lengths, strict=True)
    )
    return training + sum(growths), float(sum(growths))


def seconds(records: Sequence[Record], arm: str, part: str = "total") -> dict[int, float]:
    """Returns processor seconds of an arm by seed, with everything compiled."""
    return {
        record["seed"]: record["again"]["processor_seconds"][part]
        for record in records
        if record["arm"] == arm and "again" in record
    }


def first_seconds(records: Sequence[Record], arm: str) -> list[float]:
    """Returns processor seconds of an arm's trainings, with what they compile."""
    return [
        record["processor_seconds"]["total"]
        for record in records
        if record["arm"] == arm and "accuracy" in record
    ]


def lines(
    arms: Mapping[str, Sequence[Record]], records: Sequence[Record], settings: Mapping[str, Any]
) -> list[list[str]]:
    """Returns a row for every arm: results at its best rate, times of all its trainings."""
    parts = ("total", "growing", "statistics", "solution", "search")
    rows = [["", "rate", "test accuracy, %", "parameters", "GFLOP", "of it growing, %",
             "seconds, compiling", "compiled", "of it growing", *parts[2:], "seeds"]]  # fmt: skip
    for arm, best in arms.items():
        flops = np.array([operations(record, settings) for record in best])
        rows.append(
            [
                arm,
                f"{best[0]['rate']:g}",
                spread([100 * record["accuracy"] for record in best], ddof=1),
                f"{np.mean([parameters(record['widths'][-1]) for record in best]):,.0f}",
                f"{flops[:, 0].mean() / 1e9:.1f}",
                f"{100 * (flops[:, 1] / flops[:, 0]).mean():.0f}",
                spread(first_seconds(records, arm), ".1f", ddof=1),
                *(spread([*seconds(records, arm, part).values()], ".2f", ddof=1) for part in parts),
                f"{len(best)}",
            ]
        )
    return rows


def differences(arms: Mapping[str, Sequence[Record]], records: Sequence[Record]) -> list[list[str]]:
    """Returns ours against gromo by seed: points of accuracy, ratios of seconds when compiled."""
    parts = ("total", "growing", "training")
    rows = [["", "points", *(f"seconds, {part}" for part in parts)]]
    for ours, theirs in PAIRS:
        accuracy = {record["seed"]: record["accuracy"] for record in arms.get(theirs, ())}
        points = [
            100 * (one["accuracy"] - accuracy[one["seed"]])
            for one in arms.get(ours, ())
            if one["seed"] in accuracy
        ]
        ratios = []
        for part in parts:
            one, other = (seconds(records, arm, part) for arm in (ours, theirs))
            shared = [one[seed] / other[seed] for seed in one if seed in other]
            ratios.append(spread(shared, ".2f", ddof=1))
        rows.append([f"{ours} against {theirs}", spread(points, "+.1f", ddof=1), *ratios])
    return rows


def agreement(records: Sequence[Record], arm: str = "gromo, 64 bits") -> list[float]:
    """Returns by how much the held-out losses of an arm differ from ours, growth by growth.

    The largest relative difference over trainings and amplitudes.
    """
    ours = {(one["rate"], one["seed"]): one for one in records if one["arm"] == "ours"}
    found: list[np.ndarray] = []
    for one in records:
        other = ours.get((one["rate"], one["seed"]), {})
        if one["arm"] == arm and "losses" in one and "losses" in other:
            # Ours are led by the loss before growth.
            pairs = zip(one["losses"], other["losses"], strict=True)
            found.append(np.array([np.abs(np.divide(a, b[1:]) - 1).max() for a, b in pairs]))
    return np.max(found, axis=0).tolist() if found else []


def notes(records: Sequence[Record]) -> list[str]:
    """Returns a line on agreement, and one for every failed training and every warning."""
    found = [
        f"{arm}: held-out losses differ from ours, growth by growth, by "
        + ", ".join(f"{one:.1e}" for one in agreement(records, arm))
        for arm in ("gromo, 64 bits", "gromo, 32 bits")
    ]
    for record in records:
        if "error" in record:
            where = f"{record['arm']}, rate {record['rate']:g}, seed {record['seed']}"
            found.append(f"failed: {where}: {record['error']}")
    return found + sorted({text for record in records for text in record.get("warnings", ())})
