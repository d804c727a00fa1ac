"""What every primitive of JAX does to features, weights and constants."""

from archscale_jax.tracing.primitives import (  # noqa: F401  (they register themselves)
    elementwise,
    products,
    reductions,
    reshuffles,
)
from archscale_jax.tracing.primitives.elementwise import register_elementwise
from archscale_jax.tracing.primitives.registry import HANDLERS, register_primitive

__all__ = ["HANDLERS", "register_elementwise", "register_primitive"]
