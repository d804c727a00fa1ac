"""What does tracing a model cost? `python -m benchmarks.trace`, a minute.

Traces models on shapes alone, each in a process of its own, and reports seconds (the jaxpr and
reading it) and the peak memory of the process; and a residual stack of growing depth, for the cost
of a layer, drawn into docs/figures. Goals: at most 5 seconds and 1.5 GiB a model.
"""

import json
import math
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import linen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import archscale_jax as archscale
from benchmarks import common
from experiments.lab import files

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Trace this one alone and print its costs as JSON.")

GOALS = {"seconds": 5.0, "gibibytes": 1.5}
FIGURE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures" / "trace.png"
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


def _images():
    return jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


MODELS: dict[str, Callable[[], tuple[linen.Module, jax.ShapeDtypeStruct]]] = {
    "ResNet-152": lambda: (ResNet(), _images()),
    "ViT-L/16": lambda: (VisionTransformer(), _images()),
    "decoder, 175 billion": lambda: (Decoder(), jax.ShapeDtypeStruct((1, 2048), jnp.int32)),
    **{
        f"stack of {depth}": lambda depth=depth: (
            Stack(depth),
            jax.ShapeDtypeStruct((1, 8), jnp.float32),
        )
        for depth in DEPTHS
    },
}


def main(arguments: list[str]) -> None:
    """Traces every model in a process of its own, prints the table and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    if FLAGS.model is not None:
        print(json.dumps(cost(FLAGS.model)))
        return
    results = {}
    for name in MODELS:
        command = [sys.executable, "-m", "benchmarks.trace", f"--model={name}"]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(answer.stdout.splitlines()[-1])
    console = Console(width=120)
    console.print(table(results))
    path = common.write_results("trace", {"goals": GOALS, "models": results}, "flax")
    draw({depth: results[f"stack of {depth}"] for depth in DEPTHS})
    for written in (path, FIGURE):
        console.print(f"{written.relative_to(path.parents[2])}")


def cost(name: str) -> dict[str, Any]:
    """Traces one model five times; the first counts as the cost, since a user traces once."""
    model, inputs = MODELS[name]()
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)

    def apply(params, inputs):
        return model.apply({"params": params, **state}, inputs)

    architecture, first = common.timed(lambda: archscale.trace(apply, params, inputs))
    times = [common.seconds(lambda: archscale.trace(apply, params, inputs)) for _ in range(4)]
    jaxpr = common.spread([common.seconds(lambda: _jaxpr(apply, params, inputs)) for _ in range(3)])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statistics = archscale.path_statistics(architecture.graph)
    return {
        "seconds": first,
        "again": common.spread(times)._asdict(),
        "jaxpr_alone_seconds": jaxpr.median,
        "gibibytes": memory / 2**20 if sys.platform != "darwin" else memory / 2**30,
        "leaves": len(architecture.parameters),
        "parameters": sum(math.prod(one.shape) for one in architecture.parameters),
        "vertices": int(architecture.graph.n_node[0]),
        "edges": int(architecture.graph.n_edge[0]),
        "max_depth": statistics.max_depth,
    }


def draw(stacks: dict[int, dict[str, Any]]) -> None:
    """Draws seconds against layers, the first time and again, with a straight line beside."""
    layers = [2 * depth + 2 for depth in stacks]
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    first = [one["seconds"] for one in stacks.values()]
    slope = first[-1] / layers[-1]
    axes.plot(layers, [slope * count for count in layers], ":", color="#888888", label="linear")
    axes.plot(layers, first, "o-", color="#0072b2", label="first trace of a process")
    again = [one["again"]["median"] for one in stacks.values()]
    axes.plot(layers, again, "s--", color="#d55e00", label="again, JAX's own caches filled")
    axes.set(xscale="log", yscale="log", xlabel="weight layers", ylabel="seconds")
    axes.set_xticks(layers, list(map(str, layers)))
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    axes.set_ylim(top=4 * first[-1])
    files.write_atomically(FIGURE, lambda target: figure.savefig(target, dpi=150))


def _jaxpr(function, *arguments) -> None:
    jax.make_jaxpr(function)(*arguments)


def table(results: dict[str, Any]) -> Table:
    """Returns the table of all models."""
    found = Table(
        title="Tracing on shapes alone",
        caption=f"Goals: {GOALS['seconds']:.0f} s, {GOALS['gibibytes']} GiB. Memory is the peak of "
        "the whole process, JAX and Flax included.",
    )
    columns = ("parameters", "leaves", "vertices", "edges", "depth", "seconds", "again", "GiB")
    found.add_column("model")
    for column in columns:
        found.add_column(column, justify="right")
    for name, one in results.items():
        counts = (one[key] for key in ("leaves", "vertices", "edges", "max_depth"))
        found.add_row(
            name,
            f"{one['parameters']:.3g}",
            *map(str, counts),
            f"{one['seconds']:.2f}",
            f"{one['again']['median']:.2f}",
            f"{one['gibibytes']:.2f}",
        )
    return found


if __name__ == "__main__":
    app.run(main)
