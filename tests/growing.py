"""Small networks that can grow, in float64, for the tests of growth.

Built once a process, so that tests share what is compiled for their losses.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import archscale_jax as archscale
from experiments.lab.models import create_network


class Network(NamedTuple):
    """A loss of params and a batch, its outputs, and where it starts."""

    loss: Callable[[Any, Any], jax.Array]
    outputs: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))
        for name, shape in shapes.items()
    }


def squared(outputs: Callable) -> Callable:
    """The mean over examples of the squared distance to targets."""

    def loss(params, batch):
        error = outputs(params, batch[0]) - batch[1]
        return jnp.mean(jnp.sum(jnp.square(error), axis=tuple(range(1, error.ndim))))

    return loss


def data(seed: int, count: int, inputs: tuple[int, ...], outputs: int) -> tuple:
    generator = np.random.default_rng(seed)
    sizes = (count, *inputs), (count, outputs)
    return tuple(jnp.asarray(generator.normal(size=size)) for size in sizes)


@functools.cache
def chain(activation=jnp.tanh, count: int = 40) -> Network:
    """Three dense layers."""

    def outputs(params, inputs):
        hidden = activation(inputs @ params["w1"] + params["b1"])
        return activation(hidden @ params["w2"] + params["b2"]) @ params["w3"]

    params = draw(0, w1=(5, 4), b1=(4,), w2=(4, 3), b2=(3,), w3=(3, 2))
    return Network(squared(outputs), outputs, params, data(1, count, (5,), 2))


def convolve(images, kernel, stride=1):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.cache
def flattened(count: int = 12) -> Network:
    """Two convolutions, the second with stride 2, whose positions one dense layer reads."""

    def outputs(params, inputs):
        hidden = jnp.tanh(convolve(inputs, params["k1"]) + params["b1"])
        hidden = jnp.tanh(convolve(hidden, params["k2"], 2))
        return hidden.reshape(len(hidden), -1) @ params["w"]

    params = draw(0, k1=(3, 3, 2, 3), b1=(3,), k2=(3, 3, 3, 2), w=(8, 4))
    return Network(squared(outputs), outputs, params, data(1, count, (4, 4, 2), 4))


@functools.cache
def residual(count: int = 12) -> Network:
    """A stem, a block on a skip, and a block behind a stride with a projection; read as a mean."""

    def outputs(params, inputs):
        first = convolve(inputs, params["stem"])
        second = first + convolve(jnp.tanh(convolve(jnp.tanh(first), params["a1"])), params["a2"])
        active = jnp.tanh(second)
        skip = convolve(active, params["skip"], 2)
        third = skip + convolve(jnp.tanh(convolve(active, params["b1"], 2)), params["b2"])
        return jnp.mean(jnp.tanh(third), axis=(1, 2)) @ params["w"] + params["bias"]

    params = draw(
        0, stem=(3, 3, 2, 3), a1=(3, 3, 3, 4), a2=(3, 3, 4, 3), skip=(1, 1, 3, 2),
        b1=(3, 3, 3, 2), b2=(3, 3, 2, 2), w=(2, 3), bias=(3,),
    )  # fmt: skip
    return Network(squared(outputs), outputs, params, data(1, count, (4, 4, 2), 3))


@functools.cache
def tokens(count: int = 12) -> Network:
    """A feed-forward block on tokens, a scale and a learned position on its neurons."""

    def outputs(params, inputs):
        hidden = (inputs @ params["w1"]) * params["scale"] + params["position"]
        return jnp.mean(inputs + jnp.tanh(hidden) @ params["w2"], axis=1)

    params = draw(0, w1=(4, 3), w2=(3, 4)) | {
        "scale": jnp.array([0.5, 1.5, 1.0]),
        "position": jnp.zeros((5, 3)),
    }
    return Network(squared(outputs), outputs, params, data(1, count, (5, 4), 4))


def batch_norm(features, params, name):
    """Over examples and positions, with a scale and an offset."""
    axes = tuple(range(features.ndim - 1))
    centred = features - jnp.mean(features, axes)
    standard = centred / jnp.sqrt(jnp.mean(jnp.square(centred), axes) + 1e-5)
    return standard * params[f"{name}_scale"] + params[f"{name}_offset"]


def scales(seed: int, **counts: int) -> dict[str, jax.Array]:
    """Scales that differ, and offsets, of batch normalizations of so many features."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, count in counts.items():
        found[f"{name}_scale"] = jnp.asarray(generator.uniform(0.5, 1.5, count))
        found[f"{name}_offset"] = jnp.asarray(generator.normal(size=count) / 4)
    return found


@functools.cache
def normalized(activation=jnp.tanh, count: int = 40) -> Network:
    """Two hidden dense layers, each behind a batch normalization, the first with a bias too."""

    def outputs(params, inputs):
        hidden = activation(batch_norm(inputs @ params["w1"] + params["b1"], params, "n1"))
        return activation(batch_norm(hidden @ params["w2"], params, "n2")) @ params["w3"]

    params = draw(0, w1=(5, 4), b1=(4,), w2=(4, 3), w3=(3, 2)) | scales(2, n1=4, n2=3)
    inputs, targets = data(1, count, (5,), 2)
    return Network(squared(outputs), outputs, params, (inputs + 1, targets))


@functools.cache
def normalized_residual(activation=jnp.tanh, count: int = 12) -> Network:
    """A stem and a block of convolutions and batch normalizations, with a stride.

    As in ResNet, activations stand behind sums, each layer has a normalization of its own, and the
    projection beside the block does too.
    """

    def outputs(params, inputs):
        def layer(features, name, stride=1):
            return batch_norm(convolve(features, params[name], stride), params, f"{name}_norm")

        first = activation(layer(inputs, "stem"))
        second = layer(first, "skip", 2) + layer(activation(layer(first, "b1", 2)), "b2")
        return jnp.mean(activation(second), axis=(1, 2)) @ params["w"] + params["bias"]

    params = draw(
        0, stem=(3, 3, 2, 3), skip=(1, 1, 3, 2), b1=(3, 3, 3, 2), b2=(3, 3, 2, 2), w=(2, 3),
        bias=(3,),
    ) | scales(2, stem_norm=3, skip_norm=2, b1_norm=2, b2_norm=2)  # fmt: skip
    inputs, targets = data(1, count, (4, 4, 2), 3)
    return Network(squared(outputs), outputs, params, (inputs + 1, targets))


@functools.cache
def gated(activation=jax.nn.silu, count: int = 12) -> Network:
    """A gated feed-forward block on normalized tokens, with biases and a scale on its neurons."""

    def outputs(params, inputs):
        x = inputs / jnp.sqrt(jnp.mean(jnp.square(inputs), -1, keepdims=True))
        gate = activation(x @ params["gate"] + params["gate_bias"])
        hidden = gate * (x @ params["up"] + params["up_bias"]) * params["scale"]
        return jnp.mean(inputs + hidden @ params["down"], axis=1)

    params = draw(0, gate=(4, 3), gate_bias=(3,), up=(4, 3), up_bias=(3,), down=(3, 4)) | {
        "scale": jnp.array([0.5, 1.5, 1.0])
    }
    return Network(squared(outputs), outputs, params, data(1, count, (5, 4), 4))


@functools.cache
def graph(text: str, kernel_size: int | None, count: int = 30, **options) -> Network:
    """A `DagMLP` or `DagCNN` with GELU."""
    model = create_network(
        archscale.dag_graph(text, kernel_size=kernel_size), (4, 4, 1), 3, 3,
        activation="gelu", param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options,
    )  # fmt: skip
    graphdef, params = nnx.split(model)

    def outputs(params, inputs):
        return nnx.merge(graphdef, params)(inputs)

    def loss(params, batch):
        logits = outputs(params, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    generator = np.random.default_rng(1)
    batch = jnp.asarray(generator.normal(size=(count, 4, 4, 1))), jnp.arange(count) % 3
    return Network(loss, outputs, params, batch)


NETWORKS: dict[str, Callable[[], Network]] = {
    "chain": chain,
    "flattened": flattened,
    "tokens": tokens,
    "gated": gated,
    "normalized": normalized,
    "normalized_residual": normalized_residual,
    "dag_mlp": lambda: graph("2_12", None),
    "dag_cnn": lambda: graph("2_22", 3),
}


_FOUND: dict[Callable, list[archscale.contrib.NeuronGroup]] = {}


def growable(network: Network) -> list[archscale.contrib.NeuronGroup]:
    """The groups that can grow; found once for every loss."""
    if network.loss not in _FOUND:
        found = archscale.contrib.find_neuron_groups(network.loss, network.params, network.batch)
        _FOUND[network.loss] = [one for one in found if one.blocker is None]
    return _FOUND[network.loss]
