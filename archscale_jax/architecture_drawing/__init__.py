"""A picture of an architecture: its layers by name, from top to bottom."""

from archscale_jax.architecture_drawing.picture import MAX_VERTICES, draw
from archscale_jax.architecture_drawing.texts import MAX_NAME

__all__ = ["MAX_NAME", "MAX_VERTICES", "draw"]
