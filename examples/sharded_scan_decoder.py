"""Trains a decoder whose layers are scanned, sharded over all devices, with checkpoints.

    python examples/sharded_scan_decoder.py --workdir=runs/decoder
    JAX_NUM_CPU_DEVICES=8 python examples/sharded_scan_decoder.py   # eight devices of one CPU

AdamW with warm-up and decay, clipping and accumulation of gradients. Parameters and optimizer state
are divided over the devices. Interrupted, the same command goes on from the last checkpoint.
"""

import argparse
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import archscale_jax as archscale

LENGTH, BATCH, HEAD, RATE = 64, 16, 16, 0.03  # best of 0.01, 0.03, 0.1 for 2 layers
STDLIB = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXT = np.frombuffer(b"".join(path.read_bytes() for path in STDLIB), np.uint8)
MESH = jax.make_mesh((jax.device_count(),), ("shards",), axis_types=(AxisType.Auto,))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        heads = nn.MultiHeadDotProductAttention(width // HEAD)
        x = x + heads(nn.RMSNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(width)(nn.silu(nn.Dense(4 * width)(nn.RMSNorm()(x)))), None


class Decoder(nn.Module):
    """From tokens [B, LENGTH] to logits [B, LENGTH, 256]; every leaf of its layers is a stack."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, self.width)(tokens)
        x = x + nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[-1]))
        layers = nn.scan(nn.remat(Block), {"params": 0}, split_rngs={"params": True})
        return nn.Dense(256)(nn.RMSNorm()(layers()(x, jnp.arange(self.layers))[0]))


def sharding(leaf):
    """The longest axis over all devices, if they divide it."""
    size, axis = max(((size, axis) for axis, size in enumerate(leaf.shape)), default=(1, 0))
    spec = [None] * axis + ["shards" if size % MESH.size == 0 else None]
    return NamedSharding(MESH, PartitionSpec(*spec[: leaf.ndim]))


def batch(number):
    """Returns tokens [BATCH, LENGTH + 1], which depend on the number alone, after a restart too."""
    starts = np.random.default_rng(number).integers(0, len(TEXT) - LENGTH, (BATCH, 1))
    tokens = TEXT[starts + np.arange(LENGTH + 1)].astype(np.int32)
    return jax.device_put(tokens, NamedSharding(MESH, PartitionSpec("shards")))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", default="runs/decoder", help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="batches of the whole training")
    parser.add_argument("--stop", type=int, help="stop after this batch, as if interrupted")
    flags = parser.parse_args()

    large, small = Decoder(6, 128), Decoder(2, 32)
    plan = archscale.parametrize(large, batch(0)[:, :-1], base=small, optimizer="adamw")
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, flags.steps // 20, flags.steps // 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), plan.optimizer(schedule, weight_decay=0.1))
    tx = optax.MultiSteps(tx, 2)  # an update every second batch

    def create(key):
        params = plan.init(key)
        return {"params": params, "optimizer": tx.init(params), "loss": jnp.inf}

    shapes = jax.eval_shape(create, jax.random.key(0))
    shardings = jax.tree.map(sharding, shapes)

    def step(state, tokens):
        def loss(params):
            logits = plan.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        params = state["params"]
        value, gradients = jax.value_and_grad(loss)(params)
        updates, inner = tx.update(gradients, state["optimizer"], params)
        return {"params": optax.apply_updates(params, updates), "optimizer": inner, "loss": value}

    step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    with ocp.CheckpointManager(pathlib.Path(flags.workdir).absolute()) as checkpoints:
        if begun := checkpoints.latest_step() or 0:
            print(f"  goes on behind batch {begun}")
            like = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, shardings)
            state = checkpoints.restore(begun, args=ocp.args.StandardRestore(like))
        else:
            state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
        for number in range(begun + 1, 1 + min(flags.steps, flags.stop or flags.steps)):
            state = step(state, batch(number))
            if number % max(1, flags.steps // 4) == 0:
                print(f"  batch {number}: {state['loss']:.3f} nats a byte", flush=True)
                checkpoints.save(number, args=ocp.args.StandardSave(state))

    first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, state)
    held, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in (first, state))
    answer = f"{MESH.size} devices, each with {held / whole:.0%} of parameters and optimizer state,"
    print(answer, f"take 6 layers at the rate of 2 to {state['loss']:.3f} nats a byte.")


if __name__ == "__main__":
    main()
