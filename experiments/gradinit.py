"""Does learning the scale of every tensor before training help? GradInit against analytic rules.

    python -m experiments.gradinit --workdir=runs/gradinit

Draws every network by two initializations, learns multipliers on each, measures, and trains over a
range of learning rates without warm-up. Writes config.json, results.jsonl, multipliers.json,
table.md, figures and report.html, and prints the table. Killed and started again it runs what is
missing; the same --workdir takes more networks later. At the paper's size: --dataset=cifar10
--network=plain_19,plain_19_norm,residual_54,residual_54_norm --images_downscale=1 --images_width=64
--batch_size=128 --gradinit_steps=390 --steps=78000.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import flags

from experiments import gradinit_figures, gradinit_report, gradinit_study
from experiments.lab import common, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS

ranges.define_list(
    "network",
    [
        *("plain_6", "plain_12", "plain_24", "plain_12_norm"),
        *("residual_3", "residual_9", "residual_18", "residual_9_norm"),
        *("dag_1", "dag_5"),
        *("transformer_2", "transformer_6", "transformer_12"),
    ],
    f"FAMILY_DEPTH, or FAMILY_DEPTH_norm, of {', '.join(gradinit_study.NETWORKS)}.",
    ranges.Checked(gradinit_study.parse_name, "FAMILY_DEPTH"),
)
define_data_flags("fashion_mnist")
ranges.define("images_width", 8, "Channels of a convolution's first stage.", "width")
ranges.define("images_downscale", 2, "Side of the squares averaged first.", "downscale")
ranges.define("patches_width", 32, "Features of a transformer.", "width")
ranges.define("patches_downscale", 1, "The same for a transformer.", "downscale")
ranges.define("batch_size", 32, "Examples an update, even.", "batch_size_of_two")
ranges.define("steps", 250, "Updates of a training run.")
ranges.define("test_examples", 4000, "Test examples of the accuracy.")
ranges.define("gradinit_steps", 120, "Iterations of GradInit.", "steps")
ranges.define("scale_rate", 0.03, "Learning rate of the multipliers.", "rate")
ranges.define("sgd_rate", 0.1, "GradInit's step for SGD.", "rate")
ranges.define("sgd_norm", 1.0, "GradInit's largest gradient norm for SGD, L2.", "norm")
ranges.define("adam_rate", 1e-3, "GradInit's step for Adam.", "rate")
ranges.define("adam_norm", 1000.0, "GradInit's largest gradient norm for Adam, L1.", "norm")
ranges.define("penalty", 10.0, "Weight of the variant with a penalty.")
ranges.define("num_seeds", 3, "Seeds.")
flags.DEFINE_string("workdir", "runs/gradinit", "Folder for config, results and figures.")
runners.define_flags(workers=1)

NOT_SETTINGS = ("data_dir", "network", "num_seeds", "workdir")


def run() -> None:
    """Runs what is missing, prints and draws."""
    values = FLAGS.flags_by_module_dict()[sys.argv[0]]
    every = {flag.name: flag.value for flag in values}
    trials = gradinit_study.all_trials(FLAGS.network, every)
    gradinit_study.check_trials(trials, FLAGS.data_dir)
    settings = {name: value for name, value in every.items() if name not in NOT_SETTINGS}
    run_trial = functools.partial(gradinit_study.run, data_dir=FLAGS.data_dir)
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
    for record in records:
        if "error" in record:
            print(f"failed: {record['trial']}: {record['error']}", file=sys.stderr)
    _report(records, workdir)


def _report(records: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    learned = {
        record["hash"]: {
            **{key: record["trial"][key] for key in ("network", "start", "learned", "seed")},
            "multipliers": record["result"]["record"]["multipliers"],
        }
        for record in records
        if "record" in record.get("result", {})
    }
    files.write_json(workdir / "multipliers.json", learned)
    every = gradinit_report.arms(records)
    tables = {
        "Each network at its best rate: mean and deviation over seeds.":
            gradinit_report.table(every),
        "What learning the scales changes, seed by seed.": gradinit_report.gains(every),
    }  # fmt: skip
    text = "\n".join(common.markdown_table(lines) for lines in tables.values())
    files.write_text(workdir / "table.md", text)
    print(text)
    figures = gradinit_figures.FIGURES if gradinit_figures.has_networks(every) else {}
    for name, draw in figures.items():
        draw(every, workdir / f"{name}.png")
        print(f"figure:  {workdir / f'{name}.png'}")
    report = page.write(
        workdir,
        f"GradInit on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        remarks=[f"failed: {one['trial']}: {one['error']}" for one in records if "error" in one],
        tables=tables,
        figures={workdir / f"{name}.png": gradinit_figures.CAPTIONS[name] for name in figures},
    )
    print(f"report:  {report}")
    print(f"results: {workdir / 'results.jsonl'}")


if __name__ == "__main__":
    common.run_binary(run)
