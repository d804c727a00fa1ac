"""A model with the forward multipliers that no weight can take (theory §12)."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from archscale_jax._frameworks import is_static
from archscale_jax._trees import PyTree
from archscale_jax.rules._forward import Forward
from archscale_jax.tracing.attention import queries_of
from archscale_jax.tracing.multiplied import Place, with_multipliers
from archscale_jax.tracing.trace import Reading
from archscale_jax.tracing.values import TraceError


def multiplied_apply(apply: Callable[..., Any], forward: Forward) -> Callable[..., Any]:
    """Returns `(params, inputs, key)` to the outputs, with the products of `forward` multiplied.

    Args:
      apply: `(params, *inputs, key=None)`; inputs that are not arrays are constants of it.
      forward: the multipliers.
    """

    @functools.lru_cache(maxsize=16)
    def compiled(static: tuple[Any, ...], has_key: bool) -> Callable[..., Any]:
        def function(params: PyTree, *arrays: PyTree) -> Any:
            key, rest = (arrays[0], arrays[1:]) if has_key else (None, arrays)
            given = iter(rest)
            inputs = [next(given) if one is _ARRAYS else one for one in static]
            return apply(params, *inputs, key=key)

        return jax.jit(
            functools.partial(
                with_multipliers, function, places=lambda read: _places(read, forward)
            )
        )

    def call(params: PyTree, inputs: tuple[PyTree, ...], key: jax.Array | None) -> Any:
        static = tuple(one if is_static(one) else _ARRAYS for one in inputs)
        arrays = [one for one in inputs if not is_static(one)]
        keys = [] if key is None else [key]
        return compiled(static, key is not None)(params, *keys, *arrays)

    return call


_ARRAYS = object()
"""Stands for an input that is an array, or a tree of them."""


def _places(reading: Reading, forward: Forward) -> dict[Place, float]:
    """The equations whose results are multiplied."""
    found = _logits(reading, forward)
    if forward.attention != 1:
        found |= dict.fromkeys(_attention(reading), forward.attention)
    return found


def _logits(reading: Reading, forward: Forward) -> dict[Place, float]:
    """Those that tables make as weights; none where a call reads rows of them alone."""
    state = reading.state
    uses = [use for number, use in enumerate(state.uses) if number not in state.replaced]
    kinds = {name: {use.kind for use in uses if use.leaf == name} for name in forward.tables}
    for name, own in kinds.items():
        if "weight" not in own and not own <= {"embedding"}:
            raise TraceError(
                f"{name!r} is no weight of a layer in this call of the model (but {sorted(own)}), "
                "so that its logits, which plan.apply multiplies, were not found; call the model "
                "as parametrize did, or pass form='folded' to it"
            )
    return {
        state.places[use.vertex]: forward.tables[use.leaf]
        for use in uses
        if use.kind == "weight" and use.leaf in forward.tables
    }


def _attention(reading: Reading) -> frozenset[Place]:
    """Those that sum products of queries and keys."""
    logits = queries_of(reading.state).values()
    sizes = frozenset().union(*(one.sizes for one in logits))
    if len(sizes) != 1:
        raise TraceError(
            f"attention_scale='1/d': products of queries and keys of {len(sizes)} head sizes "
            f"({sorted(sizes)}) in this call of the model, one is needed; scale them in the model"
        )
    return frozenset().union(*(one.places for one in logits))
