"""What the binaries share: the flags of a network and its training, start and end, measuring."""

import contextlib
import difflib
import functools
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from archscale_jax.rules import INITIALIZATION_RULES
from experiments.lab import (
    display,
    files,
    grouped_help,
    interrupts,
    provenance,
    ranges,
    runners,
    training,
)
from experiments.lab.data_flags import define_data_flags
from experiments.lab.datasets import Dataset
from experiments.lab.models import ACTIVATIONS, NORMALIZATIONS

FLAGS = flags.FLAGS

NOT_SETTINGS = ("workdir", "data_dir", "resume", "workers")
"""Flags that do not change what a run computes."""


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
        ["mixed", "bfloat16"],
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
            logging.set_verbosity(logging.ERROR if FLAGS.quiet else logging.WARNING)
            logging.get_absl_handler().setFormatter(None)  # the sentence alone, as of notes
            logging.get_absl_logger().setLevel("CRITICAL")  # orbax logs, and raises what it logs
        if len(arguments) > 1:
            sys.exit(f"error: unknown arguments {arguments[1:]}; flags start with --, see --help")
        try:
            with interrupts.answered(_kept):
                run()
                sys.stdout.flush()
        except SystemExit as ended:  # with 1: Rich's answer where nobody reads what it prints
            sys.exit(ended.code if ended.code != 1 else f"error: {_told(BrokenPipeError())}")
        except _TOLD as error:
            if logging.level_debug():
                raise
            with contextlib.suppress(OSError):  # what cannot be written would be tried again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(f"error: {_told(error)}")

    for stream in (sys.stdout, sys.stderr):  # a locale may lack the letters of a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app.run(main, flags_parser=_parse_flags)


_TOLD = (
    *(ValueError, OSError, ImportError, MemoryError, jax.errors.JaxRuntimeError),
    runners.FailedTrialsError,
)


def _told(error: Exception) -> str:
    if isinstance(error, BrokenPipeError):
        return f"standard output was closed; what is finished is kept in {FLAGS.workdir}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory ({error}); take smaller networks or batches, or fewer --workers"
    return str(error)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        if "--help" in arguments:
            sys.stdout.write(grouped_help.text(sys.modules["__main__"].__doc__ or ""))
            sys.exit()
        return FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: unknown flag --{error.flagname}{_akin(error.flagname)}; see --help")
    except flags.Error as error:
        sys.exit(f"error: {error}; see --help")
    except SystemExit:  # absl has printed the help, and would end with 1
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(0)


def _akin(unknown: str) -> str:
    """The flags of the binary that are spelled like an unknown one, or have a word of it."""
    names = [flag.name for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    words, close = set(unknown.split("_")), difflib.get_close_matches(unknown, names)
    akin = [f"--{name}" for name in names if name in close or words & set(name.split("_"))]
    return f"; there is {', '.join(sorted(akin))}" if akin else ""


def _kept() -> str:
    """What an interrupted binary leaves, and the command that goes on."""
    workdir = pathlib.Path(FLAGS.workdir)
    if not _hold.cache_info().currsize:  # nor has it been claimed
        return "nothing was written"
    here = os.path.relpath(sys.executable)  # the environment may not be the shell's
    python = here if not here.startswith("..") else sys.executable
    again = provenance.command(python)
    if not _holds_results(workdir):
        return f"nothing is finished yet in {workdir}, begin again with: {again}"
    return f"what is finished is kept in {workdir}, go on with: {again}"


def _holds_results(workdir: pathlib.Path) -> bool:
    """Whether a folder has a record of its journals, or a checkpoint."""
    saved = (*workdir.glob("checkpoints/*.json"), *workdir.glob("checkpoints/*/*.json"))
    journals = (one for one in workdir.glob("*.jsonl") if one.name != provenance.JOURNAL)
    return bool(saved) or any(one.stat().st_size for one in journals)


@functools.cache
def _hold(workdir: str) -> contextlib.ExitStack:
    """Keeps other processes off a folder until this one ends."""
    holding = contextlib.ExitStack()
    holding.enter_context(files.locked(pathlib.Path(workdir) / provenance.JOURNAL))
    return holding


def claim_directory(
    workdir: str | pathlib.Path, config: dict[str, Any], *, extensible: Sequence[str] = ()
) -> pathlib.Path:
    """`files.claim_directory`, once no other process has the folder.

    The folder's journal of commands gets a line for this one.
    """
    try:
        str(workdir).encode()  # orbax takes text alone
    except UnicodeEncodeError:
        raise ValueError(
            f"--workdir={str(workdir)!a} is not text in the encoding "
            f"{sys.getfilesystemencoding()}; choose another, or set LC_ALL=C.UTF-8"
        ) from None
    try:
        _hold(os.path.abspath(workdir))
        resumed = (pathlib.Path(workdir) / "config.json").exists()
        folder = files.claim_directory(workdir, config, extensible=extensible)
    except ValueError:
        _check_study(pathlib.Path(workdir))  # more to the point than a list of flags
        raise
    except OSError as error:
        text = f"{error.strerror}; choose another --workdir"
        raise OSError(error.errno, text, error.filename) from error
    computes_here = "runner" not in FLAGS or FLAGS.runner in ("local", "devices")
    devices = jax.devices() if computes_here else ()
    try:
        provenance.record_command(folder, resumed=resumed, devices=devices)
        provenance.read_commands(folder)
    except ValueError as error:  # a mere log, of which the page will say the same
        display.note(f"{error}; the study goes on all the same")
    return folder


def _check_study(workdir: pathlib.Path) -> None:
    """Raises ValueError where the commands that worked in a folder were of another binary."""
    try:
        commands = provenance.read_commands(workdir)
    except ValueError:
        return
    studies = [provenance.study_of(one["command"]) for one in commands]
    own = provenance.study_of(provenance.command())
    if studies and own not in studies:
        raise ValueError(
            f"{workdir} holds a run of {studies[-1]}, not of {own}; choose another --workdir"
        ) from None


def check_length(
    workdir: str | pathlib.Path, config: dict[str, Any], lengths: Sequence[str], reason: str
) -> None:
    """Checks that a folder holds no run that differs in its length alone.

    Args:
      workdir: the folder, which may be missing.
      config: see `claim_directory`.
      lengths: the settings that say how long a run is.
      reason: why none of another length can go on.

    Raises:
      ValueError: it holds one; the message has the reason.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        return
    both = files.read_config(path), json.loads(json.dumps(config))
    others = ({k: v for k, v in one.items() if k not in lengths} for one in both)
    if (different := files.different_settings(*both)) and not files.different_settings(*others):
        raise ValueError(
            f"{workdir} holds a run with {different}, and {reason}; choose another --workdir"
        )


def settings(*modules: str) -> dict[str, Any]:
    """Returns the values of the flags that decide what a run computes, by name.

    Args:
      *modules: whose flags count beside those of `define_flags`: the binary's, `sys.argv[0]`.
    """
    by_module = FLAGS.flags_by_module_dict()
    names = (*modules, __name__)
    values = {flag.name: flag.value for name in names for flag in by_module.get(name, ())}
    return {name: values[name] for name in sorted(values) if name not in NOT_SETTINGS}


def check_padding(dataset: Dataset, padding: int) -> None:
    """Raises ValueError where images would be shifted out of sight."""
    height, width = dataset.train_images.shape[1:3]
    if padding > min(height, width):
        raise ValueError(
            f"--padding={padding} exceeds the images, {height} x {width} pixels; lower it"
        )


def rate_grid(low: float, high: float, number: int) -> list[float]:
    """Returns the log grid of --min_rate, --max_rate and --num_rates.

    Raises:
      ValueError: rates in another order.
    """
    if low >= high:
        raise ValueError(f"--min_rate={low:g} must be below --max_rate={high:g}")
    return np.geomspace(low, high, number).tolist()


def cut_by_the_grid(what: str) -> str:
    """Says that a better rate may lie beyond those of `rate_grid`."""
    return f"{what} reaches the end of the rates tried: widen --min_rate, --max_rate."


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
