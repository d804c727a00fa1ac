"""Learning-rate multipliers: what the rules of graphs, widths and depths say together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jraph
import numpy as np

from archscale_jax._architecture import Architecture, check_architecture
from archscale_jax._graph import Operator, live_edges, network_kernel_size
from archscale_jax.rules._learning_rate import (
    LEARNING_RATE_RULES,
    LearningRateRule,
    MissingBaseError,
    kernel_size_multiplier,
    learning_rate_scale,
)
from archscale_jax.rules._registry import Explained, Part, Rule
from archscale_jax.rules._residual import (
    Optimizer,
    check_optimizer,
    depth_multipliers,
    residual_branches,
)
from archscale_jax.rules._width import WIDTH_RULES, WidthRule, width_parts


def learning_rate_multipliers(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple | None = None,
    rule: str | LearningRateRule | None = None,
    *,
    rule_options: Mapping[str, Any] | None = None,
    kernel_per_layer: bool = False,
    width_rule: str | WidthRule | None = None,
    depth_rule: Optimizer | None = None,
    depth_exponent: float = 0.5,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
) -> dict[str, float]:
    """Returns the learning-rate multiplier of every parameter by name.

    Args:
      architecture: the network to train.
      base: the network on which the base rate was tuned, or its graph.
      rule: see `archscale_jax.rules.learning_rate_scale`: one multiplier for all weights and
        biases. None is `none` with a width rule or a depth rule, which are asked for what they say
        alone; without them it is `path_sum_activations`, for plain sums of layers.
      rule_options: options of the rule, such as `{"depth_offset": 1}`.
      kernel_per_layer: [AAS Eq. 9] divides by one kernel size for the whole network. True gives
        every layer its own: q_network / q_layer on top, which raises layers of smaller kernels.
      width_rule: None, `sgd`, `adam` or `muon`: multiply by the width multipliers [μP], see
        `archscale_jax.rules._width`.
      depth_rule: None, `sgd`, `adam` or `muon`: multiply by the depth multipliers of residual
        stacks, see `archscale_jax.rules._residual`.
      depth_exponent: α of the depth rule.
      consistent_rms: of the width rule `muon`, as given to `optax.contrib.muon`.
      dimension_numbers: of the width rule `muon`, whether optax is given
        `muon_dimension_numbers(architecture, params)`.

    Raises:
      TypeError: no architecture, a base that is neither architecture nor graph, or an option that
        the rule does not have.
      ValueError: what the rules raise; no rule for a network with residual additions,
        concatenations or products; rules that contradict each other; a width rule without an
        architecture as base; a multiplier that is not positive, or beyond the range of float32.
    """
    rules = RateRules(
        rule, rule_options, kernel_per_layer, width_rule, depth_rule, depth_exponent,
        consistent_rms, dimension_numbers,
    )  # fmt: skip
    return {name: one.value for name, one in rules.multipliers(architecture, base).items()}


@dataclasses.dataclass(frozen=True)
class RateRules:
    """The rules of `learning_rate_multipliers`, see there; those that contradict raise errors."""

    rule: str | LearningRateRule | None = None
    rule_options: Mapping[str, Any] | None = None
    kernel_per_layer: bool = False
    width_rule: str | WidthRule | None = None
    depth_rule: Optimizer | None = None
    depth_exponent: float = 0.5
    consistent_rms: float | None = None
    dimension_numbers: bool = False
    tables: frozenset[str] = frozenset()
    """Tied tables whose logits a forward multiplier scales: their rates are those of tables."""

    def __post_init__(self) -> None:
        rule = None if self.rule is None else LEARNING_RATE_RULES.resolve(self.rule)
        if self.depth_rule is not None:
            check_optimizer(self.depth_rule)
            if rule is not None and rule.answers_for_depth:
                raise ValueError(
                    f"depth_rule={self.depth_rule!r} and the rule {rule.name} both answer for "
                    "depth; take rule=None or 'none' with it, or leave depth_rule out"
                )
        width = None if self.width_rule is None else WIDTH_RULES.resolve(self.width_rule)
        for option in self._width_options:
            if width is None or option not in width.parameters:
                raise ValueError(
                    f"{option} is an option of width_rule='muon', found width_rule="
                    f"{self.width_rule!r}; leave it out, or pass that rule"
                )

    @property
    def _width_options(self) -> dict[str, Any]:
        names = ("consistent_rms", "dimension_numbers")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def of_network(self, architecture: Architecture) -> Rule[float]:
        """Returns the rule of the whole network; None raises ValueError where none is safe."""
        if self.rule is not None:
            return LEARNING_RATE_RULES.resolve(self.rule)
        if self.width_rule is not None or self.depth_rule is not None:
            return LEARNING_RATE_RULES.resolve("none")
        graph = architecture.graph
        operators = graph.edges["operator"][live_edges(graph)]
        additions = len(residual_branches(architecture))
        found = [f"{additions} residual addition{'s' * (additions > 1)}"] * bool(additions)
        found += ["concatenations"] * bool(np.any(operators == Operator.CONCATENATION))
        found += ["products"] * bool(np.any(operators == Operator.PRODUCT))
        if not found:
            return LEARNING_RATE_RULES.resolve("path_sum_activations")
        depth = "depth_rule='sgd', 'adam' or 'muon' for the depth of a residual stack, "
        raise ValueError(
            f"the network has {' and '.join(found)}, where no learning-rate rule is safe unless it "
            f"is chosen: pass {depth * bool(additions)}width_rule='sgd', 'adam' or 'muon' for the "
            f"width, or rule={', '.join(map(repr, LEARNING_RATE_RULES))}"
        )

    def multipliers(
        self, architecture: Architecture, base: Architecture | jraph.GraphsTuple | None
    ) -> dict[str, Explained]:
        """Returns the multiplier of every parameter by name, with the parts of the rules."""
        check_architecture(architecture)
        rule = self.of_network(architecture)
        base_graph = base.graph if isinstance(base, Architecture) else base
        scale = learning_rate_scale(
            architecture.graph, base_graph, rule, rule_options=self.rule_options
        )
        names = [one.name for one in architecture.parameters]
        given: list[Mapping[str, Part]] = []
        if rule.scales:
            given.append(dict.fromkeys(names, Part(scale, rule.name, citation=rule.citation)))
        if self.kernel_per_layer:
            given.append(_kernels(architecture))
        if self.width_rule is not None:
            if not isinstance(base, Architecture):
                error = MissingBaseError if base is None else ValueError
                raise error(
                    "width_rule compares fans: pass the base network's Architecture, or "
                    "with_widths(architecture, {width: base width}); found "
                    f"{type(base).__name__}"
                )
            given.append(
                width_parts(
                    architecture, base, self.width_rule, tables=self.tables, **self._width_options
                )
            )
        if self.depth_rule is not None:
            if base is None:
                raise MissingBaseError(
                    "depth_rule compares depths: pass the base network, or its graph, as base"
                )
            exponent = self.depth_exponent
            given.append(depth_multipliers(architecture, base, self.depth_rule, exponent=exponent))
        return {name: _product(name, tuple(parts[name] for parts in given)) for name in names}


def _kernels(architecture: Architecture) -> dict[str, Part]:
    """What the kernel size of a layer adds to that of the network."""
    network = network_kernel_size(architecture.graph)
    sizes = {one.name: math.sqrt(one.kernel_positions) for one in architecture.parameters}
    return {
        name: Part(kernel_size_multiplier(q, network), "kernel", "", {"q_network": network, "q": q})
        for name, q in sizes.items()
    }


def _product(name: str, parts: tuple[Part, ...]) -> Explained:
    value = math.prod((part.value for part in parts), start=1.0)
    smallest, largest = (float(getattr(jnp.finfo(jnp.float32), end)) for end in ("tiny", "max"))
    if not smallest <= value <= largest:
        raise ValueError(
            f"the learning-rate multiplier of {name!r} is {value}; a multiplier must be positive "
            "and in the range of float32"
        )
    return Explained(value, parts)
