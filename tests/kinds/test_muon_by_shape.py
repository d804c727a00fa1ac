"""Width multipliers for a Muon that goes by shape: the update that optax makes of it (theory §10).

A matrix that a layer applies to k inputs and N outputs shall change by √(N/k) in spectral norm.
optax orthogonalizes every leaf of two axes and multiplies by √max(1, shape₁/shape₀), or by
√max(shape)·rms: c is the size of its update over the wanted one, and the multiplier is c_b/c.
Biases [heads, d] are not matrices of a layer: their entries shall change alike at every width.
"""

import math

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.kinds.helpers import (
    Model,
    equinox_model,
    haiku_model,
    linen_model,
    multipliers,
    normal,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def update_of(shape, **options):
    """The first update of optax.contrib.muon at rate 1."""
    muon = optax.contrib.muon(1.0, ns_steps=12, **options)
    gradient = np.random.default_rng(0).standard_normal(shape, np.float32)
    return np.asarray(jax.jit(lambda g: muon.update(g, muon.init(g), g)[0])(gradient))


def size_of_update(shape, rms=None):
    """Its spectral norm in closed form."""
    return math.sqrt(max(1, shape[1] / shape[0])) if rms is None else rms * math.sqrt(max(shape))


def multiplier(wide, base, layer, base_layer, rms):
    """c_b/c; layers are (inputs, outputs)."""
    c = size_of_update(wide, rms) / math.sqrt(layer[1] / layer[0])
    return size_of_update(base, rms) / math.sqrt(base_layer[1] / base_layer[0]) / c


@pytest.mark.parametrize("shape", [(64, 16), (5, 64), (40, 40)])
@pytest.mark.parametrize("rms", [None, 0.2])
def test_the_size_of_an_update_of_optax(shape, rms):
    """The closed form against optax, whose iteration leaves singular values of 0.7 to 1.2."""
    update = update_of(shape, consistent_rms=rms)
    values = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(values / size_of_update(shape, rms), 1, atol=0.35)


def chain(width):
    """[in, out]: x @ W."""

    def apply(p, x):
        return RELU(RELU(x @ p["a"]) @ p["b"]) @ p["c"]

    return Model(apply, specs(a=(20, width), b=(width, width), c=(width, 5)), (normal(4, 20),))


def transposed_chain(width):
    """[out, in]: einsum, as ports from torch write it."""

    def apply(p, x):
        h = RELU(jnp.einsum("bi,oi->bo", x, p["a"]))
        return RELU(h @ p["b"].T) @ p["c"].T

    return Model(apply, specs(a=(width, 20), b=(width, width), c=(5, width)), (normal(4, 20),))


def equinox_mlp(width):
    return equinox_model(lambda key: eqx.nn.MLP(20, 5, width, 2, key=key), normal(4, 20))


def haiku_mlp(width):
    return haiku_model(lambda x: hk.nets.MLP([width, width, 5])(x), normal(4, 20))


def bottleneck(width):
    """Matrices that are not square, both ways, in both orientations."""

    def apply(p, x):
        h = RELU(x @ p["a"]) @ p["up"]
        h = RELU(RELU(h) @ p["down"].T)
        return h @ p["c"]

    shapes = specs(a=(20, width), up=(width, 4 * width), down=(width, 4 * width), c=(width, 5))
    return Model(apply, shapes, (normal(4, 20),))


@pytest.mark.parametrize(
    "make",
    [chain, transposed_chain, equinox_mlp, haiku_mlp, bottleneck],
    ids=["[in, out]", "[out, in]", "equinox", "haiku", "both"],
)
@pytest.mark.parametrize("rms", [None, 0.2])
def test_matrices_change_by_the_root_of_out_over_in(make, rms):
    """c_b/c of every layer, in the orientation in which it is stored."""
    wide, base = make(256), make(32)
    extra = {} if rms is None else {"consistent_rms": rms}
    found = multipliers(wide, base, width_rule="muon", **extra)
    small = {one.name: one for one in base.trace().parameters}
    count = 0
    for one in wide.trace().parameters:
        if len(one.shape) == 2:
            other = small[one.name]
            expected = multiplier(
                one.shape,
                other.shape,
                (one.fan_in, one.fan_out),
                (other.fan_in, other.fan_out),
                rms,
            )
            assert found[one.name] == pytest.approx(expected, rel=1e-3), one.name
            count += 1
        else:
            assert found[one.name] == pytest.approx(1), one.name
    assert count >= 3


def test_closed_form_of_both_orientations():
    """Widths 64 to 512 with 20 inputs and 5 outputs: [in, out] (1, 1, 1/√8), [out, in] (√8, 1, ⅛).

    Readout [5, n]: optax's update has size √(n/5), wanted is √(5/n), c = n/5: 1/8. Stem [n, 20]:
    size 1, wanted √(n/20): √8. With x @ W the stem's c is 1 and the readout's √(n/5).
    """
    root = 8**0.5
    found = multipliers(chain(512), chain(64), width_rule="muon")
    assert [found[name] for name in "abc"] == pytest.approx([1, 1, 1 / root])
    found = multipliers(transposed_chain(512), transposed_chain(64), width_rule="muon")
    assert [found[name] for name in "abc"] == pytest.approx([root, 1, 1 / 8])


def test_closed_form_of_consistent_rms():
    """Size rms·√max(shape): hidden c = rms·√n, 1/√r; stem √n/√(n/20) = √20, 1; readout n, 1/r."""
    for make in (chain, transposed_chain):
        found = multipliers(make(512), make(64), width_rule="muon", consistent_rms=0.2)
        assert [found[name] for name in "abc"] == pytest.approx([1, 8**-0.5, 1 / 8])


# Tables


def tied(width, vocabulary, framework):
    ids = jax.random.randint(jax.random.key(2), (2, 6), 0, vocabulary)
    if framework == "linen":

        class Net(nn.Module):
            @nn.compact
            def __call__(self, ids):
                table = nn.Embed(vocabulary, width, name="table")
                x = table(ids)
                x = x + nn.Dense(width, use_bias=False, name="mix")(nn.LayerNorm()(x))
                return table.attend(nn.LayerNorm()(x))

        return linen_model(Net(), ids)

    def apply(p, ids):
        x = p["embedding"][ids]
        x = x + RELU(x @ p["mix"])
        return jnp.einsum("bsd,vd->bsv", x, p["embedding"])

    shapes = specs(embedding=(vocabulary, width), mix=(width, width))
    return Model(apply, shapes, (ids,))


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_tied_table_is_a_matrix_of_muon(framework):
    """As the readout, width 16 to 128, more rows than columns: size 1, wanted √(V/n): 1/√8.

    The lookup alone would allow more; the strictest use counts.
    """
    name = "embedding"
    wide, base = tied(128, 300, framework), tied(16, 300, framework)
    found = value(multipliers(wide, base, width_rule="muon"), name)
    assert found == pytest.approx(8**-0.5, rel=1e-3)


def test_a_readout_of_its_own_beside_a_table():
    """[n, V], n < V: size √(V/n) is what is wanted: 1."""

    def make(width):
        def apply(p, ids):
            return RELU(p["table"][ids] @ p["mix"]) @ p["out"]

        shapes = specs(table=(300, width), mix=(width, width), out=(width, 300))
        return Model(apply, shapes, (spec(2, 6, dtype=jnp.int32),))

    found = multipliers(make(128), make(16), width_rule="muon")
    assert found["out"] == pytest.approx(1)
    assert found["mix"] == pytest.approx(1)


def test_positions_keep_their_rate():
    """[T, n], T < n: rows of norm √(n/T), entries of 1/√T at every width: 1."""

    def make(width):
        def apply(p, x):
            h = x @ p["stem"] + p["positions"]
            return RELU(h @ p["mix"]).mean(1) @ p["out"]

        shapes = specs(stem=(8, width), positions=(6, width), mix=(width, width), out=(width, 3))
        return Model(apply, shapes, (normal(2, 6, 8),))

    entries = [float(np.sqrt(np.mean(update_of((6, width)) ** 2))) for width in (16, 128)]
    assert entries[0] == pytest.approx(entries[1], rel=0.4)  # 2.83 by a factor of the width
    assert multipliers(make(128), make(16), width_rule="muon")["positions"] == pytest.approx(1)


# Biases of two axes


def linen_heads(width):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(width, use_bias=False)(x)
            x = x + nn.MultiHeadDotProductAttention(width // 16, name="mha")(nn.LayerNorm()(x))
            return nn.Dense(5, use_bias=False)(x.mean(1))

    return linen_model(Net(), normal(2, 6, 20))


def plain_heads(width):
    heads = width // 16

    def apply(p, x):
        h = x @ p["stem"]
        q = jnp.einsum("bd,dhk->bhk", h, p["kernel"]) + p["bias"]
        return jnp.einsum("bhk,hkd->bd", RELU(q), p["o"]) @ p["out"]

    shapes = specs(
        stem=(20, width),
        kernel=(width, heads, 16),
        bias=(heads, 16),
        o=(heads, 16, width),
        out=(width, 5),
    )
    return Model(apply, shapes, (normal(4, 20),))


def general_heads(width):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(width, use_bias=False)(x)
            h = RELU(nn.DenseGeneral((width // 16, 16), name="mha")(h))
            return nn.Dense(5, use_bias=False)(h.reshape(h.shape[0], -1))

    return linen_model(Net(), normal(4, 20))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (linen_heads, ("mha/query/bias", "mha/key/bias", "mha/value/bias")),
        (plain_heads, ("bias",)),
        (general_heads, ("mha/bias",)),
    ],
    ids=["attention", "plain", "DenseGeneral"],
)
def test_biases_of_heads_change_alike_at_every_width(make, names):
    """[4, 16] to [32, 16]: entries of optax's update are 1/√heads large: √8 keeps their change."""

    def entry(shape):
        return float(np.sqrt(np.mean(update_of(shape) ** 2)))

    assert entry((4, 16)) / entry((32, 16)) == pytest.approx(8**0.5, rel=0.2)
    found = multipliers(make(512), make(64), width_rule="muon")
    for name in names:
        assert value(found, name) == pytest.approx(8**0.5, rel=1e-3), name


def test_one_axis_and_three_axes_are_left_to_adam():
    """optax leaves them to Adam: vectors 1, kernels [n, heads, d] Adam's 1/r."""
    found = multipliers(linen_heads(128), linen_heads(32), width_rule="muon")
    assert value(found, "mha/out/bias") == pytest.approx(1)
    assert value(found, "mha/query/kernel") == pytest.approx(0.25)
    assert value(found, "mha/out/kernel") == pytest.approx(0.25)
    assert value(found, "LayerNorm_0/scale") == pytest.approx(1)


def test_stacked_vectors_keep_their_rate():
    """Biases [L, n], L < n: entries of 1/√L at every width: 1; stacked matrices are Adam's: 1/r."""

    def make(width):
        def apply(p, x):
            def body(h, wb):
                return h + RELU(h) @ wb[0] + wb[1], None

            h = jax.lax.scan(body, x @ p["stem"], (p["w"], p["b"]))[0]
            return RELU(h) @ p["out"]

        shapes = specs(stem=(8, width), w=(4, width, width), b=(4, width), out=(width, 3))
        return Model(apply, shapes, (normal(2, 8),))

    found = multipliers(make(128), make(32), width_rule="muon")
    np.testing.assert_allclose(found["b"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["w"], 0.25, rtol=1e-6)
