"""Studies on worker processes and on a Ray cluster end as those of one thread, whatever dies."""

import concurrent.futures
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import hypothesis
import pytest
from hypothesis import strategies

from archscale_jax.files import read_records
from archscale_jax.sweeps import ProcessExecutor, WorkerLostError, run_study
from archscale_jax.sweeps.processes import share_cores
from archscale_jax.sweeps.versions import differing_versions, source_digest, versions
from tests.trials import about_process, work

# A cluster starts its nodes by a fork that becomes another program at once: no lock is waited for.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

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

    def test_refuses_workers_beside_an_executor(self, tmp_path):
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
    assert set(used) == set(range(100, 100 + cores)) if workers >= cores else True
    sizes = {len(share) for share in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    counts = {used.count(core) for core in used}  # workers at a core
    assert max(counts) - min(counts) <= 1
    if workers <= cores:
        assert used == list(range(100, 100 + cores))


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

    def test_refuse_what_cannot_be_sent(self, processes, tmp_path):
        with pytest.raises(TypeError, match="top of a module"):
            study(TRIALS, tmp_path / "results.jsonl", lambda trial: {}, executor=processes)

    @pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1, "attempts": 0}])
    def test_refuse_numbers_below_1(self, options):
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


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, and two nodes with one each; all on the loopback address."""
    with pytest.MonkeyPatch.context() as patch:
        # Before Ray is imported, here and by what is started: no address but 127.0.0.1.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
            patch.setenv("RAY_TMPDIR", folder)
            from ray.cluster_utils import Cluster

            node = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
            found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
            found.add_node(num_cpus=1, **node)
            found.add_node(num_cpus=1, **node)
            yield found
            found.shutdown()


@pytest.fixture(scope="module")
def connection(cluster):
    from archscale_jax.sweeps.ray_executor import connected

    with connected(cluster.address, log_to_driver=False):
        yield


@pytest.mark.usefixtures("connection")
class TestRay:
    def executor(self, **options):
        from archscale_jax.sweeps.ray_executor import RayExecutor

        return RayExecutor(num_cpus=1, **options)

    def test_leaves_the_bytes_of_one_thread_whatever_dies(self, cluster, tmp_path):
        starts = tmp_path / "starts"
        starts.mkdir()
        run = functools.partial(work, folder=str(starts))
        found = study(DEADLY, tmp_path / "two.jsonl", run, executor=self.executor())
        assert found == study(DEADLY, tmp_path / "one.jsonl")
        assert starts_in(starts) == {index: 1 + (index in (1, 4)) for index in range(8)}

    def test_a_trial_that_always_kills_its_worker_fails_alone(self, tmp_path):
        starts = tmp_path / "starts"
        starts.mkdir()
        trials = [{"index": 0, "kills": 9}, {"index": 1}]
        run = functools.partial(work, folder=str(starts))
        study(trials, tmp_path / "results.jsonl", run, executor=self.executor(attempts=2))
        first, second = read_records(tmp_path / "results.jsonl")
        assert first["error"].startswith("WorkerLostError: 2 workers died")
        assert "result" in second
        assert starts_in(starts)[0] == 2

    def test_a_node_that_vanishes_takes_no_trial_with_it(self, cluster, tmp_path):
        node = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1")
        trials = [{"index": index, "seconds": 0.5} for index in range(12)]
        journal = tmp_path / "two.jsonl"
        with concurrent.futures.ThreadPoolExecutor(1) as aside:
            running = aside.submit(study, trials, journal, executor=self.executor())
            while not read_records(journal):
                time.sleep(0.1)
            cluster.remove_node(node, allow_graceful=False)
            found = running.result()
        quick = functools.partial(study, trials, tmp_path / "one.jsonl")
        with concurrent.futures.ThreadPoolExecutor(12) as executor:
            assert found == quick(executor=executor)

    def test_a_function_of_a_notebook_is_sent(self, tmp_path):
        factor = 3
        run = lambda trial: {"product": factor * trial["index"]}  # noqa: E731
        study(TRIALS[:2], tmp_path / "results.jsonl", run, executor=self.executor())
        records = read_records(tmp_path / "results.jsonl")
        assert [record["result"]["product"] for record in records] == [0, 3]

    def test_a_worker_of_another_version_computes_nothing(self, tmp_path, monkeypatch):
        from archscale_jax.sweeps import ray_executor

        journal = tmp_path / "results.jsonl"
        study(TRIALS[:2], journal)
        here = versions() | {"jax": "0.0.1"}
        monkeypatch.setattr(ray_executor, "versions", lambda packages=(): here)
        with pytest.raises(ray_executor.VersionError, match=r"has jax .* \(not 0\.0\.1\)"):
            study(TRIALS, journal, executor=self.executor())
        assert [record["trial"]["index"] for record in read_records(journal)] == [0, 1]

    def test_a_cancelled_future_cancels_its_task(self, tmp_path):
        executor = self.executor()
        trials = [{"index": index, "seconds": 60} for index in range(4)]
        futures = [executor.submit(work, trial, str(tmp_path)) for trial in trials]
        while not list(tmp_path.iterdir()):
            time.sleep(0.1)
        assert all(future.cancel() for future in futures)
        # The cores are free again: this does not wait for a minute.
        assert executor.submit(work, {"index": 9}).result(timeout=30)["loss"] == 3

    def test_refuses_attempts_below_1(self):
        with pytest.raises(ValueError, match="attempts must be at least 1, found 0"):
            self.executor(attempts=0)


DRIVER = """
import functools, sys
from archscale_jax.sweeps import run_study
from archscale_jax.sweeps.ray_executor import RayExecutor, connected
from tests.trials import work

address, journal, folder, count = sys.argv[1:]
trials = [{"index": index, "seconds": 0.3} for index in range(int(count))]
run = functools.partial(work, folder=folder)
with connected(address, log_to_driver=False):
    run_study(trials, run, journal, executor=RayExecutor(num_cpus=1), progress=False)
"""


def test_a_driver_that_is_killed_goes_on_with_what_is_missing(cluster, tmp_path):
    journal, starts = tmp_path / "results.jsonl", tmp_path / "starts"
    starts.mkdir()
    command = [sys.executable, "-c", DRIVER, cluster.address, str(journal), str(starts), "10"]

    def start():
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    with start() as process:
        while process.poll() is None and len(read_records(journal)) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = {record["trial"]["index"] for record in read_records(journal)}
    assert 3 <= len(kept) < 10
    with start() as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    trials = [{"index": index, "seconds": 0.3} for index in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as executor:
        assert journal.read_bytes() == study(trials, tmp_path / "one.jsonl", executor=executor)
    assert {index for index, count in starts_in(starts).items() if count > 1}.isdisjoint(kept)


class TestAddresses:
    """No address may cost more than ten seconds, or the journal."""

    def refused(self, address, error):
        from archscale_jax.sweeps.ray_executor import connected

        start = time.monotonic()
        with pytest.raises(error) as found, connected(address):
            pass
        assert time.monotonic() - start < 10
        return str(found.value)

    @pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:ray", ":6379"])
    def test_that_are_none(self, address):
        assert "host:port" in self.refused(address, ValueError)

    @pytest.mark.parametrize("scheme", ["", "ray://"])
    def test_where_nobody_listens(self, scheme):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        message = self.refused(f"{scheme}127.0.0.1:{port}", ConnectionError)
        assert f"no Ray cluster answers at {scheme}127.0.0.1:{port}" in message

    def test_where_something_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            assert "is no Ray head" in self.refused(address, ConnectionError)

    def test_without_ray(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert "archscale_jax[ray]" in self.refused(None, ImportError)
