"""Trains byte-level language models: a small one's rate, used at any depth and width.

    python -m experiments.language --depth=8 --width=128 --rate=0.01 --workdir=runs/language

Decoders like GPT-2 or Llama on the sources of Python's standard library, AdamW or Muon, warm-up and
decay. Rate and weight decay are those of the base, `--base_depth` × `--base_width`; several of
either, or several seeds, are a sweep. Writes config.json, results.jsonl (a line a training), the
loss curves, table.md and report.html, and prints the answer. Killed and started again it goes on
from the last checkpoint. `--cost_only` prints what an update costs, and runs nothing.
"""

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags

import archscale_jax as archscale
from archscale_jax._trees import PyTree
from experiments.lab import (
    checkpoints,
    common,
    display,
    page,
    panels,
    progress,
    ranges,
    runners,
    training,
)
from experiments.lab.datasets import text as texts
from experiments.lab.models.decoder import KINDS, VOCABULARY, Decoder
from experiments.lab.sweeps import run_study
from experiments.lab.tables import number
from experiments.lab.training.optimizer import SCHEDULES

FLAGS = flags.FLAGS

Trial = Mapping[str, Any]

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"depth": 2, "width": 32, "base_depth": 2, "base_width": 32, "head_size": 16,
             "context": 64, "batch_size": 16, "steps": 300},
    "paper": {"depth": 12, "width": 768, "base_depth": 2, "base_width": 256, "head_size": 64,
              "context": 1024, "batch_size": 32, "steps": 5000},
}  # fmt: skip
"""Sizes by name: for a core of a CPU, and for an accelerator."""

flags.DEFINE_enum("preset", "tiny", list(PRESETS), "Sizes of what is not given.")
flags.DEFINE_enum("kind", "llama", list(KINDS), "What the decoder is like.")
flags.DEFINE_bool("tied", False, "The readout is the table of embeddings.")
ranges.define("depth", None, "Blocks.")
ranges.define("width", None, "Features of the stream.")
ranges.define("base_depth", None, "Blocks of the base.", "depth")
ranges.define("base_width", None, "Features of the base's stream.", "width")
ranges.define("head_size", None, "Features of a head, in the base too.", "width")
ranges.define("queries_per_key", None, "Heads of queries for one of keys; by default 2 in `llama`.",
              "width")  # fmt: skip
ranges.define("context", None, "Bytes that are predicted at a time.", "steps")
ranges.define("batch_size", None, "Windows of text an update.")
ranges.define("base_batch_size", None, "That of the base; by default the same.", "batch_size")
ranges.define("steps", None, "Updates.")
ranges.define("base_steps", None, "Those of the base; by default for as many bytes.", "steps")
flags.DEFINE_enum("optimizer", "adamw", ["adamw", "muon"], "Optimizer.")
ranges.define("adam_rate_ratio", None, "Under Muon and the plan: the rate of what AdamW has, over "
              "that of matrices; by default 1.", "fraction")  # fmt: skip
flags.DEFINE_enum(
    "parametrization",
    "plan",
    ["plan", "standard"],
    "`plan`: archscale_jax.parametrize. `standard`: as Flax initializes, one rate, optax alone.",
)
ranges.define_list("rate", ["0.01"], "Peak learning rates of the base.", "rate")
ranges.define_list("weight_decay", ["0.1"], "Decoupled weight decays of the base.", "weight_decay")
ranges.define_list("seed", ["0"], "Seeds of weights and batches.", "seed")
flags.DEFINE_enum("schedule", "cosine", list(SCHEDULES), "Learning rate after the warm-up.")
ranges.define("warmup", 0.1, "Share of updates in which the rate rises.", "momentum")
ranges.define("clip", 1.0, "Largest global norm of a gradient; 0 clips none.", "weight_decay")
flags.DEFINE_string("text", texts.STANDARD_LIBRARY, "`stdlib`, or a folder of files.")
ranges.define("validation_windows", 512, "Windows of held-out text.", "batch_size")
flags.DEFINE_bool("rematerialize", False, "Compute blocks again for derivatives: less memory.")
flags.DEFINE_bool("cost_only", False, "Print the cost of an update, without running any.")
flags.DEFINE_string("workdir", "runs/language", "Folder for config, results and figures.")
runners.define_flags()

LISTS = ("rate", "weight_decay", "seed")
OPTIONS = (
    *("kind", "tied", "queries_per_key", "base_batch_size", "base_steps", "optimizer"),
    *("adam_rate_ratio", "parametrization", "schedule", "warmup", "clip", "text"),
    "validation_windows",
)
"""Flags that with those of `PRESETS` say what is trained."""
ANEW = (
    "one of another length begins anew: warm-up and schedule spread over all updates, and the "
    "checkpoints of a finished training are removed"
)
"""Why a longer training does not go on from a finished one."""


def run() -> None:
    """Trains what is missing, prints and draws."""
    settings = resolved()
    if FLAGS.cost_only:
        lines = cost(settings | {"rematerialize": FLAGS.rematerialize})
        print(f"an update of {title(settings)}:", *lines, sep="\n")
        return
    values = [[float(one) for one in FLAGS.rate], [float(one) for one in FLAGS.weight_decay],
              [int(one) for one in FLAGS.seed]]  # fmt: skip
    trials = [settings | dict(zip(LISTS, one, strict=True)) for one in itertools.product(*values)]
    with runners.runner() as options:
        common.check_length(FLAGS.workdir, settings, ("steps", "base_steps"), ANEW)
        workdir = common.claim_directory(FLAGS.workdir, settings)
        journal = workdir / "results.jsonl"
        saves = workdir / "checkpoints"
        records = run_study(
            trials,
            functools.partial(
                train,
                rematerialize=FLAGS.rematerialize,
                # Of other processes no note would be known to be quiet.
                note=display.note if FLAGS.runner in ("local", "devices") else None,
            ),
            journal,
            checkpoints=saves,
            description="trainings",
            **options,
        )
        runners.check_finished(records, journal)
    figure = workdir / "language.png"
    draw(records, figure)
    page.publish(
        workdir,
        f"{title(settings)} on {settings['text'].partition('#')[0]}",
        __doc__,
        remarks=answer(records),
        tables={"Losses in nats a byte; of training, of the last tenth.": table(records)},
        figures={figure: "Loss over updates: of training (lines), of held-out files (points)."},
    )


def resolved(**sizes: int) -> dict[str, Any]:
    """Returns the settings of the flags, by name; sizes not given are these, or the preset's."""
    preset = PRESETS[FLAGS.preset]
    given = {name: FLAGS[name].value for name in (*preset, *OPTIONS)}
    settings = preset | sizes | {name: one for name, one in given.items() if one is not None}
    settings.setdefault("queries_per_key", 2 if settings["kind"] == "llama" else 1)
    settings.setdefault("base_batch_size", settings["batch_size"])
    windows = settings["steps"] * settings["batch_size"]
    settings.setdefault("base_steps", max(windows // settings["base_batch_size"], 1))
    check(settings)
    return settings | {"text": texts.load_text(settings["text"]).name}


def title(settings: Trial) -> str:
    return f"{settings['kind']} {settings['depth']} × {settings['width']}, {settings['optimizer']}"


def check(settings: Trial) -> None:
    """Checks what flags cannot say of each other.

    Raises:
      ValueError: a width without whole heads, a ratio that nothing reads, or a text shorter than
        the context.
    """
    for flag in ("width", "base_width"):
        heads = settings[flag] / settings["head_size"]
        if heads % settings["queries_per_key"]:
            raise ValueError(
                f"--{flag}={settings[flag]} holds {heads:g} heads of --head_size="
                f"{settings['head_size']}; accepted are whole heads, a multiple of "
                f"--queries_per_key={settings['queries_per_key']}"
            )
    if settings["head_size"] % 2:
        raise ValueError(f"--head_size={settings['head_size']} is odd; rotations need pairs")
    how = settings["optimizer"], settings["parametrization"]
    if "adam_rate_ratio" in settings and how != ("muon", "plan"):
        raise ValueError(
            f"--adam_rate_ratio has no effect with --optimizer={how[0]} and --parametrization="
            f"{how[1]}; accepted are muon and plan"
        )
    shortest = min(map(len, texts.load_text(settings["text"])[1:]))
    if shortest <= settings["context"]:
        raise ValueError(
            f"--context={settings['context']} exceeds the {shortest} bytes of the shorter part of "
            "the text"
        )


# A training.


class Parametrized(NamedTuple):
    """How a decoder is trained.

    Attributes:
      init: from a key to params.
      apply: from params and tokens to logits.
      optimizer: from rate (or schedule) and weight decay to the optimizer.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]
    optimizer: Callable[[Any, Any], optax.GradientTransformation]


def decoder(trial: Trial, prefix: str = "", *, scan: bool = True) -> Decoder:
    """Returns the decoder of a trial, or with the prefix `base_` its base."""
    width = trial[f"{prefix}width"]
    heads = width // trial["head_size"]
    return Decoder(
        trial["kind"],
        trial[f"{prefix}depth"],
        width,
        heads,
        heads // trial["queries_per_key"],
        trial["context"],
        trial["tied"],
        scan,
        trial.get("rematerialize", False),
    )


def parameters(trial: Trial) -> int:
    """Returns how many parameters the decoder of a trial has."""
    shapes = jax.eval_shape(decoder(trial).init, jax.random.key(0), tokens_of(trial))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def tokens_of(trial: Trial) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((trial["batch_size"], trial["context"]), jnp.int32)


def plan_of(trial: Trial, **options: Any) -> archscale.Parametrization:
    """Returns the plan of a trial; on the base itself it has none."""
    model, base = decoder(trial), decoder(trial, "base_")
    batch = trial["batch_size"] / trial["base_batch_size"]
    duration = {"batch_ratio": batch, "token_ratio": batch * trial["steps"] / trial["base_steps"]}
    if trial["optimizer"] == "adamw":
        options = duration | options
    return archscale.parametrize(
        model,
        tokens_of(trial),
        base=None if model == base else base,
        optimizer=trial["optimizer"],
        **options,
    )


def standard(trial: Trial) -> Parametrized:
    """The decoder as Flax initializes it, and the optimizer as optax has it."""
    model = decoder(trial)
    make = {"adamw": optax.adamw, "muon": optax.contrib.muon}[trial["optimizer"]]
    tokens = jnp.zeros(tokens_of(trial).shape, jnp.int32)
    return Parametrized(
        lambda key: model.init(key, tokens),
        model.apply,  # pyright: ignore[reportArgumentType]
        lambda rate, decay: make(rate, weight_decay=decay),
    )


def parametrized(trial: Trial) -> Parametrized:
    if trial["parametrization"] == "standard":
        return standard(trial)
    plan, ratio = plan_of(trial), trial.get("adam_rate_ratio")

    def muon(rate: optax.Schedule, decay: Any) -> optax.GradientTransformation:
        return plan.optimizer(rate, decay, adam_learning_rate=lambda step: ratio * rate(step))

    return Parametrized(plan.init, plan.apply, muon if ratio else plan.optimizer)


class State(NamedTuple):
    """What a checkpoint holds: the trees that training changes, and the updates that are done."""

    params: PyTree
    optimizer_state: PyTree
    step: int


class Program(NamedTuple):
    """The jitted parts of a training; rate, decay and seed are arguments, compiled once.

    Attributes:
      start: `(seed, rate, decay)` to params and the optimizer's state.
      advance: `(params, optimizer_state, text, seed, rate, decay, first)` to both and the losses
        of the next updates.
      validate: `(params, text)` to the mean loss of held-out text.
    """

    start: Callable[..., Any]
    advance: Callable[..., Any]
    validate: Callable[..., Any]


def train(
    trial: Trial,
    folder: pathlib.Path | None = None,
    *,
    parametrize: Callable[[Trial], Parametrized] = parametrized,
    rematerialize: bool = False,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Trains a decoder, from the last checkpoint of a folder on, if there is one.

    Args:
      trial: see `resolved`, with `rate`, `weight_decay` and `seed`.
      folder: of checkpoints; with None nothing is saved, and held-out text is read at the end only.
      parametrize: how the decoder of a trial is trained.
      rematerialize: see `Decoder`; it is no part of the trial, as it changes no number.
      note: what is told, as often as a log gets a line, how far the training is.

    Returns:
      `steps` done, and after each part of the training the mean `losses` of its updates and the
      `validation` loss; a part that diverged is the last, with None.
    """
    text = texts.load_text(trial["text"])
    shared = {name: value for name, value in trial.items() if name not in LISTS}
    program = _program((*shared.items(), ("rematerialize", rematerialize)), parametrize)
    base_values = trial["seed"], trial["rate"], trial["weight_decay"]
    params, optimizer_state = program.start(*base_values)
    state = State(params, optimizer_state, 0)
    log: dict[str, list] = {"steps": [], "losses": [], "validation": []}
    if folder is not None and (found := checkpoints.restore_checkpoint(folder, state, trial)):
        _, state, log = found
    part, told = training.part_length(trial["steps"]), time.monotonic()
    while state.step < trial["steps"] and (not log["losses"] or log["losses"][-1] is not None):
        length = min(part, trial["steps"] - state.step)
        params, optimizer_state, losses = program.advance(
            *state[:2], _on_device(text.name, "train"), *base_values, state.step, length=length
        )
        state = State(params, optimizer_state, state.step + length)
        at_end, valid = state.step == trial["steps"], None
        if at_end or folder is not None:
            valid = program.validate(state.params, _on_device(text.name, "validation"))
        for name, value in zip(log, (state.step, jnp.mean(losses), valid), strict=True):
            value = None if value is None else float(value)
            log[name].append(value if value is not None and math.isfinite(value) else None)
        if folder is not None:
            checkpoints.save_checkpoint(folder, state.step, state, trial, log=log)
        if note is not None and not at_end and time.monotonic() - told >= progress.LINE_SECONDS:
            of = ", ".join(f"{name} {trial[name]:g}" for name in LISTS).replace("_", " ")
            loss = number(log["losses"][-1], ".4f", "diverged")
            note(f"{of}: update {state.step} of {trial['steps']}, loss {loss}")
            told = time.monotonic()
    return log


@functools.lru_cache(maxsize=4)
def _on_device(name: str, part: str) -> jax.Array:
    return jnp.asarray(getattr(texts.load_text(name), part))


@functools.lru_cache(maxsize=4)
def _program(items: tuple[tuple[str, Any], ...], parametrize: Callable) -> Program:
    trial = dict(items)
    how: Parametrized = parametrize(trial)

    def loss(params: PyTree, rows: jax.Array) -> jax.Array:
        logits = how.apply(params, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def optimizer(rate: Any, decay: Any) -> optax.GradientTransformation:
        warmup = round(trial["warmup"] * trial["steps"])
        schedule = training.create_schedule(
            rate, trial["steps"], kind=trial["schedule"], warmup_steps=warmup
        )
        made = how.optimizer(schedule, decay)
        if not trial["clip"]:
            return made
        return optax.chain(optax.clip_by_global_norm(trial["clip"]), made)

    @jax.jit
    def start(seed, rate, decay):
        params = how.init(jax.random.key(seed))
        return params, optimizer(rate, decay).init(params)

    @functools.partial(jax.jit, static_argnames="length", donate_argnums=(0, 1))
    def advance(params, optimizer_state, text, seed, rate, decay, first, *, length):
        key = jax.random.key(seed)
        size = trial["batch_size"], trial["context"] + 1

        def loss_of(params, model_state, step):
            rows = texts.random_windows(text, jax.random.fold_in(key, step), *size)
            return loss(params, rows), model_state

        (params, _, optimizer_state), losses = training.scan_updates(
            loss_of,
            optimizer(rate, decay),
            (params, (), optimizer_state),
            first + jnp.arange(length),
        )
        return params, optimizer_state, losses

    @jax.jit
    def validate(params, text):
        batch = trial["batch_size"]
        batches = max(trial["validation_windows"] // batch, 1)
        rows = texts.even_windows(text, batches * batch, trial["context"] + 1)
        return jax.lax.map(lambda one: loss(params, one), rows.reshape(batches, batch, -1)).mean()

    return Program(start, advance, validate)


def cost(trial: Trial) -> list[str]:
    """Returns what an update costs, in lines; it is compiled for this machine and not run.

    Operations are those of blocks that are not stacked, as XLA counts the body of a loop once;
    memory is that of stacked ones, as they are trained.
    """
    tokens = tokens_of(trial)
    optimizer = optax.adamw(1e-3)

    def compiled(*, scan: bool) -> tuple[Any, PyTree]:
        model = decoder(trial, scan=scan)

        def update(params, state, rows):
            def loss(params):
                logits = model.apply(params, rows)
                return optax.softmax_cross_entropy_with_integer_labels(logits, rows).mean()  # pyright: ignore[reportArgumentType]

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        state = jax.eval_shape(optimizer.init, params)
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, tokens)
        return lowered.compile(), params

    unrolled, params = compiled(scan=False)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    read = math.prod(tokens.shape)
    values = {
        "parameters": count,
        "bytes of text": read,
        "floating-point operations": unrolled.cost_analysis()["flops"],
        "6 · parameters · bytes of text": 6.0 * count * read,
    }
    if (memory := compiled(scan=True)[0].memory_analysis()) is not None:
        values["bytes of temporary memory, on one device"] = memory.temp_size_in_bytes
    return [f"{name}: {value:.4g}" for name, value in values.items()]


# What is shown.


def answer(records: list[dict[str, Any]]) -> list[str]:
    """Returns the best rate and decay and their held-out loss, and what these trainings leave open.

    Losses are means over seeds, infinite where one diverged.
    """
    losses: dict[tuple[float, float], list[float]] = {}
    for one in records:
        found = one["result"]["validation"][-1]
        point = one["trial"]["rate"], one["trial"]["weight_decay"]
        losses.setdefault(point, []).append(math.inf if found is None else found)
    means = {point: float(np.mean(found)) for point, found in losses.items()}
    best = min(means, key=means.__getitem__)
    of_points = f", the best of {len(means)} points" if len(means) > 1 else ""
    if math.isinf(means[best]):
        return [
            "At every rate a training diverged: take smaller ones."
            if len(records) > 1
            else "The training diverged: take a smaller rate."
        ]
    seeds = len(losses[best])
    scatter = f", ± {np.std(losses[best], ddof=1):.4f} nats from seed to seed" if seeds > 1 else ""
    lines = [
        f"At rate {best[0]:g} and weight decay {best[1]:g}{of_points}, the held-out loss is "
        f"{means[best]:.4f} nats a byte, {means[best] / math.log(2):.3f} bits{scatter}."
    ]
    for place, name in enumerate(("rate", "weight decay")):
        tried = sorted({point[place] for point in means})
        if len(tried) > 1 and best[place] in (tried[0], tried[-1]):
            end = "smaller" if best[place] == tried[0] else "larger"
            lines.append(f"No {end} {name} was tried; it may be better.")
    if seeds == 1:
        lines.append("One seed: how far the loss scatters is not known.")
    return lines


def table(records: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for one in records:
        trial, result = one["trial"], one["result"]
        losses, validation = result["losses"][-1], result["validation"][-1]
        row = {name: f"{trial[name]:g}" for name in LISTS}
        row |= {"updates": f"{result['steps'][-1]:g}"}
        row |= {"training": number(losses, ".4f", "diverged")}
        row |= {"held out": number(validation, ".4f", "diverged")}
        if validation is not None:
            row["bits a byte"] = number(validation / math.log(2), ".3f")
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def draw(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the losses of all trainings over updates."""
    figure, (panel,) = panels.create_panels(1, 3.2, width=5.0, columns=1)
    for one, colour in zip(records, itertools.cycle(panels.COLOURS), strict=False):
        trial, result = one["trial"], one["result"]
        label = ", ".join(f"{name.replace('_', ' ')} {trial[name]:g}" for name in LISTS)
        for name, style in (("losses", "-"), ("validation", "o")):
            values = [math.nan if value is None else value for value in result[name]]
            shown = label if style == "-" and len(records) <= 6 else None
            panel.plot(result["steps"], values, style, ms=3, lw=1.2, color=colour, label=shown)
    top = math.log(VOCABULARY)
    panel.set(ylim=(None, min(panel.get_ylim()[1], 1.1 * top)))
    panels.finish(figure, path, across="updates", up="loss (nats a byte)", columns=2)


if __name__ == "__main__":
    common.run_binary(run)
