"""How large one update is, leaf by leaf, by axes that were written down by hand.

A matrix that maps `in` to `out` features is to change by √(out/in) in spectral norm, times a number
that no width enters. The Newton-Schulz iteration of Muon does not make an update orthogonal: with
its usual coefficients singular values near 1 run through 1.134, 0.753, 1.047 and 0.682, again and
again, and after five steps those that started small are still on their way. So the spectral norm of
an update hangs on its shape by a tenth. Three sizes are measured:

* `scale`: the update over what the same iteration, in NumPy, makes of the gradient; it is what the
  spectral norm would be were the iteration exact;
* `spectral`: the spectral norm. Enough steps bring it to 1.134 times the scale, whatever the shape:
  twelve within 3 %, twenty within 0.1 %;
* `rms`: the root mean square of the singular values, which averages over their spread.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from archscale_jax._trees import named_leaves
from tests.matrix_models import Axes, Example


class Step(NamedTuple):
    """The update of a leaf.

    Attributes:
      is_matrix: whether it is a matrix of a hidden layer, by hand.
      scale: see above, times √(in/out), as the next two; the largest over the matrices of a stack.
        Of a leaf that is no matrix, here and below, the root mean square of its entries.
      spectral: see above.
      rms: see above.
      spread: smallest over largest, of scales of the matrices of a stack, or of absolute entries.
      error: of a matrix, the part of the update that is not the iteration's times a number.
    """

    is_matrix: bool
    scale: float
    spectral: float
    rms: float
    spread: float
    error: float = 0.0


def axes_of(example: Example, name: str) -> Axes | None:
    """The axes of a matrix as written down, None of other leaves; every leaf must be written."""
    matrices = [axes for one, axes in example.matrices.items() if re.fullmatch(one, name)]
    others = [why for one, why in example.others.items() if re.fullmatch(one, name)]
    assert len(matrices) + bool(others) == 1, name
    return matrices[0] if matrices else None


def optimizer_of(plan: Any, **options: Any) -> Callable[[], optax.GradientTransformation]:
    """A function that makes the optimizer of a plan at rate 1."""
    return functools.partial(plan.optimizer, 1.0, **options)


def steps(
    example: Example,
    make: Callable[[], optax.GradientTransformation],
    shapes: Any,
    iterations: int = 5,
    seed: int = 0,
) -> dict[str, Step]:
    """Returns the sizes of the first updates by name, for random gradients of full rank.

    Args:
      example: tells the axes.
      make: makes the optimizer.
      shapes: of the params.
      iterations: steps of Newton-Schulz that the optimizer takes.
      seed: of the gradients.
    """
    leaves, structure = jax.tree.flatten(shapes)
    generator = np.random.default_rng(seed)
    drawn = [jnp.asarray(generator.normal(size=one.shape), jnp.float32) for one in leaves]
    gradients = jax.tree.unflatten(structure, drawn)

    @jax.jit
    def update(gradients):
        optimizer, params = make(), jax.tree.map(jnp.zeros_like, gradients)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    slopes = named_leaves(gradients)
    return {
        name: step(np.asarray(one), -np.asarray(slopes[name]), axes_of(example, name), iterations)
        for name, one in named_leaves(update(gradients)).items()
    }


def step(update: np.ndarray, direction: np.ndarray, axes: Axes | None, iterations: int) -> Step:
    """The size of an update, a matrix along the axes of inputs and of outputs, or none."""
    if axes is None:
        entries = np.abs(update)
        size = float(np.sqrt(np.mean(entries**2)))
        return Step(False, size, size, size, float(entries.min() / entries.max()))
    stack = [axis for axis in range(update.ndim) if axis not in (*axes[0], *axes[1])]
    inputs, outputs = (math.prod(update.shape[axis] for axis in one) for one in axes)
    updates, directions = (
        one.astype(float).transpose(*stack, *axes[0], *axes[1]).reshape(-1, inputs, outputs)
        for one in (update, direction)
    )
    exact = np.stack([newton_schulz(one, iterations) for one in directions])
    scales = np.sum(updates * exact, (1, 2)) / np.sum(exact**2, (1, 2))
    rest = updates - scales[:, None, None] * exact
    squares = np.stack([_squared_singular_values(one) for one in updates])
    wanted = math.sqrt(outputs / inputs)
    return Step(
        True,
        float(scales.max()) / wanted,
        math.sqrt(squares.max()) / wanted,
        math.sqrt(squares.mean(1).max()) / wanted,
        float(scales.min() / scales.max()),
        float(np.linalg.norm(rest) / np.linalg.norm(updates)),
    )


def newton_schulz(matrix: np.ndarray, iterations: int) -> np.ndarray:
    """The iteration of Muon [Jordan], whose coefficients are those of its published code."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.linalg.norm(wide)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrix else x.T


def _squared_singular_values(matrix: np.ndarray) -> np.ndarray:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.linalg.eigvalsh(wide @ wide.T)
