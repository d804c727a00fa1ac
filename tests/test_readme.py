import pathlib
import re

import pytest

from archscale_jax.rules import INITIALIZATION_RULES, LEARNING_RATE_RULES
from archscale_jax.tuning._predict import MEASURED_RULES

pytestmark = pytest.mark.quick_compilation

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    "README.md": "depth adam; m: residual additions over the base's",
    "docs/index.md": "parametrization for adamw",
    "docs/quickstart.md": "losses fall: True",
    "docs/tune_small_train_large.md": "large is better: True",
    "docs/your_model.md": "",
    "docs/which_parametrization.md": "True",
    "docs/checks.md": "'output': 1.",
    "docs/audit.md": "behind optax.adamw scales the decay with the rate",
    "docs/running.md": "",
    "docs/faq.md": "",
    "docs/contrib.md": "restored: True",
    "docs/extending.md": "paths 0.5",
}
"""What a page prints, beside its blocks of `text`."""

SHORTER = {
    "docs/contrib.md": {
        "[32] * 8": "[8] * 2",
        "halves(32, 300)": "halves(32, 6)",
        "halves(32, 30), num_steps=10)": "halves(32, 6), num_steps=2)",
        '"llama", depth=2': '"llama", depth=1',
        '"llama", depth=4': '"llama", depth=2',
    },
    "docs/tune_small_train_large.md": {"blocks=8, width=128": "blocks=2, width=64"},
}
"""What tests write for long trainings and large networks."""

REGISTRIES = (LEARNING_RATE_RULES, INITIALIZATION_RULES, MEASURED_RULES)


@pytest.fixture(autouse=True)
def registered_rules(monkeypatch):
    """Rules that a page registers are forgotten after it."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_rules", dict(registry._rules))


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    blocks = blocks_of(ROOT / page, "python")
    assert blocks
    source, namespace = "\n".join(blocks), {}
    for long, short in SHORTER.get(page, {}).items():
        assert source.count(long) == 1
        blocks = [block.replace(long, short) for block in blocks]
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    printed = capsys.readouterr().out
    for text in (PAGES[page], *blocks_of(ROOT / page, "text")):
        assert text in printed
    assert (tmp_path / "network.png").exists() == (page == "README.md")


def blocks_of(page, language):
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, page.read_text(), re.DOTALL | re.MULTILINE)


def test_links_lead_to_files():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.M)
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
