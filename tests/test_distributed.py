"""Two processes, joined by `jax.distributed`, train one model: the numbers of a single process."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import archscale_jax as archscale
from tests.devices import on_devices, on_hosts

pytestmark = pytest.mark.quick_compilation

WIDTHS = (16, 32, 32, 8)
SPECS = (("data", "model"), ("model", "data"), ("data", None))
KERNELS = [f"layer_{number}" for number in range(3)]


def network(params, x):
    for number, name in enumerate(KERNELS):
        x = (jax.nn.relu(x) if number else x) @ params[name]
    return x


def loss(params, batch):
    return ((network(params, batch[0]) - batch[1]) ** 2).mean()


def study():
    """What every process does, whether it is one of several or alone."""
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in SPECS]
    params = {
        name: jax.ShapeDtypeStruct(shape, "float64", sharding=place)
        for name, shape, place in zip(KERNELS, itertools.pairwise(WIDTHS), places, strict=True)
    }
    rng = np.random.default_rng(0)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def placed(array):  # every process gives its own rows
        return jax.make_array_from_callback(array.shape, rows, lambda index: array[index])

    batch = tuple(placed(rng.normal(size=(8, size))) for size in (16, 8))
    architecture = archscale.trace(network, params, batch[0])
    multipliers = archscale.learning_rate_multipliers(architecture, archscale.dag_graph("2"))
    eager = archscale.initialize(jax.random.key(0), params, architecture)
    born = jax.jit(lambda key: archscale.initialize(key, params, architecture))(jax.random.key(0))
    for leaf, struct in zip(jax.tree.leaves((eager, born)), 2 * list(params.values()), strict=True):
        assert leaf.sharding.is_equivalent_to(struct.sharding, 2)

    size = jax.jit(
        functools.partial(
            archscale.measure_update,
            functools.partial(archscale.vertex_features, network_of_batch), loss,
            optimizer=optax.sgd(1.0),
        )
    )(params=born, batch=batch)  # fmt: skip
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        archscale.scale_by_architecture(architecture, archscale.dag_graph("2")),
    )

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    trained, state, losses = born, tx.init(born), []
    for _ in range(2):
        trained, state, value = step(trained, state, batch)
        losses.append(float(value))
    _, record = archscale.gradinit(loss, born, [batch] * 3)
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    start, other, end = jax.tree.map(np.asarray, everywhere((born, eager, trained)))
    jax.tree.map(np.testing.assert_array_equal, start, other)
    return multipliers, start, end, losses, jax.tree.map(np.asarray, size), record


def network_of_batch(params, batch):
    return network(params, batch[0])


def test_two_processes_agree_with_each_other_and_with_one():
    first, second = on_hosts(study, hosts=2, count=4)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    alone = on_devices(study, count=8)
    multipliers, start, *rest = alone
    assert first[0] == multipliers
    jax.tree.map(np.testing.assert_array_equal, first[1], start)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), list(first[2:]), rest
    )
    losses = alone[3]
    assert losses[-1] < losses[0]


def fail_in_one():
    if jax.process_index():
        raise ValueError("this one fails")
    multihost_utils.sync_global_devices("waits for the other")


def test_a_process_that_fails_ends_the_others():
    with pytest.raises(AssertionError, match="this one fails"):
        on_hosts(fail_in_one, hosts=2, count=1)
