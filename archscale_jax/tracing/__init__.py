"""From a JAX function to its architecture graph."""

from archscale_jax.tracing.trace import trace, vertex_features
from archscale_jax.tracing.values import TraceError

__all__ = ["TraceError", "trace", "vertex_features"]
