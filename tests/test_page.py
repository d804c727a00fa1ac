"""The HTML page of a run: in a browser, and in what it says of the run."""

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from experiments.lab import page, panels
from experiments.lab.inline_svg import inline_svg

HOSTILE = """</table><script>document.title = "broken"</script><img src=x onerror="1"> & 'quoted'"""
PAPER = {"light": (255, 255, 255), "dark": (20, 20, 20)}
WIDTH = 390


class Reader(html.parser.HTMLParser):
    """Collects elements with their attributes, and the text within each."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def draw(folder: Path, name: str, *, label: str = "black") -> Path:
    """A figure with a blue bar, black lines, a clipped curve and a legend, as PNG and SVG."""
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar([0.5], [0.8], color="#0072B2")
    axes.plot([0, 1], [0, 2], "o-", color="black", linewidth=4, label=label)
    axes.set(ylim=(0, 1), xlabel=f'{label} <&> "url(#figure)"')
    axes.grid(alpha=0.3)
    axes.legend()
    panels.save(figure, folder / f"{name}.png")
    return folder / f"{name}.png"


@pytest.fixture
def workdir(tmp_path):
    """The folder of a run by one command."""
    command = {"command": "python -m experiments.find_lr '--a=<b>'", "resumed": False,
               "started": "2026-01-31T12:00:00+00:00", "machine": "a machine, 2 cores",
               "devices": ["1 × cpu"], "versions": {"jax": "1.2.3"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"text": HOSTILE, "none": None, "on": True}))
    (tmp_path / "commands.jsonl").write_text(json.dumps(command) + "\n")
    return tmp_path


def write_whole(workdir: Path) -> Path:
    """A page with everything that can go wrong: a wide and long table, figures with equal ids."""
    values = ["0.5 ± 0.1", "diverged", "1†0.25", "12 of 60", "1,000", "-3e-2", "–", *["7"] * 40]
    names = [HOSTILE, *(f"2_02_{number}" for number in range(len(values) - 1))]
    heading = ["network", "loss", *(f"a further column {number}" for number in range(6))]
    rows = [
        heading,
        *([name, value, *["1.0"] * 6] for name, value in zip(names, values, strict=True)),
    ]
    return page.write(
        workdir,
        f"A run {HOSTILE}",
        "What was asked?\n\nAnd more.",
        remarks=[HOSTILE],
        tables={f"A table {HOSTILE}": rows, "Without rows": [["nothing"]]},
        figures={draw(workdir, name): f"{name} {HOSTILE}" for name in ("first", "second")},
    )


# In a browser.


@pytest.fixture
def chromium() -> str:
    """The command of a headless browser; skips where there is none, but fails in CI."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        reason = "no chromium; `make chromium` installs it where apt-get and root are there"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


def probed(path: Path, script: str) -> Path:
    """The page with a script that measures it, which its policy is told to let run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = path.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    copy = path.with_name("probed.html")
    copy.write_text(text.replace("<title>", f"<script>{script}</script><title>", 1))
    return copy


SCREEN = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<body style="margin: 0"><iframe src="{name}" style="width: {width}px; height: 3000px; border: 0">
</iframe><script>
addEventListener("message", (event) => document.body.dataset.found = event.data);
</script>"""
"""A screen as wide as a phone's: windows of Chromium are 500 pixels wide at least."""


def browse(chromium: str, path: Path, folder: Path, *, dark: bool) -> tuple[str, str]:
    """Opens a page on the screen of a phone, long enough for all of it.

    Returns:
      The DOM, and errors; the picture is `page.png` in the folder.
    """
    screen = path.with_name(f"screen_{folder.name}.html")
    screen.write_text(SCREEN.format(name=path.name, width=WIDTH))
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", "--force-device-scale-factor=1", f"--user-data-dir={folder}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=500,3000",
        f"--screenshot={folder}.png", "--dump-dom", screen.as_uri(),
    ]  # fmt: skip
    done = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def check_page(found: dict) -> None:
    """Checks what the probe measured."""
    assert found["errors"] == [] and found["resources"] == [] and found["images"] == 0
    assert found["width"] == WIDTH and found["overflow"] == 0 and found["scrolls"]
    assert found["cell"] == HOSTILE
    assert found["headings"] == ["H1", "H2", "H2", "H2", "H2"]
    assert len(found["contrasts"]) > 100
    assert [one for one in found["contrasts"] if one[1] < 4.5] == []
    assert found["alignment"] == ["left", "right"]
    assert found["scrolled"] > 0 and abs(found["head"]) < 1  # the heading stays in sight

    names, losses = found["sorted"]
    original = losses[0][1]
    assert [state for state, _ in losses] == [None, "ascending", "descending", None]
    numbers = ["-3e-2", "1†0.25", "0.5 ± 0.1", *["7"] * 40, "12 of 60", "1,000"]
    assert losses[1][1] == [*numbers, "diverged", "–"]
    assert losses[2][1] == [*reversed(numbers), "diverged", "–"]
    assert losses[3][1] == original
    assert names[1][1][1:12] == [f"2_02_{number}" for number in range(11)]  # 10 after 9

    assert [figure["name"] for figure in found["figures"]] == [
        f"{n} {HOSTILE}" for n in ("first", "second")
    ]
    for figure in found["figures"]:
        assert 300 < figure["width"] <= WIDTH and figure["height"] > 100
        assert figure["marks"] > 10  # ticks and dots find what they are copies of
        assert figure["text"] > 7  # pixels


def check_colours(image: np.ndarray, found: dict, mode: str) -> None:
    """Checks the colours of the first figure: black and white follow the page, hues stay."""
    box = {name: round(found["figures"][0][name]) for name in ("x", "y", "width", "height")}
    rows, columns = (
        slice(box[at] + 1, box[at] + box[size] - 1)
        for at, size in (("y", "height"), ("x", "width"))
    )
    pixels = image[rows, columns, :3].reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    np.testing.assert_allclose(colours[counts.argmax()], PAPER[mode], atol=2)
    ink = colours[counts > 30].astype(int)
    grey = ink[np.ptp(ink, axis=1) < 8]
    strongest = grey.min() if mode == "light" else grey.max()
    assert (strongest < 30) if mode == "light" else (strongest > 220)
    red, green, blue = ink[np.ptp(ink, axis=1).argmax()]
    assert red < green < blue


def test_a_phone_shows_all_of_a_page_in_light_and_in_dark(chromium, workdir, tmp_path):
    path = probed(write_whole(workdir), Path(__file__).with_name("probe.js").read_text())
    with ThreadPoolExecutor() as both:
        opened = {
            mode: both.submit(browse, chromium, path, tmp_path / mode, dark=mode == "dark")
            for mode in PAPER
        }
    for mode, browser in opened.items():
        dom, errors = browser.result()
        written = [one["data-found"] for _, one in Reader(dom).elements if "data-found" in one]
        assert written, errors
        found = json.loads(written[0] or "")
        check_page(found)
        check_colours(255 * imread(tmp_path / f"{mode}.png"), found, mode)


# What the file holds.


def test_a_page_needs_nothing_else_and_its_texts_are_what_they_were(workdir):
    text = write_whole(workdir).read_text()
    assert not re.search(r"https?://|@import|<link|\ssrc=(?!x onerror)", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    reader = Reader(text)
    assert [tag for tag, _ in reader.elements if tag in ("script", "img", "iframe")] == ["script"]
    assert ("th", HOSTILE) in reader.texts and ("dd", HOSTILE) in reader.texts
    assert ("p", HOSTILE) in reader.texts and ("text", 'black <&> "url(#figure)"') in reader.texts
    assert ("span", "'--a=<b>'") in reader.texts
    assert {"not set", "yes", "1 × cpu", "jax 1.2.3"} <= {one for _, one in reader.texts}
    assert "Without rows" not in text

    ids = [one["id"] for _, one in reader.elements if "id" in one]
    assert len(ids) == len(set(ids)) > 20
    pointed = set()
    for _, attributes in reader.elements:
        pointed.update(re.findall(r"url\(#([^)]+)\)", " ".join(filter(None, attributes.values()))))
        pointed.add((attributes.get("href") or "").removeprefix("#"))
        pointed.add(attributes.get("aria-labelledby") or "")
    assert {"figure1", "figure2"} < pointed - {""} <= set(ids)


def test_figures_are_the_same_files_whenever_they_are_drawn(tmp_path):
    first, again = (draw(tmp_path / folder, "one").with_suffix(".svg") for folder in "ab")
    assert first.read_bytes() == again.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink" width="9pt" '
SVG += 'viewBox="0 0 9 9">{}</svg>'
BOMB = """<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>"""
DAMAGED = {
    "nothing": ("", "no element found"),
    "no size": ("<svg/>", "a width in points"),
    "another root": ('<p width="3pt" viewBox="0 0 9 9"/>', "a width in points"),
    "cut off": ("<svg width='3pt' viewBox='0 0 9 9'>", "no element found"),
    "no view box": ("<svg width='3pt'/>", "a viewBox of four numbers"),
    "an infinite width": ("<svg width='1e999pt' viewBox='0 0 9 9'/>", "a width in points"),
    "NUL": (SVG.format("<text>\0</text>"), "not well-formed"),
    "nested deeply": (SVG.format("<g>" * 100_000 + "</g>" * 100_000), "nested deeper than 100"),
    "entities": (BOMB + SVG.format("<text>&b;</text>"), "declares the entity 'a'"),
    "too large": (SVG.format(" " * 21 * 2**20), "exceeds 20 MiB"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_of_a_damaged_figure_the_page_says_so_and_holds_the_rest(workdir, case):
    content, problem = DAMAGED[case]
    (workdir / "bad.svg").write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.svg .*{problem}"):
        inline_svg(workdir / "bad.svg", "one", "one")
    figures = {draw(workdir, "good"): "A good one.", workdir / "bad.png": "A bad one."}
    started = time.monotonic()
    reader = Reader(page.write(workdir, "A run", None, figures=figures).read_text())
    assert time.monotonic() - started < 20  # linear in what there is
    assert [tag for tag, _ in reader.elements].count("svg") == 1
    assert ("figcaption", "A good one.") in reader.texts
    (told,) = [text for tag, text in reader.texts if "bad.svg cannot be shown" in text]
    assert problem in told


def test_of_a_figure_only_what_draws_reaches_the_page(workdir):
    hostile = """
      <script>alert(1)</script><style>body {{ display: none }}</style><metadata>a</metadata>
      <foreignObject><iframe src="javascript:alert(1)"/><meta http-equiv="refresh"/></foreignObject>
      <a x:href="javascript:alert(1)"><text>link</text></a>
      <image x:href="https://example.org/a.png"/><animate attributeName="href" to="javascript:1"/>
      <text onclick="alert(1)" class="a" style="background: url(https://example.org); fill: red;
        position: fixed; stroke: url(#p); opacity: expression(url)"
        >&lt;img src=x onerror=1&gt;</text>
      <path d="M 1.23456 2" fill="url(javascript:alert(1))" stroke="url(#q)" ONLOAD="alert(1)"/>
      <use x:href="data:text/html,1"/><use x:href="#later"/>
      <defs><path id="mark" d="M 0 0"/><use x:href="#mark"/></defs><use x:href="#mark" x="1.999"/>
    """
    (workdir / "bad.svg").write_text(SVG.format(hostile))
    found = Reader(inline_svg(workdir / "bad.svg", "one", "label"))
    assert [tag for tag, _ in found.elements] == ["svg", "text", "path", "defs", "path", "use"]
    _, text, path, _, mark, use = (attributes for _, attributes in found.elements)
    assert text == {"style": "fill: red; stroke: url(#one-p)"}
    assert found.texts == [("text", "<img src=x onerror=1>")]
    assert path == {"d": "M 1.23 2", "stroke": "url(#one-q)"}
    assert mark == {"id": "one-mark", "d": "M 0 0"}
    assert use == {"href": "#one-mark", "x": "2"}


HOSTILE_COMMANDS = {
    "markup": {"started": HOSTILE, "machine": HOSTILE, "devices": [HOSTILE],
               "versions": {HOSTILE: HOSTILE}, "command": f"python '{HOSTILE}"},
    "types": {"started": 3, "machine": None, "devices": [1], "versions": {"a": []}, "resumed": 1},
    "nothing": {},
    "devices that are a number": {"devices": 3},
    "versions that are a text": {"versions": "1.0"},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_COMMANDS)
def test_every_field_of_a_command_is_escaped(workdir, case):
    (workdir / "commands.jsonl").write_text(json.dumps(HOSTILE_COMMANDS[case]) + "\n")
    reader = Reader(page.write(workdir, "A run", None).read_text())
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"img", "iframe", "a", "form"}
    scripts = [attributes for tag, attributes in reader.elements if tag == "script"]
    assert scripts == [{}]
    assert [one for _, one in reader.elements if any(name.startswith("on") for name in one)] == []
    if case == "markup":
        assert ("dd", HOSTILE) in reader.texts
    if case.startswith(("devices", "versions")):
        assert any("made this run cannot be read" in text for _, text in reader.texts)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "{", "\udcff"])
def test_settings_that_cannot_be_read_leave_the_rest(workdir, content):
    (workdir / "config.json").write_text(content, errors="surrogateescape")
    reader = Reader(page.write(workdir, "A run", None, remarks=["It ran."]).read_text())
    assert any("config.json, cannot be read" in text for _, text in reader.texts)
    assert ("p", "It ran.") in reader.texts


@pytest.mark.parametrize("cell", ["7" * 200_000, "-" * 200_000, "7," * 100_000, "a" * 200_000])
def test_a_huge_cell_is_cut_quickly(workdir, cell):
    started = time.monotonic()
    rows = [["network", "loss"], ["one", cell], ["two", "3"]]
    text = page.write(workdir, "A run", None, tables={"T": rows}).read_text()
    assert time.monotonic() - started < 10
    assert "… (the first 4000 of 200000 characters)" in text
    assert len(text) < 50_000


def test_control_characters_are_replaced(workdir):
    text = page.write(workdir, "A\0run\x1b\udcff", None).read_text()
    assert "<h1>A�run" in text and "\0" not in text


def test_a_page_that_cannot_be_written_leaves_the_old_one(workdir):
    old = page.write(workdir, "Old", None).read_bytes()
    before = sorted(workdir.iterdir())
    with pytest.raises(ValueError, match="table 'T' has 2 columns, and a row of 1"):
        page.write(workdir, "New", None, tables={"T": [["a", "b"], ["1"]]})
    assert (workdir / "report.html").read_bytes() == old
    assert sorted(workdir.iterdir()) == before


def test_a_page_tells_a_resumed_run_from_one_of_one_command(workdir):
    def story() -> str:
        texts = Reader(page.write(workdir, "A run", None).read_text()).texts
        return next(text for _, text in texts if "This page was written" in text)

    assert story().startswith("One command made this run from start to end.")
    journal = workdir / "commands.jsonl"
    first = journal.read_text()
    again = first.replace("false", "true")
    journal.write_text(first + again)
    assert "was resumed: 2 commands" in story() and "not recorded" not in story()
    journal.write_text(again)  # the run is older than this journal of commands
    assert "was resumed: what began it was not recorded, 1 command" in story()
    journal.unlink()
    assert story().startswith("Which commands made this run was not recorded.")
