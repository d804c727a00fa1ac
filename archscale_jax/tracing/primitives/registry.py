"""Which primitive does what: one registry, to which users can add.

A primitive that is not registered is never guessed at: `trace` raises, or with `unknown="warn"`
warns and takes it for the identity. Register one of yours by what it does:

    from archscale_jax.tracing import register_elementwise, register_primitive

    register_elementwise("my_swish", lambda parameters: lambda x: x / (1 + np.exp(-x)))

    @register_primitive("my_roll")
    def my_roll(state, call):
        return dataclasses.replace(call.values[0], array=None)  # moves entries, changes none
"""

from collections.abc import Callable

from archscale_jax.tracing.state import Call, State
from archscale_jax.tracing.values import Value

Handler = Callable[[State, Call], Value | list[Value]]
"""Reads one call of a primitive; one value serves for all its results."""

HANDLERS: dict[str, Handler] = {}


def register_primitive(*names: str) -> Callable[[Handler], Handler]:
    """Returns a decorator that lets a function read the primitives of these names."""

    def decorate(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return decorate
