"""What leaves are, however their use is spelled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale
from archscale_jax.tracing import TraceError, trace

N, D, T = 8, 32, 10
X = jax.ShapeDtypeStruct((2, T, N), jnp.float32)


def shapes(**sizes):
    sizes = {"stem": (N, D), "hidden": (D, D), "readout": (D, 5)} | sizes
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def network(between):
    def apply(p, x):
        h = between(p, x @ p["stem"])
        return (h + jax.nn.relu(h) @ p["hidden"]) @ p["readout"]

    return apply


def read(between, **sizes):
    """The parameters of a network with a function of the stem's features in it."""
    return {one.name: one for one in trace(network(between), shapes(**sizes), X).parameters}


def read_leaves(function, sizes):
    """Those of the sizes whose leaves a function of params takes."""
    taken = set()

    class Noted(dict):
        def __getitem__(self, name):
            taken.add(name)
            return super().__getitem__(name)

    jax.eval_shape(lambda p: function(Noted(p)), shapes(**sizes))
    return {name: size for name, size in sizes.items() if name in taken}


def layer_norm(h, axes: int | tuple[int, ...] = -1):
    return (h - h.mean(axes, keepdims=True)) / jnp.sqrt(h.var(axes, keepdims=True) + 1e-6)


def rows(p, h):
    return p["table"][jnp.arange(h.shape[1])]


# Tables of positions.

TABLES = {
    "plain": lambda p, h: h + rows(p, h),
    "behind gain and bias": lambda p, h: layer_norm(h) * p["gain"] + p["bias"] + rows(p, h),
    "the whole table": lambda p, h: layer_norm(h) * p["gain"] + p["table"][None],
    "before the bias": lambda p, h: layer_norm(h) * p["gain"] + rows(p, h) + p["bias"],
    "a slice": lambda p, h: layer_norm(h) * (1 + p["gain"]) + p["table"][: h.shape[1]],
    "by a product": lambda p, h: (
        h / jnp.sqrt((h**2).mean(-1, keepdims=True)) * p["gain"] + jnp.eye(T) @ p["table"]
    ),
    "behind an activation": lambda p, h: jax.nn.gelu(h * p["gain"]) + rows(p, h),
    "behind a gate": lambda p, h: h * jax.nn.sigmoid(h @ p["other"]) * p["gain"] + rows(p, h),
    "behind a normalized gate": lambda p, h: (
        layer_norm(h * (h @ p["other"])) * p["gain"] + rows(p, h)
    ),
}


@pytest.mark.parametrize("spelling", TABLES)
def test_a_table_of_positions_is_one_wherever_it_is_added(spelling):
    sizes = {"table": (T, D), "gain": (D,), "bias": (D,), "other": (D, D)}
    sizes = read_leaves(lambda p: TABLES[spelling](p, jnp.zeros((2, T, D))), sizes)
    found = {name: str(one.role) for name, one in read(TABLES[spelling], **sizes).items()}
    roles = {"table": "embedding", "gain": "scale", "bias": "bias", "other": "hidden"}
    assert {name: found[name] for name in sizes} == {name: roles[name] for name in sizes}


def attention(p, h, scores, fused=False):
    q, k, v = (
        jnp.split(h @ p["qkv"], 3, -1) if fused else [h @ one for one in jnp.split(p["qkv"], 3, -1)]
    )
    q, k, v = (one.reshape(*one.shape[:-1], 4, -1) for one in (q, k, v))
    weights = jax.nn.softmax(scores(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5))
    return h + jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(h.shape) @ p["o"]


NOT_TABLES = {
    "bias of a norm over positions": (
        lambda p, h: layer_norm(h, (1, 2)) * p["gain"] + p["table"], (T, D)),
    "scores of attention": (
        lambda p, h: attention(p, h, lambda scores: scores + p["table"]), (4, T, T)),
    "scores of one projection": (
        lambda p, h: attention(p, h, lambda scores: scores + p["table"], fused=True), (4, T, T)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", NOT_TABLES)
def test_what_starts_at_0_is_no_table(spelling):
    between, shape = NOT_TABLES[spelling]
    sizes = {"table": shape, "gain": (T, D), "qkv": (D, 3 * D), "o": (D, D)}
    sizes = read_leaves(lambda p: between(p, jnp.zeros((2, T, D))), sizes)
    assert read(between, **sizes)["table"].role == "bias"


# Leaves that scale a kernel.

KERNELS = {
    "per output": (lambda p: p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"], (D,)),
    "per input": (lambda p: p["g"][:, None] * p["v"] / jnp.linalg.norm(p["v"]), (D,)),
    "per input by einsum": (lambda p: jnp.einsum("i,io->io", p["g"], p["v"]), (D,)),
    "logarithm": (lambda p: jnp.exp(p["g"])[:, None] * p["v"], (D,)),
    "step of a state space": (
        lambda p: (jnp.exp(-jnp.exp(p["g"])) - 1)[:, None] / p["a"][:, None] * p["v"], (D,)),
    "mean of steps": (lambda p: (jnp.exp(p["a"] * jnp.exp(p["g"]).mean()) - 1) * p["v"], (7,)),
    "softplus": (lambda p: p["v"] * jax.nn.softplus(p["g"])[None, :], (D,)),
    "divided": (lambda p: p["v"] / (1 + jnp.exp(p["g"]))[:, None], (D,)),
    "of a kernel of low rank": (lambda p: p["g"][:, None] * (p["down"] @ p["up"]), (D,)),
    "complex": (lambda p: jnp.real((p["v"] + 1j * p["w"]) * jnp.exp(1j * p["g"])[:, None]), (D,)),
    "one number": (lambda p: p["v"] * jnp.tanh(p["g"]), ()),
}  # fmt: skip


@pytest.mark.parametrize("spelling", KERNELS)
def test_a_factor_of_a_kernel_is_a_scale(spelling):
    kernel, shape = KERNELS[spelling]
    sizes = {"v": (D, D), "w": (D, D), "a": (D,), "down": (D, 4), "up": (4, D), "g": shape}
    sizes = read_leaves(kernel, sizes)
    found = read(lambda p, h: h @ kernel(p), **sizes)
    assert found["g"].role == "scale"
    assert {found[name].role for name in sizes.keys() - {"g", "a"}} == {"hidden"}


def test_the_gain_of_a_kernel_of_positions_and_that_of_a_scale_are_kept():
    def apply(p, x):
        norm = jnp.linalg.norm(p["v"], axis=(1, 2), keepdims=True)
        kernel = p["v"] / norm * p["g"]
        h = x @ p["stem"]
        h = jax.lax.conv_general_dilated(
            h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip
        return jax.nn.relu(h) @ p["readout"]

    params = {"stem": (N, D), "v": (3, D, D), "g": (3, 1, 1), "readout": (D, 5)}
    params = {name: np.full(size, 0.5, "f4") for name, size in params.items()}
    params["g"] = params["g"] * np.arange(3, dtype="f4").reshape(3, 1, 1)
    found = {one.name: one for one in trace(apply, params, X).parameters}
    assert {name: str(one.role) for name, one in found.items()} == {
        "stem": "input", "v": "hidden", "g": "scale", "readout": "readout"}  # fmt: skip
    plan = archscale.parametrize((apply, params), X)
    drawn = plan.init(jax.random.key(0))
    np.testing.assert_array_equal(drawn["g"], params["g"])
    assert np.std(drawn["v"]) > 0


def test_factors_that_are_summed_over_are_kernels():
    def between(p, h):
        outer = p["a"][:, None] * p["b"][None, :]  # of rank 1: neither has the axes of a kernel
        return h @ (p["down"] @ p["up"]) + h @ jnp.concatenate([p["one"], p["many"]], 1) + h @ outer

    found = read(between, down=(D, 4), up=(4, D), one=(D, 1), many=(D, D - 1), a=(D,), b=(D,))
    assert {found[name].role for name in ("down", "up", "one", "many", "a")} == {"hidden"}


# Leaves without a gradient.


def stopped(p, h):
    return h + jax.lax.stop_gradient(p["table"])


CONSTANTS = {
    "a table": (stopped, (T, D)),
    "what is made of it": (lambda p, h: h + jax.lax.stop_gradient(jnp.sin(p["table"])), (T, D)),
    "in a checkpoint": (lambda p, h: jax.checkpoint(stopped)(p, h), (T, D)),
    "in a scan": (
        lambda p, h: jax.lax.scan(lambda c, _: (stopped(p, c), None), h, None, 2)[0], (T, D)),
    "a choice": (lambda p, h: jnp.where(p["table"] > 0, h, 2 * h), (D,)),
    "a factor of features": (lambda p, h: h * jax.lax.stop_gradient(p["table"]), (T, D)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", CONSTANTS)
def test_what_has_no_gradient_is_kept_and_does_not_decay(spelling):
    between, shape = CONSTANTS[spelling]
    params = {name: np.ones(one.shape, "f4") for name, one in shapes(table=shape).items()}
    params["table"] = np.arange(np.prod(shape), dtype="f4").reshape(shape) - 3
    apply = network(between)
    plan = archscale.parametrize((apply, params), X, optimizer="adamw")
    (table,) = (one for one in plan.architecture.parameters if one.name == "table")
    assert not table.trained
    assert all(one.trained for one in plan.architecture.parameters if one.name != "table")
    assert "no gradient" in str(plan) and "table" in str(plan)
    drawn = plan.init(jax.random.key(0))
    np.testing.assert_array_equal(drawn["table"], params["table"])
    assert plan.init_std["table"] is None
    tx = plan.optimizer(0.1, weight_decay=0.5)
    x = np.random.default_rng(1).normal(size=X.shape).astype("f4")

    @jax.jit
    def updated(params):
        gradients = jax.grad(lambda p: jnp.mean(apply(p, x) ** 2))(params)
        return optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])

    np.testing.assert_array_equal(updated(drawn)["table"], params["table"])


def test_constants_that_cannot_be_read_as_parameters():
    """As rotations that features scale before they are applied to features."""

    def between(p, h):
        def turned(table):
            keys = h[:, :, :, None] * table
            return jnp.einsum("bnd,bndm->bnm", h, keys)

        return h + turned(jax.lax.stop_gradient(p["table"])) @ p["up"]

    found = read(between, table=(D, 4), up=(4, D))
    assert (found["table"].role, found["table"].trained) == ("bias", False)
    with pytest.raises(TraceError, match="'table'.*features scale it"):
        read(lambda p, h: h + jnp.einsum("bnd,bndm->bnm", h, h[:, :, :, None] * p["table"])
             @ p["up"], table=(D, 4), up=(4, D))  # fmt: skip


def test_idle_vectors_are_kept_and_idle_matrices_raise():
    found = read(lambda p, h: h, token=(1, 1, D))["token"]
    assert not found.trained
    with pytest.raises(TraceError, match="parameter 'matrix' does nothing to the result"):
        read(lambda p, h: h, matrix=(D, D))

    def dead(p, h):
        _ = jnp.einsum("bnd,bndm->bnm", h, h[:, :, :, None] * p["token"])
        return h  # what cannot be read and leads nowhere is not read

    assert not read(dead, token=(D, 1))["token"].trained


def scanned(p, h):
    def body(carry, x):
        a, b = carry
        return (a + x * p["one"], jnp.floor(b) + p["two"]), b

    (a, b), stacked = jax.lax.scan(body, (h[:, 0], h[:, 0]), h.swapaxes(0, 1))
    return h + a[:, None] + 0 * jnp.floor(b)[:, None] + stacked.swapaxes(0, 1) * p["three"]


def branched(p, h):
    return jax.lax.cond(
        h.sum() > 0, lambda h: h * p["one"], lambda h: h + jnp.round(p["two"]), h
    ) + jax.lax.stop_gradient(p["three"])


@jax.custom_jvp
def twice(x):
    return 2 * x


twice.defjvp(lambda x, dx: (2 * x[0], 2 * dx[0]))


def signs(p, h):
    return twice(h * p["one"]) + jnp.sign(p["two"]) + p["three"].astype(int)


@pytest.mark.parametrize("between", [scanned, branched, signs])
def test_a_leaf_is_trained_if_autodiff_gives_it_a_gradient(between):
    params = shapes(one=(D,), two=(D,), three=(D,))
    found = {one.name: one.trained for one in trace(network(between), params, X).parameters}
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=one.shape).astype("f4") for name, one in params.items()}
    arrays["stem"] = np.abs(arrays["stem"])  # features are positive, which `branched` asks
    x = np.abs(generator.normal(size=X.shape)).astype("f4")

    def loss(p):
        return jnp.sum(network(between)(p, x) ** 2)

    gradients = jax.jit(jax.grad(loss))(arrays)
    assert found == {name: bool(np.any(one)) for name, one in gradients.items()}


# Attention.


def softmax(scores):
    return jax.nn.softmax(scores, -1)


ATTENTION = {
    "softmax": (softmax, True),
    "softmax of capped scores": (lambda one: softmax(jnp.tanh(one / 30) * 30), True),
    "sigmoid": (lambda one: jax.nn.sigmoid(one - 2), True),
    "masked": (lambda one: softmax(jnp.where(jnp.tri(T, dtype=bool), one, -1e9)), True),
    "linear": (lambda one: one / T, False),
    "retention": (lambda one: one * 0.9 ** jnp.arange(T), False),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spelling", ATTENTION)
def test_attention_is_a_function_of_scores_that_is_not_linear(spelling, fused):
    function, is_attention = ATTENTION[spelling]

    def apply(p, x):
        h = x @ p["stem"]
        q, k, v = (
            jnp.split(h @ p["qkv"], 3, -1)
            if fused
            else [h @ one for one in (p["q"], p["k"], p["v"])]
        )
        q, k, v = (one.reshape(*one.shape[:-1], 4, -1) for one in (q, k, v))
        weights = function(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5)
        o = jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(h.shape) * jax.nn.silu(h)
        return (h + layer_norm(o) @ p["hidden"]) @ p["readout"]

    sizes = {"qkv": (D, 3 * D)} if fused else dict.fromkeys("qkv", (D, D))
    found = trace(apply, shapes(**sizes), X).attention
    assert {one.size for one in found.values()} == ({8} if is_attention else set())


def test_the_state_of_a_scan_is_no_head():
    def apply(p, x):
        u = x @ p["stem"]
        b, c, step = u @ p["b"], u @ p["c"], jax.nn.softplus(u @ p["step"])
        decay = jnp.exp(step[..., None] * -jnp.exp(p["log"]))

        def body(state, now):
            decay, b, c, u, step = now
            state = decay * state + (step * u)[..., None] * b[:, None]
            return state, jnp.einsum("bdn,bn->bd", state, c)

        zeros = jnp.zeros((x.shape[0], D, 4))
        parts = [one.swapaxes(0, 1) for one in (decay, b, c, u, step)]
        y = jax.lax.scan(body, zeros, parts)[1].swapaxes(0, 1)
        return (u + layer_norm(y * jax.nn.silu(u)) @ p["hidden"]) @ p["readout"]

    params = shapes(b=(D, 4), c=(D, 4), step=(D, D), log=(D, 4))
    traced = trace(apply, params, X)
    assert not traced.attention
    assert {one.name: str(one.role) for one in traced.parameters}["log"] == "scale"


def folded_norm(p):
    table = p["table"]
    factor = p["gain"] / jnp.sqrt(table.var(-1, keepdims=True) + 1e-6)
    return table * factor + (p["bias"] - table.mean(-1, keepdims=True) * factor)


@pytest.mark.parametrize(
    "norm", [lambda p: layer_norm(p["table"]) * p["gain"] + p["bias"], folded_norm]
)
def test_a_norm_of_a_table_that_layers_read(norm):
    """As the relative positions of DeBERTa, and latents behind a norm."""

    def between(p, h):
        keys = norm(p) @ p["k"]
        weights = jax.nn.softmax(jnp.einsum("bnd,md->bnm", h @ p["q"], keys) / D**0.5)
        return h + weights @ (h @ p["v"])[:, :4]

    found = read(between, table=(4, D), gain=(D,), bias=(D,), k=(D, D), q=(D, D), v=(D, D))
    assert {name: str(found[name].role) for name in ("table", "gain", "bias", "k")} == {
        "table": "embedding", "gain": "scale", "bias": "bias", "k": "hidden"}  # fmt: skip
