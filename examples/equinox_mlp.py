"""Trains a wide, deep perceptron at the rate of a small one (Equinox, Adam).

    python examples/equinox_mlp.py

The pictures are the digits that scikit-learn ships. An Equinox module takes one example, so that
`parametrize` gets the shape of one.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import archscale_jax as archscale

KEY = jax.random.key(0)


class Network(eqx.Module):
    """From one example [64] to logits [10]: perceptrons that are added to a stream."""

    stem: eqx.nn.Linear
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, blocks, width, key):
        first, last, *keys = jax.random.split(key, 2 + blocks)
        self.stem = eqx.nn.Linear(64, width, key=first)
        self.blocks = [eqx.nn.MLP(width, width, width, 1, key=one) for one in keys]
        self.head = eqx.nn.Linear(width, 10, key=last)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(jax.nn.relu(x))
        return self.head(jax.nn.relu(x))


def fit(network, plan, rate, data):
    """Returns the model that was trained on batches (x, y), and its last losses' mean."""
    trained, rest = eqx.partition(network, eqx.is_inexact_array)
    del trained  # plan.init gives others
    model = eqx.combine(plan.init(KEY), rest)
    tx = plan.optimizer(rate)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x, y):
        def loss(model):
            logits = jax.vmap(model)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for x, y in data:
        model, state, value = step(model, state, x, y)
        losses.append(float(value))
    return model, float(np.mean(losses[-max(1, len(losses) // 10) :]))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="updates of every training")
    flags = parser.parse_args()

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(pictures[order] / 8 - 1, jnp.float32), jnp.asarray(labels[order])
    drawn = np.random.default_rng(1).integers(0, 1500, (flags.steps, 64))
    data = [(x[batch], y[batch]) for batch in drawn]  # the last 297 are held out

    small, large = Network(2, 32, KEY), Network(12, 256, KEY)
    example = jax.ShapeDtypeStruct((64,), jnp.float32)
    base = archscale.parametrize(small, example, optimizer="adam")
    plan = archscale.parametrize(large, example, base=base, optimizer="adam")

    losses = {rate: fit(small, base, rate, data)[1] for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
    for rate, loss in losses.items():
        print(f"  2 blocks of width 32, rate {rate:g}: training loss {loss:.3f}")
    best = min(losses, key=losses.__getitem__)
    model, loss = fit(large, plan, best, data)
    right = (jax.vmap(model)(x[1500:]).argmax(-1) == y[1500:]).mean()
    print(
        f"At rate {best:g}, the best of 2 blocks of width 32, 12 blocks of width 256 read "
        f"{float(right):.1%} of held-out digits (training loss {loss:.3f})."
    )


if __name__ == "__main__":
    main()
