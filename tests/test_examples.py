"""examples/ with small networks and few updates, and what docs/examples.md says of them."""

import ast
import contextlib
import io
import math
import pathlib
import re
import runpy
import sys

import pytest

from tests.devices import on_devices

pytestmark = pytest.mark.quick_compilation

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
SHARDED = "sharded_scan_decoder"
PAGE = (ROOT / "docs" / "examples.md").read_text()
SMALLER = {
    "audit": {"Network(2, 32)": "Network(1, 16)", "Network(4, 256)": "Network(2, 32)"},
    "equinox_mlp": {
        "Network(2, 32, KEY), Network(12, 256, KEY)": "Network(1, 16, KEY), Network(2, 32, KEY)"
    },
    "find_rate": {},
    "gpt_linen": {"GPT(2, 32)": "GPT(1, 16)", "GPT(6, 128)": "GPT(2, 32)"},
    "muon": {"shapes(1, 32)": "shapes(1, 16)", "shapes(4, 64)": "shapes(2, 32)"},
    "resnet_nnx": {"(1, 8), (4, 32)": "(1, 8), (2, 16)", "(0.1, 0.3, 1.0, 3.0)": "(0.1, 0.3)"},
    SHARDED: {
        "Decoder(6, 128), Decoder(2, 32)": "Decoder(2, 32), Decoder(1, 16)",
        "RATE = 64, 16": "RATE = 16, 16",
    },
}
"""What the tests write for the networks and rates of an example, and for its long sequences."""


def answer(name):
    """The sentence that the page shows as what an example prints last."""
    section = PAGE.split(f"../examples/{name}.py", 1)[1]
    shown = re.search(r"^> (.*(?:\n> .*)*)", section, re.MULTILINE)
    assert shown, name
    return " ".join(shown[1].split("\n> "))


def without_numbers(sentence):
    """A sentence without what depends on the number of updates and on the machine."""
    return re.sub(r"\d+(\.\d+)?|nan", "#", sentence)


def smaller(name, folder):
    """The path of an example whose large network is smaller."""
    source = EXAMPLES[name].read_text()
    for large, small in SMALLER[name].items():
        assert source.count(large) == 1
        source = source.replace(large, small)
    path = folder / EXAMPLES[name].name
    path.write_text(source)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example in this process; returns the lines that it prints."""

    def run(name, *flags):
        path = smaller(name, tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *flags])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_there_are_seven_in_the_page_and_in_the_readme():
    assert len(EXAMPLES) == 7
    linked = re.findall(r"\.\./examples/(\w+)\.py", PAGE)
    assert sorted(set(linked)) == sorted(EXAMPLES)
    assert "(docs/examples.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_flat_files_of_the_public_interface(name):
    source = EXAMPLES[name].read_text()
    assert source.count("\n") < 120
    imported = [
        found
        for node in ast.walk(ast.parse(source))
        for found in (
            [one.name for one in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert "archscale_jax" in imported
    assert not [one for one in imported if one.split(".")[0] in ("experiments", "benchmarks")]
    assert not re.search(r"archscale(_jax)?\._|jax\._src", source)


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {SHARDED, "audit"}))
def test_prints_what_the_page_shows(name, run):
    flags = ["--seeds=2", "--steps=12"] if name == "find_rate" else ["--steps=3"]
    lines = run(name, *flags)
    assert without_numbers(lines[-1]) == without_numbers(answer(name))
    assert "nan" not in lines[-1]
    if name == "gpt_linen":  # both sizes are better than guessing
        losses = re.findall(r"(\d\.\d+)(?: nats|\.$)", lines[-1])
        assert [float(loss) < math.log(256) for loss in losses] == [True, True]


def test_audit_finds_the_three_faults_and_no_other(run):
    lines = run("audit", "--steps=3")
    assert without_numbers(lines[-1]) == without_numbers(answer("audit"))
    heads = [number for number, line in enumerate(lines) if line.endswith(":")]
    kinds = [
        {line.split()[0] for line in lines[start + 1 : end] if line.startswith("  ")}
        for start, end in zip(heads, [*heads[1:], len(lines)], strict=True)
    ]
    assert kinds == [set(), {"start"}, {"decay"}, {"rate", "decay"}]


def runs(path, *flags):
    """What an example prints, by run, in a process of its own."""
    printed = []
    for one in flags:
        sys.argv = [path, *one.split()]
        with contextlib.redirect_stdout(io.StringIO()) as lines:
            runpy.run_path(path, run_name="__main__")
        printed.append(lines.getvalue().splitlines())
    return printed


def test_sharded_training_goes_on_from_its_checkpoint(tmp_path):
    path = smaller(SHARDED, tmp_path)
    cut, whole = (f"--steps=8 --workdir={tmp_path / name}" for name in ("cut", "whole"))
    first, second, uncut = on_devices(runs, path, f"{cut} --stop=3", cut, whole, count=4)
    assert second[0] == "  goes on behind batch 2"
    assert [*first[:-1], *second[1:]] == uncut
    assert uncut[-1].startswith("4 devices, each with 25% of parameters")
    assert without_numbers(uncut[-1]) == without_numbers(answer(SHARDED))
