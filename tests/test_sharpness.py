"""Sharpness: against NumPy's eigenvalues of whole Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from archscale_jax import initialize
from archscale_jax._spaces import dag_graph
from archscale_jax.tuning import sharpness
from experiments.lab.models import DagMLP
from experiments.lab.training import cross_entropy

pytestmark = pytest.mark.quick_compilation


def quadratic(params, matrix):
    """Half the quadratic form of a matrix, which is its Hessian; parameters in two leaves."""
    vector = jnp.concatenate([params["a"], params["b"].ravel()])
    return vector @ matrix @ vector / 2


def zeros(count):
    return {"a": jnp.zeros(2), "b": jnp.zeros((count - 2, 1))}


jitted = jax.jit(functools.partial(sharpness, quadratic), static_argnames="max_iterations")


def symmetric(eigenvalues, seed):
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([6, 20]),
    shift=st.sampled_from([-20.0, -3.0, 0.0, 3.0]),
)
def test_is_the_largest_eigenvalue_of_a_quadratic_form(seed, size, shift):
    """Positive, indefinite and negative; never the one of largest magnitude below 0."""
    eigenvalues = np.random.default_rng(seed).normal(size=size) + shift
    found = jitted(zeros(size), symmetric(eigenvalues, seed))
    scale = np.abs(eigenvalues).max()
    assert float(found) == pytest.approx(eigenvalues.max(), abs=2e-3 * scale)


@pytest.mark.parametrize("value", [2.0, -3.0])
def test_of_equal_eigenvalues(value):
    assert float(jitted(zeros(6), value * jnp.eye(6))) == pytest.approx(value, abs=1e-5)


def test_does_not_depend_on_the_parameters_of_a_quadratic_nor_on_the_key():
    matrix = symmetric([5.0, 2.0, 1.0, 0.0, -1.0, -9.0], 0)
    for seed in range(3):
        params = jax.tree.map(lambda leaf, seed=seed: np.full(leaf.shape, seed, "f4"), zeros(6))
        found = jitted(params, matrix, key=jax.random.key(seed))
        assert float(found) == pytest.approx(5, rel=1e-4)


def problem(model, shape):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.jit(lambda key: initialize(key, params, model.architecture()))(jax.random.key(1))
    batch = (jax.random.normal(jax.random.key(2), (4, *shape)), jnp.array([0, 1, 2, 1]))

    def loss(params, batch):
        return cross_entropy(graphdef, params, rest, *batch, train=True)[0]

    return loss, params, batch


@functools.cache
def hessian_of(loss):
    def flattened(params, batch):
        flat, unravel = ravel_pytree(params)
        return jax.jacrev(jax.grad(lambda flat: loss(unravel(flat), batch)))(flat)

    return jax.jit(flattened)


def whole(loss, params, batch):
    """The largest eigenvalue by NumPy; the Hessian by two reverse modes."""
    hessian = np.asarray(hessian_of(loss)(params, batch), np.float64)
    return np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1]


def test_of_an_mlp_jitted_and_mapped_over_seeds():
    loss, params, batch = problem(
        nnx.eval_shape(lambda: DagMLP(dag_graph("2_12"), 5, 4, 3, rngs=nnx.Rngs(0))), (5,)
    )
    seeds = [params, jax.tree.map(lambda leaf: 1.5 * leaf, params)]
    expected = [whole(loss, one, batch) for one in seeds]
    measure = jax.jit(jax.vmap(lambda params: sharpness(loss, params, batch)))
    found = measure(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_more_products_come_closer():
    eigenvalues = np.linspace(-1, 1, 20)
    matrix = symmetric(eigenvalues, 3)
    few, many = (float(jitted(zeros(20), matrix, max_iterations=count)) for count in (1, 30))
    assert few < many == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count", [2, 5])
def test_so_few_parameters_raise(count):
    with pytest.raises(ValueError, match=f"params must hold at least 6 entries, found {count}"):
        jitted(zeros(count), jnp.eye(count))
