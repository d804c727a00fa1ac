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

from archscale_jax.extras import needed_by
from archscale_jax.files import different_settings
from archscale_jax.trees import PyTree

with needed_by("archscale_jax.checkpoints", "experiments"):
    import orbax.checkpoint as ocp

Settings = Mapping[str, Any]


def save_checkpoint(
    directory: str | pathlib.Path, step: int, tree: PyTree, settings: Settings, *, keep: int = 2
) -> None:
    """Saves a tree; returns when it is on disk.

    Args:
      directory: folder of the checkpoints of one run.
      step: number of the checkpoint; a later one wins.
      tree: arrays and typed random keys.
      settings: JSON values that say what the tree belongs to; `restore_checkpoint` compares them.
      keep: how many checkpoints stay.
    """
    stored = _stored(tree)
    record = {"settings": dict(settings), "checksum": _checksum(stored)}
    arguments = ocp.args.Composite(
        tree=ocp.args.StandardSave(stored), record=ocp.args.JsonSave(record)
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
      like: tree of the structure, shapes and dtypes to restore; random keys must be arrays, the
        rest may be `jax.ShapeDtypeStruct`.
      settings: must equal those saved.

    Returns:
      The step and the tree, bit for bit as saved; None where there is no finished checkpoint.

    Raises:
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
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise ValueError(_damaged(where, error)) from error
        _check_settings(where, saved_settings, settings)
        expected = _stored(like)
        _check_leaves(where, shapes, expected)
        try:
            restore = ocp.args.StandardRestore(expected)
            restored = manager.restore(step, args=ocp.args.Composite(tree=restore))["tree"]
            if _checksum(restored) != checksum:
                raise ValueError("its leaves are not those that were saved")
        except Exception as error:
            raise ValueError(_damaged(where, error)) from error
    return step, _rebuilt(restored, like)


def _damaged(where: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{where} is damaged; remove its folder to go on from the one before it ({reason})"


def _manager(directory: str | pathlib.Path, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    handlers = {"tree": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        pathlib.Path(directory).absolute(), options=options, item_handlers=handlers
    )


def _stored(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves by key path; typed random keys as their integers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in leaves
    }


def _checksum(stored: dict[str, jax.Array]) -> int:
    """CRC-32 of all bytes; a byte that changed on disk is not noticed by orbax."""
    checksum = 0
    for name in sorted(stored):
        checksum = zlib.crc32(np.asarray(stored[name]).tobytes(), checksum)
    return checksum


def _rebuilt(stored: dict[str, jax.Array], like: PyTree) -> PyTree:
    def pick(path, leaf):
        value = stored[jax.tree_util.keystr(path)]
        if _is_key(leaf):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return value

    return jax.tree_util.tree_map_with_path(pick, like)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_settings(where: str, saved: Settings, settings: Settings) -> None:
    if different := different_settings(saved, json.loads(json.dumps(dict(settings)))):
        raise ValueError(f"{where} belongs to another run: it was saved with {different}")


def _check_leaves(where: str, saved: dict[str, Any], expected: dict[str, jax.Array]) -> None:
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
