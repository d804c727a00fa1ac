"""Weights that start at zero because the user asks for it."""

import dataclasses
from collections.abc import Collection

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._errors import unknown
from archscale_jax.rules._residual import places_of

ZEROS = ("branch_ends", "readout", "queries")


def with_zeros(architecture: Architecture, names: Collection[str]) -> Architecture:
    """Returns an architecture in which some leaves start at zero, as if the model had them so."""
    parameters = tuple(
        dataclasses.replace(one, given=0.0) if one.name in names else one
        for one in architecture.parameters
    )
    return dataclasses.replace(architecture, parameters=parameters)


def zero_leaves(architecture: Architecture, kinds: Collection[str]) -> frozenset[str]:
    """Returns the names of the leaves that start at zero.

    Args:
      architecture: the model.
      kinds: of `branch_ends` (the last layer of every residual branch, or the gain behind it),
        `readout`, and `queries` (the layers that make queries).

    Raises:
      TypeError: a string instead of a collection of them.
      ValueError: another kind, or one that the model does not have in leaves of its own.
    """
    if isinstance(kinds, str):
        raise TypeError(f"zero_init is a collection of {', '.join(ZEROS)}, as ({kinds!r},)")
    found: set[str] = set()
    for kind in kinds:
        if kind not in ZEROS:
            raise ValueError(unknown("kind in zero_init", kind, ZEROS))
        names = {"branch_ends": _ends, "readout": _readouts, "queries": _queries}[kind](
            architecture
        )
        if not names:
            raise ValueError(
                f"zero_init={kind!r}: the model has none in a leaf of its own; leave it out"
            )
        found |= names
    return frozenset(found)


def _ends(architecture: Architecture) -> set[str]:
    places = places_of(architecture)
    ends = {one.name for one in architecture.parameters if places.of(one)[0] == "end"}
    return ends & _drawn(architecture, (Role.HIDDEN, Role.SCALE))


def _readouts(architecture: Architecture) -> set[str]:
    return _drawn(architecture, (Role.READOUT,))


def _queries(architecture: Architecture) -> set[str]:
    """Not where one leaf makes keys too: these would start at zero with them, and stay there."""
    receivers = architecture.graph.receivers
    vertices = {
        one.queries for vertex, one in architecture.attention.items() if vertex != one.queries
    }

    def makes_queries(one: Parameter) -> bool:
        edges = [edge for edge in (one.edge, *one.further_edges) if edge is not None]
        return bool(edges) and all(int(receivers[edge]) in vertices for edge in edges)

    names = {one.name for one in architecture.parameters if makes_queries(one)}
    return names & _drawn(architecture, (Role.HIDDEN,))


def _drawn(architecture: Architecture, roles: Collection[Role]) -> set[str]:
    return {one.name for one in architecture.parameters if one.role in roles}
