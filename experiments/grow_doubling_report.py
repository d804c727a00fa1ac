"""What the trainings of `experiments.grow_doubling` say: tables and the figure."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.grow_methods import METHODS, OPERATORS, SHOWN, TASKS
from experiments.lab import panels
from experiments.lab.tables import NONE, number

FAMILIES = {
    "grow_doubling": tuple(name for name, task in TASKS.items() if not task.stream),
    "grow_operators": tuple(name for name, task in TASKS.items() if task.stream),
}
"""Tasks by the figure that shows them."""


def shown(task: str) -> tuple[str, ...]:
    """Returns the methods of a task in the figure."""
    return ("scratch", *OPERATORS[:3]) if TASKS[task].stream else SHOWN


def of_method(frame: pd.DataFrame, task: str, method: str) -> pd.DataFrame:
    """The trainings of a method; of trainings from scratch those of several lengths."""
    found = frame[(frame.task == task) & (frame.method == method)]
    return found[~found.searched] if method == "scratch" else found


def saved(scratch: pd.DataFrame, operations: float, loss: float) -> float:
    """Returns the part of operations that is saved over a training from scratch to a loss.

    Between lengths of that, and beyond the longest and the shortest, log loss is a line in log
    operations.
    """
    curve = scratch.sort_values("operations")
    across, up = np.log(curve.operations.to_numpy()), np.log(curve.held_out.to_numpy())
    target = math.log(loss)
    place = int(np.clip(np.sum(up > target) - 1, 0, len(up) - 2))
    slope = (across[place + 1] - across[place]) / (up[place + 1] - up[place])
    return 1 - operations / math.exp(across[place] + slope * (target - up[place]))


def savings(scratch: pd.DataFrame, found: pd.DataFrame) -> list[float]:
    """Returns what trainings save, in percent; of seeds without a curve from scratch nothing."""
    return [
        100 * saved(scratch[scratch.seed == one.seed], one.operations, one.held_out)
        for one in found.itertuples()
        if (scratch.seed == one.seed).sum() > 1
    ]


def table(frame: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Returns a row for every task and method, and every number of updates from scratch."""
    rows = []
    for task, of in TASKS.items():
        scratch = of_method(frame, task, "scratch")
        for method, described in METHODS.items():
            found = of_method(frame, task, method)
            ends = [one for _, one in found.groupby("updates")] if len(found) else []
            for ended in ends:
                shown = [
                    of.label,
                    described.label,
                    f"{ended.updates.iloc[0]:g}",
                    _mean(ended.held_out, ".4f"),
                    _mean(100 * ended.accuracy, ".2f"),
                    number(ended.operations.mean() / usual(frame, task, steps)),
                ]
                found = savings(scratch, ended) if described.path else []
                shown.append(_mean(found, ".1f") if found else NONE)
                rows.append([*shown, _mean(100 * ended.rise, ".2f")])
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = ["task", "method", "updates", "loss", "accuracy, %", "operations", "saved, %", "rise, %"]


def _mean(values: Any, spec: str) -> str:
    values = np.asarray(values, float)
    shown = number(float(values.mean()), spec)
    if len(values) < 2 or not np.isfinite(values).all():
        return shown
    return f"{shown} ± {values.std(ddof=1) / math.sqrt(len(values)):{spec}}"


def usual(frame: pd.DataFrame, task: str, steps: int) -> float:
    """Returns the operations of the usual training from scratch."""
    scratch = of_method(frame, task, "scratch")
    return scratch[scratch.updates == TASKS[task].length * steps].operations.mean()


def operators(frame: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Returns a row for every method of OPERATORS: what it costs, saves, and does to the loss."""
    rows = []
    for task in FAMILIES["grow_operators"]:
        scratch = of_method(frame, task, "scratch")
        copies = of_method(frame, task, "copies").set_index("seed")
        for method in OPERATORS:
            found = of_method(frame, task, method)
            if not len(found) or not len(scratch):
                continue
            free = found.assign(operations=found.operations - found.growing)
            paired = found.set_index("seed")[["held_out", "later"]]
            paired = paired - copies[["held_out", "later"]].reindex(paired.index)
            rows.append(
                [
                    TASKS[task].label,
                    METHODS[method].label,
                    str(len(found)),
                    number(found.operations.mean() / usual(frame, task, steps)),
                    f"{100 * (found.growing / found.operations).mean():.1f}",
                    _mean(found.held_out, ".4f"),
                    _mean(paired.held_out, ".4f"),
                    _mean(savings(scratch, found), ".1f"),
                    _mean(savings(scratch, free), ".1f"),
                    _mean(found.after - found.before, ".4f"),
                    _mean(found.later - found.before, ".4f"),
                    _mean(paired.later, ".4f"),
                ]
            )
    return pd.DataFrame(rows, columns=OPERATOR_COLUMNS)


OPERATOR_COLUMNS = ["task", "hidden neurons", "seeds", "operations", "growing, %", "loss",
                    "less copies", "saved, %", "growing free, %", "right after", "100 later",
                    "100 later, less copies"]  # fmt: skip


def draw(frame: pd.DataFrame, steps: int, tasks: Sequence[str], path: pathlib.Path) -> None:
    """Draws held-out loss over operations, a panel a task of those that were trained."""
    tasks = [task for task in tasks if len(frame) and len(of_method(frame, task, "scratch"))]
    figure, drawn = panels.create_panels(max(len(tasks), 1), 3.2, width=3.4, columns=3)
    for panel, task in zip(drawn, tasks, strict=False):
        panel.set_title(TASKS[task].label, fontsize=9)
        whole = usual(frame, task, steps)
        for name, colour, marker in zip(shown(task), panels.COLOURS, ".os^Dv", strict=False):
            found, label = of_method(frame, task, name), METHODS[name].label
            if name != "scratch":
                panel.plot(found.operations / whole, found.held_out, marker, ms=5, mfc="none",
                           color=colour, label=label)  # fmt: skip
            for _, one in found.groupby("seed") if name == "scratch" else ():
                one = one.sort_values("operations")
                panel.plot(one.operations / whole, one.held_out, ".-", lw=1, ms=4, color=colour,
                           label=label)  # fmt: skip
    across = "operations over those of the usual training from scratch"
    panels.finish(figure, path, across=across, up="held-out loss (nats)",
                  columns=min(len(tasks) + 1, 3))  # fmt: skip
