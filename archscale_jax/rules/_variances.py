"""What an initialization rule gives: C of every edge (theory §3), and the rules by name.

A hidden weight on edge u->v is drawn from N(0, C/n), the readout from N(0, gain²/n²), n being the
fan [AAS Eq. 2, 4]. A rule is a function `(architecture, **options) -> WeightVariances` that says
what C is for every edge; `register_initialization_rule` gives a function of yours a name.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np

from archscale_jax._architecture import OUTPUT, Architecture, Parameter, Role
from archscale_jax._expressions import statistics
from archscale_jax._moments import input_moment
from archscale_jax._quadrature import slope
from archscale_jax.rules._registry import Part, Registry

STEM_NUMERATOR = 2.0
"""C of a layer that reads the inputs, times the contributions to its vertex [AAS Eq. 4]."""


class WeightVariances(NamedTuple):
    """What an initialization rule says of a graph with E edges.

    Attributes:
      edges: float64 [E]; the weights of edge e have variance `edges[e] / n`. Entries of edges
        without weight mean nothing.
      readout_gain: the readout has standard deviation `readout_gain / n`.
      fan: which fan n is, receptive field included.
      gains: by edge, the value of the gain of a normalization behind its layer, where the rule
        chooses one.
      free: edges whose layers read nothing but zeros, as in the first step of a loop, or are
        multiplied by them: of a weight of several layers the others decide.
      slices: by edge, axis and entries of its leaf whose variance is a multiple of the edge's, and
        the multiple, where one leaf holds both halves of a gate.
      table_rows: norm of the rows of a table that is the readout too, and of the positions that are
        added to it.
    """

    edges: np.ndarray
    readout_gain: float = math.sqrt(2.0)
    fan: Literal["fan_in", "fan_out"] = "fan_in"
    gains: Mapping[int, float] = {}
    free: Collection[int] = ()
    slices: Mapping[int, Collection[tuple[int, range, float]]] = {}
    table_rows: float = 1.0


InitializationRule = Callable[..., WeightVariances]

INITIALIZATION_RULES: Registry[WeightVariances] = Registry("initialization rule")
register_initialization_rule = INITIALIZATION_RULES.register

Deviation = float | np.ndarray
"""A standard deviation; where the slices of a leaf differ, an array that broadcasts over them."""


def stem_numerator(architecture: Architecture, name: str) -> float:
    """Returns C of a layer that feeds vertex 0 from the inputs: 2 over the number of such layers.

    A constant behind it, and zeros that a transposed convolution meets, are made good.
    """
    found = STEM_NUMERATOR
    for function in architecture.stems:
        if name in function.weights:
            found /= len(architecture.stems)
            factor = slope(function.after, OUTPUT, lambda variable: 1.0)
            if factor and not statistics(function.after):
                found /= factor**2
            found /= input_moment(function)
            if function.reach:
                fans = {one.name: one.fan_in for one in architecture.parameters}
                found *= fans[name] / function.reach
    return found


def embedding_deviation(
    parameter: Parameter, architecture: Architecture, table_rows: float = 1.0
) -> Part:
    """Returns the standard deviation of a table's entries; see `WeightVariances.table_rows`."""
    symbols: dict[str, float] = {} if parameter.rows == 1 else {"c_b/c": parameter.rows}
    small = Part(
        parameter.rows * table_rows / math.sqrt(parameter.fan_out),
        "embedding",
        f"rows of norm {table_rows:.3g}",
        {"n": parameter.fan_out, **symbols},
    )
    if parameter.is_tied:
        return small._replace(rule="table and readout")
    added = parameter.layer == Role.INPUT and any(one.is_tied for one in architecture.parameters)
    # Beside a tied table, rows of norm √n would drown those of the table.
    return (
        small.at("added to a tied table")
        if added
        else Part(parameter.rows, "embedding", "std 1", symbols)
    )
