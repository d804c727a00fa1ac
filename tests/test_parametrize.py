"""One call for models of four frameworks and for functions: `parametrize`."""

import dataclasses
import functools
import importlib
import itertools
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import archscale_jax as archscale
from archscale_jax import _deprecated
from archscale_jax._trees import named_leaves
from archscale_jax.tracing.starts import constant_leaves

pytestmark = pytest.mark.quick_compilation

X = jnp.ones((4, 8))
KEY = jax.random.key(0)


class LinenMlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


class NnxMlp(nnx.Module):
    def __init__(self, width, rngs):
        sizes = (8, width, width, 3)
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class EquinoxMlp(eqx.Module):
    layers: list

    def __init__(self, width, key):
        sizes, keys = (8, width, width, 3), jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Linear(i, o, key=k)
            for (i, o), k in zip(itertools.pairwise(sizes), keys, strict=True)
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def function_params(width):
    sizes = (8, width, width, 3)
    return [
        {
            "w": jax.ShapeDtypeStruct((i, o), jnp.float32),
            "b": jax.ShapeDtypeStruct((o,), jnp.float32),
        }
        for i, o in itertools.pairwise(sizes)
    ]


def function_mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


MODELS = {
    "linen": (LinenMlp, X),
    "nnx": (lambda width: nnx.eval_shape(lambda: NnxMlp(width, nnx.Rngs(0))), X),
    "equinox": (lambda width: EquinoxMlp(width, KEY), X[0]),
    "haiku": (
        lambda width: hk.transform(lambda x: hk.nets.MLP([width, width, 3])(x)),
        X,
    ),
    "haiku without key": (
        lambda width: hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP([width, width, 3])(x))
        ),
        X,
    ),
    "function": (lambda width: (function_mlp, function_params(width)), X),
}


@functools.cache
def model_of(name, width):
    return MODELS[name][0](width)


@functools.cache
def planned(name, optimizer="adam"):
    x, (model, base) = MODELS[name][1], (model_of(name, width) for width in (64, 16))
    return archscale.parametrize(model, x, base=base, optimizer=optimizer), x


def weights(tree):
    """The leaves of two axes, in order of the layers."""
    return [leaf for leaf in named_leaves(tree).values() if np.ndim(leaf) == 2]


def by_role(plan, tree):
    values = named_leaves(tree, is_leaf=lambda one: one is None)
    return [
        (str(one.role), str(one.layer), values[one.name])
        for one in sorted(plan.architecture.parameters, key=lambda one: (one.edge or -1, one.role))
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_frameworks_agree(name, optimizer):
    """SGD: s, s/r, 1/r; Adam: 1, 1/r, 1/r at r = s = 4 [μP]; readouts 1/√16 · 16/64."""
    plan, _ = planned(name, optimizer)
    rates = {
        "sgd": {"input": 4.0, "hidden": 1.0, "readout": 0.25},
        "adamw": {"input": 1.0, "hidden": 0.25, "readout": 0.25},
        "muon": {"input": 1.0, "hidden": 1.0, "readout": 0.25},
    }[optimizer]
    deviations = {"input": (2 / 8) ** 0.5, "hidden": (2 / 64) ** 0.5, "readout": 16**-0.5 * 16 / 64}
    found = {one["path"]: one for one in plan.report().records}
    tolerance = 0.02 if name == "equinox" else 1e-6  # its biases are drawn, and add to the moments
    for one in plan.architecture.parameters:
        record = found[one.name]
        if str(one.role) in rates:
            assert named_leaves(plan.learning_rate)[one.name] == pytest.approx(rates[one.role])
            std = named_leaves(plan.init_std, is_leaf=lambda leaf: leaf is None)[one.name]
            assert std == pytest.approx(deviations[one.role], rel=tolerance)
            assert record["weight_decay_multiplier"] == pytest.approx(1 / rates[one.role])
        else:
            assert record["weight_decay_multiplier"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_init_draws_what_it_promises_and_apply_is_the_model(name):
    plan, x = planned(name)
    params = plan.init(KEY)
    drawn = named_leaves(params)
    for path, std in named_leaves(plan.init_std, is_leaf=lambda leaf: leaf is None).items():
        if std is None and name != "equinox":
            assert not np.any(drawn[path])
        elif std is not None:
            size = drawn[path].size
            assert np.std(drawn[path]) == pytest.approx(std, rel=4 / np.sqrt(2 * size))
    shapes = jax.eval_shape(plan.init, KEY)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    jitted = jax.jit(plan.init)(KEY)
    assert jax.tree.all(jax.tree.map(np.array_equal, jitted, params))
    model = model_of(name, 64)
    if name == "linen":
        expected = model.apply(params, x)
    elif name == "nnx":
        expected = nnx.merge(nnx.graphdef(model), params)(x)
    elif name == "equinox":
        expected = eqx.combine(params, model)(x)
    elif name == "haiku":
        expected = model.apply(params, KEY, x)
    elif name == "function":
        expected = function_mlp(params, x)
    else:
        expected = model.apply(params, x)
    np.testing.assert_allclose(plan.apply(params, x), expected, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_bases_in_every_form_agree(name):
    x, model = MODELS[name][1], model_of(name, 64)
    expected = named_leaves(planned(name)[0].learning_rate)
    small = archscale.parametrize(model_of(name, 16), x)
    for base in (small, small.architecture, {64: 16}):
        found = archscale.parametrize(model, x, base=base)
        assert named_leaves(found.learning_rate) == expected
    assert set(named_leaves(small.learning_rate).values()) == {1.0}
    assert "tune the rate" in str(small)


@pytest.mark.parametrize("name", MODELS)
def test_an_update_of_sgd_is_rate_times_gradient_and_decay(name):
    """-η_p (g + λ_p W), leaf by leaf."""
    plan, _ = planned(name, "sgd")
    params = plan.init(KEY)
    gradients = jax.tree.map(jnp.ones_like, params)
    tx = plan.optimizer(learning_rate=0.1, weight_decay=0.5)
    updates, _ = tx.update(gradients, tx.init(params), params)
    rates, decays = named_leaves(plan.learning_rate), named_leaves(plan.weight_decay)
    for path, update in named_leaves(updates).items():
        weight = named_leaves(params)[path]
        expected = -0.1 * rates[path] * (1 + 0.5 * decays[path] * weight)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_a_base_trained_by_the_plan_is_trained_by_optax():
    plan = archscale.parametrize(LinenMlp(16), X, optimizer="adamw")
    params = plan.init(KEY)
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    theirs = optax.adamw(1e-2, weight_decay=0.1, mask=mask)
    ours = plan.optimizer(1e-2, weight_decay=0.1)

    def trained(tx):
        @jax.jit
        def step(p, state):
            gradients = jax.grad(lambda p: jnp.square(plan.apply(p, X)).mean())(p)
            updates, state = tx.update(gradients, state, p)
            return optax.apply_updates(p, updates), state

        p, state = params, tx.init(params)
        for _ in range(5):
            p, state = step(p, state)
        return p

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        trained(ours),
        trained(theirs),
    )


def test_the_report_says_first_what_must_be_seen_to():
    plan = archscale.parametrize(Regularized(16), X, model_kwargs={"train": True})
    text = str(plan)
    assert text.index("left at 0 before training") < text.index("path ")
    assert "initialize(" not in text
    assert "decay ×" in text
    assert "params/Dense_1/kernel" in plan._repr_html_()
    keys = {"path", "standard_deviation", "learning_rate_multiplier", "weight_decay_multiplier"}
    assert keys <= set(plan.report().records[0])


# Models with state, random numbers, and starts of their own.


class Regularized(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool, scale=None):
        x = nn.Dense(self.width)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train, rng_collection="noise")(x)
        x = nn.Dense(self.width, kernel_init=nn.initializers.zeros)(x)
        gain = self.param("gain", nn.initializers.constant(0.25), (self.width,))
        decay = self.param("decay", lambda key: -jnp.arange(1.0, self.width + 1))
        return nn.Dense(3)(x * gain * jnp.exp(decay))


def test_linen_with_batch_norm_dropout_and_starts_of_its_own():
    plan = archscale.parametrize(Regularized(16), X, model_kwargs={"train": True})
    positional = archscale.parametrize(Regularized(16), X, True, None)
    assert named_leaves(plan.init_std, is_leaf=lambda one: one is None) == named_leaves(
        positional.init_std, is_leaf=lambda one: one is None
    )
    params = plan.init(KEY)["params"]
    assert not params["Dense_1"]["kernel"].any()
    np.testing.assert_allclose(params["gain"], 0.25)
    np.testing.assert_allclose(params["decay"], -np.arange(1.0, 17))
    assert plan.init_std["params"]["Dense_1"]["kernel"] is None
    assert "batch_stats" not in plan.init(KEY)
    assert plan.apply(plan.init(KEY), X).shape == (4, 3)
    assert "Dense_1/kernel" in str(plan)


def test_nnx_with_batch_norm_and_dropout():
    class Model(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(8, width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    model = Model(64, nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    images = jax.random.normal(KEY, X.shape)
    abstract = nnx.eval_shape(lambda: Model(64, nnx.Rngs(0)))
    base = Model(16, nnx.Rngs(0))
    plan = archscale.parametrize(model, X, base=base, optimizer="sgd")
    shapes = archscale.parametrize(abstract, X, base=base, optimizer="sgd")
    assert named_leaves(plan.learning_rate) == named_leaves(shapes.learning_rate)
    optimizer = nnx.Optimizer(model, plan.optimizer(0.1, momentum=0.9), wrt=nnx.Param)
    nnx.update(model, plan.init(KEY))

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: ((model(images) - 1) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert jax.tree.structure(before) == jax.tree.structure(nnx.state(model))


def test_haiku_with_state_and_equinox_with_state():
    def network(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training=True)
        return hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.1, jax.nn.relu(x)))

    plan = archscale.parametrize(hk.transform_with_state(network), X)
    assert plan.apply(plan.init(KEY), X).shape == (4, 3)

    class Model(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self):
            self.first = eqx.nn.Linear(8, 16, key=KEY)
            self.norm = eqx.nn.BatchNorm(16, "batch", mode="batch")
            self.last = eqx.nn.Linear(16, 3, key=KEY)

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            return self.last(jax.nn.relu(x)), state

    model, state = eqx.nn.make_with_state(Model)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, x):
        batched = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None))
        return batched(x, state)[0]

    with pytest.raises(NameError, match="batch") as raised:  # one example has no batch
        archscale.parametrize(model, X[0], state)
    assert any("one example" in note for note in raised.value.__notes__)
    plan = archscale.parametrize(apply, X, params=params)
    assert plan.apply(plan.init(KEY), X).shape == (4, 3)


def test_constants_of_an_initializer_are_read_without_drawing():
    def initialized(key):
        def layer(carry, key):
            return carry, {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(3), "c": carry}

        _, stacked = jax.lax.scan(layer, jnp.ones(()), jax.random.split(key, 4))
        return {
            "stacked": stacked,
            "mapped": jax.vmap(lambda key: jnp.full((2,), 0.5))(jax.random.split(key, 4)),
            "small": jax.jit(lambda: jnp.full((2, 2), 1e-6))(),
            "log": jnp.log(jnp.full((2,), 2.0)) * 3,
            "drawn": jax.random.normal(key, (2,)),
            "counted": jnp.arange(3.0),
        }

    _, found = constant_leaves(initialized, KEY)
    assert found == pytest.approx(
        {"stacked/b": 0.0, "stacked/c": 1.0, "mapped": 0.5, "small": 1e-6, "log": 3 * np.log(2)},
        rel=1e-6,
    )


# Choices and errors.


@dataclasses.dataclass(frozen=True)
class Stack:
    depth: int

    def __call__(self, params, x):
        x = x @ params["stem"]
        for layer in params["blocks"]:
            x = x + jax.nn.relu(x @ layer["in"]) @ layer["out"]
        return x @ params["readout"]

    def params(self, width=16):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
        block = {"in": shape(width, width), "out": shape(width, width)}
        return {
            "stem": shape(8, width),
            "blocks": [block] * self.depth,
            "readout": shape(width, 3),
        }


def stack(depth, base=None, **options):
    made = Stack(depth)
    base = None if base is None else (Stack(base), Stack(base).params())
    return archscale.parametrize(made, X, params=made.params(), base=base, **options)


def test_residual_stacks_get_multipliers_by_place():
    rates = stack(8, base=2, optimizer="sgd").learning_rate
    assert rates["stem"] == rates["readout"] == 1
    assert rates["blocks"][0]["in"] == 4  # m^(2α - 1), α = 1 of branches of two layers
    assert rates["blocks"][0]["out"] == pytest.approx(1 / 4)
    rates = stack(8, base=2).learning_rate
    assert rates["blocks"][0] == {"in": 1.0, "out": pytest.approx(1 / 4)}
    rates = stack(8, base=2, depth_exponent=0.5).learning_rate
    assert rates["blocks"][0] == {"in": pytest.approx(1 / 2), "out": pytest.approx(1 / 4)}
    assert stack(8, base=2, depth_rule=None).learning_rate["blocks"][0]["out"] == 1
    assert "8 residual blocks, 2 in the base" in str(stack(8, base=2))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_branches_of_the_base_add_the_share_that_is_asked_for(exponent):
    """Each of n blocks 1/n of it; those of a network m times as deep 1/m^(2α) of theirs."""
    options = {"branch_share": 0.8, "depth_exponent": exponent}
    base, deep = stack(4, **options), stack(16, base=4, **options)
    for plan, share in ((base, 0.2), (deep, 0.2 / 4 ** (2 * exponent))):
        for block in plan.init_std["blocks"]:
            added = 16 * block["in"] ** 2 / 2 * 16 * block["out"] ** 2  # over what the stream has
            assert added == pytest.approx(share, rel=1e-5)


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "another optimizer": (
        lambda: archscale.parametrize(LinenMlp(8), X, optimizer="adamx"),
        ValueError,
        r"unknown optimizer 'adamx'.*did you mean 'adam'",
    ),
    "no model": (
        lambda: archscale.parametrize(3, X),
        TypeError,
        "model must be a Flax linen or NNX module.*found int",
    ),
    "a class": (lambda: archscale.parametrize(LinenMlp, X), TypeError, "found type"),
    "a function without params": (
        lambda: archscale.parametrize(function_mlp, X),
        TypeError,
        "pass its params too",
    ),
    "params of a module": (
        lambda: archscale.parametrize(LinenMlp(8), X, params={}),
        TypeError,
        "params= belongs to a function",
    ),
    "params twice": (
        lambda: archscale.parametrize((function_mlp, function_params(8)), X, params={}),
        TypeError,
        "given twice",
    ),
    "a base function": (
        lambda: archscale.parametrize(
            function_mlp, X, params=function_params(8), base=function_mlp
        ),
        TypeError,
        r"pass the pair \(apply, params\)",
    ),
    "a base of another optimizer": (
        lambda: archscale.parametrize(
            LinenMlp(8), X, base=archscale.parametrize(LinenMlp(8), X, optimizer="sgd")
        ),
        ValueError,
        "parametrized for optimizer 'sgd'",
    ),
    "a base with a base": (
        lambda: archscale.parametrize(LinenMlp(8), X, base=planned("linen")[0]),
        ValueError,
        "has a base itself",
    ),
    "another width rule": (
        lambda: archscale.parametrize(LinenMlp(8), X, width_rule="adan"),
        ValueError,
        "unknown width rule 'adan'",
    ),
    "another depth rule": (
        lambda: archscale.parametrize(LinenMlp(8), X, depth_rule="path"),
        ValueError,
        "unknown depth_rule 'path'",
    ),
    "a negative branch share": (
        lambda: stack(2, branch_share=-1.0),
        ValueError,
        "branch_share is -1.0; accepted are",
    ),
    "a branch share of a rule that has none": (
        lambda: stack(2, branch_share=1.0, initialization="he_normal"),
        ValueError,
        "'he_normal' has none",
    ),
    "a missing argument": (
        lambda: archscale.parametrize(Regularized(8), X),
        TypeError,
        "train",
    ),
    "an option of the optimizer": (
        lambda: archscale.parametrize(LinenMlp(8), X).optimizer(0.1, momentum=0.9),
        TypeError,
        "momentum",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_raises(name):
    call, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        call()


def test_a_missing_keyword_is_explained():
    with pytest.raises(TypeError) as raised:
        archscale.parametrize(Regularized(8), X)
    assert any("model_kwargs" in note for note in raised.value.__notes__)


def test_old_names_warn_and_work():
    with pytest.warns(DeprecationWarning, match=r"archscale_jax.sharpness moved to archscale_jax"):
        assert archscale.sharpness is archscale.tuning.sharpness
    search = importlib.import_module("archscale_jax.search")

    with pytest.warns(DeprecationWarning, match="find_learning_rate moved"):
        assert search.find_learning_rate is archscale.find_learning_rate
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        archscale.nothing  # noqa: B018  # pyright: ignore
    basin = archscale.tuning.Basin(1.0, 0.5, 2.0, 0.1, (True, False))
    with pytest.warns(DeprecationWarning, match="closed is bracketed now"):
        assert basin.closed == basin.bracketed
    assert len(archscale.__all__) <= 40
    assert set(dir(archscale)) == {*archscale.__all__, "__version__"}


class Stages(nn.Module):
    """Two stages of blocks, as ResNets have them: layers of several widths, named by one count."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for stage in range(2):
            features = self.width * 2**stage
            for _ in range(self.depth):
                y = nn.Dense(features)(nn.relu(nn.Dense(features)(nn.relu(x))))
                x = (x if x.shape[-1] == features else nn.Dense(features)(x)) + y
        return nn.Dense(3)(x)


def test_bases_of_several_widths_may_be_shallower_and_narrower():
    """Widths 32, 64 after 8, 16, four blocks a stage after one: hidden 1/4, 1/4 · 1/4."""
    deep, base = archscale.parametrize(Stages(4, 8), X, base=Stages(1, 8)), Stages(1, 8)
    assert set(named_leaves(deep.learning_rate).values()) == {1.0, 0.25}
    both = archscale.parametrize(Stages(4, 32), X, base=base).learning_rate["params"]
    wide = archscale.parametrize(Stages(1, 32), X, base=base).learning_rate["params"]
    assert wide["Dense_1"]["kernel"] == 1 / 4
    assert both["Dense_2"]["kernel"] == pytest.approx(1 / 4)
    assert both["Dense_1"]["kernel"] == pytest.approx(1 / 16)


class Tokens(nn.Module):
    """Residual blocks behind tokens of a fixed size, which are joined to a fixed width."""

    depth: int
    width: int
    token: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, self.token)(tokens).reshape(len(tokens), -1)
        x = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x))


@pytest.mark.parametrize(
    ("joined", "optimizer"), [(16, "sgd"), (8, "adam"), (8, "sgd"), (12, "muon")]
)
def test_a_width_that_stays_beside_others_in_a_base_of_another_depth(joined, optimizer):
    """Multipliers are ratios: those of both together are those of depth times those of width.

    Also where the width that stays is one that the base has elsewhere, 8.
    """
    tokens = jnp.zeros((2, 4), jnp.int32)
    small, deep, both = (Tokens(*size, joined // 4) for size in ((1, 8), (3, 8), (3, 32)))
    plans = [
        archscale.parametrize(one, tokens, base=base, optimizer=optimizer)
        for one, base in ((both, small), (both, deep), (deep, small))
    ]
    for what in ("learning_rate", "weight_decay", "epsilon"):
        found, width, depth = (named_leaves(getattr(plan, what)) for plan in plans)
        products = {name: width[name] * depth[name] for name in width}
        assert found == pytest.approx(products, rel=1e-12), what


@pytest.mark.parametrize("joined", [32, 128])
def test_a_width_that_stays_and_is_one_that_scales_elsewhere_raises(joined):
    tokens = jnp.zeros((2, 4), jnp.int32)
    large, base = Tokens(3, 32, joined // 4), Tokens(1, 8, joined // 4)
    with pytest.raises(ValueError, match="Pass a base that differs in width or in depth alone"):
        archscale.parametrize(large, tokens, base=base)


class Additions(nn.Module):
    depth: int
    normalized: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x) if self.normalized else x
            x = x + nn.Dense(16)(nn.relu(nn.Dense(16)(nn.relu(y))))
        return nn.Dense(3)(x)


@pytest.mark.parametrize(("normalized", "share", "alpha"), [(True, 2.0, 0.5), (False, 0.25, 1.0)])
def test_what_branches_add_to_the_stream_of_a_base(normalized, share, alpha):
    """(1 + share/n)^n of the first, whatever α; n^(1 - 2α) as much in a deeper network."""

    def growth(depth, base=None):
        model = Additions(depth, normalized)
        base = None if base is None else Additions(base, normalized)
        plan = archscale.parametrize(model, X, base=base, depth_exponent=alpha)
        promised = archscale.second_moments(
            plan.architecture,
            plan.choice.initialization,
            rule_options=plan.choice.initialization_options,
        )
        return max(promised.values()) / promised[0]

    assert growth(4) == pytest.approx((1 + share / 4) ** 4, rel=1e-6)
    added = share / 4 * 4 ** (2 * alpha) / 8 ** (2 * alpha)
    assert growth(8, base=4) == pytest.approx((1 + added) ** 8, rel=1e-6)


def test_sums_over_segments_are_those_of_neighbours_that_are_alike():
    """Eight neighbours, all the same: their mean is one of them, their sum eight times as much."""
    nodes, senders = jax.random.normal(KEY, (64, 256)), jnp.repeat(jnp.arange(64), 8)
    params = {name: jax.ShapeDtypeStruct((256, 256), jnp.float32) for name in ("a", "m", "b")}

    def apply(params, nodes, senders, *, mean):
        x = nodes @ params["a"]
        y = jax.ops.segment_sum((jax.nn.relu(x) @ params["m"])[senders], senders, 64)
        if mean:
            y = y / jax.ops.segment_sum(jnp.ones(512), senders, 64)[:, None]
        return x + jax.nn.relu(y) @ params["b"]

    for mean in (True, False):
        function = lambda params, *inputs, mean=mean: apply(params, *inputs, mean=mean)  # noqa: E731
        architecture = archscale.trace(function, params, nodes, senders)
        promised = archscale.second_moments(architecture, "second_moment")
        drawn = archscale.initialize(KEY, params, architecture, "second_moment")
        for vertex, z in archscale.vertex_features(function, drawn, nodes, senders).items():
            assert promised[vertex] == pytest.approx(float(jnp.mean(z**2)), rel=0.15)


def chain(depth):
    sizes = (8, *[16] * depth, 3)
    params = [jax.ShapeDtypeStruct(size, jnp.float32) for size in itertools.pairwise(sizes)]

    def apply(params, x):
        for weight in params[:-1]:
            x = jax.nn.relu(x @ weight)
        return x @ params[-1]

    return apply, params


def test_chains_of_another_depth():
    """SGD: (Σ L³)^(-1/2), L = 7 after 3 [AAS Eq. 8]; Adam: 1/L with stem and readout, 8 after 4."""
    rates = {"sgd": (7 / 3) ** -1.5, "adam": 4 / 8, "muon": 1.0}
    for optimizer, rate in rates.items():
        plan = archscale.parametrize(chain(7), X, base=chain(3), optimizer=optimizer)
        (found,) = set(named_leaves(plan.learning_rate).values())
        assert found == pytest.approx(rate)
        assert ("no rule answers for it" in str(plan)) == (optimizer == "muon")


def test_evaluation_mode_is_noticed():
    plan = archscale.parametrize(Regularized(16), X, model_kwargs={"train": False})
    (note,) = (one for one in plan.report().notes if "running averages" in one)
    assert "batch_stats/BatchNorm_0/mean and 1 others" in note

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.first(x))

    model = Model(nnx.Rngs(0))
    assert not archscale.parametrize(model, X).architecture.notes
    model.eval()
    assert "running averages" in archscale.parametrize(model, X).architecture.notes[0]
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    abstract.eval()
    with pytest.raises(ValueError, match=r"'norm/mean'.*whose value is not known.*train"):
        archscale.parametrize(abstract, X)


def test_keys_and_schedules():
    plan = archscale.parametrize(Regularized(16), X, model_kwargs={"train": True})
    params = plan.init(KEY)
    params["params"]["Dense_1"]["kernel"] = jax.random.normal(KEY, (16, 16))
    x = jax.random.normal(KEY, (4, 8))
    outputs = [plan.apply(params, x, key=jax.random.key(seed)) for seed in (0, 1)]
    assert np.any(outputs[0] != outputs[1])
    np.testing.assert_array_equal(plan.apply(params, x), plan.apply(params, x))
    with pytest.raises(TypeError, match="key= is for linen"):
        stack(2).apply(stack(2).init(KEY), X, key=KEY)
    plan = archscale.parametrize(LinenMlp(16), X, optimizer="sgd", base_inputs=X)
    params, gradients = plan.init(KEY), jax.tree.map(jnp.zeros_like, plan.init(KEY))
    tx = plan.optimizer(1.0, weight_decay=lambda step: 0.1 * step)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(gradients, state, params)
        kernel = updates["params"]["Dense_1"]["kernel"]
        np.testing.assert_allclose(
            kernel, -0.1 * step * params["params"]["Dense_1"]["kernel"], rtol=1e-6
        )


def test_roles_of_leaves_that_the_base_lacks():
    """Weights that nothing reads, one a block: those of the deep model's further blocks too."""

    def spec(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def make(depth):
        def apply(params, x):
            h = x @ params["stem"]
            for number in range(depth):
                h = h + jax.nn.relu(h @ params[f"w{number}"])
            return h @ params["readout"]

        shapes = {"stem": spec(8, 16), "readout": spec(16, 3)}
        for number in range(depth):
            shapes |= {f"w{number}": spec(16, 16), f"unused{number}": spec(16, 16)}
        return apply, shapes

    roles = {f"unused{number}": "bias" for number in range(4)}
    apply, params = make(4)
    plan = archscale.parametrize(apply, spec(2, 8), params=params, base=make(2), roles=roles)
    assert {one.role for one in plan.architecture.parameters if "unused" in one.name} == {"bias"}
    with pytest.raises(ValueError, match="for a leaf that no layer uses another role"):
        archscale.parametrize(apply, spec(2, 8), params=params,
                              roles={**roles, "unused0": "hidden"})  # fmt: skip


@pytest.mark.parametrize("rate", [float("nan"), -1e-3, float("inf"), "1e-3", np.float32(-1.0)])
def test_rates_and_decays_that_are_none_raise(rate):
    plan = archscale.parametrize(eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0)),
                                 jax.ShapeDtypeStruct((8,), jnp.float32))  # fmt: skip
    with pytest.raises(ValueError, match="learning_rate must be a number from 0 or a schedule"):
        plan.optimizer(rate)
    with pytest.raises(ValueError, match="weight_decay must be a number from 0 or a schedule"):
        plan.optimizer(1e-3, rate)


def test_the_report_shows_how_far_values_that_are_kept_are_apart():
    """Equinox draws biases, and a plan keeps them."""
    model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
    plan = archscale.parametrize(model, jax.ShapeDtypeStruct((8,), jnp.float32))
    (shown,) = (one for one in plan.report().records if one["path"] == "layers/1/bias")
    kept = plan.init(jax.random.key(1)).layers[1].bias
    assert shown["standard_deviation"] == pytest.approx(float(kept.std()), rel=1e-5)


def test_the_report_shows_gains_as_they_are_set():
    class Ending(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16)(x)
            for _ in range(self.depth):
                x = x + nn.LayerNorm()(nn.Dense(16)(nn.relu(nn.Dense(16)(x))))
            return nn.Dense(3)(x)

    plan = archscale.parametrize(Ending(4), X)
    gain = float(plan.init(KEY)["params"]["LayerNorm_0"]["scale"][0])
    record = next(one for one in plan.report().records if one["path"] == "params/LayerNorm_0/scale")
    assert f"start = {gain:.4g}" in record["initialization_reason"]


@pytest.mark.parametrize("name", sorted(_deprecated._PLACES))
def test_every_old_name_is_somewhere(name):
    with pytest.warns(DeprecationWarning, match=f"archscale_jax.{name} moved to"):
        assert getattr(archscale, name) is not None


@pytest.mark.parametrize("name", _deprecated.MODULES)
def test_every_old_module_is_somewhere(name):
    assert importlib.import_module(_deprecated.MODULES[name])
    assert importlib.import_module(f"archscale_jax.{name}").__name__ == f"archscale_jax.{name}"
