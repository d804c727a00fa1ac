"""Published accuracies of NAS-Bench-201 cells: CSV tables, and the files of NATS-Bench.

Nothing is unpickled here. The package `nats_bench` unpickles the files of NATS-Bench itself, and
a pickle can run any program: open only files that you trust as you trust a program.
"""

import collections
import csv
import gzip
import importlib
import io
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from archscale_jax._extras import needed_by
from archscale_jax._spaces.cell import cell_digits, code_of_digits, string_of_digits

_CELL_COLUMN = "arch"
_GZIP_MAGIC = b"\x1f\x8b"

# What NATS-Bench evaluated the networks of each training set on. Those of `cifar10-valid` were
# trained on half of CIFAR-10's training set, those of `cifar10` on all of it.
_SPLITS = {
    "cifar10-valid": ("train", "valid", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "valid", "test", "valtest"),
    "ImageNet16-120": ("train", "valid", "test", "valtest"),
}
_EPOCHS = (12, 200)


class BenchmarkTable(NamedTuple):
    """Accuracies of cells.

    Attributes:
      cells: One cell a row, in the notation it was read in; all are different. Cells without a path
        from input to output are among them, since the benchmark trained them too.
      accuracies: Column name -> float64 `[num_cells]`, percent.
    """

    cells: tuple[str, ...]
    accuracies: dict[str, np.ndarray]


def read_table(path: str | os.PathLike[str]) -> BenchmarkTable:
    """Reads a table of accuracies from a CSV file, plain or compressed with gzip.

    The first line names the columns: `arch`, the cell in either notation, and at least one column
    of accuracies in percent. Every further line is one cell.

    Args:
      path: The file.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is empty or no CSV, or a line is malformed: its number of fields, a cell
        that does not parse or that an earlier line has, in whichever notation, or an accuracy that
        is not a number between 0 and 100. The message names the file and the line.
    """
    path = pathlib.Path(path)
    lines = _numbered_lines(path)
    columns = _checked_header(path, next(lines, None))
    cells: list[str] = []
    values: list[list[float]] = []
    first_line: dict[str, int] = {}  # code of the cell -> where it was found
    for number, fields in lines:
        where = f"{path} line {number}"
        if len(fields) != len(columns):
            raise ValueError(f"{where} has {len(fields)} fields; accepted are {len(columns)}")
        named = dict(zip(columns, fields, strict=True))
        cell = named.pop(_CELL_COLUMN)
        try:
            code = code_of_digits(cell_digits(cell))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        earlier = first_line.setdefault(code, number)
        if earlier != number:
            raise ValueError(f"{where} has the cell {cell} of line {earlier}; accepted is one each")
        cells.append(cell)
        values.append([_percent(text, f"{where}: {name}") for name, text in named.items()])
    if not cells:
        raise ValueError(f"{path} has no cells; accepted is at least one line after the header")
    names = [name for name in columns if name != _CELL_COLUMN]
    return BenchmarkTable(tuple(cells), dict(zip(names, np.array(values).T.copy(), strict=True)))


def _numbered_lines(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its last line."""
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC) or path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num} is not CSV: {error}") from None
        yield reader.line_num, fields


def _checked_header(path: pathlib.Path, header: tuple[int, list[str]] | None) -> list[str]:
    if header is None:
        raise ValueError(f"{path} is empty; accepted is a header with {_CELL_COLUMN!r}, and cells")
    number, columns = header
    where = f"{path} line {number}"
    shown = ", ".join(columns)[:200]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{where} repeats the column {repeated[0]!r}; accepted are unique names")
    if _CELL_COLUMN not in columns:
        raise ValueError(f"{where} has no column {_CELL_COLUMN!r}, found {shown}")
    if len(columns) < 2:
        raise ValueError(f"{where} has no column of accuracies, found {shown}")
    return columns


def _percent(value: str | float, what: str) -> float:
    try:
        number = math.nan if "_" in str(value) else float(value)  # float reads 9_0 as 90
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise ValueError(f"{what} is {str(value)[:60]!r}; accepted are numbers from 0 to 100")
    return number


def read_nats_bench(
    source: Any,
    *,
    dataset: str,
    split: str,
    epochs: int = 200,
    seed: int | None = None,
    cells: Sequence[str] | None = None,
) -> BenchmarkTable:
    """Reads accuracies from NATS-Bench's topology search space, which is that of NAS-Bench-201.

    The API's own defaults are the run of 12 epochs and a seed drawn at random on every call. Here
    it is 200 epochs and the mean over all seeds, unless `epochs` or `seed` say otherwise.

    Args:
      source: The folder `NATS-tss-…-simple`, of which each cell's file is read when its turn comes;
        or the one file `NATS-tss-….pickle.pbz2`, which is read whole; or what `nats_bench.create`
        returned. Files are unpickled by `nats_bench`: they must be trusted.
      dataset: `cifar10-valid` (trained on half of CIFAR-10's training set), `cifar10` (trained on
        all of it), `cifar100` or `ImageNet16-120`.
      split: What the accuracy was measured on: `train`, `valid`, `test` or `valtest`, the last two
        parts together. `cifar10` has no `valid`: its training has used those images. `valtest` is
        for `cifar100` and `ImageNet16-120` alone.
      epochs: Length of the training run, 12 or 200. The shorter run has a schedule of its own.
      seed: Seed of the one trial to be read. Not every cell was trained with every seed.
      cells: The cells to be read, in either notation; None for all, in the benchmark's order.

    Returns:
      The cells as asked for, or else in the benchmark's notation, and one column, named
      `dataset split`.

    Raises:
      ImportError: `source` is a path and `nats_bench` is not installed.
      FileNotFoundError: `source` is a path where nothing is.
      ValueError: An argument that is not accepted, or a cell without such a result.
    """
    _check_request(dataset, split, epochs, seed)
    api = _opened(source) if isinstance(source, str | os.PathLike) else source
    if getattr(api, "search_space_name", None) != "topology":
        raise ValueError(
            f"source is {api!r}; accepted are a path and the API of the topology search space"
        )
    if cells is None:
        cells = [api[index] for index in range(len(api))]
    codes = collections.Counter(code_of_digits(cell_digits(cell)) for cell in cells)
    if repeated := [code for code, count in codes.items() if count > 1]:
        raise ValueError(f"cells has {repeated[0]} twice; accepted is one each")
    accuracies = [_accuracy(api, cell, dataset, split, epochs, seed) for cell in cells]
    return BenchmarkTable(tuple(cells), {f"{dataset} {split}": np.array(accuracies, np.float64)})


def _check_request(dataset: str, split: str, epochs: int, seed: int | None) -> None:
    if dataset not in _SPLITS:
        raise ValueError(f"dataset is {dataset!r}; accepted are {', '.join(_SPLITS)}")
    if split not in _SPLITS[dataset]:
        hint = "; for valid accuracies ask for cifar10-valid" if dataset == "cifar10" else ""
        raise ValueError(
            f"split is {split!r}; accepted for {dataset} are {', '.join(_SPLITS[dataset])}{hint}"
        )
    if epochs not in _EPOCHS:
        raise ValueError(f"epochs is {epochs!r}; accepted are {' and '.join(map(str, _EPOCHS))}")
    # The API takes True for "any seed".
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed is {seed!r}; accepted are an int, and None for the mean")


def _opened(source: str | os.PathLike[str]) -> Any:
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    with needed_by("experiments.nasbench.benchmark_tables.read_nats_bench", "nats"):
        nats_bench = importlib.import_module("nats_bench")
    return nats_bench.create(str(path), "topology", fast_mode=path.is_dir(), verbose=False)


def _accuracy(
    api: Any, cell: str, dataset: str, split: str, epochs: int, seed: int | None
) -> float:
    index = api.query_index_by_arch(string_of_digits(cell_digits(cell)))
    if index < 0:
        raise ValueError(f"the cell {cell} is not in {api}")
    was_loaded = index in api.arch2infos_dict
    what = f"cell {cell}: accuracy on {dataset} {split} after {epochs} epochs"
    what += "" if seed is None else f" with seed {seed}"
    try:
        found = api.get_more_info(
            index, dataset, hp=str(epochs), is_random=False if seed is None else seed
        )
        accuracy = found[f"{split}-accuracy"]
    # No such file, run, seed or split, or a damaged file.
    except (AssertionError, EOFError, LookupError, OSError, ValueError) as error:
        raise ValueError(f"{what} is not there: {type(error).__name__}: {error}") from error
    finally:
        # In its fast mode the API keeps what it has read, 2 MB a cell and gigabytes for them all.
        if api.fast_mode and not was_loaded:
            api.arch2infos_dict.pop(index, None)
    return _percent(accuracy, what)
