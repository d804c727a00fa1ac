"""Coordinate and transfer checks on networks whose answers are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archscale_jax as archscale
from archscale_jax.tuning._coordinate import Coordinate

pytestmark = pytest.mark.quick_compilation


def linear_network(width, rate, *, scaled):
    """y = u·(W x)/…: two layers, whose changes under SGD have closed forms."""
    shapes = {"stem": (4, width), "readout": (width, 2)}

    def apply(params, x):
        return (x @ params["stem"]) @ params["readout"]

    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        stem = jax.random.normal(keys[0], shapes["stem"]) / 2
        return {"stem": stem, "readout": jax.random.normal(keys[1], shapes["readout"]) / width}

    if not scaled:
        return apply, draw, optax.sgd(rate)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    arch = archscale.trace(apply, params, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    base = archscale.with_widths(arch, {width: 64})
    scaling = archscale.scale_by_architecture(arch, base, "none", width_rule="sgd")
    return apply, draw, optax.chain(optax.sgd(rate), scaling)


def loss(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


@pytest.fixture(scope="module")
def batches():
    keys = jax.random.split(jax.random.key(0), 6)
    return [
        (jax.random.normal(keys[2 * k], (8, 4)), jax.random.normal(keys[2 * k + 1], (8, 2)))
        for k in range(3)
    ]


def test_records_are_the_changes_of_training(batches):
    """Against three steps written out."""
    apply, draw, optimizer = linear_network(16, 0.5, scaled=False)
    make = lambda size: (apply, draw, optimizer)  # noqa: E731
    records = archscale.coordinate_check(make, [16], batches, loss, seeds=[3])
    params = start = draw(3)
    gradient_of = jax.jit(jax.grad(lambda p, b: loss(apply(p, b[0]), b[1])))
    expected = []
    for step in range(len(batches) + 1):
        x = batches[0][0]
        for vertex, before, after in (
            (0, x @ start["stem"], x @ params["stem"]),
            ("output", apply(start, x), apply(params, x)),
        ):
            change, size = (float(jnp.sqrt(jnp.mean(z**2))) for z in (after - before, after))
            expected.append((16, 3, step, vertex, change, size))
        if step < len(batches):
            gradients = gradient_of(params, batches[step])
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)
    by_place = {record[:4]: record for record in records}
    assert len(by_place) == len(records)
    for row in expected:
        np.testing.assert_allclose(by_place[row[:4]][4:], row[4:], rtol=1e-4, atol=1e-6)


def test_the_width_rule_is_flat_where_one_rate_fans_out(batches):
    ratios = {}
    for scaled in (True, False):
        make = functools.partial(linear_network, rate=0.02, scaled=scaled)
        records = archscale.coordinate_check(make, [64, 256, 1024], batches, loss)
        ratios[scaled] = archscale.tuning.flatness(archscale.tuning.coordinate_curves(records))
    assert max(ratios[True].values()) < 1.5
    assert max(ratios[False].values()) > 4


def test_curves_are_means_over_seeds():
    records = [
        Coordinate(size, seed, step, vertex, size + 10 * seed + step, 1.0)
        for size in (1, 2)
        for seed in (0, 1)
        for step in (0, 1)
        for vertex in (0, "output")
    ]
    curves = archscale.tuning.coordinate_curves(records, step=1)
    assert curves == {0: {1: 7.0, 2: 8.0}, "output": {1: 7.0, 2: 8.0}}
    assert archscale.tuning.coordinate_curves(records) == curves
    assert archscale.tuning.coordinate_curves(records, quantity="feature")[0] == {1: 1.0, 2: 1.0}
    assert archscale.tuning.flatness(curves) == {0: 8 / 7, "output": 8 / 7}


def test_networks_of_different_depth_have_last_and_largest_in_common():
    records = [Coordinate(1, 0, 1, vertex, change, 1.0) for vertex, change in ((0, 3.0), (1, 2.0))]
    records += [Coordinate(2, 0, 1, 0, 4.0, 1.0), Coordinate(1, 0, 1, "output", 5.0, 1.0)]
    records += [Coordinate(2, 0, 1, "output", 6.0, 1.0)]
    assert archscale.tuning.coordinate_curves(records) == {
        "largest": {1: 3.0, 2: 4.0}, "last": {1: 2.0, 2: 4.0}, "output": {1: 5.0, 2: 6.0}
    }  # fmt: skip


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_what_diverged_is_not_flat(value):
    assert archscale.tuning.flatness({0: {1: 1.0, 2: value}}) == {0: math.inf}


def test_empty_arguments_and_unknown_choices_raise(batches):
    make = functools.partial(linear_network, rate=0.5, scaled=False)
    for sizes, some, seeds, name in (
        ([], batches, [0], "sizes"), ([4], [], [0], "batches"), ([4], batches, [], "seeds")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is empty"):
            archscale.coordinate_check(make, sizes, some, loss, seeds=seeds)
    records = [Coordinate(1, 0, 1, 0, 1.0, 1.0)]
    with pytest.raises(ValueError, match="quantity 'size'; accepted are change, feature"):
        archscale.tuning.coordinate_curves(records, quantity="size")
    with pytest.raises(ValueError, match=r"step must be one that was measured, of \[1\], found 3"):
        archscale.tuning.coordinate_curves(records, step=3)


# The transfer check.


def parabola(best, noise=0.0):
    """Losses 1 + (ln rate/best)², the best rate of a seed off by `noise` nats."""

    def train(rate, seed):
        yield 1 + (math.log(rate / best) - noise * (seed - 1)) ** 2

    return train


RATES = np.geomspace(1e-3, 10, 21).tolist()


def test_rates_that_stay_are_said_to_stay():
    train = {size: parabola(0.1, noise=0.2) for size in (8, 16, 32)}
    found = archscale.transfer_check(train, RATES)
    assert found.transfers
    assert found.drift < 0.05
    assert found.uncertainty == pytest.approx(math.sqrt(2) * 0.2 / math.sqrt(3), rel=0.2)
    assert max(found.excess.values()) < 0.02


def test_rates_that_move_are_said_to_move_and_what_it_costs():
    train = {8: parabola(0.1, 0.05), 16: parabola(0.2, 0.05), 32: parabola(0.4, 0.05)}
    found = archscale.transfer_check(train, RATES, refine=2)
    assert not found.transfers
    assert found.drift == pytest.approx(math.log(4), rel=0.05)
    assert found.excess[32] == pytest.approx(math.log(4) ** 2, rel=0.1)
    assert found.excess[8] == pytest.approx(0.0, abs=0.02)


def searched(logs, error):
    """A search whose answers of three seeds are given, in nats; nothing else matters."""
    found = archscale.find_learning_rate(parabola(0.1, 0.1), RATES)
    return found._replace(
        rate=math.exp(np.mean(logs)),
        seed_rates=tuple(np.exp(logs)),
        seed_error=float(np.std(logs, ddof=1) / math.sqrt(3)),
        uncertainty=math.hypot(np.std(logs, ddof=1) / math.sqrt(3), error),
        grid_error=error,
    )


@pytest.mark.parametrize("sizes", [2, 6])
def test_noise_alone_is_called_a_shift_in_one_of_twenty_checks(sizes):
    """Answers of three seeds a size that scatter by 0.2 nats around one rate."""
    random, transfers, caught = np.random.default_rng(sizes), [], []
    plain = searched(np.zeros(3), 0.0)
    for _ in range(600):
        logs = random.normal(0, 0.2, (sizes, 3))
        error = np.std(logs, axis=1, ddof=1) / math.sqrt(3)
        for moved, found in ((0.0, transfers), (1.0, caught)):
            places = logs.mean(axis=1) + np.linspace(0, moved, sizes)
            searches = {
                size: plain._replace(rate=math.exp(place), seed_error=one, uncertainty=one)
                for size, (place, one) in enumerate(zip(places, error, strict=True))
            }
            found.append(archscale.tuning.summarise_transfer(searches).transfers)
    assert np.mean(transfers) == pytest.approx(0.95, abs=0.03)
    assert np.mean(caught) < 0.15


def test_the_limit_is_the_published_quantile_and_counts_the_grid():
    # The studentized range of 4 means with 8 degrees of freedom is 4.53 at 95 % (any table of it).
    logs = np.array([-0.1, 0.0, 0.1])
    plain = archscale.tuning.summarise_transfer({size: searched(logs, 0.0) for size in range(4)})
    assert plain.limit == pytest.approx(4.53 * 0.1 / math.sqrt(3), rel=1e-3)
    coarse = archscale.tuning.summarise_transfer({size: searched(logs, 0.3) for size in range(4)})
    assert coarse.limit == pytest.approx(math.hypot(plain.limit, 0.6))


@pytest.mark.parametrize("fall", [-0.1, -0.02])
def test_cliffs_at_one_rate_stay_wherever_the_grid_meets_them(fall):
    """The same cliff, seen from grids that answer up to one spacing below it."""

    def train(rate, seed):
        return [1 + fall * math.log(rate)] if rate < 0.2 else [math.inf]

    spaced = [np.geomspace(1e-3 * shift, 10 * shift, 21) for shift in (1.0, 1.2, 1.5)]
    searches = {
        n: archscale.find_learning_rate(train, rates.tolist()) for n, rates in enumerate(spaced)
    }
    found = archscale.tuning.summarise_transfer(searches)
    assert found.drift > 0.05
    assert found.transfers


def test_one_seed_tells_nothing_of_noise():
    train = dict.fromkeys((8, 16), parabola(0.1))
    found = archscale.transfer_check(train, RATES, seeds=[0])
    assert found.drift == 0 and math.isnan(found.limit)
    assert not found.transfers


@pytest.mark.parametrize("bottom", [10.0, -10.0, 0.0])
def test_the_excess_is_of_the_size_of_the_smallest_loss(bottom):
    """At RATES[10] the other network's loss is 3 ln² above its smallest one."""

    def bowl(best):
        return lambda rate, seed: [bottom + 3 * math.log(rate / best) ** 2]

    train = {"small": bowl(RATES[10]), "large": bowl(RATES[15])}
    found = archscale.transfer_check(train, RATES, refine=0)
    above = [3 * math.log(rate / RATES[15]) ** 2 for rate in RATES if rate != RATES[15]]
    scale = abs(bottom) or np.median(above)
    assert found.excess["small"] == pytest.approx(0.0, abs=1e-9)
    assert found.excess["large"] == pytest.approx(
        3 * math.log(RATES[15] / RATES[10]) ** 2 / scale, rel=1e-6
    )


def test_losses_that_are_all_0_have_no_excess():
    train = dict.fromkeys((8, 16), lambda rate, seed: [0.0])
    assert archscale.transfer_check(train, RATES).excess == {8: 0.0, 16: 0.0}


def test_a_search_that_ends_at_the_edge_of_its_rates_says_nothing():
    found = archscale.transfer_check(dict.fromkeys((8, 16), parabola(100.0, 0.05)), RATES)
    assert found.drift <= 2 * found.uncertainty  # both end where the rates do
    assert not found.bracketed
    assert not found.transfers


def test_a_start_goes_from_size_to_size():
    tried = {}

    def counted(size, best):
        def train(rate, seed):
            tried.setdefault(size, []).append(rate)
            yield 1 + math.log(rate / best) ** 2

        return train

    best = {8: 0.1, 16: 10**-1.6, 32: 0.3}
    train = {size: counted(size, rate) for size, rate in best.items()}
    archscale.transfer_check(train, RATES, start=0.01, refine=0, seeds=(0,))
    assert [rates[0] for rates in tried.values()] == pytest.approx([0.01, 0.1, 10**-1.6])


def test_one_size_raises():
    with pytest.raises(ValueError, match=r"at least two sizes to compare, found \[8\]"):
        archscale.transfer_check({8: parabola(0.1)}, RATES)
