"""Models of Flax linen, Flax NNX, Equinox and Haiku, and functions, as pure functions of params.

No framework is imported here: what a model is, is told by the class that it has.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from archscale_jax._trees import PyTree, map_with_names, named_leaves
from archscale_jax.tracing.starts import (
    Start,
    constant_leaves,
    starting_values,
    used_leaves,
)

_ACCEPTED = (
    "a Flax linen or NNX module, an Equinox module, what haiku.transform returns, or a function "
    "apply(params, *inputs) with params="
)


@dataclasses.dataclass(frozen=True)
class PureModel:
    """A model as pure functions.

    Attributes:
      framework: `linen`, `nnx`, `equinox`, `haiku` or `function`.
      apply: `(params, *inputs)` to the outputs; with `key=`, random numbers from that key.
      params: tree of what is trained, arrays or `jax.ShapeDtypeStruct`.
      starts: what the leaves hold before training, by name, where that is known.
      initial: `(key, names)` to the values of some leaves as the framework draws them; None where
        `params` hold what there is.
      notes: what makes the numbers of this model wrong unless it is seen to.
    """

    framework: str
    apply: Callable[..., Any]
    params: PyTree
    starts: Mapping[str, Start]
    initial: Callable[[jax.Array, Collection[str]], dict[str, jax.Array]] | None = None
    notes: tuple[str, ...] = ()


def pure_model(
    model: Any, inputs: tuple[PyTree, ...], params: PyTree | None, keywords: Mapping[str, Any]
) -> PureModel:
    """Returns a model of any framework as a pure function, and what its params are.

    Args:
      model: see `archscale_jax.parametrize`.
      inputs: trees of arrays or shapes; a Python bool, string, None or function is passed as it is.
      params: of a function, its params.
      keywords: keyword arguments of the call, as `train=True`.

    Raises:
      TypeError: another type of model, or params that are missing or not needed.
    """
    if type(model) is tuple and len(model) == 2 and callable(model[0]):
        if params is not None:
            raise TypeError("model is a pair (apply, params); params= would be given twice")
        model, params = model
    framework = framework_of(model)
    if framework is None:
        raise TypeError(f"model must be {_ACCEPTED}; found {type(model).__name__}")
    if framework == "function" and params is None:
        raise TypeError(
            "model is a function: pass its params too, arrays or shapes, as parametrize(apply, "
            "*inputs, params=jax.eval_shape(init, key))"
        )
    if framework != "function" and params is not None:
        raise TypeError(
            f"params= belongs to a function apply(params, *inputs); a {framework} model brings its "
            "own"
        )
    if framework == "function":
        apply: Any = model
        return _function(apply, params, keywords)
    return _MAKERS[framework](model, inputs, keywords)


def framework_of(model: Any) -> str | None:
    """Returns the framework of a model, `function` of another callable, None of anything else."""
    for base in type(model).__mro__:
        place = (base.__module__ or "").split(".")
        if base.__name__ == "Module" and place[:2] == ["flax", "linen"]:
            return "linen"
        if base.__name__ == "Module" and place[:2] == ["flax", "nnx"]:
            return "nnx"
        if base.__name__ == "Module" and place[0] == "equinox":
            return "equinox"
        if base.__name__ in ("Transformed", "TransformedWithState") and place[0] == "haiku":
            return "haiku"
    return "function" if callable(model) and not isinstance(model, type) else None


def dynamic(
    function: Callable[..., Any], inputs: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Binds the inputs that are not arrays; returns a function of the others, and the others."""
    static = [is_static(one) for one in inputs]
    arrays = tuple(one for one, bound in zip(inputs, static, strict=True) if not bound)

    def bound(params: PyTree, *given: PyTree) -> Any:
        rest = iter(given)
        merged = [
            one if is_static else next(rest) for one, is_static in zip(inputs, static, strict=True)
        ]
        return function(params, *merged)

    return (bound, arrays) if any(static) else (function, inputs)


def is_static(value: Any) -> bool:
    """Whether an input of a model is a constant of it: None, a bool, a string or a function."""
    if value is None or isinstance(value, bool | str):
        return True
    return callable(value) and jax.tree_util.all_leaves([value])  # a module is a tree of arrays


# Frameworks.


def _function(apply: Callable[..., Any], params: PyTree, keywords: Mapping[str, Any]) -> PureModel:
    def call(params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        _check_no_key(key, "a function")
        return apply(params, *inputs, **keywords)

    return PureModel("function", call, params, starting_values(named_leaves(params)))


def _linen(model: Any, inputs: tuple[PyTree, ...], keywords: Mapping[str, Any]) -> PureModel:
    def initialized(key: jax.Array, *inputs: PyTree) -> PyTree:
        return dict(model.init(key, *inputs, **keywords))

    return _drawn_by_framework("linen", initialized, _linen_call(model, keywords), inputs)


def _linen_call(model: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    def call(key: jax.Array, params: PyTree, state: PyTree, *inputs: PyTree) -> Any:
        # A key under this name serves every stream of random numbers, of dropout say.
        out = model.apply(
            {**state, **params},
            *inputs,
            **keywords,
            rngs={"params": key},
            mutable=list(state) or False,
        )
        return out[0] if state else out

    return call


def _haiku(model: Any, inputs: tuple[PyTree, ...], keywords: Mapping[str, Any]) -> PureModel:
    stateful = type(model).__name__ == "TransformedWithState"
    takes_key = "rng" in list(inspect.signature(model.apply).parameters)[:3]

    def initialized(key: jax.Array, *inputs: PyTree) -> PyTree:
        found = model.init(key, *inputs, **keywords)
        params, state = found if stateful else (found, {})
        return {"params": params, "state": state}

    def call(key: jax.Array, params: PyTree, state: PyTree, *inputs: PyTree) -> Any:
        arguments = [params, state["state"]] if stateful else [params]
        if takes_key:
            arguments.append(key)
        out = model.apply(*arguments, *inputs, **keywords)
        return out[0] if stateful else out

    return _drawn_by_framework("haiku", initialized, call, inputs)


def _drawn_by_framework(
    framework: str,
    initialized: Callable[..., dict[str, PyTree]],
    call: Callable[..., Any],
    inputs: tuple[PyTree, ...],
) -> PureModel:
    """A model whose params come from a function of a key: linen and Haiku."""
    draw, arrays = dynamic(initialized, inputs)
    key0 = jax.random.key(0)
    try:
        shapes, constants = constant_leaves(draw, key0, *arrays)
    except Exception as error:
        error.add_note(
            f"raised by the {framework} model, which was called with the inputs that parametrize "
            "got; keyword arguments of the call are passed as model_kwargs={'train': True}"
        )
        raise
    inner = framework == "haiku"
    params = shapes["params"] if inner else {"params": shapes.get("params", {})}
    state = {name: part for name, part in shapes.items() if name != "params"}
    prefix = "params/" if inner else ""
    starts = {
        name: constants[prefix + name]
        for name in named_leaves(params)
        if prefix + name in constants
    }

    def filled(state: PyTree) -> PyTree:
        return map_with_names(lambda name, leaf: _filled(leaf, constants.get(name, 0.0)), state)

    def apply(params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        return call(key0 if key is None else key, params, filled(state), *inputs)

    # Compiled once: XLA leaves out what the framework would draw for other leaves.
    @functools.partial(jax.jit, static_argnames="names")
    def some(key: jax.Array, arrays: tuple[PyTree, ...], names: tuple[str, ...]) -> Any:
        found = named_leaves(draw(key, *arrays))
        return {name: found[prefix + name] for name in names}

    def initial(key: jax.Array, names: Collection[str]) -> dict[str, jax.Array]:
        return some(key, jax.tree.map(_filled, arrays), tuple(names))

    def of_state(state: PyTree, params: PyTree, *arrays: PyTree) -> Any:
        function, _ = dynamic(lambda params, *inputs: call(key0, params, state, *inputs), inputs)
        return function(params, *arrays)

    known = {name for name in named_leaves(state) if name in constants}
    notes = _averages_read(of_state, state, known, params, arrays)
    return PureModel(framework, apply, params, starts, initial, notes)


def _averages_read(
    function: Callable[..., Any],
    state: PyTree,
    known: Collection[str],
    params: PyTree,
    arrays: tuple[PyTree, ...],
) -> tuple[str, ...]:
    """Says that outputs depend on a state, as in evaluation mode on running averages.

    Raises:
      ValueError: they depend on values that are not known.
    """
    if not jax.tree.leaves(state):
        return ()
    floats = {
        name
        for name, leaf in named_leaves(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    read = [name for name in used_leaves(function, state, params, *arrays) if name in floats]
    way = "switch the model to training, as by model.train() or model_kwargs={'train': True}"
    if missing := [name for name in read if name not in known]:
        raise ValueError(
            f"the model reads {missing[0]!r}, a running average whose value is not known; {way}"
        )
    if not read:
        return ()
    return (
        f"the outputs depend on running averages ({read[0]} and {len(read) - 1} others), as in "
        f"evaluation; what is drawn is then not what training sees: {way}",
    )


def _nnx(model: Any, inputs: tuple[PyTree, ...], keywords: Mapping[str, Any]) -> PureModel:
    nnx = sys.modules["flax.nnx"]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_state(state: PyTree, params: PyTree, *inputs: PyTree) -> Any:
        return nnx.merge(graph, params, state)(*inputs, **keywords)

    def apply(params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        _check_no_key(key, "an NNX model, whose streams of random numbers are its own")
        return of_state(jax.tree.map(_filled, rest), params, *inputs)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rest)
    known = {
        name
        for name, leaf in named_leaves(rest).items()
        if not isinstance(leaf, jax.ShapeDtypeStruct)
    }
    function, arrays = dynamic(lambda pair, *inputs: of_state(*pair, *inputs), inputs)
    notes = _averages_read(
        lambda state, params, *arrays: function((state, params), *arrays),
        shapes,
        known,
        params,
        arrays,
    )
    starts = starting_values(named_leaves(params))
    return PureModel("nnx", apply, params, starts, notes=notes)


def _equinox(model: Any, inputs: tuple[PyTree, ...], keywords: Mapping[str, Any]) -> PureModel:
    del inputs
    eqx = sys.modules["equinox"]
    params, static = eqx.partition(model, _is_trained)

    def apply(params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> Any:
        rest = jax.tree.map(lambda leaf: _filled(leaf) if hasattr(leaf, "shape") else leaf, static)
        given = keywords if key is None else {**keywords, "key": key}
        out = eqx.combine(params, rest)(*inputs, **given)
        stateful = isinstance(out, tuple) and isinstance(out[-1], eqx.nn.State)
        return out[0] if stateful else out

    return PureModel("equinox", apply, params, starting_values(named_leaves(params)))


_MAKERS: dict[str, Callable[..., PureModel]] = {
    "linen": _linen,
    "nnx": _nnx,
    "equinox": _equinox,
    "haiku": _haiku,
}


def _check_no_key(key: jax.Array | None, what: str) -> None:
    if key is not None:
        raise TypeError(f"key= is for linen, Haiku and Equinox models; this one is {what}")


def _is_trained(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _filled(leaf: Any, value: Any = 0.0) -> Any:
    """An array of one value where there is a shape alone; a random key where that has its type."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.full(leaf.shape, value if isinstance(value, float) else 0, leaf.dtype)
