"""Models of four frameworks as (function, shapes, inputs), and what is measured of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import archscale_jax as archscale
from archscale_jax._architecture import Architecture, Parameter
from archscale_jax._trees import named_leaves, with_leaves

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A function of params and inputs, the shapes of its params, and inputs."""

    apply: Callable[..., Any]
    shapes: Any
    inputs: tuple[Any, ...]

    def trace(self) -> Architecture:
        return self._traced

    @functools.cached_property
    def _traced(self) -> Architecture:
        return archscale.trace(self.apply, self.shapes, *self.inputs)


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def specs(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: spec(*size) for name, size in sizes.items()}


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """Standard-normal inputs whose second moment is exactly 1 in every example."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), jnp.float32)


def linen_model(module: Any, *inputs: Any) -> Model:
    """A linen module; names of leaves are without `params/`."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)["params"]
    return Model(lambda params, *x: module.apply({"params": params}, *x), shapes, inputs)


def equinox_model(make: Callable[[jax.Array], Any], *inputs: Any) -> Model:
    """An Equinox module of one example, mapped over the first axis of the inputs."""
    module = eqx.filter_eval_shape(make, KEY)
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Model(lambda params, *x: jax.vmap(eqx.combine(params, static))(*x), shapes, inputs)


def haiku_model(function: Callable[..., Any], *inputs: Any) -> Model:
    network = hk.without_apply_rng(hk.transform(function))
    return Model(network.apply, jax.eval_shape(network.init, KEY, *inputs), inputs)


def value(mapping: Mapping[str, Any], ending: str) -> Any:
    """The value of the one name that ends so, at a boundary of the path."""
    found = [name for name in mapping if name == ending or name.endswith("/" + ending)]
    assert len(found) == 1, f"{ending!r} is the end of {found} of {list(mapping)}"
    return mapping[found[0]]


def parameter(architecture: Architecture, ending: str) -> Parameter:
    return value({one.name: one for one in architecture.parameters}, ending)


def roles(architecture: Architecture) -> dict[str, str]:
    return {one.name: str(one.role) for one in architecture.parameters}


def deviation(model: Model, ending: str, rule: str | None = None) -> np.ndarray:
    """The standard deviation of a leaf, a scalar or one per slice."""
    return np.asarray(value(archscale.weight_standard_deviations(model.trace(), rule), ending))


def multipliers(model: Model, base: Model, **options: Any) -> dict[str, Any]:
    """Learning-rate multipliers against a base, without a rule of paths."""
    return archscale.learning_rate_multipliers(model.trace(), base.trace(), "none", **options)


def array_of(multiplier: Any, shape: Sequence[int]) -> np.ndarray:
    """A multiplier or deviation, broadcast over a leaf."""
    return np.broadcast_to(np.asarray(multiplier), tuple(shape))


def networks(
    model: Model, architecture: Architecture, rule: str | None, number: int
) -> Iterator[Any]:
    """Draws params by a rule: the first by `initialize`, further ones from what it promises.

    NumPy draws normal numbers several times faster than JAX does on CPUs. Drawn inside of jit,
    every leaf would be compiled anew in every test, which takes longer than all else.
    """
    first = archscale.initialize(jax.random.key(0), model.shapes, architecture, rule)
    yield first
    deviations = archscale.weight_standard_deviations(architecture, rule)
    for seed in range(1, number):
        normal = np.random.Generator(np.random.SFC64(seed)).standard_normal
        leaves = {
            name: normal(leaf.shape, np.float32) * np.asarray(deviations[name], np.float32)
            for name, leaf in named_leaves(model.shapes).items()
            if name in deviations
        }
        yield with_leaves(first, leaves)


def moments(
    model: Model,
    rule: str | None,
    taps: Callable[..., Sequence[jax.Array]] | None = None,
    seeds: int = 4,
) -> np.ndarray:
    """Second moments at initialization, averaged over seeds.

    Args:
      model: what is initialized.
      rule: the initialization rule.
      taps: `(params, *inputs)` to features; None takes the vertices, in their order.
      seeds: number of draws.
    """
    architecture = model.trace()

    def vertices(params: Any, *inputs: Any) -> list[jax.Array]:
        found = archscale.vertex_features(model.apply, params, *inputs)
        return [found[vertex] for vertex in sorted(found)]

    @jax.jit
    def run(params: Any) -> jax.Array:
        found = (taps or vertices)(params, *model.inputs)
        return jnp.stack([jnp.mean(jnp.abs(one) ** 2) for one in found])

    return np.mean([run(params) for params in networks(model, architecture, rule, seeds)], axis=0)


def promised_and_measured(
    apply: Callable[..., Any], params: Any, inputs: Sequence[Any], rule: str
) -> tuple[Any, dict[int, tuple[float, float]]]:
    """Params of one draw, and the second moments of every vertex: as promised, as measured."""
    architecture = archscale.trace(apply, params, *inputs)
    promised = archscale.second_moments(architecture, rule)
    new = archscale.initialize(jax.random.key(3), params, architecture, rule)
    measured = _mean_squares(apply, new, *inputs)
    assert measured
    return new, {vertex: (promised[vertex], float(one)) for vertex, one in measured.items()}


@functools.partial(jax.jit, static_argnums=0)  # once for all rules of a function
def _mean_squares(apply: Callable[..., Any], params: Any, *inputs: Any) -> dict[int, jax.Array]:
    features = archscale.vertex_features(apply, params, *inputs)
    return {vertex: jnp.mean(jnp.square(one)) for vertex, one in features.items()}


def check_promised(
    apply: Callable[..., Any], params: Any, inputs: Sequence[Any], rule: str, rtol: float = 0.15
) -> Any:
    """Checks that every vertex has the second moment that is promised; returns the params drawn."""
    new, moments = promised_and_measured(apply, params, inputs, rule)
    for vertex, (promised, measured) in moments.items():
        np.testing.assert_allclose(promised, measured, rtol=rtol, err_msg=str(vertex))
    return new


def same_moments(found: np.ndarray, tolerance: float = 0.15) -> None:
    """Checks that all second moments are those of the first."""
    np.testing.assert_allclose(found / found[0], 1, atol=tolerance)


OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "adam": optax.adam(1.0, eps=1e-30),
    "muon": optax.contrib.muon(1.0, ns_steps=12, eps=1e-30),
}


def step_growth(
    make: Callable[[int], Model],
    widths: tuple[int, int],
    ending: str,
    rule: str,
    observe: Callable[[int], Callable[..., jax.Array]] | None = None,
    seeds: int = 3,
) -> float:
    """How much further one step of a leaf alone moves the result of the wide network.

    To first order in the rate. μP wants 1: the change of the result does not depend on the width.

    Args:
      make: the model of a width, whose inputs are arrays.
      widths: of the base and of the wide network.
      ending: the leaf.
      rule: of the width and of the optimizer.
      observe: what is looked at, of a width; None is the result.
      seeds: geometric mean over so many initializations.
    """
    base = make(widths[0]).trace()

    def size(width: int) -> float:
        model = make(width)
        architecture = model.trace()
        multipliers = archscale.learning_rate_multipliers(
            architecture, base, "none", width_rule=rule
        )
        seen = model.apply if observe is None else observe(width)
        optimizer = OPTIMIZERS[rule]

        @jax.jit
        def change(params: Any) -> jax.Array:
            out = model.apply(params, *model.inputs)
            target = np.random.default_rng(7).standard_normal(out.shape, np.float32)
            slope = jax.grad(lambda p: jnp.mean(model.apply(p, *model.inputs) * target))(params)
            update, _ = optimizer.update(slope, optimizer.init(params), params)
            step = jax.tree_util.tree_map_with_path(
                functools.partial(_alone, ending=ending, multipliers=multipliers), update
            )
            z, dz = jax.jvp(lambda p: seen(p, *model.inputs), (params,), (step,))
            size = jnp.sqrt(jnp.mean(dz**2))
            return size if observe is None else size / jnp.sqrt(jnp.mean(z**2))

        found = [float(change(params)) for params in networks(model, architecture, None, seeds)]
        return float(np.exp(np.mean(np.log(found))))

    return size(widths[1]) / size(widths[0])


def _alone(path: Any, update: jax.Array, *, ending: str, multipliers: Mapping) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name != ending and not name.endswith("/" + ending):
        return jnp.zeros_like(update)
    return update * jnp.asarray(multipliers[name], update.dtype)
