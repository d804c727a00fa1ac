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
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
from absl import app, flags
from rich.console import Console

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
ROOT = pathlib.Path(__file__).parents[1]


class Cluster(NamedTuple):
    """A Ray cluster, its nodes that may vanish, and how a study is told of it."""

    cluster: Any
    nodes: list[Any]
    flags: tuple[str, ...]


def main(arguments: list[str]) -> None:
    """Runs, disturbs, compares and writes the result."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    if FLAGS.node_removals and FLAGS.runner != "ray":
        raise app.UsageError("--node_removals needs --runner=ray")
    if FLAGS.worker_kills and FLAGS.runner == "local":
        raise app.UsageError("--worker_kills needs --runner=processes or --runner=ray")
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = pathlib.Path(folder) / "undisturbed"
        start = time.perf_counter()
        _study(undisturbed, ["--runner=local"]).communicate()
        seconds = time.perf_counter() - start
        expected = _contents(undisturbed)
        with _cluster(folder) as cluster:
            done, finished = _disturb(pathlib.Path(folder), cluster, seconds)
        for workdir in finished:
            _compare(workdir, expected)
    counts = {
        name: sum(one["event"] == name for one in done) for name in ("driver", "worker", "node")
    }
    found = {"runner": FLAGS.runner, "events": done, "counts": counts, "studies": len(finished)}
    name = "kill_study" if FLAGS.runner == "local" else f"kill_study_{FLAGS.runner}"
    extra = {"identical": True, "files": COMPARED, "seconds_undisturbed": seconds}
    path = common.write_results(name, found | extra)
    console = Console()
    killed = f"{counts['driver']} drivers and {counts['worker']} workers"
    console.print(
        f"{FLAGS.runner}: killed {killed}, removed {counts['node']} nodes, in {len(finished)} runs "
        f"of a study of {seconds:.0f} s"
    )
    console.print(f"same bytes as undisturbed: {', '.join(COMPARED)}")
    console.print(f"results: {path.relative_to(path.parents[2])}")


def _disturb(
    folder: pathlib.Path, cluster: Cluster | None, seconds: float
) -> tuple[list[dict[str, Any]], list[pathlib.Path]]:
    """Runs studies until all events have taken place; returns these, and what was finished."""
    moments = random.Random(FLAGS.seed)
    events = ["driver"] * FLAGS.kills + ["worker"] * FLAGS.worker_kills
    events += ["node"] * FLAGS.node_removals
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
def _cluster(folder: str) -> Iterator[Cluster | None]:
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
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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
    app.run(main)
