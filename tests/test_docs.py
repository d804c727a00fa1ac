"""What the pages promise of the code, and the code of the pages. `make docs` checks their links."""

import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re

import markdown
import pytest
import yaml

import archscale_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in DOCS.rglob("*.md")}
THEORY = PAGES["equations.md"]


def documented():
    """The objects of the directives of the reference; of a module all that is public."""
    directive = re.compile(r"^::: (\S+)\n(?: +(?!members)\w+:.*\n)*(?: +members: \[(.*)\])?", re.M)
    for dotted, members in directive.findall("".join(PAGES.values())):
        try:
            one = importlib.import_module(dotted)
        except ModuleNotFoundError:
            module, _, name = dotted.rpartition(".")
            yield getattr(importlib.import_module(module), name)
            continue
        for name in members.split(", ") if members else one.__all__:
            yield getattr(one, name)


def test_every_public_name_has_its_place_in_the_reference():
    found = {id(one) for one in documented()}
    modules = [archscale_jax] + [
        importlib.import_module(f"archscale_jax.{module.name}")
        for module in pkgutil.iter_modules(archscale_jax.__path__)
    ]
    assert not [
        f"{module.__name__}.{name}"
        for module in modules
        for name in getattr(module, "__all__", ())
        if not inspect.ismodule(getattr(module, name)) and id(getattr(module, name)) not in found
    ]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [leaf for part in parts for leaf in leaves(part)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted([*PAGES, *notebooks, "contributing.md"])


def cited(text):
    """Sources, equations and sections that a text cites, as `AAS`, `AAS Eq. 8` and `§4`."""
    for tag in re.findall(r"\[((?:AAS|ED|Jelassi|GradInit|GradMax|TINY|μP)\b[^]]*)\]", text):
        for part in tag.split(";"):
            source = re.findall(r"\w+", part)[0]
            if source == "theory":
                continue  # see below
            yield source
            for kind, numbers in re.findall(r"(Eq\.|Alg\.|§) ?([0-9.]+(?:, [0-9]+)*)", part):
                yield from (f"{source} {kind} {number}" for number in numbers.split(", "))
    yield from (f"§{number}" for number in re.findall(r"theory §(\d+)", text))


@pytest.mark.parametrize("folder", ["archscale_jax", "experiments", "docs"])
def test_what_is_cited_stands_in_the_theory(folder):
    known = {*cited(THEORY), *(f"§{number}" for number in re.findall(r"^## (\d+)\.", THEORY, re.M))}
    files = [path for suffix in ("py", "md") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    wrong = {str(path): set(cited(path.read_text())) - known for path in files}
    assert files
    assert not {path: tags for path, tags in wrong.items() if tags}


def flags(source):
    """The flags of a binary, and of what it imports of its folder."""
    text = source.read_text()
    imported = re.findall(r"^from (experiments[\w.]*) import (\([^)]*\)|.*)", text, re.MULTILINE)
    names = {
        f"{package}.{name}" for package, found in imported for name in re.findall(r"\w+", found)
    } | {package for package, _ in imported}
    paths = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    below = [path for path in paths if path.exists()]
    return set(
        re.findall(r"(?:DEFINE\w*|Flag|ranges\.define\w*)\((?:[\w.]+\(\), )*\s*\"(\w+)\"", text)
    ).union(*map(flags, below))


def test_commands_name_binaries_and_flags_that_exist():
    command = re.compile(r"python -m (experiments|benchmarks)\.([\w.]+)((?:\s+\\?\s*--[^\s`]+)*)")
    texts = {"README.md": (ROOT / "README.md").read_text(), **PAGES}
    for page, text in texts.items():
        for package, name, given in command.findall(text):
            path = ROOT / package / name.replace(".", "/")
            source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert source.exists(), f"{page}: {package}.{name}"
            unknown = set(re.findall(r"--(\w+)", given)) - flags(source) - {"help"}
            assert not unknown, f"{page}: {name} has no flag {unknown}"


def test_what_the_readme_says_is_tested_has_that_test():
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"\[(test_\w+)\]\(([^)]+)\)", readme)
    assert len(named) == 8
    for name, path in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_landing_page_citation_and_changelog_name_the_version():
    version = archscale_jax.__version__
    assert f"Version {version}," in PAGES["index.md"]
    newest = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    if ".dev" in version:  # the citation is of the last release
        assert newest == f"{version.partition('.dev')[0]} (unreleased)"
        return
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert newest == f"{version} ({citation['date-released'].isoformat()})"


def test_all_of_a_picture_in_the_output_of_a_notebook_reaches_the_site():
    spec = importlib.util.spec_from_file_location("outside", DOCS / "outside.py")
    assert spec and spec.loader
    outside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outside)
    name = "notebooks/audit_a_training"
    page = outside._notebook_page(f"{name}.ipynb")[f"{name}.md"].decode()
    shown = markdown.markdown(page, extensions=["pymdownx.superfences"])
    for tag in ("circle", "path", "text"):
        drawn = (ROOT / f"{name}.ipynb").read_text().count(f"<{tag} ")
        assert shown.count(f"<{tag} ") == drawn > 0


@pytest.mark.parametrize("words", ["weight decay", "scan", "tied embeddings", "batch norm"])
def test_what_is_searched_for_stands_in_a_heading(words):
    headings = re.findall(r"^##+ (.*)", "\n".join(PAGES.values()), re.M)
    assert any(words in heading.lower() for heading in headings)
