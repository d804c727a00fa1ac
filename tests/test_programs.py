"""Properties of random programs, a sample; `python -m benchmarks.random_programs` has 1,000."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archscale_jax as archscale
from tests.mean_field import MeanField
from tests.program_checks import (
    differences,
    library_promise,
    second_moments,
    variable_moments,
)
from tests.programs import (
    INPUTS,
    ONE,
    OUTPUTS,
    Activation,
    Layer,
    Node,
    Program,
    Size,
    Sum,
    Var,
    generate,
)
from tests.spellings import OPTIONS, Spelling, leaves, spelled, spellings

pytestmark = pytest.mark.quick_compilation


def chain(kind, layers, residual=False):
    """Layers in a row, each but the first behind an activation."""
    statements: list[tuple[str, Node]] = [("h0", Layer("w0", Var("x"), Size(fixed=INPUTS), ONE))]
    for number in range(1, layers):
        before = Var(f"h{number - 1}")
        layer = Layer(f"w{number}", Activation(kind, before), ONE, ONE)
        statements.append((f"h{number}", Sum((before, layer)) if residual else layer))
    last = Activation(kind, Var(f"h{layers - 1}"))
    result = Layer("readout", last, ONE, Size(fixed=OUTPUTS))
    return Program(0, tuple(statements), result, False, frozenset())


# The judges themselves.


@pytest.mark.parametrize("seed", [9, 14, 24])
def test_all_spellings_are_one_function(seed):
    program = generate(seed)
    shapes = spelled(program, Spelling()).shapes(8)
    generator = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(generator.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, jnp.float32)
        for name, leaf in shapes.items()
    }
    x = jnp.asarray(generator.normal(size=(2, *program.input_shape)) / 4, jnp.float32)
    outputs = []
    for spelling in spellings(seed):
        written = spelled(program, spelling)
        outputs.append(np.asarray(jax.jit(written.function)(written.convert(params), x)))
    size = np.abs(outputs[0]).max()
    for one in outputs[1:]:
        np.testing.assert_allclose(one, outputs[0], rtol=0, atol=1e-4 * size)


def test_every_option_of_spelling_occurs_for_every_program():
    for seed in range(50):
        for name, options in OPTIONS.items():
            assert {getattr(one, name) for one in spellings(seed)} == set(options)


def test_programs_are_small_and_of_all_kinds():
    programs = [generate(seed) for seed in range(200)]
    kinds = frozenset[str]().union(*(program.kinds for program in programs))
    assert len(kinds) == 18
    counts = [
        sum(leaf.kernel * max(leaf.stacked, 1) for leaf in leaves(one).values()) for one in programs
    ]
    assert min(counts) == 2 and max(counts) <= 11
    assert programs[7] == generate(7)


@pytest.mark.parametrize(("kind", "residual"), [("relu", True), ("gelu", False)])
def test_spellings_of_chains_agree(kind, residual):
    program = chain(kind, 4, residual)
    chosen = [one for seed in range(4) for one in spellings(seed)]
    assert not differences(program, 64, chosen)


def test_a_spelling_with_other_numbers_is_found(monkeypatch):
    program, honest = chain("relu", 3), archscale.weight_standard_deviations

    def dishonest(architecture, rule):
        found = honest(architecture, rule)
        transposed = dict(architecture.shapes)["w0"] == (64, INPUTS)
        return found | {"w1": found["w1"] * (1.00001 if transposed else 1)}

    monkeypatch.setattr(archscale, "weight_standard_deviations", dishonest)
    found = differences(program, 64, [Spelling(), Spelling(dense="einsum")])
    assert {(one.spelling.dense, one.leaf, one.quantity) for one in found} == {
        ("einsum", "w1", "deviation, target_in_degree"),
        ("einsum", "w1", "deviation, second_moment"),
    }  # fmt: skip


def chain_moments(architecture, rule):
    """A chain with ReLU: C of the stem, then C/2 of every layer."""
    deviations = archscale.weight_standard_deviations(architecture, rule)
    variances = [
        deviations[one.name] ** 2 * one.fan_in / (1 if one.name == "w0" else 2)
        for one in architecture.parameters
        if one.name != "readout"
    ]
    return dict(enumerate(np.cumprod(variances)))


@pytest.mark.parametrize("rule", ["target_in_degree", "second_moment"])
def test_moments_of_a_chain_are_measured_right(rule):
    written = spelled(chain("relu", 4), Spelling())
    found = second_moments(written, rule, chain_moments, width=256)
    assert len(found) == 4 and all(one.holds for one in found)

    def wrong(architecture, rule):
        return {**chain_moments(architecture, rule), 2: 1.4 * chain_moments(architecture, rule)[2]}

    found = second_moments(written, rule, wrong, width=256)
    assert [one.holds for one in found] == [True, True, False, True]


@pytest.mark.parametrize("seed", [206, 209, 223])
def test_second_moments_of_programs_are_those_of_a_mean_field(seed):
    """What a promise can know of a program, its second moments have at a finite width too."""
    program, width = generate(seed), 256
    width = width // 4 if program.image else width
    measured, deviations = variable_moments(program, "target_in_degree", width=width, draws=4)
    expected = MeanField(program, deviations, width).moments()
    assert measured == pytest.approx({name: expected[name] for name in measured}, rel=0.1)


# The properties.


@pytest.mark.parametrize("seed", (4, 7, 9, 14, *range(26, 36)))  # of all kinds but one
def test_spellings_change_nothing(seed):
    found = differences(generate(seed))
    assert not found, "\n".join([*map(str, found[:5]), f"python -m benchmarks.random_programs "
                                 f"--seed={seed} shows the program"])  # fmt: skip


@pytest.mark.parametrize("rule", ["target_in_degree", "second_moment"])
@pytest.mark.parametrize("seed", [100, 102, 103])
def test_vertices_have_the_second_moments_that_are_promised(seed, rule):
    promise = library_promise()
    if promise is None:
        pytest.skip("the library has no second_moments")
    chosen = spellings(seed)
    written = spelled(generate(seed), chosen[seed % len(chosen)])
    found = second_moments(written, rule, promise, width=256)
    wrong = [one for one in found if not one.holds]
    assert not wrong, f"{wrong}\n{written.source}"
