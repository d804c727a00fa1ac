"""What a layer should change and cannot, and the neurons that would let it (theory §8).

A layer a = W B has inputs B and should change its output by V, the steepest descent of the loss for
every sample. All functions here read sums over samples, so that no activation is kept, and work on
the host in float64: the covariances of features are nearly singular.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

Matrix = np.ndarray | Array


class LayerStatistics(NamedTuple):
    """Sums over n samples and their positions, of a layer with I inputs and O outputs.

    Attributes:
      examples: n.
      inputs: Σ B Bᵀ, [I, I].
      targets: Σ B Vᵀ, [I, O].
      target_square: Σ ‖V‖².
    """

    examples: Float[Matrix, ""]
    inputs: Float[Matrix, "i i"]
    targets: Float[Matrix, "i o"]
    target_square: Float[Matrix, ""]


class Solution(NamedTuple):
    """The best update of a layer, and how far it is from what its output should change by.

    Attributes:
      update: δW*, [I, O].
      absolute: Ψ = min over δW of ‖V - δW B‖²/n.
      relative: Ψ·n/‖V‖², from 0, where the layer can express the change, to 1; 0 where V is 0.
      rank: of B Bᵀ.
      explained: <V, δW* B>/n = ‖δW* B‖²/n.
    """

    update: Float[np.ndarray, "i o"]
    absolute: float
    relative: float
    rank: int
    explained: float


class Neurons(NamedTuple):
    """K new neurons between A inputs and O outputs, by falling worth.

    Attributes:
      fan_in: α, [A, K].
      fan_out: ω, [K, O].
      singular_values: λ, [K]; γ·α and γ·ω do γ²·σ'(0)·Σ λ² of what V_proj asks for to first order.
    """

    fan_in: Float[np.ndarray, "a k"]
    fan_out: Float[np.ndarray, "k o"]
    singular_values: Float[np.ndarray, " k"]

    @property
    def number(self) -> int:
        """K."""
        return len(self.singular_values)

    def first(self, number: int) -> "Neurons":
        """Returns the first so many neurons."""
        return Neurons(
            self.fan_in[:, :number], self.fan_out[:number], self.singular_values[:number]
        )


def least_squares(statistics: LayerStatistics, *, cutoff: float = 1e-6) -> Solution:
    """The best update δW* = V Bᵀ (B Bᵀ)⁺ and the expressivity bottleneck Ψ [TINY].

    Args:
      statistics: of the layer.
      cutoff: eigenvalues of B Bᵀ below this part of the largest count as 0.

    Raises:
      ValueError: statistics that are not finite, or of no sample.
    """
    count = _count(statistics.examples)
    inputs = finite("inputs", statistics.inputs) / count
    targets = finite("targets", statistics.targets) / count
    square = float(finite("target_square", statistics.target_square)) / count
    root = inverse_root(inputs, cutoff=cutoff)
    update = root @ (root.T @ targets)
    explained = float(np.vdot(update, 2 * targets - inputs @ update))
    absolute = max(square - explained, 0.0)
    relative = absolute / square if square > 0 else 0.0
    return Solution(update, absolute, relative, root.shape[1], explained)


def new_neurons(
    before: Float[Matrix, "a a"],
    projected: Float[Matrix, "a o"],
    count: float | Matrix,
    *,
    number: int | None = None,
    threshold: float = 1e-3,
    cutoff: float = 1e-6,
) -> Neurons:
    """The neurons that lower the loss the most for their size [TINY]: the closed form.

    With S = B⁻ B⁻ᵀ/n, N = B⁻ V_projᵀ/n and S^(-1/2) N = U Λ Vᵀ, neuron k has the fan-in
    α_k = √λ_k S^(-1/2) u_k and the fan-out ω_k = √λ_k v_k.

    Args:
      before: Σ B⁻ B⁻ᵀ of the inputs of the layer that grows.
      projected: Σ B⁻ V_projᵀ, with V_proj = V - δW* B of the layer behind it.
      count: n.
      number: the most neurons; None takes all that `threshold` leaves.
      threshold: the smallest λ; the largest is always kept.
      cutoff: eigenvalues of S below this part of the largest count as 0.

    Returns:
      At least one neuron, unless all λ are 0; the largest entry of a fan-out is positive.

    Raises:
      ValueError: statistics that are not finite, or of no sample; a number below 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"number must be None or at least 1, found {number}")
    n = _count(count)
    root = inverse_root(finite("before", before) / n, cutoff=cutoff)
    left, values, right = np.linalg.svd(
        root.T @ (finite("projected", projected) / n), full_matrices=False
    )
    least = min(threshold, values.max(initial=0.0))
    kept = np.flatnonzero((values >= least) & (values > 0))[:number]
    sizes = np.sqrt(values[kept])
    return with_sign(
        Neurons(root @ left[:, kept] * sizes, sizes[:, None] * right[kept], values[kept])
    )


def gated_neurons(
    before: Float[Matrix, "ga ga"],
    projected: Float[Matrix, "ga o"],
    count: float | Matrix,
    gates: int,
    *,
    number: int,
    threshold: float = 1e-3,
    cutoff: float = 1e-6,
) -> Neurons:
    """Neurons each of which is gated by one of g given gates: g(x) α B⁻.

    `new_neurons` of g·B⁻ one after the other, each of the gate with the largest λ; what a neuron
    explains is taken from V_proj. Of one gate these are `new_neurons`.

    Args:
      before: Σ over samples of the products of g·B⁻, stacked by gates.
      projected: Σ g·B⁻ V_projᵀ, stacked by gates.
      count: n.
      gates: how many.
      number: the most neurons.
      threshold: see `new_neurons`.
      cutoff: see `new_neurons`.

    Raises:
      ValueError: statistics that are not finite, or of no sample.
    """
    n = _count(count)
    covariance, moment = finite("before", before) / n, finite("projected", projected) / n
    size = len(moment) // gates
    blocks = [slice(size * place, size * (place + 1)) for place in range(gates)]
    roots = [inverse_root(covariance[one, one], cutoff=cutoff) for one in blocks]
    least = 1e-9 * np.linalg.norm(moment)
    fan_in, fan_out, values = [], [], []
    while len(values) < number:
        tops = []
        for root, one in zip(roots, blocks, strict=True):
            left, value, right = _largest(root.T @ moment[one])
            tops.append((value, root @ left, right))
        place = int(np.argmax([value for value, *_ in tops]))
        value, inwards, outwards = tops[place]
        if value <= (max(threshold, least) if values else 0.0):
            break
        feature = np.zeros(len(moment))
        feature[blocks[place]] = inwards  # of mean square 1
        fan_in.append(np.sqrt(value) * feature)
        fan_out.append(np.sqrt(value) * outwards)
        values.append(value)
        moment = moment - np.outer(covariance @ feature, feature @ moment)
    shapes = (len(values), len(moment)), (len(values), moment.shape[1])
    return with_sign(
        Neurons(np.reshape(fan_in, shapes[0]).T, np.reshape(fan_out, shapes[1]), np.asarray(values))
    )


def _largest(matrix: Float[np.ndarray, "a o"]) -> tuple[np.ndarray, float, np.ndarray]:
    """Returns the largest singular value of a matrix, and its vectors: faster than all of them."""
    from scipy.linalg import eigh  # slow to import

    rows, columns = matrix.shape
    if not rows or not np.any(matrix):
        return np.zeros(rows), 0.0, np.zeros(columns)
    wide = matrix if rows <= columns else matrix.T
    last = len(wide) - 1
    _, found = eigh(wide @ wide.T, subset_by_index=(last, last))
    one, other = found[:, 0], found[:, 0] @ wide
    value = float(np.linalg.norm(other))
    pair = one, other / value
    return pair[rows > columns], value, pair[rows <= columns]


def with_sign(neurons: Neurons) -> Neurons:
    """Turns neurons so that the largest entry of every fan-out is positive.

    (α, ω) and (-α, -ω) are one solution but, with most activations, two networks: which of them a
    decomposition gives would be up to rounding.
    """
    largest = np.argmax(np.abs(neurons.fan_out), axis=1)
    sign = np.where(neurons.fan_out[np.arange(len(largest)), largest] < 0, -1.0, 1.0)
    return neurons._replace(fan_in=neurons.fan_in * sign, fan_out=neurons.fan_out * sign[:, None])


def inverse_root(matrix: Float[np.ndarray, "a a"], *, cutoff: float) -> Float[np.ndarray, "a r"]:
    """Returns R with R Rᵀ = M⁺, for a positive semidefinite M of rank r."""
    if not len(matrix):
        return np.zeros((0, 0))
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > cutoff * max(values[-1], 0.0)
    return vectors[:, kept] / np.sqrt(values[kept])


def _count(count: float | Matrix) -> float:
    if not float(count) > 0:
        raise ValueError(f"statistics hold {float(count):g} samples; accumulate a batch first")
    return float(count)


def finite(name: str, values: Matrix) -> np.ndarray:
    """Returns statistics in float64.

    Raises:
      ValueError: they are not finite.
    """
    found = np.asarray(values, np.float64)
    if not np.all(np.isfinite(found)):
        raise ValueError(
            f"statistics hold {name} that are not finite: the loss or its gradient overflows; "
            "train at a smaller learning rate, or from smaller weights"
        )
    return found
