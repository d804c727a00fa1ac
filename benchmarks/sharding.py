"""What do sharded models cost, and is anything ever whole? `python -m benchmarks.sharding`, 10 min.

Compiles only: no array of a model exists. Every configuration runs in a process of its own with so
many virtual CPU devices, and reports seconds to compile and bytes a device, as XLA counts them. Of
`initialize` and `scale_by_architecture`, the program is read too: no operation may make more
elements than the largest shard has, and none may have the shape of a leaf that is divided. (A
training step gathers weights where it multiplies by them, as FSDP does.)

* A decoder of 17 million parameters on 1 and on 8 devices: FSDP, tensor parallel, data parallel.
* One of 175 billion, the shape of GPT-3, on 256: its layers stacked in a scan, and one by one. XLA
  takes long over a single program that draws 1538 leaves, so there `initialize` is not jitted, as
  it need not be, and draws leaf by leaf.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import archscale_jax as archscale
from archscale_jax import _initialize as initializer
from archscale_jax.contrib import _gradinit_step as gradinit_step
from benchmarks import common

LEAST = 2**12
"""Leaves of fewer elements are on every device."""


class Block(nn.Module):
    """Causal attention and an MLP, each added to the stream after normalization."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        # Rows of the batch are divided over all axes but the one that divides layers.
        rows = jax.sharding.PartitionSpec("data")
        x = jax.lax.with_sharding_constraint(x, rows)
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
        y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        x = x + nn.Dense(self.width)(y)
        return jax.lax.with_sharding_constraint(x, rows), None


class Decoder(nn.Module):
    """A language model with tied embeddings."""

    depth: int
    width: int
    heads: int
    vocabulary: int
    context: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(self.vocabulary, self.width)
        position = self.param("position", nn.initializers.normal(), (self.context, self.width))
        x = table(tokens) + position
        sizes = self.width, self.heads
        if self.scanned:
            scan = nn.scan(
                nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            x, _ = scan(*sizes)(x, None)
        else:
            for _ in range(self.depth):
                x, _ = nn.remat(Block)(*sizes)(x)
        return table.attend(nn.LayerNorm()(x))


class Case(NamedTuple):
    """A model on a mesh of `data` x `model` devices; `divide` says whether data divides weights."""

    model: Decoder
    data: int
    model_axis: int
    divide: bool
    batch: int
    programs: tuple[str, ...]


SMALL = functools.partial(Decoder, 4, 512, 8, 8192, 128)
LARGE = functools.partial(Decoder, 96, 12288, 96, 50432, 2048)  # 50257 tokens, padded
MOST = ("initialize", "scale", "step", "measure_update")
ALL = (*MOST, "gradinit")
CASES = {
    "one device": Case(SMALL(False), 1, 1, False, 8, ALL),
    "8, data": Case(SMALL(False), 8, 1, False, 8, MOST),
    "8, FSDP": Case(SMALL(False), 8, 1, True, 8, MOST),
    "8, tensor": Case(SMALL(False), 1, 8, False, 8, MOST),
    "8, FSDP x tensor": Case(SMALL(False), 4, 2, True, 8, ALL),
    "8, FSDP x tensor, scan": Case(SMALL(True), 4, 2, True, 8, MOST),
    "256, 175 billion, scan": Case(LARGE(True), 32, 8, True, 32, ("initialize", "scale", "step")),
    "256, 175 billion, unrolled": Case(LARGE(False), 32, 8, True, 32, ("leaf by leaf", "scale")),
}


def main() -> None:
    results = {}
    for name in common.sized(list(CASES), ["8, data"]):
        count = CASES[name].data * CASES[name].model_axis
        devices = {"JAX_NUM_CPU_DEVICES": str(count)}
        results[name] = common.in_fresh_process(measure, name, environment=devices)
        common.write_results("sharding", results)  # what there is so far
    common.show(
        "Sharded models, compiled", lines(results),
        "MiB a device; largest: elements of the largest array that the program makes, over those "
        "of the largest leaf's shard; whole: divided leaves whose full shape appears.",
    )  # fmt: skip


def measure(name: str) -> dict[str, Any]:
    """Compiles the programs of one case, with so many devices."""
    case = CASES[name]
    mesh = jax.make_mesh(
        (case.data, case.model_axis), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    tokens = jax.ShapeDtypeStruct(
        (case.batch, case.model.context),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(case.model.init, jax.random.key(0), tokens)
        params = sharded(shapes, mesh, case.divide)
        architecture, traced = common.timed(
            lambda: archscale.trace(case.model.apply, params, tokens)
        )
        found = {
            name: leaf_by_leaf(params) if name == "leaf by leaf" else compiled(program, params)
            for name, program in programs(case, architecture, params, tokens)
        }
    leaves = jax.tree.leaves(params)
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "leaves": len(leaves),
        "trace_seconds": traced,
        "bytes_a_device": sum(4 * math.prod(shard(leaf)) for leaf in leaves),
        "largest_leaf": max(math.prod(leaf.shape) for leaf in leaves),
        "largest_shard": max(math.prod(shard(leaf)) for leaf in leaves),
        "programs": found,
        "gibibytes": common.peak_memory() / 2**30,
    }


def sharded(shapes: Any, mesh: Mesh, divide: bool) -> Any:
    """Returns shapes that say where they lie.

    The axis `model` divides what tensor parallelism does (heads, the hidden features of an MLP, the
    vocabulary); `data` the longest axis that is left, if it divides weights.
    """
    places = {"query": -2, "key": -2, "value": -2, "out": -3, "Dense_0": -1, "Dense_1": -2}

    def place(path, leaf):
        names = [key.key for key in path]
        spec: list[str | None] = [None] * len(leaf.shape)
        if math.prod(leaf.shape) >= LEAST:
            found = [places[name] for name in names if name in places]
            axis = found[0] if names[-1] == "kernel" else -2 if names[-1] == "embedding" else None
            if axis is not None:
                spec[axis] = "model"
            left = [
                (size, axis)
                for axis, size in enumerate(leaf.shape)
                if spec[axis] is None and size % mesh.shape["data"] == 0
            ]
            if divide and left:
                spec[max(left)[1]] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def programs(case: Case, architecture, params, tokens):
    """Yields the programs of a case by name, lowered when called."""
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        archscale.scale_by_architecture(architecture, architecture, "none", depth_rule="sgd"),
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, params)

    def loss(params, tokens):
        logits: jax.Array = jnp.asarray(case.model.apply(params, tokens))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params, state, tokens):
        gradients = jax.grad(loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def initialize(key):
        return archscale.initialize(key, params, architecture)

    def features(params, tokens):
        return archscale.vertex_features(case.model.apply, params, tokens)

    def update(params, tokens):
        return archscale.measure_update(features, loss, params, tokens, optax.sgd(1.0))

    momentum = (optax.TraceState(trace=params), optax.EmptyState())
    state = (momentum, optax.EmptyState())
    lowered: dict[str, Callable[[], Any]] = {
        "initialize": lambda: jax.jit(initialize).lower(jax.random.key(0)),
        "scale": lambda: jax.jit(tx.update).lower(params, state),
        "step": lambda: jax.jit(step, donate_argnums=(0, 1), out_shardings=(places, None)).lower(
            params, state, tokens
        ),
        "measure_update": lambda: jax.jit(update).lower(params, tokens),
        "gradinit": lambda: learn(loss, params, tokens),
        "leaf by leaf": lambda: None,
    }
    for name in case.programs:
        yield name, lowered[name]


def learn(loss, params, tokens):
    """One iteration of GradInit, the choice of the branch compiled in as on accelerators."""
    leaves = jax.tree.leaves(params)
    variant = gradinit_step.Variant(loss, tuple(range(len(leaves))), "sgd", False, False)
    settings = {
        "rate": 0.1, "limit": 1.0, "penalty": 0.0, "scale_rate": 0.01, "clip": 1.0,
        "bounds": (0.01, math.inf),
    }  # fmt: skip
    state = gradinit_step.initial_state(len(leaves))
    return gradinit_step.jitted_step.lower(
        state, params, (tokens, tokens, tokens), settings, variant=variant
    )


def leaf_by_leaf(params: Any) -> dict[str, Any]:
    """The programs of `initialize` outside of `jax.jit`: one for every shape and sharding.

    Returns:
      The sum of seconds, and the largest of the rest, since one runs after the other.
    """
    key, kinds = jax.random.key(0), {}
    for leaf in jax.tree.leaves(params):
        program = initializer._compiled(initializer._normal, leaf.shape, leaf.dtype, leaf.sharding)
        kinds[leaf.shape, leaf.sharding] = program, leaf
    costs = [
        compiled(functools.partial(program.lower, key, 1.0), leaf)
        for program, leaf in kinds.values()
    ]
    seconds = sum(cost.pop("compile_seconds") for cost in costs)
    return {name: max(cost[name] for cost in costs) for name in costs[0]} | {
        "compile_seconds": seconds, "programs": len(costs),
    }  # fmt: skip


def compiled(lower: Callable[[], Any], params: Any) -> dict[str, Any]:
    """Compiles a program and says what it needs and what it makes."""
    program, costs = common.compiled(lower)
    memory = program.memory_analysis()
    shapes = set(shapes_in(program.as_text()))
    divided = [leaf for leaf in jax.tree.leaves(params) if shard(leaf) != leaf.shape]
    return {
        "compile_seconds": costs["compile_seconds"],
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "largest_made": max(map(math.prod, shapes)),
        "whole_leaves": sum(leaf.shape in shapes for leaf in divided),
        "largest_whole": max(
            (math.prod(leaf.shape) for leaf in divided if leaf.shape in shapes), default=0
        ),
    }


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Returns the shapes of all arrays in the text of a compiled program."""
    found = re.findall(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]*)\]", text)
    return [tuple(map(int, one.split(","))) if one else () for one in found]


def shard(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the shape that a device holds."""
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Lays the programs of all cases out, the heading first."""
    found = [["case", "leaves", "program", "compile s", "arguments", "outputs", "temporary",
              "largest", "whole"]]  # fmt: skip
    for name, one in results.items():
        for program, cost in one["programs"].items():
            sizes = (f"{cost[key] / 2**20:.1f}" for key in ("argument", "output", "temporary"))
            largest = f"{cost['largest_made'] / one['largest_shard']:.2f}"
            begin = [name, str(one["leaves"]), program, f"{cost['compile_seconds']:.1f}"]
            found.append([*begin, *sizes, largest, str(cost["whole_leaves"])])
    return found


if __name__ == "__main__":
    common.run(main)
