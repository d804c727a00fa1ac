"""The imports of the code are those that docs/architecture.md draws."""

import ast
import functools
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LIBRARY = "archscale_jax"
EVERYWHERE = {"jax", "jaxtyping", "jraph", "numpy"}


def table(*head):
    """The rows below a heading of these columns."""
    lines = PAGE.split("| " + " | ".join(head) + " |\n")[1].splitlines()[1:]
    rows = lines[: [line.startswith("|") for line in [*lines, ""]].index(False)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names(cell):
    return set(re.findall(r"\w+", cell))


@functools.cache
def imports(folder):
    """What every module of a folder imports, anywhere in it: modules, or names in them.

    Of tests, imports outside of functions are read: parsing them whole would take most of the time.
    """
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[module] = set()
        text = path.read_text()
        if folder == "tests":
            text = "\n".join(re.findall(r"^(?:from [\w.]+ )?import (?:\([^)]*\)|.*)", text, re.M))
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: {node.module} is imported relative to the module"
                found[module] |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert found
    return found


def room(name):
    return name.split(".")[1]


def rooms():
    """The rooms of the library and what they import."""
    found = {}
    for module, imported in imports(LIBRARY).items():
        if room(module) != "__init__":
            found.setdefault(room(module), set()).update(imported)
    return found


def known(imported):
    return {room(name) for name in imported if name.startswith(f"{LIBRARY}.")}


def modules_known(folder):
    """The modules of a folder that each of its modules imports; a package is not its modules."""
    found = imports(folder)

    def module(name):
        return next((one for one in (name, name.rpartition(".")[0]) if one in found), None)

    return {one: {module(name) for name in imported} - {None} for one, imported in found.items()}


FLOORS = {name.strip("`"): (int(floor), names(knows))
          for floor, name, knows, _ in table("floor", "room", "knows", "job")}  # fmt: skip
FOLDERS = {name.strip("`"): names(allowed)
           for name, allowed, _ in table("folder", "imports", "job")}  # fmt: skip


def test_every_room_has_one_row():
    written = [row[1].strip("`") for row in table("floor", "room", "knows", "job")]
    assert sorted(written) == sorted(rooms())


def test_rooms_know_what_the_table_says_and_nothing_above():
    for name, (floor, knows) in FLOORS.items():
        found = known(rooms()[name]) - {name}
        assert found == knows, f"{name} knows {sorted(found)}"
        above = {one for one in found if FLOORS[one][0] >= floor}
        assert not above, f"{name} on floor {floor} knows {above} on its own or above"


def test_the_door_is_not_a_way_between_rooms():
    for module, imported in imports(LIBRARY).items():
        through = {name for name in imported if name == LIBRARY}
        through |= {name for name in imported if name.startswith(f"{LIBRARY}.")
                    and room(name) not in rooms()}  # fmt: skip
        assert not through, f"{module} imports {through}; import from the room that defines it"


@pytest.mark.parametrize("folder", [LIBRARY, "experiments", "benchmarks", "tests"])
def test_modules_import_each_other_in_one_direction(folder):
    graphlib.TopologicalSorter(modules_known(folder)).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_the_library_and_not_the_other_way(folder):
    for module, imported in imports(folder).items():
        others = {name.split(".")[0] for name in imported} & {LIBRARY, *FOLDERS} - {folder}
        assert others <= FOLDERS[folder], f"{module} imports {others}"
    assert not any(name.split(".")[0] == folder for one in rooms().values() for name in one)


def test_no_module_imports_a_binary():
    everyone = {one: imported for folder in ("experiments", "benchmarks", "tests")
                for one, imported in imports(folder).items()}  # fmt: skip
    texts = {one: (ROOT / f"{one.replace('.', '/')}.py").read_text() for one in everyone}
    binaries = {one for one, text in texts.items()
                if "\nif __name__ ==" in text and "flags.DEFINE" in text}  # fmt: skip
    assert {"experiments.train", "experiments.transfer"} <= binaries
    found = {(one, name) for one, imported in everyone.items() for name in imported & binaries}
    assert found == {("experiments.plan", "experiments.transfer")}


def test_packages_from_elsewhere_are_where_the_table_says():
    found = {}
    for name, imported in rooms().items():
        for package in {one.split(".")[0] for one in imported}:
            found.setdefault(package, set()).add(name)
    elsewhere = found.keys() - sys.stdlib_module_names - EVERYWHERE - {LIBRARY}
    written = {package.strip("`"): names(held) for package, held in table("package", "rooms")}
    assert written == {package: found[package] for package in elsewhere}


def test_only_tracing_reads_jaxprs():
    private = ("jax._src", "jax.extend", "jax.core", "jax.interpreters")
    found = {name: {one for one in imported if one.startswith(private)} - {"jax.core.Tracer"}
             for name, imported in rooms().items()}  # fmt: skip
    assert [name for name, imported in found.items() if imported] == ["tracing"]
    for path in (ROOT / LIBRARY).rglob("*.py"):
        if path.parent.name != "tracing":
            used = re.search(
                r"\bjax\.(_src|extend|core|interpreters)\.|make_jaxpr", path.read_text()
            )
            assert not used, f"{path.name} uses {used[0]}"


def test_the_page_names_files_that_exist():
    _, _, places = PAGE.partition("| to change | go to |")
    for cell in re.findall(r"`([\w/]+(?:\.py|/))`", places):
        assert any((ROOT / folder / cell).exists() for folder in (LIBRARY, "")), cell
