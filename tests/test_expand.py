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
from archscale_jax.contrib._growth.blocks import placed
from experiments.lab.models.decoder import Decoder
from experiments.lab.models.images import ResidualStages

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


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


TOKENS = np.random.default_rng(1).integers(0, 256, (2, 6))


@functools.cache
def decoder(kind, depth, width, tied=False, scan=False, kv_heads=None) -> Network:
    heads = width // 4
    model = Decoder(kind, depth, width, heads, kv_heads or heads // 2, 6, tied, scan)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return Network(model.apply, drawn(params), TOKENS)


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


@functools.cache
def batch_norm(width, blocks=1, train=True) -> Network:
    graph, state = nnx.split(nnx.eval_shape(lambda: BatchNormNetwork(width, blocks)))
    return Network(
        lambda state, x: nnx.merge(graph, state)(x, train), drawn(state), normal(3, 4, 4, 3)
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
        y = nn.Conv(self.width, (1, 1), feature_group_count=2)(
            nn.swish(nn.GroupNorm(self.groups)(y))
        )
        x = nn.LayerNorm()(x + y)
        gate, up = jnp.split(nn.Dense(4 * self.width)(x), 2, axis=-1)
        x = jnp.concatenate([x, nn.sigmoid(gate) * up], axis=-1)
        return nn.Dense(5)(x.mean(axis=(1, 2)))


@functools.cache
def group_norm(width, groups=2) -> Network:
    model = GroupNormNetwork(width, groups)
    images = normal(3, 4, 4, 3)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return Network(model.apply, drawn(params), images)


class LayerNormMLP(eqx.Module):
    layers: list
    norms: list
    readout: eqx.nn.Linear

    def __init__(self, width, depth=2):
        keys = jax.random.split(jax.random.key(0), depth + 1)
        sizes = [6] + [width] * depth
        pairs = zip(sizes, sizes[1:], keys, strict=False)
        self.layers = [eqx.nn.Linear(before, after, key=key) for before, after, key in pairs]
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(depth)]
        self.readout = eqx.nn.Linear(width, 3, key=keys[-1])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.gelu(norm(layer(x)))
        return self.readout(x)


@functools.cache
def equinox(width) -> Network:
    model = eqx.filter_eval_shape(LayerNormMLP, width)
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Network(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x), drawn(params), normal(4, 6)
    )


@functools.cache
def plain(width) -> Network:
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
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return Network(apply, drawn(params), normal(2, 3, 5))


WIDER = {
    "gpt2": (lambda w: decoder("gpt2", 1, w), 8, 16),
    "gpt2, tied": (lambda w: decoder("gpt2", 1, w, tied=True), 8, 24),
    "llama": (lambda w: decoder("llama", 1, w), 8, 16),
    "llama, stacked": (lambda w: decoder("llama", 2, w, scan=True), 8, 16),
    "llama, keys stay": (lambda w: decoder("llama", 1, w, kv_heads=1), 8, 16),
    "batch statistics": (batch_norm, 3, 6),
    "running averages": (functools.partial(batch_norm, train=False), 3, 9),
    "group normalization": (group_norm, 4, 8),
    "equinox": (equinox, 4, 12),
    "plain": (plain, 8, 16),
}

RANDOM = ("llama, stacked", "batch statistics", "group normalization", "plain")


def change(small: Network, large: Network) -> Callable[[Any], float]:
    """A function of the large network's params to how far it is from the small one."""
    before, apply = jax.jit(small.apply)(small.params, small.inputs), jax.jit(large.apply)

    def largest(params):
        after = apply(params, small.inputs)
        return float(np.max(np.abs(after - before)) / np.max(np.abs(before)))

    return largest


def expanded(small: Network, large: Network, **options):
    return contrib.expand(small.params, large.params, small.apply, large.apply, small.inputs,
                          **options)  # fmt: skip


class TestWidth:
    @pytest.mark.parametrize("name", [name for name in WIDER if name != "llama"])
    def test_the_function_stays(self, name):
        make, *widths = WIDER[name]
        small, large = map(make, widths)
        largest_change = change(small, large)
        for new in ("copy", "random")[: 1 + (name in RANDOM)]:
            params = expanded(small, large, key=KEY, new=new).params
            assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, large.params)
            assert largest_change(params) < 1e-5, new


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
        [("llama", "sgd", {"momentum": 0.9}),
         ("plain", "adamw", {"eps": 1e-3, "weight_decay": 0.3}), ("plain", "lion", {})],
    )  # fmt: skip
    def test_growing_and_training_commute(self, name, optimizer, options):
        """Without noise copies stay copies, and the plan's rates are those at which they do."""
        make, *widths = WIDER[name]
        small, large = map(make, widths)
        ours, plan = (
            archscale.parametrize((one.apply, one.params), one.inputs, base=base,
                                  optimizer=optimizer, epsilon_rule="gradient")
            for one, base in ((small, None), (large, (small.apply, small.params)))
        )  # fmt: skip
        of_small, of_large = (one.optimizer(0.01, **options) for one in (ours, plan))

        def grow(params, state):
            return contrib.expand(params, large.params, small.apply, large.apply, small.inputs,
                                  noise=0.0, optimizers=(of_small, of_large),
                                  optimizer_state=state)  # fmt: skip

        start = small.params, jax.jit(of_small.init)(small.params)
        then_grown = grow(*trained(small.apply, of_small, *start, small.inputs))
        first = grow(*start)
        assert jax.tree.structure(first.optimizer_state) == jax.tree.structure(
            jax.eval_shape(of_large.init, first.params)
        )
        then_trained = trained(large.apply, of_large, *first, small.inputs)
        for found, expected in zip(then_grown, then_trained, strict=True):
            for (path, one), other in zip(
                named_leaves(found).items(), jax.tree.leaves(expected), strict=True
            ):
                size = np.abs(other).max() + 1e-9
                np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * size, err_msg=path)

    @pytest.mark.parametrize(
        "optimizer",
        [optax.contrib.muon(1e-3),
         optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1, 9))),
         optax.contrib.schedule_free_adamw(1e-3), optax.masked(optax.adam(1e-3), {
             "stem": True, "qkv": True, "out": False, "gain": True, "readout": True})],
        ids=["muon", "chain", "schedule_free", "masked"],
    )  # fmt: skip
    def test_any_optimizer_goes_on(self, optimizer):
        small, large = plain(8), plain(16)
        start = small.params, jax.jit(optimizer.init)(small.params)
        params, state = trained(small.apply, optimizer, *start, small.inputs)
        found = contrib.expand(
            params, large.params, small.apply, large.apply, small.inputs, key=KEY,
            optimizers=(optimizer, optimizer), optimizer_state=state,
        )  # fmt: skip
        expected = jax.eval_shape(optimizer.init, found.params)
        assert jax.tree.structure(found.optimizer_state) == jax.tree.structure(expected)
        for one, other in zip(
            *map(jax.tree.leaves, (found.optimizer_state, expected)), strict=True
        ):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        counts = [[leaf for leaf in jax.tree.leaves(one) if leaf.ndim == 0]
                  for one in (found.optimizer_state, state)]  # fmt: skip
        assert counts[0] == counts[1]
        trained(large.apply, optimizer, *found, small.inputs, steps=1)

    def test_what_starts_as_the_parameters_stays_as_far_from_them(self):
        small, large = plain(8), plain(16)
        optimizer = optax.contrib.schedule_free_sgd(0.1)
        start = small.params, jax.jit(optimizer.init)(small.params)
        params, state = trained(small.apply, optimizer, *start, small.inputs)
        found = contrib.expand(
            params, large.params, small.apply, large.apply, small.inputs, key=KEY,
            optimizers=(optimizer, optimizer), optimizer_state=state,
        )  # fmt: skip
        evaluated = [
            jax.jit(network.apply)(
                optax.contrib.schedule_free_eval_params(one, values), small.inputs
            )
            for network, one, values in ((small, state, params),
                                         (large, found.optimizer_state, found.params))
        ]  # fmt: skip
        np.testing.assert_allclose(evaluated[1], evaluated[0], rtol=1e-4, atol=1e-4)

    def test_errors_of_states(self):
        small, large = plain(8), plain(16)

        def grow(optimizer, state):
            return contrib.expand(small.params, large.params, small.apply, large.apply,
                                  small.inputs, noise=0.0, optimizers=(optimizer, optimizer),
                                  optimizer_state=state)  # fmt: skip

        adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=2)
        with pytest.raises(ValueError, match="begin with a new state"):
            grow(adafactor, adafactor.init(small.params))
        with pytest.raises(ValueError, match="optimizer_state has no array '0/count'.*of its kind"):
            grow(optax.adam(1.0), optax.sgd(1.0, 0.9).init(small.params))
        adam, lion = optax.adam(1.0), optax.lion(1.0)
        with pytest.raises(
            ValueError, match="the array '0/nu/.*lacks; accepted are two optimizers"
        ):
            contrib.expand(small.params, large.params, small.apply, large.apply, small.inputs,
                           noise=0.0, optimizers=(adam, lion),
                           optimizer_state=adam.init(small.params))  # fmt: skip
        with pytest.raises(TypeError, match="optimizers and optimizer_state belong together"):
            contrib.expand(small.params, large.params, small.apply, large.apply, small.inputs,
                           noise=0.0, optimizer_state=())  # fmt: skip


class TestNoise:
    def test_it_has_the_size_of_hidden_weights_and_sums_to_nothing(self):
        small, large = plain(32), plain(96)
        exact, noisy, faint = (
            contrib.expand(small.params, large.params, small.apply, large.apply, small.inputs,
                           key=KEY, noise=noise).params
            for noise in (0.0, 1.0, 0.5)
        )  # fmt: skip
        for name in ("stem", "gain"):  # they read nothing that was copied
            np.testing.assert_array_equal(noisy[name], exact[name])
        for name, axis in {"qkv": 0, "out": 0, "readout": 1}.items():
            before, after = (np.asarray(one[name]) for one in (small.params, noisy))
            sizes = [np.sqrt(np.mean(one**2)) for one in (before, after)]
            assert sizes[1] == pytest.approx(sizes[0] / 3**0.5, rel=0.05)
            apart = after - exact[name]
            halves = np.asarray(faint[name]) - exact[name]
            np.testing.assert_allclose(halves, apart / 2, atol=1e-6)
            block = 4 if name == "out" else 1  # heads of four features
            shape = (32 // block, 3, block)
            by_copies = np.moveaxis(apart, axis, 0).reshape(*shape, -1)
            assert np.abs(by_copies.sum(axis=1)).max() < 1e-5
            assert np.abs(by_copies).min() > 0

    def test_copies_part(self):
        """With noise, copies of a feature learn different things at once; without they never do."""
        small, large = equinox(4), equinox(8)
        spreads = []
        for noise in (0.0, 1.0):
            params = contrib.expand(small.params, large.params, small.apply, large.apply,
                                    small.inputs, key=KEY, noise=noise).params  # fmt: skip
            optimizer = optax.adam(0.01)
            params, _ = trained(large.apply, optimizer, params, optimizer.init(params),
                                small.inputs, steps=5)  # fmt: skip
            pairs = params.layers[0].weight.reshape(4, 2, -1)
            spreads.append(float(jnp.abs(pairs[:, 0] - pairs[:, 1]).max()))
        assert spreads[0] < 1e-6
        assert spreads[1] > 1e-3


class TestRandom:
    def test_new_features_are_those_given_and_nothing_reads_them(self):
        make, *widths = WIDER["gpt2"]
        small, large = map(make, widths)
        params = expanded(small, large, key=KEY, new="random").params
        found, given = named_leaves(params), named_leaves(large.params)
        up, down = (f"params/block_0/{one}/kernel" for one in ("up", "down"))
        new = np.arange(64) % 2 == 1
        np.testing.assert_array_equal(found[up][:, new], given[up][:, new])
        np.testing.assert_array_equal(found[up[:-6] + "bias"][new], given[up[:-6] + "bias"][new])
        assert not np.any(found[down][new])
        assert np.any(found[down][~new], axis=1).all()
        table = found["params/table/embedding"].reshape(256, 8, 2)  # normalized: copies
        np.testing.assert_array_equal(table[..., 0], table[..., 1])

    def test_it_needs_values(self):
        small, large = plain(8), plain(16)
        shapes = jax.eval_shape(lambda: large.params)
        same = contrib.expand(small.params, shapes, small.apply, large.apply, small.inputs, key=KEY)
        assert jax.tree.map(jnp.shape, same.params) == jax.tree.map(jnp.shape, large.params)
        with pytest.raises(ValueError, match="like holds a shape at 'qkv'"):
            contrib.expand(small.params, shapes, small.apply, large.apply, small.inputs, key=KEY,
                           new="random")  # fmt: skip


DEEPER = {
    "gpt2": (lambda d: decoder("gpt2", d, 8), 2, 4),
    "llama, stacked": (lambda d: decoder("llama", d, 8, scan=True), 2, 4),
    "batch normalization": (lambda d: residual_stages(d), 3, 6),
}


def residual_stages(depth) -> Network:
    image = (8, 8, 1)
    model = nnx.eval_shape(lambda: ResidualStages(image, 2, depth, 3, True, rngs=nnx.Rngs(0)))
    images = normal(4, *image)
    plan = archscale.parametrize(model, images, model_kwargs={"train": True})
    shapes = jax.eval_shape(plan.init, jax.random.key(0))
    return Network(plan.apply, drawn(shapes), images)


class TestDepth:
    @pytest.mark.parametrize("name", DEEPER)
    def test_the_function_stays(self, name):
        make, *depths = DEEPER[name]
        small, large = map(make, depths)
        largest_change = change(small, large)
        ways = [("copy", "interleave"), ("random", "append")]
        if name == "batch normalization":
            ways = [("copy", "interleave"), ("random", "interleave")]
        for new, position in ways:
            found = expanded(small, large, noise=0.0, new=new, position=position)
            assert largest_change(found.params) < 1e-6, new

    def test_blocks_stand_where_they_are_wanted(self):
        assert [one.tolist() for one in placed(2, 4, "append")] == [
            [0, 1, 0, 1],
            [False] * 2 + [True] * 2,
        ]
        assert [one.tolist() for one in placed(2, 5, "interleave")] == [
            [0, 0, 0, 1, 1], [False, True, True, False, True]]  # fmt: skip
        small, large = (decoder("llama", depth, 8, scan=True) for depth in (2, 4))
        optimizer = optax.adam(1e-3)
        state = jax.tree.map(
            lambda leaf: np.ones(leaf.shape, leaf.dtype),
            jax.eval_shape(optimizer.init, small.params),
        )
        params, state = contrib.expand(
            small.params, large.params, small.apply, large.apply, small.inputs, noise=0.0,
            position="interleave", optimizers=(optimizer, optimizer), optimizer_state=state,
        )  # fmt: skip
        before, after = (one["params"]["blocks"] for one in (small.params, params))
        np.testing.assert_array_equal(
            after["up"]["kernel"], before["up"]["kernel"][np.array([0, 0, 1, 1])]
        )
        ends = np.asarray(before["down"]["kernel"])[[0, 0, 1, 1]]
        ends[[1, 3]] = 0
        np.testing.assert_array_equal(after["down"]["kernel"], ends)
        first, second = (
            one["params"]["blocks"]["up"]["kernel"] for one in (state[0].mu, state[0].nu)
        )
        assert np.unique(first[::2]) == 1
        assert np.unique(first[1::2]) == 0
        assert np.unique(second) == 1

    def test_width_and_depth_of_a_scan_at_once(self):
        small, large = decoder("llama", 2, 8, scan=True), decoder("llama", 4, 16, scan=True)
        found = expanded(small, large, key=KEY)
        assert change(small, large)(found.params) < 1e-5


class TestErrors:
    def expand(self, small, large, like=None, **options: Any):
        like = large.params if like is None else like
        return contrib.expand(small.params, like, small.apply, large.apply, small.inputs,
                              **dict[str, Any](noise=0.0) | options)  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [({"new": "tiny"}, ValueError, "new 'tiny'"), ({"noise": -1.0}, ValueError, "noise must"),
         ({"noise": 1.0}, TypeError, "key is missing"),
         ({"key": 0}, TypeError, r"must be a JAX random key, as jax.random.key\(0\), found int")],
    )  # fmt: skip
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            self.expand(plain(8), plain(16), **options)

    def test_inputs_and_params_that_tell_nothing(self):
        small, large = plain(8), plain(16)
        with pytest.raises(ValueError, match=r"no floating-point number, found .* one example or"):
            self.expand(small._replace(inputs=small.inputs[:0]), large)
        nan = jax.tree.map(lambda leaf: leaf * jnp.nan, small.params)
        with pytest.raises(ValueError, match="outputs of small are not finite"):
            self.expand(small._replace(params=nan), large)
        shapes = jax.eval_shape(lambda: small.params)
        with pytest.raises(TypeError, match="params holds no values at .* found a ShapeDtype"):
            self.expand(small._replace(params=shapes), large)

    def test_a_width_that_shrinks(self):
        with pytest.raises(ValueError, match=r"axis 0 of 'gain' has 16 entries.*cannot grow to 8"):
            self.expand(plain(16), plain(8))

    def test_copies_of_different_numbers_behind_a_normalization(self):
        with pytest.raises(
            ValueError, match=r"reduce_sum at .*test_expand.py.*'out' on.*keep that"
        ):
            self.expand(plain(8), plain(12))

    def test_heads_that_grow(self):
        def heads(features):
            def apply(params, x):
                q, k = jnp.einsum("bti,siod->sbtod", x, params["qk"])
                scores = jnp.einsum("bthd,bshd->bhts", q, k) / features**0.5
                return jnp.einsum("bhts,bsi->bti", jax.nn.softmax(scores), x)

            return Network(
                apply, drawn({"qk": jnp.zeros((2, 3, 2, features))}), plain(8).inputs[..., :3]
            )

        with pytest.raises(ValueError, match=r"from exp at .*in or behind what reads 'qk'"):
            self.expand(heads(2), heads(4))

    def test_other_functions(self):
        small, large = plain(8), plain(16)
        other = large._replace(apply=lambda params, x: jnp.tanh(large.apply(params, x)))
        with pytest.raises(
            ValueError, match="do not do the same operations.*nothing, the large one has tanh"
        ):
            self.expand(small, other)
        twice = large._replace(apply=lambda params, x: large.apply(params, x)[:1])
        with pytest.raises(ValueError, match="the large one has slice"):
            self.expand(small, twice)

    def test_other_leaves(self):
        small, large = decoder("gpt2", 2, 8), decoder("gpt2", 3, 8)
        wide = decoder("gpt2", 3, 16)
        with pytest.raises(ValueError, match=r"holds 'params/block_0.*grow widths by another call"):
            self.expand(small, wide)
        with pytest.raises(ValueError, match="cannot become one of 2"):
            self.expand(large, small)
        with pytest.raises(ValueError, match="like holds the leaf 'more'"):
            self.expand(plain(8), plain(8), like=plain(8).params | {"more": jnp.zeros(1)})
        with pytest.raises(ValueError, match="position 'behind'"):
            self.expand(small, large, position="behind")

    def test_blocks_that_are_no_residual_branch(self):
        def chain(depth):
            def apply(params, x):
                for index in range(depth):
                    x = jnp.tanh(x @ params[f"w{index}"])
                return x

            params = {f"w{index}": jnp.zeros((5, 5)) for index in range(depth)}
            return Network(apply, drawn(params), plain(8).inputs)

        with pytest.raises(ValueError, match="new blocks do more than add to a residual stream"):
            self.expand(chain(1), chain(2))


@pytest.mark.parametrize("form", ["auto", "folded"])
def test_forward_multipliers_of_a_plan_are_part_of_its_function(form):
    """A tied table is copied; its 1/r stands in front of the logits, or else in the norm's gain."""
    tokens = TOKENS
    small, large = (Decoder("llama", 1, width, width // 4, 1, 6, True) for width in (8, 16))
    ours = archscale.parametrize(small, tokens, optimizer="adamw", form=form)
    plan = archscale.parametrize(large, tokens, base=ours, optimizer="adamw", form=form,
                                 attention_scale="1/d")  # fmt: skip
    params = drawn(jax.eval_shape(ours.init, jax.random.key(0)))
    like = jax.eval_shape(plan.init, jax.random.key(0))
    found = contrib.expand(params, like, ours.apply, plan.apply, tokens, key=KEY)
    gains = [named_leaves(one)["params/final_norm/scale"] for one in (params, found.params)]
    share = 1.0 if form == "auto" else 0.5
    np.testing.assert_allclose(gains[1], share * np.repeat(gains[0], 2), rtol=1e-6)
