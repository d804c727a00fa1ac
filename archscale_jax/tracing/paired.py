"""Reads the jaxprs of a model at two sizes side by side: which axes run along each other.

Every value has a node for each of its axes that grow. Operations unite nodes: additions, products
and contractions those of the axes that meet, reshapes those of an axis and of the one it is merged
into, with the ratio of their blocks.
"""

import collections
import difflib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jax.extend import core

from archscale_jax.tracing.axes import dot_axes, gathered, joined, moved, shape_of
from archscale_jax.tracing.jaxprs import CALLS, inner_jaxpr, loop_operands
from archscale_jax.tracing.state import line_of
from archscale_jax.tracing.values import NO_LABELS, Axes

LeafAxis = tuple[str, int]
"""Name of a leaf, and one of its axes."""


CONSTANT, PARAMETER, FEATURE = range(3)
_LINEAR = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "neg", "copy",
           "convert_element_type", "slice", "reduce_sum", "gather", "rev", "reduce_precision",
           "sharding_constraint", "copy_p", "optimization_barrier")  # fmt: skip
"""Primitives whose result is multiplied with their first operand."""


class Value(NamedTuple):
    """A value of both jaxprs.

    Attributes:
      nodes: of every axis that grows, its node, in a set of one; of others an empty set.
      kind: constant, made of params alone, or a feature.
      leaves: of a value made of params, the axes of leaves that run along every axis.
      scales: leaves with which the whole value is multiplied, or None.
    """

    nodes: Axes
    kind: int
    leaves: Axes
    scales: frozenset[str] | None


class Reader:
    """Unites axes into spaces while it goes through the equations of two jaxprs."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.ratios: list[Fraction] = []  # block of a node over that of its parent
        self.sizes: list[tuple[int, int]] = []
        self.pooled: set[int] = set()
        self.stacked: set[LeafAxis] = set()
        self.reads: set[LeafAxis] = set()
        self.writes: set[LeafAxis] = set()
        self.leaf_axes: dict[LeafAxis, int] = {}
        self.compensation: dict[str, frozenset[str]] = {}

    # Nodes: a node is an axis, united with others by the ratio of their blocks.

    def node(self, small: int, large: int) -> int:
        """Returns a new node, of an axis of these sizes."""
        self.parents.append(len(self.parents))
        self.ratios.append(Fraction(1))
        self.sizes.append((small, large))
        return len(self.parents) - 1

    def root(self, node: int) -> tuple[int, Fraction]:
        """Returns the root of a node, and the node's block over that of the root."""
        ratio = Fraction(1)
        while self.parents[node] != node:
            ratio *= self.ratios[node]
            node = self.parents[node]
        return node, ratio

    def unite(self, node: int, other: int, ratio: Fraction | int = 1) -> None:
        """Says that the block of a node is so many times that of another."""
        (first, of_first), (second, of_second) = self.root(node), self.root(other)
        if first != second:
            self.parents[first] = second
            self.ratios[first] = ratio * of_second / of_first

    def blocks(self) -> dict[int, Fraction]:
        """Returns the smallest blocks of roots of which all blocks of their nodes are whole."""
        found = collections.defaultdict(list)
        for node in range(len(self.parents)):
            root, ratio = self.root(node)
            found[root].append(ratio)
        return {
            root: Fraction(
                math.lcm(*(one.denominator for one in ratios)),
                math.gcd(*(one.numerator for one in ratios)),
            )
            for root, ratios in found.items()
        }

    # Values.

    def fresh(self, small: Any, large: Any, nodes: Axes = (), kind: int = CONSTANT) -> Value:
        """A value whose axes have these nodes where they grow, and new ones where none is given."""
        shapes = shape_of(small), shape_of(large)
        if len(shapes[0]) != len(shapes[1]):
            raise ValueError(
                f"the functions differ: a value has shape {shapes[0]} in the small one and "
                f"{shapes[1]} in the large one; pass one model at two sizes"
            )
        given = nodes or (NO_LABELS,) * len(shapes[0])
        found = []
        for before, after, labels in zip(*shapes, given, strict=True):
            if before == after:
                found.append(NO_LABELS)
            elif labels:
                first, *rest = labels
                for one in rest:
                    self.unite(one, first)
                found.append(frozenset({first}))
            else:
                found.append(frozenset({self.node(before, after)}))
        return Value(tuple(found), kind, (NO_LABELS,) * len(found), None)

    def leaf(self, name: str, small: Any, large: Any) -> Value:
        """Returns the value of a leaf, and notes its axes that grow."""
        value = self.fresh(small, large, kind=PARAMETER)
        for axis, labels in enumerate(value.nodes):
            self.leaf_axes.update(((name, axis), node) for node in labels)
        leaves = tuple(frozenset({(name, axis)}) for axis in range(len(value.nodes)))
        return value._replace(leaves=leaves, scales=frozenset({name}))

    def run(self, small: core.Jaxpr, large: core.Jaxpr, found: dict[Any, Value]) -> list[Value]:
        """Reads the equations of two jaxprs, and returns the values of their results."""

        def value(one: Any, other: Any) -> Value:
            if isinstance(one, core.Literal):
                return self.fresh(one, other)
            if one not in found:  # a constant
                found[one] = self.fresh(one, other)
            return found[one]

        for one, other in aligned(small, large):
            if other is None:
                (operand,) = (atom for atom in one.invars if not _is_number(atom))
                found[one.outvars[0]] = found[operand]
                continue
            operands = [value(*pair) for pair in zip(one.invars, other.invars, strict=True)]
            results = self._equation(one, other, operands)
            found.update(zip(one.outvars, results, strict=True))
        return [value(*pair) for pair in zip(small.outvars, large.outvars, strict=True)]

    def _equation(
        self, one: core.JaxprEqn, other: core.JaxprEqn, operands: list[Value]
    ) -> list[Value]:
        name = one.primitive.name
        if name == "scan":
            return self._scan(one, other, operands)
        if name in ("cond", "while") or name in CALLS:
            found = self._call(one, other, operands)
            if found is not None:
                return found
        kind = max((operand.kind for operand in operands), default=CONSTANT)
        rule = _RULES.get(name, Reader._generic)
        nodes, contracted = rule(self, one, other, operands)
        if kind == FEATURE:
            self._note_writes(operands, contracted)
        values = [
            self.fresh(*pair, nodes if len(shape_of(pair[0])) == len(nodes) else (), kind)
            for pair in zip(one.outvars, other.outvars, strict=True)
        ]
        scales = _scales(name, operands, kind)
        values = [value._replace(scales=scales) for value in values]
        if kind != PARAMETER:
            return values
        leaves = _leaves(one, operands)
        fits = [len(leaves) == len(value.nodes) for value in values]
        return [
            value._replace(leaves=leaves) if fit else value
            for value, fit in zip(values, fits, strict=True)
        ]

    def _note_writes(self, operands: Sequence[Value], contracted: Sequence[set[int]]) -> None:
        """Notes along which axes leaves meet features, and are not summed over."""
        for operand, summed in zip(operands, contracted, strict=True):
            if operand.kind == PARAMETER:
                for axis, labels in enumerate(operand.leaves):
                    if axis not in summed:
                        self.writes |= labels

    # Functions inside of functions.

    def _call(
        self, one: core.JaxprEqn, other: core.JaxprEqn, operands: list[Value]
    ) -> list[Value] | None:
        if one.primitive.name == "while":
            outputs = zip(one.outvars, other.outvars, strict=True)
            return [self.fresh(*pair, kind=FEATURE) for pair in outputs]
        if one.primitive.name == "cond":
            branches = zip(one.params["branches"], other.params["branches"], strict=True)
            found = [self._inner(*branch, operands[1:]) for branch in branches]
            for results in zip(*found, strict=True):
                self._unite_values(results)
            return found[0]
        small, large = inner_jaxpr(one), inner_jaxpr(other)
        if small is None or large is None or len(small.jaxpr.invars) != len(operands):
            return None
        return self._inner(small, large, operands)

    def _inner(
        self, small: core.ClosedJaxpr, large: core.ClosedJaxpr, operands: list[Value]
    ) -> list[Value]:
        environment = dict(zip(small.jaxpr.invars, operands, strict=True))
        return self.run(small.jaxpr, large.jaxpr, environment)

    def _unite_values(self, values: Sequence[Value]) -> None:
        for nodes in zip(*(value.nodes for value in values), strict=True):
            met = [node for labels in nodes for node in labels]
            for node in met[1:]:
                self.unite(node, met[0])

    def _scan(self, one: core.JaxprEqn, other: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        """Reads the body once; what is carried has the same axes before and after it."""
        fixed, carried = loop_operands(one)
        inner = inner_jaxpr(one), inner_jaxpr(other)
        assert inner[0] is not None and inner[1] is not None
        if one.params["length"] != other.params["length"]:
            for operand in operands[fixed + carried :]:
                self.stacked |= operand.leaves[0]
        sliced = [
            value._replace(nodes=value.nodes[1:], leaves=value.leaves[1:], scales=None)
            for value in operands[fixed + carried :]
        ]
        before = operands[fixed : fixed + carried]
        state = [value._replace(kind=FEATURE, scales=None) for value in before]
        results = self._inner(inner[0], inner[1], [*operands[:fixed], *state, *sliced])
        for pair in zip(state, results[:carried], strict=True):
            self._unite_values(pair)
        outputs = list(zip(one.outvars, other.outvars, strict=True))[carried:]
        stacks = [
            self.fresh(*pair, (NO_LABELS, *value.nodes), value.kind)
            for value, pair in zip(results[carried:], outputs, strict=True)
        ]
        return [*(value._replace(scales=None) for value in results[:carried]), *stacks]

    # Rules: of an equation, the nodes of its result, and the axes of operands that are summed over.

    def _generic(self, one, other, operands) -> tuple[Axes, list[set[int]]]:
        """Operations entry by entry, and all that keep, drop or reshuffle axes."""
        del other
        nothing = [set() for _ in operands]
        rank = len(shape_of(one.outvars[0]))
        if not operands:
            return (), nothing
        if len(operands) == 1 or one.primitive.name in ("dynamic_slice", "sort", "top_k"):
            first = operands[0]
            if "axes" in one.params and rank < len(first.nodes):
                for axis in one.params["axes"]:
                    self.pooled |= first.nodes[axis]
            return moved(one, first.nodes), nothing
        same = [value.nodes for value in operands if len(value.nodes) == rank]
        return joined(same, rank), nothing

    def _reshape(self, one, other, operands) -> tuple[Axes, list[set[int]]]:
        shapes = [shape_of(equation.invars[0]) for equation in (one, other)]
        results = [shape_of(equation.outvars[0]) for equation in (one, other)]
        found: list[Any] = [NO_LABELS] * len(results[0])
        for before, after in _groups(shapes, results):
            grown = [axis for axis in before if shapes[0][axis] != shapes[1][axis]]
            given = [axis for axis in after if results[0][axis] != results[1][axis]]
            if len(grown) != 1 or len(given) != 1:
                continue
            behind = [
                math.prod(sizes[axis] for axis in axes if axis > place)
                for sizes, axes, place in ((shapes[0], before, grown[0]),
                                           (results[0], after, given[0]))
            ]  # fmt: skip
            axis = given[0]
            node = self.node(results[0][axis], results[1][axis])
            (source,) = operands[0].nodes[grown[0]]
            self.unite(node, source, Fraction(behind[0], behind[1]))
            found[axis] = frozenset({node})
        return tuple(found), [set() for _ in operands]

    def _dot(self, one, other, operands) -> tuple[Axes, list[set[int]]]:
        del other
        left, right = operands
        contracted, _ = one.params["dimension_numbers"]
        for axes in zip(*contracted, strict=True):
            self._contract(left, right, axes)
        return dot_axes(one, left.nodes, right.nodes), [set(axes) for axes in contracted]

    def _contract(self, left: Value, right: Value, axes: tuple[int, int]) -> None:
        """Unites two axes that are summed over, and notes who reads them."""
        nodes = left.nodes[axes[0]] | right.nodes[axes[1]]
        if not nodes:
            return
        self._unite_values([Value((one.nodes[axis],), 0, (), None)
                            for one, axis in ((left, axes[0]), (right, axes[1]))])  # fmt: skip
        weight, axis, of = (right, axes[1], left)
        if weight.kind != PARAMETER:
            weight, axis, of = (left, axes[0], right)
        if weight.kind != PARAMETER:
            self.pooled |= nodes
            return
        self.reads |= weight.leaves[axis]
        for name, _ in weight.leaves[axis]:
            if of.scales is not None and of.kind == FEATURE:
                self.compensation[name] = of.scales

    def _convolution(self, one, other, operands) -> tuple[Axes, list[set[int]]]:
        numbers = one.params["dimension_numbers"]
        features, kernel = operands[:2]
        channels, (output, inputs) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        groups = [equation.params["feature_group_count"] for equation in (one, other)]
        found = [NO_LABELS] * len(numbers.out_spec)
        found[numbers.out_spec[0]] = features.nodes[numbers.lhs_spec[0]]
        found[numbers.out_spec[1]] = kernel.nodes[output]
        if groups[0] == groups[1]:
            self._contract(features, kernel, (channels, inputs))
        elif features.nodes[channels] and kernel.nodes[output]:  # groups of a fixed size
            (node,), (source,) = kernel.nodes[output], features.nodes[channels]
            shape = shape_of(one.invars[1])
            each = Fraction(shape[output], groups[0] * shape[inputs])
            self.unite(node, source, each)
        return tuple(found), [set(), {inputs}]

    def _gather(self, one, other, operands) -> tuple[Axes, list[set[int]]]:
        del other
        return gathered(one, operands[0].nodes, operands[1].nodes), [set(), set()]


_RULES: dict[str, Callable[..., tuple[Axes, list[set[int]]]]] = {
    "reshape": Reader._reshape,
    "dot_general": Reader._dot,
    "conv_general_dilated": Reader._convolution,
    "gather": Reader._gather,
}


def _scales(name: str, operands: Sequence[Value], kind: int) -> frozenset[str] | None:
    """The leaves with which the result of an operation is multiplied as a whole."""
    if kind == CONSTANT or not operands:
        return None
    first = operands[0].scales
    if name in ("add", "sub", "add_any"):
        known = [one for operand in operands if (one := operand.scales) is not None]
        return frozenset().union(*known) if len(known) == len(operands) else None
    if name in ("mul", "dot_general", "conv_general_dilated"):
        found = [one for operand in operands if (one := operand.scales) is not None]
        return min(found, key=len, default=None)
    return first if name in _LINEAR or name == "div" else None


def _leaves(equation: core.JaxprEqn, operands: Sequence[Value]) -> Axes:
    """The axes of leaves along the axes of a value that is made of params alone."""
    all_axes = [operand.leaves for operand in operands]
    name = equation.primitive.name
    if name == "dot_general":
        return dot_axes(equation, all_axes[0], all_axes[1])
    if name == "gather":
        return gathered(equation, all_axes[0], all_axes[1])
    if len(operands) == 1:
        return moved(equation, all_axes[0])
    return joined(all_axes, len(shape_of(equation.outvars[0])))


def _groups(
    shapes: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]
) -> list[tuple[list[int], list[int]]]:
    """Axes before and after a reshape that are merged or split together, in both sizes."""

    def products(sizes: Sequence[tuple[int, ...]], axes: list[int]) -> list[int]:
        return [math.prod(one[axis] for axis in axes) for one in sizes]

    found: list[tuple[list[int], list[int]]] = []
    before, after = [], []
    left, right = (
        collections.deque(range(len(shapes[0]))),
        collections.deque(range(len(results[0]))),
    )
    while left or right:
        if left and (not right or products(shapes, before)[0] <= products(results, after)[0]):
            before.append(left.popleft())
        else:
            after.append(right.popleft())
        if products(shapes, before) == products(results, after):
            found.append((before, after))
            before, after = [], []
    return found


# Which equations correspond.


def unwrapped(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Returns what a function that only calls another one calls, with the same inputs."""
    equations, outer = closed.eqns, closed.jaxpr
    if len(equations) != 1 or equations[0].primitive.name not in CALLS:
        return closed
    (equation,) = equations
    inner, given = inner_jaxpr(equation), equation.invars
    whole = inner is not None and len(inner.jaxpr.invars) == len(given) == len(set(map(id, given)))
    if inner is None or not whole or list(equation.outvars) != list(outer.outvars):
        return closed
    if any(atom not in outer.invars for atom in given if not isinstance(atom, core.Literal)):
        return closed
    names = dict(zip(given, inner.jaxpr.invars, strict=True))
    invars = [names.get(variable, variable) for variable in outer.invars]
    jaxpr = inner.jaxpr.replace(invars=invars, debug_info=outer.debug_info)
    return unwrapped(core.ClosedJaxpr(jaxpr, inner.consts))


def aligned(
    small: core.Jaxpr, large: core.Jaxpr
) -> list[tuple[core.JaxprEqn, core.JaxprEqn | None]]:
    """Returns the equations of the small jaxpr with those of the large one.

    Products with a number that only one of them has, such as forward multipliers, are no
    difference: None stands beside them, or they are left out.

    Raises:
      ValueError: other differences.
    """
    names = [[equation.primitive.name for equation in one.eqns] for one in (small, large)]
    if names[0] == names[1]:
        return list(zip(small.eqns, large.eqns, strict=True))
    found: list[tuple[core.JaxprEqn, core.JaxprEqn | None]] = []
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for _, first, last, start, stop in matcher.get_opcodes():
        ours, theirs = small.eqns[first:last], large.eqns[start:stop]
        if names[0][first:last] == names[1][start:stop]:
            found += zip(ours, theirs, strict=True)
        elif all(map(_scales_by_number, (*ours, *theirs))):
            found += [(equation, None) for equation in ours]
        else:
            raise ValueError(_where_they_differ(ours, theirs))
    return found


def _is_number(atom: Any) -> bool:
    return isinstance(atom, core.Literal) and not shape_of(atom)


def _scales_by_number(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name == "mul" and sum(map(_is_number, equation.invars)) == 1


def _where_they_differ(small: Sequence[core.JaxprEqn], large: Sequence[core.JaxprEqn]) -> str:
    (one, other) = (
        f"{found[0].primitive.name} at {line_of(found[0])}" if found else "nothing"
        for found in (small, large)
    )
    return (
        f"small and large do not do the same operations: where the small one has {one}, the large "
        f"one has {other}; accepted are functions that differ in sizes alone. Blocks that are not "
        "stacked grow in a call of their own, in which no width differs"
    )
