"""A picture of an architecture or a graph: its layers by name, from top to bottom."""

from archscale_jax._draw.picture import MAX_VERTICES, draw
from archscale_jax._draw.texts import MAX_NAME

__all__ = ["MAX_NAME", "MAX_VERTICES", "draw"]
