"""The zoo in Equinox."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.zoo import ONE, Built, X, example

VECTORS = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SEQUENCES = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
WAVES = jax.ShapeDtypeStruct((2, 1, 32), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def built(make, *inputs) -> Built:
    """The model of one example, mapped over the batch."""
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(params, *inputs):
        return jax.vmap(eqx.combine(params, static))(*inputs)

    return apply, params, inputs


@example(
    paths=X**3,  # five layers in a row, stem and readout among them
    roles={
        "input": r"layers/0/weight",
        "hidden": r"layers/[123]/weight",
        "bias": r"layers/\d/bias",
        "readout": r"layers/4/weight",
    },
    fans={"layers/0/weight": (8, 32), "layers/1/weight": (32, 32), "layers/4/weight": (32, 10)},
    linear="",
)
def mlp() -> Built:
    return built(lambda key: eqx.nn.MLP(8, 10, 32, depth=4, key=key), VECTORS)


class GRUClassifier(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.cell = eqx.nn.GRUCell(8, 12, key=key)
        self.linear = eqx.nn.Linear(12, 3, key=key)

    def __call__(self, sequence):
        def step(hidden, x):
            return self.cell(x, hidden), None

        hidden, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), sequence)
        return self.linear(hidden)


def gru_paths(steps):
    """r and z are X(1 + h), n = tanh(x + r·h) has 2X(1 + h), and h' = n + z·(h - n)."""
    hidden = 0 * X
    for _ in range(steps):
        gate = X * (1 + hidden)
        hidden = 2 * gate + (gate + (hidden + 2 * gate))
    return hidden


@example(
    paths=gru_paths(6),  # from the inputs: every step has a stem
    roles={
        "input": r"cell/weight_ih",
        "hidden": r"cell/weight_hh",
        "bias": r"cell/bias|cell/bias_n|linear/bias",
        "readout": r"linear/weight",
    },
    fans={"cell/weight_ih": (8, 36), "cell/weight_hh": (12, 36), "linear/weight": (12, 3)},
    # Every part of the inputs feeds a sum of its own; one part of the state is multiplied first.
    edges={"cell/weight_ih": 3 * 6, "cell/weight_hh": 5},
)
def gru_classifier() -> Built:
    return built(GRUClassifier, SEQUENCES)


class BertLayer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(
            2, 16, qk_size=6, vo_size=10, use_query_bias=True, use_output_bias=True, key=key
        )
        self.norm1 = eqx.nn.LayerNorm(16)
        self.fc1 = eqx.nn.Linear(16, 64, key=key)
        self.fc2 = eqx.nn.Linear(64, 16, key=key)
        self.norm2 = eqx.nn.LayerNorm(16)

    def __call__(self, x, mask):
        x = jax.vmap(self.norm1)(x + self.attention(x, x, x, mask=mask))
        return jax.vmap(lambda x: self.norm2(x + self.fc2(jax.nn.gelu(self.fc1(x)))))(x)


class Bert(eqx.Module):
    tokens: eqx.nn.Embedding
    segments: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[BertLayer]
    pooler: eqx.nn.Linear
    classifier: eqx.nn.Linear

    def __init__(self, key):
        self.tokens = eqx.nn.Embedding(50, 16, key=key)
        self.segments = eqx.nn.Embedding(2, 16, key=key)
        self.positions = eqx.nn.Embedding(8, 16, key=key)
        self.norm = eqx.nn.LayerNorm(16)
        self.layers = [BertLayer(key) for _ in range(3)]
        self.pooler = eqx.nn.Linear(16, 16, key=key)
        self.classifier = eqx.nn.Linear(16, 3, key=key)

    def __call__(self, tokens, segments):
        x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.segments)(segments)
        x = jax.vmap(self.norm)(x + jax.vmap(self.positions)(jnp.arange(len(tokens))))
        mask = jnp.broadcast_to(tokens > 0, (len(tokens), len(tokens)))
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(jnp.tanh(self.pooler(x[0])))


@example(
    # Attention is left by query, key or value, then goes through the output: 3X². Last the pooler.
    paths=((1 + 3 * X**2) * (1 + X**2)) ** 3 * X,
    roles={
        "embedding": r"(tokens|segments|positions)/weight",
        "hidden": r"layers/\d/(attention/\w+_proj|fc1|fc2)/weight|pooler/weight",
        "bias": r".*/bias",
        "scale": r"(layers/\d/norm1|layers/\d/norm2|norm)/weight",
        "readout": r"classifier/weight",
    },
    fans={
        "segments/weight": (1, 16),
        "layers/0/attention/key_proj/weight": (16, 2 * 6),
        "layers/0/attention/value_proj/weight": (16, 2 * 10),
        "layers/0/attention/output_proj/weight": (2 * 10, 16),
    },
    linear=r"layers/\d/(attention/\w+|fc1)/weight|pooler/weight",
)
def bert() -> Built:
    return built(Bert, TOKENS, TOKENS)


class WaveNetLayer(eqx.Module):
    filter: eqx.nn.Conv1d
    gate: eqx.nn.Conv1d
    residual: eqx.nn.Conv1d | None
    skip: eqx.nn.Conv1d

    def __init__(self, dilation, residual, key):
        def dilated():
            padding = ((dilation, 0),)
            return eqx.nn.Conv1d(8, 12, 2, dilation=dilation, padding=padding, key=key)

        self.filter, self.gate = dilated(), dilated()
        self.residual = eqx.nn.Conv1d(12, 8, 1, key=key) if residual else None
        self.skip = eqx.nn.Conv1d(12, 16, 1, key=key)

    def __call__(self, x):
        y = jnp.tanh(self.filter(x)) * jax.nn.sigmoid(self.gate(x))
        return x if self.residual is None else x + self.residual(y), self.skip(y)


class WaveNet(eqx.Module):
    first: eqx.nn.Conv1d
    layers: list[WaveNetLayer]
    head: eqx.nn.Conv1d
    last: eqx.nn.Conv1d

    def __init__(self, key):
        self.first = eqx.nn.Conv1d(1, 8, 2, padding=((1, 0),), key=key)
        self.layers = [WaveNetLayer(2**i, i < 3, key) for i in range(4)]
        self.head = eqx.nn.Conv1d(16, 16, 1, key=key)
        self.last = eqx.nn.Conv1d(16, 32, 1, key=key)

    def __call__(self, x):
        x = self.first(x)
        total = 0.0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.last(jax.nn.relu(self.head(jax.nn.relu(total))))


@example(
    # The skip of layer l has 2X·X times (1 + 2X²)^l, all n of them (1 + 2X²)^n - 1; then the head.
    paths=((1 + 2 * X**2) ** 4 - 1) * X,
    roles={
        "input": r"first/weight",
        "hidden": r"layers/\d/(filter|gate|residual|skip)/weight|head/weight",
        "bias": r".*/bias",
        "readout": r"last/weight",
    },
    fans={
        "first/weight": (2, 2 * 8),
        "layers/1/gate/weight": (2 * 8, 2 * 12),
        "layers/1/residual/weight": (12, 8),
    },
    linear=r"layers/\d/\w+/weight",  # what is gated is not an activation
)
def wavenet() -> Built:
    return built(WaveNet, WAVES)


class MixerBlock(eqx.Module):
    """Over [features, tokens]; `joint` norms go over both, as in the library's own example."""

    tokens: eqx.nn.MLP
    features: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    joint: bool

    def __init__(self, joint, key):
        self.tokens = eqx.nn.MLP(9, 9, 24, depth=1, key=key)
        self.features = eqx.nn.MLP(16, 16, 40, depth=1, key=key)
        self.norm1, self.norm2 = (eqx.nn.LayerNorm((16, 9) if joint else 16) for _ in range(2))
        self.joint = joint

    def __call__(self, x):
        norm1, norm2 = (
            norm if self.joint else jax.vmap(norm, 1, 1) for norm in (self.norm1, self.norm2)
        )
        x = x + jax.vmap(self.tokens)(norm1(x))
        return x + jax.vmap(self.features, 1, 1)(norm2(x))


class Mixer(eqx.Module):
    patches: eqx.nn.Conv2d
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, joint, key):
        self.patches = eqx.nn.Conv2d(3, 16, 4, stride=4, key=key)
        self.blocks = [MixerBlock(joint, key) for _ in range(3)]
        self.norm = eqx.nn.LayerNorm(16)
        self.head = eqx.nn.Linear(16, 10, key=key)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(jax.vmap(self.norm, 1, 1)(x), axis=1))


MIXER_IMAGES = jax.ShapeDtypeStruct((2, 3, 12, 12), jnp.float32)
MIXER = {
    "paths": (1 + X**2) ** 6,  # three blocks of two MLPs
    "roles": {
        "input": r"patches/weight",
        "hidden": r"blocks/\d/(tokens|features)/layers/\d/weight",
        "bias": r".*/bias",
        "scale": r"(blocks/\d/norm\d|norm)/weight",
        "readout": r"head/weight",
    },
    "fans": {
        "patches/weight": (16 * 3, 16 * 16),
        "blocks/0/tokens/layers/0/weight": (9, 24),
        "blocks/0/tokens/layers/1/weight": (24, 9),
        "blocks/0/features/layers/0/weight": (16, 40),
    },
    "linear": r"blocks/\d/(tokens|features)/layers/0/weight",
}


@example(**MIXER)
def mlp_mixer() -> Built:
    return built(functools.partial(Mixer, False), MIXER_IMAGES)


@example(**MIXER)
def mlp_mixer_with_joint_norms_undeclared() -> Built:
    return built(functools.partial(Mixer, True), MIXER_IMAGES)


JOINT_SCALES = {f"blocks/{block}/norm{i}/weight": "scale" for block in range(3) for i in (1, 2)}


@example(**MIXER, options={"roles": JOINT_SCALES})
def mlp_mixer_with_joint_norms() -> Built:
    """With roles that are told; the offsets beside them are biases."""
    return built(functools.partial(Mixer, True), MIXER_IMAGES)


class Siamese(eqx.Module):
    encoder: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        self.encoder = eqx.nn.MLP(8, 16, 32, depth=2, key=key)
        self.head = eqx.nn.Linear(16, 1, key=key)

    def __call__(self, left, right):
        return self.head(jnp.abs(self.encoder(left) - self.encoder(right)))


@example(
    paths=2 * X**3,  # one encoder of three layers, from either input
    roles={
        "input": r"encoder/layers/0/weight",
        "hidden": r"encoder/layers/[12]/weight",
        "bias": r".*/bias",
        "readout": r"head/weight",
    },
    fans={"encoder/layers/1/weight": (32, 32), "encoder/layers/2/weight": (32, 16)},
    edges={"encoder/layers/0/weight": 2, "encoder/layers/2/weight": 2},
    linear="",
)
def siamese() -> Built:
    return built(Siamese, VECTORS, VECTORS)


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(16)
        self.mlp = eqx.nn.MLP(16, 16, 32, depth=1, key=key)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Scanned(eqx.Module):
    stem: eqx.nn.Linear
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, key):
        self.stem = eqx.nn.Linear(8, 16, key=key)
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, 5))
        self.head = eqx.nn.Linear(16, 10, key=key)

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(step, self.stem(x), arrays)
        return self.head(x)


@example(
    paths=(1 + X**2) ** 5,
    roles={
        "input": r"stem/weight",
        "hidden": r"blocks/mlp/layers/\d/weight",
        "bias": r".*/bias",
        "scale": r"blocks/norm/weight",
        "readout": r"head/weight",
    },
    fans={"blocks/mlp/layers/0/weight": (16, 32), "blocks/mlp/layers/1/weight": (32, 16)},
    edges={"blocks/mlp/layers/0/weight": 5},
    linear=r"blocks/mlp/layers/0/weight",
)
def scanned_stack() -> Built:
    return built(Scanned, VECTORS)


class Autoencoder(eqx.Module):
    encoder: eqx.nn.Sequential
    decoder: eqx.nn.Sequential

    def __init__(self, key):
        def stack(*sizes):
            layers = []
            for before, after in itertools.pairwise(sizes):
                layers += [eqx.nn.Linear(before, after, key=key), eqx.nn.Lambda(jax.nn.elu)]
            return eqx.nn.Sequential(layers[:-1])

        self.encoder, self.decoder = stack(64, 32, 16, 2), stack(2, 16, 32, 64)

    def __call__(self, x):
        return self.decoder(self.encoder(x))


@example(
    paths=X**4,  # six layers in a row, stem and readout among them
    roles={
        "input": r"encoder/layers/0/weight",
        "hidden": r"encoder/layers/[24]/weight|decoder/layers/[02]/weight",
        "bias": r".*/bias",
        "readout": r"decoder/layers/4/weight",
    },
    fans={"encoder/layers/4/weight": (16, 2), "decoder/layers/0/weight": (2, 16)},
    linear=r"decoder/layers/0/weight",  # the code is linear
)
def autoencoder() -> Built:
    return built(Autoencoder, jax.ShapeDtypeStruct((2, 64), jnp.float32))


@example(
    paths=ONE,
    roles={"input": r"layers/0/weight", "readout": r"layers/1/weight", "bias": r"layers/\d/bias"},
    fans={"layers/0/weight": (8, 16), "layers/1/weight": (16, 4)},
)
def one_hidden_layer() -> Built:
    """Stem and readout alone."""
    return built(lambda key: eqx.nn.MLP(8, 4, 16, depth=1, key=key), VECTORS)
