"""What cannot be read is said: which operation, which leaves, and never a silent guess."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import archscale_jax as archscale
from tests.kinds.helpers import Model, roles, spec, specs

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


def primitive(name):
    """An operation that nobody has registered, which keeps the shape of its input."""
    made = Primitive(name)
    made.def_abstract_eval(lambda x: x)
    made.def_impl(lambda x: x)
    mlir.register_lowering(made, lambda context, x: [x])
    batching.defvectorized(made)
    return made.bind


crumple, unfold = primitive("crumple"), primitive("unfold_weight")


def unknown(answer) -> dict[str, Any]:
    """The option of `trace`."""
    return {"unknown": answer}


def on_features(p, x):
    return RELU(crumple(x @ p["a"]) @ p["b"]) @ p["c"]


def on_stream(p, x):
    h = x @ p["a"]
    return (h + crumple(RELU(h) @ p["b"])) @ p["c"]


def in_a_scan(p, x):
    h = jax.lax.scan(lambda h, _: (crumple(h @ p["b"]), None), x @ p["a"], length=2)[0]
    return h @ p["c"]


def in_a_jit(p, x):
    return jax.jit(lambda h: RELU(crumple(h)))(x @ p["a"]) @ p["b"] @ p["c"]


FUNCTIONS = {"features": on_features, "stream": on_stream, "scan": in_a_scan, "jit": in_a_jit}
SHAPES = specs(a=(8, 16), b=(16, 16), c=(16, 3))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_operation_that_nobody_registered_is_an_error(function):
    """It is named, and so is the way on; it is not taken for an activation."""
    with pytest.raises(archscale.TraceError, match="crumple"):
        archscale.trace(FUNCTIONS[function], SHAPES, spec(2, 8))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_operation_may_be_a_warning(function):
    """unknown="warn": the network is read, and the operation named in a warning."""
    with pytest.warns(UserWarning, match="crumple"):
        arch = archscale.trace(FUNCTIONS[function], SHAPES, spec(2, 8), **unknown("warn"))
    assert roles(arch) == {"a": "input", "b": "hidden", "c": "readout"}


def test_known_operations_do_not_warn():
    """A usual network under unknown="warn": no warning, the same architecture."""

    def apply(p, x):
        h = jax.nn.gelu(x @ p["a"])
        h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-6)
        return jax.nn.log_softmax(jnp.tanh(h @ p["b"]) @ p["c"])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arch = archscale.trace(apply, SHAPES, spec(2, 8), **unknown("warn"))
    assert roles(arch) == roles(archscale.trace(apply, SHAPES, spec(2, 8)))


def test_unknown_accepts_two_values():
    """Another value is a ValueError that names the argument's values."""
    with pytest.raises(ValueError, match="warn"):
        archscale.trace(on_features, SHAPES, spec(2, 8), **unknown("ignore"))


def test_all_unsupported_leaves_are_named_at_once():
    """Three weights behind an unknown operation: one error names them all."""

    def apply(p, x):
        h = RELU(x @ p["stem"])
        for name in ("first", "second", "third"):
            h = RELU(h @ unfold(p[name]))
        return h @ p["out"]

    shapes = specs(stem=(8, 16), first=(16, 16), second=(16, 16), third=(16, 16), out=(16, 3))
    with pytest.raises(archscale.TraceError) as caught:
        archscale.trace(apply, shapes, spec(2, 8))
    message = str(caught.value)
    assert "unfold_weight" in message
    for name in ("first", "second", "third"):
        assert name in message


def test_all_leaves_without_a_use_are_named_at_once():
    """Two leaves that do nothing to the result: both in one error."""

    def apply(p, x):
        return RELU(x @ p["a"]) @ p["c"]

    shapes = specs(a=(8, 16), c=(16, 3), ghost=(4, 4), phantom=(7, 2))
    with pytest.raises(archscale.TraceError) as caught:
        archscale.trace(apply, shapes, spec(2, 8))
    assert "ghost" in str(caught.value)
    assert "phantom" in str(caught.value)


def test_weights_of_different_faults_are_named_at_once():
    """One leaf without a use, another behind an unknown operation: one error for both."""

    def apply(p, x):
        return RELU(x @ p["a"]) @ unfold(p["odd"]) @ p["c"]

    shapes = specs(a=(8, 16), odd=(16, 16), c=(16, 3), ghost=(4, 4))
    with pytest.raises(archscale.TraceError) as caught:
        archscale.trace(apply, shapes, spec(2, 8))
    assert "odd" in str(caught.value)
    assert "ghost" in str(caught.value)


def test_linear_and_usual_operations_are_known():
    """fft, cumulative sums, sorting, tops and segments are read without declared roles."""

    def apply(p, x):
        h = jnp.cumsum(x @ p["a"], axis=1) / 4
        h = jnp.fft.irfft(jnp.fft.rfft(h, axis=1), n=h.shape[1], axis=1)
        h = jnp.sort(RELU(h @ p["b"]), axis=1)[:, ::-1]
        return jax.lax.top_k(jnp.moveaxis(h, 1, -1), 2)[0].mean(-1) @ p["c"]

    model = Model(apply, SHAPES, (spec(2, 4, 8),))
    assert roles(model.trace()) == {"a": "input", "b": "hidden", "c": "readout"}


@pytest.mark.parametrize("derivative", ["grad", "jvp", "hessian"])
def test_a_derivative_inside_is_noted_with_a_way_on(derivative):
    """Forces of an energy, as in potentials: the architecture of the energy holds for both."""

    def energy(params, x):
        return jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"])

    def force(params, x):
        if derivative == "jvp":
            return jax.jvp(lambda x: energy(params, x), (x,), (x,))
        take = {"grad": jax.grad, "hessian": jax.hessian}[derivative]
        return take(energy, argnums=1)(params, x)

    params, x = specs(a=(3, 16), b=(16, 1)), spec(2, 3)
    (note,) = (one for one in archscale.trace(force, params, x).notes if "derivative" in one)
    assert "trace the function that is differentiated" in note
    plain = archscale.trace(energy, params, x)
    assert not plain.notes
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    archscale.scale_by_architecture(plain, plain, width_rule="adam").init(params)


def test_custom_derivatives_make_no_note():
    shapes = specs(a=(3, 16), b=(16, 1))
    apply = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    assert not archscale.trace(jax.checkpoint(apply), shapes, spec(2, 3)).notes


def test_an_error_of_the_function_says_how_it_was_called():
    """As where params and inputs have been swapped."""
    shapes, x = specs(a=(3, 16), b=(16, 1)), spec(2, 3)
    apply = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    with pytest.raises(TypeError) as caught:
        archscale.trace(apply, x, shapes)
    assert any("function(params, *inputs)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("function", [jax.nn.gelu, jnp.tanh, lambda h: h])
@pytest.mark.parametrize("centred", [True, False])
def test_what_is_added_behind_a_normalization_starts_at_zero(function, centred):
    """Whatever stands before it; what is added behind a gate alone may be anything."""

    def apply(params, x):
        h = function(x @ params["a"])
        if centred:
            h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]
        h = jax.nn.sigmoid((h + params["offset"]) @ params["b"]) + params["shift"]
        return h @ params["c"]

    shapes = specs(a=(8, 16), scale=(16,), offset=(16,), b=(16, 16), shift=(16,), c=(16, 3))
    found = archscale.trace(apply, shapes, spec(4, 8))
    assert {one.name for one in found.parameters if not one.start_known} == {"shift"}
