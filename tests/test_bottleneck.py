"""Expressivity bottlenecks against dense least squares on the gradients of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.contrib._growth.bottleneck import bottleneck, layer_statistics
from archscale_jax.tracing.layers import layer_kinds
from experiments.lab import training
from experiments.lab.models import create_network

pytestmark = pytest.mark.quick_compilation


def network(text, kernel_size=None, width=4, image=(5, 5, 2), **options):
    model = create_network(
        archscale.dag_graph(text, kernel_size=kernel_size), image, width, 3,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip
    graphdef, params, state = nnx.split(model, nnx.Param, ...)

    def loss(params, batch):
        return training.cross_entropy(graphdef, params, state, *batch, train=True)[0]

    return loss, params


def batch_of(count, seed=0, image=(5, 5, 2)):
    generator = np.random.default_rng(seed)
    images, labels = generator.normal(size=(count, *image)), generator.integers(0, 3, count)
    return jnp.asarray(images), jnp.asarray(labels)


def plain_mlp(params, inputs):
    """A chain whose layers' inputs and output gradients are found by hand."""
    first = jnp.tanh(inputs @ params["w1"] + params["b1"])
    return first, first @ params["w2"]


def test_a_chain_by_hand():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        params = {
            "w1": generator.normal(size=(6, 4)),
            "b1": generator.normal(size=4),
            "w2": generator.normal(size=(4, 5)),
        }
        inputs, targets = generator.normal(size=(40, 6)), generator.normal(size=(40, 5))

        def loss(params, batch):
            return jnp.mean(jnp.sum(jnp.square(plain_mlp(params, batch[0])[1] - batch[1]), axis=1))

        halves = [(inputs[:16], targets[:16]), (inputs[16:], targets[16:])]
        found = bottleneck(loss, jax.tree.map(jnp.asarray, params), halves, cutoff=1e-12)

        hidden, outputs = plain_mlp(params, inputs)
        last = -2 * (outputs - targets)  # of every example
        first = (last @ params["w2"].T) * (1 - hidden**2)
        ones = np.ones((40, 1))
        for name, rows, wanted in (
            ("w1", np.hstack([inputs, ones]), first),
            ("w2", np.asarray(hidden), last),
        ):
            expected, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
            update = found[name].update
            stacked = np.vstack([update["w1"], update["b1"]]) if name == "w1" else update["w2"]
            np.testing.assert_allclose(stacked, expected, rtol=1e-8)
            rest = np.sum((wanted - rows @ expected) ** 2) / 40
            np.testing.assert_allclose(found[name].absolute, rest, rtol=1e-8)
            np.testing.assert_allclose(
                found[name].relative, rest * 40 / np.sum(np.square(wanted)), rtol=1e-8
            )
        assert (found["w1"].rank, found["w2"].rank) == (7, 4)


@pytest.mark.parametrize("kernel_size", [None, 3])
def test_sums_of_inputs_and_descents_are_the_gradient(kernel_size):
    with jax.enable_x64(True):
        loss, params = network("2_12", kernel_size, param_dtype=jnp.float64)
        batch = batch_of(30)
        kinds = layer_kinds(loss, params, batch)
        found = layer_statistics(params, batch, loss_fn=loss, kinds=kinds)
        gradient = named_leaves(jax.jit(jax.grad(loss))(params, batch))
        assert {name for kind in kinds for name in (kind.weight, kind.bias)} == set(gradient)
        for kind in kinds:
            assert kind.bias is not None
            outputs = gradient[kind.weight].shape[-1]
            weight, bias = (np.asarray(gradient[name]) for name in (kind.weight, kind.bias))
            expected = -30 * np.concatenate([weight.reshape(-1, outputs), bias[None]])
            np.testing.assert_allclose(found[kind.weight].targets, expected, atol=1e-11)


def test_convolutions_are_dense_layers_on_patches():
    with jax.enable_x64(True):
        generator = np.random.default_rng(1)
        kernel, bias = generator.normal(size=(3, 2, 2, 3)), generator.normal(size=3)
        images = generator.normal(size=(6, 7, 8, 2))
        wanted = generator.normal(size=(6, 4, 7, 3))
        options = {"window_strides": (2, 1), "padding": ((1, 1), (0, 1)), "rhs_dilation": (1, 2)}

        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
            )

        shape = convolve(images, kernel).shape
        wanted = generator.normal(size=shape)

        def loss(params, batch):
            output = convolve(batch[0], params["kernel"]) + params["bias"]
            return jnp.mean(jnp.sum(output * -batch[1], axis=(1, 2, 3)))  # V is batch[1]

        params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        found = bottleneck(loss, params, [(images, wanted)], cutoff=1e-12)["kernel"]
        # Row by row: how every output answers to every entry of the kernel, by autodiff.
        jacobian = jax.jacobian(lambda kernel: convolve(images, kernel)[..., 0])(kernel)
        patches = jacobian[..., 0].reshape(-1, kernel[..., 0].size)
        rows = np.hstack([patches, np.ones((len(patches), 1))])
        expected, *_ = np.linalg.lstsq(rows, wanted.reshape(-1, 3), rcond=None)
        np.testing.assert_allclose(found.update["kernel"].reshape(-1, 3), expected[:-1], atol=1e-9)
        np.testing.assert_allclose(found.update["bias"], expected[-1], atol=1e-9)
        rest = np.sum((wanted.reshape(-1, 3) - rows @ expected) ** 2) / 6
        np.testing.assert_allclose(found.absolute, rest, rtol=1e-9)


def test_batches_add_up():
    loss, params = network("2_02", 3)
    images, labels = batch_of(24)
    whole = bottleneck(loss, params, [(images, labels)])
    parts = bottleneck(loss, params, [(images[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)])
    for name, one in whole.items():
        np.testing.assert_allclose(parts[name].absolute, one.absolute, rtol=1e-3)


def test_no_bottleneck_where_the_target_can_be_expressed():
    generator = np.random.default_rng(2)
    inputs = generator.normal(size=(50, 4)).astype(np.float32)
    teacher = generator.normal(size=(4, 3)).astype(np.float32)

    def loss(params, batch):
        return jnp.mean(jnp.sum(jnp.square(batch[0] @ params["w"] - batch[1]), axis=1)) / 2

    params = {"w": jnp.zeros((4, 3))}
    found = bottleneck(loss, params, [(inputs, inputs @ teacher)])["w"]
    assert found.relative < 1e-6
    np.testing.assert_allclose(found.update["w"], teacher, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_normalization_is_part_of_the_function(normalization):
    loss, params = network("2_02", normalization=normalization)
    found = bottleneck(loss, params, [batch_of(16)])
    assert set(found) == {"stem/kernel", "layers/0_1/kernel", "layers/1_2/kernel", "readout/kernel"}
    assert all(0 <= one.relative <= 1 for one in found.values())


def test_layers_that_it_cannot_read_are_named():
    def transposed(params, batch):
        return jnp.mean(batch @ params["w"].T)

    with pytest.raises(archscale.TraceError, match="weight 'w' .* is transposed or changed"):
        bottleneck(transposed, {"w": jnp.ones((3, 3))}, [jnp.ones((2, 3))])

    def shared(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["w"]) @ params["w"])

    with pytest.raises(archscale.TraceError, match="2 layers share the weight 'w'"):
        bottleneck(shared, {"w": jnp.ones((3, 3))}, [jnp.ones((2, 3))])

    def heads(params, batch):
        return jnp.mean(jnp.einsum("ni,iho->nho", batch, params["w"]))

    with pytest.raises(archscale.TraceError, match=r"layer of 'w' .* accepted are x @ W"):
        bottleneck(heads, {"w": jnp.ones((3, 2, 3))}, [jnp.ones((2, 3))])

    with pytest.raises(ValueError, match="batches is empty; bottleneck needs"):
        bottleneck(shared, {"w": jnp.ones((3, 3))}, [])

    def overflowing(params, batch):
        logits = batch @ params["w"] * jnp.inf
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(2, int)).mean()

    with pytest.raises(ValueError, match="not finite"):
        bottleneck(overflowing, {"w": jnp.ones((3, 3))}, [jnp.ones((2, 3))])
