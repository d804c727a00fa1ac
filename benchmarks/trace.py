"""What does tracing a model cost, and parametrizing it? `python -m benchmarks.trace`, a minute.

Traces models on shapes alone, each in a process of its own, and reports seconds (the jaxpr and
reading it) and the peak memory of the process; and a residual stack of growing depth, for the cost
of a layer. Goals: at most 5 seconds and 1.5 GiB a model.

Then `parametrize` of a Llama of 8 billion parameters over a base of width 1024 and 8 layers, as
modules and as a scanned function. Goals: at most 3 seconds, and 0.5 GiB beyond the imports. Seconds
of the processor stand beside those of the clock, which say less on a machine shared with others.
"""

import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

import archscale_jax as archscale
from benchmarks import common

GOALS = {"seconds": 5.0, "gibibytes": 1.5}
PLAN_GOALS = {"seconds": 3.0, "gibibytes_beyond_imports": 0.5}
DEPTHS = (8, 16, 32, 64, 128, 256)


class Bottleneck(linen.Module):
    """A block of ResNet-152."""

    features: int
    stride: int = 1

    @linen.compact
    def __call__(self, x):
        def layer(y, features, kernel, stride=1):
            y = linen.Conv(features, (kernel, kernel), (stride, stride), use_bias=False)(y)
            return linen.BatchNorm(use_running_average=True)(y)

        y = linen.relu(layer(x, self.features, 1))
        y = linen.relu(layer(y, self.features, 3, self.stride))
        y = layer(y, 4 * self.features, 1)
        if x.shape != y.shape:
            x = layer(x, 4 * self.features, 1, self.stride)
        return linen.relu(x + y)


class ResNet(linen.Module):
    """ResNet-152: 3, 8, 36 and 3 bottlenecks."""

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(64, (7, 7), (2, 2), use_bias=False)(images)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 8, 36, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return linen.Dense(1000)(x.mean((1, 2)))


class Transformer(linen.Module):
    """Pre-normalized blocks of attention and MLP."""

    depth: int
    width: int
    heads: int
    causal: bool = False

    @linen.compact
    def __call__(self, x):
        mask = linen.make_causal_mask(x[..., 0]) if self.causal else None
        for _ in range(self.depth):
            y = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
            y = linen.gelu(linen.Dense(4 * self.width)(linen.LayerNorm()(x)))
            x = x + linen.Dense(self.width)(y)
        return linen.LayerNorm()(x)


class VisionTransformer(linen.Module):
    """ViT-L/16."""

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(1024, (16, 16), (16, 16))(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        normal = linen.initializers.normal()
        token = jnp.tile(self.param("token", normal, (1, 1, 1024)), (len(x), 1, 1))
        x = jnp.concatenate([token, x], axis=1)
        x = x + self.param("position", normal, (1, *x.shape[1:]))
        return linen.Dense(1000)(Transformer(24, 1024, 16)(x)[:, 0])


class Decoder(linen.Module):
    """96 layers, 175 billion parameters, tied embeddings."""

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(50257, 12288)
        position = self.param("position", linen.initializers.normal(), (2048, 12288))
        x = table(tokens) + position[: tokens.shape[-1]]
        return table.attend(Transformer(96, 12288, 96, causal=True)(x))


class Stack(linen.Module):
    """Residual blocks of two dense layers."""

    depth: int

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(64)(x)
        for _ in range(self.depth):
            x = x + linen.Dense(64)(linen.relu(linen.Dense(64)(linen.relu(x))))
        return linen.Dense(10)(x)


def rotated(x):
    """Rotary positions of [batch, time, heads, features]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    one, other = jnp.split(x, 2, axis=-1)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], -1)


class LlamaBlock(linen.Module):
    """Attention with rotary positions and grouped heads, and a gated MLP, both pre-normalized."""

    heads: int
    groups: int
    hidden: int

    @linen.compact
    def __call__(self, x):
        width, size = x.shape[-1], x.shape[-1] // self.heads
        dense = functools.partial(linen.DenseGeneral, use_bias=False)
        y = linen.RMSNorm()(x)
        query = rotated(dense((self.heads, size), name="query")(y))
        key = rotated(dense((self.groups, size), name="key")(y))
        value = dense((self.groups, size), name="value")(y)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, axis=(-2, -1), name="out")(y)
        y = linen.RMSNorm()(x)
        y = linen.silu(dense(self.hidden, name="gate")(y)) * dense(self.hidden, name="up")(y)
        return x + dense(width, name="down")(y)


class Llama(linen.Module):
    """Llama, of any size."""

    depth: int
    width: int
    heads: int
    groups: int
    hidden: int
    vocab: int = 128256

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(self.vocab, self.width)(tokens)
        for _ in range(self.depth):
            x = LlamaBlock(self.heads, self.groups, self.hidden)(x)
        return linen.Dense(self.vocab, use_bias=False)(linen.RMSNorm()(x))


def scanned_llama(depth: int, width: int, heads: int, groups: int, hidden: int) -> tuple:
    """The same as a function, with its blocks stacked and scanned, and the shapes of its params."""

    def norm(x, gain):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * gain

    def block(x, layer):
        y = norm(x, layer["norm1"])
        query, key, value = (
            (y @ layer[name]).reshape(*y.shape[:2], number, -1)
            for name, number in (("query", heads), ("key", groups), ("value", groups))
        )
        y = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + y.reshape(x.shape) @ layer["out"]
        y = norm(x, layer["norm2"])
        return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"], None

    def apply(params, tokens):
        x, _ = jax.lax.scan(block, params["table"][tokens], params["blocks"])
        return norm(x, params["norm"]) @ params["readout"]

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    narrow = width // heads * groups
    sizes = {"norm1": (width,), "norm2": (width,), "query": (width, width), "key": (width, narrow),
             "value": (width, narrow), "out": (width, width), "gate": (width, hidden),
             "up": (width, hidden), "down": (hidden, width)}  # fmt: skip
    vocab = Llama.vocab
    params = {"table": shape(vocab, width), "norm": shape(width), "readout": shape(width, vocab)}
    return apply, params | {"blocks": {name: shape(depth, *one) for name, one in sizes.items()}}


LARGE = {"depth": 32, "width": 4096, "heads": 32, "groups": 8, "hidden": 14336}
SMALL = {"depth": 8, "width": 1024, "heads": 8, "groups": 2, "hidden": 3584}
PLANS: dict[str, Callable[..., Any]] = {
    "Llama-8B, modules": Llama,
    "Llama-8B, a scanned function": scanned_llama,
}

IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
FEATURES = jax.ShapeDtypeStruct((1, 8), jnp.float32)
MODELS: dict[str, Callable[[], tuple[linen.Module, jax.ShapeDtypeStruct]]] = {
    "ResNet-152": lambda: (ResNet(), IMAGES),
    "ViT-L/16": lambda: (VisionTransformer(), IMAGES),
    "decoder, 175 billion": lambda: (Decoder(), jax.ShapeDtypeStruct((1, 2048), jnp.int32)),
    **{f"stack of {depth}": lambda depth=depth: (Stack(depth), FEATURES) for depth in DEPTHS},
}


def main() -> None:
    names = common.sized(list(MODELS), ["stack of 8"])
    results = {name: common.in_fresh_process(cost, name) for name in names}
    common.show(
        "Tracing on shapes alone", lines(results),
        f"Goals: {GOALS['seconds']:.0f} s, {GOALS['gibibytes']} GiB. Memory is the peak of the "
        "whole process, JAX and Flax included.",
    )  # fmt: skip
    sizes = common.sized((LARGE, SMALL), (SMALL, SMALL | {"depth": 4}))
    plans = {name: common.in_fresh_process(cost_of_plan, name, *sizes) for name in PLANS}
    scipy = common.in_fresh_process(cost_of_import, "scipy.stats")
    common.show(
        "parametrize(model, tokens, base=small, optimizer='adamw') on shapes alone",
        plan_lines(plans),
        f"Goals: {PLAN_GOALS['seconds']:.0f} s, {PLAN_GOALS['gibibytes_beyond_imports']} GiB "
        "beyond the imports. Seconds of the clock (of the processor). In the first call SciPy's "
        f"statistics are imported: {scipy['seconds']:.2f} ({scipy['processor_seconds']:.2f}).",
    )
    goals = {"goals": GOALS, "plan_goals": PLAN_GOALS}
    common.write_results("trace", {**goals, "models": results, "plans": plans, "scipy": scipy})


def cost(name: str) -> dict[str, Any]:
    """Traces one model five times; the first counts as the cost, since a user traces once."""
    model, inputs = MODELS[name]()
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)

    def apply(params, inputs):
        return model.apply({"params": params, **state}, inputs)

    def traced():
        return archscale.trace(apply, params, inputs)

    def read():
        return jax.make_jaxpr(apply)(params, inputs)

    architecture, first = common.timed(traced)
    again, jaxpr = (
        common.spread([common.timed(program)[1] for _ in range(count)])
        for program, count in ((traced, 4), (read, 3))
    )
    statistics = archscale.path_statistics(architecture.graph)
    return {
        "seconds": first,
        "again": again,
        "jaxpr_alone_seconds": jaxpr.median,
        "gibibytes": common.peak_memory() / 2**30,
        "leaves": len(architecture.parameters),
        "parameters": sum(math.prod(one.shape) for one in architecture.parameters),
        "vertices": int(architecture.graph.n_node[0]),
        "edges": int(architecture.graph.n_edge[0]),
        "max_depth": statistics.max_depth,
    }


def cost_of_plan(name: str, large: dict[str, int], small: dict[str, int]) -> dict[str, Any]:
    """Parametrizes one model three times; the first counts as the cost."""
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    before = common.peak_memory()

    def planned() -> tuple[archscale.Parametrization, float]:
        start = time.process_time()
        model, base = (PLANS[name](**sizes) for sizes in (large, small))
        plan = archscale.parametrize(model, tokens, base=base, optimizer="adamw")
        return plan, time.process_time() - start

    (plan, processor), first = common.timed(planned)
    memory = (common.peak_memory() - before) / 2**30
    again = [common.timed(planned) for _ in range(2)]
    _, report = common.timed(lambda: str(plan))
    parameters = plan.architecture.parameters
    return {
        "seconds": first,
        "processor_seconds": processor,
        "again": min(seconds for _, seconds in again),
        "again_processor": min(used for (_, used), _ in again),
        "report_seconds": report,
        "gibibytes_beyond_imports": memory,
        "leaves": len(parameters),
        "parameters": sum(math.prod(one.shape) for one in parameters),
        "edges": int(plan.architecture.graph.n_edge[0]),
    }


def cost_of_import(module: str) -> dict[str, float]:
    """Imports a module where JAX, Flax and the library are imported."""
    start = time.process_time()
    _, seconds = common.timed(lambda: importlib.import_module(module) and None)
    return {"seconds": seconds, "processor_seconds": time.process_time() - start}


def plan_lines(results: dict[str, Any]) -> list[list[str]]:
    """Lays the costs of plans out, the heading first."""
    heading = ["model", "parameters", "leaves", "edges", "seconds", "again", "report", "GiB beyond"]
    found = [heading]
    for name, one in results.items():
        pairs = [("seconds", "processor_seconds"), ("again", "again_processor")]
        times = [f"{one[clock]:.2f} ({one[processor]:.2f})" for clock, processor in pairs]
        sizes = [f"{one['parameters']:.3g}", str(one["leaves"]), str(one["edges"])]
        rest = [f"{one['report_seconds']:.2f}", f"{one['gibibytes_beyond_imports']:.2f}"]
        found.append([name, *sizes, *times, *rest])
    return found


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Lays the costs of all models out, the heading first."""
    counts = ["leaves", "vertices", "edges", "max_depth"]
    found = [["model", "parameters", *counts, "seconds", "again", "GiB"]]
    for name, one in results.items():
        costs = (one["seconds"], one["again"].median, one["gibibytes"])
        numbers = [*(str(one[key]) for key in counts), *(f"{cost:.2f}" for cost in costs)]
        found.append([name, f"{one['parameters']:.3g}", *numbers])
    return found


if __name__ == "__main__":
    common.run(main)
