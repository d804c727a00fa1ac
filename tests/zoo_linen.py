"""The zoo in Flax linen."""

import functools
import math

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import linen as nn

from tests.zoo import Built, X, example

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def built(model: nn.Module, *inputs, **options) -> Built:
    """The model with its params apart; whatever else it has, such as running averages, is bound."""
    init = functools.partial(model.init, **options)
    variables = dict(jax.eval_shape(init, jax.random.key(0), *inputs))
    params = variables.pop("params")
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)

    def apply(params, *inputs):
        variables = {"params": params, **state}
        result, _ = model.apply(variables, *inputs, mutable=list(state), **options)
        return result

    return apply, params, inputs


class BasicBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="shortcut_norm")(conv((1, 1), self.stride, name="shortcut")(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for stage in range(4):
            for block in range(2):
                x = BasicBlock(8 * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


# Two convolutions beside 5 identities and beside 3 projections.
RESNET18 = {
    "paths": (1 + X**2) ** 5 * (X + X**2) ** 3,
    "linear": "",
    "roles": {
        "input": r"Conv_0/kernel",
        "hidden": r"BasicBlock_\d/(Conv_\d|shortcut)/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"Dense_0/kernel",
    },
    "fans": {
        "Conv_0/kernel": (9 * 3, 9 * 8),
        "BasicBlock_2/Conv_0/kernel": (9 * 8, 9 * 16),
        "BasicBlock_2/shortcut/kernel": (8, 16),
        "Dense_0/kernel": (64, 10),
    },
}


@example(**RESNET18)
def resnet18() -> Built:
    return built(ResNet18(), IMAGES, train=True)


@example(**RESNET18)
def resnet18_with_running_averages_among_the_inputs() -> Built:
    """As a user evaluates it: the averages are neither params nor bound."""
    init = functools.partial(ResNet18().init, train=False)
    variables = dict(jax.eval_shape(init, jax.random.key(0), IMAGES))

    def apply(params, stats, x):
        return ResNet18().apply({"params": params, "batch_stats": stats}, x, train=False)

    return apply, variables["params"], (variables["batch_stats"], IMAGES)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 16):
            x = nn.avg_pool(nn.tanh(nn.Conv(features, (5, 5))(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for features in (120, 84):
            x = nn.tanh(nn.Dense(features)(x))
        return nn.Dense(10)(x)


@example(
    paths=X**3,  # five layers in a row, stem and readout among them
    roles={
        "input": r"Conv_0/kernel",
        "hidden": r"Conv_1/kernel|Dense_[01]/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_2/kernel",
    },
    fans={"Conv_1/kernel": (25 * 6, 25 * 16), "Dense_0/kernel": (4 * 4 * 16, 120)},
    linear="",  # a mean of activations is as far from a centred feature as they are
)
def lenet() -> Built:
    return built(LeNet(), IMAGES)


class DenseNet(nn.Module):
    layers: tuple[int, ...] = (3, 2)
    growth: int = 4

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for block, layers in enumerate(self.layers):
            for _ in range(layers):
                y = nn.Conv(4 * self.growth, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                y = nn.Conv(self.growth, (3, 3), use_bias=False)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
            x = nn.relu(norm()(x))
            if block < len(self.layers) - 1:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(x)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


@example(
    # Every layer joins X² times all before it: a factor of 1 + X²; a transition is one layer.
    paths=(1 + X**2) ** 3 * X * (1 + X**2) ** 2,
    roles={
        "input": r"Conv_0/kernel",
        "hidden": r"Conv_([1-9]|10|11)/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"Dense_0/kernel",
    },
    fans={
        "Conv_1/kernel": (8, 16),
        "Conv_2/kernel": (9 * 16, 9 * 4),
        "Conv_5/kernel": (8 + 2 * 4, 16),  # the third layer of the first block
        "Conv_7/kernel": (8 + 3 * 4, 10),  # the transition
    },
    linear="",
)
def densenet() -> Built:
    return built(DenseNet(), IMAGES, train=True)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def two_convolutions(x, features):
            for _ in range(2):
                x = nn.relu(nn.GroupNorm(2)(nn.Conv(features, (3, 3))(x)))
            return x

        first = two_convolutions(x, 8)
        second = two_convolutions(nn.max_pool(first, (2, 2), (2, 2)), 16)
        third = two_convolutions(nn.max_pool(second, (2, 2), (2, 2)), 32)
        up = nn.ConvTranspose(16, (2, 2), (2, 2))(third)
        second = two_convolutions(jnp.concatenate([second, up], axis=-1), 16)
        up = nn.ConvTranspose(8, (2, 2), (2, 2))(second)
        first = two_convolutions(jnp.concatenate([first, up], axis=-1), 8)
        return nn.Conv(3, (1, 1))(first)


@example(
    # Down X, X³, X⁵; up X²(X³ + X·X⁵) = X⁵ + X⁸, then X²(X + X(X⁵ + X⁸)).
    paths=X**3 + X**8 + X**11,
    roles={
        "input": r"Conv_0/kernel",
        "hidden": r"Conv_[1-9]/kernel|ConvTranspose_\d/kernel",
        "bias": r".*/bias",
        "scale": r"GroupNorm_\d/scale",
        "readout": r"Conv_10/kernel",
    },
    fans={
        "Conv_6/kernel": (9 * 32, 9 * 16),  # reads 16 + 16 channels
        "ConvTranspose_0/kernel": (32, 4 * 16),  # of 2 x 2 positions a stride of 2 leaves one
        "Conv_10/kernel": (8, 3),
    },
)
def unet() -> Built:
    return built(UNet(), IMAGES)


class ViT(nn.Module):
    depth: int = 3

    @nn.compact
    def __call__(self, x, deterministic):
        dropout = functools.partial(nn.Dropout, 0.1, deterministic=deterministic)
        x = nn.Conv(16, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(x)
        x = x.reshape(x.shape[0], -1, 16)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], 16))
        x = dropout()(x)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            y = nn.MultiHeadDotProductAttention(2, qkv_features=24, deterministic=True)(y, y)
            x = x + dropout()(y)
            y = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
            x = x + dropout()(nn.Dense(16)(dropout()(y)))
        return nn.Dense(10, name="head")(nn.LayerNorm(name="encoder_norm")(x)[:, 0])


VIT = {
    # Attention is left by query, key or value, then goes through the output: 3X².
    "paths": ((1 + 3 * X**2) * (1 + X**2)) ** 3,
    "roles": {
        "input": r"embedding/kernel",
        "embedding": r"cls|pos_embedding",
        "hidden": r"MultiHead\w+/(query|key|value|out)/kernel|Dense_\d/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"head/kernel",
    },
    "fans": {
        "embedding/kernel": (16 * 3, 16 * 16),
        "MultiHeadDotProductAttention_1/query/kernel": (16, 24),
        "MultiHeadDotProductAttention_1/out/kernel": (24, 16),
        "Dense_0/kernel": (16, 64),
    },
    "linear": r"MultiHead\w+/(query|key|value|out)/kernel|Dense_[024]/kernel",
}


@example(**VIT)
def vit() -> Built:
    return built(ViT(), IMAGES, deterministic=True)


@example(**VIT)
def vit_with_dropout() -> Built:
    """Random masks and their 1/keep are factors of zero or a constant, no activations."""
    _, params, inputs = built(ViT(), IMAGES, deterministic=True)

    def apply(params, x, key):
        return ViT().apply({"params": params}, x, deterministic=False, rngs={"dropout": key})

    return apply, params, (*inputs, jax.random.key(0))


class RelativeAttention(nn.Module):
    """Attention as in T5: no biases, unscaled, and a learned bias for every distance if asked."""

    biased: bool = False

    @nn.compact
    def __call__(self, x, memory, mask):
        project = functools.partial(nn.DenseGeneral, (2, 8), use_bias=False)
        query = project(name="query")(x)
        key, value = project(name="key")(memory), project(name="value")(memory)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        if self.biased:
            distance = np.arange(x.shape[1])[:, None] - np.arange(memory.shape[1])
            bias = nn.Embed(8, 2, name="relative")(np.clip(distance + 4, 0, 7))
            logits = logits + jnp.transpose(bias, (2, 0, 1))[None]
        weights = nn.softmax(jnp.where(mask, logits, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, name="out")(mixed)


class T5(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, source, target):
        table = nn.Embed(50, 16, name="shared")
        norm = functools.partial(nn.RMSNorm, epsilon=1e-6)

        def feed_forward(x):
            y = nn.relu(nn.Dense(32, use_bias=False)(norm()(x)))
            return x + nn.Dense(16, use_bias=False)(y)

        padding = nn.make_attention_mask(source > 0, source > 0)
        crossing = nn.make_attention_mask(target > 0, source > 0)
        causal = nn.combine_masks(
            nn.make_causal_mask(target), nn.make_attention_mask(target > 0, target > 0)
        )
        x = table(source)
        for layer in range(self.depth):
            y = norm()(x)
            x = feed_forward(x + RelativeAttention(layer == 0)(y, y, padding))
        memory = norm()(x)
        x = table(target)
        for layer in range(self.depth):
            y = norm()(x)
            x = x + RelativeAttention(layer == 0)(y, y, causal)
            x = x + RelativeAttention()(norm()(x), memory, crossing)
            x = feed_forward(x)
        return table.attend(norm()(x) / math.sqrt(16))


def t5_paths(depth=2):
    """Query from the decoder; key and value from the encoder, which starts at the inputs too."""
    encoder = X * ((1 + 3 * X**2) * (1 + X**2)) ** depth
    decoder = X
    for _ in range(depth):
        decoder = decoder * (1 + 3 * X**2)
        decoder = ((1 + X**2) * decoder + 2 * X**2 * encoder) * (1 + X**2)
    return decoder


@example(
    paths=t5_paths(),
    roles={
        "embedding": r"shared/embedding",
        "bias": r"RelativeAttention_[02]/relative/embedding",  # added to scores
        "hidden": r"RelativeAttention_\d/(query|key|value|out)/kernel|Dense_\d/kernel",
        "scale": r"RMSNorm_\d+/scale",
    },
    fans={
        "shared/embedding": (1, 16),
        "RelativeAttention_3/query/kernel": (16, 16),
        "Dense_1/kernel": (32, 16),
    },
    edges={"shared/embedding": 2},  # the third use is the readout
    layers={"shared/embedding": "readout"},
    linear=r"RelativeAttention_\d/(query|key|value|out)/kernel|Dense_[0246]/kernel",
)
def t5() -> Built:
    return built(T5(), TOKENS, TOKENS)


class LanguageModel(nn.Module):
    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(50)(nn.RNN(self.cell)(nn.Embed(50, 8)(tokens)))


def lstm_paths(steps):
    """Gates i, f, g, o are sums of their own; c' = f·c + i·g and h = o·tanh(c')."""
    cell, hidden, outputs = 0 * X, 0 * X, 0 * X
    for _ in range(steps):
        gate = X * (1 + hidden)
        cell = 3 * gate + cell
        hidden = gate + cell
        outputs = outputs + hidden
    return outputs


@example(
    paths=lstm_paths(6),
    roles={
        "embedding": r"Embed_0/embedding",
        "hidden": r"cell/[ih][ifgo]/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_0/kernel",
    },
    fans={"cell/hf/kernel": (12, 12), "cell/if/kernel": (8, 12), "Embed_0/embedding": (1, 8)},
    edges={"cell/hf/kernel": 5, "cell/ig/kernel": 6},
)
def lstm_language_model() -> Built:
    return built(LanguageModel(nn.LSTMCell(12)), TOKENS)


@example(
    paths=lstm_paths(6),
    roles={
        "embedding": r"Embed_0/embedding",
        "hidden": r"cell/[ih][ifgo]/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_0/kernel",
    },
    fans={"cell/hf/kernel": (12, 12), "cell/if/kernel": (8, 12), "Embed_0/embedding": (1, 8)},
)
def optimized_lstm_language_model() -> Built:
    """Joins its kernels before it multiplies; every gate is a part of the product."""
    return built(LanguageModel(nn.OptimizedLSTMCell(12)), TOKENS)


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(32)(nn.LayerNorm()(x)))
        return x + nn.Dense(16)(y), None


class Stack(nn.Module):
    scanned: bool
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        if self.scanned:
            scan = functools.partial(nn.scan, variable_axes={"params": 0}, length=self.depth)
            x, _ = scan(nn.remat(ScannedBlock), split_rngs={"params": True})(name="blocks")(x, None)
        else:
            for _ in range(self.depth):
                x, _ = ScannedBlock()(x, None)
        return nn.Dense(10)(x)


STACK = {
    "paths": (1 + X**2) ** 4,
    "roles": {
        "input": r"Dense_0/kernel",
        "hidden": r"(ScannedBlock_\d|blocks)/Dense_[01]/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"Dense_1/kernel",
    },
    "linear": r"(ScannedBlock_\d|blocks)/Dense_0/kernel",
}
VECTORS = jax.ShapeDtypeStruct((2, 8), jnp.float32)


@example(
    **STACK,
    fans={"blocks/Dense_0/kernel": (16, 32), "blocks/Dense_1/kernel": (32, 16)},
    edges={"blocks/Dense_0/kernel": 4},
)
def scanned_stack() -> Built:
    return built(Stack(scanned=True), VECTORS)


@example(
    **STACK,
    fans={"ScannedBlock_3/Dense_0/kernel": (16, 32)},
    edges={"ScannedBlock_3/Dense_0/kernel": 1},
)
def unrolled_stack() -> Built:
    return built(Stack(scanned=False), VECTORS)


class GraphConvolutions(nn.Module):
    @nn.compact
    def __call__(self, graph):
        for features in (16, 16, 16):
            convolution = jraph.GraphConvolution(nn.Dense(features), add_self_edges=True)
            graph = convolution(graph)
            graph = graph._replace(nodes=nn.relu(graph.nodes))
        nodes = len(graph.nodes)
        owner = jnp.repeat(jnp.arange(2), graph.n_node, total_repeat_length=nodes)
        return nn.Dense(3)(jraph.segment_mean(graph.nodes, owner, 2))


def graph_shapes(nodes=10, edges=20, features=4):
    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return jraph.GraphsTuple(
        nodes=jax.ShapeDtypeStruct((nodes, features), jnp.float32),
        edges=jax.ShapeDtypeStruct((edges, features), jnp.float32),
        senders=integers(edges),
        receivers=integers(edges),
        n_node=integers(2),
        n_edge=integers(2),
        globals=None,
    )


@example(
    paths=X**2,  # a chain: what a node receives is what its neighbours are
    roles={
        "input": r"Dense_0/kernel",
        "hidden": r"Dense_[12]/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_3/kernel",
    },
    fans={"Dense_0/kernel": (4, 16), "Dense_1/kernel": (16, 16), "Dense_3/kernel": (16, 3)},
    linear="",
)
def graph_convolutions() -> Built:
    return built(GraphConvolutions(), graph_shapes())


class AttentionPooling(nn.Module):
    """A learned query, as in ViT with a pooling head, Perceiver and DETR."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        probe = self.param("probe", nn.initializers.normal(), (1, 1, 16))
        return nn.Dense(10)(nn.MultiHeadDotProductAttention(2)(jnp.tile(probe, (2, 1, 1)), x))


@example(
    paths=2 * X**2,  # by key or value, then through the output; no input reaches the query
    roles={
        "input": r"Dense_0/kernel",
        "embedding": r"probe",
        "hidden": r"MultiHead\w+/(query|key|value|out)/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_1/kernel",
    },
    fans={
        "MultiHeadDotProductAttention_0/query/kernel": (16, 16),
        "MultiHeadDotProductAttention_0/out/kernel": (16, 16),
    },
)
def attention_pooling() -> Built:
    return built(AttentionPooling(), jax.ShapeDtypeStruct((2, 6, 8), jnp.float32))


class WeightNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.relu(nn.WeightNorm(nn.Dense(16))(x))
        return nn.Dense(10)(x)


@example(
    paths=X,  # the layer between stem and readout, its columns divided by their norms
    roles={
        "input": r"Dense_0/kernel",
        "hidden": r"Dense_1/kernel",
        "bias": r".*/bias",
        "scale": r"WeightNorm_0/\S*scale",
        "readout": r"Dense_2/kernel",
    },
    fans={"Dense_1/kernel": (16, 16)},
    edges={"Dense_1/kernel": 1},
    linear="",
)
def weight_normalization() -> Built:
    return built(WeightNormalized(), VECTORS)


class SpectrallyNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.relu(nn.SpectralNorm(nn.Dense(12))(x, update_stats=True))
        return nn.Dense(10)(x)


@example(
    paths=X,  # the layer between stem and readout, divided by a number that no input reaches
    roles={
        "input": r"Dense_0/kernel",
        "hidden": r"Dense_1/kernel",
        "bias": r".*/bias",
        "readout": r"Dense_2/kernel",
    },
    fans={"Dense_1/kernel": (16, 12)},
    edges={"Dense_1/kernel": 1},
    linear="",
)
def spectral_normalization() -> Built:
    return built(SpectrallyNormalized(), VECTORS)
