"""What every layer of a function reads, and which way the loss wants its output to go."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from archscale_jax._trees import PyTree, named_leaves
from archscale_jax.tracing.interpreter import Layer
from archscale_jax.tracing.trace import Reading, read
from archscale_jax.tracing.values import TraceError

Loss = Callable[[PyTree, Any], Float[Array, ""]]


class Window(NamedTuple):
    """How a convolution moves; hashable.

    Attributes:
      size: rows and columns of the kernel.
      strides: between outputs.
      padding: zeros (before, after) rows and columns.
      dilation: between the inputs of one output.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@jax.tree_util.register_static
class LayerKind(NamedTuple):
    """What is known of a layer without its arrays; hashable, and static in trees that are jitted.

    Attributes:
      weight: name of the leaf, [inputs, outputs] or [rows, columns, inputs, outputs].
      bias: name of the leaf that is added to its output, or None.
      window: of a convolution, None of a dense layer.
    """

    weight: str
    bias: str | None
    window: Window | None


class LayerGradient(NamedTuple):
    """Arrays of a layer on a batch of n examples.

    Attributes:
      kind: what layer it is.
      inputs: [n, …, inputs].
      outputs: the gradient of the loss by the layer's output, [n, …, outputs].
    """

    kind: LayerKind
    inputs: Array
    outputs: Array


class Layers(NamedTuple):
    """The layers of a function in the order in which it calls them.

    Attributes:
      kinds: of those that are `x @ W`, or convolutions of images [n, rows, columns, inputs] in one
        group, with a weight that no other layer has and nothing but its dtype is changed of.
      others: why the others are none of these, by the names of weights.
      outputs: shapes of the outputs of all of them, by the names of weights.
      uses: what the leaves do, by name: the kinds of `Use`.
    """

    kinds: tuple[LayerKind, ...]
    others: dict[str, str]
    outputs: dict[str, jax.ShapeDtypeStruct]
    uses: dict[str, set[str]]


def find_layers(loss_fn: Loss, params: PyTree, batch: Any) -> Layers:
    """Returns the layers of a function; reads shapes alone.

    Raises:
      TraceError: what `trace` raises.
    """
    found: list[Layers] = []

    def read_layers(params: PyTree, batch: Any) -> None:
        reading = read(loss_fn, params, (batch,), (), evaluate=True)
        found.append(_layers_of(reading, named_leaves(params)))

    jax.eval_shape(read_layers, params, batch)
    return found[-1]


def layer_kinds(
    loss_fn: Loss, params: PyTree, batch: Any, names: Collection[str] | None = None
) -> tuple[LayerKind, ...]:
    """Returns the layers of a function in the order in which it calls them; reads shapes alone.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: tree of arrays.
      batch: tree of arrays.
      names: of the weights of layers that are asked for; None for all.

    Raises:
      TraceError: what `trace` raises; one of these is none of `Layers.kinds`.
    """
    return _kinds(find_layers(loss_fn, params, batch), names)


def _kinds(layers: Layers, names: Collection[str] | None) -> tuple[LayerKind, ...]:
    for name, reason in layers.others.items():
        if names is None or name in names:
            raise TraceError(reason)
    return layers.kinds


def layer_gradients(
    loss_fn: Loss, params: PyTree, batch: Any, names: Collection[str] | None = None
) -> tuple[Float[Array, ""], dict[str, LayerGradient]]:
    """Returns the loss, and inputs and output gradients of its layers by the names of weights.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: tree of arrays.
      batch: tree of arrays.
      names: of the weights of layers that are asked for; None for all.

    Raises:
      TraceError: see `layer_kinds`.
    """
    layers = find_layers(loss_fn, params, batch)
    kinds = [one for one in _kinds(layers, names) if names is None or one.weight in names]
    shapes = {kind.weight: layers.outputs[kind.weight] for kind in kinds}

    def evaluate(perturbations: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        reading = read(loss_fn, params, (batch,), (), evaluate=True, perturbations=perturbations)
        inputs = {one.use.leaf: one.inputs for one in _layers(reading) if one.use.leaf in shapes}
        return reading.results[0].array, inputs

    zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    loss, pull, inputs = jax.vjp(evaluate, zeros, has_aux=True)
    (gradients,) = pull(jnp.ones_like(loss))
    return loss, {
        one.weight: LayerGradient(one, inputs[one.weight], gradients[one.weight]) for one in kinds
    }


def layer_response(
    loss_fn: Loss, params: PyTree, batch: Any, producer: str, consumer: str
) -> Float[Array, "n *s c"]:
    """Returns by how much the inputs of a layer change with the outputs of another, all alike.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: tree of arrays.
      batch: tree of arrays.
      producer: the weight of the layer whose outputs change.
      consumer: the weight of the layer that reads them.

    Raises:
      TraceError: what `trace` raises.
    """

    def inputs(shift: Array) -> Array:
        reading = read(
            loss_fn, params, (batch,), (), evaluate=True, perturbations={producer: shift}
        )
        return next(one.inputs for one in _layers(reading) if one.use.leaf == consumer)

    shape = layer_outputs(loss_fn, params, batch)[producer]
    shift = jnp.zeros(shape.shape, shape.dtype)
    return jax.jvp(inputs, (shift,), (jnp.ones_like(shift),))[1]


class BetweenLayers(NamedTuple):
    """What stands between the layers of a function, see `between_layers`.

    Attributes:
      loss: the loss.
      inputs: what these layers read, by the names of weights.
    """

    loss: Float[Array, ""]
    inputs: dict[str, Array]


def between_layers(
    loss_fn: Loss, params: PyTree, batch: Any, outputs: Mapping[str, Array]
) -> BetweenLayers:
    """Evaluates what stands between layers of a function, with their outputs given.

    Args:
      loss_fn: `(params, batch)` to a scalar.
      params: all leaves matter but the weights of these layers.
      batch: tree of arrays.
      outputs: of layers that are to be replaced, each the only one with its weight, before their
        biases, by the names of weights.

    Raises:
      TraceError: what `trace` raises.
    """
    reading = read(loss_fn, params, (batch,), (), evaluate=True, outputs=outputs)
    inputs = {
        layer.use.leaf: layer.inputs for layer in _layers(reading) if layer.use.leaf in outputs
    }
    return BetweenLayers(reading.results[0].array, inputs)


def layer_outputs(loss_fn: Loss, params: PyTree, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the outputs of layers by the names of weights.

    Raises:
      TraceError: see `layer_kinds`.
    """
    return find_layers(loss_fn, params, batch).outputs


def _layers(reading: Reading) -> list[Layer]:
    assert reading.evaluation is not None
    return reading.evaluation.layers


def _layers_of(reading: Reading, leaves: Mapping[str, Array]) -> Layers:
    layers, kinds, others = _layers(reading), [], {}
    names = [layer.use.leaf for layer in layers]
    for layer, name in zip(layers, names, strict=True):
        try:
            if names.count(name) > 1 and not layer.use.slices:
                raise TraceError(f"{names.count(name)} layers share the weight {name!r}")
            kinds.append(_kind(layer, reading, leaves))
        except TraceError as error:
            others[name] = str(error)
    outputs = {
        name: jax.ShapeDtypeStruct(layer.output.shape, layer.output.dtype)
        for layer, name in zip(layers, names, strict=True)
    }
    uses: dict[str, set[str]] = {}
    for use in reading.state.uses:
        uses.setdefault(use.leaf, set()).add(use.kind)
    return Layers(tuple(kinds), others, outputs, uses)


def _kind(layer: Layer, reading: Reading, leaves: Mapping[str, Array]) -> LayerKind:
    use, equation = layer.use, layer.equation
    own = [one for one in reading.state.uses if one.edge is use.edge]
    biases = [one.leaf for one in own if one.kind == "bias"]
    kernels = [one.leaf for one in own if one.kind == "weight"]
    if len(kernels) != 1 or use.slices or len(biases) > 1:
        raise TraceError(f"the layer of {kernels} at {use.source} is made of several leaves")
    name, parameters = use.leaf, equation.params
    if layer.weight is not leaves[name]:
        raise TraceError(f"the weight {name!r} at {use.source} is transposed or changed first")
    bias = biases[0] if biases else None
    if equation.primitive.name == "dot_general":
        (left, right), (left_batch, _) = parameters["dimension_numbers"]
        plain = left == (layer.inputs.ndim - 1,) and right == (0,) and not left_batch
        if plain and layer.weight.ndim == 2:
            return LayerKind(name, bias, None)
    if equation.primitive.name == "conv_general_dilated":
        numbers = parameters["dimension_numbers"]
        layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        same = layout == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        groups = parameters["feature_group_count"] * parameters["batch_group_count"]
        if same and groups == 1 and set(parameters["lhs_dilation"]) == {1}:
            strides, padding = parameters["window_strides"], parameters["padding"]
            window = Window(
                layer.weight.shape[:2], tuple(strides), tuple(padding), parameters["rhs_dilation"]
            )
            return LayerKind(name, bias, window)
    raise TraceError(
        f"the layer of {name!r} at {use.source} is {equation.primitive.name} of "
        f"{layer.inputs.shape} and {layer.weight.shape}; accepted are x @ W with W [inputs, "
        "outputs], and convolutions of [n, rows, columns, inputs] in one group"
    )
