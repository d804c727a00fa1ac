"""Checkpoints: bit for bit, bound to their settings, never half read."""

import gc
import itertools
import os
import pathlib
import shutil
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from experiments.lab.checkpoints import restore_checkpoint, save_checkpoint

SETTINGS = {"architecture": "2_02", "rate": 0.1, "depths": (1, 2), "seed": None}


class Inner(NamedTuple):
    """Part of a state."""

    mean: jax.Array
    nothing: tuple


class State(NamedTuple):
    """A state with every kind of leaf."""

    weights: dict
    inner: Inner
    empty: optax.EmptyState
    steps: jax.Array
    key: jax.Array
    keys: jax.Array


def state(seed=0):
    """Random bits, the special values of floats among them."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**16, 64, dtype=np.uint16).view(ml_dtypes.bfloat16)
    floats = np.array([np.nan, -np.inf, -0.0, 1e-42, random.normal()], np.float32)
    return State(
        weights={
            "0/1": jnp.asarray(bits),
            "a.b": [jnp.asarray(floats)],
            "scalar": jnp.float16(0.1),
        },
        inner=Inner(jnp.asarray(random.normal(size=(2, 3)), jnp.float32), ()),
        empty=optax.EmptyState(),
        steps=jnp.int32(random.integers(1000)),
        key=jax.random.key(seed),
        keys=jax.random.split(jax.random.key(seed, impl="rbg"), 2),
    )


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(left, jax.Array)
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert raw(left) == raw(right)


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


class TestRoundTrip:
    def test_gives_every_bit_back(self, tmp_path):
        save_checkpoint(tmp_path / "new" / "folder", 3, state(), SETTINGS)
        found = restore_checkpoint(tmp_path / "new" / "folder", state(1), SETTINGS)
        assert found is not None
        step, tree, log = found
        assert (step, log) == (3, None)
        same(tree, state())
        assert jax.random.normal(tree.key) == jax.random.normal(state().key)

    def test_takes_shapes_as_likeness(self, tmp_path):
        weights = state().weights
        save_checkpoint(tmp_path, 1, weights, SETTINGS)
        found = restore_checkpoint(tmp_path, jax.eval_shape(lambda: weights), SETTINGS)
        assert found is not None
        same(found[1], weights)

    def test_the_last_one_wins_and_old_ones_go(self, tmp_path):
        for step in (1, 2, 10):
            save_checkpoint(tmp_path, step, {"x": jnp.int32(step)}, SETTINGS)
        assert steps(tmp_path) == [2, 10]  # one to go back to where the last is damaged
        found = restore_checkpoint(tmp_path, {"x": jnp.int32(0)}, SETTINGS)
        assert found is not None
        assert (found[0], int(found[1]["x"])) == (10, 10)

    def test_settings_that_are_extensible_may_differ(self, tmp_path):
        save_checkpoint(tmp_path, 1, {"x": jnp.int32(1)}, {"rate": 0.1, "steps": 10})
        like, longer = {"x": jnp.int32(0)}, {"rate": 0.1, "steps": 20}
        assert restore_checkpoint(tmp_path, like, longer, extensible=("steps",)) is not None
        with pytest.raises(ValueError, match=r"saved with steps=10 \(now 20\)$"):
            restore_checkpoint(tmp_path, like, longer)
        with pytest.raises(ValueError, match=r"saved with rate=0.1 \(now 0.2\)$"):
            restore_checkpoint(tmp_path, like, longer | {"rate": 0.2}, extensible=("steps",))

    @pytest.mark.parametrize("make", [False, True])
    def test_nothing_there_is_none(self, tmp_path, make):
        if make:
            (tmp_path / "checkpoints").mkdir()
        assert restore_checkpoint(tmp_path / "checkpoints", state(), SETTINGS) is None
        assert (tmp_path / "checkpoints").exists() == make


NUMBERS = {
    "np.float32": np.float32(0.1),
    "np.float64": np.float64(0.1),
    "np.int64": np.int64(2**62 + 1),
    "np.uint8": np.uint8(200),
    "np.bool": np.bool_(True),
    "bfloat16": ml_dtypes.bfloat16(0.1),
    "nan": np.float64(np.nan),
    "int": 2**62 + 1,
    "negative": -(2**63),
    "float": 0.1,
    "inf": float("-inf"),
    "bool": True,
    "complex": 1 + 0.1j,
}


class TestScalars:
    def test_come_back_in_type_and_value(self, tmp_path):
        save_checkpoint(tmp_path, 1, NUMBERS | {"weights": jnp.ones(2)}, SETTINGS)
        like = {name: type(value)(0) for name, value in NUMBERS.items()}
        found = restore_checkpoint(tmp_path, like | {"weights": jnp.ones(2)}, SETTINGS)
        assert found is not None
        for name, value in NUMBERS.items():
            assert type(found[1][name]) is type(value), name
            assert np.asarray(found[1][name]).tobytes() == np.asarray(value).tobytes(), name

    def test_of_another_type_raise_by_name(self, tmp_path):
        save_checkpoint(tmp_path, 1, {"step": 7}, SETTINGS)
        with pytest.raises(ValueError, match=r"holds .*'step'.*int64.*float64"):
            restore_checkpoint(tmp_path, {"step": 7.0}, SETTINGS)

    @pytest.mark.parametrize(
        "make", [np.zeros, jnp.zeros, lambda shape: jnp.zeros(shape, jnp.bfloat16)]
    )
    def test_empty_arrays_come_back(self, tmp_path, make):
        tree = {"log": make((0, 2)), "weights": jnp.ones(2), "keys": jax.random.split(
            jax.random.key(0), 0)}  # fmt: skip
        save_checkpoint(tmp_path, 1, tree, SETTINGS)
        found = restore_checkpoint(tmp_path, tree, SETTINGS)
        assert found is not None
        assert (found[1]["log"].shape, found[1]["log"].dtype) == ((0, 2), tree["log"].dtype)
        assert isinstance(found[1]["log"], type(tree["log"]))
        assert found[1]["keys"].shape == (0,) and found[1]["keys"].dtype == tree["keys"].dtype
        for shape in ((0, 3), (2, 2)):
            with pytest.raises(ValueError, match=r"holds .*'log'.*\(0, 2\)"):
                restore_checkpoint(tmp_path, tree | {"log": make(shape)}, SETTINGS)

    def test_shapes_restore_empty_arrays(self, tmp_path):
        tree = {"log": jnp.zeros((0, 2)), "weights": jnp.ones(2)}
        save_checkpoint(tmp_path, 1, tree, SETTINGS)
        found = restore_checkpoint(tmp_path, jax.eval_shape(lambda: tree), SETTINGS)
        assert found is not None
        same(found[1], tree)

    @pytest.mark.parametrize(
        ("leaf", "message"),
        [
            ("text", r"'step'.*'text' of str; accepted are arrays"),
            (np.str_("text"), r"'step'.*accepted are arrays"),
            (np.array([None]), r"'step'.*accepted are arrays"),
            (np.datetime64("2024-01-01"), r"'step'.*accepted are arrays"),
            (object(), r"'step'.*of object; accepted are arrays"),
            (2**63, r"'step'.*accepted are ints of 64 bits"),
            (jnp.zeros(0), r"holds no numbers, found 1 leaves"),
        ],
    )
    def test_what_cannot_come_back_is_not_saved(self, tmp_path, leaf, message):
        with pytest.raises((TypeError, ValueError), match=message):
            save_checkpoint(tmp_path, 1, {"step": leaf}, SETTINGS)
        assert not steps(tmp_path)


class TestSettings:
    @pytest.mark.parametrize("value", [float("nan"), [1.0, float("nan")], {"a": float("nan")}])
    def test_nan_is_the_same_setting(self, tmp_path, value):
        save_checkpoint(tmp_path, 1, {"x": jnp.ones(1)}, {"clip": value})
        assert restore_checkpoint(tmp_path, {"x": jnp.ones(1)}, {"clip": value}) is not None
        for other in (None, 1.0, [float("nan")], {"b": float("nan")}):
            with pytest.raises(ValueError, match="another run: it was saved with clip="):
                restore_checkpoint(tmp_path, {"x": jnp.ones(1)}, {"clip": other})

    def test_no_json_value_is_named(self, tmp_path):
        with pytest.raises(TypeError, match="setting 'rate' is .*; accepted are JSON values"):
            save_checkpoint(tmp_path, 1, {"x": jnp.ones(1)}, {"rate": np.float32(0.1)})


class TestMismatch:
    @pytest.fixture
    def directory(self, tmp_path):
        save_checkpoint(tmp_path, 1, {"a": jnp.zeros(2), "b": {"c": jnp.int32(1)}}, SETTINGS)
        return tmp_path

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (SETTINGS | {"rate": 0.2}, r"rate=0\.1 \(now 0\.2\)$"),
            (SETTINGS | {"depths": [1]}, r"depths=\[1, 2\] \(now \[1\]\)$"),
            (SETTINGS | {"width": 3, "seed": 0}, r"seed=None \(now 0\), width=None \(now 3\)$"),
            ({"architecture": "2_02", "rate": 0.1, "seed": None}, r"depths=\[1, 2\] \(now None\)$"),
        ],
    )
    def test_names_the_setting(self, directory, settings, message):
        with pytest.raises(ValueError, match="checkpoint 1 in .* another run: .*" + message):
            restore_checkpoint(directory, {"a": jnp.zeros(2), "b": {"c": jnp.int32(0)}}, settings)

    @pytest.mark.parametrize(
        ("like", "message"),
        [
            ({"a": jnp.zeros(2)}, r"holds a leaf .*\['b'\]\['c'\].* that the run does not have"),
            (
                {"a": jnp.zeros(2), "b": {"c": jnp.int32(1), "d": jnp.zeros(1)}},
                r"lacks the leaf .*\['b'\]\['d'\]",
            ),
            ({"a": jnp.zeros(3), "b": {"c": jnp.int32(1)}}, r"\['a'\].* \(\(2,\), .*\(\(3,\), "),
            (
                {"a": jnp.zeros(2, jnp.bfloat16), "b": {"c": jnp.int32(1)}},
                r"\['a'\].*float32.*bfloat16",
            ),
        ],
    )
    def test_names_the_leaf(self, directory, like, message):
        with pytest.raises(ValueError, match="checkpoint 1 in .*" + message):
            restore_checkpoint(directory, like, SETTINGS)


# Orbax drops the coroutines of its other reads when one fails; they complain when collected.
COROUTINES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TREE = {"weights": np.arange(600, dtype=np.float32), "count": np.int32(7)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of `TREE`, not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    save_checkpoint(directory, 1, jax.tree.map(jnp.asarray, TREE), SETTINGS)
    return directory


class TestDamage:
    """A cut-off save is not seen; a damaged file raises an error, or does not matter."""

    def restore(self, directory):
        return restore_checkpoint(directory, jax.tree.map(jnp.zeros_like, TREE), SETTINGS)

    def raises_or_is_right(self, directory):
        """Returns whether restoring the checkpoint raised; wrong values fail."""
        try:
            found = self.restore(directory)
        except ValueError as error:
            message = str(error)
            assert f"checkpoint 1 in {directory} is damaged (" in message, message
            assert message.endswith(f"; none is whole: remove {directory} to start anew"), message
            return True
        assert found is not None
        jax.tree.map(np.testing.assert_array_equal, found[1], TREE)
        return False

    @pytest.mark.parametrize("cut", ["1.orbax-checkpoint-tmp", "1"])
    def test_of_a_save_that_was_cut_off_is_not_seen(self, saved, tmp_path, cut):
        """Nor of a removal: the record goes first. What goes on writes over it."""
        directory = tmp_path / "copy"
        shutil.copytree(saved / "1", directory / cut)
        (directory / cut / "tree" / "manifest.ocdbt").unlink()
        assert self.restore(directory) is None
        save_checkpoint(directory, 1, jax.tree.map(jnp.asarray, TREE), SETTINGS)
        assert not self.raises_or_is_right(directory)

    def test_a_kill_while_an_old_one_is_removed_costs_nothing(self, saved, tmp_path, monkeypatch):
        directory = shutil.copytree(saved, tmp_path / "copy")
        trees = [{"weights": TREE["weights"] + step, "count": TREE["count"]} for step in range(4)]
        save_checkpoint(directory, 2, trees[2], SETTINGS)

        def killed(path, **options):
            (path / "tree" / "manifest.ocdbt").unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(directory, 3, trees[3], SETTINGS)
        assert not (directory / "1.json").exists() and (directory / "1").exists()
        found = self.restore(directory)
        assert found is not None and found.step == 3
        np.testing.assert_array_equal(found.tree["weights"], trees[3]["weights"])

    def test_of_the_last_one_leaves_the_one_before(self, saved, tmp_path, caplog):
        directory = shutil.copytree(saved, tmp_path / "copy")
        save_checkpoint(directory, 2, jax.tree.map(jnp.asarray, TREE), SETTINGS, log=[np.inf])
        (directory / "2.json").write_text("{")
        found = self.restore(directory)
        assert found is not None and (found.step, found.log) == (1, None)
        assert f"checkpoint 2 in {directory} is damaged (" in caplog.text
        assert "; going on from checkpoint 1\n" in caplog.text

    @COROUTINES
    @pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "gone"])
    def test_of_any_file_raises_or_does_not_matter(self, saved, tmp_path, damage):
        raised = set()
        names = [p.relative_to(saved) for p in sorted(saved.rglob("*")) if p.is_file()]
        if damage == "gone":
            names.remove(pathlib.Path("1.json"))  # it is what makes a checkpoint
        for number, name in enumerate(names):
            directory = shutil.copytree(saved, tmp_path / str(number))
            path = directory / name
            content = path.read_bytes()
            if damage == "gone":
                path.unlink()
            else:
                path.write_bytes(
                    {"empty": b"", "garbage": b"\xff" * len(content), "cut": content[:-9]}[damage]
                )
            if self.raises_or_is_right(directory):
                raised.add(name)
        gc.collect()
        assert raised

    @COROUTINES
    def test_of_a_single_byte_is_noticed(self, saved, tmp_path):
        data = [path for path in (saved / "1" / "tree").rglob("d/*") if path.is_file()]
        assert data
        raised = []
        for number, path in enumerate(data):
            directory = shutil.copytree(saved, tmp_path / str(number))
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            (directory / path.relative_to(saved)).write_bytes(content)
            raised.append(self.raises_or_is_right(directory))
        gc.collect()
        assert any(raised)

    @pytest.mark.parametrize(
        "record",
        [
            "[" * 100_000,
            '{"settings": [1], "checksum": 1, "leaves": {}}',
            '{"settings": {}, "checksum": 1, "leaves": {"a": 3}}',
            '{"checksum": 1}',
            None,
        ],
    )
    def test_of_the_record_raises(self, saved, tmp_path, record):
        directory = shutil.copytree(saved, tmp_path / "copy")
        (directory / "1.json").unlink()
        if record is None:
            os.mkfifo(directory / "1.json")
        else:
            (directory / "1.json").write_text(record)
        assert self.raises_or_is_right(directory)

    def test_a_file_in_place_of_the_folder_is_told(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="file is not a folder of checkpoints"):
            self.restore(tmp_path / "file")


def test_a_clock_that_goes_backwards_holds_nothing_up(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(ticks))
    for step in range(3):
        save_checkpoint(tmp_path, step, TREE, SETTINGS)
    assert steps(tmp_path) == [1, 2]
