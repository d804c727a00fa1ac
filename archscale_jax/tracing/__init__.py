"""From a JAX function to its architecture graph."""

from archscale_jax.tracing.interpreter import TraceError
from archscale_jax.tracing.trace import trace

__all__ = ["TraceError", "trace"]
