"""The transfer study and the rate search as their users run them."""

import json
import math
import re

import numpy as np
import pytest

import archscale_jax as archscale
from experiments import transfer_study
from experiments.lab import networks
from tests.binaries import imported

transfer = imported("transfer")

STUDY = ["--study=chains", "--max_networks=2", "--width=8", "--steps=3", "--num_seeds=1"]
SEARCH = ["--architecture=2", "--width=8", "--epochs=0.1", "--num_rates=2", "--min_rate=0.01",
          "--num_seeds=2", "--refine=0"]  # fmt: skip


def test_a_study_draws_and_goes_on_with_its_results(tmp_path, run_again):
    done = run_again("transfer", tmp_path, *STUDY)
    assert done.returncode == 0, done.stderr
    names = ("results.jsonl", "measurements.jsonl", "table.md", "summary.json")
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    records = [json.loads(line) for line in contents["results.jsonl"].splitlines()]
    assert [record["trial"]["architecture"] for record in records] == ["2", "2_02"]
    for record in records:
        best = min(record["result"]["runs"], key=lambda one: math.inf if one[2] is None else one[2])
        assert best[0] / 4 < record["result"]["rate"] < best[0] * 4
    said = done.stdout.splitlines()[0]
    assert said.startswith("Networks of chains beside the base whose rates are known: 1; rules")
    assert " 2_02: best " in said
    assert (tmp_path / "chains.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<svg") == 1

    again = run_again("transfer", tmp_path, *STUDY)
    assert again.returncode == 0, again.stderr
    assert {name: (tmp_path / name).read_bytes() for name in names} == contents


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--study=chain", "unknown study 'chain'; accepted are all, chains, dags"),
        ("--batch_size=100000", "--batch_size=100000 exceeds the 1438 training examples"),
        ("--dataset=fashion_mnist --data_dir=absent", "absent"),
    ],
)
def test_bad_flags_of_a_study_end_with_one_line_and_leave_nothing(
    tmp_path, flag, message, run_again
):
    failed = run_again("transfer", tmp_path / "run", *flag.split())
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()


def test_a_search_prints_draws_and_goes_on_where_it_stopped(tmp_path, run_again):
    done = run_again("find_lr", tmp_path, *SEARCH)
    assert done.returncode == 0, done.stderr
    journal = tmp_path / "results.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2
    command = r"experiments\.train --base_architecture=2 --base_rate=\S+ --width=8 --architecture=…"
    assert re.search(command, done.stdout)
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| rate |" in table
    report = (tmp_path / "report.html").read_text()
    assert "One command made this run" in report

    again = run_again("find_lr", tmp_path, *SEARCH)
    assert again.returncode == 0, again.stderr
    assert journal.read_text().splitlines(keepends=True) == lines
    assert (tmp_path / "table.md").read_text() == table
    resumed = (tmp_path / "report.html").read_text()
    assert "was resumed: 2 commands" in resumed
    before, after = (one.partition("<h2>Settings")[0] for one in (report, resumed))
    assert before.count("<svg") == 1 and before == after  # tables and figures, byte for byte

    started = run_again("find_lr", tmp_path, *SEARCH, "--base_rate=0.2")  # only what can win
    assert started.returncode == 0, started.stderr
    assert "Predicted from the base rate 0.2: " in started.stdout
    assert journal.read_text().count("\n") == len(lines)

    fewer = run_again("find_lr", tmp_path, *SEARCH, "--num_seeds=1")
    assert "that are not of this search: 2. The --num_rates, --num_seeds" in fewer.stdout
    assert "not of this search" not in done.stdout + again.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--min_rate=5", "--min_rate=5 must be below --max_rate="),
        ("--start=-1", "--start=-1: accepted is a number above 0"),
        ("--architecture=2_00", "no path joins the input"),
    ],
)
def test_bad_flags_of_a_search_end_with_one_line(tmp_path, flag, message, run_again):
    failed = run_again("find_lr", tmp_path / "run", *SEARCH, flag)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_studies_have_the_networks_that_they_claim():
    assert len(set(transfer_study.STUDIES["dags"].architectures)) == 50
    assert len(set(transfer_study.STUDIES["cnns"].architectures)) == 30
    for name, study in transfer_study.STUDIES.items():
        trials = transfer_study.study_trials(study, {"width": 128}, {"width": 8})
        assert trials[0]["architecture"] == transfer_study.BASE
        others = {(t["architecture"], t["width"], t["kernel_size"]) for t in trials[1:]}
        assert len(others) == len(trials) - 1, name
        for trial in trials:
            archscale.dag_graph(trial["architecture"], kernel_size=trial["kernel_size"])


def test_the_report_knows_r_slope_and_error_of_made_up_predictions():
    generator = np.random.default_rng(0)
    predicted = np.exp(generator.normal(size=40))
    true = 2 * predicted**0.5
    rows = [
        dict.fromkeys(transfer.RULES, math.nan)
        | {
            "standardized_update": p,
            "none": 1.0,
            "rate": t,
            "noise": 0.1,
            "losses": {t / 2: 3.0, t: 2.0, 2 * t: 4.0},
        }
        for p, t in zip(predicted, true, strict=True)
    ]
    found = {one.rule: one for one in transfer.summarise("made up", rows).itertuples()}
    assert set(found) == {"standardized_update", "none"}
    measured = found["standardized_update"]
    assert measured.correlation == pytest.approx(1)
    assert measured.slope == pytest.approx(0.5)
    assert measured.noise == pytest.approx(0.1)
    error = np.sqrt(np.mean((np.log(true) - np.log(predicted)) ** 2))
    assert measured.error == pytest.approx(error)
    assert measured.error_low < error < measured.error_high
    assert math.isnan(found["none"].correlation)
    linear = np.corrcoef(predicted, true)[0, 1]
    assert measured.linear_correlation == pytest.approx(linear)
    said = transfer.answer("made up", rows, transfer.summarise("made up", rows))
    assert said.startswith("On 40 networks of made up the rates predicted by standardized_update")


def test_losses_between_trained_rates_are_interpolated_in_log_rate():
    runs = [
        (0.1, 0, 3.0),
        (0.1, 1, 5.0),
        (0.4, 0, 2.0),
        (0.4, 1, 2.0),
        (1.6, 0, 9.0),
        (1.6, 1, None),
    ]
    losses = networks.mean_losses({"runs": runs})
    assert losses == {0.1: 4.0, 0.4: 2.0, 1.6: math.inf}
    for rate, loss in {
        0.01: 4.0,
        0.1: 4.0,
        0.2: 3.0,
        0.4: 2.0,
        0.5: math.inf,
        9.0: math.inf,
    }.items():
        assert archscale.tuning.loss_at(rate, losses) == pytest.approx(loss)
