"""Recurrent networks: a first state of zeros is a start, not an arrangement of its own.

At the first step a cell reads a constant state, so that its vertex has fewer contributions than at
all others. One leaf has one value, and it is that of the steps that repeat: d_in counts the layer
of the state [AAS Eq. 12]. The numbers do not depend on the length of the sequence.
"""

import functools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import archscale_jax as archscale
from tests.kinds.helpers import (
    KEY,
    Model,
    deviation,
    haiku_model,
    linen_model,
    moments,
    multipliers,
    normal,
    roles,
    spec,
    specs,
    value,
)

pytestmark = pytest.mark.quick_compilation

CELLS = {
    "LSTMCell": nn.LSTMCell,
    "OptimizedLSTMCell": nn.OptimizedLSTMCell,
    "GRUCell": nn.GRUCell,
    "SimpleCell": nn.SimpleCell,
    "MGUCell": nn.MGUCell,
}


@functools.cache
def network(cell, layers, width=8, length=4, tokens=False):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if tokens:
                x = nn.Embed(10, width, name="table")(x)
            h: Any = x
            for _ in range(layers):
                h = nn.RNN(CELLS[cell](width))(h)
            return nn.Dense(3, name="out")(h[:, -1])

    x = jnp.zeros((2, length), jnp.int32) if tokens else normal(2, length, 4)
    return linen_model(Net(), x)


@pytest.mark.parametrize("rule", [None, "second_moment", "he_normal"])
@pytest.mark.parametrize(
    ("cell", "layers", "tokens"),
    [*((cell, 1, False) for cell in CELLS), ("GRUCell", 2, False), ("LSTMCell", 1, True)],
)
def test_recurrent_networks_are_initialized(cell, layers, tokens, rule):
    """One and two layers, and a table in front: no rule raises, all deviations are finite."""
    model = network(cell, layers, tokens=tokens)
    arch = model.trace()
    deviations = archscale.weight_standard_deviations(arch, rule)
    assert all(
        np.all(np.isfinite(one)) and np.all(np.asarray(one) > 0) for one in deviations.values()
    )
    params = archscale.initialize(KEY, model.shapes, arch, rule)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_a_step_counts_the_layer_of_its_state():
    """z = x W + h U at every step but the first: d_in = 2, so that C = 1 for W, not 2."""
    found = deviation(network("SimpleCell", 1), "SimpleCell_0/i/kernel")
    assert found**2 * 4 == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("how", ["scan", "loop"])
def test_a_step_counts_the_layer_of_its_state_in_plain_jax(how):
    """The same of a scan and of a Python loop; roles by what is contracted."""

    def apply(p, x):
        def step(h, xt):
            h = jax.nn.relu(xt @ p["in"] + h @ p["rec"])
            return h, None

        h = jnp.zeros((x.shape[1], 16))
        if how == "scan":
            h = jax.lax.scan(step, h, x)[0]
        else:
            for xt in x:
                h = step(h, xt)[0]
        return h @ p["out"]

    shapes = {"in": spec(8, 16), "rec": spec(16, 16), "out": spec(16, 3)}
    model = Model(apply, shapes, (normal(4, 2, 8),))
    assert deviation(model, "in") ** 2 * 8 == pytest.approx(1, rel=0.02)
    assert deviation(model, "rec") ** 2 * 16 == pytest.approx(1, rel=0.02)
    assert roles(model.trace()) == {"in": "input", "rec": "hidden", "out": "readout"}


def test_the_second_moment_of_a_state_settles():
    """Measured, ReLU, width 256: with halves from both, m_t = m/2 + m_(t-1)/2 goes to m.

    Over 8 steps the state's pre-activation neither grows nor dies: within 15 % of the fixed point.
    """

    def run(p, x):
        h, found = jnp.zeros((x.shape[1], 256)), []
        for xt in x:
            z = xt @ p["in"] + h @ p["rec"]
            h = jax.nn.relu(z)
            found.append(z)
        return h @ p["out"], found

    shapes = {"in": spec(64, 256), "rec": spec(256, 256), "out": spec(256, 3)}
    x = normal(8, 32, 64)
    model = Model(lambda p, x: run(p, x)[0], shapes, (x,))
    for rule in (None, "second_moment"):
        found = moments(model, rule, lambda p, x: run(p, x)[1], seeds=3)
        assert found[-1] / found[-3] == pytest.approx(1, abs=0.15), rule
        assert found[0] / found[-1] == pytest.approx(0.5, abs=0.1), rule


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_numbers_do_not_depend_on_the_length(cell):
    """4 and 7 steps: the same deviations and multipliers."""
    for rule in (None, "second_moment"):
        found = [
            archscale.weight_standard_deviations(network(cell, 1, length=length).trace(), rule)
            for length in (4, 7)
        ]
        assert found[0].keys() == found[1].keys()
        for name, one in found[0].items():
            np.testing.assert_allclose(one, found[1][name], rtol=1e-6, err_msg=name)
    for optimizer in ("sgd", "adam"):
        found = [
            multipliers(
                network(cell, 1, 16, length=length),
                network(cell, 1, length=length),
                width_rule=optimizer,
            )
            for length in (4, 7)
        ]
        assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell", "GRUCell"])
def test_width_multipliers_of_gates(cell):
    """Adam: kernels of the input 1, of the state 1/r; the second layer reads a width: 1/r."""
    found = multipliers(network(cell, 2, 16), network(cell, 2), width_rule="adam")
    letters = {"GRUCell": "rzn"}.get(cell, "ifgo")
    for letter in letters:
        assert value(found, f"{cell}_0/i{letter}/kernel") == pytest.approx(1)
        assert value(found, f"{cell}_0/h{letter}/kernel") == pytest.approx(0.5)
        assert value(found, f"{cell}_1/i{letter}/kernel") == pytest.approx(0.5)
    assert value(found, "out/kernel") == pytest.approx(0.5)


@pytest.mark.parametrize("rule", [None, "second_moment"])
def test_recurrent_networks_of_haiku(rule):
    """Two layers of hk.GRU and hk.LSTM over a table: initialized; state weights are hidden."""

    def apply(tokens):
        x: Any = jnp.swapaxes(hk.Embed(10, 8)(tokens), 0, 1)
        for core in (hk.GRU(8), hk.LSTM(8)):
            x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(3)(x[-1])

    model = haiku_model(apply, jnp.zeros((2, 4), jnp.int32))
    arch = model.trace()
    found = archscale.weight_standard_deviations(arch, rule)
    assert all(np.all(np.isfinite(one)) for one in found.values())
    assert value(roles(arch), "gru/w_h") == "hidden"
    assert value(roles(arch), "lstm/linear/w") == "hidden"


def test_two_stacked_layers_in_plain_jax():
    """A second layer that reads the first one's states: no error, C = 1 at d_in = 2 for both."""

    def apply(p, x):
        def layer(w, u, x):
            def step(h, xt):
                h = jax.nn.relu(xt @ w + h @ u)
                return h, h

            return jax.lax.scan(step, jnp.zeros((x.shape[1], 16)), x)[1]

        return layer(p["w2"], p["u2"], layer(p["w1"], p["u1"], x))[-1] @ p["out"]

    shapes = specs(w1=(8, 16), u1=(16, 16), w2=(16, 16), u2=(16, 16), out=(16, 3))
    model = Model(apply, shapes, (normal(4, 2, 8),))
    for name, fan in (("w1", 8), ("u1", 16), ("w2", 16), ("u2", 16)):
        assert deviation(model, name) ** 2 * fan == pytest.approx(1, rel=0.02), name
