"""The optimizers of a plan inside, around and beside what optax has to compose them with.

What a parameter really gets is measured: gradients are given, updates are read, entry by entry, and
the multipliers that they show are compared with those that the plan promises.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from optax.contrib import MuonDimensionNumbers, muon, reduce_on_plateau, schedule_free

import archscale_jax as archscale
from archscale_jax._trees import PyTree, map_with_names, named_leaves

pytestmark = pytest.mark.quick_compilation

KEY = jax.random.key(0)
RATE, DECAY, EPSILON = 0.1, 0.5, 1e-8
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}

Make = Callable[..., optax.GradientTransformation]
Move = Callable[..., tuple[PyTree, PyTree]]
"""From gradients to the update of a step, and the params before it."""


# Networks with leaves of many kinds, and their bases.


class Blocks(nn.Module):
    """A residual stack on a table of tokens."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, self.width, name="table")(tokens)
        for number in range(self.depth):
            y = nn.RMSNorm(name=f"norm_{number}")(x)
            y = nn.gelu(nn.Dense(2 * self.width, name=f"up_{number}")(y))
            x = x + nn.Dense(self.width, use_bias=False, name=f"down_{number}")(y)
        return nn.Dense(7, use_bias=False, name="readout")(nn.LayerNorm(name="last")(x))


def stacked(width: int, depth: int) -> tuple[Callable[..., jax.Array], PyTree]:
    """A scan over layers, and the shapes of its params."""

    def layer(x, params):
        y = x * params["gain"] / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return x + jax.nn.relu(y @ params["up"] + params["bias"]) @ params["down"], None

    def apply(params, x):
        x, _ = jax.lax.scan(layer, x @ params["stem"], params["layers"])
        return x @ params["readout"]

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    layers = {
        "gain": shape(depth, width),
        "up": shape(depth, width, 2 * width),
        "bias": shape(depth, 2 * width),
        "down": shape(depth, 2 * width, width),
    }
    return apply, {"stem": shape(4, width), "layers": layers, "readout": shape(width, 3)}


class NnxMlp(nnx.Module):
    def __init__(self, width):
        rngs, sizes = nnx.Rngs(0), ((4, width), (width, width), (width, 3))
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in sizes])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def nnx_mlp(width: int) -> Any:
    return nnx.eval_shape(lambda: NnxMlp(width))


def equinox_mlp(width: int) -> Any:
    return eqx.filter_eval_shape(eqx.nn.MLP, 4, 3, width, 2, key=KEY)


NETWORKS: dict[str, Callable[[], tuple[Any, Any, jax.Array]]] = {
    "blocks": lambda: (Blocks(8, 2), Blocks(4, 1), jnp.zeros((2, 3), jnp.int32)),
    "stacked": lambda: (stacked(8, 4), stacked(4, 2), jnp.ones((2, 4))),
    "equinox": lambda: (equinox_mlp(8), equinox_mlp(4), jnp.ones(4)),
    "nnx": lambda: (nnx_mlp(8), nnx_mlp(4), jnp.ones((2, 4))),
}
HIDDEN = {"blocks": "_0", "stacked": "layers", "equinox": "layers/1"}
"""What the names of the leaves have in common that are masked or frozen."""
MATRIX = (("adamw", "stacked"), ("muon", "stacked"))
REST = (("adam", "stacked"), ("adamw", "blocks"), ("muon", "blocks"), ("sgd", "blocks"))
over_matrix = pytest.mark.parametrize(("optimizer", "network"), MATRIX)
over_kinds = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


@functools.cache
def plan_of(network: str, optimizer: str) -> archscale.Parametrization:
    model, base, inputs = NETWORKS[network]()
    return archscale.parametrize(model, inputs, base=base, optimizer=optimizer)


@functools.cache
def drawn(network: str, seed: int) -> PyTree:
    """A tree like params of entries between 1/2 and 3/2 of either sign, none of them close to 0."""
    random = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        values = random.uniform(0.5, 1.5, leaf.shape) * random.choice([-1, 1], leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(plan_of(network, "adamw").init, KEY))


def made(network: str, optimizer: str, **options: Any) -> Make:
    """The plan's optimizer, at the rate and the decay of the tests where others are not given."""
    plan, given = plan_of(network, optimizer), {**OPTIONS.get(optimizer, {}), **options}

    def make(learning_rate=RATE, weight_decay=DECAY):
        return plan.optimizer(learning_rate, weight_decay, **given)

    return make


# The same optimizers of optax, without multipliers.


def plain_optimizer(network: str, optimizer: str, learning_rate: Any) -> Any:
    if optimizer == "muon":
        architecture = plan_of(network, optimizer).architecture
        dimensions = functools.partial(archscale.muon_dimension_numbers, architecture)
        return muon(learning_rate, muon_weight_dimension_numbers=dimensions)
    if optimizer == "adamw":
        return optax.adamw(learning_rate, weight_decay=0.0)
    return getattr(optax, optimizer)(learning_rate, **OPTIONS.get(optimizer, {}))


@functools.cache
def plain_move(network: str, optimizer: str) -> Move:
    return stepping(plain_optimizer(network, optimizer, 1.0), drawn(network, 0))


@functools.cache
def plain_update(
    network: str, optimizer: str, steps: int, seen: Callable[[PyTree], PyTree]
) -> dict[str, np.ndarray]:
    """û after a number of steps with one gradient, of which the optimizer sees a part."""
    update, _ = plain_move(network, optimizer)(seen(drawn(network, 1)), steps)
    return {name: -leaf for name, leaf in numbers(update).items()}


@functools.cache
def by_adam(network: str, optimizer: str) -> frozenset[str]:
    """Names of the leaves that Adam updates, whose epsilon is compared with their gradients."""
    params = drawn(network, 0)
    if optimizer != "muon":
        return frozenset(named_leaves(params) if optimizer != "sgd" else ())
    found = archscale.muon_dimension_numbers(plan_of(network, optimizer).architecture, params)
    axes = named_leaves(found, is_leaf=lambda one: isinstance(one, MuonDimensionNumbers))
    return frozenset(named_leaves(params).keys() - axes.keys())


# Multipliers, promised and measured.


class Multipliers(NamedTuple):
    """By leaf: of the rate, of decay as the product η·λ that a step takes off, of epsilon."""

    rate: dict[str, Any]
    shrinkage: dict[str, Any]
    epsilon: dict[str, Any]


def promised(plan: Any) -> Multipliers:
    rate, decay, epsilon = map(named_leaves, (plan.learning_rate, plan.weight_decay, plan.epsilon))
    return Multipliers(rate, {name: rate[name] * decay[name] for name in rate}, epsilon)


def measured(
    move: Move,
    network: str,
    plain: dict[str, np.ndarray],
    epsilon: dict[str, Any],
    *,
    rate: float = RATE,
    decay: float = DECAY,
    shown: Callable[[str], bool] = lambda name: True,
) -> Multipliers:
    """Reads multipliers off updates -η_p·rate·(û + λ_p·decay·W).

    Without gradients the decay is left. With gradients of size 1, û is what optax makes of them;
    with gradients g of the size of epsilon, Adam's is smaller by |g| / (|g| + ε).

    Args:
      move: from gradients to an update.
      network: of which the params are.
      plain: û of gradients of size 1.
      epsilon: multipliers that are expected, which say how small gradients must be.
      rate: at the step of the update.
      decay: at the step of the update.
      shown: which leaves are measured.
    """
    large = drawn(network, 1)
    small = map_with_names(lambda name, g: EPSILON * epsilon[name] * np.asarray(g), large)
    updates = [
        tuple(numbers(tree) for tree in move(gradients))
        for gradients in (jax.tree.map(np.zeros_like, large), large, small)
    ]
    given, found = numbers(small), Multipliers({}, {}, {})
    for name in filter(shown, plain):
        (still, W), *pulled = ((update[name], before[name]) for update, before in updates)
        shrinkage = -still / (rate * decay * W)
        of_large, of_small = (-one / rate - shrinkage * decay * W for one, W in pulled)
        found.rate[name] = quotient(of_large, plain[name])
        found.shrinkage[name] = shrinkage
        with np.errstate(divide="ignore", invalid="ignore"):  # where there is no epsilon
            found.epsilon[name] = abs(given[name]) * (abs(of_large / of_small) - 1) / EPSILON
    return found


def quotient(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Entry by entry; where the other is close to 0 and shows nothing, the median of the rest."""
    telling = abs(other) > 0.2 * abs(other).max()
    return np.where(telling, one / other, np.median(one[telling] / other[telling]))


def numbers(tree: PyTree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree).items()}


def check(found: Multipliers, expected: Multipliers, adams: Any, rtol: float = 1e-3) -> None:
    """Compares every entry; epsilon where the optimizer of the leaf is Adam."""
    assert found.rate
    for name in found.rate:
        for field in ("rate", "shrinkage", "epsilon")[: 3 if name in adams else 2]:
            one, other = getattr(found, field)[name], getattr(expected, field)[name]
            np.testing.assert_allclose(
                one, np.broadcast_to(other, one.shape), rtol, 1e-4, err_msg=f"{field} of {name}"
            )


def whole(gradients: PyTree) -> PyTree:
    return gradients


def confirm(
    move: Move,
    network: str,
    optimizer: str,
    expected: Multipliers | None = None,
    *,
    inner: int = 1,
    seen: Callable[[PyTree], PyTree] = whole,
    rtol: float = 1e-3,
    **at: Any,
) -> None:
    """Checks that every leaf gets what the plan promises, or what is expected.

    Args:
      move: from gradients to an update.
      network: of `NETWORKS`.
      optimizer: by name.
      expected: None: what the plan promises.
      inner: steps of the optimizer after which `move` gives the update.
      seen: the part of a gradient that the optimizer sees.
      rtol: how close to what is expected.
      **at: rate and decay of the step, and which leaves are shown, see `measured`.
    """
    expected = expected or promised(plan_of(network, optimizer))
    plain = plain_update(network, optimizer, inner, seen)
    found = measured(move, network, plain, expected.epsilon, **at)
    check(found, expected, by_adam(network, optimizer), rtol)


# Ways to take steps.


def stepping(tx: Any, params: PyTree) -> Move:
    @jax.jit  # of many small operations, most of all those of Muon
    def step(gradients: PyTree, state: Any, now: PyTree) -> tuple[PyTree, Any, PyTree]:
        updates, state = tx.update(gradients, state, now)
        return updates, state, optax.apply_updates(now, updates)

    def move(gradients: PyTree, steps: int = 1) -> tuple[PyTree, PyTree]:
        state, now, last, updates = tx.init(params), params, params, None
        for _ in range(steps):
            last, (updates, state, now) = now, step(gradients, state, now)
        return updates, last

    return move


def scanned(tx: Any, params: PyTree) -> Move:
    @functools.partial(jax.jit, static_argnames="steps")
    def move(gradients: PyTree, steps: int) -> tuple[PyTree, PyTree]:
        def step(carry, _):
            now, state = carry
            updates, state = tx.update(gradients, state, now)
            return (optax.apply_updates(now, updates), state), (updates, now)

        _, found = jax.lax.scan(step, (params, tx.init(params)), None, steps)
        return jax.tree.map(lambda leaf: leaf[-1], found)

    return move


def donated(tx: Any, params: PyTree) -> Move:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(now, state, gradients):
        updates, state = tx.update(gradients, state, now)
        return optax.apply_updates(now, updates), state, updates

    def move(gradients: PyTree, steps: int) -> tuple[PyTree, PyTree]:
        now, last, updates = jax.tree.map(jnp.array, params), params, None
        state = tx.init(now)
        for _ in range(steps):
            last, given = jax.tree.map(np.array, now), (now, state)
            now, state, updates = step(now, state, gradients)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given) if leaf.ndim)
        return updates, last

    return move


# The matrix: what is around an optimizer, by optimizer.


def rates(count: Any) -> Any:
    return RATE * (1 + count)


def decays(count: Any) -> Any:
    return DECAY / (1 + count)


def halved(gradients: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf) / 2, gradients)


def clipped(gradients: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.clip(leaf, -1, 1), gradients)


def half_the_norm(network: str) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in numbers(drawn(network, 1)).values()))) / 2


def labelled(network: str, shown: Any = True, hidden: Any = False) -> PyTree:
    label = lambda name, leaf: hidden if HIDDEN[network] in name else shown  # noqa: E731
    return map_with_names(label, drawn(network, 0))


def partitioned(make: Make, network: str) -> Any:
    parts = {"trained": make(), "frozen": optax.set_to_zero()}
    return optax.partition(parts, labelled(network, "trained", "frozen"))


def accumulated(tx: Any) -> Any:
    return optax.MultiSteps(tx, 2).gradient_transformation()


def injected(make: Make, rate: Any = RATE, decay: Any = DECAY) -> Any:
    return optax.inject_hyperparams(make)(learning_rate=rate, weight_decay=decay)


class Case(NamedTuple):
    """One way to compose.

    Attributes:
      wrap: from a function (rate, decay) to an optimizer, and the name of a network, to the whole.
      steps: calls of `update`.
      inner: of them, steps of the optimizer; None: all.
      factor: last update over that of the optimizer.
      at: count of schedules at the last step; None: there are none.
      seen: the part of a gradient that reaches the optimizer.
      hidden: of leaves that are hidden, the update over the gradient; None: there are none.
    """

    wrap: Callable[[Make, str], Any]
    steps: int = 1
    inner: int | None = None
    factor: float = 1.0
    at: int | None = None
    seen: Callable[[PyTree], PyTree] = whole
    hidden: float | None = None


CASES = {
    "plain": Case(lambda make, network: make()),
    "clip_by_global_norm": Case(
        lambda make, network: optax.chain(
            optax.clip_by_global_norm(half_the_norm(network)), make()
        ),
        seen=halved,
    ),
    "clip": Case(lambda make, network: optax.chain(optax.clip(1.0), make()), seen=clipped),
    "masked": Case(lambda make, network: optax.masked(make(), labelled(network)), hidden=1.0),
    "partition": Case(partitioned, hidden=0.0),
    "selective_transform": Case(
        lambda make, network: optax.transforms.selective_transform(
            make(), freeze_mask=labelled(network, False, True)
        ),
        hidden=0.0,
    ),
    "MultiSteps": Case(lambda make, network: accumulated(make()), steps=4, inner=2),
    "inject_hyperparams": Case(lambda make, network: injected(make)),
    "schedules": Case(lambda make, network: make(rates, decays), steps=3, at=2),
    "schedules, injected": Case(lambda make, network: injected(make, rates, decays), steps=3, at=2),
    "schedules in MultiSteps": Case(
        lambda make, network: accumulated(make(rates, decays)), steps=4, inner=2, at=1
    ),
    "apply_if_finite": Case(lambda make, network: optax.apply_if_finite(make(), 3), steps=2),
    # In the second step y moves by β/2 + 1 - β of what z does; x and z were equal before it.
    "schedule_free": Case(
        lambda make, network: schedule_free(make(), RATE, b1=0.9), steps=2, factor=0.55
    ),
}


def holds(
    case: Case, make: Make, network: str, optimizer: str, expected: Multipliers | None = None
) -> None:
    """Measures a composition, and checks it."""
    move = stepping(case.wrap(make, network), drawn(network, 0))
    hides = case.hidden is not None
    confirm(
        functools.partial(move, steps=case.steps),
        network,
        optimizer,
        expected,
        inner=case.inner or case.steps,
        seen=case.seen,
        rate=case.factor * (RATE if case.at is None else rates(case.at)),
        decay=DECAY if case.at is None else decays(case.at),
        shown=lambda name: not (hides and HIDDEN[network] in name),
    )
    if hides:
        given = drawn(network, 1)
        gradients, (update, _) = numbers(given), move(given)
        for name, leaf in numbers(update).items():
            if HIDDEN[network] in name:
                np.testing.assert_array_equal(leaf, case.hidden * gradients[name])


OF_MUON = ("plain", "masked", "partition", "schedules in MultiSteps", "schedule_free")


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(case, "adamw") for case in CASES] + [(case, "muon") for case in OF_MUON],
)
def test_every_leaf_gets_what_the_plan_promises(case, optimizer):
    holds(CASES[case], made("stacked", optimizer), "stacked", optimizer)


@pytest.mark.parametrize(("optimizer", "network"), REST)
def test_the_other_network_and_adam(optimizer, network):
    holds(CASES["plain"], made(network, optimizer), network, optimizer)


@over_matrix
@pytest.mark.parametrize("run", [scanned, donated])
def test_steps_that_are_compiled(run, optimizer, network):
    move = run(made(network, optimizer)(rates, decays), drawn(network, 0))
    at = {"inner": 3, "rate": rates(2), "decay": decays(2)}
    confirm(functools.partial(move, steps=3), network, optimizer, **at)


@over_matrix
def test_vmap_over_rates_and_decays(optimizer, network):
    make, params = made(network, optimizer), drawn(network, 0)
    given = np.array([0.1, 0.3]), np.array([0.5, 0.2])

    @jax.jit
    def updates(gradients):
        def of_one(rate, decay):
            tx = make(rate, decay)
            return tx.update(gradients, tx.init(params), params)[0]

        return jax.vmap(of_one)(*given)

    for number, (rate, decay) in enumerate(zip(*given, strict=True)):

        def move(gradients, number=number):
            return jax.tree.map(lambda leaf: np.asarray(leaf)[number], updates(gradients)), params

        confirm(move, network, optimizer, rate=rate, decay=decay)


@over_matrix
def test_vmap_over_seeds(optimizer, network):
    tx, seeds = made(network, optimizer)(), [drawn(network, seed) for seed in (0, 2)]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    states = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, 0)))
    for number, one in enumerate(seeds):

        def move(gradients, number=number, one=one):
            updates, _ = update(gradients, states, params)
            return jax.tree.map(lambda leaf: np.asarray(leaf)[number], updates), one

        confirm(move, network, optimizer)


@over_matrix
@pytest.mark.parametrize("master", [False, True], ids=["bfloat16", "float32 master"])
def test_half_precision(master, optimizer, network):
    """Gradients of bfloat16; params too, or their float32 master. First moments are float32."""
    half = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), tree)  # noqa: E731
    tx = made(network, optimizer, mu_dtype=jnp.float32)()
    params = drawn(network, 0) if master else jax.tree.map(jnp.asarray, half(drawn(network, 0)))
    moments = [mu for _, mu in optax.tree.get_all_with_path(tx.init(params), "mu")]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(jnp.float32)}
    move = stepping(tx, params)
    confirm(lambda gradients: move(half(gradients)), network, optimizer, rtol=0.05)


# Multipliers alone, behind other optimizers.


@pytest.mark.parametrize(
    "case", ["plain", "masked", "MultiSteps", "inject_hyperparams", "schedule_free"]
)
def test_scale_behind_another_optimizer(case):
    """Rates, and with them the decay of `optax.adamw`, which is in front; epsilon stays."""
    network, optimizer = "stacked", "adamw"
    plan = plan_of(network, optimizer)

    def make(learning_rate=RATE, weight_decay=DECAY):
        return optax.chain(optax.adamw(learning_rate, weight_decay=weight_decay), plan.scale())

    rates = named_leaves(plan.learning_rate)
    expected = Multipliers(rates, rates, dict.fromkeys(rates, 1.0))
    holds(CASES[case], make, network, optimizer, expected)


@over_matrix
def test_scale_behind_every_optimizer(optimizer, network):
    plan, plain = plan_of(network, optimizer), plain_optimizer(network, optimizer, RATE)
    rates = named_leaves(plan.learning_rate)
    expected = Multipliers(rates, dict.fromkeys(rates, 0.0), dict.fromkeys(rates, 1.0))
    make = lambda: optax.chain(plain, plan.scale())  # noqa: E731
    holds(CASES["plain"], make, network, optimizer, expected)


# Hyperparameters in the state.


@over_matrix
def test_injected_hyperparameters_are_read_and_written(optimizer, network):
    plan, params, options = (
        plan_of(network, optimizer),
        drawn(network, 0),
        OPTIONS.get(optimizer, {}),
    )
    make = optax.inject_hyperparams(plan.optimizer)
    tx = make(learning_rate=1e-3, weight_decay=0.1, **options)
    states = {0.1: tx.init(params), 0.0: make(1e-3, **options).init(params)}
    update = jax.jit(tx.update)
    for decay, state in states.items():
        given = {"learning_rate": 1e-3, "weight_decay": decay, **options}
        assert state.hyperparams == pytest.approx(given)
        state.hyperparams["learning_rate"] = jnp.asarray(0.3)
        state.hyperparams["weight_decay"] = jnp.asarray(0.2)
        move = lambda g, state=state: (update(g, state, params)[0], params)  # noqa: E731
        confirm(move, network, optimizer, rate=0.3, decay=0.2)
        _, after = update(params, state, params)
        written = {"learning_rate": 0.3, "weight_decay": 0.2}
        assert after.hyperparams == pytest.approx({**given, **written})


def test_injected_options_and_schedules_are_read():
    plan, params = plan_of("stacked", "adamw"), drawn("stacked", 0)
    tx = optax.inject_hyperparams(plan.optimizer, static_args="mu_dtype")(
        rates, decays, b1=0.8, eps=1e-6, mu_dtype=jnp.bfloat16
    )
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    shown = {"learning_rate": rates(2), "weight_decay": decays(2), "b1": 0.8, "eps": 1e-6}
    assert state.hyperparams == pytest.approx(shown)
    first, second = (optax.tree.get(state, name)["stem"] for name in ("mu", "nu"))
    assert (first.dtype, second.dtype) == (jnp.bfloat16, jnp.float32)


# Several optimizers, and leaves that are left out.


def test_two_plans_side_by_side():
    """One for AdamW of a part of the leaves, one for SGD of the rest."""
    network = "blocks"
    parts = {name: made(network, name)() for name in ("adamw", "sgd")}
    move = stepping(optax.partition(parts, labelled(network, "adamw", "sgd")), drawn(network, 0))
    confirm(move, network, "adamw", shown=lambda name: HIDDEN[network] not in name)
    confirm(move, network, "sgd", shown=lambda name: HIDDEN[network] in name)


@over_kinds
def test_a_gradient_that_is_not_finite_is_passed_over(optimizer):
    network = "stacked"
    tx, params = optax.apply_if_finite(made(network, optimizer)(), 3), drawn(network, 0)
    update = jax.jit(tx.update)
    unusable = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    nothing, state = update(unusable, tx.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    confirm(lambda gradients: (update(gradients, state, params)[0], params), network, optimizer)


@over_kinds
def test_none_stands_for_what_is_not_trained(optimizer):
    """As where Equinox freezes layers: `eqx.partition(model, filter_spec)`."""
    network = "equinox"
    is_frozen = lambda name: HIDDEN[network] in name  # noqa: E731
    without = lambda tree: map_with_names(  # noqa: E731
        lambda name, leaf: None if is_frozen(name) else leaf, tree
    )
    params = without(drawn(network, 0))
    assert 0 < len(jax.tree.leaves(params)) < len(jax.tree.leaves(drawn(network, 0)))
    step = stepping(made(network, optimizer)(), params)
    move = lambda gradients: step(without(gradients))  # noqa: E731
    confirm(move, network, optimizer, shown=lambda name: not is_frozen(name))
    updates, _ = move(drawn(network, 1))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_whole_model_as_params(optimizer):
    """As `optax.adamw` takes a module of Equinox, with functions among its leaves."""
    network = "equinox"
    tx, params = made(network, optimizer)(), drawn(network, 0)
    model = eqx.combine(params, equinox_mlp(8))
    assert any(callable(leaf) for leaf in jax.tree.leaves(model))
    update = jax.jit(lambda gradients: tx.update(gradients, tx.init(params), model)[0])
    confirm(lambda gradients: (update(gradients), params), network, optimizer)


@over_kinds
def test_further_leaves_that_are_none(optimizer):
    network = "stacked"
    more = lambda tree: {**tree, "cache": None}  # noqa: E731
    step = stepping(made(network, optimizer)(), more(drawn(network, 0)))
    confirm(lambda gradients: step(more(gradients)), network, optimizer)


# What frameworks do with an optimizer.


def changed(after: PyTree, before: PyTree) -> tuple[PyTree, PyTree]:
    return jax.tree.map(
        lambda one, other: np.asarray(one) - np.asarray(other), after, before
    ), before


def train_state(tx: Any, params: PyTree) -> Move:
    state = TrainState.create(apply_fn=Blocks(8, 2).apply, params=params, tx=tx)
    step = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))
    return lambda gradients: changed(step(state, gradients).params, params)


def nnx_optimizer(tx: Any, params: PyTree) -> Move:
    @nnx.jit
    def step(model, optimizer, gradients):
        optimizer.update(model, gradients)

    def move(gradients: PyTree) -> tuple[PyTree, PyTree]:
        model = nnx_mlp(8)
        nnx.update(model, params)
        step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), gradients)
        return changed(nnx.state(model, nnx.Param), params)

    return move


def equinox_step(tx: Any, params: PyTree) -> Move:
    model = eqx.combine(params, equinox_mlp(8))

    @eqx.filter_jit
    def step(model, state, gradients):
        updates, _ = tx.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates)

    def move(gradients: PyTree) -> tuple[PyTree, PyTree]:
        after = step(model, tx.init(eqx.filter(model, eqx.is_array)), gradients)
        return changed(eqx.filter(after, eqx.is_array), params)

    return move


FRAMEWORKS = {"blocks": train_state, "nnx": nnx_optimizer, "equinox": equinox_step}


@over_kinds
@pytest.mark.parametrize("network", FRAMEWORKS)
def test_optimizers_of_frameworks(network, optimizer):
    move = FRAMEWORKS[network](made(network, optimizer)(), drawn(network, 0))
    confirm(move, network, optimizer)


@over_matrix
def test_states_are_mapped_by_param(optimizer, network):
    """`optax.tree_map_params`, by which states are sharded, finds what stands for each param."""
    names = map_with_names(lambda name, leaf: name, drawn(network, 0))
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731

    def found(tx):
        named = optax.tree_map_params(
            tx,
            lambda leaf, name: leaf if is_masked(leaf) else name,
            tx.init(drawn(network, 0)),
            names,
            transform_non_params=lambda leaf: None,
            is_leaf=is_masked,
        )
        return sorted(jax.tree.leaves(named))

    of_plan = found(made(network, optimizer)(rates, decays))
    assert of_plan == found(plain_optimizer(network, optimizer, rates))
    assert set(of_plan) == set(named_leaves(names))


def test_arguments_for_others_pass_through():
    network = "stacked"
    tx = optax.chain(made(network, "adamw")(), reduce_on_plateau(patience=1, factor=0.5))
    params, gradients = drawn(network, 0), drawn(network, 1)
    update, state, found = jax.jit(tx.update), tx.init(params), []
    for _ in range(3):
        updates, state = update(gradients, state, params, value=1.0)
        found.append(float(np.linalg.norm(updates["stem"]) / optax.tree.get(state, "scale")))
    assert optax.tree.get(state, "scale") == 0.25
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


# The measurement tells right from wrong, and the plans are such that it can.


def by_leaf(values: dict[str, Any]) -> Any:
    return optax.stateless(
        lambda updates, _: map_with_names(lambda name, leaf: values[name] * leaf, updates)
    )


def decaying(values: dict[str, Any]) -> Any:
    def decayed(updates: PyTree, params: PyTree) -> PyTree:
        weights = named_leaves(params)
        decay = lambda name, leaf: leaf + DECAY * values[name] * weights[name]  # noqa: E731
        return map_with_names(decay, updates)

    return optax.stateless(decayed)


def chains(of: Multipliers) -> dict[str, tuple[Any, ...]]:
    """Adam with multipliers, right and wrong; the first word says what is measured then."""
    ε = by_leaf({name: 1 / one for name, one in of.epsilon.items()})
    λ = decaying({name: of.shrinkage[name] / one for name, one in of.rate.items()})
    rate, adam = by_leaf(of.rate), optax.scale_by_adam()
    return {
        "right": (ε, adam, λ, rate),
        "rate in front of Adam": (ε, rate, adam, λ),
        "rate twice": (ε, adam, λ, rate, rate),
        "rate dropped": (ε, adam, λ),
        "rate with that of epsilon, behind Adam": (adam, ε, λ, rate),
        "rate with decay in front of Adam": (ε, λ, adam, rate),
        "shrinkage behind the rate": (ε, adam, rate, λ),
        "shrinkage twice": (ε, adam, λ, λ, rate),
        "shrinkage dropped": (ε, adam, rate),
        "epsilon twice": (ε, ε, adam, λ, rate),
        "epsilon dropped": (adam, λ, rate),
        "epsilon the other way": (by_leaf(of.epsilon), adam, λ, rate),
        "epsilon with the rate in front of Adam and behind": (ε, rate, adam, λ, rate),
    }


@pytest.mark.parametrize("name", chains(Multipliers({}, {}, {})))
def test_the_measurement_tells_right_from_wrong(name):
    """Multipliers that are drawn, in chains that are made by hand."""
    network, random = "stacked", np.random.default_rng(0)
    leaves = sorted(named_leaves(drawn(network, 0)))
    values = random.choice([0.2, 0.5, 3.0], (3, len(leaves)))
    invented = Multipliers(*(dict(zip(leaves, one, strict=True)) for one in values))
    tx = optax.chain(*chains(invented)[name], optax.scale_by_learning_rate(RATE))
    move = stepping(tx, drawn(network, 0))
    if name == "right":
        confirm(move, network, "adamw", invented)
    else:
        with pytest.raises(AssertionError, match=f"{name.partition(' ')[0]} of"):
            confirm(move, network, "adamw", invented)


@pytest.mark.parametrize(("optimizer", "network"), MATRIX + REST)
def test_multipliers_of_the_plans_tell(optimizer, network):
    """Dropped or doubled they are others, of Adam's leaves and of those of others."""
    found, adams = promised(plan_of(network, optimizer)), by_adam(network, optimizer)
    telling = {name for name, rate in found.rate.items() if abs(np.log(rate)) > 0.3}
    assert bool(telling & adams) == (optimizer != "sgd")
    assert bool(telling - adams) == (optimizer in ("sgd", "muon"))
    assert {shrinkage > 0 for shrinkage in found.shrinkage.values()} == {True, False}
    decays = {name: found.shrinkage[name] / found.rate[name] for name in telling}
    assert any(abs(np.log(one)) > 0.3 for one in decays.values() if one)


# Errors.


def error(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


@over_kinds
def test_params_that_are_not_given(optimizer):
    make, params = made("stacked", optimizer), drawn("stacked", 0)
    message = error(lambda: jax.eval_shape(make().update, params, make().init(params)))
    by_optax = "but you are not passing `params` when calling `update`"
    assert (by_optax if optimizer == "muon" else "call update(gradients, state, params)") in message
    if optimizer != "muon":  # that of optax wants them always
        tx = make(RATE, 0.0)
        updates, _ = jax.eval_shape(tx.update, params, tx.init(params))
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def lacking(tree: PyTree) -> PyTree:
    return {"params": {name: one for name, one in tree["params"].items() if name != "up_0"}}


STARTS: dict[str, tuple[Callable[[PyTree], PyTree], str]] = {
    "what is in 'params'": (lambda tree: tree["params"], "'params/down_0/kernel'"),
    "a part": (lacking, "params lack 'params/up_0/bias' of shape (16,)"),
    "another width": (
        lambda tree: jax.eval_shape(Blocks(4, 2).init, KEY, jnp.zeros((2, 3), jnp.int32)),
        "'params/down_0/kernel' has shape (8, 4); the architecture expects (16, 8)",
    ),
    "nothing": (lambda tree: {}, "they hold nothing"),
    "None": (lambda tree: None, "they hold nothing"),
    "one vector, by optax.flatten": (
        lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]),
        "params hold a leaf '' of shape",
    ),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", STARTS)
def test_another_tree_at_the_start(name, optimizer):
    other, words = STARTS[name]
    tx = made("blocks", optimizer)()
    message = error(lambda: tx.init(other(drawn("blocks", 0))))
    assert words in message
    assert ("pass these, as plan.init" in message) == ("'params'" in name)


def test_gradients_of_another_tree():
    """Without a state that is like params nothing else would notice."""
    tx, params = plan_of("blocks", "sgd").optimizer(RATE), drawn("blocks", 0)
    message = error(lambda: tx.update(lacking(params), tx.init(params), params))
    assert "params lack 'params/up_0/bias'" in message


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_params_of_another_tree(optimizer):
    tx, params = made("blocks", optimizer)(), drawn("blocks", 0)
    message = error(lambda: jax.eval_shape(tx.update, params, tx.init(params), lacking(params)))
    assert "params lack 'params/up_0/" in message
