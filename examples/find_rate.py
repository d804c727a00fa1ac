"""Finds the best learning rate of a network, and says how sure it is.

    python examples/find_rate.py

The search needs one function, from a rate and a seed to the losses of one training. It starts from
a guess, expands along the grid until losses rise, trains further seeds where the best rate can be,
and refines the grid there. Grids by name, {"learning_rate": …, "weight_decay": …}, search both. The
pictures are the digits that scikit-learn ships.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import archscale_jax as archscale


class Network(nn.Module):
    """From pictures [B, 64] to logits [B, 10]."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(2):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(nn.relu(x))))
        return nn.Dense(10)(nn.relu(x))


def trainer(plan, data, held_out):
    """Returns the function that is searched: a rate and a seed to the losses of one training."""

    def loss(params, x, y):
        logits = plan.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def run(rate, seed, data, held_out):
        params, tx = plan.init(jax.random.key(seed)), plan.optimizer(rate, weight_decay=0.1)

        def step(state, batch):
            params, inner = state
            value, gradients = jax.value_and_grad(loss)(params, *batch)
            updates, inner = tx.update(gradients, inner, params)
            return (optax.apply_updates(params, updates), inner), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), data)
        return jnp.stack([losses.max(), loss(params, *held_out)])  # the last one counts

    return lambda rate, seed: run(rate, seed, data, held_out)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="updates of every training")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every rate that can win")
    flags = parser.parse_args()

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(pictures[order] / 8 - 1, jnp.float32), jnp.asarray(labels[order])
    batches = np.random.default_rng(1).integers(0, 1500, (flags.steps, 32))
    data, held_out = (x[batches], y[batches]), (x[1500:], y[1500:])

    plan = archscale.parametrize(Network(64), data[0][0], optimizer="adamw")
    found = archscale.find_learning_rate(
        trainer(plan, data, held_out),
        np.geomspace(1e-4, 1, 13).tolist(),
        seeds=range(flags.seeds),
        start=3e-3,
    )
    for rate, loss in archscale.tuning.mean_losses(found).items():
        print(f"  rate {rate:.4f}: held-out loss {loss:.3f}")
    print(
        f"The best learning rate is {found.rate:.4f}, give or take a factor of "
        f"{np.exp(found.uncertainty):.2f}; rates of {found.basin.lower:.4f} to "
        f"{found.basin.upper:.4f} are within 2 % of its loss ({len(found.runs)} trainings)."
    )


if __name__ == "__main__":
    main()
