"""Growth against automatic differentiation, explicit patches and dense least squares."""

import dataclasses
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale
from archscale_jax._architecture import named_leaves
from archscale_jax.contrib._growth.extension import extend, extended
from archscale_jax.contrib._growth.measured import Measured, measure
from archscale_jax.contrib._growth.neurons import new_neurons
from archscale_jax.contrib._growth.solve import predicted_decrease, solve
from archscale_jax.contrib._growth.widen import occupied
from tests import growing

pytestmark = pytest.mark.quick_compilation


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


SLOTS = 8


class Case(NamedTuple):
    """A network with slots, so that whatever grows has the same shapes, and compiles once."""

    network: growing.Network
    groups: list[archscale.contrib.NeuronGroup]
    params: Any
    outputs: Any
    curvature: Any
    measured: dict[bool, Measured]
    methods: tuple[str, ...]


@pytest.fixture(scope="module", params=[one for one in growing.NETWORKS if one != "dag_cnn"])
def case(request):
    with jax.enable_x64(True):
        network = growing.NETWORKS[request.param]()
        groups = growing.growable(network)
        params, _ = archscale.contrib.widen(
            network.params, dict.fromkeys(names(groups), SLOTS), groups
        )

        @jax.jit
        def curvature(extension):
            def along(amplitude):
                return network.loss(extended(extension, amplitude), network.batch)

            return 0.5 * jax.grad(jax.grad(along))(0.0)

        has_kernels = any(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
        measured = {
            restricted: measure(
                network.loss, params, [network.batch], groups, restricted=restricted
            )
            for restricted in (False, True)[: 1 + has_kernels]
        }
        outputs = jax.jit(network.outputs)
        methods = "tiny", *["random"] * (request.param in ("chain", "gated", "normalized"))
        yield Case(network, groups, params, outputs, curvature, measured, methods)


def names(groups):
    return [one.name for one in groups]


def test_predicted_decrease_is_the_derivative(case):
    """-½ d²L/dγ² at γ = 0 by automatic differentiation."""
    choices = itertools.product(case.measured.items(), case.methods)
    for (restricted, measured), method in choices:
        chosen = case.groups
        neurons = solve(
            case.params, measured, chosen, method=method, number=2, restricted=restricted,
            key=jax.random.key(3),
        )  # fmt: skip
        for update in (False, True):
            extension = extend(
                case.params, chosen, neurons, measured, restricted=restricted, update=update
            )
            expected = predicted_decrease(neurons, measured, chosen, update=update)
            assert abs(expected) > 1e-6
            # Slopes hold four digits.
            np.testing.assert_allclose(-case.curvature(extension), expected, rtol=2e-3)


def test_the_remainder_is_of_second_order():
    network = growing.chain()  # tanh: no curvature at 0
    groups = growing.growable(network)
    measured = measure(network.loss, network.params, [network.batch], groups)
    neurons = solve(network.params, measured, groups, number=3)
    extension = extend(network.params, groups, neurons, measured, update=True)
    expected = predicted_decrease(neurons, measured, groups, update=True)
    squares = np.geomspace(1e-4, 1e-2, 6)
    before = jax.jit(network.loss)(network.params, network.batch)

    @jax.jit
    @jax.vmap
    def losses(square):
        return network.loss(extended(extension, jnp.sqrt(square)), network.batch)

    rest = np.abs(losses(squares) - before + squares * expected)
    slope = np.polyfit(np.log(squares), np.log(rest), 1)[0]
    assert 1.9 < slope < 2.1


def patches(images, size, stride):
    """What every output of a SAME convolution reads, by loops: [n, positions, size² c]."""
    images = np.asarray(images)
    count, height, width, channels = images.shape
    found = []
    rows, columns = -(-height // stride), -(-width // stride)
    spare = [(out - 1) * stride + size - full for out, full in ((rows, height), (columns, width))]
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride - spare[0] // 2, column * stride - spare[1] // 2
            patch = np.zeros((count, size, size, channels))
            for y in range(size):
                for x in range(size):
                    if 0 <= top + y < height and 0 <= left + x < width:
                        patch[:, y, x] = images[:, top + y, left + x]
            found.append(patch.reshape(count, -1))
    return np.stack(found, axis=1)


def test_convolutions_equal_the_dense_problem_on_unfolded_images():
    network = growing.flattened()
    first = next(one for one in growing.growable(network) if one.name == "k1")
    params, (inputs, targets) = network.params, network.batch
    measured = measure(network.loss, params, [network.batch], [first], cutoff=1e-12)

    rows = patches(inputs, 3, 1)
    rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
    kernel = np.vstack([params["k1"].reshape(-1, 3), params["b1"]])
    hidden = np.tanh(rows @ kernel).reshape(len(rows), 4, 4, 3)
    read = patches(hidden, 3, 2)
    before = read @ np.asarray(params["k2"]).reshape(-1, 2)
    error = np.tanh(before).reshape(len(rows), -1) @ params["w"] - targets
    wanted = -2 * (error @ params["w"].T).reshape(before.shape) * (1 - np.tanh(before) ** 2)
    flat = read.reshape(-1, read.shape[-1])
    best, *_ = np.linalg.lstsq(flat, wanted.reshape(-1, 2), rcond=None)
    np.testing.assert_allclose(
        measured.bottlenecks["k2"].update["k2"].reshape(-1, 2), best, rtol=1e-6, atol=1e-9
    )
    rest = wanted - read @ best
    # A new channel is one more image that the second convolution reads patches of.
    images = rows.reshape(len(rows), 4, 4, -1)
    seen = patches(images, 3, 2).reshape(len(rows), 4, 9, -1)
    projected = np.einsum("npja,npo->ajo", seen, rest).reshape(rows.shape[-1], -1)
    found = measured.pairs["k1"]
    np.testing.assert_allclose(found.before, np.einsum("npa,npb->ab", rows, rows), rtol=1e-9)
    np.testing.assert_allclose(found.projected, projected, rtol=1e-8, atol=1e-9)
    dense = new_neurons(np.einsum("npa,npb->ab", rows, rows), projected, len(rows), number=3)
    new = solve(params, measured, [first], number=3)["k1"]
    np.testing.assert_allclose(new.singular_values, dense.singular_values, rtol=1e-8)
    np.testing.assert_allclose(
        new.fan_in @ new.fan_out, dense.fan_in @ dense.fan_out, rtol=1e-6, atol=1e-9
    )


def test_amplitude_0_changes_nothing_bit_for_bit(case):
    neurons = solve(case.params, case.measured[False], case.groups, number=2)
    extension = extend(case.params, case.groups, neurons, case.measured[False], update=True)
    inputs = case.network.batch[0]
    before = case.outputs(case.params, inputs)
    np.testing.assert_array_equal(case.outputs(extended(extension, 0.0), inputs), before)
    assert np.max(np.abs(case.outputs(extended(extension, 1.0), inputs) - before)) > 1e-6


def test_new_slots_change_nothing(case):
    inputs = case.network.batch[0]
    narrow = case.outputs(case.network.params, inputs)
    np.testing.assert_allclose(case.outputs(case.params, inputs), narrow, rtol=1e-10, atol=1e-13)
    for one in case.groups:
        assert occupied(case.params, one).sum() == occupied(case.network.params, one).sum()
    back = archscale.contrib.compact(case.params, case.groups)
    for name, leaf in named_leaves(case.network.params).items():
        np.testing.assert_array_equal(named_leaves(back)[name], leaf)


def test_grown_networks_equal_compact_ones_and_keep_slots_empty(case):
    network, groups, outputs = case.network, case.groups, case.outputs
    optimizer = optax.adam(1e-2)
    growth = archscale.grow(
        network.loss, case.params, [network.batch], network.batch, groups, number=1,
        optimizer=lambda params: optimizer, optimizer_state=optimizer.init(case.params),
    )  # fmt: skip
    assert growth.losses[1] < growth.losses[0]
    small = archscale.contrib.compact(growth.params, groups)
    inputs = network.batch[0]
    np.testing.assert_allclose(
        outputs(small, inputs), outputs(growth.params, inputs), rtol=1e-10, atol=1e-12
    )
    for one in groups:
        added = occupied(growth.params, one).sum() - occupied(case.params, one).sum()
        assert added == growth.numbers[one.name] == 1
        assert np.all(occupied(small, one))

    # Training leaves empty slots empty.
    @jax.jit
    def step(params, state):
        gradients = jax.grad(network.loss)(params, network.batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = growth.params, growth.optimizer_state
    for _ in range(3):
        params, state = step(params, state)
    assert archscale.contrib.count_neurons(params, groups) == archscale.contrib.count_neurons(
        growth.params, groups
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.masked(optax.adam(1e-3), {"w1": True, "b1": False, "w2": True, "b2": True,
                                        "w3": False}),
    ],
    ids=["momentum", "adamw", "chain", "masked"],
)  # fmt: skip
def test_moments_are_carried_over(optimizer):
    network = growing.chain()
    groups = growing.growable(network)
    params = jax.tree.map(np.asarray, network.params)
    gradients = jax.tree.map(lambda leaf: np.full_like(leaf, 0.1), params)
    start, update = jax.jit(optimizer.init), jax.jit(optimizer.update)
    _, state = update(gradients, start(params), params)
    wide, new_state = archscale.contrib.widen(
        params, {"w1": 7, "w2": 5}, groups, optimizer_state=state
    )
    like = start(wide)
    assert jax.tree.structure(like) == jax.tree.structure(new_state)
    for old, new, shape in zip(*map(jax.tree.leaves, (state, new_state, like)), strict=True):
        assert new.shape == shape.shape
        np.testing.assert_array_equal(new[tuple(slice(size) for size in old.shape)], old)
        assert np.count_nonzero(new) == np.count_nonzero(old)
    update(jax.tree.map(np.ones_like, wide), new_state, wide)


def test_new_neurons_have_the_second_moments_of_others():
    """The optimizer of the larger network multiplies gradients by 4/7, which moments follow."""
    network = growing.chain()
    groups = growing.growable(network)

    def optimizer(params):
        return optax.chain(optax.scale(4 / params["w1"].shape[1]), optax.adam(1e-2))

    @jax.jit
    def step(params, state):
        gradients = jax.grad(network.loss)(params, network.batch)
        updates, state = optimizer(params).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(network.params, optimizer(network.params).init(network.params))
    growth = archscale.grow(
        network.loss, params, [network.batch], network.batch, groups[:1], number=3, threshold=0.0,
        optimizer=optimizer, optimizer_state=state,
    )  # fmt: skip
    assert growth.params["w1"].shape == (5, 7)
    old, new = state[1][0], growth.optimizer_state[1][0]
    assert new.count == old.count
    for name, axis in {"w1": 1, "b1": 0, "w2": 0}.items():
        mu, nu = 4 / 7 * old.mu[name], (4 / 7) ** 2 * old.nu[name]
        first = jnp.take(mu, jnp.arange(3), axis), jnp.take(nu, jnp.arange(3), axis)
        mu, nu = (jnp.concatenate(one, axis) for one in ([mu, 0 * first[0]], [nu, first[1]]))
        np.testing.assert_allclose(new.mu[name], mu, rtol=1e-6)
        np.testing.assert_allclose(new.nu[name], nu, rtol=1e-6)
    np.testing.assert_allclose(new.nu["w3"], (4 / 7) ** 2 * old.nu["w3"], rtol=1e-6)
    _, after = step(growth.params, growth.optimizer_state)
    assert jax.tree.structure(after) == jax.tree.structure(growth.optimizer_state)
    with pytest.raises(TypeError, match="optimizer and optimizer_state belong together"):
        archscale.grow(
            network.loss, params, [network.batch], network.batch, groups, optimizer_state=state
        )
    with pytest.raises(TypeError, match="a function from params .* found a Gradient"):
        archscale.grow(
            network.loss, params, [network.batch], network.batch, groups,
            optimizer=optax.adam(1e-2), optimizer_state=state,
        )  # fmt: skip


def test_states_of_other_shapes_raise():
    network = growing.chain()
    groups = growing.growable(network)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=2).init(network.params)
    with pytest.raises(ValueError, match=r"holds \(4,\) for 'w1', which has \(5, 4\)"):
        archscale.contrib.widen(network.params, {"w1": 7}, groups, optimizer_state=state)


def test_nothing_is_missing_where_the_layer_can_express_the_change():
    network = growing.chain()
    hidden = jnp.tanh(jnp.asarray(np.random.default_rng(0).normal(size=(40, 3))))

    # V of the readout is linear in what it reads if the targets are.
    def outputs(params, inputs):
        return inputs @ params["w3"]

    wanted = hidden @ jnp.ones((3, 2))
    found = archscale.bottleneck(
        growing.squared(outputs), {"w3": network.params["w3"]}, [(hidden, wanted)]
    )
    assert found["w3"].relative < 1e-12


def test_gradmax_and_random_are_what_they_say():
    network = growing.chain()
    groups = growing.growable(network)[:1]
    options = {"number": 2, "groups": groups, "held_out": network.batch}
    arguments = network.loss, network.params, [network.batch]
    gradmax = archscale.grow(*arguments, method="gradmax", **options)
    assert gradmax.amplitude == 1 and gradmax.losses[0] == gradmax.losses[1]
    leaves = named_leaves(gradmax.params)
    assert np.all(leaves["w1"][:, 4:] == 0) and np.all(leaves["b1"][4:] == 0)
    # The gradient by the new fan-ins is as large as that of no other orthonormal fan-outs.
    norms = np.linalg.norm(leaves["w2"][4:], axis=1)
    np.testing.assert_allclose(norms, np.sqrt(np.mean(np.sum(leaves["w2"][:4] ** 2, axis=1))))

    @jax.jit
    def size(fan_out):
        params = {**leaves, "w2": leaves["w2"].at[4:].set(fan_out)}
        gradients = jax.grad(network.loss)(params, network.batch)
        return jnp.sum(gradients["w1"][:, 4:] ** 2) + jnp.sum(gradients["b1"][4:] ** 2)

    best = size(leaves["w2"][4:])
    for seed in range(5):
        rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
        assert size(rotation[:2] * norms[0]) <= best * (1 + 1e-9)

    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    params = [
        named_leaves(archscale.grow(*arguments, method="random", key=key, normalize=True,
                                    amplitudes=(0.5,), **options).params)["w1"]
        for key in keys
    ]  # fmt: skip
    np.testing.assert_array_equal(params[0], params[1])
    assert np.any(params[0] != params[2])


def test_numbers_follow_count_threshold_and_budget():
    network = growing.chain()
    groups = growing.growable(network)
    arguments = network.loss, network.params, [network.batch], network.batch, groups
    growth = archscale.grow(*arguments, threshold=0.0)
    values = growth.singular_values
    some = np.sort(np.concatenate(list(values.values())))[2]
    above = archscale.grow(*arguments, threshold=some * 0.999)
    assert {name: len(one) for name, one in above.singular_values.items()} == {
        name: max(int(np.sum(one >= some * 0.999)), 1) for name, one in values.items()
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    for budget in (9, 20, 30):  # a neuron of w1 costs 6 + 3, of w2 5 + 2
        grown = archscale.grow(*arguments, threshold=0.0, budget=budget).params
        added = sum(leaf.size for leaf in jax.tree.leaves(grown)) - count
        assert budget - 9 < added <= budget
    named = archscale.grow(*arguments, number={"w1": 2, "w2": 1}, threshold=0.0)
    assert named.numbers == {"w1": 2, "w2": 1}


def test_nothing_is_added_that_does_not_help():
    network = growing.chain()
    groups = growing.growable(network)
    growth = archscale.grow(
        network.loss, network.params, [network.batch], network.batch, groups, number=1,
        amplitudes=(0.0, 1e6),
    )  # fmt: skip
    assert growth.amplitude == 0 and set(growth.numbers.values()) == {0}
    assert growth.params is network.params


def test_the_architecture_counts_neurons_not_slots():
    network = growing.graph("2_22", None)
    groups = growing.growable(network)
    wide, _ = archscale.contrib.widen(network.params, {one.name: 6 for one in groups}, groups)
    batch = network.batch
    found = archscale.contrib.grown_architecture(network.loss, wide, batch, groups)
    plain = archscale.trace(network.loss, network.params, batch)
    for one, other in zip(found.parameters, plain.parameters, strict=True):
        assert dataclasses.replace(one, shape=other.shape, uses=other.uses, filled=None) == other
        own, theirs = ([(use.kind, use.edge, use.contracted, use.output) for use in each.uses]
                       for each in (one, other))  # fmt: skip
        assert own == theirs
    growth = archscale.grow(network.loss, wide, [batch], batch, groups, number=1, normalize=True)
    multipliers = archscale.learning_rate_multipliers(growth.architecture, plain, width_rule="sgd")
    assert multipliers["readout/kernel"] == pytest.approx(3 / 4)
    assert multipliers["stem/kernel"] == pytest.approx(4 / 3)
    assert multipliers["layers/0_1/kernel"] == 1
    archscale.scale_by_architecture(growth.architecture, plain, width_rule="sgd").init(
        growth.params
    )


def test_neurons_that_are_there_are_not_found_again():
    """TINY's neurons and δW* in full: what they do is no longer asked for."""
    network = growing.chain(activation=lambda x: x)
    groups = growing.growable(network)[1:]
    measured = measure(network.loss, network.params, [network.batch], groups)
    neurons = solve(network.params, measured, groups, threshold=0.0)
    assert np.all(neurons["w2"].singular_values > 0)
    target = measured.pairs["w2"].projected / 40
    made = neurons["w2"].fan_in @ neurons["w2"].fan_out
    covariance = measured.pairs["w2"].before / 40
    np.testing.assert_allclose(covariance @ made, target, atol=1e-9)


def test_errors():
    network = growing.chain()
    groups = archscale.contrib.find_neuron_groups(network.loss, network.params, network.batch)
    arguments = network.loss, network.params, [network.batch], network.batch

    def raises(match, *found: Any, **options):
        given: Any = found or (*arguments, growing.growable(network))
        with pytest.raises(ValueError, match=match):
            archscale.grow(*given, **options)

    raises("'w3' cannot grow: no layer follows", *arguments, groups)
    raises("groups is empty", *arguments, [])
    raises("batches is empty", *arguments[:2], [], network.batch, groups[:1])
    raises(
        "accepted is a list of batches", *arguments[:2], network.batch, network.batch, groups[:1]
    )
    raises("method 'best'; accepted are tiny, gradmax, random", method="best")
    raises("'random' needs a key", method="random", number=1)
    raises("number must be None or an integer of at least 1, found 0", number=0)
    raises("number must be None or an integer of at least 1, found 1.5", number=1.5)
    raises(r"batches\[1\] holds no example", *arguments[:2],
           [network.batch, jax.tree.map(lambda array: array[:0], network.batch)], network.batch,
           groups[:1])  # fmt: skip
    with pytest.raises(TypeError, match="groups must be of find_neuron_groups, found 'w1'"):
        archscale.grow(*arguments, cast(Any, ["w1"]))
    with pytest.raises(TypeError, match="params holds no values at 'b1'"):
        archscale.grow(network.loss, jax.eval_shape(lambda: network.params), *arguments[2:], groups)
    raises("budget must be", budget=-3)
    raises("amplitudes must be", amplitudes=(-1.0,))
    few = jax.tree.map(lambda array: array[:4], network.batch)
    raises("'w1' has 6 inputs; their covariance needs at least 6 examples of 1 positions, "
            "found 4", *arguments[:2], [few], few, groups[:1])  # fmt: skip
    dead = {**network.params, "w3": jnp.zeros((3, 2))}
    raises("'w1' is dead: the gradients", network.loss, dead, *arguments[2:], groups[:1])
    zeros = jnp.zeros((40, 5)), network.batch[1]
    raises("'w1' is dead: the inputs", *arguments[:2], [zeros], zeros, groups[:1])
    broken = jax.tree.map(lambda array: array * jnp.nan, network.batch)
    raises("not finite", *arguments[:2], [broken], broken, groups[:1])
    raises("loss on held_out is nan", *arguments[:3], broken, groups[:1])

    def stiff(params, batch):  # as a module of fixed features
        assert params["w1"].shape == (5, 4)
        return network.loss(params, batch)

    with pytest.raises(ValueError, match="does not take the wider arrays"):
        archscale.grow(stiff, *arguments[1:], growing.growable(network)[:1])
    with pytest.raises(ValueError, match="capacity of .w1. is 4, found 2"):
        archscale.contrib.widen(network.params, {"w1": 2}, groups)
    with pytest.raises(ValueError, match="neuron group in capacity .w9.; accepted are"):
        archscale.contrib.widen(network.params, {"w9": 2}, groups)


def test_a_growth_of_known_shapes_calls_the_loss_for_its_architecture_and_its_shape_alone():
    calls = []

    def loss(params, batch):
        calls.append(batch)
        return jnp.mean((jax.nn.relu(batch @ params["w1"]) @ params["w2"] - 1.0) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w1": jax.random.normal(keys[0], (3, 2)), "w2": jax.random.normal(keys[1], (2, 2))}
    batch = jax.random.normal(keys[2], (16, 3))
    (group, _) = archscale.contrib.find_neuron_groups(loss, params, batch)
    first = archscale.grow(loss, params, [batch[:8], batch[8:]], batch, [group], number=1)
    assert first.numbers == {"w1": 1} and calls
    calls.clear()
    again = archscale.grow(loss, params, [batch[:8], batch[8:]], batch, [group], number=1)
    assert len(calls) <= 2
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    whole = archscale.grow(loss, params, [batch], batch, [group], number=1)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6),
                 whole.params, first.params)  # fmt: skip
    assert whole.bottlenecks["w2"].relative == pytest.approx(first.bottlenecks["w2"].relative)
