"""The features of traced functions against those that the same functions write down themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import archscale_jax as archscale
from experiments.lab.models import DagCNN, DagMLP

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def assert_close(found, expected, rtol=1e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


@pytest.fixture(scope="module")
def stack():
    generator = np.random.default_rng(0)
    params = {
        "stem": generator.normal(size=(8, 16)),
        "stack": generator.normal(size=(4, 16, 16)) / 4,
        "biases": np.arange(64.0).reshape(4, 16) / 64,
        "readout": generator.normal(size=(16, 3)),
    }
    x = generator.normal(size=(5, 8))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x))


def scanned(params, x, reverse=False):
    def layer(z, weights):
        kernel, bias = weights
        return z + (RELU(z) @ kernel + bias), jnp.mean(z)

    z, _ = jax.lax.scan(
        layer, x @ params["stem"], (params["stack"], params["biases"]), reverse=reverse
    )
    return z @ params["readout"]


@pytest.mark.parametrize(("text", "kernel_size"), [("2_12_022_1202", 3), ("2_02_002", None)])
def test_a_network_of_a_graph_has_the_features_it_names(text, kernel_size):
    graph = archscale.dag_graph(text, kernel_size=kernel_size)
    make, inputs = (DagCNN, (4, 6, 6, 2)) if kernel_size else (DagMLP, (4, 6))
    model = make(graph, inputs[-1], 5, 3, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), inputs)

    def apply(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    found = jax.jit(lambda params, x: archscale.vertex_features(apply, params, x))(params, x)
    assert_close(found.values(), model.features(x))
    assert list(found) == list(range(int(graph.n_node[0])))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_gives_the_features_of_every_step(stack, reverse):
    params, x = stack
    found = archscale.vertex_features(lambda p, x: scanned(p, x, reverse), params, x)
    expected = [x @ params["stem"]]
    for index in range(4)[::-1] if reverse else range(4):
        z = expected[-1]
        expected.append(z + RELU(z) @ params["stack"][index] + params["biases"][index])
    assert_close(found.values(), expected)


def test_the_branch_that_runs_gives_the_features(stack):
    params, x = stack

    def apply(params, x):
        z = x @ params["stem"]
        branches = [lambda z, k=k: RELU(z) @ params["stack"][k] for k in range(3)]
        return RELU(jax.lax.switch(jnp.argmax(x[0]) % 3, branches, z)) @ params["readout"]

    for shift in range(3):
        moved = jnp.roll(x, shift, axis=1)
        found = archscale.vertex_features(apply, params, moved)
        index = int(jnp.argmax(moved[0])) % 3
        expected = RELU(moved @ params["stem"]) @ params["stack"][index]
        np.testing.assert_allclose(found[max(found)], expected, rtol=1e-5, atol=1e-5)


def test_gates_attention_and_calls_give_what_they_compute(stack):
    params, x = stack

    def apply(params, x):
        z = jax.jit(lambda x: x @ params["stem"])(x)
        gate = jax.checkpoint(lambda z: z @ params["stack"][0])(z)
        value = z @ params["stack"][1]
        return (value * jax.nn.sigmoid(gate)) @ params["readout"]

    z = x @ params["stem"]
    gate, value = z @ params["stack"][0], z @ params["stack"][1]
    found = archscale.vertex_features(apply, params, x)
    assert_close(found.values(), [z, gate, value, value * jax.nn.sigmoid(gate)], rtol=1e-5)


def test_slices_and_scaled_features_are_not_the_features_of_their_vertex():
    """A fused projection that is split, the part that a constant scales used last."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "stem": jax.random.normal(keys[0], (8, 4)),
        "fused": jax.random.normal(keys[1], (4, 8)),
        "out": jax.random.normal(keys[2], (4, 3)),
    }
    x = jax.random.normal(jax.random.key(1), (5, 8))

    def apply(params, x):
        gate, value = jnp.split(x @ params["stem"] @ params["fused"], 2, axis=-1)
        return (jax.nn.sigmoid(gate) * (value / 3)) @ params["out"]

    stem = x @ params["stem"]
    found = archscale.vertex_features(apply, params, x)
    assert_close(found.values(), [stem, stem @ params["fused"]], rtol=1e-5)


def test_custom_derivatives_are_kept():
    """At a tie the derivative of `jax.nn.relu` is 0, that of the maximum in it is one half."""
    params = {"stem": jnp.zeros((2, 2)), "hidden": jnp.eye(2), "out": jnp.eye(2)}

    def apply(params, x):
        return RELU(RELU(x @ params["stem"]) @ params["hidden"]) @ params["out"]

    def last(params):
        features = archscale.vertex_features(apply, params, jnp.ones((1, 2)))
        return features[max(features)]

    tangents = jax.tree.map(jnp.ones_like, params)
    _, change = jax.jvp(last, (params,), (tangents,))
    np.testing.assert_array_equal(change, 0.0)


def test_the_measured_change_is_that_of_a_small_step():
    """Finite differences in float64, on a transformer block that nobody wrote for this."""
    with jax.enable_x64(True):
        model = linen.Sequential([
            linen.Dense(6), linen.LayerNorm(), linen.MultiHeadDotProductAttention(2), linen.gelu,
            linen.Dense(3),
        ])  # fmt: skip
        generator = np.random.default_rng(0)
        x = generator.normal(size=(4, 5, 6))
        shapes = jax.eval_shape(model.init, jax.random.key(1), x)
        params = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape) / 3, shapes)

        def features(params, x):
            return archscale.vertex_features(model.apply, params, x)

        def loss(params, x):
            return jnp.mean(jnp.square(jnp.asarray(model.apply(params, x))))

        @jax.jit
        def measure(params):
            return archscale.measure_update(features, loss, params, x, optax.sgd(1.0))

        rate = 1e-6

        @jax.jit
        def before_and_after(params):
            gradients = jax.grad(loss)(params, x)
            moved = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
            return features(params, x), features(moved, x)

        measured, (before, after) = measure(params), before_and_after(params)
        expected = [np.mean(np.square((after[v] - before[v]) / rate)) for v in sorted(before)]
        np.testing.assert_allclose(measured.absolute, expected, rtol=1e-4)


def test_works_under_vmap_and_grad(stack):
    params, x = stack

    def size(params):
        features = archscale.vertex_features(scanned, params, x)
        return jnp.sum(jnp.array([jnp.mean(feature**2) for feature in features.values()]))

    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    sizes = jax.jit(jax.vmap(size))(many)
    assert sizes[0] == pytest.approx(float(size(params)), rel=1e-5)
    gradients = jax.jit(jax.grad(size))(params)
    assert np.all(np.isfinite(gradients["stack"])) and np.any(gradients["stack"])
    assert not np.any(gradients["readout"])  # the readout is not a vertex
