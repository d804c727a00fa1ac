"""Rates that are matched to what the base's updates do, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from archscale_jax.tuning._measured import (
    GROUPS,
    Measurable,
    group_sizes,
    groups_of,
    matched_multipliers,
    matching,
    measurer,
)
from experiments import matched_again, matched_rules
from tests.devices import on_devices

pytestmark = pytest.mark.quick_compilation

# Of NumPy: a process of several devices imports this module before JAX starts.
X = np.random.default_rng(0).standard_normal((32, 12), np.float32)
LABELS = np.random.default_rng(1).integers(0, 5, 32)


class Mlp(nn.Module):
    depth: int
    width: int
    normalized: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x) if self.normalized else x
            y = nn.Dense(self.width)(nn.gelu(y))
            x = x + nn.Dense(self.width)(nn.relu(y)) if self.residual else y
        return nn.Dense(5)(nn.relu(x))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def planned(model, base=None, optimizer="adam", **options):
    return archscale.parametrize(model, X, base=base, optimizer=optimizer, **options)


def members_of(plan, groups):
    return {name: 1.0 for name, group in groups_of(plan.architecture).items() if group in groups}


def rms(values):
    return np.sqrt(np.mean(np.square(values)))


def approx(value):
    return pytest.approx(value, rel=1e-4, abs=1e-9)


def matched(model, base, optimizer="adam", **options):
    return planned(model, base, optimizer, learning_rate="measured", loss_fn=loss_of, **options)


NETWORKS = {
    "chain": Mlp(2, 8),
    "normalized": Mlp(1, 8, normalized=True),
    "residual": Mlp(1, 8, normalized=True, residual=True),
}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("chain", "adam"), ("residual", "sgd"), ("normalized", "muon")],
)
def test_effects_are_those_of_small_steps(name, optimizer):
    """Central differences along the update of each group, in float64."""
    with jax.enable_x64(True):
        module = NETWORKS[name]
        plan = archscale.parametrize(module, X.astype(jnp.float64), optimizer=optimizer)
        wide = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), plan.init(key))  # noqa: E731
        tx, inputs = plan.optimizer(1.0), (X.astype(jnp.float64),)
        network = Measurable(plan.apply, plan.architecture, wide, tx, inputs)
        key, rows = jax.random.key(3), {**{one: (one,) for one in GROUPS}, "both": GROUPS[:2]}
        found = measurer(network, loss_of)(key, [members_of(plan, one) for one in rows.values()])

        @jax.jit
        def drawn_and_updated(key):
            params = wide(key)
            gradients = jax.grad(lambda params: loss_of(plan.apply(params, *inputs)))(params)
            return params, tx.update(gradients, tx.init(params), params)[0]

        params, update = drawn_and_updated(key)
        groups, tree = groups_of(plan.architecture), jax.tree.structure(params)
        names = list(named_leaves(params))

        @jax.jit
        def outputs(steps):
            steps = jax.tree.unflatten(tree, list(steps))
            moved = jax.tree.map(lambda p, step, u: p + step * u, params, steps, update)
            features = archscale.vertex_features(plan.apply, moved, *inputs)
            return features, plan.apply(moved, *inputs)

        values, _ = outputs(np.zeros(len(names)))
        for row, members in enumerate(rows.values()):
            (z_up, f_up), (z_down, f_down) = (
                outputs(np.array([step * (groups[name] in members) for name in names]))
                for step in (1e-6, -1e-6)
            )
            for column, (vertex, z) in enumerate(values.items()):
                change = rms((z_up[vertex] - z_down[vertex]) / 2e-6)
                assert found.features[row, column] == approx(change / rms(z))
                assert found.spread[row, column] == approx(change / rms(z - np.mean(z, axis=0)))
            assert found.outputs[row] == approx(rms((f_up - f_down) / 2e-6))


@pytest.mark.parametrize(
    ("optimizer", "trained", "power"),
    [(optax.sgd, 0, -1), (optax.sgd, 0.5, -0.5), (optax.adam, 0.5, 0)],
)
def test_features_of_another_size(optimizer, trained, power):
    """Features of c times the size, a linear loss: stems do c^-power of what they do at size 1."""

    def measurable(size):
        def apply(params, x):
            return size * jnp.tanh(x @ params["stem"]) @ params["head"]

        params = {"stem": jnp.eye(12), "head": jnp.ones((12, 5)) / 12}
        draw = lambda key: params | {"head": jax.random.normal(key, (12, 5)) / 12}  # noqa: E731
        architecture = archscale.trace(apply, params, X)
        return Measurable(apply, architecture, draw, optimizer(1.0), (X,))

    parts = matched_multipliers(
        measurable(4.0), measurable(1.0), lambda outputs: jnp.mean(outputs * X[:, :5]),
        trained=trained,
    )  # fmt: skip
    assert parts["stem"].value == pytest.approx(4.0**power, rel=1e-4)
    # The readout reads what is c times as large, whatever its own size.
    assert parts["head"].value == pytest.approx(
        4.0 ** (-2 if optimizer is optax.sgd else -1), rel=1e-4
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_groups_do_what_those_of_the_base_do(optimizer):
    """Together stem and hidden layers change the last features, and the readout the outputs.

    With a readout half-way to outputs as spread as the base's.
    """
    base = planned(Mlp(1, 8), optimizer=optimizer)
    plan = matched(Mlp(2 if optimizer == "adam" else 1, 32), base, optimizer)
    (draws,) = {int(part.symbols["draws"]) for part in plan.measured.values()}
    keys = jax.vmap(jax.random.key)(np.arange(draws))

    def spread(outputs):
        return jnp.sqrt(jnp.mean((outputs - jnp.mean(outputs, axis=0)) ** 2))

    def effects(one, key, scale):
        network = Measurable(one.apply, one.architecture, one.init, one.optimizer(1.0), (X,))
        rows = [members_of(one, GROUPS[:2]), members_of(one, GROUPS[2:])]
        draw = measurer(network, loss_of)(key, rows, scale)
        return jnp.stack([draw.features[0, -1], draw.outputs[1]])

    @jax.jit
    @jax.vmap
    def of_draw(key):
        """What both do, the network's readout between its own size and that of the base."""
        outputs = [spread(one.apply(one.init(key), X)) for one in (plan, base)]
        scale = jnp.sqrt(outputs[1] / outputs[0])
        return effects(plan, key, scale), effects(base, key, 1.0)

    found = np.exp([np.mean(np.log(one), axis=0) for one in of_draw(keys)])
    assert found[0][0] == pytest.approx(found[1][0], rel=0.03)
    assert found[0][1] <= found[1][1] * 1.05
    if optimizer == "adam":
        assert found[0][1] == pytest.approx(found[1][1], rel=0.05)
    reasons = {one["learning_rate_reason"].split("measured ")[1] for one in plan.report().records}
    assert len(reasons) == 3
    assert "batch normalization" not in str(plan.architecture.notes) + str(plan)
    decay = named_leaves(plan.weight_decay)
    for name, rate in named_leaves(plan.learning_rate).items():
        assert rate * decay[name] == pytest.approx(1 if "kernel" in name else 0)


def test_a_network_of_nnx_that_is_the_base_keeps_its_rates():
    class Model(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(12, width, rngs=rngs)
            self.last = nnx.Linear(width, 5, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    small, large = (
        nnx.eval_shape(lambda width=width: Model(width, nnx.Rngs(0))) for width in (8, 16)
    )
    rates = [jax.tree.leaves(matched(one, small).learning_rate) for one in (small, large)]
    assert rates[0] == pytest.approx([1.0] * 4, rel=1e-4)
    assert rates[0] != rates[1]


ERRORS = {
    "no loss": ({"loss_fn": None}, ValueError, "belong together"),
    "a loss alone": ({"learning_rate": "rules"}, ValueError, "belong together"),
    "another way": ({"learning_rate": "measure"}, ValueError, "did you mean 'measured'"),
    "an architecture as base": ({"base": {16: 8}}, TypeError, "found dict"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    options, error, message = ERRORS[name]
    given = {"base": Mlp(1, 16), "learning_rate": "measured", "loss_fn": loss_of} | options
    with pytest.raises(error, match=message):
        planned(Mlp(3, 16), **given)


def test_shapes_cannot_be_measured():
    shape = jax.ShapeDtypeStruct((4, 12), jnp.float32)
    with pytest.raises(ValueError, match=r"needs a batch: inputs hold the shape \(4, 12\)"):
        archscale.parametrize(
            Mlp(3, 16), shape, base=Mlp(1, 16), learning_rate="measured", loss_fn=loss_of
        )


def test_groups_that_do_nothing():
    with pytest.raises(ValueError, match="an update of the stem changes 0 in the network"):
        matched(Mlp(1, 8), Mlp(1, 8), zero_init=("readout",))


class BatchNormalized(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(self.width)(x))
        return nn.Dense(5)(nn.relu(x))


def test_batch_normalization_is_said():
    plan = matched(BatchNormalized(16), BatchNormalized(8))
    assert len([one for one in plan.architecture.notes if "batch normalization" in one]) == 1
    assert "measured rates: outputs of an example" in str(plan)


# Layouts.

LAYERS, WIDTH = 3, 16


def slices(scanned, dtype=jnp.float32):
    """A residual network as a function, with its layers in one leaf or in several, and its draw."""

    def apply(params, x):
        def block(x, kernel):
            return x + jax.nn.relu(x) @ kernel, None

        x = x.astype(dtype) @ params["stem"]
        if scanned:
            x, _ = jax.lax.scan(block, x, params["layers"])
        else:
            for number in range(LAYERS):
                x, _ = block(x, params[f"layer{number}"])
        return jax.nn.relu(x) @ params["head"]

    def draw(key):
        stem, layers, head = (
            (jax.random.normal(one, shape) / np.sqrt(shape[-2])).astype(dtype)
            for one, shape in zip(
                jax.random.split(key, 3), [(12, WIDTH), (LAYERS, WIDTH, WIDTH), (WIDTH, 5)],
                strict=True,
            )
        )  # fmt: skip
        parts = {"layers": layers} if scanned else {f"layer{n}": layers[n] for n in range(LAYERS)}
        return {"stem": stem, "head": head, **parts}

    return apply, draw


def effects_of(scanned, dtype=jnp.float32):
    apply, draw = slices(scanned, dtype)
    plan = archscale.parametrize((apply, jax.eval_shape(draw, jax.random.key(0))), X)
    network = Measurable(apply, plan.architecture, draw, optax.sgd(1.0), (X,))
    rows = [members_of(plan, (group,)) for group in GROUPS]
    measure = measurer(network, lambda logits: loss_of(logits.astype(jnp.float32)))
    return jax.jit(lambda key: measure(key, rows))(jax.random.key(2))


def test_layers_in_one_leaf_and_low_precision():
    """Scanned and separate layers do the same, in float32 and nearly in bfloat16, under jit."""
    expected = effects_of(scanned=False)
    for found, tolerance in ((effects_of(True), 1e-4), (effects_of(True, jnp.bfloat16), 0.03)):
        assert found.features.dtype == jnp.float32
        np.testing.assert_allclose(found.features[:2, -1], expected.features[:2, -1], tolerance)
        np.testing.assert_allclose(found.outputs, expected.outputs, tolerance)


def sharded_rates(data, model):
    """The measured multipliers of a scanned network whose params and batch lie on a mesh."""
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    spec = jax.sharding.PartitionSpec
    places = {"stem": spec(None, "model"), "layers": spec(None, "data", "model"), "head": spec()}

    def on_mesh(width):
        apply, _ = slices(scanned=True)
        shapes = {"stem": (12, width), "layers": (LAYERS, width, width), "head": (width, 5)}
        structs = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, places[name])
            )
            for name, shape in shapes.items()
        }
        return apply, structs

    batch = jax.device_put(X, jax.sharding.NamedSharding(mesh, spec("data")))
    plan = archscale.parametrize(
        on_mesh(4 * WIDTH), batch, base=on_mesh(WIDTH), learning_rate="measured", loss_fn=loss_of
    )
    return jax.device_get(jax.tree.leaves(plan.learning_rate))


def test_shards():
    found = on_devices(sharded_rates, 4, 2)
    assert found == pytest.approx(sharded_rates(1, 1), rel=1e-3)


# The rules of the study.


def measurable(depth):
    plan = planned(Mlp(depth, 8), optimizer="sgd")
    return Measurable(plan.apply, plan.architecture, plan.init, optax.sgd(1.0), (X,))


def test_flerm_shares_what_the_base_does():
    """Hidden kernels together change the outputs as those of the base, one by one."""
    network, base = measurable(2), measurable(1)
    found = matched_rules.multipliers("flerm", network, base, loss_of, draws=1, is_sgd=True)
    sums = []
    for one, factors in ((network, found), (base, dict.fromkeys(found, 1.0))):
        hidden = [
            leaf.name
            for leaf in one.architecture.parameters
            if leaf.layer == "hidden" and leaf.role == "hidden"
        ]
        rows = [{name: factors[name]} for name in hidden]
        outputs = measurer(one, loss_of)(jax.random.key(0), rows).outputs
        sums.append(len(hidden) * np.exp(np.mean(np.log(outputs))))
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)


def test_matching_again_begins_as_the_measured_plan_and_follows_the_base():
    """The first measurement gives the plan's multipliers; a network that is its base keeps all."""
    network, base = Mlp(2, 8), Mlp(1, 8)
    plans = [planned(one, optimizer="sgd") for one in (network, base)]

    def trained(plan, steps, **options):
        tx = optax.chain(
            optax.sgd(1.0),
            matched_again.match_updates(plan.apply, plan.architecture, (X,), every=2, **options),
            optax.scale(0.05),
        )

        @jax.jit
        def step(params, state):
            gradients = jax.grad(lambda params: loss_of(plan.apply(params, X)))(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = plan.init(jax.random.key(0))
        state = tx.init(params)
        for _ in range(steps):
            params, state = step(params, state)
        return params, state[1]

    before, record = trained(plans[1], 6, length=3)
    assert record.multipliers.tolist() == [1, 1, 1] and record.effects.shape == (3, 4)
    after, same = trained(plans[1], 6, base=record.effects)
    assert same.multipliers == pytest.approx(np.ones(3), rel=1e-4)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b), before, after)))
    _, state = trained(plans[0], 1, base=record.effects)
    sizes = []
    for one in plans:
        measurable = Measurable(one.apply, one.architecture, one.init, optax.sgd(1.0), (X,))
        rows = [members_of(one, (group,)) for group in GROUPS]
        sizes.append(group_sizes(measurer(measurable, loss_of)(jax.random.key(0), rows)))
    assert state.multipliers == pytest.approx(np.asarray(matching(*sizes)), rel=1e-4)
