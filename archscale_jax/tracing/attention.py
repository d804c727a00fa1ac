"""Products of queries and keys: which sums of products of features are such, and their scale."""

import functools
from collections.abc import Mapping

from archscale_jax._architecture import AttentionLogits
from archscale_jax._expressions import (
    Apply,
    Constant,
    Expression,
    Statistic,
    Variable,
    statistics,
    variables,
)
from archscale_jax._quadrature import slope
from archscale_jax.tracing.flow import Edge, Kind
from archscale_jax.tracing.state import Logits, State


def attention_logits(state: State) -> dict[int, AttentionLogits]:
    """Returns the sums of products of features, as of queries and keys, by vertex."""
    found: dict[int, AttentionLogits] = {}
    for vertex, one in state.queries.items():
        query, count = one.queries, max(one.sizes)
        behind = [edge.before for edge in state.flow.edges if edge.source == vertex]
        scale = min((_constants(before, vertex) for before in behind), default=1.0)
        if vertex != query:
            scale *= _constants(state.flow.expressions[vertex], query)
        found[vertex] = AttentionLogits(query, count, scale)
    return found


def queries_of(state: State) -> dict[int, Logits]:
    """Returns the sums of products of queries and keys: those of which a softmax or the like is.

    A sum over the state of a scan, or the scores of images and texts, which nothing follows but
    linear functions, are none; nor are sums of a router's shares.
    """
    bent, shared = set(), set()
    for edge in state.flow.edges:
        product = state.flow.kinds[edge.target] == Kind.PRODUCT
        if edge.source in state.queries and edge.source not in bent:
            of_itself = state.queries[edge.source].queries == edge.source
            if (product or of_itself) and _bends_scores(edge.before, edge.source):
                bent.add(edge.source)
        if edge.target in state.queries and product and _takes_weights(edge):
            shared.add(edge.target)
    return {vertex: one for vertex, one in state.queries.items() if vertex in bent - shared}


def _bends_scores(expression: Expression, vertex: int) -> bool:
    """Whether a function that is not linear is applied to scores, as the exp of a softmax is.

    Scores are a vertex of their own, or sums of products of slices of one that holds queries and
    keys. Squares whose mean over features a norm takes are no such function.
    """

    @functools.cache
    def holds(one: Expression) -> bool:
        if one == Variable("vertex", vertex) or _sums_products(one, vertex):
            return True
        return isinstance(one, Apply) and any(map(holds, one.operands))

    @functools.cache
    def bends(one: Expression) -> bool:
        if isinstance(one, Statistic):
            return not one.units and bends(one.operand)
        if not isinstance(one, Apply):
            return False
        linear = one.name.split(" ")[0] in ("mul", "div", "choose", *_LINEAR)
        return (not linear and any(map(holds, one.operands))) or any(map(bends, one.operands))

    return bends(expression)


def _sums_products(one: Expression, vertex: int) -> bool:
    if not isinstance(one, Statistic) or one.name != "mean" or not one.units:
        return False
    product = one.operand
    if not isinstance(product, Apply) or product.name != "mul":
        return False
    left, right = (
        {each for each in variables(side) if (each.kind, each.source) == ("vertex", vertex)}
        for side in product.operands
    )
    return bool(left) and bool(right) and not left & right


def _takes_weights(edge: Edge) -> bool:
    """Whether a product takes a softmax or a choice of its source, as of a router, no features.

    Of several slices of the source, as those of rotary positions, it must take so of all.
    """
    own = [
        one for one in variables(edge.before) if one.kind == "vertex" and one.source == edge.source
    ]
    factors = [slope(edge.before, one, lambda variable: 1.0) for one in own]
    normalized = bool(statistics(edge.before))
    return all(one == 0 or (one is None and normalized) for one in factors)


def query_shares(logits: Mapping[int, AttentionLogits]) -> dict[int, float]:
    """Returns by how much queries are smaller, by vertex, where products with keys are summed.

    A sum of d products has d times their second moment, which 1/√d in front of queries or behind
    the sum takes back. A model without it, such as T5, draws its queries smaller.
    """
    found: dict[int, float] = {}
    for vertex, (query, count, scale) in logits.items():
        factor = count * scale**2
        if factor > 1 and vertex not in found and vertex != query:
            found[query] = min(found.get(query, 1.0), 1 / factor)
    return found


def _constants(expression: Expression, vertex: int) -> float:
    """The constants that multiply a vertex before a function that is not linear; 1 without them."""
    return _linear_constants(expression, vertex)[0]


_LINEAR = ("add", "add_any", "sub", "neg", "select_n", "max", "min", "convert_element_type")


def _linear_constants(expression: Expression, vertex: int) -> tuple[float, bool]:
    """The same, and whether nothing but sums, masks and constants stands on the way."""
    if isinstance(expression, Statistic):
        factor, linear = _linear_constants(expression.operand, vertex)
        read = {one for one in variables(expression.operand) if one.source == vertex}
        if expression.name == "mean" and len(read) > 1:  # of products; their sum is count times it
            return factor / expression.count, True
        return factor, linear and expression.name != "mean"
    if not isinstance(expression, Apply):
        return 1.0, True
    found = [
        _linear_constants(one, vertex)
        for one in expression.operands
        if any((v.kind, v.source) == ("vertex", vertex) for v in variables(one))
    ]
    if not found:
        return 1.0, True
    factor, linear = min(found)
    constants = [one for one in expression.operands if isinstance(one, Constant)]
    name = expression.name.split(" ")[0]
    if name == "mul" and linear and constants:
        factor *= abs(float(constants[0]))
    elif name == "div" and linear and constants and expression.operands[1] is constants[0]:
        factor /= abs(float(constants[0]))
    return factor, linear and name in ("mul", "div", *_LINEAR)
