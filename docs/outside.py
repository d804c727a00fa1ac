"""Brings to the site what pages link to outside of docs/, and mends these links.

On a code host `../CONTRIBUTING.md` leads to the file. On the site CONTRIBUTING.md and notebooks are
pages, README.md is the home page, and any other file lies at its path in the repository. Equations
between dollars become MathML, which browsers typeset without a script.
"""

import base64
import html
import json
import pathlib
import posixpath
import re

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTRIBUTING, README = "CONTRIBUTING.md", "README.md"

_LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")

_EQUATION = re.compile(
    r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</\w+>)', re.DOTALL
)


def on_files(files, config):
    sources = [CONTRIBUTING, *_paths("docs/**/*.md")]
    linked = {
        _path(source, link["path"])
        for source in sources
        for link in _LINK.finditer((ROOT / source).read_text())
    }
    notebooks = set(_paths("notebooks/*.ipynb"))
    whole = {path for path in linked if not path.startswith("docs/")} | {CONTRIBUTING}
    contents = {
        _place(path): (ROOT / path).read_bytes()
        for path in sorted(whole - notebooks - {README})
        if (ROOT / path).is_file()
    }
    for path in sorted(notebooks):
        contents |= _notebook_page(path)
    for place, content in contents.items():
        included = InclusionLevel.INCLUDED
        files.append(File.generated(config, place, content=content, inclusion=included))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    outside = {_place(path): path for path in (CONTRIBUTING, *_paths("notebooks/*.ipynb"))}
    source = outside.get(here, f"docs/{here}")

    def mended(link: re.Match) -> str:
        place = _place(_path(source, link["path"]))
        if files.get_file_from_path(place) is None:
            return link[0]  # a link to nothing, of which MkDocs warns
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"]({relative}{link['anchor'] or ''})"

    return _LINK.sub(mended, markdown)


def on_page_content(content, page, config, files):
    def typeset(equation: re.Match) -> str:
        before, bracket, text, after = equation.groups()
        display = "block" if bracket == "[" else "inline"
        mathml = latex2mathml.converter.convert(html.unescape(text), display=display)
        if "\\" in mathml or "<mi>&</mi>" in mathml:
            raise PluginError(f"{page.file.src_uri}: latex2mathml does not know all of {text}")
        return before + mathml + after

    return _EQUATION.sub(typeset, content)


def _paths(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def _path(source: str, link: str) -> str:
    """Where a link of a file leads, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    pages = {CONTRIBUTING: "contributing.md", README: "index.md"}
    return pages.get(path, path.removeprefix("docs/"))


def _notebook_page(path: str) -> dict[str, bytes]:
    """A notebook as a page, with the pictures that it shows, by their places on the site."""
    page, pictures = _place(path), {}
    parts = ["---\nhide: [toc]\n---"]  # outputs are wide
    for cell in json.loads((ROOT / path).read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        for output in cell.get("outputs", ()):
            shown = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
            if "image/png" in shown:
                picture = f"{page.removesuffix('.md')}_{len(pictures)}.png"
                pictures[picture] = base64.b64decode(shown["image/png"])
                parts.append(f"![what the cell draws]({posixpath.basename(picture)})")
            elif "text/html" in shown:
                # Markdown drops tags of SVG that close themselves.
                whole = re.sub(r"<(\w+)([^<>]*)/>", r"<\1\2></\1>", shown["text/html"])
                parts.append(re.sub(r"\n\s*", "\n", f"<div>{whole}</div>"))
            else:
                parts.append(_fenced(shown.get("text/plain", "".join(output.get("text", ())))))
    return {page: "\n\n".join(parts).encode(), **pictures}


def _fenced(text: str, language: str = "") -> str:
    return f"````{language}\n{text.rstrip()}\n````"
