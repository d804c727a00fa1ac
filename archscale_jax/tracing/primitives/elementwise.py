"""Operations on entries: activations, sums and products of features, biases and scales."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from archscale_jax._expressions import (
    UNKNOWN,
    ZERO,
    Apply,
    Constant,
    Expression,
    Unknown,
    Variable,
    apply,
    evaluated,
    statistics,
    times,
    variables,
)
from archscale_jax._quadrature import moments, slope
from archscale_jax.tracing.axes import joined
from archscale_jax.tracing.flow import Kind, standard
from archscale_jax.tracing.primitives.gates import note_gates
from archscale_jax.tracing.primitives.registry import HANDLERS, register_primitive
from archscale_jax.tracing.sharding import split_after
from archscale_jax.tracing.state import Call, State, mixture
from archscale_jax.tracing.values import (
    NO_LABELS,
    Axes,
    Feature,
    Known,
    Labels,
    OuterProduct,
    Value,
    Weight,
    changed,
    features_of,
    weights_of,
)

ADDITIONS = ("add", "sub", "add_any")
PRODUCTS = ("mul", "div")


def _special(name: str) -> Callable[..., Any]:
    def function(*values):
        from scipy import special

        return getattr(special, name)(*values)

    return function


def _divided(one, other):
    integers = np.issubdtype(np.asarray(one).dtype, np.integer)
    return np.trunc(one / other).astype(int) if integers else np.true_divide(one, other)


def _converted(parameters: Mapping[str, Any]) -> Callable[..., Any]:
    dtype = np.dtype(parameters["new_dtype"])
    if np.issubdtype(dtype, np.bool_) or np.issubdtype(dtype, np.integer):
        return lambda x: np.asarray(np.real(x)).astype(dtype)
    return lambda x: (
        np.asarray(x) * 1.0
    )  # low precision would tell of rounding, not of the function


def _bits(parameters: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda x: np.asarray(x).view(np.dtype(parameters["new_dtype"]))


def _not(x):
    return np.logical_not(x) if np.asarray(x).dtype == bool else np.invert(x)


def _selected(which, *cases):
    return np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)


_PLAIN: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (
        "exp", "exp2", "log", "log1p", "expm1", "sqrt", "cbrt", "tanh", "sin", "cos", "tan",
        "sinh", "cosh", "abs", "sign", "floor", "ceil", "square", "real", "imag", "conj")},
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divided,
    "neg": np.negative, "max": np.maximum, "min": np.minimum, "rem": np.fmod,
    "pow": np.power, "atan2": np.arctan2, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "rsqrt": lambda x: 1 / np.sqrt(x), "logistic": _special("expit"), "erf": _special("erf"),
    "erfc": _special("erfc"), "erf_inv": _special("erfinv"), "lgamma": _special("gammaln"),
    "digamma": _special("digamma"), "is_finite": np.isfinite, "not": _not,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shift_left": np.left_shift, "shift_right_logical": np.right_shift,
    "shift_right_arithmetic": np.right_shift, "nextafter": np.nextafter,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high), "select_n": _selected,
    "complex": lambda re, im: re + 1j * im,
}  # fmt: skip

FUNCTIONS: dict[str, Callable[[Mapping[str, Any]], Callable[..., Any]]] = {
    **{name: (lambda function: lambda parameters: function)(f) for name, f in _PLAIN.items()},
    "integer_pow": lambda parameters: lambda x: np.asarray(x) ** float(parameters["y"]),
    "round": lambda parameters: np.round,
    "convert_element_type": _converted,
    "bitcast_convert_type": _bits,
}
"""Functions of NumPy arrays by the names of primitives, given their parameters."""

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite")


def expression_of(call: Call, operands: list[Expression]) -> Expression:
    """Returns what an entry of an elementwise operation's result is."""
    name = call.name
    if name == "mul" and any(_is_zero(one) for one in operands):
        return ZERO
    if name in PRODUCTS:
        folded = _folded(name, operands)
        if folded is not None:
            return folded
    if name == "convert_element_type" and not isinstance(operands[0], Constant):
        kind = np.dtype(call.parameters["new_dtype"]).kind if _has_dtype(call) else "f"
        if kind in "fcV":
            return operands[0]
    if name in _COMPARISONS and any(isinstance(one, Unknown) for one in operands):
        return _compared_with_unknown(name, operands)
    if name in _PLAIN:
        return apply(name, _PLAIN[name], *operands)
    # The name tells functions apart, so that it has the parameters too.
    full = f"{name} {sorted((key, str(value)) for key, value in call.parameters.items())}"
    function = FUNCTIONS[name](call.parameters) if name in FUNCTIONS else _bound(call)
    return apply(full, function, *operands)


def _compared_with_unknown(name: str, operands: list[Expression]) -> Expression:
    """One of n places 0, 1, … equals an unknown index, each with probability 1/n."""
    for one in operands:
        if name == "eq" and isinstance(one, Variable) and one.kind == "index":
            hot = np.zeros(len(one.nodes))
            hot[0] = 1.0
            return Variable("index", ("chosen", one.source), one.part, nodes=hot)
    return UNKNOWN


def _has_dtype(call: Call) -> bool:
    try:
        np.dtype(call.parameters["new_dtype"])
    except TypeError:
        return False
    return True


def _folded(name: str, operands: list[Expression]) -> Expression | None:
    """A product with a constant, in one constant: h · 2 / 2 is h."""
    one, other = operands
    for factor, rest in ((other, one), (one, other)):
        if not isinstance(factor, Constant) or isinstance(rest, Constant):
            continue
        if name == "div" and factor is one:
            return None
        value: Any = factor.value
        if not np.isscalar(value) or np.iscomplexobj(value) or isinstance(rest, Unknown):
            return None
        number = float(factor)
        number = number if name == "mul" else 1 / number if number else np.inf
        if isinstance(rest, Apply) and rest.name == "mul":
            for constant, inner in (rest.operands, rest.operands[::-1]):
                if isinstance(constant, Constant) and np.isscalar(constant.value):
                    product = float(constant) * number
                    close = abs(product - 1) < 1e-6
                    return inner if close else times(inner, product)
        return times(rest, number)
    return None


def _bound(call: Call) -> Callable[..., Any]:
    """The primitive itself, evaluated by JAX."""
    import jax

    def function(*values):
        with jax.ensure_compile_time_eval():
            arrays = [jax.numpy.asarray(value, "float32") for value in values]
            arrays = jax.numpy.broadcast_arrays(*arrays)
            found = call.equation.primitive.bind(*arrays, **call.parameters)
            return np.asarray(found[0] if isinstance(found, list | tuple) else found)

    return function


def made_of_params(call: Call, expression: Expression, axes=None) -> Weight:
    """Returns what an operation makes of values made of params alone, and of constants."""
    weights = call.weights
    rank = len(call.shape)
    if axes is None:
        axes = joined([weight.axes for weight in weights], rank)
    return Weight(
        tuple(dict.fromkeys(leaf for weight in weights for leaf in weight.leaves)),
        expression,
        axes,
        frozenset().union(*(weight.slices for weight in weights)),
        split=split_after(call.equation, call.values),
        exact=weights[0].exact if call.name == "convert_element_type" else None,
        rows=any(weight.rows for weight in weights),
    )


def elementwise(state: State, call: Call) -> Value:
    """Reads an elementwise operation; a law for every combination of operands."""
    if not call.features:
        expression = expression_of(call, [value.expression for value in call.values])
        if call.weights and not _is_zero(expression):
            return made_of_params(call, expression)
        axes = joined([value.axes for value in call.values], len(call.shape))
        return Known(expression, axes, one_hot=_one_hot(call) or _kept_hot(call))
    call = _without_masks(state, call)
    features, weights = call.features, call.weights
    alone = state.reaches_no_input(features) and not any(
        labels for one in features for labels in one.axes
    )
    if weights and call.name in PRODUCTS and alone:
        # As a weight over its norm, which was found by iteration from a constant.
        state.note(
            f"{call.name} at {call.line}: {', '.join(weights[0].leaves)} meets a number found by "
            "iteration, as in spectral normalization; its size behind it is not known"
        )
        return made_of_params(call, weights[0].expression)
    if call.name in ADDITIONS:
        return _addition(state, call)
    if len({feature.vertex for feature in features}) > 1:
        return _product(state, call)
    return _own(state, call, weights)


def _without_masks(state: State, call: Call) -> Call:
    """Excludes masks, and other values of inputs alone, that multiply features of layers."""
    deep = [one for one in call.features if not state.is_data(one)]
    if len(deep) in (0, len(call.features)):
        return call

    def visible(value: Value) -> Value:
        if not isinstance(value, Feature) or not state.is_data(value):
            return value
        hidden = call.name not in ADDITIONS or value.mask
        return Known(UNKNOWN, value.axes, value.array) if hidden else value

    return call.of([visible(value) for value in call.values])


def _addition(state: State, call: Call) -> Value:
    features, weights = call.features, call.weights
    axes = joined([value.axes for value in features], len(call.shape))
    if len({one.vertex for one in features}) > 1:
        signed = [
            changed(one, expression=apply("neg", np.negative, one.expression))
            if call.name == "sub" and one is call.values[1]
            else one
            for one in features
        ]
        return state.join(Kind.SUM, signed, axes)
    if len(features) == 2:
        return _own(state, call, [])
    (feature,) = features
    if weights:
        return _bias(state, call, weights[0], feature)
    (constant,) = (value for value in call.values if isinstance(value, Known))
    nothing = isinstance(constant.expression, Unknown) or _is_zero(constant.expression)
    if nothing and not (call.name == "sub" and call.values[1] is feature):
        return changed(feature, axes=axes, array=None)
    return _own(state, call, [])


def _is_zero(expression: Expression) -> bool:
    return isinstance(expression, Constant) and bool(np.all(expression.value == 0))


def _bias(state: State, call: Call, weight: Weight, feature: Feature) -> Value:
    """What is added; a sum over a whole leaf, such as a penalty, adds to no feature."""
    penalty = not variables(weight.expression, raw=True) and statistics(weight.expression)
    axes = joined([feature.axes], len(call.shape))
    result = changed(feature, axes=axes, outer=None, array=None)
    if penalty and not any(weight.axes):
        return result
    along = state.aligned(weight, feature)
    long = {
        (leaf, axis)
        for place in set(along["positions"]) - set(along["batch"])
        for leaf, axis in weight.axes[place]
        if state.shapes[leaf][axis] > 1
    }
    table = bool(long) and _takes_table(state, feature)
    scaled = bool(feature.passed) and not feature.plain and not table
    kind = "offset" if scaled else "bias"
    layer = state.layers.get(feature.vertex, ()) if feature.bare else ()
    where = state.kind(feature)
    linear = slope(feature.expression, _variable(feature), standard)
    known = where in (Kind.LAYER, Kind.SUM) and bool(linear or _is_normalized(feature.expression))
    options: dict[str, Any] = {"known": known, "table": table}
    if layer and not long:
        made = state.uses[layer[0]]
        options |= {
            "edge": made.edge, "fan_in": made.fan_in, "fan_out": made.fan_out,
            "spatial": made.spatial,
        }  # fmt: skip
    numbers = state.use(call, weight, kind, feature.vertex, along, **options)
    if not long and where != Kind.DATA:
        result = _with_start(state, call, weight, result)
    if feature.plain and feature.vertex not in state.flow.read:
        return result
    return changed(result, passed=feature.passed | frozenset(numbers))


def _takes_table(state: State, feature: Feature) -> bool:
    """Whether what has an entry for every position is a table where it is added to features.

    It is none behind a gain that has such entries too, as the bias of a norm over positions, nor
    where it is added to sums over features, as the biases of attention scores are, or to what is
    learned itself.
    """
    gains = [state.uses[number] for number in feature.passed if state.uses[number].kind == "scale"]
    if any(state.shapes[one.leaf][axis] > 1 for one in gains for axis in one.positions):
        return False
    kind, made = state.kind(feature), state.flow.expressions.get(feature.vertex)
    if kind == Kind.CONSTANT:
        return False
    expressions = [feature.expression, *([made] if kind == Kind.PRODUCT and made else [])]
    return not any(map(_sums_features, expressions))


def _sums_features(expression: Expression) -> bool:
    """Whether features enter only by a sum over them."""
    raw = any(one.kind == "vertex" for one in variables(expression, raw=True))
    return not raw and any(one.units for one in statistics(expression))


def _is_normalized(expression: Expression) -> bool:
    """Whether features leave a normalization, whatever functions stand before it."""
    second = moments(expression, standard).second if statistics(expression) else 0.0
    return math.isclose(second, 1.0, rel_tol=1e-3)


def _with_start(state: State, call: Call, weight: Weight, feature: Feature) -> Feature:
    """Features with what is added to them at the start, if that is not 0."""
    if all(state.starts.get(leaf, 0.0) == 0.0 for leaf in weight.leaves):
        return feature
    added = weight.expression
    if call.name == "sub":
        added = apply("neg", np.negative, added)
    if feature.plain:
        state.flow.add_to(feature.vertex, added)
        return feature
    total = apply("add", np.add, feature.expression, added)
    return changed(feature, expression=total)


def _variable(feature: Feature) -> Variable:
    return Variable("vertex", feature.vertex)


def _product(state: State, call: Call) -> Value:
    """A function of features of several vertices, which is not a sum."""
    axes = joined([value.axes for value in call.features], len(call.shape))
    expression = expression_of(call, [value.expression for value in call.values])
    result = state.join(Kind.PRODUCT, call.features, axes, expression=expression)
    if call.name in PRODUCTS and len(call.shapes[0]) == len(call.shapes[1]):
        kept = [(axis, axis) for axis in range(len(call.shape))]
        note_gates(state, call, result.vertex, kept, ())
    for weight in call.weights:
        _scale(state, call, weight, result)
    return result


def _own(state: State, call: Call, weights: list[Weight]) -> Value:
    """A function of features of one vertex, and of parameters and constants."""
    features = call.features
    feature = features[0]
    axes = joined([value.axes for value in features], len(call.shape))
    expression = expression_of(call, [value.expression for value in call.values])
    if isinstance(expression, Constant | Unknown) and not weights:
        expression = ZERO if _is_zero(expression) else expression
    passed = frozenset().union(*(one.passed for one in features))
    for weight in weights:
        passed |= frozenset(_scale(state, call, weight, feature))
    pooled = feature.bare and call.name in PRODUCTS and not weights and len(features) == 1
    kept = call.name in _KEEP_BARE or (pooled and expression == _variable(feature))
    outer = None
    if call.name == "mul" and len(weights) == len(features) == 1:
        outer = _outer_product(weights[0], feature, expression, axes)
    one_hot = _one_hot(call) or _kept_hot(call)
    for other in call.values:
        if isinstance(other, Known) and one_hot:
            axes = joined([axes, other.axes], len(call.shape))
    return changed(
        feature,
        expression=expression,
        axes=axes,
        passed=passed,
        bare=feature.bare and kept,
        mask=state.is_data(feature) and (call.name in _COMPARISONS or _all_masks(features)),
        one_hot=one_hot,
        outer=outer,
        inputs=frozenset().union(*(one.inputs for one in features)),
        array=None,
    )


_KEEP_BARE = ("convert_element_type", "stop_gradient", "copy")
_KEEP_HOT = ("convert_element_type", "mul", "div", "select_n")


def _outer_product(
    weight: Weight, feature: Feature, expression: Expression, axes: Axes
) -> OuterProduct | None:
    """What a sum over features makes a layer of: entries of a matrix times copies of features."""
    same_rank = len(feature.axes) == len(weight.axes)
    return OuterProduct(weight, feature, expression, axes) if same_rank else None


def _all_masks(features: list[Feature]) -> bool:
    return all(one.mask for one in features)


def _one_hot(call: Call) -> Labels:
    """Labels of the axis along which a comparison of ids with 0, 1, … is true once."""
    if call.name != "eq" or len(call.values) != 2:
        return NO_LABELS
    for ids, places in (call.values, call.values[::-1]):
        if isinstance(places, Known) and ids.axes and places.axes:
            labels = frozenset().union(*places.axes) - frozenset().union(*ids.axes)
            if labels and frozenset().union(*ids.axes):
                return labels
    return NO_LABELS


def _kept_hot(call: Call) -> Labels:
    """Labels of the axis along which an operand is 1 once, if the operation keeps it so."""
    if call.name not in _KEEP_HOT:
        return NO_LABELS
    hot = [one.one_hot for one in call.values if not isinstance(one, Weight) and one.one_hot]
    return hot[0] if len(hot) == 1 else NO_LABELS


def _scale(state: State, call: Call, weight: Weight, feature: Feature) -> tuple[int, ...]:
    """What multiplies features, or enters another function of them."""
    along = state.aligned(weight, feature)
    multiplies = call.name in PRODUCTS
    normalized = bool(statistics(feature.expression)) and (
        slope(feature.expression, _variable(feature), standard) is not None
        or _is_normalized(feature.expression)
    )
    neutral = neutral_value(weight.expression, weight.leaves[0]) if multiplies else None
    numbers = state.use(
        call,
        weight,
        "scale" if multiplies else "value",
        feature.vertex,
        along,
        neutral=neutral,
        known=normalized and neutral is not None and _is_gain(state, weight),
    )
    labels = _modulating(state, weight, feature)
    state.modulated |= dict.fromkeys(numbers, labels) if labels else {}
    return numbers


def _modulating(state: State, weight: Weight, feature: Feature) -> Labels:
    """Labels of features that a matrix is multiplied with, each with a row of its own."""
    if len(weight.axes) != len(feature.axes):
        return NO_LABELS
    long = [any(state.shapes[leaf][axis] > 1 for leaf, axis in own) for own in weight.axes]
    places = [place for place, is_long in enumerate(long) if is_long]
    new = [place for place in places if not state.has_units(feature.axes[place])]
    if not new or state.is_data(feature):
        return NO_LABELS
    shared = [labels for labels in feature.axes if state.has_units(labels)]
    taken = [labels for labels in shared if feature.axes.index(labels) in places]
    return NO_LABELS.union(*taken)


def _is_gain(state: State, weight: Weight) -> bool:
    """Whether a value is a vector w or 1 + w, as the gains of normalizations are."""
    variable = Variable("leaf", weight.leaves[0])
    vector = any(state.shapes[leaf][axis] > 1 for labels in weight.axes for leaf, axis in labels)
    return vector and len(weight.leaves) == 1 and slope(weight.expression, variable, standard) == 1


def neutral_value(expression: Expression, leaf: str) -> float | None:
    """Returns the value of a leaf that makes 1 of it: 1, or 0 as in 1 + w and exp(w); or None."""
    own = _factor_of(expression, Variable("leaf", leaf))
    if isinstance(own, Variable):  # the leaf itself
        return 1.0
    if own is None or len(variables(own)) != 1 or statistics(own):
        return None
    for value in (1.0, 0.0):
        with np.errstate(all="ignore"):
            if np.all(np.isclose(evaluated(own, dict.fromkeys(variables(own), value)), 1.0)):
                return value
    return None


def _factor_of(expression: Expression, variable: Variable) -> Expression | None:
    """The factor of a product that a variable stands in."""
    if not isinstance(expression, Apply) or expression.name != "mul":
        return expression if variables(expression) == {variable} else None
    found = [one for one in expression.operands if variable in variables(one)]
    return _factor_of(found[0], variable) if len(found) == 1 else None


@register_primitive("select_n")
def select(state: State, call: Call) -> Value:
    """Chooses between values: an activation, a guard, a mask, or a mixture."""
    which, cases = call.values[0], call.values[1:]
    if not features_of(cases):
        if weights_of(cases) and not isinstance(which, Weight):
            return made_of_params(call, _mixed(state, cases))
        return elementwise(state, call)
    rank = len(call.shape)
    axes = joined([one.axes for one in features_of(cases)], rank)
    masked = isinstance(which, Known) and not _is_random(which)
    if masked or state.is_data(which):
        return _masked(state, call, cases, axes)
    if weights_of(cases):
        return _masked(state, call, cases, axes)
    return elementwise(state, call)


def _is_random(value: Known) -> bool:
    return any(variable.kind == "random" for variable in variables(value.expression))


def _mixed(state: State, cases: list[Value]) -> Expression:
    made = [one.expression for one in cases if isinstance(one, Weight)]
    return made[0] if len(made) == 1 else mixture(state, [(one, 1) for one in made])


def _masked(state: State, call: Call, cases: list[Value], axes) -> Value:
    """Features where a mask lets them through, and what stands there instead."""
    features = features_of(cases)
    for weight in weights_of(cases):
        state.use(call, weight, "token", features[0].vertex, state.aligned(weight, features[0]))
    deep = [one for one in features if not state.is_data(one)] or features
    parts = [(one.expression, 1) for one in deep]
    if len({one.vertex for one in deep}) > 1:
        return state.join(Kind.PRODUCT, deep, axes, expression=mixture(state, parts))
    same = all(one.expression is deep[0].expression for one in deep)
    expression = deep[0].expression if same else mixture(state, parts)
    return changed(deep[0], expression=expression, axes=axes, array=None, bare=False)


_BOUND = ("bessel_i0e", "bessel_i1e", "igamma", "igammac", "polygamma", "zeta",
          "regularized_incomplete_beta", "random_gamma_grad", "mulhi", "clz",
          "population_count")  # fmt: skip
"""Elementwise primitives that are evaluated as they are."""

for _name in (*FUNCTIONS, *_BOUND):
    HANDLERS.setdefault(_name, elementwise)


def register_elementwise(
    name: str, function: Callable[[Mapping[str, Any]], Callable[..., Any]] | None = None
) -> None:
    """Registers a primitive that maps entries to entries.

    Args:
      name: of the primitive.
      function: of its parameters, to a function of NumPy arrays. None binds the primitive itself.
    """
    if function is not None:
        FUNCTIONS[name] = function
    HANDLERS[name] = elementwise
