"""Figures that matplotlib wrote as SVG, made a part of an HTML page.

The file is not trusted: of it only the elements, attributes and style properties named here reach
the page, and references within the figure. It is read as a stream, with bounds on size and depth.
"""

import html
import pathlib
import re
from xml.parsers import expat

_SHAPES = "svg g defs clipPath path rect circle ellipse line polyline polygon use text tspan"
_GEOMETRY = "x y x1 y1 x2 y2 cx cy r rx ry dx dy width height points d transform"
_PRESENTATION = (
    "fill fill-opacity fill-rule stroke stroke-width stroke-opacity stroke-linecap stroke-linejoin "
    "stroke-dasharray stroke-dashoffset stroke-miterlimit opacity clip-path clip-rule text-anchor "
    "font font-size font-style font-weight font-variant font-stretch"
)
ELEMENTS = frozenset(_SHAPES.split())
ATTRIBUTES = frozenset(f"id href style {_GEOMETRY} {_PRESENTATION}".split())
PROPERTIES = frozenset(_PRESENTATION.split())
"""Style attributes; the page names one font family for all."""

MAX_BYTES = 20 * 2**20
MAX_DEPTH = 100
_PIXELS_PER_POINT = 4 / 3
_ROUNDED = ("d", "x", "y", "points")
_DECIMAL = re.compile(r"(?<!\d)-?\d{1,9}\.\d+")
_WIDTH = re.compile(r"(\d{1,5}(?:\.\d+)?)pt")
_VIEW_BOX = re.compile(r"(?:-?\d{1,6}(?:\.\d+)? ?){4}")
_PLAIN_VALUE = re.compile(r"[-+\w\s#.,%'()]*")
_REFERENCE = re.compile(r"url\(#([\w.-]+)\)")


def inline_svg(path: pathlib.Path, prefix: str, label_id: str) -> str:
    """Returns an SVG file of matplotlib as an element of a page that may hold others.

    Its ids get a prefix, as those of figures that matplotlib draws are alike; coordinates are
    rounded to hundredths of a point.

    Args:
      path: the file; texts are best texts, not paths (`svg.fonttype: none`).
      prefix: of its ids, letters and digits.
      label_id: id of the element of the page that says what the figure shows.

    Raises:
      ValueError: the file is not an SVG of matplotlib, which tells its size in points, or it is too
        large or too deeply nested.
      OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} exceeds {MAX_BYTES // 2**20} MiB")
    writer = _Writer(prefix, label_id)
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = writer.start
    parser.EndElementHandler = writer.end
    parser.CharacterDataHandler = writer.text
    parser.EntityDeclHandler = writer.entity
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as error:
        raise ValueError(f"{path} is not an SVG of matplotlib: {error}") from None
    return "".join(writer.parts)


class _Writer:
    """Writes what is allowed of the elements that a parser finds."""

    def __init__(self, prefix: str, label_id: str):
        self.parts: list[str] = []
        self._prefix, self._label_id = prefix, label_id
        self._open: list[str] = []
        self._defined: set[str] = set()
        self._skipped = 0  # depth within an element that is dropped

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = _local(tag)
        if not self._open:
            found = self._root(name, attributes)
        elif self._skipped or name not in ELEMENTS or name == "svg":
            self._skipped += 1
            return
        else:
            found = self._cleaned(attributes)
            if name == "use" and ("defs" in self._open or found.get("href") not in self._defined):
                self._skipped += 1  # copies of copies would multiply
                return
            if "defs" in self._open and "id" in found:
                self._defined.add(f"#{found['id']}")
        if len(self._open) >= MAX_DEPTH:
            raise ValueError(f"its elements are nested deeper than {MAX_DEPTH}")
        self._open.append(name)
        shown = "".join(f' {key}="{html.escape(value)}"' for key, value in found.items())
        self.parts.append(f"<{name}{shown}>")

    def end(self, tag: str) -> None:
        del tag
        if self._skipped:
            self._skipped -= 1
        else:
            self.parts.append(f"</{self._open.pop()}>")

    def text(self, text: str) -> None:
        if not self._skipped and text.strip() and self._open[-1] in ("text", "tspan"):
            self.parts.append(html.escape(text, quote=False))

    def entity(self, *declaration) -> None:
        raise ValueError(f"it declares the entity {str(declaration[0])[:60]!r}")

    def _root(self, name: str, attributes: dict[str, str]) -> dict[str, str]:
        size = _WIDTH.fullmatch(attributes.get("width", ""))
        view_box = " ".join(attributes.get("viewBox", "").split())
        if name != "svg" or size is None:
            raise ValueError("its root must be an svg with a width in points, such as 360pt")
        if not _VIEW_BOX.fullmatch(view_box):
            raise ValueError("its root must have a viewBox of four numbers, such as 0 0 360 240")
        width = round(_PIXELS_PER_POINT * float(size[1]))
        return {
            "viewBox": view_box,
            "role": "img",
            "aria-labelledby": self._label_id,
            "style": f"--width: {width}px",
        }

    def _cleaned(self, attributes: dict[str, str]) -> dict[str, str]:
        found = {}
        for name, value in ((_local(key), value) for key, value in attributes.items()):
            if name not in ATTRIBUTES:
                continue
            if name == "id":
                found[name] = f"{self._prefix}-{value}"
            elif name == "href":
                if value.startswith("#"):
                    found[name] = f"#{self._prefix}-{value[1:]}"
            elif name == "style":
                properties = (one.partition(":")[::2] for one in value.split(";"))
                kept = {key.strip(): self._value(text.strip()) for key, text in properties}
                found[name] = "; ".join(
                    f"{key}: {text}" for key, text in kept.items() if key in PROPERTIES and text
                )
            elif kept := self._value(value):
                short = _DECIMAL.sub(_rounded, " ".join(kept.split())) if name in _ROUNDED else kept
                found[name] = short
        return found

    def _value(self, value: str) -> str:
        """The value, its references those of this figure; empty where it may hold anything else."""
        own = _REFERENCE.sub(lambda found: f"url(#{self._prefix}-{found[1]})", value)
        plain = _REFERENCE.sub("", value)
        return own if _PLAIN_VALUE.fullmatch(plain) and "url" not in plain.lower() else ""


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _local(name: str) -> str:
    """The name without its namespace, which HTML gives by itself."""
    return name.rpartition(" ")[2]
