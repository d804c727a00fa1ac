"""What does tracing a model cost? `python -m benchmarks.trace`, a minute.

Traces models on shapes alone, each in a process of its own, and reports seconds (the jaxpr and
reading it) and the peak memory of the process; and a residual stack of growing depth, for the cost
of a layer. Goals: at most 5 seconds and 1.5 GiB a model.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

import archscale_jax as archscale
from benchmarks import common

GOALS = {"seconds": 5.0, "gibibytes": 1.5}
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
    common.write_results("trace", {"goals": GOALS, "models": results})


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
