"""notebooks/ as their readers run them, at the smallest setting, and what is stored in them."""

import pathlib
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import archscale_jax as archscale

pytestmark = pytest.mark.quick_compilation

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
NAMES = ("find_a_learning_rate", "grow_a_network", "trace_and_check", "wrap_your_optimizer")
CHOICE = 'SETTING = "{}"  # @param ["tiny", "small", "accelerator"]'
INSTALLING = 'if importlib.util.find_spec("archscale_jax") is None:\n    %pip install'


def read(name):
    return nbformat.read(PATHS[name], as_version=4)


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


class Shell(InteractiveShell):
    """The shell of a kernel, in this process: what is compiled and imported is at hand."""

    def enable_gui(self, gui=None):
        assert gui is None  # inline figures need no event loop


@pytest.fixture
def shell(monkeypatch):
    """A shell with a namespace of its own; what it changes in this process is put back."""
    monkeypatch.chdir(FOLDER)
    config = Config()
    config.HistoryManager.enabled = False  # it would write into the home folder
    backend = mpl.get_backend()
    with mpl.rc_context():
        shell = Shell.instance(config=config)
        yield shell
        plt.close("all")
        shell.run_line_magic("matplotlib", backend)
        Shell.clear_instance()


def run(shell, sources):
    """Runs cells and returns their namespace and their images; the first error is raised."""
    images = []
    for source in sources:
        with capture_output() as captured:
            result = shell.run_cell(source)
        result.raise_error()
        assert not captured.stderr, captured.stderr
        shown = [output.data for output in captured.outputs]
        if result.result is not None:
            shown.append(shell.display_formatter.format(result.result)[0])
        images += [data for data in shown if "image/png" in data]
    return shell.user_ns, images


def tiny(name):
    sources = code(read(name))
    assert CHOICE.format("small") in sources[0]
    sources[0] = sources[0].replace(CHOICE.format("small"), CHOICE.format("tiny"))
    return sources


def test_every_notebook_is_known():
    assert tuple(PATHS) == NAMES


def test_wrap_your_optimizer(shell):
    namespace, images = run(shell, tiny("wrap_your_optimizer"))
    assert len(images) == 3
    assert set(namespace["deep"]) == set(namespace["ways"])
    multipliers = archscale.learning_rate_multipliers(namespace["arch"], namespace["base"])
    assert set(np.round(list(multipliers.values()), 12)) == {
        round(4**-1.5, 12)
    }  # chains of 4 and 1


def test_find_a_learning_rate(shell):
    namespace, images = run(shell, tiny("find_a_learning_rate"))
    assert len(images) == 2
    assert list(namespace["searches"]) == list(namespace["networks"])
    # What all know of chains: the deep one wants the smaller rate.
    assert namespace["guesses"]["chain of 8"] < namespace["base_rate"]
    assert namespace["guesses"]["base"] == pytest.approx(namespace["base_rate"])


def test_trace_and_check(shell):
    namespace, images = run(shell, tiny("trace_and_check"))
    assert len(images) == 3
    assert max(archscale.tuning.flatness(namespace["curves"]["scaled"]).values()) < 3
    assert list(namespace["checks"]) == ["scaled"]
    assert set(namespace["checks"]["scaled"].searches) == {(1, 16), (1, 32)}


def test_grow_a_network(shell):
    namespace, images = run(shell, tiny("grow_a_network"))
    assert len(images) == 1
    grown, curve, edits = namespace["runs"][0]
    assert len(edits) == 2
    assert all(after <= before for _, growth in edits for before, after in [growth.losses])
    neurons = archscale.contrib.count_neurons(grown, namespace["groups"])
    added = sum(number for _, growth in edits for number in growth.numbers.values())
    assert sum(neurons.values()) == 4 * len(neurons) + added
    assert (np.diff(curve[:, 0]) > 0).all()


def test_an_unknown_setting_raises(shell):
    for name in NAMES:
        first = code(read(name))[0].replace(CHOICE.format("small"), 'SETTING = "large"')
        with pytest.raises(ValueError, match="'large'; accepted are tiny, small, accelerator"):
            run(shell, [first])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert PATHS[name].stat().st_size < 2**20
    sources = code(notebook)
    assert CHOICE.format("small") in sources[0]
    assert INSTALLING in sources[1]
    assert notebook.cells[-1].source.startswith("## What this does not show")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not any(cell.metadata for cell in notebook.cells)
    for output in outputs:
        shown = [output.get("text", ""), *output.get("data", {}).values()]
        for text in shown:
            assert not re.search(r"""(^|[\s"'(])/\w+/\w""", text, re.MULTILINE), text


def test_links_lead_to_files():
    for name in NAMES:
        prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (FOLDER / link).exists(), f"{name}: {link}"
