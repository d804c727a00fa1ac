"""The harness of the benchmarks: what it counts, and what it writes."""

import json
import pathlib
import pkgutil
import types

import numpy as np
import pytest

import benchmarks
from benchmarks import common, figures

RESULTS = sorted(path.stem for path in common.RESULTS.glob("*.json"))


def test_spread_and_ratio_are_medians_and_quartiles():
    assert common.spread([4, 1, 3, 2, 5]) == common.Spread(median=3, lower=2, upper=4)
    # Medians 6 and 2; within rounds 2, 3 and 5.
    assert common.ratio([6, 6, 10], [3, 2, 2]) == common.Spread(median=3, lower=2.5, upper=4)
    assert f"{common.Spread(1.0, 0.5, 2.0):.1f}" == "1.0 (0.5-2.0)"


def test_programs_take_turns_and_each_begins_in_turn():
    called = []
    programs = {name: lambda name=name: called.append(name) for name in "abc"}
    times = common.alternate(programs, rounds=3, warm_up=1)
    assert called[3:] == [*"abc", *"bca", *"cab"]
    assert {name: len(sample) for name, sample in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_lies_in_one_another_is_compiled_once():
    trace, lower, compile_ = common._COMPILING
    with common.Compilations() as found:
        for event, start, end in (
            (trace, 0.0, 4.0),
            (trace, 1.0, 2.0),
            (lower, 4.0, 5.0),
            (compile_, 10.0, 12.0),
            ("/jax/other", 0.0, 99.0),
        ):
            found._listen(event, start, end)
    assert (found.count, found.seconds) == (1, 7.0)


@pytest.mark.parametrize("quick", [False, True])
def test_results_are_written_but_for_tiny_sizes(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "FLAGS", types.SimpleNamespace(quick=quick))
    results = {"spread": common.spread([1, 1]), 2: np.float32(0.5), "none": [np.inf, np.arange(2)]}
    assert common.write_results("one", results) is not quick
    written = tmp_path / "one.json"
    assert written.exists() is not quick
    if not quick:
        assert common.read_results("one") == {
            "spread": {"median": 1, "lower": 1, "upper": 1},
            "2": 0.5,
            "none": [None, [0, 1]],
        }
        assert {"machine", "versions", "command", "date"} < set(json.loads(written.read_text()))


def test_a_benchmark_says_how_it_is_run_and_results_are_of_one():
    modules = {one.name: one.ispkg for one in pkgutil.iter_modules(benchmarks.__path__)}
    names = modules.keys()
    for name in names - {"common", "torch_mup"}:
        file = f"{name}/__main__.py" if modules[name] else f"{name}.py"
        text = pathlib.Path(benchmarks.__path__[0], file).read_text()
        assert f"python -m benchmarks.{name}" in text.split('"""')[1]
        assert "common.run(main)" in text
    assert RESULTS
    for result in RESULTS:
        # workers_steps is of workers, kill_study_ray of kill_study.
        assert any(result == name or result.startswith(f"{name}_") for name in names)
        record = json.loads((common.RESULTS / f"{result}.json").read_text())
        assert set(record) == {"machine", "versions", "command", "date", "results"}


def test_figures_are_drawn_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main()
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"initialization", "paths_scaling"}
