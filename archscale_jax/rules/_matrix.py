"""Optimizers of matrices: which leaves they have, and the width multipliers that go with them.

`optax.contrib.muon` makes the update of a matrix orthogonal, so that its size follows from its
shape alone. A leaf is a matrix where every use of it in the traced function maps features to
features along the same axes of the leaf (`matrix_of`); all else is Adam's, with the reason. What
counts as inputs are the axes that are summed over, the positions of a kernel among them, as in the
published code of Muon, which flattens kernels to [outputs, inputs · positions]; as outputs those
that the layer writes, all heads and the parts of a fused projection together. Layers of a stack and
experts are matrices of their own, which optax treats one by one.

A matrix of `in` inputs and `out` outputs shall change by √(out/in) in spectral norm at every width
(theory §10, §13). With σ the spectral norm of optax's update

| scaling        | σ                  | c = σ/√(out/in)                        |
|----------------|--------------------|----------------------------------------|
| default        | √max(1, out/in)    | √max(in/out, 1)                        |
| consistent_rms | ρ·√max(in, out)    | ρ·√in times that of the default        |

its learning rate is multiplied by c_b/c, c_b of the base. Leaves of Adam have Adam's multipliers.
"""

import math
from typing import Any, NamedTuple

from archscale_jax._architecture import (
    Architecture,
    Parameter,
    ParameterUse,
    Role,
    check_parameters,
)
from archscale_jax._trees import map_with_names
from archscale_jax.rules._width import adam, register_width_rule


class Matrix(NamedTuple):
    """The axes of a leaf that make matrices; the others tell matrices of a stack apart.

    Attributes:
      inputs: axes that are summed over.
      outputs: axes that are written.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the numbers of inputs and outputs of one matrix of a leaf of this shape."""
        inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in self)
        return inputs, outputs

    def __str__(self) -> str:
        return f"axes {_listed(self.inputs)}->{_listed(self.outputs)}"


def _listed(axes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, axes))})"


_REASONS = {
    Role.INPUT: "input layer",
    Role.READOUT: "readout",
    Role.BIAS: "bias",
    Role.SCALE: "scale",
    Role.EMBEDDING: "table",
}


def matrix_of(parameter: Parameter) -> Matrix | str:
    """Returns the axes along which a leaf is a matrix of a hidden layer, or why it is none.

    Args:
      parameter: as `trace` reads it.
    """
    if parameter.role != Role.HIDDEN:
        return "table that is the readout too" if parameter.is_tied else _REASONS[parameter.role]
    uses = [use for use in parameter.uses if use.kind != "result"]
    others = sorted({use.kind for use in uses if use.kind != "weight"})
    if not uses or others:
        return f"hidden, used as {' and '.join(others)}" if uses else "no use of it is known"
    if any(use.layer == Role.READOUT for use in uses):
        return "tied: a readout too"
    if any(use.gates for use in uses):
        return "router: scales groups of features"
    if len(kinds := {_kinds_of_axes(use) for use in uses}) > 1:
        applied = sorted({str(Matrix(*one[:2])) for one in kinds})
        return f"tied: applied over {' and '.join(applied)}"
    (kind,) = kinds
    for axis, size in enumerate(parameter.shape):
        if size > 1 and sum(axis in axes for axes in kind) != 1:
            return f"axis {axis} is not an axis of inputs, outputs or matrices alone"
    matrix = Matrix(*kind[:2])
    inputs, outputs = matrix.sizes(parameter.shape)
    if uses[0].groups > 1:
        depthwise = inputs == parameter.kernel_positions
        return "depthwise kernel" if depthwise else f"kernel of {uses[0].groups} groups"
    if min(inputs, outputs) == 1:
        return f"vector: {inputs} to {outputs} features"
    return matrix


def _kinds_of_axes(use: ParameterUse) -> tuple[tuple[int, ...], ...]:
    """Axes of inputs, of outputs, along features, and of a stack."""
    stacked = sorted({axis for axis, _ in use.slices})
    return use.contracted, use.output, use.batch, tuple(stacked)


def optimizer_labels(architecture: Architecture) -> dict[str, str]:
    """Returns which optimizer has a leaf under Muon, by name: `muon over axes …`, `adam: reason`.

    Args:
      architecture: the network.
    """
    found = {one.name: matrix_of(one) for one in architecture.parameters}
    return {
        name: f"muon over {one}" if isinstance(one, Matrix) else f"adam: {one}"
        for name, one in found.items()
    }


def muon_dimension_numbers(architecture: Architecture, params: Any) -> Any:
    """Returns what `optax.contrib.muon` takes as `muon_weight_dimension_numbers`.

    Matrices of hidden layers are Muon's, with the axes that the trace found, whatever their order
    and number: heads, fused projections, experts, layers of a scan, kernels. Tables, vectors,
    readouts, input layers, routers, and kernels of groups are left to Adam.

        numbers = muon_dimension_numbers(arch, params)
        tx = optax.contrib.muon(3e-3, muon_weight_dimension_numbers=numbers)

    Args:
      architecture: the network.
      params: tree of arrays or shapes.

    Returns:
      A tree like `params` of `optax.contrib.MuonDimensionNumbers`, None for what is Adam's.

    Raises:
      TypeError, ValueError: params that are not those of the architecture.
    """
    import optax
    from optax.contrib import MuonDimensionNumbers

    check_parameters(architecture, params, masked=optax.MaskedNode)
    matrices = {one.name: matrix_of(one) for one in architecture.parameters}

    def numbers(name: str, leaf: Any) -> Any:
        del leaf
        matrix = matrices[name]
        if not isinstance(matrix, Matrix):
            return None
        return MuonDimensionNumbers(reduction_axis=matrix.inputs, output_axis=matrix.outputs)

    return map_with_names(numbers, params)


@register_width_rule("muon", equation="spectral size √(out/in)", citation="(theory §10)")
def muon(
    parameter: Parameter,
    fan_in_ratio: float,
    fan_out_ratio: float,
    *,
    base_shape: tuple[int, ...] | None = None,
    consistent_rms: float | None = None,
    dimension_numbers: bool = False,
    whole: Parameter | None = None,
) -> float:
    """The size of every update, over that of `optax.contrib.muon`.

    Without dimension numbers optax orthogonalizes every leaf of two axes, tables and stacked
    vectors too, scales it by sqrt(max(1, columns/rows)), and leaves the rest to Adam. A matrix
    that maps i to o features should change by sqrt(o/i) in spectral norm, a vector or table by
    entries of one size.

    Args:
      parameter: the leaf, in the role of one of its uses.
      fan_in_ratio: r.
      fan_out_ratio: s.
      base_shape: of the leaf in the base; None divides the axes by r and s.
      consistent_rms: as given to `optax.contrib.muon`.
      dimension_numbers: whether optax is given `muon_dimension_numbers(architecture, params)`.
      whole: the leaf with all its uses, which tell whether it is Muon's; None is `parameter`.
    """
    if not dimension_numbers:
        return _by_shape(parameter, fan_in_ratio, fan_out_ratio, base_shape, consistent_rms)
    matrix = matrix_of(whole or parameter)
    if not isinstance(matrix, Matrix):
        return adam(parameter, fan_in_ratio, fan_out_ratio)
    sizes = matrix.sizes(parameter.shape)
    base = sizes[0] / fan_in_ratio, sizes[1] / fan_out_ratio
    return excess(matrix.sizes(base_shape) if base_shape else base, consistent_rms) / excess(
        sizes, consistent_rms
    )


def excess(sizes: tuple[float, float], consistent_rms: float | None = None) -> float:
    """Returns c: the spectral norm of optax's update of a matrix over √(out/in).

    Args:
      sizes: numbers of inputs and outputs.
      consistent_rms: as given to `optax.contrib.muon`.
    """
    return _optax_size(sizes, consistent_rms) * math.sqrt(sizes[0] / sizes[1])


def _optax_size(shape: tuple[float, ...], consistent_rms: float | None) -> float:
    """Spectral norm of optax's update of a matrix of this shape."""
    if consistent_rms is not None:
        return math.sqrt(max(shape)) * consistent_rms
    return math.sqrt(max(1.0, shape[1] / shape[0]))


def _by_shape(
    parameter: Parameter,
    fan_in_ratio: float,
    fan_out_ratio: float,
    base_shape: tuple[int, ...] | None,
    consistent_rms: float | None,
) -> float:
    """The multiplier where optax takes every leaf of two axes for a matrix [in, out]."""
    if len(parameter.shape) != 2:
        return adam(parameter, fan_in_ratio, fan_out_ratio)
    use = parameter.uses[0] if parameter.uses else None
    if use is None:
        own = float(parameter.fan_in), float(parameter.fan_out)
        seen = own, (own[0] / fan_in_ratio, own[1] / fan_out_ratio)
    else:
        seen = parameter.shape, base_shape or parameter.shape
    size, base_size = (_optax_size(one, consistent_rms) for one in seen)
    if use is None or parameter.role in (Role.HIDDEN, Role.READOUT, Role.INPUT):
        return base_size / size * math.sqrt(fan_out_ratio / fan_in_ratio)
    rms, base_rms = (
        norm * math.sqrt(min(one) / math.prod(one))
        for norm, one in zip((size, base_size), seen, strict=True)
    )
    return base_rms / rms
