"""Executes notebooks of this folder in fresh kernels and stores their outputs in them.

python notebooks/execute.py            # all of them, at the setting that they hold
python notebooks/execute.py grow_a_network
"""

import argparse
import functools
import pathlib

import nbformat
from nbclient import NotebookClient

from experiments.lab.files import write_atomically

FOLDER = pathlib.Path(__file__).resolve().parent
LANGUAGE = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: pathlib.Path) -> None:
    """Executes one notebook; it is left as it was where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
        timeout=3600,
    )
    client.execute()
    # What tells of the machine and not of the story, such as the version of Python.
    notebook.metadata = nbformat.from_dict(LANGUAGE)
    for cell in notebook.cells:
        cell.metadata.clear()
    write_atomically(path, functools.partial(nbformat.write, notebook))


def main() -> None:
    """Executes what the command line names."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or list(known)
    for name in names:
        if name not in known:
            parser.error(f"no notebook {name!r}; accepted are {', '.join(known)}")
    for name in names:
        print(name, flush=True)
        execute(known[name])


if __name__ == "__main__":
    main()
