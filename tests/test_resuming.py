"""Binaries whose writing fails in the middle end, once they go on, with undisturbed bytes."""

import errno
import importlib
import sys

import pytest
from absl import flags

from experiments.lab import files
from tests.binaries import FORKS

SMALL = ["--width=4", "--batch_size=512", "--quiet"]
BINARIES = {
    "train": ["--epochs=3"],
    "find_lr": ["--epochs=0.4", "--num_rates=2", "--num_seeds=2", "--workers=2"],
}


def disturbed_and_not(name, folder):
    """Runs a binary twice, once while a write of its journal fails, in a process of its own."""
    module = importlib.import_module(f"experiments.{name}")
    sys.argv = [module.__name__, *SMALL, *BINARIES[name], f"--workdir={folder / 'disturbed'}"]
    flags.FLAGS(sys.argv)
    append, calls = files.append_record, []

    def failing(path, record):
        if path.name == "results.jsonl":
            calls.append(record)
            if len(calls) == 2:
                with path.open("ab") as journal:
                    journal.write(b'{"hash": "01')
                raise OSError(errno.ESTALE, "no")
        append(path, record)

    files.append_record = failing
    try:
        module.run()
        raise AssertionError("it did not fail")
    except OSError as error:
        assert error.errno == errno.ESTALE
    module.run()
    flags.FLAGS.workdir = str(folder / "undisturbed")
    module.run()


@pytest.mark.parametrize("name", BINARIES)
def test_a_write_that_fails_changes_nothing_in_the_end(name, tmp_path):
    with FORKS.Pool(1) as pool:
        pool.apply(disturbed_and_not, (name, tmp_path))
    for file in ("results.jsonl", "config.json", "table.md")[: 2 if name == "train" else 3]:
        one, other = (tmp_path / folder / file for folder in ("disturbed", "undisturbed"))
        assert one.read_bytes() == other.read_bytes(), file


def test_a_search_has_the_same_bytes_wherever_its_trials_run(tmp_path, run_again):
    found = set()
    for runner in ("local", "devices", "processes"):
        flags = [*SMALL, *BINARIES["find_lr"], f"--runner={runner}"]
        done = run_again("find_lr", tmp_path / runner, *flags)
        assert done.returncode == 0, done.stderr
        found.add((tmp_path / runner / "results.jsonl").read_bytes())
    assert len(found) == 1
