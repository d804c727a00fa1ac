"""What the binaries share: the flags of a network and its training, and what they build."""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from archscale_jax.rules import INITIALIZATION_RULES
from experiments.lab import display, files, interrupts, provenance, ranges, runners, training
from experiments.lab.data_flags import define_data_flags
from experiments.lab.datasets import Dataset, load
from experiments.lab.models import ACTIVATIONS, NORMALIZATIONS, create_network

FLAGS = flags.FLAGS

NOT_SETTINGS = ("workdir", "data_dir", "resume", "workers")
"""Flags that do not change what a run computes."""

PRECISIONS = {
    "mixed": {"dtype": jnp.bfloat16, "param_dtype": jnp.float32},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}
"""What a network computes in, and its parameters' dtype, where that is not float32."""


def define_flags(*, batch_size: int, epochs: float, workdir: str) -> None:
    """Defines the flags that say what is trained, on what, and how."""
    define_data_flags("digits")
    ranges.define("width", 128, "Features of every vertex.")
    ranges.define(
        "kernel_size", None, "Kernel size of a convolutional network; leave out for an MLP."
    )
    flags.DEFINE_enum("activation", "relu", list(ACTIVATIONS), "Activation.")
    flags.DEFINE_enum("normalization", "none", ["none", *NORMALIZATIONS], "Normalization.")
    flags.DEFINE_enum(
        "arrangement",
        "pre_activation",
        [str(arrangement) for arrangement in archscale.Arrangement],
        "What vertices sum; `activation` is the arrangement of the authors' code.",
    )
    ranges.define_rule(
        "initialization",
        "auto",
        "Initialization rule; auto takes the one that fits the arrangement.",
        INITIALIZATION_RULES,
        "auto",
    )
    flags.DEFINE_enum(
        "precision",
        None,
        list(PRECISIONS),
        "mixed: compute in bfloat16, train float32 weights; bfloat16: both. Leave out for float32.",
    )
    ranges.define(
        "base_architecture", "2", "DAG string of the network the rate is tuned on.", "architecture"
    )
    ranges.define("batch_size", batch_size, "Examples an update.")
    ranges.define("epochs", epochs, "Epochs; a fraction trains part of the last.")
    flags.DEFINE_bool("flip", False, "Augmentation: mirror half of the images.")
    ranges.define("padding", 0, "Augmentation: shift by up to so many pixels.")
    ranges.define("momentum", 0.0, "Momentum.")
    flags.DEFINE_bool("nesterov", False, "Nesterov's momentum.")
    ranges.define("weight_decay", 0.0, "Coupled weight decay.")
    flags.DEFINE_enum(
        "schedule",
        "constant",
        ["constant", "cosine"],
        "Learning rate over time; cosine falls to 0.",
    )
    ranges.define("warmup_steps", 0, "Updates of linear warm-up.", "steps_or_0")
    flags.DEFINE_string("workdir", workdir, "Folder for config, results and figures.")


def run_binary(run: Callable[[], None]) -> None:
    """Parses the flags and calls `run`.

    Bad input ends with one line that says what is wrong; with --verbosity=1 the traceback follows.
    Ctrl-C ends with one line that says what is kept and how to go on, and the status 130.
    """
    for module in (display.__name__, runners.__name__):  # --help shows these too
        for flag in FLAGS.flags_by_module_dict().get(module, ()):
            FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def main(arguments: list[str]) -> None:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs every step of a save
        if len(arguments) > 1:
            sys.exit(f"error: unknown arguments {arguments[1:]}; flags start with --, see --help")
        try:
            with interrupts.answered(_kept):
                run()
        except (ValueError, OSError, ImportError, runners.FailedTrialsError) as error:
            if logging.level_debug():
                raise
            sys.exit(f"error: {error}")

    app.run(main, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return FLAGS(arguments)
    except flags.Error as error:
        sys.exit(f"error: {error}; see --help")
    except SystemExit:  # absl has printed the help, and would end with 1
        sys.stdout.flush()
        sys.exit(0)


def _kept() -> str:
    """What an interrupted binary leaves, and the command that goes on."""
    command = provenance.command()
    workdir = pathlib.Path(FLAGS.workdir)
    if command not in [one["command"] for one in provenance.read_commands(workdir)[-1:]]:
        return "nothing was written"
    resume = " --resume" if "resume" in FLAGS and not FLAGS.resume else ""
    here = os.path.relpath(sys.executable)  # the environment may not be the shell's
    python = here if not here.startswith("..") else sys.executable
    again = provenance.command(python) + resume
    return f"what is finished is kept in {workdir}, go on with: {again}"


@functools.cache
def _hold(workdir: str) -> contextlib.ExitStack:
    """Keeps other processes off a folder until this one ends."""
    holding = contextlib.ExitStack()
    holding.enter_context(files.locked(pathlib.Path(workdir) / provenance.JOURNAL))
    return holding


def claim_directory(
    workdir: str | pathlib.Path, config: dict[str, Any], *, extensible: Sequence[str] = ()
) -> pathlib.Path:
    """`files.claim_directory`, with a line for this command in the folder's journal of them."""
    resumed = (pathlib.Path(workdir) / "config.json").exists()
    folder = files.claim_directory(workdir, config, extensible=extensible)
    _hold(os.path.abspath(folder))
    computes_here = "runner" not in FLAGS or FLAGS.runner in ("local", "devices")
    provenance.record_command(
        folder, resumed=resumed, devices=jax.devices() if computes_here else ()
    )
    return folder


def settings(module: str) -> dict[str, Any]:
    """Returns the values of the flags that decide what a run computes, by name.

    Args:
      module: name of the binary's module (`sys.argv[0]` under absl), whose own flags count too.
    """
    by_module = FLAGS.flags_by_module_dict()
    names = (module, __name__)
    values = {flag.name: flag.value for name in names for flag in by_module.get(name, ())}
    return {name: values[name] for name in sorted(values) if name not in NOT_SETTINGS}


def load_dataset() -> Dataset:
    """Loads the data set of the flags, and tells what it is.

    Raises:
      ValueError: a --padding or a --batch_size that it is too small for.
    """
    dataset = load(FLAGS.dataset, data_dir=FLAGS.data_dir)
    check_padding(dataset, FLAGS.padding)
    examples = len(dataset.train_images)
    if FLAGS.batch_size > examples:
        raise ValueError(
            f"--batch_size={FLAGS.batch_size} exceeds the {examples} training examples; lower it"
        )
    display.note(f"{dataset!r}")
    return dataset


def check_padding(dataset: Dataset, padding: int) -> None:
    """Raises ValueError where images would be shifted out of sight."""
    height, width = dataset.train_images.shape[1:3]
    if padding > min(height, width):
        raise ValueError(
            f"--padding={padding} exceeds the images, {height} x {width} pixels; lower it"
        )


def check_training(network: "Network", total_steps: int) -> None:
    """Checks that the flags make an optimizer and draw weights, before anything is written.

    Raises:
      ValueError: --nesterov without --momentum, a warm-up as long as the training, or an
        --initialization that does not fit the network.
    """
    optimizer = build_optimizer(1.0, total_steps)
    jax.eval_shape(lambda seed: initial_state(network, optimizer, seed).params, 0)


def parse_graph(text: str) -> jraph.GraphsTuple:
    """Parses a DAG string with the kernel size of the flags."""
    return archscale.dag_graph(text, kernel_size=FLAGS.kernel_size)


class Network(NamedTuple):
    """A Flax network taken apart, with its architecture."""

    graphdef: nnx.GraphDef
    params: PyTree
    model_state: PyTree
    architecture: archscale.Architecture


def build_network(graph: jraph.GraphsTuple, dataset: Dataset) -> Network:
    """Builds the network of a graph for a data set, as the flags say."""
    height, width, channels = dataset.train_images.shape[1:]
    network = create_network(
        graph,
        (height, width, channels),
        FLAGS.width,
        dataset.num_classes,
        activation=FLAGS.activation,
        normalization=None if FLAGS.normalization == "none" else FLAGS.normalization,
        arrangement=FLAGS.arrangement,
        rngs=nnx.Rngs(0),
        **PRECISIONS.get(FLAGS.precision, {}),
    )
    graphdef, params, model_state = nnx.split(network, nnx.Param, ...)
    return Network(graphdef, params, model_state, network.architecture())


def build_optimizer(learning_rate: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns SGD with the schedule, momentum and weight decay of the flags."""
    schedule = training.create_schedule(
        learning_rate, total_steps, kind=FLAGS.schedule, warmup_steps=FLAGS.warmup_steps
    )
    return training.create_optimizer(
        schedule,
        momentum=FLAGS.momentum,
        nesterov=FLAGS.nesterov,
        weight_decay=FLAGS.weight_decay,
    )


def rate_grid() -> list[float]:
    """Returns the log grid of --min_rate, --max_rate and --num_rates.

    Raises:
      ValueError: rates in another order.
    """
    if FLAGS.min_rate >= FLAGS.max_rate:
        raise ValueError(
            f"--min_rate={FLAGS.min_rate:g} must be below --max_rate={FLAGS.max_rate:g}"
        )
    return np.geomspace(FLAGS.min_rate, FLAGS.max_rate, FLAGS.num_rates).tolist()


def first_batch(dataset: Dataset, batch_size: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns the batch on which a seed is measured."""
    key = jax.random.key(seed)
    examples = len(dataset.train_images)
    chosen = jax.random.choice(key, examples, (batch_size,), replace=False)
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def measurer(
    graphdef: nnx.GraphDef, model_state: PyTree, optimizer: optax.GradientTransformation
) -> Callable[[PyTree, Any], archscale.tuning.UpdateSize]:
    """Returns the jitted function of params and batch that measures one update of a network."""

    def features(params, batch):
        return training.vertex_features(graphdef, params, model_state, batch[0])

    def loss(params, batch):
        return training.cross_entropy(graphdef, params, model_state, *batch, train=True)[0]

    return jax.jit(
        lambda params, batch: archscale.measure_update(features, loss, params, batch, optimizer)
    )


def measure_seeds(
    measure: Callable[[PyTree, Any], PyTree],
    draw: Callable[[int], PyTree],
    batches: Iterable[Any],
) -> PyTree:
    """Measures the params that `draw` gives the seeds 0, 1, …, each on its batch; stacked."""
    sizes = [measure(draw(seed), batch) for seed, batch in enumerate(batches)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sizes)


def count_steps(dataset: Dataset, epochs: float) -> int:
    """Returns the number of updates in so many epochs of the flags' batch size.

    Raises:
      ValueError: see `training.count_steps`.
    """
    return training.count_steps(len(dataset.train_images), FLAGS.batch_size, epochs)


def initial_state(
    network: Network, optimizer: optax.GradientTransformation, seed: int
) -> training.TrainState:
    """Draws the initial weights of a seed by the rule of the flags."""
    weights_key, batches_key = jax.random.split(jax.random.key(seed))
    rule = None if FLAGS.initialization == "auto" else FLAGS.initialization
    params = archscale.initialize(weights_key, network.params, network.architecture, rule)
    return training.create_train_state(params, network.model_state, optimizer, batches_key)


def fit(
    state: training.TrainState,
    dataset: Dataset,
    network: Network,
    optimizer: optax.GradientTransformation,
    total_steps: int,
) -> Iterator[tuple[training.TrainState, dict[str, float]]]:
    """`training.fit` with batches and augmentation of the flags."""
    return training.fit(
        state,
        dataset,
        graphdef=network.graphdef,
        optimizer=optimizer,
        batch_size=FLAGS.batch_size,
        total_steps=total_steps,
        flip=FLAGS.flip,
        padding=FLAGS.padding,
    )


def rate_trainer(
    create_state: Callable[[optax.GradientTransformation, int], training.TrainState],
    create_optimizer: Callable[[Any], optax.GradientTransformation],
    dataset: Dataset,
    **options: Any,
) -> Callable[[float, int], Iterator[float]]:
    """Returns what trains a network at a rate with a seed, yielding losses; compiled once.

    Args:
      create_state: from the optimizer and a seed to the initial state, kept for other rates.
      create_optimizer: from a rate to the optimizer.
      dataset: see `training.train_losses`.
      **options: see `training.train_losses`.
    """
    optimizer = optax.inject_hyperparams(lambda rate: create_optimizer(rate))(rate=1.0)
    start = functools.cache(functools.partial(create_state, optimizer))

    def train(rate: float, seed: int) -> Iterator[float]:
        state = start(seed)
        state = state._replace(optimizer_state=optax.tree.set(state.optimizer_state, rate=rate))
        return training.train_losses(state, dataset, optimizer=optimizer, **options)

    return train


def markdown_table(lines: list[list[str]]) -> str:
    """Returns a table as Markdown: its heading is the first line, its first column text."""
    alignment = ["---", *["---:"] * (len(lines[0]) - 1)]
    rows = [lines[0], alignment, *lines[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
