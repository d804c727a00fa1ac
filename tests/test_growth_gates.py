"""Growth of gated layers, against dense problems on gated samples and whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archscale_jax as archscale
from archscale_jax.contrib._growth.measured import measure
from archscale_jax.contrib._growth.neurons import gated_neurons, new_neurons
from archscale_jax.contrib._growth.solve import solve
from tests import growing
from tests.growing import draw

pytestmark = pytest.mark.quick_compilation


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "activation", [jax.nn.silu, jax.nn.relu, jax.nn.gelu, jax.nn.sigmoid, lambda x: x],
    ids=["silu", "relu", "gelu", "sigmoid", "bilinear"],
)  # fmt: skip
def test_gated_layers_are_found(activation):
    network = growing.gated(activation)
    (group,) = growing.growable(network)
    assert group.producers == ("gate", "up") and group.gates == ("gate",)
    assert group.makers == ("up",) and group.consumers == ("down",)
    assert group.slope_between("up", "down") == 1 and group.slope_between("gate", "down") == 0
    assert {name for name, _, _ in group.vectors} == {"gate_bias", "up_bias", "scale"}


def samples(network):
    """What the neurons read times what gates and scales them, and V_proj, by hand."""
    params, (inputs, targets) = network.params, network.batch
    x = inputs / jnp.sqrt(jnp.mean(jnp.square(inputs), -1, keepdims=True))
    factor = jax.nn.silu(x @ params["gate"] + params["gate_bias"]) * params["scale"]
    hidden = factor * (x @ params["up"] + params["up_bias"])
    error = jnp.mean(inputs + hidden @ params["down"], axis=1) - targets
    wanted = np.repeat(np.asarray(-2 * error / 5), 5, axis=0)
    factor, hidden = (np.asarray(one).reshape(-1, 3) for one in (factor, hidden))
    rest = wanted - hidden @ np.linalg.lstsq(hidden, wanted, rcond=None)[0]
    rows = np.hstack([np.asarray(x).reshape(-1, 4), np.ones((len(factor), 1))])
    return factor, rows, rest


def test_statistics_are_those_of_gated_samples():
    network = growing.gated()
    (group,) = growing.growable(network)
    measured = measure(network.loss, network.params, [network.batch], [group], cutoff=1e-12)
    factor, rows, rest = samples(network)
    np.testing.assert_array_equal(measured.gates["gate"], [0, 1, 2])
    stacked = np.hstack([factor[:, [place]] * rows for place in range(3)])
    np.testing.assert_allclose(measured.pairs["gate"].before, stacked.T @ stacked, atol=1e-9)
    np.testing.assert_allclose(measured.pairs["gate"].projected, stacked.T @ rest, atol=1e-8)

    # The first neuron is the best of all gates, better than 1000 of the same sizes.
    new = solve(network.params, measured, [group], number=3)["gate"]
    by_gate = [new_neurons(
        stacked[:, 5 * place : 5 * place + 5].T @ stacked[:, 5 * place : 5 * place + 5],
        stacked[:, 5 * place : 5 * place + 5].T @ rest, 12, threshold=0.0, cutoff=1e-12,
    ).singular_values[0] for place in range(3)]  # fmt: skip
    np.testing.assert_allclose(new.singular_values[0], max(by_gate), rtol=1e-6)
    generator = np.random.default_rng(0)
    for place in range(3):
        features = factor[:, [place]] * rows @ generator.normal(size=(5, 1000))
        gains = np.linalg.norm(features.T @ rest / 12, axis=1)
        sizes = np.sqrt(np.mean(features**2, axis=0) * 5)  # summed over positions
        assert np.all(gains / sizes <= new.singular_values[0])


@pytest.mark.parametrize("seed", range(5))
def test_of_one_gate_they_are_new_neurons(seed):
    generator = np.random.default_rng(seed)
    rows, wanted = generator.normal(size=(30, 5)), generator.normal(size=(30, 4))
    sums = rows.T @ rows, rows.T @ wanted, 30
    expected = new_neurons(*sums, number=3)
    found = gated_neurons(*sums, 1, number=3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


def test_neurons_of_several_gates_take_turns_by_what_is_left():
    """What the first neuron explains is not found again, whichever gate it has."""
    generator = np.random.default_rng(0)
    rows, wanted = generator.normal(size=(60, 4)), generator.normal(size=(60, 3))
    stacked = np.hstack([gate[:, None] * rows for gate in generator.uniform(size=(2, 60))])
    found = gated_neurons(stacked.T @ stacked, stacked.T @ wanted, 60, 2, number=3)
    rest = wanted
    for place, value in enumerate(found.singular_values):
        tops = [new_neurons(part.T @ part, part.T @ rest, 60, number=1)
                for part in (stacked[:, :4], stacked[:, 4:])]  # fmt: skip
        np.testing.assert_allclose(value, max(one.singular_values[0] for one in tops), rtol=1e-8)
        feature = stacked @ found.fan_in[:, place]
        feature = feature / np.sqrt(np.mean(feature**2))
        rest = rest - np.outer(feature, feature @ rest) / 60
    both = {bool(np.any(one[:4])) for one in found.fan_in.T}
    assert both == {True, False}


def test_a_new_neuron_is_gated_and_scaled_as_one_that_is_there():
    network = growing.gated()
    (group,) = growing.growable(network)
    growth = archscale.grow(
        network.loss, network.params, [network.batch], network.batch, [group], number=2
    )
    params = growth.params
    assert growth.losses[1] < growth.losses[0] and growth.predicted > 0
    for place in (3, 4):
        (like,) = [one for one in range(3)
                   if np.array_equal(params["gate"][:, one], params["gate"][:, place])]  # fmt: skip
        for name in ("gate_bias", "scale"):
            np.testing.assert_allclose(params[name][place], network.params[name][like])
    for name, leaf in network.params.items():
        np.testing.assert_array_equal(params[name][tuple(map(slice, leaf.shape))], leaf)


def test_budgets_count_gates():
    network = growing.gated()
    arguments = network.loss, network.params, [network.batch], network.batch
    groups = growing.growable(network)
    price = 4 + 5 + 4  # of gate, up with its bias, and down
    grown = [archscale.grow(*arguments, groups, threshold=0.0, budget=budget).numbers["gate"]
             for budget in (price - 1, price, 2 * price)]  # fmt: skip
    assert grown == [0, 1, 2]


def test_errors():
    network = growing.gated()
    arguments = network.loss, network.params, [network.batch], network.batch
    with pytest.raises(ValueError, match="'gate' cannot grow by 'gradmax': .* gated by 'gate'"):
        archscale.grow(*arguments, growing.growable(network), method="gradmax", number=1)
    zeros = {name: jnp.zeros_like(network.params[name]) for name in ("gate", "up", "down")}
    with pytest.raises(ValueError, match="'gate' holds no neuron, and a new one is gated as one"):
        archscale.grow(network.loss, network.params | zeros, *arguments[2:],
                       growing.growable(network), number=1)  # fmt: skip


def of_three(p, x):
    return (x @ p["a"]) * jnp.tanh(x @ p["b"]) * jnp.tanh(x @ p["c"]) @ p["w"]


def of_curves(p, x):
    return jnp.tanh(x @ p["a"]) * jnp.tanh(x @ p["b"]) @ p["w"]


def of_two_readers(p, x):
    hidden = (x @ p["a"]) * jax.nn.silu(x @ p["b"])
    return hidden @ p["w"] + jnp.tanh(hidden @ p["c"])


def of_sums(p, x):
    return ((x @ p["a"]) * jax.nn.silu(x @ p["b"]) + jnp.tanh(x @ p["c"])) @ p["w"]


def with_an_offset(p, x):
    return ((x @ p["a"]) * jax.nn.silu(p["o"] + 2 * (x @ p["b"]))) @ p["w"]


SHAPES = {"a": (5, 4), "b": (5, 4), "w": (4, 2)}


@pytest.mark.parametrize(
    "outputs, further, gates",
    [
        (of_three, {"c": (5, 4)}, ("b", "c")),
        (of_curves, {}, None),
        (of_two_readers, {"c": (4, 2)}, None),
        (of_sums, {"c": (5, 4)}, None),
        (with_an_offset, {"o": (4,)}, None),
    ],
    ids=["three", "curves", "two_readers", "sums", "offset"],
)  # fmt: skip
def test_products_of_layers(outputs, further, gates):
    params = draw(0, **SHAPES, **further)
    batch = growing.data(1, 40, (5,), 2)
    group = archscale.contrib.find_neuron_groups(growing.squared(outputs), params, batch)[0]
    if gates is not None:
        assert group.blocker is None and group.gates == gates
        return
    names = ", ".join(repr(name) for name in sorted(group.producers))
    assert (group.blocker or "").startswith(f"{names} are multiplied before")
    assert "contrib.expand" in (group.blocker or "")


def test_empty_slots_stay_empty():
    network = growing.gated()
    groups = growing.growable(network)
    wide, _ = archscale.contrib.widen(network.params, {"gate": 6}, groups)
    gradients = jax.grad(network.loss)(wide, network.batch)
    for name in ("gate", "up"):
        np.testing.assert_array_equal(gradients[name][:, 3:], 0)
    np.testing.assert_array_equal(gradients["down"][3:], 0)
