"""Tune a small network, train a deep and a wide one: do the small one's rates serve them?

    python -m experiments.tune_small --workdir=runs/tune_small

Residual networks learn to predict the next byte of Python's own source code, which is on every
machine: one of few blocks, the base, one with many, and one with wide layers. All train at every
rate of a grid, once as Flax and optax set them up, with one rate for all parameters (`standard`),
once under the plan of `archscale_jax.parametrize`. Where a parametrization transfers, the curves of
loss over rate have their minimum at one rate. Writes config.json, results.jsonl (a line a network),
table.md, tune_small.png and report.html, and prints the answer. A run that was cut off goes on.
"""

import functools
import math
import pathlib
import sys
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags
from flax import linen as nn

import archscale_jax as archscale
from archscale_jax.tuning._basin import loss_at
from experiments.lab import common, display, page, panels, ranges, runners, tables
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "runs/tune_small", "Folder of the run.")
ranges.define("base_depth", 2, "Residual blocks of the network that is tuned.", "depth")
ranges.define("base_width", 32, "Its width.", "width")
ranges.define("depth", 32, "Blocks of the deep network.", "depth")
ranges.define("wide", 256, "Width of the wide network.", "width")
ranges.define("steps", 300, "Updates of every training.")
ranges.define("batch_size", 128, "Examples an update.")
ranges.define("min_rate", 2.0**-13, "Smallest learning rate.", "rate")
ranges.define("max_rate", 2.0**-5, "Largest learning rate.", "rate")
ranges.define("num_rates", 9, "Rates, a log grid.")
ranges.define("num_seeds", 3, "Seeds of every training.")
runners.define_flags(workers=2)

CONTEXT = 16
DECAY = 0.01
LABELS = {"standard": "standard parametrization", "plan": "archscale_jax"}


class Network(nn.Module):
    """From the last bytes of a text, tokens [B, CONTEXT], to logits of the next, [B, 256]."""

    blocks: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 16)(tokens)
        x = nn.Dense(self.width)(x.reshape(len(tokens), -1))
        for _ in range(self.blocks):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(nn.relu(x))))
        return nn.Dense(256)(nn.relu(x))


def run() -> None:
    """Trains what is missing, prints the answer and draws."""
    rates = common.rate_grid(FLAGS.min_rate, FLAGS.max_rate, FLAGS.num_rates)
    base = (FLAGS.base_depth, FLAGS.base_width)
    sizes = list(dict.fromkeys([base, (FLAGS.depth, base[1]), (base[0], FLAGS.wide)]))
    for large, small in (("depth", "base_depth"), ("wide", "base_width")):
        size, least = getattr(FLAGS, large), getattr(FLAGS, small)
        if size < least:
            raise ValueError(
                f"--{large}={size} is below --{small}={least}, that of the small network; raise "
                f"--{large}"
            )
    if len(sizes) == 1:
        raise ValueError("--depth and --wide are those of the base; raise one of them")
    settings = {
        "base": base,
        "steps": FLAGS.steps,
        "batch_size": FLAGS.batch_size,
        "seeds": FLAGS.num_seeds,
        "rates": rates,
    }
    trials = [{"size": size, "how": how} | settings for size in sizes for how in LABELS]
    display.note(f"{len(source()):,} bytes of source code; {len(trials)} networks to train")
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, common.settings(sys.argv[0]))
        journal = workdir / "results.jsonl"
        records = run_study(trials, train, journal, description="networks", **options)
        runners.check_finished(records, journal)
    results = summarise([one["trial"] | one["result"] for one in records])
    figure = workdir / "tune_small.png"
    draw(results, figure)
    page.publish(
        workdir,
        "Tune small, train large",
        __doc__,
        remarks=answer(results),
        tables={
            "Loss (nats) of the last sixth of the training, means over seeds; given up: the loss "
            "at the base's best rate over the smallest of the network under either "
            "parametrization.": table(results),
        },
        figures={figure: "Loss over learning rate; the line is the base's best rate."},
    )


@functools.cache
def source() -> np.ndarray:
    """Python's standard library, as bytes."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = [one.read_bytes() for one in sorted(folder.glob("*.py"))]
    return np.frombuffer(b"".join(texts), np.uint8)


def windows(steps: int, batch_size: int) -> np.ndarray:
    """Returns random pieces of the source, bytes [steps, batch_size, CONTEXT + 1]."""
    text = source()
    starts = np.random.default_rng(0).integers(0, len(text) - CONTEXT, (steps, batch_size))
    return np.stack([text[starts + offset] for offset in range(CONTEXT + 1)], axis=-1)


def train(trial: dict[str, Any]) -> dict[str, Any]:
    """Trains a network at every rate with every seed; returns losses by rate and seed."""
    tokens = jnp.zeros((trial["batch_size"], CONTEXT), jnp.int32)
    network = Network(*trial["size"])
    apply, start = network.apply, lambda key: network.init(key, tokens)
    make = functools.partial(optax.adamw, weight_decay=DECAY)
    if trial["how"] == "plan":
        is_base = list(trial["size"]) == list(trial["base"])
        base = None if is_base else Network(*trial["base"])
        plan = archscale.parametrize(network, tokens, base=base, optimizer="adamw")
        apply, start = plan.apply, plan.init
        make = functools.partial(plan.optimizer, weight_decay=DECAY)

    def loss_fn(params: Any, window: jax.Array) -> jax.Array:
        window = window.astype(jnp.int32)
        logits = apply(params, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, -1]).mean()

    def last_loss(rate: jax.Array, key: jax.Array, data: jax.Array) -> jax.Array:
        params, optimizer = start(key), make(rate)

        def step(state: Any, window: jax.Array) -> tuple[Any, jax.Array]:
            params, inner = state
            loss, gradients = jax.value_and_grad(loss_fn)(params, window)
            updates, inner = optimizer.update(gradients, inner, params)
            return (optax.apply_updates(params, updates), inner), loss

        losses = jax.lax.scan(step, (params, optimizer.init(params)), data)[1]
        return losses[-max(len(losses) // 6, 1) :].mean()

    over_seeds = jax.vmap(last_loss, (None, 0, None))
    train_all = jax.jit(jax.vmap(over_seeds, (0, None, None)))
    keys = jax.random.split(jax.random.key(0), trial["seeds"])
    data = windows(trial["steps"], trial["batch_size"])
    losses = np.asarray(train_all(jnp.asarray(trial["rates"]), keys, data), float)
    return {"losses": [[one if math.isfinite(one) else None for one in row] for row in losses]}


def summarise(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns a row for every network and parametrization, that of the base first.

    `losses`: by rate, means over seeds, inf where a seed diverged.
    """
    rows = []
    for one in records:
        seeds = np.array([[math.inf if x is None else x for x in row] for row in one["losses"]])
        losses = dict(zip(one["rates"], seeds.mean(axis=1).tolist(), strict=True))
        best = min(losses, key=lambda rate, losses=losses: losses[rate])
        rows.append({"size": tuple(one["size"]), "how": one["how"], "losses": losses, "best": best})
    results = pd.DataFrame(rows)
    tuned = results.groupby("how", sort=False)["best"].transform("first")
    results = results.assign(
        tuned=tuned,
        loss=results["losses"].map(lambda losses: min(losses.values())),
        at_tuned=list(map(loss_at, tuned, results["losses"])),
    )
    best = results.groupby("size", sort=False)["loss"].transform("min")
    return results.assign(given_up=results["at_tuned"] / best - 1)


def answer(results: pd.DataFrame) -> list[str]:
    """Returns a sentence for every larger network."""
    base, *larger = [f"{_blocks(size)} of width {size[1]}" for size in _sizes(results)]
    lines = []
    for size, name in zip(_sizes(results)[1:], larger, strict=True):
        ours, standard = (
            results[(results["size"] == size) & (results["how"] == how)].iloc[0]
            for how in ("plan", "standard")
        )
        lines.append(
            f"At the rate that is best for {base}, {name} reach a loss of {ours.at_tuned:.3f} "
            f"under archscale_jax, {standard.at_tuned:.3f} in the standard parametrization."
        )
    return lines


def _blocks(size: tuple[int, int]) -> str:
    return f"{size[0]} block{'s' * (size[0] != 1)}"


def _sizes(results: pd.DataFrame) -> list[tuple[int, int]]:
    return list(results["size"].unique())


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the best rate and losses of every network."""
    return pd.DataFrame(
        {
            "parametrization": LABELS[one.how],
            "network": f"{_blocks(one.size)}, width {one.size[1]}",
            "best rate": f"{one.best:.2g}",
            "loss at it": tables.number(one.loss, ".3f", "diverged"),
            "loss at the base's rate": tables.number(one.at_tuned, ".3f", "diverged"),
            "given up": tables.number(one.given_up, ".1%", "diverged"),
        }
        for one in results.sort_values("how", kind="stable", ascending=False).itertuples()
    )


def draw(results: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws loss over learning rate, the parametrizations side by side on shared axes."""
    options = {"sharex": True, "sharey": True}
    figure, drawn = panels.create_panels(len(LABELS), 3.0, width=3.4, columns=2, **options)
    sizes = _sizes(results)
    for panel, (how, title) in zip(drawn, LABELS.items(), strict=True):
        panel.set_title(title, fontsize=10)
        for one in results[results["how"] == how].itertuples():
            colour = panels.COLOURS[sizes.index(one.size)]
            label = f"{_blocks(one.size)}, width {one.size[1]}"
            panel.plot(*zip(*one.losses.items(), strict=True), color=colour, label=label, lw=1.6)
            panel.plot(one.best, one.loss, "o", color=colour, ms=6)
            panel.axvline(one.tuned, color="black", lw=0.8, ls=":")
        panel.set_xscale("log", base=2)
    panels.finish(figure, path, across="learning rate", up="loss (nats)", columns=3)


if __name__ == "__main__":
    common.run_binary(run)
