"""DAG networks: against a plain NumPy evaluation of the equations, and their bookkeeping."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx
from hypothesis import strategies

from archscale_jax._architecture import Role
from archscale_jax._graph import Operator, Space, build_graph
from archscale_jax._spaces import cell_graph, dag_graph
from archscale_jax._trees import named_leaves
from archscale_jax.rules import learning_rate_scale, weight_standard_deviations
from experiments.lab.models import DagCNN, DagMLP, create_network

pytestmark = pytest.mark.quick_compilation

WIDTH, INPUTS, OUTPUTS = 3, 2, 2
BATCH_EPSILON, LAYER_EPSILON, BATCH_MOMENTUM = 1e-5, 1e-6, 0.99  # defaults of Flax


@strategies.composite
def dag_strings(draw, max_vertices=5):
    """DAG strings with a path from input to output."""
    vertices = draw(strategies.integers(2, max_vertices))
    groups = [
        draw(strategies.text("012", min_size=vertex, max_size=vertex))
        for vertex in range(1, vertices)
    ]
    reached = [True]
    for group in groups:
        reached.append(any(reached[u] and c != "0" for u, c in enumerate(group)))
    hypothesis.assume(reached[-1])
    return "_".join(groups)


def build(kind, *arguments, seed=0, **options):
    """A network whose parameters are all random, biases and scales included."""
    network = nnx.eval_shape(lambda: kind(*arguments, rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        positive = "scale" in name or "var" in name
        values = random.uniform(0.5, 2, leaf.shape) if positive else random.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    nnx.update(network, jax.tree_util.tree_map_with_path(fill, nnx.state(network)))
    return network


def mlp(text, **options):
    return build(DagMLP, dag_graph(text), INPUTS, WIDTH, OUTPUTS, **options)


def cnn(text, kernel_size=3, **options):
    graph = dag_graph(text, kernel_size=kernel_size)
    return build(DagCNN, graph, INPUTS, WIDTH, OUTPUTS, **options)


# The reference: float64 NumPy, straight from the equations, edges read from the string.


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0)


def convolution(layer, x):
    """Cross-correlation with zeros outside the image, one image and channel pair at a time."""
    kernel = layer["kernel"]
    size = kernel.shape[0]
    before = (size - 1) // 2
    x = np.pad(x, ((0, 0), *[(before, size - 1 - before)] * 2, (0, 0)))
    maps = [
        [
            sum(
                scipy.signal.correlate2d(image[..., i], kernel[..., i, o], mode="valid")
                for i in range(kernel.shape[2])
            )
            for o in range(kernel.shape[3])
        ]
        for image in x
    ]
    return np.moveaxis(np.array(maps), 1, -1) + layer.get("bias", 0)


def average_pool(x):
    """Mean of the 3x3 neighbours that lie inside the image."""
    pooled = np.empty_like(x)
    for row, column in itertools.product(*map(range, x.shape[1:3])):
        window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        pooled[:, row, column] = window.mean(axis=(1, 2))
    return pooled


def normalise(network, name, x, train):
    if network.normalization is None:
        return x
    module = network.normalizations[name]
    axes = (-1,) if network.normalization == "layer" else tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    if network.normalization == "batch" and not train:
        mean, variance = np.asarray(module.mean[...]), np.asarray(module.var[...])
    epsilon = BATCH_EPSILON if network.normalization == "batch" else LAYER_EPSILON
    scale, bias = np.asarray(module.scale[...]), np.asarray(module.bias[...])
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def edges_of(text):
    """(source, target, character) of the edges of a DAG string."""
    return [
        (source, target, character)
        for target, group in enumerate(text.split("_"), start=1)
        for source, character in enumerate(group)
        if character != "0"
    ]


def reference(network, text, x, *, sigma=relu, pre_activation=True, train=False):
    """Returns the features of all vertices and the output.

    A character `3` stands for pooling, which DAG strings lack.
    """
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(network, nnx.Param))
    )
    layer = convolution if isinstance(network, DagCNN) else dense
    edges = edges_of(text)

    def activate(x, name):
        return sigma(normalise(network, name, x, train))

    first = layer(params["stem"], np.asarray(x, np.float64))
    features = [first if pre_activation else activate(first, "stem")]
    for vertex in range(1, text.count("_") + 2):
        terms = [np.zeros_like(first)]
        for source, target, character in edges:
            if target != vertex:
                continue
            name = f"{source}_{target}"
            if character == "1":
                terms.append(features[source])
            elif character == "3":
                terms.append(average_pool(features[source]))
            elif pre_activation:
                seen = activate(features[source], str(source))
                terms.append(layer(params["layers"][name], seen))
            else:
                terms.append(activate(layer(params["layers"][name], features[source]), name))
        features.append(sum(terms))
    last = features[-1]
    if pre_activation:
        last = activate(last, str(len(features) - 1))
    if isinstance(network, DagCNN):
        last = last.mean(axis=(1, 2))
    return features, dense(params["readout"], last)


def agrees(network, text, x, *, train=False, **how):
    expected, output = reference(network, text, x, train=train, **how)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    for vertex, feature in enumerate(network.features(x, train=train)):
        size = 1 + np.abs(expected[vertex]).max()
        close(feature / size, expected[vertex] / size, err_msg=str(vertex))
    size = 1 + np.abs(output).max()
    close(network(x, train=train) / size, output / size)


def batch(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, *shape)), jnp.float32)


class TestEquations:
    """`DagMLP` and `DagCNN` against [AAS Eq. 1] and the authors' arrangement."""

    @hypothesis.given(
        text=dag_strings(),
        arrangement=strategies.sampled_from(["pre_activation", "activation"]),
        activation=strategies.sampled_from(["relu", "gelu"]),
        normalization=strategies.sampled_from([None, "batch", "layer"]),
        train=strategies.booleans(),
        use_bias=strategies.booleans(),
    )
    @hypothesis.settings(max_examples=12)
    def test_of_an_mlp(self, text, arrangement, activation, normalization, train, use_bias):
        network = mlp(
            text,
            arrangement=arrangement,
            activation=activation,
            normalization=normalization,
            use_bias=use_bias,
        )
        agrees(
            network,
            text,
            batch(INPUTS),
            sigma={"relu": relu, "gelu": gelu}[activation],
            pre_activation=arrangement == "pre_activation",
            train=train,
        )

    @hypothesis.given(
        text=dag_strings(max_vertices=4),
        arrangement=strategies.sampled_from(["pre_activation", "activation"]),
        normalization=strategies.sampled_from([None, "batch", "layer"]),
        train=strategies.booleans(),
        kernel_size=strategies.sampled_from([2, 3]),
    )
    @hypothesis.settings(max_examples=8)
    def test_of_a_cnn(self, text, arrangement, normalization, train, kernel_size):
        network = cnn(text, kernel_size, arrangement=arrangement, normalization=normalization)
        agrees(
            network,
            text,
            batch(4, 3, INPUTS),
            pre_activation=arrangement == "pre_activation",
            train=train,
        )

    def test_of_pooling(self):
        kinds = [Operator.CONV, Operator.AVG_POOL, Operator.CONV]
        graph = build_graph(3, [0, 0, 1], [1, 2, 2], kinds, [3, 1, 3])
        agrees(build(DagCNN, graph, INPUTS, WIDTH, OUTPUTS), "2_32", batch(4, 3, INPUTS))

    def test_of_kernels_of_several_sizes(self):
        kinds = [Operator.CONV] * 3
        graph = build_graph(3, [0, 0, 1], [1, 2, 2], kinds, [3, 1, 5], network_kernel=3)
        network = build(DagCNN, graph, INPUTS, WIDTH, OUTPUTS)
        shapes = {name: leaf.shape for name, leaf in named_leaves(nnx.state(network)).items()}
        assert shapes["stem/kernel"] == (3, 3, INPUTS, WIDTH)
        assert shapes["layers/0_2/kernel"] == (1, 1, WIDTH, WIDTH)
        assert shapes["layers/1_2/kernel"] == (5, 5, WIDTH, WIDTH)
        agrees(network, "2_22", batch(4, 3, INPUTS))

    def test_mlps_flatten_images(self):
        network, images = mlp("2"), batch(1, 2, 1)
        np.testing.assert_array_equal(network(images), network(images.reshape(4, INPUTS)))


class TestNormalization:
    @pytest.mark.parametrize("arrangement", ["pre_activation", "activation"])
    def test_running_statistics_change_in_training_only(self, arrangement):
        network = mlp("2_12", normalization="batch", arrangement=arrangement)
        before = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))
        assert jax.tree.leaves(before)
        x = batch(INPUTS)
        network(x)
        network(x, train=False)
        jax.tree.map(
            np.testing.assert_array_equal,
            nnx.to_pure_dict(nnx.state(network, nnx.BatchStat)),
            before,
        )
        features, _ = reference(
            network, "2_12", x, train=True, pre_activation=arrangement == "pre_activation"
        )
        network(x, train=True)
        after = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))["normalizations"]
        for name, statistics in after.items():
            assert np.all(statistics["mean"] != before["normalizations"][name]["mean"]), name
        if arrangement == "pre_activation":
            for vertex, feature in enumerate(features):
                old, new = before["normalizations"][str(vertex)], after[str(vertex)]
                for key, batch_value in (("mean", feature.mean(0)), ("var", feature.var(0))):
                    expected = BATCH_MOMENTUM * old[key] + (1 - BATCH_MOMENTUM) * batch_value
                    np.testing.assert_allclose(new[key], expected, rtol=1e-4, atol=1e-5)

    def test_stands_once_before_every_activation(self):
        def names(arrangement):
            # Vertex 1 has no weight edge out, so that nothing activates it.
            network = mlp("2_21_022", normalization="layer", arrangement=arrangement)
            return set(nnx.to_pure_dict(nnx.state(network, nnx.Param))["normalizations"])

        assert names("activation") == {"stem", "0_1", "0_2", "1_3", "2_3"}
        assert names("pre_activation") == {"0", "1", "2", "3"}

    def test_is_left_out_where_nothing_is_activated(self):
        network = mlp("2_21_002", normalization="layer")
        assert set(network.normalizations) == {"0", "2", "3"}

    def test_layer_normalization_has_no_state(self):
        network = mlp("2", normalization="layer")
        assert jax.tree.leaves(nnx.state(network, nnx.Not(nnx.Param))) == []


class TestArchitecture:
    @hypothesis.given(
        text=dag_strings(),
        kernel_size=strategies.sampled_from([None, 3]),
        normalization=strategies.sampled_from([None, "batch"]),
        use_bias=strategies.booleans(),
        arrangement=strategies.sampled_from(["pre_activation", "activation"]),
    )
    @hypothesis.settings(max_examples=15)
    def test_binds_every_leaf_once(self, text, kernel_size, normalization, use_bias, arrangement):
        graph = dag_graph(text, kernel_size=kernel_size)
        network = nnx.eval_shape(
            lambda: (DagCNN if kernel_size else DagMLP)(
                graph,
                7,
                5,
                2,
                normalization=normalization,
                use_bias=use_bias,
                arrangement=arrangement,
                rngs=nnx.Rngs(0),
            )
        )
        architecture = network.architecture()
        assert architecture.arrangement == arrangement
        leaves = named_leaves(nnx.state(network, nnx.Param))
        assert [parameter.name for parameter in architecture.parameters] == list(leaves)
        for parameter in architecture.parameters:
            assert parameter.shape == leaves[parameter.name].shape

        # The whole table, written out.
        area = kernel_size**2 if kernel_size else 1
        layers: dict[str, tuple] = {"stem": (Role.INPUT, 7, 5, kernel_size or 1, area, None)}
        for number, (source, target, character) in enumerate(edges_of(text)):
            if character == "2":
                layers[f"layers/{source}_{target}"] = (
                    *(Role.HIDDEN, 5, 5, kernel_size or 1, area, number),
                )
        layers["readout"] = (Role.READOUT, 5, 2, 1, 1, None)
        expected = {}
        for module, (role, fan_in, fan_out, size, positions, edge) in layers.items():
            row = (role, fan_in * positions, fan_out * positions, size, positions, edge)
            expected[f"{module}/kernel"] = (role, *row)
            if use_bias:
                expected[f"{module}/bias"] = (Role.BIAS, *row)
        found = {
            p.name: (
                *(p.role, p.layer, p.fan_in, p.fan_out),
                *(p.kernel_size, p.kernel_positions, p.edge),
            )
            for p in architecture.parameters
        }
        for name, row in list(found.items()):
            if name.startswith("normalizations/"):
                role = Role.BIAS if name.endswith("bias") else Role.SCALE
                assert row == (role, Role.HIDDEN, 5, 5, 1, 1, None)
                del found[name]
        assert found == expected

    @hypothesis.given(text=dag_strings(), kernel_size=strategies.sampled_from([None, 1, 5]))
    @hypothesis.settings(max_examples=15)
    def test_gives_the_graph_back(self, text, kernel_size):
        graph = dag_graph(text, kernel_size=kernel_size)
        network = nnx.eval_shape(lambda: create_network(graph, (8, 8, 1), 4, 3, rngs=nnx.Rngs(0)))
        assert isinstance(network, DagCNN if kernel_size else DagMLP)
        self.same(network.graph(), graph)
        self.same(network.architecture().graph, graph)

    def test_gives_the_graph_of_a_cell_back(self):
        graph = cell_graph("3_34_131")
        network = nnx.eval_shape(lambda: create_network(graph, (8, 8, 3), 4, 3, rngs=nnx.Rngs(0)))
        self.same(network.graph(), graph)
        assert network.graph().globals["space"][0] == Space.CELL
        scales = [learning_rate_scale(g, rule="chen2024_code") for g in (network.graph(), graph)]
        assert scales[0] == scales[1]

    @staticmethod
    def same(one, other):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


class TestErrors:
    def test_of_operators(self):
        with pytest.raises(ValueError, match="edge 0->1 is CONV; DagMLP has SKIP, LINEAR"):
            DagMLP(dag_graph("2", kernel_size=3), 1, 1, 1, rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match="edge 1->2 is LINEAR; DagCNN has SKIP, CONV, AVG_POOL"
        ):
            DagCNN(dag_graph("1_02"), 1, 1, 1, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"activation": "tanh"}, "activation 'tanh'; accepted are relu, gelu"),
            ({"normalization": "group"}, "normalization 'group'; accepted are None, batch, layer"),
            ({"arrangement": "sum"}, "arrangement 'sum'; accepted are pre_activation, activation"),
        ],
    )
    def test_of_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            DagMLP(dag_graph("2"), 1, 1, 1, rngs=nnx.Rngs(0), **options)

    @pytest.mark.parametrize("position", range(3))
    def test_of_sizes(self, position):
        sizes = [1, 1, 1]
        sizes[position] = 0
        name = ("in_features", "width", "out_features")[position]
        with pytest.raises(ValueError, match=f"{name} must be an integer from 1, found 0"):
            DagMLP(dag_graph("2"), *sizes, rngs=nnx.Rngs(0))


class TestUse:
    @pytest.mark.parametrize("size", [None, 3])
    def test_params_have_the_dtype_asked_for(self, size):
        graph = dag_graph("2_12", kernel_size=size)
        network = build(
            DagCNN if size else DagMLP,
            graph,
            INPUTS,
            WIDTH,
            OUTPUTS,
            normalization="layer",
            param_dtype=jnp.bfloat16,
        )
        params = jax.tree.leaves(nnx.state(network, nnx.Param))
        assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.bfloat16)}
        images = batch(4, 3, INPUTS) if size else batch(INPUTS)
        assert network(images).dtype == jnp.float32
        assert network(images.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    @pytest.mark.parametrize("arrangement", ["pre_activation", "activation"])
    def test_dead_edges_get_no_gradient(self, arrangement):
        """The input does not reach vertex 2, and vertex 3 does not reach the output.

        Only the bias of 2->4 acts, since σ(0) = 0 goes in and the bias comes out.
        """
        network = mlp("2_00_022_0220", arrangement=arrangement)
        graphdef, params = nnx.split(network)
        loss = jax.jit(lambda params: jnp.sum(nnx.merge(graphdef, params)(batch(INPUTS)) ** 2))
        layers = nnx.to_pure_dict(jax.grad(loss)(params))["layers"]
        is_zero = {
            f"{edge}/{leaf}": not np.any(value)
            for edge, leaves in layers.items()
            for leaf, value in leaves.items()
        }
        dead = {"1_3/kernel", "1_3/bias", "2_3/kernel", "2_3/bias", "2_4/kernel"}
        assert {name for name, zero in is_zero.items() if zero} == dead

    def test_jit_and_split_give_the_same(self):
        network = mlp("2_12", normalization="batch")
        x = batch(INPUTS)
        expected = network(x)
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(network, x), expected, rtol=1e-5)
        graphdef, params, rest = nnx.split(network, nnx.Param, ...)
        hash(graphdef)  # static argument of jit

        @functools.partial(jax.jit, static_argnums=0)
        def apply(graphdef, params, rest, x):
            return nnx.merge(graphdef, params, rest)(x)

        np.testing.assert_allclose(apply(graphdef, params, rest, x), expected, rtol=1e-5)
        assert graphdef == nnx.split(mlp("2_12", normalization="batch"), nnx.Param, ...)[0]

    def test_biases_start_at_zero(self):
        network = DagMLP(dag_graph("2"), WIDTH, WIDTH, WIDTH, rngs=nnx.Rngs(0))
        for name, leaf in named_leaves(nnx.state(network, nnx.Param)).items():
            assert np.any(leaf) == name.endswith("kernel")

    def test_without_biases_there_are_none(self):
        network = mlp("2_22", use_bias=False)
        assert all(name.endswith("kernel") for name in named_leaves(nnx.state(network)))


class TestEdgesInAnyOrder:
    def test_are_bound_to_their_own_variances(self):
        graph = dag_graph("2_22_002")
        order = np.array([2, 0, 3, 1])
        shuffled = graph._replace(
            senders=graph.senders[order],
            receivers=graph.receivers[order],
            edges={name: column[order] for name, column in graph.edges.items()},
        )
        deviations = [
            weight_standard_deviations(DagMLP(one, 4, 8, 3, rngs=nnx.Rngs(0)).architecture())
            for one in (graph, shuffled)
        ]
        assert deviations[0] == deviations[1]

    def test_may_not_point_backwards(self):
        graph = dag_graph("2_22")
        backwards = graph._replace(senders=graph.receivers, receivers=graph.senders)
        with pytest.raises(ValueError, match="points backwards"):
            DagMLP(backwards, 4, 8, 3, rngs=nnx.Rngs(0))
