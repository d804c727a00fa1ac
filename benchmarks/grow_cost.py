"""What does growing cost? `python -m benchmarks.grow_cost`, many minutes.

* Runs of the study that grow: seconds, and how many of them go into compiling.
* What capacity is worth: one run of growth with arrays as wide as the neurons need, with more, and
  with all from the start. More compile fewer programs, and every update computes what is empty; so
  there is a number of updates between growths from which exact shapes win.

Every run has a process and a thread of its own, and compiles everything.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

import archscale_jax as archscale
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from benchmarks import common
from experiments import grow_cost as operations
from experiments import grow_study
from experiments.lab import studies
from experiments.lab.networks import Network

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
flags.DEFINE_integer("rounds", 3, "Runs of every choice of capacity, in turns.", lower_bound=1)

CAPACITIES: dict[str, Callable[[int], int]] = {
    "exact": int,
    "geometric(1.5)": archscale.contrib.geometric(1.5),
    "geometric(2)": archscale.contrib.geometric(2.0),
    "geometric(4)": archscale.contrib.geometric(4.0),
    "all at the start": int,
}
Groups = Sequence[archscale.contrib.NeuronGroup]
ONE_THREAD = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Size(NamedTuple):
    """How much is done."""

    data_dir: str | None
    changes: Mapping[str, Any]  # of the presets of the study
    rounds: int
    start_width: int = 4  # of two neurons, layers may die
    most: int = 14
    factor: float = 1.5
    growths: int = 12  # of four layers in turn: 4, 6, 9, 14
    every: int = 20
    statistics: int = 512
    held_out: int = 500
    batch_size: int = 64
    rate: float = 0.005


def main() -> None:
    few = {"steps": 4, "statistics": 64, "held_out": 50}
    few |= {"schedule": {"order": "round_robin", "growths": 1, "interval": 2}}
    size = common.sized(
        Size(FLAGS.data_dir, {}, FLAGS.rounds),
        Size(FLAGS.data_dir, few, 1, growths=2, every=2, statistics=64, held_out=50, batch_size=8),
    )
    names = common.sized(("dag_cnn", "resnet18_sixteenth"), ("dag_cnn",))
    settings = {"dataset": "fashion_mnist", "seed": 0, "threads": 1} | size._asdict()
    del settings["data_dir"]
    runs = {name: alone(study_run, name, size) for name in names}
    common.show("Runs of the study, seconds", run_lines(runs))
    common.write_results("grow_cost", {"settings": settings, "runs": runs})
    capacities = compare_capacities(size)
    common.show("Capacity", capacity_lines(capacities["capacities"]))
    results = {"settings": settings, "runs": runs, "capacities": capacities}
    common.write_results("grow_cost", results)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process with one thread."""
    return common.in_fresh_process(function, *arguments, environment=ONE_THREAD)


def study_run(name: str, size: Size) -> dict[str, Any]:
    """Trains a network of the study that grows by TINY; the data is there before."""
    settings = {"dataset": "fashion_mnist", "batch_size": 64, "normalize": True, "num_seeds": 1}
    spec = grow_study.SPECS[name] | dict(size.changes)
    trial = grow_study.all_trials({name: spec}, ["tiny"], settings)[0]
    studies.load(trial["dataset"], size.data_dir, trial["downscale"])
    with common.Compilations() as compilations:
        result, seconds = common.timed(lambda: grow_study.run(trial, data_dir=size.data_dir))
    return {
        "steps": trial["steps"],
        "growths": len(result["edits"]),
        "neurons": result["neurons"],
        "seconds": seconds,
        "compile_seconds": compilations.seconds,
        "programs": compilations.count,
    }


def compare_capacities(size: Size) -> dict[str, Any]:
    """Runs the same growth with all `CAPACITIES` in turns.

    Raises:
      RuntimeError: the runs have not grown alike.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CAPACITIES}
    for _ in range(size.rounds):
        for name, found in runs.items():
            found.append(alone(growing_run, name, size))
    first = {name: found[0] for name, found in runs.items()}
    neurons = first["exact"]["neurons"]
    if different := [name for name, run in first.items() if run["neurons"] != neurons]:
        raise RuntimeError(f"{', '.join(different)} have not grown as exact shapes have")
    updates, capacities = size.every * len(neurons), {}
    for name, found in runs.items():
        every = {
            key: common.spread([run[key] for run in found])
            for key in ("seconds", "compile_seconds", "growing_seconds", "training_seconds")
        }
        capacities[name] = every | {
            "shapes": len({tuple(one.items()) for one in first[name]["capacity"]}),
            "step_milliseconds": 1e3 * every["training_seconds"].median / updates,
            **{key: first[name][key] for key in ("programs", "flops", "capacity", "loss")},
        }
    for name, one in capacities.items():
        wins = None if name == "exact" else break_even(one, capacities["exact"], size.every)
        one["exact_wins_from"] = wins
    return {"neurons": neurons, "updates": updates, "capacities": capacities}


def break_even(run: Mapping[str, Any], exact: Mapping[str, Any], every: int) -> float | None:
    """From how many updates between growths exact shapes take less time; None for never.

    Args:
      run: one with empty capacity.
      exact: the same with exact shapes.
      every: updates between growths in both.
    """
    compiling, growing, slower = (
        run[key].median - exact[key].median
        for key in ("compile_seconds", "growing_seconds", "training_seconds")
    )
    saved = -(compiling + growing)
    if saved <= 0:
        return 0.0
    return every * saved / slower if slower > 0 else None


def growing_run(name: str, size: Size) -> dict[str, Any]:
    """Grows the network on a graph with some capacity; building it does not count.

    Neurons are as many as asked for in every growth, so that all choices grow alike.
    """
    (network, groups), (images, labels), params, state = start(size)
    if name == "all at the start":
        final = dict.fromkeys((one.name for one in groups), size.most)
        params, state = archscale.contrib.widen(params, final, groups, optimizer_state=state)
    schedule = archscale.contrib.GrowthSchedule(
        growths=size.growths, interval=size.every, factor=size.factor, max_neurons=size.most
    )
    held_out = images[-size.held_out :], labels[-size.held_out :]
    generator = np.random.default_rng(0)
    count = len(images) - grow_study.HELD_OUT
    rates = dict.fromkeys(named_leaves(params), np.float32(size.rate))

    def grown(params, state, number):
        chosen = generator.permutation(count)[: size.statistics]
        batch = images[chosen], labels[chosen]
        neurons = archscale.contrib.count_neurons(params, groups)
        numbers = archscale.contrib.choose_growth(schedule, number, groups, neurons)
        growing = [one for one in groups if one.name in numbers]
        growth = archscale.grow(
            network.loss, params, [batch], held_out, growing, number=numbers, threshold=0.0,
            normalize=True, amplitudes=AMPLITUDES[1:], capacity=CAPACITIES[name],
            optimizer=lambda params: grow_study.OPTIMIZER, optimizer_state=state,
        )  # fmt: skip
        return growth.params, growth.optimizer_state

    def trained(params, state):
        for _ in range(size.every):
            chosen = generator.integers(count, size=size.batch_size)
            batch = images[chosen], labels[chosen]
            params, state, _ = grow_study.update(network.loss, params, state, batch, rates)
        return params, state

    stretches, seconds = [params], {"training": 0.0, "growing": 0.0}
    with common.Compilations() as compilations:

        def watched(phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
            before = compilations.seconds
            result, elapsed = common.timed(lambda: function(*arguments))
            seconds[phase] += elapsed - (compilations.seconds - before)
            return result

        params, state = watched("training", trained, params, state)
        for number in range(size.growths):
            params, state = watched("growing", grown, params, state, number)
            stretches.append(params)
            params, state = watched("training", trained, params, state)
    return {
        "seconds": sum(seconds.values()) + compilations.seconds,
        "compile_seconds": compilations.seconds,
        "training_seconds": seconds["training"],
        "growing_seconds": seconds["growing"],
        "programs": compilations.count,
        "flops": count_operations(network, groups, stretches, size.every * size.batch_size),
        "capacity": [capacity_of(one, groups) for one in stretches],
        "neurons": [archscale.contrib.count_neurons(one, groups) for one in stretches],
        "loss": float(network.loss(params, held_out)),
    }


def start(size: Size) -> tuple[tuple[Network, Groups], Any, PyTree, Any]:
    """Returns the network on a graph, all training examples, its weights and optimizer's state."""
    downscale = grow_study.SPECS["dag_cnn"]["downscale"]
    built = network, _ = grow_study.build("dag_cnn", "fashion_mnist", size.data_dir, downscale)
    data = network.dataset
    examples = np.asarray(data.train_images), np.asarray(data.train_labels)
    params = grow_study.create("dag_cnn", network, size.start_width, 0)
    return built, examples, params, grow_study.OPTIMIZER.init(params)


def capacity_of(params: PyTree, groups: Groups) -> dict[str, int]:
    """Returns the capacity of groups by name."""
    leaves = named_leaves(params)
    return {one.name: one.capacity(leaves) for one in groups}


def count_operations(
    network: Network, groups: Groups, stretches: list[PyTree], updates: int
) -> dict[str, float]:
    """Counts operations of the training in a run, and those without empty capacity.

    Args:
      network: what is trained.
      groups: its neurons.
      stretches: the params of every stretch between growths.
      updates: of each stretch, times the examples of one.
    """
    example = network.dataset.train_images[:1], network.dataset.train_labels[:1]
    compact = [archscale.contrib.compact(params, groups) for params in stretches]
    return {
        name: sum(
            3 * updates * operations.forward_flops(network.loss, params, example)
            for params in every
        )
        for name, every in (("with_capacity", stretches), ("without", compact))
    }


def run_lines(runs: Mapping[str, Any]) -> list[list[str]]:
    """Lays out the runs of the study, the heading first."""
    lines = [["network", "growths", "seconds", "compiling", "programs"]]
    for name, run in runs.items():
        share = f"{run['compile_seconds'] / run['seconds']:.0%}"
        numbers = [str(run["growths"]), f"{run['seconds']:.1f}", share, str(run["programs"])]
        lines.append([name, *numbers])
    return lines


def capacity_lines(capacities: Mapping[str, Any]) -> list[list[str]]:
    """Lays out what capacity is worth, the heading first."""
    lines = [["capacity", "shapes", "programs", "compiling, s", "growing, s", "update, ms",
              "10⁹ operations", "total, s", "exact shapes win from, updates"]]  # fmt: skip
    for name, one in capacities.items():
        wins, (every, least) = one["exact_wins_from"], one["flops"].values()
        lines.append([
            name,
            *(str(one[key]) for key in ("shapes", "programs")),
            *(f"{one[key]:.1f}" for key in ("compile_seconds", "growing_seconds")),
            f"{one['step_milliseconds']:.2f}",
            f"{every / 1e9:.1f} (+{every / least - 1:.0%})",
            f"{one['seconds']:.1f}",
            "" if name == "exact" else "never" if wins is None else f"{wins:,.0f}",
        ])  # fmt: skip
    return lines


if __name__ == "__main__":
    common.run(main)
