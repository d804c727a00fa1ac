"""One program for a space of architectures, or one for each of its networks?

The part of `benchmarks.lr_cost` about compiling: the networks of a space, each trained by a program
of its own, which all rates and seeds share, and by one program for all with its operators chosen at
run time. Both must give the same losses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.table import Table

from archscale_jax._trees import named_leaves
from benchmarks import common
from experiments import transfer_study as study
from experiments.lab import training
from experiments.lab.networks import Network

SPACE = (6, 5)  # networks and their vertices
RATE = 0.1  # where both are compared; a wrong update shows
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # the rate is state: one program


def space_loss(params, operators, images, labels):
    """The loss of `DagMLP` on any graph of a space.

    Args:
      params: `kernel_0`, `bias_0` of the stem, `kernels` [E, width, width] and `biases` [E, width]
        of the edges of the complete graph by receiver and sender, `kernel_1`, `bias_1` of the
        readout.
      operators: int32 [E] by the characters of DAG strings: zero, skip, weight.
    """
    branches = (
        lambda features, activated, kernel, bias: jnp.zeros_like(features),
        lambda features, activated, kernel, bias: features,
        lambda features, activated, kernel, bias: activated @ kernel + bias,
    )
    first = images.reshape(len(images), -1) @ params["kernel_0"] + params["bias_0"]
    vertices, activated, edge = [first], [jax.nn.relu(first)], 0
    while edge < len(operators):
        total = jnp.zeros_like(first)
        for sender in range(len(vertices)):
            weights = params["kernels"][edge], params["biases"][edge]
            total += lax.switch(
                operators[edge], branches, vertices[sender], activated[sender], *weights
            )
            edge += 1
        vertices.append(total)
        activated.append(jax.nn.relu(total))
    logits = activated[-1] @ params["kernel_1"] + params["bias_1"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def space_epoch(params, operators, rate, images, labels, batches):
    """Trains any graph of a space; returns the loss of every update, taken before it."""

    def step(params, batch):
        loss, gradients = jax.value_and_grad(space_loss)(
            params, operators, images[batch], labels[batch]
        )
        return jax.tree.map(lambda value, slope: value - rate * slope, params, gradients), loss

    return lax.scan(step, params, batches)[1]


def cost_of_compiling(settings: study.Trial, data_dir: str | None) -> dict[str, Any]:
    """Compares a program for each network with one for all, over the networks of a space."""
    width, batch_size = settings["width"], settings["batch_size"]
    texts = study.random_dags(SPACE[0], SPACE[1:], 3000)
    dataset = study.load(settings["dataset"], data_dir, 1)
    data = (dataset.train_images, dataset.train_labels)
    order = np.random.default_rng(0).permutation(len(data[0]))[: settings["steps"] * batch_size]
    batches = jnp.asarray(order.reshape(-1, batch_size))
    networks = {}
    space: Any = None
    space_cost: dict[str, Any] = {}
    for text in texts:
        network = study.build(settings | {"architecture": text}, data_dir)
        state = training.create_train_state(
            network.draw(0), network.model_state, SGD, jax.random.key(0)
        )
        arguments = space_params(state.params, SPACE[1], width)
        operators = jnp.asarray([int(character) for character in text.replace("_", "")])
        if space is None:
            lowered = functools.partial(space_epoch.lower, arguments, operators, jnp.float32(0))
            space, space_cost = common.compiled(lambda lower=lowered: lower(*data, batches))
        lower = functools.partial(
            training.jitted_train_batches.lower, state, *data, batches, jnp.int32(0)
        )
        own, cost = common.compiled(
            lambda lower=lower, graphdef=network.graphdef: lower(graphdef=graphdef, optimizer=SGD)
        )
        starts = [_start(network, rate, seed) for rate in (RATE / 2, RATE) for seed in (1, 0)]
        with common.Compilations() as further:
            losses = [own(start, *data, batches, jnp.int32(0))[1] for start in starts][-1]
        shared = functools.partial(space, arguments, operators, jnp.float32(RATE), *data, batches)
        difference = np.abs(np.asarray(shared()) / np.asarray(losses) - 1)
        if not difference[:5].max() < 1e-5:
            raise RuntimeError(f"{text}: losses of both programs differ by {difference[:5]}")
        times = common.alternate(
            {
                "own": functools.partial(own, starts[-1], *data, batches, jnp.int32(0)),
                "space": shared,
            },
            rounds=5,
        )
        networks[text] = cost | {
            "compilations_for_other_rates_and_seeds": further.count,
            "largest_difference_of_losses": difference.max(),
            "epoch_seconds": {name: common.spread(values) for name, values in times.items()},
        }
    ahead = sum(one["compile_seconds"] for one in networks.values()) - space_cost["compile_seconds"]
    saved = sum(
        one["epoch_seconds"]["space"].median - one["epoch_seconds"]["own"].median
        for one in networks.values()
    )
    return {
        "networks": networks,
        "space": space_cost,
        "seconds_saved_by_an_epoch_of_each": saved,
        # 0: specialising is ahead from the start; None: it never gets ahead.
        "break_even_epochs_of_each": max(ahead, 0.0) / saved if saved > 0 else None,
    }


def space_params(params, vertices: int, width: int) -> dict[str, jax.Array]:
    """Puts the weights of a `DagMLP` into those of the complete graph; the others are 0."""
    leaves = named_leaves(params)
    edges = [f"{sender}_{vertex}" for vertex in range(1, vertices) for sender in range(vertex)]

    def stacked(leaf: str, shape: tuple[int, ...]) -> jax.Array:
        names = (f"layers/{edge}/{leaf}" for edge in edges)
        return jnp.stack([leaves[name] if name in leaves else jnp.zeros(shape) for name in names])

    ends = {
        f"{leaf}_{number}": leaves[f"{layer}/{leaf}"]
        for number, layer in enumerate(("stem", "readout"))
        for leaf in ("kernel", "bias")
    }
    return ends | {
        "kernels": stacked("kernel", (width, width)),
        "biases": stacked("bias", (width,)),
    }


def _start(network: Network, rate: float, seed: int) -> training.TrainState:
    state = training.create_train_state(
        network.draw(seed), network.model_state, SGD, jax.random.key(0)
    )
    optimizer_state = optax.tree.set(state.optimizer_state, learning_rate=jnp.float32(rate))
    return state._replace(optimizer_state=optimizer_state)


def space_table(results: dict[str, Any]) -> Table:
    """Returns the table of `cost_of_compiling`."""
    networks = results["networks"].values()
    own = sum(one["compilations"] for one in networks)
    epochs = results["break_even_epochs_of_each"]
    table = Table(
        title="A program for each network, or one for its space",
        caption=f"{own} compilations for {len(networks)} networks, "
        f"{sum(one['compilations_for_other_rates_and_seeds'] for one in networks)} more for other "
        f"rates and seeds; {results['space']['compilations']} for the space. Specialising is ahead "
        + ("never." if epochs is None else f"from {epochs:.2g} epochs of each network on."),
    )
    for column in ("network", "compiling, s", "epoch, own, s", "epoch, space, s", "largest diff."):
        table.add_column(column, justify="right")
    for text, one in results["networks"].items():
        times = [f"{one['epoch_seconds'][name]:.3g}" for name in ("own", "space")]
        difference = f"{one['largest_difference_of_losses']:.1e}"
        table.add_row(text, f"{one['compile_seconds']:.2f}", *times, difference)
    table.add_row("the space", f"{results['space']['compile_seconds']:.2f}", "", "", "")
    return table
