"""Convolutions with gradients of their own, against `jax.lax.conv_general_dilated`."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies
from jax import lax

from archscale_jax._spaces import dag_graph
from experiments.lab.models import DagCNN
from experiments.lab.models.convolution import conv_general_dilated, convolution
from experiments.lab.training import cross_entropy

LAYOUT = ("NHWC", "HWIO", "NHWC")

quick = pytest.mark.quick_compilation  # not where it is compared or looked at


def plain(inputs, kernel, padding="SAME"):
    return lax.conv_general_dilated(inputs, kernel, (1, 1), padding, dimension_numbers=LAYOUT)


def normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(make):
    """A module with all parameters random, biases too."""
    module = nnx.eval_shape(make)
    values = jax.tree.map(lambda leaf: normal(0, *leaf.shape, dtype=leaf.dtype), nnx.state(module))
    nnx.update(module, values)
    return module


def derivatives(convolve, inputs, kernel, padding):
    """Output, change, gradients and the change of the gradients of a loss that is not linear."""
    bound = functools.partial(convolve, padding=padding)
    point = (inputs, kernel)
    directions = (normal(2, *inputs.shape), normal(3, *kernel.shape))
    gradient = jax.grad(lambda point: jnp.sum(jnp.sin(bound(*point))))
    return jax.jvp(bound, point, directions), jax.jvp(gradient, (point,), (directions,))


def same(found, expected, tolerance=1e-9):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, found, expected)


side = strategies.integers(1, 9)
kernel_side = strategies.integers(1, 7)
channels = strategies.integers(1, 3)


@quick
@hypothesis.given(
    image=strategies.tuples(strategies.integers(1, 4), side, side, channels),
    window=strategies.tuples(kernel_side, kernel_side, channels),
    padding=strategies.sampled_from(["SAME", "SAME_LOWER", ((6, 7), (8, 6))]),
)
@hypothesis.example(image=(3, 2, 3, 2), window=(5, 6, 3), padding="SAME")  # wider than the image
@hypothesis.example(image=(2, 9, 8, 2), window=(4, 3, 1), padding="VALID")
@hypothesis.example(image=(5, 180, 180, 1), window=(2, 3, 2), padding="SAME")  # two parts
@hypothesis.settings(max_examples=1)
def test_derivatives_of_every_kind(image, window, padding):
    with jax.enable_x64(True):
        inputs, kernel = normal(0, *image), normal(1, *window[:2], image[3], window[2])
        found, expected = (
            jax.jit(functools.partial(derivatives, convolve, padding=padding))(inputs, kernel)
            for convolve in (convolution, plain)
        )
        same(found, expected)


@quick
@pytest.mark.parametrize("axes", [(0, None), (2, 4)])
def test_maps_over_inputs_and_kernels(axes):
    with jax.enable_x64(True):
        arrays = [normal(0, 2, 5, 4, 3), normal(1, 3, 2, 3, 2)]
        for number, axis in enumerate(axes):
            if axis is not None:
                arrays[number] = jnp.stack([arrays[number], arrays[number] ** 2], axis=axis)
        found, expected = (
            jax.jit(jax.vmap(functools.partial(derivatives, convolve, padding="SAME"), axes))(
                *arrays
            )
            for convolve in (convolution, plain)
        )
        same(found, expected)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(convolve, inputs, kernel, weights):
    output, pull = jax.vjp(convolve, inputs, kernel)
    return output, *pull(weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_half_precision_is_as_exact_as_that_of_jax(dtype):
    with jax.enable_x64(True):
        shapes = [(4, 9, 8, 8), (3, 3, 8, 5), (4, 9, 8, 5)]
        arrays = [normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
        exact = with_gradients(plain, *(array.astype(jnp.float64) for array in arrays))
        errors = []
        for convolve in (convolution, plain):
            found = with_gradients(convolve, *arrays)
            assert all(array.dtype == dtype for array in found)
            pairs = zip(found, exact, strict=True)
            errors.append([np.max(np.abs(one.astype(np.float64) - two)) for one, two in pairs])
    assert np.all(np.array(errors[0]) <= 1.5 * np.array(errors[1]))


def test_has_the_fast_layout_in_a_loop():
    def descend(kernel, inputs):
        def step(carry, _):
            gradients = jax.grad(lambda pair: jnp.sum(jnp.sin(convolution(*pair))))(carry)
            return jax.tree.map(jnp.subtract, carry, gradients), None

        return lax.scan(step, (inputs, kernel), length=2)[0]

    program = jax.jit(descend).lower(normal(0, 3, 3, 4, 4), normal(1, 8, 6, 6, 4)).compile()
    layouts = re.findall(r" convolution\(.*dim_labels=([^, ]*)", str(program.as_text()))
    assert layouts == ["b01f_01io->b01f"] * 3


@quick
@pytest.mark.parametrize(
    "options",
    [
        {"padding": ((1, 0), (2, 3)), "use_bias": False},
        {"precision": "highest", "preferred_element_type": jnp.float32},
        {"preferred_element_type": jnp.float64},
        {"strides": (1, 3), "padding": 1},
        {"kernel_dilation": 2},
        {"input_dilation": (2, 1), "padding": 1},
        {"feature_group_count": 2},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_a_layer_with_it_is_a_layer_without(options):
    with jax.enable_x64(True):
        options = {"param_dtype": jnp.float32, **options}
        layer = filled(lambda: nnx.Conv(4, 6, (3, 2), rngs=nnx.Rngs(0), **options))
        images = normal(0, 2, 3, 7, 6, 4, dtype=jnp.float32)  # two axes of batches

        def output_and_gradient():
            graphdef, params = nnx.split(layer)

            def output(params):
                return nnx.merge(graphdef, params)(images)

            def loss(params):
                return jnp.sum(jnp.sin(output(params)), dtype=jnp.float32)

            return jax.jit(lambda params: (output(params), jax.grad(loss)(params)))(params)

        expected = output_and_gradient()
        layer.conv_general_dilated = conv_general_dilated
        found = output_and_gradient()
        assert found[0].dtype == expected[0].dtype
        same(found, expected, 0.05 if options["param_dtype"] == jnp.bfloat16 else 1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_numbers_of_dimensions(rank):
    arguments = normal(0, 2, 2, *[4] * rank), normal(1, 3, 2, *[3] * rank), (1,) * rank, "VALID"
    expected = lax.conv_general_dilated(*arguments)
    np.testing.assert_array_equal(conv_general_dilated(*arguments), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
@pytest.mark.parametrize("layout", [None, LAYOUT, ("NHWC", "OIHW", "NHWC")])
def test_other_layouts_and_integers(dtype, layout):
    images, kernel = normal(0, 2, 3, 3, 3) * 9, normal(1, 3, 3, 3, 3) * 9
    arguments = (images.astype(dtype), kernel.astype(dtype), (1, 1), "SAME", None, None, layout)
    expected = lax.conv_general_dilated(*arguments)
    np.testing.assert_array_equal(conv_general_dilated(*arguments), expected)


@quick
def test_a_network_trains_as_with_that_of_jax():
    with jax.enable_x64(True):
        graph = dag_graph("2_12", kernel_size=3)
        network = filled(lambda: DagCNN(graph, 1, 4, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
        batch = normal(0, 4, 5, 6, 1), jnp.array([0, 1, 2, 1])

        def loss(params, graphdef, rest):
            return cross_entropy(graphdef, params, rest, *batch, train=True)[0]

        def loss_and_gradient():
            graphdef, params, rest = nnx.split(network, nnx.Param, ...)
            return jax.jit(jax.value_and_grad(lambda params: loss(params, graphdef, rest)))(params)

        found = loss_and_gradient()
        for layer in (network.stem, *network.layers.values()):
            assert isinstance(layer, nnx.Conv)
            layer.conv_general_dilated = lax.conv_general_dilated
        same(found, loss_and_gradient())
