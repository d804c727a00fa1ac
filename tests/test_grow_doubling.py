"""The study of doubling: what a training does and counts, and what is said of it."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments.lab.datasets import text as texts
from tests.binaries import imported

doubling = imported("grow_doubling")

pytestmark = pytest.mark.quick_compilation


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of trainings that are as short and as small as can be."""
    for number in range(80):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + "return x\n" * 20)
    for name, value in {"PART": 2, "CONTEXT": 8, "WARMUP": 4, "AFTER": (0, 2)}.items():
        monkeypatch.setattr(doubling, name, value)
    tasks = {"decoder": doubling.Task((1, 16), (2, 32), 2**-7, "decoder", 4, head=8),
             "cnn": doubling.Task((3, 1), (6, 2), 2**-7, "CNN", 8)}  # fmt: skip
    monkeypatch.setattr(doubling, "TASKS", tasks)
    settings = {"steps": 24, "text": texts.load_text(str(tmp_path)).name, "dataset": "digits"}
    yield doubling.Study(settings, tmp_path / "results.jsonl", {})
    doubling.model_of.cache_clear()
    doubling.data_of.cache_clear()


@pytest.mark.parametrize(("task", "method"), [("decoder", "both"), ("cnn", "reset")])
def test_a_training_grows_and_counts_what_it_does(study, task, method):
    trial = study.trial(task, method, 0.01, 1)
    json.dumps(trial)
    small, large = doubling.TASKS[task].small, doubling.TASKS[task].large
    assert trial["sizes"] == [list(small), [small[0], large[1]], list(large)]
    assert (trial["switches"], trial["ends"]) == ([8, 12], [24])
    found = doubling.train(trial)
    each = [
        doubling.model_of(task, tuple(size), *doubling.data_key(trial)).operations
        for size in trial["sizes"]
    ]
    assert each[0] < each[1] < each[2]
    assert found["operations"] == [pytest.approx(8 * each[0] + 5 * each[1] + 13 * each[2])]
    assert len(found["growths"]) == 2
    for growth in found["growths"]:
        assert growth["after"][0] == pytest.approx(growth["before"], rel=1e-4)
        assert len(growth["after"]) == 2
    assert np.isfinite(found["held_out"][0])
    assert 0 <= found["accuracy"][0] <= 1


def test_ends_share_what_comes_before_the_rate_falls(study):
    whole = doubling.train(study.trial("cnn", "scratch", 0.01, 0, lengths=(0.5, 1.0)))
    short = doubling.train(study.trial("cnn", "scratch", 0.01, 0, lengths=(0.5,)))
    assert whole["held_out"][0] == short["held_out"][0]
    assert whole["operations"][1] == pytest.approx(2 * whole["operations"][0])
    assert whole["operations"][0] == short["operations"][0]


def test_a_doubled_path_starts_small_where_it_doubles():
    task = doubling.Task((2, 32), (4, 64), 0.01, "", 1)
    width, depth = (doubling.path_of(task, doubling.METHODS[name]) for name in ("width", "depth"))
    assert width == ([(4, 32), (4, 64)], [1 / 2])
    assert depth == ([(2, 64), (4, 64)], [1 / 2])
    assert doubling.path_of(task, doubling.METHODS["scratch"]) == ([(4, 64)], [])


def results(losses, task="decoder"):
    """Trainings from scratch at loss = operations^(-1/4), and one of each method at its loss."""
    rows = [
        {"task": task, "method": "scratch", "rate": 0.01, "seed": seed, "updates": updates,
         "searched": False, "operations": updates, "held_out": updates**-0.25, "accuracy": 0.5,
         "rise": np.nan}
        for seed in (0, 1) for updates in (400, 600, 800)
    ]  # fmt: skip
    rows += [
        rows[0] | {"method": method, "seed": seed, "updates": 800, "operations": 500,
                   "held_out": loss, "rise": 0.01 * (seed + 1)}
        for method, loss in losses.items() for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("equal", [300, 500, 625, 800, 1000])
def test_savings_are_those_of_a_power_law(equal):
    frame = results({})
    one = frame[frame.seed == 0]
    assert doubling.saved(one, 500, equal**-0.25) == pytest.approx(1 - 500 / equal)


def test_the_table_and_the_figure_show_every_method(tmp_path):
    frame = results({"both": 625**-0.25, "halves": 400**-0.25})
    rows = doubling.table(frame, 800).to_dict("records")
    assert [row["method"] for row in rows] == ["from scratch"] * 3 + [
        doubling.METHODS[name].label for name in ("both", "halves")
    ]
    assert [row["saved, %"] for row in rows[3:]] == ["20.0 ± 0.0", "-25.0 ± 0.0"]
    assert rows[3]["rise, %"] == "1.50 ± 0.50"
    assert rows[3]["operations"] == f"{500 / 800:.2f}"
    doubling.draw(frame, 800, tmp_path / "figure.png")
    text = (tmp_path / "figure.svg").read_text()
    assert all(doubling.METHODS[name].label in text for name in ("scratch", "both", "halves"))


def test_rates_are_searched_until_the_best_has_worse_neighbours(study, monkeypatch):
    asked = []

    def measure(trials, name):
        asked.extend(trial["rate"] for trial in trials)
        return [{"result": {"held_out": [abs(np.log2(one["rate"]) + 4.9)]}} for one in trials]

    monkeypatch.setattr(study, "measure", measure)
    assert study.best_rate("decoder") == 2**-5
    assert max(asked) == 2**-4


def test_what_is_missing_is_said(study, monkeypatch):
    monkeypatch.setattr(study, "_only_finished", True)
    with pytest.raises(doubling.UnfinishedError):
        study.measure([study.trial("cnn", "both", 0.01, 0)], "")
    assert study.frame().empty
