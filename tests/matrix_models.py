"""Ten models of four frameworks, and by hand which of their leaves are matrices of hidden layers.

Small in all but the width. Heads have 16 features, so that their number is a width; inputs,
classes, experts, kernels, groups and one bottleneck of 24 features are none.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

HEAD, CLASSES, EXPERTS, LENGTH = 16, 5, 4, 6

VECTORS = jax.ShapeDtypeStruct((2, 20), jnp.float32)
SEQUENCES = jax.ShapeDtypeStruct((2, LENGTH, 20), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

Axes = tuple[tuple[int, ...], tuple[int, ...]]


class Example(NamedTuple):
    """A model of any width, and what its leaves are.

    Attributes:
      make: from a width to the model.
      inputs: of the model.
      matrices: by regular expression of names, the axes of inputs and of outputs.
      others: by regular expression of names, why Adam has the leaf.
      reads_width: regular expression of those of `others` that sum over a width: Adam's 1/r.
    """

    make: Callable[[int], Any]
    inputs: jax.ShapeDtypeStruct
    matrices: Mapping[str, Axes]
    others: Mapping[str, str]
    reads_width: str


MODELS: dict[str, Example] = {}

IN_OUT: Axes = ((0,), (1,))
OUT_IN: Axes = ((1,), (0,))
STACKED: Axes = ((1,), (2,))
NORMS = {r".*(scale|gamma)": "scale", r".*(offset|beta)": "bias"}


def example(name: str, inputs: jax.ShapeDtypeStruct, **expected: Any):
    def register(make: Callable[[int], Any]) -> Callable[[int], Any]:
        MODELS[name] = Example(make, inputs, **expected)
        return make

    return register


# Flax linen.


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.width // HEAD, deterministic=True)(y, y)
        y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(y)


class LinenTransformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(), (LENGTH, self.width))
        x = LinenBlock(self.width)(x)
        return nn.Dense(50, use_bias=False, name="head")(nn.LayerNorm()(x))


@example(
    "linen transformer",
    TOKENS,
    matrices={
        r".*/(query|key|value)/kernel": ((0,), (1, 2)),
        r".*/out/kernel": ((0, 1), (2,)),
        r".*Block_0/Dense_\d/kernel": IN_OUT,
    },
    others={
        r".*/Embed_0/embedding|.*/positions": "table",
        r".*bias": "bias",
        r".*scale": "scale",
        r".*head/kernel": "readout",
    },
    reads_width=r".*head/kernel",
)
def linen_transformer(width: int):
    return LinenTransformer(width)


class DecoderBlock(nn.Module):
    """SwiGLU with gate and up side by side in one leaf, and shared keys and values."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        project = functools.partial(nn.DenseGeneral, use_bias=False)
        y = nn.RMSNorm(name="norm1")(x)
        heads = self.width // HEAD
        query = project((heads, HEAD), name="query")(y)
        key, value = (project((1, HEAD), name=name)(y) for name in ("key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + project(self.width, axis=(-2, -1), name="out")(mixed)
        both = project((2, 2 * self.width), name="gate_and_up")(nn.RMSNorm(name="norm2")(x))
        return x + project(self.width, name="down")(
            nn.silu(both[..., 0, :]) * both[..., 1, :]
        ), None


class ScannedDecoder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, self.width)(tokens)
        scan = functools.partial(nn.scan, variable_axes={"params": 0}, length=2)
        x, _ = scan(DecoderBlock, split_rngs={"params": True})(self.width, name="blocks")(x, None)
        return nn.Dense(50, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


@example(
    "linen decoder, scanned",
    TOKENS,
    matrices={
        r".*/(query|key|value|gate_and_up)/kernel": ((1,), (2, 3)),
        r".*/out/kernel": ((1, 2), (3,)),
        r".*/down/kernel": STACKED,
    },
    others={
        r".*/embedding": "table", r".*scale": "scale", r".*head/kernel": "readout",
    },
    reads_width=r".*head/kernel",
)  # fmt: skip
def linen_decoder(width: int):
    return ScannedDecoder(width)


class LinenConvolutions(nn.Module):
    """A residual block of each kind of kernel, and a transposed convolution."""

    width: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.GroupNorm, num_groups=None, group_size=HEAD)
        x = conv(self.width, (3, 3), name="stem")(x)
        y = conv(self.width, (3, 3), name="first")(nn.relu(norm()(x)))
        x = x + conv(self.width, (3, 3), name="second")(nn.relu(norm()(y)))
        y = conv(self.width, (3, 3), feature_group_count=self.width, name="depthwise")(norm()(x))
        y = conv(self.width, (3, 3), feature_group_count=self.width // 8, name="grouped")(y)
        x = x + conv(self.width, (1, 1), name="pointwise")(nn.relu(y))
        x = nn.ConvTranspose(self.width // 2, (2, 2), (2, 2), use_bias=False, name="up")(norm()(x))
        return nn.Dense(CLASSES, name="head")(nn.relu(x).mean((1, 2)))


@example(
    "linen CNN",
    IMAGES,
    matrices={r".*/(first|second|pointwise|up)/kernel": ((0, 1, 2), (3,))},
    others={
        r".*/stem/kernel": "input layer", r".*/depthwise/kernel": "depthwise kernel",
        r".*/grouped/kernel": r"kernel of \d+ groups", r".*head/kernel": "readout",
        r".*scale": "scale", r".*bias": "bias",
    },
    reads_width=r".*head/kernel",
)  # fmt: skip
def linen_convolutions(width: int):
    return LinenConvolutions(width)


# Flax NNX.


class NNXBlock(nnx.Module):
    """Query, key and value in one leaf [features, 3, heads, features of a head]."""

    def __init__(self, width, rngs):
        heads = width // HEAD
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, heads, HEAD), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, HEAD), width, axis=(-2, -1), rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        query, key, value = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        x = x + self.out(jax.nn.dot_product_attention(query, key, value, is_causal=True))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXTransformer(nnx.Module):
    def __init__(self, width, rngs):
        self.tokens = nnx.Embed(50, width, rngs=rngs)
        self.block = NNXBlock(width, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 50, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.block(self.tokens(tokens))))


@example(
    "NNX transformer, fused qkv",
    TOKENS,
    matrices={
        r"block/qkv/kernel": ((0,), (1, 2, 3)),
        r"block/out/kernel": ((0, 1), (2,)),
        r"block/(up|down)/kernel": IN_OUT,
    },
    others={
        r"tokens/embedding": "table",
        r".*bias": "bias",
        r".*scale": "scale",
        r"head/kernel": "readout",
    },
    reads_width=r"head/kernel",
)
def nnx_transformer(width: int):
    return nnx.eval_shape(lambda: NNXTransformer(width, nnx.Rngs(0)))


class Experts(nnx.Module):
    """Every token is read by all experts, of which a router takes two; and one that all share."""

    def __init__(self, width, rngs):
        def leaf(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.router = nnx.Linear(width, EXPERTS, use_bias=False, rngs=rngs)
        self.up, self.down = leaf(EXPERTS, width, 2 * width), leaf(EXPERTS, 2 * width, width)
        self.shared = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.norm(x)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(y)), 2)
        gates = jnp.einsum("bk,bke->be", weights, jax.nn.one_hot(chosen, EXPERTS))
        inner = nnx.silu(jnp.einsum("bd,edf->bef", y, self.up[...]))
        experts = jnp.einsum("bef,efd->bed", inner, self.down[...])
        return x + jnp.einsum("be,bed->bd", gates, experts) + self.shared(nnx.silu(y))


class NNXMixture(nnx.Module):
    def __init__(self, width, rngs):
        self.stem = nnx.Linear(20, width, rngs=rngs)
        self.layers = nnx.List(Experts(width, rngs) for _ in range(2))
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@example(
    "NNX mixture of experts",
    VECTORS,
    matrices={r"layers/\d/(up|down)": STACKED, r"layers/\d/shared/kernel": IN_OUT},
    others={
        r"stem/kernel": "input layer",
        r"layers/\d/router/kernel": "router.*",
        r".*bias": "bias",
        r".*scale": "scale",
        r"head/kernel": "readout",
    },
    reads_width=r"head/kernel|layers/\d/router/kernel",
)
def nnx_mixture(width: int):
    return nnx.eval_shape(lambda: NNXMixture(width, nnx.Rngs(0)))


# Equinox: [outputs, inputs].


class EquinoxMLP(eqx.Module):
    """With a bottleneck that stays as it is."""

    layers: list[eqx.nn.Linear]

    def __init__(self, width, key):
        sizes = [20, width, 2 * width, 24, width, CLASSES]
        self.layers = [
            eqx.nn.Linear(before, after, key=key) for before, after in itertools.pairwise(sizes)
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def mapped(model: Any) -> Callable[..., Any]:
    """A module of one example, over a batch, as `archscale_jax.parametrize` takes it."""

    class Batched(eqx.Module):
        inner: Any

        def __call__(self, *inputs):
            return jax.vmap(self.inner)(*inputs)

    return Batched(model)


def equinox(make: Callable[..., Any], width: int):
    return mapped(eqx.filter_eval_shape(make, width, jax.random.key(0)))


@example(
    "Equinox MLP",
    VECTORS,
    matrices={r"inner/layers/[123]/weight": OUT_IN},
    others={
        r"inner/layers/0/weight": "input layer",
        r".*bias": "bias",
        r"inner/layers/4/weight": "readout",
    },
    reads_width=r"inner/layers/4/weight",
)
def equinox_mlp(width: int):
    return equinox(EquinoxMLP, width)


class EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm

    def __init__(self, width, key):
        self.attention = eqx.nn.MultiheadAttention(width // HEAD, width, key=key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=key)
        self.down = eqx.nn.Linear(4 * width, width, key=key)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(lambda h: self.down(jax.nn.gelu(self.up(self.norm2(h)))))(x)


class EquinoxViT(eqx.Module):
    patches: eqx.nn.Conv2d
    token: jax.Array
    positions: jax.Array
    block: EquinoxBlock
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, width, key):
        self.patches = eqx.nn.Conv2d(3, width, 4, stride=4, key=key)
        self.token = jax.random.normal(key, (1, width))
        self.positions = jax.random.normal(key, (5, width))
        self.block = EquinoxBlock(width, key)
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, CLASSES, key=key)

    def __call__(self, image):
        x = self.patches(jnp.moveaxis(image, -1, 0))
        x = jnp.concatenate([self.token, x.reshape(len(x), -1).T]) + self.positions
        return self.head(self.norm(self.block(x)[0]))


@example(
    "Equinox ViT",
    IMAGES,
    matrices={r"inner/block/(attention/\w+_proj|up|down)/weight": OUT_IN},
    others={
        r"inner/patches/weight": "input layer",
        r"inner/(token|positions)": "table",
        r".*bias": "bias",
        r".*norm\d?/weight": "scale",
        r"inner/head/weight": "readout",
    },
    reads_width=r"inner/head/weight",
)
def equinox_vit(width: int):
    return equinox(EquinoxViT, width)


class EquinoxScanned(eqx.Module):
    """Blocks of one kind in one module, whose leaves have a first axis of layers."""

    stem: eqx.nn.Linear
    blocks: EquinoxBlock
    head: eqx.nn.Linear

    def __init__(self, width, key):
        self.stem = eqx.nn.Linear(20, width, key=key)
        make = functools.partial(EquinoxBlock, width)
        self.blocks = eqx.filter_vmap(make)(jax.random.split(key, 2))
        self.head = eqx.nn.Linear(width, CLASSES, key=key)

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.stem)(x), arrays)
        return self.head(x.mean(0))


@example(
    "Equinox blocks, scanned",
    SEQUENCES,
    matrices={r"inner/blocks/(attention/\w+_proj|up|down)/weight": ((2,), (1,))},
    others={
        r"inner/stem/weight": "input layer",
        r".*bias": "bias",
        r".*norm\d/weight": "scale",
        r"inner/head/weight": "readout",
    },
    reads_width=r"inner/head/weight",
)
def equinox_scanned(width: int):
    return equinox(EquinoxScanned, width)


# Haiku.


def haiku_transformer_forward(width: int, tokens: jax.Array) -> jax.Array:
    """Query, key and value in one leaf [features, 3 · features]."""
    x = hk.Embed(50, width)(tokens)
    y = hk.LayerNorm(-1, True, True)(x)
    query, key, value = (
        one.reshape(*one.shape[:-1], -1, HEAD)
        for one in jnp.split(hk.Linear(3 * width, name="qkv")(y), 3, axis=-1)
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + hk.Linear(width, name="out")(mixed.reshape(x.shape))
    y = jax.nn.gelu(hk.Linear(4 * width, name="up")(hk.LayerNorm(-1, True, True)(x)))
    x = x + hk.Linear(width, name="down")(y)
    return hk.Linear(50, name="head")(hk.LayerNorm(-1, True, True)(x))


@example(
    "Haiku transformer, fused qkv",
    TOKENS,
    matrices={r"(qkv|out|up|down)/w": IN_OUT},
    others={
        r"embed/embeddings": "table", r".*(/b|offset)": "bias", r".*scale": "scale",
        r"head/w": "readout",
    },
    reads_width=r"head/w",
)  # fmt: skip
def haiku_transformer(width: int):
    return hk.transform(functools.partial(haiku_transformer_forward, width))


def haiku_convolutions_forward(width: int, images: jax.Array) -> jax.Array:
    """LeNet-like: kernels, then a layer that reads the features of all positions."""
    x = jax.nn.relu(hk.Conv2D(width, 3, 2, name="stem")(images))
    x = jax.nn.relu(hk.Conv2D(2 * width, 3, 2, name="wider")(x))
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(hk.Linear(width // 2, name="dense")(x))
    return hk.Linear(CLASSES, name="head")(x)


@example(
    "Haiku CNN",
    IMAGES,
    matrices={r"wider/w": ((0, 1, 2), (3,)), r"dense/w": IN_OUT},
    others={r"stem/w": "input layer", r".*/b": "bias", r"head/w": "readout"},
    reads_width=r"head/w",
)
def haiku_convolutions(width: int):
    return hk.transform(functools.partial(haiku_convolutions_forward, width))
