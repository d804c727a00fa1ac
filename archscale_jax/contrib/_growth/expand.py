"""From the parameters of a small network to those of a large one that computes the same.

A space of n features that becomes one of r·n holds r copies of every feature. Leaves that write the
space are copied; layers that read it get a share of 1/r of their weights for every copy. Weights
that read copies may differ as long as their sum stays: noise that sums to 0 over copies makes them
learn different things.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from archscale_jax._errors import unknown
from archscale_jax._initialize import check_key
from archscale_jax._trees import PyTree, check_values, map_with_names, named_leaves
from archscale_jax.contrib._growth.blocks import Position, ends, placed, sources_of
from archscale_jax.contrib._growth.leaf_growth import Axis, LeafGrowth, grown_leaf
from archscale_jax.contrib._growth.moments import carried_state
from archscale_jax.tracing.spaces import Space, Spaces, copied_index, find_spaces

NEW = ("copy", "random")


class Expanded(NamedTuple):
    """A network that has been expanded.

    Attributes:
      params: of the large network.
      optimizer_state: with moments carried over; None where none was given.
    """

    params: PyTree
    optimizer_state: Any


def expand(
    params: PyTree,
    like: PyTree,
    small: Callable[..., Any],
    large: Callable[..., Any],
    *inputs: PyTree,
    key: jax.Array | None = None,
    new: Literal["copy", "random"] = "copy",
    noise: float = 1.0,
    position: Position = "append",
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation] | None = None,
    optimizer_state: Any = None,
    tolerance: float | None = None,
) -> Expanded:
    """Grows a network in width or depth to one that computes the same function.

        params, state = contrib.expand(
            params, large.init(key), small.apply, large.apply, tokens, key=key,
            optimizers=(tx, new_tx), optimizer_state=state)

    `small` and `large` are plans here; any function of params will do. Both are traced, and leaves
    compared: features that grow are copied, and layers that read them get their weights in shares,
    see the module. Heads and groups of features stay together, as the reshapes of the functions
    tell. New blocks of a residual stack, of a scan or with numbers in their names
    (`block_3/kernel`), end with zeros. The outputs of both networks for `inputs` are compared.

    Args:
      params: of the small network, arrays.
      like: a tree of arrays as the large network would start with; its values are what is new and
        random. Shapes suffice for copies.
      small: `(params, *inputs)` to outputs.
      large: the same model of other sizes. Blocks that are not stacked grow in a call of their own,
        in which no width differs.
      *inputs: a batch.
      key: of the noise; may be missing where `noise` is 0.
      new: `copy`: new features and blocks are copies. `random`: they are those of `like`, and
        nothing reads them yet; features that are summed over otherwise than by weights, as by a
        normalization, are copied all the same.
      noise: size of the noise on weights that read c copies; 1 brings their root mean square to
        1/√c of the small network's, as width rules have that of hidden weights.
      position: where new blocks stand: `append`, the stack once more behind itself, or
        `interleave`, each behind the block that it copies.
      optimizers: those of the small and of the large network, of one kind, such as
        `(small.optimizer(rate), large.optimizer(rate))`, if a state is carried over.
      optimizer_state: of the first. Moments are scaled as gradients are, 1/c for a copied leaf; of
        what is new, first moments are 0, and second moments those of what it would be a copy of.
      tolerance: the largest change of an output over the largest output; None takes the square root
        of the precision of their dtype.

    Returns:
      The params of the large network, and the state of its optimizer.

    Raises:
      TypeError: a key that is missing or none, params without values, or only one of optimizers
        and optimizer_state.
      ValueError: inputs without an example, outputs that are not finite; functions that differ in
        more than sizes; leaves that do not correspond; a function that is not preserved, with the
        operation and leaf where it changes; optimizers of two kinds, or whose state has other
        shapes than params or does not scale with powers of gradients.
    """
    _check(new, noise, key, optimizers, optimizer_state)
    check_values(params, "params")
    ours, theirs = named_leaves(params), named_leaves(like)
    spaces = None
    if ours.keys() == theirs.keys():
        spaces = find_spaces(small, large, params, like, *inputs)
        plans = _width_plans(ours, theirs, spaces, new, position)
    else:
        plans = [_depth_plan(ours, theirs, new, position)]
    if any(one.blocks.any() for one in plans[0].values()):
        at_end = ends(large, like, inputs)
        plans = [
            {name: dataclasses.replace(one, end=name in at_end) for name, one in plan.items()}
            for plan in plans
        ]
    outputs = jax.jit(small)(params, *inputs)
    _check_outputs(outputs)
    allowed = _allowed(outputs, tolerance)
    tried = []
    for growths in plans:
        grown = _grown(ours, like, growths, noise, key)
        change = _change(outputs, jax.jit(large)(grown, *inputs))
        tried.append((change, grown))
        if change <= allowed:
            state = None
            if optimizers is not None:
                state = carried_state(optimizers, optimizer_state, params, grown, growths)
            return Expanded(grown, state)
    change, grown = min(tried, key=lambda one: one[0])
    raise ValueError(_not_preserved(change, allowed, spaces, params, grown))


def _check(new, noise, key, optimizers, optimizer_state) -> None:
    if new not in NEW:
        raise ValueError(unknown("new", new, NEW))
    if not noise >= 0:
        raise ValueError(f"noise must be 0 or more, found {noise}")
    if noise and key is None:
        raise TypeError("key is missing: noise needs a random key, as key=jax.random.key(0)")
    if key is not None:
        check_key(key)
    if (optimizers is None) != (optimizer_state is None):
        raise TypeError(
            "optimizers and optimizer_state belong together; only one of them was given"
        )


# How leaves grow.


def _width_plans(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], spaces: Spaces, new: str, position: Position
) -> list[dict[str, LeafGrowth]]:
    """How every leaf grows; where tables are read and written, without and with compensation."""
    tied = {
        name: space.number
        for (name, _), space in spaces.axes.items()
        if space.reads and space.writes
    }
    growths = {}
    for name, leaf in ours.items():
        if leaf.ndim != len(theirs[name].shape):
            raise ValueError(
                f"like holds {name!r} of shape {theirs[name].shape}, params of {leaf.shape}; "
                "accepted are shapes of as many axes"
            )
        axes, blocks = [], np.zeros((), bool)
        for axis, sizes in enumerate(zip(leaf.shape, theirs[name].shape, strict=True)):
            if sizes[0] == sizes[1]:
                continue
            space = spaces.axes[name, axis]
            if space.stacked:
                index, fresh = placed(*sizes, position)
                axes.append(_of_stack(axis, index))
                blocks = np.expand_dims(fresh, [*range(1, leaf.ndim - axis)])
            else:
                random = new == "random" and not space.pooled and space.number not in tied.values()
                axes.append(_of_width(f"axis {axis} of {name!r}", axis, sizes, space, random))
        growths[name] = LeafGrowth(name, tuple(axes), 1.0, blocks, fresh=new == "random")
    compensated = dict(growths)
    for name, leaves in spaces.compensation.items():
        ratio = max(
            (len(one.sources) / ours[name].shape[one.axis] for one in growths[name].axes),
            default=1.0,
        )
        for leaf in leaves if name in tied else ():
            compensated[leaf] = dataclasses.replace(growths[leaf], factor=1 / ratio)
    return [growths, compensated] if compensated != growths else [growths]


def _of_stack(axis: int, index: np.ndarray) -> Axis:
    ones = np.ones(len(index))
    return Axis(axis, index, ones, ones, np.zeros(len(index), bool))


def _of_width(what: str, axis: int, sizes: tuple[int, int], space: Space, random: bool) -> Axis:
    small, large = sizes
    index = copied_index(small, large, space.block, what)
    reads = space.reads and not space.writes
    ones, copies = np.ones(large), np.bincount(index)[index].astype(float)
    if not random:
        share = 1 / copies if reads else ones
        return Axis(axis, index, share, copies, np.zeros(large, bool), noisy=reads)
    fresh = np.ones(large, bool)
    fresh[np.unique(index, return_index=True)[1]] = False
    return Axis(axis, index, np.where(fresh, 0.0, 1.0) if reads else ones, ones, fresh)


def _depth_plan(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], new: str, position: Position
) -> dict[str, LeafGrowth]:
    growths = {}
    for name, (source, is_new) in sources_of(ours, theirs, position).items():
        same = ours[source].shape == theirs[name].shape
        if not (same or is_new):
            raise ValueError(
                f"like holds {name!r} of shape {theirs[name].shape}, params {source!r} of "
                f"{ours[source].shape}; where blocks are added, others keep their shapes: grow "
                "widths by another call, and try the other position"
            )
        fresh = new == "random" or not same
        growths[name] = LeafGrowth(source, blocks=np.asarray(is_new), fresh=fresh)
    return growths


def _grown(
    ours: Mapping[str, Any],
    like: PyTree,
    growths: Mapping[str, LeafGrowth],
    noise: float,
    key: jax.Array | None,
) -> PyTree:
    names = {name: number for number, name in enumerate(growths)}

    def leaf(name: str, new: Any) -> Any:
        growth, old = growths[name], ours[growths[name].source]
        if not growth.axes and not growth.blocks.any() and growth.factor == 1:
            return old
        if isinstance(new, jax.ShapeDtypeStruct) and growth.needs_values:
            raise ValueError(
                f"like holds a shape at {name!r}, whose new entries are not copies; pass arrays, "
                "such as the params with which the large network would start"
            )
        values = jnp.zeros(new.shape) if isinstance(new, jax.ShapeDtypeStruct) else new
        own = None if key is None else jax.random.fold_in(key, names[name])
        return grown_leaf(old, values, growth, own, noise)

    return map_with_names(leaf, like)


# Whether the function is preserved.


def _floats(outputs: PyTree) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(one, np.float64)
        for name, one in named_leaves(outputs).items()
        if jnp.issubdtype(one.dtype, jnp.floating)
    }


def _check_outputs(outputs: PyTree) -> None:
    """Checks that outputs tell whether the function stays."""
    found = _floats(outputs)
    if not any(one.size for one in found.values()):
        shapes = {name: one.shape for name, one in named_leaves(outputs).items()}
        raise ValueError(
            f"the outputs of small hold no floating-point number, found {shapes}; pass inputs of "
            "one example or more, on which both networks are compared"
        )
    for name, one in found.items():
        if not np.all(np.isfinite(one)):
            raise ValueError(
                f"the outputs of small are not finite at {name!r}; check params and inputs for NaN"
            )


def _allowed(outputs: PyTree, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    dtypes = [one.dtype for one in jax.tree.leaves(outputs)]
    floats = [jnp.finfo(one).eps for one in dtypes if jnp.issubdtype(one, jnp.floating)]
    return float(max(floats, default=0.0)) ** 0.5


def _change(outputs: PyTree, grown: PyTree) -> float:
    """The largest change of an output over the largest output."""
    before, after = _floats(outputs), _floats(grown)
    for name, one in before.items():
        shape = after[name].shape if name in after else None
        if shape != one.shape:
            raise ValueError(
                f"the outputs of small have {one.shape} at {name!r}, those of large {shape}; "
                "accepted are functions whose outputs do not grow"
            )
    changes = [
        np.abs(after[name] - one).max(initial=0.0) / (np.abs(one).max(initial=0.0) or 1.0)
        for name, one in before.items()
    ]
    return float(max(changes, default=0.0)) if np.all(np.isfinite(changes)) else np.inf


def _not_preserved(
    change: float, allowed: float, spaces: Spaces | None, params: PyTree, grown: PyTree
) -> str:
    start = f"the outputs would change by {change:.1e} of the largest, more than {allowed:.1e}"
    if spaces is None:
        return (
            f"{start}: new blocks do more than add to a residual stream, or what they add does not "
            "end with a leaf of their own that could be 0"
        )
    return (
        f"{start}, from {spaces.differing(params, grown)} on. Preserved are functions in which "
        "features that grow are normalized, multiplied and summed by weights; keep that width, or "
        "pass tolerance= if the change is accepted"
    )
