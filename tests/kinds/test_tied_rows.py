"""Initial weights beside a tied table whose logits `plan.apply` multiplies (theory §12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from tests.kinds.helpers import specs

pytestmark = pytest.mark.quick_compilation

TOKENS = jnp.arange(24).reshape(2, 12) % 11


def norm(h):
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-9)


def model(width, depth):
    def apply(p, tokens):
        h = p["table"][tokens] + p["positions"]
        for block in p["blocks"]:
            h = h + jax.nn.relu(norm(h) @ block["up"]) @ block["down"]
        return norm(h) @ p["table"].T

    block = specs(up=(width, 2 * width), down=(2 * width, width))
    return apply, {**specs(table=(11, width), positions=(12, width)), "blocks": [block] * depth}


def stream(plan):
    """Second moment of the last vertex before the readout, over that of the table's entries."""
    apply, _ = model(1, 1)

    @jax.jit
    def size(params):
        features = archscale.vertex_features(apply, params, TOKENS)
        return jnp.mean(features[max(features)] ** 2) / jnp.mean(params["table"] ** 2)

    return np.mean([size(plan.init(jax.random.key(seed))) for seed in range(4)])


@pytest.mark.parametrize("rule", [None, "he_normal"])
def test_rows_keep_their_entries_beyond_the_base(rule):
    """Entries of table and positions are the base's, whatever the initialization rule."""
    base = archscale.parametrize(model(16, 2), TOKENS, initialization=rule)
    plan = archscale.parametrize(model(64, 2), TOKENS, base=base, initialization=rule)
    found, before = named_leaves(plan.init_std), named_leaves(base.init_std)
    for name in ("table", "positions"):
        assert found[name] == pytest.approx(before[name], rel=1e-9) == pytest.approx(16**-0.5)
    params = plan.init(jax.random.key(0))
    assert float(params["table"].std()) == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize("form", ["auto", "folded"])
def test_branches_bring_what_they_bring_in_the_base(form):
    """The stream at initialization, over the rows of the table, is that of the base."""
    base = archscale.parametrize(model(64, 2), TOKENS)
    plan = archscale.parametrize(model(128, 2), TOKENS, base=base, form=form)
    found = stream(plan)
    assert found == pytest.approx(stream(base), rel=0.15)
    promised = archscale.rules.second_moments(
        plan.architecture,
        plan.choice.initialization,
        rule_options=plan.choice.initialization_options,
    )
    entries = float(named_leaves(plan.init_std)["table"]) ** 2
    assert promised[max(promised)] / entries == pytest.approx(found, rel=0.15)
