"""Trials over the devices of one process: the same numbers as one after the other on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import archscale_jax as archscale
from experiments.lab import training
from experiments.lab.files import read_records
from experiments.lab.models import create_network
from experiments.lab.sweeps import run_study
from experiments.lab.sweeps.devices import DeviceExecutor, over_devices
from tests.devices import on_devices

pytestmark = pytest.mark.quick_compilation

TRIALS = 11  # of 8 devices
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(size=(64, 4, 4, 1)).astype(np.float32)
LABELS = GENERATOR.integers(0, 3, 64)


def trainer():
    """From a trial, its rate and seed, to the losses of an epoch and the weights at its end."""
    model = create_network(archscale.dag_graph("2_02"), (4, 4, 1), 8, 3, rngs=nnx.Rngs(0))
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    architecture = model.architecture()
    optimizer = optax.inject_hyperparams(lambda rate: optax.sgd(rate, momentum=0.9))(rate=1.0)

    def train(trial, images, labels):
        key = jax.random.key(trial["seed"])
        drawn = archscale.initialize(key, params, architecture)
        state = training.create_train_state(drawn, model_state, optimizer, key)
        started = optax.tree.set(state.optimizer_state, rate=trial["rate"])
        state, losses = training.train_epoch(
            state._replace(optimizer_state=started), images, labels,
            graphdef=graphdef, optimizer=optimizer, batch_size=16,
        )  # fmt: skip
        return {"losses": losses, "params": state.params}

    return train


def spread_and_alone(batch_size):
    assert len(jax.devices()) == 8
    trials = {
        "rate": jnp.geomspace(0.01, 1.0, TRIALS, dtype=jnp.float32),
        "seed": jnp.arange(TRIALS) % 3,
    }
    mesh = jax.make_mesh((8,), ("trials",))
    spread = over_devices(trainer(), mesh, "trials", batch_size=batch_size)
    found = spread(trials, IMAGES, LABELS)
    alone = jax.jit(trainer())
    expected = [
        alone(jax.tree.map(lambda leaf, i=i: leaf[i], trials), IMAGES, LABELS)
        for i in range(TRIALS)
    ]
    program = spread.lower(trials, IMAGES, LABELS).compile().as_text()
    even = jax.tree.map(lambda leaf: leaf[:8], trials)
    sharding = spread(even, IMAGES, LABELS)["losses"].sharding
    return (
        jax.tree.map(np.asarray, jax.tree.leaves(found)),
        jax.tree.map(np.asarray, jax.tree.leaves(jax.tree.map(lambda *x: jnp.stack(x), *expected))),
        program,
        len(sharding.device_set),
        sharding.is_fully_replicated,
    )


@pytest.mark.parametrize("batch_size", [None, 2])
def test_rates_and_seeds_over_a_mesh_train_as_one_by_one(batch_size):
    found, expected, program, devices, replicated = on_devices(spread_and_alone, batch_size)
    assert found[0].shape == (TRIALS, 4)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert len({tuple(row) for row in found[0]}) == TRIALS  # no trial is another's copy
    assert (devices, replicated) == (8, False)
    # In the loop over a device's trials nothing waits for another device.
    body = program[: program.index("ENTRY")]
    assert not any(word in body for word in ("all-reduce(", "all-gather(", "all-to-all("))


def study(folder):
    def run(trial):
        scale = jnp.float32(trial["index"])
        total = jnp.sum(jnp.ones((4, 4)) @ jnp.full((4, 4), scale))
        (device,) = total.devices()
        barrier.wait(60)  # so that every thread has one trial
        return {"total": float(total), "device": device.id}

    import threading

    barrier = threading.Barrier(8)
    with DeviceExecutor() as executor:
        trials = [{"index": index} for index in range(16)]
        run_study(trials, run, f"{folder}/results.jsonl", executor=executor, progress=False)
    return [record["result"] for record in read_records(f"{folder}/results.jsonl")]


def test_threads_have_devices_of_their_own(tmp_path):
    found = on_devices(study, str(tmp_path))
    assert [one["total"] for one in found] == [64.0 * index for index in range(16)]
    assert sorted(one["device"] for one in found) == sorted([*range(8)] * 2)


class TestRefuses:
    mesh = property(lambda self: jax.make_mesh((1,), ("trials",)))

    def test_an_axis_that_is_not_there(self):
        with pytest.raises(ValueError, match="mesh axis 'data'; accepted are trials"):
            over_devices(lambda trial: trial, self.mesh, "data")

    @pytest.mark.parametrize(
        "trials", [{"rate": np.ones(3), "seed": np.ones(2)}, {"rate": 1.0}, {}, np.ones((0, 2))]
    )
    def test_trials_of_no_one_number(self, trials):
        with pytest.raises(ValueError, match=r"arrays \[trials, ...\] of one number, found shapes"):
            over_devices(lambda trial: trial, self.mesh, "trials")(trials)
