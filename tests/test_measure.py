import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from archscale_jax import initialize, measure_update, predict_learning_rate
from archscale_jax._spaces import dag_graph
from experiments.lab.models import DagCNN, DagMLP
from experiments.lab.training import cross_entropy

LABELS = jnp.array([0, 1, 2, 1])

pytestmark = pytest.mark.quick_compilation


def problem(make, shape):
    """Features and loss of a network, its initial weights and a batch."""
    model = nnx.eval_shape(make)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.jit(lambda key: initialize(key, params, model.architecture()))(jax.random.key(1))
    batch = (jax.random.normal(jax.random.key(2), (len(LABELS), *shape)), LABELS)
    return (
        lambda params, batch: nnx.merge(graphdef, params, rest).features(batch[0]),
        lambda params, batch: cross_entropy(graphdef, params, rest, *batch, train=True)[0],
        params,
        batch,
    )


def mlp():
    graph, dtype = dag_graph("2_12_022"), jnp.result_type(float)
    return problem(lambda: DagMLP(graph, 6, 16, 3, param_dtype=dtype, rngs=nnx.Rngs(0)), (6,))


def cnn():
    graph, dtype = dag_graph("2_12", kernel_size=3), jnp.result_type(float)
    return problem(lambda: DagCNN(graph, 1, 4, 3, param_dtype=dtype, rngs=nnx.Rngs(0)), (5, 5, 1))


@functools.cache
def single():
    """The MLP in single precision."""
    return mlp()


def jitted(features, loss, optimizer=optax.sgd(1.0)):  # noqa: B008
    return jax.jit(functools.partial(measure_update, features, loss, optimizer=optimizer))


@pytest.mark.parametrize(
    ("make", "optimizer"), [(cnn, optax.sgd(1.0, momentum=0.9)), (mlp, optax.adam(1.0))]
)
def test_is_the_change_of_a_small_step(make, optimizer):
    with jax.enable_x64(True):
        features, loss, params, batch = make()
        measured = jitted(features, loss, optimizer)(params, batch)
        step = 1e-6

        @jax.jit
        def before_and_after(params):
            gradients = jax.grad(loss)(params, batch)
            update, _ = optimizer.update(gradients, optimizer.init(params), params)
            after = jax.tree.map(lambda weight, change: weight + step * change, params, update)
            return features(params, batch), features(after, batch)

        for vertex, (old, new) in enumerate(zip(*before_and_after(params), strict=True)):
            absolute = np.mean(np.square((np.asarray(new) - np.asarray(old)) / step))
            assert measured.absolute[vertex] == pytest.approx(absolute, rel=1e-3)
            relative = absolute / np.mean(np.square(old))
            assert measured.relative[vertex] == pytest.approx(relative, rel=1e-3)
            standardized = absolute / np.mean(np.var(np.asarray(old), axis=0))
            assert measured.standardized[vertex] == pytest.approx(standardized, rel=1e-3)


def test_of_one_linear_layer_is_its_closed_form():
    # z = W x and loss = sum(z): the SGD update is -1 xᵀ summed over the batch.
    x = np.array([[1.0, 2.0], [3.0, -1.0]])
    total = x.sum(axis=0)
    measured = measure_update(
        lambda weight, x: [x @ weight], lambda weight, x: jnp.sum(x @ weight),
        jnp.ones((2, 3)), jnp.asarray(x), optax.sgd(1.0),
    )  # fmt: skip
    changes = x @ total
    assert measured.absolute == pytest.approx([np.mean(changes**2)])
    assert measured.relative == pytest.approx([np.mean(changes**2) / np.mean(x.sum(axis=1) ** 2)])
    # z is 3 and 2 in every feature: a variance of 1/4.
    assert measured.standardized == pytest.approx([np.mean(changes**2) * 4])
    with_decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    decayed = measure_update(
        lambda weight, x: [x @ weight], lambda weight, x: jnp.sum(x @ weight),
        jnp.ones((2, 3)), jnp.asarray(x), with_decay,
    )  # fmt: skip
    assert decayed.absolute == pytest.approx([np.mean((x @ (total + 0.5)) ** 2)])


def test_a_shift_of_all_examples_changes_the_relative_size_alone():
    """A bias b to z = W x: the sizes of z where b does not train."""
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def measure(bias):
        features = lambda weight, x: [x @ weight + bias]  # noqa: E731
        loss = lambda weight, x: jnp.mean(jnp.square(x @ weight - 1))  # noqa: E731
        return jitted(features, loss)(jnp.ones((3, 4)), x)

    plain, shifted = measure(0.0), measure(10.0)
    np.testing.assert_allclose(shifted.standardized, plain.standardized, rtol=1e-4)
    assert shifted.relative < 0.1 * plain.relative


def test_one_example_has_no_standardized_size():
    features, loss, params, (images, labels) = single()
    one = jitted(features, loss)(params, (images[:1], labels[:1]))
    assert np.all(np.isinf(one.standardized))
    assert np.all(np.isfinite(one.relative))
    with pytest.raises(
        ValueError, match="'standardized_update' gives the size .* a batch of several"
    ):
        predict_learning_rate(one, one, 0.1)


def test_jitted_is_interpreted_and_grows_with_the_square_of_the_rate():
    params = {name: np.linspace(-1, 2, 12, dtype="f4").reshape(3, 4) for name in ("up", "skip")}
    batch = np.linspace(-2, 1, 6, dtype="f4").reshape(2, 3)

    def features(params, x):
        hidden = jax.nn.relu(x @ params["up"])
        return [hidden, hidden + x @ params["skip"]]

    def loss(params, x):
        return jnp.mean(features(params, x)[-1] ** 2)

    measure = functools.partial(measure_update, features, loss)
    compiled = jitted(features, loss)(params, batch)
    with jax.disable_jit():
        plain = measure(params, batch, optax.sgd(1.0))
        doubled = measure(params, batch, optax.sgd(2.0))
    for one, two, four in zip(compiled, plain, doubled, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)
        np.testing.assert_allclose(4 * two, four, rtol=1e-4)


WARM_UP = optax.linear_schedule(0.0, 1.0, 100)
LATE = {  # an optimizer, how many updates it takes, and the plain one whose change it makes
    "MultiSteps of Adam": (
        optax.MultiSteps(optax.adam(1.0), 3).gradient_transformation(), 3, optax.adam(1.0)),
    "warm-up of Adam": (optax.adam(WARM_UP), 2, optax.adam(0.01)),
    "injected": (optax.inject_hyperparams(optax.sgd)(learning_rate=WARM_UP), 2, optax.sgd(0.01)),
    "both": (
        optax.MultiSteps(optax.sgd(WARM_UP), 2).gradient_transformation(), 4, optax.sgd(0.01)),
    "injected, not late": (optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), 1, optax.sgd(1)),
    "piecewise": (
        optax.sgd(optax.join_schedules([lambda _: 0.0, optax.constant_schedule(1.0)], [20])),
        21, optax.sgd(1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "compiled"), [("MultiSteps of Adam", False), *((name, True) for name in LATE)]
)
def test_of_an_optimizer_that_begins_with_0_is_its_first_change(name, compiled):
    """On the way that the plain optimizer makes with the rate of that update."""
    late, count, plain = LATE[name]
    x, weight = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.ones((2, 3))
    measure = functools.partial(
        measure_update, lambda weight, x: [x @ weight], lambda weight, x: jnp.sum(x @ weight)
    )

    def sizes(optimizer, updates):
        one = functools.partial(measure, optimizer=optimizer, updates=updates)
        return (jax.jit(one) if compiled else one)(weight, x)

    expected = measure(weight, x, plain)
    found = sizes(late, count)
    for sizes_found in (found, sizes(late, count + 50)):
        for one, other in zip(sizes_found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3)
    if count > 1:
        early = sizes(late, count - 1)
        assert not np.any(early.absolute)
        for pair, which in (((early, expected), "target"), ((expected, early), "base")):
            with pytest.raises(ValueError, match=rf"{which} was measured on an update of 0: .*"
                               r"warms up from 0, optax.MultiSteps.*updates=k"):  # fmt: skip
                predict_learning_rate(*pair, 0.1)
    assert predict_learning_rate(found, found, 0.1) == pytest.approx(0.1)


def test_of_an_optimizer_that_never_moves_is_0():
    frozen = measure_update(
        lambda weight, x: [x @ weight], lambda weight, x: jnp.sum(x @ weight),
        jnp.ones((2, 3)), jnp.eye(2), optax.set_to_zero(), updates=5,
    )  # fmt: skip
    assert not np.any(frozen.absolute)
    with pytest.raises(ValueError, match="target was measured on an update of 0"):
        predict_learning_rate(frozen, frozen, 0.1, "absolute_update")


def test_no_update_raises():
    with pytest.raises(ValueError, match="updates must be at least 1, found 0"):
        measure_update(lambda *_: [], lambda *_: jnp.zeros(()), {}, None, optax.sgd(1.0), updates=0)


def test_maps_over_seeds():
    features, loss, params, batch = single()
    seeds = jax.tree.map(lambda weight: jnp.stack([weight, 2 * weight]), params)

    def measure(params):
        return measure_update(features, loss, params, batch, optax.sgd(1.0))

    together = jax.jit(jax.vmap(measure))(seeds)
    assert together.absolute.shape == (2, 4)
    alone = jax.jit(measure)(jax.tree.map(lambda weight: 2 * weight, params))
    np.testing.assert_allclose(together.absolute[1], alone.absolute, rtol=1e-4)


@jax.custom_vjp
def multiply(x, weight):
    return x @ weight


multiply.defvjp(
    lambda x, weight: (x @ weight, (x, weight)),
    lambda kept, change: (change @ kept[1].T, kept[0].T @ change),
)


@pytest.mark.parametrize(
    ("transform", "mapped"),
    [(jax.jit, False), (lambda measure: jax.jit(jax.vmap(measure)), True)],
    ids=["jit", "vmap"],
)
def test_of_functions_without_forward_mode(transform, mapped):
    """Layers with a custom_vjp, and relu and max between them, against the same without."""

    def measure(product, params):
        def features(params, x):
            first = product(x, params[0])
            second = product(jnp.maximum(jax.nn.relu(first), params[2]), params[1])
            return [first, second, second + first]

        return measure_update(
            features,
            lambda params, x: jnp.sum(jnp.square(features(params, x)[-1])),
            params,
            inputs,
            optax.sgd(1.0),
        )

    with jax.enable_x64(True):
        key = jax.random.key(0)
        inputs = jax.random.normal(key, (5, 3))
        params = [jax.random.normal(key, shape) for shape in [(2, 3, 4), (2, 4, 4), (2, 4)]]
        if not mapped:
            params = [weights[0] for weights in params]
        found = transform(functools.partial(measure, multiply))(params)
        expected = transform(functools.partial(measure, jnp.matmul))(params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), found, expected)


def test_an_error_of_the_features_is_theirs():
    with pytest.raises(TypeError, match="of the model"):
        measure_update(
            lambda params, batch: (_ for _ in ()).throw(TypeError("of the model")),
            lambda params, batch: jnp.sum(params),
            jnp.ones(2),
            None,
            optax.sgd(1.0),
        )
