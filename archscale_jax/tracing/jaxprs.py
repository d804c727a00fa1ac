"""Where equations keep the jaxprs of functions in them: names that JAX may change."""

from jax.extend import core

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
         "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "composite",
         "linear_call", "call_hi_primitive")  # fmt: skip
"""Primitives that call a function with their own operands."""


def inner_jaxpr(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the jaxpr of the function that an equation applies, None where there is none."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "callee"):
        found = equation.params.get(name)
        if isinstance(found, core.ClosedJaxpr):
            return found
        if isinstance(found, core.Jaxpr):
            return core.ClosedJaxpr(found, ())
    return None


def loop_operands(equation: core.JaxprEqn) -> tuple[int, int]:
    """Returns how many operands of a scan every step reads, and how many it hands on."""
    if "ft_in" in equation.params:  # JAX 0.11 and newer
        fixed, carried, _ = equation.params["ft_in"].unpack()
        return len(fixed), len(carried)
    return equation.params["num_consts"], equation.params["num_carry"]
