"""Bottlenecks and new neurons against dense least squares and reduced-rank regression."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscale_jax.contrib._growth.neurons import (
    LayerStatistics,
    inverse_root,
    least_squares,
    new_neurons,
)


def statistics(inputs, targets):
    """Samples are columns."""
    return LayerStatistics(
        inputs.shape[1], inputs @ inputs.T, inputs @ targets.T, np.sum(targets**2)
    )


def drawn(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


sizes = st.tuples(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5),
    st.integers(1, 12),
)  # fmt: skip


@given(sizes)
def test_the_best_update_is_least_squares(size):
    seed, inputs, outputs, _, samples = size
    b, v = drawn(seed, (inputs, samples), (outputs, samples))
    found = least_squares(statistics(b, v), cutoff=1e-12)
    # Where samples are few, the smallest of all solutions.
    expected, *_ = np.linalg.lstsq(b.T, v.T, rcond=1e-7)
    np.testing.assert_allclose(found.update, expected, atol=1e-6 * (1 + np.abs(expected).max()))
    rest = np.sum((v - expected.T @ b) ** 2) / samples
    np.testing.assert_allclose(found.absolute, rest, atol=1e-7)
    np.testing.assert_allclose(found.relative, rest * samples / np.sum(v**2), atol=1e-7)


def test_no_bottleneck_where_the_layer_can_express_the_target():
    b, w = drawn(0, (4, 30), (3, 4))
    found = least_squares(statistics(b, w @ b))
    assert found.absolute < 1e-12
    np.testing.assert_allclose(found.update, w.T, rtol=1e-8)
    nothing = least_squares(statistics(b, np.zeros((3, 30))))
    assert (nothing.absolute, nothing.relative) == (0, 0)


@given(sizes)
def test_neurons_are_the_reduced_rank_regression(size):
    seed, before, outputs, number, samples = size
    samples += before  # the covariance is regular
    b, v = drawn(seed, (before, samples), (outputs, samples))
    found = new_neurons(b @ b.T, b @ v.T, samples, number=number, threshold=0.0, cutoff=1e-12)
    # Ground truth: the best map of rank K keeps K directions of the full map's fitted values.
    full = np.linalg.lstsq(b.T, v.T, rcond=None)[0].T
    directions, fitted, _ = np.linalg.svd(full @ b, full_matrices=False)
    rank = min(number, before, outputs)
    kept = directions[:, :rank] @ directions[:, :rank].T
    scale = 1 + np.abs(full).max()
    product = (found.fan_in @ found.fan_out).T
    np.testing.assert_allclose(product, kept @ full, atol=1e-6 * scale)
    expected = fitted[: len(found.singular_values)] / np.sqrt(samples)
    np.testing.assert_allclose(found.singular_values, expected, atol=1e-7)
    # What is left is what Σ λ² says.
    rest = np.sum((v - product @ b) ** 2) / samples
    gained = np.sum(found.singular_values**2)
    np.testing.assert_allclose(rest, np.sum(v**2) / samples - gained, atol=1e-6 * scale)


def test_fan_in_and_fan_out_share_the_size():
    b, v = drawn(1, (4, 40), (3, 40))
    found = new_neurons(b @ b.T, b @ v.T, 40)
    outputs = found.fan_in.T @ b  # of the new neurons, uncorrelated, of size λ
    np.testing.assert_allclose(outputs @ outputs.T / 40, np.diag(found.singular_values), atol=1e-9)
    gram = found.fan_out @ found.fan_out.T
    np.testing.assert_allclose(gram, np.diag(found.singular_values), atol=1e-9)


def test_how_many():
    b, v = drawn(2, (4, 40), (3, 40))
    every = new_neurons(b @ b.T, b @ v.T, 40, threshold=0.0).singular_values
    assert len(every) == 3 and np.all(np.diff(every) <= 0)
    between = (every[0] + every[1]) / 2
    assert len(new_neurons(b @ b.T, b @ v.T, 40, threshold=between).singular_values) == 1
    assert len(new_neurons(b @ b.T, b @ v.T, 40, threshold=1e9).singular_values) == 1
    assert len(new_neurons(b @ b.T, b @ v.T, 40, number=2, threshold=0.0).singular_values) == 2
    assert len(new_neurons(b @ b.T, 0 * b @ v.T, 40).singular_values) == 0


def test_directions_that_no_sample_has_are_excluded():
    b, v = drawn(3, (4, 40), (2, 40))
    b[3] = b[0] + 1e-9 * b[1]
    root = inverse_root(b @ b.T / 40, cutoff=1e-6)
    assert root.shape == (4, 3)
    found = new_neurons(b @ b.T, b @ v.T, 40)
    assert np.abs(found.fan_in).max() < 10


def test_bad_statistics():
    b, v = drawn(4, (2, 5), (3, 5))
    good = statistics(b, v)
    with pytest.raises(ValueError, match="0 samples"):
        least_squares(good._replace(examples=0))
    with pytest.raises(ValueError, match="hold targets that are not finite"):
        least_squares(good._replace(targets=good.targets * np.nan))
    with pytest.raises(ValueError, match="hold before that are not finite"):
        new_neurons(good.inputs * np.inf, good.targets, 5)
    with pytest.raises(ValueError, match="number must be None or at least 1, found 0"):
        new_neurons(good.inputs, good.targets, 5, number=0)


@given(sizes)
def test_the_largest_entry_of_a_fan_out_is_positive(size):
    seed, before, outputs, _, samples = size
    b, v = drawn(seed, (before, samples + before), (outputs, samples + before))
    found = new_neurons(b @ b.T, b @ v.T, samples, threshold=0.0)
    turned = new_neurons(b @ b.T, -b @ v.T, samples, threshold=0.0)
    assert np.all(found.fan_out.max(axis=1) >= -found.fan_out.min(axis=1))
    # What turns is the fan-in: rounding cannot choose between the two.
    np.testing.assert_allclose(turned.fan_out, found.fan_out, atol=1e-6)
    np.testing.assert_allclose(turned.fan_in, -found.fan_in, atol=1e-6)
