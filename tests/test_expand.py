"""Expansion of networks in width and depth: functions that stay, and optimizers that go on."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import archscale_jax as archscale
from archscale_jax import contrib
from archscale_jax._trees import map_with_names, named_leaves
from experiments.lab.models.decoder import Decoder

pytestmark = pytest.mark.quick_compilation

KEY = jax.random.key(7)


class Network(NamedTuple):
    """A model of one size: its function, params that are far from those at the start, a batch."""

    apply: Callable[..., Any]
    params: Any
    inputs: Any


def drawn(shapes, seed=3):
    """Values that no initialization gives: no bias is 0, no gain is 1."""

    def values(name, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(leaf)
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        size = 0.3 if len(leaf.shape) < 2 else 0.8 / np.sqrt(leaf.shape[-2])
        found = size * generator.normal(size=leaf.shape)
        if name.endswith(("scale", "gain", "var")):
            found = np.abs(1 + found)
        return jnp.asarray(found, leaf.dtype)

    return map_with_names(values, shapes)


def decoder(kind, depth, width, tied=False, scan=False, kv_heads=None) -> Network:
    heads = width // 4
    model = Decoder(kind, depth, width, heads, kv_heads or heads // 2, 6, tied, scan)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 256)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return Network(model.apply, drawn(params), tokens)


class BatchNormNetwork(nnx.Module):
    """A residual network of convolutions, batch normalization, and a projection."""

    def __init__(self, width: int, blocks: int = 1):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([self._block(width, rngs) for _ in range(blocks)])
        self.projection = nnx.Conv(width, 2 * width, (1, 1), strides=2, rngs=rngs)
        self.readout = nnx.Linear(2 * width * 4, 5, rngs=rngs)

    def _block(self, width, rngs):
        def conv():
            return nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)

        def norm():
            return nnx.BatchNorm(width, rngs=rngs)

        return nnx.List([norm(), conv(), norm(), conv()])

    def __call__(self, x, train):
        def relu(norm, x):
            return nnx.relu(norm(x, use_running_average=not train))

        x = self.stem(x)
        for first, conv, second, end in self.blocks:
            x = x + end(relu(second, conv(relu(first, x))))
        x = nnx.max_pool(nnx.relu(self.projection(x)), (2, 2), (1, 1), "SAME")
        return self.readout(x.reshape(len(x), -1))


def batch_norm(width, blocks=1, train=True) -> Network:
    graph, state = nnx.split(nnx.eval_shape(lambda: BatchNormNetwork(width, blocks)))
    images = jax.random.normal(jax.random.key(1), (3, 4, 4, 3))
    return Network(
        lambda state, x: nnx.merge(graph, state)(x, train),
        drawn(state),
        images,
    )


class GroupNormNetwork(nn.Module):
    """Grouped and depthwise convolutions, group normalization, an average over positions."""

    width: int
    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3))(x)
        y = nn.GroupNorm(self.groups)(x)
        y = nn.Conv(self.width, (3, 3), feature_group_count=self.width)(nn.swish(y))
        y = nn.Conv(self.width, (1, 1), feature_group_count=2)(nn.swish(nn.GroupNorm(self.groups)(y)))
        x = nn.LayerNorm()(x + y)
        gate, up = jnp.split(nn.Dense(4 * self.width)(x), 2, axis=-1)
        x = jnp.concatenate([x, nn.sigmoid(gate) * up], axis=-1)
        return nn.Dense(5)(x.mean(axis=(1, 2)))


def group_norm(width, groups=2) -> Network:
    model = GroupNormNetwork(width, groups)
    images = jax.random.normal(jax.random.key(1), (3, 4, 4, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return Network(model.apply, drawn(params), images)


class LayerNormMLP(eqx.Module):
    layers: list
    norms: list
    readout: eqx.nn.Linear

    def __init__(self, width, depth=2):
        keys = jax.random.split(jax.random.key(0), depth + 1)
        sizes = [6] + [width] * depth
        self.layers = [eqx.nn.Linear(*pair, key=key) for *pair, key in zip(sizes, sizes[1:], keys)]  # noqa: B905
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(depth)]
        self.readout = eqx.nn.Linear(width, 3, key=keys[-1])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.gelu(norm(layer(x)))
        return self.readout(x)


def equinox(width) -> Network:
    params, static = eqx.partition(LayerNormMLP(width), eqx.is_array)
    inputs = jax.random.normal(jax.random.key(1), (4, 6))
    return Network(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x), drawn(params), inputs
    )


def plain(width, ratio=1) -> Network:
    """Heads merged in one axis, queries, keys and values fused, and no framework."""
    heads, features = width // 4, 4

    def apply(params, x):
        x = x @ params["stem"]
        fused = (x @ params["qkv"]).reshape(*x.shape[:2], 3, heads, features)
        q, k, v = jnp.moveaxis(fused, 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], width)
        x = x + mixed @ params["out"]
        x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * params["gain"]
        return jnp.einsum("btn,cn->btc", x, params["readout"])

    shapes = {"stem": (5, width), "qkv": (width, 3 * width), "out": (width, width),
              "gain": (width,), "readout": (3, width)}  # fmt: skip
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return Network(apply, drawn(params), jax.random.normal(jax.random.key(1), (2, 3, 5)))


WIDER = {
    "gpt2": (lambda w: decoder("gpt2", 2, w), 8, 16),
    "gpt2, stacked": (lambda w: decoder("gpt2", 2, w, scan=True), 8, 16),
    "gpt2, tied": (lambda w: decoder("gpt2", 1, w, tied=True), 8, 24),
    "llama": (lambda w: decoder("llama", 2, w), 8, 24),
    "llama, stacked": (lambda w: decoder("llama", 2, w, scan=True), 8, 16),
    "llama, tied": (lambda w: decoder("llama", 1, w, tied=True, scan=True), 8, 16),
    "llama, keys stay": (lambda w: decoder("llama", 1, w, kv_heads=1), 8, 16),
    "batch statistics": (batch_norm, 3, 6),
    "running averages": (functools.partial(batch_norm, train=False), 3, 9),
    "group normalization": (group_norm, 4, 8),
    "equinox": (equinox, 4, 12),
    "plain": (plain, 8, 16),
}


def largest_change(small: Network, params, large: Network) -> float:
    before = jax.jit(small.apply)(small.params, small.inputs)
    after = jax.jit(large.apply)(params, small.inputs)
    return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))


def widened(name, **options):
    make, *widths = WIDER[name]
    small, large = map(make, widths)
    found = contrib.expand(small.params, large.params, small.apply, large.apply, small.inputs,
                           key=KEY, **options)  # fmt: skip
    return small, large, found.params


class TestWidth:
    @pytest.mark.parametrize("name", WIDER)
    @pytest.mark.parametrize("new", ["copy", "random"])
    def test_the_function_stays(self, name, new):
        small, large, params = widened(name, new=new)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, large.params)
        assert largest_change(small, params, large) < 1e-5


def trained(apply, optimizer, params, state, inputs, steps=3):
    """Params and state after some updates on a loss of its own each."""

    @jax.jit
    def update(params, state, step):
        def loss(params):
            outputs = apply(params, inputs)
            waves = jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape) * (1.0 + step))
            return jnp.mean(outputs * waves) + jnp.mean(outputs**2) / 8

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, step)
    return params, state


class TestOptimizerState:
    @pytest.mark.parametrize(
        ("name", "optimizer", "options"),
        [("llama", "sgd", {"momentum": 0.9}), ("plain", "sgd", {"momentum": 0.9}),
         ("plain", "adam", {"eps": 0.0}), ("equinox", "adam", {"eps": 0.0}),
         ("group normalization", "adam", {"eps": 0.0}), ("plain", "lion", {})],
    )  # fmt: skip
    def test_growing_and_training_commute(self, name, optimizer, options):
        """Without noise copies stay copies, and the plan's rates are those at which they do."""
        make, *widths = WIDER[name]
        small, large = map(make, widths)
        ours = archscale.parametrize((small.apply, small.params), small.inputs, optimizer=optimizer)
        plan = archscale.parametrize((large.apply, large.params), small.inputs, base=ours,
                                     optimizer=optimizer)  # fmt: skip
        of_small, of_large = (one.optimizer(0.01, **options) for one in (ours, plan))

        def grow(params, state):
            return contrib.expand(params, large.params, small.apply, large.apply, small.inputs,
                                  noise=0.0, optimizers=(of_small, of_large),
                                  optimizer_state=state)  # fmt: skip

        start = small.params, of_small.init(small.params)
        then_grown = grow(*trained(small.apply, of_small, *start, small.inputs))
        first = grow(*start)
        assert jax.tree.structure(first.optimizer_state) == jax.tree.structure(
            of_large.init(first.params)
        )
        then_trained = trained(large.apply, of_large, *first, small.inputs)
        for found, expected in zip(then_grown, then_trained, strict=True):
            for (path, one), other in zip(
                named_leaves(found).items(), jax.tree.leaves(expected), strict=True
            ):
                size = np.abs(other).max() + 1e-9
                np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * size, err_msg=path)
