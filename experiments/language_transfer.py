"""Do learning rate and weight decay of a small language model serve one that is deeper and wider?

    python -m experiments.language_transfer --workdir=runs/language_transfer

Both are searched at the base, `--base_depth` × `--base_width`, and used under several methods at
larger sizes, see METHODS and SIZES in experiments.language_study. There the rate is searched at the
transferred decay, and the decay at the transferred rate, by factors of 2: how far the best ones lie
from the transferred, and what those give up. With --sizes=target,twice,four it fits laws over size.
Writes results.jsonl (a line a training), language.csv, a figure, table.md and report.html. Killed
and started again it goes on; with --only_finished it shows what there is. Other flags are those of
experiments.language.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from absl import flags

from experiments import language, language_scaling, language_study
from experiments.lab import common, page, panels, runners
from experiments.lab.tables import NONE, number
from experiments.language_study import (
    DECAY,
    DECAYS,
    GROWN,
    METHODS,
    RATE,
    RATES,
    SIZES,
    Losses,
    Point,
    Study,
    common_seeds,
    lowest_of,
    shift,
)

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(language)
flags.adopt_module_key_flags(language_study)

SEARCHED = (
    *language.LISTS,
    "parametrization",
    "adam_rate_ratio",
    "base_batch_size",
    "base_steps",
    "cost_only",
)
"""Flags of `language` that say what the study decides."""
TARGET = {"depth": 8, "width": 128}


def run() -> None:
    """Searches what is missing, prints and draws."""
    if given := [name for name in SEARCHED if FLAGS[name].present]:
        raise ValueError(f"--{given[0]} has no effect here: this study sets it itself, see --help")
    settings = language.resolved(**TARGET)
    del settings["parametrization"], settings["base_batch_size"], settings["base_steps"]
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        study = Study(settings, workdir / "results.jsonl", options)
        if not study.run():
            print("not finished; what is shown is of the trainings that are")
    study.frame().to_csv(workdir / "language.csv", index=False, float_format="%.6g")
    figure = workdir / "language_transfer.png"
    draw(study, figure)
    measured, laws = size_tables(study)
    page.publish(
        workdir,
        f"{language.title(settings)}, tuned at {settings['base_depth']} × {settings['base_width']}",
        __doc__,
        remarks=answer(study),
        tables={
            "Best rate and decay at the base, by search.": base_table(study),
            "At other sizes: the loss at the base's values; how many nats the best rate or decay "
            "lies beside the base's, the other kept; its loss, and what the base's value gives up "
            "(± standard error over seeds, of percentages seed by seed).": target_table(study),
            "Over size: where the best rate lies, and what one nat beside it costs.": measured,
            "Laws over parameters N: the best rate N^b and the nats that it leaves, what a nat "
            "costs N^κ and the logarithms that it leaves, and the lowest loss E + A·N^(-a).": laws,
        },
        figures={figure: "Held-out loss over the learning rate in units of the base's best."},
    )


# What they say.


class Found(NamedTuple):
    """What a line of points says.

    Attributes:
      drift: nats from the start to the best point, by a parabola through three, one a seed.
      best: the lowest mean loss's point.
      cost: what one nat beside the best costs by the same parabola, over the loss, one a seed.
    """

    drift: np.ndarray
    best: Point
    cost: np.ndarray


def vertex(losses: Losses, start: Point, direction: Point) -> Found | None:
    """Finds the best point of a line; None where its neighbours were not measured.

    Of points with the most seeds, if the best of these has both neighbours; else of more points.
    """
    steps = line_of(losses, start, direction)
    for seeds in sorted({len(one) for one in steps.values()}, reverse=True):
        shared = {step: one[:seeds] for step, one in steps.items() if len(one) >= seeds}
        best = lowest_of(shared)
        if {best - 1, best + 1} <= shared.keys():
            break
    else:
        return None
    low, middle, high = (np.array(shared[best + one]) for one in (-1, 0, 1))
    with np.errstate(invalid="ignore"):
        bend = low - 2 * middle + high
        moved = (low - high) / (2 * bend)
    moved = np.where(np.isfinite(moved), np.clip(moved, -1, 1), 0.0)
    cost = bend / (2 * math.log(2) ** 2 * middle)
    return Found((best + moved) * math.log(2), shift(start, direction, best), cost)


def error(values: Iterable[float]) -> float:
    """Standard error of a mean."""
    values = np.asarray(list(values))
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def drift(study: Study, method: str, size: str, direction: Point) -> tuple[float, float]:
    """Returns the nats from the base's best value to the target's, and the standard error."""
    base = METHODS[method].base
    start = study.best[base]
    ends = [
        vertex(study.losses.get(key, {}), start, direction)
        for key in ((method, size), (base, "base"))
    ]
    if direction not in (RATES, DECAYS):  # along which the base was not searched
        ends[1] = vertex(study.losses[base, "base"], start, RATES)
    if ends[0] is None or ends[1] is None:
        return math.nan, math.nan
    target, origin = (one.drift for one in ends if one is not None)
    return float(target.mean() - origin.mean()), math.hypot(error(target), error(origin))


def answer(study: Study) -> list[str]:
    """Returns a sentence for plan and standard: whether the base's best rate serves a larger size.

    That is the first of `SIZES` at which the rate was searched, the target where it was.
    """
    lines = []
    for method in ("plan", "standard"):
        start = study.best[method]
        sizes = (
            (size, line)
            for size in SIZES
            if len(line := line_of(study.losses.get((method, size), {}), start, RATES)) > 1
            and 0 in line
        )
        label = METHODS[method].label
        if (found := next(sizes, None)) is None:
            lines.append(f"Under {label} no rate was searched at another size than the base.")
            continue
        size, line = found
        base, target = (
            f"{one['depth']} × {one['width']}"
            for one in (study.trial(method, of, start, 0) for of in ("base", size))
        )
        what = target if base != target else SIZES[size]
        nats, margin = drift(study, method, size, RATES)
        gives_up = f"gives up {_percent(line[0], line[lowest_of(line)])} % of loss"
        if math.isinf(max(line[0])):
            gives_up = "diverges"
        if math.isnan(nats):
            lines.append(
                f"Under {label} the best rate at {what} is not known, as trainings beside it are "
                f"missing; that of {base} {gives_up} beside those that are there."
            )
            continue
        lines.append(
            f"Under {label} the rate that is best for {base} {gives_up} at {what}, whose best lies "
            f"{_plus_minus(nats, margin)} nats from it."
        )
        if math.isnan(margin):
            lines.append("One seed: how far these numbers scatter is not known.")
    return lines


def base_table(study: Study) -> pd.DataFrame:
    rows = []
    for method, best in study.best.items():
        losses = study.losses[method, "base"][best]
        rows.append(
            {
                "base": METHODS[method].label,
                "rate": f"{RATE * 2.0 ** best[0]:.4g}",
                "decay": f"{DECAY * 2.0 ** best[1]:.4g}",
                "loss": _mean(losses, ".4f"),
                "points": str(len(study.losses[method, "base"])),
            }
        )
    return pd.DataFrame(rows)


def target_table(study: Study) -> pd.DataFrame:
    """Returns a row for every method, size and direction of search."""
    rows = []
    for size, described in SIZES.items():
        for method, of in METHODS.items():
            losses = study.losses.get((method, size), {})
            start = study.best[of.base]
            if start not in losses:
                continue
            lines = {
                name: line
                for name, direction in (("rate", of.direction), ("decay", DECAYS))
                if len(line := line_of(losses, start, direction)) > 1
            }
            for name, line in (lines or {NONE: {0: losses[start]}}).items():
                direction = DECAYS if name == "decay" else of.direction
                row = {"method": of.label, "size": described, "searched": name}
                row |= {"transferred": _mean(losses[start], ".4f")}
                ours = study.losses.get(("plan", size), {}).get(study.best["plan"])
                row |= {"over parametrize, %": _percent(losses[start], ours)}
                best = line[lowest_of(line)]
                found = [_plus_minus(*drift(study, method, size, direction)), _mean(best, ".4f"),
                         _percent(losses[start], best)]  # fmt: skip
                names = ("best: nats", "its loss", "given up, %")
                rows.append(
                    row | dict(zip(names, found if name in lines else NOTHING, strict=True))
                )
    return pd.DataFrame(rows)


def size_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns what was found at base, sizes between and target, and the laws that fit it."""
    rows, laws = [], []
    lowest: dict[str, dict[int, Sequence[float]]] = {}
    for method in ("plan", "standard"):
        start = study.best[method]
        found: dict[int, Found] = {}
        for size in ("base", *GROWN, "target"):
            losses = study.losses.get((method, size), {})
            if (bottom := vertex(losses, start, RATES)) is None:
                continue
            trial = study.trial(method, size, start, 0)
            count = language.parameters(trial)
            found[count] = bottom
            lowest.setdefault(method, {})[count] = best = losses[bottom.best]
            ours = lowest.get("plan", {}).get(count)
            rows.append(
                {"method": METHODS[method].label, "size": f"{trial['depth']} × {trial['width']}"}
                | {"parameters": f"{count:.3g}"}
                | {"best: nats": _mean(bottom.drift, ".2f")}
                | {"a nat costs, %": _mean(100 * bottom.cost, ".1f")}
                | {"loss at the base's values": _mean(losses[start], ".3f")}
                | {"lowest": _mean(best, ".3f"), "over parametrize, %": _percent(best, ours)}
            )
        if len(found) > 2:
            laws.append({"method": METHODS[method].label} | _laws(found, lowest[method]))
    return pd.DataFrame(rows), pd.DataFrame(laws).fillna(NONE)


def _laws(found: Mapping[int, Found], lowest: Mapping[int, Sequence[float]]) -> dict[str, str]:
    """Returns the laws over parameters of best rates, of what a nat costs, of lowest losses."""
    seeds = min(len(one.drift) for one in found.values())
    drifts = np.stack([one.drift[:seeds] for one in found.values()])
    rate = language_scaling.power_law(list(found), drifts)
    costs = np.array([[one.cost.mean()] for one in found.values()])
    cost = language_scaling.power_law(list(found), np.log(costs))
    row = {"b": _mean(rate.exponent, ".2f"), "left, nats": f"{rate.residual:.2f}"}
    row |= {"κ": f"{cost.exponent.item():.2f}", "left": f"{cost.residual:.2f}"}
    law = language_scaling.saturation(list(lowest), [np.mean(one) for one in lowest.values()])
    if law is not None:
        row |= {"E": f"{law.limit:.2f}", "a": f"{law.exponent:.2f}"}
        row |= {"left, nats of loss": f"{law.residual:.3f}"}
    return row


NOTHING = (NONE,) * 3
"""Where a method was not searched."""


def line_of(losses: Losses, start: Point, direction: Point) -> dict[int, list[float]]:
    """Returns the losses of a line by steps from its start."""
    points = {step: shift(start, direction, step) for step in range(-9, 10)}
    return {step: losses[point] for step, point in points.items() if point in losses}


def _percent(losses: Sequence[float], others: Sequence[float] | None) -> str:
    """By how much losses exceed others, seed by seed, with the standard error."""
    if others is None:
        return NONE
    one, other = common_seeds({0: losses, 1: others}).values()
    excess = 100 * (one / other - 1)
    return _plus_minus(excess.mean(), error(excess))


def _mean(values: npt.ArrayLike, spec: str) -> str:
    values = np.asarray(values, float)
    return _plus_minus(values.mean(), error(values), spec)


def _plus_minus(value: Any, margin: float, spec: str = ".2f") -> str:
    shown = number(float(value), spec)
    return shown if not math.isfinite(margin) else f"{shown} ± {margin:{spec}}"


def draw(study: Study, path: pathlib.Path) -> None:
    """Draws losses over the rate from base to target, standard beside ours, on shared axes."""
    titles = {"standard": "optax.adamw", "plan": "archscale.parametrize"}
    figure, drawn = panels.create_panels(2, 3.0, width=3.4, columns=2, sharex=True, sharey=True)
    for panel, (method, title) in zip(drawn, titles.items(), strict=True):
        panel.set_title(title, fontsize=9)
        panel.axvline(1.0, color=panels.GREY, lw=1, ls=":", label="the base's best")
        if method not in study.best:
            continue
        start = study.best[method]
        sizes = [one for one in ("base", *GROWN, "target") if (method, one) in study.losses]
        for size, colour in zip(sizes, panels.COLOURS, strict=False):
            trial = study.trial(method, size, start, 0)
            steps = common_seeds(line_of(study.losses[method, size], start, RATES))
            values = steps.values()
            across = [2.0**one for one in steps]
            panel.plot(across, [np.mean(one) for one in values], "o-", ms=4, lw=1.4, color=colour,
                       label=f"{trial['depth']} blocks, width {trial['width']}")  # fmt: skip
            for x, one in zip(across, values, strict=True):
                panel.plot([x] * len(one), one, ".", ms=3, color=colour, alpha=0.5)
        panel.set_xscale("log", base=2)
    panels.finish(
        figure,
        path,
        across="learning rate over the base's best",
        up="held-out loss (nats a byte)",
        columns=3,
    )


if __name__ == "__main__":
    FLAGS.set_default("workdir", "runs/language_transfer")
    common.run_binary(run)
