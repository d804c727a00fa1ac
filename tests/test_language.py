"""Language models: decoders, text, trainings that go on, and the study of their transfer."""

import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from archscale_jax._trees import named_leaves
from experiments import language_scaling
from experiments.lab import checkpoints, files, progress, sweeps
from experiments.lab.datasets import text as texts
from experiments.lab.models.decoder import Decoder, attend, rotate
from tests.binaries import imported

language_transfer = imported("language_transfer")  # it imports the others
language_study = imported("language_study")
language = imported("language")

pytestmark = pytest.mark.quick_compilation

SMALL = {"depth": 2, "width": 16, "base_depth": 2, "base_width": 16, "head_size": 4,
         "queries_per_key": 2, "context": 8, "batch_size": 4, "base_batch_size": 4, "steps": 20,
         "base_steps": 20, "kind": "llama", "tied": False, "optimizer": "adamw",
         "parametrization": "plan", "schedule": "cosine", "warmup": 0.1, "clip": 1.0,
         "validation_windows": 8, "rate": 0.01, "weight_decay": 0.1, "seed": 0}  # fmt: skip
KINDS = [("gpt2", False), ("llama", True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of 80 files, of which a few are held out."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    for number in range(80):
        words = random.choice(["def ", "return ", "x", " = ", "\n"], 40)
        (folder / f"{number}.py").write_text(f"# {number}\n" + "".join(words))
    return str(folder)


@pytest.fixture
def trial(folder):
    return SMALL | {"text": texts.load_text(folder).name}


class TestDecoder:
    @pytest.mark.parametrize(("kind", "tied"), KINDS)
    def test_later_bytes_do_not_move_earlier_logits(self, kind, tied):
        model = Decoder(kind, 2, 16, 4, 2, 8, tied)
        tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 256)
        params = jax.jit(model.init)(jax.random.key(1), tokens)
        apply = jax.jit(model.apply)
        logits = apply(params, tokens)
        moved = jnp.any(apply(params, tokens.at[:, 5].add(1) % 256) != logits, axis=(0, 2))
        assert logits.shape == (3, 8, 256)
        assert moved.tolist() == [False] * 5 + [True] * 3
        assert ("readout" in params["params"]) != tied

    def test_grouped_queries_attend_as_written_out(self):
        random = np.random.default_rng(0)
        q, k, v = (random.normal(size=(2, 5, heads, 4)) for heads in (6, 2, 2))
        found = np.asarray(attend(*map(jnp.asarray, (q, k, v))))
        for batch, token, head in np.ndindex(2, 5, 6):
            scores = [q[batch, token, head] @ k[batch, s, head // 3] / 2 for s in range(token + 1)]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            expected = sum(w * v[batch, s, head // 3] for s, w in enumerate(weights))
            np.testing.assert_allclose(found[batch, token, head], expected, rtol=1e-4, atol=1e-5)

    def test_rotary_positions_turn_complex_numbers(self):
        x = np.random.default_rng(0).normal(size=(2, 7, 3, 6))
        found = np.asarray(rotate(jnp.asarray(x)))
        for token in range(7):
            turns = np.exp(1j * token * 10_000.0 ** (-np.arange(3) / 3))
            turned = (x[:, token, :, :3] + 1j * x[:, token, :, 3:]) * turns
            expected = np.concatenate([turned.real, turned.imag], axis=-1)
            np.testing.assert_allclose(found[:, token], expected, rtol=1e-4, atol=1e-5)

    def test_stacked_blocks_are_the_unrolled_ones(self):
        model = Decoder("llama", 2, 16, 4, 2, 8)
        tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
        params = dict(jax.jit(model.init)(jax.random.key(1), tokens)["params"])
        stacked = params.pop("blocks")
        blocks = {f"block_{i}": jax.tree.map(lambda one, i=i: one[i], stacked) for i in range(2)}
        unrolled = jax.jit(model.clone(scan=False).apply)({"params": params | blocks}, tokens)
        scanned = jax.jit(model.apply)({"params": params | {"blocks": stacked}}, tokens)
        np.testing.assert_allclose(unrolled, scanned, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("kind", "tied"), KINDS)
    def test_a_plan_knows_every_leaf(self, kind, tied, trial):
        options = {"kind": kind, "tied": tied, "queries_per_key": 2 if kind == "llama" else 1}
        plan = language.plan_of(trial | options | {"depth": 4, "width": 32})
        shapes = jax.eval_shape(language.decoder(trial | options).init, jax.random.key(0),
                                jnp.zeros((1, 8), jnp.int32))  # fmt: skip
        assert set(named_leaves(shapes)) == {one.name for one in plan.architecture.parameters}
        found = {one.name: str(one.role) for one in plan.architecture.parameters}
        for name, role in found.items():
            layer, leaf = name.split("/")[-2:]
            expected = {"scale": "scale", "bias": "bias"}.get(leaf, "hidden")
            if layer in ("table", "positions"):
                expected = "embedding"
            if layer == "readout":
                expected = "readout"
            assert role == expected, name
        rates = named_leaves(plan.learning_rate)
        ends = [name for name in rates if name.endswith(("down/kernel", "out/kernel"))]
        inner = [name for name in rates if name.endswith(("query/kernel", "up/kernel"))]
        # m_N = 2 and m_L = 2, α = 1 [CompleteP]: 1/m_N inside of branches, 1/(m_N·m_L) at ends.
        assert {rates[name] for name in inner} == {0.5}
        assert {rates[name] for name in ends if "readout" not in name} == {0.25}
        assert rates["params/table/embedding"] == 1.0

    @pytest.mark.parametrize("method", ["plan", "standard"])
    def test_losses_start_at_that_of_guessing(self, method, trial):
        how = language.parametrized(trial | {"width": 64, "parametrization": method})
        tokens = jax.random.randint(jax.random.key(0), (32, 8), 0, 256)
        logits = jax.jit(how.apply)(jax.jit(how.init)(jax.random.key(1)), tokens)
        labels = jax.random.randint(jax.random.key(2), (32, 8), 0, 256)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        variance = float(jnp.var(logits))  # of independent normal logits the loss is so much more
        assert float(loss) == pytest.approx(math.log(256) + variance / 2, abs=0.15)
        assert variance < 1.5


class TestText:
    def test_held_out_files_are_not_trained_on(self, folder):
        found = texts._files(folder)
        train, validation = texts.split([*found, *found])
        assert len(validation) > 0 and len(train) + len(validation) == 160
        assert not set(train) & set(validation)
        text = texts.load_text(folder)
        for one in set(found):
            ends = one + b"\0"
            assert (ends in text.train.tobytes()) != (ends in text.validation.tobytes())

    def test_the_standard_library_is_there(self):
        text = texts.load_text("stdlib")
        assert len(text.train) > 10e6
        assert 0.02 < len(text.validation) / len(text.train) < 0.1
        assert b"import " in text.validation.tobytes()

    def test_another_text_is_an_error(self, folder, tmp_path):
        name = texts.load_text(folder).name
        assert texts.load_text(name).name == name
        with pytest.raises(ValueError, match="has the checksum .* here, and 00000000 where"):
            texts.load_text(f"{folder}#00000000")
        with pytest.raises(FileNotFoundError, match="no such folder"):
            texts.load_text(str(tmp_path / "nothing"))
        (tmp_path / "one.py").write_text("x = 1")
        with pytest.raises(ValueError, match="give more files"):
            texts.load_text(str(tmp_path))

    def test_windows_are_of_the_text(self):
        text = jnp.arange(50, dtype=jnp.uint8)
        rows = np.asarray(texts.random_windows(text, jax.random.key(0), 200, 10))
        assert (np.diff(rows) == 1).all()
        assert rows.min() == 0 and rows.max() == 49
        assert texts.even_windows(text, 3, 10)[:, 0].tolist() == [0, 20, 40]


class KilledError(Exception):
    """Ends a training in the middle."""


FLAGS = ["--depth=1", "--width=8", "--base_width=8", "--base_depth=1", "--head_size=4",
         "--context=8", "--batch_size=4", "--steps=4", "--validation_windows=8",
         "--quiet"]  # fmt: skip


class TestTraining:
    def test_one_that_was_cut_goes_on_with_the_same_losses(self, trial, tmp_path, monkeypatch):
        trial = trial | {"optimizer": "muon", "tied": True, "steps": 4}
        whole = language.train(trial, tmp_path / "whole")
        save, calls = checkpoints.save_checkpoint, []

        def cut(*args, **kwargs):
            save(*args, **kwargs)
            calls.append(args)
            if len(calls) == 2:
                raise KilledError

        monkeypatch.setattr(checkpoints, "save_checkpoint", cut)
        with pytest.raises(KilledError):
            language.train(trial, tmp_path / "cut")
        assert language.train(trial, tmp_path / "cut") == whole
        assert len(calls) == len(whole["steps"]) == 4

    def test_under_muon_what_adamw_has_may_have_a_rate_of_its_own(self, trial):
        trial = trial | {"optimizer": "muon"}
        options = ({}, {"adam_rate_ratio": 1.0}, {"adam_rate_ratio": 2.0})
        hows = [language.parametrized(trial | one) for one in options]
        params = jax.jit(hows[0].init)(jax.random.key(0))

        @jax.jit
        def updates(params):
            found = []
            for how in hows:
                tx = how.optimizer(optax.constant_schedule(0.01), 0.1)
                found.append(named_leaves(tx.update(params, tx.init(params), params)[0]))
            return found

        alone, alike, larger = updates(params)
        for name, leaf in alone.items():
            layer, kind = name.split("/")[-2:]
            ratio = 1.0 if kind == "kernel" and layer != "readout" else 2.0
            np.testing.assert_allclose(alike[name], leaf, rtol=1e-5)
            np.testing.assert_allclose(larger[name], ratio * leaf, rtol=1e-5)

    def test_losses_fall_and_are_those_of_blocks_computed_again(self, trial):
        once = language.train(trial)
        assert once["losses"][-1] < once["losses"][0] - 0.5
        again = language.train(trial, rematerialize=True)
        assert once["steps"] == again["steps"] and len(again["losses"]) > 1
        np.testing.assert_allclose(again["losses"], once["losses"], rtol=1e-5)
        assert again["validation"][-1] == pytest.approx(once["validation"][-1], rel=1e-5)

    def test_one_that_diverges_ends(self, trial):
        options = {"rate": 1e30, "parametrization": "standard"}
        found = language.train(trial | options)
        assert found["losses"][-1] is None
        assert found["steps"][-1] < 20

    def test_tells_how_far_it_is_where_it_takes_long(self, trial, monkeypatch):
        notes = []
        quiet = language.train(trial | {"steps": 4}, note=notes.append)
        assert not notes
        assert quiet["validation"][:-1] == [None] * 3  # where nothing is kept
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        found = language.train(trial | {"steps": 4}, note=notes.append)
        assert notes[-1].endswith(f", seed 0: update 3 of 4, loss {found['losses'][-2]:.4f}")

    def test_the_binary_trains_prints_draws_and_refuses_another_length(
        self, folder, tmp_path, run_again
    ):
        done = run_again("language", tmp_path / "run", *FLAGS, f"--text={folder}")
        assert done.returncode == 0, done.stderr
        (record,) = files.read_records(tmp_path / "run" / "results.jsonl")
        sizes = {name: record["trial"][name] for name in ("depth", "width", "context", "steps")}
        assert sizes == {"depth": 1, "width": 8, "context": 8, "steps": 4}
        assert (tmp_path / "run" / "report.html").exists()
        assert "held out" in done.stdout
        loss = record["result"]["validation"][-1]
        assert done.stdout.startswith(
            f"At rate 0.01 and weight decay 0.1, the held-out loss is {loss:.4f} nats a byte, "
            f"{loss / math.log(2):.3f} bits.\nOne seed: how far the loss scatters is not known.\n"
        )
        longer = run_again("language", tmp_path / "run", *FLAGS, f"--text={folder}", "--steps=8")
        assert longer.returncode == 1
        (line,) = longer.stderr.splitlines()
        assert line.startswith(f"error: {tmp_path / 'run'} holds a run with base_steps=4 (now 8)")
        assert "one of another length begins anew: warm-up and schedule spread over all" in line

    def test_the_answer_is_the_best_point_and_what_is_left_open(self):
        def record(rate, decay, seed, loss):
            trial = {"rate": rate, "weight_decay": decay, "seed": seed}
            return {"trial": trial, "result": {"validation": [5.0, loss]}}

        ends = {0.01: (2.5, 2.7), 0.02: (2.0, 2.2), 0.04: (1.0, None)}
        records = [
            record(rate, decay, seed, loss if decay == 0.1 or loss is None else loss + 0.1)
            for rate, losses in ends.items()
            for decay in (0.1, 0.2)
            for seed, loss in enumerate(losses)
        ]
        assert language.answer(records) == [
            "At rate 0.02 and weight decay 0.1, the best of 6 points, the held-out loss is 2.1000 "
            "nats a byte, 3.030 bits, ± 0.1414 nats from seed to seed.",
            "No smaller weight decay was tried; it may be better.",
        ]
        (first, edge, seed) = language.answer([record(0.1, 0.1, 0, 2.0), record(0.2, 0.1, 0, 1.0)])
        assert "rate 0.2" in first and edge == "No larger rate was tried; it may be better."
        assert seed == "One seed: how far the loss scatters is not known."
        diverged = [record(0.1, 0.1, 0, None)]
        assert language.answer(diverged) == ["The training diverged: take a smaller rate."]
        assert language.answer([*diverged, record(0.1, 0.1, 1, 2.0)]) == [
            "At every rate a training diverged: take smaller ones."
        ]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"width": 18}, "--width=18 holds 4.5 heads of --head_size=4; accepted are whole"),
            ({"base_width": 12}, "--base_width=12 holds 3 heads .* a multiple of --queries_per_k"),
            ({"head_size": 1}, "--head_size=1 is odd"),
            ({"context": 10**6}, "--context=1000000 exceeds the"),
        ],
    )
    def test_flags_that_do_not_fit_are_named(self, wrong, message, trial):
        with pytest.raises(ValueError, match=message):
            language.check(trial | wrong)

    def test_a_wrong_flag_ends_with_one_line(self, tmp_path, run_again):
        done = run_again("language", tmp_path / "x", "--kind=bert")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and "gpt2" in done.stderr
        assert not (tmp_path / "x").exists()
        done = run_again("language_transfer", tmp_path / "x", "--rate=0.1")
        assert "--rate has no effect here" in done.stderr and done.returncode == 1

    def test_a_larger_batch_follows_the_sde_rule(self, trial):
        plan = language.plan_of(trial | {"batch_size": 16, "steps": 5})
        assert plan.duration.batch_ratio == 4 and plan.duration.token_ratio == 1
        assert language.plan_of(trial).duration.kappa == 1

    def test_costs_are_those_of_every_block(self, trial):
        trial = trial | {"context": 32}
        trials = [trial | {"depth": depth} for depth in (1, 3)]
        trials.append(trials[-1] | {"rematerialize": True})
        lines = [[float(line.rpartition(" ")[2]) for line in language.cost(one)] for one in trials]
        parameters, _, flops, _, memory = zip(*lines, strict=True)
        # The products of attention, which have no parameters, come on top.
        blocks = 6 * (parameters[1] - parameters[0]) * 4 * 32
        assert blocks < flops[1] - flops[0] < 2 * blocks
        # Of three passes over a block, one is made again.
        assert parameters[2] == parameters[1]
        assert 1.1 < flops[2] / flops[1] < 4 / 3
        assert memory[2] < 0.7 * memory[1]


class TestTransfer:
    def test_searches_end_at_the_lowest_point(self):
        asked = []

        def measure(points):
            asked.extend(points)
            losses.update({p: [(p[0] - 2) ** 2 + (p[1] + 1) ** 2 + s for s in (0, 1)]
                           for p in points})  # fmt: skip

        losses = {}
        assert language_study.descend(measure, losses) == (2, -1)
        assert len(asked) == len(set(asked)) == len(losses)
        losses = {}
        language_study.bracket(measure, losses, (0, 0), (1, 0))
        assert sorted(losses) == [(step, 0) for step in range(-1, 4)]

    def test_the_vertex_of_a_parabola_is_found(self):
        losses = {(step, 0): [(step - 1.3) ** 2 + 3, (step - 0.9) ** 2] for step in range(-1, 4)}
        losses[1, 0].append(7.0)  # a seed that the others lack
        found = language_transfer.vertex(losses, (0, 0), (1, 0))
        assert found is not None and found.best == (1, 0)
        np.testing.assert_allclose(found.drift, np.log(2) * np.array([1.3, 0.9]))
        assert language_transfer.vertex({(0, 0): [1.0]}, (0, 0), (1, 0)) is None

    def test_the_best_is_that_of_all_seeds_where_its_neighbours_have_them(self):
        losses = {(-1, 0): [3.0, 3.0, 3.0], (0, 0): [2.2, 2.2, 0.7], (1, 0): [2.0, 2.0, 2.0],
                  (2, 0): [3.0, 3.0]}  # fmt: skip
        found = language_transfer.vertex(losses, (0, 0), (1, 0))
        assert found is not None and found.best == (0, 0) and len(found.drift) == 3
        del losses[-1, 0]
        found = language_transfer.vertex(losses, (0, 0), (1, 0))
        assert found is not None and found.best == (1, 0) and len(found.drift) == 2

    def test_the_table_says_what_the_base_values_give_up(self):
        study = language_study.Study.__new__(language_study.Study)
        parabola = {step: (step - 0.5) ** 2 for step in range(-3, 4)}
        study.best = {"plan": (1, 2), "standard": (0, 0)}
        study.losses = {
            ("plan", "base"): {(step + 1, 2): [2 + one] * 2 for step, one in parabola.items()},
            ("plan", "wide"): {(step, 2): [1 + one, 2 + one] for step, one in parabola.items()},
            ("decay_root", "wide"): {(1, 2): [1.25 * 1.02, 2.25 * 1.04]},
        }
        searched, other = language_transfer.target_table(study).to_dict("records")
        # The base's best lies at 1.5 octaves, that of the wider network at 0.5.
        assert searched["searched"] == "rate"
        assert searched["best: nats"] == f"{-math.log(2):.2f} ± 0.00"
        assert searched["given up, %"] == "0.00 ± 0.00"
        assert other["over parametrize, %"] == "3.00 ± 1.00"
        assert other["given up, %"] == other["best: nats"] == "–"

    def test_the_answer_is_where_the_best_rate_lies_and_what_the_base_gives_up(self, trial):
        study = language_study.Study.__new__(language_study.Study)
        study._settings = trial | {"depth": 4, "width": 32}
        parabola = {step: (step - 0.5) ** 2 for step in range(-3, 4)}
        study.best = {"plan": (1, 2), "standard": (0, 0)}
        study.losses = {
            ("plan", "base"): {(step + 1, 2): [2 + one] * 2 for step, one in parabola.items()},
            ("plan", "wide"): {(step, 2): [1 + one, 2 + one] for step, one in parabola.items()},
            ("plan", "target"): {(step - 1, 2): [1 + one] * 2 for step, one in parabola.items()},
            ("standard", "target"): {(0, 0): [2.0, 2.0], (1, 0): [1.0, 1.0]},
        }
        # The base's best lies at 1.5 octaves, that of the target at -0.5, where two rates tie.
        assert language_transfer.answer(study) == [
            "Under parametrize the rate that is best for 2 × 16 gives up 160.00 ± 0.00 % of loss "
            f"at 4 × 32, whose best lies {-2 * math.log(2):.2f} ± 0.00 nats from it.",
            "Under optax defaults the best rate at 4 × 32 is not known, as trainings beside it are "
            "missing; that of 2 × 16 gives up 100.00 ± 0.00 % of loss beside those that are there.",
        ]
        del study.losses["plan", "target"], study.losses["standard", "target"]
        wide, none = language_transfer.answer(study)
        assert " gives up 0.00 ± 0.00 % of loss at 2 × 32, whose best lies -0.69 ± 0.00" in wide
        assert none == "Under optax defaults no rate was searched at another size than the base."
        study.losses = {key: {point: one[:1] for point, one in found.items()}
                        for key, found in study.losses.items()}  # fmt: skip
        assert "One seed: how far these numbers scatter is not known." in (
            language_transfer.answer(study)
        )

    def test_nothing_finished_is_said_in_one_line(self, folder, tmp_path, run_again):
        flags = [*FLAGS, f"--text={folder}", "--num_seeds=2", "--only_finished"]
        done = run_again("language_transfer", tmp_path / "run", *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines() == [
            f"error: {tmp_path / 'run' / 'results.jsonl'} lacks 10 of the 10 trainings that the "
            "search of standard at base needs next; run the same command without --only_finished"
        ]

    def test_points_are_compared_on_the_seeds_that_they_share(self):
        assert language_study.lowest_of({"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0]}) == "a"

    def test_the_decay_of_a_plan_can_be_put_behind_it(self, trial, monkeypatch):
        """With its own multipliers it is the plan's optimizer; with 1 optax's in front of them."""
        plan = language.plan_of(trial | {"depth": 4, "width": 32})
        params = jax.jit(plan.init)(jax.random.key(0))
        # Far above epsilon, by which the two differ.
        gradients = jax.tree.map(lambda one: jnp.where(one < 0, -1.0, 1.0) + one, params)
        rate = optax.constant_schedule(0.01)

        def updates(*optimizers):
            @jax.jit
            def each(gradients, params):
                return [one.update(gradients, one.init(params), params)[0] for one in optimizers]

            return each(gradients, params)

        module = language_study
        before = module.with_decay(plan, "decay_before", 2.0)(rate, 0.3)
        scaled = optax.chain(
            optax.adamw(rate, weight_decay=0.3, mask=jax.tree.map(lambda one: one > 0,
                                                                  plan.weight_decay)),
            plan.scale(),
        )  # fmt: skip
        ours, expected = updates(before, scaled)
        _assert_close(ours, expected, 1e-5)
        monkeypatch.setattr(module, "decay_multipliers", lambda plan, *_: plan.weight_decay)
        own = module.with_decay(plan, "decay_root", 2.0)(rate, 0.3)
        ours, expected = updates(own, plan.optimizer(rate, 0.3))
        _assert_close(ours, expected, 1e-5)

    def test_the_root_of_the_width_is_in_the_decay(self, trial):
        plan = language.plan_of(trial | {"depth": 4, "width": 32})
        found = named_leaves(language_study.decay_multipliers(plan, "decay_root", 2.0))
        root = 2**0.5
        assert found["params/blocks/query/kernel"] == pytest.approx(root)
        assert found["params/blocks/down/kernel"] == pytest.approx(2 * root)  # depth: as it was
        assert found["params/table/embedding"] == 1.0
        assert found["params/final_norm/scale"] == 0.0

    def test_only_the_embedding_gets_another_rate(self, trial):
        trial = trial | {"width": 64, "depth": 1}
        one, other = (
            language_study.parametrized(trial | {"method": method})
            for method in ("standard", "embedding")
        )
        params = jax.jit(one.init)(jax.random.key(0))
        moved = []
        for how in (one, other):
            tx = how.optimizer(0.01, 0.1)
            moved.append(named_leaves(jax.jit(tx.update)(params, tx.init(params), params)[0]))
        for name, leaf in moved[0].items():
            ratio = 4.0 if name == "params/table/embedding" else 1.0
            np.testing.assert_allclose(moved[1][name], ratio * leaf, rtol=1e-6)

    def test_methods_train_what_they_say(self, trial):
        study = language_study.Study.__new__(language_study.Study)
        study._settings = trial | {"depth": 4, "width": 32}
        batch = study.trial("sde", "batch", (1, -1), 2)
        assert (batch["batch_size"], batch["steps"], batch["base_batch_size"]) == (16, 5, 4)
        assert (batch["depth"], batch["width"], batch["seed"]) == (2, 16, 2)
        assert (batch["rate"], batch["weight_decay"]) == (2**-6, 0.05)
        blind = study.trial("plan", "updates", (0, 0), 0)
        assert (blind["steps"], blind["base_steps"], blind["base_batch_size"]) == (80, 80, 4)
        assert study.trial("warmup", "target", (0, 0), 0)["warmup"] == pytest.approx(0.2)
        sizes_of = {"target": (4, 32), "wide": (2, 32), "deep": (4, 16), "twice": (4, 32),
                    "four": (8, 64)}  # fmt: skip
        for size, sizes in sizes_of.items():
            found = study.trial("plan", size, (0, 0), 0)
            assert (found["depth"], found["width"]) == sizes
        # Where the decay is not multiplied by the rate, what changes is η at the same η·λ.
        assert language_study.METHODS["independent"].direction == (1, -1)

    def test_stages_are_those_that_flags_name(self, monkeypatch):
        def named(**given):
            given = {"methods": language_study.METHODS, "searches": ("rate", "decay")} | given
            given.setdefault("sizes", language_study.USUAL)
            monkeypatch.setattr(language_study, "FLAGS", types.SimpleNamespace(**given))
            return language_study.chosen()

        usual = named()
        assert {one[1] for one in language_study.STAGES} == {*language_study.SIZES, "base"}
        assert {one[1] for one in usual} == {*language_study.USUAL, "base"}
        assert [one for one in language_study.STAGES if one in usual] == usual
        few = named(sizes=["wide"], methods=["plan", "independent"], searches=["rate"])
        assert set(few) == {("plan", "wide", (1, 0)), ("independent", "wide", (1, -1)),
                            ("plan", "base", (1, 0))}  # fmt: skip

    def test_points_of_a_search_that_was_cut_off_are_shown(self, trial, monkeypatch):
        given = types.SimpleNamespace(only_finished=True, num_seeds=3, rematerialize=False)
        monkeypatch.setattr(language_study, "FLAGS", given)
        study = language_study.Study(trial, pathlib.Path("none.jsonl"), {})
        study.best = {"plan": (0, 0)}
        done = [study.trial("plan", "target", (0, 0), seed) for seed in range(3)]
        done += [study.trial("plan", "target", (-3, 0), seed) for seed in range(2)]
        done += [study.trial("plan", "target", (-2, 0), 0)]  # of two seeds
        study._records = {
            sweeps.trial_hash(one): {"trial": one, "result": {"validation": [2.0 + one["seed"]]}}
            for one in done
        }
        with pytest.raises(language_study.UnfinishedError):
            study.along("plan", "target", (1, 0))
        assert study.losses["plan", "target"] == {(0, 0): [2.0, 3.0, 4.0], (-3, 0): [2.0, 3.0]}

    def test_tables_over_size_find_the_laws_that_losses_follow(self, trial):
        """Best rates c·N^(-1/4), what a nat costs ∝ N^(1/2), the lowest loss 1 + 10·N^(-1/2)."""
        settings = trial | {"depth": 16, "width": 128, "steps": 5}
        study = language_study.Study.__new__(language_study.Study)
        study._settings = settings
        study.best = {"plan": (0, 0), "standard": (0, 0)}
        study.losses = {}
        for method, factor in (("plan", 1.0), ("standard", 1.1)):
            for size in ("base", "twice", "four", "target"):
                count = language.parameters(study.trial(method, size, (0, 0), 0))
                best = -math.log(count / 1e4) / 4
                lowest = factor * (1 + 10 * count**-0.5)
                nats = {step: step * math.log(2) - best for step in range(-4, 5)}
                study.losses[method, size] = {
                    (step, 0): [lowest * (1 + 1e-6 * count**0.5 * one**2)] * 2
                    for step, one in nats.items()
                }
        measured, laws = language_transfer.size_tables(study)
        assert measured["size"].tolist()[:4] == ["2 × 16", "4 × 32", "8 × 64", "16 × 128"]
        for law, limit in zip(laws.to_dict("records"), ("1.00", "1.10"), strict=True):
            assert law["b"] == "-0.25 ± 0.00" and law["left, nats"] == "0.00"
            assert law["κ"] == "0.50" and law["left"] == "0.00"
            assert law["E"] == limit and law["a"] == "0.50"

    def test_laws_are_found_again(self):
        sizes = np.array([1e4, 7e4, 5e5, 3e6])
        truth = np.log(3.0) - 0.3 * np.log(sizes)
        law = language_scaling.power_law(sizes, np.stack([truth, truth + 1.0], axis=1))
        np.testing.assert_allclose(law.exponent, -0.3)
        assert law.residual < 1e-9
        noise = np.array([0.1, -0.1, -0.1, 0.1])
        assert 0.1 < language_scaling.power_law(sizes, (truth + noise)[:, None]).residual < 0.2
        found = language_scaling.saturation(sizes, 1.5 + 20 * sizes**-0.4)
        assert found is not None and found.residual < 1e-4
        assert found.limit == pytest.approx(1.5, abs=1e-3)
        assert found.exponent == pytest.approx(0.4, abs=1e-3)
        assert language_scaling.saturation(sizes[:3], [3.0, 2.0, 1.5]) is None


def _assert_close(one, other, tolerance):
    expected = named_leaves(other)
    for name, leaf in named_leaves(one).items():
        scale = float(jnp.abs(expected[name]).max()) + 1e-12
        np.testing.assert_allclose(leaf, expected[name], atol=tolerance * scale, err_msg=name)
