"""The GradInit study as users run it, its networks, and the tables it makes of its results."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import archscale_jax as archscale
from experiments import gradinit_study
from experiments.gradinit_study import NETWORKS
from experiments.lab import datasets, files
from tests.binaries import imported

gradinit = imported("gradinit")

pytestmark = pytest.mark.quick_compilation

TINY = ("--dataset=digits", "--images_downscale=1", "--images_width=2", "--batch_size=8",
        "--steps=4", "--gradinit_steps=2", "--test_examples=20", "--network=plain_2")  # fmt: skip


def few_trainings():
    starts: Any = gradinit_study.DEFAULT_STARTS
    starts["plain"] = ("he",)
    rates: Any = gradinit_study.RATES
    rates["sgd"] = rates["sgd"][-2:]
    gradinit_study.MEASURED_BATCHES = 2


def test_the_binary_learns_trains_prints_draws_and_goes_on(tmp_path, run_again):
    done = run_again("gradinit", tmp_path, *TINY, "--num_seeds=1", prepare=few_trainings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() in done.stdout
    said = done.stdout.splitlines()
    assert said[0].startswith("gradinit helps on ") and " of 1 starts of networks: " in said[0]
    assert said[2] == "Of one seed, as here, noise alone lets a loss fall or rise."
    for name in ("success", "curves", "multipliers", "gradients"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<svg") == 4
    records = files.read_records(tmp_path / "results.jsonl")
    methods = {(one["trial"]["start"], one["trial"]["learned"]) for one in records}
    assert methods == {("he", how) for how in ("none", "gradinit", "nio")}

    # The multipliers, from the file, are those of the library's own function.
    trial = next(one["trial"] for one in records if one["trial"]["learned"] == "gradinit")
    network = gradinit_study.build("plain_2", "digits", None, 1, 2)
    params, record = gradinit_study.learn(
        network, gradinit_study.draw(network, trial["start"], trial["seed"]), trial
    )
    saved = json.loads((tmp_path / "multipliers.json").read_text())
    found = next(
        one["multipliers"]
        for one in saved.values()
        if one["start"] == trial["start"] and one["seed"] == trial["seed"]
    )
    for name, values in record.multipliers.items():
        np.testing.assert_allclose(found[name], values[-1], rtol=1e-5)
    assert jax.tree.structure(params) == jax.tree.structure(network.draw(0))

    written = (tmp_path / "results.jsonl").read_text()
    again = run_again("gradinit", tmp_path, *TINY, "--num_seeds=1", prepare=few_trainings)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results.jsonl").read_text() == written
    assert again.stdout.splitlines()[0] == said[0]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--network=plain_x",), "network 'plain_x'; accepted are FAMILY_DEPTH"),
        (("--network=rnn_3",), "the families plain, residual, dag, transformer"),
        (("--batch_size=7",), "batch_size must be even, found 7"),
        (("--scale_rate=0",), "--scale_rate=0: accepted is a number above 0"),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, run_again, flags, match):
    done = run_again("gradinit", tmp_path, *TINY, *flags)
    assert done.returncode != 0
    assert match in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["plain_2", "plain_2_norm", "residual_4", "dag_3", "transformer_1"]
)
def test_networks_trace_and_start_as_their_rule_says(name):
    parsed = gradinit_study.parse_name(name)
    network = NETWORKS[parsed.family](
        (14, 14, 1), 8, parsed.depth, 10, parsed.normalized, rngs=nnx.Rngs(0)
    )
    graphdef, params, state = nnx.split(network, nnx.Param, ...)

    def apply(params, images):
        return nnx.merge(graphdef, params, state, copy=True)(images, train=True)

    images = jax.random.normal(jax.random.key(0), (16, 14, 14, 1))
    architecture = archscale.trace(apply, params, images)
    rule = "target_in_degree" if parsed.family in ("plain", "dag") else "second_moment"
    params = archscale.initialize(jax.random.key(1), params, architecture, rule)
    logits = apply(params, images)
    assert logits.shape == (16, 10)
    assert 0 < float(jnp.std(logits)) < 1  # mean-field output
    other = (archscale.Role.BIAS, archscale.Role.SCALE)
    kernels = [one for one in architecture.parameters if one.role not in other]
    assert (
        len(kernels)
        == {
            "plain_2": 2 + 1,
            "plain_2_norm": 2 + 1,
            "residual_4": 1 + 2 * 4 + 1,
            "dag_3": 1 + 6 + 1,
            "transformer_1": 1 + 1 + 6 + 1,  # and positions
        }[name]
    )


def test_halves_give_every_example_once_an_epoch():
    digits = datasets.load("digits")
    count = len(digits.train_images) // 100
    batches = gradinit_study.halves(digits, 100, seed=3)
    epochs = [[next(batches)[0] for _ in range(count)] for _ in range(2)]
    for epoch in epochs:
        flat = np.concatenate(epoch).reshape(100 * count, -1)
        assert len(np.unique(flat, axis=0)) == len(flat)
    assert not np.array_equal(epochs[0][0], epochs[1][0])


def record(network, start, learned, seed, losses, accuracy=0.5, measured=1.0):
    """A record whose runs end with the losses given by rate."""
    return {
        "trial": {"network": network, "start": start, "learned": learned, "seed": seed},
        "result": {
            "runs": [
                {
                    "rate": rate,
                    "losses": [3.0, loss, loss],
                    "accuracy": None if loss is None else accuracy,
                }
                for rate, loss in losses.items()
            ],
            "measured": {
                name: [measured, measured] for name in archscale.tuning.UpdateSize._fields
            },
        },
    }


def test_tables_of_known_records():
    records = [
        record("plain_6", "he", "none", 0, {0.1: 1.0, 0.2: 0.5, 0.4: 1.0}),
        *(
            record("plain_12", "he", "none", s, {0.1: 2.0, 0.2: 1.0 + s, 0.4: None}, measured=4.0)
            for s in (0, 1)
        ),
        *(
            record("plain_12", "he", "gradinit", s, {0.1: 1.0, 0.2: 0.5, 0.4: 1.2}, 0.75)
            for s in (0, 1)
        ),
        {"trial": {}, "error": "ValueError: something"},
    ]
    methods = gradinit.methods(records)
    plain, learned = (methods["plain_12", "he", how] for how in ("none", "gradinit"))
    assert gradinit.best_rate(plain) == gradinit.best_rate(learned) == 0.2
    assert gradinit.trained_rates(plain) == []  # one seed ends at 2.0
    assert gradinit.trained_rates(learned) == [0.1, 0.2, 0.4]
    # Four times the change needs half the rate: sizes are squares.
    base = methods["plain_6", "he", "none"].search.rate
    predicted = gradinit.predicted_rate(plain, methods)
    assert predicted is not None
    np.testing.assert_allclose(predicted, base / 2, rtol=1e-6)
    rows = {tuple(row[:3]): row for row in gradinit.table(methods).values.tolist()}
    assert rows["plain_12", "he", "yes"][3:7] == ["0.2", "0.500 ± 0.000", "75.0 ± 0.0 %",
                                                 "0.1 to 0.4"]  # fmt: skip
    assert rows["plain_6", "he", "–"][7] == "–"
    gains = gradinit.gains(methods).values.tolist()
    assert gains[0] == ["plain_12", "he", "gradinit", "-1.000 (-1.500 to -0.500)",
                        "+25.0 (+25.0 to +25.0)", "0 → 3", "+0.500 → +0.000"]  # fmt: skip
    assert len(gains) == 1
    assert gradinit.answer(methods) == [
        "gradinit helps on 1 of 1 starts of networks: the final loss at the best rate falls with "
        "every seed; on 0 it rises with every seed. The median change is -1.000 nats."
    ]
    assert gradinit.by_network(methods)
    assert not gradinit.by_network({("plain_6", "he", "none"): plain})


def test_the_answer_counts_what_every_seed_agrees_on():
    """One start that falls, one that rises, and one of which seeds disagree."""
    ends = {"plain_4": (0.5, 0.6), "plain_5": (1.5, 1.25), "plain_7": (0.5, 1.75)}
    records = []
    for network, losses in ends.items():
        for seed, new in enumerate(losses):
            records.append(record(network, "he", "none", seed, {0.1: 1.0, 0.2: 2.0}))
            records.append(record(network, "he", "nio", seed, {0.1: new, 0.2: new}))
    (line,) = gradinit.answer(gradinit.methods(records))
    assert line == (
        "nio helps on 1 of 3 starts of networks: the final loss at the best rate falls with every "
        "seed; on 1 it rises with every seed. The median change is +0.125 nats."
    )


def test_variants_are_trials_of_their_networks():
    settings = dict.fromkeys(gradinit_study.SHARED, 2) | {"num_seeds": 3}
    settings |= {
        f"{kind}_{key}": 1 for kind in ("images", "patches") for key in ("width", "downscale")
    }
    settings |= {"learned": list(gradinit_study.LEARNED)}
    trials = gradinit_study.all_trials(["plain_12", "transformer_6", "plain_6"], settings)
    learned = {
        name: {one["learned"] for one in trials if one["network"] == name}
        for name in ("plain_12", "transformer_6", "plain_6")
    }
    assert {one["start"] for one in trials if one["network"] == "plain_12"} == {"flax", "he"}
    assert learned["plain_12"] == set(gradinit_study.LEARNED)
    assert learned["transformer_6"] == set(gradinit_study.LEARNED) - {"second_order"}
    assert learned["plain_6"] == {"none"}
