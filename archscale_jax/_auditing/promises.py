"""What a plan promises of its optimizer."""

from typing import NamedTuple

from archscale_jax._auditing.judge import causes_of
from archscale_jax._auditing.kinds import Kind
from archscale_jax._parametrize import Parametrization
from archscale_jax.rules._matrix import Matrix, matrix_of
from archscale_jax.rules._optimizer import OPTIMIZERS


class Promises(NamedTuple):
    """What a plan promises of its optimizer, by name of leaf.

    Attributes:
      kinds: what the optimizer makes of gradients.
      rates: multipliers of the learning rate.
      decay: η·λ over the base's.
      epsilon: multipliers of epsilon.
      sizes: of Muon's leaves, inputs and outputs of a matrix.
      causes: what else may be applied instead of the rates.
      consistent: by what the rates of Muon's leaves are multiplied under `consistent_rms`.
    """

    kinds: dict[str, Kind]
    rates: dict[str, float]
    decay: dict[str, float]
    epsilon: dict[str, float]
    sizes: dict[str, tuple[int, int]]
    causes: dict[str, dict[str, float]]
    consistent: dict[str, float]

    @classmethod
    def of(cls, plan: Parametrization) -> "Promises":
        """Reads a plan."""
        found = plan._hyperparameters
        rates = {name: one.value for name, one in found.rates.items()}
        kinds, sizes = {}, {}
        optimizer = OPTIMIZERS[plan.optimizer_name]
        for one in plan.architecture.parameters:
            kinds[one.name] = Kind.SGD if optimizer == "sgd" else Kind.ADAM
            matrix = matrix_of(one) if optimizer == "muon" else ""
            if isinstance(matrix, Matrix):
                kinds[one.name] = Kind.MUON
                sizes[one.name] = matrix.sizes(one.shape)
        return cls(
            kinds,
            rates,
            {name: rates[name] * one.value for name, one in found.decay.items()},
            {name: one.value for name, one in found.epsilon.items()},
            sizes,
            causes_of(found.rates),
            plan._rms_multipliers() if optimizer == "muon" else {},
        )
