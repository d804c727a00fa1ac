"""Checkpoints of any pytree, through orbax: atomic, typed by name, bound to their settings.

A leaf is stored under its key path, so that a checkpoint that does not fit says which leaf. A save
that is cut off leaves a temporary folder that nothing reads.
"""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from archscale_jax._extras import needed_by
from archscale_jax._trees import PyTree
from experiments.lab.files import different_settings

with needed_by("experiments.lab.checkpoints", "experiments"):
    import orbax.checkpoint as ocp

Settings = Mapping[str, Any]

_SCALARS = (np.generic, bool, int, float, complex)


def save_checkpoint(
    directory: str | pathlib.Path, step: int, tree: PyTree, settings: Settings, *, keep: int = 2
) -> None:
    """Saves a tree; returns when it is on disk.

    Args:
      directory: folder of the checkpoints of one run.
      step: number of the checkpoint; a later one wins.
      tree: arrays of JAX or NumPy of any shape, empty ones too; typed random keys; and scalars of
        NumPy and Python (bool, int, float, complex).
      settings: JSON values that say what the tree belongs to; `restore_checkpoint` compares them.
        NaN equals NaN.
      keep: how many checkpoints stay.

    Raises:
      TypeError: a leaf or a setting of another kind, by name; nothing is saved.
      ValueError: a tree without a number to save, or an int beyond 64 bits, by name.
    """
    stored = _stored(tree)
    full, empty = _parted(stored)
    if not full:
        raise ValueError(
            f"tree holds no numbers, found {len(empty)} leaves, all empty; accepted are trees with "
            "one array at least that is not empty"
        )
    record = {"settings": _json(settings), "checksum": _checksum(full), "empty": empty}
    arguments = ocp.args.Composite(
        tree=ocp.args.StandardSave(full), record=ocp.args.JsonSave(record)
    )
    with _manager(directory, keep) as manager:
        manager.save(step, args=arguments, force=True)
        manager.wait_until_finished()


def restore_checkpoint(
    directory: str | pathlib.Path, like: PyTree, settings: Settings
) -> tuple[int, PyTree] | None:
    """Restores the last finished checkpoint.

    Args:
      directory: folder of the checkpoints of one run.
      like: tree of the structure, shapes and dtypes to restore; random keys must be arrays,
        scalars scalars of the type to restore, the rest may be `jax.ShapeDtypeStruct`.
      settings: must equal those saved.

    Returns:
      The step and the tree, bit for bit as saved; None where there is no finished checkpoint.

    Raises:
      TypeError: `like` or `settings` hold what `save_checkpoint` does not take, by name.
      ValueError: the checkpoint was saved under other settings, holds other leaves, shapes or
        dtypes (by name), or is damaged.
    """
    if not pathlib.Path(directory).is_dir():
        return None
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        where = f"checkpoint {step} in {directory}"
        try:
            found = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
            saved_settings, checksum = found["record"]["settings"], found["record"]["checksum"]
            saved = manager.item_metadata(step)["tree"]
            shapes = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in saved.items()}
            for name, (shape, dtype) in found["record"].get("empty", {}).items():
                shapes[name] = (tuple(shape), jnp.dtype(dtype))
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise ValueError(_damaged(where, error)) from error
        _check_settings(where, saved_settings, settings)
        expected = _stored(like)
        _check_leaves(where, shapes, expected)
        try:
            restore = ocp.args.StandardRestore(_parted(expected)[0])
            restored = manager.restore(step, args=ocp.args.Composite(tree=restore))["tree"]
            if _checksum(restored) != checksum:
                raise ValueError("its leaves are not those that were saved")
        except Exception as error:
            raise ValueError(_damaged(where, error)) from error
    return step, _rebuilt(expected | restored, like)


def _damaged(where: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{where} is damaged; remove its folder to go on from the one before it ({reason})"


def _manager(directory: str | pathlib.Path, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    handlers = {"tree": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        pathlib.Path(directory).absolute(), options=options, item_handlers=handlers
    )


def _stored(tree: PyTree) -> dict[str, Any]:
    """The leaves by key path, as arrays; typed random keys as their integers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {(name := jax.tree_util.keystr(path)): _array(name, leaf) for path, leaf in leaves}


def _array(name: str, leaf: Any) -> Any:
    """A leaf as an array. Scalars keep every bit: Python's have 64 bits, complex ones 128."""
    if type(leaf) is int:
        if not -(2**63) <= leaf < 2**63:
            raise ValueError(
                f"leaf {name!r} is the int {leaf}; accepted are ints of 64 bits: save it as a "
                "string among the settings"
            )
        return np.asarray(leaf, np.int64)
    if isinstance(leaf, _SCALARS):
        leaf = np.asarray(leaf)
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and hasattr(leaf, "shape"):
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf)
        if any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.number)):
            return leaf
    raise TypeError(
        f"leaf {name!r} is {leaf!r} of {type(leaf).__name__}; accepted are arrays, typed random "
        "keys and numbers: put strings and other values among the settings"
    )


def _parted(stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves with elements, and of the others, which orbax does not save, shape and dtype."""
    full = {name: leaf for name, leaf in stored.items() if 0 not in leaf.shape}
    empty = {
        name: [list(leaf.shape), jnp.dtype(leaf.dtype).name]
        for name, leaf in stored.items()
        if name not in full
    }
    return full, empty


def _json(settings: Settings) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"setting {name!r} is {value!r}; accepted are JSON values (None, bool, int, float, "
                "str, and lists and dicts of them): convert it first"
            ) from error
    return json.loads(json.dumps(dict(settings)))


def _checksum(stored: Mapping[str, Any]) -> int:
    """CRC-32 of all bytes; a byte that changed on disk is not noticed by orbax."""
    checksum = 0
    for name in sorted(stored):
        checksum = zlib.crc32(np.asarray(stored[name]).tobytes(), checksum)
    return checksum


def _rebuilt(stored: Mapping[str, Any], like: PyTree) -> PyTree:
    def pick(path, leaf):
        value = stored[jax.tree_util.keystr(path)]
        if isinstance(leaf, np.generic):
            return np.asarray(value)[()]
        if isinstance(leaf, _SCALARS):
            return type(leaf)(np.asarray(value).item())
        if 0 in value.shape and not isinstance(leaf, np.ndarray):
            value = jnp.zeros(value.shape, value.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return value

    return jax.tree_util.tree_map_with_path(pick, like)


def _check_settings(where: str, saved: Settings, settings: Settings) -> None:
    if different := different_settings(saved, _json(settings)):
        raise ValueError(f"{where} belongs to another run: it was saved with {different}")


def _check_leaves(where: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, leaf in expected.items():
        if name not in saved:
            raise ValueError(f"{where} lacks the leaf {name!r}")
        if saved[name] != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{where} holds {name!r} with shape and dtype {saved[name]}; expected are "
                f"{(leaf.shape, leaf.dtype)}"
            )
    for name in saved:
        if name not in expected:
            raise ValueError(f"{where} holds a leaf {name!r} that the run does not have")
