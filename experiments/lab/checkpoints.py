"""Checkpoints of any pytree, through orbax: atomic, typed by name, bound to their settings.

Checkpoint 3 is the folder `3` with the leaves, each under its key path, and the file `3.json`,
which is written last and removed first: a folder without it was cut off, and counts for nothing.
"""

import json
import logging
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from archscale_jax._extras import needed_by
from archscale_jax._trees import PyTree
from experiments.lab import files, interrupts

with needed_by("experiments.lab.checkpoints", "experiments"):
    import orbax.checkpoint as ocp

Settings = Mapping[str, Any]

_SCALARS = (np.generic, bool, int, float, complex)
_RECORD = {"settings": dict, "checksum": int, "leaves": dict}


class Restored(NamedTuple):
    """What `restore_checkpoint` found: the number, the tree, and the log that was saved with it."""

    step: int
    tree: PyTree
    log: Any


def save_checkpoint(
    directory: str | pathlib.Path,
    step: int,
    tree: PyTree,
    settings: Settings,
    *,
    log: Any = None,
    keep: int = 2,
) -> None:
    """Saves a tree; returns when it is on disk.

    Args:
      directory: folder of the checkpoints of one run.
      step: number of the checkpoint; a later one wins.
      tree: arrays of JAX or NumPy of any shape, empty ones too; typed random keys; and scalars of
        NumPy and Python (bool, int, float, complex).
      settings: JSON values that say what the tree belongs to; `restore_checkpoint` compares them.
        NaN equals NaN.
      log: JSON values to restore beside the tree; NaN and infinities become None.
      keep: how many checkpoints stay.

    Raises:
      TypeError: a leaf or a setting of another kind, by name; nothing is saved.
      ValueError: a tree without a number to save, or an int beyond 64 bits, by name.
    """
    stored = _stored(tree)
    full = _with_elements(stored)
    if not full:
        raise ValueError(
            f"tree holds no numbers, found {len(stored)} leaves, all empty; accepted are trees "
            "with one array at least that is not empty"
        )
    record = {
        "settings": _json(settings),
        "log": files.strict_json(log),
        "checksum": _checksum(full),
        "leaves": {
            name: [list(leaf.shape), jnp.dtype(leaf.dtype).name] for name, leaf in stored.items()
        },
    }
    directory = pathlib.Path(directory).absolute()
    with interrupts.later():  # orbax does not bear a save that is cut
        (directory / f"{step}.json").unlink(missing_ok=True)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            orbax.save(directory / str(step) / "tree", args=ocp.args.StandardSave(full), force=True)
        files.write_json(directory / f"{step}.json", record)
        for old in _steps(directory)[:-keep]:
            (directory / f"{old}.json").unlink()
            shutil.rmtree(directory / str(old), ignore_errors=True)


def restore_checkpoint(
    directory: str | pathlib.Path,
    like: PyTree | Callable[[Any], PyTree],
    settings: Settings,
    *,
    extensible: Sequence[str] = (),
) -> Restored | None:
    """Restores the last checkpoint that is whole.

    One that is damaged is told in the log of the process where the one before it is taken.

    Args:
      directory: folder of the checkpoints of one run.
      like: tree of the structure, shapes and dtypes to restore, or a function that makes it of the
        log; random keys must be arrays, scalars scalars of the type to restore, the rest may be
        `jax.ShapeDtypeStruct`.
      settings: must equal those saved.
      extensible: settings that may differ, as they only say how far a run goes.

    Returns:
      The tree bit for bit as saved; None where no checkpoint was finished.

    Raises:
      TypeError: `like` or `settings` hold what `save_checkpoint` does not take, by name.
      ValueError: the checkpoint was saved under other settings, or holds other leaves, shapes or
        dtypes (by name); all checkpoints are damaged; `directory` is a file.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder of checkpoints; remove it")
    damaged: list[str] = []
    for step in reversed(_steps(directory)):
        where = f"checkpoint {step} in {directory}"
        try:
            record = files.read_json(directory / f"{step}.json")
            files.check_fields(record, _RECORD, f"{step}.json")
            leaves = {
                name: (tuple(one[0]), jnp.dtype(one[1])) for name, one in record["leaves"].items()
            }
        except (OSError, ValueError, TypeError, LookupError) as error:
            damaged.append(f"{where} is damaged ({_reason(error)})")
            continue
        saved = record["settings"], _json(settings)
        fixed = ({k: v for k, v in one.items() if k not in extensible} for one in saved)
        if different := files.different_settings(*fixed):
            raise ValueError(f"{where} belongs to another run: it was saved with {different}")
        wanted = like(record["log"]) if callable(like) else like
        expected = _stored(wanted)
        _check_leaves(where, leaves, expected)
        try:
            found = _read_leaves(directory / str(step) / "tree", _with_elements(expected))
            if _checksum(found) != record["checksum"]:
                raise ValueError("its leaves are not those that were saved")
        except Exception as error:  # whatever a damaged file makes the reader raise
            damaged.append(f"{where} is damaged ({_reason(error)})")
            continue
        for one in damaged:
            logging.getLogger(__name__).warning(f"{one}; going on from checkpoint {step}")
        return Restored(step, _rebuilt(expected | found, wanted), record["log"])
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; none is whole: remove {directory} to start anew")
    return None


def _steps(directory: pathlib.Path) -> list[int]:
    """The numbers of the finished checkpoints, rising."""
    return sorted(int(path.stem) for path in directory.glob("*.json") if path.stem.isdecimal())


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _read_leaves(path: pathlib.Path, like: Mapping[str, Any]) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        return orbax.restore(path, args=ocp.args.StandardRestore(dict(like)))


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


def _with_elements(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with elements; orbax does not save the others."""
    return {name: leaf for name, leaf in stored.items() if 0 not in leaf.shape}


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
