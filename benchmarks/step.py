"""What does `scale_by_architecture` cost in a training step, and what does a whole plan?

    python -m benchmarks.step

Compiles every step without the transformation and with it, and calls them in turns, the first one
twice: its ratio to itself is the noise of the comparison. Noise-free evidence stands beside the
times: with a constant rate XLA folds the multiplier into it, and the optimised programs are the
same but for constants; with a schedule the product is fused into a kernel that is there anyway.
Goal: at most 1 % of its time.

Then of a GPT: `plan.optimizer(schedule, decay)` against `optax.adamw`, the update alone and in a
step, and `plan.apply` with forward multipliers against `model.apply`. Goal: at most 2 %.
"""

import collections
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from benchmarks import common
from experiments.lab import training
from experiments.lab.models import create_network

DAG = "2_02_212_1222"
CLASSES = 10
GOAL, PLAN_GOAL = 1.01, 1.02
SECONDS = {"cases": 5.0, "plans": 30.0}  # of timing for one comparison
ROUNDS = (40, 1500)  # at least and at most
OPTIMIZERS = {
    "SGD momentum": lambda: optax.sgd(0.01, momentum=0.9),
    "SGD momentum, cosine": lambda: optax.sgd(
        optax.cosine_decay_schedule(0.01, 1000), momentum=0.9
    ),
    "Adam": lambda: optax.adam(0.001),
}


class Case(NamedTuple):
    """A network and its batch: `DagMLP` without a kernel size, else `DagCNN`."""

    width: int
    batch: int
    image_shape: tuple[int, int, int]
    kernel_size: int | None = None

    @property
    def name(self) -> str:
        return f"{'CNN' if self.kernel_size else 'MLP'} {self.width}"


class GPT(linen.Module):
    """Pre-normalized blocks of attention and MLP; the table of tokens is the readout's too."""

    width: int
    depth: int
    heads: int = 4
    vocab: int = 512

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(self.vocab, self.width)
        positions = self.param(
            "positions", linen.initializers.normal(0.02), (tokens.shape[-1], self.width)
        )
        x, mask = table(tokens) + positions, linen.make_causal_mask(tokens)
        for _ in range(self.depth):
            y = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
            y = linen.gelu(linen.Dense(4 * self.width)(linen.LayerNorm()(x)))
            x = x + linen.Dense(self.width)(y)
        return table.attend(linen.LayerNorm()(x))


class Text(NamedTuple):
    """Sizes of a GPT, its base and its batches."""

    width: int
    depth: int
    base_width: int
    base_depth: int
    batch: int
    length: int


TEXTS = (Text(128, 4, 64, 2, batch=8, length=64), Text(256, 2, 64, 1, batch=4, length=128))
DECAY = 0.1
CASES = (
    Case(128, 256, (28, 28, 1)),
    Case(512, 256, (28, 28, 1)),
    Case(16, 64, (16, 16, 3), kernel_size=3),
)


def main() -> None:
    cases, optimizers = common.sized((CASES, tuple(OPTIMIZERS)), (CASES[:1], ("Adam",)))
    limits, texts = common.sized((ROUNDS, TEXTS), ((2, 2), TEXTS[:1]))
    results = [compare(case, name, limits) for case in cases for name in optimizers]
    common.show(
        f"A training step of {DAG}: scaled by scale_by_architecture / plain (goal <= {GOAL})",
        lines(results),
        "ratio: of medians (quartiles of rounds), bootstrap 95 %; noise: plain / plain. "
        "Program and state: a -> b where scaling changes them.",
    )
    plans = [one for text in texts for one in compare_plans(text, limits)]
    common.show(
        f"A GPT under a plan / under optax.adamw with a schedule (goal <= {PLAN_GOAL})",
        lines(plans),
        "State: of the optimizers; the plan's counters of steps are those of optax.adamw.",
    )
    goals = {"goal": GOAL, "plan_goal": PLAN_GOAL}
    common.write_results("step", {**goals, "cases": results, "plans": plans})


def compare(case: Case, optimizer_name: str, limits: tuple[int, int]) -> dict[str, Any]:
    """Compares a step of one network and optimizer with and without the transformation."""
    make = OPTIMIZERS[optimizer_name]
    graph = archscale.dag_graph(DAG, kernel_size=case.kernel_size)
    base = archscale.dag_graph("2", kernel_size=case.kernel_size)
    network = nnx.eval_shape(
        lambda: create_network(graph, case.image_shape, case.width, CLASSES, rngs=nnx.Rngs(0))
    )
    graphdef, shapes = nnx.split(network, nnx.Param)
    architecture = network.architecture()
    params = archscale.initialize(jax.random.key(0), shapes, architecture)
    scaled = optax.chain(make(), archscale.scale_by_architecture(architecture, base, "path_sum"))
    optimizers = {"plain": make(), "scaled": scaled}

    images = jax.random.normal(jax.random.key(1), (case.batch, *case.image_shape))
    labels = jax.random.randint(jax.random.key(2), (case.batch,), 0, CLASSES)
    calls = {
        name: (training_step(graphdef, one), (params, one.init(params), images, labels))
        for name, one in optimizers.items()
    }
    result = {"network": case.name, "case": case._asdict(), "optimizer": optimizer_name}
    result |= measured(calls, limits, SECONDS["cases"])
    for name in calls:
        result[name] |= state_size(optimizers[name].init(params))
    return result


def compare_plans(text: Text, limits: tuple[int, int]) -> list[dict[str, Any]]:
    """Compares what a plan does with a GPT with what optax and Flax do."""
    model, base = GPT(text.width, text.depth), GPT(text.base_width, text.base_depth)
    tokens = jax.random.randint(jax.random.key(0), (text.batch, text.length), 0, model.vocab)
    plan = archscale.parametrize(
        model, tokens, base=base, optimizer="adamw", form="multipliers", attention_scale="1/d"
    )
    params = plan.init(jax.random.key(1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 1000)
    mask = jax.tree.map(lambda decay: decay > 0, plan.weight_decay)
    adamw = optax.adamw(schedule, weight_decay=DECAY, mask=mask)
    ours = plan.optimizer(schedule, DECAY)
    states = {"plain": adamw.init(params), "scaled": ours.init(params)}
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), params)

    def step(apply, optimizer, state):
        return text_step(apply, optimizer), (params, state, tokens)

    comparisons: dict[str, dict[str, tuple[Callable, tuple]]] = {
        "update alone": {
            "plain": (update_of(adamw), (params, states["plain"], gradients)),
            "scaled": (update_of(ours), (params, states["scaled"], gradients)),
        },
        "step": {
            "plain": step(model.apply, adamw, states["plain"]),
            "scaled": step(model.apply, ours, states["scaled"]),
        },
        "step, plan.apply / model.apply": {
            "plain": step(model.apply, adamw, states["plain"]),
            "scaled": step(plan.apply, adamw, states["plain"]),
        },
    }
    found = []
    for label, calls in comparisons.items():
        name = f"GPT {text.width} x {text.depth}"
        result = {"network": name, "case": text._asdict(), "optimizer": label}
        result |= measured(calls, limits, SECONDS["plans"])
        for one, (_, arguments) in calls.items():
            result[one] |= state_size(arguments[1])
        found.append(result)
    return found


def text_step(apply: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """Returns a step of training on the next token."""
    update = update_of(optimizer)

    def step(params, state, tokens):
        def loss(params):
            logits = apply(params, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return *update(params, state, gradients), value

    return step


def update_of(optimizer: optax.GradientTransformation) -> Callable:
    """Returns the function from params, state and gradients to new params and state."""

    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return update


def measured(
    calls: dict[str, tuple[Callable, tuple]], limits: tuple[int, int], seconds: float
) -> dict[str, Any]:
    """Times the functions `plain` and `scaled`, and `plain` once more, on their arguments."""
    programs, compiled = {}, {}
    for name, (function, arguments) in calls.items():
        compiled[name] = jax.jit(function).lower(*arguments).compile()
        programs[name] = functools.partial(compiled[name], *arguments)
    programs["again"] = programs["plain"]

    once = np.median(common.alternate(programs, rounds=5, warm_up=2)["plain"])
    rounds = int(np.clip(seconds / (len(programs) * once), *limits))
    times = common.alternate(programs, rounds=rounds, warm_up=0)
    result = {
        "rounds": rounds,
        "milliseconds": {
            name: common.spread(np.multiply(times[name], 1e3)) for name in ("plain", "scaled")
        },
    }
    for name, label in (("scaled", "ratio"), ("again", "ratio_of_noise")):
        result[label] = common.ratio(times[name], times["plain"])
        result[f"{label}_interval"] = interval(times[name], times["plain"])
    for name in ("plain", "scaled"):
        result[name] = describe(compiled[name])
    texts = [canonical(compiled[name].as_text()) for name in ("plain", "scaled")]
    result["same_but_constants"] = texts[0] == texts[1]
    return result


def training_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """Returns a step of training: gradient, update, new parameters."""

    def step(params, state, images, labels):
        def loss(params):
            return training.cross_entropy(
                graphdef, params, nnx.State({}), images, labels, train=True
            )[0]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def interval(slow: list[float], fast: list[float], resamples: int = 2000) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the ratio of medians; rounds are resampled whole."""
    pairs = np.array([slow, fast])
    drawn = np.random.default_rng(0).integers(0, pairs.shape[1], (resamples, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=2)
    lower, upper = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(lower), float(upper)


def describe(compiled: Any) -> dict[str, Any]:
    """Counts what XLA made of a program.

    Returns:
      `kernels`: instructions of the entry computation that run as a kernel each, by kind;
      `instructions`: all instructions, those inside of fusions included; `bytes_accessed` and
      `flops`: XLA's own estimates.
    """
    text = compiled.as_text()
    instruction = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = .*?\s([a-z][a-z0-9-]*)\(", re.MULTILINE)
    entry = text[text.index("\nENTRY ") :]
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    kernels = collections.Counter(kind for kind in instruction.findall(entry) if kind not in free)
    cost = compiled.cost_analysis() or {}
    return {
        "kernels": dict(sorted(kernels.items())),
        "instructions": len(instruction.findall(text)),
        "bytes_accessed": cost.get("bytes accessed"),
        "flops": cost.get("flops"),
    }


def canonical(text: str) -> str:
    """Returns an optimised HLO program without names, sources and values of constants."""
    text = text[text.index("\n%") :]
    text = re.sub(r", metadata=\{.*?\}", "", text)
    text = re.sub(r"constant\([^)]*\)", "constant", text)
    text = re.sub(r"(?<=[(, ])[\w.]+: (?=\w+\[)", "", text)  # parameters of a computation
    names: dict[str, str] = {}
    return re.sub(r"%[\w.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text)


def state_size(state: Any) -> dict[str, Any]:
    """Counts the arrays of an optimizer state and their bytes, and names its counters."""
    leaves = named_leaves(state)
    return {
        "state_leaves": len(leaves),
        "state_bytes": sum(leaf.nbytes for leaf in leaves.values()),
        "state_counters": [name for name, leaf in leaves.items() if jnp.ndim(leaf) == 0],
    }


def lines(results: list[dict[str, Any]]) -> list[list[str]]:
    """Lays the results out, the heading first."""
    heading = ["network", "optimizer", "plain, ms", "ratio", "95 %", "noise", "noise 95 %"]
    rest = ["same program", "kernels", "instructions", "Mflop", "MB touched", "state"]
    found = [[*heading, *rest]]
    for result in results:
        plain, scaled = result["plain"], result["scaled"]
        found.append([
            result["network"],
            result["optimizer"],
            f"{result['milliseconds']['plain']:.2f}",
            f"{result['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*result["ratio_interval"]),
            f"{result['ratio_of_noise'].median:.3f}",
            "{:.3f}-{:.3f}".format(*result["ratio_of_noise_interval"]),
            "yes, but constants" if result["same_but_constants"] else "no",
            change(*(sum(program["kernels"].values()) for program in (plain, scaled))),
            change(plain["instructions"], scaled["instructions"]),
            change(*(program["flops"] / 1e6 for program in (plain, scaled))),
            change(*(program["bytes_accessed"] / 1e6 for program in (plain, scaled))),
            f"{change(plain['state_leaves'], scaled['state_leaves'])} arrays, "
            f"{change(plain['state_bytes'] / 1e6, scaled['state_bytes'] / 1e6)} MB",
        ])  # fmt: skip
    return found


def change(plain: float, scaled: float) -> str:
    """Shows a number of the plain program, and that of the scaled one where it differs."""
    return f"{plain:.4g}" if plain == scaled else f"{plain:.6g} -> {scaled:.6g}"


if __name__ == "__main__":
    common.run(main)
