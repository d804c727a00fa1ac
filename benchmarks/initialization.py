"""Which initialization keeps second moments equal? `python -m benchmarks.initialization`, minutes.

* Random graphs with weight edges alone and with skips: largest over smallest second moment, by rule
  and by what vertices sum, drawn to `docs/figures/initialization.png`.
* The same for graphs of five vertices.
* Width: how much of the ratio is noise of a finite width.
* `branch_share` of the rule `second_moment`: growth against what the branches contribute.

Second moments are means over inputs and features of networks at their initialization.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import nnx

from archscale_jax._architecture import Architecture, Arrangement
from archscale_jax._graph import is_weight, live_edges, live_vertices
from archscale_jax._initialize import initialize
from archscale_jax._spaces import dag_graph, random_dag_string
from archscale_jax._trees import map_with_names
from archscale_jax.rules import INITIALIZATION_RULES, weight_standard_deviations
from benchmarks import common, figures
from experiments.lab.models import DagMLP

KINDS = {"weights alone": (1 / 2, 0, 1 / 2), "with skips": (1 / 3, 1 / 3, 1 / 3)}
RULES = (
    "target_in_degree",
    "source_in_degree",
    "he_normal",
    "chen2024_code",
    "second_moment",
)
SHARES = (0, 0.05, 0.25, 1)
PANELS = {  # what vertices sum, and where it is measured
    "pre-activations, at vertices": (Arrangement.PRE_ACTIVATION, "vertices"),
    "activations, at vertices": (Arrangement.ACTIVATION, "vertices"),
    "activations, what layers see": (Arrangement.ACTIVATION, "layers"),
}
BLOCKS = {  # operators of the two edges of a branch, and what vertices sum
    "18 blocks z + W σ(z)": ("12", Arrangement.PRE_ACTIVATION),
    "18 blocks z + W₂ σ(W₁ σ(z))": ("22", Arrangement.PRE_ACTIVATION),
    "18 blocks z + W σ(z), W σ(z) a vertex": ("21", Arrangement.PRE_ACTIVATION),
    "18 blocks h + σ(W h)": ("12", Arrangement.ACTIVATION),
}


class Size(NamedTuple):
    """How much is done."""

    width: int = 512
    inputs: int = 64
    networks_per_graph: int = 3
    graphs: int = 20
    widths: tuple[int, ...] = (128, 512, 2048)
    graphs_by_width: int = 8


QUICK = Size(16, 8, 1, 2, (16, 32), 2)


def main() -> None:
    size = common.sized(Size(), QUICK)
    results = {
        "settings": size._asdict() | {kind: random_graphs(kind, size.graphs) for kind in KINDS},
        "rules": compare_rules(size),
        "five_vertices": compare_rules(size, (5,)),
        "widths": compare_widths(size),
        "shares": compare_shares(size),
    }
    for title, lines in tables(results).items():
        common.show(title, lines)
    if common.write_results("initialization", results):
        figures.draw(figures.initialization)


def random_graphs(kind: str, count: int, sizes: tuple[int, ...] = (5, 6, 7, 8)) -> list[str]:
    """Draws DAG strings of these numbers of vertices in turn, every edge on its own."""
    return [
        random_dag_string(seed, sizes[seed % len(sizes)], probabilities=KINDS[kind])
        for seed in range(count)
    ]


def block_chain(branch: str, num_blocks: int = 18) -> str:
    """Chains residual blocks; `branch` holds the two operators of the branch, `1` or `2` each."""
    groups: list[str] = []
    for start in range(0, 2 * num_blocks, 2):
        groups += ["0" * start + branch[0], "0" * start + "1" + branch[1]]
    return "_".join(groups)


def with_share(share: float):
    """Returns the rule `second_moment` with another branch share."""
    return functools.partial(
        INITIALIZATION_RULES.resolve("second_moment"), **{"branch_share": share}
    )


def second_moments(
    text: str,
    arrangement: Arrangement,
    rules: Mapping[str, Any],
    size: Size,
) -> dict[str, dict[str, np.ndarray]]:
    """Measures networks on standard-normal inputs.

    Returns:
      By rule: `vertices` [draws, vertices on an end-to-end path], second moments of features;
      `layers` [draws, stem and weight edges on such a path], those of W h, where activations are
      summed; `new_part` [draws], the part of the last vertex that no multiple of vertex 0 explains.
    """
    graph, width = dag_graph(text), size.width
    shapes = nnx.eval_shape(
        lambda: DagMLP(
            graph, width, width, 1, arrangement=arrangement, use_bias=False, rngs=nnx.Rngs(0)
        )
    )
    graphdef, params = nnx.split(shapes)
    architecture = shapes.architecture()
    deviations = {
        name: weight_standard_deviations(architecture, rule) for name, rule in rules.items()
    }
    he = weight_standard_deviations(architecture, "he_normal")
    factors = {
        weight: jnp.array([deviations[name][weight] / he[weight] for name in rules])
        for weight in he
    }
    vertices = np.flatnonzero(live_vertices(graph)).tolist()
    edges = np.column_stack([graph.senders, graph.receivers])[live_edges(graph) & is_weight(graph)]

    def measure(factors, drawn, inputs):
        weights = map_with_names(lambda name, leaf: leaf * factors[name], drawn)
        network = nnx.merge(graphdef, weights)
        features = network.features(inputs)
        found = {"vertices": [_mean_square(features[vertex]) for vertex in vertices]}
        if arrangement == Arrangement.ACTIVATION:
            found["layers"] = [_mean_square(network.stem(inputs))] + [
                _mean_square(network.layers[f"{sender}_{receiver}"](features[sender]))
                for sender, receiver in edges.tolist()
            ]
        product = jnp.mean(features[0] * features[-1])
        explained = product**2 / _mean_square(features[0]) / _mean_square(features[-1])
        return found | {"new_part": 1 - explained}

    measured = []
    for key in jax.random.split(jax.random.key(0), size.networks_per_graph):
        # For one key, `initialize` draws the same numbers by every rule but for the deviation.
        drawn = initialize(key, params, architecture, "he_normal")
        inputs = jax.random.normal(jax.random.fold_in(key, 1), (size.inputs, width))
        measured.append(jax.vmap(measure, in_axes=(0, None, None))(factors, drawn, inputs))
    stacked = {
        quantity: np.array([jax.device_get(one[quantity]) for one in measured], float)
        for quantity in measured[0]
    }  # [draws, places, rules] or [draws, rules]
    return {
        name: {quantity: values[..., index] for quantity, values in stacked.items()}
        for index, name in enumerate(rules)
    }


def _mean_square(feature: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(feature))


def ratio(moments: np.ndarray) -> np.ndarray:
    """Returns largest over smallest of moments [..., places]; inf where one is 0."""
    with np.errstate(divide="ignore"):
        return moments.max(axis=-1) / moments.min(axis=-1)


def summary(moments: list[np.ndarray]) -> dict[str, Any]:
    """Sums up max/min over graphs, each the median over its networks.

    `averaged` takes the ratio of moments averaged over the networks of a graph, which excludes
    part of the noise of a finite width.
    """
    by_graph = [float(np.median(ratio(of_graph))) for of_graph in moments]
    averaged = [float(ratio(of_graph.mean(axis=0))) for of_graph in moments]
    return {
        "spread": common.spread(by_graph),
        "worst": max(by_graph),
        "averaged": {"spread": common.spread(averaged), "worst": max(averaged)},
        "by_graph": by_graph,
    }


def compare_rules(size: Size, vertices: tuple[int, ...] = (5, 6, 7, 8)) -> dict:
    """Measures max/min of random graphs: panel -> kind of graph -> rule -> `summary`."""
    rules: dict[str, Any] = {rule: rule for rule in RULES}
    results: dict = {panel: {} for panel in PANELS}
    for kind, arrangement in itertools.product(KINDS, Arrangement):
        graphs = random_graphs(kind, size.graphs, vertices)
        measured = [second_moments(text, arrangement, rules, size) for text in graphs]
        for panel, (summed, place) in PANELS.items():
            if summed == arrangement:
                results[panel][kind] = {
                    rule: summary([of_graph[rule][place] for of_graph in measured])
                    for rule in RULES
                }
    return results


def compare_widths(size: Size) -> dict:
    """Measures `second_moment` where it is exact at infinite width: weights, pre-activations."""
    graphs = random_graphs("weights alone", size.graphs_by_width)
    rules, results = {"second_moment": "second_moment"}, {}
    for width in size.widths:
        one = size._replace(width=width, networks_per_graph=1)
        measured = [second_moments(text, Arrangement.PRE_ACTIVATION, rules, one) for text in graphs]
        results[width] = summary([of_graph["second_moment"]["vertices"] for of_graph in measured])
    return results


def compare_shares(size: Size) -> dict:
    """Measures `second_moment` by branch share: `random` graphs with skips, residual `blocks`."""
    rules = {f"{share:g}": with_share(share) for share in SHARES}
    graphs = random_graphs("with skips", size.graphs)
    results: dict = {"random": {}, "blocks": {}}
    for arrangement in Arrangement:
        measured = [second_moments(text, arrangement, rules, size) for text in graphs]
        results["random"][arrangement.value] = {
            share: summary([of_graph[share]["vertices"] for of_graph in measured])
            for share in rules
        }
    rules = {"target_in_degree": "target_in_degree"} | rules
    for name, (branch, arrangement) in BLOCKS.items():
        text = block_chain(branch)
        results["blocks"][name] = {
            rule: {
                "ratio": float(np.median(ratio(found["vertices"]))),
                "new_part": float(np.median(found["new_part"])),
                "smallest_over_he": _smallest_over_he(dag_graph(text), arrangement, rules[rule]),
            }
            for rule, found in second_moments(text, arrangement, rules, size).items()
        }
    return results


def _smallest_over_he(graph: jraph.GraphsTuple, arrangement: Arrangement, rule) -> float:
    edges = INITIALIZATION_RULES.resolve(rule)(Architecture(graph, (), arrangement)).edges
    return float(np.sqrt(edges[is_weight(graph)].min() / 2))


def tables(results: dict) -> dict[str, list[list[str]]]:
    """Lays the results out: by the title of the table, its lines, heading first."""
    widths, shares = results["widths"], results["shares"]
    by_share = [f"share {share:g}" for share in SHARES]
    return {
        "max/min second moment, median (quartiles) and worst": _rule_lines(results["rules"]),
        "the same for five vertices": _rule_lines(results["five_vertices"]),
        "rule moment, pre-activations, weights alone: max/min of one network each": [
            ["width", "median (quartiles), worst"],
            *([f"{width:,}", _spread(one)] for width, one in widths.items()),
        ],
        "rule moment, with skips, at vertices: max/min by branch share": [
            ["vertices sum", *by_share],
            *(
                [summed, *map(_spread, found.values())]
                for summed, found in shares["random"].items()
            ),
        ],
        "residual blocks: max/min, part of the output that is new, smallest std over He's": [
            ["network", "rule target", *by_share],
            *([name, *map(_block, found.values())] for name, found in shares["blocks"].items()),
        ],
    }


def _rule_lines(rules: dict) -> list[list[str]]:
    lines = [["vertices sum, measured", "graphs", *RULES]]
    for panel, kind in itertools.product(PANELS, KINDS):
        lines.append([panel, kind, *(_spread(rules[panel][kind][rule]) for rule in RULES)])
    return lines


def _spread(one: dict) -> str:
    digits = 2 if one["worst"] < 100 else 0
    return f"{one['spread']:.{digits}f}, {one['worst']:.{digits}f}"


def _block(one: dict) -> str:
    size = f"{one['ratio']:.2f}" if one["ratio"] < 100 else f"{one['ratio']:,.0f}"
    return f"{size}, {one['new_part']:.0%}, {one['smallest_over_he']:.2f}"


if __name__ == "__main__":
    common.run(main)
