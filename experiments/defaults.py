"""Is the default parametrization ever worse than the framework's own start with one rate for all?

Fifteen networks of twelve families (`experiments.default_networks`), real data, a few hundred
updates, three seeds. At base size both are trained at their own best rate. At four times the depth
and four times the width the plan is trained at the rate that was best for it at base size; the
framework's start at the rate that was best for it there, and at the best of its own.

    python -m experiments.defaults --workdir=runs/defaults

Writes config.json, results.jsonl (a line a training), table.md and report.html, and prints the
answer. A run that was cut off goes on; the same --workdir takes more families later.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from experiments import default_ppo
from experiments.default_networks import FAMILIES
from experiments.lab import common, display, page, ranges, runners, tables
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS
ranges.define_list(
    "family",
    list(FAMILIES),
    "Families, see experiments/default_networks.py.",
    ranges.name_of("family", FAMILIES),
)
ranges.define("steps", 200, "Updates of every training.", "steps_of_20")
ranges.define("num_seeds", 3, "Seeds of every network and rate.")
ranges.define("growth", 4, "Times the depth, and times the width.")
flags.DEFINE_string("workdir", "runs/defaults", "Folder for results, table and report.")
runners.define_flags()

EXTENSIBLE = ("family", "num_seeds")
METHODS = ("framework", "plan")
SIZES = ("base", "deep", "wide")
STARTS = {"sgd": 0.1, "adam": 0.01}
"""Rates at which searches begin, of networks of this size."""


def run() -> None:
    """Trains what is missing, and prints."""
    settings = common.settings(sys.argv[0])
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings, extensible=EXTENSIBLE)
        study = functools.partial(run_study, journal=workdir / "results.jsonl", **options)
        results = pd.DataFrame([row for family in FLAGS.family for row in compare(family, study)])
    page.publish(
        workdir,
        "The plan against the framework's own start with one rate",
        __doc__,
        remarks=answer(results, FLAGS.num_seeds),
        tables={
            "Losses of the last quarter, means over seeds: of the plan at its base's best rate, of "
            "the framework's start at its own best rate and at its base's.": table(results)
        },
        figures={},
    )


def compare(family: str, study: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a row for every size of a family: losses of both methods, and their rates.

    `best` at rate `best_rate` and `transferred`, at the base's best rate, are the framework's;
    `plan` at rate `plan_rate`. A loss is infinite where a seed diverged.
    """
    loss_at = functools.partial(mean_loss, study, family)
    start = STARTS[FAMILIES[family].optimizer]
    base = {method: search(functools.partial(loss_at, "base", method), start) for method in METHODS}
    rows = []
    for size in SIZES:
        best, transferred = base["framework"], base["framework"][1]
        if size != "base":
            at = functools.partial(loss_at, size, "framework")
            best, transferred = search(at, best[0]), at(best[0])
        rate = base["plan"][0]
        row = {"family": family, "size": size, "best": best[1], "best_rate": best[0]}
        row |= {"transferred": transferred, "plan": loss_at(size, "plan", rate), "plan_rate": rate}
        rows.append(row)
    return rows


def answer(results: pd.DataFrame, num_seeds: int) -> list[str]:
    """Returns where the plan is worse than the framework's best, and than its base's rate."""
    grown = results["size"] != "base"
    lines = []
    for where, of_size in (("at base size", results[~grown]), ("grown", results[grown])):
        excess = of_size["plan"] / of_size["best"] - 1
        worse = excess > 0
        line = f"The plan is worse than the framework's own best on {worse.sum()} of {len(excess)} "
        line += f"networks {where}"
        if worse.any():
            worst = of_size.loc[excess.idxmax()]
            most = f"{excess.max():.1%}" if math.isfinite(excess.max()) else "divergence"
            line += f", by {most} at most ({worst['family']}, {worst['size']})"
        if where == "grown":
            transferred = (of_size["plan"] > of_size["transferred"]).sum()
            line += f"; than its start at the base's rate on {transferred}"
        lines.append(f"{line}.")
    lines.append(
        "One seed: noise alone lets one be worse."
        if num_seeds == 1
        else f"Losses are means over {num_seeds} seeds; small differences may be noise."
    )
    return lines


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the losses and rates, and by how much the plan's exceeds the framework's."""
    rows = []
    for one in results.itertuples():
        found = {
            "framework's best": one.best,
            "its rate": one.best_rate,
            "at its base rate": one.transferred,
            "plan": one.plan,
            "plan's rate": one.plan_rate,
        }
        row = {"family": one.family, "size": one.size}
        row |= {name: tables.number(value, ".4g", "diverged") for name, value in found.items()}
        against = {"against best, %": one.best, "against base rate, %": one.transferred}
        for name, other in against.items():
            row[name] = tables.number(100 * (one.plan / other - 1), "+.1f")
        rows.append(row)
    return pd.DataFrame(rows)


def search(loss_at: Callable[[float], float], start: float) -> tuple[float, float]:
    """Returns the best rate and its loss: steps of 2 until worse on both sides, then of sqrt 2."""
    losses: dict[float, float] = {}

    def best(rates: list[float]) -> float:
        for rate in rates:
            rate = float(f"{rate:.4g}")
            if rate not in losses:
                losses[rate] = loss_at(rate)
        return min(losses, key=losses.__getitem__)

    found = best([start / 2, start, start * 2])
    for _ in range(12):
        further = best([found / 2, found, found * 2])
        if further == found:
            break
        found = further
    found = best([found / math.sqrt(2), found * math.sqrt(2)])
    return found, losses[found]


def mean_loss(
    study: Callable[..., list[dict[str, Any]]], family: str, size: str, method: str, rate: float
) -> float:
    """Returns the mean loss over seeds, infinite where one diverged."""
    trial = {"family": family, "size": size, "method": method, "rate": rate, "steps": FLAGS.steps}
    trials = [trial | {"growth": FLAGS.growth, "seed": seed} for seed in range(FLAGS.num_seeds)]
    records = study(trials, train, description=f"{family} {size} {method}")
    runners.check_finished(records, pathlib.Path(FLAGS.workdir) / "results.jsonl")
    losses = [one["result"]["loss"] for one in records]
    display.note(f"{family} {size} {method}, rate {rate:.4g}: losses {losses}")
    return math.inf if None in losses else float(np.mean(losses))


def train(trial: dict[str, Any]) -> dict[str, Any]:
    """Trains one network; its loss is the mean over the last quarter, None where it diverged."""
    family, key = FAMILIES[trial["family"]], jax.random.key(trial["seed"])
    of = trial["family"], trial["size"], trial["growth"]
    module, example, plan = parametrized(*of)
    if trial["method"] == "plan":
        params = plan.init(key)
    else:
        params = {"params": module.init(key, *example, **family.arguments)["params"]}
    if trial["family"] == "ppo":
        optimizer = optimizer_of(*of, trial["method"])(trial["rate"])
        rounds = max(trial["steps"] // 5, 1)
        loss = default_ppo.train(plan.apply, params, optimizer, trial["seed"], rounds)
    else:
        loss = _train(trial, params, update_of(*of, trial["method"]))
    return {"loss": loss if math.isfinite(loss) else None}


@functools.lru_cache(maxsize=4)
def parametrized(name: str, size: str, growth: int) -> tuple[Any, tuple, Any]:
    """Returns a module, what it is called with, and its plan with the family's base."""
    family = FAMILIES[name]
    (depth, width), base = family.base, family.build(*family.base)
    depths = {"deep": (depth * growth, width), "wide": (depth, width * growth)}
    module = family.build(*depths.get(size, family.base))
    example = family.inputs(family.batches(family.data(), 0, 0))
    # Features of a dense block grow with its depth: no width of the base is theirs.
    width_rule = None if (name, size) == ("densenet", "deep") else "auto"
    plan = archscale.parametrize(
        module,
        *example,
        base=None if size == "base" else base,
        optimizer=family.optimizer,
        model_kwargs=family.arguments,
        width_rule=width_rule,
    )
    return module, example, plan


def optimizer_of(name: str, size: str, growth: int, method: str) -> Callable[..., Any]:
    """Returns the optimizer of a method as a function of the rate."""
    kind = FAMILIES[name].optimizer
    plain = {"sgd": optax.sgd, "adam": optax.adam}[kind]
    make = plain if method == "framework" else parametrized(name, size, growth)[2].optimizer
    return functools.partial(make, momentum=0.9) if kind == "sgd" else make


@functools.lru_cache(maxsize=1)
def update_of(name: str, size: str, growth: int, method: str) -> tuple[Callable, Callable]:
    """Returns the start of the optimizer's state and the jitted update, for all rates and seeds."""
    family, (_, _, plan) = FAMILIES[name], parametrized(name, size, growth)
    make = optimizer_of(name, size, growth, method)

    @jax.jit
    def update(params: Any, state: Any, batch: Any, rate: Any):
        def loss_of(params: Any) -> jax.Array:
            return family.loss(plan.apply(params, *family.inputs(batch)), batch)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = make(rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return make(1.0).init, update


def _train(
    trial: dict[str, Any], params: Any, start_and_update: tuple[Callable, Callable]
) -> float:
    """Trains with 20 updates of warm-up and a linear decay over the second half."""
    family, steps, losses = FAMILIES[trial["family"]], trial["steps"], []
    start, update = start_and_update
    state = start(params)
    for step in range(steps):
        share = min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        batch = family.batches(family.data(), trial["seed"], step)
        params, state, loss = update(params, state, batch, trial["rate"] * share)
        losses.append(loss)
        if step % 50 == 49 and not math.isfinite(loss):
            return math.nan
    return float(jnp.mean(jnp.stack(losses[-steps // 4 :])))


if __name__ == "__main__":
    common.run_binary(run)
