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
NAMES = (  # in the order in which a reader needs them
    "tune_small_train_large",
    "audit_a_training",
    "your_own_model",
    "measure_instead_of_derive",
    "grow_a_network",
)
CHOICE = 'SETTING = "{}"  # @param ["tiny", "small"]'
INSTALLING = (
    'if importlib.util.find_spec("archscale_jax") is None:\n    %pip install --quiet {SOURCE}'
)


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
    """Runs cells; returns their namespace, images and values. The first error is raised."""
    images, values = [], []
    for source in sources:
        with capture_output() as captured:
            result = shell.run_cell(source)
        result.raise_error()
        assert not captured.stderr, captured.stderr
        shown = [output.data for output in captured.outputs]
        if result.result is not None:
            values.append(result.result)
            shown.append(shell.display_formatter.format(result.result)[0])
        images += [data for data in shown if "image/png" in data]
    return shell.user_ns, images, values


SMALLER = {
    "tune_small_train_large": {'"large": (2, 32)': '"large": (1, 32)', '"steps": 4': '"steps": 2'},
    "audit_a_training": {'"large": (2, 32)': '"large": (1, 32)', '"steps": 3': '"steps": 2'},
    "grow_a_network": {
        '"growths": 2, "interval": 5, "steps": 20': '"growths": 1, "interval": 2, "steps": 4'
    },
}
"""What the tests write for the smallest setting."""


def tiny(name):
    sources = code(read(name))
    smaller = {CHOICE.format("small"): CHOICE.format("tiny"), **SMALLER.get(name, {})}
    for old, new in smaller.items():
        assert sources[0].count(old) == 1
        sources[0] = sources[0].replace(old, new)
    return sources


def test_every_notebook_is_known_and_listed_in_this_order():
    assert sorted(PATHS) == sorted(NAMES)
    links = {"notebooks/README.md": r"\((\w+)\.ipynb\)", "mkdocs.yml": r"notebooks/(\w+)\.md"}
    for page, link in links.items():
        assert re.findall(link, (FOLDER.parent / page).read_text()) == [*NAMES], page


def test_tune_small_train_large(shell):
    namespace, images, _ = run(shell, tiny("tune_small_train_large"))
    assert len(images) == 1
    assert namespace["plan"].base is namespace["base"].architecture
    losses = np.array(list(namespace["curves"].values()))
    assert losses.shape == (2, 2, 2) and (losses < np.log(256) + 1).all()


def test_audit_a_training(shell):
    namespace, images, audits = run(shell, tiny("audit_a_training"))
    assert len(images) == 1
    kinds = [{one.kind for one in audit.findings} for audit in (*audits, namespace["audit"])]
    assert kinds == [set(), {"decay"}, {"start"}, {"rate", "decay"}]
    assert len(namespace["setups"]) == len(kinds)


def test_your_own_model(shell):
    namespace, images, _ = run(shell, tiny("your_own_model"))
    assert len(images) == 2
    assert set(namespace["losses"]) == set(namespace["ways"])
    plan, base = namespace["plan"], namespace["base"]
    multipliers = archscale.learning_rate_multipliers(plan.architecture, base.architecture)
    assert set(np.round(list(multipliers.values()), 12)) == {
        round((5 / 2) ** -1.5, 12)
    }  # chains of 4 and 1, and their stems
    assert archscale.path_statistics(namespace["read"].architecture.graph).max_depth == 3


def test_measure_instead_of_derive(shell):
    namespace, images, _ = run(shell, tiny("measure_instead_of_derive"))
    assert len(images) == 2
    assert list(namespace["searches"]) == list(namespace["plans"])
    # What all know of chains: the deep one wants the smaller rate.
    predictions, base = namespace["predictions"], namespace["base"]
    assert predictions["chain of 8"] < base.rate
    assert predictions["base"] == pytest.approx(base.rate)


def test_grow_a_network(shell):
    namespace, images, _ = run(shell, tiny("grow_a_network"))
    assert len(images) == 1
    grown, curve, growths = namespace["runs"][0]
    assert len(growths) == 1
    assert all(after <= before for _, growth in growths for before, after in [growth.losses])
    neurons = archscale.contrib.count_neurons(grown, namespace["groups"])
    added = sum(number for _, growth in growths for number in growth.numbers.values())
    assert sum(neurons.values()) == 4 * len(neurons) + added
    assert (np.diff(curve[:, 0]) > 0).all()


def test_an_unknown_setting_raises(shell):
    for name in NAMES:
        first = code(read(name))[0].replace(CHOICE.format("small"), 'SETTING = "large"')
        with pytest.raises(ValueError, match="'large'; accepted are tiny, small"):
            run(shell, [first])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert PATHS[name].stat().st_size < 2**20
    sources = code(notebook)
    assert CHOICE.format("small") in sources[0]
    assert INSTALLING in sources[0]  # what it needs is set up in one cell
    assert not re.search(r"\b(experiments|benchmarks)\b|archscale(_jax)?\._", "".join(sources))
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
