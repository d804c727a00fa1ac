"""Does a study survive `kill -9`? `python -m benchmarks.kill_study`, about ten minutes.

Runs a small transfer study on digits undisturbed, in threads, then again, disturbed at random
moments: its driver is killed and started anew. With --runner=ray it runs on a Ray cluster of three
nodes on the loopback address; workers are killed too, and one node is removed for good. What both
leave must have the same bytes: the journals (so nothing is lost and nothing doubled), the tables
and the summary.

    python -m benchmarks.kill_study --runner=ray --kills=10 --worker_kills=50 --node_removals=1
"""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
from absl import app, flags

from benchmarks import common

FLAGS = flags.FLAGS
flags.DEFINE_enum("runner", "local", ["local", "processes", "ray"], "Runner of the study.")
flags.DEFINE_integer("kills", 20, "Kills of the driver.", lower_bound=0)
flags.DEFINE_integer("worker_kills", 0, "Kills of workers, of `processes` and `ray`.")
flags.DEFINE_integer("node_removals", 0, "Nodes of `ray` that vanish.", upper_bound=2)
flags.DEFINE_integer("max_networks", 13, "Networks of the study.", lower_bound=2)
flags.DEFINE_integer("workers", 2, "Networks at a time; Ray's nodes have a core each.")
flags.DEFINE_integer("seed", 0, "Seed of the moments.")

JOURNALS = ("results.jsonl", "measurements.jsonl")
COMPARED = (*JOURNALS, "table.md", "summary.json", "config.json")
NODES = 3
EVENTS = ("driver", "worker", "node")


class Cluster(NamedTuple):
    """A Ray cluster, its nodes that may vanish, and how a study is told of it."""

    cluster: Any
    nodes: list[Any]
    flags: tuple[str, ...]


def main() -> None:
    if FLAGS.node_removals and FLAGS.runner != "ray":
        raise app.UsageError("--node_removals needs --runner=ray")
    if FLAGS.worker_kills and FLAGS.runner == "local":
        raise app.UsageError("--worker_kills needs --runner=processes or --runner=ray")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        study = _study(folder / "undisturbed", ["--runner=local"])
        _, seconds = common.timed(study.communicate)
        expected = _contents(folder / "undisturbed")
        with _cluster() as cluster:
            done, finished = _disturb(folder, cluster, seconds)
        for workdir in finished:
            _compare(workdir, expected)
    counts = {event: sum(one["event"] == event for one in done) for event in EVENTS}
    killed = [str(counts[event]) for event in EVENTS]
    common.show(
        f"A study of {seconds:.0f} s, disturbed; same bytes as undisturbed: {', '.join(COMPARED)}",
        [["runner", *(f"{event}s" for event in EVENTS), "runs"],
         [FLAGS.runner, *killed, str(len(finished))]],
    )  # fmt: skip
    results = {
        "runner": FLAGS.runner,
        "events": done,
        "counts": counts,
        "studies": len(finished),
        "identical": True,
        "files": COMPARED,
        "seconds_undisturbed": seconds,
    }
    name = "kill_study" if FLAGS.runner == "local" else f"kill_study_{FLAGS.runner}"
    common.write_results(name, results)


def _disturb(
    folder: pathlib.Path, cluster: Cluster | None, seconds: float
) -> tuple[list[dict[str, Any]], list[pathlib.Path]]:
    """Runs studies until all events have taken place; returns these, and what was finished."""
    moments = random.Random(FLAGS.seed)
    numbers = (common.sized(FLAGS.kills, 1), FLAGS.worker_kills, FLAGS.node_removals)
    events = [event for event, count in zip(EVENTS, numbers, strict=True) for _ in range(count)]
    moments.shuffle(events)
    options = [f"--runner={FLAGS.runner}", *(cluster.flags if cluster else ())]
    done: list[dict[str, Any]] = []
    finished: list[pathlib.Path] = []
    workdir, process = folder / "disturbed_0", _study(folder / "disturbed_0", options)
    while len(done) < len(events):
        event = events[len(done)]
        # Half of a run at most, so that the moments fall everywhere while it gets ahead; workers
        # are many, and a trial that always loses its worker gets nowhere.
        longest = seconds / 2 if event == "driver" else seconds / 10
        try:
            process.communicate(timeout=moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            if _strike(event, process, cluster, moments):
                done.append({"event": event, "records": _count(workdir)})
                print(f"{event} {len(done)}: {done[-1]['records']} records", file=sys.stderr)
            if event == "driver":
                process = _study(workdir, options)
            continue
        _check(process)
        finished.append(workdir)  # between two events: begin another
        workdir = folder / f"disturbed_{len(finished)}"
        process = _study(workdir, options)
    process.communicate()
    _check(process)
    return done, [*finished, workdir]


def _strike(
    event: str, process: subprocess.Popen, cluster: Cluster | None, moments: random.Random
) -> bool:
    """Kills what the event names; False where nothing is there that computes."""
    if event == "driver":
        process.kill()
        process.communicate()
        return True
    if event == "node":
        assert cluster is not None
        cluster.cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
        return True
    busy = sorted(_workers(process), key=lambda one: one.pid)
    if busy:
        moments.choice(busy).kill()
    return bool(busy)


def _workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes that compute a trial now."""
    found = []
    ray = FLAGS.runner == "ray"
    for one in psutil.process_iter() if ray else psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            line = " ".join(one.cmdline())
            if line.startswith("ray::_call_where_same") if ray else "spawn_main" in line:
                found.append(one)
    return found


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster | None]:
    """Starts a Ray cluster of a head without cores and nodes with one each, where it is needed."""
    if FLAGS.runner != "ray":
        yield None
        return
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # no address but the loopback
    os.environ["JAX_PLATFORMS"] = "cpu"
    from ray.cluster_utils import Cluster as RayCluster

    node = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    found = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    nodes = [found.add_node(num_cpus=1, **node) for _ in range(NODES)]
    try:
        yield Cluster(found, nodes, (f"--ray_address={found.address}", "--attempts=20"))
    finally:
        found.shutdown()


def _study(workdir: pathlib.Path, options: list[str]) -> subprocess.Popen:
    """Starts the study. Output goes nowhere: a pipe would outlive the killed process."""
    command = [sys.executable, "-m", "experiments.transfer", f"--workdir={workdir}"]
    command += ["--study=chains", f"--max_networks={FLAGS.max_networks}", "--width=16"]
    command += ["--batch_size=64", "--num_seeds=2", f"--workers={FLAGS.workers}", *options]
    environment, nowhere = os.environ | {"JAX_PLATFORMS": "cpu"}, subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=common.ROOT, env=environment, stdout=nowhere, stderr=nowhere
    )


def _check(process: subprocess.Popen) -> None:
    if process.returncode:
        raise RuntimeError(f"the study ended with status {process.returncode}")


def _count(workdir: pathlib.Path) -> int:
    """Number of whole records in the journals."""
    paths = [workdir / name for name in JOURNALS]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def _contents(workdir: pathlib.Path) -> dict[str, bytes]:
    contents = {name: (workdir / name).read_bytes() for name in COMPARED}
    for name in JOURNALS:
        hashes = [json.loads(line)["hash"] for line in contents[name].splitlines()]
        if len(set(hashes)) != FLAGS.max_networks or len(hashes) != FLAGS.max_networks:
            raise RuntimeError(f"{name} holds {len(hashes)} records of {FLAGS.max_networks} trials")
    return contents


def _compare(workdir: pathlib.Path, expected: dict[str, bytes]) -> None:
    found = _contents(workdir)
    if different := [name for name in COMPARED if found[name] != expected[name]]:
        raise RuntimeError(f"{', '.join(different)} differ from those of the undisturbed study")


if __name__ == "__main__":
    common.run(main)
