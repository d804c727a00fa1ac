"""Networks of any width for the check of single steps, `tests/leaf_steps.py`.

Every network is small in all but its width: one or two blocks, short sequences. What is not a width
stays as it is: classes, tokens, heads of 16 features, groups of 8, experts, kernels. Predictions
are few, 2 to 16: at width n they disturb one another by sqrt(predictions / n), which must be small
at the smallest width, or effects shrink with the width by this alone.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CLASSES, TOKENS, LENGTH, HEAD = 4, 8, 4, 16


class Network(NamedTuple):
    """A network of one width.

    Attributes:
      apply: `(params, inputs)` to logits, classes last.
      shapes: of its params.
      inputs: a batch.
      labels: a class for every prediction.
      readout: name of the leaf that makes the logits.
    """

    apply: Callable[[Any, Any], jax.Array]
    shapes: Any
    inputs: jax.Array
    labels: jax.Array
    readout: str


NETWORKS: dict[str, Callable[[int], Network]] = {}

Leaves = Mapping[str, tuple[int, ...]]
Apply = Callable[[Any, Any], jax.Array]


def network(name: str, inputs: Callable[[], jax.Array], readout: str = "readout"):
    """Registers a function from a width to `apply` and the shapes of its params."""

    def register(make: Callable[[int], tuple[Apply, Any]]):
        @functools.wraps(make)
        def built(width: int) -> Network:
            apply, shapes = make(width)
            if isinstance(shapes, dict) and all(isinstance(one, tuple) for one in shapes.values()):
                shapes = {key: jax.ShapeDtypeStruct(shape, jnp.float32)
                          for key, shape in shapes.items()}  # fmt: skip
            batch = inputs()
            logits = jax.eval_shape(apply, shapes, batch)
            labels = np.random.default_rng(1).integers(0, logits.shape[-1], logits.shape[:-1])
            return Network(apply, shapes, batch, jnp.asarray(labels), readout)

        NETWORKS[name] = built
        return built

    return register


def vectors() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (4, 20))


def images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 6, 6, 3))


def small_images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, 4, 4, 3))


def sequences() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (4, 4, 12))


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, LENGTH), 0, TOKENS)


# Pieces.


def layer_norm(h: jax.Array, gain: jax.Array, offset: jax.Array) -> jax.Array:
    centred = h - h.mean(-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return centred * scale * gain + offset


def rms_norm(h: jax.Array, gain: jax.Array) -> jax.Array:
    return h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * gain


def batch_norm(h: jax.Array, gain: jax.Array, offset: jax.Array) -> jax.Array:
    mean = h.mean((0, 1, 2), keepdims=True)
    return (h - mean) * lax.rsqrt(h.var((0, 1, 2), keepdims=True) + 1e-5) * gain + offset


def convolve(h: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        h, kernel, (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def heads(h: jax.Array) -> jax.Array:
    return h.reshape(*h.shape[:-1], -1, HEAD)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """Attention [batch, length, features] with heads of 16 features."""
    q, k, v = map(heads, (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD)
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -1e9)
    found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return found.reshape(*found.shape[:2], -1)


def norm_leaves(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_gain": (width,), f"{name}_offset": (width,)}


def normed(p: Any, name: str, h: jax.Array) -> jax.Array:
    return layer_norm(h, p[f"{name}_gain"], p[f"{name}_offset"])


# Perceptrons.


@network("MLP with biases", vectors, "w3")
def mlp(width: int):
    sizes = [20, width, width, width, CLASSES]
    leaves: dict[str, tuple[int, ...]] = {}
    for number in range(4):
        leaves[f"w{number}"] = (sizes[number], sizes[number + 1])
        leaves[f"b{number}"] = (sizes[number + 1],)

    def apply(p, h):
        for number in range(4):
            h = h if number == 0 else jax.nn.relu(h)
            h = h @ p[f"w{number}"] + p[f"b{number}"]
        return h

    return apply, leaves


@network("weight-normalized MLP", vectors, "v2")
def weight_normalized(width: int):
    sizes = [20, width, width, CLASSES]
    leaves: dict[str, tuple[int, ...]] = {}
    for number in range(3):
        leaves[f"v{number}"] = (sizes[number], sizes[number + 1])
        if number < 2:
            leaves[f"g{number}"] = (sizes[number + 1],)

    def apply(p, h):
        for number in range(2):
            v = p[f"v{number}"]
            h = jax.nn.relu(h @ (v / jnp.linalg.norm(v, axis=0)) * p[f"g{number}"])
        return h @ p["v2"]

    return apply, leaves


@network("Equinox MLP", vectors, "layers/3/weight")
def equinox_mlp(width: int):
    model = equinox.filter_eval_shape(equinox.nn.MLP, 20, CLASSES, width, 3, key=jax.random.key(0))
    params, static = equinox.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(params, x):
        return jax.vmap(equinox.combine(params, static))(x)

    return apply, params


@network("per-head block-diagonal layer", vectors)
def block_diagonal(width: int):
    def apply(p, x):
        h = heads(jax.nn.relu(x @ p["stem"]))
        h = jnp.einsum("bhi,hij->bhj", h, p["blocks"]).reshape(x.shape[0], -1)
        return jax.nn.relu(jax.nn.relu(h) @ p["dense"]) @ p["readout"]

    return apply, {
        "stem": (20, width), "blocks": (width // HEAD, HEAD, HEAD),
        "dense": (width, width), "readout": (width, CLASSES),
    }  # fmt: skip


@network("mixture of 4 experts", vectors)
def mixture(width: int):
    def apply(p, x):
        h = x @ p["stem"]
        read = rms_norm(h, p["gain"])
        weights = jax.nn.softmax(read @ p["router"])
        inner = jax.nn.relu(jnp.einsum("bi,eif->bef", read, p["up"]))
        h = h + jnp.einsum("bef,efo,be->bo", inner, p["down"], weights)
        return jax.nn.relu(h) @ p["readout"]

    return apply, {
        "stem": (20, width), "gain": (width,), "router": (width, 4), "up": (4, width, width),
        "down": (4, width, width), "readout": (width, CLASSES),
    }  # fmt: skip


# Transformers.


def attention_leaves(width: int, fused: bool = False) -> dict[str, tuple[int, ...]]:
    leaves: dict[str, tuple[int, ...]] = {"out": (width, width)}
    if fused:
        return leaves | {"qkv": (width, 3 * width)}
    return leaves | {name: (width, width) for name in ("query", "key", "value")}  # noqa: C420


def block_leaves(width: int, fused: bool = False) -> dict[str, tuple[int, ...]]:
    return {
        **norm_leaves("first", width), **attention_leaves(width, fused),
        **norm_leaves("second", width),
        "up": (width, 2 * width), "up_bias": (2 * width,), "down": (2 * width, width),
    }  # fmt: skip


def block(p: Any, h: jax.Array, causal: bool = True) -> jax.Array:
    read = normed(p, "first", h)
    if "qkv" in p:
        q, k, v = jnp.split(read @ p["qkv"], 3, -1)
    else:
        q, k, v = read @ p["query"], read @ p["key"], read @ p["value"]
    h = h + attend(q, k, v, causal) @ p["out"]
    return h + jax.nn.gelu(normed(p, "second", h) @ p["up"] + p["up_bias"]) @ p["down"]


def transformer(width: int, fused: bool = False, tied: bool = False):
    def apply(p, x):
        h = block(p, p["tokens"][x] + p["positions"])
        h = normed(p, "last", h)[:, -1]
        return h @ (p["tokens"].T if tied else p["readout"])

    leaves = {
        "tokens": (TOKENS, width), "positions": (LENGTH, width), **block_leaves(width, fused),
        **norm_leaves("last", width),
    }  # fmt: skip
    return apply, leaves | ({} if tied else {"readout": (width, TOKENS)})


network("transformer", tokens)(transformer)
network("transformer, fused qkv", tokens)(functools.partial(transformer, fused=True))
network("tied transformer", tokens, "tokens")(functools.partial(transformer, tied=True))


@network("transformer, scanned blocks", tokens)
def scanned_transformer(width: int):
    def apply(p, x):
        stacked = {name: p[name] for name in block_leaves(width)}
        h = p["tokens"][x] + p["positions"]
        h, _ = lax.scan(lambda h, slices: (block(slices, h), None), h, stacked)
        return normed(p, "last", h)[:, -1] @ p["readout"]

    return apply, {
        "tokens": (TOKENS, width), "positions": (LENGTH, width),
        **{name: (2, *shape) for name, shape in block_leaves(width).items()},
        **norm_leaves("last", width), "readout": (width, TOKENS),
    }  # fmt: skip


@network("SwiGLU language model", tokens)
def swiglu(width: int):
    def apply(p, x):
        h = p["tokens"][x]
        for number in range(2):
            read = rms_norm(h, p[f"gain{number}"])
            gate = jax.nn.silu(read @ p[f"gate{number}"])
            h = h + (gate * (read @ p[f"up{number}"])) @ p[f"down{number}"]
        return rms_norm(h, p["gain"])[:, -1] @ p["readout"]

    leaves = {"tokens": (TOKENS, width), "gain": (width,), "readout": (width, TOKENS)}
    for number in range(2):
        leaves |= {
            f"gain{number}": (width,), f"gate{number}": (width, 2 * width),
            f"up{number}": (width, 2 * width), f"down{number}": (2 * width, width),
        }  # fmt: skip
    return apply, leaves


def patches(p: Any, x: jax.Array) -> jax.Array:
    """Patches of 2 × 2 as tokens, [batch, 9, features]."""
    h = lax.conv_general_dilated(
        x, p["patches"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return h.reshape(h.shape[0], -1, h.shape[-1])


@network("ViT, learned query", images)
def vit(width: int):
    def apply(p, x):
        h = block(p, patches(p, x) + p["positions"], causal=False)
        query = jnp.broadcast_to(p["probe"], (h.shape[0], 1, width))
        h = normed(p, "last", h)
        h = attend(query @ p["map_query"], h @ p["map_key"], h @ p["map_value"]) @ p["map_out"]
        return h[:, 0] @ p["readout"]

    return apply, {
        "patches": (2, 2, 3, width), "positions": (9, width), **block_leaves(width),
        **norm_leaves("last", width), "probe": (1, 1, width),
        **{f"map_{name}": shape for name, shape in attention_leaves(width).items()},
        "readout": (width, CLASSES),
    }  # fmt: skip


@network("DETR-like cross attention", images)
def detr(width: int):
    def apply(p, x):
        memory = patches(p, x) + p["positions"]
        memory = layer_norm(memory, p["memory_gain"], p["memory_offset"])
        h = jnp.broadcast_to(p["queries"], (x.shape[0], 4, width))
        read = normed(p, "first", h)
        found = attend(read @ p["query"], memory @ p["key"], memory @ p["value"])
        h = h + found @ p["out"]
        h = h + jax.nn.relu(normed(p, "second", h) @ p["up"]) @ p["down"]
        return normed(p, "last", h)[:, 0] @ p["readout"]

    return apply, {
        "patches": (2, 2, 3, width), "positions": (9, width), **norm_leaves("memory", width),
        "queries": (4, width), **norm_leaves("first", width), **attention_leaves(width),
        **norm_leaves("second", width), "up": (width, width), "down": (width, width),
        **norm_leaves("last", width), "readout": (width, CLASSES),
    }  # fmt: skip


@network("MLP-Mixer", images)
def mixer(width: int):
    def apply(p, x):
        h = patches(p, x)
        read = jnp.swapaxes(normed(p, "first", h), 1, 2)
        mixed = jax.nn.gelu(read @ p["token_up"]) @ p["token_down"]
        h = h + jnp.swapaxes(mixed, 1, 2)
        h = h + jax.nn.gelu(normed(p, "second", h) @ p["up"]) @ p["down"]
        return normed(p, "last", h).mean(1) @ p["readout"]

    return apply, {
        "patches": (2, 2, 3, width), **norm_leaves("first", width), "token_up": (9, 32),
        "token_down": (32, 9), **norm_leaves("second", width), "up": (width, 2 * width),
        "down": (2 * width, width), **norm_leaves("last", width), "readout": (width, CLASSES),
    }  # fmt: skip


# Convolutions.


@network("ResNet, batch norm", images)
def resnet(width: int):
    def apply(p, x):
        h = batch_norm(convolve(x, p["stem"]), p["stem_gain"], p["stem_offset"])
        inner = batch_norm(convolve(jax.nn.relu(h), p["first"]), p["first_gain"], p["first_offset"])
        branch = convolve(jax.nn.relu(inner), p["second"])
        h = h + batch_norm(branch, p["second_gain"], p["second_offset"])
        return jax.nn.relu(h).mean((1, 2)) @ p["readout"] + p["bias"]

    return apply, {
        "stem": (3, 3, 3, width), **norm_leaves("stem", width), "first": (3, 3, width, width),
        **norm_leaves("first", width), "second": (3, 3, width, width),
        **norm_leaves("second", width), "readout": (width, CLASSES), "bias": (CLASSES,),
    }  # fmt: skip


@network("MobileNet, depthwise", images)
def mobilenet(width: int):
    def apply(p, x):
        h = jax.nn.relu(convolve(x, p["stem"]) + p["stem_bias"])
        h = jax.nn.relu(convolve(h, p["depthwise"], width) + p["depthwise_bias"])
        return jax.nn.relu(convolve(h, p["pointwise"])).mean((1, 2)) @ p["readout"]

    return apply, {
        "stem": (3, 3, 3, width), "stem_bias": (width,), "depthwise": (3, 3, 1, width),
        "depthwise_bias": (width,), "pointwise": (1, 1, width, width),
        "readout": (width, CLASSES),
    }  # fmt: skip


@network("ResNeXt, groups of 8", images)
def resnext(width: int):
    def apply(p, x):
        h = convolve(x, p["stem"])
        inner = jax.nn.relu(convolve(jax.nn.relu(h), p["first"]))
        inner = jax.nn.relu(convolve(inner, p["grouped"], width // 8))
        h = h + convolve(inner, p["last"])
        return jax.nn.relu(h).mean((1, 2)) @ p["readout"]

    return apply, {
        "stem": (3, 3, 3, width), "first": (1, 1, width, width), "grouped": (3, 3, 8, width),
        "last": (1, 1, width, width), "readout": (width, CLASSES),
    }  # fmt: skip


@network("ConvNeXt", images)
def convnext(width: int):
    def apply(p, x):
        h = normed(p, "stem", patches(p, x)).reshape(x.shape[0], 3, 3, width)
        inner = normed(p, "norm", convolve(h, p["depthwise"], width))
        inner = jax.nn.gelu(inner @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
        h = h + inner * p["layer_scale"]
        return normed(p, "last", h.mean((1, 2))) @ p["readout"]

    return apply, {
        "patches": (2, 2, 3, width), **norm_leaves("stem", width), "depthwise": (3, 3, 1, width),
        **norm_leaves("norm", width), "up": (width, 2 * width), "up_bias": (2 * width,),
        "down": (2 * width, width), "down_bias": (width,), "layer_scale": (width,),
        **norm_leaves("last", width), "readout": (width, CLASSES),
    }  # fmt: skip


class UNetModule(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        fine = nn.Conv(self.width // 2, (3, 3), name="stem")(x)
        coarse = nn.Conv(self.width, (2, 2), strides=2, name="down")(nn.relu(fine))
        coarse = nn.Conv(self.width, (1, 1), name="middle")(nn.relu(coarse))
        up = nn.ConvTranspose(self.width // 2, (2, 2), strides=(2, 2), name="up")
        both = jnp.concatenate([nn.relu(fine), nn.relu(up(nn.relu(coarse)))], -1)
        last = nn.Conv(self.width, (1, 1), name="last")(both)
        return nn.Conv(CLASSES, (1, 1), name="readout")(nn.relu(last))


def linen(make: Callable[[int], nn.Module], inputs: Callable[[], jax.Array]):
    def made(width: int):
        module = make(width)
        apply: Any = module.apply
        return apply, jax.eval_shape(module.init, jax.random.key(0), inputs())

    return made


network("U-Net, transposed convolution", small_images, "params/readout/kernel")(
    linen(UNetModule, small_images)
)


# Recurrent networks.


class Recurrent(nn.Module):
    width: int
    cell: Any

    @nn.compact
    def __call__(self, x):
        h: Any = nn.RNN(self.cell(self.width), name="rnn")(x)
        return nn.Dense(CLASSES, name="readout")(h[:, -1])


network("LSTM", sequences, "params/readout/kernel")(
    linen(lambda width: Recurrent(width, nn.OptimizedLSTMCell), sequences)
)
network("GRU", sequences, "params/readout/kernel")(
    linen(lambda width: Recurrent(width, nn.GRUCell), sequences)
)


@network("Haiku LSTM", sequences, "linear/w")
def haiku_lstm(width: int):
    def forward(x):
        core = hk.LSTM(width)
        unroll: Any = hk.dynamic_unroll  # whose type allows no array
        h, _ = unroll(core, jnp.swapaxes(x, 0, 1), core.initial_state(x.shape[0]))
        last: Any = h  # whose type may be a tree
        return hk.Linear(CLASSES)(last[-1])

    function = hk.without_apply_rng(hk.transform(forward))
    return function.apply, jax.eval_shape(function.init, jax.random.key(0), sequences())
