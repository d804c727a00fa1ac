"""From a JAX function to its architecture graph."""

from archscale_jax.tracing.primitives import register_elementwise, register_primitive
from archscale_jax.tracing.trace import trace, vertex_features
from archscale_jax.tracing.values import TraceError

__all__ = [
    "TraceError",
    "register_elementwise",
    "register_primitive",
    "trace",
    "vertex_features",
]
