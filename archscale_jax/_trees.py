"""Pytrees by the names of their leaves: the names that every table, message and report uses.

The name of a leaf is its key path, without the attribute `value` of the box in which Flax keeps a
variable: an `nnx.Variable`, or `Partitioned` and its kin of linen. A key path alone does not tell a
box from a module, a NamedTuple or a dataclass that has a field of this name; the tree does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any
KeyPath = tuple[Any, ...]

_VALUE = jax.tree_util.GetAttrKey("value")
_BOXES = ("Variable", "AxisMetadata")
"""Classes of Flax whose attribute `value` is what they hold; subclasses too."""


def parameter_name(key_path: KeyPath) -> str:
    """Returns the name of a leaf, such as `edges/0_1/kernel`, from its JAX key path alone.

    A last attribute `value` is dropped, so that a Flax state and its pure dictionary give the same
    names. That is wrong for fields called `value` of other classes: where the tree is at hand, take
    `named_leaves` or `map_with_names`.
    """
    return _joined(key_path[:-1] if key_path and key_path[-1] == _VALUE else key_path)


def named_leaves(tree: PyTree, **flatten_options: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name; options go to `jax.tree`'s flattening.

    Raises:
      ValueError: two leaves of one name, as under the keys `a/b` and `a`, then `b`.
    """
    named: dict[str, Any] = {}
    for name, leaf in _names_and_leaves(tree, **flatten_options):
        if name in named:
            raise ValueError(f"two leaves are named {name!r}; rename a key that holds a slash")
        named[name] = leaf
    return named


def map_with_names(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Returns the tree of `function(name, leaf)`, by the names that `named_leaves` gives."""
    mapped = [function(name, leaf) for name, leaf in _names_and_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), mapped)


def check_values(tree: PyTree, argument: str) -> None:
    """Checks that the leaves of an argument are numbers.

    Raises:
      TypeError: a leaf is something else, such as a shape.
    """
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise TypeError(
                f"{argument} holds no values at {name!r}, found a {type(leaf).__name__}; accepted "
                "are arrays, as a plan's init(key) draws them"
            )


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Returns a tree with some of its leaves replaced, by the names that `named_leaves` gives."""
    return map_with_names(lambda name, leaf: leaves.get(name, leaf), tree)


def scaled_leaves(tree: PyTree, factors: Mapping[str, float]) -> PyTree:
    """Returns a tree with some of its leaves multiplied, by name."""
    if not factors:
        return tree

    def scaled(name: str, leaf: Any) -> Any:
        # Of an array of NumPy too, whose dtype a Python float leaves as it is.
        return leaf * factors[name] if name in factors else leaf

    return map_with_names(scaled, tree)


def _names_and_leaves(tree: PyTree, **flatten_options: Any) -> list[tuple[str, Any]]:
    """Every leaf with its name, in the order of flattening."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, **flatten_options)
    boxes: set[KeyPath] = set()
    if any(path and path[-1] == _VALUE for path, _ in found):
        nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
        boxes = {path for path, node in nodes if _is_box(node)}
    return [
        (_joined(path[:-1] if path and path[-1] == _VALUE and path[:-1] in boxes else path), leaf)
        for path, leaf in found
    ]


def _is_box(node: Any) -> bool:
    """Whether a node is a box of Flax, without importing Flax."""
    return any(
        one.__name__ in _BOXES and one.__module__.partition(".")[0] == "flax"
        for one in type(node).__mro__
    )


def _joined(key_path: KeyPath) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in key_path)
