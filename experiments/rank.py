"""Do rankings of architectures survive when each is trained properly? Cells of NAS-Bench-201.

    python -m experiments.rank --data_dir=data/fashion_mnist --workdir=runs/rank

Samples cells and trains each under several recipes with several seeds: `fixed`, the benchmark's one
initialization and rate for all, and those whose initialization and rate follow from the cell:
`author_code`, `path_sum`, `measured`, and `mup`, which sees widths alone. First it searches the
rate of the base cells that the recipes scale from, and measures one update of every cell. Then it
says how accuracies, their order and their gaps change. Writes config.json, bases.jsonl,
measurements.jsonl, results.jsonl, figures, table.md and report.html, and prints the table. Killed
and started again it goes on. The defaults are the run of the docs; --preset=paper is the paper's.
"""

import collections
import functools
import pathlib
import sys
from typing import Any

from absl import flags

from archscale_jax._errors import unknown
from archscale_jax._spaces import cell_graph
from archscale_jax._spaces.cell import cell_digits, code_of_digits
from experiments import transfer_study
from experiments.lab import common, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study
from experiments.nasbench import (
    benchmark_tables,
    gains,
    rank_figures,
    rank_networks,
    rank_report,
    rank_study,
)
from experiments.nasbench.rank_recipes import RECIPES
from experiments.nasbench.rank_study import PRESETS

FLAGS = flags.FLAGS

flags.DEFINE_enum("preset", "small", list(PRESETS), "What is not said by a flag of its own.")
define_data_flags(None)
ranges.define("downscale", None, "Make images so many times smaller.")
ranges.define("channels", None, "C, channels of the first stage.", "width")
ranges.define("cells_per_stage", None, "N, cells in every stage.")
ranges.define("batch_size", None, "Examples an update.", "batch_size_of_two")
ranges.define("epochs", None, "Epochs; a fraction trains part of the last.")
flags.DEFINE_bool("flip", None, "Augmentation: mirror half of the images.")
ranges.define("padding", None, "Augmentation: shift by so many pixels.")
ranges.define("weight_decay", None, "Coupled weight decay.")
ranges.define("fixed_rate", None, "Learning rate of the recipe `fixed`.", "rate")
ranges.define("num_cells", None, "How many random cells, without isomorphic ones.")
ranges.define_list(
    "cell",
    [],
    "These cells, three at least, instead of random ones.",
    ranges.Checked(cell_graph, "a code such as 3_34_131"),
    least=0,
)
ranges.define_list(
    "recipe",
    list(RECIPES),
    "`fixed`, and those to compare with it.",
    ranges.name_of("recipe", RECIPES),
    least=2,
)
ranges.define("num_seeds", None, "Seeds of every cell and recipe.")
flags.DEFINE_string("table", None, "CSV of published accuracies to compare with; see docs/rank.md.")
flags.DEFINE_string("table_column", "cifar10_test", "Its column.")
flags.DEFINE_string("workdir", "runs/rank", "Folder for config, results and figures.")
runners.define_flags(workers=2)

NOT_SETTINGS = ("data_dir", "workdir", "table", "table_column")
EXTENSIBLE = ("cell", "num_cells", "num_seeds", "recipe")


def settings() -> dict[str, Any]:
    """Returns what decides what is computed: the preset, and the flags that were given."""
    values = {flag.name: flag.value for flag in FLAGS.flags_by_module_dict()[sys.argv[0]]}
    found = dict(PRESETS[FLAGS.preset])
    for name, value in values.items():
        if value is not None and name not in (*NOT_SETTINGS, "preset"):
            found[name] = value
    return found


def check(chosen: dict[str, Any]) -> None:
    """Checks what is chosen against the data set and what a ranking needs.

    Raises:
      FileNotFoundError: the data set is missing.
      ValueError: cells that are too few to have an order, no recipe `fixed`, or a size that the
        images or the examples are too small for.
    """
    if "fixed" not in chosen["recipe"]:
        raise ValueError(
            f"--recipe must name fixed, which others are compared with, found "
            f"{','.join(chosen['recipe'])}"
        )
    if 0 < len(chosen["cell"]) < gains.MIN_ARCHITECTURES:
        raise ValueError(
            f"--cell must name {gains.MIN_ARCHITECTURES} cells at least, as a ranking needs, found "
            f"{', '.join(chosen['cell'])}"
        )
    transfer_study.check_trials([chosen], FLAGS.data_dir, "--downscale")
    images = transfer_study.load(chosen["dataset"], FLAGS.data_dir, chosen["downscale"])
    common.check_padding(images, chosen["padding"])


def read_published() -> dict[str, float]:
    """Returns the published accuracy of every cell, by code, in percent.

    Raises:
      ValueError: a malformed table, or one without the column.
    """
    table = benchmark_tables.read_table(FLAGS.table)
    if FLAGS.table_column not in table.accuracies:
        column = unknown("column", FLAGS.table_column, table.accuracies)
        raise ValueError(f"{FLAGS.table}: {column}")
    codes = (code_of_digits(cell_digits(cell)) for cell in table.cells)
    column = table.accuracies[FLAGS.table_column].tolist()
    return dict(zip(codes, column, strict=True))


def report(
    records: list[dict[str, Any]], workdir: pathlib.Path, published: dict[str, float] | None
) -> None:
    """Prints what failed and the table, and draws the figures."""
    failed = [
        f"{count} runs of {recipe} failed: {error}"
        for (recipe, error), count in collections.Counter(
            (record["trial"]["recipe"], record["error"]) for record in records if "error" in record
        ).items()
    ]
    for line in failed:
        print(line, file=sys.stderr)
    accuracies, cells = rank_study.accuracies_of(records)
    ranking = rank_report.ranking_of(accuracies, cells, published=published)
    table = rank_report.table(ranking)
    text = common.markdown_table(table)
    files.write_text(workdir / "table.md", text)
    print(text)
    figures = {}
    for name, caption in rank_figures.CAPTIONS.items():
        path = workdir / f"{name}.png"
        getattr(rank_figures, f"draw_{name}")(ranking, path)
        print(f"figure: {path}")
        figures[path] = caption
    title = f"Ranking of {len(ranking.cells)} cells under {len(ranking.accuracies)} recipes"
    path = page.write(
        workdir,
        title,
        __doc__,
        remarks=failed,
        tables={"Accuracy, gain and Kendall's tau of every recipe, with 95 % intervals.": table},
        figures=figures,
    )
    print(f"report: {path}")


def run() -> None:
    """Searches, measures and trains what is missing, prints and draws."""
    chosen = settings()
    check(chosen)
    published = read_published() if FLAGS.table is not None else None
    plan = rank_study.plan_of(chosen, FLAGS.data_dir)

    def study(trials, function, name: str):
        run_trial = functools.partial(function, data_dir=FLAGS.data_dir)
        return run_study(trials, run_trial, workdir / f"{name}.jsonl", description=name, **options)

    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, chosen, extensible=EXTENSIBLE)
        bases = study(plan.searches, rank_networks.search_rate, "bases")
        found = study(plan.measurements, rank_networks.measure, "measurements")
        trials = rank_study.trials_of(plan, bases)
        train = functools.partial(rank_networks.train, measurements=rank_study.by_cell(found))
        records = study(trials, train, "results")
    report(records, workdir, published)


if __name__ == "__main__":
    common.run_binary(run)
