"""The zoo in Flax NNX: sequences."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo import Built, X, example
from tests.zoo_nnx import IMAGES, TOKENS, built

POSITIONS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def attention(rngs, **options):
    return nnx.MultiHeadAttention(
        2, in_features=16, qkv_features=24, decode=False, rngs=rngs, **options
    )


class GPTBlock(nnx.Module):
    def __init__(self, rngs):
        self.ln1 = nnx.LayerNorm(16, rngs=rngs)
        self.attention = attention(rngs)
        self.ln2 = nnx.LayerNorm(16, rngs=rngs)
        self.fc1 = nnx.Linear(16, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.ln1(x), mask=mask)
        return x + self.fc2(nnx.gelu(self.fc1(self.ln2(x))))


class GPT(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(50, 16, rngs=rngs)
        self.positions = nnx.Embed(8, 16, rngs=rngs)
        self.blocks = nnx.List(GPTBlock(rngs) for _ in range(3))
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.tokens.attend(self.norm(x))


@example(
    # Attention is left by query, key or value, then goes through the output: 3X².
    paths=((1 + 3 * X**2) * (1 + X**2)) ** 3,
    roles={
        "embedding": r"(tokens|positions)/embedding",
        "hidden": r"blocks/\d/(attention/(query|key|value|out)|fc1|fc2)/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
    },
    fans={
        "tokens/embedding": (1, 16),
        "blocks/0/attention/query/kernel": (16, 24),
        "blocks/0/attention/out/kernel": (24, 16),
        "blocks/0/fc1/kernel": (16, 64),
    },
    linear=r"blocks/\d/(attention/\w+|fc1)/kernel",
    layers={"tokens/embedding": "readout", "positions/embedding": "input"},
)
def gpt_with_tied_embeddings() -> Built:
    return built(GPT, TOKENS)


def rotate(x, positions):
    """Rotary embedding of [batch, time, heads, features] at integer positions [batch, time]."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-np.arange(half) / half)
    angles = positions[..., None, None] * frequencies
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [left * jnp.cos(angles) - right * jnp.sin(angles),
         right * jnp.cos(angles) + left * jnp.sin(angles)],
        axis=-1,
    )  # fmt: skip


class GroupedQueryAttention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(16, (4, 8), use_bias=False, rngs=rngs)
        self.k = nnx.LinearGeneral(16, (2, 8), use_bias=False, rngs=rngs)
        self.v = nnx.LinearGeneral(16, (2, 8), use_bias=False, rngs=rngs)
        self.o = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x, positions):
        query, key = rotate(self.q(x), positions), rotate(self.k(x), positions)
        mixed = jax.nn.dot_product_attention(query, key, self.v(x), is_causal=True)
        return self.o(mixed)


class LlamaBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.RMSNorm(16, rngs=rngs)
        self.attention = GroupedQueryAttention(rngs)
        self.norm2 = nnx.RMSNorm(16, rngs=rngs)
        self.gate = nnx.Linear(16, 40, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(16, 40, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(40, 16, use_bias=False, rngs=rngs)

    def __call__(self, x, positions):
        x = x + self.attention(self.norm1(x), positions)
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.blocks = nnx.List(LlamaBlock(rngs) for _ in range(3))
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 50, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x))


@example(
    # The branch of SwiGLU is entered by its gate or by what is gated: 2X².
    paths=((1 + 3 * X**2) * (1 + 2 * X**2)) ** 3,
    roles={
        "embedding": r"embed/embedding",
        "hidden": r"blocks/\d/(attention/[qkvo]|gate|up|down)/kernel",
        "scale": r".*/scale",
        "readout": r"head/kernel",
    },
    fans={
        "embed/embedding": (1, 16),
        "blocks/0/attention/q/kernel": (16, 32),
        "blocks/0/attention/k/kernel": (16, 16),
        "blocks/0/attention/o/kernel": (32, 16),
        "blocks/0/down/kernel": (40, 16),
        "head/kernel": (16, 50),
    },
    linear=r"blocks/\d/(attention/[qkvo]|gate|up|down)/kernel",  # a gated value is not one
)
def llama() -> Built:
    return built(Llama, TOKENS, POSITIONS)


class RecurrentLanguageModel(nnx.Module):
    def __init__(self, cell, rngs):
        self.embed = nnx.Embed(50, 8, rngs=rngs)
        self.rnn = nnx.RNN(cell(8, 12, rngs=rngs))
        self.head = nnx.Linear(12, 50, rngs=rngs)

    def __call__(self, tokens):
        outputs = self.rnn(self.embed(tokens))
        return self.head(outputs)  # pyright: ignore[reportArgumentType]  (no carry is returned)


def gru_paths(steps):
    """r and z are X(1 + h), n = tanh(x + r·h) has 2X(1 + h), and h' = (1 - z)·n + z·h."""
    hidden, outputs = 0 * X, 0 * X
    for _ in range(steps):
        gate = X * (1 + hidden)
        hidden = (gate + 2 * gate) + (gate + hidden)
        outputs = outputs + hidden
    return outputs


RECURRENT_ROLES = {
    "embedding": r"embed/embedding",
    "hidden": r"rnn/cell/dense_[ih]/kernel",
    "bias": r".*/bias",
    "readout": r"head/kernel",
}


@example(
    paths=gru_paths(6),
    roles=RECURRENT_ROLES,
    fans={"rnn/cell/dense_i/kernel": (8, 36), "rnn/cell/dense_h/kernel": (12, 36)},
    # Every part of the inputs feeds a sum of its own; one part of the state is multiplied first.
    edges={"rnn/cell/dense_i/kernel": 3 * 6, "rnn/cell/dense_h/kernel": 5},
)
def gru_language_model() -> Built:
    return built(lambda rngs: RecurrentLanguageModel(nnx.GRUCell, rngs), TOKENS)


def fused_lstm_paths(steps):
    """All gates are one vertex v = X(1 + h), so that i·g is an activation of v: c' = f·c + v.

    At the first step c is a constant and f·c an activation of v as well.
    """
    cell, hidden, outputs = 0 * X, 0 * X, 0 * X
    for step in range(steps):
        gates = X * (1 + hidden)
        cell = (gates + cell) + gates if step else gates
        hidden = gates + cell if step else gates
        outputs = outputs + hidden
    return outputs


@example(
    paths=fused_lstm_paths(6),
    roles=RECURRENT_ROLES,
    fans={"rnn/cell/dense_i/kernel": (8, 48), "rnn/cell/dense_h/kernel": (12, 48)},
    edges={"rnn/cell/dense_i/kernel": 6, "rnn/cell/dense_h/kernel": 5},
)
def optimized_lstm_language_model() -> Built:
    return built(lambda rngs: RecurrentLanguageModel(nnx.OptimizedLSTMCell, rngs), TOKENS)


class DiTBlock(nnx.Module):
    def __init__(self, rngs):
        self.ln1 = nnx.LayerNorm(16, use_bias=False, use_scale=False, rngs=rngs)
        self.attention = attention(rngs, normalize_qk=True)
        self.ln2 = nnx.LayerNorm(16, use_bias=False, use_scale=False, rngs=rngs)
        self.fc1 = nnx.Linear(16, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 16, rngs=rngs)
        self.modulation = nnx.Linear(16, 6 * 16, rngs=rngs)

    def __call__(self, x, condition):
        parts = jnp.split(self.modulation(nnx.silu(condition))[:, None], 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.ln1(x) * (1 + scale1) + shift1)
        y = self.ln2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(nnx.gelu(self.fc1(y)))


class DiT(nnx.Module):
    """Diffusion transformer: patches of an image, modulated by an embedding of the time."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((16, 16)))
        self.time1 = nnx.Linear(8, 16, rngs=rngs)
        self.time2 = nnx.Linear(16, 16, rngs=rngs)
        self.blocks = nnx.List(DiTBlock(rngs) for _ in range(2))
        self.head = nnx.Linear(16, 48, rngs=rngs)

    def __call__(self, x, time):
        angles = time[:, None] * 1e4 ** (-np.arange(4) / 4)
        time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        condition = self.time2(nnx.silu(self.time1(time)))
        x = self.patches(x)
        x = x.reshape(len(x), 16, 16) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


def dit_paths(depth):
    """Scale, shift and gate are one modulation m = X·X²; x' = x + m + branch(x + m + m)."""
    x, modulation = X, X**3
    for _ in range(depth):
        x = x + modulation + 3 * X**2 * (x + 2 * modulation)
        x = x + modulation + X**2 * (x + 2 * modulation)
    return x


@example(
    paths=dit_paths(2),
    roles={
        "input": r"(patches|time1)/kernel",
        "embedding": r"positions",
        "hidden": r"time2/kernel|blocks/\d/(modulation|fc1|fc2|attention/\w+)/kernel",
        "bias": r".*/bias",
        "scale": r"blocks/\d/attention/(query|key)_ln/scale",
        "readout": r"head/kernel",
    },
    fans={"patches/kernel": (48, 256), "blocks/1/modulation/kernel": (16, 96)},
    linear=r"blocks/\d/(fc1|attention/\w+)/kernel",
)
def diffusion_transformer() -> Built:
    return built(DiT, IMAGES, jax.ShapeDtypeStruct((2,), jnp.float32))


class Adapted(nnx.Module):
    """Low-rank adapters beside the layers, as the library has them."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            nnx.LoRALinear(before, after, lora_rank=2, rngs=rngs)
            for before, after in [(8, 16), (16, 16), (16, 16), (16, 10)]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


@example(
    # A layer, or the two of its adapter; both of the last that end in the output are readouts.
    paths=(X + X**2) ** 3 * (1 + X),
    roles={
        "input": r"layers/0/(kernel|lora/lora_a)",
        "hidden": r"layers/[12]/kernel|layers/[123]/lora/lora_a|layers/[012]/lora/lora_b",
        "readout": r"layers/3/(kernel|lora/lora_b)",
        "bias": r"layers/\d/bias",
    },
    fans={"layers/1/lora/lora_a": (16, 2), "layers/1/lora/lora_b": (2, 16)},
    linear=r"layers/\d/lora/lora_b",
)
def low_rank_adapters() -> Built:
    return built(Adapted, jax.ShapeDtypeStruct((2, 8), jnp.float32))
