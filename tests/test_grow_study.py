"""The study of growing networks: a run that is cut goes on as if it had not been."""

import json

import jax
import numpy as np
import pytest

import archscale_jax as archscale
from experiments import grow_cost, grow_study
from experiments.lab import files

pytestmark = pytest.mark.quick_compilation

SCHEDULE = {"order": "all", "growths": 2, "interval": 4, "factor": 2.0}
TRIAL = {
    "spec": "mlp", "network": "mlp", "arm": "tiny_width", "dataset": "digits", "downscale": 2,
    "start_width": 4, "large_width": 8, "steps": 12, "rate": 0.02, "seed": 0, "batch_size": 16,
    "statistics": 64, "held_out": 64, "normalize": True, "schedule": SCHEDULE,
}  # fmt: skip


def test_a_run_that_is_cut_goes_on(tmp_path, monkeypatch):
    whole = grow_study.run(TRIAL)
    save = grow_study._save

    def save_and_stop(folder, trial, now):
        save(folder, trial, now)
        raise KeyboardInterrupt

    monkeypatch.setattr(grow_study, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        grow_study.run(TRIAL, tmp_path)
    (tmp_path / "8" / "tree").mkdir(parents=True)  # cut while the next growth was being saved
    monkeypatch.setattr(grow_study, "_save", save)
    drawn = []
    monkeypatch.setattr(grow_study, "_batches", counting(drawn))
    again = grow_study.run(TRIAL, tmp_path)
    assert drawn == [4]  # not from the start
    assert json.dumps(again) == json.dumps(whole)
    assert len(again["edits"]) == 2


def counting(drawn):
    batches = grow_study._batches

    def counted(dataset, trial, first):
        drawn.append(first)
        return batches(dataset, trial, first)

    return counted


def test_trials_of_scratch_cost_what_growing_did():
    specs = grow_study.chosen_specs(["mlp"], ["tiny", "scratch"], dict.fromkeys(
        ("images_downscale", "start_width", "large_width", "steps", "growths", "interval", "rate")
    ))  # fmt: skip
    settings = {"num_seeds": 2, "dataset": "digits", "batch_size": 16, "normalize": True}
    trials = grow_study.all_trials(specs, ["tiny", "scratch"], settings)
    assert {trial["arm"] for trial in trials} == {"tiny"}
    assert len(trials) == 2 * len(grow_study.SPECS["mlp"]["rates"])
    result = grow_study.run(TRIAL | {"arm": "tiny"})
    record = {"trial": TRIAL | {"arm": "tiny"}, "result": result}
    failed = {"trial": TRIAL | {"arm": "tiny", "seed": 1}, "error": "ValueError: dead"}
    (scratch,) = grow_study.scratch_trials([record, failed])
    assert scratch["neurons"] == result["neurons"]
    found = grow_study.run(scratch)
    assert found["neurons"] == result["neurons"] and found["parameters"] == result["parameters"]
    assert abs(found["flops"] - result["flops"]) <= result["last_step_flops"] / 2
    with pytest.raises(ValueError, match="network 'vgg'; accepted are"):
        grow_study.chosen_specs(["vgg"], ["tiny"], {})


def test_operations_are_those_of_the_compiled_program():
    network, _ = grow_study.build("mlp", "digits", None, 2)
    params = grow_study.create("mlp", network, 8, 0)
    batch = network.dataset.train_images[:32], network.dataset.train_labels[:32]
    counted = 32 * grow_cost.forward_flops(
        network.loss, params, jax.tree.map(lambda one: one[:1], batch)
    )
    compiled = jax.jit(network.loss).lower(params, batch).compile().cost_analysis()
    assert compiled is not None
    assert counted < compiled["flops"] < 1.5 * counted


def test_networks_take_any_width():
    _, groups = grow_study.build("resnet18", "digits", None, 2)
    assert len(groups) == 12  # a stream and two or one inner layers of every stage
    network, groups = grow_study.build("dag_cnn", "digits", None, 2)
    params = grow_study.create("dag_cnn", network, 1, 0)
    wide, _ = archscale.contrib.widen(params, {groups[0].name: 3}, groups)
    images = network.dataset.test_images[:4], network.dataset.test_labels[:4]
    np.testing.assert_allclose(network.loss(params, images), network.loss(wide, images), rtol=1e-5)
    large = grow_study.create("dag_cnn", network, 2, 0)
    assert set(archscale.contrib.count_neurons(large, groups).values()) == {2}


def test_the_binary(run_again, tmp_path):
    flags = [
        "--network=mlp", "--arm=tiny,large,scratch", "--dataset=digits", "--images_downscale=2",
        "--start_width=4", "--large_width=8", "--steps=4", "--growths=1", "--interval=2",
        "--num_seeds=1", "--rate=0.02", "--batch_size=16",
    ]  # fmt: skip
    done = run_again("grow", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "TINY" in done.stdout
    report = (tmp_path / "report.html").read_text()
    assert 0 < report.count("<svg") == done.stdout.count("figure:")
    records = files.read_records(tmp_path / "results.jsonl")
    assert [record["trial"]["arm"] for record in records] == ["tiny", "large", "scratch"]
    assert all("result" in record for record in records)
    assert not list((tmp_path / "checkpoints").glob("*"))
