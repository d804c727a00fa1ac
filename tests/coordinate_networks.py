"""Networks of any width and depth for coordinate checks, `tests/coordinate_steps.py`.

Linen modules as users write them, with the initializers of the framework. Heads have 16 features,
experts are 4 or 8 of which 2 work, whatever the width. Predictions are few, 8 to 16, as at width n
they disturb one another by sqrt(predictions / n).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

HEAD, LETTERS, LENGTH, CLASSES = 16, 27, 8, 10

Batch = tuple[Any, Any]


class Family(NamedTuple):
    """Networks of one kind.

    Attributes:
      make: from sizes, `width` and `depth` among them, to a module.
      batch: from a number to inputs and labels, a class for every prediction.
      keywords: of the call of the module.
    """

    make: Callable[..., nn.Module]
    batch: Callable[[int], Batch]
    keywords: Mapping[str, Any] = {}


FAMILIES: dict[str, Family] = {}


# Data.


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8, 1) - images.mean()) / images.std(), labels


def images(number: int, size: int = 8) -> Batch:
    """Digits [8, 8, 8, 1] and their classes."""
    x, y = _digits()
    chosen = np.random.default_rng(number).choice(len(x), size, replace=False)
    return jnp.asarray(x[chosen], jnp.float32), jnp.asarray(y[chosen], jnp.int32)


def vectors(number: int) -> Batch:
    """Digits [8, 64]."""
    x, y = images(number)
    return x.reshape(len(x), -1), y


def patches(number: int) -> Batch:
    """Digits as four patches of 16 pixels [8, 4, 16]."""
    x, y = images(number)
    cut = x.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)
    return cut.reshape(len(x), 4, 16), y


@functools.cache
def _letters() -> np.ndarray:
    text = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text().lower()
    words = "".join(one if "a" <= one <= "z" else " " for one in text).split()
    return np.array([ord(one) - ord("a") + 1 if one != " " else 0 for one in " ".join(words)])


def text(number: int) -> Batch:
    """Letters [2, 8] of English text and the letters after them."""
    letters = _letters()
    starts = np.random.default_rng(number).integers(0, len(letters) - LENGTH - 1, 2)
    cut = np.stack([letters[start : start + LENGTH + 1] for start in starts])
    return jnp.asarray(cut[:, :-1], jnp.int32), jnp.asarray(cut[:, 1:], jnp.int32)


# Blocks.


class Attention(nn.Module):
    """Heads of 16 features; `shared` of them have keys and values, which the others share."""

    causal: bool = False
    use_bias: bool = True
    shared: int = 0
    out_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        number = width // HEAD
        sizes = {"query": number, "key": self.shared or number, "value": self.shared or number}
        heads = []
        for name, size in sizes.items():
            one = nn.Dense(size * HEAD, self.use_bias, name=name)(x)
            one = one.reshape(*x.shape[:-1], size, HEAD)
            heads.append(jnp.repeat(one, number // size, axis=-2))
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        mixed = nn.dot_product_attention(*heads, mask=mask).reshape(x.shape)
        return nn.Dense(width, self.use_bias, kernel_init=self.out_init, name="out")(mixed)


class Feedforward(nn.Module):
    factor: int = 4
    out_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.factor * x.shape[-1], name="up")(x))
        return nn.Dense(x.shape[-1], kernel_init=self.out_init, name="down")(hidden)


class Gated(nn.Module):
    """SwiGLU."""

    factor: int = 2

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, use_bias=False)
        hidden = self.factor * x.shape[-1]
        gate = nn.silu(dense(hidden, name="gate")(x))
        return dense(x.shape[-1], name="down")(gate * dense(hidden, name="up")(x))


class Experts(nn.Module):
    """Two of several experts, stacked, as einsums with a one-hot choice; no capacity.

    Every token is sent to its experts by `choice` [..., chosen, experts], which is 0 or 1.
    """

    experts: int = 4
    chosen: int = 2
    hidden: int = 0
    dispatch: str = "one_hot"
    down_std: float | None = None

    @nn.compact
    def __call__(self, x):
        width, hidden = x.shape[-1], self.hidden or 2 * x.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        up = self.param("up", init, (self.experts, width, hidden))
        down = self.param("down", init, (self.experts, hidden, width))
        gates = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        weights, chosen = jax.lax.top_k(gates, self.chosen)
        weights = weights / weights.sum(-1, keepdims=True)
        choice = jax.nn.one_hot(chosen, self.experts, dtype=x.dtype)
        if self.dispatch == "dense":  # every expert works, those not chosen for nothing
            inner = nn.gelu(jnp.einsum("...d,edm->...em", x, up))
            outputs = jnp.einsum("...em,emd->...ed", inner, down)
            return jnp.einsum("...k,...ke,...ed->...d", weights, choice, outputs)
        sent = jnp.einsum("...ke,...d->...ked", choice, x)
        inner = nn.gelu(jnp.einsum("...ked,edm->...kem", sent, up))
        outputs = jnp.einsum("...kem,emd->...ked", inner, down)
        return jnp.einsum("...k,...ked->...d", weights, outputs)


class StateSpace(nn.Module):
    """A selective scan as in Mamba: states of 4 entries a feature, steps that the input decides."""

    states: int = 4

    @nn.compact
    def __call__(self, x):
        width, dense = x.shape[-1], functools.partial(nn.Dense, use_bias=False)
        rank = width // 4
        z, gate = dense(width, name="input")(x), dense(width, name="gate")(x)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, width))
        padded = jnp.pad(z, ((0, 0), (3, 0), (0, 0)))
        z = sum(padded[:, shift : shift + x.shape[1]] * kernel[shift] for shift in range(4))
        z = nn.silu(z)
        read, write = (dense(self.states, name=name)(z) for name in ("read", "write"))
        bias = nn.initializers.constant(-2.0)
        step = nn.softplus(nn.Dense(width, bias_init=bias, name="step")(dense(rank, name="low")(z)))
        logs = jnp.log(jnp.arange(1.0, self.states + 1))
        decay = -jnp.exp(
            self.param(
                "decay", lambda key, *shape: jnp.broadcast_to(logs, shape), width, self.states
            )
        )
        skip = self.param("skip", nn.initializers.ones, (width,))

        def advance(state, now):
            z, step, read, write = now
            state = jnp.exp(step[..., None] * decay) * state
            state = state + (step * z)[..., None] * write[:, None, :]
            return state, jnp.einsum("bds,bs->bd", state, read)

        first = jnp.zeros((x.shape[0], width, self.states), x.dtype)
        steps = [jnp.moveaxis(one, 1, 0) for one in (z, step, read, write)]
        _, found = jax.lax.scan(advance, first, tuple(steps))
        return dense(width, name="out")((jnp.moveaxis(found, 0, 1) + skip * z) * nn.silu(gate))


# Networks.


class Encoder(nn.Module):
    """Patches, blocks before which a norm stands, the mean over positions, classes."""

    width: int
    depth: int
    blocks: Callable[[], tuple[nn.Module, ...]]
    norm: Callable[..., nn.Module] = nn.LayerNorm
    readout_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="patches")(x)
        places = nn.initializers.normal(0.02)
        x = x + self.param("positions", places, (x.shape[1], self.width))
        for number in range(self.depth):
            for part, block in enumerate(self.blocks()):
                x = x + block.copy(name=f"block{number}_{part}")(
                    self.norm(name=f"norm{number}_{part}")(x)
                )
        x = self.norm(name="norm")(x).mean(1)
        return nn.Dense(CLASSES, kernel_init=self.readout_init, name="readout")(x)


class GPT(nn.Module):
    width: int
    depth: int
    tied: bool
    block: Callable[[], tuple[nn.Module, ...]]

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(LETTERS, self.width, name="letters")
        places = nn.Embed(LENGTH, self.width, name="positions")
        x = table(tokens) + places(jnp.arange(tokens.shape[-1]))
        for number in range(self.depth):
            for part, block in enumerate(self.block()):
                x = x + block.copy(name=f"block{number}_{part}")(
                    nn.LayerNorm(name=f"norm{number}_{part}")(x)
                )
        x = nn.LayerNorm(name="norm")(x)
        return table.attend(x) if self.tied else nn.Dense(LETTERS, False, name="readout")(x)


class ResidualMLP(nn.Module):
    width: int
    depth: int
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stem")(x)
        for number in range(self.depth):
            inner = x
            for layer in range(self.layers):
                inner = nn.Dense(self.width, name=f"block{number}_{layer}")(nn.relu(inner))
            x = x + inner
        return nn.Dense(CLASSES, name="readout")(x)


class ResNet(nn.Module):
    width: int
    depth: int
    normalize: bool

    @nn.compact
    def __call__(self, x, train: bool = True):
        def norm(x, name):
            if not self.normalize:
                return x
            return nn.BatchNorm(use_running_average=not train, name=name)(x)

        conv = functools.partial(nn.Conv, self.width, (3, 3), use_bias=not self.normalize)
        x = norm(nn.Conv(self.width, (3, 3), strides=2, name="stem")(x), "stem_norm")
        for number in range(self.depth):
            inner = nn.relu(x)
            inner = norm(conv(name=f"block{number}_0")(inner), f"norm{number}_0")
            inner = norm(conv(name=f"block{number}_1")(nn.relu(inner)), f"norm{number}_1")
            x = x + inner
        return nn.Dense(CLASSES, name="readout")(nn.relu(x).mean((1, 2)))


def _attention_and(block: Callable[[], nn.Module], **options):
    return lambda: (Attention(**options), block())


FAMILIES["transformer"] = Family(
    lambda width, depth: Encoder(width, depth, _attention_and(Feedforward)), patches
)
FAMILIES["shared keys"] = Family(
    lambda width, depth: Encoder(width, depth, _attention_and(Feedforward, shared=2)), patches
)
FAMILIES["gated transformer"] = Family(
    lambda width, depth: Encoder(
        width, depth, _attention_and(Gated, use_bias=False), norm=nn.RMSNorm
    ),
    patches,
)
FAMILIES["residual MLP"] = Family(ResidualMLP, vectors)
FAMILIES["residual MLP, one layer a branch"] = Family(
    functools.partial(ResidualMLP, layers=1), vectors
)
FAMILIES["ResNet"] = Family(functools.partial(ResNet, normalize=False), images)
FAMILIES["ResNet, batch norm"] = Family(
    functools.partial(ResNet, normalize=True), images, {"train": True}
)
FAMILIES["mixture of experts"] = Family(
    lambda width, depth, hidden=0, experts=4, dispatch="one_hot": Encoder(
        width, depth,
        _attention_and(functools.partial(Experts, experts, 2, hidden, dispatch)),
    ),
    patches,
)  # fmt: skip
FAMILIES["state space"] = Family(
    lambda width, depth: Encoder(width, depth, lambda: (StateSpace(),), norm=nn.RMSNorm), patches
)
for _tied in (False, True):
    FAMILIES["GPT, tied" if _tied else "GPT"] = Family(
        functools.partial(GPT, tied=_tied, block=_attention_and(Feedforward, causal=True)),
        text,
    )
