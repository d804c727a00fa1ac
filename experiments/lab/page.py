"""A run as one HTML page: tables, figures, settings, and what made it. Nothing else is loaded.

What the page shows is escaped by its template, figures are cleaned (`inline_svg`). Of what cannot
be shown, a damaged figure or journal, the page says so in a sentence and holds the rest.
"""

import base64
import hashlib
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

import archscale_jax as archscale
from experiments.lab import files, provenance
from experiments.lab.inline_svg import inline_svg
from experiments.lab.tables import Table, lines_of, markdown

NAME = "report.html"
MAX_TEXT = 4000
"""Characters of a text that are shown."""

_HERE = pathlib.Path(__file__).parent
_NUMBER = re.compile(
    r"(?:\d{1,9}†)?([+−-]?(?:\d[\d,]{0,30}\.?\d{0,30}|\.\d{1,30})(?:e[+-]?\d{1,4})?)(?![\w.])"
)
_NO_NUMBER = re.compile(r"–.*|none|diverged", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def write(
    workdir: pathlib.Path,
    title: str,
    about: str | None,
    *,
    remarks: Sequence[str] = (),
    tables: Mapping[str, Table] | None = None,
    figures: Mapping[pathlib.Path, str] | None = None,
) -> pathlib.Path:
    """Writes `report.html` in the folder of a run, atomically.

    Settings are those of the folder's `config.json`, commands those of `provenance`.

    Args:
      workdir: the folder.
      title: of the page.
      about: docstring of the binary, whose first paragraph says what was asked; or None.
      remarks: sentences above the tables, such as the answer.
      tables: by the caption; one without rows is omitted.
      figures: what each shows, by the path of its PNG; the page takes the SVG beside it.

    Returns:
      The path of the page.

    Raises:
      ValueError: a row of another length than the heading, by the table's caption.
      OSError: the page cannot be written.
    """
    drawn = [
        _figure(path.with_suffix(".svg"), caption, f"figure{number}")
        for number, (path, caption) in enumerate((figures or {}).items(), start=1)
    ]
    shown = [_table(caption, one) for caption, one in (tables or {}).items()]
    story, commands = _origin(workdir)
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html").render(
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        title=title,
        question=(about or "").strip().partition("\n\n")[0],
        remarks=remarks,
        tables=[table for table in shown if table["rows"]],
        figures=drawn,
        settings=_settings(workdir / "config.json"),
        story=story,
        commands=commands,
        version=archscale.__version__,
    )
    path = workdir / NAME
    files.write_text(path, text + "\n")
    return path


def publish(
    workdir: pathlib.Path,
    title: str,
    about: str | None,
    *,
    remarks: Sequence[str] = (),
    tables: Mapping[str, Table],
    figures: Mapping[pathlib.Path, str],
) -> None:
    """Ends a study: prints remarks, tables and files, and writes them as table.md and `write` does.

    Arguments and errors are those of `write`.
    """
    filled = {caption: one for caption, one in tables.items() if len(lines_of(one)) > 1}
    text = "\n".join(f"{caption}\n\n{markdown(one)}" for caption, one in filled.items())
    files.write_text(workdir / "table.md", text)
    report = write(workdir, title, about, remarks=remarks, tables=filled, figures=figures)
    print(*remarks, *[""] * bool(remarks), text, sep="\n", end="\n\n")
    for path in figures:
        print(f"figure:  {path}")
    print(f"report:  {report}\nresults: {workdir / 'results.jsonl'}")


def _shown(value: Any) -> Any:
    """A text without control characters, cut where it is too long; markup as it is."""
    if isinstance(value, markupsafe.Markup):
        return value
    text = value if isinstance(value, str) else str(value)
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}… (the first {MAX_TEXT} of {len(text)} characters)"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _table(caption: str, table: Table) -> dict[str, Any]:
    """A table whose first column names its rows; columns of numbers say by what they sort."""
    heading, *lines = lines_of(table, caption)
    columns = [
        {"name": name, "numeric": _are_numbers([line[index] for line in lines])}
        for index, name in enumerate(heading)
    ]
    rows = [
        [
            {"text": text, "value": _number(text) if column["numeric"] else None}
            for text, column in zip(line, columns, strict=True)
        ]
        for line in lines
    ]
    return {"caption": caption, "columns": columns, "rows": rows}


def _are_numbers(texts: Sequence[str]) -> bool:
    """Whether all texts begin with a number, or stand where there is none."""
    there = [text for text in texts if text]
    return bool(there) and all(_NUMBER.match(text) or _NO_NUMBER.fullmatch(text) for text in there)


def _number(text: str) -> str | None:
    """The number with which a text begins: 0.67 of `1†0.67`, 12.5 of `12.5 ± 0.1`."""
    found = _NUMBER.match(text)
    return f"{float(found[1].replace(',', '').replace('−', '-')):.17g}" if found else None


def _figure(path: pathlib.Path, caption: str, name: str) -> dict[str, Any]:
    try:
        svg, problem = markupsafe.Markup(inline_svg(path, name, name)), ""
    except (ValueError, OSError) as error:
        svg, problem = "", f"The figure {path.name} cannot be shown: {error}."
    return {"id": name, "caption": caption, "svg": svg, "problem": problem}


def _settings(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        entries = [(name, _value(value)) for name, value in sorted(config.items())]
    except (ValueError, OSError, RecursionError, AttributeError) as error:
        return {"entries": [], "problem": f"The settings, {path.name}, cannot be read: {error}."}
    return {"entries": entries, "problem": ""}


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _origin(workdir: pathlib.Path) -> tuple[str, list[dict[str, Any]]]:
    """What the page says of the commands, oldest first, and of this moment."""
    try:
        recorded = provenance.read_commands(workdir)
        commands = [_command(command) for command in recorded]
    except (ValueError, OSError, RecursionError, AttributeError, TypeError) as error:
        recorded, commands = [], []
        story = f"Which commands made this run cannot be read: {error}."
    else:
        story = _story([bool(command.get("resumed")) for command in recorded])
    return f"{story} This page was written on {_time(provenance.now())}.", commands


def _story(resumed: Sequence[bool]) -> str:
    number = "1 command" if len(resumed) == 1 else f"{len(resumed)} commands"
    if not resumed:
        return "Which commands made this run was not recorded."
    if not resumed[0] and len(resumed) == 1:
        return "One command made this run from start to end."
    begun = "what began it was not recorded, " if resumed[0] else ""
    return (
        f"This run was resumed: {begun}{number} went on with it, and what was finished was kept. "
        "Tables and figures show the results of all."
    )


def _command(command: Mapping[str, Any]) -> dict[str, Any]:
    typed = str(command.get("command", ""))
    try:
        words = [shlex.quote(word) for word in shlex.split(typed)]
    except ValueError:  # quotes that do not end
        words = [typed]
    found = {
        "command": words,
        "started": _time(str(command.get("started", ""))),
        "machine": str(command.get("machine", "")),
        "devices": ", ".join(map(str, command.get("devices", ()))),
        "versions": ", ".join(f"{name} {one}" for name, one in command.get("versions", {}).items()),
    }
    return {name: meaning for name, meaning in found.items() if meaning}


def _time(moment: str) -> str:
    """`2026-01-31 12:00:00 UTC`."""
    return moment.replace("T", " ").replace("+00:00", " UTC")
