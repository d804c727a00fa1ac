"""The study of rankings: what it samples, at which rates it trains, and the binary itself."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archscale_jax as archscale
from archscale_jax._architecture import named_leaves
from archscale_jax._spaces import canonical_cell, cell_graph
from experiments.lab.models import CellNetwork
from experiments.nasbench import rank_study

SMALL = rank_study.PRESETS["small"] | {"dataset": "digits", "downscale": 1, "cell": []}
SMALL |= {"recipe": list(rank_study.RECIPES), "num_cells": 5, "num_seeds": 2, "batch_size": 100}


def test_sampled_cells_differ_have_a_path_and_extend_each_other():
    cells = rank_study.sample_cells(300)
    assert len({canonical_cell(cell) for cell in cells}) == 300
    assert cells[:60] == rank_study.sample_cells(60)
    assert rank_study.sample_cells(60, seed=1) != cells[:60]
    for cell in cells:
        archscale.path_statistics(cell_graph(cell))
    with pytest.raises(ValueError, match="there are [0-9]+ different cells, asked for 20000"):
        rank_study.sample_cells(20000)


def trial(recipe, cell, rate=0.5):
    return {"recipe": recipe, "cell": cell, "base_rate": rate}


@pytest.mark.parametrize(
    ("recipe", "cell", "multiplier"),
    [
        ("fixed", "3_33_333", 1),
        ("mup", "3_33_333", 1),
        ("author_code", "0_00_100", 1),
        ("author_code", "0_00_300", 2**-1.5),
        # Paths of 1, 2, 2 and 3 convolutions; the code adds 1 to each.
        ("author_code", "3_33_333", (2**3 + 2 * 3**3 + 4**3) ** -0.5),
        ("path_sum", "0_00_300", 1),
        ("path_sum", "3_33_333", (1 + 2 * 2**3 + 3**3) ** -0.5),
    ],
)
def test_rates_scale_the_base_rate_by_the_rule(recipe, cell, multiplier):
    assert rank_study.learning_rate(trial(recipe, cell)) == pytest.approx(0.5 * multiplier)


def test_measured_rates_are_of_the_vertices_on_paths():
    def measured(standardized, live):
        rows = np.array([standardized, standardized], object)
        sizes = {name: rows.tolist() for name in archscale.tuning.UpdateSize._fields}
        return sizes | {"live": live}

    measurements = {
        "3_33_333": measured([1.0, None, 16.0, 100.0], [True, False, True, False]),
        "0_00_300": measured([1.0, 4.0], [True, True]),
    }
    found = rank_study.learning_rate(trial("measured", "3_33_333"), measurements)
    assert found == pytest.approx(0.5 * math.sqrt(4 / 16))
    with pytest.raises(ValueError, match="the cell 1_11_111 has no measurement"):
        rank_study.learning_rate(trial("measured", "1_11_111"), measurements)


def test_path_sum_says_nothing_of_a_cell_without_convolutions():
    with pytest.raises(ValueError, match="no path of the graph crosses a weight edge"):
        rank_study.learning_rate(trial("path_sum", "1_11_141"))


@pytest.mark.quick_compilation
def test_the_fixed_recipe_draws_as_pytorch_does_by_default():
    network = nnx.eval_shape(lambda: CellNetwork("3_22_222", 3, 16, 1, 10, rngs=nnx.Rngs(0)))
    params = nnx.state(network, nnx.Param)
    leaves = named_leaves(rank_study.pytorch_default(jax.random.key(0), params))
    for name, leaf in leaves.items():
        if name.endswith("kernel"):
            bound = math.prod(leaf.shape[:-1]) ** -0.5
            assert float(jnp.abs(leaf).max()) <= bound
            assert float(leaf.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        elif "normalization" in name:
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")))
    assert 0 < float(jnp.abs(leaves["readout/bias"]).max()) <= 64**-0.5
    same = [leaves[f"stages/0/0/edges/{edge}/convolution_1/kernel"] for edge in ("0_2", "1_2")]
    assert not jnp.array_equal(*same)


def test_a_plan_searches_every_base_that_its_recipes_scale_from():
    plan = rank_study.plan_of(SMALL)
    found = {(one["cell"], one["initialization"]) for one in plan.searches}
    assert found == {
        ("0_00_100", "chen2024_code"),
        ("0_00_300", "target_in_degree"),
        ("0_00_300", "he_normal"),
    }
    assert [one["cell"] for one in plan.measurements] == sorted({*plan.cells, "0_00_300"})
    bases = [
        {"trial": one, "result": {"rate": 0.1 * number}}
        for number, one in enumerate(plan.searches, start=1)
    ]
    trials = rank_study.trials_of(plan, bases)
    assert len(trials) == 5 * 5 * 2
    assert [one["seed"] for one in trials] == [0] * 25 + [1] * 25
    rates = {one["recipe"]: one["base_rate"] for one in trials}
    by_base = {(one["trial"]["cell"], one["trial"]["initialization"]): one["result"]["rate"]
               for one in bases}  # fmt: skip
    assert rates["fixed"] == 0.1
    assert rates["path_sum"] == rates["measured"] == by_base["0_00_300", "target_in_degree"]
    assert rates["mup"] == by_base["0_00_300", "he_normal"]
    few = rank_study.plan_of(SMALL | {"recipe": ["fixed", "author_code"], "cell": ["3_33_333"]})
    assert (len(few.searches), few.measurements, few.cells) == (1, [], ["3_33_333"])
    bases[0] = {"trial": plan.searches[0], "error": "ValueError: diverged"}
    with pytest.raises(
        RuntimeError, match="the search on 0_00_100 failed with ValueError: diverged"
    ):
        rank_study.trials_of(plan, bases)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": ["fixed", "ours"]}, "unknown recipe 'ours'; accepted are fixed, author_code"),
        ({"recipe": ["mup"]}, "recipe must name fixed"),
        ({"cell": ["0_00_010"]}, "no path joins the input"),
        ({"cell": ["3_33_333", "3_33_333"]}, "the cell 3_33_333 is named twice"),
        ({"batch_size": 5000}, "batch_size 5000 exceeds the 1438 training examples"),
        ({"epochs": 0.0}, "epochs must be positive and finite, found 0"),
    ],
)
def test_bad_settings_raise_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        rank_study.plan_of(SMALL | changed)


def test_accuracies_by_recipe_cell_and_seed():
    def record(recipe, cell, seed, **found):
        return {"trial": {"recipe": recipe, "cell": cell, "seed": seed}} | found

    accuracies, cells = rank_study.accuracies_of(
        [
            record("fixed", "a", 0, result={"accuracy": 0.1}),
            record("mup", "a", 0, error="diverged"),
            record("fixed", "b", 0, result={"accuracy": 0.2}),
            record("mup", "b", 0, result={"accuracy": 0.3}),
            record("fixed", "b", 1, result={"accuracy": 0.4}),
        ]
    )
    assert cells == ["a", "b"]
    np.testing.assert_array_equal(accuracies["fixed"], [[0.1, math.nan], [0.2, 0.4]])
    np.testing.assert_array_equal(accuracies["mup"], [[math.nan] * 2, [0.3, math.nan]])


FLAGS = ["--dataset=digits", "--downscale=1", "--channels=1", "--batch_size=256", "--epochs=0.3"]
FLAGS += ["--recipe=fixed,path_sum", "--workers=1"]
CELLS = ["0_00_300", "2_30_202", "4_12_013", "1_00_100"]


def few_searched():
    rank_study.SEARCH_SEEDS = 1


def test_the_binary_trains_prints_draws_and_goes_on_with_more_seeds(tmp_path, run_again):
    workdir = tmp_path / "rank"
    flags = [*FLAGS, f"--cell={','.join(CELLS)}", "--num_seeds=2"]
    begun = run_again("rank", workdir, *flags, prepare=few_searched)
    assert begun.returncode == 0, begun.stderr
    # As if it had had one seed, then two.
    config, results = workdir / "config.json", workdir / "results.jsonl"
    before = results.read_bytes().splitlines()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_seeds": 1}))
    table = tmp_path / "table.csv"
    rows = [f"{cell},{50 + number}\n" for number, cell in enumerate(CELLS)]
    table.write_text("arch,accuracy\n" + "".join(rows))
    flags += [f"--table={table}", "--table_column=accuracy"]
    finished = run_again("rank", workdir, *flags, prepare=few_searched)
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout
    lines = results.read_bytes().splitlines()
    assert lines == before
    assert len(lines) == 16
    assert "2 runs of path_sum failed: ValueError: rule path_sum: no path" in finished.stderr
    records = [json.loads(line) for line in lines]
    assert [record["trial"]["seed"] for record in records] == [0] * 8 + [1] * 8
    assert sum("error" in record for record in records) == 2
    for record in records:
        if "result" in record:
            found = record["result"]
            assert 0 <= found["accuracy"] <= 1
            assert math.isfinite(found["test_loss"])
            assert found["rate"] > 0
    assert "tau to published" in output
    assert (workdir / "table.md").read_text() in output
    for name in ("accuracies", "taus", "gaps", "gains"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report.html").read_text().count("<svg") == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=cifar10", "--data_dir=nowhere"], "error: "),
        (
            ["--dataset=digits", "--downscale=1", "--cell=3_33"],
            "error: flag --cell=3_33: cell code '3_33'",
        ),
        (["--dataset=digits", "--table=nowhere.csv"], "--table=nowhere.csv cannot be read"),
    ],
)
def test_the_binary_ends_bad_input_with_one_line(tmp_path, run_again, flags, message):
    finished = run_again("rank", tmp_path / "rank", *flags)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "rank").exists()
