"""Searches of several hyperparameters, on losses whose best point is known."""

import collections
import itertools
import math

import numpy as np
import pytest

import archscale_jax as archscale
from archscale_jax.tuning import HyperparameterSearch

RATES = np.geomspace(1e-4, 1, 13).tolist()
DECAYS = np.geomspace(1e-3, 10, 9).tolist()


def bowl(rate, decay, *, ridge=0.0, noise=0.0, cliff=math.inf):
    """A parabola in both logs, tilted by `ridge`; NaN for rates above the cliff; counts calls."""
    calls = collections.Counter()

    def train(values, seed):
        calls[*values.values(), seed] += 1
        x = math.log(values["learning_rate"] / rate)
        y = math.log(values["weight_decay"] / decay)
        yield 5.0
        if values["learning_rate"] > cliff:
            yield math.nan
        shift = noise * np.random.default_rng(seed).normal()
        yield 1 + 0.3 * (x - shift) ** 2 + 0.1 * y**2 + ridge * x * y

    return train, calls


def found_of(train, **options) -> HyperparameterSearch:
    return archscale.find_learning_rate(
        train, {"learning_rate": RATES, "weight_decay": DECAYS}, seeds=(0, 1), **options
    )


@pytest.mark.parametrize("start", [None, {"learning_rate": 0.9}, {"weight_decay": 1e-3}])
def test_the_vertex_of_a_bowl(start):
    train, calls = bowl(0.0123, 0.4)
    found = found_of(train, start=start)
    assert found.values == pytest.approx({"learning_rate": 0.0123, "weight_decay": 0.4}, rel=1e-6)
    assert set(calls.values()) == {1}, "a run is trained once"
    assert len(found.runs) == len(calls) < len(RATES) * len(DECAYS)


@pytest.mark.parametrize("ridge", [0.05, 0.2, -0.2])
def test_the_point_is_the_best_along_every_axis(ridge):
    train, _ = bowl(0.01, 1.0, ridge=ridge)
    found = found_of(train, refine=0)
    loss = lambda **values: list(train({**found.point, **values}, 0))[-1]  # noqa: E731
    assert found.loss == pytest.approx(loss())
    assert found.loss == pytest.approx(min(loss(learning_rate=one) for one in RATES))
    assert found.loss == pytest.approx(min(loss(weight_decay=one) for one in DECAYS))
    grid = itertools.product(RATES, DECAYS)
    best = min(loss(learning_rate=rate, weight_decay=decay) for rate, decay in grid)
    assert found.loss <= best + 0.2, "what a closely spaced valley can hide"


def test_runs_that_diverge_are_no_answer():
    train, _ = bowl(0.1, 0.4, cliff=0.05)
    found = found_of(train, start={"learning_rate": 1.0})
    assert found.point["learning_rate"] <= 0.05
    assert math.isfinite(found.loss)


def test_integers_stay_integers_and_are_not_refined():
    seen = set()

    def train(values, seed):
        del seed
        seen.add(values["batch_size"])
        assert isinstance(values["batch_size"], int)
        yield 1 + math.log(values["batch_size"] / 40) ** 2 + math.log(values["rate"] / 0.1) ** 2

    found = archscale.find_learning_rate(train, {"rate": RATES, "batch_size": (16, 32, 64)})
    assert found.point["batch_size"] == found.values["batch_size"] == 32
    assert seen == {16, 32, 64}


def test_a_single_axis_is_the_search_of_a_rate():
    train = lambda rate, seed: [1 + (math.log(rate / 0.02) + 0.1 * seed) ** 2]  # noqa: E731
    alone = archscale.find_learning_rate(train, RATES, start=RATES[6])
    named = archscale.find_learning_rate(
        lambda values, seed: train(values["rate"], seed), {"rate": RATES}
    )
    assert named.axes["rate"] == alone


@pytest.mark.parametrize(
    ("rates", "start", "error", "text"),
    [
        ({}, None, TypeError, "by name"),
        (RATES, {"learning_rate": 0.1}, TypeError, "by name"),
        ({"rate": RATES}, 0.1, ValueError, "start must give values of rate"),
        ({"rate": RATES}, {"decay": 0.1}, ValueError, "start must give values of rate"),
        ({"rate": RATES, "decay": [0.0, 1.0]}, None, ValueError, "positive"),
        ({"rate": RATES, "decay": [1.0, -1.0]}, None, ValueError, "positive"),
        ({"rate": RATES, "decay": []}, None, ValueError, "positive"),
        ({"rate": "fast"}, None, TypeError, "must be a sequence of numbers"),
    ],
)
def test_wrong_axes_and_starts_are_named(rates, start, error, text):
    with pytest.raises(error, match=text):
        archscale.find_learning_rate(lambda values, seed: [1.0], rates, start=start)


def test_transfer_of_several_hyperparameters():
    kwargs = {"noise": 0.02}
    sizes = {16: bowl(0.01, 0.5, **kwargs)[0], 64: bowl(0.01, 2.0, **kwargs)[0]}
    check = archscale.transfer_check(
        sizes, {"learning_rate": RATES, "weight_decay": DECAYS}, seeds=(0, 1, 2)
    )
    assert check.axes["learning_rate"].transfers and not check.transfers
    assert check.axes["weight_decay"].drift == pytest.approx(math.log(4), abs=1e-6)
    assert check.excess[16] == pytest.approx(0, abs=1e-3)
    assert check.excess[64] == pytest.approx(0.1 * math.log(4) ** 2, abs=0.02)


def test_transfer_where_nothing_moves():
    sizes = {size: bowl(0.01, 0.5, noise=0.1)[0] for size in (16, 64)}
    check = archscale.transfer_check(sizes, {"learning_rate": RATES, "weight_decay": DECAYS})
    assert check.transfers
    assert max(check.excess.values()) == pytest.approx(0, abs=1e-2)
