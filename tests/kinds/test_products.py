"""Moments behind products of features: gates, averages, extremes, in several spellings."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    Model,
    check_promised,
    deviation,
    haiku_model,
    linen_model,
    moments,
    normal,
    promised_and_measured,
    same_moments,
    spec,
    specs,
)

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu
WIDTH = 512
BOTH_RULES = pytest.mark.parametrize("rule", [None, "second_moment"])


def numerator(model, ending="b", rule=None, fan=WIDTH):
    """C of a layer: its variance times its fan-in."""
    return float(deviation(model, ending, rule)) ** 2 * fan


# Fused projections, gates, products


def gated(kind, act=jax.nn.silu, layers=3):
    """A stack of gated layers; the two projections apart or one matrix in several layouts."""

    def halves(h, w):
        if kind == "apart":
            return h @ w[0], h @ w[1]
        if kind == "split":
            return tuple(jnp.split(h @ w, 2, -1))
        if kind == "slices":
            both = h @ w
            return both[..., :WIDTH], both[..., WIDTH:]
        if kind == "reshape":
            both = (h @ w).reshape(*h.shape[:-1], 2, WIDTH)
            return both[..., 0, :], both[..., 1, :]
        gate, up = jnp.einsum("bd,cde->cbe", h, w)
        return gate, up

    def run(p, x):
        h = x @ p["stem"]
        streams = [h]
        for both, down in zip(p["both"], p["down"], strict=True):
            gate, up = halves(h, both)
            h = (act(gate) * up) @ down
            streams.append(h)
        return h @ p["out"], streams

    both = {"apart": [spec(WIDTH, WIDTH)] * 2, "einsum": spec(2, WIDTH, WIDTH)}.get(
        kind, spec(WIDTH, 2 * WIDTH)
    )
    shapes = specs(stem=(64, WIDTH), out=(WIDTH, 3)) | {
        "both": [both] * layers,
        "down": [spec(WIDTH, WIDTH)] * layers,
    }
    return Model(lambda p, x: run(p, x)[0], shapes, (normal(64, 64),)), run


@BOTH_RULES
@pytest.mark.parametrize("kind", ["split", "slices", "reshape", "einsum"])
def test_fused_gates_are_gates(kind, rule):
    """The same function of the same random weights: the same C of the layer behind the gate."""
    apart, fused = gated("apart")[0], gated(kind)[0]
    for name in ("down/0", "down/2"):
        assert numerator(fused, name, rule) == pytest.approx(numerator(apart, name, rule), rel=1e-5)


def gates_in_branches(kind, act, width=64):
    """h + σ(a) * b, twice; both layers apart or one matrix in several layouts."""

    def halves(h, w):
        if kind == "apart":
            return h @ w[0], h @ w[1]
        if kind == "einsum":
            return tuple(jnp.einsum("bd,cde->cbe", h, w))
        both = h @ w
        if kind == "slices":
            return both[..., :width], both[..., width:]
        if kind == "reshape":
            return jnp.unstack(both.reshape(-1, 2, width), axis=1)
        return jnp.split(both, 2, -1)

    def block(h, w):
        a, b = halves(jnp.tanh(h), w)
        return h + act(a) * b

    def apply(p, x):
        h = x @ p["stem"]
        if kind == "scan":
            return jax.lax.scan(lambda h, w: (block(h, w), None), h, p["both"])[0] @ p["out"]
        for both in p["both"]:
            h = block(h, both)
        return h @ p["out"]

    both = {
        "apart": [[spec(width, width)] * 2] * 2,
        "einsum": [spec(2, width, width)] * 2,
        "scan": spec(2, width, 2 * width),
    }.get(kind, [spec(width, 2 * width)] * 2)
    shapes = specs(stem=(16, width), out=(width, 3)) | {"both": both}
    return Model(apply, shapes, (normal(4, 16),))


GATES = [jax.nn.sigmoid, RELU, jax.nn.silu, lambda g: g]


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("kind", ["split", "slices", "einsum", "scan"])
def test_fused_gates_that_end_branches_are_drawn_as_two_layers(kind, act):
    """Only b of σ(a) * b brings the branch's share: of one matrix, its half that makes b."""
    apart = archscale.weight_standard_deviations(
        gates_in_branches("apart", act).trace(), "second_moment"
    )
    found = archscale.weight_standard_deviations(
        gates_in_branches(kind, act).trace(), "second_moment"
    )
    for block in range(2):
        one = np.asarray(found["both"])[block] if kind == "scan" else found[f"both/{block}"]
        halves = np.split(np.broadcast_to(one, (2, 1, 1) if kind == "einsum" else (1, 128)), 2,
                          axis=0 if kind == "einsum" else 1)  # fmt: skip
        for half, values in enumerate(halves):
            expected = apart[f"both/{block}/{half}"]
            np.testing.assert_allclose(values, expected, rtol=1e-9, err_msg=f"{block}, {half}")


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("kind", ["apart", "split", "scan", "reshape"])
def test_gates_that_end_branches_bring_their_share(kind, act):
    """Two blocks add 1/8 each; halves that a reshape hides are drawn alike, and bring it too."""
    architecture = gates_in_branches(kind, act).trace()
    promised = archscale.second_moments(architecture, "second_moment")
    assert promised[max(promised)] == pytest.approx(2 * 1.125**2, rel=2e-2)


def test_the_report_shows_what_differs_by_slice():
    """The smallest and the largest in print, one number for every half of a gate in records."""
    told = archscale.report(
        gates_in_branches("split", jax.nn.sigmoid).trace(), initialization="second_moment"
    )
    values = next(one for one in told.records if one["path"] == "both/0")["standard_deviation"]
    assert len(values) == 2 and values[0] != values[1]
    assert f"{min(values):.3g}…{max(values):.3g}" in str(told)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (jax.nn.silu, "apart"),
        (jax.nn.silu, "split"),
        (jax.nn.sigmoid, "apart"),
        (lambda g: g, "apart"),
    ],
)
def test_gates_keep_the_second_moment(act, kind):
    """A product of independent features has ρ = E[φ(z)²]·m: two gated layers keep m, measured.

    Products square what single examples fluctuate by: at width 512 a third layer has 1.35 to 1.76.
    """
    model, run = gated(kind, act, layers=2)
    found = moments(model, "second_moment", lambda p, x: run(p, x)[1], seeds=6)
    same_moments(found)


class Attention(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, use_bias=False)(x)
        h = nn.LayerNorm(use_scale=False, use_bias=False)(x)
        if self.kind == "apart":
            q, k, v = (nn.Dense(64, use_bias=False)(h) for _ in range(3))
        elif self.kind == "split":
            q, k, v = jnp.split(nn.Dense(192, use_bias=False)(h), 3, -1)
        else:
            q, k, v = jnp.unstack(nn.DenseGeneral((3, 64), use_bias=False)(h), axis=-2)
        y = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 8) @ v
        return nn.Dense(5)(x + nn.Dense(64, use_bias=False, name="out")(y))


@BOTH_RULES
@pytest.mark.parametrize("kind", ["split", "unstack"])
def test_fused_attention_is_attention(kind, rule):
    """Query, key and value as one matrix: the layer behind has the variance that it has apart."""
    x = normal(2, 4, 20)
    expected = deviation(linen_model(Attention("apart"), x), "out/kernel", rule)
    found = deviation(linen_model(Attention(kind), x), "out/kernel", rule)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fused_attention_of_haiku():
    """The same of Haiku, with heads: hk.Linear(3·n), reshape, index."""

    def network(fused):
        def apply(x):
            h = hk.Linear(32, with_bias=False)(x)
            if fused:
                all_three = hk.Linear(96, with_bias=False)(h).reshape(*h.shape[:2], 3, 4, 8)
                q, k, v = (all_three[:, :, i] for i in range(3))
            else:
                q, k, v = (
                    hk.Linear(32, with_bias=False)(h).reshape(*h.shape[:2], 4, 8) for _ in range(3)
                )
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5)
            y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape)
            return hk.Linear(3)(RELU(h + hk.Linear(32, name="mix")(y)))

        return haiku_model(apply, normal(2, 5, 12))

    for rule in (None, "second_moment"):
        np.testing.assert_allclose(
            deviation(network(True), "mix/w", rule),
            deviation(network(False), "mix/w", rule),
            rtol=1e-5,
        )


# Extremes


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("rule", ["second_moment", "target_in_degree"])
def test_maxout_is_the_largest_of_its_pieces(pieces, rule):
    """E[max²] of 2 and 4 normal pieces is 1 and 1.551 [order statistics]."""

    def apply(params, x):
        h = jnp.max((x @ params["stem"]).reshape(*x.shape[:-1], 256, pieces), axis=-1)
        return RELU(h @ params["inner"]) @ params["head"]

    shapes = specs(stem=(32, 256 * pieces), inner=(256, 256), head=(256, 3))
    check_promised(apply, shapes, (normal(64, 32),), rule)
    found = deviation(Model(apply, shapes, (normal(64, 32),)), "inner", rule) ** 2
    np.testing.assert_allclose(found * 256, 1 / {2: 1.0, 4: 1.5513}[pieces], rtol=1e-3)


def test_experts_chosen_by_size_are_promised_about_what_they_bring():
    """2 of 8 experts: what top_k chooses is noted, and no order of magnitude is wrong."""
    shapes = specs(stem=(32, 128), router=(128, 8), up=(8, 128, 128), down=(8, 128, 128))

    def apply(params, x):
        h = x @ params["stem"]
        weights, chosen = jax.lax.top_k(jax.nn.softmax(h @ params["router"]), 2)
        weights = weights / jnp.sum(weights, -1, keepdims=True)
        gates = jnp.einsum("bk,bke->be", weights, jax.nn.one_hot(chosen, 8))
        y = RELU(jnp.einsum("bd,edf->bef", h, params["up"]))
        y = jnp.einsum("be,bed->bd", gates, jnp.einsum("bef,efd->bed", y, params["down"]))
        return RELU(h + y) @ params["head"]

    model = Model(apply, shapes | specs(head=(128, 3)), (normal(64, 32),))
    architecture = model.trace()
    assert any("top_k" in note for note in architecture.notes)
    _, moments = promised_and_measured(apply, model.shapes, model.inputs, "target_in_degree")
    ratios = [promised / measured for promised, measured in moments.values()]
    assert 0.5 < min(ratios) <= max(ratios) < 2


def test_what_has_no_finite_moment_raises_with_a_way_on():
    def apply(params, x):
        return jnp.log(x @ params["stem"]) @ params["inner"] @ params["head"]

    architecture = archscale.trace(
        apply, specs(stem=(8, 16), inner=(16, 16), head=(16, 3)), spec(2, 8)
    )
    for rule in ("target_in_degree", "second_moment"):
        with pytest.raises(ValueError, match="'inner' reads has no finite second moment"):
            archscale.weight_standard_deviations(architecture, rule)
    assert archscale.weight_standard_deviations(architecture, "he_normal")["inner"] > 0
    with pytest.raises(ValueError, match="vertex 1 has no finite second moment"):
        archscale.second_moments(architecture, "he_normal")


# One function, its products and averages written in several ways


JOINS = {
    "h + h*z": lambda h, z, n: h + h * z,
    "h * (1+z)": lambda h, z, n: h * (1 + z),
    "h - h*z": lambda h, z, n: h - h * z,
    "h * (1-z)": lambda h, z, n: h * (1 - z),
    "h + z*(n-h)": lambda h, z, n: h + z * (n() - h),
    "(1-z)*h + z*n": lambda h, z, n: (1 - z) * h + z * n(),
    "n + (1-z)*(h-n)": lambda h, z, n: n() + (1 - z) * (h - n()),
}


@pytest.mark.parametrize("rule", ["target_in_degree", "second_moment"])
@pytest.mark.parametrize("join", JOINS)
def test_a_product_beside_what_it_holds_is_not_independent_of_it(join, rule):
    """z = σ(W h): E[h²(1 + z)²] is 4.64 for m = 2, not m + m·0.32."""

    def apply(p, x):
        h = x @ p["stem"]
        z = jax.nn.sigmoid(h @ p["z"])
        made = functools.cache(lambda: h @ p["n"])
        return RELU(JOINS[join](h, z, made) @ p["out"]) @ p["head"]

    shapes = specs(stem=(64, 512), z=(512, 512), out=(512, 512), head=(512, 3))
    if "n" in join:
        shapes |= specs(n=(512, 512))
    check_promised(apply, shapes, (normal(64, 64),), rule)


AVERAGES = {
    "sums": lambda k, v: (jnp.exp(k) * v).sum(1) / jnp.exp(k).sum(1),
    "shifted": lambda k, v: (
        (jnp.exp(k - k.max(1, keepdims=True)) * v).sum(1)
        / jnp.exp(k - k.max(1, keepdims=True)).sum(1)
    ),
    "softmax": lambda k, v: (jax.nn.softmax(k, 1) * v).sum(1),
    "einsum": lambda k, v: jnp.einsum("btd,btd->bd", jax.nn.softmax(k, 1), v),
}


def weighted_average(average, gated):
    def apply(p, x):
        h = x @ p["stem"]
        y = AVERAGES[average](h @ p["k"], h @ p["v"])
        y = y * jax.nn.sigmoid(h[:, 0] @ p["g"]) if gated else y
        return RELU(y @ p["out"]) @ p["head"]

    shapes = specs(stem=(8, 64), k=(64, 64), v=(64, 64), out=(64, 64), head=(64, 3))
    return Model(apply, shapes | (specs(g=(64, 64)) if gated else {}), (spec(4, 6, 8),))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("average", AVERAGES)
def test_a_weighted_average_keeps_the_moment_of_one_position(average, gated):
    """Weights that sum to one, as in attention-free transformers: 2 of values of moment 2.

    The layer behind carries the moment of what it reads, 2, or behind the gate 2 · E[σ(z)²].
    """
    found = deviation(weighted_average(average, gated), "out", "target_in_degree")
    expected = deviation(weighted_average("einsum", gated), "out", "target_in_degree")
    np.testing.assert_allclose(found, expected, rtol=0.02)
    architecture = weighted_average(average, gated).trace()
    assert max(archscale.second_moments(architecture, "target_in_degree").values()) < 200
    if gated:
        out = next(one for one in architecture.parameters if one.name == "out")
        read = archscale.second_moments(architecture, "target_in_degree")[
            int(architecture.graph.senders[out.edge])
        ]
        np.testing.assert_allclose(read, 2 * 0.3184, rtol=0.02)


@pytest.mark.parametrize("how", ["einsum", "vmap"])
def test_matrices_chosen_by_an_index_raise_with_a_way_on(how):
    """A matrix a task: as rows of a table they would be drawn with standard deviation 1."""

    def apply(p, x, task):
        h, chosen = RELU(x @ p["stem"]), p["tasks"][task]
        h = jnp.einsum("bi,bio->bo", h, chosen) if how == "einsum" else jax.vmap(jnp.dot)(h, chosen)
        return RELU(h) @ p["head"]

    def one_hot(p, x, task):
        h = RELU(x @ p["stem"])
        h = jnp.einsum("be,bi,eio->bo", jax.nn.one_hot(task, 4), h, p["tasks"])
        return RELU(h) @ p["head"]

    shapes = specs(stem=(8, 32), tasks=(4, 32, 32), head=(32, 3))
    inputs = spec(6, 8), spec(6, dtype=jnp.int32)
    with pytest.raises(archscale.TraceError, match=r"'tasks'.*be,bi,eio->bo"):
        archscale.trace(apply, shapes, *inputs)
    found = archscale.weight_standard_deviations(archscale.trace(one_hot, shapes, *inputs))
    np.testing.assert_allclose(found["tasks"], (2 / 32) ** 0.5)


@pytest.mark.parametrize("spelling", ["einsum", "multiply"])
def test_a_product_that_sums_nothing_scales_features(spelling):
    """Decays of a selective scan, an outer product over states: no layer, kept from the start."""

    def steps(p, h):
        decay = -jnp.exp(p["decay"])
        if spelling == "einsum":
            return jnp.einsum("td,ds->tds", h, decay)
        return h[..., None] * decay

    def apply(p, x):
        h = x @ p["stem"]
        moved = jnp.exp(steps(p, jax.nn.softplus(h @ p["step"])))
        states = jnp.cumsum(moved * h[..., None], axis=0)
        return (h + states.sum(-1) @ p["out"]) @ p["readout"]

    def plan(width, base=None):
        shapes = specs(stem=(8, width), step=(width, width), decay=(width, 4), out=(width, width),
                       readout=(width, 3))  # fmt: skip
        return archscale.parametrize(apply, spec(5, 8), params=shapes, base=base, optimizer="adam")

    base = plan(16)
    found = {one.name: one for one in base.architecture.parameters}
    assert str(found["decay"].role) == "scale"
    assert not found["decay"].start_known
    assert plan(64, base).learning_rate["decay"] == 1
    assert 1e-3 < float(np.max(base.init_std["out"])) < 1
