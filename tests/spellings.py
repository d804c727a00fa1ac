"""One program of `tests/programs.py` in many spellings: source text, function and params.

A spelling chooses one of several ways for everything that can be written in more than one. All
spellings of a program compute one function of the same weights; where they lie otherwise (a kernel
transposed, two matrices in one) `Spelled.convert` says how.
"""

import dataclasses
import itertools
import linecache
import random
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
    Size,
    Stack,
    Sum,
    Var,
)

OPTIONS = {
    "dense": ("matmul", "einsum", "dot_general"),
    "activation": ("library", "by hand", "where", "custom_jvp"),
    "norm": ("moments", "einsum", "linalg", "standardize"),
    "loop": ("python", "scan", "fori_loop"),
    "gate": ("two matrices", "split", "slices"),
    "constant": ("front", "behind", "divided"),
    "order": ("forward", "reversed"),
    "double": ("added", "multiplied"),
    "join": ("concatenate", "set"),
    "wrap": ("none", "vmap", "jit", "checkpoint"),
}
"""The ways to write each thing; the first is the plain one."""


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A choice of `OPTIONS`."""

    dense: str = "matmul"
    activation: str = "library"
    norm: str = "moments"
    loop: str = "python"
    gate: str = "two matrices"
    constant: str = "front"
    order: str = "forward"
    double: str = "added"
    join: str = "concatenate"
    wrap: str = "none"

    def __str__(self) -> str:
        other = [
            f"{name}={value}"
            for name, value in dataclasses.asdict(self).items()
            if value != OPTIONS[name][0]
        ]
        return ", ".join(other) or "plain"


def spellings(seed: int) -> list[Spelling]:
    """Returns the plain spelling and four mixed ones, in which every option occurs."""
    generator = random.Random(seed)
    count = max(map(len, OPTIONS.values()))
    columns = {}
    for name, options in OPTIONS.items():
        offset = generator.randrange(len(options))
        columns[name] = [options[(offset + row) % len(options)] for row in range(count)]
        generator.shuffle(columns[name])
    rows = zip(*columns.values(), strict=True)
    return [Spelling(), *(Spelling(**dict(zip(columns, row, strict=True))) for row in rows)]


def variations() -> Iterator[Spelling]:
    """Spellings that differ from the plain one in one choice, to find the one at fault."""
    for name, options in OPTIONS.items():
        yield from (Spelling(**{name: option}) for option in options[1:])


FORMULAS = {
    "relu": ("jax.nn.relu({h})", "jnp.maximum({h}, 0)", "jnp.where({h} > 0, {h}, 0)"),
    "gelu": (
        "jax.nn.gelu({h})",
        "0.5 * {h} * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * ({h} + 0.044715 * {h}**3)))",
        "jnp.where({h} == 0, 0, jax.nn.gelu({h}))",
    ),
    "silu": (
        "jax.nn.silu({h})",
        "{h} / (1 + jnp.exp(-{h}))",
        "jnp.where({h} < -80, 0, {h} * jax.nn.sigmoid({h}))",
    ),
    "tanh": (
        "jnp.tanh({h})",
        "jnp.sign({h}) * -jnp.expm1(-2 * jnp.abs({h})) / (1 + jnp.exp(-2 * jnp.abs({h})))",
        "jnp.where({h} > 0, jnp.tanh({h}), -jnp.tanh(-{h}))",
    ),
    "abs": ("jnp.abs({h})", "jnp.maximum({h}, -{h})", "jnp.where({h} > 0, {h}, -{h})"),
    "relu2": (
        "jax.nn.relu({h}) ** 2",
        "jnp.square(jnp.maximum({h}, 0))",
        "jnp.where({h} > 0, {h} * {h}, 0)",
    ),
    "leaky_relu": (
        "jax.nn.leaky_relu({h}, 0.1)",
        "jnp.maximum({h}, 0.1 * {h})",
        "jnp.where({h} > 0, {h}, 0.1 * {h})",
    ),
    "softplus": (
        "jax.nn.softplus({h})",
        "jnp.maximum({h}, 0) + jnp.log1p(jnp.exp(-jnp.abs({h})))",
        "jnp.where({h} > 30, {h}, jnp.log1p(jnp.exp(jnp.minimum({h}, 30))))",
    ),
    "elu": (
        "jax.nn.elu({h})",
        "jnp.maximum({h}, 0) + jnp.expm1(jnp.minimum({h}, 0))",
        "jnp.where({h} > 0, {h}, jnp.expm1(jnp.where({h} > 0, 0, {h})))",
    ),
    "sin": (
        "jnp.sin({h})",
        "2 * jnp.sin({h} / 2) * jnp.cos({h} / 2)",
        "jnp.where({h} > 0, jnp.sin({h}), -jnp.sin(-{h}))",
    ),
    "sigmoid": (
        "jax.nn.sigmoid({h})",
        "1 / (1 + jnp.exp(-{h}))",
        "jnp.where({h} > 0, 1 / (1 + jnp.exp(-{h})), 1 - 1 / (1 + jnp.exp({h})))",
    ),
}
"""The library's function, a formula, and one with `where`, by activation."""

NORMS = {
    "moments": "{c} * lax.rsqrt(jnp.mean({c} * {c}, -1, keepdims=True) + 1e-12)",
    "einsum": (
        '{c} * lax.rsqrt(jnp.einsum("...i,...i->...", {c}, {c})[..., None] / {c}.shape[-1] + 1e-12)'
    ),
    "linalg": (
        "{c} * {c}.shape[-1] ** 0.5"
        " / jnp.maximum(jnp.linalg.norm({c}, axis=-1, keepdims=True), 1e-6)"
    ),
}
"""Normalization of what is centred already, if it is to be. The guards change nothing in float32,
so that all spellings are one function."""

DENSE = """
def dense(h, w):
    return jnp.moveaxis(lax.dot_general(w, h, (((0,), (h.ndim - 1,)), ((), ()))), 0, -1)
"""

CONVOLUTIONS = {
    "matmul": """
def conv(h, w):
    batch = h if h.ndim == 4 else h[None]
    if w.shape[0] == 3:
        batch = jnp.pad(batch, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    z = lax.conv_general_dilated(
        batch, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z.reshape(*h.shape[:-1], w.shape[-1])
""",
    "einsum": """
def conv(h, w):
    batch = jnp.moveaxis(h if h.ndim == 4 else h[None], -1, 1)
    if w.shape[-1] == 3:
        batch = jnp.concatenate([batch[:, :, -1:], batch, batch[:, :, :1]], 2)
        batch = jnp.concatenate([batch[..., -1:], batch, batch[..., :1]], 3)
    z = jnp.moveaxis(lax.conv_general_dilated(batch, w, (1, 1), "VALID"), 1, -1)
    return z if h.ndim == 4 else z[0]
""",
    "dot_general": """
def conv(h, w):
    if w.shape[0] == 1:
        return h @ w.reshape(w.shape[2:])
    batch = h if h.ndim == 4 else h[None]
    batch = jnp.pad(batch, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    z = lax.conv_general_dilated(
        batch, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z if h.ndim == 4 else z[0]
""",
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the params of the plain spelling.

    Attributes:
      shape: sizes of the axes; of a leaf of a stack without its first.
      stacked: length of its stack, or 0.
      kernel: whether its last two axes are inputs and outputs.
    """

    shape: tuple[Size, ...]
    stacked: int = 0
    kernel: bool = True


def leaves(program: Program) -> dict[str, Leaf]:
    """Returns the leaves of a program in the plain spelling, by name."""
    found: dict[str, Leaf] = {}
    for node, length in program.nodes():
        for layer in node.layers() if isinstance(node, Gate) else (node,):
            if isinstance(layer, Layer):
                spatial = (Size(fixed=layer.kernel),) * 2 if layer.kernel else ()
                found[layer.leaf] = Leaf((*spatial, layer.inputs, layer.outputs), length)
                if layer.bias:
                    found[f"{layer.leaf}_bias"] = Leaf((layer.outputs,), length, False)
        if isinstance(node, Norm) and node.gain:
            found[node.gain] = Leaf((node.size,), length, False)
    return found


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A program in one spelling.

    Attributes:
      program: the program.
      spelling: how it is written.
      source: the text.
      function: `(params, x)` to outputs.
    """

    program: Program
    spelling: Spelling
    source: str
    function: Callable[..., jax.Array]

    def names(self) -> dict[str, str]:
        """By leaf of the plain spelling, the name of the leaf here that holds it."""
        found = {name: name for name in leaves(self.program)}
        if self.spelling.gate != "two matrices":
            for node, _ in self.program.nodes():
                if isinstance(node, Gate):
                    found |= {layer.leaf: node.leaf for layer in node.layers()}
        return found

    def convert(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the params of this spelling that hold those of the plain one."""
        parts: dict[str, list[jax.Array]] = {}
        for name, here in self.names().items():
            parts.setdefault(here, []).append(params[name])
        known = leaves(self.program)
        transposed = self.spelling.dense == "einsum"
        converted = {}
        for name, arrays in parts.items():
            array = jnp.concatenate(arrays, -1)
            leaf = known.get(name) or known[name + "a"]
            if leaf.kernel and transposed:
                last = len(leaf.shape) - 2  # spatial axes go behind
                array = jnp.moveaxis(jnp.swapaxes(array, -1, -2), (-2, -1), (-2 - last, -1 - last))
            converted[name] = array
        return converted

    def shapes(self, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the params at a width."""
        plain = {}
        for name, leaf in leaves(self.program).items():
            stacked = (leaf.stacked,) if leaf.stacked else ()
            shape = (*stacked, *(size.at(width) for size in leaf.shape))
            plain[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(self.convert, plain)


def spelled(program: Program, spelling: Spelling, *, variables: bool = False) -> Spelled:
    """Writes a program and compiles the text to a function.

    Args:
      program: the program.
      spelling: how to write it.
      variables: whether the function returns its variables by name instead of the outputs.
    """
    source = _Writer(program, spelling).text(variables)
    name = f"<program {program.seed}, {spelling}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax}
    exec(compile(source, name, "exec"), namespace)
    return Spelled(program, spelling, source, namespace["apply"])


class _Writer:
    """Writes expressions; what needs several lines is assigned to names before."""

    def __init__(self, program: Program, spelling: Spelling):
        self.program, self.spelling = program, spelling
        self.lines: list[str] = []
        self.helpers: dict[str, str] = {}
        self.fresh = (f"t{number}" for number in itertools.count())
        self.slices: dict[str, str] = {}
        """The expression of the slice, for leaves of the stack that is written."""

    def text(self, variables: bool = False) -> str:
        for name, node in self.program.statements:
            self.block(name, node)
        result = self.program.result
        assert isinstance(result, Layer)
        pooled = f"{self.atom(result.source)}.mean((-3, -2))" if self.program.image else None
        outputs = self.layer(result, pooled)
        if variables:
            names = [name for name, _ in self.program.statements]
            outputs = f"dict({', '.join(f'{name}={name}' for name in names)})"
        self.lines.append(f"return {outputs}")
        mapped = self.spelling.wrap == "vmap"
        parts = [*(text.strip() + "\n\n" for text in self.helpers.values())]
        parts.append(f"def {'one' if mapped else 'apply'}(p, x):")
        parts.append(textwrap.indent("\n".join(self.lines), "    ") + "\n")
        if mapped:
            parts.append("\napply = jax.vmap(one, (None, 0))\n")
        return "\n".join(parts)

    def block(self, name: str, node: Node) -> None:
        if self.spelling.wrap not in ("jit", "checkpoint"):
            self.lines.append(f"{name} = {self.write(node)}")
            return
        outer, self.lines = self.lines, []
        self.lines.append(f"return {self.write(node)}")
        body = textwrap.indent("\n".join(self.lines), "    ")
        arguments = ", ".join(["p", *_variables(node)])
        self.lines = outer
        self.lines += [f"@jax.{self.spelling.wrap}", f"def block_{name}({arguments}):", body]
        self.lines.append(f"{name} = block_{name}({arguments})")

    def write(self, node: Node) -> str:
        """Returns an expression, after lines that it needs."""
        ways: dict[type, Callable[[Any], str]] = {
            Var: lambda node: node.name, Layer: self.layer, Activation: self.activation,
            Norm: self.norm, Scaled: self.scaled, Doubled: self.doubled, Sum: self.sum,
            Joined: self.joined, Product: self.product, Gate: self.gate, Stack: self.stack,
        }  # fmt: skip
        return ways[type(node)](node)

    def atom(self, node: Node) -> str:
        return _atom(self.write(node))

    def named(self, node: Node) -> str:
        """Returns a name of an expression that is used more than once."""
        return self.name(self.write(node))

    def name(self, text: str) -> str:
        if text.isidentifier():
            return text
        name = next(self.fresh)
        self.lines.append(f"{name} = {text}")
        return name

    def weight(self, leaf: str) -> str:
        return self.slices.get(leaf, f'p["{leaf}"]')

    def layer(self, node: Layer, source: str | None = None) -> str:
        source = source or self.write(node.source)
        weight = self.weight(node.leaf)
        if node.kernel:
            self.helpers["conv"] = CONVOLUTIONS[self.spelling.dense]
            text = f"conv({source}, {weight})"
        elif self.spelling.dense == "matmul":
            text = f"{_atom(source)} @ {weight}"
        elif self.spelling.dense == "einsum":
            text = f'jnp.einsum("...i,oi->...o", {source}, {weight})'
        else:
            self.helpers["dense"] = DENSE
            text = f"dense({source}, {weight})"
        return f"{text} + {self.weight(node.leaf + '_bias')}" if node.bias else text

    def activation(self, node: Activation) -> str:
        return self.activated(node.kind, self.write(node.source))

    def activated(self, kind: str, source: str) -> str:
        if kind == "identity":
            return source
        ways = FORMULAS[kind]
        if self.spelling.activation == "custom_jvp":
            formula = ways[1].format(h="h")
            self.helpers[kind] = (
                f"@jax.custom_jvp\ndef {kind}(h):\n    return {formula}\n\n"
                f"{kind}.defjvp(lambda h, t: jax.jvp(lambda h: {formula}, h, t))"
            )
            return f"{kind}({source})"
        formula = ways[OPTIONS["activation"].index(self.spelling.activation)]
        return formula.format(h=self.name(source) if formula.count("{h}") > 1 else source)

    def norm(self, node: Norm) -> str:
        h = self.named(node.source)
        if self.spelling.norm == "standardize":
            moments = ""
            if node.kind == "rms":
                moments = f"mean=jnp.zeros(()), variance=jnp.mean({h} * {h}, -1, keepdims=True), "
            text = f"jax.nn.standardize({h}, axis=-1, {moments}epsilon=1e-12)"
        elif self.spelling.norm == "moments" and node.kind == "layer":
            mean, variance = (f"{h}.{name}(-1, keepdims=True)" for name in ("mean", "var"))
            text = f"({h} - {mean}) * lax.rsqrt({variance} + 1e-12)"
        else:
            if node.kind == "layer":
                h = self.name(f"{h} - {h}.mean(-1, keepdims=True)")
            text = NORMS[self.spelling.norm].format(c=h)
        return f"{text} * {self.weight(node.gain)}" if node.gain else text

    def scaled(self, node: Scaled) -> str:
        source = self.atom(node.source)
        if self.spelling.constant == "front":
            return f"{node.constant} * {source}"
        if self.spelling.constant == "behind":
            return f"{source} * {node.constant}"
        return f"{source} / {1 / node.constant!r}"

    def doubled(self, node: Doubled) -> str:
        source = self.named(node.source)
        return f"{source} + {source}" if self.spelling.double == "added" else f"2 * {source}"

    def sum(self, node: Sum) -> str:
        terms = node.terms if self.spelling.order == "forward" else node.terms[::-1]
        return " + ".join(self.write(term) for term in terms)

    def joined(self, node: Joined) -> str:
        parts = [self.named(part) for part in node.parts]
        if self.spelling.join == "concatenate":
            return f"jnp.concatenate([{', '.join(parts)}], -1)"
        first, second = parts
        size, start = next(self.fresh), next(self.fresh)
        self.lines += [
            f"{size} = {first}.shape[-1]",
            f"{start} = jnp.zeros((*{first}.shape[:-1], {size} + {second}.shape[-1]))",
        ]
        return f"{start}.at[..., :{size}].set({first}).at[..., {size}:].set({second})"

    def product(self, node: Product) -> str:
        return f"{self.atom(node.left)} * {self.atom(node.right)}"

    def gate(self, node: Gate) -> str:
        if self.spelling.gate == "two matrices":
            source = Var(self.named(node.source))
            a, b = (self.layer(dataclasses.replace(one, source=source)) for one in node.layers())
            return f"{_atom(self.activated(node.kind, _atom(a)))} * {_atom(b)}"
        one = Layer(node.leaf, node.source, node.inputs, node.outputs, kernel=node.kernel)
        both = self.layer(one)
        if self.spelling.gate == "split":
            a, b = next(self.fresh), next(self.fresh)
            self.lines.append(f"{a}, {b} = jnp.split({both}, 2, -1)")
        else:
            both, size = self.name(both), next(self.fresh)
            self.lines.append(f"{size} = {both}.shape[-1] // 2")
            a, b = self.name(f"{both}[..., :{size}]"), f"{both}[..., {size}:]"
        return f"{_atom(self.activated(node.kind, a))} * {b}"

    def stack(self, node: Stack) -> str:
        stacked = list(leaves_of(node.body))
        start = self.write(node.source)
        outer, self.lines = self.lines, []
        if self.spelling.loop == "scan":
            names = [f"{leaf}_slice" for leaf in stacked]
            self.slices = dict(zip(stacked, names, strict=True))
        else:
            self.slices = {leaf: f'p["{leaf}"][i]' for leaf in stacked}
        body = self.write(node.body)
        lines, self.lines, self.slices = self.lines, outer, {}
        result = next(self.fresh)
        self.lines += self.loop(result, start, lines, body, stacked, node.length)
        return result

    def loop(
        self, result: str, start: str, lines: list[str], body: str, stacked: list[str], length: int
    ) -> list[str]:
        def inside(*last: str) -> str:
            return textwrap.indent("\n".join([*lines, *last]), "    ")

        if self.spelling.loop == "python":
            head = [f"h = {start}", f"for i in range({length}):"]
            return [*head, inside(f"h = {body}"), f"{result} = h"]
        step = f"step_{result}"
        if self.spelling.loop == "fori_loop":
            call = f"{result} = lax.fori_loop(0, {length}, {step}, {start})"
            return [f"def {step}(i, h):", inside(f"return {body}"), call]
        slices = ", ".join(f"{leaf}_slice" for leaf in stacked)
        whole = ", ".join(f'p["{leaf}"]' for leaf in stacked)
        return [
            f"def {step}(h, slices):",
            f"    ({slices},) = slices",
            inside(f"return {body}, None"),
            f"{result}, _ = lax.scan({step}, {start}, ({whole},))",
        ]


def leaves_of(node: Node) -> Iterator[str]:
    """Names of the leaves in an expression."""
    yield from leaves(Program(0, (), node, False, frozenset()))


def _variables(node: Node) -> list[str]:
    """Variables that an expression reads from outside."""
    found = {one.name for one, _ in Program(0, (), node, False, frozenset()).nodes()
             if isinstance(one, Var)}  # fmt: skip
    return sorted(found - {"h"})


def _atom(text: str) -> str:
    """Puts an expression in parentheses where it has operators outside of any."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if depth == 0 and (character == " " or (character == "-" and place == 0)):
            return f"({text})"
    return text
