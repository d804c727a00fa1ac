"""How fast are path statistics? `python -m benchmarks.paths` takes one to two minutes.

* All 59,049 five-vertex DAG strings: one batched call against walking every path in Python.
* The complete graph of 1,000 vertices, which has 2^998 paths.
* A sparse graph of 100,000 vertices and 1,000,000 edges: time and peak memory.
* Cost against number of edges, drawn to `docs/figures/paths_scaling.png`.
"""

import functools
from collections.abc import Iterator

import jax
import jraph
import numpy as np

from archscale_jax._graph import Operator, build_graph, is_weight
from archscale_jax._paths import batched_path_statistics, path_statistics
from archscale_jax._spaces import random_sparse_dag
from benchmarks import common, figures

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000, 400_000)
FAMILIES = {  # how many vertices for so many edges
    "10 edges per vertex": lambda num_edges: num_edges // 10,
    "a chain and 30 edges": lambda num_edges: num_edges - 29,
}


def main() -> None:
    # The large graph first: a child process inherits the peak memory of its parent.
    large, five, complete = common.sized((100_000, 5, 1_000), (1_000, 3, 50))
    rounds = common.sized(7, 2)
    results = {
        "large": common.in_fresh_process(large_graph, large, 10 * large),
        "five_vertices": enumeration(five, rounds),
        "complete": complete_graph(complete, rounds),
        "scaling": scaling(common.sized(SIZES, SIZES[:2])),
    }
    common.show("Path statistics, median (quartiles)", [["what", "found"], *lines(results)])
    if common.write_results("paths", results, "jraph"):
        figures.draw(figures.paths_scaling)


def batch_of_all(num_vertices: int) -> jraph.GraphsTuple:
    """Batches all DAG strings of so many vertices in their order, those without a path included."""
    receivers, senders = np.tril_indices(num_vertices, k=-1)
    operators = np.indices((3,) * senders.size, np.int32).reshape(senders.size, -1).T
    present = operators != Operator.ZERO
    num_graphs = len(operators)
    offsets = num_vertices * np.arange(num_graphs, dtype=np.int32)[:, None]
    return jraph.GraphsTuple(
        nodes=np.tile(np.arange(num_vertices, dtype=np.int32), num_graphs),
        edges={
            "operator": operators[present],
            "kernel_size": np.ones(np.count_nonzero(present), np.int32),
        },
        senders=(offsets + senders)[present].astype(np.int32),
        receivers=(offsets + receivers)[present].astype(np.int32),
        n_node=np.full(num_graphs, num_vertices, np.int32),
        n_edge=np.count_nonzero(present, axis=1).astype(np.int32),
        globals={"space": np.zeros(num_graphs, np.int32)},
    )


def adjacency_lists(batch: jraph.GraphsTuple) -> list[list[list[tuple[int, bool]]]]:
    """Lists (target, whether it is a weight edge) for every vertex of every graph."""
    graphs = [[[] for _ in range(count)] for count in batch.n_node.tolist()]
    owners = np.repeat(np.arange(len(graphs)), batch.n_edge)
    first = np.repeat(np.cumsum(batch.n_node) - batch.n_node, batch.n_edge)
    columns = (owners, batch.senders - first, batch.receivers - first, is_weight(batch))
    for owner, sender, *edge in zip(*(column.tolist() for column in columns), strict=True):
        graphs[owner][sender].append(tuple(edge))
    return graphs


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


def enumeration(num_vertices: int, rounds: int, calls: int = 5) -> dict:
    """Compares one batched call with following the paths of every graph."""
    host = batch_of_all(num_vertices)
    device = jax.device_put(host)
    batched = functools.partial(batched_path_statistics, device, max_vertices=num_vertices)
    found, first_call = common.timed(batched)
    graphs = adjacency_lists(host)
    _check(found, np.array([walk_depths(graph) for graph in graphs]))
    programs = {
        "building": lambda: batch_of_all(num_vertices),
        "enumeration": lambda: [enumerate_paths(graph) for graph in graphs],
        "batched": lambda: [jax.block_until_ready(batched()) for _ in range(calls)],
        "walk": lambda: [walk_depths(graph) for graph in graphs],
    }
    times = common.alternate(programs, rounds=rounds)
    times["batched"] = [elapsed / calls for elapsed in times["batched"]]
    return {
        "graphs": len(graphs),
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


def complete_graph(num_vertices: int, rounds: int) -> dict:
    """Times the complete graph, all of whose edges are linear."""
    senders, receivers = np.triu_indices(num_vertices, k=1)
    graph = build_graph(num_vertices, senders, receivers, np.full(senders.size, Operator.LINEAR))
    times = common.alternate({"exact": lambda: path_statistics(graph)}, rounds=rounds)
    return {"exact_seconds": common.spread(times["exact"])}


def large_graph(num_vertices: int, num_edges: int) -> dict:
    """Measures a large graph, in a process of its own, whose peak memory is nobody else's."""
    started = common.peak_memory()
    graph = random_sparse_dag(0, num_vertices, num_edges)
    built = common.peak_memory()
    _, seconds = common.timed(lambda: path_statistics(graph))
    return {
        "vertices": num_vertices,
        "edges": num_edges,
        "seconds": seconds,
        "peak_bytes": common.peak_memory(),
        "peak_bytes_after_imports": started,
        "peak_bytes_after_building": built,
    }


def scaling(sizes: tuple[int, ...], rounds: int = 3) -> dict:
    """Times exact statistics of sparse graphs of growing size.

    Numbers of paths grow with the graph in the one family and stay short in the other, so that the
    length of the integers and the number of edges can be told apart.
    """
    graphs = {
        (family, size): random_sparse_dag(0, num_vertices(size), size)
        for family, num_vertices in FAMILIES.items()
        for size in sizes
    }
    counts = {key: path_statistics(graph).count for key, graph in graphs.items()}  # warms up too
    calls = {key: max(1, 100_000 // key[1]) for key in graphs}  # so that short times say something
    programs = {
        key: lambda key=key: [path_statistics(graphs[key]) for _ in range(calls[key])]
        for key in graphs
    }
    times = common.alternate(programs, rounds=rounds, warm_up=0)
    measured = {}
    for family in FAMILIES:
        keys = [(family, size) for size in sizes]
        seconds = [common.spread(np.divide(times[key], calls[key])) for key in keys]
        slope, offset = np.polyfit(np.log(sizes), np.log([one.median for one in seconds]), 1)
        measured[family] = {
            "edges": sizes,
            "seconds": seconds,
            "bits_of_count": [counts[key].bit_length() for key in keys],
            "slope": slope,
            "seconds_at_one_edge": np.exp(offset),
        }
    return measured


def lines(results: dict) -> Iterator[list[str]]:
    """Lays the results out: what, and what was found."""
    five, complete, large = results["five_vertices"], results["complete"], results["large"]
    every = f"all {five['graphs']:,} DAG strings"
    for what, key in (
        ("building the batch", "building"),
        ("batched call", "batched"),
        ("recursive enumeration in Python", "enumeration"),
        ("depths only", "walk"),
    ):
        yield [f"{every}: {what}", f"{five[f'{key}_seconds']:.3g} s"]
    yield [f"{every}: first batched call, compiles", f"{five['first_call_seconds']:.3g} s"]
    yield [f"{every}: enumeration / batched", f"{five['enumeration_over_batched']:.0f}"]
    yield [f"{every}: depths only / batched", f"{five['walk_over_batched']:.0f}"]
    yield ["complete graph: exact", f"{complete['exact_seconds']:.3g} s"]
    graph = f"{large['vertices']:,} vertices, {large['edges']:,} edges"
    yield [f"{graph}: exact, first call", f"{large['seconds']:.2f} s"]
    peak, imports = (large[key] / 2**30 for key in ("peak_bytes", "peak_bytes_after_imports"))
    yield [f"{graph}: peak memory", f"{peak:.2f} GiB, {imports:.2f} of it imports"]
    for family, one in results["scaling"].items():
        columns = (one[key] for key in ("edges", "seconds", "bits_of_count"))
        for edges, seconds, bits in zip(*columns, strict=True):
            yield [f"{family}: {edges:,} edges, P of {bits:,} bits", f"{seconds:.3g} s"]
        yield [f"{family}: slope over all sizes", f"{one['slope']:.2f}"]


if __name__ == "__main__":
    common.run(main)
