"""Steps of single leaves, a sample; `python -m benchmarks.per_leaf` has all networks and widths."""

import numpy as np
import pytest

import archscale_jax as archscale
from tests.leaf_steps import Verdict, leaf_steps, trends
from tests.step_networks import NETWORKS

pytestmark = pytest.mark.quick_compilation

WIDTHS = (64, 256)
DRAWS: dict[int, int] = {64: 8, 256: 4}


def squares(width, power, noise=0.0, draws=16):
    """Mean squares of one leaf [draws, 1] whose effect is a power of the width."""
    generator = np.random.default_rng(width)
    return width ** (2 * power) * np.exp(noise * generator.normal(size=(draws, 1)))


@pytest.mark.parametrize("power", [-0.5, 0.5, 1.0])
def test_a_power_of_the_width_is_found(power):
    measured = {width: squares(width, power, 0.2) for width in (64, 256, 1024)}
    (trend,) = trends(measured)
    assert trend.verdict == Verdict.WRONG
    assert trend.ratio == pytest.approx(16**power, rel=0.2)


def test_a_correction_of_a_finite_width_settles():
    measured = {width: squares(width, 0.0) * (1 + 100 / width) for width in (64, 256, 1024)}
    (trend,) = trends(measured)
    assert trend.verdict == Verdict.SETTLING
    measured = {width: squares(width, 0.0) * (1 + 20 / width) for width in (64, 256, 1024)}
    (trend,) = trends(measured)
    assert trend.verdict == Verdict.FLAT


def test_rounding_is_not_an_effect():
    measured = {width: np.ones((4, 2)) * [1.0, 1e-15] for width in WIDTHS}
    first, second = trends(measured)
    assert (first.verdict, second.verdict) == (Verdict.FLAT, Verdict.NOTHING)


def test_a_wrong_multiplier_is_found(monkeypatch):
    honest = archscale.learning_rate_multipliers

    def dishonest(architecture, *arguments, **options):
        found = honest(architecture, *arguments, **options)
        return found | {"w1": found["w1"] * architecture.shapes["w1"][0] / WIDTHS[0]}

    monkeypatch.setattr(archscale, "learning_rate_multipliers", dishonest)
    found = leaf_steps(NETWORKS["MLP with biases"], "adam", DRAWS)
    assert [one.leaf for one in found if not one.holds] == ["w1"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("MLP with biases", "adam"),
        ("MLP with biases", "sgd"),
        ("per-head block-diagonal layer", "adam"),
    ],
)
def test_steps_of_single_leaves_do_not_depend_on_the_width(name, optimizer):
    found = leaf_steps(NETWORKS[name], optimizer, DRAWS)
    wrong = [(one.leaf, one.logits.ratio, one.vertices.ratio) for one in found if not one.holds]
    assert not wrong, f"leaf, ratios of the change of logits and vertices: {wrong}"
