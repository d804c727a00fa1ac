"""Width rules: which base parameter one is compared with, and what each optimizer gets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import archscale_jax as archscale
from archscale_jax._architecture import Parameter, Role
from archscale_jax.rules import width_multipliers
from archscale_jax.rules._width import WIDTH_RULES

pytestmark = pytest.mark.quick_compilation

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class Stages(linen.Module):
    """A residual network with stages of different widths, numbered by Flax across kinds."""

    width: int
    blocks: int

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(self.width, (3, 3))(x)
        for stage in range(2):
            size = self.width * 2**stage
            x = linen.Conv(size, (1, 1))(linen.relu(x))
            for _ in range(self.blocks):
                y = linen.Conv(size, (3, 3))(linen.relu(x))
                x = x + linen.Conv(size, (3, 3))(linen.relu(y))
        return linen.Dense(10)(linen.relu(x).mean((1, 2)))


def traced(model, inputs=IMAGES):
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return archscale.trace(model.apply, params, inputs)


def multipliers_by_role(architecture, multipliers):
    found = {}
    for parameter in architecture.parameters:
        found.setdefault(str(parameter.role), set()).add(round(multipliers[parameter.name], 9))
    return found


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("base_blocks", [1, 3])
def test_stages_of_any_width_are_compared_in_one_ratio(blocks, base_blocks):
    wide, base = traced(Stages(32, blocks)), traced(Stages(8, base_blocks))
    adam = multipliers_by_role(wide, width_multipliers(wide, base, "adam"))
    assert adam == {"input": {1.0}, "hidden": {0.25}, "readout": {0.25}, "bias": {1.0}}
    sgd = multipliers_by_role(wide, width_multipliers(wide, base, "sgd"))
    assert sgd == {"input": {4.0}, "hidden": {1.0}, "readout": {0.25}, "bias": {1.0, 4.0}}


def test_deeper_networks_of_the_same_widths_keep_their_rates():
    deep, base = traced(Stages(16, 3)), traced(Stages(16, 1))
    for rule in ("sgd", "adam", "muon"):
        assert set(width_multipliers(deep, base, rule).values()) == {1.0}


@pytest.mark.parametrize("rule", ["sgd", "adam", "muon"])
def test_widths_alone_are_as_good_as_a_base_that_was_built(rule):
    wide = traced(Stages(32, 2))
    by_widths = archscale.with_widths(wide, {32: 8, 64: 16})
    assert width_multipliers(wide, by_widths, rule) == width_multipliers(
        wide, traced(Stages(8, 2)), rule
    )


def test_widths_leave_the_ends_of_the_network_alone():
    """The inputs have as many features as the layers, and so do the outputs."""
    dense = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(16), linen.relu,
                              linen.Dense(16)])  # fmt: skip
    arch = traced(dense, jax.ShapeDtypeStruct((2, 16), jnp.float32))
    fans = {p.name: (p.fan_in, p.fan_out) for p in archscale.with_widths(arch, {16: 4}).parameters}
    assert fans["params/layers_0/kernel"] == (16, 4)
    assert fans["params/layers_2/kernel"] == (4, 4)
    assert fans["params/layers_4/kernel"] == (4, 16)
    assert fans["params/layers_4/bias"] == (16, 16)


def test_widths_that_no_layer_has_raise():
    arch = traced(Stages(32, 1))
    with pytest.raises(ValueError, match=r"widths name \[48\], which no layer"):
        archscale.with_widths(arch, {32: 8, 48: 12})
    with pytest.raises(ValueError, match="map 32 to 0"):
        archscale.with_widths(arch, {32: 0})


def test_a_table_that_is_the_readout_follows_the_readout():
    tied = [
        Parameter("table", Role.EMBEDDING, Role.READOUT, (50, size), 1, size) for size in (64, 16)
    ]
    wide, base = (archscale.Architecture(archscale.dag_graph("2"), (one,)) for one in tied)
    assert width_multipliers(wide, base, "adam") == {"table": 1 / 4}
    assert width_multipliers(wide, base, "sgd") == {"table": 1 / 4}


def spectral_change(rows, columns):
    """Spectral norm of the first update of Muon at rate 1, over sqrt(columns / rows)."""
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(rows, columns)), jnp.float32)
    muon = optax.contrib.muon(1.0, ns_steps=12)

    @jax.jit
    def updated(gradient):
        start = jnp.zeros_like(gradient)
        return muon.update(gradient, muon.init(start), start)[0]

    return float(np.linalg.norm(updated(gradient), 2)) / math.sqrt(columns / rows)


@pytest.mark.parametrize(
    ("role", "shape", "base_shape"),
    [
        (Role.INPUT, (48, 128), (48, 16)),
        (Role.HIDDEN, (128, 32), (32, 8)),
        (Role.READOUT, (128, 10), (16, 10)),
    ],
)
def test_muon_changes_matrices_alike_in_spectral_norm(role, shape, base_shape):
    """Against the optimizer itself: the spectral condition, with the multiplier, at both widths."""
    edge = 0 if role == Role.HIDDEN else None
    both = [
        archscale.Architecture(
            archscale.dag_graph("2"), (Parameter("w", role, role, size, *size, edge=edge),)
        )
        for size in (shape, base_shape)
    ]
    multiplier = width_multipliers(both[0], both[1], "muon")["w"]
    # Newton-Schulz brings singular values near 1 only, hence the tolerance.
    assert multiplier * spectral_change(*shape) == pytest.approx(
        spectral_change(*base_shape), rel=0.3
    )


def test_muon_leaves_kernels_of_convolutions_to_adam():
    wide, base = traced(Stages(32, 1)), traced(Stages(8, 1))
    muon, adam = (width_multipliers(wide, base, rule) for rule in ("muon", "adam"))
    kernels = [p.name for p in wide.parameters if len(p.shape) == 4]
    assert {name: muon[name] for name in kernels} == {name: adam[name] for name in kernels}


def test_a_hidden_layer_changes_its_features_alike_whatever_both_its_widths():
    """SGD by width_rule on n → 64 → m → 1: a linear network, one step, the hidden weights alone."""

    def change(inner, outer):
        random = np.random.default_rng(0)
        x, stem = random.normal(size=16), random.normal(size=(inner, 16)) / 4
        hidden = random.normal(size=(outer, inner)) / inner**0.5
        readout = random.normal(size=outer) / outer
        kernel = Parameter("kernel", Role.HIDDEN, Role.HIDDEN, (inner, outer), inner, outer)
        multiplier = WIDTH_RULES.resolve("sgd")(kernel, inner / 64, outer / 64)

        @jax.jit
        def changed(hidden, readout, stem):
            gradient = jax.grad(lambda weights: readout @ weights @ stem @ x)(hidden)
            return jnp.sqrt(jnp.mean((multiplier * gradient @ stem @ x) ** 2))

        return float(changed(hidden, readout, stem))

    for widths in [(64, 1024), (1024, 64), (512, 512)]:
        assert change(*widths) == pytest.approx(change(64, 64), rel=0.25)
