"""Studies on worker processes and on a Ray cluster end as those of one thread, whatever dies."""

import concurrent.futures
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import psutil
import pytest
from hypothesis import strategies

from experiments.lab.files import read_records
from experiments.lab.sweeps import ProcessExecutor, WorkerLostError, run_study
from experiments.lab.sweeps.processes import share_cores
from experiments.lab.sweeps.versions import differing_versions, source_digest, versions
from tests.trials import about_process, work

ROOT = pathlib.Path(__file__).parents[1]
TRIALS = [{"index": i, "fails": i % 5 == 3} for i in range(8)]
DEADLY = [trial | {"kills": int(trial["index"] in (1, 4))} for trial in TRIALS]


def study(trials, journal, run=work, **options):
    run_study(trials, run, journal, progress=False, **options)
    return journal.read_bytes()


def starts_in(folder):
    """How often each trial began, by its index."""
    names = [int(path.name.partition("_")[0]) for path in folder.iterdir()]
    return {index: names.count(index) for index in sorted(set(names))}


class TestExecutors:
    """`run_study` in whatever `concurrent.futures` calls an executor."""

    def test_any_executor_does_and_stays_open(self, tmp_path):
        expected = study(TRIALS, tmp_path / "one.jsonl")
        with concurrent.futures.ThreadPoolExecutor(3) as executor:
            assert study(TRIALS, tmp_path / "two.jsonl", executor=executor) == expected
            assert executor.submit(int, "3").result() == 3

    def test_a_lost_worker_fails_its_trial_alone(self, tmp_path):
        class Losing(concurrent.futures.ThreadPoolExecutor):
            def submit(self, fn, /, *args, **kwargs):
                if args[0]["index"] == 2:
                    fn, args = (lambda: (_ for _ in ()).throw(WorkerLostError("gone"))), ()
                return super().submit(fn, *args, **kwargs)

        journal = tmp_path / "results.jsonl"
        with Losing(2) as executor:
            study(TRIALS, journal, executor=executor)
        records = read_records(journal)
        assert records[2]["error"] == "WorkerLostError: gone"
        assert [r["trial"]["index"] for r in records if "error" in r] == [2, 3]
        assert study(TRIALS, journal, retry_failed=True) == study(TRIALS, tmp_path / "one.jsonl")

    def test_an_error_of_the_executor_ends_the_study_and_keeps_what_is_done(self, tmp_path):
        class Broken(concurrent.futures.ThreadPoolExecutor):
            def submit(self, fn, /, *args, **kwargs):
                if args[0]["index"] == 6:
                    raise RuntimeError("no more")
                return super().submit(fn, *args, **kwargs)

        journal = tmp_path / "results.jsonl"
        with Broken(2) as executor, pytest.raises(RuntimeError, match="no more"):
            study(TRIALS, journal, executor=executor)
        done = {record["trial"]["index"] for record in read_records(journal)}
        assert done <= set(range(6))
        assert study(TRIALS, journal) == study(TRIALS, tmp_path / "one.jsonl")

    def test_raises_on_workers_beside_an_executor(self, tmp_path):
        with (
            concurrent.futures.ThreadPoolExecutor(2) as executor,
            pytest.raises(ValueError, match="workers=2"),
        ):
            study(TRIALS, tmp_path / "results.jsonl", workers=2, executor=executor)


@hypothesis.given(strategies.integers(1, 64), strategies.integers(1, 64))
def test_cores_are_shared_evenly(cores, workers):
    shares = share_cores(range(100, 100 + cores), workers)
    assert len(shares) == workers
    used = [core for share in shares for core in share]
    assert set(used) == set(range(100, 100 + cores))
    sizes = {len(share) for share in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    counts = {used.count(core) for core in used}  # workers at a core
    assert max(counts) - min(counts) <= 1
    if workers <= cores:
        assert used == list(range(100, 100 + cores))


PARENT = """
import sys
from experiments.lab.sweeps import ProcessExecutor
from tests.trials import work

if __name__ == "__main__":
    with ProcessExecutor(2) as executor:
        for index in range(2):
            executor.submit(work, {"index": index, "seconds": 60}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def processes():
    with ProcessExecutor(2) as executor:
        yield executor


class TestProcesses:
    def test_leave_the_bytes_of_one_thread(self, processes, tmp_path):
        expected = study(TRIALS, tmp_path / "one.jsonl")
        assert study(TRIALS, tmp_path / "two.jsonl", executor=processes) == expected

    def test_are_pinned_to_cores_of_their_own(self, processes, tmp_path):
        trials = [{"index": i} for i in range(6)]
        study(trials, tmp_path / "results.jsonl", about_process, executor=processes)
        found = [record["result"] for record in read_records(tmp_path / "results.jsonl")]
        cores = {one["process"]: tuple(one["cores"]) for one in found}
        shares = share_cores(sorted(os.sched_getaffinity(0)), 2)
        assert sorted(cores.values()) == sorted(map(tuple, shares))
        assert all(one["threads"] == str(len(one["cores"])) for one in found)

    def test_that_die_are_replaced_and_run_it_again(self, processes, tmp_path):
        starts = tmp_path / "starts"
        starts.mkdir()
        run = functools.partial(work, folder=str(starts))
        found = study(DEADLY, tmp_path / "two.jsonl", run, executor=processes)
        assert found == study(DEADLY, tmp_path / "one.jsonl")  # no folder: none is killed
        assert starts_in(starts) == {index: 1 + (index in (1, 4)) for index in range(8)}

    def test_that_always_die_fail_the_trial_alone(self, processes, tmp_path):
        starts = tmp_path / "starts"
        starts.mkdir()
        trials = [{"index": 0, "kills": 9}, {"index": 1}]
        run = functools.partial(work, folder=str(starts))
        study(trials, tmp_path / "results.jsonl", run, executor=processes)
        first, second = read_records(tmp_path / "results.jsonl")
        assert first["error"].startswith("WorkerLostError: 3 worker processes died")
        assert "result" in second
        assert starts_in(starts) == {0: 3, 1: 1}

    def test_end_with_the_process_that_started_them(self, tmp_path):
        with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT) as parent:
            while len(starts := list(tmp_path.iterdir())) < 2:
                assert parent.poll() is None
                time.sleep(0.05)
            parent.send_signal(signal.SIGKILL)
        workers = [int(path.name.split("_")[1]) for path in starts]
        deadline = time.monotonic() + 10
        while left := [one for one in workers if psutil.pid_exists(one)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def test_raise_on_what_cannot_be_sent(self, processes, tmp_path):
        with pytest.raises(TypeError, match="top of a module"):
            study(TRIALS, tmp_path / "results.jsonl", lambda trial: {}, executor=processes)

    @pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1, "attempts": 0}])
    def test_raise_on_numbers_below_1(self, options):
        with pytest.raises(ValueError, match="at least 1, found 0"):
            ProcessExecutor(**options)


class TestVersions:
    def test_a_changed_file_changes_the_digest(self, tmp_path, monkeypatch):
        package = tmp_path / "some_package"
        package.mkdir()
        package.joinpath("__init__.py").write_text("")
        package.joinpath("one.py").write_text("a = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        before = versions(["some_package"])
        assert before == versions(["some_package"])
        package.joinpath("one.py").write_text("a = 2\n")
        now = versions(["some_package"])
        name = "source of some_package"
        assert differing_versions(now, before) == f"{name} {now[name]} (not {before[name]})"
        assert now[name] != before[name]

    def test_what_has_no_source_has_no_digest(self):
        assert source_digest("sys") is None
        assert source_digest("no_such_package") is None


def test_ray():
    """Runs tests/ray_cases.py: parallel workers would have a cluster each."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, str(ROOT / "tests" / "ray_cases.py")],
        cwd=ROOT, capture_output=True, text=True, timeout=420,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-5000:]
    assert "7 passed" in finished.stdout


class TestAddresses:
    """No address may cost more than ten seconds, or the journal."""

    def error_of(self, address, error):
        from experiments.lab.sweeps.ray_executor import connected

        start = time.monotonic()
        with pytest.raises(error) as found, connected(address):
            pass
        assert time.monotonic() - start < 10
        return str(found.value)

    @pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:ray", ":6379"])
    def test_that_are_none(self, address):
        assert "host:port" in self.error_of(address, ValueError)

    @pytest.mark.parametrize("scheme", ["", "ray://"])
    def test_where_nobody_listens(self, scheme):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        message = self.error_of(f"{scheme}127.0.0.1:{port}", ConnectionError)
        assert f"no Ray cluster answers at {scheme}127.0.0.1:{port}" in message

    def test_where_something_else_listens(self, monkeypatch):
        from experiments.lab.sweeps import ray_executor

        assert ray_executor.CONNECT_SECONDS + ray_executor.CHECK_SECONDS < 10
        monkeypatch.setattr(ray_executor, "CHECK_SECONDS", 0.5)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            assert "is not a healthy Ray head" in self.error_of(address, ConnectionError)

    def test_without_ray(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert "pip install '.[ray]'" in self.error_of(None, ImportError)
