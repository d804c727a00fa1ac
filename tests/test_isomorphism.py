"""Which NAS-Bench-201 cells are the same, over all 15,625 of them."""

import functools
import hashlib
import itertools
import re

import numpy as np
import pytest

from archscale_jax._spaces import canonical_cell, cell_function, cell_graph

NAMES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
CODES = ["{}_{}{}_{}{}{}".format(*digits) for digits in itertools.product("01234", repeat=6)]
MODULUS = 2**61 - 1


def benchmark_string(code):
    form = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
    return form.format(*(NAMES[int(digit)] for digit in code.replace("_", "")))


@functools.cache
def an_unknown_function(digit, value):
    """A random function of each operation, which has nothing in common but that 0 stays 0."""
    digest = hashlib.blake2b(f"{digit} {value}".encode(), digest_size=16).digest()
    return int.from_bytes(digest) % MODULUS if value else 0


def evaluate(code):
    """What a cell makes of one number."""
    values = [7]
    for group in code.split("_"):
        value = 0
        for source, digit in zip(values, group, strict=True):
            value += source if digit == "1" else digit != "0" and an_unknown_function(digit, source)
        values.append(value % MODULUS)
    return values[-1]


def partition(spell):
    """Per code, the first code that is spelled alike."""
    first = {}
    return [first.setdefault(spell(code), code) for code in CODES]


def test_functions_are_equal_where_random_operations_give_equal_values():
    classes = partition(cell_function)
    assert classes == partition(evaluate)
    assert len(set(classes)) == 4930


def test_the_benchmark_counts_6466_unique_cells():
    classes = partition(canonical_cell)
    assert len(set(classes)) == 6466
    # No string is that of two functions.
    assert len(set(zip(classes, partition(cell_function), strict=True))) == 6466


@pytest.mark.parametrize("spell", [canonical_cell, cell_function])
def test_both_notations_are_spelled_alike(spell):
    assert [spell(benchmark_string(code)) for code in CODES] == [spell(code) for code in CODES]


def test_strings_are_those_of_the_benchmarks_package():
    reason = "nats_bench is not installed: pip install '.[nats]'"
    genotypes = pytest.importorskip("nats_bench.genotype_utils", reason=reason)
    for code in CODES:
        structure = genotypes.topology_str2structure(benchmark_string(code))
        assert canonical_cell(code) == structure.to_unique_str(consider_zero=True)


def test_cells_without_a_path_compute_zero():
    zero = [code for code in CODES if cell_function(code) == "0"]
    assert len(zero) == 341
    for code in zero:
        with pytest.raises(ValueError, match="no path joins"):
            cell_graph(code)


def depths(spelled):
    """Weight edges around each `x`: the lengths of the paths."""
    around = []
    for token in re.findall(r"\w+\(|\)|\bx\b", spelled):
        if token == ")":
            around.pop()
        elif token == "x":
            yield sum(around)
        else:
            around.append(token.startswith("nor_conv"))


@pytest.mark.parametrize("notation", [str, benchmark_string])
def test_functions_have_the_paths_that_the_published_code_finds(golden_dir, notation):
    with np.load(golden_dir / "nb201_open.npz") as golden:
        codes = golden["code"].astype(str).tolist()
        columns = [golden[name] for name in ("n_paths", "sum_L3", "min_depth", "max_depth")]
    found = []
    for code in codes:
        lengths = [*depths(cell_function(notation(code)))]
        cubes = sum(length**3 for length in lengths)
        found.append((len(lengths), cubes, min(lengths, default=-1), max(lengths, default=-1)))
    np.testing.assert_array_equal(found, np.stack(columns, axis=1))


@pytest.mark.parametrize(
    ("code", "spelled", "function"),
    [
        ("0_00_000", "#+#+#", "0"),
        ("0_00_100", "#+#+0", "x"),
        ("0_01_103", "#+(#+#)@nor_conv_3x3+0", "x"),
        ("1_11_111", "0+0+0+0", "x+x+x+x"),
        ("3_02_001", "#+#+#+((0)@nor_conv_3x3)@nor_conv_1x1", "nor_conv_1x1(nor_conv_3x3(x))"),
    ],
)
def test_cells_are_spelled_out(code, spelled, function):
    assert canonical_cell(code) == spelled
    assert cell_function(code) == function


@pytest.mark.parametrize("spell", [canonical_cell, cell_function])
def test_anything_else_raises(spell):
    with pytest.raises(ValueError, match="operation '5'"):
        spell("3_34_135")
    with pytest.raises(TypeError, match="must be a str, found int"):
        spell(334131)
