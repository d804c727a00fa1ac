"""Trials on the devices of one process: one program over a mesh, or a thread for every device.

`over_devices` is for trials of one program, which differ in numbers alone: rates, seeds, or cells
whose operators are chosen at run time. `DeviceExecutor` takes trials of any shape to `run_study`.
"""

import concurrent.futures
import queue
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from archscale_jax._errors import unknown
from archscale_jax._trees import PyTree


def over_devices(
    function: Callable[..., PyTree], mesh: Mesh, axis: str, *, batch_size: int | None = None
) -> jax.stages.Wrapped:
    """Returns a function of many trials that spreads them over an axis of a mesh.

    Every device runs its share of the trials, one after the other; nothing passes between devices.
    Numbers that do not divide are filled up with the last trial, whose copies are dropped.

        train_all = over_devices(train, jax.make_mesh((8,), ("trials",)), "trials")
        losses = train_all({"rate": rates, "seed": seeds}, images, labels)

    Args:
      function: `(trial, *shared)` to a tree of arrays; pure.
      mesh: a mesh whose other axes, if there are any, compute the same.
      axis: the name of its axis.
      batch_size: how many trials a device computes at a time, by `jax.vmap`; None is one.

    Returns:
      `(trials, *shared)` to the results, jitted. Trials are a tree of arrays [trials, ...], results
      too, sharded over the axis where their number divides; what is shared is on every device.

    Raises:
      ValueError: here, an axis that the mesh does not have; when called, trees of trials whose
        arrays differ in their number of trials, or have none.
    """
    if axis not in mesh.axis_names:
        raise ValueError(unknown("mesh axis", axis, mesh.axis_names))
    devices = mesh.shape[axis]
    # Under explicit axes the shares would have to be cut by hand.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)

    @jax.jit
    def run(trials: PyTree, *shared: PyTree) -> PyTree:
        number = _number(trials)
        fill = -number % devices
        filled = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], fill, axis=0)]), trials
        )

        def share(trials: PyTree, *shared: PyTree) -> PyTree:
            return jax.lax.map(
                lambda trial: function(trial, *shared), trials, batch_size=batch_size
            )

        specs = (P(axis), *[P()] * len(shared))
        # What a function does with constants would have to be marked as varying over the axis.
        spread = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P(axis), check_vma=False)
        return jax.tree.map(lambda leaf: leaf[:number], spread(filled, *shared))

    return run


def _number(trials: PyTree) -> int:
    leaves = jax.tree.leaves(trials)
    numbers = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
    if len(numbers) != 1 or numbers == {0}:
        found = [jnp.shape(leaf) for leaf in leaves]
        raise ValueError(f"trials are arrays [trials, ...] of one number, found shapes {found}")
    return numbers.pop()


class DeviceExecutor(concurrent.futures.ThreadPoolExecutor):
    """Runs every call in one of several threads, each with a device of its own.

    A call computes on its thread's device: what it puts nowhere lies there.

        with DeviceExecutor() as executor:
            run_study(trials, run, "results.jsonl", executor=executor)
    """

    def __init__(self, devices: Sequence[Any] | None = None) -> None:
        """Starts no thread before it is needed.

        Args:
          devices: one for every thread; None takes all of this process.
        """
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        devices = jax.local_devices() if devices is None else devices
        for device in devices:
            free.put(device)

        def settle() -> None:
            # Left with the thread, whose own it is.
            jax.default_device(free.get()).__enter__()

        super().__init__(len(devices), initializer=settle)
