"""Plans of growth, on groups without a network."""

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import archscale_jax as archscale
from archscale_jax.contrib._growth.neuron_groups import Link, NeuronGroup

pytestmark = pytest.mark.quick_compilation

ROUND_ROBIN = archscale.contrib.GrowthSchedule()
LARGEST = archscale.contrib.GrowthSchedule("largest")
ALL = archscale.contrib.GrowthSchedule("all")


def group(name: str, *readers: str, blocker: str | None = None) -> NeuronGroup:
    links = tuple(Link(name, reader, "same", 1.0) for reader in readers)
    return NeuronGroup(name, (name,), (), links, blocker)


A, B, C = group("a", "b"), group("b", "c", "d"), group("c", "d")
LAST = group("d", blocker="no layer follows")
GROUPS = [A, B, C, LAST]


def bottlenecks(**relative: float) -> dict[str, archscale.contrib.Bottleneck]:
    """The absolute ones fall where the relative ones rise, as they should not be read."""
    return {
        name: archscale.contrib.Bottleneck({}, 100 - value, value, 1, 0.0)
        for name, value in relative.items()
    }


def choose(schedule, growth, groups=GROUPS, measured=None, **neurons: int) -> dict[str, int]:
    return archscale.contrib.choose_growth(
        schedule, growth, groups, {"a": 4, "b": 4, "c": 4, **neurons}, measured
    )


# What a plan takes.


def test_defaults_are_a_plan():
    assert dataclasses.asdict(ROUND_ROBIN) == {
        "order": "round_robin", "growths": 8, "interval": 100, "factor": 2.0, "max_neurons": None,
        "budget": None,
    }  # fmt: skip
    assert archscale.contrib.GrowthSchedule(order="round_robin") == ROUND_ROBIN
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROUND_ROBIN.growths = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "best"}, "unknown order 'best'; accepted are round_robin, largest, all"),
        ({"order": ""}, "unknown order ''; accepted are round_robin, largest, all"),
        ({"growths": -1}, "growths must be at least 0, found -1"),
        ({"interval": 0}, "interval must be at least 1, found 0"),
        ({"budget": 0}, "budget must be at least 1, found 0"),
        ({"factor": 1.0}, "factor must be above 1 and finite, found 1.0"),
        ({"factor": 0.5}, "factor must be above 1 and finite, found 0.5"),
        ({"factor": math.inf}, "factor must be above 1 and finite, found inf"),
        ({"factor": math.nan}, "factor must be above 1 and finite, found nan"),
    ],
)
def test_errors(options: dict[str, Any], message):
    with pytest.raises(ValueError) as caught:
        archscale.contrib.GrowthSchedule(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [{"growths": 0}, {"interval": 1}, {"budget": 1}, {"factor": 1.001}, {"max_neurons": {}}],
)
def test_the_ends_of_the_ranges(options: dict[str, Any]):
    assert (
        dataclasses.asdict(archscale.contrib.GrowthSchedule(**options)).items() >= options.items()
    )


@pytest.mark.parametrize("max_neurons", [None, 64, {"a": 8, "b": 16}])
def test_plans_are_json(max_neurons):
    schedule = archscale.contrib.GrowthSchedule("all", 3, 50, 1.5, max_neurons, 1000)
    text = json.dumps(dataclasses.asdict(schedule))
    assert archscale.contrib.GrowthSchedule(**json.loads(text)) == schedule


def edit(**changed: Any) -> archscale.contrib.Edit:
    values = {
        "step": 300, "numbers": {"a": 2}, "neurons": {"a": 4, "b": 3}, "capacity": {"a": 4, "b": 4},
        "amplitude": 0.5, "losses": [2.25, 2.125], "predicted": 0.1, "bottlenecks": {"b": 0.75},
    }  # fmt: skip
    return archscale.contrib.Edit(**values | changed)


def test_edits_are_json():
    found = dataclasses.asdict(edit())
    again = json.loads(json.dumps(found, sort_keys=True, allow_nan=False))
    assert dataclasses.asdict(edit(**again)) == found
    assert again["numbers"] == {"a": 2} and again["losses"] == [2.25, 2.125]


def test_edits_that_are_read_equal_those_that_were_written():
    again = json.loads(json.dumps(dataclasses.asdict(edit())))
    assert archscale.contrib.Edit(**again) == edit()


# What it chooses.


def test_groups_take_turns():
    assert [choose(ROUND_ROBIN, growth) for growth in range(8)] == [
        {name: 4} for name in "abcabcab"
    ]


def test_turns_pass_over_those_that_are_full():
    schedule = archscale.contrib.GrowthSchedule(max_neurons={"b": 4})
    assert [list(choose(schedule, growth)) for growth in range(4)] == [["a"], ["c"], ["c"], ["a"]]
    # Beyond the end the first is next.
    schedule = archscale.contrib.GrowthSchedule(max_neurons={"c": 4})
    assert list(choose(schedule, 2)) == ["a"]
    schedule = archscale.contrib.GrowthSchedule(max_neurons={"b": 4, "c": 3})
    assert {tuple(choose(schedule, growth)) for growth in range(8)} == {("a",)}


@pytest.mark.parametrize("schedule", [ROUND_ROBIN, LARGEST, ALL])
def test_groups_with_a_blocker_do_not_grow(schedule):
    measured = bottlenecks(b=0.1, c=0.2, d=0.3)
    for growth in range(8):
        assert "d" not in choose(schedule, growth, measured=measured)
    # Neither their place in the order nor their number matters.
    first = group("z", blocker="it is normalized")
    for growth in range(4):
        assert choose(schedule, growth, [first, *GROUPS], measured) == choose(
            schedule, growth, measured=measured
        )
    assert choose(schedule, 0, [LAST], measured) == choose(schedule, 0, [], measured) == {}


def test_the_largest_relative_bottleneck_of_a_reader_decides():
    def chosen(**relative):
        return list(choose(LARGEST, 0, measured=bottlenecks(**relative)))

    assert chosen(b=0.9, c=0.1, d=0.2) == ["a"]
    assert chosen(b=0.2, c=0.9, d=0.1) == ["b"]  # the largest of those that read b
    assert chosen(b=0.2, c=0.1, d=0.9) == ["b"]  # d reads b and c: the first of them
    assert list(choose(LARGEST, 0, [C, B, A], measured=bottlenecks(b=0.2, c=0.1, d=0.9))) == ["c"]
    # It does not matter how many growths there were, but who is full does.
    measured = bottlenecks(b=0.9, c=0.3, d=0.2)
    assert all(choose(LARGEST, growth, measured=measured) == {"a": 4} for growth in range(8))
    full = archscale.contrib.GrowthSchedule("largest", max_neurons={"a": 4})
    assert choose(full, 0, measured=measured) == {"b": 4}


def test_the_largest_needs_bottlenecks():
    with pytest.raises(ValueError, match="order 'largest' compares bottlenecks; pass them"):
        choose(LARGEST, 0)
    assert choose(LARGEST, 8) == {}  # there is nothing to compare


def test_all_at_once():
    assert choose(ALL, 5, a=1, b=2, c=3) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    "max_neurons, expected",
    [
        (None, {"a": 1, "b": 4, "c": 10}),
        (100, {"a": 1, "b": 4, "c": 10}),
        (12, {"a": 1, "b": 4, "c": 2}),
        (4, {"a": 1}),
        (1, {}),
        ({"b": 5, "c": 10}, {"a": 1, "b": 1}),
        ({"c": 9}, {"a": 1, "b": 4}),  # fewer than there are
        ({"other": 1}, {"a": 1, "b": 4, "c": 10}),
    ],
)
def test_limits_for_all_and_by_name(max_neurons, expected):
    schedule = archscale.contrib.GrowthSchedule("all", max_neurons=max_neurons)
    assert choose(schedule, 0, a=1, b=4, c=10) == expected


@pytest.mark.parametrize(
    "factor, neurons, number",
    [(2.0, 1, 1), (2, 7, 7), (1.5, 1, 1), (1.5, 2, 1), (1.5, 3, 2), (1.001, 5, 1), (3.7, 10, 27)],
)
def test_factors_are_rounded_up(factor, neurons, number):
    schedule = archscale.contrib.GrowthSchedule("all", factor=factor)
    assert archscale.contrib.choose_growth(schedule, 0, [A], {"a": neurons}) == {"a": number}


def test_factors_are_not_rounded_up_for_the_rounding_of_floats():
    schedule = archscale.contrib.GrowthSchedule("all", factor=1.1)
    assert archscale.contrib.choose_growth(schedule, 0, [A], {"a": 50}) == {"a": 5}


def test_a_plan_ends():
    for schedule in (ROUND_ROBIN, ALL, dataclasses.replace(LARGEST, growths=8)):
        measured = bottlenecks(b=1.0, c=1.0, d=1.0)
        assert choose(schedule, 7, measured=measured) != {}
        assert choose(schedule, 8, measured=measured) == choose(schedule, 100) == {}
    assert choose(archscale.contrib.GrowthSchedule(growths=0), 0) == {}


@given(
    order=st.sampled_from(["round_robin", "largest", "all"]),
    percent=st.integers(101, 400),
    max_neurons=st.none() | st.integers(1, 40) | st.dictionaries(st.sampled_from("abc"),
                                                          st.integers(1, 40)),
    counts=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    relative=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)  # fmt: skip
def test_whole_runs(order, percent, max_neurons, counts, relative):
    """Growth by growth: within the limits, by the factor, until nothing can grow or the end."""
    schedule = archscale.contrib.GrowthSchedule(
        order, growths=12, factor=percent / 100, max_neurons=max_neurons
    )
    measured = bottlenecks(**dict(zip("bcd", relative, strict=True)))
    neurons = dict(zip("abc", counts, strict=True))
    for growth in itertools.count():
        numbers = choose(schedule, growth, measured=measured, **neurons)
        able = [name for name, count in neurons.items() if count < limit(max_neurons, name)]
        assert bool(numbers) == (bool(able) and growth < 12)
        if not numbers:
            break
        assert set(numbers) <= set(able)
        assert list(numbers) == able if order == "all" else len(numbers) == 1
        for name, number in numbers.items():
            wanted = -(-percent * neurons[name] // 100)
            neurons[name] += number
            assert number >= 1 and neurons[name] == min(wanted, limit(max_neurons, name))


def limit(max_neurons, name: str) -> float:
    found = max_neurons.get(name) if isinstance(max_neurons, dict) else max_neurons
    return math.inf if found is None else found


# Capacity.

RATIOS = st.floats(1.05, 8)


def test_powers_of_2():
    capacity = archscale.contrib.geometric()
    assert [capacity(neurons) for neurons in range(10)] == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert len({capacity(neurons) for neurons in range(1, 65)}) == 7
    assert [archscale.contrib.geometric(1.5)(neurons) for neurons in range(1, 9)] == [
        1, 2, 3, 4, 6, 6, 8, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.0, -2.0, math.inf, math.nan])
def test_bad_ratios_raise(ratio):
    with pytest.raises(ValueError, match=f"ratio must be above 1 and finite, found {ratio}"):
        archscale.contrib.geometric(ratio)


@given(ratio=RATIOS, neurons=st.integers(1, 5000))
@example(ratio=2.0, neurons=1)
@example(ratio=1.05, neurons=5000)
def test_slots_suffice_and_are_not_many_more(ratio, neurons):
    capacity = archscale.contrib.geometric(ratio)
    found = capacity(neurons)
    assert neurons <= found < ratio * max(neurons - 1, 1 / ratio) + 1 + 1e-9 * neurons
    assert capacity(found) == found  # what has been made is full at as many neurons
    assert capacity(neurons + 1) >= found
    assert neurons == found or capacity(neurons + 1) == found  # the same until it is full


@given(ratio=RATIOS, most=st.integers(2, 2000))
def test_shapes_are_few(ratio, most):
    capacity = archscale.contrib.geometric(ratio)
    shapes = {capacity(neurons) for neurons in range(1, most + 1)}
    assert len(shapes) <= math.log(most) / math.log(ratio) + 2 + 1e-9
    powers = {math.ceil(ratio**power) for power in range(math.ceil(math.log(most, ratio)) + 2)}
    assert shapes <= powers
