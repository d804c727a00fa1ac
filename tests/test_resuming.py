"""A search ends with the same bytes where a write fails and wherever its trials run."""

import errno
import importlib
import sys

import pytest
from absl import flags

from experiments.lab import files
from tests.binaries import FORKS

FLAGS = ["--width=4", "--batch_size=512", "--quiet", "--epochs=0.4", "--num_rates=2",
         "--num_seeds=2", "--workers=2"]  # fmt: skip


def disturbed_and_not(folder):
    """Searches twice, once while a write of the journal fails, in a process of its own."""
    module = importlib.import_module("experiments.find_lr")
    sys.argv = [module.__name__, *FLAGS, f"--workdir={folder / 'disturbed'}"]
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


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """A folder of a search that was disturbed and of one that was not."""
    folder = tmp_path_factory.mktemp("searches")
    with FORKS.Pool(1) as pool:
        pool.apply(disturbed_and_not, (folder,))
    return folder


def test_a_write_that_fails_changes_nothing_in_the_end(searches):
    for file in ("results.jsonl", "config.json", "table.md"):
        one, other = (searches / folder / file for folder in ("disturbed", "undisturbed"))
        assert one.read_bytes() == other.read_bytes(), file


@pytest.mark.parametrize("runner", ["devices", "processes"])
def test_a_search_has_the_same_bytes_wherever_its_trials_run(runner, searches, tmp_path, run_again):
    done = run_again("find_lr", tmp_path, *FLAGS, f"--runner={runner}")
    assert done.returncode == 0, done.stderr
    here = (searches / "undisturbed" / "results.jsonl").read_bytes()
    assert (tmp_path / "results.jsonl").read_bytes() == here
