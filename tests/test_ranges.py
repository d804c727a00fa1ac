"""Flags out of range, and data that are not there, raise before a binary has begun."""

import importlib
import math
import pathlib

import pytest
from absl import flags

from experiments.lab import data_flags, ranges
from tests.binaries import FORKS, run_forked

ROOT = pathlib.Path(__file__).parents[1]
NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "9" * 5000, "", "x", "1,2", "0x")
CHECKED = (
    ranges.Number,
    ranges.Checked,
    ranges.Items,
    data_flags.DatasetParser,
    flags.EnumParser,
    flags.BooleanParser,
)
TEXTS = {"data_dir", "json", "ray_address", "table", "table_column", "truth", "workdir"}
ERRORS = {  # by the binary: flags, and what is said of them
    "train": {
        "--width=46341": "accepted is an integer from 1 to 16384",
        "--seed=18446744073709551616": "accepted is an integer from 0 to 4294967295",
        "--epochs=1e308": "accepted is a number above 0 to 1000000",
        "--epochs=0": "accepted is a number above 0 to 1000000",
        "--momentum=1": "accepted is a number from 0 and below 1",
        "--architecture=1": "no path crosses a weight edge; accepted are DAG strings with a 2",
        "--architecture=" + "2" + 300 * "_": "accepted are DAG strings of 257 vertices at most",
    },
    "find_lr": {"--refine=1000": "accepted is an integer from 0 to 8"},
    "scaling": {
        "--chain_depths=2,2000": "item '2000': accepted is an integer from 1 to 256",
        "--num_random=1000000000": "accepted is an integer from 0 to 1000",
        "--rules=": "accepted are 1 to 1000 items between commas, found 0",
        "--architecture=1": "no path crosses a weight edge",
    },
    "grow": {
        "--rate=0.1,-1": "item '-1': accepted is a number above 0",
        "--growths=-1": "accepted is an integer from 0 to 1000",
        "--interval=0": "accepted is an integer from 1",
        "--steps=0": "accepted is an integer from 1",
        "--arm=tinny": "unknown arm 'tinny'; accepted are tiny, .*; did you mean 'tiny'?",
    },
    "rank": {
        "--num_cells=2": "accepted is an integer from 3",
        "--recipe=fixed": "accepted are 2 to 1000 items between commas, found 1",
        "--cell=0_00_000": "cell",
    },
    "coordinate": {
        "--width=": "accepted are 1 to 1000 items",
        "--axis=size": "unknown axis 'size'",
    },
    "audit": {
        "--width=0": "accepted is an integer from 1 to 16384",
        "--family=rnn": "value should be one of",
    },
    "gradinit": {"--network=plain_99999999": "of DEPTH 1 to 256 and the families plain"},
    "defaults": {
        "--family=rnn": "unknown family 'rnn'; accepted are ",
        "--steps=19": "accepted is an integer from 20",
        "--growth=1": "accepted is an integer from 2 to 64",
    },
    "size_transfer": {"--study=": "accepted are 1 to 1000 items between commas, found 0"},
    "transfer": {"--max_networks=1": "accepted is an integer from 2"},
}


def parse_badly(name, cases):
    """Returns what is said of each flag of a binary, and how its numbers take what they should not.

    In a process of its own: binaries define the same flags.
    """
    importlib.import_module(f"experiments.{name}")
    known = [
        flag
        for module, found in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("experiments.")
        for flag in found
    ]
    unbounded = [
        flag.name
        for flag in known
        if not isinstance(flag.parser, CHECKED) and flag.name not in TEXTS
    ]
    numbers = [
        (f"--{flag.name}={text}", "accepted is ")
        for flag in known
        for text in NO_NUMBERS
        if isinstance(flag.parser, ranges.Number)
    ]
    said = []
    for argument, message in [*cases.items(), *numbers]:
        try:
            flags.FLAGS([name, argument])
            said.append((argument, message, "nothing"))
        except flags.Error as error:
            said.append((argument, message, str(error)))
    return unbounded, said


@pytest.mark.parametrize("name", ERRORS)
def test_every_flag_has_a_range_and_names_itself(name):
    with FORKS.Pool(1) as pool:
        unbounded, said = pool.apply(parse_badly, (name, ERRORS[name]))
    assert not unbounded
    assert len(said) > len(ERRORS[name])
    for argument, message, error in said:
        flag, _, rest = error.partition(": ")
        assert flag == f"flag {argument}"
        assert all(part in rest for part in message.split(".*")), (argument, rest)


@pytest.mark.parametrize("name", ["coordinate", "gradinit", "grow", "rank", "size_transfer"])
def test_a_missing_data_set_is_told_before_anything_is_recorded(name, tmp_path):
    command = [f"--workdir={tmp_path / 'run'}", "--dataset=fashion_mnist", f"--data_dir={tmp_path}"]
    done = run_forked(name, command, tmp_path, ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: fashion_mnist: no train-images") and "run `make data`" in line
    assert not (tmp_path / "run").exists()


UNFIT = {
    "images that a factor does not divide": (
        "grow", "--images_downscale=3", "--images_downscale, found 3: factor 3 does not divide"),
    "a batch beside what is held out": (
        "grow", "--images_downscale=1 --batch_size=500", "--batch_size=500 exceeds the 438 tr"),
    "growths after the end": ("grow", "--steps=10", "need --steps above 960, found 10"),
    "a start above the end": (
        "grow", "--start_width=99 --large_width=8", "--start_width=99 exceeds --large_width=8"),
    "methods that train nothing": ("grow", "--arm=scratch", "--arm=scratch trains none"),
    "factors of convolutions alone": (
        "gradinit", "--images_downscale=3", "--images_downscale, found 3: factor 3 does not"),
    "heads that do not divide a width": (
        "gradinit", "--network=transformer_2 --patches_width=56", "not a multiple of the 3 heads"),
    "too few cells": ("rank", "--cell=3_33_333", "--cell must name 3 cells at least"),
    "a ranking without its reference": ("rank", "--recipe=mup,measured", "must name fixed"),
    "a shift out of the image": (
        "train", "--padding=9", "--padding=9 exceeds the images, 8 x 8 pixels"),
    "momentum that is missing": ("scaling", "--nesterov", "nesterov=True needs a momentum above 0"),
    "a network that no memory holds": (
        "find_lr", "--width=16384 --kernel_size=255", "of --width=16384 and --kernel_size=255 has"),
    "a warm-up without an end": ("scaling", "--warmup_steps=100", "found 100 of 44"),
    "more networks than there are": (
        "scaling", "--num_random=1000 --random_vertices=2", "--random_vertices=2 for --num_random"),
    "a single size": (
        "coordinate", "--axis=width --width=8,8", "--width must hold two different sizes at least"),
    "a size that is not a depth": (
        "size_transfer", "--study=transformer_depth --size=1,999", "--size, found the depth 999"),
    "an address without its runner": (
        "coordinate", "--family=mlp --axis=depth --ray_address=a:1 --width=8", "--ray_address is"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_together_is_told_before_anything_is_written(case, tmp_path):
    name, arguments, message = UNFIT[case]
    command = [f"--workdir={tmp_path / 'run'}", *arguments.split(), "--dataset=digits"]
    done = run_forked(name, command, tmp_path, ROOT)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_numbers_have_bounds_that_may_be_left_out():
    number = ranges.Number(float, 0, 1, open=("low", "high"))
    assert number.parse("0.5") == 0.5 and number.syntactic_help == "a number above 0 and below 1"
    for text in ("0", "1", math.nextafter(1, 2), "-0"):
        with pytest.raises(ValueError, match="accepted is a number above 0 and below 1"):
            number.parse(text)


def test_items_are_named_and_count_once():
    items = ranges.Items(ranges.KINDS["depth"], least=2)
    assert items.parse("3, 4,3") == ["3", "4"]
    assert items.parse(["3", "4"]) == ["3", "4"]
    for text, message in (("3,0", "item '0': accepted is an integer"), ("3", "found 1")):
        with pytest.raises(ValueError, match=message):
            items.parse(text)
