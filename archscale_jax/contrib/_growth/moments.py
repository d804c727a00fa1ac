"""What optimizers keep of parameters, carried over to a larger network."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.contrib._growth.leaf_growth import LeafGrowth, grown_leaf, grown_moment


def carried_state(
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    state: Any,
    params: PyTree,
    grown: PyTree,
    growths: Mapping[str, LeafGrowth],
) -> Any:
    """Returns the state of an optimizer for the large network.

    Which arrays belong to parameters, optax tells. Which power of the gradient they hold, and by
    what the optimizers multiply it (a plan has epsilon there), is measured by updates. Arrays that
    start as the parameters, such as averages of them, grow with them.

    Args:
      optimizers: those of the small and of the large network, of one kind.
      state: of the small one.
      params: of the small network.
      grown: params of the large one.
      growths: of every leaf of the large one.

    Raises:
      ValueError: a state of another optimizer; one that holds sums over axes of params, or does not
        scale with a power of the gradient.
    """
    skeleton = optimizers[1].init(grown)
    given, starts = named_leaves(state), named_leaves(skeleton)
    owners = _owners(optimizers[1], skeleton, grown)
    number = sum(leaf.size for leaf in jax.tree.leaves(grown))
    scale = 2.0**-10 / number**0.5  # small enough for what clips norms
    before, after = (
        _responses(*one, scale) for one in zip(optimizers, (params, grown), strict=True)
    )
    small, large = named_leaves(params), named_leaves(grown)

    def value_of(path: str) -> Any:
        if path not in given:
            raise ValueError(
                f"optimizer_state has no array {path!r}, which the optimizer of the large network "
                "has; pass the state of the optimizer that trained params, and another of its kind"
            )
        return given[path]

    def carried(path: str, empty: Any) -> Any:
        owner = owners.get(path)
        if owner is None:
            return value_of(path)
        growth = growths[owner]
        source = path.removesuffix(owner) + growth.source
        value, leaf = value_of(source), small[growth.source]
        if value.shape != leaf.shape:
            if value.shape == empty.shape == (1,):  # what Adafactor does not use
                return value
            raise ValueError(
                f"optimizer_state holds {value.shape} for {growth.source!r}, which has "
                f"{leaf.shape}; accepted are states with the shapes of the parameters: begin with "
                "a new state"
            )
        if np.any(np.asarray(starts[path])):
            apart = grown_leaf(value - leaf, jnp.zeros_like(empty), growth, None, 0.0)
            return (large[owner] + apart).astype(value.dtype)
        degree = after[path].degree
        if degree is None:
            raise ValueError(
                f"optimizer_state at {path!r} does not scale with a power of the gradient, so that "
                "it cannot be carried over: begin with a new state"
            )
        ratio = after[path].size / before[source].size
        return grown_moment(value * ratio, empty.shape, growth, degree)

    new = map_with_names(carried, skeleton)
    if lost := [path for path in given if path not in starts]:
        raise ValueError(
            f"optimizer_state has the array {lost[0]!r}, which the optimizer of the large network "
            "lacks; accepted are two optimizers of one kind"
        )
    return new


@dataclasses.dataclass(frozen=True)
class _Owner:
    name: str


def _owners(optimizer: optax.GradientTransformation, state: Any, params: PyTree) -> dict[str, str]:
    """Of every array of a state that belongs to a parameter, the parameter's name."""
    names = map_with_names(lambda name, leaf: _Owner(name), params)
    marked = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, owner: leaf if _is_masked(leaf) else owner,
        state,
        names,
        transform_non_params=lambda leaf: None,
        is_leaf=_is_masked,
    )
    return {path: owner.name for path, owner in named_leaves(marked).items()}


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


class _Response(NamedTuple):
    """What an array of a state is after an update with gradients g: size·g^degree.

    A degree of None: it is no power.
    """

    degree: int | None
    size: float


def _responses(
    optimizer: optax.GradientTransformation, params: PyTree, scale: float
) -> dict[str, _Response]:
    """Measures every array of a state, by updates with constant gradients, and with twice these."""
    nothing = jax.tree.map(jnp.zeros_like, params)  # what decays weights adds nothing
    one, two = jax.device_get([_sizes(optimizer, nothing, one) for one in (scale, 2 * scale)])
    found = {}
    for name, size in one.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            degree = np.log2(np.float64(two[name]) / size) if size else 0.0
        whole = bool(abs(degree - np.round(degree)) < 0.01)
        found[name] = _Response(round(degree) if whole else None, float(size) or 1.0)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _sizes(optimizer: optax.GradientTransformation, params: PyTree, scale: Any) -> dict[str, Array]:
    """The mean size of every array of a state, after an update with gradients of one size."""
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    return {name: jnp.mean(jnp.abs(leaf)) for name, leaf in named_leaves(state).items()}
