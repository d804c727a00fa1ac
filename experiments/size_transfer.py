"""Does the rate of a small network serve larger ones? Residual networks and vision transformers.

    python -m experiments.size_transfer --study=resnet_depth,transformer_depth

Searches the best rate of networks of several depths or widths, under three parametrizations: as
Flax initializes them with one rate (`standard`), with this library's initialization and one rate
(`initialized`), and with per-parameter factors on top (`factors`). A parametrization transfers if
its best rate stays; for the first two, every rule predicts the rates from that of the smallest
network. Writes config.json, results.jsonl, measurements.jsonl, a figure, table.md and report.html,
and prints the table. Killed and started again it goes on. The defaults are the run of the docs.
"""

import functools
import sys

from absl import flags

from experiments import size_transfer_study
from experiments.lab import common, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study
from experiments.size_transfer_study import STUDIES

FLAGS = flags.FLAGS

ranges.define_list("study", list(STUDIES), "Which networks grow.", ranges.name_of("study", STUDIES))
define_data_flags("fashion_mnist")
ranges.define_list(
    "size",
    [],
    "Other widths or depths than those of the study; the first is the base.",
    "width",
    least=0,
)
ranges.define("batch_size", 64, "Examples an update.", "batch_size_of_two")
ranges.define("steps", 100, "Updates of a run.")
ranges.define("num_seeds", 3, "Seeds of every search.")
flags.DEFINE_string("workdir", "runs/size_transfer", "Folder for config, results and figure.")
runners.define_flags(workers=2)

NOT_SETTINGS = ("data_dir", "study", "workdir")


def run() -> None:
    """Searches and measures what is missing, predicts, prints and draws."""
    values = FLAGS.flags_by_module_dict()[sys.argv[0]]
    settings = {flag.name: flag.value for flag in values if flag.name not in NOT_SETTINGS}
    trials = size_transfer_study.all_trials(FLAGS.study, settings)
    size_transfer_study.check_trials(trials, FLAGS.data_dir)
    found: dict[str, size_transfer_study.Records] = {}
    functions = {
        "results": size_transfer_study.search_rate,
        "measurements": size_transfer_study.measure,
    }
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        for name, function in functions.items():
            records = run_study(
                trials,
                functools.partial(function, data_dir=FLAGS.data_dir),
                workdir / f"{name}.jsonl",
                description=name,
                **options,
            )
            runners.check_finished(records, workdir / f"{name}.jsonl")
            found[name] = {record["hash"]: record["result"] for record in records}
    groups = size_transfer_study.grouped(trials, found)
    table = size_transfer_study.table(groups)
    text = common.markdown_table(table)
    files.write_text(workdir / "table.md", text)
    print(text)
    figure = workdir / "size_transfer.png"
    size_transfer_study.draw(groups, figure)
    report = page.write(
        workdir,
        f"Learning rates of growing networks on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        tables={"How far the rates of each rule miss (nats), and what that costs.": table},
        figures={figure: "Best rates against size, with the prediction of every rule (dashed)."},
    )
    print(f"figure: {figure}\nreport: {report}")


if __name__ == "__main__":
    common.run_binary(run)
