"""Values of the authors' published code, a sample of 150 rows each.

`tests/golden/*.csv` are numbers that their PyTorch code, VITA-Group/principled_scaling_lr_init on
GitHub, gives when run unmodified. The tests with the fixture `golden_dir` compare further rows, all
over the spaces.
"""

import csv
import pathlib

import pytest

from archscale_jax import cell_graph, dag_graph, learning_rate_scale, path_statistics

FOLDER = pathlib.Path(__file__).parent / "golden"


def rows(name):
    with (FOLDER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def check(graph, row, rates):
    found = path_statistics(graph)
    assert found.count == int(row["n_paths"])
    assert found.depth_cubed_sum == int(row["sum_L3"])
    assert (found.min_depth, found.max_depth) == (int(row["min_depth"]), int(row["max_depth"]))
    for column, one in rates.items():
        scale = learning_rate_scale(one, rule="chen2024_code")
        assert scale == pytest.approx(float(row[column]), abs=1e-12)


@pytest.mark.parametrize("row", rows("dag_strings"), ids=lambda row: row["dag"])
def test_dag_strings(row):
    dense, convolutional = (dag_graph(row["dag"], kernel_size=q) for q in (None, 5))
    check(dense, row, {"lr_mlp": dense, "lr_cnn_k5": convolutional})


@pytest.mark.parametrize("row", rows("cells"), ids=lambda row: row["code"])
def test_cells(row):
    graph = cell_graph(row["code"])
    check(graph, row, {"lr_tiny": graph})
