import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    "README.md": "PathStatistics(count=6, depth_sum=13, depth_cubed_sum=115",
    "docs/own_model.md": "",
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
    assert "tx" in namespace
    assert (tmp_path / "graph.png").exists() == (page == "README.md")


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
