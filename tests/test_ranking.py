"""Rankings, gains and gaps: against counts by hand, brute force, SciPy and known distributions."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from experiments.nasbench import gains, ranking


def column(*values):
    return np.array(values, float)[:, None]


def brute_force_tau(x, y, fraction):
    """Tau-b at the top of x by counting pairs; nan where it is not defined."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(a + b)]
    number = -(-round(fraction * 100) * len(known) // 100)
    top = [pair for pair in known if sum(other[0] > pair[0] for other in known) < number]
    agree = untied_x = untied_y = 0
    for (a, b), (c, d) in itertools.combinations(top, 2):
        agree += int(np.sign(a - c) * np.sign(b - d))
        untied_x, untied_y = untied_x + (a != c), untied_y + (b != d)
    if len(top) < 3 or not untied_x * untied_y:
        return math.nan
    return agree / math.sqrt(untied_x * untied_y)


def test_tau_with_ties_counted_by_hand():
    x, y = column(1, 2, 3, 4, 4), column(1, 3, 2, 4, 5)
    # 8 pairs agree, 1 does not, 1 ties in x; of the best three 2 agree and 1 ties.
    curve = ranking.kendall_tau_at_top(x, y, [1.0, 0.6, 0.5], average="all")
    expected = [7 / math.sqrt(9 * 10), 2 / math.sqrt(2 * 3), 2 / math.sqrt(2 * 3)]
    np.testing.assert_allclose(curve.value, expected)
    assert (curve.architectures, curve.excluded) == (5, 0)
    assert np.isnan([curve.low, curve.high]).all()


SCORES = strategies.integers(0, 6).map(float) | strategies.just(math.nan)


@hypothesis.settings(max_examples=50)
@hypothesis.given(arrays.arrays(float, (2, 12, 3), elements=SCORES),
                  strategies.sampled_from([0.1, 0.3, 0.55, 1.0]))  # fmt: skip
def test_taus_of_single_seeds_are_counts_of_pairs(values, fraction):
    first, second = values
    curve = ranking.kendall_tau_at_top(first, second, [fraction], average="single")
    taus = [
        brute_force_tau(first[:, s], second[:, t], fraction)
        for s, t in itertools.permutations(range(3), 2)
    ]
    np.testing.assert_allclose(curve.value, np.mean(taus), atol=1e-12)
    there = ~np.isnan(first).all(1) & ~np.isnan(second).all(1)
    assert (curve.architectures, curve.excluded) == (there.sum(), (~there).sum())


def test_halves_are_means_over_every_pair_of_disjoint_groups():
    x, y = np.random.default_rng(0).normal(size=(2, 10, 5))
    taus = [
        scipy.stats.kendalltau(x[:, list(a)].mean(1), y[:, list(b)].mean(1)).statistic
        for a in itertools.combinations(range(5), 2)
        for b in itertools.combinations(range(5), 2)
        if not set(a) & set(b)
    ]
    assert len(taus) == 30
    assert ranking.kendall_tau_at_top(x, y, [1.0]).value[0] == pytest.approx(np.mean(taus))
    whole = scipy.stats.kendalltau(x.mean(1), y.mean(1)).statistic
    assert ranking.kendall_tau_at_top(x, y, [1.0], average="all").value[0] == pytest.approx(whole)


def test_two_seeds_make_one_control_selected_by_either():
    one, other = np.array([1.0, 2, 3, 4, 5, 6]), np.array([6.0, 5, 1, 2, 3, 4])
    both = ranking.seed_control(np.stack([one, other], 1), [0.5])
    expected = (brute_force_tau(one, other, 0.5) + brute_force_tau(other, one, 0.5)) / 2
    assert both.value[0] == pytest.approx(expected)
    assert expected != brute_force_tau(one, other, 0.5)


DISTINCT = arrays.arrays(float, 9, elements=strategies.integers(0, 99).map(float), unique=True)


@hypothesis.settings(max_examples=50)
@hypothesis.given(DISTINCT, DISTINCT, strategies.permutations(range(9)))
def test_tau_depends_on_orders_alone(x, y, order):
    fractions = [0.4, 1.0]

    def tau(left, right):
        curve = ranking.kendall_tau_at_top(left[:, None], right[:, None], fractions, average="all")
        return curve.value

    value = tau(x, y)
    assert np.all(np.abs(value) <= 1)
    np.testing.assert_allclose(tau(np.exp(x / 20), y**3 - 7), value)
    np.testing.assert_allclose(tau(x[order], y[order]), value)
    np.testing.assert_allclose(tau(x, -y), -value)
    np.testing.assert_allclose(tau(y, x)[1], value[1])  # of all: which one selects does not matter
    np.testing.assert_allclose(tau(x, x), 1.0)


def quality_and_noise(rng, *, architectures=60, seeds=4, shared=0.0):
    """Two recipes that rank alike; `shared` is noise that a seed has under both."""
    quality = rng.normal(size=(architectures, 1))
    common = shared * rng.normal(size=(architectures, seeds))
    own = 0.5 * rng.normal(size=(2, architectures, seeds))
    return quality + common + own


@pytest.mark.parametrize(("average", "shared"), [("halves", 1.0), ("single", 0.0)])
def test_recipes_that_rank_alike_agree_as_seeds_do(average, shared):
    """On the same footing they do, whatever noise a seed shares; means over all seeds do not."""
    rng, fractions, differences, naive = np.random.default_rng(1), [1.0, 0.5], [], []
    for _ in range(40):
        first, second = quality_and_noise(rng, shared=shared)
        control = ranking.seed_control(first, fractions, average=average).value
        found = ranking.kendall_tau_at_top(first, second, fractions, average=average).value
        whole = ranking.kendall_tau_at_top(first, second, fractions, average="all").value
        differences.append(found - control)
        naive.append(whole - control)
    error = np.std(differences, axis=0) / math.sqrt(len(differences))
    assert np.all(np.abs(np.mean(differences, axis=0)) < 3 * error)
    assert np.all(error < 0.02)
    assert np.all(np.mean(naive, axis=0) > 0.05)


def test_the_shortfall_tells_another_ranking_from_noise():
    rng = np.random.default_rng(2)
    first, alike = quality_and_noise(rng)
    other = alike + rng.normal(size=(len(alike), 1))
    same = ranking.tau_shortfall(first, alike, [1.0], rng=rng)
    found = ranking.tau_shortfall(first, other, [1.0], rng=rng)
    assert same.low[0] < 0 < same.high[0]
    assert 0.05 < found.low[0] < found.value[0] < found.high[0]
    taus = [ranking.kendall_tau_at_top(*pair, [1.0]).value[0]
            for pair in ((first, first), (other, other), (first, other))]  # fmt: skip
    assert found.value[0] == pytest.approx((taus[0] + taus[1]) / 2 - taus[2])


@pytest.mark.parametrize("seed", range(12))
def test_a_resample_has_the_tau_of_its_repeated_architectures(seed):
    values = np.random.default_rng(100 + seed).integers(0, 12, (2, 15)).astype(float)
    values[0, 3] = math.nan  # and so only 14 are resampled
    fractions = [0.3, 0.5, 1.0]
    curve = ranking.kendall_tau_at_top(
        values[0][:, None], values[1][:, None], fractions,
        average="all", rng=np.random.default_rng(seed), resamples=1,
    )  # fmt: skip
    there = np.flatnonzero(np.isfinite(values[0]))
    counts = gains.draw_resamples(len(there), np.random.default_rng(seed), 1, 0.95)[0]
    x, y = values[:, np.repeat(there, counts)]
    for fraction, low, high in zip(fractions, curve.low, curve.high, strict=True):
        top = x >= np.sort(x)[-math.ceil(fraction * len(x) - 1e-9)]
        drawn = np.repeat(there, counts)[top]
        expected = scipy.stats.kendalltau(x[top], y[top]).statistic
        if len(set(drawn)) < 3:
            expected = math.nan
        np.testing.assert_allclose([low, high], expected)


def test_intervals_of_tau_cover_it_and_are_as_wide_as_they_should_be():
    """Tau of normal variables with correlation ρ is 2/π asin ρ."""
    rng, rho, found = np.random.default_rng(3), 0.7, []
    true = 2 / math.pi * math.asin(rho)
    for _ in range(100):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 50).T
        curve = ranking.kendall_tau_at_top(
            x[:, None], y[:, None], [1.0], average="all", rng=rng, resamples=300, confidence=0.9
        )
        found.append((curve.low[0], curve.value[0], curve.high[0]))
    low, value, high = np.array(found).T
    assert 80 <= np.sum((low <= true) & (true <= high)) <= 97
    assert np.mean(high - low) == pytest.approx(2 * 1.645 * np.std(value), rel=0.25)


def test_the_same_generator_gives_the_same_interval():
    first, second = quality_and_noise(np.random.default_rng(4), architectures=12)
    one, other = (
        ranking.kendall_tau_at_top(first, second, [1.0], rng=np.random.default_rng(7), resamples=50)
        for _ in range(2)
    )
    assert (one.low, one.high) == (other.low, other.high)


def test_a_tau_that_is_not_defined_has_no_interval_where_a_resample_is():
    x, y = np.arange(30.0)[:, None], np.minimum(np.arange(30.0), 18)[:, None]
    for seed in range(10):
        rng = np.random.default_rng(seed)
        curve = ranking.kendall_tau_at_top(x, y, [0.4], average="all", rng=rng, resamples=1)
        assert np.isnan([curve.value, curve.low, curve.high]).all()


def test_the_top_is_not_rounded_up_by_a_rounding_error():
    """0.07 · 100 is 7.000000000000001; an eighth would be of the other order."""
    x = np.arange(100.0)[:, None]
    y = np.where(x >= 93, x, 200.0)
    assert ranking.kendall_tau_at_top(x, y, [0.07], average="all").value[0] == 1


@pytest.mark.parametrize(
    ("x", "y", "fraction"),
    [
        (column(1, 2), column(2, 1), 1.0),
        (column(1, 2, 3, 4, 5), column(1, 2, 3, 4, 5), 0.4),
        (column(1, 2, math.nan), column(1, 2, 3), 1.0),
        (column(1, 1, 1, 1), column(1, 2, 3, 4), 1.0),
        (column(1, 2, 3, 4, 5, 6), column(3, 2, 1, 1, 1, 1), 0.5),
        (column(*[math.nan] * 4), column(1, 2, 3, 4), 1.0),
        (np.zeros((0, 1)), np.zeros((0, 1)), 1.0),
    ],
)
def test_what_has_no_ranking_has_no_tau(x, y, fraction):
    curve = ranking.kendall_tau_at_top(
        x, y, [fraction], average="all", rng=np.random.default_rng(0), resamples=20
    )
    assert np.isnan([curve.value, curve.low, curve.high]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ranking.kendall_tau_at_top(x, x, [0.5, 0.0]), "in (0, 1], found 0.0"),
        (lambda x: ranking.seed_control(x, [1.5]), "fractions must be in (0, 1], found 1.5"),
        (lambda x: ranking.tau_shortfall(x, x, [math.nan]), "in (0, 1], found nan"),
        (lambda x: ranking.kendall_tau_at_top(x, x, [1.0], average="mean"),
         "unknown average 'mean'; accepted are halves, single, all"),
        (lambda x: ranking.seed_control(x[:, :1], [1.0]), "two at least, on both sides, found 1"),
        (lambda x: ranking.kendall_tau_at_top(x, x[:, :2], [1.0]), "found 3 and 2; 'all' takes"),
        (lambda x: ranking.seed_control(x, [1.0], average="all"), "'all' leaves no other side"),
        (lambda x: ranking.tau_shortfall(x, x, [1.0], average="all"), "leaves no other side"),
        (lambda x: ranking.kendall_tau_at_top(x, x[:3], [1.0]), "reference of 4, other of 3"),
        (lambda x: ranking.seed_control(x[0], [1.0]), "[architectures, seeds], found shape (3,)"),
        (lambda x: ranking.seed_control(x / 0, [1.0]), "reference must be finite"),
        (lambda x: ranking.seed_control(x, [1.0], resamples=0), "resamples must be 1 at least"),
        (lambda x: ranking.seed_control(x, [1.0], confidence=95), "between 0 and 1, found 95"),
        (lambda x: gains.gain_summary(x[:2], x[:2]), "3 architectures with a run under both"),
        (lambda x: gains.gain_summary(x, x[:3]), "fixed of 4, ours of 3"),
        (lambda x: gains.pairwise_gaps(x[:1], x[:1]), "gaps need 2 architectures"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError) as error:
        call(np.arange(1.0, 13.0).reshape(4, 3))
    assert message in str(error.value)


def test_tables_are_joined_by_name():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "only": 9.0, "missing": math.nan}
    second = {"d": 40.0, "b": 30.0, "c": 20.0, "a": 10.0, "missing": 5.0, "x": 1.0}
    found = ranking.compare_rankings(first, second, [1.0, 0.75], rng=np.random.default_rng(0))
    assert (found.common, found.only_first, found.only_second) == (4, 1, 2)
    np.testing.assert_allclose(found.curve.value, [4 / 6, 1 / 3])
    assert found.curve.low[0] <= 4 / 6 <= found.curve.high[0]
    with pytest.raises(ValueError, match="3 architectures in common, found 0: .*'a'.*'3_33_133'"):
        ranking.compare_rankings(first, {"3_33_133": 1.0})


# Means, gaps and gains.


def test_means_are_of_the_seeds_that_are_there_and_tie_in_any_order():
    accuracies = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.1], [0.4, math.nan, 0.2]])
    accuracies = np.vstack([accuracies, [math.nan] * 3])
    means = gains.seed_means(accuracies)
    np.testing.assert_allclose(means, [0.2, 0.2, 0.3, math.nan])
    assert means[0] == means[1]


def test_gaps_are_those_of_all_pairs():
    """Against loops; of these seeds the standard deviation is √2·0.01 under both."""
    means = {"a": (0.1, 0.5), "b": (0.2, 0.2), "c": (0.2, 0.9), "d": (0.205, 0.19)}
    first, second = (
        np.array([[mean[side] - 0.01, mean[side] + 0.01] for mean in means.values()])
        for side in (0, 1)
    )
    found = gains.pairwise_gaps(first, second)
    pairs = list(itertools.combinations(means.values(), 2))
    np.testing.assert_allclose(found.reference, [abs(x[0] - y[0]) for x, y in pairs], atol=1e-12)
    np.testing.assert_allclose(found.other, [abs(x[1] - y[1]) for x, y in pairs], atol=1e-12)
    # a-b, a-d, b-d and c-d flip, b-c ties; the gaps of b-d and of c-d (first) are within the noise.
    assert found.flips == pytest.approx(4 / 6)
    assert found.clear_flips == pytest.approx(2 / 6)
    np.testing.assert_allclose(found.noise, math.sqrt(2) * 0.01)
    assert found.excluded == 0


def test_flips_are_what_tau_counts():
    x, y = np.random.default_rng(5).normal(size=(2, 30, 1))
    found = gains.pairwise_gaps(x, y)
    tau = scipy.stats.kendalltau(x[:, 0], y[:, 0]).statistic
    assert 1 - 2 * found.flips == pytest.approx(tau)
    assert math.isnan(found.clear_flips)
    assert np.isnan(found.noise).all()


def test_noise_alone_flips_hardly_a_pair_clearly():
    rng = np.random.default_rng(6)
    flips, clear = np.mean([
        gains.pairwise_gaps(*quality_and_noise(rng, seeds=3))[2:4] for _ in range(20)
    ], axis=0)  # fmt: skip
    assert flips > 0.1
    assert clear < 0.002


def test_gaps_tell_noise_from_seeds_and_missing_runs():
    rng = np.random.default_rng(7)
    accuracies = rng.normal(size=(400, 1)) + 0.3 * rng.normal(size=(400, 4))
    accuracies[:100, 0] = math.nan
    accuracies[0] = math.nan
    assert gains.pooled_deviation(accuracies) == pytest.approx(0.3, rel=0.06)
    found = gains.pairwise_gaps(accuracies, accuracies)
    assert found.excluded == 1
    assert len(found.reference) == 399 * 398 // 2
    np.testing.assert_allclose(found.noise, 0.3 / math.sqrt(2), rtol=0.06)
    assert found.flips == found.clear_flips == 0


def test_gains_by_hand():
    nan = math.nan
    fixed = np.array([[0.5, 0.7], [0.4, 0.4], [0.2, nan], [0.1, 0.3], [0.6, 0.6], [nan, nan]])
    ours = np.array([[0.7, 0.7], [0.6, 0.6], [0.5, 0.5], [0.6, nan], [1.1, 1.1], [0.9, 0.9]])
    found = gains.gain_summary(fixed, ours)
    np.testing.assert_allclose(found.gains, [0.1, 0.2, 0.3, 0.4, 0.5, nan])
    assert found.mean == pytest.approx(0.3)
    assert (found.share, found.excluded) == (1.0, 1)
    assert found.p_value == pytest.approx(2 / 2**5)  # one of 2⁵ signs, on either side
    assert found.spread_fixed == pytest.approx(np.std([0.6, 0.4, 0.2, 0.2, 0.6], ddof=1))
    assert found.spread_ours == pytest.approx(np.std([0.7, 0.6, 0.5, 0.6, 1.1], ddof=1))
    assert math.isnan(found.low)
    same = gains.gain_summary(fixed, fixed)
    assert (same.mean, same.share) == (0.0, 0.0)
    assert math.isnan(same.p_value)


def test_the_interval_of_the_gain_is_that_of_scipy():
    rng = np.random.default_rng(8)
    fixed, ours = rng.exponential(size=(2, 40, 1))
    found = gains.gain_summary(fixed, ours, rng=rng, resamples=20000, confidence=0.9)
    expected = scipy.stats.bootstrap(
        ((ours - fixed)[:, 0],), np.mean, n_resamples=20000, confidence_level=0.9,
        method="percentile", random_state=np.random.default_rng(9),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.012)
    assert found.high - found.low > 0.3
