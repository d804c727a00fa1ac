"""Moments in attention: scores, masks and their divisor; tables that are looked up or added."""

import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    KEY,
    Model,
    deviation,
    haiku_model,
    linen_model,
    moments,
    normal,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


# Attention


def scores_of(scaled, split=True):
    """RMS of attention scores, with and without 1/sqrt(d) in the model."""
    heads, size = 2, 64

    def run(p, x):
        z = x @ p["stem"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        if scaled:
            scores = scores / size**0.5
        y = jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), v, p["o"])
        return (z + y) @ p["readout"], [scores]

    shapes = specs(stem=(8, 128), o=(heads, size, 128), readout=(128, 3))
    shapes |= {name: spec(128, heads, size) for name in "qkv"}
    model = Model(lambda p, x: run(p, x)[0], shapes, (normal(4, 16, 8),))
    return math.sqrt(moments(model, "second_moment", lambda p, x: run(p, x)[1])[0])


def test_scores_without_a_divisor_are_not_larger():
    """T5 has no 1/sqrt(d): the start of q and k carries it, so that scores are as with it."""
    assert scores_of(False) == pytest.approx(scores_of(True), rel=0.2)


def test_scores_without_a_divisor_in_linen():
    """The same with Dense layers and 2 heads by reshape, behind RMSNorm: q·k of RMS at most 3.

    Behind a norm q and k have second moments of at most 2, their product over sqrt(d) at most 2.
    """

    def run(p, x):
        z = x @ p["stem"]
        h = z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True))
        q, k = ((h @ p[n]).reshape(*h.shape[:2], 2, 64) for n in "qk")
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        y = jax.nn.softmax(scores) @ jnp.swapaxes((h @ p["v"]).reshape(q.shape), 1, 2)
        return (z + jnp.swapaxes(y, 1, 2).reshape(z.shape) @ p["o"]) @ p["out"], [scores]

    shapes = specs(stem=(8, 128), out=(128, 3)) | {n: spec(128, 128) for n in "qkvo"}
    model = Model(lambda p, x: run(p, x)[0], shapes, (normal(4, 8, 8),))
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1])
    assert math.sqrt(found[0]) < 3


@pytest.mark.parametrize("kind", ["T5", "Swin", "per distance"])
def test_tables_added_to_scores_start_small(kind):
    """Relative positions added to attention scores start at 0 to 0.02 (T5, Swin), not at 1."""

    def apply(p, x):
        z = x @ p["stem"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n in "qkv")
        places = jnp.arange(4)[:, None] - jnp.arange(4)[None] + 3
        if kind == "T5":
            bias = jnp.moveaxis(p["relative"][places], -1, 0)
        elif kind == "Swin":
            bias = p["relative"][places.reshape(-1)].reshape(4, 4, -1).transpose(2, 0, 1)
        else:
            bias = jax.nn.one_hot(places, 7) @ p["relative"]
            bias = jnp.moveaxis(bias, -1, 0)[None]
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / 4 + bias
        y = jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), v, p["o"])
        return (z + y) @ p["readout"]

    shapes = specs(stem=(8, 32), o=(2, 16, 32), relative=(7, 2), readout=(32, 3))
    shapes |= {name: spec(32, 2, 16) for name in "qkv"}
    model = Model(apply, shapes, (spec(2, 4, 8),))
    params = archscale.initialize(KEY, shapes, model.trace())
    assert float(jnp.sqrt(jnp.mean(params["relative"] ** 2))) <= 0.05
    assert float(jnp.std(params["q"])) > 0.05


# Tables


def lookup(kind, table, ids):
    size = table.shape[0]
    if kind == "compare":
        return (ids[..., None] == jnp.arange(size)).astype(table.dtype) @ table
    if kind == "one_hot":
        return jax.nn.one_hot(ids, size) @ table
    if kind == "einsum":
        return jnp.einsum("bsv,vd->bsd", jax.nn.one_hot(ids, size), table)
    if kind == "where":
        return jnp.where(ids[..., None] == jnp.arange(size), 1.0, 0.0) @ table
    if kind == "take":
        return jnp.take(table, ids, axis=0)
    return table[ids]


TABLES = ["compare", "one_hot", "einsum", "where", "take"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_read_by_a_product_with_one_hots_is_a_table(kind):
    """Rows are chosen one at a time: role embedding, entries of std 1, as for table[ids]."""

    def make(kind):
        def apply(p, ids):
            z = lookup(kind, p["table"], ids)
            return (z + RELU(z @ p["up"]) @ p["down"]) @ p["readout"]

        shapes = specs(table=(300, 32), up=(32, 32), down=(32, 32), readout=(32, 300))
        return Model(apply, shapes, (spec(2, 5, dtype=jnp.int32),))

    arch = make(kind).trace()
    assert {one.name: str(one.role) for one in arch.parameters}["table"] == "embedding"
    for rule in (None, "second_moment"):
        assert archscale.weight_standard_deviations(arch, rule)["table"] == pytest.approx(1)
        for name in ("up", "down", "readout"):
            np.testing.assert_allclose(
                deviation(make(kind), name, rule), deviation(make("index"), name, rule)
            )


def test_a_table_of_haiku_by_one_hots():
    """hk.Embed in ONE_HOT style."""

    def network(ids):
        z = hk.Embed(40, 16, lookup_style=hk.EmbedLookupStyle.ONE_HOT, name="table")(ids)
        return hk.Linear(40)(RELU(hk.Linear(16)(z)))

    model = haiku_model(network, jnp.zeros((2, 5), jnp.int32))
    assert deviation(model, "table/embeddings") == pytest.approx(1)


@pytest.mark.parametrize("order", ["tok+pos+seg", "tok+seg+pos", "pos+tok+seg", "tok+pos"])
def test_positions_beside_a_tied_table_have_its_size(order):
    """Rows of a tied table have norm 1, entries std 1/√n; positions beside it have that too."""
    width = 64

    class Bert(nn.Module):
        @nn.compact
        def __call__(self, ids):
            tables = {
                "tok": nn.Embed(100, width, name="tok"),
                "pos": nn.Embed(12, width, name="pos"),
                "seg": nn.Embed(2, width, name="seg"),
            }
            read = {"tok": ids, "pos": jnp.arange(12), "seg": ids % 2}
            first, *others = order.split("+")
            x = tables[first](read[first])
            for name in others:
                x = x + tables[name](read[name])
            x = x + nn.Dense(width)(RELU(nn.Dense(width)(nn.LayerNorm()(x))))
            return tables["tok"].attend(nn.LayerNorm()(x))

    model = linen_model(Bert(), jnp.zeros((2, 12), jnp.int32))
    for name in order.split("+"):
        found = deviation(model, f"{name}/embedding")
        assert found == pytest.approx(width**-0.5, rel=1e-6), name


def test_positions_beside_a_tied_table_in_plain_jax():
    """The same with a slice of a longer table of positions, and with three sums in one."""

    def apply(p, ids):
        seen = p["pos"][: ids.shape[1]]
        x = sum((p["tok"][ids], seen, p["kind"][ids % 3]))
        x = x + RELU(x @ p["up"]) @ p["down"]
        return x @ p["tok"].T

    shapes = specs(tok=(50, 32), pos=(64, 32), kind=(3, 32), up=(32, 32), down=(32, 32))
    model = Model(apply, shapes, (spec(2, 8, dtype=jnp.int32),))
    for name in ("tok", "pos", "kind"):
        assert deviation(model, name) == pytest.approx(32**-0.5, rel=1e-6), name


# Masks and divisors


def masked_attention(mask, fused):
    def apply(params, x):
        h = x @ params["stem"]
        if fused:
            q, k, v = jnp.split(h @ params["qkv"], 3, -1)
        else:
            q, k, v = (h @ params[name] for name in "qkv")
        scores = q @ jnp.swapaxes(k, -1, -2) / 8
        causal = jnp.tril(jnp.ones((6, 6), bool))
        scores = {
            "added": lambda: scores + jnp.where(causal, 0.0, -1e9),
            "multiplied": lambda: scores + -1e9 * (1.0 - causal),
            "chosen": lambda: jnp.where(causal, scores, -1e9),
            "infinite": lambda: jnp.where(causal, scores, -jnp.inf),
            "least": lambda: jnp.where(causal, scores, jnp.finfo(scores.dtype).min),
        }[mask]()
        return (h + jax.nn.softmax(scores) @ v @ params["out"]) @ params["head"]

    names = {"qkv": (64, 192)} if fused else dict.fromkeys("qkv", (64, 64))
    return Model(
        apply, specs(stem=(8, 64), out=(64, 64), head=(64, 3), **names), (normal(16, 6, 8),)
    )


@pytest.mark.parametrize("rule", ["second_moment", "target_in_degree"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("mask", ["added", "multiplied", "chosen", "infinite", "least"])
def test_a_mask_however_it_is_written_leaves_a_mean_of_values(mask, fused, rule):
    """Attention brings at most the second moment of its values, whatever hides the scores."""
    model = masked_attention(mask, fused)
    architecture = model.trace()
    moments = archscale.second_moments(architecture, rule)
    assert all(np.isfinite(moment) for moment in moments.values())
    deviations = archscale.weight_standard_deviations(architecture, rule)
    plain = masked_attention("chosen", False).trace()
    expected = archscale.weight_standard_deviations(plain, rule)
    np.testing.assert_allclose(value(deviations, "out"), value(expected, "out"), rtol=0.05)


@pytest.mark.parametrize("scale", ["scores", "masked", "shifted", "by hand", "decayed", "query"])
def test_the_divisor_of_scores_counts_wherever_it_stands(scale):
    """Queries are drawn as keys are, as the scores are divided by √d already."""

    def apply(p, x):
        h = x @ p["stem"]
        q, k, v = (h @ p[name] for name in "qkv")
        root = 64**0.5
        if scale == "query":
            q = q / root
        s = q @ jnp.swapaxes(k, 1, 2)
        s = {
            "scores": lambda: s / root,
            "masked": lambda: (s + jnp.where(jnp.tri(6) > 0, 0.0, -1e9)) / root,
            "shifted": lambda: (s - s.max(-1, keepdims=True)) / root,
            "by hand": lambda: s / root,
            "decayed": lambda: s * 0.9 ** jnp.arange(6.0) / root,
            "query": lambda: s,
        }[scale]()
        if scale == "by hand":
            s = jnp.exp(s - s.max(-1, keepdims=True))
            w = s / s.sum(-1, keepdims=True)
        else:
            w = jax.nn.softmax(s)
        return (h + w @ v @ p["out"]) @ p["head"]

    shapes = specs(stem=(8, 64), out=(64, 64), head=(64, 3), **dict.fromkeys("qkv", (64, 64)))
    found = archscale.weight_standard_deviations(archscale.trace(apply, shapes, spec(4, 6, 8)))
    np.testing.assert_allclose(value(found, "q"), value(found, "k"), rtol=1e-6)
