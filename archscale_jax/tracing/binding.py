"""What every parameter leaf is: its record, from what it does."""

import math
from collections.abc import Mapping

from archscale_jax.architecture import Parameter, Role
from archscale_jax.tracing.flow import Edge
from archscale_jax.tracing.structure import Structure, axes_of
from archscale_jax.tracing.values import TraceError, Use


def uses_by_leaf(
    names: list[str], uses: list[Use], declared: Mapping[str, Role]
) -> dict[str, list[Use]]:
    """Returns what every leaf does.

    Raises:
      TraceError: leaves that make one value together, or one that does nothing, and no role is
        declared.
    """
    found: dict[str, list[Use]] = {name: [] for name in names}
    for use in uses:
        if len(use.leaves) > 1 and not all(leaf in declared for leaf in use.leaves):
            raise TraceError(
                f"parameters {', '.join(map(repr, use.leaves))} make one {use.kind} at "
                f"{use.source}; declare the role of each with roles={{name: role}}, and trace the "
                "network without penalties on its weights"
            )
        for leaf in use.leaves:
            found[leaf].append(use)
    for name, where in found.items():
        if not where and name not in declared:
            raise TraceError(_does_nothing(name))
    return found


def _does_nothing(name: str) -> str:
    return (
        f"parameter {name!r} does nothing to the result; leave it out of params, or declare its "
        f"role with roles={{{name!r}: role}}"
    )


def record(
    name: str,
    shape: tuple[int, ...],
    uses: list[Use],
    structure: "Structure",
    numbers: tuple[Mapping[Edge, int], ...],
    declared: Mapping[str, Role],
) -> Parameter:
    """Makes the record of a leaf.

    Args:
      name: of the leaf.
      shape: its shape.
      uses: what it does.
      structure: what its layers are.
      numbers: of the live edges, and of all; a leaf is what its live uses say, if it has any.
      declared: roles that the user gave.
    """
    width = shape[-1] if shape else 1
    if not uses:
        return Parameter(name, declared[name], Role.HIDDEN, shape, width, width)
    held = ([use for use in uses if structure.holds(use, some)] for some in numbers)
    uses = next(filter(None, held), [])
    if not uses:
        raise TraceError(_does_nothing(name))
    places = numbers[-1]
    edges = [places[one.edge] for one in uses if one.edge is not None and one.edge in places]
    # A leaf that is tied is what it is first and foremost: a table, then a layer's weight.
    use = min(uses, key=lambda use: _RANK.index(use.kind))
    fans = {"fan_in": use.fan_in, "fan_out": use.fan_out}
    if use.edge is None:
        fans = {"fan_in": width, "fan_out": width}
    role, layer = declared.get(name) or structure.role(use, shape), structure.layer(use)
    if role == Role.EMBEDDING and any(use.edge in structure.readouts for use in uses):
        layer = Role.READOUT
    elif role == Role.EMBEDDING and use.vertex in {edge.target for edge in structure.stems}:
        layer = Role.INPUT
    if use.kind == "scale" and name not in declared and axes_of(use, shape) > 1:
        raise TraceError(
            f"parameter {name!r} of shape {shape} multiplies features at {use.source}, as a layer "
            f"written without a matrix product would; if it is a scale, say roles={{{name!r}: "
            "'scale'}"
        )
    return Parameter(
        name,
        role,
        layer,
        shape,
        **fans,
        kernel_size=max(use.spatial, default=1),
        kernel_positions=math.prod(use.spatial),
        edge=edges[0] if edges else None,
        further_edges=tuple(edges[1:]),
        activated=role != Role.HIDDEN or structure.activated(uses),
    )


_RANK = ("embedding", "weight", "scale", "offset", "bias", "token")
