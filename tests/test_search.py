"""The search on loss curves whose best rate is known."""

import itertools
import math
import statistics
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale_jax import find_learning_rate
from archscale_jax.tuning import Run, summarise_runs
from archscale_jax.tuning._basin import excess_loss, find_basin

GRID = np.geomspace(1e-3, 4, 13).tolist()
STEP = math.log(GRID[1] / GRID[0])


def noise(rate, seed):
    """A normal number that depends on rate and seed alone."""
    bits = int(np.float64(rate).view(np.uint64))
    return np.random.default_rng([seed, bits]).normal()


def parabola(minimum, *, curvature=0.3, cliffs=(math.inf,), deviation=0.0):
    """Losses of successive parts; NaN beyond the cliff of the seed; the least loss is 1."""

    def train(rate, seed):
        yield 2.3
        if rate > cliffs[seed % len(cliffs)]:
            yield math.nan
        yield 1 + curvature * math.log(rate / minimum) ** 2 + deviation * noise(rate, seed)

    return train


def near(expected):
    return pytest.approx(expected, rel=1e-6)


class TestBasin:
    @pytest.mark.parametrize("minimum", [GRID[5], 0.0123, 0.2])
    def test_vertex_of_a_parabola_is_exact(self, minimum):
        losses = {rate: 1 + 0.3 * math.log(rate / minimum) ** 2 for rate in GRID}
        basin = find_basin(losses, 0.3)
        assert basin.rate == near(minimum)
        assert basin.loss == min(losses.values())
        assert basin.lower < minimum < basin.upper
        assert basin.bracketed == (True, True)

    @pytest.mark.parametrize("tolerance", [0.02, 0.5])
    def test_edges_of_a_wedge_are_their_closed_form(self, tolerance):
        # 1 + slope |log(rate / m)| is straight between grid rates, as the interpolation takes it.
        middle, below, above = GRID[6], 0.4, 1.5
        losses = {
            rate: 1 + abs(math.log(rate / middle)) * (above if rate > middle else below)
            for rate in GRID
        }
        basin = find_basin(losses, tolerance)
        assert basin.lower == near(middle * math.exp(-tolerance / below))
        assert basin.upper == near(middle * math.exp(tolerance / above))
        assert basin.lower <= basin.rate <= basin.upper

    def test_upper_edge_is_halfway_to_a_diverged_rate(self):
        basin = find_basin({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: math.inf}, 0.02)
        assert basin.upper == near(math.sqrt(4 * 8))
        assert basin.lower == near(4 * 2**-0.02)
        assert basin.lower <= basin.rate <= basin.upper
        assert basin.bracketed == (True, True)

    @pytest.mark.parametrize(
        ("values", "bracketed"),
        [
            ((1.0, 2.0, 3.0), (False, True)),
            ((3.0, 2.0, 1.0), (True, False)),
            ((1.0, 1.0, 1.0), (False, False)),
            ((2.0, 1.0, 2.0), (True, True)),
            ((1.0, 1.01, math.inf), (False, True)),
        ],
    )
    def test_is_open_where_the_grid_ends_within_the_tolerance(self, values, bracketed):
        basin = find_basin(dict(zip((1.0, 2.0, 4.0), values, strict=True)))
        assert basin.bracketed == bracketed
        assert bracketed[0] or basin.lower == near(1.0)
        assert bracketed[1] or basin.upper == near(4.0)

    def test_is_that_of_the_largest_of_equal_rates(self):
        basin = find_basin({0.1: 1.0, 0.3: 2.0, 1.0: 1.0, 3.0: 2.0})
        assert 0.3 < basin.lower <= basin.rate
        assert basin.rate <= basin.upper < 3

    def test_of_one_finite_rate_is_that_rate(self):
        losses = {1.0: math.inf, 2.0: 1.5, 4.0: math.inf}
        assert find_basin(losses).rate == near(2.0)
        assert find_basin({2.0: 0.0}).rate == near(2.0)

    @given(st.lists(st.floats(0, 3) | st.just(math.inf), min_size=1, max_size=9))
    def test_holds_its_answer_and_the_largest_best_rate(self, values):
        losses = dict(zip(GRID, values, strict=False))
        finite = min(values)
        if math.isinf(finite):
            return
        best = max(rate for rate, loss in losses.items() if loss == finite)
        basin = find_basin(losses)
        assert basin.lower * (1 - 1e-9) <= best <= basin.upper * (1 + 1e-9)
        assert basin.lower <= basin.rate <= basin.upper
        assert basin.loss == finite


class TestFullGrid:
    def test_finds_the_minimum_under_noise(self):
        train = parabola(0.05, deviation=0.003)
        found = find_learning_rate(train, GRID, seeds=range(5))
        assert abs(math.log(found.rate / 0.05)) < 0.1
        assert 0 < found.uncertainty < 0.1
        assert len(found.seed_rates) == 5
        logs = np.log(found.seed_rates)
        assert found.seed_error == near(np.std(logs, ddof=1) / math.sqrt(5))
        assert found.uncertainty == near(math.hypot(found.seed_error, found.grid_error))

    def test_one_seed_has_no_uncertainty(self):
        found = find_learning_rate(parabola(0.05), GRID, seeds=[3])
        assert math.isnan(found.uncertainty)
        assert found.seed_rates == (found.rate,)

    def test_stays_below_a_cliff(self):
        cliff = GRID[8] * 1.01
        found = find_learning_rate(parabola(4.0, cliffs=(cliff,)), GRID)
        trained = {run.rate for run in found.runs if math.isfinite(run.loss)}
        assert max(trained) < cliff
        assert found.rate < GRID[9]
        assert found.basin.upper < GRID[9]
        assert all(run.rate > cliff for run in found.runs if math.isinf(run.loss))

    def test_a_rate_at_which_one_seed_diverges_cannot_win(self):
        cliffs = (math.inf, GRID[6] * 1.01)
        found = find_learning_rate(parabola(GRID[8], cliffs=cliffs), GRID, seeds=(0, 1))
        assert found.rate < GRID[7]

    @pytest.mark.parametrize("refine", [0, 1, 2, 3])
    def test_refines_around_the_best_rate(self, refine):
        """Only the best rate of a steep wedge is in the basin: two new rates a round."""

        def train(rate, seed):
            return [1 + 9 * abs(math.log(rate / GRID[5]))]

        found = find_learning_rate(train, GRID, seeds=(0, 1), refine=refine)
        distance = [STEP / 2**count for count in range(1, refine + 1)]
        new = [GRID[5] * math.exp(sign * one) for one in distance for sign in (-1, 1)]
        rates = sorted({run.rate for run in found.runs})
        assert rates == near(sorted(GRID + new))
        assert len(found.runs) == 2 * len(rates)

    def test_does_not_depend_on_the_order_of_rates(self):
        train = parabola(0.05, deviation=0.01)
        assert find_learning_rate(train, GRID[::-1]) == find_learning_rate(train, GRID)

    def test_summary_of_its_runs_is_the_search(self):
        train = parabola(0.05, deviation=0.01, cliffs=(0.5, 0.4, 0.3))
        for start in (None, 1e-3):
            found = find_learning_rate(train, GRID, start=start, tolerance=0.05)
            assert summarise_runs(reversed(found.runs), tolerance=0.05) == found

    def test_summary_leaves_out_rates_that_a_seed_has_not_trained(self):
        runs = [Run(rate, seed, rate) for rate in (1.0, 2.0) for seed in (0, 1)]
        found = summarise_runs([*runs, Run(0.1, 0, 0.0)])
        assert found.basin.loss == 1.0

    def test_of_a_flat_curve_is_steadier_than_the_smallest_loss(self):
        """As layer normalization gives: flat over a decade, where noise decides the smallest."""
        middle, flat = GRID[6], math.log(10) / 2

        def train(rate, seed):
            outside = max(abs(math.log(rate / middle)) - flat, 0)
            return [1 + outside**2 + 0.003 * noise(rate, seed)]

        answers, smallest = [], []
        for seed in range(60):
            found = find_learning_rate(train, GRID, seeds=[seed])
            answers.append(math.log(found.rate / middle))
            assert found.basin.lower <= found.rate <= found.basin.upper
            smallest.append(math.log(min(found.runs, key=lambda run: run.loss).rate / middle))
        # Within the 2 % of the tolerance, and a margin for the noise of both ends.
        assert max(map(abs, answers)) < flat + math.sqrt(0.04)
        assert statistics.stdev(answers) < statistics.stdev(smallest) / 2
        assert abs(statistics.fmean(answers)) < 0.2


# Losses by the distance to the best rate, in nats.
SHAPES = {
    "parabola": lambda t: 0.5 + 0.1 * t**2,
    "falls until runs diverge": lambda t: 0.5 - 0.1 * t if t < 0 else math.inf,
    "diverges above its minimum": lambda t: 0.5 + 0.05 * t**2 if t < 0.1 else math.inf,
    "steep above": lambda t: 0.5 + (0.02 if t < 0 else 0.4) * t**2,
    "steep below": lambda t: 0.5 + (0.4 if t < 0 else 0.02) * t**2,
    "wedge": lambda t: 0.5 + (0.05 if t < 0 else 0.5) * abs(t),
    "jumps where runs diverge": lambda t: 0.5 - 0.1 * t if t < 0 else 2.3,
    "negative": lambda t: -0.5 + 0.1 * t**2,
}


class TestUncertainty:
    @pytest.mark.parametrize(("deviation", "start"), [(0.0, None), (0.003, 0.05)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_error_of_the_answer(self, shape, deviation, start):
        """Against the errors of 40 searches whose best rate is known."""
        random = np.random.default_rng(1)
        errors, stated = [], []
        for number in range(40):
            best = random.uniform(-4.5, -0.5)

            def train(rate, seed, best=best, number=number):
                value = SHAPES[shape](math.log(rate) - best)
                return [value + deviation * noise(rate, 100 * number + seed)]

            found = find_learning_rate(train, GRID, start=start)
            errors.append(math.log(found.rate) - best)
            stated.append(found.uncertainty)
        error = math.sqrt(statistics.fmean(one**2 for one in errors))
        assert statistics.median(stated) > 0.8 * error - 1e-9
        within = [abs(one) <= 2 * two + 1e-9 for one, two in zip(errors, stated, strict=True)]
        assert statistics.fmean(within) > 0.75  # t of two degrees of freedom: 0.82
        if shape in ("parabola", "negative"):
            assert statistics.median(stated) < 1.6 * error + 1e-6

    def test_below_a_cliff_is_that_of_a_uniform_distribution(self):
        cliff = GRID[8] * 1.4
        found = find_learning_rate(parabola(100.0, cliffs=(cliff,)), GRID)
        rates = sorted({run.rate for run in found.runs})
        below = max(rate for rate in rates if rate < cliff)
        above = min(rate for rate in rates if rate > cliff)
        assert found.rate == near(below)
        assert found.seed_error == 0
        assert found.uncertainty == near(math.log(above / below) / math.sqrt(3))

    @pytest.mark.parametrize("minimum", [1e-6, 1e3])
    def test_is_infinite_where_the_loss_falls_until_the_rates_end(self, minimum):
        found = find_learning_rate(parabola(minimum), GRID)
        assert found.rate == near(GRID[0] if minimum < 1 else GRID[-1])
        assert math.isinf(found.uncertainty)

    def test_of_three_rates_is_anywhere_between_them(self):
        found = find_learning_rate(parabola(0.1), [0.01, 0.1, 1.0], refine=0)
        assert found.rate == near(0.1)
        assert found.uncertainty == near(math.log(100) / math.sqrt(12))

    def test_of_one_rate_is_infinite(self):
        found = find_learning_rate(lambda rate, seed: [1.0 + seed], [0.1], seeds=[0, 1])
        assert (found.seed_error, found.grid_error, found.uncertainty) == (0, math.inf, math.inf)

    def test_of_one_seed_is_unknown_but_for_the_grid(self):
        found = find_learning_rate(
            lambda rate, seed: [SHAPES["wedge"](rate - 0.1)], GRID, seeds=[0]
        )
        assert math.isnan(found.uncertainty) and math.isnan(found.seed_error)
        assert found.grid_error > 0


class TestSigns:
    @pytest.mark.parametrize("start", [None, 0.002, 2.0])
    @pytest.mark.parametrize("bottom", [1.0, 10.0])
    def test_negative_losses_are_searched_like_positive_ones(self, start, bottom):
        """Tolerance and margin are the same for one curve above smallest losses of one size."""

        def raised(by):
            def train(rate, seed):
                return [by + abs(math.log(rate / GRID[6])) ** 1.5]

            return find_learning_rate(train, GRID, start=start, refine=2)

        positive, negative = raised(bottom), raised(-bottom)
        assert negative.rate == near(positive.rate)
        assert negative.basin.upper == near(positive.basin.upper)
        assert len(negative.runs) == len(positive.runs)

    @given(
        st.lists(st.floats(-3, 3) | st.just(math.inf) | st.just(0.0), min_size=1, max_size=9),
        st.integers(0, 8),
    )
    def test_the_excess_is_never_negative_and_zero_at_the_best(self, values, place):
        losses = dict(zip(GRID, values, strict=False))
        smallest = min(values)
        if math.isinf(smallest):
            return
        place %= len(values)
        excess = excess_loss(GRID[place], losses)
        assert excess >= 0
        assert (excess == 0) == (values[place] == smallest)
        if smallest:
            assert excess == near((values[place] - smallest) / abs(smallest))

    def test_the_excess_over_zero_is_of_the_median_of_the_others(self):
        losses = {1.0: 1.0, 2.0: 0.0, 4.0: 3.0, 8.0: 1e30, 16.0: math.inf}
        assert excess_loss(1.0, losses) == near(1 / 3)
        assert excess_loss(8.0, losses) == near(1e30 / 3)
        assert math.isinf(excess_loss(16.0, losses))
        assert excess_loss(2.0, {2.0: 0.0, 4.0: 0.0}) == 0.0

    @pytest.mark.parametrize("start", [None, 0.001, 0.1])
    def test_a_perfect_fit_is_found(self, start):
        """Loss 0 from 0.05 to 0.5: the answer fits perfectly."""

        def train(rate, seed):
            return [max(abs(math.log(rate / math.sqrt(0.025))) - math.log(10) / 2, 0.0)]

        found = find_learning_rate(train, GRID, start=start)
        assert found.basin.loss == 0.0
        assert 0.04 < found.rate < 0.6
        assert found.basin.bracketed == (True, True)


class TestWalk:
    @settings(max_examples=50)
    @given(
        start=st.floats(math.log(1e-5), math.log(100)).map(math.exp),
        minimum=st.floats(math.log(GRID[1]), math.log(GRID[-2])).map(math.exp),
        curvature=st.floats(0.2, 2),
        cliff=st.floats(math.log(GRID[1]), math.log(20)).map(math.exp),
        drops=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    )
    def test_from_anywhere_finds_what_the_full_grid_finds(
        self, start, minimum, curvature, cliff, drops
    ):
        cliffs = (cliff, *(max(cliff * math.exp(-drop), GRID[0]) for drop in drops))
        train = parabola(minimum, curvature=curvature, cliffs=cliffs)
        full = find_learning_rate(train, GRID)
        found = find_learning_rate(train, GRID, start=start)
        assert found.rate == near(full.rate)
        assert found.basin == full.basin
        assert set(found.runs) <= set(full.runs)
        assert len(found.runs) < len(full.runs)

    @settings(max_examples=30)
    @given(
        start=st.sampled_from(GRID),
        minimum=st.floats(math.log(GRID[2]), math.log(GRID[-3])).map(math.exp),
        offset=st.integers(0, 10**6),
    )
    def test_under_noise_stays_close_and_trains_no_other_rates(self, start, minimum, offset):
        seeds = range(offset, offset + 3)
        train = parabola(minimum, deviation=0.003)
        full = find_learning_rate(train, GRID, seeds=seeds)
        found = find_learning_rate(train, GRID, seeds=seeds, start=start)
        assert abs(math.log(found.rate / full.rate)) < 0.15
        assert len(found.runs) < len(full.runs)
        middles = [math.sqrt(low * high) for low, high in itertools.pairwise(GRID)]
        assert {run.rate for run in found.runs} <= {*GRID, *middles}

    def test_trains_no_rate_twice_where_the_curve_has_a_bump(self):
        """A rate between two that can win is trained by every seed, not passed over."""
        values = dict(zip(GRID, (1.1, 1.2, 0.9, 2.0), strict=False))

        def train(rate, seed):
            return [values.get(rate, 1.3)]

        found = find_learning_rate(train, GRID[:4], start=GRID[0])
        rates = sorted({run.rate for run in found.runs})
        assert all(high / low > 1.1 for low, high in itertools.pairwise(rates))

    def test_goes_down_where_another_seed_loses_all_that_the_first_wins(self):
        cliffs = (math.inf, GRID[3] * 1.01)
        train = parabola(GRID[8], cliffs=cliffs)
        found = find_learning_rate(train, GRID, seeds=(0, 1), start=GRID[8])
        assert found.rate == near(find_learning_rate(train, GRID, seeds=(0, 1)).rate)
        assert found.rate < GRID[4]

    @pytest.mark.parametrize(("start", "first"), [(1e-9, GRID[0]), (0.9, 1.0), (1e9, GRID[-1])])
    def test_begins_at_the_nearest_rate(self, start, first):
        trained = []

        def train(rate, seed):
            trained.append(rate)
            return parabola(0.05)(rate, seed)

        find_learning_rate(train, GRID, seeds=[0], start=start)
        assert trained[0] == near(min(GRID, key=lambda rate: abs(math.log(rate / first))))


class TestRuns:
    @pytest.mark.parametrize("start", [None, 0.001, 3.0])
    def test_two_workers_find_the_same(self, start):
        train = parabola(0.05, deviation=0.01, cliffs=(0.5, 1.0, 0.7))
        one, two = (
            find_learning_rate(train, GRID, start=start, workers=workers) for workers in (1, 2)
        )
        assert one == two

    def test_two_workers_train_at_the_same_time(self):
        barrier = threading.Barrier(2, timeout=30)

        def train(rate, seed):
            barrier.wait()  # passes only where two runs are under way
            return [1.0]

        find_learning_rate(train, [0.1, 0.2], seeds=[0], refine=0, workers=2)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_diverged_run_is_read_no_further_and_leaves_the_others_alone(self, bad):
        read = {}

        def train(rate, seed):
            parts = [3.0, 2.5, *parabola(0.05, deviation=0.01)(rate, seed)]
            for number, part in enumerate(parts):
                read[rate, seed] = number + 1
                yield bad if rate == GRID[9] and number == 1 else part

        found = find_learning_rate(train, GRID, refine=0)
        assert all(count == (2 if rate == GRID[9] else 4) for (rate, _), count in read.items())
        assert [run.loss for run in found.runs if run.rate == GRID[9]] == [math.inf] * 3
        others = find_learning_rate(train, GRID[:9] + GRID[10:], refine=0)
        assert tuple(run for run in found.runs if run.rate != GRID[9]) == others.runs

    def test_the_last_part_counts(self):
        found = find_learning_rate(lambda rate, seed: [5.0, 0.0, 2.5], [0.1], seeds=[0])
        assert found.runs == (Run(0.1, 0, 2.5),)

    def test_a_run_above_the_largest_loss_has_diverged(self):
        def train(rate, seed):
            return {1.0: [2.0, 1.0], 2.0: [2.1, 0.5], 4.0: [2.0, 2.1]}[rate]

        found = find_learning_rate(train, [1.0, 2.0, 4.0], seeds=[0], refine=0, max_loss=2.0)
        assert [run.loss for run in found.runs] == [1.0, math.inf, math.inf]
        assert found.basin.upper == near(math.sqrt(2))

    @pytest.mark.parametrize("start", [None, 0.1])
    def test_of_which_all_diverge_say_so(self, start):
        with pytest.raises(ValueError, match=r"from 0\.001 to .*smaller rates"):
            find_learning_rate(parabola(1.0, cliffs=(0.0,)), [0.001, 0.1, 4], start=start)

    def test_none_at_all_say_so(self):
        with pytest.raises(ValueError, match="no rate"):
            summarise_runs([])

    @pytest.mark.parametrize("start", [None, 0.1])
    def test_a_training_that_yields_no_loss_is_named(self, start):
        with pytest.raises(ValueError, match=r"train\(0\.1, 0\) yielded no loss; .* one at least"):
            find_learning_rate(lambda rate, seed: iter(()), [0.1, 4], start=start)

    @pytest.mark.parametrize(
        "loss", [1.0, 1, np.float32(1.0), np.ones(()), jnp.float32(1.0), None], ids=type
    )
    def test_a_number_of_any_kind_is_not_a_row_of_losses(self, loss):
        with pytest.raises(TypeError, match=r"train\(0\.1, 0\) returned .*, or return \[loss\]"):
            find_learning_rate(lambda rate, seed: loss, [0.1, 4])

    @pytest.mark.parametrize("row", [[1.0], np.ones(2), jnp.ones(2), [jnp.float32(1.0)], (1, 1)])
    def test_rows_of_numbers_of_any_kind_are_losses(self, row):
        found = find_learning_rate(lambda rate, seed: row, [0.1], seeds=[0])
        assert found.runs == (Run(0.1, 0, 1.0),)

    def test_what_is_not_a_number_is_named(self):
        with pytest.raises(TypeError, match=r"yielded \('state', 1\.0\); accepted are numbers"):
            find_learning_rate(lambda rate, seed: [("state", 1.0)], [0.1, 4])  # pyright: ignore

    @pytest.mark.parametrize("workers", [1, 2])
    def test_an_error_of_the_training_is_raised(self, workers):
        def train(rate, seed):
            raise RuntimeError("of the training")

        with pytest.raises(RuntimeError, match="of the training"):
            find_learning_rate(train, GRID, workers=workers)


class TestInput:
    @pytest.mark.parametrize(
        "rates",
        [[], [0.0, 1.0], [-1.0], [math.nan], [1.0, math.inf], [1.0, 0.5, 1.0]],
    )
    def test_bad_rates_raise(self, rates):
        with pytest.raises(ValueError, match="rates must be positive, finite and different"):
            find_learning_rate(parabola(1.0), rates)

    @pytest.mark.parametrize("seeds", [[], [1, 1]])
    def test_bad_seeds_raise(self, seeds):
        with pytest.raises(ValueError, match="seeds must be different, and one at least"):
            find_learning_rate(parabola(1.0), GRID, seeds=seeds)

    @pytest.mark.parametrize("name", ["start", "tolerance", "margin"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_what_is_not_positive_raises(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, found {value}"):
            find_learning_rate(parabola(1.0), GRID, **{name: value})

    def test_no_workers_raise(self):
        with pytest.raises(ValueError, match="workers"):
            find_learning_rate(parabola(1.0), GRID, workers=0)
