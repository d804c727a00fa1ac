"""Pytrees by the names of their leaves: the names that every table, message and report uses."""

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any


def parameter_name(key_path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, such as `edges/0_1/kernel`, from its JAX key path.

    The attribute that Flax NNX adds for the value of a variable is left out, so that a state and
    its pure dictionary give the same names.
    """
    keys = list(key_path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def named_leaves(tree: PyTree, **flatten_options: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by `parameter_name`; options go to `jax.tree`'s flattening.

    Raises:
      ValueError: two leaves of one name, as under the keys `a/b` and `a`, then `b`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, **flatten_options)
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = parameter_name(path)
        if name in named:
            raise ValueError(f"two leaves are named {name!r}; rename a key that holds a slash")
        named[name] = leaf
    return named


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Returns a tree with some of its leaves replaced, by the names that `named_leaves` gives."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(parameter_name(path), leaf), tree
    )
