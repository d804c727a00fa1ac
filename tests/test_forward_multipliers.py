"""`plan.apply` is the model with the forward multipliers written into it, however it is called.

Every model here takes `Multipliers`, which stand where its author would write them; the plan is
that of the model without them. Ratios are 2 in width (16 over 8, two heads) and in depth (4 over
2), so that logits are multiplied by 1/2, branches by 1/2 (α = 1), and queries and keys, which the
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


BY = Multipliers(1 / 2, math.sqrt(1 / 2), 1 / 2)


@pytest.fixture(autouse=True)
def _in_double_precision():
    with jax.enable_x64(True):
        yield


def plan_of(model, base, *inputs, **options):
    options = {"form": "multipliers", "attention_scale": "1/d"} | options
    plan = archscale.parametrize(model, *inputs, base=base, optimizer="adamw", **options)
    assert plan.choice.forward.attention == pytest.approx(BY.attention, rel=2**-8)
    return plan


def drawn(plan):
    """Params of which no leaf is 0 or 1, so that nothing drops out."""

    def moved(leaf):
        noise = jax.random.normal(jax.random.key(leaf.size), leaf.shape)
        return leaf + (0.3 * noise).astype(leaf.dtype)

    return jax.tree.map(moved, plan.init(jax.random.key(0)))


def tokens(batch=3, length=LENGTH):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, VOCAB)


def close(found, expected, rtol=1e-11, atol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


def squared(apply, params, *inputs, **options):
    return jnp.square(apply(params, *inputs, **options)).sum()


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


def attend(query, key, value, by):
    """Causal attention of [..., time, heads, features]."""
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    logits = by.attention * logits
    length = query.shape[-3]
    logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), value)


def gpt(params, tokens, *, by=Multipliers(), norm=layer_norm, wrap=lambda block: block):
    def block(x, layer):
        parts = jnp.split(norm(x, layer["gain1"]) @ layer["qkv"], 3, axis=-1)
        parts = [one.reshape(*x.shape[:-1], HEADS, -1) for one in parts]
        y = attend(*parts, by).reshape(x.shape)
        x = x + by.branches * (y @ layer["out"] + layer["bias"])
        y = jax.nn.gelu(norm(x, layer["gain2"]) @ layer["up"])
        return x + by.branches * (y @ layer["down"]), None

    x = params["table"][tokens] + params["position"][: tokens.shape[-1]]
    x, _ = jax.lax.scan(wrap(block), x, params["blocks"])
    return by.logits * (norm(x, params["gain"]) @ params["table"].T)


def shapes(width=16, depth=4, dtype=DTYPE):
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


def plan_of_function(apply=gpt, dtype=DTYPE, **options):
    model, base = (apply, shapes(dtype=dtype)), (apply, shapes(8, 2, dtype))
    return plan_of(model, base, jax.ShapeDtypeStruct((3, LENGTH), jnp.int32), **options)


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


def hessian_product(apply, params):
    gradient = jax.grad(functools.partial(squared, apply))
    return jax.jvp(lambda params: gradient(params, tokens()), (params,), (params,))[1]


TRANSFORMED = {
    "eagerly": lambda apply, p: apply(p, tokens()),
    "jit": lambda apply, p: jax.jit(apply)(p, tokens()),
    "grad": lambda apply, p: jax.grad(functools.partial(squared, apply))(p, tokens()),
    "jvp": tangent,
    "hessian": hessian_product,
    "vmap over params": lambda apply, p: jax.vmap(apply, (0, None))(twice(p), tokens()),
    "vmap over both": lambda apply, p: jax.vmap(apply)(twice(p), jnp.stack([tokens()] * 2)),
    "vmap over examples": lambda apply, p: jax.vmap(apply, (None, 0))(p, tokens()),
    "scan over steps": lambda apply, p: jax.jit(functools.partial(stepped, apply))(p),
    "checkpoint": lambda apply, p: jax.grad(
        functools.partial(squared, jax.checkpoint(apply))
    )(p, tokens()),
    "another batch": lambda apply, p: apply(p, tokens(5)),
    "a shorter sequence": lambda apply, p: apply(p, tokens(3, 2)),
    "one example": lambda apply, p: apply(p, tokens(1)),
    "one token": lambda apply, p: apply(p, tokens(3, 1)),
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
    close(transformed(plan.apply, params), transformed(functools.partial(gpt, by=BY), params))


def test_nothing_is_multiplied_by_one(plan):
    """Each of the three multipliers changes the outputs, in the way that the plan says."""
    params = drawn(plan)
    found = plan.apply(params, tokens())
    for name in Multipliers._fields:
        other = gpt(params, tokens(), by=BY._replace(**{name: 1.0}))
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
    "jit": {"wrap": jax.jit},
    "checkpoint": {"wrap": jax.checkpoint},
    "checkpoint with a policy": {
        "wrap": functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        )
    },
    "custom vjp": {"norm": own_norm},
    "custom vjp in a checkpoint": {"norm": own_norm, "wrap": jax.checkpoint},
    "cond": {
        "wrap": lambda block: lambda x, layer: jax.lax.cond(
            x.sum() > -jnp.inf, block, lambda x, layer: (2 * x, None), x, layer
        )
    },
}


@pytest.mark.parametrize("name", WRAPPED)
def test_functions_in_the_model(name):
    apply = functools.partial(gpt, **WRAPPED[name])
    plan = plan_of_function(apply)
    params = drawn(plan)
    value = jax.jit(jax.value_and_grad(functools.partial(squared, plan.apply)))(params, tokens())
    reference = functools.partial(squared, functools.partial(apply, by=BY))
    close(value, jax.jit(jax.value_and_grad(reference))(params, tokens()))
    if "custom" in name:  # whose derivative would not be that of the function as it is written
        plain = functools.partial(squared, functools.partial(gpt, by=BY))
        gain = jax.jit(jax.grad(plain))(params, tokens())["gain"]
        np.testing.assert_allclose(value[1]["gain"], 3 * gain, rtol=1e-11)


def test_a_product_in_a_function_with_its_own_derivative_raises():
    def apply(params, tokens):
        x = params["table"][tokens]
        return own_product(x + jax.nn.relu(x @ params["first"]) @ params["second"], params["table"])

    def of(width):
        sizes = {"table": (VOCAB, width), "first": (width, width), "second": (width, width)}
        return apply, {name: jax.ShapeDtypeStruct(one, DTYPE) for name, one in sizes.items()}

    plan = archscale.parametrize(of(16), tokens(), base=of(8), optimizer="adamw")
    with pytest.raises(archscale.TraceError, match=r"custom_vjp_call at .*test_forward.*'folded'"):
        plan.apply(drawn(plan), tokens())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lower_precision(dtype):
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
