"""The equations, one small function each, by name."""

from archscale_jax import _deprecated
from archscale_jax.rules import _in_degree, _second_moment  # noqa: F401  # which register rules
from archscale_jax.rules._initialization import second_moments, weight_standard_deviations
from archscale_jax.rules._learning_rate import (
    LEARNING_RATE_RULES,
    kernel_size_multiplier,
    learning_rate_scale,
    register_learning_rate_rule,
    shortest_path_length,
)
from archscale_jax.rules._matrix import muon_dimension_numbers
from archscale_jax.rules._rates import learning_rate_multipliers
from archscale_jax.rules._registry import Registry, Rule
from archscale_jax.rules._variances import (
    INITIALIZATION_RULES,
    WeightVariances,
    register_initialization_rule,
)
from archscale_jax.rules._width import (
    WIDTH_RULES,
    register_width_rule,
    width_multipliers,
    with_widths,
)

__all__ = [
    "INITIALIZATION_RULES",
    "LEARNING_RATE_RULES",
    "WIDTH_RULES",
    "Registry",
    "Rule",
    "WeightVariances",
    "kernel_size_multiplier",
    "learning_rate_multipliers",
    "learning_rate_scale",
    "muon_dimension_numbers",
    "register_initialization_rule",
    "register_learning_rate_rule",
    "register_width_rule",
    "second_moments",
    "shortest_path_length",
    "weight_standard_deviations",
    "width_multipliers",
    "with_widths",
]


def __getattr__(name: str):
    return _deprecated.renamed(__name__, name)
