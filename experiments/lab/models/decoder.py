"""Byte-level decoders in Flax linen: GPT-2-like and Llama-like, blocks stacked with scan."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

KINDS = ("gpt2", "llama")
VOCABULARY = 256
HIDDEN = {"gpt2": 4, "llama": 3}
"""Features of an MLP over those of the stream; Llama's 8/3, rounded the same at every width."""


class Decoder(nn.Module):
    """A causal language model over bytes, as its users write it: nothing is of this library.

    `gpt2`: LayerNorm, GELU, learned positions, biases. `llama`: RMSNorm, SwiGLU, rotary positions,
    grouped queries, no biases. Weights are initialized as Flax does.

    Attributes:
      kind: `gpt2` or `llama`.
      depth: blocks.
      width: features of the stream.
      heads: of queries; they divide the width.
      kv_heads: of keys and values; they divide `heads`.
      context: the most tokens, of `gpt2`.
      tied: the readout is the table of embeddings.
      scan: blocks are stacked, each leaf with a first axis of `depth`; else `block_0`, `block_1`, …
      rematerialize: what is inside a block is computed again for its derivatives, and not kept.
      hidden: features of an MLP; by default so many times the stream's as `HIDDEN` says.
    """

    kind: Literal["gpt2", "llama"]
    depth: int
    width: int
    heads: int
    kv_heads: int
    context: int
    tied: bool = False
    scan: bool = True
    rematerialize: bool = False
    hidden: int | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        table = nn.Embed(VOCABULARY, self.width, name="table")
        x = table(tokens)
        if self.kind == "gpt2":
            positions = jnp.arange(tokens.shape[-1])
            x = x + nn.Embed(self.context, self.width, name="positions")(positions)
        hidden = self.hidden or HIDDEN[self.kind] * self.width
        of = self.kind, self.width, self.heads, self.kv_heads, hidden
        block = Block
        if self.rematerialize:  # a loop keeps XLA from merging both computations, by itself
            block = nn.remat(Block, prevent_cse=not self.scan)
        if self.scan:
            stack = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = stack(block(*of, name="blocks"), x, None)
        else:
            for index in range(self.depth):
                x = block(*of, name=f"block_{index}")(x)
        x = _norm(self.kind, "final_norm")(x)
        if self.tied:
            return table.attend(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="readout")(x)


class Block(nn.Module):
    """Attention, then an MLP, each behind a normalization and added to the stream."""

    kind: str
    width: int
    heads: int
    kv_heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        x = x + self._attention(_norm(self.kind, "attention_norm")(x))
        return x + self._mlp(_norm(self.kind, "mlp_norm")(x))

    def _attention(self, x):
        features, bias = self.width // self.heads, self.kind == "gpt2"

        def project(heads, name):
            return nn.DenseGeneral((heads, features), use_bias=bias, name=name)(x)

        queries = project(self.heads, "query")
        keys, values = project(self.kv_heads, "key"), project(self.kv_heads, "value")
        if self.kind == "llama":
            queries, keys = rotate(queries), rotate(keys)
        attended = attend(queries, keys, values)
        return nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=bias, name="out")(attended)

    def _mlp(self, x):
        hidden, bias = self.hidden, self.kind == "gpt2"

        def dense(features, name):
            return nn.Dense(features, use_bias=bias, name=name)

        if self.kind == "llama":
            x = nn.silu(dense(hidden, "gate")(x)) * dense(hidden, "up")(x)
        else:
            x = nn.gelu(dense(hidden, "up")(x))
        return dense(self.width, "down")(x)


def _norm(kind: str, name: str) -> nn.Module:
    return nn.RMSNorm(name=name) if kind == "llama" else nn.LayerNorm(name=name)


def attend(
    queries: Float[Array, "b t h d"], keys: Float[Array, "b t g d"], values: Float[Array, "b t g d"]
) -> Float[Array, "b t h d"]:
    """Causal attention; each head of keys serves h/g heads of queries, one behind the other."""
    batch, tokens, heads, features = queries.shape
    groups = keys.shape[2]
    queries = queries.reshape(batch, tokens, groups, heads // groups, features)
    scores = jnp.einsum("btgrd,bsgd->bgrts", queries, keys) / features**0.5
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    attended = jnp.einsum("bgrts,bsgd->btgrd", weights, values)
    return attended.reshape(batch, tokens, heads, features)


def rotate(x: Float[Array, "b t h d"], base: float = 10_000.0) -> Float[Array, "b t h d"]:
    """Rotary positions: features i and i + d/2 turn by t·base^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
    cosines, sines = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )
