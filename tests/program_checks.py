"""What must hold of every program of `tests/programs.py`: two properties, and what breaks them.

1. All spellings of a program get the same standard deviations, roles and width multipliers.
2. At a finite width, every vertex has the second moment that its rule of initialization promises.

**Noise of the second.** Of a chain of d layers of width n the mean square of a vertex fluctuates
between draws of the weights by about sqrt(c·d/n) of itself, with c = E[φ⁴]/E[φ²]² - 1 of its
activation: 5 for ReLU, 22 for relu². Seven layers at n = 1,024 have 0.18 and 0.39. A mean over S
draws fluctuates sqrt(S) times less. So 4 draws are taken, and up to 32 while any vertex is open; a
vertex is wrong if its mean is off by more than 15 % and by two standard errors beyond that, as
estimated from the draws themselves.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import archscale_jax as archscale
from tests.programs import Program
from tests.spellings import Spelled, Spelling, spelled, spellings, variations

TOLERANCE = 0.15
EXACT = 1e-6
EXAMPLES = 64
DRAWS = (4, 8, 16, 32)
RULES = ("target_in_degree", "second_moment")
WIDTH_RULES = ("sgd", "adam")


class Difference(NamedTuple):
    """Where a spelling says something else than the plain one.

    Attributes:
      spelling: the spelling.
      leaf: name of the leaf in the plain spelling; empty if the network raised.
      quantity: which number, or `error`.
      plain: what the plain spelling says.
      other: what this one says, or the message.
    """

    spelling: Spelling
    leaf: str
    quantity: str
    plain: Any
    other: Any

    def __str__(self) -> str:
        return f"[{self.spelling}] {self.leaf} {self.quantity}: {self.plain} became {self.other}"


def architecture(spelling: Spelled, width: int) -> archscale.Architecture:
    """Traces a program at a width."""
    x = jax.ShapeDtypeStruct((2, *spelling.program.input_shape), jnp.float32)
    return archscale.trace(spelling.function, spelling.shapes(width), x)


def described(spelling: Spelled, width: int) -> dict[str, dict[str, Any]]:
    """Returns what the library says of every leaf of the plain spelling: quantity -> leaf -> value.

    A quantity that raises has the message instead of leaves.
    """
    traced, base = architecture(spelling, width), architecture(spelling, width // 2)
    names = spelling.names()

    def by_leaf(found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            leaf: found[here] if leaf == here else _half(found[here], leaf)
            for leaf, here in names.items()
            if here in found
        }

    roles = {parameter.name: str(parameter.role) for parameter in traced.parameters}
    told: dict[str, Any] = {"role": by_leaf(roles)}
    for rule in RULES:
        quantity = functools.partial(archscale.weight_standard_deviations, traced, rule)
        told[f"deviation, {rule}"] = _or_message(lambda quantity=quantity: by_leaf(quantity()))
    for rule in WIDTH_RULES:
        quantity = functools.partial(
            archscale.learning_rate_multipliers, traced, base, "none", width_rule=rule
        )
        told[f"multiplier, {rule}"] = _or_message(lambda quantity=quantity: by_leaf(quantity()))
    return told


def _half(value: Any, leaf: str) -> Any:
    """What is said of one layer of a gate, in a leaf that holds both."""
    if np.ndim(value) == 0:
        return value
    return np.split(value, 2, axis=int(np.argmax(np.shape(value))))["ab".index(leaf[-1])]


def _or_message(quantity: Callable[[], Any]) -> Any:
    try:
        return quantity()
    except Exception as error:  # of any kind: a program is a network like any other
        return f"{type(error).__name__}: {error}"


def differences(
    program: Program, width: int = 1024, chosen: list[Spelling] | None = None
) -> list[Difference]:
    """Compares spellings with the plain one: none if the first property holds.

    Args:
      program: the program.
      width: of the program; its base has half of it.
      chosen: the spellings; by default those of the program's seed.
    """

    def told(spelling: Spelling) -> Any:
        return _or_message(lambda: described(spelled(program, spelling), width))

    plain = told(Spelling())
    if isinstance(plain, str):
        return [Difference(Spelling(), "", "error", "", plain)]
    found = [
        Difference(Spelling(), "", f"error, {quantity}", "", value)
        for quantity, value in plain.items()
        if isinstance(value, str)
    ]
    for spelling in chosen or spellings(program.seed)[1:]:
        other = told(spelling)
        if isinstance(other, str):
            found.append(Difference(spelling, "", "error", "", other))
            continue
        for quantity, expected in plain.items():
            found += _compared(spelling, quantity, expected, other[quantity])
    return found


def _compared(spelling: Spelling, quantity: str, expected: Any, told: Any) -> list[Difference]:
    if isinstance(expected, str):
        return []
    if isinstance(told, str):
        return [Difference(spelling, "", f"error, {quantity}", "", told)]
    leaves = dict.fromkeys([*expected, *told])
    return [
        Difference(spelling, leaf, quantity, expected.get(leaf), told.get(leaf))
        for leaf in leaves
        if not _equal(expected.get(leaf), told.get(leaf))
    ]


def _equal(one: Any, other: Any) -> bool:
    """Whether numbers that may differ by slice are all equal to rounding."""
    if one is None or other is None or isinstance(one, str):
        return one == other
    one, other = np.ravel(one), np.ravel(other)
    if len(one) != len(other) and 1 not in (len(one), len(other)):
        return False
    return bool(np.allclose(one, other, rtol=EXACT, atol=0))


def at_fault(program: Program, width: int = 1024) -> dict[str, list[Difference]]:
    """Returns the single choices of spelling that change something, with what they change."""
    plain = spelled(program, Spelling()).source
    found = {}
    for spelling in variations():
        if spelled(program, spelling).source != plain:
            changed = differences(program, width, [spelling])
            if changed:
                found[str(spelling)] = changed
    return found


# The second property.


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of one vertex.

    Attributes:
      vertex: its number.
      promised: what the rule says.
      measured: mean over draws.
      error: standard error of this mean.
      draws: number of draws.
    """

    vertex: int
    promised: float
    measured: float
    error: float
    draws: int

    @property
    def ratio(self) -> float:
        return self.measured / self.promised

    @property
    def holds(self) -> bool:
        """Whether the moment may be within the tolerance, as far as the draws can tell."""
        off = abs(self.ratio - 1) - 2 * self.error / self.promised
        return bool(off <= TOLERANCE)  # false for NaN

    @property
    def is_open(self) -> bool:
        """Whether more draws may change what is said."""
        off, error = abs(self.ratio - 1), self.error / self.promised
        right = off + 2 * error <= TOLERANCE
        wrong = self.draws >= 8 and not off - 4 * error <= TOLERANCE
        return not right and not wrong


Promise = Callable[[archscale.Architecture, str], Mapping[int, float]]


def library_promise() -> Promise | None:
    """Returns `archscale.second_moments`, or None where the library does not offer it."""
    return getattr(archscale, "second_moments", None)


def second_moments(
    written: Spelled,
    rule: str,
    promise: Promise,
    *,
    width: int = 1024,
    examples: int = EXAMPLES,
    draws: tuple[int, ...] = DRAWS,
) -> list[Moments]:
    """Measures the vertices of a program with standard-normal inputs.

    Args:
      written: the program.
      rule: name of the initialization rule.
      promise: what a rule promises.
      width: of the program; convolutions take a quarter, as 9 positions of theirs add up.
      examples: examples of a batch; images have 16 positions each and take a quarter.
      draws: numbers of draws after which to see whether more are needed.

    Raises:
      KeyError: a vertex without a promise.
    """
    image = written.program.image
    width, examples = (width // 4, examples // 4) if image else (width, examples)
    traced, shapes = architecture(written, width), written.shapes(width)
    promised = promise(traced, rule)
    drawn = networks(traced, shapes, rule)
    shape = (examples, *written.program.input_shape)

    measured: list[dict[int, float]] = []
    found: list[Moments] = []
    for wanted in draws:
        while len(measured) < wanted:
            x = np.random.default_rng(len(measured)).standard_normal(shape, np.float32)
            measured.append(jax.device_get(_mean_squares(written)(next(drawn), x)))
        found = [_moments(vertex, promised[vertex], measured) for vertex in measured[0]]
        if not any(one.is_open for one in found):
            break
    return found


@functools.lru_cache(maxsize=1)
def _mean_squares(written: Spelled) -> Callable[..., dict[int, jax.Array]]:
    """Returns the compiled function `(params, x)` to the mean square of every vertex.

    The rules of one program share it. It runs a few times only, hence is compiled with few
    optimizations, and makes no random numbers, which would take most of the compilation.
    """

    def mean_squares(params: Any, x: jax.Array) -> dict[int, jax.Array]:
        features = archscale.vertex_features(written.function, params, x)
        return {vertex: jnp.mean(jnp.square(one)) for vertex, one in features.items()}

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(mean_squares, compiler_options=quick)


def networks(
    traced: archscale.Architecture, shapes: dict[str, Any], rule: str
) -> Iterator[dict[str, Any]]:
    """Draws networks by a rule: the first by `initialize`, further ones from what it promises.

    NumPy draws normal numbers several times faster than JAX does on CPUs.
    """
    key = jax.random.key(0, impl="rbg")  # quicker on CPUs than the default
    first = archscale.initialize(key, shapes, traced, rule)
    yield first
    deviations = archscale.weight_standard_deviations(traced, rule)
    for seed in itertools.count(1):
        normal = np.random.Generator(np.random.SFC64(seed)).standard_normal
        yield first | {
            name: normal(shapes[name].shape, np.float32) * np.asarray(deviation, np.float32)
            for name, deviation in deviations.items()
        }


def variable_moments(
    program: Program, rule: str, *, width: int, draws: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures the variables of a program, no matter which vertices they are.

    Returns:
      Mean second moments by variable, and the standard deviations of the weights.
    """
    written = spelled(program, Spelling())
    traced, shapes = architecture(written, width), written.shapes(width)
    function = spelled(program, Spelling(), variables=True).function

    @jax.jit
    def mean_squares(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(lambda one: jnp.mean(jnp.square(one)), function(params, x))

    shape = (EXAMPLES // 4, *program.input_shape)
    found = [
        jax.device_get(
            mean_squares(params, np.random.default_rng(seed).standard_normal(shape, np.float32))
        )
        for seed, params in enumerate(itertools.islice(networks(traced, shapes, rule), draws))
    ]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return means, archscale.weight_standard_deviations(traced, rule)


def _moments(vertex: int, promised: float, measured: list[dict[int, float]]) -> Moments:
    values = np.array([one[vertex] for one in measured], float)
    with np.errstate(invalid="ignore"):  # of infinite values
        error = float(values.std(ddof=1) / len(values) ** 0.5)
    return Moments(vertex, float(promised), float(values.mean()), error, len(values))
