"""Does a rule give the learning rate of a network from that of a shallow one? [AAS Fig. 2, 3, 5, 7]

    python -m experiments.transfer --study=chains --workdir=runs/transfer

Searches the best rate of every network of the studies (the truth), measures every network at
initialization, and predicts its rate from that of the base network by every rule. Writes
config.json, results.jsonl (the searches), measurements.jsonl, sharpness.jsonl, table.md,
summary.json, a figure a study and report.html, and prints the table. Killed and started again it
runs what is missing; the same --workdir takes more studies later. At the paper's size:
--dataset=cifar10 --cnn_downscale=1 --cnn_width=128 --cnn_steps=0 --steps=0 (0 is one epoch).
"""

import functools
import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from experiments import transfer_report, transfer_study, transfer_summary
from experiments.lab import common, files, page, ranges, runners
from experiments.lab.data_flags import define_data_flags
from experiments.lab.sweeps import run_study, trial_hash

FLAGS = flags.FLAGS

ranges.define_list(
    "study",
    ["chains"],
    "Which networks; all takes every study.",
    ranges.name_of("study", ("all", *transfer_study.STUDIES)),
)
define_data_flags("digits")
ranges.define("width", 128, "Features of every vertex of an MLP.")
ranges.define("batch_size", 256, "Examples an update of an MLP.")
ranges.define("steps", 0, "Updates of a run of an MLP; 0 is one epoch.", "steps_or_0")
ranges.define("cnn_width", 8, "Channels of every vertex of a CNN.", "width")
ranges.define("cnn_batch_size", 64, "Examples an update of a CNN.", "batch_size")
ranges.define("cnn_steps", 100, "Updates of a run of a CNN; 0 is one epoch.", "steps_or_0")
ranges.define(
    "cnn_downscale", 2, "A CNN sees images averaged over squares of so many pixels.", "downscale"
)
ranges.define("num_seeds", 3, "Seeds of every search.")
ranges.define("max_networks", None, "Networks a study, its base included.")
flags.DEFINE_bool("sharpness", False, "Measure the sharpness too, which costs the most.")
flags.DEFINE_string("workdir", "runs/transfer", "Folder for config, results and figures.")
runners.define_flags(workers=2)

NOT_SETTINGS = ("data_dir", "max_networks", "sharpness", "study", "workdir")
"""Flags that do not change the result of a trial."""


def run() -> None:
    """Searches and measures what is missing, predicts, prints and draws."""
    values = FLAGS.flags_by_module_dict()[sys.argv[0]]
    settings = {flag.name: flag.value for flag in values if flag.name not in NOT_SETTINGS}
    names = list(transfer_study.STUDIES) if FLAGS.study == ["all"] else dict.fromkeys(FLAGS.study)
    studies = {
        name: transfer_study.trials_of(name, settings, FLAGS.data_dir)[: FLAGS.max_networks]
        for name in names
    }
    unique = {trial_hash(trial): trial for trials in studies.values() for trial in trials}
    functions = {
        "results": transfer_study.search_rate,
        "measurements": transfer_study.measure,
        "sharpness": transfer_study.measure_sharpness,
    }
    if not FLAGS.sharpness:
        del functions["sharpness"]
    records: dict[str, dict[str, Any]] = {"sharpness": {}}
    failed = []
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        for name, function in functions.items():
            found = run_study(
                list(unique.values()),
                functools.partial(function, data_dir=FLAGS.data_dir),
                workdir / f"{name}.jsonl",
                description=name,
                **options,
            )
            for record in found:
                if "error" in record:
                    failed.append(f"failed: {record['trial']}: {record['error']}")
                    print(failed[-1], file=sys.stderr)
            records[name] = {r["hash"]: r["result"] for r in found if "result" in r}
    _report(studies, records, failed, workdir)


def _report(studies, records, failed: list[str], workdir: pathlib.Path) -> None:
    summaries = []
    for name, trials in studies.items():
        rows = transfer_summary.rows(trials, records)
        found = transfer_summary.summarise(name, rows)
        summaries += found
        transfer_report.draw(name, rows, found, workdir / f"{name}.png")
    files.write_json(
        workdir / "summary.json", files.strict_json([one._asdict() for one in summaries])
    )
    spread = transfer_summary.spread_of_answers(list(records["results"].values()))
    markdown = transfer_report.markdown(summaries, spread)
    files.write_text(workdir / "table.md", markdown)
    report = page.write(
        workdir,
        f"Predicted learning rates on {FLAGS.dataset.partition('#')[0]}: {', '.join(studies)}",
        __doc__,
        remarks=[f"{spread[0].upper()}{spread[1:]}.", *failed],
        tables={
            "Correlation, RMS error in nats and excess loss by kind of rule.":
                transfer_report.overview(summaries),
            "Every rule, with 95 % intervals over networks.": transfer_report.whole(summaries),
        },
        figures={
            workdir / f"{name}.png": f"{name}: best rates by search against predicted ones."
            for name in studies
        },
    )  # fmt: skip
    console = Console()
    console.print(transfer_report.table(summaries), spread)
    for name in studies:
        console.print(f"figure:  {workdir / f'{name}.png'}", soft_wrap=True)
    console.print(f"report:  {report}", soft_wrap=True)
    console.print(f"results: {workdir / 'results.jsonl'}", soft_wrap=True)


if __name__ == "__main__":
    common.run_binary(run)
