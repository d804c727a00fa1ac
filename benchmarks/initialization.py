"""Which initialization keeps second moments equal? `python -m benchmarks.initialization`, minutes.

* Random graphs with weight edges alone and with skips: largest over smallest second moment, by rule
  and by what vertices sum, drawn to `docs/figures/initialization.png`.
* The same for graphs of five vertices, beside the pilot of theory §3.
* Width: how much of the ratio is noise of a finite width.
* `branch_share` of the rule `moment`: growth against what the branches contribute.

Second moments are means over inputs and features of networks at their initialization. The tables
are also written into `docs/initialization.md`.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import matplotlib.figure
import numpy as np
import rich.console
import rich.table
from flax import nnx

from archscale_jax._architecture import Architecture, Arrangement
from archscale_jax._graph import is_weight, live_edges, live_vertices
from archscale_jax._initialize import initialize
from archscale_jax._spaces import dag_graph, random_dag_string
from archscale_jax._trees import map_with_names
from archscale_jax.rules import INITIALIZATION_RULES, weight_standard_deviations
from benchmarks import common
from experiments.lab.models import DagMLP

DOCS = pathlib.Path(__file__).parents[1] / "docs"
FIGURE, PAGE = DOCS / "figures" / "initialization.png", DOCS / "initialization.md"

NUM_GRAPHS = 20
KINDS = {"weights alone": (1 / 2, 0, 1 / 2), "with skips": (1 / 3, 1 / 3, 1 / 3)}
RULES = ("target", "source", "none", "author_code", "moment")
SHARES = (0, 0.05, 0.25, 1)
WIDTH, BATCH, DRAWS = 512, 64, 3
PANELS = {  # what vertices sum, and where it is measured
    "pre-activations, at vertices": (Arrangement.PRE_ACTIVATION, "vertices"),
    "activations, at vertices": (Arrangement.ACTIVATION, "vertices"),
    "activations, what layers see": (Arrangement.ACTIVATION, "layers"),
}
PILOT = {  # theory §3: target, source, none
    "pre-activations, at vertices": {
        "weights alone": (1.03, 2.5, 3.0),
        "with skips": (2.5, 4.8, 5.0),
    },
    "activations, at vertices": {"weights alone": (1.6, 4.1, 4.9), "with skips": (5.1, 6.2, 7.2)},
    "activations, what layers see": {
        "weights alone": (2.6, 1.07, 1.07),
        "with skips": (3.0, 1.07, 1.07),
    },
}
BLOCKS = {  # operators of the two edges of a branch, and what vertices sum
    "18 blocks z + W σ(z)": ("12", Arrangement.PRE_ACTIVATION),
    "18 blocks z + W₂ σ(W₁ σ(z))": ("22", Arrangement.PRE_ACTIVATION),
    "18 blocks z + W σ(z), W σ(z) a vertex": ("21", Arrangement.PRE_ACTIVATION),
    "18 blocks h + σ(W h)": ("12", Arrangement.ACTIVATION),
}


def random_graphs(kind: str, sizes: tuple[int, ...] = (5, 6, 7, 8)) -> list[str]:
    """Draws 20 DAG strings of these numbers of vertices in turn, every edge on its own."""
    return [
        random_dag_string(seed, sizes[seed % len(sizes)], probabilities=KINDS[kind])
        for seed in range(NUM_GRAPHS)
    ]


def block_chain(branch: str, num_blocks: int = 18) -> str:
    """Chains residual blocks; `branch` holds the two operators of the branch, `1` or `2` each."""
    groups: list[str] = []
    for start in range(0, 2 * num_blocks, 2):
        groups += ["0" * start + branch[0], "0" * start + "1" + branch[1]]
    return "_".join(groups)


def with_share(share: float):
    """Returns the rule `moment` with another branch share."""
    return functools.partial(INITIALIZATION_RULES.resolve("moment"), **{"branch_share": share})


def second_moments(
    text: str,
    arrangement: Arrangement,
    rules: Mapping[str, Any],
    *,
    width: int = WIDTH,
    draws: int = DRAWS,
) -> dict[str, dict[str, np.ndarray]]:
    """Measures networks on standard-normal inputs.

    Returns:
      By rule: `vertices` [draws, vertices on an end-to-end path], second moments of features;
      `layers` [draws, stem and weight edges on such a path], those of W h, where activations are
      summed; `new_part` [draws], the part of the last vertex that no multiple of vertex 0 explains.
    """
    graph = dag_graph(text)
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
    he = weight_standard_deviations(architecture, "none")
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
    for key in jax.random.split(jax.random.key(0), draws):
        # For one key, `initialize` draws the same numbers by every rule but for the deviation.
        drawn = initialize(key, params, architecture, "none")
        inputs = jax.random.normal(jax.random.fold_in(key, 1), (BATCH, width))
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
    """Returns largest over smallest of moments [..., places]."""
    return moments.max(axis=-1) / moments.min(axis=-1)


def summary(moments: list[np.ndarray]) -> dict[str, Any]:
    """Sums up max/min over graphs, each the median over its networks.

    `averaged` takes the ratio of moments averaged over the networks of a graph, which leaves out
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


def compare_rules(sizes: tuple[int, ...], names: tuple[str, ...]) -> dict:
    """Measures max/min of random graphs: panel -> kind of graph -> rule -> `summary`."""
    rules = dict(zip(names, names, strict=True))
    results: dict = {panel: {} for panel in PANELS}
    for kind, arrangement in itertools.product(KINDS, Arrangement):
        measured = [second_moments(text, arrangement, rules) for text in random_graphs(kind, sizes)]
        for panel, (summed, place) in PANELS.items():
            if summed == arrangement:
                results[panel][kind] = {
                    rule: summary([of_graph[rule][place] for of_graph in measured])
                    for rule in names
                }
    return results


def compare_widths(widths: tuple[int, ...] = (128, 512, 2048), num_graphs: int = 8) -> dict:
    """Measures `moment` where it is exact at infinite width: weights alone, pre-activations."""
    results = {}
    for width in widths:
        measure = functools.partial(second_moments, width=width, draws=1)
        measured = [
            measure(text, Arrangement.PRE_ACTIVATION, {"moment": "moment"})["moment"]["vertices"]
            for text in random_graphs("weights alone")[:num_graphs]
        ]
        results[width] = summary(measured)
    return results


def compare_shares() -> dict:
    """Measures `moment` by branch share: `random` graphs with skips, and residual `blocks`."""
    rules = {f"{share:g}": with_share(share) for share in SHARES}
    results: dict = {"random": {}, "blocks": {}}
    for arrangement in Arrangement:
        measured = [
            second_moments(text, arrangement, rules) for text in random_graphs("with skips")
        ]
        results["random"][arrangement.value] = {
            share: summary([of_graph[share]["vertices"] for of_graph in measured])
            for share in rules
        }
    rules = {"target": "target"} | rules
    for name, (branch, arrangement) in BLOCKS.items():
        text = block_chain(branch)
        results["blocks"][name] = {
            rule: {
                "ratio": float(np.median(ratio(found["vertices"]))),
                "new_part": float(np.median(found["new_part"])),
                "smallest_over_he": _smallest_over_he(dag_graph(text), arrangement, rules[rule]),
            }
            for rule, found in second_moments(text, arrangement, rules).items()
        }
    return results


def _smallest_over_he(graph: jraph.GraphsTuple, arrangement: Arrangement, rule) -> float:
    edges = INITIALIZATION_RULES.resolve(rule)(Architecture(graph, (), arrangement)).edges
    return float(np.sqrt(edges[is_weight(graph)].min() / 2))


class Table(NamedTuple):
    """A table for the terminal and the page."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(results: dict) -> dict[str, Table]:
    """Lays the results out."""
    rules, five, widths, shares = (
        results[name] for name in ("rules", "five_vertices", "widths", "shares")
    )

    def spread(one: dict) -> str:
        digits = 2 if one["worst"] < 100 else 0
        return f"{one['spread']:.{digits}f}, {one['worst']:.{digits}f}"

    def block(one: dict) -> str:
        size = f"{one['ratio']:.2f}" if one["ratio"] < 100 else f"{one['ratio']:,.0f}"
        return f"{size}, {one['new_part']:.0%}, {one['smallest_over_he']:.2f}"

    cases = list(itertools.product(PANELS, KINDS))
    return {
        "rules": Table(
            f"max/min second moment, width {WIDTH}: median (quartiles) and worst of 20 graphs",
            ["vertices sum, measured", "graphs", *RULES],
            [
                [panel, kind, *(spread(rules[panel][kind][rule]) for rule in RULES)]
                for panel, kind in cases
            ],
        ),
        "five_vertices": Table(
            "the same for five vertices, medians; in brackets the pilot of theory §3",
            ["vertices sum, measured", "graphs", *RULES[:3]],
            [
                [panel, kind]
                + [
                    f"{five[panel][kind][rule]['spread'].median:.2f} ({pilot})"
                    for rule, pilot in zip(RULES, PILOT[panel][kind], strict=False)
                ]
                for panel, kind in cases
            ],
        ),
        "widths": Table(
            "rule moment, pre-activations, weights alone: max/min of one network each, 8 graphs",
            ["width", "median (quartiles), worst"],
            [[f"{width:,}", spread(one)] for width, one in widths.items()],
        ),
        "shares": Table(
            "rule moment, with skips, at vertices: max/min of 20 graphs by branch share",
            ["vertices sum", *(f"share {share:g}" for share in SHARES)],
            [
                [summed.replace("_", "-") + "s", *map(spread, by_share.values())]
                for summed, by_share in shares["random"].items()
            ],
        ),
        "blocks": Table(
            "residual blocks: max/min, part of the output that is new, smallest std over He's",
            ["network", "rule target", *(f"share {share:g}" for share in SHARES)],
            [[name, *map(block, by_rule.values())] for name, by_rule in shares["blocks"].items()],
        ),
    }


def write_page(shown: dict[str, Table]) -> None:
    """Puts the tables between `<!-- NAME -->` and `<!-- end -->` of the page."""
    page = PAGE.read_text()
    for name, table in shown.items():
        rule = ["---"] * len(table.header)
        lines = ["| " + " | ".join(row) + " |" for row in (table.header, rule, *table.rows)]
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, lines=lines: match[1] + "\n".join(lines) + "\n" + match[2],
            page,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places for the table {name!r}; expected 1")
    PAGE.write_text(page)


def draw(rules: dict) -> None:
    """Draws max/min of every random graph by rule, one panel per way to sum and to measure."""
    figure = matplotlib.figure.Figure(figsize=(10.5, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    looks = {"weights alone": ("#0072B2", "o", -0.18), "with skips": ("#D55E00", "^", 0.18)}
    jitter = np.linspace(-0.09, 0.09, NUM_GRAPHS)
    for axes, (panel, by_kind) in zip(panels, rules.items(), strict=True):
        for kind, (colour, marker, shift) in looks.items():
            for position, rule in enumerate(RULES):
                one, centre = by_kind[kind][rule], position + shift
                axes.scatter(
                    centre + jitter,
                    one["by_graph"],
                    s=14,
                    alpha=0.6,
                    color=colour,
                    marker=marker,
                    linewidths=0,
                    label=kind if position == 0 else None,
                )
                median = one["spread"].median
                axes.plot([centre - 0.16, centre + 0.16], [median] * 2, color=colour, linewidth=2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log", title=panel, xticks=range(len(RULES)))
        axes.set_xticklabels([rule.replace("_", "\n") for rule in RULES])
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("largest / smallest second moment (1 is perfect)")
    panels[0].legend(loc="upper left", title="one mark a graph, bar: median", frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    results = {
        "settings": {"width": WIDTH, "inputs": BATCH, "networks_per_graph": DRAWS}
        | {kind: random_graphs(kind) for kind in KINDS},
        "rules": compare_rules((5, 6, 7, 8), RULES),
        "five_vertices": compare_rules((5,), RULES[:3]),
        "widths": compare_widths(),
        "shares": compare_shares(),
    }
    shown = tables(results)
    for table in shown.values():
        printed = rich.table.Table(*table.header, title=table.title)
        for row in table.rows:
            printed.add_row(*row)
        rich.console.Console().print(printed)
    common.write_results("initialization", results, "flax", "matplotlib")
    draw(results["rules"])
    write_page(shown)


if __name__ == "__main__":
    main()
