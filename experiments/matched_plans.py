"""Measured rates beside the closed forms: transformers and residual networks that grow.

    python -m experiments.matched_plans --workdir=runs/matched_plans

Families of `experiments.default_networks`, small, trained at a warmed-up and decayed rate. The best
rate of every size by search, under

  uniform   the framework's start, one rate for all parameters
  rules     the plan of `archscale_jax.parametrize`: the closed forms
  measured  the same with `learning_rate="measured"`: the closed forms, corrected by group
  alone     measured without the closed forms of width and depth

Where a method is right, the best rate of the base is that of every size. Writes results.jsonl (a
line a search), plans.csv and table.md; a run that was cut off goes on.
"""

import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from experiments import default_networks
from experiments.lab import common, files, networks, tables
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS
METHODS = ("uniform", "rules", "measured", "alone")


class Study(NamedTuple):
    """A family, the depth and width of its base, and those of the networks that take its rate."""

    family: str
    base: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    optimizer: str


STUDIES = {
    "residual_mlp": Study("residual_mlp", (2, 64), ((4, 64), (16, 64), (2, 128), (2, 256)), "sgd"),
    "vit": Study("vit", (2, 32), ((4, 32), (8, 32), (2, 64), (2, 128)), "adamw"),
    "wide_resnet": Study("wide_resnet", (1, 8), ((4, 8), (1, 32)), "sgd"),
    "gpt": Study("gpt", (2, 32), ((4, 32), (8, 32), (2, 128)), "adamw"),
    "gpt_muon": Study("gpt", (2, 32), ((8, 32), (2, 128)), "muon"),
}


class Optimizer(NamedTuple):
    """Options beside the learning rate, and the smallest, first and largest rate of a search."""

    options: dict[str, float]
    rates: tuple[float, float, float]


OPTIMIZERS = {
    "sgd": Optimizer({"momentum": 0.9}, (2**-12, 2**-3, 4.0)),
    "adamw": Optimizer({"weight_decay": 0.01}, (2**-14, 2**-8, 0.25)),
    "muon": Optimizer({"weight_decay": 0.01}, (2**-12, 2**-6, 1.0)),
}
flags.DEFINE_list("study", list(STUDIES), "Studies, see STUDIES.")
flags.DEFINE_list("method", list(METHODS), "See the module.")
flags.DEFINE_integer("steps", 100, "Updates of every training.", lower_bound=25)
flags.DEFINE_integer("num_seeds", 3, "Seeds of every search.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/matched_plans", "Folder for results and the table.")


def main() -> None:
    workdir = pathlib.Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for study in FLAGS.study for row in compare(study, workdir / "results.jsonl")]
    table = pd.DataFrame(rows)
    table.to_csv(workdir / "plans.csv", index=False, float_format="%.4g")
    text = tables.markdown(networks.transfer_summary(table, ("study", "grows", "method")))
    files.write_text(workdir / "table.md", text)
    print(text)


def compare(study: str, journal: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a row for every size and method; see `networks.transfer_row`."""
    of = STUDIES[study]
    base = {method: trial_of(study, of.base, _on_base(method)) for method in FLAGS.method}
    trials = [trial_of(study, size, method) for size in of.sizes for method in FLAGS.method]
    unique = {_name(one): one for one in [*base.values(), *trials]}
    trials = list(unique.values())
    records = run_study(trials, search, journal, retry_failed=True, description=study)
    found = {_name(one["trial"]): one["result"] for one in records if "result" in one}
    rows = []
    for size in of.sizes:
        truth = found[_name(trial_of(study, size, "uniform"))]
        for method in FLAGS.method:
            origin = found[_name(base[method])]
            result = found[_name(trial_of(study, size, method))]
            rows.append(
                {
                    "study": study,
                    "grows": "depth" if size[0] != of.base[0] else "width",
                    "depth": size[0],
                    "width": size[1],
                    "method": method,
                    **networks.transfer_row(result, origin, truth),
                    **result["multipliers"],
                }
            )
    return rows


def trial_of(study: str, size: tuple[int, int], method: str) -> dict[str, Any]:
    """Returns a trial: a size under a method; of the base `rules` has no base."""
    return {
        "study": study,
        "depth": size[0],
        "width": size[1],
        "method": method,
        "steps": FLAGS.steps,
        "seeds": FLAGS.num_seeds,
    }


def _on_base(method: str) -> str:
    """The base is not corrected, so that all plans have it in common."""
    return "uniform" if method == "uniform" else "rules"


def _name(trial: dict[str, Any]) -> str:
    return repr(sorted(trial.items()))


def family_of(study: str) -> default_networks.Family:
    """Returns the family; images are small enough for a search."""
    family = default_networks.FAMILIES[STUDIES[study].family]
    pixels = functools.partial(default_networks._images, "fashion_mnist", 4)
    return family._replace(data=pixels) if family.data is default_networks._FASHION else family


def search(trial: dict[str, Any]) -> dict[str, Any]:
    """Searches the best rate of a size under a method."""
    study, seeds = STUDIES[trial["study"]], range(trial["seeds"])
    family = family_of(trial["study"])
    example = family.batches(family.data(), 1000, 0)
    module = family.build(trial["depth"], trial["width"])
    base = family.build(*study.base) if (trial["depth"], trial["width"]) != study.base else None
    options: dict[str, Any] = {"optimizer": study.optimizer, "model_kwargs": family.arguments}
    if trial["method"] in ("measured", "alone"):
        options |= {"learning_rate": "measured", "loss_fn": lambda out: family.loss(out, example)}
    if trial["method"] == "alone":
        options |= {"width_rule": None, "depth_rule": None}
    plan = archscale.parametrize(module, *family.inputs(example), base=base, **options)
    inputs = family.inputs(example)
    extra, (low, first, high) = OPTIMIZERS[study.optimizer]
    make, start = functools.partial(plan.optimizer, **extra), plan.init
    if trial["method"] == "uniform":
        of = optax.contrib if study.optimizer == "muon" else optax
        make = functools.partial(getattr(of, study.optimizer), **extra)
        start = lambda key: {"params": module.init(key, *inputs, **family.arguments)["params"]}  # noqa: E731
    result = archscale.find_learning_rate(
        _trainer(trial, family, plan.apply, start, make),
        np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist(),
        seeds=seeds,
        start=first,
        refine=1,
        max_loss=100.0,
    )
    return {
        "rate": result.rate,
        "uncertainty": result.seed_error,
        "runs": [list(one) for one in result.runs],
        "multipliers": {part.place: part.value for part in plan.measured.values()},
    }


def _trainer(trial: dict[str, Any], family: default_networks.Family, apply, start, make):
    """Trains with 20 updates of warm-up, and a linear decay over the second half."""
    steps = trial["steps"]

    @jax.jit
    def update(params: Any, state: Any, batch: Any, rate: Any):
        loss, gradients = jax.value_and_grad(
            lambda params: family.loss(apply(params, *family.inputs(batch)), batch)
        )(params)
        updates, state = make(rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def train(rate: float, seed: int) -> Iterator[float]:
        params = jax.jit(start)(jax.random.key(seed))
        state, losses = make(1.0).init(params), []
        for step in range(steps):
            share = min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
            batch = family.batches(family.data(), seed, step)
            params, state, loss = update(params, state, batch, rate * share)
            losses.append(loss)
            if step % 25 == 24:
                yield float(loss)  # ends the run where it diverged
        yield float(jnp.mean(jnp.stack(losses[-steps // 4 :])))

    return train


if __name__ == "__main__":
    common.run_binary(main)
