"""Mixtures of experts as they are written: roles, multipliers, initial weights (theory §12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archscale_jax as archscale
from archscale_jax._trees import named_leaves
from tests.kinds.helpers import normal, spec, specs

pytestmark = pytest.mark.quick_compilation

EXPERTS, CHOSEN, SLOTS = 4, 2, 8


def routed(p, h):
    """Shares [tokens, 2] of the chosen experts, and which they are, one-hot [tokens, 2, 4]."""
    shares, chosen = jax.lax.top_k(jax.nn.softmax(h @ p["router"]), CHOSEN)
    return shares / shares.sum(-1, keepdims=True), jax.nn.one_hot(chosen, EXPERTS)


def sent_by_one_hots(p, h):
    shares, choice = routed(p, h)
    sent = jnp.einsum("tke,td->tked", choice, h)
    inner = jax.nn.gelu(jnp.einsum("tked,edm->tkem", sent, p["up"]))
    return jnp.einsum("tk,tked->td", shares, jnp.einsum("tkem,emd->tked", inner, p["down"]))


def one_einsum(p, h):
    shares, choice = routed(p, h)
    inner = jax.nn.gelu(jnp.einsum("tke,td,edm->tkm", choice, h, p["up"]))
    return jnp.einsum("tk,tke,tkm,emd->td", shares, choice, inner, p["down"])


def all_work(p, h):
    shares, choice = routed(p, h)
    inner = jax.nn.gelu(jnp.einsum("td,edm->etm", h, p["up"]))
    outputs = jnp.einsum("etm,emd->etd", inner, p["down"])
    return jnp.einsum("te,etd->td", jnp.einsum("tk,tke->te", shares, choice), outputs)


def mapped(p, h):
    shares, choice = routed(p, h)
    outputs = jax.vmap(lambda up, down: jax.nn.gelu(h @ up) @ down)(p["up"], p["down"])
    return jnp.einsum("te,etd->td", jnp.einsum("tk,tke->te", shares, choice), outputs)


def with_capacity(p, h):
    """Every expert has 8 slots, as in GShard and Switch."""
    shares, choice = routed(p, h)
    flat = choice.reshape(-1, EXPERTS)
    place = (jnp.cumsum(flat, 0) - flat).reshape(choice.shape)
    slot = jax.nn.one_hot((place * choice).sum(-1).astype(int), SLOTS)
    combine = jnp.einsum("tk,tke,tkc->tec", shares, choice * (place < SLOTS), slot)
    sent = jnp.einsum("tec,td->ecd", (combine > 0).astype(h.dtype), h)
    inner = jax.nn.gelu(jnp.einsum("ecd,edm->ecm", sent, p["up"]))
    return jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecm,emd->ecd", inner, p["down"]))


def ragged(p, h):
    shares, chosen = jax.lax.top_k(jax.nn.softmax(h @ p["router"]), CHOSEN)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    inner = jax.nn.gelu(jax.lax.ragged_dot(jnp.repeat(h, CHOSEN, 0)[order], p["up"], sizes))
    outputs = jax.lax.ragged_dot(inner, p["down"], sizes)[jnp.argsort(order)]
    return jnp.einsum("tk,tkd->td", shares, outputs.reshape(*shares.shape, -1))


FORMS = [sent_by_one_hots, one_einsum, all_work, mapped, with_capacity, ragged]


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)


def network(mixture, width, hidden, depth):
    """x + mixture(norm(x)) between a stem and a readout, as a pair."""

    def apply(p, x):
        h = x @ p["stem"]
        for block in p["blocks"]:
            h = h + mixture(block, norm(h))
        return norm(h) @ p["readout"]

    block = specs(
        router=(width, EXPERTS), up=(EXPERTS, width, hidden), down=(EXPERTS, hidden, width)
    )
    return apply, {**specs(stem=(8, width), readout=(width, 3)), "blocks": [block] * depth}


def plan_of(mixture, *sizes, base=None, tokens=12, **options):
    options = {"optimizer": "adamw", "epsilon_rule": "gradient", **options}
    return archscale.parametrize(network(mixture, *sizes), spec(tokens, 8), base=base, **options)


def of_block(tree):
    """Leaves of the first block by their last names."""
    first = {name: leaf for name, leaf in named_leaves(tree).items() if "blocks/0/" in name}
    return {name.rpartition("/")[2]: np.max(leaf) for name, leaf in first.items()}


@pytest.mark.parametrize("mixture", FORMS, ids=lambda one: one.__name__)
def test_multipliers_of_experts_and_routers(mixture):
    """Width by 4, experts by 8, depth by 2, α = 1.

    Rate 1/4 and 1/8 of what reads them, 1/2 more at the end of a branch; epsilon as the gradients
    of what is written: 1/8 · 1/2 and 1/4; of the router 1/2.
    """
    plan = plan_of(mixture, 64, 128, 4, base=plan_of(mixture, 16, 16, 2))
    roles = {one.name: str(one.role) for one in plan.architecture.parameters}
    assert {roles[f"blocks/0/{name}"] for name in ("router", "up", "down")} == {"hidden"}
    assert of_block(plan.learning_rate) == {"router": 1 / 4, "up": 1 / 4, "down": 1 / 16}
    assert of_block(plan.weight_decay) == {"router": 4, "up": 4, "down": 16}
    assert of_block(plan.epsilon) == {"router": 1 / 2, "up": 1 / 16, "down": 1 / 4}


@pytest.mark.parametrize("mixture", FORMS, ids=lambda one: one.__name__)
def test_routers_are_drawn_as_readouts_and_experts_as_layers(mixture):
    """By 1/n and by 1/√n; what experts bring falls with the depth."""
    base = plan_of(mixture, 16, 32, 2)
    found = of_block(plan_of(mixture, 64, 128, 4, base=base).init_std)
    before = of_block(base.init_std)
    assert found["router"] / before["router"] == pytest.approx(1 / 4, rel=1e-6)
    assert found["up"] / before["up"] == pytest.approx(1 / 2, rel=1e-6)
    assert found["down"] / before["down"] == pytest.approx(1 / 4, rel=1e-2)


def test_slots_of_experts_hold_one_token_whatever_the_batch():
    """A sum over all tokens of a choice is one token: nothing depends on how many there are."""
    few, many = (of_block(plan_of(with_capacity, 16, 32, 2, tokens=n).init_std) for n in (12, 600))
    assert few == pytest.approx(many, rel=1e-6)
    assert few["up"] == pytest.approx((2 / 16) ** 0.5, rel=0.01)  # of a stem's second moment, 2


def test_shares_of_experts_are_not_attention():
    """The product of shares and outputs is none of queries and keys."""
    with pytest.raises(ValueError, match="no product of queries and keys was found"):
        plan_of(sent_by_one_hots, 16, 16, 2, attention_scale="1/d")


# What else reads a width and writes none.


def bottleneck(p, h):
    return jax.nn.gelu(h @ p["narrow"]) @ p["wide"]


def gated(p, h):
    """One gate for all features."""
    return jax.nn.sigmoid(h @ p["narrow"][:, :1]) * (h @ p["square"])


def shared_keys(p, h):
    """One head of keys and values for all heads of queries."""
    query = (h @ p["square"]).reshape(*h.shape[:-1], -1, 8)
    key, value = h @ p["narrow"], h @ p["values"]
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", query, key) / 8**0.5)
    return jnp.einsum("bhqk,bkd->bqhd", weights, value).reshape(h.shape) @ p["out"]


def states(p, h):
    """A linear recurrence whose states the input writes and reads, as in Mamba's scan."""
    written = jnp.einsum("btd,bts->btds", h @ p["square"], h @ p["narrow"])
    return jnp.einsum("btds,bts->btd", jnp.cumsum(written, 1), h @ p["values"])


LEAVES = {
    bottleneck: ({"narrow": (None, 8), "wide": (8, None)}, ()),
    gated: ({"narrow": (None, 1), "square": (None, None)}, ("narrow",)),
    shared_keys: (
        {"narrow": (None, 8), "values": (None, 8), "square": (None, None), "out": (None, None)},
        (),
    ),
    states: (
        {"narrow": (None, 8), "values": (None, 8), "square": (None, None)}, ("narrow", "values")
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", LEAVES, ids=lambda one: one.__name__)
def test_what_multiplies_features_is_drawn_smaller(layer):
    """Gates and states; bottlenecks, and keys and values that heads share, are not."""
    leaves, gates = LEAVES[layer]

    def model(width):
        def apply(p, x):
            h = x @ p["stem"]
            return norm(h + layer(p, norm(h))) @ p["readout"]

        sizes = {
            name: tuple(width if size is None else size for size in shape)
            for name, shape in {**leaves, "stem": (12, None), "readout": (None, 3)}.items()
        }
        return apply, specs(**sizes)

    base = archscale.parametrize(model(16), normal(2, 5, 12), optimizer="adam")
    plan = archscale.parametrize(model(64), normal(2, 5, 12), base=base, optimizer="adam")
    found, before = named_leaves(plan.init_std), named_leaves(base.init_std)
    for name in leaves.keys() & {"narrow", "values"}:
        expected = 1 / 4 if name in gates else 1 / 2
        assert found[name] / before[name] == pytest.approx(expected, rel=1e-6), name
