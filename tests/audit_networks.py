"""Six small networks, each with a base, a batch and a loss: what the audit is tried on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import PyTree

KEY = jax.random.key(0)
CLASSES, EXAMPLES, TOKENS = 5, 16, 8
WIDTH, BASE_WIDTH = 32, 8
SLOW: dict[str, Any] = {"sgd": {"momentum": 0.9}}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Network(NamedTuple):
    """One kind of network.

    Attributes:
      model: of a width, what `parametrize` takes; its depth follows the width.
      inputs: what the model reads when it is read.
      batch: inputs and labels.
      mapped: whether the model takes one example.
      keywords: of `parametrize`.
    """

    model: Callable[[int], Any]
    inputs: Any
    batch: Any
    mapped: bool = False


class Setup(NamedTuple):
    """The arguments of `audit`."""

    plan: archscale.Parametrization
    optimizer: Any
    loss_fn: Callable[[PyTree, Any], Any]
    params: PyTree
    batch: Any


# Models.


def mlp(width: int) -> Any:
    def apply(params, x):
        for name in ("stem", "first", "second"):
            x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
        return x @ params["readout"]["w"]

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    params = {
        name: {"w": shape(inputs, width), "b": shape(width)}
        for name, inputs in (("stem", 12), ("first", width), ("second", width))
    }
    return apply, {**params, "readout": {"w": shape(width, CLASSES)}}


class Cnn(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), name="stem")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm_0")(x))
        x = nn.Conv(2 * self.width, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm_1")(x))
        return nn.Dense(CLASSES, name="readout")(x.mean((1, 2)))


class Transformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, self.width, name="table")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (TOKENS, self.width))
        mask = nn.make_causal_mask(tokens)
        for number in range(1 if self.width == BASE_WIDTH else 2):
            y = nn.LayerNorm(name=f"norm_{number}_0")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{number}")(y, y, mask=mask)
            y = nn.LayerNorm(name=f"norm_{number}_1")(x)
            y = nn.gelu(nn.Dense(4 * self.width, name=f"up_{number}")(y))
            x = x + nn.Dense(self.width, name=f"down_{number}")(y)
        x = nn.LayerNorm(name="last")(x)
        return nn.Dense(11, use_bias=False, name="readout")(x)


def decoder(width: int) -> Any:
    """Layers in a scan, on a table that is the readout too."""

    def norm(x, gain):
        return gain * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def layer(x, params):
        y = jax.nn.relu(norm(x, params["gain"]) @ params["up"] + params["bias"])
        return x + y @ params["down"], None

    def apply(params, tokens):
        x, _ = jax.lax.scan(layer, params["table"][tokens], params["layers"])
        return norm(x, params["last"]) @ params["table"].T

    depth = 2 if width == BASE_WIDTH else 4
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    layers = {
        "gain": shape(depth, width),
        "up": shape(depth, width, 3 * width),
        "bias": shape(depth, 3 * width),
        "down": shape(depth, 3 * width, width),
    }
    return apply, {"table": shape(11, width), "layers": layers, "last": shape(width)}


def equinox_model(width: int) -> Any:
    return eqx.filter_eval_shape(_Wide, width, KEY)


class _Wide(eqx.Module):
    """Weights [outputs, inputs], and hidden layers that are not square."""

    layers: list[eqx.nn.Linear]
    norm: eqx.nn.LayerNorm

    def __init__(self, width: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        sizes = ((12, width), (width, 3 * width), (3 * width, width), (width, CLASSES))
        self.layers = [eqx.nn.Linear(i, o, key=k) for (i, o), k in zip(sizes, keys, strict=True)]
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, x):
        x = jax.nn.relu(self.layers[0](x))
        x = jax.nn.relu(self.layers[1](self.norm(x)))
        return self.layers[3](jax.nn.relu(self.layers[2](x)))


class _NnxMlp(nnx.Module):
    def __init__(self, width: int) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(12, width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.readout = nnx.Linear(width, CLASSES, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.readout(nnx.gelu(x))


def nnx_model(width: int) -> Any:
    return nnx.eval_shape(lambda: _NnxMlp(width))


def _vectors() -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, 12))
    return x, jax.random.randint(jax.random.key(2), (EXAMPLES,), 0, CLASSES)


def _images() -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(1), (EXAMPLES, 6, 6, 3)), _vectors()[1]


def _tokens() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (EXAMPLES, TOKENS + 1), 0, 11)
    return tokens[:, :-1], tokens[:, 1:]


@functools.cache
def network(name: str) -> Network:
    """Returns one of `NAMES`."""
    vectors, images, tokens = _vectors(), _images(), _tokens()
    return {
        "mlp": lambda: Network(mlp, vectors[0], vectors),
        "cnn": lambda: Network(Cnn, images[0], images),
        "transformer": lambda: Network(Transformer, tokens[0], tokens),
        "decoder": lambda: Network(decoder, tokens[0], tokens),
        "equinox": lambda: Network(equinox_model, vectors[0][0], vectors, mapped=True),
        "nnx": lambda: Network(nnx_model, vectors[0], vectors),
    }[name]()


NAMES = ("mlp", "cnn", "transformer", "decoder", "equinox", "nnx")
OPTIMIZERS = ("sgd", "adamw", "muon")


@functools.cache
def plan_of(name: str, optimizer: str, **options: Any) -> archscale.Parametrization:
    """Returns the plan of a network, relative to its base."""
    one = network(name)
    options = {"base": one.model(BASE_WIDTH), **options}
    return archscale.parametrize(one.model(WIDTH), one.inputs, optimizer=optimizer, **options)


def loss_of(name: str, apply: Callable[..., Any]) -> Callable[[PyTree, Any], jax.Array]:
    """Returns the loss of outputs."""
    mapped = network(name).mapped
    evaluate = jax.vmap(apply, in_axes=(None, 0)) if mapped else apply
    return lambda params, batch: cross_entropy(evaluate(params, batch[0]), batch[1])


@functools.cache
def drawn(name: str, optimizer: str) -> PyTree:
    """Returns initial params of the plan."""
    return plan_of(name, optimizer).init(KEY)


def setup(name: str, optimizer: str, decay: float = 0.1) -> Setup:
    """Returns a set-up as it should be."""
    plan = plan_of(name, optimizer)
    tx = plan.optimizer(1e-2, decay, **SLOW.get(optimizer, {}))
    return Setup(plan, tx, loss_of(name, plan.apply), drawn(name, optimizer), network(name).batch)
