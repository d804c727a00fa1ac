"""Names of parameter leaves, and what an architecture refuses."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from archscale_jax.architecture import (
    Architecture,
    Arrangement,
    Parameter,
    Role,
    check_leaf,
    check_parameters,
)
from archscale_jax.models import DagMLP
from archscale_jax.spaces import dag_graph
from archscale_jax.trees import named_leaves, parameter_name


class Pair(NamedTuple):
    """Two leaves reached by attribute."""

    first: jax.Array
    second: dict[str, jax.Array]


SHAPES = {
    "blocks/0/kernel": (2, 3),
    "blocks/0/bias": (3,),
    "blocks/1/kernel": (3, 3),
    "readout": (3, 1),
}


def parameter(name, shape, **changes):
    return Parameter(name, Role.BIAS, Role.HIDDEN, shape, fan_in=1, fan_out=1, **changes)


def small_architecture():
    return Architecture(
        dag_graph("2_02"), tuple(parameter(name, shape) for name, shape in SHAPES.items())
    )


def small_params():
    return {
        "blocks": [
            {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)},
            {"kernel": np.zeros((3, 3))},
        ],
        "readout": np.zeros((3, 1)),
    }


class TestNames:
    def test_spell_out_the_way_to_the_leaf(self):
        tree = {"a": [jnp.zeros(1), (jnp.zeros(2),)], "b": Pair(jnp.zeros(3), {"c": jnp.zeros(4)})}
        shapes = {name: leaf.shape[0] for name, leaf in named_leaves(tree).items()}
        assert shapes == {"a/0": 1, "a/1/0": 2, "b/first": 3, "b/second/c": 4}

    def test_of_a_bare_array_is_empty(self):
        assert list(named_leaves(jnp.zeros(2))) == [""]

    def test_a_dictionary_key_called_value_stays(self):
        assert list(named_leaves({"attention": {"value": jnp.zeros(1)}})) == ["attention/value"]

    def test_are_the_same_for_state_pure_dictionary_and_plain_dictionary(self):
        network = nnx.eval_shape(
            lambda: DagMLP(dag_graph("2_02"), 2, 3, 1, normalization="layer", rngs=nnx.Rngs(0))
        )
        state = nnx.state(network, nnx.Param)
        plain = {
            "stem": {"kernel": 0, "bias": 0},
            "layers": {name: {"kernel": 0, "bias": 0} for name in ("0_1", "1_2")},
            "normalizations": {str(vertex): {"scale": 0, "bias": 0} for vertex in range(3)},
            "readout": {"kernel": 0, "bias": 0},
        }
        assert set(named_leaves(state)) == set(named_leaves(plain))
        assert list(named_leaves(state)) == list(named_leaves(nnx.to_pure_dict(state)))

    def test_are_those_of_tree_map_with_path(self):
        names = jax.tree_util.tree_map_with_path(
            lambda path, _: parameter_name(path), small_params()
        )
        assert jax.tree.leaves(names) == list(named_leaves(small_params()))


class TestArchitecture:
    def test_refuses_two_parameters_of_one_name(self):
        with pytest.raises(ValueError, match="2 parameters are named 'w'"):
            Architecture(dag_graph("2"), (parameter("w", (1,)), parameter("w", (2,))))

    @pytest.mark.parametrize("edge", [-1, 3])
    def test_refuses_an_edge_that_the_graph_lacks(self, edge):
        with pytest.raises(ValueError, match=f"'w' belongs to edge {edge}; .* edges 0 to 2"):
            Architecture(dag_graph("2_12"), (parameter("w", (1,), edge=edge),))

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            small_architecture().parameters = ()  # pyright: ignore[reportAttributeAccessIssue]

    def test_knows_shapes_by_name(self):
        assert small_architecture().shapes == SHAPES

    def test_arrangements_go_by_name(self):
        assert Arrangement("activation") is Arrangement.ACTIVATION
        with pytest.raises(ValueError, match="'sum'; accepted are pre_activation, activation"):
            Arrangement("sum")


class TestCheckParameters:
    def test_accepts_arrays_and_shapes(self):
        check_parameters(small_architecture(), small_params())
        check_parameters(small_architecture(), jax.eval_shape(small_params))

    def test_names_a_missing_leaf(self):
        params = small_params()
        del params["blocks"][0]["bias"]
        with pytest.raises(ValueError, match=r"lack 'blocks/0/bias' of shape \(3,\); they hold"):
            check_parameters(small_architecture(), params)

    def test_names_an_unknown_leaf(self):
        params = small_params() | {"extra": np.zeros((7, 1))}
        with pytest.raises(
            ValueError, match=r"'extra' of shape \(7, 1\) .* knows 'blocks/0/kernel'"
        ):
            check_parameters(small_architecture(), params)

    def test_names_a_leaf_of_another_shape(self):
        params = small_params() | {"readout": np.zeros((1, 3))}
        with pytest.raises(ValueError, match=r"'readout' has shape \(1, 3\); .* expects \(3, 1\)"):
            check_parameters(small_architecture(), params)

    def test_of_nothing_says_so(self):
        with pytest.raises(ValueError, match="they hold nothing"):
            check_parameters(small_architecture(), {})

    def test_shortens_a_long_list(self):
        names = tuple(parameter(f"w{number}", (1,)) for number in range(20))
        with pytest.raises(ValueError, match=r"knows 'w0', .*'w7', … \(20 in all\)\. Pass"):
            check_leaf(Architecture(dag_graph("2"), names), "other", (1,))

    @pytest.mark.parametrize(
        "hide",
        [
            lambda params: {**params, "readout": optax.MaskedNode()},
            lambda params: {**params, "blocks": optax.MaskedNode()},
            lambda params: {**params, "blocks": [params["blocks"][0], optax.MaskedNode()]},
            lambda params: optax.MaskedNode(),
        ],
    )
    def test_a_masked_node_stands_for_what_is_below_it(self, hide):
        check_parameters(small_architecture(), hide(small_params()), masked=optax.MaskedNode)

    def test_a_masked_node_hides_nothing_else(self):
        params = {"blocks": optax.MaskedNode()}
        with pytest.raises(ValueError, match="lack 'readout'"):
            check_parameters(small_architecture(), params, masked=optax.MaskedNode)

    def test_a_masked_node_covers_whole_names_only(self):
        names = (parameter("block", (1,)), parameter("blocks", (1,)))
        with pytest.raises(ValueError, match="lack 'blocks'"):
            check_parameters(
                Architecture(dag_graph("2"), names),
                {"block": optax.MaskedNode()},
                masked=optax.MaskedNode,
            )


class TestRefusals:
    GRAPH = dag_graph("2_12")  # edges 0->1 weight, 0->2 skip, 1->2 weight

    @staticmethod
    def weight(**changes: Any):
        fields: dict[str, Any] = {
            "role": "hidden",
            "layer": "hidden",
            "shape": [2, 2],
            "fan_in": 2,
            "fan_out": 2,
        }
        fields |= {"edge": 0, **changes}
        return Parameter("w", **fields)

    def test_names_and_lists_are_taken_as_roles_and_shapes(self):
        parameter = self.weight()
        assert parameter.role is Role.HIDDEN
        assert parameter.shape == (2, 2)
        Architecture(self.GRAPH, (parameter,), arrangement="activation")  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"role": "weight"}, "'w' has role 'weight'; accepted are input, hidden"),
            ({"layer": "stem"}, "'w' has layer 'stem'"),
            ({"fan_in": 0}, "'w' has fan_in 0"),
            ({"kernel_positions": 0}, "'w' has kernel_positions 0"),
            ({"edge": None}, "'w' belongs to edge None"),
            ({"edge": 1}, "'w' belongs to edge 1; .*linear or convolution"),
            ({"edge": 3}, "'w' belongs to edge 3; the graph has edges 0 to 2"),
        ],
    )
    def test_of_a_parameter_that_cannot_be(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Architecture(self.GRAPH, (self.weight(**changes),))

    def test_of_an_unknown_arrangement(self):
        with pytest.raises(ValueError, match="arrangement"):
            Architecture(self.GRAPH, (), arrangement="activations")  # pyright: ignore[reportArgumentType]
