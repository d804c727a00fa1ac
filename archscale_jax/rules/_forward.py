"""Forward multipliers: what stands in front of weights instead of in them (theory §12).

μP and CompleteP multiply logits by 1/m_N and branches by m_L^(-α). A multiplier a in front of a
weight is the same as a weight a times as large, `y = a·Wx = W'x`, with

| | standard deviation | learning rate | weight decay | epsilon |
|---|---|---|---|---|
| Adam, Muon | σ' = a·σ | η' = a·η | λ' = λ/a | ε' = ε/a |
| SGD | σ' = a·σ | η' = a²·η | λ' = λ/a² | – |

so that models need none (`form="folded"`). Two kinds cannot be folded: the logits of a table that
is embedding and readout in one, and the products of queries and keys.

Initial values follow the base too: the rows of a table whose logits are multiplied stay as they
are, also where the model multiplies them itself (`rules._tables`), and what multiplies features is
drawn as readouts are (`rules._gates`).
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._errors import unknown
from archscale_jax.rules._gates import gate_ratios
from archscale_jax.rules._registry import Part
from archscale_jax.rules._residual import Optimizer, block_ratio, places_of
from archscale_jax.rules._width import width_ratios

Form = Literal["auto", "folded", "multipliers"]
FORMS: tuple[Form, ...] = ("auto", "folded", "multipliers")
ATTENTION_SCALES = ("1/d",)


class Forward(NamedTuple):
    """The multipliers that a model is evaluated with.

    Attributes:
      leaves: by name, a of leaves that are multiplied wherever they are used.
      tables: by name, what multiplies the logits of a table that is embedding and readout in one.
      attention: what multiplies the products of queries and keys.
      rows: by what the rows of tables are multiplied, where the initialization rule does not do it.
      gates: by name, r of weights that are drawn as readouts are, see `rules._gates`.
      lookups: by name, what multiplies the rows of tables in the model, over that in the base.
    """

    leaves: Mapping[str, float] = {}
    tables: Mapping[str, float] = {}
    attention: float = 1.0
    rows: float = 1.0
    gates: Mapping[str, float] = {}
    lookups: Mapping[str, float] = {}

    @property
    def in_products(self) -> bool:
        """Whether products inside of the model are multiplied."""
        return bool(self.tables) or self.attention != 1

    def rate(self, name: str, kind: Optimizer) -> float:
        """Returns by what the learning rate of a leaf is divided."""
        a = self.leaves.get(name, 1.0) * self.lookups.get(name, 1.0)
        return a ** (2 if kind == "sgd" else 1)


def forward_multipliers(
    architecture: Architecture,
    base: Architecture | None,
    *,
    form: str = "auto",
    attention_scale: str | None = None,
    width: bool,
    depth_exponent: float | None,
) -> Forward:
    """Returns the forward multipliers of a model, relative to its base, which has none.

    Args:
      architecture: the model.
      base: the network on which the rate is tuned.
      form: `auto` folds what can be folded, and multiplies the logits of tied tables; `folded`
        multiplies nothing; `multipliers` takes branches and readouts out of the weights too.
      attention_scale: `1/d` makes queries and keys meet at 1/d_head instead of 1/√d_head; None
        leaves them as they are in the model.
      width: whether a width rule is in use.
      depth_exponent: α; None where no depth rule is in use.

    Raises:
      ValueError: another form or scale; a scale of a model without attention.
    """
    if form not in FORMS:
        raise ValueError(unknown("form", form, FORMS))
    if attention_scale not in (None, *ATTENTION_SCALES):
        raise ValueError(unknown("attention_scale", str(attention_scale), ATTENTION_SCALES))
    if attention_scale is not None and not architecture.attention:
        raise ValueError(
            f"attention_scale={attention_scale!r}: no product of queries and keys was found in the "
            "model; leave it out, and scale what it has in its place in the model"
        )
    if base is None:
        return Forward()
    ratios = width_ratios(architecture, base) if width else {}
    readouts = {
        one.name: 1 / ratios[one.name][0]
        for one in architecture.parameters
        if one.role == Role.READOUT and ratios
    }
    tables = {one.name: 1 / _read(one, ratios) for one in architecture.parameters if one.is_tied}
    leaves: dict[str, float] = {}
    if form == "multipliers":
        leaves = {**readouts, **branch_multipliers(architecture, base, depth_exponent)}
    kept = {name: a for name, a in tables.items() if a != 1} if form != "folded" and ratios else {}
    lookups = {one.name: 1 / one.rows for one in architecture.parameters if one.rows != 1}
    return Forward(
        {name: a for name, a in leaves.items() if a != 1},
        {name: a * lookups.get(name, 1.0) for name, a in kept.items()},
        _attention(architecture, base) if attention_scale else 1.0,
        rows=max(kept.values(), default=1.0) ** -0.5,
        gates=gate_ratios(architecture, ratios),
        lookups=lookups,
    )


def start_factors(architecture: Architecture, forward: Forward) -> dict[str, Part]:
    """Returns by what the initial values of leaves are multiplied, by name.

    1/a where a stands; √r of a table whose logits are multiplied, and of positions that are added
    to it; 1/√r of what multiplies features.
    """
    found = {name: Part(1 / a, "forward multiplier", "1/a", {"a": a})
             for name, a in forward.leaves.items()}  # fmt: skip
    found |= {
        name: Part(r**-0.5, "multiplies features", "1/√r", {"r": r}, "[μP]")
        for name, r in forward.gates.items()
    }
    if forward.rows != 1:
        part = Part(forward.rows, "rows as in the base", "√r", {"r": forward.rows**2})
        found |= {
            one.name: part
            for one in architecture.parameters
            if one.name in forward.tables
            or (one.role == Role.EMBEDDING and one.layer == Role.INPUT)
        }
    return found


def _read(table: Parameter, ratios: Mapping[str, tuple[float, float]]) -> float:
    """The width that a table reads as the readout's weight, over the base's."""
    return max(ratios.get(table.name, (1.0, 1.0)))


def branch_multipliers(
    architecture: Architecture, base: Architecture, exponent: float | None
) -> dict[str, float]:
    """Returns m^(-α) of every leaf that ends a residual branch, or its part in a product."""
    if exponent is None:
        return {}
    places, ratio = places_of(architecture), block_ratio(architecture, base)
    found = {one.name: places.of(one) for one in architecture.parameters}
    return {
        name: ratio ** (-exponent * share)
        for name, (place, share) in found.items()
        if place == "end"
    }


def _attention(architecture: Architecture, base: Architecture) -> float:
    """What makes products of queries and keys fall by 1/d_head from the base on."""
    pair = []
    for name, one in (("model", architecture), ("base", base)):
        kinds = {(logits.size, logits.scale) for logits in one.attention.values()}
        if len(kinds) != 1:
            raise ValueError(
                f"attention_scale='1/d': the {name} has {len(kinds)} kinds of attention (pairs of "
                f"head size and scale {sorted(kinds)}), one is needed; scale them in the model"
            )
        pair.append(kinds.pop())
    (size, scale), (base_size, base_scale) = pair
    found = base_scale * base_size / (size * scale)
    return 1.0 if math.isclose(found, 1, rel_tol=_ROUNDED) else found


_ROUNDED = 2**-7
"""By so much two scales may differ that bfloat16 has rounded, and those of heads of 64 and 65."""
