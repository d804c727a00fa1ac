"""Where is a network best measured: on how many examples, and before or after some training?

    python -m experiments.measure_when --truth=runs/transfer --study=chains,dags

Takes the best rates that `experiments.transfer` has searched and measures the same networks again:
with the gradient of one example and of more, and after some updates at the rate that measuring at
initialization predicts. Features are always those of one batch. Writes config.json (that of the
truth), measurements.jsonl, table.md and report.html, and prints the table. Killed and started again
it measures what is missing.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from experiments import transfer_study, transfer_summary
from experiments.lab import common, files, page, ranges, runners, training
from experiments.lab.sweeps import run_study, trial_hash

FLAGS = flags.FLAGS

flags.DEFINE_string("truth", "runs/transfer", "Folder of a finished `experiments.transfer`.")
ranges.define_list(
    "study",
    ["chains", "dags"],
    "Studies that it holds.",
    ranges.name_of("study", transfer_study.STUDIES),
)
flags.DEFINE_string("data_dir", None, "Folder of the data set; see `make data`.")
ranges.define("max_networks", None, "Networks a study, its base included.", "max_networks_of_four")
flags.DEFINE_string("workdir", "runs/measure_when", "Folder for measurements and the table.")
runners.define_flags(workers=2)

EXAMPLES = (1, 16, 256, 2048)
"""Examples of the gradient."""
CHUNK = 10
UPDATES = (10, 40)
"""Updates before measuring, in multiples of the chunk."""
RULES = ("standardized_update", "relative_update")


def run() -> None:
    """Measures what is missing, predicts and prints."""
    truth = pathlib.Path(FLAGS.truth)
    if not (truth / "config.json").is_file():
        raise ValueError(f"--truth={truth} holds no study; run experiments.transfer first")
    settings = json.loads((truth / "config.json").read_text())
    records = {
        name: {
            record["hash"]: record["result"]
            for record in files.read_records(truth / f"{name}.jsonl")
            if "result" in record
        }
        for name in ("results", "measurements")
    } | {"sharpness": {}}
    studies, trials = {}, {}
    for name in FLAGS.study:
        found = transfer_study.trials_of(name, settings, FLAGS.data_dir)[: FLAGS.max_networks]
        rows = transfer_summary.rows(found, records)
        if not rows:
            raise ValueError(f"{truth} lacks the study {name}; run experiments.transfer first")
        studies[name] = [found[0], *(row["trial"] for row in rows)]
        rates = [records["results"][trial_hash(found[0])]["rate"]]
        rates += [row["standardized_update"] for row in rows]
        for trial, rate in zip(studies[name], rates, strict=True):
            trials[trial_hash(trial)] = {"network": trial, "rate": rate}
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        done = run_study(
            list(trials.values()),
            functools.partial(measure, data_dir=FLAGS.data_dir),
            workdir / "measurements.jsonl",
            description="measurements",
            **options,
        )
    runners.check_finished(done, workdir / "measurements.jsonl")
    variants = {trial_hash(one["trial"]["network"]): one["result"] for one in done}
    lines = _lines(studies, records, variants)
    table = common.markdown_table(lines)
    files.write_text(workdir / "table.md", table)
    printed = Table(*lines[0])
    for line in lines[1:]:
        printed.add_row(*line)
    report = page.write(
        workdir,
        f"Where to measure: {', '.join(studies)}",
        __doc__,
        tables={"Correlation with the best rates, and RMS error in nats.": lines},
    )
    console = Console()
    console.print(printed)
    console.print(f"report: {report}", soft_wrap=True)


def measure(trial: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Measures a network in every way.

    Args:
      trial: `network`, a trial of `experiments.transfer`, and `rate` of the updates.
      data_dir: folder of the data set.

    Returns:
      By the name of the way, the sizes of the updates, lists over seeds of lists over vertices.
    """
    settings = trial["network"]
    network = transfer_study.build(settings, data_dir)
    sizes: dict[str, list[archscale.tuning.UpdateSize]] = {}
    measured = jax.jit(functools.partial(_measure, network))
    optimizer = network.optimizer(trial["rate"])
    images, labels = network.dataset.train_images, network.dataset.train_labels
    for seed in range(settings["seeds"]):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        params = network.draw(seed)
        state = training.create_train_state(params, network.model_state, optimizer, key)
        batch = common.first_batch(network.dataset, settings["batch_size"], seed)
        gradients = {"gradient: the batch": batch}
        for count in EXAMPLES:
            if count <= len(images):
                name = f"gradient: {count} other example{'s' * (count > 1)}"
                gradients[name] = common.first_batch(network.dataset, count, seed + 1000)
        for name, one in gradients.items():
            sizes.setdefault(name, []).append(measured(state.params, state.model_state, one, batch))
        batches = training.epoch_batches(state, len(images), settings["batch_size"])
        for first in range(0, max(UPDATES), CHUNK):
            state, _ = training.jitted_train_batches(
                state,
                images,
                labels,
                batches[first : first + CHUNK],
                jnp.int32(first),
                graphdef=network.graphdef,
                optimizer=optimizer,
            )
            if first + CHUNK in UPDATES:
                name = f"after {first + CHUNK} updates"
                found = measured(state.params, state.model_state, batch, batch)
                sizes.setdefault(name, []).append(found)
    return {
        name: {
            field: [np.asarray(getattr(one, field), float).tolist() for one in found]
            for field in archscale.tuning.UpdateSize._fields
        }
        for name, found in sizes.items()
    }


def _measure(network, params, model_state, examples, batch) -> archscale.tuning.UpdateSize:
    """The update on `examples`, as the features of `batch` see it."""

    def features(params, batches):
        return training.vertex_features(network.graphdef, params, model_state, batches[1][0])

    def loss(params, batches):
        state = (params, model_state)
        return training.cross_entropy(network.graphdef, *state, *batches[0], train=True)[0]

    update = network.optimizer(1.0)
    return archscale.measure_update(features, loss, params, (examples, batch), update)


def _lines(studies, records, variants) -> list[list[str]]:
    """A line per way and rule after a heading: r and error on every study.

    Networks that were lost before they were measured are left out; `lost` where under 3 remain.
    """
    lines = [["measured", "rule", *(f"{name}: r, error" for name in studies)]]
    ways = list(next(iter(variants.values())))
    for way in ways:
        measurements = {name: found[way] for name, found in variants.items()}
        summaries = [
            {one.rule: one for one in transfer_summary.summarise(name, rows)}
            for name, trials in studies.items()
            for rows in [transfer_summary.rows(trials, records | {"measurements": measurements})]
        ]
        for rule in RULES:
            cells = [
                f"{one[rule].correlation:.2f}, {one[rule].error:.2f}" if rule in one else "lost"
                for one in summaries
            ]
            lines.append([way, rule, *cells])
    return lines


if __name__ == "__main__":
    common.run_binary(run)
