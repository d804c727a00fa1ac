"""The benchmark against gromo, but for the package: what is counted, drawn and compared."""

from typing import Any

import jax
import numpy as np
import pytest

from archscale_jax.contrib._growth.extension import AMPLITUDES
from benchmarks.grow_gromo import cases, ours, report
from experiments import grow_cost, grow_study

CASE = {
    "dataset": "digits", "data_dir": None, "start_width": 4, "steps": 11, "batch_size": 16,
    "growths": 2, "interval": 4, "statistics": 128, "held_out": 100, "rate": 0.02,
}  # fmt: skip


@pytest.mark.quick_compilation
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_operations_of_a_growth_are_those_of_the_study(layer):
    network, groups = grow_study.build("mlp", "digits", None, 1)
    params = grow_study.create("mlp", network, 5, 0)
    batch = network.dataset.train_images[:64], network.dataset.train_labels[:64]
    (group,) = [one for one in groups if one.producers == (f"{ours.LAYERS[layer]}/kernel",)]
    counted = grow_cost.growth_flops(network.loss, params, batch, [group], len(AMPLITUDES), 100)
    case = CASE | cases.ARMS["ours, as used"] | {"statistics": 64}
    widths = [64, 5, 5, 5, 5, 10]
    example = jax.tree.map(lambda one: one[:1], batch)
    forward = grow_cost.forward_flops(network.loss, params, example)
    assert cases.forward_flops(widths) == forward
    assert cases.growth_flops(widths, layer, case) == pytest.approx(counted, rel=1e-12)
    assert report.parameters(widths) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_operations_of_gromo_are_one_pass_and_its_products():
    case = CASE | cases.ARMS["gromo, as used"] | {"statistics": 1000, "held_out": 0}
    widths = [7, 3, 5, 2]
    # Layer 1 is made of 3 features and a 1, read with 5 and a 1, and asked for 2 outputs.
    products = 4 * 4 + 4 * 2 + 6 * 6 + 6 * 2 + 4 * 6 + 2 * 2
    per_example = 3 * 2 * (7 * 3 + 3 * 5 + 5 * 2) + 2 * products
    few = cases.growth_flops(widths, 1, case | {"statistics": 0})
    assert cases.growth_flops(widths, 1, case) - few == 1000 * per_example
    decompositions = 9 * 4**3 + 4 * 4**2 * 2 + 22 * 2**3 + 2 * 6**3 / 3 + 2 * 6**2 * 2 + 4 * 4**3
    assert few == pytest.approx(decompositions)


def test_batches_hold_every_example_once_an_epoch_and_never_held_out_ones():
    drawn = cases.draw_indices(3, 250, CASE)  # 150 examples, 9 batches an epoch
    assert drawn["batches"].shape == (11, 16) and drawn["growths"].shape == (2, 128)
    assert len(np.unique(drawn["batches"][:9])) == 9 * 16
    for chosen in drawn.values():
        assert chosen.min() >= 0 and chosen.max() < 150
    assert all(len(np.unique(chosen)) == 128 for chosen in drawn["growths"])
    assert np.any(drawn["growths"][0] != drawn["growths"][1])


def test_a_training_of_ours_grows_and_repeats_itself(tmp_path):
    network, _ = grow_study.build("mlp", "digits", None, 1)
    for split in ("train", "test"):
        images = np.asarray(getattr(network.dataset, f"{split}_images"))
        np.save(tmp_path / f"{split}_images.npy", images.reshape(len(images), -1))
        labels = np.asarray(getattr(network.dataset, f"{split}_labels"))
        np.save(tmp_path / f"{split}_labels.npy", labels)
    arrays: dict[str, Any] = cases.draw_indices(0, len(network.dataset.train_labels), CASE)
    arrays |= ours.create("digits", None, 4, 0)
    np.savez(tmp_path / "0.npz", **arrays)
    case = CASE | cases.ARMS["ours"] | {"folder": str(tmp_path), "arrays": "0.npz"}
    found, again = ours.run(case), ours.run(case)
    start, first, second = found["widths"]
    assert start == [64, 4, 4, 4, 4, 10]
    for widths, before, layer in ((first, start, 1), (second, first, 2)):  # as many as the rank has
        assert before[layer] < widths[layer] <= 2 * before[layer]
        assert [*widths[:layer], *widths[layer + 1 :]] == [*before[:layer], *before[layer + 1 :]]
    assert found["capacity"] == found["widths"]
    assert again["losses"] == found["losses"] and again["accuracy"] == found["accuracy"]
    assert [len(losses) for losses in found["losses"]] == [1 + len(cases.POWERS)] * 2
    for amplitude, (_, *losses) in zip(found["amplitudes"], found["losses"], strict=True):
        assert cases.POWERS.index(amplitude) == np.argmin(losses)
    assert found["programs"] > 0 == again["programs"]
    seconds = again["processor_seconds"]
    assert seconds["total"] == seconds["growing"] + seconds["training"]
    assert sum(seconds[name] for name in ours.PARTS.values()) < seconds["growing"]


def record(arm, rate, seed, accuracy, total=2.0, again=None, **values):
    widths = [[64, 4, 4, 4, 4, 10], [64, 8, 4, 4, 4, 10], [64, 8, 8, 4, 4, 10]]
    found = {"arm": arm, "rate": rate, "seed": seed, "accuracy": accuracy, "widths": widths,
             "processor_seconds": {"total": total}} | values  # fmt: skip
    if again is not None:
        parts = ("total", "growing", "training", "statistics", "solution", "search")
        found["again"] = {"processor_seconds": dict.fromkeys(parts, again)}
    return found


def test_tables_take_the_best_rate_of_every_arm_and_compare_by_seed():
    failed = {"arm": "ours", "rate": 0.03, "seed": 1, "error": "ValueError: dead"}
    records = [
        record("ours", 0.01, 0, 0.80, 9.0, again=3.0),
        record("ours", 0.01, 1, 0.84, 6.0, again=4.0),
        record("ours", 0.02, 0, 0.85), record("ours", 0.02, 1, 0.87),
        record("ours", 0.03, 0, 0.99), failed,  # of fewer finished trainings
        record("gromo, 64 bits", 0.01, 0, 0.84, 2.0, again=2.0),
        record("gromo, 64 bits", 0.01, 1, 0.88, 2.0, again=2.0),
    ]  # fmt: skip
    arms = report.best_rates(records)
    assert {arm: found[0]["rate"] for arm, found in arms.items()} == {
        "ours": 0.02, "gromo, 64 bits": 0.01,
    }  # fmt: skip
    heading, first, _ = report.lines(arms, records, CASE)
    row = dict(zip(heading, first, strict=True))
    assert row["test accuracy, %"] == "86.0 ± 1.4"
    assert row["compiled"] == "3.50 ± 0.71" and row["seconds, compiling"] == "4.2 ± 3.2"
    # 64·8 + 8·8 + 8·4 + 4·4 + 4·10 weights and 8 + 8 + 4 + 4 + 10 biases.
    assert row["parameters"] == "698"
    compared = dict(zip(*report.differences(arms, records)[:2], strict=True))
    assert compared["points"] == "+0.0 ± 1.4" and compared["seconds, total"] == "1.75 ± 0.35"
    assert "failed: ours, rate 0.03, seed 1: ValueError: dead" in report.notes(records)


def test_agreement_is_the_largest_difference_of_every_growth():
    records = [
        record("ours", 0.01, 0, 0.8, losses=[[9.0, 2.0, 4.0], [9.0, 1.0, 1.0]]),
        record("gromo, 64 bits", 0.01, 0, 0.8, losses=[[2.0, 5.0], [1.0, 1.0]]),
        record("gromo, 64 bits", 0.02, 0, 0.8, losses=[[2.0, 9.0], [1.0, 9.0]]),  # has no partner
    ]
    assert report.agreement(records) == [0.25, 0.0]


def test_every_part_of_the_operations_is_counted():
    one = record("ours", 0.01, 0, 0.8)
    total, growing = report.operations(one, CASE)
    lengths = (4, 4, 3)  # growths behind 4 and 8 of 11 updates
    training = sum(
        3 * 16 * length * cases.forward_flops(widths)
        for length, widths in zip(lengths, one["widths"], strict=True)
    )
    case = CASE | cases.ARMS["ours"]
    assert growing == sum(cases.growth_flops(one["widths"][i], i, case) for i in (0, 1))
    assert total == training + growing
