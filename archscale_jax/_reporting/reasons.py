"""The parts of numbers as text; of several numbers of one kind the range."""

from collections.abc import Hashable, Iterable, Sequence

from archscale_jax.rules._registry import Part

Parts = Sequence[Part]


def kind_of(parts: Parts) -> Hashable:
    """Returns what texts of one kind have in common: all but the numbers."""
    return tuple(part.kind for part in parts)


def reason_text(same: Sequence[Parts], *, values: bool = False) -> str:
    """Returns the parts of a number, or of several of one kind: `stem: C = 2, n = 36 [AAS Eq. 4]`.

    With the values of the parts, as of multipliers, `width sgd 4, input: r = 1, s = 4 [μP]`.
    """
    return " × ".join(_part_text(column, values) for column in zip(*same, strict=True))


def _part_text(column: Parts, values: bool) -> str:
    first = column[0]
    value = f" {range_text((part.value for part in column), '.4g')}" if values else ""
    place = f", {first.place}" if first.place else ""
    symbols = ", ".join(
        f"{symbol} = {range_text((part.symbols[symbol] for part in column), '.4g')}"
        for symbol in first.symbols
    )
    text = f"{first.rule}{value}{place}" + (f": {symbols}" if symbols else "")
    return f"{text} {first.citation}".rstrip()


def range_text(numbers: Iterable[float], precision: str) -> str:
    """Returns a number; of several the smallest and the largest, of none nothing."""
    known = list(numbers)
    ends = dict.fromkeys(format(end(known), precision) for end in (min, max) if known)
    return "…".join(ends)
