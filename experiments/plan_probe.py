"""What one trial of a transfer study costs here: operations, and seconds timed on a few runs."""

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import transfer_study
from experiments.lab import training
from experiments.plan_estimate import Cost

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_WARM_RUNS = 3


class Size(NamedTuple):
    """What is known of a trial without compiling.

    Attributes:
      flops: of one update, as XLA counts the program before it optimizes.
      operations: lines of the program of one update; compiling and tracing grow with them.
    """

    flops: float
    operations: int


class Probe(NamedTuple):
    """What was timed of one trial.

    Attributes:
      once: of its search, what happens once: building, tracing, compiling.
      run: seconds of one training to its end, compiled.
      lost: seconds of one that is lost in its first part.
      measurements: of every further function of the trial.
    """

    once: Cost
    run: float
    lost: float
    measurements: tuple[Cost, ...]


class _Compiling:
    """Sums the seconds that XLA compiles inside a `with`, and keeps the longest."""

    def __enter__(self):
        self.seconds = self.largest = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILE_EVENT:
            self.seconds += duration_secs
            self.largest = max(self.largest, duration_secs)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def size(trial: Mapping[str, Any], data_dir: str | None) -> Size:
    """Reads the program of one update; nothing is compiled but the draw of params' shapes."""
    network = transfer_study.build(trial, data_dir)
    params = jax.eval_shape(network.draw, 0)
    optimizer = network.optimizer(1.0)
    state = jax.eval_shape(optimizer.init, params)
    count = trial["batch_size"]
    images, labels = (
        jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)
        for array in (network.dataset.train_images, network.dataset.train_labels)
    )

    def step(params, state, images, labels):
        gradients = jax.grad(
            lambda params: training.cross_entropy(
                network.graphdef, params, network.model_state, images, labels, train=True
            )[0]
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step).lower(params, state, images, labels)
    costs: Any = lowered.cost_analysis()
    return Size(float(costs["flops"]), lowered.as_text().count("\n"))


def probe(
    trial: Mapping[str, Any], data_dir: str | None, *, seconds: float, sharpness: bool
) -> Probe:
    """Times a trial: its first training, a few more, and its measurements.

    Args:
      trial: of a transfer study.
      data_dir: folder of the data set.
      seconds: a training that takes longer is cut, and the rest taken to be like its parts.
      sharpness: whether the study measures it too.
    """
    low, _ = transfer_study.RATES[trial["optimizer"]]
    with _Compiling() as compiling:
        start = time.perf_counter()
        network = transfer_study.build(trial, data_dir)
        train = transfer_study.trainer(trial, network)
        examples = len(network.dataset.train_images)
        lengths = _lengths(examples, trial["batch_size"], trial["steps"])
        cold = _ends(train(low, 0), lengths, seconds)
    warm = [_ends(train(low, 0), lengths, seconds) for _ in range(_WARM_RUNS)]
    run = statistics.median(_whole(ends, lengths) for ends in warm)
    first = statistics.median(ends[1] - ends[0] for ends in warm)
    # What the first training took beyond another one is what happens once.
    compiled = compiling.seconds
    if len(cold) > len(lengths):
        once = cold[-1] - start - run
    else:
        once = cold[1] - start - first
        if lengths[-1] != lengths[0]:  # another program, which was not reached
            once, compiled = once + compiling.largest, compiled + compiling.largest
    functions = [transfer_study.measure]
    if sharpness:
        functions.append(transfer_study.measure_sharpness)
    measured = tuple(_measured(function, trial, data_dir) for function in functions)
    return Probe(Cost(0.0, compiled, max(once - compiled, 0.0)), run, first, measured)


def _ends(parts, lengths: list[int], seconds: float) -> list[float]:
    """When a training began and its parts ended; cut where it takes too long, after four."""
    ends = [time.perf_counter()]
    for _ in parts:
        ends.append(time.perf_counter())
        if ends[-1] - ends[0] > seconds and 4 < len(ends) < len(lengths):
            break
    return ends


def _whole(ends: list[float], lengths: list[int]) -> float:
    """The seconds of a training, the rest of one that was cut taken to be like its later parts."""
    if len(ends) > len(lengths):
        return ends[-1] - ends[0]
    later = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    return ends[1] - ends[0] + later / lengths[1] * sum(lengths[1:])


def _lengths(examples: int, batch_size: int, steps: int) -> list[int]:
    """The updates of every part of `training.train_parts`."""
    epoch = examples // batch_size
    part = training.part_length(min(epoch, steps))
    found = []
    for first in range(0, steps, epoch):
        left = min(epoch, steps - first)
        found += [min(part, left - done) for done in range(0, left, part)]
    return found


def _measured(function, trial: Mapping[str, Any], data_dir: str | None) -> Cost:
    """A function of a trial, which compiles and runs a few batches."""
    with _Compiling() as compiling:
        start = time.perf_counter()
        function(trial, data_dir)
        elapsed = time.perf_counter() - start
    return Cost(0.0, compiling.seconds, elapsed - compiling.seconds)


def load_seconds(trials, data_dir: str | None) -> float:
    """Reads every data set of the trials once, and returns the seconds that took."""
    start = time.perf_counter()
    for name, factor in {(trial["dataset"], trial["downscale"]) for trial in trials}:
        jnp.asarray(transfer_study.load(name, data_dir, factor).train_images).block_until_ready()
    return time.perf_counter() - start
