"""Tables and figures of growing networks, of records whose numbers are known."""

import json

import numpy as np
import pytest

from experiments.lab import panels
from tests.binaries import imported

grow = imported("grow")

pytestmark = pytest.mark.quick_compilation


def record(spec, method, rate, seed, accuracy, *, parameters=100, flops=1e9, growth_flops=0.0,
           edits=(), curve=None, dataset="fashion_mnist"):  # fmt: skip
    """A finished trial; by default its curve has two points, the last at the end."""
    if curve is None:
        curve = [(1, parameters // 2, flops / 4, 0.3), (4, parameters, flops, accuracy)]
    names = ("step", "parameters", "flops", "accuracy")
    return {
        "trial": {"spec": spec, "arm": method, "rate": rate, "seed": seed, "dataset": dataset},
        "result": {
            "accuracy": accuracy,
            "parameters": parameters,
            "flops": flops,
            "growth_flops": growth_flops,
            "edits": list(edits),
            "curve": [dict(zip(names, point, strict=True)) for point in curve],
        },
    }


def edit(step, numbers, neurons, bottlenecks):
    return {"step": step, "numbers": numbers, "neurons": neurons, "bottlenecks": bottlenecks}


def seeds(spec, method, rate, accuracies, **options):
    return [record(spec, method, rate, seed, one, **options) for seed, one in enumerate(accuracies)]


def rows_of(write, records):
    return write(grow.runs_of(records)).to_dict("records")


# Tables.


def test_the_best_rate_counts_diverged_runs_as_guesses():
    records = [
        *seeds("mlp", "tiny", 0.2, [0.9, None]),
        record("mlp", "tiny", 0.1, 1, 0.6, parameters=2301, flops=3e9, growth_flops=3e8),
        record("mlp", "tiny", 0.1, 0, 0.8, parameters=100, flops=1e9, growth_flops=5e8),
        record("mlp", "tiny", 0.3, 0, 0.99),  # its other seed is missing
    ]
    runs = grow.by_method(grow.runs_of(records))["mlp", "tiny"]
    assert grow.best_rate(runs) == 0.1 and [*runs["rate"].unique()] == [0.1, 0.2, 0.3]
    assert [*grow.at_rate(runs, 0.1)["accuracy"]] == [0.8, 0.6]
    assert [*grow.at_rate(runs, 0.2)["accuracy"]] == [0.9, 0.1]
    (row,) = rows_of(grow.table, records)
    assert row == {
        "network": "mlp",
        "method": "TINY",
        "rate": "0.1",
        "test accuracy, %": "70.0 ± 14.1",
        "parameters": "1,200",
        "training, GFLOP": "2",
        "of it growing, %": "30",
        "seeds": "2",
    }


def test_rows_are_sorted_and_tell_what_diverged():
    records = [
        {"trial": {"spec": "mlp", "arm": "tiny"}, "error": "ValueError: dead"},
        *seeds("resnet18_quarter", "large", 0.1, [0.5], flops=123.4e9),
        *seeds("mlp", "scratch", 0.1, [0.7]),
        *seeds("mlp_largest", "tiny", 0.1, [None, 0.5, None], dataset="cifar100"),
        *seeds("dag_cnn", "random", 0.1, [0.5]),
        *seeds("mlp", "tiny", 0.1, [None, 0.5]),
    ]
    rows = rows_of(grow.table, records)
    labels = {name: label for label, name in grow.LABELS.items()}
    assert [(row["network"], labels[row["method"]]) for row in rows] == [
        ("mlp", "tiny"), ("mlp", "scratch"), ("mlp_largest", "tiny"), ("dag_cnn", "random"),
        ("resnet18_quarter", "large"),
    ]  # fmt: skip
    assert [row["seeds"] for row in rows] == ["2, 1 diverged", "1", "3, 2 diverged", "1", "1"]
    assert [row["of it growing, %"] for row in rows] == ["0", "–", "0", "0", "–"]
    assert rows[0]["test accuracy, %"] == "30.0 ± 28.3"  # 10 and 50
    assert rows[1]["test accuracy, %"] == "70.0"
    assert rows[2]["test accuracy, %"] == "17.3 ± 28.3"  # 1, 50 and 1
    assert rows[4]["training, GFLOP"] == "123"


def test_failures_are_counted_by_method():
    failed = {"trial": {"spec": "mlp", "arm": "tiny_measured"}, "error": "ValueError: dead group"}
    other = {**failed, "error": "ValueError: something else"}
    records = [*seeds("mlp", "tiny_measured", 0.1, [0.5]), failed, other,
               *seeds("mlp", "tiny", 0.1, [0.5])]  # fmt: skip
    assert grow.failures(records).values.tolist() == [
        ["mlp", "TINY, rate by measured change", "2 of 3", "ValueError: dead group"]
    ]
    assert len(grow.failures(records[-1:])) == 0
    assert len(grow.failures([])) == 0


def test_rescaling_is_compared_seed_by_seed_at_the_best_and_at_common_rates():
    records = [
        *seeds("mlp", "tiny", 0.1, [0.8, 0.6, 0.7]),
        *seeds("mlp", "tiny", 0.2, [0.7, 0.4, 0.4]),
        *seeds("mlp", "tiny", 0.4, [0.1, 0.1, 0.1]),
        *seeds("mlp", "tiny_width", 0.1, [0.5, 0.6]),
        *seeds("mlp", "tiny_width", 0.2, [0.9, 0.7]),
        *seeds("mlp", "tiny_measured", 0.1, [0.7]),
        *seeds("dag_cnn", "tiny", 0.1, [0.5]),
        *seeds("resnet18_quarter", "tiny_width", 0.1, [0.5]),
    ]
    rows = [list(row.values()) for row in rows_of(grow.rescaling, records)]
    assert rows == [
        ["mlp", "TINY, rate by width", "0.2, 0.1 (best of each)", "+10.0 ± 0.0", "2"],
        ["mlp", "TINY, rate by width", "0.1, 0.1", "-15.0 ± 21.2", "2"],
        ["mlp", "TINY, rate by width", "0.2, 0.2", "+25.0 ± 7.1", "2"],
        ["mlp", "TINY, rate by measured change", "0.1, 0.1 (best of each)", "-10.0", "1"],
    ]


def test_the_answer_compares_with_the_same_architecture_from_scratch():
    records = [
        *seeds("mlp", "tiny", 0.1, [0.8, 0.6]),
        *seeds("mlp", "tiny", 0.2, [0.1, 0.1]),
        *seeds("mlp", "scratch", 0.4, [0.9, 0.9]),
        *seeds("dag_cnn", "tiny", 0.1, [0.5]),
        *seeds("dag_cnn", "scratch", 0.1, [0.375]),
        *seeds("resnet18_sixteenth", "tiny", 0.1, [0.5]),
        record("resnet18_quarter", "tiny", 0.1, 0, 0.5),
        record("resnet18_quarter", "scratch", 0.1, 1, 0.5),
    ]
    assert grow.answer(grow.runs_of(records)) == [
        "mlp: TINY ends 20.0 ± 14.1 points behind the architecture that it grew, trained from "
        "scratch for as many operations (2 seeds).",
        "dag_cnn: TINY ends 12.5 points ahead of the architecture that it grew, trained from "
        "scratch for as many operations (one seed).",
        "resnet18_quarter: TINY and its architecture from scratch have no seed in common.",
    ]
    assert grow.answer(grow.runs_of(records[:1])) == []


def test_tiny_is_compared_with_every_other_method():
    records = [
        *seeds("mlp", "tiny", 0.1, [0.8, 0.6], parameters=100, flops=1e9),
        *seeds("mlp", "scratch", 0.1, [0.7, 0.6], parameters=100, flops=1e9),
        *seeds("mlp", "scratch", 0.2, [0.9, 0.9], parameters=400, flops=2e9),
        *seeds("mlp", "large", 0.1, [None, 0.9], parameters=80000, flops=1e10),
        record("mlp", "random", 0.1, 5, 0.9),  # no seed in common
    ]
    rows = [list(row.values()) for row in rows_of(grow.against, records)]
    scratch = "TINY's architecture from scratch"
    assert rows == [
        ["mlp", scratch, "0.1, 0.2", "-20.0 ± 14.1", "0.25", "0.5", "2"],
        ["mlp", scratch, "0.1, 0.1", "+5.0 ± 7.1", "1", "1", "2"],
        ["mlp", "random neurons", "0.1, 0.1", "–", "–", "–", "0"],
        ["mlp", "large from the start", "0.1, 0.1", "+20.0 ± 70.7", "0.00125", "0.1", "2"],
    ]


def test_networks_share_what_is_the_same():
    records = [
        *seeds("mlp", "tiny", 0.1, [0.5]),
        *seeds("mlp", "large", 0.1, [0.9]),
        *seeds("mlp", "random", 0.1, [0.7]),
        *seeds("mlp_largest", "tiny", 0.1, [0.6]),
        *seeds("resnet18_sixteenth", "large", 0.1, [0.9]),
        *seeds("resnet18_sixteenth", "random", 0.1, [0.8]),
        *seeds("resnet18_quarter", "tiny", 0.1, [0.5]),
    ]
    assert len(rows_of(grow.table, records)) == len(records)
    found = [
        (row["network"], row["TINY against"], row["accuracy, points"])
        for row in rows_of(grow.against, records)
    ]
    assert found == [
        ("mlp", "random neurons", "-20.0"),
        ("mlp", "large from the start", "-40.0"),
        ("mlp_largest", "random neurons (mlp)", "-10.0"),
        ("mlp_largest", "large from the start (mlp)", "-30.0"),
        ("resnet18_quarter", "large from the start (resnet18_sixteenth)", "-40.0"),
    ]


def test_no_records_make_no_rows():
    for write in (grow.table, grow.against, grow.rescaling):
        assert rows_of(write, []) == []
        assert rows_of(write, [{"trial": {}, "error": "ValueError: dead"}]) == []


# Figures.


STEM, FIRST, SECOND = "stem/kernel", "blocks/0/first/kernel", "layers/0_1/kernel"


def growing(seed, spec="mlp", psi=0.5):
    """Two growths: of all neuron groups, then of one, whose reader alone is measured."""
    edits = [
        edit(10, {STEM: 1, FIRST: 1, SECOND: 2}, {STEM: 2, FIRST: 2, SECOND: 4},
             {FIRST: psi, SECOND: 0.9, "readout/kernel": None}),
        edit(20, {SECOND: 4}, {STEM: 2, FIRST: 2, SECOND: 8}, {"readout/kernel": 0.8}),
    ]  # fmt: skip
    curve = [(10, 50, 1e8, 0.2), (10, 70, 2e8, None), (20, 70, 4e8, 0.4), (40, 100, 1e9, 0.6)]
    return record(spec, "tiny", 0.1, seed, 0.6, edits=edits, curve=curve)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by name."""
    figures = {}
    save = panels.save

    def keep(figure, path):
        figures[path.stem] = figure
        save(figure, path)

    monkeypatch.setattr(panels, "save", keep)
    return figures


def draw_all(records, folder):
    drawn = grow.draw(grow.runs_of(json.loads(json.dumps(records))), folder)
    return {name: folder / f"{name}.png" in drawn for name in grow.FIGURES}


def labelled(panel):
    """Data of the lines that a legend names."""
    lines = [line for line in panel.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): line.get_xydata() for line in lines}


def test_no_records_draw_nothing(tmp_path):
    assert set(draw_all([], tmp_path).values()) == {False}
    assert list(tmp_path.iterdir()) == []


def test_what_did_not_grow_has_no_bottlenecks(tmp_path):
    found = draw_all([*seeds("mlp", "large", 0.1, [0.9]), *seeds("mlp", "tiny", 0.1, [None])],
                     tmp_path)  # fmt: skip
    assert found == {"accuracy_parameters": True, "accuracy_compute": True,
                     "bottlenecks": False, "widths": False}  # fmt: skip
    assert {path.stem for path in tmp_path.iterdir()} == {"accuracy_parameters", "accuracy_compute"}


def test_a_run_that_diverged_at_once_is_drawn(tmp_path):
    diverged = record("mlp", "random", 0.1, 0, None, curve=[(1, 100, 1e8, None)])
    assert draw_all([diverged], tmp_path)["accuracy_compute"]


def test_figures_show_the_numbers(tmp_path, drawn):
    records = [
        growing(0), growing(1, psi=0.7),
        record("mlp", "large", 0.1, 0, 0.9, parameters=5000, flops=1e11),
        growing(0, "mlp_largest"),
    ]  # fmt: skip
    assert set(draw_all(records, tmp_path).values()) == {True}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    for figure in drawn.values():
        assert [panel.get_title() for panel in figure.axes if panel.get_visible()] == [
            "mlp", "mlp_largest",
        ]  # fmt: skip

    panel, other = drawn["accuracy_parameters"].axes[:2]
    ends = labelled(panel)
    np.testing.assert_allclose(ends["TINY"], [[100, 60], [100, 60]])
    np.testing.assert_allclose(ends["large from the start"], [[5000, 90]])
    np.testing.assert_allclose(labelled(other)["large from the start"], [[5000, 90]])
    np.testing.assert_allclose(panel.get_lines()[0].get_xydata(), [[50, 20], [70, 40], [100, 60]])
    assert panel.get_xscale() == "log"

    ends = {bars.get_label(): bars[0].get_xydata().tolist()
            for bars in drawn["accuracy_compute"].axes[0].containers}  # fmt: skip
    assert ends["large from the start"] == [[1e11, 90]]
    assert ends["TINY"] == [[pytest.approx(1e9), pytest.approx(60)]]

    lines = [line.get_xydata() for line in drawn["bottlenecks"].axes[0].get_lines()]
    expected = [[10, 0.6]], [[10, 0.9]], [[20, 0.8]]  # blocks, layers, readout
    for line, known in zip(lines, expected, strict=True):
        np.testing.assert_allclose(line, known)

    panel = drawn["widths"].axes[0]
    alike, alone = (line.get_xydata() for line in panel.get_lines())
    np.testing.assert_allclose(alike, [[0, 1], [10, 2], [20, 2], [40, 2]])
    np.testing.assert_allclose(alone, [[0, 2], [10, 4], [20, 8], [40, 8]])
    labels = {text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in panel.texts}
    assert labels == {"stem, 0 first", "0→1"}


def test_ends_are_means_and_deviations_over_seeds(tmp_path, drawn):
    ends = [(0.5, 1e8), (0.7, 3e8), (None, 2e8)]  # the last diverged: a guess of ten classes
    records = [
        record("mlp", "large", 0.1, seed, accuracy, flops=flops)
        for seed, (accuracy, flops) in enumerate(ends)
    ]
    draw_all([*records, record("mlp", "tiny_width", 0.1, 0, 0.9)], tmp_path)
    panel = drawn["accuracy_compute"].axes[0]
    (bars,) = panel.containers  # TINY's other rates are in the table alone
    line, caps, _ = bars
    assert bars.get_label() == "large from the start"
    mean, deviation = np.mean([50, 70, 10]), np.std([50, 70, 10], ddof=1)
    np.testing.assert_allclose(line.get_xydata(), [[2e8, mean]])
    np.testing.assert_allclose([cap.get_ydata()[0] for cap in caps],
                               [mean - deviation, mean + deviation])  # fmt: skip


def test_labels_keep_apart(tmp_path, drawn):
    """Twenty layers with the same bottleneck have twenty places for their names."""
    names = [f"blocks/{index}/first/kernel" for index in range(20)]
    growth = edit(10, dict.fromkeys(names, 1), dict.fromkeys(names, 2), dict.fromkeys(names, 0.5))
    draw_all([record("resnet18_quarter", "tiny", 0.1, 0, 0.5, edits=[growth])], tmp_path)
    places = sorted(text.xyann[1] for text in drawn["bottlenecks"].axes[0].texts)
    assert len(places) == 20
    assert min(np.diff(places)) > 0.99 * grow.LINE_HEIGHT
    assert places[0] > 0
    assert places[-1] < 1
