"""Plans: packing against brute force, costs against closed forms, the binary end to end."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscale_jax._spaces import chain_string
from experiments.lab import files
from experiments.lab.sweeps import trial_hash
from experiments.plan_estimate import (
    Cost,
    advice,
    choose_samples,
    count_trainings,
    estimate,
    interpolate,
    limit,
    longest_first,
    makespan,
)

TIMES = st.lists(st.integers(0, 50), min_size=1, max_size=12)
WORKERS = st.integers(1, 5)


def simulated(seconds, workers):
    """Ticks of a clock at which trials are handed out, one at a time, to whoever is free."""
    left, running, now = list(seconds), [], 0
    while left or running:
        running = [end for end in running if end > now]
        while left and len(running) < workers:
            running.append(now + left.pop(0))
            running = [end for end in running if end > now]
        now += 1 if running else 0
        if not left and not running:
            return now
    return now


@given(TIMES, WORKERS)
def test_packing_is_that_of_a_clock(seconds, workers):
    assert makespan(seconds, workers) == simulated(seconds, workers)


@given(TIMES, WORKERS)
def test_no_packing_beats_the_mean_load_or_the_longest_trial(seconds, workers):
    for found in (makespan(seconds, workers), longest_first(seconds, workers)):
        assert found >= max(seconds)
        assert found * workers >= sum(seconds)
        assert found * workers <= sum(seconds) + (workers - 1) * max(seconds)  # Graham


@given(TIMES, WORKERS)
def test_more_workers_are_never_slower(seconds, workers):
    assert makespan(seconds, workers + 1) <= makespan(seconds, workers)
    assert makespan(seconds, len(seconds)) == max(seconds)
    assert makespan(seconds, 1) == sum(seconds)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_longest_first_is_near_the_best_of_all_assignments(seconds, workers):
    best = min(
        max(sum(s for s, w in zip(seconds, owners, strict=True) if w == one) for one in owners)
        for owners in itertools.product(range(workers), repeat=len(seconds))
    )
    assert best <= longest_first(seconds, workers) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


def plan(phases, workers=2, devices=2, threads=False, **options):
    return estimate(phases, workers=workers, devices=devices, threads=threads, **options)


def test_an_estimate_adds_phases_and_start():
    phases = [[Cost(4, 2, 1), Cost(1, 1, 1), Cost(2, 0, 0)], [Cost(0, 3, 0)]]
    found = plan(phases, start=10, flops=5e9)
    # 7 beside 3 and 2, then 3.
    assert found.packed == 7 + 3
    assert found.wall == 20
    assert found.costs == Cost(7, 6, 2)
    assert (found.mean_load, found.longest) == (15 / 2, 7)
    assert found.device_seconds == 40
    assert found.flops == 5e9


def test_workers_beyond_trials_and_devices_do_not_count():
    phases = [[Cost(1, 0, 0)] * 3]
    assert plan(phases, workers=9, devices=9).workers == 3
    assert plan(phases, workers=9, devices=2).wall == 2
    assert "gain nothing" in advice(plan(phases, workers=9, devices=9), workers=9, devices=9)[0]


def test_threads_trace_one_at_a_time():
    phases = [[Cost(1, 0, 3)] * 2]
    assert plan(phases, threads=True).wall == 6
    assert plan(phases, threads=False).wall == 4
    assert any("processes" in line for line in advice(plan(phases, threads=True), workers=2,
                                                      devices=2))  # fmt: skip


@pytest.mark.parametrize(
    ("cost", "start", "expected"),
    [(Cost(5, 1, 1), 1, "compute"), (Cost(5, 3, 3), 1, "compile"), (Cost(5, 1, 1), 9, "input")],
)
def test_the_limit_is_what_takes_the_most(cost, start, expected):
    assert limit(plan([[cost]], start=start)) == expected


def test_uneven_trials_are_told_to_run_longest_first():
    phases = [[Cost(s, 0, 0) for s in (1, 1, 1, 1, 4)]]
    found = plan(phases)
    assert (found.packed, found.sorted) == (6, 4)
    assert any("4 s instead of 6 s" in line for line in advice(found, workers=2, devices=2))


@given(st.floats(0, 10), st.floats(0, 10), st.lists(st.integers(1, 99), min_size=4, unique=True))
def test_costs_on_a_line_are_found_from_two_samples(offset, slope, sizes):
    exact = [offset + slope * size for size in sizes]
    found = interpolate(sizes, {i: exact[i] for i in (1, 3)})
    assert found[1] == exact[1]
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)


@given(st.dictionaries(st.integers(0, 5), st.floats(0, 100), min_size=1))
def test_interpolated_costs_are_never_negative_and_keep_what_was_timed(timed):
    found = interpolate([3, 1, 4, 1, 5, 9], timed)
    assert all(0 <= one < math.inf for one in found)
    assert all(found[i] == value for i, value in timed.items())


def test_the_first_trial_stands_for_itself_alone():
    assert interpolate([1, 1, 2, 3], {0: 100.0, 1: 1.0, 3: 3.0}) == [100, 1, pytest.approx(2), 3]
    assert interpolate([1, 1, 2], {0: 5.0}) == [5, 5, 10]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_samples_are_the_first_trial_and_the_extremes(sizes, count):
    found = choose_samples(sizes, count)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert len(found) == min(count, len(sizes))
    if len(found) > 2:
        assert {min(sizes[1:]), max(sizes[1:])} <= {sizes[i] for i in found[1:]}


def test_trainings_of_a_flat_loss_are_all_rates_up_to_the_first_that_is_lost():
    rates, start = np.geomspace(1e-3, 10, 17).tolist(), 0.1
    ended, lost = count_trainings(rates, 1, start, 0, curvature=0.0)
    ends = [start * math.exp(nats + 2.5) for nats in np.linspace(-2, 2, 9)]
    assert ended == np.mean([sum(rate <= end for rate in rates) for end in ends])
    assert lost == np.mean([any(rate > end for rate in rates) for end in ends])


@pytest.mark.parametrize(("refine", "runs", "deviation"), [(1, 24.0, 3.3), (0, 15.7, 5.0)])
def test_trainings_are_as_many_as_studies_had(refine, runs, deviation):
    # The mean and the deviation over 187 MLPs and 72 CNNs on Fashion-MNIST, SGD, three seeds.
    low, high = 2**-11, 4.0
    found = count_trainings(np.geomspace(low, high, 14).tolist(), 3, math.sqrt(low * high), refine)
    assert abs(sum(found) - runs) < deviation


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: makespan([1.0], 0), "workers must be at least 1, found 0"),
        (lambda: makespan([math.nan], 1), "finite"),
        (lambda: makespan([-1.0], 1), "not negative"),
        (lambda: plan([[Cost(1, 0, 0)]], devices=0), "devices must be at least 1, found 0"),
        (lambda: plan([[]]), "hold no trial"),
        (lambda: choose_samples([1], 0), "at least 1 trial"),
    ],
)
def test_bad_input(call, what):
    with pytest.raises(ValueError, match=what):
        call()


FLAGS = ("--study=chains", "--width=4", "--max_networks=3", "--num_seeds=2", "--workers=1")


def finished(text, runs):
    trial = {
        "activation": "relu", "normalization": None, "initialization": "target_in_degree",
        "optimizer": "sgd", "dataset": "digits", "width": 4, "batch_size": 256, "steps": 5,
        "downscale": 1, "seeds": 2, "architecture": text, "kernel_size": None, "refine": 1,
    }  # fmt: skip
    return {"hash": trial_hash(trial), "trial": trial, "result": {"runs": runs}}


def test_the_binary_plans_what_is_missing(tmp_path, run_again):
    study = tmp_path / "study"
    runs = [[0.1, seed, 1.0] for seed in range(6)] + [[4.0, 0, None]]
    for name in ("results", "measurements"):
        files.append_record(study / f"{name}.jsonl", finished("2", runs))
    before = sorted(study.iterdir())
    report = tmp_path / "plan.json"
    options = (f"--json={report}", "--devices=3", "--price_per_hour=60", "--samples=1")
    found = run_again("plan", study, *FLAGS, *options)
    assert found.returncode == 0, found.stderr
    assert "compile" in found.stdout
    assert sorted(study.iterdir()) == before  # nothing is run or written
    plan = json.loads(report.read_text())
    (kind,) = plan["kinds"]
    assert (kind["networks"], kind["timed"], kind["trainings"]) == (2, 1, 7)
    # Products of 256 examples by stem [64, 4], edges [4, 4] and readout [4, 10], for the output,
    # for the weights' gradients, and but for the stem for the inputs' gradients.
    chains = [(64 * 4 * 2 + 3 * (depth * 16 + 40)) * 2 * 256 for depth in (2, 3)]
    assert kind["step_flops"] == pytest.approx(np.mean(chains), rel=0.15)
    assert plan["flops"] == pytest.approx(6 * 5 * sum(chains), rel=0.15)
    assert plan["limit"] == "compile"
    assert plan["device_seconds"] == pytest.approx(3 * plan["wall"])
    assert plan["cost"] == pytest.approx(plan["device_seconds"] / 60)
    parts = plan["start"] + sum(plan["costs"].values())
    assert plan["wall"] == pytest.approx(parts)


def test_the_binary_refuses(tmp_path, run_again):
    for name in ("results", "measurements"):
        for depth in (1, 2):
            record = finished(chain_string(depth), [[0.1, 0, 1.0]])
            files.append_record(tmp_path / f"{name}.jsonl", record)
    for flags, what in (
        (("--runner=ray",), "plan local or processes"),
        (("--study=grow",), "unknown study 'grow'"),
        (("--batch_size=5000",), "exceeds the 1438 training examples"),
        ((*FLAGS, "--max_networks=2"), "holds the whole study"),
    ):
        found = run_again("plan", tmp_path, *flags)
        assert found.returncode == 1
        assert what in found.stderr
