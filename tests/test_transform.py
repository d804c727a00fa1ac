"""The optax transformation: what a multiplier does behind and before every kind of optimizer."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from archscale_jax._architecture import Architecture, Parameter, Role
from archscale_jax._graph import Operator, build_graph
from archscale_jax._optax import scale_by_architecture
from archscale_jax._spaces import cell_graph, dag_graph
from archscale_jax._trees import named_leaves
from archscale_jax.rules import learning_rate_multipliers
from experiments.lab.models import DagCNN, DagMLP

BASE = dag_graph("2")
# The paths of 2_02_212 have depths 1, 1 and 3; that of the base has depth 1 [AAS Eq. 9].
MULTIPLIER = 1 / math.sqrt(1 + 1 + 27)
RATE = 0.1

PARAMETERS = (
    Parameter("hidden/bias", Role.BIAS, Role.HIDDEN, (3,), 2, 3, edge=0),
    Parameter("hidden/kernel", Role.HIDDEN, Role.HIDDEN, (2, 3), 2, 3, edge=0),
    Parameter("readout", Role.READOUT, Role.READOUT, (3, 1), 3, 1),
)
ARCHITECTURE = Architecture(dag_graph("2_02_212"), PARAMETERS)


def tree(make):
    """A params tree whose leaves are `make(shape)`."""
    bias, kernel, readout = (make(parameter.shape) for parameter in PARAMETERS)
    return {"hidden": {"bias": bias, "kernel": kernel}, "readout": readout}


def scale(**options):
    return scale_by_architecture(ARCHITECTURE, BASE, "path_sum", **options)


def scaled_rates(**options):
    return learning_rate_multipliers(ARCHITECTURE, BASE, "path_sum", **options)


def trajectory(optimizer, steps=5, seed=0):
    """Params after a number of updates with the same random gradients for every optimizer."""
    random = np.random.default_rng(seed)
    params = tree(lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32))
    state = optimizer.init(params)
    path = []
    for _ in range(steps):
        gradients = tree(lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32))
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


WRAPPERS = {
    "schedule_free": lambda inner: optax.contrib.schedule_free(inner, RATE),
    "sam": lambda inner: optax.contrib.sam(
        inner, optax.chain(optax.contrib.normalize(), optax.sgd(RATE)), sync_period=2
    ),
    "lookahead": lambda inner: optax.lookahead(inner, 2, 0.5),
}


def way(optimizer, steps=10, pairs=False):
    """How far params, or the pairs of lookahead, have moved from 0 with the gradient 1."""
    params, ones = tree(jnp.zeros), tree(jnp.ones)
    given: Any = optax.LookaheadParams.init_synced(params) if pairs else params
    state = optimizer.init(given)
    for _ in range(steps):
        updates, state = optimizer.update(ones, state, given)
        given = optax.apply_updates(given, updates)
    return given.slow if pairs else given


def scaled(params, multiplier):
    return jax.tree.map(lambda leaf: multiplier * leaf, params)


def close(one, other, rtol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol / 10), one, other
    )


def test_the_multiplier_is_that_of_the_equation():
    multipliers = scaled_rates()
    assert multipliers == {parameter.name: pytest.approx(MULTIPLIER) for parameter in PARAMETERS}
    updates, _ = scale().update(tree(jnp.ones), optax.EmptyState())
    close(updates, tree(lambda shape: np.full(shape, MULTIPLIER, np.float32)))


class TestBehindAnOptimizer:
    """A multiplier f behind turns the rate η into f·η, whatever the optimizer."""

    @pytest.mark.parametrize(
        "make",
        [
            optax.sgd,
            functools.partial(optax.sgd, momentum=0.9),
            functools.partial(optax.sgd, momentum=0.9, nesterov=True),
            optax.adam,
            functools.partial(optax.adamw, weight_decay=0.1),
            functools.partial(optax.lion, weight_decay=0.1),
            optax.rmsprop,
        ],
    )
    def test_scales_the_rate(self, make):
        close(trajectory(optax.chain(make(RATE), scale())), trajectory(make(RATE * MULTIPLIER)))

    def test_scales_a_schedule(self):
        schedule = optax.linear_schedule(0.5, 0.0, 4)
        scaled = trajectory(optax.chain(optax.sgd(schedule, momentum=0.9), scale()))
        close(scaled, trajectory(optax.sgd(lambda step: MULTIPLIER * schedule(step), momentum=0.9)))

    def test_scales_coupled_weight_decay_with_the_gradient(self):
        decay, rate = 0.3, RATE * MULTIPLIER
        decayed = optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=0.5), scale()
        )
        path = trajectory(decayed)
        # Written out: v ← ½ v + g + decay·p, p ← p - f·η·v.
        random = np.random.default_rng(0)
        params = tree(lambda shape: random.normal(size=shape).astype(np.float32))
        velocity = tree(np.zeros)
        for after in path:
            gradients = tree(lambda shape: random.normal(size=shape).astype(np.float32))
            velocity = jax.tree.map(
                lambda v, g, p: 0.5 * v + g + decay * p, velocity, gradients, params
            )
            params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
            close(after, params, rtol=1e-5)

    def test_scales_decoupled_weight_decay_too(self):
        """A pure decay, without gradient: weights shrink by 1 - f·η·decay a step."""
        optimizer = optax.chain(optax.adamw(RATE, weight_decay=0.5), scale())
        params = tree(jnp.ones)
        updates, _ = optimizer.update(tree(jnp.zeros), optimizer.init(params), params)
        expected = 1 - MULTIPLIER * RATE * 0.5
        close(optax.apply_updates(params, updates), tree(lambda shape: np.full(shape, expected)))

    def test_decay_behind_it_stays(self):
        """The chain of the documentation: Adam at rate f·η, decay at rate η."""
        decay = 0.2
        documented = optax.chain(
            optax.scale_by_adam(),
            scale(),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(RATE),
        )
        same = optax.adamw(RATE * MULTIPLIER, weight_decay=decay / MULTIPLIER)
        close(trajectory(documented), trajectory(same))


class TestBeforeAnOptimizer:
    @pytest.mark.parametrize("nesterov", [False, True])
    def test_momentum_is_linear(self, nesterov):
        sgd = optax.sgd(RATE, momentum=0.9, nesterov=nesterov)
        close(trajectory(optax.chain(scale(), sgd)), trajectory(optax.chain(sgd, scale())), 1e-5)

    def test_adam_divides_it_out(self):
        path = trajectory(optax.chain(scale(), optax.adam(RATE)))
        close(path, trajectory(optax.adam(RATE)), rtol=1e-5)


class TestPlain:
    def test_has_no_state(self):
        assert jax.tree.leaves(scale().init(tree(jnp.zeros))) == []
        plain = optax.adam(RATE).init(tree(jnp.zeros))
        chained = optax.chain(optax.adam(RATE), scale()).init(tree(jnp.zeros))
        assert [leaf.nbytes for leaf in jax.tree.leaves(chained)] == [
            leaf.nbytes for leaf in jax.tree.leaves(plain)
        ]

    def test_leaves_gradients_and_state_as_they_are(self):
        gradients, state = tree(jnp.ones), optax.EmptyState()
        _, new = scale().update(gradients, state, tree(jnp.zeros))
        assert new is state
        close(gradients, tree(np.ones))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_rounds_the_product_once(self, dtype):
        random = np.random.default_rng(0)
        updates = tree(lambda shape: jnp.asarray(random.normal(size=shape), dtype))
        scaled, _ = scale().update(updates, optax.EmptyState())
        # In float64 the product is exact enough to round once.
        exact = jax.tree.map(
            lambda u: (np.asarray(u, np.float64) * MULTIPLIER).astype(dtype), updates
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(scaled)} == {jnp.dtype(dtype)}
        jax.tree.map(np.testing.assert_array_equal, scaled, exact)

    def test_keeps_the_precision_of_float64(self):
        with jax.enable_x64(True):
            updates = tree(lambda shape: jnp.ones(shape, jnp.float64))
            scaled, _ = scale().update(updates, optax.EmptyState())
        for leaf in jax.tree.leaves(scaled):
            assert leaf.dtype == np.float64
            np.testing.assert_allclose(leaf, MULTIPLIER, rtol=1e-15)

    def test_multipliers_are_constants_of_the_program(self):
        def parameters(optimizer):
            params = tree(jnp.zeros)
            step = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
            program = step.compile().as_text() or ""
            return len(re.findall(r"parameter\(\d+\)", program.partition("ENTRY")[2]))

        sgd = optax.sgd(RATE, momentum=0.9)
        assert parameters(optax.chain(sgd, scale())) == parameters(sgd) > 0


class TestComposition:
    """Every wrapper of optax and JAX; the ground truth is plain SGD at the scaled rate."""

    sgd = optax.sgd(RATE * MULTIPLIER, momentum=0.9)

    def test_with_inject_hyperparams_inside(self):
        injected = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0, momentum=0.9)
        optimizer = optax.chain(injected, scale())

        def init(params):
            return optax.tree.set(optimizer.init(params), learning_rate=RATE)

        close(
            trajectory(optax.GradientTransformation(init, optimizer.update)), trajectory(self.sgd)
        )

    def test_with_inject_hyperparams_around(self):
        def make(learning_rate):
            return optax.chain(optax.sgd(learning_rate, momentum=0.9), scale())

        close(trajectory(optax.inject_hyperparams(make)(learning_rate=RATE)), trajectory(self.sgd))

    @pytest.mark.parametrize(
        "mask",
        [
            {"hidden": {"bias": False, "kernel": True}, "readout": False},
            {"hidden": {"bias": True, "kernel": False}, "readout": True},
            {"hidden": True, "readout": False},
            {"hidden": False, "readout": True},
            False,
        ],
    )
    def test_with_masks_of_leaves_and_of_subtrees(self, mask):
        optimizer = optax.chain(optax.sgd(RATE, momentum=0.9), optax.masked(scale(), mask))
        scaled, plain = trajectory(self.sgd), trajectory(optax.sgd(RATE, momentum=0.9))
        is_scaled = jax.tree.broadcast(mask, scaled[0])
        for after, *both in zip(trajectory(optimizer), scaled, plain, strict=True):
            close(after, jax.tree.map(lambda yes, a, b: a if yes else b, is_scaled, *both))

    def test_with_multi_transform(self):
        labels = {"hidden": "adam", "readout": "frozen"}
        transforms = {
            "adam": optax.chain(optax.adam(RATE), scale()),
            "frozen": optax.set_to_zero(),
        }
        path = trajectory(optax.multi_transform(transforms, labels))
        expected = trajectory(optax.adam(RATE * MULTIPLIER))
        for after, other in zip(path, expected, strict=True):
            close(after["hidden"], other["hidden"])
            np.testing.assert_array_equal(after["readout"], path[0]["readout"])

    @pytest.mark.parametrize("whole", [True, False])
    def test_with_accumulated_gradients(self, whole):
        def accumulated(optimizer):
            steps = optax.MultiSteps(optimizer, every_k_schedule=2)
            return optax.GradientTransformation(steps.init, jax.jit(steps.update))

        sgd = optax.sgd(RATE, momentum=0.9)
        optimizer = (
            accumulated(optax.chain(sgd, scale()))
            if whole
            else optax.chain(accumulated(sgd), scale())
        )
        path = trajectory(optimizer)
        close(path, trajectory(accumulated(self.sgd)))
        np.testing.assert_array_equal(path[1]["readout"], path[2]["readout"])

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_inside_what_keeps_the_params_is_the_rate(self, wrapper):
        """A constant gradient: the way of a parameter is the rate times the steps."""
        wrap, pairs = WRAPPERS[wrapper], wrapper == "lookahead"
        for inner in (optax.sgd(RATE), optax.adam(RATE, b1=0.0)):
            plain = way(wrap(inner), pairs=pairs)
            inside = way(wrap(optax.chain(inner, scale())), pairs=pairs)
            close(inside, scaled(plain, MULTIPLIER), rtol=1e-4)
            if not pairs:
                behind = way(optax.chain(wrap(inner), scale()))
                ratio = float(jnp.mean(behind["readout"]) / jnp.mean(plain["readout"]))
                assert abs(ratio / MULTIPLIER - 1) > 0.1

    def test_behind_lookahead_raises_by_name(self):
        params = optax.LookaheadParams.init_synced(tree(jnp.zeros))
        with pytest.raises(ValueError, match="fast/"):
            optax.chain(optax.lookahead(optax.sgd(RATE), 2, 0.5), scale()).init(params)

    def test_inside_schedule_free_adamw_as_it_is_spelled_out(self):
        """Without multipliers the spelling of the docs is that of `schedule_free_adamw`."""

        def spelled(*more):
            inner = optax.chain(
                optax.scale_by_rms(decay=0.999, eps=1e-8, bias_correction=True),
                optax.add_decayed_weights(0.1),
                optax.scale_by_learning_rate(RATE),
                *more,
            )
            return optax.contrib.schedule_free(inner, learning_rate=RATE)

        whole = optax.contrib.schedule_free_adamw(RATE, weight_decay=0.1)
        for one, other in zip(trajectory(spelled()), trajectory(whole), strict=True):
            close(one, other)
        # From 0, where the decay is 0, one step is the rate times the sign of the gradient.
        first = way(spelled(scale()), steps=1)
        close(first, tree(lambda shape: jnp.full(shape, -RATE * MULTIPLIER)), rtol=1e-4)

    @pytest.mark.parametrize("name", ["cocob", "madgrad"])
    def test_behind_what_has_no_inside_is_not_the_rate(self, name):
        optimizer = getattr(optax.contrib, name)
        make = optimizer if name == "cocob" else functools.partial(optimizer, 1e-3)
        plain, behind = way(make()), way(optax.chain(make(), scale()))
        ratio = float(jnp.mean(behind["readout"]) / jnp.mean(plain["readout"]))
        assert abs(ratio / MULTIPLIER - 1) > 0.1

    @pytest.mark.parametrize("name", ["dog", "dowg", "prodigy", "dadapt_adamw"])
    def test_behind_what_measures_distances_parameters_differ_by_the_multipliers(self, name):
        """Half of the parameters are scaled, the others are not, by the same optimizer."""
        optimizer = getattr(optax.contrib, name)
        make = functools.partial(optimizer, 1.0) if name == "dog" else optimizer
        masked = optax.masked(scale(), {"hidden": False, "readout": True})
        moved = way(optax.chain(make(), masked), steps=40)
        ratio = float(jnp.mean(moved["readout"]) / jnp.mean(moved["hidden"]["kernel"]))
        assert ratio == pytest.approx(MULTIPLIER, rel=0.05)

    def test_with_clipped_gradients(self):
        clip = optax.clip_by_global_norm(0.5)
        optimizer = optax.chain(clip, optax.sgd(RATE, momentum=0.9), scale())
        close(trajectory(optimizer), trajectory(optax.chain(clip, self.sgd)))

    def test_with_apply_if_finite(self):
        optimizer = optax.apply_if_finite(optax.chain(self.sgd, scale()), 3)
        params = tree(jnp.ones)
        state = optimizer.init(params)
        updates, state = optimizer.update(
            tree(lambda shape: jnp.full(shape, jnp.nan)), state, params
        )
        close(updates, tree(np.zeros))
        updates, state = optimizer.update(tree(jnp.ones), state, params)
        close(updates, tree(lambda shape: np.full(shape, -RATE * MULTIPLIER**2)))

    def test_under_jit(self):
        optimizer = optax.chain(optax.sgd(RATE, momentum=0.9), scale())
        compiled = optax.GradientTransformation(optimizer.init, jax.jit(optimizer.update))
        close(trajectory(compiled), trajectory(self.sgd))

    def test_under_vmap_over_rates(self):
        def first_step(rate):
            optimizer = optax.chain(optax.sgd(rate), scale())
            return optimizer.update(tree(jnp.ones), optimizer.init(tree(jnp.zeros)))[0]

        rates = jnp.array([0.1, 0.2, 0.7])
        close(
            jax.vmap(first_step)(rates),
            tree(
                lambda shape: (
                    -MULTIPLIER * np.ones((3, *shape)) * rates.reshape(3, *[1] * len(shape))
                )
            ),
        )

    def test_under_grad_through_the_update(self):
        """The derivative by the rate of a loss that is linear after the step is -f·⟨g, l⟩."""
        gradients, slopes = tree(jnp.ones), tree(lambda shape: jnp.full(shape, 2.0))

        def loss(rate):
            optimizer = optax.chain(optax.sgd(rate), scale())
            updates, _ = optimizer.update(gradients, optimizer.init(gradients))
            return optax.tree.vdot(optax.apply_updates(tree(jnp.zeros), updates), slopes)

        size = sum(math.prod(parameter.shape) for parameter in PARAMETERS)
        assert float(jax.grad(loss)(RATE)) == pytest.approx(-MULTIPLIER * 2 * size)

    def test_with_the_optimizer_of_flax(self):
        network = nnx.eval_shape(lambda: DagMLP(dag_graph("2_02_212"), 2, 3, 1, rngs=nnx.Rngs(0)))
        random = np.random.default_rng(0)
        filled = jax.tree.map(
            lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), nnx.state(network)
        )
        nnx.update(network, filled)
        before = nnx.to_pure_dict(filled)
        scaling = scale_by_architecture(network.architecture(), BASE, "path_sum")
        chain = optax.chain(optax.sgd(RATE, momentum=0.9), scaling)
        optimizer = nnx.Optimizer(network, chain, wrt=nnx.Param)
        gradients = nnx.grad(lambda network: jnp.sum(network(jnp.ones((4, 2)))))(network)
        optimizer.update(network, gradients)
        expected = jax.tree.map(
            lambda p, g: p - RATE * MULTIPLIER * g, before, nnx.to_pure_dict(gradients)
        )
        close(nnx.to_pure_dict(nnx.state(network, nnx.Param)), expected, rtol=1e-5)


class TestMultipliers:
    def abstract(self, width, *, text="2_12", kernel_size=3, channels=3):
        graph = dag_graph(text, kernel_size=kernel_size)
        return nnx.eval_shape(
            lambda: DagCNN(graph, channels, width, 10, normalization="batch", rngs=nnx.Rngs(0))
        ).architecture()

    def test_divide_by_the_kernel_size_of_the_network(self):
        network, base = self.abstract(4, kernel_size=5), self.abstract(4, kernel_size=3)
        multipliers = learning_rate_multipliers(network, base, "path_sum")
        assert multipliers == dict.fromkeys(multipliers, pytest.approx(3 / 5))

    def test_of_a_layer_can_divide_by_its_own_kernel_size(self):
        network, base = self.abstract(4, kernel_size=5), self.abstract(4, kernel_size=3)
        multipliers = learning_rate_multipliers(network, base, "path_sum", kernel_per_layer=True)
        for parameter in network.parameters:
            convolution = parameter.name.startswith(("stem", "layers"))
            expected = 3 / 5 if convolution else 3  # q_base / q_layer
            assert multipliers[parameter.name] == pytest.approx(expected), parameter.name

    def test_of_a_mixed_network_differ_by_layer(self):
        network = nnx.eval_shape(
            lambda: DagCNN(cell_graph("3_02_001"), 3, 4, 10, rngs=nnx.Rngs(0))
        ).architecture()
        sizes = {p.name: p.kernel_size for p in network.parameters if p.name.startswith("layers")}
        assert sorted(sizes.values()) == [1, 1, 3, 3]
        multipliers = learning_rate_multipliers(network, rule="none", kernel_per_layer=True)
        for name, size in sizes.items():
            assert multipliers[name] == 3 / size

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            # Width 4 to 12: fans of hidden layers grow 3 times.
            (
                "sgd",
                {
                    "stem/kernel": 3,
                    "stem/bias": 3,
                    "layers/0_1/kernel": 1,
                    "layers/0_1/bias": 3,
                    "normalizations/0/scale": 3,
                    "readout/kernel": 1 / 3,
                    "readout/bias": 1,
                },
            ),
            (
                "adam",
                {
                    "stem/kernel": 1,
                    "stem/bias": 1,
                    "layers/0_1/kernel": 1 / 3,
                    "layers/0_1/bias": 1,
                    "normalizations/0/scale": 1,
                    "readout/kernel": 1 / 3,
                    "readout/bias": 1,
                },
            ),
        ],
    )
    def test_of_width_multiply(self, rule, expected):
        wide, base = self.abstract(12), self.abstract(4)
        multipliers = learning_rate_multipliers(wide, base, "none", width_rule=rule)
        assert {name: multipliers[name] for name in expected} == pytest.approx(expected)
        both = learning_rate_multipliers(wide, self.abstract(4, text="2"), width_rule=rule)
        assert both == pytest.approx(multipliers)  # a width rule alone answers for width alone
        options = {"rule": "path_sum", "width_rule": rule}
        both = learning_rate_multipliers(wide, self.abstract(4, text="2"), **options)
        topology = learning_rate_multipliers(wide, self.abstract(4, text="2"), "path_sum")
        assert both == pytest.approx(
            {name: multipliers[name] * topology[name] for name in multipliers}
        )

    def test_of_width_take_a_function(self):
        multipliers = learning_rate_multipliers(
            self.abstract(12),
            self.abstract(4),
            width_rule=lambda parameter, r, s: r if parameter.role == Role.READOUT else s,
        )
        assert multipliers["readout/kernel"] == 3
        assert multipliers["stem/kernel"] == 3

    @pytest.mark.parametrize("base", [BASE, None])
    def test_of_width_need_an_architecture(self, base):
        with pytest.raises(ValueError, match=r"width_rule .* pass the base network's Architecture"):
            learning_rate_multipliers(ARCHITECTURE, base, "none", width_rule="sgd")

    def test_pass_options_to_the_rule(self):
        multipliers = scaled_rates(rule_options={"depth_offset": 1})
        expected = math.sqrt(2**3 / (2**3 + 2**3 + 4**3))
        assert multipliers["readout"] == pytest.approx(expected)
        updates, _ = scale(rule_options={"depth_offset": 1}).update(
            tree(jnp.ones), optax.EmptyState()
        )
        np.testing.assert_allclose(updates["readout"], expected, rtol=1e-6)

    def test_take_an_architecture_as_base(self):
        base = Architecture(BASE, ())
        assert learning_rate_multipliers(ARCHITECTURE, base, "path_sum") == scaled_rates()

    def test_of_a_state_and_its_dictionary_have_the_same_names(self):
        network = nnx.eval_shape(lambda: DagMLP(BASE, 2, 3, 1, rngs=nnx.Rngs(0)))
        multipliers = learning_rate_multipliers(network.architecture(), BASE)
        assert set(multipliers) == set(named_leaves(nnx.state(network, nnx.Param)))


class TestErrors:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_raise_on_a_multiplier_that_is_not_a_rate(self, value):
        with pytest.raises(ValueError, match="must be finite and positive"):
            scale_by_architecture(ARCHITECTURE, BASE, rule=lambda graph, base: value)

    def test_name_an_unknown_rule(self):
        with pytest.raises(ValueError, match="unknown learning-rate rule 'paths'"):
            scale_by_architecture(ARCHITECTURE, BASE, "paths")
        with pytest.raises(ValueError, match="unknown width rule 'mup'"):
            scale_by_architecture(ARCHITECTURE, ARCHITECTURE, width_rule="mup")

    def test_ask_for_a_base(self):
        with pytest.raises(ValueError, match="pass base"):
            scale_by_architecture(ARCHITECTURE, rule="path_sum")

    @pytest.mark.parametrize(
        ("operators", "match"),
        [
            ((2, 1, 2), "has 1 residual addition, .*depth_rule='sgd', .*width_rule=.*'path_sum'"),
            ((2, Operator.CONCATENATION, Operator.CONCATENATION), "has concatenations, .*'none'"),
            ((2, Operator.PRODUCT, Operator.PRODUCT), "has products, .*pass width_rule='sgd'"),
        ],
    )
    def test_ask_for_a_rule_where_none_is_safe(self, operators, match):
        network = Architecture(build_graph(3, [0, 0, 1], [1, 2, 2], operators), ())
        with pytest.raises(ValueError, match=match):
            scale_by_architecture(network, BASE)
        assert learning_rate_multipliers(network, BASE, "none") == {}
        plain = Architecture(dag_graph("2_22"), PARAMETERS)  # layers alone are summed
        assert learning_rate_multipliers(plain, BASE) == learning_rate_multipliers(
            plain, BASE, "path_sum_activations"
        )

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"rule": "path_sum", "depth_rule": "adam"},
                "depth_rule='adam' and the rule path_sum both answer for depth",
            ),
            ({"consistent_rms": 0.2}, "consistent_rms .* width_rule='muon', found width_rule=None"),
            (
                {"width_rule": "sgd", "dimension_numbers": True},
                "dimension_numbers .* width_rule='muon', found width_rule='sgd'",
            ),
        ],
    )
    def test_name_what_contradicts(self, options, match):
        with pytest.raises(ValueError, match=match):
            scale_by_architecture(ARCHITECTURE, ARCHITECTURE, **options)

    def test_name_an_unknown_leaf_beside_masked_ones(self):
        masked = optax.masked(scale(), {"hidden": True, "readout": False, "extra": True})
        with pytest.raises(ValueError, match=r"'extra' of shape \(2,\)"):
            masked.init(tree(jnp.zeros) | {"extra": jnp.zeros(2)})

    @pytest.mark.parametrize("compile", [jax.jit, lambda function: function])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: {"hidden": t["hidden"]}, r"lack 'readout' of shape \(3, 1\)"),
            (lambda t: t | {"extra": t["readout"]}, r"'extra' of shape \(3, 1\)"),
            (lambda t: t | {"readout": t["readout"].T}, r"'readout' has shape \(1, 3\)"),
        ],
    )
    def test_name_the_leaf_in_init_and_update(self, compile, change, message):
        wrong = change(tree(jnp.zeros))
        with pytest.raises(ValueError, match=message):
            compile(scale().init)(wrong)
        with pytest.raises(ValueError, match=message):
            compile(scale().update)(wrong, optax.EmptyState())


class TestMultipliersOutOfRange:
    def test_of_very_many_paths_raises(self):
        complete = dag_graph("_".join("2" * vertex for vertex in range(1, 290)))
        stem = Parameter("w", Role.INPUT, Role.INPUT, (4, 4), 4, 4)
        with pytest.raises(ValueError, match=r"'w' is .*e-4\d; .*range of float32"):
            scale_by_architecture(Architecture(complete, (stem,)), dag_graph("2"))

    def test_of_a_width_rule_that_turns_the_sign_raises(self):
        stem = Parameter("w", Role.INPUT, Role.INPUT, (4, 4), 4, 4)
        architecture = Architecture(dag_graph("2"), (stem,))
        with pytest.raises(ValueError, match=r"'w' is -1"):
            scale_by_architecture(architecture, architecture, width_rule=lambda *_: -1.0)
