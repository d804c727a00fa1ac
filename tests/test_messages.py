"""What is said to the user: errors of wrong input, progress, interrupts, and silence."""

import ast
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import archscale_jax as archscale
from archscale_jax._errors import unknown
from experiments.lab import common, progress
from experiments.lab.datasets import load
from experiments.lab.files import locked
from experiments.lab.models import DagMLP
from experiments.lab.progress import progress_of
from tests.binaries import run_forked

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.quick_compilation


def network(text: str = "2_02", **options) -> DagMLP:
    return DagMLP(archscale.dag_graph(text), 6, 8, 3, rngs=nnx.Rngs(0), **options)


MODEL = nnx.eval_shape(network)  # shapes are enough to raise
ARCHITECTURE, PARAMS = MODEL.architecture(), nnx.state(MODEL, nnx.Param)
OTHER = nnx.eval_shape(lambda: network("1_22")).architecture()
GRAPH, KEY = archscale.dag_graph("2_02"), jax.random.key(0)
WEIGHTS, INPUTS = {"w": jnp.ones((6, 3))}, jnp.ones((4, 6))
LINEN = {"params": {"readout": {"kernel": jnp.ones((8, 3))}}, "batch_stats": {"mean": INPUTS}}


def apply(params, inputs):
    return inputs @ params["w"]


def scaling(architecture=ARCHITECTURE, base=GRAPH, rule="path_sum", **options):
    return archscale.scale_by_architecture(architecture, base, rule, **options)


def search(rates=(0.1, 1.0), train=lambda rate, seed: [rate], **options):
    return archscale.find_learning_rate(train, rates, **options)


# What a new user gets wrong, and what of the message says what to do.
WRONG = {
    "a misspelt rule": (lambda: scaling(rule="pathsum"), "did you mean 'path_sum'?"),
    "a misspelt width rule": (
        lambda: scaling(base=ARCHITECTURE, width_rule="adamw"), "did you mean 'adam'?"),
    "a misspelt depth rule": (
        lambda: scaling(base=ARCHITECTURE, rule="none", depth_rule="adm"), "did you mean 'adam'?"),
    "a misspelt initialization": (
        lambda: archscale.initialize(KEY, PARAMS, ARCHITECTURE, "he_norm"), "mean 'he_normal'?"),
    "a misspelt activation": (lambda: network(activation="rellu"), "did you mean 'relu'?"),
    "a misspelt normalization": (lambda: network(normalization="batchnorm"), "mean 'batch'?"),
    "a misspelt data set": (lambda: load("fashion-mnist"), "did you mean 'fashion_mnist'?"),
    "a misspelt role": (
        lambda: archscale.trace(apply, WEIGHTS, INPUTS, roles={"w": "redout"}),
        "roles of 'w': unknown role 'redout'; accepted are input, .*; did you mean 'readout'?"),
    "a cell for a DAG": (
        lambda: archscale.dag_graph("|none~0|+|none~0|none~1|"), "cell_graph reads cells"),
    "dashes in a DAG string": (lambda: archscale.dag_graph("2-02"), "_ between groups"),
    "a space by its name": (
        lambda: archscale.build_graph(2, [0], [1], [2], space="DAG"),  # pyright: ignore
        "unknown space 'DAG'; accepted are Space.DAG"),
    "a base given as a string": (
        lambda: scaling(base="2"), "as base, found str; .* for a string, dag_graph"),
    "a base given as a model": (lambda: scaling(base=MODEL), "as base, found DagMLP"),
    "no base": (lambda: scaling(base=None), "pass base, e.g. dag_graph"),
    "architecture and base swapped": (
        lambda: scaling(GRAPH, ARCHITECTURE),
        "expected an Architecture, found GraphsTuple; archscale_jax.trace",
    ),
    "an architecture for a graph": (
        lambda: archscale.learning_rate_scale(ARCHITECTURE, GRAPH),  # pyright: ignore
        "found Architecture; for an Architecture, pass its graph"),
    "params and architecture swapped": (
        lambda: archscale.initialize(KEY, ARCHITECTURE, PARAMS),  # pyright: ignore
        "expected an Architecture, found State"),
    "a seed for a key": (
        lambda: archscale.initialize(0, PARAMS, ARCHITECTURE),  # pyright: ignore
        r"jax.random.key\(0\), found int"),
    "several keys": (
        lambda: archscale.initialize(jax.random.split(KEY), PARAMS, ARCHITECTURE), "jax.vmap"),
    "an array for a key": (
        lambda: archscale.initialize(INPUTS, PARAMS, ARCHITECTURE), "an array of dtype float32"),
    "params of integers": (
        lambda: archscale.initialize(
            KEY, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, int), PARAMS), ARCHITECTURE),
        "'layers/0_1/bias' has dtype int32; accepted are floating dtypes"),
    "params of numbers": (
        lambda: archscale.initialize(KEY, {"w": 1.0}, ARCHITECTURE), "1.0 of type float as 'w'"),
    "params of another network": (
        lambda: archscale.initialize(KEY, PARAMS, OTHER), "Pass the params of the network that"),
    "params of another width": (
        lambda: archscale.initialize(
            KEY, jax.tree.map(lambda leaf: jnp.zeros((9,) * leaf.ndim), PARAMS), ARCHITECTURE),
        r"'layers/0_1/bias' has shape \(9,\); the architecture expects \(8,\)"),
    "updates of another network": (
        lambda: scaling(OTHER).update(PARAMS, optax.EmptyState()), "Pass the params of the"),
    "the variables of a linen model": (
        lambda: archscale.initialize(KEY, LINEN, ARCHITECTURE), r"pass variables\['params'\]"),
    "two leaves of one name": (
        lambda: archscale.trace(apply, {"w": INPUTS, "a/b": INPUTS, "a": {"b": INPUTS}}, INPUTS),
        "two leaves are named 'a/b'"),
    "text among params": (
        lambda: archscale.trace(apply, {**WEIGHTS, "name": "text"}, INPUTS), "'text' of type str"),
    "trace without its function": (
        lambda: archscale.trace(WEIGHTS, apply, INPUTS),  # pyright: ignore
        r"trace takes \(function, params, \*inputs\)"),
    "variables with running averages": (
        lambda: archscale.trace(apply, LINEN, INPUTS), r"pass variables\['params'\]"),
    "a module for its function": (
        lambda: archscale.trace(linen.Dense(3), WEIGHTS, INPUTS), "Dense; for a linen module"),
    "an NNX model for its function": (
        lambda: archscale.trace(MODEL, WEIGHTS, INPUTS), "found DagMLP; for an NNX model"),
    "running averages among the outputs": (
        lambda: archscale.trace(lambda params, x: (apply(params, x), {"batch_stats": {"m": x}}),
                                WEIGHTS, INPUTS), r"trace its first part alone"),
    "a shape for an input": (
        lambda: archscale.trace(apply, WEIGHTS, (4, 6)), r"ShapeDtypeStruct\(\(4, 6\)"),
    "a graph under jit": (lambda: jax.jit(archscale.path_statistics)(GRAPH), "outside of jit"),
    "widths that the network does not have": (
        lambda: archscale.with_widths(ARCHITECTURE, {512: 256}), "read and write 3, 6, 8 features"),
    "no rates": (lambda: search([]), r"rates must be positive, finite and different, found \[\]"),
    "a rate that is NaN": (lambda: search([float("nan"), 1.0]), "found .nan, 1.0."),
    "one rate": (lambda: search(0.1), "as numpy.geomspace"),
    "a number of seeds": (lambda: search(seeds=3), r"range\(3\), found 3"),
    "no worker": (lambda: search(workers=0), "workers must be an integer of at least 1, found 0"),
    "training that gives a number": (
        lambda: search(train=lambda rate, seed: rate), r"returned 0.1; .* return \[loss\]"),
    "a rate for an optimizer": (
        lambda: archscale.measure_update(
            apply, lambda p, x: jnp.sum(apply(p, x)), WEIGHTS, INPUTS, 0.1),  # pyright: ignore
        "an optax transformation, .* found 0.1"),
    "a width that is not an integer": (
        lambda: DagMLP(GRAPH, 6, 8.0, 3, rngs=nnx.Rngs(0)),  # pyright: ignore
        "width must be an integer from 1, found 8.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_raises_with_what_to_do(case):
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message.replace("?", r"\?")) as caught:
        call()
    assert len(str(caught.value)) < 800  # one screen


def test_the_nearest_name_is_told_where_there_is_one():
    assert unknown("rule", "dept", ["depth", "none"]) == (
        "unknown rule 'dept'; accepted are depth, none; did you mean 'depth'?"
    )
    assert unknown("rule", None, []) == "unknown rule None; there are none"
    assert unknown("layer", "x", map(str, range(30))).endswith("18, 19, … (30 in all)")


def _sources() -> list[pathlib.Path]:
    return [
        path
        for folder in ("archscale_jax", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    ]


def _raised() -> list[tuple[str, ast.Call]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node.exc)
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]


def _literal(node: ast.expr) -> str:
    """A message as it is written, `{}` for what it interpolates."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return "{}"


PROPER_NAMES = ("Ray", "JAX", "Flax", "DAG", "JSON")


def test_errors_have_one_style():
    """Small at the start, no full stop at the end; a fixed text says more than that it is wrong.

    Where nothing is interpolated, few words without a second clause cannot say what to do.
    """
    messages = [(where, _literal(call.args[0])) for where, call in _raised() if call.args]
    assert len(messages) > 250
    bad = []
    for where, text in messages:
        start = text.split(maxsplit=1)[0] if text.strip() else ""
        if start[:1].isupper() and start.rstrip(",:'s") not in PROPER_NAMES:
            bad.append(f"{where} begins with a capital: {text!r}")
        if text.endswith((".", "!", " ")):
            bad.append(f"{where} ends with a stop: {text!r}")
        if "{}" not in text and len(text.split()) < 8 and not re.search("[:;,] ", text):
            bad.append(f"{where} says too little: {text!r}")
    assert not bad, "\n".join(bad)


def test_the_library_prints_nothing():
    """Progress goes to standard error from one place; results are returned."""
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "archscale_jax").rglob("*.py")
        if path.name != "progress.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]
    assert not printing


class TestProgressInALog:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
        monkeypatch.delenv("FORCE_COLOR", raising=False)

    def test_is_a_line_for_every_tenth(self, capsys):
        with progress_of("trials", 100, done=10) as advance:
            for number in range(90):
                advance(note=f"{number} failed")
        output, errors = capsys.readouterr()
        assert output == ""
        lines = errors.splitlines()
        assert lines[-1].startswith("trials: 100 of 100, 89 failed, 0:00:0")
        assert len(lines) in (9, 10)  # with the one of the start, where the timer came first
        assert all(line.isprintable() for line in lines)
        assert re.search(r"trials: \d+ of 100, \d+ failed, 0:00:0\d elapsed, about 0:", errors)

    def test_comes_before_the_first_trial_is_done(self, capsys):
        errors = ""
        with progress_of("trials", 3):
            for _ in range(500):
                errors += capsys.readouterr().err
                if errors:
                    break
                time.sleep(0.01)
        assert errors.startswith("trials: 0 of 3, ")

    def test_of_an_unknown_total(self, capsys, monkeypatch):
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        with progress_of("runs", None) as advance:
            advance()
        assert "runs: 1, 0:00:00 elapsed" in capsys.readouterr().err

    def test_is_silent_where_told_or_where_it_is_over_soon(self, capsys, monkeypatch):
        monkeypatch.setattr(progress, "FIRST_SECONDS", 60.0)
        for visible in (True, False):
            with progress_of("trials", 3, visible=visible) as advance:
                advance(3)
        assert capsys.readouterr() == ("", "")


BINARIES = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "common.run_binary(run)" in path.read_text()
)


class TestBinaries:
    @pytest.mark.parametrize("name", BINARIES)
    def test_help_goes_to_standard_output_and_is_not_an_error(self, name, tmp_path):
        for flag in ["--help", "--helpshort", "--helpfull"][: 3 if name == "train" else 1]:
            done = run_forked(name, [flag], tmp_path, ROOT)
            assert (done.returncode, done.stderr) == (0, "")
            assert "--workdir: " in done.stdout and "--quiet" in done.stdout.replace("[no]", "")

    def test_help_is_grouped_and_has_every_flag_once(self, tmp_path):
        text, all_flags = (
            run_forked("scaling", [flag], tmp_path, ROOT).stdout
            for flag in ("--help", "--helpshort")
        )
        named = [re.findall(r"^ +--(\S+?):", one, re.M) for one in (text, all_flags)]
        assert len(named[0]) > 20 and sorted(named[0]) == sorted(named[1])
        titles = ["This binary", "Network", "Data", "Training", "Where trials run"]
        assert re.findall(r"^([A-Z][\w ]+)$", text, re.M) == [*titles, "Folder and output"]
        assert "A DAG string is a network" in text and "  --rule" not in text.split("Network")[1]

    def test_bad_arguments_and_folders_end_with_one_line(self, tmp_path, run_again):
        (tmp_path / "file").touch()
        for workdir, flags, message in (
            (tmp_path, ["extra"], r"error: unknown arguments \['extra'\]; flags start with --"),
            (
                tmp_path,
                ["--learning_rate=1"],
                "error: unknown flag --learning_rate; there is --base_rate; see --help$",
            ),
            (tmp_path, ["--zzz"], "error: unknown flag --zzz; see --help$"),
            (
                tmp_path / "file",
                ["--steps=1"],
                "error: .*exists; choose another --workdir: '.*file",
            ),
        ):
            done = run_again("train", workdir, *flags)
            assert (done.returncode, done.stdout) == (1, "")
            assert (
                re.match(message, done.stderr.splitlines()[-1]) and "Traceback" not in done.stderr
            )

    def test_a_folder_that_another_process_writes_to_is_left_alone(self, tmp_path, run_again):
        (tmp_path / "config.json").write_text("{}")
        with locked(tmp_path / "commands.jsonl"):
            done = run_again("train", tmp_path, "--steps=1")
        assert done.returncode == 1
        assert "error: another process writes to this journal" in done.stderr
        assert "wait for it or stop it, or choose another --workdir" in done.stderr
        assert (tmp_path / "config.json").read_text() == "{}"
        assert not (tmp_path / "results.jsonl").exists()

    def test_an_interrupt_tells_what_is_kept_and_how_to_go_on(self, tmp_path):
        flags = [f"--workdir={tmp_path / 'run'}", "--epochs=5000", "--width=4"]
        saved = tmp_path / "run" / "checkpoints" / "1"
        done = run_forked("train", flags, tmp_path, ROOT, interrupt_at=saved)
        assert (done.returncode, done.stdout) == (130, "")
        assert "Traceback" not in done.stderr
        said, _, command = done.stderr.splitlines()[-1].partition(", go on with: ")
        assert said == f"interrupted; what is finished is kept in {tmp_path / 'run'}"
        python, *arguments = command.split()
        assert os.path.abspath(python) == sys.executable
        assert arguments == ["-m", "experiments.train", *flags]

    @pytest.mark.parametrize(
        ("line", "message"),
        [('{"command": 3}\n', "line 1 has 3 as 'command'"), ("a\n", "line 1 is not JSON"),
         ("a", "is not a journal of ours")],
    )  # fmt: skip
    def test_damaged_commands_are_told_and_stop_nothing(self, line, message, tmp_path, run_again):
        (tmp_path / "commands.jsonl").write_text(line)
        done = run_again("train", tmp_path, "--steps=1", "--width=4")
        assert done.returncode == 0, done.stderr
        assert f"\n{tmp_path}/commands.jsonl {message}" in done.stderr
        assert "; the study goes on all the same\n" in done.stderr

    def test_a_folder_of_another_study_is_told_by_its_name(self, tmp_path, run_again):
        (tmp_path / "config.json").write_text('{"adaptive": false}')
        command = {"command": "python -m experiments.find_lr --adaptive", "resumed": False}
        command |= {"started": "", "machine": "", "devices": [], "versions": {}}
        (tmp_path / "commands.jsonl").write_text(json.dumps(command) + "\n")
        done = run_again("train", tmp_path, "--steps=1")
        assert done.stderr.splitlines()[-1] == (
            f"error: {tmp_path} holds a run of experiments.find_lr, not of experiments.train; "
            "choose another --workdir"
        )

    def test_what_is_finished_are_records_and_checkpoints(self, tmp_path):
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
        for name in ("commands.jsonl", "config.json", "results.jsonl"):
            (tmp_path / name).write_text("{}\n" * (name != "results.jsonl"))
        assert not common._holds_results(tmp_path)
        (tmp_path / "checkpoints" / "1.json").touch()
        assert common._holds_results(tmp_path)

    def test_any_workdir_is_written_to_and_named_as_it_is(self, tmp_path, run_again):
        workdir = tmp_path / "[red][/x] :warning: é"
        flags = ["--width=4", "--batch_size=512", "--epochs=0.4"]
        done = run_again("find_lr", workdir, *flags, "--num_rates=2")
        assert done.returncode == 0, done.stderr
        assert f"report:  {workdir / 'report.html'}\n" in done.stdout
        assert (workdir / "report.html").exists()


SMALL = ["--width=4", "--batch_size=512", "--steps=1", "--quiet"]


def fill_the_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def close_output():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = os.fdopen(1, "w")  # that of before takes it for a file


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (fill_the_disk, "error: [Errno 28] No space left on device"),
        (close_output, "error: standard output was closed"),
        (limit_files, "File too large"),
    ],
)
def test_what_cannot_be_written_ends_a_binary_in_one_sentence(prepare, message, tmp_path):
    flags = [f"--workdir={tmp_path / 'é'}", *SMALL]
    done = run_forked("train", flags, tmp_path, ROOT, prepare=prepare)
    assert done.returncode == 1, done.stderr
    if prepare is limit_files:  # orbax may print what one of its threads met, before or after
        assert message in done.stderr
        return
    assert message in (done.stderr.splitlines() or [""])[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ("ulimit -v 2000000; {}", "error: `ulimit -v` leaves 1.9 GiB"),
        (
            "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {}",
            "is not text in the encoding ascii",
        ),
    ],
)
def test_whatever_the_shell_does_a_binary_ends_in_one_sentence(
    shell, message, tmp_path, binary_environment
):
    command = f"{sys.executable} -m experiments.train --workdir=é {' '.join(SMALL)}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell.format(command)}"], cwd=tmp_path,
        env=binary_environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert message in (done.stderr.splitlines() or [""])[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["[/x]", "[red]x", "[link=https://a]y", ":warning:"])
def test_a_bar_shows_markup_as_it_is(text, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_of(text, 2, note=text) as advance:
        advance(note=text)
    assert capsys.readouterr().err.count(text) >= 2


def test_a_transformed_function_is_not_a_module():
    traced = archscale.trace(nnx.jit(apply), WEIGHTS, INPUTS)
    assert traced.parameters == archscale.trace(apply, WEIGHTS, INPUTS).parameters
