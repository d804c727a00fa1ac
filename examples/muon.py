"""Trains a vision transformer by Muon at a small one's rate (Flax NNX): who updates which leaf.

    python examples/muon.py

Muon makes the update of a matrix orthogonal. Which axes of which leaf are a matrix of a hidden
layer is read from the model; input layer, readout, gains and biases are left to Adam. The pictures
are the digits that scikit-learn ships; a token is one of their 8 lines.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import archscale_jax as archscale

HEAD = 16


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(width // HEAD, width, decode=False, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


class Transformer(nnx.Module):
    """From pictures [B, 8, 8] to logits [B, 10]."""

    def __init__(self, blocks, width, rngs):
        self.stem = nnx.Linear(8, width, rngs=rngs)
        self.positions = nnx.Embed(8, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x) + self.positions(jnp.arange(8))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def trainer(plan, steps):
    """Returns a function from a rate of Muon and data to the params at the end and their loss."""

    def loss(params, x, y):
        logits = plan.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit  # compiled once for all rates
    def train(rate, data):
        decreasing = optax.cosine_decay_schedule(1.0, steps)
        tx = plan.optimizer(
            lambda count: rate * decreasing(count),
            weight_decay=0.1,
            adam_learning_rate=lambda count: 3e-3 * decreasing(count),
        )
        params = plan.init(jax.random.key(0))

        def step(state, batch):
            params, inner = state
            value, gradients = jax.value_and_grad(loss)(params, *batch)
            updates, inner = tx.update(gradients, inner, params)
            return (optax.apply_updates(params, updates), inner), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), data)
        return params, losses[-max(1, steps // 10) :].mean()

    return train


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="updates of every training")
    flags = parser.parse_args()

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(pictures[order], jnp.float32).reshape(-1, 8, 8) / 8 - 1, labels[order]
    batches = np.random.default_rng(1).integers(0, 1500, (flags.steps, 32))  # 297 are held out
    data = x[batches], y[batches]

    def shapes(*size):  # of a model without weights
        return nnx.eval_shape(lambda: Transformer(*size, rngs=nnx.Rngs(0)))

    small = archscale.parametrize(shapes(1, 32), x[:32], optimizer="muon")
    large = archscale.parametrize(shapes(4, 64), x[:32], base=small, optimizer="muon")
    owners = collections.defaultdict(list)
    for one in large.report().records:
        owners[one["optimizer"][:4]].append(one["path"])
    for name, leaves in owners.items():
        print(f"  {name} has {len(leaves)} leaves: {', '.join(leaves[:4])} …")
    train = trainer(small, flags.steps)
    losses = {rate: float(train(rate, data)[1]) for rate in (0.01, 0.03, 0.1, 0.3)}
    for rate, loss in losses.items():
        print(f"  1 block of width 32, rate {rate:g}: training loss {loss:.3f}")
    best = min(losses, key=losses.__getitem__)
    params, loss = trainer(large, flags.steps)(best, data)
    right = (large.apply(params, x[1500:]).argmax(-1) == y[1500:]).mean()
    print(
        f"Muon has {len(owners['muon'])} matrices, Adam {len(owners['adam'])} leaves; at rate "
        f"{best:g}, the best of 1 block of width 32, 4 blocks of width 64 read {float(right):.1%} "
        f"of held-out digits (training loss {float(loss):.3f})."
    )


if __name__ == "__main__":
    main()
