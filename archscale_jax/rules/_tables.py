"""Constants behind tables: rows that a model multiplies by √n, as Gemma does (theory §12).

A constant c behind a table E is the table c·E: what the rest of the network sees starts at c·σ and
changes by c·η. Where c grows with the width, both would grow with it. So a table of c/c_b times the
constant of the base is drawn smaller by this factor, its rate is smaller, and what multiplies its
logits, which read E and not c·E, is larger.
"""

import dataclasses
import math

import numpy as np

from archscale_jax._architecture import OUTPUT, Architecture, Parameter, Role
from archscale_jax._expressions import Variable
from archscale_jax.tracing.constants import factors_behind


def with_rows(architecture: Architecture, base: Architecture, *, folded: bool) -> Architecture:
    """Returns an architecture whose tables are drawn smaller where the model multiplies their rows.

    Args:
      architecture: the network.
      base: the network on which the rate is tuned; tables are compared by name.
      folded: whether no logits are multiplied: a table that is the readout's weight too then
        follows the readout, whatever stands behind its rows.
    """
    known = {one.name: one for one in base.parameters if one.role == Role.EMBEDDING}

    def rows(one: Parameter) -> float:
        if one.name not in known or (folded and one.is_tied):
            return 1.0
        ratio = _constant(architecture, one) / _constant(base, known[one.name])
        return 1.0 if math.isclose(ratio, 1, rel_tol=1e-2) else 1 / ratio  # some are rounded

    parameters = tuple(
        dataclasses.replace(one, rows=rows(one)) if one.role == Role.EMBEDDING else one
        for one in architecture.parameters
    )
    if all(one.rows == 1 for one in parameters):
        return architecture
    return dataclasses.replace(architecture, parameters=parameters)


def _constant(architecture: Architecture, table: Parameter) -> float:
    """By what rows are multiplied before anything else reads them; 1 where that is not one number.

    That is before the lookup, behind it, or behind the vertex that it makes, wherever it is read.
    """
    functions, graph = architecture.functions or (), architecture.graph
    factors, leaf = set(), Variable("leaf", table.name)
    for use in table.uses:
        if use.kind not in ("embedding", "bias"):
            continue
        factor = _common(factors_behind(use.expression, leaf)) if use.expression else 1.0
        vertex = use.vertex
        if use.kind == "embedding":
            stems = [one for one in architecture.stems if table.name in one.weights]
            function = functions[use.edge] if use.edge is not None else (stems or [None])[0]
            vertex = 0 if use.edge is None else int(graph.receivers[use.edge])
            if function is not None:
                factor *= _common(factors_behind(function.after, OUTPUT))
        if vertex is None:
            continue
        leaving = np.flatnonzero(graph.senders == vertex)
        read = {
            constant
            for edge in leaving
            for constant in factors_behind(functions[edge].before, Variable("vertex", vertex))
        }
        factors.add(factor * _common(read))
    return _common(factors)


def _common(factors: set[float]) -> float:
    return factors.pop() if len(factors) == 1 else 1.0
