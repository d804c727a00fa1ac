"""The audit: faults are found and named, and set-ups that are right give no finding.

`python -m benchmarks.audit` does the same for all networks, optimizers and faults.
"""

import itertools
import json
import math
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import archscale_jax as archscale
from archscale_jax._auditing.findings import Finding, grouped, text_of
from archscale_jax._auditing.judge import causes_of, judged
from archscale_jax._auditing.kinds import Kind, kind_of, rate_of
from archscale_jax._auditing.probe import Probes, Vectors, ask, compiled, matrix_probe
from archscale_jax._trees import named_leaves
from archscale_jax.rules._matrix import Matrix
from archscale_jax.rules._registry import Explained, Part
from archscale_jax.tracing.constants import constants_behind
from archscale_jax.tracing.losses import factor_of, squared_leaves
from experiments.lab import files
from tests import audit_faults, audit_guesses
from tests.audit_networks import drawn, loss_of, network, plan_of, setup

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.quick_compilation

PLACES = {
    "adamw": ("multipliers_before_adam", "decay_through_adam", "masked_leaf",
              "updates_accumulated", "large_epsilon", "zero_where_the_plan_draws", "detached_leaf",
              "decay_behind_the_rate", "penalty_in_the_loss", "trust_ratio",
              "readout_multiplied_in_the_loss_too", "loss_divided_by_accumulated_batches"),
    "sgd": ("wrong_rate_of_one_leaf", "decay_of_gains_and_biases", "schedule_from_zero",
            "weights_of_the_framework", "not_a_number", "another_optimizer",
            "inputs_that_are_not_normalized", "scaled_loss", "stale_base"),
    "muon": ("muon_of_tables_and_readouts", "multipliers_twice",
             "updates_clipped_instead_of_gradients"),
}  # fmt: skip
FAULTS = [("mlp", optimizer, fault) for optimizer, faults in PLACES.items() for fault in faults]
FAULTS += [
    ("decoder", "adamw", "multipliers_of_the_model_left_out"),
    ("decoder", "muon", "muon_of_transposed_kernels"),
]
RIGHTS = [
    ("mlp", "adamw", "accumulated"),
    ("mlp", "sgd", "guarded_and_clipped"),
    ("mlp", "adamw", "half_a_masked_mean"),
    ("mlp", "muon", "other_options"),
    ("mlp", "adamw", "half_precision"),
    ("mlp", "adamw", "masked"),
    ("mlp", "muon", "clipped_relative_to_weights"),
]


@pytest.mark.parametrize(("name", "optimizer", "fault"), FAULTS)
def test_faults_are_found_and_named(name, optimizer, fault):
    made = audit_faults.FAULTS[fault].make(name, optimizer)
    assert made is not None
    setup, wrong = made
    audit = archscale.audit(*setup)
    kinds = audit_faults.FAULTS[fault].kinds
    assert {one.parameter for one in audit.findings if one.kind in kinds} == wrong
    with pytest.raises(AssertionError, match="|".join(kinds)):
        audit.assert_ok()


@pytest.mark.parametrize(("name", "optimizer", "right"), RIGHTS)
def test_right_set_ups_give_no_finding(name, optimizer, right):
    made = audit_faults.RIGHT[right](name, optimizer)
    assert made is not None
    audit = archscale.audit(*made)
    audit.assert_ok()
    assert not audit.notes
    for one in audit.records:
        rate = one["learning_rate"]
        assert rate == pytest.approx(one["learning_rate_promised"], rel=0.1)
        assert one["relative_update"] > 0


# The parts.


def matrix_response(name: str, shape: tuple[int, ...], matrix: Matrix | None, tx: Any) -> Any:
    """The answers of a chain on one leaf."""
    params = {name: jnp.ones(shape)}
    probes = Probes(params, {name: matrix_probe(shape, matrix)})
    return ask(compiled(tx, params, params), probes)


@pytest.mark.parametrize(
    ("tx", "kind"),
    [
        (optax.sgd(0.1, momentum=0.9), Kind.SGD),
        (optax.chain(optax.clip(1e-3), optax.sgd(0.1)), Kind.SGD),
        (optax.adam(0.1), Kind.ADAM),
        (optax.lion(0.1), Kind.ADAM),
        (optax.rmsprop(0.1), Kind.ADAM),
        (optax.adam(0.1, eps=1e-2), Kind.ADAM),
        (optax.contrib.muon(0.1), Kind.MUON),
        (optax.chain(optax.clip(1.0), optax.contrib.muon(0.1)), Kind.MUON),
        (optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)), Kind.NORMALIZED),
        (optax.set_to_zero(), None),
    ],
)
def test_kinds_of_updates(tx, kind):
    answers = matrix_response("w", (6, 9), None, tx)
    if kind is None:
        assert answers.first == 0
        return
    assert kind_of(answers, "w", 4, kind) == kind
    if kind in (Kind.SGD, Kind.ADAM):
        assert rate_of(answers, "w", kind) == pytest.approx(rate_of_one_step(tx, kind), rel=0.02)


def rate_of_one_step(tx: Any, kind: Kind) -> float:
    """The rate of one step, with a gradient of one entry."""
    gradient = {"w": jnp.asarray([1e-4 if kind == Kind.SGD else 1e3])}
    zeros = {"w": jnp.zeros(1)}
    updates, _ = tx.update(gradient, tx.init(zeros), zeros)
    return abs(float(updates["w"][0])) / (1e-4 if kind == Kind.SGD else 1)


def test_clipping_unit_by_unit_does_not_turn_what_muon_is_judged_by():
    muon, shape = optax.contrib.muon(0.1), (400, 30)
    clipped = optax.chain(optax.adaptive_grad_clip(0.01), muon)
    plain, found = (matrix_response("w", shape, None, tx) for tx in (muon, clipped))
    assert kind_of(found, "w", 4, Kind.MUON) == Kind.MUON
    rates = (rate_of(answers, "w", Kind.MUON) for answers in (plain, found))
    assert next(rates) == pytest.approx(next(rates), rel=1e-3)


def test_calls_that_move_nothing_are_counted():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    chains = {
        (1, 1): optax.sgd(0.1),
        (2, 1): optax.sgd(schedule),
        (3, 3): optax.MultiSteps(optax.sgd(0.1), 3),
        (6, 3): optax.MultiSteps(optax.sgd(schedule), 3),
    }
    for (first, period), tx in chains.items():
        answers = matrix_response("w", (3, 4), None, tx)
        assert (answers.first, answers.period) == (first, period)


def test_probes_are_of_rank_two_in_every_matrix():
    shape, matrix = (3, 8, 2, 5), Matrix((1,), (2, 3))
    gradient = np.asarray(Vectors.drawn("w", shape, matrix).gradient())
    values = np.linalg.svd(gradient.reshape(3, 8, 10), compute_uv=False)
    assert np.all(values[:, 2] < 1e-5 * values[:, 0])
    np.testing.assert_allclose(values[:, 1] / values[:, 0], 0.25, rtol=1e-4)


def test_constants_behind_a_layer():
    def apply(params, x):
        y = 3 * jax.nn.relu(x @ params["up"])
        return (y @ params["down"]).reshape(-1, 5) / 4

    def loss(params, x):
        return jnp.mean(jax.nn.logsumexp(0.5 * apply(params, x), -1)) / 7

    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 5))}
    for function, expected in ((apply, 0.25), (loss, 0.125)):
        found = constants_behind(function, params, (jnp.ones((2, 4)),), ("down", "up"))
        assert found == {"down": {expected}, "up": {1.0}}


def test_what_a_loss_is_multiplied_by_and_squares():
    def loss(params, x):
        return jnp.mean(jax.nn.relu(x @ params["w"]) ** 2)

    params, x = {"w": jnp.ones((3, 4)), "v": jnp.ones(4)}, jnp.ones((5, 3))
    half = lambda params, x: jax.jit(loss)(params, x) / 2  # noqa: E731
    total = lambda params, x: jnp.sum(x @ params["w"])  # noqa: E731
    penalized = lambda params, x: 3 * loss(params, x) + jnp.sum(params["v"].ravel() ** 2)  # noqa: E731
    for function, factor, squared in (
        (loss, 1, set()), (half, 0.5, set()), (total, 1, set()), (penalized, 3, {"v"}),
        (lambda params, x: optax.tree.norm(params) + loss(params, x), 1, {"w", "v"}),
    ):  # fmt: skip
        assert factor_of(function, params, x) == pytest.approx(factor)
        assert squared_leaves(function, params, x) == squared


def test_states_that_hold_params_are_not_given_away():
    one = setup("mlp", "adamw")
    tx = optax.contrib.schedule_free(one.optimizer, 1e-2)
    archscale.audit(*one._replace(optimizer=tx))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(one.params))


def test_multipliers_are_judged_up_to_a_constant():
    promised = {"a": 1.0, "b": 0.25, "c": 0.5, "d": 0.125}
    explained = {
        "a": Explained(1.0, (Part(1.0, "width"),)),
        "b": Explained(0.25, (Part(0.25, "width"),)),
        "c": Explained(0.5, (Part(0.5, "depth"),)),
        "d": Explained(0.125, (Part(0.25, "width"), Part(0.5, "depth"))),
    }
    causes = causes_of(explained)
    right = {name: 7 * value for name, value in promised.items()}
    assert judged(right, promised, causes, 0.05).wrong == {}
    assert judged(right, promised, causes, 0.05).scale == pytest.approx(7)
    one = judged({**right, "c": 10.0}, promised, causes, 0.05)
    assert (set(one.wrong), one.cause) == ({"c"}, None)
    assert one.wrong["c"] == pytest.approx(10 / 7)
    none = judged(dict.fromkeys(promised, 2.0), promised, causes, 0.05)
    assert (set(none.wrong), none.cause) == ({"b", "c", "d"}, "no multiplier is applied")
    twice = {name: value**2 for name, value in promised.items()}
    assert "twice" in str(judged(twice, promised, causes, 0.05).cause)
    flat = {"a": 1.0, "b": 0.25, "c": 1.0, "d": 0.25}
    found = judged(flat, promised, causes, 0.05)
    assert (set(found.wrong), found.cause) == ({"c", "d"}, "the multipliers of depth are left out")


# What else it takes and says.


def test_without_a_plan_it_says_what_a_set_up_looks_like():
    one = setup("mlp", "adamw")
    audit = archscale.audit(None, *one[1:])
    assert not audit.findings
    assert audit.notes[0].startswith("looks like μP by rates, relative to a base 4 times narrower")
    looks = {record["path"]: record["looks_like"] for record in audit.records}
    assert looks["first/w"].startswith("μP: × 0.25")
    assert looks["stem/w"] == "one rate"
    plain = archscale.audit(None, optax.adamw(0.1), *one[2:])
    assert plain.notes[0].startswith("looks like the standard parametrization")


WITHOUT_PLAN = {
    "not_a_number": "gradient",
    "summed_loss": "loss",
    "masked_leaf": "direction",
    "schedule_from_zero": "schedule",
}


@pytest.mark.parametrize("fault", WITHOUT_PLAN)
def test_without_a_plan_it_finds_what_is_wrong_whatever_the_plan(fault):
    made = audit_faults.FAULTS[fault].make("mlp", "adamw")
    assert made is not None
    found = archscale.audit(None, *made[0][1:]).findings
    assert {one.kind for one in found} == {WITHOUT_PLAN[fault]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_is_a_finding_where_less_than_a_tenth_passes(optimizer):
    plan, tx, loss_fn, params, batch = setup("mlp", optimizer)
    gradient = lambda *given: optax.tree.norm(jax.grad(loss_fn)(*given))  # noqa: E731
    norm = float(jax.jit(gradient)(params, batch))
    for part, kinds in ((0.09, ["clipping"]), (0.12, [])):
        clipped = optax.chain(optax.clip_by_global_norm(part * norm), tx)
        found = archscale.audit(plan, clipped, loss_fn, params, batch).findings
        assert [one.kind for one in found] == kinds, part


LOOKS = {
    ("resnet", "completep", "adam"): "looks like μP with a readout that is multiplied in the model",
    ("decoder", "mup", "adam"): "looks like μP by rates, relative to a base 4 times narrower",
    ("decoder", "fan_in", "adam"): "looks like rates in proportion to 1/fan-in",
    ("decoder", "muon", "muon"): "looks like Muon for 2 matrices: at any width one spectral norm",
    ("decoder", "standard", "sgd"): "looks like the standard parametrization",
    ("decoder", "plan", "adam"): "looks like μP by rates, relative to a base 4 times narrower; × "
    "0.5 of that for layers/down, as rules of depth may have it",
    ("resnet", "mup", "sgd"): "looks like μP by rates, relative to a base 4 times narrower",
}
NOT_TOLD = {
    ("decoder", "standard", "sgd"): "one network does not tell this from μP at its own base",
    ("resnet", "completep", "adam"): "rates do not show whether the model multiplies its readout",
    ("resnet", "mup", "sgd"): "all hidden weights have 288 inputs: one network does not tell",
    ("decoder", "plan", "adam"): "one network does not tell multipliers of width from those of "
    "depth",
}


@pytest.mark.parametrize(("name", "how", "optimizer"), LOOKS)
def test_what_set_ups_by_hand_look_like_and_what_they_do_not_tell(name, how, optimizer):
    audit = archscale.audit(None, *audit_guesses.setup(name, how, optimizer))
    assert audit.notes[0].startswith(LOOKS[name, how, optimizer])
    assert NOT_TOLD.get((name, how, optimizer), "") in str(audit.notes)
    rates = {record["path"]: record["learning_rate"] for record in audit.records}
    if how in ("mup", "completep", "fan_in", "standard"):
        architecture = audit_guesses.plan_of(name, optimizer).architecture
        applied = audit_guesses.by_tables(architecture, how, optimizer)
        unit = audit_guesses.WIDER if (how, optimizer) == ("mup", "sgd") else 1
        assert rates == pytest.approx({leaf: one / unit for leaf, one in applied.items()}, rel=0.05)


def test_a_large_plan_without_a_base_is_asked_about():
    setup, readers = audit_faults.missing_base("mlp", "sgd")  # type: ignore[misc]
    audit = archscale.audit(*setup)
    assert {one.parameter for one in audit.findings} == readers
    assert not archscale.audit(*setup, tuned_here=True).findings


def test_what_is_meant_is_accepted():
    made = audit_faults.frozen_leaf("mlp", "sgd")
    assert made is not None
    audit = archscale.audit(*made[0])
    assert {(one.kind, one.parameter) for one in audit.findings} == {
        ("frozen", leaf) for leaf in made[1]
    }
    audit.assert_ok(accept=("frozen",))


def test_text_and_html_say_what_to_do():
    made = audit_faults.no_multipliers("mlp", "adamw")
    assert made is not None
    audit = archscale.audit(*made[0])
    text = str(audit)
    assert "rate: first/w, readout/w, second/w" in text
    assert "as if no multiplier is applied" in text
    assert "plan.scale()" in text
    assert audit._repr_html_().count("<tr>") == 2
    assert max(map(len, text.splitlines())) <= 100
    assert {one["path"] for one in audit.records} == set(made[0].plan.architecture.shapes)


def test_the_figure_has_a_row_a_leaf_by_role_and_marks_what_is_wrong():
    made = audit_faults.decay_scaled_by_the_rate("decoder", "adamw")
    assert made is not None
    audit = archscale.audit(*made[0])
    rows = {row.name: row for row in audit.rows()}
    assert {row.name for row in rows.values() if row.kinds} == made[1]
    roles = [row.role for row in audit.rows()]
    assert len(list(itertools.groupby(roles))) == len(set(roles))
    decays = named_leaves(made[0].plan.weight_decay)
    for name, row in rows.items():
        assert row.ratios["learning rate"] == pytest.approx(1, rel=0.05)
        if decays[name]:  # what was applied is the rate's multiplier, without the decay's
            assert row.ratios["decay"] == pytest.approx(1 / decays[name], rel=0.05)
            assert row.ratios["initial deviation"] == pytest.approx(1, rel=0.1)
    svg = audit._repr_html_().partition("<svg")[2]
    assert all(f">{name}<" in svg for name in rows if len(name) < 32)
    assert svg.count("<circle") == 4 + sum(len(row.ratios) for row in rows.values())


def test_a_whole_equinox_model_and_frozen_parts_as_none():
    name, optimizer = "equinox", "adamw"
    plan, params = plan_of(name, optimizer), drawn(name, optimizer)
    model = eqx.combine(params, network(name).model(32))
    loss = loss_of(name, plan.apply)
    apply = lambda model, batch: loss(eqx.filter(model, eqx.is_array), batch)  # noqa: E731
    tx = plan.optimizer(1e-2, 0.1)
    archscale.audit(plan, tx, apply, model, network(name).batch).assert_ok()


def test_errors_say_what_is_accepted():
    one = setup("mlp", "sgd")
    with pytest.raises(TypeError, match="plan must be what archscale_jax.parametrize returns"):
        archscale.audit(one.plan.architecture, *one[1:])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be an optax transformation"):
        archscale.audit(one.plan, 0.1, *one[2:])
    with pytest.raises(TypeError, match="loss_fn must be a function .* found Gradient"):
        archscale.audit(one.plan, one.loss_fn, one.optimizer, one.params, one.batch)
    with pytest.raises(TypeError, match="params and batch are arrays"):
        shapes = jax.eval_shape(lambda: one.params)
        archscale.audit(*one[:3], shapes, one.batch)
    with pytest.raises(ValueError, match="params lack 'first/b'"):
        archscale.audit(*one[:3], {"stem": one.params["stem"]}, one.batch)


def test_features_of_sharded_params_are_measured_and_promised():
    one = setup("mlp", "adamw")
    mesh = jax.make_mesh((1,), ("data",))
    placed = NamedSharding(mesh, PartitionSpec())
    audit = archscale.audit(*one._replace(params=jax.device_put(one.params, placed)))
    audit.assert_ok()
    features = audit.features
    assert features.measured.keys() == features.promised.keys() == features.changes.keys()
    assert len(features.measured) == 3
    for vertex, measured in features.measured.items():
        assert abs(math.log(measured / features.promised[vertex])) < 1
        assert 0 < features.changes[vertex] < 1


def test_the_page_says_what_was_measured():
    """All faults were found, and no right set-up gave a finding."""
    record = json.loads((ROOT / "benchmarks" / "results" / "audit.json").read_text())["results"]
    page = " ".join((ROOT / "docs" / "audit.md").read_text().split())
    faults, rights = record["faults"].values(), record["right"].values()
    made, found, exact = (sum(one[key] for one in faults) for key in ("made", "found", "exact"))
    alarms = sum(len(one["false alarms"]) for one in rights)
    left = sum(record["not run"].values())
    assert set(record["faults"]) == set(audit_faults.FAULTS)
    assert set(record["right"]) == set(audit_faults.RIGHT)
    assert f"makes {len(audit_faults.FAULTS)} kinds of faults" in page
    assert (f"{left} of them are not run yet" in page) == ("not run yet" in page) == (left > 0)
    assert f"Of {made} faults {found} were found, {exact} of them" in page
    assert f"Of {sum(one['made'] for one in rights)} set-ups that are right" in page
    assert f"{alarms} give a finding" in page


def test_the_binary_audits_prints_and_ends_with_2_where_something_is_found(tmp_path, run_again):
    flags = ("--width=16", "--base_width=32", "--depth=1", "--batch_size=8", "--setup=standard")
    done = run_again("audit", tmp_path, *flags)
    assert done.returncode == 2, done.stderr
    assert "as if no multiplier is applied" in done.stdout
    assert "may have been swapped" in " ".join(done.stdout.split())
    assert "readout/kernel" in (tmp_path / "table.md").read_text()
    assert "readout/kernel" in (tmp_path / "leaves.svg").read_text()
    assert len(files.read_records(tmp_path / "results.jsonl")) == 6


def test_findings_that_differ_in_numbers_alone_are_one():
    both = [
        Finding("start", f"layer_{number}/w", f"× {size} of float32", "× 1", "larger", "redraw")
        for number, size in enumerate(("0.7", "1.9e-05"))
    ]
    text = text_of(both, [], "audit")
    assert "start: layer_{0,1}/w ×2" in text and "× 1.9e-05…0.7 of float32" in text
    assert len(grouped([*both, both[0]._replace(found="× 0.7 of float16")])) == 2
    means = [
        one._replace(found=f"mean of {m} in 1,0{m[1]}0")
        for one, m in zip(both, ("-2", "-3"), strict=True)
    ]
    assert "mean of -3…-2 in 1,020…1,030\n" in text_of(means, [], "audit")
