"""Depth multipliers of residual stacks (theory §5, §11): depth-μP, CompleteP without multipliers.

A stack of n residual additions whose branches are multiplied by m^(-α), m = n / base n, keeps its
rate, whatever the depth. Without multipliers in the model, m^(-α) sits in the weights that end a
branch, which the initialization rule `second_moment` draws smaller by n^(-α), and in the rates:

| optimizer   | what ends a branch | the rest of a branch | all else |
|-------------|--------------------|----------------------|----------|
| SGD         | 1/m · K_b/K        | m^(2α-1) · K_b/K     | 1        |
| Adam, Muon  | 1/m                | m^(α-1)              | 1        |

Of a branch that ends in a product of n layers each takes m^(-α/n): its rate is m^(2α-1-2α/n) for
SGD, m^(α-1-α/n) for Adam. K is how often a leaf is used, K_b how often in the base. A rate η of a
weight that a multiplier a follows is a rate η·a² of their product for SGD and η·a for Adam; with L
layers that change a feature together, the change is η·a²·L or η·a·L. A multiplier that the model
has already counts.

What ends a branch is the last layer that enters the sum linearly; behind a normalization it is the
gain of that normalization, since it undoes the size of the layer.
"""

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jraph
import numpy as np

from archscale_jax._architecture import (
    OUTPUT,
    Architecture,
    Parameter,
    ParameterUse,
    Role,
    derived,
)
from archscale_jax._errors import unknown
from archscale_jax._expressions import (
    Expression,
    Moments,
    Variable,
    replaced,
    statistics,
    variables,
)
from archscale_jax._graph import Operator, is_weight, live_edges
from archscale_jax._moments import Propagation
from archscale_jax._quadrature import slope
from archscale_jax.rules._registry import Part

Optimizer = Literal["sgd", "adam", "muon"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "muon")

_WEIGHTLESS = (Operator.SKIP, Operator.AVG_POOL)


Branches = Mapping[int, frozenset[int]]
"""The edges of the branches that end in every residual addition, by its vertex."""


@derived
def residual_branches(network: Architecture | jraph.GraphsTuple) -> Branches:
    """Returns the edges of the branches that end in every residual addition, by vertex.

    A vertex is a residual addition where an edge without weight brings what another way with
    layers, the branch, brings too. A skip around a stack of such additions, or around the whole
    network and what it holds, makes no block; nor does an addition inside of another's branch, nor
    what many blocks add, as a condition or the first features, which goes around other blocks.
    What only a branch reads, as keys and values of cross-attention are, belongs to it. Two slices
    of one vertex, as scale and shift that one layer makes, are two features: a skip of the one goes
    around no layer that reads the other.
    """
    branches: dict[int, set[int]] = {}
    sources: dict[int, set[int]] = {}
    graph = network.graph if isinstance(network, Architecture) else network
    if not np.any(np.isin(graph.edges["operator"], _WEIGHTLESS)):
        return {}
    for skip in _skips(network):
        if not skip.has_layer:
            branches.setdefault(skip.vertex, set()).update(skip.around)
            sources.setdefault(skip.vertex, set()).add(skip.source)
    blocks, ways = _blocks(int(graph.n_node[0]) - 1, branches, sources), _Ways(graph)
    for vertex in blocks:
        ways.extend(branches[vertex], vertex, branches.keys())
    return {vertex: frozenset(branches[vertex]) for vertex in blocks}


@derived
def residual_depth(network: Architecture | jraph.GraphsTuple) -> int:
    """Returns the number of blocks of a stack, 0 without one.

    They are the residual additions, and those whose skip has layers of its own, as between the
    stages of a ResNet: fewer from a vertex to the addition than another way has. That makes no
    block inside of another's branch or around another addition; the shortest are taken first.
    """
    graph = network.graph if isinstance(network, Architecture) else network
    branches, receivers = residual_branches(network), graph.receivers.tolist()
    inside = {receivers[edge] for edges in branches.values() for edge in edges}
    ends = set(branches)
    projected = [skip for skip in _skips(network) if skip.has_layer]
    for skip in sorted(projected, key=lambda one: (len(one.around), one.vertex)):
        if skip.vertex not in inside and not skip.interior & ends:
            ends.add(skip.vertex)
            inside |= {skip.vertex, *skip.interior}
    return len(ends)


class _Skip(NamedTuple):
    """A way from `source` to `vertex` beside others with more layers, whose edges are `around`.

    It is an edge without a layer, or has layers and vertices that nothing else feeds. `is_fed`
    tells whether other vertices than the source feed what lies between.
    """

    vertex: int
    source: int
    around: frozenset[int]
    interior: frozenset[int]
    has_layer: bool
    is_fed: bool


@derived
def _skips(network: Architecture | jraph.GraphsTuple) -> tuple[_Skip, ...]:
    """Returns the skips of a network but those that go over the source of a block into it."""
    known = isinstance(network, Architecture)
    graph, slices = (network.graph, _slices(network)) if known else (network, {})
    ways, weight = _Ways(graph), is_weight(graph)
    may_skip = weight | np.isin(graph.edges["operator"], _WEIGHTLESS)
    found = []
    for vertex, edges in ways.incoming.items():
        for last in (edge for edge in edges if may_skip[edge]):
            skip = _skip(ways, weight, slices, vertex, last)
            found += [] if skip is None else [skip]
    ends = {skip.vertex for skip in found}
    return tuple(skip for skip in found if not any(_enters(skip, one, ends) for one in found))


def _skip(
    ways: "_Ways", weight: np.ndarray, slices: Mapping[int, set], vertex: int, last: int
) -> _Skip | None:
    """The skip that an edge into a vertex ends."""
    first, layers = last, int(weight[last])
    while True:  # back to a vertex from which there are other ways
        source = ways.senders[first]
        others = {
            edge
            for edge in ways.outgoing[source]
            if slices.get(first) and slices.get(edge) and not slices[first] & slices[edge]
        }
        around = ways.between(source, vertex, others | {first})
        before = ways.incoming.get(source, [])
        if around or len(before) != 1 or not layers:
            break
        first = before[0]
        layers += int(weight[first])
    if _most_layers(ways.senders, ways.receivers, weight, around).get(vertex, 0) <= layers:
        return None
    interior = {ways.receivers[edge] for edge in around} - {vertex}
    senders = {ways.senders[edge] for end in interior for edge in ways.incoming[end]}
    is_fed = not senders <= interior | {source}
    return _Skip(vertex, source, frozenset(around), frozenset(interior), layers > 0, is_fed)


def _enters(skip: _Skip, other: _Skip, ends: Collection[int]) -> bool:
    """Whether a skip comes from before the source of another block, and ends in it or with it."""
    if other.source not in skip.interior:
        return False
    if skip.vertex == other.vertex:
        return other.source in ends
    return skip.is_fed and skip.vertex in other.interior


def _slices(architecture: Architecture) -> dict[int, set[tuple]]:
    """By edge, which slices of its source it reads; nothing where it reads all of it."""
    found = {}
    for edge, function in enumerate(architecture.functions or ()):
        parts = {one.part for one in variables(function.before) if one.kind == "vertex"}
        found[edge] = set() if () in parts else parts
    return found


def _blocks(last: int, branches: dict[int, set[int]], sources: dict[int, set[int]]) -> list[int]:
    """The additions that make a stack, see `residual_branches`."""
    nested = {
        vertex: [other for other, edges in branches.items() if edges < own and other != vertex]
        for vertex, own in branches.items()
    }
    around = {
        vertex
        for vertex, held in nested.items()
        if held
        and (
            (vertex == last and 0 in sources[vertex])
            or any(other in sources[one] for one in held for other in held)
        )
    }
    left = [vertex for vertex in branches if vertex not in around]
    return [vertex for vertex in left if not any(vertex in nested[other] for other in left)]


class _Ways:
    """The live edges of a graph by vertex, in both directions."""

    def __init__(self, graph: jraph.GraphsTuple):
        self.senders, self.receivers = graph.senders.tolist(), graph.receivers.tolist()
        self.incoming: dict[int, list[int]] = collections.defaultdict(list)
        self.outgoing: dict[int, list[int]] = collections.defaultdict(list)
        for edge in live_edges(graph).nonzero()[0].tolist():
            self.incoming[self.receivers[edge]].append(edge)
            self.outgoing[self.senders[edge]].append(edge)

    def between(self, source: int, target: int, excluded: set[int]) -> set[int]:
        """The edges on paths from one vertex to another that do not begin with an excluded one."""
        reached, wanted, behind = {source}, [target], set()
        while wanted:  # back from the target, not beyond the source
            vertex = wanted.pop()
            if vertex not in behind and vertex > source:
                behind.add(vertex)
                wanted.extend(self.senders[edge] for edge in self.incoming[vertex])
        found: set[int] = set()
        for vertex in sorted(behind):
            edges = set(self.incoming[vertex]) - excluded
            here = {edge for edge in edges if self.senders[edge] in reached}
            if here:
                reached.add(vertex)
                found |= here
        return found if target in reached else set()

    def extend(self, branch: set[int], end: int, additions: Collection[int]) -> None:
        """Adds to a branch what is read nowhere else, back to the next addition, in place."""
        interior = {self.receivers[edge] for edge in branch} - {end}
        wanted = sorted(interior)
        while wanted:
            for edge in self.incoming[wanted.pop()]:
                branch.add(edge)
                source = self.senders[edge]
                if source in interior or source in additions or source == 0:
                    continue
                if {self.receivers[one] for one in self.outgoing[source]} <= interior:
                    interior.add(source)
                    wanted.append(source)


# What ends a branch.


def branch_ends(propagation: Propagation, vertex: int, branch: Collection[int]) -> dict[int, float]:
    """Returns the last layers that a residual addition takes linearly, as edges.

    Every layer comes with the part of m^(-α) that it takes: 1, or in a product of n layers, as of a
    gate and a branch, 1/n. A branch that ends in no layer that enters linearly raises ValueError.
    """
    return {
        layer: part
        for edge in propagation.incoming[vertex]
        if edge in branch
        for layer, part in _last_layers(propagation, edge, branch, vertex).items()
    }


def _last_layers(
    propagation: Propagation, edge: int, branch: Collection[int], end: int
) -> dict[int, float]:
    if found := _linear_layers(propagation, edge, branch):
        return found
    source = propagation.senders[edge]
    behind = [one for one in sorted(branch) if propagation.receivers[one] <= source]
    names = [name for one in behind for name in propagation.functions[one].weights]
    shown = f" (of {', '.join(map(repr, names[-3:]))})" if names else ""
    raise ValueError(
        f"depth rule: a branch{shown} that ends in vertex {end} brings vertex {source} there "
        "through no layer that it enters linearly, so that no weight can take m^(-α). "
        "Multiply the branch by a scale or a layer of its own before it is added, or multiply "
        "it by m^(-α) in the model and take depth_rule=None for it"
    )


def _linear_layers(
    propagation: Propagation, edge: int, branch: Collection[int]
) -> dict[int, float]:
    """The last layers of a branch on the way back from an edge; empty if none enters linearly."""
    if propagation.layers[edge]:
        return {edge: 1.0}
    source = propagation.senders[edge]
    parts = len(linear_slices(propagation.functions[edge].before, source))
    if not parts:
        return {}
    edges = [one for one in propagation.incoming[source] if one in branch]
    expression = propagation.architecture.expressions.get(source)
    is_product = expression is not None or (
        edges and propagation.operators[edges[0]] == Operator.PRODUCT
    )
    linear = [
        one
        for one in edges
        if not expression or linear_slices(expression, propagation.senders[one])
    ]
    ways = [_linear_layers(propagation, one, branch) for one in linear]
    if not is_product and not all(ways):
        return {}
    ways = [way for way in ways if way]
    share = parts * (len(ways) if is_product else 1)
    return {one: part / share for way in ways for one, part in way.items()}


def linear_slices(expression: Expression, source: int) -> list[Variable]:
    """Returns the slices of a vertex in which an expression is linear.

    A mean is linear; what is divided by a mean of its own squares, as by a normalization, is not.
    """
    opened = _opened(expression)
    own = [one for one in variables(opened) if one.kind == "vertex" and one.source == source]
    return [one for one in own if slope(opened, one, _special)]


def _opened(expression: Expression) -> Expression:
    """An expression with means replaced by what they are taken of."""
    means = [one for one in statistics(expression) if one.name == "mean"]
    if not means:
        return expression
    return _opened(replaced(expression, {one: one.operand for one in means}))


def _special(variable: Variable) -> Moments | float:
    return 1.0 if variable.kind == "leaf" else Moments(0.0, 1.0)


# Multipliers.


def depth_multipliers(
    architecture: Architecture,
    base: Architecture | jraph.GraphsTuple,
    optimizer: Optimizer,
    *,
    exponent: float = 0.5,
) -> dict[str, Part]:
    """Returns the depth multiplier of every parameter by name, see above, and its place.

    Use it with weights from the initialization rule `second_moment` of the same exponent α.

    Raises:
      ValueError: another optimizer, a network without residual additions, or a branch that no layer
        enters linearly, so that no weight can take m^(-α).
    """
    check_optimizer(optimizer)
    ratio = block_ratio(architecture, base)
    places = places_of(architecture)
    sgd = optimizer == "sgd"
    power = 2 * exponent - 1 if sgd else exponent - 1
    rule, numbers = f"depth {optimizer}", {"m": ratio, "α": exponent}
    own = places.multiplier
    theirs = places_of(base).multiplier if isinstance(base, Architecture) else own
    of_base = base.parameters if isinstance(base, Architecture) else ()
    base_uses = {one.name: number_of_uses(one) for one in of_base}

    def multiplier(parameter: Parameter) -> Part:
        place, share = places.of(parameter)
        if place == "outside":
            return Part(1.0, rule, "in no branch")
        found = Part(ratio**power, rule, f"in a branch, m^({power:g})", numbers)
        if place == "end":
            ending = power - share * exponent * (2 if sgd else 1)
            how = "1/m" if share == 1 else f"m^({ending:g}), one of {round(1 / share)} layers"
            found = Part(ratio**ending, rule, f"ends a branch, {how}", numbers)
            if own != theirs and parameter.role == Role.HIDDEN:
                value = found.value / (own / theirs) ** (2 if sgd else 1)
                found = found._replace(value=value, symbols={**numbers, "multiplier there": own})
        uses = number_of_uses(parameter)
        before = base_uses.get(parameter.name, uses)
        if sgd and uses != before:
            symbols = {**found.symbols, "K": uses, "K_b": before}
            found = found._replace(value=found.value * (before / uses), symbols=symbols)
        return found

    return {parameter.name: multiplier(parameter) for parameter in architecture.parameters}


def block_ratio(
    architecture: Architecture | jraph.GraphsTuple, base: Architecture | jraph.GraphsTuple
) -> float:
    """Returns m, the number of residual blocks over that of the base.

    Raises:
      ValueError: one of them has none.
    """
    counts = residual_depth(architecture), residual_depth(base)
    if not all(counts):
        raise ValueError(
            f"depth rule: the network has {counts[0]} residual additions and the base "
            f"{counts[1]}; both need some. Chains have the rules depth and path_sum_activations"
        )
    return counts[0] / counts[1]


@derived
def stream_factor(architecture: Architecture) -> float:
    """Returns the product of what residual additions multiply the stream by, as 1/√2 of (x+h)/√2.

    Depth multipliers are for a product near 1: else blocks far from the output count less with
    every block behind them, weights that keep the variance do not shrink, and more blocks change
    the features more.
    """
    places, product = places_of(architecture), 1.0
    for edge in places.skips:
        before = places.propagation.functions[edge].before
        for one in linear_slices(before, places.propagation.senders[edge]):
            product *= abs(slope(_opened(before), one, _special) or 1.0)
    return product


@derived
def layers_of_branches(architecture: Architecture) -> dict[int, int]:
    """Returns the most layers on a way through the branches of every residual addition.

    By vertex: of attention 2 (values, outputs), of an MLP block 2, of `x + W relu(x)` 1.
    """
    graph, weight = architecture.graph, is_weight(architecture.graph)
    ends = graph.senders.tolist(), graph.receivers.tolist()
    return {
        vertex: _most_layers(*ends, weight, branch).get(vertex, 0)
        for vertex, branch in residual_branches(architecture).items()
    }


def _most_layers(
    senders: Sequence[int], receivers: Sequence[int], weight: np.ndarray, edges: Iterable[int]
) -> dict[int, int]:
    """Returns the most layers on ways of some edges to every vertex that they reach."""
    found: dict[int, int] = {}
    for edge in sorted(edges, key=lambda edge: receivers[edge]):
        layers = found.get(senders[edge], 0) + int(weight[edge])
        found[receivers[edge]] = max(found.get(receivers[edge], 0), layers)
    return found


class Places:
    """Where the parameters of a network stand: `end` of a branch, `inside` one, or `outside`.

    Attributes:
      branches: edges of the branches by the vertex of their addition.
      ends: edges of the layers that end them, and the part of m^(-α) that each takes.
      inside: edges of all branches.
      skips: edges around the branches.
      normalized: those of the ends behind which a normalization stands.
      multiplier: the constant by which the model multiplies what ends its branches.
    """

    def __init__(self, architecture: Architecture):
        graph = architecture.graph
        self.branches = residual_branches(architecture)
        self.propagation = Propagation(architecture)
        self.ends = {
            edge: part
            for vertex, branch in self.branches.items()
            for edge, part in branch_ends(self.propagation, vertex, branch).items()
        }
        self.inside: set[int] = set().union(*self.branches.values())
        self.normalized = {edge for edge in self.ends if self.propagation.ends_in_norm(edge)}
        self.skips = {
            edge
            for vertex, branch in self.branches.items()
            for edge in self.propagation.incoming[vertex]
            if edge not in branch
        }
        self.interior = {int(graph.receivers[edge]) for edge in self.inside} - set(self.branches)
        self._add_what_blocks_read()
        slopes = [
            slope(self.propagation.functions[edge].after, OUTPUT, self.propagation.distribution)
            for edge in sorted(self.ends.keys() - self.normalized)
        ]
        self.multiplier = next((abs(one) for one in slopes if one), 1.0)

    def _add_what_blocks_read(self) -> None:
        """Counts as inside what only some of the branches read, as a layer that modulates a block.

        What all of them read, as a condition or the features of an encoder, stands outside.
        """
        branches_of: dict[int, set[int]] = collections.defaultdict(set)
        for end, branch in self.branches.items():
            for edge in branch:
                branches_of[self.propagation.receivers[edge]].add(end)
        targets: dict[int, set[int]] = collections.defaultdict(set)
        for source, target in zip(
            self.propagation.senders, self.propagation.receivers, strict=True
        ):
            targets[source].add(target)
        for vertex in sorted(targets, reverse=True):
            if vertex == 0 or vertex in self.branches or not targets[vertex] <= self.interior:
                continue
            reading = set().union(*(branches_of[target] for target in targets[vertex]))
            if len(reading) < len(self.branches):
                self.interior.add(vertex)
                self.inside |= set(self.propagation.incoming[vertex])
                branches_of[vertex] |= reading

    def of(self, parameter: Parameter) -> tuple[str, float]:
        """Returns where a parameter stands, and of an end the part of m^(-α) that it takes.

        It is the one nearest to an end if there are several places.
        """
        found = (
            {self._of_use(use) for use in parameter.uses}
            if parameter.uses
            else {self._by_edges(parameter)}
        )
        place = next(place for place in ("end", "inside", "outside") if place in found)
        edges = {parameter.edge, *parameter.further_edges}
        edges |= {edge for use in parameter.uses for edge in (use.edge, *use.ends)}
        parts = [self.ends[edge] for edge in edges if edge in self.ends]
        return place, max(parts, default=1.0)

    def _by_edges(self, parameter: Parameter) -> str:
        if parameter.layer != Role.HIDDEN or parameter.role == Role.EMBEDDING:
            return "outside"
        edges = {parameter.edge, *parameter.further_edges} - {None}
        if edges & self.ends.keys():
            return "end"
        return "inside" if edges <= self.inside else "outside"

    def _of_use(self, use: ParameterUse) -> str:
        if use.kind in ("scale", "offset", "value") and set(use.ends) & self.ends.keys():
            return "end" if set(use.ends) & self.normalized else "inside"
        if use.kind in ("scale", "offset", "value") and (use.edges or use.edge is None):
            edges = {*use.edges, *use.ends}
            return "inside" if edges and edges <= self.inside else "outside"
        if use.kind == "bias" and any(edge in self.skips for edge in use.edges):
            return "end"
        if use.edge is not None:
            if use.edge in self.ends:
                return "inside" if use.edge in self.normalized else "end"
            return "inside" if use.edge in self.inside else "outside"
        if use.vertex in self.branches and use.kind == "bias":
            return "end"
        return "inside" if use.vertex in self.interior else "outside"


@derived
def places_of(architecture: Architecture) -> Places:
    """Returns where the parameters of a network stand; what `branch_ends` raises."""
    return Places(architecture)


def number_of_uses(parameter: Parameter) -> int:
    """Returns how often an entry of a leaf is used: by layers that are not slices of it."""
    edges = collections.Counter(
        use.slices for use in parameter.uses if use.kind in ("weight", "scale", "bias", "offset")
    )
    return max(edges.values(), default=1)


def check_optimizer(optimizer: str) -> None:
    """Raises ValueError unless a depth rule has this name."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("depth rule", optimizer, OPTIMIZERS))
