"""GradInit against closed forms, finite differences, and a plain re-derivation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import archscale_jax as archscale
from archscale_jax._trees import parameter_name
from archscale_jax.contrib._gradinit_step import Variant, initial_state, jitted_step
from experiments.lab.models import create_network

pytestmark = pytest.mark.quick_compilation

SETTINGS = {
    "rate": 0.1,
    "penalty": 0.7,
    "scale_rate": 0.01,
    "clip": np.inf,
    "bounds": (0.0, np.inf),
}


@functools.partial(jax.jit, static_argnames="sizes")
def mlp_params(key=0, sizes=(3, 4, 4, 2), scale=1.0):
    keys = jax.random.split(jax.random.key(key), len(sizes))
    return {
        f"layer_{index}": {
            "kernel": scale * jax.random.normal(keys[index], (sizes[index], sizes[index + 1])),
            "bias": 0.3 * jax.random.normal(jax.random.fold_in(keys[-1], index), sizes[index + 1]),
        }
        for index in range(len(sizes) - 1)
    }


def mlp_loss(params, batch):
    inputs, targets = batch
    features = inputs
    for index, layer in enumerate(params.values()):
        features = features @ layer["kernel"] + layer["bias"]
        features = jnp.tanh(features) if index < len(params) - 1 else features
    return jnp.mean(jnp.square(features - targets))


def random_batches(count, size=4, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield generator.normal(size=(size, 3)), generator.normal(size=(size, 2))


def joined(first, second):
    return tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))


# The optimum of the constrained objective, where it is known.


def saddle(params, batch):
    """-θ₁θ₂, whose gradient (-θ₂, -θ₁) is as long as θ."""
    return -params["first"] * params["second"] + 0 * jnp.mean(batch)


@pytest.mark.parametrize(
    ("optimizer", "limit", "penalty"),
    [("plain_sgd", 2.0, 5.0), ("adam", 3.0, None)],
)
def test_optimum_of_a_saddle(optimizer, limit, penalty):
    # One step from θ lowers -θ₁θ₂ the most, for a gradient of a given norm, where θ₁ = θ₂.
    params = {"first": jnp.float32(0.8), "second": jnp.float32(2.0)}
    rescaled, record = archscale.gradinit(
        saddle,
        params,
        itertools.repeat(np.zeros(2)),
        optimizer=optimizer,
        learning_rate=1.0,
        max_gradient_norm=limit,
        scale_learning_rate=1e-2,
        num_steps=2000,
        penalty=penalty,
        clip=np.inf,
    )
    expected = limit / 2 if optimizer == "adam" else limit / np.sqrt(2)
    np.testing.assert_allclose(rescaled["first"], expected, rtol=0.025)
    np.testing.assert_allclose(rescaled["second"], expected, rtol=0.025)
    assert 0 < record.constrained.mean() < 1  # both sides of the limit


# Derivatives.


def derivative(multipliers, params, batches, settings, variant):
    """The derivative by the multipliers, read off the first moment that Adam takes of it."""
    state = initial_state(len(multipliers))._replace(multipliers=multipliers)
    new, record = jitted_step(state, params, batches, settings, variant=variant)
    assert not new.first_moments[int(not of_norm(variant, record))].any()
    return new.first_moments[int(of_norm(variant, record))] / 0.1, record


def of_norm(variant, record):
    return record["constrained"] and not variant.penalised


def lowered(m, start, limit, params, batches, *, optimizer, penalised):
    """What an iteration lowers, from its definition; `start` are the multipliers in A(g)."""
    structure = jax.tree.structure(params)

    def scaled(m):
        return jax.tree.map(lambda one, leaf: one * leaf, structure.unflatten(list(m)), params)

    def flat_gradient(m):
        gradient = jax.grad(mlp_loss)(scaled(m), joined(*batches[:2]))
        return ravel_pytree(gradient)

    gradient, unravel = flat_gradient(start)
    direction = {
        "sgd": gradient / jnp.linalg.norm(gradient),
        "plain_sgd": gradient,
        "adam": jnp.sign(gradient),
    }[optimizer]
    moved = jax.tree.map(lambda p, d: p - SETTINGS["rate"] * d, scaled(m), unravel(direction))
    value = mlp_loss(moved, joined(batches[0], batches[2])) / SETTINGS["rate"]
    norm = jnp.linalg.norm(flat_gradient(m)[0], 1 if optimizer == "adam" else 2)
    if penalised:
        return value + SETTINGS["penalty"] * jnp.maximum(norm - limit, 0)
    return jnp.where(norm > limit, norm, value)


@pytest.mark.parametrize(
    ("optimizer", "second_order", "penalised"),
    [("sgd", False, False), ("sgd", True, True), ("plain_sgd", True, False),
     ("adam", False, True)],
)  # fmt: skip
def test_hypergradient_equals_finite_differences(optimizer, second_order, penalised):
    with jax.enable_x64(True):
        params, batches = mlp_params(), tuple(random_batches(3))
        multipliers = jnp.linspace(0.6, 1.4, 6)
        options = {"optimizer": optimizer, "penalised": penalised}
        variant = Variant(mlp_loss, tuple(range(6)), second_order=second_order, **options)
        value = functools.partial(lowered, params=params, batches=batches, **options)
        values = jax.jit(jax.vmap(value, (0, 0, None)))
        step = 1e-6
        ends = multipliers + np.concatenate([step * np.eye(6), -step * np.eye(6)])
        starts = ends if second_order else jnp.broadcast_to(multipliers, (12, 6))
        for limit in (1e-3, 1e3):
            found, record = derivative(
                multipliers, params, batches, SETTINGS | {"limit": limit}, variant
            )
            upper, lower = np.split(np.asarray(values(ends, starts, limit)), 2)
            expected = (upper - lower) / (2 * step)
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-8)
            assert record["constrained"] == (limit < 1)


def test_groups_sum_the_derivatives_of_their_tensors():
    with jax.enable_x64(True):
        params, batches = mlp_params(), tuple(random_batches(3))
        variant = Variant(mlp_loss, tuple(range(6)), "sgd", second_order=False, penalised=False)
        settings = SETTINGS | {"limit": 1e3}
        single, _ = derivative(jnp.ones(6), params, batches, settings, variant)
        indices = (0, 0, 1, 0, 1, 1)
        variant = variant._replace(indices=indices)
        shared, _ = derivative(jnp.ones(2), params, batches, settings, variant)
        expected = [
            sum(value for value, index in zip(single, indices, strict=True) if index == group)
            for group in (0, 1)
        ]
        np.testing.assert_allclose(shared, expected, rtol=1e-12)


# The whole trajectory.


def plain_gradinit(params, batches, steps, *, optimizer, rate, limit, scale_rate):
    """Theory §7 with dense Hessians, Python branches, and Adam of every multiplier by itself."""
    flat, unravel = ravel_pytree(params)
    owner = np.repeat(np.arange(6), [leaf.size for leaf in jax.tree.leaves(params)])
    is_bias = [path[-1].key == "bias" for path, _ in jax.tree.leaves_with_path(params)]

    def loss(theta, batch):
        return mlp_loss(unravel(theta), batch)

    gradient_of, hessian_of = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))

    m, second, history = np.ones(6), np.zeros(6), []
    first = {"norm": np.zeros(6), "objective": np.zeros(6)}
    count = {"norm": 0, "objective": 0}
    for index in range(steps):
        a, b, c = batches[3 * index : 3 * index + 3]
        theta = m[owner] * flat
        g = np.array(gradient_of(theta, joined(a, b)))
        norm = np.abs(g).sum() if optimizer == "adam" else np.sqrt((g**2).sum())
        direction = np.sign(g) if optimizer == "adam" else g / norm
        branch = "norm" if norm > limit else "objective"
        if branch == "norm":
            slope = np.array(hessian_of(theta, joined(a, b))) @ direction
        else:
            slope = np.array(gradient_of(theta - rate * direction, joined(a, c))) / rate
        derivative = np.array([slope[owner == i] @ flat[owner == i] for i in range(6)])
        derivative = np.clip(derivative, -1, 1)
        count[branch] += 1
        first[branch] = 0.9 * first[branch] + 0.1 * derivative
        second = 0.999 * second + 0.001 * derivative**2
        unbiased = first[branch] / (1 - 0.9 ** count[branch])
        size = np.sqrt(second / (1 - 0.999 ** sum(count.values())))
        m = m - scale_rate * unbiased / (size + 1e-8)
        m = np.array([max(one, 0 if bias else 0.01) for one, bias in zip(m, is_bias, strict=True)])
        history.append(m)
    return np.array(history), count


@pytest.mark.parametrize(("optimizer", "rate", "limit"), [("sgd", 0.1, 0.9), ("adam", 0.02, 4.0)])
def test_trajectory_equals_a_plain_rederivation(optimizer, rate, limit):
    with jax.enable_x64(True):
        params, batches, steps = mlp_params(), list(random_batches(75)), 25
        expected, count = plain_gradinit(
            params, batches, steps, optimizer=optimizer, rate=rate, limit=limit, scale_rate=0.05
        )
        _, record = archscale.gradinit(
            mlp_loss,
            params,
            batches,
            optimizer=optimizer,
            learning_rate=rate,
            max_gradient_norm=limit,
            scale_learning_rate=0.05,
        )
        assert min(count.values()) > 3, count
        assert record.constrained.sum() == count["norm"]
        found = np.stack(list(record.multipliers.values()), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_one_program_does_what_two_do():
    params, batches = mlp_params(), list(random_batches(60))
    optimizer, limit = "sgd", 2.5
    _, record = archscale.gradinit(
        mlp_loss, params, batches, optimizer=optimizer, learning_rate=0.1, max_gradient_norm=limit
    )
    assert 0 < record.constrained.sum() < 20
    variant = Variant(mlp_loss, tuple(range(6)), optimizer, second_order=False, penalised=False)
    settings = SETTINGS | {"limit": limit, "clip": 1.0}
    state = initial_state(6)
    for index in range(20):
        a, b, c = batches[3 * index : 3 * index + 3]
        state, _ = jitted_step(state, params, (a, b, c), settings, variant=variant)
    last = [values[-1] for values in record.multipliers.values()]
    np.testing.assert_allclose(state.multipliers, last, rtol=1e-4)


def test_losses_without_forward_mode():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, cotangent: (2 * x * cotangent,))

    def loss(params, batch):
        return square(jnp.sqrt(mlp_loss(params, batch)))

    params, batches = mlp_params(), list(random_batches(30))
    # The norm's branch, which needs the Hessian.
    _, found = archscale.gradinit(loss, params, batches, max_gradient_norm=1e-3)
    _, expected = archscale.gradinit(mlp_loss, params, batches, max_gradient_norm=1e-3)
    for name, values in expected.multipliers.items():
        np.testing.assert_allclose(found.multipliers[name], values, rtol=1e-4)


# What is returned.


def test_params_are_those_of_the_last_multipliers():
    params = mlp_params()
    rescaled, record = archscale.gradinit(mlp_loss, params, random_batches(30))
    last = {name: values[-1] for name, values in record.multipliers.items()}
    again = archscale.contrib.scale_parameters(params, last)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, rescaled, again))
    assert list(last) == [
        f"layer_{index}/{name}" for index in range(3) for name in ("bias", "kernel")
    ]
    assert len(record.loss) == 10
    assert np.array_equal(np.isnan(record.updated_loss), record.constrained)


def test_record_measures_losses_and_gradients():
    params, batches = mlp_params(), list(random_batches(6))
    _, record = archscale.gradinit(mlp_loss, params, batches)
    first = joined(*batches[:2])
    gradient = jax.jit(jax.grad(mlp_loss))(params, first)
    norms = {
        f"{layer}/{name}": np.linalg.norm(value)
        for layer, values in gradient.items()
        for name, value in values.items()
    }
    np.testing.assert_allclose(record.loss[0], mlp_loss(params, first), rtol=1e-5)
    for name, norm in norms.items():
        np.testing.assert_allclose(record.tensor_gradient_norms[name][0], norm, rtol=1e-4)
    total = np.sqrt(sum(np.square(norm) for norm in norms.values()))
    np.testing.assert_allclose(record.gradient_norm[0], total, rtol=1e-4)


def test_it_lowers_what_it_promises():
    params = mlp_params(scale=3.0)
    _, record = archscale.gradinit(
        mlp_loss, params, random_batches(1200, size=16), scale_learning_rate=0.03
    )
    assert record.gradient_norm[:5].mean() > 2
    assert record.gradient_norm[-50:].mean() < 1.3
    assert record.loss[-50:].mean() < record.loss[:50].mean()


def test_zero_and_frozen_tensors_stay():
    params = mlp_params()
    params["layer_0"]["bias"] = jnp.zeros(4)
    rescaled, record = archscale.gradinit(
        mlp_loss, params, random_batches(30), groups={"layer_1/kernel": None}
    )
    assert jnp.array_equal(rescaled["layer_0"]["bias"], jnp.zeros(4))
    assert np.array_equal(record.multipliers["layer_0/bias"], np.ones(10))
    assert rescaled["layer_1"]["kernel"] is params["layer_1"]["kernel"]
    assert "layer_1/kernel" not in record.multipliers
    assert "layer_1/kernel" not in record.tensor_gradient_norms
    assert not jnp.array_equal(rescaled["layer_2"]["kernel"], params["layer_2"]["kernel"])


def test_frozen_integers_are_passed_through():
    params = mlp_params() | {"table": jnp.arange(3)}
    loss = lambda params, batch: mlp_loss(  # noqa: E731
        {name: params[name] for name in params if name != "table"}, batch
    )
    rescaled, _ = archscale.gradinit(loss, params, random_batches(6), groups={"table": None})
    assert jnp.array_equal(rescaled["table"], jnp.arange(3))


def test_a_bare_array_is_a_tree():
    weight = jax.random.normal(jax.random.key(0), (3, 2))
    rescaled, record = archscale.gradinit(
        lambda weight, batch: jnp.mean(jnp.square(batch[0] @ weight - batch[1])),
        weight,
        random_batches(6),
    )
    assert jnp.array_equal(rescaled, weight * record.multipliers[""][-1])


def test_multipliers_keep_their_bounds():
    batches = list(random_batches(300))
    _, record = archscale.gradinit(
        mlp_loss, mlp_params(), batches, scale_learning_rate=0.3, bounds=(0.5, 1.2)
    )
    kernels = [record.multipliers[f"layer_{index}/kernel"] for index in range(3)]
    biases = [record.multipliers[f"layer_{index}/bias"] for index in range(3)]
    assert np.min(kernels) == np.float32(0.5)
    assert np.max(kernels + biases) == np.float32(1.2)
    assert np.min(biases) < 0.5


def test_another_seed_compiles_nothing():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return mlp_loss(params, batch)

    learn = functools.partial(archscale.gradinit, loss, batches=list(random_batches(6)))
    learn(mlp_params(0), learning_rate=0.1)
    first = len(traces)
    learn(mlp_params(1), learning_rate=0.2)
    assert len(traces) - first <= 1  # the check of the loss's shape


def test_low_precision_keeps_dtypes():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp_params())
    batches = [jax.tree.map(lambda one: one.astype(jnp.bfloat16), b) for b in random_batches(30)]
    rescaled, record = archscale.gradinit(mlp_loss, params, batches)
    assert {leaf.dtype for leaf in jax.tree.leaves(rescaled)} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = archscale.gradinit(mlp_loss, mlp_params(), random_batches(30))
    np.testing.assert_allclose(
        rescaled["layer_2"]["kernel"].astype(np.float32), exact["layer_2"]["kernel"], atol=0.05
    )
    assert record.gradient_norm.dtype == np.float32


# Flax networks, and their architecture.


class Normalized(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.normalization = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, inputs):
        features = self.normalization(self.first(inputs), use_running_average=False)
        return self.second(nnx.relu(features))


def flax_loss(graphdef, state, params, batch):
    network = nnx.merge(graphdef, params, state, copy=True)
    return jnp.mean(jnp.square(network(batch[0]) - batch[1]))


def test_batch_normalization_learns_from_the_batch():
    graphdef, params, state = nnx.split(Normalized(rngs=nnx.Rngs(0)), nnx.Param, ...)
    loss = functools.partial(flax_loss, graphdef, state)
    rescaled, record = archscale.gradinit(loss, params, random_batches(60))
    # The normalization undoes the scale before it up to its ε, and its own scale is learned.
    moved = {name: abs(values[-1] - 1) for name, values in record.multipliers.items()}
    assert moved["normalization/scale"] > 0.01
    names = [parameter_name(p) for p, _ in jax.tree.leaves_with_path(params)]
    scales = rescaled["normalization"]["scale"].get_value()
    np.testing.assert_allclose(scales, record.multipliers["normalization/scale"][-1])
    assert set(names) == set(record.multipliers)


def test_groups_of_vertices():
    graphdef, params, state = nnx.split(
        create_network(
            archscale.dag_graph("2_22_002"),
            (1, 1, 3),
            4,
            2,
            normalization="layer",
            rngs=nnx.Rngs(0),
        ),
        nnx.Param,
        ...,
    )
    inputs = jnp.ones((2, 1, 1, 3))
    architecture = archscale.trace(
        lambda params, x: nnx.merge(graphdef, params, state, copy=True)(x, train=True),
        params,
        inputs,
    )
    groups = archscale.contrib.vertex_groups(architecture)
    assert set(groups) == set(architecture.shapes)
    receivers = architecture.graph.receivers
    for one in architecture.parameters:
        for other in architecture.parameters:
            if one.edge is not None and other.edge is not None:
                same = receivers[one.edge] == receivers[other.edge]
                assert (groups[one.name] == groups[other.name]) == same
    assert all(groups[name] == name for name in groups if name.startswith("normalizations"))
    assert groups["layers/0_2/kernel"] == groups["layers/1_2/kernel"]

    def loss(params, batch):
        network = nnx.merge(graphdef, params, state, copy=True)
        return jnp.mean(jnp.square(network(batch[0].reshape(-1, 1, 1, 3)) - batch[1]))

    _, record = archscale.gradinit(loss, params, random_batches(6), groups=groups)
    last = {name: float(values[-1]) for name, values in record.multipliers.items()}
    assert set(last) == set(groups)
    for name, label in groups.items():
        shared = {last[other] for other in groups if groups[other] == label}
        assert shared == {last[name]}
    assert len(set(last.values())) > 2


# Errors.


def raises(
    match, error: type[Exception] = ValueError, loss=mlp_loss, params=None, batches=None, **options
):
    with pytest.raises(error, match=match):
        archscale.gradinit(
            loss, params or mlp_params(), batches or list(random_batches(6)), **options
        )


def test_bad_losses():
    raises(
        r"must return a scalar, found .*\(4,\)",
        loss=lambda params, batch: jnp.mean(params["layer_0"]["kernel"]) * batch[0][:, 0],
    )
    raises(
        "floating number, found int32",
        error=TypeError,
        loss=lambda params, batch: jnp.int32(mlp_loss(params, batch)),
    )
    raises(
        "loss of the initial params is nan",
        loss=lambda params, batch: jnp.nan * mlp_loss(params, batch),
    )
    raises(
        "gradient norm of the initial params is inf",
        loss=lambda params, batch: 1e30 * mlp_loss(params, batch),
    )


def test_a_loss_that_becomes_nan_is_told_with_its_iteration():
    batches = list(random_batches(30))
    batches[13][0][0, 0] = np.nan
    raises("not finite after iteration 4, whose loss is nan", batches=batches)


def test_bad_params():
    params = mlp_params() | {"table": jnp.arange(3)}
    raises("'table' has dtype int32; .*freezes", error=TypeError, params=params)
    raises("parameter in groups 'layer_9'; accepted are layer_0/bias", groups={"layer_9": None})
    names = [f"layer_{index}/{name}" for index in range(3) for name in ("kernel", "bias")]
    raises("frozen tensors alone", groups=dict.fromkeys(names))
    with pytest.raises(ValueError, match="parameter in multipliers 'other'; accepted are"):
        archscale.contrib.scale_parameters(mlp_params(), {"other": 2.0})


def test_bad_batches():
    raises("batch 5 has arrays .*one size", batches=[*random_batches(5), *random_batches(1, 3)])
    raises("ended in iteration 0 of any; an iteration reads three", batches=random_batches(2))
    raises("ended in iteration 2 of 3", num_steps=3)
    raises("batch 0 has arrays", batches=[(np.float32(1), np.float32(2))] * 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; accepted are sgd, plain_sgd, adam"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, found 0"),
        ({"learning_rate": np.inf}, "learning_rate must be positive"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm must be positive"),
        ({"scale_learning_rate": np.nan}, "scale_learning_rate must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"bounds": (1.5, 2.0)}, "bounds must hold 1"),
        ({"bounds": (-0.5, 2.0)}, "nothing negative"),
        ({"penalty": -1.0}, "penalty must be"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"optimizer": "adam", "second_order": True}, "second_order changes nothing for adam"),
    ],
)
def test_bad_options(options, match):
    raises(match, **options)
