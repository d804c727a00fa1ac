"""The initializer: distribution of the draws, their independence, and where they are put."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._initialize import initialize
from archscale_jax._spaces import dag_graph
from archscale_jax._trees import map_with_names, named_leaves
from archscale_jax.rules import WeightVariances, weight_standard_deviations
from experiments.lab.models import DagCNN, DagMLP

KEY = jax.random.key(7)


@functools.cache
def mlp(text="2_02_212", **options):
    """Shapes of an MLP's parameters as a pure dictionary, with its architecture."""
    network = abstract_mlp(text, **options)
    return nnx.to_pure_dict(nnx.state(network, nnx.Param)), network.architecture()


def abstract_mlp(text, **options):
    """An MLP without arrays; all have the same sizes, so that they share compiled programs."""
    return nnx.eval_shape(lambda: DagMLP(dag_graph(text), 20, 64, 10, rngs=nnx.Rngs(0), **options))


def layer(dtype=jnp.float32):
    """Shapes of one layer with a weight, a bias and a scale, and its architecture."""
    shapes = {"bias": (64,), "kernel": (64, 64), "scale": (64,)}
    roles = (Role.BIAS, Role.HIDDEN, Role.SCALE)
    parameters = tuple(
        Parameter(name, role, Role.HIDDEN, shape, fan_in=64, fan_out=64, edge=0)
        for (name, shape), role in zip(shapes.items(), roles, strict=True)
    )
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return params, Architecture(dag_graph("2"), parameters)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.quick_compilation
class TestDistribution:
    """Standard deviations written out by hand; sampling error of one is about std / sqrt(2 n)."""

    def check(self, params, architecture, expected, rule=None):
        leaves = named_leaves(initialize(KEY, params, architecture, rule))
        standardised = []
        for name, leaf in leaves.items():
            if name.endswith(("bias", "scale")):
                np.testing.assert_array_equal(leaf, float(name.endswith("scale")))
                continue
            draws = np.asarray(leaf, np.float64).ravel() / expected[name]
            assert abs(math.sqrt(np.mean(draws**2)) - 1) < 5 / math.sqrt(2 * draws.size), name
            assert abs(np.mean(draws)) < 5 / math.sqrt(draws.size), name
            standardised.append(draws)
        assert len(standardised) == len(expected)
        assert scipy.stats.kstest(np.concatenate(standardised), "norm").pvalue > 1e-4

    def test_of_summed_pre_activations_takes_the_target_in_degree(self):
        params, architecture = mlp("2_02_212", normalization="layer")
        expected = {
            "stem/kernel": math.sqrt(2 / 20),
            "layers/0_1/kernel": math.sqrt(2 / 64),
            "layers/1_2/kernel": math.sqrt(2 / 64),
            "layers/0_3/kernel": math.sqrt(2 / 3 / 64),  # three edges enter vertex 3
            "layers/2_3/kernel": math.sqrt(2 / 3 / 64),
            "readout/kernel": math.sqrt(2) / 64,
        }
        self.check(params, architecture, expected)

    def test_of_summed_activations_takes_the_source_in_degree(self):
        params, architecture = mlp("2_22_002", arrangement="activation")
        expected = {
            "stem/kernel": math.sqrt(2 / 20),
            "layers/0_1/kernel": math.sqrt(2 / 64),
            "layers/0_2/kernel": math.sqrt(2 / 64),
            "layers/1_2/kernel": math.sqrt(2 / 64),
            "layers/2_3/kernel": math.sqrt(2 / 2 / 64),  # two edges enter vertex 2
            "readout/kernel": math.sqrt(2) / 64,
        }
        self.check(params, architecture, expected)

    def test_of_a_convolution_counts_the_receptive_field(self):
        graph = dag_graph("2_22", kernel_size=3)
        network = nnx.eval_shape(lambda: DagCNN(graph, 12, 12, 20, rngs=nnx.Rngs(0)))
        expected = {
            "stem/kernel": math.sqrt(2 / (9 * 12)),
            "layers/0_1/kernel": math.sqrt(2 / (9 * 12)),
            "layers/0_2/kernel": math.sqrt(2 / 2 / (9 * 12)),
            "layers/1_2/kernel": math.sqrt(2 / 2 / (9 * 12)),
            "readout/kernel": math.sqrt(2) / 12,
        }
        self.check(nnx.state(network, nnx.Param), network.architecture(), expected)

    @pytest.mark.parametrize("rule", ["he_normal", "chen2024_code", "second_moment"])
    def test_takes_any_rule_by_name(self, rule):
        params, architecture = mlp("2_02_212")
        self.check(params, architecture, weight_standard_deviations(architecture, rule), rule)

    def test_takes_a_function_as_rule(self):
        def constant(architecture):
            edges = np.full(len(architecture.graph.senders), 7.0)
            return WeightVariances(edges, readout_gain=3.0)

        params, architecture = mlp("2")
        expected = {
            "stem/kernel": math.sqrt(2 / 20),
            "layers/0_1/kernel": math.sqrt(7 / 64),
            "readout/kernel": 3 / 64,
        }
        self.check(params, architecture, expected, constant)


class TestDraws:
    def test_are_fixed_by_the_key(self):
        params, architecture = mlp()
        equal(initialize(KEY, params, architecture), initialize(KEY, params, architecture))
        other = named_leaves(initialize(jax.random.key(8), params, architecture))
        first = named_leaves(initialize(KEY, params, architecture))
        for name in weight_standard_deviations(architecture):
            assert not np.any(np.asarray(first[name]) == np.asarray(other[name])), name

    def test_of_two_leaves_are_unrelated(self):
        params, architecture = mlp("2_22_222")
        weights = [
            np.asarray(leaf).ravel()
            for name, leaf in named_leaves(initialize(KEY, params, architecture)).items()
            if name.startswith("layers") and name.endswith("kernel")
        ]
        correlations = np.corrcoef(weights) - np.eye(len(weights))
        assert np.abs(correlations).max() < 5 / math.sqrt(64 * 64)

    def test_do_not_depend_on_which_other_layers_exist(self):
        small = named_leaves(initialize(KEY, *mlp("2_02"), "he_normal"))
        large = named_leaves(
            initialize(KEY, *mlp("2_22_212_2222", normalization="batch"), "he_normal")
        )
        assert set(small) < set(large)
        for name, leaf in small.items():
            np.testing.assert_array_equal(leaf, large[name], err_msg=name)

    def test_do_not_depend_on_the_old_values_or_the_order_of_leaves(self):
        params, architecture = mlp()
        shuffled = Architecture(architecture.graph, architecture.parameters[::-1])
        drawn = weight_standard_deviations(architecture)
        old = map_with_names(
            lambda name, leaf: np.full(leaf.shape, np.nan if name in drawn else 0, leaf.dtype),
            params,
        )
        equal(initialize(KEY, params, architecture), initialize(KEY, old, shuffled))

    def test_leave_what_is_not_drawn_as_it_is(self):
        params, architecture = mlp("2_02", normalization="batch")
        drawn = weight_standard_deviations(architecture)
        old = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.3, leaf.dtype), params)
        found = named_leaves(initialize(KEY, old, architecture))
        shapes = jax.eval_shape(lambda: old)
        fresh = named_leaves(initialize(KEY, shapes, architecture))
        assert {name for name, leaf in found.items() if jnp.all(leaf == 0.3)} == (
            set(found) - set(drawn)
        )
        for name in set(found) - set(drawn):
            assert jnp.all(fresh[name] == (1 if name.endswith("scale") else 0)), name

    def test_are_the_same_under_jit(self):
        params, architecture = layer()
        compiled = jax.jit(lambda key: initialize(key, params, architecture))(KEY)
        equal(compiled, initialize(KEY, params, architecture))

    def test_take_params_as_an_argument_of_jit(self):
        params, architecture = layer()
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        compiled = jax.jit(lambda key, params: initialize(key, params, architecture))(KEY, params)
        equal(compiled, initialize(KEY, params, architecture))

    def test_are_the_same_under_vmap(self):
        params, architecture = layer()
        keys = jax.random.split(KEY, 3)
        mapped = jax.jit(jax.vmap(lambda key: initialize(key, params, architecture)))(keys)
        for index, key in enumerate(keys):
            one = {name: leaf[index] for name, leaf in mapped.items()}
            equal(one, initialize(key, params, architecture))


class TestTypes:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_dtype_is_kept_and_only_rounds(self, dtype):
        drawn = initialize(KEY, *layer(dtype))
        assert {leaf.dtype for leaf in drawn.values()} == {jnp.dtype(dtype)}
        full = initialize(KEY, *layer())
        equal(drawn, {name: leaf.astype(dtype) for name, leaf in full.items()})

    def test_low_precision_is_the_same_under_jit(self):
        params, architecture = layer(jnp.bfloat16)
        compiled = jax.jit(lambda key: initialize(key, params, architecture))(KEY)
        equal(compiled, initialize(KEY, params, architecture))

    def test_float64_is_kept_and_has_its_precision(self):
        with jax.enable_x64(True):
            drawn = initialize(KEY, *layer(jnp.float64))
        assert {leaf.dtype for leaf in drawn.values()} == {np.dtype(np.float64)}
        weights = np.asarray(drawn["kernel"])
        assert np.any(weights != weights.astype(np.float32))

    def test_of_every_leaf_is_its_own(self):
        params, architecture = layer()
        params["bias"] = jax.ShapeDtypeStruct((64,), jnp.bfloat16)
        drawn = initialize(KEY, params, architecture)
        assert [str(leaf.dtype) for leaf in drawn.values()] == ["bfloat16", "float32", "float32"]

    @pytest.mark.parametrize("make", [np.zeros, jnp.zeros])
    def test_arrays_and_shapes_are_the_same(self, make):
        shapes, architecture = mlp()
        params = jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), shapes)
        equal(initialize(KEY, params, architecture), initialize(KEY, shapes, architecture))

    def test_states_and_dictionaries_get_the_same_draws(self):
        network = abstract_mlp("2_12", normalization="batch")
        state, architecture = nnx.state(network, nnx.Param), network.architecture()
        drawn = initialize(KEY, state, architecture)
        assert isinstance(drawn, nnx.State)
        nnx.update(network, drawn)
        equal(nnx.state(network, nnx.Param), drawn)
        equal(initialize(KEY, nnx.to_pure_dict(state), architecture), nnx.to_pure_dict(drawn))

    def test_eval_shape_draws_nothing(self):
        width = 10**6  # a kernel of 2 TB
        kernel = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
        architecture = Architecture(
            dag_graph("2"),
            (Parameter("w", Role.HIDDEN, Role.HIDDEN, kernel.shape, width, width, edge=0),),
        )
        shape = jax.eval_shape(lambda key: initialize(key, {"w": kernel}, architecture), KEY)
        assert (shape["w"].shape, shape["w"].dtype) == (kernel.shape, kernel.dtype)


class TestErrors:
    def test_name_a_missing_leaf(self):
        params, architecture = mlp("2")
        params = {name: leaves for name, leaves in params.items() if name != "readout"}
        with pytest.raises(ValueError, match=r"lack 'readout/bias' of shape \(10,\)"):
            initialize(KEY, params, architecture)

    def test_name_an_extra_leaf(self):
        params, architecture = mlp("2")
        params = {**params, "extra": {"kernel": np.zeros((2, 2))}}
        with pytest.raises(ValueError, match=r"'extra/kernel' of shape \(2, 2\)"):
            initialize(KEY, params, architecture)

    def test_name_a_leaf_of_another_shape(self):
        params, architecture = layer()
        params["bias"] = jax.ShapeDtypeStruct((32,), jnp.float32)
        with pytest.raises(ValueError, match=r"'bias' has shape \(32,\); .* expects \(64,\)"):
            initialize(KEY, params, architecture)

    def test_are_raised_under_jit_too(self):
        params, architecture = mlp("2")
        with pytest.raises(ValueError, match="'layers/0_1/bias'"):
            jax.jit(lambda key: initialize(key, {"stem": params["stem"]}, architecture))(KEY)

    def test_name_an_unknown_rule(self):
        with pytest.raises(
            ValueError, match="unknown initialization rule 'he'; accepted are target"
        ):
            initialize(KEY, *mlp("2"), "he")
