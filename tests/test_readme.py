import pathlib
import re

import pytest

pytestmark = pytest.mark.quick_compilation

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    "README.md": "paths: 6, ΣL = 13, ΣL³ = 115, L from 0 to 4",
    "docs/own_model.md": "",
    "docs/coordinate.md": "{0: 1.",
    "docs/gradinit.md": "True",
    "docs/growing.md": "edge",
    "docs/devices.md": "",
}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.M)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert PAGES[page] in capsys.readouterr().out
    assert (tmp_path / "network.png").exists() == (page == "README.md")


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.M)
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
