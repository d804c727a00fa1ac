"""Programs of `tests/programs.py` at infinite width: the second moments of their variables.

One unit of a layer of infinite width stands for all: its output is normal, independent of all else,
with the variance that the weights and the second moment of what it reads give. So a variable is a
sample of units, and a layer a fresh sample. This ground truth is not the library's, and has
nothing of graphs, edges or gains.
"""

import numpy as np
from scipy import special

from tests.programs import (
    Activation,
    Doubled,
    Gate,
    Joined,
    Layer,
    Node,
    Norm,
    Product,
    Program,
    Scaled,
    Stack,
    Sum,
    Var,
)

UNITS = 1 << 16

ACTIVATIONS = {
    "identity": lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: h * special.expit(2 * (2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)),
    "silu": lambda h: h * special.expit(h),
    "tanh": np.tanh,
    "abs": np.abs,
    "relu2": lambda h: np.maximum(h, 0) ** 2,
    "leaky_relu": lambda h: np.maximum(h, 0.1 * h),
    "softplus": lambda h: np.logaddexp(h, 0),
    "elu": lambda h: np.where(h > 0, h, np.expm1(np.minimum(h, 0))),
    "sin": np.sin,
    "sigmoid": special.expit,
}


class MeanField:
    """Evaluates a program, its weights of these standard deviations, biases 0 and gains 1.

    Args:
      program: the program.
      deviations: by leaf of the plain spelling; of a stack one, or one for every slice.
      width: sizes the fans.
    """

    def __init__(self, program: Program, deviations: dict[str, np.ndarray], width: int):
        self.deviations, self.width = deviations, width
        self.random = np.random.default_rng(program.seed)
        self.slice = 0
        self.variables = {"x": self.random.normal(size=UNITS)}
        for name, node in program.statements:
            self.variables[name] = self.value(node)

    def moments(self) -> dict[str, float]:
        """Second moments of the variables."""
        return {name: float(np.mean(value**2)) for name, value in self.variables.items()}

    def value(self, node: Node) -> np.ndarray:
        """A sample of units."""
        if isinstance(node, Var):
            return self.variables[node.name]
        if isinstance(node, Layer):
            return self.layer(node)
        if isinstance(node, Stack):
            return self.stack(node)
        if isinstance(node, Gate):
            a, b = map(self.layer, node.layers())
            return ACTIVATIONS[node.kind](a) * b
        if isinstance(node, Sum):
            return np.sum([self.value(term) for term in node.terms], axis=0)
        if isinstance(node, Product):
            return self.value(node.left) * self.value(node.right)
        if isinstance(node, Activation):
            return ACTIVATIONS[node.kind](self.value(node.source))
        if isinstance(node, Scaled):
            return node.constant * self.value(node.source)
        if isinstance(node, Doubled):
            return 2 * self.value(node.source)
        assert isinstance(node, Norm)
        value = self.value(node.source)
        value = value - value.mean() if node.kind == "layer" else value
        return value / np.sqrt(np.mean(value**2))

    def layer(self, node: Layer) -> np.ndarray:
        deviations = np.ravel(self.deviations[node.leaf])
        deviation = deviations[self.slice if len(deviations) > 1 else 0]
        fan = node.inputs.at(self.width) * max(node.kernel, 1) ** 2
        scale = deviation * np.sqrt(fan * self.moment(node.source, node))
        return scale * self.random.normal(size=UNITS)

    def moment(self, source: Node, layer: Layer) -> float:
        """Second moment of what a layer reads; parts of a concatenation count by their sizes."""
        if not isinstance(source, Joined):
            return float(np.mean(self.value(source) ** 2))
        moments = [float(np.mean(self.value(part) ** 2)) for part in source.parts]
        whole = layer.inputs.at(self.width)
        first = self.width / whole  # the first part is the stream
        return first * moments[0] + (1 - first) * moments[1]

    def stack(self, node: Stack) -> np.ndarray:
        self.variables["h"] = self.value(node.source)
        for self.slice in range(node.length):
            self.variables["h"] = self.value(node.body)
        self.slice = 0
        return self.variables.pop("h")
