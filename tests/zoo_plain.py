"""The zoo without a framework: functions of a dict of arrays."""

import math

import jax
import jax.numpy as jnp
import optax

from tests.zoo import ONE, Built, X, example, unsupported

RELU = jax.nn.relu
VECTORS = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SEQUENCES = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


@example(
    paths=(1 + X + X**2) ** 2,  # a skip, the gate, or an expert of two layers
    roles={
        "input": r"stem",
        "hidden": r"layers/\d/(gate|into|out)",
        "readout": r"readout",
    },
    # An input is read by every one of four experts, a hidden unit by its own alone.
    fans={"layers/0/gate": (16, 4), "layers/0/into": (16, 4 * 32), "layers/0/out": (32, 16)},
    linear=r"layers/\d/(gate|into)",
)
def mixture_of_experts() -> Built:
    def apply(params, x):
        x = x @ params["stem"]
        for layer in params["layers"]:
            gates = jax.nn.softmax(x @ layer["gate"])
            hidden = jax.nn.gelu(jnp.einsum("bd,edh->beh", x, layer["into"]))
            experts = jnp.einsum("beh,ehd->bed", hidden, layer["out"])
            x = x + jnp.einsum("be,bed->bd", gates, experts)
        return x @ params["readout"]

    layers = [shapes(gate=(16, 4), into=(4, 16, 32), out=(4, 32, 16)) for _ in range(2)]
    return apply, {**shapes(stem=(8, 16), readout=(16, 3)), "layers": layers}, (VECTORS,)


@example(
    paths=(2 * X) ** 2,  # of itself or of its neighbours; the first of three layers is the stem
    roles={
        "input": r"layers/0/(own|neighbours)",
        "hidden": r"layers/[12]/(own|neighbours)",
        "bias": r"layers/\d/bias",
        "readout": r"readout",
    },
    fans={"layers/0/own": (8, 16), "layers/1/neighbours": (16, 16)},
    linear="",
)
def message_passing() -> Built:
    def apply(params, nodes, senders, receivers):
        for layer in params["layers"]:
            messages = (nodes @ layer["neighbours"])[senders]
            received = jax.ops.segment_sum(messages, receivers, len(nodes))
            nodes = RELU(nodes @ layer["own"] + received + layer["bias"])
        return jnp.mean(nodes, axis=0) @ params["readout"]

    layers = [shapes(own=(n, 16), neighbours=(n, 16), bias=(16,)) for n in (8, 16, 16)]
    graph = (
        jax.ShapeDtypeStruct((10, 8), jnp.float32),
        jax.ShapeDtypeStruct((20,), jnp.int32),
        jax.ShapeDtypeStruct((20,), jnp.int32),
    )
    return apply, {"layers": layers, **shapes(readout=(16, 3))}, graph


@example(
    paths=(1 + X) ** 5,
    roles={
        "input": r"stem",
        "hidden": r"layers/\d/kernel",
        "scale": r"layers/\d/strength",
        "readout": r"readout",
    },
    fans={"layers/0/kernel": (16, 16)},
    linear="",
)
def rezero() -> Built:
    """Every branch begins at the strength of zero, a scalar parameter."""

    def apply(params, x):
        x = x @ params["stem"]
        for layer in params["layers"]:
            x = x + layer["strength"] * (RELU(x) @ layer["kernel"])
        return x @ params["readout"]

    layers = [shapes(kernel=(16, 16), strength=()) for _ in range(5)]
    return apply, {**shapes(stem=(8, 16), readout=(16, 3)), "layers": layers}, (VECTORS,)


@example(
    paths=(1 + 3 * X) ** 4,  # t·H is two layers, (1 - t)·x a layer or a skip
    roles={
        "input": r"stem",
        "hidden": r"layers/\d/(gate|kernel)",
        "bias": r"layers/\d/bias",
        "readout": r"readout",
    },
    fans={"layers/0/gate": (16, 16)},
)
def highway() -> Built:
    def apply(params, x):
        x = jnp.tanh(x @ params["stem"])
        for layer in params["layers"]:
            gate = jax.nn.sigmoid(x @ layer["gate"] + layer["bias"])
            x = gate * jnp.tanh(x @ layer["kernel"]) + (1 - gate) * x
        return x @ params["readout"]

    layers = [shapes(gate=(16, 16), bias=(16,), kernel=(16, 16)) for _ in range(4)]
    return apply, {**shapes(stem=(8, 16), readout=(16, 3)), "layers": layers}, (VECTORS,)


@example(
    # From the inputs: h = X(1 + h) at each of six steps, X + … + X⁶.
    paths=sum((X**step for step in range(1, 7)), 0 * X),
    roles={"input": r"into", "hidden": r"recurrent", "bias": r"bias", "readout": r"readout"},
    fans={"into": (8, 16), "recurrent": (16, 16)},
    edges={"into": 6, "recurrent": 5},
)
def elman_network() -> Built:
    def apply(params, sequence):
        def step(hidden, x):
            return jnp.tanh(x @ params["into"] + hidden @ params["recurrent"] + params["bias"]), ()

        hidden, _ = jax.lax.scan(step, jnp.zeros((2, 16)), jnp.swapaxes(sequence, 0, 1))
        return hidden @ params["readout"]

    sizes = {"into": (8, 16), "recurrent": (16, 16), "bias": (16,), "readout": (16, 3)}
    return apply, shapes(**sizes), (SEQUENCES,)


def attention(params, x, mask):
    """Pre-norm attention of one head and MLP; `mask` is added to what the softmax reads."""

    def normalized(x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    y = normalized(x)
    if "fused" in params:
        query, key, value = jnp.split(y @ params["fused"], 3, axis=-1)
    else:
        query, key, value = (y @ params[name] for name in ("query", "key", "value"))
    logits = query @ jnp.swapaxes(key, 1, 2) / 4 + mask
    x = x + jax.nn.softmax(logits) @ value @ params["out"]
    return x + jax.nn.gelu(normalized(x) @ params["fc1"]) @ params["fc2"]


def decoder(layer, apply) -> Built:
    layers = [shapes(**layer, out=(16, 16), fc1=(16, 64), fc2=(64, 16)) for _ in range(3)]
    params = {**shapes(table=(50, 16), readout=(16, 50)), "layers": layers}
    return apply, params, (TOKENS,)


@example(
    paths=((1 + 3 * X**2) * (1 + X**2)) ** 3,  # as where it is a choice: a mask is not a feature
    roles={
        "embedding": r"table",
        "hidden": r"layers/\d/(query|key|value|out|fc1|fc2)",
        "readout": r"readout",
    },
    fans={"layers/0/fc2": (64, 16)},
    linear=r"layers/\d/(query|key|value|out|fc1)",
)
def decoder_with_an_additive_mask() -> Built:
    """Padding, tokens 0, is masked by a sum."""

    def apply(params, tokens):
        mask = jnp.where(tokens > 0, 0.0, -1e9)[:, None]
        x = params["table"][tokens]
        for layer in params["layers"]:
            x = attention(layer, x, mask)
        return x @ params["readout"]

    return decoder({"query": (16, 16), "key": (16, 16), "value": (16, 16)}, apply)


@example(
    paths=(1 + X**2) ** 6,  # attention is a function of the one vertex that the projection makes
    roles={
        "embedding": r"table",
        "hidden": r"layers/\d/(fused|out|fc1|fc2)",
        "readout": r"readout",
    },
    fans={"layers/0/fused": (16, 48)},
)
def decoder_with_a_fused_projection() -> Built:
    def apply(params, tokens):
        x = params["table"][tokens]
        for layer in params["layers"]:
            x = attention(layer, x, jnp.where(jnp.tri(6) > 0, 0.0, -1e9))
        return x @ params["readout"]

    return decoder({"fused": (16, 48)}, apply)


@example(
    paths=X**3 + X**2,  # images through three layers times texts through two; no readout
    roles={
        "input": r"images/0",
        "hidden": r"images/[12]|project",
        "embedding": r"texts",
        "scale": r"temperature",
    },
    fans={"images/0": (8, 32), "texts": (1, 24), "project": (24, 16)},
    linear=r"project",
)
def contrastive_pair_of_towers() -> Built:
    def apply(params, images, texts):
        for kernel in params["images"][:-1]:
            images = RELU(images @ kernel)
        images = images @ params["images"][-1]
        texts = jnp.mean(params["texts"][texts], axis=1) @ params["project"]
        images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return jnp.exp(params["temperature"]) * images @ texts.T

    leaves = shapes(texts=(50, 24), project=(24, 16), temperature=())
    images = list(shapes(a=(8, 32), b=(32, 32), c=(32, 16)).values())
    return apply, {**leaves, "images": images}, (VECTORS, TOKENS)


@example(
    paths=2 * X,  # a user's row times an item's
    roles={"embedding": r"users|items", "bias": r"bias"},
    fans={"users": (1, 16), "items": (1, 16)},
)
def matrix_factorization() -> Built:
    def apply(params, user, item):
        return jnp.sum(params["users"][user] * params["items"][item], axis=-1) + params["bias"]

    index = jax.ShapeDtypeStruct((2,), jnp.int32)
    return apply, shapes(users=(30, 16), items=(40, 16), bias=()), (index, index)


def field(params, point):
    """A scalar field of a point, as physics-informed networks have it."""
    for layer in params[:-1]:
        point = jnp.sin(point @ layer["kernel"] + layer["bias"])
    layer = params[-1]
    return (point @ layer["kernel"])[0] + layer.get("bias", 0.0)


def field_shapes():
    sizes = [(2, 16), (16, 16), (16, 16), (16, 1)]
    layers = [shapes(kernel=size, bias=size[1:]) for size in sizes]
    layers[-1]["bias"] = jax.ShapeDtypeStruct((), jnp.float32)
    return layers


def field_and_slope(params, point):
    return jax.jvp(lambda point: field(params, point), (point,), (jnp.ones(2),))


# A layer of the slope reads cos(z)·dz: it has X(z + dz) paths, and z has X to the layers before.
# dz of the first layer is made of a constant, the next X(1 + 0), the third X(X + X); the readout of
# the slope reads X² + 2X², that of the field X².
FIELD = {
    "roles": {
        "input": r"0/kernel",
        "hidden": r"[12]/kernel",
        "bias": r"\d/bias",
        "readout": r"3/kernel",
    },
    "fans": {"0/kernel": (2, 16), "1/kernel": (16, 16), "3/kernel": (16, 1)},
    "edges": {"1/kernel": 2},
}
POINT = jax.ShapeDtypeStruct((2,), jnp.float32)


@example(**FIELD, paths=X**2 + 3 * X**2)
def field_and_its_slope() -> Built:
    return field_and_slope, field_shapes(), (POINT,)


@example(**FIELD, paths=3 * X**2)
def slope_of_a_field() -> Built:
    """The value of the field is computed and dropped."""
    params = field_shapes()
    del params[-1]["bias"]  # the slope does not depend on it
    return lambda params, point: field_and_slope(params, point)[1], params, (POINT,)


def perceptron(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


PERCEPTRON = {
    "paths": X**2,
    "roles": {
        "input": r"0/kernel",
        "hidden": r"[12]/kernel",
        "bias": r"\d/bias",
        "readout": r"3/kernel",
    },
    "fans": {"0/kernel": (8, 16), "3/kernel": (16, 3)},
    "linear": "",
}


def perceptron_shapes():
    return [shapes(kernel=size, bias=size[1:]) for size in [(8, 16), (16, 16), (16, 16), (16, 3)]]


@example(**PERCEPTRON)
def classification_loss() -> Built:
    """A loss has the graph of its logits."""

    def loss(params, x, labels):
        logits = perceptron(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, perceptron_shapes(), (VECTORS, jax.ShapeDtypeStruct((2,), jnp.int32))


@example(**PERCEPTRON)
def regression_loss() -> Built:
    """A loss has the graph of its predictions."""

    def loss(params, x, targets):
        return optax.squared_error(perceptron(params, x), targets).mean()

    return loss, perceptron_shapes(), (VECTORS, jax.ShapeDtypeStruct((2, 3), jnp.float32))


@example(
    paths=X,  # one kernel, a sum of a leaf and a product with one factor kept as it is
    roles={"input": r"stem", "hidden": r"frozen|left|right", "readout": r"readout"},
    fans={"frozen": (16, 16)},
    linear="",
)
def low_rank_update() -> Built:
    def apply(params, x):
        x = RELU(x @ params["stem"])
        kernel = params["frozen"] + params["left"] @ params["right"] * 2.0
        return RELU(x @ kernel) @ params["readout"]

    sizes = {"stem": (8, 16), "frozen": (16, 16), "left": (16, 2), "right": (2, 16)}
    return apply, shapes(**sizes, readout=(16, 3)), (VECTORS,)


@unsupported(r"while .* write it as lax.scan")
def equilibrium() -> Built:
    def apply(params, x):
        x = x @ params["stem"]

        def far(state):
            return jnp.linalg.norm(state - jnp.tanh(state @ params["hidden"] + x)) > 1e-3

        state = jax.lax.while_loop(far, lambda z: jnp.tanh(z @ params["hidden"] + x), x)
        return state @ params["readout"]

    return apply, shapes(stem=(8, 16), hidden=(16, 16), readout=(16, 3)), (VECTORS,)


@example(
    paths=ONE,  # a state is a function of the vertex whose steps it sums
    roles={"input": r"stem", "scale": r"decay", "readout": r"readout"},
    fans={"readout": (16, 3)},
)
def state_space_layer() -> Built:
    """A diagonal state of four numbers a feature, as in S4D and Mamba."""

    def apply(params, sequence):
        x = sequence @ params["stem"]

        def step(state, x):
            state = jnp.exp(params["decay"]) * state + x[..., None]
            return state, jnp.sum(state, axis=-1)

        _, outputs = jax.lax.scan(step, jnp.zeros((2, 16, 4)), jnp.swapaxes(x, 0, 1))
        return outputs @ params["readout"] / math.sqrt(16)

    return apply, shapes(stem=(8, 16), decay=(16, 4), readout=(16, 3)), (SEQUENCES,)
