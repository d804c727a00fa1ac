"""How losses and best rates of a method go with size, by least squares on their logarithms.

2605.21486 asks three things of a parametrization beside the drift: how well a power law fits the
best rates, how what an error of the rate costs goes with size, and what the loss is over another's
where sizes are large. Its definitions are taken from its abstract, these formulas are our own.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
from jaxtyping import Float


class Law(NamedTuple):
    """A power law c·N^b, fitted for every seed.

    Attributes:
      exponent: b, a value a seed.
      residual: root mean square distance of the logarithms from the law, of the means over seeds;
        not a number where two sizes leave none.
    """

    exponent: Float[np.ndarray, "seeds"]
    residual: float


def power_law(sizes: npt.ArrayLike, logarithms: Float[np.ndarray, "sizes seeds"]) -> Law:
    """Fits a power law to the logarithms of what was measured at several sizes.

    Args:
      sizes: N, such as parameters, two different ones at least.
      logarithms: natural logarithms of the measured values; a constant added to all of them changes
        nothing.
    """
    across = np.log(np.asarray(sizes, float))
    design = np.stack([np.ones_like(across), across], axis=1)
    coefficients = np.linalg.lstsq(design, logarithms, rcond=None)[0]
    left = np.mean(logarithms - design @ coefficients, axis=1)
    free = len(across) - 2
    residual = float(np.sqrt(np.sum(left**2) / free)) if free else float("nan")
    return Law(coefficients[1], residual)


class Saturation(NamedTuple):
    """A law E + A·N^(-a) of losses.

    Attributes:
      limit: E.
      exponent: a.
      residual: root mean square distance of the losses from the law, over the degrees of freedom.
    """

    limit: float
    exponent: float
    residual: float


def saturation(sizes: npt.ArrayLike, losses: npt.ArrayLike) -> Saturation | None:
    """Fits E + A·N^(-a) with E ≥ 0, A ≥ 0 and 0 < a ≤ 2; None below four sizes.

    For an exponent the best E and A are linear least squares without negative values; the exponent
    is searched.
    """
    scaled = np.asarray(sizes, float)
    if len(scaled) < 4:
        return None
    scaled = scaled / scaled.min()

    def fit(exponent: float) -> tuple[np.ndarray, float]:
        design = np.stack([np.ones_like(scaled), scaled**-exponent], axis=1)
        return scipy.optimize.nnls(design, np.asarray(losses, float))

    grid = np.geomspace(1e-3, 2, 60)
    nearest = int(np.argmin([fit(one)[1] for one in grid]))
    bounds = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]
    exponent = scipy.optimize.minimize_scalar(
        lambda one: fit(one)[1], bounds=bounds, method="bounded"
    ).x
    (limit, _), norm = fit(exponent)
    return Saturation(float(limit), float(exponent), float(norm / np.sqrt(len(scaled) - 3)))
