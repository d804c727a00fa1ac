"""What an optax chain does, leaf by leaf, asked by gradients that are chosen for the purpose.

A chain is opaque, so that it is fed. A probe of a leaf that holds matrices is, matrix by matrix,

    g = c·(D₁ + κ·D₂),   D₁ = a₁b₁ᵀ, D₂ = a₂b₂ᵀ orthonormal, c differing between matrices,

and the update u tells the optimizer: SGD gives u ∝ g; Adam entries of one size; an orthogonalized
update has D₁ and D₂ in equal parts, and nothing else, if its axes are those of the probe. Probes of
three sizes tell how u grows with g, and epsilon: of 10³, above any epsilon, of 10⁻⁶, below most
clipping, and of 10⁻¹², below any epsilon. They are given from the state that the chain itself
initializes, at params that are 0, so that nothing decays; a gradient of 0 at params of size 1 then
shows the decay alone. Clipping unit by unit turns the direction of a gradient, and of an
orthogonalized update with it: such updates are asked for once more, by matrices of norm 10⁻⁵.
"""

import functools
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.rules._matrix import Matrix

LARGE, SMALL, TINY = 1e3, 1e-6, 1e-12
FINE = 1e-5
"""Norm of a matrix. Adaptive clipping by 0.01 allows each of its units as much at params that are
0, and the epsilon that Newton-Schulz adds, 10⁻⁸, is the same small part of every matrix."""
KAPPA = 0.25
PLACED = 8.0
"""Size of params at which updates relative to them show; of size 1 they may look as Adam's."""
LIMIT = 256
"""Calls of `update` after which a chain that has not moved anything is given up."""


class Chain(NamedTuple):
    """The functions of an optimizer, compiled.

    Attributes:
      init: `params` to a state.
      update: `(gradients, state, params)` to updates and the next state, in the buffers of
        gradients and state, which are given away.
    """

    init: Callable[[PyTree], Any]
    update: Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]

    def follow(self, gradients: Iterable[Callable[[], PyTree]], params: PyTree) -> PyTree:
        """Returns the last update of calls with gradients that are made here, from a new state."""
        state, updates = self.init(params), None
        for made in gradients:
            updates = None  # its memory is the next one's
            updates, state = jax.block_until_ready(self.update(made(), state, params))
        return updates


class Response(NamedTuple):
    """What a leaf's update looks like, numbers.

    Attributes:
      size: root mean square.
      even: mean of the absolute entries.
      spread: their standard deviation over it.
      along: <u, g>/<g, g>, g of size 1.
      rest: what u has beside its part along g, over its size.
      first: part of D₁ in u, the mean over matrices.
      lowest: over matrices, the smallest ratio of the parts of D₂ and D₁.
      highest: the largest.
      explained: the smallest part of a matrix's u² that lies in D₁ and D₂.
      uneven: over matrices, the largest part of D₁ over the smallest, in size.
      shrinkage: s where the update is -s·W, of params W of size 1.
      beside: what it has beside that, over its size.
    """

    size: float
    even: float
    spread: float
    along: float
    rest: float
    first: float
    lowest: float
    highest: float
    explained: float
    uneven: float
    shrinkage: float
    beside: float


Responses = Mapping[str, Response]


class Answers(NamedTuple):
    """What a chain does.

    Attributes:
      first: calls of `update` until something moves; 0 where nothing does within `LIMIT`.
      period: calls between that update and the next.
      frozen: names of leaves that do not move when others do.
      counters: the largest counter of a schedule in the state after the first update, and the
        smallest of anything.
      large: responses to gradients of size 10³.
      small: to gradients of size 10⁻⁶.
      tiny: to gradients of size 10⁻¹².
      fine: to matrices of norm 10⁻⁵, where updates of a leaf may be orthogonalized.
      still: to gradients of 0 at params of size 1.
      between: names of leaves that decay in calls that move nothing.
      placed: to gradients of size 10³ at params of size `PLACED`, without what decays.
      half: to gradients of size 10³ in the smaller half of the leaves alone, of these.
      alone: where several calls make an update, responses to a large gradient in the first of
        them alone.
    """

    first: int
    period: int
    frozen: frozenset[str] = frozenset()
    counters: tuple[int, int] = (0, 0)
    large: Mapping[str, Response] = {}
    small: Mapping[str, Response] = {}
    tiny: Mapping[str, Response] = {}
    fine: Mapping[str, Response] = {}
    still: Mapping[str, Response] = {}
    between: frozenset[str] = frozenset()
    placed: Mapping[str, float] = {}
    half: Mapping[str, Response] = {}
    alone: Mapping[str, Response] = {}


def compiled(optimizer: Any, gradients: PyTree, params: PyTree, loss: Any = 1.0) -> Chain:
    """Returns an optimizer as compiled functions.

    Args:
      optimizer: an optax transformation, or what holds one as `tx`.
      gradients: a tree like params, arrays or shapes.
      params: a tree of arrays or shapes.
      loss: of transformations that take `value`.

    Raises:
      TypeError: something else.
    """
    optimizer = getattr(optimizer, "tx", optimizer)
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be an optax transformation, as optax.adamw(1e-3), found {optimizer!r}"
        )

    def update(gradients: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        return optimizer.update(gradients, state, params)

    def valued(gradients: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        return optimizer.update(gradients, state, params, value=jnp.asarray(loss, jnp.float32))

    # Copies, since states that hold params, as averages of them do, would give these away.
    init = jax.jit(lambda params: jax.tree.map(jnp.copy, optimizer.init(params)))
    state = jax.eval_shape(optimizer.init, params)
    try:
        updates, _ = jax.eval_shape(update, gradients, state, params)
    except TypeError as error:
        if "value" not in str(error):
            raise
        update = valued
        updates, _ = jax.eval_shape(update, gradients, state, params)
    same = jax.tree.map(_placed_alike, gradients, updates)
    given = (0, 1) if all(jax.tree.leaves(same)) else (1,)
    return Chain(init, jax.jit(update, donate_argnums=given))


def _placed_alike(one: Any, other: Any) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def matrix_probe(shape: tuple[int, ...], matrix: Matrix | None) -> Matrix:
    """Returns the axes of a probe: those of the leaf's matrices, else all axes to the last."""
    if matrix is not None:
        return matrix
    return Matrix(tuple(range(len(shape) - 1)), (len(shape) - 1,) if shape else ())


def ask(chain: Chain, probes: "Probes") -> Answers:
    """Asks a chain."""
    zeros, large = probes.zeros(), functools.partial(probes.gradients, LARGE)
    first, updates, state = _until_moved(chain, large, zeros)
    if not first:
        return Answers(0, 0)
    counters = _counters(state)
    answers = probes.measured(updates)
    del updates
    period, updates, state = _until_moved(chain, large, zeros, state)
    again = probes.measured(updates)
    del updates, state
    frozen = frozenset(
        name for name, one in answers.items() if one.size == 0 and again[name].size == 0
    )
    small, tiny = (probes.asked(chain, [size] * first, zeros) for size in (SMALL, TINY))
    fine: Responses = {}
    if any(_may_be_orthogonal(one, small[name]) for name, one in answers.items()):
        fine = probes.measured(chain.follow([probes.fine] * first, zeros))
    alone: Responses = {}
    if period > 1:
        sizes = [*[LARGE] * (first - period + 1), *[0.0] * (period - 1)]
        alone = probes.asked(chain, sizes, zeros)
    half = probes.measured(
        chain.follow([lambda: probes.gradients(LARGE, probes.smaller)] * first, zeros)
    )
    half = {name: half[name] for name in probes.smaller}
    del zeros
    weights = probes.weights()
    still = between = probes.asked(chain, [0.0], weights)
    if first > 1:
        still = probes.asked(chain, [0.0] * first, weights)
    weights = probes.weights(PLACED)
    moved = probes.asked(chain, [LARGE] * first, weights)
    return Answers(
        first,
        period,
        frozen,
        counters,
        answers,
        small,
        tiny,
        fine,
        still,
        frozenset(name for name, one in between.items() if one.size > 0 and period > 1),
        {name: one.along - PLACED * still[name].along for name, one in moved.items()},
        half,
        alone,
    )


def _may_be_orthogonal(large: Response, small: Response) -> bool:
    """Whether updates do not grow with the gradient, and entries differ."""
    return large.size < 30 * small.size and large.spread > 0.1


def _until_moved(
    chain: Chain, gradients: Callable[[], PyTree], params: PyTree, state: Any = None
) -> tuple[int, PyTree, Any]:
    """Calls `update` with one gradient until something moves; 0 and the last update if nothing."""
    state, updates = chain.init(params) if state is None else state, None
    for call in range(1, LIMIT + 1):
        updates = None
        updates, state = chain.update(gradients(), state, params)
        if bool(_moves(updates)):
            return call, updates, state
    return 0, updates, state


@jax.jit
def _moves(updates: PyTree) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates)]))


def _counters(state: Any) -> tuple[int, int]:
    """The largest counter of a schedule in a state, and the smallest counter of anything."""
    schedules, others = [0], []
    for path, value in optax.tree.get_all_with_path(state, "count"):
        if getattr(value, "shape", None) == ():
            others.append(int(value))
            if getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState":
                schedules.append(int(value))
    return max(schedules), min(others, default=0)


class Vectors(NamedTuple):
    """What the probe and the weights of a leaf are products of; axes of size 1 broadcast.

    Attributes:
      a: a₁ and a₂, along the inputs; a₂ is None where a matrix has but one input or output.
      b: b₁ and b₂, along the outputs.
      c: along what tells matrices apart, times the root of a matrix's size.
      weights: along inputs, outputs and matrices.
    """

    a: tuple[np.ndarray, np.ndarray | None]
    b: tuple[np.ndarray, np.ndarray | None]
    c: np.ndarray
    weights: tuple[np.ndarray, ...]

    @classmethod
    def drawn(cls, name: str, shape: tuple[int, ...], matrix: Matrix) -> "Vectors":
        """Draws them, by the leaf's name alone."""
        random = np.random.default_rng(zlib.crc32(name.encode()))
        axes = matrix.inputs, matrix.outputs, _others(shape, matrix)

        def entries(part: tuple[int, ...]) -> np.ndarray:
            """Entries of either sign that differ along every axis, so that no two parts agree."""
            kept = [size if axis in part else 1 for axis, size in enumerate(shape)]
            values = random.choice([-1.0, 1.0], kept)
            for axis in part:
                ramp = random.permutation(np.linspace(0.5, 1.5, shape[axis] or 1))
                values = values * np.expand_dims(ramp, _all_but(axis, len(shape)))
            return values.astype(np.float32)

        a, b = (_orthonormal(entries(part), entries(part)) for part in axes[:2])
        inputs, outputs = matrix.sizes(shape)
        if min(inputs, outputs) == 1:
            a, b = (a[0], None), (b[0], None)
        times = abs(entries(axes[2])) * np.float32(np.sqrt(inputs * outputs))
        return cls(a, b, times, tuple(map(entries, axes)))

    def directions(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns D₁ and D₂, or None."""
        first = jnp.multiply(self.a[0], self.b[0])
        if self.a[1] is None or self.b[1] is None:
            return first, None
        return first, jnp.multiply(self.a[1], self.b[1])

    def gradient(self) -> jax.Array:
        """Returns the probe of size 1."""
        first, second = self.directions()
        return jnp.multiply(self.c, first if second is None else first + KAPPA * second)

    def weight(self) -> jax.Array:
        """Returns the params at which decay is shown."""
        one, two, three = self.weights
        return jnp.multiply(jnp.multiply(one, two), three)


def _others(shape: tuple[int, ...], matrix: Matrix) -> tuple[int, ...]:
    own = (*matrix.inputs, *matrix.outputs)
    return tuple(axis for axis in range(len(shape)) if axis not in own)


def _all_but(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(other for other in range(rank) if other != axis)


def _orthonormal(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one = one / np.linalg.norm(one)
    two = two - np.sum(two * one) * one
    return one, two / max(float(np.linalg.norm(two)), 1e-30)


class Probes:
    """Gradients and params of chosen size like a tree of params, and what updates look like.

    Attributes:
      smaller: names of the smaller half of the leaves.
    """

    def __init__(self, params: PyTree, matrices: Mapping[str, Matrix]) -> None:
        self._params = params
        self._vectors = {
            name: Vectors.drawn(name, leaf.shape, matrices[name])
            for name, leaf in named_leaves(params).items()
        }
        self._matrices = matrices
        sizes = {name: leaf.size for name, leaf in named_leaves(params).items()}
        self.smaller = sorted(sizes, key=lambda name: sizes[name])[: len(sizes) // 2]

    def gradients(self, size: float, names: Collection[str] | None = None) -> PyTree:
        """Returns probes of this size, 0 in leaves of other names."""
        return self._made(size, 0.0, names)

    def fine(self) -> PyTree:
        """Returns probes whose matrices have the norm `FINE`."""

        def make(name: str, leaf: jax.Array) -> jax.Array:
            size = FINE / math.sqrt(math.prod(self._matrices[name].sizes(leaf.shape)))
            return _made(leaf, self._vectors[name], size, 0.0)

        return map_with_names(make, self._params)

    def weights(self, size: float = 1.0) -> PyTree:
        """Returns params of this size."""
        return self._made(0.0, size)

    def zeros(self) -> PyTree:
        """Returns a tree of zeros."""
        return self._made(0.0, 0.0)

    def asked(self, chain: Chain, sizes: Iterable[float], params: PyTree) -> Responses:
        """Returns the response of a chain to the last of probes of these sizes."""
        made = [functools.partial(self.gradients, size) for size in sizes]
        return self.measured(chain.follow(made, params))

    def measured(self, updates: PyTree) -> Responses:
        """Returns what updates look like beside a probe of size 1 and the weights."""
        found = {
            name: _response(leaf, self._vectors[name], self._matrices[name])
            for name, leaf in named_leaves(updates).items()
        }
        return {name: Response(*row.tolist()) for name, row in jax.device_get(found).items()}

    def _made(self, gradient: float, weight: float, names: Collection[str] | None = None) -> PyTree:
        def make(name: str, leaf: jax.Array) -> jax.Array:
            own = gradient if names is None or name in names else 0.0
            return _made(leaf, self._vectors[name], own, weight)

        return map_with_names(make, self._params)


# Programs of one leaf, of which there are fewer shapes than leaves. Vectors are arguments: as
# constants they would be part of every program.


@jax.jit
def _made(leaf: jax.Array, vectors: Vectors, gradient: Any, weight: Any) -> jax.Array:
    values = gradient * vectors.gradient() + weight * vectors.weight()
    # The sum lets the compiler place the result as the leaf is.
    return (jnp.zeros_like(leaf) + values.reshape(leaf.shape)).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnames="matrix")
def _response(update: jax.Array, vectors: Vectors, matrix: Matrix) -> jax.Array:
    """The fields of a `Response`."""
    u = update.astype(jnp.float32)
    weight = vectors.weight().reshape(u.shape)
    shrinkage = -jnp.sum(u * weight) / jnp.sum(weight**2)
    beside = jnp.sqrt(jnp.mean((u + shrinkage * weight) ** 2) / jnp.mean(u**2))
    peak = jnp.maximum(jnp.max(jnp.abs(u)), jnp.finfo(jnp.float32).tiny)
    u = u / peak  # squares of the smallest updates would be 0
    axes = tuple(sorted((*matrix.inputs, *matrix.outputs)))
    first, second = vectors.directions()
    gradient = vectors.gradient().reshape(u.shape)
    square = jnp.mean(u**2)
    telling = jnp.abs(gradient) > 0.05 * jnp.sqrt(jnp.mean(gradient**2))
    count = jnp.sum(telling)
    entries = jnp.where(telling, jnp.abs(u), 0)
    even = jnp.sum(entries) / count
    variance = jnp.sum(jnp.where(telling, (entries - even) ** 2, 0)) / count
    along = jnp.sum(u * gradient) / jnp.sum(gradient**2)
    rest = jnp.sqrt(jnp.mean((u - along * gradient) ** 2) / square)
    part = jnp.sum(u * first, axes)
    other = jnp.zeros_like(part) if second is None else jnp.sum(u * second, axes)
    ratio, explained = other / part, (part**2 + other**2) / jnp.sum(u**2, axes)
    return jnp.stack(
        [peak * jnp.sqrt(square), peak * even, jnp.sqrt(variance) / even, peak * along, rest,
         peak * jnp.mean(part), jnp.min(ratio), jnp.max(ratio), jnp.min(explained),
         jnp.max(jnp.abs(part)) / jnp.min(jnp.abs(part)), shrinkage, beside]
    )  # fmt: skip
