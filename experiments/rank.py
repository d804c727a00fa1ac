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

from archscale_jax import benchmark_tables, files
from archscale_jax.refusals import unknown
from archscale_jax.spaces.cell import cell_digits, code_of_digits
from archscale_jax.sweeps import run_study
from experiments import common, page, rank_figures, rank_networks, rank_report, rank_study, runners
from experiments.data_flags import define_data_flags
from experiments.rank_recipes import RECIPES
from experiments.rank_study import PRESETS

FLAGS = flags.FLAGS

flags.DEFINE_enum("preset", "small", list(PRESETS), "What is not said by a flag of its own.")
define_data_flags(None)
flags.DEFINE_integer("downscale", None, "Make images so many times smaller.", lower_bound=1)
flags.DEFINE_integer("channels", None, "C, channels of the first stage.", lower_bound=1)
flags.DEFINE_integer("cells_per_stage", None, "N, cells in every stage.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Examples an update.", lower_bound=2)
flags.DEFINE_float("epochs", None, "Epochs; a fraction trains part of the last.")
flags.DEFINE_bool("flip", None, "Augmentation: mirror half of the images.")
flags.DEFINE_integer("padding", None, "Augmentation: shift by so many pixels.", lower_bound=0)
flags.DEFINE_float("weight_decay", None, "Coupled weight decay.")
flags.DEFINE_float("fixed_rate", None, "Learning rate of the recipe `fixed`.")
flags.DEFINE_integer("num_cells", None, "How many random cells, without isomorphic ones.")
flags.DEFINE_list("cell", [], "These cells (codes such as 3_34_131) instead of random ones.")
flags.DEFINE_list("recipe", list(RECIPES), f"Of {', '.join(RECIPES)}; `fixed` is needed.")
flags.DEFINE_integer("num_seeds", None, "Seeds of every cell and recipe.", lower_bound=1)
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
    published = read_published() if FLAGS.table is not None else None
    plan = rank_study.plan_of(chosen, FLAGS.data_dir)
    workdir = common.claim_directory(FLAGS.workdir, chosen, extensible=EXTENSIBLE)

    def study(trials, function, name: str):
        run_trial = functools.partial(function, data_dir=FLAGS.data_dir)
        return run_study(trials, run_trial, workdir / f"{name}.jsonl", description=name, **options)

    with runners.runner() as options:
        bases = study(plan.searches, rank_networks.search_rate, "bases")
        found = study(plan.measurements, rank_networks.measure, "measurements")
        trials = rank_study.trials_of(plan, bases)
        train = functools.partial(rank_networks.train, measurements=rank_study.by_cell(found))
        records = study(trials, train, "results")
    report(records, workdir, published)


if __name__ == "__main__":
    common.run_binary(run)
