"""Do networks that grow where they lack expressivity find a good architecture by themselves?

    python -m experiments.grow --workdir=runs/grow

Grows perceptrons, convolutional networks on graphs and ResNet-18 from tiny ones, by TINY with three
ways for the learning rate to follow, by GradMax and at random; trains the architecture that TINY
ended with from scratch for the same computation, and the large network. Writes config.json,
results.jsonl, table.md, figures and report.html, and prints the table. Killed and started again it
goes on, a network that grows from its last growth; the same --workdir takes more networks, arms and
seeds later. ResNet-18 at the paper's size: --dataset=cifar10 --network=resnet18_sixteenth
--images_downscale=1 --start_width=1 --large_width=64 --growths=6 --interval=2000 --steps=60000
--batch_size=128.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import flags

from experiments import grow_figures, grow_report, grow_study, transfer_study
from experiments.lab import common, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS

ranges.define_list(
    "network",
    ["mlp", "mlp_largest", "dag_cnn", "resnet18_sixteenth", "resnet18_quarter"],
    "Networks that grow.",
    ranges.name_of("network", grow_study.SPECS),
)
ranges.define_list(
    "arm",
    list(grow_study.ARMS),
    "Ways to grow, and what they are compared with.",
    ranges.name_of("arm", grow_study.ARMS),
)
define_data_flags("fashion_mnist")
ranges.define("batch_size", 64, "Examples an update.")
flags.DEFINE_bool("normalize", True, "Bring new neurons to the size of the others first.")
ranges.define("num_seeds", 3, "Seeds.")
ranges.define(
    "images_downscale", None, "Side of the squares averaged first; None: preset.", "downscale"
)
ranges.define("start_width", None, "Channels or neurons at the start; None: preset.", "width")
ranges.define("large_width", None, "The same of the large network; None: preset.", "width")
ranges.define("growths", None, "How many growths; None: preset.")
ranges.define("interval", None, "Updates before each growth; None: preset.", "steps")
ranges.define("steps", None, "Updates in all; None: preset.")
ranges.define_list("rate", None, "Learning rates; None: preset.", "rate")
flags.DEFINE_string("workdir", "runs/grow", "Folder for config, results and figures.")
runners.define_flags(workers=1)

NOT_SETTINGS = ("arm", "data_dir", "network", "num_seeds", "rate", "workdir")


def run() -> None:
    """Runs what is missing, prints and draws."""
    values = FLAGS.flags_by_module_dict()[sys.argv[0]]
    every = {flag.name: flag.value for flag in values}
    specs = grow_study.chosen_specs(FLAGS.network, FLAGS.arm, every)
    settings = {name: value for name, value in every.items() if name not in NOT_SETTINGS}
    trials = grow_study.all_trials(specs, FLAGS.arm, every)
    if not trials:
        raise ValueError(f"--arm={','.join(FLAGS.arm)} trains none of --network; add tiny")
    transfer_study.check_trials(
        trials, FLAGS.data_dir, "--images_downscale", held_out=grow_study.HELD_OUT
    )
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        partial = workdir.absolute() / "partial"  # a worker may be in another folder
        run_trial = functools.partial(grow_study.run, data_dir=FLAGS.data_dir, partial=partial)
        records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
        if "scratch" in FLAGS.arm:
            trials += grow_study.scratch_trials(records)
            records = run_study(trials, run_trial, workdir / "results.jsonl", **options)
    for record in records:
        if "error" in record:
            print(f"failed: {record['trial']}: {record['error']}", file=sys.stderr)
    _report(records, workdir)


def _report(records: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    arms = grow_report.arms(records)
    tables = {
        "Every way of growing at its best rate.": grow_report.table(arms),
        "TINY minus what it is compared with, by seed.": grow_report.against(arms),
        "What the rules for the rate change: with minus without.": grow_report.rescaling(arms),
        "Runs that failed, which are in no other table.": grow_report.failures(records),
    }
    text = "\n".join(common.markdown_table(rows) for rows in tables.values() if len(rows) > 1)
    files.write_text(workdir / "table.md", text)
    print(text)
    figures = {}
    for name, draw in grow_figures.FIGURES.items():
        path = workdir / f"{name}.png"
        if draw(arms, path):
            print(f"figure:  {path}")
            figures[path] = grow_figures.CAPTIONS[name]
    title = f"Growing networks on {FLAGS.dataset.partition('#')[0]}"
    report = page.write(workdir, title, __doc__, tables=tables, figures=figures)
    print(f"report:  {report}")
    print(f"results: {workdir / 'results.jsonl'}")


if __name__ == "__main__":
    common.run_binary(run)
