"""The scaling study as its users run it."""

import json
import math

import pytest

import archscale_jax as archscale
from experiments.lab.tables import markdown
from tests.binaries import imported

scaling = imported("scaling")

SMALL = [
    "--width=8",
    "--epochs=0.1",
    "--search_epochs=0.1",
    "--min_rate=0.01",
    "--max_rate=0.02",
    "--chain_depths=2",
    "--num_random=1",
    "--num_rates=2",
    "--num_seeds=1",
]


def test_a_study_draws_and_goes_on_with_its_results(tmp_path, run_again):
    done = run_again("scaling", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "The base rate reaches the end of the rates tried: widen --min_rate" in done.stdout
    journal, table = tmp_path / "results.jsonl", tmp_path / "table.md"
    records, result = journal.read_text(), table.read_text()
    trials = [json.loads(line) for line in records.splitlines()]
    trials = [one["trial"] | one["result"] for one in trials]
    assert len(trials) == 2 + 2 * 2  # rates, networks x rules
    for trial in trials:
        scale = archscale.learning_rate_scale(
            archscale.dag_graph(trial["architecture"]), archscale.dag_graph("2"), trial["rule"]
        )
        assert trial["rate"] == pytest.approx(trial["base_rate"] * scale)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<svg") == 1

    again = run_again("scaling", tmp_path, *SMALL, "--quiet")
    assert (again.returncode, again.stderr) == (0, "")
    assert "results: " in again.stdout
    assert journal.read_text() == records
    assert table.read_text() == result

    other = run_again("scaling", tmp_path, *SMALL, "--width=9")
    assert other.returncode == 1
    assert "width=8 (now 9)" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--base_rate=nan", "--base_rate=nan: accepted is a number above 0"),
        ("--rules=none,cubic", "unknown learning-rate rule 'cubic'"),
        ("--architecture=2_00", "no path joins the input"),
        ("--batch_size=100000", "exceeds the 1438 training examples"),
        ("--dataset=fashion_mnist --data_dir=absent", "absent"),
    ],
)
def test_bad_flags_end_with_one_line_and_leave_nothing(tmp_path, flag, message, run_again):
    failed = run_again("scaling", tmp_path / "run", *SMALL, *flag.split())
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()


def record(text, rule, seed, loss, *, rate=0.5):
    return {
        "architecture": text,
        "rule": rule,
        "seed": seed,
        "base_rate": 1.0,
        "rate": rate,
        "train_loss": loss,
        "test_accuracy": 0.5,
        "diverged": float(not loss < math.log(10)),
    }


def test_the_report_counts_seeds_that_diverged_apart():
    losses = {("2", "none"): [1.0, math.nan], ("2", "path_sum"): [1.0, 0.5]}
    records = [
        record(text, rule, seed, loss)
        for (text, rule), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    results = scaling.summarise({"two": "2"}, records, guessing=math.log(10))
    unscaled, scaled = (row._asdict() for row in results.itertuples())
    assert (unscaled["loss"], unscaled["diverged"], unscaled["losses"]) == (1.0, 1, [1.0])
    assert unscaled["counted"] == pytest.approx((1 + math.log(10)) / 2)
    assert (scaled["multiplier"], scaled["seeds"]) == (0.5, 2)
    unscaled, scaled = (dict(row) for _, row in scaling.overview(results).iterrows())
    assert unscaled["diverged"] == "1 of 2"
    assert scaled["better than unscaled on"] == "1 of 1"
    row = markdown(scaling.by_network(results)).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["two", "1", "1", "1†1.000"]
    (sentence,) = scaling.answer(results)
    assert sentence.startswith("Unscaled, 1 of 2 runs diverged; by path_sum, 0.")
