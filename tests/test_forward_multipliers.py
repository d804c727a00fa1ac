"""`plan.apply` is the model with the forward multipliers written into it, however it is called.

Every model here takes `Multipliers`, which stand where its author would write them; the plan is
that of the model without them. Ratios are 2 in width (16 over 8, two heads) and in depth (2 over
1), so that logits are multiplied by 1/2, branches by 1/2 (α = 1), and queries and keys, which the
models scale by 1/√d_head, by √(1/2).
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from benchmarks.common import Compilations
from tests.devices import on_devices

pytestmark = pytest.mark.quick_compilation

HEADS, VOCAB, LENGTH = 2, 11, 6
DTYPE = jnp.float64


class Multipliers(NamedTuple):
    """What a model multiplies, as its author would write it."""

    logits: float = 1.0
    attention: float = 1.0
    branches: float = 1.0


PLAIN = Multipliers()
BY = Multipliers(1 / 2, math.sqrt(1 / 2), 1 / 2)


@pytest.fixture(autouse=True)
def _in_double_precision():
    with jax.enable_x64(True):
        yield


def plan_of(model, base, *inputs, **given):
    options: dict[str, Any] = {"form": "multipliers", "attention_scale": "1/d"} | given
    plan = archscale.parametrize(model, *inputs, base=base, optimizer="adamw", **options)
    assert plan.choice.forward.attention == pytest.approx(BY.attention, rel=2**-8)
    return plan


def drawn(plan):
    """Params of which no entry is 0 or 1, so that nothing drops out."""
    return random_arrays(jax.eval_shape(plan.init, jax.random.key(0)), seed=0)


def random_arrays(shapes, seed=1):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * random.normal(size=leaf.shape), leaf.dtype), shapes
    )


def random_key():
    return jax.random.key(7)


def tokens(batch=3, length=LENGTH):
    return jnp.asarray(np.random.default_rng(1).integers(VOCAB, size=(batch, length)), jnp.int32)


def close(found, expected, rtol=1e-11, atol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected
    )


def squared(apply, params, *inputs, **options):
    return jnp.square(apply(params, *inputs, **options)).sum()


def check_training(ours, theirs, params, *inputs):
    """Values and gradients are the same."""

    def trained(apply):
        return jax.jit(jax.value_and_grad(functools.partial(squared, apply)))(params, *inputs)

    close(trained(ours), trained(theirs))


# A function, with its layers stacked and scanned.


def layer_norm(x, gain):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * gain


@jax.custom_vjp
def own_norm(x, gain):
    """A layer norm whose derivative is, on purpose, not its own."""
    return layer_norm(x, gain)


def _own_norm_forward(x, gain):
    return own_norm(x, gain), (x, gain)


def _own_norm_backward(kept, cotangent):
    _, transpose = jax.vjp(layer_norm, *kept)
    return tuple(3.0 * one for one in transpose(cotangent))


own_norm.defvjp(_own_norm_forward, _own_norm_backward)


def attend(query, key, value, *, by):
    """Causal attention of [..., time, heads, features]."""
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    logits = by.attention * logits
    length = query.shape[-3]
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), value)


def gpt(params, tokens, *, by=PLAIN, norm=layer_norm, wrap=lambda block: block):
    def block(x, layer):
        parts = jnp.split(norm(x, layer["gain1"]) @ layer["qkv"], 3, axis=-1)
        parts = [one.reshape(*x.shape[:-1], HEADS, -1) for one in parts]
        y = attend(*parts, by=by).reshape(x.shape)
        x = x + by.branches * (y @ layer["out"] + layer["bias"])
        y = jax.nn.gelu(norm(x, layer["gain2"]) @ layer["up"])
        return x + by.branches * (y @ layer["down"]), None

    x = params["table"][tokens] + params["position"][: tokens.shape[-1]]
    x, _ = jax.lax.scan(wrap(block), x, params["blocks"])
    return by.logits * (norm(x, params["gain"]) @ params["table"].T)


def shapes(width=16, depth=2, dtype=DTYPE):
    sizes = {"gain1": (), "qkv": (width, 3 * width), "out": (width, width), "bias": (),
             "gain2": (), "up": (width, 4 * width), "down": (4 * width, width)}  # fmt: skip
    tree = {
        "table": (VOCAB, width),
        "position": (LENGTH, width),
        "gain": (width,),
        "blocks": {name: (depth, *(size or (width,))) for name, size in sizes.items()},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=lambda x: type(x) is tuple
    )


def plan_of_function(apply=gpt, dtype=DTYPE, batch=3):
    model, base = (apply, shapes(dtype=dtype)), (apply, shapes(8, 1, dtype))
    return plan_of(model, base, jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32))


def stepped(apply, params):
    """Params after three steps in a scan."""

    def step(params, batch):
        gradients = jax.grad(functools.partial(squared, apply))(params, batch)
        return jax.tree.map(lambda one, by: one - 1e-3 * by, params, gradients), None

    return jax.lax.scan(step, params, jnp.stack([tokens()] * 3))[0]


def twice(params):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)


def tangent(apply, params):
    return jax.jvp(lambda params: apply(params, tokens()), (params,), (params,))


TRANSFORMED = {
    "eagerly": lambda apply, p: apply(p, tokens()),
    "jvp": tangent,
    "vmap over params": lambda apply, p: jax.vmap(apply, (0, None))(twice(p), tokens()),
    "vmap over examples": lambda apply, p: jax.vmap(apply, (None, 0))(p, tokens()),
    "scan over steps": lambda apply, p: jax.jit(functools.partial(stepped, apply))(p),
    "checkpoint": lambda apply, p: jax.grad(
        functools.partial(squared, jax.checkpoint(apply))
    )(p, tokens()),
    "another batch, a shorter sequence": lambda apply, p: apply(p, tokens(5, 2)),
    "one token alone": lambda apply, p: apply(p, tokens(1, 1)),
    "no batch": lambda apply, p: apply(p, tokens()[0]),
}  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    with jax.enable_x64(True):
        return plan_of_function()


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(plan, name):
    params, transformed = drawn(plan), TRANSFORMED[name]
    expected = jax.jit(functools.partial(transformed, functools.partial(gpt, by=BY)))(params)
    ours = functools.partial(transformed, plan.apply)
    close((ours if name == "eagerly" else jax.jit(ours))(params), expected)


def test_nothing_is_multiplied_by_one(plan):
    """Each of the three multipliers changes the outputs, in the way that the plan says."""
    params = drawn(plan)
    found = plan.apply(params, tokens())
    model = jax.jit(lambda by: gpt(params, tokens(), by=by))
    for name in Multipliers._fields:
        other = model(BY._replace(**{name: 1.0}))
        assert np.abs(found / other - 1).max() > 0.01, name
    forward = plan.choice.forward
    assert forward.tables == {"table": 0.5}
    assert forward.leaves == {"blocks/out": 0.5, "blocks/bias": 0.5, "blocks/down": 0.5}


# Functions in functions.


@jax.custom_vjp
def own_product(x, table):
    return x @ table.T


own_product.defvjp(
    lambda x, table: (x @ table.T, (x, table)),
    lambda kept, cotangent: (cotangent @ kept[1], jnp.einsum("bti,btj->ij", cotangent, kept[0])),
)

WRAPPED = {
    "jit in a checkpoint with a policy": {
        "wrap": lambda block: jax.checkpoint(
            jax.jit(block), policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        )
    },
    "custom vjp in a checkpoint": {"norm": own_norm, "wrap": jax.checkpoint},
    "cond": {
        "wrap": lambda block: (
            lambda x, layer: jax.lax.cond(
                x.sum() > -jnp.inf, block, lambda x, layer: (2 * x, None), x, layer
            )
        )
    },
}


@pytest.fixture(scope="module")
def expected(plan):
    """Value and gradients of the model that is wrapped by nothing."""
    with jax.enable_x64(True):
        return value_and_gradients(functools.partial(gpt, by=BY), drawn(plan))


def value_and_gradients(apply, params):
    return jax.jit(jax.value_and_grad(functools.partial(squared, apply)))(params, tokens())


@pytest.mark.parametrize("name", WRAPPED)
def test_functions_in_the_model(expected, name):
    apply = functools.partial(gpt, **WRAPPED[name])
    plan = plan_of_function(apply)
    params = drawn(plan)
    found = value_and_gradients(plan.apply, params)
    if "custom" in name:  # whose derivative would not be that of the function as it is written
        own = value_and_gradients(functools.partial(apply, by=BY), params)
        np.testing.assert_allclose(own[1]["gain"], 3 * expected[1]["gain"], rtol=1e-11)
        expected = own
    close(found, expected)


def test_a_product_in_a_function_with_its_own_derivative_raises():
    of = tied(lambda params, tokens: own_product(features_of(params, tokens), params["table"]))
    plan = archscale.parametrize(of(16), tokens(), base=of(8), optimizer="adamw")
    with pytest.raises(archscale.TraceError, match=r"custom_vjp_call at .*test_forward.*'folded'"):
        plan.apply(drawn(plan), tokens())


def test_lower_precision():
    dtype = jnp.bfloat16
    plan = plan_of_function(dtype=dtype)
    params = drawn(plan)
    by = BY._replace(attention=plan.choice.forward.attention)  # over a scale that is rounded
    expected = jax.jit(functools.partial(gpt, by=by))(params, tokens())
    found = plan.apply(params, tokens())
    assert found.dtype == expected.dtype == dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    size = np.abs(expected).max().astype(float)
    close(found.astype(float), expected.astype(float), tolerance, tolerance * size)


def test_an_eager_call_compiles_once_for_every_shape(plan):
    params, batches = drawn(plan), [tokens(2), tokens(2) + 1, tokens(4), tokens(4), tokens(2)]
    jax.block_until_ready(batches)
    fresh = plan_of_function()
    counts = []
    for batch in batches:
        with Compilations() as compilations:
            fresh.apply(params, batch)
        counts.append(compilations.count)
    once = counts[0]
    assert 1 <= once <= 1 + len(named_leaves(params))  # with the products of the leaves
    assert counts == [once, 0, counts[2], 0, 0]
    assert counts[2] == 1


# Models of frameworks, with random numbers, switches and stacks.

TOKENS = jax.ShapeDtypeStruct((3, LENGTH), jnp.int32)


class LinenLayer(nn.Module):
    by: Multipliers
    rate: float

    @nn.compact
    def __call__(self, x, train):
        dense = functools.partial(nn.DenseGeneral, param_dtype=DTYPE, dtype=DTYPE)
        y = nn.LayerNorm(param_dtype=DTYPE, dtype=DTYPE)(x)
        sizes = HEADS, x.shape[-1] // HEADS
        parts = [dense(sizes, name=name)(y) for name in ("query", "key", "value")]
        y = dense(x.shape[-1], axis=(-2, -1), name="out")(attend(*parts, by=self.by))
        y = nn.Dropout(self.rate, deterministic=not train)(y)
        return x + self.by.branches * y, None


class LinenGPT(nn.Module):
    width: int = 16
    depth: int = 2
    by: Multipliers = PLAIN
    rate: float = 0.0
    remat: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens, train=False, scale=None):
        table = nn.Embed(VOCAB, self.width, param_dtype=DTYPE, dtype=DTYPE, name="table")
        x = table(tokens)
        layer = nn.remat(LinenLayer, static_argnums=(2,)) if self.remat else LinenLayer
        if self.scanned:
            scan: Any = nn.scan
            layer = scan(
                layer, {"params": 0}, split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast, length=self.depth,
            )  # fmt: skip
            x, _ = layer(self.by, self.rate, name="layers")(x, train)
        for number in range(0 if self.scanned else self.depth):
            x, _ = layer(self.by, self.rate, name=f"layers_{number}")(x, train)
        return self.by.logits * table.attend(x if scale is None else x * scale)


LINEN = {
    "remat, a switch and None by position": ({"remat": True}, (True, None), {}),
    "scan of remat, a switch by keyword": (
        {"remat": True, "scanned": True}, (), {"train": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    fields, switches, keywords = LINEN[name]
    fields = {"rate": 0.3} | fields
    model, base = LinenGPT(**fields), LinenGPT(8, 1, **fields)
    plan = plan_of(model, base, TOKENS, *switches, model_kwargs=keywords)
    params, reference = drawn(plan), LinenGPT(by=BY, **fields)

    def ours(params):
        return plan.apply(params, tokens(), *switches, key=random_key())

    def theirs(params):
        return reference.apply(
            params, tokens(), *switches, **keywords, rngs={"params": random_key()}
        )

    check_training(ours, theirs, params)


def test_keys_are_those_of_the_model():
    plan = plan_of(LinenGPT(rate=0.3), LinenGPT(8, 1, rate=0.3), TOKENS, True)
    params = drawn(plan)
    found = plan.apply(params, tokens(), True, key=random_key())
    assert not np.allclose(found, plan.apply(params, tokens(), True))
    raw = jax.random.key_data(random_key())  # as jax.random.PRNGKey makes them
    close(plan.apply(params, tokens(), True, key=raw), found)


class NnxLayer(nnx.Module):
    def __init__(self, width, by, rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs, param_dtype=DTYPE)
        self.norm = nnx.LayerNorm(width, rngs=rngs, param_dtype=DTYPE)
        self.qkv, self.out, self.by = linear(width, 3 * width), linear(width, width), by

    def __call__(self, x):
        parts = jnp.split(self.qkv(self.norm(x)), 3, -1)
        parts = [one.reshape(*x.shape[:-1], HEADS, -1) for one in parts]
        return x + self.by.branches * self.out(attend(*parts, by=self.by).reshape(x.shape))


class NnxGPT(nnx.Module):
    def __init__(self, width=16, depth=2, by=PLAIN):
        self.table = nnx.Embed(VOCAB, width, rngs=nnx.Rngs(0), param_dtype=DTYPE)
        self.by = by

        def make(rngs):
            return NnxLayer(width, by, rngs)

        stacked = nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=(0,), out_axes=0))
        self.layers = stacked(nnx.Rngs(1))

    def __call__(self, tokens):
        call = nnx.remat(lambda layer, x: layer(x))
        scan = nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.by.logits * self.table.attend(scan(self.table(tokens), self.layers))


def test_nnx_with_remat_in_a_scan():
    model, base, reference = (
        nnx.eval_shape(functools.partial(NnxGPT, *sizes)) for sizes in ((), (8, 1), (16, 2, BY))
    )
    plan = plan_of(model, base, TOKENS)
    params = drawn(plan)
    graph, _ = nnx.split(reference, nnx.Param)

    def theirs(params, tokens):
        return nnx.merge(graph, params)(tokens)

    check_training(plan.apply, theirs, params, tokens())


class EquinoxGPT(eqx.Module):
    table: eqx.nn.Embedding
    layers: list[Any]
    dropout: eqx.nn.Dropout
    by: Multipliers = eqx.field(static=True)

    def __init__(self, width=16, depth=2, by=PLAIN):
        keys = jax.random.split(jax.random.key(0), 2 * depth + 1)
        self.table = eqx.nn.Embedding(VOCAB, width, key=keys[0], dtype=DTYPE)
        self.layers = [
            (eqx.nn.Linear(width, 3 * width, key=one, dtype=DTYPE),
             eqx.nn.Linear(width, width, key=other, dtype=DTYPE))
            for one, other in zip(keys[1::2], keys[2::2], strict=True)
        ]  # fmt: skip
        self.dropout, self.by = eqx.nn.Dropout(0.3), by

    def __call__(self, tokens, key):
        x = jax.vmap(self.table)(tokens)
        for qkv, out in self.layers:
            key, own = jax.random.split(key)
            parts = jnp.split(jax.vmap(qkv)(x), 3, -1)
            parts = [one.reshape(len(x), HEADS, -1) for one in parts]
            y = jax.vmap(out)(attend(*parts, by=self.by).reshape(x.shape))
            x = x + self.by.branches * self.dropout(y, key=own)
        return self.by.logits * (x @ self.table.weight.T)


def test_equinox_of_one_example_with_a_key_for_each():
    one = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    model, base, reference = (
        eqx.filter_eval_shape(EquinoxGPT, *sizes) for sizes in ((), (8, 1), (16, 2, BY))
    )
    plan = plan_of(model, base, one, model_kwargs={"key": jax.random.key(0)})
    params, keys = drawn(plan), jax.random.split(random_key(), 3)

    shapes, static = eqx.partition(reference, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def theirs(params, tokens, key):
        arrays = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(params))
        return eqx.combine(arrays, static)(tokens, key)

    def ours(params, tokens, key):
        return plan.apply(params, tokens, key=key)

    mapped = (jax.vmap(apply, (None, 0, 0)) for apply in (ours, theirs))
    check_training(*mapped, params, tokens(), keys)


def haiku_gpt(width=16, depth=2, by=PLAIN):
    def apply(tokens):
        init = hk.initializers.RandomNormal()
        table = hk.get_parameter("table", (VOCAB, width), DTYPE, init)
        x = table[tokens]
        for number in range(depth):
            parts = jnp.split(hk.Linear(3 * width, name=f"qkv_{number}")(x), 3, -1)
            parts = [one.reshape(*x.shape[:-1], HEADS, -1) for one in parts]
            y = hk.Linear(width, name=f"out_{number}")(attend(*parts, by=by).reshape(x.shape))
            x = x + by.branches * hk.dropout(hk.next_rng_key(), 0.3, y)
        return by.logits * (x @ table.T)

    return hk.transform(apply)


def test_haiku_with_dropout():
    plan = plan_of(haiku_gpt(), haiku_gpt(8, 1), TOKENS)
    params = drawn(plan)
    expected = jax.jit(haiku_gpt(by=BY).apply)(params, random_key(), tokens())
    close(plan.apply(params, tokens(), key=random_key()), expected)


def tied(body):
    """A function of a tied table and two weights, of a width."""

    def of(width):
        sizes = {"table": (VOCAB, width), "first": (width, width), "second": (width, width)}
        return body, {name: jax.ShapeDtypeStruct(one, DTYPE) for name, one in sizes.items()}

    return of


def features_of(params, tokens):
    x = params["table"][tokens]
    return x + jax.nn.relu(x @ params["first"]) @ params["second"]


def test_calls_that_want_no_logits():
    """A switch of the model: features are not multiplied, and read as nothing but features."""

    def apply(params, tokens, wanted):
        x = features_of(params, tokens)
        return x @ params["table"].T if wanted == "logits" else x

    of = tied(apply)
    plan = archscale.parametrize(of(16), tokens(), "logits", base=of(8), optimizer="adamw")
    params = drawn(plan)
    close(plan.apply(params, tokens(), "logits"), 0.5 * apply(params, tokens(), "logits"))
    close(plan.apply(params, tokens(), "features"), apply(params, tokens(), "features"))


def test_an_operation_that_was_accepted_stays_accepted():
    from tests.kinds.test_messages_of_trace import crumple  # computes while it is imported

    of = tied(lambda params, tokens: crumple(features_of(params, tokens)) @ params["table"].T)
    with pytest.warns(UserWarning, match="crumple"):
        plan = archscale.parametrize(
            of(16), tokens(), base=of(8), optimizer="adamw", unknown="warn"
        )
    params = drawn(plan)  # and no warning below
    close(plan.apply(params, tokens()), 0.5 * of(16)[0](params, tokens()))


# On many devices.

SPECS = {
    "table": P(None, "model"), "position": P(), "gain": P(),
    "blocks": {"gain1": P(), "qkv": P(None, "data", "model"), "out": P(None, "model", "data"),
               "bias": P(), "gain2": P(), "up": P(None, None, "model"),
               "down": P(None, "model", None)},
}  # fmt: skip


def explicit_gpt(params, tokens, *, by=PLAIN):
    """The model as a mesh of explicit axes wants it: whole weights, rows of the batch apart."""

    def whole(weight):
        return jax.sharding.reshard(weight, P(*[None] * weight.ndim))

    params = jax.tree.map(whole, params)
    rows = params["table"].at[tokens].get(out_sharding=P("data", None, None))
    x = rows + params["position"][: tokens.shape[-1]]

    def block(x, layer):
        parts = jnp.split(layer_norm(x, layer["gain1"]) @ layer["qkv"], 3, axis=-1)
        parts = [one.reshape(*x.shape[:-1], HEADS, -1) for one in parts]
        y = attend(*parts, by=by).reshape(x.shape)
        x = x + by.branches * (y @ layer["out"] + layer["bias"])
        y = jax.nn.gelu(layer_norm(x, layer["gain2"]) @ layer["up"])
        return x + by.branches * (y @ layer["down"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return by.logits * (layer_norm(x, params["gain"]) @ params["table"].T)


def check_devices():
    jax.config.update("jax_enable_x64", True)
    batch, params = tokens(8), drawn(plan_of_function())
    reference = jax.value_and_grad(functools.partial(squared, functools.partial(gpt, by=BY)))
    expected = jax.device_get(jax.jit(reference)(params, batch))

    def check(apply, mesh, specs=SPECS, gradients=True):
        def put(leaf, spec):
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        placed = jax.tree.map(put, params, specs), put(batch, P("data"))
        loss = functools.partial(squared, apply)
        if gradients:
            close(jax.device_get(jax.jit(jax.value_and_grad(loss))(*placed)), expected)
        else:
            close(jax.device_get(jax.jit(loss)(*placed)), expected[0])

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    check(plan_of_function().apply, mesh)

    def mapped(apply, **options):
        return jax.shard_map(
            apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), **options
        )

    # The user's shard_map around the plan, and one inside the model, of all axes and of one.
    everywhere = jax.tree.map(lambda spec: P(), SPECS)
    check(mapped(plan_of_function().apply), mesh, everywhere)
    for options in ({"check_vma": False}, {"axis_names": {"data"}}):
        plan = plan_of_function(mapped(gpt, **options), batch=8)
        check(plan.apply, mesh, everywhere, gradients=False)

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct(batch.shape, batch.dtype)
        plan = plan_of((explicit_gpt, shapes()), (explicit_gpt, shapes(8, 1)), rows)
        check(plan.apply, mesh)


def test_sharded_params_and_shard_map():
    on_devices(check_devices)


# Queries and keys: every sum of their products is multiplied, once.


def heads_of(x, weight, number):
    return (x @ weight).reshape(*x.shape[:-1], number, -1)


def rotated(x):
    """Rotary positions of [batch, time, heads, features]."""
    angles = jnp.arange(x.shape[1])[:, None, None] / 10.0 ** jnp.arange(x.shape[-1] // 2)
    one, other = jnp.split(x, 2, axis=-1)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], -1)


def attention_by(kind):
    """Attention of [batch, time, 4 heads, features], the logits of which are multiplied by c."""

    def apply(query, key, value, *, c):
        size = query.shape[-1]
        if kind == "jax.nn":
            return jax.nn.dot_product_attention(c * query, key, value)
        if kind == "rotary and normalized":
            query, key = (rotated(layer_norm(one, 1.0)) for one in (query, key))
            return jax.nn.dot_product_attention(c * query, key, value)
        if kind == "jax.nn, grouped":
            return jax.nn.dot_product_attention(c * query, key[:, :, :2], value[:, :, :2])
        if kind == "grouped":
            grouped = query.reshape(*query.shape[:2], 2, 2, size)
            logits = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key[:, :, :2]) / math.sqrt(size)
            mixed = jnp.einsum("bhgqk,bkhd->bqhgd", jax.nn.softmax(c * logits), value[:, :, :2])
            return mixed.reshape(query.shape)
        assert kind == "a loop over heads"
        one = [
            jax.nn.softmax(c * query[:, :, h] @ key[:, :, h].swapaxes(1, 2) / math.sqrt(size))
            @ value[:, :, h]
            for h in range(4)
        ]
        return jnp.stack(one, 2)

    return apply


def attention_model(kind, fused, scanned):
    attention = attention_by(kind)

    def apply(params, x, c=1.0):
        def block(x, layer):
            if fused:
                parts = jnp.split(x @ layer["qkv"], 3, -1)
                parts = [one.reshape(*x.shape[:-1], 4, -1) for one in parts]
            else:
                parts = [heads_of(x, layer[name], 4) for name in ("query", "key", "value")]
            return x + attention(*parts, c=c).reshape(x.shape) @ layer["out"], None

        x = x @ params["in"]
        if scanned:
            x, _ = jax.lax.scan(block, x, params["blocks"])
        else:
            for number in range(3):
                x, _ = block(x, jax.tree.map(lambda leaf: leaf[number], params["blocks"]))  # noqa: B023
        return x @ params["out"]

    def of(width):
        names = ("qkv", "out") if fused else ("query", "key", "value", "out")
        blocks = {name: (3, width, 3 * width if name == "qkv" else width) for name in names}
        tree = {"in": (6, width), "blocks": blocks, "out": (width, 3)}
        leaf = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
        return apply, jax.tree.map(leaf, tree, is_leaf=lambda one: type(one) is tuple)

    return of


X = jax.ShapeDtypeStruct((2, 5, 6), DTYPE)
FORMS = [
    ("jax.nn", False, False),
    ("rotary and normalized", False, True),
    ("jax.nn, grouped", False, True),
    ("grouped", True, False),
    ("a loop over heads", False, False),
]


@pytest.mark.parametrize(("kind", "fused", "scanned"), FORMS)
def test_every_layer_of_attention_is_multiplied_once(kind, fused, scanned):
    of = attention_model(kind, fused, scanned)
    plan = plan_of(of(32), of(16), X, form="auto")
    params, x, model = drawn(plan), random_arrays(X), jax.jit(of(32)[0])
    expected = model(params, x, BY.attention)
    close(plan.apply(params, x), expected)
    assert not np.allclose(model(params, x, 1.0), expected, rtol=1e-3)


def test_shares_of_experts_beside_attention_are_left_alone():
    """They are features of a router that meet features, but no queries."""

    def apply(params, x, c=1.0):
        x = x @ params["in"]
        query, key, value = (heads_of(x, params[name], 4) for name in ("query", "key", "value"))
        x = x + jax.nn.dot_product_attention(c * query, key, value).reshape(x.shape)
        shares = jax.nn.softmax(x @ params["router"])
        experts = jax.nn.relu(jnp.einsum("bti,eij->btej", x, params["experts"]))
        return (x + jnp.einsum("bte,btej->btj", shares, experts)) @ params["out"]

    def of(width):
        sizes = dict.fromkeys(("query", "key", "value"), (width, width))
        sizes |= {"in": (6, width), "router": (width, 3), "experts": (3, width, width),
                  "out": (width, 3)}  # fmt: skip
        return apply, {name: jax.ShapeDtypeStruct(one, DTYPE) for name, one in sizes.items()}

    plan = plan_of(of(16), of(8), X, form="auto")
    params, x = drawn(plan), random_arrays(X)
    close(plan.apply(params, x), jax.jit(apply)(params, x, BY.attention))


class FlaxAttention(nn.Module):
    width: int
    c: float = 1.0

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=DTYPE)
        x = dense(self.width)(x)

        def attention(query, key, value, **options):
            return nn.dot_product_attention(self.c * query, key, value, **options)

        own: dict[str, Any] = {} if self.c == 1 else {"attention_fn": attention}
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(2, param_dtype=DTYPE, **own)(x)
        return dense(3)(x)


class EquinoxAttention(eqx.Module):
    first: eqx.nn.Linear
    attention: list[eqx.nn.MultiheadAttention]
    last: eqx.nn.Linear

    def __init__(self, width):
        keys = jax.random.split(jax.random.key(0), 4)
        self.first = eqx.nn.Linear(6, width, key=keys[0], dtype=DTYPE)
        self.attention = [
            eqx.nn.MultiheadAttention(2, width, key=key, dtype=DTYPE) for key in keys[1:3]
        ]
        self.last = eqx.nn.Linear(width, 3, key=keys[3], dtype=DTYPE)

    def __call__(self, x):
        x = jax.vmap(self.first)(x)
        for one in self.attention:
            x = x + one(x, x, x)
        return jax.vmap(self.last)(x)


def test_attention_of_flax():
    plan = plan_of(FlaxAttention(16), FlaxAttention(8), X, form="auto")
    params, x = drawn(plan), random_arrays(X)
    expected = jax.jit(FlaxAttention(16, BY.attention).apply)(params, x)
    close(plan.apply(params, x), expected)


def test_attention_of_equinox():
    model, base = (eqx.filter_eval_shape(EquinoxAttention, width) for width in (16, 8))
    one = jax.ShapeDtypeStruct(X.shape[1:], DTYPE)
    plan = plan_of(model, base, one, form="auto")
    params, x = drawn(plan), random_arrays(one)
    queries = lambda model: [one.query_proj.weight for one in model.attention]  # noqa: E731
    smaller = eqx.tree_at(queries, params, replace_fn=lambda weight: BY.attention * weight)
    expected = jax.jit(lambda params, x: eqx.combine(params, model)(x))(smaller, x)
    close(plan.apply(params, x), expected)


def scaled_by(scale, size_of=lambda width: width, dtype=DTYPE):
    """One layer of attention of a head size, whose logits are multiplied by `scale(size)`."""

    def of(width):
        size = size_of(width)

        def apply(params, x):
            x = x @ params["in"]
            query, key, value = (x @ params[name] for name in ("query", "key", "value"))
            mixed = jax.nn.softmax(query @ key.swapaxes(1, 2) * scale(size)) @ value
            return (x + mixed @ params["mix"]) @ params["out"]

        sizes = {"in": (6, width), "query": (width, size), "key": (width, size),
                 "value": (width, size), "mix": (size, width), "out": (width, 3)}  # fmt: skip
        return apply, {name: jax.ShapeDtypeStruct(one, dtype) for name, one in sizes.items()}

    return of


def attention_factor(of, dtype=DTYPE, x=X, width=24, base=9):
    x = jax.ShapeDtypeStruct(x.shape, dtype)
    plan = archscale.parametrize(of(width), x, base=of(base), attention_scale="1/d")
    return plan.choice.forward.attention


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_a_model_that_scales_by_the_head_size_is_left_alone(dtype):
    """1/24 and 1/9 are rounded, to as many digits as the model has."""
    assert attention_factor(scaled_by(lambda size: 1 / size, dtype=dtype), dtype) == 1
    assert attention_factor(scaled_by(lambda size: 8 / size, dtype=dtype), dtype) == 1
    found = attention_factor(scaled_by(lambda size: size**-0.5, dtype=dtype), dtype)
    assert found == pytest.approx(math.sqrt(9 / 24), rel=4 * float(jnp.finfo(dtype).eps))
    assert attention_factor(scaled_by(lambda size: size**-0.5, lambda width: 8)) == 1


def test_attention_of_two_sizes_raises():
    def of(width):
        def apply(params, x):
            x = x @ params["in"]
            for size in (width // 2, width // 4):
                names = ("query", "key", "value")
                query, key, value = (heads_of(x, params[name], width // size) for name in names)
                mixed = jax.nn.dot_product_attention(query, key, value)
                x = x + mixed.reshape(x.shape)
            return x @ params["out"]

        sizes = dict.fromkeys(("query", "key", "value"), (width, width))
        sizes |= {"in": (6, width), "out": (width, 3)}
        return apply, {name: jax.ShapeDtypeStruct(one, DTYPE) for name, one in sizes.items()}

    with pytest.raises(
        ValueError, match=r"attention_scale='1/d': the model has 2 kinds.*\(4, 0.5\)"
    ):
        attention_factor(of, width=16, base=8)


def test_heads_of_two_sizes_in_one_projection_raise():
    def of(width):
        def apply(params, x):
            x = x @ params["in"]
            query, key, value = jnp.split(x @ params["qkv"], 3, -1)
            half = width // 2
            mixed = [
                jax.nn.softmax(query[..., cut] @ key[..., cut].swapaxes(1, 2)) @ value[..., cut]
                for cut in (slice(half), slice(half, half + half // 2))
            ]
            return (x + jnp.concatenate(mixed, -1) @ params["mix"]) @ params["out"]

        sizes = {"in": (6, width), "qkv": (width, 3 * width), "mix": (3 * width // 4, width),
                 "out": (width, 3)}  # fmt: skip
        return apply, {name: jax.ShapeDtypeStruct(one, DTYPE) for name, one in sizes.items()}

    with pytest.raises(archscale.TraceError, match=r"2 head sizes \(\[4, 8\]\)"):
        plan = archscale.parametrize(of(16), X, base=of(8), attention_scale="1/d")
        plan.apply(drawn(plan), jnp.ones(X.shape))


def test_a_model_without_attention_raises():
    of = tied(lambda params, tokens: features_of(params, tokens) @ params["table"].T)
    with pytest.raises(ValueError, match="no product of queries and keys was found"):
        archscale.parametrize(of(16), tokens(), base=of(8), attention_scale="1/d")
