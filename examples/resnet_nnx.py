"""Trains a residual network with batch normalization (Flax NNX, SGD) at a small one's rate.

    python examples/resnet_nnx.py

The pictures are the digits that scikit-learn ships, 8 × 8 pixels. Running averages are not
parameters: they stay in the model, and its training loop stays Flax's own.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import archscale_jax as archscale

BATCH = 64


def convolution(features, width, rngs):
    return nnx.Conv(features, width, (3, 3), use_bias=False, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = (nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for _ in range(2))
        self.conv1, self.conv2 = (convolution(width, width, rngs) for _ in range(2))

    def __call__(self, x):
        branch = self.conv1(nnx.relu(self.norm1(x)))
        return x + self.conv2(nnx.relu(self.norm2(branch)))


class ResNet(nnx.Module):
    """From pictures [B, 8, 8, 1] to logits [B, 10]."""

    def __init__(self, blocks, width, rngs):
        self.stem = convolution(1, width, rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(blocks))
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


def create(size, plan):
    """Returns the model with the weights of the plan."""

    @nnx.jit  # under jit, the weights that are replaced are never drawn
    def model():
        model = ResNet(*size, rngs=nnx.Rngs(0))
        nnx.update(model, plan.init(jax.random.key(0)))
        return model

    return model()


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def accuracy(model, x, y):
    return (model(x).argmax(-1) == y).mean()


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="updates of every training")
    flags = parser.parse_args()

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = jnp.asarray(pictures[order] / 8 - 1, jnp.float32).reshape(-1, 8, 8, 1)
    y = jnp.asarray(labels[order])
    train, held_out = slice(0, 1500), slice(1500, None)

    def fit(size, plan, rate):
        model = create(size, plan)
        tx = plan.optimizer(optax.cosine_decay_schedule(rate, flags.steps), momentum=0.9)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = []
        for number in range(flags.steps):
            batch = np.random.default_rng(number).integers(0, 1500, BATCH)
            losses.append(float(step(model, optimizer, x[train][batch], y[train][batch])))
        model.eval()  # running averages instead of those of the batch
        return np.mean(losses[-10:]), float(accuracy(model, x[held_out], y[held_out]))

    sizes = (1, 8), (4, 32)
    shapes = [nnx.eval_shape(lambda size=size: ResNet(*size, rngs=nnx.Rngs(0))) for size in sizes]
    small = archscale.parametrize(shapes[0], x[:BATCH], optimizer="sgd")
    large = archscale.parametrize(shapes[1], x[:BATCH], base=small, optimizer="sgd")

    losses = {rate: fit(sizes[0], small, rate)[0] for rate in (0.1, 0.3, 1.0, 3.0)}
    for rate, loss in losses.items():
        print(f"  1 block of width 8, rate {rate:g}: training loss {loss:.3f}")
    best = min(losses, key=losses.__getitem__)
    loss, right = fit(sizes[1], large, best)
    print(
        f"At rate {best:g}, the best of 1 block of width 8, 4 blocks of width 32 read "
        f"{right:.1%} of held-out digits (training loss {loss:.3f})."
    )


if __name__ == "__main__":
    main()
