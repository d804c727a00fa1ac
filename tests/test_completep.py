"""Twenty steps of the published CompleteP code through `parametrize`, in float64.

The model has no multipliers: branches and readout are folded into weights, rates, decay and
epsilon; the logits of the tied table are multiplied by `plan.apply`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from tests import gpts
from tests.test_gpts import arrays, cases, check_final  # noqa: F401  (fixtures)

pytestmark = pytest.mark.quick_compilation

# Every framework, both variants, both readouts, every golden file.
RUNS = [
    ("completep_untied", "linen", 0, "auto"),
    ("completep_tied", "nnx", 1, "auto"),
    ("completep_tied", "equinox", 0, "auto"),
    ("completep_untied_large_eps", "haiku", 1, "auto"),
    ("completep_untied_large_eps", "function", 1, "auto"),
    ("completep_untied_large_eps", "function", 0, "multipliers"),
    ("completep_tied", "function", 1, "multipliers"),
]


def plan_of(framework, case, variant, **options):
    model, inputs = gpts.build(framework, case, **variant)
    base, _ = gpts.build(framework, gpts.base_of(case), **variant)
    return archscale.parametrize(model, *inputs, base=base, optimizer="adamw", **options)


@pytest.mark.parametrize(("name", "framework", "variant", "form"), RUNS)
def test_twenty_steps_are_the_published_ones(cases, arrays, name, framework, variant, form):  # noqa: F811
    case, golden = cases[name], arrays[name]
    variant, folded = gpts.VARIANTS[variant], form == "auto"
    with jax.enable_x64(True):
        plan = plan_of(framework, case, variant, form=form)
        b1, b2 = case["betas"]
        optimizer = plan.optimizer(
            case["learning_rate"], case["weight_decay"], b1=b1, b2=b2, eps=case["eps"]
        )
        template = jax.eval_shape(plan.init, jax.random.key(0))
        params = gpts.golden_params(framework, case, golden, template, folded, **variant)

        def step(carry, tokens):
            params, state = carry
            loss_of = lambda params: gpts.loss(plan.apply(params, tokens[:, :-1]), tokens)  # noqa: E731
            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        @jax.jit
        def train(params, batches):
            return jax.lax.scan(step, (params, optimizer.init(params)), batches)

        (params, _), losses = train(params, jnp.asarray(golden["batches"], jnp.int32))
        np.testing.assert_allclose(losses, golden["losses"], rtol=1e-12)
        check_final(golden, gpts.unfolded(framework, case, params, folded, **variant))


# Ratios that tell every exponent from every other: m_N = 8/3, m_L = 4/3, α = 0.7, κ = 3/5.

SIZES = {
    "width": 48, "base_width": 18, "depth": 4, "base_depth": 3, "heads": 3, "vocab": 11,
    "length": 6, "batch": 2, "alpha": 0.7,
}  # fmt: skip


def expected(case, golden_name, kappa):
    """Rate, decay and epsilon of theory §12, folded: W' = aW has aη, λ/a, ε/a."""
    n, m, alpha = case["width"] / case["base_width"], case["depth"] / case["base_depth"], 0.7
    matrix = golden_name.endswith(".weight") and ".ln_" not in golden_name
    in_block = ".h." in golden_name
    ends = "c_proj" in golden_name
    a = m**-alpha if ends else (1 / n if golden_name == "lm_head.weight" else 1.0)
    rate = m ** (alpha - 1) if in_block else 1.0
    decay = 1.0
    if in_block and matrix:
        rate, decay = rate / n, n
    epsilon = m**-alpha / n
    decay = decay if matrix else 0.0
    root = math.sqrt(kappa)
    return a * rate * root, decay / a * root, epsilon / a / root


# Both variants of every framework, one of them tied.
TABLES = [
    (framework, variant, (place + variant) % 2 == 1)
    for place, framework in enumerate(gpts.FRAMEWORKS)
    for variant in range(2)
]


@pytest.mark.parametrize(("framework", "variant", "tied"), TABLES)
def test_every_multiplier_is_that_of_the_table(framework, variant, tied):
    variant = gpts.VARIANTS[variant]
    case = {**SIZES, "tied": tied}
    with jax.enable_x64(True):
        plan = plan_of(
            framework, case, variant, depth_exponent=0.7, batch_ratio=1.5, token_ratio=2.5
        )
    found = [named_leaves(one) for one in (plan.learning_rate, plan.weight_decay, plan.epsilon)]
    for name, place in gpts.places(framework, case, variant["fused"]).items():
        numbers = [one[name] for one in found]
        assert numbers == pytest.approx(expected(case, place.names[0], 0.6), rel=1e-12), name


def test_the_forms_are_one_training():
    """Folded and with multipliers: the same outputs, updates in one ratio, at odd ratios."""
    case = {**SIZES, "tied": True}
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    outputs = []
    with jax.enable_x64(True):
        for form in ("auto", "multipliers"):
            plan = plan_of("function", case, gpts.VARIANTS[0], form=form, attention_scale="1/d")
            params, optimizer = plan.init(jax.random.key(0)), plan.optimizer(0.01, 0.1, eps=1e-3)
            state = optimizer.init(params)

            @jax.jit
            def update(params, state, plan=plan, optimizer=optimizer):
                gradients = jax.grad(lambda p: jnp.square(plan.apply(p, tokens)).sum())(params)
                updates, state = optimizer.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            for _ in range(3):
                params, state = update(params, state)
            outputs.append(plan.apply(params, tokens))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-12)
