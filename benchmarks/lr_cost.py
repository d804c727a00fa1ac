"""What does a learning rate cost? `python -m benchmarks.lr_cost`, several minutes.

* Of a network: by measuring one update, by an adaptive search, by the full grid. Seconds after
  compilation, and the error against the grid. Goals: at most 1/500 and 1/5 of the grid.
* Of compiling: one program for each network, which all rates and seeds share, against one program
  for a whole space with its operators chosen at run time.
* Of a step, against PyTorch in an environment of its own, which this benchmark makes.
"""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from archscale_jax import datasets, training
from archscale_jax.architecture import named_leaves
from archscale_jax.models import create_network
from benchmarks import common
from experiments import transfer_study as study
from experiments.common import measurer

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "dataset", None, datasets.DATASET_NAMES, "Default: fashion_mnist, or digits where it is absent."
)
flags.DEFINE_string("data_dir", None, "Folder of the data set; see README, Data.")
flags.DEFINE_string("architecture", archscale.chain_string(4), "DAG string of the first network.")
flags.DEFINE_bool("quick", False, "Try everything at a tiny size; times say nothing, none is kept.")
flags.DEFINE_bool("torch", True, "Compare with PyTorch.")

RANDOM_DAG = "2_02_011_1222"
GOALS = {"measured": 1 / 500, "adaptive": 1 / 5}
MARGIN = 0.05  # of the adaptive search
SPACE = (6, 5)  # networks and their vertices
TORCH = "2.13.0"
TORCH_ENV = pathlib.Path(__file__).parents[1] / "build" / "torch-env"
RATE = 0.1  # where times and losses of two programs are compared; a wrong update shows
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # the rate is state: one program


class Size(NamedTuple):
    """How much is done; see `--quick`."""

    width: int = 128
    batch: int = 256
    max_steps: int | None = None  # None: one epoch
    seeds: int = 3
    rounds: int = 15
    mlp_steps: int = 100
    cnn_steps: int = 5
    cnn_width: int = 32
    cnn_batch: int = 128


QUICK = Size(32, 32, 5, 2, 2, 5, 5, 4, 8)


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    size = QUICK if FLAGS.quick else Size()
    name = FLAGS.dataset or _present_dataset()
    dataset = study.load(name, FLAGS.data_dir, 1)
    epoch = len(dataset.train_images) // size.batch
    settings = study.DEFAULTS | {
        "dataset": name,
        "downscale": 1,
        "kernel_size": None,
        "width": size.width,
        "batch_size": size.batch,
        "steps": min(size.max_steps or epoch, epoch),
        "seeds": size.seeds,
    }
    console = Console(width=150)
    rates = cost_of_rates([FLAGS.architecture, RANDOM_DAG], settings)
    console.print(rates_table(rates))
    space = cost_of_compiling(settings, size)
    console.print(space_table(space))
    torch = against_torch(size) if FLAGS.torch else {"skipped": "--notorch"}
    console.print(torch_table(torch))
    results = {"settings": settings, "goals": GOALS, "rates": rates, "space": space, "torch": torch}
    if FLAGS.quick:
        return
    path = common.write_results("lr_cost", results, "flax", "optax")
    console.print(f"results: {path.relative_to(path.parents[2])}")


def _present_dataset() -> str:
    try:
        study.load("fashion_mnist", FLAGS.data_dir, 1)
    except FileNotFoundError:
        return "digits"
    return "fashion_mnist"


class Compilations:
    """Counts the programs that XLA compiles inside a `with`."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == COMPILE_EVENT

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def cost_of_rates(architectures: list[str], settings: study.Trial) -> dict[str, Any]:
    """Compares three ways to a learning rate, one network after the other.

    The rate of the base network is searched once, by the same grid, and is not counted. Nor is
    building the networks, which training needs anyway.
    """
    low, high = study.RATES["sgd"]
    rates = np.geomspace(low, high, round(math.log2(high / low)) + 1).tolist()

    def search(trial: study.Trial, **options) -> tuple[archscale.RateSearch, dict[str, Any]]:
        train = study.trainer(trial, study.build(trial, FLAGS.data_dir))
        # A rate that is not lost, so that every part of a run is compiled.
        first, again = (_timed(lambda: list(train(rates[0], 0)))[1] for _ in range(2))
        for seed in range(1, trial["seeds"]):
            next(iter(train(rates[0], seed)))  # draws the weights
        with Compilations() as compilations:
            found, seconds = _timed(
                lambda: archscale.find_learning_rate(
                    train, rates, seeds=range(trial["seeds"]), max_loss=100.0, **options
                )
            )
        return found, {
            "rate": found.rate,
            "seconds": seconds,
            "compile_seconds": first - again,
            "compilations_while_timed": compilations.count,
            "runs": len(found.runs),
        }

    base = settings | {"architecture": study.BASE}
    base_found, base_cost = search(base)
    networks = {}
    for text in architectures:
        trial = settings | {"architecture": text}
        measured, predicted = cost_of_measuring(trial, base, base_found.rate)
        grid, full = search(trial)
        _, adaptive = search(trial, start=predicted, margin=MARGIN, refine=0)
        adaptive["seconds"] += measured["seconds"]  # its start
        networks[text] = {
            "uncertainty": grid.uncertainty,
            "ways": {"measured": measured, "adaptive": adaptive, "grid": full},
        }
        for cost in networks[text]["ways"].values():
            cost["error"] = math.log(cost["rate"] / grid.rate)
            cost["part_of_grid"] = cost["seconds"] / full["seconds"]
    return {"base": base_cost, "networks": networks}


def cost_of_measuring(
    trial: study.Trial, base: study.Trial, base_rate: float
) -> tuple[dict[str, Any], float]:
    """Times `measure_update` of both networks, for all seeds, and `predict_learning_rate`."""
    measure = [_measure(one) for one in (trial, base)]

    def predict() -> float:
        return archscale.predict_learning_rate(measure[0](), measure[1](), base_rate)

    first = _timed(predict)[1]
    with Compilations() as compilations:
        times = [_timed(predict) for _ in range(20)]
    seconds = common.spread([seconds for _, seconds in times])
    return {
        "rate": times[0][0],
        "seconds": seconds.median,
        "spread": seconds,
        "compile_seconds": first - seconds.median,
        "compilations_while_timed": compilations.count,
        "runs": 0,
    }, times[0][0]


def _measure(trial: study.Trial) -> Callable[[], archscale.UpdateSize]:
    """Returns what draws weights and a batch for every seed and measures an update."""
    network = study.build(trial, FLAGS.data_dir)
    images, labels = network.dataset.train_images, network.dataset.train_labels
    measured = measurer(network.graphdef, network.draw(0)[1], network.optimizer(1.0))

    def measure() -> archscale.UpdateSize:
        sizes = []
        for seed in range(trial["seeds"]):
            generator = np.random.default_rng(seed)
            batch = generator.choice(len(images), trial["batch_size"], replace=False)
            sizes.append(measured(network.draw(seed)[0], (images[batch], labels[batch])))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *sizes)

    return measure


def _timed(program: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(program())
    return result, time.perf_counter() - start


def space_loss(params, operators, images, labels):
    """The loss of `DagMLP` on any graph of a space.

    Args:
      params: `kernel_0`, `bias_0` of the stem, `kernels` [E, width, width] and `biases` [E, width]
        of the edges of the complete graph by receiver and sender, `kernel_1`, `bias_1` of the
        readout.
      operators: int32 [E] by the characters of DAG strings: zero, skip, weight.
    """
    branches = (
        lambda features, activated, kernel, bias: jnp.zeros_like(features),
        lambda features, activated, kernel, bias: features,
        lambda features, activated, kernel, bias: activated @ kernel + bias,
    )
    first = images.reshape(len(images), -1) @ params["kernel_0"] + params["bias_0"]
    vertices, activated, edge = [first], [jax.nn.relu(first)], 0
    while edge < len(operators):
        total = jnp.zeros_like(first)
        for sender in range(len(vertices)):
            weights = params["kernels"][edge], params["biases"][edge]
            total += lax.switch(
                operators[edge], branches, vertices[sender], activated[sender], *weights
            )
            edge += 1
        vertices.append(total)
        activated.append(jax.nn.relu(total))
    logits = activated[-1] @ params["kernel_1"] + params["bias_1"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def space_epoch(params, operators, rate, images, labels, batches):
    """Trains any graph of a space; returns the loss of every update, taken before it."""

    def step(params, batch):
        loss, gradients = jax.value_and_grad(space_loss)(
            params, operators, images[batch], labels[batch]
        )
        return jax.tree.map(lambda value, slope: value - rate * slope, params, gradients), loss

    return lax.scan(step, params, batches)[1]


def cost_of_compiling(settings: study.Trial, size: Size) -> dict[str, Any]:
    """Compares a program for each network with one for all, over the networks of a space."""
    texts = study.random_dags(SPACE[0], SPACE[1:], 3000)
    dataset = study.load(settings["dataset"], FLAGS.data_dir, 1)
    data = (dataset.train_images, dataset.train_labels)
    order = np.random.default_rng(0).permutation(len(data[0]))[: settings["steps"] * size.batch]
    batches = jnp.asarray(order.reshape(-1, size.batch))
    networks = {}
    space: Any = None
    space_cost: dict[str, Any] = {}
    for text in texts:
        network = study.build(settings | {"architecture": text}, FLAGS.data_dir)
        state = training.create_train_state(*network.draw(0), SGD, jax.random.key(0))
        arguments = space_params(state.params, SPACE[1], size.width)
        operators = jnp.asarray([int(character) for character in text.replace("_", "")])
        if space is None:
            lowered = functools.partial(space_epoch.lower, arguments, operators, jnp.float32(0))
            space, space_cost = _compiled(lambda lower=lowered: lower(*data, batches))
        lower = functools.partial(
            training.jitted_train_batches.lower, state, *data, batches, jnp.int32(0)
        )
        own, cost = _compiled(
            lambda lower=lower, graphdef=network.graphdef: lower(graphdef=graphdef, optimizer=SGD)
        )
        starts = [_start(network, rate, seed) for rate in (RATE / 2, RATE) for seed in (1, 0)]
        with Compilations() as further:
            losses = [own(start, *data, batches, jnp.int32(0))[1] for start in starts][-1]
        shared = functools.partial(space, arguments, operators, jnp.float32(RATE), *data, batches)
        difference = np.abs(np.asarray(shared()) / np.asarray(losses) - 1)
        if not difference[:5].max() < 1e-5:
            raise RuntimeError(f"{text}: losses of both programs differ by {difference[:5]}")
        times = common.alternate(
            {
                "own": functools.partial(own, starts[-1], *data, batches, jnp.int32(0)),
                "space": shared,
            },
            rounds=2 if FLAGS.quick else 5,
        )
        networks[text] = cost | {
            "compilations_for_other_rates_and_seeds": further.count,
            "largest_difference_of_losses": difference.max(),
            "epoch_seconds": {name: common.spread(values) for name, values in times.items()},
        }
    ahead = sum(one["compile_seconds"] for one in networks.values()) - space_cost["compile_seconds"]
    saved = sum(
        one["epoch_seconds"]["space"].median - one["epoch_seconds"]["own"].median
        for one in networks.values()
    )
    return {
        "networks": networks,
        "space": space_cost,
        "seconds_saved_by_an_epoch_of_each": saved,
        # 0: specialising is ahead from the start; None: it never gets ahead.
        "break_even_epochs_of_each": max(ahead, 0.0) / saved if saved > 0 else None,
    }


def space_params(params, vertices: int, width: int) -> dict[str, jax.Array]:
    """Puts the weights of a `DagMLP` into those of the complete graph; the others are 0."""
    leaves = named_leaves(params)
    edges = [f"{sender}_{vertex}" for vertex in range(1, vertices) for sender in range(vertex)]

    def stacked(leaf: str, shape: tuple[int, ...]) -> jax.Array:
        names = (f"layers/{edge}/{leaf}" for edge in edges)
        return jnp.stack([leaves[name] if name in leaves else jnp.zeros(shape) for name in names])

    ends = {
        f"{leaf}_{number}": leaves[f"{layer}/{leaf}"]
        for number, layer in enumerate(("stem", "readout"))
        for leaf in ("kernel", "bias")
    }
    return ends | {
        "kernels": stacked("kernel", (width, width)),
        "biases": stacked("bias", (width,)),
    }


def _compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    with Compilations() as compilations:
        program, seconds = _timed(lambda: lower().compile())
    return program, {"compile_seconds": seconds, "compilations": compilations.count}


def _start(network: study.Network, rate: float, seed: int) -> training.TrainState:
    state = training.create_train_state(*network.draw(seed), SGD, jax.random.key(0))
    optimizer_state = optax.tree.set(state.optimizer_state, learning_rate=jnp.float32(rate))
    return state._replace(optimizer_state=optimizer_state)


def against_torch(size: Size) -> dict[str, Any]:
    """Times steps of ours and of PyTorch in turns, on the same data from the same weights."""
    try:
        python = torch_python()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return {"skipped": f"torch=={TORCH} cannot be installed: {lines[-1] if lines else error}"}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mlp = (None, size.width, size.batch, size.mlp_steps)
    cnn = (3, size.cnn_width, size.cnn_batch, size.cnn_steps)
    with tempfile.TemporaryDirectory() as folder:
        programs, orders = {}, {}
        for name, case in {"MLP": mlp, "CNN": cnn}.items():
            path = pathlib.Path(folder) / f"{name}.npz"
            programs[name] = our_steps(*case, path=path)
            orders[name] = {"arrays": str(path), "rate": RATE, "channels_last": False}
        orders["CNN, channels last"] = orders["CNN"] | {"channels_last": True}
        command = [str(python), str(pathlib.Path(__file__).with_name("torch_step.py"))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            results = _ask(server, {"threads": threads, "cases": orders})
            results["cases"] = {
                name: race(
                    server,
                    programs[name],
                    [order for order in orders if order.startswith(name)],
                    steps,
                    size.rounds,
                )
                for name, steps in {"MLP": size.mlp_steps, "CNN": size.cnn_steps}.items()
            }
            assert server.stdin is not None
            server.stdin.close()
    # Without the project's convolution, in a loop: too slow to take turns.
    stock = our_steps(3, size.cnn_width, size.cnn_batch, 2, stock=True)
    results["cases"]["CNN"]["milliseconds"]["ours, lax.conv_general_dilated"] = common.spread(
        [common.seconds(stock) / 2 * 1e3]
    )
    return results


def torch_python() -> pathlib.Path:
    """Returns the Python of the environment with PyTorch, made on the first call.

    Raises:
      OSError, subprocess.CalledProcessError: it cannot be made.
    """
    python = TORCH_ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    check = [str(python), "-c", "import numpy, torch; print(torch.__version__)"]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    try:
        if run(check).stdout.startswith(TORCH):
            return python
    except (OSError, subprocess.CalledProcessError):
        pass  # not there, or not whole
    run([sys.executable, "-m", "venv", "--clear", str(TORCH_ENV)])
    run([str(python), "-m", "pip", "install", "--quiet", f"torch=={TORCH}", "numpy"])
    run(check)
    return python


def our_steps(
    kernel_size: int | None,
    width: int,
    batch: int,
    steps: int,
    *,
    path: pathlib.Path | None = None,
    stock: bool = False,
) -> Callable[[], jax.Array]:
    """Returns compiled steps of a chain of four layers, from its initial weights to the losses.

    Args:
      kernel_size: None for `DagMLP`.
      width: features of every vertex.
      batch: examples an update.
      steps: updates of a call.
      path: where data and weights are written for `benchmarks/torch_step.py`.
      stock: convolve as Flax does by default.
    """
    graph = archscale.dag_graph(archscale.chain_string(4), kernel_size=kernel_size)
    model = create_network(graph, (28, 28, 1), width, 10, rngs=nnx.Rngs(0))
    layers: list[Any] = [model.stem, *model.layers.values()]
    if stock:
        for layer in layers:
            layer.conv_general_dilated = lax.conv_general_dilated
    generator = np.random.default_rng(0)
    images = generator.standard_normal((8192, 28, 28, 1), np.float32)
    labels = generator.integers(0, 10, 8192, np.int32)
    batches = generator.integers(0, 8192, (steps, batch), np.int32)
    if path is not None:
        weights: dict[str, Any] = {}
        for number, layer in enumerate([*layers, cast(Any, model.readout)]):
            weights[f"kernel_{number}"] = np.asarray(layer.kernel[...])
            weights[f"bias_{number}"] = np.asarray(layer.bias[...])
        np.savez(path, images=images, labels=labels, batches=batches, **weights)
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(RATE)
    state = training.create_train_state(params, model_state, optimizer, jax.random.key(0))
    arguments = (state, *map(jnp.asarray, (images, labels, batches)), jnp.int32(0))
    lower = functools.partial(training.jitted_train_batches.lower, *arguments)
    program = lower(graphdef=graphdef, optimizer=optimizer).compile()
    return lambda: program(*arguments)[1]


def race(
    server: subprocess.Popen,
    ours: Callable[[], jax.Array],
    names: list[str],
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Times ours and the cases of the server in turns; the first round is not counted.

    Raises:
      RuntimeError: the losses differ.
    """
    times: dict[str, list[float]] = {"ours": [], **{f"PyTorch, {name}": [] for name in names}}
    difference = 0.0
    for current in range(-1, rounds):
        losses, seconds = _timed(ours)
        answers = [({"seconds": seconds}, "ours")]
        for name in names:
            answer = _ask(server, {"case": name, "steps": steps})
            answers.append((answer, f"PyTorch, {name}"))
            apart = np.abs(np.asarray(answer["losses"]) / np.asarray(losses) - 1)
            if not apart[:5].max() < 1e-5:
                raise RuntimeError(f"{name}: losses of ours and of PyTorch differ by {apart[:5]}")
            difference = max(difference, float(apart.max()))
        if current >= 0:
            for answer, name in answers:
                times[name].append(answer["seconds"] / steps * 1e3)
    fastest = min((name for name in times if name != "ours"), key=lambda one: np.median(times[one]))
    return {
        "milliseconds": {name: common.spread(values) for name, values in times.items()},
        "ratio_to_fastest_of_torch": common.ratio(times["ours"], times[fastest]),
        "steps": steps,
        "rounds": rounds,
        "largest_difference_of_losses": difference,
    }


def _ask(server: subprocess.Popen, order: dict[str, Any]) -> dict[str, Any]:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"benchmarks/torch_step.py ended with status {server.wait()}")
    return json.loads(answer)


def rates_table(results: dict[str, Any]) -> Table:
    """Returns the table of `cost_of_rates`."""
    base = results["base"]
    table = Table(
        title="Seconds to a learning rate",
        caption=f"The base rate {base['rate']:.3g} was searched before ({base['seconds']:.1f} s, "
        "not counted). compiling: first call - later call. Goals of the part: "
        + ", ".join(f"{name} <= 1/{1 / goal:.0f}" for name, goal in GOALS.items())
        + ". adaptive counts the measurement that it starts from.",
    )
    for column in ("network", "way", "rate", "error, nats", "runs", "seconds", "compiling, s"):
        table.add_column(column, justify="left" if column in ("network", "way") else "right")
    table.add_column("part of the grid", justify="right")
    for text, network in results["networks"].items():
        for name, cost in network["ways"].items():
            error = f"{cost['error']:+.2f}"
            table.add_row(
                text,
                name,
                f"{cost['rate']:.3g}",
                f"± {network['uncertainty']:.2f}" if name == "grid" else error,
                str(cost["runs"]),
                f"{cost.get('spread', cost['seconds']):.3g}",
                f"{cost['compile_seconds']:.2f}",
                f"1/{1 / cost['part_of_grid']:.4g}",
            )
    return table


def space_table(results: dict[str, Any]) -> Table:
    """Returns the table of `cost_of_compiling`."""
    networks = results["networks"].values()
    own = sum(one["compilations"] for one in networks)
    epochs = results["break_even_epochs_of_each"]
    table = Table(
        title="A program for each network, or one for its space",
        caption=f"{own} compilations for {len(networks)} networks, "
        f"{sum(one['compilations_for_other_rates_and_seeds'] for one in networks)} more for other "
        f"rates and seeds; {results['space']['compilations']} for the space. Specialising is ahead "
        + ("never." if epochs is None else f"from {epochs:.2g} epochs of each network on."),
    )
    for column in ("network", "compiling, s", "epoch, own, s", "epoch, space, s", "largest diff."):
        table.add_column(column, justify="right")
    for text, one in results["networks"].items():
        times = [f"{one['epoch_seconds'][name]:.3g}" for name in ("own", "space")]
        difference = f"{one['largest_difference_of_losses']:.1e}"
        table.add_row(text, f"{one['compile_seconds']:.2f}", *times, difference)
    table.add_row("the space", f"{results['space']['compile_seconds']:.2f}", "", "", "")
    return table


def torch_table(results: dict[str, Any]) -> Table:
    """Returns the table of `against_torch`, or why there is none."""
    if "skipped" in results:
        return Table(title=f"PyTorch: skipped, {results['skipped']}")
    table = Table(
        title=f"Milliseconds of a training step, PyTorch {results['torch']}, "
        f"{results['threads']} threads",
        caption="; ".join(
            f"{name}: ours / fastest PyTorch {case['ratio_to_fastest_of_torch']:.2f}, losses "
            f"differ by at most {case['largest_difference_of_losses']:.0e}"
            for name, case in results["cases"].items()
        ),
    )
    for column in ("network", "program", "median (quartiles)"):
        table.add_column(column)
    for name, case in results["cases"].items():
        for program, times in case["milliseconds"].items():
            table.add_row(name, program, f"{times:.3g}")
    return table


if __name__ == "__main__":
    app.run(main)
