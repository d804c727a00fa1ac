"""The report: its numbers against closed forms and the rules, its notes, and how it is shown."""

import functools
import html.parser
import itertools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import archscale_jax as archscale
from archscale_jax import Architecture, Parameter, Report, Role, report
from archscale_jax._reporting.names import count_text, merged_names
from archscale_jax._reporting.reasons import reason_text
from archscale_jax._reporting.table import MAX_ROWS, rows_of
from archscale_jax.rules import INITIALIZATION_RULES, WeightVariances
from archscale_jax.rules._registry import Part
from tests import zoo_linen, zoo_nnx_sequences, zoo_plain

BASE = archscale.dag_graph("2")
FLOAT = jnp.float32
ZOOS = {"linen": zoo_linen, "nnx_sequences": zoo_nnx_sequences, "plain": zoo_plain}


def leaf(name: str, role: str, layer: str, *sizes, **fields) -> Parameter:
    return Parameter(name, Role(role), Role(layer), *sizes, **fields)


# Vertex 1 is W z_0, vertex 2 is z_0 + W z_1: a path without weights and one of two.
BY_HAND = Architecture(
    archscale.dag_graph("2_12"),
    (
        leaf("stem/kernel", "input", "input", (3, 3, 4, 8), 36, 72, 3, 9),
        leaf("one/kernel", "hidden", "hidden", (8, 16), 8, 16, edge=0, activated=False),
        leaf("one/bias", "bias", "hidden", (16,), 8, 16, edge=0),
        leaf("norm/scale", "scale", "hidden", (16,), 16, 16),
        leaf("two/kernel", "hidden", "hidden", (16, 8), 16, 8, edge=2),
        leaf("head/kernel", "readout", "readout", (8, 10), 8, 10),
    ),
)


def by_name(found: Report, key: str) -> dict:
    return {record["path"]: record[key] for record in found.records}


@functools.cache
def traced(name: str) -> Architecture:
    zoo, _, model = name.partition("-")
    example = getattr(ZOOS[zoo], model)
    function, params, inputs = example.build()
    return archscale.trace(function, params, *inputs, **example.options)


@functools.cache
def transformer(blocks: int, width: int = 16, heads: int = 2) -> Architecture:
    """Pre-normalized blocks of attention and MLP, with tied embeddings."""
    head = width // heads

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, FLOAT)

    block = {
        "qkv": shape(3, width, heads, head),
        "out": shape(heads, head, width),
        "up": {"kernel": shape(width, 4 * width), "bias": shape(4 * width)},
        "down": {"kernel": shape(4 * width, width), "bias": shape(width)},
        "scale": [shape(width)] * 2,
    }
    params = {"table": shape(50, width), "blocks": [block] * blocks}

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) * scale

    def apply(params, tokens):
        x = params["table"][tokens]
        for one in params["blocks"]:
            y = norm(x, one["scale"][0])
            query, key, value = (jnp.einsum("btd,dhe->bthe", y, w) for w in one["qkv"])
            weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", query, key) / math.sqrt(head))
            mixed = jnp.einsum("bhts,bshe->bthe", weights, value)
            x = x + jnp.einsum("bthe,hed->btd", mixed, one["out"])
            y = norm(x, one["scale"][1])
            y = jax.nn.gelu(y @ one["up"]["kernel"] + one["up"]["bias"])
            x = x + y @ one["down"]["kernel"] + one["down"]["bias"]
        return x @ params["table"].T

    return archscale.trace(apply, params, jax.ShapeDtypeStruct((2, 6), jnp.int32))


# Numbers.


def test_a_network_on_paper():
    found = report(BY_HAND, BASE, "path_sum")
    assert found.paths == (2, 2, 8, 0, 2)
    assert by_name(found, "learning_rate_multiplier") == dict.fromkeys(
        BY_HAND.shapes, pytest.approx(8**-0.5)
    )
    assert by_name(found, "standard_deviation") == {
        "stem/kernel": pytest.approx(math.sqrt(2 / 36)),
        "one/kernel": pytest.approx(math.sqrt(2 / 8 / 2)),
        "one/bias": 0,
        "norm/scale": 0,
        "two/kernel": pytest.approx(math.sqrt(2 / 2 / 16)),
        "head/kernel": pytest.approx(math.sqrt(2) / 8),
    }
    assert by_name(found, "in_degree") == {
        "stem/kernel": 1, "one/kernel": 1, "one/bias": 1, "norm/scale": None, "two/kernel": 2,
        "head/kernel": None,
    }  # fmt: skip
    assert by_name(found, "initialization_reason") == {
        "stem/kernel": "stem: C = 2, n = 36 [AAS Eq. 4]",
        "one/kernel": "target_in_degree: C = 1, n = 8 [AAS Eq. 12]",
        "one/bias": "bias: start = 0",
        "norm/scale": "scale: start = 1",
        "two/kernel": "target_in_degree: C = 1, n = 16 [AAS Eq. 12]",
        "head/kernel": "readout, N(0, C/n²): C = 2, n = 8 [AAS Eq. 2]",
    }
    assert set(by_name(found, "learning_rate_reason").values()) == {
        "path_sum 0.3536 [AAS Eq. 8, 9]"
    }
    shown = {key: value for key, value in found.records[0].items() if not key.endswith("parts")}
    assert shown | {"path": "", "initialization_reason": ""} == {
        "path": "", "role": "input", "layer": "input", "shape": (3, 3, 4, 8), "fan_in": 36,
        "fan_out": 72, "kernel_size": 3, "in_degree": 1, "source_in_degree": None,
        "standard_deviation": pytest.approx(math.sqrt(2 / 36)), "initialization_reason": "",
        "learning_rate_multiplier": pytest.approx(8**-0.5),
        "learning_rate_reason": "path_sum 0.3536 [AAS Eq. 8, 9]",
    }  # fmt: skip


def test_the_source_is_shown_to_rules_that_take_it():
    graph = archscale.dag_graph("2_12_002")  # d_in is 1, 1, 2, 1
    last = leaf("last", "hidden", "hidden", (4, 4), 4, 4, edge=3)
    for rule, source, numerator in (
        ("source_in_degree", 2, 1),
        ("chen2024_code", 2, 1),
        ("target_in_degree", None, 2),
    ):
        found = report(Architecture(graph, (last,)), BASE, initialization=rule).records[0]
        assert (found["source_in_degree"], found["in_degree"]) == (source, 1)
        assert found["standard_deviation"] == pytest.approx(math.sqrt(numerator / 4))
        assert found["initialization_reason"].startswith(f"{rule}: C = {numerator}, n = 4 ")


@pytest.mark.parametrize(
    ("name", "base", "options"),
    [
        ("linen-lenet", BASE, {}),
        ("linen-resnet18", BASE, {"rule": "path_sum", "kernel_per_layer": True}),
        ("nnx_sequences-gpt_with_tied_embeddings", BASE, {"rule": "path_sum_activations"}),
        ("linen-unrolled_stack", "half", {"width_rule": "sgd", "rule": "none"}),
        ("plain-message_passing", BASE, {"rule": "chen2024_code"}),
    ],
)
@pytest.mark.parametrize("initialization", [None, "second_moment"])
def test_numbers_are_those_of_the_rules(name, base, options, initialization):
    architecture = traced(name)
    if base == "half":
        base = archscale.with_widths(architecture, {16: 8, 32: 16})
    found = report(architecture, base, initialization=initialization, **options)
    assert [one["path"] for one in found.records] == [one.name for one in architecture.parameters]
    multipliers = archscale.learning_rate_multipliers(architecture, base, **options)
    assert by_name(found, "learning_rate_multiplier") == multipliers
    drawn = archscale.weight_standard_deviations(architecture, initialization)
    constant = {one.name: 0.0 for one in architecture.parameters if one.role in ("bias", "scale")}
    assert by_name(found, "standard_deviation") == drawn | constant
    assert all(one["initialization_reason"] for one in found.records)
    assert all(one["learning_rate_reason"] for one in found.records)
    assert found.paths == archscale.path_statistics(architecture.graph)


def test_reasons_name_the_parts_of_a_multiplier():
    parameters = (
        leaf("stem", "input", "input", (7, 7, 3, 8), 147, 392, 7, 49),
        leaf("conv", "hidden", "hidden", (3, 3, 8, 8), 72, 72, 3, 9, edge=0),
        leaf("head", "readout", "readout", (8, 10), 8, 10),
    )
    graph = archscale.build_graph(2, [0], [1], [3], [3], network_kernel=7)
    architecture = Architecture(graph, parameters)
    found = report(
        architecture,
        archscale.with_widths(architecture, {8: 2}),
        kernel_per_layer=True,
        width_rule="sgd",
    )
    assert by_name(found, "learning_rate_reason") == {
        name: f"kernel {7 / q:.4g}: q_network = 7, q = {q} × width sgd {width} [μP]"
        for name, q, width in (
            ("stem", 7, "4, input: r = 1, s = 4"),
            ("conv", 3, "1, hidden: r = 4, s = 4"),
            ("head", 1, "0.25, readout: r = 4, s = 1"),
        )
    }
    assert by_name(found, "learning_rate_multiplier") == pytest.approx(
        {"stem": 4, "conv": 7 / 3, "head": 7 / 4}
    )


def test_reasons_name_the_places_in_a_residual_stack():
    """Twice the blocks at α = 1: Adam's rate is 1/2 at the ends of branches, 1 inside."""
    deep, shallow = (transformer(blocks) for blocks in (4, 2))
    options = {"initialization": "second_moment", "initialization_options": {"depth_exponent": 1}}
    found = report(deep, shallow, "none", depth_rule="adam", depth_exponent=1, **options)
    reasons, multipliers = (
        by_name(found, f"learning_rate_{key}") for key in ("reason", "multiplier")
    )
    for name, multiplier, place in (
        ("blocks/0/out", 0.5, "ends a branch, 1/m: m = 2, α = 1"),
        ("blocks/3/up/kernel", 1, "in a branch, m^(0): m = 2, α = 1"),
        ("table", 1, "in no branch"),
    ):
        assert (multipliers[name], reasons[name]) == (
            multiplier, f"depth adam {multiplier}, {place}"
        )  # fmt: skip
    assert not [note for note in found.notes if "depth_rule" in note]


def test_rules_of_the_user_are_named():
    def double(graph, base):
        return 2.0

    def constant(architecture):
        """C = 3 everywhere [Me, Eq. 1].

        More.
        """
        return WeightVariances(np.full(len(architecture.graph.senders), 3.0))

    found = report(BY_HAND, rule=double, initialization=constant)
    last = found.records[-2]
    assert last["initialization_reason"] == "rule constant: C = 3, n = 16"
    assert last["learning_rate_reason"] == "rule double 2"
    assert "initialization rule constant: C = 3 everywhere [Me, Eq. 1]" in found.header
    assert "learning rate rule double" in found.header


def test_a_data_frame_can_be_made_of_the_records():
    found = report(traced("linen-lstm_language_model"), BASE)
    assert len({tuple(record) for record in found.records}) == 1
    assert json.loads(json.dumps(found.records, allow_nan=False))


# Notes.


def the_note(found: Report, pattern: str) -> str:
    matching = [note for note in found.notes if re.search(pattern, note)]
    assert len(matching) == 1, found.notes
    assert "\n" not in matching[0]
    return matching[0]


def test_an_ordinary_chain_has_no_notes():
    hidden = leaf("w", "hidden", "hidden", (4, 4), 4, 4, edge=0)
    params = {"w": jnp.zeros((4, 4))}
    assert report(Architecture(BASE, (hidden,)), BASE, params=params).notes == []


@pytest.mark.parametrize("options", [{"rule": "path_sum"}, {"rule": "none", "width_rule": "sgd"}])
def test_without_a_base_the_multipliers_are_left_out(options):
    found = report(BY_HAND, **options)
    assert the_note(found, "^no base: ").endswith("measure_update, which needs no graph")
    assert set(by_name(found, "learning_rate_multiplier").values()) == {None}
    assert not any("left out" in note for note in found.notes)


@pytest.mark.parametrize("rule", ["chen2024_code", "none"])
def test_rules_that_need_no_base_go_without(rule):
    found = report(BY_HAND, rule=rule)
    assert not any("no base" in note for note in found.notes)
    multipliers = archscale.learning_rate_multipliers(BY_HAND, rule=rule)
    assert by_name(found, "learning_rate_multiplier") == multipliers


def test_what_a_rule_raises_is_a_note():
    found = report(BY_HAND, archscale.dag_graph("1"), "path_sum")
    assert the_note(found, "^learning-rate multipliers left out: .*no path of the base crosses")
    assert set(by_name(found, "learning_rate_multiplier").values()) == {None}
    assert found.records[0]["standard_deviation"] == pytest.approx(math.sqrt(2 / 36))
    found = report(BY_HAND, BASE, width_rule="adam")
    assert the_note(found, "left out: width_rule compares fans: .*found GraphsTuple")
    options = {"branch_share": -1}
    found = report(
        BY_HAND, BASE, "path_sum", initialization="second_moment", initialization_options=options
    )
    assert the_note(found, "^standard deviations left out: branch_share must be")
    assert by_name(found, "standard_deviation") == dict.fromkeys(BY_HAND.shapes) | {
        "one/bias": 0, "norm/scale": 0
    }  # fmt: skip
    assert found.records[0]["learning_rate_multiplier"] == pytest.approx(8**-0.5)


def test_dead_layers_are_named():
    graph = archscale.dag_graph("2_00_202")  # no edge leads into vertex 2
    parameters = [
        leaf(f"layer{edge}/{kind}", role, "hidden", (4, 4), 4, 4, edge=edge)
        for edge in range(3)
        for kind, role in (("kernel", "hidden"), ("bias", "bias"))
    ]
    # Edges by target: 0->1, 0->3, 2->3; nothing leaves vertex 1, nothing enters vertex 2.
    note = the_note(report(Architecture(graph, tuple(parameters)), BASE), "^dead layers")
    assert "(4 leaves): layer{0,2}/kernel ×2, layer{0,2}/bias ×2" in note


def test_tied_tables_follow_the_readout():
    note = the_note(report(transformer(2), BASE), "embedding table and readout in one")
    assert note.startswith("table is ")
    assert note.endswith("Untie the two to transfer a rate [μP]")


def test_widths_that_differ():
    wide, narrow = transformer(2), archscale.with_widths(transformer(2), {16: 8, 64: 32})
    attention, unaccounted = "1/d_head instead of 1/√d_head", "no multiplier here accounts for"
    assert not any(attention in note for note in report(wide, narrow).notes)  # fewer heads
    narrow = archscale.with_widths(transformer(2), {16: 8, 64: 32, 8: 4})
    found = report(wide, narrow)
    assert the_note(found, attention)
    assert the_note(found, unaccounted)
    found = report(wide, narrow, width_rule="adam")
    assert the_note(found, attention)
    assert not any(re.search(unaccounted, note) for note in found.notes)
    for base in (wide, transformer(3), BASE):
        assert not any("width differs" in note for note in report(wide, base).notes)
    chain = Architecture(BASE, (leaf("w", "hidden", "hidden", (4, 4), 4, 4, edge=0),))
    found = report(chain, archscale.with_widths(chain, {4: 2}))
    assert [unaccounted in note for note in found.notes] == [True]
    # No parameter of the base is a counterpart of this one, but its widths are others.
    other = Architecture(
        archscale.dag_graph("2_02"),
        tuple(
            leaf(f"w{edge}", "hidden", "hidden", (4, fan), 4, fan, edge=edge)
            for edge, fan in enumerate((4, 8))
        ),
    )
    assert the_note(report(chain, other), unaccounted)


def test_layers_without_activation_before_are_counted():
    assert the_note(report(BY_HAND, BASE), "^1 of 2 hidden weights read features without")
    assert the_note(report(transformer(2), BASE), "^6 of 8 hidden weights")


def test_leaves_of_several_layers():
    found = report(traced("linen-scanned_stack"), BASE)
    note = the_note(found, "^weights of several layers")
    assert note.endswith(": blocks/Dense_{0,1}/kernel ×2")


def test_a_leaf_whose_layers_want_different_variances():
    """Gates of a cell read a state of zeros first; those of later steps count."""
    found = report(traced("linen-lstm_language_model"), BASE)
    note = the_note(found, "^weights of several layers .* the smallest that one of them wants")
    assert "cell/if/kernel" in note
    drawn = by_name(found, "standard_deviation")
    for gate in "ifgo":  # one of two contributions, of rows of second moment 1
        assert drawn[f"cell/i{gate}/kernel"] == pytest.approx(math.sqrt(1 / 8 / 2))
    assert by_name(found, "in_degree")["cell/if/kernel"] == 2


@pytest.mark.parametrize("rule", [None, "source_in_degree", "he_normal", "chen2024_code"])
def test_residual_additions_are_counted(rule):
    found = report(transformer(3), BASE, initialization=rule)
    assert "(6)" in the_note(found, "residual additions .* rule second_moment bounds it")


@pytest.mark.parametrize("architecture", [lambda: transformer(3), lambda: BY_HAND])
def test_moment_needs_no_word_on_residual_additions(architecture):
    found = report(architecture(), BASE, "none", initialization="second_moment")
    assert not any("residual additions" in note for note in found.notes)


def test_kernel_sizes_that_are_mixed():
    resnet = traced("linen-resnet18")
    assert "sizes 1 and 3 are mixed" in the_note(report(resnet, BASE), "take the largest, 3")
    for found in (report(resnet, BASE, kernel_per_layer=True), report(traced("linen-lenet"), BASE)):
        assert not any("mixed" in note for note in found.notes)


def test_a_depth_rule_belongs_to_moment_and_none():
    deep, shallow = transformer(4), transformer(2)
    found = report(deep, shallow, "none", depth_rule="sgd")
    assert the_note(found, "depth_rule belongs to weights .*'second_moment'.*'depth_exponent': 0.5")
    assert report(deep, shallow, depth_rule="sgd").records == found.records
    found = report(deep, shallow, "path_sum")
    assert the_note(found, r"residual addition \(8\) doubles the paths over which rule path_sum")
    with pytest.raises(ValueError, match="the rule path_sum both answer for depth"):
        report(deep, shallow, "path_sum", depth_rule="sgd")
    found = report(deep, shallow)
    assert the_note(found, "left out: the network has 8 residual additions and products, where no")
    assert not [line for line in found.header if "rate" in line]
    found = report(
        deep, shallow, "none", initialization="second_moment", depth_rule="sgd", depth_exponent=1
    )
    assert the_note(found, "'depth_exponent': 1")
    partial = functools.partial(INITIALIZATION_RULES.resolve("second_moment"), depth_exponent=1)
    found = report(
        deep, shallow, "none", initialization=partial, depth_rule="sgd", depth_exponent=1
    )
    assert not any("depth_rule" in note for note in found.notes)


def test_dtypes_of_params():
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, FLOAT),
        {
            one: {two: jnp.zeros(BY_HAND.shapes[f"{one}/{two}"], jnp.int8) for two in leaves}
            for one, leaves in {
                "stem": ["kernel"], "one": ["kernel", "bias"], "norm": ["scale"],
                "two": ["kernel"], "head": ["kernel"],
            }.items()
        },
    )  # fmt: skip
    before = report(BY_HAND, BASE).notes
    assert report(BY_HAND, BASE, params=params).notes == before
    params["two"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    params["norm"]["scale"] = jax.ShapeDtypeStruct((16,), jnp.int32)
    found = report(BY_HAND, BASE, params=params)
    assert the_note(found, "^parameters of dtype bfloat16 and float32: .* in float32 at least$")
    assert the_note(found, "^leaves of dtype int32 have no gradient .*: norm/scale$")
    params["norm"]["scale"] = jax.ShapeDtypeStruct((17,), FLOAT)
    with pytest.raises(ValueError, match=r"'norm/scale' has shape \(17,\)"):
        report(BY_HAND, BASE, params=params)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rule": "path"}, ValueError, "unknown learning-rate rule 'path'"),
        ({"initialization": "he"}, ValueError, "unknown initialization rule 'he'"),
        ({"width_rule": "lion"}, ValueError, "unknown width rule 'lion'"),
        ({"depth_rule": "lion"}, ValueError, "depth rule 'lion'; accepted are sgd"),
        ({"widthrule": "sgd"}, TypeError, "widthrule"),
    ],
)
def test_what_nobody_knows_raises(options, error, match):
    with pytest.raises(error, match=match):
        report(BY_HAND, BASE, **options)


def test_a_graph_is_not_an_architecture():
    with pytest.raises(TypeError, match="expected an Architecture, found GraphsTuple"):
        report(BASE)  # pyright: ignore[reportArgumentType]


# The table.


def expanded(name: str) -> list[str]:
    """The names that a merged name stands for: `a/{0,2…6}/b ×4` is a/0/b, a/2/b, a/4/b, a/6/b."""
    name, _, count = name.partition(" ×")
    parts = []
    for part in re.split(r"(\{[^}]*\})", name):
        if not part.startswith("{"):
            parts.append([part])
        elif "…" in part:
            first, last = part.strip("{}").split("…")
            numbers = [int(number) for number in first.split(",")]
            step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
            parts.append([str(one) for one in range(numbers[0], int(last) + 1, step)])
        else:
            parts.append(part.strip("{}").split(","))
    names = ["".join(one) for one in itertools.product(*parts)]
    assert len(names) == int(count or 1)
    return names


@settings(max_examples=50)
@given(
    st.sets(
        st.builds(
            "/".join,
            st.tuples(
                st.sampled_from(["block0", "block1", "block2", "block3", "block10", "stem"]),
                st.sampled_from(["dense0", "dense2", "dense4", "norm"]),
                st.sampled_from(["kernel", "bias", "7"]),
            ),
        )
    )
)
def test_merged_names_stand_for_all_names_once(names):
    merged = merged_names(sorted(names))
    found = [one for name in merged for one in expanded(name)]
    assert sorted(found) == sorted(names)
    assert len(found) == len(names)


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        ([f"blocks/{one}/kernel" for one in range(12)], ["blocks/{0…11}/kernel ×12"]),
        (["Dense_0", "Dense_2", "Dense_4"], ["Dense_{0,2…4} ×3"]),
        (["a1", "a01", "a#"], ["a{01,1} ×2", "a#"]),
        ([f"a{one}" for one in (0, 1, 2, 3, 5, 9)], ["a{0,1,2,…,9} ×6"]),
        (["0/0", "0/1", "1/0"], ["0/{0,1} ×2", "1/0"]),
        ([], []),
    ],
)
def test_merged_names(names, merged):
    assert merged_names(names) == merged


def test_reasons_of_one_kind_show_ranges():
    first, second = (
        Part(value, "a rule", "a place", {"C": c, "n": 16}, "[Eq. 12]")
        for value, c in ((0.25, 1e-5), (0.125, 2.0))
    )
    assert reason_text([[first]]) == "a rule, a place: C = 1e-05, n = 16 [Eq. 12]"
    assert reason_text([[first], [second]]) == "a rule, a place: C = 1e-05…2, n = 16 [Eq. 12]"
    other = Part(3.0, "kernel")
    found = reason_text([[first, other], [second, other]], values=True)
    assert found == "a rule 0.125…0.25, a place: C = 1e-05…2, n = 16 [Eq. 12] × kernel 3"
    assert reason_text([[]]) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999_999, "999,999"), (1_300_000_000_000, "1.3e12"), (2**5000, "1.4e1505")],
)
def test_large_counts_are_short(number, text):
    assert count_text(number) == text


@pytest.mark.parametrize(
    "name",
    ["linen-lenet", "linen-resnet18", "linen-lstm_language_model", "plain-mixture_of_experts"],
)
def test_rows_cover_all_records_once(name):
    found = report(traced(name), BASE)
    rows = rows_of(found.records)
    indices = [index for row in rows for index in row.indices]
    assert sorted(indices) == list(range(len(found.records)))
    for row in rows:
        assert sorted(expanded(row.cells["path"])) == sorted(
            found.records[index]["path"] for index in row.indices
        )
        same = [found.records[index] for index in row.indices]
        assert len({(one["role"], one["shape"], one["in_degree"]) for one in same}) == 1
        deviations = [one["standard_deviation"] or 0.0 for one in same]
        assert np.max(deviations) <= 1.1 * np.min(deviations)


def test_rows_that_differ_a_little_in_the_standard_deviation_alone_are_joined():
    shown = {
        row.cells["path"]: row.cells["init std"]
        for row in rows_of(report(traced("plain-mixture_of_experts"), BASE).records)
    }
    assert shown["layers/{0,1}/out ×2"] == "0.257…0.26"


def test_tables_do_not_grow_with_depth(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # narrower, longer numbers may wrap
    shallow, deep = (report(transformer(blocks), BASE) for blocks in (2, 12))
    assert len(deep.records) > 5 * len(shallow.records)
    assert len(rows_of(deep.records)) == len(rows_of(shallow.records))
    assert len(str(deep).splitlines()) == len(str(shallow).splitlines())
    assert "blocks/{0…11}/up/kernel ×12" in str(deep)


def test_rows_of_many_variances_show_ranges():
    blocks = MAX_ROWS
    graph = archscale.build_graph(
        2 * blocks + 1,
        [one for block in range(blocks) for one in (2 * block, 2 * block, 2 * block + 1)],
        [one for block in range(blocks) for one in (2 * block + 1, 2 * block + 2, 2 * block + 2)],
        [2, 1, 2] * blocks,
    )
    parameters = tuple(
        leaf(f"block{block}/{name}", "hidden", "hidden", (8, 8), 8, 8, edge=3 * block + edge)
        for block in range(blocks)
        for name, edge in (("first", 0), ("second", 2))
    )
    found = report(Architecture(graph, parameters), BASE, initialization="second_moment")
    assert len(set(by_name(found, "standard_deviation").values())) > MAX_ROWS
    rows = rows_of(found.records)
    assert [len(row.indices) for row in rows] == [blocks, blocks]
    for row in rows:
        drawn = [found.records[index]["standard_deviation"] for index in row.indices]
        ends = [float(end) for end in row.cells["init std"].split("…")]
        assert ends == pytest.approx([min(drawn), max(drawn)], rel=5e-3)


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize(
    "name", ["linen-resnet18", "nnx_sequences-gpt_with_tied_embeddings", "plain-mixture_of_experts"]
)
def test_text_fits_the_terminal(monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    found = report(traced(name), BASE)
    lines = str(found).splitlines()
    assert max(map(cell_len, lines)) <= width
    squeezed = re.sub(r"\s", "", str(found))
    for text in (*found.header, *found.notes):
        assert re.sub(r"\s", "", text) in squeezed


def test_text_shows_names_as_they_are(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "[red]:smile:<b>/" + "long" * 40
    architecture = Architecture(BASE, (leaf(name, "hidden", "hidden", (), 1, 1, edge=0),))
    text = str(report(architecture, BASE))
    assert "[red]:smile:<b>/" in text
    assert text.count("long") + text.count("lo\n") + text.count("l\n") >= 30
    assert max(map(cell_len, text.splitlines())) <= 120
    assert "\x1b" not in text


def test_without_parameters_there_is_no_table():
    found = report(Architecture(BASE, ()), BASE)
    assert found.records == []
    assert str(found).startswith("0 parameters in 0 leaves")
    assert "<table" not in found._repr_html_()


def test_repr_is_the_table_too():
    assert repr(report(BY_HAND, BASE)) == str(report(BY_HAND, BASE))


class Page(html.parser.HTMLParser):
    """Collects the tags and cells of a page; every tag that is opened must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.cells, self.items = [], [], [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if self.open[-1] == "li":
            self.items[-1] += data


def test_html_holds_the_rows_and_the_notes():
    found = report(
        transformer(2), archscale.with_widths(transformer(2), {16: 8, 64: 32}), width_rule="sgd"
    )
    page = Page(found._repr_html_())
    rows = rows_of(found.records)
    assert page.tags.count("tr") == 1 + len(rows)
    assert page.items == found.notes
    columns = page.tags.count("th")
    assert len(page.cells) == columns * (1 + len(rows))
    names = page.cells[:columns]
    for number, row in enumerate(rows, start=1):
        shown = dict(zip(names, page.cells[columns * number :], strict=False))
        assert shown == {name: row.cells[name] for name in names}
    assert {"path", "init std", "lr ×", "why std", "why lr"} <= set(names)


def test_html_escapes_names_and_stands_alone():
    hidden = leaf("<b>&<script>alert(1)</script>", "hidden", "hidden", (4, 4), 4, 4, edge=0)
    text = report(Architecture(BASE, (hidden,)), BASE)._repr_html_()
    page = Page(text)
    assert set(page.tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert set(page.attributes) == {"style"}
    assert hidden.name in page.cells
    colors = re.findall(r"(?:color|background|border-bottom): ([^;\"]*)", text)
    opaque = [one for one in colors if not re.search("inherit|transparent|rgba", one)]
    assert colors and not opaque  # those of the page, dark or light


# The package.


def test_a_user_prints_a_report():
    code = """
import archscale_jax as archscale
arch = archscale.Architecture(archscale.dag_graph("2"), (
    archscale.Parameter("w", "hidden", "hidden", (4, 4), 4, 4, edge=0),))
print(archscale.report(arch, archscale.dag_graph("2")))
assert isinstance(archscale.report(arch), archscale.Report)
assert callable(archscale.draw)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    row = next(line for line in found.stdout.splitlines() if line.startswith("w "))
    assert row.split() == ["w", "hidden", "4×4", "4→4", "1", "0.707", "1", "1"]
    assert "target_in_degree: C = 2, n = 4 [AAS Eq. 12]" in found.stdout
    assert max(map(cell_len, found.stdout.splitlines())) <= 120
