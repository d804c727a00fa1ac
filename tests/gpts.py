"""The GPT-2 of the golden files of CompleteP, as users of four frameworks and of none write it.

`../shared/golden/completep` holds its numbers. Blocks are x + attention(norm(x)) and
x + mlp(norm(x)), attention logits are scaled by 1/d_head, GELU is exact, and nothing is multiplied
anywhere else: the multipliers of CompleteP are for `golden_params` to fold into the weights, or for
the caller.

Every model has the variants of `Config`: one projection to query, key and value or three, and
weights [in, out] or [out, in]. Where a framework's own layer has the other layout, the model has a
small linear layer of its own, as its users would write.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from archscale_jax._trees import map_with_names, named_leaves

FRAMEWORKS = ("linen", "nnx", "equinox", "haiku", "function")
VARIANTS = (
    {"fused": True, "layout": "in_out"},
    {"fused": False, "layout": "out_in"},
)
PROJECTIONS = ("query", "key", "value")
EPSILON = 1e-5

Apply = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants; `layout` is `in_out` or `out_in`, `tied` reads out by the token table."""

    depth: int
    width: int
    heads: int
    vocab: int
    length: int
    tied: bool
    fused: bool
    layout: str
    dtype: Any


# Flax linen.


class LinenLinear(nn.Module):
    """A layer with weights [out, in]."""

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]), self.dtype)
        y = jnp.einsum("...i,oi->...o", x, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return y


def linen_linear(config: Config, features: int, name: str, use_bias: bool = True) -> Callable:
    if config.layout == "out_in":
        return LinenLinear(features, use_bias, config.dtype, name=name)
    return nn.Dense(features, use_bias, dtype=config.dtype, param_dtype=config.dtype, name=name)


def linen_norm(config: Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(EPSILON, config.dtype, config.dtype, name=name)


class LinenAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        if config.fused:
            parts = jnp.split(linen_linear(config, 3 * config.width, "qkv")(x), 3, axis=-1)
        else:
            parts = [linen_linear(config, config.width, name)(x) for name in PROJECTIONS]
        query, key, value = (one.reshape(*x.shape[:-1], config.heads, -1) for one in parts)
        query = query / query.shape[-1] ** 0.5  # Flax divides by the root once more
        y = nn.dot_product_attention(query, key, value, mask=mask)
        return linen_linear(config, config.width, "out")(y.reshape(x.shape))


class LinenBlock(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        y = linen_norm(config, "norm1")(x)
        x = x + LinenAttention(config, name="attention")(y, mask)
        y = linen_linear(config, 4 * config.width, "up")(linen_norm(config, "norm2")(x))
        return x + linen_linear(config, config.width, "down")(nn.gelu(y, approximate=False))


class LinenGPT(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.dtype}
        table = nn.Embed(config.vocab, config.width, **dtypes, name="tokens")
        positions = nn.Embed(config.length, config.width, **dtypes, name="positions")
        x = table(tokens) + positions(jnp.arange(tokens.shape[-1]))
        mask = nn.make_causal_mask(tokens)
        for number in range(config.depth):
            x = LinenBlock(config, name=f"blocks_{number}")(x, mask)
        x = linen_norm(config, "norm")(x)
        if config.tied:
            return table.attend(x)
        return linen_linear(config, config.vocab, "readout", use_bias=False)(x)


# Flax NNX.


class NnxLinear(nnx.Module):
    """A layer with weights [out, in]."""

    def __init__(self, inputs, outputs, *, use_bias, dtype, rngs):
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        self.kernel = nnx.Param(init(rngs.params(), (outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if use_bias else None

    def __call__(self, x):
        y = jnp.einsum("...i,oi->...o", x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


def nnx_linear(config: Config, inputs: int, outputs: int, rngs, use_bias: bool = True):
    dtype = config.dtype
    if config.layout == "out_in":
        return NnxLinear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def nnx_norm(config: Config, rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width, epsilon=EPSILON, dtype=config.dtype, param_dtype=config.dtype, rngs=rngs
    )


def causal_attention(query, key, value):
    """Attention of [..., time, heads, features], with logits scaled by 1/features."""
    length = query.shape[-3]
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1]
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), value)


class NnxAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.heads = config.heads
        width = config.width
        if config.fused:
            self.qkv = nnx_linear(config, width, 3 * width, rngs)
        else:
            self.query, self.key, self.value = (
                nnx_linear(config, width, width, rngs) for _ in PROJECTIONS
            )
        self.out = nnx_linear(config, width, width, rngs)
        self.fused = config.fused

    def __call__(self, x):
        if self.fused:
            parts = jnp.split(self.qkv(x), 3, axis=-1)
        else:
            parts = [self.query(x), self.key(x), self.value(x)]
        parts = [one.reshape(*x.shape[:-1], self.heads, -1) for one in parts]
        return self.out(causal_attention(*parts).reshape(x.shape))


class NnxBlock(nnx.Module):
    def __init__(self, config, rngs):
        width = config.width
        self.norm1 = nnx_norm(config, rngs)
        self.attention = NnxAttention(config, rngs)
        self.norm2 = nnx_norm(config, rngs)
        self.up = nnx_linear(config, width, 4 * width, rngs)
        self.down = nnx_linear(config, 4 * width, width, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class NnxGPT(nnx.Module):
    def __init__(self, config, rngs):
        width, dtypes = config.width, {"dtype": config.dtype, "param_dtype": config.dtype}
        self.tokens = nnx.Embed(config.vocab, width, **dtypes, rngs=rngs)
        self.positions = nnx.Embed(config.length, width, **dtypes, rngs=rngs)
        self.blocks = nnx.List(NnxBlock(config, rngs) for _ in range(config.depth))
        self.norm = nnx_norm(config, rngs)
        self.tied = config.tied
        if not config.tied:
            self.readout = nnx_linear(config, width, config.vocab, rngs, use_bias=False)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.tokens.attend(x) if self.tied else self.readout(x)


# Equinox, whose layers take one example.


class EquinoxLinear(eqx.Module):
    """A layer with weights [in, out]."""

    weight: jax.Array
    bias: jax.Array | None

    def __init__(self, inputs, outputs, use_bias, dtype, key):
        self.weight = jax.random.normal(key, (inputs, outputs), dtype) / inputs**0.5
        self.bias = jnp.zeros(outputs, dtype) if use_bias else None

    def __call__(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def equinox_linear(config: Config, inputs: int, outputs: int, key, use_bias: bool = True):
    if config.layout == "in_out":
        return EquinoxLinear(inputs, outputs, use_bias, config.dtype, key)
    return eqx.nn.Linear(inputs, outputs, use_bias, config.dtype, key=key)


class EquinoxAttention(eqx.Module):
    qkv: Any  # None, or the next three are
    query: Any
    key: Any
    value: Any
    out: Callable
    heads: int = eqx.field(static=True)

    def __init__(self, config, key):
        width, keys = config.width, jax.random.split(key, 5)
        self.qkv = self.query = self.key = self.value = None
        if config.fused:
            self.qkv = equinox_linear(config, width, 3 * width, keys[0])
        else:
            self.query = equinox_linear(config, width, width, keys[1])
            self.key = equinox_linear(config, width, width, keys[2])
            self.value = equinox_linear(config, width, width, keys[3])
        self.out = equinox_linear(config, width, width, keys[4])
        self.heads = config.heads

    def __call__(self, x):
        if self.qkv is not None:
            parts = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        else:
            parts = [jax.vmap(one)(x) for one in (self.query, self.key, self.value)]
        heads = [one.reshape(len(x), self.heads, -1) for one in parts]
        y = jax.vmap(attention_of_head, in_axes=1, out_axes=1)(*heads)
        return jax.vmap(self.out)(y.reshape(x.shape))


def attention_of_head(query, key, value):
    """Attention of [time, features], with logits scaled by 1/features."""
    length, features = query.shape
    logits = query @ key.T / features
    mask = jnp.arange(length)[:, None] >= jnp.arange(length)
    return jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)) @ value


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: EquinoxAttention
    norm2: eqx.nn.LayerNorm
    up: Callable
    down: Callable

    def __init__(self, config, key):
        width, keys = config.width, jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(width, EPSILON, dtype=config.dtype)
        self.attention = EquinoxAttention(config, keys[0])
        self.norm2 = eqx.nn.LayerNorm(width, EPSILON, dtype=config.dtype)
        self.up = equinox_linear(config, width, 4 * width, keys[1])
        self.down = equinox_linear(config, 4 * width, width, keys[2])

    def __call__(self, x):
        x = x + self.attention(jax.vmap(self.norm1)(x))
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y, approximate=False))


class EquinoxGPT(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[EquinoxBlock]
    norm: eqx.nn.LayerNorm
    readout: Callable | None

    def __init__(self, config, key):
        width, keys = config.width, jax.random.split(key, config.depth + 3)
        self.tokens = eqx.nn.Embedding(config.vocab, width, dtype=config.dtype, key=keys[0])
        self.positions = eqx.nn.Embedding(config.length, width, dtype=config.dtype, key=keys[1])
        self.blocks = [EquinoxBlock(config, one) for one in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width, EPSILON, dtype=config.dtype)
        self.readout = None
        if not config.tied:
            self.readout = equinox_linear(config, width, config.vocab, keys[2], use_bias=False)

    def __call__(self, tokens):
        return jax.vmap(self.of_one)(tokens)

    def of_one(self, tokens):
        x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        x = jax.vmap(self.norm)(x)
        return x @ self.tokens.weight.T if self.readout is None else jax.vmap(self.readout)(x)


# Haiku, whose `Embed` has float32 tables only.


class HaikuLinear(hk.Module):
    """A layer with weights [out, in]."""

    def __init__(self, outputs, with_bias, name):
        super().__init__(name)
        self.outputs, self.with_bias = outputs, with_bias

    def __call__(self, x):
        inputs = x.shape[-1]
        init = hk.initializers.TruncatedNormal(inputs**-0.5)
        w = hk.get_parameter("w", (self.outputs, inputs), x.dtype, init)
        y = jnp.einsum("...i,oi->...o", x, w)
        if self.with_bias:
            y = y + hk.get_parameter("b", (self.outputs,), x.dtype, jnp.zeros)
        return y


def haiku_linear(config: Config, outputs: int, name: str, with_bias: bool = True) -> Callable:
    if config.layout == "out_in":
        return HaikuLinear(outputs, with_bias, name)
    return hk.Linear(outputs, with_bias, name=name)


def haiku_norm(name: str) -> hk.LayerNorm:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, eps=EPSILON, name=name)


class HaikuAttention(hk.Module):
    def __init__(self, config, name):
        super().__init__(name)
        self.config = config

    def __call__(self, x):
        config, (batch, length, width) = self.config, x.shape
        if config.fused:
            parts = jnp.split(haiku_linear(config, 3 * width, "qkv")(x), 3, axis=-1)
        else:
            parts = [haiku_linear(config, width, name)(x) for name in PROJECTIONS]
        query, key, value = (
            one.reshape(batch, length, config.heads, -1).transpose(0, 2, 1, 3) for one in parts
        )
        logits = query @ key.transpose(0, 1, 3, 2) * (1 / query.shape[-1])
        logits = jnp.where(np.tri(length, dtype=bool), logits, -1e30)
        y = jax.nn.softmax(logits, axis=-1) @ value
        return haiku_linear(config, width, "out")(y.transpose(0, 2, 1, 3).reshape(x.shape))


class HaikuBlock(hk.Module):
    def __init__(self, config, name):
        super().__init__(name)
        self.config = config

    def __call__(self, x):
        config = self.config
        x = x + HaikuAttention(config, "attention")(haiku_norm("norm1")(x))
        y = haiku_linear(config, 4 * config.width, "up")(haiku_norm("norm2")(x))
        return x + haiku_linear(config, config.width, "down")(jax.nn.gelu(y, approximate=False))


class HaikuGPT(hk.Module):
    def __init__(self, config, name="gpt"):
        super().__init__(name)
        self.config = config

    def __call__(self, tokens):
        config = self.config

        def table(name, rows):
            shape, init = (rows, config.width), hk.initializers.RandomNormal(0.02)
            return hk.get_parameter(name, shape, config.dtype, init)

        embedding = table("tokens", config.vocab)
        x = embedding[tokens] + table("positions", config.length)[: tokens.shape[1]]
        for number in range(config.depth):
            x = HaikuBlock(config, f"blocks_{number}")(x)
        x = haiku_norm("norm")(x)
        if config.tied:
            return x @ embedding.T
        return haiku_linear(config, config.vocab, "readout", with_bias=False)(x)


# A function, with the layers stacked and scanned.


def function_params(config: Config, key: jax.Array) -> dict[str, Any]:
    """Params of `function_gpt`; every leaf of `blocks` is [depth, ...]."""
    width, dtype = config.width, config.dtype
    keys = iter(jax.random.split(key, 9))

    def linear(inputs: int, outputs: int, use_bias: bool = True, stack: tuple[int, ...] = ()):
        sides = (inputs, outputs) if config.layout == "in_out" else (outputs, inputs)
        weight = jax.random.normal(next(keys), (*stack, *sides), dtype) / inputs**0.5
        bias = {"bias": jnp.zeros((*stack, outputs), dtype)} if use_bias else {}
        return {"weight": weight} | bias

    def norm(*stack: int):
        shape = (*stack, width)
        return {"gain": jnp.ones(shape, dtype), "bias": jnp.zeros(shape, dtype)}

    def hidden(inputs: int, outputs: int):
        return linear(inputs, outputs, stack=(config.depth,))

    if config.fused:
        attention = {"qkv": hidden(width, 3 * width)}
    else:
        attention = {name: hidden(width, width) for name in PROJECTIONS}
    params = {
        "tokens": jax.random.normal(next(keys), (config.vocab, width), dtype) * 0.02,
        "positions": jax.random.normal(next(keys), (config.length, width), dtype) * 0.02,
        "blocks": {
            "norm1": norm(config.depth),
            "attention": attention | {"out": hidden(width, width)},
            "norm2": norm(config.depth),
            "up": hidden(width, 4 * width),
            "down": hidden(4 * width, width),
        },
        "norm": norm(),
    }
    if not config.tied:
        params["readout"] = linear(width, config.vocab, use_bias=False)
    return params


def function_gpt(config: Config) -> Apply:
    """Returns `apply(params, tokens)`."""
    letters = "io" if config.layout == "in_out" else "oi"

    def linear(params, x):
        y = jnp.einsum(f"...i,{letters}->...o", x, params["weight"])
        return y + params["bias"] if "bias" in params else y

    def norm(params, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
        return x * params["gain"] + params["bias"]

    def attention(params, x):
        if config.fused:
            parts = jnp.split(linear(params["qkv"], x), 3, axis=-1)
        else:
            parts = [linear(params[name], x) for name in PROJECTIONS]
        parts = [one.reshape(*x.shape[:-1], config.heads, -1) for one in parts]
        return linear(params["out"], causal_attention(*parts).reshape(x.shape))

    def block(x, params):
        x = x + attention(params["attention"], norm(params["norm1"], x))
        y = linear(params["up"], norm(params["norm2"], x))
        return x + linear(params["down"], jax.nn.gelu(y, approximate=False)), None

    def apply(params, tokens):
        x = params["tokens"][tokens] + params["positions"][: tokens.shape[-1]]
        x, _ = jax.lax.scan(block, x, params["blocks"])
        x = norm(params["norm"], x)
        return x @ params["tokens"].T if config.tied else linear(params["readout"], x)

    return apply


# All of them.


def build(
    framework: str,
    case: Mapping[str, Any],
    fused: bool = True,
    layout: str = "in_out",
    dtype: Any = jnp.float64,
) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Returns a model without weights and its inputs, as `parametrize(model, *inputs)` takes them.

    Args:
      framework: one of `FRAMEWORKS`; of `function` the model is a pair (apply, shapes of params).
      case: a record of cases.json, or what `base_of` makes of one.
      fused: one projection to query, key and value, in this order; else three.
      layout: that of the weights of linear layers, `in_out` or `out_in`.
      dtype: of all parameters; float64 needs `jax.enable_x64`.
    """
    sizes = {name: case[name] for name in ("depth", "width", "heads", "vocab", "length", "tied")}
    config = Config(**sizes, fused=fused, layout=layout, dtype=dtype)
    key = jax.random.key(0)
    shapes_of = functools.partial(jax.eval_shape, functools.partial(function_params, config))
    makers: dict[str, Callable[[], Any]] = {
        "linen": lambda: LinenGPT(config),
        "nnx": lambda: nnx.eval_shape(lambda: NnxGPT(config, nnx.Rngs(0))),
        "equinox": lambda: eqx.filter_eval_shape(EquinoxGPT, config, key),
        "haiku": lambda: hk.without_apply_rng(hk.transform(lambda x: HaikuGPT(config)(x))),
        "function": lambda: (function_gpt(config), shapes_of(key)),
    }
    tokens = jax.ShapeDtypeStruct((case["batch"], case["length"]), jnp.int32)
    return makers[framework](), (tokens,)


def is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def base_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case at its base's width and depth; the number of heads stays."""
    return {**case, "width": case["base_width"], "depth": case["base_depth"]}


def pure(framework: str, model: Any, inputs: tuple[Any, ...]) -> tuple[Apply, Any]:
    """Returns `apply(params, tokens)` and the shapes of params, by the framework's own means."""
    if framework == "function":
        return model
    if framework == "nnx":
        graph, params = nnx.split(model, nnx.Param)
        return (lambda params, tokens: nnx.merge(graph, params)(tokens)), params
    if framework == "equinox":
        params, static = eqx.partition(model, is_shape)
        return (lambda params, tokens: eqx.combine(params, static)(tokens)), params
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), *inputs)


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of logits [..., T, vocab] of all but the last of tokens [..., T + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:]).mean()


# Their parameters, and those of the golden files.


@dataclasses.dataclass(frozen=True)
class Spelling:
    """What a framework calls its parameters; `block` has no number where layers are stacked."""

    prefix: str
    table: str
    block: str
    weight: str
    bias: str
    gain: str
    offset: str


_SPELLINGS = {
    "linen": Spelling("params/", "/embedding", "blocks_{}", "kernel", "bias", "scale", "bias"),
    "nnx": Spelling("", "/embedding", "blocks/{}", "kernel", "bias", "scale", "bias"),
    "equinox": Spelling("", "/weight", "blocks/{}", "weight", "bias", "weight", "bias"),
    "haiku": Spelling("gpt/", "", "blocks_{}", "w", "b", "scale", "offset"),
    "function": Spelling("", "", "blocks", "weight", "bias", "gain", "bias"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf stands in the golden files.

    Attributes:
      names: golden names of what the leaf holds: one, or one a layer where they are stacked.
      third: which third of their rows it holds; None where it holds all.
      linear: a weight of a linear layer, which the golden files have as [out, in].
      stacked: its first axis numbers the layers.
    """

    names: tuple[str, ...]
    third: int | None = None
    linear: bool = False
    stacked: bool = False


def places(framework: str, case: Mapping[str, Any], fused: bool = True) -> dict[str, Place]:
    """The place of every leaf, by the names that `named_leaves` gives."""
    spelling = _SPELLINGS[framework]
    found = {
        f"tokens{spelling.table}": Place(("transformer.wte.weight",)),
        f"positions{spelling.table}": Place(("transformer.wpe.weight",)),
        f"norm/{spelling.gain}": Place(("transformer.ln_f.weight",)),
        f"norm/{spelling.offset}": Place(("transformer.ln_f.bias",)),
    }
    if not case["tied"]:
        found[f"readout/{spelling.weight}"] = Place(("lm_head.weight",), linear=True)
    for leaf, place in _places_in_block(spelling, fused).items():
        layers = [f"transformer.h.{layer}.{place.names[0]}" for layer in range(case["depth"])]
        if "{}" not in spelling.block:
            one = dataclasses.replace(place, names=tuple(layers), stacked=True)
            found[f"{spelling.block}/{leaf}"] = one
            continue
        for layer, name in enumerate(layers):
            one = dataclasses.replace(place, names=(name,))
            found[f"{spelling.block.format(layer)}/{leaf}"] = one
    return {spelling.prefix + name: place for name, place in found.items()}


def _places_in_block(spelling: Spelling, fused: bool) -> dict[str, Place]:
    """The place of every leaf of a block, by names within it."""
    found = {}
    for name, golden in (("norm1", "ln_1"), ("norm2", "ln_2")):
        found[f"{name}/{spelling.gain}"] = Place((f"{golden}.weight",))
        found[f"{name}/{spelling.offset}"] = Place((f"{golden}.bias",))
    linears: list[tuple[str, str, int | None]] = [
        ("attention/out", "attn.c_proj", None),
        ("up", "mlp.c_fc", None),
        ("down", "mlp.c_proj", None),
    ]
    if fused:
        linears.append(("attention/qkv", "attn.c_attn", None))
    else:
        linears += [(f"attention/{one}", "attn.c_attn", i) for i, one in enumerate(PROJECTIONS)]
    for name, golden, third in linears:
        found[f"{name}/{spelling.weight}"] = Place((f"{golden}.weight",), third, linear=True)
        found[f"{name}/{spelling.bias}"] = Place((f"{golden}.bias",), third)
    return found


def fold_factor(case: Mapping[str, Any], name: str) -> float:
    """The forward multiplier that is folded into a parameter, by its golden name; 1 into most."""
    if ".c_proj." in name and case["depth_scaling"]:
        return (case["depth"] / case["base_depth"]) ** -case["alpha"]
    if name == "lm_head.weight":
        return case["base_width"] / case["width"]
    return 1.0


def golden_params(
    framework: str,
    case: Mapping[str, Any],
    golden: Mapping[str, np.ndarray],
    template: Any,
    fold: bool,
    fused: bool = True,
    layout: str = "in_out",
) -> Any:
    """Returns a tree like the template with the initial weights of a golden file, in float64.

    Args:
      framework: see `build`, as `fused` and `layout`.
      case: a record of cases.json.
      golden: the arrays of its file.
      template: params as `pure` or `Parametrization.init` gives them.
      fold: multiplies what ends a branch, weights and biases, by m_L^(-α), and an untied readout
        by 1/m_N.

    Raises:
      ValueError: a template that has other leaves than the golden file.
    """
    found = places(framework, case, fused)
    if named_leaves(template).keys() != found.keys():
        raise ValueError(f"template has other leaves than {sorted(found)}")

    def leaf(name: str, like: Any) -> jax.Array:
        place = found[name]
        parts = []
        for one in place.names:
            part = golden[f"init/{one}"].astype(np.float64)
            part = part if place.third is None else np.split(part, 3)[place.third]
            part = part * (fold_factor(case, one) if fold else 1.0)
            parts.append(part.T if place.linear and layout == "in_out" else part)
        value = np.stack(parts) if place.stacked else parts[0]
        if value.shape != like.shape:
            raise ValueError(f"{name}: template has shape {like.shape}, golden {value.shape}")
        return jnp.asarray(value)

    return map_with_names(leaf, template)


def unfolded(
    framework: str,
    case: Mapping[str, Any],
    params: Any,
    fold: bool,
    fused: bool = True,
    layout: str = "in_out",
) -> dict[str, np.ndarray]:
    """Returns params by golden names, in the golden layout and without the multipliers.

    The inverse of `golden_params`, with its arguments.
    """
    leaves = named_leaves(params)
    parts: dict[str, list[np.ndarray]] = {}
    for name, place in places(framework, case, fused).items():
        value = np.asarray(leaves[name])
        for one, part in zip(place.names, value if place.stacked else [value], strict=True):
            part = part.T if place.linear and layout == "in_out" else part
            part = part / (fold_factor(case, one) if fold else 1.0)
            parts.setdefault(one, []).append(part)
    return {name: np.concatenate(some) for name, some in parts.items()}
