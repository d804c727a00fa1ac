"""Spaces of features that grow from a small model to a large one, read off both traced functions.

The two jaxprs are read side by side. An axis whose size differs belongs to a space of features;
axes that run along each other, through additions, products, contractions and reshapes, belong to
the same one. A space of n features is n/b blocks of b features that stay together: a head, a group.
An axis that is merged from others tells its b: of heads and their features, where heads grow, the
features of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.tracing.axes import dtype_of
from archscale_jax.tracing.paired import (
    FEATURE,
    PARAMETER,
    LeafAxis,
    Reader,
    Value,
    aligned,
    unwrapped,
)
from archscale_jax.tracing.state import line_of


class Space(NamedTuple):
    """What is known of the axis of a leaf that grows.

    Attributes:
      number: of its space of features.
      block: adjacent entries that stay together.
      reads: whether a layer sums over the axis.
      writes: whether features have the axis.
      stacked: whether it is the axis of a scan, whose entries are blocks of the network.
      pooled: whether the features of the space are summed by more than the weights of layers, as by
        a normalization over features: new ones would change the others.
    """

    number: int
    block: int
    reads: bool
    writes: bool
    stacked: bool
    pooled: bool


class Spaces(NamedTuple):
    """What `find_spaces` finds.

    Attributes:
      axes: of every axis of a leaf that grows, what it is.
      compensation: of a leaf whose axis is read and written, such as a tied table, the leaves that
        scale what it reads.
      differing: a function from small and large params to where their functions begin to differ.
    """

    axes: dict[LeafAxis, Space]
    compensation: dict[str, frozenset[str]]
    differing: Callable[[PyTree, PyTree], str]


def find_spaces(
    small: Callable[..., Any],
    large: Callable[..., Any],
    small_params: PyTree,
    large_params: PyTree,
    *inputs: PyTree,
) -> Spaces:
    """Reads two sizes of one function side by side.

    Args:
      small: `(params, *inputs)` to outputs.
      large: the same of other sizes.
      small_params: arrays or shapes.
      large_params: of the same names.
      *inputs: arrays or shapes.

    Raises:
      ValueError: the functions do not do the same operations in the same order.
    """
    jaxprs = [
        unwrapped(jax.make_jaxpr(function)(params, *inputs))
        for function, params in ((small, small_params), (large, large_params))
    ]
    names = list(named_leaves(small_params))
    reader = Reader()
    pairs = _pairs(jaxprs, "invars")
    values = [reader.leaf(name, *pair) for name, pair in zip(names, pairs, strict=False)]
    values += [reader.fresh(*pair, kind=FEATURE) for pair in pairs[len(names) :]]
    environment = dict(zip(jaxprs[0].jaxpr.invars, values, strict=True))
    reader.run(jaxprs[0].jaxpr, jaxprs[1].jaxpr, environment)
    blocks, pooled = reader.blocks(), {reader.root(node)[0] for node in reader.pooled}

    def space(leaf_axis: LeafAxis, node: int) -> Space:
        root, ratio = reader.root(node)
        notes = (leaf_axis in one for one in (reader.reads, reader.writes, reader.stacked))
        return Space(root, int(blocks[root] * ratio), *notes, pooled=root in pooled)

    def differing(small_params: PyTree, large_params: PyTree) -> str:
        params = small_params, large_params
        return _first_difference(reader, jaxprs, environment, params, inputs)

    axes = {leaf_axis: space(leaf_axis, node) for leaf_axis, node in reader.leaf_axes.items()}
    return Spaces(axes, dict(reader.compensation), differing)


# Where two functions differ.


def _pairs(jaxprs: Sequence[core.ClosedJaxpr], name: str) -> list[tuple[Any, Any]]:
    return list(zip(*(getattr(one.jaxpr, name) for one in jaxprs), strict=True))


def _first_difference(
    reader: Reader,
    jaxprs: Sequence[core.ClosedJaxpr],
    environment: Mapping[Any, Value],
    params: Sequence[PyTree],
    inputs: Sequence[PyTree],
) -> str:
    """Returns the first operation whose result in the large network is not that of the small one.

    Results are compared with copies of those of the small one, as its axes say, up to one number,
    as by sums over more features that are divided by their number later.
    """
    equations = [
        pair
        for pair in aligned(jaxprs[0].jaxpr, jaxprs[1].jaxpr)
        if pair[1] is not None and _gives_features(pair[0], environment)
    ]
    values = []
    for side, (closed, tree) in enumerate(zip(jaxprs, params, strict=True)):
        outputs = [pair[side].outvars[0] for pair in equations]  # pyright: ignore[reportOptionalMemberAccess]
        names = ("",) * len(closed.jaxpr.invars), ("",) * len(outputs)
        debug_info = core.DebugInfo("find_spaces", "small", *names)
        jaxpr = closed.jaxpr.replace(outvars=outputs, debug_info=debug_info)
        function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))
        values.append(function(*jax.tree.leaves((tree, *inputs))))
    leaf, ratio = None, 1.0
    for (equation, _), one, other in zip(equations, values[0], values[1], strict=True):
        leaf = _leaf_of(equation, environment) or leaf
        expected = _copies(reader, environment[equation.outvars[0]], np.asarray(one))
        ratio = _ratio(np.asarray(other), expected)
        if ratio is None:
            what = f"{equation.primitive.name} at {line_of(equation)}"
            return what if leaf is None else f"{what}, in or behind what reads {leaf!r}"
    return f"the last operation, whose result is {ratio:.3g} times what it was, behind {leaf!r}"


def _gives_features(equation: core.JaxprEqn, environment: Mapping[Any, Value]) -> bool:
    result = equation.outvars[0]
    known = result in environment and environment[result].kind == FEATURE
    return known and jnp.issubdtype(dtype_of(result), jnp.floating)


def _leaf_of(equation: core.JaxprEqn, environment: Mapping[Any, Value]) -> str | None:
    names = [
        name
        for operand in equation.invars
        if not isinstance(operand, core.Literal) and environment[operand].kind == PARAMETER
        for labels in environment[operand].leaves
        for name, _ in labels
    ]
    return min(names, default=None)


def _copies(reader: Reader, value: Value, array: np.ndarray) -> np.ndarray:
    blocks = reader.blocks()
    for axis, labels in enumerate(value.nodes):
        for node in labels:
            root, ratio = reader.root(node)
            small, large = reader.sizes[node]
            index = copied_index(small, large, int(blocks[root] * ratio))
            array = np.take(array, index, axis)
    return array


def _ratio(found: np.ndarray, expected: np.ndarray) -> float | None:
    """The number by which an array is another one, None if by none; what is not finite is equal."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), finite):
        return None
    found, expected = found[finite], expected[finite]
    square = float(np.sum(expected**2))
    ratio = float(np.sum(found * expected)) / square if square else 1.0
    apart = np.abs(found - ratio * expected).max(initial=0.0)
    return ratio if apart <= 1e-3 * np.abs(found).max(initial=0.0) + 1e-12 else None


def copied_index(small: int, large: int, block: int, what: str = "an axis") -> np.ndarray:
    """Returns of which of the small entries every large one is a copy.

    Blocks of adjacent entries stay together; copies of a block stand beside each other.

    Raises:
      ValueError: sizes that are not made of such blocks.
    """
    if small % block or large % block or large < small:
        raise ValueError(
            f"{what} has {small} entries, in blocks of {block}, and cannot grow to {large}; "
            f"accepted are multiples of {block} from {small} on"
        )
    blocks = np.arange(large // block) * (small // block) // (large // block)
    return (blocks[:, None] * block + np.arange(block)).ravel()
