"""When two NAS-Bench-201 cells are the same: by the benchmark's strings, and as functions.

Dong and Yang (NAS-Bench-201, ICLR 2020, arXiv:2001.00326) count 6,466 unique cells among 15,625.
They compare strings in which every vertex is spelled out by what it sums. Those strings keep some
cells apart that compute the same thing: merging all of them leaves 4,930 functions.

Both criteria look at the cell alone: the benchmark trained equal cells separately, so that their
accuracies differ. A cell without a path from input to output has a form, too.
"""

from archscale_jax._spaces.cell import OPERATION_NAMES, cell_digits

_NONE, _SKIP = map(OPERATION_NAMES.index, ("none", "skip_connect"))


def canonical_cell(text_or_code: str) -> str:
    """Spells a cell as the benchmark does when it counts unique cells: 6,466 of 15,625.

    The input is `0`, an operation on a vertex `(vertex)@operation`, a skip the vertex itself, and
    nothing `#`: a none edge, or any edge from a vertex that is just `#`. A vertex is its sorted
    terms, joined by `+`. It is the string that `nats_bench` calls unique.

    Equal strings mean the same function, see `cell_function`; but that function may have several
    strings. `#` stays in a sum, as many times as it occurs, so that a vertex with two none edges
    is `#+#` and not nothing; and a sum behind a skip is sorted as one term.

    Args:
      text_or_code: the cell in either notation.

    Raises:
      TypeError: the argument is not a string.
      ValueError: malformed text, or an unknown operation.
    """
    vertices = ["0"]
    for group in cell_digits(text_or_code):
        terms = [_spelled(vertex, digit) for vertex, digit in zip(vertices, group, strict=False)]
        vertices.append("+".join(sorted(terms)))
    return vertices[-1]


def _spelled(vertex: str, digit: int) -> str:
    if digit == _NONE or vertex == "#":
        return "#"
    return vertex if digit == _SKIP else f"({vertex})@{OPERATION_NAMES[digit]}"


def cell_function(text_or_code: str) -> str:
    """Spells the function of the input `x` that a cell computes; 15,625 cells have 4,930.

    A skip is the identity, none is zero, and so is any operation on zero; sums have no order. Each
    other operation counts as one function of which nothing else is known. That leaves out:

    * weights: two edges with one operation on one vertex are two equal terms, as in the benchmark;
    * batch normalization, which gives zeros a trained offset: at initialization they stay zero;
    * that average pooling is linear.

    Args:
      text_or_code: the cell in either notation.

    Returns:
      A sum such as `nor_conv_3x3(x)+x`, or `0`; equal for two cells where the function is.

    Raises:
      TypeError: the argument is not a string.
      ValueError: malformed text, or an unknown operation.
    """
    vertices = [["x"]]  # the terms of each sum
    for group in cell_digits(text_or_code):
        terms = []
        for vertex, digit in zip(vertices, group, strict=False):
            if digit == _SKIP:
                terms += vertex
            elif digit != _NONE and vertex:
                terms.append(f"{OPERATION_NAMES[digit]}({'+'.join(vertex)})")
        vertices.append(sorted(terms))
    return "+".join(vertices[-1]) or "0"
