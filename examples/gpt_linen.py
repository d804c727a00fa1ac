"""Tunes the learning rate of a small GPT and trains a large one at it (Flax linen, AdamW).

    python examples/gpt_linen.py           # a minute
    python examples/gpt_linen.py --check   # the large one at a quarter and four times the rate too

The text is Python's own source code, which is on every machine, byte by byte.
"""

import argparse
import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import archscale_jax as archscale

LENGTH, BATCH, HEAD = 64, 16, 16


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        heads = nn.MultiHeadDotProductAttention(width // HEAD)  # heads of one size at every width
        x = x + heads(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    """From tokens [B, LENGTH] to logits of the tokens that follow, [B, LENGTH, 256]."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, self.width)(tokens)
        x = x + nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[-1]))
        for _ in range(self.layers):
            x = Block()(x)
        return nn.Dense(256)(nn.LayerNorm()(x))


def batches(steps):
    """Returns random pieces of the text, int32 [steps, BATCH, LENGTH + 1]."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, (steps, BATCH, 1))
    return jnp.asarray(np.frombuffer(text, np.uint8)[starts + np.arange(LENGTH + 1)], jnp.int32)


def trainer(plan, data):
    """Returns a function from a base learning rate to the loss at the end of a whole training."""
    steps = len(data)

    def loss(params, tokens):
        logits = plan.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    @jax.jit  # compiled once for all rates
    def train(rate, data):
        tx = plan.optimizer(lambda count: rate * shape(count), weight_decay=0.1)
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        params = plan.init(jax.random.key(0))

        def step(state, tokens):
            params, inner = state
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, inner = tx.update(gradients, inner, params)
            return (optax.apply_updates(params, updates), inner), value

        losses = jax.lax.scan(step, (params, tx.init(params)), data)[1]
        return losses[-max(1, steps // 10) :].mean()  # every batch is new: nothing is learned twice

    return functools.partial(train, data=data)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="updates of every training")
    parser.add_argument("--check", action="store_true", help="try other rates of the large one too")
    flags = parser.parse_args()

    data = batches(flags.steps)
    small = archscale.parametrize(GPT(2, 32), data[0, :, :-1], optimizer="adamw")
    large = archscale.parametrize(GPT(6, 128), data[0, :, :-1], base=small, optimizer="adamw")

    train = trainer(small, data)
    losses = {rate: float(train(rate)) for rate in np.geomspace(2.0**-8, 2.0**-2, 7).tolist()}
    for rate, loss in losses.items():
        print(f"  2 layers of width 32, rate {rate:.4f}: {loss:.3f} nats a byte")
    best = min(losses, key=losses.__getitem__)

    train = trainer(large, data)
    for rate in (best / 4, 4 * best) if flags.check else ():
        print(f"  6 layers of width 128, rate {rate:.4f}: {float(train(rate)):.3f} nats a byte")
    print(
        f"Rate {best:.4f} is best for the small GPT ({losses[best]:.3f} nats a byte); "
        f"at the same rate the large one ends at {float(train(best)):.3f}."
    )


if __name__ == "__main__":
    main()
