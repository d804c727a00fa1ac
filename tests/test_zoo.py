"""Architectures as the field writes them, in four frameworks, against what paper says of them."""

import re
from types import ModuleType

import jax
import pytest

import archscale_jax as archscale
from archscale_jax.tracing import TraceError, trace
from tests import zoo_equinox, zoo_haiku, zoo_linen, zoo_nnx, zoo_nnx_sequences, zoo_plain
from tests.zoo import Example, Unsupported, X, statistics_of

FRAMEWORKS: dict[str, ModuleType] = {
    "linen": zoo_linen,
    "nnx": zoo_nnx,
    "nnx_sequences": zoo_nnx_sequences,
    "equinox": zoo_equinox,
    "haiku": zoo_haiku,
    "plain": zoo_plain,
}


def members(kind):
    return {
        f"{framework}-{name}": value
        for framework, module in FRAMEWORKS.items()
        for name, value in vars(module).items()
        if isinstance(value, kind)
    }


EXAMPLES: dict[str, Example] = members(Example)
UNSUPPORTED: dict[str, Unsupported] = members(Unsupported)


@pytest.fixture(scope="module", params=EXAMPLES)
def model(request):
    """An example, its traced architecture, and the shapes of its params."""
    expected = EXAMPLES[request.param]
    function, params, inputs = expected.build()
    return expected, trace(function, params, *inputs, **expected.options), params


def test_every_leaf_has_its_role(model):
    expected, architecture, _ = model
    found = {parameter.name: parameter.role for parameter in architecture.parameters}
    wanted = {
        name: [role for role, pattern in expected.roles.items() if re.fullmatch(pattern, name)]
        for name in found
    }
    assert {name: [role] for name, role in found.items()} == wanted
    assert {role for roles in wanted.values() for role in roles} == set(expected.roles)


def test_fans_edges_and_layers(model):
    expected, architecture, _ = model
    parameters = {parameter.name: parameter for parameter in architecture.parameters}
    found = {name: (parameters[name].fan_in, parameters[name].fan_out) for name in expected.fans}
    assert found == expected.fans
    for name, count in expected.edges.items():
        assert len({parameters[name].edge, *parameters[name].further_edges}) == count
    assert {name: parameters[name].layer for name in expected.layers} == expected.layers


def test_paths(model):
    expected, architecture, _ = model
    found = archscale.path_statistics(architecture.graph)
    wanted = statistics_of(expected.paths)
    assert (found.count, found.depth_sum, found.min_depth, found.max_depth) == wanted


def test_the_polynomial_of_residual_blocks_has_its_closed_form():
    """Depths of n blocks of k layers are k times Binomial(n, 1/2)."""
    blocks, layers = 7, 3
    wanted = (2**blocks, layers * blocks * 2 ** (blocks - 1), 0, layers * blocks)
    assert statistics_of((1 + X**layers) ** blocks) == wanted


def test_what_vertices_sum_and_layers_read(model):
    expected, architecture, _ = model
    assert architecture.arrangement == expected.arrangement
    if expected.linear is not None:
        hidden = [one for one in architecture.parameters if one.role == "hidden"]
        found = {one.name: one.activated for one in hidden}
        assert found == {name: not re.fullmatch(expected.linear, name) for name in found}


@pytest.mark.parametrize("model", [*EXAMPLES][::3], indirect=True)
def test_initializes(model):
    _, architecture, params = model
    draw = lambda key: archscale.initialize(key, params, architecture)  # noqa: E731
    drawn = jax.eval_shape(draw, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), drawn) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    function, params, inputs = UNSUPPORTED[name].build()
    with pytest.raises(TraceError, match=UNSUPPORTED[name].match):
        trace(function, params, *inputs)


def test_a_scanned_stack_has_the_paths_of_its_unrolled_twin():
    scanned, unrolled = (
        trace(function, params, *inputs).graph
        for name in ("linen-scanned_stack", "linen-unrolled_stack")
        for function, params, inputs in [EXAMPLES[name].build()]
    )
    assert archscale.path_statistics(scanned) == archscale.path_statistics(unrolled)
