"""Names of parameter leaves, what follows from architectures, and their errors."""

import dataclasses
import gc
import pickle
import weakref
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import archscale_jax as archscale
from archscale_jax._architecture import (
    Architecture,
    Arrangement,
    Parameter,
    Role,
    check_leaf,
    check_parameters,
    derived,
)
from archscale_jax._spaces import dag_graph
from archscale_jax._trees import map_with_names, named_leaves, parameter_name, with_leaves
from archscale_jax.rules._initialization import initialization_rule, variances_of
from archscale_jax.rules._residual import places_of, residual_branches
from archscale_jax.rules._width import width_ratios
from experiments.lab.models import DagMLP


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
        mapped = map_with_names(lambda name, _: name, small_params())
        assert jax.tree.leaves(mapped) == list(named_leaves(small_params()))
        assert jax.tree.structure(mapped) == jax.tree.structure(small_params())


class Fields(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    query: Any
    key: Any
    value: Any
    out: Any


class Module(equinox.Module):
    query: Any
    key: Any
    value: Any
    out: Any


class OwnParam(nnx.Param):
    """A kind of variable of a user."""


class Attention(nnx.Module):
    def __init__(self, kind=nnx.Param):
        self.query, self.key, self.value, self.out = (kind(jnp.ones(n)) for n in range(1, 5))


class Boxed(linen.Module):
    """A linen module with parameters in boxes, and one called value."""

    @linen.compact
    def __call__(self, x):
        for name, box in (
            ("plain", lambda init, names: init),
            ("query", linen.with_partitioning),
            ("value", linen.with_logical_partitioning),
        ):
            x = x * self.param(name, box(linen.initializers.ones, ("a",)), (2,))
        return x


FOUR = ["query", "key", "value", "out"]


class TestFieldsCalledValue:
    @pytest.mark.parametrize("kind", [Fields, Record, Module])
    def test_keep_their_names(self, kind):
        tree = kind(*(jnp.ones(n) for n in range(1, 5)))
        assert list(named_leaves(tree)) == FOUR
        assert list(named_leaves([{"deep": tree}])) == [f"0/deep/{name}" for name in FOUR]
        assert list(named_leaves(kind(tree, 0, tree, tree)))[-1] == "out/out"
        assert "value/value" in named_leaves(kind(tree, 0, tree, tree))
        assert "mu/value" in {name.partition("/")[2] for name in named_leaves(
            optax.adam(1.0).init(tree))}  # fmt: skip

    @pytest.mark.parametrize("kind", [nnx.Param, OwnParam])
    @pytest.mark.parametrize("of", [nnx.state, lambda module: module])
    def test_of_flax_modules_are_the_variable_and_not_its_box(self, kind, of):
        assert sorted(named_leaves(of(Attention(kind)))) == sorted(FOUR)
        assert sorted(named_leaves(of(nnx.eval_shape(lambda: Attention(kind))))) == sorted(FOUR)

    def test_of_boxes_of_linen_are_left_out(self):
        params = Boxed().init(jax.random.key(0), jnp.ones(2))
        assert set(named_leaves(params)) == {"params/plain", "params/query", "params/value"}
        assert set(named_leaves(linen.unbox(params))) == set(named_leaves(params))

    def test_of_both_kinds_in_one_tree_are_told_apart(self):
        tree = Fields(nnx.state(Attention()), jnp.ones(1), jnp.ones(2), Module(*"abcd"))
        inner = sorted(f"query/{name}" for name in FOUR)
        last = [f"out/{name}" for name in FOUR]
        assert list(named_leaves(tree)) == [*inner, "key", "value", *last]
        boxed = Fields(*(nnx.Param(jnp.ones(n)) for n in range(1, 5)))
        assert list(named_leaves(boxed)) == FOUR

    def test_are_replaced_by_name(self):
        tree = Module(*(jnp.ones(2),) * 4)
        new = with_leaves(tree, {"value": jnp.zeros(2)})
        assert new.value.sum() == 0 and new.query.sum() == 2

    def test_of_masked_trees_stay(self):
        is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
        for tree in (Module(*(jnp.ones(2),) * 4), nnx.state(Attention())):
            hidden = jax.tree.map(lambda _: optax.MaskedNode(), tree)
            assert set(named_leaves(hidden, is_leaf=is_masked)) == set(FOUR)

    def test_are_named_in_traces_and_scaled(self):
        def apply(model, x):
            x = x @ model.query
            scores = jax.nn.softmax((x @ model.key) @ x.T)
            return (x + scores @ (x @ model.value)) @ model.out

        sizes = (4, 8), (8, 8), (8, 8), (8, 2)
        model = Module(*(jnp.ones(size) for size in sizes))
        x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
        arch = archscale.trace(apply, model, x, roles={"value": "hidden"})
        assert [one.name for one in arch.parameters] == FOUR
        base = archscale.with_widths(arch, {8: 4})
        scale = archscale.scale_by_architecture(arch, base, "none", width_rule="adam")
        updates, _ = scale.update(model, scale.init(model))
        multipliers = archscale.learning_rate_multipliers(arch, base, "none", width_rule="adam")
        assert multipliers["value"] == 0.5
        for name in FOUR:
            assert float(getattr(updates, name)[0, 0]) == multipliers[name]
        larger = archscale.contrib.scale_parameters(model, {"value": 3.0})
        assert float(larger.value[0, 0]) == 3.0 and float(larger.key[0, 0]) == 1.0


class TestArchitecture:
    def test_raises_on_two_parameters_of_one_name(self):
        with pytest.raises(ValueError, match="2 parameters are named 'w'"):
            Architecture(dag_graph("2"), (parameter("w", (1,)), parameter("w", (2,))))

    @pytest.mark.parametrize("edge", [-1, 3])
    def test_raises_on_an_edge_that_the_graph_lacks(self, edge):
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


class TestDerived:
    def test_computes_once_for_each_architecture(self):
        seen = []

        @derived
        def names(architecture):
            seen.append(architecture)
            return tuple(one.name for one in architecture.parameters)

        first, second = small_architecture(), small_architecture()
        assert names(first) is names(first) and names(second) == tuple(SHAPES)
        other = dataclasses.replace(first, parameters=first.parameters[:1])
        assert names(other) == ("blocks/0/kernel",)
        assert [*map(id, seen)] == [*map(id, (first, second, other))]

    def test_keeps_nothing_of_what_is_no_architecture(self):
        graph = dag_graph("2_02")
        assert residual_branches(graph) == residual_branches(small_architecture())
        assert residual_branches(graph) is not residual_branches(graph)

    def test_copies_and_other_processes_derive_anew(self):
        architecture = small_architecture()
        places = places_of(architecture)
        assert places is places_of(architecture)  # holds functions, which cannot be pickled
        copy = pickle.loads(pickle.dumps(architecture))
        assert places_of(copy) is not places and places_of(copy).branches == places.branches

    def test_rules_answer_once_until_they_are_asked_otherwise(self):
        architecture = small_architecture()
        rule = initialization_rule(architecture, "second_moment")
        first = variances_of(architecture, rule, {})
        assert variances_of(architecture, rule, {}) is first
        gain = variances_of(architecture, rule, {"readout_gain": 3.0}).readout_gain
        assert gain == 3.0 != variances_of(architecture, rule, {}).readout_gain
        given = {"branch_share": np.float32(0.5)}
        assert variances_of(architecture, rule, given).edges.shape == first.edges.shape

    def test_does_not_keep_bases_alive(self):
        architecture, base = small_architecture(), small_architecture()
        ratios = width_ratios(architecture, base)
        assert ratios == dict.fromkeys(SHAPES, (1.0, 1.0))
        left = weakref.ref(base)
        del base
        gc.collect()
        assert left() is None


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


class TestErrors:
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
