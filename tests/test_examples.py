"""examples/ as their readers run them, with few updates, and what docs/examples.md says of them."""

import ast
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick_compilation

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
SHARDED = "sharded_scan_decoder"
PAGE = (ROOT / "docs" / "examples.md").read_text()


def answer(name):
    """The sentence that the page shows as what an example prints last."""
    section = PAGE.split(f"../examples/{name}.py", 1)[1]
    shown = re.search(r"^> (.*(?:\n> .*)*)", section, re.MULTILINE)
    assert shown, name
    return " ".join(shown[1].split("\n> "))


def without_numbers(sentence):
    """A sentence without what depends on the number of updates and on the machine."""
    return re.sub(r"\d+(\.\d+)?|nan", "#", sentence)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process; returns the lines that it prints."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES[name]), *flags])
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
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
    flags = ["--seeds=2"] if name == "find_rate" else []
    lines = run(name, "--steps=12", *flags)
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


def test_sharded_training_goes_on_from_its_checkpoint(tmp_path):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(folder, *flags):
        command = [sys.executable, str(EXAMPLES[SHARDED]), f"--workdir={tmp_path / folder}"]
        done = subprocess.run(
            [*command, "--steps=8", *flags],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    whole = run("whole")
    first, second = run("cut", "--stop=3"), run("cut")
    assert second[0] == "  goes on behind batch 2"
    assert [*first[:-1], *second[1:]] == whole
    assert whole[-1].startswith("4 devices, each with 25% of parameters")
    assert without_numbers(whole[-1]) == without_numbers(answer(SHARDED))
