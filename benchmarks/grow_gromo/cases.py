"""What both sides share, by NumPy alone: cases, times, and operations counted by one formula.

A case is a dictionary of JSON values: `folder`, `arrays`, `rate`, `steps`, `batch_size`,
`growths`, `interval`, `statistics`, `held_out`, and the options of its `ARMS`. The folder holds
the images [n, pixels] and labels [n]; the arrays are the weights at the start and the examples of
every update and every growth.
"""

import contextlib
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MOMENTUM = 0.9
DECAY = 0.4
"""Last part of the updates, over which the rate falls linearly to 0."""
TIMES = ("seconds", "processor_seconds")
POWERS = [2.0**power for power in range(-5, 8)]
_ALIKE = {"threshold": 1e-6, "amplitudes": POWERS, "as_used": False}
ARMS: dict[str, dict[str, Any]] = {
    # The same in all: neurons up to the rank, their signs, amplitudes, momentum carried over.
    "ours": {"package": "archscale_jax", **_ALIKE},
    "gromo, 64 bits": {"package": "gromo", "bits": 64, **_ALIKE},
    "gromo, 32 bits": {"package": "gromo", "bits": 32, **_ALIKE},
    # `experiments/grow.py`: neurons of the size of the others, spare capacity, or no growth at all.
    "ours, as used": {
        "package": "archscale_jax", "threshold": 1e-3, "amplitudes": [0.0, *POWERS],
        "as_used": True,
    },
    # The package's tutorial of containers: δW* too, four amplitudes, a new optimizer.
    "gromo, as used": {
        "package": "gromo", "bits": 32, "threshold": 1e-3, "amplitudes": [0.0, 0.1, 0.5, 1.0],
        "as_used": True,
    },
}  # fmt: skip


def rate(case: Mapping[str, Any], step: int) -> float:
    """The learning rate of an update."""
    return case["rate"] * min(1.0, (1 - step / case["steps"]) / DECAY)


def draw_indices(seed: int, examples: int, case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the examples of every update [steps, batch_size] and growth [growths, statistics].

    Every example once an epoch; the last `held_out` of all, on which amplitudes are chosen, never.
    """
    count, size = examples - case["held_out"], case["batch_size"]
    each = count // size
    epochs = [
        np.random.default_rng((seed, epoch)).permutation(count)[: each * size].reshape(each, size)
        for epoch in range(-(-case["steps"] // each))
    ]
    growths = [
        np.random.default_rng((seed, growth, 1)).permutation(count)[: case["statistics"]]
        for growth in range(case["growths"])
    ]
    return {"batches": np.concatenate(epochs)[: case["steps"]], "growths": np.stack(growths)}


class Data:
    """The images and labels of a case, and its arrays."""

    def __init__(self, case: Mapping[str, Any]):
        folder = pathlib.Path(case["folder"])
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            np.load(folder / f"{split}_{what}.npy", mmap_mode="c")
            for split in ("train", "test")
            for what in ("images", "labels")
        )
        with np.load(folder / case["arrays"]) as arrays:
            self.arrays = dict(arrays)

    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Kernels [in, out] and biases [out] at the start, in the order of the layers."""
        count = sum(name.startswith("kernel") for name in self.arrays)
        return [(self.arrays[f"kernel{i}"], self.arrays[f"bias{i}"]) for i in range(count)]


class Clock:
    """Seconds and processor seconds by the names of phases, which may lie in one another."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str):
        """Times what is inside, and adds it to a phase."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - wall
        used = time.process_time() - processor
        self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + used

    def summary(self) -> dict[str, Any]:
        """JSON values; `total` is training and growing, without what is only measured."""
        found = zip(TIMES, (self.seconds, self.processor_seconds), strict=True)
        return {name: one | {"total": one["training"] + one["growing"]} for name, one in found}


def serve(train: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Trains the cases that come in, a line of JSON each, and answers with a line of JSON.

    A case that says `again` is trained twice: `again` is what the second time takes, with all
    programs compiled. What `train` raises as a ValueError is answered as `error`.
    """
    for line in sys.stdin:
        case = json.loads(line)
        try:
            result = train(case)
            if case["again"]:
                again = train(case)
                if again["losses"] != result["losses"]:
                    raise ValueError("a training that was repeated has found other losses")
                result["again"] = {name: again[name] for name in (*TIMES, "programs")}
        except ValueError as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


# Operations: a multiply-add is two; training costs three forward passes, as in experiments/grow.py.


def forward_flops(widths: Sequence[int]) -> int:
    """Operations of one example's forward pass through dense layers of these widths."""
    return sum(2 * inputs * outputs for inputs, outputs in itertools.pairwise(widths))


def growth_flops(widths: Sequence[int], layer: int, case: Mapping[str, Any]) -> float:
    """Operations of a growth: statistics, decompositions and the search of the amplitude.

    Either package runs forward and backward once, and takes Σ B⁻B⁻ᵀ, Σ B⁻Vᵀ, Σ BBᵀ and Σ BVᵀ.
    Ours sums V_proj from the arrays that are still there; gromo has it from Σ B⁻Bᵀ.

    Args:
      widths: before the growth: inputs, neurons of every hidden layer, outputs.
      layer: which hidden layer grows, from 0.
      case: with `package`, `statistics`, `held_out`, `amplitudes` and `as_used`.
    """
    n, forward = case["statistics"], forward_flops(widths)
    made, read, outs = widths[layer] + 1, widths[layer + 1] + 1, widths[layer + 2]
    sums = made * made + made * outs + read * read + read * outs
    small, large = sorted((made, outs))
    decompositions = 9 * made**3 + 4 * large**2 * small + 22 * small**3
    if case["package"] == "gromo":
        sums += made * read + outs * outs * case["as_used"]
        # S⁻¹M by elimination, S^(-1/2) as a product of three matrices.
        decompositions += 2 * read**3 / 3 + 2 * read**2 * outs + 4 * made**3
    else:
        sums += made * outs + (read - 1) * outs
        decompositions += 9 * read**3
    searched = len(case["amplitudes"]) * case["held_out"]
    return forward * (3 * n + searched) + 2 * n * sums + decompositions
