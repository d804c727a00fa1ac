"""What do measured rates cost, and would estimates be cheaper?

    python -m benchmarks.measured_groups

Times what `learning_rate="measured"` measures of a draw, the effects of three groups and of two
together, in units of a training step. Then on twenty networks the error of the effect of a group
estimated by random projections: with r normal, E⟨Jᵀr, u⟩² = ‖Ju‖², one backward pass a projection
for all groups at once. Goal of an estimate: an error of 10 % in fewer passes than there are groups.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._spaces import chain_string
from archscale_jax._trees import map_with_names, named_leaves
from archscale_jax.tuning._measured import GROUPS, Measurable, groups_of, measurer
from benchmarks import common
from experiments import default_networks, transfer_study
from experiments.lab import networks
from experiments.lab.common import first_batch

PROJECTIONS = (1, 4, 16, 64)
DAGS = transfer_study._DAGS
NETWORKS: list[dict[str, Any]] = [
    {"architecture": chain_string(depth), "optimizer": optimizer}
    for depth in (2, 4, 7, 10, 14)
    for optimizer in ("sgd", "adam")
] + [
    {"architecture": text, "optimizer": optimizer, "activation": activation, "normalization": norm}
    for text, optimizer, activation, norm in [
        (DAGS[0], "sgd", "relu", None),
        (DAGS[1], "adam", "gelu", None),
        (DAGS[2], "sgd", "relu", "layer"),
        (DAGS[3], "adam", "relu", None),
        (DAGS[4], "adam", "gelu", "layer"),
        (DAGS[5], "sgd", "relu", "batch"),
        (DAGS[6], "adam", "relu", "batch"),
        (DAGS[7], "sgd", "gelu", None),
        (DAGS[8], "sgd", "relu", "layer"),
        (DAGS[9], "sgd", "gelu", "batch"),
    ]
]


def main() -> None:
    rounds = common.sized(15, 2)
    times = {
        f"chain of {depth}, width {width}": cost(chain(depth, width), rounds)
        for depth, width in common.sized([(4, 128), (20, 128), (4, 512)], [(2, 16)])
    }
    times["GPT, 4 blocks, width 64"] = cost(gpt(*common.sized((4, 64), (1, 16))), rounds)
    found = [errors(one) for one in common.sized(NETWORKS, NETWORKS[:1])]
    rms = np.sqrt(np.mean(np.square(found), axis=(0, 1))).tolist()
    estimates = dict(zip(map(str, PROJECTIONS), rms, strict=True))
    heading = ["network", "step, ms", "a draw, in steps"]
    lines = [[name, f"{one['step, ms']:.1f}", f"{one['draw']:.1f}"] for name, one in times.items()]
    percent = ", ".join(f"{number}: {error:.0%}" for number, error in estimates.items())
    caption = (
        f"Median (quartiles). Relative error of an effect by number of projections: {percent}."
    )
    common.show("A draw of measured groups", [heading, *lines], caption)
    common.write_results("measured_groups", {"times": times, "errors": estimates})


def mlp(options: Mapping[str, Any], width: int = 128) -> tuple[Measurable, Any]:
    """Returns a network of the transfer studies, and its loss."""
    data = {"dataset": "fashion_mnist", "downscale": 1, "kernel_size": None, "width": width}
    network = transfer_study.build({**transfer_study.DEFAULTS, **data, **options})
    images, labels = first_batch(network.dataset, 256, 0)

    def draw(key: jax.Array) -> Any:
        return archscale.initialize(key, network.params, network.architecture, "target_in_degree")

    measurable = Measurable(
        network.apply, network.architecture, draw, network.optimizer(1.0), (images,)
    )
    return measurable, lambda logits: networks.cross_entropy(logits, labels)


def chain(depth: int, width: int) -> tuple[Measurable, Any]:
    return mlp({"architecture": chain_string(depth), "optimizer": "adam"}, width)


def gpt(depth: int, width: int) -> tuple[Measurable, Any]:
    family = default_networks.FAMILIES["gpt"]
    batch = family.batches(family.data(), 0, 0)
    plan = archscale.parametrize(
        family.build(depth, width), *family.inputs(batch), optimizer="adamw"
    )
    network = Measurable(
        plan.apply, plan.architecture, plan.init, plan.optimizer(1.0), family.inputs(batch)
    )
    return network, lambda outputs: family.loss(outputs, batch)


def cost(of: tuple[Measurable, Any], rounds: int) -> dict[str, Any]:
    """Times a draw against a training step, one after the other."""
    network, loss = of
    groups = groups_of(network.architecture)
    rows = [{one: 1.0 for one in groups if groups[one] == group} for group in GROUPS]
    measure, key = measurer(network, loss), jax.random.key(0)
    params = jax.jit(network.draw)(key)
    state = network.optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(lambda params: loss(network.apply(params, *network.inputs)))(params)
        updates, state = network.optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    programs = {"step": lambda: step(params, state), "draw": lambda: measure(key, rows)}
    times = common.alternate(programs, rounds=rounds)
    return {
        "step, ms": 1e3 * float(np.median(times["step"])),
        "draw": common.ratio(times["draw"], times["step"]),
    }


def errors(options: Mapping[str, Any]) -> list[list[float]]:
    """Returns the relative error of the effect of every group, by number of projections."""
    network, loss = mlp(options)
    groups = groups_of(network.architecture)

    def outputs(params: Any) -> tuple[jax.Array, jax.Array]:
        features = archscale.vertex_features(network.apply, params, *network.inputs)
        return features[max(features)], network.apply(params, *network.inputs)

    @jax.jit
    def sizes(key: jax.Array, keys: jax.Array) -> Any:
        params = network.draw(key)
        gradients = jax.grad(lambda params: loss(network.apply(params, *network.inputs)))(params)
        update, _ = network.optimizer.update(gradients, network.optimizer.init(params), params)
        values, pull = jax.vjp(outputs, params)

        def exact(group: str) -> jax.Array:
            part = map_with_names(lambda name, leaf: leaf * (groups[name] == group), update)
            changes = jax.jvp(outputs, (params,), (part,))[1]
            return jnp.sum(changes[group == "readout"] ** 2)

        def projected(key: jax.Array) -> dict[str, jax.Array]:
            found = {}
            for group in GROUPS:  # stem and hidden layers share a pass, which XLA takes once
                place = int(group == "readout")
                cotangents = [jnp.zeros_like(one) for one in values]
                cotangents[place] = jax.random.normal(key, values[place].shape)
                pulled, moved = (named_leaves(one) for one in (pull(tuple(cotangents))[0], update))
                found[group] = sum(
                    jnp.vdot(pulled[one], moved[one]) for one in moved if groups[one] == group
                )
            return found

        return {group: exact(group) for group in GROUPS}, jax.lax.map(projected, keys)

    keys = jax.random.split(jax.random.key(1), max(PROJECTIONS))
    exact, projected = sizes(jax.random.key(0), keys)
    return [
        [
            float(jnp.sqrt(jnp.mean(projected[group][:number] ** 2) / exact[group]) - 1)
            for number in PROJECTIONS
        ]
        for group in GROUPS
    ]


if __name__ == "__main__":
    common.run(main)
