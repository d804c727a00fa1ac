"""Does the rate of a small network serve larger ones? Residual networks and vision transformers.

    python -m experiments.size_transfer --study=resnet_depth,transformer_depth

Searches the best rate of networks of several depths or widths, under three parametrizations: as
Flax initializes them with one rate (`standard`), with this library's initialization and one rate
(`initialized`), and with multipliers of parameters on top (`factors`). A parametrization transfers
if its best rate stays; for the first two, every rule predicts the rates from that of the smallest
network. Writes config.json, results.jsonl, measurements.jsonl, a figure, table.md and report.html,
and prints the answer. Killed and started again it goes on. The defaults are the run of the docs.
"""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax.tuning._basin import excess_loss
from experiments.lab import (
    common,
    datasets,
    families,
    networks,
    page,
    panels,
    ranges,
    runners,
    studies,
    tables,
)
from experiments.lab.data_flags import define_data_flags
from experiments.lab.networks import Network
from experiments.lab.sweeps import run_study, trial_hash

FLAGS = flags.FLAGS

Trial = Mapping[str, Any]
Records = dict[str, dict[str, Any]]


class Study(NamedTuple):
    """Networks of one family; the first size is the one on which the rate would be tuned."""

    family: str
    axis: str
    sizes: tuple[int, ...]
    options: Mapping[str, Any]
    parametrizations: tuple[str, ...]


PARAMETRIZATIONS = ("initialized", "factors", "standard")
_OURS = ("initialized", "factors")
_RESNET = {"optimizer": "sgd", "width": 8, "downscale": 4}
_TRANSFORMER = {"optimizer": "adam", "width": 32, "depth": 2, "downscale": 1}

STUDIES = {
    # 2 blocks' convolutions each, stem and readout: 8, 16, 24 and 32 layers.
    "resnet_depth": Study("resnet", "depth", (3, 7, 11, 15), _RESNET, PARAMETRIZATIONS),
    "transformer_depth": Study("transformer", "depth", (1, 2, 4, 8), _TRANSFORMER, _OURS),
    "transformer_width": Study("transformer", "width", (16, 32, 64, 128), _TRANSFORMER, _OURS),
}
RULES = (
    "none",
    "path_sum_activations",
    "effective_depth",
    "standardized_update",
    "relative_update",
)


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
    settings = studies.flag_values(NOT_SETTINGS)
    trials = all_trials(FLAGS.study, settings)
    check_trials(trials, FLAGS.data_dir)
    found: dict[str, Records] = {}
    functions = {"results": search_rate, "measurements": measure}
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
    groups = grouped(trials, found)
    figure = workdir / "size_transfer.png"
    draw(groups, figure)
    page.publish(
        workdir,
        f"Learning rates of growing networks on {FLAGS.dataset.partition('#')[0]}",
        __doc__,
        remarks=answer(groups),
        tables={"How far the rates of each rule miss (nats), and what that costs.": table(groups)},
        figures={figure: "Best rates against size, with the prediction of every rule (dashed)."},
    )


def all_trials(names: list[str], settings: Mapping[str, Any]) -> list[Trial]:
    """Returns one trial for every network, the base of each parametrization first.

    Raises:
      ValueError: an unknown study, a single size, or one that no network has.
    """
    trials: list[Trial] = []
    for name in names:
        if name not in STUDIES:
            raise ValueError(unknown("study", name, STUDIES))
        family, axis, sizes, options, parametrizations = STUDIES[name]
        sizes = tuple(map(int, settings["size"])) or sizes
        if len(set(sizes)) < 2:
            raise ValueError(f"--size must hold two different sizes at least, found {sizes}")
        for size in sizes:
            try:
                ranges.KINDS[axis].parse(str(size))
            except ValueError as error:
                raise ValueError(f"--size, found the {axis} {size} of {name}: {error}") from None
        shared = {key: settings[key] for key in ("dataset", "batch_size", "steps")}
        shared |= {"seeds": settings["num_seeds"], "study": name, "family": family, "axis": axis}
        for how in parametrizations:
            for size in sizes:
                trial = shared | {"parametrization": how, "base": sizes[0]}
                trials.append(trial | dict(options) | {axis: size})
    return trials


def check_trials(trials: Sequence[Trial], data_dir: str | None) -> None:
    """Checks that the data of trials are there and fit them; see `studies.check_trials`."""
    studies.check_trials(trials, data_dir)
    for trial in trials:
        if trial["family"] == "transformer":
            images = studies.load(trial["dataset"], data_dir, trial["downscale"])
            families.check_transformer(images, trial["width"], "--size")


def build(trial: Trial, data_dir: str | None = None) -> Network:
    """Builds the network of a trial as it is parametrized."""
    dataset = studies.load(trial["dataset"], data_dir, trial["downscale"])
    sizes = {key: trial[key] for key in ("width", "depth")}
    create = functools.partial(families.create_network, trial["family"], dataset)
    optimizer = networks.OPTIMIZERS[trial["optimizer"]]
    network = create(**sizes, abstract=True)._replace(optimizer=optimizer)
    if trial["parametrization"] == "standard":
        return network._replace(draw=lambda seed: create(**sizes, seed=seed).params)
    if trial["parametrization"] == "initialized":
        return network
    base = create(**sizes | {trial["axis"]: trial["base"]}, abstract=True)
    scaling = archscale.scale_by_architecture(
        network.architecture,
        base.architecture,
        "none",
        **{f"{trial['axis']}_rule": trial["optimizer"]},
    )
    return network._replace(optimizer=lambda rate: optax.chain(optimizer(rate), scaling))


def search_rate(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Searches the best rate of a trial's network; see `networks.search_rate`."""
    return networks.search_rate(build(trial, data_dir), trial, refine=0)


def measure(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Measures one update of a trial's network for every seed, see `measure_update`."""
    network = build(trial, data_dir)
    return networks.as_lists(networks.measure_seeds(network.measure, network, trial))


# What they say.


class Group(NamedTuple):
    """The networks of one study and parametrization, by size.

    Attributes:
      searches: what was found.
      predicted: the rates that each rule gives from that of the smallest network; of `factors`,
        where the rate should stay, by the rule `none` alone.
    """

    searches: dict[int, archscale.tuning.RateSearch]
    predicted: dict[str, dict[int, float]]


def grouped(trials: list[Trial], records: dict[str, Records]) -> dict[tuple[str, str], Group]:
    """Returns the groups by study and parametrization."""
    groups: dict[tuple[str, str], dict[int, Trial]] = {}
    for trial in trials:
        key = (trial["study"], trial["parametrization"])
        groups.setdefault(key, {})[trial[trial["axis"]]] = trial
    return {key: _group(sizes, records) for key, sizes in groups.items()}


def _group(sizes: dict[int, Trial], records: dict[str, Records]) -> Group:
    searches = {}
    for size, trial in sizes.items():
        runs = networks.runs_of(records["results"][trial_hash(trial)])
        searches[size] = archscale.tuning.summarise_runs(runs)
    base_trial = next(iter(sizes.values()))
    rules = ("none",) if base_trial["parametrization"] == "factors" else RULES
    rate = next(iter(searches.values())).rate
    predicted: dict[str, dict[int, float]] = {rule: {} for rule in rules}
    for size, trial in sizes.items():
        for rule in rules:
            target, base = (
                _compared(one, rule, records["measurements"]) for one in (trial, base_trial)
            )
            predicted[rule][size] = archscale.predict_learning_rate(target, base, rate, rule)
    return Group(searches, predicted)


def _compared(trial: Trial, rule: str, measurements: Records) -> Any:
    """What a rule compares: the measurement of a network, or its graph."""
    if rule in archscale.tuning.MEASURED_RULES:
        return networks.sizes_of(measurements[trial_hash(trial)])
    return _architecture(trial["family"], trial["width"], trial["depth"])


@functools.lru_cache(maxsize=64)
def _architecture(family: str, width: int, depth: int) -> archscale.Architecture:
    dataset = datasets.load("digits")  # the graph does not depend on the images
    return families.create_network(family, dataset, width, depth, abstract=True).architecture


def answer(groups: Mapping[tuple[str, str], Group]) -> list[str]:
    """Returns a sentence for every study and parametrization: whether the base's best rate stays.

    As `archscale.tuning.summarise_transfer` has it: it stays where the best rates of all sizes lie
    no further apart than the noise of seeds and grid explains.
    """
    lines = []
    for (study, how), group in groups.items():
        check = archscale.tuning.summarise_transfer(group.searches)
        axis, (base, *larger) = STUDIES[study].axis, group.searches
        where = f"{study}, {how}: the best rate of {axis} {base}"
        apart = f"best rates lie {check.drift:.2f} nats apart"
        noise = f"{apart}, and noise explains up to {check.limit:.2f}"
        if not check.bracketed or math.isinf(check.limit):
            said = f"{where} may stay or move: a search ended where its rates end; {apart}"
        elif math.isnan(check.limit):
            said = f"{where} may stay or move, which one seed does not tell: {apart}"
        elif check.transfers:
            said = f"{where} serves up to {axis} {larger[-1]}, as far as searches tell: {noise}"
        else:
            said = f"{where} does not serve up to {axis} {larger[-1]}: {noise}"
        worst = max(larger, key=check.excess.__getitem__)
        if math.isinf(check.excess[worst]):
            said += f"; {axis} {worst} diverges at it."
        else:
            said += f"; it gives up {check.excess[worst]:.1%} of loss at most, at {axis} {worst}."
        lines.append(said)
    return lines


def table(groups: Mapping[tuple[str, str], Group]) -> pd.DataFrame:
    """Returns how far each rule's rates miss, and what that costs in loss."""
    rows = []
    for (study, how), (searches, predicted) in groups.items():
        best = {size: search.rate for size, search in searches.items()}
        losses = {size: archscale.tuning.mean_losses(search) for size, search in searches.items()}
        noise = np.mean([search.seed_error for search in searches.values()])
        for rule, found in predicted.items():
            errors = [math.log(found[size] / best[size]) for size in list(best)[1:]]
            worst = max(excess_loss(found[size], losses[size]) for size in list(best)[1:])
            rows.append(
                {
                    "study": study,
                    "parametrization": how,
                    "best rates": " ".join(f"{rate:.3g}" for rate in best.values()),
                    "noise": f"{noise:.2f}",
                    "rule": rule,
                    "RMS error": f"{math.sqrt(np.mean(np.square(errors))):.2f}",
                    "worst loss": tables.number(worst, "+.1%", missing="diverged"),
                }
            )
    return pd.DataFrame(rows)


COLOURS: dict[str, str] = dict(
    zip(RULES, ("#888888", "#d55e00", "#e69f00", "#0072b2", "#56b4e9"), strict=True)
)


def draw(groups: Mapping[tuple[str, str], Group], path: pathlib.Path) -> None:
    """Draws the best rates against size with every rule's prediction."""
    names = list(dict.fromkeys(study for study, _ in groups))
    places = [(study, how) for study in names for how in PARAMETRIZATIONS]
    figure, drawn = panels.create_panels(len(places), 2.5, width=2.8, columns=len(PARAMETRIZATIONS))
    for panel, (study, how) in zip(drawn, places, strict=True):
        panel.set_visible((study, how) in groups)
        if panel.get_visible():
            _draw_group(panel, groups[study, how])
        panel.set_title(f"{study.replace('_', ' ')}: {how}", fontsize=8.5)
        panel.set_xlabel("blocks" if STUDIES[study].axis == "depth" else "width", fontsize=8.5)
        found = [one for (name, _), group in groups.items() if name == study
                 for one in group.searches.values()]  # fmt: skip
        low = min(search.basin.lower for search in found) / 4
        high = 2 * max(search.basin.upper for search in found)
        panel.set(yscale="log", ylim=(low, high))  # what misses by more leaves the panel
    panels.finish(figure, path, up="learning rate", columns=4)


def _draw_group(panel, group: Group) -> None:
    sizes = list(group.searches)
    for rule, rates in group.predicted.items():
        label = rule.replace("_", " ")
        panel.plot(sizes, list(rates.values()), "--", color=COLOURS[rule], lw=1.2, label=label)
    basins = [search.basin for search in group.searches.values()]
    panel.fill_between(
        sizes,
        [basin.lower for basin in basins],
        [basin.upper for basin in basins],
        color="#dddddd",
        label="within 2 % of the best loss",
    )
    best = [search.rate for search in group.searches.values()]
    panel.plot(sizes, best, "o-", color="black", lw=1.4, ms=4, label="best rate")
    panels.plain_sizes(panel, sizes)


if __name__ == "__main__":
    common.run_binary(run)
