"""Figures that matplotlib wrote as SVG, made a part of an HTML page."""

import pathlib
import re
from xml.etree import ElementTree

_ROUNDED = ("d", "x", "y", "points")
_PIXELS_PER_POINT = 4 / 3
_FONTS = re.compile(r";? ?font-family: [^;]*")  # the page names one for all


def inline_svg(path: pathlib.Path, prefix: str, label_id: str) -> str:
    """Returns an SVG file of matplotlib as an element of a page that may hold others.

    Its ids get a prefix, as those of figures that matplotlib draws are alike; what would count for
    the whole page (its style sheet) and what points out of it (its metadata) is left out, and
    coordinates are rounded to hundredths of a point.

    Args:
      path: the file; texts are best texts, not paths (`svg.fonttype: none`).
      prefix: of its ids, letters and digits.
      label_id: id of the element of the page that says what the figure shows.

    Raises:
      ValueError: the file is no SVG of matplotlib, which tells its size in points.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no SVG: {error}") from None
    size = re.fullmatch(r"([\d.]+)pt", root.get("width", ""))
    if _local(root.tag) != "svg" or size is None:
        raise ValueError(f"{path} is no SVG with a width in points")
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _clean(element, prefix)
    width = round(_PIXELS_PER_POINT * float(size[1]))
    shape = {"role": "img", "aria-labelledby": label_id, "style": f"--width: {width}px"}
    root.attrib = {"viewBox": root.attrib["viewBox"], **shape}
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, prefix: str) -> None:
    """Makes names and ids those of an HTML page, and numbers and white space short."""
    element.tag = _local(element.tag)
    element.text, element.tail = (
        text if text and text.strip() else None for text in (element.text, element.tail)
    )
    attributes = {_local(name): value for name, value in element.attrib.items()}
    for name, value in attributes.items():
        if name == "id":
            value = f"{prefix}-{value}"
        elif name == "href" and value.startswith("#"):
            value = f"#{prefix}-{value[1:]}"
        elif name == "style":
            value = _FONTS.sub("", value)
        elif name in _ROUNDED:
            value = re.sub(r"-?\d+\.\d+", _rounded, " ".join(value.split()))
        attributes[name] = value.replace("url(#", f"url(#{prefix}-")
    element.attrib = attributes


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _local(name: str) -> str:
    """The name without its namespace, which HTML gives by itself."""
    return name.rpartition("}")[2]
