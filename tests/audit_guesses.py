"""Networks and hand-made optimizers for audits without a plan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import archscale_jax as archscale
from archscale_jax._architecture import Architecture, Role
from archscale_jax._trees import PyTree, map_with_names
from tests.audit_networks import CLASSES, KEY, cross_entropy, decoder

WIDER = 4
"""Times the width of the base."""


def resnet(width: int) -> Any:
    """A residual block with batch normalization on images of 6 × 6."""

    def norm(x, params):
        y = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        return params["scale"] * y + params["bias"]

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def apply(params, x):
        x = conv(x, params["stem"])
        own = params["block"]
        y = jax.nn.relu(norm(conv(x, own["conv_0"]), own["norm_0"]))
        x = jax.nn.relu(x + norm(conv(y, own["conv_1"]), own["norm_1"]))
        return x.mean((1, 2)) @ params["readout"]["kernel"] + params["readout"]["bias"]

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    block = {f"conv_{one}": shape(3, 3, width, width) for one in range(2)}
    block |= {f"norm_{one}": {"scale": shape(width), "bias": shape(width)} for one in range(2)}
    readout = {"kernel": shape(width, CLASSES), "bias": shape(CLASSES)}
    return apply, {"stem": shape(3, 3, 3, width), "block": block, "readout": readout}


def _batch(name: str) -> tuple[jax.Array, jax.Array]:
    if name == "resnet":
        labels = jax.random.randint(jax.random.key(2), (16,), 0, CLASSES)
        return jax.random.normal(jax.random.key(1), (16, 6, 6, 3)), labels
    tokens = jax.random.randint(jax.random.key(1), (8, 9), 0, 11)
    return tokens[:, :-1], tokens[:, 1:]


MODELS: dict[str, Any] = {"decoder": decoder, "resnet": resnet}


@functools.cache
def plan_of(name: str, optimizer: str) -> archscale.Parametrization:
    model = MODELS[name]
    return archscale.parametrize(
        model(8 * WIDER), _batch(name)[0], base=model(8), optimizer=optimizer
    )


def by_tables(architecture: Architecture, how: str, optimizer: str) -> dict[str, float]:
    """Multipliers of the rates, as the tables of the papers have them."""
    sgd = optimizer == "sgd"
    tables = {
        "standard": {},
        "mup": {Role.HIDDEN: 1.0, Role.READOUT: 1 / WIDER, None: float(WIDER)}
        if sgd
        else {Role.HIDDEN: 1 / WIDER, Role.READOUT: 1 / WIDER},
        "completep": {Role.HIDDEN: 1 / WIDER},
    }
    if how == "fan_in":
        readers = (Role.HIDDEN, Role.READOUT)
        return {
            one.name: 8 / one.fan_in if one.role in readers else 1.0
            for one in architecture.parameters
        }
    own: dict[Any, float] = tables[how]
    return {one.name: own.get(one.role, own.get(None, 1.0)) for one in architecture.parameters}


def setup(name: str, how: str, optimizer: str) -> tuple[Any, Any, PyTree, Any]:
    """Returns optimizer, loss, params and batch; of `plan` and `muon` those of ours."""
    plan, batch = plan_of(name, "muon" if how == "muon" else optimizer), _batch(name)

    def loss(params, batch):
        return cross_entropy(plan.apply(params, batch[0]), batch[1])

    params = plan.init(KEY)
    if how in ("plan", "muon"):
        return plan.optimizer(1e-2, 0.0), loss, params, batch
    rates = by_tables(plan.architecture, how, optimizer)
    tx = optax.chain(
        optax.sgd(1e-2) if optimizer == "sgd" else optax.adam(1e-2),
        optax.stateless(
            lambda updates, params: map_with_names(lambda leaf, u: rates[leaf] * u, updates)
        ),
    )
    return tx, loss, params, batch
