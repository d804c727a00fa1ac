"""Asks a training whether it is set up as its plan says, before it is run; finds three faults.

    python examples/audit.py

All three set-ups train, and their losses fall. What is wrong with them is that the rate which was
tuned on the small network is not that of the large one. `audit(…).assert_ok()` is one line of a
test suite.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import archscale_jax as archscale

RATE, DECAY = 3e-3, 0.1


class Network(nn.Module):
    """From pictures [B, 64] to logits [B, 10]."""

    blocks: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            x = x + nn.Dense(self.width)(nn.relu(nn.LayerNorm()(x)))
        return nn.Dense(10)(nn.relu(x))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="updates of the first set-up")
    flags = parser.parse_args()

    pictures, labels = load_digits(return_X_y=True)
    batch = jnp.asarray(pictures[:128] / 8 - 1, jnp.float32), jnp.asarray(labels[:128])
    model = Network(4, 256)
    plan = archscale.parametrize(model, batch[0], base=Network(2, 32), optimizer="adamw")
    params, tx = plan.init(jax.random.key(0)), plan.optimizer(RATE, weight_decay=DECAY)
    drawn_by_flax = model.init(jax.random.key(0), batch[0])

    def loss_fn(params, batch):
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    setups = {
        "as the plan says": (tx, params),
        "weights as Flax draws them": (tx, drawn_by_flax),
        "rates scaled behind optax.adamw, and the decay with them": (
            optax.chain(optax.adamw(RATE, weight_decay=DECAY), plan.scale()),
            params,
        ),
        "multipliers forgotten": (optax.adamw(RATE, weight_decay=DECAY), params),
    }
    found = {
        name: archscale.audit(plan, optimizer, loss_fn, params, batch)
        for name, (optimizer, params) in setups.items()
    }
    for name, audit in found.items():
        print(f"{name}:")
        seen = {(one.kind, one.consequence): one for one in audit.findings}  # print(audit) has all
        for one in seen.values():
            print(f"  {one.kind} of {one.parameter}: found {one.found}; expected {one.expected}")

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(flags.steps):
        params, state, value = step(params, state)
        losses.append(float(value))

    wrong = {name: sorted({one.kind for one in audit.findings}) for name, audit in found.items()}
    well = [name for name, kinds in wrong.items() if not kinds]
    faults = "; ".join(f"{name} ({', '.join(kinds)})" for name, kinds in wrong.items() if kinds)
    print(
        f"{len(well)} of {len(setups)} set-ups has no findings and trains from {losses[0]:.2f} to "
        f"{losses[-1]:.2f} nats; not so: {faults}."
    )


if __name__ == "__main__":
    main()
