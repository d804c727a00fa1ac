"""The page of the paper's figures: its numbers are the stored ones, and today's rules give them."""

import csv
import pathlib
import re

import pytest

import archscale_jax as archscale
from archscale_jax._spaces import chain_string

ROOT = pathlib.Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "studies"
RULES = {
    "path_sum": "path_sum",
    "author_code": "chen2024_code",
    "path_sum_activations": "path_sum_activations",
}
"""Names of rules in stored results, and today's; the page shows the first two."""


def rows(name):
    with open(STORED / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_correlations_are_the_stored_ones():
    page = (ROOT / "docs" / "results" / "paper.md").read_text(encoding="utf-8")
    stored = {(row["study"], row["rule"]): row for row in rows("transfer_rules.csv")}
    found = re.findall(r"^\|[^|]*\|[^|]*\|`(\w+)`\|[^|]*\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    for study, *shown in found:
        for rule, numbers in zip(RULES, shown, strict=False):
            row = stored[study, rule]
            names = ("r (log)", "r (linear)", "RMS error, nats")
            assert numbers.split(", ") == [row[name].split(" ")[0] for name in names], (study, rule)
    assert [study for study, *_ in found] == [
        "chains", "dags", "dags_source", "cnns", "gelu_chains", "gelu_dags", "gelu_cnns",
    ]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_networks_are_trained_at_the_stored_multipliers(rule):
    base = archscale.dag_graph("2")
    networks = rows("scaling_networks.csv")
    assert len(networks) == 31
    for row in networks:
        kind, _, depth = row["network"].partition(" ")
        graph = archscale.dag_graph(chain_string(int(depth)) if kind == "chain" else kind)
        found = archscale.learning_rate_scale(graph, base, RULES[rule])
        assert found == pytest.approx(float(row[f"{rule} factor"]), abs=5.1e-4), row["network"]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_networks_start_at_the_published_deviations(activation):
    """[AAS Eq. 4, 12]: variance 2/(d_in·n), of the readout 2/n², whatever gains edges have."""
    from flax import nnx  # imports TensorStore

    from archscale_jax.rules import weight_standard_deviations
    from experiments.lab.models import create_network

    text, width = "2_12_022_2101", 32
    model = nnx.eval_shape(
        lambda: create_network(
            archscale.dag_graph(text), (4, 4, 1), width, 10, activation=activation,
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    found = weight_standard_deviations(model.architecture(), "target_in_degree")
    expected = {"stem/kernel": 2 / 16, "readout/kernel": 2 / width**2}
    for target, operators in enumerate(text.split("_"), start=1):
        in_degree = len(operators) - operators.count("0")
        for source, operator in enumerate(operators):
            if operator == "2":
                expected[f"layers/{source}_{target}/kernel"] = 2 / (in_degree * width)
    assert {name: one**2 for name, one in found.items()} == pytest.approx(expected)
