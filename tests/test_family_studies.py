"""The studies of network families, as users run them, and the tables they make of their results."""

import dataclasses
import math

import jax
import numpy as np
import pandas as pd
import pytest

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.rules._residual import residual_branches
from experiments import default_networks
from experiments.lab import datasets, families, files, networks
from experiments.lab.sweeps import trial_hash
from tests.binaries import imported

coordinate, study = imported("coordinate"), imported("size_transfer")
defaults = imported("defaults")

pytestmark = pytest.mark.quick_compilation

COORDINATE = ("--dataset=digits", "--family=mlp", "--axis=depth", "--depth=1,2", "--steps=2",
              "--num_seeds=1", "--batch_size=8")  # fmt: skip


def test_the_coordinate_binary_measures_prints_and_draws(tmp_path, run_again):
    done = run_again("coordinate", tmp_path, *COORDINATE)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    said = done.stdout.splitlines()
    assert said[0].startswith("Updates change the mlp of depth 1 to 2 most alike under ")
    assert said[1] == "One seed: how far these factors scatter is not known."
    rows = [line.split("|") for line in table.splitlines()[4:]]
    names = {tuple(cell.strip() for cell in row[1:4]) for row in rows}
    assert names == {("mlp", "depth", how) for how in ("standard", "closed_form", "measured")}
    assert (tmp_path / "coordinate_depth.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<svg") == 1
    assert len(files.read_records(tmp_path / "results.jsonl")) == 3 * 2


def test_wrong_flags_end_with_one_line(tmp_path, run_again):
    done = run_again("coordinate", tmp_path, "--dataset=digits", "--family=rnn")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        "error: flag --family=rnn: unknown family 'rnn'; accepted are mlp"
    )
    assert not list(tmp_path.iterdir())


def test_what_diverged_is_not_flat():
    trials = [{"family": "mlp", "axis": "width", "parametrization": "standard"}] * 2
    rows = [
        [size, 0, step, vertex, None if size == 4 and vertex == 0 else 1.0, 1.0]
        for size in (2, 4) for step in (0, 1) for vertex in (0, "output")
    ]  # fmt: skip
    records = [{"result": {"records": rows[:4]}}, {"result": {"records": rows[4:]}}]
    table = coordinate.table(coordinate.curves_of(trials, records))
    assert table.iloc[0].tolist() == ["mlp", "width", "standard", "diverged", "1"]


def test_the_answer_names_the_flattest_parametrization():
    def curves(*values):
        names = ("0", "output")
        return {5: {name: {64: 1.0, 256: one} for name, one in zip(names, values, strict=True)}}

    found = {
        ("mlp", "width", "standard"): curves(1.0, 7.5),
        ("mlp", "width", "closed_form"): curves(1.25, 0.8),
        ("cnn", "depth", "standard"): curves(math.inf, 1.0),
        ("cnn", "depth", "measured"): curves(2.0, math.nan),
        ("resnet", "depth", "standard"): curves(1.0, math.inf),
        ("resnet", "depth", "closed_form"): curves(4.0, 1.0),
    }
    assert coordinate.answer(found, 3) == [
        "Updates change the mlp of width 64 to 256 most alike under closed form: by factors up to "
        "1.25 after 5 updates, standard 7.5.",
        "Updates change the cnn of depth 64 to 256 alike under no parametrization: all diverged.",
        "Updates change the resnet of depth 64 to 256 most alike under closed form: by factors up "
        "to 4 after 5 updates, standard without bound.",
    ]
    assert len(coordinate.answer(found, 1)) == 4


@pytest.mark.parametrize(
    ("moved", "seeds", "edge", "said"),
    [
        (
            0.0,
            3,
            10.0,
            "serves up to depth 4, as far as searches tell: best rates lie 0.00 nats apart",
        ),
        (1.5, 3, 10.0, "does not serve up to depth 4: best rates lie 1.50 nats apart, and noise"),
        (1.5, 1, 10.0, "may stay or move, which one seed does not tell: best rates lie 1.50 nats"),
        (0.0, 3, 0.1, "may stay or move: a search ended where its rates end; best rates lie 0.00"),
    ],
)
def test_the_answer_says_whether_a_rate_stays_and_what_cannot_be_told(moved, seeds, edge, said):
    """Parabolas around 0.1, and around a rate so many nats beside it, up to a largest rate."""

    def search(nats):
        rates = [rate for rate in np.geomspace(1e-3, 10, 41).tolist() if rate <= edge * 1.01]
        return archscale.tuning.summarise_runs(
            archscale.tuning.Run(rate, seed, 1 + (math.log(rate / 0.1) - nats - 0.01 * seed) ** 2)
            for rate in rates
            for seed in range(seeds)
        )

    group = study.Group({1: search(0.0), 2: search(moved / 2), 4: search(moved)}, {})
    (line,) = study.answer({("resnet_depth", "factors"): group})
    assert line.startswith(f"resnet_depth, factors: the best rate of depth 1 {said}")
    cost = float(line.rpartition("it gives up ")[2].partition("%")[0])
    assert cost == pytest.approx(100 * moved**2, abs=5)
    assert line.endswith("of loss at most, at depth 4.") == (moved > 0)


def test_a_rate_at_which_a_larger_size_diverges_is_said_to():
    def search(limit):
        return archscale.tuning.summarise_runs(
            archscale.tuning.Run(rate, seed, math.log(rate) ** 2 + 1 if rate < limit else math.inf)
            for rate in np.geomspace(0.01, 10, 16).tolist()
            for seed in (0, 1)
        )

    group = study.Group({1: search(20), 2: search(0.1)}, {})
    (line,) = study.answer({("resnet_depth", "standard"): group})
    assert line.endswith("; depth 2 diverges at it.")


def test_studies_that_are_not_there_raise():
    settings = {"dataset": "digits", "batch_size": 8, "steps": 2, "num_seeds": 1, "size": []}
    with pytest.raises(ValueError, match="unknown study 'dags'; accepted are resnet_depth"):
        study.all_trials(["dags"], settings)
    with pytest.raises(ValueError, match="size must hold two different sizes at least"):
        study.all_trials(["resnet_depth"], settings | {"size": ["4"]})


def test_families_are_what_their_depth_says():
    digits = datasets.load("digits")
    for family in families.FAMILIES:
        for depth in (1, 3):
            model = families.create_network(family, digits, 8, depth, abstract=True)
            graph = model.architecture.graph
            additions = len(residual_branches(graph))
            found = archscale.path_statistics(graph)
            if family == "resnet":  # (1 + X²)ⁿ
                assert (additions, found.count, found.max_depth) == (depth, 2**depth, 2 * depth)
            elif family == "transformer":  # ((1 + 3X²)(1 + X²))ⁿ
                assert (additions, found.count, found.max_depth) == (
                    2 * depth, 8**depth, 4 * depth
                )  # fmt: skip
            else:
                assert (additions, found.count, found.max_depth) == (0, 1, depth)
    with pytest.raises(ValueError, match="unknown family 'rnn'"):
        families.create_network("rnn", digits, 8, 1)


def test_the_network_is_what_it_is_written_to_be():
    """x + W₂ σ(W₁ σ(x)) with 1×1 images, on which a convolution is the middle of its kernel."""
    digits = datasets.downscale(datasets.load("digits"), 8)
    model = families.create_network("resnet", digits, 4, 2)
    images = digits.train_images[:3]
    found = model.apply(model.params, images)
    leaves = named_leaves(model.params)

    def layer(name, features):
        return features @ np.asarray(leaves[f"{name}/kernel"])[1, 1] + leaves[f"{name}/bias"]

    features = layer("stem", np.asarray(images)[:, 0, 0])
    for block in range(2):
        inner = layer(f"blocks/{block}/0", np.maximum(features, 0))
        features = features + layer(f"blocks/{block}/1", np.maximum(inner, 0))
    expected = np.maximum(features, 0) @ leaves["readout/kernel"] + leaves["readout/bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_predictions_and_errors_of_known_searches():
    """Parabolas whose minimum moves by known factors."""
    settings = {"dataset": "digits", "batch_size": 8, "steps": 2, "num_seeds": 2, "size": [1, 4]}
    trials = study.all_trials(["resnet_depth"], settings)
    best = {1: 0.1, 4: 0.05}

    def result(trial):
        rates = np.geomspace(1e-3, 10, 33).tolist()
        losses = [1 + math.log(rate / best[trial["depth"]]) ** 2 for rate in rates]
        runs = [[r, seed, loss] for r, loss in zip(rates, losses, strict=True) for seed in (0, 1)]
        return {"runs": runs}

    def measurement(trial):
        size = [[(0.1 / best[trial["depth"]]) ** 2, 0.5]]
        return dict.fromkeys(archscale.tuning.UpdateSize._fields, size * 2)

    records = {
        "results": {trial_hash(trial): result(trial) for trial in trials},
        "measurements": {trial_hash(trial): measurement(trial) for trial in trials},
    }
    groups = study.grouped(trials, records)
    group = groups["resnet_depth", "initialized"]
    assert {size: one.rate for size, one in group.searches.items()} == pytest.approx(best, rel=1e-3)
    assert group.predicted["standardized_update"][4] == pytest.approx(0.05, rel=1e-3)
    assert group.predicted["none"][4] == pytest.approx(0.1, rel=1e-3)
    assert group.predicted["effective_depth"][4] == pytest.approx(
        0.1 * (3 / 6) ** 1.5,
        rel=1e-3,  # additions, stem and readout
    )
    assert list(groups["resnet_depth", "factors"].predicted) == ["none"]
    rows = {(row[1], row[4]): row for row in study.table(groups).itertuples(index=False)}
    assert rows["initialized", "standardized_update"][5] == "0.00"
    assert float(rows["initialized", "standardized_update"][6].rstrip("%")) == pytest.approx(
        0, abs=1
    )
    assert rows["factors", "none"][5] == f"{math.log(2):.2f}"
    worst = float(rows["factors", "none"][6].rstrip("%"))
    assert worst == pytest.approx(100 * math.log(2) ** 2, abs=4)  # between rates of the grid


def test_a_network_is_searched_and_measured(monkeypatch):
    monkeypatch.setitem(networks.RATES, "sgd", (0.05, 0.2))
    settings = {"dataset": "digits", "batch_size": 8, "steps": 2, "num_seeds": 1, "size": [1, 2]}
    trial = next(
        one
        for one in study.all_trials(["resnet_depth"], settings)
        if one["parametrization"] == "factors" and one["depth"] == 2
    )
    found = study.search_rate(trial)
    assert len(found["runs"]) == 3 and found["rate"] > 0
    measured = study.measure(trial)
    assert set(measured) == set(archscale.tuning.UpdateSize._fields)
    assert np.shape(measured["absolute"]) == (1, 5)  # stem, and two vertices a block
    assert np.all(np.isfinite(measured["standardized"]))


@pytest.mark.parametrize("parametrization", ["standard", "initialized", "factors"])
def test_an_update_is_scaled_as_the_parametrization_says(parametrization):
    settings = {"dataset": "digits", "batch_size": 8, "steps": 2, "num_seeds": 1, "size": [1, 4]}
    trial = next(
        one
        for one in study.all_trials(["resnet_depth"], settings)
        if one["parametrization"] == parametrization and one["depth"] == 4
    )
    network = study.build(trial)
    optimizer, params = network.optimizer(1.0), network.draw(0)
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    found = named_leaves(updates)
    ends = {"blocks/0/1/kernel": -0.25 if parametrization == "factors" else -1.0}
    for name, value in {"stem/kernel": -1.0, "blocks/0/0/kernel": -1.0, **ends}.items():
        np.testing.assert_allclose(found[name], value)


def fewer_digits_and_smaller_networks():
    digits = datasets.load("digits")
    few = dataclasses.replace(
        digits, train_images=digits.train_images[:64], train_labels=digits.train_labels[:64]
    )
    default_networks.load = lambda name: few
    graph = default_networks.FAMILIES["graph"]
    default_networks.FAMILIES["graph"] = graph._replace(base=(1, 8))


def test_the_study_of_defaults_compares_at_three_sizes_and_goes_on(tmp_path, run_again):
    flags = ("--family=graph", "--steps=20", "--num_seeds=1", "--growth=2", "--quiet")
    done = run_again("defaults", tmp_path, *flags, prepare=fewer_digits_and_smaller_networks)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines()]
    assert [row[1].strip() for row in rows[-3:]] == ["base", "deep", "wide"]
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert done.stdout.startswith("The plan is worse than the framework's own best on ")
    assert (tmp_path / "report.html").exists() and (tmp_path / "config.json").exists()
    trained = files.read_records(tmp_path / "results.jsonl")
    losses: dict[str, dict[float, float]] = {"base": {}, "deep": {}, "wide": {}}
    for trial, result in ((one["trial"], one["result"]) for one in trained):
        if trial["method"] == "plan":
            losses[trial["size"]][trial["rate"]] = result["loss"]
    # Large networks are trained once, at the rate that was best for the small one.
    best = min(losses["base"], key=losses["base"].__getitem__)
    assert losses["deep"].keys() == losses["wide"].keys() == {best}
    kept = (tmp_path / "results.jsonl").read_bytes()
    again = run_again("defaults", tmp_path, *flags, prepare=fewer_digits_and_smaller_networks)
    assert again.stdout == done.stdout
    assert (tmp_path / "results.jsonl").read_bytes() == kept


def test_the_answer_of_defaults_counts_where_the_plan_is_worse():
    names = ("family", "size", "best", "best_rate", "transferred", "plan", "plan_rate")
    rows = [
        ("graph", "base", 1.0, 0.1, 1.0, 0.9, 0.1),
        ("graph", "deep", 1.0, 0.1, 2.0, 1.5, 0.1),
        ("graph", "wide", 1.0, 0.1, 1.05, 1.1, 0.1),
        ("resnet", "base", 1.0, 0.1, 1.0, 1.0, 0.1),
        ("resnet", "deep", 2.0, 0.1, math.inf, 1.0, 0.1),
        ("resnet", "wide", 2.0, 0.1, 2.0, 1.0, 0.1),
    ]
    results = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    assert defaults.answer(results, 3) == [
        "The plan is worse than the framework's own best on 0 of 2 networks at base size.",
        "The plan is worse than the framework's own best on 2 of 4 networks grown, by 50.0% at "
        "most (graph, deep); than its start at the base's rate on 1.",
        "Losses are means over 3 seeds; small differences may be noise.",
    ]
    shown = defaults.table(results).to_dict("records")[4]
    assert (shown["at its base rate"], shown["plan"]) == ("diverged", "1")
    assert (shown["against best, %"], shown["against base rate, %"]) == ("-50.0", "-100.0")
    diverged = results.assign(plan=math.inf)
    assert "by divergence at most (graph, base)" in defaults.answer(diverged, 1)[0]
