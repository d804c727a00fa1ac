"""Studies on a Ray cluster end as those of one thread.

Run by tests/test_runners.py in one process: one cluster at a time is enough for two cores.
"""

import concurrent.futures
import functools
import tempfile
import time

import pytest

from experiments.lab.files import read_records
from experiments.lab.sweeps.versions import versions
from tests.test_runners import DEADLY, TRIALS, starts_in, study
from tests.trials import work

# A cluster starts its nodes by a fork that becomes another program at once: no lock is waited for.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

# A node that is gone refuses to be asked; one that is busy has ten seconds for its answer.
SOON_MISSED = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}


@pytest.fixture(scope="module")
def cluster():
    """A head with one core, on the loopback address."""
    with pytest.MonkeyPatch.context() as patch:
        # Before Ray is imported, here and by what is started: no address but 127.0.0.1.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
            patch.setenv("RAY_TMPDIR", folder)
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 1, "_system_config": SOON_MISSED}
            head |= {"node_ip_address": "127.0.0.1", "include_dashboard": False}
            found = Cluster(initialize_head=True, head_node_args=head)
            yield found
            found.shutdown()


@pytest.fixture(scope="module")
def connection(cluster):
    from experiments.lab.sweeps.ray_executor import connected

    with connected(cluster.address, log_to_driver=False):
        yield


@pytest.mark.usefixtures("connection")
class TestRay:
    def executor(self, **options):
        from experiments.lab.sweeps.ray_executor import RayExecutor

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

    def test_a_function_of_a_notebook_is_sent(self, tmp_path):
        factor = 3
        run = lambda trial: {"product": factor * trial["index"]}  # noqa: E731
        study(TRIALS[:2], tmp_path / "results.jsonl", run, executor=self.executor())
        records = read_records(tmp_path / "results.jsonl")
        assert [record["result"]["product"] for record in records] == [0, 3]

    def test_a_worker_of_another_version_computes_nothing(self, tmp_path, monkeypatch):
        from experiments.lab.sweeps import ray_executor

        journal = tmp_path / "results.jsonl"
        study(TRIALS[:2], journal)
        here = versions() | {"jax": "0.0.1"}
        monkeypatch.setattr(ray_executor, "versions", lambda packages=(): here)
        with pytest.raises(ray_executor.VersionError, match=r"has jax .* \(not 0\.0\.1\)"):
            study(TRIALS, journal, executor=self.executor())
        assert [record["trial"]["index"] for record in read_records(journal)] == [0, 1]

    def test_a_cancelled_future_cancels_its_task(self, tmp_path):
        executor = self.executor()
        trials = [{"index": index, "seconds": 60} for index in range(2)]
        futures = [executor.submit(work, trial, str(tmp_path)) for trial in trials]
        while not list(tmp_path.iterdir()):
            time.sleep(0.1)
        assert all(future.cancel() for future in futures)
        # The core is free again: this does not wait for a minute.
        assert executor.submit(work, {"index": 9}).result(timeout=30)["loss"] == 3

    def test_raises_on_attempts_below_1(self):
        with pytest.raises(ValueError, match="attempts must be at least 1, found 0"):
            self.executor(attempts=0)

    def test_a_node_that_vanishes_takes_no_trial_with_it(self, cluster, tmp_path):
        node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        trials = [{"index": index, "seconds": 0.3} for index in range(6)]
        journal = tmp_path / "two.jsonl"
        with concurrent.futures.ThreadPoolExecutor(1) as aside:
            running = aside.submit(study, trials, journal, executor=self.executor())
            while not read_records(journal):
                time.sleep(0.1)
            cluster.remove_node(node, allow_graceful=False)
            found = running.result()
        quick = functools.partial(study, trials, tmp_path / "one.jsonl")
        with concurrent.futures.ThreadPoolExecutor(6) as executor:
            assert found == quick(executor=executor)
