"""Residual additions and the depth multipliers of residual stacks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import archscale_jax as archscale
from archscale_jax._graph import Operator, build_graph
from archscale_jax._trees import parameter_name
from archscale_jax.rules._learning_rate import shortest_path_length
from archscale_jax.rules._residual import depth_multipliers, residual_branches

pytestmark = pytest.mark.quick_compilation

RELU = jax.nn.relu


@functools.cache
def stack(depth, layers=1, width=16):
    """A residual stack with branches of so many layers, as function, params and architecture."""
    random = np.random.default_rng(0)

    def normal(inputs, outputs):
        return jnp.asarray(random.normal(size=(inputs, outputs)) / inputs**0.5, jnp.float32)

    params: dict[str, Any] = {"stem": normal(8, width)}
    for block in range(depth):
        params[f"block{block}"] = [normal(width, width) for _ in range(layers)]
    params["readout"] = normal(width, 3) / width**0.5

    def apply(params, x):
        z = x @ params["stem"]
        for block in range(depth):
            y = z
            for kernel in params[f"block{block}"]:
                y = RELU(y) @ kernel
            z = z + y
        return RELU(z) @ params["readout"]

    return apply, params, archscale.trace(apply, params, jnp.ones((2, 8)))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_block_is_one_addition_of_its_layers(layers):
    _, _, arch = stack(5, layers)
    branches = residual_branches(arch.graph)
    assert len(branches) == 5
    assert all(len(edges) == layers for edges in branches.values())
    assert len(set().union(*branches.values())) == 5 * layers


def test_a_transformer_block_counts_two_additions_and_length_two():
    """[ED]: D of L blocks is 2L, whatever is in them."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.expand, self.contract = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
            self.one, self.two = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.one(x))
            return x + self.contract(nnx.gelu(self.expand(self.two(x))))

    class Model(nnx.Module):
        def __init__(self, depth, rngs):
            self.stem, self.readout = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(depth)])

        def __call__(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.readout(x)

    graphs = []
    for depth in (1, 3):
        abstract = nnx.eval_shape(lambda depth=depth: Model(depth, nnx.Rngs(0)))
        graphdef, params = nnx.split(abstract)
        arch = archscale.trace(
            lambda p, x, graphdef=graphdef: nnx.merge(graphdef, p)(x), params, jnp.ones((2, 4, 5))
        )
        graphs.append(arch.graph)
        assert shortest_path_length(arch.graph) == 2 * depth
        branches = residual_branches(arch.graph)
        assert len(branches) == 2 * depth
    # 6 additions and 2, between a stem and a readout.
    assert archscale.learning_rate_scale(graphs[1], graphs[0], "effective_depth") == pytest.approx(
        (8 / 4) ** -1.5
    )


@pytest.mark.parametrize(
    ("optimizer", "exponent", "layers"),
    [("sgd", 0.5, 1), ("sgd", 1.0, 2), ("adam", 0.5, 2), ("adam", 1.0, 1)],
)
def test_multipliers_are_those_of_forward_multipliers(optimizer, exponent, layers):
    """A step on folded weights is the step on z + m^(-α)·W₂σ(W₁σ(z)) at the published rates."""
    m = 4.0  # as if the base had a quarter of the additions
    apply, params, arch = stack(8, layers)
    base = stack(2, layers)[2]
    multipliers = archscale.learning_rate_multipliers(
        arch, base, "none", depth_rule=optimizer, depth_exponent=exponent
    )

    def branch(name):
        return name.startswith("block")

    def with_multipliers(params, x):
        folded = {
            name: [*kernels[:-1], m**-exponent * kernels[-1]] if branch(name) else kernels
            for name, kernels in params.items()
        }
        return apply(folded, x)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8)), jnp.float32)
    unfolded = {
        name: [*kernels[:-1], m**exponent * kernels[-1]] if branch(name) else kernels
        for name, kernels in params.items()
    }
    # Published: rates of the branches' weights times m^(2α-1) for SGD, m^(α-1) for Adam.
    published = m ** (2 * exponent - 1 if optimizer == "sgd" else exponent - 1)
    make = {"sgd": optax.sgd(0.01), "adam": optax.adam(0.01, eps=1e-30)}[optimizer]

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def result_of_step(function, params, scale):
        gradients = jax.grad(lambda p: jnp.sum(function(p, x)[:, 0] ** 2))(params)
        updates, _ = make.update(gradients, make.init(params), params)
        return function(optax.apply_updates(params, scale(updates)), x)

    def by_name(updates):
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * multipliers[parameter_name(path)], updates
        )

    def by_publication(updates):
        return {
            name: jax.tree.map(lambda u: published * u, value) if branch(name) else value
            for name, value in updates.items()
        }

    ours = result_of_step(apply, params, by_name)
    theirs = result_of_step(with_multipliers, unfolded, by_publication)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("depth_exponent", [0.5, 1.0])
def test_moment_draws_branches_smaller_by_the_exponent(depth_exponent):
    deviations = {}
    for depth in (4, 16):
        arch = stack(depth)[2]
        found = archscale.weight_standard_deviations(
            arch, "second_moment", rule_options={"depth_exponent": depth_exponent}
        )
        deviations[depth] = found["block0/0"]
    ratio = deviations[4] / deviations[16]
    assert ratio == pytest.approx(4**depth_exponent)


def test_of_a_product_the_layer_that_enters_linearly_ends_the_branch():
    def apply(params, x):
        z = x @ params["stem"]
        z = z + (z @ params["a"]) * jax.nn.sigmoid(z @ params["b"])
        return z @ params["out"]

    names = {"stem": (8, 4), "a": (4, 4), "b": (4, 4), "out": (4, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in names.items()}
    arch = archscale.trace(apply, params, jnp.ones((2, 8)))
    places = {name: part.place for name, part in depth_multipliers(arch, arch, "adam").items()}
    assert places["a"].startswith("ends a branch")
    assert places["b"].startswith("in a branch")


def test_a_branch_that_ends_in_no_layer_raises():
    def apply(params, x):
        z = x @ params["stem"]
        z = z + jax.nn.relu(z @ params["a"]) * jax.nn.sigmoid(z @ params["b"])
        return z @ params["out"]

    names = {"stem": (8, 4), "a": (4, 4), "b": (4, 4), "out": (4, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in names.items()}
    arch = archscale.trace(apply, params, jnp.ones((2, 8)))
    with pytest.raises(
        ValueError, match=r"branch \(of 'a', 'b'\).*no layer that it enters linearly"
    ):
        depth_multipliers(arch, arch, "adam")


def test_errors():
    arch = stack(2)[2]
    chain = archscale.dag_graph("2_02")
    with pytest.raises(ValueError, match="2 residual additions and the base 0; both need some"):
        depth_multipliers(arch, chain, "adam")
    with pytest.raises(ValueError, match="depth rule 'lion'; accepted are sgd, adam, muon"):
        depth_multipliers(arch, arch, "lion")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="depth_exponent must be finite and not negative"):
        archscale.weight_standard_deviations(
            arch, "second_moment", rule_options={"depth_exponent": -1.0}
        )
    with pytest.raises(ValueError, match="depth_rule compares depths: pass the base"):
        archscale.learning_rate_multipliers(arch, None, "none", depth_rule="sgd")
    with pytest.raises(ValueError, match="0 residual additions and the base 0; both need some"):
        model, base = stack(0)[:2], stack(0, width=8)[:2]
        archscale.parametrize(model, jnp.ones((2, 8)), base=base, depth_rule="residual")


def test_joined_sources_are_one_contribution():
    join = Operator.CONCATENATION
    graph = build_graph(4, [0, 0, 1, 2, 0], [1, 2, 3, 3, 3], [2, 2, join, join, join])
    assert archscale.in_degrees(graph).tolist() == [1, 1, 1, 1]
    assert shortest_path_length(graph) == 0
    assert residual_branches(graph) == {}
