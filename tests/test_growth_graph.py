"""Edges and vertices that grow, against dense least squares and automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import archscale_jax as archscale
from archscale_jax._architecture import named_leaves
from experiments.lab.connections import Vertex, connections
from experiments.lab.graph_growth import grow_graph
from experiments.lab.models import create_network

pytestmark = pytest.mark.quick_compilation


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def make_loss(graphdef):
    def loss(params, batch):
        logits = nnx.merge(graphdef, params)(batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    return loss


def network(text, kernel_size=None, **options):
    return create_network(
        archscale.dag_graph(text, kernel_size=kernel_size), (4, 4, 1), 4, 3,
        param_dtype=jnp.float64, rngs=nnx.Rngs(0), **{"activation": "gelu", **options},
    )  # fmt: skip


def batch_of(count=60, seed=1):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(count, 4, 4, 1))), jnp.arange(count) % 3


def test_gains_equal_dense_least_squares():
    model, batch = network("2_02_002"), batch_of()
    graphdef, params = nnx.split(model)
    vertex = Vertex(("layers/2_3/kernel",), ("layers/0_1/kernel", "layers/1_2/kernel"))
    found = connections(make_loss(graphdef), params, [batch], [vertex], cutoff=1e-13)[0]

    features = model.features(batch[0])
    leaves = named_leaves(params)

    def loss_of(last):
        logits = jax.nn.gelu(last) @ leaves["readout/kernel"] + leaves["readout/bias"]
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    wanted = -np.asarray(jax.jit(jax.grad(loss_of))(features[3]))
    rows = [np.hstack([jax.nn.gelu(one), np.ones((60, 1))]) for one in features[:3]]

    def bottleneck(*parts):
        stacked = np.hstack(parts)
        update, *_ = np.linalg.lstsq(stacked, wanted, rcond=1e-7)
        return np.sum((wanted - stacked @ update) ** 2) / 60, update

    base, _ = bottleneck(rows[2])
    for place, name in enumerate(vertex.candidates):
        both, update = bottleneck(rows[2], rows[place])
        np.testing.assert_allclose(found[name].gain, base - both, rtol=1e-6)
        np.testing.assert_allclose(found[name].relative, (base - both) / base, rtol=1e-6)
        # The bias is in both parts: only their sum is determined.
        np.testing.assert_allclose(found[name].update[:-1], update[5:-1], rtol=1e-5, atol=1e-9)
        # All neurons of a vertex on the way do what an edge does beyond the layers as they are.
        rest = wanted - rows[2] @ np.linalg.lstsq(rows[2], wanted, rcond=1e-7)[0]
        explained = np.linalg.lstsq(rows[place], rest, rcond=1e-7)[0]
        np.testing.assert_allclose(
            np.sum(found[name].neurons.singular_values ** 2),
            np.sum((rows[place] @ explained) ** 2) / 60,
            rtol=1e-6,
        )


@pytest.mark.parametrize(("kind", "kernel_size"), [("edge", 3), ("vertex", None)])
def test_graphs_grow_from_nothing(kind, kernel_size):
    model, batch = network("2_02_002", kernel_size), batch_of()
    options = {"kind": kind, "number": 3}
    growth = grow_graph(model, make_loss, [batch], batch, **options)
    assert growth.kind == kind and growth.losses[1] < growth.losses[0]
    assert set(growth.gains) == {(0, 2), (0, 3), (1, 3)}
    assert growth.sender is not None and growth.receiver is not None
    edge = growth.sender, growth.receiver
    edges, old = ({one[:2] for one in graph.edges} for graph in (growth.network, model))
    if kind == "edge":
        assert edges == old | {edge} and edge not in old
    else:
        assert growth.network.num_vertices == 5
        assert {edge, (growth.receiver, growth.receiver + 1)} <= edges
    graphdef, params = nnx.split(growth.network)
    loss = make_loss(graphdef)
    np.testing.assert_allclose(jax.jit(loss)(params, batch), growth.losses[1], rtol=1e-9)
    # An ordinary network.
    archscale.initialize(jax.random.key(0), params, growth.network.architecture())
    assert archscale.contrib.find_neuron_groups(loss, params, batch)


@pytest.mark.parametrize("kind", ["edge", "vertex"])
def test_small_growth_changes_little_and_for_the_better(kind):
    model, batch = network("2_02_002"), batch_of()
    inputs = batch[0]
    lowered = []
    for amplitude in (1e-3, 2e-3):
        growth = grow_graph(model, make_loss, [batch], batch, kind=kind, amplitudes=(amplitude,))
        lowered.append(growth.losses[0] - growth.losses[1])
        assert np.max(np.abs(growth.network(inputs) - model(inputs))) < 1e-3
    assert lowered[0] > 0
    np.testing.assert_allclose(lowered[1] / lowered[0], 4, rtol=1e-2)  # of order γ²


def test_skips_are_tried():
    model, batch = network("2_02_002"), batch_of()
    growth = grow_graph(model, make_loss, [batch], batch, kind="skip")
    params = nnx.state(model)
    losses = {}
    for edge in [(0, 2), (0, 3), (1, 3)]:
        text = {(0, 2): "2_12_002", (0, 3): "2_02_102", (1, 3): "2_02_012"}[edge]
        other = network(text)
        nnx.update(other, params)
        losses[edge] = float(make_loss(nnx.split(other)[0])(params, batch))
    best = min(losses, key=lambda edge: losses[edge])
    if losses[best] < growth.losses[0]:
        assert (growth.sender, growth.receiver) == best
        np.testing.assert_allclose(growth.losses[1], losses[best], rtol=1e-12)
    else:
        assert growth.kind is None and growth.network is model


def test_errors():
    model, batch = network("2_02"), batch_of()

    def raises(match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            grow_graph(*arguments, **options)

    raises("kind 'loop'; accepted", model, make_loss, [batch], batch, kind="loop")
    raises("number must be", model, make_loss, [batch], batch, number=0)
    raises("needs a batch", model, make_loss, [], batch)
    raises("without normalization", network("2_02", normalization="layer"), make_loss,
            [batch], batch)  # fmt: skip
    raises("sum pre-activations", network("2_02", arrangement="activation"), make_loss,
            [batch], batch)  # fmt: skip
    full = grow_graph(network("2_22"), make_loss, [batch], batch)
    assert full.kind is None and full.gains == {}
    with pytest.raises(ValueError, match="layer 'w'; accepted"):
        graphdef, params = nnx.split(model)
        connections(make_loss(graphdef), params, [batch], [Vertex(("w",), ())])
