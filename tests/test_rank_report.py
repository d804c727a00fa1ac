"""Table and figures of rankings, of synthetic accuracies whose answers are known."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.lab import panels
from tests.binaries import imported

rank = imported("rank")

CELLS = ["1_00_100", "2_03_100", "3_03_103", "3_00_130", "0_00_300", "3_33_333",
         "2_13_124", "1_11_111", "4_40_004", "3_34_131", "0_30_031", "2_22_222"]  # fmt: skip


def accuracies_of(seeds=3, noise=1e-4):
    """Recipes that keep, gain on, and reverse the order of the cells."""
    rng = np.random.default_rng(0)
    quality = np.linspace(0.5, 0.72, len(CELLS))[:, None]
    means = {"fixed": quality, "better": quality + 0.05, "reversed": 1.2 - quality}
    shape = (len(CELLS), seeds)
    return {recipe: mean + noise * rng.normal(size=shape) for recipe, mean in means.items()}


def rows_of(study, **options):
    return {row["recipe"]: row for row in rank.table(study, **options).to_dict("records")}


def test_the_table_tells_what_each_recipe_does():
    accuracies = accuracies_of()
    published = dict(zip(CELLS, 100 * accuracies["fixed"].mean(1), strict=True))
    rows = rows_of(rank.ranking_of(accuracies, CELLS, published=published), resamples=50)
    assert list(rows) == ["fixed", "better", "reversed"]
    for recipe, row in rows.items():
        means = 100 * accuracies[recipe].mean(1)
        assert row["accuracy of 12 cells, %"] == f"{means.mean():.2f}"
        assert row["spread over cells, %"] == f"{means.std(ddof=1):.2f}"
        assert row["runs missing"] == "0 of 36"
        assert row["seed control, all"] == row["seed control, top 50%"] == "1.00 [1.00, 1.00]"
    assert rows["fixed"]["gain, points"] == rows["fixed"]["tau to fixed, all"] == "–"
    assert rows["better"]["gain, points"].startswith("+5.0")
    assert rows["better"]["cells that gain"] == "12 of 12"
    assert rows["better"]["tau to fixed, top 50%"] == "1.00 [1.00, 1.00]"
    assert rows["better"]["tau below control, all"] == "0.00 [0.00, 0.00]"
    assert rows["reversed"]["cells that gain"] == "6 of 12"
    assert rows["reversed"]["tau to fixed, all"] == "-1.00 [-1.00, -1.00]"
    assert rows["reversed"]["tau below control, all"] == "2.00 [2.00, 2.00]"
    assert rows["reversed"]["tau to fixed, top 20%"].startswith("-1.00 [")  # three cells
    assert rows["better"]["tau to published"] == "1.00 [1.00, 1.00]"
    assert rows["reversed"]["tau to published"] == "-1.00 [-1.00, -1.00]"


def test_the_answer_says_whether_a_ranking_survives():
    better, reversed_ = rank.answer(rank.ranking_of(accuracies_of(), CELLS), resamples=50)
    assert better == (
        "The ranking of 12 cells under fixed survives better, as far as 3 seeds tell: Kendall's "
        "tau is 1.00, 0.00 [0.00, 0.00] below that of seeds among themselves; accuracy changes by "
        "+5.00 points in the mean."
    )
    assert reversed_.startswith(
        "The ranking of 12 cells under fixed does not survive reversed, as far as 3 seeds tell: "
        "Kendall's tau is -1.00, 2.00 [2.00, 2.00] below"
    )
    one_seed = rank.answer(rank.ranking_of(accuracies_of(seeds=1), CELLS), resamples=5)
    assert one_seed[1].startswith(
        "Whether the ranking of 12 cells under fixed survives reversed one seed does not tell: "
        "Kendall's tau is -1.00; accuracy changes by "
    )


def test_a_ranking_within_the_noise_of_seeds_survives():
    """Two draws of the same noise, far larger than what the cells differ by."""
    rng = np.random.default_rng(1)
    found = {name: 0.5 + 0.1 * rng.random((12, 4)) for name in ("fixed", "other")}
    (line,) = rank.answer(rank.ranking_of(found, CELLS), resamples=200)
    assert " fixed survives other, as far as 4 seeds tell: " in line


def test_cells_without_a_run_of_a_recipe_are_excluded_from_all():
    accuracies = accuracies_of()
    accuracies["better"][0] = math.nan
    accuracies["fixed"][1, 2] = math.nan
    study = rank.ranking_of(accuracies, CELLS)
    assert study.cells == CELLS[1:]
    rows = rows_of(study, resamples=5)
    assert [row["runs missing"] for row in rows.values()] == ["1 of 36", "3 of 36", "0 of 36"]
    assert rows["reversed"]["cells that gain"] == "5 of 11"
    expected = 100 * accuracies["reversed"][1:].mean()
    assert rows["reversed"]["accuracy of 11 cells, %"] == f"{expected:.2f}"
    assert "tau to published" not in rows["fixed"]


def test_one_seed_has_no_control():
    study = rank.ranking_of(accuracies_of(seeds=1), CELLS)
    rows = rows_of(study, resamples=20)
    assert rows["reversed"]["tau to fixed, all"] == "-1.00 [-1.00, -1.00]"
    assert (
        rows["reversed"]["seed control, all"] == rows["reversed"]["tau below control, all"] == "–"
    )


def test_another_recipe_can_be_the_one_to_compare_with():
    study = rank.ranking_of(accuracies_of(), CELLS, fixed="better")
    assert study.others == ["fixed", "reversed"]
    assert rows_of(study, resamples=5)["fixed"]["gain, points"].startswith("-5.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": "ours"}, "recipes must be 'ours' and others, found fixed, better, reversed"),
        ({"cells": CELLS[:-1] + CELLS[:1]}, "found '1_00_100' twice"),
        ({"cells": CELLS[:-1]}, r"'fixed' must be \[cells, seeds\] \(11, 3\), found \(12, 3\)"),
        ({"better": np.full((12, 2), 0.5)}, r"'better' must be .* found \(12, 2\)"),
        (
            {"better": np.full((12, 3), 93.0)},
            "'better' must be from 0 to 1, or NaN; found 93 to 93",
        ),
        ({"better": np.full((12, 3), math.nan)}, "needs 3 cells .* found 0 of 12"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    accuracies = accuracies_of()
    if "better" in change:
        accuracies["better"] = change["better"]
    with pytest.raises(ValueError, match=message):
        rank.ranking_of(accuracies, change.get("cells", CELLS), fixed=change.get("fixed", "fixed"))


def test_features_of_cells_counted_by_hand():
    # A skip; 1x1 and 3x3 convolutions and a skip beside; 3 convolutions or a skip beside; one way
    # over a convolution and a skip, and one convolution.
    depths, shortcut = rank.cell_features(["1_00_100", "2_03_101", "3_03_103", "3_00_310"])
    np.testing.assert_allclose(depths, [0, 2 / 2, 3 / 2, 2 / 2])
    assert shortcut.tolist() == [True, True, True, False]


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


def test_every_figure_is_drawn_of_one_seed(tmp_path, drawn):
    accuracies = accuracies_of(1, noise=0.01)
    accuracies["better"][2, 0] = math.nan
    study = rank.ranking_of(accuracies, CELLS)
    rank.draw_accuracies(study, tmp_path / "accuracies.png")
    rank.draw_taus(study, tmp_path / "taus.png", resamples=20)
    rank.draw_gaps(study, tmp_path / "gaps.png")
    rank.draw_gains(study, tmp_path / "gains.png")
    names = {"accuracies", "taus", "gaps", "gains"}
    assert set(drawn) == names
    kinds = ("png", "svg")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in kinds
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert not {"seeds of fixed", "seeds of better"} & tau_labels(drawn)


def tau_labels(drawn):
    return {line.get_label() for line in drawn["taus"].axes[0].get_lines()}


def test_figures_show_the_numbers(tmp_path, drawn):
    accuracies = accuracies_of(noise=0.01)
    study = rank.ranking_of(accuracies, CELLS)
    rank.draw_accuracies(study, tmp_path / "accuracies.png")
    rank.draw_taus(study, tmp_path / "taus.png", resamples=20)
    rank.draw_gaps(study, tmp_path / "gaps.png")
    rank.draw_gains(study, tmp_path / "gains.png")
    assert {"seeds of fixed", "seeds of better"} <= tau_labels(drawn)
    means = {recipe: 100 * values.mean(1) for recipe, values in accuracies.items()}
    for index, recipe in enumerate(("better", "reversed")):
        panel = drawn["accuracies"].axes[index]
        dots = panel.containers[0].lines[0].get_xydata()
        np.testing.assert_allclose(dots, np.stack([means["fixed"], means[recipe]], 1))
        bars = panel.containers[0].lines[2][1].get_segments()
        half = [np.ptp(bar[:, 1]) / 2 for bar in bars]
        np.testing.assert_allclose(half, scipy.stats.sem(100 * accuracies[recipe], axis=1))
        gains = np.concatenate(
            [dots.get_offsets() for dots in drawn["gains"].axes[index].collections]
        )
        np.testing.assert_allclose(
            np.sort(gains[:, 1]), np.sort(means[recipe] - means["fixed"]), atol=1e-9
        )
    pairs = [(s, t) for s in range(3) for t in range(3) if s != t]
    tau = np.mean([
        scipy.stats.kendalltau(accuracies["fixed"][:, s], accuracies["reversed"][:, t]).statistic
        for s, t in pairs
    ])  # fmt: skip
    curve, *_ = drawn["taus"].axes[1].get_lines()
    np.testing.assert_allclose(curve.get_xydata()[-1], [100, float(tau)])
    gaps = drawn["gaps"].axes[0].get_lines()[0].get_xdata()
    left, right = np.triu_indices(len(CELLS), 1)
    expected = np.abs(means["fixed"][left] - means["fixed"][right])
    np.testing.assert_allclose(np.sort(gaps)[1:], np.sort(expected), atol=1e-9)
