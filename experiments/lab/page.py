"""A run as one HTML page: tables, figures, settings, and what made it. Nothing else is loaded."""

import base64
import hashlib
import html
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import archscale_jax as archscale
from experiments.lab import files, provenance
from experiments.lab.inline_svg import inline_svg

NAME = "report.html"

Rows = Sequence[Sequence[str]]

_HERE = pathlib.Path(__file__).parent
_NUMBER = re.compile(r"(?:\d+†)?([+−-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?![\w.])")
_NO_NUMBER = re.compile(r"–.*|none|lost|diverged")


def write(
    workdir: pathlib.Path,
    title: str,
    about: str | None,
    *,
    remarks: Sequence[str] = (),
    tables: Mapping[str, Rows] | None = None,
    figures: Mapping[pathlib.Path, str] | None = None,
) -> pathlib.Path:
    """Writes `report.html` in the folder of a run, atomically.

    Settings are those of the folder's `config.json`, commands those of `provenance`.

    Args:
      workdir: the folder.
      title: of the page.
      about: docstring of the binary, whose first paragraph says what was asked; or None.
      remarks: sentences above the tables, such as the answer.
      tables: texts by the caption of the table, the heading first; one without rows is left out.
      figures: what each shows, by the path of its PNG; the page takes the SVG beside it.

    Returns:
      The path of the page.

    Raises:
      ValueError: a row of another length than the heading, by the table's caption.
      OSError: a figure has no SVG, or the folder no config.
    """
    drawn = [
        _figure(path.with_suffix(".svg"), caption, number)
        for number, (path, caption) in enumerate((figures or {}).items(), start=1)
    ]
    shown = [_table(caption, rows) for caption, rows in (tables or {}).items() if len(rows) > 1]
    question = (about or "").strip().partition("\n\n")[0]
    parts = [
        f"<header>\n<h1>{html.escape(title)}</h1>",
        f'<p class="question">{html.escape(question)}</p>' if question else "",
        "</header>\n<main>",
        *(f"<p>{html.escape(remark)}</p>" for remark in remarks),
        _section("Results", shown),
        _section("Figures", drawn),
        _section("Settings", [_settings(json.loads((workdir / "config.json").read_text()))]),
        _section("How it was made", _origin(provenance.read_commands(workdir))),
        f"</main>\n<footer>archscale_jax {archscale.__version__}</footer>",
    ]
    path = workdir / NAME
    text = _document(title, "\n".join(part for part in parts if part))
    files.write_text(path, text)
    return path


def _document(title: str, body: str) -> str:
    """The page; its browser is told to load nothing, and to run no script but the page's own."""
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def _section(heading: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return f"<section>\n<h2>{heading}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(caption: str, rows: Rows) -> str:
    """A table whose first column names its rows; columns of numbers say by what they sort."""
    heading, *lines = rows
    for line in lines:
        if len(line) != len(heading):
            raise ValueError(
                f"table {caption!r} has {len(heading)} columns, and a row of {len(line)}: {line}"
            )
    numeric = [_are_numbers(column) for column in zip(*lines, strict=True)]
    head = "".join(
        f'<th scope="col"{_kind(number)}>{html.escape(text)}</th>'
        for text, number in zip(heading, numeric, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(map(_cell, range(len(line)), line, numeric))}</tr>\n" for line in lines
    )
    label = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>\n'
        f"<caption><span>{label}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _cell(column: int, text: str, numeric: bool) -> str:
    tag, scope = ("td", "") if column else ("th", ' scope="row"')
    number = _number(text) if numeric else None
    value = "" if number is None else f' data-value="{number:.17g}"'
    return f"<{tag}{scope}{_kind(numeric)}{value}>{html.escape(text)}</{tag}>"


def _kind(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _are_numbers(texts: Iterable[str]) -> bool:
    """Whether all texts begin with a number, or stand where there is none."""
    there = [text for text in texts if text]
    return bool(there) and all(_NUMBER.match(text) or _NO_NUMBER.fullmatch(text) for text in there)


def _number(text: str) -> float | None:
    """The number with which a text begins: 0.67 of `1†0.67`, 12.5 of `12.5 ± 0.1`."""
    found = _NUMBER.match(text)
    return float(found[1].replace(",", "").replace("−", "-")) if found else None


def _figure(path: pathlib.Path, caption: str, number: int) -> str:
    name = f"figure{number}"
    return (
        f'<figure>\n<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
        f"{inline_svg(path, name, name)}</div>\n"
        f'<figcaption id="{name}">{html.escape(caption)}</figcaption>\n</figure>'
    )


def _settings(config: Mapping[str, Any]) -> str:
    return _definitions(
        {name: html.escape(_value(value)) for name, value in sorted(config.items())}
    )


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _definitions(entries: Mapping[str, str], kind: str = "settings") -> str:
    """A list of names, texts, and what they mean, HTML."""
    lines = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{definition}</dd></div>\n"
        for name, definition in entries.items()
    )
    return f'<dl class="{kind}">\n{lines}</dl>'


def _origin(commands: Sequence[provenance.Command]) -> list[str]:
    """What the page says of the commands, oldest first, and of this moment."""
    number = "1 command" if len(commands) == 1 else f"{len(commands)} commands"
    if not commands:
        story = "Which commands made this run was not recorded."
    elif not commands[0]["resumed"] and len(commands) == 1:
        story = "One command made this run from start to end."
    else:
        begun = "what began it was not recorded, " if commands[0]["resumed"] else ""
        story = (
            f"This run was resumed: {begun}{number} went on with it, and what was finished was "
            "kept. Tables and figures show the results of all."
        )
    story += f" This page was written on {_time(provenance.now())}."
    return [f"<p>{story}</p>", *map(_command, commands)]


def _command(command: provenance.Command) -> str:
    words = [html.escape(shlex.quote(word)) for word in shlex.split(command["command"])]
    parts = " ".join(f"<span>{word}</span>" for word in words)
    versions = ", ".join(" ".join(one) for one in command["versions"].items())
    entries = {
        "command": f"<code>{parts}</code>",
        "started": _time(command["started"]),
        "machine": html.escape(command["machine"]),
        "devices": html.escape(", ".join(command["devices"])),
        "versions": html.escape(versions),
    }
    return _definitions({name: text for name, text in entries.items() if text}, "command")


def _time(moment: str) -> str:
    """`2026-01-31 12:00:00 UTC`."""
    return moment.replace("T", " ").replace("+00:00", " UTC")
