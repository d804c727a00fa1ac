"""PPO on the cart-pole, for `experiments.defaults`: a network of two heads and its whole training.

The cart-pole is that of Barto, Sutton and Anderson (1983) with the constants of Gym's CartPole-v1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

ENVIRONMENTS, LENGTH, EPOCHS, MINIBATCHES = 16, 64, 4, 4
DISCOUNT, TRACE, CLIP, ENTROPY, LIMIT = 0.99, 0.95, 0.2, 0.01, 500


class Rollout(NamedTuple):
    """What happened: arrays [LENGTH, ENVIRONMENTS]."""

    observations: jax.Array
    actions: jax.Array
    log_probabilities: jax.Array
    values: jax.Array
    ended: jax.Array


def _start(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    state = jax.random.uniform(key, (ENVIRONMENTS, 4), minval=-0.05, maxval=0.05)
    return state, jnp.zeros(ENVIRONMENTS)


def _moved(state: jax.Array, actions: jax.Array) -> jax.Array:
    """One step of 0.02 s with a force of 10 N to the left or right."""
    _, speed, angle, turn = state.T
    force = jnp.where(actions == 1, 10.0, -10.0)
    pulled = (force + 0.05 * turn**2 * jnp.sin(angle)) / 1.1
    cosine = jnp.cos(angle)
    turning = (9.8 * jnp.sin(angle) - cosine * pulled) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    driving = pulled - 0.05 * turning * cosine / 1.1
    rates = jnp.stack([speed, driving, turn, turning], axis=-1)
    return state + 0.02 * rates


def _rolled_out(apply: Callable, params: Any, start: Any, key: jax.Array) -> Any:
    def step(carry, key):
        state, age = carry
        act, again = jax.random.split(key)
        outputs = apply(params, state)
        log_probabilities = jax.nn.log_softmax(outputs[:, :2])
        actions = jax.random.categorical(act, log_probabilities)
        chosen = jnp.take_along_axis(log_probabilities, actions[:, None], 1)[:, 0]
        new, age = _moved(state, actions), age + 1
        failed = (jnp.abs(new[:, 0]) > 2.4) | (jnp.abs(new[:, 2]) > 12 * jnp.pi / 180)
        over = failed | (age >= LIMIT)
        fresh, _ = _start(again)
        carry = jnp.where(over[:, None], fresh, new), jnp.where(over, 0.0, age)
        return carry, Rollout(state, actions, chosen, outputs[:, 2], failed)

    return jax.lax.scan(step, start, jax.random.split(key, LENGTH))


def _targets(rollout: Rollout, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Generalized advantages and the returns that values should have, rewards being 1."""
    following = jnp.concatenate([rollout.values[1:], last[None]])
    goes_on = 1.0 - rollout.ended
    errors = 1.0 + DISCOUNT * following * goes_on - rollout.values

    def back(advantage, one):
        error, goes_on = one
        advantage = error + DISCOUNT * TRACE * goes_on * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(last), (errors, goes_on), reverse=True)
    return advantages, advantages + rollout.values


def _loss(apply: Callable, params: Any, batch: Any) -> jax.Array:
    rollout, advantages, returns = batch
    outputs = apply(params, rollout.observations)
    log_probabilities = jax.nn.log_softmax(outputs[:, :2])
    chosen = jnp.take_along_axis(log_probabilities, rollout.actions[:, None], 1)[:, 0]
    ratio = jnp.exp(chosen - rollout.log_probabilities)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gained = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)
    value_error = jnp.square(outputs[:, 2] / 10 - returns / 10)
    return -gained.mean() + 0.5 * value_error.mean() - ENTROPY * entropy.mean()


def train(
    apply: Callable, params: Any, optimizer: optax.GradientTransformation, seed: int, rounds: int
) -> float:
    """Trains by PPO; returns the failures a step over the whole training.

    Args:
      apply: `(params, observations [n, 4])` to two logits and a value, [n, 3].
      params: at the start.
      optimizer: of the whole training.
      seed: of the environments.
      rounds: rollouts of LENGTH steps in ENVIRONMENTS carts, each learned from EPOCHS times.
    """
    count = ENVIRONMENTS * LENGTH

    def round_(carry, key):
        params, state, start = carry
        play, mix = jax.random.split(key)
        start, rollout = _rolled_out(apply, params, start, play)
        targets = _targets(rollout, apply(params, start[0])[:, 2])
        flat = jax.tree.map(lambda one: one.reshape(count, *one.shape[2:]), (rollout, *targets))

        def update(carry, chosen):
            params, state = carry
            batch = jax.tree.map(lambda one: one[chosen], flat)
            gradients = jax.grad(lambda params: _loss(apply, params, batch))(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        orders = [jax.random.permutation(one, count) for one in jax.random.split(mix, EPOCHS)]
        chosen = jnp.concatenate(orders).reshape(EPOCHS * MINIBATCHES, -1)
        (params, state), _ = jax.lax.scan(update, (params, state), chosen)
        return (params, state, start), rollout.ended.mean()

    @jax.jit
    def whole(params, key):
        begin, keys = jax.random.split(key)
        carry = params, optimizer.init(params), _start(begin)
        _, failures = jax.lax.scan(round_, carry, jax.random.split(keys, rounds))
        return failures.mean()

    return float(whole(params, jax.random.key(seed)))
