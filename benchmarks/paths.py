"""How fast are path statistics? `python -m benchmarks.paths` takes one to two minutes.

* All 59,049 five-vertex DAG strings: one batched call against walking every path in Python.
* The complete graph of 1,000 vertices, which has 2^998 paths.
* A sparse graph of 100,000 vertices and 1,000,000 edges: time and peak memory.
* Cost against number of edges, drawn to `docs/figures/paths_scaling.png`.
"""

import concurrent.futures
import functools
import multiprocessing
import pathlib
import resource
import sys

import jax
import jraph
import matplotlib.figure
import numpy as np
import rich.console
import rich.table

from archscale_jax._graph import Operator, build_graph, is_weight
from archscale_jax._paths import batched_path_statistics, path_statistics
from archscale_jax._spaces import random_sparse_dag
from benchmarks import common

FIGURE = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "paths_scaling.png"
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000, 400_000)
FAMILIES = {  # how many vertices for so many edges
    "10 edges per vertex": lambda num_edges: num_edges // 10,
    "a chain and 30 edges": lambda num_edges: num_edges - 29,
}


def five_vertex_batch() -> jraph.GraphsTuple:
    """Batches all DAG strings of five vertices in their order, those without a path included."""
    receivers, senders = np.tril_indices(5, k=-1)
    operators = np.indices((3,) * senders.size, np.int32).reshape(senders.size, -1).T
    present = operators != Operator.ZERO
    num_graphs = len(operators)
    offsets = 5 * np.arange(num_graphs, dtype=np.int32)[:, None]
    return jraph.GraphsTuple(
        nodes=np.tile(np.arange(5, dtype=np.int32), num_graphs),
        edges={
            "operator": operators[present],
            "kernel_size": np.ones(np.count_nonzero(present), np.int32),
        },
        senders=(offsets + senders)[present].astype(np.int32),
        receivers=(offsets + receivers)[present].astype(np.int32),
        n_node=np.full(num_graphs, 5, np.int32),
        n_edge=np.count_nonzero(present, axis=1).astype(np.int32),
        globals={"space": np.zeros(num_graphs, np.int32)},
    )


def single_graphs(batch: jraph.GraphsTuple) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Splits a batch into number of vertices, senders, receivers and weight flags of each graph."""
    cuts = np.cumsum(batch.n_edge)[:-1]
    offsets = np.repeat(np.cumsum(batch.n_node) - batch.n_node, batch.n_edge)
    columns = (batch.senders - offsets, batch.receivers - offsets, is_weight(batch))
    split = (np.split(column, cuts) for column in columns)
    return list(zip(batch.n_node.tolist(), *split, strict=True))


def outgoing_edges(num_vertices, senders, receivers, weight):
    """Lists (target, 1 for a weight edge) for every vertex."""
    outgoing = [[] for _ in range(num_vertices)]
    for sender, receiver, depth in zip(
        senders.tolist(), receivers.tolist(), weight.tolist(), strict=True
    ):
        outgoing[sender].append((receiver, depth))
    return outgoing


def enumerate_paths(outgoing):
    """Statistics of a graph by listing each of its paths; what one would write first."""
    output = len(outgoing) - 1

    def paths(vertex):
        if vertex == output:
            yield []
        for target, weight in outgoing[vertex]:
            for rest in paths(target):
                yield [weight, *rest]

    return summed_up([sum(path) for path in paths(0)])


def walk_depths(outgoing):
    """The same by carrying nothing but the depth along; hard to do faster in Python."""
    output = len(outgoing) - 1
    depths = []

    def walk(vertex, depth):
        if vertex == output:
            depths.append(depth)
        for target, weight in outgoing[vertex]:
            walk(target, depth + weight)

    walk(0, 0)
    return summed_up(depths)


def summed_up(depths):
    cubes = sum(depth**3 for depth in depths)
    return len(depths), sum(depths), cubes, min(depths, default=-1), max(depths, default=-1)


def enumeration(rounds: int = 7, calls: int = 5) -> dict:
    """Compares one batched call with following the paths of every five-vertex graph."""
    building = common.alternate({"batch": five_vertex_batch}, rounds=rounds)["batch"]
    host = five_vertex_batch()
    device = jax.device_put(host)
    batched = functools.partial(batched_path_statistics, max_vertices=5)
    first_call = common.seconds(lambda: batched(device))
    graphs = single_graphs(host)
    prepared = [outgoing_edges(*graph) for graph in graphs]
    _check(batched(device), np.array([walk_depths(outgoing) for outgoing in prepared]))

    def batched_calls(graphs):
        return [jax.block_until_ready(batched(graphs)) for _ in range(calls)]

    times = common.alternate(
        {
            "enumeration": lambda: [enumerate_paths(outgoing_edges(*graph)) for graph in graphs],
            "batched": lambda: batched_calls(device),
            "walk": lambda: [walk_depths(outgoing) for outgoing in prepared],
            "batched_from_host": lambda: batched_calls(host),
        },
        rounds=rounds,
    )
    for name in ("batched", "batched_from_host"):
        times[name] = [elapsed / calls for elapsed in times[name]]
    return {
        "graphs": len(graphs),
        "building_seconds": common.spread(building),
        "first_call_seconds": first_call,
        **{f"{name}_seconds": common.spread(sample) for name, sample in times.items()},
        "enumeration_over_batched": common.ratio(times["enumeration"], times["batched"]),
        "walk_over_batched": common.ratio(times["walk"], times["batched"]),
    }


def _check(batched, walked) -> None:
    count, depth_sum, depth_cubed_sum, min_depth, max_depth = walked.T
    paths = np.exp2(batched.log2_count)
    np.testing.assert_allclose(paths, count, rtol=1e-5)
    np.testing.assert_allclose(paths * batched.mean_depth, depth_sum, rtol=1e-5)
    np.testing.assert_allclose(paths * batched.mean_depth_cubed, depth_cubed_sum, rtol=1e-5)
    np.testing.assert_array_equal(batched.min_depth, min_depth)
    np.testing.assert_array_equal(batched.max_depth, max_depth)


def complete_graph(rounds: int = 7, num_vertices: int = 1000) -> dict:
    """Times the complete graph, all of whose edges are linear."""
    senders, receivers = np.triu_indices(num_vertices, k=1)
    graph = build_graph(num_vertices, senders, receivers, np.full(senders.size, Operator.LINEAR))
    device = jax.device_put(graph)
    batched = functools.partial(batched_path_statistics, device, max_vertices=num_vertices)
    times = common.alternate(
        {"exact": lambda: path_statistics(graph), "batched": batched}, rounds=rounds
    )
    return {f"{name}_seconds": common.spread(sample) for name, sample in times.items()}


def large_graph(num_vertices: int = 100_000, num_edges: int = 1_000_000) -> dict:
    """Measures a large graph in a process of its own, whose peak memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_large_graph, num_vertices, num_edges).result()


def _large_graph(num_vertices: int, num_edges: int) -> dict:
    started = _peak_memory()
    graph = random_sparse_dag(0, num_vertices, num_edges)
    built = _peak_memory()
    elapsed = common.seconds(lambda: path_statistics(graph))
    return {
        "vertices": num_vertices,
        "edges": num_edges,
        "seconds": elapsed,
        "peak_bytes": _peak_memory(),
        "peak_bytes_after_imports": started,
        "peak_bytes_after_building": built,
    }


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def scaling(rounds: int = 3) -> dict:
    """Times exact statistics of sparse graphs of growing size.

    Numbers of paths grow with the graph in the one family and stay short in the other, so that the
    length of the integers and the number of edges can be told apart.
    """
    graphs = {
        (family, size): random_sparse_dag(0, num_vertices(size), size)
        for family, num_vertices in FAMILIES.items()
        for size in SIZES
    }
    counts = {key: path_statistics(graph).count for key, graph in graphs.items()}  # warms up too
    calls = {key: max(1, 100_000 // key[1]) for key in graphs}  # so that short times say something
    times = common.alternate(
        {
            key: lambda key=key: [path_statistics(graphs[key]) for _ in range(calls[key])]
            for key in graphs
        },
        rounds=rounds,
        warm_up=0,
    )
    measured = {}
    for family in FAMILIES:
        keys = [(family, size) for size in SIZES]
        seconds = [common.spread(np.divide(times[key], calls[key])) for key in keys]
        slope, offset = np.polyfit(np.log(SIZES), np.log([one.median for one in seconds]), 1)
        measured[family] = {
            "edges": SIZES,
            "seconds": seconds,
            "bits_of_count": [counts[key].bit_length() for key in keys],
            "slope": slope,
            "seconds_at_one_edge": np.exp(offset),
        }
    return measured


def draw(measured: dict) -> None:
    """Draws cost against number of edges, with the bits of the number of paths at every point."""
    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (family, one), marker in zip(measured.items(), "os", strict=True):
        edges, seconds = np.array(one["edges"]), np.array(one["seconds"])
        errors = np.abs(seconds[:, 1:].T - seconds[:, 0])
        points = axes.errorbar(edges, seconds[:, 0], errors, fmt=marker, capsize=3)
        lengths = {min(one["bits_of_count"]), max(one["bits_of_count"])}
        bits = " to ".join(f"{length:,}" for length in sorted(lengths))
        label = f"{family}: edges$^{{{one['slope']:.2f}}}$, P of {bits} bits"
        fitted = one["seconds_at_one_edge"] * edges ** one["slope"]
        axes.plot(edges, fitted, "--", color=points[0].get_color(), label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="edges",
        ylabel="seconds (median, quartiles)",
        title="Exact path statistics of random sparse graphs\n"
        "Fits to all sizes; long numbers of paths P are part of the cost",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


def table(results: dict) -> rich.table.Table:
    """Lays the results out; the spread in brackets is the quartiles."""
    five, complete, large = results["five_vertices"], results["complete"], results["large"]
    shown = rich.table.Table("what", "median (quartiles)", title="Path statistics")

    def add(what, seconds, unit=1e3, name="ms"):
        scaled = common.Spread(*(unit * value for value in seconds))
        shown.add_row(what, f"{scaled:,.1f} {name}")

    shown.add_row(f"[b]all {five['graphs']:,} five-vertex DAG strings", "")
    add("  building the batch", five["building_seconds"])
    shown.add_row("  first batched call (compiles)", f"{1e3 * five['first_call_seconds']:,.0f} ms")
    add("  batched call, arrays on device", five["batched_seconds"])
    add("  batched call, arrays on host", five["batched_from_host_seconds"])
    add("  recursive enumeration in Python", five["enumeration_seconds"])
    add("  depths only, lists made beforehand", five["walk_seconds"])
    add("  enumeration / batched call", five["enumeration_over_batched"], 1, "times")
    add("  depths only / batched call", five["walk_over_batched"], 1, "times")
    shown.add_section()
    shown.add_row("[b]complete graph of 1,000 vertices", "")
    add("  exact", complete["exact_seconds"])
    add("  batched call with this graph alone", complete["batched_seconds"])
    shown.add_section()
    shown.add_row(f"[b]{large['vertices']:,} vertices, {large['edges']:,} edges", "")
    shown.add_row("  exact, first call", f"{large['seconds']:.2f} s")
    gibibytes = (large["peak_bytes"] / 2**30, large["peak_bytes_after_imports"] / 2**30)
    shown.add_row(
        "  peak memory of the process", "{:.2f} GiB, {:.2f} of it imports".format(*gibibytes)
    )
    for family, one in results["scaling"].items():
        shown.add_section()
        shown.add_row(f"[b]random graphs, {family}", "")
        for edges, seconds, bits in zip(
            one["edges"], one["seconds"], one["bits_of_count"], strict=True
        ):
            add(f"  {edges:,} edges, P of {bits:,} bits", seconds)
        shown.add_row("  slope over all sizes", f"{one['slope']:.2f}")
    return shown


def main() -> None:
    # The large graph first: a child process inherits the peak memory of its parent.
    results = {
        "large": large_graph(),
        "five_vertices": enumeration(),
        "complete": complete_graph(),
        "scaling": scaling(),
    }
    draw(results["scaling"])
    rich.console.Console().print(table(results))
    common.write_results("paths", results, "jraph", "matplotlib")


if __name__ == "__main__":
    main()
