"""The models of `gpts.py` are the published GPT-2, and its 20 steps of AdamW are within reach.

Nothing of the library is tested here: these are the numbers that its multipliers must give.
"""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from archscale_jax._trees import map_with_names
from tests import gpts

pytestmark = pytest.mark.quick_compilation

CASES = ("completep_untied", "completep_untied_large_eps", "completep_tied")


@pytest.fixture(scope="module")
def cases(golden_dir):
    records = json.loads((golden_dir / "completep" / "cases.json").read_text())
    return {record["name"]: record for record in records}


@pytest.fixture(scope="module")
def arrays(golden_dir):
    """The arrays of every case, by its name."""
    found = {}
    for name in CASES:
        with np.load(golden_dir / "completep" / f"{name}.npz") as file:
            found[name] = dict(file)
    return found


def readout_multiplier(case):
    """What the caller multiplies the logits by: a table that is read twice cannot hold it."""
    return case["base_width"] / case["width"] if case["tied"] else 1.0


def loss_of(apply, case):
    def loss(params, tokens):
        logits = apply(params, tokens[:, :-1]) * readout_multiplier(case)
        return gpts.loss(logits, tokens)

    return loss


def batches(golden):
    return jnp.asarray(golden["batches"], jnp.int32)


# The first loss.


@pytest.mark.parametrize(
    ("variant", "tied"),
    [(gpts.VARIANTS[0], False), (gpts.VARIANTS[1], True)],
    ids=["fused-untied", "split-tied"],
)
@pytest.mark.parametrize("framework", gpts.FRAMEWORKS)
def test_every_model_has_the_published_first_loss(cases, arrays, framework, variant, tied):
    chosen = [name for name in CASES if cases[name]["tied"] == tied]
    with jax.enable_x64(True):
        model, inputs = gpts.build(framework, cases[chosen[0]], **variant)
        apply, template = gpts.pure(framework, model, inputs)
        assert {leaf.dtype for leaf in jax.tree.leaves(template)} == {np.dtype("float64")}
        loss = loss_of(apply, cases[chosen[0]])
        for name in chosen:
            case, golden = cases[name], arrays[name]
            for fold in (False, True):
                params = gpts.golden_params(framework, case, golden, template, fold, **variant)
                check_initial(golden, gpts.unfolded(framework, case, params, fold, **variant))
            assert jax.tree.structure(params) == jax.tree.structure(template)
            found = loss(params, batches(golden)[0])
            assert found.dtype == np.float64
            assert float(found) == pytest.approx(golden["losses"][0], rel=1e-13)


def check_initial(golden, found):
    """Nothing of the golden file is missing, and nothing changed, in a tree that was read back."""
    initial = {name for name in golden if name.startswith("init/")}
    assert {f"init/{name}" for name in found} == initial
    for name, value in found.items():
        np.testing.assert_array_equal(value, golden[f"init/{name}"])


# Twenty steps of plain optax, without the library.


def published_group(name):
    """The number of the group in which the published code has a parameter, by its golden name."""
    if name == "lm_head.weight":
        return 5
    if name.startswith("transformer.ln_f."):
        return 4
    if name in ("transformer.wte.weight", "transformer.wpe.weight"):
        return 0
    if ".ln_" in name:
        return 1
    return 2 if name.endswith(".weight") else 3


def folded_multipliers(case, name):
    """Multipliers of rate, decay and epsilon of the weight W' = aW: aη, λ/a, ε/a."""
    group, a = case["groups"][published_group(name)], gpts.fold_factor(case, name)
    rate = group["lr"] / case["learning_rate"]
    decay = group["weight_decay"] / case["weight_decay"]
    return a * rate, decay / a, group["eps"] / case["eps"] / a


def plain_adamw(case, framework, params):
    """AdamW with multipliers for each leaf; those of epsilon divide the gradient, not epsilon."""
    places = gpts.places(framework, case)
    rate, decay, epsilon = (
        map_with_names(
            lambda name, _, part=part: folded_multipliers(case, places[name].names[0])[part], params
        )
        for part in range(3)
    )

    def before(gradients, params):
        del params
        return jax.tree.map(lambda g, e: g / e, gradients, epsilon)

    def behind(updates, params):
        def step(u, w, r, d):
            return -case["learning_rate"] * r * (u + case["weight_decay"] * d * w)

        return jax.tree.map(step, updates, params, rate, decay)

    b1, b2 = case["betas"]
    adam = optax.scale_by_adam(b1, b2, case["eps"])
    return optax.chain(optax.stateless(before), adam, optax.stateless(behind))


def test_the_groups_of_the_published_code_are_found_by_name(cases, arrays):
    for name, case in cases.items():
        names = [key.removeprefix("init/") for key in arrays[name] if key.startswith("init/")]
        counts = collections.Counter(published_group(one) for one in names)
        assert [counts[number] for number in sorted(counts)] == [one["n"] for one in case["groups"]]


@pytest.mark.parametrize("name", ["completep_untied_large_eps", "completep_tied"])
def test_plain_optax_on_folded_weights_repeats_the_published_steps(cases, arrays, name):
    framework, case, golden = "function", cases[name], arrays[name]
    with jax.enable_x64(True):
        model, inputs = gpts.build(framework, case)
        apply, template = gpts.pure(framework, model, inputs)
        params = gpts.golden_params(framework, case, golden, template, fold=True)
        optimizer = plain_adamw(case, framework, params)
        gradient = jax.value_and_grad(loss_of(apply, case))

        def step(carry, tokens):
            params, state = carry
            loss, gradients = gradient(params, tokens)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        @jax.jit
        def train(params, batches):
            return jax.lax.scan(step, (params, optimizer.init(params)), batches)

        (params, _), losses = train(params, batches(golden))
        np.testing.assert_allclose(losses, golden["losses"], rtol=1e-12)
        check_final(golden, gpts.unfolded(framework, case, params, fold=True))


def check_final(golden, found):
    """Norms, and the first eight entries."""
    final = {name for name in golden if name.startswith("final_norm/")}
    assert {f"final_norm/{name}" for name in found} == final
    for name, value in found.items():
        norm, head = golden[f"final_norm/{name}"], golden[f"final_head/{name}"]
        np.testing.assert_allclose(np.linalg.norm(value), norm, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(value.ravel()[:8], head, rtol=0, atol=1e-13, err_msg=name)
