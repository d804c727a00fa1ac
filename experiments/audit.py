"""Audits how a network of the lab is set up, before it is trained.

    python -m experiments.audit --family=transformer --width=128 --optimizer=adamw

Builds a network of a family and its base, draws the weights, makes the optimizer, and asks
`archscale_jax.audit` on one batch of the data set. `--setup=standard` audits one rate for all
parameters instead of the plan's, and weights as the framework draws them, to show what is found
there. Writes config.json, results.jsonl (a line a parameter), table.md, leaves.png (measured over
promised, leaf by leaf) and report.html, prints the audit, and ends with 2 where something is found.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import optax
from absl import flags

import archscale_jax as archscale
from archscale_jax._audit import Audit
from archscale_jax._auditing.figure import FARTHEST, QUANTITIES, Row, placed, reach
from archscale_jax._auditing.findings import Finding
from experiments.lab import common, families, files, networks, page, panels, ranges, tables
from experiments.lab.data_flags import define_data_flags
from experiments.lab.recipe import load_dataset

FLAGS = flags.FLAGS

OPTIMIZERS = ("sgd", "adam", "adamw", "lion", "muon")
SETUPS = ("plan", "standard")

flags.DEFINE_enum("family", "mlp", families.FAMILIES, "Family of the network.")
ranges.define("width", 128, "Features of every layer.")
ranges.define("depth", 2, "Layers between stem and readout, or blocks.")
ranges.define("base_width", 32, "Features of the base's layers.", "width")
ranges.define("base_depth", 2, "Its layers or blocks.", "depth")
flags.DEFINE_enum("optimizer", "adamw", OPTIMIZERS, "Optimizer.")
flags.DEFINE_enum("setup", "plan", SETUPS, "What is audited.")
ranges.define("base_rate", 1e-3, "Learning rate tuned on the base.", "rate")
ranges.define("weight_decay", 0.1, "Decoupled weight decay tuned on the base.")
ranges.define("batch_size", 64, "Examples of the batch.")
ranges.define("seed", 0, "Seed of weights and batch.")
define_data_flags("digits")
flags.DEFINE_string("workdir", "runs/audit", "Folder for records, table and report.")


def run() -> None:
    """Audits and prints."""
    dataset = load_dataset(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.family == "transformer":
        families.check_transformer(dataset, FLAGS.width, "--width")
        families.check_transformer(dataset, FLAGS.base_width, "--base_width")
    sizes = (FLAGS.width, FLAGS.depth), (FLAGS.base_width, FLAGS.base_depth)
    network, base = (
        families.create_network(FLAGS.family, dataset, *one, seed=FLAGS.seed, abstract=number > 0)
        for number, one in enumerate(sizes)
    )
    batch = common.first_batch(dataset, FLAGS.batch_size, FLAGS.seed)
    workdir = common.claim_directory(FLAGS.workdir, common.settings(sys.argv[0]))
    audit = audited(network, base, batch)
    files.write_records(workdir / "results.jsonl", files.strict_json(audit.records))
    names = ("path", "kind", "learning_rate", "learning_rate_promised", "weight_decay", "deviation")
    rows = [[_cell(record[name]) for name in names] for record in audit.records]
    found = [[*one] for one in audit.findings]
    page.publish(
        workdir,
        f"Audit of a {FLAGS.family} under {FLAGS.optimizer}, {FLAGS.setup}",
        __doc__,
        remarks=[str(audit)],
        tables={
            "What was found.": [list(Finding._fields), *found],
            "What was measured, multipliers up to one constant.": [
                [name.replace("_", " ") for name in names], *rows
            ],
        },
        figures=draw(audit.rows(), workdir / "leaves.png"),
    )  # fmt: skip
    if audit.findings:
        sys.exit(2)


def audited(network: networks.Network, base: networks.Network, batch: tuple) -> Audit:
    """Audits a network as the flags say; notes of the plan, as on a swapped base, come first."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), network.params)
    plan = archscale.parametrize(
        (network.apply, shapes),
        jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype),
        base=(base.apply, base.params),
        optimizer=FLAGS.optimizer,
    )
    if FLAGS.setup == "plan":
        params = plan.init(jax.random.key(FLAGS.seed))
        optimizer = plan.optimizer(FLAGS.base_rate, FLAGS.weight_decay)
    else:
        params, optimizer = network.params, standard(FLAGS.optimizer, FLAGS.base_rate)
    loss = lambda params, batch: networks.cross_entropy(plan.apply(params, batch[0]), batch[1])  # noqa: E731
    found = archscale.audit(plan, optimizer, loss, params, batch)
    return dataclasses.replace(found, notes=[*plan.report().notes, *found.notes])


def standard(name: str, rate: float) -> optax.GradientTransformation:
    """Returns an optimizer of optax with one rate and one decay for all parameters."""
    if name == "muon":
        return optax.contrib.muon(rate, weight_decay=FLAGS.weight_decay)
    if name in ("adamw", "lion"):
        return getattr(optax, name)(rate, weight_decay=FLAGS.weight_decay)
    return getattr(optax, name)(rate)


def draw(rows: Sequence[Row], path: pathlib.Path) -> dict[pathlib.Path, str]:
    """Draws measured over promised, a line a leaf, by role; returns the caption by path."""
    lines, roles = placed(rows)
    count = len(rows) + len(roles)
    figure, (panel,) = panels.create_panels(1, 0.17 * count + 0.3, width=4.6, columns=1)
    for number, quantity in enumerate(QUANTITIES):
        colour = panels.COLOURS[number]
        shown = [(row.ratios[quantity], line) for row, line in lines if quantity in row.ratios]
        heights = [line + (number - 1.5) * 0.16 for _, line in shown]
        values = [min(max(value, 1 / FARTHEST), FARTHEST) for value, _ in shown]
        panel.plot(values, heights, ".", markersize=4.5, color=colour, label=quantity)
    edge = reach(rows)
    panel.set(xscale="log", xlim=(1 / edge, edge), ylim=(count - 0.5, -0.5))
    sizes = (0.02, 0.1, 0.5, 1, 2, 10, 50)
    panels.plain_sizes(panel, [one for one in sizes if 1 / edge <= one <= edge])
    panel.axvline(1, color=panels.GREY, linewidth=0.8, zorder=0)
    panel.set_yticks([line for _, line in lines], [row.name for row, _ in lines], fontsize=7)
    for (row, line), label in zip(lines, panel.get_yticklabels(), strict=True):
        if row.kinds:
            label.set_color("#C00000")
            text = "✗ " + ", ".join(row.kinds)
            panel.annotate(text, (1.01, line), xycoords=panel.get_yaxis_transform(), fontsize=7,
                           color="#C00000", va="center")  # fmt: skip
    for role, line in roles.items():
        panel.annotate(role, (0.01, line), xycoords=panel.get_yaxis_transform(), fontsize=7.5,
                       fontweight="bold", va="center")  # fmt: skip
        panel.axhline(line - 0.5, color=panels.GREY, linewidth=0.4)
    panels.finish(figure, path, across="measured / promised, up to one constant", columns=2)
    caption = (
        "Measured over promised, a line a leaf: at 1 it is as the plan promises. Base values are "
        "not known, so each quantity is shown up to one constant. One epsilon for all leaves lies "
        "beside 1, and is a finding only where it exceeds gradients."
    )
    return {path: caption}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return tables.number(value, ".4g")
    return "" if value is None else str(value)


if __name__ == "__main__":
    common.run_binary(run)
