"""The networks of the size studies, their best rates, and what every rule predicts of them."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._errors import unknown
from archscale_jax.tuning._search import excess_loss
from experiments import transfer_study
from experiments.lab import common, datasets, families, ranges, training
from experiments.lab.panels import save
from experiments.lab.sweeps import trial_hash

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
    """Checks that the data of trials are there and fit them; see `transfer_study.check_trials`."""
    transfer_study.check_trials(trials, data_dir)
    for trial in trials:
        if trial["family"] == "transformer":
            images = transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
            families.check_transformer(images, trial["width"], "--size")


class Network(NamedTuple):
    """A network of a trial, ready to draw and to train."""

    dataset: datasets.Dataset
    model: families.Model
    draw: Any  # from a seed to its initial params
    optimizer: Any  # from a rate


def build(trial: Trial, data_dir: str | None = None) -> Network:
    """Builds the network of a trial as it is parametrized."""
    dataset = transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
    family, sizes = trial["family"], {key: trial[key] for key in ("width", "depth")}
    create = functools.partial(families.create_model, family, dataset)
    optimizer = families.OPTIMIZERS[trial["optimizer"]]
    model = create(**sizes, abstract=True)
    if trial["parametrization"] == "standard":
        return Network(dataset, model, lambda seed: create(**sizes, seed=seed).params, optimizer)
    draw = functools.partial(families.draw, model, family)
    if trial["parametrization"] == "initialized":
        return Network(dataset, model, draw, optimizer)
    base = create(**sizes | {trial["axis"]: trial["base"]}, abstract=True)
    scaling = archscale.scale_by_architecture(
        model.architecture,
        base.architecture,
        "none",
        **{f"{trial['axis']}_rule": trial["optimizer"]},
    )
    return Network(dataset, model, draw, lambda rate: optax.chain(optimizer(rate), scaling))


def search_rate(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Searches the best rate of a trial's network; see `transfer_study.search_rate`."""
    network = build(trial, data_dir)

    def create_state(optimizer, seed: int) -> training.TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state = network.model.model_state
        return training.create_train_state(network.draw(seed), state, optimizer, key)

    train = common.rate_trainer(
        create_state,
        network.optimizer,
        network.dataset,
        graphdef=network.model.graphdef,
        batch_size=trial["batch_size"],
        total_steps=trial["steps"],
    )
    return transfer_study.search_result(train, trial["optimizer"], trial["seeds"], refine=0)


def measure(trial: Trial, data_dir: str | None = None) -> dict[str, Any]:
    """Measures one update of a trial's network for every seed, see `measure_update`."""
    network = build(trial, data_dir)
    batches = [
        common.first_batch(network.dataset, trial["batch_size"], seed)
        for seed in range(trial["seeds"])
    ]
    measured = families.measurer(network.model, network.optimizer)
    sizes = common.measure_seeds(measured, network.draw, batches)
    return {name: np.asarray(values, float).tolist() for name, values in sizes._asdict().items()}


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
        runs = records["results"][trial_hash(trial)]["runs"]
        searches[size] = archscale.tuning.summarise_runs(
            archscale.tuning.Run(rate, seed, math.inf if loss is None else loss)
            for rate, seed, loss in runs
        )
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
        measured = measurements[trial_hash(trial)]
        return archscale.tuning.UpdateSize(
            **{name: jnp.asarray(measured[name]) for name in measured}
        )
    return _architecture(trial["family"], trial["width"], trial["depth"])


@functools.lru_cache(maxsize=64)
def _architecture(family: str, width: int, depth: int) -> archscale.Architecture:
    dataset = datasets.load("digits")  # the graph does not depend on the images
    return families.create_model(family, dataset, width, depth, abstract=True).architecture


def table(groups: Mapping[tuple[str, str], Group]) -> list[list[str]]:
    """Returns header and rows: how far each rule's rates miss, and what that costs in loss."""
    head = ["study", "parametrization", "best rates", "noise", "rule", "RMS error", "worst loss"]
    rows = [head]
    for (study, how), (searches, predicted) in groups.items():
        best = {size: search.rate for size, search in searches.items()}
        losses = {size: archscale.tuning.mean_losses(search) for size, search in searches.items()}
        noise = np.mean([search.seed_error for search in searches.values()])
        rates = " ".join(f"{rate:.3g}" for rate in best.values())
        for rule, found in predicted.items():
            errors = [math.log(found[size] / best[size]) for size in list(best)[1:]]
            worst = max(excess_loss(found[size], losses[size]) for size in list(best)[1:])
            error = math.sqrt(np.mean(np.square(errors)))
            shown = f"{worst:+.1%}" if math.isfinite(worst) else "lost"
            rows.append([study, how, rates, f"{noise:.2f}", rule, f"{error:.2f}", shown])
    return rows


COLORS: dict[str, str] = dict(
    zip(RULES, ("#888888", "#d55e00", "#e69f00", "#0072b2", "#56b4e9"), strict=True)
)


def draw(groups: Mapping[tuple[str, str], Group], path: pathlib.Path) -> None:
    """Draws the best rates against size with every rule's prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    studies = list(dict.fromkeys(study for study, _ in groups))
    figure = Figure(figsize=(8.6, 2.5 * len(studies) + 0.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(studies), len(PARAMETRIZATIONS), squeeze=False)
    for (study, how), (searches, predicted) in groups.items():
        row = panels[studies.index(study)]
        panel = row[PARAMETRIZATIONS.index(how)]
        sizes = list(searches)
        for rule, rates in predicted.items():
            label = rule.replace("_", " ")
            panel.plot(sizes, list(rates.values()), "--", color=COLORS[rule], lw=1.2, label=label)
        basins = [search.basin for search in searches.values()]
        panel.fill_between(
            sizes,
            [basin.lower for basin in basins],
            [basin.upper for basin in basins],
            color="#dddddd",
            label="within 2 % of the best loss",
        )
        best = [search.rate for search in searches.values()]
        panel.plot(sizes, best, "o-", color="black", lw=1.4, ms=4, label="best rate")
        panel.set(xscale="log", yscale="log", xticks=sizes)
        panel.set_xticks(sizes, list(map(str, sizes)))
        panel.minorticks_off()
        panel.set_title(f"{study.replace('_', ' ')}: {how}", fontsize=8.5)
        panel.set_xlabel(f"{'blocks' if STUDIES[study].axis == 'depth' else 'width'}", fontsize=8.5)
        panel.tick_params(labelsize=7.5)
    for study, row in zip(studies, panels, strict=True):
        row[0].set_ylabel("learning rate", fontsize=8.5)
        searches = [one for (name, _), group in groups.items() if name == study
                    for one in group.searches.values()]  # fmt: skip
        low = min(search.basin.lower for search in searches) / 4
        high = 2 * max(search.basin.upper for search in searches)
        for panel in row:
            panel.set_ylim(low, high)  # what misses by more leaves the panel
            panel.set_visible(panel.has_data())
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path, dpi="figure")
