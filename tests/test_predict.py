"""Predicted rates: against the closed forms, update sizes worked by hand, and scaled losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from archscale_jax import learning_rate_scale, measure_update, predict_learning_rate
from archscale_jax._spaces import dag_graph
from archscale_jax.rules import LEARNING_RATE_RULES
from archscale_jax.tuning import UpdateSize, register_measured_rule
from archscale_jax.tuning._predict import MEASURED_RULES
from experiments.lab.models import DagMLP


def size(*sizes):
    return UpdateSize(*(jnp.array(one, jnp.float32) for one in sizes))


TARGET = size([4.0, 16.0, 1.0], [1.0, 9.0, 1.0], [36.0, 9.0, 1.0])
BASE = size([1.0, 1.0], [1.0, 4.0], [5.0, 25.0])
GRAPH, BASE_GRAPH = dag_graph("2_12_022"), dag_graph("2")


def architecture(graph):
    make = lambda: DagMLP(graph, 4, 3, 2, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(make).architecture()


def near(expected):
    return pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", list(LEARNING_RATE_RULES))
def test_of_graphs_is_the_closed_form(rule):
    expected = 0.3 * learning_rate_scale(GRAPH, BASE_GRAPH, rule)
    assert predict_learning_rate(GRAPH, BASE_GRAPH, 0.3, rule) == expected
    pair = architecture(GRAPH), architecture(BASE_GRAPH)
    assert predict_learning_rate(*pair, 0.3, rule) == expected
    assert predict_learning_rate(pair[0], BASE_GRAPH, 0.3, rule) == expected


def test_options_reach_a_closed_form():
    expected = learning_rate_scale(GRAPH, BASE_GRAPH, "path_sum", rule_options={"depth_offset": 2})
    found = predict_learning_rate(
        GRAPH, BASE_GRAPH, 1.0, "path_sum", rule_options={"depth_offset": 2}
    )
    assert found == expected != predict_learning_rate(GRAPH, BASE_GRAPH, 1.0, "path_sum")


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ("absolute_update", math.sqrt(1 / 16)),
        ("relative_update", math.sqrt(4 / 9)),
        ("standardized_update", math.sqrt(25 / 36)),
    ],
)
def test_of_measured_sizes_worked_by_hand(rule, factor):
    assert predict_learning_rate(TARGET, BASE, 0.2, rule) == near(0.2 * factor)
    assert predict_learning_rate(BASE, TARGET, 0.2, rule) == near(0.2 / factor)
    assert predict_learning_rate(BASE, BASE, 0.2, rule) == near(0.2)


def test_is_of_standardized_updates_by_default():
    assert predict_learning_rate(TARGET, BASE, 1.0) == predict_learning_rate(
        TARGET, BASE, 1.0, "standardized_update"
    )


@pytest.mark.parametrize("rule", ["absolute_update", "relative_update", "standardized_update"])
def test_seeds_are_averaged_in_log_rate(rule):
    seeds = [TARGET, size(*[[2.0, 1.0, 5.0]] * 3), size(*[[0.1] * 3] * 3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    alone = [predict_learning_rate(one, BASE, 1.0, rule) for one in seeds]
    expected = math.prod(alone) ** (1 / 3)
    assert predict_learning_rate(together, BASE, 1.0, rule) == near(expected)
    assert predict_learning_rate(BASE, together, 1.0, rule) == near(1 / expected)


def test_of_eigenvalues_is_their_inverse():
    assert predict_learning_rate(8.0, 2.0, 0.4, "sharpness") == near(0.1)
    assert predict_learning_rate(8, np.float32(2), 0.4, "sharpness") == near(0.1)
    seeds = jnp.array([2.0, 8.0])
    assert predict_learning_rate(seeds, np.array([1.0]), 0.4, "sharpness") == near(0.1)


def test_takes_a_function():
    mean = predict_learning_rate(TARGET, BASE, 1.0, lambda size: jnp.mean(size.relative))
    assert mean == near(2.5 / (11 / 3))
    powered = predict_learning_rate(
        3.0, 1.0, 1.0, lambda size, power: size**power, rule_options={"power": 2}
    )
    assert powered == near(1 / 9)
    assert predict_learning_rate(GRAPH, BASE_GRAPH, 0.5, lambda graph, base: 3.0) == 1.5


def test_takes_a_registered_rule(monkeypatch):
    monkeypatch.setattr(MEASURED_RULES, "_rules", dict(MEASURED_RULES._rules))

    @register_measured_rule("mean")
    def mean(size):
        return jnp.mean(size.relative, axis=-1)

    @register_measured_rule("gradient_norm")
    def gradient_norm(norm):
        return norm

    assert predict_learning_rate(TARGET, BASE, 1.0, "mean") == near(2.5 / (11 / 3))
    assert predict_learning_rate(4.0, 1.0, 1.0, "gradient_norm") == near(0.25)
    with pytest.raises(TypeError, match="'mean' compares measurements, found GraphsTuple"):
        predict_learning_rate(GRAPH, BASE_GRAPH, 1.0, "mean")
    with pytest.raises(ValueError, match="measured rule 'mean' is registered already"):
        register_measured_rule("mean")(mean)


def test_names_the_rules_where_one_is_unknown():
    for pair in ((TARGET, BASE), (GRAPH, BASE_GRAPH)):
        with pytest.raises(
            ValueError, match="'best'; accepted are standardized_update, .*, path_sum"
        ):
            predict_learning_rate(*pair, 1.0, "best")


@pytest.mark.parametrize("rule", ["absolute_update", "relative_update", "standardized_update"])
@pytest.mark.parametrize("pair", [(GRAPH, BASE_GRAPH), (TARGET, BASE_GRAPH), (2.0, BASE)])
def test_update_sizes_are_wanted(rule, pair):
    kinds = " and ".join(type(one).__name__ for one in pair)
    with pytest.raises(TypeError, match=f"'{rule}' compares two UpdateSizes.*found {kinds}"):
        predict_learning_rate(pair[0], pair[1], 1.0, rule)


@pytest.mark.parametrize("rule", list(LEARNING_RATE_RULES))
@pytest.mark.parametrize("pair", [(TARGET, BASE), (GRAPH, BASE), (2.0, BASE_GRAPH)])
def test_graphs_are_wanted(rule, pair):
    with pytest.raises(TypeError, match=f"'{rule}' compares two graphs or Architectures, found"):
        predict_learning_rate(pair[0], pair[1], 1.0, rule)


@pytest.mark.parametrize("pair", [(TARGET, BASE), (GRAPH, BASE_GRAPH), (2.0, BASE_GRAPH)])
def test_eigenvalues_are_wanted(pair):
    with pytest.raises(TypeError, match="'sharpness' compares eigenvalues, found"):
        predict_learning_rate(pair[0], pair[1], 1.0, "sharpness")


def test_a_function_gets_two_of_a_kind():
    with pytest.raises(TypeError, match="found GraphsTuple and UpdateSize"):
        predict_learning_rate(GRAPH, BASE, 1.0, lambda *both: 1.0)


def test_raises_on_what_is_not_a_rule():
    with pytest.raises(TypeError, match="a measured rule is a name or a function, found 3"):
        predict_learning_rate(TARGET, BASE, 1.0, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
@pytest.mark.parametrize("rule", ["absolute_update", "relative_update", "standardized_update"])
def test_raises_on_a_size_that_is_not_positive_and_finite(rule, bad):
    one = size(*[[bad, bad]] * 3)
    message = f"'{rule}' gives the size .*positive and finite" if bad else "on an update of 0: no v"
    for pair in ((one, BASE), (BASE, one)):
        with pytest.raises(ValueError, match=message):
            predict_learning_rate(pair[0], pair[1], 1.0, rule)


def test_raises_on_a_negative_eigenvalue():
    with pytest.raises(ValueError, match=r"'sharpness' gives the size -1\.0"):
        predict_learning_rate(-1.0, 1.0, 1.0, "sharpness")


@pytest.mark.parametrize("rate", [0.0, -0.1, math.nan, math.inf])
def test_raises_on_a_base_rate(rate):
    with pytest.raises(ValueError, match=f"base_rate must be positive and finite, found {rate}"):
        predict_learning_rate(TARGET, BASE, rate)


@pytest.mark.parametrize("rule", ["absolute_update", "relative_update", "standardized_update"])
def test_a_loss_times_c_takes_the_rate_over_c(rule):
    """SGD on c times the loss at a rate over c is SGD on the loss."""
    weights = [jnp.ones((3, 4)), jnp.full((4, 4), 0.5)]
    x = jax.random.normal(jax.random.key(0), (5, 3))

    def features(weights, x):
        first = jnp.tanh(x @ weights[0])
        return [first, first @ weights[1]]

    def loss(weights, x):
        return jnp.mean(jnp.square(features(weights, x)[-1] - 1))

    def measure(factor):
        return measure_update(
            features, lambda *both: factor * loss(*both), weights, x, optax.sgd(1.0)
        )

    one, seven = measure(1.0), measure(7.0)
    np.testing.assert_allclose(seven.absolute, 49 * one.absolute, rtol=1e-4)
    np.testing.assert_allclose(seven.relative, 49 * one.relative, rtol=1e-4)
    np.testing.assert_allclose(seven.standardized, 49 * one.standardized, rtol=1e-4)
    assert predict_learning_rate(seven, one, 0.7, rule) == pytest.approx(0.1, rel=1e-4)
