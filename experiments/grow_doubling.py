"""Does doubling a network in the middle of its training save operations?

    python -m experiments.grow_doubling --workdir=runs/grow_doubling

Byte-level Llama decoders on the sources of Python's standard library, and a residual network with
batch normalization on Fashion-MNIST, AdamW under `parametrize`, constant rate and linear decay. The
large network is trained from scratch at its best rate for several numbers of updates: the loss that
so many operations buy. Grown ones double width, depth or both by `contrib.expand`, see METHODS.
With --tasks=hidden the hidden layers of the residual network alone are narrow, and what widens them
is compared: copies, the closed form of `contrib.grow`, random neurons, see OPERATORS.
Operations are those of XLA's count; a growth counts as an update of the network that it makes, and
statistics, decompositions and the search of an amplitude by `experiments.grow_cost`. Writes
results.jsonl (a line a training), doubling.csv, figures, table.md and report.html. Killed and
started again it goes on; with --only_finished it shows what there is.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags
from flax import nnx

import archscale_jax as archscale
from archscale_jax import contrib
from archscale_jax._trees import PyTree
from experiments import grow_doubling_report as report
from experiments import grow_operators
from experiments.grow_methods import METHODS, TASKS, Method, Size, Task
from experiments.lab import common, files, page, ranges, runners, studies
from experiments.lab.datasets import text as texts
from experiments.lab.models.decoder import HIDDEN, Decoder
from experiments.lab.models.images import ResidualStages
from experiments.lab.sweeps import run_study, trial_hash

FLAGS = flags.FLAGS

ranges.define("num_seeds", 3, "Seeds of every method.")
flags.DEFINE_list("methods", None, "Of METHODS, in this order; by default all.")
flags.DEFINE_list("tasks", ["narrow", "cnn", "decoder"], "Of TASKS; `hidden` compares operators.")
ranges.define("steps", 800, "Updates of a training of the usual length.")
flags.DEFINE_string("text", texts.STANDARD_LIBRARY, "`stdlib`, or a folder of files.")
flags.DEFINE_enum("dataset", "fashion_mnist", ["fashion_mnist", "digits"], "Images of CNNs.")
flags.DEFINE_bool("only_finished", False, "Train nothing more; show what is finished.")
flags.DEFINE_string("workdir", "runs/grow_doubling", "Folder for config, results and figures.")
runners.define_flags()

Trial = Mapping[str, Any]
PART = 25
"""Updates that are compiled as one; all numbers of updates are multiples."""
DECAY = 0.2
"""Of all updates, those in which the rate falls to 0."""
WARMUP = 50
"""Updates in which the rate rises."""
WEIGHT_DECAY = 0.1
BATCHES = 12
"""Of training examples on which `contrib.grow` looks at a network: statistics are of two thirds of
them, and an amplitude is chosen on the others."""
AFTER = (0, 25, 50, 100)
"""Updates behind a growth at which held-out loss is measured, to see whether it rises."""


def run() -> None:
    """Trains what is missing, prints and draws."""
    settings = {"steps": FLAGS.steps, "text": texts.load_text(FLAGS.text).name,
                "dataset": FLAGS.dataset}  # fmt: skip
    with runners.runner() as options:
        workdir = common.claim_directory(FLAGS.workdir, settings)
        study = Study(
            settings, workdir / "results.jsonl", options, only_finished=FLAGS.only_finished
        )
        if not study.run(FLAGS.methods or list(METHODS), FLAGS.tasks, FLAGS.num_seeds):
            print("not finished; what is shown is of the trainings that are")
    frame = study.frame()
    frame.to_csv(workdir / "doubling.csv", index=False, float_format="%.6g")
    publish(frame, workdir)


def publish(frame: pd.DataFrame, workdir: pathlib.Path) -> None:
    """Writes the tables and figures of what is in the frame."""
    figures = {}
    for name, tasks in report.FAMILIES.items():
        if len(frame) and frame.task.isin(tasks).any():
            report.draw(frame, FLAGS.steps, tasks, workdir / f"{name}.png")
            figures[workdir / f"{name}.png"] = (
                "Held-out loss over operations, a line a seed of trainings from scratch."
            )
    tables = {
        "Held-out loss; operations over those of the usual training from scratch; operations "
        "saved over a training from scratch to the same loss; the largest rise of the held-out "
        "loss within 100 updates of a growth (means over seeds ± standard error).": report.table(
            frame, FLAGS.steps
        )
    }
    operators = report.operators(frame, FLAGS.steps)
    if len(operators):
        tables[
            "What makes hidden layers wider: operations over those of the usual training from "
            "scratch, and the part that finding neurons takes; operations saved, also if finding "
            "them were free; final loss less that of copies, by seed; held-out loss right after "
            "growth and 100 updates later, less that before, and that less that of copies."
        ] = operators
    page.publish(workdir, "Doubling a network in the middle of its training", __doc__,
                 tables=tables, figures=figures)  # fmt: skip


# What is trained, in order.


class UnfinishedError(Exception):
    """A training is missing, and none is to be run."""


class Study:
    """The trainings of a study; run as they are asked for."""

    def __init__(
        self,
        settings: Trial,
        journal: pathlib.Path,
        options: Mapping[str, Any],
        *,
        only_finished: bool = False,
    ) -> None:
        self._settings, self._journal, self._options = settings, journal, options
        self._only_finished = only_finished
        self._records = {one["hash"]: one for one in files.read_records(journal)}

    def run(self, methods: Sequence[str], tasks: Sequence[str], num_seeds: int) -> bool:
        """Runs all, what matters most first; returns whether all is finished."""
        finished = True
        for seed, name, task in itertools.product(range(num_seeds), methods, tasks):
            if name not in TASKS[task].methods:
                continue
            try:
                rate = self.best_rate(task) * METHODS[name].rate
                trial = self.trial(task, name, rate, seed)
                self.measure([trial], f"{name} of {task}, seed {seed}")
            except UnfinishedError:
                finished = False
        return finished

    def best_rate(self, task: str) -> float:
        """Returns the best rate of the large network from scratch, between two worse ones."""
        low, high, start = -1, 1, TASKS[task].rate
        while True:
            rates = [start * 2.0**step for step in range(low, high + 1)]
            trials = [self.trial(task, "scratch", rate, 0, lengths=(1.0,)) for rate in rates]
            losses = [self.loss(one) for one in self.measure(trials, f"rates of {task}")]
            best = int(np.argmin(losses))
            if 0 < best < len(rates) - 1:
                return rates[best]
            low, high = low - (best == 0), high + (best > 0)

    @staticmethod
    def loss(record: Mapping[str, Any]) -> float:
        found = record["result"]["held_out"][-1]
        return math.inf if found is None else found

    def measure(self, trials: Sequence[Trial], name: str) -> list[Mapping[str, Any]]:
        """Returns the records of trials; what is missing is trained."""
        missing = [one for one in trials if trial_hash(one) not in self._records]
        if missing and self._only_finished:
            raise UnfinishedError
        if missing:
            found = run_study(missing, train, self._journal, description=name, **self._options)
            runners.check_finished(found, self._journal)
            self._records |= {one["hash"]: one for one in found}
        return [self._records[trial_hash(one)] for one in trials]

    def trial(
        self, task: str, method: str, rate: float, seed: int, lengths: Sequence[float] | None = None
    ) -> Trial:
        """Returns the settings of a training."""
        steps, of = self.steps(task), METHODS[method]
        lengths = of.lengths if lengths is None else lengths
        sizes, shares = path_of(TASKS[task], of)
        timing: dict[str, Any] = {
            "switches": [in_parts(share * lengths[-1] * steps) for share in shares],
            "ends": [in_parts(length * steps) for length in lengths],
        }
        if of.budget is not None:
            each = self.operations(task, [*sizes, TASKS[task].large])
            timing = timing_of(shares, each, of.budget * steps)
        return {
            **self._settings,
            "task": task,
            "method": method,
            "sizes": [list(size) for size in sizes],
            **timing,
            "options": dict(of.options),
            "moments": of.moments,
            "rate": rate,
            "seed": seed,
        }

    def steps(self, task: str) -> float:
        """Returns the updates of a training of the usual length."""
        return TASKS[task].length * self._settings["steps"]

    def operations(self, task: str, sizes: Sequence[Size]) -> list[float]:
        """Returns the operations of an update, by size."""
        key = data_key({"task": task, **self._settings})
        return [model_of(task, size, *key).operations for size in sizes]

    def frame(self) -> pd.DataFrame:
        """Returns a row for every end of every training."""
        rows = []
        for one in self._records.values():
            trial, result = one["trial"], one.get("result")
            if result is None:
                continue
            for place, end in enumerate(trial["ends"]):
                rows.append(
                    {name: trial[name] for name in ("task", "method", "rate", "seed")}
                    | {"updates": end, "searched": len(trial["ends"]) == 1}
                    | {name: result[name][place] for name in ("operations", "held_out", "accuracy")}
                    | {"rise": max(map(rise, result["growths"]), default=math.nan)}
                    | around(result["growths"])
                )
        return pd.DataFrame(rows)


def path_of(task: Task, method: Method) -> tuple[list[Size], list[float]]:
    """Returns the sizes of a training, and where it goes from one to the next."""
    doubled = {what for what, _ in method.path}
    if "never" in doubled:
        return [task.small], []
    depth, width = (
        small if axis in doubled else large
        for axis, small, large in zip(("depth", "width"), task.small, task.large, strict=True)
    )
    sizes = [(depth, width)]
    for what, _ in method.path:
        depth, width = sizes[-1]
        depth = task.large[0] if what == "depth" else depth
        sizes.append((depth, task.large[1] if what == "width" else width))
    return sizes, [share for _, share in method.path]


def timing_of(shares: Sequence[float], each: Sequence[float], budget: float) -> dict[str, Any]:
    """Returns the updates at which a training grows, its rate begins to fall, and it ends.

    Args:
      shares: of its operations at which it grows.
      each: operations of an update, by size, and behind these of the large network.
      budget: its operations, in updates of that.
    """
    parts = np.diff([0.0, *shares, 1.0])
    updates = np.cumsum([
        in_parts(part * budget * each[-1] / one) for part, one in zip(parts, each[:-1], strict=True)
    ])  # fmt: skip
    *switches, end = map(int, updates)
    decay = in_parts(DECAY * budget * each[-1] / each[-2])
    return {"switches": switches, "ends": [end], "decay": decay}


def in_parts(updates: float) -> int:
    return max(round(updates / PART), 1) * PART


def around(growths: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the held-out loss before the last growth, right behind it and 100 updates later."""
    last = growths[-1] if growths else {"before": math.nan, "after": [math.nan]}
    return {
        "before": last["before"],
        "after": last["after"][0],
        "later": last["after"][-1],
        "growing": last.get("operations", 0.0),
        "amplitude": last.get("amplitude", math.nan),
    }


def rise(growth: Mapping[str, Any]) -> float:
    """Returns by what part the held-out loss rises at most above that before a growth."""
    return max(growth["after"]) / growth["before"] - 1


# A training.


class Model(NamedTuple):
    """A network of one size, how it is trained, and what that costs.

    Attributes:
      plan: its parametrization.
      init: from a random key to its params; compiled once.
      loss: `(params, batch)` to the mean loss and the accuracy.
      advance: `(params, state, data, key, rates)` to both, and the losses of so many updates.
      inputs: of a batch on which a growth is checked.
      operations: of an update.
      shapes: of its params.
    """

    plan: archscale.Parametrization
    init: Callable[..., PyTree]
    loss: Callable[..., tuple[jax.Array, jax.Array]]
    advance: Callable[..., Any]
    inputs: jax.Array
    operations: float
    shapes: list[tuple[int, ...]]


class Data(NamedTuple):
    """The data of a task.

    Attributes:
      train: arrays.
      draw: from these and a random key to a batch.
      held_out: batches, stacked.
    """

    train: Any
    draw: Callable[[Any, jax.Array], Any]
    held_out: Any


def train(trial: Trial) -> dict[str, Any]:
    """Trains a network that grows on its way; several ends share the part at constant rate.

    Returns:
      For every end `operations`, `held_out` loss and `accuracy`; for every growth the held-out loss
      `before` and `after`, see AFTER; the `losses` of the parts at constant rate.
    """
    models = [model_of(trial["task"], tuple(size), *data_key(trial)) for size in trial["sizes"]]
    data = data_of(trial["task"], *data_key(trial))
    key = jax.random.key(trial["seed"])
    found: dict[str, Any] = {"operations": [], "held_out": [], "accuracy": [], "growths": [],
                             "losses": []}  # fmt: skip
    model, operations, last = models[0], 0.0, 0
    params = model.init(jax.random.fold_in(key, 0))
    state = optimizer_of(model.plan, 1.0).init(params)
    stable = {end - trial.get("decay", in_parts(DECAY * end)): end for end in trial["ends"]}
    for step in range(0, max(stable) + 1, PART):
        if step in trial["switches"]:
            new = models[len(found["growths"]) + 1]
            before = held_out(model, params, data)
            grown = grow(trial, model, new, params, state, data, jax.random.fold_in(key, step))
            params, state = grown.params, grown.optimizer_state
            model, operations = new, operations + new.operations + grown.operations
            found["growths"].append({"before": before, "after": [], **grown.facts})
            last = step
        if found["growths"] and step - last in AFTER:
            found["growths"][-1]["after"].append(held_out(model, params, data))
        if step in stable:
            end = stable[step]
            ended = decayed(trial, model, params, state, data, key, step, end)
            loss, accuracy = evaluated(model.loss, ended, data.held_out)
            found["operations"].append(operations + (end - step) * model.operations)
            found["held_out"].append(float(loss))
            found["accuracy"].append(float(accuracy))
        rates = trial["rate"] * jnp.minimum(1.0, (step + 1 + jnp.arange(PART)) / WARMUP)
        params, state, losses = model.advance(
            params, state, data.train, jax.random.fold_in(key, step + 1), rates
        )
        operations += PART * model.operations
        found["losses"].append(float(jnp.mean(losses)))
    return found


def decayed(trial, model, params, state, data, key, first: int, end: int) -> PyTree:
    """Params after updates at a rate that falls to 0."""
    for step in range(first, end, PART):
        rates = trial["rate"] * (1 - (step - first + jnp.arange(PART)) / (end - first))
        params, state, _ = model.advance(
            params, state, data.train, jax.random.fold_in(key, step + 1), rates
        )
    return params


class Grown(NamedTuple):
    """A network of the next size, the state of its optimizer, and what it took to find it.

    Attributes:
      params: of it.
      optimizer_state: of its optimizer.
      operations: those of statistics and searches.
      facts: to be kept.
    """

    params: PyTree
    optimizer_state: Any
    operations: float = 0.0
    facts: Mapping[str, float] = {}


def grow(
    trial: Trial, model: Model, new: Model, params: PyTree, state: Any, data: Data, key: jax.Array
) -> Grown:
    """Goes to the next size by `contrib.grow`, where options name a method of it, or by copies."""
    like, options = new.init(key), trial["options"]
    if "method" in options:
        options = {"batches": BATCHES} | options
        batches = options.pop("batches")
        keys = jax.random.split(key, batches)
        batch, held = drawn(data, keys[: -(batches // 3)]), drawn(data, keys[-(batches // 3) :])
        sizes = tuple(map(tuple, trial["sizes"]))
        loss = loss_of(trial["task"], sizes, *data_key(trial))
        added = grow_operators.add_neurons(
            loss,
            params,
            like,
            batch,
            held,
            lambda params: optimizer_of(model_for((model, new), params).plan, 1.0),
            state,
            key=key,
            **options,
        )
        facts = {"amplitude": added.amplitude, "operations": added.operations}
        grown = Grown(added.params, added.optimizer_state, added.operations, facts)
    else:
        expanded = contrib.expand(
            params,
            like,
            model.plan.apply,
            new.plan.apply,
            model.inputs,
            key=key,
            position="interleave",
            optimizers=(optimizer_of(model.plan, 1.0), optimizer_of(new.plan, 1.0)),
            optimizer_state=state,
            **options,
        )
        grown = Grown(*expanded)
    if trial["moments"]:
        return grown
    return grown._replace(optimizer_state=optimizer_of(new.plan, 1.0).init(grown.params))


def drawn(data: Data, keys: jax.Array) -> Any:
    """A training batch for each of the keys, joined."""
    batches = jax.vmap(data.draw, (None, 0))(data.train, keys)
    return jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), batches)


def held_out(model: Model, params: PyTree, data: Data) -> float:
    return float(evaluated(model.loss, params, data.held_out)[0])


@functools.partial(jax.jit, static_argnums=0)
def evaluated(loss: Callable[..., Any], params: PyTree, batches: PyTree) -> Any:
    """Mean loss and accuracy over batches."""
    found = jax.lax.map(lambda batch: loss(params, batch), batches)
    return jax.tree.map(jnp.mean, found)


def optimizer_of(plan: archscale.Parametrization, rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), plan.optimizer(rate, WEIGHT_DECAY))


# Tasks.


def data_key(trial: Trial) -> tuple[str]:
    return (trial["text" if TASKS[trial["task"]].head else "dataset"],)


CONTEXT = 64
"""Bytes that a decoder predicts at a time."""


@functools.lru_cache(maxsize=2)
def data_of(task: str, name: str) -> Data:
    """Loads the data of a task; the CNN's images are averaged to 14 × 14 pixels."""
    if TASKS[task].head:
        text = texts.load_text(name)
        windows = texts.even_windows(jnp.asarray(text.validation), 256, CONTEXT + 1)
        return Data(
            jnp.asarray(text.train),
            lambda text, key: texts.random_windows(text, key, TASKS[task].batch, CONTEXT + 1),
            windows.reshape(4, -1, CONTEXT + 1),
        )
    data = studies.load(name, None, 2 if name == "fashion_mnist" else 1)
    number = len(data.test_images) // 500 or 1
    size = min(500, len(data.test_images))
    held = tuple(jnp.asarray(one[: number * size]).reshape(number, size, *one.shape[1:])
                 for one in (data.test_images, data.test_labels))  # fmt: skip

    def draw(train: Any, key: jax.Array) -> Any:
        chosen = jax.random.randint(key, (TASKS[task].batch,), 0, len(train[1]))
        return train[0][chosen], train[1][chosen]

    return Data((jnp.asarray(data.train_images), jnp.asarray(data.train_labels)), draw, held)


@functools.lru_cache(maxsize=16)
def model_of(task: str, size: Size, name: str) -> Model:
    """Builds a network of a task, parametrized for a rate of the small one."""
    data = data_of(task, name)
    batch = jax.jit(data.draw)(data.train, jax.random.key(0))
    inputs, _ = split(task, batch)
    plan, small = plan_of(task, size, inputs), TASKS[task].small
    if size != small:
        plan = plan_of(task, size, inputs, plan_of(task, small, inputs))

    def loss(params: PyTree, batch: Any) -> tuple[jax.Array, jax.Array]:
        inputs, labels = split(task, batch)
        logits = plan.apply(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), jnp.mean(jnp.argmax(logits, -1) == labels)

    @jax.jit
    def advance(params: PyTree, state: Any, train: Any, key: jax.Array, rates: jax.Array) -> Any:
        def step(carry: Any, one: Any) -> Any:
            params, state = carry
            batch = data.draw(train, jax.random.fold_in(key, one[1]))
            (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
            updates, state = optimizer_of(plan, one[0]).update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        xs = rates, jnp.arange(len(rates))
        (params, state), losses = jax.lax.scan(step, (params, state), xs)
        return params, state, losses

    operations = operations_of(task, size, batch)
    shapes = shapes_of(jax.eval_shape(plan.init, jax.random.key(0)))
    return Model(plan, jax.jit(plan.init), loss, advance, inputs, operations, shapes)


@functools.lru_cache(maxsize=4)
def loss_of(task: str, sizes: tuple[Size, ...], name: str) -> Callable[..., jax.Array]:
    """Returns the loss for params of any of the sizes, for which programs are compiled once."""
    models = [model_of(task, size, name) for size in sizes]

    def loss(params: PyTree, batch: Any) -> jax.Array:
        return model_for(models, params).loss(params, batch)[0]

    return loss


def model_for(models: Sequence[Model], params: PyTree) -> Model:
    """Returns the model whose params have the shapes of these."""
    return next(one for one in models if one.shapes == shapes_of(params))


def shapes_of(params: PyTree) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]


def split(task: str, batch: Any) -> tuple[jax.Array, jax.Array]:
    return (batch[:, :-1], batch[:, 1:]) if TASKS[task].head else batch


def module_of(task: str, size: Size, inputs: jax.Array, scan: bool = True) -> Any:
    depth, width = size
    stream = TASKS[task].stream or width
    if TASKS[task].head:
        heads, hidden = stream // TASKS[task].head, HIDDEN["llama"] * width
        scan = scan and not TASKS[task].stream  # contrib.grow takes no stacked layers
        return Decoder("llama", depth, stream, heads, heads // 2, CONTEXT, hidden=hidden, scan=scan)
    image = inputs.shape[1:]
    return nnx.eval_shape(
        lambda: ResidualStages(image, stream, depth, 10, True, hidden=width, rngs=nnx.Rngs(0))
    )


def plan_of(
    task: str, size: Size, inputs: jax.Array, base: Any = None, scan: bool = True
) -> archscale.Parametrization:
    return archscale.parametrize(
        module_of(task, size, inputs, scan),
        inputs,
        base=base,
        optimizer="adamw",
        model_kwargs={} if TASKS[task].head else {"train": True},
    )


def operations_of(task: str, size: Size, batch: Any) -> float:
    """Returns the floating-point operations of an update by XLA's count.

    Blocks are not stacked here, as XLA counts the body of a loop once.
    """
    inputs, labels = split(task, batch)
    plan = plan_of(task, size, inputs, scan=False)

    def update(params: PyTree, state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        def loss(params: PyTree) -> jax.Array:
            logits = plan.apply(params, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer_of(plan, 1.0).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(plan.init, jax.random.key(0))
    state = jax.eval_shape(optimizer_of(plan, 1.0).init, params)
    analysis: Any = jax.jit(update).lower(params, state, inputs, labels).cost_analysis()
    return float(analysis["flops"])


if __name__ == "__main__":
    common.run_binary(run)
