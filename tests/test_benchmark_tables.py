"""Tables of accuracies: what is read is what was written, anything else raises, naming its line."""

import gzip
import inspect
import itertools
import pathlib
import sys
import types
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from archscale_jax._spaces import cell_function
from archscale_jax._spaces.cell import cell_digits, string_of_digits
from experiments.nasbench.benchmark_tables import read_nats_bench, read_table

CODES = ("3_34_131", "0_00_000", "1_02_314")
CELLS = tuple(string_of_digits(cell_digits(code)) for code in CODES)


@pytest.fixture(scope="module")
def published():
    """NAS-Bench-201 after 200 epochs, beside the checkout; skips where it is absent."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared" / "nas"
    if not folder.is_dir():
        pytest.skip("no published accuracies: there is no folder ../shared/nas beside the project")
    return read_table(folder / "nasbench201.csv.gz")


# CSV.


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table"])
@pytest.mark.parametrize("cells", [CODES, CELLS])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_tables_are_read(tmp_path, name, cells, newline, start):
    lines = ["first,arch,second", *(f"{i}.5,{cell},{99 - i}" for i, cell in enumerate(cells))]
    content = (start + newline.join(lines) + newline).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    table = read_table(path)
    assert table.cells == cells
    assert list(table.accuracies) == ["first", "second"]
    np.testing.assert_array_equal(table.accuracies["first"], [0.5, 1.5, 2.5])
    np.testing.assert_array_equal(table.accuracies["second"], [99, 98, 97])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; accepted is a header with 'arch'"),
        ("\n", "line 1 has no column 'arch'"),
        ("cell,a\n3_34_131,90\n", "line 1 has no column 'arch', found cell, a"),
        ("arch\n3_34_131\n", "line 1 has no column of accuracies, found arch"),
        ("arch,a,a\n3_34_131,90,90\n", "line 1 repeats the column 'a'"),
        ("arch,arch,a\n", "line 1 repeats the column 'arch'"),
        ("arch,a\n", "has no cells"),
        ("arch,a\n3_34_131,90\n1_02_314\n", "line 3 has 1 fields; accepted are 2"),
        ("arch,a\n3_34_131,90,91\n", "line 2 has 3 fields; accepted are 2"),
        ("arch,a\n3_34_131,90\n\n", "line 3 has 0 fields"),
        ("arch,a\n3_35_131,90\n", "line 2: cell code '3_35_131' has the operation '5'; accepted"),
        ("arch,a\n|nor_conv_3x3~0|,90\n", "line 2: cell .* has 1 vertex groups"),
        ("arch,a\n,90\n", "line 2: cell code ''"),
        ("arch,a\n3_34_131,\n", "line 2: a is ''; accepted are numbers from 0 to 100"),
        ("arch,a,b\n3_34_131,90,x\n", "line 2: b is 'x'"),
        ("arch,a\n3_34_131,9_0\n", "line 2: a is '9_0'"),
        ("arch,a\n3_34_131,nan\n", "line 2: a is 'nan'"),
        ("arch,a\n3_34_131,inf\n", "line 2: a is 'inf'"),
        ("arch,a\n3_34_131,100.01\n", "line 2: a is '100.01'"),
        ("arch,a\n3_34_131,-0.1\n", "line 2: a is '-0.1'"),
        ('arch,a\n3_34_131,"90\n', "line 2 is not CSV"),
        ('arch,a\n"3_34_131"x,90\n', "line 2 is not CSV"),
        (f"arch,a\n3_34_131,90\n1_02_314,90\n{CELLS[0]},90\n", "line 4 has the cell .* of line 2"),
    ],
)
def test_malformed_tables_raise_by_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv:? {message}"):
        read_table(path)


CUT = gzip.compress(b"arch,a\n" * 99, mtime=0)[:-9]  # the same name of the test in every process


@pytest.mark.parametrize("compressed", [b"", b"arch,a\n", CUT])
def test_files_that_are_not_gzip_raise(tmp_path, compressed):
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(compressed)
    with pytest.raises(ValueError, match="bad.csv.gz is (not a complete gzip file|empty)"):
        read_table(path)


def test_other_files_raise(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"arch,a\n\xff\n")
    with pytest.raises(ValueError, match="bad.csv is not text in UTF-8"):
        read_table(path)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "missing.csv")


@hypothesis.given(
    place=strategies.integers(0, 60),
    inserted=strategies.text('arch,|~+_0135.9"\n\r\x00\u0663e-', max_size=6),
    cut=strategies.integers(0, 3),
)
def test_any_text_is_a_table_or_a_value_error(tmp_path_factory, place, inserted, cut):
    text = "arch,a,b\n3_34_131,90,1\n1_02_314,80,2\n0_00_000,10,3\n"
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(text[:place] + inserted + text[place + cut :], newline="")
    try:
        table = read_table(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert len({str(cell_digits(cell)) for cell in table.cells}) == len(table.cells) > 0
        for column in table.accuracies.values():
            assert column.shape == (len(table.cells),)
            assert ((column >= 0) & (column <= 100)).all()


def test_the_published_table_lists_every_cell(published):
    codes = ("{}_{}{}_{}{}{}".format(*digits) for digits in itertools.product("01234", repeat=6))
    every = {string_of_digits(cell_digits(code)) for code in codes}
    assert len(published.cells) == 15_625
    assert set(published.cells) == every
    assert {column.shape for column in published.accuracies.values()} == {(15_625,)}
    assert published.accuracies["cifar10_test"].max() == pytest.approx(91.52, abs=0.005)


def test_cells_without_a_path_are_those_that_were_published_at_chance(published):
    zero = np.array([cell_function(cell) == "0" for cell in published.cells])
    for name, chance in (
        ("cifar10_test", 10),
        ("cifar100_test", 1),
        ("imagenet16_test", 100 / 120),
    ):
        np.testing.assert_allclose(published.accuracies[name][zero], chance, rtol=1e-3)
    assert published.accuracies["cifar10_test"][~zero].min() > 30
    assert published.accuracies["cifar100_test"][~zero].min() > 10


# NATS-Bench.


class StandIn:
    """The part of NATS-Bench's API that is used, with its signatures and its habits."""

    search_space_name = "topology"

    def __init__(self, results, fast_mode=False):
        """Takes {(index, dataset, hp): {seed: {metric: value}}}."""
        self._results = results
        self.fast_mode = fast_mode
        self.arch2infos_dict = {} if fast_mode else dict.fromkeys(range(len(CELLS)))
        self.most_loaded = 0

    def __len__(self):
        return len(CELLS)

    def __getitem__(self, index: int):
        return CELLS[index]

    def query_index_by_arch(self, arch):
        return CELLS.index(arch) if arch in CELLS else -1

    def get_more_info(self, index, dataset, iepoch=None, hp="12", is_random=True):
        assert iepoch is None
        assert is_random is not True, "a seed at random"
        self.arch2infos_dict[index] = None
        self.most_loaded = max(self.most_loaded, len(self.arch2infos_dict))
        trials = self._results[index, dataset, hp]
        if is_random is False:
            names = next(iter(trials.values()))
            return {name: np.mean([trial[name] for trial in trials.values()]) for name in names}
        if is_random not in trials:
            raise ValueError(f"can not find random seed ({is_random})")
        return trials[is_random]


RESULTS = {
    (index, dataset, hp): {
        seed: {
            f"{split}-accuracy": base + index + seed / 1000 + (split == "test") / 2
            for split in ("train", *splits)
        }
        for seed in seeds
    }
    for index in range(len(CELLS))
    for dataset, base, splits in (
        ("cifar10-valid", 80, ("valid", "test")),
        ("cifar10", 90, ("test",)),
        ("cifar100", 60, ("valid", "test", "valtest")),
    )
    for hp, seeds in (("12", (111,)), ("200", (777, 888)[: 2 - (index == 1)]))
}


@pytest.mark.parametrize("fast_mode", [False, True])
def test_the_mean_over_seeds_of_the_long_run_is_read(fast_mode):
    api = StandIn(RESULTS, fast_mode)
    table = read_nats_bench(api, dataset="cifar10-valid", split="valid")
    assert table.cells == CELLS
    assert list(table.accuracies) == ["cifar10-valid valid"]
    (column,) = table.accuracies.values()
    np.testing.assert_allclose(column, [80.8325, 81.777, 82.8325])
    # Nothing that was read is kept in memory.
    assert (api.most_loaded, len(api.arch2infos_dict)) == ((1, 0) if fast_mode else (3, 3))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dataset": "cifar10", "split": "test"}, [92.277, 93.3325, 91.3325]),
        ({"dataset": "cifar10-valid", "split": "test"}, [82.277, 83.3325, 81.3325]),
        ({"dataset": "cifar100", "split": "valtest", "epochs": 12}, [61.111, 62.111, 60.111]),
        ({"dataset": "cifar100", "split": "train", "seed": 777}, [61.777, 62.777, 60.777]),
    ],
)
def test_what_is_asked_for_is_read(arguments, expected):
    cells = (CODES[1], CELLS[2], CODES[0])
    table = read_nats_bench(StandIn(RESULTS), cells=cells, **arguments)
    assert table.cells == cells
    (column,) = table.accuracies.values()
    np.testing.assert_allclose(column, expected)


def test_cells_that_were_loaded_stay_loaded():
    api = StandIn(RESULTS, fast_mode=True)
    api.arch2infos_dict[2] = None
    read_nats_bench(api, dataset="cifar10", split="test")
    assert list(api.arch2infos_dict) == [2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "cifar"}, "dataset is 'cifar'; accepted are cifar10-valid, cifar10, "),
        ({"split": "x-valid"}, "split is 'x-valid'; accepted for cifar100 are train, valid, "),
        ({"dataset": "cifar10", "split": "valid"}, "accepted for cifar10 are .* cifar10-valid$"),
        ({"epochs": 90}, "epochs is 90; accepted are 12 and 200"),
        ({"seed": True}, "seed is True; accepted are an int"),
        ({"seed": 888}, "cell .none~0.* with seed 888 is not there: .* seed .888."),
        ({"dataset": "ImageNet16-120"}, "accuracy on ImageNet16-120 valid .* is not there"),
        ({"cells": ["3_34_132"]}, "cell 3_34_132 is not in"),
        ({"cells": ["3_34_13"]}, "cell code '3_34_13'"),
        ({"cells": [CODES[0], CODES[1], CELLS[0]]}, "cells has 3_34_131 twice"),
    ],
)
def test_other_requests_raise(changed, message):
    arguments = {"dataset": "cifar100", "split": "valid"} | changed
    with pytest.raises(ValueError, match=message):
        read_nats_bench(StandIn(RESULTS), **arguments)


@pytest.mark.parametrize("accuracy", [101.0, -1.0, float("nan")])
def test_impossible_accuracies_raise(accuracy):
    results = {(0, "cifar10", "200"): {777: {"test-accuracy": accuracy}}}
    with pytest.raises(ValueError, match=f"cell 3_34_131.* is '{accuracy}'; accepted are numbers"):
        read_nats_bench(StandIn(results), dataset="cifar10", split="test", cells=CODES[:1])


def test_the_size_search_space_raises():
    api = StandIn(RESULTS)
    api.search_space_name = "size"
    for source in (api, object()):
        with pytest.raises(ValueError, match="accepted are a path and the API of the topology"):
            read_nats_bench(source, dataset="cifar10", split="test")


@pytest.mark.parametrize("is_folder", [False, True])
def test_paths_are_opened_by_the_package(tmp_path, monkeypatch, is_folder):
    calls = []

    def create(file_path_or_dict, search_space, fast_mode=False, verbose=True):
        calls.append((file_path_or_dict, search_space, fast_mode, verbose))
        return StandIn(RESULTS, fast_mode)

    monkeypatch.setitem(sys.modules, "nats_bench", types.SimpleNamespace(create=create))
    path = tmp_path / "NATS-tss"
    path.mkdir() if is_folder else path.touch()
    table = read_nats_bench(path, dataset="cifar10", split="test")
    assert table.cells == CELLS
    assert calls == [(str(path), "topology", is_folder, False)]


def test_without_the_package_or_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(ImportError, match=r"pip install '.\[nats\]'"):
        read_nats_bench(tmp_path, dataset="cifar10", split="test")
    with pytest.raises(FileNotFoundError, match="missing: there is no such file or folder"):
        read_nats_bench(tmp_path / "missing", dataset="cifar10", split="test")


@pytest.fixture
def nats_bench():
    return pytest.importorskip(
        "nats_bench", reason="nats_bench is not installed: pip install '.[nats]'"
    )


def test_the_package_has_the_signatures_of_the_stand_in(nats_bench):
    for name in ("__len__", "__getitem__", "query_index_by_arch", "get_more_info"):
        real, stand_in = (
            inspect.signature(getattr(one, name)).parameters.values()
            for one in (nats_bench.NATStopology, StandIn)
        )
        assert [(p.name, p.default) for p in real] == [(p.name, p.default) for p in stand_in]


def api_of(nats_bench, results):
    """The package's own API with these results."""
    infos = {}
    for (index, dataset, hp), trials in results.items():
        runs = infos.setdefault(index, {}).setdefault(
            hp, nats_bench.ArchResults(index, CELLS[index])
        )
        splits_of = {"valid": "x-valid", "test": "x-test", "valtest": "ori-test"}
        names = splits_of if dataset == "cifar100" else splits_of | {"test": "ori-test"}
        for seed, metrics in trials.items():
            found = {key.removesuffix("-accuracy"): value for key, value in metrics.items()}
            trained = {0: found.pop("train")}
            run = nats_bench.ResultsCount(
                dataset, None, trained, trained, None, None, {}, seed, 1, None
            )
            for split, value in found.items():
                run.update_OLD_eval(names[split], {0: value}, {0: value})
            runs.update(dataset, seed, run)
    state = {
        index: {hp: runs.state_dict() for hp, runs in of_cell.items()}
        for index, of_cell in infos.items()
    }
    whole = {"meta_archs": list(CELLS), "arch2infos": state, "evaluated_indexes": list(infos)}
    return nats_bench.create(whole, "topology", verbose=False)


@pytest.mark.parametrize("options", [{}, {"epochs": 12}, {"seed": 777}])
def test_the_package_answers_as_the_stand_in(nats_bench, options: dict[str, Any]):
    api = api_of(nats_bench, RESULTS)
    for dataset, splits in (
        ("cifar10-valid", ("train", "valid", "test")),
        ("cifar10", ("train", "test")),
        ("cifar100", ("train", "valid", "test", "valtest")),
    ):
        for split in splits:
            real, stand_in = (
                read_nats_bench(one, dataset=dataset, split=split, **options)
                for one in (api, StandIn(RESULTS))
            )
            assert real.cells == stand_in.cells
            for name, column in stand_in.accuracies.items():
                np.testing.assert_allclose(real.accuracies[name], column)
    with pytest.raises(ValueError, match="accuracy on ImageNet16-120 valid .* is not there"):
        read_nats_bench(api, dataset="ImageNet16-120", split="valid", **options)
