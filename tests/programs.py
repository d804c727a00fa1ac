"""Random networks as small programs, for properties that must hold of any network.

A program is a list of assignments of expressions, generated from an integer seed. It says what is
computed, not how that is written: `tests/spellings.py` writes one program in many ways.

    print(spelled(generate(7), Spelling()).source)

Sizes are multiples of the width, or numbers (inputs, outputs), so that one program has any width.
What a program does is such that its second moments at infinite width are those of Gaussian features
(theory §9): activations act on sums of layers, on what follows a product acts a layer first, and
products multiply layers of their own. relu² comes once at most: a row of them raises the noise of a
finite width to a high power. The inputs have 256 features.
"""

import dataclasses
import random
from collections.abc import Iterator
from fractions import Fraction

INPUTS = 256
"""Features of the inputs; those of an image with 16 positions have 16 channels."""
POSITIONS, CHANNELS = (4, 4), 16
OUTPUTS = 10

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "abs", "relu2", "leaky_relu", "softplus", "elu",
               "sin")  # fmt: skip
GATES = ("identity", "sigmoid", "silu", "gelu", "relu", "tanh")


@dataclasses.dataclass(frozen=True)
class Size:
    """A number of features: a multiple of the width, and a number beside it."""

    multiple: Fraction = Fraction(0)
    fixed: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.multiple + other.multiple, self.fixed + other.fixed)

    def at(self, width: int) -> int:
        """The number at a width."""
        return int(self.multiple * width) + self.fixed


ONE, HALF, TWO = Size(Fraction(1)), Size(Fraction(1, 2)), Size(Fraction(2))


class Node:
    """An expression."""


@dataclasses.dataclass(frozen=True)
class Var(Node):
    name: str


@dataclasses.dataclass(frozen=True)
class Layer(Node):
    """A dense layer or, with kernel 1 or 3, a circular convolution."""

    leaf: str
    source: Node
    inputs: Size
    outputs: Size
    bias: bool = False
    kernel: int = 0


@dataclasses.dataclass(frozen=True)
class Activation(Node):
    kind: str
    source: Node


@dataclasses.dataclass(frozen=True)
class Norm(Node):
    """A normalization over the features, `layer` or `rms`, with a gain where it names a leaf."""

    kind: str
    source: Node
    size: Size
    gain: str | None = None


@dataclasses.dataclass(frozen=True)
class Scaled(Node):
    constant: float
    source: Node


@dataclasses.dataclass(frozen=True)
class Doubled(Node):
    """`h + h`."""

    source: Node


@dataclasses.dataclass(frozen=True)
class Sum(Node):
    terms: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Joined(Node):
    """A concatenation of features."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Product(Node):
    left: Node
    right: Node


@dataclasses.dataclass(frozen=True)
class Gate(Node):
    """`σ(a) * b` of two layers that read one source, which may be one matrix that is split."""

    leaf: str
    source: Node
    kind: str
    inputs: Size
    outputs: Size
    kernel: int = 0

    def layers(self) -> tuple[Layer, Layer]:
        """The two layers, where they have matrices of their own."""
        a, b = (
            Layer(self.leaf + side, self.source, self.inputs, self.outputs, kernel=self.kernel)
            for side in "ab"
        )
        return a, b


@dataclasses.dataclass(frozen=True)
class Stack(Node):
    """`length` times `h = body`, each with its slices of the leaves of the body."""

    source: Node
    body: Node
    length: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A network.

    Attributes:
      seed: what it was generated from.
      statements: variables and what they are, in order; the first layer reads `x`.
      result: the outputs.
      image: whether the inputs have positions.
      kinds: what is in it, for statistics of failures.
    """

    seed: int
    statements: tuple[tuple[str, Node], ...]
    result: Node
    image: bool
    kinds: frozenset[str]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (*POSITIONS, CHANNELS) if self.image else (INPUTS,)

    def nodes(self) -> Iterator[tuple[Node, int]]:
        """All expressions, see `nodes`."""
        for node in (*(node for _, node in self.statements), self.result):
            yield from nodes(node)


def children(node: Node) -> Iterator[Node]:
    """The expressions that one is made of."""
    for value in vars(node).values():
        if isinstance(value, Node):
            yield value
        elif isinstance(value, tuple):
            yield from (one for one in value if isinstance(one, Node))


def nodes(node: Node, length: int = 0) -> Iterator[tuple[Node, int]]:
    """An expression and all in it, each with the length of the stack that it is in, or 0."""
    yield node, length
    for child in children(node):
        repeated = isinstance(node, Stack) and child is node.body
        yield from nodes(child, vars(node)["length"] if repeated else length)


def generate(seed: int) -> Program:
    """Returns the program of a seed."""
    return _Generator(seed).program()


class _Generator:
    """Draws a program; `stream` is the variable of the features so far, as many as the width."""

    def __init__(self, seed: int):
        self.seed = seed
        self.random = random.Random(seed)
        self.image = self.random.random() < 0.12
        # Whether layers end in an activation, `h = σ(W h)`, instead of beginning with one.
        self.post = not self.image and self.random.random() < 0.15
        self.main = self.random.choice(ACTIVATIONS)
        self.biased = self.random.random() < 0.3
        self.statements: list[tuple[str, Node]] = []
        self.kinds: set[str] = {"activations summed"} if self.post else set()
        self.kinds |= {"convolution"} if self.image else set()
        self.leaves = 0
        self.squared = False  # whether relu² has been taken: it may be once, and in no stack
        self.stream = Var("x")
        self.sizes = {"x": Size(fixed=CHANNELS if self.image else INPUTS), "h": ONE}
        self.gaussian = {"x": True, "h": True}

    def program(self) -> Program:
        wanted = self.random.randint(1, 6)
        self.assign(self.after(self.layer(Var("x"))), True)
        blocks = {
            self.plain: 3, self.residual: 4, self.several: 2, self.joined: 2, self.gate: 2,
            self.product: 2, self.normalized: 2, self.stack: 2, self.inputs_again: 1,
            self.doubled: 1, self.scaled: 2, self.long_skip: 1,
        }  # fmt: skip
        while self.leaves < wanted:
            self.random.choices(list(blocks), list(blocks.values()))[0]()
        last = self.before(self.stream)
        if self.random.random() < 0.25:
            last = self.norm(self.stream)
        result = Layer(self.leaf(), last, ONE, Size(fixed=OUTPUTS), self.biased)
        return Program(self.seed, tuple(self.statements), result, self.image, frozenset(self.kinds))

    # Pieces.

    def leaf(self) -> str:
        self.leaves += 1
        return f"w{self.leaves}"

    def kernel(self) -> int:
        return self.random.choice((1, 3)) if self.image else 0

    def layer(self, source: Node, outputs: Size = ONE) -> Layer:
        bias = self.biased and self.random.random() < 0.7
        return Layer(self.leaf(), source, self.size(source), outputs, bias, self.kernel())

    def activation(self, source: Node) -> Node:
        kind = self.main if self.random.random() < 0.7 else self.random.choice(ACTIVATIONS)
        if kind == "relu2" and self.squared:
            kind = "relu"
        self.squared |= kind == "relu2"
        return Activation(kind, source)

    def before(self, source: Node) -> Node:
        """What a layer reads of features: their activation, unless that was or must not be."""
        if self.post or not self.is_gaussian(source):
            return source
        if self.random.random() < 0.12:
            self.kinds.add("linear")
            return source
        return self.activation(source)

    def after(self, node: Node) -> Node:
        return self.activation(node) if self.post else node

    def contribution(self, source: Node) -> Node:
        """One layer with its activation."""
        return self.after(self.layer(self.before(source)))

    def norm(self, source: Node) -> Norm:
        self.kinds.add("norm")
        gain = f"g{self.leaves}_{len(self.statements)}" if self.random.random() < 0.5 else None
        return Norm(self.random.choice(("layer", "rms")), source, self.size(source), gain)

    def constant(self) -> float:
        return self.random.choice((0.1, 0.25, 0.5, 0.7, 1.5, 2.0, 3.0))

    def is_gaussian(self, node: Node) -> bool:
        return all(self.gaussian[one.name] for one, _ in nodes(node) if isinstance(one, Var))

    def size(self, node: Node) -> Size:
        if isinstance(node, Layer | Gate):
            return node.outputs
        if isinstance(node, Var):
            return self.sizes[node.name]
        if isinstance(node, Joined):
            return sum(map(self.size, node.parts), Size())
        return self.size(next(children(node)))

    def assign(self, node: Node, gaussian: bool, *, stream: bool = True) -> Var:
        var = Var(f"h{len(self.statements)}")
        self.statements.append((var.name, node))
        self.gaussian[var.name], self.sizes[var.name] = gaussian, self.size(node)
        if stream:
            self.stream = var
        return var

    def earlier(self) -> Var:
        return Var(self.random.choice(self.statements)[0])

    # Blocks, each of which makes the stream anew.

    def plain(self) -> None:
        self.assign(self.contribution(self.stream), True)

    def residual(self) -> None:
        self.kinds.add("residual")
        source: Node = self.stream
        skip: Node = self.stream
        gaussian = self.is_gaussian(source)
        if self.random.random() < 0.4:
            source = self.norm(source)
        branch: Node
        if self.random.random() < 0.5:
            branch = self.contribution(source)
        else:
            size = self.random.choice((HALF, ONE, TWO))
            inner = self.after(self.layer(self.before(source), size))
            branch = self.after(self.layer(inner if self.post else self.activation(inner)))
        if self.random.random() < 0.3:
            self.kinds.add("branch constant")
            branch = Scaled(self.constant(), branch)
        if self.random.random() < 0.1:
            self.kinds.add("skip constant")
            skip = Scaled(self.constant(), skip)
        summed: Node = Sum((skip, branch))
        if self.random.random() < 0.1 and not self.post:
            self.kinds.add("post-norm")
            summed = self.norm(summed)
        self.assign(summed, gaussian)

    def several(self) -> None:
        self.kinds.add("several layers")
        sources = [self.stream, self.earlier(), self.earlier()][: self.random.randint(2, 3)]
        self.assign(Sum(tuple(self.contribution(source) for source in sources)), True)

    def joined(self) -> None:
        """A layer reads the stream and the inputs, an older variable, or a layer of its own."""
        self.kinds.add("concatenation")
        which = self.random.random()
        other: Node = Var("x")
        if which > 0.6 or self.image:
            other = self.before(self.earlier())
        elif which > 0.2:
            size = self.random.choice((HALF, ONE))
            made = self.after(self.layer(self.before(self.stream), size))
            other = self.before(self.assign(made, True, stream=False))
        else:
            self.kinds.add("inputs again")
        parts = Joined((self.before(self.stream), other))
        self.assign(self.after(self.layer(parts)), True)

    def gate(self) -> None:
        self.kinds.add("gate")
        size = self.random.choice((HALF, ONE))
        source = self.before(self.stream)
        if self.random.random() < 0.3:
            source = self.norm(self.stream)
        kind = self.random.choice(GATES)
        gate = Gate(self.leaf(), source, kind, self.size(source), size, self.kernel())
        self.leaves += 1
        self.end_product(gate)

    def product(self) -> None:
        self.kinds.add("product")
        made = self.layer(self.before(self.earlier()))
        left: Node = self.assign(made, True, stream=False)
        left = self.activation(left) if self.random.random() < 0.7 else left
        self.end_product(Product(left, self.layer(self.before(self.stream))))

    def end_product(self, product: Node) -> None:
        """A layer reads the product, or the stream adds it."""
        stream = self.stream
        if self.size(product) == ONE and not self.post and self.random.random() < 0.3:
            self.kinds.add("product ends branch")
            self.assign(Sum((stream, product)), False)
            return
        node = self.after(self.layer(self.assign(product, False, stream=False)))
        gaussian, add = self.is_gaussian(stream), self.random.random() < 0.4
        self.assign(Sum((stream, node)) if add else node, gaussian or not add)

    def normalized(self) -> None:
        normalized = self.norm(self.stream)
        read = normalized if self.random.random() < 0.4 else self.before(normalized)
        self.assign(self.after(self.layer(read)), True)

    def stack(self) -> None:
        self.kinds.add("stack")
        if not self.is_gaussian(self.stream):
            self.plain()
        h = Var("h")
        squared, self.squared = self.squared, True
        body = self.contribution(self.norm(h) if self.random.random() < 0.3 else h)
        if self.random.random() < 0.6:
            if self.random.random() < 0.3:
                self.kinds.add("branch constant")
                body = Scaled(self.constant(), body)
            body = Sum((h, body))
        length = self.random.randint(2, 4)
        self.leaves += length - 1
        self.squared = squared
        self.assign(Stack(self.stream, body, length), True)

    def inputs_again(self) -> None:
        self.kinds.add("inputs again")
        first = self.stream if self.random.random() < 0.4 else self.contribution(self.stream)
        again = self.after(self.layer(Var("x")))
        self.assign(Sum((first, again)), self.is_gaussian(first) or first is not self.stream)

    def doubled(self) -> None:
        self.kinds.add("doubled")
        self.assign(self.after(self.layer(self.before(Doubled(self.stream)))), True)

    def scaled(self) -> None:
        """A constant in front of the activation, behind it, or both."""
        self.kinds.add("constant")
        where = self.random.randint(1, 3)
        source = Scaled(self.constant(), self.stream) if where & 1 else self.stream
        read = self.before(source)
        read = Scaled(self.constant(), read) if where & 2 else read
        self.assign(self.after(self.layer(read)), True)

    def long_skip(self) -> None:
        others = [Var(name) for name, _ in self.statements if self.sizes[name] == ONE]
        others = [one for one in others if one != self.stream]
        if not others:
            self.plain()
            return
        self.kinds.add("long skip")
        both = Sum((self.stream, self.random.choice(others)))
        self.assign(both, self.is_gaussian(both))
