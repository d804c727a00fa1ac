"""How the cells of a ranking are trained: the initialization and the rate of every recipe."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import archscale_jax as archscale
from archscale_jax._spaces import cell_graph
from archscale_jax._trees import PyTree, map_with_names, named_leaves

Trial = Mapping[str, Any]

SKIP_CELL, CONVOLUTION_CELL = "0_00_100", "0_00_300"
"""One path from input to output, of a skip or of one convolution 3 x 3: tuned on, scaled from."""


class Recipe(NamedTuple):
    """How a cell is trained.

    Attributes:
      initialization: `benchmark`, or the name of an initialization rule.
      rule: of the learning rate; None takes the rate of the benchmark for every cell.
      base: the cell whose rate is searched and scaled.
    """

    initialization: str
    rule: str | None = None
    base: str | None = None


RECIPES = {
    "fixed": Recipe("benchmark"),
    "author_code": Recipe("chen2024_code", "chen2024_code", SKIP_CELL),
    "path_sum": Recipe("target_in_degree", "path_sum", CONVOLUTION_CELL),
    "measured": Recipe("target_in_degree", "standardized_update", CONVOLUTION_CELL),
    "mup": Recipe("he_normal", "none", CONVOLUTION_CELL),
}
"""`fixed` is the benchmark's recipe; `mup` knows of widths alone, which are the same here."""


def pytorch_default(key: jax.Array, params: PyTree) -> PyTree:
    """Draws weights as PyTorch does by default, and so the benchmark: uniform in ±1/√fan_in."""
    fans = {
        name.rpartition("/")[0]: math.prod(leaf.shape[:-1])
        for name, leaf in named_leaves(params).items()
        if name.endswith("kernel")
    }
    index = itertools.count()

    def drawn(name, leaf):
        fan_in = fans.get(name.rpartition("/")[0])
        if fan_in is None:  # normalization
            return jnp.full(leaf.shape, float(name.endswith("scale")), leaf.dtype)
        bound = 1 / math.sqrt(fan_in)
        key_of_leaf = jax.random.fold_in(key, next(index))
        return jax.random.uniform(key_of_leaf, leaf.shape, leaf.dtype, -bound, bound)

    return map_with_names(drawn, params)


def learning_rate(trial: Trial, measurements: Mapping[str, Any] | None = None) -> float:
    """Returns the rate of a trial: its base rate, scaled by the rule of its recipe.

    Args:
      trial: with cell, recipe and `base_rate`.
      measurements: of `measure`, by cell; of the trial's and of the base cell.

    Raises:
      ValueError: the rule says nothing of the cell.
    """
    _, rule, base = RECIPES[trial["recipe"]]
    if rule is None or base is None:
        return trial["base_rate"]
    compare = cell_graph
    if rule == "standardized_update":
        compare = functools.partial(_live_sizes, measurements or {})
    target, base_size = compare(trial["cell"]), compare(base)
    return archscale.predict_learning_rate(target, base_size, trial["base_rate"], rule)


def _live_sizes(measurements: Mapping[str, Any], cell: str) -> archscale.tuning.UpdateSize:
    """The update sizes of the vertices that lie on a path, the others having none."""
    if cell not in measurements:
        raise ValueError(f"the cell {cell} has no measurement")
    measured = measurements[cell]
    live = np.asarray(measured["live"])
    sizes = {
        name: jnp.asarray(np.asarray(measured[name], float)[:, live])
        for name in archscale.tuning.UpdateSize._fields
    }
    return archscale.tuning.UpdateSize(**sizes)
