"""Trials on the devices of one process: each thread computes on its own."""

import threading

import jax.numpy as jnp

from experiments.lab.files import read_records
from experiments.lab.sweeps import run_study
from experiments.lab.sweeps.devices import DeviceExecutor
from tests.devices import on_devices


def study(folder):
    def run(trial):
        scale = jnp.float32(trial["index"])
        total = jnp.sum(jnp.ones((4, 4)) @ jnp.full((4, 4), scale))
        (device,) = total.devices()
        barrier.wait(60)  # so that every thread has one trial
        return {"total": float(total), "device": device.id}

    barrier = threading.Barrier(8)
    with DeviceExecutor() as executor:
        trials = [{"index": index} for index in range(16)]
        run_study(trials, run, f"{folder}/results.jsonl", executor=executor, progress=False)
    return [record["result"] for record in read_records(f"{folder}/results.jsonl")]


def test_threads_have_devices_of_their_own(tmp_path):
    found = on_devices(study, str(tmp_path))
    assert [one["total"] for one in found] == [64.0 * index for index in range(16)]
    assert sorted(one["device"] for one in found) == sorted([*range(8)] * 2)
