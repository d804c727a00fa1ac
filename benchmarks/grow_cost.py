"""What does growing cost? `python -m benchmarks.grow_cost`, many minutes.

* Where the time of a run that grows goes: training, evaluation, the parts of growth, and compiling,
  whose seconds JAX reports itself; of runs of the study, from cold and once more.
* What rooms are worth: one run of growth with arrays as wide as the neurons need, with more, and
  with all from the start. More compile fewer programs, and every update computes what is empty; so
  there is a number of updates between growths from which exact shapes win.

Every run has a process and a thread of its own, and compiles everything.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import app, flags

import archscale_jax as archscale
from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.contrib._growth.extension import AMPLITUDES
from benchmarks import common, parts
from experiments import grow_cost as operations
from experiments import grow_study, transfer_study
from experiments.lab.common import markdown_table
from experiments.lab.networks import Network

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
flags.DEFINE_integer("rounds", 3, "Runs of every choice of rooms, in turns.", lower_bound=1)
flags.DEFINE_integer("step_rounds", 30, "Timed updates of every shape, in turns.", lower_bound=1)
parts.define_flags(torch=False)

STEPS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    common.COMPILE_EVENT: "XLA",
}
"""What JAX does to compile a program, by the event that it reports."""
PHASES = (
    *("training", "evaluation", "statistics", "solving", "amplitudes", "rooms", "reading"),
    *("building", "counting", "rest"),
)
READ = ("reading", "counting")
"""Phases that trace functions to read them; no program is compiled of that."""
LONGEST = 8  # programs by name, of which the results say how long XLA took
ROOMS: dict[str, Callable[[int], int]] = {
    "exact": int,
    "geometric(1.5)": archscale.contrib.geometric(1.5),
    "geometric(2)": archscale.contrib.geometric(2.0),
    "geometric(4)": archscale.contrib.geometric(4.0),
    "all at the start": int,
}
FUNCTIONS = (
    (grow_study, "build", "building"),
    (grow_study, "create", "building"),
    (grow_study, "update", "training"),
    (grow_study, "hits", "evaluation"),
    (archscale, "grow", "rooms"),  # what is left of it: widened arrays, and new neurons in them
    (archscale, "count_neurons", "counting"),
    (archscale, "count_parameters", "counting"),
    ("archscale_jax.contrib._growth.grow", "trace", "reading"),
    ("archscale_jax.contrib._growth.grow", "measure", "statistics"),
    ("archscale_jax.contrib._growth.grow", "solve", "solving"),
    ("archscale_jax.contrib._growth.grow", "_check_shapes", "reading"),
    ("archscale_jax.contrib._growth.grow", "search_amplitude", "amplitudes"),
    ("archscale_jax.contrib._growth.grow", "_check_unchanged", "amplitudes"),
    ("archscale_jax.contrib._growth.grow", "grown_architecture", "reading"),
    ("archscale_jax.contrib._growth.measured", "layer_kinds", "reading"),
    ("archscale_jax.contrib._growth.bottleneck", "layer_kinds", "reading"),
    ("archscale_jax.contrib._growth.bottleneck", "least_squares", "solving"),
    (operations, "forward_flops", "counting"),
    (operations, "growth_flops", "counting"),
)
"""Where functions are looked up, their names, and the phases that they are; the innermost counts.
Packages export functions by the names of their modules, which are given by name therefore."""


class Size(NamedTuple):
    """How much is done."""

    networks: Mapping[str, Mapping[str, Any]]  # by preset, what differs from it
    start_width: int = 4  # of two neurons, layers may die
    most: int = 14
    factor: float = 1.5
    growths: int = 12  # of four layers in turn: 4, 6, 9, 14
    every: int = 20
    statistics: int = 512
    held_out: int = 500
    batch_size: int = 64
    rate: float = 0.005
    rounds: int = 3
    step_rounds: int = 30


_FEW = {"steps": 4, "statistics": 64, "held_out": 50}
QUICK = Size(
    {
        "dag_cnn": _FEW | {"schedule": {"order": "round_robin", "growths": 1, "every": 2}},
        "resnet18_sixteenth": _FEW | {"schedule": {"order": "all", "growths": 1, "every": 2}},
    },
    growths=2,
    every=2,
    statistics=64,
    held_out=50,
    batch_size=8,
    rounds=1,
    step_rounds=2,
)


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    parts.prepare(arguments)
    full = Size({"dag_cnn": {}, "resnet18_sixteenth": {}})
    full = full._replace(rounds=FLAGS.rounds, step_rounds=FLAGS.step_rounds)
    size = QUICK if FLAGS.quick else full
    settings = {"dataset": "fashion_mnist", "seed": 0, "threads": 1} | size._asdict()
    parts.run(
        "grow_cost",
        {"settings": settings},
        {
            "runs": (
                lambda: cost_of_runs(size, FLAGS.data_dir),
                *(share_rows, compile_rows, program_rows),
            ),
            "rooms": (lambda: compare_rooms(size, FLAGS.data_dir), rooms_rows),
        },
        show=lambda rows: print(markdown_table(rows), flush=True),
    )


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process with one thread; XLA reads NPROC when it starts."""
    names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, dict.fromkeys(names, "1")),
        concurrent.futures.ProcessPoolExecutor(1, spawn) as executor,
    ):
        return executor.submit(function, *arguments).result()


# Where time goes.


class Span(NamedTuple):
    """From when to when, in seconds, something went on; spans lie in one another."""

    start: float
    end: float
    phase: str | None
    step: str | None = None  # of compiling
    program: str = ""


class Clock:
    """Divides the time inside a `with` by phases, and by what JAX does in them to compile."""

    def __enter__(self):
        self.spans: list[Span] = []
        jax.monitoring.register_event_time_span_listener(self._listen)
        self._start = time.time()  # the clock of these events
        return self

    def __exit__(self, *_):
        self.spans.append(Span(self._start, time.time(), "rest"))
        jax.monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **kwargs: Any) -> None:
        if event in STEPS:
            name = str(kwargs.get("fun_name", ""))
            self.spans.append(Span(start_time, end_time, None, STEPS[event], name))

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose calls, until its arrays are ready, belong to a phase."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.time()
            try:
                return jax.block_until_ready(function(*arguments, **options))
            finally:
                self.spans.append(Span(start, time.time(), phase))

        return call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Times `FUNCTIONS`."""
        with contextlib.ExitStack() as stack:
            for place, name, phase in FUNCTIONS:
                module = importlib.import_module(place) if isinstance(place, str) else place
                timed = self.timed(phase, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, timed))
            yield

    def summary(self) -> dict[str, Any]:
        """Returns the seconds in all and by phases, running and compiling; JSON values."""
        phases = divide(self.spans)
        by_name: dict[str, list[float]] = collections.defaultdict(list)
        for span in self.spans:
            if span.step == "XLA":
                by_name[span.program].append(span.end - span.start)
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
        return {
            "seconds": self.spans[-1].end - self.spans[-1].start,
            "compile_seconds": sum(map(compile_seconds, phases.values())),
            "programs": sum(phase["programs"] for phase in phases.values()),
            "phases": phases,
            "longest": {name: {"programs": len(one), "XLA": sum(one)} for name, one in longest},
        }


def divide(spans: Sequence[Span]) -> dict[str, dict[str, Any]]:
    """Returns the seconds of every phase without those of spans inside, and its programs."""
    found: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(("running", *STEPS.values()), 0.0) | {"programs": 0} for name in PHASES
    }
    outer: list[tuple[float, str, str]] = []  # ends, phases and steps of the spans around
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while len(outer) > 1 and outer[-1][0] <= span.start:
            outer.pop()
        phase = span.phase or outer[-1][1]
        step = "running" if span.step is None else span.step
        if step == "tracing" and phase in READ:
            step = "running"
        found[phase][step] += span.end - span.start
        found[phase]["programs"] += step == "XLA"
        if outer:
            found[outer[-1][1]][outer[-1][2]] -= span.end - span.start
        outer.append((span.end, phase, step))
    return found


def compile_seconds(phase: Mapping[str, Any]) -> float:
    """Returns what all programs of a phase took to compile."""
    return sum(phase[step] for step in STEPS.values())


def cost_of_runs(size: Size, data_dir: str | None) -> dict[str, Any]:
    """Runs every network of the study that is asked for; see `study_run`."""
    return {
        name: in_fresh_process(study_run, name, dict(changes), data_dir)
        for name, changes in size.networks.items()
    }


def study_run(name: str, changes: dict[str, Any], data_dir: str | None) -> dict[str, Any]:
    """Trains a network that grows by TINY, from cold and once more; the data is there before.

    The phases: `training`, `evaluation`; `statistics`, the passes of `measure`; `solving`, what is
    decomposed on the host; `amplitudes`, held-out losses; `reading`, functions traced to be read;
    `rooms`, all else of `grow`; `building`, the network, its units and its first weights;
    `counting`, of neurons and operations for the log.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    settings = {"dataset": "fashion_mnist", "batch_size": 64, "normalize": True, "num_seeds": 1}
    spec = grow_study.SPECS[name] | changes
    trial = grow_study.all_trials({name: spec}, ["tiny"], settings)[0]
    transfer_study.load(trial["dataset"], data_dir, trial["downscale"])
    found: dict[str, Any] = {"steps": trial["steps"]}
    for turn in ("cold", "again"):
        with Clock() as clock, clock.watching():
            result = grow_study.run(trial, data_dir)
        found[turn] = clock.summary()
        found |= {"growths": len(result["edits"]), "neurons": result["neurons"]}
    return found


# Rooms.


def compare_rooms(size: Size, data_dir: str | None) -> dict[str, Any]:
    """Runs the same growth with all `ROOMS` in turns, and times updates of all their shapes.

    Raises:
      RuntimeError: the runs have not grown alike.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ROOMS}
    for _ in range(size.rounds):
        for name, found in runs.items():
            found.append(in_fresh_process(growing_run, name, size, data_dir))
    first = {name: found[0] for name, found in runs.items()}
    neurons = first["exact"]["neurons"]
    if different := [name for name, run in first.items() if run["neurons"] != neurons]:
        raise RuntimeError(f"{', '.join(different)} have not grown as exact shapes have")
    shapes = {tuple(rooms.items()) for run in first.values() for rooms in run["rooms"]}
    times = in_fresh_process(race_shapes, sorted(shapes), size, data_dir)
    rooms = {}
    for name, found in runs.items():
        updates = [times[tuple(one.items())] for one in first[name]["rooms"]]
        every = {
            key: common.spread([run[key] for run in found])
            for key in ("seconds", "compile_seconds", "growing_seconds", "training_seconds")
        }
        rooms[name] = every | {
            "programs": first[name]["programs"],
            "programs_by_phase": first[name]["programs_by_phase"],
            "shapes": len({tuple(one.items()) for one in first[name]["rooms"]}),
            "step_milliseconds": 1e3 * float(np.mean([one.median for one in updates])),
            "update_seconds": updates,  # of every stretch between growths
            **{key: first[name][key] for key in ("flops", "rooms", "loss")},
        }
    for name, one in rooms.items():
        one["exact_wins_from"] = None if name == "exact" else break_even(one, rooms["exact"])
    return {"neurons": neurons, "updates": size.every * len(neurons), "rooms": rooms}


def growing_run(name: str, size: Size, data_dir: str | None) -> dict[str, Any]:
    """Grows the network on a graph with some rooms; building it does not count.

    Neurons are as many as asked for in every growth, so that all choices of rooms grow alike.
    """
    network, groups, trained, params, state = start(size, data_dir)
    if name == "all at the start":
        final = dict.fromkeys((one.name for one in groups), size.most)
        params, state = archscale.contrib.widen(params, final, groups, optimizer_state=state)
    schedule = archscale.contrib.GrowthSchedule(
        growths=size.growths, every=size.every, factor=size.factor, most=size.most
    )
    images, labels = trained
    held_out = tuple(array[-size.held_out :] for array in trained)
    generator = np.random.default_rng(0)
    count = len(images) - grow_study.HELD_OUT
    stretches, growths = [params], []
    with Clock() as clock, clock.watching():
        rates = dict.fromkeys(named_leaves(params), np.float32(size.rate))
        for update in range(size.every * (size.growths + 1)):
            if update and not update % size.every:
                chosen = generator.permutation(count)[: size.statistics]
                batch = images[chosen], labels[chosen]
                neurons = archscale.contrib.count_neurons(params, groups)
                numbers = archscale.contrib.choose_growth(schedule, len(growths), groups, neurons)
                units = [one for one in groups if one.name in numbers]
                growths.append((params, batch, units))
                growth = archscale.grow(
                    network.loss, params, [batch], held_out, units, number=numbers, threshold=0.0,
                    normalize=True, amplitudes=AMPLITUDES[1:], rooms=ROOMS[name],
                    optimizer_state=state,
                )  # fmt: skip
                params, state = growth.params, growth.optimizer_state
                stretches.append(params)
            chosen = generator.integers(count, size=size.batch_size)
            batch = images[chosen], labels[chosen]
            params, state, _ = grow_study.update(network.loss, params, state, batch, rates)
    return run_summary(clock.summary()) | {
        "flops": count_operations(network, groups, stretches, growths, size),
        "rooms": [rooms_of(one, groups) for one in stretches],
        "neurons": [archscale.contrib.count_neurons(one, groups) for one in stretches],
        "loss": float(network.loss(params, held_out)),
    }


def start(size: Size, data_dir: str | None) -> tuple[Network, grow_study.Units, Any, PyTree, Any]:
    """Returns the network on a graph, all training examples, its weights and optimizer's state."""
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    downscale = grow_study.SPECS["dag_cnn"]["downscale"]
    network, groups = grow_study.build("dag_cnn", "fashion_mnist", data_dir, downscale)
    data = network.dataset
    trained = np.asarray(data.train_images), np.asarray(data.train_labels)
    params = grow_study.create("dag_cnn", network, size.start_width, 0)
    return network, groups, trained, params, grow_study.create_optimizer().init(params)


def rooms_of(params: PyTree, units: Sequence[archscale.contrib.Units]) -> dict[str, int]:
    """Returns the rooms of units by name."""
    leaves = named_leaves(params)
    return {one.name: leaves[one.producers[0]].shape[-1] for one in units}


def run_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run of `growing_run` took; growing is all but training and compiling."""
    training = summary["phases"]["training"]["running"]
    programs = {name: phase["programs"] for name, phase in summary["phases"].items()}
    return {
        "seconds": summary["seconds"],
        "compile_seconds": summary["compile_seconds"],
        "training_seconds": training,
        "growing_seconds": summary["seconds"] - summary["compile_seconds"] - training,
        "programs": summary["programs"],
        "programs_by_phase": {name: count for name, count in programs.items() if count},
    }


def count_operations(
    network: Network,
    groups: grow_study.Units,
    stretches: list[PyTree],
    growths: list[Any],
    size: Size,
) -> dict[str, float]:
    """Counts operations of a run, and those that would be left without empty rooms."""
    found = {}
    data, examples = network.dataset, size.batch_size * size.every
    example = data.train_images[:1], data.train_labels[:1]
    for rooms, kept in (
        ("with_rooms", lambda params: params),
        ("without", lambda params: archscale.contrib.compact(params, groups)),
    ):
        found[f"training_{rooms}"] = sum(
            3 * examples * operations.forward_flops(network.loss, kept(params), example)
            for params in stretches
        )
        found[f"growing_{rooms}"] = sum(
            operations.growth_flops(
                network.loss, kept(params), batch, units, len(AMPLITUDES), size.held_out
            )
            for params, batch, units in growths
        )
    return found


def race_shapes(
    shapes: Sequence[tuple[tuple[str, int], ...]], size: Size, data_dir: str | None
) -> dict[tuple[tuple[str, int], ...], common.Spread]:
    """Times an update of networks with so many rooms, in turns; seconds."""
    network, groups, (images, labels), params, state = start(size, data_dir)
    batch = images[: size.batch_size], labels[: size.batch_size]
    rates = dict.fromkeys(named_leaves(params), np.float32(0))
    programs = {}
    for shape in shapes:
        wide = archscale.contrib.widen(params, dict(shape), groups, optimizer_state=state)
        programs[shape] = functools.partial(grow_study.update, network.loss, *wide, batch, rates)
    times = common.alternate(programs, rounds=size.step_rounds)
    return {shape: common.spread(sample) for shape, sample in times.items()}


def break_even(rooms: Mapping[str, Any], exact: Mapping[str, Any]) -> float | None:
    """From how many updates between growths exact shapes take less time; None for never."""
    saved = sum(
        exact[key].median - rooms[key].median for key in ("compile_seconds", "growing_seconds")
    )
    slower = sum(
        one.median - other.median
        for one, other in zip(rooms["update_seconds"], exact["update_seconds"], strict=True)
    )
    if saved <= 0:
        return 0.0
    return saved / slower if slower > 0 else None


# Tables.


def share_rows(runs: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of `cost_of_runs`."""
    rows = [["network", "seconds", *PHASES, "compiling", "once more, s", "compiled then"]]
    for name, run in runs.items():
        cold, again = run["cold"], run["again"]
        shares = [cold["phases"][phase]["running"] for phase in PHASES]
        shares = [*shares, cold["compile_seconds"]]
        rows.append(
            [
                name,
                f"{cold['seconds']:.1f}",
                *(f"{100 * share / cold['seconds']:.1f} %" for share in shares),
                f"{again['seconds']:.1f}",
                str(again["programs"]),
            ]
        )
    return rows


def program_rows(runs: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of the programs that took XLA longest in the runs, by their names."""
    rows = [["network", "program", "how many", "XLA, s"]]
    for name, run in runs.items():
        for program, one in run["cold"]["longest"].items():
            rows.append([name, program, str(one["programs"]), f"{one['XLA']:.2f}"])
    return rows


def compile_rows(runs: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of what was compiled in the runs, seconds."""
    rows = [["network", "phase", "programs", *STEPS.values(), "compiling, s", "running, s"]]
    for name, run in runs.items():
        cold = run["cold"]
        total: collections.Counter[str] = collections.Counter()
        for phase, values in cold["phases"].items():
            total.update(values)
            if values["programs"] or compile_seconds(values) > 0:
                rows.append([name, phase, *_compile_cells(values)])
        rows.append([name, "all", *_compile_cells(total)])
    return rows


def _compile_cells(values: Mapping[str, Any]) -> list[str]:
    steps = [f"{values[step]:.2f}" for step in STEPS.values()]
    last = f"{compile_seconds(values):.2f}", f"{values['running']:.2f}"
    return [str(values["programs"]), *steps, *last]


def rooms_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table of `compare_rooms`."""
    heading = ["rooms", "shapes", "programs", "compiling, s", "growing, s", "update, ms"]
    heading += [f"{part}, 10⁹ operations" for part in ("training", "growing")]
    rows = [[*heading, "total, s", "exact shapes win from"]]
    for name, one in results["rooms"].items():
        updates = one["exact_wins_from"]
        wins = "never" if updates is None else f"{updates:,.0f} updates"
        rows.append(
            [
                name,
                str(one["shapes"]),
                str(one["programs"]),
                *(f"{one[key]:.1f}" for key in ("compile_seconds", "growing_seconds")),
                f"{one['step_milliseconds']:.2f}",
                *(_operations_cell(one["flops"], part) for part in ("training", "growing")),
                f"{one['seconds']:.1f}",
                "" if name == "exact" else wins,
            ]
        )
    return rows


def _operations_cell(flops: Mapping[str, float], part: str) -> str:
    every, least = (flops[f"{part}_{rooms}"] for rooms in ("with_rooms", "without"))
    return f"{every / 1e9:.1f} (+{100 * (every / least - 1):.0f} %)"


if __name__ == "__main__":
    app.run(main)
