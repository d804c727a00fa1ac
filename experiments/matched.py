"""Does one batch give a network the rates of a small one, group by group? (theory §14)

    python -m experiments.matched --workdir=runs/matched

Networks of `experiments.transfer`, and their ground truth: the best rate of every network by
search, once with one rate for all parameters (`uniform`), then with rates that are multiplied as
the rules of `experiments.matched_rules` say from what updates do in the network and in its base.
Where a rule is right, the base's best rate is the best of every network. Writes results.jsonl (a
line a search), networks.csv and table.md; a run that was cut off goes on.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._optax import scale_by_multipliers
from archscale_jax._spaces import chain_string
from archscale_jax.tuning._measured import GROUPS, Measurable, groups_of
from experiments import matched_again, matched_rules, transfer_study
from experiments.lab import common, files, networks, panels, tables, training
from experiments.lab.sweeps import run_study

FLAGS = flags.FLAGS
_DAGS, _CNNS = transfer_study._DAGS, transfer_study._CNNS

Place = tuple[str, int | None]
"""Architecture, and width or None for the default."""


class Study(NamedTuple):
    """Networks of one kind, and what differs from the defaults."""

    networks: Sequence[Place]
    options: dict[str, Any]


def _chains(*depths: int) -> list[Place]:
    return [(chain_string(depth), None) for depth in depths]


def _dags(texts: Sequence[str]) -> list[Place]:
    return [(text, None) for text in texts]


_PILOT = [
    *_chains(4, 10, 20),
    *_dags([*_DAGS[:22], *_CNNS[:5]]),
    *((chain_string(4), n) for n in (32, 512)),
]
"""Networks on which the rule was chosen; on all others no choice was made."""
_MIXED = [*_chains(4, 10), *_dags(_DAGS[:2])]
STUDIES = {
    "chains": Study(_chains(2, 4, 7, 10, 14, 20), {}),
    "deeper": Study(_chains(7, 10, 14, 20), {"base": chain_string(4)}),
    "dags": Study(_dags(_DAGS[:5]), {}),
    "widths": Study([(chain_string(4), width) for width in (32, 64, 256, 512)], {}),
    "gelu": Study(_chains(4, 7, 10), {"activation": "gelu"}),
    "layer_norm": Study(_MIXED, {"normalization": "layer"}),
    "batch_norm": Study(_MIXED, {"normalization": "batch"}),
    "cnns": Study(_dags(_CNNS[:5]), {"kernel_size": 3}),
    "momentum": Study(_MIXED, {"optimizer": "momentum"}),
    "adam": Study(
        [*_chains(4, 6, 10, 14, 20), *_dags([*_DAGS[:2], *_DAGS[20:22]])]
        + [(text, width) for text in (chain_string(4), _DAGS[0]) for width in (32, 512)],
        {"optimizer": "adam"},
    ),
    "more_dags": Study(_dags(_DAGS[5:22]), {}),
    # Networks that were added when the rule was fixed.
    "fresh_dags": Study(_dags(_DAGS[22:42]), {}),
    "fresh_cnns": Study(_dags(_CNNS[5:25]), {"kernel_size": 3}),
    "more_chains": Study(_chains(3, 5, 6, 8, 9, *range(11, 14), *range(15, 20)), {}),
    "more_adam": Study(_dags(_DAGS[2:16]), {"optimizer": "adam"}),
    "more_layer_norm": Study(_dags(_DAGS[2:18]), {"normalization": "layer"}),
    "more_widths": Study([(text, n) for text in _DAGS[2:5] for n in (32, 64, 256, 512)], {}),
}
flags.DEFINE_list("study", list(STUDIES), f"Studies of {', '.join(STUDIES)}.")
flags.DEFINE_list(
    "method", ["uniform", "matched", "flerm"], "uniform, rules of matched_rules, again."
)
flags.DEFINE_string("dataset", "fashion_mnist", "Data set of all.")
flags.DEFINE_integer("steps", 117, "Updates of every training.", lower_bound=2)
flags.DEFINE_integer("num_seeds", 3, "Seeds of every search.", lower_bound=1)
flags.DEFINE_integer("every", 39, "Updates between measurements of --method=again.", lower_bound=1)
flags.DEFINE_integer("draws", 2, f"Draws of {', '.join(matched_rules.BY_DRAWS)}.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/matched", "Folder for results and the table.")


def main() -> None:
    workdir = pathlib.Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for study in FLAGS.study for row in compare(study, workdir / "results.jsonl")]
    table = pd.DataFrame(rows)
    table.to_csv(workdir / "networks.csv", index=False, float_format="%.4g")
    draw(table, workdir / "matched_groups.png")
    text = tables.markdown(networks.transfer_summary(table, ("study", "method")))
    files.write_text(workdir / "table.md", text)
    print(text)


def compare(study: str, journal: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a row for every network and method; see `networks.transfer_row`."""
    of = STUDIES[study]
    base = trial_of((of.options.get("base", transfer_study.BASE), None), study, "uniform")
    trials = [base] + [trial_of(one, study, how) for one in of.networks for how in FLAGS.method]
    records = run_study(trials, search, journal, retry_failed=True, description=study)
    found = {_name(one["trial"]): one["result"] for one in records if "result" in one}
    origin, rows = found[_name(base)], []
    for one in of.networks:
        layers = one[0].count("2")  # the digit of a layer
        is_chain = one[0] == chain_string(max(layers, 1))
        truth = found[_name(trial_of(one, study, "uniform"))]
        for method in FLAGS.method:
            result = found[_name(trial_of(one, study, method))]
            rows.append(
                {
                    "study": study,
                    "fresh": one not in _PILOT,
                    "network": f"chain {layers}" if is_chain else one[0],
                    "layers": layers,
                    "width": one[1],
                    "method": method,
                    **networks.transfer_row(result, origin, truth),
                    **{group: result["multipliers"].get(group, 1.0) for group in GROUPS},
                }
            )
    return rows


LOOKS = {
    "uniform": ("one rate for all parameters", panels.GREY, "s"),
    "flerm": ("every leaf changes the outputs as in the base", panels.COLOURS[4], "^"),
    "matched": ("rates matched group by group", panels.COLOURS[0], "o"),
}


def draw(table: pd.DataFrame, path: pathlib.Path) -> None:
    """Draws best rates, in units of the base's, against depth, width and topology."""
    is_chain, layers = table["network"].str.startswith("chain"), table["layers"]
    deep = is_chain & table["width"].isna()
    graphs = table["study"].isin(("dags", "more_dags", "fresh_dags"))
    wide = is_chain & (layers == 4)
    chosen = {
        "depth of chains, SGD": (deep & (table["study"] == "chains"), layers),
        "depth of chains, Adam": (deep & (table["study"] == "adam"), layers),
        "depth of chains, GELU": (deep & (table["study"] == "gelu"), layers),
        "width of a chain, SGD": (wide & (table["study"] == "widths"), table["width"].fillna(128)),
        "width of a chain, Adam": (wide & (table["study"] == "adam"), table["width"].fillna(128)),
        "random graphs, by number": (graphs, None),
    }
    figure, drawn = panels.create_panels(len(chosen), 2.1, width=2.7, columns=3, sharey=True)
    for panel, (title, (rows, sizes)) in zip(drawn, chosen.items(), strict=True):
        panel.set_title(title, fontsize=9)
        panel.axhline(1, color="black", lw=0.8)
        for method, (label, colour, marker) in LOOKS.items():
            found = table[rows & (table["method"] == method)]
            across = np.arange(len(found)) + 1 if sizes is None else sizes[found.index].to_numpy()
            order = np.argsort(across)
            across, rates = across[order], np.exp(found["nats"].to_numpy()[order])
            style = {"color": colour, "marker": marker, "ms": 4, "label": label}
            panel.plot(across, rates, lw=0 if sizes is None else 1.3, **style)
        if "width" in title:
            panels.plain_sizes(panel, (32, 64, 128, 256, 512))
        else:
            panel.set_xticks((1, 10, 20, 30, 40) if sizes is None else (2, 4, 7, 10, 14, 20))
        panel.set_yscale("log")
        panel.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4], ["1/8", "1/4", "1/2", "1", "2", "4"])
        panel.minorticks_off()
    panels.finish(figure, path, up="best rate / best rate of the base", columns=3)


def trial_of(place: Place, study: str, method: str) -> dict[str, Any]:
    """Returns a trial: a network under a method."""
    architecture, width = place
    options = STUDIES[study].options
    mlp = {"width": width or 128, "batch_size": 256, "steps": FLAGS.steps, "downscale": 1}
    cnn = {"width": width or 8, "batch_size": 64, "steps": min(FLAGS.steps, 100), "downscale": 2}
    return {
        **transfer_study.DEFAULTS,
        **(cnn if "kernel_size" in options else mlp),
        "kernel_size": None,
        **options,
        "dataset": FLAGS.dataset,
        "seeds": FLAGS.num_seeds,
        "architecture": architecture,
        "method": method,
        "draws": FLAGS.draws if method in matched_rules.BY_DRAWS else 0,
        **({"every": FLAGS.every} if method == "again" else {}),
    }


def _name(trial: dict[str, Any]) -> str:
    return repr(sorted(trial.items(), key=str))


def search(trial: dict[str, Any]) -> dict[str, Any]:
    """Searches the best rate of a network under a method."""
    network, by_group = transfer_study.build(trial), {}
    if trial["method"] == "again":
        network = network._replace(optimizer=_matched_again(trial, network))
    elif trial["method"] != "uniform":
        found = measured(trial, network)
        scale = scale_by_multipliers(network.architecture, found)
        groups, plain = groups_of(network.architecture), network.optimizer
        by_group = {
            group: math.exp(
                np.mean([math.log(found[one]) for one in found if groups[one] == group])
            )
            for group in GROUPS
        }
        network = network._replace(optimizer=lambda rate: optax.chain(plain(rate), scale))
    found = networks.search_rate(network, trial, refine=0 if trial["kernel_size"] else 1)
    return found | {"multipliers": by_group}


def measured(trial: dict[str, Any], network: networks.Network) -> dict[str, float]:
    """Returns the multiplier of every leaf by the trial's rule, from the base of its study."""
    width = 8 if trial["kernel_size"] else 128
    architecture = trial.get("base", transfer_study.BASE)
    base = transfer_study.build(trial | {"architecture": architecture, "width": width})
    images, labels = common.first_batch(network.dataset, trial["batch_size"], 0)
    ours, theirs = (
        Measurable(
            one.apply,
            one.architecture,
            functools.partial(_draw, one, trial["initialization"]),
            one.optimizer(1.0),
            (images,),
        )
        for one in (network, base)
    )
    return matched_rules.multipliers(
        trial["method"],
        ours,
        theirs,
        lambda logits: networks.cross_entropy(logits, labels),
        draws=trial["draws"],
        is_sgd=trial["optimizer"] != "adam",
    )


def _matched_again(trial: dict[str, Any], network: networks.Network) -> Any:
    """From a rate to an optimizer that is matched to a training of the base at its best rate."""
    base = trial | {"architecture": trial.get("base", transfer_study.BASE), "method": "uniform"}
    base |= {"width": 8 if trial["kernel_size"] else 128, "draws": 0}
    effects = _effects_of_base(tuple(sorted(base.items(), key=str)), trial["every"])
    return _matching_optimizer(
        trial, network, base=effects, cap_readout=trial["optimizer"] != "adam"
    )


@functools.cache
def _effects_of_base(items: tuple[tuple[str, Any], ...], every: int) -> np.ndarray:
    """What updates of the base do at every measurement, mean of the logs of two seeds."""
    trial = dict(items)
    network = transfer_study.build(trial)
    rate = networks.search_rate(network, trial, refine=0 if trial["kernel_size"] else 1)["rate"]
    length = math.ceil(trial["steps"] / every)
    make = _matching_optimizer(trial | {"every": every}, network, length=length)
    options = {"graphdef": network.graphdef, "optimizer": make(rate)}
    options |= {"batch_size": trial["batch_size"], "total_steps": trial["steps"]}
    logs = []
    for seed in range(2):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state = training.create_train_state(
            network.draw(seed), network.model_state, make(rate), key
        )
        *_, (last, _) = training.train_parts(state, network.dataset, **options)
        logs.append(np.log(np.asarray(last.optimizer_state[1].effects) + 1e-12))
    return np.exp(np.mean(logs, axis=0))


def _matching_optimizer(trial: dict[str, Any], network: networks.Network, **options: Any) -> Any:
    images, _ = common.first_batch(network.dataset, trial["batch_size"], 123)
    match = matched_again.match_updates(
        network.apply, network.architecture, (images,), every=trial["every"], **options
    )
    return lambda rate: optax.chain(network.optimizer(1.0), match, optax.scale(rate))


def _draw(network: networks.Network, rule: str, key: Any) -> Any:
    return archscale.initialize(key, network.params, network.architecture, rule)


if __name__ == "__main__":
    common.run_binary(main)
