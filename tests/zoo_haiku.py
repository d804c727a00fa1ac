"""The zoo in Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from tests.zoo import Built, X, example
from tests.zoo_linen import graph_shapes
from tests.zoo_nnx_sequences import fused_lstm_paths

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
VECTORS = jax.ShapeDtypeStruct((2, 8), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def built(function, *inputs) -> Built:
    """A function of Haiku modules; whatever else it has, such as running averages, is bound."""
    model = hk.transform_with_state(function)
    params, state = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)

    def apply(params, *inputs):
        result, _ = model.apply(params, state, jax.random.key(0), *inputs)
        return result

    return apply, params, inputs


@example(
    # Two convolutions beside 5 identities and beside 3 projections.
    paths=(1 + X**2) ** 5 * (X + X**2) ** 3,
    roles={
        "input": r"res_net18/~/initial_conv/w",
        "hidden": r".*/~/(conv_[01]|shortcut_conv)/w",
        "bias": r".*/offset|.*/b",
        "scale": r".*/scale",
        "readout": r"res_net18/~/logits/w",
    },
    fans={
        "res_net18/~/initial_conv/w": (49 * 3, 49 * 64),
        "res_net18/~/block_group_1/~/block_0/~/conv_0/w": (9 * 64, 9 * 128),
        "res_net18/~/block_group_1/~/block_0/~/shortcut_conv/w": (64, 128),
        "res_net18/~/logits/w": (512, 10),
    },
    linear="",
)
def resnet18() -> Built:
    """The library's."""
    return built(lambda images: hk.nets.ResNet18(10)(images, is_training=True), IMAGES)


@example(
    paths=X**26,  # 13 blocks of two layers in a row
    roles={
        "input": r"mobile_net_v1/conv2_d/w",
        "hidden": r"mobile_net_v1/mobile_net_v1_block(_\d+)?/(depth|point)wise_conv/w",
        "bias": r".*/offset|.*/b",
        "scale": r".*/scale",
        "readout": r"mobile_net_v1/logits/w",
    },
    fans={
        "mobile_net_v1/mobile_net_v1_block/depthwise_conv/w": (9, 9),
        "mobile_net_v1/mobile_net_v1_block/pointwise_conv/w": (32, 64),
    },
    linear="",
)
def mobilenet_v1() -> Built:
    """The library's."""
    return built(lambda images: hk.nets.MobileNetV1(num_classes=10)(images, True), IMAGES)


def preactivation_resnet_forward(images):
    x = hk.Conv2D(8, 3)(images)
    for features, stride in [(8, 1), (8, 1), (16, 2), (16, 1), (32, 2)]:
        y = jax.nn.relu(x)
        shortcut = hk.Conv2D(features, 1, stride, name="shortcut")(y) if stride > 1 else x
        y = jax.nn.relu(hk.Conv2D(features, 3, stride, name="first")(y))
        x = shortcut + hk.Conv2D(features, 3, name="second")(y)
    return hk.Linear(10)(jnp.mean(jax.nn.relu(x), axis=(1, 2)))


@example(
    paths=(1 + X**2) ** 3 * (X + X**2) ** 2,  # three identities, two projections
    roles={
        "input": r"conv2_d/w",
        "hidden": r"(first|second|shortcut)(_\d)?/w",
        "bias": r".*/b",
        "readout": r"linear/w",
    },
    fans={"first_2/w": (9 * 8, 9 * 16), "shortcut/w": (8, 16), "second_2/w": (9 * 16, 9 * 16)},
    linear="",
)
def preactivation_resnet() -> Built:
    return built(preactivation_resnet_forward, IMAGES)


def inception_forward(images):
    def layer(x, features, size):
        return jax.nn.relu(hk.Conv2D(features, size)(x))

    x = layer(images, 8, 3)
    for _ in range(2):
        branches = [
            layer(x, 4, 1),
            layer(layer(x, 6, 1), 8, 3),
            layer(layer(x, 2, 1), 4, 5),
            layer(hk.max_pool(x, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"), 4, 1),
        ]
        x = jnp.concatenate(branches, axis=-1)
    return hk.Linear(10)(jnp.mean(x, axis=(1, 2)))


@example(
    paths=(2 * X + 2 * X**2) ** 2,  # of four branches, two have one layer and two have two
    roles={
        "input": r"conv2_d/w",
        "hidden": r"conv2_d_\d+/w",
        "bias": r".*/b",
        "readout": r"linear/w",
    },
    fans={
        "conv2_d_5/w": (25 * 2, 25 * 4),
        "conv2_d_7/w": (4 + 8 + 4 + 4, 4),  # the first of the second module
    },
    linear="",  # what is joined are activations
)
def inception() -> Built:
    return built(inception_forward, IMAGES)


def transformer_forward(tokens):
    """A decoder as in the library's examples, with tokens 0 masked."""
    initializer = hk.initializers.VarianceScaling(0.5)
    positions = hk.get_parameter("positions", (6, 16), init=initializer)
    x = hk.Embed(50, 16)(tokens) + positions
    mask = (tokens > 0)[:, None, None] * np.tril(np.ones((1, 1, 6, 6)))

    def normalized(x):
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    for _ in range(3):
        y = normalized(x)
        attention = hk.MultiHeadAttention(2, 12, w_init=initializer, model_size=16)
        x = x + attention(y, y, y, mask=mask)
        y = jax.nn.gelu(hk.Linear(64, name="widening")(normalized(x)))
        x = x + hk.Linear(16, name="narrowing")(y)
    return hk.Linear(50, name="head")(normalized(x))


@example(
    # Attention is left by query, key or value, then goes through the output: 3X².
    paths=((1 + 3 * X**2) * (1 + X**2)) ** 3,
    roles={
        "embedding": r"embed/embeddings|~/positions",
        "hidden": r"multi_head_attention(_\d)?/\w+/w|(widening|narrowing)(_\d)?/w",
        "bias": r".*/b|.*/offset",
        "scale": r".*/scale",
        "readout": r"head/w",
    },
    fans={
        "multi_head_attention/query/w": (16, 24),
        "multi_head_attention_2/linear/w": (24, 16),
        "narrowing_1/w": (64, 16),
    },
    linear=r"multi_head_attention(_\d)?/\w+/w|widening(_\d)?/w",
)
def transformer() -> Built:
    return built(transformer_forward, TOKENS)


def recurrent_forward(core):
    def forward(tokens):
        x = jnp.transpose(hk.Embed(50, 8)(tokens), (1, 0, 2))  # time first
        recurrent = core(12)
        outputs, _ = hk.dynamic_unroll(recurrent, x, recurrent.initial_state(tokens.shape[0]))
        return hk.Linear(50)(outputs)

    return forward


@example(
    paths=fused_lstm_paths(6),
    roles={
        "embedding": r"embed/embeddings",
        "hidden": r"lstm/linear/w",
        "bias": r".*/b",
        "readout": r"linear/w",
    },
    fans={"lstm/linear/w": (8 + 12, 4 * 12), "linear/w": (12, 50)},
    edges={"lstm/linear/w": 6},
)
def lstm_language_model() -> Built:
    return built(recurrent_forward(hk.LSTM), TOKENS)


def gru_paths(steps):
    """The gates z, r are one vertex g; a = tanh(x + W(r·h)) and h' = (1 - z)·h + z·a."""
    hidden, outputs = 0 * X, 0 * X
    for _ in range(steps):
        gates = X * (1 + hidden)
        candidate = X + X * (gates + hidden)
        hidden = (gates + hidden) + (gates + candidate)
        outputs = outputs + hidden
    return outputs


@example(
    paths=gru_paths(6),
    roles={
        "embedding": r"embed/embeddings",
        "hidden": r"gru/w_[ih]",
        "bias": r"gru/b|linear/b",
        "readout": r"linear/w",
    },
    fans={"gru/w_i": (8, 36)},
    # A part makes both gates, the other the candidate.
    edges={"gru/w_i": 2 * 6, "gru/w_h": 11},
)
def gru_language_model() -> Built:
    return built(recurrent_forward(hk.GRU), TOKENS)


def actor_critic_forward(x):
    x = hk.nets.MLP([32, 32], activate_final=True)(x)
    value = hk.nets.MLP([16, 1], name="value")(x)
    return hk.Linear(4, name="policy")(x), value[..., 0]


@example(
    paths=X * (1 + X),  # to the policy from the torso, to the value through a layer more
    roles={
        "input": r"mlp/~/linear_0/w",
        "hidden": r"(mlp/~/linear_1|value/~/linear_0)/w",
        "bias": r".*/b",
        "readout": r"(policy|value/~/linear_1)/w",
    },
    fans={"policy/w": (32, 4), "value/~/linear_0/w": (32, 16), "value/~/linear_1/w": (16, 1)},
    linear="",
)
def actor_and_critic() -> Built:
    return built(actor_critic_forward, VECTORS)


def autoencoder_forward(images):
    x = jax.nn.relu(hk.Conv2D(8, 3, 2)(images))
    x = jax.nn.relu(hk.Conv2D(16, 3, 2)(x))
    x = jax.nn.relu(hk.Conv2DTranspose(12, 3, 2)(x))
    return hk.Conv2DTranspose(3, 3, 2)(x)


@example(
    paths=X**2,
    roles={
        "input": r"conv2_d/w",
        "hidden": r"conv2_d_1/w|conv2_d_transpose/w",
        "bias": r".*/b",
        "readout": r"conv2_d_transpose_1/w",
    },
    fans={
        "conv2_d_1/w": (9 * 8, 9 * 16),
        "conv2_d_transpose/w": (9 * 16 // 4, 9 * 12),  # the stride puts zeros between the rest
        "conv2_d_transpose_1/w": (9 * 12 // 4, 9 * 3),
    },
    linear="",
)
def convolutional_autoencoder() -> Built:
    return built(autoencoder_forward, IMAGES)


def variational_autoencoder_forward(x):
    hidden = jax.nn.relu(hk.Linear(32, name="encoder")(x))
    mean, log_variance = hk.Linear(4, name="mean")(hidden), hk.Linear(4, name="variance")(hidden)
    noise = jax.random.normal(hk.next_rng_key(), mean.shape)
    code = mean + jnp.exp(log_variance / 2) * noise
    decoded = hk.Linear(8, name="output")(jax.nn.relu(hk.Linear(32, name="decoder")(code)))
    return decoded, mean, log_variance


VAE_ROLES = {
    "input": r"encoder/w",
    "hidden": r"(mean|variance|decoder)/w",
    "bias": r".*/b",
    "readout": r"output/w",
}


@example(
    paths=2 * X**2 + 2 * X,  # the output, by mean or variance, and these two for the loss
    roles=VAE_ROLES,
    fans={"mean/w": (32, 4), "decoder/w": (4, 32)},
    linear=r"decoder/w",
)
def variational_autoencoder() -> Built:
    return built(variational_autoencoder_forward, VECTORS)


@example(
    paths=2 * X**2,
    roles=VAE_ROLES,
    fans={"mean/w": (32, 4), "decoder/w": (4, 32)},
    linear=r"decoder/w",
    options={"arrangement": "pre_activation"},
)
def variational_autoencoder_alone() -> Built:
    """Its code sums a mean and an activation, exp(log σ²/2)·ε: the arrangement is declared."""
    return built(lambda x: variational_autoencoder_forward(x)[0], VECTORS)


@example(
    paths=2 * X**2,
    roles=VAE_ROLES,
    fans={"mean/w": (32, 4), "decoder/w": (4, 32)},
    linear=r"decoder/w",
)
def variational_autoencoder_undeclared() -> Built:
    return built(lambda x: variational_autoencoder_forward(x)[0], VECTORS)


def graph_network_forward(graph):
    def update(name):
        return jraph.concatenated_args(hk.nets.MLP([16, 16], activate_final=True, name=name))

    embed = jraph.GraphMapFeatures(hk.Linear(12, name="edges"), hk.Linear(8, name="nodes"))
    graph = embed(graph)
    for _ in range(2):
        graph = jraph.GraphNetwork(update("edge_update"), update("node_update"))(graph)
    return hk.Linear(3, name="head")(graph.nodes)


def graph_network_paths(steps):
    """Edges join themselves with their nodes, nodes themselves with their edges; two layers each.

    Both are embedded by stems of their own, so that paths start at the inputs.
    """
    edges = nodes = X
    for _ in range(steps):
        edges = X**2 * (edges + nodes)
        nodes = X**2 * (nodes + edges)
    return nodes


@example(
    paths=graph_network_paths(2),
    roles={
        "input": r"(edges|nodes)/w",
        "hidden": r"(edge|node)_update(_1)?/~/linear_[01]/w",
        "bias": r".*/b",
        "readout": r"head/w",
    },
    fans={
        "edges/w": (4, 12),
        "edge_update/~/linear_0/w": (12 + 8 + 8, 16),
        "node_update_1/~/linear_0/w": (16 + 16 + 16, 16),
    },
)
def graph_network() -> Built:
    return built(graph_network_forward, graph_shapes())
