"""Traced functions against the graphs they are known to realise."""

import dataclasses

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import archscale_jax as archscale
from archscale_jax._architecture import Role
from archscale_jax._graph import Operator, live_vertices
from archscale_jax._spaces import random_dag_string
from archscale_jax.rules import INITIALIZATION_RULES
from archscale_jax.tracing import TraceError, trace
from experiments.lab.models import DagCNN, DagMLP

RELU = jax.nn.relu


def edges(architecture):
    """The edges as (sender, receiver, operator, kernel size)."""
    graph = architecture.graph
    columns = (graph.senders, graph.receivers, graph.edges["operator"], graph.edges["kernel_size"])
    return list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))


def roles(architecture):
    return {parameter.name: parameter.role for parameter in architecture.parameters}


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def concrete(params):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)


def abstract(make, *arguments, **options):
    """A model without arrays."""
    return nnx.eval_shape(lambda: make(*arguments, rngs=nnx.Rngs(0), **options))


def trace_model(model, inputs, **options):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rest = concrete(rest)

    def apply(params, inputs):
        return nnx.merge(graphdef, params, rest, copy=True)(inputs, train=True)

    return trace(apply, params, inputs, **options)


def assert_same(traced, architecture):
    for field in ("nodes", "senders", "receivers", "n_node", "n_edge"):
        expected = getattr(architecture.graph, field)
        np.testing.assert_array_equal(getattr(traced.graph, field), expected)
    assert edges(traced) == edges(architecture)
    assert traced.graph.globals["kernel_size"] == architecture.graph.globals["kernel_size"]
    assert common(traced) == common(architecture)
    assert traced.arrangement == architecture.arrangement


def common(architecture):
    """What a trace and an architecture that is written by hand both say of parameters."""
    return [dataclasses.replace(one, uses=(), start=None) for one in architecture.parameters]


def is_told_apart(graph):
    """Whether a function shows its graph.

    A vertex that is one skip is its source by another name, one that only a skip reads is a part of
    the sum that it leads to, and what nothing reaches is a constant.
    """
    skips = np.asarray(graph.edges["operator"]) == Operator.SKIP
    for vertex in range(int(graph.n_node[0])):
        for ends in (graph.receivers, graph.senders):
            alone = skips[np.asarray(ends) == vertex]
            if len(alone) == 1 and alone[0]:
                return False
    return bool(np.all(live_vertices(graph)))


LIVE = [
    text
    for seed in range(200)
    for text in [random_dag_string(seed, 3 + seed % 5)]
    if is_told_apart(archscale.dag_graph(text))
]


class TestNetworksOfGraphs:
    @settings(max_examples=8, phases=[Phase.generate])  # a shrunk graph says no more
    @given(
        text=st.sampled_from(LIVE),
        normalization=st.sampled_from([None, "batch", "layer"]),
        arrangement=st.sampled_from(["pre_activation", "activation"]),
        activation=st.sampled_from(["relu", "gelu"]),
        width=st.integers(2, 7),  # a scale of one entry may be a temperature
    )
    def test_mlps_give_their_graphs(self, text, normalization, arrangement, activation, width):
        model = abstract(
            DagMLP,
            archscale.dag_graph(text),
            6,
            width,
            3,
            normalization=normalization,
            arrangement=arrangement,
            activation=activation,
        )
        traced = trace_model(model, jnp.ones((4, 6)), arrangement=arrangement)
        assert_same(traced, model.architecture())

    @settings(max_examples=8, phases=[Phase.generate])
    @given(
        text=st.sampled_from(LIVE), arrangement=st.sampled_from(["pre_activation", "activation"])
    )
    def test_their_weights_are_drawn_as_those_of_the_architecture_on_paper(self, text, arrangement):
        model = abstract(DagMLP, archscale.dag_graph(text), 6, 5, 3, arrangement=arrangement)
        architecture = model.architecture()
        traced = trace_model(model, jnp.ones((4, 6)), arrangement=arrangement)
        for rule in INITIALIZATION_RULES:
            found, expected = (
                archscale.weight_standard_deviations(one, rule) for one in (traced, architecture)
            )
            assert found == pytest.approx(expected, rel=1e-6), rule

    @settings(max_examples=8, phases=[Phase.generate])
    @given(
        text=st.sampled_from(LIVE),
        kernel_size=st.sampled_from([1, 3, 5]),
        arrangement=st.sampled_from(["pre_activation", "activation"]),
    )
    def test_cnns_give_their_graphs(self, text, kernel_size, arrangement):
        graph = archscale.dag_graph(text, kernel_size=kernel_size)
        model = abstract(DagCNN, graph, 2, 4, 3, arrangement=arrangement)
        traced = trace_model(model, jnp.ones((2, 6, 6, 2)), arrangement=arrangement)
        assert_same(traced, model.architecture())

    def test_cells_give_their_graphs(self):
        text = (
            "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|"
            "avg_pool_3x3~2|"
        )
        model = abstract(DagCNN, archscale.cell_graph(text), 2, 4, 3)
        traced = trace_model(model, jnp.ones((2, 6, 6, 2)))
        assert edges(traced) == edges(model.architecture())
        assert common(traced) == common(model.architecture())

    @pytest.mark.parametrize("text", ["2_12_022", "2_02_222"])
    def test_the_arrangement_is_seen_where_vertices_sum(self, text):
        for arrangement in ("pre_activation", "activation"):
            graph = archscale.dag_graph(text)
            model = abstract(DagMLP, graph, 6, 5, 3, arrangement=arrangement)
            assert trace_model(model, jnp.ones((4, 6))).arrangement == arrangement

    def test_a_vertex_that_is_one_skip_is_its_source(self):
        model = abstract(DagMLP, archscale.dag_graph("1_02"), 6, 5, 3)
        assert edges(trace_model(model, jnp.ones((4, 6)))) == [(0, 1, Operator.LINEAR, 1)]

    def test_a_loss_gives_the_graph_of_its_logits(self):
        model = abstract(DagMLP, archscale.dag_graph("2_12_022"), 6, 5, 3)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, images, labels):
            logits = nnx.merge(graphdef, params, rest, copy=True)(images)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -jnp.mean(chosen)

        labels = jnp.zeros(4, jnp.int32)
        assert_same(trace(loss, params, jnp.ones((4, 6)), labels), model.architecture())


class TestPlainFunctions:
    def test_nothing_is_computed(self):
        """Weights of 400 GB."""
        size = 100_000
        params = shapes(stem=(8, size), hidden=(size, size), more=(size, size), readout=(size, 3))

        def apply(params, x):
            z = RELU(x @ params["stem"])
            z = RELU(RELU(z @ params["hidden"]) @ params["more"])
            return z @ params["readout"]

        traced = trace(apply, params, jax.ShapeDtypeStruct((2, 8), jnp.float32))
        assert edges(traced) == [(0, 1, Operator.LINEAR, 1), (1, 2, Operator.LINEAR, 1)]
        assert roles(traced) == {
            "stem": "input", "hidden": "hidden", "more": "hidden", "readout": "readout"
        }  # fmt: skip
        fans = {one.name: (one.fan_in, one.fan_out) for one in traced.parameters}
        assert fans["hidden"] == (size, size)
        assert fans["readout"] == (size, 3)

    def test_a_scanned_stack_is_the_unrolled_one(self):
        params = shapes(stem=(8, 16), stack=(4, 16, 16), biases=(4, 16), readout=(16, 3))

        def scanned(params, x):
            def layer(z, weights):
                kernel, bias = weights
                return z + RELU(z) @ kernel + bias, None

            z, _ = jax.lax.scan(layer, x @ params["stem"], (params["stack"], params["biases"]))
            return z @ params["readout"]

        def unrolled(params, x):
            z = x @ params["stem"]
            for kernel, bias in zip(params["stack"], params["biases"], strict=True):
                z = z + RELU(z) @ kernel + bias
            return z @ params["readout"]

        inputs = jax.ShapeDtypeStruct((2, 8), jnp.float32)
        traced = trace(scanned, params, inputs)
        assert archscale.path_statistics(traced.graph).max_depth == 4
        assert archscale.path_statistics(traced.graph).count == 2**4
        by_name = {one.name: one for one in traced.parameters}
        assert by_name["stack"].role == Role.HIDDEN
        assert (by_name["stack"].fan_in, by_name["stack"].fan_out) == (16, 16)
        assert len((by_name["stack"].edge, *by_name["stack"].further_edges)) == 4
        assert by_name["biases"].role == Role.BIAS
        assert edges(trace(unrolled, params, inputs)) == edges(traced)

    def test_concatenation_and_gates_are_vertices(self):
        params = shapes(stem=(8, 4), one=(4, 4), two=(4, 4), out=(8, 4), readout=(4, 3))

        def apply(params, x):
            z = RELU(x @ params["stem"])
            gated = (z @ params["one"]) * jax.nn.sigmoid(z @ params["two"])
            return (jnp.concatenate([z, gated], axis=-1) @ params["out"]) @ params["readout"]

        traced = trace(apply, params, jax.ShapeDtypeStruct((2, 8), jnp.float32))
        statistics = archscale.path_statistics(traced.graph)
        # z -> out, and z -> one -> out, z -> two -> out through the gate.
        assert (statistics.count, statistics.depth_sum) == (3, 1 + 2 + 2)

    def test_a_tied_table_is_an_embedding(self):
        params = shapes(table=(50, 16), position=(12, 16), hidden=(16, 16))

        def apply(params, tokens):
            z = params["table"][tokens] + params["position"]
            z = z + RELU(z) @ params["hidden"]
            return z @ params["table"].T

        traced = trace(apply, params, jax.ShapeDtypeStruct((2, 12), jnp.int32))
        assert roles(traced) == {
            "table": "embedding", "position": "embedding", "hidden": "hidden"
        }  # fmt: skip
        table = next(one for one in traced.parameters if one.name == "table")
        assert table.layer == Role.READOUT
        deviations = archscale.weight_standard_deviations(traced)
        assert deviations["table"] == pytest.approx(1 / 4)  # rows of norm 1
        assert deviations["position"] == pytest.approx(1 / 4)  # or it would drown the table
        # A layer beside a skip: two parallel edges, two contributions.
        assert edges(traced) == [(0, 1, Operator.SKIP, 1), (0, 1, Operator.LINEAR, 1)]
        assert archscale.in_degrees(traced.graph).tolist() == [1, 2]

    def test_dropout_masks_and_custom_derivatives_change_nothing(self):
        params = shapes(stem=(8, 4), hidden=(4, 4), readout=(4, 3))

        @jax.custom_jvp
        def square(x):
            return x * x

        square.defjvp(lambda primals, tangents: (square(*primals), tangents[0]))

        def apply(params, x, key, mask):
            z = square(x @ params["stem"])
            z = mask * jnp.where(jax.random.bernoulli(key, 0.5, z.shape), z / 0.5, 0.0)
            z = jax.checkpoint(lambda z: z @ params["hidden"])(z)
            return jax.jit(lambda z: RELU(z) @ params["readout"])(z)

        inputs, mask = (jax.ShapeDtypeStruct((2, size), jnp.float32) for size in (8, 1))
        assert edges(trace(apply, params, inputs, jax.random.key(0), mask)) == [
            (0, 1, Operator.LINEAR, 1)
        ]

    @pytest.mark.parametrize(
        ("spatial", "groups", "transposed"),
        [((3,), 1, False), ((3, 3), 1, False), ((3, 5, 3), 1, False), ((3, 3), 4, False),
         ((3, 3), 1, True)],
    )  # fmt: skip
    def test_fans_of_convolutions(self, spatial, groups, transposed):
        layer_type = linen.ConvTranspose if transposed else linen.Conv
        options = {} if transposed else {"feature_group_count": groups}

        class Model(linen.Module):
            @linen.compact
            def __call__(self, x):
                layer = layer_type(8, spatial, use_bias=False, **options)
                return linen.Dense(3)(RELU(layer(RELU(linen.Dense(4)(x)))))

        inputs = jnp.ones((1, *(6 for _ in spatial), 2))
        variables = jax.eval_shape(Model().init, jax.random.key(0), inputs)
        traced = trace(lambda params, x: Model().apply(params, x), variables, inputs)
        (kernel,) = (one for one in traced.parameters if one.role == Role.HIDDEN)
        positions = int(np.prod(spatial))
        assert kernel.fan_in == 4 // groups * positions
        assert kernel.fan_out == 8 // groups * positions
        assert kernel.kernel_size == max(spatial)

    def test_initializes_and_trains_a_traced_model(self):
        params = {
            "stem": jnp.zeros((8, 16)), "hidden": jnp.zeros((16, 16)), "readout": jnp.zeros((16, 3))
        }  # fmt: skip

        def apply(params, x):
            z = x @ params["stem"]
            return RELU(z + RELU(z) @ params["hidden"]) @ params["readout"]

        traced = trace(apply, params, jnp.ones((2, 8)))
        drawn = archscale.initialize(jax.random.key(0), params, traced)
        assert np.std(drawn["stem"]) == pytest.approx((2 / 8) ** 0.5, rel=0.3)
        multipliers = archscale.learning_rate_multipliers(
            traced, archscale.dag_graph("2"), "path_sum"
        )
        assert set(multipliers) == set(params)


class TestErrors:
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)

    def raises(self, apply, params, match, **options):
        with pytest.raises(TraceError, match=match):
            trace(apply, params, self.x, **options)

    def test_a_parameter_that_does_nothing(self):
        params = shapes(stem=(8, 4), hidden=(4, 4), readout=(4, 3), spare=(4, 4))
        apply = lambda p, x: RELU(RELU(x @ p["stem"]) @ p["hidden"]) @ p["readout"]  # noqa: E731
        self.raises(apply, params, "parameter 'spare' does nothing to the result")
        traced = trace(apply, params, self.x, roles={"spare": "bias"})
        assert roles(traced)["spare"] == Role.BIAS

    def test_layers_that_lead_nowhere_are_kept_wherever_they_stand(self):
        params = shapes(stem=(8, 4), hidden=(4, 4), dead=(4, 4), readout=(4, 3))

        def early(p, x):
            z = x @ p["stem"]
            _ = RELU(z) @ p["dead"]
            return RELU(RELU(z) @ p["hidden"]) @ p["readout"]

        def late(p, x):
            z = x @ p["stem"]
            y = RELU(z) @ p["hidden"]
            _ = RELU(z) @ p["dead"]
            return RELU(y) @ p["readout"]

        for apply in (early, late):
            traced = trace(apply, params, self.x)
            assert archscale.path_statistics(traced.graph).count == 1
            assert roles(traced)["dead"] == Role.HIDDEN
            assert set(archscale.vertex_features(apply, concrete(params), jnp.ones((2, 8)))) <= {
                0, int(traced.graph.n_node[0]) - 1, 1
            }  # fmt: skip

        def behind(p, x):
            y = RELU(RELU(x @ p["stem"]) @ p["hidden"])
            _ = y @ p["dead"]
            return y @ p["readout"]

        self.raises(behind, params, "parameter 'dead' does nothing to the result")

    def test_a_product_of_parameters_is_a_weight(self):
        params = shapes(stem=(8, 4), left=(4, 2), right=(2, 4), readout=(4, 3))

        def apply(params, x):
            z = RELU(x @ params["stem"])
            return RELU(z @ (params["left"] @ params["right"])) @ params["readout"]

        assert roles(trace(apply, params, self.x))["left"] == Role.HIDDEN
        traced = trace(apply, params, self.x, roles={"left": "hidden", "right": "hidden"})
        assert roles(traced)["left"] == Role.HIDDEN

    def test_a_while_loop(self):
        def apply(params, x):
            z = x @ params["stem"]
            z = jax.lax.while_loop(lambda z: jnp.sum(z) < 1, lambda z: z @ params["hidden"], z)
            return z @ params["readout"]

        params = shapes(stem=(8, 4), hidden=(4, 4), readout=(4, 3))
        self.raises(apply, params, "while .*'hidden'.*lax.scan")

    def test_a_bound_of_an_activation(self):
        params = shapes(stem=(8, 4), bound=(4,), readout=(4, 3))
        apply = lambda p, x: jnp.maximum(x @ p["stem"], p["bound"]) @ p["readout"]  # noqa: E731
        (bound,) = [p for p in trace(apply, params, self.x).parameters if p.name == "bound"]
        assert not bound.start_known
        declared = trace(apply, params, self.x, roles={"bound": "bias"})
        assert roles(declared)["bound"] == Role.BIAS

    def test_a_parameter_that_is_convolved(self):
        params = shapes(stem=(8, 4), image=(2, 6, 4), readout=(4, 3))

        def apply(params, x):
            z = x @ params["stem"]
            kernel = jnp.ones((3, 4, 4))
            added = jax.lax.conv_general_dilated(
                params["image"], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            return RELU(z + added[:, 0]) @ params["readout"]

        traced = trace(apply, params, self.x)  # by a constant: made of params, and added
        assert roles(traced)["image"] == Role.EMBEDDING

        def filtered(params, x):
            z = x @ params["stem"]
            added = jax.lax.conv_general_dilated(
                params["image"], z[0, None, None].repeat(4, 1).reshape(1, 4, 4), (1,), "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )  # fmt: skip
            return RELU(z + added[:, 0]) @ params["readout"]

        self.raises(filtered, params, "conv_general_dilated of .*'image' at .*features convolve")

    @pytest.mark.parametrize("kind", ["pure_callback", "io_callback", "debug_callback"])
    def test_callbacks(self, kind):
        def apply(params, x):
            z = x @ params["stem"]
            if kind == "debug_callback":
                jax.debug.callback(print, z)
            elif kind == "pure_callback":
                z = jax.pure_callback(lambda z: z, jax.ShapeDtypeStruct(z.shape, z.dtype), z)
            else:
                shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
                z = jax.experimental.io_callback(lambda z: z, shape, z)
            return RELU(z) @ params["readout"]

        params = shapes(stem=(8, 4), readout=(4, 3))
        if kind == "debug_callback":  # prints, and changes nothing
            assert len(trace(apply, params, self.x).parameters) == 2
        else:
            self.raises(apply, params, f"{kind} .*trace the function without it")

    def test_a_function_that_reads_no_inputs(self):
        params = shapes(stem=(8, 4), readout=(4, 3))
        apply = lambda p, x: RELU(jnp.ones((2, 8)) @ p["stem"]) @ p["readout"] + x.sum()  # noqa: E731
        self.raises(apply, params, "no parameter is applied to the inputs; pass what")

    def test_a_layer_written_as_a_product_and_a_sum(self):
        params = shapes(stem=(8, 4), table=(4, 3))
        apply = lambda p, x: ((x @ p["stem"])[:, :, None] * p["table"]).sum(1)  # noqa: E731
        (table,) = [p for p in trace(apply, params, self.x).parameters if p.name == "table"]
        assert (table.role, table.fan_in, table.fan_out) == (Role.READOUT, 4, 3)

    def test_a_result_without_inputs(self):
        self.raises(
            lambda p, x: p["bias"], shapes(bias=(4,)), "does not depend on inputs and params"
        )

    def test_unknown_roles(self):
        params = shapes(stem=(8, 4), readout=(4, 3))
        apply = lambda p, x: RELU(x @ p["stem"]) @ p["readout"]  # noqa: E731
        self.raises(apply, params, "unknown parameter in roles 'stm'; accepted are readout, stem;",
                     roles={"stm": "input"})  # fmt: skip

    def test_sums_of_both_kinds(self):
        params = shapes(stem=(8, 4), one=(4, 4), two=(4, 4), readout=(4, 3))

        def apply(params, x):
            z = RELU(x @ params["stem"])
            z = z + RELU(z @ params["one"])
            return (z + RELU(z) @ params["two"]) @ params["readout"]

        assert trace(apply, params, self.x).arrangement == "pre_activation"
        assert trace(apply, params, self.x, arrangement="activation").arrangement == "activation"


def test_parameters_are_plain_data():
    params = shapes(stem=(8, 4), readout=(4, 3))
    traced = trace(lambda p, x: RELU(x @ p["stem"]) @ p["readout"], params, jnp.ones((2, 8)))
    assert dataclasses.asdict(traced.parameters[0])["role"] == "readout"
    assert edges(traced) == [(0, 1, Operator.SKIP, 1)]


class TestInitialization:
    def test_a_layer_that_reads_no_activations_gets_half_the_variance(self):
        params = shapes(stem=(8, 64), linear=(64, 64), after=(64, 64), readout=(64, 3))

        def apply(params, x):
            z = x @ params["stem"]
            z = RELU(z @ params["linear"])
            return RELU(z @ params["after"]) @ params["readout"]

        traced = trace(apply, params, jax.ShapeDtypeStruct((2, 8), jnp.float32))
        deviations = archscale.weight_standard_deviations(traced)
        assert deviations["linear"] == pytest.approx((1 / 64) ** 0.5)
        assert deviations["after"] == pytest.approx((2 / 64) ** 0.5)

    def test_a_leaf_of_layers_that_want_different_variances_gets_the_smallest(self):
        params = shapes(stem=(8, 4), shared=(4, 4), readout=(4, 3))

        def apply(params, x):
            z = x @ params["stem"]
            first = RELU(z) @ params["shared"]
            second = RELU(first) @ params["shared"] + z
            return RELU(second) @ params["readout"]

        traced = trace(apply, params, jax.ShapeDtypeStruct((2, 8), jnp.float32))
        deviations = archscale.weight_standard_deviations(traced)
        assert deviations["shared"] == pytest.approx((2 / 4 / 2) ** 0.5)  # beside a skip
