"""What is known on paper of a model of the zoo (`zoo_linen.py` and its siblings, `test_zoo.py`).

Paths are counted by their generating polynomial Σ_p X^(L_p): X is a weight layer and 1 a skip;
operations in a row multiply, and what a vertex sums, multiplies or joins adds up, since a path
enters it by one of its contributions. Stem and readout are outside, unless stems feed different
vertices: then X^0 stands for the inputs. A function of one vertex alone (x·sigmoid(x), a fused
projection that is split) is an activation of that vertex, and a product with a constant a scale.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

X = Polynomial([0, 1])
ONE = Polynomial([1])

Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]
"""A function, the shapes of its params, and those of its inputs."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and what its architecture must be.

    Attributes:
      build: makes the model.
      paths: generating polynomial of its paths.
      roles: for every role, the regular expression of the leaves that have it.
      fans: fan-in and fan-out of some leaves, derived by hand.
      linear: regular expression of the hidden weights that read no activation; None where that is
        not clear on paper (half of what a layer reads may be activations).
      edges: numbers of edges of some leaves on paths; what reads a first state of zeros is on none.
      layers: layers of some leaves.
      arrangement: what its vertices sum.
      options: of `trace`.
    """

    build: Callable[[], Built]
    paths: Polynomial
    roles: Mapping[str, str]
    fans: Mapping[str, tuple[int, int]]
    linear: str | None = None
    edges: Mapping[str, int] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arrangement: str = "pre_activation"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """A model that cannot be read, and what the message must say."""

    build: Callable[[], Built]
    match: str


def example(**expected: Any) -> Callable[[Callable[[], Built]], Example]:
    return lambda build: Example(build, **expected)


def unsupported(match: str) -> Callable[[Callable[[], Built]], Unsupported]:
    return lambda build: Unsupported(build, match)


def statistics_of(paths: Polynomial) -> tuple[int, int, int, int]:
    """Number of paths, sum of their depths, smallest and largest depth."""
    coefficients = [round(coefficient) for coefficient in paths.coef]
    depths = np.flatnonzero(coefficients)
    total = sum(depth * coefficient for depth, coefficient in enumerate(coefficients))
    return sum(coefficients), total, int(depths[0]), int(depths[-1])
