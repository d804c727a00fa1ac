"""Table and figure of `experiments.scaling`."""

import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jraph
from rich import box
from rich.table import Table

import archscale_jax as archscale
from experiments.lab import common
from experiments.lab.panels import save

Row = dict[str, Any]


def summarise(
    networks: dict[str, str],
    parse: Callable[[str], jraph.GraphsTuple],
    rules: list[str],
    records: list[Row],
    guessing: float,
) -> list[Row]:
    """Returns one row per network: its graph, and per rule the factor and means over seeds.

    `guessing` is the loss of guessing, at which `overview` counts a seed that diverged.
    """
    rows = []
    for name, text in networks.items():
        statistics_ = archscale.path_statistics(parse(text))
        row: Row = {
            "name": name,
            "architecture": text,
            "paths": statistics_.count,
            "depth_cubed_sum": statistics_.depth_cubed_sum,
            "max_depth": statistics_.max_depth,
        }
        for rule in rules:
            trials = [r for r in records if r["architecture"] == text and r["rule"] == rule]
            finished = [r for r in trials if not r["diverged"]]
            row[rule] = {
                "factor": trials[0]["rate"] / trials[0]["base_rate"],
                "diverged": len(trials) - len(finished),
                "seeds": len(trials),
                **{key: _mean(finished, key) for key in ("train_loss", "test_accuracy")},
                "train_losses": [r["train_loss"] for r in finished],
                "counted_loss": statistics.fmean(
                    guessing if r["diverged"] else r["train_loss"] for r in trials
                ),
            }
        rows.append(row)
    return rows


def _mean(records: list[Row], key: str) -> float | None:
    return statistics.fmean(r[key] for r in records) if records else None


def _columns(rules: list[str]) -> list[str]:
    columns = ["network", "paths", "Σ L³"]
    for rule in rules:
        if rule != "none":
            columns.append(f"{_label(rule)} factor")
        columns += [f"{_label(rule)} loss", f"{_label(rule)} acc."]
    return columns


def _cells(row: Row, rules: list[str]) -> list[str]:
    cells = [row["name"], str(row["paths"]), str(row["depth_cubed_sum"])]
    for rule in rules:
        one = row[rule]
        if rule != "none":
            cells.append(f"{one['factor']:.3f}")
        diverged = f"{one['diverged']}†" if one["diverged"] else ""
        cells += [diverged + _number(one["train_loss"]), _number(one["test_accuracy"])]
    return cells


def _label(rule: str) -> str:
    return "unscaled" if rule == "none" else rule


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def caption(rows: list[Row], rules: list[str]) -> str:
    """Says what the numbers of a network are."""
    seeds = max(row[rule]["seeds"] for row in rows for rule in rules)
    return f"means over {seeds} seeds; n†: n of them diverged and are left out; {STRINGS}"


def table(rows: list[Row], rules: list[str], title: str) -> Table:
    """Returns the table for a terminal: training loss (nats), test accuracy, factor."""
    result = Table(
        title=title, caption=caption(rows, rules), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(_columns(rules)):
        result.add_column(column.replace(" ", "\n", 1) if index > 2 else column, no_wrap=True,
                          justify="right" if index else "left")  # fmt: skip
    for row in rows:
        result.add_row(*_cells(row, rules))
    return result


def overview(rows: list[Row], rules: list[str]) -> list[list[str]]:
    """Returns one line per rule, after a heading: what it gained over all networks.

    A seed that diverged counts with the loss of guessing.
    """
    lines = [["rule", "diverged", "mean loss", "best on", "better than unscaled on"]]
    for rule in rules:
        losses = [row[rule]["counted_loss"] for row in rows]
        best = [min(row[other]["counted_loss"] for other in rules) for row in rows]
        unscaled = [row["none"]["counted_loss"] if "none" in rules else None for row in rows]
        pairs = list(zip(losses, unscaled, strict=True))
        better = sum(other is not None and loss < other for loss, other in pairs)
        lines.append(
            [
                _label(rule),
                f"{sum(row[rule]['diverged'] for row in rows)} of "
                f"{sum(row[rule]['seeds'] for row in rows)}",
                _number(statistics.fmean(losses)),
                f"{sum(loss == least for loss, least in zip(losses, best, strict=True))}",
                "–" if rule == "none" or "none" not in rules else f"{better} of {len(rows)}",
            ]
        )
    return lines


OVERVIEW = "over all networks; a seed that diverged counts with the loss of guessing"
STRINGS = "group k of a DAG string lists the edges into vertex k: 0 none, 1 skip, 2 weights"


def answer(rows: list[Row], rules: list[str]) -> list[str]:
    """Returns a sentence a rule: what it saves, and what it gains where nothing needs saving."""
    if "none" not in rules:
        return []
    alive = [row for row in rows if not row["none"]["diverged"]]
    runs = sum(row["none"]["seeds"] for row in rows)
    lost = {rule: sum(row[rule]["diverged"] for row in rows) for rule in rules}
    sentences = []
    for rule in rules:
        if rule != "none":
            better = sum(row[rule]["counted_loss"] < row["none"]["counted_loss"] for row in alive)
            sentences.append(
                f"Unscaled, {lost['none']} of {runs} runs diverged; by {rule}, {lost[rule]}. Where "
                f"no unscaled run did, {rule} was better on {better} of {len(alive)} networks."
            )
    return sentences


def overview_table(rows: list[Row], rules: list[str]) -> Table:
    """Returns `overview` for a terminal."""
    heading, *lines = overview(rows, rules)
    result = Table(caption=OVERVIEW, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(heading):
        result.add_column(column, justify="right" if index else "left")
    for line in lines:
        result.add_row(*line)
    return result


def markdown(rows: list[Row], rules: list[str], title: str) -> str:
    """Returns both tables as Markdown."""
    tables = (overview(rows, rules), by_network(rows, rules))
    between = f"\n{title}; {caption(rows, rules)}.\n\n"
    return between.join(map(common.markdown_table, tables))


def by_network(rows: list[Row], rules: list[str]) -> list[list[str]]:
    """Returns one line per network, after a heading."""
    return [_columns(rules), *(_cells(row, rules) for row in rows)]


_COLOURS = ["#777777", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]  # Okabe and Ito
_MARKERS = ["o", "s", "^", "D", "v", "P"]


def draw(rows: list[Row], rules: list[str], title: str, path: pathlib.Path) -> None:
    """Draws training loss of every network under every rule, one dot a seed; atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 0.42 * len(rows) + 2.5), 4.8), layout="constrained")
    axes = figure.add_subplot()
    losses = [loss for row in rows for rule in rules for loss in row[rule]["train_losses"]]
    top = 1.5 * max(losses, default=1.0)
    for index, rule in enumerate(rules):
        shift = 0.7 * (index - (len(rules) - 1) / 2) / len(rules)
        colour = _COLOURS[index % len(_COLOURS)]
        points = [
            (position + shift, loss)
            for position, row in enumerate(rows)
            for loss in row[rule]["train_losses"]
        ]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.scatter(*zip(*points, strict=True) if points else ([], []), s=18, alpha=0.8,
                     color=colour, marker=marker, linewidths=0, label=_label(rule))  # fmt: skip
        for position, row in enumerate(rows):
            if row[rule]["diverged"]:
                text = f"{row[rule]['diverged']}×"
                axes.text(position + shift, top, text, color=colour, fontsize=8, ha="center")
    for position in range(1, len(rows)):
        axes.axvline(position - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(None if losses else top / 10, top * 1.4)  # without a loss there is no scale
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8)  # fmt: skip
    axes.set_ylabel("training loss (nats)")
    axes.set_title(f"{title}\none mark a seed; n× in the top row: seeds that diverged", fontsize=10)
    axes.grid(axis="y", which="major", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save(figure, path, dpi=150)
