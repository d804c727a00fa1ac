"""How far bfloat16, mixed precision and float16 are from float32: measurements and training.

    python -m benchmarks.precision

On an MLP and a CNN of one architecture, Fashion-MNIST, three seeds: the largest relative difference
from float32 over vertices, layers or tensors and over seeds. `mixed` computes in bfloat16 with
float32 parameters; the others have parameters of their dtype, drawn in float32 and rounded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

import archscale_jax as archscale
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.solve import solve
from benchmarks import common
from experiments.lab import datasets, training
from experiments.lab.models import create_network

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "fashion_mnist", datasets.DATASET_NAMES, "Data set.")
flags.DEFINE_string("data_dir", None, "Folder of the data set.")
flags.DEFINE_string("architecture", "2_02_002", "DAG string.")
flags.DEFINE_integer("num_seeds", 3, "Seeds.", lower_bound=1)
flags.DEFINE_integer("steps", 200, "Updates of a training.", lower_bound=10)
flags.DEFINE_float("rate", 0.05, "Learning rate.")

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "mixed": {"dtype": jnp.bfloat16},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16, "param_dtype": jnp.float16},
}
NETWORKS = {"MLP": (None, 64, 1024, 1), "CNN": (3, 8, 128, 2)}
"""Kernel size, width, examples of a batch, and by how much images are made smaller."""


def main() -> None:
    rows = []
    for name, sizes in NETWORKS.items():
        exact = None
        for precision, dtypes in PRECISIONS.items():
            found = _measured(sizes, dtypes)
            if exact is None:
                exact = found
                continue
            differences = {
                what: max(_difference(*both) for both in zip(found[what], exact[what], strict=True))
                for what in exact
            }
            rows.append({"network": name, "precision": precision, **differences})
    what = list(rows[0])
    lines = [[f"{row[key]:.2%}" if key in row else "–" for key in what[2:]] for row in rows]
    begins = [[row["network"], row["precision"]] for row in rows]
    common.show(
        "Largest relative difference from float32",
        [what, *(begin + line for begin, line in zip(begins, lines, strict=True))],
    )
    common.write_results("precision", {"rows": rows})


def _difference(found, exact) -> float:
    found, exact = (np.asarray(one, np.float64) for one in (found, exact))
    return float(np.max(np.abs(found - exact) / np.abs(exact)))


def _measured(sizes, dtypes) -> dict[str, list[np.ndarray]]:
    """Every quantity, one array a seed."""
    kernel_size, width, count, factor = sizes
    data = datasets.downscale(datasets.load(FLAGS.dataset, data_dir=FLAGS.data_dir), factor)
    graph = archscale.dag_graph(FLAGS.architecture, kernel_size=kernel_size)
    height, side, channels = data.train_images.shape[1:]
    image = (height, side, channels)
    make = functools.partial(create_network, graph, image, width, data.num_classes)
    network = make(rngs=nnx.Rngs(0), **dtypes)
    graphdef, shapes, rest = nnx.split(network, nnx.Param, ...)
    architecture = network.architecture()

    def loss(params, batch):
        return training.cross_entropy(graphdef, params, rest, *batch, train=True)[0]

    def features(params, batch):
        return training.vertex_features(graphdef, params, rest, batch[0])

    size = jax.jit(
        lambda params, batch: archscale.measure_update(
            features, loss, params, batch, optax.sgd(1.0)
        )
    )
    largest = jax.jit(lambda params, batch: archscale.tuning.sharpness(loss, params, batch))
    groups, parts = None, 3 * common.sized(20, 1)  # half-batches of GradInit's iterations
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(common.sized(FLAGS.num_seeds, 1)):
        keys = jax.random.split(jax.random.key(seed))
        params = archscale.initialize(keys[0], shapes, architecture)
        chosen = jax.random.permutation(keys[1], len(data.train_images))
        batch = data.train_images[chosen[:count]], data.train_labels[chosen[:count]]
        if groups is None:
            every = archscale.contrib.find_neuron_groups(loss, params, batch)
            groups = [one for one in every if not one.blocker]
        pairs = measure(loss, params, [batch], groups)
        neurons = solve(params, pairs, groups)
        bottlenecks = archscale.bottleneck(loss, params, [batch])
        halves = [
            (data.train_images[part], data.train_labels[part])
            for part in np.asarray(chosen)[: 64 * parts].reshape(parts, 64)
        ]
        _, record = archscale.gradinit(loss, params, halves)
        quantities = {
            "update size": size(params, batch).absolute,
            "bottleneck": [one.absolute for one in bottlenecks.values()],
            "largest new neuron": [one.singular_values[0] for one in neurons.values()],
            "gradient norm": record.gradient_norm[:1],
            "learned scale": [one[-1] for one in record.multipliers.values()],
            "training loss": [_trained(graphdef, params, rest, data, keys[1])],
        }
        if kernel_size is None:
            quantities["sharpness"] = [largest(params, batch)]
        for what, values in quantities.items():
            found.setdefault(what, []).append(np.asarray(values, np.float64))
    return found


def _trained(graphdef, params, rest, data, key) -> float:
    """The mean loss over the last tenth of the updates."""
    optimizer = optax.sgd(FLAGS.rate)
    state = training.create_train_state(params, rest, optimizer, key)
    _, losses = training.jitted_train_epoch(
        state, data.train_images, data.train_labels, graphdef=graphdef, optimizer=optimizer,
        batch_size=64, max_steps=common.sized(FLAGS.steps, 10),
    )  # fmt: skip
    return float(jnp.mean(losses[-(len(losses) // 10) :]))


if __name__ == "__main__":
    common.run(main)
